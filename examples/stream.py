# examples/stream.py
# A response in pieces, without end: more_body, and what back-pressure feels like.
# Spec: ASGI www, "Response Body - send event", "Disconnected Client - send exception".
#
# Run:   python server.py stream:app
# Try:   curl -N --limit-rate 10k localhost:8000 >/dev/null   (see send wait for you)
#        then Ctrl-C curl: send raises, and the log says after how much
# Look:  server.py, chapter 7, send and send_body; chapter 5, pause_writing

PIECE = b"sixteen bytes:)\n" * 4096  # 64 KiB


async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if scope["method"] == "HEAD":  # no content to wait for: the loop below would spin
        return await send({"type": "http.response.body"})
    sent = 0
    try:
        while True:
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
            sent += len(PIECE)
            print(f"{sent:,} bytes sent", flush=True)
    except OSError:  # the server's ClientDisconnected is one
        print(f"the client left after {sent:,} bytes", flush=True)
