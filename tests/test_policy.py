"""Which requests are taken, and which are refused with what? Chapter 5: check_request
and the limits of Gate. Whatever could be read in two ways is in test_framing.py.
"""

import json
import re
import socket
import ssl

import pytest
from conftest import serving


async def answer(send, body=b"", status=200):
    fields = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})


async def echo(scope, receive, send):
    """What the scope says, as JSON. Reads no body."""
    assert scope["type"] == "http"
    seen = {key: scope[key] for key in ("method", "path", "http_version")}
    seen["raw_path"] = scope["raw_path"].decode("latin-1")
    seen["query_string"] = scope["query_string"].decode("latin-1")
    seen["hosts"] = [v.decode("latin-1") for n, v in scope["headers"] if n == b"host"]
    await answer(send, json.dumps(seen).encode())


async def drain(scope, receive, send):
    """Reads the body, and answers with its size."""
    assert scope["type"] == "http"
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await answer(send, b"%d" % size)


@pytest.fixture(scope="module")
def echoing():
    with serving(echo) as s:
        yield s


def request(line=b"GET / HTTP/1.1", *fields, host=b"Host: test"):
    return b"\r\n".join([line, host, *fields, b"", b""])


def statuses(answers):
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def status_of(s, data):
    """The one status that these bytes get; more than one answer is an error."""
    (status,) = statuses(s.talk(data))
    return status


def scope_of(s, data):
    with s.connect() as c:
        c.send(data)
        status, _, body = c.response()
    assert status == 200, body
    return json.loads(body)


class TestTarget:
    """RFC 9112 §3.2, request target."""

    @pytest.mark.parametrize(
        "target, raw_path, query",
        [
            (b"/", "/", ""),
            (b"//a//b/../c", "//a//b/../c", ""),
            (b"/%41%2f%zz?%41=%zz?&", "/%41%2f%zz", "%41=%zz?&"),
            (b"/?", "/", ""),
            (b"/http://x/", "/http://x/", ""),
            (b"/:@!$&'()*+,;=", "/:@!$&'()*+,;=", ""),
        ],
    )
    def test_origin_form_is_passed_on_untouched(self, echoing, target, raw_path, query):
        seen = scope_of(echoing, request(b"GET %s HTTP/1.1" % target))
        assert (seen["raw_path"], seen["query_string"]) == (raw_path, query)
        assert seen["hosts"] == ["test"]

    @pytest.mark.parametrize(
        "target, host, raw_path, query",
        [
            (b"http://other/a?b", "other", "/a", "b"),
            (b"HTTPS://Other:81", "Other:81", "/", ""),
            (b"http://other?b", "other", "/", "b"),
            (b"http://[::1]:8/a", "[::1]:8", "/a", ""),
        ],
    )
    def test_absolute_form_replaces_host(self, echoing, target, host, raw_path, query):
        """What if Host and target name different hosts? The target wins (§3.2.2)."""
        seen = scope_of(echoing, request(b"GET %s HTTP/1.1" % target))
        assert (seen["raw_path"], seen["query_string"]) == (raw_path, query)
        assert seen["hosts"] == [host]

    @pytest.mark.parametrize(
        "target",
        [b"path", b"?a=b", b"http:/x", b"http://", b"http:///x", b"http://u@h/"]
        + [b"ftp://h/", b"http://a,b/", b"http://h:x/", b"/a#b", b"/#", b"http://h/#"]
        + [b"http://h#", b"test:80"],
    )
    def test_a_target_of_no_known_form_is_400(self, echoing, target):
        assert status_of(echoing, request(b"GET %s HTTP/1.1" % target)) == 400

    def test_an_asterisk_is_for_options_only(self, echoing):
        seen = scope_of(echoing, request(b"OPTIONS * HTTP/1.1"))
        assert seen["raw_path"] == "*"
        for method in (b"GET", b"POST", b"HEAD"):
            assert status_of(echoing, request(method + b" * HTTP/1.1")) == 400

    def test_connect_is_501(self, echoing):
        assert status_of(echoing, request(b"CONNECT test:443 HTTP/1.1")) == 501

    @pytest.mark.parametrize("method", [b"get", b"Get", b"GEt", b"options"])
    def test_a_lower_case_method_is_400(self, echoing, method):
        assert status_of(echoing, request(method + b" / HTTP/1.1")) == 400

    @pytest.mark.parametrize("method", [b"DELETE", b"M-SEARCH", b"X!#$%&'*+.^_`|~9"])
    def test_any_upper_case_method_is_the_apps_business(self, echoing, method):
        seen = scope_of(echoing, request(method + b" / HTTP/1.1"))
        assert seen["method"] == method.decode()


