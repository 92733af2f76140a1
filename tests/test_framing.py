"""Where does one message end, and the next begin? Two readers that disagree make
request smuggling (RFC 9112 §11.2): so whatever could be read in two ways is refused,
and what stands behind it is never served. Chapter 5: Gate, check_request, and h11.
"""

import contextlib
import random
import re
import socket

import pytest
from conftest import GET, serving

import server

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: test\r\n\r\n"
SECOND = b"GET /second HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"
HELLO = b"5\r\nhello\r\n0\r\n\r\n"


class Recorder:
    """Reads the whole body, answers with what it saw, and notes the path."""

    def __init__(self):
        self.paths = []

    async def __call__(self, scope, receive, send):
        assert scope["type"] == "http"
        self.paths.append(scope["path"])
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        else:
            return
        text = b"%s %s [%s]" % (scope["method"].encode(), scope["raw_path"], body)
        fields = [(b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        await send({"type": "http.response.body", "body": text})


@pytest.fixture(scope="module")
def one_server():
    with serving(Recorder()) as s:
        yield s


@pytest.fixture
def served(one_server):
    one_server.config.app.paths.clear()
    return one_server


def paths(s):
    """The paths that have reached the app, asked behind all that the loop has to do."""
    return s.call(list, s.config.app.paths)


def whole(s, client, data):
    client.send(data)


def byte_by_byte(s, client, data):
    """One byte a packet, each read before the next one leaves."""
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for i in range(len(data)):
        client.send(data[i : i + 1])
        s.call(int)


def statuses(answers):
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def head(*fields, line=b"POST /first HTTP/1.1"):
    return b"\r\n".join([line, b"Host: test", *fields, b"", b""])


def chunks(body, *fields):
    return head(CHUNKED, *fields) + body


def flat(tables):
    """{status: {name: bytes}} as {name: (status, bytes)}."""
    return {name: (status, t[name]) for status, t in tables.items() for name in t}


LENGTH = b"Content-Length: 5"
CODING = b"Transfer-Encoding: "
ON_1_0 = b"POST /first HTTP/1.0"

# Each is sent with SMUGGLED behind it.
BAD_HEADS = {400: {}, 501: {}}
BAD_HEADS[400] |= {  # two framings, or one that is not where it should be
    "length, then chunked": head(LENGTH, CHUNKED) + HELLO,
    "chunked, then length": head(CHUNKED, b"Content-Length: 15") + HELLO,
    "length zero and chunked": head(b"Content-Length: 0", CHUNKED) + HELLO,
    "length and chunked in capitals": head(LENGTH.upper(), CHUNKED.upper()) + HELLO,
    "chunked on 1.0": head(CHUNKED, line=ON_1_0) + HELLO,
    "length and chunked on 1.0": head(LENGTH, CHUNKED, line=ON_1_0) + HELLO,
    "two equal lengths": head(LENGTH, LENGTH) + b"hello",
    "two lengths": head(LENGTH, b"Content-Length: 6") + b"hello",
    "two lengths, cases differ": head(LENGTH, LENGTH.lower()) + b"hello",
    "two lengths apart": head(LENGTH, b"X: y", b"Content-Length: 0") + b"hello",
}
BAD_HEADS[400] |= {
    f"length {value[:24]!r}": head(b"Content-Length:" + value) + b"hello"
    for value in [b" 5, 5", b" 5,5", b" 5,6", b" 5,", b" ,5", b" +5", b" -5", b" 0x5"]
    + [b"", b" ", b" 5 x", b" 5;", b" 5.0", b" 5 5", b" 1_0", b" 5e0", b' "5"', b" V"]
    + [b" \xb2", b" \xd9\xa5", b" \x0b5", b" " + b"9" * 21, b" " + b"0" * 2000 + b"5"]
}
BAD_HEADS[501] |= {
    f"coding {value!r}": head(b"Transfer-Encoding:" + value) + HELLO
    for value in [b" gzip", b" identity", b"", b" gzip, chunked", b" chunked, gzip"]
    + [b" chunked, chunked", b" xchunked", b" chunkedx", b" chunked;q=1", b" ,chunked"]
    + [b' "chunked"', b" \xa0chunked", b" chun ked", b" c\xc4\xb1hunked"]
}
BAD_HEADS[501] |= {
    "chunked in two fields": head(CHUNKED, CHUNKED) + HELLO,
    "chunked, then identity": head(CHUNKED, CODING + b"identity") + HELLO,
    "length and gzip": head(LENGTH, CODING + b"gzip") + HELLO,  # h11 reads it first
}
BAD_HEADS[400] |= {  # lines
    "vertical tab before chunked": head(CODING + b"\x0bchunked") + HELLO,
    "vertical tab behind chunked": head(CHUNKED + b"\x0b") + HELLO,
    "space before the colon, length": head(b"Content-Length : 5") + b"hello",
    "space before the colon, coding": head(b"Transfer-Encoding : chunked") + HELLO,
    "tab before the colon": head(b"Content-Length\t: 5") + b"hello",
    "length folded": head(b"Content-Length:", b" 5") + b"hello",
    "coding folded": head(b"Transfer-Encoding:", b"\tchunked") + HELLO,
    "coding folded in its middle": head(CHUNKED, b" , gzip") + HELLO,
    "length hidden in a folded line": head(b"X: y", b" " + LENGTH) + b"hello",
    "space before the first field": head(line=b"POST /first HTTP/1.1\r\n X: y"),
    "tab before a field": head(b"\t" + LENGTH) + b"hello",
    "bare LF in the head": head(b"X: y\n" + LENGTH) + b"hello",
    "bare LF before the end": head(LENGTH)[:-2] + b"\nhello",
    "bare LF everywhere": head(LENGTH).replace(b"\r", b"") + b"hello",
    "bare CR in the head": head(b"X: y\r" + LENGTH) + b"hello",
    "bare CR at a line's end": head(b"X: y\r", LENGTH) + b"hello",
    "NUL in a length": head(LENGTH + b"\x00") + b"hello",
    "NUL in a name": head(b"\x00" + LENGTH) + b"hello",
    "a field without a colon": head(b"Content-Length 5") + b"hello",
    "a field without a name": head(b": 5") + b"hello",
    "space in a name": head(b"Content Length: 5") + b"hello",
    "a name that is no token": head(b"Content(Length): 5") + b"hello",
    "a name that is not ASCII": head(b"Cont\xe9nt: 5") + b"hello",
}
BAD_HEADS[400] |= {
    f"request line {line!r}": head(line=line)
    for line in [b"GET  /a HTTP/1.1", b"GET /a  HTTP/1.1", b"GET /a HTTP/1.1 ", b"GET"]
    + [b" GET /a HTTP/1.1", b"GET\t/a HTTP/1.1", b"GET /a", b"/a HTTP/1.1", b"\r"]
    + [b"GET /\xc3\xa4 HTTP/1.1", b"GET /a\r HTTP/1.1", b"GET /a b HTTP/1.1"]
    + [b"GET HTTP/1.1", b"G(T /a HTTP/1.1", b"GET /a HTTP/1.1\x0b", b"\xb2 /a HTTP/1.1"]
    + [b"\r\n\r\n\r\nGET /a HTTP/1.1", b"\r\n\r\n\r\n\r\nGET /a HTTP/1.1"]
    + [b"\nGET /a HTTP/1.1", b"\r\n\nGET /a HTTP/1.1", b"\r\n GET /a HTTP/1.1"]
}
BAD_HEADS = flat(BAD_HEADS)

BAD_BODIES = {400: {}, 431: {}}
BAD_BODIES[400] |= {
    f"chunk line {line[:24]!r}": chunks(line + b"hello\r\n0\r\n\r\n")
    for line in [b"5 \r\n", b"5\t\r\n", b" 5\r\n", b"+5\r\n", b"-5\r\n", b"0x5\r\n"]
    + [b"5_\r\n", b"0_5\r\n", b"\r\n", b"g\r\n", b"5h\r\n", b"5,5\r\n", b"\xb2\r\n"]
    + [b"5\n", b"5\r", b"5\r\r\n", b"5\n\r\n", b"5\x00\r\n"]
    + [b"5;\r\n", b"5 ;a\r\n", b"5; a\r\n", b"5;a b\r\n", b"5;a =b\r\n", b"5;a= b\r\n"]
    + [b"5;a=b \r\n", b"5;=b\r\n", b"5;a=\r\n", b"5;a=\x00\r\n", b"5;a\x0b\r\n"]
    + [b"5;a=b\n", b"5;a\nb\r\n", b"5;a\rb\r\n", b'5;a="b\rc"\r\n', b'5;a="b\nc"\r\n']
    + [b'5;a="b\r\n', b'5;a="b"c\r\n', b'5;a="\\\r\n"\r\n', b"5;\xe9\r\n"]
    + [b"5;a=\xe9\r\n", b"5;a=" + b"x" * 2000 + b"\r\n", b"5" + b";a=b" * 500 + b"\r\n"]
    + [b"0" * 16 + b"5\r\n", b"f" * 17 + b"\r\n", b"0" * 2000 + b"5\r\n"]
}
BAD_BODIES[400] |= {
    "data longer than its chunk": chunks(b"5\r\nhello!\r\n0\r\n\r\n"),
    "data shorter than its chunk": chunks(b"5\r\nhell\r\n0\r\n\r\n"),
    "no CRLF behind the data": chunks(b"5\r\nhello0\r\n\r\n"),
    "LF behind the data": chunks(b"5\r\nhello\n0\r\n\r\n"),
    "CR behind the data": chunks(b"5\r\nhello\r0\r\n\r\n"),
    "two letters behind the data": chunks(b"5\r\nhelloXX0\r\n\r\n"),
    "the last chunk ends with LF": chunks(b"5\r\nhello\r\n0\n\r\n"),
    "space behind the last size": chunks(b"5\r\nhello\r\n0 \r\n\r\n"),
    "bad line behind good ones": chunks(b"1\r\nx\r\n" * 50 + b"1 \r\nx\r\n0\r\n\r\n"),
}
BAD_BODIES[400] |= {
    f"trailer {lines!r}": chunks(b"5\r\nhello\r\n0\r\n" + lines + b"\r\n")
    for lines in [b"no colon\r\n", b" X: y\r\n", b"X : y\r\n", b"X: y\n", b"X: y\r"]
    + [b"X: y\r\n folded\r\n", b"X: \x00\r\n", b"X: a\rb\r\n", b"\n", b": y\r\n"]
    + [b"X: \x0b\r\n", b"X: y\r\n\tfolded\r\n"]
}
BAD_BODIES[431] |= {
    "too many trailers": chunks(b"0\r\n" + b"X: y\r\n" * 110 + b"\r\n"),
    "long trailers": chunks(b"0\r\n" + (b"X: " + b"y" * 3000 + b"\r\n") * 22 + b"\r\n"),
}
BAD_BODIES = flat(BAD_BODIES)

# name: (bytes, the body that the app reads)
END = b"\r\n0\r\n\r\n"
GOOD = {
    "no body": (head(), b""),
    "length": (head(LENGTH) + b"hello", b"hello"),
    "length 0": (head(b"Content-Length: 0"), b""),
    "length 005": (head(b"Content-Length: 005") + b"hello", b"hello"),
    "length without a space": (head(b"Content-Length:5") + b"hello", b"hello"),
    "length between spaces": (head(b"Content-Length: \t 5 \t") + b"hello", b"hello"),
    "request in a body": (head(b"Content-Length: 38") + SMUGGLED, SMUGGLED),
    "control characters in a body": (head(LENGTH) + b"\0\n\r\n ", b"\0\n\r\n "),
    "chunked": (chunks(HELLO), b"hello"),
    "chunked, nothing in it": (chunks(b"0\r\n\r\n"), b""),
    "Chunked": (head(b"transfer-encoding: Chunked") + HELLO, b"hello"),
    "tab before chunked": (head(b"Transfer-Encoding:\tchunked") + HELLO, b"hello"),
    "hexadecimal sizes": (chunks(b"a\r\n0123456789\r\nB\r\nabcdefghijk" + END),)
    + (b"0123456789abcdefghijk",),
    "zeros before the size": (chunks(b"00005\r\nhello\r\n000\r\n\r\n"), b"hello"),
    "sixteen digits": (chunks(b"0" * 15 + b"5\r\nhello" + END), b"hello"),
    "end in a chunk": (chunks(b"7" + b"\r\n" + END + END), END),
    "extension": (chunks(b"5;a\r\nhello\r\n0;b=c\r\n\r\n"), b"hello"),
    "three extensions": (chunks(b'5;a=b;c;d="e"\r\nhello' + END), b"hello"),
    "quoted extension": (chunks(b'5;a="; \\"\\\\ \xe9\t"\r\nhello' + END), b"hello"),
    "long extension": (chunks(b"5;" + b"x" * 998 + b"\r\nhello" + END), b"hello"),
    "trailer": (chunks(b"5\r\nhello\r\n0\r\nX: y\r\n\r\n"), b"hello"),
    "trailers": (chunks(b"5\r\nhello\r\n0\r\nX: y\r\nZ:\r\n\r\n"), b"hello"),
    "length in a trailer": (chunks(b"0\r\nContent-Length: 99\r\n\r\n"), b""),
    "one empty line first": (b"\r\n" + head(), b""),
    "two empty lines first": (b"\r\n\r\n" + head(), b""),
    "two empty lines first and behind": (
        b"\r\n\r\n" + head(LENGTH) + b"hello\r\n\r\n",
        b"hello",
    ),
    "two empty lines behind": (head(LENGTH) + b"hello\r\n\r\n", b"hello"),
    "tab and Latin-1 in a value": (head(b"X: a\tb\xe9"), b""),
}


@pytest.mark.parametrize("deliver", [whole, byte_by_byte])
class TestFraming:
    """RFC 9112 §6.3, message body length; §7.1, chunked; §2.2, message parsing."""

    @pytest.mark.parametrize("name", BAD_HEADS)
    def test_a_bad_head_never_reaches_the_app_nor_what_is_behind_it(
        self, served, name, deliver
    ):
        status, request = BAD_HEADS[name]
        with served.connect() as c:
            deliver(served, c, request + SMUGGLED)
            answer = c.read_all()
        assert statuses(answer) == [status]
        assert b"\r\nconnection: close\r\n" in answer.lower()
        assert paths(served) == []

    @pytest.mark.parametrize("name", BAD_BODIES)
    def test_a_bad_body_is_refused_and_nothing_behind_it_is_served(
        self, served, name, deliver
    ):
        status, request = BAD_BODIES[name]
        if len(request) > 5000:
            deliver = whole  # byte by byte it teaches nothing more, slowly
        with served.connect() as c:
            deliver(served, c, request + SMUGGLED)
            answer = c.read_all()
        assert statuses(answer) == [status]
        assert b"\r\nconnection: close\r\n" in answer.lower()
        assert "/smuggled" not in paths(served)

    @pytest.mark.parametrize("name", GOOD)
    def test_a_good_message_ends_where_it_says_and_the_next_is_served(
        self, served, name, deliver
    ):
        request, body = GOOD[name]
        with served.connect() as c:
            deliver(served, c, request + SECOND)
            assert c.response()[::2] == (200, b"POST /first [%s]" % body)
            assert c.response()[::2] == (200, b"GET /second []")
            assert c.read_all() == b""
        assert "/smuggled" not in paths(served)


class TestControlCharacters:
    """RFC 9110 §5.5, field values; RFC 9112 §2.2: CRLF ends a line, nothing else."""

    CONTROLS = sorted({*range(32), 127} - {*b"\t\r\n"})
    PLACES = {
        "method": b"G%cET /first HTTP/1.1\r\nHost: test\r\n\r\n",
        "target": b"GET /fi%crst HTTP/1.1\r\nHost: test\r\n\r\n",
        "version": b"GET /first HTTP/1.1%c\r\nHost: test\r\n\r\n",
        "name": b"GET /first HTTP/1.1\r\nHost: test\r\nX%cX: y\r\n\r\n",
        "value": b"GET /first HTTP/1.1\r\nHost: test\r\nX: a%cb\r\n\r\n",
        "value's end": b"GET /first HTTP/1.1\r\nHost: test\r\nX: ab%c\r\n\r\n",
    }

    @pytest.mark.parametrize("place", PLACES)
    def test_a_control_character_in_the_head_is_refused(self, served, place):
        for character in self.CONTROLS:
            answer = served.talk(self.PLACES[place] % character + SMUGGLED)
            assert statuses(answer) == [400], character
        assert paths(served) == []

    @pytest.mark.parametrize(
        "start",
        [b"GET /\x00", b"GET /\rx", b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\nX: y\r\r"]
        + [b"GET / HTTP/1.1\r\n folded", b"\r\n\r\n\x00"],
    )
    def test_what_can_only_be_refused_is_refused_before_the_end(self, served, start):
        with served.connect() as c:
            c.send(start)
            assert statuses(c.read_all()) == [400]


class TestCutAnywhere:
    """TCP is a stream: where it is cut into packets means nothing."""

    CONVERSATION = (
        b"GET /1?a=b HTTP/1.1\r\nHost: test\r\n\r\n"
        b"POST /2 HTTP/1.1\r\nHost: test\r\nContent-Length: 12\r\n\r\n"
        b"\r\n\r\nGET /\r\r\n"
        b"POST /3 HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'3;x="\\";"\r\n\r\n0\r\nb\r\n\r\n0123456\r\n\r\n0\r\nX: y\r\nZ: \r\n\r\n'
        b"HEAD /4 HTTP/1.1\r\nHost: test\r\n\r\n"
        b"POST /5 HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        b"GET /6 HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
    )

    def answers(self, s, *pieces):
        """All that comes back, with the date masked. Each piece is read alone."""
        with s.connect() as c:
            c.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                c.send(piece)
                s.call(int)
            return re.sub(rb"date: [^\r]*", b"date: *", c.read_all())

    def test_the_answers_are_the_expected_ones(self, served):
        found = self.answers(served, self.CONVERSATION)
        assert statuses(found) == [200] * 6
        bodies = re.findall(rb"(?:GET|POST) /\d \[.*?\](?=HTTP|$)", found, re.DOTALL)
        wanted = [b"GET /1 []", b"POST /2 [\r\n\r\nGET /\r\r\n]"]
        wanted += [b"POST /3 [\r\n0\r\n0123456\r\n]", b"POST /5 []", b"GET /6 []"]
        assert bodies == wanted

    def test_byte_by_byte_gives_the_same_answers(self, served):
        data = self.CONVERSATION
        expected = self.answers(served, data)
        bytewise = (data[i : i + 1] for i in range(len(data)))
        assert self.answers(served, *bytewise) == expected

    def test_a_cut_at_every_position_gives_the_same_answers(self, served):
        data = self.CONVERSATION
        expected = self.answers(served, data)
        for cut in range(1, len(data)):
            assert self.answers(served, data[:cut], data[cut:]) == expected, cut

    @pytest.mark.parametrize(
        "message",
        [
            GET,
            head(LENGTH) + b"hello",
            head(b"Content-Length: 0"),
            chunks(HELLO),
            chunks(b"1\r\nx\r\n0\r\nX: y\r\n\r\n"),
            head(line=b"HEAD /first HTTP/1.1"),
            b"\r\n\r\n" + GET,  # as many empty lines as there may be
        ],
    )
    def test_a_message_said_again_is_answered_again(self, served, message):
        """Its head is not looked at again; its body has to be."""
        second = self.answers(served, SECOND)
        one = self.answers(served, message + SECOND).removesuffix(second)
        assert statuses(one) == [200]
        data = message * 3 + SECOND
        for cut in range(len(message), 2 * len(message) + 1):
            assert self.answers(served, data[:cut], data[cut:]) == one * 3 + second, cut

    def test_another_head_has_a_framing_of_its_own(self, served):
        """What if a GET behind a POST were repeated, and had the body of that?"""
        served.talk(chunks(HELLO) + GET * 3 + SECOND)
        assert paths(served) == ["/first", "/", "/", "/", "/second"]

    def test_a_refusal_is_of_what_came_last(self, served):
        """What if it were taken for an answer to the HEAD, which has no body?"""
        refused = served.talk(head(line=b"HEAD /first HTTP/1.1") + b"GET /\0")
        assert statuses(refused) == [200, 400]
        assert refused.endswith(b"\r\n\r\n400 Bad Request\n")

    @pytest.mark.parametrize(
        "more", [b"X: \0", b" y", b"X:\ny", b": y", LENGTH, CHUNKED, b"Host: two"]
    )
    def test_what_only_begins_like_the_last_head_is_looked_at(self, served, more):
        first = head(b"Content-Length: 6")
        after = first.removesuffix(b"\r\n") + more + b"\r\n\r\n"
        answers = served.talk(first + b"hello!" + after + b"hello!" + SMUGGLED)
        assert statuses(answers) == [200, 400]
        assert paths(served) == ["/first"]

    def test_the_gate_neither_loses_nor_adds_a_byte(self):
        data = self.CONVERSATION
        for cut in range(len(data)):
            gate, passed = server.Gate(), b""
            for part in (data[:cut], data[cut:]):
                gate.buffer += part
                while piece := gate.next_piece():
                    passed += piece
                    framing = re.findall(rb"\r\n(Transfer-Encoding|Content-Length):", piece)
                    if framing:  # as the connection does once h11 has read it
                        gate.expect_body(dict.fromkeys(name.lower() for name in framing))
            assert passed == data, cut

    def test_the_gate_keeps_the_next_request_back(self):
        """What if h11 got both? Then the app's state could be one request behind."""
        gate = server.Gate()
        gate.buffer = self.CONVERSATION
        first = gate.next_piece()
        assert first == self.CONVERSATION[: len(first)]
        assert first.count(b"HTTP/1.1") == 1 and first.endswith(b"\r\n\r\n")


class TestFuzz:
    """Whatever arrives: the server answers or closes, and serves the next client."""

    SEEDS = (
        TestCutAnywhere.CONVERSATION,
        head(b"Content-Length: 5") + b"hello" + SECOND,
        chunks(b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n") + SECOND,
        GET * 3,
    )
    SPICE = (b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b":", b"0", b";", b"\xff")

    def mutated(self, rng):
        data = bytearray(rng.choice(self.SEEDS))
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[at : at + 1] = rng.choice(self.SPICE)
                case 1:
                    del data[at : at + rng.randint(1, 8)]
                case 2:
                    data[at:at] = data[rng.randrange(len(data)) :][:40]
        return bytes(data)

    @pytest.mark.parametrize("seed", range(3))
    def test_mutations_are_answered_or_closed(self, served, log, seed):
        rng = random.Random(seed)
        for _ in range(80):
            data = self.mutated(rng)
            answers = served.talk(data)
            assert set(statuses(answers)) <= {200, 400, 414, 431, 501, 505}, data
        self.check(served, log)

    def test_random_bytes_are_answered_or_closed(self, served, log):
        rng = random.Random(42)
        for _ in range(60):
            data = rng.randbytes(rng.randint(1, 3000))
            assert statuses(served.talk(data)) in ([], [400], [414]), data
        self.check(served, log)

    def test_clients_that_break_off_anywhere_do_no_harm(self, served, log):
        rng = random.Random(7)
        for _ in range(60):
            data = self.mutated(rng)
            with served.connect() as c, contextlib.suppress(OSError):
                c.send(data[: rng.randint(0, len(data))])
                c.reset() if rng.random() < 0.5 else c.half_close()
        self.check(served, log)

    def check(self, s, log):
        assert statuses(s.talk(GET)) == [200]
        assert not [r.getMessage() for r in log.records if r.levelname == "ERROR"]
