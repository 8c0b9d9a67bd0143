"""Victims: policies rank as they say, quotas come first, and the next victim costs the same however many there are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.tiers.test_cache import NEVER, ROOT, ended, land, make, pool, turn
from tiers.block import Copy, Drop, Tier, root_key
from tiers.cache import TieredCache
from tiers.policy import Belady, Limits, Lru, SessionClass, SessionLru, Watermarks, policy_named

OTHER = root_key(b"model", b"somebody else")


def filled(blocks, policy=None):
    """A device full of one-block sessions, used in the order of their only token."""
    slots = {Tier.DEVICE: blocks, Tier.HOST: 0, Tier.DISK: 0}
    cache = TieredCache(block_tokens=4, slots=slots, limits=NEVER, policy=policy)
    for at in range(blocks):
        store(cache, (at,), at, float(at))
    return cache


def store(cache, tokens, lease, now, root=ROOT):
    hold = cache.acquire(cache.match(root, tokens), now)
    cache.load(hold, now)
    assert cache.ready(hold)
    assert cache.lend(hold, len(tokens), now)
    cache.commit(hold, tokens[hold.matched_tokens :], now)
    return cache.lease(hold, lease, "s", now, None)


class Counting(SessionLru):
    ranked = 0

    def rank(self, block):
        self.ranked += 1
        return super().rank(block)


def test_a_victim_costs_no_more_among_many_than_among_few():
    costs = []
    for blocks in (50, 5_000):
        policy = Counting()
        cache = filled(blocks, policy)
        policy.ranked = 0
        cache.make_room(20, 1e6)
        assert cache.free_slots == 20
        costs.append(policy.ranked)
    assert costs[0] == costs[1] <= 2 * 20


@pytest.mark.parametrize("name", ["session_lru", "lru", "slru"])
def test_what_was_used_least_recently_goes_first_when_nothing_else_is_known(name):
    cache = filled(8, policy_named(name, slots=8))
    cache.make_room(3, 100.0)
    left = [at for at in range(8) if cache.match(ROOT, (at, 99)).tokens]
    assert left == [3, 4, 5, 6, 7]


def test_slru_lets_a_scan_pass_by_what_was_used_twice():
    cache = filled(8, policy_named("slru", slots=8))
    for at in (0, 1):
        hold = cache.acquire(cache.match(ROOT, (at, 99)), 50.0)
        cache.release(hold, 50.0)
    for at in range(2, 8):  # newer, but once only
        ended(cache, at)
    for scan in range(100, 106):
        cache.make_room(1, 60.0)
        store(cache, (scan,), scan, 60.0 + scan)
    assert all(cache.match(ROOT, (at, 99)).tokens for at in (0, 1))


def test_a_first_turn_is_on_probation_until_its_session_comes_back():
    cache = make(device=8)
    turn(cache, (1, 1), 1, now=1.0, session="old")
    turn(cache, (1, 1, 2), 2, now=2.0, session="old", supersedes=1)
    turn(cache, (7, 7), 3, now=3.0, session="new")
    for lease in (2, 3):
        cache.reclass(lease, SessionClass.HUMAN_WAIT, 4.0)
    old, new = cache.leases()
    assert (old.session_class, new.session_class) == (SessionClass.HUMAN_WAIT, SessionClass.CLOSED)
    cache.reclass(3, SessionClass.TOOL_WAIT, 4.0)
    assert new.session_class is SessionClass.TOOL_WAIT, "somebody will come back for that"


def test_while_a_sequence_continues_a_session_what_it_does_not_share_is_worth_least():
    cache = make(device=8)
    turn(cache, tuple(range(10)), 1, now=1.0)
    (lease,) = cache.leases()
    hold = cache.acquire(cache.match(ROOT, (0, 1, 2, 3, 99)), 2.0, supersedes=1)
    assert lease.session_class is SessionClass.CLOSED
    cache.release(hold, 3.0)
    assert lease.session_class is SessionClass.BURST, "the turn came to nothing"
    cache.check()


def test_belady_gives_up_what_is_needed_last():
    uses = {(0,): 5.0, (1,): math.inf, (2,): 3.0}
    cache = filled(3, Belady(lambda block: uses[block.tokens]))
    cache.make_room(2, 9.0)
    assert [at for at in range(3) if cache.match(ROOT, (at, 99)).tokens] == [2]


def test_a_tenant_above_its_share_gives_first_whatever_its_blocks_are_worth():
    slots = {Tier.DEVICE: 10, Tier.HOST: 0, Tier.DISK: 0}
    limits = replace(NEVER, tenant_share=0.5)
    cache = TieredCache(block_tokens=4, slots=slots, limits=limits)
    for at in range(3):
        store(cache, (at,), at, 1.0, OTHER)
        ended(cache, at)  # worth least
    for at in range(7):
        store(cache, (at,), 10 + at, 2.0 + at)
    cache.make_room(2, 20.0)
    cache.check()
    assert all(cache.match(OTHER, (at, 9)).tokens for at in range(3))
    assert cache.statistics().evictions[Tier.DEVICE] == {"quota": 2}
    cache.make_room(3, 20.0)
    assert cache.statistics().evictions[Tier.DEVICE] == {"quota": 2, "capacity": 1}
    assert not all(cache.match(OTHER, (at, 9)).tokens for at in range(3))


def test_a_flood_costs_its_neighbour_nothing_that_the_quota_grants():
    slots = {Tier.DEVICE: 20, Tier.HOST: 0, Tier.DISK: 0}
    cache = TieredCache(
        block_tokens=4, slots=slots, limits=replace(NEVER, tenant_share=0.5), policy=Lru()
    )
    for at in range(9):
        store(cache, (at,), at, 1.0)
    for at in range(200):
        if not cache.free_slots:
            cache.make_room(1, 2.0 + at)
        store(cache, (at, at), 100 + at, 2.0 + at, OTHER)
    assert all(cache.match(ROOT, (at, 99)).tokens for at in range(9))


def test_a_session_that_says_nothing_for_long_counts_as_one_that_waits_for_a_human():
    limits = replace(
        NEVER, protect_s={SessionClass.TOOL_WAIT: 10.0, SessionClass.HUMAN_WAIT: 100.0}
    )
    cache = make(limits=limits)
    turn(cache, (1, 1), 1, now=0.0)
    cache.reclass(1, SessionClass.TOOL_WAIT, 0.0)
    (lease,) = cache.leases()
    assert cache.next_event(0.0) == 10.0
    cache.tick(9.9)
    assert lease.session_class is SessionClass.TOOL_WAIT
    cache.tick(10.0)
    assert lease.session_class is SessionClass.HUMAN_WAIT
    cache.reclass(1, SessionClass.HUMAN_WAIT, 11.0)
    cache.tick(100.0)
    assert lease.session_class is SessionClass.CLOSED
    cache.check()


def test_a_ttl_protects_until_it_expires_and_then_demotes():
    limits = Limits(host_after_s=5.0, disk_after_s=20.0, max_lag_s=1.0)
    cache = make(limits=limits)
    hold = cache.acquire(cache.match(ROOT, (1, 2)), 0.0)
    cache.load(hold, 0.0)
    assert cache.ready(hold)
    assert cache.lend(hold, 2, 0.0)
    cache.commit(hold, (1, 2), 0.0)
    cache.lease(hold, 1, "s", 0.0, None, keep_until=60.0)
    cache.reclass(1, SessionClass.HUMAN_WAIT, 0.0)
    (lease,) = cache.leases()
    assert lease.session_class is SessionClass.BURST
    land(cache, cache.write_behind(2.0))
    land(cache, cache.tick(30.0))
    assert pool(cache, Tier.HOST).held == 1, "idle, and not below the host"
    land(cache, cache.tick(60.0))
    assert lease.session_class is SessionClass.HUMAN_WAIT
    assert pool(cache, Tier.HOST).held == 0
    assert pool(cache, Tier.DISK).held == 1, "never deleted"


def test_a_pin_is_leased_bounded_and_last_to_go():
    cache = make(device=4, host=4, disk=8, limits=replace(NEVER, pins=0.5))
    turn(cache, tuple(range(8)), 1, session="mine")
    turn(cache, (50, 51), 2, session="other")
    assert cache.pin(ROOT, "nobody", 10.0, 0.0) == 0
    assert cache.pin(OTHER, "mine", 10.0, 0.0) == 0
    assert cache.pin(ROOT, "mine", 10.0, 0.0) == 2
    assert cache.pin(ROOT, "other", 10.0, 0.0) is None, "two of four slots is the quota"
    assert cache.pins(0.0) == {(ROOT, "mine"): (10.0, 2)}
    actions = land(cache, cache.make_room(3, 1.0))
    assert [type(action) for action in actions] == [Copy, Copy]
    land(cache, cache.make_room(4, 1.0))
    for at in range(8):
        turn(cache, (100 + at,), 100 + at, now=2.0)
        land(cache, cache.make_room(4, 2.0))
    assert cache.match(ROOT, (*range(8), 9)).tokens == 8, "it never left the host"
    cache.tick(10.0)
    assert cache.pins(10.0) == {}
    assert cache.pin(ROOT, "other", 20.0, 10.0) == 0, "long gone"
    assert not cache.unpin(ROOT, "mine", 10.0)


def test_a_record_that_the_disk_gave_up_is_not_written_again_before_it_is_used_again():
    cache = make(device=6, host=0, disk=1)
    (one,) = turn(cache, (1,), 1, now=1.0)
    land(cache, cache.write_behind(1.0, all_dirty=True))
    turn(cache, (2,), 2, now=2.0)
    drop, _ = land(cache, cache.write_behind(2.0, all_dirty=True))
    assert drop == Drop(one)
    assert cache.write_behind(3.0, all_dirty=True) == []
    hold = cache.acquire(cache.match(ROOT, (1, 5)), 4.0)
    cache.release(hold, 4.0)
    assert len(cache.write_behind(4.0, all_dirty=True)) == 2


def test_a_pin_holds_against_what_was_on_its_way_down_when_it_came():
    cache = make(device=4, host=4, disk=8, limits=replace(NEVER, pins=0.5))
    turn(cache, (1, 2), 1, session="mine")
    (spill,) = cache.demote(Tier.DISK, None, 1.0)
    assert cache.pin(ROOT, "mine", 10.0, 1.0) == 1
    land(cache, [spill], 2.0)
    assert pool(cache, Tier.DEVICE).held == 1, "asked again when it landed"
    land(cache, cache.demote(Tier.HOST, None, 3.0), 3.0)
    assert cache.demote(Tier.DISK, None, 3.0) == []
    assert pool(cache, Tier.HOST).held == 1


def test_emptying_the_host_ahead_of_need_leaves_what_is_pinned():
    marks = {Tier.HOST: Watermarks(high=0.3, low=0.0)}
    cache = make(device=4, host=4, limits=replace(NEVER, pins=0.5, watermarks=marks))
    turn(cache, (1, 2), 1, session="mine")
    turn(cache, (3, 4), 2, session="other")
    assert cache.pin(ROOT, "mine", 10.0, 0.0) == 1
    land(cache, cache.write_behind(0.0, all_dirty=True))
    land(cache, cache.demote(Tier.HOST, None, 1.0), 1.0)
    land(cache, cache.tick(1.0), 1.0)
    assert cache.match(ROOT, (3, 4, 5)).partial.places.keys() == {Tier.DISK}
    assert Tier.HOST in cache.match(ROOT, (1, 2, 5)).partial.places
