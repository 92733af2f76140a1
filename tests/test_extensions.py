"""The extensions of ASGI over HTTP/1.1: early hints, trailers and pathsend; what `tls`
says is in test_tls.py. Each is advertised only where it works (behaviour.md §4)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import random
import select
import socket
import sys
import threading
import time
from pathlib import Path

import h11
import pytest
from conftest import GET, PATIENCE, Client, Process
from test_cycle import (
    END,
    EXPECT,
    GET_10,
    START,
    answer,
    body,
    get,
    length,
    saying,
    serve,
    start,
    until,
)
from test_tls import CERTIFICATE, WEBSOCKET, TLSClient

import server

OPEN = start(length(4))  # for b"done"
HEAD = b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n"
WITH_TE = get(b"/", b"TE: trailers")
BOTH = pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


def hint(*links):
    return {"type": "http.response.early_hint", "links": links}


def trailers(*fields, more=False):
    kind = "http.response.trailers"
    return {"type": kind, "headers": fields, "more_trailers": more}


def pathsend(path):
    return {"type": "http.response.pathsend", "path": path}


def trying(raised: list, *messages):
    """An app that sends these, and goes on although some are refused."""

    async def app(scope, receive, send):
        for message in messages:
            try:
                await send(message)
                raised.append(None)
            except Exception as exc:  # noqa: BLE001 - whatever it is, it is told
                raised.append(exc)

    return app


def outcome(messages, request=GET) -> tuple[bytes, list[bool]]:
    """What the client gets, and which of the messages were refused."""
    raised: list = []
    with serve(trying(raised, *messages)) as running:
        data = running.talk(request)
    assert len(raised) == len(messages)
    return data, [exc is not None for exc in raised]


def errors(log) -> list[str]:
    return [r.getMessage() for r in log.records if r.levelno >= logging.ERROR]


class TestAdvertised:
    """ASGI "Extensions": each is in the scope where it works, and only there."""

    def extensions(self, request: bytes, **options) -> set[str]:
        seen = queue.Queue()

        async def app(scope, receive, send):
            seen.put(scope["extensions"])
            if scope["type"] == "websocket":
                await receive()
                return await send({"type": "websocket.close"})
            await send(START)
            await send(END)

        with serve(app, **options) as running:
            running.talk(request)
        return {name.removeprefix("http.response.") for name in seen.get()}

    def test_without_te_there_are_hints_and_files(self):
        assert self.extensions(GET) == {"early_hint", "pathsend"}

    def test_files_can_be_left_out(self):
        """brotli-asgi, and Starlette 0.36's own middleware, lose a pathsend: a 500."""
        assert self.extensions(GET, pathsend=False) == {"early_hint"}

    @pytest.mark.parametrize(
        "field",
        [
            b"TE: trailers",
            b"te: trailers",
            b"TE: Trailers",
            b"TE: TRAILERS",
            b"TE:trailers",
            b"TE: trailers, deflate;q=0.5",
            b"TE: deflate;q=0.5, trailers",
            b"TE: deflate;q=0.5 ,\ttrailers , gzip",
            b"TE: , trailers,",
            b"TE: trailers\r\nTE: deflate",
            b"TE: deflate\r\nTE: trailers",
        ],
    )
    def test_te_trailers_asks_for_trailers(self, field):
        """RFC 9110 §10.1.4: a list, over all its lines, without regard to case."""
        found = self.extensions(get(b"/", field, b"Connection: TE"))
        assert found == {"early_hint", "pathsend", "trailers"}

    @pytest.mark.parametrize(
        "field",
        [
            b"TE: ",
            b"TE: deflate",
            b"TE: xtrailers",
            b"TE: trailersx",
            b"TE: x-trailers;q=1",
            b"TE: deflate;x=trailers",
            b"Trailer: trailers",
            b"X-TE: trailers",
        ],
    )
    def test_its_false_friends_do_not(self, field):
        assert self.extensions(get(b"/", field)) == {"early_hint", "pathsend"}

    def test_http_1_0_has_neither_interim_responses_nor_trailers(self):
        request = b"GET / HTTP/1.0\r\nTE: trailers\r\n\r\n"
        assert self.extensions(request) == {"pathsend"}

    def test_a_websocket_has_a_denial_response_and_none_of_them(self):
        assert self.extensions(WEBSOCKET) == {"websocket.http.response"}
        request = WEBSOCKET[:-2] + b"TE: trailers\r\n\r\n"
        assert self.extensions(request) == {"websocket.http.response"}

    def test_one_request_does_not_advertise_for_the_next(self):
        seen = queue.Queue()

        async def app(scope, receive, send):
            seen.put(len(scope["extensions"]))
            scope["extensions"].clear()
            await send(START)
            await send(END)

        with serve(app) as running, running.connect() as client:
            client.send(WITH_TE + GET + WITH_TE)
            assert [client.response()[0] for _ in range(3)] == [200] * 3
        assert list(seen.queue) == [3, 2, 3]


