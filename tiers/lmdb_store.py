"""`BlockStore` on LMDB, the only file that knows lmdb. One environment in the state directory, six tables:

    blocks     key -> record (record.py); payloads live here and nowhere else
    index      key -> seal, fingerprint 32, root 32, parent 32, depth u32, last_used f64, record size u64, token ids u32...
    manifests  response name -> age u64, encoded manifest
    ages       age u64, big endian -> seal, response name, size u64: oldest first, for the budget
    names      item or content name -> response name
    meta       "format" -> seal, u32

How it is used, each for a measured reason (lmdb 3.0.0, engine 0.9.36)
    sync=True: acknowledged means on the platter; sync=False gave silently wrong values after a simulated power loss.
    Never writemap: with it a full disk is a SIGBUS, without it an `lmdb.Error`.
    A write transaction begins, puts and commits in one call, so on one thread: ended elsewhere, it hangs all others.
    No read transaction outlives its `with`: even a finished one keeps its reader slot until it is collected, and the
    traceback of a refused record can keep it for long (measured: 64 slots taken by four readers).
    Views (`buffers=True`) are verified and copied inside their transaction.
    The map is far larger than the capacity and never resized; our own budget, not MDB_MAP_FULL, is the limit.
    LMDB has no checksum for values: ours are in the record, in the manifest, and in the seals (xxh3-64 of key and
    value) of the two tables that a start believes.

A damaged environment
    It is created beside its place and renamed into it, so a crash while creating leaves none.
    Reading a page beyond the end of a truncated file is a SIGBUS, and a page of zeros can be a failed assertion: both
    kill. So where the file is shorter than LMDB believes, another process walks it first, and may die of it.
    (A file may legally be shorter: pages allocated and freed within one transaction are never written. It is then
    made as long as it should be, so that the next start has no question.)
    Whatever LMDB refuses at open, or while the small tables are read through, is put aside and replaced by nothing.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
import struct
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb
import xxhash

from tiers import manifest as manifests_format
from tiers import record
from tiers.block import KEY_BYTES, BlockKey, StoreError
from tiers.state_dir import make_private, sync_directory
from tiers.store import (
    IndexEntry,
    Name,
    StoreStatistics,
    chain_entries,
    check_manifest_fits,
    content_name,
    forgotten_response,
    item_name,
    other_names,
    record_bytes_on_disk,
    response_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tiers.block import TokenIds
    from tiers.manifest import Manifest
    from tiers.state_dir import StateDir
    from tiers.store import BlockWrite, ForgottenResponse, StoreLimits

_ENVIRONMENT = "kv"
_ENGINE = 0  # LMDB 0.9: formats 0.9 and 1.0 are mutually unreadable, so never the binding's default
_TABLES = (b"blocks", b"index", b"manifests", b"ages", b"names", b"meta")
_MAX_READERS = 126
_SCRUB_MAP_BYTES = 1 << 30  # lmdb makes it larger where the file is
_WALK_S = 600.0  # a walk that takes longer goes in circles
_LONGEST_HOLE = 256 << 20  # bytes; one transaction cannot legally leave out more
_SEAL_BYTES = 8
_TRIAL = b"trial"  # shorter than any name
_FORMAT = 2  # of the tables; 1 had no roots, no depths and no meta
_FORMAT_NAME = b"format"
_INDEX = struct.Struct("<32s32s32sIdQ")
_VERSION = struct.Struct("<I")
_SLICE = 4096  # entries of the index read in one transaction, whoever they belong to
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


class _OtherFormat(Exception):
    """The environment is whole, but its tables are not ours to read."""


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


class _Snapshot:
    """A read transaction that frames and tracebacks cannot keep. lmdb's errors leave it as `StoreError("io")`."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self._txn: Any = None

    def __enter__(self) -> _Snapshot:
        try:
            self._txn = self._env.begin(buffers=True)
        except lmdb.Error as error:
            raise StoreError("io", f"read failed: {error}") from error
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._txn.abort()
        self._txn = None
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
        there = cursor.first() if after is None else cursor.set_range(after)
        if there and cursor.key() == after:
            there = cursor.next()
        found = itertools.islice(cursor.iternext(), limit) if there else ()
        return [(bytes(key), bytes(value)) for key, value in found]


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
        self._block_tokens = block_tokens
        self._record_bytes = record.head_size(block_tokens) + payload_bytes
        self._blocks, self._index, self._manifests, self._ages, self._names, _ = _tables(env)
        usage = self._take_stock()
        self._try_writing()
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
            except _OtherFormat as error:
                _log.warning("%s: %s", path, error)
                state.put_aside(path, "other-format")
            except (*_DAMAGE, _Damaged) as error:
                if attempt == "fresh":
                    raise StoreError(
                        "io", f"{path}: an empty environment cannot be used: {error}"
                    ) from error
                _log.error("%s: %s", path, error)
                state.put_aside(path, "damaged")
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
        with self._reading() as snapshot:
            found = snapshot.get(key, self._blocks)
            if found is None:
                raise StoreError("missing", f"no record of {key.hex()[:16]}")
            payload = record.verify(
                found, fingerprint=self._fingerprint, key=key, parent=parent, tokens=tokens
            )
            into[:] = (
                payload  # holds the GIL for 0.12 ms per 1.44 MiB; numpy's copy, which does not, is slower alone
            )

    def index(self, after: BlockKey | None, limit: int) -> list[IndexEntry]:
        found: list[IndexEntry] = []
        while len(found) < limit:
            with self._reading() as snapshot:
                slice_ = snapshot.items_behind(after, _SLICE, self._index)
            own = (self._own_entry(key, value) for key, value in slice_)
            found += [entry for entry in own if entry is not None]
            if len(slice_) < _SLICE:
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

    def forget_response(self, tenant: str, response_id: str) -> ForgottenResponse | None:
        found = self.find_response(tenant, response_id)
        if found is None:
            return None
        with self._writing() as (txn, usage):
            self._delete_manifest(txn, usage, response_name(tenant, response_id))
        return forgotten_response(self, found)

    def statistics(self) -> StoreStatistics:
        return self._statistics

    def close(self) -> None:
        """Every thread that reads or writes must have ended."""
        self._env.close()

    # transactions

    def _reading(self) -> _Snapshot:
        return _Snapshot(self._env)

    @contextmanager
    def _writing(self) -> Iterator[tuple[Any, _Usage]]:
        """A transaction and the running totals. They are counted anew after anything went wrong half way."""
        try:
            usage = self._usage or self._take_stock()
            self._usage = None
            with self._env.begin(write=True) as txn:
                yield txn, usage
        except (lmdb.MapFullError, lmdb.DiskError) as error:
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
        entry = _INDEX.pack(
            self._fingerprint, block.root, block.parent, block.depth, block.last_used, size
        )
        entry += struct.pack(f"<{len(block.tokens)}I", *block.tokens)
        txn.put(block.key, b"".join((head, block.payload)), db=self._blocks)
        txn.put(block.key, _seal(block.key, entry), db=self._index)
        usage.block_bytes -= usage.blocks.get(block.key, 0)
        usage.blocks[block.key] = self._bytes_on_disk(block)
        usage.block_bytes += usage.blocks[block.key]
        usage.foreign.pop(block.key, None)

    def _own_entry(self, key: bytes, value: memoryview | bytes) -> IndexEntry | None:
        found = _index_entry(key, value)
        return found.own if found and found.fingerprint == self._fingerprint else None

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
        growth = sum(new.values()) - sum(usage.blocks.get(key, 0) for key in leaving)
        excess = usage.block_bytes + growth - self._limits.block_bytes
        victims: list[BlockKey] = []
        if excess > 0:
            for key in sorted(
                usage.foreign.keys() - leaving, key=lambda key: (usage.foreign[key], key)
            ):
                victims.append(key)
                excess -= usage.blocks[key]
                if excess <= 0:
                    break
        # A smaller capacity than last time must not refuse what shrinks the store.
        if excess > 0 and growth > 0:
            raise StoreError(
                "full", f"{excess} bytes over the capacity of {self._limits.block_bytes}"
            )
        return victims

    def _bytes_on_disk(self, block: BlockWrite) -> int:
        return record_bytes_on_disk(record.head_size(len(block.tokens)) + block.payload.nbytes)

    # manifests

    def _get_manifest(self, snapshot: _Snapshot, response: Name) -> Manifest | None:
        found = snapshot.get(response, self._manifests)
        return None if found is None else manifests_format.decode(bytes(found[_AGE.size :]))

    def _follow(self, snapshot: _Snapshot, name: Name) -> Manifest | None:
        response = snapshot.get(name, self._names)
        return None if response is None else self._get_manifest(snapshot, Name(bytes(response)))

    def _put_manifest(self, txn: Any, usage: _Usage, manifest: Manifest, data: bytes) -> None:
        response = response_name(manifest.tenant, manifest.response_id)
        self._delete_manifest(txn, usage, response)
        age = _AGE.pack(usage.next_age)
        txn.put(response, age + data, db=self._manifests)
        txn.put(age, _seal(age, _AGE_ENTRY.pack(response, len(data))), db=self._ages)
        for name in other_names(manifest):
            txn.put(name, response, db=self._names)
        usage.next_age += 1
        usage.manifests += 1
        usage.manifest_bytes += len(data)

    def _delete_manifest(self, txn: Any, usage: _Usage, response: Name) -> None:
        found = txn.pop(response, db=self._manifests)
        if found is None:
            return
        self._forget_age(txn, usage, found[: _AGE.size])
        try:
            manifest = manifests_format.decode(found[_AGE.size :])
        except StoreError:
            return  # its names cannot be known any more; a lookup by one of them finds nothing
        for name in other_names(manifest):
            if txn.get(name, db=self._names) == response:
                txn.delete(name, db=self._names)

    def _forget_age(self, txn: Any, usage: _Usage, age: bytes) -> Name | None:
        """The response of that age. The totals count what the ages say, so an entry leaves them as it came."""
        found = _age_entry(age, txn.pop(age, db=self._ages) or b"")
        if found is None:
            return None
        usage.manifests -= 1
        usage.manifest_bytes -= found.bytes
        return found.response

    def _trim_manifests(self, txn: Any, usage: _Usage) -> None:
        limits = self._limits
        while usage.manifests > limits.manifests or usage.manifest_bytes > limits.manifest_bytes:
            cursor = txn.cursor(db=self._ages)
            cursor.first()
            response = self._forget_age(txn, usage, cursor.key())
            if response is not None:
                self._delete_manifest(txn, usage, response)

    # opening

    def _try_writing(self) -> None:
        """Make LMDB look at its list of free pages, which no read does. A full or failing disk is no damage."""
        try:
            with self._env.begin(write=True) as txn:
                txn.put(_TRIAL, b"", db=self._names)
                txn.delete(_TRIAL, db=self._names)
        except _DAMAGE:
            raise
        except lmdb.Error as error:
            _log.warning("the disk tier starts without being able to write: %s", error)

    def _take_stock(self) -> _Usage:
        """Read the small tables through. Raises what lmdb raises: the caller knows what it means."""
        usage = _Usage({}, 0, {}, 0, 0, 0)
        with self._env.begin(buffers=True) as txn:
            for key, value in txn.cursor(db=self._index):
                found = _index_entry(key, value)
                size = found.record_bytes if found else self._record_bytes
                usage.blocks[BlockKey(bytes(key))] = record_bytes_on_disk(size)
                if found is None or found.fingerprint != self._fingerprint:
                    usage.foreign[BlockKey(bytes(key))] = found.own.last_used if found else 0.0
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
                written = _age_entry(age, value)
                if written is not None:
                    usage.next_age = written.age + 1
                    usage.manifests += 1
                    usage.manifest_bytes += written.bytes
        return usage


