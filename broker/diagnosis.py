"""`prompt_cache_diagnostics`: whether a prompt found what another one left in the cache, and if not, why. Pure.

Measured, not guessed: the two prompts' tokens are compared, and the engine counted what it did not compute.

Laws
    A miss is a prompt that leaves the other's tokens; `reason` is the field that made it do so.
    A prompt that goes on from the other and still was computed is no fault of the request, and no published reason
    says so: it is `unavailable`, with ours beside it; `homeport:recomputed` has the cause.
    KV is found by its tokens, under any model alias, cache key or service tier: those are never a reason here.
    The text's format and verbosity and the effort are one only where nothing else changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.divergence import diverged_at
from broker.units import units
from broker.wire.items import Compaction

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.session import Node
    from broker.units import Parts
    from broker.wire.requests import TurnRequest
    from tiers.block import TokenIds

NOT_FOUND: Mapping[str, Any] = {"type": "comparison_response_not_found"}
UNAVAILABLE: Mapping[str, Any] = {"type": "unavailable"}
_NOT_KEPT: Mapping[str, Any] = {"type": "unavailable", "homeport:reason": "not_kept"}


def diagnose(
    compared: Node,
    *,
    prompt: TokenIds,
    cached_tokens: int,
    request: TurnRequest,
    parts: Parts,
) -> Mapping[str, Any]:
    at = diverged_at(compared.tokens, prompt)
    if at is None:
        # One token is computed for its logits, and the last sampled one was never fed.
        reachable = min(len(compared.tokens), len(prompt)) - 1
        return {"type": "cache_hit"} if cached_tokens >= reachable else _NOT_KEPT
    return {
        "type": "cache_miss",
        "reason": _reason(compared, request, parts),
        "cache_missed_tokens": len(prompt) - at,
        "comparison_reusable_tokens": at,
    }


def _reason(compared: Node, request: TurnRequest, parts: Parts) -> str:
    if not compared.history_known:
        return "input_changed"
    if _windows(parts) - _windows(compared.history):
        return "context_compacted"
    if request.tools != compared.tools:
        return "tools_changed"
    before, now = units(compared.history), units(parts)
    if request.instructions == compared.instructions and now[: len(before)] == before:
        then = compared.response or {}
        for reason, *path in _FIELDS:
            if _at(then, path) != _at(request.echo, path):
                return reason
    return "input_changed"


_FIELDS = (
    ("reasoning_effort_changed", "reasoning", "effort"),
    ("text_format_changed", "text", "format"),
    ("verbosity_changed", "text", "verbosity"),
)


def _windows(parts: Parts) -> set[str]:
    return {item.encrypted for p in parts for item in p.items if isinstance(item, Compaction)}


def _at(value: Any, path: list[str]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value
