"""Sampled text to text and tool calls in the form that Llama 3's templates teach: an answer that is a call is nothing else.

    {"name": "look_up", "parameters": {"key": "value"}}
    <|python_tag|>{"type": "function", "name": "look_up", "parameters": {}}; {"name": …}

Laws: those of `toolcalls.py`. Where an answer does not begin with a call, all of it is text. What is held is only what
may still be a call's head; several calls may follow each other, with ';' or ',' between them.

    START ── a head ──> ARGUMENTS ── its last brace ──> TAIL ── '}' ──> START
      └── what can be no head ──> TEXT
"""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING

from broker.wire.toolcalls import (
    CallArguments,
    CallEnd,
    CallStart,
    ObjectEnd,
    Text,
    call_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from broker.wire.toolcalls import Piece

_TAG = "<|python_tag|>"
_BETWEEN = re.compile(r"\s*[;,]?\s*")
_STRING = re.compile(r'"(?P<text>(?:[^"\\]|\\.)*)"')
_OPEN_STRING = re.compile(r'"(?:[^"\\]|\\.)*\\?')
_NAME = ('"name"', ":", _STRING)
_TYPE = ('"type"', ":", '"function"')
_HEADS = tuple(
    ("{", *begin, ",", key, ":", "{")
    for begin in (_NAME, (*_TYPE, ",", *_NAME), (*_NAME, ",", *_TYPE))
    for key in ('"parameters"', '"arguments"')
)


class _State(enum.Enum):
    START = enum.auto()
    ARGUMENTS = enum.auto()
    TAIL = enum.auto()
    TEXT = enum.auto()


class LlamaSplitter:
    """Feed it text, then finish it once."""

    def __init__(self) -> None:
        self._state = _State.START
        self._held = ""
        self._called = False
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
        """Separators behind the last call are nobody's text."""
        held, self._held = self._held, ""
        if self._state is not _State.START or (
            self._called and not _BETWEEN.sub("", held, count=1)
        ):
            return []
        return [Text(held)] if held else []

    def _advance(self) -> list[Piece]:
        match self._state:
            case _State.START:
                return self._start()
            case _State.ARGUMENTS:
                return self._arguments()
            case _State.TAIL:
                self._held = self._held.lstrip()
                if self._held:
                    self._held = self._held.removeprefix("}")
                    self._state = _State.START
                return []
            case _State.TEXT:
                text, self._held = self._held, ""
                return [Text(text)]

    def _start(self) -> list[Piece]:
        begin = _BETWEEN.match(self._held) if self._called else None
        at = begin.end() if begin is not None else len(self._held) - len(self._held.lstrip())
        if self._held.startswith(_TAG, at):
            at += len(_TAG)
        elif _TAG.startswith(self._held[at:]):
            return []
        found = _head(self._held, at)
        if found is None:
            return []
        name, end = found
        if name is None:
            self._state = _State.TEXT
            return []
        self._state, self._held = _State.ARGUMENTS, self._held[end:]
        self._called = True
        return [CallStart(name)]

    def _arguments(self) -> list[Piece]:
        end = self._end.find(self._held)
        if end is None:
            delta, self._held = self._held, ""
            return [CallArguments(delta)]
        delta, self._held = self._held[:end], self._held[end:]
        self._state, self._end = _State.TAIL, ObjectEnd()
        return [CallArguments(delta), CallEnd()]


def _head(text: str, at: int) -> tuple[str | None, int] | None:
    """A call's name and where its arguments' brace is. No name: it is no head. None: it may become one."""
    undecided = False
    for steps in _HEADS:
        found = _follow(steps, text, at)
        if found is None:
            undecided = True
        elif found[0] is not None:
            return found
    return None if undecided else (None, at)


def _follow(
    steps: Iterable[str | re.Pattern[str]], text: str, at: int
) -> tuple[str | None, int] | None:
    name: str | None = None
    for step in steps:
        at = len(text) - len(text[at:].lstrip())
        if at == len(text):
            return None
        if isinstance(step, re.Pattern):
            found = step.match(text, at)
            if found is None:
                return None if _OPEN_STRING.fullmatch(text, at) else (None, at)
            name, at = call_name(found.group()), found.end()
            if not name:
                return None, at
        elif text.startswith(step, at):
            at += len(step)
        else:
            return None if step.startswith(text[at:]) else (None, at)
    return name, at - 1
