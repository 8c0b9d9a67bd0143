"""How many threads the CPU's kernels take for the next step: all that they were given, but for cores that are in use already.

A step is some two hundred parallel regions of 50 us and more, and at the end of each its threads wait for the last one. One that
finds its core taken is late by a slice of the scheduler's, milliseconds, and all others with it: then fewer threads are faster.

Measured 2026-11 on two cores (AMD EPYC), the default model, ms, beside a process that keeps one core busy; quiet in brackets:

    tokens, behind     1, 256      1, 4,000    15, 4,064    512, 2,048
    two threads        23 (6.6)    66 (16)     249 (53)     2,140 (690)
    one                9 (7.6)     26 (24)     77 (78)      1,180 (1,160)

Laws
    What is computed does not depend on it: the kernels cut their work into as many shares as torch has threads, whoever does them.
    Never fewer threads than one. Cores beyond what we were given are others' first.
    Our own process is nobody else. But the disk's readers count while they read beside a short step: what comes from the page
    cache is copied by the processor. They are left half of the cores at most.
    A time in which we hardly computed says nothing of who is in our way: whoever comes back begins with all threads.
    Where the kernel does not tell who uses the processors, nobody else does.
"""

from __future__ import annotations

import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

WINDOW_S = 0.2  # of a look, or a step's own length: the kernel counts in hundredths of a second
_COMPUTED = 0.3  # of a core: below it a window was a pause
_GIVE = 0.4  # of a core in others' use: from here on it is theirs,
_TAKE = 0.2  # and below this ours again
_STAT = Path("/proc/stat")
# Its columns: user, nice, system, irq, softirq. What a hypervisor takes is nobody's here.
_BUSY = (0, 1, 2, 5, 6)


class Used(NamedTuple):
    """Processor time so far, in seconds, on the cores that we may run on."""

    everybody_s: float
    ours_s: float


def used(stat: Path = _STAT) -> Used | None:
    """As Linux tells it; None where it does not."""
    allowed = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    try:
        lines = [line.split() for line in stat.read_text().splitlines()]
    except OSError:
        return None
    own = [[int(ticks) for ticks in line[1:]] for line in lines if line and line[0] in allowed]
    ticks = sum(core[column] for core in own for column in _BUSY)
    return Used(ticks / os.sysconf("SC_CLK_TCK"), time.process_time()) if own else None


class Cores:
    """Asked before each step."""

    def __init__(
        self,
        threads: int,
        readers: int,
        clock: Callable[[], float],
        *,
        cores: int | None = None,
        look: Callable[[], Used | None] = used,
    ) -> None:
        """`cores`: as many as we may run on, unless it is said."""
        self._threads = threads
        self._cores = max(threads, len(os.sched_getaffinity(0)) if cores is None else cores)
        self._for_readers = min(readers, self._cores // 2)
        self._clock = clock
        self._look = look
        self._taken = 0  # by others
        self._looked = -math.inf
        self._seen: Used | None = None

    def threads(self, *, reading: bool) -> int:
        """For the next step, beside which blocks are read or not."""
        if self._threads > 1:
            self._watch(self._clock())
        taken = max(self._taken, self._for_readers) if reading else self._taken
        return self._left(taken)

    def _left(self, taken: int) -> int:
        return min(self._threads, self._cores - taken)

    def _watch(self, now: float) -> None:
        took_s = now - self._looked
        if took_s < WINDOW_S:
            return
        before, self._seen, self._looked = self._seen, self._look(), now
        if before is None or self._seen is None:
            return
        ours_s = self._seen.ours_s - before.ours_s
        if ours_s < _COMPUTED * took_s:
            self._taken = 0
            return
        others_s = self._seen.everybody_s - before.everybody_s - ours_s
        self._settle(max(0.0, others_s) / took_s)

    def _settle(self, others: float) -> None:
        """With some distance between giving a core and taking it again, or it would change hands with every look."""
        theirs, at_most = (int(others + 1 - edge) for edge in (_GIVE, _TAKE))
        taken = self._taken
        self._taken = min(self._cores - 1, max(theirs, min(taken, at_most)))
        if self._taken != taken:
            left = self._left(self._taken)
            log.info("others use %.1f cores: %d of %d threads compute", others, left, self._threads)
