"""Which event loop to run, and why.

Owns: the choice of an event loop, its reason, and the refusal of what cannot work.
Must not know: addresses, processes, or what the loop will run.

Read beside: Python docs, asyncio — "Runners" (loop_factory), "Platform Support".

The bug that shaped it: on Windows two processes cannot both use a completion port for
    one listener. In the second one accept fails with WinError 87 (uvicorn #529 with
    --reload, #1317 with --workers). So one pure function decides, and tests can ask it.

But: no event-loop policies: Python 3.16 removes them (uvicorn #61; cpython #127949).
"""

from __future__ import annotations

import asyncio
import importlib
import socket
from typing import NamedTuple

SELECTOR = "asyncio:SelectorEventLoop"
PROACTOR = "asyncio:ProactorEventLoop"


class LoopChoice(NamedTuple):
    """A loop factory, by name so that it can be compared and logged, and the reason."""

    factory: str  # MODULE:FACTORY
    reason: str  # completes "loop: SelectorEventLoop, because …"


def choose(name: str, *, platform: str, shared: bool) -> LoopChoice:
    """Choose by --loop's value, sys.platform, and whether other processes accept on the
    same listeners. Raises ValueError, one line, if the loop asked for cannot work."""
    windows = platform == "win32"
    factory = {"selector": SELECTOR, "proactor": PROACTOR}.get(name, name)

    match factory, windows, shared:
        case "asyncio:ProactorEventLoop", False, _:
            raise ValueError("--loop proactor exists on Windows only; leave --loop out")
        case "asyncio:ProactorEventLoop", True, True:
            why = "--loop proactor cannot share a listener between processes"
            raise ValueError(f"{why} (uvicorn #529); use selector, or one process")
        case "auto" | "asyncio", True, True:
            why = "on Windows a shared listener cannot use a completion port"
            return LoopChoice(SELECTOR, f"{why} (uvicorn #529)")
        case "auto" | "asyncio", True, False:
            # The selector loop of Windows has at most 512 sockets and cannot run
            # subprocesses (uvicorn #786, #1220). A single process avoids it.
            return LoopChoice(PROACTOR, "it is asyncio's own choice on Windows")
        case "auto" | "asyncio", False, _:
            return LoopChoice(SELECTOR, "it is asyncio's own choice on this system")
    if ":" not in factory:
        known = "auto, asyncio, selector, proactor or MODULE:FACTORY"
        raise ValueError(f'--loop "{factory}" is not known; use {known}')
    return LoopChoice(factory, "it was asked for")


def make(factory: str) -> asyncio.AbstractEventLoop:
    """Import MODULE:FACTORY and call it. Raises ImportError, one line."""
    if factory == PROACTOR and hasattr(asyncio, "IocpProactor"):
        return patient_proactor()
    module_name, _, attribute = factory.partition(":")
    try:
        loop = getattr(importlib.import_module(module_name), attribute)()
    except Exception as exc:  # foreign code, and perhaps not a factory at all
        raise ImportError(f'--loop "{factory}" failed: {exc}') from None
    if not isinstance(loop, asyncio.AbstractEventLoop):
        raise ImportError(f'--loop "{factory}" did not make an event loop')
    return loop


# Windows' error numbers for a client that was lost before it was accepted.
RESET_IN_BACKLOG = (59, 64, 1236, 10054, 10057)


def patient_proactor() -> asyncio.AbstractEventLoop:
    """asyncio's proactor closes its listener when a client resets a connection that was
    not yet accepted (cpython #93821). This proactor accepts the next client instead."""

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
