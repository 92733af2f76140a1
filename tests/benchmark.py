"""How fast is foal, beside uvicorn with h11 (for WebSocket, with wsproto)?

    python tests/benchmark.py [--only hello ws]     (all of it takes six minutes)

Run it with a Python that has uvicorn and wsproto; without them only foal is measured. The load
comes from `wrk` if it is installed; else, and for WebSocket, from a small client in this process.
The server has one core and the load another. CPU time per request, user and system together, is
the figure to trust: it stays about the same while other programs use the machine. The two servers
take turns in each round. A ratio compares two figures of one round: the median of the rounds, and
their range.

But: Linux only (the figures come from /proc), and an app that does nothing.
"""

import argparse
import asyncio
import collections
import contextlib
import importlib.util
import inspect
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SERVER = Path(__file__).resolve().parent.parent / "server.py"
SERVERS = {"foal": f"{SERVER} bench_app:app --app-dir ."}
if all(map(importlib.util.find_spec, ("uvicorn", "wsproto"))):
    SERVERS["uvicorn"] = "-m uvicorn bench_app:app --loop asyncio --http h11 --ws wsproto"
QUIET = "--no-access-log"
WRK = shutil.which("wrk")
CONNECTIONS = 64
CORES = sorted(os.sched_getaffinity(0))
ENDS = (b"world!", b"0\r\n\r\n")  # each answer ends with one of these
Sample = collections.namedtuple("Sample", "requests seconds p99 micros", defaults=(0.0,))


