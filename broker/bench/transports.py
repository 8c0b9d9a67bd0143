"""A whole agent's loop over each of Homeport's transports: WebSocket with the delta, HTTP with everything or by id.

Laws
    Each loop is a session of its own, from its first turn to its last; the ways take turns and the first one changes.
    The loop's time is what its turns took; the tools between them take none.
    Turns that ended early are scaled, so that every loop says equally much (comparison.py).
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import trio

from broker.bench.comparison import Sample, Unit, whole_turn_s
from broker.bench.session import Agent, History, Way
from broker.bench.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker.bench.cases import Nonces, Sizes
    from broker.bench.client import Turn

BASELINE = Way.HTTP_REPLAY
WAYS = (Way.SOCKET_ID, Way.HTTP_ID, BASELINE)


async def measure(
    url: str, sizes: Sizes, turns: int, rounds: int, nonces: Nonces, tick: Callable[[str], None]
) -> list[Sample]:
    """`sizes.depth` is the system prompt's, before the first turn. `tick` is called after each loop."""
    samples: list[Sample] = []
    for number in range(rounds):
        for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
            nonce = nonces.of("transports", way, number)
            workload = Workload(nonce, sizes.depth, sizes.delta, sizes.output)
            done = await _loop(url, workload, turns, way)
            samples += _samples(done, way.value, number, sizes.output)
            tick(way.value)
    return samples


async def _loop(url: str, workload: Workload, turns: int, way: Way) -> list[Turn]:
    done: list[Turn] = []
    history = History()
    async with trio.open_nursery() as nursery:
        agent = Agent(nursery, url, workload)
        for number in range(turns):
            history = await agent.next(history, f"turn {number}", way)
            assert history.last is not None
            done.append(history.last)
        await agent.cut()
        nursery.cancel_scope.cancel()
    return done


def _samples(done: list[Turn], side: str, number: int, wanted: int) -> list[Sample]:
    wholes = [whole_turn_s(turn.ttft_s, turn.total_s, turn.output_tokens, wanted) for turn in done]
    scaled = any(was for _, was in wholes)
    last = done[-1]
    tokens = last.prompt_tokens, last.cached_tokens, last.output_tokens
    loop_s = sum(seconds for seconds, _ in wholes)
    samples = [Sample(f"{len(done)} turns", side, number, loop_s, Unit.SECONDS, *tokens, scaled)]
    if len(done) > 1:  # the first one has nothing to reuse, whichever way it comes
        first_s = statistics.median(turn.ttft_s for turn in done[1:])
        whole_s = statistics.median(seconds for seconds, _ in wholes[1:])
        samples += [
            Sample(
                "a turn after the first, first token", side, number, first_s, Unit.SECONDS, *tokens
            ),
            Sample(
                "a turn after the first, whole",
                side,
                number,
                whole_s,
                Unit.SECONDS,
                *tokens,
                scaled,
            ),
        ]
    return samples
