"""Chapter 6, the scope of a request: what an app is told before anything happens."""

from __future__ import annotations

import contextvars
import queue
import socket
import tempfile
import threading

import pytest
from conftest import GET, PATIENCE
from test_cycle import END, GET_10, START, body, get, saying, serve, until
from test_websocket import handshake

import sockets


def scope_of(request: bytes, **options) -> dict:
    """The scope that a request makes."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(scope)
        await send(START)
        await send(END)

    with serve(app, **options) as running:
        running.talk(request)
    return scopes[0]


class TestScope:
    """ASGI www, "HTTP Connection Scope"."""

    def test_the_scope_names_type_versions_method_and_scheme(self):
        scope = scope_of(GET)
        assert scope["type"] == "http"
        assert scope["asgi"] == {"version": "3.0", "spec_version": "2.5"}
        assert scope["http_version"] == "1.1"
        assert scope["method"] == "GET"
        assert scope["scheme"] == "http"
        assert scope["state"] == {}

    def test_http_1_0_is_named_in_the_scope(self):
        assert scope_of(GET_10)["http_version"] == "1.0"

    @pytest.mark.parametrize(
        "target, path, query_string",
        [
            (b"/", "/", b""),
            (b"/a%20b/c?x=%20y&%FF", "/a b/c", b"x=%20y&%FF"),
            (b"/caf%C3%A9", "/café", b""),
            (b"/%FF", "/\ufffd", b""),
            (b"/%2520?", "/%20", b""),  # decoded once, not twice
            (b"/a%2Fb//c/../d?e?f", "/a/b//c/../d", b"e?f"),
            (b"/%zz", "/%zz", b""),
        ],
    )
    def test_path_is_decoded_and_the_bytes_are_not(self, target, path, query_string):
        scope = scope_of(get(target))
        assert scope["path"] == path
        assert scope["raw_path"] == target.partition(b"?")[0]
        assert scope["query_string"] == query_string
        assert type(scope["raw_path"]) is type(scope["query_string"]) is bytes

    def test_path_includes_root_path_and_raw_path_does_not(self):
        scope = scope_of(get(b"/a%20b"), root_path="/api")
        assert scope["root_path"] == "/api"
        assert scope["path"] == "/api/a b"
        assert scope["raw_path"] == b"/a%20b"

    def test_headers_are_lower_case_with_order_and_duplicates_kept(self):
        scope = scope_of(get(b"/", b"X-B: 1", b"X-a:  Two ", b"x-B: 3", b"Cookie:\xe9"))
        assert list(scope["headers"]) == [
            (b"host", b"x"),
            (b"x-b", b"1"),
            (b"x-a", b"Two"),
            (b"x-b", b"3"),
            (b"cookie", b"\xe9"),
        ]
        assert all(type(item) is bytes for pair in scope["headers"] for item in pair)

    def test_client_and_server_are_host_and_port(self):
        scopes = queue.Queue()

        async def app(scope, receive, send):
            scopes.put(scope)
            await send(START)
            await send(END)

        with serve(app) as running, running.connect() as client:
            client.send(GET)
            assert client.response()[0] == 200
            scope = scopes.get(timeout=PATIENCE)
            assert scope["client"] == client.sock.getsockname()
            assert scope["server"] == running.address

    @pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
    def test_a_unix_socket_has_a_path_and_no_client(self):
        with tempfile.TemporaryDirectory() as folder:
            listener, remove_file = sockets.bind_unix(folder + "/socket", 16)
            scope = scope_of(GET, listener=listener)
            remove_file()
        assert scope["server"] == (folder + "/socket", None)
        assert scope["client"] is None

    def test_state_is_a_shallow_copy_for_each_request(self):
        async def app(scope, receive, send):
            scope["state"]["list"].append(scope["path"])
            await send(START)
            await send(body(str(scope["state"]).encode()))
            scope["state"]["mine"] = True

        with serve(app) as running, running.connect() as client:
            running.server.state["list"] = []
            client.send(get(b"/1") + get(b"/2"))
            assert client.response()[2] == b"{'list': ['/1']}"
            assert client.response()[2] == b"{'list': ['/1', '/2']}"

    def test_a_context_variable_of_one_request_is_not_seen_in_the_next(self):
        variable = contextvars.ContextVar("variable", default="unset")

        async def app(scope, receive, send):
            seen = variable.get()
            variable.set("set")
            await send(START)
            await send(body(seen.encode()))

        with serve(app) as running, running.connect() as client:
            client.send(GET + GET)
            assert client.response()[2] == b"unset"
            assert client.response()[2] == b"unset"

    @pytest.mark.parametrize("kind", ["http", "websocket"])
    def test_a_client_that_repeats_itself_gets_a_scope_of_its_own(self, kind):
        """Its head is not looked at again; but the app may have changed all it got."""
        shown = []

        async def app(scope, receive, send):
            shown.append(repr(scope))
            assert scope["type"] == kind
            if kind == "websocket":
                scope["subprotocols"].clear()
                await send({"type": "websocket.close"})  # 403; the connection goes on
            scope["headers"].clear(), scope["extensions"].clear(), scope["state"].clear()
            scope["path"] = scope["scheme"] = scope["client"] = "mine"
            if kind == "http":
                await send(START)
                await send(END)

        request = get(b"/a%20b")
        if kind == "websocket":
            request = handshake("GET /a%20b HTTP/1.1", Sec_WebSocket_Protocol="chat")
        with serve(app) as running, running.connect() as client:
            for _ in range(3):
                client.send(request)
                client.response()
        assert len(shown) == 3 and len({*shown}) == 1, shown

    def test_a_connection_that_is_idle_holds_no_head(self):
        with serve(saying(START, END)) as running, running.connect() as client:
            for _ in range(2):
                client.send(get(b"/", b"X: " + 30_000 * b"x"))
                assert client.response()[0] == 200
                [connection] = running.server.connections
                until(running, lambda c=connection: not (c.gate.head or c.template))

    def test_what_an_app_does_to_its_scope_does_not_disturb_the_server(self, log):
        """What if a middleware sets scope["client"] to a list, as the spec allows?"""

        async def app(scope, receive, send):
            if scope["path"] == "/list":
                scope["client"] = ["9.9.9.9", 0]
            else:
                scope.clear()
            await send(START)
            await send(END)

        with serve(app) as running, running.connect() as client:
            for path in (b"/list", b"/clear", b"/list"):
                client.send(get(path))
                assert client.response()[0] == 200
        assert not [r for r in log.records if r.levelname == "ERROR"]


FOR = b"X-Forwarded-For: "


class TestProxyHeaders:
    """behaviour.md §1, --proxy-headers; uvicorn's ProxyHeadersMiddleware."""

    def test_they_are_ignored_unless_asked_for(self):
        scope = scope_of(get(b"/", FOR + b"9.9.9.9", b"X-Forwarded-Proto: https"))
        assert scope["client"][0] == "127.0.0.1"
        assert scope["scheme"] == "http"

    def test_they_are_ignored_from_a_peer_that_is_not_trusted(self):
        request = get(b"/", FOR + b"9.9.9.9", b"X-Forwarded-Proto: https")
        scope = scope_of(request, proxy_headers=True, forwarded_allow_ips="10.0.0.0/8")
        assert scope["client"][0] == "127.0.0.1"
        assert scope["scheme"] == "http"

    @pytest.mark.parametrize(
        "trusted, fields, client",
        [
            ("127.0.0.1", [b"9.9.9.9"], "9.9.9.9"),
            ("127.0.0.1", [b"6.6.6.6, 9.9.9.9"], "9.9.9.9"),
            ("127.0.0.1", [b"6.6.6.6", b"9.9.9.9"], "9.9.9.9"),
            ("127.0.0.1, 10.0.0.0/8", [b"6.6.6.6,9.9.9.9,10.1.2.3"], "9.9.9.9"),
            ("*", [b"6.6.6.6, 9.9.9.9"], "6.6.6.6"),
            ("127.0.0.1", [b"2001:db8::7"], "2001:db8::7"),
            ("127.0.0.1", [b"9.9.9.9:5555"], "9.9.9.9"),
            ("127.0.0.1", [b"[2001:db8::7]:5555"], "2001:db8::7"),
            ("127.0.0.1", [b"[2001:db8::7]"], "2001:db8::7"),
            ("127.0.0.1, 10.0.0.0/8", [b"9.9.9.9, 10.1.2.3:5555"], "9.9.9.9"),
            ("127.0.0.1", [b""], "127.0.0.1"),
            ("*", [b"6.6.6.6," + 50 * b"::,"], "::"),  # too many to look at them all
        ],
    )
    def test_the_client_is_the_rightmost_untrusted(self, trusted, fields, client):
        request = get(b"/", *[FOR + field for field in fields])
        scope = scope_of(request, proxy_headers=True, forwarded_allow_ips=trusted)
        assert scope["client"][0] == client
        assert type(scope["client"]) is tuple and type(scope["client"][1]) is int

    def test_a_peer_that_has_left_is_not_taken_for_a_proxy(self):
        """Once a connection is reset, the kernel tells no longer whose it was."""
        clients, blocked, go_on = [], threading.Event(), threading.Event()

        async def app(scope, receive, send):
            assert scope["type"] == "http"
            clients.append(scope["client"])
            await send(START)
            await send(END)

        def block():
            blocked.set()
            assert go_on.wait(PATIENCE)

        proxies = {"proxy_headers": True, "forwarded_allow_ips": "10.0.0.0/8"}
        with serve(app, **proxies) as s:
            s.server.loop.call_soon_threadsafe(block)
            assert blocked.wait(PATIENCE)
            with s.connect() as client:
                client.send(get(b"/", FOR + b"9.9.9.9"))
                client.reset()
            go_on.set()
            assert s.talk(GET).startswith(b"HTTP/1.1 200 ")
        assert {host for host, _ in clients} == {"127.0.0.1"}

    @pytest.mark.parametrize(
        "proto, scheme", [(b"https", "https"), (b"wss", "https"), (b"ftp", "http")]
    )
    def test_a_trusted_peer_names_the_scheme(self, proto, scheme):
        request = get(b"/", b"X-Forwarded-Proto: " + proto)
        assert scope_of(request, proxy_headers=True)["scheme"] == scheme