STYLE = b"</style.css>; rel=preload; as=style"
SCRIPT = b"</script.js>; rel=preload; as=script"
HINT = b"HTTP/1.1 103 Early Hints\r\nlink: " + STYLE + b"\r\n\r\n"


def lower(data: bytes) -> bytes:
    return data.replace(b"Link:", b"link:")


class TestEarlyHints:
    """ASGI extension "Early Hints", RFC 8297: 103 before the final head."""

    def test_a_hint_leaves_while_the_app_prepares_its_answer(self):
        go = asyncio.Event()

        async def app(scope, receive, send):
            await send(START)
            await send(hint(STYLE))
            await go.wait()
            await send(body(b"done"))

        with serve(app) as running, running.connect() as client:
            client.send(GET)
            assert lower(client.read_until(b"\r\n\r\n")) == HINT
            running.call(go.set)
            assert client.response()[2] == b"done"

    def test_there_may_be_several_with_several_links_each(self):
        messages = [OPEN, hint(STYLE), hint(SCRIPT, STYLE), body(b"done")]
        first, second, final = lower(answer(messages)).split(b"HTTP/1.1 ")[1:]
        assert b"HTTP/1.1 " + first == HINT
        links = b"link: " + SCRIPT + b"\r\nlink: " + STYLE
        assert second == b"103 Early Hints\r\n" + links + b"\r\n\r\n"
        assert final.startswith(b"200 ") and final.endswith(b"\r\n\r\ndone")

    def test_an_iterator_will_do(self):
        message = {**hint(), "links": iter([STYLE])}
        assert lower(answer([START, message, END])).startswith(HINT)

    def test_the_next_request_is_answered_as_ever(self):
        with (
            serve(saying(START, hint(STYLE), body(b"done"))) as running,
            running.connect() as client,
        ):
            client.send(GET + HEAD + GET)
            got = [client.response(m)[2] for m in ("GET", "HEAD", "GET")]
        assert got == [b"done", b"", b"done"]

    def test_it_does_not_count_as_the_100_that_a_client_waits_for(self):
        """RFC 9110 §15.2: several interim responses may come. What if the hint is
        first, and the app then reads?"""

        async def app(scope, receive, send):
            await send(START)
            await send(hint(STYLE))
            await send(body((await receive())["body"]))

        with serve(app) as running, running.connect() as client:
            client.send(EXPECT)
            assert lower(client.read_until(b"\r\n\r\n")) == HINT
            client.sock.settimeout(2.0)
            assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
            client.send(b"hello")
            assert client.response()[2] == b"hello"

    def test_nor_is_one_owed_to_a_client_that_no_longer_waits(self):
        """RFC 9110 §10.1.1: it may send its body unasked, also behind a hint."""
        go = asyncio.Event()

        async def app(scope, receive, send):
            await send(START)
            await send(hint(STYLE))
            await go.wait()
            await send(body((await receive())["body"]))

        with serve(app) as running, running.connect() as client:
            client.send(EXPECT)
            assert lower(client.read_until(b"\r\n\r\n")) == HINT
            (connection,) = running.server.connections
            client.send(b"hello")
            until(running, lambda: connection.cycle.arrived == 5)
            running.call(go.set)
            assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")

    def test_after_the_body_began_it_is_refused(self):
        messages = [START, body(b"first ", more=True), hint(STYLE), body(b"last")]
        data, refused = outcome(messages)
        assert refused == [False, False, True, False]
        assert b"103" not in data and data.endswith(b"last\r\n0\r\n\r\n")

    def test_after_the_end_it_is_refused(self):
        data, refused = outcome([START, END, hint(STYLE)])
        assert refused == [False, False, True] and b"link" not in lower(data)

    def test_after_the_end_it_is_not_the_next_answers(self):
        """What if an app goes on behind its answer, while the next one is awaited?"""
        first, second, over = [], asyncio.Event(), asyncio.Event()

        async def app(scope, receive, send):
            if scope["path"] == "/next":
                second.set()
                await over.wait()
            await send(START)
            await send(END)
            if scope["path"] != "/next":
                await second.wait()
                await trying(first, hint(STYLE))(scope, receive, send)
                over.set()

        with serve(app) as running:
            data = running.talk(GET + get(b"/next"))
        assert b" 103 " not in data and data.count(b" 200 ") == 2
        assert type(first[0]) is RuntimeError

    def test_http_1_0_never_gets_one(self):
        """What if the app does not look whether it is advertised?"""
        data, refused = outcome([OPEN, hint(STYLE), body(b"done")], GET_10)
        assert refused == [False, True, False]
        assert data.startswith(b"HTTP/1.1 200 ") and data.endswith(b"done")

    @pytest.mark.parametrize(
        "links",
        [
            None,
            5,
            STYLE,  # of which each item is an int
            STYLE.decode(),
            [STYLE.decode()],
            [STYLE, None],
            [STYLE, 5],
            [[STYLE]],
            [b"</a>\r\nset-cookie: x=1"],
            [STYLE, b"</a>\r"],
            [STYLE, b"</a\n>"],
            [STYLE, b"</a\0>"],
        ],
        ids=repr,
    )
    def test_wrong_links_are_refused_and_nothing_is_sent(self, links):
        message = {**hint(), "links": links}
        data, refused = outcome([OPEN, message, body(b"done")])
        assert refused == [False, True, False]
        assert data.startswith(b"HTTP/1.1 200 ") and data.endswith(b"done")

    def test_links_are_needed(self):
        message = {"type": "http.response.early_hint"}
        data, refused = outcome([OPEN, message, body(b"done")])
        assert refused == [False, True, False] and data.startswith(b"HTTP/1.1 200 ")


