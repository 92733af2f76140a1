"""Say hello in two messages.

Run:   python server.py start:app --app-dir examples/exercises/01_hello
Try:   curl -i localhost:8000

As it is, it takes every request and answers none: curl shows the server's own 500, and
the server's log says why.
"""


async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])  # "lifespan" too: the server goes on
    return
