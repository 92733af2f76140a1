"""examples/exercises: every answer is green, and every start file is red in the tests
that its page names, for the reason that it names. One run of pytest each, in a process
of its own, whose report is read from JUnit's XML. And the names that a page cites from
foal's files are there.

Such a run is mostly the start of pytest, or a wait: two go on at a time."""

from __future__ import annotations

import ast
import builtins
import collections
import concurrent.futures
import keyword
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from typing import NamedTuple

import pytest
from conftest import ROOT

EXERCISES = ROOT / "examples" / "exercises"
sys.path.append(str(EXERCISES))  # behind ours: it has a conftest.py, too
import mutate  # noqa: E402

NAMES = sorted(path.name for path in EXERCISES.glob("[0-9][0-9]_*"))
HEADINGS = [
    "Objective",
    "Read first",
    "Start from",
    "Build",
    "Check",
    "If you are stuck",
]
RUN_PATIENCE = 120.0  # seconds for a whole run, in which a start file may wait in vain
# A page's way of citing: `server.py`, chapter 6, `RequestResponseCycle.run` and ...
FILE = r"`(server|loops|sockets|workers|reload)\.py`"
CITATION = rf"(?s){FILE}(.*?)(?={FILE.replace('(', '(?:')}|\n- |\n\n|\Z)"


def page(name: str) -> str:
    return (EXERCISES / name / "README.md").read_text(encoding="utf-8")


class Red(NamedTuple):
    """How a test ends at first."""

    exception: str
    cases: tuple[int, int]  # so many of how many


def red_at_first(name: str, found: dict[str, list]) -> dict[str, Red]:
    """What `Red at first:` says: `test_it`, which is all of its cases, or `test_it`
    (2 of 3), each by assertion; or `test_it` (OSError)."""
    said = re.search(r"(?ms)^Red at first: (.*?):\s", page(name))
    assert said, "no paragraph that begins `Red at first:`"
    tests = re.findall(r"`(test_\w+)`(?:\s*\((?:(\d+) of (\d+)|(\w+))\))?", said[1])
    red = {}
    for test, some, of_all, exception in tests:
        assert test in found, "a test that does not exist"
        many = len(found[test])
        cases = (int(some), int(of_all)) if some else (many, many)
        red[test] = Red(exception or "AssertionError", cases)
    assert red and len(red) == len(tests)
    return red


