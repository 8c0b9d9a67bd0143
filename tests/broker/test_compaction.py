"""Long histories to short windows: what stays, what a compaction item holds, and turns that compact."""

import json

import pytest
from openai.types.responses import ResponseCompactionItem

from broker import compaction
from broker.errors import BadRequest
from broker.session import Part
from broker.wire.items import (
    Compaction,
    FunctionCall,
    FunctionCallOutput,
    Message,
    Reasoning,
    parse_items,
)
from broker.wire.window import Window, cut, seal, unseal
from tests.broker.rig import open_rig
from tests.broker.test_background import get, post, restarted
from tests.broker.wire.grammar import check_events, check_response
from tests.fakes import saying

SYSTEM, DEVELOPER = Message(None, "system", "rules"), Message("d", "developer", "more rules")
ONE, TWO = Message(None, "user", "one"), Message(None, "user", "two")
SAID = Part((Message("msg_1", "assistant", "said"),), (1, 2))
CALL = Part((FunctionCall("fc_1", "c", "f", "{}"),), (3,))
RESULT = FunctionCallOutput(None, "c", "r")


def plan(*parts, budget=100):
    return compaction.plan(parts, budget_tokens=budget, count=len)


def test_what_waits_for_an_answer_is_not_compacted():
    found = plan(Part((SYSTEM, ONE)), SAID, Part((TWO,)))
    assert found.covered == (Part((SYSTEM,)), Part((ONE,)), SAID)
    assert found.kept == (SYSTEM, ONE)
    assert found.rest == (Part((TWO,)),)


def test_a_result_keeps_its_call():
    found = plan(Part((ONE,)), SAID, Part((TWO,)), CALL, Part((RESULT,)))
    assert found.rest == (CALL, Part((RESULT,)))
    assert found.kept == (ONE, TWO)


def test_questions_stay_from_the_newest_backwards_while_they_fit():
    parts = [Part((SYSTEM,))]
    for n in range(6):
        parts += [Part((Message(None, "user", f"ask{n}"),)), SAID]
    found = plan(*parts, budget=10)
    assert [item.text for item in found.kept] == ["rules", "ask4", "ask5"]


@pytest.mark.parametrize("parts", [(), (Part((SYSTEM,)),), (Part((SYSTEM, ONE)),)])
def test_where_nothing_was_said_there_is_nothing_to_compact(parts):
    assert plan(*parts) is None


# --- what an item holds


@pytest.mark.parametrize("before", [None, (), (SYSTEM, DEVELOPER, ONE)])
@pytest.mark.parametrize("after", [(), (*CALL.items, RESULT)])
def test_a_window_comes_back_as_it_went(before, after):
    sealed = seal(Window("sümmary\n", before, after))
    found = unseal(Compaction("cmp_1", sealed))
    assert found == Window("sümmary\n", before, after)
    item = {"type": "compaction", "id": "cmp_1", "encrypted_content": sealed}
    assert ResponseCompactionItem.model_validate(item, strict=True)
    assert parse_items([item]) == (Compaction("cmp_1", sealed),)
    assert parse_items([item | {"type": "compaction_summary"}]) == (Compaction("cmp_1", sealed),)


GOOD = seal(Window("s", (ONE,)))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "gAAAAABo-someone-elses",
        GOOD[:-3],
        GOOD[:-4] + "!!!!",
        GOOD + "ü",
        "homeport-window-1.W10=",  # []
        "homeport-window-1.e30=",  # {}
        seal(Window("s", (Compaction(None, GOOD),))),
        seal(Window("s", (), (Compaction(None, GOOD),))),
        GOOD.replace("homeport-window-1", "homeport-window-2"),
    ],
)
async def test_content_that_was_not_made_here_is_refused_by_name(content):
    with pytest.raises(BadRequest) as refused:
        cut((Compaction(None, content),))
    assert refused.value.code == "invalid_encrypted_content"
    assert refused.value.param == "input[0].encrypted_content"
    async with open_rig() as rig:
        item = {"type": "compaction", "encrypted_content": content}
        answer = await post(rig, body={"input": [item]})
        assert (answer.status, answer.code) == (400, "invalid_encrypted_content")


COVERING = Compaction("cmp_1", seal(Window("s", (SYSTEM, ONE), (TWO,))))


