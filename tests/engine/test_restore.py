"""Restore or recompute: the choice is right when the estimates are, nearly right when they are off, and learns."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.restore import MARGIN, Part, Rates, RestoreCosts
from tiers.block import Tier

BLOCK_TOKENS, BLOCK_BYTES, STEP_TOKENS = 32, 1_474_560, 512

# Seconds per byte and per token: from a memory stick beside a GPU to a fast SSD beside a slow CPU.
COPIES = (1 / 2e9, 1 / 50e9)
READS = ((1 / 20e6, 20e-3), (1 / 500e6, 2e-3), (1 / 6e9, 1e-4))  # (per byte, latency)
PREFILLS = ((2e-3, 1e-6, 30e-3), (1e-4, 2e-8, 5e-3), (5e-6, 2e-10, 1e-3))  # (token, depth, step)
MACHINES = [
    Rates(copy_s=copy, latency_s=latency, read_s=read, step_s=step, token_s=token, depth_s=depth)
    for copy, (read, latency), (token, depth, step) in itertools.product(COPIES, READS, PREFILLS)
]
FOUND = [
    [Part(first, BLOCK_TOKENS)] * here
    + [Part(then, BLOCK_TOKENS)] * there
    + [Part(then, 17)] * tail
    for first, then in ((Tier.DISK, Tier.DISK), (Tier.HOST, Tier.DISK), (Tier.DEVICE, Tier.HOST))
    for here in (0, 1, 20, 100)
    for there in (1, 30)
    for tail in (0, 1)
]


GUESSED = Rates()


def costs(rates: Rates = GUESSED) -> RestoreCosts:
    return RestoreCosts(
        rates, block_bytes=BLOCK_BYTES, block_tokens=BLOCK_TOKENS, step_tokens=STEP_TOKENS
    )


def seconds(machine: Rates, found, parts: int, tokens: int, queued: int = 0) -> float:
    """To the first token, token by token and block by block: the model written out."""
    host = sum(tier is Tier.HOST for tier, _, _ in found[:parts])
    disk = sum(tier is Tier.DISK for tier, _, _ in found[:parts])
    load = host * BLOCK_BYTES * machine.copy_s
    if disk:
        load += machine.latency_s + (queued + disk) * BLOCK_BYTES * machine.read_s
    reused = sum(of_part for _, of_part, _ in found[:parts])
    steps = -(-(tokens - reused) // STEP_TOKENS)
    fed = sum(machine.token_s + at * machine.depth_s for at in range(reused, tokens))
    return load + steps * machine.step_s + fed


def regret(believed: Rates, machine: Rates, found, new: int) -> float:
    tokens = sum(of_part for _, of_part, _ in found) + new
    chosen = costs(believed).choose(found, tokens, 0)
    every = [seconds(machine, found, parts, tokens) for parts in (0, len(found))]
    return seconds(machine, found, chosen, tokens) / min(every)


@pytest.mark.parametrize("machine", MACHINES)
def test_with_exact_estimates_the_choice_costs_at_most_five_per_cent(machine):
    assert max(regret(machine, machine, found, new) for found in FOUND for new in (1, 40)) <= 1.05


@pytest.mark.parametrize("wrong", [1.2, 1 / 1.2])
@pytest.mark.parametrize("of", [("copy_s",), ("read_s", "latency_s"), ("token_s", "depth_s")])
def test_with_an_estimate_a_fifth_off_the_choice_costs_at_most_a_quarter(wrong, of):
    for machine in MACHINES:
        believed = replace(machine, **{name: getattr(machine, name) * wrong for name in of})
        assert max(regret(believed, machine, found, 40) for found in FOUND) <= 1.25


def test_both_answers_are_given_on_these_machines():
    """Or the two tests above say nothing."""
    answers = {
        (costs(machine).choose(found, sum(n for _, n, _ in found) + 1, 0) > 0)
        for machine in MACHINES
        for found in FOUND
        if found[0][0] is Tier.DISK
    }
    assert answers == {True, False}


@given(
    tiers=st.lists(st.sampled_from(list(Tier)), max_size=12),
    new=st.integers(1, 2000),
    queued=st.integers(0, 50),
    machine=st.sampled_from(MACHINES),
)
def test_no_other_end_is_better_than_the_chosen_by_more_than_the_margin(
    tiers, new, queued, machine
):
    found = [Part(tier, BLOCK_TOKENS) for tier in tiers]
    tokens = BLOCK_TOKENS * len(found) + new
    chosen = costs(machine).choose(found, tokens, queued)
    every = [seconds(machine, found, parts, tokens, queued) for parts in range(len(found) + 1)]
    assert every[chosen] <= min(every) * MARGIN * (1 + 1e-9)


def test_what_is_in_memory_is_reused_though_what_is_on_disk_behind_it_would_lose():
    machine = Rates(read_s=1, latency_s=1, copy_s=1e-12)
    found = [Part(Tier.HOST, BLOCK_TOKENS)] * 3 + [Part(Tier.DISK, BLOCK_TOKENS)] * 2
    assert costs(machine).choose(found, 200, 0) == 3


def test_a_long_queue_at_the_disk_is_part_of_the_price():
    machine = Rates(token_s=1e-3, read_s=1e-2 / BLOCK_BYTES, latency_s=1e-3)
    found = [Part(Tier.DISK, BLOCK_TOKENS)] * 10
    assert costs(machine).choose(found, 321, 0) == 10
    assert costs(machine).choose(found, 321, 10_000) == 0


def test_what_is_on_its_way_is_waited_for_anyway_so_what_is_behind_it_costs_its_own_read_only():
    """A tail of 20 tokens was computed on a slow disk: the whole queue of its own session's prefetch was its price."""
    machine = Rates(token_s=1e-3, read_s=5e-3 / BLOCK_BYTES, latency_s=1e-3)
    coming = [Part(Tier.DEVICE, BLOCK_TOKENS, arriving=True)] * 25
    tail = Part(Tier.DISK, 20)
    assert costs(machine).choose([*coming, tail], 25 * BLOCK_TOKENS + 86, 25) == 26
    there = [Part(Tier.DEVICE, BLOCK_TOKENS)] * 25
    assert costs(machine).choose([*there, tail], 25 * BLOCK_TOKENS + 86, 25) == 25, "others' reads"


