"""Chapter 8: whole conversations over real sockets. Most of them are rows of two tables,
TALKS_BEFORE and TALKS, which tell step by step what the app and the client do. The
client speaks frames (frames.py); the app leaves everything to the test.
"""

import asyncio
import contextlib
import gc
import os
import random
import re
import signal
import threading

import pytest
from apps import START, echo as http_echo, errors, fields_of, narrow, narrow_listener
from apps import serve, turns, until
from conftest import GET, PATIENCE, Client, Process
from frames import BINARY, CLOSE, CONTINUATION, KEY, PING, PONG, TEXT
from frames import Speaker, frame, handshake, header, quick_frame

import server
from server import ClientDisconnected
from ws_echo import app as echo

CONNECT = {"type": "websocket.connect"}
ACCEPT = {"type": "websocket.accept"}
SEND = {"type": "websocket.send"}
SEND_X = {**SEND, "text": "x"}
SAY_CLOSE = {"type": "websocket.close"}
DENY = {"type": "websocket.http.response.start", "status": 401, "headers": []}
DENY_BODY = {"type": "websocket.http.response.body", "body": b"no"}
DENY_MORE = {**DENY_BODY, "more_body": True}
BYE, FAILED, RESTART = (code.to_bytes(2, "big") for code in (1000, 1011, 1012))
MIB = 2**20


def got(**content):
    return {"type": "websocket.receive", **content}


def gone(code, reason=""):
    return {"type": "websocket.disconnect", "code": code, "reason": reason}


class Puppet:
    """An app that leaves everything to the test."""

    def __init__(self):
        self.called = threading.Event()

    async def __call__(self, scope, receive, send):
        self.scope, self.receive, self.send = scope, receive, send
        self.ending = asyncio.get_running_loop().create_future()
        self.called.set()
        await self.ending


class Session:
    """Both ends of one WebSocket, in the hands of a test."""

    def __init__(self, app, running, client):
        self.app, self.running, self.client = app, running, client
        self.mistakes = 0  # how many errors the log shall have

    def play(self, *steps):
        for step in steps:
            step(self)

    def start(self, coroutine):
        """Begin something of the app's."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.running.server.loop)

    def receive(self) -> dict:
        """The app's next message. An empty reason may be left out."""
        message = self.start(self.app.receive()).result(PATIENCE)
        ended = message["type"] == "websocket.disconnect"
        return {"reason": "", **message} if ended else message

    def send(self, message) -> None:
        self.start(self.app.send(message)).result(PATIENCE)

    def end(self, exc: BaseException | None = None) -> None:
        """Let the app return, or raise."""

        def end():
            if not self.app.ending.done():
                self.app.ending.set_exception(exc) if exc else self.app.ending.set_result(0)

        self.running.server.loop.call_soon_threadsafe(end)

    def fill(self, data: bytes) -> int:
        """Send until the server takes no more; return how many bytes it took."""
        sock, sent, quiet = narrow(self.client.sock), 0, 0
        sock.setblocking(False)
        while sent < len(data) and quiet < 20:
            try:
                sent += sock.send(data[sent : sent + 2**16])
                quiet = 0
            except BlockingIOError:
                turns(self.running)
                quiet += 1
        sock.settimeout(PATIENCE)
        return sent


