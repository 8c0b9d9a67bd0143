"""Event streams: any order of text, calls, cancel and failure is grammatical, and says what was told."""

import itertools
import json

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from openai.types.responses import Response
from openai.types.responses.responses_server_event import ResponsesServerEvent
from pydantic import TypeAdapter

from broker.wire.items import content_digest, parse_items
from broker.wire.requests import Transport, parse_create
from broker.wire.responses_out import ResponseStream, usage_json
from engine.api import CachedTokens, Usage
from tests.broker.wire.grammar import check_events, check_response

TOOLS = [
    {"type": "function", "name": "f"},
    {
        "type": "namespace",
        "name": "box",
        "description": "d",
        "tools": [{"type": "function", "name": "g"}],
    },
    {"type": "custom", "name": "patch"},
]
USAGE = Usage(
    prompt_tokens=10,
    cached=CachedTokens(device=1, host=2, disk=3, remote=0),
    computed_tokens=4,
    output_tokens=5,
    recomputed={"new": 3, "logits": 1},
)


class Stream(ResponseStream):
    logs = False  # every character is a token with logprobs


def logprob(char):
    alone = {"token": char, "bytes": list(char.encode()), "logprob": -0.25}
    return alone | {"top_logprobs": [alone, alone | {"logprob": -1.5}]}


def new_stream(**body):
    request = parse_create({"tools": TOOLS, **body}, transport=Transport.WEBSOCKET)
    numbers = itertools.count()
    return Stream(
        request,
        response_id="resp_1",
        model="m",
        created_at=1700000000.7,
        new_id=lambda prefix: f"{prefix}_{next(numbers)}",
    )


def run(stream, script):
    """Play a script of ("text", s) | ("thought", s) | ("call", name, [deltas], ended) | ("alive",); the events."""
    events = stream.start()
    for step in script:
        events += steps_of(stream, step)
    return events


def steps_of(stream, step):
    match step:
        case ("text", text):
            return stream.text(text, [logprob(char) for char in text] if stream.logs else ())
        case ("thought", text):
            return stream.thought(text)
        case ("call", name, deltas, ended):
            events = stream.call_start(name, "call_1")
            for delta in deltas:
                events += stream.call_arguments(delta)
            return events + (stream.call_end() if ended else [])
        case _:
            return [stream.keepalive()]


texts = st.text("ab \n", max_size=4)
steps = st.one_of(
    st.tuples(st.just("text"), texts),
    st.tuples(st.just("thought"), st.text("ab \n", min_size=1, max_size=4).map("a".__add__)),
    st.tuples(
        st.just("call"),
        st.sampled_from(["f", "box.g", "unknown", "patch"]),
        st.lists(texts, max_size=3),
        st.just(True),
    ),
    st.just(("alive",)),
)
open_call = st.tuples(st.just("call"), st.just("f"), st.lists(texts, max_size=3), st.just(False))
scripts = st.builds(
    lambda body, last: [*body, *last], st.lists(steps, max_size=8), st.lists(open_call, max_size=1)
)
endings = st.sampled_from(
    [
        ("completed", None),
        ("incomplete", "max_output_tokens"),
        ("incomplete", "cancelled"),
        ("failed", None),
    ]
)


def end(stream, ending):
    status, reason = ending
    if status == "failed":
        return stream.fail("server_error", "broken")
    return stream.finish(status, reason, USAGE, completed_at=1700000001)


SERVER_EVENT = TypeAdapter(ResponsesServerEvent)


shown = st.sampled_from([{}, {"reasoning": {"effort": "low"}}])


@given(scripts, endings, st.sampled_from([None, "main"]), shown, st.booleans())
def test_any_turn_satisfies_the_grammar(script, ending, lane, reasoning, logs):
    stream = new_stream(stream_id=lane, **reasoning)
    stream.logs = logs
    events = run(stream, script)
    assert not stream.is_over
    events += end(stream, ending)
    assert stream.is_over
    terminal = check_events(events, stream_id=lane)
    event(f"{ending[0]}, {len(terminal['output'])} items")
    assert terminal == stream.response()
    assert terminal["output"] == stream.output_items
    assert events[-1]["type"] == f"response.{ending[0]}"
    json.dumps(events)


