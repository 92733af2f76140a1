"""Chapter 4: the app's conversation with the process."""

import asyncio
import contextlib
import threading

import pytest
from apps import START, body, errors
from conftest import GET, PATIENCE, Serving, serving

import server
import sockets

UP = {"type": "lifespan.startup.complete"}
UP_FAILED = {"type": "lifespan.startup.failed", "message": "no database"}
DOWN = {"type": "lifespan.shutdown.complete"}
DOWN_FAILED = {"type": "lifespan.shutdown.failed", "message": "not saved"}


def living(lifespan):
    """An app with this coroutine function for its lifespan, which answers with its state."""

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            return await lifespan(scope, receive, send)
        await send(START)
        await send(body(str(scope["state"]).encode()))

    return app


def doing(*steps):
    """An app whose lifespan does this, step by step: it sends a message, raises an
    exception, calls a function, or with None receives."""

    async def lifespan(scope, receive, send):
        for step in steps:
            if step is None:
                await receive()
            elif isinstance(step, dict):
                await send(step)
            elif callable(step):
                await step()
            else:
                raise step

    return living(lifespan)


def serves(app, **options) -> bytes:
    """Start, ask once, stop: the bytes of the answer."""
    with serving(app, **options) as running:
        return running.talk(GET)


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
        async def lifespan(scope, receive, send):
            asgi = {"version": "3.0", "spec_version": "2.0"}
            assert scope == {"type": "lifespan", "asgi": asgi, "state": {}}
            assert await receive() == {"type": "lifespan.startup"}
            await send(UP)

        assert serves(living(lifespan), lifespan="on").startswith(b"HTTP/1.1 200 ")

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

    @pytest.mark.parametrize(
        "steps, why",
        [
            ([None, UP_FAILED], "no database"),
            ([{"type": "lifespan.startup.failed"}], "failed to start"),
            # Starlette says that it failed, and lets the exception go on.
            ([None, UP_FAILED, RuntimeError("something else")], "no database"),
        ],
    )
    @pytest.mark.parametrize("mode", ["auto", "on"])
    def test_startup_failed_stops_with_its_message(self, mode, steps, why):
        with pytest.raises(server.StartupError, match=why):
            serves(doing(*steps), lifespan=mode)

    @pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, BaseException])
    def test_an_app_that_ends_the_process_stops_it_with_code_3_and_one_line(self, kind, log):
        """sys.exit() in a startup hook means that the app cannot start, and not that it
        does not know lifespan."""
        assert server.run(doing(None, kind("no licence")), port=0) == 3
        (line,) = errors(log)
        assert kind.__name__ in line and "no licence" in line and "\n" not in line

    def test_a_stop_during_a_startup_that_hangs_ends_promptly(self):
        begun = threading.Event()

        async def hang():
            begun.set()
            await asyncio.Event().wait()

        options = {"lifespan": "on", "timeout_graceful_shutdown": 100}
        with starting(doing(hang), **options) as running:
            assert begun.wait(PATIENCE)
        assert not running.errors

    def test_if_serve_is_cancelled_meanwhile_so_is_the_app(self):
        async def main():
            begun, for_ever = asyncio.Event(), asyncio.Event()

            async def hang():
                begun.set()
                await for_ever.wait()

            task = asyncio.create_task(server.serve(doing(hang), port=0))
            await asyncio.wait_for(begun.wait(), PATIENCE)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(main())


class TestSupport:
    """ASGI lifespan, "Scope": after an exception "the server must continue"."""

    @pytest.mark.parametrize("steps", [[ValueError("scope\ntype")], []], ids=["raises", "returns"])
    def test_in_auto_an_app_that_ends_at_once_does_without(self, steps, log):
        assert serves(doing(*steps)).startswith(b"HTTP/1.1 200 ")
        (line,) = [r.getMessage() for r in log.records if "lifespan" in r.getMessage()]
        assert "\n" not in line and not errors(log)

    @pytest.mark.parametrize("steps", [[ValueError("mine")], []], ids=["raises", "returns"])
    def test_in_on_it_stops_the_server(self, steps):
        with pytest.raises(server.StartupError, match="lifespan") as raised:
            serves(doing(*steps), lifespan="on")
        assert raised.value.__cause__ is (steps[0] if steps else None)

    def test_in_off_the_app_is_not_asked(self):
        app = doing(SystemExit("it was asked"))
        assert serves(app, lifespan="off").startswith(b"HTTP/1.1 200 ")

    def test_when_it_raises_after_startup_it_is_logged_and_requests_go_on(self, log):
        with serving(doing(None, UP, ValueError("mine")), lifespan="on") as running:
            assert running.talk(GET).startswith(b"HTTP/1.1 200 ")
        (line,) = errors(log)
        assert "ValueError: mine" in log.text and __file__ in line


class TestShutdown:
    """ASGI lifespan, "Shutdown - receive event"."""

    def test_it_comes_after_the_last_connection_and_is_waited_for(self):
        asked, go, steps = threading.Event(), asyncio.Event(), []

        async def app(scope, receive, send):
            if scope["type"] == "lifespan":
                await receive()
                await send(UP)
                assert await receive() == {"type": "lifespan.shutdown"}
                steps.append(len(running.server.connections | running.server.tasks))
                await asyncio.sleep(0)
                steps.append("saved")
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
        assert steps == ["request", 0, "saved"]

    @pytest.mark.parametrize(
        "steps, why",
        [([DOWN_FAILED], "not saved"), ([ValueError("mine")], "ValueError: mine")]
        + [([BaseException("mine")], "BaseException: mine")],  # such as a panic of Rust
    )
    def test_a_failure_is_logged(self, steps, why, log):
        serves(doing(None, UP, None, *steps))
        assert why in "\n".join(errors(log))

    def test_one_that_hangs_is_bounded_and_logged(self, log):
        hang = asyncio.Event().wait
        serves(doing(None, UP, None, hang), timeout_graceful_shutdown=0.2)
        assert "0.2 s" in log.text


WRONG = [  # after how many of the steps None, UP, None, DOWN an app may not say what
    *((1, {}), (1, {"type": None}), (1, START), (1, {"type": "lifespan.startup.begun"})),
    *((1, DOWN), (2, UP), (2, UP_FAILED), (2, DOWN), (3, UP), (4, DOWN), (4, DOWN_FAILED)),
]


class TestMisuse:
    """ASGI, "Error Handling": "raise an exception out of the send awaitable"."""

    @pytest.mark.parametrize("place, message", WRONG)
    def test_a_wrong_message_raises_and_the_right_one_still_works(self, place, message, log):
        raised = []

        async def lifespan(scope, receive, send):
            for number, step in enumerate((None, UP, None, DOWN), 1):
                await (send(step) if step else receive())
                if number == place:
                    with pytest.raises(Exception) as caught:
                        await send(message)
                    raised.append(caught.type)

        assert serves(living(lifespan), lifespan="on").startswith(b"HTTP/1.1 200 ")
        assert len(raised) == 1 and not errors(log)

    def test_additional_keys_are_ignored(self, log):
        app = doing(None, {**UP, "more": 1}, None, {**DOWN, "more": 1})
        assert serves(app, lifespan="on").startswith(b"HTTP/1.1 200 ")
        assert not errors(log)
