"""One process, as a user runs and stops it: real signals, real exit codes.

Ctrl-C here is SIGINT, and on Windows Ctrl-Break (conftest, `interrupt`).
"""

import contextlib
import os
import re
import signal
import socket
import subprocess

import pytest
from conftest import GET, POSIX_ONLY, Client, Process, fetch, refuses
from test_workers import APP, APPS, INTERRUPT

import sockets

INTERRUPTED = 128 + (signal.SIGBREAK if os.name == "nt" else signal.SIGINT)
SIGNALS = [
    pytest.param(INTERRUPT, INTERRUPTED, id="Ctrl-C"),
    pytest.param(signal.SIGTERM, 128 + 15, id="SIGTERM", marks=POSIX_ONLY),
]
SWALLOWS = "try:\n    while True: time.sleep(0.02)\nexcept BaseException: pass\n"
HANGING = "async def app(scope, receive, send):\n    await wait_forever(receive)\n"
IMPATIENT = """
import asyncio, os, signal
class Loop(asyncio.SelectorEventLoop):
    def __init__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        super().__init__()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    more = {"hanging": APP + HANGING, "swallows": APP + SWALLOWS, "impatient": IMPATIENT}
    for name, text in {**APPS, **more}.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def start(folder):
    """Start a process with one of our apps."""

    def start(*options, app="busy:app", **process):
        address = () if "--uds" in options else ("--port", 0)
        return Process(app, "--app-dir", folder, *address, *options, **process)

    return start


def ask(client, what, body=b"") -> None:
    """A request for one of the app's functions; its body is two bytes long."""
    client.send(f"POST /{what} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n".encode() + body)


def assert_order(output, *words) -> None:
    """Each of the words is there, one after the other."""
    assert re.search(".*".join(map(re.escape, words)), output, re.DOTALL), output


class TestSignals:
    """The first signal stops gracefully, a second one ends at once."""

    @pytest.mark.parametrize("number, _", SIGNALS)
    def test_a_request_in_progress_is_finished_before_the_end(self, start, number, _):
        """And an idle connection, kept alive, does not hold up the end."""
        with start("--timeout-graceful-shutdown", 3600) as p, p.connect(p.port()) as client:
            ask(client, "wait_for_body", b"o")
            p.wait_for("in progress")
            with p.connect(client.sock.getpeername()[1]) as idle:
                idle.send(GET)
                assert idle.response()[0] == 200
                p.process.send_signal(number)
                p.wait_for("requests in progress: 1; waiting.*Ctrl-C again")
                assert idle.read_all() == b""
            client.send(b"k")
            assert client.response()[0] == 200 and p.exit_code() == 0
        assert_order(p.output, "stopping", "POST /wait_for_body", "the lifespan ends", "stopped")

    @pytest.mark.parametrize("number, _", SIGNALS)
    @pytest.mark.parametrize(
        "app, place",
        [("stuck", "importing"), ("swallows", "importing"), ("hanging", "in progress")],
    )
    def test_a_start_that_hangs_can_be_stopped(self, start, number, _, app, place):
        with start(app=f"{app}:app") as p:
            p.wait_for(place)
            p.process.send_signal(number)
            assert p.exit_code() == 0
        assert p.lines[-1].endswith("stopped"), p.output
        assert "listening" not in p.output and "Traceback" not in p.output

    @pytest.mark.parametrize("number, code", SIGNALS)
    @pytest.mark.parametrize("what", ["wait_forever", "block"])
    def test_the_second_one_does_not_wait_for_anything(self, start, number, code, what):
        """A blocked loop does not show that the first one has arrived, and two that are
        one moment apart may count as one: send until it ends."""
        with start("--timeout-graceful-shutdown", 3600) as p, p.connect(p.port()) as client:
            ask(client, what)
            p.wait_for("in progress")
            for _ in range(3):
                p.process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    p.process.wait(0.25)
            assert p.exit_code() == code
        assert "the lifespan ends" not in p.output

    @POSIX_ONLY
    def test_a_signal_amid_the_making_of_the_loop_leaves_no_half_of_one(self, start, folder):
        """Python shows a traceback when it throws such a half away."""
        with start("--loop", "impatient:Loop", env={"PYTHONPATH": str(folder)}) as p:
            assert p.exit_code() == -signal.SIGTERM
        assert "Traceback" not in p.output

    def test_at_the_end_of_the_grace_a_request_is_cancelled_and_the_log_says_so(self, start):
        with start("--timeout-graceful-shutdown", 0.5) as p, p.connect(p.port()) as client:
            ask(client, "wait_forever")
            p.wait_for("in progress")
            p.interrupt()
            assert p.exit_code() == 0
        assert_order(p.output, "stopping", "telling the app", "cancel", "was ended")
        assert_order(p.output, "was ended", "the lifespan ends", "stopped")


