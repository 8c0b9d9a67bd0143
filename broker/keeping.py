"""What an operator decides about one session: keep it whatever the policy says, or delete all of it.

Laws
    A session belongs to the tenant that the key proves; another tenant's and an unknown one are the same answer.
    A pin is leased: it ends by itself, is never longer than `tiers.ttl_max`, and all of them together never cover more
    than `tiers.pins` of the host tier. It covers the session's later turns too, as long as the quota has room for them.
    Deleting a session deletes its responses, stored or not, and their KV from every tier, except the blocks that others
    need: a shared head stays with whoever shares it. Bytes freed inside LMDB's file are reused by later writes, not wiped.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.errors import ClientError, NotFound, Overloaded
from broker.recall import Recall
from tiers.block import StoreError

if TYPE_CHECKING:
    from broker.access import Tenant
    from broker.port import Port

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0  # guessed


@dataclass(frozen=True, slots=True)
class Pinned:
    """What was granted."""

    session: str
    held_bytes: int
    tokens: int  # of its longest turn that is known
    ttl_s: int
    expires_at: int  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class Forgotten:
    session: str
    deleted_responses: int


async def session_of(port: Port, tenant: Tenant, response_id: str) -> str:
    """The session that a stored response belongs to. Raises NotFound."""
    node = await Recall(port.engine, port.sessions, tenant).response(response_id)
    if node is None:
        raise NotFound(f"Response with id '{response_id}' not found.", param="response_id")
    return node.session


async def pin(port: Port, tenant: Tenant, session: str, asked_s: float) -> Pinned:
    """Keep a session's KV for a time. Raises NotFound, or ClientError 409 over the quota."""
    seconds = min(asked_s, port.config.tiers.ttl_max)
    held = await port.engine.pin(tenant.salt, session, seconds)
    turns = port.sessions.of_session(tenant.name, session)
    if not held:
        if held is None and turns:
            raise ClientError(
                f"Pins may cover at most {port.config.tiers.pins:.0%} of the host tier, and '{session}'"
                " does not fit in what is left. End another pin, or raise tiers.pins.",
                code="pin_quota_exceeded",
                status=409,
            )
        raise NotFound(
            f"No session '{session}' is kept warm. A turn of it makes it so.",
            code="session_not_found",
            param="session",
        )
    expires_at = int(port.clock.now() + seconds)
    tokens = max((len(node.tokens) for node in turns), default=0)
    return Pinned(session, held, tokens, int(seconds), expires_at)


async def unpin(port: Port, tenant: Tenant, session: str) -> None:
    """End a pin. Raises NotFound if there is none."""
    if not await port.engine.unpin(tenant.salt, session):
        raise NotFound(f"No pin of session '{session}'.", code="pin_not_found", param="session")


async def forget(port: Port, tenant: Tenant, session: str) -> Forgotten:
    """Delete every response of a session and its KV. Raises NotFound for a session of which nothing is known."""
    try:
        on_disk = await port.engine.responses_of(tenant.name, session)
    except StoreError as error:
        raise _cannot_delete(error) from error
    # Those that continue others first: a block goes when nothing that continues it is left.
    in_memory = sorted(
        port.sessions.of_session(tenant.name, session), key=lambda node: -len(node.tokens)
    )
    responses = dict.fromkeys([*(node.response_id for node in in_memory), *on_disk])
    if not responses:
        raise NotFound(f"No session '{session}'.", code="session_not_found", param="session")
    await port.engine.unpin(tenant.salt, session)
    for response_id in responses:
        await forget_response(port, tenant, response_id)
    return Forgotten(session, len(responses))


async def forget_response(port: Port, tenant: Tenant, response_id: str) -> bool:
    """Delete one response and its KV; False if there was none.

    Raises Overloaded if the disk cannot: then all of it is there still.
    """
    try:
        existed = await port.engine.forget_response(tenant.name, response_id)
    except StoreError as error:
        raise _cannot_delete(error) from error
    node = port.sessions.known(tenant.name, response_id)
    if node is not None:
        node.deleted = True
        port.sessions.forget(tenant.name, response_id)
    return existed or node is not None


def _cannot_delete(error: StoreError) -> Overloaded:
    log.warning("nothing was deleted: %s", error)
    return Overloaded("The disk cannot delete now; try again.", retry_after_s=_RETRY_AFTER_S)
