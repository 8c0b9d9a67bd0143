"""Every turn is observed once, however it ends, and nothing of what was said in it is."""

import logging

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.access import OPEN
from broker.breakdown import Breakdown, Origin, Stage, Status
from broker.histogram import Histogram
from broker.loop_lag import EVERY_S, watch_loop
from broker.observations import KEPT_TURNS, Observations
from broker.session import ConnectionScope
from broker.wire.requests import Transport, parse_create
from tests.broker.rig import open_rig
from tests.fakes import saying

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def turns(browser, **query):
    words = "&".join(f"{name}={value}" for name, value in query.items())
    return (await browser.request("GET", f"/admin/turns?{words}")).json["turns"]


def test_a_histogram_counts_each_number_in_its_bucket():
    histogram = Histogram((1.0, 2.0))
    for value, times in ((0.0, 1), (1.0, 2), (1.5, 1), (2.0, 1), (2.1, 3)):
        histogram.observe(value, times)
    report = histogram.report()
    assert report.counts == (3, 2, 3)
    assert report.count == 8
    assert report.sum == pytest.approx(0 + 2 + 1.5 + 2 + 6.3)


def test_the_ring_keeps_the_newest():
    told = []
    observations = Observations((told.append,))
    for number in range(KEPT_TURNS + 3):
        breakdown = Breakdown(Origin(f"req_{number}", "chat", "http"), 0.0)
        breakdown.status = Status.COMPLETED
        observations.ended(breakdown.record(1.0, 0.0))
    assert len(told) == KEPT_TURNS + 3
    newest = [turn.origin.request_id for turn in observations.last(2)]
    assert newest == [f"req_{KEPT_TURNS + 2}", f"req_{KEPT_TURNS + 1}"]
    assert len(observations.last(10_000)) == KEPT_TURNS


