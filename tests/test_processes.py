"""One process, as a user runs and stops it: real signals, real exit codes.

Ctrl-C here is SIGINT, and on Windows Ctrl-Break (conftest, `interrupt`).
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile

import pytest
from conftest import GET, PATIENCE, Client, Process

import sockets

POSIX_ONLY = pytest.mark.skipif(os.name == "nt", reason="Windows has no such thing")
INTERRUPT = signal.CTRL_BREAK_EVENT if os.name == "nt" else signal.SIGINT
INTERRUPTED = 128 + (signal.SIGBREAK if os.name == "nt" else signal.SIGINT)
SIGNALS = [
    pytest.param(INTERRUPT, INTERRUPTED, id="Ctrl-C"),
    pytest.param(signal.SIGTERM, 128 + 15, id="SIGTERM", marks=POSIX_ONLY),
]

APP = """
import asyncio, multiprocessing, threading, time

def say(words):
    print(words, flush=True)

def never_end():
    while True:  # not one long sleep: Windows could not interrupt it
        time.sleep(0.02)

async def wait_for_body(receive):
    say("in flight")
    while (await receive()).get("more_body"):
        pass

async def wait_for_disconnect(receive):
    say("in flight")
    while (await receive())["type"] != "http.disconnect":
        pass
    say("told to end")

async def wait_forever(receive):
    say("in flight")
    try:
        await asyncio.Event().wait()
    finally:
        say("the request was ended")

async def ignore_cancel(receive):
    say("in flight")
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            say("no")

async def block(receive):
    say("in flight")
    never_end()

async def thread(receive):
    threading.Thread(target=never_end, name="my thread").start()
    say("in flight")

async def executor(receive):
    asyncio.get_running_loop().run_in_executor(None, never_end)
    say("in flight")

async def fork(receive):
    context = multiprocessing.get_context("fork")
    context.Process(target=time.sleep, args=(30,), daemon=True).start()

async def nothing(receive):
    pass

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        say("the lifespan ends")
        return await send({"type": "lifespan.shutdown.complete"})
    await globals()[scope["path"][1:] or "nothing"](receive)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})
    say("answered")
"""
# What a process is given for its last steps, in a tenth of the time.
HURRIED = APP + """
import server

def leave_soon(seconds, code, leave_within=server.leave_within):
    say(f"leaving within {seconds:g} s")
    return leave_within(seconds / 10, code)

server.leave_within = leave_soon
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (folder / "busy.py").write_text(APP)
    (folder / "hurried.py").write_text(HURRIED)
    (folder / "slow.py").write_text(APP + "say('importing')\nnever_end()\n")
    hanging = "async def app(scope, receive, send):\n    await wait_forever(receive)\n"
    (folder / "hanging.py").write_text(APP + hanging)
    return folder


@pytest.fixture
def start(folder):
    """Start a process with one of our apps."""

    def start(*options, app="busy:app", **process):
        address = () if {"--uds", "--fd"} & set(options) else ("--port", 0)
        return Process(app, "--app-dir", folder, *address, *options, **process)

    return start


@pytest.fixture
def path():
    """For a Unix socket: pytest's own folders are too long for macOS' 104 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield folder + "/s"


def ask(client, what, body=b"") -> None:
    """A request for one of the app's functions; its body is two bytes long."""
    client.send(f"POST /{what} HTTP/1.1\r\nHost: x\r\n".encode())
    client.send(b"Content-Length: 2\r\n\r\n" + body)


def answers(address) -> bool:
    with Client(address) as client:
        client.send(GET)
        return client.response()[2] == b"done"


def refuses(address) -> bool:
    """Is nobody there?"""
    family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    with socket.socket(family) as client:
        client.settimeout(PATIENCE)
        return client.connect_ex(address) != 0


def assert_order(output, *words) -> None:
    """Each of the words is there, one after the other."""
    assert re.search(".*".join(map(re.escape, words)), output, re.DOTALL), output


class TestTheFirstSignal:
    """behaviour.md §6: stop accepting, finish requests, then the lifespan; code 0."""

    @pytest.mark.parametrize("number, _", SIGNALS)
    def test_a_request_in_flight_is_finished_before_the_end(self, start, number, _):
        patience = ("--timeout-graceful-shutdown", 3600, "--timeout-keep-alive", 3600)
        with start(*patience) as p:
            port = p.port()
            with p.connect(port) as client, p.connect(port) as idle:
                idle.send(GET)
                assert idle.response()[0] == 200  # a keep-alive connection now
                ask(client, "wait_for_body", b"o")
                p.wait_for("in flight")
                p.process.send_signal(number)
                assert idle.read_all() == b"" and refuses(("127.0.0.1", port))
                client.send(b"k")
                assert client.response()[2] == b"done"
                assert client.read_all() == b""
            assert p.exit_code() == 0
        assert_order(p.output, "in flight", "stopping", "answered")
        assert_order(p.output, "answered", "the lifespan ends", "stopped")

    @pytest.mark.parametrize("number, _", SIGNALS)
    def test_an_idle_server_ends_at_once(self, start, number, _):
        with start() as p:
            p.port()
            p.process.send_signal(number)
            assert p.exit_code() == 0
        assert_order(p.output, "stopping", "the lifespan ends", "stopped")
        assert "Traceback" not in p.output

    @pytest.mark.parametrize("number, _", SIGNALS)
    @pytest.mark.parametrize(
        "app, words",
        [
            pytest.param("slow:app", "importing", id="import"),
            pytest.param("hanging:app", "in flight", id="startup"),
        ],
    )
    def test_a_start_that_hangs_can_be_stopped(self, start, number, _, app, words):
        """What if the app never gets as far as to serve?"""
        with start(app=app) as p:
            p.wait_for(words)
            p.process.send_signal(number)
            assert p.exit_code() == 0
        assert "listening" not in p.output and "Traceback" not in p.output


