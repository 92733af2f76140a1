"""Which event loop to run, and why.

Owns: the choice between asyncio's loops, the reason for it, and the refusal of a loop
    that cannot work here. It hands on the name of a factory; `make` calls that.
Must not know: sockets, processes, the command line beyond one word, or what the loop
    will run.

Read beside: Python docs, asyncio — "Runners" (loop_factory), "Platform Support".

The bug that shaped it: on Windows a listener shared by two processes cannot be used
    with a completion port twice: accept fails with WinError 87 and the server is deaf,
    first seen with --reload (uvicorn #529), later with --workers (uvicorn #1317). So
    one pure function answers, from values that a test can vary: name, platform, shared
    or not.

But: no event-loop policies. They are global, deprecated since Python 3.14 and gone in
    3.16 (uvicorn #61, #1523; cpython #127949). And never uvloop unless asked by name.
"""

from __future__ import annotations

import asyncio
import importlib
import socket
from typing import NamedTuple

SELECTOR = "asyncio:SelectorEventLoop"
PROACTOR = "asyncio:ProactorEventLoop"


class LoopChoice(NamedTuple):
    """A loop factory, by name so that it can be compared and shown, and the reason."""

    factory: str  # MODULE:FACTORY
    reason: str  # completes "loop: SelectorEventLoop, because …"


def choose(name: str, *, platform: str, shared: bool) -> LoopChoice:
    """Choose from --loop's value, sys.platform, and whether other processes accept on
    the same listener. Raises ValueError, one line, where the wish cannot work."""
    windows = platform == "win32"
    factory = {"selector": SELECTOR, "proactor": PROACTOR}.get(name, name)

    match factory, windows, shared:
        case "asyncio:ProactorEventLoop", False, _:
            raise ValueError("--loop proactor exists on Windows only; leave --loop out")
        case "asyncio:ProactorEventLoop", True, True:
            raise ValueError(
                "--loop proactor cannot share a listener between processes on Windows "
                "(uvicorn #529); use --loop selector, or one process"
            )
        case "auto" | "asyncio", True, True:
            return LoopChoice(
                SELECTOR,
                "on Windows a shared listener cannot use a completion port "
                "(uvicorn #529)",
            )
        case "auto" | "asyncio", True, False:
            # The selector loop is limited there to 512 sockets, and cannot run
            # subprocesses, so it is no default (uvicorn #786, #1220).
            return LoopChoice(PROACTOR, "it is asyncio's own choice on Windows")
        case "auto" | "asyncio", False, _:
            return LoopChoice(SELECTOR, "it is asyncio's own choice on this system")
    if ":" not in factory:
        raise ValueError(
            f'--loop "{name}" is not known; use auto, asyncio, selector, proactor '
            "or MODULE:FACTORY"
        )
    return LoopChoice(factory, "it was asked for")


def make(factory: str) -> asyncio.AbstractEventLoop:
    """Import MODULE:FACTORY, and call it. Raises ValueError, one line."""
    if factory == PROACTOR and hasattr(asyncio, "IocpProactor"):
        return patient_proactor()
    module_name, _, attribute = factory.partition(":")
    try:
        loop = getattr(importlib.import_module(module_name), attribute)()
    except Exception as exc:  # foreign code, and perhaps no factory at all
        raise ValueError(f'--loop "{factory}" failed: {exc!r}') from None
    if not isinstance(loop, asyncio.AbstractEventLoop):
        raise ValueError(f'--loop "{factory}" made {loop!r}, not an event loop')
    return loop


# Windows' words for "the client has reset it" while it waited in the backlog.
RESET_IN_BACKLOG = (59, 64, 1236, 10054, 10057)


def patient_proactor() -> asyncio.AbstractEventLoop:
    """asyncio's proactor closes its listener for good once a client resets a connection
    that was not yet accepted (cpython #93821). This one accepts the next."""

    class Proactor(asyncio.IocpProactor):
        def accept(self, listener: socket.socket) -> asyncio.Future:
            return asyncio.ensure_future(self.accept_living(listener))

        async def accept_living(self, listener: socket.socket) -> tuple:
            while True:
                try:
                    return await super().accept(listener)
                except OSError as exc:
                    if exc.winerror not in RESET_IN_BACKLOG or listener.fileno() == -1:
                        raise

    return asyncio.ProactorEventLoop(Proactor())
