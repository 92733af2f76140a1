"""The text is part of the product: these tests keep it true."""

import ast
import re

import pytest
from conftest import ROOT

import server

# Lines at most. The numbers may only fall.
BUDGETS = {"server": 1850, "loops": 105, "sockets": 270, "workers": 365, "reload": 190}
TOGETHER, TESTS, LONGEST_FUNCTION, WIDTH = 2750, 8950, 45, 88
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SOURCE = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in BUDGETS}
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What README names besides our own: of Python, of other projects, or words of the reader.
ELSEWHERE = {*"python python3 auto info wsproto app main.py protocol.py arbiter.py".split()}
every_module = pytest.mark.parametrize("module", BUDGETS)


def nodes(module: str, *kinds: type) -> list:
    return [node for node in ast.walk(ast.parse(SOURCE[module])) if isinstance(node, kinds)]


def test_a_leaf_imports_nothing_of_ours_and_there_is_no_sixth_module():
    assert {path.stem for path in ROOT.glob("*.py")} == set(BUDGETS)
    for leaf in set(BUDGETS) - {"server"}:
        names = {alias.name for node in nodes(leaf, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes(leaf, ast.ImportFrom)}
        assert not names & set(BUDGETS), leaf


def test_the_budgets_are_kept():
    lines = {module: SOURCE[module].count("\n") for module in BUDGETS}
    assert not {m: n for m, n in lines.items() if n > BUDGETS[m]}
    assert sum(lines.values()) <= TOGETHER
    files = [path for path in (ROOT / "tests").rglob("*") if path.suffix in (".py", ".md", ".txt")]
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in files) <= TESTS


@every_module
def test_enough_of_a_module_is_prose(module):
    """Of the lines that are not empty, those that are comment or docstring as a whole."""
    lines = SOURCE[module].split("\n")
    prose = {number for number, line in enumerate(lines, 1) if line.lstrip().startswith("#")}
    for node in nodes(module, *FUNCTIONS, ast.ClassDef, ast.Module):
        if ast.get_docstring(node) is not None:
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    filled = {number for number, line in enumerate(lines, 1) if line.strip()}
    assert len(prose & filled) / len(filled) >= (0.2 if module == "server" else 0.25)


@every_module
def test_a_module_fits_beside_a_page(module):
    """Its lines, its functions, and an opening that is always the same."""
    assert not [n for n, line in enumerate(SOURCE[module].split("\n"), 1) if len(line) > WIDTH]
    lengths = [(n.name, n.end_lineno - n.lineno + 1) for n in nodes(module, *FUNCTIONS)]
    assert not [(name, length) for name, length in lengths if length > LONGEST_FUNCTION]
    opening = ast.get_docstring(ast.parse(SOURCE[module]))
    headings = ["Owns:", "Must not know:", "Read beside:", "The bug that shaped it:"]
    assert re.findall(rf"(?m)^(?:{'|'.join(headings)})", opening) == headings
    assert not re.search(r"TODO|FIXME|XXX", SOURCE[module])


def test_the_contents_list_of_server_py_equals_its_chapters():
    """Each name is defined in its chapter, and in that order."""
    listed = re.findall(r"(?m)^    (\d)  ([\w /]+?)  +(.+)$", server.__doc__)
    chapters = re.split(r"(?m)^# ─+ (\d)\. ([\w /]+) ──$", SOURCE["server"])[1:]
    titles, texts = [*zip(chapters[::3], chapters[1::3], strict=True)], chapters[2::3]
    assert [row[:2] for row in listed] == titles
    for (_, title, names), text in zip(listed, texts, strict=True):
        defined = re.findall(r"(?m)^(?:async )?(?:def|class) (\w+)", text)
        assert [n for n in defined if n in names.split(", ")] == names.split(", "), title


def test_the_map_of_the_tests_names_tests_that_exist():
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    for file, name in re.findall(r"`(test_\w+)\.(?!py`)(\w+)`", text):
        source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        assert re.search(rf"(?m)^ *(class |(async )?def (test_)?){name}\b", source), name


class TestReadme:
    def test_the_two_commands_come_first_and_the_exit_codes_are_there(self):
        commands = re.findall(r"(?m)^python3 .*$", README)
        assert [command.split()[-1] for command in commands] == ["example:app", "pytest"]
        assert README.index(commands[1]) < 2000
        assert {"0", "2", "3", "128 + n"} <= set(re.findall(r"(?m)^\| ([\w +]+) \| ", README))

    def test_the_options_equal_the_parser(self):
        rows = re.findall(r"(?m)^\| `(--[\w-]+)(?: [^`]*)?` \| *(?:`(.*?)`)? *\|", README)
        expected = [
            (action.option_strings[0], str(action.default) if "(default:" in action.help else "")
            for action in server.make_parser()._actions  # argparse has no public list
            if action.dest not in ("help", "app")
        ]
        assert rows == expected

    def test_every_name_and_every_file_that_it_cites_exists(self):
        text = re.sub(r"(?s)```.*?```", "", README)
        cited = set(re.findall(r"`(_?[A-Za-z]\w*)(?:\([^`]*\))?`", text))
        ours = {path.stem for path in (ROOT / "examples").glob("*.py")} | {"h11"}
        for module in BUDGETS:
            ours |= {node.name for node in nodes(module, *FUNCTIONS, ast.ClassDef)}
        assert not cited - ours - ELSEWHERE
        named = set(re.findall(r"(?:`|python )([\w/]+\.(?:py|md|toml))\b", README))
        named |= set(re.findall(r"\]\(([^)#:]+)\)", README))
        assert not {name for name in named if not (ROOT / name).exists()} - ELSEWHERE

    def test_each_mark_of_a_walk_stands_once_and_in_the_function_of_its_step(self):
        steps, marks = {}, []
        for title, walk in re.findall(r"(?ms)^## Life of a (\w+)\n(.*?)(?=^## )", README):
            prefix = {"request": "", "WebSocket": "ws "}.get(title, f"{title} ")
            for number, step in re.findall(r"(?ms)^(\d+)\. (.*?)(?=^\d+\. |\Z)", walk):
                steps[prefix + number] = re.search(r"`(\w+)`", step)[1]
        for module in BUDGETS:
            functions = nodes(module, *FUNCTIONS)
            for number, line in enumerate(SOURCE[module].split("\n"), 1):
                if mark := re.search(r"# walk: ([\w ]+)$", line):
                    around = [f for f in functions if f.lineno <= number <= f.end_lineno]
                    marks.append((mark[1], max(around, key=lambda f: f.lineno).name))
        assert {step.rpartition(" ")[0] for step in steps} == {"", "ws", "worker"}
        assert sorted(marks) == sorted(steps.items())
