"""uvicorn #529: on Windows, a reload leaves the server deaf.

Python 3.8 made the proactor Windows' default event loop. It waits by a completion port,
and a socket may be tied to one completion port only, once in its life; a duplicate in
another process counts. So the first child could accept, and after a reload the second
could not: "Accept failed on a socket", WinError 87. The process went on, but deaf.

The fix was to use the selector loop on Windows, always. Its price: 512 sockets at most,
and no subprocesses. So it was narrowed, and that was the next bug (uvicorn #1317).
foal asks one function, and prints its answer with the reason.

Run:   python examples/replay/bug_529_reload_proactor.py   (the error: on Windows only)
Look:  loops.py, choose
"""

import asyncio
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import loops


async def accept_one(listener: socket.socket) -> None:
    """Accept once: this is what ties a listener to the loop's completion port."""
    with socket.create_connection(listener.getsockname()):
        (await asyncio.get_running_loop().sock_accept(listener))[0].close()


def show(listener: socket.socket) -> None:
    """Two loops, one listener: a child and the child that replaces it, in one process."""
    for which in ("first", "second"):
        try:
            with asyncio.Runner(loop_factory=asyncio.ProactorEventLoop) as runner:
                runner.run(accept_one(listener))
            print(f"  the {which} proactor accepts")
        except OSError as exc:
            print(f"  the {which} proactor: {exc}")


def main() -> None:
    print("The mistake: one listener, two proactors.")
    if sys.platform == "win32":
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            show(listener)
    else:
        print("  it takes Windows to see WinError 87")
    print("foal's way: a shared listener gets a selector, on Windows.")
    choice = loops.choose("auto", platform="win32", shared=True)
    print(f"  {choice.factory}, because {choice.reason}")


if __name__ == "__main__":
    main()
