"""What is drafted, and when it pays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.draft import LEAST, Draft, price

CHEAP = 0.0  # every token is worth it


def test_what_followed_before_is_drafted():
    assert Draft().propose([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 3, CHEAP) == (4, 5, 6)


def test_the_latest_occurrence_counts():
    assert Draft().propose([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1, CHEAP) == (5,)


def test_a_longer_occurrence_counts_more_than_a_later_one():
    eight = list(range(20, 28))
    tokens = [*eight, 4, *eight[-LEAST:], 5, *eight]
    assert Draft().propose(tokens, 1, CHEAP) == (4,)


def test_what_goes_round_is_drafted_round():
    assert Draft().propose([7, 1, 2, 3, 1, 2, 3], 7, CHEAP) == (1, 2, 3, 1, 2, 3, 1)


def test_too_short_an_occurrence_is_none():
    assert Draft().propose([1, 2, 4, 9, 1, 2], 3, CHEAP) == ()


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 20))
def test_a_draft_continues_an_earlier_occurrence_of_the_end(tokens, most):
    draft = Draft().propose(tokens, most, CHEAP)
    ends = [
        end for end in range(LEAST, len(tokens)) if tokens[end - LEAST : end] == tokens[-LEAST:]
    ]
    assert bool(draft) == bool(ends)
    for end in ends:
        around = (tokens[end:] * most)[:most]
        if tuple(around) == draft:
            return
    assert not ends


@given(st.data())
def test_tokens_that_come_in_pieces_are_looked_up_as_a_whole(data):
    tokens = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=60))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens)))))
    draft = Draft()
    for cut in cuts:
        draft.propose(tokens[:cut], 4, CHEAP)
    assert draft.propose(tokens, 4, CHEAP) == Draft().propose(tokens, 4, CHEAP)


@pytest.mark.parametrize("token", [0x01010101, 0x00010000, 0xFF])
def test_bytes_of_two_tokens_are_no_token(token):
    """What ends the sequence stands in the bytes before at another place than a token's."""
    assert Draft().propose([token, token, token, token, 5, 1, 2, 3], 3, CHEAP) == ()
    shifted = [0x02000100, 0x03000200, 0x04000300, 0x00000400]
    assert Draft().propose([*shifted, 0x1, 0x020001, 0x030002, 0x040003], 3, CHEAP) == ()


def test_drafts_grow_while_they_are_right_stop_when_they_are_not_and_are_tried_again():
    tokens = [1, 2, 3, 4, 5, 6, 7, 8] * 4
    draft, cost = Draft(), price(0.25, 1)
    first = len(draft.propose(tokens, 31, cost))
    assert 0 < first < 5
    for _ in range(20):
        draft.judge(4, 4)
    assert len(draft.propose(tokens, 31, cost)) > 2 * first
    for _ in range(20):
        draft.judge(len(draft.propose(tokens, 31, cost)), 0)
    wrong = 0
    for _ in range(1000):
        drafted = len(draft.propose(tokens, 31, cost))
        draft.judge(drafted, 0)
        wrong += drafted
    assert 10 < wrong < 150, "it is tried again, and costs next to nothing where it is always wrong"


@pytest.mark.parametrize("extra", [0.02, 0.2, 0.5])
def test_a_drafted_token_costs_the_more_the_more_decode_together(extra):
    prices = [price(extra, decoding) for decoding in range(1, 33)]
    assert prices[0] == extra
    assert prices == sorted(prices)
    assert prices[-1] < 1, "one that is certain to be right is always worth it"
