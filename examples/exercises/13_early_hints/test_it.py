"""What the client reads, and when: foal in a thread, with your Exchange in place of its
own, and a client that is this test."""

import asyncio

import foal_tools
import pytest
from foal_tools import GET

import server

DEADLINE = 3.0  # seconds; only a server that says nothing takes so long
HINT = "http.response.early_hint"
LINK = b"</style.css>; rel=preload"
HEAD_END = b"\r\n\r\n"
END = {"type": "http.response.body"}
POST = GET.replace(b"GET", b"POST").replace(HEAD_END, b"\r\nContent-Length: 5\r\n")


def hint(*links):
    return {"type": HINT, "links": links}


def start(*fields):
    return {"type": "http.response.start", "status": 200, "headers": fields}


@pytest.fixture
def serving(exercise, monkeypatch):
    """foal serves an app, with the exercise's Exchange."""
    monkeypatch.setattr(server, "Exchange", exercise.HintingExchange)
    monkeypatch.setattr(foal_tools, "PATIENCE", DEADLINE)
    return lambda app: foal_tools.serving(app, lifespan="off")


def saying(*messages):
    """An app that sends these, and notes what was refused, for example at 0."""

    async def app(scope, receive, send):
        app.extensions = scope["extensions"]
        for place, message in enumerate(messages):
            try:
                await send(message)
            except Exception as exc:
                app.refused[place] = type(exc)

    app.refused = {}
    return app


def heads(data: bytes) -> list[int]:
    """The status of each head in it."""
    return [int(line.split()[1]) for line in data.split(b"\r\n") if line[:5] == b"HTTP/"]


def test_an_app_that_says_no_hints_is_served_as_before(serving):
    with serving(saying(start(), END)) as running:
        assert heads(running.talk(GET + GET)) == [200, 200]


def test_the_app_is_told_that_it_may(serving):
    """ASGI, "Extensions": the app looks into its scope before it uses one."""
    app = saying(start(), END)
    with serving(app) as running:
        running.talk(GET)
    assert app.extensions.get(HINT) == {}


def test_a_hint_is_a_head_of_its_own(serving):
    with serving(saying(hint(LINK, b"</x.js>"), start(), END)) as running:
        data = running.talk(GET)
    first, second = data.split(HEAD_END)[:2]
    assert (heads(first), heads(second)) == ([103], [200])
    assert first.lower().split(b"\r\n")[1:] == [b"link: " + LINK, b"link: </x.js>"]


def test_there_may_be_several(serving):
    with serving(saying(hint(LINK), hint(LINK), start(), END)) as running:
        assert heads(running.talk(GET)) == [103, 103, 200]


def test_it_arrives_before_the_answer_is_made(serving):
    """Else it is of no use: this client sends its body when it has read the hint."""

    async def app(scope, receive, send):
        await send(hint(LINK))
        await receive()
        await saying(start(), END)(scope, receive, send)

    with serving(app) as running, running.connect() as client:
        client.send(POST + b"\r\n")
        assert heads(client.read_until(HEAD_END)) == [103]
        client.send(b"hello")
        assert client.response()[0] == 200


def test_it_may_come_while_the_head_is_held_back(serving):
    """After http.response.start nothing has been sent yet."""
    app = saying(start((b"X-A", b"1")), hint(LINK), END)
    with serving(app) as running:
        assert heads(running.talk(GET)) == [103, 200]
    assert app.refused == {}


def test_a_late_one_is_the_apps_mistake_and_breaks_nothing(serving):
    part = {"type": "http.response.body", "body": b"one", "more_body": True}
    app = saying(start(), part, hint(LINK), END, hint(LINK))
    with serving(app) as running:
        assert heads(running.talk(GET + GET)) == [200, 200]
    assert set(app.refused) == {2, 4} and app.refused[2] is RuntimeError


def test_it_is_not_put_before_the_answer_to_the_next_request(serving):
    """What if the app goes on after its answer? h11 is at the next request then."""
    next_one, refused = asyncio.Event(), []

    async def app(scope, receive, send):
        if scope["path"] == "/next":
            next_one.set()
            while not refused:
                await asyncio.sleep(0.01)
        await saying(start(), END)(scope, receive, send)
        if scope["path"] == "/":
            await next_one.wait()
            late = saying(hint(LINK))
            await late(scope, receive, send)
            refused.append(late.refused)

    with serving(app) as running:
        assert heads(running.talk(GET + GET.replace(b"/", b"/next", 1))) == [200, 200]
    assert len(refused[0]) == 1


def test_http_1_0_has_no_informational_responses(serving):
    """RFC 9110 §15.2. So the app is not told that it may."""
    app = saying(hint(LINK), start(), END)
    with serving(app) as running:
        assert heads(running.talk(GET.replace(b"1.1", b"1.0"))) == [200]
    assert HINT not in app.extensions and set(app.refused) == {0}


@pytest.mark.parametrize("link", ["</text>", b"</x>\r\nX-Evil: 1", 1])
def test_a_link_that_is_none_is_refused(serving, link):
    """ASGI wants byte strings; and no field may hide another."""
    app = saying(hint(link), start(), END)
    with serving(app) as running:
        assert heads(running.talk(GET)) == [200]
    assert set(app.refused) == {0}


def test_a_client_that_waits_for_100_is_still_asked(serving):
    """RFC 9110 §10.1.1: it waits for 100, or for the answer. A hint is neither."""

    async def app(scope, receive, send):
        await send(hint(LINK))
        assert (await receive())["body"] == b"hello"
        await saying(start(), END)(scope, receive, send)

    with serving(app) as running, running.connect() as client:
        client.send(POST + b"Expect: 100-continue\r\n\r\n")
        assert heads(client.read_until(HEAD_END)) == [103]
        assert heads(client.read_until(HEAD_END)) == [100]
        client.send(b"hello")
        assert client.response()[0] == 200


def test_a_hint_does_not_ask_for_the_body(serving):
    with serving(saying(hint(LINK), start(), END)) as running, running.connect() as client:
        client.send(POST + b"Expect: 100-continue\r\n\r\n")
        assert heads(client.read_until(HEAD_END)) == [103]
        assert heads(client.read_until(HEAD_END)) == [200]
