# examples/microscope.py
# Watch requests pass through this server in a browser: client, socket, h11, ASGI, app.
# Spec: ASGI, "Extensions"; WHATWG HTML, "Server-sent events"; RFC 9112, RFC 6455.
#
# Run:   python server.py microscope:app
#        with --trace behind it: without, the page says that there is nothing to see
# Try:   open http://localhost:8000, press a button, and step with the arrow keys;
#        curl localhost:8000/hello is drawn as well, and so is what telnet says
# Look:  server.py, chapter 9, start_trace and Row
#
# But: the buttons speak plain TCP to whoever accepts: use one worker, and no TLS.

import asyncio
import contextlib
import json
import pathlib
import re

PAGE = pathlib.Path(__file__).with_suffix(".html")
UNTRACED = "This server does not trace. Start it again, with --trace."
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
            await events(scope["extensions"].get("foal.trace"), receive, send)
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
        return  # because the client has left, without a word
    await send({"type": "http.response.body"})


async def forever():
    while True:
        yield "tick\n"
        await asyncio.sleep(0.25)


async def events(trace, receive, send):
    """The rows as they come, until the page is closed."""
    rows = asyncio.Queue()
    lens = Lens(rows.put_nowait)

    async def look():
        yield ": looking\n\n" if trace else f"event: off\ndata: {UNTRACED}\n\n"
        batch = [] if trace else [None]
        while None not in batch:
            batch = [await rows.get()]
            await asyncio.sleep(0.1)  # to look disturbs: so later, and many at once
            batch += [rows.get_nowait() for _ in range(rows.qsize())]
            told = [f"data: {json.dumps(row._asdict())}\n\n" for row in batch if row]
            yield "".join(told)

    async def leave():
        while (await receive())["type"] != "http.disconnect":
            pass
        rows.put_nowait(None)

    leaving = asyncio.create_task(leave())
    listeners = trace["listeners"] if trace else []
    listeners.append(lens)
    try:
        await stream(send, look(), b"text/event-stream")
    finally:
        listeners.remove(lens)
        leaving.cancel()


class Lens:
    """Passes on the rows of all connections but the page's own: each of these that it
    sent would make more of them. It keeps those of a connection that has yet to ask."""

    def __init__(self, pass_on):
        self.pass_on = pass_on
        self.kept, self.shown = {}, set()  # rows by connection; connections

    def __call__(self, row):
        if row.connection in self.shown:
            self.pass_on(row)
        elif row.what.startswith("connection_made"):
            self.kept[row.connection] = [row]
        elif row.connection in self.kept:  # else the page's own, or older than the page
            self.kept[row.connection].append(row)
            if row.layer == "h11":  # the request, or what is wrong with it
                rows = self.kept.pop(row.connection)
                if not OWN.match(row.what):
                    self.shown.add(row.connection)
                    for kept in rows:
                        self.pass_on(kept)


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
