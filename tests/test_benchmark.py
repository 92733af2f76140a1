"""The two scripts beside the tests still run. What they measure is not judged here, and
so they run at the same time."""

import concurrent.futures
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "tests" / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return result.returncode, result.stdout, result.stderr


RUNS = {
    "floors": ["benchmark.py", "--quick", "--only", "hello"]
    + ["--servers", "foal,h11 alone,bare asyncio"],
    "two foals": ["benchmark.py", "--quick", "--only", "ws,gate", "--foal", str(ROOT)]
    + ["--servers", "foal,foal-other"],
    "cliffs": ["cliffs.py", "--scale", "0.01", "--only", "upload,ws-large"],
}

posix = pytest.mark.skipif(os.name == "nt", reason="asks ps, or /proc, for CPU time")


@pytest.fixture(scope="module")
def runs():
    with concurrent.futures.ThreadPoolExecutor(len(RUNS)) as pool:
        yield {name: pool.submit(run, *RUNS[name]) for name in RUNS}


@posix
def test_the_benchmark_prints_a_row_for_foal_and_for_each_floor(runs):
    code, table, errors = runs["floors"].result()
    assert code == 0, errors
    for name in ("foal", "h11 alone", "bare asyncio"):
        assert name in table
    # Microseconds, their ratio, requests a second, and no errors at the end.
    assert re.search(r"\n  foal +\d+\.\d +1\.00 +~?[\d,]+ +~?1\.00 +[\d. ]+\n", table), table


@posix
def test_the_benchmark_compares_websockets_and_two_foals(runs):
    code, table, errors = runs["two foals"].result()
    assert code == 0, errors
    assert len(re.findall(r"\n  foal-other +\d", table)) == 2, table


@posix
def test_the_cliffs_are_reported_with_their_bounds(runs):
    code, table, errors = runs["cliffs"].result()
    assert re.search(r"\n  upload: [^\n]+ \d+ MiB/s\n", table), table + errors
    assert code == 0 or " > " in table, table + errors
