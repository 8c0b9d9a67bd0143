"""`BlockStore` on LMDB, the only file that knows lmdb. One environment in the state directory, five tables:

    blocks     key -> record (record.py); payloads live here and nowhere else
    index      key -> fingerprint 32, parent 32, last_used f64, record size u64, token ids u32...: what a start reads
    manifests  response name -> age u64, encoded manifest
    ages       age u64, big endian -> response name, size u64: oldest first, for the budget
    names      item or content name -> response name

How it is used, each for a measured reason (lmdb 3.0.0, engine 0.9.36)
    sync=True: acknowledged means on the platter; sync=False gave silently wrong values after a simulated power loss.
    Never writemap: with it a full disk is a SIGBUS, without it an `lmdb.Error`.
    A write transaction begins, puts and commits in one call, so on one thread: ended elsewhere, it hangs all others.
    No transaction object outlives its function: even a finished one keeps its reader slot until it is collected.
    Views (`buffers=True`) are verified and copied inside their transaction.
    The map is far larger than the capacity and never resized; our own budget, not MDB_MAP_FULL, is the limit.
    LMDB has no checksum for values: ours is in the record, in the manifest, and for `index` the key itself is one.

A damaged environment
    It is created beside its place and renamed into it, so a crash while creating leaves none.
    Reading a page beyond the end of a truncated file is a SIGBUS. So at open a file shorter than LMDB believes is
    made longer with a hole: zero pages are refused by LMDB's own checks and by our checksums, without a signal.
    (A file may legally be shorter: pages allocated and freed within one transaction are never written.)
    Whatever LMDB refuses at open, or while the small tables are read through, is put aside and replaced by nothing.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lmdb

from tiers import manifest as manifests_format
from tiers import record
from tiers.block import BlockKey, StoreError, chain_key
from tiers.state_dir import make_private, sync_directory
from tiers.store import (
    IndexEntry,
    Name,
    StoreStatistics,
    check_manifest_fits,
    content_name,
    item_name,
    other_names,
    record_bytes_on_disk,
    response_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tiers.block import TokenIds
    from tiers.manifest import Manifest
    from tiers.state_dir import StateDir
    from tiers.store import BlockWrite, StoreLimits

_ENVIRONMENT = "kv"
_ENGINE = 0  # LMDB 0.9: formats 0.9 and 1.0 are mutually unreadable, so never the binding's default
_TABLES = (b"blocks", b"index", b"manifests", b"ages", b"names")
_MAX_READERS = 126
_LONGEST_HOLE = 256 << 20  # bytes; one transaction cannot legally leave out more
_INDEX = struct.Struct("<32s32sdQ")
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


class _Damaged(Exception):
    """The environment cannot be trusted to be walked."""


@dataclass(slots=True)
class _Usage:
    """What the tables hold, kept beside them so that no write has to walk them."""

    blocks: dict[BlockKey, int]  # {key: bytes on disk}, every model's
    block_bytes: int
    foreign: dict[BlockKey, float]  # {key: last_used} of records that only take room
    manifests: int
    manifest_bytes: int
    next_age: int

    def statistics(self) -> StoreStatistics:
        return StoreStatistics(
            blocks=len(self.blocks) - len(self.foreign),
            foreign_blocks=len(self.foreign),
            block_bytes=self.block_bytes,
            manifests=self.manifests,
            manifest_bytes=self.manifest_bytes,
        )


class LmdbStore:
    """See `BlockStore` for the promises. Any thread may read; `write` and `forget_response` belong to one thread."""

    def __init__(
        self,
        env: Any,
        *,
        fingerprint: bytes,
        payload_bytes: int,
        block_tokens: int,
        limits: StoreLimits,
    ) -> None:
        """Take an environment with all tables, walk the small ones. Use `open` instead."""
        assert len(fingerprint) == 32
        self._env = env
        self._fingerprint = fingerprint
        self._limits = limits
        self._record_bytes = record.head_size(block_tokens) + payload_bytes
        self._blocks, self._index, self._manifests, self._ages, self._names = (
            env.open_db(name, create=False) for name in _TABLES
        )
        usage = self._take_stock()
        self._usage: _Usage | None = usage  # None: a write failed, count anew
        self._statistics = usage.statistics()

    @classmethod
    def open(
        cls,
        state: StateDir,
        *,
        fingerprint: bytes,
        payload_bytes: int,
        block_tokens: int,
        limits: StoreLimits,
        map_bytes: int | None = None,
    ) -> LmdbStore:
        """Open the environment of `state`, or an empty one where there is none or a damaged one.

        `map_bytes` is for tests; the default leaves room for every page that a full store could need.
        Raises `StateDirRefused` for files that are not safely ours, `StoreError` if the disk fails.
        """
        size = map_bytes or max(
            4 << 30, 2 * limits.block_bytes + 2 * limits.manifest_bytes + (1 << 30)
        )
        path = state.path / _ENVIRONMENT
        for attempt in ("existing", "fresh"):
            try:
                env = _open_environment(state, path, size)
                try:
                    return cls(
                        env,
                        fingerprint=fingerprint,
                        payload_bytes=payload_bytes,
                        block_tokens=block_tokens,
                        limits=limits,
                    )
                except BaseException:
                    env.close()
                    raise
            except (*_DAMAGE, _Damaged) as error:
                if attempt == "fresh":
                    raise StoreError(
                        "io", f"{path}: an empty environment cannot be used: {error}"
                    ) from error
                _log.error("%s: %s", path, error)
                state.put_aside(path)
            except (OSError, lmdb.Error) as error:
                raise StoreError("io", f"{path}: cannot be opened: {error}") from error
        raise AssertionError("unreachable: the second attempt returns or raises")

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
        with self._writing() as (txn, usage):
            for key in [*drops, *self._victims(usage, blocks, drops)]:
                self._drop_block(txn, usage, key)
            for block in blocks:
                self._put_block(txn, usage, block)
            for manifest, data in encoded:
                self._put_manifest(txn, usage, manifest, data)
            self._trim_manifests(txn, usage)

    def read(self, key: BlockKey, parent: BlockKey, tokens: TokenIds, into: memoryview) -> None:
        with self._reading() as txn:
            found = txn.get(key, db=self._blocks)
            if found is None:
                raise StoreError("missing", f"no record of {key.hex()[:16]}")
            payload = record.verify(
                found, fingerprint=self._fingerprint, key=key, parent=parent, tokens=tokens
            )
            if payload.nbytes != into.nbytes:
                raise StoreError(
                    "size", f"payload of {payload.nbytes} bytes for a slot of {into.nbytes}"
                )
            into[:] = (
                payload  # holds the GIL for 0.12 ms per 1.44 MiB; numpy's copy, which does not, is slower alone
            )

    def index(self) -> Iterator[IndexEntry]:
        with self._reading() as txn:
            found = [_index_entry(key, value) for key, value in txn.cursor(db=self._index)]
        return iter([own.entry for own in found if own and own.fingerprint == self._fingerprint])

    def find_response(self, tenant: str, response_id: str) -> Manifest | None:
        with self._reading() as txn:
            found = self._get_manifest(txn, response_name(tenant, response_id))
        if found is None or not found.stored:
            return None
        if (found.tenant, found.response_id) != (tenant, response_id):
            raise StoreError("manifest", "manifest lies under another response's name")
        return found

    def find_item(self, tenant: str, item_id: str) -> Manifest | None:
        with self._reading() as txn:
            found = self._follow(txn, item_name(tenant, item_id))
        if found is not None and (found.tenant != tenant or item_id not in found.item_ids):
            raise StoreError("manifest", "manifest lies under another item's name")
        return found

    def find_content(self, tenant: str, digest: bytes) -> Manifest | None:
        with self._reading() as txn:
            found = self._follow(txn, content_name(tenant, digest))
        if found is not None and (found.tenant, found.content_digest) != (tenant, digest):
            raise StoreError("manifest", "manifest lies under another content's name")
        return found

    def forget_response(self, tenant: str, response_id: str) -> bool:
        if self.find_response(tenant, response_id) is None:
            return False
        with self._writing() as (txn, usage):
            self._delete_manifest(txn, usage, response_name(tenant, response_id))
        return True

    def statistics(self) -> StoreStatistics:
        return self._statistics

    def close(self) -> None:
        """Every thread that reads or writes must have ended."""
        self._env.close()

    # transactions

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        try:
            with self._env.begin(buffers=True) as txn:
                yield txn
        except lmdb.Error as error:
            raise StoreError("io", f"read failed: {error}") from error

    @contextmanager
    def _writing(self) -> Iterator[tuple[Any, _Usage]]:
        """A transaction and the running totals. They are counted anew after anything went wrong half way."""
        try:
            usage = self._usage or self._take_stock()
            self._usage = None
            with self._env.begin(write=True) as txn:
                yield txn, usage
        except lmdb.MapFullError as error:
            raise StoreError("full", f"write failed: {error}") from error
        except (lmdb.Error, _Damaged) as error:
            raise StoreError(self._blame(), f"write failed: {error}") from error
        self._usage = usage
        self._statistics = usage.statistics()

    def _blame(self) -> str:
        """LMDB 0.9 calls a short write an I/O error, so ask the file system whether it is merely full."""
        status = os.statvfs(self._env.path())
        return "full" if status.f_bavail * status.f_frsize < self._record_bytes else "io"

    # blocks

    def _put_block(self, txn: Any, usage: _Usage, block: BlockWrite) -> None:
        head = record.encode_head(
            fingerprint=self._fingerprint,
            key=block.key,
            parent=block.parent,
            tokens=block.tokens,
            created=block.last_used,
            payload=block.payload,
        )
        size = len(head) + block.payload.nbytes
        entry = _INDEX.pack(self._fingerprint, block.parent, block.last_used, size)
        txn.put(block.key, b"".join((head, block.payload)), db=self._blocks)
        txn.put(
            block.key, entry + struct.pack(f"<{len(block.tokens)}I", *block.tokens), db=self._index
        )
        usage.block_bytes -= usage.blocks.get(block.key, 0)
        usage.blocks[block.key] = self._bytes_on_disk(block)
        usage.block_bytes += usage.blocks[block.key]
        usage.foreign.pop(block.key, None)

    def _drop_block(self, txn: Any, usage: _Usage, key: BlockKey) -> None:
        txn.delete(key, db=self._blocks)
        txn.delete(key, db=self._index)
        usage.block_bytes -= usage.blocks.pop(key, 0)
        usage.foreign.pop(key, None)

    def _victims(
        self, usage: _Usage, blocks: Sequence[BlockWrite], drops: Sequence[BlockKey]
    ) -> list[BlockKey]:
        """The foreign records that must go for `blocks` to fit, oldest first. Our own are their owner's to choose."""
        new = {block.key: self._bytes_on_disk(block) for block in blocks}
        leaving = new.keys() | set(drops)
        excess = usage.block_bytes + sum(new.values()) - self._limits.block_bytes
        excess -= sum(usage.blocks.get(key, 0) for key in leaving)
        victims: list[BlockKey] = []
        if excess > 0:
            for key in sorted(
                usage.foreign.keys() - leaving, key=lambda key: (usage.foreign[key], key)
            ):
                victims.append(key)
                excess -= usage.blocks[key]
                if excess <= 0:
                    break
        if excess > 0:
            raise StoreError(
                "full", f"{excess} bytes over the capacity of {self._limits.block_bytes}"
            )
        return victims

    def _bytes_on_disk(self, block: BlockWrite) -> int:
        return record_bytes_on_disk(record.head_size(len(block.tokens)) + block.payload.nbytes)

    # manifests

    def _get_manifest(self, txn: Any, response: Name) -> Manifest | None:
        found = txn.get(response, db=self._manifests)
        return None if found is None else manifests_format.decode(bytes(found[_AGE.size :]))

    def _follow(self, txn: Any, name: Name) -> Manifest | None:
        response = txn.get(name, db=self._names)
        return None if response is None else self._get_manifest(txn, Name(bytes(response)))

    def _put_manifest(self, txn: Any, usage: _Usage, manifest: Manifest, data: bytes) -> None:
        response = response_name(manifest.tenant, manifest.response_id)
        self._delete_manifest(txn, usage, response)
        age = _AGE.pack(usage.next_age)
        txn.put(response, age + data, db=self._manifests)
        txn.put(age, _AGE_ENTRY.pack(response, len(data)), db=self._ages)
        for name in other_names(manifest):
            txn.put(name, response, db=self._names)
        usage.next_age += 1
        usage.manifests += 1
        usage.manifest_bytes += len(data)

    def _delete_manifest(self, txn: Any, usage: _Usage, response: Name) -> None:
        found = txn.pop(response, db=self._manifests)
        if found is None:
            return
        txn.delete(found[: _AGE.size], db=self._ages)
        usage.manifests -= 1
        usage.manifest_bytes -= len(found) - _AGE.size
        try:
            manifest = manifests_format.decode(found[_AGE.size :])
        except StoreError:
            return  # its names cannot be known any more; a lookup by one of them finds nothing
        for name in other_names(manifest):
            if txn.get(name, db=self._names) == response:
                txn.delete(name, db=self._names)

    def _trim_manifests(self, txn: Any, usage: _Usage) -> None:
        limits = self._limits
        while usage.manifests > limits.manifests or usage.manifest_bytes > limits.manifest_bytes:
            cursor = txn.cursor(db=self._ages)
            cursor.first()
            response, _ = _AGE_ENTRY.unpack(cursor.value())
            self._delete_manifest(txn, usage, Name(response))

    # opening

    def _take_stock(self) -> _Usage:
        """Read the small tables through. Raises `lmdb.Error` or `_Damaged` where they cannot be."""
        usage = _Usage({}, 0, {}, 0, 0, 0)
        with self._env.begin(buffers=True) as txn:
            for key, value in txn.cursor(db=self._index):
                found = _index_entry(key, value)
                size = found.record_bytes if found else self._record_bytes
                usage.blocks[BlockKey(bytes(key))] = record_bytes_on_disk(size)
                if found is None or found.fingerprint != self._fingerprint:
                    usage.foreign[BlockKey(bytes(key))] = found.entry.last_used if found else 0.0
            if txn.stat(db=self._blocks)["entries"] != len(usage.blocks):
                # Only damage does this. The walk is slow: lmdb touches every page of every value it passes.
                for key in txn.cursor(db=self._blocks).iternext(keys=True, values=False):
                    if BlockKey(bytes(key)) not in usage.blocks:
                        usage.blocks[BlockKey(bytes(key))] = record_bytes_on_disk(
                            self._record_bytes
                        )
                        usage.foreign[BlockKey(bytes(key))] = 0.0
            usage.block_bytes = sum(usage.blocks.values())
            for age, value in txn.cursor(db=self._ages):
                if len(age) != _AGE.size or len(value) != _AGE_ENTRY.size:
                    raise _Damaged("the table of ages is not as it was written")
                usage.next_age = _AGE.unpack(age)[0] + 1
                usage.manifests += 1
                usage.manifest_bytes += _AGE_ENTRY.unpack(value)[1]
        return usage


