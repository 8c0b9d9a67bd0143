"""SIGKILL at random moments under spill, restore and evict load: nothing acknowledged is lost, nothing is ever wrong.

    python -m tests.campaign.kills [--kills 1000] [--seed 1] [--quick]

Each round starts a stub daemon on the same state directory (one in ten is killed while it starts), settles what the
last kill left open, retrieves and continues a sample of what was acknowledged, and then lets sessions talk until a
kill 20 to 250 ms later. Tiers are so small that every turn evicts.

What the test's process knows of a stored response
    ACKED       its terminal event arrived: it must be there after every restart, and continue as the oracle says
    PENDING     it has begun: after the kill it may be there, whole, or not at all; looked up, it is ACKED or forgotten
    GONE        its deletion was answered: it must not be there; a deletion cut short is PENDING again
    A response of which not even an id arrived was NOT STARTED, and there is no name to ask for.
"""

from __future__ import annotations

import argparse
import enum
import http.client
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import trio
from trio_websocket import HandshakeError

from broker.bench.client import Refused, Socket, call
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

QUICK = 12
SESSIONS = 8
START_S = 10.0  # a start that takes longer has failed
KILLED_WHILE_STARTING = 0.1
ASKED_BEFORE = 4  # one kill in so many comes right after a report, which says what the load did
WINDOW = 1500  # ACKED responses remembered: far below the store's budget of manifests, which may forget the oldest
LONGEST = 420  # tokens: a session that is longer begins anew; the device holds 624
# What a client of a killed daemon sees.
CUT = (
    OSError,
    http.client.HTTPException,
    HandshakeError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
)
HANDSHAKE_S = 3.0


class State(enum.Enum):
    ACKED = "acked"
    PENDING = "pending"
    GONE = "gone"


@dataclass(slots=True)
class Ledger:
    """Everything that stored responses were promised. Ids are never used twice."""

    turns: dict[str, Turn] = field(default_factory=dict)  # {response id}: oldest first
    state: dict[str, State] = field(default_factory=dict)

    def of(self, state: State) -> list[str]:
        return [response for response, its in self.state.items() if its is state]

    def put(self, response: str, turn: Turn, state: State) -> None:
        self.turns[response] = turn
        self.state[response] = state

    def forget(self, response: str) -> None:
        del self.turns[response], self.state[response]

    def trim(self) -> None:
        for response in [*self.turns][: max(0, len(self.turns) - WINDOW)]:
            self.forget(response)


@dataclass(slots=True)
class Session:
    """One client's conversation. `previous` is the response to continue, None after it was lost with its connection."""

    instructions: str
    turn: Turn | None = None
    previous: str | None = None
    stored: bool = True


