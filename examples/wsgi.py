# examples/wsgi.py
# A bridge to WSGI: an app that may block gets a thread, and its writes wait for send.
# Spec: PEP 3333, "environ Variables"; ASGI www, "WSGI Compatibility".
# But:  the request body is read into memory before the app is called.
#
# Run:   python server.py wsgi:app
# Try:   curl -N localhost:8000/caf%C3%A9 -d hello   (for your own: app = bridge(yours))
# Look:  server.py, chapter 7, receive and send_body

import asyncio
import io
import sys
import time
from wsgiref.handlers import SimpleHandler  # for the rest of PEP 3333


def hello(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    yield environ["PATH_INFO"].encode("latin-1") + b" was sent "
    time.sleep(1)  # blocks only its own thread
    yield environ["wsgi.input"].read() + b"\n"


def bridge(wsgi_app):
    async def app(scope, receive, send):
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])
        loop, body, more_body = asyncio.get_running_loop(), bytearray(), True
        while more_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more_body = message.get("more_body", False)

        def send_and_wait(message):  # what `await send(message)` is in a thread
            asyncio.run_coroutine_threadsafe(send(message), loop).result()

        environ = {**environ_of(scope), "CONTENT_LENGTH": str(len(body))}
        handler = Handler(io.BytesIO(body), send_and_wait, sys.stderr, environ)
        await asyncio.to_thread(handler.run, wsgi_app)
        await send({"type": "http.response.body"})

    return app


def environ_of(scope):
    """The scope in WSGI's words: its text is bytes, decoded as latin-1."""
    path = scope["path"].removeprefix(scope["root_path"])
    environ = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": scope["root_path"].encode().decode("latin-1"),
        "PATH_INFO": path.encode().decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "SERVER_PROTOCOL": "HTTP/" + scope["http_version"],
        "SERVER_NAME": scope["server"][0],
        "SERVER_PORT": str(scope["server"][1] or ""),  # a Unix socket has none
        "REMOTE_ADDR": scope["client"][0] if scope["client"] else "",
        "HTTPS": "on" if scope["scheme"] == "https" else "off",
    }
    for name, value in scope["headers"]:
        if b"_" not in name:  # or X_Forwarded_For could pass for X-Forwarded-For
            key = "HTTP_" + name.decode().upper().replace("-", "_")
            key = key.replace("HTTP_CONTENT_TYPE", "CONTENT_TYPE")
            before = environ[key] + "," if key in environ else ""
            environ[key] = before + value.decode("latin-1")
    return environ


class Handler(SimpleHandler):
    """Says in ASGI's messages what it would write as text."""

    os_environ = {}  # the server's own environment is not for the app

    def send_headers(self):
        self.headers_sent = True
        fields = self.headers.items()
        fields = [(n.lower().encode(), v.encode("latin-1")) for n, v in fields]
        start = {"status": int(self.status[:3]), "headers": fields}
        self.stdout({"type": "http.response.start", **start})

    def _write(self, data):
        self.stdout({"type": "http.response.body", "body": data, "more_body": True})

    def _flush(self):
        pass  # send does

    def handle_error(self):
        raise  # to the server, which logs it


app = bridge(hello)
