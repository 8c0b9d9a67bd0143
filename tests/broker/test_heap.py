import sys
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from broker.heap import keep_trimmed, trimmer


def resident_bytes():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_what_is_free_between_what_is_not_goes_back_to_the_machine():
    trim = trimmer()
    assert trim is not None
    held = [bytes([1]) * 3000 for _ in range(40_000)]
    held = held[::20]  # 5 % of it, everywhere
    before = resident_bytes()
    trim()
    assert before - resident_bytes() > 60 << 20
    assert len(held) == 2000


def test_it_is_done_at_once_and_every_minute_beside_the_loop():
    async def main():
        sender, receiver = trio.open_memory_channel(8)
        async with trio.open_nursery() as nursery:
            began = trio.current_time()
            nursery.start_soon(
                keep_trimmed, partial(trio.from_thread.run_sync, sender.send_nowait, 1)
            )
            for _ in range(3):
                with trio.fail_after(20_000):
                    await receiver.receive()
            assert trio.current_time() >= began + 120
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(rate=1000))


def test_a_c_library_that_has_no_such_thing_is_left_alone():
    trio.run(keep_trimmed, None)
