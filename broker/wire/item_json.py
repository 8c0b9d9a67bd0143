"""A conversation item as the API lists it: the way out of `broker/wire/items.py`.

Laws
    What is written here is read back by `parse_items` as the same item.
    Every field that the published type of the item requires is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from broker.wire.items import (
    Compaction,
    FunctionCall,
    FunctionCallOutput,
    ItemReference,
    Message,
    Reasoning,
)

if TYPE_CHECKING:
    from broker.wire.items import Item


def item_json(item: Item, default_id: str) -> dict[str, Any]:
    """`default_id` is for an item that came without an id."""
    item_id = item.id or default_id
    match item:
        case Message():
            kind = "output_text" if item.role == "assistant" else "input_text"
            part: dict[str, Any] = {"type": kind, "text": item.text}
            if kind == "output_text":
                part |= {"annotations": [], "logprobs": []}
            fields: dict[str, Any] = {
                "type": "message",
                "role": item.role,
                "status": "completed",
                "content": [part],
            }
        case FunctionCall():
            fields = {
                "type": "function_call",
                "call_id": item.call_id,
                "name": item.name,
                "arguments": item.arguments,
                "status": "completed",
            }
            if item.namespace is not None:
                fields["namespace"] = item.namespace
        case FunctionCallOutput():
            fields = {
                "type": "function_call_output",
                "call_id": item.call_id,
                "output": item.output,
                "status": "completed",
            }
        case Reasoning():
            content = [{"type": "reasoning_text", "text": item.text}]
            fields = {"type": "reasoning", "summary": [], "content": content}
            if item.encrypted is not None:
                fields["encrypted_content"] = item.encrypted
        case Compaction():
            fields = {"type": "compaction", "encrypted_content": item.encrypted}
        case ItemReference():
            fields = {"type": "item_reference"}
        case _:
            assert_never(item)
    return {"id": item_id, **fields}


def item_prefix(item: Item) -> str:
    """What the id of an item of this kind begins with."""
    match item:
        case Message():
            return "msg"
        case FunctionCall():
            return "fc"
        case FunctionCallOutput():
            return "fco"
        case Reasoning():
            return "rs"
        case Compaction():
            return "cmp"
        case ItemReference():
            return "ref"
        case _:
            assert_never(item)
