"""A disk that is full or fails, while turns go on: no crash, no failed turn, and spilling resumes when it can.

    python -m tests.campaign.full_disk [--cycles 10] [--calls all] [--seed 1] [--quick]

full    a file system of 32 MB (a tmpfs; without the right to mount one, a store that fails instead, and the figures say
        so) is filled by somebody else and freed again, under turns; every third time the daemon is killed and started
        while it is full
calls   the n-th call of the store fails, with ENOSPC and with EIO, for every n until a run makes fewer calls; and from
        the n-th on all of them. Ids that cannot be looked up are refused as unknown, and the client says all again
"""

from __future__ import annotations

import argparse
import errno
import http.client
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.bench.client import Refused, call
from broker.bench.daemon import DidNotStart
from tests.campaign import stub
from tests.campaign.dialogue import Ear, Turn, Wrong, body, following, http_turn, opening
from tests.campaign.failing import INJECTED
from tests.campaign.verdict import Verdict
from tests.campaign.zygote import StubDaemon, Zygote

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE_SYSTEM_BYTES = 32 << 20
RESUME_S = 30.0
FULL_S = 1.0  # how long it stays full under turns
QUICK_CYCLES, QUICK_CALLS = 2, 6
FOR_EVER = 10**9
SESSIONS = 6
FAULTS = (OSError, http.client.HTTPException, Refused, Wrong)


class Client:
    """Sessions one after the other. A turn that fails in any way is a violation, and its session begins anew."""

    def __init__(self, verdict: Verdict, seed: int) -> None:
        self.verdict = verdict
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.latest: dict[
            int, tuple[Turn, str | None]
        ] = {}  # {session: its last turn and response id}

    def turn(self, daemon: StubDaemon) -> None:
        number = self.random.randrange(SESSIONS)
        turn, previous = self.latest.get(number, (None, None))
        words = "".join(self.random.choices("etaoin shrdlu", k=40))
        if turn is None or turn.tokens > 420:
            turn, previous = opening("You are patient. " * 4, f"{words} {number}"), None
        else:
            turn = following(turn, words)
        ear = Ear(turn)
        self.counts["turns"] += 1
        try:
            try:
                http_turn(daemon.url, body(turn, previous=previous), ear.feed)
            except Wrong as error:
                if "previous_response_not_found" not in str(error):
                    raise
                self.counts["said all again"] += 1
                http_turn(daemon.url, body(turn, previous=None), ear.feed)
        except FAULTS as error:
            self.counts["failed turns"] += 1
            self.latest.pop(number, None)
            self.verdict.violation(f"a turn failed: {error!r}; the log ends:\n{daemon.tail(8)}")
            return
        for tier, tokens in ear.by_tier.items():
            self.counts[f"tokens from {tier}"] += tokens
        self.latest[number] = turn, ear.response_id


# -- a full file system ----------------------------------------------------------------------------------------------


class Full:
    def __init__(self, zygote: Zygote, mounted: Path, verdict: Verdict, seed: int) -> None:
        self.client = Client(verdict, seed)
        self.verdict = verdict
        self.filler = mounted / "somebody else's"
        # Of the 32 MB, the daemon may take 20; it moves something to disk with every turn.
        disk = (20 << 20) // stub.DISK_BYTES
        self.daemon = StubDaemon(zygote, mounted / "state", stub.settings(disk=disk))
        self.waits_s: list[float] = []  # from space returning to the first spill

    def run(self, cycles: int) -> None:
        self.daemon.start()
        try:
            for cycle in range(cycles):
                self.cycle(cycle)
                self.verdict.progress(f"{cycle + 1} of {cycles} times full")
            self.verdict.require(self.daemon.terminate() == 0, "SIGTERM did not end it well")
        finally:
            self.daemon.end()

    def cycle(self, number: int) -> None:
        for _ in range(10):
            self.client.turn(self.daemon)
        self.fill()
        until = time.monotonic() + FULL_S
        before = self.report()
        while time.monotonic() < until:
            self.client.turn(self.daemon)
            self.fill()  # what it freed is taken at once
        after = self.report()
        refused = after["spill_failures_total"] - before["spill_failures_total"]
        self.client.counts["spills refused while full"] += refused
        if number % 3 == 1:
            self.verdict.require(self.daemon.kill() == -9, "ended by itself while full")
            self.daemon.start()
            self.client.counts["starts while full"] += 1
            for _ in range(5):
                self.client.turn(self.daemon)
        self.filler.unlink()
        self.resume()

    def fill(self) -> None:
        with self.filler.open("ab", buffering=0) as file:
            try:
                for _ in itertools.repeat(None, 1 << 20):
                    file.write(bytes(1 << 16))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def resume(self) -> None:
        freed = time.monotonic()
        spilled = self.report()["spills_total"]
        while time.monotonic() - freed < RESUME_S:
            self.client.turn(self.daemon)
            if self.report()["spills_total"] > spilled:
                self.waits_s.append(time.monotonic() - freed)
                return
        self.verdict.violation(f"no spill within {RESUME_S} s of space returning")

    def report(self) -> Any:
        return call("GET", self.daemon.url, "/admin/tiers")


