"""Chapters 1 and 2: what was asked, and who will do it.

Every mistake of a newcomer is one line and an exit code, from a real `python
server.py`, or for one in the arguments from its main(), which sees no more than those;
what Python code asks for goes through server.run and server.serve.
"""

import asyncio
import contextlib
import dataclasses
import functools
import io
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h11
import pytest
from conftest import GET, PATIENCE, ROOT, Client, Process, environment

import server
import sockets

POSIX_ONLY = pytest.mark.skipif(os.name == "nt", reason="Windows has no such thing")
SERVER = ROOT / "server.py"
MAIN = """
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": __name__.encode()})
def wsgi(environ, start_response): ...
class WSGI:
    def __call__(self, environ, start_response): ...
wsgi_object = WSGI()
class ASGI2:
    def __init__(self, scope): ...
def create_app():
    return app
class Framework:
    async def __call__(self, scope, receive, send):
        await app(scope, receive, send)
framework = Framework()
def broken_factory():
    raise RuntimeError("the factory's own words")
def false_factory():
    return wsgi
number = 42
"""


@dataclasses.dataclass
class Outcome:
    """How a command ended, and what it said."""

    code: int
    output: str

    @property
    def errors(self) -> list[str]:
        """The lines that are no news of the start."""
        return [line for line in self.output.splitlines() if " INFO " not in line]


def foal(*arguments, start=(SERVER,), cwd=ROOT, **env) -> Outcome:
    """Run the command line to its end."""
    done = subprocess.run(
        [str(part) for part in (sys.executable, *start, *arguments)],
        cwd=cwd,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=PATIENCE,
    )
    return Outcome(done.returncode, done.stdout)


def body_of(app, *options, **process) -> bytes:
    """What an app answers, served by a real process."""
    with (
        Process(app, "--port", 0, *options, **process) as p,
        p.connect(p.port()) as client,
    ):
        client.send(GET)
        return client.response()[2]


def free_port() -> int:
    [listener] = sockets.bind_tcp("127.0.0.1", 0, 1)
    with listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A newcomer's folder: one app, and every way to get it wrong."""
    folder = tmp_path_factory.mktemp("newcomer")
    modules = {
        "main": MAIN,
        "needs_more": "import no_such_dependency",
        "syntax": "def app(:",
        "raises": "1 / 0",
        "leaves": "import sys\nsys.exit('no configuration')",
        "package/__init__": "",
        "package/web": MAIN,
        "package/needs_more": "from package import no_such_part",
    }
    (folder / "package").mkdir()
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return folder


class TestBadArguments:
    """behaviour.md §1: a bad argument is one line, and exit code 2."""

    @pytest.mark.parametrize(
        "arguments, word",
        [
            ([], "MODULE:ATTRIBUTE"),
            (["main:app", "main:app"], "main:app"),
            (["main:app", "--frobnicate"], "--frobnicate"),
            (["main:app", "--por", "0"], "--por"),  # abbreviations are no options
            (["main:app", "--port"], "--port"),
            (["main:app", "--port", "abc"], "abc"),
            (["main:app", "--port", "-1"], "--port"),
            (["main:app", "--port", "65536"], "--port"),
            (["main:app", "--fd", "-1"], "--fd"),
            (["main:app", "--backlog", "0"], "--backlog"),
            (["main:app", "--backlog", "2147483648"], "--backlog"),
            (["main:app", "--fd", "2147483648"], "--fd"),
            (["main:app", "--lifespan", "maybe"], "--lifespan"),
            (["main:app", "--log-level", "loud"], "--log-level"),
            (["main:app", "--limit-concurrency", "0"], "--limit-concurrency"),
            (["main:app", "--limit-max-requests", "0"], "--limit-max-requests"),
            (["main:app", "--timeout-keep-alive", "-1"], "--timeout-keep-alive"),
            (["main:app", "--timeout-request-head", "nan"], "--timeout-request-head"),
            (["main:app", "--timeout-graceful-shutdown", "x"], "x"),
            (["main:app", "--header", "NoColon"], "NAME:VALUE"),
            (["main:app", "--header", "Bad Name: value"], "NAME:VALUE"),
            (["main:app", "--header", "X-Bad: a\nb"], "NAME:VALUE"),
            (["main:app", "--header", ": value"], "NAME:VALUE"),
            (["main:app", "--forwarded-allow-ips", "junk"], "junk"),
            (["main:app", "--forwarded-allow-ips", "10.0.0.0/99"], "10.0.0.0/99"),
        ],
    )
    def test_a_bad_argument_is_one_line_and_code_2(
        self, monkeypatch, capfd, arguments, word
    ):
        monkeypatch.setattr(server, "run", lambda config: pytest.fail("it would serve"))
        code = server.main(["--port", "0", *arguments])
        output = "".join(capfd.readouterr())
        assert (code, len(output.splitlines())) == (2, 1), output
        assert word in output and output.startswith("foal: ")

    @pytest.mark.parametrize(
        "arguments", [["main:app", "--por"], ["main:app", "--fd=-1"]]
    )
    def test_that_is_what_the_program_says(self, folder, arguments):
        """What argparse refuses, and what Config does."""
        outcome = foal("--port", 0, *arguments, cwd=folder)
        assert (outcome.code, len(outcome.output.splitlines())) == (2, 1), outcome
        assert outcome.output.startswith("foal: ")


