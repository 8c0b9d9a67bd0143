"""What one session's arrival costs the streams that run: while it restores from disk, and while it prefills.

One trial, with so many streams:

    streams begin ──> alone: each says some tokens ──> beside: the other session's turn is sent ... its first token
                                                            ──> after a restore alone again: as many tokens ──> cut

Laws
    The gaps of `alone` and of `beside` are of the same streams, seconds apart. A gap belongs to `beside` if any of it
    does, also the last one, whose end is waited for: a restore may be shorter than one gap, and inside it. One belongs to
    `alone` if all of it does.
    Streams slow down as they grow, by some 4 % a second here, whatever comes beside them. So what a restore costs, which is
    not much more, is measured against both sides of it. Behind a prefill its blocks are being written: only what came
    before it was alone.
    What an arrival costs is soon over, and its own time is a few gaps: what streams notice is shown over `_NOTICED_S`, from
    the moment that the turn was sent, whatever its length.
    The restored session's socket stays open: nothing is fetched ahead of the turn that is timed. What counts as cached is
    what it found on disk: a trial that found nothing there measured something else, and the table shows it.
    A stream that ends before its trial does spoils the trial: `EndedEarly`.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from broker.bench.client import Socket, call
from broker.bench.comparison import Sample, Unit, gaps_inside, gaps_touching
from broker.bench.conversation import opening

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from broker.bench.cases import Nonces
    from broker.bench.client import Turn
    from broker.bench.workload import Item

ALONE, BESIDE = "alone", "beside"
_WARM = 4  # tokens that each stream says before anything is counted
_NOTICED_S = 1.0
_SETTLE_S = 120.0
_POLL_S = 0.05
_LABEL = b"thread-id"  # the handshake names the session
_MOST_TOKENS = 4000  # of a stream: it is cut long before
_SHORT = "Go on."
_OVER = ("response.completed", "response.incomplete", "response.failed", "error")


class EndedEarly(Exception):
    """A stream was over before what it should have been measured beside."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What the streams did while `turn` came, and before."""

    alone_s: tuple[float, ...]  # gaps
    beside_s: tuple[float, ...]
    noticed_s: tuple[float, ...]
    turn: Turn

    def samples(self, row: str, number: int, cached_tokens: int) -> list[Sample]:
        tokens = self.turn.prompt_tokens, cached_tokens
        out = []
        sides = (ALONE, self.alone_s, self.alone_s), (BESIDE, self.beside_s, self.noticed_s)
        for side, gaps, noticed in sides:
            for name, value in (
                ("between tokens", statistics.fmean(gaps)),
                (f"between tokens over {_NOTICED_S:g} s", statistics.fmean(noticed)),
                ("half of the gaps below", statistics.median(gaps)),
                ("longest", max(gaps)),
            ):
                out.append(
                    Sample(f"{row}, {name}", side, number, 1e3 * value, Unit.MILLISECONDS, *tokens)
                )
        return out


