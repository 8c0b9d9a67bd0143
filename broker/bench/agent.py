"""`homeport bench agent`: an agent loop that is interrupted in every way we promise to survive, as one table.

What is run, and how a sample is made, is in broker/bench/scenario.py; this file is the command and its report.
Exit status 1 means that an output differed from the uninterrupted run's, or that a daemon would not start.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from tqdm import tqdm

from broker.bench.client import Refused
from broker.bench.daemon import DidNotStart
from broker.bench.scenario import COLD, SCENARIOS, Plan, Sample, measure
from broker.bench.table import aligned
from broker.bench.workload import Workload
from broker.config import Server

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

TIERS = ("device", "host", "disk", "remote")
_TITLES = {COLD: "cold"} | {each.name: each.title for each in SCENARIOS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = Workload(nonce=0)
    parser.add_argument("--url", help="a running daemon; without it two are started, one by one")
    parser.add_argument("--key", help="bearer key for --url")
    parser.add_argument("--turns", type=int, default=20, help="length of the session (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="samples per row (%(default)s)")
    parser.add_argument(
        "--system-tokens",
        type=int,
        default=sizes.system_tokens,
        metavar="N",
        help="of the instructions (%(default)s)",
    )
    parser.add_argument(
        "--result-tokens",
        type=int,
        default=sizes.result_tokens,
        metavar="N",
        help="that a tool gives back each turn (%(default)s)",
    )
    parser.add_argument(
        "--output-tokens",
        type=int,
        default=sizes.output_tokens,
        metavar="N",
        help="that the model says each turn (%(default)s)",
    )
    parser.add_argument(
        "--scenario",
        action="append",
        choices=[each.name for each in SCENARIOS],
        help="only this row, beside cold; may be given again",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="configuration of the daemons that are started here",
    )
    parser.add_argument(
        "--models",
        type=Path,
        default=Server().state_dir / "models",
        help="converted models to share with those daemons (%(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every sample here")


def main(args: argparse.Namespace) -> int:
    """Run and print; the exit status."""
    plan = _plan(args)
    samples: list[Sample] = []
    failures: list[str] = []
    with tqdm(total=plan.total_turns, unit="turn", file=sys.stderr, dynamic_ncols=True) as bar:

        def tick(what: str) -> None:
            bar.set_description(what, refresh=False)
            bar.update()

        try:
            samples = trio.run(measure, plan, tick)
        except* (OSError, DidNotStart, Refused, trio.TooSlowError) as group:
            failures = [f"{type(error).__name__}: {error}" for error in leaves(group)]
    if failures:
        print(f"bench: {'; '.join(failures)}", file=sys.stderr)
        return 1
    rows = summarise(samples)
    print(table(rows))
    if plan.url is not None:
        print("No control run against a daemon of yours: `same` is unknown; nothing was restarted.")
    if args.json is not None:
        args.json.write_text(json.dumps(_report(plan, rows, samples), indent=2) + "\n")
    return 1 if any(sample.same is False for sample in samples) else 0


def _plan(args: argparse.Namespace) -> Plan:
    # Against a daemon that may have run this before, other digits up front make a session it has not seen.
    nonce = random.SystemRandom().randrange(100_000) if args.url else 0
    scenarios = [each for each in SCENARIOS if not args.scenario or each.name in args.scenario]
    return Plan(
        Workload(nonce, args.system_tokens, args.result_tokens, args.output_tokens),
        turns=args.turns,
        repeat=args.repeat,
        scenarios=tuple(each for each in scenarios if not (args.url and each.restarts)),
        url=args.url,
        key=args.key,
        settings=tuple(args.settings),
        models=args.models,
    )


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The errors of a nest of groups, without the groups."""
    out: list[BaseException] = []
    for error in group.exceptions:
        out += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return out


@dataclass(frozen=True, slots=True)
class Row:
    """One scenario's samples, summarised. Token counts are of the median prompt."""

    scenario: str
    samples: int
    prompt_tokens: int
    ttft_median_s: float
    ttft_p95_s: float  # nearest rank: with fewer than 20 samples, the slowest
    cold_ratio: float | None  # of medians
    computed_tokens: int
    recomputed_tokens: int  # the most that any sample computed again
    cached_by_tier: dict[str, int]
    same: bool | None


def summarise(samples: Sequence[Sample]) -> list[Row]:
    """Rows in the order of the scenarios, cold first."""
    cold = [sample.ttft_s for sample in samples if sample.scenario == COLD]
    rows = []
    for name in _TITLES:
        mine = sorted((s for s in samples if s.scenario == name), key=lambda s: s.ttft_s)
        if not mine:
            continue
        times = [sample.ttft_s for sample in mine]
        middle = mine[len(mine) // 2]
        judged = [sample.same for sample in mine if sample.same is not None]
        rows.append(
            Row(
                scenario=name,
                samples=len(mine),
                prompt_tokens=middle.prompt_tokens,
                ttft_median_s=statistics.median(times),
                ttft_p95_s=times[math.ceil(0.95 * len(times)) - 1],
                cold_ratio=statistics.median(times) / statistics.median(cold) if cold else None,
                computed_tokens=middle.computed_tokens,
                recomputed_tokens=max(sample.recomputed_tokens for sample in mine),
                cached_by_tier={tier: middle.by_tier.get(tier, 0) for tier in TIERS},
                same=all(judged) if judged else None,
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    head = "scenario", "n", "TTFT ms", "p95", "of cold", "prompt", "computed"
    lines: list[tuple[str, ...]] = [(*head, "device", "host", "disk", "same")]
    for row in rows:
        tiers = [str(row.cached_by_tier[tier]) for tier in ("device", "host", "disk")]
        lines.append(
            (
                _TITLES[row.scenario],
                str(row.samples),
                f"{row.ttft_median_s * 1000:.0f}",
                f"{row.ttft_p95_s * 1000:.0f}",
                "" if row.cold_ratio is None else f"{row.cold_ratio:.3f}",
                str(row.prompt_tokens),
                str(row.computed_tokens),
                *tiers,
                {True: "yes", False: "NO", None: "-"}[row.same],
            )
        )
    return "\n".join(aligned(lines))


def _report(plan: Plan, rows: Sequence[Row], samples: Sequence[Sample]) -> dict[str, object]:
    return {
        "turns": plan.turns,
        "repeat": plan.repeat,
        "workload": asdict(plan.workload),
        "settings": list(plan.settings),
        "load_average": os.getloadavg(),
        "rows": [asdict(row) for row in rows],
        "samples": [asdict(sample) for sample in samples],
    }
