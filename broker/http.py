"""The HTTP side: Responses over JSON and event streams, stored responses, models, health, metrics, admin.

A connection is one `hypercorn` TCPServer over the replayed stream; the routes are one Starlette app behind `Guard`,
so that a new route is guarded before anybody thinks of it.

Laws
    Access is decided before routing, for every path; only the probes need no key.
    One turn per request, written by the request's own task. The client leaving cancels it; its blocks stay cached.
    Every error has OpenAI's shape, also 404, 405 and our own faults; a fault of ours is logged with its traceback.
    An event is one write: clients exist that do not put a split one together again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from typing import TYPE_CHECKING, Any, assert_never

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from broker import keeping
from broker.config import duration
from broker.errors import (
    BadRequest,
    BrokerError,
    ClientError,
    NotFound,
    TooLarge,
    TurnFailed,
    http_body,
)
from broker.foresight import session_labels
from broker.metrics import render
from broker.recall import Recall
from broker.session import ConnectionScope
from broker.wire.fields import optional_name
from broker.wire.items import FunctionCall, FunctionCallOutput, ItemReference, Message, Reasoning
from broker.wire.json_in import parse_object
from broker.wire.requests import Transport, parse_create
from broker.wire.sse import DONE, sse_frame
from tiers.block import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.types import Message as AsgiMessage

    from broker.access import Tenant
    from broker.listen import Arrival
    from broker.port import Port
    from broker.session import Node
    from broker.wire.items import Item
    from broker.wire.requests import TurnRequest

log = logging.getLogger(__name__)

_OPEN_PATHS = ("/healthz", "/readyz")
_TERMINAL = ("response.completed", "response.incomplete", "response.failed")
_DRAINED_BODIES = (
    4  # bodies' worth of bytes read and dropped, so that a client hears its 413 instead of a reset
)


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
    routes = _Routes(port)
    table = [
        Route("/v1/responses", routes.create, methods=["POST"]),
        Route("/v1/responses/{response_id}", routes.retrieve, methods=["GET"]),
        Route("/v1/responses/{response_id}", routes.delete, methods=["DELETE"]),
        Route("/v1/responses/{response_id}/input_items", routes.input_items, methods=["GET"]),
        Route("/v1/models", routes.models, methods=["GET"]),
        Route("/v1/models/{model:path}", routes.model, methods=["GET"]),
        Route("/healthz", routes.healthz, methods=["GET"]),
        Route("/readyz", routes.readyz, methods=["GET"]),
        Route("/metrics", routes.metrics, methods=["GET"]),
        Route("/admin/sessions", routes.admin_sessions, methods=["GET"]),
        Route("/admin/tiers", routes.admin_tiers, methods=["GET"]),
        Route("/admin/demote", routes.admin_demote, methods=["POST"]),
        Route("/admin/pins", routes.admin_pins, methods=["GET"]),
        Route("/admin/pins", routes.admin_pin, methods=["POST"]),
        Route("/admin/pins/{session:path}", routes.admin_unpin, methods=["DELETE"]),
        Route("/admin/sessions/{session:path}", routes.admin_forget, methods=["DELETE"]),
    ]
    app = Starlette(
        routes=table,
        exception_handlers={
            BrokerError: _answer_broker_error,
            HTTPException: _answer_http_exception,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_our_fault,
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
        request_id = self._port.new_id("req").encode()

        async def send_with_id(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        if scope["type"] == "websocket":
            await _refuse_late_upgrade(receive, send)
            return
        access = self._port.access
        try:
            if scope["path"] in _OPEN_PATHS:
                access.check_source(scope["headers"])
            else:
                scope["state"]["tenant"] = access.admit(scope["headers"])
        except ClientError as error:
            await _error_response(error)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)


class _Routes:
    def __init__(self, port: Port) -> None:
        self._port = port

    async def create(self, request: Request) -> TurnResponse:
        tenant = _tenant(request)
        scope = ConnectionScope(labels=session_labels(request.scope["headers"]))
        await self._port.expect(tenant, scope.labels)
        body = parse_object(await _read_body(request, self._port))
        turn = parse_create(body, transport=Transport.HTTP)
        return TurnResponse(turn, tenant, scope, self._port)

    async def retrieve(self, request: Request) -> Response:
        node = await self._stored(request)
        return JSONResponse(node.response)

    async def delete(self, request: Request) -> Response:
        """Also one that cannot be read any more, because another tokenizer's ids are in it."""
        tenant, response_id = _tenant(request), request.path_params["response_id"]
        node = self._port.sessions.known(tenant.name, response_id)
        unstored = node is not None and not node.stored
        if unstored or not await keeping.forget_response(self._port, tenant, response_id):
            raise _no_response(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    async def input_items(self, request: Request) -> Response:
        node = await self._stored(request)
        items = [item for part in node.history[:-1] for item in part.items]
        return JSONResponse(_page(items, node.response_id, request.query_params))

    async def models(self, request: Request) -> Response:
        models = [self._model(name) for name in self._port.models]
        return JSONResponse({"object": "list", "data": models})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._port.models:
            raise NotFound(
                f"The model '{name}' does not exist.", code="model_not_found", param="model"
            )
        return JSONResponse(self._model(name))

    async def healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        self._port.check_open()
        return JSONResponse({"status": "ready", "model": self._port.config.model.name})

    async def metrics(self, request: Request) -> Response:
        report = await self._port.engine.inspect()
        return PlainTextResponse(
            render(report, self._port.report()),
            media_type="text/plain; version=0.0.4; charset=utf-8",
        )

    async def admin_sessions(self, request: Request) -> Response:
        report = await self._port.engine.inspect()
        return JSONResponse({"sessions": [dataclasses.asdict(one) for one in report.sessions]})

    async def admin_tiers(self, request: Request) -> Response:
        report = dataclasses.asdict(await self._port.engine.inspect())
        del report["sessions"]
        return JSONResponse(report)

    async def admin_demote(self, request: Request) -> Response:
        body = parse_object(await _read_body(request, self._port))
        tiers = {"host": Tier.HOST, "disk": Tier.DISK}
        tier, session = body.get("tier"), body.get("session")
        if not isinstance(tier, str) or tier not in tiers:
            raise BadRequest("'tier' must be 'host' or 'disk'.", code="invalid_value", param="tier")
        if not isinstance(session, str | None):
            raise BadRequest(
                "'session' must be a string or null.", code="invalid_type", param="session"
            )
        return JSONResponse({"moved_blocks": await self._port.engine.demote(tiers[tier], session)})

    async def admin_pins(self, request: Request) -> Response:
        report = await self._port.engine.inspect()
        return JSONResponse({"pins": [dataclasses.asdict(one) for one in report.pins]})

    async def admin_pin(self, request: Request) -> Response:
        tenant, body = _tenant(request), parse_object(await _read_body(request, self._port))
        session, response_id = optional_name(body, "session"), optional_name(body, "response_id")
        if (session is None) == (response_id is None):
            raise BadRequest(
                "Name the 'session' or a 'response_id' of it, and not both.",
                code="invalid_value",
                param="session",
            )
        seconds = _ttl(body.get("ttl"))
        if response_id is not None:
            session = await keeping.session_of(self._port, tenant, response_id)
        assert session is not None
        pinned = await keeping.pin(self._port, tenant, session, seconds)
        return JSONResponse(dataclasses.asdict(pinned))

    async def admin_unpin(self, request: Request) -> Response:
        session = request.path_params["session"]
        await keeping.unpin(self._port, _tenant(request), session)
        return JSONResponse({"session": session, "deleted": True})

    async def admin_forget(self, request: Request) -> Response:
        session = request.path_params["session"]
        forgotten = await keeping.forget(self._port, _tenant(request), session)
        return JSONResponse(dataclasses.asdict(forgotten))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "homeport",
            "homeport:max_context": self._port.engine.max_context,
        }

    async def _stored(self, request: Request) -> Node:
        """The stored response that the path names. Another tenant's, a deleted and an unknown one are one answer."""
        response_id = request.path_params["response_id"]
        recall = Recall(self._port.engine, self._port.sessions, _tenant(request))
        node = await recall.response(response_id)
        if node is None:
            raise _no_response(response_id)
        return node


