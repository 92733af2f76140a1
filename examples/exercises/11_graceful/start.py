"""A server that answers lines, and whose stop loses the answers in flight.

Run:   python examples/exercises/11_graceful/start.py
Try:   in another terminal: nc localhost 8011; write a line, and while the answer is on
       its way, Ctrl-C the server
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
            while line := await reader.readline():
                answer = await self.app(line)
                writer.write(answer)
                await writer.drain()
            writer.close()
            await writer.wait_closed()  # what it still holds goes out first
        except (ConnectionError, asyncio.CancelledError):
            writer.transport.abort()  # the client has left, or stop says so
        finally:
            self.connections.discard(task)

    async def stop(self, grace: float) -> int:
        """Stop, within `grace` seconds; return how many answers were lost."""
        self.acceptor.close()
        for task in self.connections:
            task.cancel()
        return 0


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
