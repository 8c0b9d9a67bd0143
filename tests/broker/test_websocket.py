"""The WebSocket side against a fake engine: lanes, limits, errors, and every way a connection ends."""

import itertools
import json
import struct
from contextlib import suppress
from types import SimpleNamespace

import h11
import pytest
import trio
import trio_websocket
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from broker import offences
from broker.config import WebSocket
from broker.websocket import Fragments, Metered
from tests.broker.rig import open_rig
from tests.broker.wire.grammar import TERMINALS, check_events
from tests.fakes import saying
from tiers.policy import SessionClass

NOT_FOUND = "previous_response_not_found"


def response_id(events):
    return events[-1]["response"]["id"]


async def test_a_turn_is_a_good_event_stream_without_stream_id_on_the_default_lane():
    async with open_rig() as rig, rig.websocket() as client:
        response = check_events(await client.turn())
        assert response["output"][0]["content"][0]["text"] == "Hello there."


async def test_a_store_false_response_is_continued_on_its_connection_and_dead_on_the_next():
    async with open_rig() as rig:
        async with rig.websocket() as client:
            first = await client.turn(store=False)
            second = await client.turn(store=False, previous_response_id=response_id(first))
            usage = check_events(second)["usage"]
            assert usage["input_tokens_details"]["cached_tokens"] > 0
        async with rig.websocket() as client:
            (error,) = await client.turn(previous_response_id=response_id(second))
            assert error["status"] == 400
            assert error["error"]["code"] == NOT_FOUND
            assert error["error"]["param"] == "previous_response_id"
            check_events(await client.turn())  # the socket stays open
        async with rig.websocket() as client:
            stored = await client.turn(store=True)
        async with rig.websocket() as client:
            check_events(await client.turn(previous_response_id=response_id(stored)))


async def test_a_handshake_that_names_a_session_has_its_kv_fetched_before_any_frame():
    async with open_rig() as rig:
        async with rig.websocket(thread_id="thread", session_id="session") as client:
            check_events(await client.turn(store=False))
        (node,) = rig.port.sessions.of_session("", "thread")
        async with rig.websocket(thread_id="thread"):
            await rig.settled()
            assert rig.engine.prefetched == []  # it has just been there
        rig.clock.time += 60
        async with rig.websocket(thread_id="nobody", session_id="session"):
            await rig.settled()
            assert rig.engine.prefetched == [node.tokens]
        async with rig.websocket(thread_id="thread") as client:
            check_events(await client.turn(prompt_cache_key="thread"))
        assert len(rig.engine.prefetched) == 1


async def test_a_handshake_that_names_another_tenants_session_fetches_nothing():
    async with open_rig("auth.keys=['a', 'b']") as rig:
        async with rig.websocket(thread_id="thread", x_api_key="a") as client:
            check_events(await client.turn())
        rig.clock.time += 60
        async with rig.websocket(thread_id="thread", x_api_key="b"):
            await rig.settled()
            assert rig.engine.prefetched == []


async def test_a_tool_call_on_an_open_socket_is_a_burst_until_the_socket_closes():
    call = '<tool_call>\n{"name": "ls", "arguments": {}}\n</tool_call>'
    async with open_rig(reply=saying(call)) as rig:
        async with rig.websocket() as client:
            await client.turn(tools=[{"type": "function", "name": "ls"}])
            assert list(rig.engine.leases.values()) == [SessionClass.BURST]
        await rig.settled()
        assert list(rig.engine.leases.values()) == [SessionClass.CLOSED]


async def test_a_deleted_response_cannot_be_continued_even_on_its_own_connection():
    async with open_rig() as rig, rig.websocket() as client:
        named = response_id(await client.turn())
        assert (await rig.browser().request("DELETE", f"/v1/responses/{named}")).status == 200
        (error,) = await client.turn(previous_response_id=named)
        assert error["error"]["code"] == NOT_FOUND


async def test_creates_on_a_busy_lane_are_queued_and_answered_in_order():
    async with open_rig(reply=saying("one", "two", "three")) as rig, rig.websocket() as client:
        for name in "abc":
            await client.create(name, metadata={"n": name})
        for name, said in zip("abc", ("one", "two", "three"), strict=True):
            response = check_events(await client.until("response.completed"))
            assert response["metadata"] == {"n": name}
            assert response["output"][0]["content"][0]["text"] == said


async def test_named_lanes_run_at_the_same_time_and_every_event_names_its_lane():
    async with open_rig() as rig, rig.websocket() as client:
        rig.engine.hold()
        for lane in ("a", "b", None):
            await client.create(**({"stream_id": lane} if lane else {}))
        await wait_all_tasks_blocked()
        assert len(rig.engine.submitted) == 3
        rig.engine.go()
        lanes = {"a": [], "b": [], None: []}
        while not all(
            events and events[-1]["type"] == "response.completed" for events in lanes.values()
        ):
            event = await client.event()
            lanes[event.get("stream_id")].append(event)
        for lane, events in lanes.items():
            check_events(events, stream_id=lane)


async def test_in_flight_turns_are_bounded_over_all_lanes_and_the_rest_wait():
    async with open_rig("websocket.max_in_flight=2") as rig, rig.websocket() as client:
        rig.engine.hold()
        for lane in "abc":
            await client.create(stream_id=lane)
        await wait_all_tasks_blocked()
        assert len(rig.engine.submitted) == 2
        rig.engine.go()
        done = [(await client.until("response.completed"))[-1]["stream_id"] for _ in "abc"]
        assert sorted(done) == ["a", "b", "c"]


