"""TLS: the same server behind a handshake. The client is the ssl module's; it checks
the certificate, and tells an orderly end (close_notify) from one that just broke.

The certificates beside this file say how they were made; their key is public.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import logging
import os
import queue
import select
import socket
import ssl
import threading
import time
from pathlib import Path

import h11
import pytest
from conftest import GET, PATIENCE, Client, Process, serving
from test_cycle import END, EXPECT, START, body, get, length, post, saying, start, until
from test_frames import BINARY, CLOSE as CLOSING, PING, TEXT, frame
from test_websocket import handshake

import server
import sockets

CERTIFICATE = str(Path(__file__).with_name("certificate.pem"))
LOCKED = str(Path(__file__).with_name("certificate_locked.pem"))  # by the word "secret"
CLOSE = get(b"/", b"Connection: close")
SHORT = 0.2  # a deadline that shall pass
WEBSOCKET = get(  # RFC 6455 §1.3
    b"/",
    b"Upgrade: websocket",
    b"Connection: Upgrade",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)

plain = functools.partial(serving, lifespan="off")
serve = functools.partial(plain, ssl_certfile=CERTIFICATE)


@functools.lru_cache
def trusting() -> ssl.SSLContext:
    """A client's context that trusts our certificate, and nothing else."""
    return ssl.create_default_context(cafile=CERTIFICATE)


class TLSClient(Client):
    """A Client behind TLS; to it, an end without close_notify is an error."""

    def __init__(self, address, context=None):
        super().__init__(address[:2])
        self.sock = (context or trusting()).wrap_socket(
            self.sock, server_hostname="localhost", suppress_ragged_eofs=False
        )

    def leave(self, how: str) -> None:
        """Leave as asked: "close_notify", "FIN" or "reset"."""
        if how == "close_notify":
            self.sock.setblocking(False)
            with contextlib.suppress(OSError):  # we do not wait for the server's
                self.sock.unwrap()
        if how == "reset":
            self.reset()
        self.sock.close()


LEAVING = pytest.mark.parametrize("how", ["close_notify", "FIN", "reset"])


@pytest.fixture(autouse=True)
def ticking_fast(monkeypatch):
    monkeypatch.setattr(server, "TICK", 0.05)


@pytest.fixture(autouse=True)
def asyncio_is_silent(caplog):
    """No test here may end with a word of asyncio's, about eof_received or writes."""
    yield
    said = [r.getMessage() for r in caplog.get_records("call") if r.name == "asyncio"]
    assert said == []


def errors(log) -> list[str]:
    return [r.getMessage() for r in log.records if r.levelno >= logging.ERROR]


def secure(running, context=None) -> TLSClient:
    return TLSClient(running.address, context)


def ask(running, request=GET):
    """The answer to one request on a connection of its own."""
    with secure(running) as client:
        client.send(request)
        return client.response()


async def echo(scope, receive, send):
    """Answers with the body, which it reads whole."""
    data, more = [], True
    while more:
        message = await receive()
        data.append(message.get("body", b""))
        more = message.get("more_body", False)
    await send(START)
    await send(body(b"".join(data)))


def telling(seen: queue.Queue):
    """An app that tells its scope, and answers."""

    async def app(scope, receive, send):
        seen.put(scope)
        await send(START)
        await send(body(b"ok"))

    return app


def ended(client) -> bytes:
    """All that came until the connection ended, in whatever way."""
    found = bytearray()
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        while data := client.sock.recv(65536):
            found += data
    return bytes(found)


