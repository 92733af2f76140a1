"""TLS: the same server behind a handshake. The client is the ssl module's. It checks the
certificate, and tells an orderly end (close_notify) from one that just broke.

The certificates beside this file say how they were made; their key is public.
"""

import asyncio
import contextlib
import functools
import http.client
import os
import queue
import ssl
import threading
import time
from pathlib import Path

import pytest
from apps import END, START, Recorder, body, errors, get, has_ended, length, narrow_listener
from apps import post, read_body, saying, start, turns, until, wait_for_disconnect
from conftest import GET, PATIENCE, Client, Process, serving
from frames import CLOSE, TEXT, frame, handshake

import server

CERTIFICATE = str(Path(__file__).with_name("certificate.pem"))
LOCKED = str(Path(__file__).with_name("certificate_locked.pem"))  # by the word "secret"
LAST = get(b"/", b"Connection: close")
CLOSED = frame(CLOSE, b"\x03\xe8")
SHORT = 0.2  # a deadline that shall pass
NO_HURRY = {"timeout_graceful_shutdown": 1000.0}  # a stop must not need this time

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
            with contextlib.suppress(OSError):  # do not wait for the server's
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
    """asyncio logs it when it is used in a wrong way, for example to write after the
    end. No test here may make it do so."""
    yield
    said = [r.getMessage() for r in caplog.get_records("call") if r.name == "asyncio"]
    assert said == []


def secure(running, context=None) -> TLSClient:
    return TLSClient(running.address, context)


@contextlib.contextmanager
def visiting(app, listener=None, **options):
    """A client of this app, behind TLS."""
    with serve(app, listener, **options) as running, secure(running) as client:
        client.running = running
        yield client


def ask(running, request=GET):
    """The answer to one request on a connection of its own."""
    with secure(running) as client:
        client.send(request)
        return client.response()


async def echo(scope, receive, send):
    """Answers with the body, which it reads whole."""
    data = await read_body(receive)
    await send(START)
    await send(body(data))


async def sized(scope, receive, send):
    """Answers with so many bytes as the path says."""
    size = int(scope["path"][1:])
    await send(start(length(size)))
    await send(body(bytes(size)))


def ended(client) -> bytes:
    """All that came until the connection ended, in whatever way."""
    found = b""
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        while data := client.sock.recv(65536):
            found += data
    return found


class TestRequests:
    """RFC 9110 §4.2.2, "https": HTTP as ever, inside TLS."""

    def test_an_ordinary_client_keeps_its_connection_for_several_requests(self):
        upload = b"".join(b"%07d\n" % number for number in range(500_000))
        chunked = iter([upload[:99], upload[99:]])
        with serve(echo) as running:
            conn = http.client.HTTPSConnection(*running.address, context=trusting())
            for data, expected in [(b"", b""), (b"x", b"x"), (upload, upload), (chunked, upload)]:
                conn.request("POST", "/", data)
                sock = conn.sock
                response = conn.getresponse()
                assert response.status == 200 and response.read() == expected
                assert conn.sock is sock and sock is not None
            conn.close()

    def test_an_answer_may_have_any_size(self):
        """What if asyncio holds back a little, and does not tell that there is room?"""
        with visiting(sized) as client:
            for size in (0, 1, 16_384, 65_536, 131_072, 1_000_000, 3):
                client.send(get(b"/%d" % size))
                assert client.response()[2] == bytes(size)

    def test_the_scheme_is_https(self):
        app = Recorder()
        with visiting(app) as client:
            client.send(GET)
            assert client.response()[0] == 200
            [scope] = app.scopes
            assert (scope["scheme"], scope["extensions"]) == ("https", {})
            assert scope["client"] == client.sock.getsockname()
            assert scope["server"] == client.running.address

    @pytest.mark.parametrize("offered", [["http/1.1"], ["h2", "http/1.1"], []])
    def test_http_1_1_is_what_alpn_agrees_on(self, offered):
        """RFC 7301 §3.2."""
        context = ssl.create_default_context(cafile=CERTIFICATE)
        context.set_alpn_protocols(offered) if offered else None
        with serve(echo) as running, secure(running, context) as client:
            assert client.sock.selected_alpn_protocol() == ("http/1.1" if offered else None)
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
    return tmp_path


