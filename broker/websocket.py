"""The WebSocket side: Responses events as JSON text frames, on lanes.

    reader     the only task that receives; parses, starts and cancels turns, and waits for nothing but the socket
    writer     the only task that sends messages, outside every turn's cancel scope: a cancelled send tears its frame
    lane ...   one task per lane: its turns one after the other, each with its events into the outbox
    pinger     a ping with a deadline; a missing pong is death, silence is not
    lifetime   the oldest a connection may get
    drain      on shutdown: the running turns' grace, then close 1012, on which clients reconnect by themselves

Laws
    Host, Origin and key are checked before the upgrade, and refusals are plain HTTP with a proper status.
    Every queue has a bound and an answer: the lanes share `max_queued` creates (then an error event), the outbox has
    room for `_EVENTS` events of lanes (then the lane waits) and `_REPLIES` of the reader (then the connection ends:
    a peer that sends and never reads).
    A create is answered on its lane, in its lane's order, by a terminal event or an error event; never both.
    When the connection goes, so do its turns and its `store: false` ids. What they computed stays cached.
    Unknown client events are ignored: a late error would be read as the answer to the next request.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, assert_never

import trio
from trio_websocket import ConnectionClosed, wrap_server_stream

from broker.errors import BadRequest, BrokerError, ClientError, NotFound, Overloaded, error_event
from broker.foresight import session_labels
from broker.listen import linger, refuse
from broker.session import ConnectionScope
from broker.turn import Cancellation
from broker.wire.article import Dialogue, done_event
from broker.wire.responses_out import TERMINAL_EVENTS
from broker.wire.sse import json_text
from broker.wire.ws_frames import (
    ArticleItem,
    ArticleOpening,
    Cancel,
    Create,
    Ignored,
    Refused,
    Steer,
    parse_frame,
    steer_failed,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_websocket import WebSocketConnection

    from broker.access import Tenant
    from broker.config import WebSocket
    from broker.listen import Arrival
    from broker.port import Emit, Port
    from broker.wire.requests import TurnRequest

    Asked = Create | ArticleOpening | ArticleItem | Refused  # what waits in a lane

log = logging.getLogger(__name__)

RESPONSES_PATH = "/v1/responses"
ECHO_PATH = "/echo"

_EVENTS = 16
_REPLIES = 32
_RECEIVE_BYTES = 4096  # loop lag under a flood of empty fragments: 18 ms, against 586 ms at 64 KiB


class WebSocketSide:
    """Serves the connections that asked for a WebSocket."""

    def __init__(self, port: Port) -> None:
        self._port = port

    async def serve(self, arrival: Arrival) -> None:
        port, settings = self._port, self._port.config.websocket
        try:
            tenant = port.access.admit(arrival.headers)
            port.check_open()
            _check_handshake(arrival)
            echo = arrival.path == ECHO_PATH and port.config.dev.echo
            if not echo and arrival.path != RESPONSES_PATH:
                raise NotFound(f"No WebSocket at {arrival.path}.", code="unknown_url")
            if not settings.enabled:
                raise ClientError(
                    "WebSockets are off: use HTTP.", code="websocket_disabled", status=426
                )
        except BrokerError as error:
            await refuse(arrival.stream, error, _refusal_headers(error))
            return
        port.websockets += 1
        try:
            if echo:
                await _echo(arrival, settings)
            else:
                scope = ConnectionScope(labels=session_labels(arrival.headers), socket=True)
                await Connection(port, tenant, scope).run(arrival)
        finally:
            port.websockets -= 1
        await linger(arrival.stream)


class Fragments:
    """Counts frames per message in a client's byte stream. The library reassembles without a limit; this is the limit.

    Feed it every byte after the handshake. Control frames may come between fragments and do not count.
    Frame header: FIN and opcode (1), mask bit and length (1), longer length (0, 2 or 8), mask key (4).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._header = bytearray()
        self._skip = 0  # payload bytes still to come
        self._frames = 0  # of the message that is not finished

    def exceeded_by(self, data: bytes) -> bool:
        """Whether a message has more frames than allowed, `data` included."""
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
                at += step
                continue
            self._header.append(data[at])
            at += 1
            if len(self._header) == self._header_bytes():
                self._begin_frame()
                if self._frames > self._limit:
                    return True
        return False

    def _header_bytes(self) -> int:
        if len(self._header) < 2:
            return 2
        length, masked = self._header[1] & 0x7F, self._header[1] & 0x80
        return 2 + {126: 2, 127: 8}.get(length, 0) + (4 if masked else 0)

    def _begin_frame(self) -> None:
        final, opcode = self._header[0] & 0x80, self._header[0] & 0x0F
        length = self._header[1] & 0x7F
        if length >= 126:
            size = 2 if length == 126 else 8
            length = int.from_bytes(self._header[2 : 2 + size], "big")
        self._skip = length
        self._header.clear()
        if opcode < 8:
            self._frames = 0 if final else self._frames + 1


