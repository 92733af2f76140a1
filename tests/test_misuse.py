"""Chapter 6, what goes wrong in the app: every wrong message in every state, from one
table, and every way to fail. The client never hangs, never sees a false success, and
never learns a detail."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import queue

import pytest
from conftest import GET, PATIENCE
from test_cycle import END, GET_10, START, answer, body, get, length, serve, start
from test_cycle import until

import server

CHUNK = body(b"chunk", more=True)

# What brings a cycle into each state, and what then brings it to its end.
STATES = {
    "EXPECTING_START": ([], [START, body(b"done")]),
    "EXPECTING_BODY": ([START], [body(b"done")]),
    "EXPECTING_BODY, streaming": ([START, CHUNK], [body(b"done")]),
    "COMPLETE": ([START, body(b"done")], []),
}

# The only messages of the table that are right somewhere.
RIGHT = {
    ("EXPECTING_START", "start"),
    ("EXPECTING_BODY", "body"),
    ("EXPECTING_BODY", "last body"),
    ("EXPECTING_BODY, streaming", "body"),
    ("EXPECTING_BODY, streaming", "last body"),
}


def field(*items):
    return {**START, "headers": [items]}


MESSAGES = {
    "start": START,
    "body": CHUNK,
    "last body": END,
    # wrong everywhere
    "None": None,
    "no type": {"status": 200, "headers": [], "body": b""},
    "type None": {**START, "type": None},
    "type bytes": {**START, "type": b"http.response.start"},
    "unknown type": {**START, "type": "http.response.begin"},
    "a type of receive": {"type": "http.disconnect"},
    "a type of WebSocket": {"type": "websocket.accept"},
    "no status": {"type": "http.response.start", "headers": []},
    "status str": {**START, "status": "200"},
    "status float": {**START, "status": 200.0},
    "status bool": {**START, "status": True},
    "status None": {**START, "status": None},
    "status 99": {**START, "status": 99},
    "status 101": {**START, "status": 101},
    "status 1000": {**START, "status": 1000},
    "headers None": {**START, "headers": None},
    "headers int": {**START, "headers": 5},
    "headers str": {**START, "headers": "ab"},
    "headers dict": {**START, "headers": {b"name": b"value"}},
    "header not a pair": {**START, "headers": [b"name: value"]},
    "header of one item": field(b"name"),
    "header of three items": field(b"name", b"value", b"more"),
    "name str": field("name", b"value"),
    "value str": field(b"name", "value"),
    "value int": field(b"content-length", 4),
    "value None": field(b"name", None),
    "name empty": field(b"", b"value"),
    "name with space": field(b"na me", b"value"),
    "name with colon": field(b"name:", b"value"),
    "name with CR": field(b"name\r", b"value"),
    "name with LF": field(b"na\nme", b"value"),
    "name with NUL": field(b"na\0me", b"value"),
    "value with CR": field(b"name", b"val\rue"),
    "value with CRLF": field(b"name", b"value\r\nset-cookie: a=b"),
    "value with LF": field(b"name", b"val\nue"),
    "value ends with LF": field(b"name", b"value\n"),
    "value with NUL": field(b"name", b"val\0ue"),
    "length no number": field(b"content-length", b"four"),
    "length negative": field(b"content-length", b"-1"),
    "lengths differ": {**START, "headers": [length(4), length(5)]},
    "body str": {**END, "body": "done"},
    "body int": {**END, "body": 4},
    "body None": {**END, "body": None},
    "body list": {**END, "body": [b"done"]},
    "more_body str": {**END, "more_body": "yes"},
    "more_body int": {**END, "more_body": 1},
    "more_body None": {**END, "more_body": None},
}

TABLE = [(s, m) for s in STATES for m in MESSAGES if (s, m) not in RIGHT]


def misusing(state: str, name: str, raised: queue.Queue, *, caught: bool):
    """An app that sends this message in this state, and then goes on if it caught what
    that raised."""
    before, after = STATES[state]

    async def app(scope, receive, send):
        for message in before:
            await send(message)
        try:
            await send(MESSAGES[name])
            raised.put(None)
        except BaseException as exc:
            raised.put(exc)
            if not caught:
                raise
        for message in after:
            await send(message)

    return app


class TestMisuse:
    """ASGI, "Error Handling": "raise an exception out of the send awaitable"."""

    @pytest.mark.parametrize("state, name", TABLE)
    def test_a_wrong_message_raises_and_the_right_one_still_works(self, state, name):
        raised = queue.Queue()
        with serve(misusing(state, name, raised, caught=True)) as running:
            with running.connect() as client:
                client.send(GET)
                status, fields, data = client.response()
                assert status == 200 and data.endswith(b"done")
                assert fields.keys() == {"date", "server", "transfer-encoding"}
                exc = raised.get(timeout=PATIENCE)
        assert isinstance(exc, Exception)
        assert not isinstance(exc, (OSError, AssertionError))

    @pytest.mark.parametrize("state, name", TABLE)
    def test_what_escapes_is_a_500_once_or_a_visible_end(self, state, name, log):
        raised = queue.Queue()
        with serve(misusing(state, name, raised, caught=False)) as running:
            data = running.talk(GET + GET)
        assert "the app failed" in log.text
        if state == "COMPLETE":  # that one was right, and so is the next
            assert data.count(b"HTTP/1.1 200 ") == data.count(b"HTTP/1.1 ") == 2
            return
        assert data.count(b"HTTP/1.1 ") == 1
        if state == "EXPECTING_BODY, streaming":
            assert data.startswith(b"HTTP/1.1 200 ") and data.endswith(b"\r\nchunk\r\n")
        else:
            assert data.startswith(b"HTTP/1.1 500 ")
            assert data.endswith(b"\r\n\r\n500 Internal Server Error\n")

    @pytest.mark.parametrize("state, name", sorted(RIGHT))
    def test_additional_keys_are_ignored(self, state, name):
        """ASGI, "Error Handling": they "should not raise an exception"."""
        (before, after), message = STATES[state], MESSAGES[name]
        messages = [*before, {**message, "x": 1, "trailers": True, "reason": b"Fine"}]
        if name != "last body":
            messages += after[-1:]
        data = answer(messages)
        assert data.startswith(b"HTTP/1.1 200 OK\r\n") and data.endswith(b"0\r\n\r\n")

    def test_a_status_is_checked_although_an_equal_one_was_right_before(self):
        """What if 200.0 finds the head that was kept for 200?"""
        raised = []

        async def app(scope, receive, send):
            try:
                await send({**START, "status": 200.0 if scope["path"] == "/f" else 200})
            except TypeError as exc:
                raised.append(exc)
                await send(START)
            await send(END)

        with serve(app) as running:
            running.talk(GET + get(b"/f"))
        assert len(raised) == 1


SECRET = "the-password-is-1234"


class Odd(BaseException):
    """An exception that `except Exception` does not see."""


FAILURES = {
    "Exception": lambda: ValueError(SECRET),
    "sys.exit": lambda: SystemExit(SECRET),
    "BaseException": lambda: Odd(SECRET),
    "KeyboardInterrupt": lambda: KeyboardInterrupt(SECRET),
    "CancelledError": lambda: asyncio.CancelledError(SECRET),
    "ExceptionGroup": lambda: ExceptionGroup(SECRET, [ValueError(SECRET)]),
    "return": None,
}


def failing(messages, failure):
    """An app that sends these, and then raises."""

    async def app(scope, receive, send):
        for message in messages:
            await send(message)
        if failure is not None:
            raise failure()

    return app


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
class TestFailure:
    """behaviour.md §4, "An app that returns without answering, or raises"."""

    @pytest.mark.parametrize("messages", [[], [START], [start(length(0))]])
    def test_before_the_first_body_message_is_a_500(self, messages, failure, log):
        with serve(failing(messages, failure)) as running, running.connect() as client:
            client.send(GET)
            status, fields, data = client.response()
            assert status == 500 and fields["connection"] == "close"
            assert data == b"500 Internal Server Error\n"
            assert client.read_all() == b""
            assert running.talk(GET)  # the server goes on
        assert any(record.levelno >= logging.WARNING for record in log.records)

    def test_in_a_chunked_stream_has_no_last_chunk(self, failure, log):
        with serve(failing([START, CHUNK], failure)) as running:
            assert running.talk(GET + GET).endswith(b"\r\n\r\n5\r\nchunk\r\n")
        assert any(record.levelno >= logging.WARNING for record in log.records)

    def test_in_a_stream_of_known_length_ends_short(self, failure):
        with serve(failing([start(length(9)), CHUNK], failure)) as running:
            assert running.talk(GET + GET).endswith(b"\r\n\r\nchunk")

    @pytest.mark.skipif(os.name == "nt", reason="the proactor loop cannot reset")
    def test_in_an_http_1_0_stream_is_a_reset(self, failure):
        """An orderly close would look like the end of the body."""
        go = asyncio.Event()

        async def app(scope, receive, send):
            await failing([START, CHUNK], None)(scope, receive, send)
            await go.wait()
            if failure is not None:
                raise failure()

        with serve(app) as running, running.connect() as client:
            client.send(GET_10)
            client.read_until(b"chunk")
            # Wine tells of a reset only who is blocked in recv, so be there before it.
            client.sock.settimeout(None)
            loop = running.server.loop
            loop.call_soon_threadsafe(loop.call_later, 0.05, go.set)
            with pytest.raises(ConnectionError):
                client.read_all()

    def test_after_the_response_leaves_the_connection_in_use(self, failure):
        with serve(failing([START, END], failure)) as running:
            with running.connect() as client:
                for _ in range(2):
                    client.send(GET)
                    assert client.response()[0] == 200

    @pytest.mark.parametrize("messages", [[], [START], [START, CHUNK], [START, END]])
    def test_details_never_reach_the_client(self, messages, failure):
        with serve(failing(messages, failure)) as running:
            assert SECRET.encode() not in running.talk(GET)


def raising_after_leaving(make):
    """An app that waits for its client to leave, and then raises."""

    async def app(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        try:
            while True:
                await send(START)
        except Exception as exc:
            raise make(exc) from None

    return app


def gone(make, log) -> list[str]:
    """What the log says, as "LEVEL message", when an app raises this about a client
    that has left."""
    with serve(raising_after_leaving(make)) as running:
        with running.connect() as client:
            client.send(GET)
            until(running, lambda: running.server.tasks)
            client.reset()
        until(running, lambda: not running.server.tasks)
    return [f"{record.levelname} {record.getMessage()}" for record in log.records]


@contextlib.contextmanager
def broken_filter():
    """On the access log: it knows the records of another server."""
    broken = {}.__getitem__
    server.access_logger.addFilter(broken)
    try:
        yield
    finally:
        server.access_logger.removeFilter(broken)


class TestLog:
    """behaviour.md §4, "if it escapes the app"; style.md §4.9."""

    def test_the_traceback_starts_in_the_apps_code(self, log):
        with serve(failing([{"type": "http.response.start"}], None)) as running:
            running.talk(GET)
        start_of_it = "Traceback (most recent call last):\n  File "
        assert f'{start_of_it}"{__file__}"' in log.text

    def test_an_exception_is_logged_once_with_its_traceback(self, log):
        with serve(failing([], FAILURES["Exception"])) as running:
            running.talk(GET)
        assert log.text.count("ValueError: " + SECRET) == 1

    def test_what_is_raised_after_the_response_is_logged(self, log):
        with serve(failing([START, END], FAILURES["Exception"])) as running:
            running.talk(GET)
        assert log.text.count("ValueError: " + SECRET) == 1

    @pytest.mark.parametrize(
        "make",
        [
            lambda exc: exc,
            lambda exc: ExceptionGroup("one", [exc]),
            lambda exc: BaseExceptionGroup("two", [ExceptionGroup("deep", [exc]), exc]),
        ],
    )
    def test_a_client_that_left_is_no_error_even_in_a_group(self, make, log):
        assert not [line for line in gone(make, log) if line.startswith("ERROR")]

    @pytest.mark.parametrize("other", [ValueError("mine"), OSError("mine")])
    def test_a_group_with_another_exception_names_it_in_the_log(self, other, log):
        lines = gone(lambda exc: ExceptionGroup("mixed", [exc, other]), log)
        assert [line for line in lines if "mine" in line]

    def test_what_cannot_be_told_is_answered(self):
        """What if a library raises a SyntaxError whose text is bytes, or a log handler
        raises in its turn? traceback.format_exception fails then, and so do we."""

        def wrong():
            return SyntaxError("mine", ("file", 1, 1, b"text"))

        with serve(failing([], wrong)) as running:
            assert running.talk(GET).startswith(b"HTTP/1.1 500 ")
        gc.collect()  # asyncio tells of it now, and not in a test that wants it silent

    def test_a_filter_that_raises_does_not_stop_the_connection(self, log):
        """What if it stands on the access log?"""
        app = failing([start(length(0)), END], None)
        with broken_filter(), serve(app) as running, running.connect() as client:
            for _ in range(2):
                client.send(GET)
                assert client.response()[0] == 200
        assert log.text.count("KeyError") == 2

    @pytest.mark.parametrize("messages", [[], [START, CHUNK]])
    def test_nor_does_it_when_the_app_fails(self, messages, log):
        """The client waited for a 500, or for an end, until it gave up."""
        status = b"200" if messages else b"500"
        app = failing(messages, ValueError)
        with broken_filter(), serve(app) as running, running.connect() as client:
            client.send(GET)
            assert client.read_all().startswith(b"HTTP/1.1 " + status)
        assert log.text.count("KeyError") == 1

    def test_client_disconnected_is_an_oserror(self):
        assert issubclass(server.ClientDisconnected, OSError)
