"""Conversations over HTTP: kept, appended to by turns, continued with exact tokens, durable, one change at a time."""

import json

import pytest
from openai.types.conversations import (
    Conversation,
    ConversationDeletedResource,
    ConversationItemList,
)
from openai.types.responses import Response

from broker.access import OPEN
from broker.conversations import _MAX_ITEMS
from broker.errors import ClientError
from broker.wire.requests import Transport, parse_create
from tests.broker.rig import open_rig
from tests.broker.test_background import KEYS, ended, get, post, restarted
from tests.broker.wire.grammar import check_events, check_response
from tests.fakes import saying
from tiers.block import StoreError

PATH = "/v1/conversations"


def user(text):
    return {"role": "user", "content": text}


async def made(rig, **body):
    return (await post(rig, PATH, body)).json["id"]


async def listed(rig, conversation):
    answer = await get(rig, f"{PATH}/{conversation}/items?order=asc&limit=100")
    if answer.json["data"]:
        ConversationItemList.model_validate(answer.json, strict=True)
    return answer.json["data"]


def texts(items):
    return [part["text"] for item in items for part in item["content"]]


async def test_a_conversation_is_made_described_and_deleted():
    async with open_rig() as rig:
        answer = await post(rig, PATH, {"metadata": {"topic": "tea"}})
        assert Conversation.model_validate(answer.json, strict=True).object == "conversation"
        path = f"{PATH}/{answer.json['id']}"
        assert (await get(rig, path)).json == answer.json
        described = await post(rig, path, {"metadata": {"topic": "coffee"}})
        assert described.json == answer.json | {"metadata": {"topic": "coffee"}}
        deleted = (await rig.browser().request("DELETE", path)).json
        assert ConversationDeletedResource.model_validate(deleted, strict=True).deleted
        for method, where in (("GET", ""), ("GET", "/items"), ("DELETE", ""), ("GET", "/items/x")):
            gone = await rig.browser().request(method, path + where)
            assert (gone.status, gone.code) == (404, "conversation_not_found")


async def test_an_empty_body_makes_an_empty_conversation():
    async with open_rig() as rig:
        answer = await post(rig, PATH)
        assert answer.json["metadata"] == {}
        assert await listed(rig, answer.json["id"]) == []


async def test_items_are_added_listed_read_and_deleted():
    async with open_rig() as rig:
        conversation = await made(rig, items=[user("one")])
        path = f"{PATH}/{conversation}/items"
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
        result = {"type": "function_call_output", "call_id": "c", "output": "r"}
        thought = {"type": "reasoning", "summary": [], "content": []}
        said = {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}
        added = await post(rig, path, {"items": [call, result, thought, said]})
        ConversationItemList.model_validate(added.json, strict=True)
        assert [one["id"].partition("_")[0] for one in added.json["data"]] == [
            "fc",
            "fco",
            "rs",
            "msg",
        ]
        items = await listed(rig, conversation)
        assert items[1:] == added.json["data"]
        page = (await get(rig, f"{path}?order=asc&limit=2")).json
        assert (page["data"], page["has_more"]) == (items[:2], True)
        assert (await get(rig, f"{path}?order=asc&after={page['last_id']}")).json["data"] == items[
            2:
        ]
        one = f"{path}/{items[1]['id']}"
        assert (await get(rig, one)).json == items[1]
        assert (await rig.browser().request("DELETE", one)).json["object"] == "conversation"
        assert await listed(rig, conversation) == [items[0], *items[2:]]
        gone = await rig.browser().request("DELETE", one)
        assert (gone.status, gone.code) == (404, "item_not_found")


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("", {"items": [user("x")] * 21}, "array_above_max_length", "items"),
        ("", {"items": [{"type": "nothing"}]}, "invalid_value", "items[0].type"),
        (
            "/{}/items",
            {"items": [{"type": "compaction", "encrypted_content": "x"}]},
            "invalid_encrypted_content",
            "input[0].encrypted_content",
        ),
        ("", {"metadata": {"k": 1}}, "invalid_type", "metadata.k"),
        ("", {"items": [{"type": "item_reference", "id": "m"}]}, "invalid_value", "input[0]"),
        ("/{}", {}, "missing_required_parameter", "metadata"),
        ("/{}/items", {}, "missing_required_parameter", "items"),
        ("/{}/items", {"items": 3}, "invalid_type", "items"),
    ],
)
async def test_what_is_wrong_is_named(path, body, code, param):
    async with open_rig() as rig:
        conversation = await made(rig)
        answer = await post(rig, PATH + path.format(conversation), body)
        assert (answer.status, answer.code) == (400, code)
        assert answer.json["error"]["param"] == param


