"""foal: a complete ASGI server that a person can read in an afternoon.

Owns: the command line, the composition of the four leaves, the life of a server, and
    the protocols: HTTP/1.1 by h11, TLS by asyncio, WebSocket, ASGI, lifespan.
Must not know: how an address is bound, why a loop was chosen, when a worker is
    replaced; the leaves decide that, and say it in a sentence.

Read beside: ASGI specification (main, www, lifespan); RFC 9112, RFC 9110 and RFC 6455;
    h11 docs, "API documentation"; Python docs, asyncio — "Transports and Protocols".

The bug that shaped it: `python server.py` loads this file as __main__, and an app that
    says `import server` would load it again, with other classes under the same names.
    So the first lines hand over to the importable twin, and nothing else happens at
    import time.

Contents, outermost first. Read down until you have what you came for.
    1  Command line      main, make_parser, Config
    2  Composition       run, supervise, serve_in_worker, serve_here, serve, load_app
    3  Server            Server
    4  Lifespan          Lifespan
    5  Connection        HTTPConnection, check_request, fill_scope, Gate
    6  Request           RequestResponseCycle
    7  WebSocket         WebSocketState, check_handshake, WebSocketSession
    8  Frames            encode_frame, FrameDecoder, Deflate
    9  Trace             start_trace, Row, Trace, Wire, TracedH11, traced
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import codecs
import collections
import contextlib
import contextvars
import dataclasses
import email.utils
import enum
import errno
import functools
import hashlib
import http
import importlib
import inspect
import ipaddress
import itertools
import logging
import math
import os
import re
import signal
import socket
import ssl
import stat
import struct
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn
from urllib.parse import unquote

try:
    import h11
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    # A newcomer's first mistake deserves a sentence instead of a traceback.
    how = f'{sys.executable} -m pip install "h11>=0.16"'
    print(f"foal needs h11; run: {how}", file=sys.stderr)
    sys.exit(3)

if __name__ == "__main__":
    # Run the importable twin of this file: apps and workers meet the same classes. Here
    # and not at the end, because to make twice what follows takes 5 ms.
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # python -P lacks it
    import server

    sys.modules["__main__"] = server  # whose compiled form is cached, for workers too
    sys.exit(server.main())

import loops
import reload
import sockets

if TYPE_CHECKING:  # one process alone does without multiprocessing: 10 ms and 1 MiB
    import multiprocessing.connection

    import workers

__version__ = "0.1.0"

# The types of the ASGI specification: an app is called with a scope and two functions.
Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("server")
access_logger = logging.getLogger("server.access")


class StartupError(Exception):
    """The server could not start. The message is one line that says what to do; the
    cause, if there is one, is the app's own exception, shown with its traceback."""


class ClientDisconnected(OSError):
    """Raised by send once nobody is there to read (ASGI www, "Disconnected Client")."""


# ──────────────────────────────────────────────────────────────── 1. Command line ──
#
# What was asked? Every option is one field of Config: its name, type, default, limits
# and help stand in one place, and the parser and README's table are made from it. Names
# are uvicorn's where the meaning is the same.


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code (README, "Exit codes")."""
    try:
        config = parse_args(arguments)
    except ValueError as exc:
        print(f"foal: {exc} (--help lists the options)", file=sys.stderr)
        return 2
    code = run(config)
    leave_within(5.0, code)  # a thread of the app may never end
    return code


def parse_args(arguments: list[str] | None = None) -> Config:
    """Make a Config of arguments, by default sys.argv's. Raises ValueError."""
    return Config(**vars(make_parser().parse_args(arguments)))


def make_parser() -> Parser:
    title = (__doc__ or "").partition("\n")[0]  # python -OO has none
    parser = Parser("server.py", description=title, allow_abbrev=False)
    parser.add_argument("app", metavar="MODULE:ATTRIBUTE", help="for example main:app")
    parser.add_argument("--version", action="version", version=versions())
    for field in dataclasses.fields(Config)[1:]:
        how: dict[str, Any] = {"help": field.metadata["help"]}
        if field.type == "bool":  # naming it turns the default round
            how["action"] = "store_false" if field.default else "store_true"
        else:
            kind = field.type.split()[0]  # a string: annotations are not evaluated
            how["action"] = "append" if kind == "Repeated" else "store"
            how["type"] = {"int": int, "float": float}.get(kind, str)
            seconds = "SECONDS" if kind == "float" else None
            how["metavar"] = field.metadata["metavar"] or seconds
        flag = flag_of(field)
        parser.add_argument(flag, dest=field.name, default=field.default, **how)
    return parser


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes as one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def flag_of(field: dataclasses.Field) -> str:
    """The option of a field of Config."""
    no = "no-" if field.default is True else ""
    return f"--{no}{field.name.replace('_', '-')}"


def option(default: Any, help: str, metavar: str | None = None, **limits: Any) -> Any:
    """A field of Config that is also an option. Limits: minimum, maximum, choices."""
    if "choices" in limits:
        help = f"{help}: {', '.join(limits['choices'])}"
    if default not in (None, "") and type(default) is not bool:
        help += " (default: %(default)s)"
    metadata = {"help": help, "metavar": metavar, **limits}
    return dataclasses.field(default=default, metadata=metadata)


Repeated = list[str] | None  # an option that may be given several times
LEVELS = ("debug", "info", "warning", "error")


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole program's input. Times are seconds. Raises ValueError, one line."""

    app: ASGIApp | str  # an ASGI 3 application, or "MODULE:ATTRIBUTE"

    host: str = option("127.0.0.1", 'address or name to listen on, "" for all')
    port: int = option(8000, "TCP port, 0 for a free one", minimum=0, maximum=65535)
    uds: str | None = option(None, "listen on a Unix socket instead", "PATH")
    fd: int | None = option(
        None, "adopt an open socket instead", minimum=0, maximum=2**31 - 1
    )
    backlog: int = option(
        2048, "connections that may wait to be accepted", minimum=1, maximum=2**31 - 1
    )

    workers: int = option(1, "processes that accept and serve", minimum=1)
    reload: bool = option(False, "replace the workers when a file changes")
    reload_dir: Repeated = option(None, "watch here, not --app-dir; repeatable", "DIR")
    reload_include: Repeated = option(None, "watch these too; repeatable", "PATTERN")
    reload_exclude: Repeated = option(None, "but not these; repeatable", "PATTERN")
    reload_delay: float = option(0.25, "least time between two looks", minimum=0)

    loop: str = option("auto", "auto, asyncio, selector, proactor or MODULE:FACTORY")
    lifespan: str = option("auto", "lifespan events", choices=("auto", "on", "off"))
    factory: bool = option(False, "the app is a function that returns the app")
    app_dir: str = option(".", "folder to import the app from", "DIR")
    root_path: str = option("", "path under which a proxy mounts the app", "PATH")

    log_level: str = option("info", "least level to log", choices=LEVELS)
    access_log: bool = option(True, "no line for each request")
    trace: bool = option(False, "print what passes through each layer")
    pathsend: bool = option(True, "no pathsend, which some middleware loses")
    header: Repeated = option(None, "field of each response; repeatable", "NAME:VALUE")
    server_header: bool = option(True, "no Server field")
    proxy_headers: bool = option(False, "believe X-Forwarded-For and -Proto")
    forwarded_allow_ips: str = option("127.0.0.1,::1", "proxies, or *", "LIST")

    limit_concurrency: int | None = option(None, "in flight, then 503", minimum=1)
    limit_max_requests: int | None = option(None, "requests, then stop", minimum=1)
    timeout_keep_alive: float = option(5.0, "wait for the next request", minimum=0)
    timeout_request_head: float = option(10.0, "wait for a whole head", minimum=0)
    timeout_request_body: float = option(60.0, "wait for more of a body", minimum=0)
    timeout_graceful_shutdown: float = option(10.0, "wait on stop", minimum=0)
    ssl_certfile: str | None = option(None, "certificate chain: speak TLS", "FILE")
    ssl_keyfile: str | None = option(None, "its key, if not in that file", "FILE")
    ssl_keyfile_password: str | None = option(None, "of the key", "TEXT")
    ws_max_size: int = option(2**24, "bytes of a WebSocket message", minimum=1)
    ws_ping_interval: float = option(20.0, "wait for a ping, 0 for none", minimum=0)
    ws_ping_timeout: float = option(20.0, "wait for its pong, 0 for ever", minimum=0)
    ws_deflate: bool = option(True, "no permessage-deflate")
    # No default: only the app's author knows how long its event loop may be blocked.
    timeout_worker_healthcheck: float | None = option(
        None, "replace if silent", minimum=1
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            limit = field.metadata.get
            low, high, choices = limit("minimum"), limit("maximum"), limit("choices")
            if None not in (value, low) and not value >= low:  # so put, it refuses NaN
                raise ValueError(f"{flag_of(field)} must be {low} or more, not {value}")
            if None not in (value, high) and value > high:
                raise ValueError(f"{flag_of(field)} must be at most {high}")
            if choices and value not in choices:
                names = ", ".join(choices)
                raise ValueError(f"{flag_of(field)} must be {names}, not {value!r}")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("--ssl-keyfile needs --ssl-certfile")
        # Called now, so that what is wrong with them is said before anything is done.
        for check in (self.loop_choice, self.extra_headers, self.trusted_proxies):
            check()

    @property
    def scheme(self) -> str:
        return "https" if self.ssl_certfile else "http"

    @property
    def shared(self) -> bool:
        """Will other processes than this one accept on the listeners?"""
        return self.reload or self.workers > 1

    def loop_choice(self) -> loops.LoopChoice:
        """Which loop, and why. Raises ValueError."""
        return loops.choose(self.loop, platform=sys.platform, shared=self.shared)

    def extra_headers(self) -> list[tuple[bytes, bytes]]:
        """--header's values, as fields. Raises ValueError."""
        pairs = [text.split(":", 1) for text in self.header or ()]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"--header needs NAME:VALUE, not {self.header}")
        fields = [(n.strip().lower().encode(), v.strip().encode()) for n, v in pairs]
        if {b"content-length", b"transfer-encoding"} & dict(fields).keys():
            raise ValueError("--header cannot say how long a response is")
        try:
            h11.EndOfMessage(headers=fields)  # the grammar is h11's business
        except h11.LocalProtocolError as exc:
            raise ValueError(f"--header needs NAME:VALUE: {exc}") from None
        return fields

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
# Who will do it? Listeners are bound, and listen, before the app is imported: a busy
# port fails at once, in one line, in one place. Then either this process serves, or it
# becomes the supervisor of workers that do, and never imports the app at all.


def run(app: ASGIApp | str | Config, **options: Any) -> int:
    """Serve until a signal; return the exit code (README, "Exit codes").

    From Python: `server.run(app, port=0)`; the options are Config's fields.
    """
    config = app if isinstance(app, Config) else Config(app, **options)
    configure_logging(config)
    with contextlib.ExitStack() as cleanup:
        try:
            check_surroundings(config)
            listeners = open_listeners(config, cleanup)
            logger.info("%s, pid %d", versions(), os.getpid())
            loop = config.loop_choice()
            name = loop.factory.removeprefix("asyncio:")
            logger.info("loop: %s, because %s", name, loop.reason)
            if config.shared:
                return supervise(config, listeners, cleanup)
        except StartupError as exc:
            logger.error("%s", exc)
            return 3
        return serve_here(Server(config, listeners), cleanup)


