"""Eight agents at once on a device tier that holds half of them: everyone is answered, nobody gets another's context,
and when all is over nothing is held."""

import pytest
import trio

from broker.bench.session import History
from broker.bench.workload import Workload
from tests.broker.wire.grammar import check_events

SESSIONS = 8
TURNS = 4
BLOCK_BYTES = 30 * 2 * 3 * 32 * 64 * 4  # the default model's, in float32
BLOCK_TOKENS = 32


def _workload(number):
    return Workload(nonce=100 + number, system_tokens=450, result_tokens=60, output_tokens=10)


async def _run(agent, *, turns=TURNS):
    """All turns of one agent: what it was told, and where its prompts were found."""
    history, told = History(), []
    for number in range(turns):
        history = await agent.next(history, f"turn {number}")
        check_events(list(history.last.events))
        told.append(history.last.said)
    return told, history


@pytest.fixture(scope="module")
def crowded(new_daemon):
    tokens = SESSIONS * (450 + TURNS * (60 + 20))
    half = tokens // 2 // BLOCK_TOKENS * BLOCK_BYTES
    return new_daemon(f"tiers.device.capacity={half}", f"tiers.host.capacity={half}")


async def test_crowded_sessions_say_what_they_say_alone_and_leave_nothing_behind(
    crowded, daemon, new_agent
):
    alone = {}
    for number in range(SESSIONS):
        alone[number], _ = await _run(new_agent(daemon.url, _workload(number)))

    together, finals = {}, {}

    async def one(number):
        agent = new_agent(crowded.url, _workload(number))
        together[number], finals[number] = await _run(agent)

    with trio.fail_after(240):
        async with trio.open_nursery() as nursery:
            for number in range(SESSIONS):
                nursery.start_soon(one, number)
    assert together == alone

    watcher = new_agent(crowded.url, _workload(0))
    report = await watcher.admin("GET", "/admin/tiers")
    assert sum(report["evictions_total"].values()) > 0, (
        "the device was never full: nothing was tested"
    )
    await watcher.demote("disk")
    report = await watcher.admin("GET", "/admin/tiers")
    assert report["refs"] == report["leases"] == report["running"] == report["waiting"] == 0
    assert [tier["held_refs"] for tier in report["tiers"]] == [0, 0, 0]

    for number in (0, SESSIONS - 1):  # and their sessions are all still there
        agent = new_agent(crowded.url, _workload(number))
        after = (await agent.next(finals[number], "afterwards")).last
        assert after.cached_tokens >= finals[number].known_tokens - 1
        assert after.by_tier["disk"] == after.cached_tokens


async def test_a_client_that_leaves_mid_turn_frees_its_place(crowded, new_agent):
    leaver = new_agent(crowded.url, Workload(nonce=200, system_tokens=1200, output_tokens=200))
    socket = await leaver.socket()
    body = Workload(nonce=200, system_tokens=1200, output_tokens=200)
    await socket.send({"type": "response.create", **body.body(body.task())})
    assert (await socket.receive())["type"] == "response.created"
    await leaver.cut()
    with trio.fail_after(30):
        while True:
            report = await leaver.admin("GET", "/admin/tiers")
            if report["running"] == report["loading"] == report["refs"] == 0:
                break
            await trio.sleep(0.05)
