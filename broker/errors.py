"""Everything that can go wrong with a request, and how each transport and each API says it.

    BrokerError                  has status, code, type, param, message, headers: enough for any transport
      ClientError                they are wrong: 4xx, or an error event; never logged above info
        BadRequest               400, the field at fault in `param`
          UnsupportedContent     400, an image or a file for a model that reads text
          ContextTooLong         400 context_length_exceeded: clients show it and do not retry
          UnknownResponse        400 previous_response_not_found: clients replay everything, without an id
        Unauthorized             401
        Forbidden                403
        NotFound                 404, for a thing named in the URL
        TooLarge                 413
        QuotaExceeded            429: their share is used up, whatever room there is
      Overloaded                 we are busy: try again after `retry_after_s`
      TurnFailed                 we are wrong, for one turn: the traceback is logged, the client told

Laws
    A message is written for the client: it names fields and limits, never paths, tracebacks or other tenants.
    A rendered error always has a string `code`, and on a WebSocket an integer `status`: without either,
    clients wait for minutes.
    Status codes follow what clients do with them, not only what they mean; see `Overloaded`.
"""

from __future__ import annotations

import math
from typing import Any

_LATE_S = 5.0  # the hint of a refusal that came late: the engine was full for a while (guessed)


class BrokerError(Exception):
    """A request that cannot be served. `status` is for HTTP, `event_status` for a WebSocket error event."""

    status = 500
    event_status = 500
    code = "server_error"
    type = "server_error"
    param: str | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that belong to this error, lower case."""
        return {}


class ClientError(BrokerError):
    """The client's fault. Subclasses fix `status` and a default `code`; a rare status may be given here."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code or self.code
        self.param = param
        self.status = status or self.status
        self.event_status = self.status


class BadRequest(ClientError):
    """A field is missing, malformed or out of range."""


class UnsupportedContent(BadRequest):
    """A content part this model cannot read."""

    code = "unsupported_content"


class ContextTooLong(BadRequest):
    """The prompt does not fit the model's context."""

    code = "context_length_exceeded"

    def __init__(self, *, limit_tokens: int, prompt_tokens: int) -> None:
        self.limit_tokens = limit_tokens
        self.prompt_tokens = prompt_tokens
        super().__init__(
            f"Your input exceeds the context window of this model: {prompt_tokens} tokens, "
            f"and at most {limit_tokens} fit.",
            param="input",
        )


class UnknownResponse(BadRequest):
    """`previous_response_id` names nothing that may be continued from here."""

    code = "previous_response_not_found"

    def __init__(self, response_id: str) -> None:
        super().__init__(
            f"Previous response with id '{response_id}' not found.", param="previous_response_id"
        )


class Unauthorized(ClientError):
    """No key, or a wrong one."""

    status = 401
    code = "invalid_api_key"


class Forbidden(ClientError):
    """The key or the origin may not do this."""

    status = 403
    code = "forbidden"


class NotFound(ClientError):
    """A thing named in the URL does not exist, or is another tenant's."""

    status = 404
    code = "not_found"


class TooLarge(ClientError):
    """The body or frame is over the configured size."""

    status = 413
    code = "request_too_large"


class _ComeBack(BrokerError):
    """Too much at once: it says when to come back."""

    type = "too_many_requests"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Whole seconds, rounded up: clients parse an integer."""
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


class QuotaExceeded(_ComeBack, ClientError):
    """What one key may have at once is used up. Waiting helps only if the client ends something of its own."""

    status = 429
    code = "rate_limit_exceeded"


class Overloaded(_ComeBack):
    """Too much waits already.

    503 over HTTP, where one coding agent gives up for good on a 429 but retries a 5xx; 429 with a retry-after
    in a WebSocket event, where the same agent waits that long and comes back.
    """

    status = 503
    event_status = 429
    code = "overloaded"


class TurnFailed(BrokerError):
    """One accepted turn cannot be finished, by our fault."""


def failure(code: str, message: str) -> BrokerError:
    """The error that a failed response tells of, for an answer that has not begun: with its own status again.

    A turn that has said anything, if only that it waits, can end in a failed response alone. Where nothing of that was
    sent, the client gets what it would have got at once.
    """
    if code == Overloaded.code:
        return Overloaded(message, retry_after_s=_LATE_S)
    if code in (TurnFailed.code, ""):
        return TurnFailed(message)
    return ClientError(message, code=code)


def error_object(error: BrokerError) -> dict[str, Any]:
    """The inner object, the same in every OpenAI dialect."""
    return {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }


def http_body(error: BrokerError) -> dict[str, Any]:
    """The JSON body of an HTTP answer with `error.status` and `error.headers`."""
    return {"error": error_object(error)}


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    421: "permission_error",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def anthropic_status(error: BrokerError) -> int:
    """The HTTP status in Anthropic's API, where being busy has one of its own."""
    return 529 if isinstance(error, Overloaded) else error.status


def anthropic_error_type(code: str, status: int) -> str:
    """`status` decides where the code does not: of a turn that broke in the middle, only the code is left."""
    if code == Overloaded.code:
        return "overloaded_error"
    if code == ContextTooLong.code:
        return "invalid_request_error"
    return _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")


def anthropic_body(error: BrokerError, request_id: str | None) -> dict[str, Any]:
    """The JSON body of an answer in Anthropic's API. It has no field for the path at fault: the message names it."""
    message = error.message
    if isinstance(error, ContextTooLong):  # clients look for these words, and then compact
        message = f"prompt is too long: {error.prompt_tokens} tokens > {error.limit_tokens} maximum"
    elif error.param is not None and error.param not in message:
        path = "messages" if error.param == "input" else error.param
        message = f"{path}: {message}"
    kind = anthropic_error_type(error.code, anthropic_status(error))
    return {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": request_id,
    }


def error_event(error: BrokerError, *, stream_id: str | None = None) -> dict[str, Any]:
    """The nested WebSocket event. `stream_id` is the named lane of the request; None on the default lane."""
    event: dict[str, Any] = {
        "type": "error",
        "status": error.event_status,
        "error": error_object(error),
    }
    if error.headers:
        event["headers"] = error.headers
    if stream_id is not None:
        event["stream_id"] = stream_id
    return event
