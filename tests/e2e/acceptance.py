"""The acceptance of "a session that survives", in full size: measured figures beside the figures that pass.

    make acceptance

Runs for about twenty minutes on two cores, with nothing else running; the load average is printed with each part, because
times mean nothing without it. What needs no size (dead and living ids, protocol errors) is in the tests beside this file.
Exit status 1: something did not pass.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import trio
from tqdm import tqdm

from broker.bench.agent import summarise, table
from broker.bench.daemon import Daemon
from broker.bench.scenario import COLD, SCENARIOS, Plan, measure
from broker.bench.session import Agent, History
from broker.bench.workload import Workload
from broker.config import Server
from tests.e2e.crowd import Crowd
from tests.e2e.warm_up import warm_up

AGENT = Workload(nonce=7)  # 1,500 tokens of system prompt and tools, 200 per result, 24 of output
TURNS = 20
SESSIONS, SESSION_TURNS = 8, 10
WARM_TOKENS = 6000


class Verdicts:
    def __init__(self) -> None:
        self.failed = 0

    def check(self, passes: bool, what: str) -> None:
        self.failed += not passes
        print(f"  {'pass' if passes else 'FAIL'}  {what}")


def part(title: str) -> None:
    print(f"\n{title} (load average {os.getloadavg()[0]:.2f})", flush=True)


def survival(verdicts: Verdicts, models: Path, repeat: int) -> None:
    part(f"1, 2. One session of {TURNS} turns, interrupted in every way, {repeat} times each")
    plan = Plan(AGENT, turns=TURNS, repeat=repeat, models=models)
    with tqdm(total=plan.total_turns, unit="turn", file=sys.stderr) as bar:
        samples = trio.run(measure, plan, lambda what: bar.update())
    print(table(summarise(samples)))
    for scenario in SCENARIOS:
        mine = [sample for sample in samples if sample.scenario == scenario.name]
        worst = max(sample.recomputed_tokens for sample in mine)
        verdicts.check(worst == 0, f"{scenario.title}: {worst} known tokens computed again (0)")
        elsewhere = max(s.cached_tokens - s.by_tier[scenario.tier] for s in mine)
        verdicts.check(
            elsewhere == 0,
            f"{scenario.title}: {elsewhere} cached tokens not from {scenario.tier} (0)",
        )
        verdicts.check(all(s.same for s in mine), f"{scenario.title}: same output as uninterrupted")

    def median(name: str) -> float:
        return statistics.median(s.ttft_s for s in samples if s.scenario == name)

    prompt = min(s.prompt_tokens for s in samples if s.scenario == COLD)
    verdicts.check(prompt >= 4000, f"shortest cold prompt: {prompt} tokens (at least 4000)")
    again = median("reconnect") / median("warm")
    verdicts.check(again <= 1.2, f"reconnect against uninterrupted: {again:.2f} (at most 1.2)")
    for name, most in (("host", 0.10), ("sigterm", 0.15), ("kill", 0.15)):
        ratio = median(name) / median(COLD)
        verdicts.check(ratio <= most, f"{name} against cold: {ratio:.3f} (at most {most})")


async def idle(verdicts: Verdicts, url: str) -> None:
    part("1. The same session, left alone until it has moved down by itself")
    async with trio.open_nursery() as nursery:
        agent, history = Agent(nursery, url, AGENT), History()
        for number in range(TURNS):
            history = await agent.next(history, f"trunk {number}")
        for tier, above in (("host", ("device",)), ("disk", ("device", "host"))):
            await agent.until_empty(*above)
            known = history.known_tokens
            history = await agent.next(history, f"after {tier}")
            turn = history.last
            verdicts.check(
                turn.by_tier[tier] == turn.cached_tokens >= known - 1,
                f"idle to {tier}: {turn.cached_tokens} of {known} known tokens cached, {turn.by_tier}",
            )
        nursery.cancel_scope.cancel()


async def crowd(verdicts: Verdicts, roomy: Daemon, crowded: Daemon) -> None:
    part(f"4. {SESSIONS} sessions at once, {SESSION_TURNS} turns each, on half of their size")
    alone, together = _crowd(), _crowd()
    with roomy:
        await alone.one_by_one(roomy.url)
    with crowded:
        await together.together(crowded.url)
        verdicts.check(True, f"{SESSIONS * SESSION_TURNS} turns, each with one terminal event")
        differing = alone.differing(together)
        verdicts.check(
            not differing, f"sessions that differ from themselves alone: {differing} ([])"
        )
        async with trio.open_nursery() as nursery:
            agent = together.agent(nursery, crowded.url, 0)
            full = await agent.admin("GET", "/admin/tiers")
            evictions = full["evictions_total"]
            verdicts.check(sum(evictions.values()) > 0, f"evictions: {evictions} (some)")
            await agent.demote("disk")
            empty = await agent.admin("GET", "/admin/tiers")
            held = {name: empty[name] for name in ("running", "waiting", "refs", "leases")}
            verdicts.check(not any(held.values()), f"held at the end: {held} (all 0)")


async def warm(verdicts: Verdicts, url: str) -> None:
    part(
        f"Real clients 5. A warm-up of {WARM_TOKENS} tokens, and the turn that continues it at once"
    )
    async with trio.open_nursery() as nursery:
        for number, (by_replay, store) in enumerate(((False, False), (False, True), (True, False))):
            done = await warm_up(
                nursery,
                url,
                WARM_TOKENS,
                by_replay=by_replay,
                store=store,
                label=f"warm {number}",
            )
            how = f"{'by replay' if by_replay else 'by id'}, store {store}"
            verdicts.check(
                done.acknowledged_s <= 1.0,
                f"{how}: acknowledged in {done.acknowledged_s:.3f} s (at most 1)",
            )
            verdicts.check(
                done.twice == 0,
                f"{how}: {done.twice} tokens computed twice (0); of {done.turn.prompt_tokens} the turn"
                f" reused {done.turn.cached_tokens} and computed {done.turn.recomputed}",
            )
        nursery.cancel_scope.cancel()


def _crowd() -> Crowd:
    return Crowd(SESSIONS, SESSION_TURNS, Workload(nonce=100))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="samples per scenario (%(default)s)")
    parser.add_argument("--models", type=Path, default=Server().state_dir / "models")
    args = parser.parse_args()
    verdicts = Verdicts()
    with tempfile.TemporaryDirectory(prefix="homeport-acceptance-") as folder:
        survival(verdicts, args.models, args.repeat)
        quick = ("tiers.host.after=5s", "tiers.disk.after=40s")
        with Daemon(Path(folder) / "idle", settings=quick, models=args.models) as daemon:
            trio.run(idle, verdicts, daemon.url)
        with Daemon(Path(folder) / "warm", models=args.models) as daemon:
            trio.run(warm, verdicts, daemon.url)
        # Evicted prompts are computed again, cut differently: in float32 that may not change what is said.
        exact = "model.prefill_dtype=float32"
        half = f"tiers.device.capacity={_crowd().half()}"
        crowded = Daemon(Path(folder) / "crowded", settings=(half, exact), models=args.models)
        roomy = Daemon(Path(folder) / "roomy", settings=(exact,), models=args.models)
        trio.run(crowd, verdicts, roomy, crowded)
    print(f"\n{verdicts.failed} failed" if verdicts.failed else "\nall passed")
    return 1 if verdicts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
