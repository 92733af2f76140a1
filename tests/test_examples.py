"""Each example is started as its own text says, and does what it says. (tiny, trace and
microscope have files of their own.)"""

import json
import re

import pytest
from apps import get, post, request
from conftest import GET, ROOT, Process, sooner
from frames import CLOSE, TEXT, handshake, quick_frame

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
TOOLS = {"tiny": 141, "trace": 200, "microscope": 241}  # they are started by themselves
LONGER = {"wsgi": 92, **TOOLS}  # PEP 3333 has many names


def text_of(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


@pytest.fixture
def client(request):
    """A client of the example that the test names."""
    name, *options = [request.param] if isinstance(request.param, str) else request.param
    with Process(f"{name}:app", "--port", 0, *options) as process:
        with process.connect(process.port()) as client:
            client.process = process
            yield client


def example(*app_and_options):
    return pytest.mark.parametrize("client", [app_and_options], indirect=True, ids=[""])


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_it_shows_and_how_to_run_it(name):
    lines = text_of(f"examples/{name}").split("\n")
    assert lines[0] == f"# examples/{name}.py"
    run = f"examples/{name}.py" if name in TOOLS else f"server.py {name}:app"
    for start in ("Spec:", f"Run:   python {run}", "Try:", "Look:"):
        assert any(line.startswith(f"# {start}") for line in lines), start
    assert len(lines) <= LONGER.get(name, 52) + 1  # what follows the last end of line


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_points_to_names_that_exist(name):
    """`Look:  server.py, chapter 7, send and handle (a remark); chapter 4, …`"""
    head = text_of(f"examples/{name}").partition("\n\n")[0]
    look = re.split(r"\n#\s*\n|\n# \w", head.partition("# Look:")[2])[0]
    look = re.sub(r"\(.*?\)", "", re.sub(r"\n#\s+", " ", look))
    for place in look.removeprefix("  server.py, ").split("; "):
        number, names = re.fullmatch(r"chapter (\d), (.*)", place.strip()).groups()
        chapter = re.search(rf"(?ms)^# ─+ {number}\. .*?(?=^# ─|\Z)", text_of("server"))[0]
        for word in names.split(" and "):
            assert re.search(rf"\b(def|class) {word.strip()}\b", chapter), word


ANSWERS = [  # what is sent, and how the answer ends
    ("example", GET, b"Hello, world!\n"),
    ("echo", post(b"hello"), b"\r\nhello\r\n0\r\n\r\n"),
    ("ws_echo", handshake() + quick_frame(TEXT, b"hello"), b"\x81\x05hello"),
]


@pytest.mark.parametrize("client, sent, end", ANSWERS, indirect=["client"])
def test_an_example_answers(client, sent, end):
    client.send(sent)
    client.read_until(end)


@example("scope")
def test_scope_shows_bytes_text_and_duplicates_as_they_are(client):
    client.send(get(b"/caf%C3%A9?a=1&a=%32", b"X-Twice: 1", b"x-twice: 2"))
    _, fields, body = client.response()
    assert fields["content-type"] == "application/json"
    scope = json.loads(body)
    assert (scope["path"], scope["query_string"]) == ("/café", "b'a=1&a=%32'")
    assert scope["headers"][-2:] == [["b'x-twice'", "b'1'"], ["b'x-twice'", "b'2'"]]


def test_events_go_on_while_the_client_is_there(tmp_path):
    with Process(*sooner(tmp_path, "events", "EVERY = 0.1"), "--port", 0) as process:
        with process.connect(process.port()) as client:
            client.send(GET)
            client.read_until(b"id: 3\n")


@example("stream")
def test_stream_ends_when_its_client_has_left(client):
    client.send(request(b"HEAD / HTTP/1.1") + GET)  # an answer that has no content has an end
    assert client.response("HEAD")[0] == 200
    client.read_until(b"sixteen bytes:)\n")
    client.sock.close()
    client.process.wait_for(r"the client left after [\d,]+ bytes")


def test_events_notices_the_client_leaving_although_it_has_nothing_to_send(tmp_path):
    """Its second event would come in an hour: so it is receive that tells."""
    app = sooner(tmp_path, "events", "EVERY = 3600")
    with Process(*app, "--port", 0, "--timeout-graceful-shutdown", 0.5) as process:
        with process.connect(port := process.port()) as client:
            client.send(GET)
            client.read_until(b"id: 1\n")
        process.wait_for("the stream has ended after 1 events")
        with process.connect(port) as client:
            client.send(GET)
            client.read_until(b"id: 1\n")
            process.interrupt()  # a server that stops lets the stream end well
            assert client.read_all().endswith(b"\r\n0\r\n\r\n")


@example("visits")
def test_visits_are_counted_over_requests_and_told_at_the_end(client):
    for number in (b"1", b"2", b"3"):
        client.send(GET)
        assert client.response()[2] == b"visit %s\n" % number
    client.process.interrupt()
    client.process.wait_for("^3 visits$")


@example("middleware")
def test_middleware_adds_the_time_that_the_inner_app_took(client):
    client.send(GET)
    took = client.response()[1]["server-timing"].removeprefix("app;dur=")
    assert float(took) >= 45  # of the 50 ms that it sleeps; clocks are coarse


MISTAKES = [  # what the app sends, which keys it changes, the refusal
    ("/", "", "Response Start comes first"),
    ("/start", "", "needs at least one Response Body"),
    ("/start", "{'status': '200'}", "status: "),
    ("/start", "{'headers': [(b'x', 1)]}", "headers: bytes only"),
    ("/start", "{'headers': [(b'X', b'1')]}", "headers: must be lowercased"),
    ("/start/body", "{'body': 'text'}", "body: (byte string)"),
    ("/start/body", "{'more_body': 1}", "more_body: (bool)"),
]


@example("checker")
def test_checker_refuses_each_mistake_and_nothing_else(client):
    port = client.sock.getpeername()[1]
    good = "{'headers': [(b'x', b'1')], 'body': b'text', 'more_body': False}"
    for path, changes, words in [("/start/body", good, ""), *MISTAKES]:
        with client.process.connect(port) as another:
            another.send(post(changes.encode()).replace(b"/", path.encode(), 1))
            assert another.response()[0] == (500 if words else 200)
        if words:
            client.process.wait_for("Error: .*" + re.escape(words))


CHECKED = """
import json
from wsgiref.validate import validator
from wsgi import bridge

NAMES = "REQUEST_METHOD SCRIPT_NAME PATH_INFO QUERY_STRING HTTP_X_A HTTP_X_B".split()

def inner(environ, start_response):
    start_response("201 Created", [("Content-Type", "application/json")])
    if environ["PATH_INFO"] == "/fail":
        return broken()
    body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])).decode()
    found = [environ.get(name) for name in NAMES]
    return iter([json.dumps([*found, body]).encode()])

def broken():
    try:
        yield b"part"
        raise ValueError("half way")
    finally:
        print("closed", flush=True)

app = bridge(validator(inner))
"""


def test_wsgi_keeps_to_pep_3333(tmp_path):
    """By the standard library's own checker, which watches both sides."""
    (tmp_path / "checked.py").write_text(CHECKED)
    options = ("--port", 0, "--app-dir", tmp_path, "--root-path", "/under")
    with Process("checked:app", *options) as process:
        with process.connect(process.port()) as client:
            fields = b"X-A: 1", b"X-A: 2", b"X_B: 3", b"Transfer-Encoding: chunked"
            client.send(request(b"POST /a%20b?q HTTP/1.1", *fields))
            client.send(b"3\r\none\r\n4\r\n two\r\n0\r\n\r\n")
            expected = ["POST", "/under", "/a b", "q", "1,2", None, "one two"]
            assert json.loads(client.response()[2]) == expected
            client.send(get(b"/fail"))  # it fails when a part is sent already
            assert client.read_all().endswith(b"\r\n4\r\npart\r\n")
        process.wait_for("^closed$")
        process.wait_for("ValueError: half way")


def test_slow_is_waited_for_with_its_job(tmp_path):
    with Process(*sooner(tmp_path, "slow", "SECONDS = 0.3"), "--port", 0) as process:
        with process.connect(process.port()) as client:
            client.send(GET)
            process.wait_for("a request")
            process.interrupt()
            process.wait_for("stopping")
            assert client.response()[2] == b"better late than never\n"
        for step in ("answered", "the job is done", "no job is left", "stopped"):
            process.wait_for(step)


@example("chat", "--proxy-headers")
def test_chat_tells_everybody(client):
    """Also clients of one proxy, whose field has no port: the address would not do."""
    behind = handshake(X_Forwarded_For="192.0.2.1")
    port = client.sock.getpeername()[1]
    with client.process.connect(port) as first, client.process.connect(port) as second:
        first.send(behind)
        first.read_until(b"guest 1 is here")
        second.send(behind)
        first.read_until(b"guest 2 is here")
        second.send(quick_frame(TEXT, b"hello"))
        first.read_until(b"guest 2: hello")
        second.send(quick_frame(CLOSE, b""))
        first.read_until(b"guest 2 has left")
