"""Chapter 9: --trace, and five conversations as it shows them.

The files in traces/ are such tables, with a reason beside what a specification decides;
they read as an introduction, too. Only times and port numbers are masked, and the Date
field is given. The order of everything else is fixed, because each client waits for what
it says that it waits for: until its bytes are here the server has finished the turn of
its loop that wrote them.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import threading
import time

import pytest
from conftest import GET, PATIENCE, ROOT, Client, Process, serving

import server

MASKED = {"header": ["date: today"], "server_header": False, "ws_ping_interval": 0.0}
POST = b"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n"
UPGRADE = (
    b"GET /chat HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
MASK = b"\x00\x00\x00\x00"


async def echo(scope, receive, send):
    """Answers with the body that it was sent, or its path; speaks WebSocket, too."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})
    elif scope["type"] == "http":
        body = scope["path"].encode()
        if scope["method"] == "POST":
            body = (await receive())["body"]
        length = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": body})
    else:
        raise NotImplementedError(scope["type"])


async def patient(scope, receive, send):
    """Sends half of its answer, and the other half once its client says no more."""
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    assert (await receive())["type"] == "http.request"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"one, ", "more_body": True})
    assert (await receive())["type"] == "http.disconnect"
    await send({"type": "http.response.body", "body": b"two"})


