"""Anthropic's prompt caching as bookkeeping: which blocks a request marked, and what its usage says was read and written.

Our KV is found by exact tokens and needs no marks: a prefix is reused wherever it matches. What is kept here decides
only how that is *said* to a client of the Messages API, and how long it asked for its prompt to be kept.

    block        a tool, a block of the system prompt, a block of a message: the places that can be marked, in that order
    breakpoint   a marked block; at most 4, the one of the automatic (top-level) `cache_control` included
    entry        what a breakpoint wrote: the name of everything up to it, its tokens, and until when it can be read

Laws
    A block's name covers everything that the prompt has before the block's end, in normalised form: a string and a list
    of one text are one content, and neighbouring messages of one role are one turn. Templates put the system prompt before the tools,
    so the name of a tool covers the whole system prompt, and that of a system block all tools.
    A breakpoint looks for entries at its own block and at most 19 before it. A prefix below `min_tokens` is neither
    written nor read, without an error.
    An entry can be read once the response that wrote it has begun, until its time after the start of the request that
    last wrote or read it is over. A tenant reads its own only, and its table is bounded: the oldest go first.
    No read is claimed that the engine did not give: the highest entry counts whose tokens it measured as cached. What
    was not read is written (up to the last breakpoint) or plain input (after it): the three sum to the prompt.
    Of what is written, the part up to the last 1-hour breakpoint is the hour's.
"""

from __future__ import annotations

import itertools
import struct
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from broker.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.wire.requests import Cut

MAX_BREAKPOINTS = 4
_WALK = 20  # blocks that a breakpoint looks at, itself included
_HOUR_S = 3600.0
_MAX_ENTRIES = 4096  # of one tenant: a thousand requests' worth, in under a MiB


@dataclass(frozen=True, slots=True)
class Block:
    """`ttl_s` is the client's own mark; None where it set none. What is not `cacheable` cannot bear one."""

    name: bytes
    cut: Cut
    path: str
    ttl_s: float | None
    cacheable: bool = True


@dataclass(frozen=True, slots=True)
class Breakpoint:
    block: int  # its index
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Layout:
    """A request's blocks by name, and its breakpoints in the blocks' order, each with its place in the prompt."""

    names: tuple[bytes, ...] = ()
    breakpoints: tuple[Breakpoint, ...] = ()
    cuts: tuple[Cut, ...] = ()

    @property
    def longest_s(self) -> float | None:
        """The longest time asked for; None if nothing is to be cached."""
        return max((one.ttl_s for one in self.breakpoints), default=None)


@dataclass(frozen=True, slots=True)
class InputUsage:
    """A prompt's tokens as the Messages API counts them: each in exactly one of these."""

    fresh: int  # after the last breakpoint
    read: int = 0
    written_5m: int = 0
    written_1h: int = 0

    @property
    def written(self) -> int:
        return self.written_5m + self.written_1h


def name_after(before: bytes, *strings: str) -> bytes:
    """The name of what `before` names and then these strings, each framed by its length."""
    digest = blake2b(before, digest_size=32, person=b"homeport-block-1")
    for string in strings:
        encoded = string.encode()
        digest.update(struct.pack("<Q", len(encoded)) + encoded)
    return digest.digest()


def lay_out(blocks: Sequence[Block], automatic_s: float | None) -> Layout:
    """The breakpoints that the client set, and the automatic one's if it asked for that. Raises BadRequest."""
    marked = {i: block.ttl_s for i, block in enumerate(blocks) if block.ttl_s is not None}
    last = max((i for i, block in enumerate(blocks) if block.cacheable), default=None)
    if automatic_s is not None and last is not None:
        of_last = marked.setdefault(last, automatic_s)
        if of_last != automatic_s:
            raise _refusal(
                "The automatic cache_control and that of the last cacheable block differ in ttl.",
                "cache_control.ttl",
            )
    if len(marked) > MAX_BREAKPOINTS:
        raise _refusal(
            f"A maximum of {MAX_BREAKPOINTS} blocks with cache_control may be provided."
            f" Found {len(marked)}.",
            "cache_control",
        )
    breakpoints = tuple(Breakpoint(i, ttl_s) for i, ttl_s in sorted(marked.items()))
    for before, after in itertools.pairwise(breakpoints):
        if after.ttl_s > before.ttl_s:
            raise _refusal(
                "A ttl='1h' cache_control block must not come after a ttl='5m' cache_control block."
                " Blocks are processed in the order 'tools', 'system', 'messages'.",
                f"{blocks[after.block].path}.cache_control.ttl",
            )
    cuts = tuple(blocks[one.block].cut for one in breakpoints)
    return Layout(tuple(block.name for block in blocks), breakpoints, cuts)


def _refusal(message: str, param: str) -> BadRequest:
    return BadRequest(message, code="invalid_value", param=param)


@dataclass(slots=True)
class _Entry:
    tokens: int
    ttl_s: float
    readable_until: float


class PromptCaches:
    """Every tenant's entries. Times are seconds on any one clock."""

    def __init__(self, *, min_tokens: int, max_entries: int = _MAX_ENTRIES) -> None:
        self._min_tokens = min_tokens
        self._max_entries = max_entries
        self._tenants: dict[str, OrderedDict[bytes, _Entry]] = {}  # least recently used first

    def begun(
        self,
        tenant: str,
        layout: Layout,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        ends: Sequence[int],
        started_at: float,
    ) -> InputUsage:
        """A response to `layout` has begun: what it read and wrote. Its entries can be read from now on.

        `ends` are the tokens of the prompt up to each breakpoint, `cached_tokens` what the engine did not compute.
        """
        entries = self._tenants.setdefault(tenant, OrderedDict())
        points = [
            (point, end)
            for point, end in zip(layout.breakpoints, ends, strict=True)
            if end >= self._min_tokens
        ]
        hits = {
            name: entry.tokens
            for point, _ in points
            for name in layout.names[max(0, point.block - _WALK + 1) : point.block + 1]
            if (entry := _readable(entries, name, started_at)) is not None
            and entry.tokens <= cached_tokens
        }
        read = 0
        if hits:
            best = max(hits, key=lambda name: hits[name])
            read = hits[best]
            self._write(entries, best, read, 0.0, started_at)  # read is as good as written again
        hour = max((end for point, end in points if point.ttl_s >= _HOUR_S), default=0)
        last = max((end for _, end in points), default=0)
        written_1h = max(0, hour - read)
        written_5m = max(0, last - read) - written_1h
        for point, end in points:
            self._write(entries, layout.names[point.block], end, point.ttl_s, started_at)
        fresh = prompt_tokens - read - written_1h - written_5m
        return InputUsage(fresh, read, written_5m, written_1h)

    def _write(
        self,
        entries: OrderedDict[bytes, _Entry],
        name: bytes,
        tokens: int,
        ttl_s: float,
        started_at: float,
    ) -> None:
        """Written over, an entry keeps the longer of both times, and its end if that is later."""
        old = _readable(entries, name, started_at)
        if old is not None:
            ttl_s = max(ttl_s, old.ttl_s)
        end = started_at + ttl_s
        entries[name] = _Entry(tokens, ttl_s, end if old is None else max(end, old.readable_until))
        entries.move_to_end(name)
        if len(entries) > self._max_entries:
            entries.popitem(last=False)


def _readable(entries: OrderedDict[bytes, _Entry], name: bytes, now: float) -> _Entry | None:
    entry = entries.get(name)
    if entry is not None and entry.readable_until <= now:
        del entries[name]
        return None
    return entry
