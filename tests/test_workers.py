"""workers.py: the supervisor alone, with plain functions for workers, and then
`python server.py --workers 2` as a user runs, kills, stops and restarts it."""

from __future__ import annotations

import contextlib
import gc
import http.client
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import worker_targets
from conftest import GET, PATIENCE, ROOT, Client, Process, environment
from test_processes import assert_order, refuses
from worker_targets import (
    die_after_ready,
    die_before_ready,
    follow,
    ignore_everything,
    ignore_pipe,
    never_ready,
    obey,
    puppet,
    ready_when,
    tell_mask,
)

import server
import sockets
import workers
from workers import State

POSIX_ONLY = pytest.mark.skipif(os.name == "nt", reason="Windows has no such thing")
HAS_PROC = os.name != "nt" and os.path.isdir("/proc/self/fd")  # Wine shows Linux' own
PROC_ONLY = pytest.mark.skipif(not HAS_PROC, reason="no /proc here")
INTERRUPT = signal.CTRL_BREAK_EVENT if os.name == "nt" else signal.SIGINT
INTERRUPTED = 128 + (signal.SIGBREAK if os.name == "nt" else signal.SIGINT)
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # what ends a process on Windows
SIGNALS = [
    pytest.param(INTERRUPT, INTERRUPTED, id="Ctrl-C"),
    pytest.param(signal.SIGTERM, 128 + 15, id="SIGTERM", marks=POSIX_ONLY),
]


def until(condition, seconds=PATIENCE):
    """Ask again and again; return the first answer that is true."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)
    return answer


# ── The supervisor alone. ──


class Driven(workers.Supervisor):
    """A supervisor whose loop is turned by a test, in the test's own thread."""

    def turn(self) -> None:
        self.replace_and_spawn()
        self.listen()
        self.act_on_signals()
        self.reap_the_dead()
        self.look_after()

    def until(self, condition) -> None:
        def turned():
            self.turn()
            return condition()

        until(turned)

    def until_ready(self) -> set[int]:
        """Until all are, and the old ones are gone; their pids."""
        self.until(lambda: [w.state for w in self.workers] == [State.READY] * self.count)
        return {w.process.pid for w in self.workers}


@pytest.fixture
def no_main(monkeypatch):
    """Spawned processes import our __main__, which is pytest: slow, and no use."""
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__spec__", None)
    monkeypatch.delattr(main, "__file__", raising=False)


@pytest.fixture
def supervise(monkeypatch, no_main, log):
    """Make supervisors that hurry; end what is left of them."""
    monkeypatch.setattr(workers, "TICK", 0.02)
    made = []

    def supervise(target, *args, count=1, grace=PATIENCE, **options):
        made.append(Driven(target, args, count, grace=grace, **options))
        return made[-1]

    yield supervise
    for worker in [worker for supervisor in made for worker in supervisor.workers]:
        worker.process.kill()
        worker.process.join(PATIENCE)
        worker.pipe.close()


def messages(log, *words) -> list[str]:
    """Log lines with all of these words."""
    lines = log.text.splitlines()  # as they were when they were logged
    return [line for line in lines if all(word in line for word in words)]


# For a worker that says a word, or dies, in each state: its state afterwards, or None
# when it is gone; then the supervisor's exit code, and whether it waits for a change.
DIES_EARLY = (None, 3, False)
TABLE = [
    (State.STARTING, "alive", (State.STARTING, None, False)),
    (State.STARTING, "ready", (State.READY, None, False)),
    (State.STARTING, "retire", (State.STARTING, None, False)),
    (State.STARTING, "die", DIES_EARLY),
    (State.READY, "alive", (State.READY, None, False)),
    (State.READY, "retire", (State.OUTDATED, None, False)),
    (State.READY, "die", (None, None, False)),
    (State.OUTDATED, "alive", (State.OUTDATED, None, False)),
    (State.OUTDATED, "retire", (State.OUTDATED, None, False)),
    (State.OUTDATED, "die", (None, None, False)),
    (State.LEAVING, "die", (None, None, False)),
]


