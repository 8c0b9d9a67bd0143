"""The sections of `homeport bench serve`: which cases are run on which servers, and what is printed of each.

Laws
    The two sides live as long as the sections that need both. The other sections come after them, alone on the machine,
    each with daemons of its own.
    The load average stands beside every table, before and after.
"""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio
from tqdm import tqdm

from broker.bench import transports
from broker.bench.cases import (
    Concurrent,
    Decode,
    Evicted,
    Fresh,
    Nonces,
    Prefill,
    Restarted,
    Sizes,
    Turns,
    alternate,
    ticks,
)
from broker.bench.comparison import Ratio, Sample, Unit
from broker.bench.conversation import opening
from broker.bench.interference import ALONE, BESIDE, Interference
from broker.bench.machine import load
from broker.bench.report import table
from broker.bench.side import Homeport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from broker.bench.cases import Case
    from broker.bench.daemon import Daemon
    from broker.bench.peer import Peer
    from broker.bench.report import Report
    from broker.bench.side import Side

TWO_SIDED = ("turn", "prefill", "decode", "evicted", "restart", "concurrent", "memory")
ALONE_SECTIONS = ("transports", "interference", "spilling")
SECTIONS = (*TWO_SIDED, *ALONE_SECTIONS)
_ON, _OFF = "tiers on", "tiers off"
_NO_DRAFTS = "engine.draft_tokens=0"  # one token a step: a gap is a step
_TIERS_OFF = ("tiers.host.capacity=0B", "tiers.disk.capacity=0B")
_AT_DEPTH = Sizes(depth=4000, delta=200, output=24)
_IN_A_CROWD = Sizes(depth=512, delta=200, output=64)
_IN_A_LOOP = Sizes(depth=1500, delta=200, output=24)


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. Sizes in tokens."""

    sections: tuple[str, ...] = SECTIONS
    rounds: int = 5
    sizes: Sizes = _AT_DEPTH
    depths: tuple[int, ...] = (256, 4096)  # of prefill and decode
    decode_output: int = 64
    crowds: tuple[int, ...] = (1, 4, 16)
    crowd: Sizes = _IN_A_CROWD
    loop: Sizes = _IN_A_LOOP
    turns: int = 20  # of a loop
    streams: int = 4
    alone_tokens: int = 16  # of each stream, before something comes beside it
    budgets: tuple[int, ...] = (32, 64, 128, 256, 512)
    fresh: int = 16  # prompts
    slot_files: bool = False


QUICK = Plan(
    rounds=1,
    sizes=Sizes(depth=512, delta=64, output=8),
    depths=(128, 512),
    decode_output=16,
    crowds=(1, 2),
    crowd=Sizes(depth=64, delta=32, output=16),
    loop=Sizes(depth=500, delta=64, output=8),
    turns=3,
    streams=2,
    alone_tokens=8,
    budgets=(128,),
    fresh=4,
)


class Run:
    """A plan on its way. `new_daemon` makes one that does not run yet, on an empty state directory, with more settings."""

    def __init__(
        self,
        plan: Plan,
        nonces: Nonces,
        report: Report,
        new_daemon: Callable[[tuple[str, ...]], Daemon],
    ) -> None:
        self._plan = plan
        self._nonces = nonces
        self._report = report
        self._new_daemon = new_daemon

    async def against(self, peer: Peer, begin: Callable[[Sequence[str]], None]) -> None:
        """The sections that need both. `begin` is given the versions, once both sides answer."""
        async with self._homeport() as ours, _running(peer):
            await ours.ask(opening(0, 1), 1)
            begin([await ours.version(), await peer.version()])
            sides: list[Side] = [ours, peer]
            for name in TWO_SIDED:
                if name in self._plan.sections:
                    await self._two_sided(name, sides, peer)

    async def alone(self) -> None:
        """The sections of Homeport alone."""
        parts = {
            "transports": self._transports,
            "interference": self._interference,
            "spilling": self._spilling,
        }
        for name in ALONE_SECTIONS:
            if name in self._plan.sections:
                await parts[name]()

    async def _two_sided(self, name: str, sides: list[Side], peer: Peer) -> None:
        if name == "memory":
            await self._memory(sides)
            return
        if name == "restart" and not peer.owned:
            self._report.section(name, [f"left out: {peer.name} is not ours to stop"], [])
            return
        cases = self._cases(name)
        before = load()
        samples: list[Sample] = []
        with _progress(name, len(cases) * ticks(sides, self._plan.rounds)) as tick:
            for case in cases:
                samples += await alternate(case, sides, self._plan.rounds, tick)
        self._section(name, before, [table(samples, sides[0].name, sides[1].name)])

    def _cases(self, name: str) -> list[Case]:
        plan, nonces = self._plan, self._nonces
        sections: dict[str, list[Case]] = {
            "turn": [Turns(plan.sizes, nonces)],
            "prefill": [Prefill(depth, nonces) for depth in plan.depths],
            "decode": [Decode(depth, plan.decode_output, nonces) for depth in plan.depths],
            "evicted": [Evicted(plan.sizes, nonces)],
            "restart": [Restarted(plan.sizes, nonces, plan.slot_files)],
            "concurrent": [Concurrent(many, plan.crowd, nonces) for many in plan.crowds],
        }
        return sections[name]

    async def _memory(self, sides: Sequence[Side]) -> None:
        samples = [
            Sample("peak resident memory", side.name, 0, peak / 2**20, Unit.MEMORY)
            for side in sides
            if (peak := await side.peak_bytes()) is not None
        ]
        rows = table(samples, sides[0].name, sides[1].name, Ratio.SHARE)
        self._section(
            "memory", load(), [rows], "of every process of a side, over all sections so far"
        )

    async def _transports(self) -> None:
        plan, before = self._plan, load()
        async with self._homeport() as ours:
            with _progress("transports", plan.rounds * len(transports.WAYS)) as tick:
                samples = await transports.measure(
                    ours.daemon.url, plan.loop, plan.turns, plan.rounds, self._nonces, tick
                )
        baseline = transports.BASELINE.value
        tables = [
            table(samples, way.value, baseline)
            for way in transports.WAYS
            if way is not transports.BASELINE
        ]
        self._section("transports", before, tables)

    async def _interference(self) -> None:
        plan, before = self._plan, load()
        tables = []
        with _progress("interference", plan.rounds * (1 + len(plan.budgets))) as tick:
            async with self._homeport(_NO_DRAFTS) as ours:
                restores = await self._trials(ours).restores(plan.rounds, tick)
            tables.append(table(restores, BESIDE, ALONE, Ratio.SHARE))
            prefills: list[Sample] = []
            for budget in plan.budgets:
                row = f"a prefill, mixed_tokens {budget}"
                async with self._homeport(_NO_DRAFTS, f"engine.mixed_tokens={budget}") as ours:
                    prefills += await self._trials(ours).prefills(row, plan.rounds, tick)
            tables.append(table(prefills, BESIDE, ALONE, Ratio.SHARE))
        self._section("interference", before, tables, f"{plan.streams} streams run, without drafts")

    def _trials(self, ours: Homeport) -> Interference:
        plan = self._plan
        return Interference(
            ours.daemon.url, plan.streams, plan.alone_tokens, plan.sizes.depth, self._nonces
        )

    async def _spilling(self) -> None:
        plan, before = self._plan, load()
        case = Fresh(plan.fresh, 4, plan.crowd, self._nonces)
        async with (
            self._homeport(name=_ON) as spills,
            self._homeport(*_TIERS_OFF, name=_OFF) as forgets,
        ):
            sides = (spills, forgets)
            with _progress("spilling", ticks(sides, plan.rounds)) as tick:
                samples = await alternate(case, sides, plan.rounds, tick)
        self._section("spilling", before, [table(samples, _ON, _OFF, Ratio.SHARE)])

    def _section(
        self, name: str, before: str, tables: Sequence[Sequence[str]], *notes: str
    ) -> None:
        self._report.section(
            name, [f"load average {before} before, {load()} after", *notes], tables
        )

    @asynccontextmanager
    async def _homeport(self, *settings: str, name: str = "homeport") -> AsyncIterator[Homeport]:
        """Raises DidNotStart."""
        daemon = self._new_daemon(settings)
        await trio.to_thread.run_sync(daemon.start)
        try:
            yield Homeport(daemon, name)
        finally:
            daemon.kill()  # its state goes with it: there is nothing to write


@asynccontextmanager
async def _running(peer: Peer) -> AsyncIterator[None]:
    try:
        await peer.start()
        yield
    finally:
        await peer.stop()


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[str], None]]:
    with tqdm(total=total, unit="round", file=sys.stderr, dynamic_ncols=True) as bar:
        bar.set_description(name)
        yield partial(_tick, bar, name)


def _tick(bar: tqdm[None], name: str, what: str) -> None:
    bar.set_description(f"{name}, {what}", refresh=False)
    bar.update()
