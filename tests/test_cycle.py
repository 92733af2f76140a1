"""Chapter 6, the easy path: what an app receives, and a response in pieces. The other
pages are test_scope.py, test_response.py, test_misuse.py, test_leaving.py and
test_stopping.py; what they share stands here, above the first class."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
import time

import pytest
from conftest import GET, PATIENCE, serving

import server

serve = functools.partial(serving, lifespan="off")

START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body"}
GET_10 = b"GET / HTTP/1.0\r\n\r\n"
EXPECT = (
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def start(*fields, status=200):
    return {"type": "http.response.start", "status": status, "headers": fields}


def body(data, more=False):
    return {"type": "http.response.body", "body": data, "more_body": more}


def post(data):
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data)
    return head + data


def saying(*messages):
    """An app that sends these."""

    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    return app


def answer(messages, request=GET, **options) -> bytes:
    """All bytes that answer a request when the app sends these messages."""
    with serve(saying(*messages), **options) as running:
        return running.talk(request)


def fields_of(data: bytes) -> list[bytes]:
    """The field lines of a response, with lower-case names, and Date left out."""
    lines = data.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    pairs = [line.partition(b": ") for line in lines]
    return [n.lower() + b": " + v for n, _, v in pairs if n.lower() != b"date"]


def length(size):
    return (b"Content-Length", b"%d" % size)


def get(target: bytes, *fields: bytes) -> bytes:
    lines = [b"GET " + target + b" HTTP/1.1", b"Host: x", *fields]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def until(running, condition) -> None:
    """Ask the server's loop until something is so, or the deadline passes."""
    deadline = time.monotonic() + PATIENCE
    while not running.call(condition):
        assert time.monotonic() < deadline, "it never became so"


def reading(seen: queue.Queue):
    """An app that puts what it receives into `seen`, and answers after the body."""

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            seen.put(message)
            more = message.get("more_body", False)
        await send(START)
        await send(END)

    return app


def request_message(data, more=False):
    return {"type": "http.request", "body": data, "more_body": more}


class TestReceive:
    """ASGI www, "Request - receive event" and "Disconnect - receive event"."""

    @pytest.mark.parametrize(
        "request_bytes, expected",
        [
            (GET, b""),
            (post(b""), b""),
            (post(b"hello"), b"hello"),
            (
                get(b"/", b"Transfer-Encoding: chunked")
                + b"2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n",
                b"hello",
            ),
        ],
    )
    def test_a_short_body_is_one_message(self, request_bytes, expected):
        seen = queue.Queue()
        with serve(reading(seen)) as running:
            running.talk(request_bytes)
        assert list(seen.queue) == [request_message(expected)]

    def test_a_body_is_handed_on_as_it_arrives(self):
        seen = queue.Queue()
        with serve(reading(seen)) as running, running.connect() as client:
            client.send(post(b"abcdef")[:-3])
            assert seen.get(timeout=PATIENCE) == request_message(b"abc", more=True)
            client.send(b"def")
            assert seen.get(timeout=PATIENCE) == request_message(b"def")
            assert client.response()[0] == 200

    @pytest.mark.parametrize("chunked", [False, True])
    def test_a_large_upload_arrives_whole_and_in_order(self, chunked):
        upload = b"".join(b"%07d\n" % number for number in range(500_000))
        request, seen = post(upload), queue.Queue()
        if chunked:
            parts = [upload[i : i + 9999] for i in range(0, len(upload), 9999)]
            lines = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts]
            request = get(b"/", b"Transfer-Encoding: chunked") + b"".join(lines)
            request += b"0\r\n\r\n"
        with serve(reading(seen)) as running:
            assert b"200 OK" in running.talk(request)
        messages = list(seen.queue)
        assert b"".join(m["body"] for m in messages) == upload
        *others, last = [message["more_body"] for message in messages]
        assert last is False and all(others)

    def test_an_app_that_reads_late_holds_the_client_up(self):
        """Back-pressure: no more is kept in memory than HIGH_WATER and one read."""
        upload, sizes, go = bytes(10_000_000), [], asyncio.Event()

        async def app(scope, receive, send):
            await go.wait()
            sizes.append(len((await receive())["body"]))
            await send(START)
            await send(END)

        with serve(app) as running, running.connect() as client:
            writer = threading.Thread(target=try_send, args=(client, post(upload)))
            writer.start()
            until(running, lambda: any(c.cycle for c in running.server.connections))
            connection = next(iter(running.server.connections))
            until(running, lambda: not connection.transport.is_reading())
            running.call(go.set)
            writer.join(PATIENCE)
        assert sizes[0] < 1_000_000

    def test_a_client_that_half_closes_still_gets_its_whole_answer(self):
        seen = queue.Queue()

        async def app(scope, receive, send):
            seen.put(await receive())
            seen.put(await receive())
            await send(START)
            await send(body(b"all ", more=True))
            await send(body(b"of it"))

        with serve(app) as running, running.connect() as client:
            client.send(post(b"x"))
            client.half_close()
            assert client.response()[2] == b"all of it"
        assert list(seen.queue) == [request_message(b"x"), {"type": "http.disconnect"}]

    def test_after_the_response_receive_says_disconnect_at_once(self):
        seen = queue.Queue()

        async def app(scope, receive, send):
            await send(START)
            await send(END)
            seen.put([await receive(), await receive()])

        with serve(app) as running, running.connect() as client:
            client.send(post(b"never read"))
            assert client.response()[0] == 200
            assert seen.get(timeout=PATIENCE) == [{"type": "http.disconnect"}] * 2

    def test_a_waiting_receive_wakes_when_the_response_is_complete(self):
        seen = queue.Queue()

        async def app(scope, receive, send):
            await receive()
            listener = asyncio.create_task(receive())
            await send(START)
            await send(END)
            seen.put(await listener)

        with serve(app) as running, running.connect() as client:
            client.send(GET)
            assert seen.get(timeout=PATIENCE) == {"type": "http.disconnect"}

    def test_of_several_receives_one_gets_the_body_and_all_the_end(self):
        waiting, seen = threading.Event(), queue.Queue()

        async def app(scope, receive, send):
            tasks = [asyncio.create_task(receive()) for _ in range(3)]
            await asyncio.sleep(0)
            waiting.set()
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await send(START)
            await send(END)
            seen.put(await asyncio.gather(*tasks))

        with serve(app) as running, running.connect() as client:
            client.send(post(b"x")[:-1])
            assert waiting.wait(PATIENCE)
            client.send(b"x")
            messages = seen.get(timeout=PATIENCE)
        assert messages.count(request_message(b"x")) == 1
        assert messages.count({"type": "http.disconnect"}) == 2


