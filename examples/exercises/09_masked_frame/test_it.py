"""Bytes in, frames out. The examples are the RFC's own; the lengths are those at which
the header changes; and the bytes come cut at every place."""

import pytest

MASK = bytes.fromhex("37fa213d")  # RFC 6455 §5.7 masks with it
TEXT, CONTINUATION, BINARY, PING, PONG = 1, 0, 2, 9, 10

# RFC 6455 §5.7: the bytes as they are printed there, and what they stand for.
EXAMPLES = [
    ("81 05 48 65 6c 6c 6f", (True, TEXT, b"Hello")),
    ("81 85 37 fa 21 3d 7f 9f 4d 51 58", (True, TEXT, b"Hello")),
    ("01 03 48 65 6c", (False, TEXT, b"Hel")),
    ("80 02 6c 6f", (True, CONTINUATION, b"lo")),
    ("89 05 48 65 6c 6c 6f", (True, PING, b"Hello")),
    ("8a 85 37 fa 21 3d 7f 9f 4d 51 58", (True, PONG, b"Hello")),
    ("82 7e 01 00" + "00" * 256, (True, BINARY, bytes(256))),
    ("82 7f 00 00 00 00 00 01 00 00" + "00" * 65536, (True, BINARY, bytes(65536))),
]
NAMES = [
    "unmasked",
    "masked",
    "first part",
    "last part",
    "ping",
    "pong",
    "256",
    "64 KiB",
]

# Size, and the header of a masked binary frame of it, up to the mask.
LENGTHS = [
    (0, "82 80"),
    (1, "82 81"),
    (125, "82 fd"),
    (126, "82 fe 00 7e"),
    (127, "82 fe 00 7f"),
    (65535, "82 fe ff ff"),
    (65536, "82 ff 00 00 00 00 00 01 00 00"),
]


def masked(data, mask=MASK) -> bytes:
    """RFC 6455 §5.3 to the letter: "octet i XOR octet (i modulo 4) of the key"."""
    return bytes(octet ^ mask[i % 4] for i, octet in enumerate(data))


def payload_of(size) -> bytes:
    return bytes(i * 7 % 256 for i in range(size))


def frame(size, header) -> bytes:
    return bytes.fromhex(header) + MASK + masked(payload_of(size))


@pytest.mark.parametrize("data, expected", EXAMPLES, ids=NAMES)
def test_the_examples_of_the_rfc(exercise, data, expected):
    found = exercise.read_frames(bytes.fromhex(data))
    right = found == ([expected], b"")
    assert right, f"{len(repr(found))} characters that are not the right ones"


@pytest.mark.parametrize("size, header", LENGTHS)
def test_each_form_of_a_length(exercise, size, header):
    frames, rest = exercise.read_frames(frame(size, header) + b"\x81")
    assert rest == b"\x81", "the next frame begins right behind this one"
    right = frames == [(True, BINARY, payload_of(size))]
    assert right, f"the frame of {size} bytes is not the right one"


@pytest.mark.parametrize("size, header", LENGTHS)
def test_a_header_says_where_it_ends(exercise, size, header):
    data = bytes.fromhex(header) + MASK
    expected = exercise.Header(True, BINARY, MASK, size, len(data))
    assert exercise.parse_header(data + b"more") == expected


@pytest.mark.parametrize("size, header", LENGTHS)
def test_a_header_is_not_guessed(exercise, size, header):
    """What if the header comes byte by byte? Then it is None until the last of them."""
    data = bytes.fromhex(header) + MASK
    early = [exercise.parse_header(data[:end]) for end in range(len(data))]
    assert early == [None] * len(data)


def test_frames_cut_anywhere_are_the_same_frames(exercise):
    """TCP keeps no boundaries: what one side writes in one call, arrives in any pieces."""
    data = b"".join(bytes.fromhex(text) for text, _ in EXAMPLES[:6]) + frame(*LENGTHS[3])
    expected, _ = exercise.read_frames(data)
    assert len(expected) == 7
    for cut in range(len(data)):
        first, rest = exercise.read_frames(data[:cut])
        second, rest = exercise.read_frames(rest + data[cut:])
        assert (first + second, rest) == (expected, b""), f"cut after {cut} bytes"


def test_frames_byte_by_byte_are_the_same_frames(exercise):
    data, found, rest = frame(*LENGTHS[4]) * 2, [], b""
    for i in range(len(data)):
        frames, rest = exercise.read_frames(rest + data[i : i + 1])
        found += frames
    assert (found, rest) == ([(True, BINARY, payload_of(127))] * 2, b"")


class TestMask:
    """RFC 6455 §5.3."""

    @pytest.mark.parametrize("size", [*range(10), 125, 126, 4096])
    def test_it_is_what_the_rfc_says(self, exercise, size):
        data = payload_of(size)
        right = exercise.apply_mask(MASK, data) == masked(data)
        assert right, f"{len(data)} bytes are masked wrongly"

    def test_twice_is_not_at_all(self, exercise):
        data = payload_of(1001)
        once = exercise.apply_mask(MASK, data)
        assert once != data
        assert exercise.apply_mask(MASK, once) == data

    @pytest.mark.parametrize("mask", [bytes(4), b"\x00\x00\x00\xff", b"\xff\x00\x00\x00"])
    def test_zeros_are_bytes_like_others(self, exercise, mask):
        """What if the result, or the mask, begins or ends with zeros?"""
        data = b"\x00\x00ab\xff\x00\x00"
        assert exercise.apply_mask(mask, data) == masked(data, mask)


@pytest.mark.parametrize(
    "header",
    [
        pytest.param("82 fe 00 7d", id="125 in two bytes"),
        pytest.param("82 ff 00 00 00 00 00 00 ff ff", id="65535 in eight bytes"),
        pytest.param("82 ff 80 00 00 00 00 00 00 00", id="a length of 64 bits"),
    ],
)
def test_a_length_has_one_form(exercise, header):
    """RFC 6455 §5.2: "the minimal number of bytes MUST be used to encode the length",
    and of eight bytes "the most significant bit MUST be 0"."""
    with pytest.raises(exercise.FrameError):
        exercise.parse_header(bytes.fromhex(header))  # and the mask is not here yet