class TestTheSecondSignal:
    """behaviour.md §6: a second signal ends at once; §1: the exit code is 128+n."""

    @pytest.mark.parametrize("number, code", SIGNALS)
    def test_it_does_not_wait_for_requests(self, start, number, code):
        with start("--timeout-graceful-shutdown", 3600) as p:
            with p.connect(p.port()) as client:
                ask(client, "wait_forever")
                p.wait_for("in flight")
                p.process.send_signal(number)
                p.wait_for("stopping")
                p.process.send_signal(number)
                assert p.exit_code() == code
        assert "the lifespan ends" not in p.output

    @pytest.mark.parametrize("number, code", SIGNALS)
    def test_it_does_not_wait_for_a_loop_that_is_blocked(self, start, number, code):
        """Nothing shows that the first has arrived, and two that are one moment apart
        may count as one: send until it ends."""
        with start() as p, p.connect(p.port()) as client:
            ask(client, "block")
            p.wait_for("in flight")
            for _ in range(int(PATIENCE / 0.1)):
                p.process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    p.process.wait(0.1)
            assert p.exit_code() == code


class TestTheGrace:
    """behaviour.md §6: the grace is finite; the log says which phase it is in."""

    def test_half_way_a_request_is_told_to_end_and_may_still_answer(self, start):
        with start("--timeout-graceful-shutdown", 1) as p:
            with p.connect(p.port()) as client:
                ask(client, "wait_for_disconnect", b"ok")
                p.wait_for("in flight")
                p.interrupt()
                assert client.response()[2] == b"done"
            assert p.exit_code() == 0
        assert_order(p.output, "stopping", "still running", "told to end", "answered")
        assert "cancel" not in p.output

    def test_at_its_end_a_request_is_cancelled(self, start):
        with start("--timeout-graceful-shutdown", 0.3) as p:
            with p.connect(p.port()) as client:
                ask(client, "wait_forever", b"ok")
                p.wait_for("in flight")
                p.interrupt()
                assert p.exit_code() == 0
        assert_order(p.output, "stopping", "still running", "cancel")
        assert_order(p.output, "the request was ended", "the lifespan ends", "stopped")

    def test_what_never_ends_does_not_keep_the_process(self, start):
        """What if a thread, or a task that swallows its cancellation, runs for ever? A
        process is given five seconds then, which here are a tenth of that."""
        kinds = ["thread", "executor", "ignore_cancel"]
        with contextlib.ExitStack() as stack:
            running = []
            for kind in kinds:
                options = ("--timeout-graceful-shutdown", 0.2)
                p = stack.enter_context(start(*options, app="hurried:app"))
                running.append(p)
                client = stack.enter_context(p.connect(p.port()))
                ask(client, kind, b"ok")
                p.wait_for("in flight")
                p.interrupt()
            for p in running:
                assert p.exit_code() == 0
                assert "the lifespan ends" in p.output
                assert "leaving within 5 s" in p.output
                assert "leaving although" in p.output
        assert "my thread" in running[0].output


