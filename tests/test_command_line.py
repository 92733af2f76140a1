"""Chapters 1 and 2: what was asked for, and who will do it.

Every mistake of a newcomer is one line and an exit code. Where a process would show
nothing more, the tests ask `server.main`, which is all that the program calls.
"""

import asyncio
import dataclasses
import logging
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import h11
import pytest
from conftest import PATIENCE, POSIX_ONLY, ROOT, Process, fetch, free_port, refuses

import server
import sockets
import workers

MODES = ["", "--workers 2", "--reload"]
MAIN = """
import asyncio, logging, signal, sys
async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError("no lifespan")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": __name__.encode()})
async def interrupts(scope, receive, send):
    asyncio.get_running_loop().call_soon(signal.default_int_handler, 2, None)
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
class Slotted:  # sentry_sdk's middleware; inspect refuses it before Python 3.13
    __slots__ = ("__call__",)
slotted = Slotted()
slotted.__call__ = app
def broken_factory():
    raise RuntimeError("the factory's own words")
def false_factory():
    return wsgi
number = 42
"""
FAILING = """
async def app(scope, receive, send):
    await send({"type": "lifespan.startup.failed", "message": "no database"})
"""


def foal(*arguments, **process) -> tuple[int, str, list[str]]:
    """Run the command line to its end: the exit code, what it said, and those lines of
    it that are no news of the start."""
    with Process(*arguments, **process) as p:
        code = p.exit_code()
    return code, p.output, [line for line in p.lines if " INFO " not in line]


def body_of(app, *options, **process) -> str:
    """What an app answers, served by a real process."""
    with Process(app, "--port", 0, *options, **process) as p:
        return fetch(("127.0.0.1", p.port()))[2].decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A newcomer's folder: one app, and every way to get it wrong."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "package").mkdir()
    modules = {
        "main": MAIN, "failing": FAILING, "raises": "1 / 0", "syntax": "def app(:",
        "needs_more": "import no_such_dependency", "leaves": "import sys\nsys.exit('no config')",
        "package/__init__": "", "package/web": MAIN,
        "package/needs_more": "from package import no_such_part",
    }  # fmt: skip
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return folder


