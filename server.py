"""foal: a complete ASGI server that a person can read.

Owns: the command line, the composition of the four leaves, the life of a server, and
    the protocols: HTTP/1.1 by h11, TLS by asyncio, WebSocket, ASGI, lifespan.
Must not know: how an address is bound, why an event loop was chosen, how the app's code
    is found, when a worker is replaced. The leaves decide these.

Read beside: ASGI specification (main, www, lifespan); RFC 9112, RFC 9110 and RFC 6455;
    h11 docs, "API documentation"; Python docs, asyncio — "Transports and Protocols".

The bug that shaped it: `python server.py` loads this file under the name __main__. An
    app that says `import server` would load it again, with other classes under the same
    names. So the first lines import this file under its own name, and run that copy.

Contents, outermost first. Read down until you have what you came for.
    1  Command line      main, make_parser, Config
    2  Composition       run, supervise, worker_main, serve_here, serve, load_app
    3  Server            Server
    4  Lifespan          Lifespan
    5  Connection        Wire, Connection
    6  Head              find_head, check_framing, make_scope, check_request
    7  Request           Exchange, make_response
    8  WebSocket         WebSocket
    9  Frames            encode_frame, FrameReader
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import codecs
import collections
import contextvars
import dataclasses
import email.utils
import enum
import functools
import hashlib
import http
import inspect
import ipaddress
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn
from urllib.parse import unquote

try:
    import h11
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    # A newcomer's first mistake deserves a sentence instead of a traceback.
    how = f'run: {sys.executable} -m pip install "h11>=0.16"'
    print(f"foal needs h11; {how}", file=sys.stderr)
    sys.exit(3)

if __name__ == "__main__":
    # Run the importable copy of this file, so that apps and workers meet its classes.
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # python -P lacks it
    import server

    sys.modules["__main__"] = server  # workers import it by name, already compiled
    sys.exit(server.main())

import loops
import reload
import sockets

__version__ = "0.1.0"

# The types of the ASGI specification: an app is called with a scope and two functions.
Scope = Message = dict[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
# A type of our own: a part of a conversation. It yields deadlines (chapter 5).
Wait = Generator[float, None, Any]

logger = logging.getLogger("foal")
access_logger = logging.getLogger("foal.access")


class StartupError(Exception):
    """The server could not start. The message is one line that says what to do. The
    cause, if there is one, is the app's own exception; its traceback is shown first."""


class ClientDisconnected(OSError):
    """`send` raises this once the client has left (ASGI www, "Disconnected Client")."""


# ──────────────────────────────────────────────────────────────── 1. Command line ──
#
# What was asked for? Each option is one field of Config, with its name, type, default,
# limits and help; the parser is made from these. Names are uvicorn's where they can be.


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code (README, "Exit codes")."""
    try:
        config = Config(**vars(make_parser().parse_args(arguments)))
    except ValueError as exc:
        print(f"foal: {exc} (--help lists the options)", file=sys.stderr)
        return 2
    return run(config)


def make_parser() -> Parser:
    title = "foal: a complete ASGI server that a person can read"
    parser = Parser("server.py", description=title, allow_abbrev=False)
    parser.add_argument("app", metavar="MODULE:ATTRIBUTE", help="for example main:app")
    parser.add_argument("--version", action="version", version=versions())
    for field in dataclasses.fields(Config)[1:]:
        kind = field.type.split()[0]  # annotations are not evaluated: a string
        how = {"action": "append" if kind == "Repeated" else "store"}
        how["type"] = {"int": int, "float": float}.get(kind, str)
        how["metavar"] = {"int": "N", "float": "SECONDS"}.get(kind, "TEXT")
        if kind == "bool":  # the option turns the default round
            how = {"action": "store_false" if field.default else "store_true"}
        how |= {"default": field.default, "help": field.metadata["help"]}
        parser.add_argument(flag_of(field), dest=field.name, **how)
    return parser


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A mistake becomes one line, instead of a page of usage."""
        raise ValueError(message)


def flag_of(field: dataclasses.Field) -> str:
    """The option that sets a field of Config."""
    no = "no-" if field.default is True else ""
    return f"--{no}{field.name.replace('_', '-')}"


