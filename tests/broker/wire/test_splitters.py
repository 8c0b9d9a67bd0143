"""Every form of calls and thoughts: any cut of the text gives the same, and what is no call stays text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.wire.custom_input import InputReader
from broker.wire.rawcalls import CallInput, RawCallSplitter
from broker.wire.thoughts import Thought, ThoughtSplitter
from broker.wire.toolcalls import CallArguments, CallEnd, CallStart, Text
from broker.wire.toolcalls_llama import LlamaSplitter
from broker.wire.toolcalls_mistral import MistralSplitter
from engine.text import Markers
from tests.broker.wire.cuts import cuts, played


def call(name, arguments):
    return [CallStart(name), CallArguments(arguments), CallEnd()]


F = call("f", '{"a": "}\\"{"}')
ENTRY = '{"name": "f", "arguments": {"a": "}\\"{"}}'
LLAMA = {
    "": [],
    "Hello {you}": [Text("Hello {you}")],
    " \n Hello": [Text(" \n Hello")],
    ENTRY.replace("arguments", "parameters"): F,
    ENTRY: F,
    f"\n <|python_tag|>{ENTRY}": F,
    f"{ENTRY}; {ENTRY}": F + F,
    f"{ENTRY},\n{ENTRY}\n": F + F,
    f"{ENTRY};": F,
    f"{ENTRY}\n\nSo": [*F, Text("\n\nSo")],
    f"{ENTRY}; no": [*F, Text("; no")],
    '{"type": "function", "name": "f", "parameters": {}}': call("f", "{}"),
    '{"name": "f", "type": "function", "parameters": { }}': call("f", "{ }"),
    '{ "name" :"f\\u00e9" ,"parameters":{"b": [{}]} }': call("fé", '{"b": [{}]}'),
    '{"name": "f", "parameters": {"a": 1': [CallStart("f"), CallArguments('{"a": 1')],
    '{"name": "f", "parameters": {"a": 1}': call("f", '{"a": 1}'),
    # objects that are no calls, and heads that never came
    '{"name": "Bob", "age": 3}': [Text('{"name": "Bob", "age": 3}')],
    '{"name": "", "parameters": {}}': [Text('{"name": "", "parameters": {}}')],
    '{"name": "f", "parameters": []}': [Text('{"name": "f", "parameters": []}')],
    '{"a": {"name": "f", "parameters": {}}}': [Text('{"a": {"name": "f", "parameters": {}}}')],
    '{"name": "f", "para': [Text('{"name": "f", "para')],
    '{"na\\"me': [Text('{"na\\"me')],
    "{": [Text("{")],
    "<|python_tag|>print(1)": [Text("<|python_tag|>print(1)")],
    "<|python": [Text("<|python")],
    "  ": [Text("  ")],
    f"See: {ENTRY}": [Text(f"See: {ENTRY}")],
}
NAMED = '[TOOL_CALLS]f{"a": "}\\"{"}'
MISTRAL = {
    "": [],
    "Hello [you]": [Text("Hello [you]")],
    f"[TOOL_CALLS] [{ENTRY}]": F,
    f"[TOOL_CALLS][{ENTRY}, {ENTRY}]": F + F,
    f"Let me see.[TOOL_CALLS] [\n{ENTRY}]\nDone.": [Text("Let me see."), *F, Text("\nDone.")],
    '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "a}1\\""}, ' + ENTRY + "]": [
        *call("f", "{}"),
        *F,
    ],
    '[TOOL_CALLS] [{"arguments": {"a": 1}, "name": "f"}]x': [*call("f", '{"a": 1}'), Text("x")],
    f'[TOOL_CALLS] [{{"id": "1", "name": "f"}}, {ENTRY}]': [*call("f", "{}"), *F],
    "[TOOL_CALLS] []x": [Text("x")],
    NAMED: F,
    NAMED + NAMED: F + F,
    f"So: {NAMED} and {NAMED}.": [Text("So: "), *F, Text(" and "), *F, Text(".")],
    '[TOOL_CALLS]f-1.g[CALL_ID]a1b2c3d4e[ARGS]{"a": 1}': call("f-1.g", '{"a": 1}'),
    '[TOOL_CALLS] f [ARGS]{"a": 1}': [Text('[TOOL_CALLS] f [ARGS]{"a": 1}')],
    '[TOOL_CALLS]f[ARGS] {"a": 1}': call("f", '{"a": 1}'),
    # what never became a call
    "[TOOL_CALLS]": [Text("[TOOL_CALLS]")],
    "[TOOL_CA": [Text("[TOOL_CA")],
    "[TOOL_CALLS]so, no": [Text("[TOOL_CALLS]so, no")],
    f"[TOOL_CALLS]{NAMED}": [Text("[TOOL_CALLS]"), *F],
    '[TOOL_CALLS] [{"nam': [Text('[TOOL_CALLS] [{"nam')],
    '[TOOL_CALLS] [{"a": 1}]': [Text('[TOOL_CALLS] [{"a": 1}')],
    '[TOOL_CALLS]f{"a": 1': [CallStart("f"), CallArguments('{"a": 1')],
    '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}': call("f", '{"a": 1}'),
}
RAW_HEAD = '<tool_call>{"name": "patch"}\n'
RAW = {
    "": [],
    "Hello <tool": [Text("Hello <tool")],
    f"{RAW_HEAD}a\nb\n</tool_call>": [CallStart("patch"), CallInput("a\nb"), CallEnd()],
    f"{RAW_HEAD}a\n</tool_call>\nb\n</tool_call>": [
        CallStart("patch"),
        CallInput("a\n</tool_call>\nb"),
        CallEnd(),
    ],
    f"{RAW_HEAD}a\n</tool_cal": [CallStart("patch"), CallInput("a\n</tool_cal")],
    f"{RAW_HEAD}\n</tool_call>": [CallStart("patch"), CallEnd()],
    f"x{RAW_HEAD}": [Text("x"), CallStart("patch")],
    '<tool_call>\n{"name": "ls", "arguments": {}}\n</tool_call>': [
        Text('<tool_call>\n{"name": "ls", "arguments": {}}\n</tool_call>')
    ],
    '<tool_call>{"name": "ls"}\na': [Text('<tool_call>{"name": "ls"}\na')],
    f"<tool_call><tool_call>{RAW_HEAD}a": [
        Text("<tool_call><tool_call>"),
        CallStart("patch"),
        CallInput("a"),
    ],
    '<tool_call>{"name": "pa': [Text('<tool_call>{"name": "pa')],
}
THOUGHTS = {
    "": [],
    "Hello <think>": [Text("Hello <think>")],
    " \n<think>\nHm, <b>.\n\nSo.\n</think>\n\n Yes. <think>": [
        Thought("Hm, <b>.\n\nSo."),
        Text("Yes. <think>"),
    ],
    "<think>\n\n</think>\n\nYes.": [Text("Yes.")],
    "<think>Hm": [Thought("Hm")],
    "<think>Hm </thin": [Thought("Hm </thin")],
    "<think>Hm </think>": [Thought("Hm")],
    "<think> </think> ": [],
    "<thi": [Text("<thi")],
    " <thing>": [Text(" <thing>")],
    "  ": [Text("  ")],
}
OPENED = {
    "": [],
    "\nHm.</think>\nYes.": [Thought("Hm."), Text("Yes.")],
    "</think>Yes.": [Text("Yes.")],
    "Hm. <think>": [Thought("Hm. <think>")],
    " \n": [],
}
MARKERS = Markers("<think>", "</think>")
MACHINES = {
    "llama": (LlamaSplitter, LLAMA),
    "mistral": (MistralSplitter, MISTRAL),
    "raw": (lambda: RawCallSplitter(["patch"]), RAW),
    "thoughts": (lambda: ThoughtSplitter(MARKERS, inside=False), THOUGHTS),
    "opened thoughts": (lambda: ThoughtSplitter(MARKERS, inside=True), OPENED),
}


@pytest.mark.parametrize(
    ("machine", "text"), [(name, text) for name, (_, texts) in MACHINES.items() for text in texts]
)
def test_every_cut_of_a_text_says_the_same(machine, text):
    make, expected = MACHINES[machine]
    for pieces in cuts(text):
        assert played(make(), pieces) == expected[text], pieces


FRAGMENTS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "\n</tool_call>",
        '{"name": "patch"}\n',
        "[TOOL_CALLS]",
        "[ARGS]",
    ),
    *(
        "<think>",
        "</think>",
        "<|python_tag|>",
        ENTRY,
        ENTRY[:22],
        ENTRY[22:],
        "[",
        "]",
        ", ",
        "; ",
        "}",
    ),
    *("\n", " ", "a", '"', "\\", "patch", "{", "é"),
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=10), st.data())
@pytest.mark.parametrize("machine", MACHINES)
def test_any_text_cut_anywhere_says_the_same(machine, fragments, data):
    make, _ = MACHINES[machine]
    text = "".join(fragments)
    at = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]
    assert played(make(), pieces) == played(make(), [text])


@pytest.mark.parametrize("machine", ["llama", "mistral", "raw"])
@given(st.text(alphabet='ab{}[]":, \n<>_', max_size=30))
def test_text_without_markup_is_text(machine, text):
    make, _ = MACHINES[machine]
    assert played(make(), list(text)) == ([Text(text)] if text else [])


def test_arguments_stream_as_they_come():
    for make, head in (
        (LlamaSplitter, '{"name": "f", "parameters": '),
        (MistralSplitter, "[TOOL_CALLS]f"),
    ):
        splitter = make()
        assert splitter.feed(head + "{") == [CallStart("f"), CallArguments("{")]
        assert splitter.feed('"a') == [CallArguments('"a')]
    raw = RawCallSplitter(["patch"])
    assert raw.feed(RAW_HEAD) == [CallStart("patch")]
    assert raw.feed("ab\n<") == [CallInput("ab")]
    assert raw.feed("x") == [CallInput("\n<x")]


# --- a custom tool's input


def read(pieces):
    reader = InputReader()
    return "".join(map(reader.feed, pieces)) + reader.finish()


INPUTS = {
    '{"input": "a\\n\\"b\\" \\\\ \\/"}': 'a\n"b" \\ /',
    '{ "input" :"\\u00e9\\ud83e\\udd86é🦆"} ': "é🦆é🦆",
    '{"input": ""}': "",
    '{"input": "a": "b"}': "a",
    '{"input": "cut': "cut",
    '{"input": "cut\\': "cut",
    '{"input": "cut\\u00': "cut",
    '{"input": "cut\\ud83e': "cut\ufffd",
    '{"input": "cut\\ud83e\\u': "cut\ufffd",
    '{"input": "\\ud83ex\\udd86"}': "\ufffdx\ufffd",
    '{"input": "\\ud83e\\ud83e\\udd86"}': "\ufffd🦆",
    '{"input": "\\uZZ"}': "\ufffdZZ",
    # not our object: the input is what stands there
    '{"text": "a", "input": "b"}': "b",
    '{"text": "a"}': '{"text": "a"}',
    '{"input": 3}': '{"input": 3}',
    "{": "{",
    "": "",
    "plain": "plain",
}


@pytest.mark.parametrize("arguments", INPUTS)
def test_every_cut_of_arguments_reads_the_same_input(arguments):
    for pieces in cuts(arguments):
        assert read(pieces) == INPUTS[arguments], pieces


@given(st.text(), st.booleans(), st.data())
def test_what_json_can_say_is_read_back(text, ascii_only, data):
    arguments = json.dumps({"input": text}, ensure_ascii=ascii_only)
    at = data.draw(st.integers(0, len(arguments)))
    assert read([arguments[:at], arguments[at:]]) == text