class TurnResponse(Response):
    """Runs a turn and writes it: one JSON body, or one server-sent event per protocol event.

    Nothing is sent before the turn's first event, so a turn that is refused still gets its HTTP status.
    """

    def __init__(
        self, turn: TurnRequest, tenant: Tenant, connection: ConnectionScope, port: Port
    ) -> None:
        self._turn = turn
        self._tenant = tenant
        self._connection = connection
        self._port = port
        self._started = False
        self._terminal: dict[str, Any] | None = None
        self._refusal: BrokerError | None = None
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        with trio.CancelScope() as client_here:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, receive, client_here)
                await self._run()
                nursery.cancel_scope.cancel()
        if client_here.cancelled_caught:
            return
        if self._refusal is not None:
            await _error_response(self._refusal)(scope, receive, send)
        elif self._turn.stream:
            await self._write(DONE, more=False)
        else:
            await self._answer_whole(scope, receive, send)

    async def _run(self) -> None:
        try:
            await self._port.turn(
                self._turn,
                transport="http",
                tenant=self._tenant,
                scope=self._connection,
                emit=self._emit,
            )
        except BrokerError as error:
            self._refusal = error

    async def _emit(self, event: dict[str, Any]) -> None:
        if event["type"] in _TERMINAL:
            self._terminal = event
        if self._turn.stream:
            await self._write_event(event)

    async def _write_event(self, event: Mapping[str, Any]) -> None:
        await self._write(sse_frame(event), more=True)

    async def _write(self, data: bytes, *, more: bool) -> None:
        if not self._started:
            self._started = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _answer_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._terminal is not None, "a turn ended without its terminal event"
        response = self._terminal["response"]
        if self._terminal["type"] == "response.failed":
            await _error_response(TurnFailed(response["error"]["message"]))(scope, receive, send)
        else:
            await JSONResponse(response)(scope, receive, send)

    async def _watch(self, receive: Receive, client_here: trio.CancelScope) -> None:
        """The body is read; what is still to come is the client's leaving."""
        while (await receive())["type"] != "http.disconnect":
            pass
        client_here.cancel()


