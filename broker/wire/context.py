"""The fields of a create body that say what the prompt is made of, beside its items.

    conversation                        a string, or {id}: its items stand before `input`
    context_management                  [{type: "compaction", compact_threshold}]: at so many tokens, a summary instead
    prompt_cache_options                being there, they ask why the prefix was not found;
      .comparison_response_id           compared with that response, instead of with the turn before

What is wrong is a BadRequest with the field's path, as in `broker/wire/requests.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.errors import BadRequest
from broker.wire.fields import (
    as_object,
    invalid_type,
    invalid_value,
    optional_array,
    optional_integer,
    optional_name,
    optional_object,
    required_name,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.wire.fields import Json

_MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class CompactionRule:
    """Compact a prompt of `threshold_tokens` and more; None leaves the number to us."""

    threshold_tokens: int | None


@dataclass(frozen=True, slots=True)
class CacheQuery:
    """Asks what broke the prefix; `compared_to` names a response, None the turn before."""

    compared_to: str | None


def parse_conversation(body: Mapping[str, Json]) -> str | None:
    """The id of the conversation that a create belongs to. Raises BadRequest."""
    value = body.get("conversation")
    if value is None:
        return None
    if isinstance(value, dict):
        name = required_name(value, "id", at="conversation")
    elif isinstance(value, str):
        name = required_name(body, "conversation")
    else:
        raise invalid_type("conversation", "one of a string or object", value)
    if body.get("previous_response_id") is not None:
        raise BadRequest(
            "Mutually exclusive parameters: 'previous_response_id' and 'conversation'. "
            "Ensure you are only providing one of them.",
            code="mutually_exclusive_parameters",
            param="previous_response_id",
        )
    return name


def parse_compaction(body: Mapping[str, Json]) -> CompactionRule | None:
    """The compaction among the entries of `context_management`; the lowest threshold counts. Raises BadRequest."""
    found: list[int | None] = []
    for index, value in enumerate(optional_array(body, "context_management") or []):
        at = f"context_management[{index}]"
        entry = as_object(value, at)
        kind = required_name(entry, "type", at=at)
        if kind != "compaction":
            raise invalid_value(f"{at}.type", kind, ("compaction",))
        found.append(
            optional_integer(entry, "compact_threshold", least=1, most=_MOST_TOKENS, at=at)
        )
    if not found:
        return None
    return CompactionRule(min((one for one in found if one is not None), default=None))


def parse_cache_query(body: Mapping[str, Json]) -> CacheQuery | None:
    options = optional_object(body, "prompt_cache_options")
    if options is None:
        return None
    return CacheQuery(optional_name(options, "comparison_response_id", at="prompt_cache_options"))
