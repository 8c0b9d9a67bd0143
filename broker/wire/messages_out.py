"""A turn's Responses events as Anthropic Messages events, and its response as one Message. A pure machine.

    message_start ──> (content_block_start content_block_delta* content_block_stop)* ──> message_delta message_stop
          ping anywhere; `error` ends a stream at any place

Laws (tests/broker/wire/messages_grammar.py checks them on every stream)
    `message_start` carries the prompt's usage as the engine measured it, so it waits until that is known; who must be
    told before that we are there gets a `ping`.
    Blocks are opened, filled and stopped one after the other, and numbered from 0 by 1. However the deltas are cut, the
    accumulated stream is the whole Message.
    A block of thoughts is shown in words, or sealed (its signature alone), or left out, as the client asked; what it
    sends back as signature is what the turn gave as `encrypted_content`.
    A failure says `error` and nothing after it: no `message_stop`, and the open block stays open.
    Input usage is what `broker/wire/cache_control.py` made of the prompt; output usage is the turn's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.errors import BadRequest, anthropic_error_type
from broker.wire.json_in import parse_json
from broker.wire.messages_ids import message_id, tool_use_id

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from broker.wire.cache_control import InputUsage
    from broker.wire.messages_in import Thinking
    from broker.wire.responses_out import Event

PING: Event = {"type": "ping"}
RAW_ARGUMENTS = "homeport:arguments"  # holds a call's argument string that is no JSON object


class MessageStream:
    """Feed it a turn's events in order; it answers with those to send.

    `account` is asked once, with the engine's numbers of the prompt, and says how they are counted. `diagnose` is asked
    with the response's `homeport:cache` where the client wants to know why its cached prefix was not reused.
    """

    def __init__(
        self,
        *,
        thinking: Thinking,
        account: Callable[[Mapping[str, Any]], InputUsage],
        diagnose: Callable[[Mapping[str, Any]], dict[str, Any] | None] | None = None,
        request_id: str,
    ) -> None:
        self._thinking = thinking
        self._account = account
        self._diagnose = diagnose
        self._request_id = request_id
        self._input: InputUsage | None = None
        self._cached_by_tier: dict[str, int] = {}
        self._started = False
        self._blocks = 0  # that are stopped
        self._open = False

    def feed(self, event: Event) -> list[Event]:
        match event["type"]:
            case "response.in_progress":
                return self._progress(event)
            case "response.output_item.added":
                return self._item_added(event["item"])
            case "response.content_part.added" if event["part"]["type"] == "output_text":
                return [self._start({"type": "text", "text": "", "citations": None})]
            case "response.output_text.delta":
                return [self._delta({"type": "text_delta", "text": event["delta"]})]
            case "response.content_part.done" if event["part"]["type"] == "output_text":
                return [self._stop()]
            case "response.function_call_arguments.delta":
                delta = {"type": "input_json_delta", "partial_json": event["delta"]}
                return [self._delta(delta)]
            case "response.reasoning_text.delta" if self._thinking == "shown":
                return [self._delta({"type": "thinking_delta", "thinking": event["delta"]})]
            case "response.output_item.done":
                return self._item_done(event["item"])
            case "response.completed" | "response.incomplete":
                return self._end(event["response"])
            case "response.failed":
                return [self._error(event["response"]["error"])]
            case _:
                return []  # said already, or nothing to say in this API

    def message(self, response: Mapping[str, Any]) -> dict[str, Any]:
        """The whole answer, for the response of the terminal event."""
        blocks = [block for item in response["output"] for block in self._content(item)]
        return {
            **self._head(response),
            "content": blocks,
            **_stopped(response),
            "usage": {**self._input_usage(), **_output_usage(response["usage"])},
        }

    def _progress(self, event: Event) -> list[Event]:
        prompt = event.get("homeport:prompt")
        if self._started or prompt is None:
            return [PING]
        self._started = True
        self._input = self._account(prompt)
        self._cached_by_tier = prompt["cached_by_tier"]
        message = {
            **self._head(event["response"]),
            "content": [],
            **_NOT_STOPPED,
            "usage": {**self._input_usage(), **_output_usage(None)},
        }
        return [{"type": "message_start", "message": message}]

    def _item_added(self, item: Mapping[str, Any]) -> list[Event]:
        match item["type"]:
            case "function_call":
                return [self._start(_tool_use(item, {}))]
            case "reasoning" if self._thinking != "hidden":
                return [self._start({"type": "thinking", "thinking": "", "signature": ""})]
            case _:
                return []  # a message: its parts are blocks

    def _item_done(self, item: Mapping[str, Any]) -> list[Event]:
        match item["type"]:
            case "function_call":
                return [self._stop()]
            case "reasoning" if self._thinking != "hidden":
                return [
                    self._delta({"type": "signature_delta", "signature": _signature(item)}),
                    self._stop(),
                ]
            case _:
                return []

    def _end(self, response: Mapping[str, Any]) -> list[Event]:
        assert self._started, "a turn ends before its prompt was known"
        usage = {**self._input_usage(), **_output_usage(response["usage"])}
        for settled in ("cache_creation", "inference_geo", "service_tier"):
            del usage[settled]  # message_start said it, and a delta has no place for it
        delta = {"container": None, **_stopped(response)}
        return [
            {"type": "message_delta", "delta": delta, "usage": usage},
            {"type": "message_stop"},
        ]

    def _error(self, error: Mapping[str, Any]) -> Event:
        kind = anthropic_error_type(error["code"], 500)
        return {
            "type": "error",
            "error": {"type": kind, "message": error["message"]},
            "request_id": self._request_id,
        }

    # blocks

    def _start(self, block: dict[str, Any]) -> Event:
        assert not self._open, "a block inside a block"
        self._open = True
        return {"type": "content_block_start", "index": self._blocks, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Event:
        assert self._open, "a delta outside a block"
        return {"type": "content_block_delta", "index": self._blocks, "delta": delta}

    def _stop(self) -> Event:
        assert self._open, "no block to stop"
        self._open = False
        self._blocks += 1
        return {"type": "content_block_stop", "index": self._blocks - 1}

    def _content(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A done item as blocks."""
        match item["type"]:
            case "message":
                return [
                    {"type": "text", "text": part["text"], "citations": None}
                    for part in item["content"]
                    if part["type"] == "output_text"
                ]
            case "function_call":
                return [_tool_use(item, arguments_object(item["arguments"]))]
            case "reasoning" if self._thinking != "hidden":
                words = _thought(item) if self._thinking == "shown" else ""
                return [{"type": "thinking", "thinking": words, "signature": _signature(item)}]
            case _:
                return []

    # the parts of a Message

    def _head(self, response: Mapping[str, Any]) -> dict[str, Any]:
        head = {
            "id": message_id(response["id"]),
            "type": "message",
            "role": "assistant",
            "model": response["model"],
            "container": None,
        }
        if self._diagnose is not None:
            head["diagnostics"] = self._diagnose(response["homeport:cache"])
        return head

    def _input_usage(self) -> dict[str, Any]:
        assert self._input is not None, "the prompt is not known yet"
        return {
            "input_tokens": self._input.fresh,
            "cache_creation_input_tokens": self._input.written,
            "cache_read_input_tokens": self._input.read,
            "cache_creation": {
                "ephemeral_5m_input_tokens": self._input.written_5m,
                "ephemeral_1h_input_tokens": self._input.written_1h,
            },
            "inference_geo": None,
            "service_tier": "standard",
            "homeport:cached_by_tier": self._cached_by_tier,
        }


