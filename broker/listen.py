"""One port for everything: read the first request head, then hand the stream, rewound, to the side that speaks it.

Only what happens before a protocol is known lives here, once `arrivals.py` has accepted: who gets a connection, TLS, the
head's size and deadline, and plain refusals. What a request may do is decided by the sides, with `broker.access`.

    accepted -> place? -> TLS? -> read_head -> upgrade to websocket?  yes  websocket side
                                                                      no   http side (further requests may follow)

Laws
    A connection that says nothing costs one task and one deadline, and gives way to one that arrives (`places.py`).
    TLS and head share one deadline. A head over `max_head` bytes is never held.
    Whoever gets no place is told so; above `_REFUSED_AT_ONCE` who are being told, nobody is.
    The side that gets the stream sees every byte from the first one on, as if nobody had read it.
    A refusal has the shape of the API that was asked, as far as what was read tells it.
    HTTP/1.0 and 1.1 only. HTTP/2 brings attacks of its own and no client here needs it, so an upgrade to it is
    ignored, as RFC 9110 allows: the head is written again without it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

import h11
import trio

from broker.arrivals import network_of
from broker.boundary import contained
from broker.dialect import Dialect, answer_of, dialect_of, dialect_of_bytes
from broker.errors import BrokerError, ClientError, Overloaded
from broker.places import Places

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

    Side = Callable[["Arrival"], Awaitable[None]]

_CHUNK = 4096  # bytes a read may take while the head is incomplete
_REFUSED_AT_ONCE = 64  # connections beyond the bounds that still get a word (guessed)
_FULL_S = 5.0  # the hint to those (guessed: silent connections last as long)
_REFUSE_S = 2.0  # for a refusal to be sent
_PHRASES = {one.value: one.phrase for one in HTTPStatus} | {529: "Overloaded"}
_LINGER_S = 0.5  # for its reader to hang up: more than a round trip over the sea
_DROPPED_AT_ONCE = 1 << 16  # bytes
_DROP_EVERY_S = 0.02  # so much of what nobody wants to hear: 3 MB/s; at full speed a flood would have the loop to itself


class Secured(trio.abc.HalfCloseableStream):
    """A stream under TLS. It cannot be half closed, and says nothing when it is asked to: HTTP does without."""

    def __init__(self, transport: trio.abc.HalfCloseableStream, tls: ssl.SSLContext) -> None:
        self.transport = transport
        self._inner: trio.SSLStream[trio.abc.HalfCloseableStream] = trio.SSLStream(
            transport, tls, server_side=True, https_compatible=True
        )

    async def do_handshake(self) -> None:
        await self._inner.do_handshake()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return bytes(await self._inner.receive_some(max_bytes))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await self._inner.aclose()


class Replay(trio.abc.HalfCloseableStream):
    """A stream that first gives back the bytes already read from it, and tells when the peer has said its last.

    A send that takes longer than `send_timeout_s` breaks it: the peer does not read.
    """

    def __init__(self, stream: trio.abc.HalfCloseableStream, seen: bytes) -> None:
        self.stream = stream
        self.ended = trio.Event()
        self.send_timeout_s = math.inf
        self._seen = seen

    @property
    def transport(self) -> trio.abc.HalfCloseableStream:
        """Below TLS, if there is any."""
        return self.stream.transport if isinstance(self.stream, Secured) else self.stream

    @property
    def socket(self) -> trio.socket.SocketType:
        """Hypercorn asks for the addresses. Only a real socket has them."""
        assert isinstance(self.transport, trio.SocketStream)
        return self.transport.socket

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
        with trio.move_on_after(self.send_timeout_s) as in_time:
            try:
                await self.stream.send_all(data)
            except trio.BusyResourceError:  # hypercorn says the end of a stream beside an answer
                raise trio.BrokenResourceError("the stream is being closed") from None
        if in_time.cancelled_caught:
            await trio.aclose_forcefully(self.stream)
            raise trio.BrokenResourceError("the peer does not read")

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

    @property
    def dialect(self) -> Dialect:
        return dialect_of(self.path, self.headers)


class Head:
    """Reads one connection's first request head."""

    def __init__(self, stream: trio.abc.HalfCloseableStream, max_head: int) -> None:
        self.seen = b""
        self._stream = stream
        self._max_head = max_head

    async def read(self) -> Arrival | None:
        """Read until the head is complete. None: the peer left first. Raises ClientError (400, 431, 505)."""
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=self._max_head)
        while True:
            room = min(_CHUNK, self._max_head - len(self.seen))
            data = bytes(await self._stream.receive_some(room))
            if not data:
                return None
            self.seen += data
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
            if len(self.seen) == self._max_head:
                raise ClientError(
                    f"The request head is over {self._max_head} bytes.",
                    code="head_too_large",
                    status=431,
                )
        if event.http_version not in (b"1.0", b"1.1"):
            raise ClientError("HTTP/1.1 only.", code="http_version_not_supported", status=505)
        seen = self.seen
        if _tokens(event, b"upgrade") == {b"h2c"}:
            event = _without_upgrade(event)
            seen = _head(event) + parser.trailing_data[0]
        return Arrival(Replay(self._stream, seen), event, len(seen) - len(parser.trailing_data[0]))