class TestAddresses:
    """behaviour.md §2, by the whole program: what is printed is what answers (bugs.md
    5, uvicorn #974)."""

    @pytest.mark.parametrize(
        "host, shown",
        [
            ("127.0.0.1", r"127\.0\.0\.1"),
            ("::1", r"\[::1\]"),
            ("localhost", r"(?:127\.0\.0\.1|\[::1\])"),
            ("", r"(?:0\.0\.0\.0|\[::\])"),
        ],
    )
    def test_every_address_of_a_host_answers_on_one_port(self, start, host, shown):
        try:
            listeners = sockets.bind_tcp(host, 0, 1)
        except OSError as exc:
            pytest.skip(f"{host}: {exc}")
        for listener in listeners:
            listener.close()
        ports = set()
        with start("--host", host) as p:
            for listener in listeners:
                port = int(p.wait_for(rf"listening on http://{shown}:(\d+) ")[1])
                six = listener.family == socket.AF_INET6
                assert answers(("::1" if six else "127.0.0.1", port))
                ports.add(port)
            p.interrupt()
            assert p.exit_code() == 0
        assert len(ports) == 1 and p.output.count("listening on") == len(listeners)

    @POSIX_ONLY
    @pytest.mark.parametrize("kind", ["IPv4", "Unix"])
    def test_an_inherited_socket_is_adopted_and_shown(self, start, kind, path):
        given = socket.socket(socket.AF_UNIX if kind == "Unix" else socket.AF_INET)
        given.bind(path if kind == "Unix" else ("127.0.0.1", 0))
        address, fd = given.getsockname(), given.fileno()
        with given, start("--fd", fd, pass_fds=(fd,)) as p:
            shown = f"unix:{path}" if kind == "Unix" else "http://%s:%d" % address
            p.wait_for("listening on " + re.escape(shown) + " ")
            assert answers(address)
            p.interrupt()
            assert p.exit_code() == 0
        assert kind != "Unix" or os.path.exists(path)  # the file is not ours

    @POSIX_ONLY
    @pytest.mark.parametrize("pid", ["os.getpid()", "1"], ids=["for us", "not for us"])
    def test_systemd_passes_its_sockets_from_number_3_on(
        self, start, tmp_path, monkeypatch, pid
    ):
        """man 3 sd_listen_fds. A small systemd stands in for the interpreter."""
        [given] = sockets.bind_tcp("127.0.0.1", 0, 5)
        systemd = f"""#!{sys.executable} -S
import os, sys
os.dup2({given.fileno()}, 3)
os.environ.update(LISTEN_PID=str({pid}), LISTEN_FDS="1")
os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
"""
        (tmp_path / "systemd").write_text(systemd)
        (tmp_path / "systemd").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "systemd"))
        with given, start(pass_fds=(given.fileno(),)) as p:
            port = p.port()
            assert answers(("127.0.0.1", port))
            assert (port == given.getsockname()[1]) == (pid != "1")
            p.interrupt()
            assert p.exit_code() == 0


@POSIX_ONLY
class TestUnixSocket:
    """behaviour.md §2: on exit only our own inode is removed; and so on every exit."""

    def test_it_is_shown_answers_and_is_removed_at_the_end(self, start, path):
        with start("--uds", path) as p:
            p.wait_for("listening on " + re.escape(f"unix:{path} "))
            assert answers(path)
            p.interrupt()
            assert p.exit_code() == 0
        assert not os.path.lexists(path)

    def test_it_is_removed_at_a_forced_end(self, start, path):
        with start("--uds", path, "--timeout-graceful-shutdown", 3600) as p:
            p.wait_for("listening on")
            with Client(path) as client:
                ask(client, "wait_forever")
                p.wait_for("in flight")
                p.interrupt()
                p.wait_for("stopping")
                p.interrupt()
                assert p.exit_code() == INTERRUPTED
        assert not os.path.lexists(path)

    def test_it_is_removed_when_the_app_cannot_be_loaded(self, start, path):
        with start("--uds", path, app="no_such_module:app") as p:
            assert p.exit_code() == 3
        assert not os.path.lexists(path)

    def test_what_a_killed_server_left_is_replaced(self, start, path):
        with start("--uds", path) as p:
            p.wait_for("listening on")
            p.process.kill()
            p.exit_code()
        assert refuses(path) and os.path.lexists(path)
        with start("--uds", path) as p:
            p.wait_for("listening on")
            assert answers(path)

    def test_a_second_server_does_not_disturb_the_first(self, start, path):
        with start("--uds", path) as first:
            first.wait_for("listening on")
            with start("--uds", path) as second:
                assert second.exit_code() == 3
            assert answers(path)


class TestTheEnd:
    """What is left of a server that has stopped: nothing."""

    def test_it_stops_by_itself_after_its_last_request(self, start):
        """behaviour.md §1: --limit-max-requests, and exit code 0."""
        with start("--limit-max-requests", 2) as p:
            port = p.port()
            assert answers(("127.0.0.1", port)) and answers(("127.0.0.1", port))
            assert p.exit_code() == 0
            assert refuses(("127.0.0.1", port))
        assert_order(p.output, "--limit-max-requests", "the lifespan ends", "stopped")

    @POSIX_ONLY
    def test_no_process_is_left_behind(self, start):
        with start(start_new_session=True) as p:
            assert answers(("127.0.0.1", p.port()))
            p.interrupt()
            assert p.exit_code() == 0
            with pytest.raises(ProcessLookupError):
                os.killpg(p.process.pid, 0)

    @POSIX_ONLY
    @pytest.mark.parametrize("workers", [1, 2])
    def test_what_the_app_forked_ends_too(self, start, workers):
        """It holds the listener. Python terminates it, and it must not take that for
        the server's own first signal: it would live on, and the port with it."""
        with start("--workers", workers) as p:
            port = p.port()
            with p.connect(port) as client:
                ask(client, "fork", b"ok")
                assert client.response()[2] == b"done"
            p.process.send_signal(signal.SIGTERM)
            assert p.exit_code() == 0
            assert refuses(("127.0.0.1", port))
        assert "still run" not in p.output

    def test_the_next_server_can_have_the_port_at_once(self, start):
        with start() as p:
            port = p.port()
            with p.connect(port) as client:
                client.send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                client.read_all()  # closed by the server first: TIME_WAIT is its
            p.interrupt()
            assert p.exit_code() == 0
        with start("--port", port) as p:
            assert p.port() == port and answers(("127.0.0.1", port))
