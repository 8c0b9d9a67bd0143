"""SIGTERM after SIGTERM, in the middle of turns: everything acknowledged is there afterwards, and everybody was told.

    python -m tests.campaign.sigterms [--signals 100] [--quick]

Clients over WebSockets and over HTTP in three APIs keep a stub daemon busy. At a random moment it gets SIGTERM; it is started
again on the same directory, five times on each. Passes if: every exit has status 0 and comes within the grace and two
seconds; every WebSocket hears 1012 or a polite error, every HTTP request a whole answer or a refusal in shape, or finds
nobody there; every response that was acknowledged with `store: true` can be read after the restart; what the fifth life of a
directory finds in the cache is within two points of what the first found.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import trio
from trio_websocket import ConnectionRejected, HandshakeError

from broker.bench.client import Refused, Socket
from tests.campaign import stub
from tests.campaign.verdict import Verdict
from tests.campaign.visitors import (
    DIALECTS,
    PATHS,
    ask,
    body_of,
    complaint,
    faults,
    percentile,
)
from tests.campaign.zygote import StubDaemon, Zygote

QUICK = 2
LIVES = 5  # of one directory
GRACE_S = 3.0
SOCKETS, POSTERS = 4, 3
KNOWN = 4  # acknowledged responses of a life that the next goes on from
SETTINGS = stub.settings(
    device=400,
    host=0,
    disk=3000,
    server__grace=f"{GRACE_S}s",
    engine__max_running="6",
)


@dataclass(slots=True)
class Told:
    """What clients heard in one life."""

    acknowledged: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)


class Life:
    def __init__(self, url: str, verdict: Verdict, chance: random.Random) -> None:
        self.url = url
        self.verdict = verdict
        self.chance = chance
        self.told = Told()
        self.ending = False

    def text(self) -> str:
        return f"{self.chance.random()} " + "y" * self.chance.randrange(20, 300)

    async def socket(self) -> None:
        """One WebSocket's turns, each going on from the one before, until the daemon ends it."""
        previous: str | None = None
        try:
            async with trio.open_nursery() as nursery:
                socket = await Socket.open(nursery, self.url)
                while True:
                    body = body_of("responses", self.text(), 24, store=True)
                    turn = await socket.turn({**body, "previous_response_id": previous})
                    # A session of three turns; then another.
                    previous = turn.id if len(self.told.acknowledged) % 3 else None
                    self.told.acknowledged.append(turn.id)
        except* ConnectionError as broken:
            said = str(_leaf(broken))
            known = next((code for code in ("1012", "1001") if code in said), None)
            self.told.endings[f"socket {known or said[:60]}"] += 1
            if known is None:
                self.verdict.violation(f"a WebSocket ended without 1012: {said}")
        except* Refused as refused:
            self.told.endings["socket error event"] += 1
            status = _leaf(refused)
            assert isinstance(status, Refused)
            self.verdict.require(status.code == "overloaded", f"an error event: {status}")
        except* (OSError, ConnectionRejected, HandshakeError):
            self.told.endings["socket found nobody"] += 1

    async def poster(self) -> None:
        """HTTP requests, one API after the other."""
        number = 0
        while True:
            dialect = DIALECTS[number % 3]
            number += 1
            more = {"store": True} if dialect == "responses" else {}
            body = body_of(dialect, self.text(), 24, **more)
            answer = await ask(self.url, "POST", PATHS[dialect], body, within_s=30)
            if answer.status == 200:
                if dialect == "responses":
                    self.told.acknowledged.append(answer.json["id"])
                self.told.endings["answer"] += 1
            elif answer.status == 0:
                self.told.endings["nobody"] += 1
                self.verdict.require(
                    self.ending, "a request was dropped though nobody had signalled"
                )
                return
            else:
                self.told.endings[f"refusal {answer.status}"] += 1
                wrong = complaint(dialect, answer)
                if wrong is not None:
                    self.verdict.violation(wrong)

    async def live(self, over: trio.Event) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(SOCKETS):
                nursery.start_soon(self.socket)
            for _ in range(POSTERS):
                nursery.start_soon(self.poster)
            await over.wait()
            with trio.move_on_after(10):
                while len(nursery.child_tasks):  # noqa: ASYNC110 -- clients leave by themselves
                    await trio.sleep(0.02)
            self.verdict.require(not nursery.child_tasks, "a client was left without an end")
            nursery.cancel_scope.cancel()


