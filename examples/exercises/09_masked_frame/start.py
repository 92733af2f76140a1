"""Frames from a client's bytes. As it is, it reads short frames without a mask. A server
sends such frames, but it does not get any.

Run:   python examples/exercises/09_masked_frame/start.py
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
    return Header(bool(data[0] & 0x80), data[0] & 0x0F, b"", data[1] & 0x7F, 2)


def apply_mask(mask: bytes, data: bytes) -> bytes:
    """Mask, or unmask: it is the same operation (RFC 6455 §5.3)."""
    return data


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
