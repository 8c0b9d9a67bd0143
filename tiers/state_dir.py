"""The directory that holds everything a daemon keeps: who may use it, and one process at a time.

Laws
    It belongs to us and to nobody else: mode 0700, our user, no symlinks in our part of the path.
    One process has it open. The lock is the kernel's (flock), so it is gone when the process is, however it died.
    What is put aside is kept for a human, one generation for each reason, and never read again.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

_LOCK = "homeport.lock"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_log = logging.getLogger(__name__)


class StateDirRefused(Exception):
    """The directory is in use, or is not safely ours. The message says what to do; the daemon must not start."""


class StateDir:
    """An open, locked state directory. `close` lets another process have it."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def open(cls, path: Path) -> StateDir:
        """Create `path` if need be, check it, and lock it. Raises `StateDirRefused`."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            make_private(path)
            fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateDirRefused(f"{path}: cannot be used as state directory: {error}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise StateDirRefused(
                f"{path}: in use by the homeport process with pid {owner}; stop it or choose another --state-dir"
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return cls(path, fd)

    def close(self) -> None:
        os.close(self._lock_fd)

    def put_aside(self, path: Path, why: str) -> Path:
        """Rename a directory that is not usable out of the way, replacing the one put aside for the same reason before."""
        aside = path.with_name(f"{path.name}.{why}")
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
        sync_directory(self.path)
        _log.error("%s is not used: kept as %s; starting empty", path, aside)
        return aside


@dataclass(frozen=True, slots=True)
class LockReport:
    pid: str  # of whoever has the directory open, or had it last
    held: bool


def look_at_lock(path: Path) -> LockReport | None:
    """Who has a state directory open, for people who ask; None where nobody ever had. Raises `OSError`.

    A shared lock is tried, and let go at once: a daemon that starts in the same microsecond may be refused.
    """
    try:
        fd = os.open(path / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return LockReport(pid, held=True)
        return LockReport(pid, held=False)
    finally:
        os.close(fd)


def make_private(path: Path) -> None:
    """Refuse what others could have prepared; take away the permission to look in. Raises `StateDirRefused`.

    A directory that others may write (as /tmp) is never tightened: it is somebody's, and not meant for us.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise StateDirRefused(f"{path}: is a symbolic link; name the real directory")
    if status.st_uid != os.geteuid():
        raise StateDirRefused(f"{path}: belongs to uid {status.st_uid}, not to uid {os.geteuid()}")
    if status.st_mode & 0o022:
        raise StateDirRefused(
            f"{path}: other users may write to it (mode {stat.S_IMODE(status.st_mode):o}); chmod 700 it"
        )
    if status.st_mode & 0o077:
        _log.warning("%s was open to other users: mode %o", path, stat.S_IMODE(status.st_mode))
        path.chmod(0o700 if stat.S_ISDIR(status.st_mode) else 0o600)


def replace_file(path: Path, content: bytes) -> None:
    """Old content or new content, whatever happens, and the new one durably on return. Raises `OSError`."""
    beside = path.with_name(path.name + ".new")
    fd = os.open(
        beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    try:
        os.write(fd, content)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(beside, path)
    sync_directory(path.parent)


def this_boot() -> str:
    """What the running kernel calls this life of its; empty where it does not say, which then equals nothing."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def sync_directory(path: Path) -> None:
    """Make creations and renames inside `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
