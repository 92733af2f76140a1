"""Chapter 6, the bytes of a response: fields, framing, and the line in the log."""

from __future__ import annotations

import asyncio
import email.utils
import http
import queue
import re
import time

import pytest
from conftest import GET, PATIENCE
from test_cycle import END, GET_10, START, answer, body, fields_of, get, length, saying
from test_cycle import serve, start, until

HEAD = GET.replace(b"GET", b"HEAD")
NO_CONTENT = [(HEAD, 200), (GET, 204), (GET, 304)]


class TestResponseFields:
    """ASGI www, "Response Start - send event"; RFC 9110 §6.6.1, §10.2.4."""

    def test_date_and_server_are_added(self):
        data = answer([START, END])
        assert b"server: foal" in fields_of(data)
        date = data.partition(b"date: ")[2].partition(b"\r\n")[0].decode()
        age = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
        assert -1 < age < 3 and date.endswith(" GMT")

    def test_the_date_goes_on(self):
        with serve(saying(START, END)) as running, running.connect() as client:
            client.send(GET)
            first = last = client.response()[1]["date"]
            deadline = time.monotonic() + PATIENCE
            while last == first and time.monotonic() < deadline:
                client.send(GET)
                last = client.response()[1]["date"]
        assert last != first

    def test_the_apps_own_date_and_server_replace_ours(self):
        data = answer([start((b"Date", b"today"), (b"SERVER", b"mine")), END])
        assert b"server: mine" in fields_of(data)
        names = [line.partition(b":")[0] for line in data.lower().split(b"\r\n")]
        assert names.count(b"server") == names.count(b"date") == 1

    def test_server_header_can_be_switched_off(self):
        assert b"server:" not in answer([START, END], server_header=False).lower()

    def test_header_option_is_added_to_every_response(self):
        data = answer([START, END], header=["X-One: 1", "X-Two:2", "X-One: 3"])
        fields = [f for f in fields_of(data) if f.startswith(b"x-")]
        assert fields == [b"x-one: 1", b"x-two: 2", b"x-one: 3"]

    def test_duplicates_and_their_order_are_kept(self):
        cookies = [(b"Set-Cookie", b"a=1"), (b"X", b"y"), (b"set-cookie", b"b=2")]
        fields = fields_of(answer([start(*cookies), END]))
        assert fields[:3] == [b"set-cookie: a=1", b"x: y", b"set-cookie: b=2"]

    def test_spaces_around_a_value_are_cut_off(self):
        assert b"x: a b" in fields_of(answer([start((b"x", b" \ta b ")), END]))

    def test_pairs_may_be_lists_and_headers_an_iterator_or_absent(self):
        message = {**START, "headers": iter([[b"x", b"y"]])}
        assert b"x: y" in fields_of(answer([message, END]))
        assert b"200 OK" in answer([{"type": START["type"], "status": 200}, END])

    @pytest.mark.parametrize(
        "status, line",
        [
            (404, b"HTTP/1.1 404 Not Found\r\n"),
            (299, b"HTTP/1.1 299 \r\n"),
            (http.HTTPStatus.CREATED, b"HTTP/1.1 201 Created\r\n"),  # an int, too
        ],
    )
    def test_the_status_line_has_the_usual_phrase_or_none(self, status, line):
        assert answer([start(status=status), END]).startswith(line)

    def test_the_apps_transfer_encoding_is_dropped(self):
        coding = (b"Transfer-Encoding", b"chunked")
        data = answer([start(coding), body(b"hello")])
        assert fields_of(data).count(b"transfer-encoding: chunked") == 1
        assert data.endswith(b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
        data = answer([start(coding, (b"content-length", b"5")), body(b"hello")])
        assert b"transfer-encoding" not in data.lower()
        assert data.endswith(b"\r\n\r\nhello")


class TestFraming:
    """RFC 9112 §6; behaviour.md §3, "Content-Length that the app gets wrong"."""

    def test_without_a_length_the_body_is_chunked(self):
        data = answer([START, body(b"hel", more=True), body(b"lo")])
        assert b"transfer-encoding: chunked" in fields_of(data)
        # What was sent in one turn of the loop is one chunk.
        assert data.endswith(b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n")

    def test_what_is_sent_in_two_turns_of_the_loop_is_two_chunks(self):
        async def app(scope, receive, send):
            await send(START)
            await send(body(b"a", more=True))
            await send(body(b"b", more=True))
            await asyncio.sleep(0)
            await send(body(b"c", more=True))
            await send(END)

        with serve(app) as running:
            data = running.talk(GET)
        assert data.endswith(b"\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n")

    def test_with_a_length_it_is_not(self):
        data = answer([start(length(5)), body(b"hel", more=True), body(b"lo")])
        assert b"transfer-encoding" not in data.lower()
        assert data.endswith(b"\r\n\r\nhello")

    def test_a_body_may_be_any_bytes_like_object(self):
        messages = [START, body(bytearray(b"ab"), more=True), body(memoryview(b"cd"))]
        assert answer(messages, GET_10).endswith(b"\r\n\r\nabcd")

    @pytest.mark.parametrize("size", [4, 6])
    def test_a_wrong_length_of_a_whole_body_is_a_500(self, size, log):
        data = answer([start(length(size)), body(b"hello")])
        assert data.startswith(b"HTTP/1.1 500 ") and data.count(b"HTTP/1.1") == 1
        assert "Content-Length is %d" % size in log.text

    @pytest.mark.parametrize("caught", [False, True])
    @pytest.mark.parametrize("size", [3, 10])
    def test_a_wrong_length_of_a_stream_ends_short(self, size, caught, log):
        raised = []

        async def app(scope, receive, send):
            await send(start(length(size)))
            await send(body(b"ab", more=True))
            try:
                await send(body(b"cd"))
            except Exception as exc:
                raised.append(exc)
                if not caught:
                    raise

        with serve(app) as running:
            head, _, data = running.talk(GET + GET).partition(b"\r\n\r\n")
        assert head.count(b"HTTP/1.1 200") == 1 and b"HTTP/1.1" not in data
        assert len(data) < size and b"abcd".startswith(data)
        assert raised and any(record.levelname == "ERROR" for record in log.records)

    @pytest.mark.parametrize("fields", [[], [length(5)]])
    @pytest.mark.parametrize("request_bytes, status", NO_CONTENT)
    def test_answers_without_content_swallow_it(self, request_bytes, status, fields):
        messages = [start(*fields, status=status), body(b"he", more=True), body(b"llo")]
        with serve(saying(*messages)) as running, running.connect() as client:
            for _ in range(2):  # the connection goes on
                client.send(request_bytes)
                head = client.read_until(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 %d " % status)
                assert (b"content-length: 5" in head.lower()) == (
                    bool(fields) and status != 204  # RFC 9110 §8.6
                )
            client.half_close()
            assert client.read_all() == b""

    def test_http_1_0_without_a_length_ends_with_the_connection(self):
        with serve(saying(START, body(b"hel", more=True), body(b"lo"))) as running:
            with running.connect() as client:
                client.send(GET_10)
                data = client.read_all()
        assert data.endswith(b"\r\n\r\nhello")
        assert b"connection: close" in fields_of(data)
        assert b"transfer-encoding" not in data.lower()


def access(log) -> list[str]:
    return [r.getMessage() for r in log.records if r.name == "server.access"]


class TestAccessLog:
    """behaviour.md §3, "access log"."""

    def test_it_has_peer_request_line_status_bytes_and_milliseconds(self, log):
        with serve(saying(start(status=404), body(b"hello"))) as running:
            with running.connect() as client:
                client.send(get(b"/a%20b?c=d"))
                assert client.response()[0] == 404
                port = client.sock.getsockname()[1]
        (line,) = access(log)
        expected = rf'127.0.0.1:{port} "GET /a%20b\?c=d HTTP/1.1" 404 5 B \d+\.\d ms'
        assert re.fullmatch(expected, line)

    @pytest.mark.parametrize(
        "request_bytes, messages, rest",
        [
            (HEAD, [START, body(b"hello")], "200 0 B"),
            (GET_10, [START, body(b"he", more=True), body(b"llo")], "200 5 B"),
            (GET, [], "500 26 B"),
            (GET, [{**START, "status": 204}], "500 26 B"),
            (GET, [START, body(b"he", more=True)], "200 2 B"),
            (GET, [start(length(3)), body(b"he", more=True), body(b"llo")], "200 2 B"),
        ],
    )
    def test_each_request_has_one_line(self, request_bytes, messages, rest, log):
        answer(messages, request_bytes)
        (line,) = access(log)
        assert f'" {rest} ' in line

    def test_it_can_be_switched_off(self, log):
        answer([START, END], access_log=False)
        assert access(log) == []

    def test_a_quote_is_escaped(self, log):
        answer([START, END], get(b'/"x'))
        assert access(log)[0].count('"') == 2

    @pytest.mark.parametrize("evil", [b"9\x9b31m", b'9" 200 "', b"fe80::1%\x9b31m"])
    def test_a_forwarded_client_cannot_write_the_log(self, evil, log):
        """C1 control characters are text to HTTP, and commands to a terminal."""
        request = get(b"/", b"X-Forwarded-For: " + evil)
        answer([START, END], request, proxy_headers=True, forwarded_allow_ips="*")
        (line,) = access(log)
        assert line.isprintable() and line.count('"') == 2

    def test_a_client_that_left_before_the_answer_is_499(self, log):
        called = queue.Queue()

        async def app(scope, receive, send):
            called.put(await receive())
            await receive()

        with serve(app) as running:
            with running.connect() as client:
                client.send(GET)
                called.get(timeout=PATIENCE)
                client.reset()
            until(running, lambda: not running.server.tasks)
        (line,) = access(log)
        assert '" 499 0 B ' in line
