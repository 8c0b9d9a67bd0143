"""What must be said, in every form of `tool_choice` and `text.format`: a real matcher takes what is right, and nothing else."""

import json

import pytest
import trio

from broker.errors import BadRequest
from broker.forms import Markup, form_of
from broker.wire.requests import Transport, parse_create
from engine.grammar import Matcher
from engine.text import Markers, ToolSyntax
from tests.broker.rig import open_rig
from tests.broker.test_turn import Desk, said
from tests.fakes import FakeService, byte_grammars, saying

STRICT = {
    "type": "object",
    "properties": {"path": {"type": "string"}},
    "required": ["path"],
    "additionalProperties": False,
}
LS = {"type": "function", "name": "ls", "parameters": STRICT}
RM = {"type": "function", "name": "rm", "parameters": STRICT}
BOX = {"type": "namespace", "name": "box", "tools": [{"type": "function", "name": "ls"}]}
NOTE = {"type": "custom", "name": "note"}
PATCH = {
    "type": "custom",
    "name": "patch",
    "format": {
        "type": "grammar",
        "syntax": "lark",
        "definition": 'start: "begin" LF line+ "end" LF?\nline: "+" /.*/ LF\n%import common.LF',
    },
}
DIGITS = {
    "type": "custom",
    "name": "digits",
    "format": {"type": "grammar", "syntax": "regex", "definition": "[0-9]{3}"},
}
PERSON = {"type": "json_schema", "name": "p", "strict": True, "schema": STRICT}
HERMES = Markup(ToolSyntax.HERMES, None, {})
GRAMMARS = byte_grammars()


def hermes(name: str, **arguments) -> str:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def raw(name: str, text: str) -> str:
    return f'<tool_call>{{"name": "{name}"}}\n{text}\n</tool_call>'


def takes(answer: str, markup: Markup = HERMES, *, thinking: bool = False, **body) -> bool:
    """Whether an answer may be this, and end there."""
    request = parse_create({"input": "x", **body}, transport=Transport.HTTP)
    form = form_of(request, markup, thinking=thinking)
    if form is None:
        return True
    matcher = Matcher(GRAMMARS.compile(form))
    return all(map(matcher.accept, answer.encode())) and (matcher.complete or matcher.accept(257))


CALL, OTHER = hermes("ls", path="/"), hermes("rm", path="/")
JSON_TEXT = '{"path": "/"}'
REQUIRED = {"tools": [LS, RM], "tool_choice": "required"}
NAMED = {"tools": [LS, RM], "tool_choice": {"type": "function", "name": "ls"}}
ALLOWED = {
    "tools": [LS, RM],
    "tool_choice": {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "ls"}],
    },
}
ALLOWED_AUTO = {"tools": [LS, RM], "tool_choice": ALLOWED["tool_choice"] | {"mode": "auto"}}
AUTO_STRICT = {"tools": [LS | {"strict": True}, RM]}
AUTO_ONE = {"tools": [LS, RM], "parallel_tool_calls": False}
AUTO_JSON = {"tools": [LS], "text": {"format": PERSON}}
AS_JSON = {"text": {"format": PERSON}}
ANY_JSON = {"text": {"format": {"type": "json_object"}}}
CUSTOM = {"tools": [NOTE], "tool_choice": {"type": "custom", "name": "note"}}
GRAMMAR = {"tools": [PATCH], "tool_choice": {"type": "custom", "name": "patch"}}
MIXED = {"tools": [LS, PATCH, DIGITS], "tool_choice": "required"}


