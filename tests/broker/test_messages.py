"""Anthropic Messages over HTTP against a fake engine."""

import json
import re

import anthropic.types
import pytest
import trio

from broker.wire.messages_ids import response_id
from engine.api import RefuseReason
from engine.text import UnrenderableError
from tests.broker.rig import open_rig
from tests.broker.wire.messages_grammar import check_message, check_stream, exactly
from tests.fakes import echoing_sum, saying
from tiers.policy import SessionClass

MARK = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}
LS = {"name": "ls", "input_schema": {"type": "object"}}
CALL = 'Looking. <tool_call>{"name": "ls", "arguments": {"path":"/"}}</tool_call>'
ROUTES = [
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages?beta=true"),
    ("POST", "/v1/messages/count_tokens"),
    ("GET", "/v1/messages"),
    ("GET", "/v1/messages/nowhere"),
]


def body(*messages, **fields):
    said = list(messages) or ["Hi."]
    named = [
        one if isinstance(one, dict) else {"role": ("user", "assistant")[n % 2], "content": one}
        for n, one in enumerate(said)
    ]
    return {"max_tokens": 100, "messages": named, **fields}


def text(words, **fields):
    return {"type": "text", "text": words, **fields}


def events(answer):
    frames = answer.body.decode().split("\n\n")
    assert frames.pop() == ""
    out = []
    for frame in frames:
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        out.append(event)
    return out


async def ask(browser, *messages, **fields):
    answer = await browser.request("POST", "/v1/messages?beta=true", body(*messages, **fields))
    assert answer.status == 200, answer.body
    message = check_stream(events(answer)) if fields.get("stream") else answer.json
    check_message(message)
    return message


def counts(message):
    used = message["usage"]
    return (
        used["input_tokens"],
        used["cache_creation_input_tokens"],
        used["cache_read_input_tokens"],
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_a_post_is_a_message_or_its_stream(stream):
    async with open_rig() as rig:
        message = await ask(rig.browser(), "Hi.", stream=stream)
        assert message["content"] == [{"type": "text", "text": "Hello there.", "citations": None}]
        assert (message["stop_reason"], message["role"]) == ("end_turn", "assistant")
        [finished] = rig.engine.finished
        assert message["usage"]["output_tokens"] == finished.usage.output_tokens
        assert counts(message) == (finished.usage.prompt_tokens, 0, 0)


async def test_the_answers_headers_bear_the_id_that_errors_repeat():
    async with open_rig() as rig:
        browser = rig.browser()
        answer = await browser.request("POST", "/v1/messages", body(stream=True))
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["request-id"].startswith("req_")
        refused = await browser.request("POST", "/v1/messages", {})
        assert refused.json["request_id"] == refused.headers["request-id"]
        assert refused.headers["request-id"] != answer.headers["request-id"]


async def test_each_event_is_one_write():
    async with open_rig() as rig:
        browser = rig.browser()
        await browser.send("POST", "/v1/messages", body(stream=True))
        chunks = b""
        while b"0\r\n\r\n" not in chunks:
            received = await browser.stream.receive_some()
            assert received, "the answer breaks off"
            chunks += received
        for chunk in chunks.partition(b"\r\n\r\n")[2].split(b"\r\nevent: ")[1:]:
            assert b"\n\n\r\n" in chunk


@pytest.mark.parametrize("stream", [False, True])
async def test_a_replayed_answer_goes_on_from_its_sampled_tokens(stream):
    async with open_rig(reply=echoing_sum) as rig:
        browser = rig.browser()
        first = await ask(browser, "Go.", stream=stream)
        await ask(browser, "Go.", first["content"], "On.", stream=stream)
        before = rig.engine.fed[0][1]
        assert rig.engine.submitted[1].prompt[: len(before)] == before


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_is_a_tool_use_whose_id_its_result_names(stream):
    async with open_rig(reply=saying(CALL, "Done.")) as rig:
        browser = rig.browser()
        first = await ask(browser, "Go.", tools=[LS], stream=stream)
        assert first["stop_reason"] == "tool_use"
        [said, use] = first["content"]
        assert said["text"].strip() == "Looking."
        assert (use["name"], use["input"]) == ("ls", {"path": "/"})
        result = {"type": "tool_result", "tool_use_id": use["id"], "content": "a.txt"}
        second = await ask(browser, "Go.", first["content"], [result], tools=[LS], stream=stream)
        assert second["stop_reason"] == "end_turn"
        assert b"a.txt" in bytes(i for i in rig.engine.submitted[1].prompt if i < 256)


async def test_a_message_can_be_gone_on_from_in_the_responses_api():
    """One id space: the history that one API made leads the other to the same sampled tokens."""
    async with open_rig(reply=echoing_sum) as rig:
        browser = rig.browser()
        first = await ask(browser, "Go.")
        said = first["content"][0]["text"]
        items = [
            {"role": "user", "content": "Go."},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "On."},
        ]
        await browser.request("POST", "/v1/responses", {"input": items})
        before = rig.engine.fed[0][1]
        assert rig.engine.submitted[1].prompt[: len(before)] == before
        assert rig.port.sessions.known("", response_id(first["id"])) is not None


