"""Frames from a client's bytes: any length, masked or not. The answer.

Run:   python examples/exercises/answers/09_masked_frame.py
"""

from __future__ import annotations

from typing import NamedTuple


class FrameError(Exception):
    """These bytes can never become a frame."""


class Header(NamedTuple):
    """What stands before the payload (RFC 6455 §5.2)."""

    final: bool
    opcode: int
    mask: bytes  # four bytes, or none
    size: int  # of the payload
    start: int  # where the payload begins: the header's own size


def parse_header(data: bytes) -> Header | None:
    """The header at the start of `data`; None if more bytes are needed to tell.
    Raises FrameError."""
    if len(data) < 2:
        return None
    size, start = data[1] & 0x7F, 2
    if size > 125:  # it is no size, but says how many bytes the size has
        start += 2 if size == 126 else 8
        if len(data) < start:
            return None
        size = int.from_bytes(data[2:start], "big")
        if size < (126 if start == 4 else 2**16) or size >> 63:
            raise FrameError("a length in more bytes than it needs, or of 64 bits")
    mask = b""
    if data[1] & 0x80:
        mask, start = data[start : start + 4], start + 4
        if len(data) < start:
            return None
    return Header(bool(data[0] & 0x80), data[0] & 0x0F, mask, size, start)


def apply_mask(mask: bytes, data: bytes) -> bytes:
    """Mask, or unmask: it is the same operation (RFC 6455 §5.3)."""
    # Two large numbers: one XOR in C, where a loop over the bytes would be in Python.
    key = (mask * (len(data) // 4 + 1))[: len(data)]
    mixed = int.from_bytes(data, "big") ^ int.from_bytes(key, "big")
    return mixed.to_bytes(len(data), "big")


def read_frames(data: bytes) -> tuple[list[tuple[bool, int, bytes]], bytes]:
    """All whole frames in `data`, as (final, opcode, payload), and the bytes left."""
    frames = []
    while (header := parse_header(data)) is not None:
        end = header.start + header.size
        if len(data) < end:
            break
        payload = data[header.start : end]
        if header.mask:
            payload = apply_mask(header.mask, payload)
        frames.append((header.final, header.opcode, payload))
        data = data[end:]
    return frames, data


if __name__ == "__main__":
    # RFC 6455 §5.7: "Hello", unmasked and then masked.
    print(read_frames(bytes.fromhex("81 05 48 65 6c 6c 6f")))
    print(read_frames(bytes.fromhex("81 85 37 fa 21 3d 7f 9f 4d 51 58")))