FILES_GOOD = [  # certificate, key, password
    *((CERTIFICATE, None, None), ("cert.pem", "key.pem", None), (LOCKED, None, "secret")),
    *(("cert.pem", "locked.pem", "secret"), (CERTIFICATE, None, "not needed")),
]
FILES_BAD = [
    *((LOCKED, None, None), (LOCKED, None, "secrets"), ("cert.pem", "locked.pem", None)),
    *(("missing.pem", None, None), ("cert.pem", "missing.pem", None)),
    *(("cert.pem", None, None), ("rubbish.pem", None, None)),
]


def tls_options(files, case):
    certfile, keyfile, password = case
    return {
        "ssl_certfile": str(files / certfile),  # an absolute path stays what it is
        "ssl_keyfile": keyfile and str(files / keyfile),
        "ssl_keyfile_password": password,
    }


def ids(case):
    return ", ".join(os.path.basename(part or "none") for part in case)


class TestFiles:
    """--ssl-certfile, --ssl-keyfile, --ssl-keyfile-password."""

    @pytest.mark.parametrize("case", FILES_GOOD, ids=ids)
    def test_a_certificate_and_its_key_may_come_in_one_file_or_two(self, files, case):
        with plain(echo, **tls_options(files, case)) as running:
            assert ask(running, post(b"hello"))[2] == b"hello"

    @pytest.mark.parametrize("case", FILES_BAD, ids=ids)
    def test_files_that_cannot_be_used_are_named_in_one_line(self, files, case, log):
        options = tls_options(files, case)
        assert server.run(echo, port=0, **options) == 3
        (line,) = errors(log)
        assert "\n" not in line and options["ssl_certfile"] in line
        assert (options["ssl_keyfile"] or "") in line
        assert "secrets" not in line  # a password is not for the log
        assert ("No such file" if "missing.pem" in case else "is wrong") in line

    def test_a_locked_key_never_asks_on_the_terminal(self):
        """In a session of its own it has no terminal: OpenSSL would ask on stderr."""
        arguments = ["echo:app", "--port", 0, "--ssl-certfile", LOCKED]
        with Process(*arguments, start_new_session=os.name != "nt") as process:
            assert process.exit_code() == 3
        (line,) = process.lines
        assert "ERROR" in line and "phrase:" not in line


def client_hello() -> bytes:
    """The first bytes that a TLS client sends."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


class TestHandshake:
    """RFC 8446 §4; it has the time that a head may take."""

    def test_a_client_that_does_not_finish_it_is_dropped(self, log):
        """It does not hold up the others, which need some of that time for their own."""
        options = {"timeout_request_head": 0.5}
        with serve(echo, **options) as running, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(running.connect()) for _ in range(4)]
            for client, size in zip(clients, (0, 1, 5, 100), strict=True):
                client.send(client_hello()[:size])
            assert ask(running)[0] == 200
            assert [ended(client) for client in clients] == [b""] * 4
        assert not errors(log)

    @pytest.mark.parametrize(
        "data", [GET, b"\0" * 99, b"\x16\x03\x01\x00\x05hello", client_hello()]
    )
    def test_a_client_that_speaks_no_tls_or_leaves_is_no_error_of_ours(self, data, log):
        """Plain HTTP, for example. It gets no answer in the clear."""
        with serve(echo) as running:
            with running.connect() as client:
                client.send(data)
                client.half_close()
                assert b"HTTP" not in ended(client)
            assert ask(running)[0] == 200
        assert not errors(log) and not any(record.exc_info for record in log.records)


class TestEndings:
    """RFC 9112 §9.6 and §9.8: the answer arrives whole, and then a close_notify."""

    @staticmethod
    async def closes(scope, receive, send):
        if scope["type"] == "http":
            return await echo(scope, receive, send)
        for message in ("websocket.accept", "websocket.close"):
            await send({"type": message})

    @pytest.mark.parametrize(
        "before, data",
        [(b"", b"rubbish\r\n\r\n"), (b"", GET), (b"", LAST), (b"", b"")]
        + [(handshake(), CLOSED)],  # which is read after the server has said its own
    )
    def test_the_last_word_and_close_notify_in_one_segment_are_no_error(self, before, data, log):
        """asyncio tells of the end at once, and perhaps amid our own work."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = trusting().wrap_bio(incoming, outgoing, server_hostname="localhost")
        with serve(self.closes) as running, running.connect() as client:
            for _ in range(2):  # the two flights of the handshake
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                    break
                client.send(outgoing.read())
                incoming.write(client.sock.recv(65536))
            tls.write(before) if before else None
            client.send(outgoing.read())
            found = b""
            while before and b"\x88\x02\x03\xe8" not in found:  # the server's own Close
                incoming.write(client.sock.recv(65536))
                with contextlib.suppress(ssl.SSLWantReadError):
                    found += tls.read(65536)
            tls.write(data) if data else None
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.unwrap()
            client.send(outgoing.read())
            ended(client)
            assert ask(running)[0] == 200
            until(running, lambda: not running.server.connections)
        assert not errors(log)

    @pytest.mark.parametrize("messages", [[END], []], ids=["complete", "not"])
    def test_an_old_client_knows_by_the_close_notify_that_it_has_all(self, messages):
        """RFC 9112 §9.8. HTTP/1.0 has no other sign where there is no length."""
        with visiting(saying(START, body(b"all ", more=True), *messages)) as client:
            client.send(b"GET / HTTP/1.0\r\n\r\n")
            client.read_until(b"\r\n\r\nall ")
            if messages:
                assert client.read_all() == b""
            else:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    client.read_all()

    @pytest.mark.skipif(os.name == "nt", reason="a proactor shows no progress in a write")
    def test_a_slow_reader_gets_all_of_the_answer_and_a_close_notify(self):
        with visiting(sized, narrow_listener(), timeout_keep_alive=SHORT) as client:
            client.send(get(b"/300000", b"Connection: close"))
            client.read_until(b"\r\n\r\n")
            started, got = time.monotonic(), len(client.unread)
            while data := client.sock.recv(8_000):
                got += len(data)
                time.sleep(0.02)  # this is how slow it is
            assert got == 300_000 and time.monotonic() - started > 3 * SHORT