# Caching


async def test_counters_rise_as_a_marked_conversation_grows():
    async with open_rig("messages.cache_min_tokens=10") as rig:
        browser = rig.browser()
        system = [text("Be brief.", cache_control=MARK)]
        first = await ask(browser, [text("Hi.", cache_control=MARK)], system=system)
        after, written, read = counts(first)
        prompt = len(rig.engine.submitted[0].prompt)
        assert (read, written, after) == (0, prompt - after, len("<assistant\n"))
        said = first["content"][0]["text"]
        second = await ask(
            browser, "Hi.", said, [text("More.", cache_control=MARK)], system=system, stream=True
        )
        assert second["usage"]["cache_read_input_tokens"] == written
        assert sum(counts(second)) == len(rig.engine.submitted[1].prompt)
        tiers = second["usage"]["homeport:cached_by_tier"]
        assert sum(tiers.values()) >= second["usage"]["cache_read_input_tokens"]
        third = await ask(browser, [text("Hi.", cache_control=MARK)], system=system)
        assert counts(third) == (after, 0, written)


async def test_without_marks_nothing_is_said_to_be_cached_though_the_engine_reused_it():
    async with open_rig("messages.cache_min_tokens=0") as rig:
        browser = rig.browser()
        await ask(browser, "Hi.")
        message = await ask(browser, "Hi.")
        assert counts(message)[1:] == (0, 0)
        assert sum(message["usage"]["homeport:cached_by_tier"].values()) > 0