def test_nothing_found_is_nothing_to_restore():
    assert costs().choose([], 100, 0) == 0


@pytest.mark.parametrize("truth", [Rates(read_s=5e-8, latency_s=3e-2), Rates(read_s=1e-10)])
def test_loads_of_all_sizes_teach_the_disk_s_rate_and_latency(truth):
    believed, actual = costs(), costs(truth)
    for blocks in [1, 100, 10, 1000, 3, 30] * 40:
        believed.observe_reads(blocks, actual.read_s(blocks))
    for blocks in (1, 10, 1000):
        assert believed.read_s(blocks) == pytest.approx(actual.read_s(blocks), rel=0.2)


def test_steps_of_all_sizes_and_depths_teach_the_prefill():
    truth = Rates(step_s=2e-2, token_s=3e-4, depth_s=3e-7)
    believed, actual = costs(), costs(truth)
    for begin, count in [(0, 16), (0, 512), (4000, 512), (2000, 64), (8000, 300)] * 60:
        believed.observe_prefill(
            [(begin, begin + count)], 1, actual.prefill_s(begin, begin + count)
        )
    for begin, end in ((0, 512), (6000, 6512), (100, 164)):
        assert believed.prefill_s(begin, end) == pytest.approx(
            actual.prefill_s(begin, end), rel=0.2
        )


def test_one_hiccup_of_any_length_moves_a_prediction_by_less_than_a_fifth():
    believed = costs()
    before = believed.read_s(10)
    believed.observe_reads(10, 3600.0)
    assert before < believed.read_s(10) < before * 1.2


def test_a_clock_that_stood_still_teaches_nothing():
    believed = costs()
    believed.observe_copies(1, 0.0)
    assert believed.rates == Rates()


def test_a_disk_that_was_slow_for_a_while_is_tried_again_after_refusals():
    believed = costs()
    found = [Part(Tier.DISK, BLOCK_TOKENS)] * 10
    for _ in range(60):
        believed.observe_reads(10, 60.0)
    assert believed.choose(found, 321, 0) == 0
    refusals = 0
    while believed.choose(found, 321, 0) == 0:
        believed.forgive()
        refusals += 1
        assert refusals < 200
    assert refusals > 1


def test_steps_that_sample_nothing_are_observed_together_with_the_one_that_does():
    believed, together = costs(), costs()
    believed.observe_step([(0, 512)], 10.0, 10.001, settled=False)
    assert believed.rates == Rates()
    believed.observe_step([(512, 800)], 10.001, 11.0, settled=True)
    together.observe_prefill([(0, 512), (512, 800)], 2, 1.0)
    assert believed.rates == together.rates


@pytest.mark.parametrize("how", ["decode", "idle"])
def test_what_a_pause_or_a_decode_interrupts_is_not_observed(how):
    believed, alone = costs(), costs()
    believed.observe_step([(0, 512)], 10.0, 10.001, settled=False)
    if how == "idle":
        believed.idle()
    else:
        believed.observe_step([(0, 100), (7, 8)], 10.001, 10.5, settled=True)
    believed.observe_step([(512, 800)], 11.0, 11.3, settled=True)
    alone.observe_prefill([(512, 800)], 1, 11.3 - 11.0)
    assert believed.rates == alone.rates
