"""Steering over a socket: a running response is cut where it can be, and its successor starts by itself."""

import json

import pytest
from trio.testing import wait_all_tasks_blocked

from tests.broker.rig import open_rig
from tests.broker.wire.grammar import check_events
from tests.fakes import saying

CALL = '<tool_call>\n{"name": "ls", "arguments": {"path": "/"}}\n</tool_call>'
TOOLS = [{"type": "function", "name": "ls", "parameters": {"type": "object"}}]


async def steer(client, response_id, given="Left."):
    await client.send(
        {"type": "response.steer", "previous_response_id": response_id, "input": given}
    )


def prompt(rig, index=-1):
    return bytes(t for t in rig.engine.submitted[index].prompt if t < 256).decode()


async def split(client, *, until, events=()):
    """Reads on; responses' events by response, steer events apart. `until` says when to stop."""
    streams, steers = {}, []
    reading = iter(events)
    current = None
    while not until(streams, steers):
        event = next(reading, None) or await client.event()
        if event["type"].startswith("response.steer."):
            steers.append(event)
            continue
        if event["type"] == "response.created":
            current = event["response"]["id"]
        streams.setdefault(current, []).append(event)
    return streams, steers


def ended(count):
    def enough(streams, steers):
        return (
            len(
                [
                    s
                    for s in streams.values()
                    if s[-1]["type"]
                    in ("response.completed", "response.incomplete", "response.failed")
                ]
            )
            >= count
        )

    return enough


@pytest.mark.parametrize("lane", [None, "main"])
@pytest.mark.parametrize("store", [True, False])
async def test_a_steered_response_is_cut_and_followed_by_its_successor(lane, store):
    where = {} if lane is None else {"stream_id": lane}
    async with open_rig(reply=saying("abcdefgh" * 50, "Right.")) as rig, rig.websocket() as client:
        await client.create("Go.", store=store, temperature=0.5, **where)
        head = await client.until("response.output_text.delta")
        first = head[0]["response"]["id"]
        await steer(client, first)
        streams, steers = await split(client, until=ended(2), events=head)
        cut, successor = streams.values()
        cut = check_events(cut, stream_id=lane)
        assert cut["status"] == "incomplete"
        assert cut["incomplete_details"] == {"reason": "steered"}
        (item,) = cut["output"]
        said = item["content"][0]["text"]
        assert 0 < len(said) < 400
        successor = check_events(successor, stream_id=lane)
        assert successor["previous_response_id"] == first
        assert (successor["temperature"], successor["store"]) == (0.5, store)
        assert successor["output"][0]["content"][0]["text"] == "Right."
        (accepted,) = steers
        assert accepted["type"] == "response.steer.accepted"
        assert accepted["steer"]["previous_response_id"] == first
        assert accepted["steer"]["id"].startswith("steer_")
        assert accepted.get("stream_id") == lane
        # Exactly what was sampled before the cut, and then the steer.
        before = rig.engine.submitted[0].prompt
        sampled = rig.engine.submitted[1].prompt[len(before) :]
        assert bytes(t for t in sampled if t < 256).decode().startswith(said)
        assert prompt(rig).endswith("user\nLeft.\nassistant\n")
        assert successor["usage"]["input_tokens_details"]["cached_tokens"] >= len(before) + len(
            said
        )
        # The chain goes on from the successor, and no longer from what was cut.
        check_events(
            await client.turn(previous_response_id=successor["id"], store=store, **where),
            stream_id=lane,
        )


async def test_what_was_queued_on_the_lane_comes_after_the_successor():
    async with open_rig(reply=saying("abcdefgh" * 50, "two", "three")) as rig:
        async with rig.websocket() as client:
            await client.create()
            head = await client.until("response.output_text.delta")
            await client.create("queued")
            await steer(client, head[0]["response"]["id"])
            streams, _ = await split(client, until=ended(3), events=head)
            said = [s[-1]["response"]["output"][0]["content"][0]["text"] for s in streams.values()]
            assert said[1:] == ["two", "three"]
            assert "Left." in prompt(rig, 1)
            assert "queued" in prompt(rig, 2)


async def test_a_steer_before_anything_is_said_waits_for_the_first_words(autojump_clock):
    """Without a word of the model two messages of the user would stand side by side, which some templates refuse."""
    async with open_rig(reply=saying("abcdefgh" * 50, "Right.")) as rig, rig.websocket() as client:
        rig.engine.hold()
        await client.create()
        head = await client.until("response.in_progress")
        await steer(client, head[0]["response"]["id"])
        await wait_all_tasks_blocked()
        assert rig.engine.cancelled == []
        rig.engine.go()
        streams, _ = await split(client, until=ended(2), events=head)
        cut, _ = (check_events(stream) for stream in streams.values())
        assert cut["incomplete_details"] == {"reason": "steered"}
        assert cut["output"][0]["content"][0]["text"]


