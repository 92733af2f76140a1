"""Did a file change?

Owns: which files are watched, what counts as a change, when a series of saves is over.
Must not know: processes, who asks, or what a change is good for.

Read beside: Python docs, os.scandir, os.stat_result; fnmatch.

The bug that shaped it: include and exclude patterns that silently did nothing (uvicorn
    #1265, #2166), because files were listed by one mechanism and matched by another.
    Here one walk decides both, and a test renames, deletes and excludes.

But: it looks, four times a second; it is not told. A look at 20,000 files takes about
0.1 s, so it then looks less often: no more than a tenth of one core in the long run.
"""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Iterator, Sequence

# Folders in which nobody edits code, and which may hold more files than all others. A
# virtual environment is known by its pyvenv.cfg, and hidden folders by their dot.
SKIPPED = {"__pycache__", "node_modules", "site-packages"}
IDLE_SHARE = 10  # a look that took t seconds is followed by this many t of rest


class Watcher:
    """Answers "did a file change?", and is cheap enough to be asked often."""

    def __init__(
        self,
        folders: Sequence[str],
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        *,
        delay: float = 0.25,  # seconds between two looks, at least
    ) -> None:
        self.folders = [os.path.abspath(folder) for folder in folders]
        self.include = ["*.py", *include]
        self.exclude = exclude
        self.delay = delay
        self.pending: set[str] = set()  # changed, but perhaps not for the last time
        self.files = self.look()

    def changed(self) -> str:
        """Which files changed since the last answer, as a reason to show, or "".

        Quick saves are one change: the answer waits for a look that finds no more.
        """
        if time.monotonic() < self.next_look:
            return ""
        before, self.files = self.files, self.look()
        now = {path for path, _ in self.files.items() ^ before.items()}
        self.pending |= now
        if now or not self.pending:
            return ""
        names = sorted(map(shown, self.pending))
        self.pending = set()
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"changed: {', '.join(names[:3])}{more}"

    def look(self) -> dict[str, tuple[int, int, int]]:
        """Every watched file, with what changes when it is written or replaced."""
        started = time.monotonic()
        found = {}
        for folder in self.folders:
            for entry in self.walk(folder):
                try:
                    stat = entry.stat()
                except OSError:
                    continue  # gone since we listed it: the next look will not list it
                found[entry.path] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        now = time.monotonic()
        self.next_look = now + max(self.delay, IDLE_SHARE * (now - started))
        return found

    def walk(self, top: str) -> Iterator[os.DirEntry]:
        """The watched files below a folder. Links to folders are not followed: they may
        lead in circles."""
        folders, base = [top], len(os.path.join(top, ""))
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as listing:
                    entries = list(listing)
            except OSError:
                continue  # deleted, or not ours to read
            # The watched folder itself holds the code, whatever else it is.
            if folder != top and any(entry.name == "pyvenv.cfg" for entry in entries):
                continue
            for entry in entries:
                names = (entry.name, entry.path[base:])
                if matches(names, self.exclude):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in SKIPPED and not entry.name.startswith("."):
                        folders.append(entry.path)
                elif matches(names, self.include):
                    yield entry


def matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Does a name, or a path below the watched folder, match one of the patterns?"""
    return any(fnmatch.fnmatch(name, p) for name in names for p in patterns)


def shown(path: str) -> str:
    """A path as short as it can be: there is no relative one between two drives."""
    try:
        return os.path.relpath(path)
    except (ValueError, OSError):
        return path
