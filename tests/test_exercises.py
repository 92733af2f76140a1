"""examples/exercises: every answer is green, and every start file is red in the tests
that its page names, for the reason that it names. The names that a page cites are there,
and each mutation of TEACHER.md is seen by its test."""

import ast
import builtins
import collections
import os
import re
import subprocess
import sys
import xml.etree.ElementTree

import pytest
from conftest import ROOT

EXERCISES = ROOT / "examples" / "exercises"
sys.path.append(str(EXERCISES))  # behind ours: it has a conftest.py, too
import mutate  # noqa: E402

NAMES = sorted(path.name for path in EXERCISES.glob("[0-9][0-9]_*"))
PAGES = {name: (EXERCISES / name / "README.md").read_text(encoding="utf-8") for name in NAMES}
TEACHER = (EXERCISES / "TEACHER.md").read_text(encoding="utf-8")
HEADINGS = ["Objective", "Read first", "Start from", "Build", "Check", "If you are stuck"]
RUN_PATIENCE = 120.0  # seconds for a whole run, in which a start file may wait in vain
MUTATIONS = mutate.table()
each_exercise = pytest.mark.parametrize("name", NAMES)


def run(folder, *options: str) -> dict[str, dict[str, list]]:
    """{exercise: {test: [how each of its cases ended]}}."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *options]
    done = subprocess.run(
        [*command, f"--junitxml={folder / 'report.xml'}", str(EXERCISES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RUN_PATIENCE,
        env={**os.environ, "CI": "true"},  # where pytest would say more, and take longer
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    results = collections.defaultdict(lambda: collections.defaultdict(list))
    for case in xml.etree.ElementTree.parse(folder / "report.xml").iter("testcase"):
        exercise = re.search(r"\.(\d\d_\w+)\.test_it", case.get("classname"))[1]
        results[exercise][case.get("name").partition("[")[0]].append(ending(case))
    return results


def ending(case) -> str:
    """ "passed", "skipped", "error", or the name of an exception."""
    for outcome in case:
        if outcome.tag in ("error", "skipped"):
            return outcome.tag
        if outcome.tag == "failure":
            said = outcome.get("message")
            if said.startswith(("assert ", "Failed: ")):  # "Failed: DID NOT RAISE"
                return "AssertionError"
            name = re.match(r"[\w.]*", said)[0].rpartition(".")[2]
            kind = getattr(builtins, name, Exception)
            return "OSError" if issubclass(kind, OSError) else name  # systems differ
    return "passed"


def with_mutation(folder, mutation):
    """What is wrong with a mutation, or ""."""
    mutate.copy_to(folder)
    return mutate.mutate(folder, mutation)


def without_mutation(folder):
    mutate.copy_to(folder)
    return mutate.pytest(folder, [mutation.test for mutation in MUTATIONS])


def start(submit):
    """{what: its future}. conftest calls this before the first test."""
    runs = {"answers": submit(run, "--answers"), "starts": submit(run)}
    runs["no mutation"] = submit(without_mutation)
    return runs | {mutation: submit(with_mutation, mutation) for mutation in MUTATIONS}


@each_exercise
def test_every_answer_is_green_and_the_page_says_of_how_many_tests(name, started):
    ends = [end for ends in started["answers"].result()[name].values() for end in ends]
    assert set(ends) <= {"passed", "skipped"}
    said = re.search(r"(?m)^Green: `(\d+) passed(?:, (\d+) skipped)?`", PAGES[name])
    assert int(said[1]) + int(said[2] or 0) == len(ends)  # systems differ in what they skip


@each_exercise
def test_every_start_is_red_for_the_reason_that_its_page_names(name, started):
    """`test_it`, or `test_it` (2 of 3), fails by assertion; `test_it` (OSError) does not.
    An import error would be red, too, and teach nothing."""
    said = re.search(r"(?ms)^Red at first: (.*?):\s", PAGES[name])[1]
    found, expected, red = started["starts"].result()[name], {}, {}
    cited = r"`(test_\w+)`(?:\s*\((?:(\d+) of (\d+)|(\w+))\))?"
    for test, some, of_all, kind in re.findall(cited, said):
        assert int(of_all or len(found[test])) == len(found[test])
        if set(found[test]) != {"skipped"}:  # which needs another system than this one
            expected[test] = (kind or "AssertionError", int(some or len(found[test])))
    for test, ends in found.items():
        if bad := [end for end in ends if end not in ("passed", "skipped")]:
            red[test] = (" ".join(sorted(set(bad))), len(bad))
    assert expected and red == expected


@each_exercise
def test_every_page_has_its_six_headings_and_its_neighbours(name):
    text, place = PAGES[name], NAMES.index(name)
    assert int(name[:2]) == place + 1 and text.startswith(f"# {place + 1}. ")
    found = re.findall(r"(?m)^## (.*)", text)
    assert [heading for heading in found if heading != "The report"] == HEADINGS
    assert f"\npytest -x examples/exercises/{name}\n" in text  # one failure at a time
    links = re.findall(r"\]\(([^)#:]*)\)", text.rpartition("\n---\n")[2])
    near = [NAMES[i] for i in (place - 1, place + 1) if 0 <= i < len(NAMES)]
    expected = ["../README.md", f"../answers/{name}.py", *(f"../{n}/README.md" for n in near)]
    assert sorted(links) == sorted(expected)
    assert all((EXERCISES / name / link).is_file() for link in links)


@each_exercise
def test_what_a_page_tells_to_read_is_there(name):
    """`server.py`, chapter 7, `Exchange.run` and ...: names change, and pages grow old."""
    to_read = re.search(r"(?ms)^## Read first\n(.*?)^## ", PAGES[name])[1]
    to_read += PAGES[name].rpartition("Answer: ")[2]
    file = r"`(?:server|loops|sockets|workers|reload)\.py`"
    for cited in re.findall(rf"(?s){file}.*?(?={file}|\n- |\n\n|\Z)", to_read):
        text = (ROOT / cited.split("`")[1]).read_text(encoding="utf-8")
        chapters = re.findall(r"chapter (\d)", cited)
        if len(chapters) == 1:
            text = re.search(rf"(?ms)^# ─+ {chapters[0]}\. .*?(?=^# ─|\Z)", text)[0]
        names = re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", cited.partition(",")[2])
        defined = set()
        for node in ast.walk(ast.parse(text)):
            defined |= {getattr(node, key, "") for key in ("name", "arg", "id")}
        missing = {part for name in names for part in name.split(".")} - defined
        assert missing <= {"case", "if", "import"}, cited


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.file + m.chapter)
def test_a_mutation_is_seen_by_the_test_that_is_named(started, mutation):
    assert started[mutation].result() == ""


def test_there_is_a_mutation_for_each_chapter_and_each_leaf(started):
    """And without a mutation all these tests pass."""
    chapters = {f"server.py {n}" for n in range(1, 10)}
    leaves = {"loops.py", "sockets.py", "workers.py", "reload.py"}
    assert {mutation.file + mutation.chapter for mutation in MUTATIONS} == chapters | leaves
    assert TEACHER.rpartition("## One-line")[2].count("\n| `") == len(MUTATIONS)
    done = started["no mutation"].result()
    assert done.returncode == 0, done.stdout + done.stderr
