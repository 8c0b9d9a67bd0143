"""The environment's data file, read past LMDB: where a record lies in it, and its bytes from there.

LMDB gives a value through its map, and py-lmdb has touched every page of it by then, one after the other: a record from the
disk comes in the map's small requests, and one from the page cache costs a fault for every few pages. So the index
keeps each record's place, and records are read from there with the requests that the disk likes.

Laws
    A place is a hint. LMDB may have freed the page since, and used it again, also while it is being read. So whoever
    reads verifies what came; a record that verifies is the one that was asked for, because its key names its content.
    Nothing here touches the map: where the disk cannot read, that is an `OSError`, and in the map it is a SIGBUS.
    So whoever was refused by the disk does not ask the map.
    No descriptor outlives `close`; nobody may be reading then. (LMDB's locks are on another file: closing is safe.)
    There are no more buffers than there ever were reads at once.

The ways to a record, in this order
    cached      `RWF_NOWAIT`: from the page cache straight to where it belongs, if it is there as a whole.
    direct      O_DIRECT: one request, by which the disk puts the payload where it belongs, if that is whole sectors. It
                sees what was written without a sync, because Linux writes that back first.
    bounced     The same into a buffer of our own, and a copy from there.
    buffered    An ordinary read, where the file system knows no O_DIRECT, or fails at it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np

from tiers.hashed_copy import copying
from tiers.record import BLANK
from tiers.store import Way

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tiers.hashed_copy import Fill

_SECTOR_BYTES = (
    512  # of most disks; where O_DIRECT wants more it says so, and buffers are whole pages
)
UNKNOWN = 0  # as a place: there is a meta page
_PAGE_HEAD = struct.Struct("=QHHI")  # of LMDB 0.9: number, padding, flags, pages; the value follows
_OVERFLOW = 0x04  # of the flags: the page, with those behind it, is one value's
_IMPOSSIBLE = 1 << 40  # pages


class ShortFile(OSError):
    """The file ends before the record does."""


class DataFile:
    """Descriptors and buffers of a store. Any thread may read. The constructor raises `OSError`."""

    def __init__(self, path: Path, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._free: list[mmap.mmap] = []  # buffers that nobody uses
        self._direct: int | None = None
        self._buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # What is not in the page cache is none of its business: no readahead for those who only ask.
            os.posix_fadvise(self._buffered, 0, 0, os.POSIX_FADV_RANDOM)
            self._direct = _open_direct(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._free.clear()
        os.close(self._buffered)
        if self._direct is not None:
            os.close(self._direct)

    def read(self, place: int, size: int, into: memoryview, receive: Callable[[Fill], None]) -> Way:
        """Let `receive` have the `size` bytes at `place`, the last of which it will put `into`; the way that they came.

        Where a way breaks off, `receive` is called again, from the start. Raises what it raises, and `OSError`:
        `ShortFile`, or whatever the disk had to say to an ordinary read.
        """
        with suppress(OSError):  # not all of it is in the page cache, or nobody can tell
            receive(_at(self._buffered, place, os.RWF_NOWAIT))
            return Way.CACHED
        begin = place // self._page_bytes * self._page_bytes
        if self._is_aligned(place + size - into.nbytes, into):
            with self._buffer(place + size - into.nbytes - begin) as front:
                if self._read_in_place(begin, front, into, place - begin, receive):
                    return Way.DIRECT
        end = -(-(place + size) // self._page_bytes) * self._page_bytes
        with self._buffer(end - begin) as pages:
            if self._load(begin, pages):
                receive(copying(pages[place - begin : place - begin + size]))
                return Way.BOUNCED
        self.expect(place, size)
        receive(_at(self._buffered, place, 0))
        return Way.BUFFERED

    def _is_aligned(self, begin: int, into: memoryview) -> bool:
        """Whether sectors of the file are sectors of `into`, which lies from `begin` on."""
        return not any(number % _SECTOR_BYTES for number in (begin, into.nbytes, _address(into)))

    def _read_in_place(
        self,
        begin: int,
        front: memoryview,
        into: memoryview,
        skipped: int,
        receive: Callable[[Fill], None],
    ) -> bool:
        """Whether everything came. What came and was refused does not stay."""
        good = False
        try:
            if self._load(begin, front, into):
                receive(_arrived(front[skipped:]))
                good = True
        finally:
            if not good:
                into[:] = BLANK * into.nbytes
        return good

    def expect(self, place: int, size: int) -> None:
        """These bytes will be asked for in smaller pieces, or a page at a time by the map: have all of them read now.

        Measured on records of 1.41 MiB that are examined in the map: 24 ms without, 2 ms with.
        """
        with suppress(OSError):
            os.posix_fadvise(self._buffered, place, size, os.POSIX_FADV_WILLNEED)

    def _load(self, begin: int, *parts: memoryview) -> bool:
        """Fill them past the page cache, one behind the other; whether everything came."""
        if self._direct is None:
            return False
        try:
            got = os.preadv(self._direct, parts, begin)
            # Who asked the page cache has it read that page. It would make the next one ask for more, for nothing.
            os.posix_fadvise(self._buffered, begin, got, os.POSIX_FADV_DONTNEED)
        except OSError:
            return False
        return got == sum(part.nbytes for part in parts)

    @contextmanager
    def _buffer(self, length: int) -> Iterator[memoryview]:
        """Aligned as O_DIRECT wants it."""
        try:
            found = self._free.pop()  # one call: two readers never get the same
        except IndexError:
            found = mmap.mmap(-1, length)
        if len(found) < length:
            found = mmap.mmap(-1, length)
        try:
            yield memoryview(found)[:length]
        finally:
            self._free.append(found)


def place_of(value: memoryview, page_bytes: int) -> int:
    """Where in the file a value lies that this write transaction has put: its page has its number from then on.

    `UNKNOWN` for a value that has no page of its own, and wherever the page's head is not what it should be. `value` is
    LMDB's own memory, so the 16 bytes before it belong to the same page whatever lies there.
    """
    head = ctypes.string_at(_address(value) - _PAGE_HEAD.size, _PAGE_HEAD.size)
    number, _, flags, pages = _PAGE_HEAD.unpack(head)
    own = flags & _OVERFLOW and pages == -(-(_PAGE_HEAD.size + value.nbytes) // page_bytes)
    return number * page_bytes + _PAGE_HEAD.size if own and number < _IMPOSSIBLE else UNKNOWN


def _address(memory: memoryview) -> int:
    address: int = np.frombuffer(memory, np.uint8).ctypes.data
    return address


def _arrived(head: memoryview) -> Fill:
    """Of bytes of which all but the head are where they belong."""

    def fill(begin: int, target: memoryview) -> None:
        if begin < head.nbytes:
            target[:] = head[begin : begin + target.nbytes]

    return fill


def _at(file: int, place: int, flags: int) -> Fill:
    def fill(begin: int, target: memoryview) -> None:
        got = os.preadv(file, [target], place + begin, flags)
        if got != target.nbytes:
            raise ShortFile(errno.ENODATA, f"{got} bytes where {target.nbytes} belong")

    return fill


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None  # this file system knows no such thing
        raise