async def test_an_agents_moving_mark_is_found_again_though_its_block_became_a_string():
    def request(turn, *messages):
        billing = f"x-anthropic-billing-header: cc_version=2.1.330.{turn:03x}; cc_entrypoint=cli;"
        return {
            "max_tokens": 32_000,
            "system": [
                text(billing),
                text("You are an agent.", cache_control=MARK),
                text("Work well. " * 20, cache_control=MARK),
            ],
            "tools": [LS],
            "thinking": {"type": "adaptive", "display": "omitted"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "output_config": {"effort": "high"},
            "messages": list(messages),
            "stream": True,
        }

    date, asked = "Today is Monday.", {"role": "user", "content": "Hi."}
    async with open_rig("messages.cache_min_tokens=100") as rig:
        browser = rig.browser()
        marked = {"role": "system", "content": [text(date, cache_control=MARK)]}
        answer = await browser.request("POST", "/v1/messages?beta=true", request(1, asked, marked))
        first = check_stream(events(answer))
        more = {"role": "user", "content": [text("More.", cache_control=MARK)]}
        messages = [
            asked,
            {"role": "system", "content": date},
            {"role": "assistant", "content": first["content"]},
            more,
        ]
        answer = await browser.request("POST", "/v1/messages?beta=true", request(2, *messages))
        second = check_stream(events(answer))
        assert first["usage"]["cache_creation_input_tokens"] > 100
        assert (
            second["usage"]["cache_read_input_tokens"]
            == first["usage"]["cache_creation_input_tokens"]
        )
        before = rig.engine.fed[0][1]
        assert rig.engine.submitted[1].prompt[: len(before)] == before


async def test_a_restart_of_the_engine_is_not_hidden():
    """The entry is there and the KV is not: nothing is claimed to have been read."""
    async with open_rig("messages.cache_min_tokens=10") as rig:
        browser = rig.browser()
        first = await ask(browser, "Hi.", cache_control=MARK)
        rig.engine.fed.clear()
        assert counts(await ask(browser, "Hi.", cache_control=MARK)) == counts(first)
        assert counts(await ask(browser, "Hi.", cache_control=MARK))[2] == counts(first)[1]


async def test_an_entry_can_be_read_once_its_response_has_begun_and_not_before():
    async with open_rig("messages.cache_min_tokens=10") as rig:
        first, second = rig.browser(), rig.browser()
        await ask(first, "Hi.")  # computes the KV, and writes no entry
        rig.engine.hold()
        for browser in (first, second):
            await browser.send("POST", "/v1/messages", body("Hi.", cache_control=MARK))
        await rig.settled()
        rig.engine.go()
        answers = [(await one.answer()).json for one in (first, second)]
        assert sorted(counts(one)[2] > 0 for one in answers) == [False, True]


async def test_a_short_prefix_is_silently_not_cached():
    async with open_rig() as rig:
        browser = rig.browser()
        for _ in range(2):
            assert counts(await ask(browser, "Hi.", cache_control=MARK))[1:] == (0, 0)


async def test_tenants_read_their_own_entries_only():
    async with open_rig(
        "auth.keys=['a', 'b']", "auth.shared=true", "messages.cache_min_tokens=10"
    ) as rig:
        browser = rig.browser()
        for key, reads in (("a", False), ("a", True), ("b", False)):
            answer = await browser.request(
                "POST", "/v1/messages", body("Hi.", cache_control=MARK), x_api_key=key
            )
            assert (counts(answer.json)[2] > 0) == reads


@pytest.mark.parametrize(("control", "granted"), [(MARK, 300), (HOUR, 3600), (None, 0)])
async def test_the_time_asked_for_protects_the_prompts_kv(control, granted):
    async with open_rig() as rig:
        await ask(rig.browser(), "Hi.", cache_control=control)
        assert rig.engine.submitted[0].keep_s == granted


async def test_marks_on_tools_and_system_blocks_count_what_the_template_puts_before_their_end():
    async with open_rig("messages.cache_min_tokens=10") as rig:
        browser = rig.browser()
        tools = [{**LS, "cache_control": HOUR}]
        system = [text("Be brief."), text("Be kind.", cache_control=MARK)]
        first = await ask(browser, "Hi.", system=system, tools=tools)
        created = first["usage"]["cache_creation"]
        assert created["ephemeral_5m_input_tokens"] == 0, "the tools end where the system ends"
        assert created["ephemeral_1h_input_tokens"] > 100
        second = await ask(browser, "Other.", system=system, tools=tools)
        assert second["usage"]["cache_read_input_tokens"] == created["ephemeral_1h_input_tokens"]
        changed = await ask(browser, "Hi.", system="Be rude.", tools=tools)
        assert changed["usage"]["cache_read_input_tokens"] == 0


async def test_a_prewarm_is_a_real_prefill_that_says_nothing():
    async with open_rig("messages.cache_min_tokens=10") as rig:
        browser = rig.browser()
        warm = await ask(browser, "Hi.", max_tokens=0, cache_control=MARK)
        assert (warm["content"], warm["stop_reason"]) == ([], "max_tokens")
        assert warm["usage"]["output_tokens"] == 0
        assert counts(warm)[1] > 0
        assert rig.engine.submitted[0].sampling.max_tokens == 0
        assert counts(await ask(browser, "Hi.", cache_control=MARK))[2] == counts(warm)[1]


async def test_a_miss_is_explained_against_the_message_that_it_follows():
    async with open_rig(reply=saying("One.", "Two.")) as rig:
        browser = rig.browser()
        first = await ask(browser, "Hi.", system="a", diagnostics={"previous_message_id": None})
        assert first["diagnostics"] is None
        follows = {"diagnostics": {"previous_message_id": first["id"]}}
        same = await ask(browser, "Hi.", "One.", "On.", system="a", **follows)
        assert same["diagnostics"] is None
        for fields, kind in (
            ({"system": "b"}, "system_changed"),
            ({"system": "a", "tools": [LS]}, "tools_changed"),
        ):
            other = await ask(browser, "Hi.", **fields, **follows, stream=True)
            reason = other["diagnostics"]["cache_miss_reason"]
            assert reason["type"] == kind
            assert reason["cache_missed_input_tokens"] > 0
        other = await ask(browser, "Ho.", system="a", **follows)
        assert other["diagnostics"]["cache_miss_reason"]["type"] == "messages_changed"
        unknown = await ask(browser, diagnostics={"previous_message_id": "msg_x"})
        assert unknown["diagnostics"] == {
            "cache_miss_reason": {"type": "previous_message_not_found"}
        }


# How it ends


async def test_a_stop_sequence_ends_the_message_and_is_named():
    async with open_rig(reply=saying("one ### two")) as rig:
        browser = rig.browser()
        for stream in (False, True):
            message = await ask(browser, stop_sequences=["###", "zzz"], stream=stream)
            assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "###")
            assert message["content"][0]["text"].strip() == "one"


