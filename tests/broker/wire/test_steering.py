"""Steers of one lane: each accepted one is used once or comes back once, in order."""

import itertools

import pytest
from hypothesis import event as reached
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)

from broker.wire.items import FunctionCallOutput, Message
from broker.wire.requests import TurnRequest
from broker.wire.steering import MAX_PENDING, Steering, parse_steer, unknown_target

CALL = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "ls", "arguments": "{}"}


def steer(response_id="resp_1", given="left"):
    return parse_steer(
        {"type": "response.steer", "previous_response_id": response_id, "input": given}
    )


def begun(response_id="resp_1", *, stream_id=None, **options):
    numbers = itertools.count(1)
    steering = Steering(stream_id, lambda prefix: f"{prefix}_{next(numbers)}")
    steering.told(created(response_id), **options)
    return steering


def created(response_id):
    return {"type": "response.created", "response": {"id": response_id}}


def terminal(status="completed", reason=None, output=()):
    details = None if reason is None else {"reason": reason}
    response = {"status": status, "incomplete_details": details, "output": list(output)}
    return {"type": f"response.{status}", "response": response}


@pytest.mark.parametrize(
    "given",
    [
        "left",
        [{"role": "user", "content": "left"}],
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "left"}]}],
    ],
)
def test_a_users_words_are_taken_as_they_would_be_from_a_create(given):
    assert steer(given=given).items == (Message(None, "user", "left"),)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (None, "empty"),
        ("", "empty"),
        ([], "empty"),
        ([{"role": "user", "content": ""}], "empty"),
        (3, "input"),
        ([3], "input[0]"),
        ([{"role": "assistant", "content": "x"}], "input[0]"),
        ([{"role": "developer", "content": "x"}], "input[0]"),
        ([{"role": "user", "content": "x", "phase": 1}], "input[0].phase"),
        ([{"role": "user", "content": "x"}, {"type": "item_reference", "id": "msg_1"}], "input[1]"),
        ([{"type": "function_call_output", "call_id": "c", "output": "x"}], "input[0]"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "image"),
    ],
)
def test_anything_else_is_invalid_input_given_back_as_it_came(given, fault):
    for answer in (begun().offer(steer(given=given)), unknown_target(steer(given=given))):
        assert answer["type"] == "response.steer.failed"
        assert answer["error"]["type"] == "invalid_request_error"
        assert answer["error"]["code"] == "invalid_input"
        assert fault in answer["error"]["message"]
        assert answer["steer"] == {"input": given, "previous_response_id": "resp_1"}
        assert isinstance(answer["sequence_number"], int)


def test_a_steer_without_a_target_is_invalid_too():
    answer = unknown_target(parse_steer({"type": "response.steer", "input": "left"}))
    assert answer["error"]["code"] == "invalid_input"
    assert answer["steer"] == {"input": "left", "previous_response_id": ""}


def test_a_target_that_is_nowhere_is_not_found():
    assert unknown_target(steer())["error"]["code"] == "response_not_found"


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (terminal("completed"), "response_already_completed"),
        (terminal("completed", output=[CALL]), "response_already_completed"),
        (terminal("incomplete", "max_output_tokens"), "response_not_active"),
        (terminal("incomplete", "cancelled"), "response_not_active"),
        (terminal("failed"), "response_not_active"),
    ],
)
def test_what_has_ended_is_not_steered(end, code):
    steering = begun()
    steering.told(end)
    assert steering.offer(steer())["error"]["code"] == code


def test_some_responses_cannot_be_steered():
    assert begun(steerable=False).offer(steer())["error"]["code"] == "steering_not_supported"


def test_a_response_takes_so_many_steers_and_no_more():
    steering = begun()
    answers = [steering.offer(steer()) for _ in range(MAX_PENDING + 1)]
    assert {answer["type"] for answer in answers[:-1]} == {"response.steer.accepted"}
    assert answers[-1]["error"]["code"] == "too_many_pending_steers"
    assert "id" not in answers[-1]["steer"]


@pytest.mark.parametrize("lane", [None, "main"])
def test_steer_events_name_the_lane_of_their_target(lane):
    steering = begun(stream_id=lane)
    answers = [steering.offer(steer()), steering.offer(steer(given=""))]
    answers += steering.told(terminal("completed", output=[CALL]))
    assert [answer.get("stream_id") for answer in answers] == [lane] * 3


@pytest.mark.parametrize(
    "end",
    [
        terminal("completed"),
        terminal("incomplete", "steered"),
        terminal("incomplete", "max_output_tokens"),
    ],
)
def test_a_successor_has_all_that_was_sent_and_the_settings_of_what_it_follows(end):
    steering = begun()
    steering.offer(steer(given="one"))
    steering.offer(steer(given="two"))
    assert steering.told(end) == []
    asked = TurnRequest(
        (Message(None, "user", "hi"),), temperature=0.5, store=False, stream_id="main"
    )
    following = steering.successor(asked)
    assert following.items == (Message(None, "user", "one"), Message(None, "user", "two"))
    assert following.previous_response_id == "resp_1"
    assert (following.temperature, following.store, following.stream_id) == (0.5, False, "main")
    steering.told(created("resp_2"))
    assert steering.refused("too late") == []
    steering.told(terminal("completed"))
    assert steering.successor(asked) is None


