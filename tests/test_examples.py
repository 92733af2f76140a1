"""Each example is started as its own text says, and does what it says."""

from __future__ import annotations

import re

import pytest
from conftest import GET, ROOT, Process

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
POST = b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n\r\n"


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_it_shows_and_how_to_run_it(name):
    lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").split("\n")
    assert lines[0] == f"# examples/{name}.py"
    for word in ("Spec:", "Run:", "Try:", "Look:"):
        assert any(line.startswith(f"# {word}") for line in lines), word
    assert f"# Run:   python server.py {name}:app" in lines
    assert len(lines) <= 52 or name == "microscope"  # that one is a tool, too


def test_example_says_hello():
    with Process("example:app", "--port", 0) as process:
        with process.connect(process.port()) as client:
            client.send(GET)
            assert client.response()[2] == b"Hello, world!\n"


def test_echo_answers_with_what_it_was_sent():
    with Process("echo:app", "--port", 0) as process:
        with process.connect(process.port()) as client:
            client.send(POST + b"hello")
            assert client.response()[::2] == (200, b"hello")


def test_stream_ends_when_its_client_has_left():
    with Process("stream:app", "--port", 0) as process:
        with process.connect(process.port()) as client:
            client.send(GET)
            client.read_until(b"sixteen bytes:)\n")
        process.wait_for(r"the client left after [\d,]+ bytes")


def test_visits_are_counted_over_requests_and_told_at_the_end():
    with Process("visits:app", "--port", 0) as process:
        with process.connect(process.port()) as client:
            for number in (b"1", b"2", b"3"):
                client.send(GET)
                assert client.response()[2] == b"visit %s\n" % number
        process.interrupt()
        assert process.exit_code() == 0
    assert re.search(r"(?m)^3 visits$", process.output)


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
            first.read_until(b"is here")
            second.send(UPGRADE)
            first.read_until(b"is here")
            second.send(HELLO)
            assert first.read_until(b": hello")
            second.read_until(b": hello")
            second.send(b"\x88\x80\x00\x00\x00\x00")
            assert first.read_until(b"has left")
