"""A wire tap: forwards TCP connections to a server on loopback and keeps what went over each, in both directions.

What was kept is read again by parsers that are not the server's: WebSocket messages, HTTP requests and their answers.
"""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import h11
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    Json = dict[str, Any]


@dataclass
class Wire:
    """One connection. Bytes as they came."""

    up: bytearray = field(default_factory=bytearray)  # from the client
    down: bytearray = field(default_factory=bytearray)

    @property
    def is_websocket(self) -> bool:
        return self.down.startswith(b"HTTP/1.1 101")

    @property
    def handshake(self) -> dict[str, str]:
        """The upgrade's header fields, lower case."""
        lines = bytes(self.up).partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
        return {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }

    def messages(self) -> tuple[list[Json], list[Json]]:
        """JSON texts of a WebSocket: (client's, server's). A message that was cut off is left out."""
        return _texts(bytes(self.up)), _texts(bytes(self.down))

    def exchanges(self) -> list[tuple[h11.Request, bytes, h11.Response, bytes]]:
        """(request, its body, answer, its body) over HTTP. An answer that was cut off has the body that came."""
        requests = _http(h11.Connection(h11.SERVER), bytes(self.up))
        answers = _http(
            h11.Connection(h11.CLIENT), bytes(self.down), [r.method for r, _ in requests]
        )
        return [(r, sent, a, got) for (r, sent), (a, got) in zip(requests, answers, strict=False)]


@dataclass
class Tap:
    url: str
    wires: list[Wire] = field(default_factory=list)


@asynccontextmanager
async def tapped(upstream: str) -> AsyncIterator[Tap]:
    """`upstream` is `http://HOST:PORT`. The tap ends with the block."""
    host, _, port = upstream.removeprefix("http://").partition(":")
    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        tap = Tap(f"http://127.0.0.1:{listener.socket.getsockname()[1]}")

        async def forward(client: trio.SocketStream) -> None:
            wire = Wire()
            tap.wires.append(wire)
            server = await trio.open_tcp_stream(host, int(port))
            async with client, server, trio.open_nursery() as both:
                both.start_soon(_copy, client, server, wire.up, both.cancel_scope)
                both.start_soon(_copy, server, client, wire.down, both.cancel_scope)

        nursery.start_soon(trio.serve_listeners, forward, [listener])
        yield tap
        nursery.cancel_scope.cancel()


async def _copy(
    source: trio.SocketStream, sink: trio.SocketStream, kept: bytearray, scope: trio.CancelScope
) -> None:
    try:
        async for data in source:
            kept += data
            await sink.send_all(data)
        await sink.send_eof()
    except (
        trio.BrokenResourceError,
        trio.ClosedResourceError,
    ):  # cut, not closed: so is the other side
        scope.cancel()


def events_of(body: bytes) -> list[Json]:
    """The JSON of a body of server-sent events."""
    lines = body.decode().splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(text) for text in data if text != "[DONE]"]


def _texts(data: bytes) -> list[Json]:
    """Text messages of one direction, after the HTTP head. RFC 6455, 5.2, without extensions."""
    at = data.index(b"\r\n\r\n") + 4
    texts, message = [], b""
    while at + 2 <= len(data):
        first, second = data[at], data[at + 1]
        at += 2
        assert not first & 0x70, "a reserved bit: an extension that nobody agreed on"
        length = second & 0x7F
        if length >= 126:
            size = 2 if length == 126 else 8
            length = int.from_bytes(data[at : at + size], "big")
            at += size
        mask = b"\0\0\0\0"
        if second & 0x80:
            mask = data[at : at + 4]
            at += 4
        payload = data[at : at + length]
        if len(payload) < length:
            break
        at += length
        if first & 0x0F > 2:  # a control frame
            continue
        assert first & 0x0F != 2, "a binary message"
        message += bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
        if first & 0x80:
            texts.append(json.loads(message))
            message = b""
    return texts


def _http(parser: h11.Connection, data: bytes, methods: list[bytes] | None = None) -> list[Any]:
    """Heads and bodies of one direction of a kept-alive connection."""
    found: list[Any] = []
    head, body = None, b""
    waiting = iter(methods or [])
    parser.receive_data(data)
    while True:
        if parser.our_role is h11.CLIENT and parser.our_state is h11.IDLE:
            method = next(waiting, None)
            if method is None:
                break
            parser.send(h11.Request(method=method, target="/", headers=[("host", "tap")]))
            parser.send(h11.EndOfMessage())
        event = parser.next_event()
        if isinstance(event, h11.Request | h11.Response):
            head, body = event, b""
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            found.append((head, body))
            head = None
            if parser.our_role is h11.SERVER:
                parser.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                parser.send(h11.EndOfMessage())
            if parser.our_state is not h11.DONE or parser.their_state is not h11.DONE:
                break
            parser.start_next_cycle()
        elif (
            event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED
        ):
            break
    if head is not None:
        found.append((head, body))
    return found
