"""How does a connection live, and how does it end?

Chapter 5: in which order requests are answered, how long each side waits for the other,
what is refused and how, and what happens when a client leaves. One loop serves all
connections, so no client may take more than its turn.
"""

import asyncio
import contextlib
import http
import itertools
import os
import queue
import random
import re
import select
import signal
import socket
import threading
import time
import tracemalloc

import pytest
from apps import CHUNKED, CONTINUE, END, EXPECT, GET_10, START, Recorder, answer_with, asking
from apps import body, drain, echo, errors, get, length, narrow, narrow_listener, nodelay
from apps import post, read_body, request, saying, serve, stalled, start, statuses, turns, until
from apps import wait_for_disconnect
from conftest import GET, PATIENCE, Client, Process

import server

KIB, MIB = 1024, 1024 * 1024
LAST = get(b"/last", b"Connection: close")


@pytest.fixture(scope="module")
def echoing():
    with serve(echo) as running:
        yield running


class TestPersistence:
    """RFC 9112 §9.3, persistence; §9.3.2, pipelining."""

    @pytest.mark.parametrize("data", [GET, post(b"hello")], ids=["GET", "an unread body"])
    def test_a_connection_is_kept_alive(self, echoing, data):
        with echoing.connect() as client:
            for _ in range(3):
                client.send(data)
                status, fields, _ = client.response()
                assert (status, fields.get("connection")) == (200, None)

    @pytest.mark.parametrize(
        "data, options",
        [(get(b"/", b"Connection: close"), {}), (get(b"/", b"Connection: Close"), {})]
        + [(get(b"/", b"Connection: x, close"), {})]
        + [(get(b"/", b"Connection: close, keep-alive"), {}), (GET_10, {})]
        + [(request(b"GET / HTTP/1.0", b"Connection: keep-alive"), {})]
        + [(GET, {"timeout_keep_alive": 0})],
    )
    def test_the_last_answer_says_so_and_nothing_behind_it_is_served(self, data, options):
        with asking(echo, data + GET, **options) as (running, client):
            status, fields, _ = client.response()
            assert (status, fields["connection"], client.read_all()) == (200, "close", b"")

    @pytest.mark.parametrize("content", [b"", b"hello"])
    def test_an_unknown_upgrade_is_ignored(self, content):
        """RFC 9110 §7.8: "A server MAY ignore a received Upgrade header field"."""
        data = post(content, b"Upgrade: h2c", b"Connection: upgrade")
        with asking(drain, data + GET) as (running, client):
            assert client.response()[::2] == (200, b"%d" % len(content))
            assert client.response()[::2] == (200, b"0")

    def test_the_rest_of_an_unread_body_is_not_taken_for_a_request(self, echoing):
        with echoing.connect() as client:
            client.send(post(GET * 10 + b"x").removesuffix(b"x"))
            assert statuses(client.read_all()) == [200]

    @pytest.mark.parametrize(
        "data, status",
        [(request(b"POST / HTTP/1.1", b"Content-Length: 20000000"), 200), (b"\0", 400)],
        ids=["answered", "refused"],
    )
    def test_a_client_that_goes_on_sending_gets_no_reset(self, echoing, data, status):
        """Closing with unread bytes would reset the connection, and the reset could
        overtake the answer (RFC 9112 §9.6)."""
        with echoing.connect() as client:
            client.send(data + bytes(10_000_000))
            found, fields, _ = client.response()
            assert (found, fields["connection"]) == (status, "close")
            client.send(bytes(9_999_999))
            assert client.read_all() == b""


def push(client, data):
    """Send until the server takes no more, and return how much it has taken."""
    sent = 0
    while sent < len(data) and select.select([], [client.sock], [], 0.1)[1]:
        sent += client.sock.send(data[sent : sent + 64 * KIB])
    return sent


