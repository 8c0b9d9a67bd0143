"""What a Messages prompt is made of: tools, system prompt and messages, as items and as blocks that can be marked. Pure.

Laws
    Equal content gives equal items and equal block names, however it was written: a string is a list of one text,
    neighbouring messages of one role are one turn, marks are no content.
    A user's or system's texts are paragraphs: they are joined by an empty line. An assistant's are one text, cut anywhere.
    The billing line that one agent puts before its system prompt differs from session to session and says nothing to a
    model: it is taken off, or no prompt of that agent would share its beginning with another.
    Every `tool_use` is answered in the user turn after it, once, and nothing else is.
    Thoughts are kept for what they lead back to; they are no part of a block's name, for clients drop old ones.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.errors import BadRequest, UnsupportedContent
from broker.wire.cache_control import Block, name_after
from broker.wire.fields import (
    as_object,
    flag,
    invalid_type,
    invalid_value,
    join,
    missing,
    optional_array,
    optional_flag,
    optional_object,
    optional_string,
    required_name,
    required_string,
)
from broker.wire.items import FunctionCall, FunctionCallOutput, Message, Reasoning
from broker.wire.messages_ids import call_id, tool_use_id
from broker.wire.requests import Cut, ToolSpec
from broker.wire.retention import cache_control_ttl

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Literal

    from broker.wire.fields import Json
    from broker.wire.items import Item

    ClientRole = Literal["user", "system"]

_PARAGRAPH = "\n\n"
_BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n*")


@dataclass(frozen=True, slots=True)
class Content:
    """A body's prompt. `blocks` are in Anthropic's order: tools, system, messages."""

    items: tuple[Item, ...]
    instructions: str | None
    tools: tuple[ToolSpec, ...]
    blocks: tuple[Block, ...]


def read_content(body: Mapping[str, Json]) -> Content:
    """Raises BadRequest with the path of the first fault found."""
    declared = _declared(body)
    tools = tuple(one.spec for one in declared if one.spec is not None)
    system = _system(body, tools)
    transcript = _Transcript(tools, system)
    transcript.read(body)
    return Content(
        tuple(transcript.items),
        system.text or None,
        tools,
        (*_tool_blocks(declared, system), *system.blocks, *transcript.blocks),
    )


# Tools

_HOSTED = ("web_search_", "web_fetch_", "code_execution_", "tool_search_tool_")


@dataclass(frozen=True, slots=True)
class _Declared:
    """A member of `tools`. One that only the vendor runs has no spec: a model here simply does not have it."""

    spec: ToolSpec | None
    path: str
    ttl_s: float | None


def _declared(body: Mapping[str, Json]) -> list[_Declared]:
    out: list[_Declared] = []
    for index, value in enumerate(optional_array(body, "tools") or []):
        at = f"tools[{index}]"
        tool = as_object(value, at)
        kind = optional_string(tool, "type", at=at) or "custom"
        if kind != "custom" and not kind.startswith(_HOSTED):
            raise BadRequest(
                f"Unsupported tool: '{at}' is of type '{kind}', which this model was not made for."
                " Declare it with a name and an input_schema.",
                code="unsupported_tool",
                param=join(at, "type"),
            )
        spec = _tool(tool, at) if kind == "custom" else None
        if spec is not None and spec.name in [one.spec.name for one in out if one.spec]:
            raise BadRequest(
                f"Tool names must be unique: '{spec.name}' is declared twice.",
                code="invalid_value",
                param=join(at, "name"),
            )
        out.append(_Declared(spec, at, mark(tool, at)))
    return out


def _tool_blocks(declared: Sequence[_Declared], system: _System) -> list[Block]:
    blocks: list[Block] = []
    name = name_after(b"tools", system.text)
    count = 0
    for one in declared:
        if one.spec is not None:
            name = name_after(name, _tool_text(one.spec))
            count += 1
        blocks.append(Block(name, Cut(count, len(system.text)), one.path, one.ttl_s))
    return blocks


def _tool(tool: Mapping[str, Json], at: str) -> ToolSpec:
    schema = optional_object(tool, "input_schema", at=at)
    if schema is None:
        raise missing(join(at, "input_schema"))
    return ToolSpec(
        name=required_name(tool, "name", at=at, max_chars=128),
        description=optional_string(tool, "description", at=at),
        parameters=schema,
        strict=optional_flag(tool, "strict", at=at),
    )


def _tool_text(spec: ToolSpec) -> str:
    """What a template shows of it. Keys in the client's order: it is the order in which they are rendered."""
    return json.dumps([spec.name, spec.description, spec.parameters], ensure_ascii=False)