def configure_logging(config: Config, worker: bool = False) -> None:
    """Lines on standard error, unless our caller has set up its own logging."""
    logger.setLevel(config.log_level.upper())
    if logger.hasHandlers():
        return
    pid = "[%(process)d] " if worker else ""
    handler = LogHandler()
    handler.setFormatter(LogFormatter(f"%(asctime)s %(levelname)-7s {pid}%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False  # the app may give the root logger a handler as well


class LogHandler(logging.StreamHandler):
    """Lines on standard error. Those about requests leave with their answers, at the
    end of this turn of the loop, in one system call, which saves 9 µs a line."""

    together = 4096  # bytes at most: a pipe takes so many in one piece (pipe(7))

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.size = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + self.terminator
            if self.size + len(line) > self.together:  # workers share the pipe
                self.flush()
            self.lines.append(line)
            self.size += len(line)
            if record.name != access_logger.name:
                self.flush()
            elif len(self.lines) == 1:
                asyncio.get_running_loop().call_soon(self.flush)
        except Exception:  # in a repr of the app's, or standard error is closed
            self.handleError(record)

    def flush(self) -> None:
        with self.lock, contextlib.suppress(Exception):  # nobody is left to be told
            lines, self.lines, self.size = self.lines, [], 0
            self.stream.write("".join(lines))
            self.stream.flush()


class LogFormatter(logging.Formatter):
    """Colours for levels: on a terminal only, and not with NO_COLOR (no-color.org)."""

    colours = {logging.ERROR: "\x1b[31m", logging.WARNING: "\x1b[33m"}

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        colour = self.colours.get(record.levelno)
        if colour and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
            line = f"{colour}{line}\x1b[0m"
        return line


def check_surroundings(config: Config) -> None:
    """Raises StartupError for what no later step could explain as well."""
    if tuple(map(int, h11.__version__.split(".")[:2])) < (0, 16):
        # Older ones let two readers of one chunked body disagree (CVE-2025-43859).
        raise StartupError(f'h11 {h11.__version__} is too old; pip install "h11>=0.16"')
    tls_options(config)
    processes = sys.modules.get("multiprocessing")
    if processes and processes.current_process().name == "foal worker":
        # That is workers.NAME. A spawned worker imports the script that started us
        # (uvicorn #949, #1045), and that one has called us again.
        raise StartupError('put server.run(…) below: if __name__ == "__main__":')
    if config.shared and not isinstance(config.app, str):
        raise StartupError("workers import the app: pass its MODULE:ATTRIBUTE")


def tls_options(config: Config) -> dict[str, Any]:
    """What --ssl-certfile asks of asyncio, if anything. Raises StartupError."""
    if config.ssl_certfile is None:
        return {}
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    context.sslobject_class = TLSObject
    password = config.ssl_keyfile_password or ""  # "": never ask on the terminal
    files = config.ssl_certfile, config.ssl_keyfile
    try:
        context.load_cert_chain(*files, password)
    except OSError as exc:  # ssl.SSLError is one
        files = " --ssl-keyfile ".join(filter(None, files))
        raise StartupError(f"--ssl-certfile {files}: {exc.strerror or exc}") from None
    return {
        "ssl": context,
        "ssl_handshake_timeout": config.timeout_request_head or None,
        # asyncio counts from close on, however much is unsent, and breaks off then. It
        # wants a number for never; our ticker sees who still reads.
        "ssl_shutdown_timeout": 86_400.0,
    }


class TLSObject(ssl.SSLObject):
    """asyncio keeps a failed handshake to itself; this tells why."""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except ssl.SSLWantReadError:
            raise
        except ssl.SSLError as exc:
            plain = exc.reason in ("HTTP_REQUEST", "WRONG_VERSION_NUMBER")
            hint = " (this looks like plain HTTP)" if plain else ""
            logger.warning("TLS handshake failed: %s%s", exc.reason, hint)
            raise


def open_listeners(
    config: Config, cleanup: contextlib.ExitStack
) -> list[socket.socket]:
    """Bind and listen as asked; `cleanup` undoes it. Raises StartupError."""
    fds = sockets.systemd_fds(os.environ, os.getpid())
    try:
        if config.fd is not None:
            listeners = [sockets.adopt(config.fd, config.backlog)]
        elif config.uds is not None:
            listener, remove_file = sockets.bind_unix(config.uds, config.backlog)
            cleanup.callback(remove_file)
            listeners = [listener]
        elif fds:
            listeners = [sockets.adopt(fd, config.backlog) for fd in fds]
        else:
            listeners = sockets.bind_tcp(config.host, config.port, config.backlog)
    except OSError as exc:
        raise StartupError(exc.strerror or str(exc)) from None
    for listener in listeners:
        cleanup.callback(listener.close)
        # On Windows, to pickle one for a worker sets this mode for all of them, and one
        # that serves already must not begin to wait in its accept.
        listener.setblocking(False)
    return listeners


def supervise(
    config: Config, listeners: list[socket.socket], cleanup: contextlib.ExitStack
) -> int:
    """Be the parent: workers serve, the watcher says when to replace them."""
    import workers

    if not hasattr(workers, "Supervisor"):  # with -m, the current folder comes first
        raise StartupError(f"{workers.__file__} has a name of foal's; rename it")
    watcher = None
    if config.reload:
        folders = config.reload_dir or [config.app_dir]
        if absent := [folder for folder in folders if not os.path.isdir(folder)]:
            raise StartupError(f"cannot watch {absent[0]}: it is no folder")
        patterns = config.reload_include or (), config.reload_exclude or ()
        watcher = reload.Watcher(folders, *patterns, delay=config.reload_delay)
        logger.info("watching %s", ", ".join(watcher.folders))
    supervisor = workers.Supervisor(
        serve_in_worker,
        (config, listeners),
        config.workers,
        # After its grace a worker cancels, and its lifespan has as long once more.
        grace=2 * config.timeout_graceful_shutdown + 5.0,
        silence_limit=config.timeout_worker_healthcheck,
        should_restart=watcher and watcher.changed,
        on_ready=functools.partial(announce, config, listeners),
        on_stop=cleanup.close,  # the last listener: no client waits for nobody
    )
    return supervisor.run()


def announce(config: Config, listeners: list[socket.socket]) -> None:
    """Where to point a browser; said when it answers and not before."""
    for listener in listeners:
        address = sockets.describe(listener, config.scheme)
        logger.info("listening on %s (Ctrl-C to stop)", address)


def serve_in_worker(
    config: Config,
    listeners: list[socket.socket],
    pipe: multiprocessing.connection.Connection,
) -> None:
    """Be the child: the target of every worker process."""
    import workers

    workers.ignore_group_signals()  # walk: worker 2
    if config.reload:
        # A compiled file is matched to its source by a second and a size alone, and two
        # saves within one second may be equally long.
        sys.dont_write_bytecode = True
    for listener in listeners:
        listener.set_inheritable(False)  # spawn had to make it so (PEP 446)
    configure_logging(config, worker=True)
    with contextlib.ExitStack() as cleanup:
        code = serve_here(Server(config, listeners, workers.Lifeline(pipe)), cleanup)
    leave_within(5.0, code)
    sys.exit(code)


def serve_here(server: Server, cleanup: contextlib.ExitStack) -> int:
    """Run a loop with this server in this process; return the exit code."""
    code = 0
    try:
        with stop_on_signals(server, cleanup), contextlib.ExitStack() as running:
            try:
                runner = running.enter_context(make_runner(server.config))
                runner.run(server.serve())
            except StartupError as exc:
                log_startup_error(exc)
                code = 3
            cleanup.close()
            # Closing a loop waits for the app's tasks and threads.
            overdue = leave_within(5.0, code)
        overdue.cancel()
    except KeyboardInterrupt:
        logger.info("stopped before the app was loaded")
    return code


def make_runner(config: Config) -> asyncio.Runner:
    """A runner with the loop that was asked for. Raises StartupError."""
    try:
        make = functools.partial(loops.make, config.loop_choice().factory)
        runner = asyncio.Runner(loop_factory=make)
        runner.get_loop().set_exception_handler(loop_error)
    except ValueError as exc:
        raise StartupError(str(exc)) from None
    return runner


def log_startup_error(exc: Exception) -> None:
    """One line; above it, if the app is to blame, its own traceback."""
    logger.disabled = False  # as logging.config leaves it, if an app uses that
    if isinstance(exc.__cause__, BaseException):
        logger.error("%s", app_traceback(exc.__cause__))
    logger.error("%s", exc)


async def serve(app: ASGIApp | str, **options: Any) -> None:
    """The same inside a running loop: cancel the task to stop, gracefully.

    Signals and logging belong to whoever runs the loop. Raises StartupError.
    """
    config = Config(app, **options)
    with contextlib.ExitStack() as cleanup:
        server = Server(config, open_listeners(config, cleanup))
        try:
            await server.serve()
        finally:  # cancelled at startup; or again and again, as anyio does
            server.end()
            tasks = {server.lifespan.task, *server.tasks, *server.greetings}
            for task in filter(None, tasks):
                task.cancel()


@contextlib.contextmanager
def stop_on_signals(server: Server, cleanup: contextlib.ExitStack) -> Iterator[None]:
    """The first SIGINT or SIGTERM stops gracefully; one more ends at once."""
    pid = os.getpid()

    def on_signal(number: int, frame: object) -> None:
        # Runs between any two bytecodes, perhaps with a lock held: no logging here
        # (gunicorn #2564). Note it, wake the loop, act there.
        if os.getpid() != pid:  # a process that the app forked: it ends like any other
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if server.stop_signal or server.stopping.is_set():
            cleanup.close()
            os._exit(128 + number)
        server.stop_signal = number
        if server.app is None:
            raise KeyboardInterrupt  # no loop listens yet: leave the app's import
        server.stop_soon(signal.Signals(number).name)

    # A worker's Ctrl-C is its supervisor's business. SIGBREAK is Windows' Ctrl-Break.
    names = ("SIGTERM",) if server.lifeline else ("SIGINT", "SIGTERM", "SIGBREAK")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python delivers signals to the main thread alone
    with contextlib.ExitStack() as previous:
        for number in numbers:
            previous.callback(signal.signal, number, signal.signal(number, on_signal))
        yield


def leave_within(seconds: float, code: int) -> threading.Timer:
    """End the process then, whatever still runs in it. A stop is finite."""

    def leave() -> None:
        names = [t.name for t in threading.enumerate() if t.name != timer.name]
        logger.warning("leaving although these threads still run: %s", ", ".join(names))
        os._exit(code)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    if threading.current_thread() is threading.main_thread():
        timer.start()  # else the process is somebody else's
    return timer


def load_app(config: Config) -> ASGIApp:
    """The application itself, from its name or factory. Raises StartupError."""
    app, name = config.app, config.app
    if isinstance(app, str):
        app = import_app(app, os.path.abspath(config.app_dir))
    if config.factory:
        try:
            app = app()
        except (Exception, SystemExit) as exc:
            raise StartupError(f"the factory {name} failed: {exc!r}") from exc
    if complaint := not_asgi(app):
        raise StartupError(f"{name} is not an ASGI 3 application: {complaint}")
    return app


def import_app(name: str, app_dir: str) -> Any:
    """Import MODULE:ATTRIBUTE from `app_dir`, or else from our own examples/."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or re.search(r"[/\\]|\.py$", module_name):
        why = f'"{name}" is not MODULE:ATTRIBUTE; app in main.py is main:app'
        raise StartupError(why)
    here = os.path.dirname(os.path.abspath(__file__))
    for ours in ("server", "loops", "sockets", "workers", "reload"):
        other = os.path.join(app_dir, f"{ours}.py")
        if app_dir != here and os.path.exists(other):
            if ours == module_name:
                why = f"{ours}.py has a name of foal's; rename it, or use a package"
                raise StartupError(why)
            if ours in sys.modules:  # with one process, workers is not
                logger.warning("import %s will give foal's, not %s", ours, other)
    sys.path.insert(0, app_dir)
    sys.path.append(os.path.join(here, "examples"))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as exc:  # the app's module is foreign code
        absent = exc.name if isinstance(exc, ModuleNotFoundError) else None
        if absent and f"{module_name}.".startswith(f"{absent}."):
            why = f'no module "{absent}" in {app_dir}; is --app-dir right?'
            raise StartupError(why) from None
        raise StartupError(f"{module_name} could not be imported: {exc!r}") from exc
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        import difflib  # for whoever mistypes, and nobody else

        near = difflib.get_close_matches(attribute, dir(module), 1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise StartupError(f'"{module_name}" has no "{attribute}"{hint}') from None


def not_asgi(app: Any) -> str:
    """What is wrong with this application, or "", going by its parameters."""
    if not callable(app):
        return f"a {type(app).__name__} cannot be called"
    try:
        signature = inspect.signature(app)
    except (TypeError, ValueError):  # none, as with a __call__ in __slots__: trust it
        return ""

    guesses = (
        (3, ""),
        (2, "it looks like WSGI; wrap it, for example in asgiref.wsgi.WsgiToAsgi"),
        (1, "it looks like ASGI 2; wrap it in asgiref's guarantee_single_callable"),
        (0, "is it a factory? then add --factory"),
    )
    for count, guess in guesses:
        with contextlib.suppress(TypeError):
            signature.bind(*range(count))
            return guess
    return f"it takes {signature}"


def broken_app(exc: StartupError) -> ASGIApp:
    """With --reload: an app that shows why the real one could not start. Only ever with
    --reload, because a traceback is nobody's business but its author's."""
    cause = exc.__cause__ and app_traceback(exc.__cause__)
    page = f"{exc}\n\n{cause or ''}\n".encode(errors="replace")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        fields = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": 500, "headers": fields})
        await send({"type": "http.response.body", "body": page})

    return app


def app_traceback(exc: BaseException) -> str:
    """A traceback for the app's author: without our frames and importlib's above it."""
    ours = (__file__, importlib.__file__, "<frozen importlib")
    trace = exc.__traceback__
    while trace and trace.tb_frame.f_code.co_filename.startswith(ours):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(exc), exc, trace)).rstrip()


# ────────────────────────────────────────────────────────────────────── 3. Server ──
#
# One process lives: start up, accept, wait, stop accepting, finish, shut down. The
# server also keeps what would otherwise be done for every request: one ticker looks at
# all deadlines and refreshes the Date field, the answers of one turn of the loop are
# written together, and equal response heads are validated once.

TICK = 0.25  # seconds: how late a deadline may be noticed
ACCEPTED_AT_ONCE = 32  # some 3 ms; then others have their turn
MOST_CONNECTIONS = 480 if sys.platform == "win32" else math.inf  # of select()'s 512
LONGEST_TURN = 0.001  # seconds that an answer waits for others of the same turn
RESPONSE_CACHE = 256  # events; whoever has more distinct ones a second gains nothing


class Server:
    """Serves one application on some listeners, in one process and one loop."""

    def __init__(
        self,
        config: Config,
        listeners: list[socket.socket],
        lifeline: workers.Lifeline | None = None,  # to a supervisor, if there is one
    ) -> None:
        self.config = config
        self.listeners = listeners
        self.lifeline = lifeline
        # A supervisor has said already what a worker would say.
        self.log = logger.debug if lifeline else logger.info
        self.app: ASGIApp | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.lifespan = Lifespan(self)
        self.state: dict[str, Any] = {}  # filled by lifespan, copied for each request
        self.proxies = config.trusted_proxies() if config.proxy_headers else []
        self.log_access = config.access_log and access_logger.isEnabledFor(logging.INFO)
        self.context = contextvars.Context()  # what every request starts from

        # What lives now: the loop holds tasks weakly (uvicorn #972), so we hold them.
        self.acceptors: list[asyncio.Server] = []  # of a proactor
        self.greetings: set[asyncio.Task] = set()  # from accept to connection_made
        self.connections: set[HTTPConnection] = set()
        self.unwritten: list[HTTPConnection] = []  # with bytes of this turn of the loop
        self.flush_at = 0.0
        self.tasks: set[asyncio.Task] = set()
        self.requests_left = config.limit_max_requests or math.inf
        self.most_tasks = config.limit_concurrency or math.inf

        # How it ends.
        self.stop_signal = 0
        self.stopping = asyncio.Event()

        # Refreshed by the ticker.
        self.ticker: asyncio.TimerHandle | None = None
        self.common_fields: list[tuple[bytes, bytes]] = []
        self.responses: dict[tuple, tuple[h11.Response, int | None]] = {}

    async def serve(self, ready: Callable[[], None] = lambda: None) -> None:
        """The server's life. Calls `ready` once it accepts. Raises StartupError."""
        self.loop = asyncio.get_running_loop()
        self.context = contextvars.copy_context()
        if self.lifeline:
            self.lifeline.watch(self.stop_soon)
        tls = tls_options(self.config)  # a mistake is said before the app is loaded
        await self.start_app()
        try:
            if not self.stopping.is_set():
                await self.start_accepting(tls)
                ready()
                await self.stopping.wait()
        finally:  # also when the task that serves is cancelled
            self.stopping.set()
            await self.stop_accepting()
            await self.finish_requests()  # walk: worker 7
            await self.lifespan.shutdown()
            self.log("stopped")

    async def start_app(self) -> None:
        """Load the app and tell it to start up. What is broken is fatal, but for
        --reload: there every request gets the traceback, until the next change."""
        try:
            self.app = load_app(self.config)
            if self.stop_signal:  # and the app's import has swallowed it
                raise KeyboardInterrupt
            await self.lifespan.startup()
            logger.disabled = access_logger.disabled = False  # see log_startup_error
        except StartupError as exc:
            if not self.config.reload:
                raise
            log_startup_error(exc)
            self.app = broken_app(exc)

    def stop(self, reason: str = "asked by the supervisor") -> None:
        """Ask for a graceful stop. It goes on in `serve`."""
        self.log("%s: stopping", reason)
        self.stopping.set()
        self.lifespan.interrupt()

    def retire(self) -> None:
        """--limit-max-requests is reached."""
        if self.lifeline:
            self.lifeline.say("retire")  # serves on until its successor is ready
        else:
            self.stop("--limit-max-requests is reached")

    def stop_soon(self, *reason: str) -> None:
        """The same from another thread, or from a signal handler."""
        with contextlib.suppress(RuntimeError):  # the loop has just been closed
            self.loop.call_soon_threadsafe(self.stop, *reason)

    async def start_accepting(self, tls: dict[str, Any]) -> None:
        self.tick()
        make = functools.partial(HTTPConnection, self)
        if self.config.trace:
            make = start_trace(self)
        self.connect = functools.partial(self.loop.connect_accepted_socket, make, **tls)
        for listener in self.listeners:
            listener.setblocking(False)  # a worker's may be a duplicate in another mode
            try:
                self.watch(listener)
            except NotImplementedError:  # a proactor accepts by itself, one a turn
                acceptor = await self.loop.create_server(
                    make, sock=listener, backlog=self.config.backlog, **tls
                )
                self.acceptors.append(acceptor)
        if self.lifeline:
            self.lifeline.say("ready")  # walk: worker 3
        else:
            announce(self.config, self.listeners)

    def watch(self, listener: socket.socket) -> None:
        if not self.stopping.is_set():
            self.loop.add_reader(listener, self.accept, listener)

    def accept(self, listener: socket.socket) -> None:
        """Take in new connections. Not create_server: it knows one number for that and
        for the backlog. Of several workers each takes one a turn, so that a busy one
        leaves the others to an idle one; but whoever is alone takes many, or the last
        of a crowd would wait for as many turns as it has heads."""
        alone = self.config.workers == 1
        try:
            for _ in range(ACCEPTED_AT_ONCE if alone else 1):
                if len(self.connections) + len(self.greetings) >= MOST_CONNECTIONS:
                    raise OSError("select() takes no more sockets on Windows")
                sock, _ = listener.accept()
                task = self.loop.create_task(self.greet(sock))
                self.greetings.add(task)
                task.add_done_callback(self.greetings.discard)
        except (BlockingIOError, ConnectionError):
            pass  # there is no more; or one has left again
        except OSError as exc:  # existing connections go on
            if getattr(exc, "winerror", None) in loops.RESET_IN_BACKLOG:
                return
            hint = "; raise ulimit -n?" if exc.errno == errno.EMFILE else ""
            logger.error("cannot accept connections: %s%s", exc, hint)
            self.loop.remove_reader(listener)
            self.loop.call_later(1.0, self.watch, listener)

    async def greet(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):  # a handshake that failed: TLSObject tells
            await self.connect(sock)

    async def stop_accepting(self) -> None:
        # First no new ones; then those accepted in this turn become our connections,
        # because a proactor drops them if it finds its server closed; then close.
        for listener in self.listeners:
            with contextlib.suppress(NotImplementedError):
                self.loop.remove_reader(listener)
        for _ in range(3):
            await asyncio.sleep(0)
        for acceptor in self.acceptors:
            acceptor.close()  # and not wait_closed: see all_ended (cpython #104344)
        for listener in self.listeners:
            listener.close()
        # A handshake of TLS may become a request, for which there is a second as well.
        # Then nobody comes in any more: the app is about to be shut down.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_REQUEST):
                await asyncio.gather(*self.greetings, return_exceptions=True)

    async def finish_requests(self) -> None:
        """Wait for requests in flight, ever less patiently, for the grace in all."""
        half = self.config.timeout_graceful_shutdown / 2
        for connection in list(self.connections):
            connection.close_if_idle()
        if not await self.all_ended(half):
            logger.info("still running: %d; telling them to end", len(self.tasks))
            for connection in self.connections:
                if connection.cycle is not None:  # to a stream it is a client that left
                    connection.cycle.hang_up()
        if not await self.all_ended(half):
            logger.warning("still running: %d; cancelling them", len(self.tasks))
            for task in self.tasks:
                task.cancel()
            await self.all_ended(1.0)
        self.end()

    def end(self) -> None:
        """What is left of connections ends now, and the ticker."""
        for connection in list(self.connections):
            connection.transport.abort()
        if self.ticker:
            self.ticker.cancel()

    async def all_ended(self, seconds: float) -> bool:
        """Wait until no request runs and no connection is open; False if too late."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.tasks or self.connections:
                    await asyncio.sleep(0.01)  # so that no request has to tell
        return not (self.tasks or self.connections)

    def tick(self) -> None:
        """Four times a second: the date, and every deadline that has passed.

        One timer for all, because two timer calls a request cost more than its scope.
        """
        self.ticker = self.loop.call_later(TICK, self.tick)
        if self.lifeline:
            self.lifeline.say("alive")  # walk: worker 4
        date = (b"date", email.utils.formatdate(usegmt=True).encode())
        if date not in self.common_fields:
            server = [(b"server", b"foal")] if self.config.server_header else []
            extra = self.config.extra_headers()
            ours = [field for field in (date, *server) if field[0] not in dict(extra)]
            self.common_fields = [*ours, *extra]
            self.responses.clear()
        now = self.loop.time()
        for connection in [c for c in self.connections if c.deadline <= now]:
            connection.look(now)

    def flush_soon(self, connection: HTTPConnection) -> None:
        """The answers of one turn of the loop are written together, at its end or after
        LONGEST_TURN: a client that waits for several is woken once. It buys 10 %."""
        now = self.loop.time()
        if not self.unwritten:
            self.loop.call_soon(self.flush)
            self.flush_at = now + LONGEST_TURN
        self.unwritten.append(connection)
        if now >= self.flush_at:
            self.flush()

    def flush(self) -> None:
        try:
            while self.unwritten:
                self.unwritten.pop().flush()
        finally:  # nobody has to wait because a transport of somebody else's raises
            if self.unwritten:
                self.loop.call_soon(self.flush)

    def response(self, status: int, fields: list) -> tuple[h11.Response, int | None]:
        """A response event with our own fields added, and its Content-Length.

        Equal ones are validated once, which saves 9 µs a request. What is wrong with
        one raises h11.LocalProtocolError; a name or value that is not bytes, TypeError.
        """
        if not isinstance(status, int) or status is True:
            raise TypeError(f"status must be an int, not {status!r}")
        key = (status, *fields)
        try:
            return self.responses[key]
        except (KeyError, TypeError):
            pass  # because it is new; or a field is a list, which has no hash
        fields = bytes_only(key[1:])
        found = self.make_response(status, fields)
        if len(self.responses) < RESPONSE_CACHE:
            self.responses[status, *fields] = found
        return found

    def make_response(
        self, status: int, fields: tuple
    ) -> tuple[h11.Response, int | None]:
        """Add to the app's fields what it did not say; drop what is not its to say."""
        # Framing is the server's (ASGI www, "Response Start"); RFC 9110 §8.6 on 204.
        dropped = [b"transfer-encoding"] + [b"content-length"] * (status == 204)
        kept = [(n, v.strip(b" \t")) for n, v in fields if n.lower() not in dropped]
        kept = self.with_common(kept)
        event = h11.Response(status_code=status, headers=kept, reason=phrase(status))
        length = dict(event.headers).get(b"content-length")
        return event, None if length is None else int(length)

    def with_common(self, fields: list) -> list:
        """The app's fields, and those of ours that it did not set itself."""
        names = {name.lower() for name, _ in fields}
        return fields + [f for f in self.common_fields if f[0] not in names]


def loop_error(loop: asyncio.AbstractEventLoop, context: dict) -> None:
    """What asyncio has nobody to tell."""
    error = context.get("exception")
    if getattr(error, "winerror", None) in loops.RESET_IN_BACKLOG:
        logger.debug("a client left before it was accepted: %s", error)
    elif isinstance(error, Exception):
        logger.error("%s: %s", context["message"], app_traceback(error))
    else:
        loop.default_exception_handler(context)


def phrase(status: int) -> bytes:
    """The reason phrase of a status code, or nothing (RFC 9112 §4)."""
    with contextlib.suppress(ValueError):
        return http.HTTPStatus(status).phrase.encode()
    return b""


# ──────────────────────────────────────────────────────────────────── 4. Lifespan ──
#
# The app's conversation with the process: one task, two questions, and a future for the
# answer to the one that was asked last. The end of the task is an answer, too.


class Lifespan:
    """ASGI lifespan 2.0: startup before the first request, shutdown after the last."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.mode = server.config.lifespan
        self.task: asyncio.Task | None = None  # None while the app takes no part
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.question = ""
        self.answer: asyncio.Future[str]  # to the question, from `ask` on
        self.text = ""  # what the app says about a failure
        self.error: BaseException | None = None  # what it raised at startup

    async def startup(self) -> None:
        """Raises StartupError if the app says that it cannot."""
        if self.mode == "off":
            return
        self.task = asyncio.create_task(self.run())
        answer = await self.ask("startup")
        if answer == "complete":
            return
        self.task.cancel()
        self.task = None
        if answer == "failed":
            raise StartupError(f"the app failed to start: {self.text}")
        if answer == "ended" and self.mode == "on":
            raise StartupError("the app does not support lifespan") from self.error
        if answer == "ended":  # "continue without lifespan support" (ASGI lifespan)
            why = self.error or "it returned at once"
            self.server.log("lifespan: not supported by the app: %r", why)

    async def shutdown(self) -> None:
        """Ask for the shutdown, and wait at most one more grace."""
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
        """Returns "complete", "failed", "ended" (without a word) or "interrupted"."""
        self.question, self.answer = question, self.server.loop.create_future()
        self.messages.put_nowait({"type": f"lifespan.{question}"})
        return await self.answer

    def reply(self, answer: str) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)

    def interrupt(self) -> None:
        """Do not wait for the startup any longer: the server was asked to stop."""
        if self.question == "startup":
            self.reply("interrupted")

    async def run(self) -> None:
        asgi = {"version": "3.0", "spec_version": "2.0"}
        scope = {"type": "lifespan", "asgi": asgi, "state": self.server.state}
        try:
            await self.server.app(scope, self.messages.get, self.send)
        except (Exception, SystemExit) as exc:  # the app is foreign code
            self.error = exc
            answer = self.answer.result() if self.answer.done() else ""
            if answer == "complete" or (self.question == "shutdown" and not answer):
                logger.error("lifespan: the app failed: %s", app_traceback(exc))
        finally:
            self.reply("ended")

    async def send(self, message: Message) -> None:
        kind = message["type"]
        topic, _, answer = kind.rpartition(".")
        expected = not self.answer.done() and topic == f"lifespan.{self.question}"
        if not expected or answer not in ("complete", "failed"):
            raise RuntimeError(f"unexpected message {kind!r} during {self.question}")
        self.text = message.get("message", "")
        self.reply(answer)


# ────────────────────────────────────────────────────────────────── 5. Connection ──
#
# One TCP connection, many requests. The easy path: a request arrives, the app answers,
# both sides reach DONE, we go round again. Everything else is leaving that path and
# asking h11 whether we may return to it (RFC 9112 §9.3, §9.6).
#
# When something goes wrong, blame decides. Their fault: the status that h11 hints at.
# The app's: 500, and a traceback in our log only. In both cases h11's state says
# whether an answer may still be given; if not, the connection ends in a way that looks
# incomplete.

TARGET_LIMIT = 8 * 1024  # RFC 9112 §3 recommends 8000 octets; nginx takes 8 KiB
HEAD_LIMIT = 64 * 1024  # node.js takes 16 KiB, uvicorn 64
FIELD_LIMIT = 100  # Apache takes 100
CHUNK_LINE_LIMIT = 1024  # a size and its extensions, which nobody sends
CHUNKS_AT_ONCE = 200  # some 3 ms; then others have their turn
HIGH_WATER = 64 * 1024  # unread body that we hold before we stop reading; asyncio's own
KERNEL_UNSENT = 128 * 1024  # bytes that the kernel holds beyond those on their way
STREAM_FLUSH = 64 * 1024  # from here on chunks are written at once; others have a turn
EMPTY_MESSAGE = 256  # bytes that a message counts for without its content
LINGER = 5.0  # seconds without a byte, after the last answer, until we stop reading
LINGER_TOTAL = 30.0  # seconds until we stop in any case; both are nginx's
FIRST_REQUEST = 1.0  # seconds for a new connection, once the server stops
CLOSE_NOTIFY = 0.5  # seconds for a client to end TLS in good order, then
SEND_TIMEOUT = 60.0  # seconds in which the kernel takes nothing from us, as nginx's
REFUSAL_FIELDS = {
    426: [(b"upgrade", b"websocket"), (b"sec-websocket-version", b"13")],
    503: [(b"retry-after", b"1")],
}
READABLE = (h11.IDLE, h11.SEND_BODY)  # the client's states in which bytes go to h11


class Waiting(enum.Enum):
    """What a connection waits for: which deadline runs now, and what its end means."""

    APP = "the app"  # to answer, or to take in what has arrived: without end
    HEAD = "a request head"  # absolute, from the connection or the first byte on
    NEXT_REQUEST = "the next request"  # absolute
    BODY = "the request body"  # between two parts of it
    CLIENT_TO_READ = "the client to read"  # between two looks that find progress
    CLIENT_TO_CLOSE = "the client to close"  # between two reads, and absolute
    # And of a WebSocket:
    PING = "our next ping"  # since the last byte
    PONG = "its pong"  # or any other byte
    CLOSE = "the client's Close"  # absolute


class HTTPConnection(asyncio.Protocol):
    """One connection: owns the transport and h11. Callbacks as they happen."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.loop = server.loop
        self.conn = h11.Connection(h11.SERVER, HEAD_LIMIT)
        self.gate = Gate()
        self.lingering = False  # answered for the last time; what arrives is dropped
        self.dropped = 0  # bytes

        # For each request.
        self.turn = 0  # how many there were
        self.template: Scope = {}  # made of gate.head, for the same head again
        self.cycle: RequestResponseCycle | None = None
        self.session: WebSocketSession | None = None  # takes the bytes, instead of h11

        # Flow control, and what is written together at the end of a turn of the loop.
        self.writable = asyncio.Event()
        self.writable.set()
        self.joined: list[bytes] = []
        self.chunks: list[bytes] = []  # behind them, and not yet framed
        self.joined_size = 0  # bytes of both

        # What we wait for, with how far it is, and when that ends: set by `look`, when
        # the ticker next finds the deadline to have passed. So 0.0 says "look again".
        self.waiting: tuple[Waiting, int, int] | None = None
        self.end = math.inf
        self.deadline = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        # Under TLS, what is encrypted waits in a transport below ours, which asyncio
        # shows nobody. It alone knows a slow reader from an idle one, and what failed;
        # and where it reads on for us, the client's end swallows what we then write.
        tls = getattr(transport, "_ssl_protocol", None)
        self.below = getattr(tls, "_transport", transport)
        server, config = self.server, self.server.config
        server.connections.add(self)
        own = transport.get_extra_info("sockname")
        peer = transport.get_extra_info("peername")
        tcp = isinstance(own, tuple)
        if not own or (tcp and not peer):
            # It was reset while it waited for accept. Whose request it was, nobody can
            # say any more: we do not take it for one that we trust.
            transport.abort()
        client = tuple(peer[:2]) if tcp and peer else None  # a Unix socket's has none
        self.peer = "%s:%d" % client if client else "unix"
        if tcp:
            # Else small answers wait 40 ms for an ACK. asyncio sets it only where the
            # listener's proto says TCP, and never in a proactor (uvicorn #3149).
            with contextlib.suppress(OSError):  # it may have left already
                sock = transport.get_extra_info("socket")
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if low_water := getattr(socket, "TCP_NOTSENT_LOWAT", 0):
                    # Else the kernel takes 2.5 MB from us for who reads no faster.
                    sock.setsockopt(socket.IPPROTO_TCP, low_water, KERNEL_UNSENT)
        self.scope = {  # walk: 2
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.5"},
            "server": tuple(own[:2]) if tcp and own else (os.fsdecode(own or ""), None),
            "client": client,
            "scheme": config.scheme,
            "root_path": config.root_path,
            "extensions": self.offer(),
        }
        # Who reaches our Unix socket is on this machine, and trusted.
        trusted = not client or is_trusted(client[0], server.proxies)
        self.behind_proxy = bool(server.proxies) and trusted

    def offer(self) -> dict[str, dict]:
        """What works on this connection (ASGI, "Extensions")."""
        found: dict[str, dict] = {"http.response.early_hint": {}}
        sends = isinstance(self.loop, asyncio.BaseEventLoop)  # others may not
        if sends and self.server.config.pathsend:
            found["http.response.pathsend"] = {}
        tls = self.transport.get_extra_info("ssl_object")
        if tls is not None:
            suites = {c["name"]: c["id"] & 0xFFFF for c in tls.context.get_ciphers()}
            found["tls"] = {
                "server_cert": None,
                "client_cert_chain": [],  # we do not ask for one
                "client_cert_name": None,
                "client_cert_error": None,
                "tls_version": ssl.TLSVersion[tls.version().replace(".", "_")].value,
                "cipher_suite": suites.get(tls.cipher()[0]),
            }
        return found

    # Reading.

    def data_received(self, data: bytes) -> None:
        self.deadline = 0.0
        if self.lingering:
            self.dropped += len(data)
            return
        if self.session is not None:
            self.session.data_received(data)
            return
        gate = self.gate
        # A bytearray, from Windows' proactor loop before Python 3.13.
        gate.buffer = gate.buffer + data if gate.buffer else bytes(data)
        self.read()
        if len(gate.buffer) > HIGH_WATER:
            self.limit_reading()

    def limit_reading(self) -> None:
        """Stop while more waits than we want to hold: body, or pipelined requests."""
        held = len(self.gate.buffer) + (self.cycle.body_size if self.cycle else 0)
        if held > HIGH_WATER and not self.lingering:
            self.below.pause_reading()
        else:
            self.below.resume_reading()
        self.deadline = 0.0

    def read(self) -> None:
        """Pass on what the gate lets through, until the request is complete or bytes
        are missing. What is wrong with them is raised as h11 does, and ends here."""
        conn, gate = self.conn, self.gate
        if self.lingering or gate.chunks == CHUNKS_AT_ONCE:
            return  # all has been answered, or the rest has a turn of its own
        if not self.writable.is_set() and conn.their_state is h11.IDLE:
            return  # it does not read our answers: no more of them for now
        try:
            while conn.their_state in READABLE and (piece := gate.next_piece()):
                conn.receive_data(piece)
                self.read_events()
                if gate.chunks == CHUNKS_AT_ONCE:
                    self.loop.call_soon(self.read_on)
                    return
            # Between two requests an end is good order, in a body h11 raises. Half a
            # head, or a request not yet read, is still to be looked at.
            if gate.eof and (not gate.buffer or conn.their_state is h11.SEND_BODY):
                conn.receive_data(b"")
                conn.next_event()
        except h11.RemoteProtocolError as exc:
            self.refuse(exc.error_status_hint, str(exc))
            return
        if gate.eof and self.cycle is None:
            self.close()  # all is said, or half a head that will never be whole

    def read_on(self) -> None:
        self.gate.chunks = 0
        self.read()
        if not self.below.is_reading():
            self.limit_reading()

    def read_events(self) -> None:
        conn, gate = self.conn, self.gate
        while (event := conn.next_event()) is not h11.NEED_DATA:
            kind = type(event)
            if kind is h11.Request:
                self.start_request(event)  # walk: 4
            elif kind is h11.Data:
                self.cycle.body_received(event.data)
            else:
                assert kind is h11.EndOfMessage, "the gate passes one message at a time"
                self.cycle.changed()  # their_state says that the body has arrived
                return
            if gate.part is LENGTH:
                return  # more has to arrive: not to ask h11 saves 1 µs

    def start_request(self, request: h11.Request) -> None:
        """Start the app in a task of its own.

        Raises h11.RemoteProtocolError with the status to answer.
        """
        server = self.server
        self.turn += 1
        if len(server.tasks) >= server.most_tasks:
            raise h11.RemoteProtocolError("too many requests at once", 503)
        if not self.gate.repeated:
            self.template = self.make_scope(request)
        scope = self.template.copy()  # the app may change what it gets
        scope["headers"] = scope["headers"].copy()
        scope["extensions"] = scope["extensions"].copy()
        scope["state"] = server.state.copy()
        kind = RequestResponseCycle
        if scope["type"] == "websocket":
            scope["subprotocols"] = scope["subprotocols"].copy()
            kind = WebSocketSession
        self.cycle = cycle = kind(self, request, scope)
        # Not loop.create_task: its extra layer costs 3 %. A fresh context, because we
        # may be here from the send of the request before, with that one's variables.
        context = server.context.copy()
        cycle.task = asyncio.Task(cycle.run(scope), loop=self.loop, context=context)
        server.tasks.add(cycle.task)
        server.requests_left -= 1
        if server.requests_left == 0:
            server.retire()

    def make_scope(self, request: h11.Request) -> Scope:
        """Check what a head says, and put it into ASGI's words; let the gate know of a
        body. All of it holds as well for the same bytes again: nothing else is asked.

        Raises h11.RemoteProtocolError with the status to answer.
        """
        fields = [(name.lower(), value) for name, value in request.headers.raw_items()]
        last = dict(fields)
        check_request(request, fields, last)  # walk: 5
        if b"content-length" in last or b"transfer-encoding" in last:
            self.gate.expect_body(last)
        scope = self.scope | {"extensions": self.scope["extensions"].copy()}
        fill_scope(scope, request, fields, last)
        if self.behind_proxy:
            fill_forwarded(scope, self.server.proxies)
        if b"upgrade" in last and wants_websocket(scope):
            check_handshake(scope)  # walk: ws 1
        return scope

    def eof_received(self) -> bool:
        """The client said all it will say. It may still be listening: answer it."""
        self.gate.eof = True
        if self.session is not None:
            self.session.read_on()  # TLS may bring this with more than it takes at once
            return False
        if self.lingering:
            return False  # that was what we waited for
        self.read()
        if self.cycle is not None:
            self.cycle.changed()
        return self.transport.can_write_eof()  # keep it open, unless it is TLS

    def connection_lost(self, exc: Exception | None) -> None:
        self.lingering = True
        self.joined.clear()
        self.chunks.clear()
        if self.cycle is not None:
            self.cycle.client_left()
        if self.session is not None:
            self.eof_received()
        self.writable.set()
        self.server.connections.discard(self)

    # Writing.

    def write(self, data: bytes) -> None:
        """Write at the end of this turn of the loop: the pieces of an answer leave in
        one system call."""
        self.joined.append(data)
        self.joined_size += len(data)
        if self.joined_size >= STREAM_FLUSH:
            self.flush()
        elif len(self.joined) == 1:
            self.server.flush_soon(self)

    def hold(self, chunk: bytes) -> None:
        """Part of a body whose length nobody knows, before `write`. What is flushed at
        a time is one chunk: h11 takes 3 µs for each, and where they begin means nothing
        to a client (RFC 9112 §7.1)."""
        self.chunks.append(chunk)
        self.joined_size += len(chunk)

    def frame(self) -> list[bytes]:
        """What is held, as one chunk in pieces."""
        body = b"".join(self.chunks)
        self.chunks.clear()
        self.joined_size -= len(body)
        return self.conn.send_with_data_passthrough(h11.Data(data=body))

    def flush(self) -> None:
        if self.chunks:
            self.joined += self.frame()
        # Not writelines: Python 3.12.0 to 3.12.8 never pauses us then (CVE-2024-12254).
        data = b"".join(self.joined)
        self.joined.clear()
        self.joined_size = 0
        if data and not self.transport.is_closing():
            self.transport.write(data)  # walk: 10

    def pause_writing(self) -> None:
        self.writable.clear()
        self.waiting = None  # a new wait, even if by chance as much is unsent
        self.deadline = 0.0

    def resume_writing(self) -> None:
        self.writable.set()
        self.deadline = 0.0
        if self.cycle is None and not self.lingering:
            # In a turn of its own: asyncio is still at work on what `read` may close.
            self.loop.call_soon(self.read_on)

    # Between requests.

    def response_ended(self) -> None:
        """The cycle is over: go round again if h11 agrees, else close."""
        self.cycle = None
        if self.server.stopping.is_set():
            self.close()
            return
        try:
            self.conn.start_next_cycle()  # walk: 11
        except h11.LocalProtocolError:
            self.close()  # with part of the request unread, too (RFC 9112 §9.3)
            return
        self.deadline = 0.0
        if self.gate.buffer or self.gate.eof or not self.below.is_reading():
            self.read_on()

    # Deadlines: one at a time. The hot path only notes that something has happened.

    def look(self, now: float) -> None:
        """Called by the ticker, and when the server stops. A wait that is new gets its
        end; one that goes on keeps it, however much drips in."""
        what, progress, seconds = self.waits_for(now)
        if (what, self.turn, progress) != self.waiting:
            self.waiting = what, self.turn, progress
            self.end = now + seconds
            if what is Waiting.NEXT_REQUEST:  # an idle connection shall be small
                self.gate.head, self.template = b"", {}
        # How far a client has read, nobody tells us: look again at the next tick.
        self.deadline = 0.0 if what is Waiting.CLIENT_TO_READ else self.end
        if self.end > now:
            return
        if what is Waiting.PING:
            self.session.ping()
        elif what not in (Waiting.HEAD, Waiting.NEXT_REQUEST, Waiting.BODY):
            self.transport.abort()
        elif self.cycle is None and not self.gate.buffer:
            self.close()  # there is nothing to answer
        else:
            self.refuse(408, f"waited too long for {what.value}")

    def waits_for(self, now: float) -> tuple[Waiting, int, float]:
        """What for, a number that changes with progress within it, and how long."""
        conn, config = self.conn, self.server.config
        # What the kernel has not yet taken from us, below TLS and above.
        transports = {self.transport, self.below}  # without TLS they are one
        if unsent := sum(t.get_write_buffer_size() for t in transports):
            return Waiting.CLIENT_TO_READ, unsent, SEND_TIMEOUT
        if self.lingering:
            seconds = min(LINGER, self.linger_end - now)
            return Waiting.CLIENT_TO_CLOSE, self.dropped, seconds
        if self.session is not None:
            return self.session.waits_for()
        if self.cycle is None and (self.gate.buffer or self.turn == 0):
            return Waiting.HEAD, 0, config.timeout_request_head
        if self.cycle is None:
            return Waiting.NEXT_REQUEST, 0, config.timeout_keep_alive
        if conn.their_state is h11.SEND_BODY and self.below.is_reading():
            if not conn.they_are_waiting_for_100_continue:
                return Waiting.BODY, self.cycle.arrived, config.timeout_request_body
        return Waiting.APP, 0, math.inf

    # Endings.

    def refuse(self, status: int, reason: str = "") -> None:
        """The one place that answers errors: with `status` if h11 allows it."""
        cycle, conn = self.cycle, self.conn
        answerable = conn.our_state in (h11.IDLE, h11.SEND_RESPONSE)
        text = b"%d %s\n" % (status, phrase(status))
        received = self.gate.head or self.gate.buffer
        content = b"" if received.startswith(b"HEAD ") else text
        if reason:
            seen = "" if cycle else excerpt(received)
            level = logging.INFO if self.gate.eof else logging.WARNING  # it just left
            logger.log(level, "%s: %d, %s%s", self.peer, status, reason[:200], seen)
        if cycle is not None:
            self.cycle = None
            cycle.client_left()
            cycle.state = COMPLETE
            cycle.sent += len(content) if answerable else 0
            cycle.log_access(status if answerable else cycle.response.status_code)
        if not answerable:
            self.cut()
            return
        fields = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", b"%d" % len(text)),
            (b"connection", b"close, upgrade" if status == 426 else b"close"),
        ]
        fields += REFUSAL_FIELDS.get(status, [])
        event, _ = self.server.response(status, fields)
        self.write(conn.send(event) + conn.send(h11.Data(data=content)))
        self.close()

    def close(self) -> None:
        """Tear down in stages, so that a reset does not overtake the answer: end our
        half, read on until the client ends its own (RFC 9112 §9.6)."""
        self.flush()
        self.gate.buffer = b""
        self.lingering = True
        self.deadline, self.waiting = 0.0, None
        stopping = self.server.stopping.is_set()
        # A client's close_notify, under TLS, is not worth a longer wait then.
        patience = CLOSE_NOTIFY if stopping else LINGER_TOTAL
        self.linger_end = self.loop.time() + patience
        if self.transport.is_closing():
            return  # asyncio's TLS does not bear a second close: it forgets its socket
        if self.below is not self.transport:
            self.below.resume_reading()  # for the client's close_notify
        if self.gate.eof or stopping:
            self.transport.close()
        else:
            try:
                self.transport.write_eof()  # walk: 12
                self.transport.resume_reading()
            except (OSError, NotImplementedError):
                self.transport.close()  # the client has reset it; or it is TLS

    def cut(self) -> None:
        """End an answer so that it does not look complete. Framing shows what is
        missing; an HTTP/1.0 answer without it ends with the connection, so that must
        break. (Where asyncio lets us: Windows' proactor loop ends it in good order.)"""
        if self.conn.their_http_version == b"1.0" and not self.transport.is_closing():
            layout = "hh" if sys.platform == "win32" else "ii"
            linger = struct.pack(layout, 1, 0)  # no waiting: close by a reset
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.flush()
            self.transport.abort()
        else:
            self.close()

    def close_if_idle(self) -> None:
        """The server stops. A client that was accepted a moment ago may be sending its
        first request: it has a second for it. And when workers are replaced, a proxy
        keeps its connections, and may be sending a POST that it must not repeat."""
        now = self.loop.time()
        what = self.waits_for(now)[0]
        replaced = self.server.lifeline and what is Waiting.NEXT_REQUEST
        if what is Waiting.HEAD or replaced:
            self.look(now)
            self.deadline = self.end = min(self.end, now + FIRST_REQUEST)
        elif self.cycle is None or self.lingering:
            self.close()
        elif self.session is not None:
            self.session.go_away()


def excerpt(data: bytes) -> str:
    """The first bytes received, safe for a log and a terminal; and a guess."""
    hint = " (this looks like TLS)" if data.startswith(b"\x16") else ""
    return f": {data[:60]!r}{hint}" if data else ""


# What h11 lets through and we do not. h11 checks syntax, leniently; two readers of one
# message that disagree make request smuggling, so we are strict (RFC 9112 §11.2). The
# gate looks at bytes before h11, check_request at the parsed request before the app.

HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[\w.~!$&'()*+;=%-]+)(:\d{0,5})?", re.ASCII)
ABSOLUTE_FORM = re.compile(rb"https?://([^/?]*)(.*)", re.IGNORECASE)
WITH_PORT = re.compile(r"^(?:\[(.*)\](?::\d+)?|([\d.]+):\d+)$")  # Azure's gateway
MOST_PROXIES = 50  # to look at 20,000, which a head can name, takes 0.2 s
PROTO = {b"http": "http", b"https": "https", b"ws": "http", b"wss": "https"}  # Traefik


def check_request(request: h11.Request, fields: list, last: dict) -> None:
    """Refuse what is well formed, and still not for us; `last` is dict(fields).

    Raises h11.RemoteProtocolError with the status to answer.
    """
    refusal = h11.RemoteProtocolError
    if request.http_version != b"1.1":
        if request.http_version != b"1.0":
            raise refusal("only HTTP/1.0 and HTTP/1.1 are spoken here", 505)
        if b"transfer-encoding" in last:
            raise refusal("Transfer-Encoding on HTTP/1.0 (RFC 9112 §6.1)", 400)
    if request.method == b"CONNECT":
        raise refusal("CONNECT is for proxies", 501)
    if request.method != request.method.upper():  # nginx refuses, ASGI wants upper case
        raise refusal("methods are case-sensitive, and upper-case", 400)
    if b"host" in last and not is_host(last[b"host"]):
        raise refusal("malformed Host (RFC 9112 §3.2)", 400)
    if b"expect" in last:  # few have it, and all of its lines count
        if {v.lower() for n, v in fields if n == b"expect"} - {b"100-continue"}:
            raise refusal("unknown expectation (RFC 9110 §10.1.1)", 417)
    if len(request.target) > TARGET_LIMIT:
        raise refusal("request target too long", 414)
    if request.target.find(b"#") >= 0:  # "in" takes 4 times as long for bytes
        raise refusal("a fragment in the request target (RFC 9112 §3.2)", 400)


def fill_scope(scope: Scope, request: h11.Request, fields: list, last: dict) -> None:
    """Add what a scope takes from a request (ASGI www, "HTTP Connection Scope").

    Raises h11.RemoteProtocolError with the status to answer.
    """
    target = request.target
    if not target.startswith(b"/"):
        target, host = split_target(request)
        # "MUST ignore the received Host header field … and instead use the host
        # information of the request-target" (RFC 9112 §3.2.2).
        fields = [(n, host if host and n == b"host" else v) for n, v in fields]
    raw_path, _, scope["query_string"] = target.partition(b"?")
    path = raw_path.decode()
    scope["http_version"] = request.http_version.decode()
    scope["method"] = request.method.decode()
    scope["path"] = scope["root_path"] + (unquote(path) if "%" in path else path)
    scope["raw_path"] = raw_path
    scope["headers"] = fields
    # An HTTP/1.0 client understands no interim response; trailers have to be asked for.
    if request.http_version == b"1.0":
        del scope["extensions"]["http.response.early_hint"]
    elif b"te" in last and "trailers" in map(str.lower, tokens(fields, b"te")):
        scope["extensions"]["http.response.trailers"] = {}


def split_target(request: h11.Request) -> tuple[bytes, bytes]:
    """The path and query, and the host, of a target that is not in origin-form."""
    if absolute := ABSOLUTE_FORM.fullmatch(request.target):
        host, target = absolute.groups()
        if is_host(host):
            return target if target.startswith(b"/") else b"/" + target, host
    if request.target == b"*" and request.method == b"OPTIONS":
        return b"*", b""
    raise h11.RemoteProtocolError("malformed request target (RFC 9112 §3.2)", 400)


@functools.lru_cache(16)  # clients choose them, and one may have 64 KiB
def is_host(value: bytes) -> bool:
    """One host and perhaps a port: no list, no user information, no path."""
    return HOST.fullmatch(value) is not None


def is_trusted(host: str, networks: list) -> bool:
    """Is this address one of the proxies that we believe?"""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return any(address in network for network in networks)
    return False


def fill_forwarded(scope: Scope, networks: list) -> None:
    """Believe what a trusted proxy says of its client.

    Each proxy appends its peer, so from the right the first address that is no proxy of
    ours is the client; what stands left of it, anybody may have written.
    """
    hosts = tokens(scope["headers"], b"x-forwarded-for")[-MOST_PROXIES:]
    hosts = [WITH_PORT.sub(r"\1\2", host) for host in hosts]
    while len(hosts) > 1 and is_trusted(hosts[-1], networks):
        hosts.pop()
    if hosts and re.fullmatch(r"[0-9A-Fa-f.:]+", hosts[-1]):  # it will be logged
        scope["client"] = (hosts[-1], 0)
    scheme = dict(scope["headers"]).get(b"x-forwarded-proto")
    scope["scheme"] = PROTO.get(scheme, scope["scheme"])


def tokens(fields: Iterable[tuple[bytes, bytes]], name: bytes) -> list[str]:
    """The members of a comma-separated field, over all its lines (RFC 9110 §5.6.1)."""
    values = ",".join(v.decode("latin-1") for n, v in fields if n == name)
    return [token.strip() for token in values.split(",") if token.strip()]


# CRLF ends a line, no other control character does a thing (RFC 9112 §2.2), and a line
# that begins with a space would be folded (RFC 9112 §5.2). The first is left to h11.
TEXT = bytes({*range(256)} - {*range(32), 127} | {9})
FOLDED = re.compile(rb"\n[ \t]")
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,20})[ \t]*\r\n")
CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})"
    rb"(?:;[\w!#$%&'*+.^`|~-]+(?:=(?:[\w!#$%&'*+.^`|~-]+"
    rb'|"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[\t -~\x80-\xff])*"))?)*\r\n',
    re.ASCII,
)