MISTAKES = [
    (["nope:app"], ['no module "nope"', "--app-dir"]),
    (["nope.web:app"], ['no module "nope"', "--app-dir"]),
    (["package.nope:app"], ['no module "package.nope"']),
    (["main.nope:app"], ['no module "main.nope"']),
    (
        ["main:app", "--app-dir", "no-such-folder"],
        ["no-such-folder", "--app-dir"],
    ),
    (["main:app", "--reload", "--reload-dir", "nope"], ["cannot watch nope"]),
    (["main:app", "--reload", "--reload-dir", "main.py"], ["cannot watch main.py"]),
    (["main:ap"], ['no "ap"', 'did you mean "app"?']),
    (["main:zzzzzz"], ['no "zzzzzz"']),
    (["main:framework.zzzzzz"], ["zzzzzz"]),
    (["main"], ["MODULE:ATTRIBUTE", "main:app"]),
    ([":app"], ["MODULE:ATTRIBUTE"]),
    (["main:"], ["MODULE:ATTRIBUTE"]),
    (["main.py:app"], ["MODULE:ATTRIBUTE", "main:app"]),
    (["package/web:app"], ["MODULE:ATTRIBUTE"]),
    (["package\\web:app"], ["MODULE:ATTRIBUTE"]),
    (["main:wsgi"], ["WSGI", "asgiref.wsgi.WsgiToAsgi"]),
    (["main:wsgi_object"], ["WSGI"]),
    (["main:ASGI2"], ["ASGI 2"]),
    (["main:create_app"], ["--factory"]),
    (["main:Framework"], ["--factory"]),  # a class, not yet called
    (["main:number"], ["int", "cannot be called"]),
    (["main:false_factory", "--factory"], ["WSGI"]),
]


@pytest.fixture(scope="module")
def outcomes(folder):
    """Of each mistake, to ask for its result(); two processes at a time."""
    with ThreadPoolExecutor(2) as pool:
        start = functools.partial(pool.submit, foal, "--port", 0, cwd=folder)
        yield {" ".join(arguments): start(*arguments) for arguments, _ in MISTAKES}


class TestNoApp:
    """behaviour.md §1: no module, attribute or ASGI 3 app: one line, exit code 3."""

    @pytest.mark.parametrize("arguments, words", MISTAKES)
    def test_a_mistake_is_one_line_and_code_3(self, outcomes, arguments, words):
        outcome = outcomes[" ".join(arguments)].result()
        assert (outcome.code, len(outcome.errors)) == (3, 1), outcome.output
        for word in words:
            assert word in outcome.errors[0]

    def test_no_hint_is_better_than_a_wild_one(self, folder):
        assert "did you mean" not in foal("main:zzzzzz", "--port", 0, cwd=folder).output


class TestBrokenApp:
    """behaviour.md §1: an error inside the module shows the app's own traceback."""

    def check(self, outcome, where, words):
        """The traceback has none of our frames, and a sentence of ours ends it."""
        assert outcome.code == 3
        files = re.findall(r'File "([^"]+)", line', outcome.output)
        assert files and files[0].endswith(where), outcome.output
        assert not [f for f in files if f.endswith("server.py") or "importlib" in f]
        assert words in outcome.errors[-1]
        assert outcome.output.count("Traceback") <= 1  # none for a SyntaxError

    @pytest.mark.parametrize(
        "module, words",
        [
            ("needs_more", "no_such_dependency"),
            ("syntax", "SyntaxError"),
            ("raises", "division by zero"),
            ("leaves", "no configuration"),
            ("package.needs_more", "no_such_part"),
        ],
    )
    def test_an_error_in_the_module_shows_its_traceback(self, folder, module, words):
        outcome = foal(f"{module}:app", "--port", 0, cwd=folder)
        self.check(outcome, module.split(".")[-1] + ".py", words)
        assert f"{module} could not be imported" in outcome.errors[-1]
        assert "no module" not in outcome.output

    def test_an_app_that_silences_all_loggers_is_no_reason_to_be_silent(self, tmp_path):
        """It does so by not saying the contrary (Python, logging.config)."""
        text = "import logging.config\nlogging.config.dictConfig({'version': 1})\n"
        (tmp_path / "silent.py").write_text(text + "1 / 0\n")
        outcome = foal("silent:app", "--port", 0, cwd=tmp_path)
        self.check(outcome, "silent.py", "division by zero")
        (tmp_path / "silent.py").write_text(text + MAIN.replace("__name__", "(1 / 0)"))
        with Process("silent:app", "--port", 0, cwd=tmp_path) as p:
            with p.connect(p.port()) as client:
                client.send(GET)
                assert client.response()[0] == 500
                p.wait_for("division by zero")
                p.wait_for('"GET / HTTP/1.1" 500')

    def test_an_error_in_the_factory_shows_its_traceback(self, folder):
        outcome = foal("main:broken_factory", "--factory", "--port", 0, cwd=folder)
        self.check(outcome, "main.py", "the factory's own words")


