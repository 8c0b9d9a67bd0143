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

    [queue] start ──> [compacted] (text* | call_start call_arguments* call_end)* ──> finish | fail
                                    └── text opens a message; a call or the end closes it

White space that comes before any text of a message is held: followed by text it belongs to it, followed by a
call or by the end it is dropped, so that no blank message stands before a call. Sampled tokens still have it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from broker.wire.requests import TurnRequest
    from engine.api import Usage

Event = dict[str, Any]
Status = Literal["completed", "incomplete"]

TERMINAL_EVENTS = ("response.completed", "response.incomplete", "response.failed")


@dataclass(slots=True)
class _Message:
    id: str
    text: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Call:
    id: str
    call_id: str
    name: str
    namespace: str | None
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
        self._open: _Message | _Call | None = None
        self._blank = ""  # white space that may turn out to begin a message
        self._output: list[dict[str, Any]] = []
        # What the terminal event will say
        self._status = "queued"
        self._completed_at: int | None = None
        self._incomplete: dict[str, str] | None = None
        self._error: dict[str, str] | None = None
        self._usage: dict[str, Any] | None = None
        self._cache: dict[str, Any] = {"ttl_s": int(ttl_s)}
        self._stored: str | None = None
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

    def text(self, delta: str) -> list[Event]:
        """More of a message; opens one if none is open."""
        self._assert_running()
        assert not isinstance(self._open, _Call), "text inside a call"
        if self._open is None:
            delta = self._blank + delta
            if not delta or delta.isspace():
                self._blank = delta
                return []
            self._blank = ""
            return [*self._open_message(), *self._text_delta(delta)]
        return self._text_delta(delta)

    def call_start(self, name: str, call_id: str) -> list[Event]:
        """Open a call of the tool that the model called `name`; an open message is done."""
        self._assert_running()
        assert not isinstance(self._open, _Call), "a call inside a call"
        events = self._close("completed")
        spec = self._request.tool(name)
        self._open = _Call(
            id=self._new_id("fc"),
            call_id=call_id,
            name=name if spec is None else spec.name,
            namespace=None if spec is None else spec.namespace,
        )
        item = _call_item(self._open, "in_progress")
        events.append(self._item_event("response.output_item.added", item=item))
        return events

    def call_arguments(self, delta: str) -> list[Event]:
        """More of the open call's argument string."""
        self._assert_running()
        assert isinstance(self._open, _Call), "arguments outside a call"
        if not delta:
            return []
        self._open.arguments.append(delta)
        return [
            self._item_event(
                "response.function_call_arguments.delta", item_id=self._open.id, delta=delta
            )
        ]

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
        self._usage = None if usage is None else usage_json(usage)
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
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "top_logprobs": 0,
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

    def _text_delta(self, delta: str) -> list[Event]:
        assert isinstance(self._open, _Message)
        if not delta:
            return []
        self._open.text.append(delta)
        return [
            self._part_event("response.output_text.delta", self._open, delta=delta, logprobs=[])
        ]

    def _close(self, status: Status) -> list[Event]:
        """End the open item, if there is one, and forget held white space."""
        self._blank = ""
        if self._open is None:
            return []
        if isinstance(self._open, _Message):
            item = _message_item(self._open, status)
            [part] = item["content"]
            events = [
                self._part_event(
                    "response.output_text.done", self._open, text=part["text"], logprobs=[]
                ),
                self._part_event("response.content_part.done", self._open, part=part),
            ]
        else:
            item = _call_item(self._open, status)
            events = [
                self._item_event(
                    "response.function_call_arguments.done",
                    item_id=self._open.id,
                    name=self._open.name,
                    arguments=item["arguments"],
                )
            ]
        events.append(self._item_event("response.output_item.done", item=item))
        self._open = None
        self._output.append(item)
        return events

    def _response_event(self, name: str) -> Event:
        return self._event(f"response.{name}", response=self.response())

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


def usage_json(usage: Usage) -> dict[str, Any]:
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
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "homeport:cached_by_tier": {
            "device": cached.device,
            "host": cached.host,
            "disk": cached.disk,
            "remote": cached.remote,
        },
        "homeport:recomputed": dict(usage.recomputed),
    }


def _message_item(message: _Message, status: str) -> dict[str, Any]:
    return {
        "type": "message",
        "id": message.id,
        "role": "assistant",
        "status": status,
        "content": [_part("".join(message.text))],
    }


def _call_item(call: _Call, status: str) -> dict[str, Any]:
    item = {
        "type": "function_call",
        "id": call.id,
        "call_id": call.call_id,
        "name": call.name,
        "arguments": "".join(call.arguments),
        "status": status,
    }
    if call.namespace is not None:
        item["namespace"] = call.namespace
    return item


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
