"""examples/tiny.py over the wire: the first server that a reader meets keeps its word."""

import pytest
from apps import get, request
from conftest import GET, ROOT, Process

TINY = ROOT / "examples" / "tiny.py"
APP = """
async def app(scope, receive, send):
    async def body(data, more):
        await send({"type": "http.response.body", "body": data, "more_body": more})
    path = scope["path"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    match path:
        case b"/echo":
            while (message := await receive())["more_body"]:
                await body(message["body"], True)
            await body(message["body"], False)
        case b"/wait":
            while (await receive())["type"] != "http.disconnect":
                pass
            print("the client has left", flush=True)
        case b"/endless":
            while True:
                await body(bytes(9999), True)
        case b"/half":
            await body(path, True)
            await body("text", False)
        case b"/fail":
            await send({"type": "http.response.end"})
        case _:
            await body(path, False)
"""


class Tiny(Process):
    script = TINY


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "various.py").write_text(APP)
    with Tiny("various:app", 0, cwd=folder) as process:  # the current folder is searched
        process.number = process.port()
        yield process


@pytest.fixture
def client(tiny):
    with tiny.connect(tiny.number) as client:
        yield client


def test_it_is_short_and_ends_with_what_it_leaves_out():
    text = TINY.read_text(encoding="utf-8")
    assert sum(line != "" for line in text.splitlines()) <= 120
    end = text.rpartition("# What it leaves out")[2]
    assert all(f"{n}" in end for n in [*range(1, 10), "loops", "reload", "sockets", "workers"])


def test_it_finds_the_apps_in_examples_and_ends_quietly():
    with Tiny("example:app", 0) as process, process.connect(process.port()) as client:
        client.send(GET)
        assert client.response()[2] == b"Hello, world!\n"
        process.interrupt()
        process.exit_code()
    assert "Traceback" not in process.output


def test_pipelined_requests_are_answered_in_order_on_one_connection(client):
    client.send(get(b"/one") + request(b"HEAD /two HTTP/1.1") + get(b"/three"))
    bodies = [client.response(method)[2] for method in ("GET", "HEAD", "GET")]
    assert bodies == [b"/one", b"", b"/three"]


@pytest.mark.parametrize("path, answer", [(b"/echo", b"hello"), (b"/unread", b"/unread")])
def test_a_body_is_read_whether_the_app_wants_it_or_not(client, path, answer):
    head = request(b"POST " + path + b" HTTP/1.1", b"Transfer-Encoding: chunked")
    client.send(head + b"5\r\nhello\r\n0\r\n\r\n")
    client.send(get(b"/next"))
    assert [client.response()[2], client.response()[2]] == [answer, b"/next"]


def test_continue_is_sent_when_the_app_asks_for_the_body(client):
    post = b"POST /echo HTTP/1.1"
    client.send(request(post, b"Content-Length: 5", b"Expect: 100-continue"))
    client.read_until(b"100 \r\n\r\n")
    client.send(b"hello")
    assert client.response()[2] == b"hello"


def test_an_app_that_fails_gets_a_500_and_a_traceback(tiny, client):
    client.send(get(b"/fail"))
    assert client.response()[0] == 500
    assert client.read_all() == b""
    tiny.wait_for("^RuntimeError: unexpected message 'http.response.end'")


def test_an_answer_that_breaks_off_has_no_ending(client):
    client.send(get(b"/half"))
    assert client.read_all().endswith(b"\r\n5\r\n/half\r\n")


def test_a_malformed_request_is_400(client):
    client.send(get(b"/", b"Content-Length: x"))
    assert client.response()[0] == 400


def test_a_client_that_leaves_is_noticed_and_no_failure(tiny):
    with tiny.connect(tiny.number) as client:
        client.send(get(b"/endless"))
        client.read_until(bytes(9999))
        client.reset()
    with tiny.connect(tiny.number) as client:
        client.send(get(b"/wait"))
    tiny.wait_for("^the client has left$")
    assert "ConnectionReset" not in tiny.output and "BrokenPipe" not in tiny.output
