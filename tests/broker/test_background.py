"""Responses without their client, over HTTP: queued, read, left, read on, cancelled, and what a stop leaves of them."""

import json
from contextlib import asynccontextmanager

import pytest
import trio
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from broker.access import OPEN
from broker.breakdown import Origin
from broker.event_log import EventLog
from broker.port import Port
from broker.session import ConnectionScope
from broker.wire.requests import Transport, parse_create
from engine.api import RefuseReason
from tests.broker.rig import open_rig
from tests.broker.wire.grammar import check_events, check_response
from tests.fakes import saying

EVENT = TypeAdapter(ResponseStreamEvent)
QUEUED = {"input": "Hi.", "background": True}
KEYS = ('auth.keys=["ada", "bob"]', 'server.allowed_hosts=["localhost"]')


async def post(rig, path="/v1/responses", body=None, **headers):
    return await rig.browser().request("POST", path, body, **headers)


async def get(rig, path, **headers):
    return await rig.browser().request("GET", path, **headers)


async def ended(rig, response_id, **headers):
    """Poll as clients do."""
    while True:
        answer = await get(rig, f"/v1/responses/{response_id}", **headers)
        if answer.json["status"] not in ("queued", "in_progress"):
            return answer.json
        await rig.settled()


@asynccontextmanager
async def restarted(rig, *sets):
    """Another daemon that finds what the first one wrote."""
    async with open_rig(*sets) as after:
        after.engine.manifests = rig.engine.manifests
        yield after


async def test_a_background_response_is_queued_at_once_and_read_when_it_is_done():
    async with open_rig() as rig:
        rig.engine.hold()
        first = await post(rig, body=QUEUED)
        assert first.status == 200
        check_response(first.json)
        assert (first.json["status"], first.json["background"]) == ("queued", True)
        await rig.settled()
        rig.engine.go()
        response = await ended(rig, first.json["id"])
        check_response(response)
        assert response["status"] == "completed"
        assert response["output"][0]["content"][0]["text"] == "Hello there."
        assert Response.model_validate(response, strict=True)
        assert (await get(rig, f"/v1/responses/{response['id']}/input_items")).status == 200
        await rig.settled()
        assert [m.response_id for m in rig.engine.manifests] == [response["id"]]
        assert rig.engine.manifests[0].tokens != (), "its record went when it was stored"


async def test_its_whole_stream_is_grammatical_and_of_published_types():
    async with open_rig() as rig:
        answer = await post(rig, body=QUEUED | {"stream": True})
        assert answer.body.endswith(b"data: [DONE]\n\n")
        response = check_events(answer.events)
        assert [e["type"] for e in answer.events[:3]] == [
            "response.created",
            "response.queued",
            "response.in_progress",
        ]
        assert response["status"] == "completed"
        for event in answer.events:
            EVENT.validate_json(json.dumps(event), strict=True)


async def test_a_reader_who_left_reads_on_behind_any_event():
    async with open_rig() as rig:
        whole = (await post(rig, body=QUEUED | {"stream": True})).events
        path = f"/v1/responses/{whole[0]['response']['id']}?stream=true"
        assert (await get(rig, path)).events == whole
        for number in range(len(whole) + 1):
            assert (await get(rig, f"{path}&starting_after={number}")).events == whole[number + 1 :]


async def test_a_stream_that_drops_stops_nothing_and_is_followed_to_its_end():
    async with open_rig() as rig:
        browser = rig.browser()
        await browser.send("POST", "/v1/responses", QUEUED | {"stream": True})
        seen = b""
        while b"output_text.delta" not in seen:
            seen += await browser.stream.receive_some()
        rig.engine.hold()
        await browser.drop()
        await rig.settled()
        assert rig.engine.cancelled == []
        response_id = json.loads(seen.partition(b"data: ")[2].partition(b"\n")[0])["response"]["id"]
        assert (await get(rig, f"/v1/responses/{response_id}")).json["status"] == "in_progress"
        follower = rig.browser()
        await follower.send("GET", f"/v1/responses/{response_id}?stream=true&starting_after=1")
        await rig.settled()
        rig.engine.go()
        events = (await follower.answer()).events
        assert [e["sequence_number"] for e in events] == list(range(2, 2 + len(events)))
        assert events[-1]["type"] == "response.completed"


