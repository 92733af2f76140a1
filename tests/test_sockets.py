"""From an address to listening sockets: every family, every refusal, real sockets only.

What a listener must be when it leaves sockets.py: listening, not inheritable, of a
known protocol, and shown by its own address.
"""

import contextlib
import errno
import multiprocessing
import os
import socket
import stat
import subprocess
import sys
import tempfile

import pytest
from conftest import GET, PATIENCE, Client, serving

import example
import sockets

POSIX_ONLY = pytest.mark.skipif(os.name == "nt", reason="Windows has no such thing")
WINDOWS_ONLY = pytest.mark.skipif(os.name != "nt", reason="of Windows only")
NEEDS_UNIX = pytest.mark.skipif(
    not hasattr(socket, "AF_UNIX"), reason="this Python has no AF_UNIX"
)
AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


NEEDS_IPV6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
BOTH = [
    pytest.param("127.0.0.1", id="IPv4"),
    pytest.param("::1", id="IPv6", marks=NEEDS_IPV6),
]


@pytest.fixture
def keep():
    """Closes at the end what a test opens: keep(socket) gives it back."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context


@pytest.fixture
def path():
    """For a Unix socket: pytest's own folders are too long for macOS' 104 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield folder + "/s"


@pytest.fixture
def tcp(keep):
    """bind_tcp, with its listeners closed at the end."""
    return lambda *args: [keep(listener) for listener in sockets.bind_tcp(*args)]


def connects(address) -> bool:
    """Does a client get through, now?"""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    if family == socket.AF_INET and ":" in address[0]:
        family = socket.AF_INET6
    with socket.socket(family) as client, contextlib.suppress(ConnectionRefusedError):
        client.settimeout(PATIENCE)
        client.connect(address)
        return True
    return False


def bound(host="127.0.0.1", kind=socket.SOCK_STREAM) -> socket.socket:
    """What a process manager passes on: bound, and perhaps not listening yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    given = socket.socket(family, kind)
    given.bind((host, 0))
    return given


class TestTCP:
    """behaviour.md §2: IPv4, IPv6, host names, one port for both families."""

    @pytest.mark.parametrize("host", BOTH)
    def test_an_address_gives_one_listener_that_can_be_connected_to(self, tcp, host):
        [listener] = tcp(host, 0, 5)
        assert listener.getsockname()[0] == host
        assert connects(listener.getsockname()[:2])

    def test_the_port_asked_for_is_the_port(self, tcp):
        [first] = sockets.bind_tcp("127.0.0.1", 0, 5)
        port = first.getsockname()[1]
        first.close()
        [second] = tcp("127.0.0.1", port, 5)
        assert second.getsockname() == ("127.0.0.1", port)

    @pytest.mark.parametrize("name", ["localhost", ""])
    def test_a_name_listens_on_every_address_it_resolves_to(self, tcp, name):
        found = socket.getaddrinfo(
            name or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        expected = {info[4][0] for info in found}
        if not has_ipv6():
            expected = {address for address in expected if ":" not in address}
        listeners = tcp(name, 0, 5)
        assert sorted(x.getsockname()[0] for x in listeners) == sorted(expected)

    @pytest.mark.parametrize("name", ["localhost", ""])
    def test_port_zero_gives_ipv4_and_ipv6_the_same_port(self, tcp, name):
        """tornado #977. With "" both families are there wherever IPv6 is."""
        for _ in range(8):  # once might be luck
            ports = {listener.getsockname()[1] for listener in tcp(name, 0, 5)}
            assert len(ports) == 1 and ports != {0}

    @NEEDS_IPV6
    def test_all_addresses_means_both_families(self, tcp):
        listeners = tcp("", 0, 5)
        assert {x.family for x in listeners} == {socket.AF_INET, socket.AF_INET6}
        port = listeners[0].getsockname()[1]
        assert connects(("127.0.0.1", port)) and connects(("::1", port))

    @NEEDS_IPV6
    def test_ipv6_leaves_the_same_port_of_ipv4_alone(self, tcp):
        """Else "::" and 0.0.0.0 could not be asked for side by side."""
        [six] = tcp("::", 0, 5)
        [four] = tcp("0.0.0.0", six.getsockname()[1], 5)
        assert four.getsockname()[1] == six.getsockname()[1]

    @pytest.mark.parametrize("host", BOTH)
    def test_the_protocol_is_named(self, tcp, host):
        """asyncio sets TCP_NODELAY only where it reads IPPROTO_TCP (behaviour §3)."""
        [listener] = tcp(host, 0, 5)
        assert listener.proto == socket.IPPROTO_TCP

    def test_the_backlog_holds_clients_until_somebody_accepts(self, tcp):
        [listener] = tcp("127.0.0.1", 0, 5)
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(Client(listener.getsockname())).send(b"hello")
            for _ in range(3):
                conn = stack.enter_context(listener.accept()[0])
                conn.settimeout(PATIENCE)
                assert conn.recv(5) == b"hello"


