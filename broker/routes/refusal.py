"""An error as an HTTP answer, in the words of the API that was asked: its path tells which.

Whatever goes wrong is answered here, also 404, 405 and our own faults, so every client gets the shape that it can read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from broker.errors import (
    BrokerError,
    ClientError,
    TurnFailed,
    anthropic_body,
    anthropic_status,
    http_body,
)
from broker.routes.body import request_id_of
from broker.wire.chat_out import chat_error_body

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Scope


def speaks_anthropic(scope: Scope) -> bool:
    """Whether the client speaks Anthropic's API: by the path, and where two APIs share one, by that API's header."""
    path = scope["path"]
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return True
    shared = path == "/v1/models" or path.startswith("/v1/models/")
    return shared and any(name == b"anthropic-version" for name, _ in scope["headers"])


def refusal(error: BrokerError, scope: Scope) -> JSONResponse:
    """The answer to the request of `scope`."""
    headers = dict(error.headers)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if speaks_anthropic(scope):
        body = anthropic_body(error, request_id_of(scope))
        return JSONResponse(body, status_code=anthropic_status(error), headers=headers)
    said = chat_error_body if scope["path"].startswith("/v1/chat/") else http_body
    return JSONResponse(said(error), status_code=error.status, headers=headers)


async def answer_broker_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, BrokerError)
    return refusal(error, request.scope)


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    message = f"{error.detail}: {request.method} {request.url.path}"
    answer = ClientError(
        message, code=codes.get(error.status_code, "invalid_request"), status=error.status_code
    )
    response = refusal(answer, request.scope)
    response.headers.update(error.headers or {})
    return response


async def answer_nobody(request: Request, error: Exception) -> Response:
    """The client left while sending its body; hypercorn drops what is written now."""
    return Response(status_code=400)


async def answer_our_fault(request: Request, error: Exception) -> Response:
    """Starlette raises the error again after this answer, and hypercorn logs it with its traceback."""
    fault = TurnFailed("The server had an error while processing your request.")
    return refusal(fault, request.scope)
