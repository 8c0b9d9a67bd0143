"""What this machine gives a process: cores, memory, open files, and what a directory's file system is. Reads, changes nothing.

Functions take the root below which /proc and /sys are found, so that tests can make a machine up.

Laws
    Memory and cores are what we may use, not what is built in: a control group's limit counts where it is the smaller.
    What the kernel does not tell is None, never a guess.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")
_CGROUPS = "sys/fs/cgroup"
_OLD_LIMIT = "sys/fs/cgroup/memory/memory.limit_in_bytes"
_HUGE_PAGES = "sys/kernel/mm/transparent_hugepage/enabled"
# What lies behind a network cannot be mapped and locked as LMDB must; what is in memory is gone with the power.
NETWORK = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs",
    "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "ocfs2", "smb3", "smbfs", "virtiofs",
})  # fmt: skip
IN_MEMORY = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True, slots=True)
class Memory:
    usable_bytes: int
    limited: bool  # by a control group: containers, systemd's MemoryMax
    available_bytes: int | None  # without swapping, now
    swap_bytes: int
    huge_pages: str | None  # transparent ones: always, madvise or never


@dataclass(frozen=True, slots=True)
class FileSystem:
    kind: str  # as in /proc/mounts: ext4, xfs, overlay, nfs4, ...
    total_bytes: int
    free_bytes: int  # to us


@dataclass(frozen=True, slots=True)
class OpenFiles:
    soft: int | None  # None: without limit
    hard: int | None


def cores(root: Path = _ROOT) -> int:
    """That this process may run on, and has time for."""
    allowed = len(os.sched_getaffinity(0))
    quota = [_number(word) for word in _read(_own_group(root) / "cpu.max").split()]
    if len(quota) == 2 and quota[0] and quota[1]:
        return max(1, min(allowed, quota[0] // quota[1]))
    return allowed


def memory(root: Path = _ROOT) -> Memory:
    told = _meminfo(root)
    built_in = told.get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_number(_read(path).strip()) for path in (*_group_limits(root), root / _OLD_LIMIT)]
    usable = min([built_in, *(limit for limit in limits if limit)])
    return Memory(
        usable_bytes=usable,
        limited=usable < built_in,
        available_bytes=min(told["MemAvailable"], usable) if "MemAvailable" in told else None,
        swap_bytes=told.get("SwapTotal", 0),
        huge_pages=_chosen(_read(root / _HUGE_PAGES)),
    )


def open_files() -> OpenFiles:
    soft, hard = (
        None if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return OpenFiles(soft, hard)


def file_system(path: Path, root: Path = _ROOT) -> FileSystem:
    """Of the nearest directory that exists. Raises OSError."""
    path = nearest_directory(path)
    status = os.statvfs(path)
    return FileSystem(
        kind=_kind(path, root),
        total_bytes=status.f_blocks * status.f_frsize,
        free_bytes=status.f_bavail * status.f_frsize,
    )


def nearest_directory(path: Path) -> Path:
    """`path`, or the nearest directory above it that is there."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def cpu_flags(root: Path = _ROOT) -> frozenset[str]:
    """What the CPU says it can, as Linux names it (flags on x86, Features on ARM)."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _kind(path: Path, root: Path) -> str:
    """The file system that a path is on: of the nearest mount point above it, the last mount."""
    path = path.resolve()
    found, at = "unknown", Path("/")
    for line in _read(root / "proc/self/mounts").splitlines():
        _, place, kind, *_ = line.split()
        point = Path(place.encode().decode("unicode_escape"))
        if path.is_relative_to(point) and len(point.parts) >= len(at.parts):
            found, at = kind, point
    return found


def _own_group(root: Path) -> Path:
    """Of control groups in version 2, ours; in a container its root."""
    groups = root / _CGROUPS
    for line in _read(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            own = groups / line.removeprefix("0::").lstrip("/")
            return own if own.is_dir() else groups
    return groups


def _group_limits(root: Path) -> list[Path]:
    """A limit above us counts as well."""
    own = _own_group(root)
    above = [group for group in own.parents if group.is_relative_to(root / _CGROUPS)]
    return [group / "memory.max" for group in (own, *above)]


def _meminfo(root: Path) -> dict[str, int]:
    told = {}
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        told[name] = int(value.split()[0]) << 10
    return told


def _chosen(text: str) -> str | None:
    """The word in brackets."""
    _, _, rest = text.partition("[")
    return rest.partition("]")[0] or None


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
