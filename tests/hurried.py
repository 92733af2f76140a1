"""`python server.py` with a supervisor that looks ten times as often: for tests that wait
for many looks. The worker processes are the same."""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import server  # noqa: E402
import workers  # noqa: E402

workers.TICK /= 10

if __name__ == "__main__":
    sys.modules["__main__"] = server  # as server.py does: it is what workers import
    sys.exit(server.main())
