"""The HTTP surface as an OpenAPI 3.1 document: every route, what it takes, and how it fails. Pure.

It describes what a client may rely on to call us: paths, methods, the fields that a body must have and the kinds of those
that are read most. The APIs themselves are published by those who made them; this is no copy of their schemas, and says
so by allowing further fields everywhere.

Laws
    Every route is here and nothing else is: a test holds the table equal to the routes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 1}
_SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
_WARMTH: Schema = {"type": "number", "minimum": 0, "maximum": 2}
_LIST: Schema = {"type": "array", "items": {"type": "object"}}
_TTL: Schema = {"type": ["string", "number"]}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties}


_CREATE = _object(
    input={"oneOf": [_TEXT, _LIST]},
    instructions=_TEXT,
    model=_TEXT,
    max_output_tokens=_COUNT,
    temperature=_WARMTH,
    top_p=_SHARE,
    tools=_LIST,
    previous_response_id=_TEXT,
    store=_FLAG,
    stream=_FLAG,
    background=_FLAG,
)
_CHAT = _object(
    ("messages",),
    messages={**_LIST, "minItems": 1},
    model=_TEXT,
    max_completion_tokens=_COUNT,
    temperature=_WARMTH,
    top_p=_SHARE,
    tools=_LIST,
    stream=_FLAG,
)
_MESSAGES = _object(
    ("model", "messages", "max_tokens"),
    model=_TEXT,
    messages={**_LIST, "minItems": 1},
    max_tokens={"type": "integer", "minimum": 0},
    system={"oneOf": [_TEXT, _LIST]},
    tools=_LIST,
    stream=_FLAG,
    temperature=_SHARE,
)
_COUNTED = _object(("model", "messages"), model=_TEXT, messages={**_LIST, "minItems": 1})
_CONVERSATION = _object(items=_LIST, metadata={"type": "object"})
_PAGE = ("limit", "order", "after")
_SCRIPT = ("text/javascript",)


@dataclass(frozen=True, slots=True)
class Operation:
    method: str
    path: str
    summary: str
    body: Schema | None = None
    query: tuple[str, ...] = ()
    streams: bool = False
    kinds: tuple[str, ...] = ("application/json",)  # of its answers
    anthropic: bool = False

    @property
    def parameters(self) -> list[Schema]:
        named = re.findall(r"\{(\w+)\}", self.path)
        return [
            *({"name": one, "in": "path", "required": True, "schema": _TEXT} for one in named),
            *({"name": one, "in": "query", "schema": _TEXT} for one in self.query),
        ]


OPERATIONS = (
    Operation("POST", "/v1/responses", "Answer", _CREATE, streams=True),
    Operation("POST", "/v1/responses/input_tokens", "Count a prompt's tokens", _CREATE),
    Operation("POST", "/v1/responses/compact", "Compact a window", _CREATE),
    Operation(
        "GET",
        "/v1/responses/{response_id}",
        "A response",
        query=("stream", "starting_after"),
        streams=True,
    ),
    Operation("DELETE", "/v1/responses/{response_id}", "Delete a response and its KV"),
    Operation("POST", "/v1/responses/{response_id}/cancel", "Cancel a background response"),
    Operation("GET", "/v1/responses/{response_id}/input_items", "What it was asked", query=_PAGE),
    Operation("POST", "/v1/chat/completions", "Answer", _CHAT, streams=True),
    Operation("GET", "/v1/chat/completions/{completion_id}", "A stored completion"),
    Operation("DELETE", "/v1/chat/completions/{completion_id}", "Delete a stored completion"),
    Operation("POST", "/v1/messages", "Answer", _MESSAGES, streams=True, anthropic=True),
    Operation(
        "POST", "/v1/messages/count_tokens", "Count a prompt's tokens", _COUNTED, anthropic=True
    ),
    Operation("POST", "/v1/conversations", "Make a conversation", _CONVERSATION),
    Operation("GET", "/v1/conversations/{conversation_id}", "A conversation"),
    Operation(
        "POST",
        "/v1/conversations/{conversation_id}",
        "Describe it anew",
        _object(("metadata",), metadata={"type": "object"}),
    ),
    Operation("DELETE", "/v1/conversations/{conversation_id}", "Delete it"),
    Operation("GET", "/v1/conversations/{conversation_id}/items", "Its items", query=_PAGE),
    Operation(
        "POST",
        "/v1/conversations/{conversation_id}/items",
        "Append items",
        _object(("items",), items=_LIST),
    ),
    Operation("GET", "/v1/conversations/{conversation_id}/items/{item_id}", "An item"),
    Operation("DELETE", "/v1/conversations/{conversation_id}/items/{item_id}", "Delete an item"),
    Operation(
        "GET",
        "/v1/models",
        "The models",
        query=("client_version", "limit", "after_id", "before_id"),
    ),
    Operation("GET", "/v1/models/{model}", "A model"),
    Operation(
        "GET",
        "/",
        "Whether anybody is there; to browsers, the dashboard",
        kinds=("application/json", "text/html"),
    ),
    Operation("GET", "/dashboard/style.css", "Its style", kinds=("text/css",)),
    Operation("GET", "/dashboard/words.js", "Its words", kinds=_SCRIPT),
    Operation("GET", "/dashboard/pictures.js", "Its pictures", kinds=_SCRIPT),
    Operation("GET", "/dashboard/actions.js", "Its actions", kinds=_SCRIPT),
    Operation("GET", "/dashboard/page.js", "What asks and shows", kinds=_SCRIPT),
    Operation("GET", "/api/hello", "Whether anybody is there"),
    Operation("GET", "/healthz", "Whether it lives: 503 when work stands still"),
    Operation("GET", "/readyz", "Whether it takes turns"),
    Operation("GET", "/openapi.json", "This document"),
    Operation("GET", "/metrics", "Prometheus metrics (operators)", kinds=("text/plain",)),
    Operation("GET", "/admin/sessions", "Sessions that are kept warm (operators)"),
    Operation(
        "DELETE",
        "/admin/sessions/{session}",
        "Delete a session of the key's own, or (operators) of a tenant's",
        query=("tenant",),
    ),
    Operation("GET", "/admin/tiers", "What is kept where (operators)"),
    Operation("GET", "/admin/edge", "Sockets, turns and responses (operators)"),
    Operation("GET", "/admin/turns", "The last turns, by stage (operators)", query=("limit",)),
    Operation(
        "GET",
        "/admin/overview",
        "All of these at once, bounded (operators)",
        query=("turns_after",),
    ),
    Operation(
        "POST",
        "/admin/demote",
        "Move sessions down a tier (operators)",
        _object(("tier",), tier={"enum": ["host", "disk"]}, session=_TEXT, tenant=_TEXT),
    ),
    Operation("GET", "/admin/pins", "The pins (operators)"),
    Operation(
        "POST",
        "/admin/pins",
        "Pin a session of the key's own, or (operators) of a tenant's",
        _object(("ttl",), session=_TEXT, response_id=_TEXT, ttl=_TTL, tenant=_TEXT),
    ),
    Operation(
        "DELETE",
        "/admin/pins/{session}",
        "End a pin of the key's own, or (operators) of a tenant's",
        query=("tenant",),
    ),
)

_OPENAI_ERROR = _object(
    ("error",),
    error=_object(
        ("message", "type", "code"),
        message=_TEXT,
        type=_TEXT,
        param={"type": ["string", "null"]},
        code=_TEXT,
    ),
)
_ANTHROPIC_ERROR = _object(
    ("type", "error"),
    type={"const": "error"},
    error=_object(("type", "message"), type=_TEXT, message=_TEXT),
    request_id={"type": ["string", "null"]},
)


def document(version: str) -> Mapping[str, Any]:
    """The whole of `/openapi.json`."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Homeport", "version": version},
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
        },
        "security": [{"bearer": []}, {"key": []}, {}],  # none while auth.keys is empty
    }


def _described(operation: Operation) -> Schema:
    kinds = [*operation.kinds, *(["text/event-stream"] if operation.streams else [])]
    error = _ANTHROPIC_ERROR if operation.anthropic else _OPENAI_ERROR
    described: Schema = {
        "summary": operation.summary,
        "parameters": operation.parameters,
        "responses": {
            "200": {"description": "Done", "content": {kind: {} for kind in kinds}},
            "default": {
                "description": "An error, in the shape of the API",
                "content": {"application/json": {"schema": error}},
            },
        },
    }
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": operation.body}},
        }
    return described
