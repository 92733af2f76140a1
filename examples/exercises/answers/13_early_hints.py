"""foal, extended from outside: its app may send Early Hints (103) before its answer. The
answer to the exercise.

Run:   python examples/exercises/answers/13_early_hints.py
Try:   curl -v localhost:8013        (two heads: `< HTTP/1.1 103` comes a second earlier)
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "server.py").exists())
sys.path.append(str(ROOT))

import h11  # noqa: E402

import server  # noqa: E402

HINT = "http.response.early_hint"


class HintingExchange(server.Exchange):
    """One request and its answer, and perhaps hints before it."""

    async def run(self, scope: server.Scope) -> None:
        """The life of a request. The app has not been called yet."""
        # "A server MUST NOT send a 1xx response to an HTTP/1.0 client" (RFC 9110 §15.2).
        self.may_hint = scope["http_version"] != "1.0"
        if self.may_hint:
            scope["extensions"][HINT] = {}  # our own: foal copies it for each request
        await super().run(scope)

    def handle(self, message: server.Message) -> None:
        """Do what one message of the app says."""
        # h11 says whether our head has left; `http.response.start` alone does not send
        # it. Our own state says that h11 is not at the next request already.
        early = self.conn.our_state is h11.SEND_RESPONSE
        early = early and self.state in server.UNANSWERED
        if message["type"] == HINT and self.may_hint and early:
            self.send_hint(message["links"])
        else:
            super().handle(message)  # which raises RuntimeError for a late hint

    def send_hint(self, links: list[bytes]) -> None:
        if not all(type(link) is bytes for link in links):
            raise TypeError(f"links must be bytes, not {links!r}")
        fields = [(b"Link", link) for link in links]
        hints = h11.InformationalResponse(
            status_code=103, headers=fields, reason=b"Early Hints"
        )
        waiting = self.conn.client_is_waiting_for_100_continue
        self.wire.write(self.conn.send(hints))
        # h11 takes any informational response for the answer to Expect. But the client
        # waits for a 100 or a final answer (RFC 9110 §10.1.1).
        self.conn.client_is_waiting_for_100_continue = waiting


async def app(scope: server.Scope, receive: server.Receive, send: server.Send) -> None:
    """Says which style sheet it will need, and then takes a second for its page."""
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    if HINT in scope["extensions"]:
        links = [b"</style.css>; rel=preload; as=style"]
        await send({"type": HINT, "links": links})
    await asyncio.sleep(1)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a page\n"})


if __name__ == "__main__":
    server.Exchange = HintingExchange  # where foal makes one, it looks for this name
    sys.exit(server.run(app, port=8013))
