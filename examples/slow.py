# examples/slow.py
# What a graceful stop waits for: requests first, then what lifespan shutdown awaits.
# Spec: ASGI lifespan, "Shutdown - receive event".
#
# Run:   python server.py slow:app
# Try:   curl localhost:8000   and meanwhile Ctrl-C the server: the answer still comes,
#        then the job that it left behind is done, then the server ends
#        The same with --timeout-graceful-shutdown 1: it waits no longer than that, once
#        for the request (503) and once for the jobs
# Look:  server.py, chapter 3, finish_requests; chapter 4, Lifespan

import asyncio

SECONDS = 2.0


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await live(scope, receive, send)
    elif scope["type"] == "http":
        print("a request", flush=True)
        await asyncio.sleep(SECONDS)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"better late than never\n"})
        job = asyncio.create_task(follow_up())
        scope["state"]["jobs"].add(job)  # the loop alone would not keep it alive
        job.add_done_callback(scope["state"]["jobs"].discard)


async def follow_up():
    """Work that no client waits for: a mail, a line of statistics."""
    print("answered; a job is left", flush=True)
    await asyncio.sleep(SECONDS)
    print("the job is done", flush=True)


async def live(scope, receive, send):
    await receive()  # lifespan.startup
    scope["state"]["jobs"] = jobs = set()
    await send({"type": "lifespan.startup.complete"})
    await receive()  # lifespan.shutdown: no request runs any more
    if jobs:
        await asyncio.wait(jobs)
    print("no job is left", flush=True)
    await send({"type": "lifespan.shutdown.complete"})
