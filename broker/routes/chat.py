"""OpenAI Chat Completions over HTTP: a turn, and the completions that are stored."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from broker import keeping
from broker.errors import NotFound
from broker.foresight import session_labels
from broker.recall import Recall
from broker.routes.body import begun, read_body, tenant_of, understood
from broker.routes.turns import TurnResponse
from broker.session import ConnectionScope
from broker.wire.chat_in import parse_chat
from broker.wire.chat_out import ChatAnswer, as_response, completion
from broker.wire.json_in import parse_object

if TYPE_CHECKING:
    from starlette.requests import Request

    from broker.port import Port
    from broker.session import Node
    from broker.wire.chat_in import ChatRequest


def chat_routes(port: Port) -> list[Route]:
    routes = _Chat(port)
    one = "/v1/chat/completions/{completion_id}"
    return [
        Route("/v1/chat/completions", routes.create, methods=["POST"]),
        Route(one, routes.retrieve, methods=["GET"]),
        Route(one, routes.delete, methods=["DELETE"]),
    ]


class _Chat:
    def __init__(self, port: Port) -> None:
        self._port = port

    async def create(self, request: Request) -> TurnResponse:
        tenant = tenant_of(request)
        scope = ConnectionScope(labels=session_labels(request.scope["headers"]))
        await self._port.expect(tenant, scope.labels)
        body = await read_body(request, self._port)
        breakdown = begun(request, self._port, "chat")
        self._port.check_room(tenant, breakdown)
        chat = await understood(body, _parsed)
        turn = replace(chat.turn, wire_bytes=len(body))
        answer = ChatAnswer(streams=turn.stream, include_usage=chat.include_usage)
        return TurnResponse(turn, answer, tenant, scope, self._port, breakdown)

    async def retrieve(self, request: Request) -> Response:
        node = await self._stored(request)
        assert node.response is not None, "a stored response has its object"
        return JSONResponse(completion(node.response))

    async def delete(self, request: Request) -> Response:
        node = await self._stored(request)
        await keeping.forget_response(self._port, tenant_of(request), node.response_id)
        return JSONResponse(
            {
                "id": request.path_params["completion_id"],
                "object": "chat.completion.deleted",
                "deleted": True,
            }
        )

    async def _stored(self, request: Request) -> Node:
        """The stored response that is this completion. Another tenant's, a deleted and an unknown one are one answer."""
        completion_id = request.path_params["completion_id"]
        named = as_response(completion_id)
        recall = Recall(self._port.engine, self._port.sessions, tenant_of(request))
        node = None if named is None else await recall.response(named)
        if node is None:
            raise NotFound(
                f"Chat completion with id '{completion_id}' not found.", param="completion_id"
            )
        return node


def _parsed(body: bytes) -> ChatRequest:
    return parse_chat(parse_object(body))