class TestNoAddress:
    """behaviour.md §1 and §2: which address, and a hint; before the app is imported."""

    def check(self, outcome, *words):
        assert (outcome.code, len(outcome.errors)) == (3, 1), outcome.output
        assert all(word in outcome.errors[0] for word in words), outcome.output

    def test_a_port_in_use_is_named_with_a_hint(self):
        [listener] = sockets.bind_tcp("127.0.0.1", 0, 1)
        with listener:
            port = listener.getsockname()[1]
            outcome = foal("no_such_module:app", "--port", port)
        self.check(outcome, f"127.0.0.1:{port}", "in use", "--port")
        assert "no_such_module" not in outcome.output

    @pytest.mark.parametrize(
        "arguments, words",
        [
            (["--host", "no-such-host.invalid"], ["no-such-host.invalid", "--host"]),
            (["--host", "192.0.2.1"], ["192.0.2.1", "--host"]),  # RFC 5737
            (["--fd", "250"], ["--fd 250"]),
        ],
    )
    def test_an_address_that_is_not_there_is_named(self, arguments, words):
        self.check(foal("example:app", "--port", 0, *arguments), *words)

    @POSIX_ONLY
    def test_a_file_in_the_place_of_a_unix_socket_is_named(self, tmp_path):
        path = tmp_path / "precious"
        path.write_text("data")
        self.check(foal("example:app", "--uds", path), str(path), "--uds")
        assert path.read_text() == "data"

    @POSIX_ONLY
    @pytest.mark.skipif(
        hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may do everything"
    )
    def test_permission_denied_is_one_line(self, tmp_path):
        self.check(foal("example:app", "--port", 1), "127.0.0.1:1", "not allowed")
        tmp_path.chmod(0o500)
        self.check(foal("example:app", "--uds", tmp_path / "s"), str(tmp_path / "s"))


class TestH11:
    """behaviour.md §1: h11 missing or too old: `pip install "h11>=0.16"`."""

    HINT = 'pip install "h11>=0.16"'

    def test_a_missing_h11_is_one_line_and_code_3(self, tmp_path):
        missing = "raise ModuleNotFoundError(\"No module named 'h11'\", name='h11')"
        (tmp_path / "h11.py").write_text(missing)
        outcome = foal("example:app", "--port", 0, PYTHONPATH=str(tmp_path))
        assert (outcome.code, len(outcome.output.splitlines())) == (3, 1)
        assert self.HINT in outcome.output

    def test_an_old_h11_is_one_line_and_code_3(self, tmp_path):
        """h11 0.14's CVE-2025-43859; here it is the new one, with an old number."""
        shutil.copytree(Path(h11.__file__).parent, tmp_path / "h11")
        (tmp_path / "h11" / "_version.py").write_text('__version__ = "0.14.0"')
        outcome = foal("example:app", "--port", 0, PYTHONPATH=str(tmp_path))
        assert (outcome.code, len(outcome.errors)) == (3, 1), outcome.output
        assert self.HINT in outcome.output and "0.14.0" in outcome.output


# behaviour.md §1's list, in its order; a default where it is there or obvious.
LISTED = {
    "host": "127.0.0.1", "port": 8000, "uds": None, "fd": None, "backlog": ...,
    "workers": ..., "reload": False, "reload_dir": ..., "reload_include": ...,
    "reload_exclude": ..., "reload_delay": ...,
    "loop": "auto", "lifespan": "auto", "factory": False, "app_dir": ".",
    "root_path": "",
    "log_level": "info", "no_access_log": ..., "trace": ...,
    "header": None, "no_server_header": ..., "proxy_headers": False,
    "no_ws_deflate": ..., "no_pathsend": ...,
    "forwarded_allow_ips": ..., "limit_concurrency": None, "limit_max_requests": None,
    "timeout_keep_alive": 5, "timeout_request_head": 10, "timeout_request_body": 60,
    "timeout_graceful_shutdown": 10, "timeout_worker_healthcheck": ...,
    "ssl_certfile": None, "ssl_keyfile": None, "ssl_keyfile_password": None,
    "ws_max_size": 16 * 1024 * 1024, "ws_ping_interval": ..., "ws_ping_timeout": ...,
    "version": ..., "help": ...,
}  # fmt: skip


