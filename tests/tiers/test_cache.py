"""TieredCache by example: one sentence of its contract a test. The state machine next door has the laws."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tiers.block import Copy, Drop, Fetch, Spill, Tier, chain_key, root_key
from tiers.cache import TieredCache
from tiers.policy import Limits, SessionClass, Watermarks
from tiers.store import IndexEntry

ROOT = root_key(b"model", b"tenant")
NEVER = Limits(host_after_s=math.inf, disk_after_s=math.inf, max_lag_s=math.inf)
B = 4


def make(device=6, host=4, disk=8, limits=NEVER):
    slots = {Tier.DEVICE: device, Tier.HOST: host, Tier.DISK: disk}
    return TieredCache(block_tokens=B, slots=slots, limits=limits)


def land(cache, actions, now=0.0):
    for action in actions:
        cache.landed(action, now)
    cache.check()
    return actions


def begin(cache, tokens, now=0.0, *, supersedes=None):
    """A running hold that has all but the last token of `tokens` matched or computed."""
    hold = cache.acquire(cache.match(ROOT, tokens), now, supersedes=supersedes)
    land(cache, cache.load(hold, now), now)
    assert cache.ready(hold)
    compute(cache, hold, tokens[hold.cached_tokens :], now)
    return hold


def compute(cache, hold, tokens, now=0.0):
    had = len(hold.blocks) * B + len(hold.pending)
    assert cache.lend(hold, had + len(tokens), now)
    cache.commit(hold, tokens, now)
    cache.check()


def turn(cache, tokens, lease_id, now=0.0, *, supersedes=None, session="s"):
    hold = begin(cache, tokens, now, supersedes=supersedes)
    keys = cache.lease(hold, lease_id, session, now, supersedes)
    cache.check()
    return keys


def ended(cache, lease_id):
    """As when a later turn supersedes the lease, or a deletion takes it."""
    lease = cache._leases.get(lease_id)
    if lease is not None:
        cache._end_lease(lease, SessionClass.CLOSED)


def spilled(cache, now=0.0):
    return land(cache, cache.write_behind(now, all_dirty=True), now)


def pool(cache, tier):
    return cache.statistics().tiers[tier].pool


def test_an_empty_cache_matches_nothing():
    cache = make()
    match = cache.match(ROOT, (1, 2, 3))
    assert (match.blocks, match.partial, match.tokens) == ((), None, 0)
    assert cache.match(ROOT, ()).tokens == 0
    assert cache.next_event(0.0) is None


def test_a_finished_turn_is_found_but_for_the_last_token():
    cache = make()
    tokens = tuple(range(10))
    keys = turn(cache, tokens, 1)
    assert keys == (
        first := chain_key(ROOT, tokens[:4]),
        second := chain_key(first, tokens[4:8]),
        chain_key(second, tokens[8:]),
    )
    assert cache.match(ROOT, tokens).tokens == 9
    assert cache.match(ROOT, (*tokens, 99)).tokens == 10
    assert cache.match(ROOT, tokens[:8]).tokens == 7, "the last whole block is matched in part"
    assert cache.match(root_key(b"model", b"other"), tokens).tokens == 0


def test_matching_is_token_granular_where_prompts_diverge_inside_a_block():
    cache = make()
    turn(cache, (0, 1, 2, 3, 4, 5, 6, 7), 1)
    match = cache.match(ROOT, (0, 1, 2, 3, 4, 5, 66, 77, 88))
    assert (len(match.blocks), match.partial_rows, match.tokens) == (1, 2, 6)
    hold = cache.acquire(match, 0.0)
    (copy,) = cache.load(hold, 0.0)
    assert isinstance(copy, Copy)
    assert (copy.source, copy.target) == (Tier.DEVICE, Tier.DEVICE)
    assert not cache.ready(hold)
    cache.landed(copy, 0.0)
    assert cache.ready(hold)
    assert hold.table[1] == copy.target_slot
    assert hold.cached_tokens == 6
    compute(cache, hold, (66, 77))
    assert hold.blocks[1].tokens == (4, 5, 66, 77)


def test_two_sequences_with_the_same_tokens_end_up_with_one_block():
    cache = make()
    one, two = begin(cache, (1, 2, 3)), begin(cache, (1, 2, 3))
    compute(cache, one, (4,))
    assert pool(cache, Tier.DEVICE).lent == 1
    compute(cache, two, (4,))
    assert one.blocks == two.blocks
    assert one.table == two.table
    assert pool(cache, Tier.DEVICE).free == 5


def test_a_clean_tail_that_only_we_need_is_continued_in_its_own_slot():
    cache = make()
    turn(cache, (0, 1, 2, 3, 4, 5), 1)
    spilled(cache)
    slot = cache.match(ROOT, (0, 1, 2, 3, 4, 5, 6)).partial.places[Tier.DEVICE]
    hold = cache.acquire(cache.match(ROOT, (0, 1, 2, 3, 4, 5, 6)), 1.0, supersedes=1)
    assert cache.load(hold, 1.0) == []
    assert cache.ready(hold)
    assert hold.table[-1] == slot
    cache.check()
    cache.lease(hold, 2, "s", 1.0, 1)
    cache.check()
    assert cache.match(ROOT, (0, 1, 2, 3, 4, 5, 6)).partial.places[Tier.DEVICE] == slot


@pytest.mark.parametrize("why", ["dirty", "leased", "referenced", "in part"])
def test_a_tail_that_is_needed_is_copied(why):
    cache = make()
    turn(cache, (0, 1, 2), 1)
    if why != "dirty":
        spilled(cache)
    if why == "referenced":
        cache.acquire(cache.match(ROOT, (0, 1, 2, 3)), 1.0)
    prompt = (0, 1, 22, 33) if why == "in part" else (0, 1, 2, 3)
    hold = cache.acquire(cache.match(ROOT, prompt), 1.0, supersedes=None if why == "leased" else 1)
    assert cache.slots_to_load(hold) == 1
    assert len(land(cache, cache.load(hold, 1.0))) == 1


def test_load_is_all_or_nothing_and_makes_no_room_by_itself():
    cache = make(device=2)
    turn(cache, tuple(range(8)), 1)
    spilled(cache)
    land(cache, cache.demote(Tier.DISK, None, 0.0))
    other = begin(cache, (9, 9, 9))
    hold = cache.acquire(cache.match(ROOT, tuple(range(9))), 0.0)
    assert cache.slots_to_load(hold) == 2
    assert cache.load(hold, 0.0) is None
    cache.check()
    cache.release(other, 0.0)
    land(cache, cache.make_room(2, 0.0))
    fetches = cache.load(hold, 0.0)
    assert [type(fetch) for fetch in fetches] == [Fetch, Fetch]
    for fetch in reversed(fetches):
        assert not cache.ready(hold)
        cache.landed(fetch, 0.0)
    assert cache.ready(hold)
    assert hold.by_tier == {Tier.DISK: 8}


def test_a_block_is_fetched_once_for_two_sequences():
    cache = make()
    turn(cache, (0, 1, 2, 3), 1)
    spilled(cache)
    land(cache, cache.demote(Tier.DISK, None, 0.0))
    one = cache.acquire(cache.match(ROOT, (0, 1, 2, 3, 4)), 0.0)
    two = cache.acquire(cache.match(ROOT, (0, 1, 2, 3, 5)), 0.0)
    (fetch,) = cache.load(one, 0.0)
    assert cache.load(two, 0.0) == []
    cache.release(one, 0.0)
    assert not cache.ready(two)
    cache.landed(fetch, 0.0)
    assert cache.ready(two)


def test_a_bad_record_is_dropped_and_a_hole_in_every_hold_that_waits_for_it():
    cache = make()
    tokens = tuple(range(12))
    turn(cache, tokens, 1)
    spilled(cache)
    land(cache, cache.demote(Tier.DISK, None, 0.0))
    hold = cache.acquire(cache.match(ROOT, (*tokens, 12)), 0.0)
    fetches = cache.load(hold, 0.0)
    twin = cache.acquire(cache.match(ROOT, (*tokens, 12)), 0.0)
    assert cache.load(twin, 0.0) == []
    (drop,) = cache.failed(fetches[1], 0.0, "checksum")
    assert drop == Drop(fetches[1].key)
    assert not cache.ready(hold)
    cache.landed(fetches[2], 0.0)
    cache.landed(fetches[0], 0.0)
    for waiting in (hold, twin):
        assert cache.ready(waiting)
        assert (waiting.cached_tokens, waiting.by_tier, waiting.todo) == (
            8,
            {Tier.DISK: 8},
            [(4, 8)],
        )
        cache.check()
    assert cache.match(ROOT, (*tokens, 12)).tokens == 4
    for waiting in (hold, twin):
        assert cache.lend(waiting, 8, 0.0)
        cache.commit(waiting, tokens[4:8], 0.0)
        cache.check()
        assert cache.match(ROOT, (*tokens, 12)).tokens == 12, "its child was kept for this"
    assert hold.table == twin.table


@pytest.mark.parametrize("answer", ["landed", "failed"])
def test_computing_a_block_that_is_on_its_way_does_not_wait_for_it(answer):
    cache = make()
    turn(cache, (0, 1, 2, 3), 1)
    spilled(cache)
    land(cache, cache.demote(Tier.DISK, None, 0.0))
    runner = begin(cache, (0,))
    waiter = cache.acquire(cache.match(ROOT, (0, 1, 2, 3, 4)), 0.0)
    (fetch,) = cache.load(waiter, 0.0)
    compute(cache, runner, (1, 2, 3))
    assert cache.ready(waiter)
    if answer == "landed":
        cache.landed(fetch, 0.0)
    else:
        cache.failed(fetch, 0.0, "checksum")
    cache.check()
    assert waiter.cached_tokens == 4
    assert pool(cache, Tier.DEVICE).held == 1


def test_a_block_that_one_could_load_and_another_could_not_is_written_again():
    """The machine's find: the record was dropped for the one that failed, and nobody noted that it was needed."""
    cache = make()
    turn(cache, (0, 1, 2, 3), 1)
    spilled(cache)
    land(cache, cache.demote(Tier.DISK, None, 0.0))
    whole = cache.acquire(cache.match(ROOT, (0, 1, 2, 3, 4)), 0.0)
    part = cache.acquire(cache.match(ROOT, (0, 1, 9)), 0.0)
    (good,), (bad,) = cache.load(whole, 0.0), cache.load(part, 0.0)
    assert [type(action) for action in cache.failed(bad, 0.0, "missing")] == [Drop]
    cache.check()
    cache.landed(good, 0.0)
    cache.check()
    assert [type(action) for action in cache.write_behind(0.0, all_dirty=True)] == [Spill]


