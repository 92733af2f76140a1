"""sockets.py: from an address to listening sockets, with real sockets of every family.

A listener that leaves sockets.py listens, is not inheritable (PEP 446), names its protocol,
does not block, and is shown by its own address.
"""

import contextlib
import functools
import os
import re
import socket
import stat
import sys
from pathlib import Path

import pytest
from conftest import POSIX_ONLY, Client, refuses

import sockets

NEEDS_UNIX = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no AF_UNIX here")
AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


NEEDS_IPV6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
BOTH = [pytest.param("127.0.0.1", id="IPv4"), pytest.param("::1", id="IPv6", marks=NEEDS_IPV6)]


@pytest.fixture
def keep():
    """Closes at the end of the test what the test opens: keep(socket) returns it."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context


@pytest.fixture
def tcp(keep):
    """bind_tcp, with its listeners closed at the end of the test."""
    return lambda *args: [keep(listener) for listener in sockets.bind_tcp(*args)]


def bound(host="127.0.0.1", kind=socket.SOCK_STREAM) -> socket.socket:
    """What a process manager passes on: bound, but perhaps not listening yet."""
    given = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
    given.bind((host, 0))
    return given


def refusal(function, *arguments, **options) -> str:
    """The sentence of the OSError that a call raises: one line."""
    with pytest.raises(OSError) as info:
        function(*arguments, **options)
    assert "\n" not in info.value.strerror
    return info.value.strerror


class TestTCP:
    """IPv4, IPv6, host names, one port for both families."""

    @pytest.mark.parametrize("host", BOTH)
    def test_an_address_gives_one_listener_with_the_port_that_was_asked_for(self, tcp, host):
        """At once, although a connection is in TIME_WAIT: our side closes first here."""
        [listener] = tcp(host, 0, 5)
        address = listener.getsockname()[:2]
        with Client(address) as client:
            listener.accept()[0].close()
            assert client.read_all() == b""
        listener.close()
        [listener] = tcp(*address, 5)
        assert listener.getsockname()[:2] == address and not refuses(address)
        assert not listener.get_inheritable() and listener.proto == socket.IPPROTO_TCP

    @pytest.mark.parametrize("name", ["localhost", ""])
    def test_a_name_listens_on_every_address_and_on_one_port(self, tcp, name):
        """tornado #977: port 0 gave IPv4 and IPv6 different ports."""
        how = {"type": socket.SOCK_STREAM, "flags": socket.AI_PASSIVE}
        expected = {info[4][0] for info in socket.getaddrinfo(name or None, 0, **how)}
        if not has_ipv6():
            expected = {address for address in expected if ":" not in address}
        for _ in range(8):  # once might be luck
            names = [listener.getsockname() for listener in tcp(name, 0, 5)]
            assert sorted(n[0] for n in names) == sorted(expected)
            assert len({n[1] for n in names}) == 1 and names[0][1] != 0

    @NEEDS_IPV6
    def test_ipv6_leaves_the_same_port_of_ipv4_alone(self, tcp):
        """Otherwise "::" and 0.0.0.0 could not be used side by side. And if a port is busy
        on one address of a host, the other one is given back."""
        [six] = tcp("::", 0, 5)
        port = six.getsockname()[1]
        assert re.search("::.*is in use;", refusal(sockets.bind_tcp, "", port, 5))
        [four] = tcp("0.0.0.0", port, 5)
        assert four.getsockname()[1] == port

    @pytest.mark.skipif(os.name != "nt", reason="of Windows only")
    def test_no_other_program_can_take_over_the_port(self, tcp, keep):
        """Windows: exclusive address use instead of SO_REUSEADDR."""
        [listener] = tcp("127.0.0.1", 0, 5)
        thief = keep(socket.socket())
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError):
            thief.bind(listener.getsockname())

    @pytest.mark.parametrize("host", BOTH)
    def test_a_busy_port_is_one_line_that_says_what_to_do(self, tcp, host):
        [listener] = tcp(host, 0, 5)
        port = listener.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        sentence = f"{shown}:{port} is in use; stop that server, or choose another --port"
        assert refusal(sockets.bind_tcp, host, port, 5) == sentence

    @pytest.mark.parametrize(
        "host", ["192.0.2.1", "no-such-host.invalid", "a..b", "x" * 80]  # RFC 5737, RFC 2606
    )
    def test_a_host_that_is_not_here_or_nowhere_is_one_line(self, host):
        sentence = refusal(sockets.bind_tcp, host, 0, 5)
        assert host in sentence and "--host" in sentence

    @pytest.mark.skipif(AS_ROOT, reason="root may bind every port")
    @POSIX_ONLY
    def test_a_privileged_port_is_one_line(self):
        assert "127.0.0.1:1 needs privileges" in refusal(sockets.bind_tcp, "127.0.0.1", 1, 5)