async def test_several_steers_go_on_together_and_in_order():
    async with open_rig(reply=saying("abcdefgh" * 50, "Right.")) as rig, rig.websocket() as client:
        await client.create()
        head = await client.until("response.output_text.delta")
        rig.engine.hold()
        await wait_all_tasks_blocked()
        for words in ("One.", "Two."):
            await steer(client, head[0]["response"]["id"], words)
        await wait_all_tasks_blocked()
        rig.engine.go()
        _, steers = await split(client, until=ended(2), events=head)
        assert [event["type"] for event in steers] == ["response.steer.accepted"] * 2
        assert prompt(rig).endswith("user\nOne.\nuser\nTwo.\nassistant\n")


async def test_a_response_that_ends_by_itself_first_is_followed_all_the_same(autojump_clock):
    async with open_rig(reply=saying("a", "Right."), chunk=2) as rig, rig.websocket() as client:
        rig.engine.hold()
        await client.create()
        head = await client.until("response.in_progress")
        await steer(client, head[0]["response"]["id"])
        await wait_all_tasks_blocked()
        rig.engine.go()
        streams, _ = await split(client, until=ended(2), events=head)
        first, second = (check_events(stream) for stream in streams.values())
        assert first["status"] == "completed"
        assert second["output"][0]["content"][0]["text"] == "Right."


@pytest.mark.parametrize("store", [True, False])
async def test_a_call_is_not_cut_and_the_steer_waits_for_its_result(store):
    async with open_rig(reply=saying("Well. " + CALL, "Right.")) as rig, rig.websocket() as client:
        await client.create("Go.", tools=TOOLS, store=store)
        head = await client.until("response.function_call_arguments.delta")
        await steer(client, head[0]["response"]["id"])
        streams, steers = await split(
            client, until=lambda streams, steers: len(steers) == 2, events=head
        )
        ((first, events),) = streams.items()
        response = check_events(events)
        assert response["status"] == "completed"
        call = response["output"][-1]
        accepted, pending = steers
        assert pending["type"] == "response.steer.pending"
        assert pending["steer"] == accepted["steer"]
        stub = {"type": "function_call_output", "call_id": call["call_id"], "name": "ls"}
        assert pending["required_input"] == [stub]
        answer = await client.turn(previous_response_id="resp_nobody", stream_id="elsewhere")
        assert answer[-1]["type"] == "error"  # another lane's trouble is not the steer's
        await client.send(
            {
                "type": "response.create",
                "input": [{**stub, "output": "a.txt"}],
                "previous_response_id": first,
                "store": store,
                "temperature": 0.25,
            }
        )
        response = check_events(await client.until("response.completed"))
        assert response["temperature"] == 0.25
        assert prompt(rig).index("Left.") < prompt(rig).index("a.txt")


async def test_markup_that_may_become_a_call_is_not_cut(autojump_clock):
    async with open_rig(reply=saying(CALL, "Right.")) as rig, rig.websocket() as client:
        rig.engine.hold()
        await client.create("Go.", tools=TOOLS)
        head = await client.until("response.in_progress")
        await steer(client, head[0]["response"]["id"])
        await wait_all_tasks_blocked()
        rig.engine.go()
        streams, steers = await split(
            client, until=lambda streams, steers: len(steers) == 2, events=head
        )
        (events,) = streams.values()
        assert check_events(events)["output"][0]["arguments"] == '{"path": "/"}'
        assert steers[1]["type"] == "response.steer.pending"


async def test_a_steer_that_waits_comes_back_when_its_lane_begins_something_else():
    async with open_rig(reply=saying(CALL, "Right.")) as rig, rig.websocket() as client:
        await client.create("Go.", tools=TOOLS)
        head = await client.until("response.function_call_arguments.delta")
        await steer(client, head[0]["response"]["id"])
        _, (accepted, _) = await split(
            client, until=lambda streams, steers: len(steers) == 2, events=head
        )
        await client.create("New.")
        failed = await client.event()
        assert failed["type"] == "response.steer.failed"
        assert failed["error"]["code"] == "response_not_active"
        assert failed["steer"] == {**accepted["steer"], "input": "Left."}
        check_events(await client.until("response.completed"))
        assert "Left." not in prompt(rig)


async def test_a_steer_comes_back_when_its_response_is_cancelled():
    async with open_rig(reply=saying("Well. " + CALL)) as rig, rig.websocket() as client:
        await client.create("Go.", tools=TOOLS)
        head = await client.until("response.function_call_arguments.delta")
        rig.engine.hold()
        await steer(client, head[0]["response"]["id"])
        await client.send({"type": "response.cancel"})
        await wait_all_tasks_blocked()
        rig.engine.go()
        streams, steers = await split(
            client, until=lambda streams, steers: len(steers) == 2, events=head
        )
        (events,) = streams.values()
        assert check_events(events)["incomplete_details"] == {"reason": "cancelled"}
        assert steers[1]["error"]["code"] == "response_not_active"
        check_events(await client.turn())