def arguments_object(arguments: str) -> dict[str, Any]:
    """A call's arguments, which must be an object here. What a model said instead of one is kept, under our own key."""
    if not arguments:
        return {}
    try:
        value = parse_json(arguments)
    except BadRequest:
        value = None
    return value if isinstance(value, dict) else {RAW_ARGUMENTS: arguments}


def diagnostics(before_tokens: int | None, cache: Mapping[str, Any]) -> dict[str, Any] | None:
    """Why a prompt could not go on from the message that it follows; None if it did.

    `before_tokens` are that message's prompt's, None for one that nobody knows; `cache` is a response's
    `homeport:cache`, which says where and in what the two differ.
    """
    if before_tokens is None:
        return {"cache_miss_reason": {"type": "previous_message_not_found"}}
    if "diverged_at" not in cache:
        return None
    changed = {"tools": "tools_changed", "instructions": "system_changed"}
    missed = max(0, before_tokens - cache["diverged_at"])
    kind = changed.get(cache["part"], "messages_changed")
    return {"cache_miss_reason": {"type": kind, "cache_missed_input_tokens": missed}}


_NOT_STOPPED = {"stop_reason": None, "stop_sequence": None, "stop_details": None}


def _stopped(response: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "stop_reason": _stop_reason(response),
        "stop_sequence": response.get("homeport:stop_sequence"),
        "stop_details": None,
    }


def _stop_reason(response: Mapping[str, Any]) -> str:
    """A stop string wins over a call: one that it cut short must not be run."""
    if response["status"] == "completed":
        if response.get("homeport:stop_sequence") is not None:
            return "stop_sequence"
        called = any(item["type"] == "function_call" for item in response["output"])
        return "tool_use" if called else "end_turn"
    match response["incomplete_details"]["reason"]:
        case "max_output_tokens":
            asked = response["max_output_tokens"]
            short = asked is not None and response["usage"]["output_tokens"] < asked
            return "model_context_window_exceeded" if short else "max_tokens"
        case "content_filter":
            return "refusal"
        case _:
            return "pause_turn"  # ended from outside: it can be gone on with


def _output_usage(usage: Mapping[str, Any] | None) -> dict[str, Any]:
    """Before anything was said, and in the end."""
    out: dict[str, Any] = {
        "output_tokens": 0,
        "output_tokens_details": {"thinking_tokens": 0},
        "server_tool_use": None,
    }
    if usage is not None:
        details = usage["output_tokens_details"]
        out["output_tokens"] = usage["output_tokens"]
        out["output_tokens_details"] = {"thinking_tokens": details["reasoning_tokens"]}
        out["homeport:recomputed"] = usage["homeport:recomputed"]
    return out


def _tool_use(item: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "tool_use",
        "id": tool_use_id(item["call_id"]),
        "name": item["name"],
        "input": given,
        "caller": {"type": "direct"},
    }


def _thought(item: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in item.get("content") or ())


def _signature(item: Mapping[str, Any]) -> str:
    return item.get("encrypted_content") or ""
