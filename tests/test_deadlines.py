"""What if the other side is slow, or silent? Each wait has a deadline (chapter 5,
Waiting). Two kinds: absolute ones, which a drip of bytes does not extend, and gaps,
which any progress begins anew.

The deadlines here are fractions of a second. No test asks how late one is noticed: each
blocks until the server acts, or lets the client be slow for longer than the deadline.
"""

import asyncio
import contextlib
import itertools
import os
import select
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import GET, PATIENCE, serving

import server
import sockets

SHORT = 0.1  # a deadline that shall pass
LONG = 0.3  # whoever takes so long is seen by the ticker
GAP = 0.7  # a deadline that shall not pass while a client drips
BIG = 64 * 1024


@pytest.fixture(autouse=True)
def ticking_fast(monkeypatch):
    monkeypatch.setattr(server, "TICK", 0.05)


async def answer(send, body=b""):
    fields = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": body})


async def drain(scope, receive, send):
    """Reads the body, and answers with its size."""
    assert scope["type"] == "http"
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await answer(send, b"%d" % size)


def post(*fields):
    return b"\r\n".join([b"POST / HTTP/1.1", b"Host: test", *fields, b"", b""])


def drip(client, pieces):
    """Send one piece after the other, slowly, until the server says something."""
    end = time.monotonic() + PATIENCE
    for piece in pieces:
        if select.select([client.sock], [], [], 0.05)[0]:
            return
        with contextlib.suppress(OSError):  # closed just now: reading will tell
            client.send(piece)
        assert time.monotonic() < end


def until(s, question):
    """Ask on the server's loop until the answer is yes."""
    end = time.monotonic() + PATIENCE
    while not s.call(question):
        assert time.monotonic() < end


class TestHead:
    """--timeout-request-head: from the connection, or the first byte, to the last."""

    def test_a_silent_connection_is_closed_without_an_answer(self):
        with serving(drain, timeout_request_head=SHORT) as s, s.connect() as c:
            assert c.read_all() == b""

    @pytest.mark.parametrize("start", [b"G", GET[:-2], b"\r\nGET / HTTP/1.1\r"])
    def test_half_a_head_is_408(self, start):
        with serving(drain, timeout_request_head=SHORT) as s, s.connect() as c:
            c.send(start)
            status, fields, _ = c.response()
            assert (status, fields["connection"]) == (408, "close")
            assert c.read_all() == b""

    def test_a_head_that_drips_is_408(self):
        """What if one byte comes now and then (slowloris)? The deadline is absolute."""
        with serving(drain, timeout_request_head=SHORT) as s, s.connect() as c:
            c.send(GET[:-2] + b"X: ")
            drip(c, itertools.repeat(b"y"))
            assert c.response()[0] == 408

    def test_a_second_head_that_drips_is_408(self):
        with serving(drain, timeout_request_head=SHORT) as s, s.connect() as c:
            c.send(GET)
            assert c.response()[0] == 200
            c.send(GET[:-2] + b"X: ")
            drip(c, itertools.repeat(b"y"))
            assert c.response()[0] == 408

    def test_the_head_of_a_pipelined_request_has_the_same_deadline(self):
        with serving(drain, timeout_request_head=SHORT) as s, s.connect() as c:
            c.send(GET + GET[:9])
            assert [c.response()[0], c.response()[0]] == [200, 408]

    def test_empty_lines_do_not_keep_a_silent_connection(self):
        with serving(drain, timeout_request_head=SHORT) as s, s.connect() as c:
            c.send(b"\r\n")
            assert c.read_all() == b""


