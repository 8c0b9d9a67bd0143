"""Reading one field of a client's JSON object: its type, its bounds, and the refusal that names its path.

Laws
    Absent and null are the same. Every refusal is a `BadRequest` whose `param` is the field's path as the
    client would write it (`input[2].content`), with the codes and sentences that OpenAI's server uses.
    A value quoted back to the client is cut to `_QUOTE_CHARS`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from broker.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Json = Any  # a value as `json_in` makes it: dict, list, str, int, float, bool or None

_QUOTE_CHARS = 80
_KINDS: dict[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a decimal",
    type(None): "null",
}


def invalid_type(path: str, expected: str, got: Json) -> BadRequest:
    """`expected` with its article: "a string", "one of a string or array"."""
    return BadRequest(
        f"Invalid type for '{path}': expected {expected}, but got {_KINDS[type(got)]} instead.",
        code="invalid_type",
        param=path,
    )


def invalid_value(path: str, got: Json, supported: Iterable[str]) -> BadRequest:
    """`got` is of the right type, but not one of the values that exist."""
    values = ", ".join(f"'{value}'" for value in supported)
    return BadRequest(
        f"Invalid value: {_quote(got)}. Supported values are: {values}.",
        code="invalid_value",
        param=path,
    )


def missing(path: str) -> BadRequest:
    return BadRequest(
        f"Missing required parameter: '{path}'.", code="missing_required_parameter", param=path
    )


def unsupported(path: str, why: str) -> BadRequest:
    """A parameter that exists elsewhere and would change the result, were it not ignored here."""
    return BadRequest(
        f"Unsupported parameter: '{path}'. {why}", code="unsupported_parameter", param=path
    )


def join(path: str, key: str) -> str:
    """The path of a field of the object at `path`; "" is the request itself."""
    return f"{path}.{key}" if path else key


def optional_string(
    obj: Mapping[str, Json], key: str, *, at: str = "", max_chars: int | None = None
) -> str | None:
    value = obj.get(key)
    if value is None:
        return None
    path = join(at, key)
    if not isinstance(value, str):
        raise invalid_type(path, "a string", value)
    if max_chars is not None and len(value) > max_chars:
        raise BadRequest(
            f"Invalid '{path}': string too long. Expected a string with maximum length {max_chars}, "
            f"but got a string with length {len(value)} instead.",
            code="string_above_max_length",
            param=path,
        )
    return value


def optional_name(
    obj: Mapping[str, Json], key: str, *, at: str = "", max_chars: int = 512
) -> str | None:
    """A string that names something: never empty, never long."""
    value = optional_string(obj, key, at=at, max_chars=max_chars)
    if value == "":
        path = join(at, key)
        raise BadRequest(
            f"Invalid '{path}': empty string. Expected a string with minimum length 1, "
            "but got an empty string instead.",
            code="empty_string",
            param=path,
        )
    return value


def required_name(obj: Mapping[str, Json], key: str, *, at: str = "", max_chars: int = 512) -> str:
    value = optional_name(obj, key, at=at, max_chars=max_chars)
    if value is None:
        raise missing(join(at, key))
    return value


def required_string(obj: Mapping[str, Json], key: str, *, at: str = "") -> str:
    value = optional_string(obj, key, at=at)
    if value is None:
        raise missing(join(at, key))
    return value


def choice(
    obj: Mapping[str, Json], key: str, values: tuple[str, ...], *, default: str, at: str = ""
) -> str:
    value = optional_string(obj, key, at=at)
    if value is None:
        return default
    if value not in values:
        raise invalid_value(join(at, key), value, values)
    return value


def optional_flag(obj: Mapping[str, Json], key: str, *, at: str = "") -> bool | None:
    value = obj.get(key)
    if value is not None and not isinstance(value, bool):
        raise invalid_type(join(at, key), "a boolean", value)
    return value


def flag(obj: Mapping[str, Json], key: str, *, default: bool, at: str = "") -> bool:
    value = optional_flag(obj, key, at=at)
    return default if value is None else value


def optional_integer(
    obj: Mapping[str, Json], key: str, *, least: int, most: int, at: str = ""
) -> int | None:
    value = obj.get(key)
    if value is None:
        return None
    path = join(at, key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid_type(path, "an integer", value)
    _bound(path, value, least, most, kind="integer")
    return value


def number(
    obj: Mapping[str, Json], key: str, *, least: float, most: float, default: float, at: str = ""
) -> float:
    value = obj.get(key)
    if value is None:
        return default
    path = join(at, key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid_type(path, "a decimal", value)
    _bound(path, value, least, most, kind="decimal")
    return float(value)


def optional_object(
    obj: Mapping[str, Json], key: str, *, at: str = ""
) -> Mapping[str, Json] | None:
    value = obj.get(key)
    if value is None:
        return None
    return as_object(value, join(at, key))


def optional_array(obj: Mapping[str, Json], key: str, *, at: str = "") -> list[Json] | None:
    value = obj.get(key)
    if value is None:
        return None
    if not isinstance(value, list):
        raise invalid_type(join(at, key), "an array of objects", value)
    return value


def as_object(value: Json, path: str) -> dict[str, Json]:
    """`value` itself, if it is an object."""
    if not isinstance(value, dict):
        raise invalid_type(path, "an object", value)
    return value


def _bound(path: str, value: float, least: float, most: float, *, kind: str) -> None:
    if value < least:
        raise BadRequest(
            f"Invalid '{path}': {kind} below minimum value. Expected a value >= {least}, "
            f"but got {_quote(value)} instead.",
            code=f"{kind}_below_min_value",
            param=path,
        )
    if value > most:
        raise BadRequest(
            f"Invalid '{path}': {kind} above maximum value. Expected a value <= {most}, "
            f"but got {_quote(value)} instead.",
            code=f"{kind}_above_max_value",
            param=path,
        )


def _quote(value: Json) -> str:
    quoted = f"'{value}'" if isinstance(value, str) else json.dumps(value)
    return quoted if len(quoted) <= _QUOTE_CHARS else quoted[:_QUOTE_CHARS] + "…"
