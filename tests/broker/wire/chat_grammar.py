"""The grammar of a Chat Completions stream, as an independent reader of the published rules would check it.

    stream := role delta* finish usage? [DONE]   |   role? delta* error
    delta  := content | reasoning_content | call fragment | nothing

A chunk has one choice, the usage chunk none. Knows nothing of the code under test. What it gives back is what a client
puts together: the message, why it ended, and the counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Chunk = dict[str, Any]

HEAD = ("id", "object", "created", "model", "service_tier", "system_fingerprint")
REASONS = ("stop", "length", "tool_calls")
_CALLED = {"function": "arguments", "custom": "input"}  # {type of a call: what streams in it}


class GrammarError(AssertionError):
    """A sentence that says which rule the stream breaks."""


@dataclass
class Read:
    """What a stream said."""

    head: dict[str, Any] | None = None
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    blanks: int = 0  # chunks that say nothing: the keepalive

    @property
    def message(self) -> dict[str, Any]:
        """The message that a client sends back."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.calls:
            message |= {"content": self.content or None, "tool_calls": self.calls}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        return message


def read_body(body: bytes, *, include_usage: bool = False) -> Read:
    """Check the bytes of a stream. Raises GrammarError."""
    _require(body.endswith(b"\n\n"), "the body does not end with a frame's end")
    lines = body.decode().removesuffix("\n\n").split("\n\n")
    for line in lines:
        _require(line.startswith("data: "), f"a frame has more or less than data: {line[:80]}")
        _require("\n" not in line, "a frame has two lines")
    data = [line.removeprefix("data: ") for line in lines]
    done = data[-1] == "[DONE]"
    read = read_chunks([json.loads(text) for text in data[: len(data) - done]], include_usage)
    _require(done == (read.error is None), "[DONE] and an error, or neither")
    return read


def read_chunks(chunks: list[Chunk], include_usage: bool = False) -> Read:
    """Check a whole stream's chunks. Raises GrammarError."""
    read = Read()
    last = len(chunks) - 1
    for number, chunk in enumerate(chunks):
        if "error" in chunk:
            _require(number == last, "something follows an error")
            _require(chunk.keys() == {"error"}, "an error beside something else")
            for key in ("message", "type", "param", "code"):
                _require(key in chunk["error"], f"an error without {key}")
            read.error = chunk["error"]
            continue
        _head(read, chunk)
        _require(("usage" in chunk) == include_usage, "usage, and it was not asked for, or none")
        if read.finish_reason is not None:
            _require(include_usage and number == last, "a chunk follows the last")
            _require(chunk["choices"] == [], "the usage chunk has a choice")
            read.usage = chunk["usage"]
            _check_usage(chunk["usage"])
            continue
        _require(not include_usage or chunk["usage"] is None, "usage before the end")
        _require(len(chunk["choices"]) == 1, "not one choice")
        _choice(read, chunk["choices"][0], first=number == 0)
    _require((read.error is None) != (read.finish_reason is None), "no end, or two")
    _require(
        not include_usage or read.error is not None or read.usage is not None, "no usage chunk"
    )
    for call in read.calls:
        _require(bool(call["id"]), "a call without an id")
    return read


def _head(read: Read, chunk: Chunk) -> None:
    for key in HEAD:
        _require(key in chunk, f"a chunk without {key}")
    head = {key: chunk[key] for key in HEAD}
    _require(head["object"] == "chat.completion.chunk", "not a chunk")
    _require(head["id"].startswith("chatcmpl-"), "an id without chatcmpl-")
    _require(read.head in (None, head), "the head changes")
    read.head = head


def _choice(read: Read, choice: dict[str, Any], *, first: bool) -> None:
    _require(choice["index"] == 0, "a second choice")
    delta = choice["delta"]
    _require(("role" in delta) == first, "the role is said once, at first")
    if first:
        _require(delta["role"] == "assistant", "not the assistant's")
        _require(delta["content"] == "", "the first delta says something")
    reason = choice["finish_reason"]
    if reason is not None:
        _require(reason in REASONS, f"finish_reason {reason}")
        _require(not delta, "the last delta says something")
        read.finish_reason = reason
        return
    said = [key for key in ("content", "reasoning_content", "tool_calls") if key in delta]
    _require(len(said) <= 1, "a delta says two things")
    if not said:
        _require(not delta, f"a delta says something else: {delta}")
        read.blanks += 1
    for key in said:
        _require(first or bool(delta[key]), f"an empty {key}")
    read.content += delta.get("content", "")
    read.reasoning += delta.get("reasoning_content", "")
    for fragment in delta.get("tool_calls", ()):
        _fragment(read, fragment)
    if choice["logprobs"] is not None:
        _require(bool(delta.get("content")), "logprobs of no text")
        read.logprobs += choice["logprobs"]["content"]


def _fragment(read: Read, fragment: dict[str, Any]) -> None:
    if fragment["index"] == len(read.calls):
        kind = fragment["type"]
        text = _CALLED[kind]
        _require(bool(fragment[kind]["name"]), "a call without a name")
        _require(fragment[kind][text] == "", "a call begins with its arguments")
        call = {"id": fragment["id"], "type": kind, kind: dict(fragment[kind])}
        _require(fragment == {"index": len(read.calls), **call}, "a call begins with more")
        read.calls.append(call)
        return
    _require(fragment["index"] == len(read.calls) - 1, "a fragment of another call than the last")
    call = read.calls[-1]
    kind, text = call["type"], _CALLED[call["type"]]
    _require(fragment.keys() == {"index", kind}, "a later fragment says what the first said")
    _require(fragment[kind].keys() == {text}, "a later fragment names its call again")
    _require(fragment[kind][text] != "", "an empty fragment")
    call[kind][text] += fragment[kind][text]


def check_completion(completion: dict[str, Any]) -> dict[str, Any]:
    """The shape of a whole completion; its message is returned. Raises GrammarError."""
    _require(completion["object"] == "chat.completion", "not a completion")
    _require(completion["id"].startswith("chatcmpl-"), "an id without chatcmpl-")
    for key in ("created", "model", "service_tier", "system_fingerprint"):
        _require(key in completion, f"a completion without {key}")
    [choice] = completion["choices"]
    _require(choice["index"] == 0, "not the first choice")
    _require(choice["finish_reason"] in REASONS, f"finish_reason {choice['finish_reason']}")
    message = choice["message"]
    _require(message["role"] == "assistant", "not the assistant's")
    _require(message["refusal"] is None, "a refusal")
    calls = message.get("tool_calls")
    _require(calls != [], "no calls are said by their absence")
    _require(message["content"] is not None or bool(calls), "neither text nor calls")
    _check_usage(completion["usage"])
    return dict(message)


def _check_usage(usage: dict[str, Any]) -> None:
    _require(
        usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"],
        "total_tokens is not the sum",
    )
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    _require(0 <= cached <= usage["prompt_tokens"], "more tokens cached than there were")
    _require(usage["completion_tokens_details"]["reasoning_tokens"] >= 0, "no reasoning_tokens")
    by_tier = usage["homeport:cached_by_tier"]
    _require(set(by_tier) == {"device", "host", "disk", "remote"}, "not the four tiers")
    _require(sum(by_tier.values()) == cached, "tiers do not sum to cached_tokens")
    _require("homeport:recomputed" in usage, "no reasons")


def _require(fact: bool, sentence: str) -> None:
    if not fact:
        raise GrammarError(sentence)
