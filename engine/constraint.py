"""What a generation may say, as a small algebra that names no library. Pure data.

    Exactly "<tool_call>\\n"        Token 128010        Json {"type": "object", …}        Regex [0-9]+        Lark start: …
    Until "</think>"               Anything            Blank
    InTurn a b c                   OneOf a b           Times a least..most

Laws
    The text of the sampled ids, control tokens included, is a beginning of what the constraint describes, at every id;
    all of it when the generation ends by itself. One that is cut by length is a beginning, and the turn says so.
    Text never stands for a control token: one that belongs to a form is a `Token`.
    `at` is the path of the client's field that a schema or grammar came from; it is for refusals only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Exactly:
    """This text."""

    text: str


@dataclass(frozen=True, slots=True)
class Token:
    """One control token."""

    id: int


@dataclass(frozen=True, slots=True)
class Json:
    """A JSON text that fits this schema, which is JSON text itself. `lenient`: keywords that cannot be enforced, and
    formats that are not known, are passed over."""

    schema: str
    at: str | None = field(default=None, compare=False)
    lenient: bool = False


@dataclass(frozen=True, slots=True)
class Regex:
    pattern: str
    at: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Lark:
    grammar: str
    at: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Until:
    """Any text, up to and with the first `end` in it."""

    end: str


@dataclass(frozen=True, slots=True)
class Anything:
    """Any text, none included."""


@dataclass(frozen=True, slots=True)
class Blank:
    """A little white space, or none."""


@dataclass(frozen=True, slots=True)
class InTurn:
    parts: tuple[Constraint, ...]


@dataclass(frozen=True, slots=True)
class OneOf:
    options: tuple[Constraint, ...]


@dataclass(frozen=True, slots=True)
class Times:
    part: Constraint
    least: int
    most: int | None  # None: as often as it likes


Constraint = (
    Exactly | Token | Json | Regex | Lark | Until | Anything | Blank | InTurn | OneOf | Times
)


class ConstraintRefused(ValueError):
    """A schema or grammar that cannot be enforced: malformed, unsupported, or too long to compile."""

    def __init__(self, message: str, at: str | None) -> None:
        super().__init__(message)
        self.at = at


def leaves(constraint: Constraint) -> Iterator[Json | Regex | Lark]:
    """What clients wrote in it, in order."""
    match constraint:
        case Json() | Regex() | Lark():
            yield constraint
        case InTurn(parts) | OneOf(parts):
            for part in parts:
                yield from leaves(part)
        case Times(part):
            yield from leaves(part)
        case Exactly() | Token() | Until() | Anything() | Blank():
            return


def first_at(constraint: Constraint) -> str | None:
    """The field to blame when it cannot be said more exactly."""
    return next((leaf.at for leaf in leaves(constraint) if leaf.at is not None), None)