def test_room_is_made_of_the_coldest_tails_first_and_never_of_what_runs():
    cache = make(device=4, host=1)
    turn(cache, tuple(range(8)), 1, now=1.0)
    running = begin(cache, (9, 9, 9, 9, 9), now=2.0)
    actions = cache.make_room(2, 3.0)
    head = chain_key(ROOT, (0, 1, 2, 3))
    tail = chain_key(head, (4, 5, 6, 7))
    assert [(type(a), a.key) for a in actions] == [(Copy, tail)], (
        "one host slot, and the tail is in it"
    )
    assert cache.leaving_slots == 1
    assert cache.make_room(1, 3.0) == []
    land(cache, actions)
    assert cache.free_slots == 1
    assert [copy.key for copy in land(cache, cache.make_room(3, 3.0))] == [head], (
        "it displaces its tail"
    )
    assert cache.free_slots == 2
    assert cache.match(ROOT, tuple(range(8))).tokens == 4
    assert {head, tail}.isdisjoint(block.key for block in running.blocks)


def test_without_a_lower_tier_a_block_is_forgotten_with_all_that_continues_it():
    cache = make(device=3, host=0, disk=1)
    turn(cache, tuple(range(6)), 1, now=1.0)
    head, tail = cache.write_behind(1.0, all_dirty=True), cache.make_room(3, 2.0)
    assert [type(action) for action in head] == [Spill]
    assert tail == [], "the head is being written: only the tail can go"
    assert cache.free_slots == 2
    cache.failed(head[0], 2.0, "io")
    assert cache.make_room(3, 2.0) == []
    assert cache.free_slots == 3
    assert cache.statistics().blocks == 0
    cache.check()