PROMISE = {**START, "trailers": True}
CHECKSUM = (b"checksum", b"1234")


def chunked_end(*fields: tuple) -> bytes:
    return b"0\r\n" + b"".join(b"%b: %b\r\n" % field for field in fields) + b"\r\n"


class TestTrailers:
    """ASGI extension "HTTP Trailers", RFC 9112 §7.1.2."""

    def test_they_end_a_chunked_answer(self):
        messages = [PROMISE, body(b"all"), trailers(CHECKSUM)]
        data = answer(messages, WITH_TE)
        assert data.endswith(b"\r\n\r\n3\r\nall\r\n" + chunked_end(CHECKSUM))
        assert b"chunked" in data

    def test_an_independent_reader_finds_them(self):
        conn = h11.Connection(h11.CLIENT)
        conn.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
        conn.send(h11.EndOfMessage())
        messages = [PROMISE, body(b"a", more=True), body(b"b"), trailers(CHECKSUM)]
        conn.receive_data(answer(messages, WITH_TE))
        while type(event := conn.next_event()) is not h11.EndOfMessage:
            assert type(event) in (h11.Response, h11.Data)
        assert list(event.headers) == [CHECKSUM]

    def test_several_messages_make_one_list(self):
        fields = [(b"x", b"1"), (b"y", b"2"), (b"x", b"3")]
        first, second, third = [trailers(field, more=True) for field in fields]
        messages = [PROMISE, END, first, second, third, trailers()]
        assert answer(messages, WITH_TE).endswith(b"\r\n\r\n" + chunked_end(*fields))

    def test_a_promise_may_be_kept_with_none(self):
        messages = [PROMISE, body(b"all"), {"type": "http.response.trailers"}]
        assert answer(messages, WITH_TE).endswith(b"all\r\n" + chunked_end())

    def test_the_body_leaves_before_they_are_known(self):
        go = asyncio.Event()

        async def app(scope, receive, send):
            await send(PROMISE)
            await send(body(b"all"))
            await go.wait()
            await send(trailers(CHECKSUM))

        with serve(app) as running, running.connect() as client:
            client.send(WITH_TE)
            client.read_until(b"3\r\nall\r\n")
            running.call(go.set)
            assert client.read_until(b"\r\n\r\n") == chunked_end(CHECKSUM)

    def test_the_connection_goes_on_afterwards(self):
        messages = [PROMISE, body(b"all"), trailers(CHECKSUM)]
        with serve(saying(*messages)) as running, running.connect() as client:
            client.send(WITH_TE * 3)
            assert [client.response()[2] for _ in range(3)] == [b"all"] * 3

    def test_unless_promised_they_are_refused(self):
        data, refused = outcome([OPEN, body(b"done"), trailers(CHECKSUM)], WITH_TE)
        assert refused == [False, False, True]
        assert data.endswith(b"done") and b"checksum" not in data

    @pytest.mark.parametrize(
        "request_bytes", [GET, b"GET / HTTP/1.0\r\nTE: trailers\r\n\r\n"]
    )
    def test_unless_asked_for_the_body_ends_and_they_are_refused(self, request_bytes):
        """The extension: "only … in case the client has sent" TE: trailers."""
        messages = [PROMISE, body(b"a", more=True), END, trailers(CHECKSUM)]
        data, refused = outcome(messages, request_bytes)
        assert refused == [False, False, False, True] and b"checksum" not in data
        assert data.endswith(b"a" if b"1.0" in request_bytes else b"a\r\n0\r\n\r\n")

    def test_a_content_length_has_no_place_for_them(self, log):
        """RFC 9112 §6.5: they are part of the chunked coding."""
        promise = {**start(length(3)), "trailers": True}
        data, refused = outcome([promise, body(b"all"), trailers(CHECKSUM)], WITH_TE)
        assert any(refused) and b"checksum" not in data

    @pytest.mark.parametrize("more", [[], [trailers(CHECKSUM, more=True)]])
    def test_an_unkept_promise_does_not_look_complete(self, more, log):
        data = answer([PROMISE, body(b"all"), *more], WITH_TE + GET)
        assert data.endswith(b"3\r\nall\r\n") and data.count(b"HTTP/1.1") == 1
        assert len(errors(log)) == 1

    @pytest.mark.parametrize("wrong", [END, START, hint(STYLE), pathsend(__file__)])
    def test_nothing_else_may_come_in_their_place(self, wrong):
        messages = [PROMISE, body(b"all"), wrong, trailers(CHECKSUM)]
        data, refused = outcome(messages, WITH_TE)
        assert refused == [False, False, True, False]
        assert data.endswith(b"3\r\nall\r\n" + chunked_end(CHECKSUM))

    def test_after_the_last_of_them_nothing_may_come(self):
        messages = [PROMISE, END, trailers(CHECKSUM), trailers(CHECKSUM), END]
        assert outcome(messages, WITH_TE)[1] == [False] * 3 + [True] * 2

    @pytest.mark.parametrize(
        "request_bytes, status", [(HEAD, 200), (WITH_TE, 204), (WITH_TE, 304)]
    )
    def test_an_answer_without_content_ends_at_its_head(
        self, request_bytes, status, log
    ):
        """What if a HEAD is answered by the code for GET? That is no mistake."""
        request = request_bytes[:-2].replace(b"TE: trailers\r\n", b"")
        request += b"TE: trailers\r\n\r\n"
        promise = {**PROMISE, "status": status}
        data = answer([promise, body(b"all"), trailers(CHECKSUM)], request + request)
        assert data.count(b"HTTP/1.1 %d " % status) == 2
        assert data.endswith(b"\r\n\r\n") and b"checksum" not in data
        assert b"0\r\n\r\n" not in data and errors(log) == []

    @pytest.mark.parametrize(
        "field",
        [
            (b":status", b"200"),
            (b"", b"1"),
            (b"na me", b"1"),
            (b"name\r\n", b"1"),
            (b"name", b"1\r\nx: y"),
            (b"name", b"1\n"),
            (b"name", b"\0"),
            ("name", b"1"),
            (b"name", "1"),
            (b"name", 1),
            (b"name",),
            (b"name", b"1", b"2"),
            b"name: 1",
            None,
        ],
        ids=repr,
    )
    def test_a_wrong_field_is_refused_and_nothing_of_it_sent(self, field):
        wrong = trailers((b"good", b"1"), field)
        messages = [PROMISE, body(b"all"), wrong, trailers(CHECKSUM)]
        data, refused = outcome(messages, WITH_TE)
        assert refused == [False, False, True, False]
        assert data.endswith(b"3\r\nall\r\n" + chunked_end(CHECKSUM))

    @pytest.mark.parametrize(
        "name",
        [b"content-length", b"Transfer-Encoding", b"host", b"trailer"]
        + [b"connection", b"set-cookie", b"authorization", b"content-type"],
    )
    def test_fields_for_framing_and_routing_are_refused(self, name):
        """RFC 9110 §6.5.1: what frames, routes, authenticates or describes a message
        must not come after it."""
        value = b"chunked" if name == b"Transfer-Encoding" else b"0"
        messages = [PROMISE, body(b"all"), trailers((name, value)), trailers(CHECKSUM)]
        data, refused = outcome(messages, WITH_TE)
        assert refused == [False, False, True, False]
        assert data.endswith(b"3\r\nall\r\n" + chunked_end(CHECKSUM))

    @pytest.mark.parametrize("wrong", [{"headers": None}, {"more_trailers": "yes"}])
    def test_a_wrong_type_is_refused(self, wrong):
        messages = [PROMISE, body(b"all"), {**trailers(), **wrong}, trailers(CHECKSUM)]
        data, refused = outcome(messages, WITH_TE)
        assert refused == [False, False, True, False]
        assert data.endswith(b"3\r\nall\r\n" + chunked_end(CHECKSUM))