class TestOptions:
    """behaviour.md §1: names are uvicorn's; every option is a field of Config."""

    def test_help_lists_only_the_options_that_were_promised(self):
        outcome = foal("--help")
        flags = set(re.findall(r"(?<![\w-])--([a-z0-9-]+)", outcome.output))
        assert outcome.code == 0 and "MODULE:ATTRIBUTE" in outcome.output
        assert {flag.replace("-", "_") for flag in flags} <= set(LISTED)
        assert {"host", "port", "uds", "loop", "no-access-log", "version"} <= flags

    def test_defaults_are_those_that_were_promised(self):
        fields = {
            field.name: field.default for field in dataclasses.fields(server.Config)
        }
        for name in set(fields) & set(LISTED):
            assert LISTED[name] in (..., fields[name]), name

    def test_the_command_line_and_python_have_the_same_defaults(self):
        assert server.parse_args(["main:app"]) == server.Config("main:app")

    def test_every_option_of_the_command_line_is_one_of_python(self):
        arguments = (
            "main:app --host ::1 --port 0 --backlog 7 --loop selector --lifespan on "
            "--factory --app-dir elsewhere --root-path /api --log-level debug "
            "--no-access-log --header A:b --header C:d --no-server-header "
            "--proxy-headers --forwarded-allow-ips * --limit-concurrency 3 "
            "--limit-max-requests 4 --timeout-keep-alive 1.5"
        )
        assert server.parse_args(arguments.split()) == server.Config(
            "main:app", host="::1", port=0, backlog=7, loop="selector", lifespan="on",
            factory=True, app_dir="elsewhere", root_path="/api", log_level="debug",
            access_log=False, header=["A:b", "C:d"], server_header=False,
            proxy_headers=True, forwarded_allow_ips="*", limit_concurrency=3,
            limit_max_requests=4, timeout_keep_alive=1.5,
        )  # fmt: skip

    def test_version_names_what_a_bug_report_needs(self):
        outcome = foal("--version")
        assert outcome.code == 0 and len(outcome.output.splitlines()) == 1
        for word in (server.__version__, h11.__version__, sys.platform, "python"):
            assert word in outcome.output

    @pytest.mark.parametrize(
        "option",
        [
            {"port": -1},
            {"port": 65536},
            {"backlog": 0},
            {"lifespan": "maybe"},
            {"log_level": "loud"},
            {"limit_concurrency": 0},
            {"timeout_keep_alive": -0.1},
            {"timeout_keep_alive": float("nan")},
            {"header": ["NoColon"]},
            {"header": ["Bad Name: x"]},
            {"forwarded_allow_ips": "junk"},
        ],
    )
    def test_a_bad_value_from_python_is_a_value_error_in_one_line(self, option):
        with pytest.raises(ValueError) as info:
            server.Config("main:app", **option)
        assert "\n" not in str(info.value)

    def test_an_unknown_option_from_python_is_a_type_error(self):
        with pytest.raises(TypeError, match="frobnicate"):
            server.Config("main:app", frobnicate=1)


class TestFindingTheApp:
    """architecture.md, "Two names, one file": --app-dir first, examples last."""

    @pytest.mark.parametrize(
        "name",
        ["main:app", "package.web:app", "main:framework", "main:framework.__call__"],
    )
    def test_an_app_is_found_in_the_current_directory(self, folder, name):
        assert body_of(name, cwd=folder).decode() == name.split(":")[0]

    def test_an_app_is_found_in_the_app_dir(self, folder, tmp_path):
        assert body_of("main:app", "--app-dir", folder, cwd=tmp_path) == b"main"

    def test_a_factory_is_called_once_for_the_app(self, folder):
        assert body_of("main:create_app", "--factory", cwd=folder) == b"main"

    def test_the_bundled_examples_are_found_from_anywhere(self, tmp_path):
        assert body_of("example:app", cwd=tmp_path) == b"Hello, world!\n"

    def test_the_users_own_example_wins(self, tmp_path):
        (tmp_path / "example.py").write_text(MAIN.replace("__name__", "'mine'"))
        assert body_of("example:app", cwd=tmp_path) == b"mine"

    def test_a_workers_py_in_place_of_ours_is_named(self, folder, tmp_path):
        """`python -m` looks into the current folder first."""
        (tmp_path / "workers.py").write_text("")
        options = ("--app-dir", folder, "--port", 0, "--workers", 2)
        start, path = ("-m", "server"), str(ROOT)
        outcome = foal("main:app", *options, start=start, cwd=tmp_path, PYTHONPATH=path)
        assert (outcome.code, len(outcome.errors)) == (3, 1), outcome.output
        assert "workers.py has a name of foal's; rename it" in outcome.errors[0]

    def test_one_process_does_without_multiprocessing(self, tmp_path):
        """It takes 10 ms and 1 MiB; and an app's own workers.py stays the app's."""
        loaded = "repr([n for n in ('workers', 'multiprocessing') if n in sys.modules])"
        app = MAIN.replace("__name__", loaded).replace("\n", "import sys\n", 1)
        (tmp_path / "main.py").write_text(app)
        assert body_of("main:app", cwd=tmp_path) == b"[]"


