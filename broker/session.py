"""Which exact tokens a response id, an item id or an answer's contents stand for. Pure tables: no clock, no waiting.

Laws
    Ids select, tokens decide. A node holds the ids that were fed and sampled; nothing a client sends changes them.
    Two lifetimes. An id of a `store: false` response answers only on its connection and only while it is its lane's
    latest; the node behind it stays in the tables, so that a replay of its items still finds the sampled tokens.
    A tenant finds its own nodes only. An id of another tenant and an id that never was are the same answer.
    The tables are a cache: the manifests on disk know the same. Forgetting a node is always legal.

    history     everything said so far, as parts; one part is what one author said in one go
    sampled     the ids that the model sampled for a part; the last part of a node's history is its own output

A node's tokens:   [0, sampled_from) was fed   [sampled_from, len) was sampled, stop id included
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, get_origin, get_type_hints

from broker.wire.items import (
    Compaction,
    FunctionCall,
    FunctionCallOutput,
    ItemReference,
    Message,
    Reasoning,
)
from broker.wire.requests import ToolKind, ToolSpec
from tiers.manifest import Manifest
from tiers.policy import SessionClass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.wire.items import Item
    from engine.api import LeaseId
    from tiers.block import BlockKey, TokenIds

_BODY_VERSION = 1
_ITEM_KINDS: dict[str, tuple[type[Item], dict[str, Any]]] = {  # {its name: (it, its fields' types)}
    c.__name__: (c, get_type_hints(c))
    for c in (Message, FunctionCall, FunctionCallOutput, Reasoning, ItemReference, Compaction)
}
_TOOL_TYPES: dict[str, Any] = {
    "name": str,
    "description": str | None,
    "parameters": dict | None,
    "strict": bool | None,
    "namespace": str | None,
    "grammar": str | None,
    "grammar_syntax": Literal["lark", "regex", None],
}
# A connection has at most this many lanes (32 named and the default one); each keeps one node, or two after a cancel.
_MAX_LEASES = 256


@dataclass(frozen=True, slots=True)
class Part:
    """What one author said. `sampled` is None for a client's items and for answers whose ids nobody knows any more."""

    items: tuple[Item, ...]
    sampled: TokenIds | None = None


@dataclass(slots=True, eq=False)
class Node:
    """One response. A warm-up is a node too: it has fed tokens and no sampled ones."""

    response_id: str
    tenant: str
    session: str  # names the lease for operators
    parent: str | None
    created_at: float  # seconds since the epoch
    stored: bool
    tokens: TokenIds
    sampled_from: int
    history: tuple[Part, ...]
    instructions: str | None
    tools: tuple[ToolSpec, ...]
    response: Mapping[str, Any] | None  # the finished response object; None unless stored
    item_ids: tuple[str, ...] = ()  # of the output: its items' and its calls'
    content: bytes = b""  # content_digest of the output; empty if there was none
    keys: tuple[BlockKey, ...] = ()
    labels: tuple[
        str, ...
    ] = ()  # under which clients ask for the session before they name a response
    truncated: bool = False  # its prompt left out the beginning of its history
    # What changes:
    lease: LeaseId | None = None  # None once another turn superseded it
    deleted: bool = False  # by its owner: not even its own connection may go on from it
    expected_at: float = -math.inf  # when its KV was last on the device, or asked to go there

    @property
    def sampled(self) -> TokenIds:
        return self.tokens[self.sampled_from :]

    @property
    def history_known(self) -> bool:
        """False for one from disk that was not stored: of that, only the ids are known."""
        return any(part.items for part in self.history)

    @property
    def output(self) -> tuple[Item, ...]:
        """Empty for a response that said nothing, and for one from disk that was not stored."""
        return self.history[-1].items


@dataclass(frozen=True, slots=True)
class SessionsStatistics:
    nodes: int
    tokens: int
    evictions: int


