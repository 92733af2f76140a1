"""One TCP connection, many requests (chapter 5): in which order they are answered, when
the connection lives on, and how it ends. Which requests are taken is in test_policy.py,
where messages end in test_framing.py, and time in test_deadlines.py.
"""

import asyncio
import contextvars
import gc
import os
import re
import select
import socket
import textwrap
import threading
import time

import pytest
from conftest import GET, PATIENCE, Process, serving

import server
import sockets

BIG = 64 * 1024
CHUNKED = b"Transfer-Encoding: chunked"


async def answer(send, body=b"", status=200):
    fields = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})


async def read_body(receive):
    """The whole request body, or as much of it as came before the client left."""
    parts = []
    while (message := await receive())["type"] == "http.request":
        parts.append(message["body"])
        if not message["more_body"]:
            break
    return b"".join(parts)


async def echo(scope, receive, send):
    """Answers with the path. Reads no body."""
    assert scope["type"] == "http"
    await answer(send, scope["path"].encode())


async def drain(scope, receive, send):
    """Reads the body, and answers with its size."""
    assert scope["type"] == "http"
    await answer(send, b"%d" % len(await read_body(receive)))


@pytest.fixture(scope="module")
def echoing():
    with serving(echo) as s:
        yield s


def request(line=b"GET / HTTP/1.1", *fields, host=b"Host: test"):
    return b"\r\n".join([line, host, *fields, b"", b""])


def statuses(answers):
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def status_of(s, data):
    """The one status that these bytes get; more than one answer is an error."""
    (status,) = statuses(s.talk(data))
    return status


def until(s, question):
    """Ask on the server's loop until the answer is yes."""
    end = time.monotonic() + PATIENCE
    while not (found := s.call(question)):
        assert time.monotonic() < end
    return found


def numbered(*numbers):
    return b"".join(b"GET /%d HTTP/1.1\r\nHost: test\r\n\r\n" % n for n in numbers)


class TestPipelining:
    """RFC 9112 §9.3.2, pipelining."""

    def test_a_pipelined_request_waits_for_the_first_response(self):
        seen, released = [], asyncio.Event()

        async def app(scope, receive, send):
            assert scope["type"] == "http"
            seen.append(scope["path"])
            if scope["path"] == "/1":
                await released.wait()
            await answer(send, scope["path"].encode())

        with serving(app) as s, s.connect() as c:
            c.send(numbered(1, 2))
            until(s, lambda: seen)
            for _ in range(20):  # turns of the loop in which the second could start
                s.call(int)
            assert seen == ["/1"]
            s.call(released.set)
            assert [c.response()[2], c.response()[2]] == [b"/1", b"/2"]

    def test_200_requests_in_one_packet_are_answered_in_order(self, echoing):
        with echoing.connect() as c:
            c.send(numbered(*range(200)))
            paths = [c.response()[2] for _ in range(200)]
        assert paths == [b"/%d" % n for n in range(200)]

    def test_requests_that_fill_the_buffer_are_held_back_and_not_lost(self):
        """What if a client pipelines more than we want to hold, while the app works?"""
        released, count = asyncio.Event(), 4000
        padding = b"HTTP/1.1\r\nX: " + b"y" * 500
        requests = numbered(*range(count)).replace(b"HTTP/1.1", padding)

        async def app(scope, receive, send):
            assert scope["type"] == "http"
            await released.wait()
            await answer(send, scope["path"].encode())

        with serving(app) as s, s.connect() as c:
            sender = threading.Thread(target=c.send, args=(requests,))
            sender.start()
            (connection,) = until(s, lambda: s.server.connections)
            until(s, lambda: not connection.transport.is_reading())
            assert s.call(lambda: len(connection.gate.buffer)) < 512 * 1024
            s.call(released.set)
            for n in range(count):
                assert c.response()[2] == b"/%d" % n
            sender.join()

    @pytest.mark.parametrize("together", [True, False], ids=["pipelined", "one by one"])
    def test_a_request_does_not_see_the_variables_of_the_one_before(self, together):
        """What if it starts inside the other's send? It would inherit its context."""
        variable = contextvars.ContextVar("variable", default="unset")

        async def app(scope, receive, send):
            assert scope["type"] == "http"
            found = variable.get()
            variable.set(scope["path"])
            await answer(send, found.encode())

        with serving(app) as s, s.connect() as c:
            for group in [(1, 2, 3)] if together else [(1,), (2,), (3,)]:
                c.send(numbered(*group))
                for _ in group:
                    assert c.response()[2] == b"unset"

    def test_what_follows_a_refusal_is_never_served(self, echoing):
        answers = echoing.talk(numbered(1) + request(host=b"Host: a,b") + numbered(2))
        assert statuses(answers) == [200, 400]
        assert b"/2" not in answers

    def test_what_follows_connection_close_is_never_served(self, echoing):
        last = request(b"GET /last HTTP/1.1", b"Connection: close")
        answers = echoing.talk(numbered(1) + last + numbered(2))
        assert statuses(answers) == [200, 200] and b"/2" not in answers


