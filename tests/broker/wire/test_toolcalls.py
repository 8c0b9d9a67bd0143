"""Text to calls: any cut of the text gives the same, and what is no call stays text."""

import json

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from broker.wire.toolcalls import CallArguments, CallEnd, CallStart, Text, ToolCallSplitter


def split(pieces):
    """Pieces fed one by one, neighbouring texts and arguments joined."""
    splitter = ToolCallSplitter()
    out = []
    for piece in pieces:
        out += splitter.feed(piece)
    out += splitter.finish()
    assert Text("") not in out
    assert CallArguments("") not in out
    joined = []
    for piece in out:
        match joined[-1:], piece:
            case [Text(before)], Text(text):
                joined[-1] = Text(before + text)
            case [CallArguments(before)], CallArguments(delta):
                joined[-1] = CallArguments(before + delta)
            case _:
                joined.append(piece)
    return joined


def call(name, arguments):
    return [CallStart(name), CallArguments(arguments), CallEnd()]


F = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
F_CALL = call("f", '{"a": 1}')
EXAMPLES = {
    "": [],
    "hello": [Text("hello")],
    F: F_CALL,
    "Let me see.\n" + F: [Text("Let me see.\n"), *F_CALL],
    F + "after": [*F_CALL, Text("after")],
    F + "\n" + F: [*F_CALL, Text("\n"), *F_CALL],
    F + F + "x" + F: [*F_CALL, *F_CALL, Text("x"), *F_CALL],
    # white space everywhere, the other key, nesting, escapes, a tag inside a string
    '<tool_call>\n{ "name" :"f" ,\n"arguments": {} }\n</tool_call>\n': [
        *call("f", "{}"),
        Text("\n"),
    ],
    '<tool_call>{"name": "f", "parameters": {"a": {"b": [{}]}}}</tool_call>': call(
        "f", '{"a": {"b": [{}]}}'
    ),
    r'<tool_call>{"name": "f", "arguments": {"a": "}\"{\\"}}</tool_call>': call(
        "f", r'{"a": "}\"{\\"}'
    ),
    '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>': call(
        "f", '{"a": "</tool_call>"}'
    ),
    r'<tool_call>{"name": "f\u00e9\"", "arguments": { }}</tool_call>': call('fé"', "{ }"),
    # keys in another order, arguments as a string, none, or with more beside them
    '<tool_call>{"arguments": {"a": "é"}, "name": "f"}</tool_call>x': [
        *call("f", '{"a": "é"}'),
        Text("x"),
    ],
    '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>': call("f", '{"a": 1}'),
    '<tool_call>{"name": "f"}</tool_call>': call("f", "{}"),
    '<tool_call>{"name": "f", "arguments": ""}</tool_call>': call("f", "{}"),
    '<tool_call>{"name": "f", "parameters": null}</tool_call>': call("f", "{}"),
    '<tool_call>{"id": 7, "name": "f", "arguments": {}}</tool_call>': call("f", "{}"),
    # the end comes early
    '<tool_call>{"name": "f", "arguments": {"a": 1}}': F_CALL,
    '<tool_call>{"name": "f", "arguments": {"a": 1}': F_CALL,
    '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool': F_CALL,
    '<tool_call>{"arguments": {}, "name": "f"}': call("f", "{}"),
    '<tool_call>{"name": "f", "arguments": {"a": "x': [CallStart("f"), CallArguments('{"a": "x')],
    '<tool_call>{"name": "f", "argu': [Text('<tool_call>{"name": "f", "argu')],
    "<tool_call>": [Text("<tool_call>")],
    "text <tool_c": [Text("text <tool_c")],
    # no call at all
    "<tool_call>hello</tool_call>": [Text("<tool_call>hello</tool_call>")],
    "<tool_call>[1]</tool_call>" + F: [Text("<tool_call>[1]</tool_call>"), *F_CALL],
    '<tool_call>{"name": ""}</tool_call>': [Text('<tool_call>{"name": ""}</tool_call>')],
    '<tool_call>{"name": 1, "arguments": {}}</tool_call>': [
        Text('<tool_call>{"name": 1, "arguments": {}}</tool_call>')
    ],
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>': [
        Text('<tool_call>{"name": "f", "arguments": [1]}</tool_call>')
    ],
    r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>': [
        Text(r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>')
    ],
    '<tool_call>{"name": "</tool_call>", "arguments": {}}': [
        Text('<tool_call>{"name": "</tool_call>", "arguments": {}}')
    ],
    "</tool_call>": [Text("</tool_call>")],
    "<<tool_call": [Text("<<tool_call")],
    "a <b> <tool_calls>": [Text("a <b> <tool_calls>")],
    # broken after the head: what came is the call, what follows is text
    '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>x': [
        *call("f", '{"a": 1'),
        Text("x"),
    ],
    '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>' + F + "x": [
        *call("f", '{"a": 1'),
        *F_CALL,
        Text("x"),
    ],
    '<tool_call>{"name": "f", "arguments": {"a": <b>': [*call("f", '{"a": '), Text("<b>")],
    '<tool_call>{"name": "f", "arguments": {}}\n\nSo': [*call("f", "{}"), Text("So")],
    '<tool_call>{"name": "f", "arguments": {}, "id": 1}</tool_call>': [
        *call("f", "{}"),
        Text(', "id": 1}</tool_call>'),
    ],
    '<tool_call>{"name": "f", "arguments": {}}}</tool_call>': [
        *call("f", "{}"),
        Text("}</tool_call>"),
    ],
}


