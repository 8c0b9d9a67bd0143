"""Chat Completions against a fake engine, over socket pairs."""

import json

import pytest
import trio
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionDeleted

from tests.broker.rig import open_rig
from tests.broker.wire.chat_bodies import LANGCHAIN, VERCEL
from tests.broker.wire.chat_grammar import check_completion, read_body
from tests.fakes import echoing_sum, saying

PATH = "/v1/chat/completions"
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "Hi."}
FUNCTION = {"name": "ls", "description": "List.", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
FLAT = {"type": "function", **FUNCTION}
FORCED = '<tool_call>\n{"name": "ls", "arguments": {"path": "é"}}\n</tool_call>'
CALL = 'ok <tool_call>{"name": "ls", "arguments": {"path": "é"}}</tool_call>'


async def chat(browser, *messages, **fields):
    return await browser.request("POST", PATH, {"messages": list(messages), **fields})


def said(answer):
    """The message of a completion, as the official client sends it back."""
    return ChatCompletion.model_validate(answer.json).choices[0].message.to_dict()


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
        options = {"include_usage": include_usage}
        answer = await chat(browser, ASKED, tools=[TOOL], stream=True, stream_options=options)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        read = read_body(answer.body, include_usage=include_usage)
        message = check_completion(whole)
        assert read.content == message["content"] == "ok "
        [streamed], [told] = read.calls, message["tool_calls"]
        assert streamed["function"] == told["function"]
        assert told["function"] == {"name": "ls", "arguments": '{"path": "é"}'}
        assert read.finish_reason == whole["choices"][0]["finish_reason"] == "tool_calls"
        for chunk in map(json.loads, answer.body.decode().split("data: ")[1:-1]):
            ChatCompletionChunk.model_validate(chunk, strict=True)


async def test_a_tools_result_goes_on_from_what_was_sampled():
    async with open_rig(reply=saying(CALL, "Done.")) as rig:
        browser = rig.browser()
        first = await chat(browser, SYSTEM, ASKED, tools=[TOOL])
        message = said(first)
        [call] = message["tool_calls"]
        result = {"role": "tool", "tool_call_id": call["id"], "content": "a.txt"}
        second = await chat(browser, SYSTEM, ASKED, message, result, tools=[TOOL])
        assert check_completion(second.json)["content"] == "Done."
        known = first.json["usage"]["total_tokens"]
        assert second.json["usage"]["prompt_tokens_details"]["cached_tokens"] >= known - 1
        before, after = rig.engine.submitted
        sampled = (*CALL.encode(), 257)
        assert after.prompt[: len(before.prompt) + len(sampled)] == before.prompt + sampled


async def test_a_system_message_that_changed_is_answered_and_blamed():
    """The time in it was a status 500: what stands before the first message was rendered as a conversation of none."""
    async with open_rig() as rig:
        browser = rig.browser()
        first = await chat(browser, {"role": "system", "content": "It is 9:00."}, ASKED)
        later = {"role": "system", "content": "It is 9:01."}
        second = await chat(browser, later, ASKED, said(first), ASKED)
        assert check_completion(second.json)["content"] == "Hello there."
        assert second.json["homeport:cache"]["part"] == "input[0]"


async def test_a_streamed_turn_is_gone_on_from_as_well():
    async with open_rig(reply=saying(CALL, "Done.")) as rig:
        browser = rig.browser()
        first = read_body((await chat(browser, ASKED, tools=[TOOL], stream=True)).body)
        result = {"role": "tool", "tool_call_id": first.calls[0]["id"], "content": "a.txt"}
        await chat(browser, ASKED, first.message, result, tools=[TOOL])
        before, after = rig.engine.submitted
        assert after.prompt[: len(before.prompt)] == before.prompt
        assert after.supersedes is not None, "the turn was recognised, and its lease taken over"


async def test_the_same_conversation_is_the_same_prompt_over_either_api():
    """Whichever way Responses is given the system text, and whoever said the answer in between."""
    async with open_rig(reply=echoing_sum) as rig:
        browser = rig.browser()
        first = await chat(browser, SYSTEM, ASKED, tools=[TOOL])
        again = {"role": "user", "content": "Again."}
        await chat(browser, SYSTEM, ASKED, said(first), again, tools=[TOOL])
        answer = {"role": "assistant", "content": said(first)["content"]}
        for body in (
            {"instructions": SYSTEM["content"], "input": [ASKED]},
            {"input": [SYSTEM, ASKED]},
            {"instructions": SYSTEM["content"], "input": [ASKED, answer, again]},
            {"input": [SYSTEM, ASKED, answer, again]},
        ):
            await browser.request("POST", "/v1/responses", {**body, "tools": [FLAT]})
        short, long, *responses = [submit.prompt for submit in rig.engine.submitted]
        assert responses == [short, short, long, long]


async def test_a_turn_of_responses_is_gone_on_from_by_chat():
    async with open_rig(reply=saying(CALL, "Done.")) as rig:
        browser = rig.browser()
        body = {"instructions": SYSTEM["content"], "input": [ASKED], "tools": [FLAT]}
        first = (await browser.request("POST", "/v1/responses", body)).json
        text, call = first["output"]
        function = {"name": call["name"], "arguments": call["arguments"]}
        message = {
            "role": "assistant",
            "content": text["content"][0]["text"],
            "tool_calls": [{"id": call["call_id"], "type": "function", "function": function}],
        }
        result = {"role": "tool", "tool_call_id": call["call_id"], "content": "a.txt"}
        second = await chat(browser, SYSTEM, ASKED, message, result, tools=[TOOL])
        known = first["usage"]["total_tokens"]
        assert second.json["usage"]["prompt_tokens_details"]["cached_tokens"] >= known - 1


async def test_a_completion_is_stored_only_if_the_client_says_so():
    async with open_rig() as rig:
        browser = rig.browser()
        unstored = (await chat(browser, ASKED)).json
        assert (await browser.request("GET", f"{PATH}/{unstored['id']}")).status == 404
        created = (await chat(browser, ASKED, store=True, metadata={"a": "b"})).json
        assert created["metadata"] == {"a": "b"}
        path = f"{PATH}/{created['id']}"
        assert (await browser.request("GET", path)).json == created
        rig.port.sessions.forget("", created["id"].replace("chatcmpl-", "resp_"))
        assert (await browser.request("GET", path)).json == created, "from its manifest"
        deleted = await browser.request("DELETE", path)
        assert deleted.json == {
            "id": created["id"],
            "object": "chat.completion.deleted",
            "deleted": True,
        }
        ChatCompletionDeleted.model_validate(deleted.json, strict=True)
        for method in ("GET", "DELETE"):
            answer = await browser.request(method, path)
            assert (answer.status, answer.code) == (404, "not_found")


async def test_a_stored_completion_is_a_response_and_the_other_way_round():
    async with open_rig(reply=saying(CALL)) as rig:
        browser = rig.browser()
        created = (await chat(browser, ASKED, store=True, tools=[TOOL])).json
        name = created["id"].removeprefix("chatcmpl-")
        response = (await browser.request("GET", f"/v1/responses/resp_{name}")).json
        assert response["tools"] == [FLAT | {"strict": None}]
        more = {"input": "More.", "previous_response_id": response["id"]}
        second = (await browser.request("POST", "/v1/responses", more)).json
        known = created["usage"]["total_tokens"]
        assert second["usage"]["input_tokens_details"]["cached_tokens"] >= known - 1
        name = second["id"].removeprefix("resp_")
        check_completion((await browser.request("GET", f"{PATH}/chatcmpl-{name}")).json)
        for other in (second["id"], f"chatcmpl_{name}", "chatcmpl-"):
            assert (await browser.request("GET", f"{PATH}/{other}")).status == 404


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, "invalid_json", None),
        (b"[]", 400, "invalid_type", "body"),
        ({}, 400, "missing_required_parameter", "messages"),
        ({"messages": [ASKED], "model": "other"}, 404, "model_not_found", "model"),
        ({"messages": [ASKED], "n": 3}, 400, "unsupported_parameter", "n"),
        (
            {"messages": [{"role": "tool", "tool_call_id": "c", "content": "r"}]},
            400,
            "invalid_value",
            "messages[0].tool_call_id",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 5000}]},
            400,
            "context_length_exceeded",
            "messages",
        ),
    ],
)
async def test_a_refusal_has_its_status_and_openais_shape_also_when_a_stream_was_asked_for(
    stream, body, status, code, param
):
    async with open_rig() as rig:
        if isinstance(body, dict):
            body = {**body, "stream": stream}
        browser = rig.browser()
        answer = await browser.request("POST", PATH, body)
        assert answer.status == status
        assert answer.json.keys() == {"error"}
        error = answer.json["error"]
        assert (error["code"], error["param"]) == (code, param)
        assert error["type"] == "invalid_request_error"
        assert (await browser.request("GET", "/healthz")).status == 200


