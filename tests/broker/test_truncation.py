"""What truncation leaves: enough, in whole turns, alike from turn to turn."""

import itertools

from hypothesis import event, given
from hypothesis import strategies as st

from broker.session import Part
from broker.truncation import truncate
from broker.wire.items import Compaction, FunctionCall, FunctionCallOutput, Message

SYSTEM = Message(None, "system", "s" * 7)


def user(text):
    return Part((Message(None, "user", text),))


def said(text):
    return Part((Message(None, "assistant", text),), tuple(text.encode()))


def call(name):
    return Part((FunctionCall(None, name, "f", "{}"),), (1, 2, 3, 4))


def result(name, text):
    return Part((FunctionCallOutput(None, name, text),))


def length(parts):
    total = 1
    for part in parts:
        for item in part.items:
            match item:
                case Message() | Compaction():
                    total += 2 + len(getattr(item, "text", "sum"))
                case FunctionCall():
                    total += 4
                case FunctionCallOutput():
                    total += 2 + len(item.output)
    return total


@st.composite
def histories(draw):
    """Turns with rounds of calls; a system message first, and perhaps later ones."""
    parts = [Part((SYSTEM,))]
    for number in range(draw(st.integers(1, 8))):
        if draw(st.booleans()) and draw(st.booleans()):
            parts.append(Part((Message(None, "developer", f"d{number}"),)))
        parts.append(user(f"{number}" + "q" * draw(st.integers(1, 30))))
        for around in range(draw(st.integers(0, 3))):
            name = f"c{number}.{around}"
            parts += [call(name), result(name, "r" * draw(st.integers(1, 30)))]
        parts.append(said(f"{number}" + "a" * draw(st.integers(1, 30))))
    return tuple(parts[: draw(st.integers(2, len(parts)))])


def items(parts):
    return [item for part in parts for item in part.items]


@given(histories(), st.integers(10, 400))
def test_what_is_left_fits_and_is_whole(parts, limit):
    left = truncate(parts, limit_tokens=limit, length=length)
    if left is None:
        event("does not fit")
        return
    event("truncated" if left.dropped_items else "whole")
    assert length(left.parts) <= limit or left.dropped_items == 0
    before, after = items(parts), items(left.parts)
    assert left.dropped_items == len(before) - len(after)
    assert left.dropped_tokens == length(parts) - length(left.parts)
    assert [one for one in before if one in after] == after, "the order stays"
    heads = [one for one in before if getattr(one, "role", "") in ("system", "developer")]
    assert [one for one in after if one in heads] == heads
    asked = [one for one in before if getattr(one, "role", "") == "user"]
    if asked:
        assert asked[-1] in after
    calls = {one.call_id for one in after if isinstance(one, FunctionCall)}
    assert all(one.call_id in calls for one in after if isinstance(one, FunctionCallOutput))
    assert after[-1] == before[-1]


@given(histories(), st.integers(10, 400))
def test_what_fits_is_left_alone(parts, more):
    left = truncate(parts, limit_tokens=length(parts) + more, length=length)
    assert left is not None
    assert (items(left.parts), left.dropped_items) == (items(parts), 0)


def test_prompts_begin_alike_while_a_conversation_grows():
    """A hundred turns of one size: the first question that is left changes once in a quarter of the limit."""
    limit, begins = 400, []
    parts = [Part((SYSTEM,))]
    for number in range(100):
        parts += [user(f"question {number:4}"), said("answer")]
        left = truncate(tuple(parts), limit_tokens=limit, length=length)
        begins.append(items(left.parts)[1].text)
    changes = sum(one != two for one, two in itertools.pairwise(begins))
    turn = length([user("question 1234"), said("answer")]) - 1
    assert changes <= (100 * turn - limit) / (limit / 4) + 1
    assert changes >= 10


def test_inside_one_long_turn_whole_rounds_go_and_the_question_stays():
    rounds = [p for n in range(20) for p in (call(f"c{n}"), result(f"c{n}", "r" * 20))]
    parts = (Part((SYSTEM,)), user("do it"), *rounds)
    left = truncate(parts, limit_tokens=200, length=length)
    after = items(left.parts)
    assert after[:2] == [SYSTEM, Message(None, "user", "do it")]
    assert isinstance(after[2], FunctionCall)
    assert after[-1].call_id == "c19"


def test_a_result_that_comes_late_keeps_its_call():
    late = (call("c0"), user("q" * 30), said("a" * 30), result("c0", "r"), user("last"))
    parts = (user("first" * 9), *late)
    left = truncate(parts, limit_tokens=length(parts) - 20, length=length)
    assert left is None or items(left.parts) in (items(late), items((user("last"),)))
    assert items(truncate(parts, limit_tokens=20, length=length).parts) == items((user("last"),))


def test_a_question_that_is_too_long_by_itself_cannot_be_truncated():
    parts = (user("short"), said("a"), user("q" * 100))
    assert truncate(parts, limit_tokens=50, length=length) is None
