# examples/example.py
# Hello in two messages: how every ASGI answer begins, and how it ends.
# Spec: ASGI www, "Response Start - send event", "Response Body - send event".
#
# Run:   python server.py example:app
# Try:   curl -i localhost:8000
# Look:  server.py, chapter 7, handle and send_body


async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])  # "lifespan" too: the server goes on
    body = b"Hello, world!\n"
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [
                (b"content-type", b"text/plain; charset=utf-8"),
                (b"content-length", b"%d" % len(body)),
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})