class Part(enum.Enum):
    """Which part of a message comes next; each message goes once round."""

    #            ┌──► LENGTH ────────────────┐
    #   HEAD ────┼──► CHUNKS ──► TRAILERS ───┼──► HEAD
    #            └───────────────────────────┘
    HEAD = enum.auto()
    LENGTH = enum.auto()
    CHUNKS = enum.auto()
    TRAILERS = enum.auto()


# Short names, as h11's states have: before Python 3.12 a member costs 0.1 µs a look.
HEAD, LENGTH, CHUNKS, TRAILERS = Part


class Gate:
    """Cuts the bytes of a connection into pieces that h11 may see: a head, once it is
    complete; its body; and nothing of the next request before it is asked for."""

    def __init__(self) -> None:
        self.buffer = b""  # received and not yet passed on
        self.eof = False  # nothing will be added to it
        self.head = b""  # the last one passed on; or none, once another has begun
        self.repeated = False  # it was the one before, too, byte for byte
        self.framing = HEAD, 0  # the part behind it, and its length
        self.empty_lines = 0  # before the next head
        self.checked = self.lines = 0  # bytes and lines of its start, until it is whole
        self.part = HEAD
        self.left = 0  # bytes of the body, or of a chunk and its CRLF, still to pass on
        self.chunks = 0  # that began in the last piece

    def next_piece(self) -> bytes:
        """The next bytes for h11, or none if more must arrive first.

        Raises h11.RemoteProtocolError with the status to answer.
        """
        if not self.buffer:
            return b""
        if self.part is HEAD:
            return self.next_head()
        if self.part is CHUNKS:
            return self.next_chunks()
        if self.part is TRAILERS:
            return self.next_trailers()
        piece = self.take(self.left)
        self.left -= len(piece)
        if not self.left:
            self.part = HEAD
        return piece

    def take(self, size: int) -> bytes:
        piece, self.buffer = self.buffer[:size], self.buffer[size:]
        return piece

    def next_head(self) -> bytes:
        # "ignore at least one empty line (CRLF) received prior to the request-line"
        # (RFC 9112 §2.2): some clients end a body with one too many.
        while self.buffer.startswith(b"\r\n") and self.empty_lines < 2:
            self.take(2)
            self.empty_lines += 1
        buffer = self.buffer
        # A busy connection may say the same again, to the last byte: what was found out
        # of these bytes holds for them still. It buys 10 % of such a request.
        self.repeated = bool(self.head) and buffer.startswith(self.head)
        if self.repeated:
            self.empty_lines = 0
            self.part, self.left = self.framing
            return self.take(len(self.head))
        self.head, self.framing = b"", (HEAD, 0)  # another one: nothing is known of it
        longest = TARGET_LIMIT + 64  # with a method and a version around the target
        if len(buffer) > longest and buffer.find(b"\n", 0, longest) < 0:
            raise h11.RemoteProtocolError("request line too long", 414)
        self.head = self.take_lines()  # walk: 3
        return self.head

    def take_lines(self) -> bytes:
        """Take lines and the empty one that ends them; or nothing, if that is still to
        come, and refuse at once what cannot become better by it."""
        buffer = self.buffer
        end = buffer.find(b"\r\n\r\n", self.checked) + 4
        whole = end >= 4
        if (end if whole else len(buffer)) > HEAD_LIMIT:
            raise h11.RemoteProtocolError("request head too large", 431)
        if not whole:
            end = len(buffer.rstrip(b"\r\n"))
        lines = buffer[self.checked : end]  # that are new
        count = lines.count(b"\r\n")
        good = lines.translate(None, TEXT) == b"\r\n" * count  # and not apart
        if not whole:
            good = good and b"\r\n\r\n".startswith(buffer[end:])
        if not good or FOLDED.search(lines):
            why = "bare CR or LF, control character, or folded line (RFC 9112 §2.2)"
            raise h11.RemoteProtocolError(why, 400)
        if self.lines + count > FIELD_LIMIT + 2:
            raise h11.RemoteProtocolError("too many fields", 431)
        if not whole:
            self.lines += count
            self.checked = end  # and a client that drips is no more work than others
            return b""
        self.checked = self.lines = self.empty_lines = 0
        return self.take(end)

    def expect_body(self, fields: dict) -> None:
        """A body follows the head that was taken last, whose fields h11 has read: note
        how it ends. h11 would take two equal lengths for one (RFC 9112 §6.3)."""
        if b"transfer-encoding" not in fields:
            head = self.head.lower()
            length = CONTENT_LENGTH.search(head)
            if length is None or head.count(b"\r\ncontent-length:") > 1:
                raise h11.RemoteProtocolError("Content-Length is not one number", 400)
            self.left = int(length[1])
            self.part = LENGTH if self.left else HEAD
        elif b"content-length" in fields:
            raise h11.RemoteProtocolError("Content-Length with Transfer-Encoding", 400)
        else:
            self.part = CHUNKS
        self.framing = self.part, self.left

    def next_chunks(self) -> bytes:
        """As many well-formed chunks, or parts of one, as there are."""
        end, self.chunks, buffer = 0, 0, self.buffer
        while end < len(buffer) and self.chunks < CHUNKS_AT_ONCE:
            if self.left:
                step = min(self.left, len(buffer) - end)
                self.left -= step
                end += step
                continue
            line = CHUNK_LINE.match(buffer, end, end + CHUNK_LINE_LIMIT)
            if line is None:
                start = buffer[end : end + CHUNK_LINE_LIMIT]
                if b"\n" in start or len(start) == CHUNK_LINE_LIMIT:
                    why = f"malformed chunk line {start!r}"
                    raise h11.RemoteProtocolError(why, 400)
                break
            end = line.end()
            size = int(line[1], 16)
            self.chunks += 1
            if not size:
                self.part = TRAILERS
                break
            self.left = size + 2  # with the CRLF behind the data, which h11 checks
        return self.take(end)

    def next_trailers(self) -> bytes:
        none = self.buffer.startswith(b"\r\n")  # the usual case
        trailers = self.take(2) if none else self.take_lines()
        if trailers:
            self.part = HEAD
        return trailers