SIZES = [0, 1, 256 * 1024, 1024 * 1024 + 1]


def pattern(size: int) -> bytes:
    """Bytes in which no part is like another."""
    return random.Random(size).randbytes(size)


@pytest.fixture
def make(tmp_path):
    """A function that makes a file of a size, and returns its path and content."""

    def make(size):
        path, content = tmp_path / f"{size} bytes", pattern(size)
        path.write_bytes(content)
        return str(path), content

    return make


def sparse(folder: Path, size: int) -> str:
    """A large file that takes no room."""
    with open(folder / "sparse", "wb") as file:
        file.truncate(size)
    return str(folder / "sparse")


def serving_file(tls, *messages, **options):
    if tls:
        options["ssl_certfile"] = CERTIFICATE
    return serve(saying(*messages), **options)


def connect(running, tls) -> Client:
    return TLSClient(running.address) if tls else running.connect()


def read_exactly(client, size: int) -> bytes:
    """So many bytes, in linear time."""
    found = bytearray(client.unread)
    while len(found) < size:
        data = client.sock.recv(min(1024 * 1024, size - len(found)))
        assert data, f"closed after {len(found)} bytes of {size}"
        found += data
    client.unread = bytes(found[size:])
    return bytes(found[:size])


def until_the_end(client) -> bytes:
    """All bytes until the connection ends, in whatever way."""
    found = bytearray(client.unread)
    with contextlib.suppress(ConnectionError):
        while data := client.sock.recv(1024 * 1024):
            found += data
    return bytes(found)


