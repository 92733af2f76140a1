"""`python server.py` with a supervisor that looks ten times as often; its workers do not."""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import server  # noqa: E402
import workers  # noqa: E402

if __name__ == "__main__":
    workers.TICK /= 10
    sys.modules["__main__"] = server  # as server.py does: this is what workers import
    sys.exit(server.main())
