"""What does the app receive, and what comes of what it sends?

Chapter 7: one request and its answer. The client never waits in vain, never takes half an
answer for a whole one, and never learns a detail of what went wrong in the app.
"""

import asyncio
import email.utils
import http
import logging
import queue
import re
import threading
import time

import pytest
from apps import CHUNKED, CONTINUE, END, EXPECT, GET_10, START, answer, answer_with, asking, body
from apps import drain, echo, errors, fields_of, get, length, post, read_body
from apps import saying, serve, start, statuses, turns, until, wait_for_disconnect
from conftest import GET, PATIENCE

import server

HEAD = GET.replace(b"GET", b"HEAD")
DISCONNECT = {"type": "http.disconnect"}
ONE_CHUNK = get(b"/", CHUNKED) + b"5\r\nhello\r\n"


def reading(seen: queue.Queue):
    """An app that puts what it receives into `seen`, and answers after the body."""

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            seen.put(message)
            more = message.get("more_body", False)
        await answer_with(send)

    return app


def request_message(data, more=False):
    return {"type": "http.request", "body": data, "more_body": more}


class TestReceive:
    """ASGI www, "Request - receive event" and "Disconnect - receive event"."""

    @pytest.mark.parametrize(
        "data, content",
        [
            (GET, b""), (post(b""), b""), (post(b"hello"), b"hello"),
            (get(b"/", CHUNKED) + b"2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n", b"hello"),
        ],
    )  # fmt: skip
    def test_a_short_body_is_one_message(self, data, content):
        seen = queue.Queue()
        with serve(reading(seen)) as running:
            running.talk(data)
        assert list(seen.queue) == [request_message(content)]

    def test_a_client_that_half_closes_still_gets_its_whole_answer(self):
        """Its app is told that no more will come, and may go on all the same."""
        seen = queue.Queue()

        async def app(scope, receive, send):
            seen.put(await receive())
            seen.put(await receive())
            await send(START)
            await send(body(b"all ", more=True))
            await send(body(b"of it"))

        with serve(app) as running:
            answers = running.talk(post(b"x"))
        assert statuses(answers) == [200] and answers.endswith(b"0\r\n\r\n")
        assert list(seen.queue) == [request_message(b"x"), DISCONNECT]

    def test_of_several_receives_one_gets_the_body_and_all_the_end(self):
        """They wake when the response is complete, and a later one says so at once. One
        that is cancelled takes no other with it."""
        waiting, seen = threading.Event(), queue.Queue()

        async def app(scope, receive, send):
            cancelled, *tasks = [asyncio.create_task(receive()) for _ in range(4)]
            await asyncio.sleep(0)
            cancelled.cancel()
            waiting.set()
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await answer_with(send)
            seen.put([*await asyncio.gather(*tasks), await receive()])

        with asking(app, post(b"x")[:-1]) as (running, client):
            assert waiting.wait(PATIENCE)
            client.send(b"x")
            messages = seen.get(timeout=PATIENCE)
        assert messages.count(request_message(b"x")) == 1
        assert messages.count(DISCONNECT) == 3

    @pytest.mark.parametrize(
        "data",
        [post(b"hello")[:-1]]
        + [ONE_CHUNK + end for end in (b"", b"x\r\n", b"0\r\nno colon\r\n\r\n")],
        ids=["half a body", "no last chunk", "a bad chunk", "a bad trailer"],
    )
    def test_a_refused_body_does_not_look_like_a_whole_one(self, data):
        """The last bytes and the end of the stream arrive together, and before the app
        asks: it must learn of both, and not wait for a deadline."""
        called, go, seen = threading.Event(), asyncio.Event(), queue.Queue()

        async def app(scope, receive, send):
            called.set()
            await go.wait()
            await reading(seen)(scope, receive, send)

        with asking(app, data) as (running, client):
            assert called.wait(PATIENCE)
            client.half_close()
            turns(running)
            running.call(go.set)
            assert statuses(client.read_all()) == [400]
        *parts, last = list(seen.queue)
        assert last == DISCONNECT and all(part["more_body"] for part in parts)

    def test_an_answer_that_comes_after_the_refusal_is_for_nobody(self):
        """The app reads no body. We do, to know whether another request may follow it."""
        seen = queue.Queue()

        async def app(scope, receive, send):
            try:
                await answer_with(send)
            except OSError as exc:
                seen.put(type(exc))

        with asking(app, get(b"/", CHUNKED) + b"x\r\n") as (running, client):
            assert statuses(client.read_all()) == [400]
        assert seen.get(timeout=PATIENCE) is server.ClientDisconnected


