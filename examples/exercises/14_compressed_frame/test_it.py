"""The examples of RFC 7692, and then frames on a socket: foal in a thread, with your
WebSocket in place of its own, and a client that is this test."""

import contextlib
import os
import re
import tracemalloc
import zlib

import foal_tools
import pytest
import ws_echo

import server

DEADLINE = 3.0  # seconds; only a server that says nothing takes so long
MIB = 2**20
OFFER = b"permessage-deflate; client_max_window_bits"  # what browsers say
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
TEXT, BINARY, PING, FINAL, RSV1 = 1, 2, 9, 0x80, 0x40
HELLO = bytes.fromhex("f2 48 cd c9 c9 07 00")  # RFC 7692 §7.2.3.1


def squeezed(data: bytes) -> bytes:
    """As RFC 7692 §7.2.1 says it, by the standard library."""
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def frame(first: int, payload: bytes) -> bytes:
    """A client's: masked, with a mask of zeros."""
    size = len(payload)
    length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
    return bytes([first, length[0] | 0x80]) + length[1:] + bytes(4) + payload


@pytest.fixture
def opened(exercise, monkeypatch):
    """A client of foal with the exercise's WebSocket: its handshake is done, and `agreed`
    is what the 101 said about extensions. The app echoes."""
    monkeypatch.setattr(server, "WebSocket", exercise.CompressingWebSocket)
    monkeypatch.setattr(foal_tools, "PATIENCE", DEADLINE)

    @contextlib.contextmanager
    def opened(offer=OFFER, **options):
        field = b"Sec-WebSocket-Extensions: %b\r\n" % offer if offer else b""
        options.setdefault("lifespan", "off")
        with foal_tools.serving(ws_echo.app, **options) as running:
            with running.connect() as client:
                client.send(UPGRADE + field + b"\r\n")
                head = client.read_until(b"\r\n\r\n").lower()
                assert head.startswith(b"http/1.1 101 ")
                client.agreed = re.findall(rb"\nsec-websocket-extensions: (.*)\r", head)
                yield client
                client.half_close()

    return opened


def said(client, *frames, size: int = 0) -> bytes:
    """What the server says to these: so many bytes, or all up to its end."""
    client.send(b"".join(frames))
    while size and len(client.unread) < size and (data := client.sock.recv(65536)):
        client.unread += data
    if not size:
        return client.read_all()
    answer, client.unread = client.unread, b""
    return answer


def close(code: int) -> bytes:
    return b"\x88\x02" + code.to_bytes(2, "big")


