"""workers.py: the supervisor alone, with plain functions for workers, and then
`python server.py --workers 2` as a user runs, kills, stops and restarts it."""

import concurrent.futures
import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from conftest import GET, PATIENCE, POSIX_ONLY, ROOT, Client, Process, environment
from conftest import fetch, refuses
from worker_targets import die_after_ready, follow, go_mute, ignore, obey, puppet

import server
import workers
from workers import State

HAS_PROC = os.name != "nt" and os.path.isdir("/proc/self/fd")  # Wine shows that of Linux
INTERRUPT = signal.CTRL_BREAK_EVENT if os.name == "nt" else signal.SIGINT
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # what ends a process on Windows
# Signals, and whether the whole process group gets them.
SIGNALS = [(INTERRUPT, False), pytest.param(signal.SIGTERM, False, marks=POSIX_ONLY)]
CTRL_C_IN_A_TERMINAL = pytest.param(signal.SIGINT, True, marks=POSIX_ONLY)


def eventually(condition, seconds=PATIENCE):
    """Ask again and again; return the first answer that is true."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)
    return answer


# ── The supervisor alone. ──


class Driven(workers.Supervisor):
    """A supervisor whose loop is turned by a test, in the test's own thread."""

    def until(self, condition) -> None:
        eventually(lambda: self.turn() or condition())

    def until_ready(self) -> set[int]:
        """Until all are ready, and the old ones are gone; their pids."""
        self.until(lambda: [w.state for w in self.workers] == [State.READY] * self.count)
        return {w.process.pid for w in self.workers}


@pytest.fixture
def no_main(monkeypatch):
    """A spawned process imports our __main__. Here that is pytest, which is slow."""
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__spec__", None)
    monkeypatch.delattr(main, "__file__", raising=False)


@pytest.fixture
def supervise(monkeypatch, no_main, log):
    """Makes supervisors that look often, and ends what is left of them."""
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


@pytest.fixture
def switch(tmp_path):
    """A file that says to `follow` whether it is good or bad."""
    (tmp_path / "switch").write_text("good")
    return tmp_path / "switch"


def messages(log, words) -> list[str]:
    """The log lines with these words."""
    return [line for line in log.text.splitlines() if re.search(words, line)]


# For a worker that says a word, or dies, in each state: its state afterwards, or None if it
# is gone; and the exit code of the supervisor.
TABLE = [
    (State.STARTING, "alive", State.STARTING, None), (State.STARTING, "ready", State.READY, None),
    (State.STARTING, "broken", State.READY, None), (State.STARTING, "die", None, 3),
    (State.READY, "alive", State.READY, None), (State.READY, "die", None, None),
    (State.OUTDATED, "alive", State.OUTDATED, None), (State.OUTDATED, "die", None, None),
    (State.LEAVING, "die", None, None),
]  # fmt: skip


class TestTheStateMachine:
    """The words, and a death, that a state may meet: the picture of State as a table."""

    @pytest.mark.parametrize("state, word, then, code", TABLE)
    def test_a_word_or_a_death_means_what_the_table_says(
        self, supervise, state, word, then, code
    ):
        s = supervise(puppet)
        s.replace_and_spawn()
        [worker] = s.workers
        worker.state, worker.steps, heard = state, [], worker.heard
        worker.pipe.send(word)
        look = lambda: s.listen() or s.look_after_workers()  # noqa: E731
        eventually(lambda: look() or worker.heard > heard or worker not in s.workers)
        assert (worker.state if worker in s.workers else None, s.exit_code) == (then, code)

    def test_an_import_may_be_silent_but_not_a_worker_that_is_ready(self, supervise, log):
        """A slow import is no blocked loop (uvicorn #2506)."""
        s = supervise(puppet, silence_limit=0.1)
        s.replace_and_spawn()
        [worker] = s.workers
        s.until(lambda: worker.age() > 0.3)
        assert worker.state is State.STARTING
        worker.pipe.send("ready")
        s.until(lambda: worker not in s.workers)
        assert len(messages(log, "the event loop is blocked; replacing it")) == 1

    @POSIX_ONLY
    def test_a_worker_is_deaf_to_ctrl_c_from_its_birth_on(self):
        """Before the first worker of a process multiprocessing starts a helper, and then
        unblocks SIGINT. We hear SIGINT again afterwards."""
        text = f"""if True:
            import signal, sys
            sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}
            import worker_targets, workers
            said = workers.Worker(worker_targets.tell_mask, ()).pipe.recv()
            print(said, signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"""
        done = subprocess.run([sys.executable, "-c", text], capture_output=True)
        assert done.stdout.decode().strip() == "(True, False) False", done