def test_a_block_that_is_needed_again_while_it_is_copied_away_stays():
    cache = make(device=1)
    turn(cache, (0, 1, 2, 3), 1)
    (copy,) = cache.make_room(1, 1.0)
    hold = cache.acquire(cache.match(ROOT, (0, 1, 2, 3, 4)), 1.0)
    cache.landed(copy, 1.0)
    cache.check()
    assert cache.load(hold, 1.0) == []
    assert cache.ready(hold)


def test_dirty_blocks_are_written_behind_after_the_lag_parents_first():
    cache = make(limits=Limits(math.inf, math.inf, max_lag_s=2.0))
    keys = turn(cache, tuple(range(10)), 1, now=5.0)
    assert cache.next_event(5.0) == 7.0
    assert cache.write_behind(6.9) == []
    spills = cache.write_behind(7.0)
    assert [spill.key for spill in spills] == list(keys)
    assert cache.write_behind(7.0) == []
    cache.failed(spills[0], 7.5, "full")
    land(cache, spills[1:], 7.5)
    assert cache.next_event(7.5) == 9.5
    assert [spill.key for spill in cache.write_behind(9.5)] == [keys[0]]


def test_a_full_disk_drops_what_is_worth_less_and_nothing_else():
    cache = make(disk=2)
    old, tail = turn(cache, tuple(range(6)), 1, now=1.0)
    spilled(cache, 1.0)
    (new,) = turn(cache, (9, 9, 9), 2, now=2.0)
    ended(cache, 1)
    drop, spill = cache.write_behind(2.0, all_dirty=True)
    assert (type(drop), drop.key) == (Drop, tail)
    assert (type(spill), spill.key) == (Spill, new)
    land(cache, [drop, spill])
    assert cache.write_behind(3.0, all_dirty=True) == [], (
        "the dropped one is dirty again, but worth less"
    )
    assert cache.match(ROOT, tuple(range(6))).blocks[0].key == old