async def test_max_tokens_is_clamped_to_the_context_and_the_message_says_which_limit_it_met():
    async with open_rig(reply=lambda _: (97,) * 5000) as rig:
        browser = rig.browser()
        message = await ask(browser, max_tokens=5)
        assert (message["stop_reason"], message["usage"]["output_tokens"]) == ("max_tokens", 5)
        message = await ask(browser, max_tokens=32_000)
        assert message["stop_reason"] == "model_context_window_exceeded"


async def test_a_silent_stream_pings_and_starts_when_the_engine_has_begun(autojump_clock):
    async with open_rig() as rig:
        rig.engine.hold()
        browser = rig.browser()
        await browser.send("POST", "/v1/messages", body(stream=True))
        with trio.move_on_after(35):
            await browser.answer()
        rig.engine.go()
        said = events(await browser.answer())
        check_stream(said)
        kinds = [one["type"] for one in said]
        assert kinds[: kinds.index("message_start")].count("ping") >= 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_turn_that_breaks_is_an_error_event_in_a_stream_and_a_500_without(stream):
    async with open_rig() as rig:
        rig.engine.faults.fail_after = 2
        answer = await rig.browser().request("POST", "/v1/messages", body(stream=stream))
        if stream:
            [*_, last] = events(answer)
            check_stream(events(answer))
            assert (last["type"], last["error"]["type"]) == ("error", "api_error")
            assert last["request_id"] == answer.headers["request-id"]
        else:
            assert (answer.status, answer.json["error"]["type"]) == (500, "api_error")


# Errors


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("fields", "status", "kind", "says"),
    [
        ({"messages": 3}, 400, "invalid_request_error", "messages"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"model": "other"}, 404, "not_found_error", "model"),
        (
            {"messages": [{"role": "user", "content": "x" * 5000}]},
            400,
            "invalid_request_error",
            r"prompt is too long: 50\d\d tokens > 4096 maximum",
        ),
        (
            {"tools": [LS], "tool_choice": {"type": "x"}},
            400,
            "invalid_request_error",
            "tool_choice.type: ",
        ),
    ],
)
async def test_a_refused_turn_has_its_status_and_shape(stream, fields, status, kind, says):
    async with open_rig() as rig:
        answer = await rig.browser().request("POST", "/v1/messages", body(stream=stream, **fields))
        check_error(answer, status, kind)
        assert re.search(says, answer.json["error"]["message"])


def check_error(answer, status, kind):
    assert answer.status == status
    assert set(answer.json) == {"type", "error", "request_id"}
    assert answer.json["type"] == "error"
    assert set(answer.json["error"]) == {"type", "message"}
    assert answer.json["error"]["type"] == kind
    assert answer.json["request_id"] == answer.headers["request-id"]
    if kind != "request_too_large":  # documented, and missing among the client's types
        exactly(anthropic.types.ErrorResponse, answer.json)


async def test_bodies_that_are_no_json_or_too_large_are_refused_in_shape():
    async with open_rig("http.max_body=4KiB") as rig:
        for raw, status, kind in (
            (b"{", 400, "invalid_request_error"),
            (b"x" * 5000, 413, "request_too_large"),
        ):
            answer = await rig.browser().request("POST", "/v1/messages", raw)
            check_error(answer, status, kind)