def try_send(client, data):
    with contextlib.suppress(OSError):  # the server may end the connection first
        client.send(data)


class TestExpectContinue:
    """RFC 9110 §10.1.1."""

    def test_continue_is_sent_only_when_the_app_asks_for_the_body(self):
        go, asked = asyncio.Event(), threading.Event()

        async def app(scope, receive, send):
            asked.set()
            await go.wait()
            message = await receive()
            await send(START)
            await send(body(message["body"]))

        with serve(app) as running, running.connect() as client:
            client.send(EXPECT)
            assert asked.wait(PATIENCE)
            client.sock.setblocking(False)
            with pytest.raises(BlockingIOError):  # nothing has been said yet
                client.sock.recv(1)
            client.sock.settimeout(PATIENCE)
            running.call(go.set)
            assert client.read_until(b"\r\n\r\n") == CONTINUE
            client.send(b"hello")
            assert client.response()[2] == b"hello"

    def test_an_app_that_does_not_read_sends_no_continue_and_closes(self):
        with serve(saying(START, body(b"no"))) as running, running.connect() as client:
            client.send(EXPECT)
            data = client.read_all()
        assert data.startswith(b"HTTP/1.1 200") and b"100 Continue" not in data
        assert b"connection: close" in fields_of(data)

    def test_no_continue_follows_the_start_of_the_response(self):
        async def app(scope, receive, send):
            await send(START)
            await send(body(b"first", more=True))
            await receive()
            await send(END)

        with serve(app) as running, running.connect() as client:
            client.send(EXPECT)
            head = client.read_until(b"first\r\n")
            client.send(b"hello")
            assert b"100 Continue" not in head + client.read_until(b"0\r\n\r\n")

    def test_http_1_0_never_gets_one(self):
        seen = queue.Queue()
        with serve(reading(seen)) as running, running.connect() as client:
            client.send(EXPECT.replace(b"1.1", b"1.0") + b"hello")
            assert client.read_all().startswith(b"HTTP/1.1 200")
        assert seen.get() == request_message(b"hello")

    def test_a_late_receive_does_not_continue_the_next_request(self):
        """What if background work of one request reads while the next one waits?"""
        go, seen, second = asyncio.Event(), queue.Queue(), threading.Event()

        async def app(scope, receive, send):
            if scope["method"] == "GET":
                await send(START)
                await send(END)
                await go.wait()
                seen.put(await receive())
                return
            second.set()
            await go.wait()
            while seen.empty():
                await asyncio.sleep(0)
            await send(START)
            await send(END)

        with serve(app) as running, running.connect() as client:
            client.send(GET + EXPECT)
            assert client.response()[0] == 200 and second.wait(PATIENCE)
            running.call(go.set)
            assert client.read_all().startswith(b"HTTP/1.1 200")
        assert seen.get() == {"type": "http.disconnect"}


