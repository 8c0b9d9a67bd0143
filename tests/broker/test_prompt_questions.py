"""What a client may ask about its prompt: how long it is, what was left out of it, and why the cache did not have it."""

import pytest
from openai.types.responses import InputTokenCountResponse, Response

from broker.diagnosis import diagnose
from broker.session import Node, Part
from broker.wire.items import Message
from broker.wire.requests import Transport, parse_create
from tests.broker.rig import open_rig
from tests.broker.test_background import KEYS, get, post
from tests.broker.wire.grammar import check_response
from tests.fakes import saying

TOOL = {"type": "function", "name": "ls", "parameters": {"type": "object"}}


# --- input_tokens


@pytest.mark.parametrize(
    "body",
    [
        {"input": "Hi."},
        {"input": "Hi.", "instructions": "Be brief.", "tools": [TOOL]},
        {"input": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"input": "q" * 4000, "truncation": "auto"},
    ],
)
async def test_the_count_is_the_prompt_that_a_create_would_feed(body):
    async with open_rig() as rig:
        if "truncation" in body:
            body |= {"input": [{"role": "user", "content": "q" * 1500} for _ in range(4)]}
        counted = await post(rig, "/v1/responses/input_tokens", body)
        count = InputTokenCountResponse.model_validate(counted.json, strict=True).input_tokens
        assert rig.engine.submitted == []
        answer = await post(rig, body=body)
        assert answer.json["usage"]["input_tokens"] == count == len(rig.engine.submitted[0].prompt)


async def test_a_continuation_and_a_conversation_are_counted_with_their_past():
    async with open_rig() as rig:
        conversation = (await post(rig, "/v1/conversations")).json["id"]
        first = await post(rig, body={"input": "Hi.", "conversation": conversation})
        for past in ({"conversation": conversation}, {"previous_response_id": first.json["id"]}):
            body = {"input": "And?", **past}
            counted = (await post(rig, "/v1/responses/input_tokens", body)).json["input_tokens"]
            answer = await post(rig, body=body)
            assert answer.json["usage"]["input_tokens"] == counted
            assert counted > first.json["usage"]["input_tokens"]


async def test_a_count_of_what_cannot_be_resolved_is_refused_like_its_turn():
    async with open_rig() as rig:
        for body, code in (
            ({"previous_response_id": "resp_gone"}, "previous_response_not_found"),
            ({"model": "gpt-unknown"}, "model_not_found"),
            ({"input": 3}, "invalid_type"),
        ):
            assert (await post(rig, "/v1/responses/input_tokens", body)).code == code


# --- references


async def test_an_input_item_is_referred_to_by_the_id_under_which_it_was_listed():
    async with open_rig(*KEYS) as rig:
        ada, bob = {"authorization": "Bearer ada"}, {"authorization": "Bearer bob"}
        items = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
        first = (await post(rig, body={"input": items}, **ada)).json
        path = f"/v1/responses/{first['id']}/input_items?order=asc"
        listed = (await get(rig, path, **ada)).json["data"]
        output = [item["id"] for item in first["output"]]
        ids = [*(item["id"] for item in listed), *output]
        references = [{"type": "item_reference", "id": one} for one in ids]
        more = {"role": "user", "content": "three"}
        answer = await post(rig, body={"input": [*references, more]}, **ada)
        assert answer.status == 200
        before = (*rig.engine.submitted[0].prompt, *b"Hello there.", 257)
        assert rig.engine.submitted[1].prompt[: len(before)] == before
        for one, key in ((ids[0], bob), (ids[0] + "9", ada), ("item_resp_gone_0", ada)):
            gone = {"type": "item_reference", "id": one}
            refused = await post(rig, body={"input": [gone, more]}, **key)
            assert (refused.status, refused.code) == (404, "item_not_found")


# --- truncation


def turns(n):
    """A history of n questions of 500 tokens, the model's answers between them, and a last question."""
    items = []
    for number in range(n):
        items += [
            {"role": "user", "content": f"<{number}>" + "q" * 480},
            {"role": "assistant", "content": "a"},
        ]
    return [*items, {"role": "user", "content": "last"}]


def fed(submit):
    return bytes(token for token in submit.prompt if token < 256).decode()


