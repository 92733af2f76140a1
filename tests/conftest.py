"""The two tools of all tests. `serving` runs an app in a thread of this process, and a
`Client` speaks bytes to it over a real socket. `Process` starts a real `python server.py`
and reads its log.

A test does not sleep and hope: it reads until the bytes are there, or asks again until it
is so. If that takes longer than PATIENCE, the test has failed.
"""

import asyncio
import atexit
import concurrent.futures
import contextlib
import functools
import logging
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import tracemalloc  # noqa: F401  pytest needs it during garbage collection: too late then
import warnings
from pathlib import Path

import h11
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import loops  # noqa: E402
import server  # noqa: E402
import sockets  # noqa: E402

PATIENCE = 20.0  # seconds; only a failing test waits that long
GET = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"
POSIX_ONLY = pytest.mark.skipif(os.name == "nt", reason="Windows has no such thing")


def pytest_configure(config):
    # With CI in the environment, pytest compares two different values line by line. For
    # 64 KiB this takes minutes, and a test that fails looks like one that hangs.
    os.environ.pop("CI", None)
    if os.name == "nt":
        # When an accept fails, asyncio leaves the socket to the garbage collector
        # (cpython #93821). The ResourceWarning may come in any test, or after the last.
        ignore = "ignore::pytest.PytestUnraisableExceptionWarning"
        config.addinivalue_line("filterwarnings", ignore)
        warnings.simplefilter("ignore", pytest.PytestUnraisableExceptionWarning)


def family(address: tuple | str) -> int:
    if isinstance(address, str):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


class Client:
    """One connection: bytes out, bytes or whole responses in."""

    def __init__(self, address):
        self.sock = socket.socket(family(address))
        self.sock.settimeout(PATIENCE)
        self.sock.connect(address)
        self.unread = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Leave as a client that crashes: with a reset instead of an orderly close."""
        layout = b"\x01\x00\x00\x00" if os.name == "nt" else b"\x01" + bytes(7)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, layout)
        self.sock.close()

    def read_until(self, end: bytes) -> bytes:
        """All bytes up to `end`, including it."""
        while end not in self.unread:
            data = self.sock.recv(65536)
            assert data, f"closed before {end!r}; got {self.unread!r}"
            self.unread += data
        found, _, self.unread = self.unread.partition(end)
        return found + end

    def read_all(self) -> bytes:
        """All bytes until the server closes its sending side. A reset is an error."""
        while data := self.sock.recv(65536):
            self.unread += data
        found, self.unread = self.unread, b""
        return found

    def response(self, method: str = "GET"):
        """The next response, read by h11: (status, {name: value}, body)."""
        conn = h11.Connection(h11.CLIENT)
        conn.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        conn.send(h11.EndOfMessage())
        conn.receive_data(self.unread) if self.unread else None
        head, body = None, b""
        while type(event := conn.next_event()) is not h11.EndOfMessage:
            if event is h11.NEED_DATA:
                conn.receive_data(self.sock.recv(65536))
            elif type(event) is h11.Response:
                head = event
            elif type(event) is h11.Data:
                body += event.data
            else:
                assert type(event) is h11.InformationalResponse, event
        self.unread = conn.trailing_data[0]
        fields = {name.decode(): value.decode() for name, value in head.headers}
        return head.status_code, fields, body


class Serving:
    """A server that runs in a thread, with the questions that tests ask it."""

    def __init__(self, app, listener, options):
        self.config = server.Config(app, **options)
        self.server = server.Server(self.config, [listener])
        self.address = listener.getsockname()
        self.errors: list[BaseException] = []
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        try:
            make = functools.partial(loops.make, self.config.loop_choice().factory)
            with asyncio.Runner(loop_factory=make) as runner:
                runner.run(self.server.serve(lambda *addresses: self.ready.set()))
        except BaseException as exc:
            self.errors.append(exc)
        finally:
            self.ready.set()

    def connect(self) -> Client:
        return Client(self.address[:2] if isinstance(self.address, tuple) else self.address)

    def talk(self, data: bytes) -> bytes:
        """Send bytes, close our sending side, and return all that comes back."""
        with self.connect() as client:
            client.send(data)
            client.half_close()
            return client.read_all()

    def call(self, function, *arguments):
        """Run a function on the server's loop, and return what it returns."""

        async def run():
            return function(*arguments)

        future = asyncio.run_coroutine_threadsafe(run(), self.server.loop)
        return future.result(PATIENCE)

    def stop(self):
        if self.thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop closed just now
                self.server.loop.call_soon_threadsafe(self.server.stop, "test over")
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def serving(app, listener=None, **options):
    """Serve `app` on a free port; stop at the end, and check that nothing is left."""
    options.setdefault("timeout_graceful_shutdown", 2.0)
    listener = listener or sockets.bind_tcp("127.0.0.1", 0, 128)[0]
    running = Serving(app, listener, options)
    running.thread.start()
    try:
        assert running.ready.wait(PATIENCE)
        if running.errors:
            raise running.errors[0]
        yield running
    finally:
        running.stop()
        listener.close()
    assert not running.server.tasks and not running.server.connections


