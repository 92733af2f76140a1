"""Two workers on one port: the answer. foal's own is sockets.listen_on and workers.Worker.

Run:   python examples/exercises/answers/08_shared_listener.py
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
    listener.listen(16)  # once, here: from now on a client can wait in the backlog
    return listener


def start_worker(listener: socket.socket) -> multiprocessing.Process:
    # The socket itself: multiprocessing knows how to share it on every system.
    process = spawn.Process(target=work, args=(listener,), daemon=True)
    process.start()
    return process


def work(listener: socket.socket) -> None:
    """What a worker does, in a process of its own."""
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