class TestRefusals:
    """behaviour.md §1: which address, and a hint, in one line."""

    def refusal(self, *arguments) -> OSError:
        with pytest.raises(OSError) as info:
            for listener in sockets.bind_tcp(*arguments):
                listener.close()
        assert "\n" not in info.value.strerror
        return info.value

    @pytest.mark.parametrize("host", BOTH)
    def test_a_busy_port_is_named_with_a_hint(self, tcp, host):
        [listener] = tcp(host, 0, 5)
        port = listener.getsockname()[1]
        error = self.refusal(host, port, 5)
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        assert error.strerror.startswith(f"{shown} is in use")
        assert "--port" in error.strerror and error.errno == errno.EADDRINUSE

    @NEEDS_IPV6
    def test_a_port_busy_on_one_address_gives_back_the_others(self, tcp):
        """What if 0.0.0.0 is free and :: is not? Nothing stays half open."""
        [six] = tcp("::", 0, 5)
        port = six.getsockname()[1]
        sentence = self.refusal("", port, 5).strerror
        assert f"[::]:{port} is " in sentence and "--port" in sentence
        tcp("0.0.0.0", port, 5)

    def test_an_address_of_another_machine_is_named_with_a_hint(self):
        error = self.refusal("192.0.2.1", 0, 5)  # RFC 5737: nobody's
        assert "192.0.2.1" in error.strerror and "--host" in error.strerror

    @pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 80])
    def test_a_name_that_does_not_resolve_is_named(self, host):
        error = self.refusal(host, 0, 5)
        assert host in error.strerror and "--host" in error.strerror

    @pytest.mark.skipif(AS_ROOT, reason="root may bind every port")
    @POSIX_ONLY
    def test_a_privileged_port_is_named_with_a_hint(self):
        error = self.refusal("127.0.0.1", 1, 5)
        assert "127.0.0.1:1 is not allowed" in error.strerror
        assert "privileges" in error.strerror


class TestStartingAgain:
    """Windows: exclusive address use instead of SO_REUSEADDR (behaviour.md §2)."""

    def test_a_port_can_be_used_again_at_once(self, tcp):
        """What if the last connection is still in TIME_WAIT? Whoever closes first has
        it, so the server's side closes first."""
        [listener] = sockets.bind_tcp("127.0.0.1", 0, 5)
        address = listener.getsockname()
        with Client(address) as client:
            listener.accept()[0].close()
            assert client.read_all() == b""
        listener.close()
        [again] = tcp(*address, 5)
        assert connects(again.getsockname())

    @WINDOWS_ONLY
    def test_no_other_program_can_steal_the_port(self, tcp, keep):
        [listener] = tcp("127.0.0.1", 0, 5)
        thief = keep(socket.socket())
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError):
            thief.bind(listener.getsockname())


def answer_with_pid(listener) -> None:
    """A worker in small: one connection, one answer."""
    with listener, listener.accept()[0] as conn:
        conn.sendall(b"%d" % os.getpid())


def use_bare_number(fd, pipe) -> None:
    """The mistake: a descriptor's number means nothing in another process."""
    try:
        socket.socket(fileno=fd).detach()
        pipe.send(0)
    except OSError as exc:
        pipe.send(exc.errno)


