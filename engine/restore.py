"""Restore or recompute: what it costs to bring cached blocks back, and how much of a match is worth it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestoreLimits:
    """What an operator may say about restoring."""

    deadline: float = (
        4.0  # a load may take this many times its prediction, and `floor_s`, before it is given up
    )
    floor_s: float = 0.5
    max_loading: int = 8  # sequences that read from disk at once
    decide: bool = True  # refuse a restore that would take longer than computing the tokens again
