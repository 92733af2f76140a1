"""Every way in which an app can answer, or fail to, as one table."""

import asyncio

import pytest

DEADLINE = 0.5  # seconds; only a server that waits for ever takes so long
STARTED = {"type": "lifespan.startup.complete"}
ENDED = {"type": "lifespan.shutdown.complete"}


async def plain(scope, receive, send):
    assert await receive() == {"type": "lifespan.startup"}
    await send(STARTED)
    assert await receive() == {"type": "lifespan.shutdown"}
    await send(ENDED)


async def takes_its_time(scope, receive, send):
    await receive()
    for _ in range(10):
        await asyncio.sleep(0)
    scope["state"]["started"] = True
    await send(STARTED)
    await receive()
    for _ in range(10):
        await asyncio.sleep(0)
    scope["state"]["ended"] = True
    await send(ENDED)


async def fails_to_start(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})


async def fails_and_stays(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.failed"})
    await asyncio.Event().wait()  # for ever


async def knows_http_only(scope, receive, send):
    raise NotImplementedError(scope["type"])


async def raises_at_startup(scope, receive, send):
    await receive()
    raise NotImplementedError("what is a lifespan?")


async def returns_at_once(scope, receive, send):
    return


async def returns_at_startup(scope, receive, send):
    await receive()


async def dies_later(scope, receive, send):
    await receive()
    await send(STARTED)
    raise ValueError("and now this")


async def leaves_later(scope, receive, send):
    await receive()
    await send(STARTED)


async def fails_to_end(scope, receive, send):
    await plain_startup(receive, send)
    await send({"type": "lifespan.shutdown.failed", "message": "disk full"})


async def dies_at_the_end(scope, receive, send):
    await plain_startup(receive, send)
    raise ValueError("disk full")


async def leaves_at_the_end(scope, receive, send):
    await plain_startup(receive, send)


async def ends_and_stays(scope, receive, send):
    await plain_startup(receive, send)
    await send(ENDED)
    await asyncio.Event().wait()


async def plain_startup(receive, send):
    await receive()
    await send(STARTED)
    await receive()


TABLE = [
    # the app            startup                  shutdown
    (plain, "complete", "complete"),
    (takes_its_time, "complete", "complete"),
    (fails_to_start, "failed: no database", "ended"),
    (fails_and_stays, "failed: ", "ended"),
    (knows_http_only, "unsupported", "ended"),
    (raises_at_startup, "unsupported", "ended"),
    (returns_at_once, "unsupported", "ended"),
    (returns_at_startup, "unsupported", "ended"),
    (dies_later, "complete", "ended"),
    (leaves_later, "complete", "ended"),
    (fails_to_end, "complete", "failed: disk full"),
    (dies_at_the_end, "complete", "ended"),
    (leaves_at_the_end, "complete", "ended"),
    (ends_and_stays, "complete", "complete"),
]
APPS = pytest.mark.parametrize("app", [row[0] for row in TABLE], ids=lambda a: a.__name__)


def life(exercise, app):
    """(what startup said, what shutdown said, tasks left)"""

    async def run():
        lifespan = exercise.Lifespan(app)
        async with asyncio.timeout(DEADLINE):
            started = await lifespan.startup()
        async with asyncio.timeout(DEADLINE):
            ended = await lifespan.shutdown()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        return started, ended, left

    return asyncio.run(run())


@pytest.mark.parametrize("app, started, ended", TABLE, ids=[row[0].__name__ for row in TABLE])
def test_what_the_server_learns(exercise, app, started, ended):
    assert life(exercise, app)[:2] == (started, ended)


@APPS
def test_no_task_is_left_behind(exercise, app):
    """A server that could not start exits; one that has shut down does so, too."""
    assert life(exercise, app)[2] == set()


def test_what_the_app_keeps_is_there_when_it_has_started(exercise):
    """ASGI lifespan, "Lifespan State": and here it shows who was waited for."""

    async def run():
        lifespan = exercise.Lifespan(takes_its_time)
        await lifespan.startup()
        after_startup = dict(lifespan.state)
        await lifespan.shutdown()
        return after_startup, lifespan.state

    started, ended = {"started": True}, {"started": True, "ended": True}
    assert asyncio.run(run()) == (started, ended)


def test_a_wrong_answer_is_the_apps_mistake(exercise):
    """What if the answer is to another question? send raises, where the mistake is."""
    seen = []

    async def app(scope, receive, send):
        await receive()
        try:
            await send(ENDED)
        except RuntimeError:
            seen.append("raised")
            raise

    assert life(exercise, app)[0] == "unsupported"
    assert seen == ["raised"]


def test_a_second_answer_does_no_harm(exercise):
    """Raise or ignore it; but what was said first stands."""

    async def app(scope, receive, send):
        await receive()
        await send(STARTED)
        await send({"type": "lifespan.startup.failed", "message": "no, wait"})

    assert life(exercise, app)[:2] == ("complete", "ended")