class Sessions:
    """The nodes of all tenants, least recently used first out. `max_tokens` bounds the sum of the nodes' lengths."""

    def __init__(self, *, max_nodes: int = 10_000, max_tokens: int = 8_000_000) -> None:
        self._max_nodes = max_nodes
        self._max_tokens = max_tokens
        self._nodes: OrderedDict[tuple[str, str], Node] = OrderedDict()  # (tenant, response id)
        self._by_item: dict[tuple[str, str], Node] = {}  # (tenant, item id)
        self._by_content: dict[tuple[str, bytes], list[Node]] = {}  # (tenant, digest): oldest first
        self._latest: dict[tuple[str, str], Node] = {}  # (tenant, label): its newest turn
        self._tokens = 0
        self._evictions = 0

    def add(self, node: Node) -> None:
        """Put a node in the tables, as the newest; a node of the same id is replaced."""
        self.forget(node.tenant, node.response_id)
        self._nodes[node.tenant, node.response_id] = node
        self._tokens += len(node.tokens)
        for item_id in node.item_ids:
            self._by_item[node.tenant, item_id] = node
        if node.content:
            self._by_content.setdefault((node.tenant, node.content), []).append(node)
        for label in node.labels:
            newest = self._latest.get((node.tenant, label))
            if newest is None or newest.created_at <= node.created_at:
                self._latest[node.tenant, label] = node
        while len(self._nodes) > self._max_nodes or self._tokens > self._max_tokens:
            self._evictions += 1
            self._remove(next(iter(self._nodes.values())))

    def find(self, tenant: str, response_id: str) -> Node | None:
        """The stored response of this id: what a client may name from any connection."""
        node = self.known(tenant, response_id)
        return node if node is not None and node.stored else None

    def known(self, tenant: str, response_id: str) -> Node | None:
        """The response of this id, stored or not."""
        return self._touched(self._nodes.get((tenant, response_id)))

    def find_item(self, tenant: str, item_id: str) -> Node | None:
        """The node that has this output item, stored or not."""
        return self._touched(self._by_item.get((tenant, item_id)))

    def find_content(self, tenant: str, digest: bytes) -> tuple[Node, ...]:
        """The nodes whose output says this, newest first."""
        return tuple(reversed(self._by_content.get((tenant, digest), ())))

    def latest(self, tenant: str, label: str) -> Node | None:
        """The newest turn of the session that clients call by this label."""
        return self._latest.get((tenant, label))

    def of_session(self, tenant: str, session: str) -> tuple[Node, ...]:
        """Every node of a session. Walks the whole table: for operators."""
        nodes = self._nodes.values()
        return tuple(n for n in nodes if (n.tenant, n.session) == (tenant, session))

    def newest(self) -> tuple[Node, ...]:
        """The newest node of every session, the session that was used last first. Walks the whole table: for operators."""
        names = dict.fromkeys((n.tenant, n.session) for n in reversed(self._nodes.values()))
        return tuple(self._latest[name] for name in names if name in self._latest)

    def forget(self, tenant: str, response_id: str) -> bool:
        node = self._nodes.get((tenant, response_id))
        if node is None:
            return False
        self._remove(node)
        return True

    def statistics(self) -> SessionsStatistics:
        return SessionsStatistics(len(self._nodes), self._tokens, self._evictions)

    def _touched(self, node: Node | None) -> Node | None:
        if node is not None:
            self._nodes.move_to_end((node.tenant, node.response_id))
        return node

    def _remove(self, node: Node) -> None:
        del self._nodes[node.tenant, node.response_id]
        self._tokens -= len(node.tokens)
        for item_id in node.item_ids:
            self._by_item.pop((node.tenant, item_id), None)
        if node.content:
            named = (node.tenant, node.content)
            self._by_content[named].remove(node)
            if not self._by_content[named]:
                del self._by_content[named]
        for label in node.labels:
            if self._latest.get((node.tenant, label)) is node:
                del self._latest[node.tenant, label]


class Landing(Protocol):
    """Something that will have happened."""

    async def wait(self) -> None: ...


@dataclass(frozen=True, slots=True)
class WarmUp:
    """A prefill under way."""

    tokens: TokenIds
    landed: Landing


class Reclasser(Protocol):
    def reclass(self, lease: LeaseId, to: SessionClass) -> None: ...


@dataclass(slots=True)
class ConnectionScope:
    """What may be continued on one connection whatever `store` says: the latest response of each lane.

    A transport without connections of its own (HTTP) gives each request a fresh scope and never closes it.
    """

    labels: tuple[str, ...] = ()  # what the handshake's headers call the session
    socket: bool = (
        False  # whether its end will be seen: only then is an open one known to be in a burst
    )
    warming: dict[str, WarmUp] = field(
        default_factory=dict
    )  # {warm-up's response id: its prefill}, oldest first
    _lanes: dict[str | None, tuple[Node, ...]] = field(
        default_factory=dict
    )  # {lane: latest and, if cut, the one before}
    _leases: OrderedDict[LeaseId, None] = field(default_factory=OrderedDict)

    def find(self, tenant: str, response_id: str) -> Node | None:
        for nodes in self._lanes.values():
            for node in nodes:
                if (node.tenant, node.response_id) == (tenant, response_id):
                    return None if node.deleted else node
        return None

    def remember(self, lane: str | None, node: Node) -> None:
        """`node` is now the only response of its lane that can be continued."""
        self._lanes[lane] = (node,)

    def remember_cut(self, lane: str | None, node: Node) -> None:
        """Like `remember`, but the client may also go on from before: it cancelled this one, perhaps unheard."""
        self._lanes[lane] = (*self._lanes.get(lane, ())[:1], node)

    def failed(self, lane: str | None, response_id: str | None) -> None:
        """A turn of `lane` that named `response_id` failed: the lane's own parent is gone, a fork's parent is not."""
        kept = tuple(n for n in self._lanes.get(lane, ()) if n.response_id != response_id)
        self._lanes[lane] = kept

    def leased(self, lease: LeaseId, superseded: LeaseId | None) -> None:
        """A turn of this connection ended in `lease`."""
        if superseded is not None:
            self._leases.pop(superseded, None)
        self._leases[lease] = None
        if len(self._leases) > _MAX_LEASES:
            self._leases.popitem(last=False)

    def close(self, engine: Reclasser) -> None:
        """The connection is gone: its ids with it, its KV not. Never waits."""
        for lease in self._leases:
            engine.reclass(lease, SessionClass.CLOSED)
        self._leases.clear()
        self._lanes.clear()
        self.warming.clear()


