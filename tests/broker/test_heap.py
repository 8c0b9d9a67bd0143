import os
from functools import partial

import trio
from trio.testing import MockClock

from broker.heap import keep_trimmed, trimmer
from tests.campaign.visitors import holdings


def test_what_is_free_between_what_is_not_goes_back_to_the_machine():
    trim = trimmer()
    assert trim is not None
    held = [bytes([1]) * 3000 for _ in range(40_000)]
    held = held[::20]  # 5 % of it, everywhere
    before = holdings(os.getpid()).rss
    trim()
    assert before - holdings(os.getpid()).rss > 60 << 20
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