class Kills:
    def __init__(self, daemon: StubDaemon, verdict: Verdict, seed: int) -> None:
        self.daemon = daemon
        self.verdict = verdict
        self.random = random.Random(seed)
        self.ledger = Ledger()
        # Two of three share a long head, as agents of one kind do.
        heads = ["You are an agent that keeps its word. " * 3, "Be brief. " * 2]
        self.sessions = [Session(heads[n % 3 % 2]) for n in range(SESSIONS)]
        self.in_use: Counter[str | None] = (
            Counter()
        )  # {response id: turns under way that continue it}
        self.counts: Counter[str] = Counter()
        self.restored: Counter[str] = (
            Counter()
        )  # {tier: tokens found there by the first turns after a restart}
        self.pressure: Counter[str] = Counter()  # what the load did, summed over the reports
        self.starts_s: list[float] = []

    async def run(self, kills: int) -> None:
        while self.counts["kills"] < kills and len(self.verdict.violations) < 20:
            await self.round()
            self.verdict.progress(
                f"{self.counts['kills']} of {kills} kills, {self.counts['acked']} acknowledged,"
                f" {self.counts['cut']} cut, {self.restored['disk']} tokens restored from disk"
            )
        await self.start()
        try:
            await self.settle()
            for response in self.ledger.of(State.ACKED):
                await self.retrieve(response)
        except (Wrong, Refused, *CUT) as error:
            self.verdict.violation(f"at the end: {error!r}")
        self.counts["retrieved at the end"] = len(self.ledger.of(State.ACKED))
        status = self.daemon.terminate()
        self.verdict.require(status == 0, f"the last daemon ended with {status}")

    async def round(self) -> None:
        if self.random.random() < KILLED_WHILE_STARTING:
            self.daemon.spawn()
            await trio.sleep(self.random.uniform(0.0, 0.06))
            self.kill()
            self.counts["killed while starting"] += 1
            return
        await self.start()
        try:
            await self.settle()
            await self.sample()
        except (Wrong, Refused, *CUT) as error:
            self.verdict.violation(f"after a restart: {error!r}")
        async with trio.open_nursery() as sockets:
            with trio.move_on_after(15.0) as late:
                async with trio.open_nursery() as clients:
                    for session in self.sessions:
                        clients.start_soon(self.talk, session, sockets)
                    await trio.sleep(self.random.uniform(0.020, 0.250))
                    if self.counts["kills"] % ASKED_BEFORE == 0:
                        await self.count_pressure()
                    self.kill()
            if late.cancelled_caught:
                self.verdict.violation("a client still waits 15 s after the daemon was killed")
            sockets.cancel_scope.cancel()
        self.ledger.trim()

    # -- the daemon --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        try:
            self.starts_s.append(await trio.to_thread.run_sync(self.daemon.start, START_S))
        except DidNotStart as error:
            self.counts["failed starts"] += 1
            self.verdict.violation(f"failed start: {error}")
            raise

    def kill(self) -> None:
        status = self.daemon.kill()
        self.verdict.require(
            status == -9, f"ended by itself with {status}; its log ends:\n{self.daemon.tail()}"
        )
        self.counts["kills"] += 1

    async def count_pressure(self) -> None:
        report = await trio.to_thread.run_sync(call, "GET", self.daemon.url, "/admin/tiers")
        self.counts["reports"] += 1
        self.pressure["spills"] += report["spills_total"]
        self.pressure["fetches"] += report["fetches_total"]
        for tier, blocks in report["evictions_total"].items():
            self.pressure[f"evicted from {tier}"] += blocks

    async def settle(self) -> None:
        """What the kill left open is now either there, whole, or not."""
        for response in self.ledger.of(State.PENDING):
            there = await self.look_up(response)
            self.counts["pending: there" if there else "pending: not there"] += 1
            if there:
                self.ledger.state[response] = State.ACKED
            else:
                self.ledger.forget(response)

    async def sample(self) -> None:
        """Some of what was acknowledged, and one that was deleted."""
        acked, gone = self.ledger.of(State.ACKED), self.ledger.of(State.GONE)
        for response in self.random.sample(acked, min(3, len(acked))):
            await self.retrieve(response)
        if gone and await self.look_up(self.random.choice(gone)):
            self.verdict.violation("a deleted response is there again")
        short = [
            one for one in self.ledger.of(State.ACKED) if self.ledger.turns[one].tokens < LONGEST
        ]
        chosen = short[-2:] + self.random.sample(short, min(2, len(short)))
        for response in dict.fromkeys(chosen):
            turn = following(self.ledger.turns[response], self.words())
            ear = Ear(turn)
            request = body(turn, previous=response)
            await trio.to_thread.run_sync(http_turn, self.daemon.url, request, ear.feed)
            self.acknowledge(ear)
            self.counts["continued after a restart"] += 1
            self.restored.update(ear.by_tier)
        report = await trio.to_thread.run_sync(call, "GET", self.daemon.url, "/admin/tiers")
        bad = sum(report["verify_failures_total"].values())
        self.verdict.require(not bad, f"records refused: {report['verify_failures_total']}")
        self.counts["refused records"] += bad

    async def retrieve(self, response: str) -> None:
        self.counts["retrieved"] += 1
        if not await self.look_up(response):
            self.counts["lost"] += 1
            self.ledger.forget(response)
            self.verdict.violation(f"{response} was acknowledged and is not there")

    async def look_up(self, response: str) -> bool:
        path = f"/v1/responses/{response}"
        try:
            found = await trio.to_thread.run_sync(call, "GET", self.daemon.url, path)
        except Refused as refused:
            if refused.status != http.client.NOT_FOUND:
                raise
            return False
        check_whole(found, self.ledger.turns[response])
        return True

    # -- the load ----------------------------------------------------------------------------------------------------

    async def talk(self, session: Session, sockets: trio.Nursery) -> None:
        """Turns until the connection dies."""
        socket: Socket | None = None
        if not session.stored:
            session.previous = None  # it died with its connection
        try:
            while True:
                if socket is None and self.random.random() < 0.7:
                    # The library waits for ever for a handshake whose peer died: not the daemon's fault.
                    with trio.fail_after(HANDSHAKE_S):
                        socket = await Socket.open(sockets, self.daemon.url)
                await self.step(session, socket)
        except CUT:
            self.counts["cut"] += 1
        except (Wrong, Refused) as error:
            self.verdict.violation(f"under load: {error!r}")
            session.turn, session.previous = None, None

    async def step(self, session: Session, socket: Socket | None) -> None:
        chance = self.random.random()
        if chance < 0.04:
            await self.demote()
        elif chance < 0.08:
            await self.delete()
        elif chance < 0.16 and (acked := self.ledger.of(State.ACKED)):
            await self.fork(self.random.choice(acked))
        else:
            await self.go_on(session, socket)

    async def fork(self, parent: str) -> None:
        if self.ledger.turns[parent].tokens < LONGEST:
            turn = following(self.ledger.turns[parent], self.words())
            await self.turn(turn, parent, None, store=True)

    async def go_on(self, session: Session, socket: Socket | None) -> None:
        """The session's next turn, in one of the ways in which a client may send it."""
        if session.turn is None or session.turn.tokens > LONGEST:
            turn, previous, store = opening(session.instructions, self.words()), None, True
            over = socket
        else:
            turn, previous = following(session.turn, self.words()), session.previous
            over = socket if self.random.random() < 0.8 or not session.stored else None
            store = over is None or self.random.random() < 0.7
            if over is None and not session.stored:
                previous = None  # such an id lives on its connection only
            if session.stored and self.ledger.state.get(previous or "") is not State.ACKED:
                previous = None  # no longer remembered
            if self.random.random() < 0.15:
                previous = None  # says everything again
        ear = await self.turn(turn, previous, over, store=store)
        session.turn, session.previous, session.stored = turn, ear.response_id, store

    async def turn(
        self, turn: Turn, previous: str | None, socket: Socket | None, *, store: bool
    ) -> Ear:
        ear = Ear(turn)

        def hear(event: dict) -> None:
            begun = ear.response_id is None
            ear.feed(event)
            if begun and store and ear.response_id is not None:
                self.ledger.put(ear.response_id, turn, State.PENDING)

        request = body(turn, previous=previous, store=store)
        self.in_use[previous] += 1
        try:
            if socket is None:
                await trio.to_thread.run_sync(http_turn, self.daemon.url, request, hear)
            else:
                await socket.send({"type": "response.create", **request})
                while not ear.done:
                    hear(await socket.receive())
        finally:
            self.in_use[previous] -= 1
        self.counts["turns"] += 1
        self.counts["websocket turns" if socket else "http turns"] += 1
        if store:
            self.acknowledge(ear)
        else:
            self.counts["unstored turns"] += 1
        return ear

    def acknowledge(self, ear: Ear) -> None:
        assert ear.done
        assert ear.response_id is not None
        self.counts["acked"] += 1
        self.ledger.put(ear.response_id, ear.turn, State.ACKED)

    async def demote(self) -> None:
        tier = self.random.choice(["host", "disk"])
        await trio.to_thread.run_sync(
            call, "POST", self.daemon.url, "/admin/demote", {"tier": tier, "session": None}
        )
        self.counts["demotions"] += 1

    async def delete(self) -> None:
        latest = {session.previous for session in self.sessions}
        acked = self.ledger.of(State.ACKED)
        free = [one for one in acked if one not in latest and not self.in_use[one]]
        if not free:
            return
        response = self.random.choice(free)
        self.ledger.state[response] = State.PENDING
        await trio.to_thread.run_sync(call, "DELETE", self.daemon.url, f"/v1/responses/{response}")
        self.ledger.state[response] = State.GONE
        self.counts["deleted"] += 1

    def words(self) -> str:
        letters = "etaoin shrdlu "
        return "".join(self.random.choices(letters, k=self.random.randint(4, 60))).strip() or "so"


