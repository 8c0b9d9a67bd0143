"""The life of a turn: from a parsed request to one terminal event.

    resolve   the response it continues, or the history it repeats: parts whose sampled ids are known
    render    the exact prompt: the parent's ids and the encoded rest, or everything with the sampled ids spliced in
    submit    one `Submit`; the engine answers Began, Sampled…, Finished, or Refused
    say       ids to text to tool calls to protocol events to `emit`
    finish    the node enters the tables, the manifest is durable (`store: true`), then the last events are emitted

Laws
    What is wrong with a request is raised before the first event; after it, there is exactly one terminal event.
    A turn that fails takes its lane's own parent id with it (clients then replay); a fork's parent stays.
    The ids of the next turn's prefix are this prompt and every id sampled, stop id included.
    Instructions are each request's own. Tools are too, except that a continuation which declares none keeps those
    of its parent. Where either changed, the prompt is rendered anew, with all sampled ids that are known.
    A disk that refuses a manifest costs the id its durability, never the turn: the terminal event says
    `"homeport:stored": "memory"`, and the id answers until a restart.
    The KV of what a request names is asked for as soon as the name is read, before anything is rendered.
    If the caller goes away, so does the generation; what it computed stays cached.
    What a warm-up of this connection is computing is waited for, not computed a second time, whatever names it.
    A steered turn ends where its output can be cut: some of it said, none of it held back, no call begun.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import trio

from broker.divergence import Divergence, diverged_at, item_at
from broker.errors import BadRequest, BrokerError, ContextTooLong, Overloaded
from broker.foresight import expect
from broker.recall import Manifests, Recall, Recalled, continued
from broker.session import Node, Part, WarmUp, to_manifest
from broker.wire.items import (
    FunctionCall,
    FunctionCallOutput,
    ItemReference,
    Message,
    Reasoning,
    content_digest,
    parse_items,
    spoken_name,
)
from broker.wire.responses_out import ResponseStream
from broker.wire.retention import Retention
from broker.wire.toolcalls import CallArguments, CallEnd, CallStart, ToolCallSplitter
from broker.wire.toolcalls import Text as Said
from engine.api import (
    Finished,
    FinishReason,
    Refused,
    RefuseReason,
    Sampled,
    Sampling,
    Submit,
)
from engine.text import ChatMessage, Conversation, StopStrings, ToolCall, UnrenderableError
from tiers.block import BlockKey, StoreError
from tiers.policy import SessionClass

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping
    from contextlib import AbstractAsyncContextManager

    from broker.access import Tenant
    from broker.session import ConnectionScope, Sessions
    from broker.wire.items import Item
    from broker.wire.requests import ToolSpec, TurnRequest
    from engine.api import LeaseId, Output, RequestId
    from engine.text import Text
    from tiers.block import Tier, TokenIds
    from tiers.manifest import Manifest

log = logging.getLogger(__name__)
T = TypeVar("T")

# A refusal for want of room comes with the engine's next step: wait so long for it before the first event, so that
# it can still be an error with a retry-after instead of a failed response (guessed).
_ADMISSION_S = 0.5
# Clients with an idle timeout count JSON events only, neither pings nor comments; some give up after 15 s.
_KEEPALIVE_S = 10.0
_RETRY_AFTER_S = 1.0
_ANY_RETENTION = Retention()


class Clock(Protocol):
    def now(self) -> float: ...  # seconds since the epoch


class Engine(Manifests, Protocol):
    """What a turn uses of `engine.service.EngineService`."""

    @property
    def text(self) -> Text: ...
    @property
    def model_name(self) -> str: ...
    @property
    def max_context(self) -> int: ...
    def new_request(self) -> RequestId: ...
    def generate(
        self, submit: Submit
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Output]]: ...
    def cancel(self, request: RequestId) -> None: ...
    def reclass(self, lease: LeaseId, to: SessionClass) -> None: ...
    def prefetch(self, salt: bytes, prompt: TokenIds) -> None: ...
    async def persist(self, manifest: Manifest) -> None: ...
    def persist_later(self, manifest: Manifest) -> None: ...
    async def demote(self, to: Tier, session: str | None) -> int: ...
    async def forget_response(self, tenant: str, response_id: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a turn ended: the response object of its terminal event."""

    response: Mapping[str, Any]
    node: Node | None  # None: it failed, and cannot be continued
    durable: bool | None = None  # whether the disk took what was to be stored; None: nothing was
    behind: Callable[[], Awaitable[None]] | None = None  # a warm-up's prefill, still to be run


