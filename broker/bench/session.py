"""The agent's side of a session: what it has said and heard, and the four ways to send what comes next."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import trio

from broker.bench.client import Socket, Turn, call, http_turn

if TYPE_CHECKING:
    from broker.bench.workload import Item, Workload

SETTLE_TIMEOUT_S = 120.0  # for the demotion of everything to land on a slow disk


class Way(enum.Enum):
    """How the next turn reaches the daemon."""

    SOCKET_ID = "WebSocket, previous_response_id"
    SOCKET_REPLAY = "WebSocket, full replay"
    HTTP_ID = "HTTP, previous_response_id"
    HTTP_REPLAY = "HTTP, full replay"


@dataclass(frozen=True, slots=True)
class History:
    """A session as its client knows it: all items so far, and the last answer."""

    items: tuple[Item, ...] = ()
    last: Turn | None = None

    def then(self, news: tuple[Item, ...], turn: Turn) -> History:
        return History(self.items + news + turn.output, turn)

    @property
    def known_tokens(self) -> int:
        """How long a prefix of the next prompt the daemon has seen. Its last token was sampled but never fed, so at
        best one less is cached."""
        return 0 if self.last is None else self.last.prompt_tokens + self.last.output_tokens


class Agent:
    """One agent against one daemon. Keeps its socket open between turns; opens another when that was cut."""

    def __init__(
        self, nursery: trio.Nursery, url: str, workload: Workload, key: str | None = None
    ) -> None:
        self.url = url  # set it anew after a restart
        self._nursery = nursery  # hosts the socket's background task
        self._workload = workload
        self._key = key
        self._socket: Socket | None = None

    def news(self, history: History, label: str) -> tuple[Item, ...]:
        """What the agent says after `history`: its task, or the tool result that `label` names."""
        if history.last is None:
            return self._workload.task()
        return self._workload.follow(history.last.output, label)

    async def next(self, history: History, label: str, way: Way = Way.SOCKET_ID) -> History:
        """Run the turn after `history`. Raises `Refused`."""
        news = self.news(history, label)
        if way in (Way.SOCKET_ID, Way.HTTP_ID) and history.last is not None:
            body = self._workload.body(news, history.last.id)
        else:
            body = self._workload.body(history.items + news)
        if way in (Way.HTTP_ID, Way.HTTP_REPLAY):
            turn = await trio.to_thread.run_sync(http_turn, self.url, body, self._key)
        else:
            turn = await (await self.socket()).turn(body)
        return history.then(news, turn)

    async def cold(self, history: History, label: str, nonce: int) -> Turn:
        """The turn after `history`, replayed with other digits up front: as long, but nothing of it is cached."""
        items = history.items + self.news(history, label)
        return await (await self.socket()).turn(replace(self._workload, nonce=nonce).body(items))

    async def socket(self) -> Socket:
        if self._socket is None:
            self._socket = await Socket.open(self._nursery, self.url, self._key)
        return self._socket

    async def cut(self) -> None:
        """Lose the socket, if there is one, without a close frame."""
        if self._socket is not None:
            await self._socket.cut()
        self._socket = None

    async def demote(self, tier: str) -> None:
        """Move every session's KV down to `host` or `disk`, and wait until none is left above."""
        await self.admin("POST", "/admin/demote", {"tier": tier})
        await self.until_empty(*(("device",) if tier == "host" else ("device", "host")))

    async def until_empty(self, *tiers: str) -> None:
        """Wait until these tiers hold no block. Raises trio.TooSlowError."""
        with trio.fail_after(SETTLE_TIMEOUT_S):
            while await self._blocks(tiers):  # noqa: ASYNC110 -- another process has no event
                await trio.sleep(0.05)

    async def _blocks(self, tiers: tuple[str, ...]) -> int:
        report = await self.admin("GET", "/admin/tiers")
        return sum(int(each["blocks"]) for each in report["tiers"] if each["tier"] in tiers)

    async def admin(self, method: str, path: str, body: Item | None = None) -> Any:
        return await trio.to_thread.run_sync(call, method, self.url, path, body, self._key)
