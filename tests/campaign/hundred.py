"""A hundred sessions on the real model, kill -9, restart, reconnect: everyone goes on as if nothing had happened.

    python -m tests.campaign.hundred [--sessions 100] [--models DIR] [--seed 1]

Each session is told a fact of its own in a prompt of some 400 tokens and answered. One daemon is never interrupted; the
other is killed and started again. Then every client opens a new WebSocket, all at once, and asks for its fact. Every
next turn must say what the uninterrupted daemon's says, token for token at temperature 0, and of the tokens that the
killed daemon had computed, 97 % must come from its cache.

Not in the suite: it takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from broker.bench.client import Socket
from broker.bench.daemon import Daemon
from broker.bench.workload import filler
from broker.config import Server
from tests.campaign.verdict import Verdict

if TYPE_CHECKING:
    from broker.bench.client import Turn

QUICK = 3
AT_ONCE = 8  # first turns side by side; the reconnects come all at once
REUSED = 0.97
SHARED = "You are an assistant that keeps notes for a project and answers questions about them.\n"
QUESTION = "Which access code did I tell you? Answer with the code."


@dataclass(frozen=True, slots=True)
class Client:
    """One session's words."""

    number: int
    code: str
    tokens: int

    def first(self) -> dict[str, Any]:
        fact = f"The access code of project {self.number:03d} is {self.code}. Keep it.\n"
        notes = filler(self.tokens - 80, f"notes {self.number}")
        return self._body([_user(f"{fact}{notes}\nSay that you have noted it.")], None)

    def next(self, previous: str) -> dict[str, Any]:
        return self._body([_user(QUESTION)], previous)

    def _body(self, items: list[dict[str, Any]], previous: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "instructions": SHARED,
            "input": items,
            "temperature": 0,
            "max_output_tokens": 12,
            "store": True,
        }
        return body if previous is None else {**body, "previous_response_id": previous}


def _user(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": text}


@dataclass(slots=True)
class Run:
    """What one daemon said."""

    name: str
    verdict: Verdict
    first: dict[int, Turn] = field(default_factory=dict)
    next: dict[int, Turn] = field(default_factory=dict)

    async def begin(self, url: str, clients: list[Client]) -> None:
        places = trio.CapacityLimiter(AT_ONCE)

        async def speak(client: Client) -> None:
            async with places:
                self.first[client.number] = await one_turn(url, client.first())
                self.verdict.progress(f"{self.name}: {len(self.first)} sessions begun")

        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(speak, client)

    async def go_on(self, url: str, clients: list[Client]) -> None:
        async def speak(client: Client) -> None:
            previous = self.first[client.number].id
            self.next[client.number] = await one_turn(url, client.next(previous))
            self.verdict.progress(f"{self.name}: {len(self.next)} sessions went on")

        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(speak, client)


async def one_turn(url: str, body: dict[str, Any]) -> Turn:
    """On a connection of its own."""
    async with trio.open_nursery() as nursery:
        socket = await Socket.open(nursery, url)
        turn = await socket.turn(body)
        await socket.close()
        nursery.cancel_scope.cancel()
    return turn


def campaign(folder: Path, *, sessions: int, tokens: int, models: Path, seed: int) -> int:
    """The exit status."""
    verdict = Verdict("hundred", seed)
    chance = random.Random(seed)
    codes = chance.sample(range(100_000, 1_000_000), sessions)
    clients = [Client(number, str(code), tokens) for number, code in enumerate(codes)]
    # What is computed again is cut differently: in float32 that may not change what is said.
    quiet = ("log.level=warning", "model.prefill_dtype=float32")

    control = Run("never interrupted", verdict)
    with Daemon(folder / "control", settings=quiet, models=models) as daemon:
        trio.run(control.begin, daemon.url, clients)
        trio.run(control.go_on, daemon.url, clients)

    killed = Run("killed", verdict)
    with Daemon(folder / "killed", settings=quiet, models=models) as daemon:
        trio.run(killed.begin, daemon.url, clients)
        verdict.require(daemon.kill() == -9, "the daemon ended by itself")
        started_s = daemon.start()
        began = time.monotonic()
        trio.run(killed.go_on, daemon.url, clients)
        went_on_s = time.monotonic() - began

    same = sum(_same(control.next[n], killed.next[n]) for n in killed.next)
    known = {n: turn.prompt_tokens + turn.output_tokens - 1 for n, turn in killed.first.items()}
    reused = {n: min(turn.cached_tokens, known[n]) for n, turn in killed.next.items()}
    share = sum(reused.values()) / sum(known.values())
    by_tier = {
        tier: sum(turn.by_tier[tier] for turn in killed.next.values())
        for tier in ("device", "host", "disk")
    }
    again: Counter[str] = Counter()
    for turn in killed.next.values():
        again.update(turn.response["usage"]["homeport:recomputed"])
    firsts = sum(_same(control.first[n], killed.first[n]) for n in killed.first)
    recalled = sum(client.code in str(killed.next[client.number].said) for client in clients)
    verdict.require(
        firsts == sessions, f"{sessions - firsts} first turns differ: the runs are no comparison"
    )
    verdict.require(same == sessions, f"{sessions - same} next turns differ from the control's")
    verdict.require(share >= REUSED, f"{share:.3f} of the reusable tokens came from the cache")
    verdict.require(by_tier["disk"] > 0, "nothing came from disk: nothing was tested")
    figures = {
        "sessions": sessions,
        "same next turns": same,
        "reusable tokens": sum(known.values()),
        "share from cache": round(share, 4),
        "least share of one session": round(min(reused[n] / known[n] for n in known), 4),
        "tokens by tier": by_tier,
        "computed because": dict(again),
        "facts recalled": recalled,
        "restart s": round(started_s, 2),
        "all went on in s": round(went_on_s, 1),
    }
    return verdict.finish(
        figures,
        f"{same} of {sessions} next turns after kill -9 equal the uninterrupted run's; {share:.2%} of"
        f" {sum(known.values())} reusable tokens came from the cache; {recalled} facts were recalled",
    )


def _same(one: Turn, other: Turn) -> bool:
    return (one.said, one.prompt_tokens, one.output_tokens) == (
        other.said,
        other.prompt_tokens,
        other.output_tokens,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=400, help="of a first prompt, about")
    parser.add_argument("--models", type=Path, default=Server().state_dir / "models")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} sessions")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="homeport-hundred-") as folder:
        return campaign(
            Path(folder),
            sessions=QUICK if arguments.quick else arguments.sessions,
            tokens=arguments.tokens,
            models=arguments.models,
            seed=arguments.seed,
        )


if __name__ == "__main__":
    sys.exit(main())