@pytest.mark.parametrize(
    ("body", "right", "wrong"),
    [
        ({}, ["Anything."], []),
        ({"tools": [LS, RM]}, ["Anything.", CALL, OTHER, "<tool_call>broken"], []),
        ({"tools": [LS], "tool_choice": "none"}, ["Anything.", "<tool_call>"], []),
        (
            REQUIRED,
            [CALL, OTHER, f"{CALL}\n{OTHER}"],
            ["", "No.", f"x{CALL}", f"{CALL}x", hermes("up", path="/"), hermes("ls"), f"{CALL}\n"],
        ),
        (REQUIRED, [], [hermes("ls", path=1), hermes("ls", path="/", more=1)]),
        (REQUIRED | {"parallel_tool_calls": False}, [CALL, OTHER], [f"{CALL}\n{OTHER}"]),
        (NAMED, [CALL], [OTHER, f"{CALL}\n{CALL}"]),
        (ALLOWED, [CALL], [OTHER, "No."]),
        (
            ALLOWED_AUTO,
            ["No.", CALL, f"See: {CALL} and {CALL}.", "a <tool_cal"],
            [OTHER, f"See: {OTHER}", "<tool_call>x"],
        ),
        # not strict, and not forced: any arguments
        (ALLOWED_AUTO, [hermes("ls", other=3)], []),
        (AUTO_STRICT, ["No.", CALL, hermes("rm", x=1)], [hermes("ls", x=1), hermes("up")]),
        (AUTO_ONE, ["No.", CALL, f"So: {OTHER}"], [f"{CALL}{CALL}", f"{CALL} done"]),
        (AUTO_JSON, [CALL, JSON_TEXT], ["No.", OTHER, '{"x": 1}', f"{JSON_TEXT}{CALL}"]),
        (AS_JSON, [JSON_TEXT, '{\n  "path": "é\\u0007"\n}'], ["", "No.", "{}", f"{JSON_TEXT}x"]),
        (AS_JSON | {"tools": [LS], "tool_choice": "none"}, [JSON_TEXT], [CALL]),
        (ANY_JSON, ["{}", '{"a": [1, {}]}'], ["[]", "1", "No."]),
        (CUSTOM, [hermes("note", input="any\n")], [hermes("note"), hermes("note", input=1)]),
        (
            GRAMMAR,
            [raw("patch", "begin\n+a</tool_call>\n+\nend"), raw("patch", "begin\n+a\nend\n")],
            [
                raw("patch", "begin\nend"),
                raw("patch", "x"),
                hermes("patch", input="begin\n+a\nend"),
            ],
        ),
        (
            MIXED,
            [CALL, f"{CALL}\n{CALL}", raw("digits", "123"), raw("patch", "begin\n+\nend")],
            [raw("digits", "12"), raw("ls", "123"), "123"],
        ),
        (
            {"tools": [BOX, LS], "tool_choice": "required"},
            [hermes("box.ls"), hermes("box.ls", any=1), CALL],
            [hermes("box", path="/")],
        ),
    ],
)
def test_each_choice_takes_what_it_should_and_nothing_else(body, right, wrong):
    for text in right:
        assert takes(text, **body), text
    for text in wrong:
        assert not takes(text, **body), text


def test_llamas_form():
    llama = Markup(ToolSyntax.LLAMA3, None, {})
    call = '{"name": "ls", "parameters": {"path": "/"}}'
    assert takes(call, llama, **REQUIRED)
    assert not takes(f"{call}; {call}", llama, **REQUIRED)
    assert not takes(CALL, llama, **REQUIRED)
    for text in (call, "No.", "", "A {brace}"):
        assert takes(text, llama, **ALLOWED_AUTO)
    for text in (f"<|python_tag|>{call}", JSON_TEXT):
        assert takes(text, llama, **AUTO_JSON)
    for text in (call, '{"a": 1}', "<|python_tag|>{}"):
        assert not takes(text, llama, **AUTO_JSON)
    for text in ('{"name": "rm", "parameters": {}}', '{"a": 1}', " {"):
        assert not takes(text, llama, **ALLOWED_AUTO)


