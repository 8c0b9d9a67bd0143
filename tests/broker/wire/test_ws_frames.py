"""Frames: what each asks for, and that none can break the reader."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import ClientError
from broker.wire.article import ToolResult
from broker.wire.items import Message
from broker.wire.steering import Steer
from broker.wire.ws_frames import (
    ArticleItem,
    ArticleOpening,
    Cancel,
    Create,
    Frame,
    Ignored,
    Refused,
    parse_frame,
)


def parse(**frame):
    return parse_frame(json.dumps(frame))


def test_a_create_is_parsed_with_its_lane():
    frame = parse(
        type="response.create", input="hi", stream=True, stream_id="main", background=True
    )
    assert isinstance(frame, Create)
    assert frame.request.items == (Message(None, "user", "hi"),)
    assert frame.request.stream_id == "main"


def test_a_frame_without_a_type_opens_the_articles_dialect():
    frame = parse(model="m", system="s", tools=[], input="hi")
    assert isinstance(frame, ArticleOpening)
    assert frame.request.instructions == "s"
    item = parse(type="conversation.item.create", item={"role": "tool", "content": "r"})
    assert item == ArticleItem(ToolResult(None, "r"))


@pytest.mark.parametrize(
    ("sent", "frame"),
    [
        ({"type": "response.cancel", "response_id": "resp_1"}, Cancel("resp_1")),
        ({"type": "response.cancel"}, Cancel(None)),
        ({"type": "response.cancel", "stream_id": "main"}, Cancel(None, "main")),
        (
            {"type": "response.steer", "previous_response_id": "resp_1", "input": "left"},
            Steer("resp_1", "left", (Message(None, "user", "left"),)),
        ),
        ({"type": "response.processed", "response_id": "resp_1"}, Ignored("response.processed")),
        ({"type": "session.update", "input": {}}, Ignored("session.update")),
    ],
)
def test_the_other_frames(sent, frame):
    assert parse(**sent) == frame


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        ("not json", "invalid_json", None),
        ("[]", "invalid_type", "body"),
        ("{}", "missing_required_parameter", "type"),
        ('{"type": null, "input": "x"}', "missing_required_parameter", "type"),
        ('{"type": 3}', "invalid_type", "type"),
        ('{"type": "response.create", "input": 3}', "invalid_type", "input"),
        ('{"input": 3}', "invalid_type", "input"),
        ('{"type": "response.cancel", "response_id": 3}', "invalid_type", "response_id"),
        ('{"type": "conversation.item.create"}', "missing_required_parameter", "item"),
    ],
)
def test_a_bad_frame_is_refused_and_not_raised(text, code, param):
    frame = parse_frame(text)
    assert isinstance(frame, Refused)
    assert (frame.error.code, frame.error.param) == (code, param)
    assert (frame.stream_id, frame.previous_response_id) == (None, None)


@pytest.mark.parametrize(
    ("more", "lane", "parent"),
    [
        ({"stream_id": "main", "previous_response_id": "resp_1"}, "main", "resp_1"),
        ({"stream_id": "no good", "previous_response_id": "resp_1"}, None, None),
        ({"previous_response_id": 5}, None, None),
    ],
)
def test_a_refusal_knows_its_lane_and_what_it_tried_to_continue(more, lane, parent):
    frame = parse(type="response.create", input=3, **more)
    assert isinstance(frame, Refused)
    assert (frame.stream_id, frame.previous_response_id) == (lane, parent)


@pytest.mark.parametrize(
    ("frame", "lane", "response", "meant"),
    [
        (Cancel(None), "a", "resp_1", True),
        (Cancel("resp_1"), "a", "resp_1", True),
        (Cancel("resp_1", "b"), "a", "resp_1", True),  # the id decides
        (Cancel("resp_1"), "a", "resp_2", False),
        (Cancel("resp_1"), "a", None, False),
        (Cancel(None, "a"), "a", None, True),
        (Cancel(None, "a"), None, "resp_1", False),
    ],
)
def test_what_a_cancel_means(frame, lane, response, meant):
    assert frame.means(lane, response) is meant


@given(st.text() | st.dictionaries(st.text(max_size=3), st.none() | st.text()).map(json.dumps))
def test_no_frame_breaks_the_reader(text):
    frame = parse_frame(text)
    assert isinstance(frame, Frame)
    if isinstance(frame, Refused):
        assert isinstance(frame.error, ClientError)
