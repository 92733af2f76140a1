"""examples/exercises: every answer is green, and every start file is red in the tests
that its page names, for the reason that it names. One run of pytest each, in a process
of its own, whose report is read from JUnit's XML."""

from __future__ import annotations

import builtins
import collections
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
HEADINGS = [
    "Objective",
    "Read first",
    "Start from",
    "Build",
    "Check",
    "If you are stuck",
]
RUN_PATIENCE = 120.0  # seconds for a whole run, in which a start file may wait in vain

# For pages that say in prose what is red at first: all by assertion. A page that names
# its tests is believed instead.
RED_IN_PROSE = {
    "01_hello": "the_status_is_200 the_body_is_the_greeting the_length_counts_bytes "
    "the_client_can_tell_how_to_read_it it_takes_two_messages",
    "04_continue": "an_app_that_refuses_the_body_says_only_that "
    "a_client_that_does_not_wait_is_not_told however_the_client_writes_it",
    "06_lifespan": "what_the_server_learns no_task_is_left_behind "
    "what_the_app_keeps_is_there_when_it_has_started "
    "a_wrong_answer_is_the_apps_mistake a_second_answer_does_no_harm",
    "09_masked_frame": "the_examples_of_the_rfc each_form_of_a_length "
    "a_header_says_where_it_ends a_header_is_not_guessed it_is_what_the_rfc_says "
    "frames_cut_anywhere_are_the_same_frames frames_byte_by_byte_are_the_same_frames "
    "twice_is_not_at_all zeros_are_bytes_like_others a_length_has_one_form",
    "11_graceful": "an_answer_in_flight_arrives all_answers_in_flight_arrive "
    "stop_returns_when_all_is_said an_answer_in_flight_is_the_last the_grace_ends",
    "12_two_files": "the_importable_server_is_whole it_starts_as_a_worker "
    "there_is_one_of_each neither_half_imports_what_it_does_not_use "
    "foals_own_tests_are_green",
}
# Red in some runs only, and so no part of what a start file promises.
RED_BY_CHANCE = {
    # The client may have read the early 100 before the app looks for it.
    "04_continue": {"test_a_client_that_waits_is_told_when_the_app_asks"},
    # On Windows, now and then: its client waits in vain for the end.
    "11_graceful": {"test_who_asks_for_nothing_holds_nobody_up"},
}


def page(name: str) -> str:
    return (EXERCISES / name / "README.md").read_text(encoding="utf-8")


def red_at_first(name: str) -> dict[str, str]:
    """What `Red at first:` says of an exercise: {test: exception}."""
    said = re.search(r"(?ms)^Red at first: (.*?)(:\s|\n\n)", page(name))
    assert said, "no paragraph that begins `Red at first:`"
    found = re.findall(r"`(test_\w+)`(?:\s*\((\w+)\))?", said[1])
    found = found or [(f"test_{test}", "") for test in RED_IN_PROSE[name].split()]
    return {test: exception or "AssertionError" for test, exception in found}


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
def answers(tmp_path_factory):
    return run(tmp_path_factory.mktemp("answers"), "--answers")


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    return run(tmp_path_factory.mktemp("starts"))


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
    said = red_at_first(name)
    found = starts[name]
    assert set(said) <= set(found), "a test that does not exist"
    red = {}
    for test, ends in found.items():
        if test in RED_BY_CHANCE.get(name, ()):
            said.pop(test, None)
        elif set(ends) == {"skipped"}:
            said.pop(test, None)  # it needs another system than this one
        elif bad := set(ends) - {"passed", "skipped"}:
            red[test] = " ".join(sorted(bad))
    assert said and red == said


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


MUTATIONS = mutate.table()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    mutate.copy_to(folder)
    return folder


class TestMutations:
    """TEACHER.md: a line is changed in a copy, and the test that it names sees it."""

    def test_there_is_one_for_each_chapter_and_each_leaf(self):
        places = {mutation.file + mutation.chapter for mutation in MUTATIONS}
        chapters = {f"server.py {n}" for n in range(1, 9)}
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

    def test_the_tests_pass_as_long_as_nothing_is_changed(self, copy):
        done = mutate.pytest(copy, [mutation.test for mutation in MUTATIONS])
        assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.file + m.chapter)
    def test_the_named_test_sees_it(self, copy, mutation):
        assert mutate.mutate(copy, mutation) == ""