def test_what_ends_in_calls_waits_for_the_clients_continuation_which_gets_the_steers_first():
    steering = begun()
    accepted = steering.offer(steer())
    (pending,) = steering.told(
        terminal("completed", output=[CALL, {"type": "custom_tool_call", "call_id": "call_2"}])
    )
    assert pending["type"] == "response.steer.pending"
    assert pending["reason"] == "waiting_for_required_input"
    assert pending["steer"] == accepted["steer"]
    assert pending["required_input"] == [
        {"type": "function_call_output", "call_id": "call_1", "name": "ls"},
        {"type": "custom_tool_call_output", "call_id": "call_2"},
    ]
    asked = TurnRequest(
        (FunctionCallOutput(None, "call_1", "a.txt"),), previous_response_id="resp_1"
    )
    assert steering.successor(asked) is None
    joined, left_behind = steering.join(asked)
    assert joined.items == (Message(None, "user", "left"), *asked.items)
    assert left_behind == []


def test_what_waits_comes_back_when_the_lane_goes_on_without_it():
    steering = begun()
    accepted = steering.offer(steer())
    steering.told(terminal("completed", output=[CALL]))
    asked = TurnRequest((Message(None, "user", "hi"),))
    joined, (failed,) = steering.join(asked)
    assert joined == asked
    assert failed["error"]["code"] == "response_not_active"
    assert failed["steer"]["id"] == accepted["steer"]["id"]


@pytest.mark.parametrize("end", [terminal("failed"), terminal("incomplete", "cancelled")])
def test_what_was_queued_for_a_response_that_broke_comes_back(end):
    steering = begun()
    accepted = steering.offer(steer())
    (failed,) = steering.told(end)
    assert failed["error"]["code"] == "response_not_active"
    assert failed["steer"] == {"input": "left", **accepted["steer"]}
    assert steering.successor(TurnRequest(())) is None


class Lane(RuleBasedStateMachine):
    """Any client against any model. The law: what is accepted is used once or comes back once, in order."""

    @initialize()
    def open(self):
        numbers = itertools.count(1)
        self.steering = Steering("lane", lambda prefix: f"{prefix}_{next(numbers)}")
        self.responses = itertools.count(1)
        self.words = itertools.count(1)
        self.accepted = {}  # {steer id: its words}, neither used nor back
        self.pending = set()
        self.latest = None
        self.request = None
        self.runs = False

    def heard(self, events):
        for event in events:
            assert event["stream_id"] == "lane"
            steer_id = event["steer"]["id"]
            if event["type"] == "response.steer.pending":
                assert steer_id in self.accepted
                assert steer_id not in self.pending
                self.pending.add(steer_id)
                assert event["required_input"]
            else:
                assert event["type"] == "response.steer.failed"
                assert event["steer"]["input"] == self.accepted.pop(steer_id)
            reached(f"{event['type']} {event.get('error', {}).get('code')}")

    def begin(self, request, *, refuse):
        words = [item.text for item in request.items if isinstance(item, Message)]
        if refuse:
            self.heard(self.steering.refused("no"))
            return
        self.latest = f"resp_{next(self.responses)}"
        self.request, self.runs = request, True
        assert self.steering.told(created(self.latest)) == []
        steered = [text for text in words if text.startswith("steer")]
        waiting = list(self.accepted.values())
        assert steered == waiting  # all that waits, in order
        self.accepted.clear()

    @precondition(lambda self: not self.runs)
    @rule(continues=st.booleans(), refuse=st.booleans())
    def create(self, continues, refuse):
        asked = TurnRequest(
            (Message(None, "user", "create"),),
            previous_response_id=self.latest if continues else None,
        )
        joined, left_behind = self.steering.join(asked)
        self.heard(left_behind)
        self.begin(joined, refuse=refuse)

    @precondition(lambda self: self.latest is not None)
    @rule(good=st.booleans())
    def steers(self, good):
        words = f"steer {next(self.words)}" if good else ""
        answer = self.steering.offer(steer(self.latest, words))
        if answer["type"] == "response.steer.accepted":
            assert good
            assert self.runs
            self.accepted[answer["steer"]["id"]] = words
        else:
            assert not (good and self.runs and len(self.accepted) < MAX_PENDING)

    @precondition(lambda self: self.runs)
    @rule(
        end=st.sampled_from(
            [
                terminal("completed"),
                terminal("completed", output=[CALL]),
                terminal("incomplete", "steered"),
                terminal("incomplete", "cancelled"),
                terminal("failed"),
            ]
        ),
        refuse=st.booleans(),
    )
    def ends(self, end, refuse):
        self.runs = False
        self.heard(self.steering.told(end))
        following = self.steering.successor(self.request)
        if following is not None:
            assert following.previous_response_id == self.latest
            self.begin(following, refuse=refuse)
            return
        calls = bool(end["response"]["output"])
        assert set(self.accepted) == (self.pending & set(self.accepted))
        assert not self.accepted or calls


TestLane = Lane.TestCase