async def test_too_many_turns_are_a_529_with_a_time_to_come_back():
    async with open_rig("admission.max_turns=1", "admission.max_queued=0") as rig:
        rig.engine.hold()
        busy = rig.browser()
        await busy.send("POST", "/v1/messages", body())
        await rig.settled()
        answer = await rig.browser().request("POST", "/v1/messages", body())
        check_error(answer, 529, "overloaded_error")
        assert int(answer.headers["retry-after"]) >= 1
        rig.engine.go()
        assert (await busy.answer()).status == 200
        rig.engine.faults.refuse = RefuseReason.BUSY
        check_error(
            await rig.browser().request("POST", "/v1/messages", body()), 529, "overloaded_error"
        )


async def test_a_refusal_that_comes_late_has_its_own_status(autojump_clock):
    """The turn had waited so long that its events had begun; a client without a stream has seen none of them."""
    async with open_rig() as rig:
        rig.engine.hold()
        rig.engine.faults.late, rig.engine.faults.refuse = True, RefuseReason.BUSY
        messages, responses = rig.browser(), rig.browser()
        await messages.send("POST", "/v1/messages", body())
        await responses.send("POST", "/v1/responses", {"input": "Hi."})
        await trio.sleep(30)
        rig.engine.go()
        answer = await messages.answer()
        check_error(answer, 529, "overloaded_error")
        assert int(answer.headers["retry-after"]) >= 1
        answer = await responses.answer()
        assert (answer.status, answer.code) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1


async def test_a_conversation_that_the_template_refuses_is_the_clients_error():
    class Refusing:
        def __getattr__(self, name):
            return getattr(text_of, name)

        def prompt(self, whole, after=None):
            raise UnrenderableError("roles must alternate")

    async with open_rig() as rig:
        text_of = rig.engine.text
        rig.engine.text = Refusing()
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            answer = await rig.browser().request("POST", path, body())
            check_error(answer, 400, "invalid_request_error")
            assert answer.json["error"]["message"] == "messages: roles must alternate"


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_needs_the_key_in_either_header_and_says_so_in_shape(method, path):
    async with open_rig("auth.keys=['k']") as rig:
        browser = rig.browser()
        check_error(await browser.request(method, path), 401, "authentication_error")
        for fields in ({"x_api_key": "k"}, {"authorization": "Bearer k"}):
            answer = await browser.request(method, path, body(), **fields)
            assert answer.status in (200, 404, 405)
            if answer.status != 200:
                kind = {404: "not_found_error", 405: "invalid_request_error"}[answer.status]
                check_error(answer, answer.status, kind)


async def test_other_paths_keep_the_shape_of_their_own_api():
    async with open_rig("auth.keys=['k']") as rig:
        for path in ("/v1/responses", "/v1/messagesx", "/nowhere"):
            answer = await rig.browser().request("POST", path, {})
            assert set(answer.json) == {"error"}
            assert answer.status == 401


async def test_foreign_origins_are_refused_in_shape():
    async with open_rig() as rig:
        answer = await rig.browser().request(
            "POST", "/v1/messages", body(), origin="https://evil.example"
        )
        check_error(answer, 403, "permission_error")


