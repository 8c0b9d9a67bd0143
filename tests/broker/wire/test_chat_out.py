"""Chunk streams: any order of text, thoughts, calls and endings is grammatical, and says what the turn said."""

import itertools
import json

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from broker.errors import BadRequest, ContextTooLong
from broker.wire.chat_in import parse_chat
from broker.wire.chat_out import (
    ChatAnswer,
    as_completion,
    as_response,
    chat_error_body,
    completion,
    finish_reason,
)
from broker.wire.items import FunctionCall, Message, Reasoning, content_digest, parse_items
from broker.wire.requests import TurnRequest
from broker.wire.responses_out import ResponseStream, usage_json
from engine.api import CachedTokens, Usage
from tests.broker.wire.chat_grammar import check_completion, read_body, read_chunks

USAGE = Usage(
    prompt_tokens=10,
    cached=CachedTokens(device=1, host=2, disk=3, remote=0),
    computed_tokens=4,
    output_tokens=5,
    recomputed={"new": 3, "logits": 1},
)
COUNTS = usage_json(USAGE)
EVENT = TypeAdapter(ResponseStreamEvent)


class Turn:
    """The published events of a turn with any output. It is more than one model can say: thoughts, free text calls."""

    def __init__(self):
        self._numbers = itertools.count()
        self._output = []
        self._ids = itertools.count()
        self.events = []
        self._say("response.created", response=self.response("in_progress"))
        self.alive()

    def response(self, status, *, reason=None, error=None):
        blank = ResponseStream(
            TurnRequest(items=(), store=False, metadata={"a": "b"}),
            response_id="resp_1",
            model="m",
            created_at=1700000000,
            new_id=str,
        ).response()
        return blank | {
            "status": status,
            "output": list(self._output),
            "incomplete_details": None if reason is None else {"reason": reason},
            "error": error,
            "usage": None if status == "in_progress" else COUNTS,
            "homeport:stored": "disk",
        }

    def alive(self):
        self._say("response.in_progress", response=self.response("in_progress"))

    def text(self, *deltas):
        part = {"type": "output_text", "text": "".join(deltas), "annotations": [], "logprobs": []}
        item = {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
        place = self._open(item, content=[])
        for delta in deltas:
            self._say(
                "response.output_text.delta", **place, content_index=0, delta=delta, logprobs=[]
            )
        self._done()

    def think(self, *deltas, streamed=True):
        content = [{"type": "reasoning_text", "text": "".join(deltas)}]
        place = self._open({"type": "reasoning", "summary": [], "content": content}, content=[])
        for delta in deltas if streamed else ():
            self._say("response.reasoning_text.delta", **place, content_index=0, delta=delta)
        self._done()

    def call(self, name, *deltas):
        item = {"type": "function_call", "name": name, "arguments": "".join(deltas)}
        place = self._open(item | {"call_id": f"call_{len(self._output)}"}, arguments="")
        for delta in deltas:
            self._say("response.function_call_arguments.delta", **place, delta=delta)
        self._done()

    def custom(self, name, *deltas):
        item = {"type": "custom_tool_call", "name": name, "input": "".join(deltas)}
        place = self._open(item | {"call_id": f"call_{len(self._output)}"}, input="")
        for delta in deltas:
            self._say("response.custom_tool_call_input.delta", **place, delta=delta)
        self._done()

    def end(self, status, reason=None):
        error = {"code": "server_error", "message": "broken"} if status == "failed" else None
        response = self.response(status, reason=reason, error=error)
        self._say(f"response.{status}", response=response)
        return response

    def _open(self, item, **empty):
        item |= {"id": f"item_{next(self._ids)}", "status": "completed"}
        place = {"output_index": len(self._output)}
        self._say(
            "response.output_item.added", **place, item={**item, **empty, "status": "in_progress"}
        )
        self._output.append(item)
        return {**place, "item_id": item["id"]}

    def _done(self):
        place = len(self._output) - 1
        self._say("response.output_item.done", output_index=place, item=self._output[-1])

    def _say(self, kind, **fields):
        self.events.append({"type": kind, "sequence_number": next(self._numbers), **fields})


def play(script, ending):
    """A turn of these steps, and its last response."""
    turn = Turn()
    for name, *arguments in script:
        getattr(turn, name)(*arguments)
    return turn, turn.end(*ending)


def chunks_of(events, *, include_usage=False):
    answer = ChatAnswer(streams=True, include_usage=include_usage)
    return [chunk for event in events for chunk in answer.chunks(event)]


def bytes_of(events, *, include_usage=False):
    answer = ChatAnswer(streams=True, include_usage=include_usage)
    frames = [frame for event in events for frame in answer.frames(event)]
    return b"".join(frames) + answer.end()


pieces = st.lists(st.text("ab \né", min_size=1, max_size=4), min_size=1, max_size=3)
thoughts = st.builds(lambda cut: ("think", *cut), pieces)
texts = st.builds(lambda cut: ("text", *cut), pieces)
calls = st.builds(
    lambda kind, name, cut: (kind, name, *cut),
    st.sampled_from(["call", "custom"]),
    st.sampled_from(["f", "box.g"]),
    pieces | st.just([]),
)
scripts = st.lists(st.one_of(thoughts, texts, calls, st.just(("alive",))), max_size=8)
endings = st.sampled_from(
    [
        ("completed",),
        ("incomplete", "max_output_tokens"),
        ("incomplete", "cancelled"),
        ("failed",),
    ]
)


def strict(model, value):
    """`value` is what the SDK's type says, and has nothing beside it but what open models' servers add, and our own."""
    parsed = model.model_validate(value, strict=True)
    known = ("homeport:", "reasoning_content")
    unknown = [key for key in _extras(parsed) if not key.startswith(known)]
    assert unknown == []
    return parsed


def _extras(value):
    if isinstance(value, BaseModel):
        yield from value.model_extra or ()
        for name in type(value).model_fields:
            yield from _extras(getattr(value, name))
    elif isinstance(value, list):
        for each in value:
            yield from _extras(each)


@given(scripts, endings, st.booleans())
def test_a_stream_is_grammatical_and_says_what_the_whole_completion_says(
    script, ending, include_usage
):
    turn, response = play(script, ending)
    read = read_body(
        bytes_of(turn.events, include_usage=include_usage), include_usage=include_usage
    )
    event(f"{ending[0]}, {len(read.calls)} calls")
    assert read.blanks == sum(step == ("alive",) for step in script)
    assert (read.error is not None) == (ending[0] == "failed")
    if ending[0] != "failed":
        whole = completion(response)
        message = check_completion(whole)
        assert read.message.items() <= message.items()
        assert message.keys() - read.message.keys() == {"refusal", "annotations"}
        assert read.finish_reason == whole["choices"][0]["finish_reason"]
        assert read.usage == (whole["usage"] if include_usage else None)
        assert read.head["id"] == whole["id"]


@given(scripts, endings)
def test_how_the_events_cut_their_deltas_changes_nothing_else(script, ending):
    def joined(step):
        name, *deltas = step
        first = 1 if name in ("call", "custom") else 0
        whole = "".join(deltas[first:])
        return (name, *deltas[:first], *([whole] if whole else []))

    cut, whole = play(script, ending)[0], play([joined(step) for step in script], ending)[0]
    assert read_chunks(chunks_of(cut.events)) == read_chunks(chunks_of(whole.events))


def single(step):
    """Every character a delta of its own."""
    name, *deltas = step
    first = 1 if name in ("call", "custom") else 0
    return (name, *deltas[:first], *"".join(deltas[first:]))


@given(scripts)
def test_every_split_of_the_text_is_put_together_by_the_official_client(script):
    functions = [step for step in script if step[0] != "custom"]
    turn, response = play([single(step) for step in functions], ("completed",))
    state = ChatCompletionStreamState()
    for chunk in chunks_of(turn.events, include_usage=True):
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    final, whole = state.get_final_completion(), completion(response)
    told = whole["choices"][0]["message"]
    said = final.choices[0].message
    assert (said.content or "") == (told["content"] or "")
    assert [call.function.arguments for call in said.tool_calls or ()] == [
        call["function"]["arguments"] for call in told.get("tool_calls", ())
    ]
    assert [call.id for call in said.tool_calls or ()] == [
        call["id"] for call in told.get("tool_calls", ())
    ]
    assert final.choices[0].finish_reason == whole["choices"][0]["finish_reason"]
    assert final.usage.to_dict() == whole["usage"]


@given(scripts, endings.filter(lambda ending: ending[0] != "failed"))
def test_every_chunk_and_completion_is_one_that_the_official_sdk_knows(script, ending):
    """Its type of a chunk knows calls of functions only."""
    turn, _ = play([step for step in script if step[0] != "custom"], ending)
    for chunk in chunks_of(turn.events, include_usage=True):
        assert strict(ChatCompletionChunk, chunk).object == "chat.completion.chunk"
    strict(ChatCompletion, completion(play(script, ending)[1]))


@given(scripts)
def test_the_events_played_here_are_those_of_the_published_schema(script):
    for each in play(script, ("completed",))[0].events:
        assert EVENT.validate_python(each).type == each["type"]


def replayed(message):
    """What comes back when a client sends a message again."""
    return parse_chat({"messages": [{"role": "user", "content": "u"}, message]}).turn.items[1:]


@given(
    st.lists(thoughts, max_size=1),
    st.lists(texts, max_size=2),
    st.lists(calls, max_size=3),
    endings,
)
def test_what_was_said_and_is_sent_back_says_the_same(thinking, saying, calling, ending):
    """The order in which models speak: thoughts, text, calls. It is also the only one that a chat message can tell."""
    turn, response = play([*thinking, *saying, *calling], ending)
    output = parse_items(response["output"])
    for message in (
        completion(response)["choices"][0]["message"],
        read_chunks(chunks_of(turn.events)).message,
    ):
        assert content_digest(replayed(message)) == content_digest(output)


@given(scripts)
def test_in_any_order_a_chat_message_loses_no_word_and_no_call(script):
    _, response = play(script, ("completed",))
    output = parse_items(response["output"])
    items = replayed(completion(response)["choices"][0]["message"])

    def of(kind, items):
        return [item for item in items if isinstance(item, kind)]

    for kind in (Message, Reasoning):
        said = "".join(item.text for item in of(kind, output))
        assert said == "".join(item.text for item in of(kind, items))
    told = [(call.call_id, call.name, call.arguments) for call in of(FunctionCall, output)]
    assert told == [(call.call_id, call.name, call.arguments) for call in of(FunctionCall, items)]


@pytest.mark.parametrize(
    ("script", "ending", "reason"),
    [
        ([("text", "a")], ("completed",), "stop"),
        ([], ("completed",), "stop"),
        ([("call", "f", "{}")], ("completed",), "tool_calls"),
        ([("custom", "g", "x")], ("completed",), "tool_calls"),
        ([("text", "a"), ("call", "f", "{}"), ("text", "b")], ("completed",), "tool_calls"),
        ([("text", "a")], ("incomplete", "max_output_tokens"), "length"),
        ([("call", "f", "{")], ("incomplete", "max_output_tokens"), "length"),
        ([("text", "a")], ("incomplete", "cancelled"), "stop"),
    ],
)
def test_why_it_ended(script, ending, reason):
    assert finish_reason(play(script, ending)[1]) == reason


def test_a_stream_chunk_by_chunk():
    turn, _ = play([("text", "Hi", "."), ("alive",), ("call", "f", "{", "}")], ("completed",))
    head = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "m",
        "service_tier": "default",
        "system_fingerprint": None,
    }
    started = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
    deltas = [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hi"},
        {"content": "."},
        {},
        {"tool_calls": [{"index": 0, **started}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
    ]
    choice = {"index": 0, "logprobs": None, "finish_reason": None}
    last = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls"}
    counts = {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 6, "cache_write_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "homeport:cached_by_tier": {"device": 1, "host": 2, "disk": 3, "remote": 0},
        "homeport:recomputed": {"new": 3, "logits": 1},
    }
    chunks = chunks_of(turn.events, include_usage=True)
    assert chunks[:-2] == [
        {**head, "choices": [{**choice, "delta": delta}], "usage": None} for delta in deltas
    ]
    assert chunks[-2] == {
        **head,
        "choices": [last],
        "usage": None,
        "homeport:cache": {"ttl_s": 0},
        "homeport:stored": "disk",
    }
    assert chunks[-1] == {**head, "choices": [], "usage": counts}
    assert all("usage" not in chunk for chunk in chunks_of(turn.events))


def test_a_frame_is_data_alone_and_done_ends_the_body():
    turn, _ = play([("text", "é\n")], ("completed",))
    body = bytes_of(turn.events)
    assert body.endswith(b"data: [DONE]\n\n")
    assert b"event:" not in body
    assert '"content":"é\\n"'.encode() in body


def test_a_turn_that_breaks_says_its_error_and_is_not_done():
    turn, _ = play([("text", "a")], ("failed",))
    body = bytes_of(turn.events, include_usage=True)
    last = json.loads(body.removesuffix(b"\n\n").rpartition(b"data: ")[2])
    assert last == {
        "error": {
            "message": "broken",
            "type": "server_error",
            "param": None,
            "code": "server_error",
        }
    }
    assert b"[DONE]" not in body


def test_thoughts_that_were_not_streamed_are_said_when_they_are_done():
    turn = Turn()
    turn.think("a", "b", streamed=False)
    turn.think("c", "d")
    turn.think("e", streamed=False)
    turn.text("x")
    read_whole = completion(turn.end("completed"))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(turn.events)]
    assert [d["reasoning_content"] for d in deltas if "reasoning_content" in d] == [
        *("ab", "c", "d", "e")
    ]
    assert read_whole["choices"][0]["message"]["reasoning_content"] == "abcde"


def test_a_summary_stands_for_thoughts_that_are_not_shown():
    summary = [{"type": "summary_text", "text": "s"}]
    item = {"type": "reasoning", "id": "rs_1", "summary": summary}
    response = Turn().response("completed") | {"output": [item]}
    assert completion(response)["choices"][0]["message"]["reasoning_content"] == "s"


def test_a_call_in_a_namespace_has_the_name_that_the_model_said():
    call = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "g"}
    item = {**call, "namespace": "box", "arguments": "{}", "status": "completed"}
    response = Turn().response("completed") | {"output": [item]}
    [told] = completion(response)["choices"][0]["message"]["tool_calls"]
    assert told["function"]["name"] == "box.g"
    [back] = replayed({"role": "assistant", "tool_calls": [told]})
    assert content_digest([back]) == content_digest(parse_items([item]))


