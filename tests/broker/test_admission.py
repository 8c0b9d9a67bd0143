"""Bounded, first come first served, and nobody is dropped in silence."""

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from broker.admission import Admission, Queue
from broker.errors import Overloaded


@given(
    st.integers(1, 3),
    st.integers(0, 3),
    st.lists(st.one_of(st.just("arrive"), st.integers(0, 5)), max_size=40),
)
def test_the_queue_is_bounded_fifo_and_gives_free_places_away_at_once(
    max_turns, max_queued, script
):
    queue = Queue(max_turns=max_turns, max_queued=max_queued)
    here = []  # in order of arrival
    for now, step in enumerate(script):
        if step == "arrive":
            if len(here) < max_turns + max_queued:
                here.append(queue.arrive(now))
            else:
                with pytest.raises(Overloaded) as caught:
                    queue.arrive(now)
                assert 1 <= caught.value.retry_after_s <= 60
        elif here:
            leaving = here.pop(step % len(here))
            waited = [one for one in here if one.admitted_at is None]
            following = queue.depart(leaving, now)
            assert following is (waited[0] if leaving.admitted_at is not None and waited else None)
        admitted = [one for one in here if one.admitted_at is not None]
        assert len(admitted) == min(len(here), max_turns)
        assert here[: len(admitted)] == admitted or not [
            one for one in here if one.admitted_at is None
        ]
        statistics = queue.statistics()
        assert (statistics.admitted, statistics.waiting) == (
            len(admitted),
            len(here) - len(admitted),
        )


def test_the_hint_follows_how_long_turns_take():
    hints = []
    for length_s in (1.0, 100.0):
        queue = Queue(max_turns=1, max_queued=0)
        now = 0.0
        for _ in range(20):
            ticket = queue.arrive(now)
            now += length_s
            queue.depart(ticket, now)
        queue.arrive(now)
        with pytest.raises(Overloaded) as caught:
            queue.arrive(now)
        hints.append(caught.value.retry_after_s)
    assert hints[0] < 2
    assert hints[1] == 60


async def test_a_turn_waits_for_a_place_and_gets_it_when_one_leaves(autojump_clock):
    admission = Admission(max_turns=1, max_queued=2, queue_timeout_s=10)
    order = []

    async def turn(name, length_s):
        async with admission.place():
            order.append((name, trio.current_time()))
            await trio.sleep(length_s)

    async with trio.open_nursery() as nursery:
        for name in "abc":
            nursery.start_soon(turn, name, 3)
            await trio.sleep(0.01)
        with pytest.raises(Overloaded):
            await turn("d", 1)
    assert [name for name, _ in order] == ["a", "b", "c"]
    assert [round(at) for _, at in order] == [0, 3, 6]
    assert admission.statistics().refused_total == 1
    assert (admission.statistics().admitted, admission.statistics().waiting) == (0, 0)


async def test_a_turn_that_waits_too_long_is_refused_and_leaves_no_trace(autojump_clock):
    admission = Admission(max_turns=1, max_queued=1, queue_timeout_s=10)
    async with admission.place():
        with pytest.raises(Overloaded):
            async with admission.place():
                pytest.fail("no place was free")
        assert trio.current_time() == pytest.approx(10)
        assert (admission.statistics().admitted, admission.statistics().waiting) == (1, 0)


async def test_a_waiter_that_is_cancelled_as_it_is_admitted_passes_the_place_on(autojump_clock):
    admission = Admission(max_turns=1, max_queued=2, queue_timeout_s=10)
    scope = trio.CancelScope()
    reached = []

    async def waiter(name, own):
        with own:
            async with admission.place():
                await trio.lowlevel.checkpoint()
                reached.append(name)

    async with trio.open_nursery() as nursery:
        async with admission.place():
            nursery.start_soon(waiter, "cancelled", scope)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(waiter, "next", trio.CancelScope())
            await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
    assert reached == ["next"]
    assert (admission.statistics().admitted, admission.statistics().waiting) == (0, 0)
