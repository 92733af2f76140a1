"""Tell where a listener listens: the answer. foal's own is sockets.describe."""

import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import sockets


def describe(listener: socket.socket) -> str:
    """Ask the listener: its own name, because it has no peer."""
    host, port = listener.getsockname()[:2]
    if listener.family == socket.AF_INET6:
        host = f"[{host}]"
    return f"http://{host}:{port}"


def open_tcp(host: str, port: int) -> tuple[socket.socket, str]:
    """Bind and listen: the listener, and the address to show."""
    (listener,) = sockets.bind_tcp(host, port, backlog=16)
    return listener, describe(listener)


def open_inherited(fd: int, host: str, port: int) -> tuple[socket.socket, str]:
    """Take over a socket that another program has bound; it decides on the address."""
    listener = sockets.adopt(fd, backlog=16)
    return listener, describe(listener)


def main() -> None:
    port = int(sys.argv[1]) if sys.argv[1:] else 0
    listener, shown = open_tcp("127.0.0.1", port)
    with listener:
        print(f"listening on {shown}; connect, or press Ctrl-C")
        connection, client = listener.accept()
        connection.close()
        print(f"a client has called: {client}")


if __name__ == "__main__":
    main()
