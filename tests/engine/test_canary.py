"""The tolerance of the canary: the same tokens' KV, computed in any other batch, is far below it, other tokens' far above."""

from __future__ import annotations

import random

import pytest

from engine.batch import Batch, Segment
from engine.canary import MOST_WAITING, TOLERANCE, Canaries, Canary
from engine.memory import Memory
from engine.runner import Runner
from tiers.arena import Arena
from tiers.block import Tier

SIZE = 4


def run(runner, tokens, begin, end, table):
    segment = Segment(0, end - begin, end, table, logits=0)
    runner.run(Batch(tokens[begin:end], range(begin, end), [segment]))


@pytest.fixture(scope="module")
def distances(pair):
    """(of the same tokens, of one other token in the block, of one other token before it)"""
    loaded, _ = pair
    arena = Arena(loaded.geometry, 64)
    memory, runner = Memory({Tier.DEVICE: arena}, SIZE), Runner(loaded, arena)
    source = random.Random(3)
    same, inside, before = [], [], []
    for blocks in (1, 2, 5, 11):
        tokens = [source.randrange(3, loaded.vocab_size) for _ in range(blocks * SIZE)]
        table, spare = list(range(blocks)), 60
        run(runner, tokens, 0, len(tokens), table)
        alone = [*table[:-1], spare]
        run(runner, tokens, len(tokens) - SIZE, len(tokens), alone)
        same.append(memory.distance(table[-1], spare))
        other = [*tokens[:-2], (tokens[-2] + 1) % loaded.vocab_size, tokens[-1]]
        run(runner, other, len(tokens) - SIZE, len(tokens), alone)
        inside.append(memory.distance(table[-1], spare))
        if blocks > 1:
            moved = [(tokens[0] + 1) % loaded.vocab_size, *tokens[1:]]
            chain = [*range(20, 20 + blocks - 1), spare]
            run(runner, moved, 0, len(tokens), chain)
            before.append(memory.distance(table[-1], spare))
    return same, inside, before


def test_the_same_tokens_are_within_a_ten_thousandth_of_the_tolerance(distances):
    same, _, _ = distances
    assert max(same) < TOLERANCE / 10_000


def test_one_other_token_in_the_block_is_far_outside(distances):
    _, inside, _ = distances
    assert min(inside) > 3 * TOLERANCE


def canary(number: int) -> Canary:
    return Canary(bytes(32), (number,), bytes([number]) * 32)


def test_a_fraction_of_the_blocks_is_chosen():
    numbers = iter([0.1, 0.3, 0.2, 0.9])
    canaries = Canaries(0.25, lambda: next(numbers))
    assert [canaries.chosen() for _ in range(4)] == [True, False, True, False]
    assert not Canaries(0.0, lambda: 0.0).chosen()


def test_those_that_wait_are_bounded_and_the_oldest_are_skipped():
    canaries = Canaries(1.0, lambda: 0.0)
    for number in range(MOST_WAITING + 3):
        canaries.add(canary(number))
    assert len(canaries) == MOST_WAITING
    assert canaries.take() == canary(3)
    assert canaries.report()["skipped"] == 3


@pytest.mark.parametrize(
    ("distance", "stays"), [(0.0, True), (TOLERANCE, True), (1.0, False), (float("nan"), False)]
)
def test_a_block_that_is_too_far_off_or_not_a_number_may_not_stay(distance, stays):
    canaries = Canaries(1.0, lambda: 0.0)
    assert canaries.judge(canary(1), distance) is stays
    assert canaries.report()["mismatched"] == (not stays)
