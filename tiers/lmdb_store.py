"""`BlockStore` on LMDB, the only file that knows lmdb. One environment in the state directory, six tables:

    blocks     key -> record (record.py); payloads live here and nowhere else
    index      key -> seal, fingerprint 32, root 32, parent 32, depth u32, last_used f64, record size u64, place u64,
               token ids u32...
    manifests  response name -> age u64, encoded manifest
    ages       age u64, big endian -> seal, response name, size u64: oldest first, for the budget
    names      item, content or session name -> response name
    meta       "format" -> seal, u32; "totals" -> seal, block bytes u64, manifest bytes u64, next age u64, then for each
               model fingerprint 32, blocks u64

The totals change in the transaction that changes what they count, so no crash or abort can part them, and opening reads
one small record whatever the store holds. They are counted anew, by a walk, only where they or an index entry are damaged.

How it is used, each for a measured reason (lmdb 3.0.0, engine 0.9.36)
    sync=True: acknowledged means on the platter; sync=False gave silently wrong values after a simulated power loss, so
    what was written so is discarded unless the kernel that held it is still the one that runs.
    Never writemap: with it a full disk is a SIGBUS, without it an `lmdb.Error`.
    A write transaction begins, puts and commits in one call, so on one thread: ended elsewhere, it hangs all others.
    No read transaction outlives its `with`: even a finished one keeps its reader slot until it is collected, and the
    traceback of a refused record can keep it for long (measured: 64 slots taken by four readers).
    Views (`buffers=True`) are copied and verified inside their transaction.
    The map is far larger than the capacity and never resized; our own budget, not MDB_MAP_FULL, is the limit.
    lmdb touches every page of a value that it passes, also for its key alone: what is needed of a block stands in the
    index, its place in the file among it, and records are read from there past lmdb (data_file.py). `blocks` is asked
    where that gave nothing, and walked by the scrubber.
    No readahead for the map, then: what is left to it are pages of tables, each of which had megabytes read around it.
    Views in a write transaction are good until its next change: what is used after that is copied.
    LMDB has no checksum for values: ours are in the record, in the manifest, and in the seals (xxh3-64 of key and
    value) of the small tables.

A write that fails
    After a failed commit LMDB refuses everything, or the meta page may be either one: what the process believes is worth
    nothing. So the environment is closed, and opened again before the next write; it must then stand at the transaction
    that was last acknowledged, or at the failed one, which is then whole but was never acknowledged. lmdb must not be
    closed under a reader, nor the same file opened twice in one process: readers pass a gate, which is shut meanwhile.
    Until then they go on reading: a snapshot is of committed pages, and every record is verified. The file's own
    descriptors are closed and opened with the environment, behind the same gate.
    A store that had such a failure leaves no clean mark, so the next start walks it.

What is deleted
    A record or manifest that is dropped is gone from the tables when the transaction is durable, and no lookup finds it.
    Its pages are free, not overwritten: their bytes lie in the file until a later write takes the page, and the file does
    not shrink. Whoever must rule out that they are read from the medium encrypts the medium, or deletes the state directory.

Starting (inspection.py says how it was left, and whether it may be mapped)
    It is created beside its place and renamed into it, so a crash while creating leaves none.
    What fails the walk, and whatever LMDB refuses at open, is put aside and replaced by nothing, and so is another format:
    there is no other format in the field, and a walk that converts it would be code that nobody needs twice.
"""

from __future__ import annotations

import errno
import itertools
import logging
import math
import os
import struct
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import lmdb
import xxhash