# ───────────────────────────────────────────────────────────────────── 6. Request ──
#
# One request, one task. The cycle translates between the messages of ASGI and the
# events of h11, and holds the response head back until the first body message: head,
# body and end leave in one write, and an app that fails early can still be a 500.

SENDFILE_PIECE = 256 * 1024  # bytes: a client has SEND_TIMEOUT for each
END = h11.EndOfMessage()  # one for all
ACCESS_LINE = '%s "%s %s HTTP/%s" %d %d B %.1f ms'
# What a recipient needs before the body cannot come behind it (RFC 9110 §6.5.1).
NO_TRAILERS = (b"transfer-encoding", b"content-length", b"host", b"trailer", b"te") + (
    (b"connection", b"set-cookie", b"authorization", b"content-type", b"cache-control")
)


class ResponseState(enum.Enum):
    """What the app has to send next (ASGI www, "Response Start", "Response Body")."""

    #                http.response.start        http.response.body, more_body=False
    #   EXPECTING_START ─────────► EXPECTING_BODY ─────────────────► COMPLETE
    #                              ▲            │ more_body=True         ▲
    #                              └────────────┘                        │
    #            trailers=True:    EXPECTING_BODY ──► EXPECTING_TRAILERS ┤
    #            pathsend:         EXPECTING_BODY ──► SENDING_FILE ──────┘
    EXPECTING_START = enum.auto()
    EXPECTING_BODY = enum.auto()
    SENDING_FILE = enum.auto()  # for a pathsend; stays so if that fails half-way
    EXPECTING_TRAILERS = enum.auto()
    COMPLETE = enum.auto()