class TestDeaths:
    """Each death is one line: pid, how, after how long, and what happens now."""

    @pytest.mark.parametrize(
        "code, words",
        [(0, "exited with code 0"), (-int(KILL), f"was ended by {KILL.name}")]
        + [(0xC000013A, "exited with code 0xc000013a")]  # of Ctrl-C on Windows
        + [pytest.param(-40, "was ended by", marks=POSIX_ONLY)],  # real-time, without a name
    )
    def test_a_fate_is_told_in_words(self, code, words):
        assert workers.describe_exit(code).startswith(words)

    def test_after_deaths_in_a_row_the_delay_grows_and_is_kept(self, supervise, log):
        """gunicorn starts workers as fast as it can. Here the delay doubles."""
        s = supervise(die_after_ready)
        while s.deaths < 8:
            s.not_before = 0.0  # the test has no time to wait
            s.turn()
        delays = [line.split("another ")[1] for line in messages(log, "another")]
        assert delays == ["now", *(f"in {n} s" for n in (1, 2, 4, 8, 16, 30, 30))]
        assert s.not_before > time.monotonic() + 20
        s.not_before = later = time.monotonic() + 0.3
        s.until(lambda: s.workers)
        assert time.monotonic() >= later

    def test_a_long_life_or_a_restart_ends_the_series(self, supervise, monkeypatch, log):
        s = supervise(die_after_ready)
        s.until(lambda: s.deaths == 2)
        s.restart("SIGHUP")
        assert (s.deaths, s.not_before) == (0, 0.0)
        monkeypatch.setattr(workers, "STABLE", 0.0)
        log.clear()
        s.until(lambda: len(messages(log, "starting another now")) == 3)
        assert s.deaths == 0 and not messages(log, "another in")

    def test_the_last_word_of_a_worker_is_heard(self, supervise):
        """What if it says "ready", and dies before the next look at its pipe?"""
        s = supervise(die_after_ready)
        s.replace_and_spawn()
        s.workers[0].process.join(PATIENCE)
        s.look_after_workers()
        assert (s.exit_code, s.deaths) == (None, 1)

    def test_a_pipe_that_ends_before_its_process_does_not_hide_the_others(self, supervise):
        s = supervise(go_mute)
        s.until(lambda: s.workers[0].pipe.closed)
        s.workers.append(workers.Worker(obey, ()))
        s.until(lambda: s.workers[1].state is State.READY)

    def test_with_a_watcher_a_death_before_ready_waits_for_a_change(self, supervise, switch, log):
        switch.write_text("bad")
        s = supervise(follow, switch, should_restart=lambda: "")
        s.until(lambda: messages(log, "before it was ready; waiting for a file to change"))
        s.turn()
        assert not s.workers

    def test_a_restart_onto_what_cannot_start_keeps_the_old(self, supervise, switch, log):
        s = supervise(follow, switch, count=2)
        old = s.until_ready()
        switch.write_text("bad")
        s.restart("SIGHUP")
        s.until(lambda: messages(log, "before it was ready; keeping the old workers"))
        s.turn()
        assert s.until_ready() == old
        assert len(messages(log, "before it was ready")) == 1  # there is no second attempt

    def test_what_cannot_start_leaves_alone_what_serves(self, supervise, switch, log):
        s = supervise(follow, switch, count=2)
        victim, survivor = s.until_ready() and s.workers
        switch.write_text("bad")
        victim.process.kill()
        s.until(lambda: messages(log, "before it was ready; starting another in"))
        assert s.workers == [survivor] and s.exit_code is None
        switch.write_text("good")
        s.not_before = 0.0
        assert len(s.until_ready()) == 2 and survivor in s.workers


