"""What both sides of the port share: the engine, the tables, the gates, and the way a turn is run.

Laws
    A transport reaches the engine through `Port.turn` only, so every turn passes the same gate and is counted; what
    asks about a turn without one (its tokens, a compaction) has its own verb here.
    A turn of a conversation holds it from before its prompt is made until its items are appended, and these are there
    before the client hears that the turn is over.
    Every turn that reached `Port.turn` is observed once, when all of it is over, however it ended.
    `stopping` is set once. From then on no turn starts; those under way have `config.server.grace`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import trio

from broker.background import Background
from broker.breakdown import Stage, Status
from broker.conversations import Conversations
from broker.errors import (
    BrokerError,
    ContextTooLong,
    NotFound,
    Overloaded,
    QuotaExceeded,
    TurnFailed,
)
from broker.foresight import expect
from broker.liveness import Liveness
from broker.metrics import EdgeReport
from broker.observations import Observations
from broker.recall import Recall
from broker.turn import Engine, Outcome, compact, count_prompt, new_stream, run_turn
from broker.wire.retention import Retention

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
    from typing import Any

    from broker.access import Access, Tenant
    from broker.admission import Admission
    from broker.breakdown import Breakdown
    from broker.config import Config
    from broker.session import ConnectionScope, Sessions
    from broker.turn import Cancellation, Clock, Outcome
    from broker.wire.requests import TurnRequest
    from broker.wire.responses_out import ResponseStream
    from engine.api import EngineReport, LeaseId, Located

    Emit = Callable[[dict[str, Any]], Awaitable[None]]

log = logging.getLogger(__name__)

_TOKEN_BYTES = 4  # of JSON a token, as English text and code have it (guessed)
_RESTART_S = (
    5.0  # the hint to clients that arrive while we stop (guessed: a restart with a converted model)
)


class Service(Engine, Protocol):
    """What the broker uses of `engine.service.EngineService`."""

    async def inspect(self, *, sessions: bool = True) -> EngineReport: ...
    async def pin(self, salt: bytes, session: str, seconds: float) -> int | None: ...
    async def unpin(self, salt: bytes, session: str) -> bool: ...
    async def responses_of(self, tenant: str, session: str) -> list[str]: ...
    async def locate(
        self, turns: Iterable[tuple[LeaseId | None, tuple[bytes, ...]]]
    ) -> tuple[Located, ...]: ...


@dataclass(slots=True, eq=False)
class Port:
    config: Config
    access: Access
    engine: Service
    sessions: Sessions
    admission: Admission
    clock: Clock
    new_id: Callable[[str], str]  # "msg" -> "msg_…", at least 128 random bits
    observations: Observations = field(default_factory=Observations)
    stopping: trio.Event = field(default_factory=trio.Event)
    websockets: int = 0
    turns_total: Counter[str] = field(default_factory=Counter)  # {transport: turns}
    stored_total: Counter[str] = field(default_factory=Counter)  # {disk|memory: responses}
    disk_takes: bool = True  # what came of the last response that was to be stored
    under_way: dict[Breakdown, None] = field(default_factory=dict)  # turns, oldest first
    began_at: float = field(init=False)  # tells one daemon's life from the next one's
    background: Background = field(init=False)
    conversations: Conversations = field(init=False)
    liveness: Liveness = field(init=False)
    _held: Counter[str] = field(default_factory=Counter)  # {tenant: WebSockets and requests}

    def __post_init__(self) -> None:
        self.began_at = self.clock.now()
        self.background = Background(self)
        self.liveness = Liveness(self)
        self.conversations = Conversations(self.engine, self.clock, self.new_id)

    @contextmanager
    def held_by(self, tenant: Tenant) -> Iterator[None]:
        """One more WebSocket, or request, of a key. Raises QuotaExceeded. Without keys there is nobody to tell apart."""
        most = self.config.auth.max_connections
        if tenant.name and self._held[tenant.name] >= most:
            raise QuotaExceeded(
                f"This key has {most} connections and requests open already.", retry_after_s=1.0
            )
        self._held[tenant.name] += 1
        try:
            yield
        finally:
            self._held[tenant.name] -= 1
            if not self._held[tenant.name]:
                del self._held[tenant.name]

    @property
    def models(self) -> tuple[str, ...]:
        """The ids that clients may send, ours first."""
        return (self.config.model.name, *self.config.model.aliases)

    async def turn(
        self,
        request: TurnRequest,
        *,
        breakdown: Breakdown,
        tenant: Tenant,
        scope: ConnectionScope,
        emit: Emit,
        background: trio.Nursery | None = None,
        cancellation: Cancellation | None = None,
        queued: ResponseStream | None = None,
    ) -> Outcome:
        """Run one turn to its terminal event. Raises BrokerError if it is refused before its first event.

        A warm-up's prefill goes on in `background`, in the place that the turn was given; without one it is waited for.
        `queued` is the stream of a response that exists already; such a turn waits for its place however long.
        """
        try:
            return await self._turn(
                request,
                breakdown=breakdown,
                tenant=tenant,
                scope=scope,
                emit=emit,
                background=background,
                cancellation=cancellation,
                queued=queued,
            )
        except BrokerError:
            scope.failed(request.stream_id, request.previous_response_id)
            raise

    async def _turn(
        self,
        request: TurnRequest,
        *,
        breakdown: Breakdown,
        tenant: Tenant,
        scope: ConnectionScope,
        emit: Emit,
        background: trio.Nursery | None,
        cancellation: Cancellation | None,
        queued: ResponseStream | None,
    ) -> Outcome:
        async with AsyncExitStack() as place:
            place.enter_context(self._observed(breakdown))
            breakdown.tenant = tenant.name
            self.check_open()
            self.check_model(request.model)
            breakdown.model = request.model or self.config.model.name
            computed = await place.enter_async_context(
                self.admission.place(
                    tenant.name, self._weigh(request, tenant, scope), patient=queued is not None
                )
            )
            request, emit = await place.enter_async_context(
                self.conversations.turn(tenant, request, emit)
            )
            self.turns_total[breakdown.origin.transport] += 1
            outcome = await run_turn(
                request,
                engine=self.engine,
                sessions=self.sessions,
                connection=scope,
                tenant=tenant,
                emit=emit,
                clock=self.clock,
                new_id=self.new_id,
                retention=self._retention,
                cancellation=cancellation,
                queued=queued,
                breakdown=breakdown,
                computed=computed,
            )
            breakdown.status = Status(outcome.response["status"])
            breakdown.reason = _reason(outcome.response)
            if outcome.behind is not None:
                if background is None:
                    await outcome.behind()
                else:
                    background.start_soon(_run_in, place.pop_all(), outcome.behind)
        if outcome.durable is not None:
            self._note_stored(disk_takes=outcome.durable)
        return outcome

    @contextmanager
    def _observed(self, breakdown: Breakdown) -> Iterator[None]:
        """A turn, until its place is given back: a warm-up's prefill is a part of it."""
        breakdown.enter(Stage.QUEUE, trio.current_time())
        self.under_way[breakdown] = None
        try:
            yield
        except BrokerError as error:
            if breakdown.status is None:
                fault = isinstance(error, TurnFailed)
                breakdown.status = Status.FAILED if fault else Status.REFUSED
                breakdown.reason = error.code
            raise
        finally:
            del self.under_way[breakdown]
            if breakdown.status is None:
                left = trio.current_effective_deadline() == -math.inf
                breakdown.status = Status.ABANDONED if left else Status.FAILED
            self.observations.ended(breakdown.record(trio.current_time(), self.clock.now()))

    async def count_prompt(
        self, request: TurnRequest, *, tenant: Tenant, scope: ConnectionScope
    ) -> int:
        """The tokens of the prompt that a turn of this request would feed, before it compacts anything.

        Raises BrokerError as the turn would.
        """
        self.check_model(request.model)
        request = await self.conversations.with_context(tenant, request)
        return await count_prompt(
            request,
            engine=self.engine,
            sessions=self.sessions,
            connection=scope,
            tenant=tenant,
            clock=self.clock,
            new_id=self.new_id,
        )

    async def check_turn(
        self, request: TurnRequest, *, tenant: Tenant, scope: ConnectionScope
    ) -> None:
        """Raise what a turn of this request would be refused for, as far as that is known before it runs."""
        tokens = await self.count_prompt(request, tenant=tenant, scope=scope)
        if tokens >= self.engine.max_context and request.compaction is None:
            raise ContextTooLong(limit_tokens=self.engine.max_context, prompt_tokens=tokens)

    async def compact(
        self, request: TurnRequest, *, tenant: Tenant, scope: ConnectionScope
    ) -> Mapping[str, Any]:
        """A compacted window of what the request says. Raises BrokerError."""
        self.check_open()
        self.check_model(request.model)
        request = await self.conversations.with_context(tenant, request)
        async with self.admission.place(tenant.name, self._weigh(request, tenant, scope)):
            self.turns_total["compact"] += 1
            return await compact(
                request,
                engine=self.engine,
                sessions=self.sessions,
                connection=scope,
                tenant=tenant,
                clock=self.clock,
                new_id=self.new_id,
            )

    def _weigh(self, request: TurnRequest, tenant: Tenant, scope: ConnectionScope) -> int:
        """About how many tokens a turn's prompt has, without rendering it: what it continues, and what the client wrote."""
        tokens = request.wire_bytes // _TOKEN_BYTES
        if request.previous_response_id is not None:
            parent = scope.find(tenant.name, request.previous_response_id)
            parent = parent or self.sessions.known(tenant.name, request.previous_response_id)
            tokens += 0 if parent is None else len(parent.tokens)
        return min(tokens, self.engine.max_context)

    def new_stream(self, request: TurnRequest) -> ResponseStream:
        """A response that exists before its turn begins."""
        return new_stream(request, self.engine, self.clock, self.new_id, self._retention)

    @property
    def _retention(self) -> Retention:
        return Retention(self.config.tiers.ttl_default, self.config.tiers.ttl_max)

    async def expect(self, tenant: Tenant, labels: tuple[str, ...]) -> None:
        """A turn of the session of these names is likely: have its KV brought to the device."""
        node = await Recall(self.engine, self.sessions, tenant).latest(labels)
        if node is not None:
            expect(self.engine, tenant, node, self.clock.now())

    def _note_stored(self, *, disk_takes: bool) -> None:
        """Count it. One log line when the disk begins to refuse responses, and one when it takes them again."""
        self.stored_total["disk" if disk_takes else "memory"] += 1
        if disk_takes and not self.disk_takes:
            log.warning("the disk takes responses again")
        elif self.disk_takes and not disk_takes:
            log.warning(
                "the disk refuses responses: turns go on, and what should be stored lives in memory only"
            )
        self.disk_takes = disk_takes

    def check_open(self) -> None:
        """Raises Overloaded when no turn may start any more."""
        if self.stopping.is_set():
            raise Overloaded("The server is restarting; try again.", retry_after_s=_RESTART_S)

    def check_room(self, tenant: Tenant, breakdown: Breakdown) -> None:
        """Refuse a turn that has nobody to make room for it before anything is done for it. Raises Overloaded.

        It is observed as one that `turn` refused.
        """
        try:
            self.check_open()
            self.admission.check(tenant.name)
        except Overloaded:
            with self._observed(breakdown):
                raise

    def check_model(self, name: str | None) -> None:
        """Raises NotFound for a model that is not served; a client may leave it out."""
        if name is not None and name not in self.models:
            raise NotFound(
                f"The model '{name}' does not exist.", code="model_not_found", param="model"
            )

    def report(self) -> EdgeReport:
        return EdgeReport(
            websockets=self.websockets,
            turns_total=dict(self.turns_total),
            admission=self.admission.statistics(),
            sessions=self.sessions.statistics().nodes,
            stored_total=dict(self.stored_total),
            background=self.background.running,
            tasks=trio.lowlevel.current_statistics().tasks_living,
            observed=self.observations.report(),
        )


def _reason(response: Mapping[str, Any]) -> str | None:
    """Why it is not complete."""
    if (error := response.get("error")) is not None:
        return str(error["code"])
    details = response.get("incomplete_details")
    return None if details is None else str(details["reason"])


async def _run_in(place: AsyncExitStack, work: Callable[[], Awaitable[None]]) -> None:
    async with place:
        await work()
