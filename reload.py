"""The application's code: import it, show its errors, and see when it changes.

Owns: how MODULE:ATTRIBUTE is found in a folder, what is said if it cannot be imported,
    which files are watched, what a change is, and when a series of saves is over.
Must not know: ASGI, processes, or what a change is good for.

Read beside: Python docs, "The import system" (sys.modules, namespace packages);
    traceback; os.scandir, os.stat_result; fnmatch.

The bug that shaped it: include and exclude patterns did nothing, without a word
    (uvicorn #1265, #2166), because one mechanism listed the files and another one
    matched them. Here one walk does both, and a test renames, deletes and excludes.

But: the watcher looks at the files four times a second, and less often if a look takes
long (20,000 files: 0.1 s). It uses at most a tenth of one core.
"""

from __future__ import annotations

import fnmatch
import importlib
import operator
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import machinery, util
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
# Our modules and their files. Their names are common, so an app may use them as well.
NAMES = ("server", "loops", "sockets", "workers", "reload")
OURS = {name: os.path.join(HERE, f"{name}.py") for name in NAMES}


def load(name: str, folder: str) -> Any:
    """Import MODULE:ATTRIBUTE from `folder`, or else from our examples/ folder. Raises
    ImportError with one sentence. Its cause is the exception of the app's own code."""
    if not re.fullmatch(r"(?!.*\.py:)[\w-]+(\.[\w-]+)*:\w+(\.\w+)*", name):
        raise ImportError(f'"{name}" is no MODULE:ATTRIBUTE (app in main.py: main:app)')
    module, _, attribute = name.partition(":")
    make_way(folder)
    sys.path.insert(0, folder)
    sys.path.append(os.path.join(HERE, "examples"))
    try:
        imported = importlib.import_module(module)
    # The module is foreign code and may raise anything. Ctrl-C is not an error of it.
    except (Exception, SystemExit) as exc:
        absent = exc.name if isinstance(exc, ModuleNotFoundError) else None
        # To import "a.b" Python needs "a" and "a.b". Others are missing in the app.
        if absent and f"{module}.".startswith(f"{absent}."):
            raise ImportError(f'no module "{absent}" in {folder} (--app-dir)') from None
        raise ImportError(f'cannot import "{module}": {sentence(exc, folder)}') from exc
    try:
        return operator.attrgetter(attribute)(imported)
    except AttributeError:
        file = shown(getattr(imported, "__file__", None) or folder)
        raise ImportError(f'"{module}" ({file}) has no "{attribute}"') from None


def make_way(folder: str) -> None:
    """Let the app find its own modules and packages that have one of our names. Ours
    are loaded and refer to each other as objects, so sys.modules can forget them."""
    for name, our_file in OURS.items():
        spec = machinery.PathFinder.find_spec(name, [folder])
        # The folder has no such module, or it is the folder of this server.
        if spec is None or spec.origin and os.path.samefile(spec.origin, our_file):
            continue
        # Take out ours, but not what an earlier call has imported.
        if getattr(sys.modules.get(name), "__file__", our_file) == our_file:
            sys.modules.pop(name, None)
            # A process that the app spawns imports its main module by this name again.
            if getattr(sys.modules["__main__"], "__file__", None) == our_file:
                sys.modules["__main__"] = type(sys)("__main__")  # an empty module
            # A package without __init__.py has no loader. Python would prefer our
            # module to it, because our folder is on sys.path as well.
            if spec.loader is None:
                sys.modules[name] = util.module_from_spec(spec)


def sentence(exc: BaseException, folder: str) -> str:
    """An exception for the sentence that follows its traceback."""
    kind, message, where = type(exc).__name__, " ".join(str(exc).split()), ""
    if isinstance(exc, SyntaxError) and exc.filename:
        return f"{kind} in {shown(exc.filename)}, line {exc.lineno}"
    for path, line, _, _ in traceback.extract_tb(exc.__traceback__):
        if path.startswith(folder) and "site-packages" not in path:
            # The last line of the app's own code says more than a library's.
            where = f" in {shown(path)}, line {line}"
    return f"{kind}: {message}".removesuffix(": ") + where


def app_traceback(exc: BaseException) -> str:
    """A traceback for the app's author: without our frames and importlib's above it."""
    above = (*OURS.values(), importlib.__file__, "<frozen importlib")
    trace = exc.__traceback__
    while trace and trace.tb_frame.f_code.co_filename.startswith(above):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(exc), exc, trace)).rstrip()


# Folders that hold no code that anybody edits, and perhaps very many files. A virtual
# environment is recognised by its pyvenv.cfg, and a hidden folder by its dot.
SKIPPED = {"__pycache__", "node_modules", "site-packages"}
IDLE_SHARE = 10  # after a look that took t seconds the watcher rests for ten times t


class Watcher:
    """Answers the question "did a file change?". It is cheap enough to ask it often."""

    def __init__(
        self,
        folders: Sequence[str],
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        *,
        delay: float = 0.25,  # seconds between two looks, at least
    ) -> None:
        self.folders = [os.path.abspath(folder) for folder in folders]
        self.include, self.exclude, self.delay = ["*.py", *include], exclude, delay
        # Files that have changed. Perhaps an editor is still saving more of them.
        self.pending: set[str] = set()
        self.files = self.look()

    def changed(self) -> str:
        """Which files changed since the last answer, as a reason to log, or "". Quick
        saves are one change: the answer waits for a look that finds nothing new."""
        if time.monotonic() < self.next_look:
            return ""
        before, self.files = self.files, self.look()
        now = {path for path, _ in self.files.items() ^ before.items()}
        self.pending |= now
        if now or not self.pending:
            return ""
        names, self.pending = sorted(map(shown, self.pending)), set()
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"changed: {', '.join(names[:3])}{more}"

    def look(self) -> dict[str, tuple[int, int, int]]:
        """Every watched file, with values that change if it is written or replaced."""
        started = time.monotonic()
        found = {}
        for folder in self.folders:
            for entry in self.walk(folder):
                # If a file was deleted since it was listed, it counts as deleted.
                with suppress(OSError):
                    stat = entry.stat()
                    found[entry.path] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        now = time.monotonic()
        self.next_look = now + max(self.delay, IDLE_SHARE * (now - started))
        return found

    def walk(self, top: str) -> Iterator[os.DirEntry]:
        """The watched files below a folder. Links to folders are not followed, because
        they may lead in circles."""
        folders, base = [top], len(os.path.join(top, ""))
        while folders:
            folder, entries = folders.pop(), []
            with suppress(OSError), os.scandir(folder) as listing:  # it may be gone
                entries = list(listing)
            # The watched folder itself is never skipped: it holds the code.
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
    """A path, relative to the current folder if that is shorter."""
    with suppress(ValueError, OSError):  # another drive, or a folder that was deleted
        return min(path, os.path.relpath(path), key=len)
    return path
