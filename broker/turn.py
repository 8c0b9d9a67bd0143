"""The life of a turn: from a parsed request to one terminal event.

    resolve   the response it continues, or the history it repeats: parts whose sampled ids are known
    render    the exact prompt: the parent's ids and the encoded rest, or everything with the sampled ids spliced in
    submit    one `Submit`; the engine answers Began, Sampled…, Finished, or Refused
    say       `speech.py`: ids to text to thoughts and tool calls to protocol events; each is given to `emit`
    finish    the node enters the tables, the manifest is durable (`store: true`), then the last events are emitted

Laws
    What is wrong with a request is raised before the first event; after it, there is exactly one terminal event.
    What the prompt took is said as soon as the engine has begun, before anything else of the answer.
    A turn that fails takes its lane's own parent id with it (clients then replay); a fork's parent stays.
    The ids of the next turn's prefix are this prompt and every id sampled, stop id included.
    Instructions are each request's own. Tools are too, except that a continuation which declares none keeps those
    of its parent. Where either changed, the prompt is rendered anew, with all sampled ids that are known.
    A prompt that is compacted or truncated is so before the model sees it, and the response says so. A compacted
    history is the window from then on; a truncated one keeps what this prompt left out.
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
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import trio

from broker import compaction
from broker.breakdown import Breakdown, Origin, Stage
from broker.cuts import token_positions
from broker.diagnosis import NOT_FOUND, UNAVAILABLE, diagnose
from broker.divergence import Divergence, diverged_at, item_at
from broker.errors import BadRequest, BrokerError, ContextTooLong, Overloaded, TurnFailed
from broker.foresight import expect
from broker.forms import Markup, form_of
from broker.recall import Manifests, Recall, Recalled, continued
from broker.session import Node, Part, WarmUp, to_manifest
from broker.speech import Speech
from broker.truncation import Truncated, truncate
from broker.wire.item_json import item_json, item_prefix
from broker.wire.items import (
    Compaction,
    FunctionCall,
    FunctionCallOutput,
    ItemReference,
    Message,
    Reasoning,
    content_digest,
    ids_of,
    parse_items,
    spoken_name,
)
from broker.wire.responses_out import ResponseStream, usage_json
from broker.wire.retention import Retention
from broker.wire.window import Window, cut, seal, unseal
from engine.api import (
    Began,
    Finished,
    FinishReason,
    Refused,
    RefuseReason,
    Sampled,
    Sampling,
    Submit,
)
from engine.constraint import ConstraintRefused
from engine.text import ChatMessage, Conversation, ToolCall, UnrenderableError
from tiers.block import BlockKey, StoreError
from tiers.policy import SessionClass

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
    from contextlib import AbstractAsyncContextManager

    from broker.access import Tenant
    from broker.session import ConnectionScope, Sessions
    from broker.wire.items import Item
    from broker.wire.requests import Cut, ToolSpec, TurnRequest
    from engine.api import LeaseId, Output, RequestId, Usage
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
# What truncation leaves free for the answer to a request that does not say; never more than a quarter (guessed).
_ROOM_TOKENS = 1024
_ROOM_SHARE = 4
_COMPACT_AT = 0.8  # of the context, where a compaction rule does not say (guessed)


def _nothing() -> None: ...


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
        self, submit: Submit, ended: Callable[[], None] = ...
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Output]]: ...
    def cancel(self, request: RequestId) -> None: ...
    def token_bytes(self, token: int) -> bytes: ...
    def reclass(self, lease: LeaseId, to: SessionClass) -> None: ...
    def prefetch(self, salt: bytes, prompt: TokenIds) -> None: ...
    async def persist(self, manifest: Manifest) -> None: ...
    def persist_later(self, manifest: Manifest) -> None: ...
    async def demote(self, to: Tier, session: str | None, salt: bytes | None = None) -> int: ...
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

    __slots__ = ("_stop", "reason", "requested", "response_id", "steered")

    def __init__(self) -> None:
        self.response_id: str | None = None  # known before the first event
        self.reason = "cancelled"  # in the response's `incomplete_details`
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
    tools: tuple[
        ToolSpec, ...
    ]  # the request's, in the order and words of the turn before where those are the same
    after: TokenIds | None  # the parent's exact ids, if the prompt is those and a suffix
    compared: Node | None = None  # what the client's question about its cache is about
    compacted: bool = False  # by this turn

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.history + self.said.parts

    def conversation(self) -> Conversation:
        return _conversation(self.request, self.tools, self.parts)


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
    queued: ResponseStream | None = None,
    breakdown: Breakdown | None = None,
    computed: Callable[[], None] = _nothing,
) -> Outcome:
    """Serve one request. `emit` is awaited for each event in turn.

    `queued` is the response's stream, where its first events have been said already. `computed` is called when the answer
    is whole, however much of it is still to be said.
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
        queued,
        breakdown or _unobserved(),
        computed,
    )
    try:
        outcome = await turn.run()
    except BrokerError:
        connection.failed(request.stream_id, request.previous_response_id)
        raise
    if outcome.node is None:
        connection.failed(request.stream_id, request.previous_response_id)
    return outcome