async def test_the_number_of_lane_names_is_bounded_and_known_names_go_on():
    async with open_rig("websocket.max_lanes=2") as rig, rig.websocket() as client:
        for lane in ("a", "b"):
            check_events(await client.turn(stream_id=lane), stream_id=lane)
        (error,) = await client.turn(stream_id="c")
        assert error["error"]["code"] == "websocket_stream_limit_reached"
        assert (error["status"], error["stream_id"]) == (400, "c")
        check_events(await client.turn(stream_id="a"), stream_id="a")
        check_events(await client.turn())


async def test_more_creates_than_may_queue_get_an_error_event_in_their_turn():
    async with open_rig("websocket.max_in_flight=1", "websocket.max_queued=2") as rig:
        async with rig.websocket() as client:
            rig.engine.hold()
            for _ in range(4):
                await client.create()
            await wait_all_tasks_blocked()
            rig.engine.go()
            for _ in range(3):
                check_events(await client.until("response.completed"))
            error = await client.event()
            assert (error["type"], error["status"]) == ("error", 429)
            assert error["headers"]["retry-after"]
            for _ in range(4):
                check_events(await client.turn())


async def test_a_flood_of_creates_closes_with_1013():
    async with open_rig("websocket.max_in_flight=1", "websocket.max_queued=2") as rig:
        async with rig.websocket() as client:
            rig.engine.hold()
            for _ in range(3 + 64):
                await client.create()
            await wait_all_tasks_blocked()
            assert rig.port.websockets == 1
            await client.create()
            assert await client.closed() == 1013


async def test_forty_creates_on_one_lane_and_seventeen_other_lanes_are_all_served_in_order():
    """The acceptance's load: order kept, at most 16 running, none refused, every event tagged rightly."""
    async with open_rig(reply=saying("Yes.")) as rig, rig.websocket() as client:
        rig.engine.hold()
        for number in range(40):
            await client.create(stream_id="busy", metadata={"n": str(number)})
        for number in range(17):
            await client.create(stream_id=f"lane-{number}", metadata={"n": "0"})
        await wait_all_tasks_blocked()
        assert len(rig.engine.submitted) == len(rig.engine._running) == 16
        rig.engine.go()
        served, most = {}, 0
        while sum(len(turns) for turns in served.values()) < 57 or not all(
            turn[-1]["type"] == "response.completed" for turns in served.values() for turn in turns
        ):
            event = await client.event()
            most = max(most, len(rig.engine._running))
            turns = served.setdefault(event["stream_id"], [])
            if event["type"] == "response.created":
                turns.append([])
            turns[-1].append(event)
        assert most <= 16
        for lane, turns in served.items():
            numbers = [check_events(turn, stream_id=lane)["metadata"]["n"] for turn in turns]
            assert numbers == [str(number) for number in range(40 if lane == "busy" else 1)]


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("{", "invalid_json"),
        ("[1]", "invalid_type"),
        ('{"type": 3}', "invalid_type"),
        ("{}", "missing_required_parameter"),
        ('{"type": "response.create", "input": 3}', "invalid_type"),
        ('{"type": "response.create", "stream_id": ""}', "invalid_stream_id"),
        ('{"type": "response.create", "model": "other"}', "model_not_found"),
        ('{"type": "response.create", "input": [], "a": NaN}', "invalid_json"),
    ],
)
async def test_a_bad_frame_is_an_error_event_and_the_connection_lives(frame, code):
    async with open_rig() as rig, rig.websocket() as client:
        await client.send(frame)
        error = await client.event()
        assert error["type"] == "error"
        assert isinstance(error["status"], int)
        assert error["error"]["code"] == code
        check_events(await client.turn())


async def test_unknown_client_events_are_ignored_without_an_answer():
    async with open_rig() as rig, rig.websocket() as client:
        await client.send({"type": "response.processed", "response_id": "x"})
        for _ in range(2):
            await client.send({"type": "response.cancel", "response_id": "unknown"})
            await client.send({"type": "response.cancel"})
            check_events(await client.turn())


@pytest.mark.parametrize("named", [True, False])
async def test_cancel_ends_the_running_response_incomplete_and_the_lane_goes_on(named):
    async with open_rig(reply=saying("x" * 500)) as rig, rig.websocket() as client:
        await client.create()
        events = await client.until("response.output_text.delta")
        frame = {"type": "response.cancel"}
        if named:
            frame["response_id"] = events[0]["response"]["id"]
        await client.send(frame)
        events += await client.until("response.incomplete", "response.completed")
        response = check_events(events)
        assert response["incomplete_details"] == {"reason": "cancelled"}
        assert rig.engine.cancelled


async def test_a_response_can_be_cancelled_by_its_id_before_the_engine_has_begun_it(
    autojump_clock,
):
    """It was announced after half a second, so the client may name it."""
    async with open_rig() as rig, rig.websocket() as client:
        rig.engine.hold()
        await client.create()
        events = await client.until("response.in_progress")
        await client.send({"type": "response.cancel", "response_id": events[0]["response"]["id"]})
        events += await client.until("response.incomplete", "response.completed")
        assert check_events(events)["incomplete_details"] == {"reason": "cancelled"}
        rig.engine.go()
        check_events(await client.turn())


async def test_a_cancel_that_names_a_lane_stops_no_other():
    async with open_rig(reply=saying("x" * 50)) as rig, rig.websocket() as client:
        rig.engine.hold()
        for lane in ("a", "b"):
            await client.create(stream_id=lane)
        await wait_all_tasks_blocked()
        await client.send({"type": "response.cancel", "stream_id": "a"})
        events = await client.until("response.incomplete", "response.completed")
        assert check_events(events, stream_id="a")["status"] == "incomplete"
        rig.engine.go()
        events = await client.until("response.incomplete", "response.completed")
        assert check_events(events, stream_id="b")["status"] == "completed"


