# examples/checker.py
# An ASGI checker as middleware: refuses a bad app in the words of the specification.
# Spec: ASGI www, "Response Start", "Response Body". After Ruby's rack-lint.
#
# Run:   python server.py checker:app
# Try:   curl localhost:8000/start/body  is right; the log says why these are not: /body
#        /start /start/start, /start/body with -d "{'headers': [(b'X-Upper', b'')]}"
# Look:  server.py, chapter 7, handle and send_body (they check again)

import ast

NEXT = {  # the type that has to come now, and the words for any other
    "http.response.start": "Response Start comes first, Response Body continues it",
    "http.response.body": "Response Start needs at least one Response Body to follow",
    None: "the response is complete: any further messages are ignored",
}
RULES = [  # a key, what its value has to be, the words
    ("status", lambda v: type(v) is int, "(int): HTTP status code"),
    ("headers", lambda v: all(type(n) is type(x) is bytes for n, x in v), "bytes only"),
    ("headers", lambda v: all(n == n.lower() for n, _ in v), "must be lowercased"),
    ("headers", lambda v: all(n[:1] != b":" for n, _ in v), "no pseudo headers"),
    ("body", lambda v: isinstance(v, bytes), "(byte string): HTTP body content"),
    ("more_body", lambda v: type(v) is bool, "(bool): is more content to come"),
]


def checked(app):
    async def around(scope, receive, send):
        if scope["type"] != "http":
            return await app(scope, receive, send)
        expected = "http.response.start"

        async def send_checked(message):
            nonlocal expected
            assert message["type"] == expected, NEXT[expected]
            for key, holds, words in RULES:
                assert key not in message or holds(message[key]), f"{key}: {words}"
            more = expected == "http.response.start" or message.get("more_body")
            expected = "http.response.body" if more else None
            await send(message)

        await app(scope, receive, send_checked)
        assert expected is None, NEXT[expected]

    return around


@checked
async def app(scope, receive, send):
    changes = ast.literal_eval((await receive())["body"].decode() or "{}")
    for name in scope["path"][1:].split("/"):
        await send({"type": f"http.response.{name}", "status": 200, **changes})
