"""The medium under a store: a record's bytes in the data file, changed as a bad disk changes them, unknown to LMDB."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tiers.data_file import UNKNOWN, place_of


def place_on_disk(env: Any, blocks: Any, key: bytes) -> tuple[int, int]:
    """Where LMDB has a record, as its pages say, and how long it is."""
    with env.begin(buffers=True) as txn:
        found = txn.get(key, db=blocks)
        return place_of(found, env.stat()["psize"]), found.nbytes


def overwrite(path: Path, place: int, value: bytes) -> None:
    """A medium keeps no record of when it went bad."""
    status = path.stat()
    file = os.open(path, os.O_WRONLY)
    try:
        assert os.pwrite(file, value, place) == len(value)
    finally:
        os.close(file)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_record(env: Any, blocks: Any, key: bytes, value: bytes) -> None:
    """Another value in the place of `key`'s record. What does not fit there is put elsewhere, and the old place blanked."""
    path = env_file(env)
    place, size = place_on_disk(env, blocks, key)
    if place != UNKNOWN and size == len(value):
        overwrite(path, place, value)
        return
    if place != UNKNOWN:
        overwrite(path, place, bytes(size))
    with env.begin(write=True) as txn:
        txn.put(key, value, db=blocks)


def env_file(env: Any) -> Path:
    return Path(env.path()) / "data.mdb"


def evict(path: Path) -> None:
    """Out of the page cache, but for pages that somebody has mapped; no effect where the page cache is the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