async def failing(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    raise KeyError("oops")


def pipelining(client: Client) -> None:
    client.send(GET.replace(b"/", b"/one", 1) + GET.replace(b"/", b"/two", 1))
    assert client.response()[2] + client.response()[2] == b"/one/two"
    client.half_close()
    assert client.read_all() == b""


def expect_100_continue(client: Client) -> None:
    client.send(POST + b"Expect: 100-continue\r\n\r\n")
    client.read_until(b"100 Continue\r\n\r\n")
    client.send(b"hello")
    assert client.response()[2] == b"hello"
    client.half_close()
    assert client.read_all() == b""


def half_closed(client: Client) -> None:
    client.send(GET)
    client.read_until(b"one, \r\n")  # from here on the app waits in receive
    client.half_close()
    assert client.read_all() == b"3\r\ntwo\r\n0\r\n\r\n"


def app_error(client: Client) -> None:
    client.send(GET)
    assert client.read_all().startswith(b"HTTP/1.1 500 ")
    client.half_close()


def websocket(client: Client) -> None:
    client.send(UPGRADE)
    client.read_until(b"\r\n\r\n")
    client.send(b"\x81\x85" + MASK + b"hello")
    assert client.read_until(b"hello") == b"\x81\x05hello"
    client.send(b"\x88\x82" + MASK + b"\x03\xe8")
    assert client.read_all() == b"\x88\x02\x03\xe8"
    client.half_close()


CONVERSATIONS = [
    (pipelining, echo),
    (expect_100_continue, echo),
    (half_closed, patient),
    (app_error, failing),
    (websocket, echo),
]


def trace_of(app, conversation, capsys, **options) -> list[str]:
    """The table that --trace prints of a conversation, masked."""
    with serving(app, trace=True, **MASKED, **options) as running:
        with running.connect() as client:
            conversation(client)
    table = re.sub(r"(?m)^(\d+\.\d+ +)[\d,]+  ", r"\g<1>#  ", capsys.readouterr().err)
    return re.sub(r"127.0.0.1:\d+", "127.0.0.1:#", re.sub(r" +#", "  #", table)).splitlines()


@pytest.mark.parametrize(
    "conversation, app", CONVERSATIONS, ids=[talk.__name__ for talk, _ in CONVERSATIONS]
)
def test_a_conversation_is_shown_in_order(conversation, app, capsys):
    """What a reader has checked against the specifications, and written down."""
    file = ROOT / "tests" / "traces" / f"{conversation.__name__}.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    expected = [line for line in lines if line and not line.startswith("#")]
    assert trace_of(app, conversation, capsys) == expected


class Rows(list):
    """A listener that keeps the rows, and can be waited for."""

    def __init__(self):
        super().__init__()
        self.arrived = threading.Condition()

    def __call__(self, row):
        with self.arrived:
            self.append(row)
            self.arrived.notify_all()

    def wait_for(self, what: str):
        """The first row, so far or to come, that begins so."""

        def found():
            return next((row for row in self if row.what.startswith(what)), None)

        with self.arrived:
            assert self.arrived.wait_for(found, PATIENCE), (what, list(self))
            return found()


def listening(listener, app=echo):
    """An app that lets `listener` hear the rows, from its first request on."""

    waiting = [listener]

    async def listened(scope, receive, send):
        if scope["type"] != "lifespan" and waiting:
            scope["extensions"]["foal.trace"]["listeners"].append(waiting.pop())
        await app(scope, receive, send)

    return listened


class TestARow:
    def test_time_runs_from_the_accept_of_its_connection_on(self):
        rows, told = Rows(), []

        def clock(row):
            told.append((row.connection, row.microseconds, time.perf_counter()))

        with serving(listening(rows, listening(clock)), trace=True) as running:
            with running.connect() as client:
                client.send(GET)
                client.response()
                rows.wait_for("returns")
            connecting = time.perf_counter()
            with running.connect() as client:
                client.send(GET)
                client.response()
        second = [(micros, at) for connection, micros, at in told if connection == 2]
        times = [micros for micros, _ in second]
        assert times == sorted(times) and times[0] < times[-1]
        assert all(micros <= 1e6 * (at - connecting) for micros, at in second)

    def test_the_first_of_a_request_says_so(self):
        rows = Rows()
        with serving(listening(rows), trace=True) as running, running.connect() as client:
            client.send(GET * 3)
            assert [client.response()[0] for _ in range(3)] == [200, 200, 200]
            rows.wait_for("start_next_cycle")
        assert [row.request for row in rows if row.first] == [2, 3, 4]

    def test_it_is_one_line_of_printable_ascii_whatever_passes(self):
        rows = Rows()
        with serving(listening(rows), trace=True) as running, running.connect() as client:
            client.send(UPGRADE)
            client.read_until(b"\r\n\r\n")
            text = "é\n\x1b[31m".encode() * 1000
            client.send(b"\x81\xfe" + len(text).to_bytes(2, "big") + MASK + text)
            client.read_until(text[-9:])
        assert all(re.fullmatch(r"[ -~]{1,2000}", row.what) for row in rows)
        said = rows.wait_for("websocket.receive").what
        assert said.startswith(r"websocket.receive text='\xe9\n\x1b[31m\xe9")
        assert said.endswith("...")

    def test_a_message_that_cannot_be_shown_is_still_the_servers_to_judge(self):
        """What if even repr of what the app sends raises?"""

        class Strange(dict):
            def __repr__(self):
                raise ValueError

            items = keys = __iter__ = __repr__

        seen, rows = [], Rows()

        async def app(scope, receive, send):
            try:
                await send(Strange(type="http.strange"))
            except RuntimeError as exc:
                seen.append(str(exc))
            await echo(scope, receive, send)

        with serving(listening(rows, app), trace=True, lifespan="off") as running:
            with running.connect() as client:
                client.send(GET)
                assert client.response()[0] == 200
        assert seen == ["unexpected message 'http.strange' in EXPECTING_START"]
        assert rows.wait_for("a Strange").direction == "<-"
        assert rows.wait_for("raises RuntimeError").layer == "ASGI"


class TestListeners:
    """scope["extensions"]["foal.trace"]["listeners"] is the app's to add to."""

    def test_one_that_fails_is_asked_no_more(self, log):
        calls = []

        def broken(row):
            calls.append(row)
            raise ValueError("not today")

        rows = Rows()
        with serving(listening(rows, listening(broken)), trace=True) as running:
            with running.connect() as client:
                client.send(GET * 2)
                assert [client.response()[0] for _ in range(2)] == [200, 200]
        assert len(calls) == 1
        assert len(rows) > 20
        assert [r.message for r in log.records if "no more rows" in r.message] == [
            f"no more rows for {broken!r}: ValueError('not today')"
        ]

    def test_one_may_go_while_it_is_told(self):
        rows, listeners = Rows(), []

        async def app(scope, receive, send):
            listeners.append(scope["extensions"]["foal.trace"]["listeners"])
            listeners[0] += [once, rows]
            await echo(scope, receive, send)

        def once(row):
            listeners[0].remove(once)

        with serving(app, trace=True, lifespan="off") as running:
            with running.connect() as client:
                client.send(GET)
                assert client.response()[0] == 200
        assert once not in listeners[0] and rows[0].what.startswith("http.response.start")


class TestFlowControl:
    """Back-pressure is seen on the wire, where the reason for a wait is."""

    def test_a_client_that_reads_slowly_pauses_the_writing(self):
        rows = Rows()

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for last in [*[False] * 200, True]:
                body = {"body": bytes(65536), "more_body": not last}
                await send({"type": "http.response.body", **body})

        with serving(listening(rows, app), trace=True, lifespan="off") as running:
            with running.connect() as client:
                client.send(GET)
                paused = rows.wait_for("pause_writing")
                client.response()
                assert rows.wait_for("resume_writing").microseconds > paused.microseconds

    def test_an_app_that_takes_its_time_pauses_the_reading(self):
        rows, started, go_on = Rows(), threading.Event(), asyncio.Event()

        async def app(scope, receive, send):
            started.set()
            await go_on.wait()
            while (await receive())["more_body"]:
                pass
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})

        head = POST.replace(b"5", b"1000000") + b"\r\n"
        with serving(listening(rows, app), trace=True, lifespan="off") as running:
            with running.connect() as client:
                client.send(head)
                assert started.wait(PATIENCE)
                writer = threading.Thread(target=client.send, args=[bytes(1000000)])
                writer.start()
                rows.wait_for("pause_reading")
                running.call(go_on.set)
                assert client.response()[0] == 200
                writer.join(PATIENCE)
                rows.wait_for("resume_reading")