class TestRequests:
    """RFC 9110 §4.2.2, "https": HTTP as ever, inside TLS."""

    def test_an_ordinary_client_keeps_its_connection_for_several_requests(self):
        with serve(echo) as running:
            host, port = running.address
            conn = http.client.HTTPSConnection(host, port, context=trusting())
            for method, data in [("GET", b""), ("POST", b"hello"), ("PUT", b"x" * 99)]:
                conn.request(method, "/", data)
                sock = conn.sock
                response = conn.getresponse()
                assert (response.status, response.read()) == (200, data)
                assert conn.sock is sock and sock is not None
            conn.close()

    def test_pipelined_requests_are_answered_in_order(self):
        with serve(echo) as running, secure(running) as client:
            client.send(b"".join(post(b"%d" % n) for n in range(20)))
            assert [client.response()[2] for _ in range(20)] == [
                b"%d" % n for n in range(20)
            ]

    def test_one_byte_in_each_record_is_as_good(self):
        with serve(echo) as running, secure(running) as client:
            for byte in post(b"hello"):
                client.send(bytes([byte]))
            assert client.response()[2] == b"hello"

    def test_large_bodies_arrive_whole_in_both_directions(self):
        upload = b"".join(b"%07d\n" % number for number in range(500_000))
        with serve(echo) as running:
            host, port = running.address
            conn = http.client.HTTPSConnection(host, port, context=trusting())
            conn.request("POST", "/", iter([upload[:99], upload[99:]]))  # chunked
            assert conn.getresponse().read() == upload
            conn.request("POST", "/", upload)
            assert conn.getresponse().read() == upload
            conn.close()

    def test_a_stream_arrives_piece_by_piece(self):
        go = asyncio.Event()

        async def app(scope, receive, send):
            await send(START)
            await send(body(b"first", more=True))
            await go.wait()
            await send(body(b"last"))

        with serve(app) as running, secure(running) as client:
            client.send(GET)
            client.read_until(b"first\r\n")
            running.call(go.set)
            assert client.read_until(b"0\r\n\r\n") == b"4\r\nlast\r\n0\r\n\r\n"

    def test_continue_is_sent_when_the_app_reads(self):
        with serve(echo) as running, secure(running) as client:
            client.send(EXPECT)
            assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.send(b"hello")
            assert client.response()[2] == b"hello"

    def test_nagle_is_off(self):
        with serve(echo) as running, secure(running) as client:
            client.send(GET)
            assert client.response()[0] == 200
            (connection,) = running.server.connections
            sock = connection.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


CIPHERS = {  # RFC 8446 §B.4, RFC 5289 §3.2, RFC 7905 §3
    "TLS_AES_128_GCM_SHA256": 0x1301,
    "TLS_AES_256_GCM_SHA384": 0x1302,
    "TLS_CHACHA20_POLY1305_SHA256": 0x1303,
    "ECDHE-ECDSA-AES128-GCM-SHA256": 0xC02B,
    "ECDHE-ECDSA-AES256-GCM-SHA384": 0xC02C,
    "ECDHE-ECDSA-CHACHA20-POLY1305": 0xCCA9,
}


def of_version(name: str, ciphers: str | None = None) -> ssl.SSLContext:
    """A client's context for one version of TLS, and perhaps one cipher suite of it."""
    context = ssl.create_default_context(cafile=CERTIFICATE)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[name]
    if ciphers:
        context.set_ciphers(ciphers)
    return context


class TestScope:
    """ASGI TLS Extension 0.2, and www "HTTP Connection Scope"."""

    @pytest.mark.parametrize(
        "version, number, ciphers",
        [("TLSv1_3", 0x0304, None)]
        + [("TLSv1_2", 0x0303, name) for name in CIPHERS if name.startswith("ECDHE")],
    )
    def test_the_app_sees_what_the_client_negotiated(self, version, number, ciphers):
        seen = queue.Queue()
        context = of_version(version, ciphers)
        with serve(telling(seen)) as running, secure(running, context) as client:
            client.send(GET)
            assert client.response()[0] == 200
            tls = seen.get()["extensions"]["tls"]
            assert tls["tls_version"] == number
            assert tls["cipher_suite"] == CIPHERS[client.sock.cipher()[0]]

    def test_it_says_that_no_client_certificate_was_asked_for(self):
        seen = queue.Queue()
        with serve(telling(seen)) as running:
            ask(running)
        tls = seen.get()["extensions"]["tls"]
        assert list(tls["client_cert_chain"]) == []
        assert (tls["client_cert_name"], tls["client_cert_error"]) == (None, None)
        assert tls["server_cert"] is None or "BEGIN CERT" in tls["server_cert"]

    def test_the_scheme_is_https_in_every_request_of_a_connection(self):
        seen = queue.Queue()
        with serve(telling(seen)) as running, secure(running) as client:
            client.send(GET + GET)
            assert [client.response()[0] for _ in range(2)] == [200, 200]
            expected = client.sock.getsockname()
        for scope in (seen.get(), seen.get()):
            assert scope["scheme"] == "https" and "tls" in scope["extensions"]
            assert scope["client"] == expected and scope["server"] == running.address

    def test_without_tls_the_scheme_is_http_and_there_is_no_such_extension(self):
        """The extension: "must only be used for TLS connections"."""
        seen = queue.Queue()
        with plain(telling(seen)) as running:
            running.talk(GET)
        scope = seen.get()
        assert scope["scheme"] == "http" and "tls" not in scope["extensions"]

    @pytest.mark.parametrize(
        "offered, selected",
        [(["http/1.1"], "http/1.1"), (["h2", "http/1.1"], "http/1.1"), ([], None)],
    )
    def test_http_1_1_is_what_alpn_agrees_on(self, offered, selected):
        """RFC 7301 §3.2."""
        context = ssl.create_default_context(cafile=CERTIFICATE)
        context.set_alpn_protocols(offered) if offered else None
        with serve(echo) as running, secure(running, context) as client:
            assert client.sock.selected_alpn_protocol() == selected
            client.send(GET)
            assert client.response()[0] == 200


