"""Responses events as Messages events: any turn, any split; the stream accumulates to the whole Message."""

import itertools

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import RawMessageStreamEvent
from hypothesis import event, given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from broker.wire.cache_control import InputUsage
from broker.wire.messages_ids import call_id, message_id, response_id, tool_use_id
from broker.wire.messages_in import parse_messages
from broker.wire.messages_out import MessageStream, arguments_object, diagnostics
from broker.wire.responses_out import ResponseStream
from engine.api import CachedTokens, Usage
from tests.broker.wire.messages_grammar import GrammarError, check_message, check_stream

CACHED = CachedTokens(device=1, host=2, disk=3, remote=0)
INPUT = InputUsage(fresh=4, read=3, written_5m=2, written_1h=1)
TOOLS = [{"name": "f", "input_schema": {"type": "object"}}]
EVENT = TypeAdapter(RawMessageStreamEvent)


def usage(output_tokens=5):
    return Usage(
        prompt_tokens=10,
        cached=CACHED,
        computed_tokens=4,
        output_tokens=output_tokens,
        recomputed={"new": 3, "logits": 1},
    )


def new_turn(**body):
    said = [{"role": "user", "content": "Hi."}]
    request = parse_messages({"max_tokens": 9, "messages": said, "tools": TOOLS, **body})
    numbers = itertools.count()
    return ResponseStream(
        request.turn,
        response_id="resp_1",
        model="m",
        created_at=0,
        new_id=lambda prefix: f"{prefix}_{next(numbers)}",
    )


def new_machine(**settings):
    settings = {"thinking": "shown", "account": lambda _: INPUT, "request_id": "req_1", **settings}
    return MessageStream(**settings)


def play(turn, script):
    """The Responses events of a script, the prompt known when it says so and at the latest before the first word."""
    events = []
    known = False
    for step in (("known",), *script) if ("known",) not in script else script:
        if step == ("known",):
            turn.prompt_known(10, CACHED, (4, 6))
            known = True
            events += turn.start() if not events else [turn.keepalive()]
            continue
        if not events:
            events += turn.start()
        match step:
            case ("alive",):
                events.append(turn.keepalive())
            case ("text", text) if known:
                events += turn.text(text)
            case ("call", arguments) if known:
                events += turn.call_start("f", f"call_{len(events)}")
                for delta in arguments:
                    events += turn.call_arguments(delta)
                events += turn.call_end()
    return events


def said(machine, events):
    return [one for event in events for one in machine.feed(event)]


texts = st.text("ab \n", max_size=4)
pieces = st.sampled_from(['{"a"', ": 1", "}", '{"a": 1}', "[1]", "", "nonsense"])
steps = st.one_of(
    st.tuples(st.just("text"), texts),
    st.tuples(st.just("call"), st.lists(pieces, max_size=3)),
    st.just(("alive",)),
)
scripts = st.builds(
    lambda before, after: [*[("alive",)] * before, ("known",), *after],
    st.integers(0, 2),
    st.lists(steps, max_size=8),
)
endings = st.sampled_from(["completed", "stopped", "max_output_tokens", "cancelled", "failed"])


@given(scripts, endings)
def test_any_turn_is_a_grammatical_stream_that_accumulates_to_its_whole_message(script, ending):
    turn, machine = new_turn(), new_machine()
    events = said(machine, play(turn, script))
    if ending == "failed":
        events += said(machine, turn.fail("server_error", "It broke."))
        check_stream(events)
        assert events[-1]["error"] == {"type": "api_error", "message": "It broke."}
        return
    if ending == "stopped":
        turn.stopped_at("###")
    reason = None if ending in ("completed", "stopped") else ending
    status = "completed" if reason is None else "incomplete"
    events += said(machine, turn.finish(status, reason, usage(9), completed_at=1))
    message = check_stream(events)
    event(message["stop_reason"])
    whole = machine.message(turn.response())
    check_message(whole)
    assert message == whole


@given(scripts)
def test_the_official_client_accumulates_the_same_message(script):
    """Arguments that are no JSON object are left out: the client raises on some, whoever sends them."""
    script = [("call", ['{"a": 1}']) if step[0] == "call" else step for step in script]
    turn, machine = new_turn(), new_machine()
    events = said(machine, play(turn, script))
    events += said(machine, turn.finish("completed", None, usage(), completed_at=1))
    snapshot, buffers = None, {}
    for one in events:
        if one["type"] not in ("ping", "message_stop"):
            parsed = EVENT.validate_python(one)
            snapshot = accumulate_event(event=parsed, current_snapshot=snapshot, json_bufs=buffers)
    whole = machine.message(turn.response())
    found = snapshot.to_dict()
    assert [(b.get("text"), b.get("input")) for b in found["content"]] == [
        (b.get("text"), b.get("input")) for b in whole["content"]
    ]
    for key in ("stop_reason", "stop_sequence", "model", "id"):
        assert found[key] == whole[key]
    for key in ("input_tokens", "cache_read_input_tokens", "output_tokens"):
        assert found["usage"][key] == whole["usage"][key]


