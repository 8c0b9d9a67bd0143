"""The one encoding that keys are hashed from, and the hash. Pure.

    value     = tag (1 byte), size of the content in bytes (u64), content
    integers and sizes are little endian

    tag   value       content
    n     None        empty
    b     bool        one byte, 0 or 1
    i     int         two's complement, in bit_length // 8 + 1 bytes
    f     float       IEEE 754 binary64: 0.0 is not -0.0, and no rounding is involved
    t     str         UTF-8
    y     bytes       itself
    l     list/tuple  its values, one after the other
    m     mapping     name, value, name, value, …: in the order of the encoded names, each of them a str or an int

Laws
    Two values that differ in type or content have different encodings: everything is tagged and framed, so no field
    can imitate its neighbour, and no salt can look like a fingerprint.
    Equal values have one encoding, in every process and for ever: no `hash`, no iteration order, no locale, no repr.
    What is not in the table is refused with TypeError. A guess (`str(value)`) could give two values one key.
    A change of these bytes, or of what is hashed, changes every key: raise the number in the kind that it concerns.
    `tests/tiers/vectors` holds them still.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    Value = None | bool | int | float | str | bytes | Sequence["Value"] | Mapping[Any, "Value"]

DIGEST_BYTES = 32
_FRAME = struct.Struct("<cQ")
_FLOAT = struct.Struct("<d")


def encode(value: Value) -> bytes:
    """The bytes that stand for `value`. Raises TypeError for a type that has none, UnicodeEncodeError for half a character."""
    kind = type(value)  # exactly: True is not 1, and a subclass may mean something else
    if value is None:
        return _framed(b"n", b"")
    if kind is bool:
        return _framed(b"b", b"\1" if value else b"\0")
    if isinstance(value, int) and kind is int:
        return _framed(b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    if kind is float:
        return _framed(b"f", _FLOAT.pack(value))
    if isinstance(value, str) and kind is str:
        return _framed(b"t", value.encode())
    if isinstance(value, bytes) and kind is bytes:
        return _framed(b"y", value)
    if isinstance(value, (list, tuple)) and kind in (list, tuple):
        return _framed(b"l", b"".join(map(encode, value)))
    if isinstance(value, Mapping):
        return _framed(b"m", _pairs(value))
    raise TypeError(f"{kind.__name__} has no canonical encoding")


def digest(kind: bytes, value: Value) -> bytes:
    """32 bytes that name `value` among all values of its kind. `kind` is at most 16 bytes and ends in a version."""
    return blake2b(encode(value), digest_size=DIGEST_BYTES, person=kind).digest()


def _framed(tag: bytes, content: bytes) -> bytes:
    return _FRAME.pack(tag, len(content)) + content


def _pairs(value: Mapping[Any, Value]) -> bytes:
    if not all(type(name) in (str, int) for name in value):
        raise TypeError("a name is neither a str nor an int")
    return b"".join(
        name + encode(item) for name, item in sorted((encode(k), value[k]) for k in value)
    )
