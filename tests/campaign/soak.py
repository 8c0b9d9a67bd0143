"""Hours of what clients do, and what it leaves behind: slopes of memory, descriptors, threads, file size and latency.

    python -m tests.campaign.soak [--minutes 60] [--seed 1] [--quick]

Workers come and go against one stub daemon: turns in three APIs, sessions over WebSockets that end well or are cut, streams
that nobody reads, background responses, deletions, bad requests. Every few seconds the process is looked at. Passes
if: the log tells of no fault and no damaged record; every answer is as it should be, and comes; when everybody has left
nothing runs and no connection is held; and, from half an hour on, after a quarter of the time to warm up, anonymous
memory, descriptors, threads, tasks and the data file grow by less than 1 % an hour.

What may be forgotten is kept to `TABLES` entries: at their own sizes the tables of sessions, responses and reasons take
hours to fill at this rate, and a leak is not to be told from a table that fills.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import trio

from broker.bench.client import Refused, Socket
from tests.campaign import stub
from tests.campaign.verdict import Verdict
from tests.campaign.visitors import (
    DIALECTS,
    PATHS,
    Hung,
    answered,
    ask,
    body_of,
    faults,
    holdings,
    metrics,
    percentile,
)
from tests.campaign.zygote import StubDaemon, Zygote

QUICK_S = 4.0
WORKERS = 6
WARM_UP = 0.25  # of the time
JUDGED_S = 1800.0  # slopes of less say nothing
SLOPE = 0.01  # an hour
TABLES = 1000
GROWN = ("anonymous", "fds", "threads", "tasks", "file")
SETTINGS = stub.settings(device=200, host=100, disk=2000, background__keep="5s")


@dataclass(frozen=True, slots=True)
class Look:
    at_s: float
    rss: int
    anonymous: int
    fds: int
    threads: int
    tasks: int
    file: int
    latency_s: float


class Soak:
    def __init__(self, url: str, verdict: Verdict, seed: int) -> None:
        self.url = url
        self.verdict = verdict
        self.chance = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.latencies_s: list[float] = []

    async def work(self, over: trio.Event) -> None:
        deeds = (self.post, self.post, self.session, self.cut, self.unread, self.behind, self.wrong)
        while not over.is_set():
            deed = self.chance.choice(deeds)
            try:
                async with answered(self.url):
                    await deed()
            except Hung as hung:
                self.verdict.violation(f"{deed.__name__} hung: {hung}")

    def text(self) -> str:
        return f"{self.chance.randrange(40)} " + "z" * self.chance.randrange(10, 600)

    async def post(self) -> None:
        dialect = self.chance.choice(DIALECTS)
        answer = await ask(self.url, "POST", PATHS[dialect], body_of(dialect, self.text(), 16))
        self.latencies_s.append(answer.taken_s)
        self.note(dialect, answer.status)
        if answer.status == 200 and dialect == "responses" and self.chance.random() < 0.3:
            deleted = await ask(self.url, "DELETE", f"/v1/responses/{answer.json['id']}")
            self.note("delete", deleted.status)

    async def session(self) -> None:
        await self._session(self.chance.randrange(1, 5), cut=False)

    async def cut(self) -> None:
        await self._session(2, cut=True)

    async def _session(self, turns: int, *, cut: bool) -> None:
        async with trio.open_nursery() as nursery:
            socket = await Socket.open(nursery, self.url)
            previous: str | None = None
            for _ in range(turns):
                body = body_of("responses", self.text(), 16, previous_response_id=previous)
                try:
                    previous = (await socket.turn(body)).id
                except Refused as refused:
                    self.verdict.require(
                        refused.code in ("overloaded", "context_length_exceeded"), str(refused)
                    )
                    break
            if cut:
                await socket.send({"type": "response.create", **body_of("responses", "Bye", 64)})
                await socket.cut()
            else:
                await socket.close()
            self.outcomes["cut" if cut else "session"] += 1
            nursery.cancel_scope.cancel()

    async def unread(self) -> None:
        """A stream whose client leaves without having read it."""
        with trio.move_on_after(0.02):
            body = body_of("responses", self.text(), 64, stream=True)
            await ask(self.url, "POST", PATHS["responses"], body)
        self.outcomes["left"] += 1

    async def behind(self) -> None:
        body = body_of("responses", self.text(), 16, background=True)
        answer = await ask(self.url, "POST", PATHS["responses"], body)
        self.note("background", answer.status)

    async def wrong(self) -> None:
        answer = await ask(self.url, "POST", PATHS["messages"], b'{"messages": 3}')
        self.verdict.require(answer.status == 400, f"a bad request was {answer.status}")
        self.outcomes["wrong"] += 1

    def note(self, what: str, status: int) -> None:
        self.outcomes[f"{what} {status}"] += 1
        self.verdict.require(status in (200, 503, 529), f"{what} was answered {status}")

    async def run(self, seconds: float, pid: int, data: Path) -> list[Look]:
        looks: list[Look] = []
        over = trio.Event()
        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(self.work, over)
            while (at_s := time.monotonic() - began) < seconds:
                await trio.sleep(min(5.0, seconds / 8))
                held, size = holdings(pid), size_of(data)
                latency_s = percentile(self.latencies_s, 0.5)
                self.latencies_s.clear()
                tasks = int((await metrics(self.url))["homeport_tasks"])
                looks.append(
                    Look(
                        at_s,
                        held.rss,
                        held.anonymous,
                        held.fds,
                        held.threads,
                        tasks,
                        size,
                        latency_s,
                    )
                )
                self.verdict.progress(f"{looks[-1]} {sum(self.outcomes.values())} deeds")
            over.set()
        await self._empty()
        return looks

    async def _empty(self) -> None:
        """Nobody is left: nothing runs, and nothing is held."""
        names = (
            "running",
            "waiting",
            "loading",
            "refs",
            "websockets",
            "turns_admitted",
            "background",
        )
        seen: dict[str, float] = {}
        for _ in range(100):
            seen = await metrics(self.url)
            if not any(seen[f"homeport_{name}"] for name in names):
                break
            await trio.sleep(0.1)
        for name in names:
            self.verdict.require(
                not seen[f"homeport_{name}"], f"{name} is {seen[f'homeport_{name}']}"
            )
        bad = {n: v for n, v in seen.items() if n.startswith("homeport_verify_failures") and v}
        self.verdict.require(not bad, f"damaged records: {bad}")


def size_of(path: Path) -> int:
    return path.stat().st_size


def slope(looks: list[Look], name: str) -> float:
    """Growth an hour as a share of the mean, by least squares, after the warm-up."""
    looks = looks[int(len(looks) * WARM_UP) :]
    times = [look.at_s / 3600 for look in looks]
    values = [float(getattr(look, name)) for look in looks]
    if len(looks) < 2 or not any(values):
        return 0.0
    mean_t, mean_v = sum(times) / len(times), sum(values) / len(values)
    spread = sum((t - mean_t) ** 2 for t in times)
    pairs = zip(times, values, strict=True)
    return sum((t - mean_t) * (v - mean_v) for t, v in pairs) / spread / mean_v


def campaign(zygote: Zygote, folder: Path, *, seconds: float, seed: int) -> int:
    """The exit status."""
    verdict = Verdict("soak", seed)
    few = ("--tables", str(TABLES))
    with StubDaemon(zygote, folder / "state", SETTINGS, options=few) as daemon:
        soak = Soak(daemon.url, verdict, seed)
        looks = trio.run(soak.run, seconds, daemon.pid, daemon.state_dir / "kv" / "data.mdb")
        verdict.require(daemon.terminate() == 0, "it did not end well")
        for line in faults(daemon.log.read_text(errors="replace"))[:20]:
            verdict.violation(line)
    slopes = {name: slope(looks, name) for name in (*GROWN, "rss", "latency_s")}
    if seconds >= JUDGED_S:
        for name in GROWN:
            verdict.require(slopes[name] < SLOPE, f"{name} grows by {slopes[name]:.1%} an hour")
    last = looks[-1]
    figures = {
        "deeds": sum(soak.outcomes.values()),
        "outcomes": dict(soak.outcomes),
        "slope an hour": {name: round(value, 4) for name, value in slopes.items()},
        "rss MiB first, last": [round(one.rss / 2**20, 1) for one in (looks[0], last)],
        "anonymous MiB": [round(one.anonymous / 2**20, 1) for one in (looks[0], last)],
        **{
            name: [getattr(looks[0], name), getattr(last, name)]
            for name in ("fds", "threads", "tasks")
        },
        "file MiB": [round(one.file / 2**20, 2) for one in (looks[0], last)],
    }
    grew = "too short for slopes"
    if seconds >= JUDGED_S:
        grew = ", ".join(f"{name} {value:+.2%} an hour" for name, value in slopes.items())
    deeds = sum(soak.outcomes.values())
    return verdict.finish(figures, f"{deeds} deeds in {seconds:.0f} s; {grew}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_S:g} s, without slopes")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="homeport-soak-") as folder, Zygote() as zygote:
        seconds = QUICK_S if arguments.quick else arguments.minutes * 60
        return campaign(zygote, Path(folder), seconds=seconds, seed=arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
