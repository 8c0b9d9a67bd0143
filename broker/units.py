"""A history cut into what can be left out of it: single items of clients, and whole outputs of the model. Pure.

An output is never cut: its sampled ids are one run of tokens, and they cover all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from broker.session import Part
from broker.wire.items import Compaction, FunctionCall, FunctionCallOutput, Message, is_output
from broker.wire.window import is_head

Parts = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest thing that stays or goes."""

    part: Part

    @property
    def is_head(self) -> bool:
        """Instructions: they never go."""
        return bool(self.part.items) and all(is_head(item) for item in self.part.items)

    @property
    def is_asked(self) -> bool:
        """Whether a turn begins here: somebody asks, or a summary stands for what was asked."""
        return any(
            isinstance(item, Compaction) or (isinstance(item, Message) and item.role == "user")
            for item in self.part.items
        )

    @property
    def is_said(self) -> bool:
        """Whether the model said it."""
        return self.part.sampled is not None or any(is_output(item) for item in self.part.items)

    @property
    def calls(self) -> set[str]:
        return {item.call_id for item in self.part.items if isinstance(item, FunctionCall)}

    @property
    def answers(self) -> set[str]:
        return {item.call_id for item in self.part.items if isinstance(item, FunctionCallOutput)}


def units(parts: Parts) -> tuple[Unit, ...]:
    found: list[Unit] = []
    for part in parts:
        if part.sampled is not None or any(is_output(item) for item in part.items):
            found.append(Unit(part))
        else:
            found += [Unit(Part((item,))) for item in part.items]
    return tuple(found)


def joined(some: tuple[Unit, ...]) -> Parts:
    return tuple(unit.part for unit in some)


def splits_a_call(all_units: tuple[Unit, ...], at: int) -> bool:
    """Whether a result behind `at` answers a call before it."""
    asked = {call for unit in all_units[:at] for call in unit.calls}
    return any(unit.answers & asked for unit in all_units[at:])