# Short names, as those of Part.
EXPECTING_START, EXPECTING_BODY, SENDING_FILE = list(ResponseState)[:3]
EXPECTING_TRAILERS, COMPLETE = list(ResponseState)[3:]


class RequestResponseCycle:
    """One request and its response: runs the app, and owns its receive and send."""

    def __init__(
        self, connection: HTTPConnection, request: h11.Request, scope: Scope
    ) -> None:
        # All of it here, also what few requests change: a default in the class would
        # keep Python from specializing each look at it (PEP 659): 2 % of a request. But
        # Python does that for 30 attributes at most, and a session has 28.
        self.connection = connection
        self.request = request
        self.client = scope["client"]
        self.extensions = scope["extensions"]
        self.started = connection.loop.time()
        self.task: asyncio.Task | None = None

        self.body: list[bytes] = []  # has arrived, and receive has not yet returned it
        self.body_size = 0  # bytes in it
        self.body_taken = False  # receive has returned the last of it
        self.arrived = 0  # bytes in all
        self.change: asyncio.Event | None = None  # made when receive first has to wait

        self.hung_up = False  # receive says http.disconnect; an answer is still welcome
        self.gone = False  # nobody is there: send raises

        self.state = EXPECTING_START
        self.response: h11.Response | None = None  # held back until the first body
        self.length: int | None = None  # the Content-Length that the app promised
        self.no_content = request.method == b"HEAD"
        self.trailers: list | None = None  # those to come, if the app promised any
        self.sent = 0  # bytes of content
        self.since_turn = 0  # bytes sent, as messages count, since others had a turn

    async def run(self, scope: Scope) -> None:
        """The life of a request. Raises only what `explain` does: asyncio tells it."""
        server = self.connection.server
        try:
            await server.app(scope, self.receive, self.send)  # walk: 6
            if self.state is not COMPLETE and not self.hung_up:
                raise RuntimeError("the app returned before its response was complete")
        except BaseException as exc:  # the app is foreign code, and may say sys.exit()
            self.explain(exc)
        finally:
            server.tasks.discard(self.task)
            self.finish()

    def finish(self) -> None:
        """The app has ended. If it has not answered, we do."""
        if self.state is COMPLETE:
            return
        if self.connection.server.stopping.is_set():
            self.connection.refuse(503)
        elif not self.hung_up:
            self.connection.refuse(500)
        else:  # told that the client has left, an app may leave the answer undone
            self.connection.cycle = None
            self.log_access(self.response.status_code if self.response else 499)
            self.connection.cut()

    def explain(self, exc: BaseException) -> None:
        """Log what the app raised: with its traceback, unless the client had left. Then
        it is most often the way in which an app notices it, in one of many wrappings
        (ASGI www, "Disconnected Client - send exception")."""
        what = f"{self.request.method.decode()} {self.request.target.decode()}"
        if isinstance(exc, asyncio.CancelledError):
            logger.warning("%s: cancelled", what)
        elif self.hung_up:
            logger.info("%s: the client had left, the app ended with %r", what, exc)
        else:
            logger.error("%s: the app failed:\n%s", what, app_traceback(exc))

    # Receiving.

    def body_received(self, data: bytes) -> None:
        if self.state is COMPLETE:
            return  # nobody will ask for it
        self.body.append(data)
        if len(self.body) == CHUNKS_AT_ONCE:  # small ones take 30 times as much
            self.body = [b"".join(self.body)]
        self.body_size += len(data)
        self.arrived += len(data)
        if self.body_size > HIGH_WATER:
            self.connection.below.pause_reading()
        self.changed()

    def client_left(self) -> None:
        self.gone = True
        self.hang_up()

    def hang_up(self) -> None:
        self.hung_up = True
        self.changed()

    async def wait_for_change(self) -> None:
        self.change = self.change or asyncio.Event()
        self.change.clear()
        await self.change.wait()

    def changed(self) -> None:
        if self.change is not None:
            self.change.set()

    async def receive(self) -> Message:
        """The request body as it arrives, then http.disconnect when the client has left
        or the response is complete (ASGI www, "Request", "Disconnect")."""
        self.maybe_send_continue()
        while not self.hung_up and self.state is not COMPLETE:
            more_body = self.connection.conn.their_state is h11.SEND_BODY
            if self.body or not (more_body or self.body_taken):
                return self.take_body(more_body)  # walk: 7
            if self.body_taken and self.connection.gate.eof:
                break
            await self.wait_for_change()
        if self.state is not COMPLETE:
            self.hung_up = True
        return {"type": "http.disconnect"}

    def maybe_send_continue(self) -> None:
        """The app wants the body: now is the time to ask for it (RFC 9110 §10.1.1)."""
        connection, conn = self.connection, self.connection.conn
        waits = conn.they_are_waiting_for_100_continue
        if waits and connection.cycle is self and conn.our_state is h11.SEND_RESPONSE:
            connection.write(conn.send(interim(100, [])))
            connection.deadline = 0.0

    def take_body(self, more_body: bool) -> Message:
        body = b"".join(self.body)
        self.body.clear()
        self.body_size = 0
        if not self.connection.below.is_reading():
            self.connection.limit_reading()
        self.body_taken = not more_body
        return {"type": "http.request", "body": body, "more_body": more_body}

    # Sending.

    async def send(self, message: Message) -> None:
        """Take one message of the response. Raises ClientDisconnected when nobody is
        there; TypeError, KeyError, RuntimeError or h11.LocalProtocolError for a message
        that is wrong or comes at the wrong time, and then sends nothing of it."""
        connection = self.connection
        while not connection.writable.is_set():  # also if another task was first
            await connection.writable.wait()
        if connection.below.is_closing():
            self.client_left()  # a write has failed, and the loop had no turn since
        if self.gone:
            raise ClientDisconnected("the client has left")
        match message["type"]:
            case "http.response.start" if self.state is EXPECTING_START:
                self.start_response(message)
            case "http.response.body" if self.state is EXPECTING_BODY:
                self.send_body(message)
                if self.since_turn >= STREAM_FLUSH:
                    self.since_turn = 0
                    await asyncio.sleep(0)  # a stream that never waits: others, too
            case "http.response.pathsend" if self.takes_file():
                await self.send_path(message["path"])
            case "http.response.trailers" if self.state is EXPECTING_TRAILERS:
                self.send_trailers(message)
            case "http.response.early_hint" if self.takes_early_hint():
                self.send_early_hint(message)
            case kind:
                raise RuntimeError(f"unexpected message {kind!r} in {self.state.name}")

    def start_response(self, message: Message) -> None:
        server = self.connection.server
        status, fields = message["status"], message.get("headers", ())
        self.response, self.length = server.response(status, fields)  # walk: 8
        if message.get("trailers") and "http.response.trailers" in self.extensions:
            self.trailers = []
        if status in (204, 304):  # never with content (RFC 9110 §6.4.1)
            self.no_content = True
        self.state = EXPECTING_BODY

    def send_body(self, message: Message) -> None:
        body, more_body = message.get("body", b""), message.get("more_body", False)
        if type(body) is not bytes:
            body = bytes(memoryview(body))  # a TypeError for str and int
        if type(more_body) is not bool:
            raise TypeError(f"more_body must be a bool, not {more_body!r}")

        connection, conn = self.connection, self.connection.conn
        data = b""
        if conn.our_state is h11.SEND_RESPONSE:
            data = self.head(len(body), more_body)
        if body and not self.no_content:  # walk: 9
            if self.length is None:
                connection.hold(body)
            else:
                data += conn.send(h11.Data(data=body))
            self.sent += len(body)
        if more_body:
            self.since_turn += EMPTY_MESSAGE + len(body)  # that takes time, too
            connection.write(data)
        else:
            self.end_body(data)

    def end_body(self, data: bytes) -> None:
        if self.trailers is not None:
            self.connection.write(data)
            self.state = EXPECTING_TRAILERS
        else:
            self.complete(data)

    def complete(self, data: bytes, end: h11.EndOfMessage = END) -> None:
        connection = self.connection
        if connection.chunks:
            data = b"".join([data, *connection.frame()])
        connection.write(data + connection.conn.send(end))
        self.state = COMPLETE
        self.log_access(self.response.status_code)
        self.changed()
        connection.response_ended()

    def send_trailers(self, message: Message) -> None:
        """ASGI extension "HTTP Trailers": fields behind a chunked body."""
        fields = [*self.trailers, *bytes_only(message.get("headers", ()))]
        more_trailers = message.get("more_trailers", False)
        if type(more_trailers) is not bool:
            raise TypeError(f"more_trailers must be a bool, not {more_trailers!r}")
        if any(name.lower() in NO_TRAILERS for name, _ in fields):
            raise ValueError("some fields cannot be trailers (RFC 9110 §6.5.1)")
        end = END if self.no_content else h11.EndOfMessage(headers=fields)
        self.trailers = fields
        if not more_trailers:
            self.complete(b"", end)

    def takes_file(self) -> bool:
        offered = "http.response.pathsend" in self.extensions
        return offered and self.state is EXPECTING_BODY

    def takes_early_hint(self) -> bool:
        if self.state is COMPLETE:
            return False  # h11 may be at the next response already
        unsaid = self.connection.conn.our_state is h11.SEND_RESPONSE
        return unsaid and "http.response.early_hint" in self.extensions

    def send_early_hint(self, message: Message) -> None:
        """ASGI extension "Early Hints": 103 before the head that we hold back."""
        conn = self.connection.conn
        links = bytes_only((b"link", link) for link in message["links"])
        waits = conn.client_is_waiting_for_100_continue
        self.connection.write(conn.send(interim(103, links)))
        # h11 takes the 103 for the answer to Expect (RFC 9110 §10.1.1).
        conn.client_is_waiting_for_100_continue = waits

    async def send_path(self, path: str) -> None:
        """ASGI extension "Path Send": the file goes from the kernel's cache to the
        socket. h11 frames it without seeing it (h11 docs, "Support for sendfile()")."""
        connection, conn = self.connection, self.connection.conn
        if type(path) is not str:  # open takes the number of a descriptor, too
            raise TypeError(f"path must be a str, not {path!r}")
        if conn.our_state is not h11.SEND_RESPONSE:
            raise RuntimeError("pathsend cannot be mixed with http.response.body")
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = self.head(size, more_body=False)
            if size and not self.no_content:
                # All that h11 asks of content is its length: a range has one, no bytes.
                pieces = conn.send_with_data_passthrough(h11.Data(data=range(size)))
                # With chunks, a line of its own before the file and one after it.
                before, after = [p for p in pieces if type(p) is bytes] or (b"", b"")
                connection.write(data + before)
                connection.flush()
                self.state = SENDING_FILE
                for offset in range(0, size, SENDFILE_PIECE):
                    piece = min(SENDFILE_PIECE, size - offset)
                    await self.send_piece(file, offset, piece)
                data, self.sent = after, size
        self.end_body(data)

    async def send_piece(self, file: BinaryIO, offset: int, size: int) -> None:
        """Part of a file, to tell a client that stopped reading from a slow one: the
        transport's own buffer, and its deadline, see none of it."""
        transport, loop = self.connection.transport, self.connection.loop
        try:
            async with asyncio.timeout(SEND_TIMEOUT):
                if transport.get_extra_info("ssl_object"):
                    sent = await self.send_read(file, size)
                else:
                    sent = await loop.sendfile(transport, file, offset, size)
        except (OSError, RuntimeError) as exc:  # TimeoutError is an OSError
            transport.abort()
            self.client_left()
            raise ClientDisconnected("the client has left") from exc
        if sent != size:
            raise RuntimeError("the file became shorter while it was sent")

    async def send_read(self, file: BinaryIO, size: int) -> int:
        """The same over TLS, where a file has to pass through Python in any case."""
        connection, data = self.connection, file.read(size)
        connection.write(data)
        connection.flush()
        await asyncio.sleep(0)  # a turn of the loop, to notice a client that leaves
        await connection.writable.wait()
        ended = connection.gate.eof  # TLS has no half of an end
        if self.gone or ended or connection.transport.is_closing():
            raise ConnectionError
        return len(data)

    def head(self, size: int, more_body: bool) -> bytes:
        """The bytes of the response head, now that the first `size` bytes follow it."""
        connection, response = self.connection, self.response
        if self.length is not None and not self.no_content:
            if size > self.length or (size < self.length and not more_body):
                # Said before h11 is: so the answer can still be a 500.
                raise RuntimeError(f"Content-Length is {self.length}, the body {size}")
        # "A server MUST read the entire request message body or close the connection"
        # (RFC 9112 §9.3); the app that answers so early may read no more of it.
        unread = connection.conn.their_state is h11.SEND_BODY
        if unread or connection.server.stopping.is_set():
            fields = [*response.headers.raw_items(), (b"connection", b"close")]
            status, reason = response.status_code, response.reason
            response = h11.Response(status_code=status, headers=fields, reason=reason)
        return connection.conn.send(response)

    def log_access(self, status: int) -> None:
        """One line a request. h11 lets no control character into a target; the quote is
        escaped too, because it would end ours (uvicorn #724)."""
        server, request = self.connection.server, self.request
        if not server.log_access:
            return
        values = (
            "%s:%d" % self.client if self.client else "unix",
            request.method.decode("ascii"),
            request.target.decode("ascii").replace('"', "%22"),
            request.http_version.decode("ascii"),
            status,
            self.sent,
            1000 * (server.loop.time() - self.started),
        )
        # Not access_logger.info, which takes 2 µs to look up this line's number.
        record = access_logger.makeRecord(
            access_logger.name, logging.INFO, __file__, 0, ACCESS_LINE, values, None
        )
        try:
            access_logger.handle(record)
        except Exception as exc:  # of a filter: we go on, as if it had said yes or no
            logger.error("the access log failed: %s", app_traceback(exc))