class Metered(trio.abc.Stream):
    """The client's stream with `Fragments` on what comes after the handshake's head."""

    def __init__(self, arrival: Arrival, max_fragments: int, flooded: Callable[[], None]) -> None:
        self._stream = arrival.stream
        self._head_bytes = arrival.head_bytes
        self._fragments = Fragments(max_fragments)
        self._flooded = flooded

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As of the stream. A flood is reported, and from then on read and dropped."""
        data = await self._stream.receive_some(max_bytes)
        head = min(self._head_bytes, len(data))
        self._head_bytes -= head
        if not self._fragments.exceeded_by(data[head:]):
            return data
        self._flooded()
        while data:
            data = await self._stream.receive_some(max_bytes)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """The door closes the stream, after a moment for the peer to read our last words."""


class Text(NamedTuple):
    text: str
    from_lane: bool  # and so holds one of the outbox's `_EVENTS` places


class Close(NamedTuple):
    code: int
    reason: str


@dataclass(slots=True, eq=False)
class Lane:
    """Turns that run one after the other. The default lane has no name."""

    name: str | None
    asked: trio.MemorySendChannel[Asked]
    running: Cancellation | None = None


@dataclass(slots=True, eq=False)
class Connection:
    """One client's socket, from its upgrade to its end."""

    port: Port
    tenant: Tenant
    scope: ConnectionScope
    dialogue: Dialogue = field(default_factory=Dialogue)
    lanes: dict[str | None, Lane] = field(default_factory=dict)
    asked: int = 0  # creates that wait in lanes or run
    quiet: trio.Event = field(default_factory=trio.Event)  # set when we stop and nothing runs
    ws: WebSocketConnection = field(init=False)
    nursery: trio.Nursery = field(init=False)
    outbox: trio.MemorySendChannel[Text | Close] = field(init=False)
    places: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(_EVENTS))
    in_flight: trio.Semaphore = field(init=False)

    async def run(self, arrival: Arrival) -> None:
        """Serve the client. Returns when either side has ended it, whatever the reason."""
        settings = self.port.config.websocket
        self.in_flight = trio.Semaphore(settings.max_in_flight)
        self.outbox, outgoing = trio.open_memory_channel[Text | Close](_EVENTS + _REPLIES)
        try:
            async with trio.open_nursery() as self.nursery:
                self.nursery.start_soon(self.port.expect, self.tenant, self.scope.labels)
                metered = Metered(arrival, settings.max_fragments, self._flooded)
                self.ws = await _upgrade(self.nursery, metered, settings)
                self.nursery.start_soon(self._write, outgoing)
                self.nursery.start_soon(self._ping)
                self.nursery.start_soon(self._expire)
                self.nursery.start_soon(self._drain)
                await self._read()
        finally:
            self.scope.close(self.port.engine)

    # reader

    async def _read(self) -> None:
        while True:
            try:
                message = await self.ws.get_message()
            except ConnectionClosed:
                break
            if isinstance(message, bytes):
                self._close(1003, "Text frames only.")
            else:
                self._take(message)
        self.nursery.cancel_scope.cancel()

    def _take(self, text: str) -> None:
        """One frame: started, queued or answered, without waiting."""
        frame = parse_frame(text)
        match frame:
            case Create():
                self._ask(frame, frame.request.stream_id)
            case Refused():
                self._ask(frame, frame.stream_id)
            case ArticleOpening() | ArticleItem():
                self._ask(frame, None)
            case Cancel():
                for lane in self.lanes.values():
                    if lane.running and frame.response_id in (None, lane.running.response_id):
                        lane.running.request()
            case Steer():
                self._reply(steer_failed(frame))
            case Ignored():
                log.debug("ignored a client event of type %s", frame.type[:64])
            case _:
                assert_never(frame)

    def _ask(self, frame: Asked, name: str | None) -> None:
        """Put a create in its lane, or answer why not."""
        settings = self.port.config.websocket
        try:
            lane = self.lanes.get(name) or self._new_lane(name, settings)
            if self.asked >= settings.max_queued + settings.max_in_flight:
                raise Overloaded("Too many requests wait on this connection.", retry_after_s=1.0)
        except BrokerError as error:
            self._reply(error_event(error, stream_id=name))
            return
        self.asked += 1
        lane.asked.send_nowait(frame)

    def _new_lane(self, name: str | None, settings: WebSocket) -> Lane:
        if name is not None and len(self.lanes.keys() - {None}) >= settings.max_lanes:
            raise BadRequest(
                "This WebSocket connection has reached its maximum number of distinct stream IDs"
                f" ({settings.max_lanes}). Reuse an existing stream_id or open a new WebSocket connection.",
                code="websocket_stream_limit_reached",
                param="stream_id",
            )
        bound = settings.max_queued + settings.max_in_flight
        send, receive = trio.open_memory_channel["Asked"](bound)
        lane = self.lanes[name] = Lane(name, send)
        self.nursery.start_soon(self._serve_lane, lane, receive)
        return lane

    # lanes

    async def _serve_lane(self, lane: Lane, asked: trio.MemoryReceiveChannel[Asked]) -> None:
        async for frame in asked:
            try:
                async with self.in_flight:
                    await self._serve(lane, frame)
            except BrokerError as error:
                await self._say(error_event(error, stream_id=lane.name))
            self.asked -= 1
            if not self.asked and self.port.stopping.is_set():
                self.quiet.set()

    async def _serve(self, lane: Lane, frame: Asked) -> None:
        """One create, to its terminal event. Raises BrokerError for what becomes an error event."""
        match frame:
            case Create():
                await self._turn(lane, frame.request)
            case ArticleOpening():
                await self._article_turn(lane, self.dialogue.open(frame.request))
            case ArticleItem():
                await self._article_turn(lane, self.dialogue.proceed(frame.item))
            case Refused():
                self.scope.failed(lane.name, frame.previous_response_id)
                raise frame.error
            case _:
                assert_never(frame)

    async def _turn(self, lane: Lane, request: TurnRequest) -> None:
        await self._run_turn(lane, request, self._say)

    async def _article_turn(self, lane: Lane, request: TurnRequest) -> None:
        async def say_and_be_done(event: dict[str, Any]) -> None:
            await self._say(event)
            if event["type"] in TERMINAL_EVENTS:
                self.dialogue.answered(event["response"])
                await self._say(done_event(event))

        await self._run_turn(lane, request, say_and_be_done)

    async def _run_turn(self, lane: Lane, request: TurnRequest, emit: Emit) -> None:
        lane.running = Cancellation()
        try:
            await self.port.turn(
                request,
                transport="websocket",
                tenant=self.tenant,
                scope=self.scope,
                emit=emit,
                background=self.nursery,
                cancellation=lane.running,
            )
        finally:
            lane.running = None

    # outbox

    async def _say(self, event: dict[str, Any]) -> None:
        """A lane's event. Waits for a place in the outbox."""
        text = json_text(event)
        await self.places.acquire()
        self._post(Text(text, from_lane=True))

    def _reply(self, event: dict[str, Any]) -> None:
        """The reader's answer. Never waits."""
        self._post(Text(json_text(event), from_lane=False))

    def _close(self, code: int, reason: str) -> None:
        """End the connection after what is in the outbox. The first reason given counts."""
        self._post(Close(code, reason))

    def _post(self, item: Text | Close) -> None:
        try:
            self.outbox.send_nowait(item)
        except trio.WouldBlock:
            log.info("a WebSocket client sends and does not read: its connection ends")
            self.nursery.cancel_scope.cancel()

    # writer

    async def _write(self, outgoing: trio.MemoryReceiveChannel[Text | Close]) -> None:
        send_timeout_s = self.port.config.websocket.send_timeout
        try:
            async for item in outgoing:
                with trio.fail_after(send_timeout_s):
                    if isinstance(item, Close):
                        await self.ws.aclose(
                            item.code, item.reason
                        )  # wakes the reader, who ends it all
                        break
                    await self.ws.send_message(item.text)
                if item.from_lane:
                    self.places.release()
        except ConnectionClosed:
            pass  # the reader has seen it too
        except trio.TooSlowError:  # half a frame is out: this socket is of no use any more
            log.info(
                "a WebSocket client read nothing for %g s: its connection ends", send_timeout_s
            )
        self.nursery.cancel_scope.cancel()

    # what ends a connection

    async def _ping(self) -> None:
        settings = self.port.config.websocket
        while True:
            await trio.sleep(settings.ping_interval)
            with trio.move_on_after(settings.ping_timeout) as waiting:
                try:
                    await self.ws.ping()
                except ConnectionClosed:
                    return
            if waiting.cancelled_caught:
                log.info("no pong for %g s: the connection ends", settings.ping_timeout)
                self.nursery.cancel_scope.cancel()

    async def _expire(self) -> None:
        lifetime_s = self.port.config.websocket.max_lifetime
        await trio.sleep(lifetime_s)
        error = BadRequest(
            f"Responses websocket connection limit reached ({lifetime_s / 60:g} minutes)."
            " Create a new websocket connection to continue.",
            code="websocket_connection_limit_reached",
        )
        self._reply(error_event(error))
        self._close(1000, "connection limit reached")

    async def _drain(self) -> None:
        await self.port.stopping.wait()
        if self.asked:
            with trio.move_on_after(self.port.config.server.grace):
                await self.quiet.wait()
        self._close(1012, "restarting")

    def _flooded(self) -> None:
        self._close(1008, "Too many fragments.")


