"""One turn's answer in the words of Chat Completions: Responses events in, `chat.completion.chunk`s out.

Laws (tests/broker/wire/chat_grammar.py checks them on every stream, in tests of this file and end to end)
    role ──> (content | reasoning_content | tool_calls | nothing)* ──> finish_reason ──> usage? ──> [DONE]
    A stream's chunks, put together as clients do, are the message of the whole completion.
    A call's first fragment has its index, id, type and name, the following ones its index and more of its arguments.
    A turn that breaks says one error and nothing after it, `[DONE]` neither: a stream that is done ended well.
    The counts are the turn's own. A usage chunk comes if it was asked for, and then every other chunk has `usage: null`.

    finish_reason   "length"      the tokens that were allowed were used up, in a call too
                    "tool_calls"  there are calls to answer, also when the client forced them
                    "stop"        everything else; a turn that was cancelled ended where its client wanted it to end

A chat message is one text and a list of calls: texts of several messages are joined, and where a call stood between
them is not said. Thoughts are `reasoning_content`, as open models' servers have it.

While nothing happens, a chunk with an empty delta is sent. An SSE comment would be lighter, but there are chat clients
that parse it as JSON, and idle timers that count chunks only. Every client has to read empty deltas: the last is one.

A completion's id is its response's id with another prefix, so that one leads to the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.errors import BrokerError, TurnFailed, error_object
from broker.wire.items import spoken_name
from broker.wire.sse import DONE, data_frame

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from broker.wire.responses_out import Event

Chunk = dict[str, Any]

_COMPLETION, _RESPONSE = "chatcmpl-", "resp_"


class ChatAnswer:
    """Give it a turn's events in order, or its last response."""

    def __init__(self, *, streams: bool, include_usage: bool) -> None:
        self.streams = streams
        self._include_usage = include_usage
        self._head: dict[str, Any] = {}  # what every chunk says
        self._role_said = False
        self._calls = 0
        self._thought = False  # the open thoughts were said as they came
        self._failed = False

    def frames(self, event: Event) -> tuple[bytes, ...]:
        return tuple(data_frame(chunk) for chunk in self.chunks(event))

    def end(self) -> bytes:
        return b"" if self._failed else DONE

    def whole(self, response: Mapping[str, Any]) -> Mapping[str, Any]:
        return completion(response)

    def chunks(self, event: Event) -> list[Chunk]:
        """What an event is in this API: often nothing, because it says the same in less."""
        match event["type"]:
            case "response.created":
                self._begin(event["response"])
                return []
            case "response.in_progress" if not self._role_said:
                self._role_said = True
                return [self._chunk({"role": "assistant", "content": "", "refusal": None})]
            case "response.in_progress":
                return [self._chunk({})]
            case "response.output_text.delta":
                logprobs = _logprobs(event["logprobs"])
                return [self._chunk({"content": event["delta"]}, logprobs=logprobs)]
            case "response.reasoning_text.delta":
                self._thought = True
                return [self._chunk({"reasoning_content": event["delta"]})]
            case "response.output_item.added":
                return self._added(event["item"])
            case "response.function_call_arguments.delta":
                return [self._call({"function": {"arguments": event["delta"]}})]
            case "response.custom_tool_call_input.delta":
                return [self._call({"custom": {"input": event["delta"]}})]
            case "response.output_item.done":
                return self._done(event["item"])
            case "response.completed" | "response.incomplete":
                return self._finish(event["response"])
            case "response.failed":
                self._failed = True
                return [{"error": _failure(event["response"]["error"])}]
            case _:  # parts, and texts that were said in deltas
                return []

    def _begin(self, response: Mapping[str, Any]) -> None:
        self._head = {
            "id": as_completion(response["id"]),
            "object": "chat.completion.chunk",
            "created": response["created_at"],
            "model": response["model"],
            "service_tier": response["service_tier"],
            "system_fingerprint": None,
        }

    def _added(self, item: Mapping[str, Any]) -> list[Chunk]:
        if item["type"] not in _CALLS:
            return []
        self._calls += 1
        return [self._call(_call(item))]

    def _call(self, fragment: dict[str, Any]) -> Chunk:
        return self._chunk({"tool_calls": [{"index": self._calls - 1, **fragment}]})

    def _done(self, item: Mapping[str, Any]) -> list[Chunk]:
        """Thoughts come all at once where the turn does not stream them."""
        if item["type"] != "reasoning":
            return []
        said, self._thought = self._thought, False
        return [] if said else [self._chunk({"reasoning_content": _reasoning(item)})]

    def _finish(self, response: Mapping[str, Any]) -> list[Chunk]:
        last = self._chunk({}, finish_reason=finish_reason(response)) | _ours(response)
        if not self._include_usage:
            return [last]
        return [last, {**self._head, "choices": [], "usage": usage(response["usage"])}]

    def _chunk(
        self,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> Chunk:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        counts = {"usage": None} if self._include_usage else {}
        return {**self._head, "choices": [choice], **counts}


def completion(response: Mapping[str, Any]) -> dict[str, Any]:
    """The whole completion that a response object is. It did not fail."""
    parts = [
        part for item in response["output"] if item["type"] == "message" for part in item["content"]
    ]
    calls = [_call(item) for item in response["output"] if item["type"] in _CALLS]
    thoughts = "".join(
        _reasoning(item) for item in response["output"] if item["type"] == "reasoning"
    )
    text = "".join(part["text"] for part in parts)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text if text or not calls else None,
        "refusal": None,
        "annotations": [],
    }
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _logprobs([entry for part in parts for entry in part["logprobs"]]),
        "finish_reason": finish_reason(response),
    }
    return {
        "id": as_completion(response["id"]),
        "object": "chat.completion",
        "created": response["created_at"],
        "model": response["model"],
        "choices": [choice],
        "usage": usage(response["usage"]),
        "service_tier": response["service_tier"],
        "system_fingerprint": None,
        "metadata": response["metadata"],
        **_ours(response),
    }


