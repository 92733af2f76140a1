"""Hello in two messages: first to a client, then without any server at all."""

import asyncio

import pytest
from foal_tools import GET, serving

GREETING = "Grüezi, world!\n"


@pytest.fixture(scope="module")
def answered(exercise):
    """(status, fields, body), as an HTTP client reads them."""
    with serving(exercise.app) as running, running.connect() as client:
        client.send(GET)
        return client.response()


def test_the_status_is_200(answered):
    status, _, body = answered
    assert status == 200, f"the server answered for the app: {status} {body}"


def test_the_body_is_the_greeting(answered):
    assert answered[2] == GREETING.encode()


def test_the_client_can_tell_how_to_read_it(answered):
    """RFC 9110 §8.3: a media type, and for text in which bytes its letters are."""
    status, fields, _ = answered
    assert (status, fields.get("content-type")) == (200, "text/plain; charset=utf-8")


def test_the_length_counts_bytes(answered):
    """RFC 9110 §8.6. The greeting has 15 characters; UTF-8 makes 16 bytes of them."""
    assert answered[1].get("content-length") == "16"


def test_it_takes_two_messages(exercise):
    """What does the app say to a server? This is all that a server is to an app."""
    said = []

    async def receive():
        raise AssertionError("there is nothing to receive for a GET")

    async def send(message):
        said.append(message["type"])

    asyncio.run(exercise.app({"type": "http"}, receive, send))
    assert said == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_what_it_does_not_know_it_refuses(exercise, kind):
    """ASGI main, "Applications": an app should raise for a protocol it does not know."""
    with pytest.raises(NotImplementedError):
        asyncio.run(exercise.app({"type": kind}, None, None))
