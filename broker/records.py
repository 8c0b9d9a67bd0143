"""Small JSON documents that survive a restart, on the disk tier among the responses' manifests.

A record is a manifest without tokens, under a tenant's name that no key can have: `KIND/TENANT`. So it takes the same
transactions, checksums and budget, is never found as a response, and no lookup of one tenant sees another's.

Laws
    `put` is durable when it returns True. False: the disk refused it, and nothing is lost that was there before.
    What cannot be read is as good as absent.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from broker.errors import Overloaded
from broker.wire.sse import json_text
from tiers.block import StoreError
from tiers.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0  # guessed


class Store(Protocol):
    """The part of the engine's service that keeps manifests."""

    async def persist(self, manifest: Manifest) -> None: ...
    async def find_response(self, tenant: str, response_id: str) -> Manifest | None: ...
    async def forget_response(self, tenant: str, response_id: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Records:
    """The documents of one kind, by tenant and id."""

    store: Store
    kind: str

    async def put(
        self, tenant: str, record_id: str, document: Mapping[str, Any], now: float
    ) -> bool:
        """Write a document, in the place of one of the same id."""
        manifest = Manifest(
            response_id=record_id,
            tenant=self._tenant(tenant),
            session=record_id,
            parent=None,
            created_at=now,
            stored=True,
            tokens=(),
            sampled_from=0,
            item_ids=(),
            content_digest=b"",
            keys=(),
            body=json_text(document).encode(),
        )
        try:
            await self.store.persist(manifest)
        except StoreError as error:
            log.debug("%s %s was not written: %s", self.kind, record_id, error)
            return False
        return True

    async def get(self, tenant: str, record_id: str) -> dict[str, Any] | None:
        found = await self.store.find_response(self._tenant(tenant), record_id)
        if found is None:
            return None
        try:
            document = json.loads(found.body)
        except (ValueError, RecursionError) as error:
            log.warning("forgot a %s: %s", self.kind, error)
            return None
        return document if isinstance(document, dict) else None

    async def delete(self, tenant: str, record_id: str) -> bool:
        """False if there was none. Raises Overloaded if the disk cannot: then it is there still."""
        try:
            return await self.store.forget_response(self._tenant(tenant), record_id)
        except StoreError as error:
            log.warning("a %s was not deleted: %s", self.kind, error)
            raise Overloaded(
                "The disk cannot delete now; try again.", retry_after_s=_RETRY_AFTER_S
            ) from error

    def _tenant(self, tenant: str) -> str:
        return f"{self.kind}/{tenant}"
