"""A client that leaves at every checkpoint of a restore, a spill and a generation: nothing stays held, and nobody else notices.

    python -m tests.campaign.cancels [--orders 20] [--seed 1] [--quick]

The engine is driven turn by turn in this thread (`tests.engine.test_engine.Bench`): its model is a hash chain, and its
disk answers when it is told to. A checkpoint is the moment before a turn of the engine or an answer of the disk. Each
scene is played once to count its checkpoints, and then once for each of them with a cancel there; `orders` are ways in
which turns and answers may follow one another.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.api import Began, Cancel, Demote, Finished, FinishReason, Prefetch, Sampled
from tests.campaign.verdict import Verdict
from tests.engine.fake_model import oracle
from tests.engine.test_engine import Bench, prompt_of
from tiers.block import Tier

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.api import RequestId
    from tiers.block import TokenIds

QUICK_ORDERS = 1
OUTPUT = 6
_ENDLESS = 2000  # checkpoints; no scene has a tenth of it


@dataclass(frozen=True, slots=True)
class Scene:
    """What is where when the curtain rises. The one who leaves is `leaver`; two others talk at the same time."""

    name: str
    prepare: Callable[[Bench], None]
    leaver: TokenIds
    prefetched: bool = False


def _spoken(bench: Bench, *prompts: TokenIds) -> None:
    for number, prompt in enumerate(prompts):
        bench.run(prompt, 2, session=f"s{number}")


def _demoted(tier: Tier) -> Callable[[Bench], None]:
    def prepare(bench: Bench) -> None:
        _spoken(bench, _A, _B)
        bench.inbox.put(Demote(1, tier, None))
        bench.until_quiet()

    return prepare


def _halves(bench: Bench) -> None:
    """Some blocks of the leaver on the host, the ones before them on disk only."""
    _spoken(bench, _A[:12])
    bench.inbox.put(Demote(1, Tier.DISK, None))
    bench.until_quiet()
    bench.run(_A, 2)
    bench.inbox.put(Demote(2, Tier.HOST, None))
    bench.until_quiet()


def _crowded(bench: Bench) -> None:
    """A device full of others: to begin, the leaver must wait for spills."""
    _spoken(bench, *(prompt_of(23, salt=n) for n in range(5, 8)))


_A, _B, _C = prompt_of(26), prompt_of(17, salt=1), prompt_of(11, salt=2)
SCENES = (
    Scene("restore from disk", _demoted(Tier.DISK), (*_A, 7, 8, 9)),
    Scene("restore from the host", _demoted(Tier.HOST), (*_A, 7, 8, 9)),
    Scene("restore from both", _halves, (*_A, 7, 8, 9)),
    Scene("restore after a prefetch", _demoted(Tier.DISK), (*_A, 7, 8, 9), prefetched=True),
    Scene("spill for room", _crowded, prompt_of(30, salt=4)),
    Scene("generate", lambda bench: None, _A),
)


class Play:
    """One performance of a scene. `cancel_at` is the checkpoint at which the leaver leaves."""

    def __init__(self, scene: Scene, order: int, cancel_at: int | None) -> None:
        self.bench = Bench(device=14, host=8, disk=64)
        scene.prepare(self.bench)
        self.scene = scene
        self.random = random.Random(order)
        self.cancel_at = cancel_at
        self.checkpoints = 0
        if scene.prefetched:
            self.bench.inbox.put(Prefetch(b"", scene.leaver))
        self.leaver = self.submit(scene.leaver)
        self.others = {self.submit(prompt): prompt for prompt in ((*_B, 3, 4), _C)}
        self.run()

    def submit(self, prompt: TokenIds) -> RequestId:
        return self.bench.submit(prompt, OUTPUT, session=f"p{len(prompt)}")

    def run(self) -> None:
        bench = self.bench
        while not (bench.scheduler.idle and bench.inbox.empty() and not bench.disk.pending):
            self.checkpoints += 1
            assert self.checkpoints < _ENDLESS, "the scene does not end"
            if self.checkpoints == self.cancel_at:
                bench.inbox.put(Cancel(self.leaver))
            if bench.disk.pending and self.random.random() < 0.5:
                bench.disk.settle(self.random.randrange(3))
            else:
                bench.turn()

    def faults(self) -> list[str]:
        bench, wrong = self.bench, []
        for request, prompt in self.others.items():
            if bench.ids(request) != oracle(prompt, OUTPUT):
                wrong.append(f"a neighbour says {bench.ids(request)}")
        said = bench.ids(self.leaver)
        if said != oracle(self.scene.leaver, OUTPUT)[: len(said)]:
            wrong.append(f"who left was told {said}")
        for request, outputs in bench.said.items():
            kinds = [type(output) for output in outputs]
            middle = kinds[1:-1]
            if kinds[0] is not Began or kinds[-1] is not Finished or {*middle} - {Sampled}:
                wrong.append(f"request {request} got {kinds}")
        bench.inbox.put(Demote(9, Tier.DISK, None))
        for _ in range(3):  # a lease ends when it is next looked at
            bench.until_quiet()
            bench.pass_time(60)
        held = bench.cache.statistics()
        pools = {tier.name: of.pool for tier, of in held.tiers.items()}
        counts = {
            "holds": held.holds,
            "refs": held.refs,
            "leases": held.leases,
            "flying": held.flying,
            **{f"lent {name}": pool.lent for name, pool in pools.items()},
            **{f"arriving {name}": pool.arriving for name, pool in pools.items()},
        }
        wrong += [f"{count} {name} at the end" for name, count in counts.items() if count]
        again = bench.run(self.scene.leaver, OUTPUT)
        if again != oracle(self.scene.leaver, OUTPUT):
            wrong.append(f"who came back was told {again}")
        return wrong


def campaign(*, orders: int, seed: int) -> int:
    """The exit status."""
    verdict = Verdict("cancels", seed)
    counts: Counter[str] = Counter()
    for scene in SCENES:
        for order in range(seed, seed + orders):
            whole = Play(scene, order, None)
            verdict.require(not (wrong := whole.faults()), f"{scene.name}, uncancelled: {wrong}")
            for at in range(1, whole.checkpoints + 1):
                play = Play(scene, order, at)
                reason = play.bench.finished(play.leaver).reason
                counts["cancelled in time"] += reason is FinishReason.CANCELLED
                counts[scene.name] += 1
                wrong = play.faults()
                about = f"{scene.name}, order {order}, cancelled at checkpoint {at}"
                verdict.require(not wrong, f"{about}: {wrong}")
            verdict.progress(f"{scene.name}: order {order}")
    cancels = sum(counts[scene.name] for scene in SCENES)
    verdict.require(counts["cancelled in time"] > cancels // 3, "the cancels came too late")
    return verdict.finish(
        dict(counts),
        f"{cancels} cancels, {counts['cancelled in time']} of them before the end: nothing stayed"
        f" held, and no neighbour said anything else",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--orders", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ORDERS} orders")
    arguments = parser.parse_args(argv)
    orders = QUICK_ORDERS if arguments.quick else arguments.orders
    return campaign(orders=orders, seed=arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