TWINS = """
import asyncio, os, server
async def app(scope, receive, send):
    await receive()
    if scope["type"] == "lifespan":
        await send({"type": "lifespan.startup.complete"})
        _, writer = await asyncio.open_connection("127.0.0.1", int(os.environ["PORT"]))
        writer.write(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        await writer.drain()
        writer.close()
        await receive()
        return await send({"type": "lifespan.shutdown.complete"})
    try:
        await send({"type": "http.response.start", "status": 200})
        while True:  # until it is noticed that the client has left
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.sleep(0)
    except server.ClientDisconnected:
        print("the same class", flush=True)
    except OSError as exc:
        print("another class:", type(exc), flush=True)
"""


class TestTwoNamesOneFile:
    """architecture.md: `import server` in an app meets the classes that run it."""

    @pytest.mark.parametrize("option", ["-OO", "-P", "-I"])
    def test_it_runs_with_any_option_of_python(self, folder, option):
        """Without docstrings (PYTHONOPTIMIZE), or without the script's folder among the
        places of modules (PYTHONSAFEPATH)."""
        start, options = (option, SERVER), ("--port", 0, "--workers", 2)
        assert foal("--version", start=start).output.startswith("foal ")
        outcome = foal("leaves:app", *options, start=start, cwd=folder)
        assert outcome.code == 3 and "no configuration" in outcome.output

    @pytest.mark.parametrize(
        "start",
        [(SERVER,), ("-m", "server")],
        ids=["python server.py", "python -m server"],
    )
    def test_an_app_that_imports_server_can_catch_its_exceptions(self, tmp_path, start):
        """An app that is its own client: it leaves, and looks at what send raises."""
        (tmp_path / "twins.py").write_text(TWINS)
        port = str(free_port())
        options = ("--app-dir", tmp_path, "--port", port, "--limit-max-requests", 1)
        outcome = foal("twins:app", *options, start=start, PORT=port)
        assert outcome.code == 0 and "the same class" in outcome.output, outcome.output


EARLY = """
import os, socket
with socket.create_connection(("127.0.0.1", int(os.environ["PORT"])), 10):
    print("connected during import", flush=True)
async def app(scope, receive, send):
    assert scope["type"] == "lifespan"
    print("the app starts up", flush=True)
    await send({"type": "lifespan.startup.complete"})
    await receive(), await receive()
    await send({"type": "lifespan.shutdown.complete"})
"""


class TestStartUp:
    """behaviour.md §1: start-up prints what a newcomer needs."""

    def test_the_first_lines_name_version_loop_address_and_how_to_stop(self):
        with Process("example:app", "--port", 0) as p:
            p.wait_for(rf" foal {re.escape(server.__version__)}, .*python.*, h11 \d")
            p.wait_for(r"loop: .*EventLoop, because .*choice")
            found = p.wait_for(
                r"listening on http://127\.0\.0\.1:(\d+) .*Ctrl-C to stop"
            )
            with p.connect(int(found[1])) as client:  # bugs.md 5: it is the real port
                client.send(GET)
                assert client.response()[0] == 200

    def test_the_socket_listens_before_the_app_is_imported(self, tmp_path):
        """architecture.md, picture 2; and the address is printed when it answers."""
        (tmp_path / "early.py").write_text(EARLY)
        port = str(free_port())
        options = ("--app-dir", tmp_path, "--port", port)
        with Process("early:app", *options, env={"PORT": port}) as p:
            assert p.port() == int(port)
            p.interrupt()
            assert p.exit_code() == 0
        places = [
            p.output.index(words)
            for words in (
                "connected during import",
                "the app starts up",
                "listening on",
            )
        ]
        assert places == sorted(places), p.output

    def test_a_failed_startup_is_code_3_and_no_address(self, tmp_path):
        failing = """
async def app(scope, receive, send):
    await send({"type": "lifespan.startup.failed", "message": "no database"})
"""
        (tmp_path / "failing.py").write_text(failing)
        outcome = foal("failing:app", "--port", 0, cwd=tmp_path)
        assert (outcome.code, len(outcome.errors)) == (3, 1), outcome.output
        assert "no database" in outcome.errors[0]
        assert "listening" not in outcome.output