class TestKeepAlive:
    """--timeout-keep-alive: the silence between two requests (RFC 9112 §9.5)."""

    def test_an_idle_connection_is_closed_without_an_answer(self):
        with serving(drain, timeout_keep_alive=SHORT) as s, s.connect() as c:
            c.send(GET)
            assert c.response()[0] == 200
            assert c.read_all() == b""

    def test_empty_lines_do_not_keep_it_open(self):
        with serving(drain, timeout_keep_alive=SHORT) as s, s.connect() as c:
            c.send(GET)
            assert c.response()[0] == 200
            drip(c, [b"\r\n"] * 2 + [b""] * 200)
            assert c.read_all() == b""

    def test_a_busy_one_lives_longer_than_the_deadline(self):
        with serving(drain, timeout_keep_alive=GAP / 2) as s, s.connect() as c:
            end = time.monotonic() + GAP
            while time.monotonic() < end:
                c.send(GET)
                assert c.response()[0] == 200
                drip(c, [b""])


class TestBody:
    """--timeout-request-body: the gap between two parts."""

    @pytest.mark.parametrize(
        "data",
        [
            post(b"Content-Length: 10"),
            post(b"Content-Length: 10") + b"part",
            post(b"Transfer-Encoding: chunked") + b"5\r\nhello\r\n",
            post(b"Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\nX: y\r\n",
        ],
    )
    def test_a_body_that_stops_is_408(self, data):
        with serving(drain, timeout_request_body=SHORT) as s, s.connect() as c:
            c.send(data)
            status, fields, _ = c.response()
            assert (status, fields["connection"]) == (408, "close")
            assert c.read_all() == b""

    def test_the_app_learns_that_the_client_is_gone(self):
        seen = []

        async def app(scope, receive, send):
            assert scope["type"] == "http"
            while not seen or seen[-1]["type"] == "http.request":
                seen.append(await receive())

        with serving(app, timeout_request_body=SHORT) as s, s.connect() as c:
            c.send(post(b"Content-Length: 10") + b"part")
            assert c.response()[0] == 408
        assert seen[-1] == {"type": "http.disconnect"}
        assert b"".join(m.get("body", b"") for m in seen) == b"part"

    def test_a_body_that_drips_within_the_gap_is_taken(self):
        chunked = (b"Transfer-Encoding: chunked", b"1\r\nx\r\n", b"0\r\n\r\n")
        counted = (b"Content-Length: 18", b"x", b"")

        def upload(field, piece, end):
            with s.connect() as c:
                c.send(post(field))
                drip(c, [piece] * 18)  # at 50 ms each: longer than one gap
                c.send(end)
                return c.response()[::2]

        with serving(drain, timeout_request_body=GAP) as s, ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(upload, *zip(chunked, counted)))
        assert answers == [(200, b"18")] * 2

    def test_each_body_has_a_gap_of_its_own(self):
        """What if the end of one body and the next head come together, so that no tick
        falls between the two waits?"""
        head = post(b"Content-Length: 1")
        with serving(drain, timeout_request_body=GAP) as s, s.connect() as c:
            c.send(head)
            end = time.monotonic() + 1.5 * GAP
            while (left := end - time.monotonic()) > 0:
                select.select([c.sock], [], [], min(left, 0.6 * GAP))
                c.send(b"x" + head)
                assert c.response()[0] == 200
            c.send(b"x")
            assert c.response()[0] == 200

    def test_who_was_given_a_hint_is_still_asked_for_the_body(self):
        """h11 takes a 103 for the answer to Expect: 100-continue."""
        go = asyncio.Event()

        async def app(scope, receive, send):
            await send({"type": "http.response.early_hint", "links": [b"</x>"]})
            await go.wait()
            await drain(scope, receive, send)

        with serving(app, timeout_request_body=SHORT) as s, s.connect() as c:
            c.send(post(b"Content-Length: 1", b"Expect: 100-continue"))
            c.read_until(b"HTTP/1.1 103 ")
            select.select([c.sock], [], [], LONG)
            s.call(go.set)
            c.read_until(b"HTTP/1.1 100 Continue\r\n\r\n")
            c.send(b"x")
            assert c.response()[0] == 200


