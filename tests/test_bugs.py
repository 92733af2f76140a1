"""The five bugs that foal is built around (bugs.md): each is a closed issue of uvicorn.

Each has a check that passes, and a twin that puts the historical line back and shows
that the same check then fails. What only one system can show is shown there for real;
elsewhere the platform, or the process, is injected.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import tempfile

import pytest
from conftest import GET, PATIENCE, Client
from test_reload import APP, Editor
from test_workers import Supervised, both_ready, get, no_main, supervise, until
from worker_targets import accept_with, obey, tell_listener, use_bare_number

import loops
import server
import sockets
import workers

assert no_main and supervise  # fixtures: used by their names
WINDOWS_ONLY = pytest.mark.skipif(os.name != "nt", reason="the fact is one of Windows")
POSIX_ONLY = pytest.mark.skipif(os.name == "nt", reason="Windows has no such thing")


def run_child(target, *args):
    """What a spawned function says first."""
    ours, theirs = workers.spawn.Pipe()
    child = workers.spawn.Process(target=target, args=(*args, theirs))
    child.start()
    theirs.close()
    with ours:
        said = ours.poll(PATIENCE) and ours.recv()
    child.join(PATIENCE)
    child.close()
    return said


class TestBug1:
    """uvicorn #683, fixed by #802: sharing a socket with spawned workers."""

    def check_listens_before_anybody_is_spawned(self, monkeypatch):
        def spawned(self):
            listeners.extend(self.args[1])
            for listener in listeners:
                with socket.socket() as client:
                    reached.append(client.connect_ex(listener.getsockname()))
            return 0

        listeners, reached = [], []
        monkeypatch.setattr(workers.Supervisor, "run", spawned)
        assert server.run("no_such_module:app", port=0, workers=2) == 0
        assert reached == [0]

    def test_the_parent_listens_before_the_first_worker(self, monkeypatch):
        """uvicorn #683: a client can connect while no worker exists."""
        self.check_listens_before_anybody_is_spawned(monkeypatch)

    def test_twin_bind_here_and_listen_in_the_workers(self, monkeypatch):
        """uvicorn #683, put back: the parent binds, each child calls listen()."""

        def historical(family, address, backlog):
            listener = socket.socket(family)
            listener.bind(address)
            return listener

        monkeypatch.setattr(sockets, "listen_on", historical)
        with pytest.raises(AssertionError):
            self.check_listens_before_anybody_is_spawned(monkeypatch)

    def test_two_workers_answer_on_one_port(self, tmp_path):
        """uvicorn #683: of two workers, one died."""
        (tmp_path / "app.py").write_text(APP)
        options = ("app:app", "--app-dir", tmp_path, "--port", 0, "--workers", 2)
        with Supervised(*options) as p:
            port, pids = both_ready(p)
            until(lambda: {get(port).split()[1] for _ in range(20)} == pids)

    def test_a_listener_survives_pickling(self, no_main):
        """uvicorn #683: the standard library shares it, once, and that is enough."""
        [listener] = sockets.bind_tcp("127.0.0.1", 0, 5)
        with listener:
            said = run_child(tell_listener, listener)
            assert said == (listener.getsockname(), socket.IPPROTO_TCP)

    def test_twin_pass_the_bare_number_of_a_descriptor(self, no_main):
        """uvicorn #683, the student's mistake: it is not inheritable (PEP 446)."""
        [listener] = sockets.bind_tcp("127.0.0.1", 0, 5)
        with listener, socket.socket() as high:
            number = listener.fileno()
            if os.name != "nt":  # a number that no other file has in the child
                number = 900
                os.dup2(listener.fileno(), number, inheritable=False)
            said = run_child(use_bare_number, number)
            if os.name != "nt":
                os.close(number)
            assert high and said in (errno.EBADF, 10038, 10045)  # no socket, or another


