"""Sampled text to text and tool calls, as it streams. The Hermes form, which our fallback template teaches too:

    <tool_call>{"name": "look_up", "arguments": {"key": "value"}}</tool_call>

Laws
    However the text is cut into pieces, the joined texts, calls and arguments are the same.
    Nothing is held longer than it is undecided: text, while it may be the beginning of a tag; a call, until
    its head (all before the arguments' brace) is there. From then on the arguments stream.
    What does not become a call is text again, tags included. Nothing is lost but the markup of calls, and the
    white space before a closing tag.

    TEXT ── <tool_call> ──> HEAD ── {"name": "…", "arguments": ──> ARGUMENTS ── last brace, or '<' ──> TAIL
      ^                      │                                                                           │
      └──────────────────────┴───────────────────────────────────────────────────────────────────────────┘
        at </tool_call> or the end: a call,                                   at }</tool_call>, or at what
        if all of it is one as JSON; else text                                cannot be that, which is text

In ARGUMENTS only strings and braces are understood: whether the rest is JSON is the tool's business, as with
every server whose model is not constrained. A '<' outside a string is no JSON, so the call was cut there. A
call whose text ends inside its arguments stays open, and the response's end says how it ended.
"""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass
from typing import Protocol

from broker.errors import BadRequest
from broker.wire.json_in import parse_json

OPEN = "<tool_call>"
CLOSE = "</tool_call>"

# A call's object up to its arguments' brace.
HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)+")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    name: str  # as the model says it, never empty


@dataclass(frozen=True, slots=True)
class CallArguments:
    delta: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    pass


Piece = Text | CallStart | CallArguments | CallEnd


class _State(enum.Enum):
    TEXT = enum.auto()
    HEAD = enum.auto()
    ARGUMENTS = enum.auto()
    TAIL = enum.auto()


class Splitter(Protocol):
    """Feed it text, then finish it once. One for each form that calls are written in."""

    def feed(self, text: str) -> list[Piece]:
        """What is decided now."""
        ...

    def finish(self) -> list[Piece]:
        """What the end of the text decides."""
        ...


class ObjectEnd:
    """Finds the end of a JSON object in text that comes in pieces. Only strings and braces are understood."""

    def __init__(self, *, never: str = "") -> None:
        self._never = (
            never  # characters that are no JSON outside a string: the object was cut before one
        )
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """Index in this piece after the object's last character; None if it goes on."""
        for index, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char == "{":
                self._depth += 1
            elif char == "}":
                self._depth -= 1
                if self._depth == 0:
                    return index + 1
            elif char in self._never:
                return index
        return None


class ToolCallSplitter:
    """Feed it text, then finish it once."""

    def __init__(self) -> None:
        self._state = _State.TEXT
        self._held = ""  # undecided text of the current state
        self._end = ObjectEnd(never="<")  # of the arguments

    def feed(self, text: str) -> list[Piece]:
        """What is decided now."""
        self._held += text
        pieces: list[Piece] = []
        before = None
        while self._held and before is not self._state:
            before = self._state
            pieces += self._advance()
        return pieces

    def finish(self) -> list[Piece]:
        """What the end of the text decides. No `CallEnd` for a call whose arguments are not complete."""
        held, self._held = self._held, ""
        match self._state:
            case _State.TEXT:
                return [Text(held)] if held else []
            case _State.HEAD:
                return whole_call(held) or [Text(OPEN + held)]
            case _State.ARGUMENTS | _State.TAIL:
                return []

    def _advance(self) -> list[Piece]:
        match self._state:
            case _State.TEXT:
                return self._text()
            case _State.HEAD:
                return self._head()
            case _State.ARGUMENTS:
                return self._arguments()
            case _State.TAIL:
                return self._tail()

    def _text(self) -> list[Piece]:
        text, tag, rest = self._held.partition(OPEN)
        if tag:
            self._state, self._held = _State.HEAD, rest
        else:
            kept = overlap(text, OPEN)
            text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        return [Text(text)] if text else []

    def _head(self) -> list[Piece]:
        body, close, rest = self._held.partition(CLOSE)
        head = HEAD.match(body)
        name = None if head is None else call_name(head["name"])
        if head is not None and name is not None:
            self._state, self._held = _State.ARGUMENTS, self._held[head.end() :]
            return [CallStart(name)]
        if not close:
            return []
        self._state, self._held = _State.TEXT, rest
        return whole_call(body) or [Text(OPEN + body + CLOSE)]

    def _arguments(self) -> list[Piece]:
        end = self._end.find(self._held)
        if end is None:
            delta, self._held = self._held, ""
            return [CallArguments(delta)]
        delta, self._held = self._held[:end], self._held[end:]
        self._state = _State.TAIL
        self._end = ObjectEnd(never="<")
        return [CallArguments(delta), CallEnd()] if delta else [CallEnd()]

    def _tail(self) -> list[Piece]:
        """Pass over what closes a call: its object's brace and its tag. Both may be missing."""
        rest = self._held.lstrip().removeprefix("}").lstrip()
        if not CLOSE.startswith(rest):
            self._state, self._held = _State.TEXT, rest.removeprefix(CLOSE)
        elif rest == CLOSE:
            self._state, self._held = _State.TEXT, ""
        return []


def overlap(text: str, tag: str) -> int:
    """How many of the last characters may be the beginning of a tag."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


def call_name(quoted: str) -> str | None:
    try:
        name = parse_json(quoted)
    except BadRequest:
        return None
    return name if isinstance(name, str) else None


def whole_call(body: str) -> list[Piece]:
    """The call that `body` is when its keys come in another order; [] if it is none."""
    try:
        call = parse_json(body)
    except BadRequest:
        return []
    if not isinstance(call, dict):
        return []
    name = call.get("name")
    arguments = call.get("arguments", call.get("parameters")) or {}
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not (isinstance(name, str) and name and isinstance(arguments, str)):
        return []
    return [CallStart(name), CallArguments(arguments), CallEnd()]
