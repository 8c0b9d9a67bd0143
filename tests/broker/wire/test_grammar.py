"""The grammar checker, checked: it takes a right stream and refuses each planted fault for its own reason."""

import copy
import itertools

import pytest

from broker.wire.requests import TurnRequest
from broker.wire.responses_out import ResponseStream
from engine.api import CachedTokens, Usage
from tests.broker.wire.grammar import GrammarError, check_events, check_response

USAGE = Usage(prompt_tokens=5, cached=CachedTokens(host=2), computed_tokens=3, output_tokens=4)


def right_events():
    """A message, a call, a message."""
    numbers = itertools.count()
    stream = ResponseStream(
        TurnRequest(items=()),
        response_id="resp_1",
        model="m",
        created_at=1,
        new_id=lambda prefix: f"{prefix}_{next(numbers)}",
    )
    events = stream.start() + stream.text("a") + stream.text("b")
    events += (
        stream.call_start("f", "call_1") + stream.call_arguments("{") + stream.call_arguments("}")
    )
    events += stream.call_end() + stream.text("c")
    events += stream.finish("completed", None, USAGE, completed_at=2)
    return copy.deepcopy(events)


# Where each event of right_events() stands.
CREATED, IN_PROGRESS, ADDED, PART_ADDED, DELTA_A, DELTA_B, TEXT_DONE, PART_DONE, DONE = range(9)
CALL_ADDED, ARGUMENTS, _, ARGUMENTS_DONE, CALL_DONE = range(9, 14)
LAST = -1


def renumbered(events):
    for number, event in enumerate(events):
        event["sequence_number"] = number
    return events


def without(*positions):
    def plant(events):
        for position in sorted(positions, reverse=True):
            del events[position]
        renumbered(events)

    return plant


def doubled(position):
    def plant(events):
        events.insert(position, copy.deepcopy(events[position]))
        renumbered(events)

    return plant


def swapped(left, right):
    def plant(events):
        events[left], events[right] = events[right], events[left]
        renumbered(events)

    return plant


def put(position, *path_and_value):
    *path, key, value = path_and_value

    def plant(events):
        target = events[position]
        for step in path:
            target = target[step]
        target[key] = value

    return plant


def moved_terminal(events):
    events.insert(-2, events.pop())
    renumbered(events)


def cut_to_failure(events):
    """A failure that claims the item it broke."""
    failed = events[LAST]["response"] | {"status": "failed", "completed_at": None}
    failed["error"] = {"code": "c", "message": "m"}
    events[DONE:] = [{"type": "response.failed", "sequence_number": DONE, "response": failed}]


def part_in_a_call(events):
    part = events[PART_ADDED] | {"item_id": "fc_1", "output_index": 1}
    events.insert(ARGUMENTS, part)
    renumbered(events)


FAULTS = {
    "no end": (without(-1), "without a terminal"),
    "nothing": (lambda events: events.clear(), "without a terminal"),
    "two ends": (doubled(-1), "after the terminal"),
    "early end": (moved_terminal, "output is not the items done so far"),
    "a gap": (put(DELTA_B, "sequence_number", 6), "numbered 6, not 5"),
    "from one": (lambda events: events.pop(0), "numbered 1, not 0"),
    "no created": (without(CREATED), "event 0 is response.in_progress"),
    "no in_progress": (without(IN_PROGRESS), "event 1 is"),
    "created again": (lambda e: (e.insert(2, copy.deepcopy(e[0])), renumbered(e)), "created twice"),
    "a lane": (put(DELTA_A, "stream_id", "main"), "names a lane"),
    "no added": (without(ADDED), "outside an item"),
    "added twice": (doubled(ADDED), "inside an item"),
    "no part": (without(PART_ADDED), "outside a part"),
    "part twice": (doubled(PART_ADDED), "inside a part"),
    "part never done": (without(PART_DONE), "while a part is open"),
    "no part at all": (without(3, 4, 5, 6, 7), "differs from its parts|without a part"),
    "text never done": (without(TEXT_DONE), "before its text is"),
    "text done twice": (doubled(TEXT_DONE), "done twice"),
    "text after done": (swapped(DELTA_B, TEXT_DONE), "differs from its deltas|after output_text"),
    "lost delta": (without(DELTA_A), "differs from its deltas"),
    "deltas swapped": (swapped(DELTA_A, DELTA_B), "differs from its deltas"),
    "empty delta": (put(DELTA_A, "delta", ""), "empty text delta"),
    "delta logprobs": (put(DELTA_A, "logprobs", None), "without logprobs"),
    "delta elsewhere": (put(DELTA_A, "item_id", "msg_9"), "another item"),
    "delta index": (put(DELTA_A, "output_index", 1), "another index"),
    "content index": (put(DELTA_A, "content_index", 1), "another part"),
    "part index": (put(PART_ADDED, "content_index", 1), "content_index"),
    "part text": (put(PART_ADDED, "part", "text", "x"), "added with text"),
    "part kind": (put(PART_ADDED, "part", "type", "text"), "unknown part type"),
    "part annotations": (put(PART_ADDED, "part", "annotations", None), "annotations"),
    "done part": (put(PART_DONE, "part", "text", "x"), "done part differs"),
    "done item": (put(DONE, "item", "content", []), "differs from its parts"),
    "done id": (put(DONE, "item", "id", "msg_9"), "another item"),
    "done role": (put(DONE, "item", "role", "user"), "not the assistant's"),
    "done status": (put(DONE, "item", "status", "in_progress"), "a done item is in_progress"),
    "added status": (put(ADDED, "item", "status", "completed"), "is added completed"),
    "added full": (put(ADDED, "item", "content", [1]), "added with content"),
    "added kind": (put(ADDED, "item", "type", "refusal"), "unknown item type"),
    "index skips": (put(CALL_ADDED, "output_index", 2), "does not count up"),
    "an id twice": (put(CALL_ADDED, "item", "id", "msg_0"), "one id"),
    "part in a call": (part_in_a_call, "added to a call"),
    "arguments in text": (put(DELTA_A, "type", "response.function_call_arguments.delta"), "outside a call"),
    "lost arguments": (without(ARGUMENTS), "differ from deltas"),
    "empty arguments": (put(ARGUMENTS, "delta", ""), "empty arguments"),
    "arguments after": (swapped(11, ARGUMENTS_DONE), "differ from deltas|after they were done"),
    "arguments twice": (doubled(ARGUMENTS_DONE), "after they were done"),
    "arguments never done": (without(ARGUMENTS_DONE), "before its arguments"),
    "arguments name": (put(ARGUMENTS_DONE, "name", "g"), "another name"),
    "call arguments": (put(CALL_DONE, "item", "arguments", "[]"), "differs from its deltas"),
    "call name": (put(CALL_DONE, "item", "name", "g"), "name changes"),
    "call id": (put(CALL_DONE, "item", "call_id", "x"), "call_id changes"),
    "unknown event": (put(DELTA_A, "type", "response.output_text.more"), "unknown event"),
    "unknown response event": (put(LAST, "type", "response.stopped"), "unknown event"),
    "call never done": (without(CALL_DONE), "inside an item"),
    "open item at the end": (without(-2), "output is not|while an item is open"),
    "output lacks one": (lambda events: events[-1]["response"]["output"].pop(), "not the items done"),
    "early output": (put(IN_PROGRESS, "response", "output", [{}]), "no field 'type'"),
    "other id": (put(LAST, "response", "id", "resp_2"), "id changes"),
    "id prefix": (put(CREATED, "response", "id", "1"), "no resp_ prefix"),
    "wrong status": (put(LAST, "type", "response.incomplete"), "with status completed"),
    "status too early": (put(CREATED, "response", "status", "queued"), "queued, but not in the background"),
    "a field less": (lambda events: events[-1]["response"].pop("usage"), "fields missing"),
    "queued in the foreground": (put(IN_PROGRESS, "type", "response.queued"), "event 1 is"),
    "queued late": (put(DELTA_A, "type", "response.queued"), "queued twice"),
    "false failure": (cut_to_failure, "output is not the items"),
}  # fmt: skip