@dataclass(frozen=True, slots=True)
class _Indexed:
    own: IndexEntry
    fingerprint: bytes
    record_bytes: int


def _index_entry(key: memoryview | bytes, value: memoryview | bytes) -> _Indexed | None:
    """None for an entry that is not as it was written."""
    entry = _unseal(key, value)
    if entry is None or len(key) != KEY_BYTES or len(entry) < _INDEX.size or len(entry) % 4:
        return None
    fingerprint, root, parent, depth, last_used, size = _INDEX.unpack_from(entry)
    tokens = struct.unpack_from(f"<{(len(entry) - _INDEX.size) // 4}I", entry, _INDEX.size)
    if not math.isfinite(last_used):  # it has no place in an order
        return None
    own = IndexEntry(BlockKey(bytes(key)), root, parent, depth, tokens, last_used)
    return _Indexed(own, fingerprint, size)


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
        with env.begin(write=True) as txn:
            version = _seal(_FORMAT_NAME, _VERSION.pack(_FORMAT))
            txn.put(_FORMAT_NAME, version, db=env.open_db(b"meta", txn=txn, create=False))
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
    _check_length(path, map_bytes)
    return _environment(path, map_bytes)


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


def _tables(env: Any) -> list[Any]:
    """Every table of a whole environment in our format. Raises `_OtherFormat`, and what lmdb raises where one is missing."""
    *tables, meta = (env.open_db(name, create=name == b"meta") for name in _TABLES)
    with env.begin() as txn:
        written = _unseal(_FORMAT_NAME, txn.get(_FORMAT_NAME, db=meta) or b"")
    if written is None or written != _VERSION.pack(_FORMAT):
        found = "unknown" if written is None else str(int.from_bytes(written, "little"))
        raise _OtherFormat(f"its format is {found}, this is format {_FORMAT}")
    return [*tables, meta]