class TestTheApp:
    """No deadline runs while it is the app's turn."""

    ALL_SHORT = {
        "timeout_keep_alive": SHORT,
        "timeout_request_head": SHORT,
        "timeout_request_body": SHORT,
    }

    @staticmethod
    async def slow(scope, receive, send):
        """Takes its time, then reads the body, and takes its time again."""
        assert scope["type"] == "http"
        await asyncio.sleep(LONG)  # work
        await drain(scope, receive, send)

    def test_it_may_work_for_longer_than_any(self):
        with serving(self.slow, **self.ALL_SHORT) as s, s.connect() as c:
            c.send(GET)
            assert c.response()[0] == 200

    def test_it_may_ask_for_the_body_as_late_as_it_likes(self):
        """With Expect: 100-continue a client waits to be asked, and so do we."""
        head = post(b"Expect: 100-continue", b"Content-Length: 2")
        with serving(self.slow, **self.ALL_SHORT) as s, s.connect() as c:
            c.send(head)
            assert c.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
            c.send(b"ab")
            assert c.response()[::2] == (200, b"2")

    def test_once_it_has_asked_the_client_has_to_send(self):
        head = post(b"Expect: 100-continue", b"Content-Length: 2")
        with serving(drain, **self.ALL_SHORT) as s, s.connect() as c:
            c.send(head)
            assert c.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
            assert c.response()[0] == 408

    def test_it_may_leave_an_upload_unread_as_long_as_it_likes(self):
        """We have stopped reading then: the client is not to blame for the silence."""
        size = 20_000_000
        with serving(self.slow, **self.ALL_SHORT) as s, s.connect() as c:
            c.send(post(b"Content-Length: %d" % size) + bytes(size))
            assert c.response()[::2] == (200, b"%d" % size)

    def test_once_it_reads_the_upload_the_client_has_to_go_on(self):
        """What if all that we had stopped reading was already there?"""
        with serving(self.slow, **self.ALL_SHORT) as s, s.connect() as c:
            c.send(post(b"Content-Length: 200000") + bytes(100_000))
            assert c.response()[0] == 408

    def test_it_may_stream_with_pauses(self):
        async def app(scope, receive, send):
            assert scope["type"] == "http"
            await send({"type": "http.response.start", "status": 200})
            part = {"type": "http.response.body", "body": b"x"}
            await send({**part, "more_body": True})
            await asyncio.sleep(LONG)
            await send(part)

        with serving(app, **self.ALL_SHORT) as s, s.connect() as c:
            c.send(GET)
            assert c.response()[::2] == (200, b"xx")