# The system prompt and the messages


@dataclass(frozen=True, slots=True)
class _System:
    text: str
    blocks: tuple[Block, ...]
    name: bytes  # of all tools and the whole system prompt


def _system(body: Mapping[str, Json], tools: tuple[ToolSpec, ...]) -> _System:
    name = name_after(b"system", *map(_tool_text, tools))
    whole = ""
    blocks: list[Block] = []
    for path, value in _parts(body, "system", ""):
        text, ttl_s = _text_block(value, path)
        billed = _BILLING.match(text)
        text = text if billed is None else text[billed.end() :]
        if text:
            whole = whole + _PARAGRAPH + text if whole else text
            name = name_after(name, text)
        cut = Cut(len(tools), len(whole))
        blocks.append(Block(name, cut, path, ttl_s, cacheable=text != ""))
    return _System(whole, tuple(blocks), name)


class _Transcript:
    """Messages become items, and each of their blocks a place. Reads one list, once."""

    def __init__(self, tools: tuple[ToolSpec, ...], system: _System) -> None:
        self.items: list[Item] = []
        self.blocks: list[Block] = []
        self._tools = len(tools)
        self._instructions = len(system.text)
        self._name = system.name
        self._role: ClientRole | None = None  # of the message that still grows
        self._text = ""  # and its text so far
        self._calls: dict[str, bool] = {}  # {call id of the last assistant turn: answered}

    def read(self, body: Mapping[str, Json]) -> None:
        messages = optional_array(body, "messages")
        if messages is None:
            raise missing("messages")
        if not messages:
            raise BadRequest(
                "At least one message is required.", code="invalid_value", param="messages"
            )
        turn: str | None = None  # whose turn is being read; system messages are nobody's
        role = ""
        for index, value in enumerate(messages):
            at = f"messages[{index}]"
            message = as_object(value, at)
            role = required_string(message, "role", at=at)
            if role not in _ROLES:
                raise invalid_value(join(at, "role"), role, _ROLES)
            if role == "assistant" and turn != "assistant":
                self._check_answered(at)
                self._calls = {}
            if message.get("content") is None:
                raise missing(join(at, "content"))
            for path, part in _parts(message, "content", at):
                self._block(role, as_object(part, path), path)
            if role != "system":
                turn = role
            if role == "assistant":
                self._grown()  # also before one that said nothing
        self._grown()
        if role != "assistant":
            self._check_answered(f"messages[{len(messages) - 1}]")

    def _block(self, role: str, part: dict[str, Json], at: str) -> None:
        kind = required_string(part, "type", at=at)
        match kind:
            case "text":
                self._said(role, part, at)
                return
            case "tool_use" if role == "assistant":
                self._tool_use(part, at)
            case "tool_result" if role == "user":
                self._tool_result(part, at)
            case "thinking" | "redacted_thinking" if role == "assistant":
                self._thought(part, at)
                return
            case "image" | "document":
                raise _unreadable(kind, at)
            case _:
                raise invalid_value(join(at, "type"), kind, _KINDS[role])
        self._place(at, mark(part, at))

    def _said(self, role: str, part: dict[str, Json], at: str) -> None:
        text, ttl_s = _text_block(part, at)
        if not text:
            return
        if role == "assistant":
            self._grown()
            self.items.append(Message(None, "assistant", text))
        elif role == self._role:
            self._text += _PARAGRAPH + text
        else:
            self._grown()
            self._role, self._text = ("system" if role == "system" else "user"), text
        self._name = name_after(self._name, role, "text", text)
        self._place(at, ttl_s)

    def _tool_use(self, part: dict[str, Json], at: str) -> None:
        self._grown()
        given = optional_object(part, "input", at=at)
        if given is None:
            raise missing(join(at, "input"))
        used = call_id(required_name(part, "id", at=at))
        name = required_name(part, "name", at=at)
        arguments = json.dumps(given, ensure_ascii=False)
        self.items.append(FunctionCall(None, used, name, arguments))
        self._calls[used] = False
        self._name = name_after(self._name, "tool_use", used, name, arguments)

    def _tool_result(self, part: dict[str, Json], at: str) -> None:
        self._grown()
        given = required_name(part, "tool_use_id", at=at)
        used = call_id(given)
        if used not in self._calls:
            raise BadRequest(
                f"{at}: unexpected `tool_use_id` found in `tool_result` blocks: {given}. Each `tool_result`"
                " block must have a corresponding `tool_use` block in the previous message.",
                code="invalid_value",
                param=join(at, "tool_use_id"),
            )
        if self._calls[used]:
            raise BadRequest(
                f"{at}: each `tool_use` must have a single result. Found multiple `tool_result` blocks"
                f" with id: {given}",
                code="invalid_value",
                param=join(at, "tool_use_id"),
            )
        self._calls[used] = True
        output = _PARAGRAPH.join(
            filter(None, (_result(v, p) for p, v in _parts(part, "content", at)))
        )
        if flag(part, "is_error", default=False, at=at):
            output = f"Error: {output}" if output else "Error"
        self.items.append(FunctionCallOutput(None, used, output))
        self._name = name_after(self._name, "tool_result", used, output)

    def _thought(self, part: dict[str, Json], at: str) -> None:
        """It is no part of a prompt unless its sampled ids are known, and so none of a block's name."""
        self._grown()
        if part.get("cache_control") is not None:
            raise BadRequest(
                "cache_control cannot be set for thinking blocks.",
                code="invalid_value",
                param=join(at, "cache_control"),
            )
        if part["type"] == "thinking":
            text = required_string(part, "thinking", at=at)
            seal = optional_string(part, "signature", at=at)
        else:
            text, seal = "", required_string(part, "data", at=at)
        self.items.append(Reasoning(None, text, seal or None))
        self.blocks.append(Block(self._name, self._here(), at, None, cacheable=False))

    def _place(self, at: str, ttl_s: float | None) -> None:
        self.blocks.append(Block(self._name, self._here(), at, ttl_s))

    def _here(self) -> Cut:
        return Cut(self._tools, self._instructions, len(self.items), len(self._text))

    def _grown(self) -> None:
        """The client's message that was being read is whole."""
        if self._role is not None:
            self.items.append(Message(None, self._role, self._text))
            self._role, self._text = None, ""

    def _check_answered(self, at: str) -> None:
        waiting = [tool_use_id(used) for used, answered in self._calls.items() if not answered]
        if waiting:
            raise BadRequest(
                f"{at}: `tool_use` ids were found without `tool_result` blocks immediately after:"
                f" {', '.join(waiting)}. Each `tool_use` block must have a corresponding `tool_result`"
                " block in the next message.",
                code="invalid_value",
                param=at,
            )