def test_above_the_high_watermark_a_tier_empties_to_the_low_one_ahead_of_need():
    marks = {tier: Watermarks(high=0.9, low=0.7) for tier in Tier}
    cache = make(device=20, host=10, disk=10, limits=replace(NEVER, watermarks=marks))
    for at in range(10):
        turn(cache, (at, at), at + 1, now=float(at))
    spilled(cache, 10.0)
    assert len(cache.tick(10.0)) == 3
    assert pool(cache, Tier.DISK).free == 3
    turn(cache, (100, 100), 100, now=11.0)
    (spill,) = spilled(cache, 11.0)
    assert isinstance(spill, Spill), "there is room without a drop"
    for at in range(9):
        turn(cache, (at + 200, 0), at + 200, now=12.0)
    assert land(cache, cache.tick(12.0)), "the device too, by copies"
    assert pool(cache, Tier.DEVICE).held == 14


def test_blocks_whose_spills_failed_are_written_parents_first_again():
    cache = make()
    keys = turn(cache, tuple(range(10)), 1)
    for spill in reversed(cache.write_behind(0.0, all_dirty=True)):
        cache.failed(spill, 1.0, "io")
    assert [spill.key for spill in cache.write_behind(2.0, all_dirty=True)] == list(keys)


def test_an_idle_lease_moves_to_the_host_then_to_disk_then_ends():
    cache = make(limits=Limits(host_after_s=10.0, disk_after_s=60.0, max_lag_s=math.inf))
    turn(cache, tuple(range(6)), 1, now=1.0)
    assert cache.next_event(1.0) == 11.0
    assert cache.tick(10.9) == []
    copies = cache.tick(11.0)
    assert [(copy.source, copy.target) for copy in copies] == [(Tier.DEVICE, Tier.HOST)] * 2
    land(cache, copies, 11.0)
    assert pool(cache, Tier.DEVICE).free == 6
    assert cache.next_event(11.0) == 61.0
    spills = cache.tick(61.0)
    assert [spill.source for spill in spills] == [Tier.HOST] * 2
    land(cache, spills, 61.0)
    assert pool(cache, Tier.HOST).free == 4
    assert list(cache.leases())
    assert cache.tick(cache.next_event(61.0)) == []
    assert not list(cache.leases())
    assert cache.next_event(100.0) is None
    assert cache.match(ROOT, tuple(range(7))).tokens == 6


def test_demoting_a_session_leaves_what_others_share_with_it():
    cache = make()
    shared = (0, 1, 2, 3)
    turn(cache, (*shared, 4), 1, session="a")
    turn(cache, (*shared, 5), 2, session="b")
    land(cache, cache.demote(Tier.HOST, "a", 1.0), 1.0)
    land(cache, cache.tick(1.0), 1.0)
    assert cache.match(ROOT, (*shared, 5, 6)).partial.places.keys() == {Tier.DEVICE}
    assert cache.match(ROOT, (*shared, 4, 6)).partial.places.keys() == {Tier.HOST}
    assert cache.match(ROOT, (*shared, 4, 6)).blocks[0].places.keys() == {Tier.DEVICE}


def test_where_a_chain_is_and_what_its_blocks_wait_for_can_be_asked():
    cache = make()
    keys = turn(cache, (0, 1, 2, 3, 4), 1)
    turn(cache, (7, 8), 2, session="t")
    cache.reclass(2, SessionClass.TOOL_WAIT, 0.0)
    assert cache.whereabouts(keys) == {Tier.DEVICE: 5}
    spilled(cache)
    land(cache, cache.demote(Tier.DISK, "s", 1.0), 1.0)
    assert cache.whereabouts((*keys, b"x" * 32)) == {Tier.DISK: 5}
    for of in cache.statistics().tiers.values():
        assert sum(of.classes.values()) == of.pool.held
    assert cache.statistics().tiers[Tier.DEVICE].classes[SessionClass.TOOL_WAIT] == 1