def test_log_probabilities_go_with_their_text():
    """A stream's events have no bytes of a token, the response's parts have; here both have."""
    top = {"token": "é", "logprob": -0.5}
    entry = {"token": "é", "logprob": -0.5, "top_logprobs": [top]}
    turn = Turn()
    turn.text("é")
    for each in turn.events:
        if each["type"] == "response.output_text.delta":
            each["logprobs"] = [entry]
    response = turn.end("completed")
    whole = [{**entry, "bytes": [1], "top_logprobs": [{**top, "bytes": [2]}]}]
    response["output"][0]["content"][0]["logprobs"] = whole
    [streamed] = read_chunks(chunks_of(turn.events)).logprobs
    assert streamed["bytes"] == streamed["top_logprobs"][0]["bytes"] == list("é".encode())
    told = completion(response)
    assert told["choices"][0]["logprobs"] == {"content": whole, "refusal": None}
    strict(ChatCompletion, told)


def test_a_turn_that_counted_nothing_has_no_usage():
    turn = Turn()
    response = turn.end("completed") | {"usage": None}
    assert completion(response)["usage"] is None
    turn.events[-1]["response"] = response
    assert chunks_of(turn.events, include_usage=True)[-1]["usage"] is None


@pytest.mark.parametrize(
    ("completion_id", "response_id"),
    [("chatcmpl-ab", "resp_ab"), ("resp_ab", None), ("chatcmpl_ab", None), ("", None)],
)
def test_one_id_leads_to_the_other(completion_id, response_id):
    assert as_response(completion_id) == response_id
    if response_id is not None:
        assert as_completion(response_id) == completion_id


def test_an_error_about_the_input_is_about_the_messages():
    body = chat_error_body(ContextTooLong(limit_tokens=1, prompt_tokens=2))
    assert (body["error"]["param"], body["error"]["code"]) == (
        "messages",
        "context_length_exceeded",
    )
    assert chat_error_body(BadRequest("x", param="model"))["error"]["param"] == "model"