def test_a_covering_item_stands_for_everything_before_it():
    found = cut((TWO, Reasoning(None, "t"), COVERING, DEVELOPER))
    assert (found.left, found.items, found.at) == ((SYSTEM, ONE, COVERING, TWO), (DEVELOPER,), 3)
    newer = cut((TWO, COVERING, TWO, COVERING))
    assert (newer.items, newer.at) == ((), 4)


def test_instructions_that_the_client_sends_replace_the_ones_that_were_left():
    assert cut((DEVELOPER, TWO, COVERING)).left == (DEVELOPER, ONE, COVERING, TWO)


def test_an_item_that_covers_nothing_leaves_the_list_alone():
    summary = Compaction(None, seal(Window("s")))
    found = cut((ONE, summary, TWO))
    assert (found.left, found.items, found.covers) == (None, (ONE, summary, TWO), False)


# --- a turn that compacts

RULE = [{"type": "compaction", "compact_threshold": 200}]


def fed(submit):
    return bytes(token for token in submit.prompt if token < 256).decode()


async def test_a_long_prompt_is_answered_from_its_summary():
    async with open_rig(reply=saying("Noted.", "It was about tea.", "Yes.")) as rig:
        first = await post(rig, body={"input": "Tea. " * 40, "instructions": "Be brief."})
        answer = await post(
            rig,
            body={
                "input": "Really?",
                "instructions": "Be brief.",
                "previous_response_id": first.json["id"],
                "context_management": RULE,
                "stream": True,
            },
        )
        response = check_events(answer.events)
        item, message = response["output"]
        assert (item["type"], message["content"][0]["text"]) == ("compaction", "Yes.")
        assert response["homeport:compaction"]["output_tokens"] == len("It was about tea.") + 1
        asked, answered = rig.engine.submitted[1:]
        assert fed(asked).endswith(f"user\n{compaction.REQUEST}\nassistant\n")
        assert asked.prompt[: len(rig.engine.submitted[0].prompt)] == rig.engine.submitted[0].prompt
        assert "Tea. Tea." not in fed(answered)
        assert fed(answered) == (
            "system\nBe brief.\n"
            f"user\n{compaction.HEADING}It was about tea.\n"
            "user\nReally?\nassistant\n"
        )
        assert response["homeport:cache"]["part"] == "context_management"


async def chain(rig):
    """Two turns of which the second compacted; its response and the input that led to it."""
    first = {"role": "user", "content": "Tea. " * 9}
    said = (await post(rig, body={"input": [first]})).json["output"]
    items = [first, *said, {"role": "user", "content": "Really?"}]
    rule = [{"type": "compaction", "compact_threshold": 90}]
    answer = await post(rig, body={"input": items, "context_management": rule})
    return answer.json, items


@pytest.mark.parametrize("how", ["by id", "replayed", "shortened", "by reference"])
@pytest.mark.parametrize("after_restart", [False, True])
async def test_a_compacted_turn_is_continued_exactly_however_it_is_named(how, after_restart):
    async with open_rig(reply=saying("Noted.", "Tea was drunk.", "Yes.")) as rig:
        response, items = await chain(rig)
        assert [item["type"] for item in response["output"]] == ["compaction", "message"]
        before = (*rig.engine.submitted[-1].prompt, *b"Yes.", 257)
        more = {"role": "user", "content": "Good."}
        references = [{"type": "item_reference", "id": one["id"]} for one in response["output"]]
        body = {
            "by id": {"input": [more], "previous_response_id": response["id"]},
            "replayed": {"input": [*items, *response["output"], more]},
            "shortened": {"input": [*response["output"], more]},
            "by reference": {"input": [*items, *references, more]},
        }[how]

        async def check(port):
            answer = await post(port, body=body)
            check_response(answer.json)
            assert port.engine.submitted[-1].prompt[: len(before)] == before

        if after_restart:
            async with restarted(rig) as after:
                await check(after)
        else:
            await check(rig)


async def test_a_window_takes_the_place_of_what_an_id_names_as_well():
    """A client may send a window and an id: the window stands for everything before it."""
    async with open_rig(reply=saying("Noted.", "Tea was drunk.", "Yes.")) as rig:
        response, _ = await chain(rig)
        other = (await post(rig, body={"input": "Coffee?"})).json["id"]
        more = {"role": "user", "content": "Good."}
        body = {"input": [response["output"][0], more], "previous_response_id": other}
        assert (await post(rig, body=body)).status == 200
        assert "Coffee" not in fed(rig.engine.submitted[-1])
        assert "Tea was drunk." in fed(rig.engine.submitted[-1])


TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
SPOKEN_CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


async def test_a_window_carries_the_calls_whose_results_it_had_to_answer():
    """With their sampled tokens; and whatever an id in the same request names, the window stands for it."""
    async with open_rig(reply=saying("Noted.", SPOKEN_CALL, "Tea.", "Done.", "Yes.")) as rig:
        tools = {"tools": [TOOL]}
        first = await post(rig, body={"input": "Tea. " * 9, **tools})
        body = {"input": "Look.", "previous_response_id": first.json["id"], **tools}
        called = await post(rig, body=body)
        result = {"type": "function_call_output", "output": "a cup"}
        result["call_id"] = called.json["output"][0]["call_id"]
        rule = [{"type": "compaction", "compact_threshold": 90}]
        body = {"input": [result], "previous_response_id": called.json["id"], **tools}
        answer = await post(rig, body=body | {"context_management": rule})
        window = answer.json["output"][0]
        assert window["type"] == "compaction"
        before = rig.engine.submitted[-1].prompt
        assert SPOKEN_CALL in fed(rig.engine.submitted[-1])
        other = (await post(rig, body={"input": "Coffee?", **tools})).json["id"]
        body = {"input": [window], "previous_response_id": other, **tools}
        assert (await post(rig, body=body)).status == 200
        assert rig.engine.submitted[-1].prompt == before


async def test_the_item_that_broke_a_prefix_is_named_by_its_place_in_the_whole_list():
    async with open_rig(reply=saying("Noted.", "Tea was drunk.", "Yes.")) as rig:
        response, items = await chain(rig)
        head = [*items, response["output"][0]]
        ask = {"role": "user", "content": "Good."}
        key = {"prompt_cache_key": "thread"}
        await post(rig, body={"input": [*head, ask], **key})
        answer = await post(rig, body={"input": [*head, ask | {"content": "Bad."}], **key})
        assert answer.json["homeport:cache"]["part"] == f"input[{len(head)}]"


async def test_an_output_holds_what_the_model_said_of_it():
    async with open_rig(reply=saying("Noted.", "Tea was drunk.", "Yes.")) as rig:
        response, _ = await chain(rig)
        node = rig.port.sessions.known("", response["id"])
        assert [item.id for item in node.output] == [response["output"][1]["id"]]
        assert node.item_ids == tuple(item["id"] for item in response["output"])


async def test_a_prompt_under_the_threshold_is_left_alone():
    async with open_rig() as rig:
        rule = [{"type": "compaction", "compact_threshold": 1000}]
        answer = await post(rig, body={"input": "Hi.", "context_management": rule})
        assert [item["type"] for item in answer.json["output"]] == ["message"]
        assert len(rig.engine.submitted) == 1


async def test_one_long_question_cannot_be_compacted_and_is_answered():
    async with open_rig() as rig:
        rule = [{"type": "compaction", "compact_threshold": 50}]
        answer = await post(rig, body={"input": "x" * 300, "context_management": rule})
        assert [item["type"] for item in answer.json["output"]] == ["message"]


async def test_the_lease_of_a_summary_is_closed():
    async with open_rig(reply=saying("Noted.", "Tea.", "Yes.")) as rig:
        await chain(rig)
        summary = rig.engine.finished[1].lease
        assert rig.engine.leases[summary].name == "CLOSED"


async def test_a_cancel_while_it_is_summarised_compacts_nothing():
    async with open_rig(reply=saying("Noted.", "word " * 200, "word " * 200)) as rig:
        first = (await post(rig, body={"input": "Tea. " * 40})).json["id"]
        body = {"input": "Really?", "previous_response_id": first, "context_management": RULE}
        rig.engine.hold()
        response_id = (await post(rig, body=body | {"background": True})).json["id"]
        await rig.settled()
        answer = rig.browser()
        await answer.send("POST", f"/v1/responses/{response_id}/cancel")
        await rig.settled()
        rig.engine.go()
        cancelled = (await answer.answer()).json
        check_response(cancelled)
        assert (cancelled["status"], cancelled["output"]) == ("cancelled", [])