def errors_of_two(factory) -> list:
    """What goes wrong where two processes accept on one listener with such loops."""
    [listener] = sockets.bind_tcp("127.0.0.1", 0, 5)
    running, said = [], []
    for _ in range(2):
        ours, theirs = workers.spawn.Pipe()
        args = (factory, listener, theirs)
        child = workers.spawn.Process(target=accept_with, args=args)
        child.start()
        theirs.close()
        running.append((child, ours))
        assert ours.poll(PATIENCE)
        while ours.poll(0.25):  # long enough: accept fails in the loop's first turn
            said.append(ours.recv())
    for child, ours in running:
        ours.close()
        child.join(PATIENCE)
        child.close()
    listener.close()
    assert said.count("ready") == 2
    return [word for word in said if word != "ready"]


class TestBug2:
    """uvicorn #529, fixed by #535: reload and the completion port."""

    def check_a_reloading_server_gets_no_completion_port(self):
        shared = server.Config("app:app", reload=True).shared
        choice = loops.choose("auto", platform="win32", shared=shared)
        assert choice.factory == loops.SELECTOR and "#529" in choice.reason

    def test_a_reloading_server_on_windows_gets_no_completion_port(self):
        """uvicorn #529: the process lived on, and was deaf."""
        self.check_a_reloading_server_gets_no_completion_port()

    def test_twin_take_the_default_of_python_3_8(self, monkeypatch):
        """uvicorn #529, put back: whatever asyncio prefers, shared or not."""

        def historical(name, *, platform, shared):
            default = loops.PROACTOR if platform == "win32" else loops.SELECTOR
            return loops.LoopChoice(default, "it is asyncio's own choice (#529)")

        monkeypatch.setattr(loops, "choose", historical)
        with pytest.raises(AssertionError):
            self.check_a_reloading_server_gets_no_completion_port()


class TestBug3:
    """uvicorn #1317, fixed by #1454: the same with --workers."""

    def check_a_sharing_server_gets_no_completion_port(self):
        for options in ({"reload": True}, {"workers": 2}):
            shared = server.Config("app:app", **options).shared
            choice = loops.choose("auto", platform="win32", shared=shared)
            assert choice.factory == loops.SELECTOR

    def test_it_is_sharing_that_decides(self):
        """uvicorn #1317: not the option, but whether others accept there too."""
        self.check_a_sharing_server_gets_no_completion_port()
        alone = server.Config("app:app").shared
        choice = loops.choose("auto", platform="win32", shared=alone)
        assert choice.factory == loops.PROACTOR  # uvicorn #786, #1220

    def test_twin_ask_for_reload_only(self, monkeypatch):
        """uvicorn #1317, put back: the selector loop for --reload, and no more."""
        monkeypatch.setattr(server.Config, "shared", property(lambda c: c.reload))
        with pytest.raises(AssertionError):
            self.check_a_sharing_server_gets_no_completion_port()

    @pytest.mark.parametrize("options", [["--workers", "2"], ["--reload"]])
    def test_what_runs_is_what_was_chosen(self, options):
        """uvicorn #529, #1317: the line at the start, of the real program."""
        with Supervised("example:app", "--port", 0, *options) as p:
            p.wait_for("loop: .*SelectorEventLoop, because")
            assert "Hello" in get(p.port())


class TestBugs2And3:
    """uvicorn #529 and #1317, for real: two processes, two loops, one listener."""

    def check_two_processes_can_accept(self):
        choice = loops.choose("auto", platform=sys.platform, shared=True)
        assert errors_of_two(choice.factory) == []

    def test_two_processes_accept_with_the_loop_that_we_choose(self, no_main):
        """uvicorn #529 and #1317, for real on every system."""
        self.check_two_processes_can_accept()

    @WINDOWS_ONLY
    def test_twin_two_completion_ports_for_one_listener(self, no_main, monkeypatch):
        """uvicorn #529, put back, for real: WinError 87 in the second of the two."""
        monkeypatch.setattr(loops, "SELECTOR", loops.PROACTOR)
        assert errors_of_two(loops.PROACTOR) == [87]
        with pytest.raises(AssertionError):
            self.check_two_processes_can_accept()


