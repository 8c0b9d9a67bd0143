"""What can happen to a session between two turns, and what the next turn then costs.

One sample is two turns on top of a shared history of `turns` turns, the trunk:

    trunk ──> parent ──(the interruption)──> child, which is measured
          over WebSocket                     over WebSocket or HTTP, by id or as a full replay

Laws
    Every sample has tool results of its own, so its parent and child are new to every tier: what the child finds
    cached is the trunk and its own parent, wherever the interruption left them. That is what "a fresh copy of the
    state" means here; nothing is copied, and samples cannot help one another beyond the trunk.
    The control is another daemon with an empty state directory that runs the same turns over one socket without any
    interruption; greedy outputs must be equal. A daemon given by url has no control: equality is then unknown.
    Cold is a child's whole prompt with other digits in its first line: the same length, nothing to reuse.
    Only one daemon runs at a time, and only daemons that were started here are restarted.
"""

from __future__ import annotations

import enum
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from broker.bench.daemon import Daemon
from broker.bench.session import Agent, History, Way

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from broker.bench.client import Turn
    from broker.bench.workload import Workload

LAG_BEFORE_KILL_S = 2.0  # tiers.disk.max_lag, with room: what was said before it must survive


class Interruption(enum.Enum):
    NONE = "none"
    CUT = "cut"  # TCP goes away without a close frame
    TO_HOST = "host"
    TO_DISK = "disk"
    SIGTERM = "sigterm"
    KILL = "kill"


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    title: str
    interruption: Interruption
    way: Way
    tier: str  # where the child must find its prefix

    @property
    def restarts(self) -> bool:
        return self.interruption in (Interruption.SIGTERM, Interruption.KILL)


