"""Two workers on one port. Each tells its process number to a client that connects, and
holds the connection until the client closes it.

Run:   python examples/exercises/08_shared_listener/start.py     (both workers die)
       it ends when its standard input does: press Ctrl-D, on Windows Ctrl-Z and Enter
"""

import multiprocessing
import os
import socket
import threading

spawn = multiprocessing.get_context("spawn")  # the same on every system


def open_listener() -> socket.socket:
    """What the parent makes, before there is any worker."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    return listener


def start_worker(listener: socket.socket) -> multiprocessing.Process:
    process = spawn.Process(target=work, args=(listener.fileno(),), daemon=True)
    process.start()
    return process


def work(number: int) -> None:
    """What a worker does, in a process of its own."""
    listener = socket.socket(fileno=number)
    listener.listen(16)
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"%d\n" % os.getpid())
            while connection.recv(100):
                pass


def main() -> None:
    with open_listener() as listener:
        print(f"listening on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
        workers = [start_worker(listener) for _ in range(2)]
        threading.Thread(target=stop_at_end, args=(workers,), daemon=True).start()
        for worker in workers:
            worker.join()


def stop_at_end(workers: list) -> None:
    """Wait for the end of the standard input, then end the workers."""
    while os.read(0, 100):
        pass
    for worker in workers:
        worker.terminate()


if __name__ == "__main__":
    main()
