"""A background response's events as an HTTP answer: what it said behind a given event, and what it says from now on.

Reading changes nothing: the client may leave, come back with the number of the last event that it has, and read on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from starlette.responses import Response

from broker.background import EventsGone
from broker.errors import NotFound
from broker.routes.turns import SSE_HEADERS, watch
from broker.wire.sse import DONE, sse_frame

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from broker.background import Job


class Following(Response):
    """Server-sent events of `job` behind the event numbered `after`; -1 is before the first. Raises NotFound."""

    def __init__(self, job: Job, after: int) -> None:
        if not job.log.holds_after(after):
            raise events_gone(job.response_id)
        self._job = job
        self._after = after
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        with trio.CancelScope() as client_here:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, receive, client_here)
                await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
                await self._follow()
                nursery.cancel_scope.cancel()

    async def _follow(self) -> None:
        after = self._after
        try:
            while not (self._job.over and after + 1 >= self._job.log.next):
                for frame in await self._job.said(after):
                    await self._write(frame, more=True)
                    after += 1
        except EventsGone:  # a reader slower than the bound on kept events
            error = events_gone(self._job.response_id)
            event = {"type": "error", "code": error.code, "message": error.message}
            await self._write(
                sse_frame({**event, "param": error.param, "sequence_number": after + 1}), more=True
            )
        await self._write(DONE, more=False)

    async def _write(self, data: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def events_gone(response_id: str) -> NotFound:
    return NotFound(
        f"The events of response '{response_id}' are not kept any more; retrieve it without 'stream'.",
        code="events_not_kept",
        param="starting_after",
    )
