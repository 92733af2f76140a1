"""reload.py: the watcher alone, on folders of its own, and then `python server.py
--reload` while a test plays the editor."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
import types

import pytest
from conftest import GET, Client
from test_workers import HAS_PROC, Hurried, Load, until, wait_for_count

import reload
from reload import Watcher

POSIX_ONLY = pytest.mark.skipif(os.name == "nt", reason="Windows has no such thing")

# ── The watcher alone. ──


class Eager(Watcher):
    """A watcher that takes no rest, and counts its looks."""

    looks = 0

    def look(self):
        self.looks += 1
        found = super().look()
        self.next_look = 0.0
        return found

    def answer(self) -> str:
        """After two looks: one that finds, and one that finds no more."""
        assert self.changed() == ""
        return self.changed()


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with an app, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "app.py", "v1")
    return tmp_path


def write(path, text="text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def touch(path, seconds: float) -> None:
    """Give a file a time of change of its own, whatever the clock's steps are."""
    stat = path.stat()
    times = (stat.st_atime_ns, stat.st_mtime_ns + int(seconds * 1e9))
    os.utime(path, ns=times)


def change_time(tree):
    touch(tree / "app.py", 0.001)


def change_size_only(tree):
    stat = (tree / "app.py").stat()
    write(tree / "app.py", "a longer text")
    os.utime(tree / "app.py", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def go_back_in_time(tree):
    """An older version, with its old date: git stash, tar, rsync -t."""
    touch(tree / "app.py", -3600)


def replace_by_rename(tree):
    """How most editors save: with the size and time of the old one, for once."""
    stat = (tree / "app.py").stat()
    write(tree / "app.tmp", "v2")
    os.utime(tree / "app.tmp", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(tree / "app.tmp", tree / "app.py")


PLACE = (replace_by_rename, "app.py")  # on Windows a listing has no inode numbers
CHANGES = {
    "a new time": (change_time, "app.py"),
    "another size at the same time": (change_size_only, "app.py"),
    "an older time": (go_back_in_time, "app.py"),
    **({} if os.name == "nt" else {"another file in its place": PLACE}),
    "deleted": (lambda tree: (tree / "app.py").unlink(), "app.py"),
    "renamed": (lambda tree: (tree / "app.py").rename(tree / "b.py"), "app.py, b.py"),
    "new": (lambda tree: write(tree / "new.py"), "new.py"),
    "new and empty": (lambda tree: write(tree / "new.py", ""), "new.py"),
    "new in a new folder": (
        lambda tree: write(tree / "sub" / "deep" / "new.py"),
        os.path.join("sub", "deep", "new.py"),
    ),
}


class TestChanges:
    """behaviour.md §6: sees new, changed, renamed and deleted files."""

    @pytest.mark.parametrize("change, names", CHANGES.values(), ids=CHANGES)
    def test_a_change_is_seen_and_named_once(self, tree, change, names):
        watcher = Eager([str(tree)])
        change(tree)
        assert watcher.answer() == f"changed: {names}"
        assert watcher.answer() == ""

    def test_nothing_is_seen_where_nothing_changes(self, tree):
        watcher = Eager([str(tree)])
        assert [watcher.changed() for _ in range(5)] == [""] * 5

    def test_several_quick_saves_are_one_change(self, tree):
        watcher = Eager([str(tree)])
        for n in range(1, 4):
            write(tree / f"{n}.py")
            touch(tree / "app.py", n)
            assert watcher.changed() == ""  # because it may go on
        assert watcher.changed() == "changed: 1.py, 2.py, 3.py and 1 more"
        assert watcher.changed() == ""

    def test_the_same_file_saved_twice_is_one_change(self, tree):
        watcher = Eager([str(tree)])
        for n in (1, 2):
            touch(tree / "app.py", n)
            assert watcher.changed() == ""
        assert watcher.changed() == "changed: app.py"

    def test_a_file_that_came_and_went_is_a_change(self, tree):
        """What if a worker has read it in between?"""
        watcher = Eager([str(tree)])
        write(tree / "new.py")
        assert watcher.changed() == ""
        (tree / "new.py").unlink()
        assert watcher.answer() == "changed: new.py"

    def test_a_folder_that_comes_later_is_watched(self, tree):
        watcher = Eager([str(tree / "later")])
        assert watcher.answer() == ""
        write(tree / "later" / "new.py")
        assert "new.py" in watcher.answer()

    def test_a_folder_that_goes_takes_its_files_along(self, tree):
        write(tree / "sub" / "one.py")
        watcher = Eager([str(tree)])
        shutil.rmtree(tree / "sub")
        assert "one.py" in watcher.answer()

    def test_each_of_several_folders_is_watched(self, tree):
        folders = [tree / "one", tree / "two", tree]  # and a file in two of them
        for folder in folders:
            write(folder / "app.py", "v1")
        watcher = Eager([str(folder) for folder in folders])
        for folder in folders:
            touch(folder / "app.py", 1)
            name = os.path.relpath(folder / "app.py")
            assert watcher.answer() == f"changed: {name}"

    def test_a_relative_folder_stays_the_one_it_was(self, tree, monkeypatch):
        watcher = Eager(["."])
        (tree / "elsewhere").mkdir()
        monkeypatch.chdir(tree / "elsewhere")
        assert watcher.answer() == ""
        touch(tree / "app.py", 1)
        assert watcher.answer().endswith("app.py")

    def test_a_change_without_a_relative_path_is_named_all_the_same(
        self, tree, monkeypatch
    ):
        """Windows has none between two drives, and no system from a deleted folder."""

        def relpath(path):
            raise ValueError("path is on mount 'D:', start on mount 'C:'")

        monkeypatch.setattr(os.path, "relpath", relpath)
        watcher = Eager([str(tree)])
        touch(tree / "app.py", 1)
        assert "app.py" in watcher.answer()


class TestPatterns:
    """uvicorn #1265, #2166: patterns that silently did nothing."""

    def seen(self, tree, path, **patterns) -> bool:
        watcher = Eager([str(tree)], **patterns)
        write(tree / path, "new")
        return watcher.answer() != ""

    @pytest.mark.parametrize(
        "path, include, expected",
        [
            ("page.html", (), False),
            ("page.html", ("*.html",), True),
            ("sub/deep/page.html", ("*.html",), True),
            ("page.htm", ("*.html",), False),
            ("app2.py", ("*.html",), True),  # besides Python's own
            ("templates/page.txt", ("templates/*",), True),
            ("templates/sub/page.txt", ("templates/*",), True),
            ("other/page.txt", ("templates/*",), False),
            ("Makefile", ("Makefile",), True),
            ("conf/a.toml", ("*.html", "conf/?.toml"), True),
        ],
    )
    def test_what_is_included_is_seen(self, tree, path, include, expected):
        assert self.seen(tree, path, include=include) == expected

    @pytest.mark.parametrize(
        "path, exclude, expected",
        [
            ("test_app.py", ("test_*",), False),
            ("sub/test_app.py", ("test_*",), False),
            ("app2.py", ("test_*",), True),
            ("migrations/one.py", ("migrations/*",), False),
            ("migrations/sub/one.py", ("migrations/*",), False),
            ("migrations/one.py", ("migrations",), False),
            ("sub/migrations/one.py", ("migrations/*",), True),  # from the top on
            ("sub/migrations/one.py", ("*/migrations/*",), False),
            ("a.html", ("a.*",), False),  # exclude wins
        ],
    )
    def test_what_is_excluded_is_not(self, tree, path, exclude, expected):
        patterns = {"include": ("*.html",), "exclude": exclude}
        assert self.seen(tree, path, **patterns) == expected

    @POSIX_ONLY
    def test_paths_count_from_the_folder_even_if_it_is_the_root(self, monkeypatch):
        """Many a container has its app there."""
        watcher = Eager.__new__(Eager)
        watcher.include, watcher.exclude = ["etc/passwd"], []
        folders = {}
        for path, name in (("/", "etc"), ("/etc", "passwd")):
            with os.scandir(path) as listing:
                only = [entry for entry in listing if entry.name == name]
            folders[path] = contextlib.nullcontext(only)
        monkeypatch.setattr(os, "scandir", folders.__getitem__)
        assert [entry.path for entry in watcher.walk("/")] == ["/etc/passwd"]


class TestWhatIsNotWalked:
    """Issue 3.3: a big .venv or node_modules inside the tree costs nothing."""

    def walked(self, tree, monkeypatch) -> set[str]:
        """The folders that a look lists, below the top."""
        listed = []
        scandir = os.scandir

        def spy(path):
            listed.append(os.path.relpath(path, tree))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", spy)
        Eager([str(tree)])
        return set(listed) - {"."}

    @pytest.mark.parametrize(
        "name", [".git", ".venv", ".tox", "node_modules", "__pycache__", "site-packages"]
    )
    def test_a_folder_without_source_is_not(self, tree, monkeypatch, name):
        write(tree / name / "deep" / "file.py")
        write(tree / "sub" / name / "deep" / "file.py")
        assert self.walked(tree, monkeypatch) == {"sub"}

    def test_a_virtual_environment_is_known_by_its_mark(self, tree, monkeypatch):
        write(tree / "env" / "pyvenv.cfg")
        write(tree / "env" / "lib" / "file.py")
        assert self.walked(tree, monkeypatch) == {"env"}

    def test_one_around_the_code_is_no_reason_to_see_nothing(self, tree, monkeypatch):
        """`python -m venv .` where the app is."""
        write(tree / "pyvenv.cfg")
        write(tree / "sub" / "file.py")
        assert self.walked(tree, monkeypatch) == {"sub"}
        assert str(tree / "app.py") in Eager([str(tree)]).files

    def test_an_excluded_folder_is_not(self, tree, monkeypatch):
        write(tree / "big" / "deep" / "file.py")
        monkeypatch.setattr(Eager, "walk", Watcher.walk)
        watcher = Eager([str(tree)], exclude=("big",))
        assert set(watcher.files) == {str(tree / "app.py")}

    @POSIX_ONLY
    def test_a_link_to_a_folder_above_does_not_lead_in_circles(self, tree, monkeypatch):
        write(tree / "sub" / "file.py")
        os.symlink(tree, tree / "sub" / "circle")
        assert self.walked(tree, monkeypatch) == {"sub"}

    @POSIX_ONLY
    def test_a_link_to_a_file_is_watched_where_it_leads(self, tree, tmp_path_factory):
        target = tmp_path_factory.mktemp("target") / "real.py"
        write(target)
        os.symlink(target, tree / "link.py")
        os.symlink(tree / "nowhere", tree / "broken.py")
        watcher = Eager([str(tree)])
        touch(target, 1)
        assert watcher.answer() == "changed: link.py"

    @pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
    def test_a_folder_that_cannot_be_read_is_passed_over(
        self, tree, monkeypatch, error
    ):
        """Unreadable, or deleted since its parent was listed."""
        write(tree / "sub" / "file.py")
        scandir = os.scandir

        def refuse(path):
            if os.path.basename(path) == "sub":
                raise error(path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        watcher = Eager([str(tree)])
        touch(tree / "app.py", 1)
        assert watcher.answer() == "changed: app.py"

    def test_a_file_that_vanishes_while_we_look_is_a_deleted_one(
        self, tree, monkeypatch
    ):
        write(tree / "gone.py")
        watcher = Eager([str(tree)])

        def walk(top):
            for entry in list(Watcher.walk(watcher, top)):
                if os.path.exists(tree / "gone.py") and entry.name == "gone.py":
                    os.unlink(tree / "gone.py")
                    entry = types.SimpleNamespace(path=entry.path, stat=vanished)
                yield entry

        def vanished():
            raise FileNotFoundError

        monkeypatch.setattr(watcher, "walk", walk)
        assert watcher.answer() == "changed: gone.py"


class TestRest:
    """Cheap enough to be asked often: issue 3.3, 20,000 files."""

    def watcher(self, tree, monkeypatch, costs) -> tuple[Eager, list[float]]:
        """A watcher whose looks take this long, by a clock of ours: [now]."""
        clock = [100.0]
        monkeypatch.setattr(
            reload, "time", types.SimpleNamespace(monotonic=lambda: clock[0])
        )

        def walk(self, top):
            clock[0] += costs[0]
            return iter(())

        monkeypatch.setattr(Watcher, "walk", walk)
        watcher = Watcher([str(tree)], delay=0.25)
        watcher.looks = 0
        look = watcher.look

        def counted():
            watcher.looks += 1
            return look()

        watcher.look = counted
        return watcher, clock

    def wait(self, watcher, clock) -> float:
        """How long until the next look, in steps of ten milliseconds."""
        before, looks = clock[0], watcher.looks
        while watcher.looks == looks:
            clock[0] += 0.01
            now = clock[0]
            watcher.changed()
        return now - before

    @pytest.mark.parametrize("cost, rest", [(0.0, 0.25), (0.01, 0.25), (1.0, 10.0)])
    def test_it_grows_with_the_time_of_a_look(self, tree, monkeypatch, cost, rest):
        watcher, clock = self.watcher(tree, monkeypatch, [cost])
        assert self.wait(watcher, clock) == pytest.approx(rest, abs=0.02)

    def test_it_shrinks_again(self, tree, monkeypatch):
        costs = [1.0]
        watcher, clock = self.watcher(tree, monkeypatch, costs)
        costs[0] = 0.001
        assert self.wait(watcher, clock) == pytest.approx(10, abs=0.02)
        assert self.wait(watcher, clock) == pytest.approx(0.25, abs=0.02)


# ── The whole program. ──

APP = """
import asyncio, os

VERSION = "v1"

def say(words):
    os.write(1, f"{words} {VERSION} {os.getpid()}\\n".encode())  # in one piece

say("importing")

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        say("the lifespan ends")
        return await send({"type": "lifespan.shutdown.complete"})
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while scope["path"] == "/stream":
        await send({"type": "http.response.body", "body": b"still %a;" % VERSION,
                    "more_body": True})
        await asyncio.sleep(0.02)
    while (await receive()).get("more_body"):
        pass
    body = f"{VERSION} {os.getpid()}".encode()
    await send({"type": "http.response.body", "body": body})
"""
STARTUP = '        await send({"type": "lifespan.startup.complete"})'
BROKEN = {
    "SyntaxError": APP + "def broken(\n",
    "NameError": APP + "no_such_name\n",
    "SystemExit": APP + "raise SystemExit('a reason')\n",
    "no database": APP.replace(
        STARTUP,
        '        return await send({"type": "lifespan.startup.failed", '
        '"message": "no database"})',
    ),
    "did you mean": APP.replace("async def app", "async def appl"),
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
        """A new version, as most editors do it: the new file takes the old one's
        place. The size differs, too."""
        self.count += 1
        name = f"v{self.count}"
        draft = self.path.with_suffix(".draft")
        write(draft, text.replace('"v1"', f'"{name}"') + "#" * self.count + "\n")
        os.replace(draft, self.path)
        return name

    def ask(self, port) -> tuple[int, str]:
        with Client(("127.0.0.1", port)) as client:
            client.send(GET)
            status, _, body = client.response()
            return status, body.decode()

    def until_served(self, port, words, status=200) -> str:
        """Until new connections get this answer."""

        def served():
            answer = self.ask(port)
            return answer[0] == status and words in answer[1] and answer[1]

        return until(served)


@pytest.fixture
def editor(tmp_path):
    return Editor(tmp_path)


class TestReload:
    """behaviour.md §6, the last row."""

    def test_a_save_brings_new_code_and_the_old_shuts_down(self, editor):
        with editor.start() as p:
            port = p.port()
            assert "v1" in editor.until_served(port, "v1")
            saved = time.monotonic()
            new = editor.save()
            editor.until_served(port, new)
            assert time.monotonic() - saved < 8  # two seconds on an idle machine
            p.wait_for("the lifespan ends v1")
            p.wait_for("exited with code 0")
            p.interrupt()
            assert p.exit_code() == 0
        assert "changed: " in p.output and "app.py: replacing workers" in p.output
        assert p.output.count("listening on") == 1
        assert f"the lifespan ends {new}" in p.output
        assert "Traceback" not in p.output

    def test_an_open_stream_does_not_hold_it_up(self, editor):
        """uvicorn #2943. The new code answers while the stream is still open."""
        with editor.start("--timeout-graceful-shutdown", 3600) as p:
            port = p.port()
            with p.connect(port) as stream:
                stream.send(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
                stream.read_until(b"still 'v1';")
                editor.until_served(port, editor.save())
                stream.unread = b""
                for _ in range(20):
                    stream.read_until(b"still 'v1';")

    def test_a_stream_ends_half_way_through_the_grace(self, editor):
        with editor.start("--timeout-graceful-shutdown", 1) as p:
            port = p.port()
            with p.connect(port) as client:
                head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
                client.send(head)
                with p.connect(port) as slow:
                    slow.send(head + b"o")
                    editor.until_served(port, editor.save())
                    slow.send(b"k")
                    assert b"v1" in slow.response()[2]  # it was asked of the old code
                assert b"v1" in client.response()[2]  # told that nobody listens
            p.wait_for("the lifespan ends v1")

    def test_broken_code_is_shown_in_both_places_until_it_is_mended(self, editor):
        with editor.start() as p:
            port = p.port()
            for words in ("SyntaxError", "NameError", "no database"):
                editor.save(BROKEN[words])
                page = editor.until_served(port, words, status=500)
                p.wait_for(words)
                assert ('app.py", line ' in page) == (words != "no database"), page
                assert "server.py" not in page and "importlib" not in page
            editor.until_served(port, editor.save())
            p.interrupt()
            assert p.exit_code() == 0
        assert p.output.count('app.py", line ') == 2

    def test_the_page_is_text_and_shows_the_line(self, editor):
        editor.save(BROKEN["NameError"])
        with editor.start() as p, p.connect(p.port()) as client:
            client.send(GET)
            status, fields, body = client.response()
        assert (status, fields["content-type"]) == (500, "text/plain; charset=utf-8")
        assert b"app.py" in body and b"\n    no_such_name" in body

    @pytest.mark.parametrize("words", ["SystemExit", "did you mean"])
    def test_code_broken_from_the_start_is_waited_for(self, editor, words):
        editor.save(BROKEN[words])
        with editor.start() as p:
            port = p.port()
            assert words in editor.until_served(port, words, status=500)
            editor.until_served(port, editor.save())

    def test_three_workers_reload_as_one_does(self, editor):
        """uvicorn #1413 makes the two exclusive."""
        with editor.start("--workers", 3) as p:
            port = p.port()
            wait_for_count(p, "is ready after", 3)
            for expected in (200, 500, 200):
                new = editor.save(BROKEN["NameError"] if expected == 500 else APP)
                words = "NameError" if expected == 500 else new
                wait_for_count(p, "exited with code 0", 3 * (editor.count - 1))
                for _ in range(12):
                    status, body = editor.ask(port)
                    assert status == expected and words in body
        assert p.output.count("listening on") == 1

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
            assert new in editor.ask(port)[1]  # which still serves
            editor.until_served(port, editor.save())
        assert p.output.count("exited with code 7") == 1

    def test_it_can_be_stopped_while_it_waits_for_a_change(self, editor):
        editor.save(APP + "os._exit(7)\n")
        with editor.start() as p:
            p.wait_for("waiting for a file to change")
            p.interrupt()
            assert p.exit_code() == 0

    def test_a_save_of_the_same_size_in_the_same_second_is_not_lost(self, editor):
        """What if Python takes the compiled old code for the new? It compares seconds
        and sizes, no more."""
        second, half = 1_700_000_000 * 10**9, 5 * 10**8
        os.utime(editor.path, ns=(second, second))
        with editor.start() as p:
            port = p.port()
            editor.until_served(port, "v1")
            write(editor.path, APP.replace("v1", "v2"))
            os.utime(editor.path, ns=(second + half, second + half))
            wait_for_count(p, "exited with code 0", 1)
            assert "v2" in editor.ask(port)[1]

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
        shown = re.search("watching (.*)", p.output)[1]
        assert shown == f"{pages}, {code}"

    def test_five_reloads_lose_no_request_and_leave_nothing_behind(self, editor):
        """behaviour.md §7.6, in the parent."""
        with editor.start("--no-access-log") as p:
            port = p.port()
            fds = f"/proc/{p.process.pid}/fd"
            before = os.listdir(fds) if HAS_PROC else []
            with Load(port) as load:
                for n in range(1, 6):
                    editor.save()
                    wait_for_count(p, "exited with code 0", n)
                load.goes_on()
            assert load.failed == []
            assert len(os.listdir(fds) if before else []) == len(before)

    @POSIX_ONLY
    def test_a_hangup_reloads_too(self, editor):
        with editor.start() as p:
            port = p.port()
            old = editor.until_served(port, "v1")
            p.process.send_signal(signal.SIGHUP)
            p.wait_for("exited with code 0")
            assert editor.ask(port)[1] != old
