"""Responses over WebSocket on a real daemon: warm-ups, lanes, and steering by the official client."""

import openai
import pytest
from openai.lib.responses_websocket import ResponsesWebSocketLimits, ResponsesWebSocketSession

from tests.e2e.warm_up import warm_up

MODEL = "smollm2-135m-instruct"
LIMITS = ResponsesWebSocketLimits(
    max_lanes=40,
    max_events_per_lane=4096,
    max_events=8192,
    max_bytes_per_lane=1 << 24,
    max_bytes=1 << 26,
)
# openai 3.57 opens its socket in a way that websockets 17 deprecates: theirs to mend.
pytestmark = pytest.mark.filterwarnings(r"ignore:connect\(\) must be used:DeprecationWarning")


@pytest.mark.parametrize("by_replay", [False, True], ids=["by id", "by replay"])
async def test_what_a_warm_up_computes_is_computed_once(daemon, nursery, by_replay):
    """Larger than one step of the engine, and continued while it runs."""
    measured = await warm_up(
        nursery, daemon.url, 700, by_replay=by_replay, label=f"warm {by_replay}"
    )
    assert measured.twice == 0
    assert measured.turn.cached_tokens > 600
    assert set(measured.turn.recomputed) <= {"new", "logits"}
    nursery.cancel_scope.cancel()


@pytest.fixture
def session(daemon):
    with openai.OpenAI(base_url=daemon.url + "/v1", api_key="none", max_retries=0) as client:
        with client.responses.connect() as connection:
            with ResponsesWebSocketSession(connection, limits=LIMITS) as session:
                yield session


def ask(lane, given, **body):
    settings = {"model": MODEL, "temperature": 0, "max_output_tokens": 4, "store": False}
    lane.send({"type": "response.create", "input": given, **settings, **body})


def test_lanes_of_the_official_client_run_together_and_reuse_what_they_share(session):
    main, other = session.lane("main"), session.lane("other")
    ask(main, "Remember the number four.")
    first = main.get_final_response(timeout=120)
    ask(other, "Which number?", previous_response_id=first.id)
    while other.recv(timeout=120).type != "response.in_progress":
        pass
    ask(main, "Say it.", previous_response_id=first.id)
    known = first.usage.input_tokens + first.usage.output_tokens
    for lane in (main, other):
        response = lane.get_final_response(timeout=120)
        assert response.previous_response_id == first.id
        assert response.usage.input_tokens_details.cached_tokens >= known - 1


def test_the_official_client_steers_a_running_response(session):
    lane = session.lane("main")
    ask(lane, "Count to a hundred.", max_output_tokens=64)
    events = [lane.recv(timeout=120)]
    while events[-1].type != "response.output_text.delta":
        events.append(lane.recv(timeout=120))
    first = events[0].response.id
    lane.send({"type": "response.steer", "previous_response_id": first, "input": "Stop."})
    while events[-1].type not in ("response.completed", "response.incomplete"):
        events.append(lane.recv(timeout=120))
    assert "response.steer.accepted" in [event.type for event in events]
    cut = events[-1].response
    assert cut.incomplete_details.reason == "steered"
    assert 0 < cut.usage.output_tokens < 64
    while events[-1].type != "response.created":
        events.append(lane.recv(timeout=120))
    assert events[-1].response.previous_response_id == first
    successor = lane.get_final_response(timeout=120)
    assert successor.previous_response_id == first
    assert successor.usage.input_tokens_details.cached_tokens >= cut.usage.input_tokens
