"""From an address to listening sockets, ready to be shared.

Owns: what to listen on, name resolution, socket options, bind, listen, adopting a
    descriptor, the file of a Unix socket, how an address is shown, the TLS context.
Must not know: HTTP, asyncio, how many processes will accept, or which side closes.

Read beside: Python docs, socket — "Socket families"; man 7 ip; man 7 ipv6
    (IPV6_V6ONLY); man 2 listen (backlog); man 7 unix; PEP 446; man 3 sd_listen_fds;
    Python docs, ssl — "Combined key and certificate".

The bug that shaped it: uvicorn asked a listener for getpeername() and failed with
    --port 0 (uvicorn #974). It bound in two places: the second one showed the wrong
    address again two years later (uvicorn #1890), and only one of them knew IPv6
    (uvicorn #553, #722). Here every listener is bound in this file. It listens before
    another process sees it (uvicorn #683), and one function, `describe`, shows it.

But: no SO_REUSEPORT. It spreads connections better, but connections that wait for a
    worker are lost if that worker dies. Ours wait in one shared backlog.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import ssl
import stat
from collections.abc import Callable, Mapping

# With port 0, how often to try: a port that is free for IPv4 may be taken for IPv6.
PORT_ZERO_TRIES = 16


def open_listeners(
    *, host: str, port: int, uds: str | None, fd: int | None, backlog: int
) -> tuple[list[socket.socket], Callable[[], None]]:
    """Listen on `fd`, or else `uds`, or else systemd's sockets, or else host and port.

    Returns the listeners, and a function that closes them and removes the file of a
    Unix socket. A second call of it is harmless. Raises OSError with a sentence.
    """
    for flag, value, most in ("port", port, 65535), ("backlog", backlog, 2**31 - 1):
        if value > most:
            raise OSError(errno.EINVAL, f"--{flag} must be {most} or less, not {value}")
    given = [fd] if fd is not None else systemd_fds(os.environ, os.getpid())
    undo = contextlib.ExitStack()
    try:
        if uds is not None and fd is None:
            listener, remove_file = bind_unix(uds, backlog)
            undo.callback(remove_file)
            listeners = [listener]
        elif given:
            listeners = [adopt(each, backlog) for each in given]
        else:
            listeners = bind_tcp(host, port, backlog)
    except (OverflowError, ValueError) as exc:  # such as a NUL in a path
        raise OSError(errno.EINVAL, f"cannot listen: {exc}") from None
    for listener in listeners:
        undo.callback(listener.close)
        # On Windows, passing a listener to a new worker sets its mode in all processes.
        # Were it blocking, a worker that already serves would hang in accept.
        listener.setblocking(False)
    return listeners, undo.close


def bind_tcp(host: str, port: int, backlog: int) -> list[socket.socket]:
    """Listen on every address of `host` ("" means all addresses of this machine).

    With port 0 the system chooses a port, the same one for all addresses (tornado
    #977). Raises OSError with a sentence that names the address and what to do.
    """
    addresses = resolve(host, port)
    for tries_left in reversed(range(PORT_ZERO_TRIES)):
        try:
            return bind_each(addresses, port, backlog)
        except OSError as exc:
            if port != 0 or exc.errno != errno.EADDRINUSE or tries_left == 0:
                raise


def resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple]]:
    """The (family, address) pairs of a host name, in order and without duplicates."""
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
    """One listener for each address. All of them get the port of the first one."""
    listeners: list[socket.socket] = []
    unavailable = OSError(errno.EADDRNOTAVAIL, "there is no address to listen on")
    with contextlib.ExitStack() as undo:
        for family, address in addresses:
            address = (address[0], port, *address[2:])
            try:
                listener = listen_on(family, address, backlog)
                listeners.append(undo.enter_context(listener))
                port = listener.getsockname()[1]
            except OSError as exc:
                # The resolver may return an address that this machine does not have:
                # "::1" in a container without IPv6. The other addresses are enough.
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
        # A restarted server can bind while old connections are in TIME_WAIT (man 7
        # socket). Windows allows that without an option. There SO_REUSEADDR would let
        # any other program take over the port.
        how = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
        listener.setsockopt(socket.SOL_SOCKET, how, 1)
        if family == socket.AF_INET6:
            # Without it "::" also takes IPv4, and 0.0.0.0 is then "in use".
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(backlog)  # walk: 1
    except OSError as exc:
        listener.close()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        hints = {
            errno.EADDRINUSE: "is in use; stop that server, or choose another --port",
            errno.EACCES: "needs privileges (below 1024) or is in use; choose another",
            errno.EADDRNOTAVAIL: "is no address of this machine; choose another --host",
        }
        hint = hints.get(exc.errno, f"cannot be used: {exc.strerror}")
        raise OSError(exc.errno, f"{host}:{address[1]} {hint}") from None
    return listener


def bind_unix(path: str, backlog: int) -> tuple[socket.socket, Callable[[], None]]:
    """Listen on a Unix socket. Its mode is 0666, or that of the stale file it replaces.

    Returns the listener, and a function that removes its file. It leaves a live socket
    and every other kind of file alone, and raises OSError with a sentence.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise OSError(errno.EAFNOSUPPORT, "no Unix sockets here; use --host and --port")
    mode = 0o666  # the proxy in front is another user; the folder protects the file
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            old = os.lstat(path)
            if not stat.S_ISSOCK(old.st_mode):
                raise OSError(errno.EEXIST, "it exists and is no socket")
            if is_live(path):
                raise OSError(errno.EADDRINUSE, "it is in use by another server")
            mode = stat.S_IMODE(old.st_mode)
            os.unlink(path)
        listener.bind(path)
        made = os.lstat(path)
        # The mode is right before listen, and no client can connect until then.
        os.chmod(path, mode)
        listener.listen(backlog)
    except OSError as exc:
        listener.close()
        why = f"cannot listen on --uds {path}: {exc.strerror or exc}"
        raise OSError(exc.errno, why) from None
    return listener, functools.partial(remove_file, os.path.abspath(path), made)


def is_live(path: str) -> bool:
    """Does a process listen on this Unix socket? Only a refusal says that none does."""
    # ENOENT: the file was removed in the meantime.
    refusals = (errno.ECONNREFUSED, errno.ENOENT)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # Do not wait: a full backlog gives EAGAIN at once, and its server is alive.
        probe.setblocking(False)
        return probe.connect_ex(path) not in refusals


def remove_file(path: str, made: os.stat_result) -> None:
    """Delete the file that we made. Its inode tells: another server may have put its
    own file at the same path (uvicorn #722)."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(made, os.lstat(path)):
            os.unlink(path)


def adopt(fd: int, backlog: int) -> socket.socket:
    """Take over a stream socket of any family that another program has bound.

    Raises OSError with a sentence if it cannot listen. It is then still open.
    """
    try:
        found = socket.socket(fileno=fd)
    except OSError as exc:
        raise OSError(exc.errno, f"--fd {fd} is no socket: {exc.strerror}") from None
    family, kind, proto = found.family, found.type, found.proto
    name = found.getsockname()
    if family in (socket.AF_INET, socket.AF_INET6):
        # Some systems do not report it. asyncio sets TCP_NODELAY only if it is TCP.
        proto = socket.IPPROTO_TCP
        name = name[1]  # the port, 0 if the socket is not bound
    try:
        if kind != socket.SOCK_STREAM:
            raise OSError(errno.EINVAL, "it is not a stream socket")
        if not name:
            raise OSError(errno.EINVAL, "it is not bound to an address")
        found.listen(backlog)
        # The subprocesses of the app must not get it, as PEP 446 has it.
        found.set_inheritable(False)
    except OSError as exc:
        raise OSError(exc.errno, f"cannot use --fd {fd}: {exc.strerror}") from None
    finally:
        # The descriptor stays open, for the listener or for our caller.
        found.detach()
    return socket.socket(family, kind, proto, fileno=fd)


def systemd_fds(environ: Mapping[str, str], pid: int) -> list[int]:
    """The descriptors of systemd's socket activation (man 3 sd_listen_fds): LISTEN_FDS
    of them, from number 3 on. They are for this process if LISTEN_PID is its own."""
    if environ.get("LISTEN_PID") != str(pid):
        return []
    count = environ.get("LISTEN_FDS", "")
    return list(range(3, 3 + int(count))) if count.isdecimal() else []


def describe(listener: socket.socket, scheme: str) -> str:
    """The address to show, and to open in a browser. It comes from getsockname(): a
    listener has no peer (uvicorn #974)."""
    name = listener.getsockname()
    if listener.family in (socket.AF_INET, socket.AF_INET6):
        host = f"[{name[0]}]" if ":" in name[0] else name[0]
        return f"{scheme}://{host}:{name[1]}"
    if isinstance(name, tuple):
        return f"{listener.family.name} {name}"  # for example that of a virtual machine
    return "unix:" + os.fsdecode(name).replace("\0", "@")  # man 7 unix, "abstract"


def tls_context(
    certfile: str, keyfile: str | None, password: str | None
) -> ssl.SSLContext:
    """TLS with this certificate, for HTTP/1.1. Raises OSError with a sentence."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without a password OpenSSL would ask for one on the terminal. "" fails.
        context.load_cert_chain(certfile, keyfile, password or "")
    except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
        why = getattr(exc, "strerror", None) or str(exc)
        if isinstance(exc, ssl.SSLError):  # which says only "PEM lib"
            why = "the certificate, its key or --ssl-keyfile-password is wrong"
        files = " --ssl-keyfile ".join(filter(None, (certfile, keyfile)))
        raise OSError(errno.EINVAL, f"--ssl-certfile {files}: {why}") from None
    return context
