"""Which event loop runs, and why: the whole table, on every system.

`choose` is a pure function, so Windows' rows are tested on Linux too; the processes at
the end show that the choice really is what runs.
"""

import asyncio
import multiprocessing
import os
import sys
import warnings

import pytest
from conftest import GET, PATIENCE, Process

import loops
import server
import sockets

SELECTOR, PROACTOR = "asyncio:SelectorEventLoop", "asyncio:ProactorEventLoop"
OWN, SHARED, ASKED = "asyncio's own choice", "uvicorn #529", "asked for"
NOWHERE, NOT_SHARED, UNKNOWN = "Windows only", "cannot share", "is not known"

# --loop: what happens on (Linux, macOS, Windows alone, Windows with a shared listener).
# A factory and its reason, or why not.
POSIX_OWN = (SELECTOR, OWN)
TABLE = {
    "auto": (POSIX_OWN, POSIX_OWN, (PROACTOR, OWN), (SELECTOR, SHARED)),
    "asyncio": (POSIX_OWN, POSIX_OWN, (PROACTOR, OWN), (SELECTOR, SHARED)),
    "selector": ((SELECTOR, ASKED),) * 4,
    SELECTOR: ((SELECTOR, ASKED),) * 4,
    "proactor": (NOWHERE, NOWHERE, (PROACTOR, ASKED), NOT_SHARED),
    PROACTOR: (NOWHERE, NOWHERE, (PROACTOR, ASKED), NOT_SHARED),
    "uvloop:new_event_loop": (("uvloop:new_event_loop", ASKED),) * 4,
    "uvloop": (UNKNOWN,) * 4,
    "": (UNKNOWN,) * 4,
}
ROWS = [
    (name, platform, shared, outcome)
    for name, (linux, darwin, alone, together) in TABLE.items()
    for platform, shared, outcome in (
        ("linux", False, linux),
        ("linux", True, linux),
        ("darwin", False, darwin),
        ("darwin", True, darwin),
        ("win32", False, alone),
        ("win32", True, together),
    )
]
ALLOWED = [row for row in ROWS if isinstance(row[3], tuple)]
REFUSED = [row for row in ROWS if isinstance(row[3], str)]


class TestTheTable:
    """behaviour.md §1, --loop; bugs.md 2 and 3: name × platform × shared."""

    @pytest.mark.parametrize("name, platform, shared, outcome", ALLOWED)
    def test_a_loop_is_chosen_with_a_reason(self, name, platform, shared, outcome):
        choice = loops.choose(name, platform=platform, shared=shared)
        assert choice.factory == outcome[0]
        assert outcome[1] in choice.reason

    @pytest.mark.parametrize("name, platform, shared, why", REFUSED)
    def test_a_loop_that_cannot_work_is_refused_in_one_line(
        self, name, platform, shared, why
    ):
        with pytest.raises(ValueError) as info:
            loops.choose(name, platform=platform, shared=shared)
        assert why in str(info.value) and "--loop" in str(info.value)
        assert "\n" not in str(info.value)

    def test_a_shared_listener_on_windows_never_gets_a_completion_port(self):
        """bugs.md 2, uvicorn #529: deaf after a reload, WinError 87."""
        for name in TABLE:
            try:
                choice = loops.choose(name, platform="win32", shared=True)
            except ValueError:
                continue
            assert "Proactor" not in choice.factory

    def test_who_shares_decides_and_not_which_option_asked(self):
        """bugs.md 3, uvicorn #1317: the mistake was to ask for --reload alone. Here is
        its answer for --workers 2, with the question put as uvicorn did: not shared."""
        mistake = loops.choose("auto", platform="win32", shared=False)
        right = loops.choose("auto", platform="win32", shared=True)
        assert mistake.factory == PROACTOR and right.factory == SELECTOR

    def test_the_proactor_is_refused_with_the_bug_and_a_way_out(self):
        """bugs.md 2: one line that names the bug."""
        with pytest.raises(ValueError, match="uvicorn #529.*--loop selector"):
            loops.choose("proactor", platform="win32", shared=True)

    def test_a_single_process_on_windows_keeps_more_than_512_sockets(self):
        """uvicorn #786: the selector loop is no default where nobody shares."""
        assert loops.choose("auto", platform="win32", shared=False).factory == PROACTOR


def class_of_loop(factory) -> type:
    """What a factory makes, by its name."""
    made = loops.make(factory)
    made.close()
    return type(made)


class TestLoading:
    """A factory by name: `make` imports and calls it, or says in one line what is wrong."""

    def test_a_factory_is_imported_by_its_name(self):
        assert class_of_loop(SELECTOR) is asyncio.SelectorEventLoop

    @pytest.mark.parametrize(
        "factory, word",
        [
            ("no_such_module_here:new", "no_such_module_here"),
            ("asyncio:NoSuchLoop", "NoSuchLoop"),
            ("asyncio:", "asyncio:"),
            (":new", ":new"),
            ("sys:maxsize", "not"),  # it cannot be called
            ("json:dumps", "missing"),  # it cannot be called so
            ("builtins:dict", "not"),  # it can, and makes something else
        ],
    )
    def test_what_cannot_be_loaded_is_refused_in_one_line(self, factory, word):
        with pytest.raises(ValueError) as info:
            loops.make(factory)
        assert word in str(info.value) and "--loop" in str(info.value)
        assert "\n" not in str(info.value)

    @pytest.mark.skipif(os.name == "nt", reason="Windows has a proactor loop")
    def test_this_system_has_no_proactor_to_load(self):
        """Why `choose` refuses it: asyncio has no such name here."""
        with pytest.raises(ValueError, match="ProactorEventLoop"):
            loops.make(PROACTOR)