async def test_what_cannot_be_summarised_is_answered_as_it_is():
    async with open_rig() as rig:
        items = [{"role": "user", "content": "q" * 3900}, {"role": "assistant", "content": "a"}]
        items.append({"role": "user", "content": "And?"})
        answer = await post(rig, body={"input": items, "context_management": RULE})
        assert [item["type"] for item in answer.json["output"]] == ["message"]


# --- compacting without a turn


async def test_a_window_is_the_questions_and_a_summary_and_begins_another_chain():
    async with open_rig(reply=saying("Noted.", "Tea was drunk.", "Yes.")) as rig:
        first = await post(rig, body={"input": "Tea?", "instructions": "Be brief."})
        answer = await post(
            rig, "/v1/responses/compact", {"previous_response_id": first.json["id"]}
        )
        window = answer.json
        assert (window["object"], window["id"].partition("_")[0]) == ("response.compaction", "resp")
        assert [item["type"] for item in window["output"]] == ["message", "compaction"]
        assert window["usage"]["output_tokens"] == len("Tea was drunk.") + 1
        assert (await get(rig, f"/v1/responses/{window['id']}")).status == 404
        more = [*window["output"], {"role": "user", "content": "Good?"}]
        last = await post(rig, body={"input": more})
        check_response(last.json)
        assert fed(rig.engine.submitted[-1]) == (
            f"user\nTea?\nuser\n{compaction.HEADING}Tea was drunk.\nuser\nGood?\nassistant\n"
        )


async def test_a_conversation_is_compacted_and_goes_on_from_its_window():
    async with open_rig(reply=saying("Noted.", "Tea was drunk.", "Yes.", "Good.")) as rig:
        conversation = (await post(rig, "/v1/conversations")).json["id"]
        named = {"conversation": conversation}
        await post(rig, body={"input": "Tea. " * 9, **named})
        window = (await post(rig, "/v1/responses/compact", named)).json["output"]
        assert [item["type"] for item in window] == ["message", "compaction"]
        rule = [{"type": "compaction", "compact_threshold": 90}]
        second = await post(rig, body={"input": "And?", "context_management": rule, **named})
        assert [item["type"] for item in second.json["output"]] == ["compaction", "message"]
        before = rig.engine.submitted[-1].prompt
        await post(rig, body={"input": "More?", **named})
        assert rig.engine.submitted[-1].prompt[: len(before)] == before


async def test_a_history_too_long_to_be_read_at_once_is_compacted_without_its_oldest_turns():
    async with open_rig() as rig:
        items = []
        for n in range(30):
            items += [
                {"role": "user", "content": f"{n} " * 60},
                {"role": "assistant", "content": "a" * 60},
            ]
        answer = await post(rig, "/v1/responses/compact", {"input": items})
        assert answer.status == 200
        assert len(rig.engine.submitted[0].prompt) <= rig.engine.max_context * 3 / 4
        json.dumps(answer.json)


async def test_a_client_that_leaves_ends_its_compaction():
    async with open_rig() as rig:
        rig.engine.hold()
        browser = rig.browser()
        await browser.send("POST", "/v1/responses/compact", {"input": "Hi."})
        await rig.settled()
        assert len(rig.engine.submitted) == 1
        await browser.drop()
        await rig.settled()
        assert len(rig.engine.cancelled) == 1
        assert rig.port.admission.statistics().admitted == 0


@pytest.mark.parametrize(
    ("covered", "budget", "most"),
    [(100, 500, 64), (1000, 500, 250), (9000, 500, 500), (9000, 2000, 1024)],
)
def test_a_summary_is_shorter_than_what_it_is_of(covered, budget, most):
    assert compaction.summary_tokens(covered, budget) == most


async def test_what_is_wrong_with_a_compaction_is_said():
    async with open_rig() as rig:
        for body, code in (
            ({"previous_response_id": "resp_gone"}, "previous_response_not_found"),
            ({"model": "gpt-unknown"}, "model_not_found"),
            ({"input": "x" * 9000}, "context_length_exceeded"),
        ):
            assert (await post(rig, "/v1/responses/compact", body)).code == code
        rig.engine.faults.fail_after = 1
        answer = await post(rig, "/v1/responses/compact", {"input": "Hi."})
        assert (answer.status, answer.code) == (500, "server_error")
