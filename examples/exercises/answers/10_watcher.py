"""Did a file change? The answer is the code that the exercise takes away: read
Watcher.look and Watcher.changed in reload.py, and compare them with yours."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from reload import Watcher

__all__ = ["Watcher"]
