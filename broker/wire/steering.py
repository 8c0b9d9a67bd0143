"""Steering: what a client sends while its response runs, for the response after it. One lane's share, as a machine.

    response.steer ──> accepted (the server has the input)      or failed (it never had)
    the response ends ──> the input goes into a successor that starts by itself,
                          or, if it ended in calls, waits for the client's own continuation (pending),
                          or, if it was cancelled or broke, goes back to the client (failed)

Laws
    Accepted input ends in exactly one of: a `response.created` of a response that has it in its prompt, or one
    `response.steer.failed` with its id. `response.steer.pending` is said at most once for each.
    Input goes on in the order in which it was sent, before whatever a continuation brings itself.
    Only what runs can be steered, and only by the connection that it runs on.
    Steer events belong to no response's numbering.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from broker.errors import BadRequest, ClientError
from broker.wire.items import Message, parse_input
from broker.wire.responses_out import TERMINAL_EVENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from broker.wire.fields import Json
    from broker.wire.items import Item
    from broker.wire.requests import TurnRequest
    from broker.wire.responses_out import Event

MAX_PENDING = 16  # steers of one response (guessed: a person types a few)

_STEERABLE_FIELDS = frozenset(["type", "role", "content", "id", "status"])


@dataclass(frozen=True, slots=True)
class Steer:
    """`response.steer`. `input` is given back as it came; `items` is None where that is no input for a steer."""

    previous_response_id: str
    input: Json
    items: tuple[Item, ...] | None
    fault: str = ""  # why it is none


@dataclass(frozen=True, slots=True)
class _Queued:
    id: str
    steer: Steer


def parse_steer(frame: Mapping[str, Json]) -> Steer:
    """Never raises: a steer at fault is answered in its own words, not by an error that would end a response."""
    named = frame.get("previous_response_id")
    response_id = named if isinstance(named, str) else ""
    given = frame.get("input")
    if not response_id:
        return Steer(
            response_id, given, None, "'previous_response_id' names the response to steer."
        )
    try:
        return Steer(response_id, given, _user_messages(given))
    except ClientError as error:
        return Steer(response_id, given, None, error.message)


def unknown_target(steer: Steer) -> Event:
    """The answer when no lane of the connection has, or just had, the response."""
    if steer.items is None:
        return _failed(steer, "invalid_input", steer.fault)
    return _failed(
        steer,
        "response_not_found",
        f"Response with id '{steer.previous_response_id}' not found on this connection.",
    )


class Steering:
    """Tell it every event of the lane's responses, and ask it before and after each."""

    def __init__(self, stream_id: str | None, new_id: Callable[[str], str]) -> None:
        self._stream_id = stream_id
        self._new_id = new_id
        self._steerable = True
        self._response_id: str | None = None  # the lane's latest
        self._status = ""  # its status
        self._waits = False  # it ended in calls that the client answers
        self._queued: list[_Queued] = []  # for the successor of the latest
        self._handed: list[_Queued] = []  # in the prompt of a turn that has not begun

    def knows(self, response_id: str) -> bool:
        return response_id == self._response_id

    def offer(self, steer: Steer) -> Event:
        """The answer to a steer of the latest response: accepted and queued, or why not."""
        assert self.knows(steer.previous_response_id)
        if steer.items is None:
            return self._failed(steer, "invalid_input", steer.fault)
        if not self._steerable:
            return self._failed(
                steer, "steering_not_supported", "Responses of this kind cannot be steered."
            )
        if self._status == "completed":
            return self._failed(
                steer, "response_already_completed", "The response has completed already."
            )
        if self._status != "in_progress":
            return self._failed(
                steer, "response_not_active", f"The response is {self._status} already."
            )
        if len(self._queued) >= MAX_PENDING:
            return self._failed(
                steer,
                "too_many_pending_steers",
                f"At most {MAX_PENDING} steers can wait for one response.",
            )
        queued = _Queued(self._new_id("steer"), steer)
        self._queued.append(queued)
        return self._event("response.steer.accepted", steer=_named(queued))

    def told(self, event: Event, *, steerable: bool = True) -> list[Event]:
        """An event of the lane's response is being sent; what is to be sent after it."""
        kind = event["type"]
        if kind == "response.created":
            self._response_id, self._status = event["response"]["id"], "in_progress"
            self._steerable, self._waits = steerable, False
            self._handed.clear()
        elif kind in TERMINAL_EVENTS:
            return self._ended(event["response"])
        return []

    def join(self, request: TurnRequest) -> tuple[TurnRequest, list[Event]]:
        """A client's own request, with what waits for it before its input; and what it leaves behind for good."""
        waiting, self._queued = self._queued, []
        if not waiting or request.previous_response_id != self._response_id:
            return request, self._returned(
                waiting, "response_not_active", "Another response was begun on its lane."
            )
        self._handed = waiting
        return replace(request, items=(*_items(waiting), *request.items)), []

    def successor(self, request: TurnRequest) -> TurnRequest | None:
        """What follows the latest response, which `request` made, by itself; None if nothing waits for that."""
        if self._waits or not self._queued:
            return None
        self._handed, self._queued = self._queued, []
        return replace(
            request,
            items=_items(self._handed),
            previous_response_id=self._response_id,
            generate=True,
        )

    def refused(self, reason: str) -> list[Event]:
        """The turn that had the input did not begin: the client has it again."""
        handed, self._handed = self._handed, []
        return self._returned(handed, "successor_creation_failed", reason)

    def _ended(self, response: Mapping[str, Any]) -> list[Event]:
        self._status = response["status"]
        details = response["incomplete_details"] or {}
        if self._status == "failed" or details.get("reason") == "cancelled":
            queued, self._queued = self._queued, []
            why = "cancelled" if details else "failed"
            return self._returned(queued, "response_not_active", f"The response was {why}.")
        required = [stub for item in response["output"] if (stub := _required(item)) is not None]
        self._waits = bool(required)
        if not self._waits:
            return []
        return [
            self._event(
                "response.steer.pending",
                reason="waiting_for_required_input",
                required_input=required,
                steer=_named(queued),
            )
            for queued in self._queued
        ]

    def _returned(self, steers: Iterable[_Queued], code: str, why: str) -> list[Event]:
        return [self._failed(one.steer, code, why, one.id) for one in steers]

    def _failed(self, steer: Steer, code: str, why: str, steer_id: str | None = None) -> Event:
        event = _failed(steer, code, why, steer_id)
        return event if self._stream_id is None else {**event, "stream_id": self._stream_id}

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": 0, **fields}
        if self._stream_id is not None:
            event["stream_id"] = self._stream_id
        return event


