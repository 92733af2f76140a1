"""A supervisor and its workers: spawn, watch, replace, stop.

Owns: processes and their pipes, what the death of a worker means, when to try again,
    and the steps of a stop: close the pipe, terminate, kill.
Must not know: sockets, HTTP, asyncio, what a worker does, or why it should restart.

Read beside: Python docs, multiprocessing — "Contexts and start methods", "Connection
    objects", connection.wait; signal — "Execution of Python signal handlers".

The bug that shaped it: uvicorn's reloader stopped a child by os.kill(pid). The child
    was dead already, and the parent died of the exception (uvicorn #684). terminate()
    came next, which on Windows skips the lifespan shutdown (#1036), and then console
    events, which reach every process of the console (#2211, #1972). Here each worker
    has a pipe with four jobs on every system. The worker says "ready". Its event loop
    says "alive". The parent closes the pipe to say "stop". If the parent dies, the
    worker reads the end of the pipe and leaves.

But: Windows waits for 63 handles at most, which is enough for 31 workers.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import connection, get_context, parent_process, resource_tracker

NAME = "foal worker"  # of every worker process; server.py recognises it by that
TICK = 0.1  # seconds between two looks; a signal is noticed at most this late
TERMINATED = 2.0  # seconds from terminate to kill
STABLE = 10.0  # seconds after which a worker has started well
LONGEST_DELAY = 30.0  # seconds between two attempts at a worker that keeps dying
# Windows' exit code after Ctrl-C or Ctrl-Break. It may reach us before the signal does.
CONTROL_C_EXIT = 0xC000013A

# What a worker says first, and what the log says then.
NEWS = {"ready": "is ready", "broken": "serves only an error page"}
logger = logging.getLogger("foal.workers")
# The same method on every system. A child imports server.py anew.
spawn = get_context("spawn")


class Lifeline:
    """The worker's end of the pipe. This class and `prepare_worker` run in the worker.
    Everything below them runs in the supervisor."""

    def __init__(self, pipe: connection.Connection) -> None:
        self.pipe = pipe

    def say(self, word: str) -> None:
        """Tell the supervisor "ready", "broken" or "alive". Call it in the event loop:
        a thread would still say "alive" while the loop is blocked."""
        # If the supervisor has closed its end, it wants us to stop, and `watch` knows.
        with contextlib.suppress(OSError):
            # Do not wait until it reads: SIGSTOP may have stopped it. (On Windows there
            # is no such signal, and select does not know pipes.)
            if os.name == "nt" or select.select([], [self.pipe], [], 0)[1]:
                self.pipe.send(word)

    def watch(self, stop: Callable[[], None]) -> None:
        """Call `stop`, from another thread, when the supervisor closes the pipe. If the
        supervisor is dead, end this process within a second, whatever its loop does."""

        def wait() -> None:
            with contextlib.suppress(EOFError, OSError):
                self.pipe.recv()  # the supervisor never writes: this is the end
            stop()
            parent_process().join()
            time.sleep(0.5)  # enough for a stop if no request is in progress
            os._exit(1)

        threading.Thread(target=wait, name="lifeline", daemon=True).start()


def prepare_worker() -> None:
    """Call this first in a worker. It sets up the signals and the standard input."""
    # The terminal sends these signals to the whole process group, and the supervisor
    # acts on them. A handler that does nothing ignores them here. With SIG_IGN the
    # app's own subprocesses would ignore them, too (man 2 execve).
    for name in ("SIGINT", "SIGBREAK", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: None)
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # multiprocessing replaces sys.stdin by an empty file. Descriptor 0 is still the
    # terminal, and breakpoint() and input() need it.
    with contextlib.suppress(OSError):  # there may be none
        sys.stdin = open(0, closefd=False)


# What a worker is doing, as far as the supervisor knows. An OUTDATED one serves until a
# new worker is ready.
#
#   STARTING ──"ready"──► READY ──── SIGHUP, a change ────► OUTDATED
#       │     "broken"      │ ◄── its successor cannot start ──┘ │
#       └───────────────────┴────────── stop ────────────────────┴──► LEAVING
State = enum.Enum("State", "STARTING READY OUTDATED LEAVING")


class Worker:
    """One process and the supervisor's end of its pipe."""

    def __init__(self, target: Callable[..., None], args: tuple) -> None:
        self.state = State.STARTING
        self.started = self.heard = time.monotonic()
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=target, args=(*args, theirs), name=NAME)
        # Ctrl-C reaches the whole process group. A worker that is still importing must
        # not die of it, so SIGINT is blocked there until prepare_worker.
        if os.name == "posix":
            # The first start would also start this helper, which unblocks SIGINT.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()  # walk: worker 1
        finally:
            theirs.close()
            if os.name == "posix":
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self.name = f"worker [{self.process.pid}]"

    def age(self) -> float:
        return time.monotonic() - self.started

    def stop(self, grace: float) -> None:
        """Ask the worker to leave, by the end of its pipe. `push` does the rest."""
        if self.state is not State.LEAVING:
            self.state = State.LEAVING  # walk: worker 6
            self.pipe.close()
            self.steps = [self.process.kill, self.process.terminate]  # from the end
            self.next_step = time.monotonic() + grace

    def push(self) -> None:
        """Take the next step of a stop once its time has come. terminate and kill check
        that the process still exists, as os.kill does not (uvicorn #684)."""
        if self.steps and time.monotonic() >= self.next_step:
            step = self.steps.pop()
            logger.warning("%s has not left in time: %s", self.name, step.__name__)
            step()
            self.next_step = time.monotonic() + TERMINATED


