# examples/scope.py
# The scope as JSON: all that the server knows of a request before its body.
# Spec: ASGI www, "HTTP Connection Scope".
#
# Run:   python server.py scope:app
# Try:   curl 'localhost:8000/caf%C3%A9?a=1&a=2'   (path is decoded text; raw_path and
#        query_string are the bytes received: taking them apart is the app's business)
#        curl -H 'X-Twice: 1' -H 'X-Twice: 2' localhost:8000   (two pairs, in order: so
#        headers are a list, and dict(scope["headers"]) would forget the first)
# Look:  server.py, chapter 6, make_scope

import json


async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    # JSON has no bytes, and a state may hold anything: they are shown as Python does.
    text = json.dumps(scope, indent=2, ensure_ascii=False, default=repr)
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode() + b"\n"})
