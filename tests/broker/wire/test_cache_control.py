"""Anthropic's caching arithmetic: by its own examples, by property, and never more than the engine gave."""

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from broker.errors import BadRequest
from broker.wire.cache_control import (
    Block,
    Breakpoint,
    InputUsage,
    Layout,
    PromptCaches,
    lay_out,
    name_after,
)
from broker.wire.requests import Cut

M5, H1 = 300.0, 3600.0


def block(n, ttl_s=None, **fields):
    return Block(b"%d" % n, Cut(0, 0, n), f"at[{n}]", ttl_s, **fields)


def layout(marks, blocks=30, salt=b""):
    """A layout of so many blocks; `marks` are {block: ttl}."""
    names = tuple(salt + b"%d" % n for n in range(blocks))
    points = tuple(Breakpoint(n, ttl) for n, ttl in sorted(marks.items()))
    return Layout(names, points, tuple(Cut(0, 0, n) for n in sorted(marks)))


class Client:
    """Counts with 100 tokens a block. The engine has everything unless `cached` says otherwise."""

    def __init__(self, min_tokens=100, **settings):
        self.caches = PromptCaches(min_tokens=min_tokens, **settings)
        self.now = 1000.0

    def ask(self, marks, blocks=30, *, cached=None, tenant="t", salt=b"", started_at=None):
        prompt_tokens = 100 * blocks + 10
        return self.caches.begun(
            tenant,
            layout(marks, blocks, salt),
            prompt_tokens=prompt_tokens,
            cached_tokens=prompt_tokens - 1 if cached is None else cached,
            ends=[100 * (n + 1) for n in sorted(marks)],
            started_at=self.now if started_at is None else started_at,
        )


def test_nothing_marked_is_nothing_cached():
    client = Client()
    for _ in range(2):
        assert client.ask({}) == InputUsage(fresh=3010)


def test_the_first_request_writes_and_the_second_reads():
    client = Client()
    assert client.ask({9: M5}, 12) == InputUsage(fresh=210, written_5m=1000)
    assert client.ask({9: M5}, 12) == InputUsage(fresh=210, read=1000)


def test_a_conversation_reads_what_it_wrote_and_writes_what_is_new():
    client = Client()
    client.ask({3: M5}, 4)
    assert client.ask({7: M5}, 8) == InputUsage(fresh=10, read=400, written_5m=400)
    assert client.ask({11: M5}, 12) == InputUsage(fresh=10, read=800, written_5m=400)


@pytest.mark.parametrize(
    ("hit", "usage"),
    [
        (None, InputUsage(fresh=110, written_1h=800, written_5m=1000)),
        (3, InputUsage(fresh=110, read=400, written_1h=400, written_5m=1000)),
        (7, InputUsage(fresh=110, read=800, written_1h=0, written_5m=1000)),
        (17, InputUsage(fresh=110, read=1800)),
    ],
)
def test_mixed_times_are_split_at_the_highest_hit_the_last_hour_and_the_last_mark(hit, usage):
    """A is the highest hit, B the last 1-hour breakpoint after it, C the last of all: B - A and C - B are written."""
    client = Client()
    if hit is not None:
        client.ask({hit: H1}, 19)
    assert client.ask({3: H1, 7: H1, 17: M5}, 19) == usage


@pytest.mark.parametrize(("behind", "found"), [(0, True), (1, True), (19, True), (20, False)])
def test_a_breakpoint_walks_back_twenty_positions_itself_included(behind, found):
    client = Client()
    client.ask({4: M5}, 30)
    usage = client.ask({4 + behind: M5}, 30)
    assert usage.read == (500 if found else 0)


def test_a_second_breakpoint_reaches_what_the_last_one_does_not():
    client = Client()
    client.ask({2: M5}, 30)
    assert client.ask({28: M5}, 30).read == 0
    client = Client()
    client.ask({2: M5}, 30)
    assert client.ask({2: M5, 28: M5}, 30).read == 300


def test_the_lowest_prefix_that_counts_is_configured_and_below_it_nothing_is_said():
    client = Client(min_tokens=500)
    for _ in range(2):
        assert client.ask({3: M5}, 6) == InputUsage(fresh=610)
    assert client.ask({3: M5, 4: M5}, 6) == InputUsage(fresh=110, written_5m=500)


@pytest.mark.parametrize(
    ("ttl_s", "later", "found"), [(M5, 299, 1), (M5, 300, 0), (H1, 3599, 1), (H1, 3600, 0)]
)
def test_an_entry_lives_for_its_time_from_the_start_of_the_request(ttl_s, later, found):
    client = Client()
    client.ask({5: ttl_s})
    client.now += later
    assert bool(client.ask({5: ttl_s}).read) == bool(found)


def test_each_hit_refreshes_for_the_time_that_was_asked_at_the_write():
    client = Client()
    client.ask({5: M5})
    for _ in range(5):
        client.now += 200
        assert client.ask({5: M5}).read == 600
    client.ask({8: H1})
    client.now += 3000
    assert client.ask({12: M5}).read == 900
    client.now += 3000
    assert client.ask({12: M5}).read == 900, "a read by a five-minute mark keeps the hour"