async def test_a_cancel_of_another_response_stops_nothing():
    async with open_rig() as rig, rig.websocket() as client:
        rig.engine.hold()
        await client.create()
        await wait_all_tasks_blocked()
        await client.send({"type": "response.cancel", "response_id": "resp_other"})
        await wait_all_tasks_blocked()
        rig.engine.go()
        response = check_events(await client.until("response.completed", "response.incomplete"))
        assert response["status"] == "completed"


async def test_a_bad_continuation_takes_its_lanes_parent_with_it_and_a_fork_keeps_it():
    async with open_rig() as rig, rig.websocket() as client:
        parent = response_id(await client.turn(store=False))
        await client.turn(previous_response_id=parent, temperature=9, stream_id="fork")
        check_events(await client.turn("more", previous_response_id=parent, store=False))
        parent = response_id(await client.turn(store=False))
        (error,) = await client.turn(previous_response_id=parent, temperature=9)
        assert error["error"]["param"] == "temperature"
        (error,) = await client.turn("more", previous_response_id=parent, store=False)
        assert error["error"]["code"] == NOT_FOUND


@pytest.mark.parametrize("fault", [{"model": "other"}, {"temperature": 9}, {"input": 3}])
async def test_whatever_makes_a_continuation_fail_takes_its_lanes_parent_along(fault):
    async with open_rig() as rig, rig.websocket() as client:
        parent = response_id(await client.turn(store=False))
        ask = {"type": "response.create", "input": "more", "previous_response_id": parent}
        await client.send(ask | fault)
        assert (await client.event())["type"] == "error"
        (error,) = await client.turn("more", previous_response_id=parent, store=False)
        assert error["error"]["code"] == NOT_FOUND


async def test_a_continuation_that_breaks_after_it_began_takes_its_parent_along_and_a_fork_does_not():
    async with open_rig() as rig, rig.websocket() as client:
        parent = response_id(await client.turn(store=False))
        ask = {"previous_response_id": parent, "store": False}
        rig.engine.faults.fail_after = 2
        assert (await client.turn(stream_id="fork", **ask))[-1]["type"] == "response.failed"
        rig.engine.faults.fail_after = None
        check_events(await client.turn(stream_id="fork", **ask), stream_id="fork")
        rig.engine.faults.fail_after = 2
        assert (await client.turn(**ask))[-1]["type"] == "response.failed"
        rig.engine.faults.fail_after = None
        (error,) = await client.turn(**ask)
        assert error["error"]["code"] == NOT_FOUND


async def test_a_frame_with_a_lane_that_cannot_be_evicts_nothing():
    async with open_rig() as rig, rig.websocket() as client:
        parent = response_id(await client.turn(store=False))
        (error,) = await client.turn(stream_id="no good", previous_response_id=parent)
        assert error["error"]["code"] == "invalid_stream_id"
        assert "stream_id" not in error
        check_events(await client.turn(previous_response_id=parent, store=False))


async def test_a_fork_has_its_parent_from_in_progress_on_whatever_the_source_lane_does(
    autojump_clock,
):
    """The barrier that clients are told to wait for, with nothing stored and the engine busy."""
    async with open_rig() as rig, rig.websocket() as client:
        parent = response_id(await client.turn("one", store=False, stream_id="source"))
        rig.engine.hold()
        ask = {"previous_response_id": parent, "store": False}
        await client.create("fork", stream_id="fork", **ask)
        forked = await client.until("response.in_progress")
        await client.create("two", stream_id="source", **ask)
        await client.until("response.in_progress")
        rig.engine.go()
        ended = {}
        while len(ended) < 2:
            event = await client.event()
            forked += [event] if event["stream_id"] == "fork" else []
            if event["type"] == "response.completed":
                ended[event["stream_id"]] = event["response"]
        forks = check_events(forked, stream_id="fork")
        assert forks["previous_response_id"] == parent
        source, fork = (bytes(t for t in s.prompt if t < 256) for s in rig.engine.submitted[-2:])
        assert b"one" in source
        assert b"one" in fork
        (error,) = await client.turn(stream_id="late", **ask)  # the source lane has gone on
        assert error["error"]["code"] == NOT_FOUND


async def test_a_lane_that_is_used_again_without_a_parent_starts_afresh():
    async with open_rig() as rig, rig.websocket() as client:
        first = response_id(await client.turn("one", store=False, stream_id="a"))
        check_events(await client.turn("two", store=False, stream_id="a"), stream_id="a")
        assert b"one" not in bytes(t for t in rig.engine.submitted[-1].prompt if t < 256)
        (error,) = await client.turn(previous_response_id=first, store=False, stream_id="a")
        assert error["error"]["code"] == NOT_FOUND


async def test_an_error_in_one_lane_does_not_disturb_another():
    async with open_rig() as rig, rig.websocket() as client:
        rig.engine.hold()
        await client.create(stream_id="good")
        await client.create(stream_id="bad", previous_response_id="resp_nobody")
        error = await client.event()
        assert (error["stream_id"], error["error"]["code"]) == ("bad", NOT_FOUND)
        rig.engine.go()
        check_events(await client.until("response.completed"), stream_id="good")


async def test_a_silent_turn_repeats_in_progress(autojump_clock):
    async with open_rig() as rig, rig.websocket() as client:
        rig.engine.hold()
        await client.create()
        await client.until("response.in_progress")
        before = trio.current_time()
        for _ in range(3):
            assert (await client.event())["type"] == "response.in_progress"
        assert trio.current_time() - before <= 45
        rig.engine.go()


async def test_generate_false_is_acknowledged_before_its_prefill():
    async with open_rig() as rig, rig.websocket() as client:
        rig.engine.hold()
        events = await client.turn(generate=False, store=False)
        assert check_events(events)["output"] == []
        rig.engine.go()
        check_events(
            await client.turn("more", previous_response_id=response_id(events), store=False)
        )


