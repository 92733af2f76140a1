# examples/events.py
# Server-sent events that notice at once when the client leaves: receive, all the while.
# Spec: ASGI www, "Disconnect - receive event"; HTML, "Server-sent events".
#
# Run:   python server.py events:app
# Try:   curl -N localhost:8000   then Ctrl-C curl: the server says after how many
#        curl -I localhost:8000   (the same fields, and an end)
# Look:  server.py, chapter 7, receive

import asyncio
import time

EVERY = 1.0  # seconds
HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # otherwise an nginx that compresses collects it
]


async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    left = asyncio.create_task(disconnect(receive))
    number = 0
    try:
        while scope["method"] != "HEAD" and not left.done():
            number += 1
            event = b"id: %d\ndata: %s\n\n" % (number, time.ctime().encode())
            await send({"type": "http.response.body", "body": event, "more_body": True})
            await asyncio.wait([left], timeout=EVERY)
        # A server that stops says disconnect, too; then this ends the stream well.
        await send({"type": "http.response.body"})
    except OSError:
        pass  # because the client has left, and waits for no end
    finally:
        left.cancel()
        print(f"the stream has ended after {number} events", flush=True)


async def disconnect(receive):
    while (await receive())["type"] != "http.disconnect":
        pass  # a request's body, if it has one, comes first
