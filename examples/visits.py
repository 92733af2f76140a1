# examples/visits.py
# Open something once, share it with every request: lifespan and its state.
# Spec: ASGI lifespan, "Lifespan State".
#
# Run:   python server.py visits:app
# Try:   curl localhost:8000; curl localhost:8000; then Ctrl-C the server
# Look:  server.py, chapter 4, Lifespan; chapter 5, respond (it copies the state for
#        each request; with --workers each process has a counter of its own)


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await live(scope, receive, send)
    elif scope["type"] == "http":
        counter = scope["state"]["counter"]  # the copy is shallow: one list for all
        counter[0] += 1
        body = b"visit %d\n" % counter[0]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


async def live(scope, receive, send):
    await receive()  # lifespan.startup
    scope["state"]["counter"] = counter = [0]  # where a pool of connections would be
    await send({"type": "lifespan.startup.complete"})
    await receive()  # lifespan.shutdown
    print(f"{counter[0]} visits", flush=True)
    await send({"type": "lifespan.shutdown.complete"})