class Pieces(io.StringIO):
    """A text stream that keeps apart what was written at once."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return len(text)


class TestLogLines:
    """A line costs a system call; those about the requests of one turn share theirs."""

    def handler(self, monkeypatch) -> tuple[server.LogHandler, Pieces]:
        stream = Pieces()
        monkeypatch.setattr("sys.stderr", stream)
        return server.LogHandler(), stream

    def record(self, name: str, text: str) -> logging.LogRecord:
        return logging.LogRecord(name, logging.INFO, "", 0, text, (), None)

    def test_lines_about_requests_leave_together_and_in_order(self, monkeypatch):
        handler, stream = self.handler(monkeypatch)

        async def two_turns():
            for text in ("one", "two"):
                handler.handle(self.record("server.access", text))
            assert stream.pieces == []
            await asyncio.sleep(0)
            assert stream.pieces == ["one\ntwo\n"]
            handler.handle(self.record("server.access", "three"))
            handler.handle(self.record("server", "four"))  # and nothing waits behind it
            assert stream.pieces[1:] == ["three\nfour\n"]

        asyncio.run(two_turns())

    @pytest.mark.parametrize("length", [100, 300])
    def test_a_pipe_takes_them_in_one_piece(self, monkeypatch, length):
        """Else those of two workers would mix: 4 KiB (pipe(7), PIPE_BUF)."""
        handler, stream = self.handler(monkeypatch)

        async def one_turn():
            for _ in range(100):
                handler.handle(self.record("server.access", "x" * length))
            handler.handle(self.record("server", "the end"))

        asyncio.run(one_turn())
        assert "".join(stream.pieces) == ("x" * length + "\n") * 100 + "the end\n"
        assert max(map(len, stream.pieces)) <= 4096

    def test_any_other_line_leaves_at_once(self, monkeypatch):
        handler, stream = self.handler(monkeypatch)
        handler.handle(self.record("server", "no loop runs here"))
        assert stream.pieces == ["no loop runs here\n"]

    def test_a_line_that_cannot_be_made_is_no_error_of_who_logs(self, monkeypatch):
        """A repr of the app's may fail; the request that it is about goes on."""
        handler, stream = self.handler(monkeypatch)

        class Shy:
            def __repr__(self):
                raise ValueError("no")

        args = ("server", logging.INFO, "", 0, "ended with %r", (Shy(),), None)
        handler.handle(logging.LogRecord(*args))
        handler.handle(self.record("server", "next"))
        assert "ValueError: no" in "".join(stream.pieces)  # as logging has it
        assert stream.pieces[-1] == "next\n"

    @contextlib.contextmanager
    def unheard(self, *before):
        """A client of a server whose log goes into a pipe without a reader; what is
        started may be another command, `before` it."""
        [listener] = sockets.bind_tcp("127.0.0.1", 0, 5)
        fd = str(listener.fileno())
        command = [*before, sys.executable, str(SERVER), "example:app", "--fd", fd]
        popen = {"stderr": subprocess.PIPE, "pass_fds": [int(fd)], "env": environment()}
        with listener, subprocess.Popen(command, **popen) as process:
            process.stderr.close()
            try:
                with Client(listener.getsockname()) as client:
                    yield client
            finally:
                process.kill()

    @POSIX_ONLY
    def test_a_server_without_standard_error_answers_what_is_wrong(self):
        """Its warnings and errors would have colours, on a terminal."""
        with self.unheard("sh", "-c", 'exec "$@" 2>&-', "sh") as client:
            client.send(b"GET /\r\n\r\n")
            assert client.response()[0] == 400

    @POSIX_ONLY
    def test_a_server_whose_log_nobody_reads_serves(self):
        """What it says goes into a pipe whose reader has left."""
        with self.unheard() as client:
            for _ in range(2):
                client.send(GET)
                assert client.response()[0] == 200


@POSIX_ONLY
class TestColours:
    """behaviour.md §1: colours only on a terminal, and NO_COLOR is respected."""

    def on_a_terminal(self, **env) -> str:
        """What a terminal sees of a start that fails."""
        master, terminal = os.openpty()
        clean = {n: v for n, v in environment().items() if n != "NO_COLOR"}
        command = [sys.executable, str(SERVER), "no_such_module:app", "--port", "0"]
        with subprocess.Popen(
            command, stderr=terminal, env={**clean, **env}
        ) as process:
            os.close(terminal)
            seen = b""
            with contextlib.suppress(OSError):  # Linux ends a terminal with EIO
                while data := os.read(master, 4096):
                    seen += data
            os.close(master)
            assert process.wait(PATIENCE) == 3
        assert b"no_such_module" in seen
        return seen.decode()

    def test_an_error_is_coloured_on_a_terminal(self):
        assert "\x1b[" in self.on_a_terminal()

    def test_no_color_is_respected(self):
        assert "\x1b" not in self.on_a_terminal(NO_COLOR="1")

    def test_no_color_must_not_be_empty(self):
        """no-color.org: "when present and not an empty string"."""
        assert "\x1b[" in self.on_a_terminal(NO_COLOR="")

    def test_a_file_gets_no_colours(self):
        assert "\x1b" not in foal("no_such_module:app", "--port", 0, NO_COLOR="").output