class TestPersistence:
    """RFC 9112 §9.3, persistence; §9.6, tear-down."""

    def test_a_connection_is_kept_alive(self, echoing):
        with echoing.connect() as c:
            for _ in range(3):
                c.send(GET)
                assert c.response()[1].get("connection") is None

    @pytest.mark.parametrize(
        "value", [b"close", b"Close", b"x, close", b"close, keep-alive"]
    )
    def test_connection_close_closes(self, echoing, value):
        with echoing.connect() as c:
            c.send(request(b"GET / HTTP/1.1", b"Connection: " + value))
            status, fields, _ = c.response()
            assert (status, fields["connection"], c.read_all()) == (200, "close", b"")

    @pytest.mark.parametrize("fields", [(), (b"Connection: keep-alive",)])
    def test_http_1_0_closes_after_the_answer(self, echoing, fields):
        with echoing.connect() as c:
            c.send(request(b"GET / HTTP/1.0", *fields))
            status, fields, _ = c.response()
            assert (status, fields["connection"], c.read_all()) == (200, "close", b"")

    def test_http_1_0_is_never_chunked(self):
        async def app(scope, receive, send):
            assert scope["type"] == "http"
            await send({"type": "http.response.start", "status": 200})
            part = {"type": "http.response.body", "body": b"part"}
            for more in (True, True, False):
                await send({**part, "more_body": more})

        with serving(app) as s:
            answers = s.talk(request(b"GET / HTTP/1.0"))
            assert b"chunked" not in answers.lower()
            assert answers.endswith(b"\r\n\r\npartpartpart")
            assert b"chunked" in s.talk(request()).lower()

    @pytest.mark.parametrize("protocol", [b"h2c", b"foo/2", b"TLS/1.0"])
    @pytest.mark.parametrize("body", [b"", b"hello"])
    def test_an_unknown_upgrade_is_ignored(self, protocol, body):
        """RFC 9110 §7.8: "A server MAY ignore a received Upgrade header field"."""
        fields = [b"Upgrade: " + protocol, b"Connection: upgrade"]
        fields += [b"Content-Length: 5"] if body else []
        with serving(drain) as s, s.connect() as c:
            c.send(request(b"POST / HTTP/1.1", *fields) + body + GET)
            assert c.response()[::2] == (200, b"%d" % len(body))
            assert c.response()[::2] == (200, b"0")

    @pytest.mark.parametrize("early", [True, False])
    def test_a_client_that_goes_on_sending_gets_no_reset(self, echoing, early):
        """What if the app does not read the body? Closing with unread bytes would reset
        the connection, and the reset could overtake the answer (§9.6)."""
        with echoing.connect() as c:
            c.send(request(b"POST / HTTP/1.1", b"Content-Length: 20000000"))
            if early:
                c.send(bytes(19_999_999))
            status, fields, _ = c.response()
            assert (status, fields["connection"]) == (200, "close")
            if not early:
                c.send(bytes(19_999_999))
            assert c.read_all() == b""

    def test_a_refused_client_that_goes_on_sending_gets_the_answer(self, echoing):
        with echoing.connect() as c:
            c.send(b"\x00\r\n\r\n" + bytes(20_000_000))
            assert statuses(c.read_all()) == [400]

    def test_the_rest_of_an_unread_body_is_not_taken_for_a_request(self, echoing):
        body = GET * 10
        field = b"Content-Length: %d" % (len(body) + 1)
        with echoing.connect() as c:
            c.send(request(b"POST /1 HTTP/1.1", field) + body)
            assert statuses(c.read_all()) == [200]

    def test_a_whole_body_that_the_app_did_not_read_ends_nothing(self, echoing):
        with echoing.connect() as c:
            for _ in range(3):
                c.send(request(b"POST / HTTP/1.1", b"Content-Length: 5") + b"hello")
                assert c.response()[0] == 200


