"""Would the tests notice a mistake? This script makes mistakes, one at a time.

    python tests/mutations.py 1 150          (a seed, and how many)

A mutation turns a comparison, drops a statement or changes a constant, in a copy of the checkout.
The script runs the tests that reach the line, and prints the mutations that no test notices: a test
is missing, or the line does nothing, or the change makes no difference. First the suite runs once
under sys.settrace, to find out which test reaches which line. That takes some minutes.
"""

import ast
import concurrent.futures
import contextlib
import functools
import inspect
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("server.py", "loops.py", "sockets.py", "workers.py", "reload.py")
BUDGET = 60.0  # seconds of tests for each mutation, the fastest tests first
PATIENCE = 180.0  # seconds; a run that takes longer hangs, and that is noticed, too
LEFT, RIGHT = "Lt Gt Eq In Is And".split(), "LtE GtE NotEq NotIn IsNot Or".split()
TURNED = dict(zip(LEFT + RIGHT, RIGHT + LEFT, strict=True))
DROPPED = (ast.Expr, ast.Assign, ast.AugAssign, ast.Return, ast.Raise, ast.Break, ast.Continue)
IGNORED = shutil.ignore_patterns(".*", "__pycache__")


def mutations_of(file: str) -> list[tuple]:
    """(file, number of the line, the line, the new line)"""
    text, found = (ROOT / file).read_text(encoding="utf-8"), []
    nodes = list(ast.walk(ast.parse(text)))  # a node comes before what is inside of it
    # Python 3.11 does not know on which columns the parts of an f-string are.
    parts = {id(part) for node in nodes if type(node) is ast.JoinedStr for part in ast.walk(node)}
    for node in nodes:
        if id(node) not in parts and (new := mutated(node)) and node.lineno == node.end_lineno:
            old = text.split("\n")[node.lineno - 1].encode()  # ast counts in bytes
            line = old[: node.col_offset] + new.encode() + old[node.end_col_offset :]
            found.append((file, node.lineno, old.decode(), line.decode()))
    return found


def mutated(node: ast.AST) -> str:
    """The new text of a node, or "" if it stays. (The node is used up by this.)"""
    match node:
        case ast.Compare(ops=[op]) | ast.BoolOp(op=op):
            node.op = getattr(ast, TURNED[type(op).__name__])()
            node.ops = [node.op]
            return f"({ast.unparse(node)})"
        case ast.UnaryOp(op=ast.Not()):
            return f"({ast.unparse(node.operand)})"
        case ast.Constant(value=bool(value)):
            return str(not value)
        case ast.Constant(value=int(value) | float(value)):
            return str(value * 2 + 1)
        case ast.Constant(value=bytes() | str() as value) if value and " " not in str(value):
            return repr(value + value[:1])  # with a space it is a sentence
        case ast.Expr(value=ast.Constant()):  # a docstring
            return ""
    return "pass" if isinstance(node, DROPPED) else ""


def trace() -> None:
    """The sitecustomize.py of the traced run notes which test reaches which line."""
    import os, sys, threading  # noqa: E401

    root, seen = os.environ["MUTATIONS_ROOT"], set()
    output = os.open(root + ".lines", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def on_call(frame, event, arg):
        folder, name = os.path.split(frame.f_code.co_filename)
        test = os.environ.get("PYTEST_CURRENT_TEST", " ").rpartition(" ")[0]

        def on_line(frame, event, arg):
            place = f"{name}\t{frame.f_lineno}\t{test}\n"
            if place not in seen:
                seen.add(place)
                os.write(output, place.encode(errors="replace"))
            return on_line

        return on_line if folder == root else None

    threading.settrace(on_call)
    sys.settrace(on_call)


def run_pytest(root: Path, *arguments: str, timeout: float | None = None, **env: str) -> int:
    """Run pytest in a copy of the checkout. The exit code; not 0 if it hangs."""
    command = [sys.executable, *"-m pytest -q --durations=0 --durations-min=0".split()]
    how = {"cwd": root, "env": os.environ | env, "start_new_session": True}
    with (
        open(f"{root}.out", "w") as output,
        subprocess.Popen([*command, *arguments], stdout=output, stderr=output, **how) as process,
    ):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what a test has left behind
    return process.returncode


def measure(folder: Path) -> tuple[dict, dict]:
    """The traced run: the tests that reach each (file, line), and the seconds of each."""
    root, reached = shutil.copytree(ROOT, folder / "traced", ignore=IGNORED), defaultdict(set)
    (folder / "sitecustomize.py").write_text(inspect.getsource(trace) + "\ntrace()\n")
    beside = "--ignore=tests/test_exercises.py"  # it runs the others once more
    run_pytest(root, beside, PYTHONPATH=str(folder), MUTATIONS_ROOT=str(root))
    for row in Path(f"{root}.lines").read_text().splitlines():
        file, line, test = row.split("\t", 2)
        reached[file, int(line)].add(test)
    output = Path(f"{root}.out").read_text()
    failed = set(re.findall(r"(?m)^(?:FAILED|ERROR) (.*?)(?: - .*)?$", output))
    found = re.findall(r"(?m)^([\d.]+)s call +(.*)$", output)
    return reached, {test: float(seconds) for seconds, test in found if test not in failed}


def survives(folder: Path, reached: dict, seconds: dict, mutation: tuple) -> bool:
    file, number, _, new = mutation
    # Not every line has code of its own. "" is an import: any test may depend on the line.
    tests = next(found for line in range(number, 0, -1) if (found := reached[file, line]))
    fastest = sorted(seconds if "" in tests else tests & set(seconds), key=seconds.get)
    sums = itertools.accumulate(map(seconds.get, fastest))
    chosen = [test for test, total in zip(fastest, sums, strict=True) if total < BUDGET]
    root = shutil.copytree(ROOT, folder / str(id(mutation)), ignore=IGNORED)
    lines = (root / file).read_text(encoding="utf-8").split("\n")
    lines[number - 1] = new
    (root / file).write_text("\n".join(lines), encoding="utf-8")
    return not chosen or run_pytest(root, "-x", *chosen, timeout=PATIENCE) == 0


if __name__ == "__main__":
    seed, count = map(int, sys.argv[1:])
    possible = [mutation for file in FILES for mutation in mutations_of(file)]
    sample = random.Random(seed).sample(possible, count)
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(2) as pool:
        ask = functools.partial(survives, Path(name).resolve(), *measure(Path(name).resolve()))
        survivors = [*itertools.compress(sample, pool.map(ask, sample))]
    for file, line, old, new in survivors:
        print(f"{file}:{line}\n    - {old.strip()}\n    + {new.strip()}")
    print(f"found: {count - len(survivors)} of {count}; {len(possible)} are possible")
