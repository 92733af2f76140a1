"""Who says what, and when: a server in a thread, and a client that is this test.

A socket pair stands for the TCP connection. The client reads before it writes on, so a
message that comes twice or never is seen as such. Bytes keep their order: where a test
asks what came too early, it lets the server write a mark when it calls the app.
"""

import contextlib
import socket
import threading

import h11
import pytest

DEADLINE = 3.0  # seconds; only a server that says nothing takes so long
EXPECT = b"Expect: 100-continue\r\n"
CONTINUE = b"HTTP/1.1 100 "
HEAD_END = b"\r\n\r\n"
MARK = b"(the app is called) "


def post(fields=b"", version=b"1.1", body=b""):
    start = b"POST / HTTP/%s\r\nHost: test\r\n" % version
    return start + b"Content-Length: 5\r\n" + fields + b"\r\n" + body


class Drip(socket.socket):
    """A socket that hands out what has come byte by byte."""

    def recv(self, size):
        return super().recv(1)


@contextlib.contextmanager
def connected(exercise, app, first, mark=b"", kind=socket.socket):
    """A client whose first bytes are there before the server reads. `mark` is written to
    it when the app is called."""
    client, ours = socket.socketpair()
    ours = kind(fileno=ours.detach())
    client.settimeout(DEADLINE)
    ours.settimeout(DEADLINE)
    failed = []

    def marked_app(request, exchange):
        ours.sendall(mark)
        app(request, exchange)

    def run():
        with ours:
            try:
                exercise.serve_one(ours, marked_app)
            except Exception as exc:
                failed.append(exc)

    thread = threading.Thread(target=run)
    with client:
        client.sendall(first)
        thread.start()
        try:
            yield client
        except Exception as exc:
            if failed:  # before the client did, and so it is the reason
                raise exc from failed[0]
            raise
        finally:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_WR)  # so that the server ends in any case
            thread.join(DEADLINE)
    if failed:
        raise failed[0]


def read_head(client) -> bytes:
    data = b""
    while not data.endswith(HEAD_END):
        octet = client.recv(1)
        assert octet, f"the server closed after {data!r}"
        data += octet
    return data


def read_all(client) -> bytes:
    data = b""
    while piece := client.recv(65536):
        data += piece
    return data


def takes_it(request, exchange):
    body = b""
    while piece := exchange.read():
        body += piece
    exchange.answer(200, body)


def refuses(request, exchange):
    exchange.answer(413, b"no")


def test_an_app_that_refuses_the_body_says_only_that(exercise):
    """RFC 9110 §10.1.1: a final status instead of 100 spares the client the body."""
    with connected(exercise, refuses, post(EXPECT)) as client:
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 413 "), answer


def test_a_client_that_waits_is_told_when_the_app_asks(exercise):
    """What stands in front of the mark was said before the app was even called."""
    with connected(exercise, takes_it, post(EXPECT), MARK) as client:
        head = read_head(client)
        assert head.startswith(MARK), f"said before the app asked for the body: {head}"
        assert head.startswith(MARK + CONTINUE), head
        client.sendall(b"hello")
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"hello")


def test_it_is_said_once_for_a_body_in_pieces(exercise):
    with connected(exercise, takes_it, post(EXPECT)) as client:
        assert read_head(client).startswith(CONTINUE)
        client.sendall(b"hel")
        client.sendall(b"lo")
        assert CONTINUE not in read_all(client)


def test_it_is_said_once_for_a_body_in_bytes(exercise):
    """What if the first byte of a body is not yet a piece of it? h11 has to read the
    size of a chunk to its end, and so long nothing but your word tells it that the
    client waits no more."""
    head = post().partition(b"Content-Length")[0]
    head += EXPECT + b"Transfer-Encoding: chunked\r\n\r\n"
    body = b"5\r\nhello\r\n0\r\n\r\n"
    with connected(exercise, takes_it, head + body, kind=Drip) as client:
        answer = read_all(client)
    assert answer.count(CONTINUE) == 1, answer
    assert answer.endswith(b"hello")


def test_it_is_not_said_behind_the_answer(exercise):
    """What if an app answers first, and reads the body then? A 100 is interim: behind a
    final response the client would take it for the answer to its next request."""

    def app(request, exchange):
        exchange.answer(200, b"yes")
        exchange.read()

    with connected(exercise, app, post(EXPECT)) as client:
        read_head(client)
        client.sendall(b"hello")
        assert CONTINUE not in read_all(client)


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(post(body=b"hello"), id="it did not ask"),
        pytest.param(post(EXPECT, b"1.0", b"hello"), id="HTTP/1.0 cannot ask"),
        pytest.param(post(EXPECT, body=b"hello"), id="its body is here already"),
    ],
)
def test_a_client_that_does_not_wait_is_not_told(exercise, first):
    """RFC 9110 §10.1.1: in a request of HTTP/1.0 it MUST be ignored, and with content
    here already it MAY be omitted: the client does not wait."""
    with connected(exercise, takes_it, first) as client:
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"hello"), answer


def test_however_the_client_writes_it(exercise):
    """RFC 9110 §10.1.1: the value is case-insensitive. (This client leaves at once, so
    that a server that says nothing ends, too.)"""

    def app(request, exchange):
        with contextlib.suppress(h11.RemoteProtocolError):
            exchange.read()

    with connected(exercise, app, post(b"EXPECT: 100-Continue\r\n")) as client:
        client.shutdown(socket.SHUT_WR)
        assert read_all(client).startswith(CONTINUE)