async def test_a_successor_that_cannot_be_made_gives_the_steer_back_and_keeps_the_parent():
    async with open_rig(reply=saying("abcdefgh" * 50, "Right.")) as rig, rig.websocket() as client:
        await client.create("Go.", store=False)
        head = await client.until("response.output_text.delta")
        first = head[0]["response"]["id"]
        rig.engine.max_context = 150
        await steer(client, first, "x" * 500)
        streams, steers = await split(
            client, until=lambda streams, steers: len(steers) == 2, events=head
        )
        assert list(streams) == [first]
        assert check_events(streams[first])["incomplete_details"] == {"reason": "steered"}
        assert steers[1]["error"]["code"] == "successor_creation_failed"
        assert "context" in steers[1]["error"]["message"]
        assert steers[1]["steer"]["input"] == "x" * 500
        rig.engine.max_context = 4096
        check_events(await client.turn(previous_response_id=first, store=False))


async def test_a_steer_of_what_is_over_or_elsewhere_says_so():
    async with open_rig() as rig, rig.websocket() as client, rig.websocket() as other:
        first = (await client.turn())[-1]["response"]["id"]
        for asker, target, code in (
            (client, first, "response_already_completed"),
            (other, first, "response_not_found"),
            (client, "resp_nobody", "response_not_found"),
            (client, "", "invalid_input"),
        ):
            await steer(asker, target)
            event = await asker.event()
            assert (event["type"], event["error"]["code"]) == ("response.steer.failed", code)
        check_events(await client.turn(previous_response_id=first))


async def test_a_warm_up_is_complete_and_the_articles_dialect_cannot_be_steered():
    async with open_rig(reply=saying("abcdefgh" * 50)) as rig, rig.websocket() as client:
        warm = (await client.turn(generate=False))[-1]["response"]["id"]
        await steer(client, warm)
        assert (await client.event())["error"]["code"] == "response_already_completed"
        await client.send({"model": "smollm2-135m-instruct", "input": "Go."})
        head = await client.until("response.output_text.delta")
        await steer(client, head[0]["response"]["id"])
        failed = await client.until("response.steer.failed", "response.done")
        assert failed[-1]["error"]["code"] == "steering_not_supported"
        await client.until("response.done")


async def test_a_turn_of_a_conversation_cannot_be_steered():
    """Its successor would have to wait for what the conversation appends."""
    async with open_rig(reply=saying("abcdefgh" * 50)) as rig, rig.websocket() as client:
        made = (await rig.browser().request("POST", "/v1/conversations", {})).json
        await client.create("Go.", conversation=made["id"])
        head = await client.until("response.output_text.delta")
        await steer(client, head[0]["response"]["id"])
        failed = await client.until("response.steer.failed", "response.completed")
        assert failed[-1]["error"]["code"] == "steering_not_supported"
        await client.until("response.completed")


async def test_a_steer_is_not_cut_in_the_middle_of_a_character(autojump_clock):
    """The rocket has four bytes, which are four tokens here."""
    async with open_rig(reply=saying("🚀" * 100, "Right.")) as rig, rig.websocket() as client:
        rig.engine.hold()
        await client.create()
        head = await client.until("response.in_progress")
        await steer(client, head[0]["response"]["id"])
        await wait_all_tasks_blocked()
        rig.engine.go()
        streams, _ = await split(client, until=ended(2), events=head)
        cut = check_events(next(iter(streams.values())))
        assert cut["incomplete_details"] == {"reason": "steered"}
        assert set(cut["output"][0]["content"][0]["text"]) == {"🚀"}


async def test_the_events_of_steering_are_what_the_official_client_knows():
    from openai.types.responses import (
        ResponseSteerAcceptedEvent,
        ResponseSteerFailedEvent,
        ResponseSteerPendingEvent,
    )

    kinds = {
        "response.steer.accepted": ResponseSteerAcceptedEvent,
        "response.steer.pending": ResponseSteerPendingEvent,
        "response.steer.failed": ResponseSteerFailedEvent,
    }
    async with open_rig(reply=saying(CALL, "Right.")) as rig, rig.websocket() as client:
        await client.create("Go.", tools=TOOLS)
        head = await client.until("response.function_call_arguments.delta")
        await steer(client, head[0]["response"]["id"])
        _, steers = await split(client, until=lambda streams, steers: len(steers) == 2, events=head)
        await client.create("New.")
        steers.append(await client.event())
        assert [event["type"] for event in steers] == list(kinds)
        for event in steers:
            kinds[event["type"]].model_validate_json(json.dumps(event), strict=True)
