"""OpenAI Responses over HTTP: a turn, the responses that are stored, and what can be asked without a turn.

create          a turn as JSON or events; in the background, the response that was queued, or its events
retrieve        a response however it ended; with `stream`, a background one's events behind `starting_after`
cancel          a background response; one that has ended is left as it is
input_tokens    how long the prompt of a create with this body would be
compact         a window that takes the place of what the body says
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from broker import keeping
from broker.errors import BadRequest, NotFound
from broker.foresight import session_labels
from broker.recall import Recall, input_items
from broker.routes.answering import Answering
from broker.routes.body import begun, read_body, tenant_of, understood
from broker.routes.following import Following, events_gone
from broker.routes.paging import page
from broker.routes.turns import TurnResponse
from broker.session import ConnectionScope
from broker.wire.item_json import item_json
from broker.wire.json_in import parse_object
from broker.wire.requests import Transport, parse_create
from broker.wire.sse import DONE, sse_frame

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

    from broker.access import Tenant
    from broker.port import Port
    from broker.session import Node
    from broker.wire.requests import TurnRequest
    from broker.wire.responses_out import Event


def responses_routes(port: Port) -> list[Route]:
    routes = _Responses(port)
    return [
        Route("/v1/responses", routes.create, methods=["POST"]),
        Route("/v1/responses/input_tokens", routes.input_tokens, methods=["POST"]),
        Route("/v1/responses/compact", routes.compact, methods=["POST"]),
        Route("/v1/responses/{response_id}", routes.retrieve, methods=["GET"]),
        Route("/v1/responses/{response_id}", routes.delete, methods=["DELETE"]),
        Route("/v1/responses/{response_id}/cancel", routes.cancel, methods=["POST"]),
        Route("/v1/responses/{response_id}/input_items", routes.input_items, methods=["GET"]),
    ]


_NUMBER_CHARS = 12


@dataclass(frozen=True, slots=True)
class ResponsesAnswer:
    """The turn's own words."""

    streams: bool

    def frames(self, event: Event) -> tuple[bytes, ...]:
        return (sse_frame(event),) if self.streams else ()

    def end(self) -> bytes:
        return DONE

    def whole(self, response: Mapping[str, Any]) -> Mapping[str, Any]:
        return response


class _Responses:
    def __init__(self, port: Port) -> None:
        self._port = port

    async def create(self, request: Request) -> Response:
        tenant = tenant_of(request)
        scope = _scope(request)
        await self._port.expect(tenant, scope.labels)
        body = await read_body(request, self._port)
        breakdown = begun(request, self._port, "responses")
        if b"background" not in body:  # those wait, however long the line is
            self._port.check_room(tenant, breakdown)
        turn = await understood(body, _parsed)
        if not turn.background:
            answer = ResponsesAnswer(turn.stream)
            return TurnResponse(turn, answer, tenant, scope, self._port, breakdown)
        job = await self._port.background.start(turn, tenant, scope, breakdown.in_background())
        return Following(job, after=-1) if turn.stream else JSONResponse(job.response)

    async def input_tokens(self, request: Request) -> Response:
        turn = await self._parsed(request)
        tokens = await self._port.count_prompt(
            turn, tenant=tenant_of(request), scope=_scope(request)
        )
        return JSONResponse({"object": "response.input_tokens", "input_tokens": tokens})

    async def compact(self, request: Request) -> Response:
        tenant, scope = tenant_of(request), _scope(request)
        turn = await self._parsed(request)
        return Answering(partial(self._port.compact, turn, tenant=tenant, scope=scope))

    async def retrieve(self, request: Request) -> Response:
        tenant, response_id = tenant_of(request), request.path_params["response_id"]
        stream = _flag(request.query_params, "stream")
        after = _starting_after(request.query_params)
        job = self._port.background.find(tenant, response_id)
        if stream and job is not None:
            return Following(job, after)
        response = await self._response(tenant, response_id)
        if stream:
            if not response["background"]:
                raise NotFound(
                    f"Response '{response_id}' cannot be streamed again: it was not created with "
                    "'background'. Retrieve it without 'stream'.",
                    code="response_not_streamable",
                    param="stream",
                )
            raise events_gone(response_id)
        return JSONResponse(response)

    async def cancel(self, request: Request) -> Response:
        tenant, response_id = tenant_of(request), request.path_params["response_id"]
        job = self._port.background.find(tenant, response_id)
        if job is not None:
            return JSONResponse(await self._port.background.cancel(job))
        response = await self._response(tenant, response_id)
        if not response["background"]:
            raise BadRequest(
                "Cannot cancel a synchronous response: it was not created with 'background'.",
                code="invalid_value",
                param="response_id",
            )
        return JSONResponse(response)

    async def delete(self, request: Request) -> Response:
        """Also one that cannot be read any more, because another tokenizer's ids are in it."""
        tenant, response_id = tenant_of(request), request.path_params["response_id"]
        background = self._port.background
        ran = background.forget(tenant, response_id)
        node = self._port.sessions.known(tenant.name, response_id)
        unstored = node is not None and not node.stored
        existed = not unstored and await keeping.forget_response(self._port, tenant, response_id)
        if ran or not existed:
            existed |= await background.forget_record(tenant, response_id)
        if not (existed or ran):
            raise _no_response(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    async def input_items(self, request: Request) -> Response:
        node = await self._stored(request)
        listed = [item_json(item, item_id) for item_id, item in input_items(node)]
        return JSONResponse(page(listed, request.query_params))

    async def _parsed(self, request: Request) -> TurnRequest:
        return await understood(await read_body(request, self._port), _parsed)

    async def _response(self, tenant: Tenant, response_id: str) -> Mapping[str, Any]:
        """A response as it stands: stored, or a background one's. Raises NotFound."""
        job = self._port.background.find(tenant, response_id)
        if job is not None:
            return job.response
        recall = Recall(self._port.engine, self._port.sessions, tenant)
        node = await recall.response(response_id)
        if node is not None and node.response is not None:
            return node.response
        recorded = await self._port.background.recorded(tenant, response_id)
        if recorded is None:
            raise _no_response(response_id)
        return recorded

    async def _stored(self, request: Request) -> Node:
        """The stored response that the path names. Another tenant's, a deleted and an unknown one are one answer."""
        response_id = request.path_params["response_id"]
        recall = Recall(self._port.engine, self._port.sessions, tenant_of(request))
        node = await recall.response(response_id)
        if node is None:
            raise _no_response(response_id)
        return node


def _parsed(body: bytes) -> TurnRequest:
    turn = parse_create(parse_object(body), transport=Transport.HTTP)
    return replace(turn, wire_bytes=len(body))


def _scope(request: Request) -> ConnectionScope:
    return ConnectionScope(labels=session_labels(request.scope["headers"]))


def _flag(query: Mapping[str, str], name: str) -> bool:
    value = query.get(name, "false").lower()
    if value not in ("true", "false"):
        raise BadRequest(f"'{name}' must be 'true' or 'false'.", code="invalid_value", param=name)
    return value == "true"


def _starting_after(query: Mapping[str, str]) -> int:
    value = query.get("starting_after")
    if value is None:
        return -1
    if not value.isdecimal() or len(value) > _NUMBER_CHARS:
        raise BadRequest(
            "'starting_after' must be the sequence number of an event.",
            code="invalid_value",
            param="starting_after",
        )
    return int(value)


def _no_response(response_id: str) -> NotFound:
    return NotFound(f"Response with id '{response_id}' not found.", param="response_id")
