"""Where an engine's turn spent its time: the parts follow one another without a gap, and a restore names its tiers."""

import pytest

from engine.api import Cancel, Demote, RequestId, Sampling, Submit
from engine.sequence import Sequence
from tests.engine.test_engine import Bench, on_disk, prompt_of
from tiers.block import Tier

TICK_S = 2.0**-10  # exact in a float, so that sums can be compared


class Ticking:
    """A clock on which every look costs a tick."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += TICK_S
        return self.now


def ticking(bench: Bench) -> Ticking:
    bench.engine._clock = clock = Ticking()
    return clock


def total(usage) -> float:
    return usage.queue_s + usage.load_s + usage.prefill_s + usage.decode_s


def submit(bench: Bench, prompt, *, at: float, output: int = 3) -> RequestId:
    bench.requests += 1
    request = RequestId(bench.requests)
    sampling = Sampling(max_tokens=output, temperature=0.0)
    bench.inbox.put(Submit(request, "s", b"", tuple(prompt), sampling, at=at))
    return request


def test_the_parts_add_up_from_the_inbox_to_the_end():
    bench = Bench()
    clock = ticking(bench)
    clock.now = 10.0  # it lay in the inbox while a step ran
    request = submit(bench, prompt_of(30), at=4.0)
    bench.until_quiet()
    usage = bench.finished(request).usage
    assert usage.queue_s >= 6.0
    assert usage.prefill_s > 0
    assert usage.decode_s > 0
    assert 6.0 < total(usage) <= clock.now - 4.0


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_a_restore_s_seconds_are_its_tier_s(tier):
    bench = Bench(device=32, host=32)
    clock = ticking(bench)
    prompt = prompt_of(40)
    bench.run(prompt, 4)
    bench.inbox.put(Demote(1, tier, None))
    bench.until_quiet()
    request = submit(bench, prompt, at=clock.now)
    bench.until_quiet()
    usage = bench.finished(request).usage
    name = tier.name.lower()
    assert usage.load_by_tier.keys() == {name}
    assert usage.load_by_tier[name] > 0
    assert sum(usage.load_by_tier.values()) == pytest.approx(usage.load_s)


def test_a_private_copy_of_a_shared_tail_is_not_the_host_s():
    bench = Bench(device=32, host=32)
    clock = ticking(bench)
    prompt = prompt_of(41)
    bench.run(prompt, 4)
    request = submit(bench, (*prompt, 1, 2), at=clock.now)
    bench.until_quiet()
    usage = bench.finished(request).usage
    assert usage.cached.device == usage.cached.total > 40
    assert usage.load_by_tier.keys() == {"device"}


def test_a_restore_that_is_cancelled_has_waited_until_then():
    bench, prompt = on_disk(prompt_of(40), device=40)
    bench.disk.stall()
    request = submit(bench, prompt, at=bench.now)
    bench.engine._turn(bench.emit)
    bench.now += 0.25
    bench.inbox.put(Cancel(request))
    bench.engine._turn(bench.emit)
    usage = bench.finished(request).usage
    assert (usage.load_s, usage.prefill_s, usage.decode_s) == (0.25, 0.0, 0.0)


def test_a_prefill_that_samples_nothing_ends_with_itself():
    bench = Bench()
    ticking(bench)
    request = submit(bench, prompt_of(30), at=0.0, output=0)
    bench.until_quiet()
    usage = bench.finished(request).usage
    assert usage.prefill_s > 0
    assert usage.decode_s == 0.0


def test_copies_count_as_the_host_s_and_the_rest_of_a_read_as_the_disk_s():
    sequence = Sequence.of(Submit(RequestId(1), "s", b"", (1, 2), Sampling(max_tokens=1)), 0.0)
    sequence.load_started, sequence.reads_disk, sequence.copied_s = 1.0, True, 0.25
    sequence.loaded(2.0)
    assert sequence.load_by_tier == {"host": 0.25, "disk": 0.75}
    sequence.reads_disk = False
    sequence.loaded(2.0)
    assert sequence.load_by_tier == {"host": 1.0}


def test_the_report_counts_blocks_up_and_down_by_tier():
    bench, prompt = on_disk(prompt_of(40), device=32, host=32)
    down = bench.report()
    assert down.spilled_total["disk"] == down.spills_total > 0
    bench.run(prompt, 2)
    bench.inbox.put(Demote(2, Tier.HOST, None))
    bench.until_quiet()
    moved = bench.report()
    assert moved.restored_total["disk"] == moved.fetches_total > 0
    assert moved.spilled_total["host"] > 0
    bench.run(prompt, 2)
    assert bench.report().restored_total["host"] > 0
    bench.disk.refuse = True
    bench.run(prompt_of(30, salt=3), 2)
    bench.pass_time(5.0)
    refused = bench.report()
    assert refused.spill_failures_by_reason == {"behind": refused.spill_failures_total}
    assert refused.spill_failures_total > 0


def test_the_oldest_block_that_waits_to_be_written_has_an_age():
    bench = Bench(max_lag_s=100.0)
    bench.run(prompt_of(12), 2)
    bench.pass_time(30.0)
    assert bench.report().disk.oldest_dirty_s == 30.0
    assert bench.report().disk.new_bytes_total > 0
