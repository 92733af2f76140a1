"""foal, extended from outside: a WebSocket whose messages may be compressed
(permessage-deflate, RFC 7692), each on its own. As it is, nothing is ever agreed on.

Run:   python examples/exercises/14_compressed_frame/start.py
Try:   open http://localhost:8014, and look at the field Sec-WebSocket-Extensions of the
       handshake in the browser's tools (the tab "Network")
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "server.py").exists())
sys.path.append(str(ROOT))

import server  # noqa: E402
from server import Opcode  # noqa: E402

RSV1 = 0x40  # of the first byte: "this message is compressed" (RFC 7692 §6)
TAIL = b"\x00\x00\xff\xff"  # what a flush ends with, and the sender leaves out (§7.2.1)


def deflate(payload: bytes) -> bytes:
    """Compress a message (RFC 7692 §7.2.1)."""
    return zlib.compress(payload)


def inflate(payload: bytes, limit: int) -> bytes:
    """Decompress a message (RFC 7692 §7.2.2). Raises server.WebSocketError, with 1009 if
    it is larger than `limit`, and with 1007 if it is not deflated."""
    return zlib.decompress(payload)


def agree(offers: list[str]) -> bytes | None:
    """Our answer to the client's offers; None if we can take none (RFC 7692 §5, §7.1)."""
    return None


class InflatingReader(server.FrameReader):
    """Makes messages of bytes; those with RSV1 are compressed."""

    compressed: Opcode | None = None  # what the compressed message is that we read

    def next_header(self) -> server.Wait:
        """The header of a frame, as the base class knows it. A compressed text is binary
        for the base class, so that it does not look for UTF-8 in it. Is done."""
        read = self.read

        def read_first(least: int, most: int) -> server.Wait:
            """For the first two bytes: take the mark away."""
            nonlocal marked
            self.read = read
            first, second = yield from read(least, most)
            # Only the first frame of a message has it (RFC 7692 §6.1).
            marked = bool(first & RSV1) and first & 0x0F in (Opcode.TEXT, Opcode.BINARY)
            return bytes((first & ~RSV1 if marked else first, second))

        marked, self.read = False, read_first
        opcode, final, size = yield from super().next_header()
        if opcode in (Opcode.TEXT, Opcode.BINARY):
            self.compressed = opcode if marked else None
            opcode = Opcode.BINARY if marked else opcode
        return opcode, final, size

    def next(self) -> server.Wait:
        """The next message or control frame, as (opcode, payload)."""
        opcode, payload = yield from super().next()
        return opcode, payload


class CompressingWebSocket(server.WebSocket):
    """One WebSocket, which compresses if its client has offered to."""

    def __init__(self, *request) -> None:
        super().__init__(*request)  # self.fields and self.frames are there now

    def send_message(self, message: server.Message) -> None:
        super().send_message(message)


if __name__ == "__main__":
    server.WebSocket = CompressingWebSocket  # where foal makes one, it looks for this name
    sys.exit(server.run("chat:app", port=8014))