class TestExpectContinue:
    """RFC 9110 §10.1.1."""

    def test_continue_is_sent_only_when_the_app_asks_for_the_body(self):
        go, asked = asyncio.Event(), threading.Event()

        async def app(scope, receive, send):
            asked.set()
            await go.wait()
            await answer_with(send, await read_body(receive))

        with asking(app, EXPECT.replace(b"100-c", b"100-C")) as (running, client):
            until(running, asked.is_set)
            client.sock.setblocking(False)
            with pytest.raises(BlockingIOError):  # nothing has been said yet
                client.sock.recv(1)
            client.sock.settimeout(PATIENCE)
            running.call(go.set)
            assert client.read_until(b"\r\n\r\n") == CONTINUE
            client.send(b"hello")
            assert client.response()[2] == b"hello"

    @pytest.mark.parametrize("begun", [b"", b"first"], ids=["held back", "sent"])
    def test_continue_may_follow_a_start_that_is_held_back_but_not_one_that_is_sent(self, begun):
        """While the head is held back, the client is still waiting to be asked."""

        async def app(scope, receive, send):
            await send(START)
            if begun:
                await send(body(begun, more=True))
            await send(body(await read_body(receive)))

        with asking(app, EXPECT) as (running, client):
            found = client.read_until(begun or b"\r\n\r\n")
            client.send(b"hello")
            found += client.read_until(b"hello\r\n0\r\n\r\n")
        assert statuses(found) == ([200] if begun else [100, 200])

    def test_an_app_that_does_not_read_sends_no_continue_and_closes(self):
        """The client may then send the body or not, so the connection has to end."""
        with asking(saying(START, body(b"no")), EXPECT) as (running, client):
            data = client.read_all()
        assert statuses(data) == [200] and b"connection: close" in fields_of(data)

    @pytest.mark.parametrize(
        "data", [EXPECT.replace(b"1.1", b"1.0"), EXPECT], ids=["HTTP/1.0", "with the body"]
    )
    def test_a_client_that_does_not_wait_gets_no_continue(self, data):
        """RFC 9110: optional if "some or all of the content" has been received."""
        with serve(drain) as running:
            answers = running.talk(data + b"hello")
        assert statuses(answers) == [200] and answers.endswith(b"\r\n\r\n5")