@pytest.mark.parametrize(("text", "pieces"), EXAMPLES.items(), ids=range(len(EXAMPLES)))
def test_an_example_whole_and_letter_by_letter_and_in_every_two_pieces(text, pieces):
    assert split([text]) == pieces
    assert split(text) == pieces
    for cut in range(len(text)):
        assert split([text[:cut], text[cut:]]) == pieces


words = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", ',
        '"arguments": ',
        '"name": "g"',
        '{"a": "',
        '"',
        "\\",
        "{",
        "}",
        "<",
        "{}",
        " ",
        "\n",
        "text",
        "<tool",
        "_call>",
        F,
        "é",
        ",",
    ]
)


@given(st.lists(words, max_size=10).map("".join), st.data())
@example('<tool_call>{"name": "f", "arguments": {"a": 1}} <tool_call>', None)
def test_any_cut_of_any_text_gives_the_same(text, data):
    whole = split([text])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6))) if data else []
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(pieces) == whole
    assert split(text) == whole
    event(f"{sum(isinstance(piece, CallStart) for piece in whole)} calls")
    check_order(whole)


def check_order(pieces):
    """Calls do not nest, have a name, and are open at most at the end."""
    is_open = False
    for piece in pieces:
        assert is_open == isinstance(piece, CallArguments | CallEnd)
        match piece:
            case CallStart(name):
                assert name
                is_open = True
            case CallEnd():
                is_open = False
            case Text(text):
                assert text


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
arguments = st.dictionaries(
    names,
    st.text(max_size=5) | st.integers() | st.dictionaries(names, st.none(), max_size=2),
    max_size=3,
)
plain = st.text("ab <>/{}\n", max_size=6)


@given(st.lists(st.tuples(plain, names, arguments), max_size=3), plain, st.booleans())
def test_every_well_formed_call_comes_out_as_it_was_written(calls, last, ascii_only):
    text, expected = "", ""
    for before, name, args in calls:
        written = json.dumps(args, ensure_ascii=ascii_only)
        quoted = json.dumps(name, ensure_ascii=ascii_only)
        text += before + f'<tool_call>{{"name": {quoted}, "arguments": {written}}}</tool_call>'
        expected += before + f"[{name}({written})]"
    said = ""
    for piece in split([text + last]):
        match piece:
            case Text(words):
                said += words
            case CallStart(name):
                said += f"[{name}("
            case CallArguments(delta):
                said += delta
            case CallEnd():
                said += ")]"
    assert said == expected + last


def test_nothing_is_held_longer_than_it_is_undecided():
    splitter = ToolCallSplitter()
    assert splitter.feed("hello <tool") == [Text("hello ")]
    assert splitter.feed("s> <") == [Text("<tools> ")]
    assert splitter.feed('tool_call>{"name": "f", "arguments": ') == []
    assert splitter.feed("{") == [CallStart("f"), CallArguments("{")]
    assert splitter.feed('"a') == [CallArguments('"a')]
    assert splitter.feed('": 1}') == [CallArguments('": 1}'), CallEnd()]
    assert splitter.feed("}</tool_call>more") == [Text("more")]
    assert splitter.finish() == []