async def test_the_oldest_turns_are_left_out_and_the_response_says_so():
    async with open_rig() as rig:
        body = {"input": turns(9), "instructions": "Be brief.", "truncation": "auto"}
        answer = await post(rig, body=body)
        check_response(answer.json)
        assert answer.json["truncation"] == "auto"
        text = fed(rig.engine.submitted[0])
        assert text.startswith("system\nBe brief.\nuser\n<")
        assert "<0>" not in text
        assert "<8>" in text
        assert text.endswith("last\nassistant\n")
        truncated = answer.json["homeport:truncated"]
        assert truncated["items"] == 2 * int(text.partition("<")[2].partition(">")[0])
        assert len(rig.engine.submitted[0].prompt) <= rig.engine.max_context - 1024
        listed = await get(rig, f"/v1/responses/{answer.json['id']}/input_items?limit=100")
        assert len(listed.json["data"]) == 19, "the history keeps what the prompt left out"


async def test_without_it_a_long_prompt_is_refused():
    async with open_rig() as rig:
        for body in ({}, {"truncation": "disabled"}, {"truncation": None}):
            answer = await post(rig, body={"input": turns(9), **body})
            assert (answer.status, answer.code) == (400, "context_length_exceeded")


async def test_what_fits_is_not_truncated():
    async with open_rig() as rig:
        answer = await post(rig, body={"input": turns(3), "truncation": "auto"})
        assert "homeport:truncated" not in answer.json


async def test_a_question_that_is_too_long_by_itself_is_refused():
    async with open_rig() as rig:
        answer = await post(rig, body={"input": "q" * 5000, "truncation": "auto"})
        assert (answer.status, answer.code) == (400, "context_length_exceeded")


async def test_room_is_left_for_the_answer_that_was_asked_for():
    async with open_rig() as rig:
        body = {"input": turns(7), "truncation": "auto", "max_output_tokens": 16}
        assert "homeport:truncated" not in (await post(rig, body=body)).json


async def test_a_chain_that_outgrows_the_context_goes_on_and_mostly_from_its_cache():
    async with open_rig(reply=saying("answer " * 8)) as rig:
        last, hits = None, 0
        for number in range(80):
            body = {"input": f"<{number}>" + "q" * 40, "truncation": "auto"}
            answer = await post(rig, body=body | {"previous_response_id": last})
            last = answer.json["id"]
            usage = answer.json["usage"]
            hits += usage["input_tokens_details"]["cached_tokens"] > usage["input_tokens"] / 2
            dropped = answer.json.get("homeport:truncated", {"items": 0})["items"]
            first = fed(rig.engine.submitted[-1]).partition("<")[2].partition(">")[0]
            assert dropped == 2 * int(first), "what is missing is said, however the turn came about"
        assert dropped > 50
        assert hits >= 65
        strict = await post(rig, body={"input": "And?", "previous_response_id": last})
        assert (strict.status, strict.code) == (400, "context_length_exceeded")


# --- diagnostics


async def diagnosed(rig, first, second, compare=True):
    """The diagnostics of the second body, compared with the first one's response."""
    before = (await post(rig, body={"input": "Tea? " * 9, **first})).json["id"]
    options = {"comparison_response_id": before} if compare else {}
    answer = await post(rig, body={"input": "Tea? " * 9, **second, "prompt_cache_options": options})
    check_response(answer.json)
    assert Response.model_validate(answer.json, strict=True)
    return answer.json["prompt_cache_diagnostics"]


async def test_a_prompt_that_was_found_is_a_hit():
    async with open_rig() as rig:
        assert await diagnosed(rig, {}, {}) == {"type": "cache_hit"}


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ({}, {"input": "Coffee?"}, "input_changed"),
        ({"instructions": "It is 10:00."}, {"instructions": "It is 10:01."}, "input_changed"),
        ({"tools": [TOOL]}, {"tools": [TOOL | {"name": "cat"}]}, "tools_changed"),
        ({"instructions": "a", "tools": [TOOL]}, {"instructions": "b"}, "tools_changed"),
    ],
)
async def test_a_miss_names_what_changed_and_how_much_it_cost(first, second, reason):
    async with open_rig() as rig:
        found = await diagnosed(rig, first, second)
        assert (found["type"], found["reason"]) == ("cache_miss", reason)
        before, now = (submit.prompt for submit in rig.engine.submitted)
        at = found["comparison_reusable_tokens"]
        assert before[:at] == now[:at]
        assert before[at] != now[at]
        assert found["cache_missed_tokens"] == len(now) - at


