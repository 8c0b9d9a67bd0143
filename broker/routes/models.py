"""Which models there are: one, under every name that clients may send, in the shape of the API that asks.

`anthropic-version` header   Anthropic's list
`?client_version=`           Codex's catalogue, which it asks of providers with a login of their own
otherwise                    OpenAI's list
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from broker.errors import BadRequest
from broker.routes.refusal import speaks_anthropic

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

    from broker.port import Port

# A release date is not known: the published schema says the epoch for that.
_UNKNOWN_DATE = "1970-01-01T00:00:00Z"
_CODEX_INSTRUCTIONS = (
    "You are a coding agent in a terminal. Read, change and test the user's code with the tools you"
    " are given, and say briefly what you did."
)


def models_routes(port: Port) -> list[Route]:
    routes = _Models(port)
    return [
        Route("/v1/models", routes.models, methods=["GET"]),
        Route("/v1/models/{model:path}", routes.model, methods=["GET"]),
    ]


class _Models:
    def __init__(self, port: Port) -> None:
        self._port = port

    async def models(self, request: Request) -> Response:
        names = self._port.models
        if speaks_anthropic(request.scope):
            return JSONResponse(self._anthropic_page(names, request.query_params))
        if "client_version" in request.query_params:
            return JSONResponse({"models": [self._codex_model(name) for name in names]})
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        self._port.check_model(name)
        if speaks_anthropic(request.scope):
            return JSONResponse(self._anthropic_model(name))
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "homeport",
            "homeport:max_context": self._port.engine.max_context,
        }

    def _anthropic_page(self, names: tuple[str, ...], query: Mapping[str, str]) -> dict[str, Any]:
        """One page: `limit`, and `after_id` or `before_id`, as the API has them. Raises BadRequest."""
        limit = query.get("limit", "20")
        if not limit.isdecimal() or not 1 <= int(limit) <= 1000:
            raise BadRequest(
                "'limit' must be between 1 and 1000.", code="invalid_value", param="limit"
            )
        start, stop = 0, len(names)
        if "after_id" in query:
            start = self._place(names, query["after_id"], "after_id") + 1
        if "before_id" in query:
            stop = self._place(names, query["before_id"], "before_id")
            start = max(start, stop - int(limit))
        page = names[start:stop][: int(limit)]
        more = start > 0 if "before_id" in query else start + len(page) < stop
        return {
            "data": [self._anthropic_model(name) for name in page],
            "has_more": more,
            "first_id": page[0] if page else None,
            "last_id": page[-1] if page else None,
        }

    def _place(self, names: tuple[str, ...], name: str, param: str) -> int:
        if name not in names:
            raise BadRequest(f"No model '{name}'.", code="invalid_value", param=param)
        return names.index(name)

    def _anthropic_model(self, name: str) -> dict[str, Any]:
        context = self._port.engine.max_context
        return {
            "type": "model",
            "id": name,
            "display_name": name,
            "created_at": _UNKNOWN_DATE,
            "lifecycle": "active",
            "line": None,
            "max_input_tokens": context,
            "max_tokens": context,
            "capabilities": None,
            "deprecated_at": None,
            "retires_at": None,
        }

    def _codex_model(self, name: str) -> dict[str, Any]:
        """What Codex needs to use a model without guessing: a line that it lacks costs it a tool, or a warning."""
        return {
            "slug": name,
            "display_name": name,
            "description": "",
            "default_reasoning_level": "medium",
            "supported_reasoning_levels": [{"effort": "medium", "description": "medium"}],
            "shell_type": "shell_command",
            "visibility": "list",
            "supported_in_api": True,
            "priority": 1,
            "base_instructions": _CODEX_INSTRUCTIONS,
            "supports_reasoning_summaries": False,
            "support_verbosity": False,
            "apply_patch_tool_type": "freeform",
            "truncation_policy": {"mode": "tokens", "limit": 10_000},
            "supports_parallel_tool_calls": True,
            "context_window": self._port.engine.max_context,
            "experimental_supported_tools": [],
        }
