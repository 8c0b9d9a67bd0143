"""What a figure was measured on: the machine and how busy it is, as lines of text."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine() -> str:
    """CPU, cores that this process may use, memory."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{_cpu()}, {cores} cores, {memory:.0f} GiB"


def load() -> str:
    return " ".join(f"{each:.2f}" for each in os.getloadavg())


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def peak_bytes(pid: int) -> int:
    """Peak resident memory of a process and those under it: the sum of their peaks, mapped files included.

    Raises FileNotFoundError when it has ended."""
    root = Path(f"/proc/{pid}")
    status = (root / "status").read_text()
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    total = sum(int(kib) << 10 for kib in peaks)
    for task in (root / "task").iterdir():
        children = (task / "children").read_text().split()
        total += sum(peak_bytes(int(child)) for child in children)
    return total
