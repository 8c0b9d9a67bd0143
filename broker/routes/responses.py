"""OpenAI Responses over HTTP: a turn, and the responses that are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, assert_never

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from broker import keeping
from broker.errors import BadRequest, NotFound
from broker.foresight import session_labels
from broker.recall import Recall
from broker.routes.body import read_body, tenant_of
from broker.routes.turns import TurnResponse
from broker.session import ConnectionScope
from broker.wire.items import FunctionCall, FunctionCallOutput, ItemReference, Message, Reasoning
from broker.wire.json_in import parse_object
from broker.wire.requests import Transport, parse_create
from broker.wire.sse import DONE, sse_frame

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

    from broker.port import Port
    from broker.session import Node
    from broker.wire.items import Item
    from broker.wire.responses_out import Event


def responses_routes(port: Port) -> list[Route]:
    routes = _Responses(port)
    return [
        Route("/v1/responses", routes.create, methods=["POST"]),
        Route("/v1/responses/{response_id}", routes.retrieve, methods=["GET"]),
        Route("/v1/responses/{response_id}", routes.delete, methods=["DELETE"]),
        Route("/v1/responses/{response_id}/input_items", routes.input_items, methods=["GET"]),
    ]


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

    async def create(self, request: Request) -> TurnResponse:
        tenant = tenant_of(request)
        scope = ConnectionScope(labels=session_labels(request.scope["headers"]))
        await self._port.expect(tenant, scope.labels)
        body = parse_object(await read_body(request, self._port))
        turn = parse_create(body, transport=Transport.HTTP)
        return TurnResponse(turn, ResponsesAnswer(turn.stream), tenant, scope, self._port)

    async def retrieve(self, request: Request) -> Response:
        node = await self._stored(request)
        return JSONResponse(node.response)

    async def delete(self, request: Request) -> Response:
        """Also one that cannot be read any more, because another tokenizer's ids are in it."""
        tenant, response_id = tenant_of(request), request.path_params["response_id"]
        node = self._port.sessions.known(tenant.name, response_id)
        unstored = node is not None and not node.stored
        if unstored or not await keeping.forget_response(self._port, tenant, response_id):
            raise _no_response(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    async def input_items(self, request: Request) -> Response:
        node = await self._stored(request)
        items = [item for part in node.history[:-1] for item in part.items]
        return JSONResponse(_page(items, node.response_id, request.query_params))

    async def _stored(self, request: Request) -> Node:
        """The stored response that the path names. Another tenant's, a deleted and an unknown one are one answer."""
        response_id = request.path_params["response_id"]
        recall = Recall(self._port.engine, self._port.sessions, tenant_of(request))
        node = await recall.response(response_id)
        if node is None:
            raise _no_response(response_id)
        return node


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


def _no_response(response_id: str) -> NotFound:
    return NotFound(f"Response with id '{response_id}' not found.", param="response_id")