def policy():
    """The event-loop policy; only to ask is deprecated since Python 3.14."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return asyncio.get_event_loop_policy()


class TestNoPolicy:
    """uvicorn #61, #1523; cpython #127949: a factory for the runner, never a policy."""

    @pytest.mark.parametrize("name", ["auto", "asyncio", "selector", SELECTOR])
    def test_a_whole_run_leaves_the_policy_as_it_was(self, name):
        seen = []

        async def app(scope, receive, send):
            seen.append((policy(), type(asyncio.get_running_loop())))
            await send({"type": "lifespan.startup.failed", "message": "enough"})

        before = policy()
        assert server.run(app, port=0, loop=name) == 3
        chosen = loops.choose(name, platform=sys.platform, shared=False)
        assert seen == [(before, class_of_loop(chosen.factory))] and policy() is before


APP = """
import asyncio
async def app(scope, receive, send):
    body = type(asyncio.get_running_loop()).__name__.encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})
"""
FACTORY = """
import asyncio
class MyLoop(asyncio.SelectorEventLoop):
    pass
def new_event_loop():
    print("my factory was called", flush=True)
    return MyLoop()
"""


def loop_that_answers(folder, *options) -> tuple[str, str]:
    """The name of the loop class that a request meets, and what the process printed."""
    (folder / "which.py").write_text(APP)
    (folder / "mine.py").write_text(FACTORY)
    beside = filter(None, [os.environ.get("PYTHONPATH")])
    env = {"PYTHONPATH": os.pathsep.join([str(folder), *beside])}
    command = ("which:app", "--port", 0, "--app-dir", folder, *options)
    with Process(*command, env=env) as p:
        with p.connect(p.port()) as client:
            client.send(GET)
            answer = client.response()[2].decode()
        p.interrupt()
        assert p.exit_code() == 0
        return answer, p.output


class TestWhatRuns:
    """The choice, in a real process."""

    def test_the_default_is_what_the_table_says(self, tmp_path):
        chosen = loops.choose("auto", platform=sys.platform, shared=False)
        name, output = loop_that_answers(tmp_path)
        assert name == class_of_loop(chosen.factory).__name__
        assert f"because {chosen.reason}" in output

    def test_the_selector_can_be_asked_for(self, tmp_path):
        name, output = loop_that_answers(tmp_path, "--loop", "selector")
        assert "SelectorEventLoop" in name and "because it was asked for" in output

    def test_a_factory_of_the_user_runs(self, tmp_path):
        """`--loop uvloop:new_event_loop`, without uvloop."""
        name, output = loop_that_answers(tmp_path, "--loop", "mine:new_event_loop")
        assert name == "MyLoop" and "my factory was called" in output

    @pytest.mark.parametrize(
        "factory",
        [
            "json:dumps",  # cannot be called so
            "builtins:dict",  # can be, and gives something else
            "no_such_module_here:new",
            "asyncio:NoSuchLoop",
            "sys:maxsize",
        ],
    )
    def test_a_factory_without_a_loop_is_one_line_and_code_3(self, factory):
        assert self.refused(factory) == 3

    @pytest.mark.parametrize("name", ["nonsense", "uvloop"])
    def test_an_unknown_name_is_one_line_and_code_2(self, name):
        assert self.refused(name) == 2

    def refused(self, name) -> int:
        """The exit code, after one line."""
        with Process("example:app", "--port", 0, "--loop", name) as p:
            code = p.exit_code()
        errors = [line for line in p.lines if " INFO " not in line]
        assert len(errors) == 1 and name in errors[0], p.output
        return code


def accept_with_a_proactor(listener, pipe):
    """A worker's mistake: a completion port for a listener of everybody's."""
    errors = []

    async def main():
        running = asyncio.get_running_loop()
        running.set_exception_handler(
            lambda _, context: errors.append(context["exception"].winerror)
        )
        async with await asyncio.start_server(lambda r, w: w.close(), sock=listener):
            pipe.send(errors)
            await running.run_in_executor(None, pipe.recv)

    with asyncio.Runner(loop_factory=asyncio.ProactorEventLoop) as runner:
        runner.run(main())


class TestTheCauseOnWindows:
    """bugs.md 2 and 3, the mistake itself: cpython #122240."""

    @pytest.mark.skipif(os.name != "nt", reason="completion ports are of Windows")
    def test_a_second_completion_port_for_one_listener_is_winerror_87(self):
        spawn, seen = multiprocessing.get_context("spawn"), []
        [listener] = sockets.bind_tcp("127.0.0.1", 0, 5)
        pipes = [spawn.Pipe(), spawn.Pipe()]
        for ours, theirs in pipes:
            child = spawn.Process(
                target=accept_with_a_proactor, args=(listener, theirs), daemon=True
            )
            child.start()
            assert ours.poll(PATIENCE)
            seen.append(ours.recv())
        for ours, _ in pipes:
            ours.send("stop")
        for child in multiprocessing.active_children():
            child.join(PATIENCE)
        listener.close()
        assert seen == [[], [87]]
