"""Chapter 3: how a server stops, phase by phase; and how a program starts one in a loop
of its own."""

import asyncio
import contextlib
import queue
import threading

import pytest
from apps import END, START, body, echo, errors, get, has_ended, narrow_listener, saying, serve
from apps import turns, until
from conftest import GET, PATIENCE, Client, refuses

import server

NO_HURRY = {"timeout_graceful_shutdown": 1000.0}  # a stop must not need this time
CHUNK = body(b"not ", more=True)
DISCONNECT = {"type": "http.disconnect"}


def stop(running):
    """Begin a graceful stop, and let it get as far as it can."""
    running.call(running.server.stop, "the test says so")
    turns(running)


class Gated:
    """An app that tells its path, and answers when it is told to."""

    def __init__(self, *before):
        self.before = before
        self.calls = queue.Queue()
        self.go = asyncio.Event()

    async def __call__(self, scope, receive, send):
        for message in self.before:
            await send(message)
        self.calls.put(scope["path"])
        await self.go.wait()
        if not self.before:
            await send(START)
        await send(body(b"done"))


BEFORE = pytest.mark.parametrize("before", [[], [START, CHUNK]], ids=["silent", "streaming"])


class TestGracefulStop:
    """Stop accepting, finish requests, tell the apps, cancel them."""

    def test_an_idle_connection_is_closed(self, monkeypatch):
        """At once if it has had an answer. A new one has a moment to send its request."""
        monkeypatch.setattr(server, "LAST_CALL", 0.5)
        patient = {"timeout_keep_alive": 3600, "timeout_request_head": 3600}
        with serve(saying(START, END), **NO_HURRY, **patient) as running:
            with running.connect() as idle, running.connect() as silent:
                idle.send(GET)
                assert idle.response()[0] == 200
                idle.sock.settimeout(0.9 * server.LAST_CALL)
                until(running, lambda: len(running.server.connections) == 2)
                running.call(running.server.stop, "the test says so")
                assert idle.read_all() == silent.read_all() == b""
                has_ended(running)

    def test_a_request_that_is_on_its_way_is_answered(self):
        """What if its head has not arrived, or only half of it?"""
        with serve(saying(START, body(b"x")), **NO_HURRY) as running:
            with running.connect() as new, running.connect() as half:
                half.send(GET + GET[:9])
                assert half.response()[0] == 200  # so both have arrived
                stop(running)
                new.send(GET)
                half.send(GET[9:])
                for client in (new, half):
                    status, fields, _ = client.response()
                    assert (status, fields["connection"]) == (200, "close")
                has_ended(running)

    def test_one_that_is_accepted_in_the_turn_of_the_stop_is_answered_too(self):
        busy = threading.Event()
        with serve(saying(START, body(b"x")), **NO_HURRY) as running:
            running.server.loop.call_soon_threadsafe(busy.wait, PATIENCE)
            with running.connect() as client:
                client.send(GET)
                running.server.loop.call_soon_threadsafe(running.server.stop, "the test says so")
                busy.set()
                assert client.response()[0] == 200
            has_ended(running)

    @pytest.mark.parametrize("size", [100_000, 230_000, 240_000, 250_000, 260_000])
    def test_an_answer_arrives_whole_whatever_of_it_is_unsent(self, size, monkeypatch):
        """What if the app has said all, and the client reads later? Some of these sizes
        leave a little with asyncio, which has told us that it has room."""
        monkeypatch.setattr(server, "LAST_CALL", 0.02)
        monkeypatch.setattr(server, "TICK", 0.02)
        app = saying(START, body(bytes(size)))
        with serve(app, narrow_listener(), **NO_HURRY) as running, running.connect() as client:
            client.send(GET)
            client.read_until(b"\r\n\r\n")
            running.call(running.server.stop, "the test says so")
            running.thread.join(0.1)  # it must not end before the client has read
            assert client.read_all().count(b"\0") == size
            has_ended(running)

    @BEFORE
    def test_a_request_in_flight_finishes_while_new_connections_are_refused(self, before):
        app = Gated(*before)
        with serve(app, **NO_HURRY) as running, running.connect() as client:
            client.send(GET)
            app.calls.get(timeout=PATIENCE)
            stop(running)
            assert refuses(running.address)
            running.call(app.go.set)
            assert client.response()[2] == (b"not done" if before else b"done")
            assert client.read_all() == b""
            has_ended(running)

    @BEFORE
    def test_a_request_behind_it_is_answered_if_the_client_may_expect_it(self, before):
        """It may not after an answer that says `Connection: close`. A stream that began
        before the stop has not said so, and a proxy may have sent a request behind it."""
        app = Gated(*before)
        with serve(app, **NO_HURRY) as running, running.connect() as client:
            client.send(get(b"/1") + get(b"/2"))
            assert app.calls.get(timeout=PATIENCE) == "/1"
            stop(running)
            running.call(app.go.set)
            expected = [None, "close"] if before else ["close"]
            assert [client.response()[1].get("connection") for _ in expected] == expected
            assert client.read_all() == b""
            has_ended(running)

    def test_half_way_receive_says_disconnect_and_send_still_works(self, log):
        seen = queue.Queue()

        async def app(scope, receive, send):
            await receive()
            await send(START)
            await send(CHUNK)
            seen.put("streaming")
            seen.put(await receive())
            await send(body(b"done"))

        with serve(app, timeout_graceful_shutdown=1.0) as running:
            with running.connect() as client:
                client.send(GET)
                assert seen.get(timeout=PATIENCE) == "streaming"
                stop(running)
                assert seen.empty() and client.response()[2] == b"not done"
            assert seen.get(timeout=PATIENCE) == DISCONNECT
            has_ended(running)
        assert "telling the app" in log.text and "cancelling" not in log.text

    @BEFORE
    def test_at_the_end_of_the_grace_requests_are_cancelled(self, before, log):
        app = Gated(*before)
        with serve(app, timeout_graceful_shutdown=0.2) as running:
            with running.connect() as client:
                client.send(GET)
                app.calls.get(timeout=PATIENCE)
                running.call(running.server.stop, "the test says so")
                data = client.read_all()
        assert data.startswith(b"HTTP/1.1 200" if before else b"HTTP/1.1 503 ")
        assert not data.endswith(b"0\r\n\r\n")  # it does not look complete
        assert "cancelling" in log.text and not errors(log)


