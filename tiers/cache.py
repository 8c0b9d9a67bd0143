"""TieredCache: which blocks are known, where their bytes are, who needs them, and what to move. Tables only.

May live here: bookkeeping in plain Python. May not: bytes, tensors, files, clocks (`now` is passed), waiting. Every
method decides at once and returns the actions to perform; the edge performs them in order and answers each with
`landed` or `failed`, at any later time and in any order. Issued is not landed: a slot that bytes travel to is arriving,
a block that they travel from or to is busy, and neither is used for anything else until the answer. Drops are the
exception: the one writer performs them in order with its spills, so their disk slot is free at once.

Laws, asserted by `check` and by the state machine in the tests
    Every slot is in exactly one of free, held, lent, arriving, and no two blocks share a place.
    `refs` is what the live holds hold; `leases` is what the leases cover. At rest both are zero.
    Nothing with refs or busy is evicted. A running hold's blocks stay where they are until it is released.
    A place holds its own key's bytes: a slot is written only while it is lent, or arriving for one copy.
    A block's last place is given up only when no block that continues it is kept. The one exception is not a
    choice: bytes that fail to load. The children stay, out of reach until the block is computed again.
    A block is loaded once, whoever else asks for it meanwhile.
    Dropping a block is always legal; a block is offered to `match` only if its bytes have landed somewhere.

How it works
    `Index` knows the blocks by key and finds the chain, and the part of a block behind it, that a prompt begins with.

    A hold is what one sequence has:      blocks (shared, immutable)  |  private slots (lent)
        tokens  0 ..................... len(blocks) * block_tokens | pending, not a whole block yet
    match -> acquire (refs; nothing can vanish now) -> load (actions) -> ready -> lend / commit ... -> release | lease.
    `commit` turns each private slot that is full into a block, or adopts the block that somebody else made of the
    same tokens. `release` does the same with the partial rest, the tail.

    A matched block whose bytes do not come, because its record is bad or it takes too long (`give_up`), is a hole: the
    hold's own sequence computes it, and only it. Until then it is in the index without a place, and nobody finds it.

    What a disk holds from before the start becomes known in slices, in any order (`adopt`); until all is read, the
    slots of the rest are set aside.

    A matched tail is taken over in place when nobody else needs it, else copied to a private slot. A lease keeps
    no refs: it raises the class of its blocks, and moves them down as it idles. Eviction is asked for by `make_room`,
    never hidden in `load` or `lend`; the order of victims is `tiers.policy`'s.

    A copy whose purpose goes away (its hold released, its block computed meanwhile) still lands; its slot is freed then.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiers.block import Copy, Drop, Fetch, Spill, Tier, chain_key
from tiers.hold import Flight, Hold, HoldState
from tiers.index import Index, Match, shared_prefix
from tiers.lease import Lease, Leases
from tiers.ledger import Ledger
from tiers.policy import SessionClass, SessionLru, session_class
from tiers.pool import PoolStatistics, SlotState
from tiers.residency import Residency

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from tiers.block import Action, Block, BlockKey, Slot, TokenIds
    from tiers.index import Adoptable
    from tiers.policy import Limits, Policy

__all__ = [
    "CacheStatistics",
    "Hold",
    "HoldState",
    "Lease",
    "Match",
    "TierStatistics",
    "TieredCache",
]

_DISK_FAULTS = ("io", "full")  # a disk that failed, not bytes that are wrong
_LONG_AGO_S = 1e10  # seconds; puts any time since the epoch before the process's own clock
RETRY_S = 0.5  # how soon to look again at a lease whose blocks are still on their way down; guessed


@dataclass(frozen=True, slots=True)
class TierStatistics:
    pool: PoolStatistics
    leased: int  # blocks here that a lease covers
    classes: dict[
        SessionClass, int
    ]  # {what they wait for: blocks here}; sums to what the pool holds
    refs: int  # by holds, to blocks here


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A snapshot; counters are since the start. Costs a walk over all blocks."""

    tiers: dict[Tier, TierStatistics]
    blocks: int
    holds: int
    refs: int
    leases: int
    dirty: int
    oldest_dirty: float | None  # since when the first block that is to be written waits
    flying: int
    evictions: dict[Tier, dict[str, int]]  # {tier: {cause: places given up}}
    pinned: int  # blocks that pins cover
    forgotten: int  # blocks that left their last place
    spill_failures: int
    load_failures: int  # copies and fetches whose bytes did not come, or were refused


