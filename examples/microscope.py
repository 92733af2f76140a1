# examples/microscope.py
# Watch requests pass through this server in a browser: client, socket, h11, ASGI, app.
# Spec: WHATWG HTML, "Server-sent events"; RFC 9112; RFC 6455.
#
# Run:   python examples/microscope.py                 (and any options of server.py)
# Try:   open http://localhost:8000, press a button, and step with the arrow keys;
#        curl localhost:8000/hello is drawn as well, and so is what telnet says
# Look:  server.py, chapter 5, converse and next_request
#
# But: the buttons speak plain TCP, so use no TLS. One process is traced, as by trace.py.

import asyncio
import contextlib
import json
import math
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # Python has a module trace, too

import trace  # noqa: E402

import server  # noqa: E402

PAGE = HERE / "microscope.html"
OWN = re.compile(r"Request \w+ /(events|provoke/\w+)?(\?|$)|ConnectionClosed")


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        raise NotImplementedError("lifespan")
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({**message, "type": "websocket.send"})
        return
    match scope["path"]:
        case "/hello":  # the first four are looked at
            await answer(send, b"hello\n")
        case "/echo":
            body, more_body = b"", True
            while more_body:
                message = await receive()
                body += message.get("body", b"")
                more_body = message.get("more_body", False)
            await answer(send, body)
        case "/stream":
            await stream(send, forever())
        case "/error":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise ZeroDivisionError("on purpose")
        case "/":  # the rest looks
            await answer(send, PAGE.read_bytes(), "text/html; charset=utf-8")
        case "/events":
            await events(receive, send)
        case path if (
            scope["method"] == "POST" and path.removeprefix("/provoke/") in TALKS
        ):
            await talk(*scope["server"], TALKS[path.removeprefix("/provoke/")])
            await answer(send)
        case _:
            await answer(send, b"there is nothing here\n", status=404)


