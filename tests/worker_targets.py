"""What the supervisors of test_workers.py and test_bugs.py run: plain functions that a
spawned process can import. They need no server, so they start fast."""

import asyncio
import contextlib
import importlib
import os
import signal
import socket
import time

import workers


def wait_for_stop(pipe):
    """Until the supervisor closes the pipe."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()


def obey(pipe):
    workers.prepare_worker()
    pipe.send("ready")
    wait_for_stop(pipe)


def follow(path, pipe):
    """Obey, or die at once, as the file says."""
    if path.read_text() != "good":
        os._exit(7)
    obey(pipe)


def puppet(pipe):
    """Say every word that it is told to say, and die of "die"."""
    with contextlib.suppress(EOFError, OSError):
        while (word := pipe.recv()) != "die":
            pipe.send(word)
        os._exit(9)


def die_after_ready(pipe):
    pipe.send("alive")
    pipe.send("ready")
    pipe.close()
    os._exit(9)


def go_mute(pipe):
    """Close the pipe and live on, as with a thread that the app has left running."""
    pipe.send("ready")
    pipe.close()
    time.sleep(3600)


def ignore(terminate, pipe):
    """Ignore the end of the pipe, and perhaps SIGTERM."""
    signal.signal(signal.SIGTERM, terminate)
    pipe.send("ready")
    time.sleep(3600)


def tell_mask(pipe):
    """Is SIGINT blocked, before and after `prepare_worker`? It ends nothing then."""
    born = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    workers.prepare_worker()
    now = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    signal.raise_signal(signal.SIGINT)
    pipe.send((born, now))


def tell_listener(listener, pipe):
    """What is left of a listener that was pickled for us."""
    pipe.send((listener.getsockname(), listener.proto))


def use_bare_number(fd, pipe):
    """A worker's mistake: a descriptor's number means nothing in another process."""
    try:
        socket.socket(fileno=fd).close()
        pipe.send("it works")
    except OSError as exc:
        pipe.send(exc.errno)


def accept_with(factory, listener, pipe):
    """Accept with this loop until the pipe ends. Say "ready", and what goes wrong."""

    async def main():
        loop = asyncio.get_running_loop()
        number = lambda context: getattr(context["exception"], "winerror", -1)  # noqa: E731
        loop.set_exception_handler(lambda _, context: pipe.send(number(context)))
        async with await asyncio.start_server(lambda r, w: w.close(), sock=listener):
            pipe.send("ready")
            await loop.run_in_executor(None, wait_for_stop, pipe)

    module, _, name = factory.partition(":")
    make = getattr(importlib.import_module(module), name)
    with asyncio.Runner(loop_factory=make) as runner:
        runner.run(main())
