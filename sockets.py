"""From an address to listening sockets, ready to be shared.

Owns: name resolution, socket options, bind, listen, adopting a descriptor, the fate of
    a Unix socket's file, and how a listener's address is shown.
Must not know: HTTP, asyncio, how many processes will accept, or who closes first.

Read beside: Python docs, socket — "Socket families"; man 7 ip; man 7 ipv6
    (IPV6_V6ONLY); man 2 listen (backlog); man 7 unix; PEP 446; man 3 sd_listen_fds.

The bug that shaped it: uvicorn asked a listener for getpeername() and died of --port 0
    (uvicorn #974); with two places that bind, the second showed the wrong address again
    two years later (uvicorn #1890), and only one knew IPv6 (uvicorn #553, #722). Here
    every listener is bound here, listens before anybody else sees it (uvicorn #683),
    and has its address shown by one function, `describe`.

But: no SO_REUSEPORT. It spreads connections better, and loses those still queued at a
    worker that dies; ours wait in one shared backlog.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import stat
from collections.abc import Callable, Mapping

PORT_ZERO_TRIES = 16  # a port free for IPv4 may be taken for IPv6; luck ends soon


def bind_tcp(host: str, port: int, backlog: int) -> list[socket.socket]:
    """Listen on every address that `host` resolves to ("" is all of this machine's).

    With port 0 the system picks one, the same for all addresses (tornado #977).
    Raises OSError with a sentence that names the address and a way out.
    """
    addresses = resolve(host, port)
    for last_try in range(PORT_ZERO_TRIES, 0, -1):
        try:
            return bind_each(addresses, port, backlog)
        except OSError as exc:
            if port != 0 or exc.errno != errno.EADDRINUSE or last_try == 1:
                raise
    raise AssertionError("the last try returns or raises")


def resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple]]:
    """The (family, address) pairs of a host name, in order, once each."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as exc:
        why = f'cannot resolve --host "{host}": {exc}'
        raise OSError(errno.EADDRNOTAVAIL, why) from None
    wanted = (socket.AF_INET, socket.AF_INET6)
    return list(dict.fromkeys((i[0], i[4]) for i in found if i[0] in wanted))


def bind_each(addresses: list, port: int, backlog: int) -> list[socket.socket]:
    """One listener an address. The first port given is the port of the rest."""
    listeners: list[socket.socket] = []
    unavailable = OSError(errno.EADDRNOTAVAIL, "no address to listen on")
    with contextlib.ExitStack() as undo:
        for family, address in addresses:
            address = (address[0], port, *address[2:])
            try:
                listener = listen_on(family, address, backlog)
                listeners.append(undo.enter_context(listener))
                port = listener.getsockname()[1]
            except OSError as exc:
                # A resolver may name addresses that this machine has not got: "::1" in
                # a container whose IPv6 is half switched off. One is enough to serve.
                if exc.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                unavailable = exc
        if not listeners:
            raise unavailable
        undo.pop_all()
    return listeners


def listen_on(family: int, address: tuple, backlog: int) -> socket.socket:
    """Bind and listen on one resolved address."""
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # Start again at once, past connections still in TIME_WAIT (man 7 socket). That
        # needs no option on Windows, where SO_REUSEADDR lets any program steal a port.
        how = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
        listener.setsockopt(socket.SOL_SOCKET, how, 1)
        if family == socket.AF_INET6:
            # Else "::" takes IPv4 as well, and 0.0.0.0 beside it is "in use".
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(backlog)  # walk: 1
    except OSError as exc:
        listener.close()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        hints = {
            errno.EADDRINUSE: "is in use; stop the other server, or choose another "
            "--port (0 picks a free one)",
            errno.EACCES: "is not allowed (below 1024 it needs privileges); choose "
            "another --port",
            errno.EADDRNOTAVAIL: "is not an address of this machine; choose another "
            "--host",
        }
        hint = hints.get(exc.errno, f"cannot be used: {exc.strerror}")
        raise OSError(exc.errno, f"{host}:{address[1]} {hint}") from None
    return listener


def bind_unix(path: str, backlog: int) -> tuple[socket.socket, Callable[[], None]]:
    """Listen on a Unix socket, with mode 0666 or that of the stale file it replaces.

    Returns it, and what removes its file. A live socket or any other kind of file
    is never touched: OSError with a sentence.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise OSError(errno.EAFNOSUPPORT, "no Unix sockets here; use --host and --port")
    mode = 0o666  # the web server in front is another user; the folder guards the file
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            old = os.lstat(path)
            if not stat.S_ISSOCK(old.st_mode):
                raise OSError(errno.EEXIST, "it exists and is no socket")
            if somebody_answers(path):
                raise OSError(errno.EADDRINUSE, "it is in use by another server")
            mode = stat.S_IMODE(old.st_mode)
            os.unlink(path)
        listener.bind(path)
        made = os.lstat(path)
        os.chmod(path, mode)  # before listen: nobody can connect in between
        listener.listen(backlog)
    except OSError as exc:
        listener.close()
        why = f"cannot listen on --uds {path}: {exc.strerror or exc}"
        raise OSError(exc.errno, why) from None
    return listener, functools.partial(remove_file, os.path.abspath(path), made)


def somebody_answers(path: str) -> bool:
    """Is a Unix socket's file still listened on? Only a refusal means "no"."""
    refusals = (errno.ECONNREFUSED, errno.ENOENT)  # the latter: removed meanwhile
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog says EAGAIN, and is alive
        return probe.connect_ex(path) not in refusals


def remove_file(path: str, made: os.stat_result) -> None:
    """Delete a file that we made: known by its inode, not its name (uvicorn #722)."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(made, os.lstat(path)):
            os.unlink(path)


def adopt(fd: int, backlog: int) -> socket.socket:
    """Take over a stream socket that somebody else bound, of any family.

    Raises OSError with a sentence if it cannot listen; it is then still open.
    """
    try:
        found = socket.socket(fileno=fd)
    except OSError as exc:
        why = f"--fd {fd} is no open socket: {exc.strerror}"
        raise OSError(exc.errno, why) from None
    family, kind, proto = found.family, found.type, found.proto
    name = found.getsockname()
    if family in (socket.AF_INET, socket.AF_INET6):
        proto = socket.IPPROTO_TCP  # not every system tells it
        name = name[1]  # the port, 0 until it is bound
    try:
        if kind != socket.SOCK_STREAM:
            raise OSError(errno.EINVAL, "it is not a stream socket")
        if not name:
            raise OSError(errno.EINVAL, "it is not bound to an address")
        found.listen(backlog)
        found.set_inheritable(False)  # not by the app's children, as PEP 446 has it
    except OSError as exc:
        why = f"--fd {fd} cannot be listened on: {exc.strerror}"
        raise OSError(exc.errno, why) from None
    finally:
        found.detach()  # its number lives on: in the listener, or with our caller
    return socket.socket(family, kind, proto, fileno=fd)


def systemd_fds(environ: Mapping[str, str], pid: int) -> list[int]:
    """The descriptors of systemd's socket activation, if they are for us (man 3
    sd_listen_fds): LISTEN_FDS of them from number 3 on, when LISTEN_PID is our own."""
    if environ.get("LISTEN_PID") != str(pid):
        return []
    count = environ.get("LISTEN_FDS", "")
    return list(range(3, 3 + int(count))) if count.isdecimal() else []


def describe(listener: socket.socket, scheme: str) -> str:
    """The address to show and to open, in every mode.

    From getsockname(): a listener has no peer to ask for (uvicorn #974).
    """
    name = listener.getsockname()
    if listener.family == socket.AF_INET6:
        return f"{scheme}://[{name[0]}]:{name[1]}"
    if listener.family == socket.AF_INET:
        return f"{scheme}://{name[0]}:{name[1]}"
    if isinstance(name, tuple):
        return f"{listener.family.name} {name}"  # adopted, as one of a virtual machine
    return "unix:" + os.fsdecode(name).replace("\0", "@")  # man 7 unix, "abstract"
