"""What every exercise's test_it.py can ask for.

    def test_something(exercise):        the module made from start.py, or the answer
    def test_else(exercise_path):        its path, for a test that runs it as a program
    from foal_tools import Client, Process, serving, GET, PATIENCE, ROOT

`foal_tools` is tests/conftest.py under a name of its own: two files called conftest
would be one module, whichever came last. Each folder's tests are in a test_it.py, and
so they are imported by path ("importlib"), where equal names do no harm.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def load(path: Path, name: str) -> ModuleType:
    """Run a file as the module `name`, whatever the file is called."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# It puts the root and examples/ on sys.path, so that tests can import foal's modules.
sys.path.append(str(ROOT / "tests"))
foal_tools = load(ROOT / "tests" / "conftest.py", "foal_tools")


def pytest_addoption(parser):
    parser.addoption(
        "--answers", action="store_true", help="test the answers, not the start files"
    )


def pytest_configure(config):
    config.option.importmode = "importlib"
    config.pluginmanager.register(foal_tools, "foal_tools")  # its fixtures: log
    if not config.getoption("--answers"):
        # Code that dies half-way leaves sockets open. Of an answer that would be an
        # error, as it is in foal's own tests; here it would only be noise.
        for warning in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning"):
            config.addinivalue_line("filterwarnings", f"ignore::{warning}")


def pytest_unconfigure(config):
    if not config.getoption("--answers"):  # pytest collects the last garbage after us
        warnings.simplefilter("ignore", ResourceWarning)


def pytest_report_header(config):
    if config.getoption("--answers"):
        return "exercises: testing the answers"
    return "exercises: testing your start.py (the answers: --answers)"


@pytest.fixture(scope="module")
def exercise_path(request) -> Path:
    """start.py beside the test, or the answer."""
    folder = request.path.parent
    if request.config.getoption("--answers"):
        return HERE / "answers" / f"{folder.name}.py"
    return folder / "start.py"


@pytest.fixture(scope="module")
def exercise(exercise_path, request):
    """That file as a module, made anew for each test_it.py."""
    name = f"exercise_{request.path.parent.name}"
    yield load(exercise_path, name)
    sys.modules.pop(name, None)
