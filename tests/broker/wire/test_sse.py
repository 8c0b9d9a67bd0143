"""Server-Sent Events as bytes."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.wire.sse import DONE, data_frame, json_text, sse_frame


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_an_event_is_one_data_line_whatever_its_text(delta):
    event = {"type": "response.output_text.delta", "delta": delta}
    frame = sse_frame(event).decode()
    first, second, *rest = frame.split("\n")
    assert first == "event: response.output_text.delta"
    assert second.startswith("data: ")
    assert "\r" not in frame
    assert rest == ["", ""]
    assert json.loads(second.removeprefix("data: ")) == event


def test_a_value_without_a_type_is_its_data_line_alone():
    assert data_frame({"a": "é\n"}) == 'data: {"a":"é\\n"}\n\n'.encode()


def test_the_end_of_a_body():
    assert DONE == b"data: [DONE]\n\n"


def test_numbers_that_are_not_json_are_our_bug():
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({"a": math.nan})