@given(scripts, endings)
def test_nothing_that_was_told_is_lost_but_blank_messages(script, ending):
    stream = new_stream()
    run(stream, script)
    end(stream, ending)
    told, blank = [], ""
    for step in script:
        match step:
            case ("text", text) if told and told[-1][0] == "text":
                told[-1] = ("text", told[-1][1] + text)
            case ("text", text) if (blank + text).strip():
                told.append(("text", blank + text))
                blank = ""
            case ("text", text):
                blank += text
            case ("thought", text) if told and told[-1][0] == "thought":
                told[-1] = ("thought", told[-1][1] + text)
                blank = ""
            case ("thought", text):
                told.append(step)
                blank = ""
            case ("call", name, deltas, _):
                told.append((name, "".join(deltas)))
                blank = ""
    is_open = (told and told[-1][0] in ("text", "thought")) or any(
        step[-1] is False for step in script
    )
    if ending[0] == "failed" and is_open:
        told.pop()
    said = []
    for item in stream.output_items:
        if item["type"] in ("message", "reasoning"):
            kind = "text" if item["type"] == "message" else "thought"
            said.append((kind, item["content"][0]["text"]))
        else:
            name = f"{item['namespace']}.{item['name']}" if "namespace" in item else item["name"]
            said.append((name, item["input" if name == "patch" else "arguments"]))
    assert said == told


def shape(events):
    """Events with neighbouring deltas joined and without numbers."""
    joined = []
    for each in events:
        bare = {key: value for key, value in each.items() if key != "sequence_number"}
        if joined and "delta" in bare and joined[-1]["type"] == bare["type"]:
            joined[-1] = bare | {"delta": joined[-1]["delta"] + bare["delta"]}
        else:
            joined.append(bare)
    return joined


@given(st.lists(texts, max_size=6), endings, st.booleans())
def test_how_text_is_cut_changes_only_the_deltas(pieces, ending, then_a_call):
    call = [("call", "f", ["{", "}"], True)] if then_a_call else []
    whole, cut = new_stream(), new_stream()
    at_once = run(whole, [("text", "".join(pieces)), *call])
    in_pieces = run(cut, [*(("text", piece) for piece in pieces), *call])
    at_once += end(whole, ending)
    in_pieces += end(cut, ending)
    assert shape(at_once) == shape(in_pieces)


@settings(max_examples=30)  # the SDK's union of 60 events is slow to match
@given(scripts, endings.filter(lambda ending: ending[1] != "cancelled"))
def test_every_event_is_one_that_the_official_sdk_knows(script, ending):
    stream = new_stream(stream_id="main", reasoning={}, include=["reasoning.encrypted_content"])
    stream.logs = True
    for each in run(stream, script) + end(stream, ending):
        parsed = SERVER_EVENT.validate_python(each)
        assert parsed.type == each["type"]


COMPACTION = {"type": "compaction", "id": "cmp_1", "encrypted_content": "sealed"}


def background_stream():
    request = parse_create({"tools": TOOLS, "background": True}, transport=Transport.HTTP)
    numbers = itertools.count()
    return Stream(
        request,
        response_id="resp_1",
        model="m",
        created_at=1700000000,
        new_id=lambda prefix: f"{prefix}_{next(numbers)}",
    )


@settings(max_examples=30)
@given(scripts, endings, st.booleans())
def test_a_background_turn_is_queued_first_and_has_the_same_grammar(script, ending, compacts):
    stream = background_stream()
    events = stream.queue()
    assert [each["type"] for each in events] == ["response.created", "response.queued"]
    events += stream.start()
    if compacts:
        events += stream.compacted(COMPACTION, USAGE)
    for step in script:
        events += steps_of(stream, step)
    events += end(stream, ending)
    terminal = check_events(events)
    assert terminal["status"] == ("cancelled" if ending[1] == "cancelled" else ending[0])
    assert ("compaction" in [item["type"] for item in terminal["output"]]) == compacts
    for each in events:
        SERVER_EVENT.validate_python(each)


