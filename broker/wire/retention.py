"""How long a client asks for its prompt's KV to be kept, in every dialect's words, and what it is granted. Pure.

    prompt_cache_options.ttl              "30m", "12h", or any whole number of s, m or h; "30m" if only the options are
                                          there, but nothing for mode "explicit" without a breakpoint
    prompt_cache_breakpoint.ttl           the same, on a content part of the input
    prompt_cache_retention                "in_memory" or "24h": deprecated, and still sent
    cache_control.ttl                     Anthropic's: "5m" or "1h", and "5m" where it is left out

Laws
    A time is a protection, never a promise to delete: what expires is merely evicted like everything else.
    Of several wishes in one request the longest counts. What is granted is never more than the operator allows, and
    the client is told. A breakpoint is a wish for the whole prompt: our prefixes match anywhere, so its place says nothing.
    Where the published schema allows no breakpoint, one is refused: elsewhere it would mean nothing, silently.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.errors import BadRequest
from broker.wire.fields import (
    choice,
    flag,
    invalid_value,
    join,
    optional_name,
    optional_object,
    optional_string,
    required_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from broker.wire.fields import Json

_UNITS_S = {"s": 1, "m": 60, "h": 3600}
_RETENTIONS_S = {"in_memory": 300.0, "in-memory": 300.0, "24h": 86400.0}
_DEFAULT_TTL, _DEFAULT_TTL_S = "30m", 1800.0  # of options that name none, as published
_MARKED_PARTS = ("input_text", "input_image", "input_file")
_CACHE_CONTROLS_S = {"5m": 300.0, "1h": 3600.0}


@dataclass(frozen=True, slots=True)
class Retention:
    """What the operator grants, in seconds."""

    default_s: float = 0.0
    max_s: float = 86400.0

    def grant(self, asked_s: float | None) -> float:
        return min(self.default_s if asked_s is None else asked_s, self.max_s)


def asked_ttl(body: Mapping[str, Json]) -> float | None:
    """The longest time that a Responses body asks for; None if it asks for none. Raises BadRequest."""
    asked: list[float] = []
    given = optional_object(body, "prompt_cache_options")
    options = given or {}
    mode = choice(
        options, "mode", ("implicit", "explicit"), default="implicit", at="prompt_cache_options"
    )
    flag(options, "prewarm", default=False, at="prompt_cache_options")
    optional_name(options, "comparison_response_id", at="prompt_cache_options")
    asked += _ttl(options, "prompt_cache_options")
    retention = optional_string(body, "prompt_cache_retention")
    if retention is not None:
        if retention not in _RETENTIONS_S:
            raise invalid_value("prompt_cache_retention", retention, ("in_memory", "24h"))
        asked.append(_RETENTIONS_S[retention])
    breakpoints = list(_breakpoints(body.get("input")))
    if given is not None and given.get("ttl") is None and (mode == "implicit" or breakpoints):
        asked.append(_DEFAULT_TTL_S)
    for path, marked in breakpoints:
        choice(marked, "mode", ("explicit",), default="explicit", at=path)
        asked += _ttl(marked, path)
    return max(asked, default=None)


def applied_options(body: Mapping[str, Json]) -> dict[str, Json] | None:
    """`prompt_cache_options` as the response repeats them, with the defaults that its published schema requires."""
    options = optional_object(body, "prompt_cache_options")
    if options is None:
        return None
    given = {key: value for key, value in options.items() if value is not None}
    return {"mode": "implicit", "ttl": _DEFAULT_TTL, **given}


def cache_control_ttl(control: Mapping[str, Json], at: str) -> float:
    """The seconds that one of Anthropic's `cache_control` objects asks for. Raises BadRequest."""
    kind = required_name(control, "type", at=at)
    if kind != "ephemeral":
        raise invalid_value(join(at, "type"), kind, ("ephemeral",))
    return _CACHE_CONTROLS_S[choice(control, "ttl", tuple(_CACHE_CONTROLS_S), default="5m", at=at)]


def _ttl(obj: Mapping[str, Json], at: str) -> list[float]:
    text = optional_string(obj, "ttl", at=at)
    if text is None:
        return []
    found = re.fullmatch(r"([1-9][0-9]{0,8})([smh])", text)
    if found is None:
        raise BadRequest(
            f"Invalid value: '{text[:80]}'. Expected a whole number of seconds, minutes or hours,"
            " such as '30m' or '12h'.",
            code="invalid_value",
            param=join(at, "ttl"),
        )
    return [float(int(found[1]) * _UNITS_S[found[2]])]


def _breakpoints(items: Json) -> Iterator[tuple[str, Mapping[str, Json]]]:
    """Each breakpoint in an input, with its path. What is no item or part is left to others. Raises BadRequest."""
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if not isinstance(item, dict):
            continue
        if item.get("prompt_cache_breakpoint") is not None:
            raise _misplaced(f"input[{index}]")
        for key in ("content", "output"):
            content = item.get(key)
            for place, part in enumerate(content if isinstance(content, list) else ()):
                at = f"input[{index}].{key}[{place}]"
                if isinstance(part, dict):
                    marked = optional_object(part, "prompt_cache_breakpoint", at=at)
                    if marked is not None:
                        if part.get("type") not in _MARKED_PARTS:
                            raise _misplaced(at)
                        yield join(at, "prompt_cache_breakpoint"), marked


def _misplaced(at: str) -> BadRequest:
    kinds = ", ".join(_MARKED_PARTS)
    return BadRequest(
        f"A 'prompt_cache_breakpoint' may stand on content of these types only: {kinds}.",
        code="invalid_value",
        param=join(at, "prompt_cache_breakpoint"),
    )
