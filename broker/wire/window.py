"""What a compaction item holds: the opaque text that clients carry, and what it stands for.

    homeport-window-1.BASE64URL(JSON {"summary": text, "kept": null | [items]})

It is encoded, not encrypted: all of it is the client's own conversation, and it must be readable here after a restart,
another key, another state directory. So nothing about it is stored, and nothing in it is trusted: whoever writes one
by hand has written a prompt.

Laws
    `kept` null: the item adds a summary where it stands, and what is before it stays (`/v1/responses/compact`, whose
    output is the user messages and then this item).
    `kept` a list: the item stands for everything before it; the kept items are what is left of that, and they come
    first. System and developer messages that the client does send before it are the client's, and replace kept ones.
    The last item of the second kind in a list counts; there is nothing behind an earlier one that it does not cover.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broker.errors import BadRequest
from broker.wire.fields import optional_array, required_string
from broker.wire.item_json import item_json
from broker.wire.items import Compaction, Message, parse_items
from broker.wire.json_in import parse_object
from broker.wire.sse import json_text

if TYPE_CHECKING:
    from broker.wire.items import Item

_MAGIC = "homeport-window-1."


@dataclass(frozen=True, slots=True)
class Window:
    """The content of one compaction item."""

    summary: str
    kept: tuple[Item, ...] | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """A client's list, as far as it still counts. `at` is the first of its items that does."""

    before: tuple[Item, ...]  # what is left of the items that are covered
    items: tuple[Item, ...]
    at: int
    covers: bool  # also what a list continues: a previous response, a conversation


def seal(window: Window) -> str:
    kept: list[Any] | None = None
    if window.kept is not None:
        kept = [item_json(item, item.id or "") for item in window.kept]
        for one in kept:
            if not one["id"]:
                del one["id"]
    text = json_text({"summary": window.summary, "kept": kept})
    return _MAGIC + base64.urlsafe_b64encode(text.encode()).decode()


def unseal(item: Compaction, *, at: str = "input") -> Window:
    """What the item holds. Raises BadRequest for one that was not written here."""
    try:
        if not item.encrypted.startswith(_MAGIC):
            raise _unreadable(at)
        text = base64.b64decode(
            item.encrypted.removeprefix(_MAGIC).encode(), altchars=b"-_", validate=True
        )
        body = parse_object(text)
        kept = optional_array(body, "kept")
        items = None if kept is None else parse_items(kept, at="kept")
        if any(isinstance(one, Compaction) for one in items or ()):
            raise _unreadable(at)
        return Window(required_string(body, "summary"), items)
    except (BadRequest, binascii.Error, UnicodeError):
        raise _unreadable(at) from None


def cut(items: tuple[Item, ...]) -> Cut:
    """The list without what its last covering compaction stands for. Raises BadRequest."""
    for at in range(len(items) - 1, -1, -1):
        item = items[at]
        if isinstance(item, Compaction):
            kept = unseal(item, at=f"input[{at}]").kept
            if kept is not None:
                heads = tuple(one for one in items[:at] if is_head(one))
                if heads:
                    kept = heads + tuple(one for one in kept if not is_head(one))
                return Cut(kept, items[at:], at, covers=True)
    return Cut((), items, 0, covers=False)


def is_head(item: Item) -> bool:
    """Whether it instructs the model, rather than says something to it."""
    return isinstance(item, Message) and item.role in ("system", "developer")


def _unreadable(at: str) -> BadRequest:
    return BadRequest(
        "The compaction item was not made by this server, or was changed: its content cannot be read.",
        code="invalid_encrypted_content",
        param=f"{at}.encrypted_content",
    )