class TestSharing:
    """bugs.md 1, uvicorn #683: the parent binds and listens before the first spawn."""

    spawn = multiprocessing.get_context("spawn")

    def start(self, target, *arguments):
        child = self.spawn.Process(target=target, args=arguments, daemon=True)
        child.start()
        return child

    def test_a_client_connects_before_anybody_accepts(self, tcp):
        """bugs.md 1: before any child exists a client can connect."""
        [listener] = tcp("127.0.0.1", 0, 5)
        assert connects(listener.getsockname())

    def test_bound_alone_is_not_enough(self, keep):
        """bugs.md 1, the historical mistake: bound, and listen left to the children."""
        assert not connects(keep(bound()).getsockname())

    def test_two_processes_accept_on_one_pickled_listener(self, tcp):
        """bugs.md 1: a listener survives pickling; two pids answer on one port."""
        [listener] = tcp("127.0.0.1", 0, 5)
        children = [self.start(answer_with_pid, listener) for _ in range(2)]
        answers = set()
        for _ in children:
            with Client(listener.getsockname()) as client:
                answers.add(int(client.read_all()))
        for child in children:
            child.join(PATIENCE)
        assert answers == {child.pid for child in children}

    @POSIX_ONLY
    def test_a_bare_descriptor_number_means_nothing_in_a_child(self, tcp):
        """bugs.md 1, the mistake a student makes: PEP 446 → EBADF."""
        [listener] = tcp("127.0.0.1", 0, 5)
        # A number that spawn itself will not use.
        number = os.dup2(listener.fileno(), 200, inheritable=False)
        ours, theirs = self.spawn.Pipe()
        child = self.start(use_bare_number, number, theirs)
        assert ours.poll(PATIENCE)
        assert ours.recv() == errno.EBADF
        child.join(PATIENCE)
        os.close(number)


HOLDS = """
import os, sys
inode = int(sys.argv[1])
for fd in range(256):
    try: found = os.fstat(fd)
    except OSError: continue
    if found.st_ino == inode: sys.exit("held")
"""


def held_by_a_subprocess(listener) -> bool:
    """Does a program that the app starts, carelessly, get our socket?"""
    inode = os.fstat(listener.fileno()).st_ino
    command = [sys.executable, "-I", "-S", "-c", HOLDS, str(inode)]
    done = subprocess.run(command, close_fds=False, stderr=subprocess.PIPE)
    assert done.stderr.strip() in (b"", b"held")
    return done.returncode == 1


class TestInheritance:
    """PEP 446: listeners are not inheritable by the app's own subprocesses."""

    def test_a_listener_is_not_inheritable(self, tcp):
        [listener] = tcp("127.0.0.1", 0, 5)
        assert not listener.get_inheritable()

    @POSIX_ONLY
    def test_a_subprocess_does_not_hold_a_listener(self, tcp):
        [listener] = tcp("127.0.0.1", 0, 5)
        assert not held_by_a_subprocess(listener)
        listener.set_inheritable(True)  # the mistake, to see that it would be seen
        assert held_by_a_subprocess(listener)

    @POSIX_ONLY
    def test_a_subprocess_does_not_hold_an_adopted_listener(self, keep):
        given = bound()
        given.set_inheritable(True)  # as it reaches us from systemd
        adopted = keep(sockets.adopt(given.detach(), 5))
        assert not adopted.get_inheritable() and not held_by_a_subprocess(adopted)

    @NEEDS_UNIX
    def test_a_subprocess_does_not_hold_a_unix_listener(self, keep, path):
        listener = keep(sockets.bind_unix(path, 5)[0])
        assert not listener.get_inheritable() and not held_by_a_subprocess(listener)


