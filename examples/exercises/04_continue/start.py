"""A server for one request, blocking, on h11 and a socket. It says `100 Continue` as
soon as it has read the head, whether the app wants the body or not.

Run:   python examples/exercises/04_continue/start.py
Try:   curl -v -H "Expect: 100-continue" -d hello localhost:8004
       curl -v -H "Expect: 100-continue" -d hello localhost:8004/no
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import h11


class Exchange:
    """One request and its response: what an app may ask for, and say."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.conn = h11.Connection(h11.SERVER)

    def next_event(self) -> h11.Event:
        """What the client says next. Reads only when h11 has nothing left."""
        while (event := self.conn.next_event()) is h11.NEED_DATA:
            self.conn.receive_data(self.sock.recv(65536))
        return event

    def say_continue(self, request: h11.Request) -> None:
        if (b"expect", b"100-continue") in request.headers:
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def read(self) -> bytes:
        """The next piece of the request body; b"" after the last."""
        event = self.next_event()
        return event.data if type(event) is h11.Data else b""

    def answer(self, status: int, body: bytes) -> None:
        """The whole response. There is no second request on this connection."""
        length = (b"content-length", b"%d" % len(body))
        fields = [length, (b"connection", b"close")]
        response = h11.Response(status_code=status, headers=fields)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.sock.sendall(self.conn.send(event))


App = Callable[[h11.Request, Exchange], None]


def serve_one(sock: socket.socket, app: App) -> None:
    """Read a request's head, let the app answer."""
    exchange = Exchange(sock)
    request = exchange.next_event()
    exchange.say_continue(request)
    app(request, exchange)


def demo(request: h11.Request, exchange: Exchange) -> None:
    """Takes any body, except at /no."""
    if request.target == b"/no":
        exchange.answer(413, b"no, thank you\n")
        return
    size = 0
    while piece := exchange.read():
        size += len(piece)
    exchange.answer(200, b"%d bytes\n" % size)


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 8004)) as listener:
        while True:
            with listener.accept()[0] as accepted:
                serve_one(accepted, demo)