class TestAMessage:
    """RFC 7692 §7.2, without a server."""

    def test_hello_is_compressed_as_in_the_rfc(self, exercise):
        assert exercise.deflate(b"Hello") == HELLO

    def test_an_empty_one_is_one_byte(self, exercise):
        """RFC 7692 §7.2.3.6."""
        assert exercise.deflate(b"") == b"\x00"

    @pytest.mark.parametrize(
        "compressed",
        [
            pytest.param("f2 48 cd c9 c9 07 00", id="7.2.3.1, one block"),
            pytest.param("00 05 00 fa ff 48 65 6c 6c 6f 00", id="7.2.3.3, stored"),
            pytest.param("f3 48 cd c9 c9 07 00 00", id="7.2.3.4, a last block"),
            pytest.param("f2 48 05 00 00 00 ff ff ca c9 c9 07 00", id="7.2.3.5, two"),
        ],
    )
    def test_it_is_decompressed_as_in_the_rfc(self, exercise, compressed):
        assert exercise.inflate(bytes.fromhex(compressed), 5) == b"Hello"

    @pytest.mark.parametrize("size", [0, 1, 300, 100_000])
    def test_there_and_back(self, exercise, size):
        data = os.urandom(size // 2) + bytes(size - size // 2)
        assert exercise.inflate(squeezed(data), size) == data
        assert exercise.inflate(exercise.deflate(data), size) == data

    @pytest.mark.parametrize("data", [b"\xff\xff", b"Hello"])
    def test_what_is_not_deflated_is_1007(self, exercise, data):
        with pytest.raises(server.WebSocketError) as raised:
            exercise.inflate(data, 5)
        assert raised.value.args[0] == 1007

    def test_a_byte_too_many_is_1009(self, exercise):
        with pytest.raises(server.WebSocketError) as raised:
            exercise.inflate(HELLO, 4)
        assert raised.value.args[0] == 1009

    def test_a_bomb_is_not_even_unpacked(self, exercise):
        """16 KiB that would become 16 MiB: the limit has to stop zlib, not to count what
        it has made."""
        bomb = squeezed(bytes(16 * MIB))
        tracemalloc.start()
        try:
            with pytest.raises(server.WebSocketError):
                exercise.inflate(bomb, 1000)
            assert tracemalloc.get_traced_memory()[1] < MIB
        finally:
            tracemalloc.stop()


class TestTheHandshake:
    """RFC 7692 §5.1, §7.1."""

    @pytest.mark.parametrize(
        "offer",
        [
            "permessage-deflate",
            "permessage-deflate; client_max_window_bits",
            'permessage-deflate; client_max_window_bits="10"',
            "permessage-deflate;client_no_context_takeover; server_no_context_takeover",
        ],
    )
    def test_an_offer_is_taken_and_no_context_with_it(self, exercise, offer):
        agreed = exercise.agree([offer])
        assert agreed is not None
        name, *parameters = agreed.decode().split("; ")
        assert name == "permessage-deflate"
        sides = {"client_no_context_takeover", "server_no_context_takeover"}
        assert set(parameters) == sides

    @pytest.mark.parametrize(
        "offer",
        [
            "x-webkit-deflate-frame",
            "permessage-deflate; unknown",
            "permessage-deflate; client_max_window_bits=7",
            "permessage-deflate; client_max_window_bits=16",
            "permessage-deflate; server_max_window_bits=9",
            "permessage-deflate; server_no_context_takeover=1",
            "permessage-deflate; client_max_window_bits; client_max_window_bits=9",
        ],
    )
    def test_an_offer_that_we_cannot_keep_is_not_taken(self, exercise, offer):
        """Some of these are malformed. One asks for a smaller window than ours."""
        assert exercise.agree([offer]) is None

    def test_the_first_good_one_counts(self, exercise):
        offers = ["permessage-bzip2", "permessage-deflate; unknown", "permessage-deflate"]
        assert exercise.agree(offers) and not exercise.agree(offers[:2])

    def test_the_101_says_it_once(self, exercise, opened):
        with opened() as client:
            assert len(client.agreed) == 1
            assert client.agreed[0] == exercise.agree(["permessage-deflate"]).lower()

    @pytest.mark.parametrize("offer", [b"", b"x-webkit-deflate-frame"])
    def test_without_an_agreement_all_is_as_before(self, opened, offer):
        with opened(offer) as client:
            answer = said(client, frame(FINAL | TEXT, b"Hello"), size=7)
            assert (client.agreed, answer) == ([], b"\x81\x05Hello")
            assert said(client, frame(FINAL | RSV1 | TEXT, HELLO)) == close(1002)


class TestFrames:
    """RFC 7692 §6, over a socket. The app echoes."""

    @pytest.mark.parametrize("opcode", [TEXT, BINARY])
    def test_a_compressed_message_is_answered_with_one(self, opened, opcode):
        first = FINAL | RSV1 | opcode
        with opened() as client:
            assert said(client, frame(first, HELLO), size=9) == bytes([first, 7]) + HELLO

    def test_no_message_needs_the_one_before(self, opened):
        """No context takeover: twice the same is twice the same bytes."""
        hello = frame(FINAL | RSV1 | TEXT, HELLO)
        with opened() as client:
            assert said(client, hello, hello, size=18) == (b"\xc1\x07" + HELLO) * 2

    def test_one_in_fragments(self, opened):
        """RFC 7692 §7.2.3.1: the first frame alone has the mark."""
        parts = frame(RSV1 | TEXT, HELLO[:3]), frame(FINAL, HELLO[3:])
        with opened() as client:
            answer = said(client, parts[0], frame(FINAL | PING, b"?"), parts[1], size=12)
        assert answer == b"\x8a\x01?" + b"\xc1\x07" + HELLO

    def test_the_client_need_not_compress(self, opened):
        frames = frame(FINAL | TEXT, b"Hello"), frame(FINAL | RSV1 | TEXT, HELLO)
        with opened() as client:
            assert said(client, *frames, size=18) == (b"\xc1\x07" + HELLO) * 2

    @pytest.mark.parametrize(
        "frames",
        [
            frame(RSV1 | TEXT, HELLO[:3]) + frame(FINAL | RSV1, HELLO[3:]),
            frame(FINAL | RSV1 | PING, b""),
            frame(FINAL | 0x20 | TEXT, HELLO),
        ],
        ids=["a continuation", "a ping", "another bit"],
    )
    def test_the_mark_in_a_wrong_place_is_1002(self, opened, frames):
        with opened() as client:
            assert said(client, frames) == close(1002)

    @pytest.mark.parametrize("payload", [squeezed(b"\xff"), b"\xff\xff"])
    def test_what_cannot_be_text_is_1007(self, opened, payload):
        """It is looked at when it is unpacked, if it can be unpacked at all."""
        with opened() as client:
            assert said(client, frame(FINAL | RSV1 | TEXT, payload)) == close(1007)

    def test_the_limit_is_that_of_the_unpacked_message(self, opened):
        bomb = frame(FINAL | RSV1 | BINARY, squeezed(bytes(MIB)))
        with opened(ws_max_size=100_000) as client:
            assert said(client, bomb) == close(1009)
