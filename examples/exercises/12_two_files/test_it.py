"""The split is made in a folder of its own, from the server.py of today, and foal's own
tests are the judge of it. Before them stand a few that say more clearly what is wrong."""

import ast
import re
import subprocess
import sys

import pytest
from foal_tools import ROOT

TESTS = ("tests/test_frames.py", "tests/test_websocket.py")
# Without the slow ones, and those that replace a number of server.py (page, "Check").
SELECTION = (
    "(TestEncode or TestMask or TestReader or TestUTF8 or TestClose or TestScope or "
    "TestOpeningHandshake or TestMisuse or TestMessages or test_before_accept or "
    "test_after_accept) and not 16_mib"
)


@pytest.fixture(scope="module")
def whole():
    return (ROOT / "server.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def halves(exercise, whole):
    return exercise.lift(whole)


@pytest.fixture(scope="module")
def folder(exercise, tmp_path_factory):
    path = tmp_path_factory.mktemp("split")
    exercise.make_copy(path)
    return path


def run(folder, *arguments) -> str:
    """Run Python there; all it printed. A failure of it is one of the test."""
    done = subprocess.run(
        [sys.executable, "-B", *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def definitions(text) -> dict[str, str]:
    """Functions and classes at the top of a module, as they are, without comments."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    found = [node for node in ast.parse(text).body if isinstance(node, kinds)]
    return {node.name: ast.dump(node) for node in found}


def chapters_8_and_9(text) -> str:
    return text[re.search(r"(?m)^# ─+ 8\. ", text).start() :]


def test_the_chapters_have_moved_and_are_what_they_were(whole, halves):
    """A refactoring moves. If something else changes too, a mistake is hard to find."""
    moved = definitions(chapters_8_and_9(whole))
    assert "WebSocket" in moved and "FrameReader" in moved
    new_server, websocket = (definitions(text) for text in halves)
    assert websocket == moved
    assert new_server == {n: d for n, d in definitions(whole).items() if n not in moved}


def test_the_importable_server_is_whole(folder):
    """server.py is the only door: what it could do, it can do."""
    names = "FrameReader, WebSocket, Opcode, encode_frame"
    run(folder, "-c", f"from server import {names}")


def test_it_starts_as_a_program(folder):
    """What if server.py is __main__? Then `import server` makes a second one."""
    assert "foal" in run(folder, "server.py", "--version")


def test_it_starts_as_a_worker(folder):
    """multiprocessing runs the program's file again in each child, as __mp_main__."""
    code = "import runpy; runpy.run_path('server.py', run_name='__mp_main__')"
    run(folder, "-c", f"{code}; import server; server.WebSocket")


def test_there_is_one_of_each(folder):
    """Two copies of a class would be two classes, and isinstance would say no."""
    code = (
        "import server, websocket\n"
        "assert server.FrameReader is websocket.FrameReader\n"
        "assert server.WebSocket is websocket.WebSocket\n"
        "assert issubclass(websocket.WebSocket, server.Exchange)\n"
    )
    run(folder, "-c", code)


def unused_imports(text) -> set[str]:
    """What a text imports and never says; names for others (from our half) apart."""
    tree, imported = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            if node.module != "websocket":
                imported |= {a.asname or a.name for a in node.names}
    return imported - {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_neither_half_imports_what_it_does_not_use(whole, halves):
    """And no `*`, which would hide what one half needs of the other."""
    new_server, websocket = halves
    assert websocket.count("import") >= 5, "it needs more than that"
    assert unused_imports(websocket) == set()
    assert unused_imports(new_server) <= unused_imports(whole)


def test_foals_own_tests_are_green(folder):
    printed = run(
        folder, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", *TESTS, "-k", SELECTION
    )
    assert int(re.search(r"(\d+) passed", printed)[1]) > 200
