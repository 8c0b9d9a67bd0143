"""`homeport bench serve --against URL`: the same agents' sessions on Homeport and on another server, by turns.

A section is a table. Some ask both sides the same over Chat Completions (cases.py):

    turn          first token of a cold turn and of the next one, warm, and the latter as a whole
    prefill       tokens a second, of prompts of which nothing is cached
    decode        tokens a second of one stream, at several depths of context
    evicted       the next turn of a session, after turns of two others
    restart       the next turn after a restart; also with slot files, where the peer is llama.cpp's server
    concurrent    the next turns of 1, 4 and 16 sessions at once
    memory        peak resident memory, over what ran before it

and some are of Homeport alone:

    transports    an agent's loop over WebSocket, over HTTP by id, over HTTP with everything (transports.py)
    interference  streams beside a restore, and beside prefills for each budget of a mixed step (interference.py)
    spilling      fresh prompts with all tiers, and with the device alone

Homeport is a daemon of this program on an empty state directory. The other server runs already (`--against`) or is started
here (`--against-command`); only the latter can be restarted and weighed.

Exit status 1: a side did not start, or refused. What was measured until then is printed, and written.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shlex
import signal
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING

import trio

from broker.bench.agent import leaves
from broker.bench.cases import Nonces, Sizes
from broker.bench.client import Refused
from broker.bench.daemon import Daemon, DidNotStart
from broker.bench.interference import EndedEarly
from broker.bench.machine import machine
from broker.bench.peer import Peer
from broker.bench.report import Report, spoken
from broker.bench.sections import ALONE_SECTIONS, QUICK, SECTIONS, TWO_SIDED, Plan, Run
from broker.config import Server

if TYPE_CHECKING:
    from collections.abc import Sequence

_COUNTS = (
    ("--rounds", "rounds of each case"),
    ("--depth", "tokens of context before the measured turn"),
    ("--delta", "tokens that a turn adds"),
    ("--output-tokens", "tokens that a turn answers"),
    ("--decode-tokens", "tokens that a decode rate is taken of"),
    ("--crowd-depth", "tokens of context of each of several sessions"),
    ("--crowd-tokens", "tokens that each of those answers"),
    ("--turns", "turns of a loop over a transport"),
    ("--streams", "streams beside a restore or a prefill"),
)
_LISTS = (
    ("--depths", "tokens of context of prefill and decode"),
    ("--crowds", "sessions at once"),
    ("--budgets", "values of engine.mixed_tokens"),
)
_LOG_LINES = 20  # of each server, when one of them failed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", metavar="URL", help="an OpenAI-compatible server that runs")
    parser.add_argument(
        "--against-command",
        metavar="COMMAND",
        help="start, restart and stop it here; {port} becomes a free port (else --against says where it listens)",
    )
    parser.add_argument("--against-name", metavar="NAME", help="what tables call it")
    parser.add_argument("--against-model", metavar="ID", help="which of its models to ask")
    parser.add_argument("--against-key", metavar="KEY", help="its bearer key")
    parser.add_argument(
        "--slot-files",
        action="store_true",
        help="also save its slot 0 before a restart and load it after (llama.cpp with --slot-save-path)",
    )
    parser.add_argument(
        "--sections", type=_sections, metavar="A,B", help=f"of {','.join(SECTIONS)} (all)"
    )
    parser.add_argument("--quick", action="store_true", help="one round of small sizes")
    for option, what in _COUNTS:
        parser.add_argument(option, type=_positive, metavar="N", help=what)
    for option, what in _LISTS:
        parser.add_argument(option, type=_positive, nargs="+", metavar="N", help=what)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append everything here, too")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="configuration of Homeport's daemons",
    )
    parser.add_argument(
        "--models",
        type=Path,
        default=Server().state_dir / "models",
        help="converted models to share with them (%(default)s)",
    )
    parser.add_argument("--homeport", metavar="COMMAND", help="another homeport than this one")


def main(args: argparse.Namespace) -> int:
    """Run and print; the exit status."""
    plan = plan_of(args)
    if (wrong := _wrong(args, plan)) is not None:
        print(f"bench: {wrong}", file=sys.stderr)
        return 2
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="homeport-bench-") as folder:
        try:
            trio.run(_run_unless_stopped, args, plan, Path(folder))
        except* (
            Stopped, OSError, DidNotStart, Refused, EndedEarly, TimeoutExpired, trio.TooSlowError
        ) as group:  # fmt: skip
            failures = [f"{type(error).__name__}: {error}" for error in leaves(group)]
            for log in sorted(Path(folder).glob("*.log")):
                failures += log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    if failures:
        print("bench:", "\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


class Stopped(Exception):
    """By a signal."""


async def _run_unless_stopped(args: argparse.Namespace, plan: Plan, folder: Path) -> None:
    """Whatever ends it, what it started is ended. Raises Stopped."""
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals)
        await _run(args, plan, folder)
        nursery.cancel_scope.cancel()


async def _watch_signals(task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            raise Stopped(signal.Signals(number).name)


async def _run(args: argparse.Namespace, plan: Plan, folder: Path) -> None:
    report = Report(args.markdown)
    nonces = Nonces(random.SystemRandom().randrange(100_000))  # a peer may have seen another run
    program = shlex.split(args.homeport) if args.homeport else (sys.executable, "-m", "broker")
    states = (folder / f"homeport-{number}" for number in itertools.count())

    def new_daemon(settings: tuple[str, ...]) -> Daemon:
        every = (*args.settings, *settings)
        return Daemon(next(states), settings=every, models=args.models, program=program)

    run = Run(plan, nonces, report, new_daemon)

    def begin(versions: Sequence[str]) -> None:
        now = datetime.now(UTC)
        command = spoken(["homeport", "bench", "serve", *sys.argv[3:]])
        report.begin(
            f"{now:%Y-%m-%d %H:%M} UTC",
            [command, machine(), *(spoken(one.split()) for one in versions)],
        )

    if _peer_given(args):
        peer = Peer(
            folder / "peer.log",
            url=args.against,
            command=args.against_command,
            name=args.against_name,
            model=args.against_model,
            key=args.against_key,
        )
        await run.against(peer, begin)
    else:
        begin([])
    await run.alone()


def plan_of(args: argparse.Namespace) -> Plan:
    """The defaults, or the quick ones, and over them what was given."""
    plan = QUICK if args.quick else Plan()
    sizes = Sizes(
        args.depth or plan.sizes.depth,
        args.delta or plan.sizes.delta,
        args.output_tokens or plan.sizes.output,
    )
    crowd = Sizes(
        args.crowd_depth or plan.crowd.depth,
        args.delta or plan.crowd.delta,
        args.crowd_tokens or plan.crowd.output,
    )
    default = SECTIONS if _peer_given(args) else ALONE_SECTIONS
    return replace(
        plan,
        sections=args.sections or default,
        rounds=args.rounds or plan.rounds,
        sizes=sizes,
        depths=tuple(args.depths or plan.depths),
        decode_output=args.decode_tokens or plan.decode_output,
        crowds=tuple(args.crowds or plan.crowds),
        crowd=crowd,
        loop=replace(plan.loop, delta=sizes.delta, output=sizes.output),
        turns=args.turns or plan.turns,
        streams=args.streams or plan.streams,
        budgets=tuple(args.budgets or plan.budgets),
        slot_files=args.slot_files,
    )


def _wrong(args: argparse.Namespace, plan: Plan) -> str | None:
    """What is wrong about the arguments together."""
    needed = [name for name in plan.sections if name in TWO_SIDED]
    if needed and not _peer_given(args):
        return f"{', '.join(needed)}: against what? Give --against or --against-command"
    if args.against_command and not args.against and "{port}" not in args.against_command:
        return "--against-command has no {port}: say with --against where it listens"
    if args.slot_files and not args.against_command:
        return "--slot-files needs --against-command: the peer is restarted"
    return None


def _peer_given(args: argparse.Namespace) -> bool:
    return bool(args.against or args.against_command)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return int(text)


def _sections(text: str) -> tuple[str, ...]:
    """In the order in which they are run."""
    named = text.split(",")
    if unknown := [name for name in named if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(SECTIONS)}")
    return tuple(name for name in SECTIONS if name in named)