@pytest.fixture
def main(folder, monkeypatch, log):
    """server.main in that folder; what it imports is forgotten afterwards. Returns the
    exit code and those lines of the log that are no news."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", sys.path[:])
    modules = set(sys.modules)

    def main(*arguments: str) -> tuple[int, list[str]]:
        code = server.main(["--port", "0", *arguments])
        return code, [r.getMessage() for r in log.records if r.levelno > logging.INFO]

    yield main
    for name in set(sys.modules) - modules:
        del sys.modules[name]


class TestMistakes:
    """One line that says what is wrong, and exit code 2 or 3."""

    @pytest.mark.parametrize(
        "arguments",
        [
            "", "main:app main:app", "main:app --frobnicate",
            "main:app --timeout-worker-healthcheck 0.5", "main:app --por 0",  # no abbreviation
            "main:app --port", "main:app --port abc", "main:app --port -1", "main:app --fd -1",
            "main:app --backlog 0", "main:app --workers 0", "main:app --ws-max-size 0",
            "main:app --limit-concurrency 0", "main:app --root-path http://x/",
            "main:app --timeout-keep-alive -1", "main:app --timeout-request-head nan",
            "main:app --timeout-graceful-shutdown x", "main:app --loop frobnicate",
            "main:app --lifespan maybe", "main:app --log-level loud", "main:app --root-path api",
            "main:app --reload-dir nope", "main:app --ssl-keyfile key.pem",
            "main:app --forwarded-allow-ips junk", "main:app --forwarded-allow-ips 1.2.3.4/99",
        ],
    )  # fmt: skip
    def test_a_bad_argument_is_one_line_and_code_2(self, capfd, arguments):
        code = server.main(arguments.split())
        output = "".join(capfd.readouterr())
        assert (code, len(output.splitlines())) == (2, 1), output
        assert output.startswith("foal: ") and "--help" in output
        assert (arguments.split()[1:2] or ["MODULE:ATTRIBUTE"])[0] in output

    @pytest.mark.parametrize(
        "arguments, words",
        [
            ("nope:app", ['no module "nope"', "--app-dir"]),
            ("package.nope:app", ['no module "package.nope"']),
            ("main:app --app-dir no-such-folder", ["no-such-folder", "--app-dir"]),
            ("main:zzz", ["main.py", '"zzz"']), ("main", ["MODULE:ATTRIBUTE", "main:app"]),
            ("main.py:app", ["MODULE:ATTRIBUTE", "main:app"]),
            ("main:wsgi", ["WSGI"]), ("main:wsgi_object", ["WSGI"]),
            ("main:false_factory --factory", ["WSGI"]), ("main:ASGI2", ["ASGI 2"]),
            ("main:create_app", ["--factory"]), ("main:number", ["main:number"]),
            ("main:Framework", ["--factory"]),  # a class that is not yet called
            ("failing:app", ["the app failed to start: no database"]),
            ("main:app --lifespan on", ["NotImplementedError: no lifespan"]),
            ("main:interrupts", ["the app raised KeyboardInterrupt"]),
            ("main:app --loop asyncio:nope", ["asyncio:nope"]),
            ("main:app --ssl-certfile nope.pem", ["nope.pem"]),
            ("main:app --host 192.0.2.1", ["192.0.2.1", "--host"]),  # RFC 5737: nobody's
            ("main:app --fd 250", ["--fd 250"]), ("main:app --port 65536", ["65536"]),
            pytest.param("main:app --uds main.py", ["main.py", "--uds"], marks=POSIX_ONLY),
        ],
    )  # fmt: skip
    def test_what_cannot_start_is_one_line_and_code_3(self, main, arguments, words):
        code, lines = main(*arguments.split())
        assert code == 3 and lines, lines
        assert "\n" not in lines[-1] and all(word in lines[-1] for word in words), lines
        assert len(lines) == 1 + ("--lifespan" in arguments)  # with the app's traceback

    def test_a_port_in_use_is_named_before_the_app_is_imported(self):
        with sockets.bind_tcp("127.0.0.1", 0, 1)[0] as listener:
            code, output, lines = foal("nope:app", "--port", port := listener.getsockname()[1])
        assert (code, len(lines)) == (3, 1), output
        assert re.search(rf"127\.0\.0\.1:{port} .*in use.*--port", lines[0])

    @pytest.mark.parametrize("kind", ["missing", "too old"])
    def test_h11_is_missing_or_too_old(self, tmp_path, kind):
        """The old one has CVE-2025-43859. Here it is the new one, with an old number."""
        if kind == "missing":
            text = "raise ModuleNotFoundError(\"No module named 'h11'\", name='h11')"
            (tmp_path / "h11.py").write_text(text)
        else:
            shutil.copytree(Path(h11.__file__).parent, tmp_path / "h11")
            (tmp_path / "h11" / "_version.py").write_text('__version__ = "0.14.0"')
        code, output, lines = foal("example:app", env={"PYTHONPATH": str(tmp_path)})
        assert (code, len(lines)) == (3, 1), output
        assert 'pip install "h11>=0.16"' in lines[0] and (kind == "missing" or "0.14" in lines[0])

    @pytest.mark.parametrize(
        "app, words",
        [
            ("needs_more:app", "No module named 'no_such_dependency' in needs_more.py"),
            ("syntax:app", "SyntaxError in syntax.py, line 1"),
            ("raises:app", "ZeroDivisionError: division by zero in raises.py"),
            ("leaves:app", "SystemExit: no config"),
            ("package.needs_more:app", "no_such_part"),
            ("main:broken_factory --factory", "RuntimeError: the factory's own words"),
        ],
    )
    def test_an_error_in_the_app_is_its_traceback_and_then_a_sentence(self, folder, app, words):
        """Without a frame of ours, and without the repr of an exception."""
        code, output, lines = foal(*app.split(), "--port", 0, cwd=folder)
        files = re.findall(r'File "([^"]+)", line', output)
        assert code == 3 and files and Path(files[0]).stem in app, output
        assert not [f for f in files if f.endswith("server.py") or "importlib" in f]
        assert words in lines[-1] and " ERROR " in lines[-1]
        assert output.count("Traceback") == (app != "syntax:app")
        assert not re.search(r"\w(Error|Exit)\(|no module", lines[-1])


def parsed(line: str) -> server.Config:
    return server.Config(**vars(server.make_parser().parse_args(line.split())))


class TestOptions:
    """Every option is a field of Config. (README has them all: see test_the_book.py.)"""

    def test_help_names_every_option(self):
        names = {field.name for field in dataclasses.fields(server.Config)[1:]}
        expected = {name.replace("_", "-") for name in names} - {"access-log", "server-header"}
        expected |= {"no-access-log", "no-server-header", "version", "help"}
        code, output, _ = foal("--help")
        assert code == 0 and "MODULE:ATTRIBUTE" in output
        assert set(re.findall(r"(?m)^  (?:-h, )?--([a-z-]+)", output)) == expected
        assert re.search(r"(?s)--host TEXT\s.*--port N\s.*--timeout-keep-alive SECONDS\s", output)

    def test_version_names_what_a_bug_report_needs(self):
        code, output, _ = foal("--version")
        words = (server.__version__, h11.__version__, sys.platform, "python")
        assert code == 0 and "\n" not in output and all(word in output for word in words)

    def test_a_line_of_options_is_a_config(self):
        assert parsed("main:app") == server.Config("main:app")
        line = "main:app --host ::1 --fd 7 --workers 2 --reload-include a --reload-include b"
        line += " --factory --no-access-log --forwarded-allow-ips * --timeout-keep-alive 1.5"
        assert parsed(line) == server.Config(
            "main:app", host="::1", fd=7, workers=2, reload_include=["a", "b"], factory=True,
            access_log=False, forwarded_allow_ips="*", timeout_keep_alive=1.5,
        )  # fmt: skip

    @pytest.mark.parametrize(
        "given, kept", [("/", ""), ("/api", "/api"), ("/api/", "/api"), ("/a/b//", "/a/b")]
    )
    def test_a_root_path_does_not_end_with_a_slash(self, given, kept):
        """The app's own path is appended to it. (Without one at its start: TestMistakes.)"""
        assert server.Config("main:app", root_path=given).root_path == kept

    def test_a_mistake_in_python_is_an_exception_in_one_line(self):
        with pytest.raises(ValueError, match=r"^--port [^\n]*$"):
            server.run("main:app", port=-1)
        with pytest.raises(TypeError, match="frobnicate"):
            server.run("main:app", frobnicate=True)


