"""examples/replay: each bug of the past still happens there, and foal's way still works."""

import subprocess
import sys

import pytest
from conftest import PATIENCE, ROOT

WINDOWS = sys.platform == "win32"
SCRIPTS = {
    "bug_683_shared_listener": "it reads: hello from another process",
    "bug_684_dead_child": "the parent would die of",
    "bug_974_port_zero": "and that is the port that answers",
    "bug_529_reload_proactor": "WinError 87" if WINDOWS else "it takes Windows",
    "bug_1317_workers_proactor": "SelectorEventLoop  <- deaf",
}


def test_every_script_is_run_here():
    found = {path.stem for path in (ROOT / "examples" / "replay").glob("*.py")}
    assert found == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_shows_the_mistake_and_our_way(name):
    path = ROOT / "examples" / "replay" / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 60
    assert f"Run:   python examples/replay/{name}.py" in text
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "mistake" in done.stdout and "foal's way" in done.stdout
    assert SCRIPTS[name] in done.stdout