@contextlib.contextmanager
def connecting(data=None, **options):
    """A session whose app has just been called. A stop must not need its grace."""
    options = {"timeout_graceful_shutdown": 1000.0, **options}
    app = Puppet()
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
def opened(data=None, **options):
    """A session that is open on both sides."""
    with connecting(data, **options) as session:
        session.play(hears(CONNECT), sends(ACCEPT), switched())
        yield session


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Nothing ends by one of these deadlines, unless a test says so."""
    for name in ("CLOSE_TIMEOUT", "LINGER", "LINGER_TOTAL"):
        monkeypatch.setattr(server, name, 1000.0)


@pytest.fixture
def quick(monkeypatch):
    """The server looks at its deadlines fifty times a second."""
    monkeypatch.setattr(server, "TICK", 0.02)


def wait_for_ticks(running, count: int) -> None:
    """Until the server has looked at its deadlines so many times."""
    for _ in range(count):
        ticker = running.call(lambda: running.server.ticker)
        until(running, lambda before=ticker: running.server.ticker is not before)


# The steps of a conversation. First the client's.


def says(opcode, payload=b"", **options):
    return raw(frame(opcode, payload, **options))


def raw(data):
    return lambda session: session.client.send(data)


def reads(opcode, payload=b""):
    """It reads this frame next."""

    def step(session):
        assert session.client.frame() == (0x80 | opcode, payload)

    return step


def over(session):
    """It reads the end of the connection, and nothing before that."""
    assert session.client.read_all() == b""


def switched(*more, server=b"foal"):
    """It reads a 101, exactly as in RFC 6455 §1.3, with these fields besides."""
    expected = [b"upgrade: websocket", b"connection: Upgrade", b"server: " + server, *more]
    expected.append(b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")

    def step(session):
        head = session.client.read_until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert sorted(fields_of(head)) == sorted(expected)
        assert head.lower().count(b"\r\ndate: ") == 1

    return step


def answered(status, content=None, **fields):
    """It reads a response that denies the WebSocket."""

    def step(session):
        found = session.client.response()
        assert found[0] == status and content in (None, found[2])
        assert {name: found[1].get(name) for name in fields} == fields

    return step


def leaves(way):
    return lambda session: WAYS[way](session.client)


WAYS = {
    "close": lambda client: client.sock.close(),
    "half-close": lambda client: client.half_close(),
    "reset": Client.reset,
}


# Those of the app and the server.


def sends(message):
    return lambda session: session.send(message)


def fails(message, error=ClientDisconnected):
    def step(session):
        with pytest.raises(error):
            session.send(message)

    return step


def hears(message):
    def step(session):
        assert session.receive() == message

    return step


def ends(exc=None, mistakes=1):
    """The app raises, or returns. That is so many errors in the log."""

    def step(session):
        session.mistakes += mistakes
        session.end(exc)

    return step


def unseen(session):
    """The server has forgotten the connection."""
    until(session.running, lambda: not session.running.server.connections)


def stops(session):
    session.running.call(session.running.server.stop, "the test says so")


def stopped(session):
    session.running.thread.join(PATIENCE)
    assert not session.running.thread.is_alive() and not session.running.errors


GOOD = [
    *({}, {"Upgrade": "h2c,WebSocket"}, {"Upgrade": ["h2c", "websocket"]}),
    *({"Connection": ",UPGRADE,close-not,"}, {"Connection": ["keep-alive", "Upgrade"]}),
    *({"Expect": "100-continue"}, {"Content_Length": "0"}),
    {"Sec_WebSocket_Extensions": ["x-a; b=1", "permessage-deflate, x-c"]},
    {"Sec_WebSocket_Key": [KEY, ""]},  # an empty list element is none (RFC 9110 §5.6.1)
]
BAD_KEYS = [None, "", KEY[:-4], KEY[:-1] + "E=", KEY[:-2], "!" + KEY[1:], [KEY, KEY]]
BAD = [
    *({"Sec_WebSocket_Key": key} for key in BAD_KEYS),
    *({"line": f"{method} / HTTP/1.1"} for method in ("POST", "HEAD", "OPTIONS")),
    {"Content_Length": "5", "body": b"hello"},
    {"Transfer_Encoding": "chunked", "body": b"0\r\n\r\n"},
    {"Host": None},
]
VERSIONS = [None, "", "8", "14", "013", "13, 8", ["13", "13"]]
PLAIN = [
    *({"Upgrade": value} for value in (None, "h2c", "websocket2")),
    *({"Connection": value} for value in (None, "keep-alive", "x-upgrade")),
    {"line": "GET / HTTP/1.0"},
]


class TestOpeningHandshake:
    """RFC 6455 §4.2, "Server-Side Requirements"."""

    @pytest.mark.parametrize("changes", GOOD, ids=str)
    def test_a_good_one_is_answered_as_in_the_rfc(self, changes):
        """Whatever extension it offers, the answer names none."""
        with opened(handshake(**changes)) as session:
            session.play(says(TEXT, b"hello"), hears(got(text="hello")))

    @pytest.mark.parametrize("changes", BAD, ids=str)
    def test_a_bad_one_is_a_400_that_no_app_sees(self, changes):
        """§4.2.1: "the server MUST stop processing … and return … 400"."""
        app = Puppet()
        with serve(app) as running:
            data = running.talk(handshake(**changes) + GET)
        assert data.startswith(b"HTTP/1.1 400 ") and data.count(b"HTTP/1.1 ") == 1
        assert not app.called.is_set()

    @pytest.mark.parametrize("version", VERSIONS, ids=str)
    def test_another_version_is_told_which_one_we_speak(self, version):
        """§4.4, and RFC 9110 §7.8: "A sender of Upgrade MUST also send an "Upgrade"
        connection option"."""
        app = Puppet()
        with serve(app) as running:
            found = running.talk(handshake(Sec_WebSocket_Version=version))
        assert found.startswith(b"HTTP/1.1 426 ") and not app.called.is_set()
        expected = {b"sec-websocket-version: 13", b"upgrade: websocket"}
        assert expected | {b"connection: close, upgrade"} < set(fields_of(found))

    @pytest.mark.parametrize("changes", PLAIN, ids=str)
    def test_a_request_for_no_upgrade_that_we_know_is_plain_http(self, changes):
        """RFC 9110 §7.8: "A server MAY ignore a received Upgrade header field"."""
        with serve(http_echo) as running:
            assert running.talk(handshake(**changes)).startswith(b"HTTP/1.1 200 ")