def to_manifest(node: Node) -> Manifest:
    """The durable record. What clients said is written only if they asked for storage; tokens always are."""
    return Manifest(
        response_id=node.response_id,
        tenant=node.tenant,
        session=node.session,
        parent=node.parent,
        created_at=node.created_at,
        stored=node.stored,
        tokens=node.tokens,
        sampled_from=node.sampled_from,
        item_ids=node.item_ids,
        content_digest=node.content,
        keys=node.keys,
        body=_encode_body(node) if node.stored else b"",
    )


def from_manifest(manifest: Manifest) -> Node:
    """The node again, without a lease. Raises ValueError for a body that this version did not write.

    Nothing behind a checksum is believed for its type: ids of another kind would stop the engine, not this turn.
    """
    try:
        body = json.loads(manifest.body) if manifest.body else _EMPTY_BODY
        if body["version"] != _BODY_VERSION:
            raise ValueError(f"body version {body['version']!r}")
        parts = tuple(_decode_part(part) for part in body["history"])
        tools = tuple(_decode_tool(tool) for tool in body["tools"])
        instructions = _typed(body["instructions"], str | None)
        response = _typed(body["response"], dict if manifest.stored else NoneType)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"manifest body of {manifest.response_id}: {error!r}") from error
    own = Part((), manifest.tokens[manifest.sampled_from :])
    return Node(
        response_id=manifest.response_id,
        tenant=manifest.tenant,
        session=manifest.session,
        parent=manifest.parent,
        created_at=manifest.created_at,
        stored=manifest.stored,
        tokens=manifest.tokens,
        sampled_from=manifest.sampled_from,
        history=parts or (own,),
        instructions=instructions,
        tools=tools,
        response=response,
        item_ids=manifest.item_ids,
        content=manifest.content_digest,
        keys=manifest.keys,
        labels=(manifest.session,),
        truncated=response is not None and "homeport:truncated" in response,
    )


_EMPTY_BODY: Mapping[str, Any] = {
    "version": _BODY_VERSION,
    "history": [],
    "tools": [],
    "instructions": None,
    "response": None,
}


def _encode_body(node: Node) -> bytes:
    body = {
        "version": _BODY_VERSION,
        "history": [
            {
                "items": [{"kind": type(item).__name__, **asdict(item)} for item in part.items],
                "sampled": part.sampled,
            }
            for part in node.history
        ],
        "tools": [{**asdict(tool), "kind": tool.kind.value} for tool in node.tools],
        "instructions": node.instructions,
        "response": node.response,
    }
    return json.dumps(body, separators=(",", ":")).encode()


def _decode_part(part: Any) -> Part:
    sampled = _typed(part["sampled"], list | None)
    ids = None if sampled is None else tuple(map(_token, sampled))
    return Part(tuple(map(_decode_item, part["items"])), ids)


def _decode_item(fields: Any) -> Item:
    kind, types = _ITEM_KINDS[fields["kind"]]
    return kind(**{n: _typed(value, types[n]) for n, value in fields.items() if n != "kind"})


def _decode_tool(fields: Any) -> ToolSpec:
    kind = ToolKind(fields["kind"])
    values = {n: _typed(value, _TOOL_TYPES[n]) for n, value in fields.items() if n != "kind"}
    return ToolSpec(**values, kind=kind)


def _typed(value: Any, kind: Any) -> Any:
    """`value`, if it is of this type, or one of the words of this Literal. Raises TypeError."""
    fits = value in get_args(kind) if get_origin(kind) is Literal else isinstance(value, kind)
    if not fits:
        raise TypeError(f"{type(value).__name__} where {kind} belongs")
    return value


def _token(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise TypeError(f"{value!r:.40} is no token id")
    return value