class TestDescribe:
    """bugs.md 5, uvicorn #974 and #1890: one function, from getsockname()."""

    @pytest.mark.parametrize("host", BOTH)
    def test_a_tcp_listener_is_shown_as_a_url(self, tcp, host):
        [listener] = tcp(host, 0, 5)
        port = listener.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        assert sockets.describe(listener, "http") == f"http://{shown}:{port}"
        assert sockets.describe(listener, "https") == f"https://{shown}:{port}"

    @NEEDS_UNIX
    def test_a_unix_listener_is_shown_by_its_path(self, keep, path):
        listener = keep(sockets.bind_unix(path, 5)[0])
        assert sockets.describe(listener, "http") == f"unix:{path}"

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such names")
    def test_an_abstract_one_is_shown_as_others_show_it(self, keep):
        given = socket.socket(socket.AF_UNIX)
        given.bind(f"\0foal {os.getpid()}")
        listener = keep(sockets.adopt(given.detach(), 5))
        assert sockets.describe(listener, "http") == f"unix:@foal {os.getpid()}"

    @pytest.mark.skipif(not hasattr(socket, "AF_VSOCK"), reason="no such sockets here")
    def test_one_of_another_family_has_an_address_too(self, keep):
        try:
            given = socket.socket(socket.AF_VSOCK)
            given.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        except OSError as exc:
            pytest.skip(f"no such sockets here: {exc}")
        listener = keep(sockets.adopt(given.detach(), 5))
        assert sockets.describe(listener, "http").startswith("AF_VSOCK (")

    @pytest.mark.parametrize("host", BOTH)
    def test_an_adopted_listener_is_shown_like_our_own(self, keep, host):
        given = bound(host)
        [shown, port] = given.getsockname()[:2]
        adopted = keep(sockets.adopt(given.detach(), 5))
        shown = f"[{shown}]" if ":" in shown else shown
        assert sockets.describe(adopted, "http") == f"http://{shown}:{port}"

    @pytest.mark.parametrize("host", BOTH)
    def test_a_listener_has_no_peer_to_ask_for(self, tcp, host):
        """bugs.md 5, the historical mistake: ENOTCONN, or WinError 10057."""
        [listener] = tcp(host, 0, 5)
        with pytest.raises(OSError) as info:
            listener.getpeername()
        assert info.value.errno in (errno.ENOTCONN, getattr(errno, "WSAENOTCONN", 0))
        assert sockets.describe(listener, "http")