SCOPE = {  # without what differs each time
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
        with connecting(handshake(X_Forwarded_Proto=proto), proxy_headers=True) as session:
            assert session.app.scope["scheme"] == "wss"


OFFER = handshake(Sec_WebSocket_Protocol="chat, superchat")
FRAMING = [b"Content-Length", b"Transfer-Encoding", b"Upgrade", b"Connection"]
HEADERS = [(b"Set-Cookie", b"a=1"), [b"set-cookie", b"b=2"], (b"Server", b"mine")]
HEADERS += [(b"Date", b"today"), *((name, b"0") for name in FRAMING)]
TALKS_BEFORE = {  # before the app accepts or denies; the client offers two subprotocols
    # ASGI www, "Accept - send event"; RFC 6455 §4.2.2
    "a subprotocol that was offered is answered": [
        sends({**ACCEPT, "subprotocol": "superchat"}),
        switched(b"sec-websocket-protocol: superchat"),
    ],
    "the app may choose only what was offered": [
        *(fails({**ACCEPT, "subprotocol": name}, ValueError) for name in ("Chat", "xmpp", "")),
        *(sends({**ACCEPT, "subprotocol": None}), switched()),
    ],
    "the app adds fields and replaces Server and Date, but not those about framing": [
        sends({**ACCEPT, "headers": HEADERS}),
        switched(b"set-cookie: a=1", b"set-cookie: b=2", server=b"mine"),
    ],
    # ASGI www, "Close - send event", and the extension "Websocket Denial Response"
    "close is a 403": [
        *(sends(SAY_CLOSE), answered(403, b"", upgrade=None)),
        *(hears(CONNECT), hears(gone(1006))),
    ],
    "a denial is the response that the app says": [
        *(sends({**DENY, "headers": [(b"x-why", b"late")]}), sends(DENY_BODY)),
        answered(401, b"no", **{"x-why": "late"}),
    ],
    **{
        f"an app that ends with {exc!r} after {len(before)} messages is a 500": [
            *(*map(sends, before), ends(exc), answered(500), over),
        ]
        for before in ([], [DENY])
        for exc in (None, ValueError("mine"), SystemExit(3))
    },
    "a denial that breaks off does not look complete": [
        *(sends(DENY), sends(DENY_MORE), ends(ValueError("mine"))),
        *(lambda s: s.client.read_until(b"\r\n\r\n2\r\nno\r\n"), over),
    ],
    # ASGI www, "Disconnected Client"; RFC 6455 §7.1.5
    **{
        f"a client that leaves by a {way} is noticed": [
            *(hears(CONNECT), leaves(way), hears(gone(1006))),
            ends(ValueError("no client is there"), mistakes=0),
        ]
        for way in WAYS
    },
    "to accept a client that has left raises": [
        *(leaves("reset"), unseen, fails(ACCEPT), hears(CONNECT), hears(gone(1006))),
    ],
    "a client that is accepted during a stop is told at once": [
        *(stops, lambda s: turns(s.running), sends(ACCEPT), switched()),
        *(reads(CLOSE, RESTART), says(CLOSE, RESTART)),
    ],
}


@pytest.mark.parametrize("name", TALKS_BEFORE)
def test_before_accept(name, log):
    with connecting(OFFER) as session:
        session.play(*TALKS_BEFORE[name])
    assert len(errors(log)) == session.mistakes


SENT = [  # the keys of websocket.send, and the frame
    *(({"text": "é", "bytes": None}, TEXT, b"\xc3\xa9"), ({"text": ""}, TEXT, b"")),
    *(({"bytes": b"\0\xff"}, BINARY, b"\0\xff"), ({"text": None, "bytes": b""}, BINARY, b"")),
]
RECEIVED = [  # frames, and the message
    (bytes.fromhex("818537fa213d7f9f4d5158"), got(text="Hello")),  # RFC 6455 §5.7
    (frame(TEXT), got(text="")),
    (frame(BINARY, fin=False) + frame(CONTINUATION, b"\0\xff"), got(bytes=b"\0\xff")),
    *((frame(BINARY, bytes(n)), got(bytes=bytes(n))) for n in (126, 65535, 65536)),
]
CLOSES = [  # the payload of a Close, and what the app hears
    *((b"", gone(1005)), (BYE, gone(1000)), (b"\x03\xe9going", gone(1001, "going"))),
    (b"\x0f\xa0" + "wörld".encode(), gone(4000, "wörld")),
]
OUR_CLOSES = [  # the keys of websocket.close, and the payload of our Close
    *(({}, BYE), ({"code": 1001, "reason": None}, b"\x03\xe9")),
    ({"reason": "x" * 123}, BYE + b"x" * 123),
    ({"code": 4999, "reason": "wörld"}, b"\x13\x87" + "wörld".encode()),
]
CONTROL = (CLOSE, PING, PONG)
OPCODES = (CONTINUATION, TEXT, BINARY, *CONTROL)
BAD_CLOSES = (0, 999, 1004, 1005, 1006, 1015, 1100, 2999, 5000, 65535)
TOO_LONG = frame(TEXT, b"x" * MIB, fin=False) + header(CONTINUATION, 2**24 - MIB + 1)
BROKEN = {  # what a client does wrong, up to the byte that shows it: the close code
    **{f"opcode {n}": (bytes([0x80 | n, 0x80]), 1002) for n in {*range(16)} - {*OPCODES}},
    **{f"reserved bits {n}": (bytes([0x82 | n << 4, 0x80]), 1002) for n in range(1, 8)},
    **{f"a reserved bit on {n}": (bytes([0xC0 | n, 0x80]), 1002) for n in CONTROL},
    **{f"{n} not masked": (bytes([0x80 | n, 5]), 1002) for n in OPCODES},
    **{f"a part of {n}": (bytes([n, 0x80]), 1002) for n in CONTROL},
    **{f"{n} of 126 bytes": (bytes([0x80 | n, 0xFE]), 1002) for n in CONTROL},
    "a continuation of nothing": (b"\x00\x80", 1002),
    "a message in a message": (frame(TEXT, b"x", fin=False) + b"\x81\x80", 1002),
    "a length of 125 in 2 bytes": (bytes.fromhex("82fe007d"), 1002),
    "a length of 65535 in 8 bytes": (bytes.fromhex("82ff000000000000ffff"), 1002),
    "a length of 64 bits": (bytes.fromhex("82ff8000000000000000"), 1002),
    "half a close code": (frame(CLOSE, b"\x03"), 1002),
    **{f"close code {n}": (frame(CLOSE, n.to_bytes(2, "big")), 1002) for n in BAD_CLOSES},
    "bad UTF-8": (frame(TEXT, b"\xff"), 1007),
    "bad UTF-8, more to come": (header(TEXT, 99) + bytes(4) + b"ok\xc3\x28", 1007),
    "half a character": (frame(TEXT, b"ok\xc3"), 1007),
    "bad UTF-8 as reason": (frame(CLOSE, BYE + b"\xff"), 1007),
    "one byte more than the limit": (header(BINARY, 2**24 + 1), 1009),
    "parts that are too long": (TOO_LONG, 1009),
}
AFTER = frame(TEXT, b"late") + frame(PING) + b"\xff\xff" + frame(CLOSE)
TALKS = {  # after it has accepted
    # RFC 6455 §5.6 and §6; ASGI www, "Receive - receive event", "Send - send event"
    **{
        f"the app sends {keys}": [sends({**SEND, **keys}), reads(opcode, payload)]
        for keys, opcode, payload in SENT
    },
    **{f"the app hears {str(m)[:60]}": [raw(data), hears(m)] for data, m in RECEIVED},
    # RFC 6455 §5.5.2 and §5.5.3
    "a ping is answered with its payload": [says(PING, b"x" * 125), reads(PONG, b"x" * 125)],
    "a ping within a message is answered at once": [
        *(says(TEXT, b"a", fin=False), says(PING, b"1"), reads(PONG, b"1")),
        *(says(CONTINUATION, b"b"), hears(got(text="ab"))),
    ],
    "a pong that answers nothing is ignored": [says(PONG), says(TEXT), hears(got(text=""))],
    # RFC 6455 §5.5.1: an endpoint "typically echos the status code it received"; §7.1.1:
    # the server ends the connection first
    **{
        f"the client closes and the app hears {heard}": [
            *(says(CLOSE, payload), reads(CLOSE, payload[:2]), over, hears(heard)),
        ]
        for payload, heard in CLOSES
    },
    **{
        f"the app closes with {keys}": [
            *(sends({**SAY_CLOSE, **keys}), reads(CLOSE, payload), says(CLOSE, payload[:2])),
            *(over, hears(gone(int.from_bytes(payload[:2], "big")))),
        ]
        for keys, payload in OUR_CLOSES
    },
    "frames after the client's Close are ignored": [
        *(raw(frame(CLOSE, BYE) + AFTER), reads(CLOSE, BYE), raw(AFTER), over),
        hears(gone(1000)),
    ],
    "messages on their way when the app closes are dropped": [
        *(sends(SAY_CLOSE), raw(frame(TEXT, b"crossing") + frame(CLOSE, BYE))),
        *(reads(CLOSE, BYE), over, hears(gone(1000))),
    ],
    # RFC 6455 §7.1.7, "Fail the WebSocket Connection"
    **{
        f"{what} is told {code}": [
            *(raw(frame(TEXT, b"good") + data), reads(CLOSE, code.to_bytes(2, "big")), over),
            *(hears(got(text="good")), hears(gone(code)), fails(SEND_X)),
            ends(ClientDisconnected("as send said"), mistakes=0),
        ]
        for what, (data, code) in BROKEN.items()
    },
    # RFC 6455 §7.4.1: 1011 says that the app failed, and nothing more
    "an app that returns has said 1000": [
        *(ends(mistakes=0), reads(CLOSE, BYE), says(CLOSE, BYE), over),
    ],
    **{
        f"an app that raises {exc!r} has said 1011": [
            *(ends(exc), reads(CLOSE, FAILED), says(CLOSE, FAILED), over),
        ]
        for exc in (ValueError("secret"), SystemExit("secret"), ExceptionGroup("", [OSError()]))
    },
    "an exception after the app's Close is logged": [
        *(sends(SAY_CLOSE), reads(CLOSE, BYE), ends(ValueError("mine"))),
        *(says(CLOSE, BYE), over),
    ],
    # RFC 6455 §7.1.5: no Close is 1006; ASGI www, "Disconnected Client"
    **{
        f"a client that leaves by a {way} after {data!r} is 1006": [
            *(raw(data), leaves(way), hears(gone(1006)), fails(SEND_X), hears(gone(1006))),
            *(fails(SEND_X), ends(ClientDisconnected("as send said"), mistakes=0)),
        ]
        for way in WAYS
        for data in (b"", frame(TEXT, b"cut")[:5], b"\x81")
    },
    "a client that leaves wakes a send that waits until it reads": [
        *(sends({**SEND, "bytes": bytes(16 * MIB)}), leaves("reset"), fails(SEND_X)),
    ],
    # a stop is 1012 (IANA: Service Restart)
    "a stop tells client and app, and lets the handshake finish": [
        *(stops, reads(CLOSE, RESTART), hears(gone(1012)), fails(SEND_X), fails(SAY_CLOSE)),
        *(raw(frame(TEXT, b"crossing") + frame(CLOSE, RESTART)), over),
        *(ends(ClientDisconnected("as send said"), mistakes=0), stopped),
    ],
    "a stop does not wait for a client that has said its Close and stays": [
        *(says(CLOSE, BYE), reads(CLOSE, BYE), ends(mistakes=0), stops, stopped),
    ],
}


@pytest.mark.parametrize("name", TALKS)
def test_after_accept(name, log):
    with opened() as session:
        session.play(*TALKS[name])
        ours = [r.getMessage() for r in log.records if "WebSocket failed" in r.getMessage()]
    assert len(errors(log)) == session.mistakes
    if " is told " in name:  # the log says who it was, and why
        assert re.search(rf"^127.0.0.1:\d+: .*{name[-4:]}: \w", ours[0])


# How a session gets into each state, and how it goes on there as if nothing were wrong.
OPENS, CLOSES_IT = (sends(ACCEPT), switched()), (sends(SAY_CLOSE), reads(CLOSE, BYE))
STATES = {
    "CONNECTING": ([], OPENS),
    "CONNECTING, denial begun": ([sends(DENY)], [sends(DENY_BODY), answered(401, b"no")]),
    "CONNECTING, denial streaming": (
        [sends(DENY), sends(DENY_MORE)],
        [sends(DENY_BODY), answered(401, b"nono")],
    ),
    "OPEN": (OPENS, [sends(SEND_X), reads(TEXT, b"x")]),
    "CLOSING": ([*OPENS, *CLOSES_IT], [says(CLOSE, BYE), over]),
    "CLOSED by the client": ([*OPENS, says(CLOSE, BYE), reads(CLOSE, BYE)], [over]),
    "CLOSED by a denial": ([sends(SAY_CLOSE)], [answered(403)]),
}
RIGHT = {("CONNECTING", name) for name in ("accept", "close", "denial")}
RIGHT |= {("OPEN", name) for name in ("text", "bytes", "close")}
RIGHT |= {(s, "denial body") for s in STATES if s.startswith("CONNECTING, ")}
BAD_HEADERS = [
    *(None, [(b"name",)], [("name", b"value")], [(b"name", b"value\r\nset-cookie: a=b")]),
    *([(b"sec-websocket-accept", b"x")], [(b"Sec-WebSocket-Protocol", b"chat")]),
]
BAD_SENDS = [
    *({}, {"text": "x", "bytes": b"x"}, {"text": None, "bytes": None}),
    *({"text": b"x"}, {"text": "\ud800"}, {"bytes": "x"}, {"bytes": 5}),
]
BAD_CODES = [999, 1005, 2999, 5000, -1, "1000", 1e3]
ODD_CLOSES = [{**SAY_CLOSE, "code": code} for code in BAD_CODES]
ODD_CLOSES += [{**SAY_CLOSE, "reason": r} for r in ("x" * 124, "é" * 62, 5)]
WRONG = [  # in every state
    *(None, {"text": "x"}, {"type": None}, {"type": b"websocket.send", "text": "x"}),
    *({"type": "websocket.ping"}, got(text="x"), START),
    *({**ACCEPT, "subprotocol": name} for name in (5, "chat")),
    *({**ACCEPT, "headers": headers} for headers in BAD_HEADERS),
    *({**SEND, **keys} for keys in BAD_SENDS),
    *ODD_CLOSES,
    *({"type": DENY["type"], "headers": []}, {**DENY, "status": 101}),
    *({**DENY, "headers": [(b"name", "value")]}, {**DENY_BODY, "body": "no"}),
]
MESSAGES = {"accept": ACCEPT, "text": SEND_X, "bytes": {**SEND, "bytes": b"x"}}
MESSAGES |= {"close": SAY_CLOSE, "denial": DENY, "denial body": DENY_BODY}
MESSAGES |= {str(message): message for message in WRONG}
# A code or reason has no meaning before accept: there it is the 403 of a plain close.
IGNORED = {("CONNECTING", str(message)) for message in ODD_CLOSES}
TABLE = [(s, m) for s in STATES for m in MESSAGES if (s, m) not in RIGHT | IGNORED]


class TestMisuse:
    """ASGI, "Error Handling": "raise an exception out of the send awaitable"."""

    @pytest.mark.parametrize("state, name", TABLE)
    def test_a_wrong_message_raises_and_the_right_one_still_works(self, state, name):
        before, after = STATES[state]
        with connecting() as session:
            session.play(*before)
            with pytest.raises(Exception) as raised:
                session.send(MESSAGES[name])
            if state != "CLOSED by the client":
                assert not isinstance(raised.value, (OSError, AssertionError))
            session.play(*after)

    @pytest.mark.parametrize("state, name", sorted(RIGHT))
    def test_additional_keys_are_ignored(self, state, name):
        """ASGI, "Error Handling": they "should not raise an exception"."""
        with connecting() as session:
            session.play(*STATES[state][0], sends({**MESSAGES[name], "x": 1, "y": None}))


class TestMessages:
    def test_one_of_16_mib_is_taken(self):
        data = bytes(range(256)) * 2**16
        with serve(echo) as running, Speaker(running.address[:2]) as client:
            client.upgrade()
            client.send(quick_frame(BINARY, data))
            assert client.frame() == (0x82, data)

    @pytest.mark.parametrize("end, code", [(frame(CLOSE, BYE), 1000), (b"", 1006)])
    def test_what_comes_with_the_handshake_is_kept_though_the_client_left(self, end, code):
        with connecting(handshake() + frame(TEXT, b"x") * 300 + end) as session:
            session.play(leaves("half-close"), lambda s: turns(s.running), sends(ACCEPT))
            session.play(hears(CONNECT), *[hears(got(text="x"))] * 300, hears(gone(code)))
            session.play(switched(), *[reads(CLOSE, BYE)] * bool(end), over)


class TestPing:
    """--ws-ping-interval, --ws-ping-timeout."""

    def test_any_byte_shows_that_the_client_lives(self, quick):
        """Here it is one byte of a Pong after each Ping."""
        with opened(ws_ping_interval=0.05, ws_ping_timeout=0.5) as session:
            for place in range(6):
                session.play(reads(PING), raw(frame(PONG)[place : place + 1]))
            session.send(SEND_X)
            assert session.client.answer() == (0x81, b"x")

    def test_a_dead_peer_is_dropped(self, quick, log):
        with opened(ws_ping_interval=0.05, ws_ping_timeout=0.1) as session:
            session.play(hears(gone(1006)), reads(PING), fails(SEND_X), unseen)
            assert session.client.end() == b""
        assert not errors(log)

    @pytest.mark.parametrize("interval, timeout, pings", [(0, 0.01, 0), (0.05, 0, 1)])
    def test_zero_switches_pings_or_their_deadline_off(self, quick, interval, timeout, pings):
        with opened(ws_ping_interval=interval, ws_ping_timeout=timeout) as session:
            session.play(*[reads(PING)] * pings, lambda s: wait_for_ticks(s.running, 10))
            session.play(sends(SEND_X), reads(TEXT, b"x"))

    @pytest.mark.skipif(os.name == "nt", reason="its loop shows no progress in a message")
    def test_a_slow_reader_is_not_a_dead_peer(self, quick, monkeypatch):
        """It cannot answer a Ping that stands behind megabytes which it has not yet read."""
        monkeypatch.setattr(server, "SEND_TIMEOUT", 0.5)
        with opened(ws_ping_interval=0.05, ws_ping_timeout=0.1) as session:
            session.play(sends({**SEND, "bytes": bytes(16 * MIB)}))
            data = b""
            for _ in range(30):  # 0.6 seconds, and always some progress
                data += session.client.sock.recv(2**18)
                wait_for_ticks(session.running, 1)
            session.client.unread = data + session.client.unread
            assert session.client.answer() == (0x82, bytes(16 * MIB))


class TestClosingHandshake:
    """RFC 6455 §7.1: its deadlines, and what stands in its way."""

    def test_a_client_that_answers_later_than_a_ping_is_not(self, quick):
        """The answer has a deadline of its own, longer than that of a Pong."""
        with opened(ws_ping_interval=0.5, ws_ping_timeout=0.01) as session:
            session.play(sends(SAY_CLOSE), reads(CLOSE, BYE))
            wait_for_ticks(session.running, 35)
            session.play(says(CLOSE, BYE), over, hears(gone(1000)))

    def test_a_ping_that_is_due_when_the_app_closes_does_not_end_it(self, monkeypatch):
        """What if the ticker looks in the very turn in which the app says Close?"""
        monkeypatch.setattr(server, "TICK", 3600)
        with opened(ws_ping_interval=0.01) as session:

            async def close():
                await asyncio.sleep(0.02)  # until a Ping is due
                await session.app.send(SAY_CLOSE)
                session.running.server.tick()

            session.start(close()).result(PATIENCE)
            session.play(reads(CLOSE, BYE), says(CLOSE, BYE), over)

    def test_a_client_that_never_answers_is_dropped_whatever_it_sends(self, quick, monkeypatch):
        monkeypatch.setattr(server, "CLOSE_TIMEOUT", 0.2)
        with opened() as session:
            session.play(sends(SAY_CLOSE), reads(CLOSE, BYE))
            for _ in range(500):  # ten seconds
                with contextlib.suppress(ConnectionError):
                    session.client.say(TEXT, b"drip")
                wait_for_ticks(session.running, 1)
                if not session.running.call(lambda: session.running.server.connections):
                    return session.play(hears(gone(1006)))
            raise AssertionError("it is still open")

    @pytest.mark.parametrize("how", [sends(SAY_CLOSE), ends(), stops])
    def test_messages_that_the_app_does_not_read_do_not_stop_a_close(self, how):
        """The client's Close waits behind them, where the server has stopped reading."""
        with opened(listener=narrow_listener()) as session:
            data = frame(BINARY, bytes(20_000)) * 5 + frame(CLOSE, BYE)
            assert session.fill(data) == len(data)
            session.play(how, reads(CLOSE, RESTART if how is stops else BYE), over)

    def test_a_client_that_does_not_answer_costs_a_stop_its_grace_and_no_more(self, log):
        """Then its app is cancelled as well."""
        with opened(timeout_graceful_shutdown=0.2) as session:
            session.play(stops, stopped, reads(CLOSE, RESTART))
        assert "cancelling" in log.text


class TestBackPressure:
    """The faster side waits for the slower one, both ways."""

    @pytest.mark.parametrize("accepted", [True, False])
    def test_an_app_that_reads_late_holds_the_client_up(self, accepted):
        """Also one that accepts late: how much it sends is not the client's choice."""
        parts = [random.Random(n).randbytes(2**16) for n in range(100)]
        data = b"".join(quick_frame(BINARY, part) for part in parts)
        with connecting(listener=narrow_listener()) as session:
            session.play(*[sends(ACCEPT)] * accepted)
            sent = session.fill(data)
            assert sent < 1_000_000
            session.play(*[sends(ACCEPT)] * (not accepted))
            writer = threading.Thread(target=session.client.send, args=(data[sent:],))
            writer.start()
            session.play(hears(CONNECT), *[hears(got(bytes=part)) for part in parts])
            writer.join(PATIENCE)

    def test_empty_messages_count_as_well(self):
        """What if a client sends a million messages of nothing?"""
        with opened(listener=narrow_listener()) as session:
            assert session.fill(frame(TEXT) * 500_000) < 300_000
            session.play(hears(got(text="")))

    def test_a_client_that_sends_pings_and_reads_nothing_is_held_up_too(self):
        """What if a client makes us keep an answer for each of its Pings?"""
        with opened(listener=narrow_listener()) as session:
            data = frame(PING, bytes(125)) * 20_000 + frame(TEXT, b"done")
            sent = session.fill(data)
            assert sent < 2_000_000
            writer = threading.Thread(target=session.client.send, args=(data[sent:],))
            writer.start()
            session.play(*[reads(PONG, bytes(125))] * 20_000, hears(got(text="done")))
            writer.join(PATIENCE)

    def test_a_client_that_reads_late_holds_the_app_up(self):
        with opened() as session:
            session.send({**SEND, "bytes": bytes(16 * MIB)})
            waiting = session.start(session.app.send(SEND_X))
            turns(session.running)
            assert not waiting.done()
            session.play(reads(BINARY, bytes(16 * MIB)), reads(TEXT, b"x"))
            waiting.result(PATIENCE)


class TestLog:
    def test_a_session_is_one_line(self, log):
        with opened(handshake("GET /chat?x=1 HTTP/1.1")) as session:
            peer = "%s:%d" % session.client.sock.getsockname()
            session.play(says(TEXT, b"x"), says(CLOSE, BYE), reads(CLOSE, BYE), over)
        line = rf'{peer} "GET /chat\?x=1 HTTP/1\.1" 101 \d+ B \d+\.\d ms'
        name = server.access_logger.name
        (found,) = [r.getMessage() for r in log.records if r.name == name]
        assert re.fullmatch(line, found)


class TestNoLeak:
    def test_100_sessions_leave_nothing(self):
        ways = [*WAYS.values(), lambda c: c.say(CLOSE), lambda c: c.send(b"\x81\xff")]

        def left():
            gc.collect()
            found = [o for o in gc.get_objects() if type(o) is server.WebSocket]
            return [one for one in found if one.server is running.server]

        with serve(echo) as running:
            for leave in ways * 20:
                with Speaker(running.address[:2]) as client:
                    client.upgrade()
                    leave(client)
            until(running, lambda: not running.server.connections | running.server.tasks)
            assert not running.call(left)


class TestProcess:
    """A server in a process of its own."""

    @pytest.fixture
    def process(self, request):
        arguments = ["--port", 0, "--workers", getattr(request, "param", 1)]
        with Process("ws_echo:app", *arguments, "--ws-max-size", 1000) as process:
            process.address = ("127.0.0.1", process.port())
            yield process

    @pytest.mark.parametrize("process", [1, 2], indirect=True)
    def test_it_echoes_and_says_1012_when_it_is_stopped(self, process):
        with Speaker(process.address) as one, Speaker(process.address) as two:
            for client in (one, two):
                client.upgrade()
                client.say(TEXT, b"hi")
                assert client.frame() == (0x81, b"hi")
            two.say(TEXT, bytes(1001))
            assert two.frame() == (0x88, b"\x03\xf1")
            stop = process.process.send_signal
            process.interrupt() if os.name == "nt" else stop(signal.SIGTERM)
            assert one.frame() == (0x88, RESTART)
            one.say(CLOSE, RESTART)
            assert one.read_all() == b""
        assert process.exit_code() == 0

    PARTS = frame(TEXT, fin=False) + frame(CONTINUATION, fin=False) * 15_000 + frame(CONTINUATION)
    FLOODS = {"messages": frame(TEXT) * 15_000, "pings": frame(PING) * 5000, "parts": PARTS}

    @pytest.mark.parametrize("kind", FLOODS)
    def test_beside_a_flood_of_tiny_frames_a_bystander_is_served(self, process, kind):
        """One connection does not starve the others. Without turns in `read`, a bystander of
        the parts would be answered once."""
        flood = self.FLOODS[kind] + frame(CLOSE, BYE)
        with Speaker(process.address) as rude, Client(process.address) as bystander:
            rude.upgrade()
            writer = threading.Thread(target=rude.send, args=(flood,))
            reader = threading.Thread(target=rude.end)
            writer.start(), reader.start()
            answered = 0
            while reader.is_alive():
                bystander.send(GET)
                assert bystander.response()[0] == 200
                answered += 1
            writer.join(PATIENCE)
        assert rude.unread.endswith(b"\x88\x02" + BYE) and answered >= 10