class TestBackPressure:
    """What if one side is slower? The faster one waits, and the server keeps little."""

    FLOODS = {
        "bodies": post(b"y" * 500) * 2000,
        "trailers": (get(b"/", CHUNKED) + b"0\r\nX: %s\r\n\r\n" % (b"y" * 500)) * 2000,
        "one body": post(bytes(2 * MIB)),
        "one body in chunks": request(b"POST / HTTP/1.1", CHUNKED)
        + b"10\r\n0123456789abcdef\r\n" * 40_000
        + b"0\r\n\r\n",
    }

    @pytest.mark.parametrize("kind", FLOODS)
    def test_a_client_that_sends_without_end_waits_for_the_app(self, kind):
        awake, released, data = asyncio.Event(), asyncio.Event(), self.FLOODS[kind] + LAST

        async def app(scope, receive, send):
            await awake.wait()
            for _ in range(20 if scope["method"] == "POST" and "chunks" in kind else 0):
                await receive()  # a little
            await released.wait()
            await drain(scope, receive, send)

        with asking(app, small_buffers=True) as (running, client):
            sent = push(client, data)
            running.call(awake.set)
            sent += push(client, data[sent:])
            assert sent < 384 * KIB
            running.call(released.set)
            sender = threading.Thread(target=client.send, args=(data[sent:],))
            sender.start()
            assert set(statuses(answers := client.read_all())) == {200}
            assert answers.count(b"HTTP/1.1") == data.count(b"HTTP/1.1")
            sender.join()

    @pytest.mark.parametrize("size, count, most", [(16 * KIB, 300, 60), (4 * MIB, 2, 1)])
    def test_a_client_that_reads_no_answers_makes_no_more_requests(self, size, count, most):
        seen = []

        async def app(scope, receive, send):
            seen.append(scope["path"])
            await answer_with(send, bytes(size))

        with asking(app, GET * (count - 1) + LAST, small_buffers=True) as (running, client):
            assert stalled(running, lambda: len(seen)) <= most
            assert client.read_all().count(b"\0") == count * size
            assert len(seen) == count

    def test_an_app_waits_for_a_client_that_does_not_read(self):
        chunk, count, sent = 256 * KIB, 40, 0

        async def app(scope, receive, send):
            nonlocal sent
            await send(START)
            for _ in range(count):
                await send(body(bytes(chunk), more=True))
                sent += chunk
            await send(END)

        with asking(app, GET, small_buffers=True) as (running, client):
            for read in range(0, 8 * MIB, MIB):
                assert stalled(running, lambda: sent) - read < MIB
                while len(client.unread) < read + MIB:
                    client.unread += client.sock.recv(64 * KIB)
            assert len(client.response()[2]) == chunk * count


class TestHalfClose:
    """RFC 9112 §9.6: a client that has sent its last byte may still be reading."""

    @pytest.mark.parametrize(
        "messages",
        [[start(length(5 * MIB)), body(bytes(5 * MIB))]]
        + [[START, *[body(bytes(64 * KIB), more=True)] * 80, END]],
        ids=["whole", "stream"],
    )
    def test_it_gets_its_whole_answer(self, messages, log):
        with serve(saying(*messages)) as running:
            assert running.talk(GET).count(b"\0") == 5 * MIB
        assert not errors(log)  # asyncio raises if it is closed in resume_writing

    @pytest.mark.parametrize("data", [b"", b"G", GET[:-2], b"\r\n", GET + GET[:-1]])
    def test_half_a_head_is_not_answered(self, echoing, data):
        assert statuses(echoing.talk(data)) == [200] * data.count(GET)


