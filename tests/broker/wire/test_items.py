"""Items in, groups, and the digest that recognises a replay."""

import itertools
import json

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from broker.errors import BadRequest, UnsupportedContent
from broker.wire.items import (
    ClientGroup,
    FunctionCall,
    FunctionCallOutput,
    ItemReference,
    Message,
    OutputGroup,
    Reasoning,
    content_digest,
    group_outputs,
    is_output,
    parse_input,
    parse_items,
    spoken_name,
)

CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}"}


def test_only_what_a_model_made_is_output():
    roles = ("user", "assistant", "system", "developer", "tool")
    assert [is_output(Message(None, role, "")) for role in roles] == [
        False,
        True,
        False,
        False,
        False,
    ]
    assert not is_output(FunctionCallOutput(None, "c", ""))
    assert is_output(FunctionCall(None, "c", "f", ""))
    assert is_output(Reasoning(None, ""))
    assert is_output(ItemReference("msg_1"))


def message(text, item_id=None, role="user"):
    return Message(item_id, role, text)


@pytest.mark.parametrize(
    ("sent", "item"),
    [
        ({"role": "user", "content": "hi"}, message("hi")),
        ({"type": "message", "role": "developer", "content": "d"}, message("d", role="developer")),
        ({"role": "system", "content": ""}, message("", role="system")),
        (
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "phase": "final_answer",
                "content": [
                    {"type": "output_text", "text": "a", "annotations": [], "logprobs": []},
                    {"type": "refusal", "refusal": "b"},
                ],
            },
            message("ab", "msg_1", "assistant"),
        ),
        (
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, "b"]},
            message("ab"),
        ),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, message("a")),
        ({"role": "user", "content": []}, message("")),
        (CALL, FunctionCall("fc_1", "c1", "f", "{}")),
        (
            {**CALL, "id": None, "namespace": "n", "arguments": "{not json"},
            FunctionCall(None, "c1", "f", "{not json", "n"),
        ),
        (
            {"type": "custom_tool_call", "call_id": "c1", "name": "p", "input": 'é"\n'},
            FunctionCall(None, "c1", "p", '{"input": "é\\"\\n"}'),
        ),
        (
            {"type": "function_call_output", "id": "fco_1", "call_id": "c1", "output": "r"},
            FunctionCallOutput("fco_1", "c1", "r"),
        ),
        (
            {
                "type": "custom_tool_call_output",
                "call_id": "c1",
                "output": [{"type": "input_text", "text": "r"}],
            },
            FunctionCallOutput(None, "c1", "r"),
        ),
        (
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [{"type": "summary_text", "text": "s"}],
                "content": None,
                "encrypted_content": "xyz",
            },
            Reasoning("rs_1", "s", "xyz"),
        ),
        (
            {
                "type": "reasoning",
                "summary": [{"type": "summary_text", "text": "s"}],
                "content": [
                    {"type": "reasoning_text", "text": "a"},
                    {"type": "reasoning_text", "text": "b"},
                ],
            },
            Reasoning(None, "ab"),
        ),
        ({"type": "reasoning", "summary": []}, Reasoning(None, "")),
        ({"type": "item_reference", "id": "msg_1"}, ItemReference("msg_1")),
        ({"id": "msg_1"}, ItemReference("msg_1")),
        ({"id": "msg_1", "type": None}, ItemReference("msg_1")),
    ],
)
def test_an_item_that_real_clients_send_is_understood(sent, item):
    assert parse_items([sent]) == (item,)