async def answer(send, body=b"", kind="text/plain", status=200):
    headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def stream(send, parts, kind=b"text/plain"):
    headers = [(b"content-type", kind), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        async for part in parts:
            body = {"body": part.encode(), "more_body": True}
            await send({"type": "http.response.body", **body})
    except OSError:
        return  # because the client has left
    await send({"type": "http.response.body"})


async def forever():
    while True:
        yield "tick\n"
        await asyncio.sleep(0.25)


async def events(receive, send):
    """The rows as they come, until the page is closed."""
    rows = asyncio.Queue()
    lens = Lens(rows.put_nowait)

    async def look():
        yield ": looking\n\n"
        batch = []
        while None not in batch:
            batch = [await rows.get()]
            await asyncio.sleep(0.1)  # to look disturbs the server: so many at once
            batch += [rows.get_nowait() for _ in range(rows.qsize())]
            yield "".join(f"data: {json.dumps(row)}\n\n" for row in batch if row)

    async def leave():
        while (await receive())["type"] != "http.disconnect":
            pass
        rows.put_nowait(None)

    leaving = asyncio.create_task(leave())
    trace.listeners.append(lens)
    try:
        await stream(send, look(), b"text/event-stream")
    finally:
        trace.listeners.remove(lens)
        leaving.cancel()


class Lens:
    """Passes on the rows of all connections except the page's own: to send those would
    make new ones. It keeps the rows of a connection until its first request is read."""

    def __init__(self, pass_on):
        self.pass_on = pass_on
        self.kept, self.shown = {}, set()  # rows by connection; connections

    def __call__(self, row):
        told = {**row._asdict(), **place(row)}
        if row.connection in self.shown:
            self.pass_on(told)
        elif row.what.startswith("connection_made"):
            self.kept[row.connection] = [told]
        elif row.connection in self.kept:  # else it is the page's own, or older
            self.kept[row.connection].append(told)
            if row.what.startswith("connection_lost"):
                del self.kept[row.connection]  # it has never asked
            elif row.layer == "h11":  # the request, or what is wrong with it
                rows = self.kept.pop(row.connection)
                if not OWN.match(row.what):
                    self.shown.add(row.connection)
                    for kept in rows:
                        self.pass_on(kept)


# Where a row belongs: a function of server.py, and a step of README's walks.

FUNCTIONS = {  # for the messages of an app, and else for the bytes by h11's state
    "http.response.start": "Exchange.handle",
    "http.response.body": "Exchange.send_body",
    "websocket.accept": "WebSocket.accept",
    "websocket.send": "WebSocket.send_message",
    "websocket.close": "WebSocket.start_close",
    "IDLE": "Connection.next_request",
    "SEND_BODY": "Exchange.receive",
    "SWITCHED_PROTOCOL": "WebSocket.talk",
}


def place(row):
    """The name of the function, and the text of the step. This is called from where the
    row was made, so it can see which functions of server.py are running."""
    word, frame, running = row.what.split(" ", 1)[0], sys._getframe(), []
    while frame := frame.f_back:
        if frame.f_code.co_filename == server.__file__ and "self" in frame.f_locals:
            running.append((frame.f_code.co_qualname, frame.f_lineno))
            exchange = frame.f_locals["self"]
    if row.layer == "ASGI":
        receive = type(exchange).receive.__qualname__ if running else "Exchange.receive"
        running = [(FUNCTIONS.get(word, receive), math.inf)]
    elif row.layer == "wire" and row.direction == "->":
        running = [(f"Wire.{word}", math.inf)]
        if word == "data_received" and row.states[1] in FUNCTIONS:
            running.append((FUNCTIONS[row.states[1]], math.inf))
    running = running or [("Connection.tear_down", math.inf)]  # its last act, by call_soon
    for name, line in running:  # from the innermost function that is a step or has some
        if steps := STEPS.get(name):
            so_far = [step for number, step in steps if number <= line]
            return {"function": running[0][0], "step": (so_far or [steps[0][1]])[-1]}
    return {"function": running[0][0], "step": ""}


def find_steps():
    """{function: [(line, step), …]}: where `# walk: 3` stands, and what README says."""
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    steps, texts, kind, name = {}, {}, "", ""
    for mark, title in (("", "Life of a request"), ("ws ", "Life of a WebSocket")):
        walk = readme.partition(f"## {title}")[2].partition("\n## ")[0].replace("`", "")
        for number, said in re.findall(r"(?ms)^(\d+)\. (.*?)(?=^\d+\. |^$|\Z)", walk):
            texts[mark + number] = f"{title}, {number}. {' '.join(said.split())}"
    code = pathlib.Path(server.__file__).read_text(encoding="utf-8")
    for number, line in enumerate(code.splitlines(), 1):
        if found := re.match(r"class (\w+)|    (?:async )?def (\w+)", line):
            kind, name = found[1] or kind, found[2]
        elif (found := re.search(r"# walk: (\S.*)", line)) and found[1] in texts:
            steps.setdefault(f"{kind}.{name}", []).append((number, texts[found[1]]))
    return steps


STEPS = find_steps()

# The buttons. Each is a client: bytes to send, text to wait for, seconds to let pass.

HELLO = b"GET /hello HTTP/1.1\r\nHost: microscope\r\n\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: microscope\r\nExpect: 100-continue\r\n"
UPGRADE = (
    b"GET /chat HTTP/1.1\r\nHost: microscope\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
TEXT, CLOSE = b"\x81\x85\0\0\0\0hello", b"\x88\x82\0\0\0\0\x03\xe8"  # masked: zeros
TALKS = {
    "one": [HELLO, "hello\n"],
    "pipelined": [HELLO * 3, "hello\n", "hello\n", "hello\n"],
    "slow": [POST + b"Content-Length: 13\r\n\r\n", "100 Continue\r\n\r\n", b"one, "]
    + [0.25, b"two, ", 0.25, b"end", "one, two, end"],
    "abandoned": [HELLO.replace(b"hello", b"stream"), "tick", "tick", "tick"],
    "error": [HELLO.replace(b"hello", b"error"), "Error\n"],
    "websocket": [UPGRADE, "\r\n\r\n", TEXT, "hello", CLOSE, "\x88"],
    "bad": [b"GET /hello HTTP/1.1\r\n\r\n", "Request\n"],  # no Host (RFC 9112 §3.2)
}


async def talk(host, port, steps):
    reader, writer = await asyncio.open_connection(host, port)
    with contextlib.closing(writer):
        async with asyncio.timeout(5):
            for step in steps:
                match step:
                    case bytes():
                        writer.write(step)
                    case str():
                        await reader.readuntil(step.encode("latin-1"))
                    case float():
                        await asyncio.sleep(step)


if __name__ == "__main__":
    trace.start_tracing()
    trace.listeners.clear()  # the page shows the rows, and the terminal need not
    sys.exit(server.main(["microscope:app", *sys.argv[1:]]))
