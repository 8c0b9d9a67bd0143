"""Chat bodies: the same request as over Responses, and a refusal in the words that the client used."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BadRequest
from broker.wire.chat_in import ChatRequest, parse_chat
from broker.wire.items import FunctionCall, FunctionCallOutput, Message, Reasoning
from broker.wire.requests import ToolChoice, ToolKind, ToolSpec, Transport, parse_create
from tests.broker.wire.chat_bodies import LANGCHAIN, SCHEMA, VERCEL

ASKED = {"role": "user", "content": "Hi."}
FUNCTION = {"type": "function", "function": {"name": "f"}}
CUSTOM = {"type": "custom", "custom": {"name": "g"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def parse(*messages, **fields):
    return parse_chat({"messages": list(messages) or [ASKED], **fields}).turn


def fault(body):
    """What is wrong with a body; None if nothing is."""
    try:
        parse_chat(body)
    except BadRequest as error:
        return error
    return None


def refusal(body):
    with pytest.raises(BadRequest) as caught:
        parse_chat({"messages": [ASKED], **body})
    return caught.value


def test_one_question_is_a_request_with_every_default_but_that_it_is_not_stored():
    request = parse_chat({"messages": [ASKED]})
    assert request == ChatRequest(request.turn, include_usage=False)
    assert request.turn.items == (Message(None, "user", "Hi."),)
    same = parse_create({"input": [ASKED], "store": False}, transport=Transport.HTTP)
    assert request.turn == replace(same, reasoning_events=True), "chunks have a place for thoughts"


def test_null_is_absent():
    keys = (
        "model stream stream_options tools tool_choice parallel_tool_calls response_format max_tokens stop"
        " max_completion_tokens temperature top_p seed n logprobs top_logprobs store metadata user verbosity"
        " prompt_cache_key prompt_cache_retention prompt_cache_options presence_penalty frequency_penalty"
        " reasoning_effort logit_bias functions function_call modalities audio service_tier safety_identifier"
    )
    assert parse(**dict.fromkeys(keys.split())) == parse()


@pytest.mark.parametrize(
    ("message", "items"),
    [
        ({"role": "system", "content": "s"}, [Message(None, "system", "s")]),
        ({"role": "developer", "content": "d"}, [Message(None, "developer", "d")]),
        ({"role": "user", "content": "u", "name": "Ann"}, [Message(None, "user", "u")]),
        ({"role": "user", "content": ""}, [Message(None, "user", "")]),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            [Message(None, "user", "ab")],
        ),
        ({"role": "assistant", "content": "a"}, [Message(None, "assistant", "a")]),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            [Message(None, "assistant", "no")],
        ),
        (
            {"role": "assistant", "content": None, "refusal": "no"},
            [Message(None, "assistant", "no")],
        ),
        ({"role": "assistant", "content": None}, [Message(None, "assistant", "")]),
        ({"role": "assistant"}, [Message(None, "assistant", "")]),
        (CALLED, [FunctionCall(None, "call_1", "f", "{}")]),
        (CALLED | {"content": ""}, [FunctionCall(None, "call_1", "f", "{}")]),
        (CALLED | {"content": []}, [FunctionCall(None, "call_1", "f", "{}")]),
        (
            CALLED | {"content": "so", "refusal": None, "audio": None, "function_call": None},
            [Message(None, "assistant", "so"), FunctionCall(None, "call_1", "f", "{}")],
        ),
        (
            {"role": "assistant", "content": "a", "tool_calls": []},
            [Message(None, "assistant", "a")],
        ),
        (
            CALLED
            | {"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "no json"}}]},
            [FunctionCall(None, "c", "f", "no json")],
        ),
        (
            CALLED
            | {
                "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "g", "input": "é"}}]
            },
            [FunctionCall(None, "c", "g", '{"input": "é"}')],
        ),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "hm"},
            [Reasoning(None, "hm"), Message(None, "assistant", "a")],
        ),
        (
            {"role": "assistant", "content": "a", "reasoning": "hm", "reasoning_details": [1]},
            [Reasoning(None, "hm"), Message(None, "assistant", "a")],
        ),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "", "reasoning": {"x": 1}},
            [Message(None, "assistant", "a")],
        ),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            [FunctionCall(None, "call_function_0", "f", "{}")],
        ),
    ],
)
def test_what_a_message_is(message, items):
    assert parse(message).items == tuple(items)


def test_a_result_answers_the_call_it_names():
    result = {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "r"}]}
    assert parse(CALLED, result).items[1] == FunctionCallOutput(None, "call_1", "r")


def test_a_legacy_result_answers_the_latest_call_of_its_function():
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "1"}}
    result = {"role": "function", "name": "f", "content": "r"}
    calls = parse(call, result, call, result).items
    assert [item.call_id for item in calls] == ["call_function_0"] * 2 + ["call_function_2"] * 2


def test_messages_become_items_one_for_one_and_in_order():
    """Several system messages, also in the middle, stay where they are: that is what renders the same everywhere."""
    roles = ["system", "developer", "user", "assistant", "system", "user", "assistant"]
    messages = [{"role": role, "content": str(at)} for at, role in enumerate(roles)]
    request = parse(*messages)
    assert [(item.role, item.text) for item in request.items] == [
        (role, str(at)) for at, role in enumerate(roles)
    ]
    assert request.instructions is None


GRAMMAR = {"definition": "start: /a+/", "syntax": "lark"}


def test_the_whole_request_is_that_of_responses():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    shared = {
        "model": "m",
        "parallel_tool_calls": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["x", "y"],
        "store": True,
        "stream": True,
        "metadata": {"a": "b"},
        "user": "u",
        "safety_identifier": "s",
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {"ttl": "30m"},
        "presence_penalty": 0,
    }
    named = {"name": "f", "description": "d", "parameters": schema, "strict": True}
    chat = parse_chat(
        {
            **shared,
            "messages": [ASKED, CALLED, {"role": "tool", "tool_call_id": "call_1", "content": "r"}],
            "tools": [
                {"type": "function", "function": named},
                {
                    "type": "custom",
                    "custom": {"name": "g", "format": {"type": "grammar", "grammar": GRAMMAR}},
                },
                {"type": "web_search"},
            ],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "max_completion_tokens": 7,
            "verbosity": "low",
            "reasoning_effort": "high",
            "response_format": {"type": "text"},
            "stream_options": {"include_usage": True, "include_obfuscation": False},
            "ignore_eos": True,
            "min_tokens": 4,
            "top_k": 20,
            "chat_template_kwargs": {"enable_thinking": False},
            "web_search_options": {},
            "prediction": {"type": "content", "content": "x"},
            "modalities": ["text"],
            "previous_response_id": "resp_1",
            "instructions": "ignored here",
            "generate": False,
        }
    )
    create = {
        **shared,
        "input": [
            ASKED,
            {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "r"},
        ],
        "tools": [
            {"type": "function", **named},
            {"type": "custom", "name": "g", "format": {"type": "grammar", **GRAMMAR}},
            {"type": "web_search"},
        ],
        "tool_choice": {"type": "function", "name": "f"},
        "max_output_tokens": 7,
        "text": {"verbosity": "low", "format": {"type": "text"}},
        "reasoning": {"effort": "high"},
    }
    assert chat.include_usage
    assert chat.turn == parse_create(create, transport=Transport.HTTP)
    assert (chat.turn.tools[1].name, chat.turn.tools[1].kind) == ("g", ToolKind.CUSTOM)
    assert chat.turn.tools[1].grammar == GRAMMAR["definition"]


TWO = [FUNCTION, {"type": "function", "function": {"name": "h"}}, CUSTOM]


@pytest.mark.parametrize(
    ("given_choice", "chosen"),
    [
        ("auto", ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        (FUNCTION, ToolChoice("required", ("f",))),
        (CUSTOM, ToolChoice("required", ("g",))),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": TWO[1:]}},
            ToolChoice("required", ("h", "g")),
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [FUNCTION]}},
            ToolChoice("auto", ("f",)),
        ),
    ],
)
def test_every_form_of_tool_choice(given_choice, chosen):
    assert parse(tools=TWO, tool_choice=given_choice).tool_choice == chosen


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({}, None),
    ],
)
def test_the_bound_of_the_answer_has_two_names(fields, most):
    assert parse(**fields).max_output_tokens == most


def test_a_breakpoint_in_a_message_keeps_its_prompt():
    part = {
        "type": "text",
        "text": "t",
        "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "12h"},
    }
    assert parse({"role": "system", "content": [part]}, ASKED).asked_ttl_s == 12 * 3600


def wrong(*messages):
    return {"messages": list(messages)}


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"messages": None}, "missing_required_parameter", "messages"),
        ({"messages": []}, "empty_array", "messages"),
        ({"messages": "Hi."}, "invalid_type", "messages"),
        (wrong("Hi."), "invalid_type", "messages[0]"),
        (wrong({"content": "x"}), "missing_required_parameter", "messages[0].role"),
        (wrong(ASKED, {"role": "bot"}), "invalid_value", "messages[1].role"),
        (wrong({"role": "user"}), "missing_required_parameter", "messages[0].content"),
        (wrong({"role": "user", "content": 3}), "invalid_type", "messages[0].content"),
        (wrong({"role": "user", "content": [3]}), "invalid_type", "messages[0].content[0]"),
        (
            wrong(CALLED, {"role": "user", "content": [{"type": "x"}]}),
            "invalid_value",
            "messages[1].content[0].type",
        ),
        *(
            (
                wrong({"role": "user", "content": [{"type": kind, kind: {}}]}),
                "unsupported_content",
                "messages[0].content[0]",
            )
            for kind in ("image_url", "input_audio", "file")
        ),
        (
            wrong({"role": "assistant", "audio": {"id": "a"}}),
            "unsupported_parameter",
            "messages[0].audio",
        ),
        (
            wrong({"role": "assistant", "tool_calls": {}}),
            "invalid_type",
            "messages[0].tool_calls",
        ),
        (
            wrong({"role": "assistant", "tool_calls": [{}]}),
            "missing_required_parameter",
            "messages[0].tool_calls[0].id",
        ),
        (
            wrong({"role": "assistant", "tool_calls": [CALL, CALL | {"type": "mcp"}]}),
            "invalid_value",
            "messages[0].tool_calls[1].type",
        ),
        (
            wrong({"role": "assistant", "tool_calls": [{"id": "c", "type": "function"}]}),
            "missing_required_parameter",
            "messages[0].tool_calls[0].function",
        ),
        (
            wrong({"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}),
            "missing_required_parameter",
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            wrong(
                ASKED,
                {"role": "assistant", "content": "a", "tool_calls": [CALL | {"function": {}}]},
            ),
            "missing_required_parameter",
            "messages[1].tool_calls[0].function.name",
        ),
        (
            wrong({"role": "assistant", "tool_calls": [{"id": "c", **CUSTOM}]}),
            "missing_required_parameter",
            "messages[0].tool_calls[0].custom.input",
        ),
        (
            wrong(
                {"role": "assistant", "tool_calls": [{"id": "c", "type": "custom", "custom": {}}]}
            ),
            "missing_required_parameter",
            "messages[0].tool_calls[0].custom.name",
        ),
        (
            wrong({"role": "assistant", "function_call": {"name": "f"}}),
            "missing_required_parameter",
            "messages[0].function_call.arguments",
        ),
        (
            wrong({"role": "assistant", "function_call": {}}),
            "missing_required_parameter",
            "messages[0].function_call.name",
        ),
        (
            wrong(CALLED, {"role": "tool", "content": "r"}),
            "missing_required_parameter",
            "messages[1].tool_call_id",
        ),
        (
            wrong(CALLED, {"role": "tool", "content": "r", "tool_call_id": "other"}),
            "invalid_value",
            "messages[1].tool_call_id",
        ),
        (
            wrong({"role": "tool", "content": "r", "tool_call_id": "call_1"}, CALLED),
            "invalid_value",
            "messages[0].tool_call_id",
        ),
        (
            wrong(CALLED, {"role": "tool", "tool_call_id": "call_1"}),
            "missing_required_parameter",
            "messages[1].content",
        ),
        (
            wrong(CALLED, {"role": "function", "name": "f", "content": "r"}),
            "invalid_value",
            "messages[1].name",
        ),
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"n": 0}, "integer_below_min_value", "n"),
        ({"logit_bias": {"50256": -100}}, "unsupported_parameter", "logit_bias"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
        ({"function_call": "auto"}, "unsupported_parameter", "function_call"),
        ({"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"presence_penalty": 2.1}, "decimal_above_max_value", "presence_penalty"),
        ({"response_format": "json"}, "invalid_type", "response_format"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        (
            {"response_format": {"type": "json_schema"}},
            "missing_required_parameter",
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "missing_required_parameter",
            "response_format.json_schema.schema",
        ),
        ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
        ({"max_completion_tokens": "9"}, "invalid_type", "max_completion_tokens"),
        ({"temperature": 3}, "decimal_above_max_value", "temperature"),
        ({"stop": ["a", 1]}, "invalid_type", "stop[1]"),
        ({"store": 1}, "invalid_type", "store"),
        ({"stream_options": 1}, "invalid_type", "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "invalid_type", "stream_options.include_usage"),
        ({"reasoning_effort": 1}, "invalid_type", "reasoning_effort"),
        ({"verbosity": 1}, "invalid_type", "verbosity"),
        ({"metadata": {"a": 1}}, "invalid_type", "metadata.a"),
        ({"prompt_cache_options": {"ttl": "x"}}, "invalid_value", "prompt_cache_options.ttl"),
        ({"tools": {}}, "invalid_type", "tools"),
        ({"tools": [1]}, "invalid_type", "tools[0]"),
        ({"tools": [{}]}, "missing_required_parameter", "tools[0].type"),
        ({"tools": [{"type": "mcp"}]}, "invalid_value", "tools[0].type"),
        (
            {"tools": [{"type": "function", "name": "f"}]},
            "missing_required_parameter",
            "tools[0].function",
        ),
        ({"tools": [{"type": "function", "function": []}]}, "invalid_type", "tools[0].function"),
        (
            {"tools": [FUNCTION, {"type": "custom", "custom": {}}]},
            "missing_required_parameter",
            "tools[1].custom.name",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": "{}"}}]},
            "invalid_type",
            "tools[0].function.parameters",
        ),
        ({"tool_choice": 1}, "invalid_type", "tool_choice"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tool_choice": {"type": "mcp"}}, "invalid_value", "tool_choice.type"),
        (
            {"tools": [CUSTOM], "tool_choice": FUNCTION},
            "invalid_value",
            "tool_choice.function.name",
        ),
        (
            {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "f"}},
            "missing_required_parameter",
            "tool_choice.function",
        ),
        (
            {"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools", "mode": "auto"}},
            "missing_required_parameter",
            "tool_choice.allowed_tools",
        ),
        (
            {
                "tools": [FUNCTION],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "none"}},
            },
            "invalid_value",
            "tool_choice.allowed_tools.mode",
        ),
        (
            {
                "tools": [FUNCTION],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [CUSTOM]}},
            },
            "invalid_value",
            "tool_choice.allowed_tools.tools[0].custom.name",
        ),
    ],
)
def test_a_wrong_field_is_named_as_the_client_wrote_it(body, code, param):
    error = refusal(body)
    assert (error.status, error.code, error.param) == (400, code, param)
    assert "input[" not in error.message
    assert "max_output_tokens" not in error.message


def test_the_sentence_of_a_refusal_names_the_same_field():
    error = refusal(wrong(ASKED, {"role": "user", "content": 7}))
    assert error.message == (
        "Invalid type for 'messages[1].content': expected one of a string or array of objects, "
        "but got an integer instead."
    )
    error = refusal(wrong({"role": "tool", "tool_call_id": "c", "content": "r"}))
    assert "'messages[0].tool_call_id'" in error.message
    assert "'c'" in error.message


EVERYTHING = {
    "messages": [
        *(ASKED for _ in range(10)),
        {
            "role": "assistant",
            "content": "c",
            "reasoning": "r",
            "tool_calls": [CALL, {"id": "c", **CUSTOM}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "r"},
    ],
    "tools": [
        FUNCTION,
        {"type": "web_search"},
        {"type": "custom", "custom": {"format": {"type": "grammar", "grammar": GRAMMAR}}},
    ],
    "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [FUNCTION, CUSTOM]}},
    "max_tokens": 5,
    "verbosity": "low",
    "reasoning_effort": "high",
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
}


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("input", "messages"),
        ("input[1].content", "messages[1].content"),
        ("input[10]", "messages[10]"),
        ("input[11].content[0]", "messages[10].content[0]"),
        ("input[12].name", "messages[10].tool_calls[0].function.name"),
        ("input[13].input", "messages[10].tool_calls[1].custom.input"),
        ("input[14].output[0].text", "messages[11].content[0].text"),
        ("tools[0].strict", "tools[0].function.strict"),
        ("tools[1].user_location", "tools[1].user_location"),
        ("tools[2].format.syntax", "tools[2].custom.format.grammar.syntax"),
        ("tool_choice.mode", "tool_choice.allowed_tools.mode"),
        ("tool_choice.tools", "tool_choice.allowed_tools.tools"),
        ("tool_choice.tools[1].name", "tool_choice.allowed_tools.tools[1].custom.name"),
        ("max_output_tokens", "max_tokens"),
        ("text.verbosity", "verbosity"),
        ("text.format", "response_format"),
        ("text.format.schema.properties", "response_format.json_schema.schema.properties"),
        ("reasoning.effort", "reasoning_effort"),
        ("metadata.a", "metadata.a"),
    ],
)
def test_whatever_the_create_body_is_refused_for_is_named_as_the_client_wrote_it(
    monkeypatch, path, named
):
    """Also what nothing refuses yet."""

    def refuse(body, *, transport):
        raise BadRequest(f"Not '{path}'.", code="c", param=path)

    monkeypatch.setattr("broker.wire.chat_in.parse_create", refuse)
    error = fault(EVERYTHING)
    assert (error.message, error.code, error.param) == (f"Not '{named}'.", "c", named)


def test_a_refusal_of_no_field_stays_one(monkeypatch):
    def refuse(body, *, transport):
        raise BadRequest("No.")

    monkeypatch.setattr("broker.wire.chat_in.parse_create", refuse)
    assert fault(EVERYTHING).param is None


def test_a_langchain_agents_second_request():
    request = parse_chat(LANGCHAIN)
    kinds = [type(item) for item in request.turn.items]
    assert kinds == [Message, Message, FunctionCall, FunctionCallOutput]
    assert request.turn.items[2].arguments == '{"path": "é"}'
    assert request.turn.tools == (ToolSpec("ls", "List.", SCHEMA, strict=True),)
    assert request.turn.tool_choice == ToolChoice("required", ("ls",))
    assert request.include_usage


def test_a_langchain_message_of_content_blocks():
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "annotations": []}]
    request = parse({"content": blocks, "role": "assistant", "name": "agent"})
    assert request.items == (Message(None, "assistant", "ab"),)


def test_a_vercel_ai_sdk_request():
    request = parse_chat(VERCEL)
    kinds = [type(item) for item in request.turn.items]
    assert kinds == [Message, Message, Reasoning, FunctionCall, FunctionCallOutput]
    assert request.turn.max_output_tokens == 50
    assert request.turn.stop == ("END",)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "role",
                    "content",
                    "name",
                    "tools",
                    "id",
                    "text",
                    "tool_calls",
                    "tool_call_id",
                    "function",
                    "custom",
                    "mode",
                    "allowed_tools",
                    "json_schema",
                    "schema",
                    "format",
                    "grammar",
                    "arguments",
                    "function_call",
                ]
            ),
            inner
            | st.sampled_from(
                [
                    "function",
                    "custom",
                    "text",
                    "user",
                    "assistant",
                    "tool",
                    "system",
                    "allowed_tools",
                    "json_schema",
                    "c",
                ]
            ),
            max_size=5,
        )
    ),
    max_leaves=10,
)
FIELDS = [
    "messages",
    "tools",
    "tool_choice",
    "response_format",
    "stream_options",
    "stop",
    "n",
    "logprobs",
    "top_logprobs",
    "metadata",
    "functions",
    "function_call",
    "logit_bias",
    "modalities",
    "max_tokens",
    "verbosity",
    "reasoning_effort",
    "store",
]


@given(
    st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4),
    st.none() | st.lists(anything, min_size=1, max_size=3),
)
def test_any_json_is_a_request_or_a_client_error_about_a_field_of_the_body(body, messages):
    error = fault(body if messages is None else {"messages": messages, **body})
    assert error is None or re.match(r"\w+", error.param)[0] in FIELDS