class TestTheStateMachine:
    """Each word, and a death, in each state: State's picture as a table."""

    @pytest.mark.parametrize("state, word, expected", TABLE)
    def test_a_word_or_a_death_means_what_the_table_says(
        self, supervise, state, word, expected
    ):
        s = supervise(puppet)
        s.replace_and_spawn()
        [worker] = s.workers
        worker.state = state
        worker.pipe.send(word)
        heard = worker.heard
        if state is State.LEAVING:
            worker.steps = []
        until(lambda: s.listen() or s.reap_the_dead() or worker.heard > heard or worker not in s.workers)
        now = worker.state if worker in s.workers else None
        assert (now, s.exit_code, s.waiting_for_change) == expected

    def test_a_worker_that_leaves_has_no_pipe_to_speak_through(self, supervise):
        s = supervise(obey)
        s.until_ready()
        [worker] = s.workers
        worker.stop(PATIENCE)
        assert worker.state is State.LEAVING and worker.pipe.closed
        s.until(lambda: worker not in s.workers)  # and it heard that, as its stop

    def test_a_death_before_ready_waits_if_there_is_a_watcher(self, supervise, log):
        s = supervise(die_before_ready, should_restart=lambda: "")
        s.until(lambda: s.waiting_for_change)
        for _ in range(5):
            s.turn()
        assert not s.workers and s.exit_code is None
        assert len(messages(log, "before it was ready; waiting")) == 1

    def test_a_change_ends_the_wait(self, supervise, tmp_path):
        (tmp_path / "what").write_text("bad")
        s = supervise(follow, str(tmp_path / "what"), should_restart=lambda: "")
        s.until(lambda: s.waiting_for_change)
        (tmp_path / "what").write_text("good")
        s.should_restart = iter(["changed: what", *[""] * 10_000]).__next__
        assert s.until_ready()

    def test_a_change_makes_workers_outdated_and_ends_those_that_start(self, supervise):
        """What starts has read the old code, and nobody waits for its answers."""
        s = supervise(puppet, count=2)
        s.workers = [workers.Worker(puppet, ()), workers.Worker(puppet, ())]
        serving, starting = s.workers
        serving.state = State.READY
        s.restart("changed: app.py")
        assert (serving.state, starting.state) == (State.OUTDATED, State.LEAVING)

    def test_an_outdated_worker_serves_until_the_new_one_is_ready(self, supervise):
        s = supervise(obey, count=3)
        old = s.until_ready()
        s.restart("test")
        states = []

        def all_new():
            states.append([w.state for w in s.workers])
            return {w.process.pid for w in s.workers}.isdisjoint(old)

        s.until(lambda: all_new() and len(s.workers) == 3)
        for now in states:
            assert now.count(State.READY) + now.count(State.OUTDATED) >= 3
            assert now.count(State.STARTING) <= 1  # one by one


class TestStarting:
    """architecture.md, picture 2: ready is reported, and counts."""

    def test_ready_is_told_once_whatever_the_number(self, supervise):
        told = []
        s = supervise(obey, count=3, on_ready=lambda: told.append(len(s.workers)))
        s.until_ready()
        s.restart("test")
        s.until_ready()
        assert told == [1]

    def test_nothing_is_told_while_nobody_is_ready(self, supervise):
        told = []
        s = supervise(never_ready, on_ready=lambda: told.append("ready"))
        for _ in range(5):
            s.turn()
        assert told == [] and [w.state for w in s.workers] == [State.STARTING]

    def test_only_one_tries_until_one_has_shown_that_it_can(self, supervise, tmp_path):
        s = supervise(ready_when, str(tmp_path / "go"), count=3)
        for _ in range(5):
            s.turn()
        assert len(s.workers) == 1
        (tmp_path / "go").touch()
        assert len(s.until_ready()) == 3

    @POSIX_ONLY
    def test_a_worker_is_born_deaf_to_ctrl_c_and_stays_so(self, supervise):
        """Blocked from the first instruction on, then ignored. And we hear it again."""
        worker = workers.Worker(tell_mask, ())
        said = worker.pipe.poll(PATIENCE) and worker.pipe.recv()
        worker.stop(0)
        worker.process.join(PATIENCE)
        assert said == (True, False)
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    @POSIX_ONLY
    def test_so_is_the_very_first_of_a_process(self):
        """With the first one multiprocessing starts a helper, its resource tracker,
        and then unblocks SIGINT behind our back."""
        text = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}
