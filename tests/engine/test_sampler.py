"""Draws depend on a request's own seed, step and logits, and follow its distribution."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampler import Sampler, SamplingState

VOCAB = 40


def logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def draws(row: torch.Tensor, count: int, **how) -> list[int]:
    """`count` consecutive steps of one request."""
    settings = {"temperature": 1.0, "top_p": 1.0, "seed": 3} | how
    states = [SamplingState(step=step, **settings) for step in range(count)]
    return tokens(row.expand(count, -1), states)


def tokens(rows: torch.Tensor, states) -> list[int]:
    return [choice.token for choice in Sampler().sample(rows, states)]


def test_temperature_zero_is_argmax_and_ties_go_to_the_lowest_id():
    rows = logits(0, rows=3)
    rows[1, [7, 5, 30]] = 9.0
    greedy = [SamplingState(0.0, 0.5, seed, 0) for seed in range(3)]
    assert tokens(rows, greedy) == [int(rows[0].argmax()), 5, int(rows[2].argmax())]


request_states = st.builds(
    SamplingState,
    temperature=st.sampled_from([0.0, 0.2, 1.0, 1.7]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    seed=st.integers(-(2**70), 2**70),
    step=st.integers(0, 5000),
)


@settings(max_examples=50)
@given(st.lists(request_states, min_size=1, max_size=6), st.integers(0, 1000))
def test_who_else_is_in_the_batch_does_not_matter(requests, seed):
    rows = logits(seed, rows=len(requests))
    together = Sampler().sample(rows, requests)
    alone = [Sampler().sample(rows[i : i + 1], [request])[0] for i, request in enumerate(requests)]
    assert together == alone


def test_one_seed_repeats_and_another_differs():
    row = logits(1)
    assert draws(row, 50) == draws(row, 50)
    assert draws(row, 50) != draws(row, 50, seed=4)
    assert len(set(draws(row, 50))) > 3


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)])
def test_frequencies_follow_the_distribution(temperature, top_p):
    count = 20_000
    row = logits(2)
    likely = (row[0].double() / temperature).softmax(0)
    ranked, ids = likely.sort(descending=True)
    kept = int((ranked.cumsum(0) < top_p).sum()) + 1
    expected = torch.zeros(VOCAB, dtype=torch.float64)
    expected[ids[:kept]] = ranked[:kept] / ranked[:kept].sum()
    seen = Counter(draws(row, count, temperature=temperature, top_p=top_p))
    assert all(expected[token] > 0 for token in seen)
    for token in range(VOCAB):
        p = float(expected[token])
        # Five standard deviations: seeds are fixed, so this either always passes or never.
        assert abs(seen[token] - count * p) <= 5 * (count * p * (1 - p)) ** 0.5 + 1e-9


def test_top_p_keeps_at_least_the_likeliest():
    row = logits(3)
    assert set(draws(row, 100, top_p=1e-9)) == {int(row.argmax())}


def test_top_p_takes_the_fewest_that_reach_it():
    row = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert set(draws(row, 200, top_p=0.4)) == {0}
    assert set(draws(row, 200, top_p=0.6)) == {0, 1}
    assert set(draws(row, 200, top_p=0.9)) == {0, 1, 2}


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    row = logits(4) * 1000
    assert set(draws(row, 20, temperature=1e-6)) == {int(row.argmax())}


def test_a_token_without_likelihood_is_never_drawn():
    row = torch.full((1, VOCAB), -torch.inf)
    row[0, [3, 11]] = 0.0
    assert set(draws(row, 300)) == {3, 11}
