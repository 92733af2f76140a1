"""uvicorn #974: `--port 0`, and a server that dies of telling its address.

With port 0 the system picks a free port, so the server has to ask which one before it can
print "listening on …". It asked for the wrong name: getpeername() is the address of the
other side, and a listener has none. WinError 10057 on Windows, ENOTCONN elsewhere. The
mistake was one word, and no test had ever started a server with port 0.

foal has one function that turns a listener into the address to show, for every mode.

Run:   python examples/replay/bug_974_port_zero.py
Look:  sockets.py, describe
"""

import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sockets


def main() -> None:
    (listener,) = sockets.bind_tcp("127.0.0.1", 0, 16)
    with listener:
        print("The mistake: getpeername() of a listener.")
        try:
            print(f"  listening on {listener.getpeername()}")
        except OSError as exc:
            print(f"  {exc}")
        print("foal's way: getsockname().")
        address = sockets.describe(listener, "http")
        print(f"  listening on {address}")
        socket.create_connection(listener.getsockname()).close()
        print("  and that is the port that answers")


if __name__ == "__main__":
    main()