def test_mistrals_forms():
    older, newer = (Markup(s, None, {}) for s in (ToolSyntax.MISTRAL, ToolSyntax.MISTRAL_ARGS))
    entry = '{"name": "ls", "arguments": {"path": "/"}}'
    other = entry.replace("ls", "rm")
    listed, named = f"[TOOL_CALLS] [{entry}, {other}]", '[TOOL_CALLS]ls[ARGS]{"path": "/"}'
    assert takes(listed, older, **REQUIRED)
    assert not takes(listed, older, **(REQUIRED | {"parallel_tool_calls": False}))
    assert not takes(f"[TOOL_CALLS] [{other}]", older, **NAMED)
    assert takes(f"So: [TOOL_CALLS] [{entry}]", older, **ALLOWED_AUTO)
    assert not takes(f"So: [TOOL_CALLS] [{other}]", older, **ALLOWED_AUTO)
    assert takes(named + named, newer, **REQUIRED)
    assert takes(f"So: {named}", newer, **ALLOWED_AUTO)
    assert not takes(named.replace("ls", "rm"), newer, **NAMED)


def test_markup_that_is_a_control_token_is_said_as_one():
    request = parse_create(REQUIRED, transport=Transport.HTTP)
    markup = Markup(ToolSyntax.HERMES, None, {"<tool_call>": 256, "</tool_call>": 256})
    matcher = Matcher(GRAMMARS.compile(form_of(request, markup, thinking=False)))
    ids = [256, *b'\n{"name": "ls", "arguments": {"path": "/"}}\n', 256]
    assert all(map(matcher.accept, ids))
    assert not Matcher(GRAMMARS.compile(form_of(request, markup, thinking=False))).accept(ord("<"))


def test_thoughts_come_first_and_are_free():
    thinker = Markup(ToolSyntax.HERMES, Markers("<think>", "</think>"), {})
    for text in (CALL, f"<think>hm, {OTHER}</think>\n\n{CALL}", f"<think></think>{CALL}"):
        assert takes(text, thinker, **NAMED)
    for text in (f"hm </think>{CALL}", f"<think>hm{CALL}", f"<think>hm</think>{OTHER}"):
        assert not takes(text, thinker, **NAMED)
    assert takes(f"hm </think>\n{CALL}", thinker, thinking=True, **NAMED)
    assert not takes(CALL, thinker, thinking=True, **NAMED)


# --- through a turn


@pytest.fixture
async def at_desk():
    async with trio.open_nursery() as nursery:
        yield Desk(FakeService(nursery), background=nursery)
        nursery.cancel_scope.cancel()


async def test_a_forced_call_comes_out_as_an_item(at_desk: Desk) -> None:
    at_desk.engine.reply = saying(CALL + " and more, had the grammar let it")
    outcome = await at_desk.turn(input="look", **NAMED)
    [call] = outcome.response["output"]
    assert (call["type"], call["name"], call["status"]) == ("function_call", "ls", "completed")
    assert json.loads(call["arguments"]) == {"path": "/"}
    assert outcome.response["status"] == "completed"
    assert outcome.response["tool_choice"] == {"type": "function", "name": "ls"}


async def test_a_forced_call_that_is_cut_is_incomplete(at_desk: Desk) -> None:
    at_desk.engine.reply = saying(CALL)
    outcome = await at_desk.turn(input="look", max_output_tokens=50, **NAMED)
    assert outcome.response["status"] == "incomplete"
    assert outcome.response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert outcome.response["output"][-1]["status"] == "incomplete"