def _leaf(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


async def recall(url: str, ids: list[str], verdict: Verdict) -> tuple[int, int]:
    """Every acknowledged response is there; of a few, (tokens cached, tokens that could have been) when gone on from."""
    for one in ids:
        answer = await ask(url, "GET", f"/v1/responses/{one}")
        verdict.require(answer.status == 200, f"{one} was acknowledged and is {answer.status}")
    cached = known = 0
    for one in ids[-KNOWN:]:
        body = body_of("responses", "And then?", 1, store=False, previous_response_id=one)
        answer = await ask(url, "POST", PATHS["responses"], body)
        if answer.status != 200:
            verdict.violation(f"going on from {one}: {answer.status} {answer.body[:200]!r}")
            continue
        usage = answer.json["usage"]
        cached += usage["input_tokens_details"]["cached_tokens"]
        known += usage["input_tokens"] - sum(
            usage["homeport:recomputed"].get(why, 0) for why in ("new", "logits")
        )
    return cached, known


def campaign(zygote: Zygote, folder: Path, *, signals: int, seed: int, timed: bool) -> int:
    """The exit status."""
    verdict = Verdict("sigterms", seed)
    chance = random.Random(seed)
    endings: Counter[str] = Counter()
    stops_s: list[float] = []
    shares: list[list[float]] = [[] for _ in range(LIVES)]
    acknowledged = 0
    for number in range(signals):
        directory = folder / f"state{number // LIVES}"
        daemon = StubDaemon(zygote, directory, SETTINGS)
        daemon.start()
        life = Life(daemon.url, verdict, random.Random(chance.random()))

        async def together(daemon: StubDaemon = daemon, life: Life = life) -> float:
            over = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(life.live, over)
                await trio.sleep(chance.uniform(0.2, 0.8))
                life.ending = True
                began = time.perf_counter()
                status = await trio.to_thread.run_sync(daemon.terminate)
                took_s = time.perf_counter() - began
                verdict.require(status == 0, f"exit status {status}\n{daemon.tail(20)}")
                over.set()
            return took_s

        stops_s.append(trio.run(together))
        endings.update(life.told.endings)
        acknowledged += len(life.told.acknowledged)
        daemon.start()
        cached, known = trio.run(recall, daemon.url, life.told.acknowledged, verdict)
        if known:
            shares[number % LIVES].append(cached / known)
        verdict.require(daemon.terminate() == 0, "an idle daemon did not end well")
        for line in faults(daemon.log.read_text(errors="replace")):
            verdict.violation(line)
        daemon.log.unlink()
        verdict.progress(f"{number + 1} of {signals} signals, {acknowledged} acknowledged")
    verdict.require(acknowledged > 0, "nothing was acknowledged: nothing was tested")
    verdict.require(endings["socket 1012"] > 0, "no WebSocket heard 1012")
    rates = [sum(one) / len(one) if one else 0.0 for one in shares]
    if timed:
        verdict.require(
            max(stops_s) <= GRACE_S + 2, f"a stop took {max(stops_s):.1f} s of {GRACE_S + 2:g}"
        )
        verdict.require(abs(rates[-1] - rates[0]) <= 0.02, f"the cache's share changed: {rates}")
    figures = {
        "signals": signals,
        "acknowledged": acknowledged,
        "endings": dict(endings),
        "stop s p50": round(percentile(stops_s, 0.5), 2),
        "stop s max": round(max(stops_s), 2),
        "share from cache by life": [round(rate, 4) for rate in rates],
    }
    return verdict.finish(
        figures,
        f"{signals} SIGTERMs under load: every exit 0, the slowest in {max(stops_s):.1f} s;"
        f" {acknowledged} acknowledged responses, all there after the restart",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--signals", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} signals, without times")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="homeport-sigterms-") as folder, Zygote() as zygote:
        return campaign(
            zygote,
            Path(folder),
            signals=QUICK if arguments.quick else arguments.signals,
            seed=arguments.seed,
            timed=not arguments.quick,
        )


if __name__ == "__main__":
    sys.exit(main())
