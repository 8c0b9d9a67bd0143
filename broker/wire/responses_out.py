"""One turn's output as Responses events: a machine that is told what the model did and answers with events.

Laws (tests/broker/wire/grammar.py checks them on every stream, in tests of this file and end to end)
    Events are numbered from 0 by 1: response.created, response.in_progress, then items one after the other,
    then exactly one terminal event that carries the whole response. After it the machine refuses everything.
    A background response says response.created, response.queued and then the same from response.in_progress on; one
    that is cancelled has the status `cancelled`, for which no event is published: it ends in response.incomplete.
    An item is opened, filled and done before the next one opens; its place is its index in `output`.
    The concatenated deltas are the done text. How the text was cut into deltas changes nothing else.
    The terminal event's `output` is exactly the items that were done. A failure finishes no item falsely: an
    open one is left open and is not in `output`.
    On a named lane every event carries `stream_id`; on the default lane none does.
    Once the engine has begun, every `response.in_progress` says what the prompt took: `homeport:prompt`.

    [queue] start ──> [compacted] (thought* | text* | call_start (call_arguments* | call_input*) call_end)* ──> finish | fail
                        └── text opens a message, a thought an item of reasoning; another kind or the end closes it

White space that comes before any text of a message is held: followed by text it belongs to it, followed by a
call or by the end it is dropped, so that no blank message stands before a call. Sampled tokens still have it.

A reasoning item is in the output always, and its `added` and `done` with it. Its parts and deltas are events only if the
request has a `reasoning` object: the two published schemas name them differently, and who validates strictly by one
asks for none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from broker.wire.items import sealed
from broker.wire.requests import ToolKind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from broker.wire.requests import TurnRequest
    from engine.api import CachedTokens, Usage

Event = dict[str, Any]
Status = Literal["completed", "incomplete"]

TERMINAL_EVENTS = ("response.completed", "response.incomplete", "response.failed")


@dataclass(slots=True)
class _Message:
    id: str
    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class _Reasoning:
    id: str
    text: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Call:
    """Of a function, or with `custom` of a custom tool, whose arguments are its input."""

    id: str
    call_id: str
    name: str
    namespace: str | None
    custom: bool = False
    arguments: list[str] = field(default_factory=list)


class ResponseStream:
    """`new_id(prefix)` makes item ids; `created_at` is in seconds since the epoch.

    `ttl_s` is how long the prompt's KV will be protected: what was granted, whatever was asked.
    """

    def __init__(
        self,
        request: TurnRequest,
        *,
        response_id: str,
        model: str,
        created_at: float,
        new_id: Callable[[str], str],
        ttl_s: float = 0.0,
    ) -> None:
        self.response_id = response_id
        self._request = request
        self._model = model
        self._created_at = int(created_at)
        self._new_id = new_id
        self._number = 0
        self._open: _Message | _Reasoning | _Call | None = None
        self._blank = ""  # white space that may turn out to begin a message
        self._blank_logprobs: list[dict[str, Any]] = []  # its tokens'
        self._output: list[dict[str, Any]] = []
        # What the terminal event will say
        self._status = "queued"
        self._completed_at: int | None = None
        self._incomplete: dict[str, str] | None = None
        self._error: dict[str, str] | None = None
        self._usage: dict[str, Any] | None = None
        self._cache: dict[str, Any] = {"ttl_s": int(ttl_s)}
        self._stored: str | None = None
        self._stop_sequence: str | None = None
        self._prompt: dict[str, Any] | None = None
        self._said: dict[str, Any] = {}  # fields that only some responses have

    @property
    def output_items(self) -> list[dict[str, Any]]:
        """The items that are done, in order."""
        return list(self._output)

    @property
    def is_over(self) -> bool:
        """Whether the terminal event was made."""
        return self._status not in ("queued", "in_progress")

    def diverged(self, at: int, part: str) -> None:
        """Say from now on where the prompt left the one before it."""
        self._cache |= {"diverged_at": at, "part": part}

    def diagnosed(self, diagnostics: Mapping[str, Any]) -> None:
        """Say from now on whether the prompt's prefix was found in the cache, and if not, why."""
        self._said["prompt_cache_diagnostics"] = diagnostics

    def truncated(self, items: int, tokens: int) -> None:
        """Say from now on that the model did not see the first `items` items of the input."""
        self._said["homeport:truncated"] = {"items": items, "tokens": tokens}

    def resolved(self, request: TurnRequest) -> None:
        """The request as it turned out: with the tools that it inherits."""
        self._request = request

    def queue(self) -> list[Event]:
        """The response exists, and nothing is done for it yet."""
        assert self._number == 0, "queued twice"
        return [self._response_event("created"), self._response_event("queued")]

    def prompt_known(
        self, input_tokens: int, cached: CachedTokens, cuts: tuple[int, ...] = ()
    ) -> None:
        """Say from now on what the prompt's tokens are, and where in them the places are that the request asked for."""
        self._prompt = {
            "input_tokens": input_tokens,
            "cached_tokens": cached.total,
            "cached_by_tier": cached_by_tier(cached),
            "cuts": list(cuts),
        }

    def stopped_at(self, stop_sequence: str) -> None:
        """Which of the request's stop strings ended the output; the terminal event says it."""
        self._stop_sequence = stop_sequence

    def start(self) -> list[Event]:
        assert self._status == "queued", "started twice"
        self._status = "in_progress"
        created = [self._response_event("created")] if self._number == 0 else []
        return [*created, self._response_event("in_progress")]

    def keepalive(self) -> Event:
        """Something to say while nothing happens: in the published schema, and clients make nothing of it."""
        self._assert_running()
        return self._response_event("in_progress")

    def compacted(self, item: dict[str, Any], usage: Usage) -> list[Event]:
        """A compaction item, the first of its response; it comes whole. `usage` is what it cost."""
        self._assert_running()
        assert not self._output, "compacted too late"
        assert self._open is None, "compacted inside an item"
        opened = {**item, "encrypted_content": ""}
        events = [
            self._item_event("response.output_item.added", item=opened),
            self._item_event("response.output_item.done", item=item),
        ]
        self._output.append(item)
        self._said["homeport:compaction"] = usage_json(usage)
        return events

    def text(self, delta: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """More of a message; opens one if none is open. `logprobs` are those of the tokens it is made of."""
        self._assert_running()
        assert not isinstance(self._open, _Call), "text inside a call"
        if isinstance(self._open, _Message):
            return self._text_delta(delta, list(logprobs))
        delta = self._blank + delta
        tokens = [*self._blank_logprobs, *logprobs]
        if not delta or delta.isspace():
            self._blank, self._blank_logprobs = delta, tokens
            return []
        events = self._close("completed")
        return [*events, *self._open_message(), *self._text_delta(delta, tokens)]

    def thought(self, delta: str) -> list[Event]:
        """More of what the model thinks aloud; opens an item of reasoning if none is open."""
        self._assert_running()
        assert not isinstance(self._open, _Call), "a thought inside a call"
        if not delta:
            return []
        events: list[Event] = []
        if not isinstance(self._open, _Reasoning):
            events += self._close("completed")
            self._open = _Reasoning(self._new_id("rs"))
            added = {**self._reasoning_item(self._open, "in_progress"), "content": []}
            events.append(self._item_event("response.output_item.added", item=added))
            events += self._reasoning_events("response.content_part.added", part=_thought(""))
        self._blank, self._blank_logprobs = "", []  # said between two thoughts: no message's
        self._open.text.append(delta)
        return [*events, *self._reasoning_events("response.reasoning_text.delta", delta=delta)]

    def call_start(self, name: str, call_id: str) -> list[Event]:
        """Open a call of the tool that the model called `name`; an open message is done."""
        self._assert_running()
        assert not isinstance(self._open, _Call), "a call inside a call"
        events = self._close("completed")
        spec = self._request.tool(name)
        custom = spec is not None and spec.kind is ToolKind.CUSTOM
        self._open = _Call(
            id=self._new_id("ctc" if custom else "fc"),
            call_id=call_id,
            name=name if spec is None else spec.name,
            namespace=None if spec is None else spec.namespace,
            custom=custom,
        )
        item = _call_item(self._open, "in_progress")
        events.append(self._item_event("response.output_item.added", item=item))
        return events

    def call_arguments(self, delta: str) -> list[Event]:
        """More of the open call's argument string; of a custom tool's input."""
        self._assert_running()
        assert isinstance(self._open, _Call), "arguments outside a call"
        if not delta:
            return []
        self._open.arguments.append(delta)
        kind = "custom_tool_call_input" if self._open.custom else "function_call_arguments"
        return [self._item_event(f"response.{kind}.delta", item_id=self._open.id, delta=delta)]

    def call_end(self) -> list[Event]:
        self._assert_running()
        assert isinstance(self._open, _Call), "no call to end"
        return self._close("completed")

    def finish(
        self,
        status: Status,
        incomplete_reason: str | None,
        usage: Usage | None,
        completed_at: float,
        reasoning_tokens: int = 0,
    ) -> list[Event]:
        """Close what is open with `status`, then the terminal event, last in the list.

        `incomplete_reason` is `max_output_tokens`, `cancelled`, …; None if and only if completed.
        A call that the model left open by ending its turn is completed, its arguments as sampled.
        """
        self._assert_running()
        assert (incomplete_reason is None) == (status == "completed")
        events = self._close(status)
        self._status = status
        self._stored = "disk" if self._request.store else None
        self._usage = None if usage is None else usage_json(usage, reasoning_tokens)
        if incomplete_reason is None:
            self._completed_at = int(completed_at)
        elif self._request.background and incomplete_reason == "cancelled":
            self._status = "cancelled"
        else:
            self._incomplete = {"reason": incomplete_reason}
        return [*events, self._response_event(status)]

    def kept_in_memory(self, events: list[Event]) -> list[Event]:
        """`finish`'s events again, for a response that the disk refused: its id answers until a restart."""
        assert self.is_over
        self._stored = "memory"
        *before, terminal = events
        return [*before, {**terminal, "response": self.response()}]

    def fail(self, code: str, message: str) -> list[Event]:
        """The terminal event of a turn that broke, by our fault; also of one that was queued and never began."""
        assert self._number > 0, "nothing was said yet"
        assert not self.is_over, f"the response is {self._status}"
        self._status = "failed"
        self._error = {"code": code, "message": message}
        return [self._response_event("failed")]

    def response(self) -> dict[str, Any]:
        """The response object as it stands: the 31 published fields, what the client added, and our own."""
        request = self._request
        ours: dict[str, Any] = {"homeport:cache": dict(self._cache), **self._said}
        if self._stored is not None:
            ours["homeport:stored"] = self._stored
        if self._stop_sequence is not None:
            ours["homeport:stop_sequence"] = self._stop_sequence
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self._created_at,
            "completed_at": self._completed_at,
            "status": self._status,
            "incomplete_details": self._incomplete,
            "model": self._model,
            "previous_response_id": request.previous_response_id,
            "instructions": request.instructions,
            "output": self.output_items,
            "error": self._error,
            "tools": [],
            "tool_choice": "auto",
            "truncation": "auto" if request.truncate else "disabled",
            "parallel_tool_calls": request.parallel_tool_calls,
            "text": {"format": {"type": "text"}},
            "top_p": request.top_p,
            "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty,
            "top_logprobs": request.top_logprobs or 0,
            "temperature": request.temperature,
            "reasoning": None,
            "usage": self._usage,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None,
            "store": request.store,
            "background": request.background,
            "service_tier": "default",
            "metadata": dict(request.metadata),
            "safety_identifier": None,
            "prompt_cache_key": request.prompt_cache_key,
            **(
                {}
                if request.conversation is None
                else {"conversation": {"id": request.conversation}}
            ),
            **request.echo,
            **ours,
        }

    def _assert_running(self) -> None:
        assert self._status == "in_progress", f"the response is {self._status}"

    def _open_message(self) -> list[Event]:
        self._open = _Message(self._new_id("msg"))
        added = _message_item(self._open, "in_progress")
        added["content"] = []
        return [
            self._item_event("response.output_item.added", item=added),
            self._part_event("response.content_part.added", self._open, part=_part("")),
        ]

    def _text_delta(self, delta: str, logprobs: list[dict[str, Any]]) -> list[Event]:
        assert isinstance(self._open, _Message)
        if not delta:
            return []
        self._open.text.append(delta)
        self._open.logprobs += logprobs
        return [
            self._part_event(
                "response.output_text.delta", self._open, delta=delta, logprobs=logprobs
            )
        ]

    def _reasoning_item(self, reasoning: _Reasoning, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {
            "type": "reasoning",
            "id": reasoning.id,
            "summary": [],
            "content": [_thought("".join(reasoning.text))],
            "status": status,
        }
        if self._request.encrypted_reasoning:
            item["encrypted_content"] = sealed(reasoning.id)
        return item

    def _reasoning_events(self, kind: str, **fields: Any) -> list[Event]:
        """One, about the open item, if the client wants to see them."""
        assert isinstance(self._open, _Reasoning)
        if not self._request.reasoning_events:
            return []
        return [self._item_event(kind, item_id=self._open.id, content_index=0, **fields)]

    def _close(self, status: Status) -> list[Event]:
        """End the open item, if there is one, and forget held white space."""
        self._blank, self._blank_logprobs = "", []
        if self._open is None:
            return []
        events, item = self._ended(self._open, status)
        events.append(self._item_event("response.output_item.done", item=item))
        self._open = None
        self._output.append(item)
        return events

    def _ended(
        self, said: _Message | _Reasoning | _Call, status: Status
    ) -> tuple[list[Event], dict[str, Any]]:
        """The events that end the open item's parts, and the whole item."""
        match said:
            case _Message():
                item = _message_item(said, status)
                [part] = item["content"]
                return [
                    self._part_event(
                        "response.output_text.done",
                        said,
                        text=part["text"],
                        logprobs=part["logprobs"],
                    ),
                    self._part_event("response.content_part.done", said, part=part),
                ], item
            case _Reasoning():
                item = self._reasoning_item(said, status)
                [part] = item["content"]
                return [
                    *self._reasoning_events("response.reasoning_text.done", text=part["text"]),
                    *self._reasoning_events("response.content_part.done", part=part),
                ], item
            case _Call():
                return [self._call_done(said)], _call_item(said, status)

    def _call_done(self, call: _Call) -> Event:
        said = "".join(call.arguments)
        if call.custom:
            return self._item_event(
                "response.custom_tool_call_input.done", item_id=call.id, input=said
            )
        return self._item_event(
            "response.function_call_arguments.done",
            item_id=call.id,
            name=call.name,
            arguments=said,
        )

    def _response_event(self, name: str) -> Event:
        said: dict[str, Any] = {"response": self.response()}
        if name == "in_progress" and self._prompt is not None:
            said["homeport:prompt"] = self._prompt
        return self._event(f"response.{name}", **said)

    def _part_event(self, kind: str, message: _Message, **fields: Any) -> Event:
        return self._item_event(kind, item_id=message.id, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> Event:
        """About the open item, whose place is after those that are done."""
        return self._event(kind, output_index=len(self._output), **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._number, **fields}
        if self._request.stream_id is not None:
            event["stream_id"] = self._request.stream_id
        self._number += 1
        return event


def usage_json(usage: Usage, reasoning_tokens: int = 0) -> dict[str, Any]:
    """The engine's numbers in OpenAI's arithmetic: `input_tokens` includes the cached ones.

    Every prompt token that was computed was also written to the cache.
    """
    cached = usage.cached
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": cached.total,
            "cache_write_tokens": usage.computed_tokens,
        },
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "homeport:cached_by_tier": cached_by_tier(cached),
        "homeport:recomputed": dict(usage.recomputed),
    }


def cached_by_tier(cached: CachedTokens) -> dict[str, int]:
    return {
        "device": cached.device,
        "host": cached.host,
        "disk": cached.disk,
        "remote": cached.remote,
    }


def _message_item(message: _Message, status: str) -> dict[str, Any]:
    return {
        "type": "message",
        "id": message.id,
        "role": "assistant",
        "status": status,
        "content": [_part("".join(message.text), list(message.logprobs))],
    }


def _call_item(call: _Call, status: str) -> dict[str, Any]:
    item = {
        "type": "custom_tool_call" if call.custom else "function_call",
        "id": call.id,
        "call_id": call.call_id,
        "name": call.name,
        "input" if call.custom else "arguments": "".join(call.arguments),
        "status": status,
    }
    if call.namespace is not None:
        item["namespace"] = call.namespace
    return item


def _part(text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}