async def test_turns_append_to_it_and_continue_each_other_exactly():
    async with open_rig(reply=saying("First.", "Second.")) as rig:
        conversation = await made(rig, items=[user("before")])
        for number, named in enumerate((conversation, {"id": conversation})):
            body = {"input": f"turn {number}", "conversation": named}
            answer = await post(rig, body=body)
            check_response(answer.json)
            assert Response.model_validate(answer.json, strict=True)
            assert answer.json["conversation"] == {"id": conversation}
            assert answer.json["previous_response_id"] is None
        first, second = rig.engine.submitted
        answered = (*first.prompt, *b"First.", 257)
        assert second.prompt[: len(answered)] == answered
        items = await listed(rig, conversation)
        assert texts(items) == ["before", "turn 0", "First.", "turn 1", "Second."]
        assert items[-1]["id"] == answer.json["output"][0]["id"]


async def test_what_was_sampled_is_found_again_after_a_restart():
    """The model's own tokens, not the tokens of its text: they differ where the text was cut inside a character."""
    async with open_rig(reply=saying("Grüße.")) as rig:
        conversation = await made(rig)
        body = {"input": "Hi.", "conversation": conversation, "max_output_tokens": 3}
        await post(rig, body=body)
        before = (*rig.engine.submitted[0].prompt, *b"Gr\xc3")
        async with restarted(rig) as after:
            answer = await post(after, body={"input": "And?", "conversation": conversation})
            assert answer.status == 200
            assert after.engine.submitted[0].prompt[: len(before)] == before
            assert texts(await listed(after, conversation))[0] == "Hi."


async def test_an_item_that_was_deleted_is_not_said_to_the_model_again():
    async with open_rig() as rig:
        conversation = await made(rig, items=[user("secret"), user("open")])
        secret = (await listed(rig, conversation))[0]["id"]
        await rig.browser().request("DELETE", f"{PATH}/{conversation}/items/{secret}")
        await post(rig, body={"input": "Hi.", "conversation": conversation})
        fed = bytes(t for t in rig.engine.submitted[0].prompt if t < 256)
        assert b"secret" not in fed
        assert b"open" in fed


async def test_the_items_are_there_before_the_client_hears_that_the_turn_is_over():
    async with open_rig() as rig:
        conversation = await made(rig)
        async with rig.websocket() as socket:
            await socket.create(conversation=conversation)
            await socket.until("response.completed")
            assert len(await listed(rig, conversation)) == 2
            events = await socket.turn("More.", conversation=conversation)
            check_events(events)
            assert len(await listed(rig, conversation)) == 4


async def test_one_turn_at_a_time_changes_a_conversation():
    async with open_rig() as rig:
        conversation = await made(rig)
        rig.engine.hold()
        first = rig.browser()
        await first.send("POST", "/v1/responses", {"input": "Hi.", "conversation": conversation})
        await rig.settled()
        path = f"{PATH}/{conversation}"
        for method, where, body in (
            ("POST", "/v1/responses", {"input": "Ho.", "conversation": conversation}),
            ("POST", f"{path}/items", {"items": [user("x")]}),
            ("POST", path, {"metadata": {}}),
            ("DELETE", path, None),
        ):
            refused = await rig.browser().request(method, where, body)
            assert (refused.status, refused.code) == (409, "conversation_locked")
        assert (await get(rig, path)).status == 200
        rig.engine.go()
        assert (await first.answer()).status == 200
        assert (await post(rig, f"{path}/items", {"items": [user("x")]})).status == 200


async def test_the_next_turn_may_come_with_the_end_of_the_one_before():
    """Each holds the conversation for itself: that the first one ends does not let go of it for the second."""
    async with open_rig() as rig:
        conversations = rig.port.conversations
        conversation = await made(rig)
        request = parse_create(
            {"input": "Hi.", "conversation": conversation}, transport=Transport.HTTP
        )

        async def nobody(event):
            pass

        end = {
            "type": "response.completed",
            "response": {"status": "completed", "output": []},
        }
        second = conversations.turn(OPEN, request, nobody)
        async with conversations.turn(OPEN, request, nobody) as (_, emit):
            with pytest.raises(ClientError, match="changing"):
                await conversations.delete(OPEN, conversation)
            await emit(end)
            held, _ = await second.__aenter__()
            assert len(held.context) == 1
        with pytest.raises(ClientError, match="changing"):
            await conversations.delete(OPEN, conversation)
        await second.__aexit__(None, None, None)
        await conversations.delete(OPEN, conversation)