@pytest.fixture
def writes(monkeypatch):
    """The size of each write, without the frame of what is only framed in it."""
    sizes, flush = [], server.HTTPConnection.flush

    def counted(self):
        if self.joined:
            sizes.append(self.joined_size)
        flush(self)

    monkeypatch.setattr(server.HTTPConnection, "flush", counted)
    return sizes


class TestStream:
    """ASGI www, "Response Body - send event"."""

    def test_the_head_waits_for_the_first_body_message(self):
        go, started = asyncio.Event(), threading.Event()

        async def app(scope, receive, send):
            await send(START)
            started.set()
            await go.wait()
            raise ValueError("changed my mind")

        with serve(app) as running, running.connect() as client:
            client.send(GET)
            assert started.wait(PATIENCE)
            running.call(go.set)
            assert client.read_all().startswith(b"HTTP/1.1 500 ")

    @pytest.mark.parametrize("request_bytes", [GET, GET_10])
    def test_each_chunk_leaves_without_waiting_for_the_next(self, request_bytes):
        go = asyncio.Event()

        async def app(scope, receive, send):
            await send(START)
            for number in range(3):
                await send(body(b"chunk %d;" % number, more=True))
                await go.wait()
                go.clear()
            await send(END)

        with serve(app) as running, running.connect() as client:
            client.send(request_bytes)
            for number in range(3):
                client.read_until(b"chunk %d;" % number)
                running.call(go.set)
            client.half_close()
            assert client.read_all() in (b"", b"\r\n0\r\n\r\n")

    def test_an_empty_first_chunk_sends_the_head(self):
        go = asyncio.Event()

        async def app(scope, receive, send):
            await send(START)
            await send(body(b"", more=True))
            await go.wait()
            await send(END)

        with serve(app) as running, running.connect() as client:
            client.send(GET)
            assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
            running.call(go.set)
            assert client.read_until(b"0\r\n\r\n") == b"0\r\n\r\n"

    def test_chunks_of_one_turn_of_the_loop_share_a_write(self, writes):
        chunks = [body(b"x" * 100, more=True)] * 10
        assert answer([START, *chunks, END]).count(b"x") == 1000
        assert len(writes) == 1

    def test_of_many_senders_only_one_goes_on_when_the_client_reads(self):
        unsent = []

        async def app(scope, receive, send):
            (connection,) = running.server.connections

            async def part():
                await send(body(b"x" * 2**18, more=True))
                unsent.append(connection.transport.get_write_buffer_size())

            await send(START)
            await asyncio.gather(*(part() for _ in range(20)))
            await send(END)

        with serve(app) as running, running.connect() as client:
            client.send(GET)
            assert len(client.response()[2]) == 20 * 2**18
        assert max(unsent) < 2**20

    @pytest.mark.parametrize("size", [5, 100_000])
    def test_an_answer_of_one_chunk_is_one_write(self, size, writes):
        """Its head, the chunk and the end, also where a stream would be written."""
        assert answer([START, body(b"x" * size)]).count(b"x") == size
        assert len(writes) == 1

    def test_joined_chunks_are_written_before_they_are_too_many(self, writes):
        """A stream that never waits must not be gathered in memory."""
        early = []

        async def app(scope, receive, send):
            await send(START)
            for _ in range(100):
                await send(body(b"x" * 1024, more=True))
            early.extend(writes)
            await send(END)

        with serve(app) as running:
            assert running.talk(GET).count(b"x") == 100 * 1024
        assert early and max(early) < 70 * 1024

    @pytest.mark.parametrize("request_bytes", [GET, GET_10])
    def test_order_is_kept(self, request_bytes):
        numbers = [b"%d " % number for number in range(30_000)]

        async def app(scope, receive, send):
            await send(START)
            for index, number in enumerate(numbers):
                await send(body(number, more=True))
                if index % 777 == 0:
                    await asyncio.sleep(0)
            await send(END)

        with serve(app) as running, running.connect() as client:
            client.send(request_bytes)
            assert client.response()[2] == b"".join(numbers)
