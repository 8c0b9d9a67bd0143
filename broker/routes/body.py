"""What a request brings: its body, bounded in bytes and in time, the tenant and the id that `Guard` gave it, and where
a turn's account begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

from broker.breakdown import Origin, TraceContext
from broker.errors import ClientError, TooLarge

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request
    from starlette.types import Scope

    from broker.access import Tenant
    from broker.breakdown import Breakdown
    from broker.port import Port

T = TypeVar("T")

_DRAINED_BODIES = (
    4  # bodies' worth of bytes read and dropped, so that a client hears its 413 instead of a reset
)

_LARGE = 1 << 16  # bytes; parsing takes up to 0.4 s a MiB (measured)


async def read_body(request: Request, port: Port) -> bytes:
    """The request's body. Raises ClientError 415, 413 or 408."""
    http = port.config.http
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise ClientError(
            f"Content-Encoding '{encoding}' is not supported.",
            code="unsupported_encoding",
            status=415,
        )
    too_large = TooLarge(f"The request body is over {http.max_body} bytes.")
    declared = request.headers.get("content-length")
    if declared is not None and int(declared) > http.max_body * _DRAINED_BODIES:
        raise too_large
    body = bytearray()
    try:
        with trio.fail_after(http.body_timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > http.max_body * _DRAINED_BODIES:
                    raise too_large
    except trio.TooSlowError:
        late = f"The request body took over {http.body_timeout:g} s."
        raise ClientError(late, code="request_timeout", status=408) from None
    if len(body) > http.max_body:
        raise too_large
    return bytes(body)


async def understood(body: bytes, parse: Callable[[bytes], T]) -> T:
    """`parse(body)`: in a thread if there is much of it, because until it is done the loop would stand."""
    if len(body) < _LARGE:
        return parse(body)
    return await trio.to_thread.run_sync(parse, body, abandon_on_cancel=True)


def begun(request: Request, port: Port, dialect: str) -> Breakdown:
    """The account of the turn whose body was just read."""
    header = request.headers.get("traceparent")
    trace = None if header is None else TraceContext.parse(header)
    origin = Origin(request_id_of(request.scope), dialect, "http", trace)
    return port.observations.begin(origin, trio.current_time())


def tenant_of(request: Request) -> Tenant:
    """Whom the request's key proved."""
    tenant: Tenant = request.scope["state"]["tenant"]
    return tenant


def request_id_of(scope: Scope) -> str:
    """The id that the answer bears in its headers."""
    request_id: str = scope["state"]["request_id"]
    return request_id