@pytest.mark.parametrize("how", ["fails", "is cancelled", "loses its client"])
async def test_a_turn_that_was_not_answered_appends_nothing_and_lets_go(how):
    async with open_rig(reply=saying("word " * 100)) as rig:
        conversation = await made(rig)
        body = {"input": "Hi.", "conversation": conversation}
        if how == "fails":
            rig.engine.faults.fail_after = 3
            assert (await post(rig, body=body)).status == 500
            rig.engine.faults.fail_after = None
        elif how == "is cancelled":
            browser = rig.browser()
            fields = {"background": True, "stream": True}
            await browser.send("POST", "/v1/responses", body | fields)
            seen = b""
            while b"output_text.delta" not in seen:
                seen += await browser.stream.receive_some()
            first = json.loads(seen.partition(b"data: ")[2].partition(b"\n")[0])
            cancelled = await post(rig, f"/v1/responses/{first['response']['id']}/cancel")
            assert cancelled.json["output"] != []
        else:
            rig.engine.hold()
            browser = rig.browser()
            await browser.send("POST", "/v1/responses", body)
            await rig.settled()
            await browser.drop()
            await rig.settled()
            rig.engine.go()
        assert await listed(rig, conversation) == []
        assert (await post(rig, body=body)).status == 200


async def test_a_warm_up_appends_nothing():
    async with open_rig() as rig:
        conversation = await made(rig)
        await post(rig, body={"input": "Hi.", "conversation": conversation, "generate": False})
        assert await listed(rig, conversation) == []


async def test_a_background_turn_appends_like_any_other():
    async with open_rig() as rig:
        conversation = await made(rig)
        body = {"input": "Hi.", "conversation": conversation, "background": True}
        await ended(rig, (await post(rig, body=body)).json["id"])
        assert texts(await listed(rig, conversation)) == ["Hi.", "Hello there."]


async def test_a_conversation_is_its_tenants_own():
    async with open_rig(*KEYS) as rig:
        ada, bob = {"authorization": "Bearer ada"}, {"authorization": "Bearer bob"}
        conversation = (await post(rig, PATH, {}, **ada)).json["id"]
        assert (await get(rig, f"{PATH}/{conversation}", **ada)).status == 200
        assert (await get(rig, f"{PATH}/{conversation}", **bob)).status == 404
        body = {"input": "Hi.", "conversation": conversation}
        assert (await post(rig, body=body, **bob)).code == "conversation_not_found"


async def test_a_conversation_is_no_response():
    async with open_rig() as rig:
        conversation = await made(rig, metadata={"a": "b"})
        for method in ("GET", "DELETE"):
            answer = await rig.browser().request(method, f"/v1/responses/{conversation}")
            assert answer.status == 404
        body = {"input": "Hi.", "previous_response_id": conversation}
        assert (await post(rig, body=body)).code == "previous_response_not_found"
        async with restarted(rig) as after:
            assert (await get(after, f"{PATH}/{conversation}")).json["metadata"] == {"a": "b"}


async def test_a_disk_that_refuses_costs_durability_and_nothing_else():
    async with open_rig() as rig:
        rig.engine.faults.persist = True
        conversation = await made(rig)
        await post(rig, body={"input": "Hi.", "conversation": conversation})
        assert len(await listed(rig, conversation)) == 2


async def test_a_disk_that_cannot_delete_says_so():
    async with open_rig() as rig:
        conversation = await made(rig)

        async def cannot(tenant, response_id):
            raise StoreError("io", "as asked")

        rig.engine.__class__.forget_response, kept = (
            lambda self, tenant, response_id: cannot(tenant, response_id),
            rig.engine.__class__.forget_response,
        )
        try:
            answer = await rig.browser().request("DELETE", f"{PATH}/{conversation}")
            assert (answer.status, answer.code) == (503, "overloaded")
            assert (await get(rig, f"{PATH}/{conversation}")).status == 200
        finally:
            rig.engine.__class__.forget_response = kept


@pytest.mark.parametrize(
    "body",
    [b"[]", b"{", b'{"id": 3}', b'{"id": "c", "created_at": 1, "metadata": {}, "items": [1]}'],
)
async def test_a_record_that_cannot_be_read_is_as_good_as_absent(body):
    async with open_rig() as rig:
        conversation = await made(rig)
        async with restarted(rig) as after:
            [record] = after.engine.manifests
            object.__setattr__(record, "body", body)
            assert (await get(after, f"{PATH}/{conversation}")).status == 404


async def test_it_does_not_grow_for_ever(monkeypatch):
    assert _MAX_ITEMS >= 10_000
    monkeypatch.setattr("broker.conversations._MAX_ITEMS", 3)
    async with open_rig() as rig:
        conversation = await made(rig, items=[user("1"), user("2")])
        answer = await post(
            rig, body={"input": [user("3"), user("4")], "conversation": conversation}
        )
        assert (answer.status, answer.code) == (400, "conversation_too_long")
        assert json.loads(rig.engine.manifests[-1].body)["id"] == conversation
