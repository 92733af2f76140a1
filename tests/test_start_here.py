"""Start here: what a server does, in eleven tests, and the two tools of all the others.

`serving` runs an app in a thread of this process, and gives us a `Client` that speaks
bytes over a real socket. `Process` starts a real `python server.py` and reads its log.
Both are in conftest.py. README.md beside this file says which tests to read next.
"""

import queue

import frames
from conftest import GET, PATIENCE, Process, fetch, refuses, serving

import ws_echo

POST = b"POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"


async def hello(scope, receive, send):
    """A whole ASGI application: a head, and then a body."""
    assert scope["type"] == "http"  # any exception says: I do without lifespan
    body = f"{scope['method']} {scope['path']}".encode()
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


class TestARequest:
    """One app in this process, one client, and the bytes between them."""

    def test_the_app_is_asked_and_its_answer_is_sent(self):
        with serving(hello) as running, running.connect() as client:
            client.send(b"GET /a%20b?c=d HTTP/1.1\r\nHost: test\r\n\r\n")
            status, fields, body = client.response()
        assert (status, body) == (200, b"GET /a b")
        assert fields["server"] == "foal" and "date" in fields

    def test_a_connection_serves_one_request_after_the_other(self):
        """RFC 9112 §9.3.2: the client need not wait for an answer before it asks again."""
        with serving(hello) as running, running.connect() as client:
            client.send(GET + GET.replace(b"/ ", b"/2 "))
            assert [client.response()[2] for _ in range(2)] == [b"GET /", b"GET /2"]

    def test_the_body_of_a_request_arrives_piece_by_piece(self):
        async def upload(scope, receive, send):
            assert scope["type"] == "http"
            await send({"type": "http.response.start", "status": 200})
            more_body = True
            while more_body:
                message = await receive()
                more_body = message["more_body"]
                await send({**message, "type": "http.response.body"})

        with serving(upload) as running, running.connect() as client:
            client.send(POST + b"5\r\nfirst\r\n")
            client.read_until(b"first")  # the answer begins before the request has ended
            client.send(b"6\r\nsecond\r\n0\r\n\r\n")
            client.read_until(b"second\r\n0\r\n\r\n")

    def test_a_malformed_request_is_refused_and_nothing_behind_it_is_read(self):
        """RFC 9112 §6.3. Two lengths: a proxy before us may believe the other one, and
        what it takes for a body we would take for a second request."""
        bad = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\n"
        with serving(hello) as running:
            answer = running.talk(bad + GET)
        assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1

    def test_an_app_that_fails_is_a_500_and_a_traceback_in_the_log(self, log):
        async def app(scope, receive, send):
            raise ValueError("my own mistake")

        with serving(app, lifespan="off") as running:
            assert running.talk(GET).startswith(b"HTTP/1.1 500 ")
        assert "ValueError: my own mistake" in log.text

    def test_an_app_learns_that_its_client_has_left(self):
        seen = queue.Queue()

        async def app(scope, receive, send):
            seen.put((await receive())["type"])
            seen.put((await receive())["type"])  # waits until there is news
            try:
                await send({"type": "http.response.start", "status": 200})
                await send({"type": "http.response.body"})
            except OSError as exc:
                seen.put(type(exc).__name__)

        with serving(app, lifespan="off") as running, running.connect() as client:
            client.send(GET)
            assert seen.get(timeout=PATIENCE) == "http.request"
            client.reset()
            assert seen.get(timeout=PATIENCE) == "http.disconnect"
            assert seen.get(timeout=PATIENCE) == "ClientDisconnected"

    def test_a_head_that_does_not_arrive_is_a_408(self):
        with serving(hello, timeout_request_head=0.2) as running, running.connect() as client:
            client.send(b"GET / HTTP/1.1\r\nHost:")  # and no more
            assert client.response()[0] == 408 and client.read_all() == b""

    def test_a_websocket_carries_messages_both_ways(self):
        with serving(ws_echo.app, lifespan="off") as running, running.connect() as client:
            client.send(frames.handshake())
            assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
            client.send(frames.frame(frames.TEXT, b"hello"))
            assert client.read_until(b"hello") == b"\x81\x05hello"  # RFC 6455 §5.7


SLOW = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        for word in ("startup", "shutdown"):
            await receive()
            print(word, flush=True)
            await send({"type": f"lifespan.{word}.complete"})
        return
    print("a request", flush=True)
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"done"})
"""


class TestAProcess:
    """The program, as a user starts and stops it."""

    def test_a_mistake_is_one_line_and_an_exit_code(self):
        with Process("nope:app", "--port", 0) as p:
            assert p.exit_code() == 3
        assert 'no module "nope"' in p.lines[-1] and "Traceback" not in p.output

    def test_workers_share_one_port(self):
        """The address is printed as soon as the first of them answers."""
        with Process("example:app", "--port", 0, "--workers", 2) as p:
            assert fetch(("127.0.0.1", p.port()))[2] == b"Hello, world!\n"
            p.wait_for(r"worker \[\d+\] is ready")

    def test_ctrl_c_stops_it_when_the_requests_are_answered(self, tmp_path):
        (tmp_path / "slow.py").write_text(SLOW)
        with Process("slow:app", "--port", 0, cwd=tmp_path) as p:
            port = p.port()
            with p.connect(port) as client:
                client.send(POST + b"1\r\n")  # the rest of the body is missing
                p.wait_for("a request")
                p.interrupt()
                p.wait_for("requests in progress: 1")
                assert refuses(("127.0.0.1", port))
                client.send(b"x\r\n0\r\n\r\n")
                assert client.response()[2] == b"done" and client.read_all() == b""
            assert p.exit_code() == 0
        assert p.lines[-2] == "shutdown" and p.lines[-1].endswith("stopped")