def run(folder, *options: str) -> dict[str, dict[str, list]]:
    """{exercise: {test: [how it ended, …]}}; more than one where it has parameters."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *options]
    done = subprocess.run(
        [*command, f"--junitxml={report}", str(EXERCISES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RUN_PATIENCE,
        env={**os.environ, "CI": "true"},  # where pytest would say more, and take longer
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    results = collections.defaultdict(lambda: collections.defaultdict(list))
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        exercise = re.search(r"\.(\d\d_\w+)\.test_it", case.get("classname"))[1]
        test = case.get("name").partition("[")[0]
        results[exercise][test].append(ending(case))
    return results


def ending(case) -> str:
    """ "passed", "skipped", "error", or the exception of a failure. Systems differ in
    which OSError it is."""
    for outcome in case:
        if outcome.tag == "failure":
            said = outcome.get("message")
            if said.startswith(("assert ", "Failed: ")):  # "Failed: DID NOT RAISE"
                return "AssertionError"
            name = re.match(r"[\w.]*", said)[0].rpartition(".")[2]
            kind = getattr(builtins, name, Exception)
            return "OSError" if issubclass(kind, OSError) else name
        if outcome.tag in ("error", "skipped"):
            return outcome.tag
    return "passed"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both, to ask for their result()."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers, starts = map(tmp_path_factory.mktemp, ("answers", "starts"))
        yield pool.submit(run, answers, "--answers"), pool.submit(run, starts)


@pytest.fixture
def answers(runs):
    return runs[0].result()


@pytest.fixture
def starts(runs):
    return runs[1].result()


def test_there_are_twelve_in_order():
    assert [name[:2] for name in NAMES] == [f"{n:02}" for n in range(1, 13)]
    have = sorted(path.stem for path in (EXERCISES / "answers").glob("[0-9]*.py"))
    assert have == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_green(name, answers):
    ends = {end for ends in answers[name].values() for end in ends}
    assert "passed" in ends and ends <= {"passed", "skipped"}, answers[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_start_is_red_for_the_reason_that_its_page_names(name, starts):
    """An import error would be red, too, and teach nothing."""
    found = starts[name]
    said, red = red_at_first(name, found), {}
    for test, ends in found.items():
        bad = [end for end in ends if end not in ("passed", "skipped")]
        if set(ends) == {"skipped"}:
            said.pop(test, None)  # it needs another system than this one
        elif bad:
            red[test] = Red(" ".join(sorted(set(bad))), (len(bad), len(ends)))
    assert said and red == said


@pytest.mark.parametrize("name", NAMES)
def test_every_page_counts_its_tests(name, answers):
    """What does pytest print when all is done? Systems differ in what they skip."""
    said = re.search(r"(?m)^Green: `(\d+) passed(?:, (\d+) skipped)?`", page(name))
    passed, skipped = int(said[1]), int(said[2] or 0)
    assert passed + skipped == sum(len(ends) for ends in answers[name].values())


@pytest.mark.parametrize("name", NAMES)
def test_every_page_has_its_six_headings_and_its_neighbours(name):
    text, place = page(name), NAMES.index(name)
    found = re.findall(r"(?m)^## (.*)", text)
    assert [heading for heading in found if heading != "The report"] == HEADINGS
    assert text.startswith(f"# {int(name[:2])}. ")
    assert f"\npytest examples/exercises/{name}\n" in text
    near = [NAMES[i] for i in (place - 1, place + 1) if 0 <= i < len(NAMES)]
    for path in [f"../{other}/README.md" for other in near]:
        assert f"]({path})" in text
    assert f"](../answers/{name}.py)" in text and "](../README.md)" in text
    foot = text.rpartition("\n---\n")[2]
    for link in re.findall(r"\]\(([^)#:]*)\)", foot):
        assert (EXERCISES / name / link).is_file(), link


def source(file: str, said: str) -> str:
    """What a page cites of: a file of ours, or the one chapter that it names."""
    text = (ROOT / file).read_text(encoding="utf-8")
    chapters = re.findall(r"chapter (\d)", said)
    if len(chapters) != 1:
        return text
    return re.search(rf"(?ms)^# ─+ {chapters[0]}\. .*?(?=^# ─|\Z)", text)[0]


def names_in(text: str) -> set[str]:
    """All that it defines: `function`, `parameter`, `Class`, `Class.method`."""
    names = set()
    for node in ast.parse(text).body:
        parts = [part for part in ast.walk(node) if hasattr(part, "name")]
        for part in parts:
            names |= {part.name, f"{parts[0].name}.{part.name}"}
        names |= {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
    return names


@pytest.mark.parametrize("name", NAMES)
def test_what_a_page_tells_to_read_is_there(name):
    """Pages grow old in silence, and in server.py names change."""
    text = page(name)
    to_read = re.search(r"(?ms)^## Read first\n(.*?)^## ", text)[1]
    for file, said in re.findall(CITATION, to_read + text.split("Answer: ")[1]):
        cited = set(re.findall(r"`([A-Za-z_][\w.]*)`", said))
        missing = cited - names_in(source(f"{file}.py", said))
        assert missing <= {*keyword.kwlist, *keyword.softkwlist}, file


MUTATIONS = mutate.table()


def try_out(folder, mutation: mutate.Mutation) -> str:
    """What is wrong with this row; in a copy of its own."""
    mutate.copy_to(folder)
    return mutate.mutate(folder, mutation)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """For each mutation, to ask for its result(): what is wrong with it, or ""."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        folders = [tmp_path_factory.mktemp("mutation") for _ in MUTATIONS]
        tried = [pool.submit(try_out, *pair) for pair in zip(folders, MUTATIONS)]
        yield dict(zip(MUTATIONS, tried))


class TestMutations:
    """TEACHER.md: a line is changed in a copy, and the test that it names sees it."""

    def test_there_is_one_for_each_chapter_and_each_leaf(self):
        places = {mutation.file + mutation.chapter for mutation in MUTATIONS}
        whole = (ROOT / "server.py").read_text(encoding="utf-8")
        numbers = re.findall(r"(?m)^# ─+ (\d)\. ", whole)
        assert len(numbers) >= 9
        chapters = {f"server.py {n}" for n in numbers}
        assert places == chapters | {
            "loops.py",
            "sockets.py",
            "workers.py",
            "reload.py",
        }
        text = (EXERCISES / "TEACHER.md").read_text(encoding="utf-8")
        table = text.rpartition("## One-line mutations")[2]
        rows = [line for line in table.split("\n") if line.startswith("| `")]
        assert len(rows) == len(MUTATIONS), "a row that mutate.py cannot read"

    def test_the_tests_pass_as_long_as_nothing_is_changed(self, tmp_path):
        mutate.copy_to(tmp_path)
        done = mutate.pytest(tmp_path, [mutation.test for mutation in MUTATIONS])
        assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.file + m.chapter)
    def test_the_named_test_sees_it(self, wrong, mutation):
        assert wrong[mutation].result() == ""
