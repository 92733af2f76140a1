"""uvicorn #684: a parent that dies of stopping a dead child.

The app has a NameError. The reloader's child dies of it. The developer mends the file, the
reloader sees the change, wants to stop the old child first, calls os.kill(pid, SIGTERM),
and dies itself: PermissionError (WinError 5) on Windows, ProcessLookupError elsewhere
once the child has been reaped. Worse, the number may be another process's by then.

foal closes the child's pipe, which cannot fail, even if the child is dead. If a child does
not exit after that, Process.terminate() asks first whether the process is still there.

Run:   python examples/replay/bug_684_dead_child.py
Look:  workers.py, Worker.stop and Worker.push
"""

import multiprocessing
import os
import signal

spawn = multiprocessing.get_context("spawn")


def child(pipe) -> None:
    raise SystemExit(1)  # as a NameError in the app would end it


def dead_child():
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    process.join()  # reaped: another process may get its number now
    return process, ours


def main() -> None:
    process, pipe = dead_child()
    print(f"A child has died, with exit code {process.exitcode}.")
    print("The mistake: a signal to its number.")
    try:
        os.kill(process.pid, signal.SIGTERM)
    except OSError as exc:
        print(f"  the parent would die of {exc!r}")
    print("foal's way: close its pipe, then terminate(), then kill().")
    pipe.close()
    process.terminate()
    process.kill()
    print("  the parent lives")


if __name__ == "__main__":
    main()
