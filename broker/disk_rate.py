"""How fast a directory's disk writes and reads, in a few seconds: an order of magnitude for who sizes tiers.

Past the page cache (O_DIRECT) where the file system allows it. `homeport bench tiers` measures with care.

Laws
    Nothing stays behind, however it ends: the file has no name from the moment it exists.
    It ends by itself: after `size` bytes or after the seconds, whichever is first, in each direction.
"""

from __future__ import annotations

import itertools
import mmap
import os
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from broker.bench.raw_disk import is_direct, side_by_side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

REQUEST_BYTES = 4 << 20
_READERS = 4  # as tiers.disk.readers
_NAME = "homeport-measures"


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes a second."""

    write: float
    read: float
    direct: bool  # past the page cache; else the reads may have come out of memory


def measure(directory: Path, size: int, seconds: float, tick: Callable[[int], None]) -> Rates:
    """`tick` hears of bytes as they are moved. Raises OSError."""
    direct = is_direct(directory)
    path = directory / _NAME
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | (os.O_DIRECT if direct else 0)
    file = os.open(path, flags, 0o600)
    try:
        path.unlink()
        written, write_s = _write(file, size, seconds, tick)
        if not direct:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        read, read_s = _read(file, written, seconds, tick)
        return Rates(written / write_s, read / read_s, direct)
    finally:
        os.close(file)


def _write(file: int, size: int, seconds: float, tick: Callable[[int], None]) -> tuple[int, float]:
    with mmap.mmap(-1, REQUEST_BYTES) as buffer:  # begins with a page
        buffer[:] = os.urandom(REQUEST_BYTES)  # some disks write zeros faster
        began = time.perf_counter()
        offset = 0
        while offset < size and (not offset or time.perf_counter() - began < seconds):
            offset += os.pwrite(file, buffer, offset)
            tick(REQUEST_BYTES)
        os.fsync(file)
        return offset, time.perf_counter() - began


def _read(file: int, size: int, seconds: float, tick: Callable[[int], None]) -> tuple[int, float]:
    offsets = itertools.count(0, REQUEST_BYTES)  # next() on it is atomic
    done: list[int] = []
    began = time.perf_counter()

    def read_pieces(offsets: Iterator[int]) -> None:
        with mmap.mmap(-1, REQUEST_BYTES) as buffer:
            while (offset := next(offsets)) < size and (
                not offset or time.perf_counter() - began < seconds
            ):
                done.append(os.preadv(file, [buffer], offset))
                tick(REQUEST_BYTES)

    took = side_by_side([partial(read_pieces, offsets)] * _READERS)
    return sum(done), took
