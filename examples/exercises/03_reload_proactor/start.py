"""Which event loop? One pure function, which ignores --reload.

Run:   python examples/exercises/03_reload_proactor/start.py
"""

from typing import NamedTuple

SELECTOR = "asyncio:SelectorEventLoop"
PROACTOR = "asyncio:ProactorEventLoop"


class LoopChoice(NamedTuple):
    factory: str
    reason: str  # completes "loop: SelectorEventLoop, because …"


def choose(name: str, *, platform: str, reload: bool) -> LoopChoice:
    """Choose from --loop's value ("auto", "selector" or "proactor"), sys.platform, and
    whether --reload is given. Raises ValueError, one line, where the wish cannot
    work."""
    windows = platform == "win32"
    if name == "proactor" and not windows:
        raise ValueError("--loop proactor exists on Windows only; leave --loop out")
    if name == "proactor":
        return LoopChoice(PROACTOR, "it was asked for")
    if name == "selector":
        return LoopChoice(SELECTOR, "it was asked for")
    if windows:
        return LoopChoice(PROACTOR, "it is asyncio's own choice on Windows")
    return LoopChoice(SELECTOR, "it is asyncio's own choice on this system")


def main() -> None:
    for platform in ("linux", "darwin", "win32"):
        for reload in (False, True):
            for name in ("auto", "selector", "proactor"):
                try:
                    factory, reason = choose(name, platform=platform, reload=reload)
                    said = f"{factory.partition(':')[2]}, because {reason}"
                except ValueError as exc:
                    said = f"refused: {exc}"
                mode = "reload" if reload else "alone"
                print(f"{platform:7} {mode:7} {name:9} {said}")


if __name__ == "__main__":
    main()
