"""The grammar of a Messages event stream, as an independent reader of the published rules would check it.

    stream := ping* start (ping | block)* message_delta message_stop
            | ping* (start (ping | block)*)? error
    block  := content_block_start (content_block_delta | ping)* content_block_stop

An error may come inside a block. Each event is also held to the official client's types, in strict mode, and may have
no fields of its own but those whose name says that they are ours.
"""

import json

from anthropic.types import Message, RawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter

_EVENT = TypeAdapter(RawMessageStreamEvent)
_MESSAGE = TypeAdapter(Message)
_DELTAS = {
    "text": {"text_delta"},
    "tool_use": {"input_json_delta"},
    "thinking": {"thinking_delta", "signature_delta"},
}
# Required by the published schema, though the client's types give them defaults.
MESSAGE_FIELDS = {
    *("id", "type", "role", "model", "content", "container", "usage"),
    *("stop_reason", "stop_sequence", "stop_details"),
}
USAGE_FIELDS = {
    *("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"),
    *("cache_creation", "inference_geo", "output_tokens_details", "server_tool_use"),
    "service_tier",
}


class GrammarError(AssertionError):
    """A sentence that says which rule the stream breaks."""


def exactly(kind, value):
    """`value` as this type of the client's, with nothing coerced and nothing added but fields of ours."""
    adapter = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
    model = adapter.validate_json(json.dumps(value), strict=True)
    _check_extras(model)
    return model


def check_message(message):
    """A whole Message, as a body. Returns it as the client's type."""
    _require(message.keys() >= MESSAGE_FIELDS, f"missing: {MESSAGE_FIELDS - message.keys()}")
    _require(message["usage"].keys() >= USAGE_FIELDS, "usage lacks a field")
    _require(message["id"].startswith("msg_"), "the id has no msg_ prefix")
    _require(message["stop_reason"] is not None, "a whole message without a stop_reason")
    for block in message["content"]:
        if block["type"] == "text":
            _require(
                "citations" in block and block["text"] != "", "a text without citations or text"
            )
        if block["type"] == "tool_use":
            _require(block["caller"] == {"type": "direct"}, "a call without its caller")
            _require(block["id"].startswith("toolu_"), "a call's id has no toolu_ prefix")
    _check_stop(message["stop_reason"], message["stop_sequence"], message["content"])
    usage = message["usage"]
    created = usage["cache_creation"]
    _require(
        usage["cache_creation_input_tokens"] == sum(created.values()), "cache_creation does not sum"
    )
    return exactly(_MESSAGE, message)


def check_stream(events):
    """Check a whole stream; the Message that a client accumulates is returned. Raises GrammarError."""
    reader = _Reader()
    for event in events:
        _require(not reader.over, f"{event['type']} after the end")
        reader.read(event)
    _require(reader.over, "the stream has no end")
    return reader.message


class _Reader:
    def __init__(self):
        self.message = None
        self.block = None  # the open one
        self.raw = ""  # its argument text
        self.over = False
        self.failed = False
        self.delta = None

    def read(self, event):
        kind = event["type"]
        if kind == "ping":
            _require(event == {"type": "ping"}, "a ping with fields")
            _require(self.delta is None, "a ping after message_delta")
            return
        if kind == "error":
            _require(set(event) == {"type", "error", "request_id"}, "an error of another shape")
            _require(set(event["error"]) == {"type", "message"}, "an error of another shape")
            self.over = self.failed = True
            return
        exactly(_EVENT, event)
        if kind == "message_start":
            self._start(event["message"])
            return
        _require(self.message is not None, f"{kind} before message_start")
        _require(self.delta is None or kind == "message_stop", f"{kind} after message_delta")
        getattr(self, "_" + kind)(event)

    def _start(self, message):
        _require(self.message is None, "message_start twice")
        _require(message.keys() >= MESSAGE_FIELDS, f"missing: {MESSAGE_FIELDS - message.keys()}")
        _require(message["usage"].keys() >= USAGE_FIELDS, "usage lacks a field")
        _require(message["content"] == [], "message_start with content")
        _require(message["stop_reason"] is None, "message_start with a stop_reason")
        self.message = json.loads(json.dumps(message))

    def _content_block_start(self, event):
        _require(self.block is None, "a block inside a block")
        _require(event["index"] == len(self.message["content"]), "indices do not count up")
        block = dict(event["content_block"])
        empty = {"text": "text", "thinking": "thinking", "tool_use": "input"}[block["type"]]
        _require(not block[empty], f"a block starts with {empty}")
        if block["type"] == "thinking":
            _require(block["signature"] == "", "a block starts with a signature")
        self.block, self.raw = block, ""

    def _content_block_delta(self, event):
        _require(self.block is not None, "a delta outside a block")
        _require(event["index"] == len(self.message["content"]), "a delta of another block")
        delta = event["delta"]
        _require(delta["type"] in _DELTAS[self.block["type"]], "a delta of another kind")
        match delta["type"]:
            case "text_delta":
                _require(delta["text"] != "", "an empty delta")
                self.block["text"] += delta["text"]
            case "input_json_delta":
                self.raw += delta["partial_json"]
            case "thinking_delta":
                _require(self.block["signature"] == "", "a thought after its signature")
                self.block["thinking"] += delta["thinking"]
            case "signature_delta":
                self.block["signature"] = delta["signature"]

    def _content_block_stop(self, event):
        _require(self.block is not None, "no block to stop")
        _require(event["index"] == len(self.message["content"]), "another block is stopped")
        if self.block["type"] == "text":
            _require(self.block["text"] != "", "an empty text block")
        if self.raw:
            self.block["input"] = _input(self.raw)
        self.message["content"].append(self.block)
        self.block = None

    def _message_delta(self, event):
        _require(self.block is None, "message_delta while a block is open")
        self.delta = event["delta"]
        _require(
            {"stop_reason", "stop_sequence", "stop_details"} <= self.delta.keys(),
            "a delta lacks a field",
        )
        _require(self.delta["stop_reason"] is not None, "message_delta without a stop_reason")
        self.message.update(self.delta)
        self.message["usage"].update(event["usage"])
        _check_stop(self.delta["stop_reason"], self.delta["stop_sequence"], self.message["content"])

    def _message_stop(self, event):
        _require(self.delta is not None, "message_stop before message_delta")
        check_message(self.message)
        self.over = True


def _input(raw):
    """What the whole Message says for this argument text, by its own rule."""
    try:
        value = json.loads(raw)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"homeport:arguments": raw}


def _check_stop(reason, sequence, content):
    _require(
        (reason == "stop_sequence") == (sequence is not None), "stop_sequence and reason disagree"
    )
    if reason == "tool_use":
        _require(any(block["type"] == "tool_use" for block in content), "tool_use without a call")


def _check_extras(value):
    if isinstance(value, BaseModel):
        ours = [name for name in value.model_extra or {} if not name.startswith("homeport:")]
        _require(not ours, f"{type(value).__name__} has no fields {ours}")
        for name in type(value).model_fields:
            _check_extras(getattr(value, name))
    elif isinstance(value, list):
        for one in value:
            _check_extras(one)


def _require(held, rule):
    if not held:
        raise GrammarError(rule)
