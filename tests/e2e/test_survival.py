"""The promise itself: whatever happens to the connection or the daemon, the next turn computes its delta and no more,
and says what it would have said."""

from dataclasses import replace

import pytest
import trio

from broker.bench.client import Refused, Socket, call, http_turn
from broker.bench.scenario import COLD, SCENARIOS, Plan, measure
from broker.bench.session import History, Way
from broker.bench.workload import Workload

SMALL = Workload(nonce=1, system_tokens=600, result_tokens=50, output_tokens=8)
TURNS = 3
TINY = Workload(nonce=2, system_tokens=400, result_tokens=40, output_tokens=6)


@pytest.fixture(scope="module")
def samples(models, quiet):
    """{scenario: sample}: the benchmark's own run, short, against a control that nothing interrupts."""
    plan = Plan(SMALL, turns=TURNS, repeat=1, settings=quiet, models=models)
    measured = trio.run(measure, plan, lambda what: None)
    return {sample.scenario: sample for sample in measured}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_the_next_turn_computes_only_what_is_new(samples, scenario):
    sample = samples[scenario.name]
    assert sample.cached_tokens >= sample.known_tokens - 1, sample.recomputed
    assert sample.cached_tokens < sample.prompt_tokens


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_usage_names_the_tier_that_had_it(samples, scenario):
    sample = samples[scenario.name]
    found = {tier: tokens for tier, tokens in sample.by_tier.items() if tokens}
    assert found == {scenario.tier: sample.cached_tokens}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_the_output_is_that_of_an_uninterrupted_run(samples, scenario):
    assert samples[scenario.name].same


def test_cold_means_cold(samples):
    """The yardstick measures what it says: nothing cached, and a prompt as long as the others'."""
    cold, warm = samples[COLD], samples["warm"]
    assert cold.cached_tokens < 32
    assert abs(cold.prompt_tokens - warm.prompt_tokens) <= SMALL.output_tokens * 2


@pytest.fixture(scope="module")
def restless(new_daemon):
    """A daemon whose sessions move down by themselves: at once to the host, a little later to disk."""
    return new_daemon("tiers.host.after=300ms", "tiers.disk.after=5s", "tiers.disk.max_lag=100ms")


async def _two_turns(agent):
    history = await agent.next(History(), "first")
    return await agent.next(history, "second")


async def test_an_idle_session_moves_to_the_host_by_itself(restless, new_agent):
    agent = new_agent(restless.url, TINY)
    history = await _two_turns(agent)
    await agent.until_empty("device")
    after = (await agent.next(history, "third")).last
    assert after.by_tier["host"] == after.cached_tokens >= history.known_tokens - 1


async def test_an_idle_session_moves_on_to_disk_by_itself(restless, new_agent):
    agent = new_agent(restless.url, TINY)
    history = await _two_turns(agent)
    await agent.until_empty("device", "host")
    after = (await agent.next(history, "third")).last
    assert after.by_tier["disk"] == after.cached_tokens >= history.known_tokens - 1


async def test_an_unstored_id_dies_with_its_connection_and_its_kv_does_not(daemon, nursery):
    body = {**TINY.body(TINY.task()), "store": False}
    first_socket = await Socket.open(nursery, daemon.url)
    first = await first_socket.turn(body)
    follow = TINY.follow(first.output, "unstored")
    second = await first_socket.turn({**TINY.body(follow, first.id), "store": False})
    assert second.cached_tokens >= first.prompt_tokens + first.output_tokens - 1
    await first_socket.cut()

    socket = await Socket.open(nursery, daemon.url)
    with pytest.raises(Refused) as refused:
        await socket.turn({**TINY.body(TINY.follow(second.output, "late"), second.id)})
    assert (refused.value.status, refused.value.code) == (400, "previous_response_not_found")
    assert refused.value.param == "previous_response_id"

    items = (*TINY.task(), *first.output, *follow, *second.output)
    replay = await socket.turn(TINY.body(items + TINY.follow(second.output, "replayed")))
    assert replay.cached_tokens >= second.prompt_tokens + second.output_tokens - 1
    await socket.close()


async def test_a_replay_whose_items_lost_their_ids_still_finds_the_sampled_tokens(
    daemon, new_agent
):
    """Clients without our ids (a rewritten transcript, another library) lead back by what the answers say."""
    agent = new_agent(daemon.url, replace(TINY, nonce=3))
    history = await _two_turns(agent)
    bare = tuple({k: v for k, v in item.items() if k != "id"} for item in history.items)
    after = await agent.next(History(bare, history.last), "third", Way.HTTP_REPLAY)
    assert after.last.cached_tokens >= history.known_tokens - 1


async def test_a_stored_id_answers_though_the_daemon_was_killed_the_moment_its_turn_ended(
    restless,
):
    first = await trio.to_thread.run_sync(http_turn, restless.url, TINY.body(TINY.task()))
    restless.kill()
    restless.start()
    stored = await trio.to_thread.run_sync(call, "GET", restless.url, f"/v1/responses/{first.id}")
    assert stored == first.response
    body = TINY.body(TINY.follow(first.output, "after the kill"), first.id)
    again = await trio.to_thread.run_sync(http_turn, restless.url, body)
    assert again.response["previous_response_id"] == first.id
    assert again.prompt_tokens > first.prompt_tokens + first.output_tokens


async def test_sigterm_ends_the_daemon_cleanly_and_with_a_close_code_that_says_restart(
    restless, nursery
):
    """The last test that uses this daemon."""
    socket = await Socket.open(nursery, restless.url)
    await socket.turn(TINY.body(TINY.task()))
    assert await trio.to_thread.run_sync(restless.terminate) == 0
    assert await socket.close_code() == 1012