def option(default: Any, help: str, least: int = 0, choices: tuple = ()) -> Any:
    """A field of Config that is also an option."""
    if default not in (None, "") and type(default) is not bool:
        help += " (default: %(default)s)"
    metadata = {"help": help, "least": least, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


Repeated = list[str] | None  # an option that may be given several times
LEVELS = ("debug", "info", "warning", "error")


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole program's input. Times are in seconds. Raises ValueError, one line."""

    app: ASGIApp | str  # an ASGI 3 application, or "MODULE:ATTRIBUTE"
    host: str = option("127.0.0.1", 'address or name to listen on, "" for all')
    port: int = option(8000, "TCP port to listen on, 0 for a free one")
    uds: str | None = option(None, "path of a Unix socket to listen on instead")
    fd: int | None = option(None, "number of an open socket to listen on instead")
    backlog: int = option(2048, "connections that may wait to be accepted", least=1)
    workers: int = option(1, "number of processes that serve", least=1)
    reload: bool = option(False, "start new workers when a file of the app changes")
    reload_dir: Repeated = option(None, "watch this folder, not --app-dir")
    reload_include: Repeated = option(None, "watch files of this pattern, too")
    reload_exclude: Repeated = option(None, "do not watch files of this pattern")
    reload_delay: float = option(0.25, "time between two looks at the files")
    loop: str = option("auto", "auto, asyncio, selector, proactor or MODULE:FACTORY")
    lifespan: str = option("auto", "auto, on or off", choices=("auto", "on", "off"))
    factory: bool = option(False, "the app is a function that returns the app")
    app_dir: str = option(".", "folder from which the app is imported")
    root_path: str = option("", "path at which a proxy mounts the app")
    log_level: str = option("info", ", ".join(LEVELS), choices=LEVELS)
    access_log: bool = option(True, "do not log a line for each request")
    server_header: bool = option(True, "do not send the Server field")
    proxy_headers: bool = option(False, "believe X-Forwarded-For and -Proto")
    forwarded_allow_ips: str = option("127.0.0.1,::1", "proxies to believe, * for all")
    limit_concurrency: int | None = option(None, "503 above so many requests", least=1)
    timeout_keep_alive: float = option(75.0, "limit for an idle connection")
    timeout_request_head: float = option(10.0, "limit for a head to arrive")
    timeout_request_body: float = option(60.0, "limit for more of a body")
    timeout_graceful_shutdown: float = option(10.0, "limit for requests at a stop")
    ssl_certfile: str | None = option(None, "file of the certificate: speak TLS")
    ssl_keyfile: str | None = option(None, "file of the key, if it is another one")
    ssl_keyfile_password: str | None = option(None, "password of the private key")
    ws_max_size: int = option(2**24, "largest WebSocket message in bytes", least=1)
    ws_ping_interval: float = option(20.0, "silence before a ping, 0 for no pings")
    ws_ping_timeout: float = option(20.0, "silence after a ping, 0 for no limit")
    timeout_worker_healthcheck: float | None = option(None, "limit of silence", least=1)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            value, flag = getattr(self, field.name), flag_of(field)
            least, choices = field.metadata["least"], field.metadata["choices"]
            if isinstance(value, int | float) and not value >= least:  # NaN is not
                raise ValueError(f"{flag} must be {least} or more, not {value}")
            if choices and value not in choices:
                raise ValueError(f"{flag} must be {', '.join(choices)}, not {value}")
        for folder in self.reload_dir or ():
            if not os.path.isdir(folder):
                raise ValueError(f"--reload-dir {folder} is no folder")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("--ssl-keyfile needs --ssl-certfile")
        if self.root_path and not self.root_path.startswith("/"):
            raise ValueError(f"--root-path must begin with /, not {self.root_path}")
        # A path of the app is appended to it, and begins with a slash of its own.
        object.__setattr__(self, "root_path", self.root_path.rstrip("/"))
        self.loop_choice()  # a mistake in this or the next is found now
        self.trusted_proxies()

    @property
    def shared(self) -> bool:
        """Will other processes than this one accept on the listeners?"""
        return self.reload or self.workers > 1

    def loop_choice(self) -> loops.LoopChoice:
        """Which loop, and why. Raises ValueError."""
        return loops.choose(self.loop, platform=sys.platform, shared=self.shared)

    def open_listeners(self) -> tuple[list[socket.socket], Callable[[], None]]:
        """The listeners, and what closes them. Raises OSError."""
        names = ("host", "port", "uds", "fd", "backlog")
        return sockets.open_listeners(**{name: getattr(self, name) for name in names})

    def addresses(self, listeners: list[socket.socket]) -> list[str]:
        scheme = "https" if self.ssl_certfile else "http"
        return [sockets.describe(listener, scheme) for listener in listeners]

    def tls_options(self) -> dict[str, Any]:
        """What create_server needs for TLS, if TLS was asked for. Raises OSError."""
        if self.ssl_certfile is None:
            return {}
        files = self.ssl_certfile, self.ssl_keyfile, self.ssl_keyfile_password
        patience = self.timeout_request_head or None
        return {"ssl": sockets.tls_context(*files), "ssl_handshake_timeout": patience}

    def trusted_proxies(self) -> list:
        """--forwarded-allow-ips as networks. Raises ValueError."""
        listed = self.forwarded_allow_ips.replace("*", "0.0.0.0/0,::/0").split(",")
        try:
            return [ipaddress.ip_network(text.strip()) for text in listed if text]
        except ValueError as exc:
            raise ValueError(f"--forwarded-allow-ips: {exc}") from None


def versions() -> str:
    """The first line of every bug report."""
    python = f"{sys.implementation.name} {sys.version.split()[0]}"
    return f"foal {__version__}, {python}, h11 {h11.__version__}, {sys.platform}"


# ───────────────────────────────────────────────────────────────── 2. Composition ──
#
# Who will do it? The listeners listen before the app is imported: a busy port fails at
# once, in one line, in one place. Then this process serves, or it becomes the
# supervisor of workers that serve. A supervisor never imports the app.


def run(app: ASGIApp | str | Config, **options: Any) -> int:
    """Serve until a signal; return the exit code (README, "Exit codes"). From Python:
    `server.run(app, port=0)`. The options are the fields of Config."""
    config = app if isinstance(app, Config) else Config(app, **options)
    configure_logging(config)
    try:
        check_surroundings(config)
        listeners, close_listeners = config.open_listeners()
    except (StartupError, OSError) as exc:
        return report(exc)
    factory, why = config.loop_choice()
    logger.info("%s, process %d", versions(), os.getpid())
    logger.info("loop: %s, because %s", factory.removeprefix("asyncio:"), why)
    serve_there = supervise if config.shared else serve_here
    code = serve_there(config, listeners, close_listeners)
    close_listeners()
    if code == 0:
        logger.info("stopped")
    return code


def configure_logging(config: Config, prefix: str = "") -> None:
    """Log to standard error, unless our caller has set up logging of its own."""
    logger.setLevel(config.log_level.upper())
    if logger.hasHandlers():
        return
    logger.addHandler(logging.StreamHandler())
    layout = f"%(asctime)s %(levelname)-7s {prefix}%(message)s"
    logger.handlers[0].setFormatter(logging.Formatter(layout))
    logger.propagate = False  # the app may give the root logger a handler as well


def check_surroundings(config: Config) -> None:
    """Check early what would give a confusing error later. Raises StartupError."""
    if tuple(map(int, h11.__version__.split(".")[:2])) < (0, 16):
        # Older ones accept malformed chunks: request smuggling (CVE-2025-43859).
        raise StartupError(f'h11 {h11.__version__} is too old; pip install "h11>=0.16"')
    config.tls_options()
    with suppress(RuntimeError):  # there is none: good
        asyncio.get_running_loop()
        raise StartupError("an event loop runs already; use: await server.serve(app)")
    processes = sys.modules.get("multiprocessing")
    if processes and processes.current_process().name == "foal worker":  # workers.NAME
        # It imports the script that started us, and this calls us again (uvicorn #949).
        raise StartupError('put server.run(…) below: if __name__ == "__main__":')
    if config.shared and not isinstance(config.app, str):
        raise StartupError("workers import the app: pass its MODULE:ATTRIBUTE")


def report(exc: Exception) -> int:
    """Log why the server cannot start; return the exit code for that."""
    if exc.__cause__:
        logger.error("%s", reload.app_traceback(exc.__cause__))
    logger.error("%s", getattr(exc, "strerror", None) or exc)
    return 3


def supervise(config: Config, listeners: list, close_listeners: Callable) -> int:
    """Be the parent: workers serve, and the watcher says when to replace them."""
    import workers  # here, because one process alone needs no multiprocessing

    watcher = None
    if config.reload:
        folders = config.reload_dir or [config.app_dir]
        patterns = config.reload_include or (), config.reload_exclude or ()
        watcher = reload.Watcher(folders, *patterns, delay=config.reload_delay)
        logger.info("watching %s", ", ".join(watcher.folders))
    return workers.Supervisor(
        worker_main,
        (config, listeners),
        config.workers,
        # After its grace a worker cancels requests; lifespan has as long once more.
        grace=2 * config.timeout_graceful_shutdown + 5.0,
        silence_limit=config.timeout_worker_healthcheck,
        should_restart=watcher and watcher.changed,
        on_ready=lambda: announce(config.addresses(listeners)),
        # Close the last listener, so that new clients are refused and do not wait.
        on_stop=close_listeners,
    ).run()


def announce(addresses: list[str]) -> None:
    """Say where to point a browser, once the server answers there."""
    for address in addresses:
        logger.info("listening on %s (Ctrl-C to stop)", address)


def worker_main(config: Config, listeners: list[socket.socket], pipe: Any) -> None:
    """Be the child: every worker process runs this."""
    import workers

    workers.prepare_worker()  # walk: worker 2
    # Python knows a compiled file's source by its time, in whole seconds, and size. Two
    # quick saves can look the same.
    sys.dont_write_bytecode = config.reload
    for listener in listeners:
        listener.set_inheritable(False)  # spawn made it inheritable (PEP 446)
    configure_logging(config, prefix="[%(process)d] ")
    sys.exit(serve_here(config, listeners, pipe.close, workers.Lifeline(pipe)))


def serve_here(
    config: Config, listeners: list, on_force: Callable, lifeline: Any = None
) -> int:
    """Serve in this process, in an event loop of its own; return the exit code."""
    server, factory = Server(config, listeners, lifeline), config.loop_choice().factory
    runner = asyncio.Runner(loop_factory=lambda: loops.make(factory))
    try:
        runner.get_loop()  # first: a signal in the midst of it would leave half a loop
        with stop_on_signals(server, on_force), runner:
            runner.run(server.serve(None if lifeline else announce))
    except (StartupError, OSError, ImportError) as exc:  # the last one: of --loop
        return report(exc)
    except KeyboardInterrupt:
        if not server.stop_signal:  # else on_signal has raised it
            return report(StartupError("the app raised KeyboardInterrupt"))
    return 0


async def serve(app: Any, ready: Callable | None = None, **options: Any) -> None:
    """Serve inside a running loop: cancel the task to stop gracefully. Signals and
    logging are the caller's business. `ready` is called with the list of addresses once
    the server accepts connections. Raises StartupError or OSError."""
    config = Config(app, **options)
    listeners, close_listeners = config.open_listeners()
    try:
        await Server(config, listeners).serve(ready)
    finally:
        close_listeners()


@contextmanager
def stop_on_signals(server: Server, on_force: Callable) -> Iterator[None]:
    """The first SIGINT or SIGTERM stops gracefully; a second one ends at once."""

    def on_signal(number: int, frame: object) -> None:
        # Python calls this between any two bytecodes, perhaps while the log's lock is
        # held: do not log here (gunicorn #2564). Note the number, and act in the loop.
        if server.stop_signal or server.stopping.is_set():
            on_force()
            os._exit(128 + number)
        server.stop_signal = number
        if server.app is None:
            raise KeyboardInterrupt  # the app's import blocks the loop: end it
        server.stop_soon(signal.Signals(number).name)

    # Its supervisor handles a worker's Ctrl-C. SIGBREAK is Ctrl-Break on Windows.
    names = ("SIGTERM",) if server.lifeline else ("SIGINT", "SIGTERM", "SIGBREAK")
    if threading.current_thread() is not threading.main_thread():
        names = ()  # Python delivers signals to the main thread only
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    previous = [(number, signal.signal(number, on_signal)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in previous:
            signal.signal(number, handler)


def load_app(config: Config) -> ASGIApp:
    """The application itself, from its name or factory. Raises StartupError."""
    app, name = config.app, config.app
    try:
        if isinstance(app, str):
            app = reload.load(app, os.path.abspath(config.app_dir))
        if config.factory:
            app = app()
    except ImportError as exc:
        raise StartupError(str(exc)) from exc.__cause__
    except (Exception, SystemExit) as exc:  # foreign code
        raise StartupError(f"the factory {name} failed: {in_words(exc)}") from exc
    if complaint := not_asgi(app):
        raise StartupError(f"{name} is not an ASGI 3 application: {complaint}")
    return app


def not_asgi(app: Any) -> str:
    """What is wrong with this application, by its parameters; "" if nothing is."""
    if not callable(app):
        return f"a {type(app).__name__} cannot be called"
    try:
        signature = inspect.signature(app)
    except (TypeError, ValueError):  # Python cannot see its parameters: trust it
        return ""
    guesses = ["it takes no arguments; if it is a factory, add --factory"]
    guesses += ["it looks like ASGI 2; wrap it in asgiref's guarantee_single_callable"]
    guesses += ["it looks like WSGI; wrap it in asgiref's WsgiToAsgi", ""]
    for takes in 3, 2, 1, 0:
        with suppress(TypeError):
            signature.bind(*range(takes))
            return guesses[takes]
    return "it does not take scope, receive and send"


def in_words(exc: BaseException) -> str:
    """An exception for a sentence: its type, and its message if it has one."""
    return f"{type(exc).__name__}: {exc}".removesuffix(": ").splitlines()[0]


def broken_app(exc: StartupError) -> ASGIApp:
    """With --reload: an app that shows why the real one could not start. Only with
    --reload, because a traceback tells strangers too much."""
    cause = reload.app_traceback(exc.__cause__) if exc.__cause__ else ""
    page = f"{cause}\n\n{exc}\n".lstrip().encode(errors="replace")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        plain = [(b"Content-Type", b"text/plain; charset=utf-8")]
        kind = "websocket.http" if scope["type"] == "websocket" else "http"
        await send({"type": f"{kind}.response.start", "status": 500, "headers": plain})
        await send({"type": f"{kind}.response.body", "body": page})

    return app


# ────────────────────────────────────────────────────────────────────── 3. Server ──
#
# One process lives: start up, accept, wait, stop accepting, finish, shut down. One
# ticker does for all connections what a timer for each would do. (load_app, report and
# broken_app are in chapter 2.)

TICK = 0.25  # seconds between two looks: a deadline is noticed at most this late
LAST_CALL = 1.0  # seconds that idle clients have for a request once the server stops


class Server:
    """Serves one application on some listeners, in one process and one loop."""

    def __init__(self, config: Config, listeners: list, lifeline: Any = None) -> None:
        self.config, self.listeners = config, listeners
        self.lifeline = lifeline  # a workers.Lifeline, if there is a supervisor
        # The supervisor has said already what a worker would repeat.
        self.log = logger.debug if lifeline else logger.info
        self.app: ASGIApp | None = None
        self.word = "ready"  # what a worker then says to its supervisor
        self.lifespan = Lifespan(self)
        self.state: dict[str, Any] = {}  # filled by lifespan, copied for each request
        self.proxies = config.trusted_proxies() if config.proxy_headers else []
        self.log_access = config.access_log and access_logger.isEnabledFor(logging.INFO)

        # What lives now. The loop holds tasks weakly (uvicorn #972): we keep them.
        self.acceptors: list[asyncio.Server] = []
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task] = set()  # of requests
        self.most_tasks = config.limit_concurrency or math.inf

        self.stop_signal = 0  # the number of the signal that asked for the end
        self.stopping = asyncio.Event()
        self.last_call = math.inf  # the loop's time at which idle clients must go
        self.impatient = False  # half of the grace is over: apps are told to end

        # What the ticker refreshes.
        self.common_fields: list[tuple[bytes, bytes]] = []
        self.responses: dict[tuple, h11.Response] = {}

    async def serve(self, ready: Callable | None = None) -> None:
        """The server's life. Calls `ready` with its addresses as soon as it accepts.
        Raises StartupError or OSError."""
        self.loop = asyncio.get_running_loop()
        self.context = contextvars.copy_context()  # every request starts from it
        if self.lifeline:
            self.lifeline.watch(self.stop_soon)
        tls = self.config.tls_options()  # fails before the app is loaded
        await self.start_app()
        self.tick()
        try:
            if not (self.stop_signal or self.stopping.is_set()):
                await self.start_accepting(tls)
                if ready:
                    ready(self.config.addresses(self.listeners))
                await self.stopping.wait()
        finally:  # also when the task that serves is cancelled
            self.stopping.set()
            await self.stop_accepting()
            await self.finish_requests()  # walk: worker 7
            await self.lifespan.shutdown()
            self.ticker.cancel()

    async def start_app(self) -> None:
        """Load the app and start it. A failure is fatal, except with --reload: there
        every request gets the traceback until the next change."""
        try:
            self.app = load_app(self.config)
            await self.lifespan.startup()
        except StartupError as exc:
            if not self.config.reload:
                raise
            report(exc)
            self.app, self.word = broken_app(exc), "broken"

    async def start_accepting(self, tls: dict[str, Any]) -> None:
        # asyncio's `backlog` is two numbers in one: how many connections may wait, and
        # how many it accepts in one turn. Each of several workers accepts one a turn,
        # to leave the next one to an idle worker. `listen` sets the other number.
        number = 100 if self.config.workers == 1 else 1
        make, create = functools.partial(Wire, self), self.loop.create_server
        for listener in self.listeners:
            self.acceptors += [await create(make, sock=listener, backlog=number, **tls)]
            listener.listen(self.config.backlog)
        if self.lifeline:
            self.lifeline.say(self.word)  # walk: worker 3

    def tick(self) -> None:
        """Four times a second: refresh the Date, and look at all deadlines. A timer for
        each request would cost more than making its scope."""
        self.ticker = self.loop.call_later(TICK, self.tick)
        if self.lifeline:
            self.lifeline.say("alive")  # walk: worker 4
        date = (b"Date", email.utils.formatdate(usegmt=True).encode())
        if date not in self.common_fields:
            server = [(b"Server", b"foal")] if self.config.server_header else []
            self.common_fields = [date, *server]
            self.responses.clear()
        now = self.loop.time()
        for connection in list(self.connections):  # a deadline may end one of them
            connection.wire.check_deadlines(now)

    def stop(self, reason: str = "asked by the supervisor") -> None:
        """Ask for a graceful stop. `serve` goes on from there."""
        self.log("%s: stopping", reason)
        self.stopping.set()
        if self.lifespan.question == "startup":  # do not wait for it any longer
            self.lifespan.answers.put_nowait("interrupted")

    def stop_soon(self, *reason: str) -> None:
        """The same from another thread, or from a signal handler."""
        with suppress(RuntimeError):  # the loop has just been closed
            self.loop.call_soon_threadsafe(self.stop, *reason)

    async def stop_accepting(self) -> None:
        # asyncio drops a connection that it accepts in the turn in which its server
        # closes. So first let those arrive here, which takes three turns.
        for listener in self.listeners:
            with suppress(NotImplementedError):  # by a proactor loop
                self.loop.remove_reader(listener)
        for _ in range(3):
            await asyncio.sleep(0)
        for closable in [*self.acceptors, *self.listeners]:
            closable.close()  # wait_closed would wait for connections (cpython #104344)

    async def finish_requests(self) -> None:
        """Wait for the requests in progress, but no longer than the grace."""
        grace = self.config.timeout_graceful_shutdown
        self.last_call = self.loop.time() + LAST_CALL
        if self.tasks:
            how = f"waiting {grace:g} s at most (Ctrl-C again ends at once)"
            logger.info("requests in progress: %d; %s", len(self.tasks), how)
        for connection in list(self.connections):
            connection.go_away()
        if self.lifeline and self.config.ssl_certfile:  # asyncio hides its handshakes
            await asyncio.sleep(min(LAST_CALL, grace))
        if not await self.all_ended(grace / 2):
            how = "telling the app that its clients have left"
            logger.info("requests in progress: %d; %s", len(self.tasks), how)
            self.impatient = True
            for connection in list(self.connections):
                connection.wire.look_again()
        if not await self.all_ended(grace / 2):
            logger.warning("requests in progress: %d; cancelling", len(self.tasks))
            for task in self.tasks:
                task.cancel()
            await self.all_ended(1.0)
        for connection in list(self.connections):
            connection.wire.transport.abort()
        await self.all_ended(0.1)  # so that connection_lost is called

    async def all_ended(self, seconds: float) -> bool:
        """Wait until no request runs and no connection is open; False if too late."""
        deadline = self.loop.time() + seconds
        while (self.tasks or self.connections) and self.loop.time() < deadline:
            await asyncio.sleep(0.01)  # polling: no request has to report
        return not (self.tasks or self.connections)


# ──────────────────────────────────────────────────────────────────── 4. Lifespan ──
#
# The app's conversation with the process, in a task of its own: two questions (startup,
# shutdown), and an answer to each. If the task ends, that is an answer, too.


class Lifespan:
    """ASGI lifespan 2.0: startup before the first request, shutdown after the last."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.task: asyncio.Task | None = None  # None while the app takes no part
        self.question = ""  # that the app has not answered yet
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.answers: asyncio.Queue[str] = asyncio.Queue()
        self.text = ""  # what the app says about a failure
        self.error: BaseException | None = None  # what the app raised

    async def startup(self) -> None:
        """Raises StartupError if the app says that it cannot start."""
        if self.server.config.lifespan == "off":
            return
        self.task, answer = asyncio.create_task(self.run()), "interrupted"
        try:
            answer = await self.ask("startup")
        finally:  # also when the task that serves is cancelled
            if answer != "complete":
                self.task.cancel()
        if answer in ("complete", "interrupted"):
            return
        self.task, error = None, self.error
        if answer == "failed":
            raise StartupError(f"the app failed to start: {self.text}")
        why = f"it raised {in_words(error)}" if error else "it returned at once"
        if error and not isinstance(error, Exception):  # such as sys.exit()
            raise StartupError(f"the app ended itself at startup: {why}")
        if self.server.config.lifespan == "on":
            raise StartupError(f"the app does not use lifespan: {why}") from error
        # "continue without lifespan support" (ASGI lifespan, "Scope")
        self.server.log("lifespan: the app does not use it (%s); going on without", why)

    async def shutdown(self) -> None:
        """Ask for the shutdown, and wait for one more grace at most."""
        if self.task is None or self.task.done():
            return
        grace = self.server.config.timeout_graceful_shutdown
        try:
            async with asyncio.timeout(grace):
                if await self.ask("shutdown") == "failed":
                    logger.error("lifespan: shutdown failed: %s", self.text)
        except TimeoutError:
            logger.error("lifespan: shutdown takes longer than %g s; leaving", grace)
        self.task.cancel()

    async def ask(self, question: str) -> str:
        """Returns "complete", "failed", "ended" (no answer) or "interrupted"."""
        self.question = question
        self.messages.put_nowait({"type": f"lifespan.{question}"})
        return await self.answers.get()

    async def run(self) -> None:
        asgi = {"version": "3.0", "spec_version": "2.0"}
        scope = {"type": "lifespan", "asgi": asgi, "state": self.server.state}
        try:
            await self.server.app(scope, self.messages.get, self.send)
        except BaseException as exc:  # foreign code, or we have cancelled it
            self.error = exc
            cancelled = isinstance(exc, asyncio.CancelledError)
            if self.question != "startup" and not cancelled:  # `startup` tells its own
                logger.error("%s\nlifespan: the app failed", reload.app_traceback(exc))
        finally:
            self.answers.put_nowait("ended")

    async def send(self, message: Message) -> None:
        topic, _, answer = message["type"].rpartition(".")
        expected = topic == f"lifespan.{self.question}"
        if not expected or answer not in ("complete", "failed"):
            raise RuntimeError(f"unexpected message {message['type']!r}")
        self.question, self.text = "", message.get("message", "")
        self.answers.put_nowait(answer)


# ────────────────────────────────────────────────────────────────── 5. Connection ──
#
#    asyncio ── bytes, end of file, lost ──►  Wire        the bytes, in and out
#    ticker ── 4 times a second ──────────►    │ ▲
#                               "look again"   │ │  take, write
#                                              ▼ │
#                                           Connection    the conversation: a generator
#                             starts a task    │ ▲
#                                              ▼ │  "the answer is complete"
#    the app ◄── receive, send ───────────►  Exchange     one request and its answer
#
# The generator `converse` is the whole life of a connection, from top to bottom: wait
# for a request, let the app answer it, go round again as long as h11 agrees (RFC 9112
# §9.3), and close in stages (RFC 9112 §9.6).
#
# Where it has to wait, it says `yield deadline`, with a time of the loop's clock or
# infinity. `Wire` resumes it when anything happens, and does not say what: so each
# `yield` stands in a loop that looks again. If the deadline comes first, the `yield`
# raises TimeoutError. Calling `converse()` runs nothing yet; the first `next` does.
# `yield from f()` is to generators what `await f()` is to coroutines.
#
# Why is it not a coroutine? It would read the same, but in a task each of its waits
# would cost a future and a turn of the loop: a quarter of a small request. The app is a
# coroutine, in a task of its own. Its `receive` and `send` wait for the same news with
# `await wire.until_change()`.
#
# When something goes wrong, blame decides. The client's fault: the status that h11
# hints at. The app's: 500, and a traceback in our log only. h11's state says whether an
# answer may still be given. If not, the connection closes in the middle of the answer,
# so that the client sees that it is not complete.

HIGH_WATER = 64 * 1024  # bytes of each kind that we hold before the sender has to wait
LINGER = 5.0  # seconds without a byte, after the last answer, until we stop reading
LINGER_TOTAL = 30.0  # seconds until we stop in any case; both are nginx's
SEND_TIMEOUT = 60.0  # seconds in which a client reads nothing of an answer; nginx's
CLOSE = [(b"Connection", b"close")]
UPGRADE = [(b"Connection", b"close, upgrade"), (b"Upgrade", b"websocket")]
UPGRADE.append((b"Sec-WebSocket-Version", b"13"))  # RFC 6455 §4.4


class Wire(asyncio.Protocol):
    """The bytes of one connection, both ways. It knows no HTTP."""

    def __init__(self, server: Server) -> None:
        self.server, self.loop = server, server.loop
        self.received = bytearray()  # bytes that arrived and were not taken yet
        self.ended = False  # the client sends no more; it may still read
        self.lost = False  # the connection is gone
        self.write_paused = False  # too much of what we wrote is unsent
        self.outgoing: list[bytes] = []  # leaves at the end of this turn of the loop
        self.outgoing_size = 0
        self.deadline = math.inf  # of the conversation
        self.waiters: dict[asyncio.Future, float] = {}  # of the app, with deadlines
        self.unsent, self.send_deadline = 0, math.inf  # bytes; when some must be read

    # asyncio calls these. Each notes a fact, and lets all who wait look again.

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        # With a limit of 0, TLS would pause us for nothing and never resume.
        transport.set_write_buffer_limits(high=2 * HIGH_WATER)
        sock = transport.get_extra_info("socket")
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            # Else a small answer waits 40 ms for an acknowledgement. asyncio sets it
            # only where the listener's proto says TCP (uvicorn #3149).
            with suppress(OSError):  # the client has left already
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = Connection(self.server, self)
        self.server.connections.add(self.connection)
        self.conversation = self.connection.converse()  # walk: 2
        self.look_again()

    def data_received(self, data: bytes) -> None:
        self.received += data
        if len(self.received) > HIGH_WATER:
            self.transport.pause_reading()
        self.look_again()

    def eof_received(self) -> bool:
        self.ended = True
        self.look_again()
        return self.transport.can_write_eof()  # keep it open, unless it is TLS

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = self.lost = True
        self.write_paused = False  # there is nothing to wait for any more
        self.look_again()

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        self.loop.call_soon(self.look_again)  # not while asyncio is still writing

    def look_again(self, error: Exception | None = None) -> None:
        """Run the conversation to its next `yield`, and note until when that waits.
        Then wake the app's side."""
        try:
            talk = self.conversation
            self.deadline = talk.throw(error) if error else next(talk)
        except StopIteration:  # it has returned: the connection is over
            self.server.connections.discard(self.connection)
            self.deadline = math.inf
        waiters, self.waiters = self.waiters, {}
        for waiter in waiters:
            if not waiter.done():  # its task may have been cancelled
                waiter.set_result(None)

    def look_again_soon(self) -> None:
        """The same in the next turn of the loop: for a caller that has to finish first,
        such as the app's `send`."""
        if not self.outgoing:  # else `flush` does it
            self.loop.call_soon(self.look_again)

    def until_change(self, deadline: float = math.inf) -> asyncio.Future:
        """For the app's side: await it, and look again. Raises TimeoutError. Each wait
        has its own future, so that cancelling one does not end the others."""
        waiter = self.loop.create_future()
        self.waiters[waiter] = deadline
        return waiter

    def room(self) -> Wait:
        """For the conversation: wait until the client has read enough of our answer."""
        while self.outgoing or self.write_paused:
            yield math.inf

    def check_deadlines(self, now: float) -> None:
        """The ticker calls this: end each wait whose time has come."""
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent != self.unsent:  # it has read, or we have written
            self.unsent, self.send_deadline = unsent, now + SEND_TIMEOUT
        elif now > self.send_deadline:
            self.transport.abort()
        for waiter, deadline in list(self.waiters.items()):
            if waiter.done():  # its task was cancelled
                del self.waiters[waiter]
            elif deadline <= now:
                waiter.set_exception(TimeoutError())
        if self.deadline <= now:
            self.look_again(TimeoutError())

    def take(self, size: int = sys.maxsize) -> bytes:
        """Take the first `size` bytes that have arrived, or all, and read on."""
        taken = bytes(memoryview(self.received)[:size])
        del self.received[:size]
        if len(self.received) <= HIGH_WATER and not self.transport.is_reading():
            self.transport.resume_reading()
        return taken

    def write(self, data: bytes) -> None:
        """Write at the end of this turn of the loop: the parts of an answer leave in
        one system call, and the clients of one turn are woken together."""
        if not self.outgoing:
            self.loop.call_soon(self.flush)
        self.outgoing.append(data)
        self.outgoing_size += len(data)

    def flush(self) -> None:
        data = b"".join(self.outgoing)
        self.outgoing.clear()
        self.outgoing_size = 0
        for start in range(0, len(data), 2 * HIGH_WATER):
            if not self.transport.is_closing():  # in one, TLS hides what is unsent
                self.transport.write(data[start : start + 2 * HIGH_WATER])  # walk: 9
        self.look_again()


class Connection:
    """The conversation on one connection: requests and answers, in order."""

    def __init__(self, server: Server, wire: Wire) -> None:
        self.server, self.wire, self.loop = server, wire, server.loop
        self.conn = h11.Connection(h11.SERVER, HEAD_LIMIT)
        self.requests_seen = 0
        self.head = b""  # of the request that is being answered
        self.exchange: Exchange | None = None  # which answers it
        self.template_head = b""  # the last head
        self.template: Scope = {}  # its scope, copied when a client repeats its head

        own = wire.transport.get_extra_info("sockname")
        peer = wire.transport.get_extra_info("peername")
        tcp = isinstance(own, tuple)
        client = tuple(peer[:2]) if tcp and peer else None  # a Unix socket's has none
        self.peer = "%s:%d" % client if client else "unix"
        self.scope = {  # what all requests have in common
            "type": "http",
            # Not 2.4: from there on, Starlette's streams do not listen for a client
            # that leaves, and one whose next event never comes would never end.
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "server": tuple(own[:2]) if tcp else (os.fsdecode(own or ""), None),
            "client": client,
            "scheme": "https" if server.config.ssl_certfile else "http",
            "root_path": server.config.root_path,
            "extensions": {},
        }

    def converse(self) -> Wait:
        """The life of a connection."""
        try:
            while request := (yield from self.next_request()):
                yield from self.respond(request)
        except h11.RemoteProtocolError as exc:
            self.refuse(exc.error_status_hint, str(exc))
        except Exception:
            logger.exception("%s: this is a bug of foal", self.peer)
        yield from self.tear_down()

    def next_request(self) -> Wait:
        """Wait for a whole request head, and let h11 read it; None if no more requests
        shall come. Raises h11.RemoteProtocolError with the status to answer."""
        wire, server, config = self.wire, self.server, self.server.config
        seconds = config.timeout_keep_alive
        if self.requests_seen == 0:  # a browser opens some connections in advance
            seconds = max(seconds, config.timeout_request_head)
        else:
            try:
                self.conn.start_next_cycle()  # walk: 10
            except h11.LocalProtocolError:
                return None  # one side has said that it will close (RFC 9112 §9.3)
        self.head, self.exchange = b"", None
        seen, deadline = 0, self.loop.time() + seconds
        while not (wire.received and (size := find_head(wire.received, seen))):
            if wire.received and not seen:  # idle until now: the head begins
                deadline = self.loop.time() + config.timeout_request_head
            seen = len(wire.received)
            # At a stop an idle connection closes. But a new one may be about to send
            # its request. And when only a worker is replaced, a proxy still uses its
            # connections. Both have until the last call.
            spared = seen or not self.requests_seen or server.lifeline
            if wire.ended or (server.stopping.is_set() and not spared):
                return None  # no whole head will come, or we stop
            try:
                yield min(deadline, server.last_call)
            except TimeoutError:
                if not wire.received.strip():  # an empty line does not begin a request
                    return None
                raise h11.RemoteProtocolError("waited too long for a head", 408)
        self.requests_seen += 1
        self.head = wire.take(size).lstrip(b"\r\n")  # walk: 3
        if self.head != self.template_head:
            check_framing(self.head)
        self.conn.receive_data(self.head)  # no more: the body waits for the app
        return self.conn.next_event()

    def respond(self, request: h11.Request) -> Wait:
        """Let the app answer in a task of its own, and wait until it has. Raises
        h11.RemoteProtocolError with the status to answer."""
        server, wire = self.server, self.wire
        if len(server.tasks) >= server.most_tasks:  # --limit-concurrency
            raise h11.RemoteProtocolError("too many requests at once", 503)
        if self.head != self.template_head:
            self.template = make_scope(request, self.scope, server.proxies)
            self.template_head = self.head
        scope = self.template.copy()  # the app may change what it gets
        scope["headers"] = scope["headers"].copy()
        scope["extensions"] = scope["extensions"].copy()
        scope["state"] = server.state.copy()
        kind = WebSocket if scope["type"] == "websocket" else Exchange
        self.exchange = exchange = kind(self, request, scope)
        # In a fresh context: no request sees the context variables of another.
        run, context = exchange.run(scope), server.context.copy()
        task = asyncio.Task(run, loop=self.loop, context=context)
        # A callback also comes for a task that is cancelled before its first step.
        task.add_done_callback(exchange.ended)
        server.tasks.add(task)
        # No deadline: how long an answer takes is the app's business.
        while exchange.state in UNANSWERED and not wire.lost:
            yield math.inf
        if exchange.state in (OPEN, CLOSING):
            yield from exchange.talk()  # walk: ws 3
        yield from wire.room()  # a client that reads no answers gets no more of them

    def refuse(self, status: int, reason: str) -> None:
        """Log why a request is refused, and answer with this status."""
        if not self.exchange:
            data = self.head or bytes(self.wire.received[:60])
            hint = " (this looks like TLS)" if data.startswith(b"\x16") else ""
            reason = f"{reason[:200]}: {data[:60]!r}{hint}"
        logger.info("%s: %d, %s", self.peer, status, reason)
        self.answer_error(status)

    def answer_error(self, status: int) -> None:
        """Answer with an error of our own if h11 allows it. The connection closes."""
        wire, conn, exchange = self.wire, self.conn, self.exchange
        if conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            text = b"%d %s\n" % (status, REASONS[status])
            fields = [(b"Content-Type", b"text/plain; charset=utf-8")]
            fields.append((b"Content-Length", b"%d" % len(text)))
            fields += UPGRADE if status == 426 else CLOSE
            wire.write(conn.send(make_response(self.server, status, fields)))
            if (self.head or wire.received).startswith(b"HEAD "):
                text = b""
            wire.write(conn.send(h11.Data(data=text)))
            with suppress(h11.LocalProtocolError):  # a HEAD that h11 has not read
                wire.write(conn.send(END))
            if exchange:
                exchange.sent = len(text)
        elif exchange and exchange.response:
            status = exchange.response.status_code  # which the client has seen
        if exchange:
            exchange.told = True
            exchange.finished(status)

    def tear_down(self) -> Wait:
        """Close in stages: send what is unsent, end our half of the connection, and
        read on until the client ends its half. A client that is still sending would
        otherwise get a reset, which may destroy the answer (RFC 9112 §9.6)."""
        wire, server, transport = self.wire, self.server, self.wire.transport
        if not wire.lost:
            transport.set_write_buffer_limits(1, 0)  # now paused means: some is unsent
        yield from wire.room()
        if self.exchange and self.conn.our_state in (h11.SEND_BODY, h11.ERROR):
            transport.abort()  # the answer must not look complete (RFC 9112 §9.8)
        elif transport.can_write_eof() and not wire.lost:
            deadline = self.loop.time() + LINGER_TOTAL
            with suppress(OSError, TimeoutError):
                transport.write_eof()  # walk: 11
                while not wire.ended and not server.stopping.is_set():
                    wire.take()  # and drop it
                    yield min(deadline, self.loop.time() + LINGER)
        # Not from in here: TLS may call eof_received at once, while the generator runs.
        # And only once: a second close makes it forget the transport below.
        if not transport.is_closing():
            self.loop.call_soon(transport.close)
        closed = self.loop.time()
        try:
            while not wire.lost:
                # asyncio's TLS waits for the client's goodbye: at a stop, a second.
                yield max(server.last_call, closed + LAST_CALL)
        except TimeoutError:
            transport.abort()

    def go_away(self) -> None:
        """An open WebSocket is closed, and an idle connection ends."""
        if self.exchange and self.exchange.state is OPEN:
            self.exchange.go_away()
        self.wire.look_again_soon()


# ──────────────────────────────────────────────────────────────────────── 6. Head ──
#
# What h11 lets through and this server does not. h11 checks syntax, and leniently. If a
# proxy and a server disagree about where a message ends, an attacker can hide a request
# in it (request smuggling, RFC 9112 §11.2). So we are strict. The first functions look
# at bytes before h11 does, because h11 merges what a strict reader must tell apart; the
# others look at what h11 made of them. None of them knows a connection. A § without a
# document is one of RFC 9112.

METHOD_LIMIT = 32  # the longest registered one has 17 letters (IANA, "HTTP Methods")
TARGET_LIMIT = 8 * 1024  # RFC 9112 §3 recommends 8000 octets; nginx takes 8 KiB
HEAD_LIMIT = HIGH_WATER  # a longer one could never arrive whole; node.js takes 16 KiB
FIELD_LIMIT = 100  # Apache takes 100
CHUNK_LIMIT = 4 * 1024  # of a chunk's line with its extensions, or of the trailers

# A head is lines and an empty line. Only CRLF ends a line; no other control character
# may occur (RFC 9112 §2.2). A line that begins with white space would continue the one
# before (RFC 9112 §5.2). "A server … SHOULD ignore at least one empty line (CRLF)
# received prior to the request-line" (RFC 9112 §2.2): some clients end a body with one
# too many.
LINE = rb"[^\x00-\x20\x7f][^\x00-\x08\x0a-\x1f\x7f]*\r\n"
HEAD = re.compile(rb"(?:\r\n){0,2}(?:%b){1,%d}\r\n" % (LINE, FIELD_LIMIT + 1))
TRAILERS = re.compile(rb"(?:%b)*\r\n" % LINE)
# What no head may contain; found without looking at all of a head that drips in.
NOT_IN_HEAD = re.compile(
    rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r[^\n]|\n[ \t]|^[ \t]"
)
FRAMING = re.compile(rb"(?i)\r\n(?:content-length:([^\r]*)|transfer-encoding:([^\r]*))")
# chunk-size [ chunk-ext ] CRLF (RFC 9112 §7.1.1).
CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})(?:;[\w!#$%&'*+.^`|~-]+(?:=(?:[\w!#$%&'*+.^`|~-]+"
    rb'|"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[\t -~\x80-\xff])*"))?)*\r\n',
    re.ASCII,
)
# One host and perhaps a port: no list, no user information, no path.
HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[\w.~!$&'()*+;=%-]+)(:\d{0,5})?", re.ASCII)
ABSOLUTE_FORM = re.compile(rb"https?://([^/?]*)(.*)", re.IGNORECASE)
WITH_PORT = re.compile(r"^(?:\[(.*)\](?::\d+)?|([\d.]+):\d+)$")  # as Azure's


def find_head(data: bytearray, seen: int) -> int:
    """The size of the head that `data` begins with, or 0 if more of it has to arrive.
    `seen` bytes were looked at before: a head that arrives byte by byte must not be
    searched from its start each time. What more bytes cannot make valid is refused."""
    if data.find(b"\n", seen) >= 0 and (head := HEAD.match(data, 0, HEAD_LIMIT)):
        return head.end()
    bad = NOT_IN_HEAD.search(data, max(0, seen - 2)) or data.startswith(b"\r\n" * 3)
    ensure(not bad, 400, "bare CR or LF, control character, or folded line (§2.2)")
    fits = len(data) <= HEAD_LIMIT and data.count(b"\n") <= FIELD_LIMIT + 2
    ensure(fits, 431 if b"\n" in data else 414, "request head too large")
    return 0


def check_framing(head: bytes) -> None:
    """Where will the body end? There must be one answer (RFC 9112 §6.3). h11 would take
    two equal lengths for one."""
    found = FRAMING.findall(head)
    ensure(len(found) < 2, 400, "two fields say where the body ends")
    for length, coding in found:
        # Python refuses to convert 5,000 digits to a number.
        valid = coding.strip(b" \t").lower() == b"chunked"
        valid = valid or re.fullmatch(rb"[ \t]*\d{1,18}[ \t]*", length)
        ensure(valid, 400, "malformed Content-Length or Transfer-Encoding")


def find_chunk(data: bytearray) -> tuple[int, int]:
    """The length of a chunk's first line, and how many bytes follow it. With the last
    chunk's line come the trailers (RFC 9112 §7.1.2): fields, mostly none, and an
    empty line. (0, 0) if more has to arrive. h11 would be more lenient."""
    line = CHUNK_LINE.match(data, 0, CHUNK_LIMIT)
    if line and (size := int(line[1], 16)):
        return line.end(), size + 2  # a CRLF follows the data
    if line and (trailers := TRAILERS.match(data, line.end(), CHUNK_LIMIT)):
        return trailers.end(), 0
    start = bytes(data[:CHUNK_LIMIT])
    bad = NOT_IN_HEAD.search(start) if line else b"\n" in start
    ensure(not bad and len(start) < CHUNK_LIMIT, 400, f"malformed chunk {start[:60]!r}")
    return 0, 0


def make_scope(request: h11.Request, common: Scope, proxies: list) -> Scope:
    """Check what a head says, and say it in ASGI's words (ASGI www, "HTTP Connection
    Scope"). `common` is what the connection knows already."""
    fields = [(name.lower(), value) for name, value in request.headers.raw_items()]
    last = dict(fields)
    check_request(request, fields, last)  # walk: 4
    target = request.target
    if not target.startswith(b"/"):
        target, host = split_target(request)
        # "MUST ignore the received Host header field … and instead use the host
        # information of the request-target" (RFC 9112 §3.2.2).
        fields = [(n, host if host and n == b"host" else v) for n, v in fields]
    scope = {**common, "headers": fields, "method": request.method.decode()}
    scope["http_version"] = request.http_version.decode()
    scope["raw_path"], _, scope["query_string"] = target.partition(b"?")
    path = scope["raw_path"].decode()
    scope["path"] = scope["root_path"] + (unquote(path) if "%" in path else path)
    if proxies:
        believe_proxy(scope, proxies)
    if b"upgrade" in last:
        check_handshake(scope)  # walk: ws 1
    return scope


def ensure(valid: Any, code: int, why: str) -> None:
    """Unless it is valid, refuse a request with this status, or end a WebSocket with
    this close code."""
    if not valid and code < 1000:
        raise h11.RemoteProtocolError(why, code)
    if not valid:
        raise WebSocketError(code, why)


def check_request(request: h11.Request, fields: list, last: dict) -> None:
    """Refuse requests that are valid HTTP but that this server does not serve. `last`
    is dict(fields): it has the last one of each name."""
    method, target, version = request.method, request.target, request.http_version
    old, chunked = version == b"1.0", b"transfer-encoding" in last
    expected = {value.lower() for name, value in fields if name == b"expect"}
    ensure(old or version == b"1.1", 505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    ensure(not (old and chunked), 400, "Transfer-Encoding on HTTP/1.0 (§6.1)")
    ensure(len(method) <= METHOD_LIMIT, 400, "malformed request line")
    ensure(method != b"CONNECT", 501, "CONNECT is for proxies")
    ensure(method == method.upper(), 400, "methods are in upper case")  # as in nginx
    ensure(HOST.fullmatch(last.get(b"host", b"none")), 400, "malformed Host (§3.2)")
    ensure(expected <= {b"100-continue"}, 417, "unknown expectation")
    ensure(len(target) <= TARGET_LIMIT, 414, "request target too long")
    ensure(target.find(b"#") < 0, 400, "a fragment in the request target (§3.2)")


def split_target(request: h11.Request) -> tuple[bytes, bytes]:
    """The path with its query, and the host, of a target that is not in origin-form."""
    if absolute := ABSOLUTE_FORM.fullmatch(request.target):
        host, target = absolute.groups()
        if HOST.fullmatch(host):
            return target if target.startswith(b"/") else b"/" + target, host
    asterisk = request.target == b"*" and request.method == b"OPTIONS"
    ensure(asterisk, 400, "malformed request target (§3.2)")
    return b"*", b""


def check_handshake(scope: Scope) -> None:
    """If a request asks for a WebSocket (RFC 9110 §7.8), check its opening handshake
    (RFC 6455 §4.2.1), and make the scope that of a WebSocket."""
    fields = scope["headers"]
    asked = [token.lower() for token in tokens(fields, b"upgrade")]
    agreed = [token.lower() for token in tokens(fields, b"connection")]
    old = scope["http_version"] == "1.0"  # which knows no Upgrade
    if old or "websocket" not in asked or "upgrade" not in agreed:
        return
    version = tokens(fields, b"sec-websocket-version")
    ensure(version == ["13"], 426, "WebSocket version must be 13")
    last, keys = dict(fields), tokens(fields, b"sec-websocket-key")
    # Several client libraries send a Content-Length of 0, which is no content.
    content = b"transfer-encoding" in last or int(last.get(b"content-length", b"0"))
    key = re.fullmatch(r"[A-Za-z0-9+/]{22}==", ",".join(keys))  # 16 bytes, base64
    ensure(scope["method"] == "GET" and key and not content, 400, "malformed handshake")
    del scope["method"]
    scope["type"] = "websocket"
    scope["asgi"] = {"version": "3.0", "spec_version": "2.5"}
    scope["scheme"] = {"http": "ws", "https": "wss"}[scope["scheme"]]
    scope["subprotocols"] = tokens(fields, b"sec-websocket-protocol")
    scope["extensions"] = {"websocket.http.response": {}}


def is_trusted(host: str, networks: list) -> bool:
    """Is this the address of a proxy that we believe?"""
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        return any(address in network for network in networks)
    return False


def believe_proxy(scope: Scope, networks: list) -> None:
    """If the peer is a trusted proxy, take the client's address and scheme from it.
    Each proxy appends the address of its own peer. So the client is the first address
    from the right that is none of our proxies; it may have written the rest itself."""
    peer, on_unix_socket = scope["client"], scope["server"][1] is None
    if not on_unix_socket and not (peer and is_trusted(peer[0], networks)):
        return  # (a client of our Unix socket is on this machine, and trusted)
    hosts = tokens(scope["headers"], b"x-forwarded-for")[-50:]  # a client may send more
    hosts = [WITH_PORT.sub(r"\1\2", host) for host in hosts]
    while len(hosts) > 1 and is_trusted(hosts[-1], networks):
        hosts.pop()
    if hosts and re.fullmatch(r"[0-9A-Fa-f.:]+", hosts[-1]):  # it will be logged
        scope["client"] = (hosts[-1], 0)
    scheme = dict(scope["headers"]).get(b"x-forwarded-proto", b"").lower()
    if scheme in (b"http", b"https", b"ws", b"wss"):  # Traefik says ws and wss
        scope["scheme"] = "https" if scheme in (b"https", b"wss") else "http"


def tokens(fields: Iterable[tuple[bytes, bytes]], name: bytes) -> list[str]:
    """The members of a comma-separated field, over all its lines (RFC 9110 §5.6.1)."""
    values = ",".join(v.decode("latin-1") for n, v in fields if n == name)
    return [token.strip() for token in values.split(",") if token.strip()]


# ───────────────────────────────────────────────────────────────────── 7. Request ──
#
# One request, one task. An exchange translates between the messages of ASGI and the
# events of h11. It reads no more of a body than the app asks for. It holds the head of
# the answer back until the app sends the first part of the body: then head, body and
# end leave in one write, and an app that fails before can still be answered for with a
# 500.

END = h11.EndOfMessage()  # one for all answers
CONTINUE = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
PIECES = 64  # chunks, frames or sends of one exchange in one turn of the loop
RESPONSE_CACHE = 256  # heads kept; an app with more different ones gains nothing
REASONS = {status.value: status.phrase.encode() for status in http.HTTPStatus}
ACCESS_LINE = '%s "%s %s HTTP/%s" %d %d B %.1f ms'


# How far an answer is (ASGI www, "Response Start", "Response Body"), or a WebSocket
# (RFC 6455 §4, §7):
#
#   EXPECTING_START ──http.response.start──► EXPECTING_BODY ──the last body──┐
#       │                                                                    ▼
#       └─accept──► OPEN ──our Close──► CLOSING ──their Close──────────► COMPLETE
#                     └──────────────their Close, ours in reply──────────────▲
State = enum.Enum("State", "EXPECTING_START EXPECTING_BODY OPEN CLOSING COMPLETE")
EXPECTING_START, EXPECTING_BODY, OPEN, CLOSING, COMPLETE = State  # short names
UNANSWERED = (EXPECTING_START, EXPECTING_BODY)


class Exchange:
    """One request and its answer: runs the app, and owns its receive and send."""

    def __init__(self, connection: Connection, request: h11.Request, scope: Scope):
        self.connection, self.server = connection, connection.server
        self.wire, self.conn = connection.wire, connection.conn
        self.request, self.client = request, scope["client"]
        self.started = self.wire.loop.time()
        # The request's body.
        fields = dict(scope["headers"])
        self.chunked = b"transfer-encoding" in fields
        self.left = int(fields.get(b"content-length", b"0"))  # of the body or the chunk
        self.body: list[bytes] = []  # read by h11, and not yet received by the app
        self.body_received = False  # by the app, to its end
        # The answer.
        self.state = EXPECTING_START
        self.response: h11.Response | None = None  # held back until the first body
        self.no_content = request.method == b"HEAD"
        self.sent = 0  # bytes of content
        self.told = False  # the app has heard, or shall, that its client left
        self.pieces = 0  # handled so far

    async def run(self, scope: Scope) -> None:
        """The life of a request, in the app's task."""
        try:
            await self.server.app(scope, self.receive, self.send)  # walk: 5
            if self.state in UNANSWERED and not self.client_left():
                raise RuntimeError("the app returned before its response was complete")
        except BaseException as exc:  # foreign code, which may say sys.exit()
            self.explain(exc)

    async def receive(self) -> Message:
        """The request's body as it arrives. Then http.disconnect, as soon as the client
        has left or the answer is complete (ASGI www, "Request", "Disconnect")."""
        limit = self.server.config.timeout_request_body
        deadline = math.inf if self.body_received else self.wire.loop.time() + limit
        while self.state is not COMPLETE and not self.client_left():
            if not self.body_received:
                self.read_body()
                if self.told:
                    break  # the body was refused: what has come is not all of it
                more = self.conn.their_state is h11.SEND_BODY
                if self.body or not more:
                    if len(self.body) == PIECES:
                        await asyncio.sleep(0)  # others have their turn
                    body = b"".join(self.body)  # walk: 6
                    self.body.clear()
                    self.body_received = not more
                    return {"type": "http.request", "body": body, "more_body": more}
            elif self.wire.ended:
                break  # the client may still read, but there is no way to know
            await self.wait_for_body(deadline)
        if self.state is not COMPLETE:
            self.told = True
        return {"type": "http.disconnect"}

    def read_body(self) -> None:
        """Let h11 read what has arrived of the body, at most PIECES pieces of it."""
        wire, conn = self.wire, self.conn
        try:
            while conn.their_state is h11.SEND_BODY and len(self.body) < PIECES:
                event = conn.next_event()
                if type(event) is h11.Data:
                    self.body.append(event.data)
                elif event is h11.NEED_DATA:
                    piece = self.next_piece()
                    if not piece and not wire.ended:
                        return
                    conn.receive_data(piece)  # b"" means the end, and h11 judges it
        except h11.RemoteProtocolError as exc:
            self.connection.refuse(exc.error_status_hint, str(exc))

    def next_piece(self) -> bytes:
        """The next bytes for h11: never more than belongs to this body, and of chunks
        only what the strict grammar of chapter 6 allows. b"" if it has not arrived."""
        if self.chunked and self.left == 0:
            length, self.left = find_chunk(self.wire.received)
            return self.wire.take(length)
        piece = self.wire.take(self.left)
        self.left -= len(piece)
        return piece

    async def wait_for_body(self, deadline: float) -> None:
        """Wait until more arrives. If the client waits to be asked for its body, ask
        now (RFC 9110 §10.1.1)."""
        conn = self.conn
        # h11's state and not ours: our own head may be held back, and not yet sent.
        unanswered = conn.our_state is h11.SEND_RESPONSE
        if conn.they_are_waiting_for_100_continue and unanswered:
            self.wire.write(conn.send(CONTINUE))
        try:
            await self.wire.until_change(deadline)
        except TimeoutError:
            self.connection.refuse(408, "waited too long for the request body")

    async def send(self, message: Message) -> None:
        """Take one message of the answer. Raises ClientDisconnected once the client has
        left. For a message that is wrong, or comes at the wrong time, raises TypeError,
        KeyError, RuntimeError or h11.LocalProtocolError, and sends nothing of it."""
        wire = self.wire
        # Much waits for the end of this turn; or the client does not read.
        while wire.outgoing_size >= HIGH_WATER or wire.write_paused:
            await wire.until_change()
        over = self.told and self.state in (CLOSING, COMPLETE)
        if over or wire.transport.is_closing():
            self.told = True
            raise ClientDisconnected("the client has left")
        self.handle(message)
        self.pieces += 1
        if self.pieces % PIECES == 0:
            await asyncio.sleep(0)  # an app that never waits: others have their turn

    def handle(self, message: Message) -> None:
        """Do what one message of the app says."""
        kind = message["type"]
        if kind == "http.response.body" and self.state is EXPECTING_BODY:
            self.send_body(message)
        elif kind == "http.response.start" and self.state is EXPECTING_START:
            status, fields = message["status"], message.get("headers", ())
            self.response = make_response(self.server, status, fields)  # walk: 7
            # A 204 or 304 has no content (RFC 9110 §6.4.1).
            self.no_content = self.no_content or status in (204, 304)
            self.state = EXPECTING_BODY
        else:
            raise RuntimeError(f"unexpected message {kind!r} in {self.state.name}")

    def send_body(self, message: Message) -> None:
        body, more_body = message.get("body", b""), message.get("more_body", False)
        body = body if type(body) is bytes else bytes(memoryview(body))  # or TypeError
        if type(more_body) is not bool:
            raise TypeError(f"more_body must be a bool, not {more_body!r}")
        conn, data = self.conn, b""
        if conn.our_state is h11.SEND_RESPONSE:
            data = self.send_head()
        if body and not self.no_content:  # walk: 8
            data += conn.send(h11.Data(data=body))
            self.sent += len(body)
        if more_body:
            self.wire.write(data)
        else:
            self.wire.write(data + conn.send(END))
            self.finished(self.response.status_code)

    def send_head(self) -> bytes:
        """The bytes of the answer's head, which was held back until now."""
        response = self.response
        # "A server MUST read the entire request message body or close the connection"
        # (RFC 9112 §9.3). An app that answers so early may never read the rest.
        self.read_body()
        if self.state is COMPLETE:
            raise ClientDisconnected("its request was refused")
        unread = self.conn.their_state is h11.SEND_BODY
        persistent = self.server.config.timeout_keep_alive > 0
        if unread or not persistent or self.server.stopping.is_set():
            fields = [*response.headers.raw_items(), *CLOSE]
            status, reason = response.status_code, response.reason
            response = h11.Response(status_code=status, headers=fields, reason=reason)
        return self.conn.send(response)

    def client_left(self) -> bool:
        """Is an answer of no use any more, or has the app been told so?"""
        gone = self.wire.lost or self.server.impatient
        return self.told or (gone and self.state is not COMPLETE)

    def explain(self, exc: BaseException) -> None:
        """Log what the app raised: with a traceback, unless the client left before it
        had its answer. Then it is most likely how the app noticed that, in one of many
        wrappings (ASGI www, "Disconnected Client - send exception")."""
        what = f"{self.request.method.decode()} {self.request.target.decode()}"
        if self.client_left():
            logger.info("%s: answer not wanted; the app raised %s", what, in_words(exc))
        else:
            logger.error("%s\n%s: the app failed", reload.app_traceback(exc), what)

    def ended(self, task: asyncio.Task) -> None:
        """The app's task has ended. If the app has not answered, we do."""
        self.server.tasks.discard(task)
        if self.state not in UNANSWERED:
            return
        if self.server.impatient and not self.wire.lost:
            self.connection.answer_error(503)
        elif self.client_left():  # then an app may leave the answer undone
            self.told = True
            self.finished(self.response.status_code if self.response else 499)
        else:
            self.connection.answer_error(500)

    def finished(self, status: int, state: State = COMPLETE) -> None:
        self.state = state
        self.wire.look_again_soon()
        if self.server.log_access:
            self.log_access(status)  # last: a filter of the app's log may raise

    def log_access(self, status: int) -> None:
        """One line for each request. h11 lets no control character into a target. A
        quotation mark is escaped, because it would end ours (uvicorn #724)."""
        client = "%s:%d" % self.client if self.client else "unix"
        line = (self.request.method, self.request.target, self.request.http_version)
        line = [part.decode("ascii").replace('"', "%22") for part in line]
        took = 1000 * (self.wire.loop.time() - self.started)
        access_logger.info(ACCESS_LINE, client, *line, status, self.sent, took)


def make_response(server: Server, status: int, fields: Iterable) -> h11.Response:
    """A response event with the app's fields and ours. Equal ones are validated once,
    which saves 9 µs of some 40 a request. What is wrong with one raises
    h11.LocalProtocolError or TypeError."""
    if not isinstance(status, int):
        raise TypeError(f"status must be an int, not {status!r}")
    key = (status, *map(tuple, fields))
    if found := server.responses.get(key):
        return found
    # How the body is framed is the server's decision (ASGI www, "Response Start"). A
    # 204 has no Content-Length (RFC 9110 §8.6).
    dropped = [b"transfer-encoding"] + [b"content-length"] * (status == 204)
    kept, reason = all_fields(server, key[1:], dropped), REASONS.get(status, b"")
    found = h11.Response(status_code=status, headers=kept, reason=reason)
    if len(server.responses) < RESPONSE_CACHE:
        server.responses[key] = found
    return found


def all_fields(server: Server, fields: Iterable, dropped: Iterable) -> list:
    """The app's fields without the dropped ones, and those of ours that it did not set.
    Raises TypeError for what is not bytes; h11 would take str as well."""
    kept, names = [], set()
    for name, value in fields:
        if type(name) is not bytes or type(value) is not bytes:
            raise TypeError(f"header ({name!r}, {value!r}) must be two bytes")
        if name.lower() not in dropped:
            kept.append((name, value.strip(b" \t")))
            names.add(name.lower())
    return kept + [f for f in server.common_fields if f[0].lower() not in names]


# ─────────────────────────────────────────────────────────────────── 8. WebSocket ──
#
# A request that asks for a WebSocket starts like any other: h11 reads it, the app is
# called, and until the app accepts it may answer as to any request. Accepting is the
# answer. From then on the conversation is `talk`: it reads frames instead of requests,
# while the app's task goes on. A ping is what happens when `talk` waits too long.

CLOSE_TIMEOUT = 10.0  # seconds for the client's half of the closing handshake
EMPTY_MESSAGE = 256  # bytes that a waiting message counts for, beside its content
# Close codes (RFC 6455 §7.4.1). The first two are never sent: they tell the app that
# the client's Close had no code, and that there was no Close.
NO_CODE, NO_CLOSE, TOO_BIG, APP_FAILED, RESTART = 1005, 1006, 1009, 1011, 1012
WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3
DENIAL = ("websocket.http.response.start", "websocket.http.response.body")
NOT_THE_APPS = (b"upgrade", b"connection", b"content-length", b"transfer-encoding")


class WebSocket(Exchange):
    """One WebSocket: a request until the app accepts, from then on messages."""

    def __init__(self, connection: Connection, request: h11.Request, scope: Scope):
        super().__init__(connection, request, scope)
        self.close_by = math.inf  # when we have waited long enough for their Close
        self.messages = collections.deque([({"type": "websocket.connect"}, 0)])
        self.unread = 0  # bytes in these: the second of each pair
        self.frames = FrameReader(self.read, self.server.config.ws_max_size)
        self.fields = [(b"Upgrade", b"websocket"), (b"Connection", b"Upgrade")]
        self.disconnect: Message = {"type": "websocket.disconnect", "code": NO_CLOSE}

    # The client's side, in the conversation.

    def talk(self) -> Wait:
        """The life of a WebSocket, from the accept to the last Close."""
        wire = self.wire
        try:
            while self.state in (OPEN, CLOSING):
                opcode, payload = yield from self.frames.next()  # walk: ws 4
                if opcode is Opcode.CLOSE:
                    self.closed(*parse_close(payload))
                elif opcode is Opcode.PING:
                    # A client that reads nothing gets no Pongs either.
                    yield from wire.room()
                    if self.state is OPEN:
                        wire.write(encode_frame(Opcode.PONG, payload))
                elif opcode is not Opcode.PONG and self.state is OPEN:
                    yield from self.put(opcode, payload)
                # Any byte shows that the client lives: a Pong needs no more. After our
                # own Close the app hears no more messages.
        except WebSocketError as exc:
            logger.info("%s: WebSocket failed, %d: %s", self.connection.peer, *exc.args)
            self.closed(exc.args[0])

    def read(self, least: int, most: int) -> Wait:
        """At least so many bytes from the client, and at most so many. Raises
        WebSocketError when the client has left."""
        wire = self.wire
        self.pieces += 1
        if self.pieces % PIECES == 0:
            wire.loop.call_soon(wire.look_again)
            yield math.inf
        while len(wire.received) < least:
            yield from self.more()
        return wire.take(most)

    def more(self) -> Wait:
        """Wait for more bytes. Ask a silent client whether it still lives."""
        config = self.server.config
        if (yield from self.arrives_within(config.ws_ping_interval or math.inf)):
            return
        yield from self.wire.room()  # it cannot answer a ping that it has not read
        self.wire.write(encode_frame(Opcode.PING, b""))  # walk: ws 7
        if not (yield from self.arrives_within(config.ws_ping_timeout or math.inf)):
            self.wire.transport.abort()
            raise WebSocketError(NO_CLOSE, "the client is silent")

    def arrives_within(self, seconds: float) -> Wait:
        """Wait for more bytes; False if none arrive in time. Raises WebSocketError if
        the client leaves, or does not answer our Close in time."""
        wire = self.wire
        held, deadline = len(wire.received), wire.loop.time() + seconds
        while len(wire.received) == held:
            if wire.ended:
                raise WebSocketError(NO_CLOSE, "the client left without a Close")
            try:
                yield self.close_by if self.state is CLOSING else deadline
            except TimeoutError:
                if self.state is not CLOSING:
                    return False
                if wire.loop.time() >= self.close_by:  # and not an old ping's time
                    wire.transport.abort()
                    raise WebSocketError(NO_CLOSE, "no answer to our Close") from None
        return True

    def put(self, opcode: Opcode, payload: bytes) -> Wait:
        """Keep a message for the app. While too much is unread, read no more frames,
        not even a Ping."""
        text = opcode is Opcode.TEXT
        content = {"text": payload.decode()} if text else {"bytes": payload}
        size = EMPTY_MESSAGE + len(payload)
        self.messages.append(({"type": "websocket.receive", **content}, size))
        self.unread += size
        while self.unread > HIGH_WATER and self.state is OPEN and not self.wire.lost:
            yield math.inf

    def closed(self, code: int, reason: str = "") -> None:
        """The client has said Close, broken the protocol or left. If it is the first,
        reply with its code (RFC 6455 §5.5.1). Then the server ends the connection first
        (RFC 6455 §7.1.1), in stages as for HTTP."""
        if self.state is OPEN:
            self.told = True
            if code != NO_CLOSE:
                payload = b"" if code == NO_CODE else code.to_bytes(2, "big")
                self.wire.write(encode_frame(Opcode.CLOSE, payload))
        if self.disconnect["code"] != RESTART:  # what we have said is what counts
            self.disconnect.update(code=code, reason=reason)
        self.state = COMPLETE

    # The app's side, in its own task.

    async def receive(self) -> Message:
        """websocket.connect, then every message, then websocket.disconnect."""
        while not self.messages:
            if self.state in UNANSWERED and self.wire.ended:
                self.told = True
            # While it is open, what the client said before it left is still to come.
            over = self.state is COMPLETE or self.client_left()
            if over and self.state is not OPEN:
                return dict(self.disconnect)
            await self.wire.until_change()
        message, size = self.messages.popleft()  # walk: ws 5
        if self.unread > HIGH_WATER:
            self.wire.look_again_soon()  # `put` waits for this
        self.unread -= size
        return message

    def handle(self, message: Message) -> None:
        match self.state, message["type"]:
            case State.EXPECTING_START, "websocket.accept":
                self.accept(message)
            case State.EXPECTING_START, "websocket.close":
                super().handle({"type": "http.response.start", "status": 403})
                super().handle({"type": "http.response.body"})
            case (State.EXPECTING_START | State.EXPECTING_BODY), kind if kind in DENIAL:
                # ASGI extension "Websocket Denial Response".
                super().handle({**message, "type": kind.removeprefix("websocket.")})
            case State.OPEN, "websocket.send":
                self.send_message(message)
            case State.OPEN, "websocket.close":
                reason = message.get("reason") or ""
                self.start_close(message.get("code", 1000), reason)
            case state, kind:
                raise RuntimeError(f"unexpected message {kind!r} in {state.name}")

    def accept(self, message: Message) -> None:
        """Finish the opening handshake (RFC 6455 §4.2.2)."""
        asked, subprotocol = self.request.headers, message.get("subprotocol")
        extra = all_fields(self.server, message.get("headers", ()), NOT_THE_APPS)
        if subprotocol not in (None, *tokens(asked, b"sec-websocket-protocol")):
            raise ValueError(f"subprotocol {subprotocol!r} was not offered")
        if any(name.lower().startswith(b"sec-websocket-") for name, _ in extra):
            raise ValueError("the server sets Sec-WebSocket fields; use subprotocol")
        key = tokens(asked, b"sec-websocket-key")[0].encode()
        proof = base64.b64encode(hashlib.sha1(key + WEBSOCKET_GUID).digest())
        fields = [*self.fields, (b"Sec-WebSocket-Accept", proof), *extra]
        if subprotocol is not None:
            fields.append((b"Sec-WebSocket-Protocol", subprotocol.encode()))
        how = {"status_code": 101, "reason": REASONS[101], "headers": fields}
        switch = self.conn.send(h11.InformationalResponse(**how))
        self.wire.write(switch)  # walk: ws 2
        self.finished(101, OPEN)
        if self.server.stopping.is_set():
            self.go_away()

    def send_message(self, message: Message) -> None:
        text, data = message.get("text"), message.get("bytes")
        if (text is None) == (data is None):
            raise ValueError("websocket.send needs either text or bytes")
        opcode = Opcode.BINARY if text is None else Opcode.TEXT
        payload = bytes(memoryview(data)) if text is None else text.encode()
        self.wire.write(encode_frame(opcode, payload))  # walk: ws 6

    def start_close(self, code: int, reason: str = "") -> None:
        """Say Close, and wait for the client to say it too (RFC 6455 §7.1.2)."""
        if not is_close_code(code):
            raise ValueError(f"{code} is not a close code to send (RFC 6455 §7.4)")
        payload = code.to_bytes(2, "big") + reason.encode()
        if len(payload) > 125:
            raise ValueError("the reason of a close is at most 123 bytes")
        self.wire.write(encode_frame(Opcode.CLOSE, payload))  # walk: ws 8
        self.state = CLOSING
        self.close_by = self.wire.loop.time() + CLOSE_TIMEOUT
        self.wire.look_again_soon()

    def go_away(self) -> None:
        """The server stops: 1012, "Service Restart", tells the client to come back."""
        self.start_close(RESTART)
        self.disconnect["code"] = RESTART
        self.told = True

    def explain(self, exc: BaseException) -> None:
        super().explain(exc)
        if self.state is OPEN:
            self.start_close(APP_FAILED)

    def ended(self, task: asyncio.Task) -> None:
        super().ended(task)
        if self.state is OPEN:  # the app returned without closing
            self.start_close(1000)


# ────────────────────────────────────────────────────────────────────── 9. Frames ──
#
# Bytes in, messages out, and the reverse. There is no asyncio and no ASGI here. What is
# wrong is refused at the first byte that shows it.


class Opcode(enum.IntEnum):
    """RFC 6455 §5.2. From 8 on: the control frames."""

    CONTINUATION, TEXT, BINARY = 0, 1, 2
    CLOSE, PING, PONG = 8, 9, 10


class WebSocketError(Exception):
    """The client broke the protocol, or left: (close code, reason for the log)."""


def encode_frame(opcode: Opcode, payload: bytes) -> bytes:
    """A whole message in one frame, unmasked, as a server must send it (RFC 6455
    §5.1)."""
    first, size = 0x80 | opcode, len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 2**16:
        return bytes((first, 126)) + size.to_bytes(2, "big") + payload
    return bytes((first, 127)) + size.to_bytes(8, "big") + payload


def apply_mask(mask: bytes, data: bytes) -> bytes:
    """XOR with a repeated mask (RFC 6455 §5.3). Both are taken as one large number, so
    that Python runs no loop over bytes: 16 MiB take some 45 ms."""
    size = len(data)
    key = (mask * (size // 4 + 1))[:size]
    mixed = int.from_bytes(data, "little") ^ int.from_bytes(key, "little")
    return mixed.to_bytes(size, "little")


def is_close_code(code: int) -> bool:
    """May it stand in a Close frame (RFC 6455 §7.4, and IANA's registry since)?"""
    defined = (1000, 1001, 1002, 1003, *range(1007, 1015))
    return isinstance(code, int) and (code in defined or 3000 <= code < 5000)


def parse_close(payload: bytes) -> tuple[int, str]:
    """The code and reason of a Close frame (RFC 6455 §5.5.1). Raises WebSocketError."""
    if not payload:
        return NO_CODE, ""
    code = int.from_bytes(payload[:2], "big")
    ensure(is_close_code(code), 1002, "bad close code")  # a single byte is none, too
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError:
        raise WebSocketError(1007, "the reason of a close is not UTF-8") from None


class FrameReader:
    """Makes messages of bytes, and waits for these bytes as it needs them."""

    def __init__(self, read: Callable[[int, int], Wait], max_size: int) -> None:
        self.read = read  # a generator: at least so many bytes, and at most so many
        self.max_size = max_size
        # The message of which we have read some frames; None between two messages.
        self.message: Opcode | None = None
        self.content = bytearray()

    def next(self) -> Wait:
        """The next message or control frame, as (opcode, payload). A control frame may
        come between the frames of a message (RFC 6455 §5.4). Raises WebSocketError."""
        while True:
            opcode, final, size = yield from self.next_header()
            mask = yield from self.read(4, 4)
            if opcode >= Opcode.CLOSE:
                return opcode, apply_mask(mask, (yield from self.read(size, size)))
            if opcode is not Opcode.CONTINUATION:
                self.message = opcode
                self.decoder = codecs.getincrementaldecoder("utf-8")()
            yield from self.next_payload(size, mask, final)
            if final:
                opcode, content = self.message, self.content
                self.message, self.content = None, bytearray()
                return opcode, bytes(content)

    def next_header(self) -> Wait:
        """What stands before the mask and the payload (RFC 6455 §5.2).

        first byte     FIN | RSV1 | RSV2 | RSV3 | opcode, 4 bits
        second byte    MASK | size, 7 bits: 126 means that the next 2 bytes are the
                       size, 127 that the next 8 bytes are
        """
        first, second = yield from self.read(2, 2)
        final, opcode, size = bool(first & 0x80), first & 0x0F, second & 0x7F
        control = opcode >= Opcode.CLOSE
        ensure(not first & 0x70, 1002, "a reserved bit is set")
        ensure(opcode in (0, 1, 2, 8, 9, 10), 1002, "a reserved opcode")
        ensure(second & 0x80, 1002, "a client must mask its frames (§5.1)")
        short = final and size <= 125
        ensure(short or not control, 1002, "a control frame is short, and in one piece")
        fits = control or (opcode == Opcode.CONTINUATION) == bool(self.message)
        ensure(fits, 1002, "a frame that does not continue its message")
        if size > 125:
            length, least = (2, 126) if size == 126 else (8, 2**16)
            size = int.from_bytes((yield from self.read(length, length)), "big")
            ensure(least <= size < 2**63, 1002, "a size in more bytes than it needs")
        fits = control or len(self.content) + size <= self.max_size
        ensure(fits, TOO_BIG, "message too big")
        return Opcode(opcode), final, size

    def next_payload(self, left: int, mask: bytes, final: bool) -> Wait:
        """Add a frame to its message, piece by piece: a frame larger than HIGH_WATER
        never arrives whole, and text is checked before all of it has arrived."""
        while True:
            piece = apply_mask(mask, (yield from self.read(min(1, left), left)))
            left -= len(piece)
            mask = (2 * mask)[len(piece) % 4 :][:4]  # turned by what it has masked
            if self.message is Opcode.TEXT:
                try:
                    self.decoder.decode(piece, final and not left)
                except UnicodeDecodeError:
                    raise WebSocketError(1007, "text that is not UTF-8") from None
            self.content += piece
            if not left:
                return
