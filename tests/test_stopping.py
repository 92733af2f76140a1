"""Chapters 3 and 6, how it ends: work after the response, a graceful stop in its
phases, and a server that has served enough."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading

import pytest
from conftest import GET, PATIENCE
from test_cycle import END, START, body, get, saying, serve, until

import server

LONG = {"timeout_graceful_shutdown": 1000.0}  # what ends, ends without it
CHUNK = body(b"not ", more=True)
DISCONNECT = {"type": "http.disconnect"}


def ask_to_stop(running):
    """Begin a graceful stop; with nothing in flight, that is soon the end."""
    running.server.loop.call_soon_threadsafe(running.server.stop, "the test says so")


def no_longer_accepts(running):
    """It was told to stop, and has had the turns that this takes."""
    until(running, running.server.stopping.is_set)
    for _ in range(10):
        running.call(lambda: None)


class Gated:
    """An app that answers when it is told to; /now at once."""

    def __init__(self, *before):
        self.before = before
        self.calls = queue.Queue()
        self.go = asyncio.Event()

    async def __call__(self, scope, receive, send):
        if scope["path"] != "/now":
            for message in self.before:
                await send(message)
            self.calls.put(scope["path"])
            await self.go.wait()
        if not self.before:
            await send(START)
        await send(body(b"done"))


class TestGracefulStop:
    """behaviour.md §6: stop accepting, finish, remind, cancel."""

    def test_an_idle_connection_is_closed(self, monkeypatch):
        """By the stop, and not because its own time is over."""
        monkeypatch.setattr(server, "FIRST_REQUEST", 0.2)
        patient = {"timeout_keep_alive": 3600, "timeout_request_head": 3600}
        with serve(saying(START, END), **LONG, **patient) as running:
            with running.connect() as idle, running.connect() as silent:
                idle.send(GET)
                assert idle.response()[0] == 200
                until(running, lambda: len(running.server.connections) == 2)
                ask_to_stop(running)
                assert idle.read_all() == silent.read_all() == b""

    def test_a_client_that_still_reads_its_answer_gets_the_end_of_it(self, monkeypatch):
        """What if the app has said all, and the client pauses while the server stops?"""
        monkeypatch.setattr(server, "CLOSE_NOTIFY", 0.2)
        size = 8 * 1024 * 1024
        with serve(saying(START, body(bytes(size))), **LONG) as running:
            with running.connect() as client:
                client.send(GET)
                client.read_until(b"\r\n\r\n")
                ask_to_stop(running)
                no_longer_accepts(running)
                threading.Event().wait(0.6)  # the pause, longer than CLOSE_NOTIFY
                assert client.read_all().count(b"\0") == size

    def test_a_request_in_flight_finishes_with_connection_close(self):
        app = Gated()
        with serve(app, **LONG) as running, running.connect() as client:
            client.send(GET)
            app.calls.get(timeout=PATIENCE)
            ask_to_stop(running)
            running.call(app.go.set)
            status, fields, data = client.response()
            assert (status, fields["connection"], data) == (200, "close", b"done")
            assert client.read_all() == b""
            running.thread.join(PATIENCE)
            assert not running.thread.is_alive() and not running.errors

    def test_a_stream_in_flight_finishes_and_the_connection_closes(self):
        app = Gated(START, CHUNK)
        with serve(app, **LONG) as running, running.connect() as client:
            client.send(GET)
            app.calls.get(timeout=PATIENCE)
            ask_to_stop(running)
            no_longer_accepts(running)
            running.call(app.go.set)
            assert client.response()[2] == b"not done"
            assert client.read_all() == b""

    @pytest.mark.parametrize("before", [[], [START, CHUNK]])
    def test_a_second_request_on_the_connection_is_not_accepted(self, before):
        app = Gated(*before)
        with serve(app, **LONG) as running, running.connect() as client:
            client.send(get(b"/1") + get(b"/2"))
            app.calls.get(timeout=PATIENCE)
            ask_to_stop(running)
            running.call(app.go.set)
            assert client.response()[0] == 200
            assert client.read_all() == b""
        assert app.calls.empty()

    def test_new_connections_are_refused(self):
        app = Gated()
        with serve(app, **LONG) as running, running.connect() as client:
            client.send(GET)
            app.calls.get(timeout=PATIENCE)
            ask_to_stop(running)
            no_longer_accepts(running)
            with pytest.raises(OSError):
                socket.create_connection(running.address, PATIENCE).close()
            running.call(app.go.set)
            assert client.response()[0] == 200

    def test_half_way_receive_says_disconnect_and_send_still_works(self, log):
        seen = queue.Queue()

        async def app(scope, receive, send):
            await receive()
            await send(START)
            await send(CHUNK)
            seen.put("streaming")
            seen.put(await receive())
            await send(body(b"done"))

        with serve(app, timeout_graceful_shutdown=0.5) as running:
            with running.connect() as client:
                client.send(GET)
                assert seen.get(timeout=PATIENCE) == "streaming"
                ask_to_stop(running)
                assert client.response()[2] == b"not done"
            assert seen.get(timeout=PATIENCE) == DISCONNECT
            running.thread.join(PATIENCE)
        assert "cancelling" not in log.text

    @pytest.mark.parametrize("before, status", [([], b"50"), ([START, CHUNK], b"200")])
    def test_at_the_end_of_the_grace_requests_are_cancelled(self, before, status, log):
        started, cancelled = threading.Event(), threading.Event()

        async def app(scope, receive, send):
            for message in before:
                await send(message)
            started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        with serve(app, timeout_graceful_shutdown=0.2) as running:
            with running.connect() as client:
                client.send(GET)
                assert started.wait(PATIENCE)
                ask_to_stop(running)
                data = client.read_all()
        assert data.startswith(b"HTTP/1.1 " + status) and cancelled.is_set()
        assert not data.endswith(b"0\r\n\r\n")
        assert "cancelling" in log.text

    def test_a_stop_with_nothing_to_do_waits_for_nothing(self):
        with serve(saying(START, END), **LONG) as running:
            running.talk(GET)
            running.stop()
            assert not running.errors


class TestBackgroundWork:
    """What an app does after its response is complete."""

    def test_it_does_not_hold_up_the_next_request(self):
        go, ended = asyncio.Event(), queue.Queue()

        async def app(scope, receive, send):
            await send(START)
            await send(body(scope["path"].encode()))
            if scope["path"] == "/slow":
                await go.wait()
                ended.put(True)

        with serve(app) as running, running.connect() as client:
            client.send(get(b"/slow") + get(b"/next"))
            assert client.response()[2] == b"/slow"
            assert client.response()[2] == b"/next"
            assert ended.empty()
            running.call(go.set)
            assert ended.get(timeout=PATIENCE)

    def test_it_is_waited_for_at_stop(self, log):
        go, steps = asyncio.Event(), []

        async def app(scope, receive, send):
            await send(START)
            await send(END)
            await go.wait()
            await asyncio.sleep(0)
            steps.append("background work")

        with serve(app, **LONG) as running:
            with running.connect() as client:
                client.send(GET)
                assert client.response()[0] == 200
                ask_to_stop(running)
                assert client.read_all() == b""
            until(running, lambda: not running.server.connections)
            assert running.thread.is_alive() and steps == []
            running.call(go.set)
            running.thread.join(PATIENCE)
        assert steps == ["background work"]
        assert "cancelling" not in log.text

    def test_its_client_may_leave_meanwhile(self, log):
        go, seen = asyncio.Event(), queue.Queue()

        async def app(scope, receive, send):
            await send(START)
            await send(END)
            await go.wait()
            seen.put(await receive())

        with serve(app) as running:
            with running.connect() as client:
                client.send(GET)
                assert client.response()[0] == 200
            until(running, lambda: not running.server.connections)
            running.call(go.set)
            assert seen.get(timeout=PATIENCE) == DISCONNECT
        assert not [r for r in log.records if r.levelname == "ERROR"]


class TestEnough:
    """behaviour.md §1, --limit-max-requests."""

    def test_the_server_stops_after_so_many_requests(self):
        with serve(saying(START, body(b"x")), limit_max_requests=3) as running:
            with running.connect() as client:
                client.send(GET + GET)
                assert client.response()[1].get("connection") is None
                assert client.response()[1].get("connection") is None
                client.send(GET + GET)
                assert client.response()[1]["connection"] == "close"
                assert client.read_all() == b""
            running.thread.join(PATIENCE)
            assert not running.thread.is_alive() and not running.errors

    def test_without_a_limit_it_goes_on(self):
        with serve(saying(START, body(b"x"))) as running, running.connect() as client:
            client.send(GET * 20)
            assert [client.response()[0] for _ in range(20)] == [200] * 20
