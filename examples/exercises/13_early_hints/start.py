"""foal, extended from outside: its app may send Early Hints (103) before its answer. As
it is, the app is not told that it may, and what it hints at is refused.

Run:   python examples/exercises/13_early_hints/start.py
Try:   curl -v localhost:8013        (two heads: `< HTTP/1.1 103` comes a second earlier)
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "server.py").exists())
sys.path.append(str(ROOT))

import h11  # noqa: E402, F401

import server  # noqa: E402


class HintingExchange(server.Exchange):
    """One request and its answer, and perhaps hints before it."""

    async def run(self, scope: server.Scope) -> None:
        """The life of a request. The app has not been called yet."""
        await super().run(scope)

    def handle(self, message: server.Message) -> None:
        """Do what one message of the app says."""
        super().handle(message)


async def app(scope: server.Scope, receive: server.Receive, send: server.Send) -> None:
    """Says which style sheet it will need, and then takes a second for its page."""
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    if "http.response.early_hint" in scope["extensions"]:
        links = [b"</style.css>; rel=preload; as=style"]
        await send({"type": "http.response.early_hint", "links": links})
    await asyncio.sleep(1)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a page\n"})


if __name__ == "__main__":
    server.Exchange = HintingExchange  # where foal makes one, it looks for this name
    sys.exit(server.run(app, port=8013))
