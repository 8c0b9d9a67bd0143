"""Conversations: items under a name, to which each turn that names it appends what was asked and what was answered.

A turn of a conversation replays its items: those that the model said here are found by their ids and give their exact
tokens, so the KV of the turn before is continued, and an item that was deleted in the middle is simply not there.

    record      id, created_at, metadata, items: one JSON document, written as a whole (`broker/records.py`)
    held        a conversation that is being changed: one turn or one edit at a time; another is refused with 409

Laws
    Items and metadata are on disk before the client hears that they were taken. A disk that refuses costs durability,
    not the turn: the newest `_MAX_RECENT` conversations are in memory too.
    An item's id is unique in its conversation, and is the id under which a response gave it out.
    Another tenant's, a deleted and an unknown conversation are one answer.
    Deleting a conversation, or an item of it, deletes no response.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from broker.errors import BadRequest, ClientError, NotFound
from broker.records import Records
from broker.wire.item_json import item_json, item_prefix
from broker.wire.items import Compaction, ItemReference, parse_items
from broker.wire.responses_out import TERMINAL_EVENTS
from broker.wire.window import unseal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from broker.access import Tenant
    from broker.records import Store
    from broker.turn import Clock
    from broker.wire.items import Item
    from broker.wire.requests import TurnRequest

    Emit = Callable[[dict[str, Any]], Awaitable[None]]

log = logging.getLogger(__name__)

_MAX_RECENT = 256  # conversations in memory (guessed)
# A turn writes the whole record, so a conversation that goes on for ever must end somewhere (guessed).
_MAX_ITEMS = 20_000


@dataclass(frozen=True, slots=True)
class Conversation:
    """One record. `items` are as the API lists them, oldest first."""

    id: str
    created_at: int
    metadata: Mapping[str, str]
    items: tuple[Mapping[str, Any], ...] = ()

    def json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "conversation",
            "created_at": self.created_at,
            "metadata": dict(self.metadata),
        }


@dataclass(frozen=True, slots=True)
class _Held:
    """A conversation that nobody else changes until `release`."""

    found: Conversation
    release: Callable[[], None]


class Conversations:
    def __init__(self, store: Store, clock: Clock, new_id: Callable[[str], str]) -> None:
        self._records = Records(store, "conversation")
        self._clock = clock
        self._new_id = new_id
        self._recent: OrderedDict[tuple[str, str], Conversation] = OrderedDict()
        self._held: dict[tuple[str, str], object] = {}  # {conversation: who changes it}

    async def create(
        self, tenant: Tenant, metadata: Mapping[str, str], items: Sequence[Item]
    ) -> Conversation:
        now = int(self._clock.now())
        _check(None, items)
        empty = Conversation(self._new_id("conv"), now, metadata)
        return await self._write(tenant, self._with(empty, items, ()))

    async def find(self, tenant: Tenant, conversation_id: str) -> Conversation:
        """Raises NotFound."""
        found = self._recent.get((tenant.name, conversation_id))
        if found is None:
            found = _read(await self._records.get(tenant.name, conversation_id))
        if found is None:
            raise NotFound(
                f"Conversation with id '{conversation_id}' not found.",
                code="conversation_not_found",
                param="conversation",
            )
        return found

    async def describe(
        self, tenant: Tenant, conversation_id: str, metadata: Mapping[str, str]
    ) -> Conversation:
        """Replace the metadata."""
        async with self._hold(tenant, conversation_id) as held:
            return await self._write(tenant, replace(held.found, metadata=metadata))

    async def delete(self, tenant: Tenant, conversation_id: str) -> None:
        async with self._hold(tenant, conversation_id):
            await self._records.delete(tenant.name, conversation_id)
            self._recent.pop((tenant.name, conversation_id), None)

    async def append(
        self, tenant: Tenant, conversation_id: str, items: Sequence[Item]
    ) -> tuple[Mapping[str, Any], ...]:
        """Add items at the end; they are returned as they are listed."""
        async with self._hold(tenant, conversation_id) as held:
            _check(held.found, items)
            longer = await self._write(tenant, self._with(held.found, items, ()))
            return longer.items[len(held.found.items) :]

    async def delete_item(self, tenant: Tenant, conversation_id: str, item_id: str) -> Conversation:
        async with self._hold(tenant, conversation_id) as held:
            self.item(held.found, item_id)
            left = tuple(one for one in held.found.items if one["id"] != item_id)
            return await self._write(tenant, replace(held.found, items=left))

    def item(self, conversation: Conversation, item_id: str) -> Mapping[str, Any]:
        """Raises NotFound."""
        for one in conversation.items:
            if one["id"] == item_id:
                return one
        raise NotFound(
            f"Item with id '{item_id}' not found in the conversation.",
            code="item_not_found",
            param="item_id",
        )

    async def with_context(self, tenant: Tenant, request: TurnRequest) -> TurnRequest:
        """The request with what its conversation holds. Raises NotFound."""
        if request.conversation is None:
            return request
        found = await self.find(tenant, request.conversation)
        return replace(request, context=parse_items(found.items, at="conversation"))

    @asynccontextmanager
    async def turn(
        self, tenant: Tenant, request: TurnRequest, emit: Emit
    ) -> AsyncIterator[tuple[TurnRequest, Emit]]:
        """The request and the emitter that a turn of its conversation runs with. Raises NotFound, ClientError 409."""
        if request.conversation is None:
            yield request, emit
            return
        async with self._hold(tenant, request.conversation) as held:
            _check(held.found, request.items)

            async def appending(event: dict[str, Any]) -> None:
                ended = event["type"] in ("response.completed", "response.incomplete")
                if ended and request.generate and event["response"]["status"] != "cancelled":
                    output = event["response"]["output"]
                    await self._write(tenant, self._with(held.found, request.items, output))
                if event["type"] in TERMINAL_EVENTS:
                    held.release()  # before the client hears of it: its next turn may come at once
                await emit(event)

            yield (
                replace(request, context=parse_items(held.found.items, at="conversation")),
                appending,
            )

    @asynccontextmanager
    async def _hold(self, tenant: Tenant, conversation_id: str) -> AsyncIterator[_Held]:
        key = (tenant.name, conversation_id)
        if key in self._held:
            raise ClientError(
                "Another request is changing this conversation; try again when it is done.",
                code="conversation_locked",
                param="conversation",
                status=409,
            )
        owner = object()
        self._held[key] = owner

        def release() -> None:
            if self._held.get(key) is owner:
                del self._held[key]

        try:
            yield _Held(await self.find(tenant, conversation_id), release)
        finally:
            release()

    def _with(
        self,
        conversation: Conversation,
        items: Sequence[Item],
        output: Sequence[Mapping[str, Any]],
    ) -> Conversation:
        """The conversation and these items behind it."""
        ids = {one["id"] for one in conversation.items}
        added: list[Mapping[str, Any]] = []
        for item in items:
            one = item_json(item, self._new_id(item_prefix(item)))
            if one["id"] in ids:
                one["id"] = self._new_id(item_prefix(item))
            ids.add(one["id"])
            added.append(one)
        return replace(conversation, items=(*conversation.items, *added, *output))

    async def _write(self, tenant: Tenant, conversation: Conversation) -> Conversation:
        key = (tenant.name, conversation.id)
        self._recent[key] = conversation
        self._recent.move_to_end(key)
        if len(self._recent) > _MAX_RECENT:
            self._recent.popitem(last=False)
        document = conversation.json() | {"items": list(conversation.items)}
        await self._records.put(tenant.name, conversation.id, document, self._clock.now())
        return conversation


def _check(conversation: Conversation | None, items: Sequence[Item]) -> None:
    """Whether these may be appended. Raises BadRequest."""
    held = 0 if conversation is None else len(conversation.items)
    if held + len(items) > _MAX_ITEMS:
        raise BadRequest(
            f"The conversation would hold more than {_MAX_ITEMS} items.",
            code="conversation_too_long",
            param="conversation",
        )
    for index, item in enumerate(items):
        if isinstance(item, ItemReference):
            raise BadRequest(
                "A conversation holds items, not references to them: send the item itself.",
                code="invalid_value",
                param=f"input[{index}]",
            )
        if isinstance(item, Compaction):
            unseal(item, at=f"input[{index}]")


def _read(document: Mapping[str, Any] | None) -> Conversation | None:
    """A record; None for one that this version did not write."""
    if document is None:
        return None
    try:
        items = tuple(document["items"])
        found = Conversation(document["id"], document["created_at"], document["metadata"], items)
        parse_items(items)
        if not all(isinstance(one["id"], str) for one in items):
            raise TypeError("an item without an id")
    except (KeyError, TypeError, BadRequest) as error:
        log.warning("forgot a conversation: %r", error)
        return None
    return found
