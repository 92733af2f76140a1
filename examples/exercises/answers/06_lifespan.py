"""The server's side of lifespan: two questions, and every way to answer them.

Run:   python examples/exercises/answers/06_lifespan.py
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
        self.question = ""  # the one that was asked last
        self.answer: asyncio.Future[str] | None = None  # and what the app says to it

    async def startup(self) -> str:
        """Start the app. "complete", "failed: …" or "unsupported"."""
        self.task = asyncio.create_task(self.run())
        answer = await self.ask("startup")
        if answer == "complete":
            return answer
        await self.leave()
        return "unsupported" if answer == "ended" else answer

    async def shutdown(self) -> str:
        """End the app. "complete", "failed: …", or "ended" for one that is gone."""
        if self.task is None or self.task.done():
            return "ended"
        answer = await self.ask("shutdown")
        await self.leave()
        return answer

    async def ask(self, question: str) -> str:
        self.question = question
        self.answer = asyncio.get_running_loop().create_future()
        self.messages.put_nowait({"type": f"lifespan.{question}"})
        return await self.answer

    def reply(self, answer: str) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)

    async def leave(self) -> None:
        """Nothing is left to talk about: what the app still does, it need not."""
        self.task.cancel()
        await asyncio.wait([self.task])

    async def run(self) -> None:
        asgi = {"version": "3.0", "spec_version": "2.0"}
        scope = {"type": "lifespan", "asgi": asgi, "state": self.state}
        try:
            await self.app(scope, self.messages.get, self.send)
        except Exception as exc:  # the app is foreign code
            print(f"lifespan: the app raised {exc!r}")
        finally:
            self.reply("ended")  # however it ends, no question waits any longer

    async def send(self, message: Message) -> None:
        match message["type"].removeprefix(f"lifespan.{self.question}."):
            case "complete":
                self.reply("complete")
            case "failed":
                self.reply(f"failed: {message.get('message', '')}")
            case _:
                raise RuntimeError(f"{message['type']} in answer to {self.question}")


async def demo(scope: dict, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})


async def main() -> None:
    lifespan = Lifespan(demo)
    print("startup: ", await lifespan.startup())
    print("shutdown:", await lifespan.shutdown())


if __name__ == "__main__":
    asyncio.run(main())
