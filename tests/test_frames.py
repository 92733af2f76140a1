"""Chapter 8: frames as bytes, messages as values, and nothing else. No socket, no loop;
the frames are literal, or built by a naive encoder that stands in this file."""

from __future__ import annotations

import os
import random
import re
import time
import tracemalloc
import zlib

import pytest
from conftest import brief

import server
from server import Deflate, FrameDecoder, Opcode, WebSocketError

MASK = bytes.fromhex("37fa213d")  # RFC 6455 §5.7 masks with it
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
CONTINUATION = 0
HELLO = bytes.fromhex("f248cdc9c90700")  # RFC 7692 §7.2.3.1


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
    """A whole frame as a client sends it."""
    start = header(opcode, len(payload), fin=fin, rsv=rsv)
    return start + mask + naive_mask(mask, payload)


def decode(*pieces, max_size=2**24, deflate=None) -> list:
    """All that these pieces decode to."""
    decoder = FrameDecoder(max_size, deflate)
    return [found for piece in pieces for found in decoder.decode(piece)]


def refusal(data: bytes, *, max_size=2**24, deflate=None):
    """(close code, bytes it took) when `data` comes byte by byte; None if it passes."""
    decoder = FrameDecoder(max_size, deflate)
    for i in range(len(data)):
        try:
            list(decoder.decode(data[i : i + 1]))
        except WebSocketError as exc:
            return exc.args[0], i + 1
    return None


def offered(text: str) -> Deflate | None:
    """What becomes of a Sec-WebSocket-Extensions field."""
    fields = [(b"sec-websocket-extensions", text.encode())]
    return Deflate.negotiate(server.tokens(fields, b"sec-websocket-extensions"))


def plain_deflate(parameters="") -> Deflate:
    return offered("permessage-deflate" + parameters)


class TestExamples:
    """RFC 6455 §5.7, "Examples"."""

    @pytest.mark.parametrize(
        "opcode, payload, start",
        [
            (Opcode.TEXT, b"Hello", "8105"),
            (Opcode.PING, b"Hello", "8905"),
            (Opcode.BINARY, bytes(range(256)), "827e0100"),
            (Opcode.BINARY, bytes(65536), "827f0000000000010000"),
        ],
    )
    def test_the_unmasked_ones_are_what_we_send(self, opcode, payload, start):
        expected = bytes.fromhex(start) + payload
        assert server.encode_frame(opcode, payload) == expected

    def test_a_masked_text(self):
        data = bytes.fromhex("818537fa213d7f9f4d5158")
        assert decode(data) == [(Opcode.TEXT, "Hello")]
        assert frame(TEXT, b"Hello") == data  # the naive encoder of this file

    def test_a_masked_pong(self):
        data = bytes.fromhex("8a8537fa213d7f9f4d5158")
        assert decode(data) == [(Opcode.PONG, b"Hello")]

    def test_a_fragmented_text_as_a_client_masks_it(self):
        """01 03 "Hel", 80 02 "lo"; masked with zeros they keep their payload."""
        data = bytes.fromhex("01830000000048656c 8082000000006c6f")
        assert decode(data) == [(Opcode.TEXT, "Hello")]

    @pytest.mark.parametrize(
        "size, start", [(256, "82fe0100"), (65536, "82ff" + "0" * 11 + "10000")]
    )
    def test_long_binaries_as_a_client_masks_them(self, size, start):
        data = bytes.fromhex(start) + bytes(4) + b"x" * size
        assert decode(data) == [(Opcode.BINARY, b"x" * size)]

    def test_the_unmasked_ones_are_refused_from_a_client(self):
        """RFC 6455 §5.1: "A server MUST close the connection"."""
        assert refusal(bytes.fromhex("810548656c6c6f")) == (1002, 2)


class TestEncode:
    """RFC 6455 §5.2: "the minimal number of bytes MUST be used"."""

    @pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 65537])
    def test_the_length_is_minimal(self, size):
        expected = header(TEXT, size, masked=False) + b"x" * size
        assert server.encode_frame(Opcode.TEXT, b"x" * size) == expected

    def test_the_first_bit_reserved_says_deflated(self):
        assert server.encode_frame(Opcode.TEXT, b"", rsv1=True) == b"\xc1\x00"