class TestBug4:
    """uvicorn #684, fixed by #744: stopping a child that already died."""

    def check_stopping_the_dead(self, supervise):
        """The worker is dead, and its supervisor has not looked yet: a change."""
        s = supervise(obey)
        s.until_ready()
        [worker] = s.workers
        worker.process.kill()
        worker.process.join(PATIENCE)
        worker.stop(0)
        for _ in range(3):
            worker.next_step = 0.0
            worker.push()
        s.until(lambda: worker not in s.workers)

    def test_a_dead_worker_can_be_stopped(self, supervise):
        """uvicorn #684: every step of a stop asks whether it is still there."""
        self.check_stopping_the_dead(supervise)

    @pytest.mark.parametrize("step", ["stop", "push"])
    def test_twin_os_kill(self, supervise, monkeypatch, step):
        """uvicorn #684, put back: ProcessLookupError; on Windows WinError 5."""

        def historical(worker, *grace):
            os.kill(worker.process.pid, signal.SIGTERM)

        monkeypatch.setattr(workers.Worker, step, historical)
        with pytest.raises((ProcessLookupError, PermissionError)) as raised:
            self.check_stopping_the_dead(supervise)
        assert os.name != "nt" or raised.value.winerror == 5

    def test_the_reloader_survives_a_worker_that_died_of_its_code(self, tmp_path):
        """uvicorn #684: a NameError, a change, and the parent was gone."""
        editor = Editor(tmp_path)
        editor.save(APP + "import os\nos._exit(1)\n")
        with editor.start() as p:
            p.wait_for("waiting for a file to change")
            editor.save(APP + "no_such_name\n")
            port = p.port()
            editor.until_served(port, "NameError", status=500)
            editor.until_served(port, editor.save())
            assert p.process.poll() is None


MODES = {"alone": [], "reload": ["--reload"], "workers": ["--workers", "2"]}


class TestBug5:
    """uvicorn #974, fixed by #975: --port 0, and getpeername() of a listener."""

    def check_address(self, listener):
        assert sockets.describe(listener, "http") == "http://%s:%d" % (
            listener.getsockname()
        )

    def test_a_listener_is_described_by_its_own_name(self):
        """uvicorn #974: it has no peer."""
        [listener] = sockets.bind_tcp("127.0.0.1", 0, 5)
        with listener:
            self.check_address(listener)

    def test_twin_getpeername(self, monkeypatch):
        """uvicorn #974, put back: ENOTCONN, on Windows WinError 10057."""

        def historical(listener, scheme):
            return f"{scheme}://%s:%d" % listener.getpeername()

        monkeypatch.setattr(sockets, "describe", historical)
        [listener] = sockets.bind_tcp("127.0.0.1", 0, 5)
        with listener, pytest.raises(OSError) as raised:
            self.check_address(listener)
        if os.name == "nt":
            assert raised.value.winerror == 10057
        else:
            assert raised.value.errno == errno.ENOTCONN

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
    def test_the_port_that_is_shown_answers(self, mode, host):
        """uvicorn #974, #1890: alone, with reload, with workers."""
        try:
            sockets.bind_tcp(host, 0, 5)[0].close()
        except OSError as exc:
            pytest.skip(f"no {host} here: {exc}")
        options = ("--host", host, "--port", 0, *MODES[mode])
        with Supervised("example:app", *options) as p:
            self.check_answers((host, p.port()))

    @POSIX_ONLY
    @pytest.mark.parametrize("mode", MODES)
    def test_the_unix_socket_that_is_shown_answers(self, mode):
        """uvicorn #974, #1890: in every mode. A short path, for macOS."""
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            path = folder + "/s"
            with Supervised("example:app", "--uds", path, *MODES[mode]) as p:
                p.wait_for(f"listening on unix:{path} ")
                self.check_answers(path)
                p.interrupt()
                assert p.exit_code() == 0
            assert not os.path.exists(path)

    @POSIX_ONLY
    @pytest.mark.parametrize("mode", MODES)
    def test_the_inherited_socket_that_is_shown_answers(self, mode):
        """uvicorn #974, #1890: in every mode."""
        with socket.socket() as given:
            given.bind(("127.0.0.1", 0))
            fd = given.fileno()
            options = ("--fd", fd, *MODES[mode])
            with Supervised("example:app", *options, pass_fds=(fd,)) as p:
                assert p.port() == given.getsockname()[1]
                self.check_answers(given.getsockname())

    def check_answers(self, address):
        with Client(address) as client:
            client.send(GET)
            assert client.response()[0] == 200