class TestLeaving:
    """ASGI www, "Disconnect", "Disconnected Client": the client just goes."""

    @LEAVING
    @pytest.mark.parametrize("request_bytes", [GET, post(b"hello")[:-1]])
    def test_receive_says_disconnect(self, request_bytes, how, log):
        waiting, seen = threading.Event(), queue.Queue()

        async def app(scope, receive, send):
            waiting.set()
            await wait_for_disconnect(receive)
            seen.put("told")

        with serve(app) as running:
            client = secure(running)
            client.send(request_bytes)
            assert waiting.wait(PATIENCE)
            client.leave(how)
            assert seen.get(timeout=PATIENCE) == "told"
        assert not errors(log)

    STREAM = (GET, START, body(b"x" * 999, more=True))
    UNREAD = (post(bytes(200_000))[:-1], START, body(b"x", more=True))

    @LEAVING
    @pytest.mark.parametrize("case", [STREAM, UNREAD], ids=["GET", "POST"])
    def test_send_raises(self, case, how, log):
        """Also when the app reads nothing, so that the server has stopped reading."""
        request_bytes, first, again = case
        seen, left = queue.Queue(), threading.Event()

        async def app(scope, receive, send):
            await send(first)
            await asyncio.to_thread(left.wait, PATIENCE)
            with pytest.raises(server.ClientDisconnected):
                for _ in range(1000):
                    await send(again)
                    await asyncio.sleep(0.001)
            seen.put("told")

        with serve(app) as running:
            client = secure(running)
            client.send(request_bytes)
            turns(running)
            client.leave(how)
            left.set()
            assert seen.get(timeout=PATIENCE) == "told"
        assert not errors(log)


