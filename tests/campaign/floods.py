"""Attackers of every kind at once, and one good client beside them.

    python -m tests.campaign.floods [--seconds 60] [--quick]

From addresses of their own (127.0.0.2 and on), with a key of their own: half-open connections that never end their head, WebSockets that send empty
fragments, pings, single characters and messages that are too large, and clients that ask for answers and read none.
Passes if: a good client's turn on a new connection takes under a second at the 99th percentile; the daemon closes every flood
by itself; its memory grows by less than 200 MB; when the attackers have gone nothing is held and nothing runs. The
quick form leaves out the times.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import trio

from tests.campaign import stub
from tests.campaign.fuzz import close_code, frame
from tests.campaign.idle import HANDSHAKE, gone
from tests.campaign.verdict import Verdict
from tests.campaign.visitors import PATHS, ask, body_of, faults, holdings, metrics, percentile
from tests.campaign.zygote import StubDaemon, Zygote

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

QUICK_S = 2.0
SETTINGS = stub.settings(
    device=400,
    auth__keys='["flood", "good"]',
    auth__operators='["operator"]',
    websocket__max_message="1MiB",
    websocket__send_timeout="3s",
    http__send_timeout="3s",
    http__head_timeout="2s",
)
GOOD, OPERATOR = ({"authorization": f"Bearer {key}"} for key in ("good", "operator"))
UPGRADE = HANDSHAKE.replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer flood\r\n\r\n")
CROWDS = {
    "half_open": 300,
    "fragments": 7,
    "pings": 7,
    "characters": 7,
    "oversize": 3,
    "unread": 60,
}
QUICK_CROWDS = {
    "half_open": 60,
    "fragments": 2,
    "pings": 2,
    "characters": 2,
    "oversize": 1,
    "unread": 10,
}


class Flood:
    def __init__(self, url: str, verdict: Verdict, seed: int) -> None:
        parts = urlsplit(url)
        self.url = url
        self.address = (parts.hostname or "", parts.port or 80)
        self.verdict = verdict
        self.chance = random.Random(seed)
        self.closes: Counter[str] = Counter()
        self.times_s: list[float] = []

    async def run(self, seconds: float, crowds: dict[str, int]) -> None:
        kinds: list[Callable[[trio.SocketStream], Awaitable[None]]] = [
            self.half_open,
            self.fragments,
            self.pings,
            self.characters,
            self.oversize,
            self.unread,
        ]
        async with trio.open_nursery() as nursery:
            for number, kind in enumerate(kinds):
                for _ in range(crowds[kind.__name__]):
                    nursery.start_soon(self.again, kind, f"127.0.0.{number + 2}")
            due = trio.current_time() + seconds
            await trio.sleep(min(1.0, seconds / 4))
            while trio.current_time() < due:
                body = body_of("responses", "A good one.", 4, store=False)
                answer = await ask(self.url, "POST", PATHS["responses"], body, headers=GOOD)
                if answer.status == 200:
                    self.times_s.append(answer.taken_s)
                else:
                    self.verdict.violation(f"a good client was answered {answer.status}")
                self.verdict.progress(f"{len(self.times_s)} good turns, {dict(self.closes)}")
                await trio.sleep(0.05)
            nursery.cancel_scope.cancel()

    async def again(
        self, kind: Callable[[trio.SocketStream], Awaitable[None]], source: str
    ) -> None:
        """As soon as one is closed the next one comes."""
        while True:
            with trio.socket.socket(socket.AF_INET) as one:
                await one.bind((source, 0))
                try:
                    await one.connect(self.address)
                    await kind(trio.SocketStream(one))
                except trio.BrokenResourceError:
                    self.closes[f"{kind.__name__} cut"] += 1
                except OSError:
                    self.closes[f"{kind.__name__} not let in"] += 1
            await trio.sleep(0.01)

    async def half_open(self, stream: trio.SocketStream) -> None:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nA: ")
        while await stream.receive_some(4096):
            pass
        self.closes["half_open ended"] += 1

    async def fragments(self, stream: trio.SocketStream) -> None:
        await self._upgraded(stream)
        await self._flood(
            stream, frame(0x01, b"", 0, self.chance), frame(0x00, b"", 0, self.chance) * 500
        )

    async def pings(self, stream: trio.SocketStream) -> None:
        await self._upgraded(stream)
        await self._flood(stream, b"", frame(0x89, b"x", 1, self.chance) * 500)

    async def characters(self, stream: trio.SocketStream) -> None:
        await self._upgraded(stream)
        await self._flood(stream, b"", frame(0x81, b"x", 1, self.chance) * 500)

    async def oversize(self, stream: trio.SocketStream) -> None:
        await self._upgraded(stream)
        head = frame(0x81, b"", 1 << 30, self.chance)
        await self._flood(stream, head, b"x" * 65536)

    async def unread(self, stream: trio.SocketStream) -> None:
        """Asks again and again, and reads nothing."""
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await stream.send_all(UPGRADE)
        while True:
            body = {"type": "response.create", **body_of("responses", "Speak.", 16, store=False)}
            text = json.dumps(body).encode()
            await stream.send_all(frame(0x81, text, len(text), self.chance))
            await trio.sleep(0.05)

    async def _upgraded(self, stream: trio.SocketStream) -> None:
        await stream.send_all(UPGRADE)
        answer = b""
        while b"\r\n\r\n" not in answer:
            if not (more := bytes(await stream.receive_some(4096))):
                raise trio.BrokenResourceError
            answer += more

    async def _flood(self, stream: trio.SocketStream, first: bytes, then: bytes) -> None:
        """Send until the daemon has said that it is enough."""
        said = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(self._pour, stream, first, then))
            while data := await stream.receive_some(65536):
                said = said[-256:] + data
                if (code := close_code(bytes(data))) is not None:
                    self.closes[f"closed {code}"] += 1
                    break
            nursery.cancel_scope.cancel()

    async def _pour(self, stream: trio.SocketStream, first: bytes, then: bytes) -> None:
        await stream.send_all(first)
        while True:
            await stream.send_all(then)


async def quiet(url: str, verdict: Verdict) -> None:
    """Nothing is held and nothing runs."""
    names = ("running", "waiting", "refs", "turns_admitted", "turns_queued")
    verdict.require(await gone(url, OPERATOR) == 0, "WebSockets are still held")
    seen: dict[str, float] = {}
    for _ in range(100):
        seen = await metrics(url, OPERATOR)
        if not any(seen[f"homeport_{name}"] for name in names):
            return
        await trio.sleep(0.1)
    verdict.violation(str({name: seen[f"homeport_{name}"] for name in names}))


def campaign(zygote: Zygote, folder: Path, *, seconds: float, seed: int, timed: bool) -> int:
    """The exit status."""
    verdict = Verdict("floods", seed)
    crowds = CROWDS if timed else QUICK_CROWDS
    with StubDaemon(zygote, folder / "state", SETTINGS) as daemon:
        flood = Flood(daemon.url, verdict, seed)
        before = holdings(daemon.pid)
        trio.run(flood.run, seconds, crowds)
        under = holdings(daemon.pid)
        trio.run(quiet, daemon.url, verdict)
        time.sleep(0.5)
        after = holdings(daemon.pid)
        verdict.require(daemon.terminate() == 0, "it did not end well")
        for line in faults(daemon.log.read_text(errors="replace"))[:20]:
            verdict.violation(line)
    grown_mb = (max(under.rss, after.rss) - before.rss) / 1e6
    verdict.require(grown_mb < 200, f"memory grew by {grown_mb:.0f} MB")
    verdict.require(
        after.fds <= before.fds + 20, f"{after.fds} descriptors of {before.fds} are left"
    )
    verdict.require(bool(flood.times_s), "no good client was served")
    p99 = percentile(flood.times_s, 0.99)
    if timed:
        verdict.require(p99 < 1.0, f"good turns took {p99:.2f} s at p99")
    figures = {
        "attackers": sum(crowds.values()),
        "good turns": len(flood.times_s),
        "good turn s p50": round(percentile(flood.times_s, 0.5), 3),
        "good turn s p99": round(p99, 3),
        "memory grew MB": round(grown_mb, 1),
        "fds before, under, after": [before.fds, under.fds, after.fds],
        "closes": dict(flood.closes),
    }
    return verdict.finish(
        figures,
        f"{sum(crowds.values())} attackers of six kinds for {seconds:g} s: {len(flood.times_s)} good turns,"
        f" {p99:.2f} s at p99; memory {grown_mb:+.0f} MB, nothing left behind",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_S:g} s, without times")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="homeport-floods-") as folder, Zygote() as zygote:
        return campaign(
            zygote,
            Path(folder),
            seconds=QUICK_S if arguments.quick else arguments.seconds,
            seed=arguments.seed,
            timed=not arguments.quick,
        )


if __name__ == "__main__":
    sys.exit(main())