class Stream:
    """One long answer over a socket of its own, and when each of its deltas came."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self._news = trio.Event()
        self._over = False

    async def run(self, url: str, prompt: str) -> None:
        async with trio.open_nursery() as nursery:
            socket = await Socket.open(nursery, url)
            request = {"input": prompt, "max_output_tokens": _MOST_TOKENS, "temperature": 0}
            await socket.send({"type": "response.create", "store": False, **request})
            while not self._over:
                event = await socket.receive()
                if event["type"] == "response.output_text.delta":
                    self.arrivals.append(time.perf_counter())
                elif event["type"] in _OVER:
                    self._over = True
                self._news.set()
                self._news = trio.Event()
            nursery.cancel_scope.cancel()

    async def until(self, count: int) -> None:
        """Raises EndedEarly."""
        await self._until(lambda: len(self.arrivals) >= count)

    async def past(self, moment: float) -> None:
        """Raises EndedEarly."""
        await self._until(lambda: self.arrivals[-1] > moment)

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            if self._over:
                raise EndedEarly(f"a stream ended after {len(self.arrivals)} tokens")
            await self._news.wait()


async def trial(
    url: str,
    streams: int,
    alone_tokens: int,
    other: Callable[[], Awaitable[Turn]],
    *,
    alone_again: bool,
) -> Trial:
    """Streams, alone for so many tokens of each, then beside `other`, and perhaps alone again. Raises EndedEarly."""
    running = [Stream() for _ in range(streams)]
    async with trio.open_nursery() as nursery:
        for number, stream in enumerate(running):
            prompt = f"Tell me a very long story about {number + 2} travellers, day by day."
            nursery.start_soon(stream.run, url, prompt)
        for stream in running:
            await stream.until(_WARM)
        counts = [len(stream.arrivals) for stream in running]
        quiet = time.perf_counter()
        for stream, count in zip(running, counts, strict=True):
            await stream.until(count + alone_tokens)
        sent = time.perf_counter()
        turn = await other()
        first = sent + turn.ttft_s
        for stream in running:
            await stream.until(len(stream.arrivals) + 1)
            await stream.past(sent + _NOTICED_S)
        over = time.perf_counter()
        counts = [len(stream.arrivals) for stream in running]
        for stream, count in zip(running, counts, strict=True):
            await stream.until(count + alone_again * alone_tokens)
        nursery.cancel_scope.cancel()
    said = [stream.arrivals for stream in running]
    alone = (
        gaps_inside(arrivals, quiet, sent) + gaps_inside(arrivals, over, math.inf)
        for arrivals in said
    )
    beside = (gaps_touching(arrivals, sent, first) for arrivals in said)
    noticed = (gaps_touching(arrivals, sent, sent + _NOTICED_S) for arrivals in said)
    chained = itertools.chain.from_iterable
    return Trial(tuple(chained(alone)), tuple(chained(beside)), tuple(chained(noticed)), turn)


@dataclass(slots=True)
class Returning:
    """A session of some depth that is moved to disk and comes back, again and again."""

    url: str
    socket: Socket
    name: str
    last: Turn

    @classmethod
    async def open(cls, nursery: trio.Nursery, url: str, nonce: int, depth: int) -> Returning:
        name = f"returning-{nonce}"
        socket = await Socket.open(nursery, url, headers={_LABEL: name.encode()})
        return cls(url, socket, name, await socket.turn(request(nonce, depth)))

    async def leave(self) -> None:
        """Down to the disk, and written. Raises trio.TooSlowError."""
        order = {"tier": "disk", "session": self.name}
        await trio.to_thread.run_sync(call, "POST", self.url, "/admin/demote", order)
        with trio.fail_after(_SETTLE_S):
            while await self._above_disk():  # noqa: ASYNC110 -- another process has no event
                await trio.sleep(_POLL_S)

    async def back(self) -> Turn:
        self.last = await self.socket.turn(
            {
                "previous_response_id": self.last.id,
                "input": _SHORT,
                "max_output_tokens": 2,
                "temperature": 0,
            }
        )
        return self.last

    async def _above_disk(self) -> int:
        report = await trio.to_thread.run_sync(call, "GET", self.url, "/admin/sessions")
        mine = [one["tokens_on"] for one in report["sessions"] if one["session"] == self.name]
        return sum(on.get("device", 0) + on.get("host", 0) for on in mine)


def request(nonce: int, depth: int) -> Item:
    """A first turn of which nothing is cached, over the Responses API. The depth is in its input: instructions would
    not be gone on from."""
    said = opening(nonce, depth).messages
    return {
        "input": [{"type": "message", **message} for message in said],
        "max_output_tokens": 2,
        "temperature": 0,
    }


@dataclass(frozen=True, slots=True)
class Interference:
    """The trials of one daemon."""

    url: str
    streams: int
    alone_tokens: int
    depth: int
    nonces: Nonces

    async def restores(self, rounds: int, tick: Callable[[str], None]) -> list[Sample]:
        samples: list[Sample] = []
        async with trio.open_nursery() as nursery:
            nonce = self.nonces.of("restores")
            session = await Returning.open(nursery, self.url, nonce, self.depth)
            for number in range(rounds):
                await session.leave()
                done = await trial(
                    self.url, self.streams, self.alone_tokens, session.back, alone_again=True
                )
                samples += done.samples("a restore", number, done.turn.by_tier["disk"])
                tick("a restore")
            nursery.cancel_scope.cancel()
        return samples

    async def prefills(self, row: str, rounds: int, tick: Callable[[str], None]) -> list[Sample]:
        """Also the prefill's own time to its first token, without the streams and beside them."""
        samples: list[Sample] = []
        async with trio.open_nursery() as nursery:
            socket = await Socket.open(nursery, self.url)
            for number in range(rounds):
                calm = await socket.turn(self._fresh(row, number, ALONE))
                other = partial(socket.turn, self._fresh(row, number, BESIDE))
                done = await trial(
                    self.url, self.streams, self.alone_tokens, other, alone_again=False
                )
                samples += done.samples(row, number, done.turn.cached_tokens)
                samples += [
                    Sample(f"{row}, its own first token", side, number, turn.ttft_s)
                    for side, turn in ((ALONE, calm), (BESIDE, done.turn))
                ]
                tick(row)
            nursery.cancel_scope.cancel()
        return samples

    def _fresh(self, row: str, number: int, side: str) -> Item:
        return request(self.nonces.of(row, number, side), self.depth)
