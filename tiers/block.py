"""What a block is: its key, its tier, its entry in the tables, and the actions that move its bytes.

Laws
    A key names content: equal keys mean equal bytes, for ever, in every process. Keys are 256-bit BLAKE2b over the
    encoding of `tiers.canonical`; no random seed, no Python `hash`. All the same, whoever finds a block by its key
    compares its tokens and its parent: a hash is a promise, the tokens are the fact.
    A chain is implicit: a block's key covers its parent's key, so it covers every token before it.
    Actions are issued by `TieredCache` and performed by whoever owns the memory; each issued action is answered by
    exactly one of landed or failed.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, NewType

from tiers.canonical import digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiers.policy import SessionClass

BlockKey = NewType("BlockKey", bytes)  # 32 bytes
Slot = NewType("Slot", int)  # index of a place inside one tier
TokenIds = tuple[int, ...]

KEY_BYTES = 32
_FRAME_BYTES = 9  # a tag and a size, before each value


class Tier(enum.IntEnum):
    """Nearer the model is smaller."""

    DEVICE = 0
    HOST = 1
    DISK = 2


def root_key(fingerprint: bytes, salt: bytes) -> BlockKey:
    """The parent of every chain's first block.

    `fingerprint` covers everything that changes KV bytes (weights, config, dtype, block size, record format);
    `salt` separates tenants.
    """
    return BlockKey(digest(b"homeport-root-2", {"fingerprint": fingerprint, "salt": salt}))


def chain_key(parent: BlockKey, tokens: Sequence[int]) -> BlockKey:
    """The key of the block that holds `tokens` after `parent`.

    It hashes the canonical encoding of [parent, the ids as one string of u32, little endian], packed in one go: a
    prompt of 100,000 tokens is 3,000 of these.
    """
    assert len(parent) == KEY_BYTES  # struct would pad it, or cut it
    count = len(tokens)
    layout = f"<cQcQ{KEY_BYTES}scQ{count}I"
    sizes = (2 * _FRAME_BYTES + KEY_BYTES + 4 * count, KEY_BYTES, 4 * count)
    packed = struct.pack(layout, b"l", sizes[0], b"y", sizes[1], parent, b"y", sizes[2], *tokens)
    return BlockKey(blake2b(packed, digest_size=KEY_BYTES, person=b"homeport-blk-2").digest())


@dataclass(eq=False, slots=True)
class Block:
    """One key's entry in the tables. Compared by identity: the same key may be forgotten and come back as another."""

    key: BlockKey
    root: BlockKey  # of its chain: the model and the tenant
    parent: BlockKey
    depth: int  # blocks before it in its chain
    tokens: TokenIds  # 1 to block_tokens ids; fewer than block_tokens: a tail
    last_used: float
    resting: SessionClass  # its class when no lease covers it
    leases: list[int]  # [session class]: leases of that class that cover it
    unwanted: bool = False  # the disk gave it up, and does not get it again before it is used again
    kept_until: float = 0.0  # the latest time that a client asked to keep it until
    kids: list[int] = field(
        default_factory=lambda: [0] * len(Tier)
    )  # [tier]: children that stay there
    leaving: int = 0  # the tiers that a copy in flight will free; one bit each
    coming: int = 0  # the tier that room is being made in for it; one bit
    stays: int = 0  # the tiers it is in or on its way to, and not about to leave; one bit each
    offered: int = 0  # the tiers where it may be evicted now; one bit each
    places: dict[Tier, Slot] = field(default_factory=dict)  # where its bytes are
    arriving: dict[Tier, Slot] = field(
        default_factory=dict
    )  # where a copy of them is on its way to
    refs: int = 0  # by holds
    busy: int = 0  # copies in flight that read or write one of its slots


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy one slot's bytes between DEVICE and HOST, or DEVICE to DEVICE (a private copy of a shared block).

    Slots are whole blocks. `key` is for logs and checks only.
    """

    key: BlockKey
    source: Tier
    source_slot: Slot
    target: Tier
    target_slot: Slot


@dataclass(frozen=True, slots=True)
class Spill:
    """Write a block's bytes to disk as a record. The source slot stays put until the answer."""

    key: BlockKey
    root: BlockKey
    parent: BlockKey
    depth: int
    tokens: TokenIds
    source: Tier
    source_slot: Slot
    disk_slot: Slot


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read a record from disk, verify it against key, parent and tokens, and place its bytes in a slot."""

    key: BlockKey
    parent: BlockKey
    tokens: TokenIds
    target: Tier
    target_slot: Slot


@dataclass(frozen=True, slots=True)
class Drop:
    """Delete a record from disk. Performed in issue order with the spills, so its disk slot is free at once."""

    key: BlockKey


Action = Copy | Spill | Fetch | Drop


class StoreError(Exception):
    """The disk's fault: a full or failing store, or a record that fails a check. Forget it, count it, go on."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason  # a metric label: full, io, missing, magic, version, fingerprint, key, tokens, size, checksum
