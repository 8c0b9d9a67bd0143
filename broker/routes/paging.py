"""One page of a list, as the API pages: `limit`, `order` and `after`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MOST = 100


def page(items: Sequence[Mapping[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """The items, which come oldest first and each with an id. Raises BadRequest."""
    limit, order = query.get("limit", "20"), query.get("order", "desc")
    if not limit.isdecimal() or not 1 <= int(limit) <= _MOST:
        raise BadRequest(
            f"'limit' must be between 1 and {_MOST}.", code="invalid_value", param="limit"
        )
    if order not in ("asc", "desc"):
        raise BadRequest("'order' must be 'asc' or 'desc'.", code="invalid_value", param="order")
    data = list(items) if order == "asc" else list(reversed(items))
    after = query.get("after")
    if after is not None:
        ids = [item["id"] for item in data]
        if after not in ids:
            raise BadRequest(f"No item '{after}'.", code="invalid_value", param="after")
        data = data[ids.index(after) + 1 :]
    shown = data[: int(limit)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(data) > len(shown),
    }
