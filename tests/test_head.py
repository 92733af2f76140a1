"""Which requests are taken, what is refused, and what does the app learn of a head?

Chapter 6. Two readers of one message that disagree about its end make request smuggling
(RFC 9112 §11.2). So a message that could be read in two ways is refused, and the request
behind it never reaches the app.
"""

import contextvars
import ipaddress
import os
import socket
import time

import pytest
from apps import CHUNKED, GET_10, Recorder, answer_with, errors, get, request, serve, statuses
from conftest import GET

import server
import sockets

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: test\r\n\r\n"
SECOND = b"GET /second HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
HELLO = b"5\r\nhello\r\n0\r\n\r\n"
LENGTH = b"Content-Length: 5"


@pytest.fixture(scope="module")
def one_server():
    with serve(Recorder()) as running:
        yield running


@pytest.fixture
def served(one_server):
    one_server.config.app.scopes.clear()
    return one_server


def deliver(running, client, data, size):
    """Send so many bytes in a packet, each of which is read before the next one leaves.
    A long message needs fewer than 1000 packets."""
    size = max(size, len(data) // 500)
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for i in range(0, len(data), size):
        client.send(data[i : i + size])
        running.call(int)


def head(*fields, line=b"POST /first HTTP/1.1"):
    return request(line, *fields, host=b"Host: test")


def chunks(data, *fields):
    return head(CHUNKED, *fields) + data


ON_1_0 = b"POST /first HTTP/1.0"
BAD_HEADS = {  # two answers to the question where the body ends
    f"fields {fields!r}": head(*fields) + HELLO
    for fields in [(LENGTH, CHUNKED), (CHUNKED, b"Content-Length: 15"), (LENGTH, LENGTH)]
    + [(LENGTH, b"X: y", CHUNKED), (b"Content-Length: 0", CHUNKED), (LENGTH, LENGTH, CHUNKED)]
    + [(LENGTH.upper(), CHUNKED.upper()), (LENGTH, b"Transfer-Encoding: gzip")]
    + [(LENGTH, b"Content-Length: 6"), (LENGTH, LENGTH.lower()), (CHUNKED, CHUNKED)]
    + [(LENGTH, b"X: y", b"Content-Length: 0"), (CHUNKED, b"Transfer-Encoding: identity")]
}
BAD_HEADS["chunked on 1.0"] = head(CHUNKED, line=ON_1_0) + HELLO
BAD_HEADS["length and chunked on 1.0"] = head(LENGTH, CHUNKED, line=ON_1_0) + HELLO
BAD_HEADS |= {
    f"length {value[:24]!r}": head(b"Content-Length:" + value) + b"hello"
    for value in [b" 5, 5", b" 5,5", b" 5,6", b" 5,", b" ,5", b" +5", b" -5", b" 0x5"]
    + [b"", b" 5 5", b" 1_0", b" \xb2", b" " + b"9" * 21, b" " + b"0" * 2000 + b"5"]
}
BAD_HEADS |= {  # RFC 9112 §6.3 wants 400 where chunked is not the last coding
    f"coding {value!r}": head(b"Transfer-Encoding:" + value) + HELLO
    for value in [b" gzip", b" identity", b"", b" gzip, chunked", b" chunked, gzip"]
    + [b" chunked, chunked", b" xchunked", b" chunkedx", b" chunked;q=1", b" ,chunked"]
    + [b" \xa0chunked", b" c\xc4\xb1hunked", b" chunked,", b" chunked\x0b"]
}
BAD_HEADS |= {  # lines
    f"line {line!r}": head(line, LENGTH) + b"hello"
    for line in [b"Content-Length : 5", b"Transfer-Encoding : chunked", b"Content-Length\t: 5"]
    + [b"Content-Length:\r\n 5", b"Transfer-Encoding:\r\n\tchunked", CHUNKED + b"\r\n , gzip"]
    + [b"X: y\r\n Content-Length: 5", b" X: y", b"\tX: y"]  # folded
    + [b"X: y\nZ: y", b"X: y\rZ: y", b"X: y\r", b"X: y\n"]
    + [b"Content-Length 5", b": 5", b"Content Length: 5", b"X(Y): 5", b"Cont\xe9nt: 5"]
}
BAD_HEADS["bare LF before the end"] = head(LENGTH)[:-2] + b"\nhello"
BAD_HEADS["bare LF everywhere"] = head(LENGTH).replace(b"\r", b"") + b"hello"
BAD_HEADS |= {
    f"request line {line!r}": head(line=line)
    for line in [b"GET  /a HTTP/1.1", b"GET /a  HTTP/1.1", b"GET /a HTTP/1.1 ", b"GET"]
    + [b" GET /a HTTP/1.1", b"GET\t/a HTTP/1.1", b"GET /a", b"/a HTTP/1.1", b"\r"]
    + [b"GET /\xc3\xa4 HTTP/1.1", b"GET /a\r HTTP/1.1", b"GET /a b HTTP/1.1", b"GET HTTP/1.1"]
    + [b"G(T /a HTTP/1.1", b"\r\n\r\n\r\nGET /a HTTP/1.1"]
    + [b"\nGET /a HTTP/1.1", b"\r\n\nGET /a HTTP/1.1", b"\r\n GET /a HTTP/1.1"]
}

BAD_BODIES = {
    f"chunk line {line[:24]!r}": chunks(line + b"hello\r\n0\r\n\r\n")
    for line in [b"5 \r\n", b"5\t\r\n", b" 5\r\n", b"+5\r\n", b"-5\r\n", b"0x5\r\n"]
    + [b"0_5\r\n", b"\r\n", b"g\r\n", b"5h\r\n", b"\xb2\r\n"]
    + [b"5\n", b"5\r", b"5\r\r\n", b"5\n\r\n", b"5\x00\r\n"]
    + [b"5;\r\n", b"5 ;a\r\n", b"5; a\r\n", b"5;a b\r\n", b"5;a =b\r\n", b"5;a= b\r\n"]
    + [b"5;a=b \r\n", b"5;=b\r\n", b"5;a=\r\n", b"5;a=\x00\r\n"]
    + [b"5;a=b\n", b"5;a\rb\r\n", b'5;a="b\rc"\r\n', b'5;a="b\nc"\r\n', b'5;a="b\r\n']
    + [b'5;a="b"c\r\n', b'5;a="\\\r\n"\r\n', b"5;\xe9\r\n", b"5" + b";a=b" * 1200 + b"\r\n"]
    + [b"0" * 16 + b"5\r\n", b"f" * 17 + b"\r\n", b"0" * 5000 + b"5\r\n"]
}
BAD_BODIES |= {
    f"data {data[:24]!r}": chunks(data)
    for data in [b"5\r\nhello!\r\n0\r\n\r\n", b"5\r\nhell\r\n0\r\n\r\n", b"5\r\nhello0\r\n\r\n"]
    + [b"5\r\nhello" + end + b"0\r\n\r\n" for end in (b"\n", b"\r", b"XX")]
    + [b"5\r\nhello\r\n0\n\r\n", b"5\r\nhello\r\n0 \r\n\r\n"]
    + [b"1\r\nx\r\n" * 50 + b"1 \r\nx\r\n0\r\n\r\n"]
}
BAD_BODIES |= {
    f"trailer {lines!r}": chunks(b"5\r\nhello\r\n0\r\n" + lines + b"\r\n")
    for lines in [b"no colon\r\n", b" X: y\r\n", b"X : y\r\n", b"X: y\n", b"X: y\r"]
    + [b"X: y\r\n folded\r\n", b"X: \x00\r\n", b"X: a\rb\r\n", b"\n", b": y\r\n"]
    + [b"X: \x0b\r\n", b"X: y\r\n\tfolded\r\n"]
}
BAD_BODIES["long trailers"] = chunks(b"0\r\n" + (b"X: " + b"y" * 1000 + b"\r\n") * 5 + b"\r\n")
END_OF_CHUNK = b"\r\n0\r\n\r\n"
GOOD = {  # (bytes, the body that the app reads)
    "no body": (head(), b""),
    "length": (head(LENGTH) + b"hello", b"hello"),
    "length 005": (head(b"Content-Length: 005") + b"hello", b"hello"),
    "length without a space": (head(b"Content-Length:5") + b"hello", b"hello"),
    "length between spaces": (head(b"Content-Length: \t 5 \t") + b"hello", b"hello"),
    "request in a body": (head(b"Content-Length: 38") + SMUGGLED, SMUGGLED),
    "control characters in a body": (head(LENGTH) + b"\0\n\r\n ", b"\0\n\r\n "),
    "chunked": (chunks(HELLO), b"hello"),
    "chunked, nothing in it": (chunks(b"0\r\n\r\n"), b""),
    "Chunked": (head(b"transfer-encoding:\tChunked") + HELLO, b"hello"),
    "hexadecimal sizes": (chunks(b"a\r\n0123456789\r\nB\r\nabcdefghijk" + END_OF_CHUNK),)
    + (b"0123456789abcdefghijk",),
    "sixteen digits": (chunks(b"0" * 15 + b"5\r\nhello" + END_OF_CHUNK), b"hello"),
    "end in a chunk": (chunks(b"7" + b"\r\n" + END_OF_CHUNK + END_OF_CHUNK), END_OF_CHUNK),
    "extensions": (chunks(b'5;a=b;c;d="e"\r\nhello\r\n0;b=c\r\n\r\n'), b"hello"),
    "quoted": (chunks(b'5;a="; \\"\\\\ \xe9\t"\r\nhello' + END_OF_CHUNK), b"hello"),
    "long extension": (chunks(b"5;" + b"x" * 998 + b"\r\nhello" + END_OF_CHUNK), b"hello"),
    "trailers": (chunks(b"5\r\nhello\r\n0\r\nX: y\r\nZ:\r\n\r\n"), b"hello"),
    "length in a trailer": (chunks(b"0\r\nContent-Length: 99\r\n\r\n"), b""),
    "two empty lines first": (b"\r\n\r\n" + head(), b""),
    "two empty lines behind": (head(LENGTH) + b"hello\r\n\r\n", b"hello"),
    "tab and Latin-1 in a value": (head(b"X: a\tb\xe9"), b""),
}


class TestFraming:
    """RFC 9112 §6.3, message body length; §7.1, chunked; §2.2, message parsing."""

    @pytest.mark.parametrize("size", [10_000, 1], ids=["whole", "byte by byte"])
    @pytest.mark.parametrize("name", BAD_HEADS | BAD_BODIES)
    def test_a_bad_message_is_refused_and_nothing_behind_it_is_served(self, served, name, size):
        """The app sees no more of it than the good head of a bad body."""
        with served.connect() as client:
            deliver(served, client, (BAD_HEADS | BAD_BODIES)[name] + SMUGGLED, size)
            answers = client.read_all()
        assert statuses(answers) == [400] and b"\r\nconnection: close\r\n" in answers.lower()
        paths = served.call(served.config.app.paths)
        assert paths == [] or (name in BAD_BODIES and paths == ["/first"])

    @pytest.mark.parametrize("size", [10_000, 1], ids=["whole", "byte by byte"])
    @pytest.mark.parametrize("name", GOOD)
    def test_a_good_message_ends_where_it_says_and_the_next_is_served(self, served, name, size):
        message, content = GOOD[name]
        with served.connect() as client:
            deliver(served, client, message + SECOND, size)
            assert client.response()[::2] == (200, b"POST /first [%s]" % content)
            assert client.response()[::2] == (200, b"GET /second []")
            assert client.read_all() == b""
        assert served.config.app.paths() == ["/first", "/second"]


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
            answers = served.talk(self.PLACES[place] % character + SMUGGLED)
            assert statuses(answers) == [400], character
        assert served.config.app.paths() == []


class TestRepeatedHead:
    """A client repeats its head, and the server need not check an equal one again."""

    @pytest.mark.parametrize("more", [b"X: \0", b" y", b"X:\ny", b"Expect:", LENGTH, CHUNKED])
    def test_a_head_that_only_begins_like_the_last_one_is_checked(self, served, more):
        first = head(b"Content-Length: 6")
        after = first.removesuffix(b"\r\n") + more + b"\r\n\r\n"
        answers = served.talk(first + b"hello!" + after + b"hello!" + SMUGGLED)
        assert statuses(answers) == [200, 417 if more == b"Expect:" else 400]
        assert served.config.app.paths() == ["/first"]


def scope_of(running, data):
    """What the app is told of this request, which must be answered with 200."""
    assert statuses(running.talk(data)) == [200]
    return running.config.app.scopes[-1]


def status_of(running, data):
    """The one status that these bytes get."""
    (status,) = statuses(running.talk(data))
    return status


class TestTarget:
    """RFC 9112 §3.2, request target; ASGI www, "HTTP Connection Scope"."""

    @pytest.mark.parametrize(
        "target, path, query",
        [
            (b"/?", "/", b""), (b"/a%20b/c?x=%20y&%FF", "/a b/c", b"x=%20y&%FF"),
            (b"/caf%C3%A9/%FF", "/café/\ufffd", b""),
            (b"/%2520", "/%20", b""),  # decoded once, not twice
            (b"//a%2Fb//c/../d?e?f", "//a/b//c/../d", b"e?f"),
            (b"/%41%2f%zz?%41=%zz?&", "/A/%zz", b"%41=%zz?&"),
            (b"/http://x/", "/http://x/", b""), (b"/:@!$&'()*+,;=", "/:@!$&'()*+,;=", b""),
        ],
    )  # fmt: skip
    def test_path_is_decoded_and_the_bytes_are_not(self, served, target, path, query):
        scope = scope_of(served, get(target))
        assert (scope["path"], scope["query_string"]) == (path, query)
        assert scope["raw_path"] == target.partition(b"?")[0]
        assert type(scope["raw_path"]) is type(scope["query_string"]) is bytes

    @pytest.mark.parametrize(
        "target, host, raw_path, query",
        [(b"http://other/a?b", b"other", b"/a", b"b"), (b"http://other?b", b"other", b"/", b"b")]
        + [(b"HTTPS://Other:81", b"Other:81", b"/", b"")]
        + [(b"http://[::1]:8/a", b"[::1]:8", b"/a", b"")],
    )
    def test_the_host_of_an_absolute_target_wins(self, served, target, host, raw_path, query):
        """What if Host and target name different hosts (RFC 9112 §3.2.2)?"""
        scope = scope_of(served, get(target, b"X: y"))
        assert (scope["raw_path"], scope["query_string"]) == (raw_path, query)
        assert scope["headers"] == [(b"host", host), (b"x", b"y")]

    @pytest.mark.parametrize(
        "target",
        [b"path", b"?a=b", b"http:/x", b"http://", b"http:///x", b"http://u@h/"]
        + [b"ftp://h/", b"http://a,b/", b"http://h:x/", b"/a#b", b"/#", b"http://h/#"]
        + [b"http://h#", b"test:80"],
    )
    def test_a_target_of_no_known_form_is_400(self, served, target):
        assert status_of(served, get(target)) == 400

    def test_an_asterisk_is_taken_for_options(self, served):
        assert scope_of(served, request(b"OPTIONS * HTTP/1.1"))["raw_path"] == b"*"


class TestRequestLine:
    """RFC 9112 §2.3, HTTP version; §3.1, method; RFC 9110 §15.6.6."""

    @pytest.mark.parametrize(
        "line, status",
        [(method + b" / HTTP/1.1", 400) for method in (b"get", b"GEt", b"X" * 33)]
        + [(method + b" * HTTP/1.1", 400) for method in (b"GET", b"POST", b"HEAD")]
        + [(b"CONNECT test:443 HTTP/1.1", 501), (b"PRI * HTTP/2.0", 505)]
        + [(b"GET / HTTP/" + version, 505) for version in (b"0.9", b"1.2", b"2.0", b"3.0")]
        + [(b"GET / HTTP/" + version, 400) for version in (b"1", b"1.10", b"x.y")]
        + [(b"GET / " + version, 400) for version in (b"http/1.1", b"H")],
    )
    def test_a_line_that_is_not_for_us_is_refused(self, served, line, status):
        assert status_of(served, request(line)) == status

    @pytest.mark.parametrize("method", [b"M-SEARCH", b"X!#$%&'*+.^_`|~9", b"X" * 32])
    def test_any_other_method_is_the_apps_business(self, served, method):
        scope = scope_of(served, request(method + b" / HTTP/1.1"))
        assert scope["method"] == method.decode()

    @pytest.mark.parametrize("version", ["1.0", "1.1"])
    def test_the_scope_says_which_and_the_answer_is_always_1_1(self, served, version):
        """RFC 9110 §6.2: a server sends its own version, the highest that it knows."""
        scope = scope_of(served, request(b"GET / HTTP/" + version.encode()))
        assert scope["http_version"] == version


class TestHost:
    """RFC 9112 §3.2, Host; RFC 9110 §7.2."""

    @pytest.mark.parametrize(
        "value",
        [b"", b" ", b"a, b", b"a,b", b"a b", b"u@h", b"u:p@h", b"h/path", b"h?q", b"/"]
        + [b"h#f", b"h:port", b"h:80:80", b":80", b"[::1", b"::1", b"[::1]x", b"[g]"]
        + [b"h\\", b"http://h", b"h\xe9", b'"h"', b"<h>", b"h:123456"],
    )
    def test_a_host_that_is_not_one_host_is_400(self, served, value):
        assert status_of(served, request(host=b"Host:" + value)) == 400

    @pytest.mark.parametrize(
        "value",
        [b"test:80", b"test:", b"127.0.0.1", b"[::1]", b"[2001:db8::1]:4", b"a.b-c_d~e", b"%41"],
    )
    def test_a_name_or_address_with_or_without_a_port_is_taken(self, served, value):
        scope = scope_of(served, request(host=b"Host: " + value))
        assert scope["headers"] == [(b"host", value)]

    @pytest.mark.parametrize("second", [b"Host: test", b"host: other", b"HOST:"])
    def test_two_hosts_are_400(self, served, second):
        assert status_of(served, request(b"GET / HTTP/1.1", second)) == 400

    def test_no_host_is_400_on_1_1_and_fine_on_1_0(self, served):
        assert status_of(served, b"GET / HTTP/1.1\r\n\r\n") == 400
        assert status_of(served, b"GET http://test/ HTTP/1.1\r\n\r\n") == 400
        assert scope_of(served, GET_10)["headers"] == []


@pytest.mark.parametrize(
    "fields",
    [(b"Expect: tea",), (b"Expect: 100-continue, tea",), (b"Expect:",)]
    + [(b"Expect: 100-continue", b"Expect: tea"), (b"Expect: tea", b"Expect: 100-continue")],
)
def test_an_unknown_expectation_is_417(served, fields):
    """RFC 9110 §10.1.1."""
    assert status_of(served, request(b"GET / HTTP/1.1", *fields)) == 417


LIMITS = [  # (bytes, status); a head without an end is refused by the limit alone
    (get(b"/".ljust(8192, b"a")), 200), (get(b"/".ljust(8193, b"a")), 414),
    (request(b"GET / HTTP/1.1", *[b"X: y"] * 99), 200),  # with Host 100 fields
    (request(b"GET / HTTP/1.1", *[b"X: y"] * 100), 431),
    (get(b"/", b"X: ".ljust(65536 - len(get(b"/", b"")), b"y")), 200),
    (get(b"/", b"X: ".ljust(65537 - len(get(b"/", b"")), b"y")), 431),
    (request()[:-2] + b"X: y\r\n" * 120, 431),
    (request()[:-2] + b"X: " + b"y" * 66000, 431), (b"GET /" + b"a" * 66000, 414),
    (request(b"X" * 9000 + b" / HTTP/1.1"), 400),  # a malformed line, and no long target
]  # fmt: skip


@pytest.mark.parametrize("size", [100_000, 1000], ids=["whole", "in parts"])
@pytest.mark.parametrize("data, status", LIMITS, ids=range(len(LIMITS)))
def test_what_passes_a_limit_is_refused_as_soon_as_it_does(served, data, status, size):
    """RFC 9112 §3, RFC 6585 §5: a server may limit what it reads, and says so."""
    with served.connect() as client:
        deliver(served, client, data, size)
        found, fields, _ = client.response()
        assert found == status
        if status != 200:
            assert client.read_all() == b"" and fields["connection"] == "close"


class TestCost:
    """What if a head is made so that it takes long to look at? Nobody else is served
    meanwhile: so the loop's CPU time counts."""

    SPACES = b" " * 60_000
    COSTLY = {
        "spaces before a letter": get(b"/", b"Content-Length: 5" + SPACES + b"x"),
        "spaces before a coding": get(b"/", b"Transfer-Encoding:" + SPACES + b"x" + b" " * 9),
        "empty fields": get(b"/", *[b"X:" + SPACES[:600]] * 99),
        "extensions": chunks(b"5" + b';a="\\"' * 600 + b"\0"),
        "trailers": chunks(b"0\r\n" + b"X: y\r\n" * 600 + b"\0"),
    }

    def seconds(self, running, *pieces):
        """The CPU time of the loop for a client that sends these, each read alone."""
        before = running.call(time.thread_time)
        with running.connect() as client:
            for piece in pieces:
                client.send(piece)
                running.call(int)
            client.half_close()
            client.read_all()
        return running.call(time.thread_time) - before

    @pytest.mark.parametrize("name", COSTLY)
    def test_no_head_takes_long_to_look_at(self, served, name):
        assert self.seconds(served, self.COSTLY[name]) < 0.2

    @pytest.mark.skipif(os.name == "nt", reason="CPU time is counted in 16 ms there")
    def test_a_head_that_drips_is_not_looked_at_from_its_start_each_time(self, served):
        start, drops = GET[:-2] + b"X: ", [b"y"] * 120
        short = min(self.seconds(served, start, *drops) for _ in range(3))
        long = min(self.seconds(served, start + b"y" * 60_000, *drops) for _ in range(3))
        assert long < 2 * short + 0.008  # seconds: the noise


class TestScope:
    """ASGI www, "HTTP Connection Scope"."""

    def test_it_names_type_versions_method_scheme_and_addresses(self, served):
        with served.connect() as client:
            client.send(GET)
            assert client.response()[0] == 200
            (scope,) = served.config.app.scopes
            assert scope["client"] == client.sock.getsockname()
        assert scope["server"] == served.address
        assert scope["type"] == "http"
        assert scope["asgi"] == {"version": "3.0", "spec_version": "2.3"}
        assert (scope["method"], scope["scheme"]) == ("GET", "http")
        assert scope["state"] == scope["extensions"] == {} and scope["root_path"] == ""

    def test_path_includes_root_path_and_raw_path_does_not(self):
        with serve(Recorder(), root_path="/api") as running:
            scope = scope_of(running, get(b"/a%20b"))
        assert scope["root_path"] == "/api"
        assert (scope["path"], scope["raw_path"]) == ("/api/a b", b"/a%20b")

    def test_headers_are_lower_case_with_order_and_duplicates_kept(self, served):
        fields = (b"X-B: 1", b"X-a:  Two ", b"x-B: 3", b"Cookie:\xe9")
        headers = list(scope_of(served, get(b"/", *fields))["headers"])
        expected = [(b"host", b"x"), (b"x-b", b"1"), (b"x-a", b"Two"), (b"x-b", b"3")]
        assert headers == [*expected, (b"cookie", b"\xe9")]
        assert all(type(item) is bytes for pair in headers for item in pair)

    @pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
    def test_a_unix_socket_has_a_path_and_no_client(self, path):
        listener, remove_file = sockets.bind_unix(path, 16)
        with serve(Recorder(), listener=listener) as running:
            scope = scope_of(running, GET)
        remove_file()
        assert scope["server"] == (path, None)
        assert scope["client"] is None

    def test_each_request_gets_a_scope_of_its_own_with_a_shallow_copy_of_the_state(self, log):
        """What if the app changes all that it was given? The server uses none of it."""
        shown, shared = [], []

        async def app(scope, receive, send):
            shared, count = scope["state"].pop("list"), len(shown)
            assert len(shared) == count
            shared.append(count)
            shown.append(repr(scope))
            scope["headers"].clear(), scope["extensions"].update(mine={})
            scope["path"], scope["client"], scope["state"]["mine"] = "mine", ["9.9.9.9", 0], True
            await answer_with(send)
            scope.clear()

        with serve(app) as running:
            running.server.state["list"] = shared
            assert statuses(running.talk(get(b"/a%20b") * 3)) == [200] * 3
        assert len(shown) == len(shared) == 3 and len({*shown}) == 1, shown
        assert not errors(log)

    def test_a_request_does_not_see_the_context_variables_of_another(self):
        """What if it starts inside the `send` of the one before, and inherits its context?"""
        variable = contextvars.ContextVar("variable", default="unset")

        async def app(scope, receive, send):
            found = variable.get()
            variable.set(scope["path"])
            await answer_with(send, found.encode())

        with serve(app) as running, running.connect() as client:
            client.send(GET * 3)
            for _ in range(3):
                assert client.response()[2] == b"unset"


FOR, PROTO = b"X-Forwarded-For: ", b"X-Forwarded-Proto: "


class TestProxyFields:
    """--proxy-headers; uvicorn's ProxyHeadersMiddleware."""

    def scope(self, *fields, **options):
        with serve(Recorder(), **options) as running:
            return scope_of(running, get(b"/", *fields))

    @pytest.mark.parametrize(
        "options",
        [{}, {"proxy_headers": True, "forwarded_allow_ips": "10.0.0.0/8"}],
        ids=["not asked for", "not trusted"],
    )
    def test_they_are_ignored_unless_asked_for_and_trusted(self, options):
        scope = self.scope(FOR + b"9.9.9.9", PROTO + b"https", **options)
        assert (scope["client"][0], scope["scheme"]) == ("127.0.0.1", "http")

    @pytest.mark.parametrize(
        "trusted, fields, client",
        [
            ("127.0.0.1", [b"9.9.9.9"], "9.9.9.9"),
            ("127.0.0.1, 10.0.0.0/8", [b"6.6.6.6", b"9.9.9.9,10.1.2.3:5555"], "9.9.9.9"),
            ("*", [b"6.6.6.6, 9.9.9.9"], "6.6.6.6"),
            ("127.0.0.1", [b"2001:db8::7"], "2001:db8::7"),
            ("127.0.0.1", [b"[2001:db8::7]:5555"], "2001:db8::7"),
            ("127.0.0.1", [b""], "127.0.0.1"),
            ("*", [b"6.6.6.6," + 50 * b"::,"], "::"),  # too many to look at them all
        ],
    )
    def test_the_client_is_the_rightmost_untrusted(self, trusted, fields, client):
        fields = [FOR + field for field in fields]
        scope = self.scope(*fields, proxy_headers=True, forwarded_allow_ips=trusted)
        assert scope["client"][0] == client
        assert type(scope["client"]) is tuple and type(scope["client"][1]) is int

    @pytest.mark.parametrize(
        "proto, scheme",
        [(b"HTTPS", "https"), (b"wss", "https"), (b"Http", "http"), (b"", "http")],
    )
    def test_a_trusted_peer_names_the_scheme(self, proto, scheme):
        """Schemes are case-insensitive (RFC 9110 §4.2.3)."""
        assert self.scope(PROTO + proto, proxy_headers=True)["scheme"] == scheme

    def test_a_peer_that_has_left_is_not_taken_for_a_proxy(self):
        """Once a connection is reset, the kernel no longer tells whose it was. (No test can
        reset it at that moment.)"""
        fields = [(b"x-forwarded-for", b"9.9.9.9")]
        scope = {"client": None, "server": ("127.0.0.1", 80), "headers": fields}
        server.believe_proxy(scope, [ipaddress.ip_network("10.0.0.0/8")])
        assert scope["client"] is None