class TestRefusal:
    """One answer, complete in itself, and the last one."""

    BAD = {
        "head": (request(b"%s / HTTP/1.1", b"Content-Length: 1, 1"), 400),
        "size": (request(b"%s / HTTP/1.1", *[b"X: y"] * 101), 431),
        "policy": (request(b"%s / HTTP/1.1", host=b"Host: a,b"), 400),
        "body": (request(b"%s / HTTP/1.1", CHUNKED) + b"x\r\n", 400),
        "app": (request(b"%s /fail HTTP/1.1"), 500),
    }

    async def app(self, scope, receive, send):
        if scope["path"] == "/fail":
            raise SystemExit("as asked")
        await drain(scope, receive, send)

    @pytest.mark.parametrize("method", [b"POST", b"HEAD"])
    @pytest.mark.parametrize("kind", BAD)
    def test_an_error_is_one_answer_with_its_length_and_then_the_end(self, kind, method):
        data, status = self.BAD[kind]
        text = b"%d %s\n" % (status, http.HTTPStatus(status).phrase.encode())
        with asking(self.app, data % method + GET) as (running, client):
            answers = client.read_all()
        head, _, content = answers.partition(b"\r\n\r\n")
        assert statuses(answers) == [status]
        assert content == (b"" if method == b"HEAD" else text)
        for line in [b"Content-Type: text/plain; charset=utf-8", b"Connection: close", b"Date: "]:
            assert b"\r\n" + line in head
        assert b"\r\nContent-Length: %d\r\n" % len(text) in head + b"\r\n"

    def test_over_the_limit_of_requests_it_is_503_until_one_ends(self):
        """--limit-concurrency; RFC 9110 §15.6.4. An idle connection is none."""
        released = asyncio.Event()

        async def app(scope, receive, send):
            if scope["path"] == "/slow":
                await released.wait()
            await answer_with(send)

        with serve(app, limit_concurrency=1) as s, s.connect() as a, s.connect() as b:
            for client in (a, b, a, b):
                client.send(GET)
                assert client.response()[0] == 200
            a.send(get(b"/slow"))
            until(s, lambda: s.server.tasks)
            b.send(GET * 2)
            status, fields, _ = b.response()
            assert (status, fields["connection"]) == (503, "close")
            assert b.read_all() == b""
            s.call(released.set)
            assert a.response()[0] == 200
            assert statuses(s.talk(GET)) == [200]

    @pytest.mark.parametrize(
        "data, reason, shown",
        [(get(b"/", b"no colon"), "illegal header line", "'GET / HTTP")]
        + [(b"\x16\x03\x01\x02\0\x01\0", "this looks like TLS", "\\x16\\x03")],
    )
    def test_the_log_names_the_peer_and_the_reason(self, echoing, log, data, reason, shown):
        with echoing.connect() as client:
            peer = "%s:%d" % client.sock.getsockname()[:2]
            client.send(data)
            assert statuses(client.read_all()) == [400]
        (line,) = [r.getMessage() for r in log.records if peer in r.getMessage()]
        assert line.startswith(f"{peer}: 400, ") and reason in line and shown in line

    @pytest.mark.parametrize("character", [b"\x1b[m", b"\a", b"\0", b"\x7f", b"\x9b"])
    @pytest.mark.parametrize(
        "place",
        [b"%s\r\n\r\n", b"GET /%s HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nX%s\r\n\r\n"]
        + [b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5%s\r\n"],
    )
    def test_control_characters_are_escaped_in_the_log(self, log, character, place):
        with serve(drain) as running:
            running.talk(place % character)
        lines = [r.getMessage() for r in log.records if ": 400, " in r.getMessage()]
        assert lines and not re.search(r"[\x00-\x1f\x7f-\x9f]", "".join(lines)), lines


SHORT = 0.1  # seconds; a deadline that shall pass
LONG = 0.2  # seconds; the ticker notices a client that takes so long
GAP = 0.5  # seconds; a deadline that shall not pass while a client drips


@pytest.fixture
def ticking_fast(monkeypatch):
    monkeypatch.setattr(server, "TICK", 0.02)


def pause(client, seconds):
    """Let the client do nothing for so long, or until the server says something."""
    select.select([client.sock], [], [], seconds)


def drip(client, pieces):
    """Send one piece after the other, slowly, until the server says something."""
    end = time.monotonic() + PATIENCE
    for piece in pieces:
        if select.select([client.sock], [], [], 0.05)[0]:
            return
        with contextlib.suppress(OSError):  # closed just now: reading will tell
            client.send(piece)
        assert time.monotonic() < end


@pytest.mark.usefixtures("ticking_fast")
class TestDeadlinesOfAHead:
    """--timeout-request-head and --timeout-keep-alive (RFC 9112 §9.5). The first counts
    from the first byte of a head; without a byte, a connection is idle."""

    @pytest.mark.parametrize(
        "data, answers",
        [(b"G", [408]), (GET[:-2], [408]), (b"\r\nGET / HTTP/1.1\r", [408])]
        + [(GET + GET[:9], [200, 408]), (b"\r\n", []), (GET + b"\r\n\r\n", [200])],
    )
    def test_half_a_head_is_408_and_an_empty_line_is_no_head(self, data, answers):
        limits = {"timeout_request_head": SHORT, "timeout_keep_alive": SHORT}
        with asking(drain, data, **limits) as (running, client):
            found = client.read_all()
        assert statuses(found) == answers
        assert (b"\r\nConnection: close\r\n" in found) == (408 in answers)

    @pytest.mark.parametrize("before", [b"", GET], ids=["the first", "the second"])
    def test_a_head_that_drips_is_408(self, before):
        """What if one byte comes now and then (slowloris)? It extends nothing."""
        with asking(drain, before, timeout_request_head=SHORT) as (running, client):
            assert not before or client.response()[0] == 200
            client.send(GET[:-2] + b"X: ")
            drip(client, itertools.repeat(b"y"))
            assert client.response()[0] == 408

    @pytest.mark.parametrize("before", [b"", GET], ids=["new", "used"])
    def test_an_idle_connection_is_closed_without_an_answer(self, before):
        limits = {"timeout_keep_alive": SHORT, "timeout_request_head": 1000.0 if before else SHORT}
        with asking(drain, before, **limits) as (running, client):
            assert not before or client.response()[0] == 200
            drip(client, [b""] * 200 if before else [b"\r\n"] * 2 + [b""] * 200)  # empty lines
            assert client.read_all() == b""

    @pytest.mark.parametrize(
        "limits, silence, gap",
        [((1.5 * GAP, 0), 0.9 * GAP, 0.9 * GAP), ((GAP, 3 * GAP), 1.5 * GAP, 0)],
        ids=["head", "keep-alive"],
    )
    def test_a_new_connection_may_be_silent_for_the_longer_of_both(self, limits, silence, gap):
        """Browsers open some in advance. The head then has the whole of its time."""
        options = dict(zip(("timeout_request_head", "timeout_keep_alive"), limits))
        with asking(drain, **options) as (running, client):
            pause(client, silence)
            client.send(GET[:9])
            pause(client, gap)
            client.send(GET[9:])
            assert client.response()[0] == 200


@pytest.mark.usefixtures("ticking_fast")
class TestDeadlineOfABody:
    """--timeout-request-body: the gap between two parts, while the app wants one."""

    @pytest.mark.parametrize(
        "data",
        [
            post(b"").replace(b"0", b"10"),
            post(b"part and the rest")[:-9],
            get(b"/", CHUNKED) + b"5\r\nhello\r\n",
            get(b"/", CHUNKED) + b"5\r\nhello\r\n0\r\nX: y\r\n",
            EXPECT,  # the app has asked with 100
        ],
    )
    def test_a_body_that_stops_is_408_and_the_app_learns_it(self, data):
        seen = []

        async def app(scope, receive, send):
            while not seen or seen[-1]["type"] == "http.request":
                seen.append(await receive())

        with asking(app, data, timeout_request_body=SHORT) as (running, client):
            status, fields, _ = client.response()
            assert (status, fields["connection"]) == (408, "close")
            assert client.read_all() == b""
        assert seen[-1] == {"type": "http.disconnect"}
        assert all(message["more_body"] for message in seen[:-1])

    def test_a_body_that_drips_within_the_gap_is_taken(self):
        head = post(bytes(13)).removesuffix(bytes(13))
        with asking(drain, head, timeout_request_body=GAP) as (running, client):
            drip(client, [b"x"] * 13)  # at 50 ms each: longer than one gap
            assert client.response()[::2] == (200, b"13")


@pytest.mark.usefixtures("ticking_fast")
class TestNoDeadlineForTheApp:
    """No deadline runs while it is the app's turn."""

    NAMES = ("timeout_request_head", "timeout_request_body", "timeout_keep_alive")
    LIMITS = dict.fromkeys(NAMES, 1.5 * LONG)

    @staticmethod
    async def slow(scope, receive, send):
        """Works, then reads the body, and streams its answer with a pause."""
        await asyncio.sleep(2 * LONG)
        size = b"%d" % len(await read_body(receive))
        await send(start(length(len(size))))
        await send(body(b"", more=True))
        await asyncio.sleep(2 * LONG)
        await send(body(size))

    @pytest.mark.parametrize(
        "data, answer",
        [(GET, b"0"), (post(bytes(10 * MIB)), b"%d" % (10 * MIB)), (EXPECT, b"5")],
        ids=["no body", "an upload that we have stopped reading", "Expect: 100-continue"],
    )
    def test_it_may_take_its_time(self, data, answer):
        with asking(self.slow, data, **self.LIMITS) as (running, client):
            if data == EXPECT:
                assert client.read_until(b"\r\n\r\n") == CONTINUE
                client.send(b"hello")
            assert client.response()[::2] == (200, answer)


@pytest.mark.usefixtures("ticking_fast")
class TestDeadlineOfAReader:
    """SEND_TIMEOUT: a client that reads nothing is dropped, a slow one is not."""

    async def part(scope, receive, send):
        await saying(START, body(bytes(MIB), more=True))(scope, receive, send)
        await wait_for_disconnect(receive)

    APPS = {
        "an answer": saying(START, body(bytes(MIB))),
        "a stream": saying(START, *[body(bytes(64 * KIB), more=True)] * 1000, END),
        "a part of a stream": part,
    }

    @pytest.mark.parametrize("app", APPS.values(), ids=APPS)
    def test_a_client_that_reads_nothing_is_dropped(self, app, monkeypatch, log):
        monkeypatch.setattr(server, "SEND_TIMEOUT", SHORT)
        with asking(app, GET * 3, small_buffers=True) as (running, client):
            until(running, lambda: running.server.connections)
            until(running, lambda: not running.server.connections and not running.server.tasks)
        assert not errors(log)

    def test_so_is_one_that_leaves_only_the_end_of_the_last_answer(self, monkeypatch):
        """What if the app has said all, and little of it is unsent?"""
        monkeypatch.setattr(server, "SEND_TIMEOUT", SHORT)
        monkeypatch.setattr(server, "LINGER", SHORT)

        async def app(scope, receive, send):
            await answer_with(send, bytes(int(scope["path"][1:])))

        with serve(app, listener=narrow_listener()) as running, contextlib.ExitStack() as stack:
            for size in range(64 * KIB, 640 * KIB, 32 * KIB):
                client = stack.enter_context(running.connect())
                narrow(client.sock)
                client.send(get(b"/%d" % size, b"Connection: close"))
            until(running, lambda: running.server.connections)
            until(running, lambda: not running.server.connections)

    @pytest.mark.skipif(os.name == "nt", reason="a proactor shows no progress in a write")
    @pytest.mark.parametrize("fields", [(), (b"Connection: close",)], ids=["kept", "last"])
    def test_a_slow_reader_gets_it_all(self, fields, monkeypatch):
        monkeypatch.setattr(server, "SEND_TIMEOUT", GAP)
        monkeypatch.setattr(server, "LINGER", GAP)
        app, started = saying(START, body(bytes(400_000))), time.monotonic()
        with asking(app, get(b"/", *fields), small_buffers=True) as (running, client):
            while not client.unread.endswith(b"\r\n0\r\n\r\n"):
                data = client.sock.recv(16_000)
                assert data, f"dropped after {len(client.unread)} bytes"
                client.unread += data
                time.sleep(0.03)  # this is how slow it is
        assert len(client.unread) > 400_000 and time.monotonic() - started > 1.2 * GAP


@pytest.mark.usefixtures("ticking_fast")
class TestTearDown:
    """RFC 9112 §9.6: we read on behind the last answer, LINGER between two reads and
    LINGER_TOTAL in all; but not once the server stops."""

    @pytest.mark.parametrize("data", [b"\0", LAST], ids=["refused", "answered"])
    def test_a_client_that_never_closes_is_left(self, monkeypatch, data):
        monkeypatch.setattr(server, "LINGER", SHORT)
        with asking(drain, data) as (running, client):
            assert client.read_all()
            until(running, lambda: not running.server.connections)

    def test_a_client_that_sends_for_ever_is_left_too(self, monkeypatch):
        monkeypatch.setattr(server, "LINGER_TOTAL", SHORT)
        with asking(drain, b"\0") as (running, client):
            assert client.read_all()
            end = time.monotonic() + PATIENCE
            with pytest.raises(OSError):  # nobody is there any more
                while time.monotonic() < end:
                    client.send(b"x")
                    time.sleep(0.01)  # its pace; there is nothing to read

    def test_a_stop_does_not_wait_for_a_client_that_never_closes(self, monkeypatch):
        monkeypatch.setattr(server, "LINGER", 1000.0)
        monkeypatch.setattr(server, "LINGER_TOTAL", 1000.0)
        with asking(echo, b"\0", timeout_graceful_shutdown=1000.0) as (running, client):
            assert client.read_all()
            running.stop()

    @pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="SIGHUP is POSIX's")
    def test_a_kept_connection_may_still_be_used_when_its_worker_is_replaced(self):
        """A close after an answer that did not say so would be a 502 of the proxy."""
        arguments = ("--port", 0, "--workers", 2, "--log-level", "debug")
        with Process("example:app", *arguments) as process:
            with process.connect(process.port()) as client:
                client.send(GET)
                assert client.response()[0] == 200
                process.wait_for("is ready after")  # the second of them
                process.process.send_signal(signal.SIGHUP)
                for _ in range(2):
                    process.wait_for("asked by the supervisor: stopping")
                client.send(GET)
                status, fields, _ = client.response()
                assert (status, fields["connection"]) == (200, "close")
            process.interrupt()
            assert process.exit_code() == 0


