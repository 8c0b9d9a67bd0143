"""What the disk tier promises, and a store in memory that keeps the same promises.

A store holds blocks (by key) and manifests (by tenant and response id, and by the names clients know them under).

Laws
    `write` is one transaction: when it returns, everything in it is durable; when it raises, nothing of it is there.
    `read` fills the caller's buffer with the payload, verified as it arrived there, or raises: then the buffer is as it
    was, or blank (`record.BLANK`); nothing that was refused stays in it.
    Records of another model share the capacity but are invisible: never read, never indexed, and the first to go
    when room is needed, in the order of keys: to go by age, all of them would have to be known. They stay until then,
    so that switching back to a model finds its cache.
    Manifests have a budget of their own; the oldest goes first. A lookup under one tenant never finds another's.
    A response that is not `stored` has no id here: only its items and its content find it.
"""

from __future__ import annotations

import enum
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NewType, Protocol

from tiers import manifest as manifests_format
from tiers.block import BlockKey, StoreError, chain_key
from tiers.canonical import digest
from tiers.hashed_copy import copying
from tiers.record import PAGE_HEAD_BYTES, Asked, encode_head, extract, head_size, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from tiers.block import TokenIds
    from tiers.manifest import Manifest

Name = NewType("Name", bytes)  # 32 bytes: what a manifest is found under
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class BlockWrite:
    """One block to make durable. `payload` must stay put until `write` returns."""

    key: BlockKey
    root: BlockKey  # of its chain: the model and the tenant
    parent: BlockKey
    depth: int  # blocks before it in its chain
    tokens: TokenIds
    payload: memoryview
    last_used: float  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """What a start needs to know of a stored block without reading its payload."""

    key: BlockKey
    root: BlockKey
    parent: BlockKey
    depth: int
    tokens: TokenIds
    last_used: float  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class ForgottenResponse:
    """What a deleted response named. `shared_keys` are its parent's, if that is stored still, else empty."""

    keys: tuple[BlockKey, ...]
    shared_keys: tuple[BlockKey, ...]


class Durability(enum.Enum):
    """What an acknowledged write survives."""

    POWER = "power"  # the loss of power
    PROCESS = (
        "process"  # the death of this process; after that of the kernel the store begins empty
    )


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Budgets. `block_bytes` counts whole pages, as the disk does."""

    block_bytes: int
    manifests: int = 100_000
    manifest_bytes: int = 1 << 30
    min_free_bytes: int = 0  # of the file system: below that no block is taken


class Way(enum.Enum):
    """How a record came to its reader (data_file.py)."""

    CACHED = "cached"
    DIRECT = "direct"
    BOUNCED = "bounced"
    BUFFERED = "buffered"
    MAPPED = "mapped"  # by the store's own table: whenever no other way gave the record


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """`blocks` are this model's; `foreign_blocks` belong to other models, or to nobody knows whom."""

    blocks: int
    foreign_blocks: int
    block_bytes: int  # of both
    manifests: int
    manifest_bytes: int
    unsound_entries: int = 0  # of the index, met while it was read; their records are not used
    # Records read since it was opened. No part of what it holds, so two stores are equal without.
    reads: Mapping[Way, int] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Examined:
    """One record looked at. `reason` is None for a good one, else why it would be refused.

    A `listed` one the index names as this model's, so its owner may count on it; the others only take room.
    """

    key: BlockKey
    bytes: int
    reason: str | None
    listed: bool


@dataclass(frozen=True, slots=True)
class ReaderCheck:
    """Reads under way. One that does not end keeps every page that was freed since."""

    oldest_s: float
    cleared: int  # places of readers that died