def new_stream(
    request: TurnRequest,
    engine: Engine,
    clock: Clock,
    new_id: Callable[[str], str],
    retention: Retention,
) -> ResponseStream:
    """A response with an id, of which nothing was said yet."""
    return ResponseStream(
        request,
        response_id=new_id("resp"),
        model=request.model or engine.model_name,
        created_at=int(clock.now()),
        new_id=new_id,
        ttl_s=retention.grant(request.asked_ttl_s),
    )


async def count_prompt(
    request: TurnRequest,
    *,
    engine: Engine,
    sessions: Sessions,
    connection: ConnectionScope,
    tenant: Tenant,
    clock: Clock,
    new_id: Callable[[str], str],
) -> int:
    """The tokens of the prompt that this request would be answered with. Raises BrokerError as the turn would."""
    turn = _Turn(request, engine, sessions, connection, tenant, _nobody, clock, new_id)
    prompt, _ = turn.fitted(await turn.resolve())
    return len(prompt)


async def compact(
    request: TurnRequest,
    *,
    engine: Engine,
    sessions: Sessions,
    connection: ConnectionScope,
    tenant: Tenant,
    clock: Clock,
    new_id: Callable[[str], str],
) -> dict[str, Any]:
    """The `response.compaction` of what the request says: a window that another request begins with."""
    turn = _Turn(request, engine, sessions, connection, tenant, _nobody, clock, new_id)
    return await turn.compact()


def _unobserved() -> Breakdown:
    return Breakdown(Origin("", "", ""), trio.current_time())