@pytest.mark.parametrize("lane", [None, "other"])
@pytest.mark.parametrize("by_id", [True, False])
async def test_what_a_warm_up_computes_is_waited_for_by_id_or_replay_and_not_computed_again(
    by_id, lane, autojump_clock
):
    async with open_rig() as rig, rig.websocket() as client:
        rig.engine.hold()
        warm = await client.turn("x" * 500, generate=False, store=False)
        more = {"role": "user", "content": "Go."}
        if by_id:
            ask = {"input": [more], "previous_response_id": response_id(warm)}
        else:
            ask = {"input": [{"role": "user", "content": "x" * 500}, more]}
        where = {} if lane is None else {"stream_id": lane}
        await client.send({"type": "response.create", "store": False, **where, **ask})
        events = await client.until("response.in_progress")
        await trio.sleep(25)
        assert len(rig.engine.submitted) == 1
        rig.engine.go()
        events += await client.until("response.completed")
        usage = check_events(events, stream_id=lane)["usage"]
        warmed = len(rig.engine.submitted[0].prompt)
        assert usage["input_tokens_details"]["cached_tokens"] == warmed > 500


async def test_a_lane_does_not_wait_for_another_lanes_warm_up(autojump_clock):
    async with open_rig() as rig, rig.websocket() as client:
        rig.engine.hold()
        await client.turn("x" * 500, generate=False, store=False, stream_id="warm")
        await client.create("y" * 500, stream_id="other")
        await wait_all_tasks_blocked()
        assert [submit.sampling.max_tokens > 0 for submit in rig.engine.submitted] == [False, True]
        rig.engine.go()
        check_events(await client.until("response.completed"), stream_id="other")


async def test_two_warm_ups_of_the_same_are_computed_once():
    async with open_rig() as rig, rig.websocket() as client:
        rig.engine.hold()
        for lane in ("a", "b"):
            await client.turn("x" * 500, generate=False, store=False, stream_id=lane)
        await wait_all_tasks_blocked()
        assert len(rig.engine.submitted) == 1
        rig.engine.go()
        await wait_all_tasks_blocked()
        first, second = rig.engine.finished
        assert first.usage.computed_tokens > 500
        assert second.usage.computed_tokens == 1


async def test_a_warm_up_goes_with_its_socket_and_leaves_no_place_taken():
    async with open_rig() as rig:
        async with rig.websocket() as client:
            rig.engine.hold()
            await client.turn("x" * 500, generate=False, store=False)
            await wait_all_tasks_blocked()
            assert rig.port.admission.statistics().admitted == 1  # a prefill is work like any other
        await wait_all_tasks_blocked()
        assert rig.engine.cancelled == [submit.request for submit in rig.engine.submitted]
        assert rig.port.admission.statistics().admitted == 0


async def test_a_turn_that_waits_for_a_warm_up_can_be_cancelled(autojump_clock):
    async with open_rig() as rig, rig.websocket() as client:
        rig.engine.hold()
        warm = response_id(await client.turn("x" * 500, generate=False, store=False))
        await client.create(previous_response_id=warm, store=False)
        events = await client.until("response.in_progress")
        await client.send({"type": "response.cancel", "response_id": events[0]["response"]["id"]})
        events += await client.until("response.incomplete", "response.completed")
        assert check_events(events)["incomplete_details"] == {"reason": "cancelled"}


async def test_a_warm_up_with_a_single_place_for_turns_blocks_nobody_for_good():
    async with open_rig("admission.max_turns=1") as rig, rig.websocket() as client:
        warm = response_id(await client.turn("x" * 500, generate=False, store=False))
        check_events(await client.turn(previous_response_id=warm, store=False))


async def test_the_article_dialect_gets_response_done_and_goes_on_with_a_tools_result():
    call = 'ok <tool_call>{"name": "ls", "arguments": {}}</tool_call>'
    async with open_rig(reply=saying(call, "Done.")) as rig, rig.websocket() as client:
        tools = [{"type": "function", "name": "ls", "parameters": {"type": "object"}}]
        await client.send(
            {
                "model": "smollm2-135m-instruct",
                "system": "Be brief.",
                "tools": tools,
                "input": "Go.",
            }
        )
        events = await client.until("response.done")
        assert check_events(events[:-1]) == events[-1]["response"]
        opened = events[-1]["response"]["id"]
        await client.send(
            {"type": "conversation.item.create", "item": {"role": "tool", "content": "a.txt"}}
        )
        events = await client.until("response.done")
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Done."
        assert events[-1]["response"]["previous_response_id"] == opened
        assert b"a.txt" in bytes(t for t in rig.engine.submitted[-1].prompt if t < 256)


async def test_an_article_item_before_any_opening_is_an_error_event():
    async with open_rig() as rig, rig.websocket() as client:
        await client.send(
            {"type": "conversation.item.create", "item": {"role": "tool", "content": "x"}}
        )
        assert (await client.event())["error"]["code"] == "conversation_not_open"


async def test_a_dropped_transport_cancels_the_turns_and_gives_their_leases_up():
    async with open_rig(reply=saying("x" * 500)) as rig:
        async with rig.websocket() as client:
            await client.turn(max_output_tokens=3)
            rig.engine.hold()
            await client.create()
            await client.create(stream_id="b")
            await wait_all_tasks_blocked()
        await wait_all_tasks_blocked()
        assert len(rig.engine.cancelled) == 2
        (lease,) = {finished.lease for finished in rig.engine.finished[:1]}
        assert rig.engine.leases[lease] is SessionClass.CLOSED
        assert rig.port.websockets == 0
        assert rig.port.admission.statistics().admitted == 0


