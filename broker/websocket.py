"""The WebSocket side: Responses events as JSON text frames, on lanes.

    reader     the only task that receives; parses, starts, steers and cancels turns, and waits for nothing but the
               socket, and a thread that parses a large frame
    writer     the only task that sends messages, outside every turn's cancel scope: a cancelled send tears its frame
    lane ...   one task per lane: its turns one after the other, each with its events into the outbox
    lifetime   hosts the lanes, and ends them when the connection is as old as it may get
    pinger     a ping with a deadline; a missing pong is death, silence is not
    drain      on shutdown: the running turns' grace, then close 1012, on which clients reconnect by themselves

Laws
    Host, Origin and key are checked before the upgrade, and refusals are plain HTTP with a proper status.
    Every queue has a bound and an answer: the lanes share `max_queued` creates (then an error event, `_REFUSALS` of
    which may wait before the connection is closed), the outbox has room for `_EVENTS` events of lanes (then the lane
    waits) and `_REPLIES` of the reader (then the connection ends: a peer that sends and never reads).
    A create is answered on its lane, in its lane's order, by a terminal event or an error event; never both. That
    holds to the end of the connection's lifetime: what runs or waits then is answered by the error that says so.
    Who breaks the rules again and again is refused before the upgrade, for a while (broker/offences.py).
    When the connection goes, so do its turns and its `store: false` ids. What they computed stays cached.
    Unknown client events are ignored: a late error would be read as the answer to the next request.

Close codes, which decide whether clients come back by themselves (they do after 1011, 1012 and 1013):
    1000 the lifetime is over   1002, 1007 a broken frame, no UTF-8   1003 a binary frame   1008 fragments or pings without end
    1009 a message over `max_message`   1011 a fault of ours   1012 we restart   1013 a flood of requests
    A peer's own code is sent back to it. One that is gone, or does not read, gets none.
"""

from __future__ import annotations

import logging
import math
import struct
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, assert_never

import trio
from trio_websocket import ConnectionClosed, wrap_server_stream
from wsproto.utilities import LocalProtocolError