async def test_a_turn_that_breaks_is_a_500_as_json_and_an_error_without_done_as_a_stream():
    async with open_rig() as rig:
        rig.engine.faults.fail_after = 2
        browser = rig.browser()
        answer = await chat(browser, ASKED)
        assert (answer.status, answer.code) == (500, "server_error")
        answer = await chat(browser, ASKED, stream=True)
        read = read_body(answer.body)
        assert (answer.status, read.content, read.error["code"]) == (200, "He", "server_error")


async def test_a_silent_stream_says_empty_chunks(autojump_clock):
    async with open_rig() as rig:
        rig.engine.hold()
        browser = rig.browser()
        await browser.send("POST", PATH, {"messages": [ASKED], "stream": True})
        with trio.move_on_after(35):
            await browser.answer()
        rig.engine.go()
        read = read_body((await browser.answer()).body)
        assert read.content == "Hello there."
        assert read.blanks >= 3


async def test_the_answer_is_bounded_by_the_context_whatever_was_asked_for():
    async with open_rig(max_context=200) as rig:
        browser = rig.browser()
        await chat(browser, ASKED, max_tokens=2**31 - 1)
        await chat(browser, ASKED)
        for submit in rig.engine.submitted:
            assert submit.sampling.max_tokens == 200 - len(submit.prompt)
        answer = await chat(browser, ASKED, max_completion_tokens=3)
        assert check_completion(answer.json)["content"] == "Hel"
        assert answer.json["choices"][0]["finish_reason"] == "length"


