"""foal's configuration, with one property as it was in 2020: the question is too narrow.

Run:   python examples/exercises/07_workers_proactor/start.py
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
        return self.reload


def prove(config_class: type[server.Config]) -> None:
    """Raise AssertionError unless `shared` of this class is right for all options."""


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
