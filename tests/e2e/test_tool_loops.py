"""One conversation of each client that agents are built with: a forced call, its result, an answer, and a question more.

The model keeps to a script (`tests/clients/scripted.py`), so that the call is the same for every client; the daemon, its
port and the clients are real. What is asked of all: the call arrives whole, the result leads to the answer, and every
turn reuses all that was said before it.
"""

import asyncio
import itertools
import json

import openai
import pytest
from agents import Agent, ModelSettings, function_tool, set_tracing_disabled
from agents.responses_websocket_session import responses_websocket_session
from openai.lib.responses_websocket import (
    ResponsesWebSocketAccumulator,
    ResponsesWebSocketError,
    ResponsesWebSocketLimits,
    ResponsesWebSocketSession,
)
from websockets.sync.client import connect

from tests.clients import scripted

MODEL = "smollm2-135m-instruct"
ANSWER = "It is empty."
ARGUMENTS = {"path": "notes.txt"}
TOOL = {
    "type": "function",
    "name": "read_file",
    "description": "Read a file.",
    "parameters": {
        "type": "object",
        "properties": {"path": {"type": "string"}},
        "required": ["path"],
    },
    "strict": None,
}
FORCED = ["required", {"type": "function", "name": "read_file"}]
LIMITS = ResponsesWebSocketLimits(
    max_lanes=40,
    max_events_per_lane=4096,
    max_events=8192,
    max_bytes_per_lane=1 << 24,
    max_bytes=1 << 26,
)
# openai 3.57 opens its socket in a way that websockets 17 deprecates: theirs to mend.
pytestmark = pytest.mark.filterwarnings(r"ignore:connect\(\) must be used:DeprecationWarning")


@pytest.fixture(scope="module")
def forced(tmp_path_factory):
    call = (TOOL["name"], json.dumps(ARGUMENTS))
    with scripted.daemon(
        tmp_path_factory.mktemp("scripted"), "log.level=warning", say=ANSWER, call=call
    ) as daemon:
        yield daemon


