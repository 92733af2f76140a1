"""loops.py: which event loop runs, and why.

`choose` is a pure function, so the rows of Windows are tested on Linux as well. The
processes at the end show that the loop that was chosen is the one that runs.
"""

import asyncio
import os
import sys

import pytest
from conftest import GET
from test_workers import Supervised

import loops
import server

SELECTOR, PROACTOR = "asyncio:SelectorEventLoop", "asyncio:ProactorEventLoop"
OWN, SHARED, ASKED = "asyncio's own choice", "uvicorn #529", "asked for"
NOWHERE, UNKNOWN = "exists on Windows only; leave --loop out", "is not known; use auto,"
NOT_SHARED = "cannot share a listener between processes .uvicorn #529.; use selector"

# The value of --loop, and what follows from it on a POSIX system, on Windows in a single
# process, and on Windows with a shared listener: a factory and its reason, or an error.
TABLE = {
    "auto": ((SELECTOR, OWN), (PROACTOR, OWN), (SELECTOR, SHARED)),
    "asyncio": ((SELECTOR, OWN), (PROACTOR, OWN), (SELECTOR, SHARED)),
    "selector": ((SELECTOR, ASKED),) * 3,
    SELECTOR: ((SELECTOR, ASKED),) * 3,
    "proactor": (NOWHERE, (PROACTOR, ASKED), NOT_SHARED),
    PROACTOR: (NOWHERE, (PROACTOR, ASKED), NOT_SHARED),
    "uvloop:new_event_loop": (("uvloop:new_event_loop", ASKED),) * 3,
    "uvloop": (UNKNOWN,) * 3,
    "": (UNKNOWN,) * 3,
}
PLACES = {("linux", False): 0, ("darwin", True): 0, ("win32", False): 1, ("win32", True): 2}


class TestTheTable:
    """Name, platform, shared or not (uvicorn #529, #786: see test_bugs.py)."""

    @pytest.mark.parametrize("platform, shared", PLACES)
    @pytest.mark.parametrize("name", TABLE)
    def test_a_loop_is_chosen_or_refused(self, name, platform, shared):
        outcome = TABLE[name][PLACES[platform, shared]]
        if isinstance(outcome, tuple):
            factory, reason = loops.choose(name, platform=platform, shared=shared)
            assert factory == outcome[0] and outcome[1] in reason
        else:
            with pytest.raises(ValueError, match=f"^--loop .*{outcome}.*$"):
                loops.choose(name, platform=platform, shared=shared)


def class_of_loop(factory) -> type:
    made = loops.make(factory)
    made.close()
    return type(made)


# Factories that cannot be used, and a word of the error.
NO_FACTORIES = {
    "no_such_module_here:new": "no_such_module_here",
    "asyncio:NoSuchLoop": "NoSuchLoop",
    "asyncio:": "has no attribute",
    ":new": "Empty module name",
    "sys:maxsize": "not callable",
    "json:dumps": "missing",
    "builtins:dict": "did not make an event loop",
}
if os.name != "nt":  # this is why `choose` refuses it elsewhere
    NO_FACTORIES[PROACTOR] = "ProactorEventLoop"


@pytest.mark.parametrize("factory, word", NO_FACTORIES.items())
def test_what_is_no_factory_is_refused_in_one_line(factory, word):
    with pytest.raises(ImportError, match=f'^--loop "{factory}".*{word}.*$'):
        loops.make(factory)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # since Python 3.14, even to ask
def test_a_run_leaves_the_policy_as_it_was():
    """uvicorn #61, #1523; cpython #127949: the runner gets a factory, never a policy."""
    seen, policy = [asyncio.get_event_loop_policy()], asyncio.get_event_loop_policy

    async def app(scope, receive, send):
        seen.append(policy())
        await send({"type": "lifespan.startup.failed", "message": "enough"})

    assert server.run(app, port=0) == 3
    assert seen == [policy()] * 2


APP = """
import asyncio
async def app(scope, receive, send):
    body = type(asyncio.get_running_loop()).__name__.encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})
"""


class TestWhatRuns:
    """The choice, in a real process. (test_command_line.py has loops that cannot be had.)"""

    @pytest.mark.parametrize(
        "asked, mode",
        [("auto", ""), ("auto", "--workers 2"), ("auto", "--reload"), ("selector", "--workers 2")]
        + [("mine:MyLoop", ""), ("mine:MyLoop", "--workers 2")],
    )
    def test_the_loop_that_was_chosen_runs(self, tmp_path, asked, mode):
        """MyLoop is found as `--loop uvloop:new_event_loop` would be."""
        (tmp_path / "which.py").write_text(APP)
        mine = "import asyncio\nclass MyLoop(asyncio.SelectorEventLoop): ...\n"
        (tmp_path / "mine.py").write_text(mine)
        factory, why = loops.choose(asked, platform=sys.platform, shared=mode != "")
        options = ("--port", 0, "--app-dir", tmp_path, "--loop", asked, *mode.split())
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        with Supervised("which:app", *options, env={"PYTHONPATH": path}) as p:
            with p.connect(p.port()) as client:
                client.send(GET)
                name = client.response()[2].decode()
        assert name == ("MyLoop" if "mine" in asked else class_of_loop(factory).__name__)
        assert f"because {why}" in p.output