def test_of_two_tenants_sessions_of_one_name_only_the_one_of_the_root_is_demoted():
    cache = make()
    other = root_key(b"model", b"another tenant")
    keys = {ROOT: turn(cache, (0, 1, 2, 3), 1)}
    hold = cache.acquire(cache.match(other, (0, 1, 2, 3)), 0.0)
    land(cache, cache.load(hold, 0.0))
    assert cache.ready(hold)
    compute(cache, hold, (0, 1, 2, 3))
    keys[other] = cache.lease(hold, 2, "s", 0.0, None)
    land(cache, cache.demote(Tier.HOST, "s", 1.0, root=other), 1.0)
    assert cache.whereabouts(keys[other]) == {Tier.HOST: 4}
    assert cache.whereabouts(keys[ROOT]) == {Tier.DEVICE: 4}


def test_demoted_blocks_on_disk_go_through_the_host_again():
    cache = make()
    turn(cache, (0, 1, 2), 1)
    spilled(cache)
    land(cache, cache.demote(Tier.HOST, None, 0.0))
    assert cache.match(ROOT, (0, 1, 2, 3)).partial.places.keys() == {Tier.HOST, Tier.DISK}


def test_the_class_of_a_session_decides_before_its_age():
    cache = make(device=2, host=2)
    (one,) = turn(cache, (1, 1), 1, now=1.0)
    (two,) = turn(cache, (2, 2), 2, now=2.0)
    cache.reclass(1, SessionClass.TOOL_WAIT, 3.0)
    cache.reclass(2, SessionClass.HUMAN_WAIT, 3.0)
    cache.reclass(77, SessionClass.BURST, 3.0)
    assert [copy.key for copy in cache.make_room(2, 4.0)] == [two, one]


def test_a_superseded_tail_leaves_memory_and_its_record_is_the_first_to_go():
    cache = make(disk=2)
    turn(cache, (7, 7), 1, now=0.0)
    (tail,) = turn(cache, (0, 1), 2, now=1.0)
    spilled(cache)
    hold = begin(cache, (0, 1, 2), now=2.0)
    assert pool(cache, Tier.DEVICE).held == 2
    cache.lease(hold, 3, "s", 2.0, 2)
    cache.check()
    assert pool(cache, Tier.DEVICE).held == 2, (
        "the tail of two tokens has made place for that of three"
    )
    drop, spill = cache.write_behind(2.0, all_dirty=True)
    assert (drop.key, spill.tokens) == (tail, (0, 1, 2))


def test_a_superseded_tail_that_was_never_written_is_forgotten():
    cache = make()
    turn(cache, (0, 1), 1)
    turn(cache, (0, 1, 2), 2, supersedes=1)
    assert cache.statistics().blocks == 1


def test_a_superseded_tail_that_is_being_written_stays_for_that():
    cache = make()
    turn(cache, (0, 1), 1)
    hold = begin(cache, (0, 1, 2))
    (spill,) = cache.write_behind(1.0, all_dirty=True)
    cache.lease(hold, 2, "s", 1.0, 1)
    land(cache, [spill])
    assert cache.statistics().blocks == 2


def entry(spill, last_used):
    return IndexEntry(
        spill.key, spill.root, spill.parent, spill.depth, spill.tokens, last_used=last_used
    )


def test_what_the_disk_holds_is_found_after_a_restart():
    old = make()
    tokens = tuple(range(10))
    turn(old, tokens, 1, now=1.0)
    spills = spilled(old)
    turn(old, (*tokens, 10), 2, now=2.0, supersedes=1)
    entries = [entry(s, 5.0) for s in spills + spilled(old)]
    forged = IndexEntry(b"?" * 32, ROOT, ROOT, 0, (8, 8), 1.0)
    cache = make()
    cache.begin_adopting(5)
    assert pool(cache, Tier.DISK).free == 3, "their slots are set aside"
    assert cache.adopt([*reversed(entries), forged], 0.0) == [Drop(b"?" * 32)]
    cache.check()
    cache.end_adopting()
    assert pool(cache, Tier.DISK).free == 4
    match = cache.match(ROOT, (*tokens, 10, 11))
    assert match.tokens == 11
    assert match.partial.resting is SessionClass.HUMAN_WAIT
    assert cache.match(ROOT, (*tokens, 99)).partial.resting is SessionClass.CLOSED
    for order in (entries, entries[::-1]):
        small = make(disk=1)
        small.begin_adopting(4)
        dropped = [drop.key for drop in small.adopt(order, 0.0)]
        small.end_adopting()
        small.check()
        assert set(dropped) == {x.key for x in entries[1:]}, "heads are kept before tails"


def test_a_child_is_not_kept_at_its_parents_cost():
    old = make()
    turn(old, tuple(range(8)), 1)
    head, tail = spilled(old)
    small = make(disk=1)
    small.begin_adopting(0)
    dropped = small.adopt([entry(head, 1.0), entry(tail, 5.0)], 0.0)
    assert dropped == [Drop(tail.key)], "though it was used later"
    small.check()


