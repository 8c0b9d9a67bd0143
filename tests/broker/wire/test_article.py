"""The article's dialect: its frames, its tools, and the conversation that continues by itself."""

import pytest

from broker.errors import BadRequest
from broker.wire import article
from broker.wire.article import Dialogue, ToolResult
from broker.wire.items import FunctionCallOutput, Message
from broker.wire.responses_out import TERMINAL_EVENTS

OPENING = {
    "model": "m",
    "system": "You are an agent.",
    "tools": [],
    "input": "list the files",
}


def opened(**more):
    dialogue = Dialogue()
    return dialogue, dialogue.open(article.parse_opening(OPENING | more))


def answer(response_id, *call_ids, status="completed"):
    calls = [{"type": "function_call", "call_id": call_id} for call_id in call_ids]
    return {"id": response_id, "status": status, "output": [{"type": "message"}, *calls]}


def test_the_first_frame_is_a_request():
    request = article.parse_opening(OPENING)
    assert (request.model, request.instructions) == ("m", "You are an agent.")
    assert request.items == (Message(None, "user", "list the files"),)
    assert request.store
    assert request.generate
    assert request.stream_id is None


def test_the_dialect_is_known_by_what_it_lacks():
    assert article.is_opening(OPENING)
    assert not article.is_opening(OPENING | {"type": "response.create"})
    assert not article.is_opening({"model": "m"})


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    "tool",
    [
        {"name": "f", "description": "d", "parameters": SCHEMA},
        {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA},
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}},
        {"name": "f", "description": "d", "input_schema": SCHEMA},
    ],
)
def test_a_tool_may_have_any_vendors_shape(tool):
    [spec] = article.parse_opening(OPENING | {"tools": [tool]}).tools
    assert (spec.name, spec.description, spec.parameters) == ("f", "d", SCHEMA)


@pytest.mark.parametrize(
    ("more", "param"),
    [({"tools": [1]}, "tools[0]"), ({"system": 1}, "instructions"), ({"tools": 1}, "tools")],
)
def test_a_bad_opening_is_refused(more, param):
    with pytest.raises(BadRequest) as caught:
        article.parse_opening(OPENING | more)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("item", "parsed"),
    [
        ({"role": "tool", "content": "r"}, ToolResult(None, "r")),
        ({"type": "message", "role": "tool", "content": ""}, ToolResult(None, "")),
        ({"role": "tool", "content": "r", "tool_call_id": "c"}, ToolResult("c", "r")),
        ({"role": "tool", "content": "r", "call_id": "c"}, ToolResult("c", "r")),
        ({"role": "tool", "content": [{"type": "text", "text": "a"}]}, ToolResult(None, "a")),
        ({"role": "tool", "content": []}, ToolResult(None, "")),
        ({"role": "tool", "content": {"é": [1]}}, ToolResult(None, '{"é":[1]}')),
        ({"role": "tool", "content": [1, {"text": "a"}]}, ToolResult(None, '[1,{"text":"a"}]')),
        ({"role": "tool", "content": 7}, ToolResult(None, "7")),
        ({"role": "user", "content": "more"}, Message(None, "user", "more")),
        (
            {"type": "function_call_output", "call_id": "c", "output": "r"},
            FunctionCallOutput(None, "c", "r"),
        ),
    ],
)
def test_an_item_is_a_tools_result_or_any_other_item(item, parsed):
    assert article.parse_item({"type": "conversation.item.create", "item": item}) == parsed


@pytest.mark.parametrize(
    ("frame", "param"),
    [
        ({}, "item"),
        ({"item": 3}, "item"),
        ({"item": {"role": "tool"}}, "item.content"),
        ({"item": {"role": "nobody", "content": ""}}, "item[0].role"),
    ],
)
def test_a_bad_item_is_refused(frame, param):
    with pytest.raises(BadRequest) as caught:
        article.parse_item(frame)
    assert caught.value.param == param


def test_each_result_continues_the_latest_response_with_the_openings_settings():
    dialogue, opening = opened(tools=[{"name": "f"}])
    for turn in range(3):
        dialogue.answered(answer(f"resp_{turn}", f"call_{turn}"))
        request = dialogue.proceed(ToolResult(None, f"result {turn}"))
        assert request.previous_response_id == f"resp_{turn}"
        assert request.items == (FunctionCallOutput(None, f"call_{turn}", f"result {turn}"),)
        assert (request.instructions, request.tools) == (opening.instructions, opening.tools)


def test_results_answer_calls_in_order_unless_they_name_one():
    dialogue, _ = opened()
    dialogue.answered(answer("resp_1", "a", "b", "c"))
    dialogue.proceed(ToolResult("b", "2"))
    dialogue.proceed(ToolResult("elsewhere", "?"))
    dialogue.proceed(ToolResult(None, "1"))
    request = dialogue.proceed(ToolResult(None, "3"))
    assert request.items == (
        FunctionCallOutput(None, "b", "2"),
        FunctionCallOutput(None, "elsewhere", "?"),
        FunctionCallOutput(None, "a", "1"),
        FunctionCallOutput(None, "c", "3"),
    )


def test_a_result_that_answers_no_call_is_a_message_of_the_tool():
    dialogue, _ = opened()
    dialogue.answered(answer("resp_1"))
    request = dialogue.proceed(ToolResult(None, "r"))
    assert request.items == (Message(None, "tool", "r"),)


def test_what_got_no_response_goes_along_with_the_next_item():
    dialogue, opening = opened()
    dialogue.answered(answer("resp_x", status="failed"))
    again = Message(None, "user", "again")
    request = dialogue.proceed(again)
    assert request.previous_response_id is None
    assert request.items == (*opening.items, again)
    dialogue.answered(answer("resp_1", "c", status="incomplete"))
    assert dialogue.proceed(again).items == (again,)
    assert dialogue.proceed(again).previous_response_id == "resp_1"


def test_a_second_opening_begins_anew():
    dialogue, opening = opened()
    dialogue.answered(answer("resp_1", "c"))
    dialogue.open(opening)
    request = dialogue.proceed(ToolResult(None, "r"))
    assert request.previous_response_id is None
    assert request.items == (*opening.items, Message(None, "tool", "r"))


def test_an_item_needs_an_opening():
    with pytest.raises(BadRequest) as caught:
        Dialogue().proceed(ToolResult(None, "r"))
    assert caught.value.code == "conversation_not_open"


@pytest.mark.parametrize("kind", TERMINAL_EVENTS)
def test_done_follows_every_terminal_event_with_its_response(kind):
    terminal = {"type": kind, "sequence_number": 8, "response": {"id": "resp_1"}}
    assert article.done_event(terminal) == {
        "type": "response.done",
        "sequence_number": 9,
        "response": {"id": "resp_1"},
    }
