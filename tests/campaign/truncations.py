"""A data file cut, zeroed, overwritten or lengthened anywhere: the daemon starts every time, serves, and serves nothing wrong.

    python -m tests.campaign.truncations [--offsets 500] [--seed 1] [--quick]

One stub daemon fills a state directory and is killed, another ends in good order. Each trial takes a copy of either,
damages data.mdb at one offset (random, or at a page; the two meta pages and 0 are among them), starts a daemon on it,
continues sessions by their ids, says whole histories again where an id is not known any more, and ends it with SIGTERM.

Violations: no ready line; an end that nobody asked for; a wrong answer; a file that was given up and not kept.
"""

from __future__ import annotations

import argparse
import http.client
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from broker.bench.client import Refused, call
from broker.bench.daemon import DidNotStart
from tests.campaign import stub
from tests.campaign.dialogue import (
    Ear,
    Turn,
    Wrong,
    body,
    check_whole,
    following,
    http_turn,
    opening,
)
from tests.campaign.verdict import Verdict
from tests.campaign.zygote import StubDaemon, Zygote

QUICK = 16
PAGE = 4096
START_S = 20.0
KINDS = ("truncated", "zeroed", "garbled", "lengthened")
SESSIONS, TURNS = 6, 6


class Truncations:
    def __init__(self, zygote: Zygote, folder: Path, verdict: Verdict, seed: int) -> None:
        self.zygote = zygote
        self.folder = folder
        self.verdict = verdict
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.turns: dict[str, dict[str, Turn]] = {}  # {how it ended: {response id: turn}}

    def settings(self) -> tuple[str, ...]:
        # The disk holds everything: what is missing later, the damage took.
        return stub.settings(disk=2000)

    def fill(self) -> None:
        for how in ("killed", "ended"):
            daemon = StubDaemon(self.zygote, self.folder / how, self.settings())
            daemon.start()
            try:
                self.turns[how] = dict(
                    pair for number in range(SESSIONS) for pair in self.session(daemon, number)
                )
                call("POST", daemon.url, "/admin/demote", {"tier": "disk", "session": None})
            finally:
                if how == "killed":
                    daemon.kill()
                else:
                    self.verdict.require(daemon.terminate() == 0, "did not end well")

    def session(self, daemon: StubDaemon, number: int) -> list[tuple[str, Turn]]:
        told, turn = [], opening(f"Session {number}. " * 3, "begin " * 4)
        previous = None
        for step in range(TURNS):
            if step:
                turn = following(turn, f"step {step} " * 3)
            ear = Ear(turn)
            http_turn(daemon.url, body(turn, previous=previous), ear.feed)
            assert ear.response_id is not None
            previous = ear.response_id
            told.append((previous, turn))
        return told

    def trial(self, number: int) -> None:
        how = "ended" if number % 2 else "killed"
        copy = self.folder / "trial"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder / how, copy)
        what = self.damage(copy / "kv" / "data.mdb", number)
        about = f"{what} after a daemon that was {how}"
        daemon = StubDaemon(self.zygote, copy, self.settings())
        try:
            self.counts["starts"] += 1
            daemon.start(START_S)
            kept = self.serve(daemon, self.turns[how])
            status = daemon.ended()
            self.verdict.require(
                status is None, f"{about}: ended with {status}:\n{daemon.tail(10)}"
            )
            if status is None:
                status = daemon.terminate()
                self.verdict.require(status == 0, f"{about}: SIGTERM ended it with {status}")
        except DidNotStart as error:
            self.counts["failed starts"] += 1
            self.verdict.violation(f"{about}: {error}")
        except Wrong as error:
            self.counts["wrong"] += 1
            self.verdict.violation(f"{about}: {error}")
        except (OSError, http.client.HTTPException, Refused) as error:
            self.counts["died"] += 1
            self.verdict.violation(
                f"{about}: {error!r}; status {daemon.ended()}:\n{daemon.tail(10)}"
            )
        else:
            self.counts["stores with nothing left"] += not kept
            aside = [
                one for one in copy.iterdir() if one.name.startswith("kv") and one.name != "kv"
            ]
            self.counts["put aside"] += bool(aside)
            self.verdict.require(
                bool(kept or aside), f"{about}: everything is gone, and nothing was put aside"
            )
        finally:
            daemon.end()
            daemon.log.unlink(missing_ok=True)

    def serve(self, daemon: StubDaemon, turns: dict[str, Turn]) -> int:
        """How many of the responses are still known."""
        kept = 0
        latest = list(turns)[TURNS - 1 :: TURNS]
        for response in [*self.random.sample(latest, 3), *self.random.sample(list(turns), 2)]:
            there = self.known(daemon, response, turns[response])
            kept += there
            turn = following(turns[response], f"after the damage {len(turns[response].prompt)}")
            ear = Ear(turn)
            http_turn(daemon.url, body(turn, previous=response if there else None), ear.feed)
            self.counts["turns"] += 1
            self.counts["tokens restored from disk"] += ear.by_tier["disk"]
        self.counts["responses kept"] += kept
        return kept

    def known(self, daemon: StubDaemon, response: str, turn: Turn) -> bool:
        try:
            found = call("GET", daemon.url, f"/v1/responses/{response}")
        except Refused as refused:
            if refused.status == http.client.NOT_FOUND:
                return False
            raise
        check_whole(found, turn)
        return True

    def damage(self, data: Path, number: int) -> str:
        """Do one kind of it, and say what."""
        size = data.stat().st_size
        kind = KINDS[number // 2 % len(KINDS)]
        special = number // 8
        if special < 4:
            offset = (0, PAGE, 2 * PAGE, size - PAGE)[
                special
            ]  # two meta pages, the first and the last other
        elif self.random.random() < 0.5:
            offset = self.random.randrange(size // PAGE) * PAGE
        else:
            offset = self.random.randrange(size)
        run = self.random.randint(1, 8) * PAGE
        with data.open("r+b") as file:
            match kind:
                case "truncated":
                    file.truncate(offset)
                case "zeroed" | "garbled":
                    run = min(run, size - offset)
                    file.seek(offset)
                    file.write(bytes(run) if kind == "zeroed" else self.random.randbytes(run))
                case _:
                    file.seek(size)
                    file.write(bytes(run) if number % 3 else self.random.randbytes(run))
        self.counts[kind] += 1
        return f"{size} bytes {kind} at {offset}"


def campaign(zygote: Zygote, folder: Path, *, offsets: int, seed: int) -> int:
    """The exit status."""
    verdict = Verdict("truncations", seed)
    run = Truncations(zygote, folder, verdict, seed)
    run.fill()
    for number in range(offsets):
        run.trial(number)
        verdict.progress(f"{number + 1} of {offsets} offsets, {run.counts['put aside']} put aside")
    counts = run.counts
    verdict.require(
        counts["tokens restored from disk"] > 0, "nothing was restored: nothing was tested"
    )
    return verdict.finish(
        dict(sorted(counts.items())),
        f"{counts['starts']} starts on damaged files, {counts['failed starts']} failed,"
        f" {counts['died']} died later, {counts['wrong']} wrong answers in {counts['turns']} turns;"
        f" {counts['put aside']} files put aside",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--offsets", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} offsets")
    parser.add_argument("--folder", type=Path, help="keep the last trial here")
    arguments = parser.parse_args(argv)
    offsets = QUICK if arguments.quick else arguments.offsets
    with tempfile.TemporaryDirectory(prefix="homeport-truncations-") as made, Zygote() as zygote:
        folder = arguments.folder or Path(made)
        return campaign(zygote, folder, offsets=offsets, seed=arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
