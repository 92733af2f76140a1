"""Did a file change? `look` and `changed` are yours to write; the rest is foal's.

Run:   python examples/exercises/10_watcher/start.py     (watches the current folder)
"""

import glob
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import reload


class Watcher(reload.Watcher):
    """Answers "did a file change?", and is cheap enough to be asked often.

    From reload.Watcher come __init__, which sets `folders`, `delay` (seconds), `pending`
    (an empty set) and `files` (the first look), and `walk(folder)`, which yields an
    os.DirEntry for each file to watch.
    """

    def changed(self) -> str:
        """Which files changed since the last answer, as a reason to show, or "".

        Quick saves are one change: the answer waits for a look that finds no more.
        """
        before, self.files = self.files, self.look()
        for path, time_of_change in self.files.items():
            if time_of_change > before.get(path, 0):
                return f"changed: {reload.shown(path)}"
        return ""

    def look(self) -> dict:
        """Every watched file, with what changes when it is written or replaced. Sets
        `next_look`: the time.monotonic() before which `changed` takes no other look."""
        self.next_look = time.monotonic()
        found = {}
        for folder in self.folders:
            for path in glob.glob(os.path.join(folder, "*.py")):
                found[path] = os.stat(path).st_mtime
        return found


def main() -> None:
    watcher = Watcher(["."])
    print("watching; save a file, rename one, delete one (Ctrl-C ends it)")
    while True:
        if reason := watcher.changed():
            print(reason)
        time.sleep(0.1)


if __name__ == "__main__":
    main()
