"""The HTTP side: hypercorn's connections, and what stands before every route.

A connection is one `hypercorn` TCPServer over the replayed stream; the routes are one Starlette app behind `Guard`,
so that a new route is guarded before anybody thinks of it.

Laws
    Access is decided before routing, for every path; only the probes and the dashboard's files, which hold no data, need no
    key. So is how much one key may have open.
    What operators ask, the dashboard with it, is served to everybody who may ask it on the common port, or, with `server.admin`, there alone.
    A client that does not read for `http.send_timeout` is gone, and so is one that is still being written to when its
    connection is cancelled.
    Every error has the shape of the API that was asked, also 404, 405 and our own faults; a fault of ours is logged
    with its traceback.
"""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import RawData
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from broker.dialect import Dialect, answer_of, dialect_of
from broker.errors import BrokerError, ClientError
from broker.routes.admin import OPEN_PATHS, operator_routes, owner_routes, probe_routes
from broker.routes.chat import chat_routes
from broker.routes.conversations import conversations_routes
from broker.routes.dashboard import PAGE_PATHS, dashboard_routes
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
    from collections.abc import Set

    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.types import Message as AsgiMessage

    from broker.access import Access
    from broker.listen import Arrival
    from broker.port import Port

log = logging.getLogger(__name__)

_WORDLESS = re.compile(rb"HTTP/1\.1 (4\d\d) [^\r\n]*\r\ncontent-length: 0\r\n")
_PROBES = {*OPEN_PATHS, *PROBE_PATHS}
_ID_HEADERS = (b"x-request-id", b"request-id")  # OpenAI's, Anthropic's


class HttpSide:
    """Serves the connections that did not ask for a WebSocket."""

    def __init__(self, port: Port, app: ASGIApp) -> None:
        http = port.config.http
        self._send_timeout_s = http.send_timeout
        settings = HypercornConfig()
        settings.accesslog = None
        settings.errorlog = logging.getLogger("hypercorn.error")
        settings.h11_max_incomplete_size = http.max_head
        settings.keep_alive_timeout = http.idle_timeout
        settings.include_server_header = False
        self._settings = settings
        self._contexts: set[WorkerContext] = set()  # one per open connection
        self._app = ASGIWrapper(app)

    async def serve(self, arrival: Arrival) -> None:
        arrival.stream.send_timeout_s = self._send_timeout_s
        context = WorkerContext(None)
        self._contexts.add(context)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow, arrival, context)
                server = WordedServer(self._app, self._settings, context, {}, arrival.stream)
                server.dialect = arrival.dialect
                await server.run()
                nursery.cancel_scope.cancel()
        finally:
            self._contexts.discard(context)

    async def _follow(self, arrival: Arrival, context: WorkerContext) -> None:
        """Hypercorn 0.18 keeps an idle connection whose client has hung up until its idle timeout: end it now. And its
        sends are shielded: a cancellation reaches one that waits for its reader through the stream alone."""
        try:
            await arrival.stream.ended.wait()
            await context.terminated.set()
            await trio.sleep_forever()
        finally:
            await trio.aclose_forcefully(arrival.stream)

    async def stop(self) -> None:
        """Idle connections close now, busy ones after the response that they are in."""
        for context in list(self._contexts):
            await context.terminated.set()


class WordedServer(TCPServer):  # type: ignore[misc]
    """Hypercorn 0.18 refuses what it cannot parse (a broken chunk, a later head that is no good) with a status and no
    body. Here it gets one, in the words of the API that the connection began with."""

    dialect = Dialect.RESPONSES

    async def protocol_send(self, event: object) -> None:
        if isinstance(event, RawData) and (found := _WORDLESS.match(event.data)) is not None:
            error = ClientError("Bad request: it is not valid HTTP.", code="invalid_http")
            error.status = int(found[1])
            answer = answer_of(error, self.dialect)
            body = json.dumps(answer.body).encode()
            head = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
            event = RawData(event.data.replace(b"content-length: 0\r\n", head, 1) + body)
        await super().protocol_send(event)


def client_routes(port: Port) -> list[Route]:
    """What clients ask, and the probes."""
    return [
        *responses_routes(port),
        *chat_routes(port),
        *messages_routes(port),
        *conversations_routes(port),
        *models_routes(port),
        *owner_routes(port),
        *probe_routes(port),
    ]


def common_app(port: Port) -> ASGIApp:
    """The port that everybody speaks to."""
    apart = port.config.server.admin is not None
    if apart:
        return build_app(port, port.access, client_routes(port), _PROBES)
    routes = [*dashboard_routes(), *client_routes(port), *operator_routes(port)]
    return build_app(port, port.access, routes, _PROBES | set(PAGE_PATHS))


def operators_app(port: Port, access: Access) -> ASGIApp:
    """An address of the operators' own."""
    routes = [
        *dashboard_routes(),
        *operator_routes(port),
        *owner_routes(port),
        *probe_routes(port),
    ]
    return build_app(port, access, routes, {*OPEN_PATHS, *PAGE_PATHS})


def build_app(port: Port, access: Access, table: list[Route], keyless: Set[str]) -> ASGIApp:
    """The guarded routes; the `keyless` paths are asked for without a key."""
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
    return Guard(app, port, access, keyless)


class Guard:
    """Access before anything else; the tenant goes into the request's state, an id into its answer's headers."""

    def __init__(self, app: ASGIApp, port: Port, access: Access, keyless: Set[str]) -> None:
        self._app = app
        self._port = port
        self._access = access
        self._keyless = keyless

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
            await _refuse_late_upgrade(scope, receive, send)
            return
        scope["state"]["request_id"] = request_id
        try:
            _check_framing(scope["headers"])
            if scope["path"] in self._keyless:
                self._access.check_source(scope["headers"])
                await self._app(scope, receive, send_with_id)
                return
            tenant = scope["state"]["tenant"] = self._access.admit(scope["headers"])
            with self._port.held_by(tenant):
                await self._app(scope, receive, send_with_id)
        except ClientError as error:  # before the app: that answers its own
            await refusal(error, scope)(scope, receive, send_with_id)


def _check_framing(headers: list[tuple[bytes, bytes]]) -> None:
    """A body whose length is said in two ways is read in two ways by two programs: what smuggling lives of."""
    names = {name for name, _ in headers}
    if b"content-length" in names and b"transfer-encoding" in names:
        raise AmbiguousLength(
            "Content-Length and Transfer-Encoding: one of them.", code="invalid_http"
        )


class AmbiguousLength(ClientError):
    """What follows on this connection may be anything."""

    @property
    def headers(self) -> dict[str, str]:
        return {"connection": "close"}


async def _refuse_late_upgrade(scope: Scope, receive: Receive, send: Send) -> None:
    """A WebSocket is recognised by the first head of a connection; a kept-alive one is hypercorn's by then."""
    error = ClientError(
        "Open a new connection for a WebSocket: this one has carried HTTP already.",
        code="upgrade_on_used_connection",
    )
    await receive()  # websocket.connect
    answer = answer_of(error, dialect_of(scope["path"], scope["headers"]))
    body = json.dumps(answer.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send(
        {"type": "websocket.http.response.start", "status": error.status, "headers": headers}
    )
    await send({"type": "websocket.http.response.body", "body": body})
