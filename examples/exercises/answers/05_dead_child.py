"""Stop a child that may be dead: the answer. foal's own is Worker.stop and Worker.push.

Run:   python examples/exercises/answers/05_dead_child.py
"""

import subprocess
import sys

CRASH = "no_such_name"  # what a developer saves by mistake
GOOD = "import time; time.sleep(60)"  # stands for a server that serves


class Reloader:
    """Runs `code` in a child, and again when asked."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.start()

    def start(self) -> None:
        self.child = subprocess.Popen([sys.executable, "-c", self.code])

    def running(self) -> bool:
        return self.child.poll() is None

    def stop(self) -> None:
        """End the child, if it has not ended by itself."""
        self.child.terminate()  # asks first whether it is still there, and still ours
        self.child.wait()

    def reload(self, code: str) -> None:
        """The file was saved: out with the old child, in with a new one."""
        self.stop()
        self.code = code
        self.start()


def prove(reloader_class: type[Reloader]) -> None:
    """Raise AssertionError, or whatever comes up, unless this class works: a living
    child is stopped, a dead one is replaced, and the new one runs the new code."""
    alive = reloader_class(GOOD)
    alive.stop()
    assert not alive.running(), "a living child was not stopped"

    dead = reloader_class(CRASH)
    dead.child.wait()  # reaped: only now is its number free
    # An exit code tells the new child from the old one. running() would not: just after
    # the start it is true of a child that is about to die.
    dead.reload("raise SystemExit(7)")
    assert dead.child.wait() == 7, "the new child does not run the new code"


def main() -> None:
    reloader = Reloader(CRASH)
    print("the child died of its code, with", reloader.child.wait())
    print("the developer mends the file and saves it")
    reloader.reload(GOOD)
    print("the new child is running:", reloader.running())
    reloader.stop()


if __name__ == "__main__":
    main()