class Witness:
    """An app that goes on until its client leaves, and says how it learns it. Its path is
    the plan: /read to wait in receive, /chunk to send one first, /flood to send all the
    time, /end to be done before the client leaves."""

    def __init__(self):
        self.said, self.sent = queue.Queue(), 0

    async def __call__(self, scope, receive, send):
        plan = scope["path"]
        watcher = asyncio.create_task(self.watch(receive))
        try:
            if plan == "/read":
                await watcher
            await send(START)
            while plan != "/end":
                await send(body(bytes(MIB) if plan == "/flood" else b"first", more=True))
                self.sent += 1
                if plan == "/chunk":
                    await watcher
                await asyncio.sleep(0)
            await send(END)
        except server.ClientDisconnected:
            with pytest.raises(server.ClientDisconnected):  # it goes on raising
                await send({"type": "unknown"})
            self.said.put("send raised")
            raise
        finally:
            await watcher

    async def watch(self, receive):
        while (await receive())["type"] == "http.request":
            self.said.put("body")
        assert await receive() == {"type": "http.disconnect"}  # it goes on saying so
        self.said.put("receive woke")


POST = post(b"abcdef").replace(b"/", b"/read", 1)
WAKES, BOTH = {"receive woke"}, {"receive woke", "send raised"}

