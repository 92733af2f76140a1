# examples/pathsend.py
# A file by its path: the server lets the kernel send it, and Python sees no byte of it.
# Spec: ASGI extensions, "Path Send".
#
# Run:   python server.py pathsend:app
# Try:   curl localhost:8000/pathsend.py; curl -I localhost:8000/chat.py
#        curl --path-as-is localhost:8000/../README.md   (404: only what is listed)
# Look:  server.py, chapter 6, RequestResponseCycle and send_path

import asyncio
import mimetypes
import pathlib

FOLDER = pathlib.Path(__file__).resolve().parent
# A name is looked up and never joined to a folder: no way leads out of it.
FILES = {f"/{file.name}": file for file in FOLDER.iterdir() if file.is_file()}
PIECE = 64 * 1024  # bytes


async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    file = FILES.get(scope["path"])
    if file is None:
        names = "\n".join(["no such file; there are:", *sorted(FILES), ""])
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": names.encode()})
        return
    kind = mimetypes.guess_type(file)[0] or "application/octet-stream"
    size = file.stat().st_size
    headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % size)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if "http.response.pathsend" in scope.get("extensions", {}):
        await send({"type": "http.response.pathsend", "path": str(file)})
        return
    with open(file, "rb") as content:  # every server can do this
        while piece := await asyncio.to_thread(content.read, PIECE):
            more = {"body": piece, "more_body": True}
            await send({"type": "http.response.body", **more})
    await send({"type": "http.response.body"})