class TestReadingClient:
    """SEND_TIMEOUT: a client that reads nothing is dropped, a slow one is not."""

    @pytest.fixture
    def listener(self, monkeypatch):
        """Short deadline, and small buffers, so that what waits, waits with us."""
        monkeypatch.setattr(server, "SEND_TIMEOUT", SHORT)
        found = sockets.bind_tcp("127.0.0.1", 0, 10)[0]
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)
        return found

    def test_a_stream_that_nobody_reads_is_dropped_and_the_app_told(self, listener):
        ends = []

        async def app(scope, receive, send):
            assert scope["type"] == "http"
            await send({"type": "http.response.start", "status": 200})
            part = {"type": "http.response.body", "body": bytes(BIG)}
            try:
                while True:
                    await send({**part, "more_body": True})
            except OSError as exc:
                ends.append(exc)
                raise

        with serving(app, listener=listener) as s, s.connect() as c:
            c.send(GET)
            until(s, lambda: ends and not s.server.connections)
        assert isinstance(ends[0], server.ClientDisconnected)

    @pytest.mark.parametrize("data", [GET, GET * 3], ids=["one", "pipelined"])
    def test_an_answer_that_nobody_reads_is_dropped(self, listener, data):
        async def app(scope, receive, send):
            assert scope["type"] == "http"
            await answer(send, bytes(20_000_000))

        with serving(app, listener=listener) as s, s.connect() as c:
            c.send(data)
            until(s, lambda: s.server.connections)
            until(s, lambda: not s.server.connections)

    def test_so_is_one_that_leaves_a_little_of_a_stream(self, listener):
        """What if it is too little for `send` to wait, and the app has no more?"""

        async def app(scope, receive, send):
            (connection,) = s.server.connections
            connection.transport.set_write_buffer_limits(100_000_000)
            part = {"type": "http.response.body", "body": bytes(20_000_000)}
            await send({"type": "http.response.start", "status": 200})
            await send({**part, "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass

        with serving(app, listener=listener) as s, s.connect() as c:
            c.send(GET)
            until(s, lambda: s.server.connections)
            until(s, lambda: not s.server.connections)

    def test_the_end_of_an_upload_does_not_excuse_it(self, listener):
        """What if the deadline of the body that arrives replaced the one that runs?"""

        async def app(scope, receive, send):
            assert scope["type"] == "http"
            part = {"type": "http.response.body", "body": bytes(20_000_000)}
            await send({"type": "http.response.start", "status": 200})
            await send({**part, "more_body": True})
            await send(part)

        with serving(app, listener=listener) as s, s.connect() as c:
            c.send(post(b"Content-Length: 10") + b"part")
            until(s, lambda: s.server.connections)
            (connection,) = s.call(list, s.server.connections)
            until(s, lambda: not connection.writable.is_set())
            c.send(b"ial---")
            until(s, lambda: not s.server.connections)

    @pytest.mark.skipif(os.name == "nt", reason="a proactor shows no progress in a write")
    def test_a_slow_reader_gets_it_all(self, listener, monkeypatch):
        """In one message or as a stream, and whether or not it is the last answer: all
        four at the same time, because it takes a while."""
        monkeypatch.setattr(server, "SEND_TIMEOUT", GAP / 2)
        monkeypatch.setattr(server, "LINGER", GAP / 2)
        size = 500_000

        async def app(scope, receive, send):
            assert scope["type"] == "http"
            await send({"type": "http.response.start", "status": 200})
            parts = int(scope["path"][1:])
            part = {"type": "http.response.body", "body": bytes(size // parts)}
            for n in range(1, parts + 1):
                await send({**part, "more_body": n < parts})

        with serving(app, listener=listener) as s, ThreadPoolExecutor(4) as pool:
            lasts, parts = [b"", b"Connection: close\r\n"] * 2, [1, 1, 50, 50]
            list(pool.map(self.read_slowly, [s] * 4, lasts, parts, [size] * 4))

    def read_slowly(self, s, last, parts, size):
        with s.connect() as c:
            c.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
            c.send(b"GET /%d HTTP/1.1\r\nHost: test\r\n%b\r\n" % (parts, last))
            started, got = time.monotonic(), 0
            while not c.unread.endswith(b"\r\n0\r\n\r\n"):
                data = c.sock.recv(16_000)
                assert data, f"dropped after {got} bytes: {parts} parts, {last}"
                c.unread, got = data[-9:], got + len(data)
                time.sleep(0.03)  # this is how slow it is
            assert got > size and time.monotonic() - started > 1.2 * GAP


class TestLinger:
    """How long we go on reading behind the last answer (RFC 9112 §9.6): LINGER between
    two reads, LINGER_TOTAL in all."""

    @pytest.mark.parametrize("data", [b"\x00", GET[:-2] + b"Connection: close\r\n\r\n"])
    def test_a_client_that_never_closes_is_left(self, monkeypatch, data):
        monkeypatch.setattr(server, "LINGER", SHORT)
        with serving(drain) as s, s.connect() as c:
            c.send(data)
            assert c.read_all()
            until(s, lambda: not s.server.connections)

    def test_a_client_that_sends_for_ever_is_left_too(self, monkeypatch):
        monkeypatch.setattr(server, "LINGER_TOTAL", SHORT)
        with serving(drain) as s, s.connect() as c:
            c.send(b"\x00")
            assert c.read_all()
            end = time.monotonic() + PATIENCE
            with pytest.raises(OSError):  # nobody is there any more
                while time.monotonic() < end:
                    c.send(b"x")
                    time.sleep(0.01)