def test_a_record_that_found_no_room_is_not_adopted_from_an_older_slice_either():
    old = make()
    turn(old, tuple(range(8)), 1)
    head, tail = spilled(old)
    small = make(disk=1)
    small.begin_adopting(0)
    assert small.adopt([entry(head, 1.0), entry(tail, 5.0)], 0.0) == [Drop(tail.key)]
    assert small.forget_chain((head.key,), (), 1.0) == [Drop(head.key)]
    assert small.adopt([entry(tail, 5.0)], 2.0) == []
    assert pool(small, Tier.DISK).held == 0
    small.check()


def test_a_record_that_was_computed_anew_before_it_was_read_is_not_written_again():
    old = make()
    turn(old, tuple(range(9)), 1)
    entries = [entry(s, 5.0) for s in spilled(old)]
    cache = make()
    cache.begin_adopting(3)
    turn(cache, tuple(range(9)), 1)
    cache.adopt(entries, 0.0)
    cache.end_adopting()
    cache.check()
    assert cache.statistics().dirty == 0
    assert spilled(cache) == []
    assert pool(cache, Tier.DISK).held == 3


def test_a_slice_that_is_older_than_a_drop_is_not_believed():
    old = make()
    turn(old, (1, 2), 1)
    entries = [entry(s, 5.0) for s in spilled(old)]
    cache = make(disk=1)
    cache.begin_adopting(0)
    turn(cache, (1, 2), 1, now=1.0)
    spilled(cache, 1.0)
    other = turn(cache, (3, 4), 2, now=2.0)
    assert [type(action) for action in spilled(cache, 2.0)] == [Drop, Spill]
    assert cache.forget_chain(other, (), 3.0) == [Drop(*other)]
    cache.adopt(entries, 4.0)
    cache.end_adopting()
    cache.check()
    assert cache.match(ROOT, (1, 2, 3)).partial.places.keys() == {Tier.DEVICE}


def test_nothing_is_remembered_of_what_was_dropped_once_the_index_is_read():
    """A soak showed it: a daemon that began with an empty disk never ended to read it, and kept every key it dropped."""
    cache = make(disk=1)
    cache.begin_adopting(0)
    cache.end_adopting()
    for lease_id, tokens in enumerate([(1, 2), (3, 4)]):
        keys = turn(cache, tokens, lease_id)
        spilled(cache)
    assert cache.forget_chain(keys, (), 3.0) == [Drop(*keys)]
    assert cache.forget_chain(keys, (), 4.0) == [], "it may be on the disk only while that is read"


def test_a_lease_ends_with_its_blocks():
    """A soak showed it: leases kept every block that was ever theirs, for half an hour each."""
    cache = make(host=0, disk=0)
    for lease_id in range(60):
        turn(cache, tuple(100 * lease_id + at for at in range(6)), lease_id)
        cache.make_room(2, 1.0)
        cache.tick(1.0)
        cache.check()
    leases = list(cache.leases())
    known = cache.statistics().blocks
    assert len(leases) <= 3 * known
    assert sum(len(lease.blocks) for lease in leases) <= 3 * known


def test_a_deleted_chain_goes_though_its_tail_went_before():
    cache = make(host=0, disk=0)
    keys = turn(cache, tuple(range(10)), 1)
    while cache.statistics().blocks > 1:
        cache.make_room(cache.free_slots + 1, 1.0)
    cache.tick(1.0)
    (lease,) = cache.leases()
    assert [block.key for block in lease.blocks] == [keys[0]]
    cache.forget_chain(keys, (), 2.0)
    assert cache.statistics().blocks == 0
    cache.check()


def test_replaced_schedules_of_leases_are_forgotten():
    cache = make(limits=replace(NEVER, disk_after_s=1000.0))
    turn(cache, (1, 2), 1)
    for at in range(1000):
        cache.reclass(1, SessionClass.TOOL_WAIT, float(at))
        cache.check()
    assert len(cache._leases._due) < 100


def test_a_record_whose_parent_is_gone_waits_for_it():
    tokens = tuple(range(9))
    head = chain_key(ROOT, tokens[:4])
    cache = make()
    cache.begin_adopting(1)
    orphan = IndexEntry(chain_key(head, tokens[4:8]), ROOT, head, 1, tokens[4:8], 1.0)
    assert cache.adopt([orphan], 0.0) == []
    cache.check()
    assert cache.match(ROOT, tokens).tokens == 0
    begin(cache, tokens[:5])
    assert cache.match(ROOT, tokens).tokens == 8