def finish_reason(response: Mapping[str, Any]) -> str:
    details = response["incomplete_details"]
    if details is not None and details["reason"] == "max_output_tokens":
        return "length"
    called = any(item["type"] in _CALLS for item in response["output"])
    return "tool_calls" if called else "stop"


def usage(counts: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A response's `usage` with this API's names. None for a turn that counted nothing."""
    if counts is None:
        return None
    return {
        "prompt_tokens": counts["input_tokens"],
        "completion_tokens": counts["output_tokens"],
        "total_tokens": counts["total_tokens"],
        "prompt_tokens_details": dict(counts["input_tokens_details"]),
        "completion_tokens_details": dict(counts["output_tokens_details"]),
        **_ours(counts),
    }


def as_completion(response_id: str) -> str:
    """The id of the completion that a response is."""
    return _COMPLETION + response_id.removeprefix(_RESPONSE)


def as_response(completion_id: str) -> str | None:
    """The id of the response that a completion is; None for an id of another kind."""
    if not completion_id.startswith(_COMPLETION):
        return None
    return _RESPONSE + completion_id.removeprefix(_COMPLETION)


def chat_error_body(error: BrokerError) -> dict[str, Any]:
    """An HTTP answer's body. A turn calls what it was given `input`; here its name is `messages`."""
    told = error_object(error)
    return {"error": {**told, "param": "messages" if told["param"] == "input" else told["param"]}}


def _failure(error: Mapping[str, Any]) -> dict[str, Any]:
    """The object that a stream says instead of its end. Clients raise it as they would a status."""
    told = error_object(TurnFailed(error["message"]))
    return {**told, "code": error["code"]}


# Items

_CALLS = ("function_call", "custom_tool_call")


def _call(item: Mapping[str, Any]) -> dict[str, Any]:
    """A call as it stands. This API has no namespaces: the name is the one that the model said."""
    name = spoken_name(item["name"], item.get("namespace"))
    if item["type"] == "custom_tool_call":
        called = {"type": "custom", "custom": {"name": name, "input": item["input"]}}
    else:
        called = {"type": "function", "function": {"name": name, "arguments": item["arguments"]}}
    return {"id": item["call_id"], **called}


def _reasoning(item: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in item.get("content") or item["summary"])


def _logprobs(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    content = [
        {**_logprob(entry), "top_logprobs": [_logprob(top) for top in entry["top_logprobs"]]}
        for entry in entries
    ]
    return {"content": content, "refusal": None} if content else None


def _logprob(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One token's. Events of a stream have no `bytes`, the response's parts have."""
    token = entry["token"]
    told = entry.get("bytes", list(token.encode()))
    return {"token": token, "bytes": told, "logprob": entry["logprob"]}


def _ours(told: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in told.items() if key.startswith("homeport:")}