from tiers import inspection as inspections
from tiers import manifest as manifests_format
from tiers.block import KEY_BYTES, BlockKey, StoreError
from tiers.data_file import UNKNOWN, DataFile, ShortFile, place_of
from tiers.hashed_copy import copying
from tiers.inspection import ENVIRONMENT, Damaged, Finding
from tiers.record import Asked, encode_head, extract, head_size
from tiers.state_dir import sync_directory, this_boot
from tiers.store import (
    Durability,
    Examined,
    IndexEntry,
    Name,
    ReaderCheck,
    StoreStatistics,
    Way,
    chain_entries,
    check_manifest_fits,
    content_name,
    fault,
    forgotten_response,
    item_name,
    longest_first,
    other_names,
    record_bytes_on_disk,
    response_name,
    session_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tiers.block import TokenIds
    from tiers.inspection import Inspection
    from tiers.manifest import Manifest
    from tiers.state_dir import StateDir
    from tiers.store import BlockWrite, ForgottenResponse, StoreLimits

_ENGINE = 0  # LMDB 0.9: formats 0.9 and 1.0 are mutually unreadable, so never the binding's default
_TABLES = (b"blocks", b"index", b"manifests", b"ages", b"names", b"meta")
_MAX_READERS = 126
# What `stat` and `info` call their numbers. py-lmdb has the interpreter intern these names in each call, and it forgets a name
# that nobody holds with the answer: some twenty for each commit, after 100,000 of which its table of all names, 8 MB with
# what torch imports, is laid out anew, larger and smaller by turns (seen in a soak).
NUMBERS = (
    *("psize", "depth", "branch_pages", "leaf_pages", "overflow_pages", "entries"),
    *("map_addr", "map_size", "last_pgno", "last_txnid", "max_readers", "num_readers"),
)
_SCRUB_MAP_BYTES = 1 << 30  # lmdb makes it larger where the file is
_READERS_LEAVE_S = 10.0  # a read that takes longer hangs in the kernel; guessed
_SEAL_BYTES = 8
_TRIAL = b"trial"  # shorter than any name
_FORMAT = 3  # of the tables; 1 had no roots, no depths and no meta, 2 no places
_FORMAT_NAME = b"format"
_TOTALS_NAME = b"totals"
_LONGEST_VALUE = (1 << 32) - 1  # bytes, in LMDB
_IMPOSSIBLE = 1 << 62  # bytes, or anything that is counted here
_SLICE = 4096  # entries of the index read in one transaction, whoever they belong to
_MANIFEST_SLICE = 64  # manifests, which are larger, copied in one
_SMALLEST_SLICE = 64
_VERSION = struct.Struct("<I")
_TOTALS = struct.Struct("<QQQ")
_MODEL = struct.Struct("<32sQ")
_INDEX = struct.Struct("<32s32s32sIdQQ")
_AGE = struct.Struct(">Q")  # big endian, so that LMDB's byte order is the order of ages
_AGE_ENTRY = struct.Struct("<32sQ")

# LMDB says that its file is not what it wrote. (A full or failing disk is a plain lmdb.Error, and not in here.)
_DAMAGE = (
    lmdb.BadDbiError,
    lmdb.BadTxnError,
    lmdb.BadValsizeError,
    lmdb.CorruptedError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.NotFoundError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
)

_log = logging.getLogger(__name__)


class _OtherFormat(Exception):
    """The environment is whole, but its tables are not ours to read."""


@dataclass(slots=True)
class _Totals:
    """What the tables hold."""

    block_bytes: int = 0
    manifest_bytes: int = 0
    next_age: int = 0
    blocks: Counter[bytes] = field(default_factory=Counter)  # {fingerprint: blocks}

    @property
    def possible(self) -> bool:
        """Whether such a store can be. A seal tells that a total was written, not that it is true."""
        numbers = (self.block_bytes, self.manifest_bytes, self.next_age, *self.blocks.values())
        return all(0 <= number < _IMPOSSIBLE for number in numbers)

    def packed(self) -> bytes:
        value = _TOTALS.pack(self.block_bytes, self.manifest_bytes, self.next_age)
        counts = (
            _MODEL.pack(model, count) for model, count in sorted(self.blocks.items()) if count
        )
        return _seal(_TOTALS_NAME, value + b"".join(counts))

    @classmethod
    def unpacked(cls, sealed: bytes) -> _Totals | None:
        """None for totals that are not as they were written."""
        value = _unseal(_TOTALS_NAME, sealed)
        if value is None or len(value) < _TOTALS.size or (len(value) - _TOTALS.size) % _MODEL.size:
            return None
        counts = Counter[bytes](dict(_MODEL.iter_unpack(value[_TOTALS.size :])))
        block_bytes, manifest_bytes, next_age = _TOTALS.unpack_from(value)
        totals = cls(block_bytes, manifest_bytes, next_age, counts)
        return totals if totals.possible else None


@dataclass(slots=True)
class _Change:
    """A write transaction on its way."""

    txn: Any
    totals: _Totals
    foreign_behind: bytes  # foreign records have been looked for up to this key
    recount: bool = False  # something was removed that nobody knows how it was counted


class _Gate:
    """Readers pass while it is open. Whoever shuts it waits for those inside. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[int, float] = {}  # {ticket: since when, on the monotonic clock}
        self._tickets = itertools.count()
        self._shut = False

    def enter(self) -> int:
        with self._changed:
            self._changed.wait_for(lambda: not self._shut)
            ticket = next(self._tickets)
            self._inside[ticket] = time.monotonic()
            return ticket

    def leave(self, ticket: int) -> None:
        with self._changed:
            del self._inside[ticket]
            self._changed.notify_all()

    def oldest_s(self) -> float:
        """How long the longest of those inside has been there."""
        with self._changed:
            now = time.monotonic()
            return max((now - since for since in self._inside.values()), default=0.0)

    @contextmanager
    def passing(self) -> Iterator[None]:
        ticket = self.enter()
        try:
            yield
        finally:
            self.leave(ticket)

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Nobody is inside. Raises `StoreError("io")` if somebody does not leave."""
        with self._changed:
            self._shut = True
            left = self._changed.wait_for(lambda: not self._inside, _READERS_LEAVE_S)
        try:
            if not left:
                raise StoreError(
                    "io", "a read does not end: the environment cannot be opened again"
                )
            yield
        finally:
            with self._changed:
                self._shut = False
                self._changed.notify_all()


class _Snapshot:
    """A read transaction that frames and tracebacks cannot keep. lmdb's errors leave it as `StoreError("io")`."""

    def __init__(self, gate: _Gate, begin: Callable[[], Any]) -> None:
        self._gate = gate
        self._begin = begin
        self._ticket = -1
        self._txn: Any = None

    def __enter__(self) -> _Snapshot:
        self._ticket = self._gate.enter()
        try:
            self._txn = self._begin()
        except BaseException:
            self._gate.leave(self._ticket)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._txn.abort()
        self._txn = None
        self._gate.leave(self._ticket)
        if isinstance(error, lmdb.Error):
            raise StoreError("io", f"read failed: {error}") from error

    def get(self, key: bytes, table: Any) -> memoryview | None:
        found: memoryview | None = self._txn.get(key, db=table)
        return found

    def items_behind(
        self, after: bytes | None, limit: int, table: Any
    ) -> list[tuple[bytes, bytes]]:
        """Copies of up to `limit` items in the order of keys, the first one behind `after`."""
        cursor = self._txn.cursor(db=table)
        found = cursor.iternext() if _seek_behind(cursor, after) else ()
        return [(bytes(key), bytes(value)) for key, value in itertools.islice(found, limit)]

    def key_behind(self, after: bytes | None, table: Any) -> bytes | None:
        cursor = self._txn.cursor(db=table)
        return bytes(cursor.key()) if _seek_behind(cursor, after) else None


class LmdbStore:
    """See `BlockStore` for the promises. Any thread may read; `write` and `forget_response` belong to one thread."""

    def __init__(
        self,
        path: Path,
        *,
        fingerprint: bytes,
        payload_bytes: int,
        block_tokens: int,
        limits: StoreLimits,
        durability: Durability,
        boot: str,
        map_bytes: int,
    ) -> None:
        """Take an environment that is known to be safe to map. Use `open` instead."""
        assert len(fingerprint) == 32
        self._path = path
        self._fingerprint = fingerprint
        self._limits = limits
        self._durability = durability
        self._boot = boot
        self._map_bytes = map_bytes
        self._block_tokens = block_tokens
        self._record_bytes = head_size(block_tokens) + payload_bytes
        self._gate = _Gate()
        self._env: Any = None
        self._data: DataFile | None = None  # as long as the environment
        self._page_bytes = 0
        self._reads: Counter[Way] = Counter()
        self._counting = threading.Lock()
        self._broken = False  # a write failed: open the environment again before the next one
        self._marked_open = False
        self._suspect = False  # a write failed in this life: leave no clean mark
        self._foreign_behind = b""
        self._unsound: set[bytes] = set()  # keys whose index entries were met damaged
        self._attach()
        self._acknowledged = self._standing()
        try:
            self._try_writing()
        except BaseException:
            self._detach()
            raise

    @classmethod
    def open(
        cls,
        state: StateDir,
        *,
        fingerprint: bytes,
        payload_bytes: int,
        block_tokens: int,
        limits: StoreLimits,
        durability: Durability = Durability.POWER,
        inspection: Inspection | None = None,
        map_bytes: int | None = None,
        boot: str | None = None,
    ) -> LmdbStore:
        """Open the environment of `state`, or an empty one where there is none or a damaged one.

        `inspection` is one of `state` that has already begun. `map_bytes` and `boot` are for tests; the default leaves
        room for every page that a full store could need.
        Raises `StateDirRefused` for files that are not safely ours, `StoreError` if the disk fails.
        """
        size = map_bytes or max(
            4 << 30, 2 * limits.block_bytes + 2 * limits.manifest_bytes + (1 << 30)
        )
        boot = this_boot() if boot is None else boot
        path = state.path / ENVIRONMENT
        try:
            for _ in range(2):
                try:
                    inspection = inspection or inspections.inspect(state, boot)
                    _settle(state, inspection)
                    return cls(
                        path,
                        fingerprint=fingerprint,
                        payload_bytes=payload_bytes,
                        block_tokens=block_tokens,
                        limits=limits,
                        durability=durability,
                        boot=boot,
                        map_bytes=size,
                    )
                except _OtherFormat as error:
                    _log.warning("%s: %s", path, error)
                    state.put_aside(path, "other-format")
                except (*_DAMAGE, Damaged) as error:
                    _log.error("%s: %s", path, error)
                    state.put_aside(path, "damaged")
                inspection = None
        except (OSError, lmdb.Error) as error:
            raise StoreError("io", f"{path}: cannot be opened: {error}") from error
        raise StoreError("io", f"{path}: an empty environment cannot be used")

    @property
    def block_slots(self) -> int:
        return self._limits.block_bytes // record_bytes_on_disk(self._record_bytes)

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
        if blocks:
            self._check_free_space(sum(map(_bytes_on_disk, blocks)))
        with self._writing() as change:
            for key in [*drops, *self._victims(change, blocks, drops)]:
                self._drop_block(change, key)
            for block in blocks:
                self._put_block(change, block)
            for manifest, data in encoded:
                self._put_manifest(change, manifest, data)
            self._trim_manifests(change)

    def read(self, key: BlockKey, parent: BlockKey, tokens: TokenIds, into: memoryview) -> None:
        asked = Asked(self._fingerprint, key, parent, tokens)
        way = self._read_at_its_place(asked, into)
        if way is None:
            with self._reading() as snapshot:
                found = snapshot.get(key, self._blocks)
                if found is None:
                    raise StoreError("missing", f"no record of {key.hex()[:16]}")
                extract(copying(found), found.nbytes, into, asked)
            way = Way.MAPPED
        with self._counting:
            self._reads[way] += 1

    def index(self, after: BlockKey | None, limit: int) -> list[IndexEntry]:
        found: list[IndexEntry] = []
        while len(found) < limit:
            # Of what is read beyond the limit nothing is used; yet foreign entries must not be read one by one.
            count = min(_SLICE, max(limit - len(found), _SMALLEST_SLICE))
            with self._reading() as snapshot:
                slice_ = snapshot.items_behind(after, count, self._index)
            own = (self._own_entry(key, value) for key, value in slice_)
            found += [entry for entry in own if entry is not None]
            if len(slice_) < count:
                break
            after = BlockKey(slice_[-1][0])
        return found[:limit]

    def find_chain(self, root: BlockKey, tokens: TokenIds) -> list[IndexEntry]:
        with self._reading() as snapshot:

            def get(key: BlockKey) -> IndexEntry | None:
                value = snapshot.get(key, self._index)
                return None if value is None else self._own_entry(key, value)

            return chain_entries(get, root, tokens, self._block_tokens)

    def find_response(self, tenant: str, response_id: str) -> Manifest | None:
        with self._reading() as snapshot:
            found = self._get_manifest(snapshot, response_name(tenant, response_id))
        if found is None or not found.stored:
            return None
        if (found.tenant, found.response_id) != (tenant, response_id):
            raise StoreError("manifest", "manifest lies under another response's name")
        return found

    def find_item(self, tenant: str, item_id: str) -> Manifest | None:
        with self._reading() as snapshot:
            found = self._follow(snapshot, item_name(tenant, item_id))
        if found is not None and (found.tenant != tenant or item_id not in found.item_ids):
            raise StoreError("manifest", "manifest lies under another item's name")
        return found

    def find_content(self, tenant: str, digest: bytes) -> Manifest | None:
        with self._reading() as snapshot:
            found = self._follow(snapshot, content_name(tenant, digest))
        if found is not None and (found.tenant, found.content_digest) != (tenant, digest):
            raise StoreError("manifest", "manifest lies under another content's name")
        return found

    def find_session(self, tenant: str, session: str) -> Manifest | None:
        with self._reading() as snapshot:
            found = self._follow(snapshot, session_name(tenant, session))
        if found is not None and (found.tenant, found.session) != (tenant, session):
            raise StoreError("manifest", "manifest lies under another session's name")
        return found

    def responses_of(self, tenant: str, session: str) -> list[str]:
        found: list[Manifest] = []
        after: bytes | None = None
        while True:
            with self._reading() as snapshot:
                slice_ = snapshot.items_behind(after, _MANIFEST_SLICE, self._manifests)
            for _, value in slice_:
                with suppress(StoreError):  # a damaged one is nobody's
                    found.append(manifests_format.decode(value[_AGE.size :]))
            found = [m for m in found if (m.tenant, m.session) == (tenant, session)]
            if len(slice_) < _MANIFEST_SLICE:
                return longest_first(found)
            after = slice_[-1][0]

    def forget_response(self, tenant: str, response_id: str) -> ForgottenResponse | None:
        with self._reading() as snapshot:
            found = self._get_manifest(snapshot, response_name(tenant, response_id))
        if found is None:
            return None
        if (found.tenant, found.response_id) != (tenant, response_id):
            raise StoreError("manifest", "manifest lies under another response's name")
        with self._writing() as change:
            self._delete_manifest(change, response_name(tenant, response_id))
        return forgotten_response(self, found)

    def examine(self, after: BlockKey | None) -> Examined | None:
        with self._reading() as snapshot:
            nearest = (snapshot.key_behind(after, table) for table in (self._index, self._blocks))
            behind = [key for key in nearest if key is not None]
            if not behind:
                return None
            key = BlockKey(min(behind))
            value, found = self._entry_and_record(snapshot, key)
            size = 0 if found is None else found.nbytes
            own = value is not None and self._own_entry(key, value) is not None
            return Examined(key, size, _fault_of_block(key, value, found), own)

    def discard(self, key: BlockKey) -> None:
        with self._reading() as snapshot:
            value, found = self._entry_and_record(snapshot, key)
            own = value is not None and self._own_entry(key, value) is not None
            there = value is not None or found is not None
            bad = there and _fault_of_block(key, value, found) is not None
        if bad and not own:  # who calls is the only writer, so it is so still
            with self._writing() as change:
                self._drop_block(change, key)

    def check_readers(self) -> ReaderCheck:
        try:
            with self._gate.passing():
                cleared = 0 if self._env is None else self._env.reader_check()
        except lmdb.Error as error:
            raise StoreError("io", f"readers cannot be checked: {error}") from error
        return ReaderCheck(self._gate.oldest_s(), cleared)

    def statistics(self) -> StoreStatistics:
        with self._counting:
            reads = dict(self._reads)
        return replace(self._statistics, unsound_entries=len(self._unsound), reads=reads)

    def close(self) -> None:
        """Every thread that reads or writes must have ended. What was written stays believed if nothing failed."""
        if self._env is None:
            return
        try:
            if self._durability is not Durability.POWER:
                self._env.sync(force=True)
            self._detach()
            if self._suspect:  # everything is synced by now, but is to be walked
                inspections.mark_open(self._path, Durability.POWER, self._boot)
            elif self._marked_open:
                inspections.mark_clean(self._path)
        except (OSError, lmdb.Error) as error:
            _log.warning("%s: the next start will walk it: %s", self._path, error)
            self._detach()

    # the environment

    def _attach(self) -> None:
        """Raises what lmdb and the operating system raise, and `_OtherFormat`."""
        self._env = _environment(self._path, self._map_bytes, self._durability)
        try:
            self._blocks, self._index, self._manifests, self._ages, self._names, self._meta = (
                _tables(self._env)
            )
            self._page_bytes = self._env.stat()["psize"]
            self._data = DataFile(self._path / "data.mdb", self._page_bytes)
            with self._env.begin() as txn:
                self._statistics = self._statistics_of(txn, self._load_totals(txn))
        except BaseException:
            self._detach()
            raise

    def _standing(self) -> int:
        """LMDB's number of the last transaction."""
        number: int = self._env.info()["last_txnid"]
        return number

    def _detach(self) -> None:
        env, self._env = self._env, None
        data, self._data = self._data, None
        if data is not None:
            data.close()
        if env is not None:
            env.close()

    def _attach_again(self) -> None:
        """After a failed write. Raises `StoreError`, and then the next write tries again."""
        with self._gate.shut():
            self._detach()
            try:
                self._attach()
                found = self._standing()
            except (*_DAMAGE, _OtherFormat) as error:
                raise StoreError("io", f"{self._path}: damaged while in use: {error}") from error
            if found not in (self._acknowledged, self._acknowledged + 1):
                self._detach()
                raise StoreError(
                    "io", f"stands at transaction {found}, acknowledged was {self._acknowledged}"
                )
        self._broken = False

    def _mark_open(self) -> None:
        """What was written without syncs in another life becomes durable first, if this one promises it."""
        if self._durability is Durability.POWER:
            self._env.sync(force=True)
        inspections.mark_open(self._path, self._durability, self._boot)
        self._marked_open = True

    # reading past lmdb

    def _read_at_its_place(self, asked: Asked, into: memoryview) -> Way | None:
        """None where none is known, or something else lies there by now: then LMDB knows. Raises `StoreError("io")`."""
        size = head_size(len(asked.tokens)) + into.nbytes
        with self._reading() as snapshot:
            value = snapshot.get(asked.key, self._index)
            entry = None if value is None else _index_entry(asked.key, value)
        if entry is None or entry.place == UNKNOWN:
            return None
        if (entry.fingerprint, entry.record_bytes) != (self._fingerprint, size):
            return None
        with self._gate.passing():
            if self._data is None:
                return None
            try:
                return self._data.read(
                    entry.place, size, into, lambda fill: extract(fill, size, into, asked)
                )
            except (StoreError, ShortFile):
                return None
            except OSError as error:  # in the map, the same would end the process
                raise StoreError("io", f"read failed: {error}") from error

    def _entry_and_record(
        self, snapshot: _Snapshot, key: BlockKey
    ) -> tuple[memoryview | None, memoryview | None]:
        """As LMDB has them, for those who judge the record as it lies there."""
        value = snapshot.get(key, self._index)
        entry = None if value is None else _index_entry(key, value)
        if entry is not None and entry.place != UNKNOWN and self._data is not None:
            self._data.expect(entry.place, entry.record_bytes)
        return value, snapshot.get(key, self._blocks)

    # transactions

    def _reading(self) -> _Snapshot:
        return _Snapshot(self._gate, self._begin_reading)

    def _begin_reading(self) -> Any:
        if self._env is None:
            raise StoreError("io", f"{self._path}: closed by a failure")
        try:
            return self._env.begin(buffers=True)
        except lmdb.Error as error:
            raise StoreError("io", f"read failed: {error}") from error

    @contextmanager
    def _writing(self) -> Iterator[_Change]:
        """A transaction that keeps the totals. After lmdb failed in it, nothing is believed before it is opened again."""
        try:
            if self._broken:
                self._attach_again()
            if not self._marked_open:
                self._mark_open()
            with self._env.begin(write=True, buffers=True) as txn:
                before = bytes(txn.get(_TOTALS_NAME, db=self._meta) or b"")
                change = _Change(txn, self._load_totals(txn), self._foreign_behind)
                yield change
                if change.recount or not change.totals.possible:
                    change.totals = self._recount(txn)
                after = change.totals.packed()
                if after != before:
                    txn.put(_TOTALS_NAME, after, db=self._meta)
                statistics = self._statistics_of(txn, change.totals)
            self._acknowledged = self._standing()
        except lmdb.Error as error:
            self._broken = self._suspect = True
            raise StoreError(self._blame(error), f"write failed: {error}") from error
        except OSError as error:
            raise StoreError(_reason_of(error), f"write failed: {error}") from error
        self._statistics = statistics
        self._foreign_behind = change.foreign_behind

    def _check_free_space(self, wanted: int) -> None:
        """Before LMDB meets the end of the file system. Raises `StoreError("full")`."""
        if not self._limits.min_free_bytes:
            return
        try:
            free = _free_bytes(self._path)
        except OSError as error:
            raise StoreError("io", f"no free space known: {error}") from error
        if free - wanted < self._limits.min_free_bytes:
            raise StoreError(
                "full", f"{free} bytes are free, {self._limits.min_free_bytes} are to stay so"
            )

    def _blame(self, error: lmdb.Error) -> str:
        """LMDB 0.9 calls a short write an I/O error, so ask the file system whether it is merely full."""
        if isinstance(error, lmdb.MapFullError | lmdb.DiskError):
            return "full"
        try:
            return "full" if _free_bytes(self._path) < self._record_bytes else "io"
        except OSError:
            return "io"

    # totals

    def _statistics_of(self, txn: Any, totals: _Totals) -> StoreStatistics:
        own = totals.blocks[self._fingerprint]
        return StoreStatistics(
            blocks=own,
            foreign_blocks=max(0, txn.stat(db=self._blocks)["entries"] - own),
            block_bytes=totals.block_bytes,
            manifests=txn.stat(db=self._manifests)["entries"],
            manifest_bytes=totals.manifest_bytes,
        )

    def _load_totals(self, txn: Any) -> _Totals:
        totals = _Totals.unpacked(txn.get(_TOTALS_NAME, db=self._meta) or b"")
        if totals is None:
            _log.warning("%s: its totals are damaged: counting anew", self._path)
            totals = self._recount(txn)
        return totals

    def _recount(self, txn: Any) -> _Totals:
        """Walk all tables but the blocks. A record without an index entry is taken for one of ours in size."""
        totals = _Totals()
        entries = txn.stat(db=self._index)["entries"]
        for key, value in txn.cursor(db=self._index):
            entry = _index_entry(key, value)
            if entry is None:
                found = txn.get(key, db=self._blocks)
                totals.block_bytes += 0 if found is None else record_bytes_on_disk(len(found))
            else:
                totals.block_bytes += record_bytes_on_disk(entry.record_bytes)
                totals.blocks[entry.fingerprint] += 1
        orphans = max(0, txn.stat(db=self._blocks)["entries"] - entries)
        totals.block_bytes += orphans * record_bytes_on_disk(self._record_bytes)
        for _, value in txn.cursor(db=self._manifests):
            totals.manifest_bytes += max(0, len(value) - _AGE.size)
            age = int.from_bytes(value[: _AGE.size], "big")
            if totals.next_age <= age < _IMPOSSIBLE - 1:
                totals.next_age = age + 1
        return totals

    # blocks

    def _put_block(self, change: _Change, block: BlockWrite) -> None:
        head = encode_head(
            fingerprint=self._fingerprint,
            key=block.key,
            parent=block.parent,
            tokens=block.tokens,
            created=block.last_used,
            payload=block.payload,
        )
        self._discount(change, block.key)
        change.txn.put(block.key, b"".join((head, block.payload)), db=self._blocks)
        put = change.txn.get(block.key, db=self._blocks)
        entry = _INDEX.pack(
            self._fingerprint,
            block.root,
            block.parent,
            block.depth,
            block.last_used,
            put.nbytes,
            place_of(put, self._page_bytes),
        )
        entry += struct.pack(f"<{len(block.tokens)}I", *block.tokens)
        change.txn.put(block.key, _seal(block.key, entry), db=self._index)
        change.totals.block_bytes += _bytes_on_disk(block)
        change.totals.blocks[self._fingerprint] += 1

    def _drop_block(self, change: _Change, key: BlockKey) -> None:
        self._discount(change, key)
        change.txn.delete(key, db=self._blocks)
        change.txn.delete(key, db=self._index)

    def _discount(self, change: _Change, key: BlockKey) -> None:
        """Take a record that goes, or is replaced, out of the totals."""
        self._unsound.discard(key)
        counted = self._counted_as(change.txn, key)
        if counted is None:
            return
        fingerprint, size = counted
        change.totals.block_bytes -= size
        if fingerprint is None:
            change.recount = True
        else:
            change.totals.blocks[fingerprint] -= 1

    def _counted_as(self, txn: Any, key: BlockKey) -> tuple[bytes | None, int] | None:
        """Whose record it is, None if nobody knows any more, and its bytes on disk."""
        value = txn.get(key, db=self._index)
        entry = None if value is None else _index_entry(key, value)
        if entry is not None:
            return entry.fingerprint, record_bytes_on_disk(entry.record_bytes)
        found = txn.get(key, db=self._blocks)  # costs its pages; only damage leads here
        if found is not None:
            return None, record_bytes_on_disk(len(found))
        return None if value is None else (None, 0)

    def _size(self, txn: Any, key: BlockKey) -> int:
        counted = self._counted_as(txn, key)
        return 0 if counted is None else counted[1]

    def _own_entry(self, key: bytes, value: memoryview | bytes) -> IndexEntry | None:
        found = _index_entry(key, value)
        if found is None:
            self._unsound.add(bytes(key))  # any reader may; a set is counted right all the same
            return None
        return found.own if found.fingerprint == self._fingerprint else None

    def _victims(
        self, change: _Change, blocks: Sequence[BlockWrite], drops: Sequence[BlockKey]
    ) -> list[BlockKey]:
        """The foreign records that must go for `blocks` to fit. Our own are their owner's to choose.

        There is one search for them in a store's life: none come while it is open, so it goes on where it stopped.
        """
        new = {block.key: _bytes_on_disk(block) for block in blocks}
        leaving = new.keys() | set(drops)
        growth = sum(new.values()) - sum(self._size(change.txn, key) for key in leaving)
        excess = change.totals.block_bytes + growth - self._limits.block_bytes
        victims: list[BlockKey] = []
        if excess > 0:
            cursor = change.txn.cursor(db=self._index)
            behind = cursor.iternext() if _seek_behind(cursor, change.foreign_behind) else ()
            for key, value in behind:
                change.foreign_behind = key = bytes(key)  # the cursor's view is gone with its step
                if key in leaving or self._own_entry(key, value) is not None:
                    continue
                victims.append(BlockKey(key))
                excess -= self._size(change.txn, BlockKey(key))
                if excess <= 0:
                    break
        # A smaller capacity than last time must not refuse what shrinks the store.
        if excess > 0 and growth > 0:
            raise StoreError(
                "capacity", f"{excess} bytes over the capacity of {self._limits.block_bytes}"
            )
        return victims

    # manifests

    def _get_manifest(self, snapshot: _Snapshot, response: Name) -> Manifest | None:
        found = snapshot.get(response, self._manifests)
        return None if found is None else manifests_format.decode(bytes(found[_AGE.size :]))

    def _follow(self, snapshot: _Snapshot, name: Name) -> Manifest | None:
        response = snapshot.get(name, self._names)
        return None if response is None else self._get_manifest(snapshot, Name(bytes(response)))

    def _put_manifest(self, change: _Change, manifest: Manifest, data: bytes) -> None:
        response = response_name(manifest.tenant, manifest.response_id)
        self._delete_manifest(change, response)
        age = _AGE.pack(change.totals.next_age)
        change.txn.put(response, age + data, db=self._manifests)
        change.txn.put(age, _seal(age, _AGE_ENTRY.pack(response, len(data))), db=self._ages)
        for name in other_names(manifest):
            change.txn.put(name, response, db=self._names)
        change.totals.next_age += 1
        change.totals.manifest_bytes += len(data)

    def _delete_manifest(self, change: _Change, response: Name) -> None:
        value = change.txn.get(response, db=self._manifests)
        if value is None:
            return
        found = bytes(value)
        change.txn.delete(response, db=self._manifests)
        change.totals.manifest_bytes -= len(found) - _AGE.size
        age, data = found[: _AGE.size], found[_AGE.size :]
        aged = self._aged(change.txn, age)
        if aged is None or aged.response == response:  # else its age is damaged, and another's
            change.txn.delete(age, db=self._ages)
        try:
            manifest = manifests_format.decode(data)
        except StoreError:
            return  # its names cannot be known any more; a lookup by one of them finds nothing
        for name in other_names(manifest):
            if change.txn.get(name, db=self._names) == response:
                change.txn.delete(name, db=self._names)

    def _aged(self, txn: Any, age: bytes) -> _Aged | None:
        return _age_entry(age, txn.get(age, db=self._ages) or b"")

    def _trim_manifests(self, change: _Change) -> None:
        """Oldest first. An age that names nothing goes, and whatever manifest has lost its age with it."""
        limits, txn = self._limits, change.txn
        while (
            txn.stat(db=self._manifests)["entries"] > limits.manifests
            or change.totals.manifest_bytes > limits.manifest_bytes
        ):
            cursor = txn.cursor(db=self._ages)
            age = bytes(cursor.key()) if cursor.first() else b""
            aged = _age_entry(age, cursor.value()) if age else None
            if aged is None:
                if age:
                    txn.delete(age, db=self._ages)
                self._drop_ageless(change)
                continue
            found = txn.get(aged.response, db=self._manifests) or b""
            if found[: _AGE.size] == age:
                self._delete_manifest(change, aged.response)
            else:
                txn.delete(age, db=self._ages)

    def _drop_ageless(self, change: _Change) -> None:
        """A walk over all manifests; only damage leads here."""
        ageless = [
            Name(bytes(name))
            for name, value in change.txn.cursor(db=self._manifests)
            if (aged := self._aged(change.txn, value[: _AGE.size])) is None or aged.response != name
        ]
        for name in ageless:
            self._delete_manifest(change, name)

    def _try_writing(self) -> None:
        """Make LMDB look at its list of free pages, which no read does. A full or failing disk is no damage."""
        try:
            with self._writing() as change:
                change.txn.put(_TRIAL, b"", db=self._names)
                change.txn.delete(_TRIAL, db=self._names)
        except StoreError as error:
            if isinstance(error.__cause__, _DAMAGE):
                raise error.__cause__ from None
            _log.warning("the disk tier starts without being able to write: %s", error)


@dataclass(frozen=True, slots=True)
class _Indexed:
    own: IndexEntry
    fingerprint: bytes
    record_bytes: int
    place: int


def _index_entry(key: memoryview | bytes, value: memoryview | bytes) -> _Indexed | None:
    """None for an entry that is not as it was written."""
    entry = _unseal(key, value)
    if entry is None or len(key) != KEY_BYTES or len(entry) < _INDEX.size or len(entry) % 4:
        return None
    fingerprint, root, parent, depth, last_used, size, place = _INDEX.unpack_from(entry)
    tokens = struct.unpack_from(f"<{(len(entry) - _INDEX.size) // 4}I", entry, _INDEX.size)
    # It has no place in an order, or none in LMDB, or none in a file.
    if not math.isfinite(last_used) or size > _LONGEST_VALUE or place > _IMPOSSIBLE:
        return None
    own = IndexEntry(BlockKey(bytes(key)), root, parent, depth, tokens, last_used)
    return _Indexed(own, fingerprint, size, place)


@dataclass(frozen=True, slots=True)
class _Aged:
    age: int
    response: Name
    bytes: int  # of the encoded manifest


def _age_entry(age: memoryview | bytes, value: memoryview | bytes) -> _Aged | None:
    """None for an entry that is not as it was written."""
    entry = _unseal(age, value)
    if entry is None or (len(age), len(entry)) != (_AGE.size, _AGE_ENTRY.size):
        return None
    return _Aged(*_AGE.unpack(age), *_AGE_ENTRY.unpack(entry))


def _seal(key: bytes, value: bytes) -> bytes:
    return xxhash.xxh3_64_digest(key + value) + value


def _unseal(key: memoryview | bytes, sealed: memoryview | bytes) -> bytes | None:
    value = bytes(sealed[_SEAL_BYTES:])
    return value if sealed[:_SEAL_BYTES] == xxhash.xxh3_64_digest(bytes(key) + value) else None


def _bytes_on_disk(block: BlockWrite) -> int:
    return record_bytes_on_disk(head_size(len(block.tokens)) + block.payload.nbytes)


def _free_bytes(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def _reason_of(error: OSError) -> str:
    return "full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "io"


def _seek_behind(cursor: Any, after: bytes | None) -> bool:
    """Put `cursor` on the first key behind `after`; False if there is none."""
    there: bool = cursor.set_range(after) if after else cursor.first()
    return bool(cursor.next()) if there and cursor.key() == after else there


def _settle(state: StateDir, inspection: Inspection) -> None:
    """Make sure that there is an environment which may be mapped. Raises `Damaged`, and what the disk raises."""
    match inspection.finding:
        case Finding.UNSYNCED:
            _log.warning(
                "%s was written without syncs, and the machine has started anew since: deleted",
                inspection.path,
            )
            inspections.discard(state, inspection.path)
            _create(state, inspection.path)
        case Finding.NOTHING_THERE:
            _create(state, inspection.path)
        case Finding.UNCLEAN:
            inspection.join()
        case Finding.CLEAN:
            pass


def _create(state: StateDir, path: Path) -> None:
    beside = inspections.beside(path)
    beside.mkdir(mode=0o700)
    env = _environment(beside, _SCRUB_MAP_BYTES, Durability.POWER)
    try:
        with env.begin(write=True) as txn:
            *_, meta = (env.open_db(table, txn=txn) for table in _TABLES)
            txn.put(_FORMAT_NAME, _seal(_FORMAT_NAME, _VERSION.pack(_FORMAT)), db=meta)
            txn.put(_TOTALS_NAME, _Totals().packed(), db=meta)
    finally:
        env.close()
    inspections.mark_clean(beside)
    for file in beside.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    sync_directory(beside)
    beside.rename(path)
    sync_directory(state.path)


def _environment(
    path: Path, map_bytes: int, durability: Durability, *, readahead: bool = False
) -> Any:
    return lmdb.open(
        str(path),
        map_size=map_bytes,
        mode=0o700,  # of the directory; its files get 0600
        max_dbs=len(_TABLES),
        max_readers=_MAX_READERS,
        readahead=readahead,
        sync=durability is Durability.POWER,
        lib_version=_ENGINE,
    )


def _tables(env: Any) -> list[Any]:
    """Every table of a whole environment in our format. Raises `_OtherFormat`, and what lmdb raises where one is missing."""
    *tables, meta = _TABLES
    opened = [env.open_db(name, create=False) for name in tables]
    try:
        opened.append(env.open_db(meta, create=False))
    except lmdb.NotFoundError:
        raise _OtherFormat("it is older than its format's name") from None
    with env.begin() as txn:
        written = _unseal(_FORMAT_NAME, txn.get(_FORMAT_NAME, db=opened[-1]) or b"")
    if written != _VERSION.pack(_FORMAT):
        found = "unknown" if written is None else str(int.from_bytes(written, "little"))
        raise _OtherFormat(f"its format is {found}, this is format {_FORMAT}")
    return opened


@dataclass(frozen=True, slots=True)
class ScrubStep:
    """One record looked at. `reason` is None for a good one, else why it would be refused."""

    done: int
    total: int  # may grow at the end, where records are found that no index names
    name: str  # of the record, in hexadecimal
    reason: str | None


def scrub(state: StateDir, boot: str | None = None) -> Iterator[ScrubStep]:
    """Verify every byte of every block, whichever model's, and every manifest. Changes nothing, needs no model.

    A record that the index does not name has the reason "index", an entry without its record "missing"; a manifest whose
    age does not name it "age". Raises `StoreError("io")` where the daemon would put the environment aside and begin empty.
    """
    try:
        inspection = inspections.inspect(state, this_boot() if boot is None else boot)
        path = inspection.path
        match inspection.finding:
            case Finding.NOTHING_THERE:
                return
            case Finding.UNSYNCED:
                raise StoreError("io", f"{path}: was not synced before the machine started anew")
            case Finding.UNCLEAN | Finding.CLEAN:
                inspection.join()
        env = _environment(path, _SCRUB_MAP_BYTES, Durability.POWER, readahead=True)
        try:
            yield from _scrub(env)
        finally:
            env.close()
    except (OSError, lmdb.Error, Damaged, _OtherFormat) as error:
        raise StoreError("io", f"the disk tier cannot be walked: {error}") from error


def _scrub(env: Any) -> Iterator[ScrubStep]:
    blocks, index, manifests, ages, _, _ = _tables(env)
    keys, names = _keys_of(env, index), _keys_of(env, manifests)
    with env.begin() as txn:
        records = txn.stat(db=blocks)["entries"]
    total, done = len(keys) + len(names), 0
    for key in keys:
        done += 1
        with env.begin(buffers=True) as txn:
            value, found = txn.get(key, db=index), txn.get(key, db=blocks)
            records -= found is not None
            reason = _fault_of_block(BlockKey(key), value, found)
        yield ScrubStep(done, total, key.hex(), reason)
    for name in names:
        done += 1
        with env.begin() as txn:
            found = txn.get(name, db=manifests)
            aged = _age_entry(found[: _AGE.size], txn.get(found[: _AGE.size], db=ages) or b"")
        yield ScrubStep(done, total, name.hex(), _fault_of_manifest(Name(name), found, aged))
    total += records
    if records:  # the walk that touches every page again
        for key in set(_keys_of(env, blocks)).difference(keys):
            done += 1
            yield ScrubStep(done, total, key.hex(), "index")


def _keys_of(env: Any, table: Any) -> list[bytes]:
    with env.begin() as txn:
        return list(txn.cursor(db=table).iternext(keys=True, values=False))


def _fault_of_block(
    key: BlockKey, value: memoryview | None, found: memoryview | None
) -> str | None:
    """`value` is its entry in the index, `found` the record."""
    entry = None if value is None else _index_entry(key, value)
    if entry is None:
        return "index"
    return "missing" if found is None else fault(found, entry.fingerprint, entry.own)


def _fault_of_manifest(name: Name, found: bytes, aged: _Aged | None) -> str | None:
    try:
        manifest = manifests_format.decode(found[_AGE.size :])
    except StoreError as error:
        return error.reason
    if response_name(manifest.tenant, manifest.response_id) != name:
        return "key"
    return None if aged is not None and aged.response == name else "age"
