"""A daemon with sessions in every tier, for a page to look at: the real broker, tables and store around a stub model."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from broker.bench.client import call
from tests.campaign import stub
from tests.campaign.zygote import StubDaemon

if TYPE_CHECKING:
    from pathlib import Path

    from tests.campaign.zygote import Zygote

TEXT = "The ship comes in with the tide, and leaves with the next one. "


class Harbour(StubDaemon):
    """A stub daemon on a port of its own that a restart keeps. Its tiers are small, so that things move."""

    def __init__(self, zygote: Zygote, state_dir: Path, *sets: str) -> None:
        settings = stub.settings(
            device=160, host=120, disk=600, tiers__host__after="1h", tiers__disk__after="2h"
        )
        options = ("--port", str(free_port()), "--endless")
        super().__init__(zygote, state_dir, (*settings, "tiers.pins=0.5", *sets), options=options)

    def ask(self, method: str, path: str, body: Any = None, key: str | None = None) -> Any:
        return call(method, self.url, path, body, key)

    def turn(self, session: str, words: int = 1, key: str | None = None, **fields: Any) -> Any:
        body = {
            "input": f"This is {session}. " + TEXT * words,
            "prompt_cache_key": session,
            "max_output_tokens": 8,
            **fields,
        }
        return self.ask("POST", "/v1/responses", body, key)

    def metrics(self, key: str | None = None) -> dict[str, float]:
        """{series: value}"""
        lines = self.ask("GET", "/metrics", key=key).splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def demote(self, session: str, tier: str) -> None:
        self.ask("POST", "/admin/demote", {"tier": tier, "session": session})

    def fill(self) -> None:
        """Ten sessions of different lengths in all tiers, with turns that found all, some and nothing."""
        last = {number: self.turn(f"agent-{number}", 1 + number % 4) for number in range(10)}
        for number in (3, 5, 8):
            last[number] = self.turn(f"agent-{number}", previous_response_id=last[number]["id"])
        for tier in (None, "host", "disk"):
            if tier is not None:
                self.demote("agent-2", tier)
            last[2] = self.turn("agent-2", previous_response_id=last[2]["id"])
        self.turn("agent-2", 3, instructions="Be brief.")
        for number, tier in ((0, "disk"), (1, "disk"), (4, "disk"), (6, "host"), (7, "host")):
            self.demote(f"agent-{number}", tier)
        for number in (1, 7):
            last[number] = self.turn(f"agent-{number}", previous_response_id=last[number]["id"])
        self.ask("POST", "/admin/pins", {"session": "agent-5", "ttl": "1h"})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