class BlockStore(Protocol):
    """See the module's laws. Any thread may read; one thread writes."""

    @property
    def block_slots(self) -> int:
        """How many blocks of this model the capacity holds."""
        ...

    def write(
        self,
        *,
        blocks: Sequence[BlockWrite] = (),
        manifests: Sequence[Manifest] = (),
        drops: Sequence[BlockKey] = (),
    ) -> None:
        """Drop, then write blocks (replacing equal keys), then manifests (replacing equal ids), durably.

        Raises `StoreError`: capacity, where these blocks are over the budget; full, where the file system has no room,
        perhaps for less; io; or manifest for one over its limits.
        """
        ...

    def read(self, key: BlockKey, parent: BlockKey, tokens: TokenIds, into: memoryview) -> None:
        """Fill `into`, as long as a payload. Raises `StoreError`: missing, io, or what `record.extract` gives."""
        ...

    def index(self, after: BlockKey | None, limit: int) -> list[IndexEntry]:
        """The next `limit` blocks of this model behind `after`, in the order of keys; fewer: that was all."""
        ...

    def find_chain(self, root: BlockKey, tokens: TokenIds) -> list[IndexEntry]:
        """The whole blocks that `tokens` begins with, and behind them the longest tail that continues it.

        What a prompt can reuse, found by keys alone: before the index has been read, and whatever its size.
        """
        ...

    def find_response(self, tenant: str, response_id: str) -> Manifest | None:
        """A stored response. Raises `StoreError("manifest")` for a damaged one, as the other lookups do."""
        ...

    def find_item(self, tenant: str, item_id: str) -> Manifest | None:
        """The newest response with this output item."""
        ...

    def find_content(self, tenant: str, digest: bytes) -> Manifest | None:
        """The newest response with these output contents."""
        ...

    def find_session(self, tenant: str, session: str) -> Manifest | None:
        """The newest response of this session, stored or not."""
        ...

    def responses_of(self, tenant: str, session: str) -> list[str]:
        """The ids of every response of a session, stored or not, the longest first. Reads every manifest."""
        ...

    def forget_response(self, tenant: str, response_id: str) -> ForgottenResponse | None:
        """Delete a response, stored or not, durably; None if there was none.

        Its blocks stay: they belong to no id. Their keys are returned, for whoever knows who else needs them.
        """
        ...

    def examine(self, after: BlockKey | None) -> Examined | None:
        """Read and verify the next record behind `after`, whichever model's; None: that was the last. Raises `StoreError`."""
        ...

    def discard(self, key: BlockKey) -> None:
        """Delete, durably, a record that is not `listed`, and bad if it is foreign; any other stays. Raises `StoreError`."""
        ...

    def check_readers(self) -> ReaderCheck: ...

    def statistics(self) -> StoreStatistics: ...

    def close(self) -> None: ...


def whole_index(store: BlockStore, limit: int = 1024) -> Iterator[IndexEntry]:
    """Every block of this model, read in slices."""
    after: BlockKey | None = None
    while True:
        entries = store.index(after, limit)
        yield from entries
        if len(entries) < limit:
            return
        after = entries[-1].key


def chain_entries(
    get: Callable[[BlockKey], IndexEntry | None],
    root: BlockKey,
    tokens: TokenIds,
    block_tokens: int,
) -> list[IndexEntry]:
    """`BlockStore.find_chain` over any index: at most one lookup per block of `tokens`, and block_tokens for the tail."""
    found: list[IndexEntry] = []
    parent = root
    for begin in range(0, len(tokens), block_tokens):
        whole = tokens[begin : begin + block_tokens]
        entry = None
        for length in range(len(whole), 0, -1):
            entry = get(chain_key(parent, whole[:length]))
            if entry is not None and (entry.parent, entry.tokens) != (parent, whole[:length]):
                entry = None  # see tiers/block.py: a key alone is not believed
            if entry is not None:
                found.append(entry)
                break
        if entry is None or len(entry.tokens) < block_tokens:
            break
        parent = entry.key
    return found


