"""examples/trace.py: five conversations, as it shows them.

The files in traces/ are such tables, with a reason beside what a specification decides.
They read as an introduction, too. Times, ports and dates are masked. The order of the
rest is fixed, because each client waits for the bytes that it says it waits for.
"""

import re

import pytest
from apps import CONTINUE, EXPECT, get
from conftest import ROOT, Process
from frames import CLOSE, TEXT, handshake, quick_frame

APP = """
async def app(scope, receive, send):
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})
        return
    body, half = scope["path"].encode(), scope["path"] == "/half"
    if scope["method"] == "POST" or half:
        body = (await receive())["body"]
    length = [] if half else [(b"Content-Length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    if scope["path"] == "/error":
        raise KeyError("oops")
    if half:
        await send({"type": "http.response.body", "body": b"one, ", "more_body": True})
        await receive()  # until the client says that it sends no more
        body = b"two"
    await send({"type": "http.response.body", "body": body})
"""
HELLO, BYE = quick_frame(TEXT, b"hello"), quick_frame(CLOSE, b"\x03\xe8")
CONVERSATIONS = {  # what the client sends, and then waits for; at last it half-closes
    "pipelining": [(get(b"/one") + get(b"/two"), b"/two")],
    "expect_100_continue": [(EXPECT, CONTINUE), (b"hello", b"hello")],
    "half_closed": [(get(b"/half"), b"one, \r\n")],
    "app_error": [(get(b"/error"), b"500 Internal Server Error\n")],
    "websocket": [(handshake("GET /chat HTTP/1.1"), b"\r\n\r\n"), (HELLO, b"hello")]
    + [(BYE, b"\x03\xe8")],
}


class Traced(Process):
    script = ROOT / "examples" / "trace.py"


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_shown_in_order(name, tmp_path):
    """What a reader has checked against the specifications, and written down."""
    (tmp_path / "several.py").write_text(APP)
    with Traced("several:app", "--port", 0, cwd=tmp_path) as process:
        with process.connect(process.port()) as client:
            for said, answer in CONVERSATIONS[name]:
                client.send(said)
                client.read_until(answer)
            client.half_close()
            client.read_all()
        process.wait_for("connection_lost")
    rows = re.findall(r"(?m)^(?:\d+\.\d+  |-- connection).*", process.output)
    table = re.sub(r"(?m)^(\d+\.\d+ +)[\d,]+  ", r"\g<1>#  ", "\n".join(rows))
    table = re.sub(r" +#", "  #", re.sub(r"127.0.0.1:\d+", "127.0.0.1:#", table))
    table = re.sub(r"Date: [\w, :]*", "Date: #", table)
    text = (ROOT / "tests" / "traces" / f"{name}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert table.splitlines() == lines


def test_workers_cannot_be_traced():
    with Traced("example:app", "--workers", 2) as process:
        assert process.exit_code() == 1
    assert process.output == "trace.py traces one process: leave out --workers and --reload"
