"""The official client on a real daemon: what a response outlives, its client and the daemon among it."""

import openai
import pytest

MODEL = "smollm2-135m-instruct"
QUIET = {"model": MODEL, "temperature": 0, "max_output_tokens": 8}


@pytest.fixture(scope="module")
def restless(new_daemon):
    """A daemon that these tests kill."""
    return new_daemon()


@pytest.fixture
def client(restless):
    with connected(restless) as client:
        yield client


def connected(daemon):
    return openai.OpenAI(base_url=daemon.url + "/v1", api_key="none", max_retries=0)


def polled(client, response_id):
    """Ask until it is over; each answer takes the daemon a moment, so this is no busy loop."""
    while True:
        response = client.responses.retrieve(response_id)
        if response.status not in ("queued", "in_progress"):
            return response


def test_input_tokens_are_those_of_the_turn(client):
    body = {"model": MODEL, "input": "Say hello.", "instructions": "Be brief."}
    counted = client.responses.input_tokens.count(**body)
    assert (
        counted.input_tokens
        == client.responses.create(**body, max_output_tokens=1).usage.input_tokens
    )


def test_a_background_stream_is_dropped_and_read_on(client):
    events = []
    with client.responses.create(
        input="Count to five.", background=True, stream=True, **QUIET
    ) as stream:
        for event in stream:
            events.append(event)
            if event.type == "response.queued":
                break
    response_id = events[0].response.id
    assert events[-1].response.status == "queued"
    with client.responses.retrieve(
        response_id, stream=True, starting_after=events[-1].sequence_number
    ) as stream:
        events += list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    final = events[-1].response
    assert "".join(deltas) == final.output_text == polled(client, response_id).output_text
    whole = client.responses.create(input="Count to five.", **QUIET)
    assert whole.output_text == final.output_text


def test_a_background_response_is_cancelled_and_stays_so(client):
    long = QUIET | {"max_output_tokens": 4000, "temperature": 1}
    response = client.responses.create(input="Write a novel.", background=True, **long)
    assert response.status == "queued"
    cancelled = client.responses.cancel(response.id)
    assert cancelled.status == "cancelled"
    assert client.responses.cancel(response.id).status == "cancelled"
    assert client.responses.retrieve(response.id).status == "cancelled"


# The SDK's types know no user's message in an output, which is where its API puts them: theirs to mend.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
def test_a_compacted_window_begins_another_chain(client):
    first = client.responses.create(input="My name is Ada.", **QUIET)
    window = client.responses.compact(model=MODEL, previous_response_id=first.id)
    assert window.object == "response.compaction"
    assert [item.type for item in window.output] == ["message", "compaction"]
    asked = {"role": "user", "content": "What is my name?"}
    second = client.responses.create(input=[*window.output, asked], **QUIET)
    assert second.status in ("completed", "incomplete")
    third = client.responses.create(input="Sure?", previous_response_id=second.id, **QUIET)
    known = second.usage.input_tokens + second.usage.output_tokens
    assert third.usage.input_tokens_details.cached_tokens >= known - 1


def test_after_a_kill_a_conversation_goes_on_from_its_kv_and_what_ran_is_answered_for(restless):
    with connected(restless) as client:
        conversation = client.conversations.create(metadata={"topic": "tea"})
        first = client.responses.create(
            input="I like green tea.", conversation=conversation.id, **QUIET
        )
        assert first.conversation.id == conversation.id
        long = QUIET | {"max_output_tokens": 4000, "temperature": 1}
        running = client.responses.create(input="Write a novel.", background=True, **long)
    restless.kill()
    restless.start()
    with connected(restless) as client:
        ended = client.responses.retrieve(running.id)
        assert (ended.status, ended.error.code) == ("failed", "server_error")
        assert client.conversations.retrieve(conversation.id).metadata == {"topic": "tea"}
        items = client.conversations.items.list(conversation.id, order="asc")
        assert [item.role for item in items] == ["user", "assistant"]
        second = client.responses.create(
            input="What do I like?", conversation=conversation.id, **QUIET
        )
        usage = second.usage
        known = first.usage.input_tokens + first.usage.output_tokens
        assert usage.input_tokens_details.cached_tokens >= known - 1
        assert usage.model_extra["homeport:cached_by_tier"]["disk"] > 0
        assert len(list(client.conversations.items.list(conversation.id))) == 4
        assert client.conversations.delete(conversation.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.conversations.retrieve(conversation.id)