class TestHost:
    """RFC 9112 §3.2, Host; RFC 9110 §7.2."""

    @pytest.mark.parametrize(
        "value",
        [b"", b" ", b"a, b", b"a,b", b"a b", b"u@h", b"u:p@h", b"h/path", b"h?q", b"/"]
        + [b"h#f", b"h:port", b"h:80:80", b":80", b"[::1", b"::1", b"[::1]x", b"[g]"]
        + [b"h\\", b"http://h", b"h\xe9", b'"h"', b"<h>", b"h:123456"],
    )
    def test_a_host_that_is_not_one_host_is_400(self, echoing, value):
        assert status_of(echoing, request(host=b"Host:" + value)) == 400

    @pytest.mark.parametrize(
        "value",
        [b"test", b"test:80", b"test:", b"127.0.0.1:8000", b"[::1]", b"[2001:db8::1]:4"]
        + [b"a.b-c_d~e", b"xn--bcher-kva.example.", b"%41", b"my_service:1"],
    )
    def test_a_name_or_address_with_or_without_a_port_is_taken(self, echoing, value):
        seen = scope_of(echoing, request(host=b"Host: " + value))
        assert seen["hosts"] == [value.decode()]

    @pytest.mark.parametrize("second", [b"Host: test", b"host: other", b"HOST:"])
    def test_two_hosts_are_400(self, echoing, second):
        assert status_of(echoing, request(b"GET / HTTP/1.1", second)) == 400

    def test_no_host_is_400_on_1_1_and_fine_on_1_0(self, echoing):
        assert status_of(echoing, b"GET / HTTP/1.1\r\n\r\n") == 400
        assert status_of(echoing, b"GET http://test/ HTTP/1.1\r\n\r\n") == 400
        assert scope_of(echoing, b"GET / HTTP/1.0\r\n\r\n")["hosts"] == []


class TestExpectation:
    """RFC 9110 §10.1.1, Expect."""

    @pytest.mark.parametrize(
        "fields",
        [
            (b"Expect: tea",),
            (b"Expect: 100-continue, tea",),
            (b"Expect:",),
            (b"Expect: 100-continue", b"Expect: tea"),
            (b"Expect: tea", b"Expect: 100-continue"),
        ],
    )
    def test_an_unknown_expectation_is_417(self, echoing, fields):
        assert status_of(echoing, request(b"GET / HTTP/1.1", *fields)) == 417

    def test_100_is_said_once_when_the_app_first_reads(self):
        fields = (b"Expect: 100-Continue", b"Content-Length: 2")
        with serving(drain) as s, s.connect() as c:
            c.send(request(b"POST / HTTP/1.1", *fields))
            assert c.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            c.send(b"a")
            c.send(b"b")
            assert c.response()[::2] == (200, b"2")

    def test_100_is_never_said_if_the_app_does_not_read(self, echoing):
        """The client may then send the body or not: the connection has to end."""
        fields = (b"Expect: 100-continue", b"Content-Length: 2")
        with echoing.connect() as c:
            c.send(request(b"POST / HTTP/1.1", *fields))
            assert statuses(answers := c.read_all()) == [200]
            assert b"\r\nconnection: close\r\n" in answers.lower()

    def test_100_is_never_said_to_1_0(self):
        fields = (b"Expect: 100-continue", b"Content-Length: 2")
        with serving(drain) as s, s.connect() as c:
            c.send(request(b"POST / HTTP/1.0", *fields))
            c.send(b"ab")
            assert statuses(c.read_all()) == [200]

    def test_100_is_not_said_if_the_body_is_already_there(self):
        """RFC 9110: optional if "some or all of the content" has been received."""
        fields = (b"Expect: 100-continue", b"Content-Length: 2", b"Connection: close")
        with serving(drain) as s:
            answers = s.talk(request(b"POST / HTTP/1.1", *fields) + b"ab")
        assert statuses(answers) == [200]


class TestVersion:
    """RFC 9112 §2.3, HTTP version; RFC 9110 §15.6.6."""

    @pytest.mark.parametrize("version", [b"0.9", b"1.2", b"1.9", b"2.0", b"3.0"])
    def test_any_version_but_1_0_and_1_1_is_505(self, echoing, version):
        assert status_of(echoing, request(b"GET / HTTP/" + version)) == 505

    @pytest.mark.parametrize(
        "version", [b"HTTP/1", b"HTTP/1.10", b"http/1.1", b"HTTP/x.y", b"H"]
    )
    def test_what_is_no_version_is_400(self, echoing, version):
        assert status_of(echoing, request(b"GET / " + version)) == 400

    def test_the_preface_of_http_2_is_505(self, echoing):
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        assert status_of(echoing, preface) == 505

    @pytest.mark.parametrize("version", ["1.0", "1.1"])
    def test_the_scope_says_which_and_the_answer_is_always_1_1(self, echoing, version):
        """RFC 9110 §6.2: a server sends its own version, the highest that it knows."""
        seen = scope_of(echoing, request(b"GET / HTTP/" + version.encode()))
        assert seen["http_version"] == version