class TestHalfClose:
    """RFC 9112 §9.6: a client that has said all may still be listening."""

    def test_a_half_closed_client_gets_its_whole_answer(self, log):
        async def app(scope, receive, send):
            assert scope["type"] == "http"
            await answer(send, bytes(5_000_000))

        with serving(app) as s:
            assert s.talk(GET).endswith(bytes(5_000_000))
        # asyncio raises if it is closed in resume_writing.
        assert not [r for r in log.records if r.levelname == "ERROR"]

    def test_a_half_closed_client_gets_its_whole_stream(self):
        async def app(scope, receive, send):
            assert scope["type"] == "http"
            await read_body(receive)
            await send({"type": "http.response.start", "status": 200})
            part = {"type": "http.response.body", "body": bytes(BIG)}
            for _ in range(100):
                await send({**part, "more_body": True})
            await send({"type": "http.response.body"})

        with serving(app) as s, s.connect() as c:
            c.send(GET)
            c.half_close()
            assert len(c.response()[2]) == 100 * BIG
            assert c.read_all() == b""

    def test_every_pipelined_request_is_still_answered(self, echoing):
        assert statuses(echoing.talk(GET * 20)) == [200] * 20

    @pytest.mark.parametrize("data", [b"", b"G", GET[:-2], b"\r\n", GET + GET[:-1]])
    def test_half_a_head_is_not_answered(self, echoing, data):
        assert statuses(echoing.talk(data)) == [200] * data.count(GET)

    @pytest.mark.parametrize("field", [b"Content-Length: 10", CHUNKED])
    def test_half_a_body_is_400(self, field):
        """RFC 9112 §8: an incomplete request may be answered with an error."""
        with serving(drain) as s:
            assert status_of(s, request(b"POST / HTTP/1.1", field) + b"5\r\nhe") == 400


class TestErrorAnswers:
    """One answer, complete in itself, and the last one."""

    BAD = {
        "gate": (request(b"%s / HTTP/1.1", b"Content-Length: 1, 1"), 400),
        "h11": (request(b"%s / HTTP/1.1", b"Transfer-Encoding: gzip"), 501),
        "policy": (request(b"%s / HTTP/1.1", host=b"Host: a,b"), 400),
        "body": (request(b"%s / HTTP/1.1", CHUNKED) + b"x\r\n", 400),
        "app": (request(b"%s /fail HTTP/1.1"), 500),
    }

    async def app(self, scope, receive, send):
        assert scope["type"] == "http"
        if scope["path"] == "/fail":
            raise SystemExit("as asked")
        await read_body(receive)
        await answer(send)

    @pytest.mark.parametrize("kind", BAD)
    def test_an_error_is_one_answer_with_its_length_and_then_the_end(self, kind):
        data, status = self.BAD[kind]
        with serving(self.app) as s, s.connect() as c:
            c.send(data % b"POST" + GET)
            found, fields, body = c.response()
            assert (found, fields["connection"]) == (status, "close")
            assert fields["content-type"].startswith("text/plain")
            assert int(fields["content-length"]) == len(body) > 0
            assert body.startswith(b"%d " % status) and fields["date"]
            assert c.read_all() == b""

    @pytest.mark.parametrize("kind", BAD)
    def test_an_error_to_head_has_no_body(self, kind):
        data, status = self.BAD[kind]
        with serving(self.app) as s, s.connect() as c:
            c.send(data % b"HEAD" + GET)
            answers = c.read_all()
        assert statuses(answers) == [status]
        assert re.search(rb"content-length: [1-9]", answers)
        assert answers.endswith(b"\r\n\r\n")