def test_a_response_that_was_queued_may_fail_before_it_begins():
    stream = background_stream()
    events = stream.queue() + stream.fail("server_error", "broken")
    assert check_events(events)["status"] == "failed"


def test_the_response_is_one_that_the_official_sdk_knows():
    stream = new_stream(instructions="i", metadata={"a": "b"}, temperature=0, top_p=0.5)
    stream.logs = True
    call, patch = ("call", "f", ["{}"], True), ("call", "patch", ["x"], True)
    run(stream, [("thought", "hm"), ("text", "hello"), call, patch])
    end(stream, ("completed", None))
    response = Response.model_validate(stream.response())
    assert response.output_text == "hello"
    assert [item.type for item in response.output] == [
        "reasoning",
        "message",
        "function_call",
        "custom_tool_call",
    ]
    assert [token.token for token in response.output[1].content[0].logprobs] == list("hello")
    assert response.usage.input_tokens_details.cached_tokens == 6


def test_a_text_turn_event_by_event():
    stream = new_stream()
    events = run(stream, [("text", " "), ("text", "hi"), ("text", "")])
    events += end(stream, ("completed", None))
    assert [each["type"] for each in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[4]["delta"] == " hi"


def test_a_call_turn_event_by_event():
    stream = new_stream()
    events = run(stream, [("text", "\n\n"), ("call", "box.g", ['{"a"', ":1}"], True)])
    events += end(stream, ("completed", None))
    assert [each["type"].removeprefix("response.") for each in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert events[-2]["item"] == {
        "type": "function_call",
        "id": "fc_0",
        "call_id": "call_1",
        "name": "g",
        "namespace": "box",
        "arguments": '{"a":1}',
        "status": "completed",
    }


def test_a_custom_call_event_by_event():
    stream = new_stream()
    events = run(stream, [("call", "patch", ["a", "b"], True)]) + end(stream, ("completed", None))
    assert [each["type"].removeprefix("response.") for each in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
        "output_item.done",
        "completed",
    ]
    assert events[-3]["input"] == "ab"
    assert events[-2]["item"] == {
        "type": "custom_tool_call",
        "id": "ctc_0",
        "call_id": "call_1",
        "name": "patch",
        "input": "ab",
        "status": "completed",
    }


@pytest.mark.parametrize("asked", [True, False])
def test_thoughts_are_items_and_their_deltas_events_for_who_asked(asked):
    stream = new_stream(**({"reasoning": {"summary": "auto"}} if asked else {}))
    events = run(stream, [("thought", "h"), ("thought", "m"), ("text", "\nYes.")])
    events += end(stream, ("completed", None))
    kinds = [each["type"].removeprefix("response.") for each in events]
    deltas = ["content_part.added", "reasoning_text.delta", "reasoning_text.delta"]
    deltas += ["reasoning_text.done", "content_part.done"]
    assert kinds[2:4] == ["output_item.added", deltas[0] if asked else "output_item.done"]
    assert [kind for kind in kinds if "reasoning" in kind] == (deltas[1:4] if asked else [])
    thoughts, message = events[-1]["response"]["output"]
    assert thoughts == {
        "type": "reasoning",
        "id": "rs_0",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "hm"}],
        "status": "completed",
    }
    assert message["content"][0]["text"] == "\nYes."
    check_events(events)


def test_encrypted_thoughts_lead_back_to_their_item():
    stream = new_stream(include=["reasoning.encrypted_content"])
    run(stream, [("thought", "hm")])
    end(stream, ("completed", None))
    [thoughts] = stream.output_items
    [replayed] = parse_items([{k: v for k, v in thoughts.items() if k != "id"}])
    assert replayed.id == thoughts["id"] == "rs_0"
    assert thoughts["id"] not in thoughts["encrypted_content"]
    for foreign in ("gAAAA", "homeport1.", "homeport1.%%", "homeport1./w=="):
        [item] = parse_items([{"type": "reasoning", "summary": [], "encrypted_content": foreign}])
        assert item.id is None


