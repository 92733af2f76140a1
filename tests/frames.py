"""A WebSocket client for the tests, written as plainly as RFC 6455 puts it: the opening
handshake, frames, and a `Speaker` that sends and reads them."""

import contextlib

from conftest import Client

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
CONTINUATION = 0
MASK = bytes.fromhex("37fa213d")  # the key of RFC 6455 §5.7
KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # the key of RFC 6455 §1.3
FIELDS = {
    "Host": "x",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Version": "13",
}


def handshake(line="GET / HTTP/1.1", body=b"", **changes) -> bytes:
    """An opening handshake. A change replaces a field, with _ for - in its name. None
    drops the field, and a list repeats it."""
    fields = {**FIELDS, **{n.replace("_", "-"): v for n, v in changes.items()}}
    lines = [line]
    for name, values in fields.items():
        values = values if isinstance(values, list) else [values]
        lines += [f"{name}: {value}" for value in values if value is not None]
    return "\r\n".join([*lines, "", ""]).encode() + body


def naive_mask(mask: bytes, data: bytes) -> bytes:
    """RFC 6455 §5.3, to the letter: octet i with octet i modulo 4 of the key."""
    return bytes(octet ^ mask[i % 4] for i, octet in enumerate(data))


def header(opcode, size, *, fin=True, rsv=0, masked=True) -> bytes:
    """A frame up to the end of its length (RFC 6455 §5.2)."""
    first, bit = fin << 7 | rsv << 4 | opcode, masked << 7
    if size < 126:
        return bytes([first, bit | size])
    if size < 65536:
        return bytes([first, bit | 126]) + size.to_bytes(2, "big")
    return bytes([first, bit | 127]) + size.to_bytes(8, "big")


def frame(opcode, payload=b"", *, fin=True, rsv=0, mask=MASK) -> bytes:
    """A whole frame, as a client sends it."""
    start = header(opcode, len(payload), fin=fin, rsv=rsv)
    return start + mask + naive_mask(mask, payload)


def quick_frame(opcode, payload) -> bytes:
    """The same with a key of zeros, which leaves a long payload as it is."""
    return header(opcode, len(payload)) + bytes(4) + payload


class Speaker(Client):
    """A client that speaks frames, and checks what every server must do."""

    def take(self, size: int) -> bytes:
        while len(self.unread) < size:
            data = self.sock.recv(2**20)
            assert data, f"closed after {self.unread[:99]!r}"
            self.unread += data
        found, self.unread = self.unread[:size], self.unread[size:]
        return found

    def frame(self) -> tuple[int, bytes]:
        """The next frame: its first byte, and its payload."""
        first, size = self.take(2)
        assert size < 128, "a server must not mask (RFC 6455 §5.1)"
        if size > 125:
            size = int.from_bytes(self.take(2 if size == 126 else 8), "big")
        return first, self.take(size)

    def answer(self) -> tuple[int, bytes]:
        """The next frame that is no Ping."""
        while (found := self.frame())[0] == 0x89:
            pass
        return found

    def say(self, opcode: int, payload=b"", **options) -> None:
        self.send(frame(opcode, payload, **options))

    def upgrade(self, data=b"") -> bytes:
        """Do the opening handshake, and return the head of the answer."""
        self.send(data or handshake())
        head = self.read_until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n"), head
        return head

    def end(self) -> bytes:
        """What still comes until the connection ends, in whatever way."""
        with contextlib.suppress(ConnectionError):
            while data := self.sock.recv(2**18):
                self.unread += data
        return self.unread
