"""`shared` as it has to be; then your proof, against eight ways to get it wrong."""

import itertools

import loops
import pytest
import server


def chosen(config_class, **options) -> str:
    """The loop that Windows would be given."""
    config = config_class("example:app", **options)
    return loops.choose("auto", platform="win32", shared=config.shared).factory


def test_a_reloading_server_shares_its_listener(exercise):
    """uvicorn #529: this much was known."""
    assert chosen(exercise.Config, reload=True) == loops.SELECTOR


@pytest.mark.parametrize("workers", [2, 3, 16])
def test_so_does_a_server_with_workers(exercise, workers):
    """uvicorn #1317: two children, one listener, and no reload."""
    assert chosen(exercise.Config, workers=workers) == loops.SELECTOR


def test_a_single_process_keeps_its_proactor(exercise):
    assert chosen(exercise.Config) == loops.PROACTOR
    assert chosen(exercise.Config, workers=1) == loops.PROACTOR


def test_both_options_at_once_are_no_exception(exercise):
    assert chosen(exercise.Config, reload=True, workers=4) == loops.SELECTOR


def test_the_wish_is_still_refused_where_it_cannot_work(exercise):
    shared = exercise.Config("example:app", workers=2).shared
    with pytest.raises(ValueError, match="cannot share a listener"):
        loops.choose("proactor", platform="win32", shared=shared)


# From here on it is `prove` that is tested.

WRONG = {
    "only reload": lambda c: c.reload,  # uvicorn #1317, put back
    "only workers": lambda c: c.workers > 1,
    "only both": lambda c: c.reload and c.workers > 1,
    "one or the other": lambda c: c.reload != (c.workers > 1),
    "always": lambda c: True,
    "never": lambda c: False,
    "two workers are one": lambda c: c.reload or c.workers > 2,
    "two workers and no more": lambda c: c.reload or c.workers == 2,
}


def config_with(shared) -> type[server.Config]:
    return type("Config", (server.Config,), {"shared": property(shared)})


def test_the_mistakes_are_mistakes():
    """Each differs somewhere from what foal does, and no two are the same."""
    cases = list(itertools.product((False, True), (1, 2, 3)))
    tables = [
        tuple(
            config_with(shared)("example:app", reload=reload, workers=workers).shared
            for reload, workers in cases
        )
        for shared in [*WRONG.values(), server.Config.shared.fget]
    ]
    assert len(set(tables)) == len(tables)


def test_the_proof_accepts_what_is_right(exercise):
    exercise.prove(server.Config)


def test_the_proof_accepts_your_own(exercise):
    exercise.prove(exercise.Config)


@pytest.mark.parametrize("mistake", WRONG)
def test_the_proof_finds_the_mistake(exercise, mistake):
    with pytest.raises(AssertionError):
        exercise.prove(config_with(WRONG[mistake]))
