"""From what a client names or repeats to what was really said: the tables first, then the manifests on disk.

Laws
    An output that the model sampled here is recalled with its exact ids, by the id of an item or a call, else by what
    it says. Over which API it was said, and over which it is repeated, makes no difference.
    Each response's output is recalled once, however the client's list cuts it up: the ids already cover all of it.
    Some APIs have ids for calls only. What stands beside a call, and was said with it, belongs to it.
    What cannot be recalled is kept as the client's JSON describes it. Only an id that must resolve is an error.
    A manifest that cannot be read is as good as absent.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from broker.errors import NotFound, UnknownResponse
from broker.session import Part, from_manifest
from broker.wire.items import (
    ClientGroup,
    FunctionCall,
    ItemReference,
    Message,
    content_digest,
    group_outputs,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from broker.access import Tenant
    from broker.session import ConnectionScope, Node, Sessions
    from broker.wire.items import Item
    from tiers.block import TokenIds
    from tiers.manifest import Manifest

log = logging.getLogger(__name__)

_LISTED = "item_"  # begins the ids of input items that clients sent without one


class Manifests(Protocol):
    """The part of the engine's service that remembers on disk."""

    async def find_response(self, tenant: str, response_id: str) -> Manifest | None: ...
    async def find_item(self, tenant: str, item_id: str) -> Manifest | None: ...
    async def find_content(self, tenant: str, digest: bytes) -> Manifest | None: ...
    async def find_session(self, tenant: str, session: str) -> Manifest | None: ...


@dataclass(frozen=True, slots=True)
class Recalled:
    """Client items as parts. `last` is the node of the last output among them, if it was recalled."""

    parts: tuple[Part, ...]
    starts: tuple[int, ...]  # of each part: the first of the client's items that it stands for
    last: Node | None


@dataclass(frozen=True, slots=True)
class Recall:
    """One tenant's view of everything that was said."""

    manifests: Manifests
    sessions: Sessions
    tenant: Tenant

    async def response(self, response_id: str) -> Node | None:
        """The stored response of this id."""
        node = self.sessions.known(self.tenant.name, response_id)
        if node is None:
            node = self._kept(await self.manifests.find_response(self.tenant.name, response_id))
        return node if node is not None and node.stored else None

    async def latest(self, labels: Iterable[str]) -> Node | None:
        """The newest turn of the session that goes by the first of these labels that is known."""
        for label in labels:
            node = self.sessions.latest(self.tenant.name, label)
            if node is None:
                node = self._kept(await self.manifests.find_session(self.tenant.name, label))
            if node is not None:
                return node
        return None

    async def item(self, item_id: str) -> Node | None:
        """The response that has this output item, or made the call of this id, stored or not."""
        node = self.sessions.find_item(self.tenant.name, item_id)
        if node is not None:
            return node
        return self._kept(await self.manifests.find_item(self.tenant.name, item_id))

    async def content(self, digest: bytes) -> tuple[Node, ...]:
        """The responses that say exactly this, newest first."""
        nodes = self.sessions.find_content(self.tenant.name, digest)
        if nodes:
            return nodes
        node = self._kept(await self.manifests.find_content(self.tenant.name, digest))
        return () if node is None else (node,)

    async def dereferenced(self, items: tuple[Item, ...]) -> tuple[Item, ...]:
        """The items, with references resolved to what is no output: to inputs of stored responses, by the ids under
        which they were listed, and to compactions, for what such an item covers must be known first."""
        found = []
        for item in items:
            listed: dict[str, Item] = {}
            if isinstance(item, ItemReference):
                node = None
                if item.id.startswith("cmp_"):
                    node = await self.item(item.id)
                elif item.id.startswith(_LISTED):
                    node = await self.response(item.id.removeprefix(_LISTED).rpartition("_")[0])
                listed = {} if node is None or not node.stored else dict(input_items(node))
            found.append(listed.get(item.id or "", item))
        return tuple(found)

    async def parts(
        self, items: Iterable[Item], *, prompt: Callable[[tuple[Part, ...]], TokenIds]
    ) -> Recalled:
        """What the client's list stands for. Raises NotFound for a reference to an item that is not stored.

        `prompt` gives the ids that would have been fed after some parts: it tells apart two responses that say the
        same in different tokens.
        """
        parts: list[Part] = []
        starts: list[int] = []
        last: Node | None = None
        recalled: set[str] = set()  # response ids
        seen = 0  # of the client's items
        for group in group_outputs(items):
            if isinstance(group, ClientGroup):
                starts.append(seen)
                parts.append(Part(group.items))
                seen += len(group.items)
                continue
            for node, run in await self._by_id(group.items):
                start, seen = seen, seen + len(run)
                if node is None:
                    node = await self._by_content(run, tuple(parts), prompt)
                elif node.response_id in recalled:
                    continue
                else:
                    recalled.add(node.response_id)
                last = node
                starts.append(start)
                parts.append(Part(run) if node is None else Part(node.output or run, node.sampled))
        return Recalled(tuple(parts), tuple(starts), last)

    async def _by_id(self, items: tuple[Item, ...]) -> list[tuple[Node | None, tuple[Item, ...]]]:
        """The items in order, cut into runs of one response's output; None for items with no id that we know."""
        runs: list[tuple[Node | None, list[Item]]] = []
        for item in items:
            node = None if item.id is None else await self.item(item.id)
            if node is None and isinstance(item, FunctionCall):
                node = await self.item(item.call_id)
            if isinstance(item, ItemReference) and (node is None or not node.stored):
                raise NotFound(
                    f"Item with id '{item.id}' not found.", code="item_not_found", param="input"
                )
            if runs and runs[-1][0] is node:
                runs[-1][1].append(item)
            else:
                runs.append((node, [item]))
        return _united([(node, tuple(run)) for node, run in runs])

    async def _by_content(
        self,
        items: tuple[Item, ...],
        before: tuple[Part, ...],
        prompt: Callable[[tuple[Part, ...]], TokenIds],
    ) -> Node | None:
        nodes = await self.content(content_digest(items))
        if len({node.sampled for node in nodes}) > 1:
            fed = prompt(before)
            nodes = tuple(n for n in nodes if n.tokens[: n.sampled_from] == fed) or nodes
        return nodes[0] if nodes else None

    def _kept(self, manifest: Manifest | None) -> Node | None:
        """The manifest's node, now in the tables."""
        if manifest is None:
            return None
        try:
            node = from_manifest(manifest)
        except ValueError as error:
            log.warning("forgot a manifest: %s", error)
            return None
        self.sessions.add(node)
        return node


