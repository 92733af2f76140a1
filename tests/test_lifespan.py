"""Chapter 4: the app's conversation with the process."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading

import pytest
from conftest import GET, PATIENCE, Serving, serving

import server
import sockets

START = {"type": "http.response.start", "status": 200, "headers": []}
UP = {"type": "lifespan.startup.complete"}
UP_FAILED = {"type": "lifespan.startup.failed", "message": "no database"}
DOWN = {"type": "lifespan.shutdown.complete"}
DOWN_FAILED = {"type": "lifespan.shutdown.failed", "message": "not saved"}


def body(data):
    return {"type": "http.response.body", "body": data}


def living(lifespan):
    """An app with this coroutine function for its lifespan, and one answer for all."""

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            return await lifespan(scope, receive, send)
        await send(START)
        await send(body(str(scope["state"]).encode()))

    return app


def serves(app, **options) -> bytes:
    """Start, ask for one thing, stop; the bytes of the answer."""
    with serving(app, **options) as running:
        return running.talk(GET)


def startup_error(app, **options) -> str:
    """What the server says when it cannot start."""
    with pytest.raises(server.StartupError) as raised, serving(app, **options):
        pass
    return str(raised.value)


@contextlib.contextmanager
def starting(app, **options):
    """A server that may not have started yet."""
    listener = sockets.bind_tcp("127.0.0.1", 0, 16)[0]
    running = Serving(app, listener, options)
    running.thread.start()
    try:
        yield running
    finally:
        running.stop()
        listener.close()


class TestStartup:
    """ASGI lifespan, "Startup - receive event"."""

    def test_the_scope_names_type_versions_and_state(self):
        scopes = []

        async def lifespan(scope, receive, send):
            scopes.append(scope)
            assert await receive() == {"type": "lifespan.startup"}
            await send(UP)

        serves(living(lifespan), lifespan="on")
        assert len(scopes) == 1 and scopes[0]["type"] == "lifespan"
        assert scopes[0]["asgi"] == {"version": "3.0", "spec_version": "2.0"}
        assert scopes[0]["state"] == {}

    @pytest.mark.parametrize("mode", ["auto", "on"])
    def test_it_is_complete_before_the_first_request(self, mode):
        asked, go = threading.Event(), asyncio.Event()

        async def lifespan(scope, receive, send):
            await receive()
            asked.set()
            await go.wait()
            scope["state"]["up"] = True
            await send(UP)

        with starting(living(lifespan), lifespan=mode) as running:
            assert asked.wait(PATIENCE)
            with running.connect() as client:  # the listener's backlog keeps it
                client.send(GET)
                assert not running.call(lambda: set(running.server.connections))
                assert not running.ready.is_set()
                running.call(go.set)
                assert client.response()[2] == b"{'up': True}"

    def test_state_is_shared_and_each_request_gets_a_shallow_copy(self):
        states = []

        async def app(scope, receive, send):
            states.append(scope["state"])
            if scope["type"] == "lifespan":
                await receive()
                scope["state"]["pool"] = []
                await send(UP)
                await receive()
                return await send(DOWN)
            scope["state"]["pool"].append(scope["path"])
            scope["state"][scope["path"]] = "mine"
            await send(START)
            await send(body(b""))

        with serving(app, lifespan="on") as running:
            running.talk(GET)
            running.talk(GET)
        shared, first, second = states
        assert shared == {"pool": ["/", "/"]}
        assert first == second == {**shared, "/": "mine"} and first is not second

    @pytest.mark.parametrize("mode", ["auto", "on"])
    def test_startup_failed_stops_with_its_message(self, mode):
        async def lifespan(scope, receive, send):
            await receive()
            await send(UP_FAILED)

        assert "no database" in startup_error(living(lifespan), lifespan=mode)

    def test_startup_failed_without_a_message_stops_too(self):
        async def lifespan(scope, receive, send):
            await send({"type": "lifespan.startup.failed"})

        assert "failed to start" in startup_error(living(lifespan))

    def test_startup_failed_keeps_its_message_if_the_app_then_raises(self):
        """Starlette sends startup.failed and lets the exception go on."""

        async def lifespan(scope, receive, send):
            await receive()
            await send(UP_FAILED)
            raise RuntimeError("something else")

        assert "no database" in startup_error(living(lifespan))

    def test_a_stop_during_a_startup_that_hangs_ends_promptly(self):
        asked, ended = threading.Event(), threading.Event()

        async def lifespan(scope, receive, send):
            asked.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        options = {"lifespan": "on", "timeout_graceful_shutdown": 100}
        with starting(living(lifespan), **options) as running:
            assert asked.wait(PATIENCE)
        assert ended.is_set() and not running.errors


class TestSupport:
    """ASGI lifespan, "Scope": after an exception "the server must continue"."""

    @pytest.mark.parametrize("failure", [ValueError("scope\ntype"), SystemExit(1)])
    def test_in_auto_an_exception_means_unsupported(self, failure, log):
        async def lifespan(scope, receive, send):
            raise failure

        assert serves(living(lifespan)).startswith(b"HTTP/1.1 200 ")
        lines = [r.getMessage() for r in log.records if "lifespan" in r.getMessage()]
        assert len(lines) == 1 and "not supported" in lines[0] and "\n" not in lines[0]
        assert not [r for r in log.records if r.levelname == "ERROR"]

    def test_in_auto_an_app_that_returns_at_once_is_served(self):
        async def lifespan(scope, receive, send):
            return

        assert serves(living(lifespan)).startswith(b"HTTP/1.1 200 ")

    def test_in_on_an_exception_stops_and_is_the_cause(self):
        async def lifespan(scope, receive, send):
            raise ValueError("mine")

        with pytest.raises(server.StartupError) as raised:
            serves(living(lifespan), lifespan="on")
        assert isinstance(raised.value.__cause__, ValueError)

    def test_in_on_an_app_that_returns_at_once_stops(self):
        async def lifespan(scope, receive, send):
            return

        assert "lifespan" in startup_error(living(lifespan), lifespan="on")

    def test_in_off_the_app_is_not_asked(self):
        async def lifespan(scope, receive, send):
            called.append(scope)

        called = []
        assert serves(living(lifespan), lifespan="off").startswith(b"HTTP/1.1 200 ")
        assert called == []

    def test_an_exception_after_startup_is_logged_and_requests_go_on(self, log):
        ended = threading.Event()

        async def lifespan(scope, receive, send):
            await receive()
            await send(UP)
            ended.set()
            raise ValueError("mine")

        with serving(living(lifespan), lifespan="on") as running:
            assert ended.wait(PATIENCE)
            assert running.talk(GET).startswith(b"HTTP/1.1 200 ")
        assert log.text.count("ValueError: mine") == 1 and __file__ in log.text

    def test_returning_after_startup_is_allowed(self, log):
        async def lifespan(scope, receive, send):
            await receive()
            await send(UP)

        assert serves(living(lifespan), lifespan="on").startswith(b"HTTP/1.1 200 ")
        assert not [r for r in log.records if r.levelname == "ERROR"]


class TestShutdown:
    """ASGI lifespan, "Shutdown - receive event"."""

    def test_it_comes_after_the_last_connection_is_finished(self):
        asked, go, steps = threading.Event(), asyncio.Event(), []

        async def app(scope, receive, send):
            if scope["type"] == "lifespan":
                await receive()
                await send(UP)
                assert await receive() == {"type": "lifespan.shutdown"}
                steps.append(len(running.server.connections | running.server.tasks))
                return await send(DOWN)
            asked.set()
            await go.wait()
            await send(START)
            await send(body(b""))
            steps.append("request")

        with serving(app, lifespan="on") as running, running.connect() as client:
            client.send(GET)
            assert asked.wait(PATIENCE)
            running.call(running.server.stop, "test")
            assert running.thread.is_alive() and steps == []
            running.call(go.set)
            assert client.response()[0] == 200
        assert steps == ["request", 0]

    def test_the_server_waits_until_it_is_complete(self):
        steps = []

        async def lifespan(scope, receive, send):
            await receive()
            await send(UP)
            await receive()
            for _ in range(100):
                await asyncio.sleep(0)
            steps.append("saved")
            await send(DOWN)

        serves(living(lifespan))
        assert steps == ["saved"]

    @pytest.mark.parametrize("then", [None, RuntimeError("something else")])
    def test_shutdown_failed_is_logged_with_its_message(self, then, log):
        async def lifespan(scope, receive, send):
            await receive()
            await send(UP)
            await receive()
            await send(DOWN_FAILED)
            if then:
                raise then

        serves(living(lifespan))
        assert "not saved" in log.text

    def test_an_exception_in_it_is_logged(self, log):
        async def lifespan(scope, receive, send):
            await receive()
            await send(UP)
            await receive()
            raise ValueError("mine")

        serves(living(lifespan))
        assert log.text.count("ValueError: mine") == 1

    def test_one_that_hangs_is_bounded_and_logged(self, log):
        ended = threading.Event()

        async def lifespan(scope, receive, send):
            await receive()
            await send(UP)
            await receive()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        serves(living(lifespan), timeout_graceful_shutdown=0.2)
        assert "0.2 s" in log.text and ended.is_set()


SHUTTING = [UP, DOWN]  # what is right, in this order, each after its receive

# What an app may not say: after how many receives and right answers, and the message.
WRONG = {
    "no type": (1, 0, {}),
    "type None": (1, 0, {"type": None}),
    "an unknown type": (1, 0, {"type": "lifespan.startup.begun"}),
    "a type of HTTP": (1, 0, START),
    "a type without its prefix": (1, 0, {"type": "startup.complete"}),
    "a type of receive": (1, 0, {"type": "lifespan.startup"}),
    "a type with more to it": (1, 0, {"type": "lifespan.startup.complete.d"}),
    "shutdown before startup": (1, 0, DOWN),
    "shutdown failed before startup": (1, 0, DOWN_FAILED),
    "startup twice": (1, 1, UP),
    "startup failed after complete": (1, 1, UP_FAILED),
    "shutdown before it was asked for": (1, 1, DOWN),
    "startup in shutdown": (2, 1, UP),
    "shutdown twice": (2, 2, DOWN),
    "shutdown failed after complete": (2, 2, DOWN_FAILED),
}


class TestMisuse:
    """ASGI, "Error Handling": "raise an exception out of the send awaitable"."""

    @pytest.mark.parametrize("receives, answers, message", WRONG.values(), ids=WRONG)
    def test_a_wrong_message_raises_and_the_right_one_still_works(
        self, receives, answers, message, log
    ):
        raised = queue.Queue()

        async def lifespan(scope, receive, send):
            for number, right in enumerate(SHUTTING):
                await receive()
                if (receives, answers) == (number + 1, number):
                    await try_it(send)
                await send(right)
                if (receives, answers) == (number + 1, number + 1):
                    await try_it(send)

        async def try_it(send):
            try:
                await send(message)
                raised.put(None)
            except Exception as exc:
                raised.put(exc)

        assert serves(living(lifespan), lifespan="on").startswith(b"HTTP/1.1 200 ")
        assert isinstance(raised.get(timeout=PATIENCE), Exception)
        assert not [r for r in log.records if r.levelname == "ERROR"]

    def test_additional_keys_are_ignored(self, log):
        async def lifespan(scope, receive, send):
            await receive()
            await send({**UP, "more": 1})
            await receive()
            await send({**DOWN, "more": 1})

        assert serves(living(lifespan), lifespan="on").startswith(b"HTTP/1.1 200 ")
        assert not [r for r in log.records if r.levelname == "ERROR"]
