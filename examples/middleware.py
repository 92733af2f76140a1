# examples/middleware.py
# An app around an app: it times the inner one, and adds a field to its response.
# Spec: ASGI main, "Middleware"; W3C Server Timing (a browser's network tab shows it).
#
# Run:   python server.py middleware:app
# Try:   curl -i localhost:8000
#        or, around an app of your own: app = timed(app)
# Look:  server.py, chapter 7, send and handle

import asyncio
import time


def timed(app):
    """To the server it is an app; to the app it is the server."""

    async def around(scope, receive, send):
        if scope["type"] != "http":  # lifespan and websocket, we pass them on unchanged
            return await app(scope, receive, send)
        started = time.perf_counter()

        async def send_timed(message):
            if message["type"] == "http.response.start":
                took = 1000 * (time.perf_counter() - started)
                field = (b"server-timing", b"app;dur=%.1f" % took)
                # A copy: the message is the app's, and it may send it again.
                message = {**message, "headers": [*message.get("headers", ()), field]}
            await send(message)

        await app(scope, receive, send_timed)

    return around


async def inner(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    await asyncio.sleep(0.05)  # something to measure
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"look at the fields\n"})


app = timed(inner)