class Supervisor:
    """Keeps `count` workers running. Each one executes target(*args, pipe)."""

    def __init__(
        self,
        target: Callable[..., None],
        args: tuple,
        count: int,
        *,
        grace: float,  # seconds that a worker has to leave by itself
        # Replace a worker whose event loop is silent for so many seconds.
        silence_limit: float | None = None,
        # Asked each tick. The answer is the reason for a restart, or "".
        should_restart: Callable[[], str] | None = None,
        on_ready: Callable[[], None] = lambda: None,  # called once: a worker is ready
        on_stop: Callable[[], None] = lambda: None,  # called first: a stop begins
    ) -> None:
        self.target, self.args, self.count = target, args, count
        self.grace, self.silence_limit = grace, silence_limit or math.inf
        self.should_restart, self.on_terminal = should_restart, os.isatty(2)
        self.on_ready, self.on_stop = on_ready, on_stop
        self.workers: list[Worker] = []
        # Signals to act on. A set, because timeout(1) sends the same one twice: to us,
        # and to our process group.
        self.signals: set[int] = set()
        # None until a stop begins.
        self.exit_code: int | None = None
        # Deaths in a row, each soon after the start, and when the next worker may start
        # (time.monotonic()): never while we stop or wait for a file to change.
        self.deaths, self.not_before = 0, 0.0

    def run(self) -> int:
        """Supervise until a signal or a failed start; return the exit code."""
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        if threading.current_thread() is not threading.main_thread():
            numbers = []  # Python delivers signals to the main thread only
        # A handler only notes the number (gunicorn #2564). The loop below acts on it.
        note = lambda number, frame: self.signals.add(number)  # noqa: E731
        previous = {number: signal.signal(number, note) for number in numbers}
        try:
            while self.exit_code is None or self.workers:
                self.turn()
        finally:
            for worker in self.workers:
                worker.process.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.exit_code

    def turn(self) -> None:
        """What happens again and again, at least once in a tick."""
        self.replace_and_spawn()
        self.listen()
        # First the signals: a worker may have died of the same one.
        self.act_on_signals()
        self.look_after_workers()
        if self.should_restart and (reason := self.should_restart()):
            self.restart(reason)

    def replace_and_spawn(self) -> None:
        """Take a step towards `count` workers, none of them outdated."""
        starting, ready, outdated, _ = map(self.those, State)
        surplus = len(ready) + len(outdated) - self.count
        for worker in outdated[: max(0, surplus)]:
            worker.stop(self.grace)  # walk: worker 5
        if time.monotonic() < self.not_before:
            return
        # Start one at a time until one is ready, so that an error of the app is logged
        # once. Replace one at a time, so that the others serve meanwhile.
        at_once = 1 if outdated or not ready else self.count
        missing = self.count - len(ready) - len(starting)
        try:
            for _ in range(min(missing, at_once - len(starting))):
                self.workers.append(Worker(self.target, self.args))
        except OSError as exc:  # no descriptor, no process or no memory is left
            self.deaths += 1
            self.try_again(f"cannot start a worker: {exc}")

    def those(self, state: State) -> list[Worker]:
        """The workers in this state."""
        return [worker for worker in self.workers if worker.state is state]

    def listen(self) -> None:
        """Wait for a word, a death, or the next tick, and take in the words."""
        pipes = {w.pipe: w for w in self.workers if not w.pipe.closed}
        sentinels = [w.process.sentinel for w in self.workers]
        with contextlib.suppress(OSError):  # Ctrl-C ends the wait so, on Windows
            for source in connection.wait([*pipes, *sentinels], TICK):
                if source in pipes:
                    self.hear(pipes[source])

    def hear(self, worker: Worker) -> None:
        """Take in one word of a worker, or the end of its pipe."""
        try:
            word = worker.pipe.recv()
        except (EOFError, OSError):
            # It dies, and `look_after_workers` will find it dead. Until then its pipe
            # must not end each wait at once.
            return worker.pipe.close()
        worker.heard = time.monotonic()
        if word in NEWS:
            worker.state = State.READY
            logger.info("%s %s after %.2f s", worker.name, NEWS[word], worker.age())
            self.on_ready()
            self.on_ready = lambda: None

    def act_on_signals(self) -> None:
        """The first SIGINT or SIGTERM stops gracefully, the second one ends at once."""
        while self.signals:
            number = self.signals.pop()
            name = signal.Signals(number).name
            # SIGHUP asks for new workers, unless it means that the terminal was closed.
            if name == "SIGHUP" and self.on_terminal == os.isatty(2):
                self.restart(name)
            elif self.exit_code is None:
                how = "workers have %g s to finish (Ctrl-C again ends them at once)"
                logger.info("%s: stopping; " + how, name, self.grace)
                self.stop(0)
            else:
                logger.warning("%s again: ending at once", name)
                self.exit_code = 128 + number
                for worker in self.workers:
                    worker.process.kill()

    def stop(self, exit_code: int) -> None:
        """Ask all workers to leave. `run` returns once they are gone."""
        self.exit_code, self.not_before = exit_code, math.inf
        self.on_stop()
        for worker in self.workers:
            worker.stop(0 if worker.state is State.STARTING else self.grace)

    def restart(self, reason: str) -> None:
        """Replace all workers, one by one. Those that still start may have old code."""
        if self.exit_code is not None:
            return
        logger.info("%s: replacing workers", reason)
        self.deaths, self.not_before = 0, 0.0
        for worker in self.those(State.STARTING):
            worker.stop(0)
        for worker in self.those(State.READY):
            worker.state = State.OUTDATED

    def look_after_workers(self) -> None:
        """Each tick: the dead, those that leave too slowly, those that hang."""
        for worker in list(self.workers):
            silence = time.monotonic() - worker.heard
            if not worker.process.is_alive():
                self.reap(worker)
            elif worker.state is State.LEAVING:
                worker.push()
            # An import is silent, however long it takes (uvicorn #2506).
            elif worker.state is not State.STARTING and silence > self.silence_limit:
                logger.error("%s: the event loop is blocked; replacing it", worker.name)
                worker.stop(0)

    def reap(self, worker: Worker) -> None:
        """Log how a worker died and for how long it ran, and decide what follows."""
        # "ready" may still be in the pipe of a worker that died just after it.
        with contextlib.suppress(OSError):  # `hear` closes the pipe at its end
            while worker.state is State.STARTING and connection.wait([worker.pipe], 0):
                self.hear(worker)
        self.workers.remove(worker)  # walk: worker 8
        worker.pipe.close()
        code = worker.process.exitcode
        end = f"{worker.name} {describe_exit(code)} after {worker.age():.1f} s"
        worker.process.close()
        if worker.state is State.LEAVING or self.exit_code is not None:
            logger.info("%s", end)
        elif worker.state is State.STARTING and code != CONTROL_C_EXIT:
            self.failed_to_start(f"{end}, before it was ready")
        else:
            self.deaths = self.deaths + 1 if worker.age() < STABLE else 0
            self.try_again(end)

    def failed_to_start(self, end: str) -> None:
        """The next worker would die as this one did, so there is no restart loop
        (uvicorn #1115, #2440). Workers that serve are kept."""
        if self.should_restart is not None:
            self.not_before = math.inf
            logger.error("%s; waiting for a file to change", end)
        elif outdated := self.those(State.OUTDATED):
            logger.error("%s; keeping the old workers", end)
            for worker in outdated:
                worker.state = State.READY
        elif self.those(State.READY):
            self.deaths += 1
            self.try_again(end)
        else:
            logger.error("%s; stopping", end)
            self.stop(3)

    def try_again(self, end: str) -> None:
        """Start another worker, after a growing delay if one after the other dies."""
        delay = 0.0 if self.deaths < 2 else min(0.25 * 2**self.deaths, LONGEST_DELAY)
        self.not_before = time.monotonic() + delay
        then = f"in {delay:g} s" if delay else "now"
        logger.error("%s; starting another %s", end, then)


def describe_exit(code: int | None) -> str:
    """An exit code in words. multiprocessing gives a signal as a negative number, and
    Windows gives a status as a large one."""
    if code is not None and code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"was ended by {names.get(-code, f'signal {-code}')}"
    return f"exited with code {code if code is None or code < 2**16 else hex(code)}"
