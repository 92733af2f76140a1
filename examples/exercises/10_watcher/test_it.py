"""Real folders, real files; what is a test's own is when the next look is due."""

import os
import time

import pytest


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with an app, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "app.py", "v1")
    return tmp_path


@pytest.fixture
def watch(exercise, tree):
    """Make a watcher that takes no rest, and counts its looks."""

    class Eager(exercise.Watcher):
        looks = 0

        def look(self):
            self.looks += 1
            found = super().look()
            self.next_look = 0.0
            return found

    return lambda **options: Eager([str(tree)], **options)


def write(path, text="text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def touch(path, seconds: float) -> None:
    """Give a file a time of change of its own, whatever the clock's steps are."""
    stat = path.stat()
    times = (stat.st_atime_ns, stat.st_mtime_ns + int(seconds * 1e9))
    os.utime(path, ns=times)


def answer(watcher) -> str:
    """After two looks: one that finds, and one that finds no more."""
    first = watcher.changed()
    assert first == "", f"it did not wait for the end of the saves: {first}"
    return watcher.changed()


def told(watcher) -> str:
    """What it says sooner or later, for tests to which the waiting does not matter."""
    return watcher.changed() + watcher.changed()


# Step 1: what counts as a change.


def test_a_saved_file_is_a_change(watch, tree):
    watcher = watch()
    touch(tree / "app.py", 1)
    assert told(watcher) == "changed: app.py"


def test_nothing_is_said_where_nothing_changes(watch):
    watcher = watch()
    assert [watcher.changed() for _ in range(5)] == [""] * 5


def test_a_deleted_file_is_a_change(watch, tree):
    watcher = watch()
    (tree / "app.py").unlink()
    assert told(watcher) == "changed: app.py"


def test_a_renamed_file_is_two(watch, tree):
    """Its time of change is the old one."""
    watcher = watch()
    (tree / "app.py").rename(tree / "main.py")
    assert told(watcher) == "changed: app.py, main.py"


def test_an_older_version_is_a_change(watch, tree):
    """git stash, or an archive: newer in the folder, older by its date."""
    watcher = watch()
    touch(tree / "app.py", -3600)
    assert told(watcher) == "changed: app.py"


def test_another_size_at_the_same_time_is_a_change(watch, tree):
    """Clocks have steps, and a file can be saved twice within one."""
    watcher = watch()
    before = (tree / "app.py").stat()
    write(tree / "app.py", "a longer text")
    os.utime(tree / "app.py", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert told(watcher) == "changed: app.py"


@pytest.mark.skipif(os.name == "nt", reason="a listing has no inode numbers there")
def test_another_file_in_its_place_is_a_change(watch, tree):
    """How many editors save: a new file, renamed; with size and time of the old."""
    watcher = watch()
    before = (tree / "app.py").stat()
    write(tree / "app.tmp", "v2")
    os.utime(tree / "app.tmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(tree / "app.tmp", tree / "app.py")
    assert told(watcher) == "changed: app.py"


# Step 2: which files are watched.


def test_files_in_folders_below_are_watched(watch, tree):
    watcher = watch()
    write(tree / "shop" / "cart.py")
    assert told(watcher) == "changed: " + os.path.join("shop", "cart.py")


def test_what_is_excluded_is_not_watched(watch, tree):
    write(tree / "made.py")
    watcher = watch(exclude=["made*.py"])
    touch(tree / "made.py", 1)
    assert told(watcher) == ""


def test_what_is_included_is_watched_as_well(watch, tree):
    write(tree / "page.html")
    watcher = watch(include=["*.html"])
    touch(tree / "page.html", 1)
    assert told(watcher) == "changed: page.html"


# Step 3: when a series of saves is over.


def test_quick_saves_are_one_change(watch, tree):
    """An editor that saves three files, or a switch of branches."""
    watcher = watch()
    for n in range(1, 4):
        write(tree / f"{n}.py")
        touch(tree / "app.py", n)
        assert watcher.changed() == "", "it may go on"
    assert watcher.changed() == "changed: 1.py, 2.py, 3.py and 1 more"
    assert watcher.changed() == ""


def test_a_file_that_came_and_went_is_a_change(watch, tree):
    """What if a worker has read it in between?"""
    watcher = watch()
    write(tree / "new.py")
    assert watcher.changed() == ""
    (tree / "new.py").unlink()
    assert answer(watcher) == "changed: new.py"


# Step 4: what it costs.


def test_there_is_no_look_before_the_time_has_come(watch):
    """A supervisor may ask a thousand times a second."""
    watcher = watch()
    watcher.next_look = time.monotonic() + 3600
    assert [watcher.changed() for _ in range(5)] == [""] * 5
    assert watcher.looks == 1


def test_the_next_look_is_a_delay_away(exercise, tree):
    watcher = exercise.Watcher([str(tree)], delay=3600)
    assert watcher.next_look > time.monotonic() + 3000


def test_a_file_that_goes_while_we_look_is_no_error(exercise, tree):
    """Listed a moment ago, deleted since. (Windows tells size and time in the listing
    itself, and notices nothing.)"""

    class Unlucky(exercise.Watcher):
        def walk(self, top):
            for entry in super().walk(top):
                os.unlink(entry.path)
                yield entry

    assert Unlucky([str(tree)], delay=0).changed() == ""
    assert not (tree / "app.py").exists(), "look asks walk which files there are"
