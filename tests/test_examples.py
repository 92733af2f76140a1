"""Each example is started as its own text says, and does what it says."""

from __future__ import annotations

import json
import re

import pytest
from conftest import GET, ROOT, Process, sooner

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
LONGER = {"wsgi": 92, "microscope": 175}  # PEP 3333 has many names; a tool, too
POST = b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n\r\n"
HEAD = b"HEAD / HTTP/1.1\r\nHost: test\r\n\r\n"


def text_of(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_it_shows_and_how_to_run_it(name):
    lines = text_of(f"examples/{name}").split("\n")
    assert lines[0] == f"# examples/{name}.py"
    for word in ("Spec:", "Run:", "Try:", "Look:"):
        assert any(line.startswith(f"# {word}") for line in lines), word
    assert f"# Run:   python server.py {name}:app" in lines
    assert len(lines) <= LONGER.get(name, 52) + 1  # what follows the last end of line


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_points_to_names_that_exist(name):
    """`Look:  server.py, chapter 6, send and start_response (a remark); chapter 4, …`"""
    head = text_of(f"examples/{name}").partition("\n\n")[0]
    look = head.partition("# Look:")[2].partition("\n#\n")[0]
    look = re.sub(r"\n#\s+", " ", look)
    look = re.sub(r"\(.*?\)", "", look)
    module = chapter = ""
    for place in look.split(";"):
        *where, names = place.strip().split(", ")
        for word in where:
            if word.endswith(".py"):
                module = chapter = text_of(word.removesuffix(".py"))
            else:
                start = module.index(f"{word.removeprefix('chapter ')}. ")
                chapter = module[start : (module + "\n# ───").index("\n# ───", start)]
        for word in names.split(" and "):
            assert re.search(rf"\b(def|class) {word.strip()}\b", chapter), word


def test_example_says_hello():
    with Process("example:app", "--port", 0) as process:
        with process.connect(process.port()) as client:
            client.send(GET)
            assert client.response()[2] == b"Hello, world!\n"


def test_scope_shows_bytes_text_and_duplicates_as_they_are():
    with Process("scope:app", "--port", 0) as process:
        with process.connect(process.port()) as client:
            target = b"/caf%C3%A9?a=1&a=%32"
            client.send(GET.replace(b"/ ", target + b" ", 1)[:-2])
            client.send(b"X-Twice: 1\r\nx-twice: 2\r\n\r\n")
            _, fields, body = client.response()
    assert fields["content-type"] == "application/json"
    scope = json.loads(body)
    assert (scope["path"], scope["raw_path"]) == ("/café", "b'/caf%C3%A9'")
    assert scope["query_string"] == "b'a=1&a=%32'"
    assert scope["headers"][-2:] == [["b'x-twice'", "b'1'"], ["b'x-twice'", "b'2'"]]


def test_echo_answers_with_what_it_was_sent():
    with Process("echo:app", "--port", 0) as process:
        with process.connect(process.port()) as client:
            client.send(POST + b"hello")
            assert client.response()[::2] == (200, b"hello")


def test_stream_ends_when_its_client_has_left():
    with Process("stream:app", "--port", 0) as process:
        port = process.port()
        with process.connect(port) as client:
            client.send(HEAD)  # an answer that has no content has an end
            assert client.response("HEAD")[::2] == (200, b"")
            client.send(GET)
            client.read_until(b"sixteen bytes:)\n")
        process.wait_for(r"the client left after [\d,]+ bytes")


def test_events_notices_the_client_leaving_although_it_has_nothing_to_send(tmp_path):
    """Its second event would come in an hour: so it is receive that tells."""
    once = "import events\nevents.EVERY = 3600\napp = events.app\n"
    (tmp_path / "hourly.py").write_text(once)
    options = ("--app-dir", tmp_path, "--timeout-graceful-shutdown", 0.5)
    with Process("hourly:app", "--port", 0, *options) as process:
        port = process.port()
        with process.connect(port) as client:
            client.send(GET)
            assert b"text/event-stream" in client.read_until(b"\r\n\r\n")
            assert b"id: 1\ndata: " in client.read_until(b"\n\n")
        process.wait_for("the stream has ended after 1 events")
        with process.connect(port) as client:
            client.send(HEAD + GET)
            assert client.response("HEAD")[::2] == (200, b"")
            client.read_until(b"id: 1\n")
            process.wait_for("the stream has ended after 0 events")
            # A server that stops lets the stream end well.
            process.interrupt()
            assert client.read_all().endswith(b"\r\n0\r\n\r\n")
        assert process.exit_code() == 0


def test_events_go_on_while_the_client_is_there(tmp_path):
    with Process(*sooner(tmp_path, "events", "EVERY = 0.1"), "--port", 0) as process:
        with process.connect(process.port()) as client:
            client.send(GET)
            client.read_until(b"id: 2\n")


def test_visits_are_counted_over_requests_and_told_at_the_end():
    with Process("visits:app", "--port", 0) as process:
        with process.connect(process.port()) as client:
            for number in (b"1", b"2", b"3"):
                client.send(GET)
                assert client.response()[2] == b"visit %s\n" % number
        process.interrupt()
        assert process.exit_code() == 0
    assert re.search(r"(?m)^3 visits$", process.output)


def test_middleware_adds_the_time_that_the_inner_app_took():
    with Process("middleware:app", "--port", 0) as process:
        with process.connect(process.port()) as client:
            client.send(GET)
            status, fields, body = client.response()
    assert (status, body) == (200, b"look at the fields\n")
    took = re.fullmatch(r"app;dur=([\d.]+)", fields["server-timing"])
    assert float(took[1]) >= 45  # of the 50 ms that it sleeps; clocks are coarse


class TestChecker:
    """A mistake a row: what the app sends, which keys it changes, the refusal."""

    MISTAKES = [
        ("/", "", "Response Start comes first"),
        ("/body", "", "Response Start comes first"),
        ("/end", "", "Response Start comes first"),
        ("/start", "", "needs at least one Response Body"),
        ("/start/start", "", "needs at least one Response Body"),
        ("/start/trailers", "", "needs at least one Response Body"),
        ("/start/body", "{'more_body': True}", "needs at least one Response Body"),
        ("/start/body/body", "", "any further messages are ignored"),
        ("/start", "{'status': '200'}", "status: "),
        ("/start", "{'headers': [('x', b'1')]}", "headers: bytes only"),
        ("/start", "{'headers': [(b'x', 1)]}", "headers: bytes only"),
        ("/start", "{'headers': [(b'X', b'1')]}", "headers: must be lowercased"),
        ("/start", "{'headers': [(b':x', b'1')]}", "headers: no pseudo headers"),
        ("/start", "{'headers': [(b'x', b'1', b'2')]}", "too many values"),
        ("/start/body", "{'body': 'text'}", "body: (byte string)"),
        ("/start/body", "{'more_body': 1}", "more_body: (bool)"),
    ]

    def test_it_refuses_each_mistake_and_nothing_else(self):
        with Process("checker:app", "--port", 0) as process:
            port = process.port()

            def status_of(path: str, changes: str) -> int:
                with process.connect(port) as client:
                    head = f"POST {path} HTTP/1.1\r\nHost: test\r\n"
                    length = f"Content-Length: {len(changes)}\r\n\r\n"
                    client.send((head + length + changes).encode())
                    return client.response()[0]

            good = "{'headers': [(b'x', b'1')], 'body': b'text', 'more_body': False}"
            assert status_of("/start/body", good) == 200
            for path, changes, words in self.MISTAKES:
                already_answered = path == "/start/body/body"
                if "True" in changes:
                    with pytest.raises(Exception, match="incomplete|closed"):
                        status_of(path, changes)
                else:
                    expected = 200 if already_answered else 500
                    assert status_of(path, changes) == expected, path
                process.wait_for("Error: .*" + re.escape(words))
            process.interrupt()
            assert process.exit_code() == 0
        assert process.output.count("the app failed") == len(self.MISTAKES)


SOONER = """
import time, types, wsgi
wsgi.time = types.SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 10))
app = wsgi.app
"""


class TestWsgi:
    def test_it_runs_an_app_that_blocks(self, tmp_path):
        """For a tenth of a second here."""
        (tmp_path / "sooner.py").write_text(SOONER)
        with Process("sooner:app", "--app-dir", tmp_path, "--port", 0) as process:
            with process.connect(process.port()) as client:
                client.send(POST.replace(b"/ ", b"/caf%C3%A9 ", 1) + b"hello")
                status, fields, body = client.response()
        assert (status, body.decode()) == (200, "/café was sent hello\n")
        assert fields["content-type"] == "text/plain; charset=utf-8"

    def test_it_keeps_to_pep_3333(self, tmp_path):
        """By the standard library's own checker, which watches both sides."""
        (tmp_path / "checked.py").write_text(CHECKED)
        options = ("--port", 0, "--app-dir", tmp_path, "--root-path", "/under")
        with Process("checked:app", *options) as process:
            port = process.port()
            with process.connect(port) as client:
                fields = b"X-A: 1\r\nX-A: 2\r\nX_B: 3\r\nTransfer-Encoding: chunked\r\n"
                client.send(b"POST /a%20b?q HTTP/1.1\r\nHost: test\r\n" + fields)
                client.send(b"\r\n3\r\none\r\n4\r\n two\r\n0\r\n\r\n")
                status, fields, body = client.response()
                assert (status, fields["x-seen"]) == (201, "yes")
                assert json.loads(body) == [
                    *("POST", "/under", "/a b", "q", "7", str(port)),
                    *("1,2", None, "one two"),
                ]
            with process.connect(port) as client:  # fails when a part is sent already
                client.send(GET.replace(b"/ ", b"/fail ", 1))
                assert client.read_all().endswith(b"\r\n4\r\npart\r\n")
            process.wait_for("ValueError: half way")
            assert process.lines.count("closed") >= 2  # by each of the two responses


CHECKED = """
import json
from wsgiref.validate import validator
from wsgi import bridge

class Parts:
    def __init__(self, *parts):
        self.parts = iter(parts)
    def __iter__(self):
        return self
    def __next__(self):
        return next(self.parts)
    def close(self):
        print("closed", flush=True)

class Broken(Parts):
    def __next__(self):
        for part in self.parts:
            return part
        raise ValueError("half way")

def inner(environ, start_response):
    fields = [("Content-Type", "application/json"), ("X-Seen", "yes")]
    start_response("201 Created", fields)
    if environ["PATH_INFO"] == "/fail":
        return Broken(b"part")
    length = environ["CONTENT_LENGTH"]
    names = ["REQUEST_METHOD", "SCRIPT_NAME", "PATH_INFO", "QUERY_STRING"]
    names += ["CONTENT_LENGTH", "SERVER_PORT", "HTTP_X_A", "HTTP_X_B"]
    found = [environ.get(name) for name in names]
    found.append(environ["wsgi.input"].read(int(length)).decode())
    text = json.dumps(found).encode()
    return Parts(text[:5], text[5:])

app = bridge(validator(inner))
"""


SHOWN = """
import pathsend

async def with_it(scope, receive, send):
    async def show(message):
        print(message["type"], flush=True)
        await send(message)
    await pathsend.app(scope, receive, show)

async def without(scope, receive, send):
    await with_it({**scope, "extensions": {}}, receive, send)
"""


@pytest.mark.parametrize("app, expected", [("with_it", "pathsend"), ("without", "body")])
def test_pathsend_uses_the_extension_where_there_is_one(app, expected, tmp_path):
    (tmp_path / "shown.py").write_text(SHOWN)
    content = (ROOT / "examples" / "chat.py").read_bytes()
    with Process(f"shown:{app}", "--port", 0, "--app-dir", tmp_path) as process:
        with process.connect(process.port()) as client:
            for method in ("GET", "HEAD"):
                client.send(f"{method} /chat.py HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                status, fields, body = client.response(method)
                assert (status, fields["content-length"]) == (200, str(len(content)))
                assert body == (content if method == "GET" else b"")
                process.wait_for("^http.response.start$")
                process.wait_for(f"^http.response.{expected}$")
    assert process.output.count("pathsend") == (2 if expected == "pathsend" else 0)


def test_pathsend_sends_nothing_that_it_has_not_listed():
    with Process("pathsend:app", "--port", 0) as process:
        with process.connect(process.port()) as client:
            for path in ("/../README.md", "/..%2FREADME.md", "/", "//etc/passwd"):
                client.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                assert client.response()[0] == 404


def test_slow_is_waited_for_with_its_job(tmp_path):
    with Process(*sooner(tmp_path, "slow", "SECONDS = 0.7"), "--port", 0) as process:
        with process.connect(process.port()) as client:
            client.send(GET)
            process.wait_for("a request")
            process.interrupt()
            process.wait_for("stopping")
            assert client.response()[::2] == (200, b"better late than never\n")
        assert process.exit_code() == 0
    steps = ["stopping", "answered", "the job is done", "no job is left", "stopped"]
    places = [process.output.rindex(step) for step in steps]
    assert places == sorted(places)


def test_slow_is_not_waited_for_any_longer_than_the_grace():
    grace = ("--timeout-graceful-shutdown", 0.2)
    with Process("slow:app", "--port", 0, *grace) as process:
        with process.connect(process.port()) as client:
            client.send(GET)
            process.wait_for("a request")
            process.interrupt()
            assert client.response()[0] == 503
        assert process.exit_code() == 0
    assert "answered" not in process.output


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
HELLO = b"\x81\x85\x00\x00\x00\x00hello"  # masked with zeros


def test_ws_echo_says_what_it_hears():
    with Process("ws_echo:app", "--port", 0) as process:
        with process.connect(process.port()) as client:
            client.send(UPGRADE + HELLO)
            client.read_until(b"\r\n\r\n")
            assert client.read_until(b"hello") == b"\x81\x05hello"


def test_chat_tells_everybody():
    with Process("chat:app", "--port", 0) as process:
        port = process.port()
        with process.connect(port) as page:
            page.send(GET)
            assert b"new WebSocket" in page.response()[2]
        with process.connect(port) as first, process.connect(port) as second:
            first.send(UPGRADE)
            first.read_until(b"guest 1 is here")
            second.send(UPGRADE)
            first.read_until(b"guest 2 is here")
            second.send(HELLO)
            assert first.read_until(b"guest 2: hello")
            second.read_until(b"guest 2: hello")
            second.send(b"\x88\x80\x00\x00\x00\x00")
            assert first.read_until(b"guest 2 has left")


def test_chat_tells_clients_of_one_proxy_apart():
    """A proxy's header has no port: by address they would all be one guest."""
    behind = UPGRADE[:-2] + b"X-Forwarded-For: 192.0.2.1\r\n\r\n"
    with Process("chat:app", "--port", 0, "--proxy-headers") as process:
        port = process.port()
        with process.connect(port) as first, process.connect(port) as second:
            first.send(behind)
            first.read_until(b"guest 1 is here")
            second.send(behind)
            first.read_until(b"guest 2 is here")
            second.send(HELLO)
            first.read_until(b"guest 2: hello")
