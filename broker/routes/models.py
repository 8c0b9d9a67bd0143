"""Which models there are: one, under every name that clients may send."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from broker.errors import NotFound

if TYPE_CHECKING:
    from starlette.requests import Request

    from broker.port import Port


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
        models = [self._model(name) for name in self._port.models]
        return JSONResponse({"object": "list", "data": models})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._port.models:
            raise NotFound(
                f"The model '{name}' does not exist.", code="model_not_found", param="model"
            )
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "homeport",
            "homeport:max_context": self._port.engine.max_context,
        }
