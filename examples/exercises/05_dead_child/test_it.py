"""Stop what may be dead, and prove it: first the class is tested, then your test is."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from foal_tools import PATIENCE

children: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Whatever a test, or your `prove`, does: no child outlives it."""
    yield
    while children:
        with children.pop() as child:
            child.kill()


def recorded(base):
    """The same class, whose children are known to the fixture above."""

    class Recorded(base):
        def start(self):
            super().start()
            children.append(self.child)

    return Recorded


@pytest.fixture
def reloader_class(exercise):
    return recorded(exercise.Reloader)


def test_a_living_child_can_be_stopped(reloader_class, exercise):
    reloader = reloader_class(exercise.GOOD)
    assert reloader.running()
    reloader.stop()
    assert not reloader.running()


def test_a_child_that_died_can_be_replaced(reloader_class, exercise):
    """uvicorn #684: the parent died of it."""
    reloader = reloader_class(exercise.CRASH)
    assert reloader.child.wait(PATIENCE) == 1
    reloader.reload("raise SystemExit(7)")
    assert reloader.child.wait(PATIENCE) == 7, "that is another child"


def test_a_child_can_be_stopped_twice(reloader_class, exercise):
    reloader = reloader_class(exercise.GOOD)
    reloader.stop()
    reloader.stop()


def test_nobody_else_is_hit(reloader_class, exercise):
    """The child is dead, and the system has given its number to another process."""
    reloader = reloader_class(exercise.CRASH)
    reloader.child.wait(PATIENCE)
    command = [sys.executable, "-c", "input(); raise SystemExit(7)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as bystander:
        reloader.child.pid = bystander.pid
        with contextlib.suppress(OSError):  # what we ask is whom it hits
            reloader.stop()
        with contextlib.suppress(OSError):
            bystander.communicate(b"\n", PATIENCE)
        assert bystander.returncode == 7, "a process that is not ours was ended"


# From here on it is `prove` that is tested: it accepts what works, and nothing else.


def test_the_proof_accepts_your_class(exercise, reloader_class):
    exercise.prove(reloader_class)


def test_the_proof_accepts_a_rougher_class(exercise):
    """kill() instead of terminate(): less polite, and no mistake."""

    class Rough(exercise.Reloader):
        def stop(self):
            self.child.kill()
            self.child.wait()

    exercise.prove(recorded(Rough))


def by_number(self):
    """uvicorn #684, put back."""
    os.kill(self.child.pid, signal.SIGTERM)
    self.child.wait()


def not_at_all(self):
    """A dead child is no problem: nothing is ever stopped."""


def only_the_dead(self):
    if self.child.poll() is not None:
        self.child.wait()


def stop_and_stay(self, code):
    """Stops, and does not start again."""
    self.stop()
    self.code = code


def keep_the_old_code(self, code):
    self.stop()
    self.start()


WRONG = {
    "stop by number": {"stop": by_number},
    "stop nothing": {"stop": not_at_all},
    "stop only the dead": {"stop": only_the_dead},
    "no new child": {"reload": stop_and_stay},
    "the old code again": {"reload": keep_the_old_code},
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_proof_finds_the_mistake(exercise, mistake):
    class Right(exercise.Reloader):
        def stop(self):
            self.child.terminate()
            self.child.wait()

    wrong = recorded(type("Wrong", (Right,), WRONG[mistake]))
    with pytest.raises((AssertionError, OSError)):
        exercise.prove(wrong)