def wants_websocket(request: h11.Request) -> bool:
    return b"websocket" in _tokens(request, b"upgrade") and b"upgrade" in _tokens(
        request, b"connection"
    )


class Door:
    """What a listener calls for each accepted stream.

    A fault of ours in one connection's code ends that connection, loudly, and no other (`boundary.py`).
    """

    def __init__(
        self,
        *,
        max_head: int,
        head_timeout_s: float,
        max_connections: int,
        max_per_address: int,
        websocket: Side,
        http: Side,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._max_head = max_head
        self._head_timeout_s = head_timeout_s
        self._places = Places(most=max_connections, most_per_address=max_per_address)
        self._websocket = websocket
        self._http = http
        self._tls = tls
        self._refusing = 0

    @property
    def connections(self) -> int:
        """Those that hold a place."""
        return self._places.held

    async def serve(self, stream: trio.abc.HalfCloseableStream) -> None:
        """From accept to close. The stream is closed on return, whatever happened."""
        try:
            with contained("a connection"):
                await self._serve_or_vanish(stream)
        finally:
            await trio.aclose_forcefully(stream)

    async def _serve_or_vanish(self, stream: trio.abc.HalfCloseableStream) -> None:
        try:
            await self._serve(stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer vanished: normal, and nobody is left to tell

    async def _serve(self, stream: trio.abc.HalfCloseableStream) -> None:
        with trio.CancelScope() as here:
            place = self._places.take(address_of(stream), here.cancel)
            if place is None:
                await self._turn_away(stream)
                return
            try:
                arrival = await self._arrival(stream)
                self._places.spoke(place)
                if arrival is not None:
                    side = self._websocket if wants_websocket(arrival.request) else self._http
                    await side(arrival)
            finally:
                self._places.give(place)

    async def _arrival(self, stream: trio.abc.HalfCloseableStream) -> Arrival | None:
        """The connection's first request; None if there is none, or it was refused here."""
        head: Head | None = None
        try:
            with trio.fail_after(self._head_timeout_s):
                if self._tls is not None:
                    stream = Secured(stream, self._tls)
                    await stream.do_handshake()
                head = Head(stream, self._max_head)
                return await head.read()
        except trio.TooSlowError:
            late = f"No request within {self._head_timeout_s:g} s."
            error = ClientError(late, code="request_timeout", status=408)
        except ClientError as bad:
            error = bad
        if head is not None:  # else there is no TLS to say it in
            await refuse(stream, error, dialect_of_bytes(head.seen))
        return None

    async def _turn_away(self, stream: trio.abc.HalfCloseableStream) -> None:
        if self._refusing >= _REFUSED_AT_ONCE or self._tls is not None:
            return
        self._refusing += 1
        try:
            error = Overloaded("Too many connections; try again.", retry_after_s=_FULL_S)
            error.code = "too_many_connections"
            await refuse(stream, error, Dialect.RESPONSES)
        finally:
            self._refusing -= 1


def address_of(stream: trio.abc.HalfCloseableStream) -> str:
    """Whom a stream counts for, as `network_of` says; "" for what has no address."""
    if not isinstance(stream, trio.SocketStream):
        return ""
    try:
        return network_of(stream.socket.family, stream.socket.getpeername())
    except OSError:  # gone already
        return ""


async def refuse(
    stream: trio.abc.HalfCloseableStream,
    error: BrokerError,
    dialect: Dialect,
    headers: dict[str, str] | None = None,
) -> None:
    """Answer with a plain HTTP error and hang up. Gives the peer a moment to read it, so that no reset discards it."""
    answer = answer_of(error, dialect)
    body = json.dumps(answer.body).encode()
    fields = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **answer.headers,
        **(headers or {}),
    }
    lines = [f"HTTP/1.1 {answer.status} {_PHRASES.get(answer.status, 'Error')}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    with trio.move_on_after(_REFUSE_S):
        await stream.send_all("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    await linger(stream)


async def linger(stream: trio.abc.HalfCloseableStream) -> None:
    """Say that nothing more comes and let the peer hang up: closing on unread bytes would reset what we said last."""
    with trio.move_on_after(_LINGER_S):
        try:
            await stream.send_eof()
            await drop(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return


async def drop(stream: trio.abc.ReceiveStream) -> None:
    """Read to the peer's end, at a pace, and forget it."""
    while True:
        if not await stream.receive_some(_DROPPED_AT_ONCE):
            return
        await trio.sleep(_DROP_EVERY_S)


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
