"""The address that is shown is the one that answers, in both modes."""

import socket
from urllib.parse import urlsplit

import pytest


def check(listener: socket.socket, shown: str) -> None:
    """Do as a user does who copies the address into a client."""
    url = urlsplit(shown)
    with listener:
        assert url.scheme == "http"
        assert url.port == listener.getsockname()[1], f"{shown} is somewhere else"
        socket.create_connection((url.hostname, url.port), timeout=20).close()


def test_with_port_zero_the_address_shown_answers(exercise):
    """uvicorn #974."""
    listener, shown = exercise.open_tcp("127.0.0.1", 0)
    check(listener, shown)


def test_with_a_port_of_its_own_the_address_shown_answers(exercise):
    with socket.create_server(("127.0.0.1", 0)) as other:
        free = other.getsockname()[1]
    listener, shown = exercise.open_tcp("127.0.0.1", free)
    check(listener, shown)


def test_an_inherited_socket_shows_its_own_address(exercise):
    """uvicorn #1890: the same mistake, two years later, in the other place."""
    with socket.socket() as given:
        given.bind(("127.0.0.1", 0))
        listener, shown = exercise.open_inherited(given.detach(), "127.0.0.1", 8000)
    check(listener, shown)


def test_an_ipv6_address_stands_in_brackets(exercise):
    """RFC 3986 §3.2.2: else who could tell the port's colon from the address's?"""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as exc:
        pytest.skip(f"no IPv6 here: {exc}")
    listener, shown = exercise.open_tcp("::1", 0)
    assert shown.startswith("http://[::1]:")
    check(listener, shown)


def test_one_function_describes_a_listener(exercise):
    """Given nothing but the listener, so that it cannot be told a wrong address."""
    assert hasattr(exercise, "describe"), "step 2: describe(listener) -> str"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        expected = "http://127.0.0.1:%d" % listener.getsockname()[1]
        assert exercise.describe(listener) == expected