def test_logprobs_of_white_space_go_with_the_text_that_follows():
    stream = new_stream()
    stream.logs = True
    events = run(stream, [("text", " "), ("text", "a"), ("text", "b")])
    deltas = [e for e in events if e["type"] == "response.output_text.delta"]
    assert [[t["token"] for t in e["logprobs"]] for e in deltas] == [[" ", "a"], ["b"]]
    run_on = stream.call_start("f", "c")
    assert [t["token"] for t in run_on[0]["logprobs"]] == [" ", "a", "b"]


def test_a_warm_up_has_no_output_and_may_have_no_usage():
    stream = new_stream(generate=False)
    events = stream.start() + stream.finish("completed", None, None, completed_at=2)
    terminal = check_events(events)
    assert (terminal["output"], terminal["usage"]) == ([], None)
    assert len(events) == 3


def test_a_cancelled_turn_ends_its_item_as_incomplete():
    stream = new_stream()
    events = run(stream, [("call", "f", ["{}"], True), ("text", "half a sen")])
    events += end(stream, ("incomplete", "cancelled"))
    terminal = check_events(events)
    assert [item["status"] for item in terminal["output"]] == ["completed", "incomplete"]
    assert terminal["incomplete_details"] == {"reason": "cancelled"}
    assert terminal["completed_at"] is None
    assert terminal["usage"]["output_tokens"] == 5


def test_a_call_that_is_cut_short_is_incomplete():
    stream = new_stream()
    events = run(stream, [("call", "f", ['{"a": '], False)])
    events += end(stream, ("incomplete", "max_output_tokens"))
    [call] = check_events(events)["output"]
    assert (call["status"], call["arguments"]) == ("incomplete", '{"a": ')


def test_white_space_before_a_call_does_not_come_back_after_it():
    stream = new_stream()
    run(stream, [("text", "\n"), ("call", "f", [], True), ("text", " "), ("text", "so")])
    end(stream, ("completed", None))
    assert stream.output_items[-1]["content"][0]["text"] == " so"


def test_a_call_that_the_model_leaves_open_is_completed_as_sampled():
    stream = new_stream()
    events = run(stream, [("call", "f", ['{"a": '], False)]) + end(stream, ("completed", None))
    [call] = check_events(events)["output"]
    assert (call["status"], call["arguments"]) == ("completed", '{"a": ')


def test_a_failure_finishes_no_item_falsely():
    stream = new_stream()
    events = run(stream, [("call", "f", ["{}"], True), ("text", "half")])
    events += stream.fail("server_error", "The model failed.")
    terminal = check_events(events)
    assert [item["type"] for item in terminal["output"]] == ["function_call"]
    assert terminal["error"] == {"code": "server_error", "message": "The model failed."}
    assert terminal["status"] == "failed"


def test_the_response_repeats_what_the_client_said():
    body = {
        "instructions": "i",
        "previous_response_id": "resp_0",
        "max_output_tokens": 7,
        "metadata": {"a": "b"},
        "prompt_cache_key": "k",
        "store": False,
        "temperature": 0.5,
        "top_p": 0.25,
        "parallel_tool_calls": False,
        "tool_choice": {"type": "function", "name": "f"},
        "reasoning": {"effort": "low"},
        "safety_identifier": "s",
        "max_tool_calls": 3,
        "user": "u",
    }
    response = new_stream(**body).response()
    said = body | {"reasoning": {"effort": "low", "summary": None}}
    assert {key: response[key] for key in said} == said
    penalties = {"presence_penalty": 0.5, "frequency_penalty": -1.0, "top_logprobs": 3}
    response = new_stream(**penalties).response()
    assert {key: response[key] for key in penalties} == penalties
    assert (response["created_at"], response["model"]) == (1700000000, "m")
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    assert new_stream(text={"format": form, "verbosity": "low"}).response()["text"] == {
        "format": form,
        "verbosity": "low",
    }


def test_a_response_for_a_request_that_was_not_parsed_is_whole():
    check_response(new_stream().response() | {"status": "in_progress"})
    fields = new_stream().response().keys()
    assert len(fields) == 32
    assert [name for name in fields if ":" in name] == ["homeport:cache"]