def restored(tokens, *, device=6, slow=()):
    """A cache whose disk alone holds `tokens`, a hold that loads them, and its fetches."""
    old = make()
    turn(old, tokens, 1)
    entries = [entry(s, 5.0) for s in spilled(old)]
    cache = make(device=device)
    cache.begin_adopting(len(entries))
    cache.adopt(entries, 0.0)
    hold = cache.acquire(cache.match(ROOT, (*tokens, 99)), 1.0)
    return cache, hold, cache.load(hold, 1.0)


@pytest.mark.parametrize(("reason", "why"), [("checksum", "verify_failed"), ("io", "io_failed")])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_exactly_the_block_that_did_not_come_is_computed(bad, reason, why):
    tokens = tuple(range(12))
    cache, hold, fetches = restored(tokens)
    drops = []
    for at, fetch in enumerate(fetches):
        if at == bad:
            drops = cache.failed(fetch, 1.0, reason)
        else:
            cache.landed(fetch, 1.0)
        cache.check()
    assert len(drops) == (reason == "checksum"), "a disk that only failed has lost nothing"
    assert cache.ready(hold)
    begin_at = bad * B
    assert hold.todo == [(begin_at, begin_at + B)]
    assert (hold.matched_tokens, hold.cached_tokens) == (12, 8)
    assert hold.missed == {why: B}
    assert cache.missing_slots(hold, begin_at + B) == 1
    assert cache.lend(hold, begin_at + B, 2.0)
    cache.commit(hold, tokens[begin_at : begin_at + 3], 2.0)
    cache.check()
    cache.commit(hold, tokens[begin_at + 3 : begin_at + B], 2.0)
    cache.check()
    assert not hold.todo
    assert len(hold.table) == 3
    assert cache.lend(hold, 13, 2.0)
    cache.commit(hold, (99,), 2.0)
    assert len(cache.lease(hold, 1, "s", 3.0, None)) == 4
    cache.check()
    assert cache.match(ROOT, (*tokens, 99, 100)).tokens == 13


def test_a_load_that_takes_too_long_is_computed_where_it_has_not_landed():
    tokens = tuple(range(12))
    cache, hold, fetches = restored(tokens)
    cache.landed(fetches[1], 1.0)
    cache.give_up(hold, 2.0)
    cache.check()
    assert hold.todo == [(0, 4), (8, 12)]
    assert hold.missed == {"slow": 8}
    assert cache.lend(hold, 4, 2.0)
    cache.commit(hold, tokens[:4], 2.0)
    cache.landed(fetches[0], 3.0)
    cache.landed(fetches[2], 3.0)
    cache.check()
    assert cache.lend(hold, 12, 3.0)
    cache.commit(hold, tokens[8:12], 3.0)
    cache.check()
    assert pool(cache, Tier.DEVICE).lent == 0, "what landed meanwhile is used instead"
    assert hold.table == [block.places[Tier.DEVICE] for block in hold.blocks]


def test_a_hole_that_is_never_computed_leaves_nothing_behind():
    cache, hold, fetches = restored(tuple(range(12)))
    cache.failed(fetches[0], 1.0, "checksum")
    land(cache, fetches[1:])
    assert cache.ready(hold)
    assert cache.lend(hold, 4, 2.0)
    assert cache.lease(hold, 1, "s", 2.0, None) == ()
    cache.check()
    assert cache.match(ROOT, tuple(range(13))).tokens == 0
    assert pool(cache, Tier.DEVICE).lent == 0


def test_what_was_fetched_ahead_counts_as_found_on_disk():
    tokens = tuple(range(12))
    cache, ahead, fetches = restored(tokens)
    land(cache, fetches)
    hold = cache.acquire(cache.match(ROOT, (*tokens, 99)), 2.0)
    assert hold.by_tier == {Tier.DEVICE: 12}
    cache.credit(hold, ahead)
    assert hold.by_tier == {Tier.DISK: 12}


def test_what_would_be_restored_at_a_loss_is_left_where_it_is():
    tokens = tuple(range(10))
    old = make()
    turn(old, tokens, 1)
    cache = make()
    cache.begin_adopting(3)
    cache.adopt([entry(s, 5.0) for s in spilled(old)], 0.0)
    hold = cache.acquire(cache.match(ROOT, (*tokens, 99)), 1.0)
    cache.forgo(hold, 1, "loss", 1.0)
    assert len(cache.load(hold, 1.0)) == 1
    assert (hold.matched_tokens, hold.missed) == (4, {"loss": 6})
    cache.check()


def test_a_record_that_the_scrubber_refuses_is_dropped_and_written_again_if_it_can_be():
    cache = make()
    one, two = turn(cache, tuple(range(6)), 1)
    spilled(cache)
    assert cache.rotten(one, 1.0) == [Drop(one)]
    assert [spill.key for spill in spilled(cache, 1.0)] == [one]
    land(cache, cache.demote(Tier.DISK, None, 2.0))
    assert cache.rotten(two, 3.0) == [Drop(two)]
    cache.check()
    tokens = (*range(6), 9)
    assert cache.explain(cache.match(ROOT, tokens), tokens) == {"verify_failed": 2, "logits": 1}
    assert cache.rotten(two, 3.0) == []