@pytest.mark.parametrize("cut", range(1, 11))
def test_a_text_says_the_same_however_it_is_cut(cut):
    text = "Hello there."
    turn, machine = new_turn(), new_machine()
    script = [("known",), ("text", text[:cut]), ("alive",), ("text", text[cut:])]
    events = said(machine, play(turn, script))
    events += said(machine, turn.finish("completed", None, usage(), completed_at=1))
    assert check_stream(events)["content"] == [{"type": "text", "text": text, "citations": None}]


def test_message_start_waits_for_the_prompts_usage_and_pings_until_then():
    turn, machine = new_turn(), new_machine()
    events = said(machine, [*turn.start(), turn.keepalive()])
    assert [one["type"] for one in events] == ["ping", "ping"]
    turn.prompt_known(10, CACHED, (4, 6))
    [start] = said(machine, [turn.keepalive()])
    used = start["message"]["usage"]
    assert (used["input_tokens"], used["cache_read_input_tokens"]) == (4, 3)
    assert used["cache_creation_input_tokens"] == 3
    assert used["cache_creation"] == {
        "ephemeral_5m_input_tokens": 2,
        "ephemeral_1h_input_tokens": 1,
    }
    assert used["homeport:cached_by_tier"] == {"device": 1, "host": 2, "disk": 3, "remote": 0}
    assert said(machine, [turn.keepalive()]) == [{"type": "ping"}]


def test_the_prompt_is_accounted_for_once_with_the_engines_numbers():
    asked = []
    turn = new_turn()
    machine = new_machine(account=lambda prompt: asked.append(prompt) or INPUT)
    events = [("known",), ("alive",), ("text", "a"), ("alive",)]
    said(machine, play(turn, events))
    [prompt] = asked
    assert (prompt["input_tokens"], prompt["cached_tokens"], prompt["cuts"]) == (10, 6, [4, 6])


@pytest.mark.parametrize(
    ("body", "status", "reason", "output_tokens", "stop"),
    [
        ({}, "completed", None, 5, "end_turn"),
        ({}, "incomplete", "max_output_tokens", 9, "max_tokens"),
        (
            {"max_tokens": 32_000},
            "incomplete",
            "max_output_tokens",
            50,
            "model_context_window_exceeded",
        ),
        ({"max_tokens": 0}, "incomplete", "max_output_tokens", 0, "max_tokens"),
        ({}, "incomplete", "content_filter", 5, "refusal"),
        ({}, "incomplete", "cancelled", 5, "pause_turn"),
    ],
)
def test_how_a_turn_ended_is_a_stop_reason(body, status, reason, output_tokens, stop):
    turn, machine = new_turn(**body), new_machine()
    said(machine, play(turn, [("known",)]))
    turn.finish(status, reason, usage(output_tokens), completed_at=1)
    assert machine.message(turn.response())["stop_reason"] == stop


def test_a_call_is_a_tool_use_and_a_stop_string_that_cut_it_short_wins():
    for stopped, reason in ((None, "tool_use"), ("###", "stop_sequence")):
        turn, machine = new_turn(), new_machine()
        said(machine, play(turn, [("known",), ("call", ['{"a": 1}'])]))
        if stopped:
            turn.stopped_at(stopped)
        turn.finish("completed", None, usage(), completed_at=1)
        message = machine.message(turn.response())
        assert (message["stop_reason"], message["stop_sequence"]) == (reason, stopped)
        assert message["content"][0]["input"] == {"a": 1}


def reasoning_events(text, seal):
    """As a turn of a model that thinks gives them."""
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "status": "in_progress"}
    part = {"type": "reasoning_text", "text": text}
    done = {**item, "status": "completed", "content": [part], "encrypted_content": seal}
    return done, [
        {"type": "response.output_item.added", "item": item},
        {"type": "response.content_part.added", "part": {"type": "reasoning_text", "text": ""}},
        *({"type": "response.reasoning_text.delta", "delta": char} for char in text),
        {"type": "response.reasoning_text.done", "text": text},
        {"type": "response.content_part.done", "part": part},
        {"type": "response.output_item.done", "item": done},
    ]