def _check_length(path: Path, map_bytes: int) -> None:
    """Make sure that no page LMDB may touch lies beyond the end of its file. Raises `_Damaged`."""
    env = _environment(path, map_bytes)
    expected = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    env.close()
    data = path / "data.mdb"
    missing = expected - data.stat().st_size
    if missing <= 0:
        return
    if missing > _LONGEST_HOLE:
        raise _Damaged(f"{missing} of {expected} bytes are missing from its end")
    _log.warning("%s is %d bytes shorter than expected: checking all of it", data, missing)
    walk = [sys.executable, "-m", __name__, str(path)]
    try:
        subprocess.run(
            walk, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=_WALK_S
        )
    except subprocess.SubprocessError as error:
        raise _Damaged(f"its end is missing: {error}") from error
    os.truncate(data, expected)


def _walk(path: str) -> None:
    """Touch every page of every table."""
    env = _environment(Path(path), _SCRUB_MAP_BYTES)
    for name in _TABLES:
        table = env.open_db(name, create=False)
        with env.begin(buffers=True) as txn:
            for _ in txn.cursor(db=table):  # lmdb itself reads one byte of each page it passes
                pass
    env.close()


@dataclass(frozen=True, slots=True)
class ScrubStep:
    """One record looked at. `reason` is None for a good one, else why it would be refused."""

    done: int
    total: int
    name: str  # of the record, in hexadecimal
    reason: str | None