@pytest.mark.parametrize(
    ("sent", "code", "param"),
    [
        (1, "invalid_type", "input[1]"),
        ({}, "missing_required_parameter", "input[1].type"),
        ({"type": 1}, "invalid_type", "input[1].type"),
        ({"type": "web_search_call", "id": "ws_1"}, "invalid_value", "input[1].type"),
        ({"role": "user"}, "missing_required_parameter", "input[1].content"),
        ({"role": "user", "content": 3}, "invalid_type", "input[1].content"),
        ({"role": "tool", "content": "x"}, "invalid_value", "input[1].role"),
        ({"role": None, "content": "x"}, "missing_required_parameter", "input[1].role"),
        ({"role": "user", "content": "x", "id": 5}, "invalid_type", "input[1].id"),
        ({"role": "user", "content": "x", "id": ""}, "empty_string", "input[1].id"),
        (
            {"role": "user", "content": "x", "id": "i" * 513},
            "string_above_max_length",
            "input[1].id",
        ),
        ({"role": "user", "content": [1]}, "invalid_type", "input[1].content[0]"),
        (
            {"role": "user", "content": ["a", {"text": "b"}]},
            "missing_required_parameter",
            "input[1].content[1].type",
        ),
        (
            {"role": "user", "content": [{"type": "input_text"}]},
            "missing_required_parameter",
            "input[1].content[0].text",
        ),
        (
            {"role": "user", "content": [{"type": "nonsense", "text": "x"}]},
            "invalid_value",
            "input[1].content[0].type",
        ),
        (
            {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]},
            "unsupported_content",
            "input[1].content[0]",
        ),
        (
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_file"}]},
            "unsupported_content",
            "input[1].output[0]",
        ),
        (
            {"type": "function_call_output", "output": "r"},
            "missing_required_parameter",
            "input[1].call_id",
        ),
        (
            {"type": "function_call_output", "call_id": "c"},
            "missing_required_parameter",
            "input[1].output",
        ),
        ({**CALL, "arguments": {}}, "invalid_type", "input[1].arguments"),
        ({**CALL, "arguments": None}, "missing_required_parameter", "input[1].arguments"),
        ({**CALL, "name": ""}, "empty_string", "input[1].name"),
        ({"type": "item_reference"}, "missing_required_parameter", "input[1].id"),
        (
            {"type": "reasoning", "content": [{"type": "reasoning_text"}]},
            "missing_required_parameter",
            "input[1].content[0].text",
        ),
        ({"type": "reasoning", "summary": "s"}, "invalid_type", "input[1].summary"),
        ({"type": "reasoning", "summary": ["s"]}, "invalid_type", "input[1].summary[0]"),
    ],
)
def test_a_refused_item_is_named_by_its_path(sent, code, param):
    with pytest.raises(BadRequest) as caught:
        parse_items([{"role": "user", "content": "fine"}, sent])
    assert (caught.value.code, caught.value.param) == (code, param)
    assert param in caught.value.message or "Supported values" in caught.value.message
    assert len(caught.value.message) < 400


def test_an_image_is_refused_as_content_and_not_as_nonsense():
    with pytest.raises(UnsupportedContent):
        parse_items([{"role": "user", "content": [{"type": "input_image"}]}])


@pytest.mark.parametrize(
    ("value", "items"),
    [
        (None, ()),
        ("", ()),
        ([], ()),
        ("hi", (message("hi"),)),
        ([{"role": "user", "content": "hi"}], (message("hi"),)),
    ],
)
def test_input_may_be_absent_or_a_string_or_a_list(value, items):
    assert parse_input(value) == items


@pytest.mark.parametrize("value", [3, {}, True, 1.5])
def test_input_of_another_type_is_refused(value):
    with pytest.raises(BadRequest) as caught:
        parse_input(value)
    assert (caught.value.code, caught.value.param) == ("invalid_type", "input")


def test_a_namespace_is_part_of_what_the_model_says():
    assert spoken_name("f", None) == "f"
    assert spoken_name("f", "n") == "n.f"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
output_items = st.one_of(
    st.builds(Message, st.none(), st.just("assistant"), texts),
    st.builds(FunctionCall, st.none(), st.just("c"), texts, texts, st.none() | texts),
    st.builds(Reasoning, st.none(), texts),
)
client_items = st.one_of(
    st.builds(Message, st.none(), st.sampled_from(["user", "system", "developer", "tool"]), texts),
    st.builds(FunctionCallOutput, st.none(), st.just("c"), texts),
)
references = st.builds(ItemReference, st.text(min_size=1, max_size=3))


@given(st.lists(output_items | client_items | references, max_size=8))
def test_groups_keep_the_items_in_order_and_alternate(items):
    groups = group_outputs(items)
    assert [item for group in groups for item in group.items] == items
    assert all(group.items for group in groups)
    kinds = [type(group) for group in groups]
    assert all(left is not right for left, right in itertools.pairwise(kinds))
    for group in groups:
        assert isinstance(group, OutputGroup | ClientGroup)
        assert {is_output(item) for item in group.items} == {isinstance(group, OutputGroup)}