import worker_targets, workers
worker = workers.Worker(worker_targets.tell_mask, ())
print(worker.pipe.recv())
worker.stop(0)
worker.process.join()
"""
        done = subprocess.run([sys.executable, "-c", text], capture_output=True)
        assert done.stdout.decode().strip() == "(True, False)", done


class TestDeaths:
    """Each death is one line: pid, how, after how long, what happens now."""

    @pytest.mark.parametrize(
        "code, words",
        [
            (0, "exited with code 0"),
            (3, "exited with code 3"),
            (None, "exited with code None"),
            (0xC000013A, "exited with code 0xc000013a"),  # Windows: Ctrl-C
            (-int(KILL), f"was ended by {KILL.name}"),
            pytest.param(-40, "was ended by", marks=POSIX_ONLY),  # real-time, nameless
        ],
    )
    def test_a_fate_is_told_in_words(self, code, words):
        assert workers.describe_exit(code).startswith(words)

    def test_a_death_after_ready_is_one_line_and_a_new_worker(self, supervise, log):
        s = supervise(obey, count=2)
        [first, *_] = sorted(s.until_ready())
        next(w for w in s.workers if w.process.pid == first).process.kill()
        s.until(lambda: first not in [w.process.pid for w in s.workers])
        assert len(s.until_ready()) == 2
        [line] = messages(log, f"[{first}]", "ended by")
        assert re.search(rf"{KILL.name} after \d+\.\d s; starting another now$", line)

    def test_deaths_in_a_row_back_off(self, supervise, log):
        """gunicorn forks for ever, as fast as it can. Here the delay doubles."""
        s = supervise(die_after_ready)

        def eight():
            s.not_before = 0.0  # the test has no time to wait
            return s.deaths == 8

        s.until(eight)
        delays = [line.split("another ")[1] for line in messages(log, "another")]
        expected = ["now", "in 1 s", "in 2 s", "in 4 s", "in 8 s", "in 16 s"]
        assert delays == [*expected, "in 30 s", "in 30 s"]

    def test_its_last_word_is_heard(self, supervise):
        """What if it says "ready", and dies before the next look at its pipe?"""
        s = supervise(die_after_ready)
        s.replace_and_spawn()
        s.workers[0].process.join(PATIENCE)
        s.reap_the_dead()
        assert (s.exit_code, s.deaths) == (None, 1)

    def test_the_delay_is_kept(self, supervise, monkeypatch):
        monkeypatch.setattr(workers, "LONGEST_DELAY", 0.3)
        s = supervise(die_after_ready)
        s.until(lambda: s.deaths == 2)
        before = time.monotonic()
        s.until(lambda: s.workers)
        assert 0.2 < time.monotonic() - before

    def test_a_death_after_a_long_life_is_not_one_of_a_series(
        self, supervise, monkeypatch, log
    ):
        monkeypatch.setattr(workers, "STABLE", 0.0)
        s = supervise(die_after_ready)
        s.until(lambda: len(messages(log, "starting another now")) == 3)
        assert s.deaths == 0 and not messages(log, "another in")

    def test_a_restart_forgets_the_series(self, supervise):
        s = supervise(die_after_ready)
        s.until(lambda: s.deaths == 2)
        assert s.not_before > time.monotonic()
        s.restart("SIGHUP")
        assert (s.deaths, s.not_before) == (0, 0.0)

    def test_what_cannot_start_beside_what_serves_takes_nothing_away(
        self, supervise, tmp_path, log
    ):
        (tmp_path / "what").write_text("good")
        s = supervise(follow, str(tmp_path / "what"), count=2)
        victim, survivor = s.until_ready() and s.workers
        (tmp_path / "what").write_text("bad")
        victim.process.kill()
        s.until(lambda: messages(log, "before it was ready", "another in"))
        assert s.workers == [survivor] and s.exit_code is None
        assert survivor.state is State.READY
        (tmp_path / "what").write_text("good")
        s.not_before = 0.0
        assert len(s.until_ready()) == 2

    def test_a_restart_onto_what_cannot_start_keeps_the_old(
        self, supervise, tmp_path, log
    ):
        (tmp_path / "what").write_text("good")
        s = supervise(follow, str(tmp_path / "what"), count=2)
        old = s.until_ready()
        (tmp_path / "what").write_text("bad")
        s.restart("SIGHUP")
        s.until(lambda: messages(log, "keeping the old workers"))
        for _ in range(5):
            s.turn()
        assert s.until_ready() == old
        assert len(messages(log, "before it was ready")) == 1  # and no second attempt
        (tmp_path / "what").write_text("good")
        s.restart("SIGHUP")
        assert s.until_ready().isdisjoint(old)


class TestSilence:
    """uvicorn #2506: say that a loop is blocked; kill only if asked, and say why."""

    def test_it_is_reported_once_and_tolerated(self, supervise, monkeypatch, log):
        monkeypatch.setattr(workers, "SILENCE", 0.05)
        s = supervise(obey)
        before = s.until_ready()
        s.until(lambda: messages(log, "is its loop blocked?"))
        for _ in range(10):
            s.turn()
        assert s.until_ready() == before and len(messages(log, "silent for")) == 1

    def test_a_word_ends_it(self, supervise, monkeypatch, log):
        monkeypatch.setattr(workers, "SILENCE", 0.05)
        s = supervise(puppet)
        s.turn()
        [worker] = s.workers
        worker.pipe.send("ready")
        s.until(lambda: messages(log, "silent for"))
        worker.pipe.send("alive")
        s.until(lambda: not worker.reported)
        s.until(lambda: len(messages(log, "silent for")) == 2)

    def test_it_costs_the_place_when_there_is_a_limit(self, supervise, log):
        s = supervise(obey, silence_limit=0.05)
        s.until_ready()
        [worker] = s.workers
        s.until(lambda: worker not in s.workers and s.workers)
        assert messages(log, "its loop is blocked; replacing it")

    def test_it_does_not_matter_while_starting(self, supervise, tmp_path, log):
        s = supervise(ready_when, str(tmp_path / "go"), silence_limit=0.05)
        s.turn()
        [worker] = s.workers
        s.until(lambda: worker.age() > 0.3)
        assert worker.state is State.STARTING and not messages(log, "silent")
        (tmp_path / "go").touch()
        s.until_ready()
        assert s.workers == [worker]