def _user_messages(given: Json) -> tuple[Item, ...]:
    """Raises BadRequest for anything but a user's words."""
    if isinstance(given, list):
        for index, item in enumerate(given):
            strange = sorted(item.keys() - _STEERABLE_FIELDS) if isinstance(item, dict) else []
            if strange:
                raise _not_a_users(f"input[{index}].{strange[0]}")
    items = parse_input(given)
    for index, item in enumerate(items):
        if not isinstance(item, Message) or item.role != "user":
            raise _not_a_users(f"input[{index}]")
    if not any(isinstance(item, Message) and item.text for item in items):
        raise BadRequest("A steer's 'input' must not be empty.", param="input")
    return items


def _not_a_users(path: str) -> BadRequest:
    return BadRequest(f"'{path}': only messages of the role 'user' can steer.", param=path)


def _items(steers: Iterable[_Queued]) -> tuple[Item, ...]:
    return tuple(item for one in steers for item in one.steer.items or ())


def _named(queued: _Queued) -> dict[str, str]:
    return {"id": queued.id, "previous_response_id": queued.steer.previous_response_id}


def _required(item: Mapping[str, Any]) -> dict[str, str] | None:
    """What the client must bring for an output item; None for one that asks for nothing."""
    match item["type"]:
        case "function_call":
            return {
                "type": "function_call_output",
                "call_id": item["call_id"],
                "name": item["name"],
            }
        case "custom_tool_call":
            return {"type": "custom_tool_call_output", "call_id": item["call_id"]}
        case _:
            return None


def _failed(steer: Steer, code: str, why: str, steer_id: str | None = None) -> Event:
    """`steer_id` is None for one that was never accepted."""
    returned = {"input": steer.input, "previous_response_id": steer.previous_response_id}
    return {
        "type": "response.steer.failed",
        "sequence_number": 0,
        "error": {"type": "invalid_request_error", "code": code, "message": why},
        "steer": returned if steer_id is None else {"id": steer_id, **returned},
    }