def send_in_parts(s, client, data):
    """A thousand bytes a packet, each read before the next one leaves."""
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for start in range(0, len(data), 1000):
        client.send(data[start : start + 1000])
        s.call(int)


@pytest.mark.parametrize("deliver", [lambda s, c, data: c.send(data), send_in_parts])
class TestLimits:
    """RFC 9112 §3, RFC 6585 §5: a server may limit what it reads, and says so."""

    def status(self, s, data, deliver):
        """Without half-closing: the limit alone has to end it."""
        with s.connect() as c:
            deliver(s, c, data)
            status, fields, _ = c.response()
            if status != 200:
                assert c.read_all() == b"" and fields["connection"] == "close"
            return status

    @pytest.mark.parametrize("size, status", [(8192, 200), (8193, 414)])
    def test_a_target_may_have_8_kib(self, echoing, deliver, size, status):
        target = b"/" + b"a" * (size - 1)
        line = b"GET %s HTTP/1.1" % target
        assert self.status(echoing, request(line), deliver) == status

    @pytest.mark.parametrize("size, status", [(8192, 200), (8193, 414)])
    def test_an_absolute_target_counts_in_full(self, echoing, deliver, size, status):
        target = b"http://test/" + b"a" * (size - 12)
        line = b"GET %s HTTP/1.1" % target
        assert self.status(echoing, request(line), deliver) == status

    @pytest.mark.parametrize("count, status", [(100, 200), (101, 431)])
    def test_a_head_may_have_100_fields(self, echoing, deliver, count, status):
        head = request(b"GET / HTTP/1.1", *[b"X: y"] * (count - 1))  # Host is one
        assert self.status(echoing, head, deliver) == status

    @pytest.mark.parametrize("size, status", [(65536, 200), (65537, 431)])
    def test_a_head_may_have_64_kib(self, echoing, deliver, size, status):
        rest = size - len(request(b"GET / HTTP/1.1", b"X: "))
        head = request(b"GET / HTTP/1.1", b"X: " + b"y" * rest)
        assert len(head) == size
        assert self.status(echoing, head, deliver) == status

    @pytest.mark.parametrize(
        "start, status",
        [
            (b"GET /" + b"a" * 9000, 414),
            (b"GET" * 3000, 414),
            (request()[:-2] + b"X: y\r\n" * 120, 431),
            (request()[:-2] + b"X: " + b"y" * 66000, 431),
            (request()[:-2] + b"x" * 66000, 431),
            (request()[:-2] + (b"X: " + b"y" * 2000 + b"\r\n") * 40, 431),
        ],
    )
    def test_a_limit_is_noticed_before_the_end(self, echoing, deliver, start, status):
        assert self.status(echoing, start, deliver) == status

    def test_a_long_method_is_refused(self, echoing, deliver):
        line = b"X" * 9000 + b" / HTTP/1.1"
        assert self.status(echoing, request(line), deliver) == 414


class TestWrongProtocol:
    """What if a browser speaks TLS to the plain port?"""

    @pytest.fixture
    def client_hello(self):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = ssl.create_default_context().wrap_bio(
            incoming, outgoing, server_hostname="localhost"
        )
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        return outgoing.read()

    def test_tls_is_refused_at_once_and_the_log_says_what_it_was(
        self, echoing, log, client_hello
    ):
        with echoing.connect() as c:
            c.send(client_hello)
            assert statuses(c.read_all()) == [400]
        (line,) = [r.getMessage() for r in log.records if "TLS" in r.getMessage()]
        assert "this looks like TLS" in line and "\\x16\\x03" in line

    def test_the_log_names_the_peer_and_the_reason(self, echoing, log):
        with echoing.connect() as c:
            peer = "%s:%d" % c.sock.getsockname()[:2]
            c.send(request(b"GET / HTTP/1.1", b"no colon"))
            c.read_all()
        (line,) = [r.getMessage() for r in log.records if peer in r.getMessage()]
        assert line.startswith(f"{peer}: 400, illegal header line")
        assert "'GET / HTTP" in line

    @pytest.mark.parametrize("character", [b"\x1b[m", b"\a", b"\0", b"\x7f", b"\x9b"])
    @pytest.mark.parametrize(
        "place",
        [b"%s\r\n\r\n", b"GET /%s HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nX%s\r\n\r\n"]
        + [b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5%s\r\n"],
    )
    def test_control_characters_are_escaped_in_the_log(self, log, character, place):
        with serving(drain) as s:
            s.talk(place % character)
        lines = [r.getMessage() for r in log.records if r.levelname == "WARNING"]
        assert lines and not re.search(r"[\x00-\x1f\x7f-\x9f]", "".join(lines)), lines

    def test_a_quote_in_the_target_cannot_forge_an_access_line(self, log):
        with serving(echo) as s:
            s.talk(request(b'GET /"_200_-" HTTP/1.1'))
        (line,) = [r.getMessage() for r in log.records if "/%22" in r.getMessage()]
        assert line.count('"') == 2