def record_bytes_on_disk(record_bytes: int) -> int:
    """Whole pages: LMDB puts a large value on pages of its own, after one page header."""
    return -(-(record_bytes + PAGE_HEAD_BYTES) // _PAGE) * _PAGE


def response_name(tenant: str, response_id: str) -> Name:
    return _name("response", tenant, response_id.encode(errors="surrogatepass"))


def item_name(tenant: str, item_id: str) -> Name:
    return _name("item", tenant, item_id.encode(errors="surrogatepass"))


def content_name(tenant: str, digest: bytes) -> Name:
    return _name("content", tenant, digest)


def session_name(tenant: str, session: str) -> Name:
    return _name("session", tenant, session.encode(errors="surrogatepass"))


def other_names(manifest: Manifest) -> list[Name]:
    """Everything but its response id."""
    names = [item_name(manifest.tenant, item) for item in manifest.item_ids]
    names.append(session_name(manifest.tenant, manifest.session))
    if manifest.content_digest:
        names.append(content_name(manifest.tenant, manifest.content_digest))
    return names


def _name(kind: str, tenant: str, name: bytes) -> Name:
    return Name(digest(b"homeport-name-2", [kind, tenant.encode(errors="surrogatepass"), name]))


@dataclass(frozen=True, slots=True)
class _Stored:
    entry: IndexEntry
    fingerprint: bytes
    record: bytes


class MemoryStore:
    """A store that dies with the process: the reference for tests, and a daemon's store without a disk."""

    def __init__(
        self, *, fingerprint: bytes, payload_bytes: int, block_tokens: int, limits: StoreLimits
    ) -> None:
        self._fingerprint = fingerprint
        self._limits = limits
        one = record_bytes_on_disk(head_size(block_tokens) + payload_bytes)
        self._block_slots = limits.block_bytes // one
        self._block_tokens = block_tokens
        self._blocks: dict[BlockKey, _Stored] = {}
        self._manifests: dict[Name, bytes] = {}  # {response: encoded}, oldest first
        self._names: dict[Name, Name] = {}  # {item or content: response}

    def reopen(self, *, fingerprint: bytes, limits: StoreLimits) -> None:
        """As if the process had ended and another, perhaps with another model, had opened the same directory."""
        self._fingerprint = fingerprint
        self._limits = limits

    @property
    def block_slots(self) -> int:
        return self._block_slots

    def write(
        self,
        *,
        blocks: Sequence[BlockWrite] = (),
        manifests: Sequence[Manifest] = (),
        drops: Sequence[BlockKey] = (),
    ) -> None:
        encoded = [(manifest, manifests_format.encode(manifest)) for manifest in manifests]
        for _, data in encoded:
            check_manifest_fits(data, self._limits)
        after = dict(self._blocks)
        for key in drops:
            after.pop(key, None)
        for block in blocks:
            after[block.key] = self._stored(block)
        before, now = (sum(map(_bytes_of, blocks.values())) for blocks in (self._blocks, after))
        excess = now - self._limits.block_bytes
        foreign = [stored for stored in after.values() if stored.fingerprint != self._fingerprint]
        for stored in sorted(foreign, key=lambda stored: stored.entry.key):
            if excess <= 0:
                break
            excess -= _bytes_of(stored)
            del after[stored.entry.key]
        # A smaller capacity than last time must not refuse what shrinks the store.
        if excess > 0 and now > before:
            raise StoreError(
                "capacity", f"{excess} bytes over the capacity of {self._limits.block_bytes}"
            )
        self._blocks = after
        for manifest, data in encoded:
            self._add_manifest(manifest, data)
        self._trim_manifests()

    def read(self, key: BlockKey, parent: BlockKey, tokens: TokenIds, into: memoryview) -> None:
        stored = self._blocks.get(key)
        if stored is None:
            raise StoreError("missing", f"no record of {key.hex()[:16]}")
        asked = Asked(self._fingerprint, key, parent, tokens)
        extract(copying(memoryview(stored.record)), len(stored.record), into, asked)

    def index(self, after: BlockKey | None, limit: int) -> list[IndexEntry]:
        behind = sorted(key for key in self._blocks if after is None or key > after)
        own = (self._own_entry(key) for key in behind)
        return [entry for entry in own if entry is not None][:limit]

    def find_chain(self, root: BlockKey, tokens: TokenIds) -> list[IndexEntry]:
        return chain_entries(self._own_entry, root, tokens, self._block_tokens)

    def find_response(self, tenant: str, response_id: str) -> Manifest | None:
        data = self._manifests.get(response_name(tenant, response_id))
        found = None if data is None else manifests_format.decode(data)
        return found if found is not None and found.stored else None

    def find_item(self, tenant: str, item_id: str) -> Manifest | None:
        return self._named(item_name(tenant, item_id))

    def find_content(self, tenant: str, digest: bytes) -> Manifest | None:
        return self._named(content_name(tenant, digest))

    def find_session(self, tenant: str, session: str) -> Manifest | None:
        return self._named(session_name(tenant, session))

    def responses_of(self, tenant: str, session: str) -> list[str]:
        known = map(manifests_format.decode, self._manifests.values())
        return longest_first(m for m in known if (m.tenant, m.session) == (tenant, session))

    def forget_response(self, tenant: str, response_id: str) -> ForgottenResponse | None:
        data = self._manifests.get(response_name(tenant, response_id))
        if data is None:
            return None
        found = manifests_format.decode(data)
        self._remove_manifest(response_name(tenant, response_id))
        return forgotten_response(self, found)

    def examine(self, after: BlockKey | None) -> Examined | None:
        behind = [key for key in self._blocks if after is None or key > after]
        if not behind:
            return None
        stored = self._blocks[min(behind)]
        reason = fault(memoryview(stored.record), stored.fingerprint, stored.entry)
        own = stored.fingerprint == self._fingerprint
        return Examined(stored.entry.key, len(stored.record), reason, own)

    def discard(self, key: BlockKey) -> None:
        stored = self._blocks.get(key)
        if stored is None or stored.fingerprint == self._fingerprint:
            return
        if fault(memoryview(stored.record), stored.fingerprint, stored.entry) is not None:
            del self._blocks[key]

    def check_readers(self) -> ReaderCheck:
        return ReaderCheck(0.0, 0)

    def statistics(self) -> StoreStatistics:
        own = sum(stored.fingerprint == self._fingerprint for stored in self._blocks.values())
        return StoreStatistics(
            blocks=own,
            foreign_blocks=len(self._blocks) - own,
            block_bytes=sum(map(_bytes_of, self._blocks.values())),
            manifests=len(self._manifests),
            manifest_bytes=sum(map(len, self._manifests.values())),
        )

    def close(self) -> None:
        """Nothing to give back."""

    def _stored(self, block: BlockWrite) -> _Stored:
        head = encode_head(
            fingerprint=self._fingerprint,
            key=block.key,
            parent=block.parent,
            tokens=block.tokens,
            created=block.last_used,
            payload=block.payload,
        )
        entry = IndexEntry(
            block.key, block.root, block.parent, block.depth, block.tokens, block.last_used
        )
        return _Stored(entry, self._fingerprint, head + block.payload)

    def _own_entry(self, key: BlockKey) -> IndexEntry | None:
        stored = self._blocks.get(key)
        own = stored is not None and stored.fingerprint == self._fingerprint
        return stored.entry if stored is not None and own else None

    def _named(self, name: Name) -> Manifest | None:
        response = self._names.get(name)
        return None if response is None else manifests_format.decode(self._manifests[response])

    def _add_manifest(self, manifest: Manifest, data: bytes) -> None:
        response = response_name(manifest.tenant, manifest.response_id)
        if response in self._manifests:
            self._remove_manifest(response)
        self._manifests[response] = data
        for name in other_names(manifest):
            self._names[name] = response

    def _trim_manifests(self) -> None:
        limits = self._limits
        while (
            len(self._manifests) > limits.manifests
            or sum(map(len, self._manifests.values())) > limits.manifest_bytes
        ):
            self._remove_manifest(next(iter(self._manifests)))

    def _remove_manifest(self, response: Name) -> None:
        for name in other_names(manifests_format.decode(self._manifests.pop(response))):
            if self._names.get(name) == response:
                del self._names[name]


def longest_first(manifests: Iterable[Manifest]) -> list[str]:
    """Response ids, those of long chains before those that they continue."""
    found = sorted((-len(manifest.tokens), manifest.response_id) for manifest in manifests)
    return [response_id for _, response_id in found]


def forgotten_response(store: BlockStore, deleted: Manifest) -> ForgottenResponse:
    """What `deleted` named. A parent that is damaged, or answers to no id, has no claim to its blocks."""
    shared: tuple[BlockKey, ...] = ()
    if deleted.parent is not None:
        with suppress(StoreError):
            parent = store.find_response(deleted.tenant, deleted.parent)
            shared = () if parent is None else parent.keys
    return ForgottenResponse(deleted.keys, shared)


def fault(found: memoryview, fingerprint: bytes, entry: IndexEntry) -> str | None:
    """Why a record would be refused, if it would."""
    try:
        verify(found, Asked(fingerprint, entry.key, entry.parent, entry.tokens))
    except StoreError as error:
        return error.reason
    return None


def check_manifest_fits(encoded: bytes, limits: StoreLimits) -> None:
    """One manifest may not be larger than the budget of all, or it would evict itself."""
    if len(encoded) > limits.manifest_bytes:
        raise StoreError(
            "manifest", f"manifest of {len(encoded)} bytes, all may have {limits.manifest_bytes}"
        )


def _bytes_of(stored: _Stored) -> int:
    return record_bytes_on_disk(len(stored.record))
