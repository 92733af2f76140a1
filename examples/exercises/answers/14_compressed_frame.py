"""foal, extended from outside: a WebSocket whose messages may be compressed
(permessage-deflate, RFC 7692), each on its own. The answer to the exercise.

Run:   python examples/exercises/answers/14_compressed_frame.py
Try:   open http://localhost:8014, and look at the field Sec-WebSocket-Extensions of the
       handshake in the browser's tools (the tab "Network")
"""

from __future__ import annotations

import re
import sys
import zlib
from pathlib import Path

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "server.py").exists())
sys.path.append(str(ROOT))

import server  # noqa: E402
from server import Opcode, WebSocketError  # noqa: E402

RSV1 = 0x40  # of the first byte: "this message is compressed" (RFC 7692 §6)
TAIL = b"\x00\x00\xff\xff"  # what a flush ends with, and the sender leaves out (§7.2.1)
AGREED = b"permessage-deflate; server_no_context_takeover; client_no_context_takeover"
# What may stand in an offer. Of a window that is to be smaller than ours, only the
# client's own is easy: it says how much we have to remember, and we remember more.
PARAMETER = re.compile(
    r"(?:server|client)_no_context_takeover"
    r'|client_max_window_bits(?:="?(?:[89]|1[0-5])"?)?|server_max_window_bits="?15"?'
)


def deflate(payload: bytes) -> bytes:
    """Compress a message (RFC 7692 §7.2.1)."""
    compressor = zlib.compressobj(wbits=-15)  # negative: no header and no checksum
    data = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
    return data.removesuffix(TAIL)


def inflate(payload: bytes, limit: int) -> bytes:
    """Decompress a message (RFC 7692 §7.2.2). Raises WebSocketError, with 1009 if it is
    larger than `limit`: 16 KiB on the wire can become 16 MiB."""
    try:
        # At the limit it stops. One byte more shows that the message is too big.
        data = zlib.decompressobj(wbits=-15).decompress(payload + TAIL, limit + 1)
    except zlib.error as exc:
        raise WebSocketError(1007, f"not deflated: {exc}") from None
    if len(data) > limit:
        raise WebSocketError(1009, "message too big")
    return data


def agree(offers: list[str]) -> bytes | None:
    """Our answer to the client's offers; None if we can take none (RFC 7692 §5, §7.1)."""
    for offer in offers:
        name, *parameters = (part.strip() for part in offer.split(";"))
        names = [parameter.partition("=")[0] for parameter in parameters]
        known = all(PARAMETER.fullmatch(parameter) for parameter in parameters)
        if name == "permessage-deflate" and known and len(names) == len(set(names)):
            return AGREED
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
        if opcode is Opcode.BINARY and self.compressed:
            opcode, payload = self.compressed, inflate(payload, self.max_size)
            if opcode is Opcode.TEXT:
                try:
                    payload.decode()  # the base class has not looked
                except UnicodeDecodeError as exc:
                    raise WebSocketError(1007, f"not UTF-8: {exc.reason}") from None
        return opcode, payload


class CompressingWebSocket(server.WebSocket):
    """One WebSocket, which compresses if its client has offered to."""

    def __init__(self, *request) -> None:
        super().__init__(*request)
        fields = self.request.headers
        agreed = agree(server.tokens(fields, b"sec-websocket-extensions"))
        self.compresses = agreed is not None
        if agreed is not None:
            self.fields.append((b"Sec-WebSocket-Extensions", agreed))
            self.frames = InflatingReader(self.read, self.frames.max_size)

    def send_message(self, message: server.Message) -> None:
        text, data = message.get("text"), message.get("bytes")
        if not self.compresses or (text is None) == (data is None):
            super().send_message(message)  # which refuses both, and neither
            return
        opcode = Opcode.TEXT if text is not None else Opcode.BINARY
        payload = text.encode() if text is not None else bytes(memoryview(data))
        self.wire.write(server.encode_frame(opcode | RSV1, deflate(payload)))


if __name__ == "__main__":
    server.WebSocket = CompressingWebSocket  # where foal makes one, it looks for this name
    sys.exit(server.run("chat:app", port=8014))