async def test_cancelling_keeps_what_was_said_and_may_be_said_again():
    async with open_rig(reply=saying("word " * 400)) as rig:
        browser = rig.browser()
        await browser.send("POST", "/v1/responses", QUEUED | {"stream": True})
        seen = b""
        while b"output_text.delta" not in seen:
            seen += await browser.stream.receive_some()
        response_id = json.loads(seen.partition(b"data: ")[2].partition(b"\n")[0])["response"]["id"]
        first = await post(rig, f"/v1/responses/{response_id}/cancel")
        check_response(first.json)
        assert first.json["status"] == "cancelled"
        assert first.json["output"][0]["content"][0]["text"].startswith("w")
        assert (await post(rig, f"/v1/responses/{response_id}/cancel")).json == first.json
        assert (await get(rig, f"/v1/responses/{response_id}")).json == first.json
        events = (await get(rig, f"/v1/responses/{response_id}?stream=true")).events
        assert check_events(events) == first.json
        async with restarted(rig) as after:
            assert (await get(after, f"/v1/responses/{response_id}")).json == first.json


async def test_one_that_waits_for_its_place_can_be_cancelled():
    async with open_rig("admission.max_turns=1") as rig:
        rig.engine.hold()
        running = (await post(rig, body=QUEUED)).json["id"]
        await rig.settled()
        waiting = (await post(rig, body=QUEUED)).json["id"]
        cancelled = (await post(rig, f"/v1/responses/{waiting}/cancel")).json
        check_response(cancelled)
        assert (cancelled["status"], cancelled["output"]) == ("cancelled", [])
        check_events((await get(rig, f"/v1/responses/{waiting}?stream=true")).events)
        rig.engine.go()
        assert (await ended(rig, running))["status"] == "completed"
        assert len(rig.engine.submitted) == 1
        async with restarted(rig) as after:
            assert (await get(after, f"/v1/responses/{waiting}")).json["status"] == "cancelled"


async def test_waiting_for_a_place_has_no_deadline(autojump_clock):
    async with open_rig("admission.max_turns=1", "admission.queue_timeout=1s") as rig:
        rig.engine.hold()
        port = rig.port
        held = trio.Event()

        async def hold():
            async with port.admission.place():
                held.set()
                await trio.sleep(1000)

        rig.nursery.start_soon(hold)
        await held.wait()
        jobs = port.background
        request = parse_create(QUEUED, transport=Transport.HTTP)
        breakdown = port.observations.begin(Origin("req", "responses", "background"), 0.0)
        job = await jobs.start(request, OPEN, ConnectionScope(), breakdown)
        await trio.sleep(500)
        assert job.response["status"] == "queued"
        rig.engine.go()
        await job.ended()
        assert job.response["status"] == "completed"


async def test_a_continuation_in_the_background_has_the_tools_of_what_it_continues():
    call = '<tool_call>\n{"name": "box.open", "arguments": {}}\n</tool_call>'
    box = {"type": "namespace", "name": "box", "tools": [{"type": "function", "name": "open"}]}
    async with open_rig(reply=saying("Yes?", call)) as rig:
        first = (await post(rig, body={"input": "Hi.", "tools": [box]})).json["id"]
        body = QUEUED | {"previous_response_id": first, "stream": True}
        [item] = check_events((await post(rig, body=body)).events)["output"]
        assert (item["name"], item["namespace"]) == ("open", "box")


