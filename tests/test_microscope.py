"""The microscope: the page, and what each of its buttons makes pass, as the page is told.

The rows themselves are test_trace's business: here they arrive, those of the connections
that are looked at and of no other.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading

import h11
import pytest
from conftest import GET, PATIENCE, ROOT, Client, Process, serving

import microscope

POST = b"POST /provoke/%s HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n"
EVENTS = GET.replace(b"/", b"/events", 1)


@pytest.fixture(scope="module")
def port():
    with Process("microscope:app", "--port", 0, "--trace") as process:
        yield process.port()


@contextlib.contextmanager
def looking(port):
    """A page that looks: call it for the rows up to the end of the next connection."""
    with Client(("127.0.0.1", port)) as client:
        client.send(EVENTS)
        client.read_until(b": looking\n\n")

        def rows():
            found = []
            while not found or not any(r["what"].startswith("connection_lost") for r in found):
                client.read_until(b"data: ")
                found.append(json.loads(client.read_until(b"\n\n")))
            return found

        yield rows


def press(port, button):
    with Client(("127.0.0.1", port)) as client:
        client.send(POST % button.encode())
        return client.response()[0]


def layer(rows, name):
    return [row["what"] for row in rows if row["layer"] == name]


class TestThePage:
    def test_it_is_served_and_needs_nothing_else(self, port):
        with Client(("127.0.0.1", port)) as client:
            client.send(GET)
            status, fields, body = client.response()
        assert (status, fields["content-type"]) == (200, "text/html; charset=utf-8")
        assert body == (ROOT / "examples" / "microscope.html").read_bytes()
        addresses = re.findall(rb"""(?:src|href|import|url)\s*[=(]\s*["']?([^"'\s)>]+)""", body)
        assert {a for a in addresses if not a.startswith((b"#", b"data:,"))} == set()
        assert re.findall(rb"https?://\S+", body) == [b'http://www.w3.org/2000/svg"']

    def test_each_button_has_its_conversation_and_each_conversation_a_button(self):
        page = (ROOT / "examples" / "microscope.html").read_text(encoding="utf-8")
        assert re.findall(r'<button name="(\w+)"', page) == list(microscope.TALKS)

    def test_its_picture_has_every_state_of_h11(self):
        page = (ROOT / "examples" / "microscope.html").read_text(encoding="utf-8")
        listed = re.search(r"const STATES = \[(.*?)\]", page, re.DOTALL)[1]
        names = "IDLE SEND_RESPONSE SEND_BODY DONE MUST_CLOSE CLOSED ERROR".split()
        names += ["MIGHT_SWITCH_PROTOCOL", "SWITCHED_PROTOCOL"]
        assert sorted(re.findall(r'"(\w+)"', listed)) == sorted(names)
        assert {str(getattr(h11, name)) for name in names} == set(names)

    def test_without_trace_it_says_so(self):
        with Process("microscope:app", "--port", 0) as process:
            with process.connect(process.port()) as client:
                client.send(EVENTS)
                assert b"event: off\ndata: This server does not trace." in client.response()[2]


class TestTheButtons:
    """A POST comes back when the conversation is over; its rows come as events."""

    @pytest.fixture
    def pressed(self, port):
        def press_it(button):
            with looking(port) as rows:
                assert press(port, button) == 200
                return rows()

        return press_it

    def test_one_request_goes_round(self, pressed):
        rows = pressed("one")
        assert layer(rows, "app") == ["called: http /hello", "returns"]
        assert "start_next_cycle" in layer(rows, "h11")
        assert rows[0]["what"].startswith("connection_made")

    def test_pipelined_requests_arrive_at_once_and_are_answered_in_turn(self, pressed):
        rows = pressed("pipelined")
        came = [what for what in layer(rows, "wire") if what.startswith("data_received")]
        assert len(came) == 1 and came[0].count("GET /hello") == 3
        answers = [r["request"] for r in rows if r["what"].startswith("Response 200")]
        assert answers == [1, 2, 3]

    def test_a_slow_body_is_asked_for_and_comes_in_pieces(self, pressed):
        rows = pressed("slow")
        events = layer(rows, "h11")
        assert "InformationalResponse 100" in events
        came = [what.split(" ", 3)[3] for what in events if what.startswith("Data ")]
        assert came[:3] == ["b'one, '", "b'two, '", "b'end'"]
        assert layer(rows, "ASGI").count("receive()") == 3

    def test_an_abandoned_stream_is_sent_until_the_client_is_missed(self, pressed):
        rows = pressed("abandoned")
        assert layer(rows, "app") == ["called: http /stream"]
        ticks = [what for what in layer(rows, "h11") if what == r"Data 5 B b'tick\n'"]
        assert len(ticks) >= 3
        assert rows[-1]["what"].startswith("connection_lost")

    def test_an_app_error_is_a_500(self, pressed):
        rows = pressed("error")
        raised = "raises ZeroDivisionError('on purpose')"
        assert layer(rows, "app") == ["called: http /error", raised]
        assert "Response 500" in layer(rows, "h11")

    def test_a_websocket_is_echoed_and_closed(self, pressed):
        rows = pressed("websocket")
        assert rows[-1]["states"] == ["SWITCHED_PROTOCOL", "SWITCHED_PROTOCOL"]
        assert "websocket.send text='hello'" in layer(rows, "ASGI")
        assert "websocket.disconnect code=1000 reason=''" in layer(rows, "ASGI")

    def test_a_bad_request_is_an_error_of_the_clients(self, pressed):
        rows = pressed("bad")
        assert ["IDLE", "ERROR"] in [row["states"] for row in rows]
        assert "Response 400" in layer(rows, "h11")
        assert layer(rows, "app") == []

    def test_there_is_no_other(self, port):
        assert press(port, "everything") == 404


def test_a_request_from_elsewhere_is_drawn_and_the_pages_own_are_not(port):
    with looking(port) as rows:
        for request in (GET, POST % b"nothing", GET.replace(b"/", b"/hello", 1)):
            with Client(("127.0.0.1", port)) as client:
                client.send(request)
                client.response()
        found = rows()
        assert layer(found, "app") == ["called: http /hello", "returns"]
        assert len({row["connection"] for row in found}) == 1


def test_a_page_that_is_closed_listens_no_more():
    """Else every page that was ever open would cost the server a little, for ever."""
    listeners, ended = [], threading.Event()

    async def app(scope, receive, send):
        if scope["type"] == "http":
            listeners.append(scope["extensions"]["foal.trace"]["listeners"])
        await microscope.app(scope, receive, send)
        ended.set()

    with serving(app, trace=True) as running:
        with running.connect() as client:
            client.send(EVENTS)
            client.read_until(b": looking\n\n")
            assert len(listeners[0]) == 2
        assert ended.wait(PATIENCE)
        assert len(listeners[0]) == 1
