"""Decision regret: the time to the first token as the engine chose, over the better of restoring and computing again.

Two engines with the real model, one that decides (`tiers.restore.decide`) and one that always restores. Each prompt is new
to both; it is computed, moved to disk and asked for again, by turns on either engine:

    recompute   the first time, when nothing is cached
    restored    the second time, on the engine that always restores
    chosen      the second time, on the engine that decides

Short prompts, whose 20 ms vary by a tenth, get more rounds than long ones; and the engines take turns at being first.

The page cache is warm: the engines have the file mapped, so it cannot be taken out of it.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from broker.app import open_model_engine
from broker.config import load
from engine.api import Began, Finished, Refused, Sampled, Sampling, Submit
from tiers.block import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from broker.config import Config
    from broker.port import Service
    from tiers.block import TokenIds

_SETTLE_S = 60.0
_MOST_ROUNDS = 6  # of a short prompt, for one of the longest
_LOWEST_ID = 1000  # below are special tokens and single bytes


@dataclass(frozen=True, slots=True)
class Regret:
    """Median seconds to the first token of prompts of one length."""

    tokens: int
    recompute_s: float
    restored_s: float
    chosen_s: float
    chosen_cached: int  # tokens that the last chosen turn did not compute

    @property
    def regret(self) -> float:
        return self.chosen_s / min(self.recompute_s, self.restored_s)


class EngineRefused(Exception):
    """It would not run the prompt."""


async def measure(
    directory: Path, models: Path, lengths: Sequence[int], repeat: int, tick: Callable[[], object]
) -> list[Regret]:
    async with (
        open_model_engine(_config(directory / "chooses", models, decide="true")) as chooses,
        open_model_engine(_config(directory / "restores", models, decide="false")) as restores,
    ):
        await _turns(chooses, _prompt(0, lengths[0]))  # what is slow only once is nobody's regret
        await _turns(restores, _prompt(0, lengths[0]))
        found = []
        for tokens in lengths:
            recompute: list[float] = []
            chosen: list[float] = []
            restored: list[float] = []
            cached = 0
            for number in range(1, rounds(tokens, repeat) + 1):
                prompt = _prompt(number, tokens)
                order = ((chooses, chosen), (restores, restored))
                for engine, again in order[:: 1 if number % 2 else -1]:
                    first, second, reused = await _turns(engine, prompt)
                    recompute.append(first)
                    again.append(second)
                    cached = reused if engine is chooses else cached
                tick()
            recompute_s, restored_s, chosen_s = map(
                statistics.median, (recompute, restored, chosen)
            )
            found.append(Regret(tokens, recompute_s, restored_s, chosen_s, cached))
        return found


def rounds(tokens: int, repeat: int) -> int:
    """How often a prompt of this length is measured: the shorter, the more often."""
    return repeat * max(1, min(_MOST_ROUNDS, 2048 // tokens))


def _config(directory: Path, models: Path, *, decide: str) -> Config:
    directory.mkdir(parents=True, mode=0o700)
    models.mkdir(parents=True, exist_ok=True)
    (directory / "models").symlink_to(models.resolve())
    return load((), (f'server.state_dir="{directory}"', f"tiers.restore.decide={decide}"))


def _prompt(number: int, tokens: int) -> TokenIds:
    numbers = random.Random(1000 * tokens + number)
    return tuple(numbers.randrange(_LOWEST_ID, 40_000) for _ in range(tokens))


async def _turns(engine: Service, prompt: TokenIds) -> tuple[float, float, int]:
    """Seconds to the first token before and after it was moved to disk, and the tokens that were reused then."""
    first, _ = await _turn(engine, prompt)
    await engine.demote(Tier.DISK, None)
    with trio.fail_after(_SETTLE_S):
        while any(tier.blocks for tier in (await engine.inspect()).tiers if tier.tier != "disk"):
            pass  # every question is answered between two of the engine's turns
    second, reused = await _turn(engine, prompt)
    return first, second, reused


async def _turn(engine: Service, prompt: TokenIds) -> tuple[float, int]:
    sampling = Sampling(max_tokens=1, temperature=0.0)
    submit = Submit(engine.new_request(), "bench", b"bench", prompt, sampling)
    began = time.perf_counter()
    first: float | None = None
    async with engine.generate(submit) as outputs:
        async for output in outputs:
            match output:
                case Began():
                    pass
                case Sampled():
                    first = first or time.perf_counter() - began
                case Finished(usage=usage):
                    assert first is not None, "one token was asked for"
                    return first, usage.cached.total
                case Refused(message=message):
                    raise EngineRefused(message)
    raise EngineRefused("it stopped")
