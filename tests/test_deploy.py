"""examples/deploy is run as it is shipped, but for ports and paths: nginx in front, and a
small launcher in the place of systemd."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, Client, Process, serving, sooner

import sockets

DEPLOY = ROOT / "examples" / "deploy"
CONF = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
SERVICE = (DEPLOY / "foal.service").read_text(encoding="utf-8")
SOCKET = (DEPLOY / "foal.socket").read_text(encoding="utf-8")
NGINX = shutil.which("nginx")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="nginx and systemd are for POSIX")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not on PATH")

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
HELLO = b"\x81\x85\x00\x00\x00\x00hello"  # masked with zeros


def exec_start() -> list[str]:
    """foal's own arguments in foal.service."""
    command = re.search(r"(?m)^ExecStart=((?:.*\\\n)*.*)$", SERVICE)[1]
    python, script, *arguments = shlex.split(command.replace("\\\n", " "))
    assert (python, script) == ("/srv/foal/.venv/bin/python", "/srv/foal/server.py")
    return arguments


def option(name: str) -> float:
    arguments = exec_start()
    return float(arguments[arguments.index(name) + 1])


@pytest.fixture
def folder():
    """A short path, for a Unix socket, that nginx's workers may enter."""
    with tempfile.TemporaryDirectory(prefix="foal") as path:
        yield Path(path)


