"""The official client, unchanged but for its base URL."""

from typing import Literal

import openai
import pydantic
import pytest

MODEL = "smollm2-135m-instruct"
QUIET = {"temperature": 0, "max_output_tokens": 8}
TOOL = {
    "type": "function",
    "name": "read_file",
    "description": "Read a file.",
    "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    "strict": None,
}


@pytest.fixture
def client(daemon):
    with openai.OpenAI(base_url=daemon.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_create_answers_with_text_and_measured_usage(client):
    response = client.responses.create(model=MODEL, input="Say hello.", **QUIET)
    assert response.status in ("completed", "incomplete")
    assert response.output_text
    usage = response.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 < usage.output_tokens <= QUIET["max_output_tokens"]
    by_tier = usage.model_extra["homeport:cached_by_tier"]
    assert sum(by_tier.values()) == usage.input_tokens_details.cached_tokens


def test_a_stream_says_the_same_as_the_whole_answer(client):
    whole = client.responses.create(model=MODEL, input="Count to five.", **QUIET)
    deltas, last = [], None
    with client.responses.create(
        model=MODEL, input="Count to five.", stream=True, **QUIET
    ) as events:
        for number, event in enumerate(events):
            assert event.sequence_number == number
            if event.type == "response.output_text.delta":
                deltas.append(event.delta)
            last = event
    assert "".join(deltas) == whole.output_text == last.response.output_text


def test_a_chain_by_previous_response_id_reuses_everything_said(client):
    first = client.responses.create(
        model=MODEL, input="Remember the number four.", instructions="Be brief.", **QUIET
    )
    second = client.responses.create(
        model=MODEL,
        input="Which number?",
        instructions="Be brief.",
        previous_response_id=first.id,
        **QUIET,
    )
    assert second.previous_response_id == first.id
    known = first.usage.input_tokens + first.usage.output_tokens
    assert second.usage.input_tokens_details.cached_tokens >= known - 1


def test_a_tool_result_continues_the_turn(client):
    first = client.responses.create(model=MODEL, input="Read notes.txt", tools=[TOOL], **QUIET)
    call = {"type": "function_call", "call_id": "call_1", "name": "read_file", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "call_1", "output": "It is empty."}
    asked = {"role": "user", "content": "Read notes.txt"}
    second = client.responses.create(
        model=MODEL, input=[asked, call, result], tools=[TOOL], **QUIET
    )
    assert second.usage.input_tokens > first.usage.input_tokens
    assert second.tools[0].name == "read_file"


class Choice(pydantic.BaseModel):
    color: Literal["red", "blue"]
    loud: bool


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_parses_into_the_clients_own_type(client, temperature):
    response = client.responses.parse(
        model=MODEL,
        input="Choose.",
        text_format=Choice,
        temperature=temperature,
        max_output_tokens=200,
        top_logprobs=1,
        include=["message.output_text.logprobs"],
    )
    assert isinstance(response.output_parsed, Choice)
    [part] = response.output[0].content
    assert "".join(token.token for token in part.logprobs) == part.text
    assert all(token.logprob <= token.top_logprobs[0].logprob for token in part.logprobs)


def test_a_forced_call_streams_and_fits_the_clients_own_type(client):
    with client.responses.stream(
        model=MODEL,
        input="Hi.",
        tools=[TOOL, {"type": "function", **openai.pydantic_function_tool(Choice)["function"]}],
        tool_choice={"type": "function", "name": "Choice"},
        temperature=1,
        max_output_tokens=200,
    ) as stream:
        kinds = [event.type for event in stream]
        [call] = stream.get_final_response().output
    assert "response.function_call_arguments.delta" in kinds
    Choice.model_validate_json(call.arguments)


def test_a_schema_that_cannot_be_enforced_is_the_clients_own_exception(client):
    form = {"type": "json_schema", "name": "n", "strict": True, "schema": {"uniqueItems": True}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=MODEL, input="Hi.", text={"format": form}, **QUIET)
    assert (refused.value.code, refused.value.param) == (
        "invalid_json_schema",
        "text.format.schema",
    )


def test_stored_responses_can_be_read_and_deleted(client):
    response = client.responses.create(model=MODEL, input="Say yes.", **QUIET)
    again = client.responses.retrieve(response.id)
    assert again.to_dict() == response.to_dict()
    assert [item.role for item in client.responses.input_items.list(response.id)] == ["user"]
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_an_unstored_response_cannot_be_read(client):
    response = client.responses.create(model=MODEL, input="Say no.", store=False, **QUIET)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_the_model_may_be_omitted_and_is_listed(client):
    assert MODEL in [model.id for model in client.models.list()]
    response = client.responses.create(input="Hi.", **QUIET)
    assert response.model == MODEL


def test_errors_arrive_as_the_clients_own_exceptions(client):
    with pytest.raises(openai.BadRequestError) as unknown:
        client.responses.create(input="Hi.", previous_response_id="resp_unknown", **QUIET)
    assert unknown.value.code == "previous_response_not_found"
    with pytest.raises(openai.NotFoundError) as model:
        client.responses.create(model="gpt-unknown", input="Hi.", **QUIET)
    assert model.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.responses.create(input="word " * 20_000, **QUIET)
    assert long.value.code == "context_length_exceeded"


# openai 3.54 opens its socket in a way that websockets 17.1 deprecates: theirs to mend.
@pytest.mark.filterwarnings(r"ignore:connect\(\) must be used:DeprecationWarning")
def test_its_websocket_connection_runs_turns(client):
    with client.responses.connect() as connection:
        connection.response.create(
            model=MODEL, input="Say hello.", temperature=0, max_output_tokens=8
        )
        first = _terminal(connection)
        connection.response.create(
            model=MODEL,
            input="Once more.",
            previous_response_id=first.id,
            temperature=0,
            max_output_tokens=8,
        )
        second = _terminal(connection)
    known = first.usage.input_tokens + first.usage.output_tokens
    assert second.usage.input_tokens_details.cached_tokens >= known - 1


def _terminal(connection):
    for event in connection:
        if event.type in ("response.completed", "response.incomplete"):
            return event.response
        assert event.type not in ("error", "response.failed"), event
    raise AssertionError("the connection ended without a terminal event")
