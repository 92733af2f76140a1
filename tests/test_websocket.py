"""Chapter 7: whole conversations over real sockets. The app does what the test says, in
step with a client that speaks frames: literal ones, or those of test_frames.py."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import queue
import random
import re
import signal
import threading
import zlib

import pytest
from conftest import GET, PATIENCE, Client, Process
from test_cycle import END, START, fields_of, serve, until
from test_frames import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, frame, header
from test_misuse import broken_filter
from test_stopping import no_longer_accepts

import server

KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455 §1.3
FIELDS = {
    "Host": "x",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Version": "13",
}
SWITCHED = [
    b"upgrade: websocket",
    b"connection: Upgrade",
    b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
    b"server: foal",
]
DEFLATE = {"Sec_WebSocket_Extensions": "permessage-deflate"}

CONNECT = {"type": "websocket.connect"}
ACCEPT = {"type": "websocket.accept"}
SEND = {"type": "websocket.send"}
SAY_CLOSE = {"type": "websocket.close"}
DENY = {"type": "websocket.http.response.start", "status": 401, "headers": []}
DENY_BODY = {"type": "websocket.http.response.body", "body": b"no"}
DENY_MORE = {**DENY_BODY, "more_body": True}
BYE = b"\x03\xe8"  # 1000
LONG = {"timeout_graceful_shutdown": 1000.0}  # what ends, ends without it


def handshake(line="GET / HTTP/1.1", body=b"", **changes) -> bytes:
    """An opening handshake. In a name _ is -; None drops a field, a list repeats it."""
    fields = {**FIELDS, **{n.replace("_", "-"): v for n, v in changes.items()}}
    lines = [line]
    for name, values in fields.items():
        values = values if isinstance(values, list) else [values]
        lines += [f"{name}: {value}" for value in values if value is not None]
    return "\r\n".join([*lines, "", ""]).encode() + body


def text(words):
    return {"type": "websocket.receive", "text": words}


def gone(code, reason=""):
    """A websocket.disconnect, to compare with: an empty reason may be left out."""
    return {"type": "websocket.disconnect", "code": code, "reason": reason}


class Speaker(Client):
    """A client that speaks frames, and checks what every server has to do."""

    def take(self, size: int) -> bytes:
        parts, there = [self.unread], len(self.unread)
        while there < size:
            parts.append(self.sock.recv(2**18))
            assert parts[-1], f"closed after {b''.join(parts)[:99]!r}"
            there += len(parts[-1])
        data = b"".join(parts)
        self.unread = data[size:]
        return data[:size]

    def frame(self) -> tuple[int, bytes]:
        """The next frame: its first byte, and its payload."""
        first, size = self.take(2)
        assert size < 128, "a server must not mask (RFC 6455 §5.1)"
        if size > 125:
            size = int.from_bytes(self.take(2 if size == 126 else 8), "big")
        return first, self.take(size)

    def say(self, opcode: int, payload=b"", **options) -> None:
        self.send(frame(opcode, payload, **options))

    def closing(self) -> tuple[int, bytes]:
        """The code and reason of a Close frame, which has to come next."""
        first, payload = self.frame()
        assert first == 0x88, (first, payload)
        return int.from_bytes(payload[:2], "big"), payload[2:]

    def end(self) -> bytes:
        """What still comes until the connection ends, in whatever way."""
        with contextlib.suppress(ConnectionError):
            while data := self.sock.recv(2**18):
                self.unread += data
        return self.unread


class Puppet:
    """An app that leaves everything to the test."""

    def __init__(self):
        self.called = threading.Event()
        self.calls = 0

    async def __call__(self, scope, receive, send):
        self.calls += 1
        self.scope, self.receive, self.send = scope, receive, send
        self.ending = asyncio.get_running_loop().create_future()
        self.called.set()
        await self.ending


class Session:
    """Both ends of one WebSocket, in the hands of a test."""

    def __init__(self, app, running, client):
        self.app, self.running, self.client = app, running, client

    def start(self, coroutine):
        """Begin something of the app's; its result() has a deadline here."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.running.server.loop)
        return lambda: future.result(PATIENCE)

    def receive(self) -> dict:
        message = self.start(self.app.receive())()
        ended = message["type"] == "websocket.disconnect"
        return {"reason": "", **message} if ended else message

    def send(self, message) -> None:
        self.start(self.app.send(message))()

    def end(self, exc: BaseException | None = None) -> None:
        """Let the app return, or raise."""

        def end():
            if not self.app.ending.done() and exc is None:
                self.app.ending.set_result(None)
            elif not self.app.ending.done():
                self.app.ending.set_exception(exc)

        self.running.server.loop.call_soon_threadsafe(end)

    def peer(self) -> str:
        return "%s:%d" % self.client.sock.getsockname()

    def own(self) -> server.WebSocketSession:
        """What the server keeps for it."""
        return next(c.session for c in self.running.server.connections if c.session)


@contextlib.contextmanager
def connecting(data=None, *, app=None, **options):
    """A session whose app has just been called."""
    app = app or Puppet()
    with serve(app, **options) as running, Speaker(running.address[:2]) as client:
        client.send(data or handshake())
        assert app.called.wait(PATIENCE)
        session = Session(app, running, client)
        try:
            yield session
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                session.end()


@contextlib.contextmanager
def opened(data=None, *, accept=ACCEPT, **options):
    """A session that is open on both sides."""
    with connecting(data, **options) as session:
        assert session.receive() == CONNECT
        session.send(accept)
        session.head = session.client.read_until(b"\r\n\r\n")
        assert session.head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        yield session


async def echo(scope, receive, send):
    """The app that everybody writes first."""
    await receive()
    await send(ACCEPT)
    while (message := await receive())["type"] == "websocket.receive":
        await send({**message, "type": "websocket.send"})


@contextlib.contextmanager
def echoing(data=None, **options):
    """A client of that app."""
    with serve(echo, **options) as running, Speaker(running.address[:2]) as client:
        client.send(data or handshake())
        client.head = client.read_until(b"\r\n\r\n")
        yield client


def errors(log) -> list[str]:
    return [r.getMessage() for r in log.records if r.levelname in ("ERROR", "CRITICAL")]


