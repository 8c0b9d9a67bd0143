"""Which blocks are known, and which of them continue a prompt. Nothing here knows slots or copies.

{key: block} is the prefix tree: a key covers its parent's key, so a walk over a prompt's keys finds the longest chain
of whole blocks. {parent key: {first token: blocks}} finds, behind the last of them, the block that shares the most
tokens with what follows, be it a tail or a block that diverges midway: matching is token-granular.

Laws
    A block is known under its own key, once, and its parent is known too unless it is a root, was lost, or is on a
    disk that has not been read so far.
    A key alone is never believed: tokens and parent are compared on every hit, so even a hash that collided could not
    answer with another prompt's KV.
    A match is contiguous from the root and never covers the prompt's last token, whose logits must be computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tiers.block import Block, Tier, chain_key
from tiers.policy import SessionClass

if TYPE_CHECKING:
    from collections.abc import Collection

    from tiers.block import BlockKey, TokenIds


@dataclass(frozen=True, slots=True)
class Match:
    """What is known of a prompt. Good until the next call that changes the tables."""

    root: BlockKey
    blocks: tuple[Block, ...]  # whole ones, in chain order
    partial: Block | None  # the best continuation of them; `partial_rows` of its tokens are wanted
    partial_rows: int
    tokens: int  # all that is matched


class Adoptable(Protocol):
    """A record on disk, as a start learns of it."""

    @property
    def key(self) -> BlockKey: ...
    @property
    def root(self) -> BlockKey: ...
    @property
    def parent(self) -> BlockKey: ...
    @property
    def depth(self) -> int: ...
    @property
    def tokens(self) -> TokenIds: ...
    @property
    def last_used(self) -> float: ...


class Index:
    """Blocks by what they stand for."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._blocks: dict[BlockKey, Block] = {}
        self._children: dict[
            BlockKey, dict[int, list[Block]]
        ] = {}  # {parent: {first token: blocks}}
        self._lost: set[BlockKey] = set()  # keys that are not known though their children are

    @property
    def blocks(self) -> Collection[Block]:
        return self._blocks.values()

    def get(self, key: BlockKey) -> Block | None:
        return self._blocks.get(key)

    def find(self, parent: BlockKey, tokens: TokenIds) -> Block | None:
        """The block of `tokens` behind `parent`. One that has its key but is another is not it (see tiers/block.py)."""
        block = self._blocks.get(chain_key(parent, tokens))
        return block if block and (block.parent, block.tokens) == (parent, tokens) else None

    def siblings(self, block: Block) -> list[Block]:
        """Those that begin with the same token, the block itself included."""
        return self._children[block.parent][block.tokens[0]]

    def has_children(self, block: Block) -> bool:
        return block.key in self._children

    def children(self, block: Block) -> list[Block]:
        return [child for some in self._children.get(block.key, {}).values() for child in some]

    def match(self, root: BlockKey, tokens: TokenIds) -> Match:
        """The longest known prefix whose bytes are anywhere."""
        limit, size = len(tokens) - 1, self._block_tokens
        parent, at = root, 0
        blocks: list[Block] = []
        while at + size <= limit:
            block = self.find(parent, tokens[at : at + size])
            if block is None or not block.places:
                break
            blocks.append(block)
            parent, at = block.key, at + size
        partial, rows = self._continuation(parent, tokens[at : min(limit, at + size)])
        return Match(root, tuple(blocks), partial, rows, at + rows)

    def _continuation(self, parent: BlockKey, wanted: TokenIds) -> tuple[Block | None, int]:
        """The child of `parent` that shares the most tokens with `wanted`; of equals one that ends there, and near."""
        best, best_worth = None, (0, False, 0)
        for child in self._children.get(parent, {}).get(wanted[0], ()) if wanted else ():
            if child.places:
                rows = shared_prefix(child.tokens, wanted)
                worth = (rows, rows == len(child.tokens), -min(child.places))
                if best is None or worth > best_worth:
                    best, best_worth = child, worth
        return best, best_worth[0]

    def add(
        self, root: BlockKey, parent: BlockKey, tokens: TokenIds, *, depth: int, last_used: float
    ) -> Block:
        key = chain_key(parent, tokens)
        assert key not in self._blocks
        resting = SessionClass.CLOSED
        block = Block(
            key, root, parent, depth, tokens, last_used, resting, leases=[0] * len(SessionClass)
        )
        for children in self._children.get(key, {}).values():  # there before it
            for child in children:
                for tier in Tier:
                    block.kids[tier] += child.stays >> tier & 1
        self._blocks[key] = block
        self._children.setdefault(parent, {}).setdefault(tokens[0], []).append(block)
        self._lost.discard(key)
        return block

    def adopt(self, entry: Adoptable, *, last_used: float) -> Block:
        """Know a record. A tail that its session has outgrown, here or there, is worth least."""
        block = self.add(
            entry.root, entry.parent, entry.tokens, depth=entry.depth, last_used=last_used
        )
        if entry.depth and entry.parent not in self._blocks:
            self._lost.add(entry.parent)
        for sibling in self.siblings(block):
            if not any(sibling.leases) and not sibling.refs:
                superseded = self.is_superseded(sibling)
                sibling.resting = SessionClass.CLOSED if superseded else SessionClass.HUMAN_WAIT
        return block

    def remove(self, block: Block) -> None:
        """Forget a block. What continues it stays known, out of reach until the block comes back."""
        self._unlink(block)
        if block.key in self._children:
            self._lost.add(block.key)

    def _unlink(self, block: Block) -> None:
        del self._blocks[block.key]
        siblings = self._children[block.parent]
        siblings[block.tokens[0]].remove(block)
        if not siblings[block.tokens[0]]:
            del siblings[block.tokens[0]]
        if not siblings:
            del self._children[block.parent]
            self._lost.discard(block.parent)

    def is_superseded(self, tail: Block) -> bool:
        """Whether a longer block starts with all of a tail's tokens: the tail is what its session had before."""
        return any(
            len(other.tokens) > len(tail.tokens) == shared_prefix(other.tokens, tail.tokens)
            for other in self._children[tail.parent][tail.tokens[0]]
        )

    def check(self) -> None:
        for key, block in self._blocks.items():
            assert block.key == key
            assert block.depth == 0 or block.parent in self._blocks or block.parent in self._lost
            assert block in self._children[block.parent][block.tokens[0]]
        listed = sum(
            len(some) for children in self._children.values() for some in children.values()
        )
        assert len(self._blocks) == listed
        assert self._lost.isdisjoint(self._blocks)
        assert self._lost <= self._children.keys()


def shared_prefix(some: TokenIds, other: TokenIds) -> int:
    """Tokens that both begin with."""
    for at, (one, two) in enumerate(zip(some, other, strict=False)):
        if one != two:
            return at
    return min(len(some), len(other))
