"""Two tenants: what one can find out about the other by his own clock, and what he can take from him.

    python -m tests.campaign.isolation [--pairs 2000] [--quick]

Timing: the victim sends half of the prompts. The attacker then sends all of them, and guesses from how long each took which ones
the victim had sent. The guess is scored as the area under its ROC curve: 0.5 is a coin. A control does the
same as the victim himself, and must do far better, else the clock was too coarse to tell anything.

Flood: the victim's sessions are made, the attacker sends ten times as much, and the victim comes back.

Passes if: the attacker's `cached_tokens` never show the victim's; the area is between 0.45 and 0.55, and the control's above
0.6; under `tiers.tenant_share` the flood costs the victim at most five points of what the cache gave him without it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import trio

from tests.campaign import stub
from tests.campaign.verdict import Verdict
from tests.campaign.visitors import PATHS, ask, body_of, faults
from tests.campaign.zygote import StubDaemon, Zygote

QUICK = 12
PROMPT = 1200  # characters, and so tokens
VICTIMS = 3  # sessions, of 76 blocks each
FLOOD = 10  # times as much
KEYS = '["victim", "attacker"]'
TIMED = stub.settings(device=2000, host=0, disk=4000, auth__keys=KEYS)
FLOODED = stub.settings(device=600, host=0, disk=1200, auth__keys=KEYS, tiers__tenant_share="0.5")


class Tenants:
    def __init__(self, url: str, verdict: Verdict) -> None:
        self.url = url
        self.verdict = verdict

    async def turn(self, key: str, text: str) -> tuple[dict[str, Any], float]:
        """The usage, and the seconds that it took. Ids are not stored: only KV is in question."""
        body = body_of("responses", text, 1, store=False)
        answer = await ask(self.url, "POST", PATHS["responses"], body, headers={"x-api-key": key})
        self.verdict.require(answer.status == 200, f"{key} was answered {answer.status}")
        return answer.json["usage"], answer.taken_s

    async def probe(self, prober: str, pairs: int, chance: random.Random) -> tuple[float, int]:
        """The area under the curve of `prober`'s guesses, and the most that he was told to be cached of a prompt."""
        sent_s: list[float] = []
        unsent_s: list[float] = []
        most = 0
        for number in range(pairs):
            prompts = [_prompt(chance), _prompt(chance)]
            await self.turn("victim", prompts[0])
            order = [0, 1]
            chance.shuffle(order)
            for which in order:
                usage, taken_s = await self.turn(prober, prompts[which])
                (unsent_s if which else sent_s).append(taken_s)
                most = max(most, usage["input_tokens_details"]["cached_tokens"])
            self.verdict.progress(f"{prober}: {number} pairs")
        return area(unsent_s, sent_s), most

    async def come_back(self, prompts: list[str]) -> float:
        """The share of its prompts' tokens that the victim finds cached."""
        cached = total = 0
        for prompt in prompts:
            usage, _ = await self.turn("victim", prompt)
            cached += usage["input_tokens_details"]["cached_tokens"]
            total += usage["input_tokens"]
        return cached / total

    async def flood(self, chance: random.Random) -> tuple[float, float]:
        """The victim's share before and after."""
        prompts = [_prompt(chance) for _ in range(VICTIMS)]
        await self.come_back(prompts)
        before = await self.come_back(prompts)
        for number in range(VICTIMS * FLOOD):
            await self.turn("attacker", _prompt(chance))
            self.verdict.progress(f"flood: {number}")
        return before, await self.come_back(prompts)


def _prompt(chance: random.Random) -> str:
    return f"{chance.getrandbits(128):032x} ".ljust(PROMPT, "p")


def area(slower: list[float], faster: list[float]) -> float:
    """How likely a random one of the first is more than a random one of the second; ties count half."""
    both = sorted([(value, 1) for value in slower] + [(value, 0) for value in faster])
    ranks = 0.0
    at = 0
    while at < len(both):
        end = at
        while end < len(both) and both[end][0] == both[at][0]:
            end += 1
        middle = (at + 1 + end) / 2
        ranks += middle * sum(which for _, which in both[at:end])
        at = end
    n, m = len(slower), len(faster)
    return (ranks - n * (n + 1) / 2) / (n * m)


def campaign(zygote: Zygote, folder: Path, *, pairs: int, seed: int, timed: bool) -> int:
    """The exit status."""
    verdict = Verdict("isolation", seed)
    chance = random.Random(seed)
    logs = ""
    with StubDaemon(zygote, folder / "timing", TIMED) as daemon:
        tenants = Tenants(daemon.url, verdict)
        control, told = trio.run(tenants.probe, "victim", max(10, pairs // 10), chance)
        verdict.require(
            told > PROMPT / 2, "the victim's own prompts were not cached: nothing was tested"
        )
        guess, leaked = trio.run(tenants.probe, "attacker", pairs, chance)
        logs += daemon.log.read_text(errors="replace")
    # What the attacker's own prompts share: the template's first words.
    verdict.require(leaked < PROMPT / 10, f"the attacker was told of {leaked} cached tokens")
    with StubDaemon(zygote, folder / "flood", FLOODED) as daemon:
        before, after = trio.run(Tenants(daemon.url, verdict).flood, chance)
        logs += daemon.log.read_text(errors="replace")
    verdict.require(before > 0.9, f"the victim found {before:.1%} before the flood")
    verdict.require(
        before - after <= 0.05, f"the flood took the victim from {before:.1%} to {after:.1%}"
    )
    for line in faults(logs)[:20]:
        verdict.violation(line)
    if timed:
        verdict.require(
            0.45 <= guess <= 0.55, f"the attacker's guesses have an area of {guess:.3f}"
        )
        verdict.require(control > 0.6, f"the control's have {control:.3f}: the clock tells nothing")
    figures = {
        "pairs": pairs,
        "area": round(guess, 4),
        "area of the control": round(control, 4),
        "cached tokens told to the attacker, at most": leaked,
        "cached tokens told to the victim, at most": told,
        "victim's share before the flood": round(before, 4),
        "and after": round(after, 4),
    }
    return verdict.finish(
        figures,
        f"the attacker's guesses over {pairs} pairs have an area of {guess:.3f} (the victim's own"
        f" {control:.3f}); a flood of {FLOOD} times as much left {after:.1%} of {before:.1%}",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} pairs, without times")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="homeport-isolation-") as folder, Zygote() as zygote:
        return campaign(
            zygote,
            Path(folder),
            pairs=QUICK if arguments.quick else arguments.pairs,
            seed=arguments.seed,
            timed=not arguments.quick,
        )


if __name__ == "__main__":
    sys.exit(main())
