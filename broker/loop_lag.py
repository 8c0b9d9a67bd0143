"""How late the event loop is: a task that is due every so often, and tells how much later it came to run.

What is late for it is late for every socket: the loop was held by another task, or did not get the interpreter or a core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from broker.observations import Observations

EVERY_S = 0.25  # 240 looks a minute, for 0.1 % of a core (guessed)


async def watch_loop(observations: Observations) -> None:
    while True:
        due = trio.current_time() + EVERY_S
        await trio.sleep_until(due)
        observations.looped(trio.current_time() - due)
