"""The grammar checker of chat streams, checked: it takes a right stream and refuses each planted fault for its own reason."""

import copy

import pytest

from broker.wire.chat_out import ChatAnswer
from broker.wire.requests import TurnRequest
from broker.wire.responses_out import ResponseStream
from broker.wire.sse import DONE, data_frame
from engine.api import CachedTokens, Usage
from tests.broker.wire.chat_grammar import GrammarError, check_completion, read_body, read_chunks

USAGE = Usage(prompt_tokens=5, cached=CachedTokens(host=2), computed_tokens=3, output_tokens=4)
ROLE, TEXT, CALL, ARGUMENTS, MORE, FINISH, COUNTS = range(7)


def right_chunks():
    """A text, a call in two fragments, the end, the counts."""
    stream = ResponseStream(
        TurnRequest(items=()),
        response_id="resp_1",
        model="m",
        created_at=1,
        new_id=lambda prefix: f"{prefix}_1",
    )
    events = stream.start() + stream.text("a") + stream.call_start("f", "call_1")
    events += stream.call_arguments("{") + stream.call_arguments("}") + stream.call_end()
    events += stream.finish("completed", None, USAGE, completed_at=2)
    answer = ChatAnswer(streams=True, include_usage=True)
    return copy.deepcopy([chunk for event in events for chunk in answer.chunks(event)])


def delta(chunks, place):
    return chunks[place]["choices"][0]["delta"]


def fragment(chunks, place):
    return delta(chunks, place)["tool_calls"][0]


def test_a_right_stream_is_read():
    read = read_chunks(right_chunks(), include_usage=True)
    assert read.message == {
        "role": "assistant",
        "content": "a",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        ],
    }
    assert (read.finish_reason, read.blanks) == ("tool_calls", 0)


def cut(chunks, error):
    chunks[FINISH:] = [error]


FAULTS = {
    "a chunk without id": lambda c: c[TEXT].pop("id"),
    "not a chunk": lambda c: [chunk.update(object="chat.completion") for chunk in c],
    "an id without chatcmpl-": lambda c: [chunk.update(id="resp_1") for chunk in c],
    "the head changes": lambda c: c[CALL].update(id="chatcmpl-2"),
    "usage, and it was not asked for, or none": lambda c: c[TEXT].pop("usage"),
    "usage before the end": lambda c: c[TEXT].update(usage=c[COUNTS]["usage"]),
    "a chunk follows the last": lambda c: c.append(copy.deepcopy(c[COUNTS])),
    "the usage chunk has a choice": lambda c: c[COUNTS].update(choices=c[FINISH]["choices"]),
    "not one choice": lambda c: c[TEXT].update(choices=[]),
    "no usage chunk": lambda c: c.pop(),
    "no end, or two": lambda c: [c.pop(), c.pop()],
    "a second choice": lambda c: c[TEXT]["choices"][0].update(index=1),
    "the role is said once, at first": lambda c: c.pop(ROLE),
    "not the assistant's": lambda c: delta(c, ROLE).update(role="user"),
    "the first delta says something": lambda c: delta(c, ROLE).update(content="x"),
    "finish_reason cancelled": lambda c: c[FINISH]["choices"][0].update(finish_reason="cancelled"),
    "the last delta says something": lambda c: delta(c, FINISH).update(content="x"),
    "a delta says two things": lambda c: delta(c, CALL).update(content="x"),
    "a delta says something else": lambda c: c[TEXT]["choices"][0].update(delta={"text": "x"}),
    "an empty content": lambda c: delta(c, TEXT).update(content=""),
    "logprobs of no text": lambda c: c[CALL]["choices"][0].update(logprobs={"content": []}),
    "a call without an id": lambda c: fragment(c, CALL).update(id=""),
    "a call without a name": lambda c: fragment(c, CALL)["function"].update(name=""),
    "a call begins with its arguments": lambda c: fragment(c, CALL)["function"].update(
        arguments="{"
    ),
    "a call begins with more": lambda c: fragment(c, CALL).update(status="x"),
    "a fragment of another call": lambda c: fragment(c, MORE).update(index=2),
    "a later fragment says what the first said": lambda c: fragment(c, MORE).update(id="call_1"),
    "a later fragment names its call again": lambda c: fragment(c, MORE)["function"].update(
        name="f"
    ),
    "an empty fragment": lambda c: fragment(c, MORE)["function"].update(arguments=""),
    "something follows an error": lambda c: c.insert(TEXT, {"error": {}}),
    "an error beside something else": lambda c: cut(c, {"error": {}, "id": "x"}),
    "an error without param": lambda c: cut(c, {"error": {"message": "m", "type": "t"}}),
    "total_tokens is not the sum": lambda c: c[COUNTS]["usage"].update(total_tokens=1),
    "more tokens cached than there were": lambda c: c[COUNTS]["usage"][
        "prompt_tokens_details"
    ].update(cached_tokens=6),
    "tiers do not sum to cached_tokens": lambda c: c[COUNTS]["usage"][
        "homeport:cached_by_tier"
    ].update(disk=1),
    "not the four tiers": lambda c: c[COUNTS]["usage"]["homeport:cached_by_tier"].pop("disk"),
    "no reasons": lambda c: c[COUNTS]["usage"].pop("homeport:recomputed"),
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_each_fault_is_seen_for_its_own_reason(sentence):
    chunks = right_chunks()
    FAULTS[sentence](chunks)
    with pytest.raises(GrammarError) as caught:
        read_chunks(chunks, include_usage=True)
    assert sentence in str(caught.value)


def test_bytes_are_frames_of_one_data_line_and_end_once():
    frames = b"".join(map(data_frame, right_chunks()))
    read_body(frames + DONE, include_usage=True)
    error = {"error": {"message": "m", "type": "t", "param": None, "code": "c"}}
    for body, sentence in [
        (frames, r"\[DONE\] and an error, or neither"),
        (data_frame(error) + DONE, r"\[DONE\] and an error, or neither"),
        (b"event: x\n" + frames + DONE, "more or less than data"),
        (b": comment\n\n" + frames + DONE, "more or less than data"),
        (frames + DONE[:-1], "does not end with a frame's end"),
    ]:
        with pytest.raises(GrammarError, match=sentence):
            read_body(body, include_usage=True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"object": "response"}, "not a completion"),
        ({"id": "resp_1"}, "an id without chatcmpl-"),
    ],
)
def test_a_completion_is_checked_too(change, sentence):
    message = {"role": "assistant", "content": "a", "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    whole = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "service_tier": "default",
        "system_fingerprint": None,
        "choices": [choice],
        "usage": right_chunks()[COUNTS]["usage"],
    }
    assert check_completion(whole) == message
    with pytest.raises(GrammarError, match=sentence):
        check_completion(whole | change)
