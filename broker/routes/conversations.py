"""OpenAI's conversations: made, described, listed and deleted; turns append to them (`broker/conversations.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from broker.errors import BadRequest
from broker.routes.body import read_body, tenant_of, understood
from broker.routes.paging import page
from broker.wire.fields import missing
from broker.wire.items import parse_input
from broker.wire.json_in import parse_object
from broker.wire.metadata import parse_metadata

if TYPE_CHECKING:
    from starlette.requests import Request

    from broker.port import Port
    from broker.wire.fields import Json
    from broker.wire.items import Item

_MAX_ADDED = 20  # items in one request, as published


def conversations_routes(port: Port) -> list[Route]:
    routes = _Conversations(port)
    one = "/v1/conversations/{conversation_id}"
    return [
        Route("/v1/conversations", routes.create, methods=["POST"]),
        Route(one, routes.retrieve, methods=["GET"]),
        Route(one, routes.describe, methods=["POST"]),
        Route(one, routes.delete, methods=["DELETE"]),
        Route(f"{one}/items", routes.items, methods=["GET"]),
        Route(f"{one}/items", routes.append, methods=["POST"]),
        Route(f"{one}/items/{{item_id}}", routes.item, methods=["GET"]),
        Route(f"{one}/items/{{item_id}}", routes.delete_item, methods=["DELETE"]),
    ]


class _Conversations:
    def __init__(self, port: Port) -> None:
        self._port = port
        self._conversations = port.conversations

    async def create(self, request: Request) -> Response:
        body = await self._body(request)
        made = await self._conversations.create(
            tenant_of(request), parse_metadata(body), _items(body)
        )
        return JSONResponse(made.json())

    async def retrieve(self, request: Request) -> Response:
        found = await self._conversations.find(tenant_of(request), _id(request))
        return JSONResponse(found.json())

    async def describe(self, request: Request) -> Response:
        body = await self._body(request)
        if "metadata" not in body:
            raise missing("metadata")
        described = await self._conversations.describe(
            tenant_of(request), _id(request), parse_metadata(body)
        )
        return JSONResponse(described.json())

    async def delete(self, request: Request) -> Response:
        await self._conversations.delete(tenant_of(request), _id(request))
        return JSONResponse({"id": _id(request), "object": "conversation.deleted", "deleted": True})

    async def items(self, request: Request) -> Response:
        found = await self._conversations.find(tenant_of(request), _id(request))
        return JSONResponse(page(found.items, request.query_params))

    async def append(self, request: Request) -> Response:
        body = await self._body(request)
        if body.get("items") is None:
            raise missing("items")
        added = await self._conversations.append(tenant_of(request), _id(request), _items(body))
        return JSONResponse(page(added, {"order": "asc", "limit": str(_MAX_ADDED)}))

    async def item(self, request: Request) -> Response:
        found = await self._conversations.find(tenant_of(request), _id(request))
        return JSONResponse(self._conversations.item(found, request.path_params["item_id"]))

    async def delete_item(self, request: Request) -> Response:
        left = await self._conversations.delete_item(
            tenant_of(request), _id(request), request.path_params["item_id"]
        )
        return JSONResponse(left.json())

    async def _body(self, request: Request) -> dict[str, Any]:
        """An empty body is an empty object: nothing in it is required to make a conversation."""
        data = await read_body(request, self._port)
        return await understood(data, parse_object) if data.strip() else {}


def _id(request: Request) -> str:
    name: str = request.path_params["conversation_id"]
    return name


def _items(body: dict[str, Json]) -> tuple[Item, ...]:
    items = parse_input(body.get("items"), at="items")
    if len(items) > _MAX_ADDED:
        raise BadRequest(
            f"Invalid 'items': array too long. Expected an array with maximum length {_MAX_ADDED}, "
            f"but got an array with length {len(items)} instead.",
            code="array_above_max_length",
            param="items",
        )
    return items