class TestFindingTheApp:
    """--app-dir first, examples last."""

    @pytest.mark.parametrize(
        "name, body",
        [
            ("main:app", "main"), ("package.web:app", "package.web"), ("main:framework", "main"),
            ("main:framework.__call__", "main"), ("main:create_app --factory", "main"),
            ("web:app --app-dir package", "web"), ("main:slotted", "main"),
            ("example:app", "Hello, world!\n"),
        ],
    )  # fmt: skip
    def test_an_app_is_found_in_its_folder_or_among_our_examples(self, folder, name, body):
        assert body_of(*name.split(), cwd=folder) == body

    @pytest.mark.parametrize("mode", MODES)
    def test_an_app_that_imports_server_meets_the_classes_that_run_it(self, tmp_path, mode):
        found = "str(any(isinstance(each, server.Server) for each in gc.get_objects()))"
        app = MAIN.replace("import", "import gc, server,", 1).replace("__name__", found)
        (tmp_path / "main.py").write_text(app)
        assert body_of("main:app", *mode.split(), cwd=tmp_path) == "True"

    @pytest.mark.parametrize("option", ["-OO", "-P", "-I", "-m"])
    def test_it_runs_with_any_option_of_python(self, folder, option):
        """Without docstrings (PYTHONOPTIMIZE), without the script's folder among the
        places of modules (PYTHONSAFEPATH), or as a module."""
        start = (option, "server" if option == "-m" else ROOT / "server.py")
        use = {"start": start, "cwd": folder, "env": {"PYTHONPATH": str(ROOT) * (option == "-m")}}
        code, output, _ = foal("leaves:app", "--port", 0, "--workers", 2, **use)
        assert code == 3 and "no config" in output and " foal 0" in output

    def test_one_process_does_without_multiprocessing(self, tmp_path):
        """It would take 10 ms and 1 MiB."""
        loaded = "repr([n for n in ('workers', 'multiprocessing') if n in sys.modules])"
        (tmp_path / "main.py").write_text(MAIN.replace("__name__", loaded))
        assert body_of("main:app", cwd=tmp_path) == "[]"


EARLY = """
import os, socket
with socket.create_connection(("127.0.0.1", int(os.environ["PORT"])), 10):
    print("connected during import", flush=True)
async def app(scope, receive, send):
    print("the app starts up", flush=True)
    await send({"type": "lifespan.startup.complete"})
    await receive(), await receive()
    await send({"type": "lifespan.shutdown.complete"})
"""