async def test_a_close_frame_is_answered_and_ends_the_connection():
    async with open_rig() as rig, rig.websocket() as client:
        await client.turn()
        await client.connection.aclose()
        await wait_all_tasks_blocked()
        assert rig.port.websockets == 0


async def test_who_breaks_the_rules_again_and_again_is_refused_for_a_while(autojump_clock):
    async with open_rig('auth.keys=["rude", "good"]') as rig:
        for _ in range(offences.MOST):
            async with rig.websocket(authorization="Bearer rude") as client:
                await client.stream.send_all(frame(b"", opcode=9) * 1000)
                assert await client.closed() == 1008
        stream = rig.stream()
        await stream.send_all(handshake(x_api_key="rude"))
        head, _, body = bytes(await stream.receive_some()).partition(b"\r\n\r\n")
        assert b" 503 " in head.split(b"\r\n")[0]
        assert b"\r\nretry-after: 30" in head
        assert json.loads(body)["error"]["code"] == "too_many_violations"
        await trio.aclose_forcefully(stream)
        async with rig.websocket(authorization="Bearer good") as client:
            check_events(await client.turn())
        await trio.sleep(offences.BARRED_S)
        async with rig.websocket(authorization="Bearer rude") as client:
            check_events(await client.turn())


async def test_a_ping_that_crosses_our_close_is_no_fault_of_ours(autojump_clock, caplog):
    async with open_rig() as rig:
        client, server = trio.testing.lockstep_stream_pair()  # nothing is sent before it is read
        rig.nursery.start_soon(rig.door.serve, server)
        await client.send_all(handshake())
        await client.receive_some()
        await client.send_all(frame(b"binary", opcode=2))
        await wait_all_tasks_blocked()
        await client.send_all(frame(b"late", opcode=9) * 2)
        said = b""
        while more := await client.receive_some():
            said += more
        assert said == b"\x88\x13" + struct.pack("!H", 1003) + b"Text frames only."
        await wait_all_tasks_blocked()
        assert rig.port.websockets == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_binary_frame_closes_with_1003():
    async with open_rig() as rig, rig.websocket() as client:
        await client.send(b"\x00")
        assert await client.closed() == 1003


@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.parametrize(
    ("bad", "code"), [(b"\xff\xfe", 1007), (b"\xf9\x80\x00\x00\x00\x00", 1002)]
)
async def test_what_breaks_the_protocol_is_told_so(bad, code, busy):
    async with open_rig(reply=saying("x" * 500)) as rig, rig.websocket() as client:
        if busy:
            await client.create()
            await client.until("response.output_text.delta")
        await client.stream.send_all(frame(bad) if code == 1007 else bad)
        assert await client.closed() == code
    await wait_all_tasks_blocked()
    assert not rig.engine._running


@pytest.mark.parametrize("code", [1000, 1001])
async def test_a_close_code_is_sent_back(code):
    async with open_rig() as rig, rig.websocket() as client:
        await client.turn()
        await client.connection.aclose(code)
        assert client.connection.closed.code == code
        await wait_all_tasks_blocked()
        assert rig.port.websockets == 0


async def test_a_large_frame_is_parsed_beside_the_loop_and_in_its_order():
    async with open_rig(reply=saying("Yes.")) as rig, rig.websocket() as client:
        rig.engine.max_context = 1 << 20
        items = [{"role": "user", "content": "word " * 80}] * 400
        await client.send({"type": "response.create", "input": items, "metadata": {"n": "0"}})
        await client.create("small", metadata={"n": "1"})
        for number in "01":
            response = check_events(await client.until("response.completed"))
            assert response["metadata"] == {"n": number}


async def test_a_large_frame_at_fault_is_refused_in_its_lane():
    async with open_rig() as rig, rig.websocket() as client:
        await client.send('{"type":"response.create","input":[' + "{}," * 40_000 + "1]}")
        assert (await client.event())["error"]["param"] == "input[0].type"
        check_events(await client.turn())


async def test_a_message_over_the_limit_closes_with_1009(autojump_clock):
    async with open_rig("websocket.max_message=4KiB") as rig, rig.websocket() as client:
        check_events(await client.turn("x" * 3000))
        await client.create("x" * 5000)
        assert await client.closed() == 1009


def frame(payload, *, opcode=1, fin=True):
    """A client's frame, masked with zeros."""
    length = len(payload)
    if length < 126:
        sized = bytes([0x80 | length])
    elif length < 65536:
        sized = b"\xfe" + struct.pack("!H", length)
    else:
        sized = b"\xff" + struct.pack("!Q", length)
    return bytes([(0x80 if fin else 0) | opcode]) + sized + b"\0\0\0\0" + payload


async def test_a_flood_of_fragments_closes_with_1008(autojump_clock):
    async with open_rig("websocket.max_fragments=8") as rig, rig.websocket() as client:
        pieces = [b'{"type":"response.create","input":', *[b""] * 6, b'"Hi."}']
        flags = [(1, False), *[(0, False)] * 6, (0, True)]
        await client.stream.send_all(
            b"".join(frame(p, opcode=o, fin=f) for p, (o, f) in zip(pieces, flags, strict=True))
        )
        check_events(await client.until("response.completed"))
        await client.stream.send_all(frame(b"", fin=False) + frame(b"", opcode=0, fin=False) * 8)
        assert await client.closed() == 1008
        assert trio.current_time() < 5


@pytest.mark.parametrize(
    "beginning",
    [
        b"\x81",  # half a header
        frame(b"{" + b" " * 200)[:50],  # part of a frame
        frame(b"{", fin=False),  # a fragment
        frame(b"{", fin=False) + frame(b"", opcode=9) * 3,  # pings do not complete it
    ],
)
async def test_a_message_that_does_not_end_closes_with_1008(beginning, autojump_clock):
    quiet = "websocket.ping_interval=1h"  # a pong would be taken for the rest of it
    async with open_rig("websocket.message_timeout=60s", quiet) as rig, rig.websocket() as client:
        await trio.sleep(100)
        check_events(await client.turn())  # an idle connection is no slow one
        began = trio.current_time()
        await client.stream.send_all(beginning)
        assert await client.closed() == 1008
        assert trio.current_time() - began == pytest.approx(60, abs=2)


