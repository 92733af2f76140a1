"""The text is part of the product: these tests keep it true."""

from __future__ import annotations

import argparse
import ast
import collections
import re

import pytest
from conftest import ROOT

import server

LEAVES = ("loops", "sockets", "workers", "reload")
MODULES = ("server", *LEAVES)
BUDGETS = {"server": 3011, "loops": 111, "sockets": 212, "workers": 375, "reload": 115}
LONGEST_FUNCTION = 45
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
ELSEWHERE = {"multiprocessing", "signal", "socket", "uvloop", "proto", "__main__", "__mp_main__"}
ELSEWHERE |= {"create_server", "LISTEN_FDS", "python", "python3", "auto", "info"}
ELSEWHERE |= {"wrk", "wsproto", "httptools"}


def source(module: str) -> str:
    return (ROOT / f"{module}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_imports_nothing_of_ours(leaf):
    """architecture: one root, four leaves."""
    for node in ast.walk(ast.parse(source(leaf))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not set(names) & set(MODULES), names


def test_there_is_no_sixth_module():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_keeps_to_its_budget(module):
    lines = source(module).count("\n")
    assert lines <= BUDGETS[module], f"{module}.py has {lines} lines"


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_longer_than_a_screen(module):
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_its_contract(module):
    docstring = ast.get_docstring(ast.parse(source(module)))
    paragraphs = ["Owns:", "Must not know:", "Read beside:", "The bug that shaped it:"]
    found = re.findall(r"(?m)^(Owns:|Must not know:|Read beside:|The bug .*?:)", docstring)
    assert found == paragraphs


@pytest.mark.parametrize("module", MODULES)
def test_a_line_fits_beside_a_page(module):
    long = [n for n, line in enumerate(source(module).split("\n"), 1) if len(line) > 88]
    assert not long, f"{module}.py: lines {long}"


def test_no_end_is_left_open():
    for module in MODULES:
        assert not re.search(r"TODO|FIXME|XXX", source(module))


class TestContents:
    """server.py lists its chapters, and what each defines, in the order of the text."""

    def chapters(self) -> list[tuple[str, str]]:
        return re.findall(r"(?m)^# ─+ (\d)\. ([\w /]+) ──$", source("server"))

    def listed(self) -> list[tuple[str, str, str]]:
        rows = re.findall(r"(?m)^    (\d)  ([\w /]+?)  +(.+)$", server.__doc__)
        return [(number, title, names) for number, title, names in rows]

    def test_the_list_names_the_chapters(self):
        assert [row[:2] for row in self.listed()] == self.chapters()

    def test_each_name_is_defined_in_its_chapter_and_in_that_order(self):
        text = source("server")
        for number, title, names in self.listed():
            start = text.index(f"{number}. {title} ──")
            end = text.find("\n# ───", start)
            chapter = text[start : end if end > 0 else None]
            places = [
                re.search(rf"(?m)^(async )?(def|class) {name}\b", chapter)
                for name in names.split(", ")
            ]
            assert all(places), (title, names)
            assert [p.start() for p in places] == sorted(p.start() for p in places)


class TestReadme:
    """README says what the program does."""

    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def options(self) -> list[argparse.Action]:
        actions = server.make_parser()._actions
        return [a for a in actions if a.option_strings and a.dest != "help"]

    def test_the_option_table_equals_the_parser(self):
        rows = re.findall(r"(?m)^\| `(--[\w-]+)(?: [^`]*)?` \| (.*?)\|", self.text)
        expected = []
        for action in self.options():
            shown = "(default:" in action.help
            default = f"`{action.default}`" if shown else ""
            expected.append((action.option_strings[0], default))
        assert [(flag, default.strip()) for flag, default in rows] == expected

    def test_the_two_commands_come_first_and_stand_alone(self):
        commands = re.findall(r"(?m)^python3 .*$", self.text)
        assert len(commands) == 2
        assert commands[0].endswith("server.py example:app")
        assert commands[1].endswith("pytest")
        assert self.text.index(commands[1]) < 2000

    def test_every_exit_code_is_explained(self):
        rows = re.findall(r"(?m)^\| ([\w +]+) \| ", self.text)
        assert {"0", "2", "3", "128 + n"} <= set(rows)

    def test_every_name_it_cites_exists(self):
        """`name` or `name(…)`, of ours, of an example, or known to every reader."""
        text = re.sub(r"(?s)```.*?```", "", self.text)
        cited = set(re.findall(r"`(_?[A-Za-z]\w*)(?:\([^`]*\))?`", text))
        ours = {path.stem for path in (ROOT / "examples").glob("*.py")} | {"h11", "app"}
        for module in MODULES:
            nodes = ast.walk(ast.parse(source(module)))
            ours |= {node.name for node in nodes if isinstance(node, DEFINITIONS)}
        missing = cited - ours - ELSEWHERE
        assert not missing

    def test_every_file_it_names_exists(self):
        named = re.findall(r"(?:`|python )([\w/]+\.(?:py|md|toml))\b", self.text)
        named += re.findall(r"\]\(([^)#]+)\)", self.text)
        named += re.findall(r"`((?:tests|examples)/\w+)`|pytest (examples/[\w/]+)`", self.text)
        named = ["".join(name) for name in named]
        missing = {name for name in named if not (ROOT / name).exists()}
        # The reader's own, and those of other projects under "Where to go next".
        assert missing <= {"main.py", "examples/trio-server.py", "arbiter.py", "protocol.py"}


class TestWalks:
    """README's numbered steps, and the places in the code that are marked for them."""

    def steps(self) -> dict[str, str]:
        """Mark of a step -> the function that README names in it first."""
        found = {}
        for title, prefix in (("request", ""), ("WebSocket", "ws "), ("worker", "worker ")):
            section = TestReadme.text.partition(f"## Life of a {title}\n")[2].partition("\n## ")[0]
            for number, step in re.findall(r"(?ms)^(\d+)\. (.*?)(?=^\d+\. |\Z)", section):
                found[prefix + number] = re.search(r"`(\w+)`", step)[1]
        return found

    def marks(self) -> list[tuple[str, str]]:
        """(mark, the function in which it stands), of all five files."""
        found = []
        for module in MODULES:
            functions = [
                node
                for node in ast.walk(ast.parse(source(module)))
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            for number, line in enumerate(source(module).split("\n"), 1):
                if mark := re.search(r"# walk: ([\w ]+)$", line):
                    around = [f for f in functions if f.lineno <= number <= f.end_lineno]
                    found.append((mark[1], max(around, key=lambda f: f.lineno).name))
        return found

    def test_there_are_three(self):
        counts = collections.Counter(mark.rpartition(" ")[0] for mark in self.steps())
        assert counts == {"": 12, "ws": 8, "worker": 8}

    def test_each_mark_stands_once_and_where_readme_says(self):
        assert sorted(self.marks()) == sorted(self.steps().items())
