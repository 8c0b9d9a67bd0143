"""Conversation items: what clients put in `input`, what we put in `output`, and when two say the same.

Laws
    Parsing is total over what real clients replay: our own items byte for byte, the same items with ids
    stripped, bare `{role, content}` messages, content as a string or as parts, any extra fields.
    `content_digest` of a response's output equals that of any replay of it, over any API. It covers what was said
    (texts, call names, the JSON values of arguments, in order) and nothing that clients add, drop, renumber or
    write anew (ids, call ids, statuses, annotations, thoughts, how the text is cut into parts and messages and
    trimmed, how a call's arguments are spaced and sorted).
    Items keep the order they came in.

A run of assistant messages, calls and reasoning is one group: what one response produced, as far as the
client's list can say.
"""

from __future__ import annotations

import json
import struct
from base64 import b64decode, b64encode
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from broker.errors import BadRequest, UnsupportedContent
from broker.wire.fields import (
    as_object,
    invalid_type,
    invalid_value,
    join,
    missing,
    optional_array,
    optional_name,
    optional_string,
    required_name,
    required_string,
)
from broker.wire.json_in import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from broker.wire.fields import Json

Role = Literal["user", "assistant", "system", "developer", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """`text` is the parts' texts, joined. Role `tool` is the article's: a result that answers no call."""

    id: str | None
    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """`arguments` is the string as sampled, byte for byte; it need not be valid JSON."""

    id: str | None
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


@dataclass(frozen=True, slots=True)
class FunctionCallOutput:
    id: str | None
    call_id: str
    output: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """`text` is the content if the client kept it, else the summary. `encrypted` is opaque."""

    id: str | None
    text: str
    encrypted: str | None = None


@dataclass(frozen=True, slots=True)
class ItemReference:
    """Stands for the stored item with this id."""

    id: str


@dataclass(frozen=True, slots=True)
class Compaction:
    """A summary in the place of what was said; `broker/wire/window.py` reads it. It is spoken as a user's message."""

    id: str | None
    encrypted: str


Item = Message | FunctionCall | FunctionCallOutput | Reasoning | ItemReference | Compaction


@dataclass(frozen=True, slots=True)
class ClientGroup:
    """Consecutive items that the client made: its messages and its tools' results."""

    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class OutputGroup:
    """Consecutive items that a model made. A reference counts as one: only output items have ids of ours."""

    items: tuple[Item, ...]


def spoken_name(name: str, namespace: str | None) -> str:
    """What the model calls a function: two namespaces may hold the same name."""
    return name if namespace is None else f"{namespace}.{name}"


def parse_input(value: Json, *, at: str = "input") -> tuple[Item, ...]:
    """An `input` field: absent, a string (the empty one is no item), or an array. Raises BadRequest."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (Message(None, "user", value),)
    if not isinstance(value, list):
        raise invalid_type(at, "one of a string or array of objects", value)
    return parse_items(value, at=at)


def parse_items(values: Sequence[Json], *, at: str = "input") -> tuple[Item, ...]:
    """Items from a client's list, or from a response's own `output`. Raises BadRequest."""
    return tuple(_item(value, f"{at}[{index}]") for index, value in enumerate(values))


def group_outputs(items: Iterable[Item]) -> list[ClientGroup | OutputGroup]:
    """The items in order, cut where the author changes: no two neighbouring groups are of one kind."""
    groups: list[ClientGroup | OutputGroup] = []
    run: list[Item] = []
    for item in items:
        if run and is_output(item) != is_output(run[-1]):
            groups.append(_group(run))
            run = []
        run.append(item)
    if run:
        groups.append(_group(run))
    return groups


def is_output(item: Item) -> bool:
    """Whether a model made it."""
    match item:
        case Message():
            return item.role == "assistant"
        case FunctionCallOutput() | Compaction():
            return False
        case FunctionCall() | Reasoning() | ItemReference():
            return True


def ids_of(output: Iterable[Item]) -> tuple[str, ...]:
    """Every id by which a client may repeat these items: theirs, and their calls'. No two are equal."""
    ids: dict[str, None] = {}
    for item in output:
        if item.id is not None:
            ids[item.id] = None
        if isinstance(item, FunctionCall):
            ids[item.call_id] = None
    return tuple(ids)


def content_digest(items: Iterable[Item]) -> bytes:
    """32 bytes that name what one output group says. Client items in the list count for nothing.

    Layout hashed: for each run of message text, or call, a tag byte, then its strings, each framed by its length in
    bytes as u64 LE. Neighbouring messages are one run, white space is left out, and an empty text is none.
    Arguments that are JSON stand in one canonical form: keys sorted, no white space, whole numbers as integers.
    A reference is framed by its id, so it equals nothing but itself: resolve references first.
    """
    digest = blake2b(digest_size=32, person=b"homeport-out-2")
    text = ""
    for item in items:
        if isinstance(item, Message) and is_output(item):
            text += item.text
        elif framed := _framed_item(item):
            digest.update(_framed_text(text) + framed)
            text = ""
    digest.update(_framed_text(text))
    return digest.digest()


def _framed_item(item: Item) -> bytes:
    match item:
        case FunctionCall():
            name = spoken_name(item.name, item.namespace)
            return _framed(b"c", name, _canonical(item.arguments))
        case ItemReference():
            return _framed(b"i", item.id)
        case Message() | FunctionCallOutput() | Reasoning() | Compaction():
            return b""


def _framed_text(text: str) -> bytes:
    said = "".join(text.split())  # who trims messages that we join changes the white space inside
    return _framed(b"t", said) if said else b""


def _canonical(arguments: str) -> str:
    """A call's arguments as every client that means the same would write them; what is no JSON stays as it is."""
    try:
        value = parse_json(arguments)
    except BadRequest:
        return arguments
    return json.dumps(_whole(value), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _whole(value: Json) -> Json:
    """A JSON value whose whole numbers are integers: 1.0 and 1 are one number, and some languages write the latter."""
    match value:
        case float():
            return int(value) if value.is_integer() else value
        case list():
            return [_whole(inner) for inner in value]
        case dict():
            return {key: _whole(inner) for key, inner in value.items()}
        case _:
            return value


def _framed(tag: bytes, *strings: str) -> bytes:
    encoded = [string.encode() for string in strings]
    return tag + b"".join(struct.pack("<Q", len(string)) + string for string in encoded)


def _group(run: list[Item]) -> ClientGroup | OutputGroup:
    return OutputGroup(tuple(run)) if is_output(run[0]) else ClientGroup(tuple(run))


_TYPES = (
    "message",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "reasoning",
    "compaction",
    "item_reference",
)


def _item(value: Json, at: str) -> Item:
    obj = as_object(value, at)
    kind = optional_string(obj, "type", at=at)
    if kind is None:
        if "role" in obj:
            kind = "message"
        elif "id" in obj:
            kind = "item_reference"
        else:
            raise missing(join(at, "type"))
    item_id = optional_name(obj, "id", at=at)
    match kind:
        case "message":
            return Message(item_id, _role(obj, at), _text(obj, "content", at))
        case "function_call":
            return FunctionCall(
                item_id,
                required_name(obj, "call_id", at=at),
                required_name(obj, "name", at=at),
                required_string(obj, "arguments", at=at),
                optional_name(obj, "namespace", at=at),
            )
        case "custom_tool_call":
            return FunctionCall(
                item_id,
                required_name(obj, "call_id", at=at),
                required_name(obj, "name", at=at),
                json.dumps({"input": required_string(obj, "input", at=at)}, ensure_ascii=False),
                optional_name(obj, "namespace", at=at),
            )
        case "function_call_output" | "custom_tool_call_output":
            return FunctionCallOutput(
                item_id, required_name(obj, "call_id", at=at), _text(obj, "output", at)
            )
        case "reasoning":
            encrypted = optional_string(obj, "encrypted_content", at=at)
            return Reasoning(item_id or _unsealed(encrypted), _reasoning_text(obj, at), encrypted)
        case "compaction" | "compaction_summary":
            return Compaction(item_id, required_string(obj, "encrypted_content", at=at))
        case "item_reference":
            return ItemReference(required_name(obj, "id", at=at))
        case _:
            raise invalid_value(join(at, "type"), kind, _TYPES)


_ROLES: tuple[Role, ...] = ("user", "assistant", "system", "developer")


def _role(obj: dict[str, Json], at: str) -> Role:
    given = required_string(obj, "role", at=at)
    for role in _ROLES:
        if given == role:
            return role
    raise invalid_value(join(at, "role"), given, _ROLES)


def _text(obj: dict[str, Json], key: str, at: str) -> str:
    """A string, or parts that hold text, concatenated."""
    value = obj.get(key)
    path = join(at, key)
    if isinstance(value, str):
        return value
    if value is None:
        raise missing(path)
    if not isinstance(value, list):
        raise invalid_type(path, "one of a string or array of objects", value)
    return "".join(_part(part, f"{path}[{index}]") for index, part in enumerate(value))


_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
_UNREADABLE_PARTS = (
    *("input_image", "input_file", "input_audio", "input_video"),
    *("image_url", "file", "video_url"),  # their names in Chat Completions
)


def _part(value: Json, at: str) -> str:
    if isinstance(value, str):  # not in any schema, but several frameworks send it
        return value
    part = as_object(value, at)
    kind = required_string(part, "type", at=at)
    if kind in _UNREADABLE_PARTS:
        raise UnsupportedContent(
            f"Unsupported content: '{at}' is of type '{kind}', and this model reads text only.",
            param=at,
        )
    if kind not in _TEXT_PARTS:
        raise invalid_value(join(at, "type"), kind, _TEXT_PARTS)
    return required_string(part, "refusal" if kind == "refusal" else "text", at=at)


_SEAL = "homeport1."


def sealed(item_id: str) -> str:
    """A reasoning item's `encrypted_content`: opaque to clients, and all that leads back to its tokens is its id.

    Not a secret: an id finds something for its own tenant only.
    """
    return _SEAL + b64encode(item_id.encode()).decode()


def _unsealed(encrypted: str | None) -> str | None:
    """The id in what `sealed` made, for clients that strip ids; None for anybody else's."""
    if encrypted is None or not encrypted.startswith(_SEAL):
        return None
    try:
        return b64decode(encrypted.removeprefix(_SEAL), validate=True).decode() or None
    except ValueError:
        return None


def _reasoning_text(obj: dict[str, Json], at: str) -> str:
    for key in ("content", "summary"):
        parts = optional_array(obj, key, at=at)
        if parts:
            path = join(at, key)
            return "".join(
                required_string(as_object(part, f"{path}[{index}]"), "text", at=f"{path}[{index}]")
                for index, part in enumerate(parts)
            )
    return ""
