"""Bounded in turns and tokens, fair to tenants, and nobody is dropped in silence."""

import math

import pytest
import trio
from hypothesis import event, given
from hypothesis import strategies as st

from broker.admission import Admission, Queue
from broker.errors import Overloaded

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.sampled_from("abc"), st.integers(0, 9), st.booleans()),
        st.tuples(st.just("depart"), st.integers(0, 9)),
    ),
    max_size=60,
)


@given(
    st.integers(1, 9),
    st.integers(0, 4),
    st.integers(1, 20),
    st.integers(1, 20),
    st.booleans(),
    STEPS,
)
def test_the_queue_is_bounded_and_fair_and_gives_free_places_away_at_once(
    max_turns, max_queued, max_tokens, max_queued_tokens, several, script
):
    queue = Queue(
        max_turns=max_turns,
        max_queued=max_queued,
        max_tokens=max_tokens,
        max_queued_tokens=max_queued_tokens,
        several=several,
    )
    kept = 0.125 if several else 0
    here = []  # in order of arrival
    was_admitted = set()

    def waiting(tenant=None):
        return [t for t in here if t.admitted_at is None and tenant in (None, t.tenant)]

    def check(changed):
        for one in changed:
            assert one.refused != (one.admitted_at is not None)
            if one.refused:
                assert not one.patient, "what was promised is kept"
                here.remove(one)
                queue.depart(one, now)
        admitted = [t for t in here if t.admitted_at is not None]
        for one in admitted:
            assert all(
                o.admitted_at is not None for o in here[: here.index(one)] if o.tenant == one.tenant
            )
        assert was_admitted <= set(admitted), "admitted work is never shed"
        was_admitted.update(admitted)
        assert len(admitted) <= max_turns
        assert len(admitted) <= 1 or sum(t.tokens for t in admitted) <= max_tokens
        impatient = [t for t in waiting() if not t.patient]
        assert len(impatient) <= max_queued
        if waiting():  # somebody waits: then the next in line has no room
            held = {
                t.tenant: sorted(a.tokens for a in admitted if a.tenant == t.tenant)
                for t in waiting()
            }
            poorest = min((sum(tokens), len(tokens)) for tokens in held.values())
            heads = [
                waiting(tenant)[0]
                for tenant, tokens in held.items()
                if (sum(tokens), len(tokens)) == poorest
            ]
            share = kept if poorest[1] else 0
            used = sum(t.tokens for t in admitted)
            full = len(admitted) >= max_turns - math.ceil(max_turns * share)
            assert full or any(used + t.tokens > max_tokens * (1 - share) for t in heads)
            assert admitted
        seen = queue.statistics()
        assert (seen.admitted, seen.waiting) == (len(admitted), len(waiting()))
        assert seen.admitted_tokens == sum(t.tokens for t in admitted)
        assert seen.waiting_tokens == sum(t.tokens for t in waiting())

    for now, step in enumerate(script):
        if step[0] == "arrive":
            _, tenant, tokens, patient = step
            mine = len(waiting(tenant))
            doomed = False
            try:
                queue.check(tenant)
            except Overloaded:
                doomed = True
            try:
                ticket, changed = queue.arrive(now, tenant, tokens, patient=patient)
            except Overloaded:
                assert not patient
                assert doomed or tokens, "a turn that weighs nothing would have been refused unread"
                continue
            assert patient or not doomed, "what is refused unread would have been refused"
            here.append(ticket)
            event("made room" if any(t.refused for t in changed) else "came")
            for one in changed:
                if one.refused:
                    assert len(waiting(one.tenant)) > mine + 1, "who has more makes room"
            check(changed)
        elif here:
            leaving = here.pop(step[1] % len(here))
            was_admitted.discard(leaving)
            check(queue.depart(leaving, now))


def test_a_tenant_with_a_thousand_turns_does_not_delay_anothers_one():
    queue = Queue(max_turns=4, max_queued=100)
    flood = [queue.arrive(0.0, "flood", 10)[0] for _ in range(104)]
    with pytest.raises(Overloaded):
        queue.arrive(0.0, "flood", 10)
    alone, changed = queue.arrive(1.0, "alone", 10)
    assert changed == [flood[-1]], "the newest of the flood made room"
    assert flood[-1].refused
    assert queue.depart(flood[0], 2.0) == [alone], "the next free place is his"


def test_an_eighth_of_the_places_is_kept_for_tenants_who_have_none():
    queue = Queue(max_turns=16, max_queued=100, max_tokens=1600, several=True)
    flood = [queue.arrive(0.0, "flood", 10)[0] for _ in range(50)]
    assert [one.admitted_at for one in flood].count(0.0) == 14
    first, _ = queue.arrive(1.0, "modest", 100)
    second, _ = queue.arrive(1.0, "modest", 100)
    other, _ = queue.arrive(1.0, "other", 1000)
    assert (first.admitted_at, second.admitted_at, other.admitted_at) == (1.0, None, 1.0)


def test_a_lone_tenant_has_all_the_places():
    queue = Queue(max_turns=16, max_queued=100, max_tokens=1600)
    turns = [queue.arrive(0.0, "", 100)[0] for _ in range(20)]
    assert [one.admitted_at for one in turns].count(0.0) == 16


async def test_a_place_that_is_given_back_early_is_somebody_else_s_at_once(autojump_clock):
    admission = Admission(max_turns=1, max_queued=2, queue_timeout_s=10)
    async with admission.place() as give_back:
        give_back()
        give_back()
        async with admission.place():
            assert admission.statistics().admitted == 1
        assert admission.statistics().admitted == 0
    assert (admission.statistics().admitted, admission.statistics().waiting) == (0, 0)


def test_a_large_turn_is_admitted_alone_and_is_not_overtaken_for_its_size():
    queue = Queue(max_turns=8, max_queued=8, max_tokens=100)
    first, _ = queue.arrive(0.0, "a", 60)
    large, _ = queue.arrive(0.0, "a", 500)
    small, _ = queue.arrive(0.0, "a", 1)
    assert (large.admitted_at, small.admitted_at) == (None, None)
    assert queue.depart(first, 1.0) == [large]
    assert queue.depart(large, 2.0) == [small]


def test_whose_deadline_has_passed_is_not_admitted_when_its_turn_comes():
    queue = Queue(max_turns=1, max_queued=8)
    first, _ = queue.arrive(0.0)
    late, _ = queue.arrive(0.0, wait_s=5.0)
    in_time, _ = queue.arrive(0.0, wait_s=50.0)
    assert queue.depart(first, 6.0) == [late, in_time]
    assert late.refused
    assert late.admitted_at is None
    assert in_time.admitted_at == 6.0


async def test_who_makes_room_is_told_at_once(autojump_clock):
    admission = Admission(max_turns=1, max_queued=2, queue_timeout_s=1000)
    told = []

    async def turn(tenant):
        try:
            async with admission.place(tenant):
                await trio.sleep(100)
        except Overloaded:
            told.append((tenant, trio.current_time()))

    async with trio.open_nursery() as nursery:
        for tenant in ("flood", "flood", "flood", "alone"):
            nursery.start_soon(turn, tenant)
            await trio.testing.wait_all_tasks_blocked()
    assert told == [("flood", 0)]


def test_the_hint_follows_how_long_turns_take():
    hints = []
    for length_s in (1.0, 100.0):
        queue = Queue(max_turns=1, max_queued=0)
        now = 0.0
        for _ in range(20):
            ticket, _ = queue.arrive(now)
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