async def _nobody(event: dict[str, Any]) -> None:
    raise AssertionError(f"nobody listens to {event['type']}")


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
    retention: Retention = _ANY_RETENTION
    cancellation: Cancellation = field(default_factory=Cancellation)
    queued: ResponseStream | None = None
    breakdown: Breakdown = field(default_factory=_unobserved)
    computed: Callable[[], None] = _nothing
    started: bool = False  # the first event is out: from now on, errors are events

    async def run(self) -> Outcome:
        self.breakdown.enter(Stage.RENDER, trio.current_time())
        resolved = await self.resolve()
        stream = self.queued or new_stream(
            self.request, self.engine, self.clock, self.new_id, self.retention
        )
        stream.resolved(resolved.request)
        self.breakdown.response_id = self.cancellation.response_id = stream.response_id
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

    async def resolve(self) -> Resolved:
        recall = Recall(self.engine, self.sessions, self.tenant)
        request, parent = self.request, None
        here = cut(await recall.dereferenced(request.items))
        if request.previous_response_id is not None:
            parent = await continued(recall, self.connection, request.previous_response_id)
            if not request.tools:
                request = replace(request, tools=parent.tools)
        latest = parent or self._followed() or await recall.latest(self._labels())
        self._expect(latest)
        history: tuple[Part, ...] = ()
        tools = _as_before(request.tools, latest)

        def prompt(parts: tuple[Part, ...]) -> TokenIds:
            return self._prompt(_conversation(request, tools, history + parts))

        last = parent
        if here.left is None and parent is not None:
            history = parent.history
        else:
            there = cut(request.context)
            past = here.left if here.left is not None else (*(there.left or ()), *there.items)
            recalled = await recall.parts(past, prompt=prompt)
            history, last = recalled.parts, recalled.last or parent
        said = await recall.parts(here.items, prompt=prompt)
        said = replace(said, starts=tuple(at + here.at for at in said.starts))
        self._expect(said.last)
        _check_calls(request.items, history + said.parts)
        unchanged = (
            parent is not None
            and not here.covers
            and parent.sampled != ()
            and not parent.truncated
            and request.instructions == parent.instructions
            and same_tools(request.tools, parent.tools)
            and all(part.sampled is None for part in said.parts)
        )
        after = parent.tokens if parent is not None and unchanged else None
        before = said.last or last
        return Resolved(
            request,
            history,
            said,
            before,
            latest,
            _as_before(request.tools, before or latest),
            after,
            compared=await self._compared(recall, before or latest),
        )

    async def _compared(self, recall: Recall, before: Node | None) -> Node | None:
        query = self.request.cache_query
        if query is None or query.compared_to is None:
            return before
        known = self.connection.find(self.tenant.name, query.compared_to)
        return known or await recall.response(query.compared_to)

    def _followed(self) -> Node | None:
        named = self.request.follows
        return None if named is None else self.sessions.known(self.tenant.name, named)

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

    def fitted(self, resolved: Resolved) -> tuple[TokenIds, Truncated | None]:
        """The prompt, without its oldest turns if the client allows that and it must be."""
        request = resolved.request
        prompt = self._prompt(resolved.conversation(), resolved.after)
        most = self.engine.max_context
        asked = request.max_output_tokens
        room = min(_ROOM_TOKENS if asked is None else asked, most // _ROOM_SHARE)
        if not request.truncate or len(prompt) <= most - room:
            return prompt, None

        def ids(parts: tuple[Part, ...]) -> TokenIds:
            return self._prompt(_conversation(request, resolved.tools, parts))

        left = truncate(
            resolved.parts, limit_tokens=most - room, length=lambda parts: len(ids(parts))
        )
        return (
            (ids(left.parts), left) if left is not None and left.dropped_items else (prompt, None)
        )

    # submit, say, finish

    async def _generate(self, resolved: Resolved, stream: ResponseStream) -> Outcome:
        resolved = await self._compacted(resolved, stream)
        request, before = resolved.request, resolved.before
        prompt, truncated = self.fitted(resolved)
        if truncated is not None:
            stream.truncated(truncated.dropped_items, truncated.dropped_tokens)
        room = self.engine.max_context - len(prompt)
        if room < 1:
            raise ContextTooLong(limit_tokens=self.engine.max_context, prompt_tokens=len(prompt))
        divergence = self._divergence(resolved, prompt)
        if divergence is not None:
            stream.diverged(divergence.at, divergence.part)
            self.breakdown.diverged = (divergence.at, divergence.part)
        for warm in self._being_computed(prompt):
            self.breakdown.enter(Stage.QUEUE, trio.current_time())
            await self._patiently(stream, partial(self._landed, warm))
        self.breakdown.enter(Stage.RENDER, trio.current_time())
        most = room if request.max_output_tokens is None else request.max_output_tokens
        text = self.engine.text
        thinking = text.thinks_after(prompt)
        markup = Markup(text.tool_syntax, text.thoughts, {t: i for i, t in text.markup.items()})
        sampling = Sampling(
            max_tokens=min(most, room),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop_ids=text.stop_ids,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            constraint=form_of(request, markup, thinking=thinking),
            top_logprobs=request.top_logprobs,
        )
        supersedes = None if before is None else before.lease
        submit = self._submit(resolved, stream.response_id, prompt, sampling, supersedes)
        speech = Speech(
            request,
            stream,
            text,
            new_id=self.new_id,
            token_bytes=self.engine.token_bytes,
            thinking=thinking,
        )
        cut = False
        async with self._generating(submit) as outputs:
            self.breakdown.submitted(trio.current_time())
            self.cancellation.stops(lambda: self.engine.cancel(submit.request))
            cuts = self._cuts(resolved, prompt)  # while the engine is at work
            output = await self._patiently(stream, outputs.receive)
            if isinstance(output, Refused):
                raise _refusal(output, limit_tokens=self.engine.max_context, prompt=prompt)
            if before is not None:
                before.lease = None  # the engine ends it with this turn; a fork from here must not end it again
            assert isinstance(output, Began), "a request begins before anything else"
            self.breakdown.enter(Stage.PREFILL, trio.current_time())
            stream.prompt_known(len(prompt), output.cached, cuts)
            await (self.emit(stream.keepalive()) if self.started else self._start(stream))
            while not isinstance(output, Finished):
                assert not isinstance(output, Refused), "refused after it began"
                if isinstance(output, Sampled) and not cut:
                    self.breakdown.sampled(len(output.tokens), trio.current_time())
                    await self._say(speech.feed(output))
                    if speech.stopped:
                        self.engine.cancel(submit.request)
                    elif self.cancellation.steered and speech.can_be_cut:
                        cut = True
                        self.engine.cancel(submit.request)
                output = await self._patiently(stream, outputs.receive)
        self.breakdown.ran(output.usage, trio.current_time())
        reason = None if speech.stopped else _INCOMPLETE[output.reason]
        if cut:  # whatever else was sampled until the engine knew of it
            reason = "cancelled" if self.cancellation.requested else "steered"
        if reason == "cancelled":
            reason = self.cancellation.reason
        return await self._finish(resolved, stream, speech, prompt, output, supersedes, reason)

    @asynccontextmanager
    async def _generating(self, submit: Submit) -> AsyncIterator[trio.MemoryReceiveChannel[Output]]:
        """What the engine answers. Raises BadRequest for a schema or grammar that cannot be enforced."""
        async with AsyncExitStack() as stack:
            try:
                outputs = await stack.enter_async_context(
                    self.engine.generate(submit, self.computed)
                )
            except ConstraintRefused as refused:
                raise _unenforceable(refused) from refused
            yield outputs

    async def _finish(
        self,
        resolved: Resolved,
        stream: ResponseStream,
        speech: Speech,
        prompt: TokenIds,
        finished: Finished,
        superseded: LeaseId | None,
        reason: str | None,
    ) -> Outcome:
        events = speech.finish()
        self._diagnose(resolved, stream, prompt, finished.usage)
        if finished.reason is FinishReason.FAILED:
            if finished.lease is not None:
                self.engine.reclass(finished.lease, SessionClass.CLOSED)
            await self._say([*events, *stream.fail("server_error", "The turn failed; try again.")])
            return Outcome(stream.response(), None)
        if speech.stop_sequence is not None:
            stream.stopped_at(speech.stop_sequence)
        events += stream.finish(
            "completed" if reason is None else "incomplete",
            reason,
            usage=finished.usage,
            completed_at=int(self.clock.now()),
            reasoning_tokens=speech.reasoning_tokens,
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

    def _diagnose(
        self, resolved: Resolved, stream: ResponseStream, prompt: TokenIds, usage: Usage | None
    ) -> None:
        """Answer the client's question about its cache, if it asked one."""
        query, compared = self.request.cache_query, resolved.compared
        if query is None:
            return
        if compared is None:
            stream.diagnosed(UNAVAILABLE if query.compared_to is None else NOT_FOUND)
        elif usage is None:
            stream.diagnosed(UNAVAILABLE)
        else:
            found = diagnose(
                compared,
                prompt=prompt,
                cached_tokens=usage.cached.total,
                request=resolved.request,
                parts=resolved.parts,
            )
            stream.diagnosed(found)

    # compaction

    async def _compacted(self, resolved: Resolved, stream: ResponseStream) -> Resolved:
        """The request with a window in the place of its past, where its rule asks for that."""
        rule = resolved.request.compaction
        if rule is None:
            return resolved
        most = self.engine.max_context
        threshold = min(rule.threshold_tokens or int(most * _COMPACT_AT), most)
        if len(self._prompt(resolved.conversation(), resolved.after)) < threshold:
            return resolved
        budget = threshold // compaction.SHARE
        plan = compaction.plan(resolved.parts, budget_tokens=budget, count=self._length)
        if plan is None:
            return resolved
        made = await self._summary(resolved, plan.covered, budget, stream)
        if made is None:
            return resolved
        summary, usage, _ = made
        item_id = self.new_id("cmp")
        rest_items = tuple(item for part in plan.rest for item in part.items)
        sealed = seal(Window(summary, plan.kept, rest_items))
        await self._start(stream)
        item = {"type": "compaction", "id": item_id, "encrypted_content": sealed}
        await self._say(stream.compacted(item, usage))
        window = Part((*plan.kept, Compaction(item_id, sealed)))
        rest = Recalled(plan.rest, (0,) * len(plan.rest), None)
        return replace(resolved, history=(window,), said=rest, after=None, compacted=True)

    async def compact(self) -> dict[str, Any]:
        resolved = await self.resolve()
        budget = self.engine.max_context // compaction.SHARE
        made = await self._summary(resolved, resolved.parts, budget, None)
        if made is None:
            raise ContextTooLong(
                limit_tokens=self.engine.max_context,
                prompt_tokens=len(self._prompt(resolved.conversation())),
            )
        summary, usage, dropped = made
        kept = compaction.kept(resolved.parts, budget, self._length)
        output = [item_json(item, self.new_id(item_prefix(item))) for item in kept]
        sealed = seal(Window(summary))
        output.append(item_json(Compaction(self.new_id("cmp"), sealed), ""))
        return {
            "id": self.new_id("resp"),
            "object": "response.compaction",
            "created_at": int(self.clock.now()),
            "output": output,
            "usage": usage_json(usage),
            "homeport:truncated": {
                "items": dropped.dropped_items,
                "tokens": dropped.dropped_tokens,
            },
        }

    async def _summary(
        self,
        resolved: Resolved,
        covered: tuple[Part, ...],
        budget: int,
        stream: ResponseStream | None,
    ) -> tuple[str, Usage, Truncated] | None:
        """What the model makes of some parts, what that took, and how much of them it could not read.

        None if it could read nothing, or was cancelled. Raises BrokerError.
        """
        request, most = resolved.request, self.engine.max_context

        def ids(parts: tuple[Part, ...]) -> TokenIds:
            return self._prompt(_conversation(request, resolved.tools, parts))

        room = compaction.summary_tokens(len(ids(covered)), min(budget, most // _ROOM_SHARE))
        asked = compaction.asking(covered)
        left = truncate(asked, limit_tokens=most - room, length=lambda parts: len(ids(parts)))
        if left is None or compaction.is_bare(left.parts):
            return None
        prompt = ids(left.parts)
        sampling = Sampling(max_tokens=room, temperature=0.0, stop_ids=self.engine.text.stop_ids)
        submit = self._submit(resolved, self.new_id("cmp"), prompt, sampling, None)
        sampled: list[int] = []
        async with self.engine.generate(submit) as outputs:
            self.breakdown.submitted(trio.current_time())
            if stream is not None:
                self.cancellation.stops(partial(self.engine.cancel, submit.request))
            while True:
                wait = outputs.receive
                output = await (wait() if stream is None else self._patiently(stream, wait))
                match output:
                    case Refused():
                        raise _refusal(output, limit_tokens=most, prompt=prompt)
                    case Sampled():
                        sampled += output.tokens
                    case Finished():
                        break
                    case _:
                        pass
        self.breakdown.ran(output.usage, trio.current_time())
        if output.lease is not None:  # nobody continues it
            self.engine.reclass(output.lease, SessionClass.CLOSED)
        self.breakdown.enter(Stage.RENDER, trio.current_time())
        if output.reason is FinishReason.FAILED or output.usage is None:
            raise TurnFailed("The conversation could not be summarised; try again.")
        if output.reason is FinishReason.CANCELLED:
            return None
        words = [token for token in sampled if token not in self.engine.text.stop_ids]
        return self.engine.text.decode(words).strip(), output.usage, left

    def _length(self, text: str) -> int:
        return len(self.engine.text.encode(text))

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
        self.breakdown.enter(Stage.STORE, trio.current_time())
        durable = await self._persist(node)
        self.breakdown.enter(Stage.SEND, trio.current_time())
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
        self._diagnose(resolved, stream, prefix, None)
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
            self.breakdown.enter(Stage.QUEUE, trio.current_time())
            for earlier in self._being_computed(node.tokens, before=node.response_id):
                await earlier.landed.wait()
            supersedes = None if before is None else before.lease
            if before is not None:
                before.lease = None
            submit = self._submit(
                resolved, node.response_id, node.tokens, Sampling(max_tokens=0), supersedes
            )
            async with self.engine.generate(submit) as outputs:
                self.breakdown.submitted(trio.current_time())
                async for output in outputs:
                    if isinstance(output, Finished):
                        self.breakdown.ran(output.usage, trio.current_time())
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
        self.breakdown.session = session = self._session(resolved, response_id)
        return Submit(
            request=self.engine.new_request(),
            session=session,
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
        if resolved.compacted:
            return Divergence(at, "context_management")
        if before.history_known and request.instructions != before.instructions:
            return Divergence(at, "instructions")
        if before.history_known and not same_tools(request.tools, before.tools):
            return Divergence(at, "tools")

        def length(parts: tuple[Part, ...]) -> int:
            return len(self.engine.text.prefix(_conversation(request, resolved.tools, parts)))

        try:
            return Divergence(at, item_at(at, resolved.said, resolved.history, length))
        except UnrenderableError:  # a template that takes whole conversations only
            return Divergence(at, "input")

    def _cuts(self, resolved: Resolved, prompt: TokenIds) -> tuple[int, ...]:
        """The token positions of the request's cuts in its prompt."""
        request = resolved.request

        def prefix(cut: Cut, parts: tuple[Part, ...]) -> TokenIds:
            instructions = (request.instructions or "")[: cut.instructions] or None
            cut_short = replace(request, instructions=instructions)
            tools = resolved.tools[: cut.tools]
            whole = _conversation(cut_short, tools, resolved.history + parts)
            return self.engine.text.prefix(whole)

        return token_positions(request, resolved.said, prompt, prefix)

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
        items = parse_items(response["output"], at="output")
        output = tuple(item for item in items if not isinstance(item, Compaction))
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
            tools=resolved.tools,
            response=response if self.request.store else None,
            item_ids=ids_of(items),
            content=content_digest(output) if output else b"",
            keys=() if finished is None else tuple(map(BlockKey, finished.keys)),
            labels=tuple(dict.fromkeys((session, *self._labels()))),
            lease=None if finished is None else finished.lease,
            truncated="homeport:truncated" in response,
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


def conversation(
    instructions: str | None,
    tools: tuple[ToolSpec, ...],
    parts: Iterable[Part],
    *,
    thinking: bool | None = None,
) -> Conversation:
    """What the chat template is given for these parts. `thinking`: whether the model is asked to, or not to."""
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
    return Conversation(tuple(messages), tuple(map(_tool_json, tools)), thinking)


def _conversation(
    request: TurnRequest, tools: tuple[ToolSpec, ...], parts: Iterable[Part]
) -> Conversation:
    effort = request.reasoning_effort
    thinking = None if effort is None else effort != "none"
    return conversation(request.instructions, tools, parts, thinking=thinking)


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
            case Compaction():
                out.append(ChatMessage("user", compaction.HEADING + unseal(item).summary))
            case Reasoning():
                pass  # thoughts whose ids are not known are not thought again
            case ItemReference():
                raise AssertionError("references are resolved before")
    if spoken or calls:
        out.append(ChatMessage("assistant", "".join(spoken), tuple(calls)))
    return out


def same_tools(some: tuple[ToolSpec, ...], others: tuple[ToolSpec, ...]) -> bool:
    """Whether a model sees the same tools, however they are sorted, and in whichever API they were declared."""
    if some == others:
        return True

    def seen(tools: tuple[ToolSpec, ...]) -> dict[str, dict[str, Any]]:
        return {tool.spoken_name: _tool_json(tool) for tool in tools}

    return len(some) == len(others) and seen(some) == seen(others)


def _as_before(tools: tuple[ToolSpec, ...], before: Node | None) -> tuple[ToolSpec, ...]:
    """The tools as the turn before had them, if they are the same: in another order they would be another prompt."""
    return before.tools if before is not None and same_tools(tools, before.tools) else tools


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


def _unenforceable(refused: ConstraintRefused) -> BadRequest:
    at = refused.at or "text.format"
    if at.endswith("definition"):
        return BadRequest(
            f"Invalid grammar for '{at}': {refused}.", code="invalid_grammar", param=at
        )
    code = "invalid_function_parameters" if at.startswith("tools") else "invalid_json_schema"
    return BadRequest(f"Invalid schema for '{at}': {refused}.", code=code, param=at)


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
