"""Which API a client speaks, and an error as an HTTP answer in its words. Pure: a path and headers in, an answer out.

Every refusal over HTTP is worded here, whoever makes it: the door before a request is understood, a WebSocket's handshake,
the guard, a route.

    /v1/messages…                     Anthropic's
    /v1/chat/…                        Chat Completions'
    /v1/responses…, /v1/conversations…  OpenAI's, whatever the headers say
    anything else                     Anthropic's if the client sends that API's version header, else OpenAI's
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broker.errors import anthropic_body, anthropic_status, http_body
from broker.wire.chat_out import chat_error_body

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from broker.errors import BrokerError

_VERSION_HEADER = b"anthropic-version"


class Dialect(enum.Enum):
    RESPONSES = "responses"
    CHAT = "chat"
    MESSAGES = "messages"


@dataclass(frozen=True, slots=True)
class Answer:
    """An error, said."""

    status: int
    headers: Mapping[str, str]  # lower case
    body: Mapping[str, Any]


def dialect_of(path: str, headers: Iterable[tuple[bytes, bytes]]) -> Dialect:
    """Header names are lower case."""
    if _under(path, "/v1/messages"):
        return Dialect.MESSAGES
    if _under(path, "/v1/chat"):
        return Dialect.CHAT
    if _under(path, "/v1/responses") or _under(path, "/v1/conversations"):
        return Dialect.RESPONSES
    versioned = any(name == _VERSION_HEADER for name, _ in headers)
    return Dialect.MESSAGES if versioned else Dialect.RESPONSES


def dialect_of_bytes(seen: bytes) -> Dialect:
    """The same for what came of a head that is no good: as much of it as can be recognised."""
    line, *fields = seen.split(b"\n")
    words = line.split()
    path = words[1].partition(b"?")[0].decode("latin-1") if len(words) > 1 else ""
    names = [field.partition(b":")[0].strip().lower() for field in fields]
    return dialect_of(path, [(name, b"") for name in names])


def answer_of(error: BrokerError, dialect: Dialect, request_id: str | None = None) -> Answer:
    """`error` as a client of `dialect` reads it."""
    headers = dict(error.headers)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    match dialect:
        case Dialect.MESSAGES:
            return Answer(anthropic_status(error), headers, anthropic_body(error, request_id))
        case Dialect.CHAT:
            return Answer(error.status, headers, chat_error_body(error))
        case Dialect.RESPONSES:
            return Answer(error.status, headers, http_body(error))


def _under(path: str, root: str) -> bool:
    return path == root or path.startswith(root + "/")