@pytest.mark.parametrize(
    ("path", "body", "dialect"),
    [
        ("/v1/responses", {"input": "Hi."}, "responses"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi."}]}, "chat"),
        (
            "/v1/messages",
            {"max_tokens": 99, "messages": [{"role": "user", "content": "Hi."}], "model": "x"},
            "messages",
        ),
    ],
)
async def test_a_turn_over_http_has_the_id_of_its_answer_and_its_dialect(path, body, dialect):
    async with open_rig('model.aliases=["x"]') as rig:
        browser = rig.browser()
        answer = await browser.request("POST", path, body, traceparent=TRACE)
        assert answer.status == 200
        (turn,) = await turns(browser)
        assert turn["request_id"] == answer.headers["x-request-id"]
        assert (turn["dialect"], turn["transport"]) == (dialect, "http")
        assert (turn["status"], turn["reason"]) == ("completed", None)
        assert turn["trace_id"] == TRACE.split("-")[1]
        assert turn["output_tokens"] == len("Hello there.") + 1
        assert turn["prompt_tokens"] == sum(turn["tokens"].values()) == turn["tokens"]["computed"]
        assert sum(turn["recomputed"].values()) == turn["tokens"]["computed"]
        assert sum(turn["stages_s"].values()) == pytest.approx(turn["total_s"])
        assert 0 < turn["first_token_s"] <= turn["total_s"]
        assert list(turn["stages_s"]) == [stage.value for stage in Stage]


async def test_turns_of_a_socket_have_ids_of_their_own_and_the_handshake_s_trace():
    async with open_rig() as rig, rig.websocket(traceparent=TRACE, session_id="mine") as client:
        first = (await client.turn())[-1]["response"]["id"]
        second = (await client.turn(previous_response_id=first))[-1]["response"]["id"]
        newer, older = await turns(rig.browser())
        assert (older["response_id"], newer["response_id"]) == (first, second)
        assert older["request_id"] != newer["request_id"]
        assert {one["transport"] for one in (newer, older)} == {"websocket"}
        assert {one["session"] for one in (newer, older)} == {"mine"}
        assert {one["trace_id"] for one in (newer, older)} == {TRACE.split("-")[1]}
        assert newer["tokens"]["device"] == older["prompt_tokens"] + older["output_tokens"]


async def test_a_successor_of_a_steered_turn_is_a_turn():
    async with open_rig(reply=saying("x" * 200)) as rig, rig.websocket() as client:
        rig.engine.hold()
        await client.create()
        created = (await client.until("response.created"))[-1]["response"]["id"]
        rig.engine.go()
        await client.until("response.output_text.delta")
        steer = {"type": "response.steer", "previous_response_id": created, "input": "Stop."}
        await client.send(steer)
        await client.until("response.incomplete")
        await client.until("response.completed")
        newer, older = await turns(rig.browser())
        assert (older["status"], older["reason"]) == ("incomplete", "steered")
        assert newer["status"] == "completed"


async def test_a_background_turn_says_so_and_waits_like_others():
    async with open_rig() as rig:
        browser = rig.browser()
        body = {"input": "Hi.", "background": True}
        queued = (await browser.request("POST", "/v1/responses", body)).json
        await rig.settled()
        (turn,) = await turns(browser)
        assert (turn["transport"], turn["response_id"]) == ("background", queued["id"])
        assert turn["status"] == "completed"


async def test_refused_failed_and_abandoned_turns_are_told_apart():
    async with open_rig(max_context=64) as rig:
        browser = rig.browser()
        await browser.request("POST", "/v1/responses", {"input": "x" * 100})
        rig.engine.faults.fail_after = 2
        await browser.request("POST", "/v1/responses", {"input": "Hi."})
        rig.engine.faults.fail_after = None
        rig.engine.hold()
        leaver = rig.browser()
        await leaver.send("POST", "/v1/responses", {"input": "Hi."})
        await rig.settled()
        await leaver.drop()
        await rig.settled()
        await browser.request("POST", "/v1/responses", {"input": "Hi.", "model": "other"})
        other, left, failed, refused = await turns(browser)
        assert (refused["status"], refused["reason"]) == ("refused", "context_length_exceeded")
        assert refused["first_token_s"] is None
        assert (failed["status"], failed["reason"]) == ("failed", "server_error")
        assert left["status"] == "abandoned"
        assert (other["status"], other["reason"]) == ("refused", "model_not_found")
        report = rig.port.observations.report()
        assert report.ended_total == {"refused": 2, "failed": 1, "abandoned": 1}
        assert report.turn.count == 4


async def test_a_fault_of_ours_is_not_called_the_client_s_leaving():
    async with open_rig() as rig:

        async def broken(event):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await rig.port.turn(
                parse_create({"input": "Hi."}, transport=Transport.HTTP),
                breakdown=rig.port.observations.begin(Origin("r", "responses", "http"), 0.0),
                tenant=OPEN,
                scope=ConnectionScope(),
                emit=broken,
            )
        assert rig.port.observations.report().ended_total == {"failed": 1}


async def test_a_warm_up_s_prefill_is_a_part_of_its_turn():
    async with open_rig() as rig, rig.websocket() as client:
        rig.engine.hold()
        await client.create(generate=False)
        await client.until("response.completed")
        await rig.settled()
        assert await turns(rig.browser()) == []
        rig.engine.go()
        await rig.settled()
        (turn,) = await turns(rig.browser())
        assert turn["status"] == "completed"
        assert turn["output_tokens"] == 0
        assert turn["tokens"]["computed"] > 0


async def test_a_turn_s_line_is_in_the_log_and_its_text_is_not(caplog):
    caplog.set_level(logging.DEBUG)
    async with open_rig(reply=saying("a secret answer")) as rig:
        browser = rig.browser()
        await browser.request(
            "POST", "/v1/responses", {"input": "a secret question", "prompt_cache_key": "secret"}
        )
        lines = [r.getMessage() for r in caplog.records if r.name == "broker.observations"]
        (line,) = lines
        assert line.startswith("turn request=req_")
        assert "status=completed" in line
        assert "secret" not in caplog.text


async def test_waiting_for_a_place_is_queueing(autojump_clock):
    async with (
        open_rig("admission.max_turns=1") as rig,
        rig.websocket() as client,
        rig.websocket() as other,
    ):
        rig.engine.hold()
        await client.create()
        await client.until("response.created")
        await other.create()
        await trio.sleep(5)
        rig.engine.go()
        await other.until("response.completed")
        waited, _ = rig.port.observations.last(2)
        assert waited.stages[Stage.QUEUE] == pytest.approx(5, abs=0.1)
        assert waited.total_s == pytest.approx(5, abs=0.1)


async def test_the_last_turns_are_bounded_by_what_was_asked():
    async with open_rig() as rig:
        browser = rig.browser()
        for _ in range(3):
            await browser.request("POST", "/v1/responses", {"input": "Hi."})
        assert len(await turns(browser, limit=2)) == 2
        for wrong in ("x", "0", "-1", "99999999"):
            answer = await browser.request("GET", f"/admin/turns?limit={wrong}")
            assert (answer.status, answer.json["error"]["param"]) == (400, "limit")


def test_a_loop_that_was_held_is_late_by_so_much():
    observations, clock = Observations(), MockClock()

    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_loop, observations)
            for held_s in (0.0, 0.3):
                await wait_all_tasks_blocked()
                clock.jump(EVERY_S + held_s)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)
    report = observations.report().loop_lag
    assert report.count == 2
    assert report.sum == pytest.approx(0.3)