class Recorder:
    """An app that notes what happens, and answers a request when it is released."""

    def __init__(self, on_startup=lambda: None):
        self.seen = []
        self.on_startup = on_startup
        self.asked, self.release = threading.Event(), threading.Event()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            while (event := (await receive())["type"]) != "lifespan.shutdown":
                self.seen.append(event)
                await send({"type": event + ".complete"})
                self.on_startup()
            self.seen.append(event)
            return await send({"type": event + ".complete"})
        self.asked.set()
        await asyncio.to_thread(self.release.wait, PATIENCE)
        self.seen.append("answered")
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})


LIFE = ["lifespan.startup", "lifespan.shutdown"]
NUMBERS = [signal.SIGINT, signal.SIGTERM]


class TestRun:
    """From Python: `server.run(app_or_string, **options)` returns the exit code."""

    def test_a_run_that_is_stopped_returns_0_and_gives_the_signals_back(self):
        before = [signal.getsignal(number) for number in NUMBERS]
        app = Recorder(on_startup=lambda: signal.raise_signal(signal.SIGINT))
        assert server.run(app, port=0) == 0
        assert app.seen == LIFE
        assert [signal.getsignal(number) for number in NUMBERS] == before

    def test_an_app_whose_call_is_a_slot_is_one(self):
        """sentry_sdk's SentryAsgiMiddleware; inspect refuses it before Python 3.13."""

        class Middleware:
            __slots__ = ("__call__",)

            def __init__(self, app):
                self.__call__ = app

        app = Recorder(on_startup=lambda: signal.raise_signal(signal.SIGINT))
        assert server.run(Middleware(app), port=0) == 0
        assert app.seen == LIFE

    def test_a_name_is_as_good_as_an_app(self, folder, monkeypatch, log):
        monkeypatch.setattr(sys, "path", sys.path[:])
        options = {"app_dir": str(folder), "port": 0}
        assert server.run("main:number", **options) == 3
        assert "main:number is not an ASGI 3 application" in log.text
        assert server.run("no_such_module:app", **options) == 3
        assert 'no module "no_such_module"' in log.text

    def test_a_busy_port_returns_3_and_leaves_the_other_server_alone(self, log):
        [listener] = sockets.bind_tcp("127.0.0.1", 0, 1)
        with listener:
            assert server.run(Recorder(), port=listener.getsockname()[1]) == 3
            Client(listener.getsockname()).sock.close()
        assert "in use" in log.text

    def test_a_mistake_in_the_options_is_raised(self):
        with pytest.raises(ValueError, match="--port"):
            server.run(Recorder(), port=-1)
        with pytest.raises(TypeError, match="frobnicate"):
            server.run(Recorder(), frobnicate=True)

    def test_a_run_in_another_thread_leaves_signals_alone(self):
        """Python delivers signals to the main thread alone."""
        app, codes, port = Recorder(), [], free_port()
        app.release.set()

        def run():
            codes.append(server.run(app, port=port, limit_max_requests=1))

        before = [signal.getsignal(number) for number in NUMBERS]
        started = threading.Event()
        app.on_startup = started.set
        thread = threading.Thread(target=run)
        thread.start()
        assert started.wait(PATIENCE)
        assert [signal.getsignal(number) for number in NUMBERS] == before
        with Client(("127.0.0.1", port)) as client:
            client.send(GET)
            assert client.response()[0] == 204
        thread.join(PATIENCE)
        assert codes == [0]

    def test_a_run_in_another_thread_never_ends_the_process(self):
        """An executor's job may outlast a stop; pytest ended with code 0 by it, and
        with half of its tests."""
        with ThreadPoolExecutor() as threads:
            timer = threads.submit(server.leave_within, 3600.0, 7).result()
        assert not timer.is_alive()
        timer = server.leave_within(3600.0, 7)
        assert timer.is_alive()
        timer.cancel()


async def cancel_for_good(task: asyncio.Task) -> None:
    """Again and again, as anyio does; and nothing goes on without it."""
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE):
        while asyncio.all_tasks() != {asyncio.current_task()}:
            await asyncio.sleep(0)
    assert task.cancelled()