def scrub(state: StateDir) -> Iterator[ScrubStep]:
    """Verify every byte of every block, whichever model's, and every manifest. Changes nothing.

    Raises `StoreError("io")` where the environment cannot be walked; the daemon would put it aside and start empty.
    """
    path = state.path / _ENVIRONMENT
    if not os.path.lexists(path):
        return
    try:
        env = _open_environment(state, path, _SCRUB_MAP_BYTES)
        try:
            yield from _scrub(env)
        finally:
            env.close()
    except (OSError, lmdb.Error, _Damaged, _OtherFormat) as error:
        raise StoreError("io", f"{path}: cannot be walked: {error}") from error


def _scrub(env: Any) -> Iterator[ScrubStep]:
    tables = dict(zip(_TABLES, _tables(env), strict=True))
    blocks, names = (
        _keys_of(env, tables[b"index"], tables[b"blocks"]),
        _keys_of(env, tables[b"manifests"]),
    )
    total = len(blocks) + len(names)
    for done, key in enumerate(blocks, 1):
        yield ScrubStep(done, total, key.hex(), _fault_of_block(env, tables, BlockKey(key)))
    for done, name in enumerate(names, len(blocks) + 1):
        yield ScrubStep(done, total, name.hex(), _fault_of_manifest(env, tables, Name(name)))


def _keys_of(env: Any, *tables: Any) -> list[bytes]:
    with env.begin() as txn:
        keys = {
            key
            for table in tables
            for key in txn.cursor(db=table).iternext(keys=True, values=False)
        }
    return sorted(keys)


def _fault_of_block(env: Any, tables: dict[bytes, Any], key: BlockKey) -> str | None:
    with env.begin(buffers=True) as txn:
        written = txn.get(key, db=tables[b"index"])
        found = txn.get(key, db=tables[b"blocks"])
        entry = None if written is None else _index_entry(key, written)
        if entry is None:
            return "index"
        if found is None:
            return "missing"
        try:
            record.verify(
                found,
                fingerprint=entry.fingerprint,
                key=key,
                parent=entry.own.parent,
                tokens=entry.own.tokens,
            )
        except StoreError as error:
            return error.reason
    return None


def _fault_of_manifest(env: Any, tables: dict[bytes, Any], name: Name) -> str | None:
    with env.begin() as txn:
        found = txn.get(name, db=tables[b"manifests"])
    try:
        manifest = manifests_format.decode(found[_AGE.size :])
    except StoreError as error:
        return error.reason
    return None if response_name(manifest.tenant, manifest.response_id) == name else "key"


if __name__ == "__main__":  # what _check_length runs
    _walk(sys.argv[1])
