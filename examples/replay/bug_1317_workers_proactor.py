"""uvicorn #1317: the completion port again, now with --workers.

After #529 uvicorn used the selector loop on Windows with --reload, and only there. With
--workers 2 both children got a proactor and the same listener, and WinError 87 again.
It had asked the wrong question. It should not be "are we reloading?" but "will another
process accept on this listener?". Reloading is only one way to get there.

foal asks that question once, and this script shows every answer in one table.

Run:   python examples/replay/bug_1317_workers_proactor.py
Look:  server.py, Config.shared; loops.py, choose
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import loops
import server

MODES = ({}, {"reload": True}, {"workers": 2}, {"reload": True, "workers": 3})


def narrow_fix(config: server.Config) -> str:
    """What the first fix did: it thought only of a reload."""
    return "SelectorEventLoop" if config.reload else "ProactorEventLoop"


def main() -> None:
    print("On Windows, by mode: the mistake, and foal's way.")
    for options in MODES:
        config = server.Config("example:app", **options)
        ours = loops.choose("auto", platform="win32", shared=config.shared)
        name = ours.factory.removeprefix("asyncio:")
        wrong = "  <- deaf" if narrow_fix(config) != name else ""
        flags = " ".join(f"--{key} {value}" for key, value in options.items()) or "alone"
        print(f"  {flags:28} {narrow_fix(config):18} {name}{wrong}")


if __name__ == "__main__":
    main()