class TestMask:
    """RFC 6455 §5.3, against the loop over bytes that it describes."""

    def test_every_length_and_every_turn_of_the_key(self):
        data = random.Random(1).randbytes(80)
        for length in range(71):
            for turn in range(4):
                mask = MASK[turn:] + MASK[:turn]
                part = data[turn : turn + length]
                assert server.apply_mask(mask, part) == naive_mask(mask, part)

    @pytest.mark.parametrize(
        "mask", [bytes(4), b"\xff" * 4, b"\0\0\0\1", b"\x80\0\0\0"]
    )
    def test_keys_and_data_with_zeros_at_either_end_keep_their_length(self, mask):
        for data in (bytes(9), b"\xff" * 9, bytes(5) + b"\1", b"\1" + bytes(6)):
            assert server.apply_mask(mask, data) == naive_mask(mask, data)

    @pytest.mark.parametrize("more", [-1, 0, 1, 4, server.MASK_BLOCK + 3])
    def test_what_takes_more_than_one_block_is_the_same(self, more):
        data = random.Random(3).randbytes(server.MASK_BLOCK + more)
        assert brief(server.apply_mask(MASK, data)) == brief(naive_mask(MASK, data))

    def test_the_same_again_restores_the_data(self):
        data = random.Random(2).randbytes(1001)
        assert server.apply_mask(MASK, server.apply_mask(MASK, data)) == data

    def test_16_mib_take_well_under_a_tenth_of_a_second(self):
        """The best of five, with room for a busy machine."""
        data, times = bytes(2**24), []
        for _ in range(5):
            before = time.perf_counter()
            mixed = server.apply_mask(MASK, data)
            times.append(time.perf_counter() - before)
        assert mixed == MASK * 2**22
        assert min(times) < 0.25


OPCODES = range(16)
KNOWN = (0, 1, 2, 8, 9, 10)
WRONG_AT_TWO = {
    **{f"opcode {n}": bytes([0x80 | n, 0x80]) for n in OPCODES if n not in KNOWN},
    **{f"rsv {n}": bytes([0x82 | n << 4, 0x80]) for n in range(1, 8)},
    **{f"rsv1 on {n}": bytes([0xC0 | n, 0x80]) for n in (8, 9, 10)},
    **{f"unmasked {n}": bytes([0x80 | n, 5]) for n in KNOWN},
    **{f"fragment of {n}": bytes([n, 0x80]) for n in (8, 9, 10)},
    **{f"{n} of 126": bytes([0x80 | n, 0xFE]) for n in (8, 9, 10)},
    **{f"{n} of 64 KiB": bytes([0x80 | n, 0xFF]) for n in (8, 9, 10)},
    "continues nothing": b"\x80\x80",
    "continues nothing, more to come": b"\x00\x80",
}
WRONG_LENGTH = {  # how many bytes show it
    "125 in two bytes": ("82fe007d", 4),
    "0 in two bytes": ("82fe0000", 4),
    "126 in eight bytes": ("82ff000000000000007e", 10),
    "65535 in eight bytes": ("82ff000000000000ffff", 10),
    "the top bit of 64": ("82ff8000000000000000", 10),
    "all 64 bits": ("82ffffffffffffffffff", 10),
}


class TestFailFast:
    """issue 4, frames: "it refuses early"; RFC 6455 §5.2 says what is wrong."""

    @pytest.mark.parametrize("data", WRONG_AT_TWO.values(), ids=WRONG_AT_TWO)
    def test_a_bad_header_is_refused_after_two_bytes(self, data):
        assert refusal(data + MASK + b"x" * 9) == (1002, 2)

    @pytest.mark.parametrize("data", WRONG_AT_TWO.values(), ids=WRONG_AT_TWO)
    def test_the_same_behind_a_good_message(self, data):
        good = frame(TEXT, b"good")
        assert refusal(good + data) == (1002, len(good) + 2)

    @pytest.mark.parametrize("opcode", [TEXT, BINARY])
    def test_a_new_message_within_a_message_is_refused(self, opcode):
        data = frame(TEXT, b"one", fin=False)
        assert refusal(data + frame(opcode)) == (1002, len(data) + 2)

    @pytest.mark.parametrize("rsv", range(1, 8))
    def test_a_reserved_bit_on_a_continuation_is_refused(self, rsv):
        """RFC 7692 §6.1: only the first frame of a message says that it is deflated."""
        data = frame(TEXT, HELLO[:3], fin=False, rsv=4)
        bad = data + frame(CONTINUATION, HELLO[3:], rsv=rsv)
        assert refusal(bad, deflate=plain_deflate()) == (1002, len(data) + 2)

    @pytest.mark.parametrize("rsv", [1, 2, 3, 5, 6, 7])
    def test_deflate_gives_a_meaning_to_one_reserved_bit_only(self, rsv):
        data = frame(TEXT, HELLO, rsv=rsv)
        assert refusal(data, deflate=plain_deflate()) == (1002, 2)

    @pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
    def test_deflate_is_not_for_control_frames(self, opcode):
        """RFC 7692 §6: "MUST NOT be set on control frames"."""
        data = frame(opcode, HELLO, rsv=4)
        assert refusal(data, deflate=plain_deflate()) == (1002, 2)

    @pytest.mark.parametrize("start, size", WRONG_LENGTH.values(), ids=WRONG_LENGTH)
    def test_a_bad_length_is_refused_at_its_last_byte(self, start, size):
        data = bytes.fromhex(start) + MASK
        assert refusal(data, max_size=2**64) == (1002, size)

    @pytest.mark.parametrize(
        "size, shown", [(101, 2), (126, 4), (65536, 10), (2**62, 10)]
    )
    def test_a_message_too_long_is_refused_from_its_header_alone(self, size, shown):
        data = header(BINARY, size) + MASK
        assert refusal(data, max_size=100) == (1009, shown)

    def test_fragments_too_long_together_are_refused_from_the_last_header(self):
        data = frame(TEXT, b"x" * 60, fin=False) + frame(PING, b"x" * 125)
        last = header(CONTINUATION, 41)
        assert refusal(data + last + MASK, max_size=100) == (1009, len(data) + 2)

    @pytest.mark.parametrize("sizes", [[100], [60, 40], [0, 100, 0], [1] * 100])
    def test_a_message_of_exactly_the_limit_is_taken(self, sizes):
        fragments = [frame(CONTINUATION, b"x" * size, fin=False) for size in sizes]
        data = frame(TEXT, fin=False) + b"".join(fragments) + frame(CONTINUATION)
        assert decode(data * 3, max_size=100) == [(Opcode.TEXT, "x" * 100)] * 3

    def test_what_came_before_the_fault_is_still_yielded(self):
        decoder, found = FrameDecoder(100), []
        with pytest.raises(WebSocketError, match="opcode 3"):
            for item in decoder.decode(frame(TEXT, b"one") + frame(3)):
                found.append(item)
        assert found == [(Opcode.TEXT, "one")]


