"""An error as an HTTP answer, in the words of the API that was asked (`broker/dialect.py`).

Whatever goes wrong is answered here, also 404, 405 and our own faults, so every client gets the shape that it can read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from broker.dialect import Dialect, answer_of, dialect_of
from broker.errors import BrokerError, ClientError, TurnFailed
from broker.routes.body import request_id_of

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Scope


def speaks_anthropic(scope: Scope) -> bool:
    """Whether the client speaks Anthropic's API."""
    return dialect_of(scope["path"], scope["headers"]) is Dialect.MESSAGES


def refusal(error: BrokerError, scope: Scope) -> JSONResponse:
    """The answer to the request of `scope`."""
    dialect = dialect_of(scope["path"], scope["headers"])
    answer = answer_of(error, dialect, request_id_of(scope))
    return JSONResponse(answer.body, status_code=answer.status, headers=dict(answer.headers))


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
    if error.status_code == 405:  # Starlette names the methods of the first route of this path only
        found = [
            one for one in request.app.routes if one.matches(request.scope)[0] is not Match.NONE
        ]
        methods = {name for one in found if one.path == found[0].path for name in one.methods}
        response.headers["allow"] = ", ".join(sorted(methods))
    return response


async def answer_nobody(request: Request, error: Exception) -> Response:
    """The client left while sending its body; hypercorn drops what is written now."""
    return Response(status_code=400)


async def answer_our_fault(request: Request, error: Exception) -> Response:
    """Starlette raises the error again after this answer, and hypercorn logs it with its traceback."""
    fault = TurnFailed("The server had an error while processing your request.")
    return refusal(fault, request.scope)
