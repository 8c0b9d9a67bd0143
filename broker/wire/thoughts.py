"""Sampled text to thoughts and the rest: a model that reasons aloud does so first, between two tags.

Laws
    However the text is cut into pieces, the joined thoughts and the joined rest are the same.
    Thoughts are what stands between the tags at the very beginning; a tag anywhere later is text. Where the template
    has opened them already (`inside`), only the closing tag is looked for.
    White space around the tags is markup. All else is held only while it may be a tag.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.wire.toolcalls import Text, overlap

if TYPE_CHECKING:
    from engine.text import Markers


@dataclass(frozen=True, slots=True)
class Thought:
    text: str


class _State(enum.Enum):
    BEFORE = enum.auto()
    OPENED = enum.auto()  # white space after the opening tag
    INSIDE = enum.auto()
    CLOSED = enum.auto()  # white space after the closing tag
    AFTER = enum.auto()


class ThoughtSplitter:
    """Feed it text, then finish it once."""

    def __init__(self, markers: Markers, *, inside: bool) -> None:
        self._markers = markers
        self._state = _State.OPENED if inside else _State.BEFORE
        self._held = ""

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends in thoughts."""
        return self._state in (_State.OPENED, _State.INSIDE)

    @property
    def holds(self) -> bool:
        """Whether some of the text is not decided yet."""
        return bool(self._held)

    def feed(self, text: str) -> list[Thought | Text]:
        self._held += text
        pieces: list[Thought | Text] = []
        before = None
        while self._held and before is not self._state:
            before = self._state
            pieces += self._advance()
        return pieces

    def finish(self) -> list[Thought | Text]:
        held, self._held = self._held, ""
        match self._state:
            case _State.BEFORE | _State.AFTER:
                return [Text(held)] if held else []
            case _State.INSIDE:
                thought = held.rstrip()
                return [Thought(thought)] if thought else []
            case _State.OPENED:
                return [Thought(held)] if held.strip() else []
            case _State.CLOSED:
                return []

    def _advance(self) -> list[Thought | Text]:
        match self._state:
            case _State.BEFORE:
                bare = self._held.lstrip()
                if bare.startswith(self._markers.open):
                    self._held = bare.removeprefix(self._markers.open)
                    self._state = _State.OPENED
                elif not self._markers.open.startswith(bare):
                    self._state = _State.AFTER
                return []
            case _State.OPENED | _State.CLOSED:
                self._held = self._held.lstrip()
                if self._held:
                    opened = self._state is _State.OPENED
                    self._state = _State.INSIDE if opened else _State.AFTER
                return []
            case _State.INSIDE:
                thought, tag, rest = self._held.partition(self._markers.close)
                if tag:
                    self._state, self._held, thought = _State.CLOSED, rest, thought.rstrip()
                else:
                    whole = thought[: len(thought) - overlap(thought, self._markers.close)].rstrip()
                    thought, self._held = whole, thought[len(whole) :]
                return [Thought(thought)] if thought else []
            case _State.AFTER:
                text, self._held = self._held, ""
                return [Text(text)]
