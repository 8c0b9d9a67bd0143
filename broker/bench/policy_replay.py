"""Replays a trace through the daemon's own tables and policies, with no model and no bytes.

One token id of the tables is one unit of the trace. Every turn is run from its arrival to its end in one go, and every
copy lands at once: what is measured is the order of victims and the tables' own laws, not how fast anything is.

What the tables are told is what the protocol shows them: a turn supersedes the lease of its session's turn before, its
end says whether a tool or a person is waited for, a closed connection says so, and nothing says who comes back.

Laws
    A replay computes at least what a cache that forgets nothing would: `computed_units >= Survey.fresh_units`.
    A trace gives the same outcome every time.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.bench.policy_survey import NEVER, block_ends
from broker.bench.policy_trace import Close, Turn
from broker.config import Tiers
from tiers.block import Tier, root_key
from tiers.cache import TieredCache
from tiers.policy import Belady, Limits, SessionClass, policy_named

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from broker.bench.policy_survey import Survey
    from broker.bench.policy_trace import Event
    from tiers.block import Action, Block
    from tiers.hold import Hold
    from tiers.policy import Policy

BOUND = "belady"
ORDERS = ("session_lru", "lru", "slru", BOUND)
_ROOT = root_key(b"bench policy", b"")  # one model, one tenant
_DEVICE, _HOST = (
    0.2,
    0.4,
)  # with all tiers on, of the footprint; the disk holds all that there ever was
_DEFAULTS = Tiers()  # times are those that a daemon starts with
_PROTECT_S = {
    SessionClass.BURST: _DEFAULTS.protect.burst,
    SessionClass.TOOL_WAIT: _DEFAULTS.protect.tool_wait,
    SessionClass.HUMAN_WAIT: _DEFAULTS.protect.human_wait,
}


def replay(events: Sequence[Event], found: Survey, order: str, slots: int) -> Outcome:
    """On the device alone, with so many slots. Raises TooSmall."""
    still = Limits(math.inf, math.inf, math.inf, protect_s=_PROTECT_S)
    return _run(events, found, order, {Tier.DEVICE: slots}, still)


def replay_tiered(events: Sequence[Event], found: Survey, order: str) -> Outcome:
    """With all tiers on, see above. Raises TooSmall."""
    slots = {
        Tier.DEVICE: max(found.longest_blocks + 1, round(_DEVICE * found.footprint_blocks)),
        Tier.HOST: round(_HOST * found.footprint_blocks),
        Tier.DISK: found.day_blocks,
    }
    host, disk = _DEFAULTS.host, _DEFAULTS.disk
    moving = Limits(host.after, disk.after, disk.max_lag, protect_s=_PROTECT_S)
    return _run(events, found, order, slots, moving)


def _run(
    events: Sequence[Event], found: Survey, order: str, slots: Mapping[Tier, int], limits: Limits
) -> Outcome:
    future = Future(events, found)
    cache = TieredCache(
        block_tokens=found.block_units,
        slots=slots,
        limits=limits,
        policy=_policy(order, future, sum(slots.values())),
    )
    run = Replay(cache, found)
    for number, event in enumerate(events):
        future.advance(number)
        run.serve(event)
    return run.outcome()


def _policy(order: str, future: Future, slots: int) -> Policy:
    match order:
        case "belady":
            return Belady(future.next_use)
        case "session_lru" | "lru" | "slru":
            return policy_named(order, slots=slots)
        case _:
            raise AssertionError(order)


class TooSmall(Exception):
    """One turn alone does not fit on the device."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one replay cost, in units."""

    prompt_units: int
    computed_units: int  # of prompts; answers are generated either way
    fresh_units: int
    found: dict[Tier, int]  # {tier: units of prompts that were there}

    @property
    def amplification(self) -> float:
        """A = (fresh + recomputed) / fresh."""
        return self.computed_units / self.fresh_units

    @property
    def hit_rate(self) -> float:
        return 1 - self.computed_units / self.prompt_units


class Future:
    """When each block is used next, as far as the replay has come: what Belady's policy is constructed with."""

    def __init__(self, events: Sequence[Event], survey: Survey) -> None:
        self._events = events
        self._survey = survey
        self._next: dict[int, float] = {}  # {last unit of a block: event}

    def advance(self, number: int) -> None:
        """The event of that number begins."""
        event = self._events[number]
        if isinstance(event, Turn):
            ends = block_ends(event, self._survey.block_units)
            self._next.update(zip(ends, self._survey.next_uses[number], strict=True))

    def next_use(self, block: Block) -> float:
        return self._next.get(block.tokens[-1], NEVER)


class Replay:
    """One cache that a trace is run through."""

    def __init__(self, cache: TieredCache, survey: Survey) -> None:
        self._cache = cache
        self._survey = survey
        self._numbers = itertools.count()
        self._leases: dict[int, int] = {}  # {session: the lease of its last turn}
        self._computed = 0
        self._found: Counter[Tier] = Counter()

    def serve(self, event: Event) -> None:
        """Raises TooSmall."""
        match event:
            case Turn():
                self._turn(event)
            case Close(at, session):
                if session in self._leases:
                    self._cache.reclass(self._leases[session], SessionClass.CLOSED, at)
        self._perform(self._cache.write_behind(event.at), event.at)
        self._perform(self._cache.tick(event.at), event.at)

    def outcome(self) -> Outcome:
        return Outcome(
            prompt_units=self._survey.prompt_units,
            computed_units=self._computed,
            fresh_units=self._survey.fresh_units,
            found=dict(self._found),
        )

    def _turn(self, turn: Turn) -> None:
        cache, now = self._cache, turn.at
        superseded = self._leases.get(turn.session)
        match = cache.match(_ROOT, turn.prompt)
        hold = cache.acquire(match, now, supersedes=superseded)
        self._load(hold, now)
        self._computed += len(turn.prompt) - hold.cached_tokens
        self._found.update(hold.by_tier)
        chain = turn.prompt + turn.output
        begin = hold.matched_tokens
        self._make_room(cache.missing_slots(hold, len(chain)), now)
        if not cache.lend(hold, len(chain), now):
            raise TooSmall(f"a turn of {len(chain)} units does not fit on the device")
        for first, last in hold.todo:
            cache.commit(hold, chain[first:last], now)
        cache.commit(hold, chain[begin:], now)
        lease = next(self._numbers)
        cache.lease(hold, lease, str(turn.session), now, superseded)
        cache.reclass(lease, turn.waits_for, now)
        self._leases[turn.session] = lease

    def _load(self, hold: Hold, now: float) -> None:
        cache = self._cache
        self._make_room(cache.slots_to_load(hold), now)
        actions = cache.load(hold, now)
        if actions is None:  # a shared tail needs a slot for a copy of it
            cache.forgo(hold, len(hold.blocks), "loss", now)
            actions = cache.load(hold, now)
        if actions is None:
            raise TooSmall(f"a chain of {len(hold.blocks)} blocks does not fit on the device")
        self._perform(actions, now)
        ready = cache.ready(hold)
        assert ready, "every copy has landed"

    def _make_room(self, slots: int, now: float) -> None:
        """As the engine does: again and again, because each landed copy may let the next block go."""
        while (free := self._cache.free_slots) < slots:
            actions = self._cache.make_room(slots, now)
            self._perform(actions, now)
            if not actions and self._cache.free_slots == free:
                return

    def _perform(self, actions: Sequence[Action], now: float) -> None:
        for action in actions:
            self._cache.landed(action, now)
