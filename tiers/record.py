"""The on-disk form of one block, and the only code that believes or refuses such bytes. Pure.

A record is a head and a payload. All integers are little endian:

    offset      size  field
    0           4     magic "HPKV"
    4           2     format version, 2
    6           2     (16 + head size) / 512
    8           32    fingerprint of the model and its KV format
    40          32    key
    72          32    parent
    104         8     payload size in bytes
    112         8     created, seconds since the epoch, f64
    120         4     token count n
    124         4     zero
    128         16    checksum: xxh3-128 of the head with these 16 bytes zero, then the payload
    144         4*n   token ids, u32
    144 + 4*n         zeros up to 16 less than a multiple of 512: the head's end
    head size         payload

The head is padded so that a tail's record is as long as a full block's: equal sizes keep LMDB's free list whole
(measured: file/live 1.00 for one size, 1.71 for mixed sizes). And LMDB puts 16 bytes of its own before a record, at the
beginning of a page: so a payload begins with a sector of the disk, which can put it where it belongs (data_file.py).

Laws
    `verify` returns a payload, and `extract` returns, only if every byte of the record is as it was written and the record is the one that
    was asked for. A record under another key (a misdirected write) or of another model is refused like a torn one.
    The key is a hash, so equal keys already mean equal tokens; tokens are compared all the same, because a cache
    that answers with another prompt's KV is worse than none.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from tiers.block import BlockKey, StoreError
from tiers.hashed_copy import fill_hashed

if TYPE_CHECKING:
    from tiers.block import TokenIds
    from tiers.hashed_copy import Fill, Hasher

MAGIC = b"HPKV"
VERSION = 2
ALIGNMENT = (
    512  # bytes; holds the fixed part and 88 token ids, so one unit for block_tokens up to 88
)
PAGE_HEAD_BYTES = 16  # LMDB's, before the record
BLANK = b"\xff"  # in every byte: NaN, whatever the element type
_FIXED = struct.Struct("<4sHH32s32s32sQdII16s")
_CHECKSUM = slice(128, 144)
_NO_CHECKSUM = bytes(16)


def head_size(token_count: int) -> int:
    """Bytes before the payload."""
    return _units(token_count) * ALIGNMENT - PAGE_HEAD_BYTES


def encode_head(
    *,
    fingerprint: bytes,
    key: BlockKey,
    parent: BlockKey,
    tokens: TokenIds,
    created: float,
    payload: memoryview,
) -> bytes:
    """The head that goes before `payload`; it covers the payload, so neither may change afterwards."""
    assert len(fingerprint) == len(key) == len(parent) == 32
    assert payload.contiguous
    size = head_size(len(tokens))
    head = bytearray(size)
    units = _units(len(tokens))
    fixed = (
        MAGIC,
        VERSION,
        units,
        fingerprint,
        key,
        parent,
        payload.nbytes,
        created,
        len(tokens),
        0,
    )
    _FIXED.pack_into(head, 0, *fixed, _NO_CHECKSUM)
    struct.pack_into(f"<{len(tokens)}I", head, _FIXED.size, *tokens)
    covered = hasher(head)
    covered.update(payload)
    head[_CHECKSUM] = covered.digest()
    return bytes(head)


@dataclass(frozen=True, slots=True)
class Asked:
    """The record that is looked for: its head must name all of this."""

    fingerprint: bytes
    key: BlockKey
    parent: BlockKey
    tokens: TokenIds


def verify(record: memoryview, asked: Asked) -> memoryview:
    """The payload, a view into `record`.

    Raises `StoreError` with reason size, magic, version, fingerprint, key, tokens or checksum. The checks that need
    no payload come first; the checksum is the one that makes the others trustworthy.
    """
    head = bytearray(record[: _head_within(record.nbytes, asked)])
    payload_size, checksum = _open_head(head, record.nbytes, asked)
    payload = record[record.nbytes - payload_size :]
    found = hasher(head)
    found.update(payload)
    _compare(found.digest(), checksum, asked.key)
    return payload


def extract(fill: Fill, size: int, into: memoryview, asked: Asked) -> None:
    """Put the payload of a record of `size` bytes `into`, as long as a payload, and verify what arrived there.

    Raises what `verify` does, and what `fill` does. The payload is not asked for before the head is believed.
    What is refused never stays in `into`: it is as it was, or, once bytes of a payload went there, blank. This costs
    little more than a copy, and `verify` with a copy a third more (hashed_copy.py).
    """
    head = bytearray(_head_within(size, asked))
    fill(0, memoryview(head))
    payload_size, checksum = _open_head(head, size, asked)
    if payload_size != into.nbytes:
        raise StoreError("size", f"{payload_size} bytes of payload where {into.nbytes} belong")
    found = hasher(head)
    good = False
    try:
        fill_hashed(fill, len(head), into, found)
        _compare(found.digest(), checksum, asked.key)
        good = True
    finally:
        if not good:
            into[:] = BLANK * into.nbytes


def hasher(head: bytearray | bytes) -> Hasher:
    """Begun with a head whose checksum is zeros; the payload follows."""
    # xxhash lets go of the GIL: two threads hash at twice the rate of one (24 GB/s, measured on 1.44 MiB).
    begun: Hasher = xxhash.xxh3_128(head)
    return begun


def _units(token_count: int) -> int:
    """Sectors that the head fills, with LMDB's."""
    return -(-(PAGE_HEAD_BYTES + _FIXED.size + 4 * token_count) // ALIGNMENT)


def _head_within(size: int, asked: Asked) -> int:
    """Bytes of the head of a record of `size`."""
    expected = head_size(len(asked.tokens))
    if size < expected:
        raise StoreError("size", f"record of {size} bytes is shorter than its head")
    return expected


def _open_head(head: bytearray, size: int, asked: Asked) -> tuple[int, bytes]:
    """The payload's size and the checksum, which is zeros in `head` from then on.

    `head` begins the record of `size` bytes that was asked for, if the checksum holds.
    """
    key, tokens = asked.key, asked.tokens
    (
        magic,
        version,
        units,
        found_fingerprint,
        found_key,
        found_parent,
        payload_size,
        _created,
        token_count,
        zero,
        checksum,
    ) = _FIXED.unpack_from(head)
    if magic != MAGIC:
        raise StoreError("magic", f"record begins with {magic!r}")
    if version != VERSION:
        raise StoreError("version", f"record format {version}, this is format {VERSION}")
    if found_fingerprint != asked.fingerprint:
        raise StoreError("fingerprint", "record was computed by another model or KV format")
    if found_key != key or found_parent != asked.parent:
        raise StoreError("key", f"asked for {key.hex()[:16]}, found {found_key.hex()[:16]}")
    if token_count != len(tokens) or zero:
        raise StoreError("tokens", f"record holds {token_count} tokens, asked for {len(tokens)}")
    if struct.unpack_from(f"<{len(tokens)}I", head, _FIXED.size) != tokens:
        raise StoreError("tokens", "record holds other tokens than asked for")
    if units != _units(len(tokens)) or len(head) + payload_size != size:
        raise StoreError("size", f"record of {size} bytes claims {payload_size} of payload")
    head[_CHECKSUM] = _NO_CHECKSUM
    return payload_size, checksum


def _compare(found: bytes, checksum: bytes, key: BlockKey) -> None:
    if found != checksum:
        raise StoreError("checksum", f"checksum of {key.hex()[:16]} does not match its bytes")