def test_where_a_stored_response_is_kept_is_said_once_it_is_over():
    for store, said in ((True, "disk"), (False, None)):
        stream = new_stream(store=store)
        run(stream, [])
        assert "homeport:stored" not in stream.response()
        events = stream.finish("completed", None, USAGE, 1)
        assert events[-1]["response"].get("homeport:stored") == said
    events = (stream := new_stream()).start()
    events += [*stream.text("hi"), *stream.finish("completed", None, USAGE, 1)]
    again = stream.kept_in_memory(events)
    assert again[:-1] == events[:-1]
    assert again[-1]["response"] == events[-1]["response"] | {"homeport:stored": "memory"}
    check_events(again)
    failed = new_stream()
    failed.start()
    assert "homeport:stored" not in failed.fail("server_error", "x")[-1]["response"]


def test_a_response_says_what_was_granted_and_where_its_prompt_diverged():
    stream = new_stream(prompt_cache_retention="24h")
    assert stream.response()["homeport:cache"] == {"ttl_s": 0}
    stream.diverged(7, "input[1]")
    events = stream.start()
    assert events[0]["response"]["homeport:cache"] == {
        "ttl_s": 0,
        "diverged_at": 7,
        "part": "input[1]",
    }


def test_usage_counts_cached_tokens_as_input_and_by_tier():
    assert usage_json(USAGE) == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 6, "cache_write_tokens": 4},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 15,
        "homeport:cached_by_tier": {"device": 1, "host": 2, "disk": 3, "remote": 0},
        "homeport:recomputed": {"new": 3, "logits": 1},
    }


@given(scripts)
def test_a_replay_of_the_output_has_its_digest(script):
    stream = new_stream()
    run(stream, script)
    end(stream, ("completed", None))
    replay = [
        {"role": "assistant", "content": item["content"][0]["text"]}
        if item["type"] == "message"
        else {key: item[key] for key in item if key not in ("id", "status")}
        for item in stream.output_items
    ]
    assert content_digest(parse_items(replay)) == content_digest(parse_items(stream.output_items))


@pytest.mark.parametrize(
    "misuse",
    [
        lambda stream: stream.start(),
        lambda stream: stream.call_arguments("x"),
        lambda stream: stream.call_end(),
        lambda stream: stream.call_start("f", "c") and stream.call_start("f", "c"),
        lambda stream: stream.call_start("f", "c") and stream.text("x"),
        lambda stream: stream.call_start("f", "c") and stream.thought("x"),
        lambda stream: stream.finish("completed", "cancelled", None, 1),
        lambda stream: stream.finish("incomplete", None, None, 1),
        lambda stream: stream.fail("c", "m") and stream.fail("c", "m"),
        lambda stream: stream.fail("c", "m") and stream.text("x"),
        lambda stream: stream.fail("c", "m") and stream.keepalive(),
        lambda stream: stream.fail("c", "m") and stream.finish("completed", None, None, 1),
    ],
)
def test_our_own_mistakes_are_loud(misuse):
    stream = new_stream()
    stream.start()
    with pytest.raises(AssertionError):
        misuse(stream)


def test_nothing_comes_before_the_start():
    for early in (lambda stream: stream.text("x"), lambda stream: stream.fail("c", "m")):
        with pytest.raises(AssertionError):
            early(new_stream())


def test_what_the_prompt_took_is_said_from_when_it_is_known_until_the_end():
    stream = new_stream()
    events = [*stream.start(), stream.keepalive()]
    stream.prompt_known(10, USAGE.cached, (4, 6))
    events += [stream.keepalive(), *stream.text("a"), stream.keepalive()]
    events += stream.finish("completed", None, USAGE, completed_at=1)
    check_events(events)
    said = [one.get("homeport:prompt") for one in events if one["type"] == "response.in_progress"]
    known = {
        "input_tokens": 10,
        "cached_tokens": 6,
        "cached_by_tier": {"device": 1, "host": 2, "disk": 3, "remote": 0},
        "cuts": [4, 6],
    }
    assert said == [None, None, known, known]
    assert "homeport:prompt" not in stream.response()


def test_the_stop_string_that_ended_an_output_is_said():
    stream = new_stream()
    events = [*stream.start(), *stream.text("a")]
    stream.stopped_at("###")
    events += stream.finish("completed", None, USAGE, completed_at=1)
    assert check_events(events)["homeport:stop_sequence"] == "###"