class TestWhereItWorks:
    def test_under_tls_the_wire_is_what_tls_carries(self, capsys):
        certificate = str(ROOT / "tests" / "certificate.pem")

        def conversation(client):
            context = ssl.create_default_context(cafile=certificate)
            context.check_hostname = False
            client.sock = context.wrap_socket(client.sock)
            client.send(GET)
            assert client.response()[2] == b"/"

        table = trace_of(echo, conversation, capsys, ssl_certfile=certificate)
        passed = [line.split("  ")[4] for line in table if "  wire  " in line]
        assert r"data_received 30 B b'GET / HTTP/1.1\r\nHost: test\r\n\r\n'" in passed
        assert any(what.startswith("write 52 B b'HTTP/1.1 200 OK") for what in passed)

    def test_a_worker_says_which_it_is(self):
        with Process("example:app", "--port", 0, "--workers", 2, "--trace") as process:
            with process.connect(process.port()) as client:
                client.send(GET)
                assert client.response()[0] == 200
            process.wait_for(r"^\[\d+\] 1\.1 .* wire  ->  data_received 30 B b'GET")
            process.interrupt()
            assert process.exit_code() == 0

    def test_it_is_a_table_of_the_process_too(self):
        with Process("example:app", "--port", 0, "--trace") as process:
            with process.connect(process.port()) as client:
                client.send(GET)
                assert client.response()[0] == 200
            process.wait_for(r"^-- connection 1, request 1 -+  our state, their state$")
            process.wait_for(r"^1\.1 +[\d,]+  app   <-  returns$")

    def test_a_file_is_not_offered_to_sendfile(self):
        """Its bytes would be on the wire, and not in the table."""
        offered = {}

        async def app(scope, receive, send):
            offered[scope["extensions"].get("foal.trace") is not None] = [*scope["extensions"]]
            await echo(scope, receive, send)

        for trace in (True, False):
            with serving(app, trace=trace, lifespan="off") as running:
                running.talk(GET)
        assert "http.response.pathsend" in offered[False]
        assert "http.response.pathsend" not in offered[True]


class TestWithoutIt:
    """--trace costs nothing when it is off: nothing of chapter 9 exists then."""

    @pytest.fixture
    def no_chapter_9(self, monkeypatch):
        text = (ROOT / "server.py").read_text(encoding="utf-8")
        chapter = text[text.index(" 9. Trace ──") :]
        names = re.findall(r"(?m)^(?:class|def) (\w+)", chapter)
        assert {"start_trace", "Row", "Trace", "Wire", "TracedH11", "traced"} <= {*names}
        for name in names:
            monkeypatch.delattr(server, name)

    def test_all_goes_on_without_chapter_9(self, no_chapter_9, capsys):
        for conversation, app in CONVERSATIONS:
            with serving(app) as running, running.connect() as client:
                conversation(client)
        assert capsys.readouterr().err == ""

    def test_with_it_that_would_be_noticed(self, no_chapter_9):
        with pytest.raises(NameError, match="start_trace"), serving(echo, trace=True):
            pass

    def test_the_objects_are_the_plain_ones(self):
        kinds = []

        async def app(scope, receive, send):
            connection = receive.__self__.connection
            kinds.append((type(connection.conn), type(connection.transport.get_protocol())))
            await echo(scope, receive, send)

        with serving(app, lifespan="off") as running:
            running.talk(GET)
        assert kinds == [(server.h11.Connection, server.HTTPConnection)]
