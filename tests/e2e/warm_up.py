"""One warm-up on an idle daemon and the turn that continues it: how fast it is acknowledged, and what is computed."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import trio

from broker.bench.client import Socket, Turn, call
from broker.bench.workload import filler


@dataclass(frozen=True)
class WarmUp:
    acknowledged_s: float  # from the frame's sending to the first byte of its answer
    turn: Turn
    computed: int  # tokens that the engine ran, for both together
    delta: int  # tokens that the turn brought

    @property
    def twice(self) -> int:
        """Tokens computed more than once. The last one sampled is never run; a head that others left may be reused."""
        return max(0, self.computed - (self.turn.prompt_tokens + self.turn.output_tokens - 1))


async def warm_up(
    nursery: trio.Nursery,
    url: str,
    tokens: int,
    *,
    by_replay: bool,
    label: str,
    store: bool = False,
) -> WarmUp:
    """`label` decides the text. Leaves the daemon idle."""
    socket = await Socket.open(nursery, url)
    settings = {"temperature": 0, "max_output_tokens": 4, "store": store}
    base = [{"role": "developer", "content": filler(tokens, label)}]
    before = await _computed(url)
    sent = time.perf_counter()
    await socket.send({"type": "response.create", **settings, "input": base, "generate": False})
    answer = await socket.receive()
    acknowledged_s = time.perf_counter() - sent
    while answer["type"] != "response.completed":
        answer = await socket.receive()
    asked = [{"role": "user", "content": "Go."}]
    if by_replay:
        body = {"input": [*base, *asked]}
    else:
        body = {"input": asked, "previous_response_id": answer["response"]["id"]}
    turn = await socket.turn({**settings, **body})
    await socket.close()
    return WarmUp(
        acknowledged_s=acknowledged_s,
        turn=turn,
        computed=await _computed(url) - before,
        delta=turn.prompt_tokens - turn.cached_tokens,
    )


async def _computed(url: str) -> int:
    metrics = await trio.to_thread.run_sync(call, "GET", url, "/metrics")
    found = re.search(r'homeport_tokens_total\{source="computed"\} (\d+)', metrics)
    assert found is not None, metrics
    return int(found[1])