class TestAddresses:
    """The address that is printed answers (uvicorn #974)."""

    LOCALHOST = ("localhost", r"(?:127\.0\.0\.1|\[::1\])")

    @pytest.mark.parametrize(
        "host, shown, mode",
        [("127.0.0.1", r"127\.0\.0\.1", ""), ("::1", r"\[::1\]", ""), (*LOCALHOST, "")]
        + [(*LOCALHOST, "--workers 2"), (*LOCALHOST, "--reload")]
        + [("", r"(?:0\.0\.0\.0|\[::\])", mode) for mode in ("", "--workers 2")],
    )
    def test_every_address_of_a_host_answers_on_one_port(self, start, host, shown, mode):
        try:
            listeners = sockets.bind_tcp(host, 0, 1)
        except OSError as exc:
            pytest.skip(f"{host}: {exc}")
        for listener in listeners:
            listener.close()
        ports = set()
        with start("--host", host, *mode.split()) as p:
            for listener in listeners:
                ports.add(port := int(p.wait_for(rf"listening on http://{shown}:(\d+) ")[1]))
                six = listener.family == socket.AF_INET6
                assert fetch(("::1" if six else "127.0.0.1", port))[0] == 200
            p.interrupt()
            assert p.exit_code() == 0
        assert len(ports) == 1 and p.output.count("listening on") == len(listeners)


@POSIX_ONLY
class TestUnixSocket:
    """On exit only our own inode is removed; and so on every exit."""

    @pytest.mark.parametrize("mode", ["", "--workers 2"])
    @pytest.mark.parametrize("end, code", [("graceful", 0), ("forced", INTERRUPTED)])
    def test_its_file_is_removed_at_the_end(self, start, path, mode, end, code):
        options = ("--uds", path, "--timeout-graceful-shutdown", 3600, *mode.split())
        with start(*options) as p:
            p.wait_for("listening on " + re.escape(f"unix:{path} "))
            with Client(path) as client:
                ask(client, "wait_forever" if code else "", b"ok")
                p.wait_for("in progress" if code else 'unix "POST / HTTP/1.1" 200')
                p.interrupt() if code else client.half_close()
                p.wait_for("stopping") if code else None
                p.interrupt()
                assert p.exit_code() == code
        assert not os.path.lexists(path)

    def test_its_file_is_removed_when_the_app_cannot_be_loaded(self, start, path):
        with start("--uds", path, app="no_such_module:app") as p:
            assert p.exit_code() == 3 and not os.path.lexists(path)

    def test_a_killed_server_is_replaced_and_a_living_one_is_not(self, start, path):
        with start("--uds", path) as first:
            first.wait_for("listening on")
            with start("--uds", path) as second:
                assert second.exit_code() == 3 and "in use" in second.output
            assert fetch(path)[0] == 200
            first.process.kill()
            first.exit_code()
        assert refuses(path) and os.path.lexists(path)
        with start("--uds", path) as third:
            third.wait_for("listening on")
            assert fetch(path)[0] == 200


class TestNothingIsLeft:
    """Descriptors, tasks and processes are as they were before. For five reloads see
    test_workers.py."""

    @POSIX_ONLY
    def test_after_a_thousand_requests_and_200_abandoned_connections(self, start):
        head = b"POST /wait_for_body HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
        with start("--no-access-log", start_new_session=True) as p:
            address = ("127.0.0.1", p.port())
            before = fetch(address, "/count")[2]
            for _ in range(20):
                with Client(address) as client:
                    client.send(GET * 50)
                    assert {client.response()[0] for _ in range(50)} == {200}
            for sent in (b"", head[:20], head, head + b"o", GET * 3) * 40:
                client = Client(address)
                client.send(sent)
                client.reset() if sent else client.sock.close()
            for _ in range(1000):  # the server notices while we ask
                if (after := fetch(address, "/count")[2]) == before:
                    break
            assert after == before
            p.interrupt()
            assert p.exit_code() == 0
            with pytest.raises(ProcessLookupError):
                os.killpg(p.process.pid, 0)
            assert " ERROR " not in p.output and " WARNING " not in p.output
