"""How the disk tier's environment was left, and whether its file may be mapped: found out without mapping it.

The mark, a file beside the data, says how the environment was left:

    "clean", size and time of the data file    closed in order, everything synced
    "open", durability, boot id of the kernel  somebody wrote, or still does

Laws
    The mark is replaced as a whole (temporary file, fsync, rename, fsync of the directory), and before the first write.
    A clean mark holds only for the file that it describes: one written, cut or copied back since is walked like an open one.
    What was written without syncs is believed only under the boot that wrote it: the page cache of the kernel survives the
    process, and nothing survives the kernel. It is deleted then; that is what the mode means, and it may be large.
    A mark that is missing or makes no sense counts as open: nothing is lost by walking.

The walk is lmdb's own audit: another process reads the file as bytes, branch, leaf and free-list pages and the first
page of each value, and never maps it. So zeros or a missing end, which kill whoever maps them, are a finding; and it
runs beside whatever else a start does. A walk that dies, or takes too long, has found damage too.
"""

from __future__ import annotations

import enum
import shutil
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tiers.state_dir import make_private, replace_file, sync_directory, this_boot
from tiers.store import Durability

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tiers.state_dir import StateDir

ENVIRONMENT = "kv"
_MARK = "mark"
_NO_BOOT = "unknown"
# More goes in circles. Measured: 0.6 s of CPU for 100,000 records, and 0.2 us for each of their pages (2 s for 40 GiB);
# a cold disk adds one random read a record, so there is room.
_WALK_S = 120.0
_WALK_S_PER_BYTE = 4.0 / (1 << 30)


class Damaged(Exception):
    """The environment is not safe to use."""


class Finding(enum.Enum):
    NOTHING_THERE = enum.auto()
    CLEAN = enum.auto()
    UNCLEAN = enum.auto()
    UNSYNCED = enum.auto()  # written without syncs under another boot


class Inspection:
    """What the mark says, and the walk that this calls for."""

    def __init__(
        self, path: Path, finding: Finding, walk: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.path = path
        self.finding = finding
        self._walk = walk

    def join(self) -> None:
        """Wait for the walk, if there is one. Raises `Damaged`."""
        walk, self._walk = self._walk, None
        if walk is None:
            return
        size = (self.path / "data.mdb").stat().st_size
        try:
            said, _ = walk.communicate(timeout=_WALK_S + _WALK_S_PER_BYTE * size)
        except subprocess.TimeoutExpired as error:
            walk.kill()
            walk.communicate()
            raise Damaged("walking it takes too long") from error
        if walk.returncode:
            lines = said.decode(errors="replace").split("\n")[:3]
            raise Damaged(
                f"the walk ended with {walk.returncode}: {'; '.join(filter(None, lines))}"
            )

    def cancel(self) -> None:
        """End the walk, if nobody joined it."""
        walk, self._walk = self._walk, None
        if walk is not None:
            walk.kill()
            walk.communicate()


@contextmanager
def inspecting(state: StateDir, boot: str | None = None) -> Iterator[Inspection]:
    """Begin an inspection, for the store to join when it opens. Raises as `inspect` does."""
    inspection = inspect(state, this_boot() if boot is None else boot)
    try:
        yield inspection
    finally:
        inspection.cancel()


def inspect(state: StateDir, boot: str) -> Inspection:
    """Look at the mark; begin the walk where it is needed. Raises `StateDirRefused` for files not safely ours, `OSError`."""
    path = state.path / ENVIRONMENT
    for leftover in (
        beside(path),
        _unsynced(path),
    ):  # of a crash while creating or deleting; we hold the lock
        if leftover.is_dir():
            shutil.rmtree(leftover)
    if not path.is_symlink() and not path.exists():
        return Inspection(path, Finding.NOTHING_THERE)
    make_private(path)
    for file in path.iterdir():
        make_private(file)
    finding = glance(path, boot)
    if finding is not Finding.UNCLEAN:
        return Inspection(path, finding)
    walk = [sys.executable, "-P", "-m", "lmdb", "verify", "-e", str(path)]
    process = subprocess.Popen(
        walk, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return Inspection(path, Finding.UNCLEAN, process)


def glance(path: Path, boot: str) -> Finding:
    """What the mark says, of an environment that nobody has open. Changes nothing. Raises `OSError`."""
    if not path.exists():
        return Finding.NOTHING_THERE
    match _read_mark(path):
        case ["clean", size, time] if (size, time) == _shape(path):
            return Finding.CLEAN
        case ["open", Durability.PROCESS.value, there] if there != boot:
            return Finding.UNSYNCED
    return Finding.UNCLEAN


def mark_open(path: Path, durability: Durability, boot: str) -> None:
    """Before the first write. Raises `OSError`, and then there must be no write."""
    replace_file(path / _MARK, f"open {durability.value} {boot or _NO_BOOT}\n".encode())


def mark_clean(path: Path) -> None:
    """After the last write has been synced and the environment closed. Raises `OSError`."""
    size, time = _shape(path)
    replace_file(path / _MARK, f"clean {size} {time}\n".encode())


def discard(state: StateDir, path: Path) -> None:
    """Delete the environment; a crash half way is finished by the next inspection. Raises `OSError`."""
    path.rename(_unsynced(path))
    sync_directory(state.path)
    shutil.rmtree(_unsynced(path))


def beside(path: Path) -> Path:
    """Where an environment is made, to be renamed into its place."""
    return path.with_name(path.name + ".new")


def _unsynced(path: Path) -> Path:
    return path.with_name(path.name + ".unsynced")


def _read_mark(path: Path) -> list[str]:
    try:
        return (path / _MARK).read_text(errors="replace").split()
    except FileNotFoundError:
        return []


def _shape(path: Path) -> tuple[str, str]:
    try:
        status = (path / "data.mdb").stat()
    except FileNotFoundError:
        return "", ""
    return str(status.st_size), str(status.st_mtime_ns)