from broker.boundary import confessed
from broker.breakdown import Origin, Stage, TraceContext
from broker.errors import BadRequest, BrokerError, ClientError, NotFound, Overloaded, error_event
from broker.foresight import session_labels
from broker.listen import address_of, drop, linger, refuse
from broker.offences import Offences
from broker.session import ConnectionScope
from broker.turn import Cancellation
from broker.wire.article import Dialogue, done_event
from broker.wire.responses_out import TERMINAL_EVENTS
from broker.wire.sse import json_text
from broker.wire.steering import Steer, Steering, unknown_target
from broker.wire.ws_frames import (
    ArticleItem,
    ArticleOpening,
    Cancel,
    Create,
    Ignored,
    Refused,
    parse_frame,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from trio_websocket import WebSocketConnection

    from broker.access import Tenant
    from broker.breakdown import Breakdown
    from broker.config import WebSocket
    from broker.listen import Arrival
    from broker.port import Emit, Port
    from broker.turn import Outcome
    from broker.wire.requests import TurnRequest
    from broker.wire.responses_out import Event
    from broker.wire.ws_frames import Frame

    Asked = Create | ArticleOpening | ArticleItem | Refused

log = logging.getLogger(__name__)

RESPONSES_PATH = "/v1/responses"
ECHO_PATH = "/echo"

_EVENTS = 16
_REPLIES = 32
_REFUSALS = 64  # creates over the bound that wait to be refused, each in its lane's order (guessed)
_LARGE_FRAME = (
    1 << 16
)  # characters; parsing takes up to 0.4 s a MiB (measured), and until then the loop stands
_LAST_WORD_S = 1.0
_EMPTY_S = 10.0
_OFFENCES = frozenset({1002, 1007, 1008, 1013})  # closes of ours that are the peer's fault
_CLOSE_FRAME = 0x88  # a final frame with the opcode of a close
_RECEIVE_BYTES = 4096
_FRAMES_AT_ONCE = 16  # of one client before the loop sees to the others: some 20 us each (measured)


class WebSocketSide:
    """Serves the connections that asked for a WebSocket."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._offences = Offences()

    async def serve(self, arrival: Arrival) -> None:
        port = self._port
        with ExitStack() as held:
            try:
                tenant = port.access.admit(arrival.headers)
                port.check_open()
                _check_handshake(arrival)
                self._check_path(arrival.path)
                who = tenant.name, address_of(arrival.stream.transport)
                self._check_offences(who)
                held.enter_context(port.held_by(tenant))
            except BrokerError as error:
                await refuse(arrival.stream, error, arrival.dialect, _refusal_headers(error))
                return
            port.websockets += 1
            held.callback(self._left)
            if arrival.path == ECHO_PATH:
                await _echo(arrival, port.config.websocket)
            else:
                scope = ConnectionScope(labels=session_labels(arrival.headers), socket=True)
                connection = Connection(port, tenant, scope, _trace(arrival))
                await connection.run(arrival)
                if connection.offended:
                    self._offences.note(who, trio.current_time())
        await linger(arrival.stream)

    def _check_path(self, path: str) -> None:
        """Raises ClientError where there is no WebSocket."""
        config = self._port.config
        if path == ECHO_PATH and config.dev.echo:
            return
        if path != RESPONSES_PATH:
            raise NotFound(f"No WebSocket at {path}.", code="unknown_url")
        if not config.websocket.enabled:
            raise ClientError(
                "WebSockets are off: use HTTP.", code="websocket_disabled", status=426
            )

    def _check_offences(self, who: tuple[str, str]) -> None:
        """Raises Overloaded, as long as somebody is barred."""
        wait_s = self._offences.barred_s(who, trio.current_time())
        if wait_s:
            error = Overloaded(
                "Too many of this client's connections broke the rules; try again later.",
                retry_after_s=wait_s,
            )
            error.code = "too_many_violations"
            raise error

    def _left(self) -> None:
        self._port.websockets -= 1


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
        self.begun = 0  # frames so far
        self.controls = 0  # pings, pongs and closes among them

    @property
    def unfinished(self) -> bool:
        """Whether a message, or a frame of one, has begun and not ended."""
        return bool(self._header or self._skip or self._frames)

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
        self.begun += 1
        if opcode < 8:
            self._frames = 0 if final else self._frames + 1
        else:
            self.controls += 1


class Budget:
    """So many in any `_EMPTY_S`, of what costs us work and brings nothing. Pure."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._since = -math.inf
        self._spent = 0

    def exceeded_by(self, count: int, now: float) -> bool:
        if now - self._since >= _EMPTY_S:
            self._since, self._spent = now, 0
        self._spent += count
        return self._spent > self._most


class Metered(trio.abc.Stream):
    """The client's stream with limits on what comes after the handshake's head: how many frames a message has, how long
    it takes, and how many control frames there are. Whoever passes one is reported to `abused`, with the limit's name; from
    then on he is read and dropped.

    Small frames are read by about `_FRAMES_AT_ONCE`: what the library makes of one read it makes in one go, and meanwhile
    the loop stands for everybody.
    """

    def __init__(
        self, arrival: Arrival, settings: WebSocket, abused: Callable[[str], None]
    ) -> None:
        self._stream = arrival.stream
        self._head_bytes = arrival.head_bytes
        self._fragments = Fragments(settings.max_fragments)
        self._timeout_s = settings.message_timeout
        self._room = _RECEIVE_BYTES  # of the next read
        self._due = math.inf  # when the message that has begun must be there
        self._abused = abused
        self._pings = Budget(settings.max_empty)
        self.close_sent = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As of the stream; fewer where its frames are small."""
        data = b""
        room = self._room if max_bytes is None else min(self._room, max_bytes)
        with trio.move_on_at(self._due) as in_time:
            data = await self._stream.receive_some(room)
        head = min(self._head_bytes, len(data))
        self._head_bytes -= head
        begun, controls = self._fragments.begun, self._fragments.controls
        if in_time.cancelled_caught:
            self._abused(f"A message took longer than {self._timeout_s:g} s.")
        elif self._fragments.exceeded_by(data[head:]):
            self._abused("Too many fragments.")
        elif self._pings.exceeded_by(self._fragments.controls - controls, trio.current_time()):
            self._abused("Too many pings.")
        else:
            if not self._fragments.unfinished:
                self._due = math.inf
            elif self._due == math.inf:
                self._due = trio.current_time() + self._timeout_s
            frame_bytes = len(data) // max(1, self._fragments.begun - begun)
            self._room = max(1, min(frame_bytes * _FRAMES_AT_ONCE, _RECEIVE_BYTES))
            return data
        await drop(self._stream)
        return b""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """A whole frame at a time, as the library does."""
        self.close_sent = self.close_sent or data[0] == _CLOSE_FRAME
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """The door closes the stream, after a moment for the peer to read our last words."""


class Waiting(NamedTuple):
    """What waits in a lane, and the account of the turn that it may become."""

    frame: Asked
    breakdown: Breakdown


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
    asked: trio.MemorySendChannel[Waiting]
    steering: Steering
    waiting: int = 0  # frames that wait or are served
    running: Cancellation | None = None


@dataclass(slots=True, eq=False)
class Connection:
    """One client's socket, from its upgrade to its end."""

    port: Port
    tenant: Tenant
    scope: ConnectionScope
    trace: TraceContext | None = None  # the handshake's: of every turn here
    dialogue: Dialogue = field(default_factory=Dialogue)
    lanes: dict[str | None, Lane] = field(default_factory=dict)
    quiet: trio.Event = field(default_factory=trio.Event)  # set when we stop and nothing runs
    closed: trio.Event = field(default_factory=trio.Event)  # nothing is sent any more
    closing: Close | None = None
    offended: bool = False  # the peer broke the rules
    expired: bool = False  # no lane can begin any more
    stream: Metered = field(init=False)
    ws: WebSocketConnection = field(init=False)
    nursery: trio.Nursery = field(init=False)
    turns: trio.Nursery = field(init=False)
    outbox: trio.MemorySendChannel[Text | Close] = field(init=False)
    places: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(_EVENTS))
    in_flight: trio.Semaphore = field(init=False)
    empty: Budget = field(init=False)  # frames that ask for nothing

    @property
    def asked(self) -> int:
        """Creates that wait in lanes or run."""
        return sum(lane.waiting for lane in self.lanes.values())

    async def run(self, arrival: Arrival) -> None:
        """Serve the client. Returns when either side has ended it, whatever the reason."""
        settings = self.port.config.websocket
        self.in_flight = trio.Semaphore(settings.max_in_flight)
        self.empty = Budget(settings.max_empty)
        self.outbox, outgoing = trio.open_memory_channel[Text | Close](_EVENTS + _REPLIES)
        try:
            async with trio.open_nursery() as self.nursery:
                self.nursery.start_soon(self.port.expect, self.tenant, self.scope.labels)
                self.stream = Metered(arrival, settings, self._abused)
                self.ws = await _upgrade(self.nursery, self.stream, settings)
                self.nursery.start_soon(self._write, outgoing)
                self.nursery.start_soon(self._ping)
                self.nursery.start_soon(self._drain)
                await self.nursery.start(self._live)
                await self._read()
        except* LocalProtocolError:
            # The library answers a ping also when we are about to close, and then must not.
            if self.closing is None:
                raise
            await self._last_word(self.closing.code)
        finally:
            self.scope.close(self.port.engine)

    # reader

    async def _read(self) -> None:
        while True:
            try:
                message = await self.ws.get_message()
            except ConnectionClosed as ended:
                await self._answer_violation(ended.reason.code)
                break
            arrived = trio.current_time()
            if isinstance(message, bytes):
                self._close(1003, "Text frames only.")
            elif len(message) < _LARGE_FRAME:
                self._take(parse_frame(message), arrived)
            else:
                self._take(
                    await trio.to_thread.run_sync(parse_frame, message, abandon_on_cancel=True),
                    arrived,
                )
        self.nursery.cancel_scope.cancel()

    async def _answer_violation(self, code: int) -> None:
        """The library ends a connection that broke the protocol without a word: say why."""
        if code not in (1002, 1007) or self.stream.close_sent:
            return
        self._close(code, "")  # ends the writer: what it has begun to send is whole
        with trio.move_on_after(_LAST_WORD_S, shield=True):
            await self.closed.wait()
        await self._last_word(code)

    async def _last_word(self, code: int) -> None:
        """A close frame without the library, if it has sent none."""
        if self.closed.is_set() and not self.stream.close_sent:
            with trio.move_on_after(_LAST_WORD_S, shield=True):
                await self.stream.send_all(struct.pack("!BBH", _CLOSE_FRAME, 2, code))

    def _take(self, frame: Frame, arrived: float) -> None:
        """One frame: started, queued or answered, without waiting."""
        if self.expired:
            return
        match frame:
            case Create():
                self._ask(
                    frame, frame.request.stream_id, frame.request.previous_response_id, arrived
                )
            case Refused():
                self._ask(frame, frame.stream_id, frame.previous_response_id, arrived)
                self._spend_empty()
            case ArticleOpening() | ArticleItem():
                self._ask(frame, None, None, arrived)
            case Cancel():
                for lane in self.lanes.values():
                    if lane.running and frame.means(lane.name, lane.running.response_id):
                        lane.running.request()
            case Steer():
                self._steer(frame)
            case Ignored():
                log.debug("ignored a client event of a type that we do not know")
                self._spend_empty()
            case _:
                assert_never(frame)

    def _spend_empty(self) -> None:
        if self.empty.exceeded_by(1, trio.current_time()):
            self._close(1008, "Too many frames that ask for nothing.")

    def _steer(self, steer: Steer) -> None:
        for lane in self.lanes.values():
            if lane.steering.knows(steer.previous_response_id):
                answer = lane.steering.offer(steer)
                self._reply(answer)
                if answer["type"] == "response.steer.accepted" and lane.running:
                    lane.running.steer()
                return
        self._reply(unknown_target(steer))

    def _ask(self, frame: Asked, name: str | None, parent: str | None, arrived: float) -> None:
        """Put a create in its lane. One too many is refused there, in its turn."""
        settings = self.port.config.websocket
        try:
            lane = self.lanes.get(name) or self._new_lane(name, settings)
        except BadRequest as error:
            self._reply(error_event(error, stream_id=name))
            return
        over = self.asked - settings.max_queued - settings.max_in_flight
        if over >= _REFUSALS:
            self._close(1013, "Too many requests.")
            return
        if over >= 0:
            late = Overloaded("Too many requests wait on this connection.", retry_after_s=1.0)
            frame = Refused(late, name, parent)
        lane.waiting += 1
        lane.asked.send_nowait(Waiting(frame, self._begun(arrived)))

    def _begun(self, arrived: float) -> Breakdown:
        """The account of a turn whose frame came then and is understood now."""
        origin = Origin(self.port.new_id("req"), "responses", "websocket", self.trace)
        breakdown = self.port.observations.begin(origin, arrived)
        breakdown.enter(Stage.QUEUE, trio.current_time())
        return breakdown

    def _new_lane(self, name: str | None, settings: WebSocket) -> Lane:
        if name is not None and len(self.lanes.keys() - {None}) >= settings.max_lanes:
            raise BadRequest(
                "This WebSocket connection has reached its maximum number of distinct stream IDs"
                f" ({settings.max_lanes}). Reuse an existing stream_id or open a new WebSocket connection.",
                code="websocket_stream_limit_reached",
                param="stream_id",
            )
        bound = settings.max_queued + settings.max_in_flight + _REFUSALS
        send, receive = trio.open_memory_channel[Waiting](bound)
        lane = self.lanes[name] = Lane(name, send, Steering(name, self.port.new_id))
        self.turns.start_soon(self._serve_lane, lane, receive)
        return lane

    # lanes

    async def _serve_lane(self, lane: Lane, asked: trio.MemoryReceiveChannel[Waiting]) -> None:
        async for frame, breakdown in asked:
            async with confessed(self._apologise):
                try:
                    await self._serve(lane, frame, breakdown)
                except BrokerError as error:
                    await self._say(error_event(error, stream_id=lane.name))
            lane.waiting -= 1
            if self.port.stopping.is_set() and not self.asked:
                self.quiet.set()

    async def _serve(self, lane: Lane, frame: Asked, breakdown: Breakdown) -> None:
        """One create, to its terminal event. Raises BrokerError for what becomes an error event."""
        if isinstance(frame, Refused):
            self.scope.failed(lane.name, frame.previous_response_id)
            raise frame.error
        async with self.in_flight:
            match frame:
                case Create():
                    request = frame.request
                    # A successor would have to wait for what a conversation appends, or for another compaction.
                    steerable = request.conversation is None and request.compaction is None
                    await self._turns(lane, request, self._say, breakdown, steerable=steerable)
                case ArticleOpening():
                    await self._article_turn(lane, self.dialogue.open(frame.request), breakdown)
                case ArticleItem():
                    await self._article_turn(lane, self.dialogue.proceed(frame.item), breakdown)
                case _:
                    assert_never(frame)

    async def _turns(
        self,
        lane: Lane,
        request: TurnRequest,
        emit: Emit,
        breakdown: Breakdown,
        *,
        steerable: bool,
    ) -> None:
        """A client's request, and the successors that its steers make."""

        async def say(event: Event) -> None:
            after = lane.steering.told(event, steerable=steerable)
            await emit(event)
            await self._say_all(after)

        request, left_behind = lane.steering.join(request)
        await self._say_all(left_behind)
        try:
            outcome = await self._run_turn(lane, request, say, breakdown)
        except BrokerError as error:
            await self._say_all(lane.steering.refused(error.message))
            raise
        while (following := lane.steering.successor(request)) is not None:
            steered = outcome.node
            try:
                account = self._begun(trio.current_time())
                outcome = await self._run_turn(lane, following, say, account)
            except BrokerError as error:
                await self._say_all(lane.steering.refused(error.message))
                assert steered is not None, "a failed response has no successor"
                self.scope.remember(lane.name, steered)  # the client may still go on from it
                break

    async def _article_turn(self, lane: Lane, request: TurnRequest, breakdown: Breakdown) -> None:
        async def say_and_be_done(event: Event) -> None:
            await self._say(event)
            if event["type"] in TERMINAL_EVENTS:
                self.dialogue.answered(event["response"])
                await self._say(done_event(event))

        await self._turns(lane, request, say_and_be_done, breakdown, steerable=False)

    async def _run_turn(
        self, lane: Lane, request: TurnRequest, emit: Emit, breakdown: Breakdown
    ) -> Outcome:
        lane.running = Cancellation()
        try:
            return await self.port.turn(
                request,
                breakdown=breakdown,
                tenant=self.tenant,
                scope=self.scope,
                emit=emit,
                background=self.turns,
                cancellation=lane.running,
            )
        finally:
            lane.running = None

    async def _apologise(self) -> None:
        """Say that the fault is ours before it ends the connection: clients come back after this code."""
        self._close(1011, "Internal error.")
        with trio.CancelScope(shield=True):
            await self.closed.wait()

    # outbox

    async def _say_all(self, events: Iterable[Event]) -> None:
        for event in events:
            await self._say(event)

    async def _say(self, event: Event) -> None:
        """A lane's event. Waits for a place in the outbox."""
        text = json_text(event)
        await self.places.acquire()
        self._post(Text(text, from_lane=True))

    def _reply(self, event: Event) -> None:
        """The reader's answer. Never waits."""
        self._post(Text(json_text(event), from_lane=False))

    def _close(self, code: int, reason: str) -> None:
        """End the connection after what is in the outbox. The first reason given counts."""
        if code in _OFFENCES:
            self.offended = True
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
                        self.closing = item
                        await self.ws.aclose(item.code, item.reason)
                        break  # the reader is awake, too
                    await self.ws.send_message(item.text)
                if item.from_lane:
                    self.places.release()
        except ConnectionClosed:
            pass  # the reader has seen it too
        except trio.TooSlowError:  # half a frame is out: this socket is of no use any more
            log.info(
                "a WebSocket client read nothing for %g s: its connection ends", send_timeout_s
            )
        finally:
            self.closed.set()
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

    async def _live(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The lanes' life: the connection's, but for the oldest that one may get. Turns that run then are cut, and what
        they computed stays cached."""
        lifetime_s = self.port.config.websocket.max_lifetime
        with trio.move_on_after(lifetime_s):
            async with trio.open_nursery() as self.turns:
                task_status.started()
                try:
                    await trio.sleep_forever()
                finally:  # also when the connection ends: the reader may hold a frame still
                    self.expired = True
        error = BadRequest(
            f"Responses websocket connection limit reached ({lifetime_s / 60:g} minutes)."
            " Create a new websocket connection to continue.",
            code="websocket_connection_limit_reached",
        )
        for lane in self.lanes.values():
            if lane.waiting and lane.name is not None:
                await self._say(error_event(error, stream_id=lane.name))
        await self._say(error_event(error))
        self._close(1000, "connection limit reached")

    async def _drain(self) -> None:
        await self.port.stopping.wait()
        if self.asked:
            with trio.move_on_after(self.port.config.server.grace):
                await self.quiet.wait()
        self._close(1012, "restarting")

    def _abused(self, limit: str) -> None:
        self._close(1008, limit)


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

    def abused(limit: str) -> None:
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        ws = await _upgrade(nursery, Metered(arrival, settings, abused), settings)
        try:
            while True:
                await ws.send_message(await ws.get_message())
        except ConnectionClosed:
            nursery.cancel_scope.cancel()


def _trace(arrival: Arrival) -> TraceContext | None:
    header = dict(arrival.headers).get(b"traceparent")
    return None if header is None else TraceContext.parse(header.decode("latin-1"))


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
    if error.status == 426:
        return {"upgrade": "websocket", "sec-websocket-version": "13"}
    return {}
