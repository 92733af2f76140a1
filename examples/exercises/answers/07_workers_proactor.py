"""Who shares a listener? The answer. foal's own is server.Config.shared.

Run:   python examples/exercises/answers/07_workers_proactor.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import loops
import server


class Config(server.Config):
    @property
    def shared(self) -> bool:
        """Will other processes than this one accept on the listeners?"""
        return self.reload or self.workers > 1


def prove(config_class: type[server.Config]) -> None:
    """Raise AssertionError unless `shared` of this class is right for all options."""
    # The smallest table in which no cell follows from the others: each option without
    # the other, both, none, and the number next to the limit on either side.
    for reload, workers, expected in (
        (False, 1, False),
        (False, 2, True),
        (False, 5, True),
        (True, 1, True),
        (True, 2, True),
    ):
        config = config_class("example:app", reload=reload, workers=workers)
        assert config.shared is expected, f"reload={reload}, workers={workers}"


def main() -> None:
    for options in (
        {},
        {"reload": True},
        {"workers": 2},
        {"reload": True, "workers": 2},
    ):
        config = Config("example:app", **options)
        choice = loops.choose("auto", platform="win32", shared=config.shared)
        print(f"{options}: {choice.factory}, because {choice.reason}")


if __name__ == "__main__":
    main()