@NEEDS_UNIX
class TestUnix:
    """behaviour.md §2; uvicorn #553, #722, #2731: the stale go, all others stay."""

    @pytest.fixture
    def unix(self, keep):
        def bind(path):
            listener, remove_file = sockets.bind_unix(path, 5)
            keep(listener)
            return remove_file

        return bind

    def stale(self, path, mode=0o666):
        """A socket's file that nobody listens on any more."""
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        os.chmod(path, mode)

    def refused(self, path) -> str:
        """The refusal's line; whatever is at the path stays as it is."""
        before = os.lstat(path)
        with pytest.raises(OSError) as info:
            sockets.bind_unix(path, 5)
        assert os.lstat(path) == before and "\n" not in info.value.strerror
        assert path in info.value.strerror and "--uds" in info.value.strerror
        return info.value.strerror

    @pytest.mark.parametrize("umask", [0o000, 0o077])
    def test_a_new_file_can_be_used_by_everybody(self, unix, path, umask):
        """The web server in front is another user, whatever our umask."""
        before = os.umask(umask)
        try:
            unix(path)
        finally:
            os.umask(before)
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o666 and connects(path)

    @pytest.mark.parametrize("mode", [0o600, 0o660, 0o777])
    def test_a_stale_file_is_replaced_and_keeps_its_mode(self, unix, path, mode):
        self.stale(path, mode)
        assert not connects(path)
        unix(path)
        assert connects(path) and stat.S_IMODE(os.lstat(path).st_mode) == mode

    def test_a_live_socket_is_never_touched(self, unix, path):
        unix(path)
        assert "is in use" in self.refused(path)
        assert connects(path)

    def test_a_live_socket_with_a_full_backlog_is_alive(self, keep, path):
        busy = keep(socket.socket(socket.AF_UNIX))
        busy.bind(path)
        busy.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = keep(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(path)
        assert "is in use" in self.refused(path)

    def test_a_live_socket_of_another_kind_is_alive(self, keep, path):
        """syslog's /dev/log is a datagram socket: connect says EPROTOTYPE."""
        keep(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)).bind(path)
        self.refused(path)

    @pytest.mark.parametrize("kind", ["file", "directory", "link to a stale socket"])
    def test_another_kind_of_file_is_never_touched(self, path, kind):
        if kind == "file":
            with open(path, "w") as file:
                file.write("precious")
        elif kind == "directory":
            os.mkdir(path)
        else:
            self.stale(path + "tale")
            os.symlink(path + "tale", path)
        assert "no socket" in self.refused(path)

    def test_the_file_is_removed_with_us(self, unix, path):
        remove_file = unix(path)
        remove_file()
        assert not os.path.lexists(path)
        remove_file()  # gone already: nothing to say

    def test_so_it_is_if_the_app_has_changed_its_folder(self, unix, path, monkeypatch):
        monkeypatch.chdir(os.path.dirname(path))
        remove_file = unix(os.path.basename(path))
        monkeypatch.chdir("/")
        remove_file()
        assert not os.path.lexists(path)

    def test_a_file_that_somebody_put_in_its_place_is_not_removed(self, unix, path):
        """uvicorn #722: the new server's socket, deleted by the old one's exit."""
        remove_ours = unix(path)
        os.rename(path, path + ".old")  # so that its inode is not used again
        remove_theirs = unix(path)
        remove_ours()
        assert connects(path)
        remove_theirs()
        assert not os.path.lexists(path)

    @pytest.mark.parametrize("length", [120, 300])
    def test_a_path_that_is_too_long_is_one_line(self, path, length):
        """The address holds 108 bytes, and a file's name 255 (man 7 unix)."""
        path += "x" * length
        with pytest.raises(OSError) as info:
            sockets.bind_unix(path, 5)
        assert path in info.value.strerror and "\n" not in info.value.strerror

    def test_a_folder_that_is_missing_is_one_line(self, path):
        path += "/missing/s"
        with pytest.raises(OSError) as info:
            sockets.bind_unix(path, 5)
        assert path in info.value.strerror and "\n" not in info.value.strerror


@pytest.mark.skipif(hasattr(socket, "AF_UNIX"), reason="AF_UNIX is there")
def test_without_unix_sockets_the_refusal_says_what_to_use():
    with pytest.raises(OSError, match="--host and --port"):
        sockets.bind_unix("s", 5)