@pytest.mark.parametrize(
    ("thinking", "block"),
    [
        ("shown", {"type": "thinking", "thinking": "Hm.", "signature": "seal"}),
        ("sealed", {"type": "thinking", "thinking": "", "signature": "seal"}),
        ("hidden", None),
    ],
)
def test_thoughts_are_shown_sealed_or_hidden_as_asked(thinking, block):
    turn, machine = new_turn(), new_machine(thinking=thinking)
    item, events = reasoning_events("Hm.", "seal")
    said_events = said(machine, [*play(turn, [("known",)]), *events, *turn.text("Four.")])
    said_events += said(machine, turn.finish("completed", None, usage(), completed_at=1))
    content = check_stream(said_events)["content"]
    assert content == [one for one in (block, content[-1]) if one is not None]
    response = turn.response()
    response["output"] = [item, *response["output"]]
    assert machine.message(response)["content"] == content


def test_thinking_tokens_are_told_apart():
    turn, machine = new_turn(), new_machine()
    said(machine, play(turn, [("known",)]))
    turn.finish("completed", None, usage(), completed_at=1)
    response = turn.response()
    response["usage"]["output_tokens_details"]["reasoning_tokens"] = 3
    assert machine.message(response)["usage"]["output_tokens_details"] == {"thinking_tokens": 3}


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ("", {}),
        ("{}", {}),
        ('{"a": [1, null]}', {"a": [1, None]}),
        ("[1]", {"homeport:arguments": "[1]"}),
        ('{"a": ', {"homeport:arguments": '{"a": '}),
        ('{"a": NaN}', {"homeport:arguments": '{"a": NaN}'}),
        ('{"a": 1e999}', {"homeport:arguments": '{"a": 1e999}'}),
        ('{"a": 1, "a": 2}', {"homeport:arguments": '{"a": 1, "a": 2}'}),
    ],
)
def test_arguments_that_are_no_object_are_kept_as_they_were_said(arguments, given):
    assert arguments_object(arguments) == given


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("server_error", "api_error"),
        ("overloaded", "overloaded_error"),
        ("context_length_exceeded", "invalid_request_error"),
    ],
)
def test_a_turn_that_breaks_in_the_middle_is_an_error_event(code, kind):
    turn, machine = new_turn(), new_machine()
    said(machine, play(turn, [("known",), ("text", "a")]))
    [error] = said(machine, turn.fail(code, "m"))
    assert error == {
        "type": "error",
        "error": {"type": kind, "message": "m"},
        "request_id": "req_1",
    }


@pytest.mark.parametrize(
    ("before", "cache", "reason"),
    [
        (None, {"ttl_s": 0}, {"type": "previous_message_not_found"}),
        (9, {"ttl_s": 0}, None),
        (
            9,
            {"diverged_at": 2, "part": "tools"},
            {"type": "tools_changed", "cache_missed_input_tokens": 7},
        ),
        (
            9,
            {"diverged_at": 2, "part": "instructions"},
            {"type": "system_changed", "cache_missed_input_tokens": 7},
        ),
        (
            9,
            {"diverged_at": 12, "part": "input[3]"},
            {"type": "messages_changed", "cache_missed_input_tokens": 0},
        ),
    ],
)
def test_a_miss_has_the_reason_that_the_turn_found(before, cache, reason):
    found = diagnostics(before, cache)
    assert found == (None if reason is None else {"cache_miss_reason": reason})
    turn, machine = new_turn(), new_machine(diagnose=lambda _: found)
    events = said(machine, play(turn, [("known",)]))
    events += said(machine, turn.finish("completed", None, usage(), completed_at=1))
    assert check_stream(events)["diagnostics"] == found


def test_ids_come_back_as_they_went_out():
    assert message_id("resp_1") == "msg_1"
    assert response_id(message_id("resp_1")) == "resp_1"
    assert call_id(tool_use_id("call_1")) == "call_1"
    assert tool_use_id(call_id("toolu_1")) == "toolu_1"
    assert call_id("made_elsewhere") == "made_elsewhere"


def test_the_checker_sees_broken_streams():
    turn, machine = new_turn(), new_machine()
    events = said(machine, play(turn, [("known",), ("text", "ab"), ("call", ["{}"])]))
    events += said(machine, turn.finish("completed", None, usage(), completed_at=1))
    check_stream(events)
    for drop in range(len(events)):
        if (
            events[drop]["type"] == "content_block_delta"
            and "partial_json" in events[drop]["delta"]
        ):
            continue  # a call may have no arguments
        with pytest.raises(GrammarError):
            check_stream(events[:drop] + events[drop + 1 :])
    for twice in range(len(events)):
        if events[twice]["type"] != "content_block_delta":
            with pytest.raises(GrammarError):
                check_stream([*events[: twice + 1], *events[twice:]])