# When a client leaves: what it has sent, what has come of it, and what the app learns.
POINTS = {
    "before the head": (b"", lambda r, c, w: turns(r), set()),
    "in the head": (GET[:-2], lambda r, c, w: turns(r), set()),
    "in the body": (POST[:-3], lambda r, c, w: w.said.get(timeout=PATIENCE), BOTH),
    "after the body": (POST, lambda r, c, w: w.said.get(timeout=PATIENCE), BOTH),
    "after the first chunk": (get(b"/chunk"), lambda r, c, w: c.read_until(b"first"), BOTH),
    "with a full buffer": (get(b"/flood"), lambda r, c, w: stalled(r, lambda: w.sent), BOTH),
    "after the end": (get(b"/end"), lambda r, c, w: c.response(), WAKES),
}
WAYS = {"close": lambda client: client.sock.close(), "reset": Client.reset}


class TestLeaving:
    """ASGI www, "Disconnect", "Disconnected Client - send exception"."""

    @pytest.mark.parametrize("leave", WAYS.values(), ids=WAYS)
    @pytest.mark.parametrize("point", POINTS)
    def test_the_app_learns_it_and_nothing_is_left(self, point, leave, log):
        data, reached, learnt = POINTS[point]
        witness = Witness()
        with serve(witness) as running:
            with running.connect() as client:
                client.send(data)
                reached(running, client, witness)
                leave(client)
            until(running, lambda: not running.server.connections)
            until(running, lambda: not running.server.tasks)
            assert set(witness.said.queue) - {"body"} == learnt
            assert running.talk(get(b"/end"))  # the next client is served
        assert errors(log) == []

    def test_a_stream_that_is_silent_ends_as_frameworks_end_it(self, log):
        """Starlette and FastAPI listen for the client's leaving only below spec_version
        2.4, and otherwise wait for the next `send` to raise."""

        async def stream(scope, receive, send):
            await saying(START, body(b"first", more=True))(scope, receive, send)
            await asyncio.Event().wait()

        async def app(scope, receive, send):
            tasks = [asyncio.create_task(stream(scope, receive, send))]
            if float(scope["asgi"]["spec_version"]) < 2.4:
                tasks.append(asyncio.create_task(wait_for_disconnect(receive)))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()

        with serve(app) as running:
            with running.connect() as client:
                client.send(GET)
                client.read_until(b"first")
            until(running, lambda: not running.server.tasks)
        assert not errors(log)

    def test_send_notices_it_although_the_loop_was_busy(self, log):
        """What if an app sends and sends, and the loop never gets a turn?"""
        left, outcome = threading.Event(), queue.Queue()

        async def app(scope, receive, send):
            await send(START)
            await send(body(b"first", more=True))
            await asyncio.sleep(0)  # one turn, in which it is written
            left.wait(PATIENCE)  # on purpose, it blocks the loop
            try:
                await saying(*[body(bytes(70_000), more=True)] * 1000)(scope, receive, send)
            except OSError as exc:
                outcome.put(type(exc))
                raise

        with asking(app, GET) as (running, client):
            client.read_until(b"first")
            client.reset()
            left.set()
            assert outcome.get(timeout=PATIENCE) is server.ClientDisconnected
        assert errors(log) == []


