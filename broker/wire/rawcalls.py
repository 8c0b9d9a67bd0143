"""A call of a custom tool whose input must fit a grammar: not JSON, but the input itself, to the end of the answer.

    <tool_call>{"name": "apply_patch"}
    *** Begin Patch
    …
    </tool_call>

No template has such a form; it is ours, and is said only by a model that is made to (`broker/forms.py`). Escaped into a
JSON string, a grammar's terminals would be other terminals.

Laws: those of `toolcalls.py`. The closing tag is markup where the answer ends, and input everywhere else.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.wire.toolcalls import CallEnd, CallStart, Text, call_name, overlap

if TYPE_CHECKING:
    from collections.abc import Iterable

    from broker.wire.toolcalls import Piece

OPEN = "<tool_call>"
CLOSE = "\n</tool_call>"
_HEAD = re.compile(r'<tool_call>\{"name": (?P<name>"(?:[^"\\]|\\.)+")\}\n')
_MAY_BE_HEAD = re.compile(r'<tool_call>(?:\{"name": "(?:[^"\\]|\\.)*(?:"\}?)?)?')


@dataclass(frozen=True, slots=True)
class CallInput:
    """More of a custom tool's input, as it is."""

    delta: str


class _State(enum.Enum):
    TEXT = enum.auto()
    HEAD = enum.auto()
    INPUT = enum.auto()


class RawCallSplitter:
    """Takes raw calls of the tools called `names` out of a text; what else there is, is text."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._state = _State.TEXT
        self._held = ""

    def feed(self, text: str) -> list[Piece | CallInput]:
        self._held += text
        pieces: list[Piece | CallInput] = []
        before = None
        while self._held and before is not self._state:
            before = self._state
            pieces += self._advance()
        return pieces

    def finish(self) -> list[Piece | CallInput]:
        held, self._held = self._held, ""
        if self._state is not _State.INPUT:
            return [Text(held)] if held else []
        if held == CLOSE:
            return [CallEnd()]
        return [CallInput(held)] if held else []

    def _advance(self) -> list[Piece | CallInput]:
        match self._state:
            case _State.TEXT:
                before, tag, rest = self._held.partition(OPEN)
                kept = "" if tag else before[len(before) - overlap(before, OPEN) :]
                text = before[: len(before) - len(kept)]
                self._held = tag + rest or kept
                if tag:
                    self._state = _State.HEAD
                return [Text(text)] if text else []
            case _State.HEAD:
                return self._head()
            case _State.INPUT:
                whole = len(self._held) - (
                    len(CLOSE) if self._held.endswith(CLOSE) else overlap(self._held, CLOSE)
                )
                delta, self._held = self._held[:whole], self._held[whole:]
                return [CallInput(delta)] if delta else []

    def _head(self) -> list[Piece | CallInput]:
        found = _HEAD.match(self._held)
        name = None if found is None else call_name(found["name"])
        if found is not None and name in self._names:
            self._state, self._held = _State.INPUT, self._held[found.end() :]
            return [CallStart(name)]
        if found is None and _undecided(self._held):
            return []
        self._state, self._held = _State.TEXT, self._held[len(OPEN) :]
        return [Text(OPEN)]


def _undecided(held: str) -> bool:
    """Whether it is a beginning of a head."""
    return bool(_MAY_BE_HEAD.fullmatch(held)) or (OPEN + '{"name": ').startswith(held)
