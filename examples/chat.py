# examples/chat.py
# A chat: what one client says is sent to all. After antirez's smallchat.
# Spec: ASGI www, "WebSocket", "Disconnect - receive event".
#
# Run:   python server.py chat:app
# Try:   open http://localhost:8000 in two tabs, and write in both
# Look:  server.py, chapter 8, WebSocket (send waits for a client that reads slowly, and
#        holds up the speaker: give each client a queue of its own, as an exercise)

import itertools

PAGE = b"""<!doctype html><meta charset="utf-8"><title>chat</title>
<ul id="said"></ul><form><input id="words" autofocus autocomplete="off"></form><script>
const socket = new WebSocket(location.href.replace("http", "ws"))
socket.onmessage = event => {
  const item = said.appendChild(document.createElement("li"))
  item.textContent = event.data
}
document.forms[0].onsubmit = event => {
  event.preventDefault(); socket.send(words.value); words.value = ""
}</script>"""
HTML = [(b"content-type", b"text/html; charset=utf-8")]
numbers = itertools.count(1)  # a port would not do: behind a proxy all have the same
everybody = {}  # their send functions, by name


async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": HTML})
        await send({"type": "http.response.body", "body": PAGE})
    elif scope["type"] == "websocket":
        await receive()  # websocket.connect
        await send({"type": "websocket.accept"})
        name = f"guest {next(numbers)}"
        everybody[name] = send
        try:
            await say(f"{name} is here")
            while (message := await receive())["type"] == "websocket.receive":
                await say(f"{name}: {message.get('text') or 'bytes'}")
        finally:
            del everybody[name]
        await say(f"{name} has left")


async def say(words):
    for send in list(everybody.values()):
        try:
            await send({"type": "websocket.send", "text": words})
        except OSError:
            pass  # because that client leaves as well: its own loop says so