class TestFairness:
    """One loop for all: whatever one client or app does, the others get their turns."""

    CHUNKS = b"1\r\nx\r\n" * 40_000 + b"0\r\n\r\n"  # they cost h11 half a second
    STREAM = saying(START, *[body(b"\0", more=True)] * 2560, END)
    FLOODS = {
        "a stream": (GET, STREAM, 600),
        "a stream without content": (request(b"HEAD / HTTP/1.1"), STREAM, 600),
        "an upload in tiny chunks": (get(b"/", CHUNKED) + CHUNKS, drain, 1000),
        "pipelined requests": (GET * 1000, drain, 20),
        "pipelined uploads": (post(b"x") * 1000, drain, 30),
    }

    @pytest.mark.parametrize("data, app, most", FLOODS.values(), ids=FLOODS)
    def test_what_never_has_to_wait_lets_others_run(self, data, app, most):
        """We count the bytes that the app receives and the messages that it sends."""
        passed = [0]  # in each turn of the loop

        def tick():
            passed.append(0)
            running.server.loop.call_soon(tick)

        async def counting(scope, receive, send):
            async def counting_receive():
                message = await receive()
                passed[-1] += len(message["body"])
                return message

            async def counting_send(message):
                await send(message)
                passed[-1] += 1

            await app(scope, counting_receive, counting_send)

        with serve(counting) as running:
            running.call(tick)
            assert set(statuses(running.talk(data))) == {200}
        assert sum(passed) > 1000 and max(passed) <= most

    @pytest.mark.skipif(os.name == "nt", reason="select() takes 512 sockets there")
    def test_a_thousand_clients_that_do_not_read_hold_nobody_up(self):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))

        async def app(scope, receive, send):
            await answer_with(send, bytes(MIB if scope["path"] == "/large" else 1))

        with serve(app, listener=narrow_listener()) as running, contextlib.ExitStack() as stack:
            for _ in range(1000):
                client = stack.enter_context(running.connect())
                narrow(client.sock)
                client.send(get(b"/large"))
            until(running, lambda: len(running.server.connections) == 1000)
            assert statuses(running.talk(GET * 20)) == [200] * 20


