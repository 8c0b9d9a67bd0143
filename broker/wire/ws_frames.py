"""A WebSocket text frame to what is to be done about it.

Laws
    Parsing never raises: a frame that cannot be served becomes `Refused`, which waits its turn in its lane
    like the response it would have been. An error out of turn would be read as the end of the one before it.
    A type that nobody knows is ignored without an answer: clients read only while they wait for a response,
    so a stray error would end their next turn.
    A steer is never refused as a frame: it has answers of its own (`steering.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from broker.errors import BadRequest, BrokerError, ClientError
from broker.wire import article
from broker.wire.fields import missing, optional_name
from broker.wire.json_in import parse_object
from broker.wire.requests import Transport, parse_create, parse_stream_id
from broker.wire.steering import Steer, parse_steer

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
    """`response.cancel`: the named response, else what runs on the named lane, else whatever runs.

    An id that nothing has is no error.
    """

    response_id: str | None
    stream_id: str | None = None

    def means(self, lane: str | None, response_id: str | None) -> bool:
        """Whether it is about this response of this lane."""
        if self.response_id is not None:
            return self.response_id == response_id
        return self.stream_id in (None, lane)


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
    """A frame that is not served. What it tried to continue is evicted, as after any failed continuation."""

    error: BrokerError
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
        return _weighed(_parse(frame), len(text))
    except ClientError as error:
        return _refused(frame, error)


def _weighed(frame: Frame, wire_bytes: int) -> Frame:
    if isinstance(frame, Create | ArticleOpening):
        return replace(frame, request=replace(frame.request, wire_bytes=wire_bytes))
    return frame


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
            return Cancel(optional_name(frame, "response_id"), parse_stream_id(frame))
        case "response.steer":
            return parse_steer(frame)
        case "conversation.item.create":
            return ArticleItem(article.parse_item(frame))
        case str():
            return Ignored(kind)
        case _:
            raise BadRequest("A frame's 'type' is a string.", code="invalid_type", param="type")


def _refused(frame: dict[str, Json], error: ClientError) -> Refused:
    """The refusal of a frame, in its lane. One whose lane cannot be named is told on the default lane and evicts nothing."""
    try:
        lane = parse_stream_id(frame)
    except ClientError:
        return Refused(error)
    parent = frame.get("previous_response_id")
    return Refused(error, lane, parent if isinstance(parent, str) else None)
