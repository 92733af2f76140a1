"""A server and its clients in one loop, over real sockets. The app says when it has been
called and answers when it is told to, so that nothing here sleeps and hopes."""

import asyncio
import contextlib
import functools
import os

import pytest

# Seconds; only a failing test takes so long. Windows takes two to say "refused".
DEADLINE = 2.0 if os.name != "nt" else 10.0
LONG = 60.0  # seconds of grace, which no test should need


class App:
    """Answers a line with the same in capitals, once `go` is set."""

    def __init__(self):
        self.called = asyncio.Event()
        self.go = asyncio.Event()
        self.lines = []
        self.ends = []  # how each call ended

    async def __call__(self, line):
        self.lines.append(line)
        self.called.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise
        self.ends.append("answered")
        return line.upper()


def scenario(test):
    """Run the coroutine `test(server, app, connect)` against a server that has started."""

    @functools.wraps(test)
    def run(exercise):
        async def main():
            app = App()
            server = exercise.Server(app)
            port = await server.start()
            async with contextlib.AsyncExitStack() as cleanup:

                async def connect():
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    cleanup.callback(writer.close)
                    return reader, writer

                cleanup.callback(server.acceptor.close)
                async with asyncio.timeout(DEADLINE):
                    await test(server, app, connect)

        asyncio.run(main())

    del run.__wrapped__  # else pytest would ask for the arguments of `test`
    return run


async def ask(app, connect, line=b"hello\n"):
    """A client whose question has reached the app."""
    reader, writer = await connect()
    app.called.clear()
    writer.write(line)
    await app.called.wait()
    return reader, writer


async def rest(reader) -> bytes:
    """All that comes until the connection ends, in whatever way."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(1000):
            data += piece
    return data


@scenario
async def test_an_answer_in_flight_arrives(server, app, connect):
    reader, _ = await ask(app, connect)
    stop = asyncio.create_task(server.stop(LONG))
    await asyncio.sleep(0)  # a turn of the loop: stop has begun
    app.go.set()
    assert await rest(reader) == b"HELLO\n"
    assert await stop == 0


@scenario
async def test_all_answers_in_flight_arrive(server, app, connect):
    readers = [(await ask(app, connect, b"%d\n" % i))[0] for i in range(5)]
    stop = asyncio.create_task(server.stop(LONG))
    await asyncio.sleep(0)
    app.go.set()
    assert [await rest(reader) for reader in readers] == [b"%d\n" % i for i in range(5)]
    assert await stop == 0


@scenario
async def test_nobody_is_accepted_any_more(server, app, connect):
    await ask(app, connect)
    stop = asyncio.create_task(server.stop(LONG))
    await asyncio.sleep(0)
    with pytest.raises(OSError):
        await connect()
    app.go.set()
    await stop


@scenario
async def test_stop_returns_when_all_is_said(server, app, connect):
    """What if the process exits as soon as stop returns? Nothing may be left to do."""
    await ask(app, connect)
    stop = asyncio.create_task(server.stop(LONG))
    await asyncio.sleep(0)
    assert not stop.done(), "it has returned, and an answer is still in flight"
    app.go.set()
    await stop
    assert app.ends == ["answered"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


@scenario
async def test_who_asks_for_nothing_holds_nobody_up(server, app, connect):
    """Two connections between two lines: one never asked, one has had an answer. They
    are accepted in the order in which they came, so the answer tells of both."""
    app.go.set()
    silent, _ = await connect()
    reader, _ = await ask(app, connect)
    assert await reader.readline() == b"HELLO\n"
    assert await server.stop(LONG) == 0
    assert await rest(reader) == await rest(silent) == b""


@scenario
async def test_an_answer_in_flight_is_the_last(server, app, connect):
    """What if the client has written its next line already? It gets no answer, and
    can tell: the connection ends behind the last one."""
    reader, _ = await ask(app, connect, b"one\ntwo\n")
    stop = asyncio.create_task(server.stop(LONG))
    await asyncio.sleep(0)
    app.go.set()
    assert await rest(reader) == b"ONE\n"
    assert await stop == 0
    assert app.lines == [b"one\n"]


@scenario
async def test_the_grace_ends(server, app, connect):
    """An app that never answers is cancelled, and counted."""
    reader, _ = await ask(app, connect)
    assert await server.stop(0.05) == 1
    assert app.ends == ["cancelled"]
    assert await rest(reader) == b""
    assert asyncio.all_tasks() == {asyncio.current_task()}


@scenario
async def test_with_nobody_there_it_stops_at_once(server, app, connect):
    assert await server.stop(LONG) == 0


@scenario
async def test_a_client_that_has_left_is_no_loss(server, app, connect):
    _, writer = await ask(app, connect)
    writer.transport.abort()
    stop = asyncio.create_task(server.stop(LONG))
    await asyncio.sleep(0)
    app.go.set()
    assert await stop == 0
