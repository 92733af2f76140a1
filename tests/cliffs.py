"""Where does it break? Crowds and rude clients, with a normal client beside them.

    python tests/cliffs.py                    everything, some three minutes
    python tests/cliffs.py --scale 0.1        a tenth of each crowd and of each gigabyte
    python tests/cliffs.py --only upload      one situation
    python tests/cliffs.py --foal ../before   the same for another foal

Each situation has a fresh `python server.py`, and a bystander in a process of its own:
a hundred times a second it asks for "hello", in turn on a connection that it keeps and
on a new one. The table shows the server's memory before, at its peak and after; the CPU
time that it took; and what the bystander had to wait. The bounds stand beside each
situation below. Exit code 1: one is broken.

How to read it. The server has one core, all clients the other, if the system lets us
choose. A bystander whose p99 is bad is told first what it waits alone ("nobody").
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmark import (
    CASES,
    CORES,
    Load,
    Run,
    Running,
    ask,
    encode_text_frame,
    show,
)

MIB = 2**20
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
FOAL = "{foal}/server.py cliff_app:app --app-dir . --port {port} --no-access-log"
PATIENT = "--timeout-keep-alive 600 --timeout-request-head 600 --ws-ping-interval 0"


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        raise NotImplementedError
    path, kind = scope["path"], scope["type"]
    if kind == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        if path == "/deaf":
            await __import__("asyncio").sleep(600)
        while (message := await receive())["type"] == "websocket.receive":
            await send({**message, "type": "websocket.send"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    part = {"type": "http.response.body", "more_body": True}
    if path == "/echo":
        more = True
        while more:
            message = await receive()
            more = message.get("more_body", False)
            await send({**part, "body": message.get("body", b"")})
    elif path.startswith("/download/"):
        for _ in range(int(path.rpartition("/")[2]) * 16):
            await send({**part, "body": bytes(65536)})
    elif path == "/count":
        more, count = True, 0
        while more:
            message = await receive()
            more = message.get("more_body", False)
            count += len(message.get("body", b""))
        await send({**part, "body": str(count).encode()})
    await send({"type": "http.response.body", "body": b"hello"})


# The bystander.


def stand_by(port: int) -> None:
    """Ask until standard input ends; print what it took."""
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set())).start()
    kept, new = [], []
    sock = connect(port)
    while not over.wait(0.01):
        kept.append(seconds_of(lambda: ask(sock, GET)))
        new.append(seconds_of(lambda: ask(connect(port), GET)))
    print(json.dumps([kept, new]))


def seconds_of(act: Callable[[], None]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def connect(port: int, receive_buffer: int = 0) -> socket.socket:
    sock = socket.socket()
    if receive_buffer:  # to be set before it connects: man 7 tcp
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(120)
    sock.connect(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


@contextlib.contextmanager
def bystander(port: int) -> Iterator[list[list[float]]]:
    """Let it ask during the block; its waits are in the list when the block is over."""
    command = [sys.executable, __file__, "--bystander", str(port)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    waits: list[list[float]] = []
    try:
        time.sleep(0.3)  # it starts
        yield waits
        output, _ = process.communicate(timeout=120)
        waits += json.loads(output)
    finally:
        process.kill()
        process.wait()


# The situations. Each takes the port and how much of it there shall be (1.0: all), and
# returns how many connections it was, to say what one costs, and a remark.


@dataclasses.dataclass
class Situation:
    title: str
    act: Callable[[int, float], tuple[int, str]]
    memory: float  # bound: MiB above what the server took before, whatever the scale
    late: float = 100.0  # bound: ms, p99 of the bystander, kept and new
    cpu: float = 60.0  # bound: seconds


SITUATIONS: dict[str, Situation] = {}


def situation(title: str, **bounds: float) -> Callable:
    def note(act: Callable[[int, float], tuple[int, str]]) -> Callable:
        name = act.__name__.replace("_", "-")
        SITUATIONS[name] = Situation(title, act, **bounds)
        return act

    return note


@situation("nobody else, for three seconds", memory=2)
def nobody(port: int, scale: float) -> tuple[int, str]:
    time.sleep(3 * scale)
    return 0, ""


@situation("5,000 idle keep-alive connections", memory=5000 * 16 / 1024)
def idle(port: int, scale: float) -> tuple[int, str]:
    with contextlib.ExitStack() as stack:
        for _ in range(int(5000 * scale)):
            ask(stack.enter_context(connect(port)), GET)
        time.sleep(3)
    return int(5000 * scale), ""


# A new bystander stands in the same queue as the thousand: it waits until all before it
# are accepted and answered, some 0.4 ms each. The kept one does not.
@situation("64 busy connections, and 1,000 new ones at once", memory=20, late=500)
def storm(port: int, scale: float) -> tuple[int, str]:
    async def visit() -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        await reader.readuntil(b"hello")
        writer.close()
        return time.perf_counter()

    async def crowd() -> list[float]:
        busy = asyncio.create_task(Load(port, CASES["hello"]).run(10, math.inf))
        await asyncio.sleep(1)
        started = time.perf_counter()
        visits = [visit() for _ in range(int(1000 * scale))]
        ends = sorted(await asyncio.gather(*visits))
        busy.cancel()
        return [end - started for end in ends]

    times = asyncio.run(crowd())
    middle = times[len(times) // 2]
    return 0, f"half answered after {middle:.2f} s, all after {times[-1]:.2f} s"


# In the first second each of a thousand fills what the kernel holds for it, 128 KiB, and
# who is new waits for a turn behind them all.
@situation("1,000 slow readers of 10 MiB each", memory=1000 * 256 / 1024, late=1000)
def slow_readers(port: int, scale: float) -> tuple[int, str]:
    count = int(1000 * scale)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(port, 4096)) for _ in range(count)]
        for sock in socks:
            sock.sendall(request("GET", "/download/10"))
        for _ in range(20):
            for sock in socks:
                sock.recv(1024)
            time.sleep(0.1)
    return count, ""


@situation("8 clients that send 200 requests in one packet", memory=10)
def pipelined(port: int, scale: float) -> tuple[int, str]:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(port)) for _ in range(8)]
        rounds = max(1, int(20 * scale))
        started = time.perf_counter()
        for _ in range(rounds):
            for sock in socks:
                sock.sendall(GET * 200)
            for sock in socks:
                count = 0
                while count < 200:
                    count += sock.recv(65536).count(b"hello")
    rate = rounds * 8 * 200 / (time.perf_counter() - started)
    return 0, f"{rate:,.0f} requests/s"


# A hundred who take all they get leave the bystander a hundredth.
@situation("100 clients that send requests and read nothing", memory=60, late=500)
def deaf_pipeline(port: int, scale: float) -> tuple[int, str]:
    count = int(100 * scale)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(port, 4096)) for _ in range(count)]
        for sock in socks:
            sock.setblocking(False)
        until = time.perf_counter() + 5
        while time.perf_counter() < until:
            for sock in socks:
                with contextlib.suppress(BlockingIOError):
                    sock.send(GET * 1000)
            time.sleep(0.01)
    return count, ""


# A byte is a system call and a turn of the loop, some 30 µs; the head is none.
@situation("a head of 64 KiB, byte by byte", memory=2, cpu=4)
def drip(port: int, scale: float) -> tuple[int, str]:
    size = int(64_000 * scale)
    with connect(port) as sock:
        sock.sendall(GET[:-2] + b"X: ")
        started = time.perf_counter()
        for n in range(size):
            while time.perf_counter() < started + n * 1e-4:
                pass
            sock.send(b"x")
        ask(sock, b"\r\n\r\n")
    return 0, f"{size:,} bytes in {time.perf_counter() - started:.1f} s"


def exchange(sock: socket.socket, parts: Iterable[bytes], end: bytes) -> str:
    """Send these parts, and read beside it until `end`; return how fast it went."""
    started, sent = time.perf_counter(), 0

    def send() -> None:
        nonlocal sent
        with contextlib.suppress(OSError):  # the reader tells what is wrong
            for part in parts:
                sock.sendall(part)
                sent += len(part)

    thread = threading.Thread(target=send)
    thread.start()
    tail, got = b"", 0
    while not tail.endswith(end):
        data = sock.recv(2**18)
        assert data, f"closed after {got} bytes; {tail!r}"
        got += len(data)
        tail = (tail + data)[-100:]
    thread.join()
    took = time.perf_counter() - started
    return f"{sent / MIB:,.0f} MiB in {took:.1f} s, {sent / MIB / took:,.0f} MiB/s"


def request(method: str, path: str, *fields: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *fields, "", ""]
    return "\r\n".join(lines).encode()


@situation("1 GiB sent and echoed in chunks", memory=4)
def upload(port: int, scale: float) -> tuple[int, str]:
    pieces = int(16384 * scale)
    head = request("POST", "/echo", f"Content-Length: {pieces * 65536}")
    with connect(port) as sock:
        parts = itertools.chain([head], itertools.repeat(bytes(65536), pieces))
        return 0, exchange(sock, parts, b"hello\r\n0\r\n\r\n")


@situation("1 GiB to a client that takes 100 MiB a second", memory=2)
def download(port: int, scale: float) -> tuple[int, str]:
    mib = int(1024 * scale)
    with connect(port, 2**16) as sock:
        sock.sendall(request("GET", f"/download/{mib}"))
        started, got = time.perf_counter(), 0
        while got < mib * MIB:
            got += len(sock.recv(2**18))
            time.sleep(max(0, got / MIB / 100 - (time.perf_counter() - started)))
    return 0, f"{time.perf_counter() - started:.1f} s"


@situation("chunks of one byte, 500,000 of them", memory=10)
def tiny_chunks(port: int, scale: float) -> tuple[int, str]:
    head = request("POST", "/count", "Transfer-Encoding: chunked")
    parts = [head, *[b"1\r\nx\r\n" * 10_000] * int(50 * scale), b"0\r\n\r\n"]
    with connect(port) as sock:
        return 0, exchange(sock, parts, b"0\r\n\r\n")


def open_websocket(port: int, path: str = "/", deflate: bool = False) -> socket.socket:
    key = base64.b64encode(bytes(16)).decode()
    fields = ["Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Key: {key}"]
    fields.append("Sec-WebSocket-Version: 13")
    if deflate:
        fields.append("Sec-WebSocket-Extensions: permessage-deflate")
    sock = connect(port)
    sock.sendall(request("GET", path, *fields))
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += sock.recv(1)
    assert answer.startswith(b"HTTP/1.1 101"), answer
    return sock


@situation("a WebSocket message of 16 MiB, echoed ten times", memory=7 * 16, late=500)
def ws_large(port: int, scale: float) -> tuple[int, str]:
    frame = encode_text_frame(b"x" * int(16 * MIB * scale))
    pieces = [frame[n : n + 65536] for n in range(0, len(frame), 65536)]
    remarks = []
    with open_websocket(port) as sock:
        for _ in range(10):
            left = len(frame) - 4  # the echo has no mask
            thread = threading.Thread(target=lambda: [*map(sock.sendall, pieces)])
            started = time.perf_counter()
            thread.start()
            while left:
                left -= len(sock.recv(2**18))
            thread.join()
            remarks.append(time.perf_counter() - started)
    return 0, f"{min(remarks) * 1e3:.0f} to {max(remarks) * 1e3:.0f} ms each"


@situation("500,000 WebSocket messages of no bytes, echoed", memory=10)
def ws_tiny(port: int, scale: float) -> tuple[int, str]:
    parts = [*[encode_text_frame(b"") * 10_000] * int(50 * scale)]
    with open_websocket(port) as sock:
        return 0, exchange(sock, [*parts, encode_text_frame(b"the end")], b"the end")


@situation("100 WebSockets that send to an app that does not listen", memory=100 * 0.6)
def ws_deaf(port: int, scale: float) -> tuple[int, str]:
    count, packet = int(100 * scale), encode_text_frame(b"") * 10_000
    with contextlib.ExitStack() as stack:
        socks = [
            stack.enter_context(open_websocket(port, "/deaf")) for _ in range(count)
        ]
        for sock in socks:
            sock.setblocking(False)
        until = time.perf_counter() + 3
        while time.perf_counter() < until:
            for sock in socks:
                with contextlib.suppress(BlockingIOError):
                    sock.send(packet)
            time.sleep(0.01)
    return count, ""


def idle_websockets(port: int, scale: float, message: bytes) -> tuple[int, str]:
    count = int(1000 * scale)
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            sock = open_websocket(port, deflate=bool(message))
            stack.enter_context(sock)
            if message:
                sock.sendall(message)
                sock.recv(1000)
        time.sleep(2)
    return count, ""


@situation("1,000 idle WebSockets", memory=1000 * 20 / 1024)
def ws_idle(port: int, scale: float) -> tuple[int, str]:
    return idle_websockets(port, scale, b"")


@situation("1,000 idle WebSockets that compress", memory=1000 * 350 / 1024)
def ws_deflate(port: int, scale: float) -> tuple[int, str]:
    content = zlib.compressobj(wbits=-15)
    deflated = content.compress(b"hello " * 100) + content.flush(zlib.Z_SYNC_FLUSH)
    frame = encode_text_frame(deflated[:-4])
    return idle_websockets(port, scale, bytes([frame[0] | 0x40]) + frame[1:])


# The table.


def peak_memory(server: Running) -> float:
    """MiB; where there is no /proc, only what it is now."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(text.partition("VmHWM:")[2].split()[0]) / 1024
    return server.used()[1]