class TestPathSend:
    """ASGI extension "Path Send": "it should behave the same as ordinary
    http.response.body"."""

    @BOTH
    @pytest.mark.parametrize("size", SIZES)
    def test_a_file_arrives_byte_by_byte(self, make, size, tls, log):
        path, content = make(size)
        start_ = start(length(size))
        with (
            serving_file(tls, start_, pathsend(path)) as running,
            connect(running, tls) as client,
        ):
            client.send(GET + get(b"/again"))
            for _ in range(2):
                head = client.read_until(b"\r\n\r\n").lower()
                assert b"content-length: %d\r\n" % size in head
                assert read_exactly(client, size) == content
        assert f" 200 {size} B " in log.text

    @BOTH
    @pytest.mark.parametrize("size", SIZES)
    def test_without_a_length_it_is_chunked(self, make, size, tls):
        path, content = make(size)
        with (
            serving_file(tls, START, pathsend(path)) as running,
            connect(running, tls) as client,
        ):
            client.send(GET + GET)
            for _ in range(2):
                status, fields, data = client.response()
                assert (status, data) == (200, content)
                assert fields["transfer-encoding"] == "chunked"

    @BOTH
    def test_a_large_file_arrives_byte_by_byte(self, make, tls):
        path, content = make((16 if tls else 64) * 1024 * 1024)
        with (
            serving_file(tls, start(length(len(content))), pathsend(path)) as running,
            connect(running, tls) as client,
        ):
            client.send(GET)
            client.read_until(b"\r\n\r\n")
            assert read_exactly(client, len(content)) == content

    @BOTH
    @pytest.mark.parametrize("fields", [[], [length(99_999)]])
    def test_http_1_0_gets_it_until_the_connection_ends(self, make, fields, tls):
        path, content = make(99_999)
        with (
            serving_file(tls, start(*fields), pathsend(path)) as running,
            connect(running, tls) as client,
        ):
            client.send(GET_10)
            head, _, data = client.read_all().partition(b"\r\n\r\n")
        assert data == content and b"chunked" not in head

    @pytest.mark.parametrize("fields", [[], [length(999)]])
    @pytest.mark.parametrize("status", [200, 204, 304])
    def test_without_content_only_the_head_is_sent(self, make, status, fields):
        path, content = make(999)
        request = HEAD if status == 200 else GET
        data = answer(
            [start(*fields, status=status), pathsend(path)], request + request
        )
        assert data.count(b"HTTP/1.1 %d " % status) == 2
        assert data.endswith(b"\r\n\r\n") and content[:9] not in data

    @pytest.mark.parametrize("said", [998, 1000, 0])
    def test_a_wrong_length_is_500(self, make, said, log):
        path, content = make(999)
        data = answer([start(length(said)), pathsend(path)], GET)
        assert data.startswith(b"HTTP/1.1 500 ") and content[:9] not in data
        assert len(errors(log)) == 1

    def test_a_last_answer_says_so_and_ends(self, make):
        path, content = make(99_999)
        request = get(b"/", b"Connection: close")
        with (
            serve(saying(START, pathsend(path))) as running,
            running.connect() as client,
        ):
            client.send(request)
            assert client.response()[2] == content
            assert client.read_all() == b""

    def test_where_it_is_not_offered_it_is_not_taken(self, make, log):
        """--trace would not see the file pass, so it does not offer it."""
        path, _ = make(99)
        with serve(saying(START, pathsend(path)), trace=True) as running:
            assert running.talk(GET).startswith(b"HTTP/1.1 500 ")
        assert "unexpected message 'http.response.pathsend'" in log.text

    def test_promised_trailers_may_follow(self, make):
        path, content = make(99)
        messages = [PROMISE, pathsend(path), trailers(CHECKSUM)]
        data = answer(messages, WITH_TE)
        assert data.endswith(content + b"\r\n" + chunked_end(CHECKSUM))

    def test_the_access_log_tells_its_bytes(self, make, log):
        path, _ = make(1024 * 1024 + 1)
        answer([START, pathsend(path)], GET)
        assert '"GET / HTTP/1.1" 200 1048577 B' in log.text
        answer([START, pathsend(path)], HEAD)
        assert '"HEAD / HTTP/1.1" 200 0 B' in log.text

    def test_a_client_that_half_closes_still_gets_the_whole_file(self, make):
        path, content = make(4_000_000)
        assert answer([START, pathsend(path)], GET_10).endswith(content)