class TestFlowControl:
    """What if one side is slower? The faster one waits, and nobody hoards."""

    def test_an_upload_that_the_app_does_not_read_is_not_taken_in(self):
        released = asyncio.Event()

        async def app(scope, receive, send):
            assert scope["type"] == "http"
            await released.wait()
            await answer(send, b"%d" % len(await read_body(receive)))

        with serving(app) as s, s.connect() as c:
            total, sent = 50_000_000, 0
            c.send(request(b"POST / HTTP/1.1", b"Content-Length: %d" % total))
            while select.select([], [c.sock], [], 0.5)[1]:
                sent += c.sock.send(bytes(BIG))
                assert sent < total / 2, "the server takes in whatever comes"
            (connection,) = until(s, lambda: s.server.connections)
            assert s.call(lambda: connection.cycle.body_size) <= 64 * 1024 + 256 * 1024
            s.call(released.set)
            c.send(bytes(total - sent))  # and now it all goes through
            assert c.response()[::2] == (200, b"%d" % total)

    def test_an_app_waits_for_a_client_that_does_not_read(self):
        most = []

        async def app(scope, receive, send):
            assert scope["type"] == "http"
            (connection,) = s.server.connections
            await send({"type": "http.response.start", "status": 200})
            part = {"type": "http.response.body", "body": bytes(BIG)}
            for _ in range(200):
                await send({**part, "more_body": True})
                most.append(connection.transport.get_write_buffer_size())
            await send({"type": "http.response.body"})

        with serving(app) as s, s.connect() as c:
            c.send(GET)
            until(s, lambda: most)
            assert len(c.response()[2]) == 200 * BIG
        assert max(most) < 4 * BIG

    @pytest.mark.skipif(
        not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="this system has no such bound"
    )
    def test_the_kernel_holds_little_for_a_client_that_does_not_read(self):
        """What if a thousand do? Linux would take 2.5 MB for each, and a second for all."""
        taken, full = [], threading.Event()

        async def app(scope, receive, send):
            assert scope["type"] == "http"
            (connection,) = s.server.connections
            await send({"type": "http.response.start", "status": 200})
            part = {"type": "http.response.body", "body": bytes(16 * 1024)}
            while connection.writable.is_set():
                await send({**part, "more_body": True})
                taken.append(16 * 1024)
            full.set()

        with serving(app) as s, socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(s.address)
            client.sendall(GET)
            assert full.wait(PATIENCE)
        assert sum(taken) < 1024 * 1024

    def test_a_request_waits_until_the_answer_before_it_is_read(self):
        seen = []

        async def app(scope, receive, send):
            assert scope["type"] == "http"
            seen.append(scope["path"])
            await answer(send, bytes(10_000_000))

        with serving(app) as s, s.connect() as c:
            c.send(numbered(1) + request(b"GET /2 HTTP/1.1", b"Connection: close"))
            (connection,) = until(s, lambda: s.server.connections)
            until(s, lambda: not connection.writable.is_set())
            for _ in range(20):  # turns of the loop in which the second could start
                s.call(int)
            assert seen == ["/1"]
            assert len(c.read_all()) > 20_000_000
            assert seen == ["/1", "/2"]

    def test_a_client_that_reads_nothing_cannot_make_requests_without_end(self):
        """What if it pipelines, and never reads? Answers must not pile up either."""

        async def app(scope, receive, send):
            assert scope["type"] == "http"
            await answer(send, bytes(BIG))

        with serving(app) as s, s.connect() as c:
            sender = threading.Thread(target=c.send, args=(GET * 2000,))
            sender.start()
            (connection,) = until(s, lambda: s.server.connections)
            until(s, lambda: connection.transport.get_write_buffer_size() > 0)
            for _ in range(100):
                assert s.call(connection.transport.get_write_buffer_size) < 4 * BIG
            for _ in range(2000):
                assert len(c.response()[2]) == BIG
            sender.join()


class TestNoDelay:
    """Nagle's algorithm and delayed ACKs cost 40 ms an answer; asyncio switches it off
    only where the socket's proto says TCP (uvicorn #3149)."""

    def check(self, listener):
        with serving(echo, listener=listener) as s, s.connect() as c:
            c.send(GET)
            assert c.response()[0] == 200
            (connection,) = until(s, lambda: s.server.connections)
            accepted = connection.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    def test_it_is_off_for_a_listener_of_ours(self):
        self.check(sockets.bind_tcp("127.0.0.1", 0, 10)[0])

    def test_it_is_off_for_an_adopted_listener(self):
        given = socket.create_server(("127.0.0.1", 0))
        self.check(sockets.adopt(given.detach(), 10))


