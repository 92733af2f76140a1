"""Chapter 6, when the client leaves, at every point and in every way."""

from __future__ import annotations

import asyncio
import gc
import queue
import threading

import pytest
from conftest import GET, PATIENCE, Client
from test_cycle import END, GET_10, START, body, get, post, serve, until

import server

MEGABYTE = bytes(1 << 20)


class Witness:
    """An app that goes on until its client leaves, and says how it learns it.

    Its path is the plan: /read to wait in receive, /chunk to send one first, /flood to
    send all the time, /end to be done before the client leaves.
    """

    def __init__(self):
        self.said = queue.Queue()

    async def __call__(self, scope, receive, send):
        plan = scope["path"]
        watcher = asyncio.create_task(self.watch(receive))
        try:
            if plan == "/read":
                await watcher
            await send(START)
            while plan != "/end":
                await send(body(MEGABYTE if plan == "/flood" else b"first", more=True))
                if plan == "/chunk":
                    await watcher
                await asyncio.sleep(0)
            await send(END)
        except server.ClientDisconnected:
            self.said.put("send raised")
            raise
        finally:
            await watcher

    async def watch(self, receive):
        while (await receive())["type"] == "http.request":
            self.said.put("body")
        self.said.put("receive woke")


def connected(running, client, witness):
    until(running, lambda: running.server.connections)


def has_sent_half_a_head(running, client, witness):
    until(running, lambda: any(c.gate.buffer for c in running.server.connections))


def is_waited_for(running, client, witness):
    assert witness.said.get(timeout=PATIENCE) == "body"


def has_the_first_chunk(running, client, witness):
    client.read_until(b"first")


def holds_the_app_up(running, client, witness):
    def full():
        return any(not c.writable.is_set() for c in running.server.connections)

    until(running, full)


def has_the_answer(running, client, witness):
    assert client.response()[0] == 200


POST = post(b"abcdef").replace(b"/", b"/read", 1)
NOTHING, WAKES = set(), {"receive woke"}
BOTH = {"receive woke", "send raised"}

# When a client leaves: what it has sent, what has come of it, and what the app learns.
POINTS = {
    "before the head": (b"", connected, NOTHING),
    "in the head": (GET[:-2], has_sent_half_a_head, NOTHING),
    "in the body": (POST[:-3], is_waited_for, BOTH),
    "after the body": (POST, is_waited_for, BOTH),
    "after the first chunk": (get(b"/chunk"), has_the_first_chunk, BOTH),
    "with a full buffer": (get(b"/flood"), holds_the_app_up, BOTH),
    "after the end": (get(b"/end"), has_the_answer, WAKES),
}
WAYS = {"close": lambda client: client.sock.close(), "reset": Client.reset}


class TestLeaving:
    """ASGI www, "Disconnect", "Disconnected Client - send exception"."""

    @pytest.mark.parametrize("leave", WAYS.values(), ids=WAYS)
    @pytest.mark.parametrize("point", POINTS)
    def test_the_app_learns_it_and_nothing_is_left(self, point, leave, log):
        data, reached, learnt = POINTS[point]
        witness = Witness()
        with serve(witness) as running:
            with running.connect() as client:
                client.send(data)
                reached(running, client, witness)
                leave(client)
            until(running, lambda: not running.server.connections)
            until(running, lambda: not running.server.tasks)
            assert set(witness.said.queue) - {"body"} == learnt
            assert running.talk(get(b"/end"))  # the next client is served
        assert [r.getMessage() for r in log.records if r.levelname == "ERROR"] == []

    def test_a_half_close_in_the_body_ends_the_request(self):
        witness = Witness()
        with serve(witness) as running:
            assert b"200 OK" not in running.talk(POST[:-3])
            until(running, lambda: not running.server.tasks)
        assert set(witness.said.queue) - {"body"} == BOTH

    def test_a_client_that_left_while_the_loop_was_busy_is_noticed_by_send(self, log):
        """What if an app sends and sends, and the loop never gets a turn?"""
        left, outcome = threading.Event(), queue.Queue()

        async def app(scope, receive, send):
            await send(START)
            await send(body(b"first", more=True))
            await asyncio.sleep(0)  # one turn, in which it is written
            left.wait(PATIENCE)  # on purpose, it blocks the loop
            try:
                for _ in range(1000):
                    await send(body(bytes(70_000), more=True))
                outcome.put("never raised")
            except OSError as exc:
                outcome.put(type(exc))
                raise

        with serve(app) as running, running.connect() as client:
            client.send(GET)
            client.read_until(b"first")
            client.reset()
            left.set()
            assert outcome.get(timeout=PATIENCE) is server.ClientDisconnected
        assert [r.getMessage() for r in log.records if r.levelname == "ERROR"] == []

    def test_a_refusal_to_a_client_that_has_just_left_raises_nothing(self, log):
        """What if the 500 is answered by a reset before our half is closed?"""
        called, left = threading.Event(), threading.Event()

        async def app(scope, receive, send):
            called.set()
            left.wait(PATIENCE)  # on purpose, it blocks the loop

        with serve(app) as running:
            with running.connect() as client:
                client.send(GET)
                assert called.wait(PATIENCE)
            left.set()
            until(running, lambda: not running.server.tasks)
        gc.collect()  # asyncio tells of a task's exception when the task is collected
        assert "never retrieved" not in log.text

    def test_receive_goes_on_saying_disconnect_and_send_goes_on_raising(self):
        outcome = queue.Queue()

        async def app(scope, receive, send):
            while (await receive())["type"] == "http.request":
                outcome.put("body")
            while running.server.connections:
                await asyncio.sleep(0)
            for message in (START, END, {"type": "unknown"}, START):
                outcome.put(await receive())
                with pytest.raises(server.ClientDisconnected):
                    await send(message)

        with serve(app) as running:
            with running.connect() as client:
                client.send(GET)
                assert outcome.get(timeout=PATIENCE) == "body"
                client.reset()
            messages = [outcome.get(timeout=PATIENCE) for _ in range(4)]
        assert messages == [{"type": "http.disconnect"}] * 4

    def test_a_slow_reader_gets_everything(self):
        """Back-pressure: the app waits, and nothing is lost."""
        sent = []

        async def app(scope, receive, send):
            await send(START)
            for number in range(20):
                await send(body(b"%d" % (number % 10) * (1 << 20), more=True))
                sent.append(number)
            await send(END)

        with serve(app) as running, running.connect() as client:
            client.send(GET_10)
            holds_the_app_up(running, client, None)
            assert len(sent) < 20
            with client.sock.makefile("rb") as stream:
                data = stream.read().partition(b"\r\n\r\n")[2]
        assert data == b"".join(b"%d" % (n % 10) * (1 << 20) for n in range(20))
