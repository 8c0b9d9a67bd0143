"""A turn as an HTTP answer: one JSON body, or server-sent events, in the words of the API that was asked.

The turn speaks Responses events (`broker/wire/responses_out.py`); a `TurnAnswer` says them in its own way.

Laws
    One turn per request, written by the request's own task. The client leaving cancels it; its blocks stay cached.
    A frame is one write: clients exist that do not put a split one together again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import trio
from starlette.responses import JSONResponse, Response

from broker.errors import BrokerError, failure
from broker.routes.refusal import refusal
from broker.wire.responses_out import TERMINAL_EVENTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from starlette.types import Receive, Scope, Send

    from broker.access import Tenant
    from broker.breakdown import Breakdown
    from broker.port import Port
    from broker.session import ConnectionScope
    from broker.wire.requests import TurnRequest
    from broker.wire.responses_out import Event


SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class TurnAnswer(Protocol):
    """One turn in one API's words. Told every event of the turn, in order; frames are sent only if it streams."""

    @property
    def streams(self) -> bool: ...
    def frames(self, event: Event) -> Iterable[bytes]: ...
    def end(self) -> bytes:
        """What follows the last frame of a stream."""
        ...

    def whole(self, response: Mapping[str, Any]) -> Mapping[str, Any]:
        """The body of an answer that does not stream, for the response of the terminal event. It did not fail."""
        ...


class TurnResponse(Response):
    """Runs a turn and writes it.

    Nothing is sent before the answer's first frame, so a turn that is refused still gets its HTTP status.
    """

    def __init__(
        self,
        turn: TurnRequest,
        answer: TurnAnswer,
        tenant: Tenant,
        connection: ConnectionScope,
        port: Port,
        breakdown: Breakdown,
    ) -> None:
        self._turn = turn
        self._answer = answer
        self._tenant = tenant
        self._connection = connection
        self._port = port
        self._breakdown = breakdown
        self._started = False
        self._terminal: Event | None = None
        self._refusal: BrokerError | None = None
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        with trio.CancelScope() as client_here:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, receive, client_here)
                await self._run()
                nursery.cancel_scope.cancel()
        if client_here.cancelled_caught:
            return
        if self._refusal is not None:
            await refusal(self._refusal, scope)(scope, receive, send)
        elif self._answer.streams:
            await self._write(self._answer.end(), more=False)
        else:
            assert self._terminal is not None, "a turn ended without its terminal event"
            await self._whole(self._terminal, scope)(scope, receive, send)

    async def _run(self) -> None:
        try:
            await self._port.turn(
                self._turn,
                breakdown=self._breakdown,
                tenant=self._tenant,
                scope=self._connection,
                emit=self._emit,
            )
        except BrokerError as error:
            self._refusal = error

    async def _emit(self, event: Event) -> None:
        if event["type"] in TERMINAL_EVENTS:
            self._terminal = event
        frames = self._answer.frames(event)
        if self._answer.streams:
            for frame in frames:
                await self._write(frame, more=True)

    async def _write(self, data: bytes, *, more: bool) -> None:
        if not self._started:
            self._started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def _whole(self, terminal: Event, scope: Scope) -> Response:
        response = terminal["response"]
        if terminal["type"] == "response.failed":
            error = response["error"]
            return refusal(failure(error["code"], error["message"]), scope)
        return JSONResponse(self._answer.whole(response))


async def watch(receive: Receive, client_here: trio.CancelScope) -> None:
    """The body is read; what is still to come is the client's leaving."""
    while (await receive())["type"] != "http.disconnect":
        pass
    client_here.cancel()
