"""Five times what the daemon can do, in three APIs, while a second tenant asks now and then.

    python -m tests.campaign.overload [--minutes 10] [--rounds 5] [--factor 5] [--models DIR] [--quick]

With `--models` it is the real model, from a folder of converted ones, and the question is the product's. Without, it is the
stub, whose engine is Python and shares its interpreter with the loop: what refusals cost is then taken from turns, and more
of them can be made.

By turns, in rounds: as many clients as there are places, one request after the other, which is what the daemon can do; then
requests arrive at `factor` times that rate, each on a connection of its own, whatever has become of those before. A machine
whose cores are shared is not as fast in one minute as in the next, so each peak stands beside its own overload. What
counts of both is the turns that ended while the places were all taken: not how the first ones began, nor how the last ones
were given up.

Passes if: what is served under overload is 90 % of what was served before it; every request is answered, well or by a
refusal in its API's shape with Retry-After; a refusal takes the daemon under 10 ms at the median and under 50 ms at the
99th percentile, beyond what a loop that does nothing is late beside it; the line never exceeds its bound; every request of
the second tenant, who has one at a time, is served. The quick form leaves out what depends on how fast the machine is.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import trio

from broker.admission import IN_THE_LINE
from broker.bench.daemon import Daemon
from tests.campaign import stub
from tests.campaign.bare_loop import bare_loop
from tests.campaign.verdict import Verdict
from tests.campaign.visitors import (
    DIALECTS,
    PATHS,
    Answered,
    ask,
    body_of,
    complaint,
    faults,
    metrics,
    percentile,
)
from tests.campaign.zygote import StubDaemon, Zygote

QUICK_S = 2.0
TURNS, QUEUED = 8, 16
PEAK_S = 30.0  # of each round
SETTLE = 0.15  # of a phase: what ends before tells of its beginning
WAIT_S = 60.0  # longer than any wait in the line: an answer that takes longer is a hang
TOKENS = 48
ADMISSION = {
    "auth__keys": '["flood", "modest"]',
    "auth__operators": '["operator"]',
    "admission__max_turns": str(TURNS),
    "admission__max_queued": str(QUEUED),
    "admission__queue_timeout": "20s",
    "server__max_connections": "2000",
    "server__max_per_address": "2000",
    "auth__max_connections": "2000",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """What is overloaded, and by how long prompts, in characters."""

    settings: tuple[str, ...]
    prompt: tuple[int, int]


# A refusal costs 1.5 ms of the daemon and the client together (measured); a turn must cost much more, as a model's does.
STUB = Kind(stub.settings(device=1500, host=0, disk=0, **ADMISSION), prompt=(1500, 2500))
# Short prompts: turns of a second or two, so that ten minutes have many. Bodies name the model as the stub's do.
REAL = Kind(
    (
        *(f"{name.replace('__', '.')}={value}" for name, value in ADMISSION.items()),
        'model.aliases=["stub"]',
        "log.level=warning",
    ),
    prompt=(50, 150),
)


@dataclass(slots=True)
class Tally:
    # On one clock for all rounds: trio's begins anew, somewhere, in each run.
    served_at: list[float] = field(default_factory=list)
    refused: int = 0
    lost: int = 0  # no answer at all
    hung: int = 0
    latencies_s: list[float] = field(default_factory=list)
    # of those who did not wait in the line for it
    refusals_ms: list[float] = field(default_factory=list)  # the daemon's own time
    heard_ms: list[float] = field(default_factory=list)  # the client's
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def served(self) -> int:
        return len(self.served_at)

    def rate(self, began: float, ended: float) -> float:
        """Turns a second that ended well in a phase once it had settled."""
        settled = began + SETTLE * (ended - began)
        return sum(settled < at <= ended for at in self.served_at) / (ended - settled)


class Load:
    def __init__(self, url: str, kind: Kind, verdict: Verdict, seed: int) -> None:
        self.url = url
        self.kind = kind
        self.verdict = verdict
        self.chance = random.Random(seed)
        self.number = 0
        self.flooding, self.modest = Tally(), Tally()  # of all floods
        self.longest = 0  # line that was seen

    async def one(self, key: str, tally: Tally) -> Answered | None:
        """One request, to its answer; None if that took too long."""
        self.number += 1
        dialect = DIALECTS[self.number % len(DIALECTS)]
        text = f"request {self.number} " + "x" * self.chance.randrange(*self.kind.prompt)
        try:
            answer = await ask(
                self.url,
                "POST",
                PATHS[dialect],
                body_of(dialect, text, TOKENS),
                headers={"x-api-key": key},
                within_s=WAIT_S,
            )
        except trio.TooSlowError:
            tally.hung += 1
            self.verdict.violation(f"a request hung for {WAIT_S:g} s")
            return None
        tally.statuses[answer.status] += 1
        if answer.status == 200:
            tally.served_at.append(time.perf_counter())
            tally.latencies_s.append(answer.taken_s)
        elif answer.status == 0:
            tally.lost += 1
        else:
            tally.refused += 1
            if IN_THE_LINE.encode() not in answer.body:
                tally.refusals_ms.append(answer.server_ms)
                tally.heard_ms.append(answer.taken_s * 1000)
            wrong = complaint(dialect, answer)
            if wrong is not None:
                self.verdict.violation(wrong)
        return answer

    async def peak(self, seconds: float) -> float:
        """Turns a second, with every place taken all the time."""
        tally = Tally()

        async def client() -> None:
            while True:
                await self.one("flood", tally)

        began = time.perf_counter()
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                for _ in range(TURNS):
                    nursery.start_soon(client)
        return tally.rate(began, began + seconds)

    async def flood(self, seconds: float, rate: float) -> float:
        """Turns a second, of both tenants. What else there is to say goes into the tallies."""
        over = trio.Event()

        async def beside() -> None:
            while not over.is_set():
                await self.one("modest", self.modest)
                seen = await metrics(self.url, {"x-api-key": "operator"})
                self.longest = max(self.longest, int(seen["homeport_turns_queued"]))
                self.verdict.progress(
                    f"{self.flooding.served} served, {self.flooding.refused} refused, "
                    f"{self.modest.served} beside"
                )
                await trio.sleep(0.2)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(beside)
            began, first = time.perf_counter(), trio.current_time()
            async with trio.open_nursery() as requests:
                for count in range(int(seconds * rate)):
                    await trio.sleep_until(first + count / rate)
                    requests.start_soon(self.one, "flood", self.flooding)
                await trio.sleep_until(first + seconds)
            over.set()
        ended = began + seconds
        return self.flooding.rate(began, ended) + self.modest.rate(began, ended)


def campaign(
    daemon: Daemon | StubDaemon,
    kind: Kind,
    *,
    seconds: float,
    rounds: int,
    factor: float,
    seed: int,
    timed: bool,
) -> int:
    """The exit status. `timed`: times are part of the verdict."""
    verdict = Verdict("overload", seed)
    peaks: list[float] = []
    goodputs: list[float] = []
    bare: list[dict[str, float]] = []
    with daemon:
        load = Load(daemon.url, kind, verdict, seed)
        for _ in range(rounds):
            with bare_loop():  # the same beside both
                peaks.append(trio.run(load.peak, min(PEAK_S, seconds)))
            # Whatever the peak was: more than the places and the line hold.
            least = 3 * (TURNS + QUEUED) / (seconds / rounds)
            offered = max(peaks[-1] * factor, least)
            with bare_loop() as late:
                goodputs.append(trio.run(load.flood, seconds / rounds, offered))
            bare.append(late)
        verdict.require(daemon.terminate() == 0, "it did not end well")
        for line in faults(daemon.tail(10_000)):
            verdict.violation(line)
    flood, modest = load.flooding, load.modest
    peak, goodput = statistics.fmean(peaks), statistics.fmean(goodputs)
    verdict.require(flood.refused > 0, "nothing was refused: there was no overload")
    verdict.require(flood.lost == 0, f"{flood.lost} requests got no answer")
    verdict.require(
        load.longest <= QUEUED, f"the line was {load.longest} long, and {QUEUED} may wait"
    )
    unserved = modest.statuses.total() - modest.served
    verdict.require(unserved == 0, f"{unserved} requests of the modest tenant were not served")
    quick = percentile(flood.refusals_ms, 0.5), percentile(flood.refusals_ms, 0.99)
    late_ms = {name: statistics.median(each[name] for each in bare) for name in ("p50", "p99")}
    if timed:
        verdict.require(goodput >= 0.9 * peak, f"goodput fell from {peak:.1f} to {goodput:.1f}/s")
        verdict.require(
            quick[0] < 10 + late_ms["p50"], f"the median refusal took {quick[0]:.0f} ms"
        )
        verdict.require(quick[1] < 50 + late_ms["p99"], f"refusals took {quick[1]:.0f} ms at p99")
    figures = {
        "peak turns/s": round(peak, 2),
        "goodput turns/s": round(goodput, 2),
        "of the peak, by round": [
            round(one / other, 2) if other else None
            for one, other in zip(goodputs, peaks, strict=True)
        ],
        "statuses": dict(flood.statuses),
        "modest": dict(modest.statuses),
        "modest p50 s": round(percentile(modest.latencies_s, 0.5), 3),
        "served p50 s": round(percentile(flood.latencies_s, 0.5), 3),
        "refusal ms p50": quick[0],
        "refusal ms p99": quick[1],
        "bare loop late ms p50": round(late_ms["p50"], 1),
        "bare loop late ms p99": round(late_ms["p99"], 1),
        "refusal heard ms p50": round(percentile(flood.heard_ms, 0.5), 1),
        "longest line": load.longest,
    }
    return verdict.finish(
        figures,
        f"{factor:g} times {peak:.1f} turns/s offered for {seconds:.0f} s: {goodput:.1f}/s served"
        f" ({goodput / max(peak, 0.001):.0%}), {flood.refused} refused, none hung; the other tenant had"
        f" {modest.served} of {modest.statuses.total()} served",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--factor", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_S:g} s, without times")
    parser.add_argument("--models", type=Path, help="the real model, of this folder")
    arguments = parser.parse_args(argv)
    models = arguments.models
    with (
        tempfile.TemporaryDirectory(prefix="homeport-overload-") as folder,
        nullcontext() if models else Zygote() as zygote,
    ):
        kind, state_dir = REAL if models else STUB, Path(folder) / "state"
        daemon: Daemon | StubDaemon
        if zygote is None:
            daemon = Daemon(state_dir, settings=kind.settings, models=models)
        else:
            daemon = StubDaemon(zygote, state_dir, kind.settings)
        return campaign(
            daemon,
            kind,
            seconds=QUICK_S if arguments.quick else arguments.minutes * 60,
            rounds=1 if arguments.quick else arguments.rounds,
            factor=arguments.factor,
            seed=arguments.seed,
            timed=not arguments.quick,
        )


if __name__ == "__main__":
    sys.exit(main())