class TestDescribe:
    """uvicorn #974 and #1890: one function shows every listener."""

    @pytest.mark.parametrize("host", BOTH)
    def test_a_tcp_listener_is_shown_as_a_url(self, tcp, host):
        [listener] = tcp(host, 0, 5)
        shown = f"[{host}]" if ":" in host else host
        url = f"https://{shown}:{listener.getsockname()[1]}"
        assert sockets.describe(listener, "https") == url

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such names")
    @pytest.mark.parametrize(
        "family, name, shown",
        [("AF_UNIX", f"\0foal {os.getpid()}", r"unix:@foal \d+")]  # as others show it
        + [("AF_VSOCK", (-1, -1), r"AF_VSOCK \(\d+, \d+\)")],  # of a virtual machine
        ids=["abstract", "VSOCK"],
    )
    def test_other_families_have_addresses_too(self, keep, family, name, shown):
        try:
            given = keep(socket.socket(getattr(socket, family)))
            given.bind(name)
        except OSError as exc:
            pytest.skip(f"no such sockets here: {exc}")
        assert re.fullmatch(shown, sockets.describe(given, "http"))


@NEEDS_UNIX
class TestUnix:
    """uvicorn #553, #722, #2731: only a stale socket is replaced."""

    @pytest.fixture
    def unix(self, keep):
        """bind_unix, with its listener closed at the end; returns what removes the file."""

        def bind(path):
            listener, remove_file = sockets.bind_unix(path, 5)
            assert not keep(listener).get_inheritable()
            assert sockets.describe(listener, "http") == f"unix:{path}"
            return remove_file

        return bind

    def stale(self, path, mode=0o666):
        """Leave the file of a socket on which no process listens any more."""
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        os.chmod(path, mode)

    @pytest.mark.parametrize("mode", [None, 0o600, 0o777])
    def test_all_may_use_a_new_file_and_a_stale_one_keeps_its_mode(self, unix, path, mode):
        """The proxy in front is another user, whatever our umask is."""
        self.stale(path, mode) if mode else None
        before = os.umask(0o077)
        try:
            unix(path)
        finally:
            os.umask(before)
        assert stat.S_IMODE(os.lstat(path).st_mode) == (mode or 0o666) and not refuses(path)

    @pytest.mark.parametrize("kind", ["file", "folder", "link", "datagram", "live", "busy"])
    def test_every_other_kind_of_file_is_left_alone(self, keep, path, kind):
        """A live socket, also with a full backlog, and one of datagrams, as /dev/log is."""
        if kind == "file":
            Path(path).write_text("precious")
        elif kind == "folder":
            os.mkdir(path)
        elif kind == "link":
            self.stale(path + "tale")
            os.symlink(path + "tale", path)
        else:
            how = socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM
            other = keep(socket.socket(socket.AF_UNIX, how))
            other.bind(path)
            other.listen(0) if kind != "datagram" else None
        with contextlib.suppress(BlockingIOError):
            while kind == "busy":
                client = keep(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(path)
        before, no_socket = os.lstat(path), kind in ("file", "folder", "link")
        why = "it exists and is no socket" if no_socket else "it is in use by another server"
        assert refusal(sockets.bind_unix, path, 5) == f"cannot listen on --uds {path}: {why}"
        assert os.lstat(path) == before

    def test_the_file_is_removed_even_if_the_app_changes_its_folder(
        self, unix, path, monkeypatch
    ):
        monkeypatch.chdir(os.path.dirname(path))
        remove_file = unix(os.path.basename(path))
        monkeypatch.chdir("/")
        remove_file()
        assert not os.path.lexists(path)
        remove_file()  # harmless

    def test_the_file_of_another_server_is_not_removed(self, unix, path):
        """uvicorn #722: the exit of the old server deleted the socket of the new one."""
        remove_ours = unix(path)
        os.rename(path, path + ".old")  # so that its inode is not used again
        unix(path)
        remove_ours()
        assert not refuses(path)

    @pytest.mark.parametrize("more", ["x" * 120, "x" * 300, "/missing/s"])
    def test_a_path_that_cannot_be_bound_is_one_line(self, path, more):
        """The address holds 108 bytes, and the name of a file 255 (man 7 unix)."""
        assert path + more in refusal(sockets.bind_unix, path + more, 5)


@pytest.mark.skipif(hasattr(socket, "AF_UNIX"), reason="AF_UNIX is there")
def test_without_unix_sockets_the_error_says_what_to_use():
    assert "--host and --port" in refusal(sockets.bind_unix, "s", 5)


class TestAdopt:
    """`--fd N` of any family, by socket.socket(fileno=)."""

    @pytest.mark.parametrize("listening", [True, False])
    @pytest.mark.parametrize("host", BOTH)
    def test_a_tcp_socket_is_taken_over(self, keep, host, listening):
        given = keep(bound(host))
        given.listen(5) if listening else None
        copy = given.dup()
        copy.set_inheritable(True)  # systemd passes it so
        adopted = keep(sockets.adopt(copy.detach(), 5))
        assert adopted.getsockname() == given.getsockname()
        assert not refuses(given.getsockname()[:2]) and not adopted.get_inheritable()
        # Whatever the giver said. Windows asks the socket, and Wine does not know.
        assert os.name == "nt" or adopted.proto == socket.IPPROTO_TCP

    def connected(self) -> socket.socket:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            return socket.create_connection(listener.getsockname())

    @pytest.mark.parametrize(
        "make, why",
        [
            (functools.partial(bound, kind=socket.SOCK_DGRAM), "it is not a stream socket"),
            (socket.socket, "" if os.name == "nt" else "it is not bound to an address"),
            pytest.param("unbound", "it is not bound to an address", marks=NEEDS_UNIX),
            pytest.param("connected", "Invalid argument", marks=POSIX_ONLY),
        ],
    )
    def test_what_cannot_listen_is_refused_and_stays_open(self, keep, make, why):
        """On an unbound socket listen() works, on a port that no client knows."""
        made = {"unbound": lambda: socket.socket(socket.AF_UNIX), "connected": self.connected}
        given = keep(made.get(make, make)())
        words = refusal(sockets.adopt, given.fileno(), 5)
        assert re.search(f"--fd {given.fileno()}.*: {why}", words)
        assert os.name == "nt" or given.getsockname() is not None  # it is still open

    def test_what_is_no_socket_is_refused_and_stays_open(self, tmp_path):
        with open(tmp_path / "file", "w") as file:
            number = file.fileno()
            assert f"--fd {number} is no socket" in refusal(sockets.adopt, number, 5)
            file.write("still open")
        assert "is no socket" in refusal(sockets.adopt, number, 5)  # now it is closed

    @pytest.mark.parametrize(
        "pid, count, expected",
        [("42", "1", [3]), ("42", "3", [3, 4, 5])]
        + [("42", count, []) for count in (None, "0", "", "-1", "many")]
        + [(pid, "1", []) for pid in (None, "43", "", "4")],
    )
    def test_descriptors_of_systemd_are_ours_only_if_the_pid_is(self, pid, count, expected):
        """man 3 sd_listen_fds: LISTEN_FDS descriptors from number 3 on, for LISTEN_PID."""
        environ = {"LISTEN_PID": pid, "LISTEN_FDS": count}
        environ = {name: value for name, value in environ.items() if value is not None}
        assert sockets.systemd_fds(environ, 42) == expected


class TestOpenListeners:
    """fd wins over uds, and uds over host and port. (test_deploy.py has systemd's sockets,
    and test_tls.py the files of TLS.)"""

    def open(self, **options) -> tuple:
        defaults = {"host": "127.0.0.1", "port": 0, "uds": None, "fd": None, "backlog": 5}
        return sockets.open_listeners(**{**defaults, **options})

    @NEEDS_UNIX
    @pytest.mark.parametrize("given", ["fd and uds", "uds", "nothing"])
    def test_what_is_given_is_opened_and_can_be_closed_twice(self, keep, path, given, monkeypatch):
        if "uds" in given:  # then it does not matter what systemd has passed on
            monkeypatch.setenv("LISTEN_FDS", "1")
            monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        passed = keep(bound())
        fd = passed.dup().detach() if "fd" in given else None
        [listener], close = self.open(fd=fd, uds=path if "uds" in given else None)
        assert (listener.getsockname() == passed.getsockname()) == ("fd" in given)
        assert os.path.exists(path) == (given == "uds")
        assert listener.gettimeout() == 0.0  # so it is for the workers that get it
        close()
        close()
        assert listener.fileno() == -1 and not os.path.exists(path)

    @pytest.mark.parametrize(
        "options, words",
        [({"port": 65536}, "--port must be 65535 or less, not 65536")]
        + [({"backlog": 2**31}, "--backlog must be 2147483647 or less")]
        + [({"fd": 2**70}, "cannot listen: ")],
    )
    def test_what_cannot_be_opened_is_one_line(self, options, words):
        assert words in refusal(self.open, **options)