class TestNagle:
    """TCP_NODELAY: the second part of an answer does not wait for the first one's ACK."""

    def test_nagle_is_off_where_asyncio_leaves_it_on(self):
        """It looks at the listener's proto, which need not say TCP (uvicorn #3149)."""
        with asking(nodelay, GET, small_buffers=True) as (running, client):  # proto is 0
            assert client.response()[2] == b"1"

    @pytest.mark.parametrize("options", [(), ("--workers", 2), ("--reload",), ("--fd",)])
    def test_nagle_is_off_in_every_mode(self, options):
        """Here asyncio does it, too, because no mode loses the listener's proto."""
        if options == ("--fd",) and os.name == "nt":
            pytest.skip("Windows inherits no descriptors")
        with socket.create_server(("127.0.0.1", 0)) as given:
            more = {"pass_fds": [given.fileno()]} if options == ("--fd",) else {}
            arguments = (*options, *more.get("pass_fds", ()), "--port", 0, "--app-dir", "tests")
            with Process("apps:nodelay", *arguments, **more) as process:
                with process.connect(process.port()) as client:
                    client.send(GET)
                    assert client.response()[2] == b"1"


@pytest.fixture(scope="module")
def recording():
    with serve(Recorder()) as running:
        yield running


class TestCutAnywhere:
    """TCP is a stream: where it is cut into packets means nothing."""

    MESSAGES = (
        get(b"/1?a=b"),
        post(b"\r\n\r\nGET /\r\r\n").replace(b"/", b"/2", 1),
        get(b"/3", CHUNKED).replace(b"GET", b"POST")
        + b'3;x="\\";"\r\n\r\n0\r\nb\r\n\r\n0123456\r\n\r\n0\r\nX: y\r\nZ: \r\n\r\n',
        request(b"HEAD /4 HTTP/1.1"),
        get(b"/5", CHUNKED) + b"0\r\n\r\n",
        b"\r\n\r\n" + get(b"/6"),  # as many empty lines as there may be
    )
    # Each twice: the server does not look at an equal head again, but at its body.
    CONVERSATION = b"".join(message * 2 for message in MESSAGES) + LAST

    def answers(self, running, *pieces):
        """All that comes back, with the date masked. Each piece is read alone."""
        with running.connect() as client:
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                client.send(piece)
                running.call(int)
            return re.sub(rb"Date: [^\r]*", b"Date: *", client.read_all())

    def test_the_answers_are_the_expected_ones(self, recording):
        found = self.answers(recording, self.CONVERSATION)
        assert statuses(found) == [200] * 13
        bodies = re.findall(rb"(?:GET|POST) /\w+ \[.*?\](?=HTTP|$)", found, re.DOTALL)
        wanted = [b"GET /1 []", b"POST /2 [\r\n\r\nGET /\r\r\n]"]
        wanted += [b"POST /3 [\r\n0\r\n0123456\r\n]", b"GET /5 []", b"GET /6 []"]
        assert bodies == [each for each in wanted for _ in range(2)] + [b"GET /last []"]

    def test_byte_by_byte_and_a_cut_at_every_position_give_the_same_answers(self, recording):
        data = self.CONVERSATION
        expected = self.answers(recording, data)
        bytewise = (data[i : i + 1] for i in range(len(data)))
        assert self.answers(recording, *bytewise) == expected
        for cut in range(1, len(data)):
            assert self.answers(recording, data[:cut], data[cut:]) == expected, cut