async def test_a_slow_message_may_take_its_time(autojump_clock):
    quiet = "websocket.ping_interval=1h"
    async with open_rig("websocket.message_timeout=60s", quiet) as rig, rig.websocket() as client:
        whole = frame(b'{"type":"response.create","input":"Hi."}')
        for _ in range(3):
            for at in range(0, len(whole), 8):
                await client.stream.send_all(whole[at : at + 8])
                await trio.sleep(8)
            check_events(await client.until("response.completed"))


@given(
    st.lists(
        st.tuples(
            st.integers(1, 6), st.sampled_from([0, 1, 125, 126, 127, 65535, 65536]), st.booleans()
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 6),
    st.data(),
)
def test_fragments_are_counted_whatever_the_lengths_and_the_splits(messages, limit, data):
    stream = b""
    for count, length, ping in messages:
        for index in range(count):
            stream += frame(b"p" * length, opcode=0 if index else 1, fin=index == count - 1)
            if ping:
                stream += frame(b"ping", opcode=9)
    step = data.draw(st.integers(1, max(1, len(stream))))
    step = max(step, len(stream) // 50)
    meter = Fragments(limit)
    flooded = any(meter.exceeded_by(stream[at : at + step]) for at in range(0, len(stream), step))
    # the last frame of a message is its end, and ends the count
    assert flooded is any(count - 1 > limit for count, _, _ in messages)


async def test_a_peer_without_pongs_is_dropped(autojump_clock):
    async with open_rig("websocket.ping_interval=20s", "websocket.ping_timeout=10s") as rig:
        stream = rig.stream()
        await stream.send_all(handshake())
        await stream.receive_some()
        with trio.fail_after(40):
            while await stream.receive_some():
                pass
        await wait_all_tasks_blocked()
        assert rig.port.websockets == 0
        assert 30 <= trio.current_time() < 40


async def test_a_peer_that_answers_pings_lives_and_is_pinged_during_a_silent_turn(autojump_clock):
    async with open_rig("websocket.ping_interval=5s", "websocket.ping_timeout=5s") as rig:
        async with rig.websocket() as client:
            rig.engine.hold()
            await client.create()
            with trio.move_on_after(100):
                while True:
                    await client.event()
            rig.engine.go()
            await client.until("response.completed")


async def test_the_connection_limit_is_an_error_event_and_then_a_close(autojump_clock):
    async with open_rig("websocket.max_lifetime=60m") as rig, rig.websocket() as client:
        error = await client.event()
        assert trio.current_time() == pytest.approx(3600)
        assert (error["status"], error["error"]["code"]) == (
            400,
            "websocket_connection_limit_reached",
        )
        assert "(60 minutes)" in error["error"]["message"]
        assert await client.closed() == 1000


async def test_the_connection_limit_ends_what_runs_and_waits_by_an_error_on_each_lane(
    autojump_clock,
):
    async with open_rig("websocket.max_lifetime=60m", "websocket.max_in_flight=2") as rig:
        async with rig.websocket() as client:
            check_events(await client.turn(stream_id="idle"), stream_id="idle")
            rig.engine.hold()
            await client.create()
            await client.create(stream_id="runs")
            await client.create(stream_id="waits")
            last = {}
            while not (last.keys() >= {None, "runs", "waits"}) or last[None]["type"] != "error":
                event = await client.event()
                assert last.get(event.get("stream_id"), {}).get("type") != "error", "after the end"
                last[event.get("stream_id")] = event
            assert last.keys() == {None, "runs", "waits"}
            for event in last.values():
                assert (event["type"], event["status"]) == ("error", 400)
                assert event["error"]["code"] == "websocket_connection_limit_reached"
            assert trio.current_time() == pytest.approx(3600)
            assert await client.closed() == 1000
        await wait_all_tasks_blocked()
        assert not rig.engine._running
        assert len(rig.engine.cancelled) == 2
        assert rig.port.admission.statistics().admitted == 0


async def test_the_connection_limit_in_the_middle_of_a_text_tears_no_event(autojump_clock):
    async with open_rig("websocket.max_lifetime=60m", reply=saying("x" * 500)) as rig:
        async with rig.websocket() as client:
            await client.create()
            events = await client.until("response.output_text.delta")
            rig.engine.hold()
            events += await client.until("error")
            numbers = [event["sequence_number"] for event in events[:-1]]
            assert numbers == list(range(len(numbers)))
            assert not {event["type"] for event in events} & set(TERMINALS)
            assert await client.closed() == 1000


async def test_a_peer_that_reads_nothing_holds_no_place_that_others_wait_for(autojump_clock):
    sets = ("websocket.send_timeout=1h", "websocket.ping_interval=1h", "admission.max_turns=1")
    async with open_rig(*sets, reply=saying("x" * 3000)) as rig:
        client, server = trio.testing.lockstep_stream_pair()
        rig.nursery.start_soon(rig.door.serve, server)
        await client.send_all(handshake())
        await client.receive_some()
        await client.send_all(frame(b'{"type":"response.create","input":"Hi."}'))
        await trio.sleep(1)
        assert rig.port.under_way, "it is still being said"
        async with rig.websocket() as other:
            check_events(await other.turn())
        assert trio.current_time() < 10
        await client.aclose()


class Sent:
    """A peer's bytes, of which a read gets as many as it asks for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads: list[bytes] = []

    async def receive_some(self, max_bytes):
        await trio.lowlevel.checkpoint()
        self.reads.append(self.data[:max_bytes])
        self.data = self.data[max_bytes:]
        return self.reads[-1]


@pytest.mark.parametrize(
    ("message", "most"),
    [(frame(b"x"), 16), (frame(b"", opcode=9), 16), (frame(b"x" * 9000), 1)],
)
async def test_small_frames_are_read_a_few_at_a_time_and_large_ones_as_ever(message, most):
    """What is read at once is parsed in one go, and the loop stands meanwhile."""
    sent = Sent(message * 2000)
    arrival = SimpleNamespace(stream=sent, head_bytes=0)
    metered = Metered(arrival, WebSocket(max_empty=1 << 30), pytest.fail)
    received = b""
    while data := await metered.receive_some(4096):
        received += data
    assert received == message * 2000
    sizes = [len(read) for read in sent.reads[1:-2]]
    assert set(sizes) == {min(most * len(message), 4096)}


async def test_a_peer_that_reads_nothing_is_dropped_after_the_send_timeout(autojump_clock):
    async with open_rig("websocket.send_timeout=10s", reply=saying("x" * 3000)) as rig:
        client, server = trio.testing.lockstep_stream_pair()
        rig.nursery.start_soon(rig.door.serve, server)
        await client.send_all(handshake())
        await client.receive_some()
        await client.send_all(frame(b'{"type":"response.create","input":"Hi."}'))
        await trio.sleep(15)
        assert rig.port.websockets == 0
        await wait_all_tasks_blocked()
        assert rig.port.admission.statistics().admitted == 0  # the turn went with its connection
        await client.aclose()


async def test_a_peer_that_sends_and_never_reads_is_dropped(autojump_clock):
    async with open_rig() as rig:
        client, server = trio.testing.lockstep_stream_pair()
        rig.nursery.start_soon(rig.door.serve, server)
        await client.send_all(handshake())
        await client.receive_some()
        with suppress(trio.BrokenResourceError):  # cut off, still sending
            for _ in range(100):
                await client.send_all(
                    frame(b'{"type":"response.steer","previous_response_id":"r"}')
                )
        assert trio.current_time() < 5
        assert rig.port.websockets == 0
        await client.aclose()


async def test_on_shutdown_running_turns_finish_others_are_refused_and_the_close_is_1012(
    autojump_clock,
):
    async with open_rig() as rig, rig.websocket() as client, rig.websocket() as idle:
        rig.engine.hold()
        await client.create()
        await client.create("queued")
        await wait_all_tasks_blocked()
        rig.port.stopping.set()
        assert await idle.closed() == 1012
        await client.create("too late")
        await wait_all_tasks_blocked()
        rig.engine.go()
        check_events(await client.until("response.completed"))
        for _ in range(2):
            error = await client.event()
            assert (error["type"], error["status"]) == ("error", 429)
            assert error["headers"]["retry-after"]
        assert await client.closed() == 1012
        assert trio.current_time() < 5


async def test_on_shutdown_a_turn_that_does_not_finish_is_cut_after_its_grace(autojump_clock):
    async with open_rig("server.grace=25s") as rig, rig.websocket() as client:
        rig.engine.hold()
        await client.create()
        await wait_all_tasks_blocked()
        rig.port.stopping.set()
        assert await client.closed() == 1012
        assert 25 <= trio.current_time() < 30
        await wait_all_tasks_blocked()
        assert rig.engine.cancelled


def handshake(path="/v1/responses", **fields):
    headers = {
        "host": "localhost",
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "MDEyMzQ1Njc4OWFiY2RlZg==",
        **{name.replace("_", "-"): value for name, value in fields.items()},
    }
    lines = [
        f"GET {path} HTTP/1.1",
        *(f"{k}: {v}" for k, v in headers.items() if v is not None),
        "",
        "",
    ]
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize(
    ("sets", "path", "fields", "status"),
    [
        ((), "/v1/responses?x=1", {}, 101),
        ((), "/v1/responses", {"origin": "http://localhost"}, 101),
        ((), "/v1/responses", {"sec_websocket_extensions": "permessage-deflate"}, 101),
        ((), "/v1/responses", {"origin": "https://evil.example"}, 403),
        ((), "/v1/responses", {"host": "evil.example"}, 421),
        (["auth.keys=['k']"], "/v1/responses", {}, 401),
        (["auth.keys=['k']"], "/nowhere", {}, 401),
        (["auth.keys=['k']"], "/v1/responses", {"authorization": "Bearer k"}, 101),
        (["websocket.enabled=false"], "/v1/responses", {}, 426),
        ((), "/v1/models", {}, 404),
        ((), "/echo", {}, 404),
        (["dev.echo=true"], "/echo", {}, 101),
        ((), "/v1/responses", {"sec_websocket_version": "8"}, 426),
        ((), "/v1/responses", {"sec_websocket_key": None}, 400),
    ],
)
async def test_the_handshake_is_accepted_or_refused_with_a_proper_status(
    sets, path, fields, status
):
    async with open_rig(*sets) as rig:
        stream = rig.stream()
        await stream.send_all(handshake(path, **fields))
        parser = h11.Connection(h11.CLIENT)
        parser.send(
            h11.Request(
                method="GET",
                target="/",
                headers=[("host", "a"), ("connection", "upgrade"), ("upgrade", "websocket")],
            )
        )
        parser.send(h11.EndOfMessage())
        parser.receive_data(await stream.receive_some())
        answer = parser.next_event()
        names = dict(answer.headers)
        assert answer.status_code == status
        assert b"sec-websocket-extensions" not in names
        if status != 101:
            parser.receive_data(await stream.receive_some()) if parser.trailing_data[
                0
            ] == b"" else None
            body = parser.next_event()
            assert json.loads(body.data)["error"]["code"]
        if status == 401:
            assert names[b"www-authenticate"] == b"Bearer"
        if status == 426:
            assert names[b"sec-websocket-version"] == b"13"
        await trio.aclose_forcefully(stream)


async def test_while_stopping_an_upgrade_is_503():
    async with open_rig() as rig:
        rig.port.stopping.set()
        stream = rig.stream()
        await stream.send_all(handshake())
        assert b" 503 " in (await stream.receive_some()).split(b"\r\n")[0]
        await trio.aclose_forcefully(stream)


async def test_echo_gives_text_and_binary_back():
    async with open_rig("dev.echo=true") as rig, rig.websocket("/echo") as client:
        for message in ("text", b"\x00binary", "x" * 100_000):
            await client.send(message)
            assert await client.connection.get_message() == message
        await client.connection.aclose()


async def test_a_flood_of_pings_closes_with_1008_and_a_few_are_answered(autojump_clock):
    async with open_rig("websocket.max_empty=50") as rig:
        async with rig.websocket() as client:
            for _ in range(30):
                await client.connection.ping()
            await trio.sleep(11)
            for _ in range(30):
                await client.connection.ping()
            check_events(await client.turn())
            with suppress(trio_websocket.ConnectionClosed):
                for _ in range(60):
                    await client.connection.pong()
            assert await client.closed() == 1008


@pytest.mark.parametrize("frame", ["{", '{"type": "nothing.we.know"}'])
async def test_a_flood_of_frames_that_ask_for_nothing_closes_with_1008(frame, autojump_clock):
    async with open_rig("websocket.max_empty=50") as rig:
        async with rig.websocket() as client:
            with suppress(trio_websocket.ConnectionClosed):
                for _ in range(60):
                    await client.send(frame)
            assert await client.closed() == 1008


async def test_one_key_has_so_many_connections_and_no_more():
    async with open_rig("auth.keys=['a', 'b']", "auth.max_connections=2") as rig:
        async with rig.websocket(authorization="Bearer a") as one:
            async with rig.websocket(authorization="Bearer a"):
                third = rig.stream()
                await third.send_all(handshake(authorization="Bearer a"))
                refused = await third.receive_some()
                assert refused.startswith(b"HTTP/1.1 429 ")
                assert b"retry-after: 1\r\n" in refused
                browser = rig.browser()
                answer = await browser.request("GET", "/v1/models", x_api_key="a")
                assert (answer.status, answer.code) == (429, "rate_limit_exceeded")
                assert (await browser.request("GET", "/v1/models", x_api_key="b")).status == 200
            await rig.settled()
            assert (await browser.request("GET", "/v1/models", x_api_key="a")).status == 200
            check_events(await one.turn())


async def test_two_tenants_do_not_see_each_others_responses():
    async with open_rig("auth.keys=['a', 'b']") as rig:
        async with rig.websocket(authorization="Bearer a") as client:
            stored = await client.turn(store=True)
        async with rig.websocket(authorization="Bearer b") as client:
            (foreign,) = await client.turn(previous_response_id=response_id(stored))
            (absent,) = await client.turn(previous_response_id=response_id(stored)[:-1] + "~")
            assert foreign["error"]["code"] == absent["error"]["code"] == NOT_FOUND
            usage = check_events(await client.turn())["usage"]
            assert usage["input_tokens_details"]["cached_tokens"] == 0
        assert len({submit.salt for submit in rig.engine.submitted}) == 2


async def test_a_full_server_answers_with_an_error_event_that_says_when_to_come_back():
    async with open_rig("admission.max_turns=1", "admission.max_queued=0") as rig:
        async with rig.websocket() as client, rig.websocket() as other:
            rig.engine.hold()
            await client.create()
            await wait_all_tasks_blocked()
            (error,) = await other.turn()
            assert (error["status"], error["error"]["code"]) == (429, "overloaded")
            assert int(error["headers"]["retry-after"]) >= 1
            rig.engine.go()
            await client.until("response.completed")
            check_events(await other.turn())


async def test_a_fault_of_ours_ends_one_connection_and_leaves_the_others(caplog):
    async with open_rig() as rig, rig.websocket() as good:
        async with rig.websocket() as client:
            good_reply, rig.engine.text = rig.engine.text, None
            await client.create()
            assert await client.closed() == 1011
            rig.engine.text = good_reply
        assert "by our fault" in caplog.text
        check_events(await good.turn())


@pytest.mark.parametrize("cut_after", [1, 3, 8])
async def test_dropping_at_any_event_leaves_nothing_behind(cut_after):
    async with open_rig() as rig:
        async with rig.websocket() as client:
            await client.create()
            for _ in range(cut_after):
                await client.event()
        await wait_all_tasks_blocked()
        statistics = rig.port.admission.statistics()
        assert (statistics.admitted, statistics.waiting, rig.port.websockets) == (0, 0, 0)
        assert not rig.engine._running


async def test_a_server_side_close_before_any_frame_is_seen_by_the_client():
    async with open_rig() as rig, rig.websocket() as client:
        rig.port.stopping.set()
        with pytest.raises(trio_websocket.ConnectionClosed):
            await client.connection.get_message()
        assert client.connection.closed.code == 1012


async def test_events_larger_than_the_outbox_reach_a_slow_reader_in_order(autojump_clock):
    async with open_rig(reply=saying("y" * 300)) as rig, rig.websocket() as client:
        await client.create()
        events = []
        while not events or events[-1]["type"] != "response.completed":
            await trio.sleep(0.1)
            events.append(await client.event())
        check_events(events)
        assert [e["sequence_number"] for e in events] == list(
            itertools.islice(itertools.count(), len(events))
        )
