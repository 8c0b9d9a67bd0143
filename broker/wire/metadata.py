"""`metadata`: up to 16 pairs of short strings that a client hangs on a response or a conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.errors import BadRequest
from broker.wire.fields import invalid_type, join, optional_object, optional_string

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.wire.fields import Json

_METADATA_PAIRS, _METADATA_KEY_CHARS, _METADATA_VALUE_CHARS = 16, 64, 512


def parse_metadata(body: Mapping[str, Json]) -> dict[str, str]:
    """The pairs, none if there are none. Raises BadRequest."""
    pairs = optional_object(body, "metadata") or {}
    if len(pairs) > _METADATA_PAIRS:
        raise BadRequest(
            f"Invalid 'metadata': too many properties. Expected an object with at most "
            f"{_METADATA_PAIRS} properties, but got an object with {len(pairs)} properties instead.",
            code="object_above_max_properties",
            param="metadata",
        )
    for key in pairs:
        if len(key) > _METADATA_KEY_CHARS:
            raise BadRequest(
                f"Invalid 'metadata': a key is longer than {_METADATA_KEY_CHARS} characters.",
                code="string_above_max_length",
                param="metadata",
            )
        if optional_string(pairs, key, at="metadata", max_chars=_METADATA_VALUE_CHARS) is None:
            raise invalid_type(join("metadata", key), "a string", None)
    return dict(pairs)