@pytest.mark.parametrize("path", ["/", "/api/hello"])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_probes_are_answered_without_a_key(method, path):
    async with open_rig("auth.keys=['k']") as rig:
        stream = rig.socket_stream()
        await stream.send_all(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
        await stream.aclose()
        assert (await rig.browser().request("GET", path, host="evil.example")).status == 421


# Counting, models, sessions


async def test_tokens_are_counted_as_the_turn_takes_them_with_every_sampled_id_that_is_known():
    async with open_rig(reply=saying("Hello.", "Again.")) as rig:
        browser = rig.browser()
        first = await ask(browser, "Hi.", system="Be brief.", tools=[LS])
        asked = body("Hi.", first["content"], "On.", system="Be brief.", tools=[LS])
        del asked["max_tokens"]
        counted = await browser.request("POST", "/v1/messages/count_tokens?beta=true", asked)
        exactly(anthropic.types.MessageTokensCount, counted.json)
        message = await ask(browser, "Hi.", first["content"], "On.", system="Be brief.", tools=[LS])
        assert counted.json == {"input_tokens": sum(counts(message))}
        unknown = await browser.request(
            "POST", "/v1/messages/count_tokens", {**asked, "model": "x"}
        )
        check_error(unknown, 404, "not_found_error")


async def test_models_are_listed_in_the_shape_of_the_api_that_asks():
    async with open_rig("model.aliases=['claude-local', 'other']") as rig:
        browser = rig.browser()
        fields = {"anthropic_version": "2023-06-01"}
        listed = (await browser.request("GET", "/v1/models?limit=1000", **fields)).json
        names = [one["id"] for one in listed["data"]]
        assert names == ["smollm2-135m-instruct", "claude-local", "other"]
        assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (
            False,
            names[0],
            names[2],
        )
        for one in listed["data"]:
            exactly(anthropic.types.ModelInfo, one)
            found = await browser.request("GET", f"/v1/models/{one['id']}", **fields)
            assert found.json == one
        for query, page, more in (
            ("limit=2", names[:2], True),
            (f"limit=2&after_id={names[1]}", names[2:], False),
            (f"limit=1&before_id={names[2]}", names[1:2], True),
            (f"limit=9&before_id={names[2]}", names[:2], False),
        ):
            found = (await browser.request("GET", f"/v1/models?{query}", **fields)).json
            assert ([one["id"] for one in found["data"]], found["has_more"]) == (page, more)
        for query in ("limit=0", "limit=x", "after_id=nobody", "before_id=nobody"):
            answer = await browser.request("GET", f"/v1/models?{query}", **fields)
            check_error(answer, 400, "invalid_request_error")
        check_error(await browser.request("GET", "/v1/models/x", **fields), 404, "not_found_error")
        codex = (await browser.request("GET", "/v1/models?client_version=0.169.0")).json
        assert [one["slug"] for one in codex["models"]] == names
        assert codex["models"][0]["context_window"] == rig.engine.max_context


@pytest.mark.parametrize(
    ("fields", "headers", "session"),
    [
        ({}, {"x_claude_code_session_id": "s"}, "s"),
        ({"metadata": {"user_id": "u"}}, {"x_claude_code_session_id": "s"}, "s"),
        ({"metadata": {"user_id": "u"}}, {}, "u"),
    ],
)
async def test_a_session_is_called_as_the_client_calls_it_and_its_kv_is_fetched_ahead(
    fields, headers, session
):
    async with open_rig() as rig:
        browser = rig.browser()
        await browser.request("POST", "/v1/messages", body("Hi.", **fields), **headers)
        assert rig.engine.submitted[0].session == session
        rig.clock.time += 60
        await browser.request("POST", "/v1/messages", body("Other.", **fields), **headers)
        (node,) = [
            n
            for n in rig.port.sessions.of_session("", session)
            if b"Hi." in bytes(i for i in n.tokens if i < 256)
        ]
        assert rig.engine.prefetched[0] == node.tokens


@pytest.mark.parametrize(
    ("headers", "closed"),
    [
        ({}, False),
        ({"x_claude_code_context_compacted": "true"}, True),
        ({"x_claude_code_context_compacted": "0"}, False),
        (
            {
                "x_claude_code_context_compacted": "true",
                "x_claude_code_request_class": "subagent",
            },
            False,
        ),
    ],
)
async def test_what_an_agent_compacted_away_is_closed_and_not_fetched(headers, closed):
    async with open_rig() as rig:
        browser = rig.browser()
        named = {"x_claude_code_session_id": "s"}
        await browser.request("POST", "/v1/messages", body("Hi."), **named)
        [lease] = rig.engine.leases
        rig.clock.time += 60
        await browser.request("POST", "/v1/messages", body("A summary."), **named, **headers)
        assert (rig.engine.leases[lease] is SessionClass.CLOSED) == closed
        assert bool(rig.engine.prefetched) != closed


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_its_turn(stream):
    async with open_rig() as rig:
        rig.engine.hold()
        browser = rig.browser()
        await browser.send("POST", "/v1/messages", body(stream=stream))
        await rig.settled()
        await browser.drop()
        await rig.settled()
        assert rig.engine.cancelled
        assert rig.port.admission.statistics().admitted == 0
