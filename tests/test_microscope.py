"""The microscope: its page, and the rows that each of its buttons makes (test_trace)."""

import contextlib
import json
import re

import pytest
from apps import get
from conftest import GET, ROOT, Client, Process

PAGE = ROOT / "examples" / "microscope.html"
POST = b"POST /provoke/%s HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n"


class Microscope(Process):
    script = ROOT / "examples" / "microscope.py"


@pytest.fixture(scope="module")
def port():
    with Microscope("--port", 0) as process:
        yield process.port()


def ask(port, request):
    with Client(("127.0.0.1", port)) as client:
        client.send(request)
        return client.response()


@contextlib.contextmanager
def looking(port):
    """A page that looks: call it for the rows up to the end of the next connection."""
    with Client(("127.0.0.1", port)) as client:
        client.send(get(b"/events"))
        client.read_until(b": looking\n\n")

        def rows():
            data = client.read_until(b"connection_lost") + client.read_until(b"\n\n")
            return [json.loads(line) for line in re.findall(rb"(?m)^data: (.*)", data)]

        yield rows


def test_its_page_needs_nothing_else(port):
    status, fields, body = ask(port, GET)
    assert (status, fields["content-type"]) == (200, "text/html; charset=utf-8")
    assert body == PAGE.read_bytes()
    links = re.findall(rb"""(?:src|href|import|url)\s*[=(]\s*["']?([^"'\s)>]+)""", body)
    assert all(link.startswith((b"#", b"data:,")) for link in links)
    assert re.findall(rb"https?://\S+", body) == [b'http://www.w3.org/2000/svg"']


BUTTONS = {  # some of the rows that each of them makes, in this order
    "one": ["connection_made", "called: http /hello", "returns", "start_next_cycle"],
    "pipelined": ["data_received 123 B", *["Response 200", "start_next_cycle"] * 3],
    "slow": ["InformationalResponse 100", "Data 5 B", "Data 5 B", "Data 3 B"],
    "abandoned": ["called: http /stream", *["Data 5 B b'tick"] * 3, "connection_lost"],
    "error": ["raises ZeroDivisionError('on purpose')", "Response 500"],
    "websocket": ["websocket.send text='hello'", "websocket.disconnect code=1000"],
    "bad": ["raises RemoteProtocolError", "Response 400"],
}


@pytest.mark.parametrize("button", re.findall(r'<button name="(\w+)"', PAGE.read_text("utf-8")))
def test_a_button_makes_its_rows(port, button):
    with looking(port) as rows:
        assert ask(port, POST % button.encode())[0] == 200
        passed = iter(row["what"] for row in rows())
    for start in BUTTONS[button]:
        assert any(what.startswith(start) for what in passed), start


def test_a_row_names_its_function_and_its_step(port):
    with looking(port) as rows:
        ask(port, get(b"/hello"))
        found = {row["what"].split()[0]: (row["function"], row["step"]) for row in rows()}
    assert found["Request"][0] == "Connection.next_request"
    assert re.match(r"Life of a request, 3\. \S", found["Request"][1])
    places = [found[what][0] for what in ("called:", "http.response.start", "write")]
    assert places == ["Exchange.run", "Exchange.handle", "Wire.flush"]


def test_a_request_from_elsewhere_is_drawn_and_the_pages_own_are_not(port):
    with looking(port) as rows:
        ask(port, GET), ask(port, POST % b"nothing"), ask(port, get(b"/hello"))
        called = [row["what"] for row in rows() if row["layer"] == "app"]
    assert called == ["called: http /hello", "returns"]
