"""Lift chapters 8 and 9 of server.py into a file of their own, websocket.py.
The answer: it asks the text itself which half needs what of the other, and so it goes
on working while server.py changes.

Run:   python examples/exercises/answers/12_two_files.py /tmp/split
       cd /tmp/split, and there: python server.py ws_echo:app
                                 python -m pytest tests/test_frames.py
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "server.py").exists())
FILES = ("*.py", "*.toml", "README.md", "tests/*", "tests/traces/*", "examples/*.py")

OPENING = '''"""One WebSocket: from the accept to the last Close, and its frames.

Owns: what chapters 8 and 9 of server.py owned.
Must not know: how its connection was made, or which other clients are served.

Read beside: RFC 6455; ASGI www, "WebSocket".

The bug that shaped it: server.py needs this file, and this file needs the base class of
    WebSocket from server.py, which has three names while it runs (__main__,
    __mp_main__, server). Only the last of them imports us, below all its definitions.
"""

from __future__ import annotations

'''


def lift(text: str) -> tuple[str, str]:
    """From the text of server.py: the new server.py, and websocket.py."""
    before, lifted = cut(text)
    websocket = OPENING + needs(before, lifted) + "\n" + lifted.rstrip() + "\n"
    before = without_chapters(before)
    before = without_imports(before, used_names(before))
    return before.rstrip() + "\n" + give_back(lifted), websocket


def cut(text: str) -> tuple[str, str]:
    """Everything up to chapter 7; chapters 8 and 9, which are the last."""
    start = re.search(r"(?m)^# ─+ 8\. .* ──$", text).start()
    return text[:start], text[start:]


def needs(before: str, lifted: str) -> str:
    """The imports of the new file: of what it says without having defined it."""
    used, lines = used_names(lifted), []
    for node in imports(before):
        kept = [alias for alias in node.names if bound(alias) in used]
        if kept and getattr(node, "module", "") != "__future__":
            node.names = kept
            apart = "\n" if kept[0].name == "h11" else ""
            lines.append(apart + ast.unparse(node))
    names = [name for name in defined_names(before) if name in used]
    ours = import_from("server", names) if names else ""
    return "\n".join(lines) + "\n\n" + ours


def give_back(lifted: str) -> str:
    """The end of server.py: the names that it has lost, and that others ask it for."""
    lines = textwrap.indent(
        import_from("websocket", defined_names(lifted)), "    "
    )
    return (
        '\nif __name__ == "server":\n'
        "    # Not as __main__ or __mp_main__: the file that we import would import\n"
        "    # the twin, and that one would meet it half made.\n" + lines
    )


def without_chapters(before: str) -> str:
    """The list of contents, without the two that have gone."""
    return re.sub(r"(?m)^    [89]  \w+ +\w.*\n", "", before)


def without_imports(before: str, used: set[str]) -> str:
    """Without the modules that only the lifted chapters used."""
    for node in ast.parse(before).body:
        if isinstance(node, ast.Import) and bound(node.names[0]) not in used:
            before = before.replace(f"\n{ast.unparse(node)}\n", "\n", 1)
    return before


def imports(text: str) -> Iterator[ast.Import | ast.ImportFrom]:
    """Those at the top, and in a try at the top (h11's)."""
    for node in ast.parse(text).body:
        inner = node.body if isinstance(node, ast.Try) else [node]
        yield from (n for n in inner if isinstance(n, ast.Import | ast.ImportFrom))


def bound(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def used_names(text: str) -> set[str]:
    """Every name that stands in the text, annotations included."""
    return {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}


def defined_names(text: str) -> list[str]:
    """What the text defines at the top, in its order; imports are no definitions."""
    names = []
    for node in ast.parse(text).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.append(node.name)
            case ast.Assign():
                targets = (name for target in node.targets for name in ast.walk(target))
                names += [name.id for name in targets if isinstance(name, ast.Name)]
            case ast.AnnAssign():
                names.append(node.target.id)
    return list(dict.fromkeys(names))


def import_from(module: str, names: list[str]) -> str:
    lines = "".join(f"    {name},\n" for name in names)
    return f"from {module} import (\n{lines})\n"


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