_ROLES = ("user", "assistant", "system")
_KINDS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
    "system": ("text",),
}


def _parts(obj: Mapping[str, Json], key: str, at: str) -> list[tuple[str, Json]]:
    """A content field's blocks, each with its path. A string is one text; absent is none."""
    value, path = obj.get(key), join(at, key)
    if value is None:
        return []
    if isinstance(value, str):
        return [(path, {"type": "text", "text": value})]
    if not isinstance(value, list):
        raise invalid_type(path, "one of a string or array of objects", value)
    return [(f"{path}[{index}]", part) for index, part in enumerate(value)]


def _text_block(value: Json, at: str) -> tuple[str, float | None]:
    """The text of a block that must be one, and what its mark asks for."""
    part = as_object(value, at)
    kind = required_string(part, "type", at=at)
    if kind != "text":
        raise invalid_value(join(at, "type"), kind, ("text",))
    text, ttl_s = required_string(part, "text", at=at), mark(part, at)
    if ttl_s is not None and not text:
        raise BadRequest(
            "cache_control cannot be set for empty text blocks.",
            code="invalid_value",
            param=join(at, "cache_control"),
        )
    return text, ttl_s


def _result(value: Json, at: str) -> str:
    """One block of a tool's result. A mark inside is none: only the result as a whole can be cached."""
    part = as_object(value, at)
    kind = required_string(part, "type", at=at)
    if kind in ("image", "document"):
        raise _unreadable(kind, at)
    if kind != "text":
        raise invalid_value(join(at, "type"), kind, ("text",))
    mark(part, at)
    return required_string(part, "text", at=at)


def _unreadable(kind: str, at: str) -> UnsupportedContent:
    return UnsupportedContent(
        f"Unsupported content: '{at}' is of type '{kind}', and this model reads text only.",
        param=at,
    )


def mark(part: Mapping[str, Json], at: str) -> float | None:
    """How long a block's own `cache_control` asks for; None without one."""
    control = optional_object(part, "cache_control", at=at)
    return None if control is None else cache_control_ttl(control, join(at, "cache_control"))
