"""The durable record of one response: what was fed and sampled, exactly, and under which names clients know it.

A manifest names block keys but does not depend on them: a key that is gone is recomputed from `tokens`.
`body` is the broker's own JSON (the response object and the history items); this package never looks inside.
Encoding is msgpack with strict limits; see `encode` and `decode`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiers.block import BlockKey, TokenIds


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
    item_ids: tuple[str, ...]  # output items, as clients will replay them
    content_digest: bytes  # of the output's normalised contents: finds a replay that carries no ids
    keys: tuple[BlockKey, ...]
    body: bytes
