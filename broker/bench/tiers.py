"""`homeport bench tiers`: how fast blocks move between tiers, beside what memory and disk can do by themselves.

Everything goes through the daemon's own code: arenas, sealed copies, the disk threads and the LMDB store, with blocks of
random numbers. In each round every move is made once, so that all of them see the same machine; medians are printed.

    memcpy          blocks copied by memcpy, from one arena to another
    device -> host  `Memory.copy`, which seals; host -> device verifies the seal (both on the CPU: arenas in memory)
    host -> disk    `DiskWriter` until every block is committed; beside it a file of the same size, O_DIRECT and fsync
    disk -> device  `DiskReader`s until every block is verified in its slot, the store just opened:
                    warm: all of it in the page cache; cold: none of it, which the bytes that the disk read must show.
                    By which way the blocks came is printed too: what is mapped came without the fast ones
    O_DIRECT        the store's own file, read by as many threads and in requests as large as do best over the rounds;
                    between the cold restores, so that a ratio compares what the disk did within a few seconds

Then the share of checksums in a restore, against restores that believe everything; and how far the file outgrows its
contents while it is written over ten times. Last, with the real model, what the engine's choice between restoring and
computing costs (regret.py).
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from tqdm import tqdm

from broker.bench import raw_disk
from broker.bench.table import aligned
from broker.config import Server

if TYPE_CHECKING:
    import argparse
    from collections import Counter

    from broker.bench.moves import Bench, Growth
    from tiers.store import Way

_LAYER_BYTES = 16 << 10  # one KV head of 64 float32 elements, K and V, of 32 tokens

# What is promised, as the row's name, what it is measured against, and the least share of it.
_TARGETS = (
    ("disk -> device, cold", "O_DIRECT read", 0.85),
    ("disk -> device, warm", "memcpy", 0.5),
)
_MOST_CHECKSUMS = 0.10
_MOST_FILE = 1.1
_MOST_REGRET = 1.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir",
        type=Path,
        default=Server().state_dir,
        help="on the disk to be measured; what is written there is removed again (%(default)s)",
    )
    parser.add_argument(
        "--block-bytes",
        type=int,
        default=90 * _LAYER_BYTES,
        metavar="N",
        help="of one block (%(default)s)",
    )
    parser.add_argument(
        "--blocks", type=int, default=512, metavar="N", help="moved in each round (%(default)s)"
    )
    parser.add_argument(
        "--readers",
        type=int,
        default=4,
        metavar="N",
        help="threads that read the disk (%(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="of each measurement (%(default)s)"
    )
    parser.add_argument(
        "--turnover",
        type=int,
        default=10,
        metavar="N",
        help="times that the whole store is written anew (%(default)s)",
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="*",
        default=[32, 128, 512, 2048],
        metavar="TOKENS",
        help="of the prompts whose decisions are judged; none: no model is loaded (%(default)s)",
    )
    parser.add_argument(
        "--models",
        type=Path,
        default=Server().state_dir / "models",
        help="converted models (%(default)s)",
    )
    parser.add_argument(
        "--compact",
        choices=("off", "bf16", "int8"),
        default="off",
        help="tiers.disk.compact (%(default)s)",
    )


def main(args: argparse.Namespace) -> int:
    """Run and print; the exit status."""
    if args.block_bytes % _LAYER_BYTES or min(args.block_bytes, args.blocks, args.rounds) < 1:
        print(f"bench: --block-bytes is a multiple of {_LAYER_BYTES}", file=sys.stderr)
        return 2
    from broker.bench.moves import Bench, Growth  # torch: not for every command line

    args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="bench-tiers-") as place:
        if not raw_disk.is_direct(Path(place)):
            print(f"bench: {args.dir}: this file system has no O_DIRECT", file=sys.stderr)
            return 1
        bench = Bench(
            Path(place),
            layers=args.block_bytes // _LAYER_BYTES,
            blocks=args.blocks,
            readers=args.readers,
            compact=args.compact,
        )
        with tqdm(total=args.rounds + args.turnover + 1, file=sys.stderr, unit="round") as bar:
            bar.set_description("filling", refresh=True)
            bench.fill()
            for _ in range(args.rounds):
                bar.update()
                bar.set_description("moving", refresh=True)
                bench.round()
            growth = Growth(bench)
            for _ in range(args.turnover):
                bar.update()
                bar.set_description("turning over", refresh=True)
                growth.turn_over()
            bar.update()
        print(_report(bench, growth, args))
        del bench, growth
        if args.lengths:
            print(_decisions(Path(place), args))
    return 0


def _decisions(place: Path, args: argparse.Namespace) -> str:
    from broker.bench.regret import measure, rounds

    steps = sum(rounds(tokens, args.rounds) for tokens in args.lengths)
    with tqdm(total=steps, file=sys.stderr, unit="prompt", desc="deciding") as bar:
        run = functools.partial(measure, place, args.models, args.lengths, args.rounds, bar.update)
        found = trio.run(run)
    lines: list[tuple[str, ...]] = [
        ("tokens", "recompute ms", "restored ms", "chosen ms", "of them cached", "regret")
    ]
    lines += [
        (
            str(one.tokens),
            *(f"{s * 1e3:.1f}" for s in (one.recompute_s, one.restored_s, one.chosen_s)),
            str(one.chosen_cached),
            f"{one.regret:.3f}",
        )
        for one in found
    ]
    worst = max(one.regret for one in found)
    verdict = _verdict(
        f"regret, at worst: {worst:.3f}", f"at most {_MOST_REGRET}", good=worst <= _MOST_REGRET
    )
    return "\n".join(("", *aligned(lines), "", verdict))


def _report(bench: Bench, growth: Growth, args: argparse.Namespace) -> str:
    threads, size = bench.best_direct
    moves = {**bench.moves, "O_DIRECT read": bench.direct[bench.best_direct]}
    rates = {row: statistics.median(t.rate for t in timed) for row, timed in moves.items()}
    lines = [("move", "GB/s", "least", "most", "of memcpy", "of O_DIRECT", "ms a block")]
    for row, timed in moves.items():
        found = [one.rate for one in timed]
        direct = rates["O_DIRECT write" if row.startswith("host -> disk") else "O_DIRECT read"]
        each = [one.seconds / bench.blocks * 1e3 for one in timed]
        lines.append(
            (
                row,
                f"{rates[row] / 1e9:.2f}",
                f"{min(found) / 1e9:.2f}",
                f"{max(found) / 1e9:.2f}",
                f"{rates[row] / rates['memcpy']:.2f}",
                f"{rates[row] / direct:.2f}" if "disk" in row else "",
                "" if "DIRECT" in row else f"{statistics.median(each):.3f}",
            )
        )
    out = [
        f"{bench.blocks} blocks of {bench.block_bytes / 2**20:.2f} MiB, stored as {bench.codec.scheme}; "
        f"{bench.readers} readers; {args.rounds} rounds; load average "
        + " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "",
        *aligned(lines),
        "",
        f"O_DIRECT read: {threads} threads, {size / 2**20:.0f} MiB a request; by their medians the best "
        f"of {len(bench.direct)} ways",
        f"cold restores: the disk read {statistics.median(bench.from_disk):.0%} of the bytes",
        *(f"{row}: {_ways(ways)}" for row, ways in bench.ways.items()),
    ]
    for row, against, least in _TARGETS:
        share = statistics.median(
            ours.rate / theirs.rate for ours, theirs in zip(moves[row], moves[against], strict=True)
        )
        out.append(
            _verdict(f"{row}: {share:.2f} of {against}", f"at least {least}", good=share >= least)
        )
    for row, unchecked in bench.unchecked.items():
        share = statistics.median(
            1 - without / with_.seconds
            for without, with_ in zip(unchecked, moves[row], strict=True)
        )
        wanted = f"at most {_MOST_CHECKSUMS:.0%}"
        out.append(_verdict(f"{row}: checksums {share:.1%}", wanted, good=share <= _MOST_CHECKSUMS))
    grown = growth.file_over_live
    row = f"file / live after {growth.written - 1:.0f} x turnover: {grown:.3f}"
    out.append(_verdict(row, f"at most {_MOST_FILE}", good=grown <= _MOST_FILE))
    return "\n".join(out)


def _ways(ways: Counter[Way]) -> str:
    """How the blocks came, most of them first."""
    total = ways.total()
    return ", ".join(f"{way.value} {count / total:.1%}" for way, count in ways.most_common())


def _verdict(found: str, wanted: str, *, good: bool) -> str:
    return f"{found} ({wanted}: {'yes' if good else 'NO'})"
