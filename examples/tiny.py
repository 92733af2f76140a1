# examples/tiny.py
# The smallest honest ASGI server. Chapters 5 and 7 of server.py use the same names.
# Spec: ASGI www, "HTTP"; RFC 9112 §9.3; h11 docs, "API documentation".
# Run:   python examples/tiny.py example:app           (and a port, if 8000 is taken)
# Try:   curl -i localhost:8000
# Look:  server.py, chapter 5, converse and next_request and respond and refuse

import asyncio
import pkgutil
import sys
import traceback
from contextlib import suppress
from urllib.parse import unquote

import h11


class Connection:
    def __init__(self, app, reader, writer):
        self.app, self.reader, self.writer = app, reader, writer
        self.conn = h11.Connection(h11.SERVER)  # its two states say what is legal next

    async def converse(self):
        """The life of a connection: one request after the other."""
        try:
            while request := await self.next_request():
                await self.respond(request)
        except (h11.RemoteProtocolError, OSError, asyncio.CancelledError) as exc:
            self.refuse(getattr(exc, "error_status_hint", 400))
        self.writer.close()  # here it is all of tear_down

    async def next_request(self):
        """Wait for the next request; None if no more can come."""
        if self.conn.our_state is h11.DONE:
            while self.conn.their_state is h11.SEND_BODY:
                await self.next_event()  # the app did not ask for all of the body
            self.conn.start_next_cycle()  # both sides are done: the connection persists
        event = await self.next_event() if self.conn.our_state is h11.IDLE else None
        return event if type(event) is h11.Request else None

    async def next_event(self):
        """What the client says next. Only this takes bytes from the reader."""
        while (event := self.conn.next_event()) is h11.NEED_DATA:
            if self.conn.they_are_waiting_for_100_continue:
                ready = h11.InformationalResponse(status_code=100, headers=[])
                self.writer.write(self.conn.send(ready))
            self.conn.receive_data(await self.reader.read(65536))
        return event

    async def respond(self, request):
        """Let the app answer. If it has not begun to when it ends: 500."""
        self.response, self.no_content = None, request.method == b"HEAD"
        try:
            await self.app(scope_of(request), self.receive, self.send)
        except Exception:  # the app is foreign code
            if not self.writer.is_closing():  # if it is, the client has left
                traceback.print_exc()
        self.refuse(400 if self.conn.their_state is h11.ERROR else 500)

    def refuse(self, status):
        """Answer with an error, if h11 says that there is no answer yet."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            fields = [("Connection", "close"), ("Content-Length", "0")]
            head = self.conn.send(h11.Response(status_code=status, headers=fields))
            self.writer.write(head + self.conn.send(h11.EndOfMessage()))

    async def receive(self):
        """The client's next event as a message; http.disconnect if it has left."""
        event = None
        with suppress(h11.RemoteProtocolError, OSError):
            if self.conn.our_state in (h11.SEND_RESPONSE, h11.SEND_BODY):
                event = await self.next_event()
        if type(event) not in (h11.Data, h11.EndOfMessage):
            return {"type": "http.disconnect"}
        body, more_body = getattr(event, "data", b""), type(event) is h11.Data
        return {"type": "http.request", "body": bytes(body), "more_body": more_body}

    async def send(self, message):
        """A message is an event or two. This waits while the client reads slowly."""
        kind, body = message["type"], message.get("body", b"")
        if kind == "http.response.start":
            status, fields = message["status"], message.get("headers", ())
            self.response = h11.Response(status_code=status, headers=fields)
        elif kind == "http.response.body" and self.response:
            events = [self.response] if self.conn.our_state is h11.SEND_RESPONSE else []
            events += [h11.Data(data=body)] if body and not self.no_content else []
            events += [] if message.get("more_body") else [h11.EndOfMessage()]
            self.writer.write(b"".join(map(self.conn.send, events)))
            await self.writer.drain()
        else:
            raise RuntimeError(f"unexpected message {kind!r}")


def scope_of(request):
    path, _, query_string = request.target.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": request.http_version.decode(),
        "method": request.method.decode(),
        "path": unquote(path.decode()),
        "query_string": query_string,
        "headers": list(request.headers),
    }


async def serve(name, port=8000):
    sys.path.insert(0, "")  # the current folder, before examples/
    app = pkgutil.resolve_name(name)
    connect = lambda *streams: Connection(app, *streams).converse()  # noqa: E731
    listener = await asyncio.start_server(connect, "127.0.0.1", port)
    print("listening on http://%s:%d" % listener.sockets[0].getsockname(), flush=True)
    await asyncio.Event().wait()


with suppress(KeyboardInterrupt):
    asyncio.run(serve(*sys.argv[1:]))

# What it leaves out, in the order in which to read on:
#  1. Event loops, reload, IPv6, Unix sockets, TLS: loops.py, reload.py, sockets.py.
#  2. A stop that finishes requests: chapter 3. Lifespan: 4. Deadlines, one write in each
#     turn, a close in stages (tear_down): 5. Strict checks, for h11 is lenient: 6.
#  3. Messages of the app checked before they are sent, the access log: chapter 7.
#  4. Processes: workers.py. Options: chapter 1. WebSocket: chapters 8 and 9.
