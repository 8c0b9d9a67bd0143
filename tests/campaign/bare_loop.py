"""What the machine alone does to an event loop: a process that does nothing but wake up, and says how late it was.

    python -m tests.campaign.bare_loop        # until stdin ends; then one line of JSON: milliseconds late

Beside a campaign that measures times it tells the daemon's share from that of the cores, which are shared with the load
itself, and with strangers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from tests.campaign.visitors import percentile

if TYPE_CHECKING:
    from collections.abc import Iterator

EVERY_S = 0.01


async def wake(late_ms: list[float]) -> None:
    async with trio.open_nursery() as nursery:

        async def until_told() -> None:
            await trio.to_thread.run_sync(sys.stdin.read)
            nursery.cancel_scope.cancel()

        nursery.start_soon(until_told)
        while True:
            due = trio.current_time() + EVERY_S
            await trio.sleep_until(due)
            late_ms.append((trio.current_time() - due) * 1000)


@contextmanager
def bare_loop() -> Iterator[dict[str, float]]:
    """Runs one beside the body; afterwards the dict has `p50` and `p99`, in milliseconds."""
    measured: dict[str, float] = {}
    command = [sys.executable, "-m", "tests.campaign.bare_loop"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield measured
        finally:
            said, _ = process.communicate()
            measured.update(json.loads(said))


if __name__ == "__main__":
    late: list[float] = []
    trio.run(wake, late)
    print(json.dumps({"p50": percentile(late, 0.5), "p99": percentile(late, 0.99)}))
