"""The table of all answers, and on Windows the fact behind it."""

import asyncio
import itertools
import socket
import sys

import pytest

SYSTEMS = ("linux", "darwin", "win32")


def factory(exercise, name, platform, reload):
    return exercise.choose(name, platform=platform, reload=reload).factory


def test_a_reloading_server_on_windows_gets_no_completion_port(exercise):
    """uvicorn #529: the second child was deaf."""
    assert factory(exercise, "auto", "win32", True) == exercise.SELECTOR


def test_the_reason_names_the_completion_port(exercise):
    """It is printed at the start. Who asks why wants a fact, not "because of reload"."""
    reason = exercise.choose("auto", platform="win32", reload=True).reason
    assert "completion port" in reason and "\n" not in reason


def test_asking_for_what_cannot_work_is_refused_in_one_line(exercise):
    """Else the server starts, and is deaf from the second save on."""
    with pytest.raises(ValueError) as refused:
        exercise.choose("proactor", platform="win32", reload=True)
    assert "--loop" in str(refused.value) and "\n" not in str(refused.value)


def test_without_reload_windows_keeps_its_proactor(exercise):
    """The price of the selector there: 512 sockets, no subprocesses (uvicorn #786)."""
    for name in ("auto", "proactor"):
        assert factory(exercise, name, "win32", False) == exercise.PROACTOR


def test_elsewhere_nothing_changes(exercise):
    for platform, reload in itertools.product(SYSTEMS[:2], (False, True)):
        assert factory(exercise, "auto", platform, reload) == exercise.SELECTOR
        with pytest.raises(ValueError, match="Windows only"):
            exercise.choose("proactor", platform=platform, reload=reload)


def test_who_asks_for_the_selector_gets_it(exercise):
    for platform, reload in itertools.product(SYSTEMS, (False, True)):
        assert factory(exercise, "selector", platform, reload) == exercise.SELECTOR


async def accept_one(listener):
    """Accept once: this is what ties a listener to the loop's completion port."""
    with socket.create_connection(listener.getsockname()):
        (await asyncio.get_running_loop().sock_accept(listener))[0].close()


@pytest.mark.skipif(sys.platform != "win32", reason="no completion ports elsewhere")
def test_the_second_loop_can_accept_too(exercise):
    """uvicorn #529, for real: a child, the child after it, and one listener."""
    chosen = factory(exercise, "auto", sys.platform, True).partition(":")[2]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        for _ in range(2):
            with asyncio.Runner(loop_factory=getattr(asyncio, chosen)) as runner:
                runner.run(accept_one(listener))