def interim(status: int, fields: list) -> h11.InformationalResponse:
    """A response before the response (RFC 9110 §15.2)."""
    reason = phrase(status)
    return h11.InformationalResponse(status_code=status, headers=fields, reason=reason)


def bytes_only(fields: Iterable) -> list[tuple[bytes, bytes]]:
    """Header fields as ASGI has them. Raises TypeError; h11 would take str as well."""
    found = [tuple(field) for field in fields]
    for name, value in found:
        if type(name) is not bytes or type(value) is not bytes:
            raise TypeError(f"header ({name!r}, {value!r}) must be two bytes")
    return found


# ─────────────────────────────────────────────────────────────────── 7. WebSocket ──
#
# A request that asks for an upgrade starts like any other: h11 reads it, the app is
# called, and until it accepts it may still answer as for HTTP. Once it has accepted,
# the connection hands on to the session what it would have passed to h11.

CLOSE_TIMEOUT = 10.0  # seconds for the client's half of the closing handshake
NO_CODE, NO_CLOSE, TOO_BIG, APP_FAILED, RESTART = 1005, 1006, 1009, 1011, 1012
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3
KEY = re.compile(rb"[A-Za-z0-9+/]{22}==")  # 16 bytes in base64
DENIAL = ("websocket.http.response.start", "websocket.http.response.body")
HANDSHAKE_FIELDS = (b"upgrade", b"connection", b"content-length", b"transfer-encoding")


class WebSocketState(enum.Enum):
    """Where the conversation is (RFC 6455 §4, §7)."""

    #   CONNECTING ──accept──► OPEN ──our Close──► CLOSING ──their Close──► CLOSED
    #       │                   └───────their Close, ours in reply────────────┘ │
    #       └──close, or a response: it was an HTTP request, after all ─────────┘
    CONNECTING = enum.auto()
    OPEN = enum.auto()
    CLOSING = enum.auto()
    CLOSED = enum.auto()


def wants_websocket(scope: Scope) -> bool:
    """Does the request ask for an upgrade that it may ask for (RFC 9110 §7.8)?"""
    fields = scope["headers"]
    asked = "websocket" in map(str.lower, tokens(fields, b"upgrade"))
    asked = asked and "upgrade" in map(str.lower, tokens(fields, b"connection"))
    return asked and scope["http_version"] == "1.1"


