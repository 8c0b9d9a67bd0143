"""One port for everything: read the first request head, then hand the stream, rewound, to the side that speaks it.

Only what happens before a protocol is known lives here: the accept loop, the connection limit, the head's size and
deadline, and plain refusals. What a request may do is decided by the sides, with `broker.access`.

    accept -> read_head -> upgrade to websocket?  yes  websocket side
                                                  no   http side (keeps the connection alive for further requests)

Laws
    A connection that says nothing costs one task and one deadline. A head over `max_head` bytes is never held.
    The side that gets the stream sees every byte from the first one on, as if nobody had read it.
    HTTP/1.0 and 1.1 only. HTTP/2 brings attacks of its own and no client here needs it, so an upgrade to it is
    ignored, as RFC 9110 allows: the head is written again without it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

import h11
import trio

from broker.errors import BrokerError, ClientError, http_body

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Side = Callable[["Arrival"], Awaitable[None]]

log = logging.getLogger(__name__)

_CHUNK = 4096  # bytes a read may take while the head is incomplete
_REFUSE_S = 2.0  # for a refusal to be sent
_LINGER_S = 0.5  # for its reader to hang up: more than a round trip over the sea


class Replay(trio.abc.HalfCloseableStream):
    """A stream that first gives back the bytes already read from it, and tells when the peer has said its last."""

    def __init__(self, stream: trio.abc.HalfCloseableStream, seen: bytes) -> None:
        self.stream = stream
        self.ended = trio.Event()
        self._seen = seen

    @property
    def socket(self) -> trio.socket.SocketType:
        """Hypercorn asks for the addresses. Only a real socket has them."""
        assert isinstance(self.stream, trio.SocketStream)
        return self.stream.socket

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._seen:
            try:
                data = bytes(await self.stream.receive_some(max_bytes))
            except trio.BrokenResourceError:
                self.ended.set()
                raise
            if not data:
                self.ended.set()
            return data
        await trio.lowlevel.checkpoint()
        size = len(self._seen) if max_bytes is None else max_bytes
        data, self._seen = self._seen[:size], self._seen[size:]
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self.stream.send_eof()

    async def aclose(self) -> None:
        await self.stream.aclose()


@dataclass(frozen=True, slots=True)
class Arrival:
    """A connection whose first request head is known."""

    stream: Replay
    request: h11.Request
    head_bytes: int  # how many of the stream's bytes are the head

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return list(self.request.headers)

    @property
    def path(self) -> str:
        return self.request.target.partition(b"?")[0].decode("ascii", "replace")


async def read_head(stream: trio.abc.HalfCloseableStream, max_head: int) -> Arrival | None:
    """Read until the first request head is complete. None: the peer left first. Raises ClientError (400, 431, 505)."""
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=max_head)
    seen = b""
    while True:
        data = bytes(await stream.receive_some(min(_CHUNK, max_head - len(seen))))
        if not data:
            return None
        seen += data
        try:
            parser.receive_data(data)
            event = parser.next_event()
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint
            raise ClientError(
                f"Bad request: {error}.", code="invalid_http", status=status
            ) from None
        if isinstance(event, h11.Request):
            break
        if len(seen) == max_head:
            raise ClientError(
                f"The request head is over {max_head} bytes.", code="head_too_large", status=431
            )
    if event.http_version not in (b"1.0", b"1.1"):
        raise ClientError("HTTP/1.1 only.", code="http_version_not_supported", status=505)
    if _tokens(event, b"upgrade") == {b"h2c"}:
        event = _without_upgrade(event)
        seen = _head(event) + parser.trailing_data[0]
    return Arrival(Replay(stream, seen), event, len(seen) - len(parser.trailing_data[0]))


def wants_websocket(request: h11.Request) -> bool:
    return b"websocket" in _tokens(request, b"upgrade") and b"upgrade" in _tokens(
        request, b"connection"
    )


class Door:
    """What a listener calls for each accepted stream.

    A fault of ours in one connection's code ends that connection, loudly, and no other: what it could have broken
    for others (the KV tables) is out of its reach. Everywhere else our faults fall through.
    """

    def __init__(
        self,
        *,
        max_head: int,
        head_timeout_s: float,
        max_connections: int,
        websocket: Side,
        http: Side,
    ) -> None:
        self._max_head = max_head
        self._head_timeout_s = head_timeout_s
        self._max_connections = max_connections
        self._websocket = websocket
        self._http = http
        self.connections = 0

    async def serve(self, stream: trio.abc.HalfCloseableStream) -> None:
        """From accept to close. The stream is closed on return, whatever happened."""
        self.connections += 1
        try:
            await self._serve(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer vanished: normal, and nobody is left to tell
        except Exception:
            log.exception("a connection ended by our fault; the others go on")
        finally:
            self.connections -= 1
            await trio.aclose_forcefully(stream)

    async def _serve(self, stream: trio.abc.HalfCloseableStream) -> None:
        if self.connections > self._max_connections:
            error = ClientError("Too many connections.", code="too_many_connections", status=503)
            await refuse(stream, error)
            return
        arrival: Arrival | None = None
        try:
            with trio.fail_after(self._head_timeout_s):
                arrival = await read_head(stream, self._max_head)
        except trio.TooSlowError:
            late = f"No request within {self._head_timeout_s:g} s."
            await refuse(stream, ClientError(late, code="request_timeout", status=408))
        except ClientError as error:
            await refuse(stream, error)
        if arrival is not None:
            side = self._websocket if wants_websocket(arrival.request) else self._http
            await side(arrival)


async def refuse(
    stream: trio.abc.HalfCloseableStream, error: BrokerError, headers: dict[str, str] | None = None
) -> None:
    """Answer with a plain HTTP error and hang up. Gives the peer a moment to read it, so that no reset discards it."""
    body = json.dumps(http_body(error)).encode()
    fields = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
        **(headers or {}),
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    with trio.move_on_after(_REFUSE_S):
        await stream.send_all("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    await linger(stream)


async def linger(stream: trio.abc.HalfCloseableStream) -> None:
    """Say that nothing more comes and let the peer hang up: closing on unread bytes would reset what we said last."""
    with trio.move_on_after(_LINGER_S):
        try:
            await stream.send_eof()
            while await stream.receive_some(_CHUNK):
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return


def _tokens(request: h11.Request, wanted: bytes) -> set[bytes]:
    """A comma-separated header as its lower-case members."""
    values = [value for name, value in request.headers if name == wanted]
    return {
        token.strip().lower() for value in values for token in value.split(b",") if token.strip()
    }


def _without_upgrade(request: h11.Request) -> h11.Request:
    dropped = (b"upgrade", b"http2-settings")
    kept = [(name, value) for name, value in request.headers if name not in dropped]
    return h11.Request(
        method=request.method,
        target=request.target,
        headers=kept,
        http_version=request.http_version,
    )


def _head(request: h11.Request) -> bytes:
    lines = [b"%s %s HTTP/%s" % (request.method, request.target, request.http_version)]
    lines += [b"%s: %s" % field for field in request.headers]
    return b"\r\n".join([*lines, b"", b""])
