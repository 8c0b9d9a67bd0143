"""The disk without a page cache: what a file could be read and written at, to hold our own rates against.

O_DIRECT with page-aligned buffers (`mmap`), large requests, several threads; each thread takes the next piece.
"""

from __future__ import annotations

import itertools
import mmap
import os
import resource
import time
from functools import partial
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

_REQUEST_BYTES = 4 << 20
_SECTOR_BYTES = 512  # the unit of ru_inblock


def side_by_side(bodies: Sequence[Callable[[], None]]) -> float:
    """Run each on a thread of its own; the seconds until the last ends."""

    async def run() -> float:
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for body in bodies:
                nursery.start_soon(trio.to_thread.run_sync, body)
        return time.perf_counter() - began

    return trio.run(run)


def is_direct(directory: Path) -> bool:
    """Whether files there can be opened past the page cache."""
    path = directory / "direct"
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


def read_s(path: Path, threads: int, request_bytes: int = _REQUEST_BYTES) -> float:
    """Seconds to read the whole of a file past the page cache."""
    size = path.stat().st_size
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        offsets = itertools.count(0, request_bytes)  # next() on it is atomic
        buffers = [_large_pages(request_bytes) for _ in range(threads)]
        return side_by_side([partial(_read, file, size, offsets, buffer) for buffer in buffers])
    finally:
        os.close(file)


def _large_pages(size: int) -> memoryview:
    """A buffer that is in few pieces, and there. In scattered pages, met first by the disk, it costs a fifth of the rate."""
    buffer = mmap.mmap(-1, size + (4 << 20))
    buffer.madvise(mmap.MADV_HUGEPAGE)
    for begin in range(0, len(buffer), mmap.PAGESIZE):
        buffer[begin] = 1
    return memoryview(buffer)[:size]


def _read(file: int, size: int, offsets: Iterator[int], buffer: memoryview) -> None:
    while (offset := next(offsets)) < size:
        read = os.preadv(file, [buffer], offset)
        assert read == min(len(buffer), size - offset), "a short read"


def write_s(path: Path, size: int) -> float:
    """Seconds to make a file of `size` bytes durable, past the page cache; it is removed again."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
    try:
        with mmap.mmap(-1, _REQUEST_BYTES) as buffer:
            buffer[:] = os.urandom(_REQUEST_BYTES)  # some disks write zeros faster
            began = time.perf_counter()
            for offset in range(0, size, _REQUEST_BYTES):
                os.pwritev(file, [buffer], offset)
            os.fsync(file)
            return time.perf_counter() - began
    finally:
        os.close(file)
        path.unlink()


def evict(path: Path) -> None:
    """Take a file out of the page cache. Nobody may have it mapped: mapped pages stay."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def cache(path: Path) -> None:
    """Bring all of a file into the page cache."""
    with path.open("rb", buffering=0) as file, mmap.mmap(-1, _REQUEST_BYTES) as buffer:
        while file.readinto(buffer):
            pass


def bytes_from_disk() -> int:
    """What this process has had the disk read so far: tells a cold cache from one that only should be."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock * _SECTOR_BYTES
