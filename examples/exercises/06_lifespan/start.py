"""The server's side of lifespan: it asks, and as it is does not wait for an answer.

Run:   python examples/exercises/06_lifespan/start.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[dict, Receive, Send], Awaitable[None]]


class Lifespan:
    """One app's conversation with its process: two questions, and what it answers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.state: dict[str, Any] = {}  # what the app wants to share with its requests
        self.task: asyncio.Task | None = None  # kept: the loop has it weakly
        self.messages: asyncio.Queue[Message] = asyncio.Queue()

    async def startup(self) -> str:
        """Start the app. "complete", "failed: …" or "unsupported"."""
        self.task = asyncio.create_task(self.run())
        self.messages.put_nowait({"type": "lifespan.startup"})
        return "complete"

    async def shutdown(self) -> str:
        """End the app. "complete", "failed: …", or "ended" for one that is gone."""
        self.messages.put_nowait({"type": "lifespan.shutdown"})
        return "complete"

    async def run(self) -> None:
        asgi = {"version": "3.0", "spec_version": "2.0"}
        scope = {"type": "lifespan", "asgi": asgi, "state": self.state}
        try:
            await self.app(scope, self.messages.get, self.send)
        except Exception as exc:  # the app is foreign code
            print(f"lifespan: the app raised {exc!r}")

    async def send(self, message: Message) -> None:
        print("the app says", message)


async def demo(scope: dict, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})


async def main() -> None:
    lifespan = Lifespan(demo)
    print("startup: ", await lifespan.startup())
    print("shutdown:", await lifespan.shutdown())


if __name__ == "__main__":
    asyncio.run(main())