@contextmanager
def small_file_system(folder: Path) -> Iterator[Path | None]:
    """A tmpfs of 32 MB, mounted here; None where we may not."""
    at = folder / "small"
    at.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={FILE_SYSTEM_BYTES}", "tmpfs", str(at)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        yield None
        return
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


# -- the n-th call ---------------------------------------------------------------------------------------------------


class Calls:
    def __init__(self, zygote: Zygote, folder: Path, verdict: Verdict, seed: int) -> None:
        self.zygote = zygote
        self.folder = folder
        self.verdict = verdict
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.client = Client(verdict, seed)
        settings = stub.settings(disk=400)
        daemon = StubDaemon(zygote, folder / "filled", settings)
        with daemon:
            for _ in range(15):
                self.client.turn(daemon)
            call("POST", daemon.url, "/admin/demote", {"tier": "disk", "session": None})
        self.latest = dict(self.client.latest)
        self.settings = settings

    def every(self, error: str, most: int | None) -> None:
        """Fail call 1, 2, … until none is that many; or `most` of them, spread over the range that is expected."""
        for number in itertools.count(1) if most is None else range(1, 10 * most, 10):
            if not self.trial(number, 1, error):
                break
            self.verdict.progress(f"{error} at call {number}")

    def trial(self, number: int, count: int, error: str) -> bool:
        """Whether a call was failed."""
        copy = self.folder / "trial"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder / "filled", copy)
        options = ("--fail-call", str(number), "--fail-calls", str(count), "--error", error)
        daemon = StubDaemon(self.zygote, copy, self.settings, options=options)
        about = f"{error} at call {number}"
        client = Client(self.verdict, self.seed)
        client.latest = dict(self.latest)
        try:
            daemon.start()
            for step in range(10):
                client.turn(daemon)
                if step % 4 == 3:
                    call("POST", daemon.url, "/admin/demote", {"tier": "disk", "session": None})
            status = daemon.terminate()
            self.verdict.require(status == 0, f"{about}: ended with {status}:\n{daemon.tail(8)}")
        except DidNotStart as failed:
            self.counts["failed starts"] += 1
            self.verdict.violation(f"{about}: {failed}")
        except (OSError, Refused) as failed:
            self.verdict.violation(f"{about}: {failed!r}:\n{daemon.tail(8)}")
        finally:
            daemon.end()
        log = daemon.log.read_text()
        daemon.log.unlink()
        self.verdict.require("Traceback" not in log, f"{about}: a traceback:\n{log[-1500:]}")
        self.counts["runs"] += 1
        self.counts["failed calls"] += log.count(INJECTED)
        self.client.counts += client.counts
        return INJECTED in log


def campaign(zygote: Zygote, folder: Path, *, cycles: int, calls: int | None, seed: int) -> int:
    """The exit status. `calls`: how many of the store's calls are failed; None: every one."""
    verdict = Verdict("full_disk", seed)
    figures: dict[str, Any] = {}
    with small_file_system(folder) as mounted:
        if mounted is None:
            figures["file system"] = "none: no right to mount one; the store failed instead"
        else:
            full = Full(zygote, mounted, verdict, seed)
            full.run(cycles)
            figures["full"] = {
                **full.client.counts,
                "times": cycles,
                "resumed after s": [round(wait, 2) for wait in full.waits_s],
            }
            refused = full.client.counts["spills refused while full"]
            verdict.require(refused > 0, "nothing was ever refused: it was never full")
    failing = Calls(zygote, folder, verdict, seed)
    for error in ("ENOSPC", "EIO"):
        failing.every(error, calls)
        for number in (1, 5, 20) if calls is None else (3,):
            failing.trial(number, FOR_EVER, error)
    figures["calls"] = {**failing.counts, **failing.client.counts}
    turns = figures["calls"]["turns"] + figures.get("full", {}).get("turns", 0)
    waits = figures.get("full", {}).get("resumed after s", [])
    return verdict.finish(
        figures,
        f"{turns} turns on a full or failing disk ({failing.counts['failed calls']} calls failed,"
        f" {len(waits)} times full), {len(verdict.violations)} failures;"
        f" spilling resumed at the latest {max(waits, default=0.0)} s after space returned",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--calls", type=int, help="so many of the store's calls; every one without")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args(argv)
    cycles, calls = arguments.cycles, arguments.calls
    if arguments.quick:
        cycles, calls = QUICK_CYCLES, QUICK_CALLS
    with tempfile.TemporaryDirectory(prefix="homeport-full-disk-") as folder, Zygote() as zygote:
        return campaign(zygote, Path(folder), cycles=cycles, calls=calls, seed=arguments.seed)


if __name__ == "__main__":
    if os.geteuid() != 0 and "--in-namespace" not in sys.argv:
        # A user and mount namespace of our own, where one may mount; without one, go on as we are.
        again = ["unshare", "-rm", sys.executable, "-m", "tests.campaign.full_disk"]
        if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0:
            sys.exit(subprocess.run([*again, *sys.argv[1:], "--in-namespace"]).returncode)
    sys.exit(main([one for one in sys.argv[1:] if one != "--in-namespace"]))
