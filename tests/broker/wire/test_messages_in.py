"""Messages bodies to turns: what real clients send, what equals what, and what is wrong with the rest."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BadRequest, UnsupportedContent
from broker.wire.cache_control import Breakpoint
from broker.wire.items import FunctionCall, FunctionCallOutput, Message, Reasoning
from broker.wire.messages_in import parse_count, parse_messages
from broker.wire.requests import Cut, ToolChoice

MARK = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}
LS = {"name": "ls", "description": "List.", "input_schema": {"type": "object"}}
CAT = {"name": "cat", "input_schema": {"type": "object"}}
USE = {"type": "tool_use", "id": "toolu_1", "name": "ls", "input": {"path": "/"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "a.txt"}
CALL = FunctionCall(None, "call_1", "ls", '{"path": "/"}')


def text(words, **fields):
    return {"type": "text", "text": words, **fields}


def user(*blocks):
    return {
        "role": "user",
        "content": blocks[0] if blocks[:1] and isinstance(blocks[0], str) else list(blocks),
    }


def assistant(*blocks):
    return {**user(*blocks), "role": "assistant"}


def system(*blocks):
    return {**user(*blocks), "role": "system"}


def parse(*messages, **body):
    return parse_messages({"max_tokens": 10, "messages": list(messages) or [user("Hi.")], **body})


def items(*messages, **body):
    return parse(*messages, **body).turn.items


def refused(*messages, **body):
    with pytest.raises(BadRequest) as error:
        parse(*messages, **body)
    return error.value


# What becomes of it


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user("Hi.")], [Message(None, "user", "Hi.")]),
        ([user(text("Hi."))], [Message(None, "user", "Hi.")]),
        ([user(text("a"), text("b"))], [Message(None, "user", "a\n\nb")]),
        ([user("a"), user("b")], [Message(None, "user", "a\n\nb")]),
        ([user(text("a"), text(""), text("b"))], [Message(None, "user", "a\n\nb")]),
        (
            [user("a"), assistant("b"), user("c")],
            [
                Message(None, "user", "a"),
                Message(None, "assistant", "b"),
                Message(None, "user", "c"),
            ],
        ),
        (
            [user("a"), assistant(), user("c")],
            [Message(None, "user", "a"), Message(None, "user", "c")],
        ),
        (
            [user("a"), assistant(text("b"), text("c")), assistant("d"), user("e")],
            [
                Message(None, "user", "a"),
                *(Message(None, "assistant", word) for word in "bcd"),
                Message(None, "user", "e"),
            ],
        ),
        (
            [system("s"), user("a"), system(text("t"), text("u")), user("b")],
            [
                Message(None, "system", "s"),
                Message(None, "user", "a"),
                Message(None, "system", "t\n\nu"),
                Message(None, "user", "b"),
            ],
        ),
        (
            [user("a"), assistant(text("Looking."), USE), user(RESULT, text("Go on."))],
            [
                Message(None, "user", "a"),
                Message(None, "assistant", "Looking."),
                CALL,
                FunctionCallOutput(None, "call_1", "a.txt"),
                Message(None, "user", "Go on."),
            ],
        ),
        (
            [
                user("a"),
                assistant(
                    {"type": "thinking", "thinking": "Hm.", "signature": "seal"},
                    {"type": "redacted_thinking", "data": "sealed"},
                    {"type": "thinking", "thinking": "", "signature": ""},
                    text("b"),
                ),
                user("c"),
            ],
            [
                Message(None, "user", "a"),
                Reasoning(None, "Hm.", "seal"),
                Reasoning(None, "", "sealed"),
                Reasoning(None, "", None),
                Message(None, "assistant", "b"),
                Message(None, "user", "c"),
            ],
        ),
    ],
)
def test_messages_become_items(messages, expected):
    assert items(*messages) == tuple(expected)


@pytest.mark.parametrize(
    ("content", "output"),
    [
        ({"content": "a"}, "a"),
        ({"content": [text("a")]}, "a"),
        ({"content": [text("a", cache_control=MARK), text(""), text("b")]}, "a\n\nb"),
        ({"content": []}, ""),
        ({}, ""),
        ({"content": "no such file", "is_error": True}, "Error: no such file"),
        ({"is_error": True}, "Error"),
        ({"content": "a", "is_error": False}, "a"),
    ],
)
def test_a_tools_result_is_a_string_or_texts_and_says_when_it_is_an_error(content, output):
    result = {"type": "tool_result", "tool_use_id": "toolu_1", **content}
    assert items(user("a"), assistant(USE), user(result))[-1] == FunctionCallOutput(
        None, "call_1", output
    )


def test_results_may_come_in_several_messages_of_one_turn_and_after_a_system_message():
    other = {**USE, "id": "toolu_2"}
    second = {**RESULT, "tool_use_id": "toolu_2"}
    found = items(
        user("a"), assistant(USE), assistant(other), system("s"), user(RESULT), user(second)
    )
    assert [item.call_id for item in found if isinstance(item, FunctionCallOutput)] == [
        "call_1",
        "call_2",
    ]


@pytest.mark.parametrize(
    ("system_field", "instructions"),
    [
        (None, None),
        ("", None),
        ([], None),
        ("Be brief.", "Be brief."),
        ([text("Be brief.")], "Be brief."),
        ([text("Be brief.", cache_control=MARK), text("Be kind.")], "Be brief.\n\nBe kind."),
        ([text("x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli;"), text("B")], "B"),
        ("x-anthropic-billing-header: cc_version=2.1;\n\nBe brief.", "Be brief."),
        ("Be brief: x-anthropic-billing-header: no.", "Be brief: x-anthropic-billing-header: no."),
    ],
)
def test_the_system_prompt_is_a_string_or_blocks_without_the_billing_line(
    system_field, instructions
):
    assert parse(system=system_field).turn.instructions == instructions


def test_what_a_user_says_is_left_as_it_is():
    said = "x-anthropic-billing-header: is what I saw in a log"
    assert items(user(said))[0].text == said


def test_the_rest_of_a_request_becomes_fields_of_the_turn():
    turn = parse(
        model="m",
        max_tokens=32_000,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        stop_sequences=["###", ""],
        stream=True,
        metadata={"user_id": "user_1"},
        diagnostics={"previous_message_id": "msg_1"},
        cache_control=HOUR,
    ).turn
    assert (turn.model, turn.max_output_tokens, turn.store, turn.stream) == (
        "m",
        32_000,
        False,
        True,
    )
    assert (turn.temperature, turn.top_p, turn.stop) == (0.5, 0.9, ("###",))
    assert turn.metadata == {"user_id": "user_1"}
    assert turn.follows == "resp_1"
    assert turn.asked_ttl_s == 3600


def test_an_empty_user_id_names_nobody():
    assert parse(metadata={"user_id": ""}).user_id is None


def test_a_top_k_of_one_is_greedy():
    assert parse(top_k=1, temperature=0.7).turn.temperature == 0
    assert parse(top_k=2, temperature=0.7).turn.temperature == 0.7


def test_a_top_p_of_nothing_still_leaves_a_token():
    assert 0 < parse(top_p=0).turn.top_p < 0.001


def test_tools_are_functions_and_those_of_the_vendor_are_left_out():
    hosted = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
    turn = parse(tools=[LS, hosted, {**CAT, "type": "custom", "strict": True}]).turn
    assert [tool.name for tool in turn.tools] == ["ls", "cat"]
    assert turn.tools[0].description == "List."
    assert turn.tools[1].strict is True


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        (None, ToolChoice(), True),
        ({"type": "auto"}, ToolChoice(), True),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice(), False),
        ({"type": "any"}, ToolChoice("required"), True),
        ({"type": "any", "disable_parallel_tool_use": True}, ToolChoice("required"), False),
        ({"type": "tool", "name": "cat"}, ToolChoice("required", ("cat",)), True),
        ({"type": "none"}, ToolChoice("none"), True),
    ],
)
def test_tool_choice(choice, expected, parallel):
    turn = parse(tools=[LS, CAT], tool_choice=choice).turn
    assert (turn.tool_choice, turn.parallel_tool_calls) == (expected, parallel)


@pytest.mark.parametrize(
    ("thinking", "shown", "effort"),
    [
        (None, "hidden", None),
        ({"type": "disabled"}, "hidden", None),
        ({"type": "enabled", "budget_tokens": 1024}, "shown", "high"),
        ({"type": "adaptive"}, "shown", "high"),
        ({"type": "adaptive", "display": "omitted"}, "sealed", "high"),
        ({"type": "enabled", "budget_tokens": 2000, "display": "summarized"}, "shown", "high"),
    ],
)
def test_thinking_is_shown_sealed_or_hidden(thinking, shown, effort):
    request = parse(thinking=thinking, output_config={"effort": "high"})
    assert request.thinking == shown
    asked = request.turn.echo.get("reasoning")
    assert asked == (None if effort is None else {"effort": "high", "summary": None})
    assert request.turn.reasoning_effort == (effort or "none")
    assert request.turn.reasoning_events is request.turn.encrypted_reasoning is (shown != "hidden")


@pytest.mark.parametrize("name", ["output_config.format", "output_format"])
def test_an_output_format_is_the_schema_of_the_answer(name):
    form = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {}}}}
    body = (
        {"output_format": form} if name == "output_format" else {"output_config": {"format": form}}
    )
    asked = parse(**body).turn.text_format
    assert (asked.schema, asked.strict, asked.at) == (form["schema"], True, f"{name}.schema")


# What equals what


def claude_code(last, *before):
    """A request as Claude Code 2.1 sends it; `last` bears the moving mark."""
    return {
        "model": "local",
        "messages": [*before, last],
        "system": [
            text(
                f"x-anthropic-billing-header: cc_version=2.1.330.{len(before):03x}; cc_entrypoint=cli;"
            ),
            text("You are a coding agent.", cache_control=MARK),
            text("Long instructions. " * 40, cache_control=MARK),
        ],
        "tools": [
            {"name": f"Tool{n}", "description": "d" * 50, "input_schema": {"type": "object"}}
            for n in range(12)
        ],
        "metadata": {"user_id": json.dumps({"session_id": "s"})},
        "max_tokens": 32_000,
        "thinking": {"type": "adaptive", "display": "omitted"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
    }


def test_what_claude_code_sends_is_understood_and_its_moving_mark_finds_its_block_again():
    first = parse_messages(
        claude_code(system(text("Today is Monday.", cache_control=MARK)), user(text("Hi.")))
    )
    second = parse_messages(
        claude_code(
            user(text("More.", cache_control=MARK)),
            user("Hi."),
            system("Today is Monday."),
            assistant(text("Hello.")),
        )
    )
    assert first.turn.max_output_tokens == 32_000
    assert len(first.turn.tools) == 12
    assert first.turn.instructions == second.turn.instructions
    assert not first.turn.instructions.startswith("x-anthropic")
    assert first.turn.items == second.turn.items[:2]
    assert first.layout.names == second.layout.names[: len(first.layout.names)]
    assert [point.block for point in first.layout.breakpoints] == [13, 14, 16]
    assert [point.block for point in second.layout.breakpoints] == [13, 14, 18]
    assert (first.thinking, first.user_id) == ("sealed", '{"session_id": "s"}')


words = st.text("ab \n", min_size=1, max_size=5)
turns = st.lists(
    st.tuples(
        st.sampled_from(["user", "assistant", "system"]), st.lists(words, min_size=1, max_size=3)
    ),
    max_size=6,
)


@given(turns, st.data())
def test_equal_content_gives_equal_items_and_names_however_it_is_written(script, data):
    """Strings or blocks, marks or none, one message or several of the same role, any extra field."""
    script = [*script, ("user", ["end"])]
    plain = [{"role": role, "content": [text(word) for word in said]} for role, said in script]
    varied = []
    marks = 4
    for role, said in script:
        blocks = []
        for word in said:
            if marks and data.draw(st.booleans(), label="mark"):
                marks -= 1
                blocks.append(text(word, cache_control=MARK))
            else:
                blocks.append(text(word, citations=None))
        if data.draw(st.booleans(), label="split"):
            varied += [{"role": role, "content": [block]} for block in blocks]
        else:
            varied.append({"role": role, "content": blocks})
    varied = [
        {"role": m["role"], "content": m["content"][0]["text"]}
        if len(m["content"]) == 1 and data.draw(st.booleans(), label="string")
        else m
        for m in varied
    ]
    one, other = parse(*plain), parse(*varied)
    assert one.turn.items == other.turn.items
    assert one.layout.names == other.layout.names


def changed(path, value):
    body = claude_code(user(text("c")), user("a"), assistant("b"))
    at = body
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return parse_messages(body).layout.names


@pytest.mark.parametrize(
    ("path", "value", "same"),
    [
        (("tools", 3, "description"), "other", 0),
        (("tools", 11, "input_schema"), {"type": "object", "properties": {}}, 11),
        (("system", 2, "text"), "other", 0),
        (("messages", 1, "content"), "other", 16),
        (("messages", 2, "content", 0, "text"), "other", 17),
        (("system", 0, "text"), "x-anthropic-billing-header: other;", 18),
        (("tools", 3, "cache_control"), MARK, 18),
        (("tool_choice",), {"type": "none"}, 18),
    ],
)
def test_a_change_gives_new_names_from_there_on(path, value, same):
    """The system prompt is rendered before the tools: what changes in it changes their names too."""
    before = parse_messages(claude_code(user(text("c")), user("a"), assistant("b"))).layout.names
    after = changed(path, value)
    assert len(before) == len(after) == 18
    alike = [one == other for one, other in zip(before, after, strict=True)]
    if path[0] == "tools" and same == 11:
        assert alike == [*[True] * 11, *[False] * 7]
    elif path == ("system", 2, "text"):
        assert alike == [*[False] * 12, True, True, *[False] * 4]
    elif path == ("tools", 3, "description"):
        assert alike == [*[True] * 3, *[False] * 15]
    else:
        assert alike == [*[True] * same, *[False] * (18 - same)]


def test_thoughts_are_no_part_of_a_blocks_name():
    """Clients drop old ones, and a prompt shows them only where their sampled ids are known."""
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    with_it = parse(user("a"), assistant(thought, text("b")), user("c")).layout.names
    without = parse(user("a"), assistant("b"), user("c")).layout.names
    assert list(dict.fromkeys(with_it)) == list(without)


# Where the marks are


def test_each_mark_has_its_place_in_the_request():
    request = parse(
        user(text("ab", cache_control=MARK), text("c")),
        assistant(text("d"), {**USE, "cache_control": MARK}),
        user(RESULT),
        tools=[LS, {**CAT, "cache_control": HOUR}],
        system=[text("one", cache_control=HOUR), text("two")],
    )
    assert request.turn.cuts == (
        Cut(2, 8),
        Cut(2, 3),
        Cut(2, 8, 0, 2),
        Cut(2, 8, 3),
    )
    assert request.layout.breakpoints == (
        Breakpoint(1, 3600),
        Breakpoint(2, 3600),
        Breakpoint(4, 300),
        Breakpoint(7, 300),
    )
    assert request.turn.asked_ttl_s == 3600


def test_the_automatic_mark_is_on_the_last_block_that_is_no_thought():
    assert parse(user("a"), cache_control=MARK).turn.cuts == (Cut(0, 0, 0, 1),)
    assert parse().layout.breakpoints == ()
    assert parse().turn.asked_ttl_s is None


# What is refused


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi."}, "messages"),
        ({"messages": ["Hi."]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [user({"type": "audio"})]}, "messages[0].content[0].type"),
        ({"messages": [user({"text": "a"})]}, "messages[0].content[0].type"),
        ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text"),
        ({"messages": [user(USE)]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [user("a"), assistant(RESULT), user("b")]}, "messages[1].content[0].type"),
        ({"messages": [user("a"), assistant("b")]}, "messages[1]"),
        (
            {"messages": [system({"type": "thinking", "thinking": ""})]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [user("a"), assistant({**USE, "input": None}), user(RESULT)]},
            "messages[1].content[0].input",
        ),
        (
            {"messages": [user("a"), assistant({**USE, "input": "{}"}), user(RESULT)]},
            "messages[1].content[0].input",
        ),
        (
            {"messages": [user("a"), assistant({**USE, "id": ""}), user(RESULT)]},
            "messages[1].content[0].id",
        ),
        ({"system": 3}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"system": [text("", cache_control=MARK)]}, "system[0].cache_control"),
        (
            {"messages": [user(text("", cache_control=MARK))]},
            "messages[0].content[0].cache_control",
        ),
        (
            {"messages": [user(text("a", cache_control={"type": "x"}))]},
            "messages[0].content[0].cache_control.type",
        ),
        (
            {"messages": [user(text("a", cache_control={**MARK, "ttl": "2h"}))]},
            "messages[0].content[0].cache_control.ttl",
        ),
        ({"cache_control": {}}, "cache_control.type"),
        ({"tools": [{"name": "ls"}]}, "tools[0].input_schema"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [LS, CAT, LS]}, "tools[2].name"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tools": [LS], "tool_choice": {"type": "tool", "name": "cat"}}, "tool_choice.name"),
        ({"tools": [LS], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"stop_sequences": "###"}, "stop_sequences"),
        ({"stop_sequences": [3]}, "stop_sequences[0]"),
        ({"stop_sequences": ["a"] * 65}, "stop_sequences"),
        ({"temperature": 3}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": "many"}}, "thinking.budget_tokens"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"output_format": {"schema": {}}}, "output_format.type"),
        ({"metadata": {"user_id": 3}}, "metadata.user_id"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(body, param):
    assert refused(**body).param == param


@pytest.mark.parametrize("kind", ["image", "document"])
def test_what_a_model_of_texts_cannot_read_is_said_so(kind):
    part = {"type": kind, "source": {"type": "base64", "data": ""}}
    for messages in (
        [user(part)],
        [user("a"), assistant(USE), user({**RESULT, "content": [part]})],
    ):
        error = refused(*messages)
        assert isinstance(error, UnsupportedContent)
        assert kind in error.message


def test_every_call_is_answered_in_the_next_user_turn_and_once():
    unanswered = (
        "`tool_use` ids were found without `tool_result` blocks immediately after: toolu_1."
    )
    assert unanswered in refused(user("a"), assistant(USE), user("b")).message
    assert unanswered in refused(user("a"), assistant(USE), system("s")).message
    late = [user("a"), assistant(USE), user("b"), assistant("c"), user(RESULT)]
    assert unanswered in refused(*late).message
    assert "unexpected `tool_use_id`" in refused(user(RESULT)).message
    other = {**RESULT, "tool_use_id": "toolu_2"}
    assert "toolu_2" in refused(user("a"), assistant(USE), user(RESULT, other)).message
    again = refused(user("a"), assistant(USE), user(RESULT, RESULT))
    assert "a single result" in again.message


def test_a_thought_cannot_be_marked():
    for thought in (
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "redacted_thinking", "data": "d"},
    ):
        marked = {**thought, "cache_control": MARK}
        error = refused(user("a"), assistant(marked, text("b")), user("c"))
        assert error.param == "messages[1].content[0].cache_control"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream": True}, "stream"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"tools": [LS], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [LS], "tool_choice": {"type": "tool", "name": "ls"}}, "tool_choice"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
            "output_config.format",
        ),
    ],
)
def test_a_prewarm_that_asks_for_an_answer_is_refused(body, param):
    assert refused(max_tokens=0, **body).param == param


def test_a_prewarm_asks_for_no_tokens():
    turn = parse(max_tokens=0, thinking={"type": "adaptive"}, tools=[LS]).turn
    assert turn.max_output_tokens == 0


def test_a_count_needs_no_max_tokens_and_may_end_with_an_assistant():
    body = {"messages": [user("a"), assistant("b")], "tools": [LS], "system": "s"}
    turn = parse_count(body)
    assert [item.text for item in turn.items] == ["a", "b"]


def test_unknown_fields_change_nothing():
    extra = {
        "betas": ["x"],
        "service_tier": "auto",
        "inference_geo": "eu",
        "mcp_servers": [],
        "container": None,
    }
    assert parse(**extra).turn == parse().turn


def test_a_body_is_not_changed():
    body = claude_code(user(text("c")), user("a"), assistant("b"))
    before = copy.deepcopy(body)
    parse_messages(body)
    assert body == before