class Proxy:
    """nginx with the configuration as shipped, in front of `upstream`."""

    def __init__(self, folder: Path, upstream: str):
        # It inherits a listener as a new nginx does from the one that it replaces: so
        # the port is ours, and nobody can take it in between.
        [self.listener] = sockets.bind_tcp("127.0.0.1", 0, 128)
        self.port = self.listener.getsockname()[1]
        conf = CONF
        for shipped, here in (
            ("unix:/run/foal.sock", upstream),
            ("127.0.0.1:8080", f"127.0.0.1:{self.port}"),
            ("worker_processes auto", "worker_processes 1"),
        ):
            assert conf.count(shipped) == 1, shipped
            conf = conf.replace(shipped, here)
        (folder / "nginx.conf").write_text(conf)
        root = ["-g", "user root;"] if os.getuid() == 0 else []
        self.process = subprocess.Popen(
            [NGINX, "-p", folder, "-c", "nginx.conf", *root],
            pass_fds=[self.listener.fileno()],
            env={**os.environ, "NGINX": f"{self.listener.fileno()};"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            self.output += line

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGQUIT)  # gracefully: all is logged then
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.reader.join(PATIENCE)
            self.process.stdout.close()
            self.listener.close()

    def connect(self) -> Client:
        return Client(("127.0.0.1", self.port))

    def get(self, path: str = "/", method: str = "GET", body=None, **fields):
        """By an independent client: (status, fields, body)."""
        there = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(there):
            names = {name.replace("_", "-"): value for name, value in fields.items()}
            there.request(method, path, body, names)
            response = there.getresponse()
            return response.status, response.headers, response.read()


@contextlib.contextmanager
def behind_nginx(app, folder, **options):
    """(the server, the proxy), with a Unix socket between them."""
    listener, _ = sockets.bind_unix(str(folder / "foal.sock"), 128)
    options = {"proxy_headers": True, "timeout_keep_alive": 75.0, **options}
    # The proxy ends first: what it keeps is not what the server has to wait for.
    with serving(app, listener, **options) as running:
        with Proxy(folder, f"unix:{folder / 'foal.sock'}") as proxy:
            yield running, proxy


async def scope_app(scope, receive, send):
    """Who asks, and the digest of what it says."""
    digest, more_body = hashlib.sha256(), True
    while more_body:
        message = await receive()
        digest.update(message["body"])
        more_body = message["more_body"]
    seen = (scope["client"], scope["scheme"], digest.hexdigest())
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": repr(seen).encode()})


def test_nginx_closes_an_idle_connection_before_foal_does():
    """The 502 question: who closes while the other may be sending a POST?"""
    idle = float(re.search(r"\bkeepalive_timeout (\d+)s;", CONF)[1])
    assert idle + 5 <= option("--timeout-keep-alive")


def test_nginx_waits_longer_for_a_silent_websocket_than_foal():
    from server import Config

    silence = Config.ws_ping_interval + Config.ws_ping_timeout
    assert float(re.search(r"\bproxy_read_timeout (\d+)s;", CONF)[1]) > silence


def test_systemd_waits_longer_than_foal():
    """A grace for requests, one for lifespan shutdown."""
    patience = float(re.search(r"(?m)^TimeoutStopSec=(\d+)$", SERVICE)[1])
    assert patience > 2 * option("--timeout-graceful-shutdown")


def test_the_files_name_one_socket():
    [path] = re.findall(r"(?m)^ListenStream=(.*)$", SOCKET)
    assert f"server unix:{path};" in CONF


@needs_nginx
class TestNginx:
    def test_one_connection_is_kept_for_many_clients(self, folder):
        with behind_nginx(scope_app, folder) as (running, proxy):
            for _ in range(5):
                assert proxy.get()[0] == 200
                assert len(running.server.connections) == 1

    def test_the_client_is_who_it_is_and_not_who_it_says(self, folder, log):
        with behind_nginx(scope_app, folder) as (_, proxy):
            forged = {"X_Forwarded_For": "192.0.2.1", "X_Forwarded_Proto": "https"}
            body = proxy.get(**forged)[2]
        assert body.startswith(b"(('127.0.0.1', 0), 'http', ")
        assert '127.0.0.1:0 "GET / HTTP/1.1" 200' in log.text
        assert '127.0.0.1 "GET / HTTP/1.1" 200 upstream 200' in proxy.output

    def test_twenty_megabytes_arrive_whole(self, folder):
        data = os.urandom(20_000_000)
        with behind_nginx(scope_app, folder) as (_, proxy):
            status, _, body = proxy.get(method="POST", body=data)
        assert status == 200
        assert hashlib.sha256(data).hexdigest().encode() in body

    @pytest.mark.parametrize("path", ["/live/", "/"])
    def test_a_stream_is_neither_held_back_nor_collected(self, folder, path):
        """At /live/ nginx is told so, at / the app says it itself."""
        ended, left = queue.Queue(), threading.Event()

        async def app(scope, receive, send):
            field = [(b"x-accel-buffering", b"no")] if path == "/" else []
            await send({"type": "http.response.start", "status": 200, "headers": field})
            piece = {"type": "http.response.body", "body": b"first", "more_body": True}
            await send(piece)
            assert (await receive())["type"] == "http.request"
            try:
                for _ in range(1024):  # 64 MiB: more than all the buffers in between
                    piece["body"] = bytes(64 * 1024)
                    await asyncio.wait_for(send(piece), 0.5)
                ended.put("collected")
            except TimeoutError:
                ended.put("the client has to read")
                while (await receive())["type"] != "http.disconnect":
                    pass
            left.set()

        with behind_nginx(app, folder, lifespan="off") as (_, proxy):
            with proxy.connect() as client:
                client.send(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
                client.read_until(b"first")
                assert ended.get(timeout=PATIENCE) == "the client has to read"
            assert left.wait(PATIENCE)  # nginx passes on that the client has left

    def test_websockets_echo_and_chat(self, folder):
        import chat
        import ws_echo

        async def app(scope, *channels):
            module = chat if scope["path"] == "/chat" else ws_echo
            await module.app(scope, *channels)

        with behind_nginx(app, folder, lifespan="off") as (_, proxy):
            with proxy.connect() as client:
                client.send(UPGRADE + HELLO)
                client.read_until(b"\r\n\r\n")
                assert client.read_until(b"hello") == b"\x81\x05hello"
            to_chat = UPGRADE.replace(b"/ ", b"/chat ", 1)
            with proxy.connect() as first, proxy.connect() as second:
                first.send(to_chat)
                first.read_until(b"is here")
                second.send(to_chat)
                first.read_until(b"is here")
                second.send(HELLO)
                first.read_until(b": hello")

    def test_workers_are_replaced_under_load_without_a_502(self, folder):
        path, hits, done = folder / "foal.sock", [], threading.Event()

        def ask_until_done():
            while not done.is_set():
                hits.append(proxy.get()[0])

        clients = [threading.Thread(target=ask_until_done) for _ in range(4)]
        options = ("--uds", path, "--workers", 2, "--timeout-keep-alive", 75)
        with Process("example:app", *options, "--no-access-log") as process:
            for _ in range(2):
                process.wait_for("is ready")
            with Proxy(folder, f"unix:{path}") as proxy:
                for client in clients:
                    client.start()
                process.process.send_signal(signal.SIGHUP)
                # Each new one is ready before an old one leaves.
                for _ in range(2):
                    process.wait_for("exited with code 0")
                done.set()
                for client in clients:
                    client.join(PATIENCE)
        assert hits and set(hits) == {200}

    def test_a_stop_lets_the_request_in_flight_end(self, folder):
        path = folder / "foal.sock"
        with Process(*sooner(folder, "slow", "SECONDS = 0.5"), "--uds", path) as process:
            process.wait_for("listening")
            with Proxy(folder, f"unix:{path}") as proxy, proxy.connect() as client:
                client.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
                process.wait_for("a request")
                process.process.send_signal(signal.SIGTERM)
                assert client.response()[::2] == (200, b"better late than never\n")
            assert process.exit_code() == 0


class TestSystemd:
    """The launcher does what man 3 sd_listen_fds says of the service manager."""

    @pytest.fixture
    def listener(self, folder):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "foal.sock"))
        listener.listen(128)
        with listener:
            yield listener

    @pytest.fixture
    def start(self, folder, listener, monkeypatch):
        """Start foal.service's own command on the socket."""
        launcher = folder / "systemd"
        launcher.write_text(
            f"#!{sys.executable} -S\n"
            "import os, sys\n"
            f"os.dup2({listener.fileno()}, 3)\n"
            'os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")\n'
            f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
        )
        launcher.chmod(0o755)
        (folder / "main.py").write_text("from example import app\n")
        arguments = [str(folder) if a == "/srv/app" else a for a in exec_start()]

        def start():
            with monkeypatch.context() as patch:
                patch.setattr(sys, "executable", str(launcher))
                return Process(*arguments, pass_fds=(listener.fileno(),))

        return start

    def signal_of(self, pattern: str) -> signal.Signals:
        return signal.Signals[f"SIG{re.search(pattern, SERVICE)[1]}"]

    def hello(self, client) -> None:
        client.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        assert client.response()[2] == b"Hello, world!\n"

    def test_it_serves_reloads_and_stops_on_the_socket_of_systemd(self, start, folder):
        path = folder / "foal.sock"
        with start() as process:
            process.wait_for(re.escape(f"listening on unix:{path} "))
            process.wait_for("is ready")  # the second worker: it serves by now
            with Client(str(path)) as client:
                self.hello(client)
            process.process.send_signal(self.signal_of(r"ExecReload=/bin/kill -(\w+)"))
            for _ in range(2):
                process.wait_for("exited with code 0")
            with Client(str(path)) as client:
                self.hello(client)
            process.process.send_signal(signal.SIGTERM)  # KillMode=mixed: to it alone
            assert process.exit_code() == 0
        assert path.is_socket()

    def test_a_client_waits_while_it_restarts(self, start, folder):
        with start() as process:
            process.wait_for("listening")
            process.process.send_signal(signal.SIGTERM)
            assert process.exit_code() == 0
        with Client(str(folder / "foal.sock")) as client:  # nobody accepts
            with start():
                self.hello(client)

    def test_a_broken_app_is_not_started_again(self, start, folder):
        (folder / "main.py").write_text("app = 1 / 0\n")
        with start() as process:
            code = process.exit_code()
        prevented = re.search(r"(?m)^RestartPreventExitStatus=(.*)$", SERVICE)[1]
        assert str(code) in prevented.split()
