"""A JSON answer that takes a while: the client's leaving ends the work, as it does for a turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio
from starlette.responses import JSONResponse, Response

from broker.errors import BrokerError
from broker.routes.refusal import refusal
from broker.routes.turns import watch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.types import Receive, Scope, Send


class Answering(Response):
    """Answers with what `work` gives, or with its refusal."""

    def __init__(self, work: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
        self._work = work
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: Response | None = None
        with trio.CancelScope() as client_here:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, receive, client_here)
                try:
                    answer = JSONResponse(await self._work())
                except BrokerError as error:
                    answer = refusal(error, scope)
                nursery.cancel_scope.cancel()
        if answer is not None and not client_here.cancelled_caught:
            await answer(scope, receive, send)
