"""A server that stops accepting, finishes what it has begun, and leaves. The answer.

Run:   python examples/exercises/answers/11_graceful.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

App = Callable[[bytes], Awaitable[bytes]]  # a line in, the answer out


class Server:
    """Many connections, many lines on each, one answer at a time for a connection."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.acceptor: asyncio.Server | None = None
        self.connections: set[asyncio.Task] = set()
        self.busy: set[asyncio.Task] = set()  # those that owe an answer
        self.stopping = False

    async def start(self, port: int = 0) -> int:
        """Listen; return the port."""
        self.acceptor = await asyncio.start_server(self.handle, "127.0.0.1", port)
        return self.acceptor.sockets[0].getsockname()[1]

    async def handle(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One connection: asyncio runs this in a task of its own."""
        task = asyncio.current_task()
        self.connections.add(task)
        try:
            while not self.stopping and (line := await reader.readline()):
                self.busy.add(task)
                answer = await self.app(line)
                writer.write(answer)
                await writer.drain()
                self.busy.discard(task)
            writer.close()
            await writer.wait_closed()  # what it still holds goes out first
        except (ConnectionError, asyncio.CancelledError):
            writer.transport.abort()  # the client has left, or stop says so
        finally:
            self.connections.discard(task)
            self.busy.discard(task)

    async def stop(self, grace: float) -> int:
        """Stop, within `grace` seconds; return how many answers were lost."""
        self.stopping = True
        self.acceptor.close()  # and not wait_closed: it would wait for the idle ones
        for task in self.connections - self.busy:
            task.cancel()  # between two lines: its client waits for nothing
        late = set()
        if self.connections:
            _, late = await asyncio.wait(self.connections, timeout=grace)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
        return len(late)


async def slow_echo(line: bytes) -> bytes:
    await asyncio.sleep(5)
    return line.upper()


async def main() -> None:
    server = Server(slow_echo)
    print("port", await server.start(8011))
    try:
        await asyncio.Event().wait()  # until Ctrl-C cancels it
    finally:
        print("answers lost:", await server.stop(grace=10))


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        pass  # because main has seen it, and has stopped the server