class TestResponseFields:
    """ASGI www, "Response Start - send event"; RFC 9110 §6.6.1, §10.2.4."""

    def test_date_and_server_are_added(self):
        """They are written as h11 writes Transfer-Encoding."""
        data = answer([START, END])
        assert b"\r\nServer: foal\r\n" in data and b"\r\nTransfer-Encoding: chunked" in data
        date = data.partition(b"\r\nDate: ")[2].partition(b"\r\n")[0].decode()
        age = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
        assert -1 < age < PATIENCE and date.endswith(" GMT")

    def test_the_date_goes_on(self):
        with asking(saying(START, END), GET) as (running, client):
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

    @pytest.mark.parametrize(
        "headers, expected",
        [
            ([(b"X", b"y"), (b"Set-Cookie", b"b=2"), (b"set-cookie", b"a=1")],)
            + ([b"x: y", b"set-cookie: b=2", b"set-cookie: a=1"],),
            ([(b"x", b" \ta b ")], [b"x: a b"]), (iter([[b"x", b"y"]]), [b"x: y"]),
            ((), []),
        ],
        ids=["in order", "without spaces around", "an iterator of lists", "none"],
    )  # fmt: skip
    def test_the_apps_fields_are_sent_as_they_are(self, headers, expected):
        found = fields_of(answer([{**START, "headers": headers}, END]))
        assert found[: len(expected)] == expected
        assert found[len(expected) :] == [b"server: foal", b"transfer-encoding: chunked"]

    @pytest.mark.parametrize(
        "status, line",
        [(299, b"HTTP/1.1 299 \r\n"), (http.HTTPStatus.CREATED, b"HTTP/1.1 201 Created\r\n")],
    )
    def test_the_status_line_has_the_usual_phrase_or_none(self, status, line):
        messages = [{"type": START["type"], "status": status}, END]  # without headers
        assert answer(messages).startswith(line)

    def test_the_apps_transfer_encoding_is_dropped(self):
        coding = (b"Transfer-Encoding", b"chunked")
        data = answer([start(coding), body(b"hello")])
        assert fields_of(data).count(b"transfer-encoding: chunked") == 1
        assert data.endswith(b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
        data = answer([start(coding, length(5)), body(b"hello")])
        assert b"transfer-encoding" not in data.lower()
        assert data.endswith(b"\r\n\r\nhello")


class TestContentLength:
    """RFC 9112 §6; and a Content-Length that the app gets wrong."""

    @pytest.mark.parametrize(
        "data, head, framing, content",
        [
            (GET, START, b"transfer-encoding: chunked", b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"),
            (GET, start(length(5)), b"content-length: 5", b"hello"),
            (GET_10, START, b"connection: close", b"hello"),  # RFC 9112 §6.3, the last rule
            (GET_10, start(length(5)), b"content-length: 5", b"hello"),
        ],
    )
    def test_the_client_can_tell_where_the_answer_ends(self, data, head, framing, content):
        """Any bytes-like object is a body."""
        parts = [body(bytearray(b"hel"), more=True), body(memoryview(b"lo"))]
        with asking(saying(head, *parts), data) as (running, client):
            answers = client.read_all() if data == GET_10 else client.read_until(content)
        assert framing in fields_of(answers) and answers.endswith(b"\r\n\r\n" + content)
        assert (b"transfer-encoding" in answers.lower()) == (b"chunked" in framing)

    @pytest.mark.parametrize("size", [4, 6])
    def test_a_wrong_length_of_a_whole_body_closes_without_an_answer(self, size, log):
        assert answer([start(length(size)), body(b"hello")]) == b"" and errors(log)

    @pytest.mark.parametrize("size", [3, 10])
    def test_a_wrong_length_of_a_stream_ends_short(self, size, log):
        raised = []

        async def app(scope, receive, send):
            await send(start(length(size)))
            await send(body(b"ab", more=True))
            try:
                await send(body(b"cd"))
            except Exception as exc:
                raised.append(exc)

        with serve(app) as running:
            head, _, data = running.talk(GET + GET).partition(b"\r\n\r\n")
        assert statuses(head) == [200] and b"HTTP/1.1" not in data
        assert len(data) < size and b"abcd".startswith(data)
        assert raised and errors(log)

    @pytest.mark.parametrize("fields", [[], [length(5)]], ids=["no length", "length"])
    @pytest.mark.parametrize("data, status", [(HEAD, 200), (GET, 204), (GET, 304)])
    def test_answers_without_content_swallow_it(self, data, status, fields):
        messages = [start(*fields, status=status), body(b"he", more=True), body(b"llo")]
        with serve(saying(*messages)) as running, running.connect() as client:
            for _ in range(2):  # the connection goes on
                client.send(data)
                head = client.read_until(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 %d " % status)
                said = b"content-length: 5" in fields_of(head)
                assert said == (bool(fields) and status != 204)  # RFC 9110 §8.6
            client.half_close()
            assert client.read_all() == b""


CHUNK = body(b"chunk", more=True)

# The messages that bring an exchange into each state, and those that then finish it.
STATES = {
    "EXPECTING_START": ([], [START, body(b"done")]),
    "EXPECTING_BODY": ([START], [body(b"done")]),
    "EXPECTING_BODY, streaming": ([START, CHUNK], [body(b"done")]),
    "COMPLETE": ([START, body(b"done")], []),
}

# The only messages of the table that are right in some state.
RIGHT = {("EXPECTING_START", "start")} | {
    (state, name)
    for state in ("EXPECTING_BODY", "EXPECTING_BODY, streaming")
    for name in ("body", "last body")
}


MESSAGES = {
    "start": START,
    "body": CHUNK,
    "last body": END,
    # wrong in every state
    "None": None,
    "no type": {"status": 200, "headers": [], "body": b""},
    "no status": {"type": "http.response.start", "headers": []},
    "lengths differ": {**START, "headers": [length(4), length(5)]},
    **{
        f"type {kind!r}": {**START, "type": kind}
        for kind in [None, b"http.response.start", "http.response.begin", "http.disconnect"]
        + ["websocket.accept"]
    },
    **{
        f"status {status!r}": {**START, "status": status}
        for status in ["200", 200.0, True, None, 99, 101, 1000]
    },
    **{
        f"headers {headers!r}": {**START, "headers": headers}
        for headers in [None, 5, "ab", {b"name": b"value"}, [b"name: value"], [(b"name",)]]
        + [[(b"name", b"value", b"more")], [("name", b"value")], [(b"name", "value")]]
        + [[(b"content-length", 4)], [(b"name", None)]]
        + [[(b"content-length", value)] for value in (b"four", b"-1")]
        + [[(n, b"value")] for n in (b"", b"na me", b"name:", b"name\r", b"na\nme", b"na\0me")]
        + [[(b"name", v)] for v in (b"val\rue", b"val\nue", b"value\n", b"val\0ue")]
        + [[(b"name", b"value\r\nset-cookie: a=b")]]
    },
    **{f"body {data!r}": {**END, "body": data} for data in ("done", 4, None, [b"done"])},
    **{f"more_body {more!r}": {**END, "more_body": more} for more in ("yes", 1, None)},
}

TABLE = [(s, m) for s in STATES for m in MESSAGES if (s, m) not in RIGHT]


class TestMisuse:
    """ASGI, "Error Handling": "raise an exception out of the send awaitable"."""

    @pytest.mark.parametrize("state, name", TABLE)
    def test_a_wrong_message_raises_and_the_right_one_still_works(self, state, name):
        (before, after), raised = STATES[state], []

        async def app(scope, receive, send):
            await saying(*before)(scope, receive, send)
            try:
                await send(MESSAGES[name])
            except Exception as exc:
                raised.append(exc)
            await saying(*after)(scope, receive, send)

        with asking(app, GET * 2) as (running, client):  # the server keeps equal heads
            for _ in range(2):
                status, fields, data = client.response()
                assert status == 200 and data.endswith(b"done")
                assert fields.keys() == {"date", "server", "transfer-encoding"}
        assert [isinstance(exc, (OSError, AssertionError)) for exc in raised] == [False] * 2

    @pytest.mark.parametrize("state, name", sorted(RIGHT))
    def test_additional_keys_are_ignored(self, state, name):
        """ASGI, "Error Handling": they "should not raise an exception"."""
        (before, after), message = STATES[state], MESSAGES[name]
        messages = [*before, {**message, "x": 1, "trailers": True, "reason": b"Fine"}]
        if name != "last body":
            messages += after[-1:]
        data = answer(messages)
        assert data.startswith(b"HTTP/1.1 200 OK\r\n") and data.endswith(b"0\r\n\r\n")


SECRET = "the-password-is-1234"
INTERNAL = b"\r\n\r\n500 Internal Server Error\n"

FAILURES = {
    "Exception": lambda: ValueError(SECRET),
    "sys.exit": lambda: SystemExit(SECRET),
    "KeyboardInterrupt": lambda: KeyboardInterrupt(SECRET),
    "CancelledError": lambda: asyncio.CancelledError(SECRET),
    "ExceptionGroup": lambda: ExceptionGroup(SECRET, [ValueError(SECRET)]),
    "return": None,
}


def failing(messages, failure):
    """An app that sends these, and then raises."""

    async def app(scope, receive, send):
        await saying(*messages)(scope, receive, send)
        if failure is not None:
            raise failure()

    return app


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
class TestFailure:
    """An app that returns without an answer, or raises."""

    @pytest.mark.parametrize(
        "messages, data, status, end",
        [
            ([], GET * 2, 500, INTERNAL), ([START], GET * 2, 500, INTERNAL),
            ([start(length(0))], GET * 2, 500, INTERNAL),
            ([start((b"name", b"val\rue"))], GET * 2, 500, INTERNAL),  # `send` raises
            ([START, CHUNK], GET * 2, 200, b"\r\n\r\n5\r\nchunk\r\n"),
            ([START, CHUNK, START], GET * 2, 200, b"\r\n\r\n5\r\nchunk\r\n"),
            ([start(length(9)), CHUNK], GET * 2, 200, b"\r\n\r\nchunk"),
            ([START, CHUNK], GET_10, 200, b"\r\n\r\nchunk"),  # 1.0 has no way to show it
        ],
    )  # fmt: skip
    def test_it_is_a_500_or_a_visible_end_and_logged(
        self, messages, data, status, end, failure, log
    ):
        with serve(failing(messages, failure)) as running:
            answers = running.talk(data)
            assert running.talk(GET)  # the server goes on
        assert statuses(answers) == [status] and answers.endswith(end)
        assert status == 200 or b"connection: close" in fields_of(answers)
        assert SECRET.encode() not in answers
        assert any(record.levelno >= logging.WARNING for record in log.records)

    def test_after_the_response_leaves_the_connection_in_use(self, failure):
        with serve(failing([START, END], failure)) as running:
            answers = running.talk(GET + GET)
        assert statuses(answers) == [200, 200] and SECRET.encode() not in answers


def test_a_task_that_is_cancelled_before_its_first_step_is_answered():
    """What if a `finally` in it were all that answers? It would never run."""

    def cancel_the_first():
        if tasks := running.server.tasks:
            tasks.copy().pop().cancel()
        else:
            running.server.loop.call_soon(cancel_the_first)

    with serve(echo) as running, running.connect() as client:
        running.call(cancel_the_first)
        client.send(GET)
        assert client.response()[0] == 500
        until(running, lambda: not running.server.tasks)
        assert statuses(running.talk(GET)) == [200]


def logged_after_leaving(app, log) -> list[str]:
    """What the log says, as "LEVEL message", of an app whose client leaves."""
    with serve(app) as running:
        with running.connect() as client:
            client.send(GET)
            until(running, lambda: running.server.tasks)
            client.reset()
        until(running, lambda: not running.server.tasks)
    return [f"{record.levelname} {record.getMessage()}" for record in log.records]


class TestErrorLog:
    """What is logged once an exception escapes the app."""

    @pytest.mark.parametrize("messages", [[], [START, END]], ids=["before", "after"])
    def test_an_exception_is_logged_once_with_its_traceback(self, messages, log):
        """Also if work after the answer fails when the client has left."""

        async def app(scope, receive, send):
            await saying(*messages)(scope, receive, send)
            while messages and running.server.connections:
                await asyncio.sleep(0)
            raise ValueError(SECRET)

        with serve(app) as running:
            running.talk(GET)
        (message,) = errors(log)
        assert message.count("Traceback") == 1 and "ValueError: " + SECRET in message

    def test_a_client_that_left_is_no_error_even_in_a_group(self, log):
        async def app(scope, receive, send):
            await wait_for_disconnect(receive)
            try:
                await send(START)
            except server.ClientDisconnected as exc:
                raise BaseExceptionGroup("two", [ExceptionGroup("deep", [exc]), exc]) from None

        lines = logged_after_leaving(app, log)
        assert not [line for line in lines if line.startswith("ERROR")]


def access(log) -> list[str]:
    return [r.getMessage() for r in log.records if r.name == server.access_logger.name]


class TestAccessLog:
    def test_it_has_peer_request_line_status_bytes_and_milliseconds(self, log):
        async def app(scope, receive, send):
            await asyncio.sleep(0.05)
            await saying(start(status=404), body(b"hello"))(scope, receive, send)

        with serve(app) as running, running.connect() as client:
            started = time.monotonic()
            client.send(get(b"/a%20b?c=d"))
            assert client.response()[0] == 404
            longest = 1000 * (time.monotonic() - started)
            port = client.sock.getsockname()[1]
        (line,) = access(log)
        expected = rf'127.0.0.1:{port} "GET /a%20b\?c=d HTTP/1.1" 404 5 B (\d+\.\d) ms'
        took = float(re.fullmatch(expected, line)[1])
        assert 30 < took < longest + 20  # the clock of Windows goes in steps of 16 ms

    @pytest.mark.parametrize(
        "data, messages, rest",
        [
            (HEAD, [START, body(b"hello")], "200 0 B"),
            (GET_10, [START, body(b"he", more=True), body(b"llo")], "200 5 B"),
            (GET, [], "500 26 B"), (GET, [START, body(b"he", more=True)], "200 2 B"),
            (GET, [start(length(3)), body(b"he", more=True), body(b"llo")], "200 2 B"),
        ],
    )  # fmt: skip
    def test_each_request_has_one_line(self, data, messages, rest, log):
        answer(messages, data)
        (line,) = access(log)
        assert f'" {rest} ' in line

    def test_a_client_that_left_before_the_answer_is_499(self, log):
        async def app(scope, receive, send):
            await wait_for_disconnect(receive)

        logged_after_leaving(app, log)
        (line,) = access(log)
        assert '" 499 0 B ' in line

    def test_it_can_be_switched_off(self, log):
        answer([START, END], access_log=False)
        assert access(log) == []

    @pytest.mark.parametrize("peer", [b"9\x9b31m", b'9" 200 "', b"fe80::1%\x9b31m"])
    def test_a_client_cannot_write_the_log(self, peer, log):
        """C1 control characters are text to HTTP, and commands to a terminal."""
        data = get(b'/"_200_-"', b"X-Forwarded-For: " + peer)
        answer([START, END], data, proxy_headers=True, forwarded_allow_ips="*")
        (line,) = access(log)
        assert line.isprintable() and line.count('"') == 2 and "/%22_200" in line

    @pytest.mark.parametrize(
        "messages, status, answers",
        [([start(length(0)), END], b"200", 2), ([], b"500", 1), ([START, CHUNK], b"200", 1)],
        ids=["answered", "failed", "broken off"],
    )
    def test_a_filter_that_raises_does_not_stop_the_connection(
        self, messages, status, answers, log, monkeypatch
    ):
        """The client waited for its next answer, or for an end, until it gave up."""
        monkeypatch.setattr(server.access_logger, "filters", [{}.__getitem__])
        data = answer(messages, GET * 2)
        assert data.count(b"HTTP/1.1 " + status) == data.count(b"HTTP/1.1") == answers
        assert "KeyError" in log.text
