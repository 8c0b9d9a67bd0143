"""The scheduler's laws: everyone is in every plan, budgets hold, short deltas pass long prompts, nobody starves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.api import RequestId, Sampling, Submit
from engine.scheduler import Scheduler
from engine.sequence import Phase, Sequence


def sequence(
    prompt: int, *, output: int = 8, computed: int = 0, request: int = 1, salt: bytes = b""
) -> Sequence:
    submit = Submit(
        request=RequestId(request),
        session="s",
        salt=salt,
        prompt=tuple(range(prompt)),
        sampling=Sampling(max_tokens=output),
    )
    made = Sequence.of(submit, now=0.0)
    made.computed = computed
    return made


def scheduler(**changes: float) -> Scheduler:
    settings = {
        "step_tokens": 64,
        "mixed_tokens": 16,
        "prefill_share": 0.75,
        "max_running": 4,
        "max_waiting": 8,
        "max_loading": 2,
        "device_slots": 64,
        "block_tokens": 4,
    }
    return Scheduler(**(settings | changes))


def start(target: Scheduler, *sequences: Sequence) -> None:
    for each in sequences:
        target.enqueue(each)
        target.start_loading(each)
        target.start_running(each)


def test_a_decode_runs_in_every_step_beside_a_long_prefill_that_is_held_to_the_mixed_budget():
    target = scheduler()
    decode, prompt = sequence(5, computed=4), sequence(1000)
    start(target, prompt, decode)
    counts = {chunk.sequence: chunk.count for chunk in target.plan()}
    assert counts == {decode: 1, prompt: 16}


def test_a_lone_prefill_gets_the_whole_step():
    target = scheduler()
    start(target, sequence(1000))
    assert [chunk.count for chunk in target.plan()] == [64]


def test_a_short_delta_is_done_in_one_step_beside_a_long_prompt():
    target = scheduler()
    long, short = sequence(1000), sequence(110, computed=100)
    start(target, long, short)
    counts = {chunk.sequence: chunk.count for chunk in target.plan()}
    assert counts == {short: 10, long: 54}


def test_the_head_of_the_queue_waits_for_room_and_holds_back_those_behind_it():
    target = scheduler(device_slots=12)
    start(target, sequence(30))
    big, small = sequence(20), sequence(1)
    target.enqueue(big)
    target.enqueue(small)
    assert target.admissible() is None
    target.remove(target.running[0])
    assert target.admissible() is big


def test_anything_within_the_context_limit_is_admitted_alone():
    target = scheduler(device_slots=3)
    lone = sequence(target.context_limit)
    target.enqueue(lone)
    assert target.admissible() is lone


def test_a_preempted_sequence_goes_to_the_head_of_the_queue():
    target = scheduler()
    first, second, third = sequence(4), sequence(4), sequence(4)
    start(target, first, second)
    target.enqueue(third)
    victim = target.victim(first)
    assert victim is second
    target.preempt(second)
    assert list(target.waiting) == [second, third]
    assert second.phase is Phase.WAITING


def test_the_victim_is_never_the_one_that_asks():
    target = scheduler()
    only = sequence(4)
    start(target, only)
    assert target.victim(only) is None


def test_a_full_queue_is_said_so():
    target = scheduler(max_waiting=1)
    assert target.accepts()
    target.enqueue(sequence(4))
    assert not target.accepts()


def test_removal_works_in_every_phase():
    target = scheduler()
    waiting, loading, running = sequence(4), sequence(4), sequence(4)
    start(target, running)
    target.enqueue(loading)
    target.start_loading(loading)
    target.enqueue(waiting)
    for each in (waiting, loading, running):
        target.remove(each)
    assert target.idle


@given(
    pending=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    step_tokens=st.integers(1, 128),
    mixed_tokens=st.integers(1, 64),
)
def test_everyone_is_in_every_plan_and_the_budget_holds(pending, step_tokens, mixed_tokens):
    target = scheduler(step_tokens=step_tokens, mixed_tokens=mixed_tokens)
    sequences = [sequence(n + 7, computed=7) for n in pending]
    start(target, *sequences)
    plan = target.plan()
    assert {id(chunk.sequence) for chunk in plan} == {id(s) for s in sequences}
    assert len(plan) == len(sequences)
    assert all(1 <= chunk.count <= chunk.sequence.pending for chunk in plan)
    total = sum(chunk.count for chunk in plan)
    assert total <= max(step_tokens, len(sequences))
    decodes = sum(n == 1 for n in pending)
    if decodes:
        assert total - decodes <= max(mixed_tokens, len(sequences) - decodes)


@given(
    pending=st.lists(st.integers(2, 300), min_size=1, max_size=6), step_tokens=st.integers(6, 128)
)
def test_prefills_leave_no_budget_unused_and_finish_in_bounded_steps(pending, step_tokens):
    target = scheduler(step_tokens=step_tokens, mixed_tokens=1000)
    sequences = [sequence(n) for n in pending]
    start(target, *sequences)
    steps = 0
    while target.running:
        plan = target.plan()
        left = sum(s.pending for s in target.running)
        assert sum(c.count for c in plan) >= min(left, step_tokens)
        for chunk in plan:
            chunk.sequence.advance(chunk.end)
            if chunk.sequence.pending == 0:
                target.remove(chunk.sequence)
        steps += 1
        assert steps <= sum(pending) // step_tokens + len(pending) + 1


@given(
    share=st.floats(0.05, 1),
    decode_s=st.floats(0.001, 1),
    token_s=st.floats(0.0001, 1),
    decodes=st.integers(1, 3),
    prompt=st.integers(2, 2000),
)
def test_streams_keep_their_share_of_the_time_and_the_prompt_beside_them_ends(
    share, decode_s, token_s, decodes, prompt
):
    target = scheduler(prefill_share=share)
    streams = [sequence(5, output=10**6, computed=4) for _ in range(decodes)]
    long = sequence(prompt)
    start(target, *streams)
    for _ in range(100):  # no credit for the prompt
        target.took(decodes, 0, decode_s)
    start(target, long)
    passed, steps, owed_s = 0.0, 0, 0.0
    while long.pending > 1:
        plan = target.plan()
        assert {chunk.sequence for chunk in plan} >= set(streams)
        [fed] = [chunk.count for chunk in plan if chunk.sequence is long] or [0]
        if fed:
            assert passed * (1 - share) <= decode_s * steps * 1.001, "not all was paid for"
            owed_s = fed * token_s * (1 - share) / share
            long.advance(long.computed + fed)
        else:
            assert owed_s > -0.001 * decode_s, "it was paid for, and still the prompt waits"
            owed_s -= decode_s
        target.took(decodes, len(plan) - decodes, decode_s + fed * token_s)
        passed, steps = passed + decode_s + fed * token_s, steps + 1


def test_a_prompt_that_nobody_decodes_beside_owes_nothing():
    target = scheduler(prefill_share=0.5)
    start(target, sequence(1000))
    target.took(0, 1, 5.0)
    start(target, sequence(5, computed=4))
    assert [chunk.count for chunk in target.plan()] == [1, 16]


def test_holes_are_fed_first_each_by_chunks_that_end_where_it_ends():
    target = scheduler(step_tokens=5)
    holed = sequence(30, computed=24)
    holed.holes = [(4, 8), (12, 20)]
    assert holed.pending == 4 + 8 + 6
    start(target, holed)
    fed = []
    while holed.pending:
        (chunk,) = target.plan()
        assert chunk.samples == (chunk.end == 30)
        fed.append((chunk.begin, chunk.end))
        holed.advance(chunk.end)
    assert fed == [(4, 8), (12, 17), (17, 20), (24, 29), (29, 30)]


def test_a_short_hole_leaves_its_share_of_the_step_to_others():
    target = scheduler(step_tokens=64)
    holed, long = sequence(300, computed=200), sequence(1000)
    holed.holes = [(4, 8)]
    start(target, holed, long)
    assert {chunk.sequence: chunk.count for chunk in target.plan()} == {holed: 4, long: 60}


def waiting(target: Scheduler, *, reads_disk: bool = False, looking_up: bool = False) -> Sequence:
    made = sequence(4)
    made.reads_disk, made.looking_up = reads_disk, looking_up
    target.enqueue(made)
    return made


def test_who_waits_for_the_disk_is_passed_by_others_and_keeps_the_place_among_its_like():
    target = scheduler(max_loading=1)
    first, second = waiting(target, reads_disk=True), waiting(target, reads_disk=True)
    third, lookup, other = (
        waiting(target, reads_disk=True),
        waiting(target, looking_up=True),
        waiting(target),
    )
    assert target.admissible() is first
    target.start_loading(first)
    assert not target.may_read()
    assert target.admissible() is other
    target.start_loading(other)
    assert target.admissible() is None
    target.start_running(first)
    assert target.admissible() is second
    assert list(target.waiting) == [second, third, lookup]


def test_the_tenant_who_has_least_under_way_is_next_and_his_own_keep_their_order():
    target = scheduler(max_running=16)
    flood = [sequence(4, salt=b"flood") for _ in range(5)]
    modest = [sequence(4, salt=b"modest") for _ in range(2)]
    for each in (*flood, *modest):
        target.enqueue(each)
    begun = []
    while (following := target.admissible()) is not None:
        target.start_loading(following)
        begun.append(following)
    assert begun == [flood[0], modest[0], flood[1], modest[1], *flood[2:]]


def test_who_is_next_and_does_not_fit_holds_back_the_other_tenants_too():
    target = scheduler(device_slots=12)
    start(target, sequence(30, salt=b"flood"))
    target.enqueue(sequence(1, salt=b"flood"))
    target.enqueue(sequence(20, salt=b"modest"))
    assert target.admissible() is None


def test_what_is_loaded_from_memory_is_not_limited():
    target = scheduler(max_loading=1, max_running=8)
    for _ in range(3):
        target.start_loading(waiting(target))
    assert target.admissible() is None
    assert target.may_read()


def test_who_may_read_but_does_not_fit_holds_back_those_behind_it():
    target = scheduler(device_slots=12)
    start(target, sequence(30))
    big = sequence(20)
    big.reads_disk = True
    target.enqueue(big)
    waiting(target)
    assert target.admissible() is None


@given(
    holes=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=5),
    behind=st.integers(1, 40),
    step_tokens=st.integers(1, 24),
)
def test_every_missing_token_is_fed_once_in_order_whatever_the_holes(holes, behind, step_tokens):
    ranges, at = [], 0
    for gap, length in holes:
        begin = at + gap + bool(ranges)
        at = begin + length
        ranges.append((begin, at))
    matched = at + 3
    target = scheduler(step_tokens=step_tokens)
    holed = sequence(matched + behind, computed=matched)
    holed.holes = list(ranges)
    start(target, holed)
    fed: list[int] = []
    while holed.pending:
        (chunk,) = target.plan()
        fed += range(chunk.begin, chunk.end)
        holed.advance(chunk.end)
    missing = [at for begin, end in ranges for at in range(begin, end)]
    assert fed == missing + list(range(matched, matched + behind))