def campaign(zygote: Zygote, folder: Path, *, kills: int, seed: int) -> int:
    """The exit status."""
    verdict = Verdict("kills", seed)
    daemon = StubDaemon(zygote, folder / "state", stub.settings())
    run = Kills(daemon, verdict, seed)
    try:
        trio.run(run.run, kills)
    except* DidNotStart:
        pass  # told already
    finally:
        daemon.end()
    counts, starts = run.counts, sorted(run.starts_s)
    verdict.require("Traceback" not in daemon.log.read_text(), "a traceback in the daemon's log")
    verdict.require(run.restored["disk"] > 0, "nothing was restored from disk: nothing was tested")
    for what in ("spills", "fetches", "evicted from device") if kills >= QUICK else ():
        verdict.require(run.pressure[what] > 0, f"no {what}: nothing was tested")
    verdict.require(counts["pending: not there"] > 0, "no kill ever came between")
    figures = {
        **dict(sorted(counts.items())),
        "restored": dict(run.restored),
        "pressure": dict(run.pressure),
        "start_s": {"median": round(starts[len(starts) // 2], 3), "worst": round(starts[-1], 3)},
    }
    return verdict.finish(
        figures,
        f"{counts['kills']} kills, {counts['failed starts']} failed starts, {counts['lost']} of"
        f" {counts['acked']} acknowledged responses lost, {counts['refused records']} records refused;"
        f" {counts['continued after a restart']} turns continued after a restart had"
        f" {run.restored['disk']} tokens from disk and said what the oracle says",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} kills")
    parser.add_argument("--folder", type=Path, help="keep the state directory and the log here")
    arguments = parser.parse_args(argv)
    kills = QUICK if arguments.quick else arguments.kills
    with tempfile.TemporaryDirectory(prefix="homeport-kills-") as temporary, Zygote() as zygote:
        folder = arguments.folder or Path(temporary)
        return campaign(zygote, folder, kills=kills, seed=arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
