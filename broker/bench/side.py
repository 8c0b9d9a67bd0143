"""One side of a comparison: a server that can be asked, and perhaps stopped and started.

`Homeport` is a daemon of ours; the other is in broker/bench/peer.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import trio

from broker.bench.chat import complete
from broker.bench.client import call
from broker.bench.conversation import COUNTED, body
from broker.bench.machine import peak_bytes

if TYPE_CHECKING:
    from broker.bench.chat import Completion
    from broker.bench.conversation import Conversation
    from broker.bench.daemon import Daemon

_SETTLE_S = 120.0
_POLL_S = 0.05


class Side(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def owned(self) -> bool:
        """Whether it is ours to stop."""

    async def ask(self, conversation: Conversation, output_tokens: int) -> Completion:
        """Raises `Refused` or OSError."""

    async def settle(self) -> None:
        """Wait until it does nothing in the background that would disturb the other side."""

    async def restart(self) -> float:
        """Stop it politely and start it again: the seconds until it is ready. Only if owned."""

    async def peak_bytes(self) -> int | None:
        """The largest resident memory that any of its processes had so far. None if not owned."""

    async def version(self) -> str: ...


class Homeport:
    """Chat Completions of a daemon that runs."""

    owned = True

    def __init__(self, daemon: Daemon, name: str = "homeport") -> None:
        self.name = name
        self.daemon = daemon
        self._peak = 0

    async def ask(self, conversation: Conversation, output_tokens: int) -> Completion:
        request = body(conversation, output_tokens, None, COUNTED)
        return await trio.to_thread.run_sync(
            complete, self.daemon.url, request, abandon_on_cancel=True
        )

    async def settle(self) -> None:
        """Until everything is written. Raises trio.TooSlowError."""
        with trio.fail_after(_SETTLE_S):
            while await self._pending_bytes():  # noqa: ASYNC110 -- another process has no event
                await trio.sleep(_POLL_S)

    async def _pending_bytes(self) -> int:
        report = await trio.to_thread.run_sync(call, "GET", self.daemon.url, "/admin/tiers")
        return int(report["disk"]["pending_bytes"])

    async def restart(self) -> float:
        await self.peak_bytes()
        await trio.to_thread.run_sync(self.daemon.terminate)
        return await trio.to_thread.run_sync(self.daemon.start)

    async def peak_bytes(self) -> int:
        self._peak = max(self._peak, peak_bytes(self.daemon.pid))
        return self._peak

    async def version(self) -> str:
        models = await trio.to_thread.run_sync(call, "GET", self.daemon.url, "/v1/models")
        return f"homeport, {models['data'][0]['id']}"
