"""Two ways to get a listener, and a line that tells where it listens.

Run:   python examples/exercises/02_port_zero/start.py          (it dies)
       python examples/exercises/02_port_zero/start.py 8000     (it does not)
"""

import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import sockets


def open_tcp(host: str, port: int) -> tuple[socket.socket, str]:
    """Bind and listen: the listener, and the address to show."""
    (listener,) = sockets.bind_tcp(host, port, backlog=16)
    if port == 0:  # the system has picked one
        port = listener.getpeername()[1]
    return listener, f"http://{host}:{port}"


def open_inherited(fd: int, host: str, port: int) -> tuple[socket.socket, str]:
    """Take over a socket that another program has bound; it decides on the address.
    `host` and `port` are the command line's, which is not asked here."""
    listener = sockets.adopt(fd, backlog=16)
    return listener, f"http://{host}:{port}"


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
