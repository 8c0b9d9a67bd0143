"""What a compaction item holds: the opaque text that clients carry, and what it stands for.

    homeport-window-1.BASE64URL(JSON {"before": null | [items], "summary": text, "after": [items]})

It is encoded, not encrypted: all of it is the client's own conversation, and it must be readable here after a restart,
another key, another state directory. So nothing about it is stored, and nothing in it is trusted: whoever writes one
by hand has written a prompt.

Laws
    `before` null: the item adds a summary where it stands, and what is before it stays (`/v1/responses/compact`, whose
    output is the user messages and then this item).
    `before` a list: the item stands for everything before it, of which these items are left, in front of the summary
    and behind it: a turn that compacts says so in its output, after the input that it had to answer. System and
    developer messages that the client does send before it are the client's, and replace the ones that are left.
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
from broker.wire.items import Compaction, ItemReference, Message, parse_items
from broker.wire.json_in import parse_object
from broker.wire.sse import json_text

if TYPE_CHECKING:
    from broker.wire.items import Item

_MAGIC = "homeport-window-1."
_NOT_HELD = (Compaction, ItemReference)  # a window is whole by itself


@dataclass(frozen=True, slots=True)
class Window:
    """The content of one compaction item."""

    summary: str
    before: tuple[Item, ...] | None = None
    after: tuple[Item, ...] = ()


@dataclass(frozen=True, slots=True)
class Cut:
    """A client's list, as far as it still counts. `at` is the first of its items that does."""

    items: tuple[Item, ...]
    at: int = 0
    left: tuple[Item, ...] | None = (
        None  # of everything before: not only in this list. None: all of it
    )

    @property
    def covers(self) -> bool:
        return self.left is not None


def seal(window: Window) -> str:
    before = None if window.before is None else _listed(window.before)
    text = json_text({"before": before, "summary": window.summary, "after": _listed(window.after)})
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
        before, after = optional_array(body, "before"), optional_array(body, "after")
        window = Window(
            required_string(body, "summary"),
            None if before is None else parse_items(before),
            parse_items(after or []),
        )
        if any(isinstance(one, _NOT_HELD) for one in (*(window.before or ()), *window.after)):
            raise _unreadable(at)
        return window
    except (BadRequest, binascii.Error, UnicodeError):
        raise _unreadable(at) from None


def cut(items: tuple[Item, ...]) -> Cut:
    """The list without what its last covering compaction stands for. Raises BadRequest."""
    for at in range(len(items) - 1, -1, -1):
        item = items[at]
        if isinstance(item, Compaction):
            window = unseal(item, at=f"input[{at}]")
            if window.before is not None:
                left = (*window.before, item, *window.after)
                heads = tuple(one for one in items[:at] if is_head(one))
                if heads:
                    left = heads + tuple(one for one in left if not is_head(one))
                return Cut(items[at + 1 :], at + 1, left)
    return Cut(items)


def is_head(item: Item) -> bool:
    """Whether it instructs the model, rather than says something to it."""
    return isinstance(item, Message) and item.role in ("system", "developer")


def _listed(items: tuple[Item, ...]) -> list[dict[str, Any]]:
    listed = [item_json(item, "") for item in items]
    return [{key: one[key] for key in one if key != "id" or one[key]} for one in listed]


def _unreadable(at: str) -> BadRequest:
    return BadRequest(
        "The compaction item was not made by this server, or was changed: its content cannot be read.",
        code="invalid_encrypted_content",
        param=f"{at}.encrypted_content",
    )
