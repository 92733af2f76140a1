# examples/ws_echo.py
# A WebSocket in its smallest form: accept, receive, send, until the client leaves.
# Spec: ASGI www, "WebSocket".
#
# Run:   python server.py ws_echo:app
# Try:   in a browser's console, on any page of http://localhost:8000:
#        s = new WebSocket("ws://localhost:8000")
#        s.onmessage = event => console.log(event.data)
#        s.onopen = () => s.send("hello")
# Look:  server.py, chapter 8, WebSocket


async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a page to try it from\n"})
    elif scope["type"] == "websocket":
        await receive()  # websocket.connect
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({**message, "type": "websocket.send"})
