"""Change one line of a copy of foal, and see the test that TEACHER.md names turn red.

Run:   python examples/exercises/mutate.py             (every row of its table)
       python examples/exercises/mutate.py loops       (rows whose first cell says so)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# To know that a test fails, and not why: then pytest need not rewrite each assert.
OPTIONS = ["-q", "-x", "-p", "no:cacheprovider", "--assert=plain"]
ROW = re.compile(r"\| `(\w+\.py)`( \d)? \| `(.+?)` \| `(.+?)` \| `(tests/\S+)` \|")


class Mutation(NamedTuple):
    file: str
    chapter: str
    old: str  # one line, without its indentation
    new: str
    test: str  # as pytest names it

    def __str__(self) -> str:
        return f"{self.file}{self.chapter}: {self.old}"


def table() -> list[Mutation]:
    """The rows of TEACHER.md."""
    text = (HERE / "TEACHER.md").read_text(encoding="utf-8")
    return [Mutation(*(cell or "" for cell in row)) for row in ROW.findall(text)]


def copy_to(folder: Path) -> None:
    """The project, as far as its tests need it."""
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md"]:
        shutil.copy(path, folder)
    for name in ("tests", "examples"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)


def pytest(folder: Path, tests: Sequence[str]) -> subprocess.CompletedProcess:
    """Run tests of the copy. Without compiled files: two versions of a module can have
    the same size, and the same time."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, *tests],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        errors="replace",
    )


def mutate(folder: Path, mutation: Mutation) -> str:
    """Apply one mutation to the copy, run its test, take the mutation back. Returns what
    is wrong with the row, or "" if the test has seen it."""
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    places = [n for n, line in enumerate(lines) if line.strip() == mutation.old]
    if len(places) != 1:
        return (
            f"{mutation.file} has {len(places)} lines `{mutation.old}`: "
            "update that row of examples/exercises/TEACHER.md"
        )
    indent = lines[places[0]].partition(mutation.old)[0]
    lines[places[0]] = indent + mutation.new
    path.write_text("\n".join(lines), encoding="utf-8")
    try:
        done = pytest(folder, [mutation.test])
    finally:
        path.write_text(text, encoding="utf-8")
    if done.returncode == 0:
        return f"{mutation.test} does not see it"
    if done.returncode != 1:  # 1: tests failed; else it is not there, or is broken
        return f"{mutation.test} cannot be run:\n{done.stdout}{done.stderr}"
    return ""


def main() -> int:
    rows = [row for row in table() if all(word in str(row) for word in sys.argv[1:])]
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        copy_to(Path(name))
        for row in rows:
            wrong = mutate(Path(name), row)
            bad += bool(wrong)
            print(f"{row}\n    -> {row.new}\n    {wrong or 'seen by ' + row.test}")
    print(f"{len(rows)} mutations, {bad} not seen")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