def replayed(item, draw):
    """One of our items as some client sends it back."""
    flavour = draw(st.sampled_from(["as is", "no id", "string", "parts", "noise", "trimmed"]))
    event(flavour)
    sent = json.loads(json.dumps(item))
    if flavour == "no id":
        del sent["id"]
        del sent["status"]
    if flavour == "noise":
        sent |= {"extra": 1, "status": None, "id": "msg_client"}
        if "call_id" in sent:
            sent["call_id"] = "call_other"
    if sent["type"] == "message":
        text = sent["content"][0]["text"]
        if flavour == "string":
            sent = {"role": "assistant", "content": text}
        if flavour == "trimmed":
            sent["content"] = text.strip()
        if flavour == "parts":
            cut = draw(st.integers(0, len(text)))
            sent["content"] = [
                {"type": "output_text", "text": text[:cut]},
                {"type": "output_text", "text": text[cut:], "annotations": ["?"]},
            ]
    return sent


def our_message(text):
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }


our_items = st.one_of(
    texts.map(our_message),
    st.builds(
        lambda name, arguments: (
            CALL | {"name": name, "arguments": arguments, "status": "completed"}
        ),
        texts.filter(bool),
        texts,
    ),
)


@given(st.lists(our_items, max_size=5), st.data())
def test_a_replay_has_the_digest_of_what_was_answered(items, data):
    answered = content_digest(parse_items(items))
    sent = [replayed(item, data.draw) for item in items]
    assert content_digest(parse_items(sent)) == answered
    assert len(answered) == 32
    around = [
        {"role": "user", "content": "q"},
        *sent,
        {**CALL, "type": "function_call_output", "output": "r"},
    ]
    assert content_digest(parse_items(around)) == answered


def says(items):
    """What a group of outputs says, written another way than the digest writes it."""
    said = []
    for item in items:
        match item:
            case Message(text=text) if said and isinstance(said[-1], str):
                said[-1] += text
            case Message(text=text):
                said += [text] if text else []
            case FunctionCall(name=name, arguments=arguments, namespace=namespace):
                said.append((spoken_name(name, namespace), VALUES.get(arguments, arguments)))
            case Reasoning():
                pass
            case ItemReference(id=item_id):
                said.append({item_id})
    stripped = ["".join(one.split()) if isinstance(one, str) else one for one in said]
    return [one for one in stripped if one != ""]


few = st.sampled_from(["", "a", "b", "ab", " ", "a ", "a b"])
VALUES = {
    '{"a":1,"b":[{"c":2}]}': 1,
    '{"b": [{"c": 2.0}],\n "a": 1}': 1,
    '{"a":1,"b":[{"c":"2"}]}': 2,
    '{"a":1,"b":[{"c":2}],"d":1}': 3,
    '{"a":1': 4,
    '{"a": 1': 5,
    "0.5": 6,
    "5e-1": 6,
}
confusable = st.lists(
    st.builds(Message, st.none(), st.just("assistant"), few)
    | st.builds(
        FunctionCall,
        st.none(),
        st.just("c"),
        few,
        few | st.sampled_from([*VALUES]),
        st.none() | few,
    )
    | st.builds(Reasoning, st.none(), few)
    | st.builds(ItemReference, few),
    max_size=3,
)


@given(confusable, confusable)
def test_digests_are_equal_exactly_where_the_outputs_say_the_same(left, right):
    assert (content_digest(left) == content_digest(right)) == (says(left) == says(right))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([message("a", role="assistant")], [message("b", role="assistant")]),
        ([FunctionCall(None, "c", "ab", "c")], [FunctionCall(None, "c", "a", "bc")]),
        ([Reasoning(None, "a")], [message("a", role="assistant")]),
        ([ItemReference("a")], [Reasoning(None, "a")]),
        ([FunctionCall(None, "c", "f", "{}")], [FunctionCall(None, "c", "f", "[]")]),
        (
            [message("a", role="assistant"), FunctionCall(None, "c", "f", "")],
            [FunctionCall(None, "c", "f", ""), message("a", role="assistant")],
        ),
    ],
)
def test_close_neighbours_differ(left, right):
    assert content_digest(left) != content_digest(right)


def test_the_digest_never_changes_between_versions():
    """It is on disk, in manifests: a change here loses every replay without ids."""
    items = [message("héllo", role="assistant"), FunctionCall("fc_1", "c", "f", "{}", "n")]
    assert (
        content_digest(items).hex()
        == "10980dda2f3486a2975f353c45c7e131eab3ffc6873566c719a72bc0f9b98cda"
    )