class TestMisuse:
    """behaviour.md §4: an exception out of send, and nothing of the message sent."""

    @pytest.fixture(params=["missing", "folder", "secret", "NUL", "long"])
    def unreadable(self, request, tmp_path):
        path = tmp_path / request.param
        if request.param == "folder":
            path.mkdir()
        if request.param == "secret":
            path.write_text("secret")
            path.chmod(0)
            if os.access(path, os.R_OK):
                pytest.skip("to this user nothing is secret")
        extra = {"NUL": "\0", "long": "x" * 9999}
        return str(path) + extra.get(request.param, "")

    def test_what_cannot_be_read_is_a_500_without_details(self, unreadable, log):
        data = answer([start((b"x-name", b"1")), pathsend(unreadable)], GET + GET)
        assert data.startswith(b"HTTP/1.1 500 ") and b"x-name" not in data
        assert os.path.basename(unreadable).encode() not in data
        assert len(errors(log)) == 1

    def test_an_app_may_answer_otherwise(self, unreadable):
        messages = [OPEN, pathsend(unreadable), body(b"gone")]
        data, refused = outcome(messages)
        assert refused == [False, True, False] and data.endswith(b"gone")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such thing")
    def test_what_is_not_a_file_is_refused(self, tmp_path):
        """What if it is a pipe? Opening it would wait for a writer, with the loop."""
        fifo = str(tmp_path / "fifo")
        os.mkfifo(fifo)
        rescue = threading.Timer(2.0, lambda: os.close(os.open(fifo, os.O_RDWR)))
        rescue.start()
        before = time.monotonic()
        for path in (fifo, os.devnull):
            assert outcome([START, pathsend(path), END])[1] == [False, True, False]
        assert time.monotonic() - before < 1.0
        rescue.cancel()

    @pytest.mark.parametrize(
        "path", [None, 1.5, os.fsencode(__file__), Path(__file__), [__file__]], ids=repr
    )
    def test_a_path_is_a_str(self, path):
        data, refused = outcome([START, pathsend(path), body(b"done")])
        assert refused == [False, True, False] and b"import" not in data

    def test_a_number_is_not_a_path(self):
        """open() would take it for a descriptor: of another file of the app's."""
        with open(__file__, "rb") as file:
            data, refused = outcome([START, pathsend(file.fileno()), END])
        assert refused == [False, True, False] and b"import" not in data

    def test_a_path_is_needed(self):
        messages = [OPEN, {"type": "http.response.pathsend"}, body(b"done")]
        data, refused = outcome(messages)
        assert refused == [False, True, False] and data.endswith(b"done")

    def test_before_the_start_it_is_refused(self):
        data, refused = outcome([pathsend(__file__), OPEN, body(b"done")])
        assert refused == [True, False, False] and data.endswith(b"done")

    @pytest.mark.parametrize("request_bytes", [GET, GET_10])
    def test_after_the_body_began_it_is_refused(self, request_bytes):
        """The extension: it "cannot be mixed with http.response.body"."""
        messages = [
            START,
            body(b"first ", more=True),
            pathsend(__file__),
            body(b"last"),
        ]
        data, refused = outcome(messages, request_bytes)
        assert refused == [False, False, True, False]
        assert b"import" not in data
        ending = b"last" if b"1.0" in request_bytes else b"last\r\n0\r\n\r\n"
        assert data.endswith(ending)

    @pytest.mark.parametrize("wrong", [END, pathsend(__file__), START])
    def test_after_it_nothing_may_come(self, make, wrong):
        path, content = make(99)
        data, refused = outcome([start(length(99)), pathsend(path), wrong])
        assert refused == [False, False, True] and data.endswith(content)


def sending(path, seen: queue.Queue, *fields):
    """An app that sends a file, and tells what came of it."""

    async def app(scope, receive, send):
        try:
            await send(start(*fields))
            await send(pathsend(path))
            seen.put(None)
        except BaseException as exc:
            seen.put(exc)
            raise

    return app


def serve_sending(tls, path, seen, *fields, **options):
    if tls:
        options["ssl_certfile"] = CERTIFICATE
    return serve(sending(path, seen, *fields), **options)


LARGE = 64 * 1024 * 1024  # more than two sockets' buffers can hold


