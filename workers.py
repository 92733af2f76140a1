"""A supervisor and its workers: spawn, watch, replace, stop.

Owns: processes and their pipes, what a death means, when to try again, and the order in
    which a stop becomes less polite.
Must not know: sockets, HTTP, asyncio, what a worker does, or why it should restart; the
    target, its arguments and the question `should_restart` are given to it.

Read beside: Python docs, multiprocessing — "Contexts and start methods", "Connection
    objects", connection.wait; signal — "Execution of Python signal handlers".

The bug that shaped it: uvicorn's reloader stopped a child by os.kill(pid), the child
    was dead already, and the parent died of it (uvicorn #684). Then came terminate(),
    which on Windows skips lifespan shutdown (#1036), and console events, which hit
    every process on the console (#2211, #1972). Here one pipe per worker does four
    jobs, the same on every system: the worker says "ready"; its loop says "alive"; the
    parent closes the pipe to say stop; and if the parent dies, the worker reads the end
    of file and leaves.

But: Windows can wait for 63 handles at once, so at most 31 workers there.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import select
import signal
import threading
import time
from collections.abc import Callable

NAME = "foal worker"  # of every worker process, so that it can tell that it is one
TICK = 0.25  # seconds between two looks; also how late a signal may be noticed
SILENCE = 5.0  # seconds without "alive" until the log says so
TERMINATED = 2.0  # seconds that a worker is given between terminate and kill
STABLE = 10.0  # seconds after which a death is no longer one of a series
LONGEST_DELAY = 30.0  # seconds between two attempts at a worker that keeps dying
# Of a worker that Ctrl-C or Ctrl-Break ended, on Windows; it reaches us a bit later.
CONTROL_C_EXIT = 0xC000013A

logger = logging.getLogger("server.workers")
spawn = multiprocessing.get_context("spawn")  # the same on every system


# The worker's side.


class Lifeline:
    """The worker's end of the pipe."""

    def __init__(self, pipe: multiprocessing.connection.Connection) -> None:
        self.pipe = pipe

    def say(self, word: str) -> None:
        """Tell the supervisor "ready", "alive" or "retire"; from the event loop itself,
        because a thread that answers for a blocked loop would hide it. Never waits: a
        supervisor that was stopped with Ctrl-Z reads nothing."""
        # If it has closed the pipe, it wants us to stop, and `watch` knows.
        with contextlib.suppress(OSError):
            if hasattr(select, "poll"):
                poll = select.poll()
                poll.register(self.pipe, select.POLLOUT)
                if not poll.poll(0):
                    return
            self.pipe.send(word)

    def watch(self, stop: Callable[[], None]) -> None:
        """Call `stop`, from another thread, when the supervisor closes the pipe. Should
        the supervisor be dead, leave within a second, whatever the loop is doing."""

        def wait() -> None:
            with contextlib.suppress(EOFError, OSError):
                self.pipe.recv()  # it says nothing, until it closes its end
            stop()
            multiprocessing.parent_process().join()
            time.sleep(0.5)  # for a stop without requests in flight
            os._exit(1)

        threading.Thread(target=wait, name="lifeline", daemon=True).start()


def ignore_group_signals() -> None:
    """For a worker: what reaches the process group is its supervisor's business. Not by
    SIG_IGN, which the app's own subprocesses would inherit (man 2 execve)."""
    for name in ("SIGINT", "SIGBREAK", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: None)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


# The supervisor's side.


class State(enum.Enum):
    """What a worker is doing, as far as its supervisor knows."""

    #   STARTING ──"ready"──► READY ──"retire", SIGHUP, a change──► OUTDATED
    #       │                   │ ◄──── its successor cannot start ─────┘ │
    #       └────────────────── stop ───────────────────────────────────┴──► LEAVING
    STARTING = enum.auto()
    READY = enum.auto()
    OUTDATED = enum.auto()  # serves until a new one is ready
    LEAVING = enum.auto()


