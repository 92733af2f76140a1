"""One loop for all: whatever one client or app does, the others get their turns."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket

import pytest
from conftest import GET, PATIENCE, Process, serving
from test_cycle import until
from test_frames import CONTINUATION, PING, PONG, TEXT, frame
from test_websocket import handshake

import server

START = {"type": "http.response.start", "status": 200, "headers": []}
MORE = {"type": "http.response.body", "body": bytes(1024), "more_body": True}
END = {"type": "http.response.body", "body": b""}


async def turns_during(work) -> int:
    """How many turns the loop has while this coroutine runs."""
    count = 0

    async def tick():
        nonlocal count
        while True:
            count += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0)
    before = count
    await work
    ticking.cancel()
    return count - before


def answer_with_turns(work) -> tuple:
    """An app that answers by work(receive, send), and a list for its turns."""
    turns = []

    async def app(scope, receive, send):
        turns.append(await turns_during(work(receive, send)))

    return app, turns


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("count, size", [(640, 1024), (2560, 1)])
def test_a_stream_that_never_has_to_wait_lets_others_run(count, size, method):
    """What if a client reads as fast as the app sends, or asked for the head alone? And
    the smallest of messages takes its time, too."""

    async def work(receive, send):
        await send(START)
        for _ in range(count):  # ten times 64 KiB, as we count
            await send({**MORE, "body": bytes(size)})
        await send(END)

    app, turns = answer_with_turns(work)
    with serving(app) as running:
        request = GET.replace(b"GET", method)
        assert running.talk(request).count(b"\0") in (0, count * size)
    assert turns[0] >= 10


def test_so_does_a_websocket():
    count = 2560

    async def work(receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        for _ in range(count):
            await send({"type": "websocket.send", "text": ""})
        await send({"type": "websocket.close"})

    app, turns = answer_with_turns(work)
    with serving(app) as running, running.connect() as client:
        client.send(handshake())
        client.read_until(b"\r\n\r\n")
        end = b"\x88\x02\x03\xe8"
        assert client.read_until(end) == b"\x81\0" * count + end
    assert turns[0] >= 10


async def answer_nothing(scope, receive, send):
    raise NotImplementedError


@pytest.mark.skipif(os.name == "nt", reason="a proactor accepts one a turn by itself")
@pytest.mark.parametrize(("workers", "most"), [(1, 10), (2, 1)])
def test_one_worker_of_several_takes_one_connection_a_turn(workers, most):
    """What if ten arrive at once? A busy worker leaves them to an idle one; but whoever is
    alone takes them, or the last would wait for ten turns."""

    async def turns_of_a_crowd():
        with contextlib.ExitStack() as stack:
            for _ in range(10):  # while the loop does nothing else
                stack.enter_context(socket.create_connection(running.address))
            counts = [0]
            while counts[-1] < 10:
                await asyncio.sleep(0)
                counts.append(len(running.server.connections))
        return max(after - before for before, after in itertools.pairwise(counts))

    with serving(answer_nothing, workers=workers) as running:
        loop = running.server.loop
        found = asyncio.run_coroutine_threadsafe(turns_of_a_crowd(), loop)
        assert found.result(PATIENCE) == most


def test_a_read_full_of_chunks_is_taken_in_by_and_by(monkeypatch):
    """What if 256 KiB arrive in chunks of one byte? They cost h11 220 ms."""
    monkeypatch.setattr(server, "CHUNKS_AT_ONCE", 10)
    messages = []

    async def app(scope, receive, send):
        while (message := await receive())["more_body"]:
            messages.append(message["body"])
        messages.append(message["body"])
        await send(START)
        await send(END)

    head = GET[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
    with serving(app) as running:
        running.talk(head.replace(b"GET", b"POST") + b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n")
    assert b"".join(messages) == b"x" * 1000
    assert max(map(len, messages)) <= 20 and len(messages) >= 50


def test_chunks_that_wait_take_no_more_than_what_they_carry():
    """What if the app does not read? A piece of 2 bytes takes 60 of memory."""
    read, bodies = asyncio.Event(), []

    async def app(scope, receive, send):
        await read.wait()
        bodies.append((await receive())["body"])
        await send(START)
        await send(END)

    head = GET[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
    with serving(app, lifespan="off") as running, running.connect() as client:
        client.send(head.replace(b"GET", b"POST") + b"2\r\nxy\r\n" * 3000 + b"0\r\n\r\n")
        until(running, lambda: any(c.cycle for c in running.server.connections))
        [connection] = running.server.connections
        cycle = connection.cycle
        until(running, lambda: cycle.arrived == 6000)
        assert len(cycle.body) <= server.CHUNKS_AT_ONCE
        running.call(read.set)
        assert client.response()[0] == 200
    assert bodies == [b"xy" * 3000]


def test_an_upload_in_tiny_chunks_arrives():
    """What if so many wait in our buffer that we have stopped reading? And when we read
    again, there is still one turn at a time for what waits."""
    count, sizes = 100_000, []

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            sizes.append(len(message["body"]))
            more = message["more_body"]
        await send(START)
        await send(END)

    head = GET[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
    with serving(app) as running, running.connect() as client:
        client.send(head.replace(b"GET", b"POST") + b"1\r\nx\r\n" * count + b"0\r\n\r\n")
        assert client.response()[0] == 200
    assert sum(sizes) == count
    assert max(sizes) <= 2 * server.CHUNKS_AT_ONCE


def test_a_read_full_of_frames_is_taken_in_by_and_by():
    """What if 10,000 small messages arrive at once, and the app echoes each?"""
    count = 10_000

    async def work(receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        for _ in range(count):
            await send({"type": "websocket.send", "text": (await receive())["text"]})
        await send({"type": "websocket.close"})

    app, turns = answer_with_turns(work)
    with serving(app, ws_deflate=False) as running, running.connect() as client:
        client.send(handshake() + frame(TEXT, b"") * count)
        client.read_until(b"\r\n\r\n")
        assert client.read_until(b"\x88\x02\x03\xe8") == b"\x81\0" * count + b"\x88\x02\x03\xe8"
    assert turns[0] >= count / 512  # 64 KiB hold 256 of them, as we count


@pytest.mark.parametrize(
    "first, many, last",
    [
        (b"", frame(PING, b""), frame(TEXT, b"")),
        (b"", frame(PONG, b""), frame(TEXT, b"")),
        (
            frame(TEXT, b"", fin=False),
            frame(CONTINUATION, b"", fin=False),
            frame(CONTINUATION, b""),
        ),
    ],
    ids=["pings", "pongs", "fragments"],
)
def test_nor_are_frames_that_are_no_messages(first, many, last):
    """What if 10,000 frames arrive of which the app gets none, or one?"""
    count = 10_000

    async def work(receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        assert (await receive())["text"] == ""
        await send({"type": "websocket.close"})

    app, turns = answer_with_turns(work)
    with serving(app) as running, running.connect() as client:
        client.send(handshake() + first + many * count + last)
        client.read_until(b"\x88\x02\x03\xe8")
    assert turns[0] >= count / server.FRAMES_AT_ONCE


def test_a_flood_of_pings_from_a_client_that_left_is_not_logged(caplog):
    """asyncio says each time that nobody is there for the pong."""

    async def app(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass

    with serving(app, lifespan="off") as running, running.connect() as client:
        client.send(handshake())
        client.read_until(b"\r\n\r\n")
        client.send(frame(PING, b"") * 10_000)
        client.reset()
    assert [r.message for r in caplog.records if r.name == "asyncio"] == []


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="SIGHUP is POSIX's")
def test_a_kept_connection_may_still_be_used_when_its_worker_is_replaced():
    """Behind a proxy: its POST meets an answer, and not a closing socket, which it could
    only tell its client as 502. The answer says that it was the last."""
    arguments = ("--port", 0, "--workers", 2, "--log-level", "debug")
    with Process("example:app", *arguments) as process:
        with process.connect(process.port()) as client:
            client.send(GET)
            assert client.response()[0] == 200
            process.wait_for("is ready after")  # the second of them
            process.process.send_signal(signal.SIGHUP)
            for _ in range(2):
                process.wait_for("asked by the supervisor: stopping")
            client.send(GET)
            status, fields, _ = client.response()
            assert (status, fields["connection"]) == (200, "close")
        process.interrupt()
        assert process.exit_code() == 0
