"""A disk whose n-th I/O call fails, as one that is full or broken fails: lmdb's calls, and those of the files beside it
and of its own that are read past it.

Within `faulty_disk` the store's own `lmdb` and `os` are stand-ins that count. A commit may also fail late: it landed, and
nobody was told. After a failed commit an environment refuses everything until it is closed, as LMDB does when it could not
write its meta page: so whoever believes it once more is caught.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from contextlib import contextmanager
from enum import Enum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import lmdb

from tiers import data_file, lmdb_store, state_dir

if TYPE_CHECKING:
    from collections.abc import Iterator


class Fault(Enum):
    """What a failing call raises: from lmdb, and from the operating system."""

    EIO = "eio", lmdb.Error, errno.EIO
    ENOSPC = "enospc", lmdb.DiskError, errno.ENOSPC
    MAP_FULL = "map full", lmdb.MapFullError, errno.EDQUOT
    LATE = "late", lmdb.Error, errno.EIO  # a commit that fails has landed


class Faults:
    """Fails call number `n` from `arm` on, once, or all from there while `lasting`. Disarmed at first.

    With `only`, other calls do not count: readers call too, whenever they like.
    """

    def __init__(self) -> None:
        self._left = 0
        self._lasting = False
        self._only: str | None = None
        self.fault = Fault.EIO
        self.fired: list[str] = []  # the calls that failed
        self.calls: Counter[str] = Counter()  # all that were made
        self.free_bytes: int | None = None  # what the file system says it has; None: the truth

    def arm(self, n: int, fault: Fault, *, lasting: bool = False, only: str | None = None) -> None:
        self._left, self.fault, self._lasting, self._only, self.fired = n, fault, lasting, only, []

    def disarm(self) -> None:
        self._left, self._lasting = 0, False

    def fails(self, call: str) -> bool:
        self.calls[call] += 1
        if self._only not in (None, call):
            return False
        self._left -= 1
        if self._left == 0 or (self._lasting and self._left < 0):
            self.fired.append(call)
            return True
        return False

    def tick(self, call: str) -> None:
        if self.fails(call):
            raise self.lmdb_error(call)

    def lmdb_error(self, call: str) -> lmdb.Error:
        return self.fault.value[1](f"injected into {call}")

    def os_tick(self, call: str) -> None:
        if self.fails(call):
            number = self.fault.value[2]
            raise OSError(number, f"{os.strerror(number)}, injected into {call}")


@contextmanager
def faulty_disk() -> Iterator[Faults]:
    """Every environment that is opened within fails as the faults say."""
    faults = Faults()
    module = _Module(lmdb, faults, open=lambda *given, **named: FaultyEnv(given, named, faults))
    system = _Module(
        os,
        faults,
        **{
            name: _counted(getattr(os, name), name, faults)
            for name in ("fsync", "rename", "open", "write", "preadv", "posix_fadvise")
        },
        statvfs=lambda path: _statvfs(path, faults),
    )
    with (
        patch.object(lmdb_store, "lmdb", module),
        patch.object(lmdb_store, "os", system),
        patch.object(data_file, "os", system),
        patch.object(state_dir, "os", system),
    ):
        yield faults


def _statvfs(path: Any, faults: Faults) -> Any:
    faults.os_tick("statvfs")
    if faults.free_bytes is None:
        return os.statvfs(path)
    return SimpleNamespace(f_bavail=faults.free_bytes, f_frsize=1)


def _counted(call: Any, name: str, faults: Faults) -> Any:
    def counted(*given: Any, **named: Any) -> Any:
        faults.os_tick(name)
        return call(*given, **named)

    return counted


class _Module:
    """A module, but for some of its functions."""

    def __init__(self, real: Any, faults: Faults, **instead: Any) -> None:
        self._real = real
        self.__dict__.update(instead)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class FaultyEnv:
    def __init__(self, given: Any, named: Any, faults: Faults) -> None:
        faults.tick("open environment")
        self._env = lmdb.open(*given, **named)
        self._faults = faults
        self._panicked = False

    def begin(self, **options: Any) -> FaultyTxn:
        if self._panicked and options.get("write"):
            raise lmdb.PanicError("a commit has failed: close the environment")
        self._faults.tick("begin")
        return FaultyTxn(self, self._env.begin(**options), writes=options.get("write", False))

    def open_db(self, name: bytes, txn: Any = None, **options: Any) -> Any:
        self._faults.tick("open table")
        return self._env.open_db(name, txn=txn and txn._txn, **options)

    def sync(self, **options: Any) -> None:
        self._faults.tick("sync")
        self._env.sync(options["force"])

    def reader_check(self) -> int:
        self._faults.tick("reader_check")
        return self._env.reader_check()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)  # close, flags, info, path, readers, stat


class FaultyTxn:
    """A failed commit leaves nothing behind, as LMDB promises, but for a late one. The end of a read cannot fail."""

    def __init__(self, env: FaultyEnv, txn: Any, *, writes: bool) -> None:
        self._owner = env
        self._txn = txn
        self._faults = env._faults
        self._writes = writes

    def __enter__(self) -> FaultyTxn:
        self._txn.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._writes and raised[0] is None and self._faults.fails("commit"):
            self._owner._panicked = True
            if self._faults.fault is Fault.LATE:
                self._txn.commit()
            else:
                self._txn.abort()
            raise self._faults.lmdb_error("commit")
        self._txn.__exit__(*raised)

    def abort(self) -> None:
        self._txn.abort()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._txn, name)  # get, put, pop, delete, cursor, stat

        def counted(*given: Any, **named: Any) -> Any:
            self._faults.tick(name)
            found = call(*given, **named)
            return FaultyCursor(found, self._faults) if name == "cursor" else found

        return counted


class FaultyCursor:
    def __init__(self, cursor: Any, faults: Faults) -> None:
        self._cursor = cursor
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._cursor, name)  # first, set_range, next, key, value, iternext

        def counted(*given: Any, **named: Any) -> Any:
            self._faults.tick(f"cursor {name}")
            return call(*given, **named)

        return counted

    def __iter__(self) -> Any:
        self._faults.tick("cursor walk")
        return iter(self._cursor)
