"""The official client's Chat Completions, unchanged but for its base URL."""

import openai
import pytest

MODEL = "smollm2-135m-instruct"
QUIET = {"model": MODEL, "temperature": 0, "max_completion_tokens": 8}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Read a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}


@pytest.fixture
def client(daemon):
    with openai.OpenAI(base_url=daemon.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(text):
    return {"role": "user", "content": text}


def cached(usage):
    details = usage.prompt_tokens_details
    assert sum(usage.model_extra["homeport:cached_by_tier"].values()) == details.cached_tokens
    return details.cached_tokens


def test_a_second_turn_finds_all_of_the_first(client):
    """The message goes back as the client's own object, as its documentation shows."""
    messages = [SYSTEM, ask("Remember the number four.")]
    first = client.chat.completions.create(messages=messages, **QUIET)
    assert first.choices[0].message.content
    assert first.choices[0].finish_reason in ("stop", "length")
    messages += [first.choices[0].message, ask("Which number?")]
    second = client.chat.completions.create(messages=messages, **QUIET)
    assert cached(second.usage) >= first.usage.total_tokens - 1
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens


def test_a_stream_says_the_same_as_the_whole_answer_and_counts(client):
    messages = [SYSTEM, ask("Count to five.")]
    whole = client.chat.completions.create(messages=messages, **QUIET)
    *chunks, last = client.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **QUIET
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == (
        whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert cached(last.usage) == last.usage.prompt_tokens - 1


def test_its_stream_helper_puts_the_chunks_together(client):
    with client.chat.completions.stream(messages=[ask("Say hello.")], **QUIET) as stream:
        said = "".join(event.delta for event in stream if event.type == "content.delta")
        [choice] = stream.current_completion_snapshot.choices
        assert choice.message.content == said


def test_a_tools_result_continues_the_conversation(client):
    """What a 135M model calls is anybody's guess, so its call is written here."""
    call = {"name": "read_file", "arguments": '{"path": "notes.txt"}'}
    calls = [{"id": "call_1", "type": "function", "function": call}]
    asked = [SYSTEM, ask("Read notes.txt")]
    first = client.chat.completions.create(messages=asked, tools=[TOOL], **QUIET)
    answered = [
        *asked,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "It is empty."},
    ]
    second = client.chat.completions.create(messages=answered, tools=[TOOL], **QUIET)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert cached(second.usage) >= first.usage.prompt_tokens - 1
    message = second.choices[0].message
    third = client.chat.completions.create(
        messages=[*answered, message, ask("Thanks.")], tools=[TOOL], **QUIET
    )
    assert cached(third.usage) >= second.usage.total_tokens - 1


def test_one_conversation_goes_over_either_api_and_keeps_its_cache(client):
    asked = ask("Remember the colour blue.")
    first = client.responses.create(
        model=MODEL,
        instructions=SYSTEM["content"],
        input=[asked],
        temperature=0,
        max_output_tokens=8,
    )
    answer = {"role": "assistant", "content": first.output_text}
    messages = [SYSTEM, asked, answer, ask("Which colour?")]
    second = client.chat.completions.create(messages=messages, **QUIET)
    assert cached(second.usage) >= first.usage.total_tokens - 1
    third = client.responses.create(
        model=MODEL,
        instructions=SYSTEM["content"],
        input=[
            *messages[1:],
            {"role": "assistant", "content": second.choices[0].message.content},
            ask("Sure?"),
        ],
        temperature=0,
        max_output_tokens=8,
    )
    assert third.usage.input_tokens_details.cached_tokens >= second.usage.total_tokens - 1


def test_stored_completions_can_be_read_and_deleted(client):
    created = client.chat.completions.create(messages=[ask("Say yes.")], store=True, **QUIET)
    assert client.chat.completions.retrieve(created.id).to_dict() == created.to_dict()
    assert client.chat.completions.delete(created.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(created.id)


@pytest.mark.parametrize("stream", [True, False])
def test_errors_arrive_as_the_clients_own_exceptions(client, stream):
    orphan = {"role": "tool", "tool_call_id": "call_x", "content": "r"}
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(messages=[orphan], stream=stream, **QUIET)
    assert (wrong.value.code, wrong.value.param) == ("invalid_value", "messages[0].tool_call_id")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(messages=[ask("word " * 20_000)], stream=stream, **QUIET)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as model:
        client.chat.completions.create(model="gpt-unknown", messages=[ask("Hi.")], stream=stream)
    assert model.value.code == "model_not_found"