async def test_a_stop_string_ends_the_answer_as_a_stop():
    async with open_rig() as rig:
        answer = await chat(rig.browser(), ASKED, stop="there")
        assert check_completion(answer.json)["content"] == "Hello "
        assert answer.json["choices"][0]["finish_reason"] == "stop"


async def test_a_prompt_cache_key_names_the_session():
    async with open_rig() as rig:
        await chat(rig.browser(), ASKED, prompt_cache_key="thread")
        assert rig.engine.submitted[0].session == "thread"


async def test_headers_that_name_a_session_have_its_kv_fetched_before_the_body_is_read():
    async with open_rig() as rig:
        browser = rig.browser()
        await browser.request("POST", PATH, {"messages": [ASKED]}, session_id="s")
        (node,) = rig.port.sessions.of_session("", "s")
        rig.clock.time += 60
        answer = await browser.request("POST", PATH, b"no JSON", session_id="s")
        assert answer.status == 400
        assert rig.engine.prefetched == [node.tokens]


@pytest.mark.parametrize(
    ("body", "said", "calls"),
    [(LANGCHAIN, FORCED, ["ls"]), (VERCEL, "Hello there.", [])],
    ids=["langchain", "vercel"],
)
async def test_what_frameworks_send_is_answered(body, said, calls):
    async with open_rig(reply=saying(said)) as rig:
        read = read_body((await rig.browser().request("POST", PATH, body)).body, include_usage=True)
        assert (read.error, read.content) == (None, "" if calls else said)
        assert [call["function"]["name"] for call in read.calls] == calls
