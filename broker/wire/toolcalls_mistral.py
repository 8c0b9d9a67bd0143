"""Sampled text to text and tool calls in the forms of Mistral's templates, older and newer:

    [TOOL_CALLS] [{"name": "look_up", "arguments": {"key": "value"}, "id": "a1b2c3d4e"}, …]
    [TOOL_CALLS]look_up[CALL_ID]a1b2c3d4e[ARGS]{"key": "value"}[TOOL_CALLS]…       the id and [ARGS] may be missing

Laws: those of `toolcalls.py`. The model's own call ids are left out: ours name the calls.

    TEXT ── [TOOL_CALLS] ──> HEAD ── name and '{' ──> ARGUMENTS ── its last brace ──> TEXT
                              └── '[' ──> ENTRY ── head ──> ARGUMENTS ──> REST ── ',' ──> ENTRY, ']' ──> TEXT
"""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING

from broker.wire.toolcalls import (
    HEAD,
    CallArguments,
    CallEnd,
    CallStart,
    ObjectEnd,
    Text,
    call_name,
    overlap,
    whole_call,
)

if TYPE_CHECKING:
    from broker.wire.toolcalls import Piece

_TAG = "[TOOL_CALLS]"
_LIST = re.compile(r"\s*\[\s*(?=[{\]])")
_NAMED = re.compile(r"\s*(?P<name>[\w.-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")
_MAY_BE_HEAD = re.compile(r"[\w.\-\s\[\]]{0,300}")


class _State(enum.Enum):
    TEXT = enum.auto()
    HEAD = enum.auto()
    ENTRY = enum.auto()  # at an entry of a list
    ARGUMENTS = enum.auto()
    REST = enum.auto()  # of an entry, behind its arguments
    NEXT = enum.auto()  # between two entries


class MistralSplitter:
    """Feed it text, then finish it once."""

    def __init__(self) -> None:
        self._state = _State.TEXT
        self._held = ""
        self._listed = False
        self._markup = ""  # of a list, until one of its entries is a call
        self._end = ObjectEnd()

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        before = None
        while self._held and before is not self._state:
            before = self._state
            pieces += self._advance()
        return pieces

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        match self._state:
            case _State.TEXT:
                return [Text(held)] if held else []
            case _State.HEAD:
                return [Text(_TAG + held)]
            case _State.ENTRY:
                return self._entry_of(held)
            case _State.ARGUMENTS | _State.REST | _State.NEXT:
                return []

    def _advance(self) -> list[Piece]:
        match self._state:
            case _State.TEXT:
                return self._text()
            case _State.HEAD:
                return self._head()
            case _State.ENTRY:
                return self._entry()
            case _State.ARGUMENTS:
                return self._arguments()
            case _State.REST:
                return self._rest()
            case _State.NEXT:
                return self._next()

    def _text(self) -> list[Piece]:
        text, tag, rest = self._held.partition(_TAG)
        if tag:
            self._state, self._held = _State.HEAD, rest
        else:
            kept = overlap(text, _TAG)
            text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        return [Text(text)] if text else []

    def _head(self) -> list[Piece]:
        if found := _LIST.match(self._held):
            self._state, self._held, self._listed = _State.NEXT, self._held[found.end() :], True
            self._markup = _TAG + found.group()
            return []
        if found := _NAMED.match(self._held):
            self._state, self._held, self._listed = (
                _State.ARGUMENTS,
                self._held[found.end() :],
                False,
            )
            return [CallStart(found["name"])]
        if _MAY_BE_HEAD.fullmatch(self._held):
            return []
        self._state = _State.TEXT
        return [Text(_TAG)]

    def _entry(self) -> list[Piece]:
        head = HEAD.match(self._held)
        name = None if head is None else call_name(head["name"])
        if head is not None and name:
            self._state, self._held = _State.ARGUMENTS, self._held[head.end() :]
            self._markup = ""
            return [CallStart(name)]
        end = ObjectEnd().find(self._held)
        if end is None:
            return []
        entry, self._held, self._state = self._held[:end], self._held[end:], _State.NEXT
        return self._entry_of(entry)

    def _entry_of(self, text: str) -> list[Piece]:
        """The call that an entry is, or text."""
        markup, self._markup = self._markup, ""
        return whole_call(text) or [Text(markup + text)]

    def _arguments(self) -> list[Piece]:
        end = self._end.find(self._held)
        if end is None:
            delta, self._held = self._held, ""
            return [CallArguments(delta)]
        delta, self._held = self._held[:end], self._held[end:]
        self._end = ObjectEnd()
        if self._listed:
            self._end.find("{")  # we are inside the entry's own braces
        self._state = _State.REST if self._listed else _State.TEXT
        return [CallArguments(delta), CallEnd()]

    def _rest(self) -> list[Piece]:
        end = self._end.find(self._held)
        if end is None:
            self._held = ""
            return []
        self._held, self._state, self._end = self._held[end:], _State.NEXT, ObjectEnd()
        return []

    def _next(self) -> list[Piece]:
        self._held = self._held.lstrip(" \t\r\n,")
        if self._held.startswith("{"):
            self._state = _State.ENTRY
        elif self._held:
            self._held = self._held.removeprefix("]")
            self._state = _State.TEXT
        return []
