"""How fast is foal, beside the servers that happen to be installed?

    python tests/benchmark.py                     everything, some twenty minutes
    python tests/benchmark.py --quick             once for a moment: does it work?
    python tests/benchmark.py --only hello,post --servers foal,uvicorn-h11
    python tests/benchmark.py --foal ../before    another foal too, as "foal-other"

It runs with the Python that has the other servers installed; what is missing is left
out. `wrk` makes the load if it is there, and a small asyncio client if not (always for
WebSocket). Where the system can do it, the server has one core and the load the other.

How to read it. CPU time per request (user and system, of all the server's processes) is
the figure to trust: it stays much the same while others use the machine. Requests per
second mean something only where the server was what made it slow; where its core was
idle for a tenth of the time they are marked with "~". Servers take turns in each round;
a ratio is of two figures of one round; what is printed is the median of the rounds,
with the least and the most of them. In columns with "×", above 1 is better than
uvicorn on h11 (for WebSocket, with wsproto), or than the first server if that is not
compared.

But: one machine, the loopback interface, an app that does nothing: a real application
spends its time elsewhere. Not on Windows, which has neither /proc nor ps.
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
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WRK = shutil.which("wrk")
CONNECTIONS = 64
MANY = 20_000  # requests, after which memory is looked at
CORES = sorted(getattr(os, "sched_getaffinity", lambda _: ())(0))  # (): cannot choose


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


# Who serves: the command of each server, and what it needs.


@dataclasses.dataclass
class Peer:
    command: str  # for Python; {port} and {foal} are filled in
    needs: str  # modules
    quiet: str = ""  # options without an access log,
    logging: str | None = None  # and with one; None: not compared
    cases: str = "http ws"  # kinds of cases, or their names


OPTIONS = "bench_app:app --app-dir . --port {port}"
FOAL = f"{{foal}}/server.py {OPTIONS}"
UVICORN = "-m uvicorn bench_app:app --port {port} --loop asyncio --http h11"
UVICORN_C = "-m uvicorn bench_app:app --port {port} --loop uvloop --http httptools"
HYPERCORN = "-m hypercorn -w 0 -b 127.0.0.1:{port} bench_app:app"
DAPHNE = "-m daphne -v 0 -p {port} bench_app:app"
GRANIAN = "-m granian --interface asgi --port {port} --no-log bench_app:app"
QUIET = "--no-access-log"
BASELINE = "uvicorn-h11", "uvicorn-wsproto"  # what the others are compared with
FLOORS = "h11 alone", "bare asyncio"
PEERS = {
    "foal": Peer(FOAL, "h11", QUIET, ""),
    "foal -m": Peer(f"-m server {OPTIONS}", "h11", QUIET, cases="start"),  # compiled
    "foal-other": Peer(FOAL, "h11", QUIET, ""),
    BASELINE[0]: Peer(UVICORN, "uvicorn h11", QUIET, "", "http"),
    BASELINE[1]: Peer(
        f"{UVICORN} --ws wsproto", "uvicorn h11 wsproto", QUIET, cases="ws"
    ),
    "uvicorn-websockets": Peer(
        f"{UVICORN} --ws auto", "uvicorn h11 websockets", QUIET, cases="ws"
    ),
    "uvicorn-c": Peer(UVICORN_C, "uvicorn httptools uvloop websockets", QUIET, ""),
    "hypercorn": Peer(HYPERCORN, "hypercorn", logging="--access-logfile -"),
    "daphne": Peer(DAPHNE, "daphne", logging="--access-log -"),
    "granian": Peer(GRANIAN, "granian"),
    FLOORS[0]: Peer("bare_h11.py {port}", "h11", cases="http"),
    FLOORS[1]: Peer("bare_asyncio.py {port}", "asyncio", cases="hello"),
}


class Running:
    """A server that runs, with what can be asked of it."""

    def __init__(self, command: str, run: Run, name: str, *, fd: int = -1) -> None:
        self.keep_port()
        foal = run.other if name == "foal-other" else ROOT
        words = [w.format(port=self.port, foal=foal, fd=fd) for w in command.split()]
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *words],
            cwd=run.folder,
            env=run.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[fd] if fd >= 0 else (),
        )
        if CORES and run.pinned:
            os.sched_setaffinity(self.process.pid, CORES[:1])
        if fd >= 0:
            self.port = socket.socket(fileno=os.dup(fd)).getsockname()[1]
        self.wait_for_answer()
        self.seconds_to_answer = time.perf_counter() - self.started

    def keep_port(self) -> None:
        """Find a free port; on Linux, keep it from others that look for one: two sockets
        with SO_REUSEADDR may both bind it while at most one listens (man 7 socket), but
        it is free for nobody. Without that, two runs at once met on one port."""
        self.kept = socket.socket()
        self.kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.kept.bind(("127.0.0.1", 0))
        self.port = self.kept.getsockname()[1]
        if sys.platform != "linux":
            self.kept.close()

    def wait_for_answer(self) -> None:
        while time.perf_counter() < self.started + 20 and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.ask("/")
                return
            time.sleep(0.001)
        self.stop()
        raise SystemExit(f"does not answer: {' '.join(self.process.args)}")

    def ask(self, path: str) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), 5) as sock:
            return ask(sock, Case("", path).packet())

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
        self.kept.close()


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
    headers: str = "Host: 127.0.0.1\r\n"
    body: bytes = b""
    access_log: bool = False
    varied: bool = False  # each request has another target; foal gains by equal ones
    frame: int = 0  # bytes of a WebSocket message; 0 for HTTP

    @property
    def kind(self) -> str:
        return "ws" if self.frame else "http"

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
        if self.varied:
            lines.append(WRK_VARIED)
        return "\n".join(lines) + WRK_DONE


BROWSER = """Host: 127.0.0.1
User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0
Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8
Accept-Language: en-GB,en;q=0.5
Accept-Encoding: gzip, deflate, br, zstd
Referer: http://127.0.0.1/an/earlier/page
Connection: keep-alive
Cookie: session=4f2c7a90d1e84b6f; theme=dark; consent=yes
Upgrade-Insecure-Requests: 1
Sec-Fetch-Dest: document
Sec-Fetch-Mode: navigate
Sec-Fetch-Site: same-origin
""".replace("\n", "\r\n")

CASES = {
    "hello": Case("13 bytes back"),
    "browser": Case("hello, with a browser's 12 request headers", headers=BROWSER),
    "varied": Case("hello, each time another target", varied=True),
    "log": Case("hello, with the access log on", access_log=True),
    "large": Case("64 KiB back", "/large"),
    "post": Case("10 KiB sent and echoed", "/echo", "POST", body=b"x" * 10240),
    "stream": Case("ten chunks of 1 KiB", "/stream"),
    "ws": Case("WebSocket echo of 64 bytes", frame=64),
    "ws-large": Case("WebSocket echo of 64 KiB", frame=65536),
}

WRK_VARIED = """
local requests, count = {}, 0
function init()
  for n = 1, 1000 do requests[n] = wrk.format(nil, '/?' .. n) end