async def test_a_name_that_answers_to_the_same_model_is_no_reason():
    async with open_rig('model.aliases=["other"]') as rig:
        second = {"model": "other", "prompt_cache_key": "k", "service_tier": "flex"}
        assert await diagnosed(rig, {}, second) == {"type": "cache_hit"}


async def test_a_cache_that_forgot_is_no_fault_of_the_request():
    async with open_rig() as rig:
        before = (await post(rig, body={"input": "Tea?"})).json["id"]
        rig.engine.fed.clear()
        options = {"comparison_response_id": before}
        answer = await post(rig, body={"input": "Tea?", "prompt_cache_options": options})
        assert answer.json["prompt_cache_diagnostics"] == {
            "type": "unavailable",
            "homeport:reason": "not_kept",
        }
        assert Response.model_validate(answer.json, strict=True)


async def test_a_comparison_with_nothing_is_said():
    async with open_rig() as rig:
        options = {"comparison_response_id": "resp_gone"}
        answer = await post(rig, body={"input": "Tea?", "prompt_cache_options": options})
        found = answer.json["prompt_cache_diagnostics"]
        assert found == {"type": "comparison_response_not_found"}


async def test_without_a_name_it_is_the_turn_before_that_is_compared():
    async with open_rig() as rig:
        asked = {"prompt_cache_options": {}}
        alone = await post(rig, body={"input": "Tea?", **asked})
        assert alone.json["prompt_cache_diagnostics"] == {"type": "unavailable"}
        body = {"input": "More?", "previous_response_id": alone.json["id"], **asked}
        first = await post(rig, body=body)
        assert first.json["prompt_cache_diagnostics"] == {"type": "cache_hit"}
        changed = await post(rig, body=body | {"instructions": "Be brief."})
        assert changed.json["prompt_cache_diagnostics"]["reason"] == "input_changed"


async def test_who_does_not_ask_is_not_told():
    async with open_rig() as rig:
        answer = await post(rig, body={"input": "Tea?"})
        assert "prompt_cache_diagnostics" not in answer.json


async def test_a_warm_up_measures_nothing():
    async with open_rig() as rig:
        before = (await post(rig, body={"input": "Tea?"})).json["id"]
        options = {"prewarm": True, "comparison_response_id": before}
        answer = await post(rig, body={"input": "Tea?", "prompt_cache_options": options})
        assert answer.json["prompt_cache_diagnostics"] == {"type": "unavailable"}


async def test_a_compaction_is_the_reason_of_the_miss_that_it_makes():
    async with open_rig(reply=saying("Noted.", "Tea was drunk.", "Yes.")) as rig:
        first = (await post(rig, body={"input": "Tea? " * 30})).json["id"]
        rule = [{"type": "compaction", "compact_threshold": 90}]
        body = {"input": "Really?", "previous_response_id": first, "prompt_cache_options": {}}
        answer = await post(rig, body=body | {"context_management": rule})
        found = answer.json["prompt_cache_diagnostics"]
        assert (found["type"], found["reason"]) == ("cache_miss", "context_compacted")


SAID = Part((Message(None, "user", "a"),))


@pytest.mark.parametrize(
    ("then", "now", "reason"),
    [
        ({"reasoning": {"effort": "low"}}, {"reasoning": {"effort": "high"}}, "reasoning_effort"),
        ({"text": {"verbosity": "low"}}, {"text": {"verbosity": "high"}}, "verbosity"),
        ({}, {}, "input"),
    ],
)
def test_a_setting_is_the_reason_only_where_nothing_else_changed(then, now, reason):
    node = Node(
        response_id="resp_1",
        tenant="",
        session="s",
        parent=None,
        created_at=0.0,
        stored=True,
        tokens=(1, 2, 3),
        sampled_from=2,
        history=(SAID,),
        instructions=None,
        tools=(),
        response=parse_create(then, transport=Transport.HTTP).echo,
    )
    request = parse_create(now, transport=Transport.HTTP)
    for parts, expected in (((SAID,), reason), ((Part((Message(None, "user", "b"),)),), "input")):
        found = diagnose(node, prompt=(1, 9, 9, 9), cached_tokens=1, request=request, parts=parts)
        assert found["reason"] == f"{expected}_changed"
        assert (found["comparison_reusable_tokens"], found["cache_missed_tokens"]) == (1, 3)