@dataclass(frozen=True, slots=True)
class _Indexed:
    entry: IndexEntry
    fingerprint: bytes
    record_bytes: int


def _index_entry(key: memoryview, value: memoryview) -> _Indexed | None:
    """None for an entry that is not as it was written: the key is a hash over parent and tokens."""
    if len(value) < _INDEX.size or (len(value) - _INDEX.size) % 4:
        return None
    fingerprint, parent, last_used, size = _INDEX.unpack_from(value)
    tokens = struct.unpack_from(f"<{(len(value) - _INDEX.size) // 4}I", value, _INDEX.size)
    if chain_key(parent, tokens) != bytes(key):
        return None
    return _Indexed(
        IndexEntry(BlockKey(bytes(key)), BlockKey(parent), tokens, last_used), fingerprint, size
    )


def _open_environment(state: StateDir, path: Path, map_bytes: int) -> Any:
    """The environment at `path`, created empty where there is none."""
    beside = path.with_name(path.name + ".new")
    if beside.is_dir():
        shutil.rmtree(beside)  # a crash while creating; we hold the lock
    if not os.path.lexists(path):
        beside.mkdir(mode=0o700)
        env = _environment(beside, map_bytes)
        for table in _TABLES:
            env.open_db(table)
        env.close()
        for file in beside.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        sync_directory(beside)
        beside.rename(path)
        sync_directory(state.path)
    make_private(path)
    for file in path.iterdir():
        make_private(file)
    env = _environment(path, map_bytes)
    try:
        _fill_hole(env, path)
    except BaseException:
        env.close()
        raise
    return env


def _environment(path: Path, map_bytes: int) -> Any:
    return lmdb.open(
        str(path),
        map_size=map_bytes,
        mode=0o700,  # of the directory; its files get 0600
        max_dbs=len(_TABLES),
        max_readers=_MAX_READERS,
        readahead=True,
        lib_version=_ENGINE,
    )


def _fill_hole(env: Any, path: Path) -> None:
    """Make a file that is shorter than LMDB believes as long as that (see the module's header)."""
    data = path / "data.mdb"
    expected = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    missing = expected - data.stat().st_size
    if missing > _LONGEST_HOLE:
        raise _Damaged(f"{missing} of {expected} bytes are missing from its end")
    if missing > 0:
        _log.warning("%s is %d bytes shorter than its last page: filled with zeros", data, missing)
        os.truncate(data, expected)