def environment(**more) -> dict[str, str]:
    """The environment of a program that a test starts. Python keeps compiled modules in
    a folder of ours, which halves the time of a start. Nothing in it is out of date."""
    ours = {"PYTHONUNBUFFERED": "1", "PYTHONPYCACHEPREFIX": compiled()}
    found = {**os.environ, **ours, **more}
    found.pop("PYTHONDONTWRITEBYTECODE", None)
    return found


@functools.cache
def compiled() -> str:
    """That folder, for this run of the tests."""
    folder = tempfile.mkdtemp(prefix="foal-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def sooner(folder, module, setting) -> tuple:
    """The app of an example as a program would name it, with one number changed."""
    code = f"import {module}\n{module}.{setting}\napp = {module}.app\n"
    (folder / f"sooner_{module}.py").write_text(code)
    return f"sooner_{module}:app", "--app-dir", folder


class Process:
    """`python server.py …` as a user runs it, with its output line by line. `start` may
    name another script, or options of Python."""

    script = ROOT / "server.py"

    def __init__(self, *arguments, cwd=None, env=None, start=(), **popen):
        self.lines: list[str] = []
        self.arrived: queue.Queue[str | None] = queue.Queue()
        if os.name == "nt":  # so that Ctrl-Break reaches it and not us
            popen["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
        self.process = subprocess.Popen(
            [sys.executable, *map(str, (*(start or (self.script,)), *arguments))],
            cwd=cwd or ROOT,
            env=environment(**(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            **popen,
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            self.arrived.put(line.rstrip())
        self.arrived.put(None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if os.name == "nt":  # a worker that still starts would outlive its supervisor
            with contextlib.suppress(OSError, SystemError, subprocess.TimeoutExpired):
                self.interrupt()  # of what has just ended, os.kill may make a SystemError
                self.process.wait(5)
        self.process.kill()
        self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        self.process.stdout.close()

    def wait_for(self, pattern: str) -> re.Match:
        """Read on to the first line that matches."""
        while (line := self.arrived.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no line matches {pattern!r} in:\n" + self.output)

    def port(self) -> int:
        """Read on to the line that says where the server listens: the port."""
        return int(self.wait_for(r"listening on \w+://.*:(\d+)")[1])

    def connect(self, port: int) -> Client:
        return Client(("127.0.0.1", port))

    def interrupt(self) -> None:
        """What Ctrl-C does; on Windows, Ctrl-Break."""
        self.process.send_signal(
            signal.CTRL_BREAK_EVENT if os.name == "nt" else signal.SIGINT
        )

    def exit_code(self) -> int:
        """Wait for the end; `output` is complete then."""
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        while not self.arrived.empty():
            if (line := self.arrived.get()) is not None:
                self.lines.append(line)
        return code

    @property
    def output(self) -> str:
        return "\n".join(self.lines)


def fetch(address, target="/"):
    """One GET on a connection of its own: (status, {name: value}, body)."""
    with Client(address) as client:
        client.send(f"GET {target} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        return client.response()


def refuses(address) -> bool:
    """Is no server there?"""
    with socket.socket(family(address)) as client:
        client.settimeout(PATIENCE)
        return client.connect_ex(address) != 0


def free_port() -> int:
    """A port that was free a moment ago."""
    with sockets.bind_tcp("127.0.0.1", 0, 1)[0] as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="session", autouse=True)
def started(request, tmp_path_factory):
    """The runs of pytest that test_exercises looks at. They go on one by one beside the
    other tests, so that nobody has to wait for them."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        def submit(function, *arguments):
            return pool.submit(function, tmp_path_factory.mktemp("run"), *arguments)

        modules = {item.module.__name__: item.module for item in request.session.items}
        yield modules["test_exercises"].start(submit) if "test_exercises" in modules else {}
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def path():
    """For a Unix socket: pytest's own folders are too long for macOS' 104 bytes."""
    where = None if os.name == "nt" else "/tmp"
    with tempfile.TemporaryDirectory(prefix="foal", dir=where) as folder:
        yield os.path.join(folder, "s")


@pytest.fixture
def log(caplog):
    """The server's log, whatever its level."""
    caplog.set_level(logging.DEBUG, server.logger.name)
    return caplog