class TestRandomBytes:
    """Whatever arrives: the server answers or closes, and serves the next client."""

    SEEDS = (*TestCutAnywhere.MESSAGES, TestCutAnywhere.CONVERSATION)
    SPICE = (b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b":", b"0", b";", b"\xff")

    def mutated(self, rng):
        data = bytearray(rng.choice(self.SEEDS))
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[at : at + 1] = rng.choice(self.SPICE)
                case 1:
                    del data[at : at + rng.randint(1, 8)]
                case 2:
                    data[at:at] = data[rng.randrange(len(data)) :][:40]
        return bytes(data)

    @pytest.mark.parametrize("seed", range(3))
    def test_mutations_and_noise_are_answered_or_closed(self, recording, log, seed):
        rng = random.Random(seed)
        noise = [rng.randbytes(rng.randint(1, 3000)) for _ in range(20)]
        for data in [self.mutated(rng) for _ in range(80)] + noise:
            found = set(statuses(recording.talk(data)))
            assert found <= ({400, 414} if data in noise else {200, 400, 414, 431, 501, 505}), data
        assert statuses(recording.talk(GET)) == [200]
        assert not errors(log)


@pytest.mark.skipif(os.name == "nt", reason="a proactor keeps 64 KiB for each to read into")
def test_an_idle_connection_costs_a_few_kib():
    """What if each kept buffers of its own, beside the head of its last request?"""
    with serve(drain) as running, contextlib.ExitStack() as stack:
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        assert statuses(running.talk(GET)) == [200]
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(50):
            client = stack.enter_context(running.connect())
            client.send(get(b"/", b"X: " + b"y" * KIB))
            assert client.response()[0] == 200
        until(running, lambda: tracemalloc.get_traced_memory()[0] - before < 600 * KIB)
