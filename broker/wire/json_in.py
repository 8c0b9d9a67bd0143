"""JSON text from a client to Python values, refusing what two parsers might read differently.

Refused, each with code `invalid_json` and a sentence that says why: text that is not UTF-8 or not one JSON
value, NaN and infinities (also as `1e999`), integers of more than `_INTEGER_CHARS` characters, duplicate
keys, lone surrogates (no UTF-8 exists for them: they would break the socket on the way out), nesting deeper
than `MAX_DEPTH`, more than `MAX_VALUES` values.
The size of the text is the transport's limit, applied before it gets here.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from broker.errors import BadRequest
from broker.wire.fields import as_object

if TYPE_CHECKING:
    from broker.wire.fields import Json

MAX_DEPTH = 64  # a guess: JSON schemas in tool declarations reach about 20
MAX_VALUES = 1_000_000  # a guess: a history of 10,000 items has about 100,000
_INTEGER_CHARS = 40  # above any 128-bit number, below where int() becomes slow


def parse_object(text: str | bytes) -> dict[str, Json]:
    """The one JSON object that `text` is. Raises BadRequest `invalid_json` or `invalid_type`."""
    return as_object(parse_json(text), "body")


def parse_json(text: str | bytes) -> Json:
    """The one JSON value that `text` is. Raises BadRequest `invalid_json`."""
    try:
        decoded = text if isinstance(text, str) else text.decode()
        value = json.loads(
            decoded,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_integer,
        )
    except UnicodeDecodeError:
        raise _refusal("it is not valid UTF-8") from None
    except RecursionError:
        raise _refusal(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except json.JSONDecodeError as error:
        raise _refusal(f"{error.msg} at character {error.pos}") from None
    _inspect(value)
    return value


def _refusal(why: str) -> BadRequest:
    return BadRequest(f"The JSON could not be parsed: {why}.", code="invalid_json")


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    obj = dict(pairs)
    if len(obj) != len(pairs):
        raise _refusal("an object has the same key twice")
    return obj


def _constant(name: str) -> Json:
    raise _refusal(f"{name} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _refusal("a number is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > _INTEGER_CHARS:
        raise _refusal("a number is too large")
    return int(text)


def _inspect(value: Json) -> None:
    """Walk once, without recursion: depth, count and strings."""
    level = [value]
    depth = 0
    count = 0
    while level:
        count += len(level)
        if count > MAX_VALUES:
            raise _refusal(f"it has more than {MAX_VALUES} values")
        below: list[Json] = []
        for node in level:
            if isinstance(node, str):
                _check_text(node)
            elif isinstance(node, dict):
                for key in node:
                    _check_text(key)
                below.extend(node.values())
            elif isinstance(node, list):
                below.extend(node)
        depth += any(isinstance(node, dict | list) for node in level)
        if depth > MAX_DEPTH:
            raise _refusal(f"it is nested more than {MAX_DEPTH} levels deep")
        level = below


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refusal("a string has a lone surrogate") from None