class TestStopping:
    """architecture.md: close the pipe, wait the grace, terminate, wait, kill."""

    def test_closing_the_pipe_is_enough_for_who_listens(self, supervise, log):
        order = []
        s = supervise(obey, count=2, on_stop=lambda: order.append(len(s.workers)))
        s.until_ready()
        s.stop(0)
        s.until(lambda: not s.workers)
        assert order == [2] and s.exit_code == 0  # the listeners close first
        assert len(messages(log, "exited with code 0")) == 2
        assert not messages(log, "has not left")

    @POSIX_ONLY
    def test_who_ignores_the_pipe_is_terminated(self, supervise, log):
        s = supervise(ignore_pipe, grace=0.05)
        s.until_ready()
        s.stop(0)
        s.until(lambda: not s.workers)
        assert messages(log, "has not left yet: terminate")
        assert messages(log, "SIGTERM") and not messages(log, "kill")

    @POSIX_ONLY
    def test_who_ignores_that_too_is_killed(self, supervise, monkeypatch, log):
        monkeypatch.setattr(workers, "TERMINATED", 0.2)
        s = supervise(ignore_everything, grace=0.05)
        s.until_ready()
        s.stop(0)
        s.until(lambda: not s.workers)
        steps = [line.split(": ")[-1] for line in messages(log, "has not left")]
        assert steps == ["terminate", "kill"] and messages(log, "SIGKILL")

    def test_the_grace_is_given(self, supervise, log):
        s = supervise(ignore_pipe, grace=PATIENCE)
        s.until_ready()
        s.stop(0)
        for _ in range(10):
            s.turn()
        assert len(s.workers) == 1 and not messages(log, "has not left")

    def test_a_second_stop_does_not_begin_again(self, supervise):
        s = supervise(ignore_pipe)
        s.until_ready()
        [worker] = s.workers
        worker.stop(5)
        until = worker.next_step
        worker.stop(3600)
        assert worker.next_step == until

    def test_no_worker_starts_any_more(self, supervise):
        s = supervise(obey)
        s.stop(0)
        s.turn()
        assert not s.workers

    def test_no_question_is_asked_any_more(self, supervise):
        s = supervise(obey, should_restart=lambda: pytest.fail("asked"))
        s.stop(0)
        s.turn()

    def test_the_same_signal_twice_at_once_is_one(self, supervise):
        """timeout(1) sends it to its child, and at once to the process group."""
        s = supervise(obey)
        s.signals += [signal.SIGTERM, signal.SIGTERM]
        s.act_on_signals()
        assert s.exit_code == 0

    @POSIX_ONLY
    @pytest.mark.parametrize("before, code", [(True, 0), (False, None)])
    def test_a_hangup_is_a_restart_unless_the_terminal_is_gone(
        self, supervise, monkeypatch, before, code
    ):
        """What if somebody just closes the window?"""
        monkeypatch.setattr(os, "isatty", lambda fd: False)  # now
        s = supervise(obey)
        s.on_terminal = before
        s.signals.append(signal.SIGHUP)
        s.act_on_signals()
        assert s.exit_code == code

    @PROC_ONLY
    def test_twenty_replacements_leave_nothing_behind(self, supervise):
        s = supervise(obey, count=2)
        s.until_ready()
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            s.restart("test")
            s.until_ready()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before
        assert len(multiprocessing.active_children()) == 2
        s.stop(0)
        s.until(lambda: not s.workers)
        assert not multiprocessing.active_children()


class TestLifeline:
    """The worker's end of the pipe."""

    def test_a_listener_keeps_its_address_and_protocol(self, no_main):
        """What asyncio needs for TCP_NODELAY is pickled too (uvicorn #3149)."""
        [listener] = sockets.bind_tcp("127.0.0.1", 0, 5)
        ours, theirs = workers.spawn.Pipe()
        args = (listener, theirs)
        child = workers.spawn.Process(target=worker_targets.tell_listener, args=args)
        child.start()
        theirs.close()
        with listener, ours:
            assert ours.poll(PATIENCE)
            assert ours.recv() == (listener.getsockname(), socket.IPPROTO_TCP)
            child.join(PATIENCE)

    def test_a_word_to_nobody_is_no_error(self):
        ours, theirs = workers.spawn.Pipe()
        ours.close()
        workers.Lifeline(theirs).say("alive")
        theirs.close()
        workers.Lifeline(theirs).say("alive")

    @POSIX_ONLY
    def test_a_supervisor_that_sleeps_does_not_block_the_loop(self):
        """What if somebody stops it with Ctrl-Z, for an hour?"""
        ours, theirs = workers.spawn.Pipe()
        lifeline = workers.Lifeline(theirs)

        def speak_for_an_hour():
            for _ in range(4 * 3600):
                lifeline.say("alive")

        thread = threading.Thread(target=speak_for_an_hour, daemon=True)
        thread.start()
        thread.join(5)
        blocked = thread.is_alive()
        ours.close()
        thread.join(PATIENCE)
        theirs.close()
        assert not blocked


# ── The whole program. ──