def check_handshake(scope: Scope) -> None:
    """The client's opening handshake (RFC 6455 §4.2.1), and what it makes of a scope.

    Raises h11.RemoteProtocolError with the status to answer.
    """
    fields = scope["headers"]
    if tokens(fields, b"sec-websocket-version") != ["13"]:
        raise h11.RemoteProtocolError("WebSocket version must be 13", 426)
    key = b",".join(value for name, value in fields if name == b"sec-websocket-key")
    framing = {b"transfer-encoding", b"content-length"} & dict(fields).keys()
    if scope["method"] != "GET" or framing or not KEY.fullmatch(key):
        raise h11.RemoteProtocolError("malformed WebSocket handshake", 400)
    del scope["method"]
    scope["type"] = "websocket"
    scope["scheme"] = {"http": "ws", "https": "wss"}[scope["scheme"]]
    scope["subprotocols"] = tokens(fields, b"sec-websocket-protocol")
    kept = {n: v for n, v in scope["extensions"].items() if n in ("tls", "foal.trace")}
    scope["extensions"] = {"websocket.http.response": {}, **kept}


def size_of(message: Message) -> int:
    """What an unread message counts for: an empty one takes memory, too."""
    return EMPTY_MESSAGE + len(message.get("text") or message.get("bytes") or ())


class WebSocketSession(RequestResponseCycle):
    """One WebSocket: a request until the app accepts, from then on messages."""

    def __init__(
        self, connection: HTTPConnection, request: h11.Request, scope: Scope
    ) -> None:
        super().__init__(connection, request, scope)
        self.transport = connection.transport
        self.phase = WebSocketState.CONNECTING
        self.close_code = 1000  # for an app that returns without a word

        # What receive has not yet returned; its size is bounded by not reading on.
        self.messages = collections.deque([{"type": "websocket.connect"}])
        self.messages_size = 0
        self.disconnect: Message = {"type": "websocket.disconnect", "code": NO_CLOSE}

        self.decoder: FrameDecoder | None = None  # while it is open, or closing
        self.pinged = False  # and nothing has come in since

    def finish(self) -> None:
        super().finish()
        if self.phase is WebSocketState.OPEN and not self.gone:
            self.start_close(self.close_code)

    def explain(self, exc: BaseException) -> None:
        self.close_code = APP_FAILED
        super().explain(exc)

    # The app's side.

    async def receive(self) -> Message:
        """websocket.connect, every message, and websocket.disconnect from then on."""
        while not (self.messages or self.phase is WebSocketState.CLOSED):
            if self.phase is WebSocketState.CONNECTING and self.connection.gate.eof:
                self.hung_up = True
            # While it is open, what a client said before it left is still to come.
            if self.hung_up and self.phase is not WebSocketState.OPEN:
                break
            await self.wait_for_change()
        if not self.messages:
            return dict(self.disconnect)
        message = self.messages.popleft()  # walk: ws 5
        before = self.messages_size
        self.messages_size -= size_of(message)
        if before > HIGH_WATER >= self.messages_size:
            self.connection.loop.call_soon(self.read_on)
        return message

    async def send(self, message: Message) -> None:
        """Take one message of the app; raises as RequestResponseCycle.send does."""
        connection = self.connection
        while not connection.writable.is_set():  # also if another task was first
            await connection.writable.wait()
        if connection.below.is_closing():
            self.client_left()  # a write has failed, and the loop had no turn since
        if self.gone:
            raise ClientDisconnected("the client has left")
        unsaid = self.state is EXPECTING_START
        match self.phase, message["type"]:
            case WebSocketState.CONNECTING, "websocket.accept" if unsaid:
                self.accept(message)
            case WebSocketState.CONNECTING, "websocket.close" if unsaid:
                await self.deny({"type": "http.response.start", "status": 403})
                await self.deny({"type": "http.response.body"})
            case WebSocketState.CONNECTING, kind if kind in DENIAL:
                await self.deny({**message, "type": kind.removeprefix("websocket.")})
            case WebSocketState.OPEN, "websocket.send":
                self.send_message(message)
                if self.since_turn >= STREAM_FLUSH:
                    self.since_turn = 0
                    await asyncio.sleep(0)
            case WebSocketState.OPEN, "websocket.close":
                reason = message.get("reason") or ""
                self.start_close(message.get("code", 1000), reason)
            case phase, kind:
                raise RuntimeError(f"unexpected message {kind!r} in {phase.name}")

    async def deny(self, message: Message) -> None:
        """Answer as for HTTP (ASGI extension "Websocket Denial Response")."""
        await super().send(message)
        if self.state is COMPLETE:
            self.phase = WebSocketState.CLOSED

    def accept(self, message: Message) -> None:
        """Finish the opening handshake (RFC 6455 §4.2.2), and take over."""
        connection, server = self.connection, self.connection.server
        asked, subprotocol = self.request.headers, message.get("subprotocol")
        offered = tokens(asked, b"sec-websocket-protocol")
        extra = bytes_only(message.get("headers", ()))
        if subprotocol is not None and subprotocol not in offered:
            raise ValueError(f"subprotocol {subprotocol!r} was not offered")
        if any(name.lower().startswith(b"sec-websocket-") for name, _ in extra):
            raise ValueError("the server sets Sec-WebSocket fields; use subprotocol")
        extra = [field for field in extra if field[0].lower() not in HANDSHAKE_FIELDS]
        key = dict(asked)[b"sec-websocket-key"]
        proof = base64.b64encode(hashlib.sha1(key + GUID).digest())
        fields = [(b"upgrade", b"websocket"), (b"connection", b"Upgrade")]
        fields.append((b"sec-websocket-accept", proof))
        if subprotocol is not None:
            fields.append((b"sec-websocket-protocol", subprotocol.encode("ascii")))
        offers = tokens(asked, b"sec-websocket-extensions")
        deflate = Deflate.negotiate(offers) if server.config.ws_deflate else None
        if deflate is not None:
            fields.append((b"sec-websocket-extensions", deflate.answer))
        switch = interim(101, [*fields, *server.with_common(extra)])
        connection.write(connection.conn.send(switch))  # walk: ws 2
        self.phase = WebSocketState.OPEN
        self.state = COMPLETE
        self.log_access(101)
        self.take_over(deflate)
        if server.stopping.is_set():
            self.go_away()

    def take_over(self, deflate: Deflate | None) -> None:
        connection = self.connection
        self.decoder = FrameDecoder(connection.server.config.ws_max_size, deflate)
        connection.flush()
        connection.session = self  # walk: ws 3
        connection.below.resume_reading()
        eager, connection.gate.buffer = connection.gate.buffer, b""  # sent too soon
        connection.data_received(eager)
        if connection.gate.eof:
            connection.eof_received()

    def send_message(self, message: Message) -> None:
        text, data = message.get("text"), message.get("bytes")
        if (text is None) == (data is None):
            raise ValueError("websocket.send needs either text or bytes")
        opcode = Opcode.TEXT if text is not None else Opcode.BINARY
        payload = text.encode() if text is not None else bytes(memoryview(data))
        deflate = self.decoder.deflate if len(payload) >= SMALLEST_DEFLATED else None
        if deflate is not None:
            payload = deflate.compress(payload)
        self.since_turn += EMPTY_MESSAGE + len(payload)
        frame = encode_frame(opcode, payload, rsv1=deflate is not None)
        self.transport.write(frame)  # walk: ws 6

    def start_close(self, code: int, reason: str = "") -> None:
        """Say Close, and wait for the client to say it too (RFC 6455 §7.1.2)."""
        if not is_close_code(code):
            raise ValueError(f"{code} is not a close code to send (RFC 6455 §7.4)")
        payload = code.to_bytes(2, "big") + reason.encode()
        if len(payload) > 125:
            raise ValueError("the reason of a close is at most 123 bytes")
        self.transport.write(encode_frame(Opcode.CLOSE, payload))  # walk: ws 8
        self.phase = WebSocketState.CLOSING
        self.connection.loop.call_soon(self.read_on)  # theirs may wait behind a backlog
        self.connection.deadline = 0.0

    # The client's side: what the connection hands on.

    def data_received(self, data: bytes) -> None:
        self.arrived += len(data)
        self.pinged = False
        try:
            for opcode, payload in self.decoder.decode(data, FRAMES_AT_ONCE):
                self.frame_received(opcode, payload)
                if self.phase is WebSocketState.CLOSED or self.is_full():
                    return  # the decoder keeps the rest
            if self.decoder.frames == FRAMES_AT_ONCE:
                self.connection.below.pause_reading()
                self.connection.loop.call_soon(self.read_on)
            elif self.connection.gate.eof:
                self.end(NO_CLOSE)
        except WebSocketError as exc:
            peer = self.connection.peer
            logger.info("%s: WebSocket failed, %d: %s", peer, *exc.args)
            self.end(exc.args[0])

    def read_on(self) -> None:
        """Take in what was left when we stopped, before more of it is read: in a turn
        of its own, for the others' sake. With too much unread, it is receive's turn."""
        if self.phase is not WebSocketState.CLOSED and not self.is_full():
            self.connection.below.resume_reading()
            self.connection.deadline = 0.0
            self.data_received(b"")

    def is_full(self) -> bool:
        return self.phase is WebSocketState.OPEN and self.messages_size > HIGH_WATER

    def frame_received(self, opcode: Opcode, payload: bytes | str) -> None:
        match opcode:
            case Opcode.TEXT | Opcode.BINARY if self.phase is WebSocketState.OPEN:
                key = "text" if opcode is Opcode.TEXT else "bytes"
                self.messages.append({"type": "websocket.receive", key: payload})
                self.messages_size += size_of(self.messages[-1])
                if self.messages_size > HIGH_WATER:
                    self.connection.below.pause_reading()
                self.changed()
            case Opcode.PING:
                connection = self.connection
                # Else it reads no pong anyway, or asyncio would log each.
                if connection.writable.is_set() and not connection.below.is_closing():
                    self.transport.write(encode_frame(Opcode.PONG, payload))
            case Opcode.CLOSE:
                self.end(*parse_close(payload))

    def end(self, code: int, reason: str = "") -> None:
        """The client has said Close, or cannot go on: reply if it is the first to say
        so, with its code (RFC 6455 §5.5.1). Then the server ends the connection first
        (RFC 6455 §7.1.1), in stages as for HTTP."""
        if self.phase is WebSocketState.CLOSED:
            return
        if self.phase is WebSocketState.OPEN and not self.gone:
            self.client_left()
            if code != NO_CLOSE:
                payload = b"" if code == NO_CODE else code.to_bytes(2, "big")
                self.transport.write(encode_frame(Opcode.CLOSE, payload))
        self.phase = WebSocketState.CLOSED
        self.decoder = None  # zlib's windows, while the app lingers
        self.disconnect.update(code=code, reason=reason)
        self.changed()
        self.connection.close()

    # Deadlines, and the end of the server.

    def waits_for(self) -> tuple[Waiting, int, float]:
        """The last rows of HTTPConnection.waits_for."""
        config = self.connection.server.config
        if self.phase is WebSocketState.CLOSING:
            return Waiting.CLOSE, 0, CLOSE_TIMEOUT
        if not self.connection.below.is_reading():
            return Waiting.APP, 0, math.inf
        if self.pinged:
            return Waiting.PONG, 0, config.ws_ping_timeout or math.inf
        return Waiting.PING, self.arrived, config.ws_ping_interval or math.inf

    def ping(self) -> None:
        self.pinged = True  # walk: ws 7
        self.connection.deadline = 0.0
        self.transport.write(encode_frame(Opcode.PING, b""))

    def go_away(self) -> None:
        """The server stops: 1012, "Service Restart", tells the client to come back."""
        if self.phase is WebSocketState.OPEN:
            self.start_close(RESTART)
            self.disconnect["code"] = RESTART
            self.client_left()


# ────────────────────────────────────────────────────────────────────── 8. Frames ──
#
# Bytes in, messages out, and the reverse: no asyncio, no ASGI. Everything that can be
# refused is refused at the first byte that shows it.

SMALLEST_DEFLATED = 64  # bytes; less does not get shorter
WINDOW_BITS = 15  # of zlib, negative for data without its header
FRAMES_AT_ONCE = 200  # some 2 ms; then others have their turn
MASK_BLOCK = 4096  # bytes: masked as one number, which should fit the fastest cache
MOST_STREAMS = 16  # of zlib in one part of a message; nobody sends two
ACCEPTABLE = {  # parameters of permessage-deflate (RFC 7692 §7.1)
    "server_no_context_takeover",
    "client_no_context_takeover",
    "client_max_window_bits",
    *(f"client_max_window_bits={bits}" for bits in range(8, 16)),
    *(f"server_max_window_bits={bits}" for bits in range(9, 16)),  # zlib has no 8
}


