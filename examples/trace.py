# examples/trace.py
# Prints what passes between the layers of the server. Nothing in server.py knows of it.
# Spec: h11 docs, "API documentation"; ASGI main, "Middleware"; Python, "Protocols".
#
# Run:   python examples/trace.py example:app          (and any options of server.py)
# Try:   curl localhost:8000
# Look:  server.py, chapter 3, start_accepting; chapter 5, Wire and Connection
#
# A row begins with 1.2 for the second request of connection 1, and with microseconds
# since that was accepted. -> is towards the app, <- towards the client. A row of h11
# ends with its two states, ours and the client's. No other layer changes them.
# But: under TLS the wire is what TLS carries. Only one process is traced: a worker
# would be a new Python without our classes. Printing takes time, too.

import collections
import contextlib
import itertools
import pathlib
import re
import sys
import time

import h11

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
import server  # noqa: E402

LONGEST, WIDTH = 2000, 64  # characters of a row; of these in the printed table
TO_APP = ("data_received", "eof_received", "connection_lost")  # calls of a protocol
TO_APP += ("pause_writing", "resume_writing")
TO_CLIENT = ("write", "write_eof", "close", "abort", "pause_reading", "resume_reading")


def start_tracing():
    """Put objects of ours between the parts of foal. When server.py makes a wire or a
    connection, it looks up the name of the class in its module: so we give these names
    another meaning before it serves. The app is wrapped as any middleware does it."""
    wire, load_app = server.Wire, server.load_app
    server.Wire = lambda running: Between(wire(running), Trace())
    server.Connection = TracedConnection
    server.load_app = lambda config: traced(load_app(config))


COLUMNS = "connection request first microseconds layer direction what states"
Row = collections.namedtuple("Row", COLUMNS)


def print_row(row):
    if row.first:
        title = f"-- connection {row.connection}, request {row.request} "
        print(f"{title:-<94}  our state, their state", file=sys.stderr)
    what = row.what if len(row.what) <= WIDTH else row.what[: WIDTH - 3] + "..."
    line = f"{row.connection}.{row.request:<4}{row.microseconds:>12,}  {row.layer:<4}"
    line += f"  {row.direction}  {what:<{WIDTH}}  "
    line += ", ".join(row.states) if row.layer == "h11" else ""
    print(line.rstrip(), file=sys.stderr)


listeners = [print_row]  # called with each row


class Trace:
    """Makes the rows of one connection."""

    numbers = itertools.count(1)

    def __init__(self):
        self.number = next(Trace.numbers)
        self.accepted = time.perf_counter()
        self.latest = 0  # request that has a row

    def request(self):
        """The number of its request; while it waits for one, of that."""
        return self.connection.requests_seen + (not self.connection.head)

    def record(self, layer, direction, what, request=None):
        request = request or self.request()
        first, self.latest = request > self.latest, max(request, self.latest)
        micros = int((time.perf_counter() - self.accepted) * 1e6)
        what = re.sub(r"[^ -~]", lambda found: ascii(found[0])[1:-1], what[:LONGEST])
        conn = self.connection.conn
        states = str(conn.our_state), str(conn.their_state)
        row = Row(self.number, request, first, micros, layer, direction, what, states)
        for listener in list(listeners):
            listener(row)

    @contextlib.contextmanager
    def raising(self, layer, direction, request=None):
        try:
            yield
        except BaseException as exc:  # it is a row, and goes on
            self.record(layer, direction, f"raises {exc!r}", request)
            raise


def shown(value):
    """Bytes, an event of h11, a message of ASGI or anything else, in one line."""
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
        case {"type": kind, **rest}:
            return " ".join([kind, *(f"{key}={rest[key]!r}" for key in rest)])
    return repr(value)


class Between:
    """The wire is traced by composition: asyncio calls this and not the protocol, the
    protocol calls another one and not the transport, and both pass each call on."""

    def __init__(self, behind, trace):
        self.behind, self.trace = behind, trace

    def connection_made(self, transport):
        self.behind.connection_made(Between(transport, self.trace))
        peer = self.behind.connection.peer
        self.trace.record("wire", "->", f"connection_made by {peer}")

    def __getattr__(self, name):  # Python asks for what the class itself does not have
        method = getattr(self.behind, name)
        if name not in TO_APP + TO_CLIENT:
            return method

        def call(*values):
            direction = "->" if name in TO_APP else "<-"
            self.trace.record("wire", direction, " ".join([name, *map(shown, values)]))
            return method(*values)

        return call


class TracedConnection(server.Connection):
    """h11 is traced by inheritance: a connection whose h11 is a subclass."""

    def __init__(self, running, wire):
        super().__init__(running, wire)
        self.conn = TracedH11(h11.SERVER, server.HEAD_LIMIT)
        self.conn.trace = self.trace = wire.transport.trace
        self.trace.connection = self


class TracedH11(h11.Connection):
    def next_event(self):
        with self.trace.raising("h11", "->"):
            event = super().next_event()
        if event is not h11.NEED_DATA:
            self.trace.record("h11", "->", shown(event))
        return event

    def send(self, event):
        with self.trace.raising("h11", "<-"):
            data = super().send(event)
        self.trace.record("h11", "<-", shown(event))
        return data

    def start_next_cycle(self):
        super().start_next_cycle()
        self.trace.record("h11", "--", "start_next_cycle")


def traced(app):
    """ASGI and the app are traced by a middleware: an app around an app."""

    async def traced_app(scope, receive, send):
        if scope["type"] == "lifespan":
            return await app(scope, receive, send)
        trace = receive.__self__.connection.trace  # receive is a method of an Exchange
        request = trace.request()  # the app may go on when the next one has begun

        async def traced_receive():
            trace.record("ASGI", "<-", "receive()", request)
            message = await receive()
            trace.record("ASGI", "->", shown(message), request)
            return message

        async def traced_send(message):
            trace.record("ASGI", "<-", shown(message), request)
            with trace.raising("ASGI", "->", request):
                await send(message)

        trace.record("app", "->", f"called: {scope['type']} {scope['path']}", request)
        with trace.raising("app", "<-", request):
            await app(scope, traced_receive, traced_send)
        trace.record("app", "<-", "returns", request)

    return traced_app


if __name__ == "__main__":
    if re.search(r" --(workers|reload)\b", " ".join(sys.argv)):
        sys.exit("trace.py traces one process: leave out --workers and --reload")
    start_tracing()
    sys.exit(server.main())
