"""The parent's half is called as a function, the rest is run as a program."""

import re
import subprocess
import sys

import pytest
from foal_tools import PATIENCE, Client


def test_a_client_can_connect_before_there_is_a_worker(exercise):
    """uvicorn #683: the parent only bound, and its children raced to listen."""
    with exercise.open_listener() as listener:
        listener.settimeout(PATIENCE)
        try:
            with Client(listener.getsockname()):
                listener.accept()[0].close()
        except ConnectionRefusedError:
            raise AssertionError("no process listens yet") from None


@pytest.fixture
def address(exercise_path):
    """Where start.py listens; its input is closed at the end, and then it must end."""
    with subprocess.Popen(
        [sys.executable, str(exercise_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            line = process.stdout.readline()
            yield "127.0.0.1", int(re.search(r"listening on .*:(\d+)", line)[1])
            process.stdin.close()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


def ask_two(address) -> set[bytes]:
    """Who answers? A worker holds one client at a time, so it takes two for both."""
    try:
        with Client(address) as first, Client(address) as second:
            return {client.read_until(b"\n") for client in (first, second)}
    except OSError as exc:
        raise AssertionError(f"no worker answers: {exc}") from None


def test_two_workers_answer_on_one_port(address):
    """uvicorn #683: of two workers, one died; here both do."""
    assert len(ask_two(address)) == 2


def test_they_go_on_to_the_next_client(address):
    first = ask_two(address)
    assert ask_two(address) == first
