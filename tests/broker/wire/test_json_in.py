"""Strict JSON: what it takes, and that every refusal is a client error with a sentence."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BadRequest
from broker.wire import json_in
from broker.wire.json_in import MAX_DEPTH, parse_json, parse_object

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=20,
).filter(lambda value: not (isinstance(value, float) and math.isinf(value)))


@given(values, st.booleans())
def test_what_json_writes_is_read_back(value, ascii_only):
    try:
        written = json.dumps(value, ensure_ascii=ascii_only, allow_nan=False)
    except ValueError:  # an infinity deep inside
        return
    assert parse_json(written) == value
    assert parse_json(written.encode()) == value


@pytest.mark.parametrize(
    ("given_text", "why"),
    [
        (b'{"a": "\xff"}', "UTF-8"),
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("{} {}", "Extra data"),
        ("\ufeff{}", "BOM"),
        ('{"a": 1, "a": 1}', "same key twice"),
        ('[{"b": {"a": 1, "a": 2}}]', "same key twice"),
        ("[NaN]", "NaN"),
        ("-Infinity", "-Infinity"),
        ("1e999", "too large"),
        ("[-1e999]", "too large"),
        ("9" * 41, "too large"),
        ("9" * 5000, "too large"),
        (r'["\ud800"]', "surrogate"),
        (r'{"\udfff": 1}', "surrogate"),
        (r'{"a": [{"b": "x\udc00\ud800"}]}', "surrogate"),
        ("[" * 65 + "]" * 65, "levels deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "levels deep"),
        ("[" * 100_000, "levels deep"),
        ("'a'", "Expecting value"),
        ('"a\nb"', "control character"),
    ],
)
def test_a_refusal_says_why(given_text, why):
    with pytest.raises(BadRequest) as caught:
        parse_json(given_text)
    assert caught.value.code == "invalid_json"
    assert why in caught.value.message


@pytest.mark.parametrize("sample", ["[]", '{"a": 1}'])
def test_the_deepest_nesting_allowed_is_read(sample):
    deep = "[" * (MAX_DEPTH - 1) + sample + "]" * (MAX_DEPTH - 1)
    assert parse_json(deep)
    with pytest.raises(BadRequest):
        parse_json(f"[{deep}]")


def test_a_surrogate_pair_is_one_character():
    assert parse_json(r'"\ud83d\ude00"') == "😀"
    assert parse_json('"😀"') == "😀"


def test_many_values_are_refused_before_they_are_many_more(monkeypatch):
    monkeypatch.setattr(json_in, "MAX_VALUES", 5)
    assert parse_json("[1, 2, 3, 4]") == [1, 2, 3, 4]
    with pytest.raises(BadRequest, match="more than 5 values"):
        parse_json("[1, 2, 3, 4, 5]")


@pytest.mark.parametrize("other", ["[]", "1", "null", '"text"', "true", "1.5"])
def test_a_body_is_an_object(other):
    with pytest.raises(BadRequest) as caught:
        parse_object(other)
    assert (caught.value.code, caught.value.param) == ("invalid_type", "body")
    assert parse_object('{"a": null}') == {"a": None}