_Run = tuple["Node | None", tuple["Item", ...]]
_REACH = (
    16  # items without ids beside one with an id that may belong to it; more is no output of ours
)


def _united(runs: list[_Run]) -> list[_Run]:
    """The same items, with those that have no id we know given to the response that said them beside one that has."""
    out: list[_Run] = []
    rest = list(runs)
    while rest:
        node, run = rest.pop(0)
        if node is None:
            out.append((node, run))
            continue
        while (
            len(rest) > 1 and rest[0][0] is None and rest[1][0] is node
        ):  # between two items of it
            run += rest.pop(0)[1] + rest.pop(0)[1]
        before = out.pop()[1] if out and out[-1][0] is None else ()
        after = rest.pop(0)[1] if rest and rest[0][0] is None else ()
        left, right = _reach(node, before, run, after)
        stranger, own = before[: len(before) - left], before[len(before) - left :]
        if stranger:
            out.append((None, stranger))
        out.append((node, own + run + after[:right]))
        if after[right:]:
            rest.insert(0, (None, after[right:]))
    return out


def _reach(
    node: Node, before: tuple[Item, ...], run: tuple[Item, ...], after: tuple[Item, ...]
) -> tuple[int, int]:
    """How many of the items before and after `run` the node said too.

    As many as make up what it said; where a client wrote that anew, as many messages as are missing.
    """
    for left in range(min(len(before), _REACH), -1, -1):
        for right in range(min(len(after), _REACH), -1, -1):
            whole = before[len(before) - left :] + run + after[:right]
            if content_digest(whole) == node.content:
                return left, right
    ids = {item.id for item in run} | {i.call_id for i in run if isinstance(i, FunctionCall)}
    missing = [i for i in node.output if isinstance(i, Message) and i.id not in ids]
    left = min(len(missing), len(before))
    return left, min(len(missing) - left, len(after))


def input_items(node: Node) -> list[tuple[str, Item]]:
    """What a response answered, each item under its id. One that came without has one by its place."""
    items = [item for part in node.history[:-1] for item in part.items]
    return [
        (item.id or f"{_LISTED}{node.response_id}_{place}", item)
        for place, item in enumerate(items)
    ]


async def continued(recall: Recall, connection: ConnectionScope, response_id: str) -> Node:
    """The response to continue: this connection's own, or a stored one. Raises UnknownResponse."""
    node = connection.find(recall.tenant.name, response_id) or await recall.response(response_id)
    if node is None:
        raise UnknownResponse(response_id)
    return node
