"""What the supervisors of test_workers.py and test_bugs.py run: plain functions that a
spawned process can import, and nothing of a server: it shall start fast."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import time
from pathlib import Path

import workers


def wait_for_stop(pipe) -> None:
    """Until the supervisor closes the pipe."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()


def obey(pipe) -> None:
    workers.ignore_group_signals()
    pipe.send("ready")
    wait_for_stop(pipe)


def never_ready(pipe) -> None:
    wait_for_stop(pipe)


def ready_when(path: str, pipe) -> None:
    """Start for as long as a file is not there."""
    while not os.path.exists(path):
        time.sleep(0.01)
    obey(pipe)


def follow(path: str, pipe) -> None:
    """Obey, or die at once: as the file says."""
    if Path(path).read_text() != "good":
        os._exit(7)
    obey(pipe)


def puppet(pipe) -> None:
    """Say what we are told to say; die of "die"."""
    with contextlib.suppress(EOFError, OSError):
        while (word := pipe.recv()) != "die":
            pipe.send(word)
        os._exit(9)


def die_before_ready(pipe) -> None:
    os._exit(7)


def die_after_ready(pipe) -> None:
    pipe.send("alive")
    pipe.send("ready")
    pipe.close()
    os._exit(9)


def ignore_pipe(pipe) -> None:
    pipe.send("ready")
    time.sleep(3600)


def ignore_everything(pipe) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ignore_pipe(pipe)


def tell_mask(pipe) -> None:
    """Is SIGINT blocked, before and after? It ends nothing then."""
    born = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    workers.ignore_group_signals()
    now = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    signal.raise_signal(signal.SIGINT)
    pipe.send((born, now))
    wait_for_stop(pipe)


def tell_listener(listener: socket.socket, pipe) -> None:
    """What is left of a listener that was pickled for us."""
    pipe.send((listener.getsockname(), listener.proto))


def use_bare_number(fd: int, pipe) -> None:
    """A worker's mistake: a descriptor's number means nothing in another process."""
    try:
        socket.socket(fileno=fd).close()
        pipe.send("it works")
    except OSError as exc:
        pipe.send(exc.errno)


def accept_with(factory: str, listener: socket.socket, pipe) -> None:
    """Accept with this loop for as long as the pipe is open: says "ready", then what
    went wrong (a winerror), or our pid to whoever connects."""
    import asyncio

    module, _, name = factory.partition(":")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(
            lambda _, context: pipe.send(getattr(context["exception"], "winerror", -1))
        )

        async def answer(reader, writer):
            writer.write(b"%d" % os.getpid())
            writer.close()

        async with await asyncio.start_server(answer, sock=listener):
            pipe.send("ready")
            await loop.run_in_executor(None, wait_for_stop, pipe)

    make = getattr(importlib.import_module(module), name)
    with asyncio.Runner(loop_factory=make) as runner:
        runner.run(main())