@pytest.fixture
def files(tmp_path):
    """A folder with the certificate and its keys in files apart, and with rubbish."""
    mark = "-----BEGIN CERTIFICATE"
    for name, path in [("key.pem", CERTIFICATE), ("locked.pem", LOCKED)]:
        key, _, certificate = Path(path).read_text().partition(mark)
        (tmp_path / name).write_text(key[key.index("-----BEGIN") :])
        (tmp_path / "cert.pem").write_text(mark + certificate)
    (tmp_path / "rubbish.pem").write_text("this is not a certificate\n")
    (tmp_path / "empty.pem").write_text("")
    return tmp_path


GOOD = {
    "in one file": (CERTIFICATE, None, None),
    "in two files": ("cert.pem", "key.pem", None),
    "locked, in one file": (LOCKED, None, "secret"),
    "locked, in two files": ("cert.pem", "locked.pem", "secret"),
    "a password for nothing": (CERTIFICATE, None, "secret"),
}
BAD = {
    "locked, no password": (LOCKED, None, None),
    "locked, wrong password": (LOCKED, None, "secrets"),
    "locked key, no password": ("cert.pem", "locked.pem", None),
    "no certificate": ("missing.pem", None, None),
    "no key": ("cert.pem", "missing.pem", None),
    "a certificate without its key": ("cert.pem", None, None),
    "a key without its certificate": ("key.pem", None, None),
    "not a certificate": ("rubbish.pem", None, None),
    "not a key": ("cert.pem", "rubbish.pem", None),
    "an empty file": ("empty.pem", None, None),
    "a folder": (".", None, None),
}


def tls_options(files, case):
    certfile, keyfile, password = case
    return {
        "ssl_certfile": str(files / certfile),  # an absolute path stays what it is
        "ssl_keyfile": keyfile and str(files / keyfile),
        "ssl_keyfile_password": password,
    }


class TestFiles:
    """behaviour.md §1: --ssl-certfile, --ssl-keyfile, --ssl-keyfile-password."""

    @pytest.mark.parametrize("case", GOOD.values(), ids=GOOD)
    def test_a_certificate_and_its_key_may_come(self, files, case):
        with plain(echo, **tls_options(files, case)) as running:
            assert ask(running, post(b"hello"))[2] == b"hello"

    @pytest.mark.parametrize("case", BAD.values(), ids=BAD)
    def test_what_cannot_be_used_is_one_line_that_names_it(self, files, case, log):
        options = tls_options(files, case)
        assert server.run(echo, port=0, **options) == 3
        (line,) = [r.getMessage() for r in log.records if r.levelno >= logging.WARNING]
        assert "\n" not in line and options["ssl_certfile"] in line
        assert (options["ssl_keyfile"] or "") in line
        assert "secrets" not in line  # a password is not for the log

    def test_a_missing_file_is_called_missing(self, files, log):
        server.run(echo, port=0, ssl_certfile=str(files / "missing.pem"))
        assert "No such file" in errors(log)[0]

    @pytest.mark.parametrize("password", [None, "wrong"])
    def test_a_locked_key_never_asks_on_the_terminal(self, password):
        """In a session of its own it has no terminal: OpenSSL would ask on stderr."""
        arguments = ["echo:app", "--port", 0, "--ssl-certfile", LOCKED]
        arguments += ["--ssl-keyfile-password", password] if password else []
        with Process(*arguments, start_new_session=os.name != "nt") as process:
            assert process.exit_code() == 3
        (line,) = process.lines
        assert "ERROR" in line and "phrase:" not in line

    def test_a_key_alone_is_not_served_in_the_clear(self, files, log):
        """What if the certificate was forgotten? uvicorn refuses to start, too."""
        key = str(files / "key.pem")
        with Process("echo:app", "--port", 0, "--ssl-keyfile", key) as process:
            process.wait_for(r"ssl-certfile|listening")
            assert "listening" not in process.output
            assert process.exit_code() in (2, 3)