async def _read_body(request: Request, port: Port) -> bytes:
    """The request's body. Raises ClientError 415, 413 or 408."""
    http = port.config.http
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise ClientError(
            f"Content-Encoding '{encoding}' is not supported.",
            code="unsupported_encoding",
            status=415,
        )
    too_large = TooLarge(f"The request body is over {http.max_body} bytes.")
    declared = request.headers.get("content-length")
    if declared is not None and int(declared) > http.max_body * _DRAINED_BODIES:
        raise too_large
    body = bytearray()
    try:
        with trio.fail_after(http.body_timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > http.max_body * _DRAINED_BODIES:
                    raise too_large
    except trio.TooSlowError:
        late = f"The request body took over {http.body_timeout:g} s."
        raise ClientError(late, code="request_timeout", status=408) from None
    if len(body) > http.max_body:
        raise too_large
    return bytes(body)


def _ttl(value: Any) -> float:
    """A pin's time: "90s", "1h", or a number of seconds. Raises BadRequest."""
    seconds: float | None = None
    if isinstance(value, str):
        seconds = duration(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value
    if seconds is None or not 0 < seconds < math.inf:
        raise BadRequest(
            "'ttl' must be a time such as '30m' or '1h', or a number of seconds.",
            code="invalid_value",
            param="ttl",
        )
    return seconds


def _page(items: list[Any], response_id: str, query: Mapping[str, str]) -> dict[str, Any]:
    """One page of a list: `limit`, `order` and `after` as the API has them. Raises BadRequest."""
    limit, order = query.get("limit", "20"), query.get("order", "desc")
    if not limit.isdecimal() or not 1 <= int(limit) <= 100:
        raise BadRequest("'limit' must be between 1 and 100.", code="invalid_value", param="limit")
    if order not in ("asc", "desc"):
        raise BadRequest("'order' must be 'asc' or 'desc'.", code="invalid_value", param="order")
    data = [_item_json(item, f"item_{response_id}_{index}") for index, item in enumerate(items)]
    if order == "desc":
        data.reverse()
    after = query.get("after")
    if after is not None:
        ids = [item["id"] for item in data]
        if after not in ids:
            raise BadRequest(f"No item '{after}'.", code="invalid_value", param="after")
        data = data[ids.index(after) + 1 :]
    page = data[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(data) > len(page),
    }


def _item_json(item: Item, default_id: str) -> dict[str, Any]:
    """An item as the API lists it. Items that came without an id have one by their place in the response's input."""
    item_id = item.id or default_id
    match item:
        case Message():
            kind = "output_text" if item.role == "assistant" else "input_text"
            content = [{"type": kind, "text": item.text}]
            fields = {
                "type": "message",
                "role": item.role,
                "status": "completed",
                "content": content,
            }
        case FunctionCall():
            fields = {
                "type": "function_call",
                "call_id": item.call_id,
                "name": item.name,
                "arguments": item.arguments,
                "status": "completed",
            }
            if item.namespace is not None:
                fields["namespace"] = item.namespace
        case FunctionCallOutput():
            fields = {
                "type": "function_call_output",
                "call_id": item.call_id,
                "output": item.output,
            }
        case Reasoning():
            content = [{"type": "reasoning_text", "text": item.text}]
            fields = {"type": "reasoning", "summary": [], "content": content}
        case ItemReference():
            fields = {"type": "item_reference"}
        case _:
            assert_never(item)
    return {"id": item_id, **fields}


def _tenant(request: Request) -> Tenant:
    tenant: Tenant = request.scope["state"]["tenant"]
    return tenant


def _no_response(response_id: str) -> NotFound:
    return NotFound(f"Response with id '{response_id}' not found.", param="response_id")


def _error_response(error: BrokerError) -> JSONResponse:
    headers = dict(error.headers)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(http_body(error), status_code=error.status, headers=headers)


async def _answer_broker_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, BrokerError)
    return _error_response(error)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    message = f"{error.detail}: {request.method} {request.url.path}"
    answer = ClientError(
        message, code=codes.get(error.status_code, "invalid_request"), status=error.status_code
    )
    response = _error_response(answer)
    response.headers.update(error.headers or {})
    return response


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """The client left while sending its body; hypercorn drops what is written now."""
    return Response(status_code=400)


async def _answer_our_fault(request: Request, error: Exception) -> Response:
    """Starlette raises the error again after this answer, and hypercorn logs it with its traceback."""
    return _error_response(TurnFailed("The server had an error while processing your request."))


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