COLD = "cold"
SCENARIOS = (
    Scenario("warm", "warm over WebSocket", Interruption.NONE, Way.SOCKET_ID, "device"),
    Scenario("reconnect", "TCP cut, full replay", Interruption.CUT, Way.SOCKET_REPLAY, "device"),
    Scenario("http-replay", "HTTP full replay", Interruption.CUT, Way.HTTP_REPLAY, "device"),
    Scenario("http-id", "HTTP by response id", Interruption.CUT, Way.HTTP_ID, "device"),
    Scenario("host", "from host", Interruption.TO_HOST, Way.SOCKET_ID, "host"),
    Scenario("disk", "from disk", Interruption.TO_DISK, Way.SOCKET_ID, "disk"),
    Scenario("sigterm", "SIGTERM, restart", Interruption.SIGTERM, Way.SOCKET_REPLAY, "disk"),
    Scenario("kill", "kill -9, restart", Interruption.KILL, Way.SOCKET_REPLAY, "disk"),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """One benchmark. `url` names a running daemon; without it, daemons are started with `settings`."""

    workload: Workload
    turns: int = 20
    repeat: int = 3
    scenarios: tuple[Scenario, ...] = SCENARIOS
    url: str | None = None
    key: str | None = None
    settings: tuple[str, ...] = ()
    models: Path | None = None

    @property
    def total_turns(self) -> int:
        """For a progress bar."""
        passes = 1 if self.url else 2
        return passes * (self.turns + 2 * self.repeat * len(self.scenarios)) + self.repeat


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured turn. `known_tokens` is the prefix that the daemon had seen; `same` is None without a control."""

    scenario: str
    ttft_s: float
    prompt_tokens: int
    known_tokens: int
    cached_tokens: int
    by_tier: dict[str, int]  # {tier name: tokens found there}
    recomputed: dict[str, int]  # {reason: tokens}
    same: bool | None

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens

    @property
    def recomputed_tokens(self) -> int:
        """Known tokens that were computed again, beyond the one that is needed for logits."""
        return max(0, self.known_tokens - 1 - self.cached_tokens)


async def measure(plan: Plan, tick: Callable[[str], None]) -> list[Sample]:
    """Run the plan. `tick` is called before every turn with what it is for."""
    if plan.url is not None:
        async with trio.open_nursery() as nursery:
            only = _Pass(plan, Agent(nursery, plan.url, plan.workload, plan.key), None, tick)
            samples = [*await only.samples({}), *await only.colds()]
            nursery.cancel_scope.cancel()
        return samples
    with tempfile.TemporaryDirectory(prefix="homeport-bench-") as folder:
        return await _measure_own(plan, Path(folder), tick)


async def _measure_own(plan: Plan, folder: Path, tick: Callable[[str], None]) -> list[Sample]:
    with Daemon(folder / "control", settings=plan.settings, models=plan.models) as daemon:
        async with trio.open_nursery() as nursery:
            agent = Agent(nursery, daemon.url, plan.workload, plan.key)
            control = _Pass(plan, agent, None, tick)
            expected = await control.stories()
            colds = await control.colds()
            nursery.cancel_scope.cancel()
    with Daemon(folder / "tested", settings=plan.settings, models=plan.models) as daemon:
        async with trio.open_nursery() as nursery:
            agent = Agent(nursery, daemon.url, plan.workload, plan.key)
            samples = await _Pass(plan, agent, daemon, tick).samples(expected)
            nursery.cancel_scope.cancel()
    return [*samples, *colds]


Story = tuple[object, object]  # what the parent said, what the child said


class _Pass:
    """The plan's turns, once, on one daemon."""

    def __init__(
        self, plan: Plan, agent: Agent, daemon: Daemon | None, tick: Callable[[str], None]
    ) -> None:
        self._plan = plan
        self._agent = agent
        self._daemon = daemon
        self._tick = tick
        self._trunk = History()

    async def stories(self) -> dict[tuple[str, int], Story]:
        """{(scenario, number): story} of an uninterrupted run."""
        await self._build()
        stories = {}
        for scenario in self._plan.scenarios:
            calm = replace(
                scenario,
                title="the control run",
                interruption=Interruption.NONE,
                way=Way.SOCKET_ID,
            )
            for number in range(self._plan.repeat):
                stories[scenario.name, number] = _story(*await self._pair(calm, number))
        return stories

    async def samples(self, expected: Mapping[tuple[str, int], Story]) -> list[Sample]:
        """Every scenario, compared with `expected` where that has it."""
        await self._build()
        samples = []
        for scenario in self._plan.scenarios:
            for number in range(self._plan.repeat):
                parent, turn = await self._pair(scenario, number)
                story = expected.get((scenario.name, number))
                same = None if story is None else story == _story(parent, turn)
                samples.append(_sample(scenario.name, turn, parent.known_tokens, same=same))
        return samples

    async def colds(self) -> list[Sample]:
        """Prompts as long as the samples', with nothing cached. Last: they push the session out of small tiers."""
        samples = []
        for number in range(self._plan.repeat):
            self._tick("cold")
            parent = await self._agent.next(self._trunk, f"cold {number} parent")
            nonce = (self._plan.workload.nonce + 1 + number) % 100_000
            turn = await self._agent.cold(parent, f"cold {number}", nonce)
            samples.append(_sample(COLD, turn, 0, same=None))
        return samples

    async def _build(self) -> None:
        for number in range(self._plan.turns):
            self._tick("building the session")
            self._trunk = await self._agent.next(self._trunk, f"trunk {number}")

    async def _pair(self, scenario: Scenario, number: int) -> tuple[History, Turn]:
        """The history up to the parent, and the child's turn."""
        self._tick(scenario.title)
        parent = await self._agent.next(self._trunk, f"{scenario.name} {number} parent")
        await self._interrupt(scenario.interruption)
        self._tick(scenario.title)
        child = await self._agent.next(parent, f"{scenario.name} {number}", scenario.way)
        assert child.last is not None
        return parent, child.last

    async def _interrupt(self, how: Interruption) -> None:
        match how:
            case Interruption.NONE:
                pass
            case Interruption.CUT:
                await self._agent.cut()
            case Interruption.TO_HOST:
                await self._agent.demote("host")
            case Interruption.TO_DISK:
                await self._agent.demote("disk")
            case Interruption.SIGTERM:
                assert self._daemon is not None, "not ours to stop"
                await trio.to_thread.run_sync(self._daemon.terminate)
                await self._start_again(self._daemon)
            case Interruption.KILL:
                assert self._daemon is not None, "not ours to kill"
                await trio.sleep(LAG_BEFORE_KILL_S)
                await trio.to_thread.run_sync(self._daemon.kill)
                await self._start_again(self._daemon)

    async def _start_again(self, daemon: Daemon) -> None:
        await self._agent.cut()
        await trio.to_thread.run_sync(daemon.start)
        self._agent.url = daemon.url


def _story(parent: History, child: Turn) -> Story:
    return parent.last and parent.last.said, child.said


def _sample(scenario: str, turn: Turn, known: int, *, same: bool | None) -> Sample:
    return Sample(
        scenario=scenario,
        ttft_s=turn.ttft_s,
        prompt_tokens=turn.prompt_tokens,
        known_tokens=known,
        cached_tokens=turn.cached_tokens,
        by_tier=turn.by_tier,
        recomputed=turn.recomputed,
        same=same,
    )
