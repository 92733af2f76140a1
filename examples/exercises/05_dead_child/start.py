"""A reloader in thirty lines: it runs some code in a child, and replaces the child.

Run:   python examples/exercises/05_dead_child/start.py     (the parent dies)
"""

import os
import signal
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
        os.kill(self.child.pid, signal.SIGTERM)
        self.child.wait()

    def reload(self, code: str) -> None:
        """The file was saved: stop the old child, start a new one."""
        self.stop()
        self.code = code
        self.start()


def prove(reloader_class: type[Reloader]) -> None:
    """Raise AssertionError, or any other exception, unless this class works: a living
    child is stopped, a dead one is replaced, and the new one runs the new code."""


def main() -> None:
    reloader = Reloader(CRASH)
    print("the child died of its code, with", reloader.child.wait())
    print("the developer mends the file and saves it")
    reloader.reload(GOOD)
    print("the new child is running:", reloader.running())
    reloader.stop()


if __name__ == "__main__":
    main()
