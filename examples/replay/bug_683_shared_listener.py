"""uvicorn #683: two workers, one socket, and a child that dies in listen().

On Windows, `--workers 2` started two children, and one of them died: WinError 10022. Six
attempts to mend it followed. The parent had bound the socket but not listened, and the
children raced each other to listen() on their duplicates.

There is a simpler mistake that you can make on any system: to give a child only the
number of a descriptor. The child does not inherit it (PEP 446), so there the number means
nothing. foal binds *and listens* before any child exists, and gives the socket itself to
multiprocessing, which knows how to share it on every system.

Run:   python examples/replay/bug_683_shared_listener.py
Look:  sockets.py, listen_on; workers.py, Worker
"""

import multiprocessing
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sockets


def child_with_number(number: int) -> None:
    try:
        socket.socket(fileno=number).accept()
    except OSError as exc:
        print(f"  the child, with descriptor {number}: {exc}")


def child_with_socket(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(b"hello from another process")


def run(target, argument) -> multiprocessing.Process:
    process = multiprocessing.get_context("spawn").Process(target=target, args=(argument,))
    process.start()
    return process


def main() -> None:
    (listener,) = sockets.bind_tcp("127.0.0.1", 0, 16)
    with listener:
        print("The mistake: a number.")
        run(child_with_number, listener.fileno()).join()
        print("foal's way: listen first, then pass the socket.")
        with socket.create_connection(listener.getsockname()) as client:
            print("  a client is connected, before there is a child")
            process = run(child_with_socket, listener)
            print(f"  it reads: {client.recv(100).decode()}")
            process.join()


if __name__ == "__main__":
    main()
