"""The durable record of one response: what was fed and sampled, exactly, and under which names clients know it.

A manifest names block keys but does not depend on them: a key that is gone is recomputed from `tokens`.
`body` is the broker's own JSON (the response object and the history items); this package never looks inside.
`text` names the tokenizer and the chat template whose ids `tokens` are: to another one they are other words, so
whoever finds a manifest compares it (engine/service.py) before the tokens are believed.

On disk: xxh3-128 of what follows (16 bytes), then one msgpack map with exactly the fields below and "v", the format
version. Tokens are one blob of little-endian u32; keys are one blob, 32 bytes each.

Laws
    `decode` returns a manifest equal to the one encoded, or raises `StoreError("manifest")`; nothing else escapes,
    whatever the bytes. Limits hold in both directions, so what was written can be read back.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack
import xxhash

from tiers.block import BlockKey, StoreError

if TYPE_CHECKING:
    from tiers.block import TokenIds

VERSION = 2
CHECKSUM_BYTES = 16
# Guesses with room: a context of 4 million tokens, a history of 32 MiB, a turn of 4096 output items.
MAX_NAME_CHARS = 512
MAX_TOKENS = 1 << 22
MAX_ITEMS = 4096
MAX_DIGEST_BYTES = 64
MAX_KEYS = 1 << 18
MAX_BODY_BYTES = 32 << 20
MAX_BYTES = (
    MAX_BODY_BYTES + 4 * MAX_TOKENS + 32 * MAX_KEYS + MAX_ITEMS * 4 * MAX_NAME_CHARS + (1 << 16)
)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One finished response. `tokens[sampled_from:]` were sampled, everything before was fed."""

    response_id: str
    tenant: str  # hex digest naming the tenant; "" when the daemon has no keys
    session: str
    parent: str | None  # response id it continued, if any
    created_at: float  # seconds since the epoch
    stored: bool  # False: the id must not answer once its connection is gone; the tokens still serve replays
    tokens: TokenIds
    sampled_from: int
    item_ids: tuple[str, ...]  # of output items and calls, as clients will replay them
    content_digest: bytes  # of the output's normalised contents: finds a replay that carries no ids
    keys: tuple[BlockKey, ...]
    body: bytes
    text: bytes = b""  # stamped on its way to the disk


_FIELDS = frozenset({"v", *Manifest.__slots__})


def encode(manifest: Manifest) -> bytes:
    """Checksum and msgpack of `manifest`. Raises `StoreError("manifest")` for one that is over a limit."""
    _check(manifest)
    fields = {
        "v": VERSION,
        "response_id": manifest.response_id,
        "tenant": manifest.tenant,
        "session": manifest.session,
        "parent": manifest.parent,
        "created_at": float(manifest.created_at),
        "stored": manifest.stored,
        "tokens": struct.pack(f"<{len(manifest.tokens)}I", *manifest.tokens),
        "sampled_from": manifest.sampled_from,
        "item_ids": manifest.item_ids,
        "content_digest": manifest.content_digest,
        "keys": b"".join(manifest.keys),
        "body": manifest.body,
        "text": manifest.text,
    }
    try:
        packed: bytes = msgpack.packb(fields)
    except (
        UnicodeEncodeError
    ) as error:  # JSON can carry half of a surrogate pair into a session's name
        raise _bad("a name is not valid text") from error
    return xxhash.xxh3_128_digest(packed) + packed


def decode(data: bytes) -> Manifest:
    """The manifest that `encode` was given, or `StoreError("manifest")`."""
    if len(data) > MAX_BYTES:
        raise _bad(f"{len(data)} bytes")
    packed = memoryview(data)[CHECKSUM_BYTES:]
    if xxhash.xxh3_128_digest(packed) != data[:CHECKSUM_BYTES]:
        raise _bad("checksum does not match")
    return _unpack(packed)


def _unpack(packed: memoryview) -> Manifest:
    """The part of `decode` behind the checksum: whole or refused even for bytes made up by someone else."""
    try:
        fields: Any = msgpack.unpackb(
            packed,
            raw=False,
            strict_map_key=True,
            max_str_len=4 * MAX_NAME_CHARS,
            max_bin_len=max(MAX_BODY_BYTES, 4 * MAX_TOKENS),
            max_array_len=MAX_ITEMS,
            max_map_len=len(_FIELDS),
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise _bad(f"not msgpack within limits: {error}") from error
    if type(fields) is not dict or fields.keys() != _FIELDS:
        raise _bad("not a map with exactly the known fields")
    version = fields.pop("v")
    if type(version) is not int or version != VERSION:
        raise _bad("another format version")
    tokens, keys, items = fields["tokens"], fields["keys"], fields["item_ids"]
    if type(tokens) is not bytes or len(tokens) % 4:
        raise _bad("tokens")
    if type(keys) is not bytes:
        raise _bad("keys")
    if type(items) is not list:
        raise _bad("item_ids")
    # What `encode` writes: a large int would not come back equal.
    if type(fields["created_at"]) is not float:
        raise _bad("created_at")
    fields["tokens"] = struct.unpack(f"<{len(tokens) // 4}I", tokens)
    fields["keys"] = tuple(BlockKey(keys[at : at + 32]) for at in range(0, len(keys), 32))
    fields["item_ids"] = tuple(items)
    manifest = Manifest(**fields)
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    names = [manifest.response_id, manifest.tenant, manifest.session, *manifest.item_ids]
    if manifest.parent is not None:
        names.append(manifest.parent)
    if not all(type(name) is str and len(name) <= MAX_NAME_CHARS for name in names):
        raise _bad("a name is no text or too long")
    if not manifest.response_id:
        raise _bad("no response id")
    if type(manifest.created_at) not in (float, int) or not math.isfinite(manifest.created_at):
        raise _bad("created_at")
    if type(manifest.stored) is not bool:
        raise _bad("stored")
    if len(manifest.tokens) > MAX_TOKENS:
        raise _bad(f"{len(manifest.tokens)} tokens")
    if type(manifest.sampled_from) is not int or not 0 <= manifest.sampled_from <= len(
        manifest.tokens
    ):
        raise _bad("sampled_from lies outside the tokens")
    if len(manifest.item_ids) > MAX_ITEMS:
        raise _bad(f"{len(manifest.item_ids)} items")
    digests = (manifest.content_digest, manifest.text)
    if not all(type(one) is bytes and len(one) <= MAX_DIGEST_BYTES for one in digests):
        raise _bad("content_digest or text")
    if len(manifest.keys) > MAX_KEYS or not all(len(key) == 32 for key in manifest.keys):
        raise _bad("keys")
    if type(manifest.body) is not bytes or len(manifest.body) > MAX_BODY_BYTES:
        raise _bad("body")


def _bad(what: str) -> StoreError:
    return StoreError("manifest", f"manifest refused: {what}")
