"""The five bugs that foal is built around. Each is a closed issue of uvicorn.

Each has a check. A test shows that it passes, that it fails once the historical mistake is put
back, and where it can, the fact itself. A fact of Windows is shown there for real.
"""

import contextlib
import errno
import os
import signal
import socket
import sys

import pytest
from conftest import PATIENCE
from test_workers import Supervised, no_main, supervise, text_of
from worker_targets import accept_with, obey, tell_listener, use_bare_number

import loops
import server
import sockets
import workers

assert no_main and supervise  # fixtures: used by their names


@contextlib.contextmanager
def child(target, *args):
    """A spawned function, and our end of its pipe."""
    ours, theirs = workers.spawn.Pipe()
    process = workers.spawn.Process(target=target, args=(*args, theirs))
    process.start()
    theirs.close()
    with ours:
        assert ours.poll(PATIENCE)
        yield ours
    process.join(PATIENCE)
    process.close()


@pytest.fixture
def listener():
    [listener] = sockets.bind_tcp("127.0.0.1", 0, 5)
    with listener:
        yield listener


@pytest.fixture
def twin(monkeypatch):
    """A check passes; with a mistake put in the place of an attribute it fails."""

    def twin(check, owner, name, mistake, error=AssertionError):
        check()
        monkeypatch.setattr(owner, name, mistake)
        with pytest.raises(error) as raised:
            check()
        return raised.value

    return twin


class TestBug1:
    """uvicorn #683, fixed by #802: sharing a socket with spawned workers."""

    def test_the_parent_listens_before_the_first_worker(self, monkeypatch, twin):
        """The mistake: the parent binds, and listen is left to the workers."""

        def spawned(self):
            for listener in self.args[1]:
                with socket.socket() as client:
                    reached.append(client.connect_ex(listener.getsockname()))
            return 0

        def check():
            reached.clear()
            assert server.run("no_such_module:app", port=0, workers=2) == 0
            assert reached == [0]

        def historical(family, address, backlog):
            listener = socket.socket(family)
            listener.bind(address)
            return listener

        reached = []
        monkeypatch.setattr(workers.Supervisor, "run", spawned)
        twin(check, sockets, "listen_on", historical)

    def test_a_listener_survives_pickling_but_its_bare_number_does_not(self, no_main, listener):
        """The standard library passes on the protocol, too (uvicorn #3149). The mistake of a
        student: a descriptor is not inherited (PEP 446)."""
        with child(tell_listener, listener) as pipe:
            assert pipe.recv() == (listener.getsockname(), socket.IPPROTO_TCP)
        number = listener.fileno()
        if os.name != "nt":  # a number that no other file has in the child
            number = os.dup2(number, 200, inheritable=False)
        with child(use_bare_number, number) as pipe:
            assert pipe.recv() in (errno.EBADF, 10038, 10045)
        os.close(number) if os.name != "nt" else None


def check_a_server_that_shares_gets_no_completion_port():
    for options in ({"reload": True}, {"workers": 2}):
        shared = server.Config("app:app", **options).shared
        choice = loops.choose("auto", platform="win32", shared=shared)
        assert choice.factory == loops.SELECTOR


class TestBug2:
    """uvicorn #529, fixed by #535: reload and the completion port of Windows."""

    def test_a_server_that_shares_does_not_take_the_default_of_windows(self, twin):
        """The mistake: what asyncio prefers since Python 3.8, shared or not."""

        def historical(name, *, platform, shared):
            return loops.LoopChoice(loops.PROACTOR, "it is asyncio's own choice")

        twin(check_a_server_that_shares_gets_no_completion_port, loops, "choose", historical)


class TestBug3:
    """uvicorn #1317, fixed by #1454: the same with --workers."""

    def test_it_is_sharing_that_decides(self, twin):
        """The mistake: to ask for --reload only."""
        assert not server.Config("app:app").shared
        check = check_a_server_that_shares_gets_no_completion_port
        twin(check, server.Config, "shared", property(lambda config: config.reload))

    @pytest.mark.parametrize("mistake", [False, True] if os.name == "nt" else [False])
    def test_two_processes_accept_with_the_loop_that_is_chosen(self, no_main, listener, mistake):
        """With two completion ports: WinError 87 in the second process (cpython #122240)."""
        said, choice = [], loops.choose("auto", platform=sys.platform, shared=True)
        factory = loops.PROACTOR if mistake else choice.factory
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                pipe = stack.enter_context(child(accept_with, factory, listener))
                while pipe.poll(0.25):  # accept fails in the first turn of the loop
                    said.append(pipe.recv())
        assert sorted(said, key=str) == [87] * mistake + ["ready", "ready"]


class TestBug4:
    """uvicorn #684, fixed by #744: stopping a child that already died."""

    @pytest.mark.parametrize("step", ["stop", "push"])
    def test_a_dead_worker_can_be_stopped(self, supervise, twin, step):
        """The mistake: os.kill, which raises ProcessLookupError, on Windows WinError 5."""

        def check():
            """The worker is dead, and a change comes before its supervisor sees that."""
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

        def historical(worker, *grace):
            os.kill(worker.process.pid, signal.SIGTERM)

        error = PermissionError if os.name == "nt" else ProcessLookupError
        twin(check, workers.Worker, step, historical, error)


class TestBug5:
    """uvicorn #974, fixed by #975: --port 0, and getpeername() of a listener."""

    def test_a_listener_is_described_by_its_own_name(self, listener, twin):
        """A listener has no peer: ENOTCONN; on Windows WinError 10057."""

        def check():
            url = "http://%s:%d" % listener.getsockname()
            assert sockets.describe(listener, "http") == url

        def historical(listener, scheme):
            return f"{scheme}://%s:%d" % listener.getpeername()

        error = twin(check, sockets, "describe", historical, OSError)
        assert error.errno in (errno.ENOTCONN, 10057)

    @pytest.mark.skipif(os.name == "nt", reason="Windows does not inherit descriptors")
    @pytest.mark.parametrize("mode", ["", "--reload", "--workers 2"])
    def test_the_address_that_is_shown_answers(self, listener, mode):
        """uvicorn #1890: in every mode. (test_processes.py has all other kinds of address.)"""
        fd = listener.fileno()
        with Supervised("example:app", "--fd", fd, *mode.split(), pass_fds=(fd,)) as p:
            assert p.port() == listener.getsockname()[1]
            assert "Hello" in text_of(listener.getsockname()[1])