APP = """
import asyncio, gc, os, socket, sys, time

def say(words):
    os.write(1, f"{words} {os.getpid()}\\n".encode())  # in one piece

say("importing")

async def pid(scope, receive):
    pass

async def wait_for_body(scope, receive):
    say("in flight")
    while (await receive()).get("more_body"):
        pass

async def wait_forever(scope, receive):
    say("in flight")
    await asyncio.Event().wait()

async def block(scope, receive):
    say("in flight")
    while True:  # not one long sleep: Windows could not interrupt it
        time.sleep(0.02)

async def nodelay(scope, receive):
    for thing in gc.get_objects():
        if isinstance(thing, asyncio.Transport):
            sock = thing.get_extra_info("socket")
            if sock.getpeername() == tuple(scope["client"]):
                value = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                return str(int(value != 0))

async def inherited(scope, receive):
    found = []
    for number in range(3, 64):
        try:
            sock = socket.socket(fileno=os.dup(number))
        except OSError:
            continue
        with sock:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.append(os.get_inheritable(number))
    return str(found)

async def ignored(scope, receive):
    show = "import signal; print(signal.getsignal(2) is signal.SIG_IGN, end='')"
    pipe = {"stdout": asyncio.subprocess.PIPE}
    shown = await asyncio.create_subprocess_exec(sys.executable, "-c", show, **pipe)
    return (await shown.communicate())[0].decode()

async def twins(scope, receive):
    import server, workers
    ours = isinstance(receive.__self__, server.RequestResponseCycle)
    lifeline = isinstance(receive.__self__.connection.server.lifeline, workers.Lifeline)
    return f"{ours} {lifeline}"

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        say("the lifespan ends")
        return await send({"type": "lifespan.shutdown.complete"})
    text = await globals()[scope["path"][1:] or "pid"](scope, receive)
    body = (text or str(os.getpid())).encode()
    length = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    await send({"type": "http.response.body", "body": body})
"""
FAILS = """
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (folder / "busy.py").write_text(APP)
    (folder / "slow.py").write_text(APP + "time.sleep(1.1)\n")
    (folder / "stuck.py").write_text(APP + "while True: time.sleep(0.02)\n")
    (folder / "name_error.py").write_text(APP + "no_such_name\n")
    (folder / "leaves.py").write_text(APP + "raise SystemExit('a reason')\n")
    (folder / "dies.py").write_text(APP + "os._exit(7)\n")
    (folder / "fails.py").write_text(APP + "async def app(scope, receive, send):" + FAILS)
    return folder


class Supervised(Process):
    """A process whose workers must not outlive a test, not even one that fails."""

    def __exit__(self, *_):
        # Killed while it spawns, on Windows, it may leave a child that is half made and
        # keeps our end of their output open for ever. So it is asked first, and twice.
        for _ in range(40 if os.name == "nt" else 0):
            if self.process.poll() is None:
                self.interrupt()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.5)
        self.process.kill()
        self.reader.join(5)
        if self.reader.is_alive():
            for pid in re.findall(r"(?:worker \[|importing )(\d+)", self.output):
                with contextlib.suppress(OSError):
                    os.kill(int(pid), KILL)
        super().__exit__()


class Hurried(Supervised):
    """The same with a supervisor that looks more often."""

    script = ROOT / "tests" / "hurried.py"


@pytest.fixture
def start(folder):
    """Start a supervisor and two workers."""

    def start(*options, app="busy:app", count=2, folder=folder, **process):
        number = ("--workers", count) if count else ()
        return Hurried(
            app, "--app-dir", folder, "--port", 0, *number, *options, **process
        )

    return start


def get(port, what="/") -> str:
    """One request on a connection of its own."""
    with Client(("127.0.0.1", port)) as client:
        client.send(f"GET {what} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        status, _, body = client.response()
        assert status == 200
        return body.decode()


def ask(client, what, body=b"") -> None:
    """A request for one of the app's functions; its body is two bytes long."""
    client.send(f"POST /{what} HTTP/1.1\r\nHost: x\r\n".encode())
    client.send(b"Content-Length: 2\r\n\r\n" + body)


def wait_for_count(p, pattern, count) -> list[str]:
    """That many lines that match, since the start, in any order with others."""
    while len(found := re.findall(pattern, p.output)) < count:
        p.wait_for("")
    return found


def both_ready(p) -> tuple[int, set[str]]:
    """The port, and the pids of two workers."""
    port = p.port()
    return port, set(wait_for_count(p, r"worker \[(\d+)\] is ready", 2))


def in_each(p, port, pids, what) -> list[Client]:
    """A request of two bytes, one of them missing, in each of the workers."""
    clients: dict[str, Client] = {}
    while set(clients) != pids:
        client = Client(("127.0.0.1", port))
        client.send(GET)
        pid = client.response()[2].decode()  # whose connection is this?
        if pid in clients:
            client.sock.close()
            continue
        clients[pid] = client
        ask(client, what, b"o")
        p.wait_for(f"in flight {pid}")
    return list(clients.values())


class Load:
    """Clients that never rest. Half of them make a connection for each request; the
    others keep theirs, and ask again only if it was closed while idle."""

    def __init__(self, port, threads=4):
        self.port = port
        self.failed: list[str] = []
        self.pids: list[str] = []
        self.over = threading.Event()
        self.threads = [
            threading.Thread(target=self.run, args=(n % 2 == 0,), daemon=True)
            for n in range(threads)
        ]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def run(self, keep: bool) -> None:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        while not self.over.is_set():
            kept, answer = client.sock is not None, None
            try:
                client.request("GET", "/")
                answer = client.getresponse()
                self.pids.append(answer.read().decode())
                assert answer.status == 200
            except (OSError, http.client.HTTPException, AssertionError) as exc:
                if not (kept and answer is None and isinstance(exc, ConnectionError)):
                    self.failed.append(repr(exc))
                client.close()
            if not keep:
                client.close()
        client.close()

    def goes_on(self) -> None:
        """Wait for some more answers."""
        enough = len(self.pids) + 50
        until(lambda: len(self.pids) >= enough)