end
function request()
  count = count % 1000 + 1
  return requests[count]
end"""

WRK_DONE = """
function done(summary, latency)
  local e = summary.errors
  io.write(string.format('\\n{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, ' ..
    '"errors": %d}\\n', summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def encode_text_frame(content: bytes) -> bytes:
    """As a client sends it: masked (RFC 6455 §5.2)."""
    size, mask = len(content), b"\x37\xfa\x21\x3d"
    if size < 126:
        head = bytes([0x81, 0x80 | size])
    elif size < 2**16:
        head = b"\x81\xfe" + size.to_bytes(2, "big")
    else:
        head = b"\x81\xff" + size.to_bytes(8, "big")
    key = (mask * (size // 4 + 1))[:size]
    mixed = int.from_bytes(content, "big") ^ int.from_bytes(key, "big")
    return head + mask + mixed.to_bytes(size, "big")


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


def load(port: int, case: Case, seconds: float, count: float = math.inf) -> Sample:
    if case.frame or not WRK or count != math.inf or seconds < 1:  # wrk counts seconds
        return asyncio.run(Load(port, case).run(seconds, count))
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(case.script())
        script.flush()
        command = [WRK, "-t1", f"-c{CONNECTIONS}", f"-d{round(seconds)}s"]
        command += ["--latency", "-s", script.name]
        command.append(f"http://127.0.0.1:{port}{case.path}")
        output = subprocess.check_output(command, text=True)
    return Sample(**json.loads(output.strip().splitlines()[-1]))


class Load:
    """The small generator: each connection sends, waits for as many bytes as the first
    answer had, and sends again."""

    def __init__(self, port: int, case: Case, connections: int = CONNECTIONS) -> None:
        self.port, self.case, self.packet = port, case, case.packet()
        self.connections = connections
        self.times: list[float] = []
        self.lost = 0
        self.size = 0
        self.left = math.inf  # requests still to send

    async def run(self, seconds: float, count: float) -> Sample:
        loop, self.left = asyncio.get_running_loop(), count
        self.over = loop.create_future()
        connections = [
            (
                await loop.create_connection(
                    lambda: Exchange(self), "127.0.0.1", self.port
                )
            )
            for _ in range(self.connections)
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
            fields = "Host: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            fields += f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
            self.transport.write(f"GET / HTTP/1.1\r\n{fields}\r\n".encode())
        else:
            self.ask()

    def ask(self) -> None:
        self.sent = time.perf_counter()
        self.left = self.load.size
        packet = self.load.packet
        if self.load.case.varied:
            packet = packet.replace(b"/ ", b"/?%d " % len(self.load.times), 1)
        self.transport.write(packet)

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


def ask(sock: socket.socket, request: bytes) -> bytes:
    """Send it and wait for the answer. Raises ConnectionError if that breaks off."""
    sock.sendall(request)
    answer = b""
    while not answer_size(answer):
        data = sock.recv(65536)
        if not data:
            raise ConnectionError(answer[-100:])
        answer += data
    return answer


def answer_size(data: bytes) -> int:
    """Bytes of the answer at the start of data, or 0 while it is incomplete."""
    head, _, body = data.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            size = len(head) + 4 + int(line[15:])
            return size if len(data) >= size else 0
    return len(data) if body.endswith(b"0\r\n\r\n") else 0


# What is compared. Each of these functions prints a table.


@dataclasses.dataclass
class Run:
    """What the command line asked for, and what was found."""

    folder: Path  # with the sources of what is served
    other: str  # path of another foal
    seconds: float
    rounds: int
    peers: dict[str, Peer] = dataclasses.field(default_factory=dict)
    summary: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    pinned: bool = bool(CORES)

    def start(self, name: str, options: str | None = None, **more: int) -> Running:
        peer = self.peers[name]
        options = peer.quiet if options is None else options
        return Running(f"{peer.command} {options}", self, name, **more)

    def environment(self) -> dict[str, str]:
        """As users have it: what was compiled once is kept; here, in our folder."""
        path = os.pathsep.join([str(self.folder), str(ROOT)])
        ours = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": ""}
        ours["PYTHONPYCACHEPREFIX"] = str(self.folder / "cache")
        return {**os.environ, **ours}

    def asgi(self) -> list[str]:
        """The peers that serve the app over HTTP."""
        names = [n for n, peer in self.peers.items() if "http" in peer.cases]
        return [name for name in names if name not in FLOORS]


@contextlib.contextmanager
def stopping(servers: dict[str, Running]) -> Iterator[dict[str, Running]]:
    try:
        yield servers
    finally:
        for server in servers.values():
            server.stop()


def compare(run: Run, name: str, case: Case) -> None:
    """One case: all servers run, and take turns in being loaded."""
    samples: dict[str, list[Sample]] = {}
    with stopping({}) as servers:
        for peer_name, peer in run.peers.items():
            options = peer.logging if case.access_log else peer.quiet
            suits = {name, case.kind} & set(peer.cases.split())
            if suits and options is not None:
                servers[peer_name] = run.start(peer_name, options)
                samples[peer_name] = []
        for _ in range(run.rounds):
            for peer_name, server in servers.items():
                samples[peer_name].append(measure(server, case, run.seconds))
    if not samples:
        return
    heads = ["", "µs CPU", "×", "requests/s", "×", "p50 ms", "p99 ms", "×", "errors"]
    base = next((n for n in BASELINE if n in samples), next(iter(samples)))
    theirs, rows = samples[base], []
    for peer_name, ours in samples.items():
        cpu = ratios([s.micros for s in theirs], [s.micros for s in ours])
        rate = ratios([s.rate for s in ours], [s.rate for s in theirs])
        late = ratios([s.p99 for s in theirs], [s.p99 for s in ours])
        sure = "" if all(sample.busy for sample in ours + theirs) else "~"
        rows.append(
            [
                peer_name,
                spread([s.micros for s in ours], ".1f"),
                spread(cpu, ".2f"),
                sure + f"{statistics.median(s.rate for s in ours):,.0f}",
                sure + f"{statistics.median(rate):.2f}",
                f"{statistics.median(s.p50 for s in ours):.1f}",
                spread([s.p99 for s in ours], ".1f"),
                f"{statistics.median(late):.2f}",
                str(sum(sample.errors for sample in ours) or ""),
            ]
        )
        run.summary.setdefault(peer_name, {})[name] = statistics.median(cpu)
    show(f"{name}: {case.title}, {CONNECTIONS} connections", heads, rows)


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Round by round."""
    return [a / b if b else 0.0 for a, b in zip(above, below, strict=True)]


def spread(values: list[float], form: str) -> str:
    """The median, and how far the rounds are apart."""
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


def compare_start(run: Run) -> None:
    """From the command to the first answer; memory then, and after many requests."""
    names = [name for name in run.peers if run.peers[name].cases != "ws"]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory, later = {}, {}
    for turn in range(run.rounds + 1):  # the first fills the cache of compiled modules
        for name in names:
            with stopping({name: run.start(name)}) as servers:
                if turn:
                    seconds[name].append(servers[name].seconds_to_answer * 1e3)
                memory[name] = servers[name].used()[1]
                if turn == run.rounds:
                    load(servers[name].port, CASES["hello"], 60, MANY)
                    later[name] = servers[name].used()[1]
    base = BASELINE[0] if BASELINE[0] in names else names[0]
    rows = []
    for name in names:
        faster = statistics.median(ratios(seconds[base], seconds[name]))
        row = [name, spread(seconds[name], ".0f"), f"{faster:.2f}"]
        for table in (memory, later):
            row += [f"{table[name]:.1f}", f"{table[base] / table[name]:.2f}"]
        rows.append(row)
    heads = ["", "ms to the first answer", "×", "MiB then", "×"]
    heads += [f"after {MANY:,} requests", "×"]
    show("start: time and memory", heads, rows)


def compare_workers(run: Run) -> None:
    """Two workers against one, both cores for server and load; and how many of 64
    connections the fuller worker has."""
    rows = []
    names = [n for n in run.asgi() if "uvicorn" in n or "foal" in n]
    with use_all_cores(run):
        for name in names:
            options = [f"{run.peers[name].quiet} --workers {n}" for n in (1, 2)]
            pair = {str(n): run.start(name, o) for n, o in enumerate(options, 1)}
            with stopping(pair) as servers:
                while len({servers["2"].ask("/pid")[-3:] for _ in range(20)}) < 2:
                    time.sleep(0.05)  # the second is not there yet
                one, two, fuller = [], [], []
                for _ in range(run.rounds):
                    one.append(measure(servers["1"], CASES["hello"], run.seconds).rate)
                    two.append(measure(servers["2"], CASES["hello"], run.seconds).rate)
                    fuller.append(share_of_fuller(servers["2"].port))
            gain = spread(ratios(two, one), ".2f")
            row = [name, *(f"{statistics.median(r):,.0f}" for r in (one, two)), gain]
            rows.append([*row, spread(fuller, ".0f")])
    heads = ["", "requests/s of one", "of two", "×", f"of {CONNECTIONS} the fuller has"]
    show("workers: two against one, on all cores", heads, rows)


@contextlib.contextmanager
def use_all_cores(run: Run) -> Iterator[None]:
    pinned, run.pinned = run.pinned, False
    if CORES:
        os.sched_setaffinity(0, CORES)
    try:
        yield
    finally:
        run.pinned = pinned
        if CORES:
            os.sched_setaffinity(0, CORES[-1:])


def share_of_fuller(port: int) -> int:
    """Open connections all at once; how many does the fuller of two workers have?"""
    with contextlib.ExitStack() as stack:
        socks = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
            for _ in range(CONNECTIONS)
        ]
        for sock in socks:
            sock.sendall(Case("", "/pid").packet())
        answers = [sock.recv(65536).rpartition(b"\n")[2] for sock in socks]
    return max(Counter(answers).values())


def compare_modes(run: Run) -> None:
    """One client on one connection, however the listener came to be: where Nagle's
    algorithm is on, the second write of an answer waits 40 ms for an ACK."""
    rows = []
    for name in [n for n in run.asgi() if "foal" in n or "uvicorn" in n]:
        for options in ("", "--workers 2", "--reload", "--fd {fd}"):
            # create_server makes a socket whose proto is 0, as most supervisors do.
            with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
                fd = listener.fileno() if "fd" in options else -1
                quiet = f"{run.peers[name].quiet} {options}"
                with stopping({name: run.start(name, quiet, fd=fd)}) as servers:
                    row = [name, options.partition(" ")[0] or "alone"]
                    for case in (CASES["hello"], CASES["stream"]):
                        alone = Load(servers[name].port, case, connections=1)
                        sample = asyncio.run(alone.run(10, 50))
                        row += [f"{sample.p50:.2f}", f"{sample.p99:.2f}"]
            rows.append(row)
    heads = ["", "mode", "hello: p50 ms", "p99", "stream: p50 ms", "p99"]
    show("modes: one request after the other on one connection", heads, rows)


GATE = """
import timeit, server
gate = server.Gate()
def once():
    gate.buffer, gate.head = {head!r}, b""  # as if it were a new one
    assert gate.next_piece()
print(min(timeit.repeat(once, number=5000, repeat=9)) / 5000 * 1e6)
"""


def gate_cost(run: Run) -> None:
    """What foal's check of each head, as bytes, before h11 sees it, costs."""
    rows = []
    for name, root in {"foal": ROOT, "foal-other": run.other}.items():
        if name in run.peers:
            row = [name]
            for case in (CASES["hello"], CASES["browser"]):
                command = [sys.executable, "-c", GATE.format(head=case.packet())]
                row.append(subprocess.check_output(command, cwd=root, text=True)[:4])
            rows.append(row)
    show("gate: µs for a head", ["", "hello", "browser"], rows)


def show_summary(run: Run) -> None:
    """Markdown, for README: CPU time per request, as × of the server compared with."""
    names = [name for name in CASES if any(name in row for row in run.summary.values())]
    print("\n| × CPU | " + " | ".join(names) + " |")
    print("|---" + "|---:" * len(names) + "|")
    for peer_name, row in run.summary.items():
        cells = [f"{row[name]:.2f}" if name in row else "" for name in names]
        print(f"| {peer_name} | {' | '.join(cells)} |")


OTHERS = {
    "start": compare_start,
    "workers": compare_workers,
    "modes": compare_modes,
    "gate": gate_cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [*CASES, *OTHERS]
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(names), help="default: %(default)s")
    parser.add_argument("--servers", default="", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--foal", metavar="PATH", help="compare another foal, too")
    parser.add_argument("--quick", action="store_true", help="once, for a moment")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 0.2, 1
    only = options.only.split(",")
    servers = options.servers.split(",") if options.servers else list(PEERS)
    if unknown := {*only, *servers} - {*names, *PEERS}:
        parser.error(f"unknown: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as folder:
        other = os.path.abspath(options.foal or "")
        run = Run(Path(folder), other, options.seconds, options.rounds)
        for name, peer in PEERS.items():
            there = all(map(importlib.util.find_spec, peer.needs.split()))
            if name in servers and there and (options.foal or name != "foal-other"):
                run.peers[name] = peer
        write_sources(run.folder)
        if CORES:
            os.sched_setaffinity(0, CORES[-1:])  # wrk inherits it
        for name in only:
            if name in CASES:
                compare(run, name, CASES[name])
            else:
                OTHERS[name](run)
        if run.summary:
            show_summary(run)


if __name__ == "__main__":
    main()