@pytest.fixture
def client(forced):
    with openai.OpenAI(base_url=forced.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def called(response):
    """The one call of a response."""
    (call,) = response.output
    assert (call.type, call.name) == ("function_call", "read_file")
    assert json.loads(call.arguments) == ARGUMENTS
    assert call.call_id
    return call


def result_of(call):
    return {"type": "function_call_output", "call_id": call.call_id, "output": ""}


def reuses(response, before):
    """Everything that was fed and sampled before is found again."""
    known = before.usage.input_tokens + before.usage.output_tokens
    assert response.usage.input_tokens_details.cached_tokens >= known - 1
    return response


@pytest.mark.parametrize("choice", FORCED, ids=["required", "named"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("store", [True, False], ids=["by id", "by replay"])
def test_the_openai_client_over_http(client, choice, stream, store):
    def turn(**body):
        body |= {"model": MODEL, "tools": [TOOL], "store": store}
        if not stream:
            return client.responses.create(**body)
        with client.responses.stream(**body) as events:
            return events.get_final_response()

    asked = [{"role": "user", "content": "What is in notes.txt?"}]
    first = turn(input=asked, tool_choice=choice)
    result = result_of(called(first))
    history = [*asked, *first.output]
    if store:
        second = turn(input=[result], previous_response_id=first.id)
    else:
        second = turn(input=[*history, result])
    assert reuses(second, first).output_text == ANSWER
    more = {"role": "user", "content": "And in todo.txt?"}
    if store:
        third = turn(input=[more], previous_response_id=second.id)
    else:
        third = turn(input=[*history, result, *second.output, more])
    called(reuses(third, second))


@pytest.mark.parametrize("store", [True, False])
def test_the_openai_clients_socket_with_lanes_and_a_fork(client, store):
    with client.responses.connect() as connection:
        with ResponsesWebSocketSession(connection, limits=LIMITS) as session:
            main, fork = session.lane("main"), session.lane("fork")

            def ask(lane, given, **body):
                lane.send(
                    {
                        "type": "response.create",
                        "model": MODEL,
                        "tools": [TOOL],
                        "store": store,
                        "input": given,
                        **body,
                    }
                )

            ask(main, "What is in notes.txt?", tool_choice="required")
            first = main.get_final_response(timeout=60)
            result = result_of(called(first))

            ask(fork, [result], previous_response_id=first.id)
            while fork.recv(timeout=60).type != "response.in_progress":
                pass  # from here on the source lane may go on
            ask(main, [result], previous_response_id=first.id)
            for lane in (fork, main):
                answer = reuses(lane.get_final_response(timeout=60), first)
                assert answer.output_text == ANSWER
                assert answer.previous_response_id == first.id

            main.send(
                {"type": "response.steer", "previous_response_id": answer.id, "input": "Stop."}
            )
            late = main.recv(timeout=60)
            assert (late.type, late.error.code) == (
                "response.steer.failed",
                "response_already_completed",
            )
            ask(session.default, "What is in notes.txt?")
            called(session.default.get_final_response(timeout=60))
            ask(fork, "x", previous_response_id="resp_nobody")
            with pytest.raises(ResponsesWebSocketError) as refused:
                fork.get_final_response(timeout=60)
            assert refused.value.event.error.code == "previous_response_not_found"
            assert refused.value.event.status == 400


def test_the_openai_clients_accumulator_understands_every_event(client):
    accumulator = ResponsesWebSocketAccumulator()
    with client.responses.connect() as connection:
        connection.response.create(model=MODEL, input="Read notes.txt", tools=[TOOL], store=False)
        for event in connection:
            accumulator.add_event(event)
            if event.type == "response.completed":
                break
    (item,) = accumulator.snapshot().output
    assert json.loads(item.arguments) == ARGUMENTS
    called(accumulator.get_final_response())


def test_openai_agents_over_its_websocket(forced):
    asked_for = []

    @function_tool
    def read_file(path: str) -> str:
        """Read a file."""
        asked_for.append(path)
        return ""

    async def converse():
        agent = Agent(
            name="reader",
            instructions="Be brief.",
            model=MODEL,
            tools=[read_file],
            model_settings=ModelSettings(tool_choice="required"),
        )
        base_url = forced.url + "/v1"
        async with responses_websocket_session(api_key="none", base_url=base_url) as session:
            first = await session.run(agent, "What is in notes.txt?")
            again = [*first.to_input_list(), {"role": "user", "content": "And in todo.txt?"}]
            return first, await session.run(agent, again)

    set_tracing_disabled(disabled=True)
    first, second = asyncio.run(converse())
    assert (first.final_output, second.final_output) == (ANSWER, ANSWER)
    assert asked_for == ["notes.txt"] * 2
    turns = [*first.raw_responses, *second.raw_responses]
    assert len(turns) == 4
    for before, after in itertools.pairwise(turns):
        known = before.usage.input_tokens + before.usage.output_tokens
        assert after.usage.input_tokens_details.cached_tokens >= known - 1


@pytest.mark.parametrize("choice", FORCED, ids=["required", "named"])
def test_websockets(forced, choice):
    with connect(forced.url.replace("http", "ws") + "/v1/responses") as socket:

        def turn(**body):
            socket.send(
                json.dumps({"type": "response.create", "store": False, "tools": [TOOL], **body})
            )
            while True:
                event = json.loads(socket.recv(timeout=60))
                assert event["type"] not in ("error", "response.failed"), event
                if event["type"] in ("response.completed", "response.incomplete"):
                    return event["response"]

        first = turn(input="What is in notes.txt?", tool_choice=choice)
        (call,) = first["output"]
        assert json.loads(call["arguments"]) == ARGUMENTS
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": ""}
        second = turn(input=[result], previous_response_id=first["id"])
        assert second["output"][0]["content"][0]["text"] == ANSWER
        known = first["usage"]["input_tokens"] + first["usage"]["output_tokens"]
        assert second["usage"]["input_tokens_details"]["cached_tokens"] >= known - 1
