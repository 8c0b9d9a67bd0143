"""Where two prompts part, and whose fault it is."""

from hypothesis import given
from hypothesis import strategies as st

from broker.divergence import diverged_at, item_at
from broker.recall import Recalled
from broker.session import Part
from broker.wire.items import Message

tokens = st.lists(st.integers(0, 2), max_size=40).map(tuple)


@given(tokens, tokens, tokens)
def test_the_first_difference_is_found_and_an_extension_is_none(same, before, now):
    a, b = same + before, same + now
    naive = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    assert diverged_at(a, b) == naive


def items(*lengths):
    return tuple(Message(None, "user", "x" * n) for n in lengths)


def length(parts):
    """A prompt of 10 tokens before the first item, and one for each character; an answer has 7."""
    return 10 + sum(
        7 if p.sampled is not None else sum(len(i.text) for i in p.items) for p in parts
    )


SAID = Recalled(
    # The client's items 0 and 1, then 2 and 3 that are one recalled answer, then 4.
    parts=(Part(items(5, 3)), Part(items(1, 1), (1, 2)), Part(items(4))),
    starts=(0, 2, 4),
    last=None,
)


def test_a_token_belongs_to_the_item_that_it_lies_in():
    expected = ["input"] * 10 + ["input[0]"] * 5 + ["input[1]"] * 3 + ["input[2]"] * 7
    expected += ["input[4]"] * 6
    assert [item_at(n, SAID, (), length) for n in range(len(expected))] == expected


def test_what_was_said_before_this_request_is_not_its_items_fault():
    history = (Part(items(20)),)
    assert item_at(29, SAID, history, length) == "input"
    assert item_at(30, SAID, history, length) == "input[0]"
    assert item_at(40, Recalled((), (), None), history, length) == "input"


def test_few_prompts_are_rendered_to_find_it():
    parts = tuple(Part(items(1)) for _ in range(1000))
    said = Recalled(parts, tuple(range(1000)), None)
    asked = []

    def counting(some):
        asked.append(some)
        return length(some)

    assert item_at(510, said, (), counting) == "input[500]"
    assert len(asked) <= 11
