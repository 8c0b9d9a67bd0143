"""Ten thousand WebSockets that say nothing, a thousand sessions on disk, and a newcomer.

    python -m tests.campaign.idle [--sockets 10000] [--sessions 1000] [--quick]

Passes if every socket is accepted and stays, answering the daemon's pings; every session is made and moved to disk; the
newcomer's whole turn takes under a second while all of it is there; and when they leave, every connection is given back.
What a connection and a session cost in memory is reported. Needs twice as many file descriptors as sockets.
"""

from __future__ import annotations

import argparse
import resource
import select
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import trio

from tests.campaign import stub
from tests.campaign.verdict import Verdict
from tests.campaign.visitors import PATHS, ask, body_of, faults, holdings, metrics, percentile
from tests.campaign.zygote import StubDaemon, Zygote

if TYPE_CHECKING:
    from collections.abc import Mapping

QUICK = (200, 20)
SERVED_S = 1.0
NEWCOMERS = 20
HANDSHAKE = (
    b"GET /v1/responses HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
)


class Idlers:
    """Sockets that answer pings and do nothing else, on one thread."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._stop = threading.Event()
        self.pings = 0
        self.ended = 0
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def open(self, count: int) -> None:
        """Raises ConnectionError."""
        for _ in range(count):
            one = socket.create_connection(self._address, 30)
            one.sendall(HANDSHAKE)
            answer = b""
            while b"\r\n\r\n" not in answer:
                if not (more := one.recv(4096)):
                    raise ConnectionError(f"not accepted: {answer[:100]!r}")
                answer += more
            if not answer.startswith(b"HTTP/1.1 101 "):
                raise ConnectionError(f"not accepted: {answer[:100]!r}")
            self._sockets[one.fileno()] = one
            self._poll.register(one.fileno(), select.EPOLLIN)

    def _answer(self) -> None:
        while not self._stop.is_set():
            for fd, _ in self._poll.poll(0.2):
                data = self._sockets[fd].recv(4096)
                if not data or data[0] == 0x88:
                    self.ended += 1
                    self._poll.unregister(fd)
                elif data[0] == 0x89:
                    self.pings += 1
                    payload = data[2 : 2 + (data[1] & 0x7F)]
                    self._sockets[fd].sendall(
                        bytes([0x8A, 0x80 | len(payload)]) + b"\0\0\0\0" + payload
                    )

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for one in self._sockets.values():
            one.close()


async def sessions(url: str, count: int, verdict: Verdict) -> None:
    """So many sessions of one turn, then all of them on disk."""
    for number in range(count):
        text = f"session {number} " + "w" * 120
        answer = await ask(
            url, "POST", PATHS["responses"], body_of("responses", text, 4, store=True)
        )
        verdict.require(answer.status == 200, f"a session's turn was {answer.status}")
        verdict.progress(f"{number} sessions")
    await ask(url, "POST", "/admin/demote", {"tier": "disk"})


async def newcomers(url: str, verdict: Verdict) -> list[float]:
    times: list[float] = []
    for number in range(NEWCOMERS):
        body = body_of("responses", f"newcomer {number}", 4, store=False)
        answer = await ask(url, "POST", PATHS["responses"], body)
        verdict.require(answer.status == 200, f"a newcomer's turn was {answer.status}")
        times.append(answer.taken_s)
    return times


async def gone(url: str, headers: Mapping[str, str] | None = None) -> float:
    """WebSockets still held, once that is none or ten seconds have passed."""
    held = 1.0
    for _ in range(100):
        held = (await metrics(url, headers))["homeport_websockets"]
        if not held:
            break
        await trio.sleep(0.1)
    return held


def campaign(
    zygote: Zygote, folder: Path, *, sockets: int, kept: int, seed: int, timed: bool
) -> int:
    """The exit status."""
    verdict = Verdict("idle", seed)
    settings = stub.settings(
        device=400,
        host=0,
        disk=30 * kept + 1000,
        server__max_connections=str(sockets + 100),
        server__max_per_address=str(sockets + 100),
    )
    with StubDaemon(zygote, folder / "state", settings) as daemon:
        trio.run(newcomers, daemon.url, verdict)  # everything that is made once is made
        empty = holdings(daemon.pid)
        trio.run(sessions, daemon.url, kept, verdict)
        with_sessions = holdings(daemon.pid)
        idlers = Idlers(daemon.url)
        began = time.monotonic()
        for at in range(0, sockets, 100):
            idlers.open(min(100, sockets - at))
            verdict.progress(f"{at + 100} sockets")
        opened_s = time.monotonic() - began
        with_sockets = holdings(daemon.pid)
        times_s = trio.run(newcomers, daemon.url, verdict)
        if timed:  # two rounds of pings
            time.sleep(45)
            times_s += trio.run(newcomers, daemon.url, verdict)
            verdict.require(idlers.pings >= sockets, f"only {idlers.pings} pings came")
            verdict.require(max(times_s) < SERVED_S, f"a newcomer waited {max(times_s):.2f} s")
        verdict.require(idlers.ended == 0, f"{idlers.ended} sockets were ended")
        idlers.close()
        left = trio.run(gone, daemon.url)
        verdict.require(left == 0, f"{left:g} connections are still held")
        verdict.require(daemon.terminate() == 0, "it did not end well")
        for line in faults(daemon.log.read_text(errors="replace"))[:20]:
            verdict.violation(line)
    by_socket = (with_sockets.rss - with_sessions.rss) / sockets
    by_session = (with_sessions.rss - empty.rss) / kept
    figures = {
        "sockets": sockets,
        "sessions": kept,
        "bytes a socket": round(by_socket),
        "bytes a session": round(by_session),
        "rss MiB": [round(one.rss / 2**20) for one in (empty, with_sessions, with_sockets)],
        "opened in s": round(opened_s, 1),
        "pings answered": idlers.pings,
        "newcomer s p50": round(percentile(times_s, 0.5), 3),
        "newcomer s max": round(max(times_s), 3),
    }
    return verdict.finish(
        figures,
        f"{sockets} idle WebSockets at {by_socket / 1024:.1f} KiB each, {kept} sessions on disk at"
        f" {by_session / 1024:.1f} KiB each; a newcomer's turn took {max(times_s):.2f} s at most",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sockets", type=int, default=10_000)
    parser.add_argument("--sessions", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK}, without times")
    arguments = parser.parse_args(argv)
    sockets, kept = QUICK if arguments.quick else (arguments.sockets, arguments.sessions)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most < sockets + 200:
        print(f"idle: {sockets} sockets need {sockets + 200} descriptors, and there are {most}")
        return 2
    with tempfile.TemporaryDirectory(prefix="homeport-idle-") as folder, Zygote() as zygote:
        return campaign(
            zygote,
            Path(folder),
            sockets=sockets,
            kept=kept,
            seed=arguments.seed,
            timed=not arguments.quick,
        )


if __name__ == "__main__":
    sys.exit(main())
