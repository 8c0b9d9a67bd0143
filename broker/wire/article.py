"""The dialect of the article that Homeport was born from: a loop that names nothing and is continued anyway.

    client                                                        server
    {"model", "system", "tools", "input"}                  ──>
                                                           <──    events, response.completed, response.done
    {"type": "conversation.item.create",
     "item": {"role": "tool", "content": …}}               ──>
                                                           <──    events, response.completed, response.done

Laws
    The connection is the conversation: each item continues the latest response, with the opening's settings.
    A tool's result answers the first unanswered call of that response, unless it names its call. With no call
    left to answer it is a message of role `tool`.
    What was sent and got no response that can be continued goes along with the next item.
    `response.done` follows every terminal event, so that the loop cannot wait for ever.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broker.errors import BadRequest
from broker.wire.fields import as_object, missing, optional_array, optional_name
from broker.wire.items import FunctionCallOutput, Message, parse_items
from broker.wire.requests import Transport, parse_create
from broker.wire.sse import json_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.wire.fields import Json
    from broker.wire.items import Item
    from broker.wire.requests import TurnRequest


@dataclass(frozen=True, slots=True)
class ToolResult:
    """`call_id` is None where the client did not say which call it answers."""

    call_id: str | None
    output: str


def is_opening(frame: Mapping[str, Json]) -> bool:
    """Whether a frame without a known type begins this dialect."""
    return "type" not in frame and "input" in frame


def parse_opening(frame: Mapping[str, Json]) -> TurnRequest:
    """The first frame. Its tools may have the Chat Completions shape or Anthropic's. Raises BadRequest."""
    tools = optional_array(frame, "tools") or []
    body = {
        **frame,
        "instructions": frame.get("system", frame.get("instructions")),
        "tools": [
            _flat_tool(as_object(tool, f"tools[{index}]")) for index, tool in enumerate(tools)
        ],
    }
    return parse_create(body, transport=Transport.WEBSOCKET)


def parse_item(frame: Mapping[str, Json]) -> ToolResult | Item:
    """The item of a `conversation.item.create` frame. Raises BadRequest."""
    if frame.get("item") is None:
        raise missing("item")
    item = as_object(frame["item"], "item")
    if item.get("role") != "tool":
        [parsed] = parse_items([item], at="item")
        return parsed
    content = item.get("content")
    if content is None:
        raise missing("item.content")
    call_id = optional_name(item, "call_id", at="item") or optional_name(
        item, "tool_call_id", at="item"
    )
    return ToolResult(call_id, _result_text(content))


class Dialogue:
    """One connection's conversation. Give it what was asked and what was answered, in order."""

    def __init__(self) -> None:
        self._opening: TurnRequest | None = None
        self._response_id: str | None = None
        self._calls: list[str] = []  # call ids of the latest response that have no answer yet
        self._unanswered: tuple[Item, ...] = ()  # items since the latest response

    def open(self, request: TurnRequest) -> TurnRequest:
        """Begin, or begin anew."""
        self._opening = request
        self._response_id = request.previous_response_id
        self._calls = []
        self._unanswered = request.items
        return request

    def proceed(self, item: ToolResult | Item) -> TurnRequest:
        """The turn that continues the latest response with `item`. Raises BadRequest before any opening."""
        if self._opening is None:
            raise BadRequest(
                "'conversation.item.create' continues a conversation, and this connection has none yet.",
                code="conversation_not_open",
                param="type",
            )
        sent = self._answer(item) if isinstance(item, ToolResult) else item
        self._unanswered = (*self._unanswered, sent)
        return dataclasses.replace(
            self._opening, items=self._unanswered, previous_response_id=self._response_id
        )

    def answered(self, response: Mapping[str, Any]) -> None:
        """Note a terminal event's response object. A failed one is not continued: the one before it is."""
        if response["status"] == "failed":
            return
        self._unanswered = ()
        self._response_id = response["id"]
        self._calls = [
            item["call_id"] for item in response["output"] if item["type"] == "function_call"
        ]

    def _answer(self, result: ToolResult) -> Item:
        call_id = result.call_id or (self._calls[0] if self._calls else None)
        if call_id is None:
            return Message(None, "tool", result.output)
        if call_id in self._calls:
            self._calls.remove(call_id)
        return FunctionCallOutput(None, call_id, result.output)


def done_event(terminal: Mapping[str, Any]) -> dict[str, Any]:
    """`response.done`, to be sent after `terminal`, one of `responses_out.TERMINAL_EVENTS`."""
    return {
        **terminal,
        "type": "response.done",
        "sequence_number": terminal["sequence_number"] + 1,
    }


def _flat_tool(tool: dict[str, Json]) -> dict[str, Json]:
    """A function tool in the Responses shape."""
    nested = tool.get("function")
    flat = {**tool, **nested} if isinstance(nested, dict) else dict(tool)
    flat.setdefault("type", "function")
    if "input_schema" in flat:
        flat.setdefault("parameters", flat["input_schema"])
    return flat


def _result_text(content: Json) -> str:
    """A string as it is, text parts joined, anything else as JSON."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        return "".join(part["text"] for part in content)
    return json_text(content)


def _is_text_part(part: Json) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)