async def _upgrade(
    nursery: trio.Nursery, stream: Metered, settings: WebSocket
) -> WebSocketConnection:
    """Finish a handshake that `_check_handshake` found good."""
    request = await wrap_server_stream(
        nursery,
        stream,
        max_message_size=settings.max_message,
        receive_buffer_size=_RECEIVE_BYTES,
    )
    return await request.accept()


async def _echo(arrival: Arrival, settings: WebSocket) -> None:
    """Every message back, text or binary: the same transport, for conformance suites."""

    def flooded() -> None:
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        ws = await _upgrade(nursery, Metered(arrival, settings.max_fragments, flooded), settings)
        try:
            while True:
                await ws.send_message(await ws.get_message())
        except ConnectionClosed:
            nursery.cancel_scope.cancel()


def _check_handshake(arrival: Arrival) -> None:
    """What the library would refuse without a word. Raises ClientError 400 or 426."""
    fields = dict(arrival.headers)
    if arrival.request.method != b"GET":
        raise ClientError("A WebSocket handshake is a GET.", code="invalid_handshake", status=405)
    if fields.get(b"sec-websocket-version") != b"13":
        raise ClientError("WebSocket version 13 only.", code="invalid_handshake", status=426)
    if b"sec-websocket-key" not in fields:
        raise ClientError("The handshake has no Sec-WebSocket-Key.", code="invalid_handshake")


def _refusal_headers(error: BrokerError) -> dict[str, str]:
    match error.status:
        case 401:
            return {"www-authenticate": "Bearer"}
        case 426:
            return {"upgrade": "websocket", "sec-websocket-version": "13"}
        case _:
            return {}