class Cancellation:
    """The transport's handle on a turn. Never waits.

    request   stop sampling, end in `response.incomplete`
    steer     the same, but where the output can be cut; a turn that cannot be cut any more goes on to its end
    """

    __slots__ = ("_stop", "requested", "response_id", "steered")

    def __init__(self) -> None:
        self.response_id: str | None = None  # known before the first event
        self.requested = False
        self.steered = False
        self._stop: Callable[[], None] | None = None

    def request(self) -> None:
        self.requested = True
        if self._stop is not None:
            self._stop()

    def steer(self) -> None:
        self.steered = True

    def stops(self, stop: Callable[[], None]) -> None:
        """From now on `request` does this; at once, if it was made before."""
        self._stop = stop
        if self.requested:
            stop()


@dataclass(frozen=True, slots=True)
class Resolved:
    """A request with its past. `before` is the turn that it goes on from, if that is known."""

    request: TurnRequest
    history: tuple[Part, ...]  # the parent's
    said: Recalled  # this request's items
    before: Node | None
    latest: Node | None  # the parent, or the newest turn that bears the session's name
    after: TokenIds | None  # the parent's exact ids, if the prompt is those and a suffix

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.history + self.said.parts

    def conversation(self) -> Conversation:
        return conversation(self.request.instructions, self.request.tools, self.parts)


async def run_turn(
    request: TurnRequest,
    *,
    engine: Engine,
    sessions: Sessions,
    connection: ConnectionScope,
    tenant: Tenant,
    emit: Callable[[dict[str, Any]], Awaitable[None]],
    clock: Clock,
    new_id: Callable[[str], str],
    retention: Retention = _ANY_RETENTION,
    cancellation: Cancellation | None = None,
) -> Outcome:
    """Serve one request. `emit` is awaited for each event in turn.

    Whoever gets an outcome with something `behind` it runs that, once, or cancels it: others may wait for it.
    Raises BrokerError if nothing was emitted: the transport says it in its own way.
    """
    turn = _Turn(
        request,
        engine,
        sessions,
        connection,
        tenant,
        emit,
        clock,
        new_id,
        retention,
        cancellation or Cancellation(),
    )
    try:
        outcome = await turn.run()
    except BrokerError:
        connection.failed(request.stream_id, request.previous_response_id)
        raise
    if outcome.node is None:
        connection.failed(request.stream_id, request.previous_response_id)
    return outcome


