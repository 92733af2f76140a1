"""Lift chapters 8 and 9 of server.py into a file of their own, websocket.py. As
it is, it cuts the text in two, and neither half runs.

Run:   python examples/exercises/12_two_files/start.py /tmp/split
       cd /tmp/split, and there: python server.py ws_echo:app
                                 python -m pytest tests/test_frames.py
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "server.py").exists())
FILES = ("*.py", "*.toml", "README.md", "tests/*", "tests/traces/*", "examples/*.py")


def lift(text: str) -> tuple[str, str]:
    """From the text of server.py: the new server.py, and websocket.py."""
    return cut(text)


def cut(text: str) -> tuple[str, str]:
    """Everything up to chapter 7; chapters 8 and 9, which are the last."""
    start = re.search(r"(?m)^# ─+ 8\. .* ──$", text).start()
    return text[:start], text[start:]


def make_copy(folder: Path) -> None:
    """A copy of foal, with the lifted file; the original stays as it is."""
    for source in (path for pattern in FILES for path in ROOT.glob(pattern)):
        if source.is_file():
            target = folder / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    texts = lift((ROOT / "server.py").read_text(encoding="utf-8"))
    for name, text in zip(("server.py", "websocket.py"), texts, strict=True):
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    make_copy(Path(sys.argv[1]))