class TestServe:
    """From Python: an async form to use inside a running loop."""

    def test_cancelling_it_stops_gracefully(self):
        """The request in flight is answered, then comes the lifespan's shutdown."""
        app, port = Recorder(), free_port()

        async def main():
            started = asyncio.Event()
            app.on_startup = started.set
            task = asyncio.create_task(server.serve(app, port=port))
            await asyncio.wait_for(started.wait(), PATIENCE)
            client = await asyncio.to_thread(Client, ("127.0.0.1", port))
            with client:
                client.send(GET)
                assert await asyncio.to_thread(app.asked.wait, PATIENCE)
                task.cancel()
                asyncio.get_running_loop().call_soon(app.release.set)
                with pytest.raises(asyncio.CancelledError):
                    await task
                return await asyncio.to_thread(client.read_all)

        answer = asyncio.run(main())
        assert answer.startswith(b"HTTP/1.1 204 ") and b"connection: close" in answer
        assert app.seen == [LIFE[0], "answered", LIFE[1]]

    @pytest.mark.parametrize("when", ["it starts up", "it is stopping"])
    def test_cancelling_it_when(self, when):
        """Nothing goes on without it. Cancelled again, as anyio does, it ends at once."""
        log, port = [], free_port()

        async def app(scope, receive, send):
            if scope["type"] == "lifespan":
                await receive()
                if when == "it is stopping":
                    await send({"type": "lifespan.startup.complete"})
                try:
                    started.set()
                    await asyncio.Event().wait()
                finally:
                    log.append("the lifespan ends")
            await send({"type": "http.response.start", "status": 204})
            await send({"type": "http.response.body"})

        async def main():
            nonlocal started
            started = asyncio.Event()
            task = asyncio.create_task(server.serve(app, port=port))
            await asyncio.wait_for(started.wait(), PATIENCE)
            client = await asyncio.to_thread(Client, ("127.0.0.1", port))
            with client:
                if when == "it is stopping":
                    client.send(GET + b"G")  # half of the next one, which it waits for
                    assert (await asyncio.to_thread(client.response))[0] == 204
                await cancel_for_good(task)
                assert log == ["the lifespan ends"]
                with contextlib.suppress(ConnectionError):
                    assert await asyncio.to_thread(client.read_all) == b""

        started = None
        asyncio.run(main())

    @pytest.mark.parametrize("what", ["request", "handshake"])
    def test_cancelling_it_again_ends_a(self, what):
        """Also one that never looks up. Nobody would be left to end it later."""
        if what == "handshake" and os.name == "nt":
            pytest.skip("a proactor accepts by itself")
        port, certificate = free_port(), ROOT / "tests" / "certificate.pem"
        options = {"timeout_request_head": 3600.0}  # it shall not end by itself
        if what == "handshake":
            options["ssl_certfile"] = str(certificate)
        doing = {"request": "RequestResponseCycle.run", "handshake": "Server.greet"}[what]

        async def app(scope, receive, send):
            await asyncio.Event().wait()

        async def main():
            serving = server.serve(app, port=port, lifespan="off", **options)
            task = asyncio.create_task(serving)
            await asyncio.sleep(0)  # it listens
            client = await asyncio.to_thread(Client, ("127.0.0.1", port))
            with client:
                if what == "request":
                    client.send(GET)
                async with asyncio.timeout(PATIENCE):
                    while not any(doing in repr(each) for each in asyncio.all_tasks()):
                        await asyncio.sleep(0)
                await cancel_for_good(task)

        asyncio.run(main())

    def test_signals_belong_to_whoever_runs_the_loop(self):
        async def main():
            started = asyncio.Event()
            before = [signal.getsignal(number) for number in NUMBERS]
            app = Recorder(on_startup=started.set)
            task = asyncio.create_task(server.serve(app, port=0))
            await asyncio.wait_for(started.wait(), PATIENCE)
            assert [signal.getsignal(number) for number in NUMBERS] == before
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [signal.getsignal(number) for number in NUMBERS] == before

        asyncio.run(main())

    def test_what_cannot_start_raises(self, monkeypatch):
        monkeypatch.setattr(sys, "path", sys.path[:])
        [listener] = sockets.bind_tcp("127.0.0.1", 0, 1)
        with listener:
            port = listener.getsockname()[1]
            with pytest.raises(server.StartupError, match="in use"):
                asyncio.run(server.serve(Recorder(), port=port))
        with pytest.raises(server.StartupError, match="no module"):
            asyncio.run(server.serve("no_such_module:app", port=0))
        with pytest.raises(ValueError, match="--port"):
            asyncio.run(server.serve(Recorder(), port=-1))

    def test_what_cannot_start_gives_its_port_back(self):
        async def app(scope, receive, send):
            await send({"type": "lifespan.startup.failed", "message": "no database"})

        port = free_port()
        for _ in range(2):
            with pytest.raises(server.StartupError, match="no database"):
                asyncio.run(server.serve(app, port=port))
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(("127.0.0.1", port))
