"""reload.py: the import of an app and the watcher alone, and then `python server.py --reload`
while a test plays the editor."""

import os
import re
import shutil
import sys
import time
import types
from pathlib import Path

import pytest
from conftest import POSIX_ONLY, fetch
from frames import handshake
from test_workers import APP, APPS, FAILS, STARTUP, Hurried, eventually, text_of

import reload
import server
import workers
from reload import Watcher


def write(path, text="text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# ── The import alone. ──


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """The current folder, with an app. Imports of the test are undone at its end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "examples" not in path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = dict(sys.modules)
    write(tmp_path / "main.py", "class app: inner = 'the app'\n")
    yield tmp_path
    for name in set(sys.modules) - set(before):
        del sys.modules[name]
    sys.modules.update(before)


def error(name, folder) -> ImportError:
    with pytest.raises(ImportError) as info:
        reload.load(name, str(folder))
    return info.value


# The text of main.py, and the sentence about it.
BROKEN_MODULES = {
    "x = = 1": "SyntaxError in main.py, line 1",
    "\nimport helper": "SyntaxError in helper.py, line 2",
    "\n1 / 0": "ZeroDivisionError: division by zero in main.py, line 2",
    "\nraise KeyError": "KeyError in main.py, line 2",
    "raise ValueError('a\\nb')": "ValueError: a b in main.py, line 1",
    "import json\njson.loads('')": "JSONDecodeError: .* in main.py, line 2",
    "import sys; sys.path[:0] = ['site-packages']\nimport lib": "KeyError in main.py, line 2",
    "import absent": "ModuleNotFoundError: No module named 'absent' in main.py, line 1",
    "raise SystemExit('bye')": "SystemExit: bye in main.py, line 1",
}
OWN = {
    "server/__init__.py": "def double(numbers): return 2 * numbers",
    "server/main.py": """
import concurrent.futures, multiprocessing, server, workers.tasks, loops, sockets.all, reload
found = [workers.tasks.own, loops.own, sockets.all.own, reload.own]
def spawned():
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        return str(pool.submit(server.double, found).result())
""" + APP.replace("str(os.getpid())", "spawned()"),
    "workers/tasks.py": "own = 1", "loops.py": "own = 2",
    "sockets/all.py": "own = 3", "reload/__init__.py": "own = 4",
}  # fmt: skip


class TestLoad:
    """What a user can get wrong in MODULE:ATTRIBUTE, and the sentence about each, is in
    test_command_line.py."""

    def test_an_app_is_imported_from_its_folder_first_and_the_examples_last(self, tree):
        for name in ("main", "echo"):  # there is an example of that name, too
            write(tree / "behind" / f"{name}.py", "app = 'another'")
        sys.path.insert(0, str(tree / "behind"))
        assert reload.load("main:app.inner", str(tree)) == "the app"
        assert reload.load("echo:app", str(tree)) == "another"
        assert reload.load("slow:app", str(tree)).__module__ == "slow"

    @pytest.mark.parametrize("text, words", BROKEN_MODULES.items())
    def test_an_error_inside_the_module_is_named_with_its_place(self, tree, text, words):
        write(tree / "main.py", text)
        write(tree / "helper.py", "\n)")
        write(tree / "site-packages" / "lib.py", "raise KeyError")
        found = error("main:app", tree)
        assert re.fullmatch(f'cannot import "main": {words}', str(found))
        assert type(found.__cause__).__name__ in words
        traceback = reload.app_traceback(found.__cause__)
        assert "reload.py" not in traceback and "importlib" not in traceback
        assert "main.py" in traceback or "helper.py" in traceback

    def test_the_file_that_lacks_an_attribute_is_named(self, tree):
        """Perhaps Python has found another module than the one that is meant."""
        assert re.fullmatch(r'"this" \(.*this.py\) has no "app"', str(error("this:app", tree)))
        assert "is no MODULE:ATTRIBUTE" in str(error(".main:app", tree))

    def test_ctrl_c_is_no_error_of_the_app(self, tree):
        write(tree / "main.py", "raise KeyboardInterrupt")
        with pytest.raises(KeyboardInterrupt):
            reload.load("main:app", str(tree))

    def test_in_our_own_folder_our_names_stay_ours(self, tree):
        assert reload.load("reload:load", reload.HERE) is reload.load

    @pytest.mark.parametrize("mode", ["", "--workers 2", "--reload"])
    def test_an_app_may_use_our_names(self, tree, mode):
        """Packages with and without __init__.py, and modules; also in processes of its own."""
        for path, text in OWN.items():
            write(tree / path, text)
        with Hurried("server.main:app", "--port", 0, *mode.split(), cwd=tree) as p:
            assert text_of(p.port()) == str([1, 2, 3, 4] * 2)


# ── The watcher alone. ──


class Eager(Watcher):
    """A watcher that does not rest between two looks."""

    def look(self):
        found = super().look()
        self.next_look = 0.0
        return found

    def answer(self) -> str:
        """After two looks: one that finds the changes, and one that finds no more."""
        assert self.changed() == ""
        return self.changed()


def touch(path, seconds: float) -> None:
    """Give a file another time of change, whatever the steps of the clock are."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + int(seconds * 1e9)))


def replace(tree):
    """How most editors save; here the new file has the time and the size of the old one."""
    shutil.copy2(tree / "main.py", tree / "draft")
    os.replace(tree / "draft", tree / "main.py")


def grow(tree):
    """Another size, in the same file and with the same time."""
    shutil.copy2(tree / "main.py", tree / "draft")
    write(tree / "main.py", "longer" * 9)
    shutil.copystat(tree / "draft", tree / "main.py")


CHANGES = {
    "a new time": (lambda tree: touch(tree / "main.py", 0.001), "main.py"),
    "another size at the same time": (grow, "main.py"),
    "an older time": (lambda tree: touch(tree / "main.py", -3600), "main.py"),  # git stash
    "deleted": (lambda tree: (tree / "main.py").unlink(), "main.py"),
    "renamed": (lambda tree: (tree / "main.py").rename(tree / "b.py"), "b.py, main.py"),
    "new and empty": (lambda tree: write(tree / "new.py", ""), "new.py"),
    "new in a new folder": (lambda tree: write(tree / "sub" / "a.py"), os.path.join("sub", "a.py")),
    "three": (lambda tree: [write(tree / f"{n}.py") for n in "abc"], "a.py, b.py, c.py"),
    "a deleted folder": (lambda tree: shutil.rmtree(tree / "old"), os.path.join("old", "a.py")),
}
if os.name != "nt":  # on Windows a listing has no inode numbers
    CHANGES["another file in its place"] = (replace, "main.py")


class TestChanges:
    """It sees new, changed, renamed and deleted files."""

    @pytest.mark.parametrize("change, names", CHANGES.values(), ids=CHANGES)
    def test_a_change_is_seen_and_named_once(self, tree, change, names):
        write(tree / "old" / "a.py")
        watcher = Eager([str(tree)])
        assert watcher.answer() == ""
        change(tree)
        assert watcher.answer() == f"changed: {names}"
        assert watcher.answer() == ""

    def test_several_quick_saves_are_one_change(self, tree):
        watcher = Eager([str(tree)])
        for n in range(1, 4):
            write(tree / f"{n}.py")
            touch(tree / "main.py", n)
            assert watcher.changed() == ""  # because it may go on
        assert watcher.changed() == "changed: 1.py, 2.py, 3.py and 1 more"
        assert watcher.changed() == ""

    def test_each_of_several_folders_is_watched_also_from_another_one(self, tree, monkeypatch):
        for name in ("one", "two", "here"):
            write(tree / name / "app.py")
        watcher = Eager(["one", str(tree / "two")])
        monkeypatch.chdir(tree / "here")
        for name in ("one", "two"):
            touch(tree / name / "app.py", 1)
            assert watcher.answer() == f"changed: {Path('..') / name / 'app.py'}"

    @POSIX_ONLY
    def test_a_change_without_a_relative_path_is_named_all_the_same(self, tree, monkeypatch):
        """There is none from a deleted folder, and on Windows none between two drives."""
        (tree / "gone").mkdir()
        monkeypatch.chdir(tree / "gone")
        (tree / "gone").rmdir()
        assert reload.shown(str(tree / "main.py")) == str(tree / "main.py")


# path: include and exclude patterns, and whether the file is watched.
PATTERNS = [
    ("page.html", "", "", False), ("page.html", "*.html", "", True),
    ("sub/deep/page.html", "*.html", "", True), ("page.htm", "*.html", "", False),
    ("app.py", "*.html", "", True),  # included always
    ("templates/sub/a.txt", "templates/*", "", True), ("other/a.txt", "templates/*", "", False),
    ("Makefile", "Makefile", "", True), ("conf/a.toml", "*.html conf/?.toml", "", True),
    ("sub/test_app.py", "", "test_*", False), ("app.py", "", "test_*", True),
    ("migrations/sub/a.py", "", "migrations/*", False),
    ("migrations/a.py", "", "migrations", False),
    ("sub/migrations/a.py", "", "migrations/*", True),  # counted from the watched folder
    ("sub/migrations/a.py", "", "*/migrations/*", False),
    ("a.html", "*.html", "a.*", False),  # exclude wins
]  # fmt: skip


class TestWhatIsWatched:
    """uvicorn #1265, #2166: patterns that did nothing. Skipped folders cost nothing."""

    @pytest.mark.parametrize("path, include, exclude, expected", PATTERNS)
    def test_patterns_decide(self, tree, path, include, exclude, expected):
        watcher = Eager([str(tree)], include.split(), exclude.split())
        write(tree / path, "new")
        assert (watcher.answer() != "") == expected

    @pytest.mark.parametrize(
        "name, inside",
        [(name, "") for name in (".git", "node_modules", "__pycache__", "site-packages")]
        + [("env", "pyvenv.cfg"), ("excluded", "")],
    )
    def test_a_folder_without_source_is_not_walked(self, tree, monkeypatch, name, inside):
        """A virtual environment is walked no deeper than to its mark, but the watched folder
        may be one: `python -m venv .` where the app is."""
        write(tree / "pyvenv.cfg")
        write(tree / "sub" / name / "deep" / "file.py")
        write(tree / "sub" / name / (inside or "file.py"))
        listed, scandir = [], os.scandir
        monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
        watcher = Eager([str(tree)], exclude=["excluded"])
        assert set(watcher.files) == {str(tree / "main.py")}
        assert not [path for path in listed if "deep" in path]
        assert (name in "".join(listed)) == bool(inside)

    @POSIX_ONLY
    def test_a_link_is_followed_to_a_file_but_not_to_a_folder(self, tree, tmp_path_factory):
        """A link to a folder above would lead in circles."""
        target = tmp_path_factory.mktemp("target") / "real.py"
        write(target)
        os.symlink(target, tree / "link.py")
        os.symlink(tree / "nowhere", tree / "broken.py")
        os.symlink(tree, tree / "circle")
        watcher = Eager([str(tree)])
        assert set(watcher.files) == {str(tree / "main.py"), str(tree / "link.py")}
        touch(target, 1)
        assert watcher.answer() == "changed: link.py"

    @POSIX_ONLY
    def test_what_vanishes_while_it_is_looked_at_counts_as_deleted(self, tree, monkeypatch):
        """A folder, or a file that was listed: stat comes later."""
        for path in ("a/file.py", "b/file.py"):
            write(tree / path)
        watcher, walk = Eager([str(tree)]), Watcher.walk

        def vanishing(self, top):
            for entry in walk(self, top):
                for name in "ab" * (entry.name == "file.py"):
                    shutil.rmtree(tree / name, ignore_errors=True)
                yield entry

        monkeypatch.setattr(Watcher, "walk", vanishing)
        assert watcher.answer() == "changed: a/file.py, b/file.py"


def test_the_rest_grows_and_shrinks_with_the_time_of_a_look(tree, monkeypatch):
    """A look at 20,000 files must not cost more than a tenth of one core."""
    clock, cost, looks = [100.0], [0.0], []

    def walk(self, top):
        clock[0] += cost[0]
        looks.append(clock[0])
        return iter(())

    monkeypatch.setattr(reload, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(Watcher, "walk", walk)
    watcher = Watcher([str(tree)], delay=0.25)
    for cost[0], rest in [(0.01, 0.25), (1.0, 0.25), (0.0, 10.0), (0.0, 0.25)]:
        before, known = clock[0], len(looks)
        while len(looks) == known:
            clock[0] += 0.01
            watcher.changed()
        assert looks[-1] - before - cost[0] == pytest.approx(rest, abs=0.02)


def test_the_delay_is_that_of_the_option(monkeypatch):
    delay_of = lambda supervisor: supervisor.should_restart.__self__.delay  # noqa: E731
    monkeypatch.setattr(workers.Supervisor, "run", delay_of)
    assert server.supervise(server.Config("x:app", reload=True, reload_delay=7.0), [], print) == 7.0


# ── The whole program. ──

# What an editor may save: words that the page and the log then have.
BROKEN = {
    'cannot import "app": SyntaxError in .*app.py, line': APP + "def broken(\n",
    "NameError: name 'no_such_name' .* in .*app.py, line": APP + "no_such_name\n",
    "SystemExit: a reason in .*app.py, line": APP + "raise SystemExit('a reason')\n",
    "no database": APP.replace(STARTUP, FAILS),
    '"app" .*app.py. has no "app"': APP.replace("async def app", "async def appl"),
}


class Editor:
    """Saves versions of an app, and asks the server what it makes of them."""

    def __init__(self, folder):
        self.path = folder / "app.py"
        self.count = 1
        write(self.path, APP)
        self.options = ("app:app", "--app-dir", folder, "--port", 0, "--reload")
        self.options += ("--reload-delay", 0.05)

    def start(self, *options, **process):
        return Hurried(*self.options, *options, **process)

    def save(self, text: str = APP) -> str:
        """A new version, as most editors do it: the new file takes the place of the old
        one. Its size is another one, too."""
        self.count += 1
        name = f"v{self.count}"
        draft = self.path.with_suffix(".draft")
        write(draft, text.replace('"v1"', f'"{name}"') + "#" * self.count + "\n")
        os.replace(draft, self.path)
        return name

    def ask(self, port) -> str:
        """The version of the code that answers, or the page that shows why it is broken."""
        status, fields, body = fetch(("127.0.0.1", port))
        if status == 200:
            return fields["version"]
        fields = {name.lower(): value for name, value in fields.items()}
        assert (status, fields["content-type"]) == (500, "text/plain; charset=utf-8")
        return body.decode()

    def until_served(self, port, words) -> str:
        """Until new connections get this answer."""
        return eventually(lambda: re.search(words, page := self.ask(port)) and page)


@pytest.fixture
def editor(tmp_path):
    return Editor(tmp_path)


class TestReload:
    def test_a_save_brings_new_code_and_an_open_stream_does_not_hold_it_up(self, editor):
        """uvicorn #2943. The new code answers while the stream of the old one is open. Half
        way through the grace, who still waits for a body is told that its client left."""
        with editor.start("--timeout-graceful-shutdown", 2) as p:
            port = p.port()
            head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
            with p.connect(port) as stream, p.connect(port) as slow, p.connect(port) as silent:
                stream.send(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
                stream.read_until(b"still")
                slow.send(head + b"o")
                silent.send(head)
                saved = time.monotonic()
                editor.until_served(port, editor.save())
                assert time.monotonic() - saved < 8  # two seconds on an idle machine
                stream.sock.recv(2**20)  # what was sent until now
                stream.unread = b""
                stream.read_until(b"still")
                slow.send(b"k")
                assert slow.response()[1]["version"] == "v1"  # the old code answers
                assert silent.response()[1]["version"] == "v1"  # once it is told, half way
            p.wait_for("the lifespan ends v1")

    def test_broken_code_is_shown_in_both_places_until_it_is_mended(self, editor):
        """And also if it is broken from the start."""
        editor.save(APPS["name_error"])
        with editor.start() as p:
            p.wait_for("serves only an error page after")
            port = p.port()
            with p.connect(port) as client:  # a WebSocket is refused with the same page
                client.send(handshake())
                assert b"no_such_name" in client.response()[2]
            for words, text in BROKEN.items():
                editor.save(text)
                page = editor.until_served(port, words)
                p.wait_for(words)
                assert ('app.py", line ' in page) == ("line" in words), page
                assert "server.py" not in page and "importlib" not in page
                editor.until_served(port, editor.save())
            p.count("is ready after", 5)
            p.interrupt()
            assert p.exit_code() == 0
        assert "GET /: the app failed" not in p.output
        assert p.output.count('app.py", line ') == 4  # each once, and that of the start
        assert p.output.count("is ready after") == 5

    def test_a_save_while_a_worker_starts_is_not_lost(self, editor):
        editor.save(APP + "import time\nwhile True: time.sleep(0.02)\n")
        with editor.start() as p:
            p.wait_for("importing")
            new = editor.save()
            editor.until_served(p.port(), new)
            p.interrupt()
            assert p.exit_code() == 0
        assert p.output.count("listening on") == 1

    def test_an_app_that_ends_its_own_process_is_waited_for(self, editor):
        """uvicorn #684: --reload survives whatever a worker dies of."""
        editor.save(APP + "os._exit(7)\n")
        with editor.start("--workers", 2) as p:
            p.wait_for("exited with code 7 .*before it was ready; waiting for a file")
            new = editor.save()
            port = p.port()
            editor.until_served(port, new)
            editor.save(APP + "os._exit(8)\n")
            p.wait_for("exited with code 8 .*before it was ready; waiting for a file")
            assert new in editor.ask(port)  # the old one still serves
            p.interrupt()  # it can be stopped while it waits
            assert p.exit_code() == 0
        assert p.output.count("exited with code 7") == 1

    def test_a_save_of_the_same_size_in_the_same_second_is_not_lost(self, editor):
        """Python compares a compiled file with its source by whole seconds and size."""
        second, half = 1_700_000_000 * 10**9, 5 * 10**8
        os.utime(editor.path, ns=(second, second))
        with editor.start() as p:
            port = p.port()
            editor.until_served(port, "v1")
            write(editor.path, APP.replace("v1", "v2"))
            os.utime(editor.path, ns=(second + half, second + half))
            p.count("exited with code 0", 1)
            assert "v2" in editor.ask(port)

    def test_the_options_reach_the_watcher(self, editor, tmp_path):
        pages, code = tmp_path / "pages", tmp_path / "code"
        write(pages / "page.html")
        write(code / "test_this.py")
        options = ["--reload-dir", pages, "--reload-dir", code]
        options += ["--reload-include", "*.html", "--reload-exclude", "test_*"]
        with editor.start(*options) as p:
            p.port()
            editor.save()  # not in a watched folder
            touch(code / "test_this.py", 5)
            touch(pages / "page.html", 5)
            changed = p.wait_for(r"changed: (.*): replacing")[1]
        assert changed.endswith("page.html") and "," not in changed
        assert f"watching {pages}, {code}" in p.output
