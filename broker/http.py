"""The HTTP side: hypercorn's connections, and what stands before every route.

A connection is one `hypercorn` TCPServer over the replayed stream; the routes are one Starlette app behind `Guard`,
so that a new route is guarded before anybody thinks of it.

Laws
    Access is decided before routing, for every path; only the probes need no key.
    Every error has the shape of the API that was asked, also 404, 405 and our own faults; a fault of ours is logged
    with its traceback.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from broker.errors import BrokerError, ClientError, http_body
from broker.routes.admin import OPEN_PATHS, admin_routes
from broker.routes.chat import chat_routes
from broker.routes.conversations import conversations_routes
from broker.routes.messages import PROBE_PATHS, messages_routes
from broker.routes.models import models_routes
from broker.routes.refusal import (
    answer_broker_error,
    answer_http_exception,
    answer_nobody,
    answer_our_fault,
    refusal,
)
from broker.routes.responses import responses_routes

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.types import Message as AsgiMessage

    from broker.listen import Arrival
    from broker.port import Port

log = logging.getLogger(__name__)

_ID_HEADERS = (b"x-request-id", b"request-id")  # OpenAI's, Anthropic's


class HttpSide:
    """Serves the connections that did not ask for a WebSocket."""

    def __init__(self, port: Port) -> None:
        http = port.config.http
        settings = HypercornConfig()
        settings.accesslog = None
        settings.errorlog = logging.getLogger("hypercorn.error")
        settings.h11_max_incomplete_size = http.max_head
        settings.keep_alive_timeout = http.idle_timeout
        settings.include_server_header = False
        self._settings = settings
        self._contexts: set[WorkerContext] = set()  # one per open connection
        self._app = ASGIWrapper(build_app(port))

    async def serve(self, arrival: Arrival) -> None:
        context = WorkerContext(None)
        self._contexts.add(context)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow, arrival, context)
                await TCPServer(self._app, self._settings, context, {}, arrival.stream).run()
                nursery.cancel_scope.cancel()
        finally:
            self._contexts.discard(context)

    async def _follow(self, arrival: Arrival, context: WorkerContext) -> None:
        """Hypercorn 0.18 keeps an idle connection whose client has hung up until its idle timeout: end it now."""
        await arrival.stream.ended.wait()
        await context.terminated.set()

    async def stop(self) -> None:
        """Idle connections close now, busy ones after the response that they are in."""
        for context in list(self._contexts):
            await context.terminated.set()


def build_app(port: Port) -> ASGIApp:
    """The guarded routes."""
    table = [
        *responses_routes(port),
        *chat_routes(port),
        *messages_routes(port),
        *conversations_routes(port),
        *models_routes(port),
        *admin_routes(port),
    ]
    app = Starlette(
        routes=table,
        exception_handlers={
            BrokerError: answer_broker_error,
            HTTPException: answer_http_exception,
            ClientDisconnect: answer_nobody,
            Exception: answer_our_fault,
        },
    )
    app.router.redirect_slashes = False
    return Guard(app, port)


class Guard:
    """Access before anything else; the tenant goes into the request's state, an id into its answer's headers."""

    def __init__(self, app: ASGIApp, port: Port) -> None:
        self._app = app
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = self._port.new_id("req")

        began = trio.current_time()

        async def send_with_id(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                ids = [(name, request_id.encode()) for name in _ID_HEADERS]
                taken_ms = b"%d" % ((trio.current_time() - began) * 1000)
                message["headers"] = [
                    *message.get("headers", []),
                    *ids,
                    (b"openai-processing-ms", taken_ms),
                ]
            await send(message)

        if scope["type"] == "websocket":
            await _refuse_late_upgrade(receive, send)
            return
        scope["state"]["request_id"] = request_id
        access = self._port.access
        try:
            if scope["path"] in (*OPEN_PATHS, *PROBE_PATHS):
                access.check_source(scope["headers"])
            else:
                scope["state"]["tenant"] = access.admit(scope["headers"])
        except ClientError as error:
            await refusal(error, scope)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)


async def _refuse_late_upgrade(receive: Receive, send: Send) -> None:
    """A WebSocket is recognised by the first head of a connection; a kept-alive one is hypercorn's by then."""
    error = ClientError(
        "Open a new connection for a WebSocket: this one has carried HTTP already.",
        code="upgrade_on_used_connection",
    )
    await receive()  # websocket.connect
    body = json.dumps(http_body(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send(
        {"type": "websocket.http.response.start", "status": error.status, "headers": headers}
    )
    await send({"type": "websocket.http.response.body", "body": body})