class TestStopping:
    """Close the pipe, wait the grace, terminate, wait, kill."""

    @POSIX_ONLY
    @pytest.mark.parametrize(
        "sigterm, steps, end",
        [(signal.SIG_DFL, ["terminate"], "SIGTERM")]
        + [(signal.SIG_IGN, ["terminate", "kill"], "SIGKILL")],
    )
    def test_a_worker_that_stays_is_ended(self, supervise, monkeypatch, log, sigterm, steps, end):
        monkeypatch.setattr(workers, "TERMINATED", 0.2)
        s = supervise(ignore, sigterm, grace=0.05)
        s.until_ready()
        s.stop(0)
        s.workers[0].stop(3600)  # a second stop does not begin again
        s.until(lambda: not s.workers)
        taken = [line.split(": ")[-1] for line in messages(log, "has not left in time")]
        assert taken == steps and messages(log, f"was ended by {end}")

    def test_no_worker_starts_any_more_and_run_gives_the_signals_back(self, supervise):
        s = supervise(obey, should_restart=lambda: "changed: app.py")
        s.stop(0)
        for _ in range(2):
            s.turn()
        before = signal.getsignal(signal.SIGINT)
        assert not s.workers and s.run() == 0
        assert signal.getsignal(signal.SIGINT) is before
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # a thread has no signals
            assert pool.submit(s.run).result() == 0

    @POSIX_ONLY
    @pytest.mark.parametrize("gone, code", [(True, 0), (False, None)])
    def test_a_hangup_is_a_restart_unless_the_terminal_is_gone(self, supervise, gone, code, log):
        """The kernel sends SIGHUP, too, if a terminal's window is closed."""
        s = supervise(obey)
        s.on_terminal ^= gone
        s.signals.add(signal.SIGHUP)
        s.act_on_signals()
        assert (s.exit_code, bool(messages(log, "replacing workers"))) == (code, not gone)

    def test_a_word_is_no_error_if_the_pipe_is_closed(self):
        ours, theirs = workers.spawn.Pipe()
        for pipe in (ours, theirs):
            pipe.close()
            workers.Lifeline(theirs).say("alive")

    @POSIX_ONLY
    def test_a_supervisor_that_reads_nothing_does_not_block_the_loop(self):
        """What if it is stopped by SIGSTOP for an hour?"""
        ours, theirs = workers.spawn.Pipe()
        say = workers.Lifeline(theirs).say
        hour = lambda: [say("alive") for _ in range(4 * 3600)]  # noqa: E731
        thread = threading.Thread(target=hour, daemon=True)
        thread.start()
        thread.join(5)
        blocked = thread.is_alive()
        ours.close()
        theirs.close()
        assert not blocked


# ── The whole program. ──