async def app(scope, receive, send):
    """What both servers serve. Its source is copied into a file of its own."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({**message, "type": "websocket.send"})
        return
    assert scope["type"] == "http", "no lifespan"
    path, body, parts = scope["path"], b"Hello, world!", 0
    if path == "/large":
        body = bytes(65530) + b"world!"
    elif path == "/pid":
        body = b"%d world!" % __import__("os").getpid()
    elif path == "/stream":
        body, parts = b"", 10
    elif path == "/echo":
        message = await receive()
        while message["more_body"]:
            rest = await receive()
            message = {**rest, "body": message["body"] + rest["body"]}
        body = message["body"]
    fields = [(b"content-length", b"%d" % len(body))] * (not parts)
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    for _ in range(parts):
        await send({"type": "http.response.body", "body": bytes(1024), "more_body": True})
    await send({"type": "http.response.body", "body": body})


BROWSER = (
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\n"
    "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\n"
    "Accept-Language: en-GB,en;q=0.5\nAccept-Encoding: gzip, deflate, br, zstd\n"
    "Referer: http://127.0.0.1/an/earlier/page\nConnection: keep-alive\n"
    "Cookie: session=4f2c7a90d1e84b6f; theme=dark; consent=yes\n"
    "Upgrade-Insecure-Requests: 1\nSec-Fetch-Dest: document\n"
    "Sec-Fetch-Mode: navigate\nSec-Fetch-Site: same-origin\n"
)
UPGRADE = "Upgrade: websocket\nConnection: Upgrade\nSec-WebSocket-Version: 13\n"
UPGRADE += "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\n"
FRAME = b"\x81\xc0" + bytes(4) + b"x" * 58 + b"world!"  # masked with zeros
Case = collections.namedtuple("Case", "title least path fields body options")  # of a request
WRK_SCRIPT = """wrk.method, wrk.body = '%s', '%s'
function done(summary, latency)
  local e = summary.errors
  assert(e.connect + e.read + e.write + e.status + e.timeout == 0)
  io.write(string.format('\\n[%%d, %%f, %%f]\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(99) / 1e3))
end"""


def packet_of(case: Case) -> bytes:
    length = f"Content-Length: {len(case.body)}\n" * bool(case.body)
    head = f"{'POST' if case.body else 'GET'} {case.path} HTTP/1.1\nHost: 127.0.0.1\n"
    return f"{head}{case.fields}{length}\n".replace("\n", "\r\n").encode() + case.body


CASES = {
    "hello": Case("hello", 1.45, "/", "", b"", QUIET),
    "browser": Case("hello, a browser's 12 fields", 1.35, "/", BROWSER, b"", QUIET),
    "large": Case("64 KiB body", 1.25, "/large", "", b"", QUIET),
    "post": Case("10 KiB POST echo", 1.4, "/echo", "", b"x" * 10234 + b"world!", QUIET),
    "stream": Case("stream of ten chunks", 1.6, "/stream", "", b"", QUIET),
    "log": Case("hello with access log", 1.3, "/", "", b"", ""),
    "ws": Case("WebSocket echo, 64 bytes", 1.5, "/", UPGRADE, b"", QUIET),
}


class Server:
    """A server that runs, and what /proc says about it."""

    def __init__(self, folder: str, command: str, cores: list[int]) -> None:
        self.kept = socket.socket()  # keeps the port until the server listens: man 7 socket
        self.kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.kept.bind(("127.0.0.1", 0))
        self.port, command = self.kept.getsockname()[1], command.split()
        self.kept.listen(128) if "--fd" in command else command.append(f"--port={self.port}")
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, stdin=self.kept,
            env={**os.environ, "PYTHONPATH": ".", "PYTHONPYCACHEPREFIX": f"{folder}/cache"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.sched_setaffinity(self.process.pid, cores)

    def __enter__(self):
        """Wait for the first answer."""
        while self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.ask("/")
                self.milliseconds = (time.perf_counter() - self.started) * 1e3
                return self
            time.sleep(0.001)
        raise SystemExit(f"does not start: {' '.join(self.process.args)}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        self.kept.close()

    def ask(self, path: str, clients: int = 1, times: int = 1) -> tuple[list[bytes], list[float]]:
        """The last answer on each connection, and the milliseconds of each request."""
        packet, answers, took = packet_of(CASES["hello"]._replace(path=path)), [b""] * clients, []
        socks = [socket.create_connection(("127.0.0.1", self.port), 10) for _ in answers]
        for number, sock in list(enumerate(socks)) * times:
            answer, sent = b"", time.perf_counter()
            sock.sendall(packet)
            while not answer.endswith(ENDS):
                answer += sock.recv(65536) or b"closed: world!"
            answers[number] = answer.rpartition(b"\n")[2]
            took.append((time.perf_counter() - sent) * 1e3)
        for sock in socks:
            sock.close()
        return answers, took

    def used(self) -> tuple[float, float]:
        """Seconds of CPU time so far, and MiB that are resident (man 5 proc_pid_stat)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        user, system, pages = (int(fields[place]) for place in (11, 12, 21))
        mebibytes = os.sysconf("SC_PAGE_SIZE") / 2**20 * pages
        return (user + system) / os.sysconf("SC_CLK_TCK"), mebibytes

    def measure(self, case: Case, seconds: float) -> Sample:
        """Load it for some seconds, after a moment to warm up."""
        load(self.port, case, 0.2)
        before, _ = self.used()
        by_wrk = WRK and seconds >= 1 and case.fields != UPGRADE
        sample = (load_by_wrk if by_wrk else load)(self.port, case, seconds)
        return sample._replace(micros=(self.used()[0] - before) / sample.requests * 1e6)


def load_by_wrk(port: int, case: Case, seconds: float) -> Sample:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        method, body = "POST" if case.body else "GET", case.body.decode()
        print(WRK_SCRIPT % (method, body), file=script, flush=True)
        command = f"{WRK} -t1 -c{CONNECTIONS} -d{round(seconds)}s -s {script.name}".split()
        command += [f"-H{line}" for line in case.fields.splitlines()]
        command.append(f"http://127.0.0.1:{port}{case.path}")
        output = subprocess.check_output(command, text=True)
    return Sample(*json.loads(output.splitlines()[-1]))


def load(port: int, case: Case, seconds: float) -> Sample:
    """The small client: each connection sends, waits for the answer's end, sends again."""
    times, first = [], packet_of(case)
    packet, ends = (FRAME, (*ENDS, b"\r\n\r\n")) if case.fields == UPGRADE else (first, ENDS)

    class Client(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport, self.tail, self.sent = transport, b"", time.perf_counter()
            transport.write(first)

        def data_received(self, data):
            self.tail = (self.tail + data)[-6:]
            if self.tail.endswith(ends):
                times.append((time.perf_counter() - self.sent) * 1e3)
                self.tail, self.sent = b"", time.perf_counter()
                self.transport.write(packet)

    async def clients():
        connect = asyncio.get_running_loop().create_connection
        made = [await connect(Client, "127.0.0.1", port) for _ in range(CONNECTIONS)]
        await asyncio.sleep(seconds)
        for transport, _ in made:
            transport.abort()

    asyncio.run(clients())
    times = sorted(times) or [0.0]  # there may be no answer on a machine that is too busy
    return Sample(len(times), seconds, times[len(times) * 99 // 100])


class Run:
    """What the command line asked for. The methods without _ print rows of the table."""

    def __init__(self, folder: str, seconds: float, rounds: int) -> None:
        self.folder, self.seconds, self.rounds = folder, seconds, rounds
        print(f"{'':38}" + "".join(f"{n:>10}" for n in SERVERS) + f"{'ratio':>20}   to reach")

    def _row(self, title: str, form: str, figures: dict[str, list[float]], reach: str) -> None:
        """Of each server the median; a ratio if `reach` is "… ×" or "… of uvicorn's"."""
        cells, ratio = [format(statistics.median(each), form) for each in figures.values()], ""
        if len(cells) == 2 and reach.endswith(("×", "of uvicorn's")):
            above, below = reversed(figures.values()) if reach[-1] == "×" else figures.values()
            all_ = [a / b for a, b in zip(above, below, strict=True)]
            ratio = f"{statistics.median(all_):.2f} ({min(all_):.2f}-{max(all_):.2f})"
        print(f"{title:38}" + "".join(f"{cell:>10}" for cell in cells) + f"{ratio:>20}   {reach}")

    @contextlib.contextmanager
    def _servers(self, options: str, cores: list[int] = CORES):
        with contextlib.ExitStack() as stack:
            made = [Server(self.folder, f"{c} {options}", cores) for c in SERVERS.values()]
            yield dict(zip(SERVERS, map(stack.enter_context, made), strict=True))

    def case(self, case: Case) -> None:
        samples = collections.defaultdict(list)
        with self._servers(case.options, CORES[:1]) as servers:
            for _, (name, server) in itertools.product(range(self.rounds), servers.items()):
                samples[name].append(server.measure(case, self.seconds))
        micros = {name: [sample.micros for sample in each] for name, each in samples.items()}
        self._row(f"{case.title}, µs CPU", ".1f", micros, f">= {case.least} ×")
        if case.title == "hello":
            p99 = {name: [sample.p99 for sample in each] for name, each in samples.items()}
            self._row("hello, p99 ms", ".1f", p99, "<= 0.75 of uvicorn's")

    def start(self) -> None:
        """From the command to the first answer. The first start compiles, and is left out."""
        took, memory = collections.defaultdict(list), collections.defaultdict(list)
        for turn, name in itertools.product(range(self.rounds + 1), SERVERS):
            with Server(self.folder, SERVERS[name], CORES[:1]) as server:
                took[name] += [server.milliseconds] * bool(turn)
                memory[name].append(server.used()[1])
        self._row("start to first answer, ms", ".0f", took, "<= 0.85 of uvicorn's")
        self._row("memory after start, MiB", ".1f", memory, "<= 0.95 of uvicorn's")

    def workers(self) -> None:
        """On all cores, which the load needs as well."""
        gain, fuller = collections.defaultdict(list), collections.defaultdict(list)
        hello, two = CASES["hello"], f"{QUIET} --workers 2"
        with self._servers(QUIET) as one, self._servers(two) as two:
            for _, name in itertools.product(range(self.rounds), SERVERS):
                while len(set(two[name].ask("/pid", clients=20)[0])) < 2:
                    pass  # the second worker is not there yet
                first, both = (s[name].measure(hello, self.seconds) for s in (one, two))
                gain[name].append(both.requests / both.seconds / first.requests * first.seconds)
                pids, _ = two[name].ask("/pid", clients=CONNECTIONS)
                fuller[name].append(max(collections.Counter(pids).values()))
        self._row("two workers against one, requests/s", ".2f", gain, ">= 1.5")
        self._row(f"of {CONNECTIONS} connections the fuller has", ".0f", fuller, "<= 48")

    def modes(self) -> None:
        """Where Nagle's algorithm is on, the second write of an answer waits 40 ms."""
        for mode in ("", "--workers 2", "--reload", "--fd 0"):
            with self._servers(f"{QUIET} {mode}") as servers:
                took = {name: s.ask("/stream", times=50)[1] for name, s in servers.items()}
            self._row(f"one client, {mode or 'alone'}, ms", ".2f", took, "the same in each mode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[*CASES, "start", "workers", "modes"])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.sched_setaffinity(0, CORES[-1:])  # wrk inherits it
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bench_app.py").write_text(inspect.getsource(app))
        run = Run(folder, options.seconds, options.rounds)
        for name in options.only:
            run.case(CASES[name]) if name in CASES else getattr(run, name)()


if __name__ == "__main__":
    main()