@dataclass(slots=True)
class _Turn:
    request: TurnRequest
    engine: Engine
    sessions: Sessions
    connection: ConnectionScope
    tenant: Tenant
    emit: Callable[[dict[str, Any]], Awaitable[None]]
    clock: Clock
    new_id: Callable[[str], str]
    retention: Retention
    cancellation: Cancellation
    started: bool = False  # the first event is out: from now on, errors are events

    async def run(self) -> Outcome:
        resolved = await self._resolve()
        stream = ResponseStream(
            resolved.request,
            response_id=self.new_id("resp"),
            model=self.request.model or self.engine.model_name,
            created_at=int(self.clock.now()),
            new_id=self.new_id,
            ttl_s=self._keep_s,
        )
        self.cancellation.response_id = stream.response_id
        if not self.request.generate:
            return await self._warm_up(resolved, stream)
        try:
            return await self._generate(resolved, stream)
        except BrokerError as error:
            if not self.started:
                raise
            await self._say(stream.fail(error.code, error.message))
            return Outcome(stream.response(), None)

    # resolve and render

    async def _resolve(self) -> Resolved:
        request, parent = self.request, None
        recall = Recall(self.engine, self.sessions, self.tenant)
        if request.previous_response_id is not None:
            parent = await continued(recall, self.connection, request.previous_response_id)
            if not request.tools:
                request = replace(request, tools=parent.tools)
        latest = parent or await recall.latest(self._labels())
        self._expect(latest)
        history = () if parent is None else parent.history

        def prompt(parts: tuple[Part, ...]) -> TokenIds:
            return self._prompt(conversation(request.instructions, request.tools, history + parts))

        said = await recall.parts(request.items, prompt=prompt)
        self._expect(said.last)
        _check_calls(request.items, history + said.parts)
        unchanged = (
            parent is not None
            and parent.sampled != ()
            and (request.instructions, request.tools) == (parent.instructions, parent.tools)
            and all(part.sampled is None for part in said.parts)
        )
        after = parent.tokens if parent is not None and unchanged else None
        return Resolved(request, history, said, said.last or parent, latest, after)

    def _expect(self, node: Node | None) -> None:
        if node is not None:
            expect(self.engine, self.tenant, node, self.clock.now())

    def _labels(self) -> tuple[str, ...]:
        key = self.request.prompt_cache_key
        return self.connection.labels if key is None else (key, *self.connection.labels)

    def _prompt(self, whole: Conversation, after: TokenIds | None = None) -> TokenIds:
        try:
            return self.engine.text.prompt(whole, after=after)
        except UnrenderableError as error:
            raise BadRequest(str(error), code="invalid_prompt", param="input") from error

    # submit, say, finish

    async def _generate(self, resolved: Resolved, stream: ResponseStream) -> Outcome:
        request, before = resolved.request, resolved.before
        prompt = self._prompt(resolved.conversation(), resolved.after)
        room = self.engine.max_context - len(prompt)
        if room < 1:
            raise ContextTooLong(limit_tokens=self.engine.max_context, prompt_tokens=len(prompt))
        divergence = self._divergence(resolved, prompt)
        if divergence is not None:
            stream.diverged(divergence.at, divergence.part)
        for warm in self._being_computed(prompt):
            await self._patiently(stream, partial(self._landed, warm))
        sampling = Sampling(
            max_tokens=min(request.max_output_tokens or room, room),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop_ids=self.engine.text.stop_ids,
        )
        supersedes = None if before is None else before.lease
        submit = self._submit(resolved, stream.response_id, prompt, sampling, supersedes)
        speech = _Speech(request, stream, self.engine.text, self.new_id)
        cut = False
        async with self.engine.generate(submit) as outputs:
            self.cancellation.stops(lambda: self.engine.cancel(submit.request))
            output = await self._patiently(stream, outputs.receive)
            if isinstance(output, Refused):
                raise _refusal(output, limit_tokens=self.engine.max_context, prompt=prompt)
            if before is not None:
                before.lease = None  # the engine ends it with this turn; a fork from here must not end it again
            await self._start(stream)
            while not isinstance(output, Finished):
                assert not isinstance(output, Refused), "refused after it began"
                if isinstance(output, Sampled) and not cut:
                    await self._say(speech.feed(output.tokens))
                    if speech.stopped:
                        self.engine.cancel(submit.request)
                    elif self.cancellation.steered and speech.can_be_cut:
                        cut = True
                        self.engine.cancel(submit.request)
                output = await self._patiently(stream, outputs.receive)
        reason = None if speech.stopped else _INCOMPLETE[output.reason]
        if cut:  # whatever else was sampled until the engine knew of it
            reason = "cancelled" if self.cancellation.requested else "steered"
        return await self._finish(resolved, stream, speech, prompt, output, supersedes, reason)

    async def _finish(
        self,
        resolved: Resolved,
        stream: ResponseStream,
        speech: _Speech,
        prompt: TokenIds,
        finished: Finished,
        superseded: LeaseId | None,
        reason: str | None,
    ) -> Outcome:
        events = speech.finish()
        if finished.reason is FinishReason.FAILED:
            if finished.lease is not None:
                self.engine.reclass(finished.lease, SessionClass.CLOSED)
            await self._say([*events, *stream.fail("server_error", "The turn failed; try again.")])
            return Outcome(stream.response(), None)
        events += stream.finish(
            "completed" if reason is None else "incomplete",
            reason,
            usage=finished.usage,
            completed_at=int(self.clock.now()),
        )
        node = self._node(resolved, stream, prompt, tuple(speech.sampled), finished)
        if finished.lease is not None:
            self.engine.reclass(finished.lease, self._waits_for(node, finished))
            self.connection.leased(finished.lease, superseded)
        elif (
            resolved.before is not None
        ):  # cancelled before it held anything: nothing is superseded
            resolved.before.lease = superseded
        if reason == "cancelled":
            self.connection.remember_cut(self.request.stream_id, node)
        else:
            self.connection.remember(self.request.stream_id, node)
        return await self._end(stream, node, events)

    def _waits_for(self, node: Node, finished: Finished) -> SessionClass:
        """What the protocol shows of the session's next turn."""
        called = any(isinstance(item, FunctionCall) for item in node.output[-1:])
        if not called or finished.reason is FinishReason.CANCELLED:
            return SessionClass.HUMAN_WAIT
        return SessionClass.BURST if self.connection.socket else SessionClass.TOOL_WAIT

    async def _end(
        self, stream: ResponseStream, node: Node, events: list[dict[str, Any]]
    ) -> Outcome:
        """Make the response durable, then say that it is over. A disk that refuses changes what is said, not that."""
        durable = await self._persist(node)
        if durable is False:
            events = stream.kept_in_memory(events)
            node.response = stream.response()
        await self._say(events)
        return Outcome(stream.response(), node, durable)

    async def _warm_up(self, resolved: Resolved, stream: ResponseStream) -> Outcome:
        """Acknowledge at once, compute the KV behind it: clients give a warm-up 15 s, cold prompts may take more."""
        try:
            prefix = self.engine.text.prefix(resolved.conversation())
        except UnrenderableError as error:
            raise BadRequest(str(error), code="invalid_prompt", param="input") from error
        if len(prefix) >= self.engine.max_context:
            raise ContextTooLong(limit_tokens=self.engine.max_context, prompt_tokens=len(prefix))
        events = stream.start()
        events += stream.finish("completed", None, usage=None, completed_at=int(self.clock.now()))
        node = self._node(resolved, stream, prefix, (), None)
        self.connection.remember(self.request.stream_id, node)
        landed = trio.Event()
        if (
            prefix
        ):  # named before the answer, begun after it: a step of the engine would hold the answer up
            self.connection.warming[node.response_id] = WarmUp(prefix, landed)
        outcome = await self._end(stream, node, events)
        if not prefix:
            return outcome
        return replace(outcome, behind=partial(self._prefill, resolved, node, landed))

    async def _prefill(self, resolved: Resolved, node: Node, landed: trio.Event) -> None:
        warming, before = self.connection.warming, resolved.before
        try:
            for earlier in self._being_computed(node.tokens, before=node.response_id):
                await earlier.landed.wait()
            supersedes = None if before is None else before.lease
            if before is not None:
                before.lease = None
            submit = self._submit(
                resolved, node.response_id, node.tokens, Sampling(max_tokens=0), supersedes
            )
            async with self.engine.generate(submit) as outputs:
                async for output in outputs:
                    if isinstance(output, Finished) and output.lease is not None:
                        node.lease = output.lease
                        self.connection.leased(output.lease, submit.supersedes)
        finally:
            landed.set()
            warming.pop(node.response_id, None)

    def _being_computed(self, prompt: TokenIds, *, before: str | None = None) -> list[WarmUp]:
        """The prefills under way that bring most of their tokens to this prompt; only those older than `before`."""
        warming = self.connection.warming.items()
        older = itertools.takewhile(lambda named: named[0] != before, warming)
        return [warm for _, warm in older if 2 * _shared(warm.tokens, prompt) > len(warm.tokens)]

    async def _landed(self, warm: WarmUp) -> None:
        """Wait for a prefill, or for the turn's own cancellation."""
        with trio.CancelScope() as waiting:
            self.cancellation.stops(waiting.cancel)
            await warm.landed.wait()

    def _submit(
        self,
        resolved: Resolved,
        response_id: str,
        prompt: TokenIds,
        sampling: Sampling,
        supersedes: LeaseId | None,
    ) -> Submit:
        return Submit(
            request=self.engine.new_request(),
            session=self._session(resolved, response_id),
            salt=self.tenant.salt,
            prompt=prompt,
            sampling=sampling,
            supersedes=supersedes,
            keep_s=self._keep_s,
        )

    @property
    def _keep_s(self) -> float:
        return self.retention.grant(self.request.asked_ttl_s)

    def _session(self, resolved: Resolved, response_id: str) -> str:
        if resolved.before is not None:
            return resolved.before.session
        return next(iter(self._labels()), response_id)

    def _divergence(self, resolved: Resolved, prompt: TokenIds) -> Divergence | None:
        """Where this prompt leaves the turn that it should have gone on from."""
        before = resolved.before or resolved.latest
        if before is None or resolved.after is not None:
            return None
        at = diverged_at(before.tokens, prompt)
        if at is None:
            return None
        request = resolved.request
        if before.history_known and request.instructions != before.instructions:
            return Divergence(at, "instructions")
        if before.history_known and request.tools != before.tools:
            return Divergence(at, "tools")

        def length(parts: tuple[Part, ...]) -> int:
            cut = conversation(request.instructions, request.tools, parts)
            return len(self.engine.text.prefix(cut))

        try:
            return Divergence(at, item_at(at, resolved.said, resolved.history, length))
        except UnrenderableError:  # a template that takes whole conversations only
            return Divergence(at, "input")

    def _node(
        self,
        resolved: Resolved,
        stream: ResponseStream,
        prompt: TokenIds,
        sampled: TokenIds,
        finished: Finished | None,
    ) -> Node:
        """The finished response, in the tables."""
        response = stream.response()
        output = parse_items(response["output"], at="output")
        session = self._session(resolved, stream.response_id)
        node = Node(
            response_id=stream.response_id,
            tenant=self.tenant.name,
            session=session,
            parent=self.request.previous_response_id,
            created_at=response["created_at"],
            stored=self.request.store,
            tokens=prompt + sampled,
            sampled_from=len(prompt),
            history=(*resolved.parts, Part(output, sampled)),
            instructions=resolved.request.instructions,
            tools=resolved.request.tools,
            response=response if self.request.store else None,
            item_ids=tuple(item.id for item in output if item.id is not None),
            content=content_digest(output) if output else b"",
            keys=() if finished is None else tuple(map(BlockKey, finished.keys)),
            labels=tuple(dict.fromkeys((session, *self._labels()))),
            lease=None if finished is None else finished.lease,
            expected_at=self.clock.now(),
        )
        self.sessions.add(node)
        return node

    async def _persist(self, node: Node) -> bool | None:
        """Whether the disk took a response that was to be stored; None for one that was not."""
        manifest = to_manifest(node)
        if not node.stored:
            self.engine.persist_later(manifest)
            return None
        try:
            await self.engine.persist(manifest)
        except StoreError as error:
            log.debug("response %s lives in memory only: %s", node.response_id, error)
            return False
        return True

    # events

    async def _start(self, stream: ResponseStream) -> None:
        if not self.started:
            self.started = True
            await self._say(stream.start())

    async def _say(self, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            await self.emit(event)

    async def _patiently(self, stream: ResponseStream, wait: Callable[[], Awaitable[T]]) -> T:
        """Await something that loses nothing when cancelled, and let the client know that we are there."""
        if not self.started:
            with trio.move_on_after(_ADMISSION_S):
                return await wait()
            await self._start(stream)
        while True:
            with trio.move_on_after(_KEEPALIVE_S):
                return await wait()
            await self.emit(stream.keepalive())


_INCOMPLETE = {
    FinishReason.STOP: None,
    FinishReason.LENGTH: "max_output_tokens",
    FinishReason.CANCELLED: "cancelled",
    FinishReason.FAILED: None,  # its response fails
}


class _Speech:
    """Sampled ids to events. Pure."""

    def __init__(
        self, request: TurnRequest, stream: ResponseStream, text: Text, new_id: Callable[[str], str]
    ) -> None:
        self.sampled: list[int] = []  # up to and with the id that completed a stop string
        self._stream = stream
        self._new_id = new_id
        self._stop_ids = text.stop_ids
        self._detokenizer = text.detokenizer()
        self._stops = StopStrings(request.stop)
        calls = bool(request.tools) and request.tool_choice.mode != "none"
        self._splitter = ToolCallSplitter() if calls else None
        self._undecided = 0  # characters that are a call's, or may be, or may begin a stop string

    @property
    def can_be_cut(self) -> bool:
        """Whether something was said, all of it is out as text (no call has begun), and it is not over anyway."""
        held = self._undecided or self._detokenizer.holds
        going_on = bool(self.sampled) and self.sampled[-1] not in self._stop_ids
        return going_on and not held

    @property
    def stopped(self) -> bool:
        """Whether a stop string was said."""
        return self._stops.found is not None

    def feed(self, tokens: TokenIds) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        for token in tokens:
            if self.stopped:
                break
            self.sampled.append(token)
            if token not in self._stop_ids:
                text = self._detokenizer.feed((token,))
                self._undecided += len(text)
                events += self._text(self._stops.feed(text))
        return events

    def finish(self) -> list[dict[str, Any]]:
        events = self._text(self._stops.feed(self._detokenizer.finish()) + self._stops.finish())
        if self._splitter is not None:
            events += self._pieces(self._splitter.finish())
        return events

    def _text(self, text: str) -> list[dict[str, Any]]:
        if not text:
            return []
        if self._splitter is None:
            self._undecided -= len(text)
            return self._stream.text(text)
        return self._pieces(self._splitter.feed(text))

    def _pieces(
        self, pieces: Iterable[Said | CallStart | CallArguments | CallEnd]
    ) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        for piece in pieces:
            match piece:
                case Said():
                    self._undecided -= len(piece.text)
                    events += self._stream.text(piece.text)
                case CallStart():
                    events += self._stream.call_start(piece.name, self._new_id("call"))
                case CallArguments():
                    events += self._stream.call_arguments(piece.delta)
                case CallEnd():
                    events += self._stream.call_end()
        return events


def conversation(
    instructions: str | None, tools: tuple[ToolSpec, ...], parts: Iterable[Part]
) -> Conversation:
    """What the chat template is given for these parts."""
    messages: list[ChatMessage] = []
    if instructions:
        messages.append(ChatMessage("system", instructions))
    names: dict[str, str] = {}  # {call id: spoken name}
    for part in parts:
        for item in part.items:
            if isinstance(item, FunctionCall):
                names[item.call_id] = spoken_name(item.name, item.namespace)
        if part.sampled:
            messages.append(ChatMessage("assistant", "", sampled=part.sampled))
        else:
            messages += _messages(part.items, names)
    return Conversation(tuple(messages), tuple(_tool_json(tool) for tool in tools))


def _messages(items: tuple[Item, ...], names: Mapping[str, str]) -> list[ChatMessage]:
    """One author's items: a model's become one message, a client's one each."""
    out: list[ChatMessage] = []
    spoken: list[str] = []
    calls: list[ToolCall] = []
    for item in items:
        match item:
            case Message(role="assistant"):
                spoken.append(item.text)
            case Message():
                role = "system" if item.role == "developer" else item.role
                out.append(ChatMessage(role, item.text))
            case FunctionCall():
                calls.append(ToolCall(item.call_id, names[item.call_id], item.arguments))
            case FunctionCallOutput():
                name = names.get(item.call_id)
                out.append(ChatMessage("tool", item.output, tool_call_id=item.call_id, name=name))
            case Reasoning():
                pass  # thoughts whose ids are not known are not thought again
            case ItemReference():
                raise AssertionError("references are resolved before")
    if spoken or calls:
        out.append(ChatMessage("assistant", "".join(spoken), tuple(calls)))
    return out


def _shared(one: TokenIds, other: TokenIds) -> int:
    """How many tokens both begin with."""
    at = diverged_at(one, other)
    return min(len(one), len(other)) if at is None else at


def _tool_json(tool: ToolSpec) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.spoken_name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = dict(tool.parameters or {"type": "object", "properties": {}})
    return {"type": "function", "function": function}


def _check_calls(items: Iterable[Item], parts: Iterable[Part]) -> None:
    """Every result must answer a call. Raises BadRequest."""
    said = (item for part in parts for item in part.items)
    calls = {item.call_id for item in (*items, *said) if isinstance(item, FunctionCall)}
    for item in items:
        if isinstance(item, FunctionCallOutput) and item.call_id not in calls:
            raise BadRequest(
                f"No tool call found for function call output with call_id {item.call_id}.",
                code="invalid_value",
                param="input",
            )


def _refusal(refused: Refused, *, limit_tokens: int, prompt: TokenIds) -> BrokerError:
    match refused.reason:
        case RefuseReason.CONTEXT:
            return ContextTooLong(limit_tokens=limit_tokens, prompt_tokens=len(prompt))
        case RefuseReason.BUSY:
            return Overloaded(
                "Too many turns are waiting; try again.", retry_after_s=_RETRY_AFTER_S
            )
        case RefuseReason.STOPPING:
            return Overloaded("The server is stopping.", retry_after_s=_RETRY_AFTER_S)
        case RefuseReason.PROMPT:
            return BadRequest(refused.message, code="invalid_prompt", param="input")
