"""Say hello in two messages: the answer."""


async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])  # "lifespan" too: the server goes on
    body = "Grüezi, world!\n".encode()
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [
                (b"content-type", b"text/plain; charset=utf-8"),
                (b"content-length", b"%d" % len(body)),  # bytes, not characters
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})
