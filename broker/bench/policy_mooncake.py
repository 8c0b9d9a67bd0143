"""Reads traces in the format that Mooncake published: one JSON object a line, content as hashes of 512 tokens.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, 49, ...]}

`timestamp` is in milliseconds. Equal hash ids mean equal content and equal content before it, so they are units as
`policy_trace` has them. Fields that are not named here are nobody's business.

What the format does not say, and what is made of it
    Sessions. A request belongs to the session that last ended inside it, at a whole hash; else it begins one.
    What a turn waits for. Every answer is taken to be text: HUMAN_WAIT. Nobody ever closes.
    Which later content is the answer. It is left out; where it comes back in a prompt, it counts as new there.
    The hash of the last, partial 512 tokens. Some writers leave it out: that rest is content of its own.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from broker.bench.policy_trace import Turn
from tiers.policy import SessionClass

if TYPE_CHECKING:
    from collections.abc import Iterable

UNIT_TOKENS = 512


class BadTrace(Exception):
    """A line is no request; the message begins with its number."""


def read(lines: Iterable[str]) -> list[Turn]:
    """All requests, in order of time; those of the same time in the file's order. Raises BadTrace."""
    requests = [_request(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    requests.sort(key=lambda request: request[0])
    units: dict[tuple[int, object], int] = {}  # {(unit before it, content): unit}
    ends: dict[int, int] = {}  # {last whole unit of a session's latest prompt: session}
    turns = []
    for number, (at, tokens, hashes) in enumerate(requests):
        rest = [(number, place) for place in range(len(hashes), math.ceil(tokens / UNIT_TOKENS))]
        chain: list[int] = []
        for content in [*hashes, *rest]:
            before = chain[-1] if chain else -1
            chain.append(units.setdefault((before, content), len(units)))
        end = next((unit for unit in reversed(chain) if unit in ends), None)
        session = number if end is None else ends.pop(end)
        if tokens >= UNIT_TOKENS:
            ends[chain[tokens // UNIT_TOKENS - 1]] = session
        turns.append(Turn(at, session, tuple(chain), (), SessionClass.HUMAN_WAIT))
    return turns


def _request(number: int, line: str) -> tuple[float, int, list[int]]:
    """(seconds, prompt tokens, hashes)"""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise BadTrace(f"line {number}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadTrace(f"line {number}: not a JSON object")
    at = value.get("timestamp")
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at < math.inf:
        raise BadTrace(f"line {number}: timestamp must be milliseconds from the start, not {at!r}")
    tokens = value.get("input_length")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise BadTrace(f"line {number}: input_length must be a number of tokens, not {tokens!r}")
    hashes = value.get("hash_ids")
    if not isinstance(hashes, list) or not all(type(each) is int for each in hashes):
        raise BadTrace(f"line {number}: hash_ids must be a list of whole numbers")
    whole, partial = tokens // UNIT_TOKENS, math.ceil(tokens / UNIT_TOKENS)
    if len(hashes) not in (whole, partial):
        raise BadTrace(
            f"line {number}: {tokens} tokens are {partial} hashes of {UNIT_TOKENS}, not {len(hashes)}"
        )
    return at / 1000, tokens, hashes