class Worker:
    """One process and the supervisor's end of its pipe."""

    def __init__(self, target: Callable[..., None], args: tuple) -> None:
        self.state = State.STARTING
        self.started = self.heard = time.monotonic()
        self.reported = False  # its silence
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=target, args=(*args, theirs), name=NAME)
        # A Ctrl-C reaches the whole process group, and the supervisor alone shall act
        # on it: a worker is born with SIGINT blocked, until it ignores it.
        blocked = hasattr(signal, "pthread_sigmask")
        if blocked:
            # The first start also starts this helper, which then unblocks SIGINT.
            multiprocessing.resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()  # walk: worker 1
        finally:
            theirs.close()
            if blocked:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def __str__(self) -> str:
        return f"worker [{self.process.pid}]"

    def age(self) -> float:
        return time.monotonic() - self.started

    def stop(self, grace: float) -> None:
        """Ask it to leave. `push` makes that less of a question as time goes by."""
        if self.state is not State.LEAVING:
            self.state = State.LEAVING  # walk: worker 6
            self.pipe.close()
            self.steps = [self.process.kill, self.process.terminate]
            self.next_step = time.monotonic() + grace

    def push(self) -> None:
        """The next step of a stop, once its time has come. terminate and kill ask
        whether the process is still there, as os.kill does not (uvicorn #684)."""
        if self.steps and time.monotonic() >= self.next_step:
            step = self.steps.pop()
            logger.warning("%s has not left yet: %s", self, step.__name__)
            step()
            self.next_step = time.monotonic() + TERMINATED