async def test_an_answer_in_json_is_a_message(at_desk: Desk) -> None:
    at_desk.engine.reply = saying(JSON_TEXT)
    outcome = await at_desk.turn(input="look", **AS_JSON)
    assert said(outcome) == JSON_TEXT
    assert outcome.response["text"] == {"format": PERSON}


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (
            {"text": {"format": PERSON | {"schema": {"type": "objec"}}}},
            "invalid_json_schema",
            "text.format.schema",
        ),
        (
            {"text": {"format": PERSON | {"schema": STRICT | {"not": {}}}}},
            "invalid_json_schema",
            "text.format.schema",
        ),
        (
            {"tools": [LS, RM | {"parameters": {"type": "objec"}}], "tool_choice": "required"},
            "invalid_function_parameters",
            "tools[1].parameters",
        ),
        (
            {
                "tools": [
                    {"type": "web_search"},
                    {
                        "type": "namespace",
                        "name": "n",
                        "tools": [
                            LS
                            | {"strict": True, "parameters": {"type": "array", "uniqueItems": True}}
                        ],
                    },
                ],
                "tool_choice": "required",
            },
            "invalid_function_parameters",
            "tools[1].tools[0].parameters",
        ),
        (
            {
                "tools": [
                    LS,
                    PATCH | {"format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
                ],
                "tool_choice": "required",
            },
            "invalid_grammar",
            "tools[1].format.definition",
        ),
    ],
)
async def test_what_cannot_be_enforced_is_refused_before_any_event(
    at_desk: Desk,
    body,
    code,
    param,
) -> None:
    with pytest.raises(BadRequest) as caught:
        await at_desk.turn(input="x", **body)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)
    assert at_desk.events == []


async def test_no_declaration_breaks_a_turn_that_need_not_call(at_desk: Desk) -> None:
    odd = LS | {"parameters": {"type": "objec", "not": 3}}
    for body in ({"tools": [odd]}, {"tools": [odd], "parallel_tool_calls": False}):
        await at_desk.turn(input="x", **body)


async def test_custom_calls_are_items_of_their_own(at_desk: Desk) -> None:
    patch = 'begin\n+say "é"\nend\n'
    for body, spoken, text in (
        (GRAMMAR, raw("patch", patch), patch),
        (CUSTOM, hermes("note", input='a\n"é🦆"'), 'a\n"é🦆"'),
        ({"tools": [NOTE]}, "So: " + hermes("note", input="x"), "x"),
    ):
        at_desk.engine.reply = saying(spoken, "Done.")
        first = await at_desk.turn(input="go", **body)
        call = first.response["output"][-1]
        assert (call["type"], call["input"], call["status"]) == (
            "custom_tool_call",
            text,
            "completed",
        )
        assert call["id"].startswith("ctc_")
        deltas = [
            e["delta"]
            for e in at_desk.events
            if e["type"] == "response.custom_tool_call_input.delta"
        ]
        assert "".join(deltas) == text
        assert len(deltas) > 1 or len(text) == 1
        tokens = first.node.tokens
        await at_desk.turn(
            input=[
                {"role": "user", "content": "go"},
                *({k: v for k, v in i.items() if k != "id"} for i in first.response["output"]),
                {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "ok"},
            ],
            tools=body["tools"],
        )
        assert at_desk.prompt[: len(tokens)] == tokens


async def test_a_custom_tools_grammar_outlives_a_restart(at_desk: Desk) -> None:
    first = await at_desk.turn(input="go", tools=[PATCH, DIGITS, NOTE])
    at_desk.restart()
    second = await at_desk.turn(input="on", previous_response_id=first.response["id"])
    assert second.node.tools == first.node.tools
    assert [tool.grammar_syntax for tool in second.node.tools] == ["lark", "regex", None]


async def test_a_refusal_reaches_each_transport_in_its_own_words() -> None:
    body = {"input": "x", "text": {"format": PERSON | {"schema": STRICT | {"not": {}}}}}
    async with open_rig() as rig:
        async with rig.websocket() as client:
            await client.send({"type": "response.create", **body})
            event = await client.event()
            assert (event["type"], event["status"]) == ("error", 400)
            await client.send({"type": "response.create", "input": "x"})
            assert (await client.until("response.completed"))[0]["type"] == "response.created"
        answer = await rig.browser().request("POST", "/v1/responses", body)
    assert answer.status == 400
    for error in (event["error"], answer.json["error"]):
        assert (error["code"], error["param"]) == ("invalid_json_schema", "text.format.schema")