class TestAdopt:
    """behaviour.md §2: `--fd N` of any family, by socket.socket(fileno=)."""

    @pytest.fixture
    def number(self, keep):
        """The descriptor of a socket that somebody else opened, and still has."""
        return lambda given: keep(given).fileno()

    def adopted(self, number) -> socket.socket:
        """Adopt a copy: the original is the giver's to close."""
        with socket.socket(fileno=number) as given:
            try:
                return sockets.adopt(given.dup().detach(), 5)
            finally:
                given.detach()

    def refusal(self, number) -> str:
        """The one line; and the caller's descriptor stays open."""
        with pytest.raises(OSError) as info:
            sockets.adopt(number, 5)
        assert f"--fd {number} " in info.value.strerror
        assert "\n" not in info.value.strerror
        return info.value.strerror

    @pytest.mark.parametrize("listening", [True, False])
    @pytest.mark.parametrize("host", BOTH)
    def test_a_tcp_socket_is_taken_over(self, keep, number, host, listening):
        given = bound(host)
        given.listen(5) if listening else None
        adopted = keep(self.adopted(number(given)))
        assert adopted.getsockname() == given.getsockname()
        assert adopted.family == given.family and connects(given.getsockname()[:2])

    @NEEDS_UNIX
    def test_a_unix_socket_is_taken_over_and_keeps_its_file(self, keep, number, path):
        given = socket.socket(socket.AF_UNIX)
        given.bind(path)
        keep(self.adopted(number(given)))
        assert connects(path)

    @pytest.mark.skipif(os.name == "nt", reason="Windows says itself what a socket is")
    @pytest.mark.parametrize("host", BOTH)
    def test_the_protocol_is_named_whatever_the_giver_said(self, keep, number, host):
        """behaviour.md §3: else 40 ms a request, as in uvicorn with --fd."""
        adopted = keep(self.adopted(number(bound(host))))
        assert adopted.proto == socket.IPPROTO_TCP

    @pytest.mark.parametrize("how", ["bound", "adopted"])
    def test_accepted_connections_do_not_wait_for_acks(self, tcp, number, how):
        """TCP_NODELAY on every accepted connection, in every mode (behaviour.md §3).
        Windows' proactor accepts with proto 0, so the listener's is not enough."""
        if how == "bound":
            [listener] = tcp("127.0.0.1", 0, 5)
        else:
            listener = self.adopted(number(bound()))
        with serving(example.app, listener) as running, running.connect() as client:
            client.send(GET)
            assert client.response()[0] == 200

            def nodelay():
                [connection] = running.server.connections
                accepted = connection.transport.get_extra_info("socket")
                return accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

            assert running.call(nodelay)

    def test_a_datagram_socket_is_refused(self, number):
        given = bound(kind=socket.SOCK_DGRAM)
        assert "not a stream socket" in self.refusal(number(given))
        assert given.getsockname()[1]  # still open

    def test_an_unbound_socket_is_refused(self, number):
        """What if we listened on it? The system would pick a port nobody knows."""
        given = socket.socket()
        sentence = self.refusal(number(given))
        assert "not bound" in sentence or os.name == "nt"  # getsockname fails there
        given.bind(("127.0.0.1", 0))  # still open

    @NEEDS_UNIX
    def test_an_unbound_unix_socket_is_refused(self, number):
        given = socket.socket(socket.AF_UNIX)
        assert "not bound" in self.refusal(number(given))
        assert given.getsockname() == ""  # still open

    @POSIX_ONLY
    def test_a_connected_socket_is_refused_and_stays_open(self, tcp, keep, number):
        """What if listen fails? What is not ours to use is not ours to close."""
        [listener] = tcp("127.0.0.1", 0, 5)
        given = keep(socket.create_connection(listener.getsockname()))
        self.refusal(number(given))
        assert given.getpeername() == listener.getsockname()

    def test_a_closed_descriptor_is_refused(self):
        given = bound()
        number = given.fileno()
        given.close()
        assert "no open socket" in self.refusal(number)

    def test_a_file_is_refused_and_stays_open(self, tmp_path):
        with open(tmp_path / "file", "w") as file:
            assert "no open socket" in self.refusal(file.fileno())
            file.write("still open")
        assert (tmp_path / "file").read_text() == "still open"


class TestSystemd:
    """man 3 sd_listen_fds: LISTEN_FDS from number 3 on, if LISTEN_PID is our own."""

    @pytest.mark.parametrize(
        "environ, expected",
        [
            ({}, []),
            ({"LISTEN_FDS": "1"}, []),
            ({"LISTEN_PID": "42"}, []),
            ({"LISTEN_PID": "42", "LISTEN_FDS": "1"}, [3]),
            ({"LISTEN_PID": "42", "LISTEN_FDS": "3"}, [3, 4, 5]),
            ({"LISTEN_PID": "42", "LISTEN_FDS": "0"}, []),
            ({"LISTEN_PID": "42", "LISTEN_FDS": ""}, []),
            ({"LISTEN_PID": "42", "LISTEN_FDS": "-1"}, []),
            ({"LISTEN_PID": "42", "LISTEN_FDS": "many"}, []),
            ({"LISTEN_PID": "43", "LISTEN_FDS": "1"}, []),  # a parent's, not ours
            ({"LISTEN_PID": "", "LISTEN_FDS": "1"}, []),
            ({"LISTEN_PID": "4", "LISTEN_FDS": "1"}, []),
        ],
    )
    def test_descriptors_are_ours_only_when_the_pid_is(self, environ, expected):
        assert sockets.systemd_fds(environ, 42) == expected