GOOD = {
    "as in the RFC": {},
    "Upgrade in capitals": {"Upgrade": "WEBSOCKET"},
    "Upgrade in a list": {"Upgrade": "h2c,WebSocket"},
    "Upgrade in two fields": {"Upgrade": ["h2c", "websocket"]},
    "Connection in lower case": {"Connection": "upgrade"},
    "Connection in a list": {"Connection": "keep-alive, Upgrade"},
    "Connection in a list without spaces": {"Connection": ",UPGRADE,close-not,"},
    "Connection in two fields": {"Connection": ["keep-alive", "Upgrade"]},
    "a field of its own": {"Origin": "http://example.org"},
    "an expectation": {"Expect": "100-continue"},
}
BAD = {
    "no key": {"Sec_WebSocket_Key": None},
    "an empty key": {"Sec_WebSocket_Key": ""},
    "a short key": {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25j"},
    "a long key": {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZSE="},
    "a key without its end": {"Sec_WebSocket_Key": KEY[:-2]},
    "a key that is not base64": {"Sec_WebSocket_Key": "!" + KEY[1:]},
    "a key twice": {"Sec_WebSocket_Key": [KEY, KEY]},
    "POST": {"line": "POST / HTTP/1.1"},
    "HEAD": {"line": "HEAD / HTTP/1.1"},
    "OPTIONS": {"line": "OPTIONS / HTTP/1.1"},
    "a body": {"Content_Length": "5", "body": b"hello"},
    "a chunked body": {"Transfer_Encoding": "chunked", "body": b"0\r\n\r\n"},
    "no host": {"Host": None},
}
VERSIONS = [None, "", "0", "8", "12", "14", "013", "13.0", "x", "13, 8", ["13", "13"]]
PLAIN = {
    "no Upgrade": {"Upgrade": None},
    "another Upgrade": {"Upgrade": "h2c"},
    "almost the Upgrade": {"Upgrade": "websocket2"},
    "no Connection": {"Connection": None},
    "another Connection": {"Connection": "keep-alive"},
    "almost the Connection": {"Connection": "x-upgrade"},
    "HTTP/1.0": {"line": "GET / HTTP/1.0"},
}


class TestOpeningHandshake:
    """RFC 6455 §4.2, "Server-Side Requirements"."""

    @pytest.mark.parametrize("changes", GOOD.values(), ids=GOOD)
    def test_a_good_one_is_answered_as_in_the_rfc(self, changes):
        with opened(handshake(**changes)) as session:
            assert fields_of(session.head) == SWITCHED
            session.client.say(TEXT, b"hello")
            assert session.receive() == text("hello")

    @pytest.mark.parametrize("changes", BAD.values(), ids=BAD)
    def test_a_bad_one_is_a_400_that_no_app_sees(self, changes):
        """§4.2.1: "the server MUST stop processing … and return … 400"."""
        app = Puppet()
        with serve(app) as running:
            data = running.talk(handshake(**changes) + GET)
        assert data.startswith(b"HTTP/1.1 400 ") and data.count(b"HTTP/1.1 ") == 1
        assert not app.calls

    @pytest.mark.parametrize("version", VERSIONS, ids=str)
    def test_another_version_is_told_which_one_we_speak(self, version):
        """§4.4, and RFC 9110 §7.8: "A sender of Upgrade MUST also send an "Upgrade"
        connection option"."""
        app = Puppet()
        with serve(app) as running, running.connect() as client:
            client.send(handshake(Sec_WebSocket_Version=version))
            status, fields, _ = client.response()
            assert client.read_all() == b""
        assert (status, fields["sec-websocket-version"]) == (426, "13")
        assert fields["upgrade"] == "websocket"
        options = {option.strip() for option in fields["connection"].lower().split(",")}
        assert options == {"close", "upgrade"}
        assert not app.calls

    @pytest.mark.parametrize("changes", PLAIN.values(), ids=PLAIN)
    def test_what_asks_for_no_upgrade_to_us_is_plain_http(self, changes):
        """RFC 9110 §7.8: "A server MAY ignore a received Upgrade header field"."""
        seen = queue.Queue()

        async def app(scope, receive, send):
            seen.put((scope["type"], scope["method"]))
            await send(START)
            await send(END)

        with serve(app) as running:
            assert running.talk(handshake(**changes)).startswith(b"HTTP/1.1 200 ")
        assert list(seen.queue) == [("http", "GET")]

    def test_it_may_come_byte_by_byte(self):
        with serve(echo) as running, Speaker(running.address[:2]) as client:
            for byte in handshake() + frame(TEXT, b"hi"):
                client.send(bytes([byte]))
            client.read_until(b"\r\n\r\n")
            assert client.frame() == (0x81, b"hi")

    def test_it_may_follow_another_request_on_the_connection(self):
        async def app(scope, receive, send):
            if scope["type"] == "websocket":
                return await echo(scope, receive, send)
            await send(START)
            await send(END)

        with serve(app) as running, Speaker(running.address[:2]) as client:
            client.send(GET + handshake() + frame(TEXT, b"hi"))
            assert client.response()[0] == 200
            assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
            assert client.frame() == (0x81, b"hi")

    def test_over_the_limit_it_is_a_503_as_every_request(self):
        with opened(limit_concurrency=1) as session:
            data = session.running.talk(handshake())
        assert data.startswith(b"HTTP/1.1 503 ")


SCOPE = {  # but for what differs each time
    "type": "websocket",
    "asgi": {"version": "3.0", "spec_version": "2.5"},
    "http_version": "1.1",
    "scheme": "ws",
    "path": "/root/chät/a/b",
    "raw_path": b"/ch%C3%A4t/a%2Fb",
    "query_string": b"x=1&y=%20",
    "root_path": "/root",
    "subprotocols": ["chat", "superchat", "v2"],
    "state": {},
    "extensions": {"websocket.http.response": {}},
}


class TestScope:
    """ASGI www, "Websocket Connection Scope"."""

    def test_it_has_every_key_of_the_specification(self):
        data = handshake(
            "GET /ch%C3%A4t/a%2Fb?x=1&y=%20 HTTP/1.1",
            Sec_WebSocket_Protocol=["chat, superchat", "v2"],
            Cookie=["a=1", "b=2"],
        )
        with connecting(data, root_path="/root") as session:
            scope = dict(session.app.scope)
            assert scope.pop("client") == session.client.sock.getsockname()
            assert scope.pop("server") == session.running.address
        headers = scope.pop("headers")
        assert [v for n, v in headers if n == b"cookie"] == [b"a=1", b"b=2"]
        assert headers[:2] == [(b"host", b"x"), (b"upgrade", b"websocket")]
        assert scope == SCOPE

    @pytest.mark.parametrize("proto", ["https", "wss"])  # Traefik says the latter
    def test_behind_a_proxy_that_speaks_tls_the_scheme_is_wss(self, proto):
        data = handshake(X_Forwarded_For="192.0.2.7", X_Forwarded_Proto=proto)
        with connecting(data, proxy_headers=True) as session:
            assert session.app.scope["scheme"] == "wss"
            assert session.app.scope["client"] == ("192.0.2.7", 0)

    def test_state_is_a_copy(self):
        with connecting() as session:
            session.app.scope["state"]["mine"] = 1
            assert session.running.server.state == {}


class TestAccept:
    """ASGI www, "Accept - send event"; RFC 6455 §4.2.2."""

    OFFER = handshake(Sec_WebSocket_Protocol="chat, superchat")

    def test_a_subprotocol_that_was_offered_is_answered(self):
        accept = {**ACCEPT, "subprotocol": "superchat"}
        with opened(self.OFFER, accept=accept) as session:
            assert b"sec-websocket-protocol: superchat" in fields_of(session.head)

    def test_what_was_offered_is_what_the_client_said_and_not_the_scope(self):
        """A scope is the app's: a middleware may leave little of it."""
        with connecting(self.OFFER) as session:
            session.app.scope["headers"].clear()
            session.app.scope["subprotocols"].clear()
            session.send({**ACCEPT, "subprotocol": "chat"})
            head = session.client.read_until(b"\r\n\r\n")
            assert set(SWITCHED) < set(fields_of(head))

    @pytest.mark.parametrize("accept", [ACCEPT, {**ACCEPT, "subprotocol": None}])
    def test_none_need_be_chosen(self, accept):
        with opened(self.OFFER, accept=accept) as session:
            assert fields_of(session.head) == SWITCHED

    @pytest.mark.parametrize(
        "name", ["Chat", "chat, superchat", "", "xmpp", b"chat", 5]
    )
    def test_one_that_was_not_offered_is_refused(self, name):
        """ "it MUST NOT be sent": the client would have to fail (RFC 6455 §4.1)."""
        with connecting(self.OFFER) as session:
            with pytest.raises((ValueError, TypeError)):
                session.send({**ACCEPT, "subprotocol": name})
            session.send(ACCEPT)
            assert fields_of(session.client.read_until(b"\r\n\r\n")) == SWITCHED

    def test_headers_are_sent_in_order_with_duplicates(self):
        headers = [(b"Set-Cookie", b"a=1"), [b"set-cookie", b"b=2"], (b"X-Y", b"z")]
        with opened(accept={**ACCEPT, "headers": headers}) as session:
            found = fields_of(session.head)
        expected = [b"set-cookie: a=1", b"set-cookie: b=2", b"x-y: z"]
        assert [line for line in found if line not in SWITCHED] == expected
        assert set(SWITCHED) < set(found)

    def test_framing_fields_are_not_the_apps_to_say(self):
        """RFC 9110 §8.6 and RFC 9112 §6.1: neither "in any response with a status code
        of 1xx"; and a second Upgrade would contradict ours."""
        names = [b"Content-Length", b"Transfer-Encoding", b"Upgrade", b"Connection"]
        headers = [(n, b"0" if n == b"Content-Length" else b"chunked") for n in names]
        with connecting() as session:
            with contextlib.suppress(Exception):  # to raise is right, too
                session.send({**ACCEPT, "headers": headers})
            with contextlib.suppress(RuntimeError):
                session.send(ACCEPT)
            assert fields_of(session.client.read_until(b"\r\n\r\n")) == SWITCHED

    def test_the_apps_own_server_and_date_replace_ours(self):
        """As in any response (chapter 3, make_response)."""
        headers = [(b"Server", b"mine"), (b"Date", b"today")]
        with opened(accept={**ACCEPT, "headers": headers}) as session:
            assert session.head.lower().count(b"\r\nserver:") == 1
            assert session.head.lower().count(b"\r\ndate:") == 1
            assert b"server: mine" in fields_of(session.head)

    def test_options_for_every_response_count_for_this_one(self):
        with opened(server_header=False, header=["X-A: b"]) as session:
            assert fields_of(session.head) == [*SWITCHED[:-1], b"x-a: b"]


class TestDenial:
    """ASGI www, "Close - send event", and the extension "Websocket Denial Response"."""

    @pytest.mark.parametrize("extra", [{}, {"code": 4000, "reason": "no"}])
    def test_close_before_accept_is_a_403(self, extra):
        with connecting() as session:
            session.send({**SAY_CLOSE, **extra})
            status, fields, data = session.client.response()
            assert (status, data) == (403, b"")
            assert "upgrade" not in fields
            assert session.receive() == CONNECT
            assert session.receive()["type"] == "websocket.disconnect"

    def test_a_denial_is_the_response_that_the_app_says(self):
        headers = [(b"content-type", b"text/plain"), (b"x-why", b"late")]
        with connecting() as session:
            session.send({**DENY, "headers": headers})
            session.send(DENY_BODY)
            status, fields, data = session.client.response()
        assert (status, data, fields["x-why"]) == (401, b"no", "late")

    def test_a_denial_may_be_a_stream(self):
        with connecting() as session:
            session.send(DENY)
            for _ in range(3):
                session.send(DENY_MORE)
                session.client.read_until(b"no")
            session.send(DENY_BODY)
            assert session.client.read_until(b"0\r\n\r\n").endswith(b"no\r\n0\r\n\r\n")

    def test_after_it_the_connection_serves_the_next_request(self):
        with connecting() as session:
            session.send(DENY)
            session.send(DENY_BODY)
            assert session.client.response()[0] == 401
            session.end()
            session.app.called.clear()
            session.client.send(handshake())
            assert session.app.called.wait(PATIENCE)
            session.send(ACCEPT)
            assert session.client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")

    def test_an_error_after_it_is_logged_as_one(self, log):
        """The client has not left: this is a mistake, and nobody else would tell."""
        with connecting() as session:
            session.send(SAY_CLOSE)
            session.end(ValueError("mine"))
            until(session.running, lambda: not session.running.server.tasks)
        assert any("ValueError: mine" in line for line in errors(log))

    @pytest.mark.parametrize("before", [[], [DENY]])
    @pytest.mark.parametrize("exc", [None, ValueError("mine"), SystemExit(3)])
    def test_an_app_that_says_nothing_is_a_500(self, before, exc, log):
        with connecting() as session:
            for message in before:
                session.send(message)
            session.end(exc)
            assert session.client.response()[0] == 500
            assert session.client.read_all() == b""
        assert len(errors(log)) == 1

    def test_a_denial_that_breaks_off_does_not_look_complete(self, log):
        with connecting() as session:
            session.send(DENY)
            session.send(DENY_MORE)
            session.end(ValueError("mine"))
            assert session.client.read_all().endswith(b"\r\n\r\n2\r\nno\r\n")
        assert len(errors(log)) == 1


def field(*items):
    return {**ACCEPT, "headers": [items]}


# What brings a session into each state.
STATES = {
    "CONNECTING": [],
    "CONNECTING, denial begun": [DENY],
    "CONNECTING, denial streaming": [DENY, DENY_MORE],
    "OPEN": [ACCEPT],
    "CLOSING": [ACCEPT, SAY_CLOSE],
    "CLOSED by the client": [ACCEPT],
    "CLOSED by a denial": [SAY_CLOSE],
}

# The only messages of the table that are right somewhere.
RIGHT = {
    ("CONNECTING", "accept"),
    ("CONNECTING", "close"),
    ("CONNECTING", "denial"),
    ("CONNECTING, denial begun", "denial body"),
    ("CONNECTING, denial streaming", "denial body"),
    ("OPEN", "text"),
    ("OPEN", "bytes"),
    ("OPEN", "close"),
}
MESSAGES = {
    "accept": ACCEPT,
    "text": {**SEND, "text": "x"},
    "bytes": {**SEND, "bytes": b"x"},
    "close": SAY_CLOSE,
    "denial": DENY,
    "denial body": DENY_BODY,
    # wrong everywhere
    "None": None,
    "no type": {"text": "x"},
    "type None": {"type": None},
    "type bytes": {"type": b"websocket.send", "text": "x"},
    "unknown type": {"type": "websocket.ping"},
    "a type of receive": text("x"),
    "a type of HTTP": START,
    "accept, subprotocol int": {**ACCEPT, "subprotocol": 5},
    "accept, subprotocol not offered": {**ACCEPT, "subprotocol": "chat"},
    "accept, headers None": {**ACCEPT, "headers": None},
    "accept, headers str": {**ACCEPT, "headers": "ab"},
    "accept, header of one item": field(b"name"),
    "accept, header of three": field(b"name", b"value", b"more"),
    "accept, name str": field("name", b"value"),
    "accept, value str": field(b"name", "value"),
    "accept, value None": field(b"name", None),
    "accept, name empty": field(b"", b"value"),
    "accept, name with space": field(b"na me", b"value"),
    "accept, value with CRLF": field(b"name", b"value\r\nset-cookie: a=b"),
    "accept, value with NUL": field(b"name", b"val\0ue"),
    "accept, sec-websocket-accept": field(b"sec-websocket-accept", b"x"),
    "accept, sec-websocket-protocol": field(b"Sec-WebSocket-Protocol", b"chat"),
    "accept, sec-websocket-extensions": field(b"SEC-WEBSOCKET-EXTENSIONS", b"x"),
    "send, neither": SEND,
    "send, both": {**SEND, "text": "x", "bytes": b"x"},
    "send, both None": {**SEND, "text": None, "bytes": None},
    "send, text bytes": {**SEND, "text": b"x"},
    "send, text int": {**SEND, "text": 5},
    "send, text that is no UTF-8": {**SEND, "text": "\ud800"},
    "send, bytes str": {**SEND, "bytes": "x"},
    "send, bytes int": {**SEND, "bytes": 5},
    "send, bytes list": {**SEND, "bytes": [1]},
    **{
        f"close, code {code!r}": {**SAY_CLOSE, "code": code}
        for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 70000, -1, "1000", 1e3)
    },
    "close, reason too long": {**SAY_CLOSE, "reason": "x" * 124},
    "close, reason too long as UTF-8": {**SAY_CLOSE, "reason": "é" * 62},
    "close, reason bytes": {**SAY_CLOSE, "reason": b"x"},
    "close, reason int": {**SAY_CLOSE, "reason": 5},
    "denial, no status": {"type": DENY["type"], "headers": []},
    "denial, status 101": {**DENY, "status": 101},
    "denial, value str": {**DENY, "headers": [(b"name", "value")]},
    "denial body, str": {**DENY_BODY, "body": "no"},
}
# A code or reason has no meaning before accept: there it is the 403 of a plain close.
IGNORED = {("CONNECTING", name) for name in MESSAGES if name.startswith("close, ")}
TABLE = [(s, m) for s in STATES for m in MESSAGES if (s, m) not in RIGHT | IGNORED]


def reach(session, state: str) -> bytes:
    """Bring a session into a state; returns what the client has read of it."""
    for message in STATES[state]:
        session.send(message)
    seen = b""
    if ACCEPT in STATES[state]:
        seen = session.client.read_until(b"\r\n\r\n")
    if state == "CLOSING":
        assert session.client.closing() == (1000, b"")
    if state == "CLOSED by the client":
        session.client.say(CLOSE, BYE)
        assert session.client.closing() == (1000, b"")
    return seen


def goes_on(session, state: str) -> None:
    """Is all that a client sees now what it would have seen without the mistake?"""
    client = session.client
    if state == "CONNECTING":
        session.send(ACCEPT)
        assert fields_of(client.read_until(b"\r\n\r\n")) == SWITCHED
    elif state.startswith("CONNECTING, "):
        session.send(DENY_BODY)
        status, _, data = client.response()
        assert (status, data) == (401, b"nono" if "streaming" in state else b"no")
    elif state == "OPEN":
        session.send(MESSAGES["text"])
        assert client.frame() == (0x81, b"x")
    elif state == "CLOSED by a denial":
        assert client.response()[0] == 403
    else:
        client.say(CLOSE, BYE)
        assert client.read_all() == b""


class TestMisuse:
    """ASGI, "Error Handling": "raise an exception out of the send awaitable"."""

    @pytest.mark.parametrize("state, name", TABLE)
    def test_a_wrong_message_raises_and_the_right_one_still_works(self, state, name):
        with connecting() as session:
            reach(session, state)
            with pytest.raises(Exception) as raised:
                session.send(MESSAGES[name])
            if state != "CLOSED by the client":
                assert not isinstance(raised.value, (OSError, AssertionError))
            goes_on(session, state)

    @pytest.mark.parametrize("state, name", sorted(RIGHT))
    def test_additional_keys_are_ignored(self, state, name):
        """ASGI, "Error Handling": they "should not raise an exception"."""
        with connecting() as session:
            reach(session, state)
            session.send({**MESSAGES[name], "x": 1, "y": None})

    @pytest.mark.parametrize("state, name", sorted(IGNORED))
    def test_before_accept_a_code_has_no_meaning(self, state, name):
        """It is a 403 whatever it says, or an exception that leaves a choice."""
        with connecting() as session:
            try:
                session.send(MESSAGES[name])
            except Exception:
                session.send(SAY_CLOSE)
            assert session.client.response()[0] == 403

    @pytest.mark.parametrize("state", STATES)
    def test_receive_says_what_it_has_to_in_each_state(self, state):
        """ASGI www, "Connect", "Receive", "Disconnect - receive event"."""
        with connecting() as session:
            reach(session, state)
            assert session.receive() == CONNECT
            waiting = session.start(session.app.receive())
            if state == "OPEN":
                session.client.say(TEXT, b"x")
                assert waiting() == text("x")
                return
            if state == "CLOSING":
                session.client.say(TEXT, b"too late")
                session.client.say(CLOSE, BYE)
            elif state.startswith("CONNECTING"):
                session.client.reset()
            assert waiting()["type"] == "websocket.disconnect"
            for _ in range(3):
                assert session.receive()["type"] == "websocket.disconnect"


class TestMessages:
    """RFC 6455 §6; ASGI www, "Receive - receive event", "Send - send event"."""

    @pytest.mark.parametrize(
        "message, expected",
        [
            ({"text": "Hello"}, "810548656c6c6f"),
            ({"text": "Hello", "bytes": None}, "810548656c6c6f"),
            ({"text": ""}, "8100"),
            ({"text": "é"}, "8102c3a9"),
            ({"bytes": b"\x00\xff"}, "820200ff"),
            ({"text": None, "bytes": b""}, "8200"),
            ({"bytes": bytearray(b"ab")}, "82026162"),
            ({"bytes": memoryview(b"ab")}, "82026162"),
        ],
    )
    def test_what_is_sent(self, message, expected):
        with opened() as session:
            session.send({**SEND, **message})
            session.send(SAY_CLOSE)
            data = bytes.fromhex(expected + "880203e8")
            assert session.client.take(len(data)) == data

    @pytest.mark.parametrize(
        "data, expected",
        [
            (bytes.fromhex("818537fa213d7f9f4d5158"), {"text": "Hello"}),  # §5.7
            (frame(TEXT), {"text": ""}),
            (frame(TEXT, "é".encode()), {"text": "é"}),
            (frame(BINARY, b"\x00\xff"), {"bytes": b"\x00\xff"}),
            (frame(BINARY), {"bytes": b""}),
            (frame(TEXT, b"a", fin=False) + frame(CONTINUATION, b"b"), {"text": "ab"}),
        ],
    )
    def test_what_is_received(self, data, expected):
        with opened() as session:
            session.client.send(data)
            message = session.receive()
        message = {name: v for name, v in message.items() if v is not None}
        assert message == {"type": "websocket.receive", **expected}
        assert type(message.get("bytes", b"")) is bytes

    def test_messages_keep_their_order_in_both_directions(self):
        with echoing() as client:
            client.send(b"".join(frame(TEXT, b"%d" % n) for n in range(500)))
            assert [client.frame()[1] for _ in range(500)] == [
                b"%d" % n for n in range(500)
            ]

    def test_an_eager_client_may_send_frames_together_with_its_handshake(self):
        data = handshake() + frame(TEXT, b"one") + frame(BINARY, b"two")[:5]
        with connecting(data) as session:
            assert session.receive() == CONNECT
            session.send(ACCEPT)
            assert session.receive() == text("one")
            session.client.send(frame(BINARY, b"two")[5:])
            assert session.receive()["bytes"] == b"two"

    def test_an_eager_client_may_even_have_closed(self):
        data = handshake() + frame(TEXT, b"one") + frame(CLOSE, BYE + b"bye")
        with connecting(data) as session:
            session.client.half_close()
            session.send(ACCEPT)
            found = [session.receive() for _ in range(3)]
            assert found == [CONNECT, text("one"), gone(1000, "bye")]
            session.client.read_until(b"\r\n\r\n")
            assert session.client.read_all() == bytes.fromhex("880203e8")

    def test_an_eager_client_may_have_left_without_a_close(self):
        with connecting(handshake() + frame(TEXT, b"one")) as session:
            connection = next(iter(session.running.server.connections))
            session.client.half_close()
            until(session.running, lambda: connection.gate.eof)
            session.send(ACCEPT)
            found = [session.receive() for _ in range(3)]
            assert found == [CONNECT, text("one"), gone(1006)]

    def test_an_eager_client_may_have_left_behind_much(self):
        data = handshake() + frame(TEXT, b"one") * 300 + frame(CLOSE, BYE)
        with connecting(data) as session:
            connection = next(iter(session.running.server.connections))
            session.client.half_close()
            until(session.running, lambda: connection.gate.eof)
            session.send(ACCEPT)
            found = [session.receive() for _ in range(302)]
            assert found == [CONNECT, *[text("one")] * 300, gone(1000)]

    def test_an_eager_client_is_held_up_until_it_is_accepted(self):
        """Back-pressure: how much fits into memory is not its choice."""
        with connecting() as session:

            def read():
                return not connection.transport.is_reading()

            connection = next(iter(session.running.server.connections))
            flood = frame(BINARY, bytes(2**16)) * 160
            writer = threading.Thread(target=session.client.send, args=(flood,))
            writer.start()
            until(session.running, read)
            session.send(ACCEPT)
            assert session.receive() == CONNECT
            for _ in range(160):
                assert len(session.receive()["bytes"]) == 2**16
            writer.join(PATIENCE)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Where a handshake ends by this deadline, a test has to say so."""
    monkeypatch.setattr(server, "CLOSE_TIMEOUT", 1000.0)


@pytest.fixture
def quick(monkeypatch):
    """A ticker that looks at deadlines fifty times a second."""
    monkeypatch.setattr(server, "TICK", 0.02)


def wait_for_ticks(running, count: int) -> None:
    """Until the server has looked at its deadlines so many times."""
    for _ in range(count):
        ticker = running.call(lambda: running.server.ticker)
        until(running, lambda before=ticker: running.server.ticker is not before)


class TestPing:
    """RFC 6455 §5.5.2 and §5.5.3; --ws-ping-interval, --ws-ping-timeout."""

    @pytest.mark.parametrize("payload", [b"", b"Hello", bytes(range(125))])
    def test_a_ping_is_answered_with_its_payload(self, payload):
        with opened() as session:
            session.client.say(PING, payload)
            assert session.client.frame() == (0x8A, payload)

    def test_a_ping_within_a_message_is_answered_at_once(self):
        with opened() as session:
            session.client.say(TEXT, b"a", fin=False)
            session.client.say(PING, b"1")
            assert session.client.frame() == (0x8A, b"1")
            session.client.say(CONTINUATION, b"b")
            assert session.receive() == text("ab")

    def test_a_pong_that_nobody_asked_for_is_ignored(self):
        with opened() as session:
            session.client.say(PONG, b"news")
            session.client.say(TEXT, b"x")
            assert session.receive() == text("x")

    def test_a_client_that_answers_stays(self, quick):
        with opened(ws_ping_interval=0.05, ws_ping_timeout=0.5) as session:
            for _ in range(5):
                first, payload = session.client.frame()
                assert first == 0x89
                session.client.say(PONG, payload)
            session.send({**SEND, "text": "still here"})
            while (found := session.client.frame()) == (0x89, b""):
                pass
            assert found == (0x81, b"still here")

    def test_any_byte_counts_as_alive(self, quick):
        """Here those of one message, one for each ping; no pong at all."""
        with opened(ws_ping_interval=0.05, ws_ping_timeout=0.5) as session:
            for byte in frame(TEXT, b"x"):
                assert session.client.frame()[0] == 0x89
                session.client.send(bytes([byte]))
            assert session.receive() == text("x")

    def test_a_dead_peer_is_dropped(self, quick, log):
        with opened(ws_ping_interval=0.05, ws_ping_timeout=0.1) as session:
            assert session.receive() == gone(1006)
            assert session.client.end()[:2] == b"\x89\x00"
            with pytest.raises(server.ClientDisconnected):
                session.send({**SEND, "text": "x"})
        assert not errors(log)

    @pytest.mark.parametrize("interval, timeout, pings", [(0, 0.01, 0), (0.05, 0, 1)])
    def test_zero_means_no_ping_or_no_end(self, quick, interval, timeout, pings):
        options = {"ws_ping_interval": interval, "ws_ping_timeout": timeout}
        with opened(**options) as session:
            found = [session.client.frame() for _ in range(pings)]
            wait_for_ticks(session.running, 10)
            session.send({**SEND, "text": "x"})
            found.append(session.client.frame())
        assert found == [(0x89, b"")] * pings + [(0x81, b"x")]

    def test_there_is_none_while_reading_is_paused(self, quick):
        """What if the pong waits behind messages that the app does not take?"""
        with opened(ws_ping_interval=0.05, ws_ping_timeout=0.05) as session:
            for _ in range(2):
                session.client.say(BINARY, bytes(40_000))
            own = session.own()
            until(session.running, lambda: not own.transport.is_reading())
            wait_for_ticks(session.running, 10)
            session.send({**SEND, "text": "x"})
            assert session.client.frame() == (0x81, b"x")
            assert len(session.receive()["bytes"]) == 40_000
            assert session.client.end() == b"\x89\x00"  # now it is asked

    @pytest.mark.skipif(
        os.name == "nt", reason="its loop shows no progress in a message"
    )
    @pytest.mark.parametrize("closing", [False, True])
    def test_a_slow_reader_is_not_a_dead_peer(self, closing, quick, monkeypatch):
        """What if our ping, or Close, stands behind megabytes, taken slowly?"""
        monkeypatch.setattr(server, "CLOSE_TIMEOUT", 0.1)
        monkeypatch.setattr(server, "SEND_TIMEOUT", 0.2)
        options = {"ws_ping_interval": 0.05, "ws_ping_timeout": 0.1}
        with opened(**options) as session:
            session.send({**SEND, "bytes": bytes(2**24)})
            if closing:
                session.start(session.app.send(SAY_CLOSE))
            data = b""
            for _ in range(30):  # 0.6 seconds, and always some progress
                data += session.client.sock.recv(2**18)
                wait_for_ticks(session.running, 1)
            session.client.unread = data + session.client.unread
            assert session.client.frame() == (0x82, bytes(2**24))
            if closing:
                assert session.client.closing() == (1000, b"")

    def test_one_that_speaks_is_not_dead_however_much_is_unsent(self, quick):
        """What if there is more to read each time we look, and it sends us pongs?"""
        with opened(ws_ping_interval=0.05) as session:
            own = session.own()
            session.running.call(own.transport.set_write_buffer_limits, 2**26)
            for _ in range(3):
                session.send({**SEND, "bytes": bytes(2**23)})
                session.client.say(PONG)
                wait_for_ticks(session.running, 10)
            for _ in range(3):
                assert session.client.frame() == (0x82, bytes(2**23))

    def test_one_that_neither_reads_nor_is_read_is_dropped(self, quick, monkeypatch):
        """behaviour.md §3, "a client that never reads"; here it floods us, too."""
        monkeypatch.setattr(server, "SEND_TIMEOUT", 0.1)
        with opened(ws_ping_interval=0) as session:
            session.client.send(frame(BINARY, bytes(40_000)) * 2)
            own = session.own()
            until(session.running, lambda: not own.transport.is_reading())
            session.send({**SEND, "bytes": bytes(2**24)})
            with pytest.raises(server.ClientDisconnected):
                session.send({**SEND, "text": "x"})


CLOSES = [  # what the client says, what the app hears
    (b"", gone(1005)),
    (BYE, gone(1000)),
    (b"\x03\xe9going", gone(1001, "going")),
    (b"\x0f\xa0" + "wörld".encode(), gone(4000, "wörld")),
    (BYE + b"x" * 123, gone(1000, "x" * 123)),
]
BROKEN = {  # what a client does wrong: the code that it is told
    "a reserved opcode": (b"\x83\x80", 1002),
    "a reserved bit": (b"\xc1\x80", 1002),
    "not masked": (bytes.fromhex("810548656c6c6f"), 1002),
    "a continuation of nothing": (frame(CONTINUATION, b"x"), 1002),
    "a message in a message": (frame(TEXT, b"x", fin=False) + b"\x81\x80", 1002),
    "a fragmented ping": (frame(PING, fin=False), 1002),
    "a long ping": (b"\x89\xfe", 1002),
    "half a close code": (frame(CLOSE, b"\x03"), 1002),
    **{
        f"close code {n}": (frame(CLOSE, n.to_bytes(2, "big")), 1002)
        for n in (0, 999, 1004, 1005, 1006, 1015, 1100, 2999, 5000, 65535)
    },
    "bad UTF-8": (frame(TEXT, b"\xff"), 1007),
    "bad UTF-8, more to come": (header(TEXT, 99) + bytes(4) + b"ok\xc3\x28", 1007),
    "bad UTF-8 as reason": (frame(CLOSE, BYE + b"\xff"), 1007),
    "too long by one": (frame(BINARY, bytes(1001)), 1009),
    "far too long": (header(BINARY, 2**62) + bytes(4), 1009),
    "fragments too long": (
        frame(TEXT, b"x" * 600, fin=False) + frame(CONTINUATION, b"x" * 401),
        1009,
    ),
}


class TestClosingHandshake:
    """RFC 6455 §7.1."""

    @pytest.mark.parametrize("payload, expected", CLOSES)
    def test_the_client_closes_and_its_code_comes_back(self, payload, expected):
        """§5.5.1: it "typically echos the status code it received"."""
        with opened() as session:
            session.client.say(CLOSE, payload)
            assert session.client.frame() == (0x88, payload[:2])
            assert session.client.read_all() == b""  # §7.1.1: the server ends TCP first
            assert session.receive() == expected

    @pytest.mark.parametrize(
        "message, expected",
        [
            ({}, (1000, b"")),
            ({"code": 1001}, (1001, b"")),
            ({"code": 4999, "reason": "wörld"}, (4999, "wörld".encode())),
            ({"code": 1000, "reason": None}, (1000, b"")),
            ({"code": 3000, "reason": "x" * 123}, (3000, b"x" * 123)),
        ],
    )
    def test_the_app_closes_and_hears_the_answer(self, message, expected):
        with opened() as session:
            session.send({**SAY_CLOSE, **message})
            assert session.client.closing() == expected
            session.client.say(CLOSE, expected[0].to_bytes(2, "big"))
            assert session.client.read_all() == b""
            assert session.receive() == gone(expected[0])

    def test_what_was_said_before_it_arrives_before_it(self):
        with opened() as session:
            session.client.send(frame(TEXT, b"one") + frame(CLOSE, BYE))
            assert session.receive() == text("one")
            assert session.receive() == gone(1000)
        with opened() as session:
            session.send({**SEND, "bytes": bytes(2**20)})
            closing = threading.Thread(target=session.send, args=(SAY_CLOSE,))
            closing.start()  # it waits until the client reads
            assert session.client.frame() == (0x82, bytes(2**20))
            assert session.client.closing() == (1000, b"")
            closing.join(PATIENCE)

    def test_what_comes_after_it_is_ignored(self):
        """§5.5.1: after a Close "a client MUST NOT send any more data frames"."""
        with opened() as session:
            after = frame(TEXT, b"late") + frame(PING) + b"\xff\xff" + frame(CLOSE)
            session.client.send(frame(CLOSE, BYE) + after)
            assert session.client.closing() == (1000, b"")
            session.client.send(after)
            assert session.client.read_all() == b""
            assert session.receive() == gone(1000)

    def test_messages_on_their_way_when_the_app_closes_are_dropped(self):
        """A client may not have seen our Close yet; its pings are still answered."""
        with opened() as session:
            session.send(SAY_CLOSE)
            session.client.send(frame(TEXT, b"crossing") + frame(PING, b"p"))
            session.client.say(CLOSE, BYE)
            assert session.client.closing() == (1000, b"")
            assert session.client.read_all() in (b"", b"\x8a\x01p")
            assert session.receive() == gone(1000)

    def test_both_may_close_at_once(self):
        with opened() as session:
            session.client.say(CLOSE, b"\x0f\xa0")
            session.start(session.app.send(SAY_CLOSE))
            code, _ = session.client.closing()
            assert code in (1000, 4000)
            assert session.client.read_all() == b""

    def test_a_client_that_never_answers_is_dropped(self, quick, monkeypatch):
        monkeypatch.setattr(server, "CLOSE_TIMEOUT", 0.1)
        with opened() as session:
            session.send(SAY_CLOSE)
            assert session.client.end() == bytes.fromhex("880203e8")
            assert session.receive() == gone(1006)

    def test_a_drip_does_not_extend_the_deadline(self, quick, monkeypatch):
        monkeypatch.setattr(server, "CLOSE_TIMEOUT", 0.2)
        with opened(ws_ping_interval=0) as session:
            session.send(SAY_CLOSE)
            own = session.own()
            wait_for_ticks(session.running, 2)
            end = session.running.call(lambda: own.connection.end)
            session.client.say(TEXT, b"drip")
            session.client.say(PING)
            session.client.take(6)  # the Close, and a Pong: both have been read
            wait_for_ticks(session.running, 2)
            assert session.running.call(lambda: own.connection.end) == end
            assert session.client.end() == b""

    def test_a_client_that_answers_and_stays_is_dropped(self, quick, monkeypatch):
        """It has all it needs; but a reset must not overtake our last frame."""
        monkeypatch.setattr(server, "LINGER", 0.2)
        with opened() as session:
            session.client.say(CLOSE, BYE)
            assert session.client.read_all() == bytes.fromhex("880203e8")
            until(session.running, lambda: not session.running.server.connections)

    @pytest.mark.parametrize(
        "count, early", [(2, b""), (9, b""), (9, frame(CLOSE, BYE))]
    )
    def test_a_backlog_that_nobody_reads_does_not_stop_it(self, count, early):
        """What if the client's Close waits behind messages that paused the reading?"""
        with opened() as session:
            flood = frame(BINARY, bytes(20_000)) * 2 * count + early
            session.client.send(flood)
            own = session.own()
            until(session.running, lambda: not own.transport.is_reading())
            session.send(SAY_CLOSE)
            assert session.client.closing() == (1000, b"")
            if not early:
                session.client.say(CLOSE, BYE)
            assert session.client.read_all() == b""

    @pytest.mark.parametrize("ended", [False, True])
    def test_reading_a_backlog_does_not_change_the_deadline(self, ended, quick):
        """--ws-ping-interval 0 would make it infinite."""
        with opened(ws_ping_interval=0) as session:
            session.client.send(frame(BINARY, bytes(30_000)) * 3)
            own = session.own()
            until(session.running, lambda: len(own.messages) == 3)
            session.send(SAY_CLOSE)
            if ended:
                session.client.say(CLOSE, BYE)
                until(session.running, lambda: own.phase.name == "CLOSED")
            wait_for_ticks(session.running, 2)
            end = session.running.call(lambda: own.connection.end)
            while session.receive()["type"] != "websocket.disconnect":
                if not ended and not own.messages:
                    break
            wait_for_ticks(session.running, 2)
            assert session.running.call(lambda: own.connection.end) == end < 1e12

    @pytest.mark.parametrize("data, code", BROKEN.values(), ids=BROKEN)
    def test_who_breaks_the_protocol_is_told_the_code(self, data, code, log):
        """§7.1.7, "Fail the WebSocket Connection"; §7.4.1."""
        with opened(ws_max_size=1000) as session:
            peer = session.peer()
            session.client.send(frame(TEXT, b"good") + data)
            assert session.client.closing()[0] == code
            assert session.client.read_all() == b""
            assert session.receive() == text("good")
            assert session.receive()["type"] == "websocket.disconnect"
            with pytest.raises(server.ClientDisconnected) as raised:
                session.send({**SEND, "text": "x"})
            session.end(raised.value)
        assert not errors(log)
        assert re.search(rf"{peer}: .*\b{code}: \w", log.text)

    def test_who_breaks_it_after_our_close_is_not_told_twice(self):
        with opened() as session:
            session.send(SAY_CLOSE)
            session.client.send(b"\xff\xff")
            assert session.client.read_all() == bytes.fromhex("880203e8")

    def test_a_message_of_exactly_the_limit_is_taken(self):
        with opened(ws_max_size=1000) as session:
            session.client.say(BINARY, bytes(1000))
            assert len(session.receive()["bytes"]) == 1000

    def test_who_goes_on_sending_still_reads_the_code(self):
        """A reset would take the Close frame from the client's buffer."""
        with opened(ws_max_size=1000) as session:
            session.client.send(frame(BINARY, bytes(2**22)))
            assert session.client.closing()[0] == 1009
            assert session.client.read_all() == b""


class TestApp:
    """RFC 6455 §7.4.1 and IANA: what the app's end means to the client."""

    def test_one_that_returns_has_said_1000(self, log):
        with opened() as session:
            session.end()
            assert session.client.closing() == (1000, b"")
            session.client.say(CLOSE, BYE)
            assert session.client.read_all() == b""
        assert not errors(log)

    @pytest.mark.parametrize(
        "exc",
        [ValueError("secret"), SystemExit("secret"), ExceptionGroup("", [OSError()])],
    )
    def test_one_that_raises_has_said_1011_and_nothing_more(self, exc, log):
        with opened() as session:
            session.end(exc)
            assert session.client.closing() == (1011, b"")
            session.client.say(CLOSE, b"\x03\xf3")
            assert session.client.read_all() == b""
        assert len(errors(log)) == 1 and "GET /" in errors(log)[0]

    @pytest.mark.parametrize("answered", [False, True])
    def test_one_that_raises_after_its_close_is_logged(self, answered, log):
        """The client has not left it: this is a mistake of its own."""
        with opened() as session:
            session.send(SAY_CLOSE)
            assert session.client.closing() == (1000, b"")
            if answered:
                session.client.say(CLOSE, BYE)
                assert session.receive() == gone(1000)
            session.end(ValueError("mine"))
            until(session.running, lambda: not session.running.server.tasks)
            if not answered:
                session.client.say(CLOSE, BYE)
            assert session.client.read_all() == b""
        assert len(errors(log)) == 1

    def test_one_with_a_backlog_may_return(self):
        """What if the client's Close waits behind messages that nobody will take?"""
        with opened() as session:
            session.client.send(frame(BINARY, bytes(40_000)) * 2)
            own = session.own()
            until(session.running, lambda: not own.transport.is_reading())
            session.end()
            assert session.client.closing() == (1000, b"")
            session.client.say(CLOSE, BYE)
            assert session.client.read_all() == b""


WAYS = {
    "close": lambda client: client.sock.close(),
    "half-close": lambda client: client.half_close(),
    "reset": Client.reset,
}


class TestLeaving:
    """RFC 6455 §7.1.5: no Close is 1006; ASGI www, "Disconnected Client"."""

    @pytest.mark.parametrize("leave", WAYS.values(), ids=WAYS)
    @pytest.mark.parametrize("data", [b"", frame(TEXT, b"cut")[:5], b"\x81"])
    def test_a_client_that_vanishes_is_1006(self, leave, data, log):
        with opened() as session:
            session.client.send(data)
            waiting = session.start(session.app.receive())
            leave(session.client)
            assert {"reason": "", **waiting()} == gone(1006)
            for _ in range(2):
                with pytest.raises(server.ClientDisconnected) as raised:
                    session.send({**SEND, "text": "x"})
                assert session.receive() == gone(1006)
            session.end(raised.value)
            until(session.running, lambda: not session.running.server.tasks)
            until(session.running, lambda: not session.running.server.connections)
        assert not errors(log)

    @pytest.mark.parametrize("leave", WAYS.values(), ids=WAYS)
    def test_before_accept_it_is_noticed_as_well(self, leave, log):
        with connecting() as session:
            assert session.receive() == CONNECT
            waiting = session.start(session.app.receive())
            leave(session.client)
            assert {"reason": "", **waiting()} == gone(1006)
            session.end(ValueError("nobody is there"))
            until(session.running, lambda: not session.running.server.tasks)
        assert not errors(log)

    def test_to_accept_who_has_left_raises_or_tells_it_at_once(self):
        with connecting() as session:
            session.client.reset()
            until(session.running, lambda: not session.running.server.connections)
            with pytest.raises(server.ClientDisconnected):
                session.send(ACCEPT)
            assert session.receive() == CONNECT
            assert session.receive() == gone(1006)

    def test_a_half_close_ends_it_in_good_order(self):
        """RFC 6455 §7.1.4: "closed, but not cleanly"; what was sent still arrives."""
        with opened() as session:
            session.send({**SEND, "bytes": bytes(2**20)})
            session.client.half_close()
            assert session.client.frame() == (0x82, bytes(2**20))
            assert session.client.read_all() in (b"", bytes.fromhex("880203e8"))

    def test_one_that_left_while_the_loop_was_busy_is_noticed_by_send(self, log):
        """What if an app sends and sends, and the loop never gets a turn?"""
        left, outcome = threading.Event(), queue.Queue()

        async def app(scope, receive, send):
            await send(ACCEPT)
            left.wait(PATIENCE)  # on purpose, it blocks the loop
            try:
                for _ in range(1000):
                    await send({**SEND, "bytes": bytes(70_000)})
                outcome.put("never raised")
            except OSError as exc:
                outcome.put(type(exc))
                raise

        with serve(app) as running, running.connect() as client:
            client.send(handshake())
            client.read_until(b"\r\n\r\n")
            client.reset()
            left.set()
            assert outcome.get(timeout=PATIENCE) is server.ClientDisconnected
        assert not errors(log)

    def test_a_send_that_waits_for_a_reader_wakes_when_it_leaves(self, log):
        with opened() as session:
            session.send({**SEND, "bytes": bytes(2**24)})
            waiting = session.start(session.app.send({**SEND, "text": "x"}))
            session.client.reset()
            with pytest.raises(server.ClientDisconnected):
                waiting()
        assert not errors(log)


def ask_to_stop(running):
    running.server.loop.call_soon_threadsafe(running.server.stop, "the test says so")


class TestShutdown:
    """behaviour.md §5: "1012 on shutdown" (IANA: Service Restart)."""

    def test_the_client_is_told_and_may_finish_the_handshake(self, log):
        with opened(**LONG) as session:
            waiting = session.start(session.app.receive())
            ask_to_stop(session.running)
            assert session.client.closing() == (1012, b"")
            assert {"reason": "", **waiting()} == gone(1012)
            session.client.send(frame(TEXT, b"crossing") + frame(CLOSE, b"\x03\xf4"))
            assert session.client.read_all() == b""
            session.end()
            session.running.thread.join(PATIENCE)
            assert not session.running.thread.is_alive()
        assert not errors(log)

    def test_an_app_that_was_sending_finds_the_client_gone(self, log):
        """It did nothing wrong: no RuntimeError, and no error in the log."""
        with opened(**LONG) as session:
            ask_to_stop(session.running)
            assert session.client.closing() == (1012, b"")
            for message in ({**SEND, "text": "x"}, SAY_CLOSE):
                with pytest.raises(server.ClientDisconnected) as raised:
                    session.send(message)
            session.end(raised.value)
            session.client.say(CLOSE, b"\x03\xf4")
            assert session.client.read_all() == b""
        assert not errors(log)

    def test_many_sessions_are_all_told(self):
        with serve(echo, **LONG) as running, contextlib.ExitStack() as stack:
            address = running.address[:2]
            clients = [stack.enter_context(Speaker(address)) for _ in range(60)]
            for client in clients:
                client.send(handshake() + frame(TEXT, b"hi"))
            for client in clients:
                client.read_until(b"\r\n\r\n")
                assert client.frame() == (0x81, b"hi")
            ask_to_stop(running)
            for client in clients:
                assert client.closing() == (1012, b"")
                client.say(CLOSE, b"\x03\xf4")
            assert all(client.read_all() == b"" for client in clients)
            running.thread.join(PATIENCE)
            assert not running.thread.is_alive() and not running.errors

    def test_a_client_that_does_not_answer_costs_the_grace_and_no_more(self):
        with opened(timeout_graceful_shutdown=0.2) as session:
            ask_to_stop(session.running)
            session.running.thread.join(PATIENCE)
            assert session.client.end() == bytes.fromhex("880203f4")

    def test_a_client_that_has_said_its_close_and_stays_costs_nothing(
        self, monkeypatch
    ):
        monkeypatch.setattr(server, "LINGER", 1000.0)
        monkeypatch.setattr(server, "LINGER_TOTAL", 1000.0)
        with opened(**LONG) as session:
            session.client.say(CLOSE, BYE)
            assert session.client.closing() == (1000, b"")
            session.end()
            ask_to_stop(session.running)
            session.running.thread.join(PATIENCE)
            assert not session.running.thread.is_alive()

    def test_with_a_backlog_the_handshake_finishes_too(self):
        with opened(**LONG) as session:
            session.client.send(frame(BINARY, bytes(40_000)) * 2)
            own = session.own()
            until(session.running, lambda: not own.transport.is_reading())
            ask_to_stop(session.running)
            assert session.client.closing() == (1012, b"")
            session.client.say(CLOSE, b"\x03\xf4")
            assert session.client.read_all() == b""

    def test_one_that_is_accepted_late_is_told_at_once(self):
        with connecting(**LONG) as session:
            ask_to_stop(session.running)
            no_longer_accepts(session.running)
            with contextlib.suppress(server.ClientDisconnected):
                session.send(ACCEPT)
            session.client.read_until(b"\r\n\r\n")
            assert session.client.closing() == (1012, b"")

    def test_an_app_that_goes_on_is_cancelled_at_the_end_of_the_grace(self, log):
        with opened(timeout_graceful_shutdown=0.2) as session:
            ask_to_stop(session.running)
            session.running.thread.join(PATIENCE)
            assert not session.running.thread.is_alive()
        assert "cancelled" in log.text


class TestBackPressure:
    """issue 4: "back-pressure in both directions with bounded memory"."""

    @staticmethod
    def flood(session, data):
        """Send all that, in a thread; returns once the server has stopped to read."""
        writer = threading.Thread(target=session.client.send, args=(data,), daemon=True)
        writer.start()
        own = session.own()
        until(session.running, lambda: not own.transport.is_reading())
        return writer, own

    def test_an_app_that_reads_late_holds_the_client_up(self):
        with opened() as session:
            parts = [random.Random(n).randbytes(2**16) for n in range(160)]
            data = b"".join(header(BINARY, 2**16) + bytes(4) + part for part in parts)
            writer, own = self.flood(session, data)
            held = session.running.call(
                lambda: sum(len(m["bytes"]) for m in own.messages)
            )
            assert held < 1_000_000
            for part in parts:
                assert session.receive()["bytes"] == part
            writer.join(PATIENCE)

    @pytest.mark.parametrize("payload", [b"", b"x"])
    def test_tiny_messages_count_as_well(self, payload):
        """What if a client sends a million messages of nothing?"""
        with opened() as session:
            message = header(TEXT, len(payload)) + bytes(4) + payload
            writer, own = self.flood(session, message * (3_000_000 // len(message)))
            assert session.running.call(lambda: len(own.messages)) < 100_000
            assert session.receive() == text(payload.decode())

            def take_all():
                own.messages.clear()
                own.messages_size = 0
                own.transport.resume_reading()
                own.data_received(b"")

            while writer.is_alive():  # it may have written to the end already
                session.running.call(take_all)

    def test_small_frames_that_inflate_count_as_what_they_become(self):
        """What if 16 messages of 16 MiB stand in one read?"""
        bomb = zlib.compressobj(wbits=-15)
        data = bomb.compress(bytes(2**20)) + bomb.flush(zlib.Z_FULL_FLUSH)
        with opened(handshake(**DEFLATE)) as session:
            message = frame(BINARY, data[:-4], rsv=4)
            writer, own = self.flood(session, message * 100)
            held = session.running.call(
                lambda: sum(len(m["bytes"]) for m in own.messages)
            )
            assert held < 2**22
            for _ in range(100):
                assert len(session.receive()["bytes"]) == 2**20
            writer.join(PATIENCE)

    def test_a_client_that_reads_late_holds_the_app_up(self):
        sent = []

        async def app(scope, receive, send):
            await send(ACCEPT)
            for number in range(200):
                await send({**SEND, "bytes": bytes([number]) * 2**16})
                sent.append(number)

        with serve(app) as running, Speaker(running.address[:2]) as client:
            client.send(handshake())
            client.read_until(b"HTTP/1.1 101 ")

            def full():
                (connection,) = running.server.connections
                return not connection.writable.is_set()

            until(running, full)
            assert len(sent) < 200
            client.read_until(b"\r\n\r\n")
            for number in range(200):
                assert client.frame() == (0x82, bytes([number]) * 2**16)
            assert client.closing() == (1000, b"")

    def test_pings_of_a_client_that_does_not_read_are_not_hoarded(self):
        """What if it makes us keep an answer for each of a million pings?"""
        with opened() as session:
            flood = frame(PING, bytes(125)) * 100_000
            own = session.own()
            writer = threading.Thread(target=session.client.send, args=(flood,))
            writer.start()
            writer.join(PATIENCE)
            unsent = own.transport.get_write_buffer_size
            assert session.running.call(unsent) < 200_000
            session.client.say(TEXT, b"done")
            assert session.receive() == text("done")


class TestBig:
    """behaviour.md §5: "size limit 16 MiB → 1009"."""

    @pytest.mark.parametrize("changes", [{}, DEFLATE])
    def test_16_mib_go_both_ways(self, changes):
        data = bytes(range(256)) * 2**16
        with opened(handshake(**changes)) as session:
            masked = header(BINARY, 2**24) + bytes(4) + data
            writer = threading.Thread(target=session.client.send, args=(masked,))
            writer.start()
            message = session.receive()
            writer.join(PATIENCE)
            assert message["bytes"] == data
            session.send({**SEND, "bytes": message["bytes"]})
            first, payload = session.client.frame()
        if changes:
            assert len(payload) < len(data) / 50
            payload = zlib.decompressobj(-15).decompress(payload + b"\0\0\xff\xff")
        assert first == (0xC2 if changes else 0x82) and payload == data

    def test_one_byte_more_is_1009(self):
        with opened() as session:
            session.client.send(header(BINARY, 2**24 + 1) + bytes(4))
            assert session.client.closing()[0] == 1009


class TestDeflate:
    """RFC 7692, end to end; the parameters are for test_frames.py."""

    WORDS = b"the same words again, and again the same words, and so on and on; "

    def test_it_is_agreed_upon_and_used(self):
        client_side = zlib.compressobj(wbits=-15)
        inflater = zlib.decompressobj(wbits=-15)
        with echoing(handshake(**DEFLATE)) as client:
            fields = fields_of(client.head)
            assert b"sec-websocket-extensions: permessage-deflate" in fields
            sizes = []
            for _ in range(3):  # the contexts are taken over, both ways
                data = client_side.compress(self.WORDS)
                data += client_side.flush(zlib.Z_SYNC_FLUSH)
                client.say(TEXT, data[:-4], rsv=4)
                first, payload = client.frame()
                assert first == 0xC1
                assert inflater.decompress(payload + b"\0\0\xff\xff") == self.WORDS
                sizes.append(len(payload))
            assert sizes[0] < len(self.WORDS) and sizes[1] < sizes[0] / 3

    def test_the_client_may_leave_it_to_us(self):
        with echoing(handshake(**DEFLATE)) as client:
            client.say(TEXT, self.WORDS)
            first, payload = client.frame()
            assert first == 0xC1 and len(payload) < len(self.WORDS)

    @pytest.mark.parametrize(
        "changes, options",
        [
            ({}, {}),
            (DEFLATE, {"ws_deflate": False}),
            ({"Sec_WebSocket_Extensions": "x-unknown"}, {}),
            ({"Sec_WebSocket_Extensions": "permessage-deflate; x=1"}, {}),
        ],
    )
    def test_without_an_agreement_the_bit_is_refused(self, changes, options):
        with echoing(handshake(**changes), **options) as client:
            assert fields_of(client.head) == SWITCHED
            client.say(TEXT, self.WORDS * 9)
            assert client.frame() == (0x81, self.WORDS * 9)
            client.say(TEXT, b"x", rsv=4)
            assert client.closing()[0] == 1002

    def test_a_bomb_is_1009(self):
        bomb = zlib.compressobj(wbits=-15)
        data = bomb.compress(bytes(2**20)) + bomb.flush(zlib.Z_SYNC_FLUSH)
        with echoing(handshake(**DEFLATE), ws_max_size=2**16) as client:
            client.say(BINARY, data[:-4], rsv=4)
            assert client.closing()[0] == 1009

    def test_garbage_is_1007(self):
        with echoing(handshake(**DEFLATE)) as client:
            client.say(BINARY, b"\xff" * 20, rsv=4)
            assert client.closing()[0] == 1007


def access(log) -> list[str]:
    return [r.getMessage() for r in log.records if r.name == "server.access"]


class TestLog:
    """behaviour.md §3, "access log"."""

    def test_a_session_is_one_line(self, log):
        with opened(handshake("GET /chat?x=1 HTTP/1.1")) as session:
            peer = session.peer()
            session.client.say(TEXT, b"x")
            session.client.say(CLOSE, BYE)
            assert session.client.closing() == (1000, b"")
            session.end()
            session.client.read_all()
        line = rf'{peer} "GET /chat\?x=1 HTTP/1\.1" 101 \d+ B \d+\.\d ms'
        (found,) = access(log)
        assert re.fullmatch(line, found)

    @pytest.mark.parametrize(
        "messages, status", [([SAY_CLOSE], 403), ([DENY, DENY_BODY], 401), ([], 500)]
    )
    def test_a_denied_one_is_one_line_as_well(self, messages, status, log):
        with connecting() as session:
            for message in messages:
                session.send(message)
            session.end()
            assert session.client.response()[0] == status
        (found,) = access(log)
        assert f'"GET / HTTP/1.1" {status} ' in found

    def test_a_filter_that_raises_does_not_stop_it(self, log):
        """A Close came, and the 101 behind it; then nobody read any more."""
        with broken_filter(), echoing() as client:
            client.say(TEXT, b"x")
            assert client.frame() == (0x81, b"x")
        assert log.text.count("KeyError") == 1


class Ending:
    """An app, and a client, that end in the way that the path says."""

    async def app(self, scope, receive, send):
        way = scope["path"][1:]
        if way == "deny":
            return await send(SAY_CLOSE)
        if way == "fail early":
            raise ValueError
        await send(ACCEPT)
        if way == "app closes":
            await send(SAY_CLOSE)
        elif way == "app raises":
            raise ValueError
        while (
            way != "app returns" and (await receive())["type"] != "websocket.disconnect"
        ):
            pass

    CLIENT = {
        "client closes": lambda client: client.say(CLOSE, BYE),
        "client breaks it": lambda client: client.send(b"\xff\xff"),
        "client resets": Client.reset,
        "client half-closes": Client.half_close,
        "client vanishes in a frame": lambda client: client.send(b"\x81\xff"),
        "deny": lambda client: client.half_close(),
        "fail early": lambda client: None,
        "app closes": lambda client: client.say(CLOSE, BYE),
        "app raises": lambda client: client.say(CLOSE, BYE),
        "app returns": lambda client: client.say(CLOSE, BYE),
    }

    def play(self, running, way):
        path = way.replace(" ", "%20")
        with Speaker(running.address[:2]) as client:
            client.send(handshake(f"GET /{path} HTTP/1.1"))
            client.read_until(b"\r\n\r\n")
            self.CLIENT[way](client)
            if way not in ("client resets", "client vanishes in a frame"):
                client.end()


class TestNoLeak:
    """behaviour.md §7.6."""

    def test_100_sessions_closed_in_every_way_leave_nothing(self):
        ending, folder = Ending(), "/proc/self/fd"

        def left():
            sessions = [
                o for o in gc.get_objects() if type(o) is server.WebSocketSession
            ]
            sessions = [o for o in sessions if o.connection.server is running.server]
            files = len(os.listdir(folder)) if os.path.exists(folder) else 0
            return len(sessions), files, len(asyncio.all_tasks())

        with serve(ending.app) as running:
            for way in ending.CLIENT:
                ending.play(running, way)
            running.call(gc.collect)
            before = running.call(left)
            for _ in range(10):
                for way in ending.CLIENT:
                    ending.play(running, way)
            own = running.server
            until(running, lambda: not own.connections and not own.tasks)
            running.call(gc.collect)
            after = running.call(left)
        assert after[0] <= 1 and after[1:] <= before[1:]


APP = """
async def app(scope, receive, send):
    assert scope["type"] == "websocket"
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({**message, "type": "websocket.send"})
    print("disconnect", message["code"], flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ws")
    (folder / "echo.py").write_text(APP)
    return folder


@pytest.mark.parametrize("workers", [1, 2])
class TestProcess:
    """behaviour.md §6, with a WebSocket open."""

    def test_it_echoes_and_says_1012_when_it_is_stopped(self, folder, workers):
        options = ["--workers", workers, "--lifespan", "off", "--ws-max-size", 1000]
        with Process("echo:app", "--app-dir", folder, "--port", 0, *options) as process:
            address = ("127.0.0.1", process.port())
            if workers > 1:
                process.wait_for("ready")
            with Speaker(address) as one, Speaker(address) as two:
                for client in (one, two):
                    client.send(handshake(**DEFLATE) + frame(TEXT, b"hi"))
                    assert b"permessage-deflate" in client.read_until(b"\r\n\r\n")
                    assert client.frame() == (0x81, b"hi")
                two.say(TEXT, bytes(1001))
                assert two.closing()[0] == 1009
                stop = process.process.send_signal
                process.interrupt() if os.name == "nt" else stop(signal.SIGTERM)
                assert one.closing() == (1012, b"")
                one.say(CLOSE, b"\x03\xf4")
                assert one.read_all() == b""
            process.wait_for("disconnect 1012")
            assert process.exit_code() == 0