def client_hello() -> bytes:
    """The first bytes that a TLS client sends."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


class TestHandshake:
    """RFC 8446 §4, and behaviour.md §3, "Deadlines: … TLS handshake"."""

    @pytest.mark.parametrize("size", [0, 1, 5, 100])
    def test_who_does_not_finish_it_is_dropped(self, size, log):
        with (
            serve(echo, timeout_request_head=SHORT) as running,
            running.connect() as client,
        ):
            client.send(client_hello()[:size])
            assert ended(client) == b""
        assert errors(log) == []

    def test_a_drip_does_not_extend_its_deadline(self):
        hello, before = client_hello(), time.monotonic()
        with (
            serve(echo, timeout_request_head=SHORT) as running,
            running.connect() as client,
            contextlib.suppress(OSError),
        ):
            for byte in hello[:-1]:
                if select.select([client.sock], [], [], 0.05)[0]:
                    break
                client.send(bytes([byte]))
            assert ended(client) == b""
        assert time.monotonic() - before < 0.05 * len(hello)

    def test_who_finishes_it_has_a_new_deadline_for_the_head(self):
        with serve(echo, timeout_request_head=SHORT) as running:
            with secure(running) as client:
                client.send(GET[:-2])
                assert client.response()[0] == 408
            with secure(running) as client:
                assert client.read_all() == b""

    def test_a_silent_client_does_not_hold_up_the_others(self):
        with serve(echo) as running, running.connect() as silent:
            silent.send(client_hello()[:50])
            assert ask(running)[0] == 200

    @pytest.mark.parametrize("data", [GET, post(b"hello"), b"GET / HTTP/1.0\r\n\r\n"])
    def test_plain_http_gets_a_line_in_the_log_that_says_so(self, data, log):
        with serve(echo) as running:
            with running.connect() as client:
                client.send(data)
                assert b"200" not in ended(client)
            assert ask(running)[0] == 200
        (line,) = [r.getMessage() for r in log.records if r.levelno == logging.WARNING]
        assert "plain HTTP" in line and "\n" not in line
        assert errors(log) == []

    def test_tls_to_a_plain_port_gets_a_line_in_the_log_that_says_so(self, log):
        with plain(echo) as running:
            with pytest.raises(ssl.SSLError):
                secure(running)
            assert running.talk(GET).startswith(b"HTTP/1.1 200")
        (line,) = [r.getMessage() for r in log.records if r.levelno == logging.WARNING]
        assert "this looks like TLS" in line and line.isprintable()

    @pytest.mark.parametrize(
        "data", [b"\0" * 99, b"\x16\x03\x01\x00\x05hello", b"\r\n"]
    )
    def test_rubbish_is_not_an_error_of_ours(self, data, log):
        with serve(echo, timeout_request_head=SHORT) as running:
            with running.connect() as client:
                client.send(data)
                assert b"HTTP" not in ended(client)
            assert ask(running)[0] == 200
        assert errors(log) == []
        assert not any(record.exc_info for record in log.records)

    @pytest.mark.parametrize("reset", [False, True])
    @pytest.mark.parametrize("size", [1, 50, None])
    def test_a_client_that_leaves_in_the_middle_is_no_error(self, size, reset, log):
        if os.name == "nt" and reset and size:
            pytest.skip("asyncio does not close what was reset before it was accepted")
        with serve(echo) as running:
            client = running.connect()
            client.send(client_hello()[:size])
            if size is None:
                client.sock.recv(1)  # the server's part of it
            client.reset() if reset else client.sock.close()
            assert ask(running)[0] == 200
        assert errors(log) == []
        assert not any(record.exc_info for record in log.records)

    def test_a_client_that_does_not_trust_us_is_no_error(self, log):
        with serve(echo) as running:
            with pytest.raises(ssl.SSLCertVerificationError):
                secure(running, ssl.create_default_context())
            assert ask(running)[0] == 200
        assert errors(log) == []
        assert not any(record.exc_info for record in log.records)


class TestEndings:
    """RFC 9112 §9.6 and §9.8: what was said arrives, then a close_notify."""

    @pytest.mark.parametrize("request_bytes", [CLOSE, b"GET / HTTP/1.0\r\n\r\n"])
    def test_a_last_answer_arrives_whole_and_in_good_order(self, request_bytes):
        data = bytes(4_000_000)
        with (
            serve(saying(start(length(len(data))), body(data))) as running,
            secure(running) as client,
        ):
            client.send(request_bytes)
            assert client.response()[2] == data
            assert client.read_all() == b""  # a truncated end would raise

    def test_an_old_client_knows_the_end_by_the_close_notify(self):
        """HTTP/1.0 without a length: only TLS tells the end from an attack."""
        with (
            serve(saying(START, body(b"all "), END)) as running,
            secure(running) as client,
        ):
            client.send(b"GET / HTTP/1.0\r\n\r\n")
            assert client.read_all().endswith(b"\r\n\r\nall ")

    @pytest.mark.parametrize(
        "request_bytes, status",
        [
            (b"GET / HTTP/1.1\r\n\r\n", 400),
            (b"rubbish\r\n\r\n", 400),
            (get(b"/" + b"x" * 9999), 414),
            (get(b"/", b"Expect: tea"), 417),
        ],
    )
    def test_a_refusal_arrives_whole(self, request_bytes, status):
        with serve(echo) as running, secure(running) as client:
            client.send(request_bytes + GET)
            data = client.read_all()
        assert data.startswith(b"HTTP/1.1 %d " % status) and data.count(b"HTTP/") == 1

    def test_a_refusal_reaches_a_client_that_is_still_sending(self):
        """RFC 9112 §9.6: a reset must not overtake the answer."""
        with serve(echo) as running, secure(running) as client:
            with contextlib.suppress(OSError):  # that sending fails is no surprise
                client.send(b"rubbish\r\n\r\n")
                for _ in range(64):
                    client.send(bytes(16 * 1024))
            assert client.sock.recv(65536).startswith(b"HTTP/1.1 400 ")

    def test_an_app_that_fails_before_its_answer_is_a_500(self):
        with serve(saying()) as running:
            assert ask(running)[0] == 500

    def test_an_app_that_fails_in_its_answer_does_not_look_complete(self):
        with (
            serve(saying(START, body(b"first", more=True))) as running,
            secure(running) as client,
        ):
            client.send(GET)
            with pytest.raises(h11.RemoteProtocolError):
                client.response()

    def test_nor_does_it_to_an_old_client(self):
        """RFC 9112 §9.8: without a close_notify, a client knows that more was due."""
        with (
            serve(saying(START, body(b"first", more=True))) as running,
            secure(running) as client,
        ):
            client.send(b"GET / HTTP/1.0\r\n\r\n")
            with pytest.raises((ssl.SSLError, ConnectionError)):
                client.read_all()

    def test_a_client_that_never_answers_the_close_notify_is_dropped(self, monkeypatch):
        """As one that lingers without TLS."""
        monkeypatch.setattr(server, "LINGER", SHORT)
        with serve(saying(START, body(b"ok"))) as running, secure(running) as client:
            client.send(CLOSE)
            client.read_until(b"ok")
            deadline = time.monotonic() + 10.0  # asyncio's own is 30
            while running.call(lambda: len(running.server.connections)):
                assert time.monotonic() < deadline

    @pytest.mark.skipif(os.name == "nt", reason="a proactor shows no progress in a write")
    @pytest.mark.parametrize("request_bytes", [GET, CLOSE])
    def test_a_slow_reader_gets_all_of_the_answer(self, monkeypatch, request_bytes):
        """What is encrypted waits where asyncio's TLS transport does not see it, and its
        shutdown timeout counts from close on, what is unsent included."""
        monkeypatch.setattr(server, "LINGER", 2 * SHORT)
        monkeypatch.setattr(server, "LINGER_TOTAL", 2 * SHORT)
        size = 800_000
        listener = sockets.bind_tcp("127.0.0.1", 0, 10)[0]
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)
        app = saying(START, body(bytes(size)))
        options = {"timeout_keep_alive": SHORT}
        with serve(app, listener, **options) as running, secure(running) as client:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
            client.send(request_bytes)
            client.read_until(b"\r\n\r\n")
            started, got = time.monotonic(), len(client.unread)
            while data := client.sock.recv(8_000):
                got += len(data)
                time.sleep(0.02)  # this is how slow it is
            assert got >= size and time.monotonic() - started > 5 * SHORT


class TestLeaving:
    """ASGI www, "Disconnect", "Disconnected Client": the client just goes."""

    @LEAVING
    @pytest.mark.parametrize("request_bytes", [GET, post(b"hello")[:-1]])
    def test_receive_says_disconnect(self, request_bytes, how, log):
        waiting, seen = threading.Event(), queue.Queue()

        async def app(scope, receive, send):
            waiting.set()
            while (message := await receive())["type"] != "http.disconnect":
                pass
            seen.put(message)

        with serve(app) as running:
            client = secure(running)
            client.send(request_bytes)
            assert waiting.wait(PATIENCE)
            client.leave(how)
            assert seen.get(timeout=PATIENCE) == {"type": "http.disconnect"}
        assert errors(log) == []

    def test_nothing_more_is_written_to_a_websocket_that_has_been_reset(self, caplog):
        """asyncio would log each write of an echo that does not have to wait."""

        async def app(scope, receive, send):
            await receive()
            await send({"type": "websocket.accept"})
            while (message := await receive())["type"] == "websocket.receive":
                await send({"type": "websocket.send", "text": message["text"]})

        with serve(app) as running:
            client = secure(running)
            client.send(handshake())
            client.read_until(b"\r\n\r\n")
            client.send((frame(PING, b"") + frame(TEXT, b"")) * 5_000)
            client.leave("reset")
        assert [r.message for r in caplog.records if r.name == "asyncio"] == []

    @LEAVING
    def test_send_raises(self, how, log):
        seen = queue.Queue()

        async def app(scope, receive, send):
            try:
                await send(START)
                while True:
                    await send(body(b"x" * 999, more=True))
                    await asyncio.sleep(0)
            except OSError as exc:
                seen.put(exc)
                raise

        with serve(app) as running:
            client = secure(running)
            client.send(GET)
            client.read_until(b"xxx")
            client.leave(how)
            assert type(seen.get(timeout=PATIENCE)) is server.ClientDisconnected
        assert errors(log) == []

    @LEAVING
    @pytest.mark.parametrize(
        "request_bytes, first, again",
        [
            (post(bytes(200_000))[:-1], START, body(b"x", more=True)),
            (
                WEBSOCKET + frame(BINARY, bytes(70_000)) * 2,
                {"type": "websocket.accept"},
                {"type": "websocket.send", "text": "x"},
            ),
        ],
        ids=["HTTP", "WebSocket"],
    )
    def test_send_raises_though_nobody_reads(self, request_bytes, first, again, how, log):
        """asyncio drops what is written after the client's end, and tells nobody of that
        end while its TLS is paused."""
        seen, left = queue.Queue(), threading.Event()

        async def app(scope, receive, send):
            await send(first)
            await asyncio.to_thread(left.wait, PATIENCE)
            try:
                for _ in range(1000):
                    await send(again)
                    await asyncio.sleep(0.001)
            except OSError as exc:
                seen.put(exc)
                raise
            seen.put("never told")

        def paused():
            ours = [connection.transport for connection in running.server.connections]
            below = [transport._ssl_protocol._transport for transport in ours]
            return not all(transport.is_reading() for transport in ours + below)

        with serve(app) as running:
            client = secure(running)
            client.send(request_bytes)
            until(running, paused)
            client.leave(how)
            left.set()
            assert type(seen.get(timeout=PATIENCE)) is server.ClientDisconnected
        assert errors(log) == []

    @LEAVING
    def test_between_two_requests_nothing_is_left(self, how, log):
        with serve(echo) as running:
            client = secure(running)
            client.send(GET)
            assert client.response()[0] == 200
            client.leave(how)
            until(running, lambda: not running.server.connections)
        assert [r for r in log.records if r.levelno >= logging.WARNING] == []


class TestDeadlines:
    """behaviour.md §3, "Deadlines"."""

    def test_an_idle_connection_is_closed_in_good_order(self):
        with (
            serve(echo, timeout_keep_alive=SHORT) as running,
            secure(running) as client,
        ):
            client.send(GET)
            assert client.response()[0] == 200
            assert client.read_all() == b""

    def test_an_answer_reaches_a_client_that_pauses_before_it_reads_the_end(self):
        """What if the keep-alive time is over before asyncio has passed on the rest?"""
        size = 4 * 1024 * 1024

        async def app(scope, receive, send):
            await send(START)
            await send(body(bytes(size)))

        with serve(app, timeout_keep_alive=SHORT) as running, secure(running) as client:
            client.send(GET)
            client.read_until(b"\r\n\r\n")
            threading.Event().wait(1.0)  # the pause
            assert client.read_all().count(b"\0") == size

    def test_half_a_body_is_408(self):
        with serve(echo, timeout_request_body=SHORT) as running:
            assert ask(running, post(b"hello")[:-1])[0] == 408

    def test_a_client_that_never_reads_is_dropped(self, monkeypatch):
        monkeypatch.setattr(server, "SEND_TIMEOUT", SHORT)
        seen = queue.Queue()

        async def app(scope, receive, send):
            with pytest.raises(OSError) as caught:
                await send(START)
                while True:
                    await send(body(bytes(100_000), more=True))
            seen.put(caught.type)

        with serve(app) as running, secure(running) as client:
            client.send(GET)
            assert seen.get(timeout=PATIENCE) is server.ClientDisconnected


class TestStopping:
    """behaviour.md §6: a graceful stop."""

    def test_an_idle_client_is_told_and_does_not_hold_it_up(self, log):
        with serve(echo) as running, secure(running) as client:
            client.send(GET)
            assert client.response()[0] == 200
            running.stop()  # the client does not read, and so cannot answer
            assert client.read_all() == b""
        assert not any("still running" in record.getMessage() for record in log.records)

    def test_a_request_in_flight_is_finished(self, log):
        go, waiting = asyncio.Event(), threading.Event()

        async def app(scope, receive, send):
            waiting.set()
            await go.wait()
            await send(START)
            await send(body(b"done"))

        with (
            serve(app, timeout_graceful_shutdown=PATIENCE) as running,
            secure(running) as client,
        ):
            client.send(GET)
            assert waiting.wait(PATIENCE)
            running.call(running.server.stop, "test")
            running.call(go.set)
            status, fields, data = client.response()
            assert (status, fields["connection"], data) == (200, "close", b"done")
            assert client.read_all() == b""
        assert errors(log) == []

    def test_who_has_had_its_last_answer_does_not_hold_it_up(self, log):
        """It was told once that this is the end, and has not answered."""
        with serve(saying(START, body(b"ok"))) as running, secure(running) as client:
            client.send(CLOSE)
            client.read_until(b"ok")
            until(running, lambda: all(c.lingering for c in running.server.connections))
            running.stop()
        assert errors(log) == []
        assert not any("still running" in record.getMessage() for record in log.records)

    def test_nor_does_who_gets_it_meanwhile(self, log):
        """A pool keeps a connection, and looks at it when it next needs one."""
        go, started = asyncio.Event(), threading.Event()

        async def app(scope, receive, send):
            await send(START)
            await send(body(b"a", more=True))
            started.set()
            await go.wait()
            await send(END)

        with serve(app) as running, secure(running) as client:
            client.send(GET)
            assert started.wait(PATIENCE)
            running.call(running.server.stop, "test")
            running.call(go.set)
            running.thread.join(PATIENCE)
            assert client.response()[2] == b"a"
        assert not any("still running" in record.getMessage() for record in log.records)

    @pytest.mark.skipif(os.name == "nt", reason="a proactor accepts by itself")
    def test_a_handshake_that_goes_on_becomes_a_request(self, monkeypatch):
        """A worker that is replaced, for one, must lose none of them."""
        monkeypatch.setattr(server, "FIRST_REQUEST", PATIENCE)
        with serve(echo, timeout_graceful_shutdown=PATIENCE) as running:
            with running.connect() as client:
                until(running, lambda: running.server.greetings)
                running.call(running.server.stop, "test")
                client.sock = trusting().wrap_socket(
                    client.sock, server_hostname="localhost"
                )
                client.send(GET)
                status, fields, _ = client.response()
                assert (status, fields["connection"]) == (200, "close")

    @pytest.mark.skipif(os.name == "nt", reason="a proactor accepts by itself")
    def test_a_handshake_ends_no_later_than_the_server(self, monkeypatch):
        """Else an app in a loop of its own is called after its shutdown."""
        monkeypatch.setattr(server, "FIRST_REQUEST", SHORT)
        [listener] = sockets.bind_tcp("127.0.0.1", 0, 5)
        config = server.Config(echo, lifespan="off", ssl_certfile=CERTIFICATE)
        it = server.Server(config, [listener])

        async def serve_and_go_on():
            task = asyncio.create_task(it.serve())
            while not it.greetings:
                await asyncio.sleep(0.01)
            greetings = list(it.greetings)
            it.stop("test")
            await task
            assert all(greeting.done() for greeting in greetings)

        with Client(listener.getsockname()) as client:
            client.send(client_hello())
            asyncio.run(serve_and_go_on())

    @pytest.mark.skipif(os.name == "nt", reason="the proactor leaves it to the gc")
    def test_a_handshake_that_is_not_finished_does_not_hold_it_up(self, log):
        with serve(echo) as running, running.connect() as client:
            client.send(client_hello())
            client.sock.recv(1)
            running.stop()
        assert errors(log) == []
        assert not any("still running" in record.getMessage() for record in log.records)


class TestWebSocket:
    """RFC 6455 §1.3, §3 and §5.7: wss."""

    @pytest.mark.parametrize("how", ["close_notify", "FIN"])
    def test_what_a_client_said_before_it_left_arrives(self, how):
        """However much of it there is, and although TLS says its end at once."""
        seen, left = queue.Queue(), threading.Event()

        async def app(scope, receive, send):
            await receive()
            await send({"type": "websocket.accept"})
            await asyncio.to_thread(left.wait, PATIENCE)
            await asyncio.sleep(0)
            count = 0
            while (message := await receive())["type"] == "websocket.receive":
                count += 1
            seen.put((count, message["code"]))

        with serve(app) as running:
            client = secure(running)
            client.send(WEBSOCKET)
            client.read_until(b"\r\n\r\n")
            client.send(frame(TEXT, b"x" * 300) * 500 + frame(CLOSING, b"\x03\xe8"))
            client.leave(how)
            left.set()
            assert seen.get(timeout=PATIENCE) == (500, 1000)

    def test_an_echo_comes_back(self):
        seen = queue.Queue()

        async def app(scope, receive, send):
            seen.put(scope)
            await receive()
            await send({"type": "websocket.accept"})
            message = await receive()
            await send({"type": "websocket.send", "text": message["text"]})
            await receive()

        with serve(app) as running, secure(running) as client:
            client.send(WEBSOCKET)
            head = client.read_until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101 ")
            assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head
            client.send(b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58")
            assert client.read_until(b"Hello") == b"\x81\x05Hello"
            client.send(b"\x88\x82\0\0\0\0\x03\xe8")
            assert client.read_all() == b"\x88\x02\x03\xe8"
        scope = seen.get()
        assert scope["type"] == "websocket" and scope["scheme"] == "wss"
        assert scope["extensions"]["tls"]["tls_version"] in (0x0303, 0x0304)


class TestProcess:
    """behaviour.md §1 and §6: as a user runs it."""

    @pytest.mark.parametrize("workers", [1, 2])
    def test_the_address_is_https_and_answers(self, workers):
        arguments = ["--port", 0, "--workers", workers, "--ssl-certfile", CERTIFICATE]
        with Process("echo:app", *arguments, "--lifespan", "off") as process:
            line = r"listening on https://127\.0\.0\.1:(\d+)"
            port = int(process.wait_for(line)[1])
            for _ in range(4):
                with TLSClient(("127.0.0.1", port)) as client:
                    client.send(post(b"hello"))
                    assert client.response()[0] == 200
            process.interrupt()
            assert process.exit_code() == 0
        assert "Traceback" not in process.output
