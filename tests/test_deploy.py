"""examples/deploy is run as it is shipped, except for ports and paths: nginx in front,
and a small launcher in the place of systemd."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading

import pytest
from apps import post
from conftest import GET, PATIENCE, ROOT, Client, Process, fetch, serving, sooner

import server
import sockets

DEPLOY = ROOT / "examples" / "deploy"
CONF = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
SERVICE = (DEPLOY / "foal.service").read_text(encoding="utf-8")
SOCKET = (DEPLOY / "foal.socket").read_text(encoding="utf-8")
NGINX = shutil.which("nginx")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="nginx and systemd are for POSIX")


def exec_start() -> list[str]:
    """foal's own arguments in foal.service."""
    command = re.search(r"(?m)^ExecStart=((?:.*\\\n)*.*)$", SERVICE)[1]
    python, script, *arguments = shlex.split(command.replace("\\\n", " "))
    assert (python, script) == ("/srv/foal/.venv/bin/python", "/srv/foal/server.py")
    return arguments


def number(pattern: str, text: str) -> float:
    return float(re.search(pattern, text)[1])


def test_the_numbers_of_the_three_files_fit_together():
    options = server.Config(**vars(server.make_parser().parse_args(exec_start())))
    # nginx closes an idle connection first. The other way round a POST may be a 502.
    assert number(r"\bkeepalive_timeout (\d+)s;", CONF) + 5 <= options.timeout_keep_alive
    # nginx waits longer for a silent WebSocket than foal.
    silence = options.ws_ping_interval + options.ws_ping_timeout
    assert number(r"\bproxy_read_timeout (\d+)s;", CONF) > silence
    # systemd waits for a grace for requests and one for the lifespan's shutdown.
    patience = number(r"(?m)^TimeoutStopSec=(\d+)$", SERVICE)
    assert patience > 2 * options.timeout_graceful_shutdown
    [path] = re.findall(r"(?m)^ListenStream=(.*)$", SOCKET)
    assert f"server unix:{path};" in CONF


@contextlib.contextmanager
def nginx(path):
    """The address of an nginx, configured as shipped, in front of a Unix socket."""
    # It inherits a listener, as a new nginx does from the one that it replaces.
    folder, conf, [listener] = os.path.dirname(path), CONF, sockets.bind_tcp("127.0.0.1", 0, 128)
    for shipped, here in (
        ("unix:/run/foal.sock", f"unix:{path}"),
        ("127.0.0.1:8080", "%s:%d" % listener.getsockname()),
        ("worker_processes auto", "worker_processes 1"),
    ):
        assert conf.count(shipped) == 1, shipped
        conf = conf.replace(shipped, here)
    with open(folder + "/nginx.conf", "w") as file:
        file.write(conf)
    os.chmod(folder, 0o755)  # nginx's workers may be another user
    root = ["-g", "user root;"] if os.getuid() == 0 else []
    command = [NGINX, "-p", folder, "-c", "nginx.conf", *root]
    how = {"pass_fds": [fd := listener.fileno()], "env": {**os.environ, "NGINX": f"{fd};"}}
    with listener, subprocess.Popen(command, **how) as process:
        try:
            yield listener.getsockname()
        finally:
            process.send_signal(signal.SIGQUIT)  # gracefully


@contextlib.contextmanager
def behind_nginx(app, path, **options):
    """The server, and the address of the proxy before it."""
    listener, _ = sockets.bind_unix(path, 128)
    # The proxy ends first: the server does not have to wait for what the proxy keeps.
    with serving(app, listener, proxy_headers=True, **options) as running, nginx(path) as address:
        yield running, address


async def scope_app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    body = repr((scope["client"], scope["scheme"])).encode()
    await send({"type": "http.response.body", "body": body})


@pytest.mark.skipif(NGINX is None, reason="nginx is not on PATH")
class TestNginx:
    def test_one_connection_is_kept_and_the_client_is_the_real_one(self, path, log):
        """Not the one that the client itself names."""
        forged = GET[:-2] + b"X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: https\r\n\r\n"
        with behind_nginx(scope_app, path) as (running, address):
            for _ in range(5):
                with Client(address) as client:
                    client.send(forged)
                    assert client.response()[2] == b"(('127.0.0.1', 0), 'http')"
            assert [c.requests_seen for c in running.server.connections] == [5]
        assert '127.0.0.1:0 "GET / HTTP/1.1" 200' in log.text

    def test_workers_are_replaced_under_load_without_a_502(self, path, tmp_path):
        """nginx would ask again for a GET, but not for a POST."""
        hits, done = [], threading.Event()

        def ask_until_done():
            while not done.is_set():
                with Client(address) as client:
                    client.send(post(b"x"))
                    hits.append(client.response()[0])

        clients = [threading.Thread(target=ask_until_done) for _ in range(4)]
        app = sooner(tmp_path, "slow", "SECONDS = 0.02")
        with Process(*app, "--uds", path, "--workers", 2) as process:
            for _ in range(2):
                process.wait_for("is ready")
            with nginx(path) as address:
                for client in clients:
                    client.start()
                process.process.send_signal(signal.SIGHUP)
                for _ in range(2):  # each new one is ready before an old one leaves
                    process.wait_for("exited with code 0")
                done.set()
                for client in clients:
                    client.join(PATIENCE)
        assert hits and set(hits) == {200}


class TestSystemd:
    """The launcher does what man 3 sd_listen_fds says of the service manager."""

    @pytest.fixture
    def start(self, tmp_path, path):
        """Start foal.service's own command on the socket."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(128)
        launcher = tmp_path / "launcher.py"
        launcher.write_text(
            f"import os, sys\nos.dup2({listener.fileno()}, 3)\n"
            'os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")\n'
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
        )
        (tmp_path / "main.py").write_text("from example import app\n")
        arguments = [str(tmp_path) if a == "/srv/app" else a for a in exec_start()]
        how = {"start": (launcher, ROOT / "server.py"), "pass_fds": [listener.fileno()]}
        with listener:
            yield lambda: Process(*arguments, **how)

    def test_it_serves_reloads_and_stops_on_the_socket_of_systemd(self, start, path):
        reload = re.search(r"ExecReload=/bin/kill -(\w+)", SERVICE)[1]
        with start() as process:
            process.wait_for(re.escape(f"listening on unix:{path} "))
            process.wait_for("is ready")  # the second worker: it serves by now
            assert fetch(path)[2] == b"Hello, world!\n"
            process.process.send_signal(signal.Signals[f"SIG{reload}"])
            for _ in range(2):
                process.wait_for("exited with code 0")
            assert fetch(path)[2] == b"Hello, world!\n"
            process.process.send_signal(signal.SIGTERM)  # KillMode=mixed: to it alone
            assert process.exit_code() == 0
        with Client(path) as client:  # no process accepts now: this client waits
            client.send(GET)
            with start():
                assert client.response()[2] == b"Hello, world!\n"