def test_one_of_several_workers_accepts_one_connection_a_turn():
    """So that another one may take the next. Those that are not accepted wait meanwhile."""
    busy, seen = threading.Event(), []

    def count():
        seen.append(len(running.server.connections))
        running.server.loop.call_soon(count)

    with serve(echo, workers=2) as running, contextlib.ExitStack() as stack:
        running.server.loop.call_soon_threadsafe(busy.wait, PATIENCE)
        for _ in range(10):
            stack.enter_context(running.connect())
        running.server.loop.call_soon_threadsafe(count)
        busy.set()
        until(running, lambda: seen[-1:] == [10])
    assert max(after - before for before, after in zip(seen, seen[1:])) == 1


class TestBackgroundWork:
    """What an app does after its response is complete."""

    @staticmethod
    def app(go, seen):
        async def app(scope, receive, send):
            await send(START)
            await send(body(scope["path"].encode()))
            if scope["path"] == "/slow":
                await go.wait()
                seen.put(await receive())

        return app

    def test_it_holds_up_neither_the_next_request_nor_the_end_of_the_connection(self):
        go, seen = asyncio.Event(), queue.Queue()
        with serve(self.app(go, seen)) as running:
            with running.connect() as client:
                client.send(get(b"/slow") + get(b"/next"))
                assert client.response()[2] == b"/slow"
                assert client.response()[2] == b"/next"
            until(running, lambda: not running.server.connections)
            running.call(go.set)
            assert seen.get(timeout=PATIENCE) == DISCONNECT

    def test_a_stop_waits_for_it(self, log):
        go, seen = asyncio.Event(), queue.Queue()
        with serve(self.app(go, seen), **NO_HURRY) as running, running.connect() as client:
            client.send(get(b"/slow"))
            assert client.response()[0] == 200
            stop(running)
            assert client.read_all() == b""
            running.thread.join(0.1)  # it must not end before the work has
            running.call(go.set)
            has_ended(running)
        assert seen.get_nowait() == DISCONNECT and "cancelling" not in log.text

    def test_at_the_end_of_the_grace_it_is_cancelled(self, log):
        with serve(self.app(asyncio.Event(), None), timeout_graceful_shutdown=0.2) as running:
            with running.connect() as client:
                client.send(get(b"/slow"))
                assert client.response()[0] == 200
            until(running, lambda: not running.server.connections)
        assert "cancelling" in log.text


class TestFromPython:
    """From Python: the parts that concern a running loop."""

    def test_serve_calls_ready_with_its_addresses_and_ends_if_cancelled(self, monkeypatch):
        monkeypatch.setattr(server, "LINGER", 1000.0)  # that a stop does not wait for

        async def main():
            ready = asyncio.get_running_loop().create_future()
            use = {"port": 0, "lifespan": "off", "ready": ready.set_result, **NO_HURRY}
            task = asyncio.create_task(server.serve(echo, **use))
            [address] = await asyncio.wait_for(ready, PATIENCE)
            assert address.startswith("http://127.0.0.1:")
            port = int(address.removeprefix("http://127.0.0.1:"))
            with Client(("127.0.0.1", port)) as idle:
                idle.send(GET)
                assert (await asyncio.to_thread(idle.response))[0] == 200
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(task, PATIENCE)
                assert idle.read_all() == b""
            assert refuses(("127.0.0.1", port))

        asyncio.run(main())

    def test_run_inside_a_running_loop_says_to_await_serve(self, log):
        async def main():
            return server.run(echo, port=0)

        assert asyncio.run(main()) == 3
        (line,) = errors(log)
        assert "await server.serve" in line and "\n" not in line
