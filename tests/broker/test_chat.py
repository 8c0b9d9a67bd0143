"""Chat Completions against a fake engine, over socket pairs."""

import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.broker.rig import open_rig
from tests.broker.wire.chat_grammar import check_completion, read_body
from tests.fakes import saying

PATH = "/v1/chat/completions"
ASKED = {"role": "user", "content": "Hi."}
TOOL = {
    "type": "function",
    "function": {"name": "ls", "description": "List.", "parameters": {"type": "object"}},
}
FLAT = {"type": "function", **TOOL["function"]}
CALL = 'ok <tool_call>{"name": "ls", "arguments": {"path": "é"}}</tool_call>'


async def chat(browser, *messages, **fields):
    return await browser.request("POST", PATH, {"messages": list(messages), **fields})


async def test_a_post_is_one_completion():
    async with open_rig() as rig:
        answer = await chat(rig.browser(), ASKED)
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert check_completion(answer.json)["content"] == "Hello there."
        assert answer.json["choices"][0]["finish_reason"] == "stop"
        assert answer.json["model"] == rig.config.model.name
        assert answer.json["created"] == rig.clock.time
        ChatCompletion.model_validate(answer.json, strict=True)


@pytest.mark.parametrize("include_usage", [True, False])
async def test_a_streamed_post_is_chunks_that_say_the_same_as_the_whole_completion(include_usage):
    async with open_rig(reply=saying(CALL)) as rig:
        browser = rig.browser()
        whole = (await chat(browser, ASKED, tools=[TOOL])).json
        answer = await chat(
            browser,
            ASKED,
            tools=[TOOL],
            stream=True,
            stream_options={"include_usage": include_usage},
        )
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.body.endswith(b"\n\ndata: [DONE]\n\n")
        read = read_body(answer.body, include_usage=include_usage)
        message = check_completion(whole)
        assert read.content == message["content"] == "ok "
        [said], [told] = read.calls, message["tool_calls"]
        assert said["function"] == told["function"] == {"name": "ls", "arguments": '{"path": "é"}'}
        assert read.finish_reason == whole["choices"][0]["finish_reason"] == "tool_calls"
        for chunk in map(json.loads, answer.body.decode().split("data: ")[1:-1]):
            ChatCompletionChunk.model_validate(chunk, strict=True)
