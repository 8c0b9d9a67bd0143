"""The official client of the Messages API, unchanged but for its base URL."""

import anthropic
import pytest

MODEL = "smollm2-135m-instruct"
# This client has no parameter for it any more; its API still has.
QUIET = {"model": MODEL, "extra_body": {"temperature": 0}, "max_tokens": 8}
MARK = {"type": "ephemeral"}
LS = {
    "name": "read_file",
    "description": "Read a file.",
    "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}},
}
# Over `messages.cache_min_tokens`: below it nothing counts as cached.
INSTRUCTIONS = "You work on a repository and answer briefly. " * 120


@pytest.fixture
def client(daemon):
    with anthropic.Anthropic(base_url=daemon.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_message_has_text_and_measured_usage(client):
    message = client.messages.create(messages=[{"role": "user", "content": "Say hello."}], **QUIET)
    assert message.content[0].text
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert 0 < message.usage.output_tokens <= 8
    by_tier = message.usage.model_extra["homeport:cached_by_tier"]
    assert sum(by_tier.values()) < message.usage.input_tokens


def test_a_stream_says_the_same_as_the_whole_message(client):
    said = {"messages": [{"role": "user", "content": "Count to five."}], **QUIET}
    whole = client.messages.create(**said)
    with client.messages.stream(**said) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.input_tokens == whole.usage.input_tokens
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_conversation_with_a_tool_reads_from_the_cache_what_it_wrote(client):
    """The counters rise from turn to turn, and never above what the engine did not compute."""
    system = [{"type": "text", "text": INSTRUCTIONS, "cache_control": MARK}]
    asked = {"system": system, "tools": [LS], **QUIET}
    messages = [{"role": "user", "content": "Which file do you want to read?"}]
    first = client.messages.create(messages=messages, cache_control=MARK, **asked)
    assert first.usage.cache_read_input_tokens == 0
    assert first.usage.cache_creation_input_tokens > 1024
    written = first.usage.cache_creation_input_tokens

    use = {"type": "tool_use", "id": "toolu_1", "name": "read_file", "input": {"path": "a.txt"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "It is empty."}
    messages += [
        {"role": "assistant", "content": [*first.to_param()["content"], use]},
        {"role": "user", "content": [result]},
    ]
    second = client.messages.create(messages=messages, cache_control=MARK, **asked)
    assert second.usage.cache_read_input_tokens == written
    assert second.usage.cache_creation_input_tokens > 0

    messages += [
        second.to_param(),
        {
            "role": "user",
            "content": [{"type": "text", "text": "Thank you.", "cache_control": MARK}],
        },
    ]
    third = client.messages.create(messages=messages, **asked)
    known = written + second.usage.cache_creation_input_tokens
    assert third.usage.cache_read_input_tokens == known
    for message in (second, third):
        by_tier = message.usage.model_extra["homeport:cached_by_tier"]
        assert sum(by_tier.values()) >= message.usage.cache_read_input_tokens

    counted = client.messages.count_tokens(
        model=MODEL, messages=messages, system=system, tools=[LS]
    )
    used = third.usage
    total = used.input_tokens + used.cache_creation_input_tokens + used.cache_read_input_tokens
    assert counted.input_tokens == total


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "read_file"}])
def test_a_forced_call_is_one_and_its_result_continues_it(client, choice):
    path = {"type": "string", "maxLength": 12}
    schema = {"type": "object", "properties": {"path": path}, "required": ["path"]}
    asked = {**QUIET, "max_tokens": 64, "system": INSTRUCTIONS, "cache_control": MARK}
    asked["tools"] = [{**LS, "input_schema": {**schema, "additionalProperties": False}}]
    messages = [{"role": "user", "content": f"Read a file, by {choice['type']}."}]
    first = client.messages.create(
        messages=messages, tool_choice={**choice, "disable_parallel_tool_use": True}, **asked
    )
    assert first.stop_reason == "tool_use"
    (use,) = [block for block in first.content if block.type == "tool_use"]
    assert use.name == "read_file"
    assert use.input.keys() == {"path"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "It is empty."}
    messages += [first.to_param(), {"role": "user", "content": [result]}]
    second = client.messages.create(messages=messages, **asked)
    said = first.usage.cache_read_input_tokens + first.usage.cache_creation_input_tokens
    assert second.usage.cache_read_input_tokens >= said > 1024


def test_a_prewarm_computes_and_says_nothing(client):
    system = [{"type": "text", "text": "Prewarmed. " + INSTRUCTIONS, "cache_control": MARK}]
    messages = [{"role": "user", "content": "Hi."}]
    warm = client.messages.create(messages=messages, system=system, **{**QUIET, "max_tokens": 0})
    assert (warm.content, warm.stop_reason) == ([], "max_tokens")
    message = client.messages.create(messages=messages, system=system, **QUIET)
    assert message.usage.cache_read_input_tokens == warm.usage.cache_creation_input_tokens > 1024


def test_models_are_listed_and_found(client):
    listed = [model.id for model in client.models.list()]
    assert listed == [MODEL]
    assert client.models.retrieve(MODEL).max_input_tokens == 8192


def test_errors_arrive_as_the_clients_own_exceptions(client):
    with pytest.raises(anthropic.BadRequestError) as prefill:
        client.messages.create(
            messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            **QUIET,
        )
    assert prefill.value.body["error"]["type"] == "invalid_request_error"
    assert prefill.value.request_id.startswith("req_")
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(
            messages=[{"role": "user", "content": "a"}], **{**QUIET, "model": "claude-unknown"}
        )
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(messages=[{"role": "user", "content": "word " * 20_000}], **QUIET)