class Supervisor:
    """Keeps `count` workers running that execute target(*args, pipe)."""

    def __init__(
        self,
        target: Callable[..., None],
        args: tuple,
        count: int,
        *,
        grace: float,  # seconds for a worker to leave by itself
        silence_limit: float | None = None,  # seconds of silence to replace it for
        should_restart: Callable[[], str] | None = None,  # asked each tick: why, or ""
        on_ready: Callable[[], None] = lambda: None,  # called once
        on_stop: Callable[[], None] = lambda: None,  # called first
    ) -> None:
        self.target, self.args, self.count = target, args, count
        self.grace, self.silence_limit = grace, silence_limit
        self.should_restart = should_restart
        self.on_ready, self.on_stop = on_ready, on_stop
        self.on_terminal = os.isatty(2)
        self.workers: list[Worker] = []
        self.signals: list[int] = []
        self.exit_code: int | None = None  # None while we run
        self.waiting_for_change = False  # the app cannot start, and a watcher is there
        self.deaths = 0  # in a row, soon after the start
        self.not_before = 0.0  # time.monotonic() of the next attempt

    def run(self) -> int:
        """Supervise until a signal or a failed start; return the exit code."""
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        if threading.current_thread() is not threading.main_thread():
            numbers = []  # Python delivers signals to the main thread alone
        # A handler notes the number, no more (gunicorn #2564); the loop acts on it.
        note = lambda number, frame: self.signals.append(number)  # noqa: E731
        previous = {number: signal.signal(number, note) for number in numbers}
        try:
            while self.exit_code is None or self.workers:
                self.replace_and_spawn()
                self.listen()
                self.act_on_signals()  # before a death: it may have the same cause
                self.reap_the_dead()
                self.look_after()
        finally:
            for worker in self.workers:
                worker.process.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.exit_code

    def act_on_signals(self) -> None:
        while self.signals:
            number = self.signals.pop(0)
            if number in self.signals:
                continue  # timeout(1) tells us, and our process group: that is once
            name = signal.Signals(number).name
            if name == "SIGHUP" and self.on_terminal == os.isatty(2):
                if self.exit_code is None:
                    self.restart(name)  # and not because the terminal was closed
            elif self.exit_code is None:
                logger.info("%s: stopping", name)
                self.stop(0)
            else:
                logger.warning("%s again: ending at once", name)
                self.exit_code = 128 + number
                for worker in self.workers:
                    worker.process.kill()

    def stop(self, exit_code: int) -> None:
        self.exit_code = exit_code
        self.on_stop()
        for worker in self.workers:
            worker.stop(0 if worker.state is State.STARTING else self.grace)

    def restart(self, reason: str) -> None:
        """Replace all workers, one by one; those that start may have read old code."""
        logger.info("%s: replacing workers", reason)
        self.waiting_for_change = False
        self.deaths, self.not_before = 0, 0.0
        for worker in self.workers:
            if worker.state is State.STARTING:
                worker.stop(0)
            elif worker.state is State.READY:
                worker.state = State.OUTDATED

    def replace_and_spawn(self) -> None:
        """Bring what is nearer to what should be: `count` workers, none outdated."""
        if self.exit_code is not None:
            return
        states = State.READY, State.OUTDATED, State.STARTING
        ready, outdated, starting = map(self.those, states)
        surplus = len(ready) + len(outdated) - self.count
        for worker in outdated[: max(0, surplus)]:
            worker.stop(self.grace)  # walk: worker 5
        # One at a time until one has shown that it can start (its error is then shown
        # once), and one at a time for those that still serve.
        at_once = 1 if outdated or not ready else self.count
        missing = self.count - len(ready) - len(starting)
        if self.waiting_for_change or time.monotonic() < self.not_before:
            return
        try:
            for _ in range(min(missing, at_once - len(starting))):
                self.workers.append(Worker(self.target, self.args))
        except OSError as exc:  # no descriptor, no process, no memory
            self.deaths += 1
            self.try_again(f"cannot start a worker: {exc}")

    def those(self, state: State) -> list[Worker]:
        return [worker for worker in self.workers if worker.state is state]

    def listen(self) -> None:
        """Wait for a word, a death, or the next tick."""
        pipes = {w.pipe: w for w in self.workers if w.state is not State.LEAVING}
        sentinels = [w.process.sentinel for w in self.workers]
        for source in multiprocessing.connection.wait([*pipes, *sentinels], TICK):
            if source in pipes:
                self.hear(pipes[source])

    def hear(self, worker: Worker) -> bool:
        """Take in a word; False if there is none left."""
        try:
            word = worker.pipe.recv()
        except (EOFError, OSError):
            return False  # it is dying: `reap_the_dead` will see it
        worker.heard = time.monotonic()
        worker.reported = False
        if word == "ready":
            worker.state = State.READY
            logger.info("%s is ready after %.2f s", worker, worker.age())
            self.on_ready()
            self.on_ready = lambda: None
        elif word == "retire" and worker.state is State.READY:
            worker.state = State.OUTDATED
            logger.info("%s has served its share: replacing it", worker)
        return True

    def reap_the_dead(self) -> None:
        for worker in list(self.workers):
            if not worker.process.is_alive():
                self.reap(worker)

    def reap(self, worker: Worker) -> None:
        """Say why it is dead and for how long it ran, and decide what that means."""
        if worker.state is State.STARTING:  # it may have said "ready" since we listened
            while multiprocessing.connection.wait([worker.pipe], 0):
                if not self.hear(worker):
                    break
        self.workers.remove(worker)  # walk: worker 8
        worker.pipe.close()
        code = worker.process.exitcode
        end = f"{worker} {describe_exit(code)} after {worker.age():.1f} s"
        worker.process.close()
        if worker.state is State.LEAVING or self.exit_code is not None:
            logger.info("%s", end)
        elif worker.state is State.STARTING and code != CONTROL_C_EXIT:
            self.failed_to_start(end)
        else:
            self.deaths = self.deaths + 1 if worker.age() < STABLE else 0
            self.try_again(end)

    def failed_to_start(self, end: str) -> None:
        """What cannot start now will not start by itself: no restart loop (uvicorn
        #1115, #2440). But never take away what still serves."""
        serving = self.those(State.READY) + self.those(State.OUTDATED)
        if self.should_restart is not None:
            self.waiting_for_change = True
            logger.error("%s, before it was ready; waiting for a file to change", end)
        elif not serving:
            logger.error("%s, before it was ready; stopping", end)
            self.stop(3)
        elif self.those(State.OUTDATED):
            logger.error("%s, before it was ready; keeping the old workers", end)
            for worker in self.those(State.OUTDATED):
                worker.state = State.READY
        else:
            self.deaths += 1
            self.try_again(f"{end}, before it was ready")

    def try_again(self, end: str) -> None:
        delay = 0.0 if self.deaths < 2 else min(0.25 * 2**self.deaths, LONGEST_DELAY)
        self.not_before = time.monotonic() + delay
        then = f"in {delay:g} s" if delay else "now"
        logger.error("%s; starting another %s", end, then)

    def look_after(self) -> None:
        """Once a tick: late stops, silent workers, changed files."""
        for worker in self.workers:
            if worker.state is State.LEAVING:
                worker.push()
            elif worker.state is not State.STARTING:  # that may last (uvicorn #2506)
                self.check_silence(worker)
        if self.should_restart is not None and self.exit_code is None:
            if reason := self.should_restart():
                self.restart(reason)

    def check_silence(self, worker: Worker) -> None:
        silence = time.monotonic() - worker.heard
        limit = self.silence_limit
        finding = f"{worker}: silent for {silence:.0f} s"
        if limit is not None and silence > limit:
            logger.error("%s, its loop is blocked; replacing it", finding)
            worker.stop(0)
        elif silence > SILENCE and not worker.reported:
            worker.reported = True
            logger.warning("%s; is its loop blocked?", finding)


def describe_exit(code: int | None) -> str:
    """An exit code in words: multiprocessing gives a signal as a negative number,
    Windows a status as a large one."""
    if code is not None and code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"was ended by {names.get(-code, f'signal {-code}')}"
    return f"exited with code {code if code is None or code < 2**16 else hex(code)}"
