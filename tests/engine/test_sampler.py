"""Draws depend on a request's own seed, step and logits, and follow its distribution."""

from collections import Counter
from dataclasses import replace

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


class Only:
    """A matcher that allows some ids."""

    def __init__(self, *ids: int) -> None:
        self.ids = ids

    def allow(self, row: torch.Tensor) -> None:
        row.fill_(0)
        for token in self.ids:
            row[token // 32] |= torch.tensor(1 << (token % 32)).to(torch.int32)


@settings(max_examples=50)
@given(st.lists(request_states, min_size=2, max_size=6), st.integers(0, 1000), st.data())
def test_what_is_forbidden_is_never_chosen_and_nobody_else_notices(requests, seed, data):
    rows = logits(seed, rows=len(requests))
    free = tokens(rows, requests)
    allowed = [data.draw(st.sets(st.integers(0, VOCAB - 1))) for _ in requests]
    bound = [
        replace(request, matcher=Only(*ids)) if ids else request
        for request, ids in zip(requests, allowed, strict=True)
    ]
    before = rows.clone()
    chosen = tokens(rows, bound)
    assert torch.equal(rows, before)
    for ids, token, unbound in zip(allowed, chosen, free, strict=True):
        assert token in ids if ids else token == unbound


def test_among_allowed_ids_the_proportions_stay():
    row = torch.zeros(1, VOCAB)
    row[0, 31] = float(torch.tensor(3.0).log())
    seen = Counter(draws(row, 4000, matcher=Only(31, 32)))
    assert set(seen) == {31, 32}
    assert seen[31] / 4000 == pytest.approx(0.75, abs=0.03)


def test_penalties_count_what_was_said():
    row = torch.zeros(1, VOCAB)
    row[0, [3, 5, 7]] = torch.tensor([2.0, 1.8, 1.6])
    greedy = SamplingState(0.0, 1.0, 0, 3)
    assert tokens(row, [greedy]) == [3]
    assert tokens(row, [replace(greedy, presence_penalty=0.3, said=[3])]) == [5]
    assert tokens(row, [replace(greedy, presence_penalty=0.3, said=[3, 3, 5])]) == [3]
    assert tokens(row, [replace(greedy, frequency_penalty=0.3, said=[3, 3, 5])]) == [7]
    assert tokens(row, [replace(greedy, frequency_penalty=-2.0, said=[5])]) == [5]
    both = torch.cat([row, row])
    assert tokens(both, [replace(greedy, presence_penalty=1.0, said=[3]), greedy]) == [5, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_likelihoods_are_the_models_own(temperature):
    """Before temperature, top_p, penalties and constraint: those say what was chosen, not what is likely."""
    rows = logits(4, rows=3)
    state = SamplingState(temperature, 0.5, 1, 0, Only(9), 1.0, 1.0, [9])
    asked = [replace(state, top_logprobs=3), replace(state, top_logprobs=0), state]
    first, second, third = Sampler().sample(rows, asked)
    expected = rows.double().log_softmax(-1)
    assert first.token == second.token == third.token == 9
    assert first.likelihood.logprob == pytest.approx(float(expected[0, 9]))
    best = expected[0].topk(3)
    assert [token for token, _ in first.likelihood.top] == best.indices.tolist()
    assert [logprob for _, logprob in first.likelihood.top] == pytest.approx(best.values.tolist())
    assert (second.likelihood.logprob, second.likelihood.top) == (
        pytest.approx(float(expected[1, 9])),
        (),
    )
    assert third.likelihood is None
