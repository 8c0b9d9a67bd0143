"""Create bodies: all that real clients send is taken, all that would be answered wrongly is named."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BadRequest, ClientError
from broker.wire.context import CacheQuery, CompactionRule
from broker.wire.items import FunctionCallOutput, Message
from broker.wire.requests import (
    ToolChoice,
    ToolKind,
    ToolSpec,
    Transport,
    TurnRequest,
    parse_create,
)

FUNCTION = {"type": "function", "name": "f"}


def parse(body, transport=Transport.HTTP):
    return parse_create(body, transport=transport)


def test_an_empty_body_is_a_request_with_every_default():
    request = parse({})
    assert request.items == ()
    assert request.store
    assert request.generate
    assert request.parallel_tool_calls
    assert not request.stream
    assert (request.temperature, request.top_p) == (1.0, 1.0)
    assert request.tool_choice == ToolChoice("auto", None)
    assert request.echo == {
        "tools": [],
        "text": {"format": {"type": "text"}},
        "max_tool_calls": None,
        "safety_identifier": None,
    }
    bare = {
        name: getattr(request, name) for name in TurnRequest.__dataclass_fields__ if name != "echo"
    }
    assert bare == {name: getattr(TurnRequest(items=()), name) for name in bare}


def test_null_is_absent():
    nothing = dict.fromkeys(
        [
            *TurnRequest.__dataclass_fields__,
            "input",
            "text",
            "reasoning",
            "background",
            "user",
            "truncation",
            "service_tier",
            "top_logprobs",
            "conversation",
            "prompt_cache_options",
        ]
    )
    assert parse(nothing, Transport.WEBSOCKET) == parse({}, Transport.WEBSOCKET)


def test_the_second_frame_of_a_coding_agent():
    request = parse(
        {
            "type": "response.create",
            "model": "local-model",
            "stream": True,
            "previous_response_id": "resp_1",
            "input": [
                {"type": "function_call_output", "call_id": "c", "output": "r", "id": "fco_1"}
            ],
            "tools": [
                FUNCTION | {"strict": False, "description": "d", "parameters": {"type": "object"}},
                {
                    "type": "namespace",
                    "name": "box",
                    "description": "d",
                    "tools": [
                        FUNCTION,
                        {"type": "custom", "name": "g", "format": {"type": "text"}},
                    ],
                },
                {"type": "web_search", "external_web_access": False},
                {
                    "type": "custom",
                    "name": "apply_patch",
                    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"},
                },
            ],
            "tool_choice": "auto",
            "parallel_tool_calls": False,
            "reasoning": {"summary": "auto"},
            "store": False,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "thread",
            "text": {"verbosity": "low"},
            "client_metadata": {"x": ["anything"]},
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        },
        Transport.WEBSOCKET,
    )
    assert request.items == (FunctionCallOutput("fco_1", "c", "r"),)
    assert (request.model, request.previous_response_id) == ("local-model", "resp_1")
    assert (request.store, request.stream, request.parallel_tool_calls) == (False, True, False)
    assert request.prompt_cache_key == "thread"
    assert [tool.spoken_name for tool in request.tools] == ["f", "box.f", "box.g", "apply_patch"]
    first, _, inner, patch = request.tools
    assert first == ToolSpec("f", "d", {"type": "object"}, strict=False)
    assert (inner.kind, inner.namespace, inner.name) == (ToolKind.CUSTOM, "box", "g")
    assert patch.kind is ToolKind.CUSTOM
    assert patch.parameters == {
        "type": "object",
        "properties": {"input": {"type": "string"}},
        "required": ["input"],
    }
    assert request.echo["reasoning"] == {"effort": None, "summary": "auto"}
    assert request.echo["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert request.echo["tool_choice"] == "auto"
    assert [tool["type"] for tool in request.echo["tools"]] == [
        "function",
        "namespace",
        "web_search",
        "custom",
    ]


def test_an_echoed_function_tool_has_every_field_the_schema_requires():
    [echoed] = parse({"tools": [FUNCTION]}).echo["tools"]
    assert echoed == {**FUNCTION, "description": None, "parameters": None, "strict": None}


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"input": 3}, "invalid_type", "input"),
        ({"model": 3}, "invalid_type", "model"),
        ({"model": ""}, "empty_string", "model"),
        ({"instructions": ["x"]}, "invalid_type", "instructions"),
        ({"temperature": "hot"}, "invalid_type", "temperature"),
        ({"temperature": True}, "invalid_type", "temperature"),
        ({"temperature": -0.1}, "decimal_below_min_value", "temperature"),
        ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
        ({"top_p": 0}, "decimal_below_min_value", "top_p"),
        ({"top_p": 1.01}, "decimal_above_max_value", "top_p"),
        ({"max_output_tokens": 0}, "integer_below_min_value", "max_output_tokens"),
        ({"max_output_tokens": 2**31}, "integer_above_max_value", "max_output_tokens"),
        ({"max_output_tokens": 1.0}, "invalid_type", "max_output_tokens"),
        ({"max_output_tokens": True}, "invalid_type", "max_output_tokens"),
        ({"seed": 2**63}, "integer_above_max_value", "seed"),
        ({"store": "yes"}, "invalid_type", "store"),
        ({"stream": 1}, "invalid_type", "stream"),
        ({"generate": 0}, "invalid_type", "generate"),
        ({"parallel_tool_calls": []}, "invalid_type", "parallel_tool_calls"),
        ({"previous_response_id": 5}, "invalid_type", "previous_response_id"),
        ({"previous_response_id": ""}, "empty_string", "previous_response_id"),
        ({"prompt_cache_key": {}}, "invalid_type", "prompt_cache_key"),
        ({"prompt_cache_options": {"prewarm": 1}}, "invalid_type", "prompt_cache_options.prewarm"),
        ({"prompt_cache_options": 1}, "invalid_type", "prompt_cache_options"),
        ({"background": 1}, "invalid_type", "background"),
        ({"background": True, "store": False}, "invalid_value", "background"),
        ({"background": True, "generate": False}, "invalid_value", "background"),
        ({"conversation": ""}, "empty_string", "conversation"),
        ({"conversation": 1}, "invalid_type", "conversation"),
        ({"conversation": {}}, "missing_required_parameter", "conversation.id"),
        (
            {"conversation": "conv_1", "previous_response_id": "resp_1"},
            "mutually_exclusive_parameters",
            "previous_response_id",
        ),
        ({"prompt": {"id": "pmpt_1"}}, "unsupported_parameter", "prompt"),
        ({"context_management": {}}, "invalid_type", "context_management"),
        ({"context_management": [1]}, "invalid_type", "context_management[0]"),
        ({"context_management": [{}]}, "missing_required_parameter", "context_management[0].type"),
        (
            {"context_management": [{"type": "forget"}]},
            "invalid_value",
            "context_management[0].type",
        ),
        (
            {"context_management": [{"type": "compaction", "compact_threshold": 0}]},
            "integer_below_min_value",
            "context_management[0].compact_threshold",
        ),
        ({"prompt": {"id": "p"}}, "unsupported_parameter", "prompt"),
        ({"top_logprobs": -1}, "integer_below_min_value", "top_logprobs"),
        ({"top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
        ({"presence_penalty": -2.5}, "decimal_below_min_value", "presence_penalty"),
        ({"frequency_penalty": 3}, "decimal_above_max_value", "frequency_penalty"),
        ({"text": "x"}, "invalid_type", "text"),
        ({"text": {"format": {"type": "xml"}}}, "invalid_value", "text.format.type"),
        (
            {"text": {"format": {"type": "json_schema"}}},
            "missing_required_parameter",
            "text.format.name",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}},
            "invalid_value",
            "text.format.name",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "n" * 65, "schema": {}}}},
            "string_above_max_length",
            "text.format.name",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "n"}}},
            "missing_required_parameter",
            "text.format.schema",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": "{}"}}},
            "invalid_type",
            "text.format.schema",
        ),
        (
            {
                "text": {
                    "format": {"type": "json_schema", "name": "n", "schema": {"a": "b" * 2**20}}
                }
            },
            "invalid_json_schema",
            "text.format.schema",
        ),
        (
            {"tools": [{"type": "function", "name": "f", "parameters": {"a": "b" * 2**20}}]},
            "invalid_json_schema",
            "tools[0].parameters",
        ),
        (
            {"tools": [{"type": "custom", "name": "p", "format": {"type": "grammar"}}]},
            "missing_required_parameter",
            "tools[0].format.definition",
        ),
        (
            {"tools": [{"type": "custom", "name": "p", "format": {"type": "ebnf"}}]},
            "invalid_value",
            "tools[0].format.type",
        ),
        (
            {
                "tools": [
                    {
                        "type": "custom",
                        "name": "p",
                        "format": {"type": "grammar", "definition": "x", "syntax": "gbnf"},
                    }
                ]
            },
            "invalid_value",
            "tools[0].format.syntax",
        ),
        (
            {
                "tools": [FUNCTION, {"type": "web_search"}],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "required",
                    "tools": [{"type": "web_search"}],
                },
            },
            "invalid_value",
            "tool_choice",
        ),
        ({"include": "all"}, "invalid_type", "include"),
        ({"reasoning": {"effort": 3}}, "invalid_type", "reasoning.effort"),
        ({"truncation": "always"}, "invalid_value", "truncation"),
        ({"service_tier": 1}, "invalid_type", "service_tier"),
        ({"reasoning": "high"}, "invalid_type", "reasoning"),
        ({"max_tool_calls": 0}, "integer_below_min_value", "max_tool_calls"),
        ({"safety_identifier": "s" * 129}, "string_above_max_length", "safety_identifier"),
        ({"metadata": []}, "invalid_type", "metadata"),
        ({"metadata": {"a": 1}}, "invalid_type", "metadata.a"),
        ({"metadata": {"a": None}}, "invalid_type", "metadata.a"),
        ({"metadata": {"a": "v" * 513}}, "string_above_max_length", "metadata.a"),
        ({"metadata": {"k" * 65: "v"}}, "string_above_max_length", "metadata"),
        (
            {"metadata": {str(n): "v" for n in range(17)}},
            "object_above_max_properties",
            "metadata",
        ),
        ({"stop": 3}, "invalid_type", "stop"),
        ({"stop": ["a", 3]}, "invalid_type", "stop[1]"),
        ({"stop": ["a"] * 17}, "array_above_max_length", "stop"),
        ({"tools": {}}, "invalid_type", "tools"),
        ({"tools": ["f"]}, "invalid_type", "tools[0]"),
        ({"tools": [FUNCTION, {"name": "f"}]}, "missing_required_parameter", "tools[1].type"),
        ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].name"),
        ({"tools": [{"type": "mcp"}]}, "invalid_value", "tools[0].type"),
        ({"tools": [FUNCTION | {"name": "n" * 129}]}, "string_above_max_length", "tools[0].name"),
        ({"tools": [FUNCTION | {"parameters": "{}"}]}, "invalid_type", "tools[0].parameters"),
        ({"tools": [FUNCTION | {"strict": 1}]}, "invalid_type", "tools[0].strict"),
        ({"tools": [FUNCTION | {"description": 1}]}, "invalid_type", "tools[0].description"),
        ({"tools": [{"type": "namespace"}]}, "missing_required_parameter", "tools[0].name"),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [1]}]},
            "invalid_type",
            "tools[0].tools[0]",
        ),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "namespace"}]}]},
            "invalid_value",
            "tools[0].tools[0].type",
        ),
        ({"tool_choice": 1}, "invalid_type", "tool_choice"),
        ({"tool_choice": "maybe"}, "invalid_value", "tool_choice"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tool_choice": {}}, "missing_required_parameter", "tool_choice.type"),
        ({"tool_choice": {"type": "mcp"}}, "invalid_value", "tool_choice.type"),
        (
            {"tool_choice": {"type": "function", "name": "g"}, "tools": [FUNCTION]},
            "invalid_value",
            "tool_choice.name",
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "none"}, "tools": [FUNCTION]},
            "invalid_value",
            "tool_choice.mode",
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "tools": [1]}, "tools": [FUNCTION]},
            "invalid_type",
            "tool_choice.tools[0]",
        ),
    ],
)
def test_a_wrong_field_is_named(body, code, param):
    with pytest.raises(BadRequest) as caught:
        parse(body)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


@pytest.mark.parametrize(
    "body",
    [
        {"background": False, "top_logprobs": 0, "presence_penalty": 0, "frequency_penalty": 0.0},
        {"text": {"format": {"type": "text"}}, "truncation": "auto", "service_tier": "flex"},
        {"temperature": 0, "top_p": 0.001, "max_output_tokens": 1, "seed": -1},
        {"temperature": 2, "top_p": 1, "metadata": {"k" * 64: "v" * 512}, "max_tool_calls": 3},
        {"safety_identifier": "s" * 128, "user": "u", "prompt_cache_retention": "24h"},
        {"include": [], "anything": {"else": [1]}, "client_metadata": 3, "stream_id": 3},
        {"tools": [{"type": "web_search_preview"}, {"type": "web_search_2025_08_26"}]},
        {"metadata": {str(n): "v" for n in range(16)}},
    ],
)
def test_the_edge_of_what_is_allowed_is_allowed(body):
    parse(body)


def test_background_means_nothing_in_a_frame():
    assert not parse({"background": True}, Transport.WEBSOCKET).background
    assert parse({"background": True}, Transport.HTTP).background


@pytest.mark.parametrize("named", ["conv_1", {"id": "conv_1"}])
def test_a_conversation_is_named_by_a_string_or_an_object(named):
    assert parse({"conversation": named}).conversation == "conv_1"


def test_the_lowest_threshold_compacts():
    def entry(threshold):
        return {"type": "compaction", "compact_threshold": threshold}

    assert parse({}).compaction is None
    assert parse({"context_management": []}).compaction is None
    assert parse({"context_management": [entry(None)]}).compaction == CompactionRule(None)
    both = parse({"context_management": [entry(9), entry(None), entry(5)]})
    assert both.compaction == CompactionRule(5)


def test_prompt_cache_options_are_repeated_whole_and_ask_for_a_diagnosis():
    assert parse({}).cache_query is None
    request = parse({"prompt_cache_options": {"comparison_response_id": "resp_1"}})
    assert request.cache_query == CacheQuery("resp_1")
    assert request.echo["prompt_cache_options"] == {
        "mode": "implicit",
        "ttl": "30m",
        "comparison_response_id": "resp_1",
    }


def test_the_sentences_are_those_of_openai():
    with pytest.raises(BadRequest) as caught:
        parse({"temperature": 3})
    assert caught.value.message == (
        "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 3 instead."
    )
    with pytest.raises(BadRequest) as caught:
        parse({"input": [{"role": "user", "content": 7}]})
    assert caught.value.message == (
        "Invalid type for 'input[0].content': expected one of a string or array of objects, "
        "but got an integer instead."
    )
    with pytest.raises(BadRequest) as caught:
        parse({"truncation": "x" * 500})
    assert len(caught.value.message) < 200
    assert caught.value.message.endswith("…. Supported values are: 'auto', 'disabled'.")


@pytest.mark.parametrize("stream_id", ["a", "main", "lane-1", "A.b_c-9", "x" * 256])
def test_a_lane_has_a_name_on_a_websocket_only(stream_id):
    assert parse({"stream_id": stream_id}, Transport.WEBSOCKET).stream_id == stream_id
    assert parse({"stream_id": stream_id}, Transport.HTTP).stream_id is None


@pytest.mark.parametrize("stream_id", ["", "a b", "x" * 257, "é", "a\n", 3, [], True])
def test_a_bad_lane_name_is_refused_in_openais_words(stream_id):
    with pytest.raises(ClientError) as caught:
        parse({"stream_id": stream_id}, Transport.WEBSOCKET)
    assert caught.value.message == (
        "The 'stream_id' field must be a non-empty string with at most 256 characters and may only "
        "contain letters, numbers, underscores, hyphens, and periods."
    )
    assert (caught.value.code, caught.value.param) == ("invalid_stream_id", "stream_id")


@pytest.mark.parametrize(
    ("body", "generates"),
    [
        ({}, True),
        ({"generate": True}, True),
        ({"generate": False}, False),
        ({"prompt_cache_options": {"prewarm": True}}, False),
        ({"generate": True, "prompt_cache_options": {"prewarm": True}}, False),
        ({"prompt_cache_options": {"prewarm": False, "mode": "implicit"}}, True),
    ],
)
def test_a_warm_up_has_two_spellings(body, generates):
    assert parse(body).generate is generates


@pytest.mark.parametrize(
    ("given_stop", "stop"), [("a", ("a",)), (["a", "", "b"], ("a", "b")), ([], ()), ("", ())]
)
def test_stop_strings(given_stop, stop):
    assert parse({"stop": given_stop}).stop == stop


BOX = {"type": "namespace", "name": "box", "tools": [FUNCTION]}
TOOLS = [FUNCTION, {"type": "custom", "name": "g"}, BOX, {"type": "web_search"}]


@pytest.mark.parametrize(
    ("given_choice", "chosen"),
    [
        ("auto", ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "custom", "name": "g"}, ToolChoice("required", ("g",))),
        ({"type": "function", "name": "f"}, ToolChoice("required", ("f", "box.f"))),
        (
            {"type": "function", "name": "f", "namespace": "box"},
            ToolChoice("required", ("box.f",)),
        ),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "custom", "name": "g"}, {"type": "web_search"}],
            },
            ToolChoice("required", ("g",)),
        ),
        ({"type": "allowed_tools", "tools": []}, ToolChoice("auto", ())),
    ],
)
def test_every_form_of_tool_choice(given_choice, chosen):
    request = parse({"tools": TOOLS, "tool_choice": given_choice})
    assert request.tool_choice == chosen
    assert request.echo["tool_choice"] == given_choice


def test_auto_and_none_need_no_tools():
    assert parse({"tool_choice": "auto"}).tool_choice.mode == "auto"
    assert parse({"tool_choice": "none"}).tool_choice.mode == "none"


def test_a_tool_is_found_by_what_the_model_calls_it():
    request = parse({"tools": [{"type": "custom", "name": "g"}, BOX]})
    g, f = request.tools
    assert request.tool("g") is g
    assert request.tool("box.f") is f
    assert request.tool("f") is f, "a bare name is enough where it is the only one"
    assert request.tool("box.g") is None
    both = parse({"tools": [BOX, BOX | {"name": "bag"}]})
    assert both.tool("f") is None
    assert both.tool("bag.f") is both.tools[1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("user", "x"),
        ("prompt_cache_retention", "24h"),
        ("prompt_cache_options", {"ttl": "12h", "mode": "implicit"}),
    ],
)
def test_some_words_are_repeated_only_if_said(key, value):
    assert key not in parse({}).echo
    assert parse({key: value}).echo[key] == value


def test_input_is_a_user_message_when_it_is_a_string():
    assert parse({"input": "hi"}).items == (Message(None, "user", "hi"),)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "role", "content", "name", "tools", "id", "text", "call_id", "mode"]
            )
            | st.text(max_size=2),
            inner
            | st.sampled_from(
                [
                    "function",
                    "namespace",
                    "custom",
                    "message",
                    "reasoning",
                    "input_text",
                    "user",
                    "allowed_tools",
                    "function_call",
                    "function_call_output",
                ]
            ),
            max_size=4,
        )
    ),
    max_leaves=8,
)
FIELDS = [*TurnRequest.__dataclass_fields__, "input", "text", "reasoning", "truncation"]


@given(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4))
def test_any_json_is_a_request_or_a_client_error(body):
    for transport in Transport:
        with contextlib.suppress(BadRequest):
            assert isinstance(parse(body, transport), TurnRequest)
