"""A WebSocket text frame to what is to be done about it.

Laws
    Parsing never raises: a frame that cannot be served becomes `Refused`, which waits its turn in its lane
    like the response it would have been. An error out of turn would be read as the end of the one before it.
    A type that nobody knows is ignored without an answer: clients read only while they wait for a response,
    so a stray error would end their next turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broker.errors import BadRequest, ClientError
from broker.wire import article
from broker.wire.fields import missing, optional_name, required_name
from broker.wire.json_in import parse_object
from broker.wire.requests import Transport, parse_create, parse_stream_id

if TYPE_CHECKING:
    from broker.wire.fields import Json
    from broker.wire.items import Item
    from broker.wire.requests import TurnRequest


@dataclass(frozen=True, slots=True)
class Create:
    """`response.create`. Its lane is `request.stream_id`."""

    request: TurnRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    """`response.cancel`: the named response, or whatever runs. An id that nothing has is no error."""

    response_id: str | None


@dataclass(frozen=True, slots=True)
class Steer:
    """`response.steer`. `input` is given back as it came."""

    previous_response_id: str
    input: Json


@dataclass(frozen=True, slots=True)
class ArticleOpening:
    request: TurnRequest


@dataclass(frozen=True, slots=True)
class ArticleItem:
    item: article.ToolResult | Item


@dataclass(frozen=True, slots=True)
class Ignored:
    type: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A frame at fault. What it tried to continue is evicted, as after any failed continuation."""

    error: ClientError
    stream_id: str | None = None
    previous_response_id: str | None = None


Frame = Create | Cancel | Steer | ArticleOpening | ArticleItem | Ignored | Refused


def parse_frame(text: str) -> Frame:
    """What one text frame asks for."""
    try:
        frame = parse_object(text)
    except ClientError as error:
        return Refused(error)
    try:
        return _parse(frame)
    except ClientError as error:
        return Refused(error, _lane(frame), _parent(frame))


def steer_failed(steer: Steer) -> dict[str, Any]:
    """The answer to every steer: responses are not steered here. It belongs to no response's numbering."""
    return {
        "type": "response.steer.failed",
        "sequence_number": 0,
        "error": {
            "type": "invalid_request_error",
            "code": "steering_not_supported",
            "message": "Responses of this model cannot be steered while they run.",
        },
        "steer": {"input": steer.input, "previous_response_id": steer.previous_response_id},
    }


def _parse(frame: dict[str, Json]) -> Frame:
    if article.is_opening(frame):
        return ArticleOpening(article.parse_opening(frame))
    kind = frame.get("type")
    if kind is None:
        raise missing("type")
    match kind:
        case "response.create":
            return Create(parse_create(frame, transport=Transport.WEBSOCKET))
        case "response.cancel":
            return Cancel(optional_name(frame, "response_id"))
        case "response.steer":
            return Steer(required_name(frame, "previous_response_id"), frame.get("input"))
        case "conversation.item.create":
            return ArticleItem(article.parse_item(frame))
        case str():
            return Ignored(kind)
        case _:
            raise BadRequest("A frame's 'type' is a string.", code="invalid_type", param="type")


def _lane(frame: dict[str, Json]) -> str | None:
    """The lane that a refusal is about; a lane that cannot be named is the default lane."""
    try:
        return parse_stream_id(frame)
    except ClientError:
        return None


def _parent(frame: dict[str, Json]) -> str | None:
    parent = frame.get("previous_response_id")
    return parent if isinstance(parent, str) else None