def test_a_copy_on_the_host_that_fails_its_check_is_replaced_from_disk():
    cache = make()
    tokens = tuple(range(8))
    turn(cache, tokens, 1)
    spilled(cache)
    land(cache, cache.demote(Tier.HOST, None, 1.0))
    hold = cache.acquire(cache.match(ROOT, (*tokens, 9)), 2.0)
    copies = cache.load(hold, 2.0)
    (fetch,) = cache.failed(copies[0], 2.0, "checksum")
    assert isinstance(fetch, Fetch)
    assert Tier.HOST not in hold.blocks[0].places
    land(cache, [fetch, *copies[1:]], 2.0)
    assert cache.ready(hold)
    assert hold.todo == []


def test_every_token_that_is_computed_has_a_reason():
    cache = make(device=3, host=0, disk=0)
    one, two = tuple(range(10)), tuple(range(50, 60))
    assert cache.explain(cache.match(ROOT, one), one) == {"new": 9, "logits": 1}
    turn(cache, one, 1, now=1.0)
    again = (*one, 10)
    assert cache.explain(cache.match(ROOT, again), again) == {"logits": 1}
    ended(cache, 1)
    cache.make_room(3, 2.0)
    turn(cache, two, 2, now=2.0)
    match = cache.match(ROOT, (*one, 10, 11))
    assert cache.explain(match, (*one, 10, 11)) == {
        "evicted_device_capacity": 10,
        "new": 1,
        "logits": 1,
    }
    other = (*two[:5], 99, *two[6:], 7, 8)
    found = cache.match(ROOT, other)
    assert found.tokens == 5
    assert cache.explain(found, other, supersedes=2) == {"changed": 5, "new": 1, "logits": 1}
    assert (
        cache.forget_chain([block.key for block in cache.match(ROOT, (*two, 0)).blocks], (), 3.0)
        == []
    )
    cache.check()


def test_a_deleted_chain_leaves_every_tier_but_for_what_others_need():
    cache = make()
    head = tuple(range(8))
    turn(cache, head, 1, now=1.0)
    mine = turn(cache, (*head, 8, 9), 2, now=2.0, supersedes=1)
    turn(cache, (*head[:4], 77, 78), 3, now=2.0)
    spilled(cache, 2.0)
    land(cache, cache.demote(Tier.HOST, None, 2.0))
    dropped = cache.forget_chain(mine, mine[:1], 3.0)
    assert [drop.key for drop in dropped] == [mine[2], mine[1]]
    cache.check()
    tokens = (*head, 8, 9, 10)
    assert cache.match(ROOT, tokens).tokens == 4
    assert cache.explain(cache.match(ROOT, tokens), tokens) == {"deleted": 6, "logits": 1}
    assert cache.match(ROOT, (*head[:4], 77, 78, 79)).tokens == 6
    (other,) = [block.key for block in cache.match(ROOT, (*head[:4], 9)).blocks]
    assert cache.forget_chain((other,), (), 3.0) == [], "a block that others continue stays"


def test_a_deletion_spares_what_another_session_still_has():
    cache = make()
    head = tuple(range(8))
    turn(cache, head, 1, session="mine")
    keys = turn(cache, (*head, 8, 9), 2, session="yours")
    cache.forget_chain(keys, (), 1.0)
    assert cache.match(ROOT, (*head, 8, 9)).tokens == 8


def test_a_chain_that_is_being_written_is_deleted_when_that_has_ended():
    cache = make()
    keys = turn(cache, (0, 1, 2), 1)
    (spill,) = cache.write_behind(1.0, all_dirty=True)
    assert cache.forget_chain(keys, (), 1.0) == []
    cache.landed(spill, 2.0)
    assert cache.tick(2.0) == [Drop(keys[0])]
    assert cache.statistics().blocks == 0
    cache.check()


def test_at_rest_refs_and_leases_are_zero():
    cache = make()
    turn(cache, tuple(range(10)), 1)
    hold = begin(cache, tuple(range(11)))
    cache.release(hold, 1.0)
    ended(cache, 1)
    land(cache, cache.demote(Tier.DISK, None, 2.0))
    now = cache.statistics()
    assert (now.refs, now.leases, now.holds, now.dirty, now.flying) == (0, 0, 0, 0, 0)
    assert [now.tiers[tier].pool.held for tier in Tier] == [0, 0, now.blocks]