class TestSharing:
    """Issue 3.1: one port, several processes."""

    def test_two_workers_answer_on_one_port(self, start):
        with start() as p:
            port, pids = both_ready(p)
            until(lambda: len(pids := {get(port) for _ in range(20)}) == 2 and pids)
            assert {get(port) for _ in range(20)} <= pids
            assert str(p.process.pid) not in pids
            assert p.output.count("listening on") == 1

    def test_the_address_is_told_when_it_answers_and_not_before(self, start):
        with start() as p:
            p.port()
            assert_order(p.output, "importing", "is ready after", "listening on")

    def test_many_connections_are_spread(self, start):
        """At 64 connections, no worker has all of them."""
        with start() as p, contextlib.ExitStack() as stack:
            port, pids = both_ready(p)
            clients = [stack.enter_context(p.connect(port)) for _ in range(64)]
            for client in clients:
                client.send(GET)
            answers = [client.response()[2].decode() for client in clients]
            assert set(answers) == pids
            assert min(map(answers.count, pids)) >= 4

    @pytest.mark.parametrize(
        "options", ["", "--workers 2", "--reload", "--reload --workers 2"]
    )
    @pytest.mark.parametrize(
        "given", [False, pytest.param(True, marks=POSIX_ONLY)], ids=["own", "--fd"]
    )
    def test_no_answer_waits_for_an_ack(self, start, options, given):
        """behaviour.md §3: TCP_NODELAY in every mode (uvicorn #3149)."""
        options = options.split()
        with socket.socket() as theirs:
            theirs.bind(("127.0.0.1", 0))
            fd = theirs.fileno()
            how = {"pass_fds": (fd,)} if given else {}
            options += ["--fd", str(fd)] if given else []
            with start(*options, count=0, **how) as p:
                assert get(p.port(), "/nodelay") == "1"

    def test_who_accepts_never_waits_because_another_starts(self):
        """To pickle a listener on Windows is to dup() it: with its mode, for all."""
        with contextlib.ExitStack() as cleanup:
            [ours] = server.open_listeners(server.Config("x:y", port=0), cleanup)
            theirs = cleanup.enter_context(ours.dup())
            theirs.setblocking(False)
            ours.dup().close()
            rescue = threading.Timer(PATIENCE, Client, [theirs.getsockname()])
            rescue.start()
            with pytest.raises(BlockingIOError):
                theirs.accept()
            rescue.cancel()
            rescue.join()

    @POSIX_ONLY
    def test_a_worker_does_not_pass_the_listener_to_its_subprocesses(self, start):
        """behaviour.md §2. What was passed to a spawned process is inheritable there."""
        with start() as p:
            assert get(p.port(), "/inherited") == "[False]"

    @POSIX_ONLY
    def test_a_subprocess_of_the_app_hears_ctrl_c(self, start):
        """What is ignored stays so in whatever is executed (man 2 execve)."""
        with start() as p:
            assert get(p.port(), "/ignored") == "False"

    def test_an_app_that_imports_us_meets_the_same_classes(self, start):
        """Issue 3.7: two names, one file; in a worker too."""
        with start() as p:
            assert get(p.port(), "/twins") == "True True"

    @pytest.mark.parametrize("name", ["workers", "reload", "sockets"])
    def test_an_app_named_like_a_file_of_ours_is_told_so(self, start, tmp_path, name):
        (tmp_path / f"{name}.py").write_text(APP)
        with start(app=f"{name}:app", folder=tmp_path) as p:
            assert p.exit_code() == 3
        assert f"{name}.py has a name of foal's" in p.output
        assert "Traceback" not in p.output

    def test_an_app_beside_a_file_named_like_ours_is_warned_and_served(
        self, start, tmp_path
    ):
        (tmp_path / "workers.py").write_text("raise NameError('not this one')\n")
        (tmp_path / "busy.py").write_text(APP)
        with start(folder=tmp_path) as p:
            assert get(p.port(), "/twins") == "True True"
            assert "import workers will give foal's, not" in p.output


