"""Eight agents at once on a device tier that holds half of them: everyone is answered, nobody gets another's context,
and when all is over nothing is held."""

import pytest
import trio

from broker.bench.workload import Workload
from tests.e2e.crowd import Crowd

SIZES = Workload(nonce=100, system_tokens=420, result_tokens=50, output_tokens=8)


def _crowd():
    return Crowd(sessions=8, turns=3, sizes=SIZES)


@pytest.fixture(scope="module")
def crowded(new_daemon):
    half = _crowd().half()
    return new_daemon(f"tiers.device.capacity={half}", f"tiers.host.capacity={half}")


async def test_crowded_sessions_say_what_they_say_alone_and_leave_nothing_behind(
    crowded, daemon, nursery
):
    alone, crowd = _crowd(), _crowd()
    await alone.one_by_one(daemon.url, every=2)
    await crowd.together(crowded.url)
    assert alone.differing(crowd) == []

    agent = crowd.agent(nursery, crowded.url, 0)
    report = await agent.admin("GET", "/admin/tiers")
    assert sum(report["evictions_total"].values()) > 0, "never full: nothing was tested"
    await agent.demote("disk")
    report = await agent.admin("GET", "/admin/tiers")
    assert report["refs"] == report["leases"] == report["running"] == report["waiting"] == 0
    assert [tier["held_refs"] for tier in report["tiers"]] == [0, 0, 0]

    known = crowd.histories[0].known_tokens  # and the sessions are still there
    after = (await agent.next(crowd.histories[0], "afterwards")).last
    assert after.by_tier["disk"] == after.cached_tokens >= known - 1
    await agent.cut()


async def test_a_client_that_leaves_mid_turn_frees_its_place(crowded, new_agent):
    load = Workload(nonce=200, system_tokens=1200, output_tokens=200)
    agent = new_agent(crowded.url, load)
    socket = await agent.socket()
    await socket.send({"type": "response.create", **load.body(load.task())})
    assert (await socket.receive())["type"] == "response.created"
    await agent.cut()
    with trio.fail_after(30):
        while True:
            report = await agent.admin("GET", "/admin/tiers")
            if report["running"] == report["loading"] == report["refs"] == 0:
                break
            await trio.sleep(0.05)
