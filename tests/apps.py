"""Small applications, requests and questions that several test files share.

Most tests need only an app that sends given messages (`saying`), one that answers with
its path (`echo`), or one that reads the body and answers with its size (`drain`).
"""

import contextlib
import functools
import gc
import logging
import os
import re
import socket
import time

from conftest import GET, PATIENCE, serving

serve = functools.partial(serving, lifespan="off")

START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body"}
GET_10 = b"GET / HTTP/1.0\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def start(*fields, status=200):
    return {"type": "http.response.start", "status": status, "headers": fields}


def body(data, more=False):
    return {"type": "http.response.body", "body": data, "more_body": more}


def length(size):
    return (b"Content-Length", b"%d" % size)


def request(line=b"GET / HTTP/1.1", *fields, host=b"Host: x"):
    return b"\r\n".join([line, host, *fields, b"", b""])


def get(target: bytes, *fields: bytes) -> bytes:
    return request(b"GET " + target + b" HTTP/1.1", *fields)


def post(data, *fields):
    return request(b"POST / HTTP/1.1", b"Content-Length: %d" % len(data), *fields) + data


EXPECT = post(b"hello", b"Expect: 100-continue").removesuffix(b"hello")


async def answer_with(send, data=b""):
    await send(start(length(len(data))))
    await send(body(data))


async def read_body(receive):
    """The whole request body, or what arrived of it before the client left."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def wait_for_disconnect(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


def saying(*messages):
    """An app that sends these messages."""

    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    return app


async def echo(scope, receive, send):
    """Answers with the path. It does not read the body."""
    await answer_with(send, scope["path"].encode())


async def drain(scope, receive, send):
    """Reads the body, and answers with its size."""
    await answer_with(send, b"%d" % len(await read_body(receive)))


async def nodelay(scope, receive, send):
    """Answers with TCP_NODELAY of its own connection, found among all sockets."""
    for sock in [s for s in gc.get_objects() if isinstance(s, socket.socket)]:
        with contextlib.suppress(OSError):  # it is closed, or a listener
            if sock.getpeername() == scope["client"]:
                found = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    await answer_with(send, b"%d" % bool(found))


class Recorder:
    """An app that keeps each scope, reads the body, and answers with what it saw."""

    def __init__(self):
        self.scopes = []

    async def __call__(self, scope, receive, send):
        self.scopes.append(scope)
        told = (scope["method"].encode(), scope["raw_path"], await read_body(receive))
        await answer_with(send, b"%s %s [%s]" % told)

    def paths(self):
        return [scope["path"] for scope in self.scopes]


def answer(messages, request=GET, **options) -> bytes:
    """All bytes that answer a request when the app sends these messages."""
    with serve(saying(*messages), **options) as running:
        return running.talk(request)


def statuses(answers):
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def fields_of(data: bytes) -> list[bytes]:
    """The field lines of a response, with lower-case names, and Date left out."""
    lines = data.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    pairs = [line.partition(b": ") for line in lines]
    return [n.lower() + b": " + v for n, _, v in pairs if n.lower() != b"date"]


def until(running, question):
    """Ask on the server's loop until the answer is yes, and return it."""
    deadline = time.monotonic() + PATIENCE
    while not (found := running.call(question)):
        assert time.monotonic() < deadline, "it never became so"
    return found


def has_ended(running):
    """The server has nothing to wait for any more."""
    running.thread.join(PATIENCE)
    assert not running.thread.is_alive() and not running.errors


def turns(running):
    """Let the loop have some turns, in which it does all that it can do now."""
    for _ in range(20):
        running.call(int)


def stalled(running, count):
    """Wait until a number that the app counts no longer grows, and return it."""
    last, same = 0, 0
    while not last or same < 50:
        found = running.call(count)
        last, same = found, same + 1 if found == last else 0
    return last


def narrow(sock):
    """Give a socket small buffers in the kernel, so that what the other side is slow to
    read waits in the program, where it can be observed."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 32 * 1024)
    return sock


def narrow_listener():
    return narrow(socket.create_server(("127.0.0.1", 0)))


@contextlib.contextmanager
def asking(app, data=b"", small_buffers=False, **options):
    """Serve an app to one client, which sends this."""
    if small_buffers:
        options["listener"] = narrow_listener()
    with serve(app, **options) as running, running.connect() as client:
        if small_buffers:
            narrow(client.sock)
        client.send(data)
        yield running, client


def errors(log) -> list[str]:
    """What was logged as an error. asyncio only warns of a write after the end."""
    levels = {"asyncio": logging.WARNING}
    found = [r for r in log.records if r.levelno >= levels.get(r.name, logging.ERROR)]
    messages = [record.getMessage() for record in found]
    # A proactor tells of each client that was reset before it was accepted.
    return [each for each in messages if os.name != "nt" or "accept_coro" not in each]