class Opcode(enum.IntEnum):
    """RFC 6455 §5.2."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


class WebSocketError(Exception):
    """The client broke the protocol: (close code, reason for the log)."""


def encode_frame(opcode: Opcode, payload: bytes, *, rsv1: bool = False) -> bytes:
    """One whole message in one frame, unmasked, as a server has to (RFC 6455 §5.1)."""
    first = 0x80 | (0x40 if rsv1 else 0) | opcode
    size = len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 2**16:
        return bytes((first, 126)) + size.to_bytes(2, "big") + payload
    return bytes((first, 127)) + size.to_bytes(8, "big") + payload


def apply_mask(mask: bytes, data: bytes) -> bytes:
    """XOR with a repeated mask (RFC 6455 §5.3), without a loop over bytes in Python: as
    large numbers, of which the processor keeps one at hand; 16 MiB in some 30 ms."""
    block = min(len(data), MASK_BLOCK)
    key = int.from_bytes((mask * (block // 4 + 1))[:block], "little")
    mixed = []
    for start in range(0, len(data), MASK_BLOCK):
        part = data[start : start + MASK_BLOCK]
        number = int.from_bytes(part, "little") ^ key
        mixed.append(number.to_bytes(block, "little")[: len(part)])
    return b"".join(mixed)


def is_close_code(code: int) -> bool:
    """May it stand in a Close frame (RFC 6455 §7.4, and IANA's registry since)?"""
    defined = (1000, 1001, 1002, 1003, *range(1007, 1015))
    return isinstance(code, int) and (code in defined or 3000 <= code < 5000)


def parse_close(payload: bytes) -> tuple[int, str]:
    """The code and reason of a Close frame (RFC 6455 §5.5.1)."""
    if not payload:
        return NO_CODE, ""
    code = int.from_bytes(payload[:2], "big")
    if not is_close_code(code):  # nor is a single byte one
        raise WebSocketError(1002, "bad close code")
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError:
        raise WebSocketError(1007, "the reason of a close is not UTF-8") from None


class FrameDecoder:
    """Bytes from a client, cut anywhere, to messages and control frames."""

    def __init__(self, max_size: int, deflate: Deflate | None = None) -> None:
        self.max_size = max_size
        self.deflate = deflate
        self.buffer = bytearray()  # takes bytes off its front at no cost
        self.frames = 0  # that the last call of decode completed

        # The frame whose payload arrives; None between two frames.
        self.opcode: Opcode | None = None
        self.final = True
        self.mask = b""
        self.left = 0

        # The message that its frames make up; None between two messages.
        self.message: Opcode | None = None
        self.inflating = False
        self.content = bytearray()
        self.utf8 = codecs.getincrementaldecoder("utf-8")()

    def decode(
        self, data: bytes, most: float = math.inf
    ) -> Iterator[tuple[Opcode, bytes | str]]:
        """Yield what is complete, and may be left there: the rest is kept for the next
        call, as it is after `most` frames. Raises WebSocketError."""
        self.buffer += data
        self.frames = 0
        while self.frames < most:
            if self.opcode is None and not self.read_header():
                return
            opcode = self.opcode
            payload = apply_mask(self.mask, self.take(self.left))  # walk: ws 4
            self.left -= len(payload)
            if opcode < Opcode.CLOSE:
                self.add(payload, last=self.final and not self.left)
            if self.left:
                turn = len(payload) % 4
                self.mask = self.mask[turn:] + self.mask[:turn]
                return
            self.opcode = None
            self.frames += 1
            if opcode >= Opcode.CLOSE:
                yield opcode, payload
            elif self.final:
                yield self.finish()

    def take(self, size: int) -> bytes:
        part = bytes(self.buffer[:size])
        del self.buffer[:size]
        return part

    def read_header(self) -> bool:
        """Take a frame's header off the buffer, if it is all there (RFC 6455 §5.2)."""
        buffer = self.buffer
        if len(buffer) < 2:
            return False
        self.check_header(buffer[0], buffer[1])
        short = buffer[1] & 0x7F
        extended = {126: 2, 127: 8}.get(short, 0)
        if len(buffer) < 2 + extended:
            return False
        size = int.from_bytes(buffer[2 : 2 + extended], "big") if extended else short
        opcode, deflated = Opcode(buffer[0] & 0x0F), bool(buffer[0] & 0x40)
        if size >> 63 or extended and size < (126 if extended == 2 else 2**16):
            raise WebSocketError(1002, "a length in more bytes than it needs")
        if opcode < Opcode.CLOSE:
            inflating = deflated or (self.inflating and opcode is Opcode.CONTINUATION)
            if not inflating and len(self.content) + size > self.max_size:
                raise WebSocketError(TOO_BIG, "message too big")
        if len(buffer) < 6 + extended + (size if opcode >= Opcode.CLOSE else 0):
            return False  # a control frame is short, and counts as a whole
        if opcode in (Opcode.TEXT, Opcode.BINARY):
            self.message, self.inflating = opcode, deflated
        self.opcode, self.final, self.left = opcode, bool(buffer[0] & 0x80), size
        self.mask = self.take(6 + extended)[-4:]
        return True

    def check_header(self, first: int, second: int) -> None:
        """What the first two bytes alone can do wrong."""
        opcode = first & 0x0F
        if opcode not in (0, 1, 2, 8, 9, 10):
            raise WebSocketError(1002, f"opcode {opcode} is reserved")
        may_deflate = self.deflate is not None and opcode in (1, 2)
        if first & (0x30 if may_deflate else 0x70):
            raise WebSocketError(1002, "a reserved bit is set")
        if not second & 0x80:
            raise WebSocketError(1002, "a client has to mask (RFC 6455 §5.1)")
        if opcode >= 8 and (not first & 0x80 or second & 0x7F > 125):
            raise WebSocketError(1002, "a control frame is long, or a fragment")
        if opcode < 8 and (opcode == 0) != (self.message is not None):
            raise WebSocketError(1002, "a fragment is missing, or one too many")

    def add(self, payload: bytes, *, last: bool) -> None:
        """Take a part of the message: inflate it, count it, check it as UTF-8."""
        if self.inflating:
            room = self.max_size - len(self.content)
            payload = self.deflate.inflate(payload, room, last)
        self.content += payload
        if self.message is Opcode.TEXT:
            try:
                self.utf8.decode(payload, last)
            except UnicodeDecodeError as exc:
                raise WebSocketError(1007, f"not UTF-8: {exc.reason}") from None
            # A surrogate is known by two bytes; the decoder waits for the third.
            rest, _ = self.utf8.getstate()
            if rest[:1] == b"\xed" and rest[1:2] > b"\x9f":
                raise WebSocketError(1007, "not UTF-8: a surrogate")

    def finish(self) -> tuple[Opcode, bytes | str]:
        opcode, content = self.message, self.content
        self.message, self.content = None, bytearray()
        return opcode, content.decode() if opcode is Opcode.TEXT else bytes(content)


class Deflate:
    """permessage-deflate (RFC 7692): one compressor and one decompressor."""

    def __init__(self, parameters: list[str]) -> None:
        self.forget_ours = "server_no_context_takeover" in parameters
        self.forget_theirs = "client_no_context_takeover" in parameters
        values = dict(parameter.partition("=")[::2] for parameter in parameters)
        self.bits = int(values.get("server_max_window_bits", WINDOW_BITS))
        self.answer = "; ".join(["permessage-deflate", *parameters]).encode()
        self.compressor = self.decompressor = None

    @classmethod
    def negotiate(cls, offers: list[str]) -> Deflate | None:
        """The first offer that we can keep (RFC 7692 §5.1, §7.1)."""
        for offer in offers:
            name, *rest = [part.strip() for part in offer.split(";")]
            # A value may be quoted, but must not be empty (RFC 6455 §9.1).
            wishes = [part.replace('"', "") for part in rest]
            once = len({w.partition("=")[0] for w in wishes}) == len(wishes)
            if name == "permessage-deflate" and once and ACCEPTABLE.issuperset(wishes):
                # This one says that the client would obey a wish of ours.
                return cls([w for w in wishes if w != "client_max_window_bits"])
        return None

    def compress(self, data: bytes) -> bytes:
        """A whole message, without the four bytes that end each (RFC 7692 §7.2.1)."""
        if self.compressor is None or self.forget_ours:
            self.compressor = zlib.compressobj(wbits=-self.bits)
        data = self.compressor.compress(data)
        return (data + self.compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]

    def inflate(self, data: bytes, limit: int, last: bool) -> bytes:
        """A part of a message. Never makes more than `limit` bytes of it: 16 KiB can
        hold 16 MiB. Raises WebSocketError."""
        if last:
            data += b"\x00\x00\xff\xff"
        inflated = b""
        for _ in range(MOST_STREAMS):
            stream = self.decompressor or zlib.decompressobj(wbits=-WINDOW_BITS)
            try:
                inflated += stream.decompress(data, limit + 1 - len(inflated))
            except zlib.error as exc:
                raise WebSocketError(1007, f"cannot be inflated: {exc}") from None
            if len(inflated) > limit:
                raise WebSocketError(TOO_BIG, "message too big once inflated")
            # What follows a final block is a new stream (RFC 7692 §7.2.3.4).
            self.decompressor = None if stream.eof else stream
            data = stream.unused_data
            if not data:
                break
        else:
            raise WebSocketError(1007, "too many final blocks")
        if last and self.forget_theirs:
            self.decompressor = None
        return inflated


# ─────────────────────────────────────────────────────────────────────── 9. Trace ──
#
# What passed, where and when: --trace puts recorders between the parts, and the parts
# do not know it. The wire is what stands before a protocol and a transport, h11 is a
# subclass, ASGI and the app are a middleware. Without --trace none of this is made.
#
# But: under TLS, the wire is what TLS carries, and it is not seen that reading pauses.
# The app is not offered pathsend, whose bytes nobody here would see. A row takes time,
# and the next one shows it.

LONGEST = 2000  # characters of a row
WIDTH = 64  # of these in the printed table: two states of h11 fit beside it
# The calls of a protocol and of a transport that are rows.
TO_APP = ("data_received", "eof_received", "connection_lost")
TO_APP += ("pause_writing", "resume_writing")
TO_CLIENT = ("write", "write_eof", "close", "abort", "pause_reading", "resume_reading")


def start_trace(server: Server) -> Callable[[], Any]:
    """Trace the app, and every connection that the result makes."""
    prefix = f"[{os.getpid()}] " if server.lifeline else ""
    listeners = [functools.partial(print_row, prefix)]
    numbers = itertools.count(1)
    server.app = traced(server.app)

    def connect() -> Wire:
        connection, trace = HTTPConnection(server), Trace(next(numbers), listeners)
        connection.conn = trace.conn
        return Wire(connection, trace)

    return connect


class Row(NamedTuple):
    """One thing that passed."""

    connection: int  # in the order in which they were accepted
    request: int  # of this connection
    first: bool  # row of the request
    microseconds: int  # since the connection was accepted
    layer: str  # "wire", "h11", "ASGI" or "app"
    direction: str  # "->" towards the app, "<-" towards the client, "--" neither
    what: str  # in printable ASCII
    states: tuple[str, str]  # h11's our_state and their_state after it


def print_row(prefix: str, row: Row) -> None:
    """A listener that prints. Only h11's rows show its states: no other changes one."""
    label = f"{row.connection}.{row.request}"
    what = row.what if len(row.what) <= WIDTH else row.what[: WIDTH - 3] + "..."
    place = f"{label:<6}{row.microseconds:>12,}  {row.layer:<4}  {row.direction}  "
    line = f"{prefix}{place}{what:<{WIDTH}}  "
    states = ", ".join(row.states) if row.layer == "h11" else ""
    if row.first:
        head = f"{prefix}-- connection {row.connection}, request {row.request} "
        head = f"{head:-<{len(line) - 2}}  our state, their state\n"
    # In one piece, because workers share a terminal.
    sys.stderr.write(f"{head if row.first else ''}{(line + states).rstrip()}\n")


class Trace:
    """What passes on one connection, told to all who listen."""

    def __init__(self, number: int, listeners: list[Callable[[Row], None]]) -> None:
        self.number = number
        self.listeners = listeners
        self.accepted = time.perf_counter()  # finer than a loop's clock on Windows
        self.conn = TracedH11(self)
        self.request = 1  # the one that h11 is at ...
        self.over = False  # ... or was, until something more comes in
        self.latest = 0  # request that has a row

    def record(self, layer: str, direction: str, what: str, request: int = 0) -> None:
        if self.over and direction == "->" and not request:
            self.request, self.over = self.request + 1, False
        request = request or self.request
        first, self.latest = request > self.latest, max(request, self.latest)
        micros = int((time.perf_counter() - self.accepted) * 1e6)
        what = what[: LONGEST + 1]  # and longer again, once it is escaped
        what = re.sub(r"[^ -~]", lambda found: ascii(found[0])[1:-1], what)
        what = what if len(what) <= LONGEST else what[: LONGEST - 3] + "..."
        states = (str(self.conn.our_state), str(self.conn.their_state))
        row = Row(self.number, request, first, micros, layer, direction, what, states)
        for listener in list(self.listeners):
            try:
                listener(row)
            except Exception as exc:  # foreign code: nobody is served worse for it
                logger.error("no more rows for %r: %r", listener, exc)
                self.listeners[:] = [x for x in self.listeners if x is not listener]

    @contextlib.contextmanager
    def raising(self, layer: str, direction: str, request: int = 0) -> Iterator[None]:
        try:
            yield
        except BaseException as exc:  # a row, and on it goes
            self.record(layer, direction, f"raises {shown(exc)}", request)
            raise


def shown(value: Any) -> str:
    """Bytes, an event of h11, a message of ASGI or anything else, in one line."""
    try:
        match value:
            case bytes() | bytearray():  # the latter from Windows' proactor
                return f"{len(value)} B {bytes(value[:LONGEST])!r}"
            case h11.Request():
                return f"Request {value.method.decode()} {value.target.decode()}"
            case h11.Response() | h11.InformationalResponse():
                return f"{type(value).__name__} {value.status_code}"
            case h11.Data():
                return f"Data {shown(value.data)}"
            case h11.Event():
                return type(value).__name__
            case {"type": str(kind), **rest}:
                return " ".join([kind, *(f"{key}={rest[key]!r}" for key in rest)])
        return repr(value)
    except Exception:  # a repr of the app's is foreign code
        return f"a {type(value).__name__}"


class Wire:
    """Stands before a protocol or a transport, and records what passes."""

    def __init__(self, behind: Any, trace: Trace) -> None:
        self.behind = behind
        self.trace = trace

    def __getattr__(self, name: str) -> Any:
        if name not in TO_APP + TO_CLIENT:
            return getattr(self.behind, name)
        direction = "->" if name in TO_APP else "<-"

        def call(*values: Any) -> Any:
            self.trace.record("wire", direction, " ".join([name, *map(shown, values)]))
            with self.trace.raising("wire", "--"):
                return getattr(self.behind, name)(*values)  # now: uvloop keeps call

        return call

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.behind.connection_made(Wire(transport, self.trace))
        self.trace.record("wire", "->", f"connection_made by {self.behind.peer}")
        found = {"trace": self.trace, "listeners": self.trace.listeners}
        extensions = self.behind.scope["extensions"]
        extensions["foal.trace"] = found
        extensions.pop("http.response.pathsend", None)


class TracedH11(h11.Connection):
    """Records the events that leave h11 and enter it."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(h11.SERVER, HEAD_LIMIT)
        self.trace = trace

    def next_event(self) -> Any:
        with self.trace.raising("h11", "->"):
            event = super().next_event()
        self.trace.record("h11", "->", shown(event))
        return event

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        with self.trace.raising("h11", "<-"):  # send goes this way, too
            pieces = super().send_with_data_passthrough(event)
        self.trace.record("h11", "<-", shown(event))
        return pieces

    def start_next_cycle(self) -> None:
        super().start_next_cycle()
        self.trace.record("h11", "--", "start_next_cycle")
        self.trace.over = True


def traced(app: ASGIApp) -> ASGIApp:
    """A middleware that records the app's messages, and how it begins and ends."""

    async def traced_app(scope: Scope, receive: Receive, send: Send) -> None:
        trace: Trace = scope["extensions"]["foal.trace"]["trace"]
        request = trace.request  # its rows may go on when the next has begun

        async def traced_receive() -> Message:
            trace.record("ASGI", "<-", "receive()", request)
            with trace.raising("ASGI", "->", request):
                message = await receive()
            trace.record("ASGI", "->", shown(message), request)
            return message

        async def traced_send(message: Message) -> None:
            trace.record("ASGI", "<-", shown(message), request)
            with trace.raising("ASGI", "->", request):
                await send(message)

        trace.record("app", "->", f"called: {scope['type']} {scope['path']}", request)
        with trace.raising("app", "<-", request):
            await app(scope, traced_receive, traced_send)
        trace.record("app", "<-", "returns", request)

    return traced_app