class TieredCache:
    """The tables. Owned by one thread; see the module's laws."""

    def __init__(
        self,
        *,
        block_tokens: int,
        slots: Mapping[Tier, int],
        limits: Limits,
        policy: Policy | None = None,
    ) -> None:
        self.block_tokens = block_tokens
        self.limits = limits
        self._policy = policy or SessionLru()
        self._index = Index(block_tokens)
        self._where = Residency(self._index, slots, self._policy, limits.tenant_share)
        self._pools = self._where.pools
        self._ledger = Ledger()
        self._unread: list[Slot] = []  # disk slots of records that are not known yet
        # keys dropped while the index is being read: a slice may be older than that; None: it is not being read
        self._gone: set[BlockKey] | None = None
        self._dirty: dict[Block, float] = {}  # {neither on disk nor on the way: since when}
        self._flights: dict[Copy | Spill | Fetch, Flight] = {}
        self._holds: set[Hold] = set()
        self._leases = Leases()
        self._pins: dict[tuple[BlockKey, str], float] = {}  # {(root, session): until}
        # deleted, but for a copy still in flight: (keys to go, last first; keys to spare)
        self._deletions: list[tuple[Sequence[BlockKey], Collection[BlockKey]]] = []
        self._evictions: dict[Tier, Counter[str]] = {tier: Counter() for tier in Tier}
        self._forgotten = 0
        self._let_go_at = 0  # forgotten by then
        self._spill_failures = 0
        self._load_failures = 0

    # -- finding -----------------------------------------------------------------------------------------------------

    def match(self, root: BlockKey, tokens: TokenIds) -> Match:
        """The longest known prefix, wherever its bytes are, short of the last token."""
        return self._index.match(root, tokens)

    def explain(
        self, match: Match, tokens: TokenIds, *, supersedes: int | None = None
    ) -> dict[str, int]:
        """Why the tokens behind a match must be computed: {reason: tokens}, see `tiers.ledger`."""
        reasons: Counter[str] = Counter()
        last, size = len(tokens) - 1, self.block_tokens
        parent = match.blocks[-1].key if match.blocks else match.root
        at, begin = len(match.blocks) * size, match.tokens
        while at + size <= len(tokens):
            key = chain_key(parent, tokens[at : at + size])
            why = self._ledger.why(key)
            if why is None:
                break
            end = min(at + size, last)
            reasons[why] += end - begin
            parent, at, begin = key, at + size, end
        for rows in range(min(size - 1, last - at), begin - at, -1):  # a tail that was known
            why = self._ledger.why(chain_key(parent, tokens[at : at + rows]))
            if why is not None:
                reasons[why] += at + rows - begin
                begin = at + rows
                break
        changed = min(last - begin, self._changed(match, tokens, begin, supersedes))
        reasons["changed"] += changed
        reasons["new"] += last - begin - changed
        reasons["logits"] += 1
        return {why: count for why, count in reasons.items() if count}

    def _changed(self, match: Match, tokens: TokenIds, begin: int, supersedes: int | None) -> int:
        """How many tokens from `begin` on stand where the superseded turn had others."""
        lease = self._leases.get(supersedes)
        if lease is None:
            return 0
        same = 0
        for block in lease.blocks:
            ours = tokens[same : same + len(block.tokens)]
            if block.tokens != ours:
                same += shared_prefix(block.tokens, ours)
                break
            same += len(ours)
        length = sum(len(block.tokens) for block in lease.blocks)
        return max(0, length - max(begin, same)) if same < length else 0

    def acquire(self, match: Match, now: float, *, supersedes: int | None = None) -> Hold:
        """Take refs on everything matched, so that nothing of it can vanish.

        `supersedes` names the lease that the sequence continues: it does not stop the hold from taking its tail over.
        """
        hold = Hold(
            root=match.root,
            blocks=list(match.blocks),
            partial=match.partial,
            partial_rows=match.partial_rows,
            found=[(min(block.places), self.block_tokens) for block in match.blocks],
            block_tokens=self.block_tokens,
            supersedes=supersedes,
        )
        if match.partial is not None:
            hold.found.append((min(match.partial.places), match.partial_rows))
        for block in hold.referenced:
            assert self._index.get(block.key) is block
            self._reference(block)
            block.last_used = now
            self._reuse(block, now)
        self._holds.add(hold)
        self._follow_successors(hold, 1, now)
        return hold

    def _follow_successors(self, hold: Hold, change: int, now: float) -> None:
        superseded = self._leases.get(hold.supersedes)
        if superseded is not None:
            superseded.successors += change
            self._set_class(superseded, now)

    def credit(self, hold: Hold, ahead: Hold) -> None:
        """What a hold brought up ahead of another counts for that other as found where it was before."""
        pairs = zip(hold.blocks, ahead.blocks, strict=False)
        for at, (block, same) in enumerate(pairs):
            if block is same:
                tier, tokens = hold.found[at]
                hold.found[at] = (max(tier, ahead.found[at][0]), tokens)

    # -- loading -----------------------------------------------------------------------------------------------------

    def slots_to_load(self, hold: Hold) -> int:
        """Free device slots that `load` needs now."""
        absent = sum(map(_is_to_be_brought, hold.blocks))
        tail = hold.partial
        copied = tail is not None and bool(tail.places) and not self._may_take_over(hold, tail)
        return absent + copied

    def load(self, hold: Hold, now: float) -> list[Action] | None:
        """Bring everything matched to the device. None: too few free slots, and nothing has changed."""
        assert hold.state is HoldState.ACQUIRED
        if self.slots_to_load(hold) > self._pools[Tier.DEVICE].free:
            return None
        hold.state = HoldState.LOADING
        actions: list[Action] = []
        for block in filter(_is_to_be_brought, hold.blocks):
            slot = self._take(Tier.DEVICE)
            self._where.expect(block, Tier.DEVICE, slot)
            self._issue(actions, _bring(block, slot), Flight(block))
        if hold.partial is not None:
            if hold.partial.places:
                self._load_partial(hold, hold.partial, actions)
            else:
                self._truncate(hold, len(hold.blocks), self._why_lost(hold, hold.partial))
        return actions

    def _load_partial(self, hold: Hold, partial: Block, actions: list[Action]) -> None:
        hold.pending = list(partial.tokens[: hold.partial_rows])
        if self._may_take_over(hold, partial):
            slot = self._where.displace(partial, Tier.DEVICE)
            self._pools[Tier.DEVICE].move(slot, SlotState.HELD, SlotState.LENT)
        else:
            slot = self._take(Tier.DEVICE)
            hold.flight = Flight(partial, private=True, hold=hold)
            self._issue(actions, _bring(partial, slot), hold.flight)  # busy now: needs no ref
        hold.private.append(slot)
        hold.partial = None
        self._unreference(partial)

    def _may_take_over(self, hold: Hold, tail: Block) -> bool:
        """Whether writing on behind a tail, in its own slot, takes it from nobody. Its record on disk stays."""
        superseded = self._leases.get(hold.supersedes)
        mine = superseded is not None and tail in superseded.blocks[-1:]
        return (
            Tier.DEVICE in tail.places
            and Tier.DISK in tail.places
            and tail.refs == 1
            and not tail.busy
            and sum(tail.leases) == mine
            and hold.partial_rows == len(tail.tokens)
        )

    def forgo(self, hold: Hold, blocks: int, reason: str, now: float) -> None:
        """Reuse only the first `blocks` whole blocks: to restore the rest would take longer than to compute it."""
        assert hold.state is HoldState.ACQUIRED
        self._truncate(hold, blocks, reason)

    def ready(self, hold: Hold) -> bool:
        """Whether nothing of this hold is in flight. What did not come are its holes: look at `todo`."""
        if hold.state is HoldState.RUNNING:
            return True
        assert hold.state is HoldState.LOADING
        while hold.landed < len(hold.blocks):
            if Tier.DEVICE in hold.blocks[hold.landed].arriving:
                return False
            hold.landed += 1
        if hold.flight is not None:
            return False
        self._run(hold, "io_failed")
        return True

    def give_up(self, hold: Hold, now: float) -> None:
        """The load takes too long: run, and compute what has not landed. What lands later is nobody's loss."""
        assert hold.state is HoldState.LOADING
        if hold.flight is not None:
            self._truncate(hold, len(hold.blocks), "slow")
        self._run(hold, "slow")

    def _run(self, hold: Hold, reason: str) -> None:
        """Whatever is not on the device by now is a hole. `reason` is why, where nothing better is known."""
        hold.state = HoldState.RUNNING
        for at, block in enumerate(hold.blocks):
            if Tier.DEVICE not in block.places:
                hold.holes.append(at)
                tier, tokens = hold.found[at]
                hold.found[at] = (tier, 0)
                hold.missed[hold.failures.get(block, reason)] += tokens
        hold.failures.clear()
        self._extend_table(hold)

    def _why_lost(self, hold: Hold, block: Block) -> str:
        return hold.failures.get(block, "io_failed")

    def _truncate(self, hold: Hold, blocks: int, reason: str) -> None:
        """Give back all behind the first `blocks` blocks, the partial's copy included; they will be computed."""
        if hold.pending:  # private[0] is the partial's
            self._give_private(hold)
            hold.pending.clear()
        hold.missed[reason] += sum(tokens for _, tokens in hold.found[blocks:])
        given = hold.referenced[blocks:]
        hold.partial = None
        del hold.blocks[blocks:], hold.found[blocks:]
        for block in given:
            self._unreference(block)

    def _reference(self, block: Block) -> None:
        block.refs += 1
        if block.offered:
            self._where.weigh(block)

    def _unreference(self, block: Block) -> None:
        block.refs -= 1
        if not block.refs:
            self._where.weigh(block)
            self._settle(block)

    def _reuse(self, block: Block, now: float) -> None:
        """Somebody came back for it: to a policy that may be worth something."""
        if block.unwanted:
            block.unwanted = False
            self._note_dirty(block, now)
        other = self._policy.used(block)
        if other is not None:
            self._where.weigh(other)

    def _give_private(self, hold: Hold) -> None:
        slot = hold.private.pop(0)
        if hold.flight is None:
            self._pools[Tier.DEVICE].give(slot, SlotState.LENT)
        else:  # the copy still lands: its slot is freed then
            hold.flight.hold = None
            hold.flight = None

    # -- computing ---------------------------------------------------------------------------------------------------

    def missing_slots(self, hold: Hold, end: int) -> int:
        """Free device slots that `lend` needs so that tokens up to `end` can be written."""
        holes, behind = self._wanted(hold, end)
        return holes + behind

    def _wanted(self, hold: Hold, end: int) -> tuple[int, int]:
        """Slots still to lend before tokens up to `end` can be written: for holes, and behind the blocks."""
        blocks = -(-end // self.block_tokens)
        holes = sum(hole < blocks for hole in hold.holes[len(hold.hole_slots) :])
        return holes, max(0, blocks - len(hold.blocks) - len(hold.private))

    def lend(self, hold: Hold, end: int, now: float) -> bool:
        """Give a hold device slots to write tokens up to `end`. False: too few are free, and nothing has changed."""
        assert hold.state is HoldState.RUNNING
        holes, behind = self._wanted(hold, end)
        pool = self._pools[Tier.DEVICE]
        if holes + behind > pool.free:
            return False
        for slots, count in ((hold.hole_slots, holes), (hold.private, behind)):
            for _ in range(count):
                slot = pool.take(SlotState.LENT)
                assert slot is not None
                slots.append(slot)
        self._extend_table(hold)
        return True

    def _extend_table(self, hold: Hold) -> None:
        """As far as every slot before is known."""
        lent = dict(zip(hold.holes, hold.hole_slots, strict=False))
        for at in range(len(hold.table), len(hold.blocks)):
            if at in lent:
                hold.table.append(lent[at])
            elif at in hold.holes:
                return
            else:
                hold.table.append(hold.blocks[at].places[Tier.DEVICE])
        hold.table += hold.private[len(hold.table) - len(hold.blocks) :]

    def commit(self, hold: Hold, tokens: TokenIds, now: float) -> None:
        """The KV of `tokens` now stands in the lent slots, the holes' first. Full slots become blocks."""
        assert hold.state is HoldState.RUNNING
        while hold.holes and tokens:
            taken = tokens[: self.block_tokens - hold.hole_rows]
            hole = hold.blocks[hold.holes[0]]
            assert hole.tokens[hold.hole_rows : hold.hole_rows + len(taken)] == taken
            hold.hole_rows += len(taken)
            tokens = tokens[len(taken) :]
            if hold.hole_rows == self.block_tokens:
                self._fill_hole(hold, now)
        hold.pending += tokens
        assert len(hold.pending) <= len(hold.private) * self.block_tokens
        while len(hold.pending) >= self.block_tokens:
            block = self._publish(hold, tuple(hold.pending[: self.block_tokens]), now)
            hold.table[len(hold.blocks)] = block.places[Tier.DEVICE]
            self._reference(block)
            hold.blocks.append(block)
            del hold.pending[: self.block_tokens]

    def _fill_hole(self, hold: Hold, now: float) -> None:
        at, slot = hold.holes.pop(0), hold.hole_slots.pop(0)
        hold.hole_rows = 0
        self._give_key(hold.blocks[at], slot, now)
        hold.table[at] = hold.blocks[at].places[Tier.DEVICE]

    def _publish(self, hold: Hold, tokens: TokenIds, now: float) -> Block:
        """Give the hold's first private slot its key."""
        slot = hold.private.pop(0)
        parent = hold.blocks[-1].key if hold.blocks else hold.root
        block = self._index.find(parent, tokens)
        if block is None:
            block = self._index.add(
                hold.root, parent, tokens, depth=len(hold.blocks), last_used=now
            )
        self._give_key(block, slot, now)
        return block

    def _give_key(self, block: Block, slot: Slot, now: float) -> None:
        """A computed slot is this block's. If the block is on the device already, the slot is not needed."""
        block.last_used = now
        if Tier.DEVICE in block.places:
            self._pools[Tier.DEVICE].give(slot, SlotState.LENT)
            self._where.reweigh((block,))
            return
        self._ledger.clear(block.key)
        self._where.expect_no_more(block, Tier.DEVICE)  # who waits for a copy in flight has it now
        self._pools[Tier.DEVICE].move(slot, SlotState.LENT, SlotState.HELD)
        self._where.place(block, Tier.DEVICE, slot)
        self._note_dirty(block, now)

    # -- ending ------------------------------------------------------------------------------------------------------

    def release(self, hold: Hold, now: float) -> None:
        """The sequence ends or is preempted. Its tail becomes a block; what it did not fill is free."""
        self._end_hold(hold, now)

    def _end_hold(self, hold: Hold, now: float) -> tuple[Block, ...]:
        """The hold's chain, no longer referenced by it."""
        assert hold.state is not HoldState.RELEASED
        if hold.flight is not None:
            self._give_private(hold)
            hold.pending.clear()
        if hold.state is HoldState.RUNNING:
            chain = hold.blocks[: hold.holes[0]] if hold.holes else list(hold.blocks)
        else:
            chain = list(itertools.takewhile(lambda block: block.places, hold.blocks))
        if hold.pending and len(chain) == len(hold.blocks):
            chain.append(self._publish(hold, tuple(hold.pending), now))
        for slot in (*hold.hole_slots, *hold.private):
            self._pools[Tier.DEVICE].give(slot, SlotState.LENT)
        for block in hold.referenced:
            block.last_used = now
            self._unreference(block)
        hold.state = HoldState.RELEASED
        self._holds.discard(hold)
        self._follow_successors(hold, -1, now)
        return tuple(chain)

    def lease(
        self,
        hold: Hold,
        lease_id: int,
        session: str,
        now: float,
        supersedes: int | None,
        *,
        keep_until: float = 0.0,
    ) -> tuple[BlockKey, ...]:
        """Release a hold and keep its chain warm as a lease of class BURST; the keys of that chain, tail included.

        The superseded lease ends: what is only its own is worth least from now on. If it ended before, no matter.
        Until `keep_until` the chain counts as in a burst, whatever is said of it, and does not sink to disk only.
        """
        chain = self._end_hold(hold, now)
        last = chain[-1].key if chain else None
        lease = Lease(lease_id, hold.root, session, chain, now, last, keep_until=keep_until)
        lease.first = supersedes is None
        self._leases.add(lease)
        for block in lease.blocks:
            block.kept_until = max(block.kept_until, keep_until)
        self._set_class(lease, now)
        self._where.reweigh(lease.blocks)
        self._leases.schedule(lease, self._next_look(lease, now))
        superseded = self._leases.get(supersedes)
        if superseded is not None:
            self._end_lease(superseded, SessionClass.CLOSED)
            for tail in superseded.blocks[-1:]:
                self._thin_out(tail, now)
        return tuple(block.key for block in lease.blocks)

    def _end_lease(self, lease: Lease, resting: SessionClass) -> None:
        self._leases.end(lease, resting)
        self._where.reweigh(lease.blocks)

    def _set_class(self, lease: Lease, now: float) -> None:
        """Put in effect what the session's class is by now."""
        pinned = self._pins.get((lease.root, lease.session), -math.inf) > now
        if pinned and (
            lease.session_class is SessionClass.PINNED
            or len(self._leases.pinned() | set(lease.blocks)) <= self.pin_quota
        ):
            to = SessionClass.PINNED
        elif lease.successors:
            to = SessionClass.CLOSED
        elif lease.keep_until > now:
            to = max(lease.asked, SessionClass.BURST)
        elif lease.first and lease.asked is SessionClass.HUMAN_WAIT and self._is_unproven(lease):
            to = SessionClass.CLOSED
        else:
            to = self._decayed(lease.asked, now - lease.idle_since)
        if to is not lease.session_class:
            self._leases.reclass(lease, to)
            self._where.reweigh(lease.blocks)

    def _is_unproven(self, lease: Lease) -> bool:
        return self.limits.probation and not lease.keep_until

    def _decayed(self, asked: SessionClass, idle_s: float) -> SessionClass:
        if idle_s >= self.limits.protect_s.get(asked, math.inf):
            return (
                SessionClass.HUMAN_WAIT if asked > SessionClass.HUMAN_WAIT else SessionClass.CLOSED
            )
        return asked

    def _next_look(self, lease: Lease, now: float) -> float:
        """When something about an idle lease will change by itself."""
        limits, since = self.limits, lease.idle_since
        times = (
            since + limits.host_after_s,
            since + limits.disk_after_s,
            since + limits.protect_s.get(lease.asked, math.inf),
            lease.keep_until,
            self._pins.get((lease.root, lease.session), -math.inf),
        )
        return min((time for time in times if time > now), default=math.inf)

    def _thin_out(self, tail: Block, now: float) -> None:
        """A tail that grew is not worth memory: its successor has its bytes too. A record stays until there is need."""
        needed = tail.refs or tail.busy or any(tail.leases) or not tail.places
        if needed or not self._index.is_superseded(tail):
            return
        if Tier.DISK not in tail.places:
            self._forget(tail, [], "superseded")
        else:
            self._sink(tail, Tier.DISK, now, [])

    def reclass(self, lease_id: int, to: SessionClass, now: float) -> None:
        """Say what a session waits for. Of a lease that has ended meanwhile, nothing is left to say."""
        assert to is not SessionClass.PINNED, "that is what `pin` is for"
        lease = self._leases.get(lease_id)
        if lease is not None:
            lease.asked = to
            self._set_class(lease, now)
            self._leases.schedule(lease, min(lease.due, self._next_look(lease, now)))

    def leases(self) -> Iterable[Lease]:
        return self._leases.all

    # -- pins and deletion -------------------------------------------------------------------------------------------

    @property
    def pin_quota(self) -> int:
        """Blocks that all pins together may cover."""
        tier = Tier.HOST if self._pools[Tier.HOST].capacity else Tier.DEVICE
        return math.floor(self.limits.pins * self._pools[tier].capacity)

    def pin(self, root: BlockKey, session: str, until: float, now: float) -> int | None:
        """Keep a session's leases on the device or the host until then. The blocks covered; 0: it has no lease.

        None: all pins together would cover more than their quota, and nothing has changed. A pin covers the session's
        later turns too, as long as the quota has room for them.
        """
        leases = [x for x in self._leases.all if (x.root, x.session) == (root, session)]
        blocks = {block for lease in leases for block in lease.blocks if block.places}
        if len(self._leases.pinned() | blocks) > self.pin_quota:
            return None
        if blocks:
            self._pins[root, session] = until
            self._follow_pin(leases, now)
        return len(blocks)

    def unpin(self, root: BlockKey, session: str, now: float) -> bool:
        """End a pin; False if there was none."""
        existed = self._pins.pop((root, session), None) is not None
        leases = [x for x in self._leases.all if (x.root, x.session) == (root, session)]
        self._follow_pin(leases, now)
        return existed

    def pins(self, now: float) -> dict[tuple[BlockKey, str], tuple[float, int]]:
        """{(root, session): (until, blocks covered)}"""
        self._pins = {name: until for name, until in self._pins.items() if until > now}
        covered: dict[tuple[BlockKey, str], set[Block]] = {name: set() for name in self._pins}
        for lease in self._leases.all:
            if lease.session_class is SessionClass.PINNED:
                covered.setdefault((lease.root, lease.session), set()).update(lease.blocks)
        return {name: (until, len(covered[name])) for name, until in self._pins.items()}

    def _follow_pin(self, leases: list[Lease], now: float) -> None:
        for lease in leases:
            self._set_class(lease, now)
            self._leases.schedule(lease, min(lease.due, self._next_look(lease, now)))

    def forget_chain(
        self, keys: Sequence[BlockKey], shared: Collection[BlockKey], now: float
    ) -> list[Action]:
        """A response was deleted: its blocks leave every tier, last first, but not what anybody else needs.

        Needed is what is `shared` (with the response before it), what a hold or another lease has, and what a block
        that stays continues. A block that a copy reads or writes goes when that has ended.
        """
        for lease in [x for x in self._leases.all if x.tail in keys[-1:]]:
            self._end_lease(lease, SessionClass.CLOSED)
        self._deletions.append((keys[::-1], frozenset(shared)))
        actions: list[Action] = []
        self._go_on_deleting(actions)
        return actions

    def _go_on_deleting(self, actions: list[Action]) -> None:
        deletions, self._deletions = self._deletions, []
        for keys, shared in deletions:
            for at, key in enumerate(keys):
                block = self._index.get(key)
                if key in shared or (block is not None and self._is_needed(block)):
                    break
                if block is None:
                    if self._gone is not None:  # perhaps on a part of the disk not known yet
                        self._drop_record(key, actions)
                elif block.busy:
                    self._deletions.append((keys[at:], shared))
                    break
                else:
                    self._forget(block, actions, "deleted")

    def _is_needed(self, block: Block) -> bool:
        return bool(block.refs) or any(block.leases) or self._index.has_children(block)

    # -- moving down -------------------------------------------------------------------------------------------------

    @property
    def free_slots(self) -> int:
        return self._pools[Tier.DEVICE].free

    @property
    def leaving_slots(self) -> int:
        """Device slots that copies in flight are about to free."""
        return sum(
            Tier.DEVICE in flight.vacate
            and Tier.DEVICE in flight.block.places
            and not flight.block.refs
            for flight in self._flights.values()
        )

    def make_room(
        self, slots: int, now: float, *, below: SessionClass | None = None
    ) -> list[Action]:
        """Begin to free device slots until `slots` are free or about to be, as far as there are victims.

        Only of classes `below` the given one, for a purpose that is not worth more.

        A victim goes to the host tier, unless it is there already. Without room there it is freed at once if it is
        on disk, and else forgotten with all that continues it.

        One call may not be enough, because a block cannot be forgotten while what continues it is on its way to the
        host. Call again when that has landed; each call gets further, until there is nothing left to evict.
        """
        actions: list[Action] = []
        missing = slots - self.free_slots - self.leaving_slots
        if missing <= 0:
            return actions
        passed_over: list[Block] = []
        while missing > 0 and (found := self._where.worst(Tier.DEVICE)) is not None:
            block, cause = found
            if below is not None and session_class(block) >= below:
                break
            if self._leave_device(block, cause, now, actions):
                missing -= 1
            else:
                self._where.set_aside(block, Tier.DEVICE)
                passed_over.append(block)
        for block in passed_over:
            self._where.weigh(block)
        return actions

    def _leave_device(self, block: Block, cause: str, now: float, actions: list[Action]) -> bool:
        if Tier.HOST in block.places:
            self._vacate(block, Tier.DEVICE, cause)
            return True
        if self._copy_to_host(block, cause, now, actions):
            return True
        if Tier.DISK in block.places:
            self._vacate(block, Tier.DEVICE, cause)
            return True
        return self._forget_with_descendants(block, actions, cause)

    def write_behind(self, now: float, *, all_dirty: bool = False) -> list[Action]:
        """Spill what has waited for `max_lag_s`, or all that is dirty. Parents go before their children."""
        until = math.inf if all_dirty else now
        late = itertools.takewhile(
            lambda block: self._dirty[block] + self.limits.max_lag_s <= until, self._dirty
        )
        actions: list[Action] = []
        for block in list(late):
            self._spill(block, now, actions)
        return actions

    def tick(self, now: float) -> list[Action]:
        """Move idle leases down, and what stands above a tier's high watermark.

        A lease ends when all that is its own is on disk only, or nowhere.
        """
        actions: list[Action] = []
        self._go_on_deleting(actions)
        self._let_leases_go()
        while (lease := self._leases.pop_due(now)) is not None:
            self._set_class(lease, now)
            self._sink_lease(lease, now, actions)
        for tier, marks in self.limits.watermarks.items():
            pool = self._pools[tier]
            if pool.capacity - pool.free > marks.high * pool.capacity:
                self._empty_to(tier, math.floor(marks.low * pool.capacity), now, actions)
        return actions

    def _let_leases_go(self) -> None:
        """Once as many blocks were forgotten as are known: leases hold no more than that of what is nowhere."""
        if self._forgotten - self._let_go_at > len(self._index.blocks):
            self._let_go_at = self._forgotten
            for lease in self._leases.let_go(lambda block: self._index.get(block.key) is block):
                self._leases.end(lease, SessionClass.CLOSED)

    def _empty_to(self, tier: Tier, slots: int, now: float, actions: list[Action]) -> None:
        """Ahead of need, until so many are taken; but nothing that the disk has still to get is forgotten for it."""
        pool = self._pools[tier]
        if tier is Tier.DEVICE:
            actions += self.make_room(pool.capacity - slots, now)
            return
        while pool.capacity - pool.free > slots and (found := self._where.worst(tier)) is not None:
            block, cause = found
            if tier is Tier.HOST and len(block.places) == 1 and self._pools[Tier.DISK].capacity:
                return
            self._evict(block, tier, cause, now, actions)

    def next_event(self, now: float) -> float | None:
        """When `tick` or `write_behind` will have something to do if nothing else happens."""
        oldest = next(iter(self._dirty.values()), math.inf)
        soonest = min(oldest + self.limits.max_lag_s, self._leases.next_due())
        return soonest if soonest < math.inf else None

    def demote(
        self, to: Tier, session: str | None, now: float, *, root: BlockKey | None = None
    ) -> list[Action]:
        """Move one session down now, except what others share with it; or everything that no hold holds.

        Without a `root`: the sessions of that name, whoever's they are. What a pin covers stays in memory.
        """
        assert to is not Tier.DEVICE
        assert root is None or session is not None
        actions: list[Action] = []
        leases = [
            lease
            for lease in self._leases.all
            if session in (None, lease.session) and root in (None, lease.root)
        ]
        mine = Counter(block for lease in leases for block in lease.blocks)
        for block in list(self._index.blocks) if session is None else list(mine):
            pinned = to is Tier.DISK and block.leases[SessionClass.PINNED]
            if sum(block.leases) == mine[block] and not pinned:
                self._sink(block, to, now, actions)
        for lease in leases:
            lease.target = max(lease.target, to)
            self._leases.schedule(lease, now)
        return actions

    def _sink_lease(self, lease: Lease, now: float, actions: list[Action]) -> None:
        if now >= lease.idle_since + self.limits.disk_after_s:
            lease.target = Tier.DISK
        elif now >= lease.idle_since + self.limits.host_after_s:
            lease.target = max(lease.target, Tier.HOST)
        kept = lease.keep_until > now or lease.session_class is SessionClass.PINNED
        target = min(lease.target, Tier.HOST) if kept else lease.target
        own = [block for block in lease.blocks if not block.refs and sum(block.leases) == 1]
        skipped = False
        if target is not Tier.DEVICE:
            skipped = any(
                block.busy and min(block.places, default=Tier.DISK) < target for block in own
            )
            for block in own:
                self._sink(block, target, now, actions)
        next_look = self._next_look(lease, now)
        if target is not Tier.DISK:
            self._leases.schedule(lease, min(next_look, now + RETRY_S) if skipped else next_look)
        elif all(block.places.keys() <= {Tier.DISK} for block in own):
            self._end_lease(lease, min(lease.session_class, SessionClass.HUMAN_WAIT))
        elif any(block.busy for block in own):
            self._leases.schedule(lease, now + RETRY_S)
        else:  # the disk has no room for it
            self._leases.schedule(lease, now + max(RETRY_S, self.limits.disk_after_s))

    def _sink(self, block: Block, to: Tier, now: float, actions: list[Action]) -> None:
        """Begin to move one block down to `to`, if nobody needs it where it is."""
        if block.refs or block.busy:
            return
        if to is Tier.DISK and Tier.DISK not in block.places:
            if block.places:
                block.unwanted = False
                self._note_dirty(block, now)
                self._spill(block, now, actions, vacate=(Tier.DEVICE, Tier.HOST))
            return
        absent = to is Tier.HOST and Tier.HOST not in block.places and Tier.DEVICE in block.places
        if absent and (
            self._copy_to_host(block, "demoted", now, actions) or len(block.places) == 1
        ):
            return
        for tier in [tier for tier in block.places if tier < to]:
            self._vacate(block, tier, "demoted")

    def _copy_to_host(self, block: Block, cause: str, now: float, actions: list[Action]) -> bool:
        """Begin to move a block from the device. False: no room on the host."""
        slot = self._make_slot(Tier.HOST, block, now, actions)
        if slot is None:
            return False
        self._where.expect(block, Tier.HOST, slot)
        copy = Copy(block.key, Tier.DEVICE, block.places[Tier.DEVICE], Tier.HOST, slot)
        self._issue(actions, copy, Flight(block, vacate=(Tier.DEVICE,), cause=cause))
        return True

    def _spill(
        self, block: Block, now: float, actions: list[Action], vacate: tuple[Tier, ...] = ()
    ) -> None:
        """Begin to write a dirty block behind its dirty ancestors. Without room it stays dirty, to be tried again."""
        chain: list[Block] = []
        above: Block | None = block
        while above is not None and above.places and (above in self._dirty or above.unwanted):
            above.unwanted = False
            chain.append(above)
            above = self._index.get(above.parent)
        while chain:
            dirty = chain.pop()
            self._dirty.pop(dirty, None)
            slot = self._make_slot(Tier.DISK, dirty, now, actions)
            if slot is None:
                for postponed in (dirty, *reversed(chain)):
                    self._dirty.pop(postponed, None)
                    self._dirty[postponed] = now
                return
            self._where.expect(dirty, Tier.DISK, slot)
            source = min(dirty.places)
            spill = Spill(
                key=dirty.key,
                root=dirty.root,
                parent=dirty.parent,
                depth=dirty.depth,
                tokens=dirty.tokens,
                source=source,
                source_slot=dirty.places[source],
                disk_slot=slot,
            )
            self._issue(actions, spill, Flight(dirty, vacate=vacate if dirty is block else ()))

    # -- evicting ----------------------------------------------------------------------------------------------------

    def _make_slot(
        self, tier: Tier, newcomer: Block, now: float, actions: list[Action]
    ) -> Slot | None:
        """An arriving slot of HOST or DISK, evicting if need be, but nothing that is worth more than the newcomer."""
        pool = self._pools[tier]
        slot = pool.take(SlotState.ARRIVING)
        if slot is not None:
            return slot
        self._where.announce(newcomer, tier)
        found = self._where.worst(tier, newcomer)
        while slot is None and found is not None:
            victim, cause = found
            self._evict(victim, tier, cause, now, actions)
            slot = pool.take(SlotState.ARRIVING)
            found = self._where.worst(tier, newcomer)
        self._where.announce_end(newcomer)
        return slot

    def _evict(
        self, block: Block, tier: Tier, cause: str, now: float, actions: list[Action]
    ) -> None:
        if len(block.places) == 1:
            self._forget(block, actions, self._with_expiry(block, cause, now))
        elif tier is Tier.DISK:
            self._drop(block, actions, cause)
            block.unwanted = True  # or it would be written, and dropped, again and again
        else:
            self._vacate(block, tier, cause)

    def _with_expiry(self, block: Block, cause: str, now: float) -> str:
        return "expired" if 0.0 < block.kept_until <= now else cause

    def _forget_with_descendants(self, block: Block, actions: list[Action], cause: str) -> bool:
        """Forget a victim and all that continues it, last first. False: something of it is in flight.

        Nobody holds a part of it: whoever refers to a block refers to all before it.
        """
        doomed = [block]
        for above in doomed:  # grows while it is walked
            doomed += self._index.children(above)
        if any(each.busy for each in doomed):
            return False
        for each in reversed(doomed):
            self._forget(each, actions, cause)
        return True

    def _forget(self, block: Block, actions: list[Action], cause: str) -> None:
        last = max(block.places, default=None)
        for tier in list(block.places):
            if tier is Tier.DISK:
                self._drop(block, actions, cause)
            else:
                self._vacate(block, tier, cause)
        assert not block.refs
        assert not block.busy
        assert not self._index.has_children(block)
        if last is None or cause == "deleted":
            self._ledger.note(block.key, cause)
        else:
            self._ledger.note(block.key, f"evicted_{last.name.lower()}_{cause}")
        self._remove(block)

    def _remove(self, block: Block) -> None:
        """A block that is nowhere is not known any more. Its children, if any, are out of reach until it is again."""
        self._index.remove(block)
        self._policy.left(block)
        self._dirty.pop(block, None)
        self._forgotten += 1
        parent = self._index.get(block.parent)
        if parent is not None:
            self._where.weigh(parent)

    def _vacate(self, block: Block, tier: Tier, cause: str) -> None:
        self._pools[tier].give(self._where.displace(block, tier), SlotState.HELD)
        self._evictions[tier][cause] += 1

    def _drop(self, block: Block, actions: list[Action], cause: str) -> None:
        self._drop_record(block.key, actions)
        self._vacate(block, Tier.DISK, cause)

    def _drop_record(self, key: BlockKey, actions: list[Action]) -> None:
        """What was read of the index before the drop is done may name it still: it is not adopted any more."""
        actions.append(Drop(key))
        if self._gone is not None:
            self._gone.add(key)

    # -- answers -----------------------------------------------------------------------------------------------------

    def landed(self, action: Action, now: float) -> None:
        """An action was performed: its bytes are where it said."""
        if isinstance(action, Drop):
            return
        flight = self._flights.pop(action)
        block = flight.block
        tier, slot = _target(action)
        self._end_flight(flight)
        if flight.private and flight.hold is not None:
            self._pools[tier].move(slot, SlotState.ARRIVING, SlotState.LENT)
            flight.hold.flight = None
        elif not flight.private and block.arriving.get(tier) == slot:
            self._where.expect_no_more(block, tier)
            self._pools[tier].move(slot, SlotState.ARRIVING, SlotState.HELD)
            self._where.place(block, tier, slot)
            self._note_dirty(block, now)  # its record may have failed for somebody else meanwhile
        else:  # nobody wants it any more
            self._pools[tier].give(slot, SlotState.ARRIVING)
        pinned = isinstance(action, Spill) and block.leases[SessionClass.PINNED]
        if not block.refs and not block.busy and not pinned:  # asked again: by now it may be needed
            for vacated in flight.vacate:
                if vacated in block.places:
                    self._vacate(block, vacated, flight.cause)
        self._settle(block)

    def _end_flight(self, flight: Flight) -> None:
        flight.block.busy -= 1
        if flight.vacate:
            flight.block.leaving = 0
        self._where.recount(flight.block)

    def failed(self, action: Action, now: float, reason: str) -> list[Action]:
        """An action was not performed; `reason` is a `StoreError`'s.

        Bytes that were refused are given up where they were read: a record is dropped, a slot on the host is freed.
        Whoever waited for them gets them from further down, or computes. A disk that merely failed (`io`, `full`) has
        lost nothing.
        """
        actions: list[Action] = []
        if isinstance(action, Drop):
            return actions
        flight = self._flights.pop(action)
        block = flight.block
        tier, slot = _target(action)
        self._end_flight(flight)
        self._note_failure(
            block, flight, "io_failed" if reason in _DISK_FAULTS else "verify_failed"
        )
        self._pools[tier].give(slot, SlotState.ARRIVING)
        if not flight.private and block.arriving.get(tier) == slot:
            self._where.expect_no_more(block, tier)
        source = Tier.DISK if isinstance(action, Fetch) else action.source
        if isinstance(action, Spill):
            self._spill_failures += 1
        else:
            self._load_failures += 1
        if reason not in _DISK_FAULTS and source in block.places:
            self._refuse_place(block, source, actions)
        wanted = not flight.private and tier is Tier.DEVICE and block.refs
        if isinstance(action, Copy) and wanted and _is_to_be_brought(block):
            slot = self._take(Tier.DEVICE)
            self._where.expect(block, Tier.DEVICE, slot)
            self._issue(actions, _bring(block, slot), Flight(block))
        self._note_dirty(block, now)
        self._settle(block)
        return actions

    def rotten(self, key: BlockKey, now: float, tier: Tier = Tier.DISK) -> list[Action]:
        """Somebody who looked says that the bytes in a tier are bad: they are given up there, and written again if the
        block is elsewhere.

        What a copy reads just now is left to that copy, which makes the same check, and what somebody holds on the
        device to him.
        """
        actions: list[Action] = []
        block = self._index.get(key)
        if block is None:
            if tier is Tier.DISK and self._gone is not None:  # not known yet
                self._drop_record(key, actions)
        elif tier in block.places and not block.busy and not (block.refs and tier is Tier.DEVICE):
            self._refuse_place(block, tier, actions)
            for hold in self._holds:
                if hold.state is not HoldState.RUNNING and block in hold.referenced:
                    hold.failures[block] = "verify_failed"
            self._note_dirty(block, now)
            self._settle(block)
        return actions

    def _refuse_place(self, block: Block, tier: Tier, actions: list[Action]) -> None:
        if tier is Tier.DISK:
            self._drop(block, actions, "rotten")
        elif not block.busy:  # else whoever reads it now makes the same check
            self._vacate(block, tier, "rotten")
        if not block.places:
            self._dirty.pop(block, None)

    def _note_failure(self, block: Block, flight: Flight, why: str) -> None:
        """Tell whoever may have to compute these bytes; a private copy of a tail is given up at once."""
        if flight.hold is not None:
            self._truncate(flight.hold, len(flight.hold.blocks), why)
        for hold in self._holds:
            if hold.state is not HoldState.RUNNING and block in hold.referenced:
                hold.failures[block] = why

    # -- the index ---------------------------------------------------------------------------------------------------

    def begin_adopting(self, records: int) -> None:
        """At start, once: so many records are on disk already. Their slots are set aside until `end_adopting`."""
        assert not self._index.blocks
        self._gone = set()
        self._unread = self._pools[Tier.DISK].take_many(records, SlotState.HELD)

    def adopt(self, entries: Iterable[Adoptable], now: float) -> list[Action]:
        """Records on disk become known, in any order. Drops: what is not what its key says, or is worth too little.

        `last_used` is another process's clock: only its order is kept, as times before anything that happens here.
        Which parents are roots is not known here, so a record whose parent is not there stays: it is reachable as soon
        as its parent is, and grows old otherwise. Before `begin_adopting` and after `end_adopting` nothing is adopted:
        the tables know better.
        """
        actions: list[Action] = []
        for entry in entries:
            if self._gone is None or entry.key in self._gone:
                continue
            known = self._index.get(entry.key)
            if known is not None and (Tier.DISK in known.places or Tier.DISK in known.arriving):
                continue
            if known is not None:
                block = known
                self._dirty.pop(known, None)
            elif (
                0 < len(entry.tokens) <= self.block_tokens
                and chain_key(entry.parent, entry.tokens) == entry.key
            ):
                block = self._index.adopt(entry, last_used=entry.last_used - _LONG_AGO_S)
                self._where.reweigh(self._index.siblings(block))
            else:
                self._drop_record(entry.key, actions)
                continue
            slot = self._adopted_slot(block, now, actions)
            if slot is not None:
                self._where.place(block, Tier.DISK, slot)
            else:
                self._drop_record(entry.key, actions)
                self._note_dirty(block, now)
                self._settle(block)
        return actions

    def _adopted_slot(self, block: Block, now: float, actions: list[Action]) -> Slot | None:
        if self._unread:
            return self._unread.pop()
        slot = self._make_slot(Tier.DISK, block, now, actions)
        unreachable = not block.places and not block.refs  # what continues it, so far
        if slot is None and unreachable and (children := self._index.children(block)):
            for child in children:  # rather these than it
                self._forget_with_descendants(child, actions, "capacity")
            slot = self._pools[Tier.DISK].take(SlotState.ARRIVING)
        if slot is not None:
            self._pools[Tier.DISK].move(slot, SlotState.ARRIVING, SlotState.HELD)
        return slot

    def end_adopting(self) -> None:
        """All that is on disk is known: what is left of the slots set aside is free."""
        self._gone = None
        while self._unread:
            self._pools[Tier.DISK].give(self._unread.pop(), SlotState.HELD)

    def _settle(self, block: Block) -> None:
        """After an answer or a release: a block whose bytes were bad, and are nowhere else, is lost."""
        if not block.places and not block.busy and not block.refs:
            self._ledger.note(block.key, "verify_failed")
            self._remove(block)

    def _note_dirty(self, block: Block, since: float) -> None:
        durable = Tier.DISK in block.places or Tier.DISK in block.arriving
        if block.places and not durable and not block.unwanted:
            self._dirty.setdefault(block, since)

    def _take(self, tier: Tier) -> Slot:
        slot = self._pools[tier].take(SlotState.ARRIVING)
        assert slot is not None
        return slot

    def _issue(self, actions: list[Action], action: Copy | Spill | Fetch, flight: Flight) -> None:
        assert action not in self._flights
        flight.block.busy += 1
        self._flights[action] = flight
        for tier in flight.vacate:
            flight.block.leaving |= 1 << tier
        self._where.recount(flight.block)
        actions.append(action)

    # -- looking -----------------------------------------------------------------------------------------------------

    def whereabouts(self, keys: Iterable[BlockKey]) -> Counter[Tier]:
        """{tier: tokens of these blocks there}; a block may be in several."""
        found: Counter[Tier] = Counter()
        for key in keys:
            block = self._index.get(key)
            if block is not None:
                for tier in block.places:
                    found[tier] += len(block.tokens)
        return found

    def statistics(self) -> CacheStatistics:
        blocks = self._index.blocks
        return CacheStatistics(
            tiers={
                tier: TierStatistics(
                    pool=self._pools[tier].statistics(),
                    leased=sum(any(block.leases) for block in self._where.residents[tier].values()),
                    classes=_by_class(self._where.residents[tier].values()),
                    refs=sum(block.refs for block in self._where.residents[tier].values()),
                )
                for tier in Tier
            },
            blocks=len(blocks),
            holds=len(self._holds),
            refs=sum(block.refs for block in blocks),
            leases=len(self._leases.all),
            dirty=len(self._dirty),
            oldest_dirty=next(iter(self._dirty.values()), None),
            flying=len(self._flights),
            evictions={tier: dict(self._evictions[tier]) for tier in Tier},
            pinned=len(self._leases.pinned()),
            forgotten=self._forgotten,
            spill_failures=self._spill_failures,
            load_failures=self._load_failures,
        )

    def check(self) -> None:
        """Assert every law that can be seen in the tables. Costs a walk over all of them."""
        self._index.check()
        self._leases.check(self._index.blocks)
        self._check_slots()
        self._where.check()
        refs = Counter(block for hold in self._holds for block in hold.referenced)
        busy = Counter(flight.block for flight in self._flights.values())
        for block in refs.keys() | busy.keys() | self._dirty.keys():
            assert self._index.get(block.key) is block
        for block in self._index.blocks:
            assert block.refs == refs[block]
            assert block.busy == busy[block]
            assert block.places or block.busy or block.refs, "what is nowhere must be forgotten"
            durable = Tier.DISK in block.places or Tier.DISK in block.arriving
            assert (block in self._dirty) == (
                bool(block.places) and not durable and not block.unwanted
            )
        successors = Counter(hold.supersedes for hold in self._holds)
        assert all(lease.successors == successors[lease.id] for lease in self._leases.all)
        for hold in self._holds:
            self._check_hold(hold)
        for action, flight in self._flights.items():
            if isinstance(action, Copy | Spill):
                assert flight.block.places[action.source] == action.source_slot, (
                    "a source went away"
                )

    def _check_slots(self) -> None:
        lent = {
            slot
            for hold in self._holds
            for slot in (*hold.hole_slots, *hold.private[hold.flight is not None :])
        }
        for tier, pool in self._pools.items():
            unread = set(self._unread) if tier is Tier.DISK else set()
            assert set(pool.slots(SlotState.HELD)) == self._where.residents[tier].keys() | unread
            assert set(pool.slots(SlotState.LENT)) == (lent if tier is Tier.DEVICE else set())
            targets = {slot for at, slot in map(_target, self._flights) if at is tier}
            assert set(pool.slots(SlotState.ARRIVING)) == targets
            assert targets >= {x.arriving[tier] for x in self._index.blocks if tier in x.arriving}

    def _check_hold(self, hold: Hold) -> None:
        parents = [hold.root, *(block.key for block in hold.blocks)]
        assert [block.parent for block in hold.blocks] == parents[:-1]
        assert len(hold.pending) < self.block_tokens
        if hold.state is HoldState.RUNNING:
            slots = dict(zip(hold.holes, hold.hole_slots, strict=False))
            known = len(hold.blocks)
            if len(hold.holes) > len(hold.hole_slots):
                known = hold.holes[len(hold.hole_slots)]
            table = [
                slots[at] if at in hold.holes else hold.blocks[at].places[Tier.DEVICE]
                for at in range(known)
            ]
            assert hold.table == table + (hold.private if known == len(hold.blocks) else [])


def _bring(block: Block, slot: Slot) -> Copy | Fetch:
    """To a device slot, from the nearest place."""
    source = min(block.places)
    if source is Tier.DISK:
        return Fetch(block.key, block.parent, block.tokens, Tier.DEVICE, slot)
    return Copy(block.key, source, block.places[source], Tier.DEVICE, slot)


def _by_class(blocks: Iterable[Block]) -> dict[SessionClass, int]:
    """{class: blocks}. A list counts twice as fast as a dict of an enum's members would, and there may be many blocks."""
    counts = [0] * len(SessionClass)
    for block in blocks:
        counts[session_class(block)] += 1
    return dict(zip(SessionClass, counts, strict=True))


def _is_to_be_brought(block: Block) -> bool:
    """Whether a block's bytes are somewhere, but neither on the device nor on the way there."""
    return bool(block.places) and Tier.DEVICE not in block.places | block.arriving


def _target(action: Copy | Spill | Fetch) -> tuple[Tier, Slot]:
    if isinstance(action, Spill):
        return Tier.DISK, action.disk_slot
    return action.target, action.target_slot