def face(run: Run, name: str, scale: float) -> tuple[list[str], list[str]]:
    """Let a fresh server go through it: the row of the table, and what is broken."""
    case = SITUATIONS[name]
    server = Running(f"{FOAL} {PATIENT}", run, "foal-other" if run.other else "foal")
    broken = []
    try:
        for _ in range(3):
            server.ask("/")
        cpu, before = server.used()
        count, remark = 0, ""
        with bystander(server.port) as waits:
            try:
                count, remark = case.act(server.port, scale)
            except (OSError, AssertionError) as exc:
                broken.append(f"{name}: {exc!r}")
        time.sleep(0.5)
        after = server.used()
    finally:
        peak = peak_memory(server)
        server.stop()
    if count:
        each = (peak - before) / count * 1024
        remark = f"{each:.1f} KiB each{'; ' if remark else ''}{remark}"
    rises, used = peak - before, after[0] - cpu
    ms = [sorted(1e3 * wait for wait in kind) or [math.nan] for kind in waits]
    p99 = [kind[len(kind) * 99 // 100] for kind in ms]
    found = {"memory": rises, "late": max(p99), "cpu": used}
    broken += [
        f"{name}: {what} {value:.1f} > {getattr(case, what):g}"
        for what, value in found.items()
        if not value <= getattr(case, what)
    ]
    row = [f"{name}: {case.title}", f"{before:.1f}", f"{peak:.1f}", f"{after[1]:.1f}"]
    row += [f"{used:.1f}", f"{ms[0][len(ms[0]) // 2]:.1f}"]
    return [*row, *(f"{p:.1f}" for p in p99), f"{ms[1][-1]:.0f}", remark], broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = ",".join(SITUATIONS)
    parser.add_argument("--only", default=names, help="default: %(default)s")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--foal", metavar="PATH", help="another foal, not this one")
    parser.add_argument("--bystander", metavar="PORT", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bystander:
        stand_by(options.bystander)
        return 0
    with contextlib.suppress(ImportError):  # Windows has no such limit
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    rows, broken = [], []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cliff_app.py").write_text(inspect.getsource(app))
        other = os.path.abspath(options.foal) if options.foal else ""
        run = Run(Path(folder), other, 0, 0)
        if CORES:
            os.sched_setaffinity(0, CORES[-1:])
        for name in options.only.split(","):
            print(f"{name} …", file=sys.stderr, flush=True)
            row, faults = face(run, name, options.scale)
            rows.append(row)
            broken += faults
    heads = ["", "MiB", "peak", "after", "CPU s", "p50 ms", "p99", "p99 new", "max", ""]
    show("cliffs: the server's memory and time; a bystander's waits", heads, rows)
    print("\n" + ("\n".join(broken) or "all within their bounds"))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