APP = """
import asyncio, gc, os, socket, subprocess, sys, time

VERSION = "v1"


def say(words):
    os.write(1, f"{words} {os.getpid()}\\n".encode())  # in one piece

say("importing")

async def pid(receive):
    while (await receive()).get("more_body"):
        pass
    return str(os.getpid())

async def wait_for_body(receive):
    say("in progress")
    return await pid(receive)

async def wait_forever(receive):
    say("in progress")
    try:
        await asyncio.Event().wait()
    finally:
        say("the request was ended")

async def count(receive):
    return f"{len(os.listdir('/dev/fd'))} descriptors, {len(asyncio.all_tasks())} tasks"

async def block(receive):
    say("in progress")
    while True:  # not one long sleep: Windows could not interrupt it
        time.sleep(0.02)

async def home(receive):
    import server
    sockets = [s for s in gc.get_objects() if isinstance(s, socket.socket) and s.fileno() > 0]
    listeners = [s for s in sockets if s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)]
    show = "import signal; print(signal.getsignal(2) is signal.SIG_IGN, end='')"
    ignored = subprocess.check_output([sys.executable, "-c", show], text=True)
    ours = isinstance(receive.__self__, server.Exchange)
    return f"{ours} {ignored} {[s.get_inheritable() for s in listeners]}"

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        say(f"the lifespan ends {VERSION}")
        return await send({"type": "lifespan.shutdown.complete"})
    fields = [(b"version", VERSION.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    while scope["path"] == "/stream":
        await send({"type": "http.response.body", "body": b"still", "more_body": True})
        await asyncio.sleep(0.02)
    text = await globals()[scope["path"][1:] or "pid"](receive)
    await send({"type": "http.response.body", "body": text.encode()})
"""
STARTUP = 'await send({"type": "lifespan.startup.complete"})'
FAILS = 'return await send({"type": "lifespan.startup.failed", "message": "no database"})'
APPS = {
    "busy": APP,
    "stuck": APP + "while True: time.sleep(0.02)\n",
    "name_error": APP + "no_such_name\n",
    "leaves": APP + "raise SystemExit('a reason')\n",
    "dies": APP + "os._exit(7)\n",
    "fails": APP.replace(STARTUP, FAILS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    for name, text in APPS.items():
        (folder / f"{name}.py").write_text(text)
    return folder


class Supervised(Process):
    """A process whose workers must not outlive a test, not even one that fails."""

    def __exit__(self, *_):
        # On Windows, a supervisor that is killed while it spawns may leave half a child,
        # which keeps our end of their output open. So it is asked first, and again.
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

    def count(self, pattern, count) -> list[str]:
        """Wait for that many matches, counted from the start of the process."""
        while len(found := re.findall(pattern, self.output)) < count:
            self.wait_for("")
        return found

    def all_ready(self, count=2) -> tuple[int, set[str]]:
        """The port, and the pids of the workers."""
        return self.port(), set(self.count(r"worker \[(\d+)\] is ready", count))

    def nobody_is_left(self) -> None:
        """Wait until no process of them all holds the other end of their output. One second
        is promised; a busy machine may need more."""
        self.reader.join(4)
        assert not self.reader.is_alive()


class Hurried(Supervised):
    """The same with a supervisor that looks more often."""

    script = ROOT / "tests" / "hurried.py"


@pytest.fixture
def start(folder):
    """Starts a supervisor and two workers."""

    def start(*options, app="busy:app", folder=folder, **process):
        number = () if "--reload" in options else ("--workers", 2)
        return Hurried(app, "--app-dir", folder, "--port", 0, *number, *options, **process)

    return start


def text_of(port, what="/") -> str:
    """One request on a connection of its own."""
    status, _, body = fetch(("127.0.0.1", port), what)
    assert status == 200
    return body.decode()


@contextlib.contextmanager
def in_each(p, port, pids, what):
    """In each of the workers a request of two bytes, of which one is missing."""
    with contextlib.ExitStack() as stack:
        clients: dict[str, Client] = {}
        while set(clients) != pids:
            client = stack.enter_context(Client(("127.0.0.1", port)))
            client.send(GET)
            pid = client.response()[2].decode()  # the worker of this connection
            if clients.setdefault(pid, client) is client:
                head = f"POST /{what} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
                client.send(head.encode() + b"o")
                p.wait_for(f"in progress {pid}")
        yield list(clients.values())


@contextlib.contextmanager
def load(port):
    """Four clients that never rest, with the pids that answer and what failed. Two make a
    connection for each request; two keep theirs, unless it was closed while idle."""
    found = types.SimpleNamespace(pids=[], failed=[])
    over = threading.Event()

    def run(keep):
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        while not over.is_set():
            kept, answer = client.sock is not None, None
            try:
                client.request("GET", "/")
                answer = client.getresponse()
                found.pids.append(answer.read().decode())
                assert answer.status == 200
            except (OSError, http.client.HTTPException, AssertionError) as exc:
                if not (kept and answer is None and isinstance(exc, ConnectionError)):
                    found.failed.append(repr(exc))
                client.close()
            if not keep:
                client.close()
        client.close()

    def go_on(enough=50):
        """Wait for some more answers."""
        enough += len(found.pids)
        eventually(lambda: len(found.pids) >= enough)

    found.go_on = go_on
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(run, n % 2) for n in range(4)]
        try:
            yield found
        finally:
            over.set()
            for future in running:
                future.result()


class TestServing:
    """One port, several processes; and what an app finds in a worker."""

    def test_many_connections_are_spread_over_two_workers(self, start):
        """uvicorn #683: of two workers, one died."""
        with start() as p, contextlib.ExitStack() as stack:
            port, pids = p.all_ready()
            clients = [stack.enter_context(p.connect(port)) for _ in range(64)]
            for client in clients:
                client.send(GET)
            answers = [client.response()[2].decode() for client in clients]
            assert set(answers) == pids and min(map(answers.count, pids)) >= 4
            # The address is told when it answers.
            assert re.search("(?s)importing.*is ready after.*listening on", p.output)

    @POSIX_ONLY
    def test_a_worker_is_a_good_home_for_an_app(self, start):
        """The app meets the classes of the server. Its subprocesses hear Ctrl-C: what is
        ignored stays so in a program (man 2 execve). They do not inherit the listener."""
        with start() as p:
            assert text_of(p.port(), "/home") == "True False [False]"

    @POSIX_ONLY
    @pytest.mark.parametrize("options", [["--reload"], []], ids=["reload", "workers"])
    @pytest.mark.parametrize("kind", ["pipe", "terminal"])
    def test_input_and_breakpoint_work_in_a_worker(self, start, tmp_path, options, kind):
        """multiprocessing closes the standard input of a worker."""
        asks = "a = input()\nbreakpoint()\nb = input()\nprint(a, b, flush=True)\n"
        (tmp_path / "asks.py").write_text(APP + asks)
        ours, theirs = os.pipe()[::-1] if kind == "pipe" else os.openpty()
        use = {"folder": tmp_path, "preexec_fn": lambda: os.dup2(theirs, 0)}
        with start(*options, app="asks:app", **use) as p:
            for n in range(2 - len(options)):
                p.count("importing", n + 1)
                for words, answer in ("one", "asks.py"), ("p 6*7\nc", "42"), ("two", "one two"):
                    os.write(ours, words.encode() + b"\n")
                    p.wait_for(answer)
            p.count("is ready after", 2 - len(options))
        os.close(ours)
        os.close(theirs)


class TestDeadBeforeReady:
    """Exit code 3, the error of the app once, no restart loop (uvicorn #1115, #2440)."""

    @pytest.mark.parametrize(
        "app, words, tracebacks",
        [
            ("name_error:app", "NameError: name .no_such_name. is not defined in .*, line", 1),
            ("leaves:app", 'cannot import "leaves": SystemExit: a reason in .*, line', 1),
            ("fails:app", "no database", 0), ("busy:ap", r'busy.py\) has no "ap"', 0),
            ("dies:app", "exited with code 7 after", 0),
            ("no_such_module:app", 'no module "no_such_module"', 0),
        ],
    )  # fmt: skip
    def test_what_cannot_start_is_tried_once(self, start, app, words, tracebacks):
        with start("--workers", 3, app=app) as p:
            assert p.exit_code() == 3
        assert len(re.findall(words, p.output)) == 1, p.output
        assert p.output.count("Traceback") == tracebacks
        assert p.output.count("importing") == (app != "no_such_module:app")
        assert len(re.findall(r"worker \[\d+\] .*ready; stopping", p.output)) == 1
        assert "listening on" not in p.output

    def test_an_app_without_a_name_cannot_be_shared(self, log):
        assert server.run(len, workers=2, port=0) == 3
        assert messages(log, "pass its MODULE:ATTRIBUTE")

    def test_a_script_without_a_guard_is_told_so(self, folder, tmp_path):
        """uvicorn #949, #1045: a worker imports the script, which starts workers."""
        run = f'server.run("leaves:app", app_dir={str(folder)!r}, port=0, workers=2)'
        text = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport server\n{run}"
        (tmp_path / "script.py").write_text(text)
        how = {"capture_output": True, "text": True, "timeout": PATIENCE, "env": environment()}
        done = subprocess.run([sys.executable, tmp_path / "script.py"], **how)
        assert done.stderr.count('if __name__ == "__main__":') == 1, done.stderr
        assert len(set(re.findall(r"worker \[(\d+)\]", done.stderr))) == 1


class TestSupervision:
    """A worker that dies or hangs is replaced; SIGHUP replaces all."""

    @pytest.mark.parametrize(
        "number, name", [(KILL, "SIGKILL")] + [(40, "signal 40")] * (sys.platform == "linux")
    )
    def test_a_worker_that_is_killed_is_replaced_under_load(self, start, number, name):
        """Only the requests inside of it are lost. Signal 40 has no name."""
        with start() as p:
            port, pids = p.all_ready()
            with load(port) as clients:
                clients.go_on()
                victim = min(pids)
                os.kill(int(victim), number)
                line = p.wait_for(rf"\[{victim}\] .* after \d+\.\d s; starting another now")
                assert os.name == "nt" or f"was ended by {name}" in line[0]
                new = p.wait_for(r"worker \[(\d+)\] is ready")[1]
                eventually(lambda: new in clients.pids)
                after = len(clients.pids)
                clients.go_on()
            assert len(clients.failed) <= 4  # one request of each client
            assert victim not in clients.pids[after:]

    def test_a_worker_whose_loop_is_blocked_is_replaced_if_asked(self, start):
        """The other worker says "alive"."""
        with start("--timeout-worker-healthcheck", 1) as p:
            port, pids = p.all_ready()
            with p.connect(port) as client:
                client.send(b"GET /block HTTP/1.1\r\nHost: x\r\n\r\n")
                victim = p.wait_for(r"in progress (\d+)")[1]
                assert text_of(port) in pids - {victim}  # the other one goes on
                p.wait_for(rf"ERROR.*\[{victim}\]: the event loop is blocked; replacing it")
                new = p.wait_for(r"worker \[(\d+)\] is ready")[1]
                eventually(lambda: {text_of(port) for _ in range(9)} == pids - {victim} | {new})
            assert p.output.count("is blocked") == 1 and p.output.count("importing") == 3

    @pytest.mark.parametrize(
        "mode, cause, count",
        [pytest.param("--workers", "SIGHUP", 2, marks=POSIX_ONLY)]
        + [("--reload", "changed: .*busy.py", 1)],
    )
    def test_five_restarts_under_load_lose_and_leave_nothing(
        self, start, tmp_path, mode, cause, count
    ):
        """Neither a request, nor a descriptor, nor a process."""
        (tmp_path / "busy.py").write_text(APP)
        options = () if mode == "--workers" else (mode, "--reload-delay", 0.05)
        with start("--no-access-log", *options, folder=tmp_path) as p:
            port, _ = p.all_ready(count)
            proc = Path(f"/proc/{p.process.pid}")
            before = len(os.listdir(proc / "fd")) if HAS_PROC else 0
            with load(port) as clients:
                clients.go_on()
                for n in range(1, 6):
                    (tmp_path / "busy.py").write_text(APP + "#" * n)
                    p.process.send_signal(signal.SIGHUP) if cause == "SIGHUP" else None
                    p.count("exited with code 0", count * n)
                clients.go_on()
            if HAS_PROC:  # the children: workers, a helper of multiprocessing, no zombie
                assert len(os.listdir(proc / "fd")) == before
                children = proc / "task" / str(p.process.pid) / "children"
                assert len(children.read_text().split()) == count + 1
            p.interrupt()
            assert p.exit_code() == 0
            p.nobody_is_left()
        assert clients.failed == [] and len(clients.pids) > 100
        assert len(set(re.findall(r"worker \[(\d+)\] is ready", p.output))) == 6 * count
        # The new one is ready before the old one leaves.
        events = re.findall("is ready after|exited with code 0|stopping", p.output)
        for n in range(count, events.index("stopping")):
            assert 2 * events[: n + 1].count("is ready after") - (n + 1) >= count
        assert len(re.findall(f"{cause}: replacing workers", p.output)) == 5
        assert p.output.count("listening on") == 1
        assert p.output.count("lifespan ends") == 6 * count
        assert not re.search("ERROR|WARNING|Traceback", p.output)


class TestTheEnd:
    """With two workers: what Ctrl-C, SIGTERM and kill -9 do."""

    @pytest.mark.parametrize("number, to_all", [*SIGNALS, CTRL_C_IN_A_TERMINAL])
    def test_requests_in_progress_are_finished_in_every_worker(self, start, number, to_all):
        """A terminal sends Ctrl-C to the whole process group."""
        with start("--timeout-graceful-shutdown", 3600, start_new_session=to_all) as p:
            port, pids = p.all_ready()
            with in_each(p, port, pids, "wait_for_body") as clients:
                os.killpg(p.process.pid, number) if to_all else p.process.send_signal(number)
                p.wait_for("stopping; workers have 7205 s to finish")
                eventually(lambda: refuses(("127.0.0.1", port)))  # while they go on
                for client in clients:
                    client.send(b"k")
                    assert client.response()[2].decode() in pids
                    assert client.read_all() == b""
            assert p.exit_code() == 0
        assert set(re.findall(r"the lifespan ends v1 (\d+)", p.output)) == pids
        assert p.output.count("exited with code 0") == 2 and p.lines[-1].endswith(" stopped")
        assert not re.search("ERROR|WARNING|Traceback|KeyboardInterrupt", p.output)

    @pytest.mark.parametrize("number, _", SIGNALS)
    def test_a_second_signal_ends_at_once(self, start, number, _):
        with start("--timeout-graceful-shutdown", 3600) as p:
            with in_each(p, *p.all_ready(), "wait_forever"):
                p.process.send_signal(number)
                p.wait_for("stopping")
                p.process.send_signal(number)
                assert p.exit_code() == 128 + (21 if os.name == "nt" else number)  # SIGBREAK
        assert "again: ending at once" in p.output
        assert "the lifespan ends" not in p.output

    @POSIX_ONLY
    def test_a_worker_alone_ignores_what_is_for_its_supervisor(self, start):
        with start() as p:
            port, pids = p.all_ready()
            for pid in map(int, pids):
                os.kill(pid, signal.SIGINT)
                os.kill(pid, signal.SIGHUP)
            eventually(lambda: {text_of(port) for _ in range(20)} == pids)
            p.interrupt()
            assert p.exit_code() == 0
        assert "another" not in p.output and p.output.count("the lifespan ends") == 2

    @pytest.mark.parametrize("moment", [0.03, 0.09, 0.15, 0.21, "importing"])
    def test_ctrl_c_while_workers_start_is_no_traceback(self, start, moment):
        """At any moment: nothing is waited for but the time. And in an import that hangs."""
        app = "stuck:app" if moment == "importing" else "busy:app"
        with start("--workers", 3, app=app, start_new_session=True) as p:
            p.wait_for("importing" if moment == "importing" else "loop: ")
            if moment != "importing":
                time.sleep(moment * (4 if os.name == "nt" else 1))
            p.interrupt() if os.name == "nt" else os.killpg(p.process.pid, signal.SIGINT)
            assert p.exit_code() == 0, p.output
        assert not re.search("KeyboardInterrupt|Traceback", p.output), p.output

    @pytest.mark.parametrize("what", ["wait_forever", "block", "", "importing"])
    def test_no_worker_survives_the_death_of_its_parent(self, start, what):
        app = "stuck:app" if what == "importing" else "busy:app"
        with start("--timeout-graceful-shutdown", 3600, app=app) as p:
            port, pids = (0, set()) if what == "importing" else p.all_ready()
            p.wait_for(what) if what == "importing" else None
            with in_each(p, port, pids if what else set(), what):
                p.process.kill()
                p.nobody_is_left()
            eventually(lambda: refuses(("127.0.0.1", port)))  # the port is closed after the output