async def test_what_could_never_be_answered_is_refused_before_it_is_queued():
    async with open_rig() as rig:
        for body, code in (
            ({"previous_response_id": "resp_gone"}, "previous_response_not_found"),
            ({"model": "gpt-unknown"}, "model_not_found"),
            ({"conversation": "conv_gone"}, "conversation_not_found"),
            ({"input": "x" * 5000}, "context_length_exceeded"),
            ({"store": False}, "invalid_value"),
        ):
            answer = await post(rig, body=QUEUED | body)
            assert (answer.code, answer.status // 100) == (code, 4)
        assert rig.engine.manifests == []


async def test_a_turn_that_breaks_has_failed_and_says_so_after_a_restart():
    async with open_rig() as rig:
        rig.engine.faults.fail_after = 2
        response_id = (await post(rig, body=QUEUED)).json["id"]
        response = await ended(rig, response_id)
        check_response(response)
        assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
        async with restarted(rig) as after:
            assert (await get(after, f"/v1/responses/{response_id}")).json == response
            assert (
                await after.browser().request("DELETE", f"/v1/responses/{response_id}")
            ).status == 200
            assert (await get(after, f"/v1/responses/{response_id}")).status == 404


async def test_a_refusal_by_the_engine_fails_it():
    async with open_rig() as rig:
        rig.engine.faults.refuse = RefuseReason.BUSY
        answer = await post(rig, body=QUEUED | {"stream": True})
        response = check_events(answer.events)
        assert (response["status"], response["error"]["code"]) == ("failed", "overloaded")


async def test_one_that_a_crash_ended_has_failed():
    async with open_rig() as rig:
        rig.engine.hold()
        response_id = (await post(rig, body=QUEUED)).json["id"]
        await rig.settled()
        async with restarted(rig) as after:
            response = (await get(after, f"/v1/responses/{response_id}")).json
            check_response(response)
            assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
            again = await get(after, f"/v1/responses/{response_id}?stream=true")
            assert (again.status, again.code) == (404, "events_not_kept")
            cancelled = await post(after, f"/v1/responses/{response_id}/cancel")
            assert cancelled.json["status"] == "failed"


async def test_a_stop_gives_it_the_grace_and_then_ends_it_honestly(autojump_clock):
    async with open_rig(
        "server.grace=30s", "admission.max_turns=1", reply=saying("word " * 90)
    ) as rig:
        browser = rig.browser()
        await browser.send("POST", "/v1/responses", QUEUED | {"stream": True})
        seen = b""
        while b"output_text.delta" not in seen:
            seen += await browser.stream.receive_some()
        rig.engine.hold()
        waiting = (await post(rig, body=QUEUED)).json["id"]
        rig.port.stopping.set()
        with trio.fail_after(35):
            while b"[DONE]" not in seen:
                seen += await browser.stream.receive_some()
        last = json.loads(seen.split(b"data: ")[-2].partition(b"\n")[0])
        assert last["type"] == "response.incomplete"
        assert last["response"]["incomplete_details"] == {"reason": "server_stopped"}
        await rig.settled()
        async with restarted(rig) as after:
            found = (await get(after, f"/v1/responses/{last['response']['id']}")).json
            assert found == last["response"]
            assert (await get(after, f"/v1/responses/{waiting}")).json["status"] in (
                "incomplete",
                "failed",
            )
        refused = await post(rig, body=QUEUED)
        assert refused.status == 503


async def test_another_tenant_finds_neither_the_job_nor_its_record():
    async with open_rig(*KEYS) as rig:
        ada, bob = {"authorization": "Bearer ada"}, {"authorization": "Bearer bob"}
        rig.engine.hold()
        response_id = (await post(rig, body=QUEUED, **ada)).json["id"]
        path = f"/v1/responses/{response_id}"
        assert (await get(rig, path, **bob)).status == 404
        assert (await get(rig, path + "?stream=true", **bob)).status == 404
        assert (await post(rig, path + "/cancel", **bob)).status == 404
        assert (await rig.browser().request("DELETE", path, **bob)).status == 404
        async with restarted(rig, *KEYS) as after:
            assert (await get(after, path, **bob)).status == 404
            assert (await get(after, path, **ada)).json["status"] == "failed"
        rig.engine.go()
        assert (await ended(rig, response_id, **ada))["status"] == "completed"


async def test_only_background_responses_are_streamed_again_or_cancelled():
    async with open_rig() as rig:
        response_id = (await post(rig, body={"input": "Hi."})).json["id"]
        path = f"/v1/responses/{response_id}"
        again = await get(rig, path + "?stream=true")
        assert (again.status, again.code) == (404, "response_not_streamable")
        cancelled = await post(rig, path + "/cancel")
        assert (cancelled.status, cancelled.code) == (400, "invalid_value")
        for query in ("stream=yes", "stream=true&starting_after=-1", "starting_after=x"):
            assert (await get(rig, f"{path}?{query}")).code == "invalid_value"
        assert (await get(rig, f"{path}?stream=false&include[]=x")).status == 200


async def test_a_running_one_is_deleted_only_after_it_was_cancelled():
    async with open_rig() as rig:
        rig.engine.hold()
        response_id = (await post(rig, body=QUEUED)).json["id"]
        path = f"/v1/responses/{response_id}"
        refused = await rig.browser().request("DELETE", path)
        assert (refused.status, refused.code) == (409, "response_in_progress")
        await post(rig, path + "/cancel")
        assert (await rig.browser().request("DELETE", path)).json["deleted"]
        assert (await get(rig, path)).status == 404
        assert (await get(rig, path + "?stream=true")).status == 404
        assert rig.engine.manifests == []


async def test_there_are_bounds_on_how_many_run():
    async with open_rig("background.max_running=1") as rig:
        rig.engine.hold()
        first = (await post(rig, body=QUEUED)).json["id"]
        refused = await post(rig, body=QUEUED)
        assert (refused.status, refused.code) == (503, "overloaded")
        rig.engine.go()
        await ended(rig, first)
        await rig.settled()
        assert (await post(rig, body=QUEUED)).status == 200


async def test_events_are_kept_for_a_time_and_the_response_for_longer(autojump_clock):
    async with open_rig("background.keep=1m") as rig:
        response_id = (await post(rig, body=QUEUED | {"stream": True})).events[0]["response"]["id"]
        path = f"/v1/responses/{response_id}"
        assert (await get(rig, path + "?stream=true")).status == 200
        await trio.sleep(100)
        again = await get(rig, path + "?stream=true")
        assert (again.status, again.code) == (404, "events_not_kept")
        assert (await get(rig, path)).json["status"] == "completed"


async def test_events_take_no_more_than_their_share_of_memory():
    async with open_rig("background.max_events=14KiB") as rig:
        ids = []
        for _ in range(3):
            events = (await post(rig, body=QUEUED | {"stream": True})).events
            ids.append(events[0]["response"]["id"])
            await rig.settled()
        kept = [(await get(rig, f"/v1/responses/{one}?stream=true")).status for one in ids]
        assert kept == [404, 404, 200]
        assert all([(await get(rig, f"/v1/responses/{one}")).status == 200 for one in ids])


async def test_our_fault_in_one_ends_no_other(caplog, monkeypatch):
    async with open_rig() as rig:
        rig.engine.hold()
        healthy = (await post(rig, body=QUEUED)).json["id"]
        await rig.settled()
        with monkeypatch.context() as patched:
            patched.setattr(Port, "turn", failing)
            broken = await ended(rig, (await post(rig, body=QUEUED)).json["id"])
        check_response(broken)
        assert (broken["status"], broken["error"]["code"]) == ("failed", "server_error")
        assert "ZeroDivisionError" in caplog.text
        rig.engine.go()
        assert (await ended(rig, healthy))["status"] == "completed"
        assert rig.port.report().background == 0


async def failing(*_args, **_fields):
    raise ZeroDivisionError


async def test_a_disk_that_refuses_costs_durability_not_the_response():
    async with open_rig() as rig:
        rig.engine.faults.persist = True
        response_id = (await post(rig, body=QUEUED)).json["id"]
        response = await ended(rig, response_id)
        assert (response["status"], response["homeport:stored"]) == ("completed", "memory")


@pytest.mark.parametrize("dropped", range(4))
def test_a_log_gives_what_it_keeps_and_never_a_gap(dropped):
    kept = EventLog()
    for number in range(4):
        assert kept.next == number
        kept.append(b"%d" % number)
    for _ in range(dropped):
        kept.drop_oldest()
    assert kept.bytes == 4 - dropped
    for number in range(-1, 4):
        if kept.holds_after(number):
            assert kept.after(number) == [b"%d" % one for one in range(number + 1, 4)]
    assert [n for n in range(-1, 4) if kept.holds_after(n)] == list(range(dropped - 1, 4))
