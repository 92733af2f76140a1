"""How fast is foal, beside the servers that happen to be installed?

    python tests/benchmark.py                     everything, some twenty minutes
    python tests/benchmark.py --quick             every case once, to see that it works
    python tests/benchmark.py --only hello,post --servers foal,uvicorn-h11
    python tests/benchmark.py --foal ../before    another foal, as "foal-other"

It runs with the Python that has the other servers installed; what is missing is left
out. `wrk` makes the load if it is there, and a small asyncio client if not (always for
WebSocket). Where the system can do it, the server has one core and the load the other.

How to read it. CPU time per request (user and system, of all the server's processes) is
the figure to trust: it stays the same while others use the machine. Requests per second
mean something only where the server was busy all the time; others are marked with "~".
Servers take turns within each round, a ratio is made of two figures of one round, and
what is printed is the median of the rounds, with the least and the most of them.
Above 1 is better than the server compared with (×, by default uvicorn on h11).

But: one machine, the loopback interface, apps that do nothing. A real application spends
its time elsewhere.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONNECTIONS = 64
HEAD = "Host: 127.0.0.1\r\n"
CORES = sorted(getattr(os, "sched_getaffinity", lambda _: [])(0))  # empty: cannot pin
WRK = shutil.which("wrk")


# What is served: this application by every ASGI server, and below it two floors, which
# are what no server on asyncio, and none on h11, can fall below. Their source is copied
# into a folder of their own, so that no server pays for the imports of this file.


async def app(scope, receive, send):
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({**message, "type": "websocket.send"})
        return
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    path, body = scope["path"], b"Hello, world!"
    start = {"type": "http.response.start", "status": 200}
    if path == "/stream":
        await send({**start, "headers": [(b"content-type", b"text/plain")]})
        for _ in range(10):
            part = {"type": "http.response.body", "body": bytes(1024)}
            await send({**part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    if path == "/large":
        body = bytes(65536)
    elif path == "/echo":
        message, body = await receive(), b""
        while message.get("more_body"):
            body += message["body"]
            message = await receive()
        body += message["body"]
    elif path == "/pid":
        body = str(__import__("os").getpid()).encode()
    length = str(len(body)).encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", length)]
    await send({**start, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def bare_asyncio(port):
    """A constant, whatever is asked."""
    import asyncio

    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\nHello, world!"

    class Constant(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport

        def data_received(self, data):
            self.transport.write(answer)

    async def main():
        loop = asyncio.get_running_loop()
        await (await loop.create_server(Constant, "127.0.0.1", port)).serve_forever()

    asyncio.run(main())


def bare_h11(port):
    """HTTP read and written by h11, one write for an answer; no scope, no tasks."""
    import asyncio

    import h11

    class Answerer(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport
            self.conn = h11.Connection(h11.SERVER)

        def data_received(self, data):
            self.conn.receive_data(data)
            while type(event := self.conn.next_event()) in (h11.Request, h11.Data):
                if type(event) is h11.Request:
                    self.target, self.body = event.target, bytearray()
                else:
                    self.body += event.data
            if type(event) is h11.EndOfMessage:
                self.transport.write(self.answer())
                self.conn.start_next_cycle()

        def answer(self):
            parts = [b"Hello, world!"]
            if self.target == b"/stream":
                parts = [bytes(1024)] * 10
            elif self.target != b"/":
                parts = [bytes(self.body) or bytes(65536)]
            headers = [("content-type", "text/plain"), ("server", "h11")]
            headers.append(("date", "Sat, 21 Nov 2026 07:42:02 GMT"))
            if len(parts) == 1:
                headers.append(("content-length", str(len(parts[0]))))
            events = [h11.Response(status_code=200, headers=headers)]
            events += [h11.Data(data=part) for part in parts]
            return b"".join(map(self.conn.send, [*events, h11.EndOfMessage()]))

    async def main():
        loop = asyncio.get_running_loop()
        await (await loop.create_server(Answerer, "127.0.0.1", port)).serve_forever()

    asyncio.run(main())


def write_sources(folder: Path) -> None:
    (folder / "bench_app.py").write_text(inspect.getsource(app))
    for floor in (bare_asyncio, bare_h11):
        call = f"\n\n{floor.__name__}(int(__import__('sys').argv[1]))\n"
        (folder / f"{floor.__name__}.py").write_text(inspect.getsource(floor) + call)


# Who serves: the command of each server.


@dataclasses.dataclass
class Peer:
    command: list[str]  # {port} stands for the port
    needs: tuple[str, ...] = ()
    quiet: tuple[str, ...] = ()  # options without an access log,
    logging: tuple[str, ...] | None = None  # and with one; None: it has none
    websocket: bool = True
    http: bool = True  # False: differs from another peer only in its WebSocket
    only: str = ""  # the one case that makes sense


def peers(other: str | None) -> dict[str, Peer]:
    """All peers that this Python can run."""
    foal = ["server.py", "bench_app:app", "--app-dir", ".", "--port", "{port}"]
    uvicorn = ["-m", "uvicorn", "bench_app:app", "--port", "{port}", "--http", "h11"]
    uvicorn += ["--loop", "asyncio"]
    in_c = [*uvicorn[:-3], "httptools", "--loop", "uvloop"]
    at = ["127.0.0.1:{port}"]
    quiet = ("--no-access-log",)
    h11 = ("uvicorn", "h11")
    found = {
        "foal": Peer([str(ROOT / foal[0]), *foal[1:]], ("h11",), quiet, ()),
        "foal-other": Peer([f"{other}/{foal[0]}", *foal[1:]], ("h11",), quiet, ()),
        "uvicorn-h11": Peer(uvicorn, h11, quiet, (), websocket=False),
        "uvicorn-wsproto": Peer(
            [*uvicorn, "--ws", "wsproto"], (*h11, "wsproto"), quiet, http=False
        ),
        "uvicorn-websockets": Peer(
            [*uvicorn, "--ws", "websockets"], (*h11, "websockets"), quiet, http=False
        ),
        "uvicorn-c": Peer(
            in_c, ("uvicorn", "httptools", "uvloop", "websockets"), quiet, ()
        ),
        "hypercorn": Peer(
            ["-m", "hypercorn", "-w", "0", "-b", *at, "bench_app:app"],
            ("hypercorn",),
            logging=("--access-logfile", "-"),
        ),
        "daphne": Peer(
            ["-m", "daphne", "-v", "0", "-p", "{port}", "bench_app:app"],
            ("daphne",),
            logging=("--access-log", "-"),
        ),
        "granian": Peer(
            ["-m", "granian", "--interface", "asgi", "--port", "{port}"]
            + ["--no-log", "bench_app:app"],
            ("granian",),
            logging=None,
        ),
        "h11, no ASGI": Peer(["bare_h11.py", "{port}"], ("h11",), websocket=False),
        "bare asyncio": Peer(["bare_asyncio.py", "{port}"], only="hello"),
    }
    if other is None:
        del found["foal-other"]
    there = importlib.util.find_spec
    return {n: p for n, p in found.items() if all(there(need) for need in p.needs)}


class Running:
    """A server that runs, with what can be asked of it."""

    def __init__(self, command: list[str], folder: Path, *, pin: bool = True) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *(word.format(port=self.port) for word in command)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=pin_to(0) if pin else None,
        )
        self.wait_for_answer()
        self.seconds_to_answer = time.perf_counter() - self.started

    def wait_for_answer(self) -> None:
        while time.perf_counter() < self.started + 20 and self.process.poll() is None:
            with contextlib.suppress(OSError):
                with socket.create_connection(("127.0.0.1", self.port), 5) as sock:
                    sock.sendall(f"GET / HTTP/1.1\r\n{HEAD}\r\n".encode())
                    if sock.recv(1000):
                        return
            time.sleep(0.001)
        self.stop()
        raise SystemExit(f"does not answer: {' '.join(self.process.args)}")

    def used(self) -> tuple[float, float]:
        """Seconds of CPU time so far, and MiB of memory, of all its processes."""
        table, family = process_table(), [self.process.pid]
        for pid in family:  # which grows while we walk
            family += [child for child, row in table.items() if row[0] == pid]
        rows = [table[pid] for pid in family if pid in table]
        return sum(row[1] for row in rows), sum(row[2] for row in rows)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def pin_to(core: int) -> Callable[[], None] | None:
    """For a new process: take only this core. None where that cannot be done."""
    if len(CORES) < 2:
        return None
    return lambda: os.sched_setaffinity(0, {CORES[core]})


def process_table() -> dict[int, tuple[int, float, float]]:
    """All processes: {pid: (parent, seconds of CPU time, MiB resident)}."""
    if not os.path.exists("/proc/self/stat"):
        return process_table_of_ps()
    table = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            # After the name, which may hold anything: man 5 proc_pid_stat, field 3 on.
            fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
            cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            memory = int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            table[int(name)] = int(fields[1]), cpu, memory
    return table


def process_table_of_ps() -> dict[int, tuple[int, float, float]]:
    """The same on macOS and the BSDs, in hundredths of a second."""
    command = ["ps", "-Ao", "pid=,ppid=,rss=,time="]
    table = {}
    for line in subprocess.check_output(command, text=True).splitlines():
        pid, parent, kib, clock = line.split()
        seconds = 0.0
        for part in clock.replace("-", ":").split(":"):
            seconds = seconds * 60 + float(part)
        table[int(pid)] = int(parent), seconds, int(kib) / 1024
    return table


# What is asked.


@dataclasses.dataclass
class Case:
    title: str
    path: str = "/"
    method: str = "GET"
    headers: str = HEAD
    body: bytes = b""
    access_log: bool = False
    frame: int = 0  # bytes of a WebSocket message; 0 for HTTP

    def packet(self) -> bytes:
        """One request, or one frame, as bytes."""
        if self.frame:
            return encode_text_frame(b"x" * self.frame)
        length = f"Content-Length: {len(self.body)}\r\n" if self.body else ""
        head = f"{self.method} {self.path} HTTP/1.1\r\n{self.headers}{length}\r\n"
        return head.encode() + self.body

    def script(self) -> str:
        """The same for wrk, which also has to say in JSON what it found."""
        fields = [line.split(": ", 1) for line in self.headers.splitlines()]
        lines = [f"wrk.method = {json.dumps(self.method)}"]
        lines += [f"wrk.headers[{json.dumps(n)}] = {json.dumps(v)}" for n, v in fields]
        if self.body:
            lines.append(f"wrk.body = string.rep('x', {len(self.body)})")
        return "\n".join(lines) + WRK_DONE


BROWSER = HEAD + "".join(
    f"{line}\r\n"
    for line in (
        "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
        "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
        "Accept-Language: en-GB,en;q=0.5",
        "Accept-Encoding: gzip, deflate, br, zstd",
        "Referer: http://127.0.0.1/an/earlier/page",
        "Connection: keep-alive",
        "Cookie: session=4f2c7a90d1e84b6f; theme=dark; consent=yes",
        "Upgrade-Insecure-Requests: 1",
        "Sec-Fetch-Dest: document",
        "Sec-Fetch-Mode: navigate",
        "Sec-Fetch-Site: same-origin",
    )
)

CASES = {
    "hello": Case("13 bytes back"),
    "browser": Case("hello, with a browser's 12 request headers", headers=BROWSER),
    "log": Case("hello, with the access log on", access_log=True),
    "large": Case("64 KiB back", "/large"),
    "post": Case("10 KiB sent and echoed", "/echo", "POST", body=b"x" * 10240),
    "stream": Case("ten chunks of 1 KiB", "/stream"),
    "ws": Case("WebSocket echo of 64 bytes", frame=64),
    "ws-large": Case("WebSocket echo of 64 KiB", frame=65536),
}

WRK_DONE = """
function done(summary, latency)
  local e = summary.errors
  io.write(string.format('\\n{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, ' ..
    '"errors": %d}\\n', summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def encode_text_frame(payload: bytes) -> bytes:
    """As a client sends it: masked (RFC 6455 §5.2)."""
    size, mask = len(payload), b"\x37\xfa\x21\x3d"
    head = bytes((0x81, 0x80 | size)) if size < 126 else b""
    if 126 <= size < 2**16:
        head = b"\x81\xfe" + size.to_bytes(2, "big")
    head = head or b"\x81\xff" + size.to_bytes(8, "big")
    return head + mask + bytes(c ^ mask[i % 4] for i, c in enumerate(payload))


# The load.


@dataclasses.dataclass
class Sample:
    requests: int
    seconds: float
    p50: float  # ms
    p99: float
    errors: int
    cpu: float = 0.0  # seconds, of the server

    @property
    def micros(self) -> float:
        return self.cpu / max(1, self.requests) * 1e6

    @property
    def rate(self) -> float:
        return self.requests / self.seconds

    @property
    def busy(self) -> bool:
        """Was the server what made it slow?"""
        return self.cpu > 0.9 * self.seconds


def measure(server: Running, case: Case, seconds: float) -> Sample:
    """Load this server for so long, after a moment to warm up."""
    load(server.port, case, max(0.1, seconds / 8))
    before, _ = server.used()
    sample = load(server.port, case, seconds)
    sample.cpu = server.used()[0] - before
    return sample


def load(port: int, case: Case, seconds: float, count: float = float("inf")) -> Sample:
    if case.frame or not WRK or count != float("inf"):
        return asyncio.run(Load(port, case).run(seconds, count))
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(case.script())
        script.flush()
        # wrk counts whole seconds; less than one is for warming up.
        command = [WRK, "-t1", f"-c{CONNECTIONS}", f"-d{max(1, round(seconds))}s"]
        command += ["--latency", "-s", script.name]
        command.append(f"http://127.0.0.1:{port}{case.path}")
        output = subprocess.check_output(command, text=True, preexec_fn=pin_to(-1))
    return Sample(**json.loads(output.strip().splitlines()[-1]))


class Load:
    """The small generator: each connection sends, waits for as many bytes as the first
    answer had, and sends again."""

    def __init__(self, port: int, case: Case) -> None:
        self.port, self.case, self.packet = port, case, case.packet()
        self.times: list[float] = []
        self.lost = 0
        self.size = 0
        self.left = float("inf")  # requests still to send

    async def run(self, seconds: float, count: float) -> Sample:
        loop, self.left = asyncio.get_running_loop(), count
        self.over = loop.create_future()
        connections = [
            (
                await loop.create_connection(
                    lambda: Exchange(self), "127.0.0.1", self.port
                )
            )
            for _ in range(CONNECTIONS)
        ]
        started = time.perf_counter()
        for _, exchange in connections:
            exchange.start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.over, seconds)
        took = time.perf_counter() - started
        for transport, _ in connections:
            transport.abort()
        times = sorted(self.times) or [0.0]
        p50, p99 = times[len(times) // 2] * 1e3, times[len(times) * 99 // 100] * 1e3
        return Sample(len(self.times), took, p50, p99, self.lost)


class Exchange(asyncio.Protocol):
    """One connection of that load."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.handshake = bool(load.case.frame)
        self.received = b""  # of the first answer; later ones are only counted
        self.left = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def start(self) -> None:
        if self.handshake:
            key = base64.b64encode(bytes(16)).decode()
            fields = f"Upgrade: websocket\r\nConnection: Upgrade\r\n{HEAD}"
            fields += f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
            self.transport.write(f"GET / HTTP/1.1\r\n{fields}\r\n".encode())
        else:
            self.ask()

    def ask(self) -> None:
        self.sent = time.perf_counter()
        self.left = self.load.size
        self.transport.write(self.load.packet)

    def data_received(self, data: bytes) -> None:
        if self.handshake:
            self.handshake = not data.endswith(b"\r\n\r\n")
            self.load.size = len(self.load.packet) - 4  # the echo has no mask
        elif self.left > 0 and self.left > len(data):
            self.left -= len(data)
            return
        elif not self.load.size:
            self.received += data
            self.load.size = answer_size(self.received)
            if not self.load.size:
                return
        if not self.handshake:
            self.answered()

    def answered(self) -> None:
        load = self.load
        if hasattr(self, "sent"):
            load.times.append(time.perf_counter() - self.sent)
        load.left -= 1
        if load.left >= 0:
            self.ask()
        elif not load.over.done():
            load.over.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.load.lost += not self.transport.is_closing()


def answer_size(data: bytes) -> int:
    """Bytes of the answer at the start of data, or 0 while it is incomplete."""
    head, _, body = data.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            size = len(head) + 4 + int(line[15:])
            return size if len(data) >= size else 0
    return len(data) if body.endswith(b"0\r\n\r\n") else 0


# What is compared. Each function takes the same three things, and prints a table.


@dataclasses.dataclass
class Run:
    """What the command line asked for, and what was found."""

    peers: dict[str, Peer]
    folder: Path
    seconds: float
    rounds: int
    summary: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def servers(self, options: dict[str, list[str]]) -> Iterator[dict[str, Running]]:
        """Run these peers, each with its extra options, for as long as the block."""
        running: dict[str, Running] = {}
        try:
            for name, extra in options.items():
                command = [*self.peers[name].command, *extra]
                running[name] = Running(command, self.folder)
            yield running
        finally:
            for server in running.values():
                server.stop()


def compare(run: Run, name: str, case: Case) -> None:
    """The table of one case: all servers run, and take turns in being loaded."""
    options = {}
    for peer_name, peer in run.peers.items():
        extra = peer.logging if case.access_log else peer.quiet
        suits = peer.websocket if case.frame else peer.http
        if suits and extra is not None and peer.only in ("", name):
            options[peer_name] = [*extra]
    samples: dict[str, list[Sample]] = {name: [] for name in options}
    with run.servers(options) as servers:
        for _ in range(run.rounds):
            for peer_name, server in servers.items():
                samples[peer_name].append(measure(server, case, run.seconds))
    baseline = "uvicorn-wsproto" if case.frame else "uvicorn-h11"
    baseline = baseline if baseline in samples else next(iter(samples))
    print_comparison(run, name, case, samples, baseline)


def print_comparison(
    run: Run, name: str, case: Case, samples: dict[str, list[Sample]], baseline: str
) -> None:
    rows = []
    for peer_name, ours in samples.items():
        pairs = list(zip(samples[baseline], ours, strict=True))
        cpu = [theirs.micros / mine.micros for theirs, mine in pairs if mine.cpu]
        rate = [mine.rate / theirs.rate for theirs, mine in pairs]
        sure = "" if all(theirs.busy and mine.busy for theirs, mine in pairs) else "~"
        errors = sum(sample.errors for sample in ours)
        rows.append(
            [
                peer_name,
                spread([s.micros for s in ours], ".1f"),
                spread(cpu, ".2f"),
                f"{sure}{statistics.median(s.rate for s in ours):,.0f}",
                sure + spread(rate, ".2f"),
                f"{statistics.median(s.p50 for s in ours):.1f}",
                spread([s.p99 for s in ours], ".1f"),
                str(errors or ""),
            ]
        )
        median = f"{statistics.median(cpu):.2f}" if cpu else ""
        run.summary.setdefault(peer_name, {})[name] = median
    heads = ["", "µs CPU", f"× {baseline}", "requests/s", "×", "p50 ms", "p99 ms"]
    show(f"{name}: {case.title}, {CONNECTIONS} connections", [*heads, "errors"], rows)


def spread(values: list[float], form: str) -> str:
    """The median, and how far the rounds are apart."""
    if not values:
        return ""
    middle, low, high = statistics.median(values), min(values), max(values)
    around = f" ({low:{form}}–{high:{form}})" if len(values) > 1 else ""
    return f"{middle:{form}}{around}"


def show(title: str, heads: list[str], rows: list[list[str]]) -> None:
    table = [heads, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(f"\n{title}")
    for row in table:
        first, *rest = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]
        print("  " + "  ".join(cells).rstrip(), flush=True)


def show_summary(run: Run) -> None:
    """Markdown, for README: CPU time per request, as × of the server compared with."""
    names = [name for name in CASES if any(name in row for row in run.summary.values())]
    print("\n| × CPU | " + " | ".join(names) + " |")
    print("|---" + "|---:" * len(names) + "|")
    for peer_name, row in run.summary.items():
        cells = " | ".join(row.get(name, "") for name in names)
        print(f"| {peer_name} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help=f"of {', '.join(CASES)}")
    parser.add_argument("--servers", default="", help="only these, by name")
    parser.add_argument("--foal", metavar="PATH", help="compare another foal, too")
    parser.add_argument("--quick", action="store_true", help="once, for a moment")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 0.2, 1
    other = options.foal and os.path.abspath(options.foal)
    found = peers(other)
    wanted = options.servers.split(",") if options.servers else list(found)
    only = options.only.split(",") if options.only else list(CASES)
    with tempfile.TemporaryDirectory() as folder:
        write_sources(Path(folder))
        run = Run(
            {name: found[name] for name in wanted},
            Path(folder),
            options.seconds,
            options.rounds,
        )
        if CORES:  # the load's core; a server takes its own
            os.sched_setaffinity(0, {CORES[-1]})
        for name in only:
            compare(run, name, CASES[name])
        show_summary(run)


if __name__ == "__main__":
    main()