class TestDeadlines:
    def test_idle_connections_are_closed_in_time_each_with_a_close_notify(self):
        options = {"timeout_keep_alive": 0.5, "timeout_request_head": 0.5}
        with serve(echo, **options) as running, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(secure(running)) for _ in range(30)]
            clients[-1].send(GET)
            assert clients[-1].response()[0] == 200
            started = time.monotonic()
            assert all(client.read_all() == b"" for client in clients)
            assert time.monotonic() - started < 7

    def test_many_that_pass_at_once_are_all_noticed_at_once(self, log, monkeypatch):
        """What if the first one that ends a connection ended the look at the others? At a
        stop the server waits for goodbyes, and these clients never say them."""
        monkeypatch.setattr(server, "LAST_CALL", SHORT)
        with serve(echo, **NO_HURRY) as running, contextlib.ExitStack() as stack:
            for _ in range(30):
                stack.enter_context(secure(running))
            started = time.monotonic()
            running.stop()
            assert time.monotonic() - started < 5
        assert not errors(log)

    def test_a_client_that_never_reads_is_dropped(self, monkeypatch):
        monkeypatch.setattr(server, "SEND_TIMEOUT", SHORT)
        with visiting(saying(START, *[body(bytes(100_000), more=True)] * 1000)) as client:
            client.send(GET)
            client.read_until(b"\r\n\r\n")
            until(client.running, lambda: not client.running.server.tasks)


class TestStopping:
    """A client that does not answer our close_notify costs a moment, and not the grace.
    A pool of connections, for example, looks at one when it needs it."""

    @pytest.mark.parametrize("request_bytes", [GET, LAST])
    def test_idle_clients_are_told_and_do_not_hold_it_up(self, request_bytes, monkeypatch):
        monkeypatch.setattr(server, "LAST_CALL", SHORT)
        app = saying(START, body(b"ok"))
        with serve(app, **NO_HURRY) as running, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(secure(running)) for _ in range(5)]
            for client in clients:
                client.send(request_bytes)
                client.read_until(b"0\r\n\r\n")
            running.call(running.server.stop, "test")
            has_ended(running)
            assert all(client.read_all() == b"" for client in clients)

    @pytest.mark.parametrize("size", [60_000, 150_000, 300_000, 1_000_000])
    def test_an_answer_arrives_whole_whatever_of_it_is_unsent(self, size, monkeypatch):
        """What if the app has said all, and the client reads it during the stop?"""
        monkeypatch.setattr(server, "LAST_CALL", 5.0)
        with visiting(sized, narrow_listener(), **NO_HURRY) as client:
            client.send(get(b"/%d" % size))
            client.read_until(b"\r\n\r\n")
            client.running.call(client.running.server.stop, "test")
            turns(client.running)
            assert len(client.read_all()) == size
            client.sock.close()
            has_ended(client.running)


class TestWebSocket:
    """RFC 6455 §3: wss."""

    @pytest.mark.parametrize("how", ["close_notify", "FIN"])
    def test_messages_that_a_client_said_before_it_left_arrive(self, how):
        """However much of it there is, and although TLS tells of its end at once."""
        seen = queue.Queue()

        async def app(scope, receive, send):
            await receive()
            await send({"type": "websocket.accept"})
            while (message := await receive())["type"] == "websocket.receive":
                seen.put(message["text"])
            seen.put((scope["scheme"], message["code"]))

        with serve(app) as running:
            client = secure(running)
            client.send(handshake() + frame(TEXT, b"x" * 300) * 500 + CLOSED)
            client.read_until(b"\r\n\r\n")
            client.leave(how)
            found = [seen.get(timeout=PATIENCE) for _ in range(501)]
        assert found == ["x" * 300] * 500 + [("wss", 1000)]


class TestProcess:
    """As a user runs it."""

    def test_a_handshake_goes_on_while_its_worker_stops(self):
        options = ("--reload", "--log-level", "debug", "--ssl-certfile", CERTIFICATE)
        with Process("echo:app", "--port", 0, *options) as process:
            address = ("127.0.0.1", process.port())
            with process.connect(address[1]) as client:
                TLSClient(address).sock.close()  # so the one before it is accepted, too
                process.interrupt()
                process.wait_for("asked by the supervisor: stopping")
                client.sock = trusting().wrap_socket(client.sock, server_hostname="localhost")
                client.send(LAST)
                assert client.response()[0] == 200
            assert process.exit_code() == 0

    def test_the_address_is_https_and_answers(self):
        with Process("echo:app", "--port", 0, "--ssl-certfile", CERTIFICATE) as process:
            line = r"listening on https://127\.0\.0\.1:(\d+)"
            port = int(process.wait_for(line)[1])
            with TLSClient(("127.0.0.1", port)) as client:
                client.send(post(b"hello"))
                assert client.response()[0] == 200
            process.interrupt()
            assert process.exit_code() == 0
        assert "Traceback" not in process.output