TAIL = rb"[\x80-\xbf]"
UTF8_START = re.compile(  # RFC 3629 §4, and every start of a character at the end
    rb"(?:[\0-\x7f]|[\xc2-\xdf]T|\xe0[\xa0-\xbf]T|[\xe1-\xec\xee\xef]TT"
    rb"|\xed[\x80-\x9f]T|\xf0[\x90-\xbf]TT|[\xf1-\xf3]TTT|\xf4[\x80-\x8f]TT)*"
    rb"(?:[\xc2-\xdf]|\xe0[\xa0-\xbf]?|[\xe1-\xec\xee\xef]T?|\xed[\x80-\x9f]?"
    rb"|\xf0(?:[\x90-\xbf]T?)?|[\xf1-\xf3](?:TT?)?|\xf4(?:[\x80-\x8f]T?)?)?".replace(
        b"T", TAIL
    )
)


def first_bad(data: bytes) -> int | None:
    """How many bytes it takes to see that this is not UTF-8."""
    sizes = range(1, len(data) + 1)
    return next((n for n in sizes if not UTF8_START.fullmatch(data[:n])), None)


class TestUTF8:
    """RFC 6455 §8.1: "invalid" fails the connection; here at the byte that shows it."""

    @pytest.mark.parametrize("lead", range(0x80, 0x100, 8))
    def test_the_byte_that_breaks_it_is_refused_in_the_middle_of_a_frame(self, lead):
        seconds = (0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xFF)
        for first in range(lead, lead + 8):
            for second in seconds:
                text = b"ok" + bytes([first, second]) + b"\x80\x80\xbf\x80"
                start = header(TEXT, 100) + bytes(4)
                expected = (1007, len(start) + first_bad(text))
                assert refusal(start + text) == expected, text

    def test_random_bytes_are_refused_where_the_grammar_says(self):
        rng = random.Random(3)
        for _ in range(1000):
            text = bytes(
                rng.choices(b"a\x80\x90\xa0\xbf\xc3\xe0\xed\xef\xf0\xf4", k=12)
            )
            bad, start = first_bad(text), header(TEXT, 100) + bytes(4)
            expected = (1007, len(start) + bad) if bad else None
            assert refusal(start + text) == expected, text

    @pytest.mark.parametrize("text", ["κόσμε", "\U0010ffff", "\0", "�", "﷐￿", "é" * 99])
    def test_a_character_may_be_cut_between_frames(self, text):
        data = [frame(CONTINUATION, bytes([b]), fin=False) for b in text.encode()]
        message = frame(TEXT, fin=False) + b"".join(data) + frame(CONTINUATION)
        assert decode(message * 2) == [(Opcode.TEXT, text)] * 2

    @pytest.mark.parametrize("cut", [b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98"])
    def test_a_character_that_the_message_leaves_unfinished_is_refused(self, cut):
        data = frame(TEXT, b"ok" + cut)
        assert refusal(data) == (1007, len(data))
        data = frame(TEXT, b"ok" + cut, fin=False) + frame(CONTINUATION)
        assert refusal(data) == (1007, len(data))

    def test_a_ping_may_stand_within_a_character(self):
        data = (
            frame(TEXT, b"\xc3", fin=False) + frame(PING) + frame(CONTINUATION, b"\xa9")
        )
        assert decode(data) == [(Opcode.PING, b""), (Opcode.TEXT, "é")]

    def test_bytes_that_are_no_text_may_be_anything(self):
        assert decode(frame(BINARY, b"\xff\xfe")) == [(Opcode.BINARY, b"\xff\xfe")]

    def test_bad_utf_8_that_was_deflated_is_refused_as_well(self):
        deflate = plain_deflate()
        data = frame(TEXT, deflate.compress(b"ok\xff" + b"x" * 99), rsv=4)
        assert refusal(data, deflate=plain_deflate())[0] == 1007


class TestFragments:
    """RFC 6455 §5.4, "Fragmentation"."""

    @pytest.mark.parametrize("opcode, whole", [(TEXT, "Hello"), (BINARY, b"Hello")])
    def test_fragments_of_every_size_make_one_message(self, opcode, whole):
        for cut in range(6):
            data = frame(opcode, b"Hello"[:cut], fin=False)
            data += frame(CONTINUATION, b"Hello"[cut:], mask=b"\x01\x02\x03\x04")
            assert decode(data) == [(opcode, whole)]

    def test_control_frames_between_fragments_come_at_once(self):
        """They "MAY be injected in the middle of a fragmented message"."""
        data = frame(TEXT, b"a", fin=False) + frame(PING, b"1")
        data += frame(CONTINUATION, b"b", fin=False) + frame(PONG, b"2")
        assert decode(data) == [(Opcode.PING, b"1"), (Opcode.PONG, b"2")]
        data += frame(CONTINUATION, b"c")
        assert decode(data)[2:] == [(Opcode.TEXT, "abc")]

    @pytest.mark.parametrize("opcode, empty", [(TEXT, ""), (BINARY, b"")])
    def test_an_empty_message_is_a_message(self, opcode, empty):
        fragments = frame(opcode, fin=False) + frame(CONTINUATION)
        assert decode(frame(opcode) + fragments) == [(opcode, empty)] * 2

    def test_control_frames_may_be_empty_and_125_bytes_long(self):
        data = frame(PING) + frame(PONG, b"x" * 125) + frame(CLOSE)
        expected = [(Opcode.PING, b""), (Opcode.PONG, b"x" * 125), (Opcode.CLOSE, b"")]
        assert decode(data) == expected

    def test_empty_fragments_without_end_take_no_memory(self):
        """What if the message grows by frames, and not by bytes?"""
        decoder, flood = FrameDecoder(100), frame(CONTINUATION, fin=False) * 500
        list(decoder.decode(frame(TEXT, fin=False)))
        tracemalloc.start()
        try:
            for _ in range(100):
                list(decoder.decode(flood))
            assert tracemalloc.get_traced_memory()[0] < 100_000
        finally:
            tracemalloc.stop()

    def test_bytes_that_come_one_by_one_take_no_more_memory_than_many(self):
        """What if a client makes 60 bytes of overhead from each byte it sends?"""
        decoder, mask = FrameDecoder(2**20), bytes(4)
        list(decoder.decode(header(BINARY, 2**20) + mask))
        tracemalloc.start()
        try:
            for _ in range(50_000):
                list(decoder.decode(b"ab"))
            assert tracemalloc.get_traced_memory()[0] < 500_000
        finally:
            tracemalloc.stop()

    @pytest.mark.skipif(os.name == "nt", reason="copies are slow under Wine")
    def test_a_read_full_of_tiny_frames_costs_little_more_than_small_reads(self):
        """What if each of its frames copies all that is behind it? asyncio reads 256
        KiB at once, 64 on Windows."""
        pieces, times = [frame(PONG) * 437] * (25 if os.name == "nt" else 100), []
        for data in ([b"".join(pieces)], pieces) * 3:
            before = time.perf_counter()
            assert len(decode(*data)) == 437 * len(pieces)
            times.append(time.perf_counter() - before)
        assert min(times[0::2]) < 6 * min(times[1::2])


def random_controls(rng: random.Random) -> list[tuple[bytes, tuple]]:
    """No, one or a few control frames, each with what it decodes to."""
    found = []
    while rng.random() < 0.3:
        opcode, payload = rng.choice((PING, PONG)), rng.randbytes(rng.randrange(6))
        found.append((frame(opcode, payload), (opcode, payload)))
    return found


def random_message(rng: random.Random, deflate: Deflate | None) -> list:
    """The frames of a message, with control frames between; what they decode to."""
    opcode, size = rng.choice((TEXT, BINARY)), rng.choice((0, 1, 5, 126, 200))
    whole = "".join(rng.choices("aé€\U0001f600", k=size))
    payload, rsv = whole.encode(), 0
    if deflate is not None and rng.random() < 0.7:
        payload, rsv = deflate.compress(payload) or b"\0", 4
    cuts = sorted(rng.choices(range(len(payload) + 1), k=rng.randrange(4)))
    found = []
    for start, end in zip([0, *cuts], [*cuts, None], strict=True):
        kind = (CONTINUATION, 0) if start or found else (opcode, rsv)
        part, mask = payload[start:end], rng.randbytes(4)
        last = frame(kind[0], part, fin=end is None, rsv=kind[1], mask=mask)
        found += [(last, None), *(random_controls(rng) if end is not None else [])]
    found[-1] = (last, (opcode, whole if opcode == TEXT else whole.encode()))
    return found


def random_stream(rng: random.Random, deflate: Deflate | None) -> tuple[bytes, list]:
    """Some messages, and control frames anywhere."""
    found = random_controls(rng)
    for _ in range(rng.randrange(1, 5)):
        found += random_message(rng, deflate) + random_controls(rng)
    stream = b"".join(data for data, _ in found)
    return stream, [message for _, message in found if message is not None]


class TestCutAnywhere:
    """behaviour.md §7.3: one stream, cut at every byte, gives the same messages."""

    @pytest.mark.parametrize("deflated", [False, True])
    @pytest.mark.parametrize("seed", range(8))
    def test_a_random_stream(self, seed, deflated):
        rng = random.Random(seed)
        compressor = plain_deflate() if deflated else None
        stream, expected = random_stream(rng, compressor)

        def decoded(*pieces):
            return decode(*pieces, deflate=plain_deflate() if deflated else None)

        assert decoded(stream) == expected
        assert decoded(*(bytes([byte]) for byte in stream)) == expected
        for cut in range(len(stream) + 1):
            assert decoded(stream[:cut], stream[cut:]) == expected

    def test_random_bytes_end_in_the_same_way_however_they_are_cut(self):
        """Good or bad: the same messages, then the same close code or none."""
        rng = random.Random(4)
        for _ in range(300):
            stream, _ = random_stream(rng, None)
            broken = bytearray(stream)
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            ends = []
            for size in (1, 7, len(broken)):
                decoder, end = FrameDecoder(500), []
                try:
                    for i in range(0, len(broken), size):
                        end += decoder.decode(bytes(broken[i : i + size]))
                except WebSocketError as exc:
                    end = exc.args[0]
                ends.append(end)
            assert ends[0] == ends[1] == ends[2]


GOOD_CODES = [1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 3999, 4000, 4999]
BAD_CODES = [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]


class TestClose:
    """RFC 6455 §5.5.1 and §7.4, and the registry at IANA."""

    @pytest.mark.parametrize("code", GOOD_CODES)
    def test_good_codes(self, code):
        assert server.is_close_code(code)
        assert server.parse_close(code.to_bytes(2, "big")) == (code, "")
        data = code.to_bytes(2, "big") + "wörld".encode()
        assert server.parse_close(data) == (code, "wörld")

    @pytest.mark.parametrize("code", BAD_CODES)
    def test_bad_codes(self, code):
        """RFC 6455 §7.4.1: 1005, 1006 and 1015 "MUST NOT be set"."""
        assert not server.is_close_code(code)
        with pytest.raises(WebSocketError) as raised:
            server.parse_close(code.to_bytes(2, "big") + b"bye")
        assert raised.value.args[0] == 1002

    def test_every_code_of_two_bytes(self):
        good = [code for code in range(65536) if server.is_close_code(code)]
        between = range(3000, 5000)
        assert good == [c for c in GOOD_CODES if c < 3000] + list(between)

    @pytest.mark.parametrize("code", [None, "1000", 1000.0, True, b"\x03\xe8"])
    def test_what_is_no_number_is_no_code(self, code):
        assert not server.is_close_code(code)

    def test_none_is_1005(self):
        assert server.parse_close(b"") == (1005, "")

    def test_half_a_code_is_refused(self):
        with pytest.raises(WebSocketError) as raised:
            server.parse_close(b"\x03")
        assert raised.value.args[0] == 1002

    @pytest.mark.parametrize("reason", [b"\xff", b"ok\xc3", b"\xed\xa0\x80"])
    def test_a_reason_that_is_not_utf_8_is_refused(self, reason):
        with pytest.raises(WebSocketError) as raised:
            server.parse_close(b"\x03\xe8" + reason)
        assert raised.value.args[0] == 1007


STREAMS = {  # RFC 7692: clause: payloads of messages that all say Hello
    "7.2.3.1": ["f248cdc9c90700"],
    "7.2.3.2": ["f248cdc9c90700", "f200110000"],
    "7.2.3.3": ["000500faff48656c6c6f00"],
    "7.2.3.4": ["f348cdc9c9070000"],
    "7.2.3.4, and then more": ["f348cdc9c9070000", "f248cdc9c90700"],
    "7.2.3.5": ["f248050000 00ffffcac9c90700"],
}


class TestDeflateExamples:
    """RFC 7692 §7.2.3, "Examples"."""

    @pytest.mark.parametrize("payloads", STREAMS.values(), ids=STREAMS)
    def test_each_says_hello_whole_and_byte_by_byte(self, payloads):
        stream = b"".join(frame(TEXT, bytes.fromhex(p), rsv=4) for p in payloads)
        expected = [(Opcode.TEXT, "Hello")] * len(payloads)
        assert decode(stream, deflate=plain_deflate()) == expected
        pieces = [bytes([byte]) for byte in stream]
        assert decode(*pieces, deflate=plain_deflate()) == expected

    def test_fragments_share_one_compression(self):
        """§7.2.3.1: 41 03 f2 48 cd, 80 04 c9 c9 07 00."""
        data = frame(TEXT, HELLO[:3], fin=False, rsv=4) + frame(CONTINUATION, HELLO[3:])
        assert decode(data, deflate=plain_deflate()) == [(Opcode.TEXT, "Hello")]

    def test_an_empty_message_is_one_zero(self):
        """§7.2.3.6, "Generating an Empty Fragment"."""
        data = frame(TEXT, b"\0", rsv=4) * 2 + frame(TEXT, HELLO, rsv=4)
        expected = [(Opcode.TEXT, "")] * 2 + [(Opcode.TEXT, "Hello")]
        assert decode(data, deflate=plain_deflate()) == expected

    def test_an_empty_last_fragment_still_ends_the_message(self):
        data = frame(TEXT, HELLO, fin=False, rsv=4) + frame(CONTINUATION)
        expected = [(Opcode.TEXT, "Hello")]
        assert decode(data + data, deflate=plain_deflate()) == expected * 2

    def test_we_compress_as_the_examples_do(self):
        """§7.2.3.1 and §7.2.3.2, with the same zlib."""
        deflate = plain_deflate()
        assert deflate.compress(b"Hello") == HELLO
        assert deflate.compress(b"Hello") == bytes.fromhex("f200110000")

    def test_messages_may_be_plain_all_the_same(self):
        """§6: the bit says it for each message."""
        data = frame(TEXT, b"plain") + frame(TEXT, HELLO, rsv=4) + frame(TEXT, b"plain")
        found = [text for _, text in decode(data, deflate=plain_deflate())]
        assert found == ["plain", "Hello", "plain"]


def finished(data: bytes) -> bytes:
    """Compressed as a stream of its own, its last block marked BFINAL."""
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


class TestFinalBlocks:
    """RFC 7692 §7.2.1: an endpoint "MAY use … the "BFINAL" bit set to 1", and "the next
    DEFLATE block follows"."""

    @pytest.mark.parametrize(
        "parts", [[b"Hello"], [b"Hel", b"lo"], [b"H"] * 5, [b"", b"x"]]
    )
    def test_what_follows_a_final_block_belongs_to_the_message(self, parts):
        payload = b"".join(map(finished, parts)) + b"\0"
        stream = frame(BINARY, payload, rsv=4) * 2
        expected = [(Opcode.BINARY, b"".join(parts))] * 2
        assert decode(stream, deflate=plain_deflate()) == expected
        pieces = [bytes([byte]) for byte in stream]
        assert decode(*pieces, deflate=plain_deflate()) == expected

    def test_fragments_behind_a_final_block_take_no_memory(self):
        """What if 1 MiB comes behind the end of a stream, and all of it is kept?"""
        decoder = FrameDecoder(2**20, plain_deflate())
        more = frame(CONTINUATION, finished(b""), fin=False)
        junk = frame(CONTINUATION, b"\x00\x00\x00\xff\xff" * 2000, fin=False)
        list(decoder.decode(frame(BINARY, finished(b"x"), fin=False, rsv=4) + more))
        tracemalloc.start()
        try:
            for _ in range(100):
                list(decoder.decode(junk))
            assert tracemalloc.get_traced_memory()[0] < 200_000
        except WebSocketError:
            pass  # refused: that bounds it, too
        finally:
            tracemalloc.stop()


PMD = "permessage-deflate"
NEGOTIATIONS = {  # offer: answer, None to decline all (RFC 7692 §5.1, §7.1)
    "": None,
    "x-unknown": None,
    "permessage-bzip2": None,
    PMD: PMD,
    f"x-unknown, {PMD}": PMD,
    f"x-unknown; a=b , {PMD} , {PMD}; server_no_context_takeover": PMD,
    # §7.1.1.1 and §7.1.1.2: neither has a value
    f"{PMD}; server_no_context_takeover": f"{PMD}; server_no_context_takeover",
    f"{PMD};client_no_context_takeover": f"{PMD}; client_no_context_takeover",
    f"{PMD}; server_no_context_takeover=1": None,
    f"{PMD}; server_no_context_takeover=": None,
    f"{PMD}; client_no_context_takeover=true": None,
    # §7.1.2.1: "an integer … without leading zeroes"; 8 is more than zlib can promise
    f"{PMD}; server_max_window_bits=15": f"{PMD}; server_max_window_bits=15",
    f"{PMD}; server_max_window_bits=9": f"{PMD}; server_max_window_bits=9",
    f'{PMD}; server_max_window_bits="10"': f"{PMD}; server_max_window_bits=10",
    f"{PMD}; server_max_window_bits=8": None,
    f"{PMD}; server_max_window_bits": None,
    f"{PMD}; server_max_window_bits=": None,
    f"{PMD}; server_max_window_bits=7": None,
    f"{PMD}; server_max_window_bits=16": None,
    f"{PMD}; server_max_window_bits=010": None,
    f"{PMD}; server_max_window_bits=1\N{SUPERSCRIPT TWO}": None,
    f"{PMD}; server_max_window_bits=-9": None,
    # §7.1.2.2: with a value, or as a hint without one
    f"{PMD}; client_max_window_bits": PMD,
    f"{PMD}; client_max_window_bits=15": f"{PMD}; client_max_window_bits=15",
    f"{PMD}; client_max_window_bits=8": f"{PMD}; client_max_window_bits=8",
    f"{PMD}; client_max_window_bits=": None,
    f"{PMD}; client_max_window_bits=7": None,
    f"{PMD}; client_max_window_bits=16": None,
    f"{PMD}; client_max_window_bits=08": None,
    f'{PMD}; client_max_window_bits="1': None,
    # §7: unknown, or the same name twice
    f"{PMD}; x-unknown": None,
    f"{PMD}; x-unknown=1": None,
    f"{PMD}; Server_no_context_takeover": None,
    f"{PMD}; server_no_context_takeover; server_no_context_takeover": None,
    f"{PMD}; client_max_window_bits; client_max_window_bits=10": None,
    f"{PMD}; ": None,
    # §5: the offers stand in the client's order, the first that will do is taken
    f"{PMD}; x-unknown, {PMD}; client_max_window_bits": PMD,
    f"{PMD}; server_max_window_bits=8, {PMD}": PMD,
    f"{PMD}; server_max_window_bits=11, {PMD}": f"{PMD}; server_max_window_bits=11",
}


class TestNegotiation:
    """RFC 7692 §7.1, "Extension Parameters"."""

    @pytest.mark.parametrize("offer", NEGOTIATIONS)
    def test_each_offer_has_its_answer(self, offer):
        agreed, expected = offered(offer), NEGOTIATIONS[offer]
        assert (agreed and agreed.answer) == (expected and expected.encode())

    def test_offers_may_stand_in_several_fields(self):
        name = b"sec-websocket-extensions"
        fields = [(name, b"x-unknown"), (b"host", b"x"), (name, PMD.encode())]
        offers = server.tokens(fields, b"sec-websocket-extensions")
        assert offers == ["x-unknown", PMD]

    def test_all_four_at_once(self):
        parameters = "; server_no_context_takeover; client_no_context_takeover"
        parameters += "; server_max_window_bits=10; client_max_window_bits=12"
        agreed = plain_deflate(parameters)
        assert agreed.answer == (PMD + parameters).encode()

    @pytest.mark.parametrize("bits", range(9, 16))
    def test_our_window_is_no_larger_than_asked_for(self, bits):
        """§7.1.2.1. An inflater with that window can read it: far copies are absent."""
        deflate = plain_deflate(f"; server_max_window_bits={bits}")
        message = random.Random(5).randbytes(2**14) * 3
        small = zlib.decompressobj(wbits=-bits)
        for _ in range(3):
            data = deflate.compress(message) + b"\0\0\xff\xff"
            assert small.decompress(data) == message


class TestContext:
    """RFC 7692 §7.1.1, "Context Takeover Control"."""

    WORDS = b" ".join(b"%d words that repeat nothing" % n for n in range(20))

    def test_ours_is_taken_over(self):
        deflate, inflater = plain_deflate(), zlib.decompressobj(wbits=-15)
        sizes = []
        for _ in range(3):
            data = deflate.compress(self.WORDS)
            assert inflater.decompress(data + b"\0\0\xff\xff") == self.WORDS
            sizes.append(len(data))
        assert sizes[1] < sizes[0] / 4 and sizes[2] < sizes[0] / 4

    def test_ours_is_forgotten_when_the_client_cannot_keep_it(self):
        deflate = plain_deflate("; server_no_context_takeover")
        assert deflate.compress(self.WORDS) == deflate.compress(self.WORDS)
        data = deflate.compress(self.WORDS) + b"\0\0\xff\xff"
        assert zlib.decompressobj(wbits=-15).decompress(data) == self.WORDS

    def test_theirs_is_kept(self):
        client = zlib.compressobj(wbits=-15)
        stream = b""
        for _ in range(3):
            data = client.compress(self.WORDS) + client.flush(zlib.Z_SYNC_FLUSH)
            stream += frame(BINARY, data[:-4], rsv=4)
        expected = [(Opcode.BINARY, self.WORDS)] * 3
        assert decode(stream, deflate=plain_deflate()) == expected

    def test_theirs_is_forgotten_when_they_said_so(self):
        """A message that refers to the one before is refused then."""
        stream = [frame(TEXT, HELLO, rsv=4), frame(TEXT, HELLO, rsv=4)]
        parameters = "; client_no_context_takeover"
        found = decode(*stream, deflate=plain_deflate(parameters))
        assert found == [(Opcode.TEXT, "Hello")] * 2
        stream[1] = frame(TEXT, bytes.fromhex("f200110000"), rsv=4)
        with pytest.raises(WebSocketError):
            decode(*stream, deflate=plain_deflate(parameters))

    def test_the_two_directions_do_not_share_a_context(self):
        deflate = plain_deflate()
        deflate.compress(b"Hello")
        assert decode(frame(TEXT, HELLO, rsv=4), deflate=deflate) == [(TEXT, "Hello")]


def bomb(size: int) -> bytes:
    return plain_deflate().compress(bytes(size))


class TestLimit:
    """issue 4: "a limit on inflated size"; RFC 7692 §9 warns of it."""

    @pytest.mark.parametrize(
        "size, passes", [(9999, True), (10000, True), (10001, False)]
    )
    def test_a_message_may_inflate_to_exactly_the_limit(self, size, passes):
        data = frame(BINARY, bomb(size), rsv=4) * 2
        if passes:
            expected = [(Opcode.BINARY, bytes(size))] * 2
            assert decode(data, max_size=10000, deflate=plain_deflate()) == expected
        else:
            found = refusal(data, max_size=10000, deflate=plain_deflate())
            assert found[0] == 1009

    def test_fragments_count_together(self):
        data = bomb(10001)
        half = len(data) // 2
        stream = frame(BINARY, data[:half], fin=False, rsv=4)
        stream += frame(CONTINUATION, data[half:])
        assert refusal(stream, max_size=10000, deflate=plain_deflate())[0] == 1009
        assert decode(stream, max_size=10001, deflate=plain_deflate())

    def test_a_bomb_is_refused_before_it_is_inflated(self):
        """16 KiB that hold 16 MiB, into a limit of 64 KiB."""
        data = frame(BINARY, bomb(2**24), rsv=4)
        assert len(data) < 17000
        tracemalloc.start()
        try:
            with pytest.raises(WebSocketError) as raised:
                decode(data, max_size=2**16, deflate=plain_deflate())
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()
        assert raised.value.args[0] == 1009

    def test_a_message_of_the_limit_may_get_longer_by_compression(self):
        """The limit counts "bytes of a WebSocket message", not of its frames."""
        noise = random.Random(6).randbytes(2**16)
        payload = plain_deflate().compress(noise)
        assert len(payload) > len(noise)
        data = frame(BINARY, payload, rsv=4)
        found = decode(data, max_size=2**16, deflate=plain_deflate())
        assert found == [(Opcode.BINARY, noise)]

    @pytest.mark.parametrize(
        "junk", [b"\xff" * 9, b"\x07" * 9, b"\x00\x05\x00\x05\x00"]
    )
    def test_garbage_is_refused_with_1007(self, junk):
        """RFC 6455 §7.4.1: "data within a message that was not consistent"."""
        data = frame(BINARY, junk, rsv=4)
        assert refusal(data, deflate=plain_deflate())[0] == 1007

    def test_a_copy_from_before_the_start_is_refused(self):
        """The window of the first message is empty."""
        data = frame(TEXT, bytes.fromhex("f200110000"), rsv=4)
        assert refusal(data, deflate=plain_deflate())[0] == 1007