class TestOnTheWay:
    """What may happen while a file is sent (behaviour.md §3, §4)."""

    @BOTH
    def test_after_a_cancelled_file_nothing_follows_as_its_content(self, tmp_path, tls):
        """What if the app gives up half-way, and goes on as if nothing was?"""
        path, seen = sparse(tmp_path, LARGE), queue.Queue()

        async def app(scope, receive, send):
            await send(start(length(LARGE)))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await send(pathsend(path))
            seen.put("gives up")
            try:
                await send({"type": "http.response.body", "body": b""})
            except RuntimeError as exc:
                seen.put(str(exc))
                raise

        options = {"ssl_certfile": CERTIFICATE} if tls else {}
        with serve(app, **options) as running, connect(running, tls) as client:
            client.send(GET + GET)
            # It reads nothing until then: all could have been sent in a tenth of a second.
            assert seen.get(timeout=PATIENCE) == "gives up"
            data = until_the_end(client)
            assert "SENDING_FILE" in seen.get(timeout=PATIENCE)
        assert len(data) < LARGE and data.count(b"HTTP/1.1 ") == 1

    def test_what_is_sent_meanwhile_is_refused_and_harms_nobody(self, tmp_path):
        """What if two tasks of one app send at once? Another client's stream goes on."""
        path, seen, go = sparse(tmp_path, LARGE), queue.Queue(), asyncio.Event()

        async def app(scope, receive, send):
            if scope["path"] == "/stream":
                await send(start())
                await go.wait()
                await send({"type": "http.response.body", "body": b"event", "more_body": True})
                return await asyncio.Event().wait()
            await send(start(length(LARGE)))
            sending = asyncio.create_task(send(pathsend(path)))
            await asyncio.sleep(0)
            go.set()
            try:
                await send({"type": "http.response.body", "body": b"x"})
            except RuntimeError as exc:
                seen.put(str(exc))
            await sending

        with serve(app, timeout_graceful_shutdown=0.2) as running:
            with running.connect() as other, running.connect() as client:
                other.send(GET.replace(b"GET / ", b"GET /stream "))
                client.send(GET)
                assert "SENDING_FILE" in seen.get(timeout=PATIENCE)
                other.read_until(b"event")

    @BOTH
    @pytest.mark.parametrize("chunked", [False, True])
    def test_a_file_that_shrinks_does_not_look_complete(self, tmp_path, chunked, tls):
        path, seen = sparse(tmp_path, LARGE), queue.Queue()
        fields = [] if chunked else [length(LARGE)]
        with serve_sending(tls, path, seen, *fields) as running:
            with connect(running, tls) as client:
                client.send(GET + GET)
                client.read_until(b"\r\n\r\n")
                os.truncate(path, LARGE // 2)
                data = until_the_end(client)
            assert isinstance(seen.get(timeout=PATIENCE), Exception)
            assert len(data) < LARGE and b"HTTP/1.1" not in data
            assert not data.endswith(b"\r\n0\r\n\r\n")
            with connect(running, tls) as client:  # the server goes on
                client.send(HEAD)
                assert client.response("HEAD")[0] == 200

    def test_a_file_that_grows_is_sent_as_long_as_it_was(self, tmp_path):
        path, seen = sparse(tmp_path, LARGE // 4), queue.Queue()
        with serve_sending(False, path, seen) as running, running.connect() as client:
            client.send(get(b"/", b"Connection: close"))
            client.read_until(b"\r\n\r\n")
            os.truncate(path, LARGE)
            data = until_the_end(client)
            assert seen.get(timeout=PATIENCE) is None
        assert data.endswith(b"\r\n0\r\n\r\n") and len(data) < LARGE // 2

    @BOTH
    @pytest.mark.parametrize("how", ["reset", "FIN"])
    def test_a_client_that_leaves_is_no_error(
        self, tmp_path, how, tls, log, monkeypatch
    ):
        if os.name == "nt":  # Wine's TransmitFile does not notice by itself
            monkeypatch.setattr(server, "SEND_TIMEOUT", 2.0)
        path, seen = sparse(tmp_path, LARGE), queue.Queue()
        with serve_sending(tls, path, seen, length(LARGE)) as running:
            client = connect(running, tls)
            client.send(GET)
            client.read_until(b"\r\n\r\n")
            client.reset() if how == "reset" else client.sock.close()
            assert type(seen.get(timeout=PATIENCE)) is server.ClientDisconnected
            until(running, lambda: not running.server.connections)
        assert errors(log) == []
        assert not [r for r in log.records if r.name == "asyncio"]

    def test_a_tls_client_that_says_it_leaves_is_believed(self, tmp_path, log):
        """It has read all there was, so no reset tells us: only the end of its half."""
        path, seen = sparse(tmp_path, LARGE), queue.Queue()
        with serve_sending(True, path, seen, length(LARGE)) as running:
            with connect(running, True) as client:
                client.send(GET)
                client.read_until(b"\r\n\r\n")
                client.half_close()
                data = until_the_end(client)
            assert type(seen.get(timeout=PATIENCE)) is server.ClientDisconnected
        assert len(data) < LARGE and errors(log) == []
        assert not [r for r in log.records if r.name == "asyncio"]

    @LINUX_ONLY
    @BOTH
    def test_abandoned_files_are_closed(self, tmp_path, tls):
        path, seen = sparse(tmp_path, LARGE), queue.Queue()
        with serve_sending(tls, path, seen) as running:
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(20):
                with connect(running, tls) as client:
                    client.send(GET)
                    client.read_until(b"\r\n\r\n")
            for _ in range(20):
                seen.get(timeout=PATIENCE)
            until(running, lambda: not running.server.connections)
            assert len(os.listdir("/proc/self/fd")) == before

    @BOTH
    def test_a_client_that_never_reads_is_dropped(
        self, tmp_path, tls, monkeypatch, log
    ):
        monkeypatch.setattr(server, "SEND_TIMEOUT", 0.2)
        path, seen = sparse(tmp_path, LARGE), queue.Queue()
        with serve_sending(tls, path, seen) as running, connect(running, tls) as client:
            client.send(GET)
            assert type(seen.get(timeout=PATIENCE)) is server.ClientDisconnected
            until(running, lambda: not running.server.connections)
        assert errors(log) == []

    @BOTH
    def test_a_slow_reader_is_not(self, tmp_path, tls, monkeypatch):
        monkeypatch.setattr(server, "SEND_TIMEOUT", 0.6)
        part = 1024 * 1024
        path, seen = sparse(tmp_path, 16 * part), queue.Queue()
        with (
            serve_sending(tls, path, seen, length(16 * part)) as running,
            connect(running, tls) as client,
        ):
            client.send(GET)
            client.read_until(b"\r\n\r\n")
            for _ in range(16):
                select.select([], [], [client.sock], 0.08)  # it is slow
                assert read_exactly(client, part) == bytes(part)
            assert seen.get(timeout=PATIENCE) is None

    def test_a_stop_ends_it_after_the_grace(self, tmp_path):
        path, seen = sparse(tmp_path, LARGE), queue.Queue()
        options = {"timeout_graceful_shutdown": 0.4}
        with (
            serve_sending(False, path, seen, length(LARGE), **options) as running,
            running.connect() as client,
        ):
            client.send(GET)
            client.read_until(b"\r\n\r\n")
            running.stop()
            assert len(until_the_end(client)) < LARGE
        assert isinstance(seen.get(), asyncio.CancelledError)

    def test_a_stop_lets_it_be_finished(self, tmp_path):
        path, seen = sparse(tmp_path, LARGE), queue.Queue()
        options = {"timeout_graceful_shutdown": PATIENCE}
        with (
            serve_sending(False, path, seen, length(LARGE), **options) as running,
            running.connect() as client,
        ):
            client.send(GET)
            client.read_until(b"\r\n\r\n")
            running.call(running.server.stop, "test")
            assert len(read_exactly(client, LARGE)) == LARGE
        assert seen.get() is None


APP = """
import os

async def app(scope, receive, send):
    path = scope["path"][1:]
    fields = [(b"content-length", b"%d" % os.stat(path).st_size)]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.pathsend", "path": os.path.abspath(path)})
"""


@LINUX_ONLY
class TestMemory:
    """behaviour.md §4: "so the file never passes through Python"."""

    def peak(self, pid: int) -> int:
        """The most memory that a process ever had, in KiB."""
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0])

    @BOTH
    def test_a_huge_file_takes_no_memory(self, tmp_path, tls):
        size = (64 if tls else 256) * 1024 * 1024
        (tmp_path / "small").write_bytes(b"small")
        (tmp_path / "files.py").write_text(APP)
        sparse(tmp_path, size)
        arguments = ["--port", 0, "--lifespan", "off"]
        arguments += ["--ssl-certfile", CERTIFICATE] if tls else []
        with Process("files:app", *arguments, cwd=tmp_path) as process:
            address = ("127.0.0.1", process.port())
            with TLSClient(address) if tls else Client(address) as client:
                client.send(get(b"/small"))
                assert client.response()[2] == b"small"
                before = self.peak(process.process.pid)
                client.send(get(b"/sparse"))
                client.read_until(b"\r\n\r\n")
                left, view = size - len(client.unread), bytearray(4 * 1024 * 1024)
                discard = (
                    [] if tls else [socket.MSG_TRUNC]
                )  # so the kernel need not copy
                while left:
                    left -= client.sock.recv_into(view, min(left, len(view)), *discard)
                assert self.peak(process.process.pid) - before < 8 * 1024