def test_a_right_stream_is_right():
    events = right_events()
    assert check_events(events) == events[-1]["response"]
    assert len(events) == 21, "a message of 2 deltas, a call of 2, a message of 1"


@pytest.mark.parametrize(("plant", "reason"), FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_refused_for_its_own_reason(plant, reason):
    events = right_events()
    plant(events)
    with pytest.raises(GrammarError, match=reason):
        check_events(events)


def test_lanes_are_checked_both_ways():
    events = right_events()
    for event in events:
        event["stream_id"] = "main"
    check_events(events, stream_id="main")
    for wrong in (None, "other"):
        with pytest.raises(GrammarError):
            check_events(events, stream_id=wrong)
    del events[3]["stream_id"]
    with pytest.raises(GrammarError, match="another lane"):
        check_events(events, stream_id="main")


def test_a_keepalive_may_come_anywhere_before_the_end():
    for place in range(2, 21):
        events = right_events()
        alive = copy.deepcopy(events[1])
        alive["response"]["output"] = [
            event["item"] for event in events[:place] if event["type"].endswith("item.done")
        ]
        events.insert(place, alive)
        check_events(renumbered(events))


@pytest.mark.parametrize(
    ("path_and_value", "reason"),
    [
        (("object", "list"), "object"),
        (("error", {"code": "c"}), "error and status"),
        (("incomplete_details", {}), "incomplete_details and status"),
        (("completed_at", None), "completed_at and status"),
        (("tools", [{"type": "function", "name": "f"}]), "has no description"),
        (("usage", "total_tokens", 8), "not the sum"),
        (("usage", "input_tokens_details", "cached_tokens", 6), "more tokens cached"),
        (("usage", "input_tokens_details", "cache_write_tokens", -1), "negative"),
        (("usage", "output_tokens_details", "reasoning_tokens", -1), "reasoning_tokens"),
        (("usage", "homeport:cached_by_tier", {"host": 2}), "four tiers"),
        (("usage", "homeport:cached_by_tier", "disk", 1), "do not sum"),
        (("output", 0, "status", "incomplete"), "not the last"),
        (("output", 2, "status", "incomplete"), "not incomplete"),
        (("output", 0, "id", "1"), "no msg_ prefix"),
        (("output", 1, "id", "1"), "no fc_ prefix"),
        (("output", 1, "call_id", ""), "no call_id"),
        (("output", 1, "arguments", {}), "not a string"),
        (("output", 0, "content", 0, "text", None), "text is not a string"),
        (("output", 0, "type", "image"), "unknown item type"),
        (("output", 1, "type", "compaction"), "no cmp_ prefix"),
        (("output", 1, {"type": "compaction", "id": "cmp_1", "encrypted_content": ""}), "content"),
        (("output", 1, {"type": "compaction", "id": "cmp_1", "encrypted_content": "x"}), "first"),
    ],
)
def test_a_wrong_response_is_refused(path_and_value, reason):
    events = right_events()
    put(LAST, "response", *path_and_value)(events)
    with pytest.raises(GrammarError, match=reason):
        check_response(events[LAST]["response"])