class TestDeadBeforeReady:
    """Issue 3.2: exit code 3, the app's own error once, no restart loop (uvicorn
    #1115, #2440, #3001)."""

    @pytest.mark.parametrize(
        "app, words, tracebacks",
        [
            ("name_error:app", "NameError: name 'no_such_name' is not defined", 1),
            ("leaves:app", "SystemExit: a reason", 1),
            ("fails:app", "the app failed to start: no database", 0),
            ("busy:ap", 'has no "ap"; did you mean "app"?', 0),
            ("dies:app", "exited with code 7 after", 0),
            ("no_such_module:app", 'no module "no_such_module"', 0),
        ],
    )
    def test_what_cannot_start_is_tried_once(self, start, app, words, tracebacks):
        with start(app=app, count=3) as p:
            assert p.exit_code() == 3
        assert p.output.count(words) == 1, p.output
        assert p.output.count("Traceback") == tracebacks
        assert p.output.count("importing") == (app != "no_such_module:app")
        assert len(re.findall(r"worker \[\d+\] .*ready; stopping", p.output)) == 1
        assert "listening on" not in p.output

    def test_an_app_without_a_name_cannot_be_shared(self, log):
        async def app(scope, receive, send): ...

        assert server.run(app, workers=2, port=0) == 3
        assert messages(log, "pass its MODULE:ATTRIBUTE")

    @pytest.mark.parametrize(
        "call", ["server.run({})", "sys.exit(server.run({}))"], ids=["run", "exit"]
    )
    def test_a_script_without_a_guard_is_told_so(self, folder, tmp_path, call):
        """uvicorn #949, #1045. And no worker starts workers."""
        arguments = f'"leaves:app", app_dir={str(folder)!r}, port=0, workers=2'
        text = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport server\n"
        (tmp_path / "script.py").write_text(text + call.format(arguments))
        done = subprocess.run(
            [sys.executable, tmp_path / "script.py"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd=tmp_path,
            env=environment(),
        )
        assert done.stderr.count('if __name__ == "__main__":') == 1, done.stderr
        assert len(set(re.findall(r"worker \[(\d+)\]", done.stderr))) == 1


class TestSupervision:
    """behaviour.md §6: a worker that dies, hangs or has served enough is replaced."""

    def test_a_killed_worker_is_replaced_under_load(self, start):
        """Requests are lost only where they were inside the one that was killed."""
        with start() as p:
            port, pids = both_ready(p)
            with Load(port) as load:
                load.goes_on()
                victim = sorted(pids)[0]
                os.kill(int(victim), KILL)
                line = p.wait_for(rf"\[{victim}\] .* after .*; starting another now")[0]
                new = p.wait_for(r"worker \[(\d+)\] is ready")[1]
                until(lambda: new in load.pids)
                after = len(load.pids)
                load.goes_on()
            assert os.name == "nt" or "was ended by SIGKILL" in line
            assert len(load.failed) <= len(load.threads)  # one request in each
            assert victim not in load.pids[after:]

    def test_a_worker_whose_loop_is_blocked_is_replaced_if_asked(self, start):
        with start("--timeout-worker-healthcheck", 1) as p:
            port, pids = both_ready(p)
            with p.connect(port) as client:
                ask(client, "block", b"ok")
                victim = p.wait_for(r"in flight (\d+)")[1]
                assert get(port) in pids - {victim}  # the other one goes on
                words = rf"ERROR.*\[{victim}\].*silent for \d s, its loop is blocked"
                p.wait_for(words)
                new = p.wait_for(r"worker \[(\d+)\] is ready")[1]
                until(lambda: get(port) == new)
            assert p.output.count("its loop is blocked") == 1  # the others say "alive"

    def test_a_slow_import_is_not_a_blocked_loop(self, start):
        with start("--timeout-worker-healthcheck", 1, app="slow:app") as p:
            get(p.port())
        assert "silent" not in p.output and p.output.count("importing") == 1

    def test_a_worker_that_has_served_its_share_is_replaced(self, start):
        """--limit-max-requests, and no request fails."""
        with start("--limit-max-requests", 60) as p:
            port, _ = both_ready(p)
            with Load(port) as load:
                until(lambda: len(set(load.pids)) >= 6)
            assert load.failed == []
            wait_for_count(p, "has served its share: replacing it", 4)
            wait_for_count(p, "exited with code 0", 4)

    @POSIX_ONLY
    def test_a_worker_ended_by_any_signal_is_replaced(self, start):
        """What if the signal has no name?"""
        with start() as p:
            port, pids = both_ready(p)
            os.kill(int(min(pids)), 40)
            p.wait_for("starting another now")
            p.wait_for("is ready")
            assert get(port)


@pytest.fixture(scope="class")
def restarted(folder):
    """Two workers, four SIGHUPs under load, and what a test may want to know of it."""
    options = ("--app-dir", folder, "--port", 0, "--workers", 2, "--no-access-log")
    with Hurried("busy:app", *options) as p:
        port, p.first = both_ready(p)
        fds = f"/proc/{p.process.pid}/fd"
        p.fds = len(os.listdir(fds)) if HAS_PROC else 0
        with Load(port) as p.load:
            p.load.goes_on()
            for n in range(1, 5):
                p.process.send_signal(signal.SIGHUP)
                wait_for_count(p, r"exited with code 0", 2 * n)
            p.load.goes_on()
        p.fds_after = len(os.listdir(fds)) if HAS_PROC else 0
        status = subprocess.run(["ps", "-eo", "ppid,stat"], capture_output=True).stdout
        rows = [line.split() for line in status.decode().splitlines()]
        p.zombies = [row for row in rows if row[0] == str(p.process.pid) and "Z" in row[1]]
        p.interrupt()
        p.code = p.exit_code()
        yield p


@POSIX_ONLY
class TestHangup:
    """behaviour.md §6: SIGHUP replaces one by one, and no request fails under load."""

    def test_no_request_fails(self, restarted):
        assert restarted.load.failed == [] and len(restarted.load.pids) > 100

    def test_each_is_replaced_and_the_new_one_is_ready_first(self, restarted):
        pids = re.findall(r"worker \[(\d+)\] is ready", restarted.output)
        assert len(set(pids)) == 10 and set(restarted.load.pids) <= set(pids)
        ready = exited = 0
        for line in restarted.lines:
            ready += "is ready after" in line
            exited += "exited with code 0" in line
            if "SIGINT" in line:
                break
            assert ready < 2 or ready - exited >= 2, restarted.output

    def test_it_is_told_once_and_nothing_is_wrong(self, restarted):
        assert restarted.output.count("SIGHUP: replacing workers") == 4
        assert restarted.output.count("listening on") == 1
        assert not re.search("ERROR|WARNING|Traceback", restarted.output)
        assert restarted.output.count("the lifespan ends") == 10

    def test_no_descriptor_zombie_or_orphan_is_left(self, restarted):
        assert restarted.fds_after == restarted.fds
        assert restarted.zombies == [] and restarted.code == 0
        nobody_is_left(restarted)

    def test_broken_code_keeps_the_old_workers(self, start, tmp_path):
        (tmp_path / "busy.py").write_text(APP)
        with start(folder=tmp_path) as p:
            port, pids = both_ready(p)
            (tmp_path / "busy.py").write_text(APP + "no_such_name\n")
            p.process.send_signal(signal.SIGHUP)
            p.wait_for("before it was ready; keeping the old workers")
            assert {get(port) for _ in range(20)} <= pids
            (tmp_path / "busy.py").write_text(APP + "# mended\n")
            p.process.send_signal(signal.SIGHUP)
            wait_for_count(p, r"exited with code 0", 2)
            assert get(port) not in pids
            assert p.output.count("Traceback") == 1


class TestSignals:
    """behaviour.md §6, with two workers: what Ctrl-C and SIGTERM do."""

    @pytest.mark.parametrize("number, _", SIGNALS)
    def test_requests_in_flight_are_finished_in_every_worker(self, start, number, _):
        with start("--timeout-graceful-shutdown", 3600) as p:
            port, pids = both_ready(p)
            clients = in_each(p, port, pids, "wait_for_body")
            p.process.send_signal(number)
            p.wait_for("stopping")
            until(lambda: refuses(("127.0.0.1", port)))  # while they go on
            for client in clients:
                with client:
                    client.send(b"k")
                    assert client.response()[2].decode() in pids
                    assert client.read_all() == b""
            assert p.exit_code() == 0
        assert set(re.findall(r"the lifespan ends (\d+)", p.output)) == pids
        assert p.output.count("exited with code 0") == 2
        assert not re.search("ERROR|WARNING|Traceback", p.output)

    @pytest.mark.parametrize("number, code", SIGNALS)
    def test_a_second_signal_ends_at_once(self, start, number, code):
        with start("--timeout-graceful-shutdown", 3600) as p:
            port, pids = both_ready(p)
            clients = in_each(p, port, pids, "wait_forever")
            p.process.send_signal(number)
            p.wait_for("stopping")
            p.process.send_signal(number)
            assert p.exit_code() == code
            for client in clients:
                client.sock.close()
        assert "again: ending at once" in p.output
        assert "the lifespan ends" not in p.output

    def test_a_start_that_hangs_can_be_stopped(self, start):
        with start("--timeout-graceful-shutdown", 0, app="stuck:app") as p:
            p.wait_for("importing")
            p.interrupt()
            assert p.exit_code() == 0
        assert "Traceback" not in p.output

    @POSIX_ONLY
    def test_ctrl_c_in_a_terminal_reaches_all_and_stops_gracefully(self, start):
        """The terminal sends it to the whole process group."""
        with start(start_new_session=True) as p:
            port, pids = both_ready(p)
            clients = in_each(p, port, pids, "wait_for_body")
            os.killpg(p.process.pid, signal.SIGINT)
            p.wait_for("stopping")
            for client in clients:
                with client:
                    client.send(b"k")
                    assert client.response()[0] == 200
            assert p.exit_code() == 0
        assert set(re.findall(r"the lifespan ends (\d+)", p.output)) == pids
        assert not re.search("KeyboardInterrupt|Traceback|WARNING", p.output)

    @POSIX_ONLY
    def test_a_worker_alone_ignores_what_is_for_its_supervisor(self, start):
        with start() as p:
            port, pids = both_ready(p)
            for pid in map(int, pids):
                os.kill(pid, signal.SIGINT)
                os.kill(pid, signal.SIGHUP)
            until(lambda: {get(port) for _ in range(20)} == pids)
            p.interrupt()
            assert p.exit_code() == 0
        assert "another" not in p.output and p.output.count("the lifespan ends") == 2

    @POSIX_ONLY
    def test_ctrl_c_while_workers_start_is_no_traceback(self, start):
        """At whatever moment: these are 60 ms apart, because nothing is waited for."""
        for number in range(4):
            with start("--workers", 3, start_new_session=True) as p:
                p.wait_for("loop: ")
                time.sleep(0.03 + 0.06 * number)
                os.killpg(p.process.pid, signal.SIGINT)
                assert p.exit_code() == 0, p.output
            assert not re.search("KeyboardInterrupt|Traceback", p.output), p.output

    @pytest.mark.skipif(os.name != "nt", reason="Ctrl-Break exists on Windows only")
    def test_ctrl_break_while_workers_start_is_code_0(self, start):
        for number in range(3):
            with start() as p:
                p.wait_for("loop: ")
                time.sleep(0.2 + 0.3 * number)
                p.interrupt()
                assert p.exit_code() == 0, p.output
            assert "Traceback" not in p.output


class TestTheDeathOfTheParent:
    """behaviour.md §6: kill -9 of the parent, and every worker is gone within a second."""

    @pytest.mark.parametrize("what", ["wait_forever", "block", ""])
    def test_no_worker_survives_it(self, start, what):
        with start("--timeout-graceful-shutdown", 3600) as p:
            port, pids = both_ready(p)
            clients = in_each(p, port, pids, what) if what else []
            p.process.kill()
            nobody_is_left(p)
            until(lambda: refuses(("127.0.0.1", port)))  # closed after the output
            for client in clients:
                client.sock.close()

    def test_nor_one_that_starts(self, start):
        with start(app="stuck:app") as p:
            p.wait_for("importing")
            p.process.kill()
            nobody_is_left(p)


def nobody_is_left(p, seconds=4) -> None:
    """Wait until no process of them all holds the other end of their output. A second
    is promised; a busy machine may need more."""
    p.reader.join(seconds)
    assert not p.reader.is_alive()
