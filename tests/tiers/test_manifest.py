"""Manifests: whole or refused, whatever the bytes."""

import dataclasses
import struct

import msgpack
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from tiers import manifest as format_
from tiers.block import BlockKey, StoreError
from tiers.manifest import Manifest, decode, encode

names = st.text(st.characters(codec="utf-8"), max_size=40)
keys = st.binary(min_size=32, max_size=32).map(BlockKey)


@st.composite
def manifests(draw):
    tokens = tuple(draw(st.lists(st.integers(0, 2**32 - 1), max_size=50)))
    return Manifest(
        response_id=draw(names.filter(bool)),
        tenant=draw(names),
        session=draw(names),
        parent=draw(st.none() | names),
        created_at=draw(st.floats(allow_nan=False, allow_infinity=False)),
        stored=draw(st.booleans()),
        tokens=tokens,
        sampled_from=draw(st.integers(0, len(tokens))),
        item_ids=tuple(draw(st.lists(names, max_size=5))),
        content_digest=draw(st.binary(max_size=32)),
        keys=tuple(draw(st.lists(keys, max_size=5))),
        body=draw(st.binary(max_size=100)),
        text=draw(st.binary(max_size=32)),
    )


PLAIN = Manifest("resp_1", "", "s", None, 1.5, True, (1, 2, 3), 2, ("msg_1",), b"d" * 32, (BlockKey(b"k" * 32),), b"{}")  # fmt: skip


def sealed(fields: object) -> bytes:
    packed = msgpack.packb(fields)
    return xxhash.xxh3_128_digest(packed) + packed


def fields() -> dict:
    return msgpack.unpackb(encode(PLAIN)[16:])


def refused(data: bytes) -> None:
    with pytest.raises(StoreError) as caught:
        decode(data)
    assert caught.value.reason == "manifest"


@given(manifests())
def test_what_was_encoded_is_decoded(manifest):
    assert decode(encode(manifest)) == manifest


def test_tokens_are_little_endian_u32():
    assert fields()["tokens"] == struct.pack("<3I", 1, 2, 3)


def test_every_single_flipped_bit_is_refused():
    data = encode(PLAIN)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(bytes(flipped))


@given(st.binary(max_size=300))
def test_bytes_of_any_kind_are_refused(data):
    refused(data)
    refused(xxhash.xxh3_128_digest(data) + data)
    refused(encode(PLAIN) + data + b"\0")


any_value = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@given(st.sampled_from(sorted(format_._FIELDS)), any_value)
def test_a_field_of_another_kind_is_refused_or_legal(name, value):
    """A checksum protects from accidents, not from a file someone made; the parser behind it must hold alone."""
    try:
        found = decode(sealed({**fields(), name: value}))
    except StoreError:
        refused(sealed({**fields(), name: value}))
    else:
        assert decode(encode(found)) == found


@pytest.mark.parametrize(
    "change",
    [
        {"v": 1},
        {"v": 3},
        {"v": True},
        {"response_id": ""},
        {"response_id": "x" * (format_.MAX_NAME_CHARS + 1)},
        {"item_ids": ["x" * (format_.MAX_NAME_CHARS + 1)]},
        {"item_ids": ["x"] * (format_.MAX_ITEMS + 1)},
        {"tenant": None},
        {"parent": 0},
        {"stored": 1},
        {"created_at": float("nan")},
        {"created_at": True},
        {"sampled_from": 4},
        {"sampled_from": -1},
        {"sampled_from": True},
        {"tokens": b"123"},
        {"tokens": [1, 2, 3]},
        {"keys": b"k" * 33},
        {"content_digest": b"d" * (format_.MAX_DIGEST_BYTES + 1)},
        {"body": "{}"},
        {"text": ""},
        {"text": b"d" * (format_.MAX_DIGEST_BYTES + 1)},
        {"more": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_over_a_limit_or_of_another_type_is_refused(change):
    refused(sealed({**fields(), **change}))


def test_a_missing_field_and_a_key_that_is_no_text_are_refused():
    refused(sealed({name: value for name, value in fields().items() if name != "session"}))
    refused(sealed({**fields(), 1: 2}))
    refused(sealed([1, 2]))


@pytest.mark.parametrize(
    "change",
    [
        {"item_ids": ("x",) * (format_.MAX_ITEMS + 1)},
        {"session": "x" * (format_.MAX_NAME_CHARS + 1)},
        {"session": "half a pair \ud800"},
        {"sampled_from": 4},
        {"keys": (BlockKey(b"short"),)},
        {"created_at": float("inf")},
        {"body": bytes(format_.MAX_BODY_BYTES + 1)},
        {"tokens": (0,) * (format_.MAX_TOKENS + 1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_could_not_be_read_back_is_not_written(change):
    with pytest.raises(StoreError) as caught:
        encode(dataclasses.replace(PLAIN, **change))
    assert caught.value.reason == "manifest"
