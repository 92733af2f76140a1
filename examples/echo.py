# examples/echo.py
# A request body in pieces: receive until there is no more, and answer with the same.
# Spec: ASGI www, "Request - receive event".
#
# Run:   python server.py echo:app
# Try:   curl --data-binary @README.md localhost:8000
#        curl -H 'Expect: 100-continue' -d hello -v localhost:8000   (see when 100 comes)
# Look:  server.py, chapter 7, receive


async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    more_body = True
    while more_body:
        message = await receive()
        if message["type"] == "http.disconnect":
            return  # half an upload: the client has left, and wants no answer
        more_body = message.get("more_body", False)  # both keys are optional
        part = {"body": message.get("body", b""), "more_body": more_body}
        await send({"type": "http.response.body", **part})