def test_a_short_time_over_a_long_one_shortens_nothing():
    client = Client()
    client.ask({5: H1})
    client.ask({5: M5})
    client.now += 3000
    assert client.ask({5: M5}).read == 600


def test_a_request_that_started_before_a_refresh_does_not_take_it_back():
    client = Client()
    client.ask({5: M5})
    client.now += 200
    client.ask({5: M5})
    client.ask({5: M5}, started_at=client.now - 150)
    client.now += 250
    assert client.ask({5: M5}).read == 600


def test_tenants_do_not_read_each_others_entries():
    client = Client()
    client.ask({5: M5})
    assert client.ask({5: M5}, tenant="other").read == 0


def test_other_content_is_another_entry():
    client = Client()
    client.ask({5: M5}, salt=b"a")
    assert client.ask({5: M5}, salt=b"b").read == 0


@pytest.mark.parametrize(
    ("cached", "read"), [(0, 0), (299, 0), (300, 300), (799, 300), (800, 800), (3000, 800)]
)
def test_no_read_is_claimed_that_the_engine_did_not_give(cached, read):
    client = Client()
    client.ask({2: M5, 7: M5})
    usage = client.ask({2: M5, 7: M5, 9: M5}, cached=cached)
    assert usage == InputUsage(fresh=2010, read=read, written_5m=1000 - read)


def test_a_tenants_table_is_bounded_and_the_oldest_go_first():
    client = Client(max_entries=3)
    for salt in (b"a", b"b", b"c"):
        client.ask({5: M5}, salt=salt)
    assert client.ask({5: M5}, salt=b"a").read == 600, "and so the newest"
    client.ask({5: M5}, salt=b"d")
    client.ask({5: M5}, tenant="other")
    assert client.ask({5: M5}, salt=b"a").read == 600
    assert client.ask({5: M5}, salt=b"b").read == 0


marks = st.dictionaries(st.integers(0, 29), st.sampled_from([M5, H1]), max_size=4)
requests = st.tuples(
    marks, st.integers(0, 3009), st.integers(0, 2000), st.sampled_from([b"a", b"b"])
)


@given(st.lists(requests, max_size=12))
def test_the_parts_always_sum_to_the_prompt_and_never_exceed_the_engines_read(script):
    client = Client(min_tokens=300)
    written = set()  # (salt, block)
    for marked, cached, passed, salt in script:
        client.now += passed
        usage = client.ask(marked, cached=cached, salt=salt)
        assert usage.fresh + usage.read + usage.written == 3010
        assert min(usage.fresh, usage.read, usage.written_5m, usage.written_1h) >= 0
        assert usage.read <= cached
        last = max((100 * (n + 1) for n in marked if n >= 2), default=0)
        assert usage.read + usage.written == max(last, usage.read)
        if usage.read:
            event("read")
            place = usage.read // 100 - 1
            assert (salt, place) in written
            assert any(0 <= n - place < 20 for n in marked)
        written |= {(salt, n) for n in marked if n >= 2}


# The breakpoints of a request


def test_marks_become_breakpoints_with_their_places():
    found = lay_out([block(0), block(1, H1), block(2), block(3, M5)], None)
    assert found.names == (b"0", b"1", b"2", b"3")
    assert found.breakpoints == (Breakpoint(1, H1), Breakpoint(3, M5))
    assert [cut.items for cut in found.cuts] == [1, 3]
    assert found.longest_s == H1
    assert lay_out([block(0)], None).longest_s is None


def test_the_automatic_mark_is_on_the_last_block_that_can_bear_one():
    found = lay_out([block(0), block(1), block(2, cacheable=False)], M5)
    assert found.breakpoints == (Breakpoint(1, M5),)
    assert lay_out([block(0, cacheable=False)], M5).breakpoints == ()


def test_the_automatic_mark_does_nothing_to_a_block_that_has_the_same():
    blocks = [*(block(n, M5) for n in range(4))]
    assert len(lay_out(blocks, M5).breakpoints) == 4


@pytest.mark.parametrize(
    ("blocks", "automatic", "param"),
    [
        ([block(n, M5) for n in range(5)], None, "cache_control"),
        ([*(block(n, M5) for n in range(4)), block(4)], M5, "cache_control"),
        ([block(0, M5)], H1, "cache_control.ttl"),
        ([block(0, H1)], M5, "cache_control.ttl"),
        ([block(0, M5), block(1, H1)], None, "at[1].cache_control.ttl"),
        ([block(0, M5), block(1)], H1, "at[1].cache_control.ttl"),
    ],
)
def test_what_breaks_a_rule_of_marks_is_refused(blocks, automatic, param):
    with pytest.raises(BadRequest) as refused:
        lay_out(blocks, automatic)
    assert refused.value.param == param


def test_a_name_tells_apart_what_two_strings_hold():
    names = {
        name_after(b"", "a", "b"),
        name_after(b"", "ab"),
        name_after(b"", "a"),
        name_after(name_after(b"", "a"), "b"),
        name_after(b"x", "a", "b"),
    }
    assert len(names) == 5
