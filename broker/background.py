"""Responses that run without their client: `background: true`.

    queued ──> in_progress ──> completed | incomplete | failed | cancelled
       └── waits for its place as long as it takes

Laws
    A job belongs to the daemon's nursery. Nobody who reads it, or stops reading it, changes anything about it.
    Every job ends in exactly one terminal event, also when it is cancelled or the daemon stops: then its response has
    `server.grace`, and is incomplete after that.
    A response that was queued is never forgotten before its client could read how it ended. Its record is written
    before the id is given out; the record goes when the response itself is stored, and stays for one that has nothing to
    store. A record that says `queued` after a restart is of a response that the restart ended: it has failed.
    Jobs are found by the tenant that started them only.
    Bounds: `max_running` jobs; ended ones are kept for `keep`; all events together take at most `max_events`.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio

from broker.boundary import contained
from broker.errors import BrokerError, ClientError, Overloaded, TurnFailed
from broker.event_log import EventLog
from broker.records import Records
from broker.turn import Cancellation
from broker.wire.responses_out import TERMINAL_EVENTS, ResponseStream
from broker.wire.sse import sse_frame

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from broker.access import Tenant
    from broker.breakdown import Breakdown
    from broker.port import Port
    from broker.session import ConnectionScope
    from broker.wire.requests import TurnRequest
    from broker.wire.responses_out import Event

_RETRY_AFTER_S = 10.0  # guessed
_SWEEP_S = 30.0  # how late an ended job may be forgotten


class EventsGone(Exception):
    """Events were dropped that a reader has not had."""


class Job:
    """One background response. Compared by identity."""

    __slots__ = (
        "_changed", "_ended", "cancellation", "ended_at", "log", "over", "recorded", "scope", "stopped_by",
        "stream", "tenant",
    )  # fmt: skip

    def __init__(self, tenant: Tenant, stream: ResponseStream) -> None:
        self.tenant = tenant
        self.stream = stream
        self.log = EventLog()
        self.scope = trio.CancelScope()
        self.cancellation = Cancellation()
        self.stopped_by: str | None = None
        self.recorded = trio.Event()
        self.over = False  # the terminal event is in the log
        self.ended_at: float | None = None  # trio's clock; set when everything about it is written
        self._changed = trio.Event()
        self._ended = trio.Event()

    @property
    def response_id(self) -> str:
        return self.stream.response_id

    @property
    def response(self) -> dict[str, Any]:
        return self.stream.response()

    def say(self, events: Iterable[Event]) -> None:
        for event in events:
            self.log.append(sse_frame(event))
            self.over = self.over or event["type"] in TERMINAL_EVENTS
        self._changed.set()
        self._changed = trio.Event()

    def stop(self, reason: str) -> None:
        """End it: cooperatively where the model runs already, so that what it said is kept."""
        self.stopped_by = self.cancellation.reason = reason
        if self.cancellation.response_id is None:
            self.scope.cancel()
        else:
            self.cancellation.request()

    def end(self) -> None:
        """Everything about it is written. Whoever still reads has had all there is."""
        self.over = True
        self.ended_at = trio.current_time()
        self._changed.set()
        self._ended.set()

    async def ended(self) -> None:
        await self._ended.wait()

    async def said(self, after: int) -> list[bytes]:
        """What it said behind event `after`; waits for something if that is nothing yet. Raises EventsGone."""
        while True:
            if not self.log.holds_after(after):
                raise EventsGone
            frames = self.log.after(after)
            if frames or self.over:
                return frames
            await self._changed.wait()


class Background:
    """The jobs of a daemon. `serve` is its lifetime."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._settings = port.config.background
        self._records = Records(port.engine, "background")
        self._jobs: OrderedDict[tuple[str, str], Job] = OrderedDict()  # oldest first
        self._bytes = 0
        self._running = 0
        self._nursery: trio.Nursery | None = None

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run jobs until the port stops and the last of them has ended."""
        stopping = self._port.stopping
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while not stopping.is_set():
                with trio.move_on_after(_SWEEP_S):
                    await stopping.wait()
                self._sweep()
            jobs = list(self._jobs.values())
            with trio.move_on_after(self._port.config.server.grace):
                for job in jobs:
                    await job.ended()
            for job in jobs:
                if not job.over:
                    job.stop("server_stopped")

    async def start(
        self, request: TurnRequest, tenant: Tenant, scope: ConnectionScope, breakdown: Breakdown
    ) -> Job:
        """Queue a response. Raises BrokerError for what could never be answered."""
        port = self._port
        assert self._nursery is not None, "not served"
        await port.check_turn(request, tenant=tenant, scope=scope)
        port.check_open()
        if self._running >= self._settings.max_running:
            raise Overloaded(
                "Too many background responses are running; try again.",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._running += 1
        job = Job(tenant, port.new_stream(request))
        self._jobs[tenant.name, job.response_id] = job
        self._say(job, job.stream.queue())
        self._nursery.start_soon(self._run, job, request, scope, breakdown)
        await job.recorded.wait()
        return job

    @property
    def running(self) -> int:
        """Jobs that have not ended."""
        return self._running

    def find(self, tenant: Tenant, response_id: str) -> Job | None:
        job = self._jobs.get((tenant.name, response_id))
        if job is not None and self._is_old(job):
            self._drop(tenant.name, response_id)
            return None
        return job

    async def recorded(self, tenant: Tenant, response_id: str) -> Mapping[str, Any] | None:
        """What is known of a response that ended without being stored, or was ended by a restart."""
        found = await self._records.get(tenant.name, response_id)
        response = None if found is None else found.get("response")
        if not isinstance(response, dict):
            return None
        if response.get("status") not in ("queued", "in_progress"):
            return response
        error = {"code": "server_error", "message": "The server restarted while this response ran."}
        return {**response, "status": "failed", "error": error}

    async def cancel(self, job: Job) -> Mapping[str, Any]:
        """The response, after its end. One that has ended already is left as it is."""
        if not job.over:
            job.stop("cancelled")
        await job.ended()
        return job.response

    def forget(self, tenant: Tenant, response_id: str) -> bool:
        """Delete the events that are kept of a response. Raises ClientError 409 while it runs."""
        job = self.find(tenant, response_id)
        if job is None:
            return False
        if job.ended_at is None:
            raise ClientError(
                "The response is still running: cancel it first.",
                code="response_in_progress",
                param="response_id",
                status=409,
            )
        self._drop(tenant.name, response_id)
        return True

    async def forget_record(self, tenant: Tenant, response_id: str) -> bool:
        """Delete what is known of a response that was not stored."""
        return await self._records.delete(tenant.name, response_id)

    async def _run(
        self, job: Job, request: TurnRequest, scope: ConnectionScope, breakdown: Breakdown
    ) -> None:
        await self._write(job)
        job.recorded.set()
        stored = False

        async def emit(event: Event) -> None:
            self._say(job, [event])

        with contained("a background response") as ran:
            try:
                with job.scope:
                    outcome = await self._port.turn(
                        request,
                        breakdown=breakdown,
                        tenant=job.tenant,
                        scope=scope,
                        emit=emit,
                        cancellation=job.cancellation,
                        queued=job.stream,
                    )
                    stored = outcome.durable is True
            except BrokerError as error:
                self._fail(job, error)
        if ran.at_fault and not job.stream.is_over:
            self._fail(job, TurnFailed("The server had an error; try again."))
        if not job.stream.is_over:
            self._say(job, self._cut(job))
        if stored:
            # A record that stays says `queued` for ever, and nobody reads it: the response is stored.
            with suppress(Overloaded):
                await self._records.delete(job.tenant.name, job.response_id)
        else:
            await self._write(job)
        self._running -= 1
        job.end()

    def _cut(self, job: Job) -> list[Event]:
        """The end of one that was stopped before the model could be told so."""
        assert job.stopped_by is not None, "a turn ended without its terminal event"
        begun = [] if job.response["status"] == "in_progress" else job.stream.start()
        now = self._port.clock.now()
        return begun + job.stream.finish("incomplete", job.stopped_by, usage=None, completed_at=now)

    def _fail(self, job: Job, error: BrokerError) -> None:
        self._say(job, job.stream.fail(error.code, error.message))

    async def _write(self, job: Job) -> None:
        now, response = self._port.clock.now(), job.response
        await self._records.put(job.tenant.name, job.response_id, {"response": response}, now)

    def _say(self, job: Job, events: list[Event]) -> None:
        before = job.log.bytes
        job.say(events)
        self._bytes += job.log.bytes - before
        while self._bytes > self._settings.max_events:
            self._make_room()

    def _make_room(self) -> None:
        for (tenant, response_id), job in self._jobs.items():
            if job.ended_at is not None:
                self._drop(tenant, response_id)
                return
        oldest = next(job for job in self._jobs.values() if job.log.bytes)
        self._bytes -= oldest.log.drop_oldest()

    def _sweep(self) -> None:
        """Forget the jobs that ended long ago."""
        for key in [key for key, job in self._jobs.items() if self._is_old(job)]:
            self._drop(*key)

    def _is_old(self, job: Job) -> bool:
        return (
            job.ended_at is not None and trio.current_time() - job.ended_at >= self._settings.keep
        )

    def _drop(self, tenant: str, response_id: str) -> None:
        self._bytes -= self._jobs.pop((tenant, response_id)).log.bytes