class TestConcurrency:
    """--limit-concurrency: over the limit, 503 (RFC 9110 §15.6.4, §10.2.3)."""

    def test_over_the_limit_is_503_until_a_request_ends(self):
        released = asyncio.Event()

        async def app(scope, receive, send):
            assert scope["type"] == "http"
            await released.wait()
            await answer(send, b"done")

        with serving(app, limit_concurrency=2) as s, s.connect() as a, s.connect() as b:
            a.send(GET)
            b.send(GET)
            until(s, lambda: len(s.server.tasks) == 2)
            with s.connect() as c:
                c.send(GET * 2)
                status, fields, _ = c.response()
                assert (status, fields["connection"]) == (503, "close")
                assert fields["retry-after"].isdecimal() and c.read_all() == b""
            s.call(released.set)
            assert [a.response()[2], b.response()[2]] == [b"done"] * 2
            assert statuses(s.talk(GET * 3)) == [200] * 3

    def test_idle_connections_do_not_count(self):
        with serving(echo, limit_concurrency=1) as s:
            with s.connect() as a, s.connect() as b:
                for client in (a, b, a, b):
                    client.send(GET)
                    assert client.response()[0] == 200


class TestAccepting:
    """What if a client is gone before it is accepted? Only that one has a problem."""

    @pytest.mark.parametrize("loop", ["auto", "selector"])
    def test_resets_in_the_backlog_do_not_stop_the_others(self, loop, log):
        with serving(echo, loop=loop) as s:
            for _ in range(3):
                all_have_left = threading.Event()
                s.server.loop.call_soon_threadsafe(all_have_left.wait, PATIENCE)
                for client in [s.connect() for _ in range(20)]:
                    client.reset()
                all_have_left.set()
                with s.connect() as c:
                    c.send(GET)
                    assert c.response()[0] == 200
        assert "cannot accept" not in log.text


class TestDescriptors:
    """What if the process is out of file descriptors?"""

    APP = """
        import resource
        from example import app
        resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
        """

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no RLIMIT_NOFILE")
    def test_old_connections_go_on_and_new_ones_wait(self, tmp_path):
        (tmp_path / "few_files.py").write_text(textwrap.dedent(self.APP))
        with Process("few_files:app", "--app-dir", tmp_path, "--port", 0) as p:
            port, started = p.port(), time.monotonic()
            with p.connect(port) as first:
                first.send(GET)
                assert first.response()[0] == 200
                others = [p.connect(port) for _ in range(40)]
                p.wait_for("cannot accept connections: .*Too many open files")
                first.send(GET)
                assert first.response()[0] == 200
                for other in others:
                    other.sock.close()
            with p.connect(port) as later:
                later.send(GET)
                assert later.response()[0] == 200
            seconds = time.monotonic() - started
            p.interrupt()
            assert p.exit_code() == 0
        assert p.output.count("cannot accept") <= seconds + 1
        assert "Traceback" not in p.output


    def test_so_do_those_that_select_has_no_place_for(self, monkeypatch, log):
        """On Windows it takes 512; the 513th would end the loop and the server."""
        monkeypatch.setattr(server, "MOST_CONNECTIONS", 2)
        with serving(echo, loop="selector") as s:
            with s.connect() as first, s.connect() as second:
                for client in (first, second, first):
                    client.send(GET)
                    assert client.response()[0] == 200
                third = s.connect()
                until(s, lambda: "cannot accept connections: select()" in log.text)
                first.send(GET)
                assert first.response()[0] == 200
            with third:
                third.send(GET)
                assert third.response()[0] == 200


class TestNoLeak:
    """What is left after a thousand requests and 200 clients that just went away?"""

    PARTS = (b"", b"GET", GET[:-2], GET, GET + b"GET /")
    PARTS += (request(b"POST / HTTP/1.1", b"Content-Length: 9") + b"part",)

    def use(self, s):
        for _ in range(10):
            with s.connect() as c:
                for _ in range(100):
                    c.send(GET)
                    assert c.response()[0] == 200
        for n in range(200):
            with s.connect() as c:
                c.send(self.PARTS[n % len(self.PARTS)])
                if n % 2:
                    c.reset()
        assert s.talk(GET)  # so those that left in the backlog have been accepted, too
        until(s, lambda: not s.server.connections and not s.server.tasks)

    def left(self, s):
        gc.collect()
        folder = "/proc/self/fd"
        files = os.listdir(folder) if os.path.exists(folder) else ()
        return len(files), s.call(lambda: len(asyncio.all_tasks())), len(s.server.tasks)

    @pytest.mark.skipif(
        os.name == "nt", reason="asyncio leaves failed accepts open (cpython #93821)"
    )
    def test_descriptors_and_tasks_are_as_before(self):
        with serving(drain) as s:
            assert s.talk(GET)
            until(s, lambda: not s.server.connections)
            before = self.left(s)
            self.use(s)
            assert self.left(s) == before