class TestLog:
    """What start-up and stop print, and where the log goes."""

    def test_the_start_names_version_loop_address_and_how_to_stop(self, folder):
        with Process("main:app", "--port", 0, cwd=folder) as p:
            p.wait_for(rf" INFO +foal {re.escape(server.__version__)}, .*python.*, h11 \d")
            p.wait_for(r"loop: .*EventLoop, because .*choice")
            p.wait_for(r"lifespan: the app does not use it \(.*NotImplementedError: no li")
            port = p.wait_for(r"listening on http://127\.0\.0\.1:(\d+) \(Ctrl-C to stop\)")[1]
            assert fetch(("127.0.0.1", int(port)))[0] == 200  # the real port, not 0
            p.wait_for(r' INFO +127\.0\.0\.1:\d+ "GET / HTTP/1\.1" 200 4 .*\d ms')

    @pytest.mark.parametrize("mode", MODES)
    def test_stopped_is_the_last_line_in_every_mode(self, folder, mode):
        with Process("main:app", "--port", 0, *mode.split(), cwd=folder) as p:
            p.port()
            p.interrupt()
            assert p.exit_code() == 0
        assert re.fullmatch(r"[\d :,-]+ INFO +stopped", p.lines[-1]), p.output
        assert "stopping" in p.output and "Traceback" not in p.output

    @pytest.mark.parametrize("mode", MODES)
    def test_it_listens_before_the_import_and_says_so_when_it_answers(self, tmp_path, mode):
        (tmp_path / "early.py").write_text(EARLY)
        options = ("--port", port := free_port(), *mode.split())
        with Process("early:app", *options, cwd=tmp_path, env={"PORT": str(port)}) as p:
            p.wait_for("connected during import")
            p.wait_for("the app starts up")
            assert p.port() == port

    @pytest.mark.parametrize("level", ["warning", "error"])
    def test_lines_can_be_left_out(self, folder, level):
        code, output, _ = foal("failing:app", "--port", 0, "--log-level", level, cwd=folder)
        assert code == 3 and output.count(" ERROR ") == 1 and "\n" not in output

    def test_the_access_log_can_be_left_out(self, folder):
        with Process("main:app", "--port", 0, "--no-access-log", cwd=folder) as p:
            fetch(("127.0.0.1", p.port()))
            p.interrupt()
            assert p.exit_code() == 0 and "GET /" not in p.output

    def test_a_logger_of_the_app_is_its_own(self, tmp_path):
        """An app's getLogger("server.db") lost its records to a handler of ours."""
        text = "log = logging.getLogger('server.db')\nlog.setLevel(logging.DEBUG)\n"
        text += "log.addHandler(logging.StreamHandler())\nlog.debug('a record of the app')\n"
        (tmp_path / "main.py").write_text(MAIN + text)
        with Process("main:app", "--port", 0, cwd=tmp_path) as p:
            p.wait_for("^a record of the app$")
        ours = (server.logger, server.access_logger, workers.logger)
        assert [each.name for each in ours] == ["foal", "foal.access", "foal.workers"]

    @POSIX_ONLY
    def test_a_server_without_standard_error_answers(self):
        close = "import os, sys; os.close(2); os.execv(p := sys.executable, [p, *sys.argv[1:]])"
        with sockets.bind_tcp("127.0.0.1", 0, 5)[0] as listener:
            how = {"start": ("-c", close, ROOT / "server.py"), "pass_fds": [listener.fileno()]}
            with Process("example:app", "--fd", listener.fileno(), **how):
                assert fetch(listener.getsockname())[0] == 200


def handlers() -> list:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


class TestPython:
    """From Python: `server.run(app, **options)`. For `serve` see test_server.py."""

    def test_run_returns_0_when_stopped_and_gives_the_signals_back(self, log):
        async def app(scope, receive, send):
            await receive()
            await send({"type": "lifespan.startup.complete"})
            signal.raise_signal(signal.SIGINT)
            assert (await receive())["type"] == "lifespan.shutdown"
            await send({"type": "lifespan.shutdown.complete"})

        before = handlers()
        assert server.run(app, port=0) == 0
        assert handlers() == before and log.messages[-1] == "stopped"

    def test_run_in_another_thread_leaves_signals_alone(self, log):
        """Python delivers signals to the main thread only."""
        seen, before = [], handlers()

        async def app(scope, receive, send):
            seen.append(handlers())
            await send({"type": "lifespan.startup.failed", "message": ""})

        thread = threading.Thread(target=lambda: seen.append(server.run(app, port=0)))
        thread.start()
        thread.join(PATIENCE)
        assert seen == [before, 3]

    def test_run_in_a_script_needs_a_guard_for_workers_only(self, folder, tmp_path):
        """A worker imports the script that started it (test_workers.py)."""
        run = f"import server\nserver.run('main:app', app_dir={str(folder)!r}, port=0)\n"
        (tmp_path / "script.py").write_text(run)
        process = {"start": (tmp_path / "script.py",), "env": {"PYTHONPATH": str(ROOT)}}
        with Process(**process) as p:
            assert fetch(("127.0.0.1", p.port()))[2] == b"main"

    def test_serve_raises_if_it_cannot_start_and_gives_the_port_back(self, monkeypatch):
        monkeypatch.setattr(sys, "path", sys.path[:])
        with sockets.bind_tcp("127.0.0.1", 0, 1)[0] as listener:
            port = listener.getsockname()[1]
            with pytest.raises(OSError, match="in use"):
                asyncio.run(server.serve(print, port=port))
        for app, words in [(42, "ASGI 3"), ("nope:app", "no module")] * 2:
            with pytest.raises(server.StartupError, match=words):
                asyncio.run(server.serve(app, port=port))
        assert refuses(("127.0.0.1", port))
