"""Chapter 9, what is tested best without a connection: the reader of frames, fed with
bytes, and the functions beside it. How a server reacts to each frame on the wire is
the subject of test_websocket.py."""

import random
import time

import pytest
from frames import BINARY, CONTINUATION, MASK, PING, PONG, TEXT, frame, header, naive_mask

import server
from server import Opcode, WebSocketError


class Decoder:
    """A FrameReader that gets its bytes from the test, piece by piece."""

    def __init__(self, max_size=2**24):
        self.arrived, self.found = bytearray(), []
        self.running = self.run(server.FrameReader(self.read, max_size))

    def read(self, least, most):
        """What the reader calls: it yields until enough has arrived."""
        while len(self.arrived) < least:
            yield
        taken = bytes(self.arrived[:most])
        del self.arrived[:most]
        return taken

    def run(self, reader):
        while True:
            opcode, payload = yield from reader.next()
            self.found.append((opcode, payload.decode() if opcode == TEXT else payload))

    def feed(self, piece: bytes) -> list:
        """Everything found so far, this piece included."""
        self.arrived += piece
        next(self.running)
        return self.found


def decode(*pieces, max_size=2**24) -> list:
    """All messages and control frames in these pieces."""
    decoder = Decoder(max_size)
    return [decoder.feed(piece) for piece in pieces][-1]


def ending(data: bytes, size=1):
    """Feed `data` in pieces of this size: what it found, and the close code or None."""
    decoder, code = Decoder(500), None
    try:
        for start in range(0, len(data), size):
            decoder.feed(data[start : start + size])
    except WebSocketError as exc:
        code = exc.args[0]
    return decoder.found, code


class TestEncode:
    """RFC 6455 §5.2: "the minimal number of bytes MUST be used"."""

    @pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 65537])
    def test_the_length_takes_as_few_bytes_as_possible(self, size):
        expected = header(TEXT, size, masked=False) + b"x" * size
        assert server.encode_frame(Opcode.TEXT, b"x" * size) == expected


class TestMask:
    """RFC 6455 §5.3, compared with the loop over bytes that it describes."""

    @pytest.mark.parametrize("mask", [MASK, bytes(4), b"\0\0\0\1", b"\x80\0\0\0"])
    def test_every_length_and_zeros_at_either_end_of_key_or_data(self, mask):
        """A number would drop the zeros."""
        for length in range(71):
            for data in (bytes(length), random.Random(1).randbytes(length), b"\1" + bytes(length)):
                assert server.apply_mask(mask, data) == naive_mask(mask, data)

    def test_16_mib_take_well_under_a_second(self):
        """They take some 50 ms of the processor's time, however busy it is."""
        before = time.process_time()
        mixed = server.apply_mask(MASK, bytes(2**24))
        assert mixed == MASK * 2**22 and time.process_time() - before < 0.5


class TestReader:
    """RFC 6455 §5.2 and §5.4."""

    @pytest.mark.parametrize("sizes", [[100], [60, 40], [0, 100, 0], [1] * 100])
    def test_a_message_of_exactly_the_limit_is_taken(self, sizes):
        fragments = [frame(CONTINUATION, b"x" * size, fin=False) for size in sizes]
        data = frame(TEXT, fin=False) + b"".join(fragments) + frame(CONTINUATION)
        assert decode(data * 3, max_size=100) == [(Opcode.TEXT, "x" * 100)] * 3


BAD_TEXT = [  # up to the byte that shows it
    *(b"\x80", b"\xc0", b"\xf5", b"\xff", b"\xc3\x28", b"\xe0\x80", b"\xf0\x80", b"\xf4\x90"),
    *(b"\xe2\x82\x28", b"\xf0\x9f\x98\x28", b"\xed\xa0\x80"),  # the last is a surrogate
]


class TestUTF8:
    """RFC 6455 §8.1. The reader refuses bad text as soon as it arrives, which may be in
    the middle of a frame."""

    @pytest.mark.parametrize("bad", BAD_TEXT)
    def test_bad_text_is_refused_at_the_byte_that_shows_it(self, bad):
        data = header(TEXT, 100) + bytes(4) + b"ok" + bad
        assert ending(data[:-1]) == ([], None)
        assert ending(data) == ([], 1007)

    @pytest.mark.parametrize("text", ["κόσμε", "\U0010ffff", "\0", "�", "﷐￿", "é" * 99])
    def test_a_character_may_be_cut_between_frames(self, text):
        data = [frame(CONTINUATION, bytes([b]), fin=False) for b in text.encode()]
        message = frame(TEXT, fin=False) + b"".join(data) + frame(CONTINUATION)
        assert decode(message * 2) == [(Opcode.TEXT, text)] * 2


class TestCutAnywhere:
    """The same bytes give the same messages, however they arrive."""

    CUT = "aé€".encode()  # within its last character
    STREAM = frame(PING, b"1") + frame(TEXT, CUT[:4], fin=False) + frame(PONG, b"in between")
    STREAM += frame(CONTINUATION, fin=False) + frame(CONTINUATION, CUT[4:])
    STREAM += frame(BINARY, bytes(range(200)), mask=b"mask") + frame(TEXT)
    MESSAGES = [(PING, b"1"), (PONG, b"in between"), (TEXT, "aé€")]
    MESSAGES += [(BINARY, bytes(range(200))), (TEXT, "")]

    def test_a_stream_cut_at_every_byte(self):
        assert decode(*(bytes([byte]) for byte in self.STREAM)) == self.MESSAGES
        for cut in range(len(self.STREAM) + 1):
            assert decode(self.STREAM[:cut], self.STREAM[cut:]) == self.MESSAGES

    def test_a_stream_with_one_bit_turned_ends_in_the_same_way(self):
        """With the same messages, and then with the same close code or none."""
        for bit in range(8 * len(self.STREAM)):
            broken = bytearray(self.STREAM)
            broken[bit // 8] ^= 1 << bit % 8
            assert ending(broken) == ending(broken, len(broken))


class TestClose:
    """RFC 6455 §5.5.1 and §7.4, and the registry at IANA."""

    def test_every_number_of_two_bytes(self):
        """§7.4.1: 1005, 1006 and 1015 "MUST NOT be set" in a frame."""
        good = [1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)]
        assert [code for code in range(65536) if server.is_close_code(code)] == good
