"""Attackers of every kind, in waves, and good clients beside them.

    python -m tests.campaign.floods [--seconds 20] [--quick]

From addresses of their own (127.0.0.2 and on), with a key of their own; as soon as one is closed the next one comes. The
good are `good_client.py`, in a process of their own.

    noise        24 WebSockets that send empty fragments, pings, single characters and messages that are too large, beside a
                 good client's stream: its 99th percentile between two tokens is less than 100 ms over what it was before
    silence      5,000 connections that never end their head and 500 that asked for an answer and read none of it, beside good
                 newcomers: 99 of 100 are connected, upgraded and welcome within a second
    everything   of all kinds at once, 60 of them asking as fast as they can, beside a good client's turns on new connections:
                 99 of 100 take under a second

In each, the daemon closes every flood by itself, its memory grows by less than 200 MB, and when the attackers have gone
nothing is held and nothing runs. The quick form is small and leaves out the times.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import trio

from tests.campaign import stub
from tests.campaign.fuzz import close_code, frame
from tests.campaign.good_client import of_its_own, upgrade, upgraded
from tests.campaign.idle import gone
from tests.campaign.verdict import Verdict
from tests.campaign.visitors import body_of, faults, holdings, metrics, percentile
from tests.campaign.zygote import StubDaemon, Zygote

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

QUICK_S = 1.5
SETTINGS = stub.settings(
    device=400,
    auth__keys='["flood", "good"]',
    auth__operators='["operator"]',
    websocket__max_message="1MiB",
    websocket__send_timeout="3s",
    http__send_timeout="3s",
)
OPERATOR = {"authorization": "Bearer operator"}
ATTACKER = "flood"
GAP_S, SERVED_S = 0.1, 1.0


@dataclass(frozen=True, slots=True)
class Wave:
    name: str
    beside: str  # what the good do
    crowd: dict[str, int]
    settings: tuple[str, ...] = ()
    quick: int = 5  # the share of the crowd that comes to the quick form


NOISE = {"fragments": 7, "pings": 7, "characters": 7, "oversize": 3}
WAVES = (
    Wave("noise", "stream", NOISE),
    Wave(
        "silence",
        "newcomers",
        {"half_open": 5000, "unread_once": 500},
        (
            "server.max_connections=6000",
            "server.max_per_address=6000",
            "http.head_timeout=10s",
            "websocket.send_timeout=10s",
        ),
        quick=50,
    ),
    Wave(
        "everything",
        "turns",
        {**NOISE, "half_open": 300, "unread": 60},
        ("http.head_timeout=2s",),
    ),
)


class Flood:
    def __init__(self, url: str, verdict: Verdict, seed: int) -> None:
        parts = urlsplit(url)
        self.url = url
        self.address = (parts.hostname or "", parts.port or 80)
        self.verdict = verdict
        self.chance = random.Random(seed)
        self.closes: Counter[str] = Counter()
        self.times_s: list[float] = []  # of the good
        self.before_s: list[float] = []  # and before anybody attacked

    async def run(self, wave: Wave, seconds: float, divided_by: int) -> None:
        if wave.name == "noise":
            self.before_s = await self.good(wave.beside, seconds / 2)
        async with trio.open_nursery() as nursery:
            for number, (kind, count) in enumerate(wave.crowd.items()):
                attack = getattr(self, kind)
                for _ in range(-(-count // divided_by)):
                    nursery.start_soon(self.again, attack, f"127.0.0.{number + 2}")
            self.times_s = await self.good(wave.beside, seconds)
            self.verdict.progress(f"{len(self.times_s)} good, {dict(self.closes)}")
            nursery.cancel_scope.cancel()

    async def good(self, what: str, seconds: float) -> list[float]:
        seen = await of_its_own(what, self.url, seconds)
        for wrong in seen.wrong:
            self.verdict.violation(wrong)
        return seen.times_s

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
        await upgraded(stream, ATTACKER)
        await self._flood(
            stream, frame(0x01, b"", 0, self.chance), frame(0x00, b"", 0, self.chance) * 500
        )

    async def pings(self, stream: trio.SocketStream) -> None:
        await upgraded(stream, ATTACKER)
        await self._flood(stream, b"", frame(0x89, b"x", 1, self.chance) * 500)

    async def characters(self, stream: trio.SocketStream) -> None:
        await upgraded(stream, ATTACKER)
        await self._flood(stream, b"", frame(0x81, b"x", 1, self.chance) * 500)

    async def oversize(self, stream: trio.SocketStream) -> None:
        await upgraded(stream, ATTACKER)
        head = frame(0x81, b"", 1 << 30, self.chance)
        await self._flood(stream, head, b"x" * 65536)

    async def unread(self, stream: trio.SocketStream) -> None:
        """Asks again and again, and reads nothing."""
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await stream.send_all(upgrade(ATTACKER))
        while True:
            await stream.send_all(self._create(16))
            await trio.sleep(0.05)

    async def unread_once(self, stream: trio.SocketStream) -> None:
        """Asks for much, and reads nothing."""
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await stream.send_all(upgrade(ATTACKER))
        await stream.send_all(self._create(4000))
        await trio.sleep_forever()

    def _create(self, tokens: int) -> bytes:
        body = {"type": "response.create", **body_of("responses", "Speak.", tokens, store=False)}
        text = json.dumps(body).encode()
        return frame(0x81, text, len(text), self.chance)

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
    """The exit status. So many seconds a wave."""
    verdict = Verdict("floods", seed)
    figures: dict[str, Any] = {}
    for wave in WAVES:
        divided_by = 1 if timed else wave.quick
        settings = (*SETTINGS, *wave.settings)
        with StubDaemon(zygote, folder / wave.name, settings) as daemon:
            flood = Flood(daemon.url, verdict, seed)
            before = holdings(daemon.pid)
            trio.run(flood.run, wave, seconds, divided_by)
            under = holdings(daemon.pid)
            trio.run(quiet, daemon.url, verdict)
            time.sleep(0.5)
            after = holdings(daemon.pid)
            verdict.require(daemon.terminate() == 0, f"{wave.name}: it did not end well")
            for line in faults(daemon.log.read_text(errors="replace"))[:20]:
                verdict.violation(line)
        grown_mb = (max(under.rss, after.rss) - before.rss) / 1e6
        verdict.require(grown_mb < 200, f"{wave.name}: memory grew by {grown_mb:.0f} MB")
        verdict.require(
            after.fds <= before.fds + 20,
            f"{wave.name}: {after.fds} descriptors of {before.fds} are left",
        )
        verdict.require(bool(flood.times_s), f"{wave.name}: no good client was served")
        p99, calm = percentile(flood.times_s, 0.99), percentile(flood.before_s, 0.99)
        if timed and wave.name == "noise":
            verdict.require(p99 < calm + GAP_S, f"tokens came {p99:.3f} s apart, before {calm:.3f}")
        elif timed:
            verdict.require(p99 < SERVED_S, f"{wave.name}: good clients waited {p99:.2f} s at p99")
        figures[wave.name] = {
            "attackers": sum(-(-count // divided_by) for count in wave.crowd.values()),
            "good": len(flood.times_s),
            "before, s p99": round(calm, 4),
            "s p50": round(percentile(flood.times_s, 0.5), 4),
            "s p99": round(p99, 4),
            "memory grew MB": round(grown_mb, 1),
            "fds before, under, after": [before.fds, under.fds, after.fds],
            "closes": dict(flood.closes),
        }
    seen = ", ".join(f"{name} {found['s p99']:.3f} s" for name, found in figures.items())
    return verdict.finish(figures, f"good clients at p99: {seen}; nothing left behind")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each wave")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_S:g} s, without times")
    arguments = parser.parse_args(argv)
    needed = 200 + max(sum(wave.crowd.values()) for wave in WAVES)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if not arguments.quick and most < needed:
        print(f"floods: needs {needed} descriptors, and there are {most}")
        return 2
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
