"""The engine loop against the hash-chain model: whatever is cached, spilled, fetched, preempted or cancelled, the ids
are those of the oracle, every request ends once, and nothing stays held."""

from __future__ import annotations

import queue
from collections import defaultdict
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from engine.api import (
    Began,
    Cancel,
    Demote,
    Finished,
    FinishReason,
    Forget,
    Inspect,
    Locate,
    Located,
    Persist,
    Pin,
    Prefetch,
    Reclass,
    Refused,
    RefuseReason,
    RequestId,
    Sampled,
    Sampling,
    Stop,
    Submit,
    Unpin,
)
from engine.canary import Canaries
from engine.draft import Draft
from engine.engine import Engine
from engine.memory import Memory
from engine.restore import Rates, RestoreCosts, RestoreLimits
from engine.sampler import Choice
from engine.scheduler import Scheduler
from engine.transfers import Copier, CudaMemory, Streams
from tests.engine.fake_model import VOCAB, FakeDisk, FakeRunner, FakeSampler, oracle
from tiers.arena import Arena, Geometry
from tiers.block import Copy, Tier, chain_key, root_key
from tiers.cache import TieredCache
from tiers.disk import Failed, IndexFailed, Landed, Rotten
from tiers.manifest import Manifest
from tiers.policy import Limits, SessionClass
from tiers.store import BlockWrite, MemoryStore, StoreLimits

BLOCK = 4
RESTORE = RestoreLimits()
RATES = Rates(latency_s=1e-4)


class AtOnce:
    """A stream, and its events, whose work is done when it is issued."""

    def copy(self, source, target) -> None:
        target.copy_(source)

    def record(self) -> AtOnce:
        return self

    def wait(self, event: AtOnce | None = None) -> None:
        pass


class Late(CudaMemory):
    """A GPU's, whose copies towards the device are answered when the test says, among the disk's answers."""

    disk: FakeDisk

    def __init__(self, arenas, block_tokens) -> None:
        stream, jobs = AtOnce(), queue.SimpleQueue()
        super().__init__(arenas, block_tokens, Streams(stream, stream, stream), jobs)
        self.replies = []
        self.copier = Copier(jobs, arenas, stream, self.replies.append)

    def copy(self, action: Copy) -> bool:
        if action.source is Tier.HOST:
            self.disk.pending.append(self.answer)
            return super().copy(action)
        self.copy_now(action)
        return True

    def answer(self) -> Landed | Failed:
        self.copier.take()
        return self.replies.pop()


class Bench:
    """An engine driven turn by turn in the test's own thread, with a clock that moves when told."""

    def __init__(
        self,
        *,
        device: int = 16,
        host: int = 8,
        disk: int = 64,
        store: MemoryStore | None = None,
        step_tokens: int = 16,
        mixed_tokens: int = 4,
        prefill_share: float = 1.0,
        max_running: int = 4,
        max_waiting: int = 64,
        host_after_s: float = 1e6,
        disk_after_s: float = 2e6,
        max_lag_s: float = 1.0,
        restore: RestoreLimits = RESTORE,
        rates: Rates = RATES,
        index_unread: bool = False,
        canary: float = 0.0,
        draft_tokens: int = 15,
        late_copies: bool = False,
    ) -> None:
        self.now = 0.0
        self.checks = True  # the tables, after every turn; a walk over all of them
        self.inbox = queue.SimpleQueue()
        geometry = Geometry(
            layers=1, kv_heads=1, head_dim=1, block_tokens=BLOCK, dtype_name="float32"
        )
        arenas = {Tier.DEVICE: Arena(geometry, device), Tier.HOST: Arena(geometry, max(host, 1))}
        arenas[Tier.DEVICE].blocks.fill_(float("nan"))
        arenas[Tier.HOST].blocks.fill_(float("nan"))
        self.cache = TieredCache(
            block_tokens=BLOCK,
            slots={Tier.DEVICE: device, Tier.HOST: host, Tier.DISK: disk},
            limits=Limits(
                host_after_s=host_after_s, disk_after_s=disk_after_s, max_lag_s=max_lag_s
            ),
        )
        self.scheduler = Scheduler(
            step_tokens=step_tokens,
            mixed_tokens=mixed_tokens,
            prefill_share=prefill_share,
            max_running=max_running,
            max_waiting=max_waiting,
            max_loading=restore.max_loading,
            device_slots=device,
            block_tokens=BLOCK,
        )
        self.memory = (Late if late_copies else Memory)(arenas, BLOCK)
        self.runner = FakeRunner(arenas[Tier.DEVICE])
        self.store = store or MemoryStore(
            fingerprint=bytes(32),
            payload_bytes=geometry.block_bytes,
            block_tokens=BLOCK,
            limits=StoreLimits(block_bytes=1 << 30),
        )
        self.adopted = []
        self.beside_reads: list[bool] = []  # of each step
        self.disk = FakeDisk(self.store)
        self.disk.post = self.inbox.put
        if late_copies:
            self.memory.disk = self.disk
        self.engine = Engine(
            cache=self.cache,
            scheduler=self.scheduler,
            runner=self.runner,
            sampler=FakeSampler(),
            memory=self.memory,
            writer=self.disk,
            reader=self.disk,
            costs=RestoreCosts(
                rates,
                block_bytes=geometry.block_bytes,
                block_tokens=BLOCK,
                step_tokens=step_tokens,
            ),
            draft_tokens=draft_tokens,
            restore=restore,
            canaries=Canaries(canary, lambda: 0.5),
            records=self.store.statistics().blocks,
            stored_bytes=geometry.block_bytes // 2,
            root=lambda salt: root_key(b"fake", salt),
            max_context=10_000,
            vocab_size=VOCAB,
            clock=lambda: self.now,
            inbox=self.inbox,
            adopted=lambda: self.adopted.append(self.cache.statistics()),
            make_way=self.make_way,
        )
        self.said = defaultdict(list)
        self.answers = {}
        self.requests = 0
        if not index_unread:
            self.read_index()

    def make_way(self, reading: bool) -> int:
        self.beside_reads.append(reading)
        return 1 if reading else 2

    def read_index(self) -> None:
        while not self.engine._adoption.complete:
            self.engine._turn(self.emit)
            while self.disk.pending:
                self.disk.settle()

    def emit(self, step) -> None:
        for output in step.outputs:
            self.said[output.request].append(output)
        for answer in step.answers:
            self.answers[answer.ticket] = answer.value

    def submit(
        self,
        prompt,
        output=4,
        *,
        session="s",
        salt=b"",
        supersedes=None,
        stop=frozenset(),
        keep_s=0.0,
    ) -> RequestId:
        self.requests += 1
        request = RequestId(self.requests)
        self.inbox.put(
            Submit(
                request=request,
                session=session,
                salt=salt,
                prompt=tuple(prompt),
                sampling=Sampling(max_tokens=output, temperature=0.0, stop_ids=frozenset(stop)),
                supersedes=supersedes,
                keep_s=keep_s,
            )
        )
        return request

    def turn(self) -> None:
        """One turn of the loop; never waits: a stuck or idle engine is given a disk answer or left alone."""
        if (self.engine._stuck or self.scheduler.idle) and self.inbox.empty():
            if self.disk.pending:
                self.disk.settle()
            elif self.engine._sleep_s() != 0.0:
                return
        self.engine._turn(self.emit)
        if self.checks:
            self.cache.check()

    def until_quiet(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if self.scheduler.idle and self.inbox.empty() and not self.disk.pending:
                return
            self.turn()
        raise AssertionError("the engine did not come to rest")

    def run(self, prompt, output=4, **options) -> tuple[int, ...]:
        request = self.submit(prompt, output, **options)
        self.until_quiet()
        return self.ids(request)

    def ids(self, request) -> tuple[int, ...]:
        return tuple(i for o in self.said[request] if isinstance(o, Sampled) for i in o.tokens)

    def finished(self, request) -> Finished:
        last = self.said[request][-1]
        assert isinstance(last, Finished)
        return last

    def report(self):
        self.inbox.put(Inspect(ticket=999))
        self.until_quiet()
        return self.answers.pop(999)

    def pass_time(self, seconds: float) -> None:
        """Let the clock and the engine move on, so that what is due happens."""
        self.now += seconds
        self.report()


def manifest_of(response_id, tokens, keys) -> Manifest:
    return Manifest(
        response_id=response_id,
        tenant="",
        session="s",
        parent=None,
        created_at=0.0,
        stored=True,
        tokens=tokens,
        sampled_from=len(tokens),
        item_ids=(),
        content_digest=b"",
        keys=keys,
        body=b"",
    )


def guesses(right: int):
    """Stands for `Draft.propose`: so many tokens as the model will say them, and then one that it will not."""

    def propose(self, tokens, most, price):
        coming = oracle(tuple(tokens), right + 1)
        return (*coming[:right], (coming[right] + 1) % VOCAB)[:most]

    return patch.object(Draft, "propose", propose)


def prompt_of(length: int, salt: int = 0) -> tuple[int, ...]:
    return tuple((i * 37 + salt * 11 + 5) % VOCAB for i in range(length))


@pytest.mark.parametrize("right", range(5))
def test_drafts_change_how_many_steps_are_run_and_nothing_that_is_said(right):
    plain = Bench(draft_tokens=0)
    plain.run(prompt_of(7), 30)
    bench = Bench()
    with guesses(right):
        first = bench.run(prompt_of(7), 30)
    assert first == oracle(prompt_of(7), 30)
    usage = bench.finished(1).usage
    assert (usage.output_tokens, usage.computed_tokens) == (30, 7)
    assert bench.report().tokens_total == plain.report().tokens_total
    steps, alone = len(bench.runner.batches), len(plain.runner.batches)
    # A draft stays inside its block of 4 tokens.
    assert steps == alone if right == 0 else steps <= alone * 2 / 3
    prompt = prompt_of(7) + first + (7, 8, 9)
    assert bench.run(prompt, 5) == oracle(prompt, 5), (
        "the KV that was kept is that of what was said"
    )
    assert bench.finished(2).usage.cached.device == 36, "a drafted token's is kept too"


def test_a_draft_ends_before_a_stop_id_and_before_the_last_token():
    said = oracle(prompt_of(8), 12)
    bench = Bench()
    with guesses(3):
        stopped = bench.run(prompt_of(8), 12, stop={said[2]})
        assert stopped == said[: said.index(said[2]) + 1]
        assert bench.finished(1).reason is FinishReason.STOP
        for most in range(1, 6):
            assert bench.run(prompt_of(8), most) == said[:most]
    report = bench.report()
    assert report.drafts_total["right"] > 0


def test_drafts_of_several_sessions_share_a_step_and_are_told_apart():
    bench = Bench(device=32)
    with guesses(2):
        requests = [
            bench.submit(prompt_of(6, salt=each), 12, session=f"{each}") for each in range(3)
        ]
        bench.until_quiet()
    for each, request in enumerate(requests):
        assert bench.ids(request) == oracle(prompt_of(6, salt=each), 12)
    assert any(len(batch.segments) == 3 and len(batch.tokens) > 6 for batch in bench.runner.batches)


def cycle_of(length: int) -> tuple[int, ...]:
    return tuple(1 + at % 7 for at in range(length))


def test_the_prompt_is_looked_up_for_what_comes_next():
    """A model that repeats a cycle: every step but the first few says several tokens."""
    bench = Bench()

    def repeat(logits, requests):
        return [Choice(1 + (r.step % 7)) for r in requests]

    with patch.object(bench.engine._sampler, "sample", repeat):
        assert bench.run(cycle_of(21), 32) == cycle_of(32)
    assert len(bench.runner.batches) < 2 + 32 / 2.5


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 23])
def test_a_cold_run_gives_the_oracle_ids(length):
    bench = Bench()
    assert bench.run(prompt_of(length), 9) == oracle(prompt_of(length), 9)
    finished = bench.finished(1)
    assert finished.reason is FinishReason.LENGTH
    assert finished.usage.computed_tokens == length
    assert finished.usage.output_tokens == 9


def test_the_next_turn_computes_only_its_delta():
    bench = Bench()
    first = bench.run(prompt_of(10), 5)
    prompt = prompt_of(10) + first + (7, 8, 9)
    second = bench.run(prompt, 5, supersedes=bench.finished(1).lease)
    assert second == oracle(prompt, 5)
    usage = bench.finished(2).usage
    assert usage.cached.device == 14  # all but the newest sampled token, which never had KV
    assert usage.computed_tokens == 4


def test_the_same_prompt_again_computes_one_token():
    bench = Bench()
    bench.run(prompt_of(12), 3)
    assert bench.run(prompt_of(12), 3) == oracle(prompt_of(12), 3)
    assert bench.finished(2).usage.computed_tokens == 1


def test_a_prompt_that_diverges_inside_a_block_shares_the_rows_before():
    bench = Bench()
    bench.run(prompt_of(12), 3)
    prompt = (*prompt_of(6), 200, 201, 202)
    assert bench.run(prompt, 3) == oracle(prompt, 3)
    assert bench.finished(2).usage.cached.device == 6


def test_tenants_share_nothing():
    bench = Bench()
    bench.run(prompt_of(12), 3, salt=b"a")
    bench.run(prompt_of(12), 3, salt=b"b")
    assert bench.finished(2).usage.cached.total == 0


def test_a_stop_id_ends_the_run_and_is_its_last_token():
    expected = oracle(prompt_of(9), 8)
    bench = Bench()
    assert (
        bench.run(prompt_of(9), 8, stop={expected[4]})
        == expected[: expected.index(expected[4]) + 1]
    )
    assert bench.finished(1).reason is FinishReason.STOP


def test_prefill_only_samples_nothing_and_leaves_all_but_the_last_token_to_reuse():
    bench = Bench()
    assert bench.run(prompt_of(11), 0) == ()
    assert bench.run(prompt_of(11), 4) == oracle(prompt_of(11), 4)
    assert bench.finished(2).usage.computed_tokens == 1


@pytest.mark.parametrize("length", [1, 3, 4, 5, 12, 17])
@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
@pytest.mark.parametrize("late_copies", [False, True])
def test_a_demoted_session_comes_back_from_that_tier_and_computes_one_token(
    length, tier, late_copies
):
    bench = Bench(late_copies=late_copies)
    first = bench.run(prompt_of(length), 4)
    bench.inbox.put(Demote(1, tier, "s"))
    bench.until_quiet()
    prompt = prompt_of(length) + first
    assert bench.run(prompt, 6) == oracle(prompt, 6)
    usage = bench.finished(2).usage
    assert (usage.cached.host, usage.cached.disk)[tier - 1] == len(prompt) - 1 == usage.cached.total
    assert usage.computed_tokens == 1


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_a_demotion_says_how_many_blocks_it_moved(written, tier):
    bench = Bench()
    bench.run(prompt_of(14), 4)
    if written:
        bench.pass_time(2)
    bench.inbox.put(Demote(1, tier, "s"))
    bench.until_quiet()
    assert bench.answers[1] == 5


def test_a_demotion_for_one_tenant_leaves_anothers_session_of_that_name_and_chains_are_found_where_they_are():
    bench = Bench(host=16)
    for salt in (b"a", b"b"):
        bench.run(prompt_of(8), 4, salt=salt)
    bench.inbox.put(Demote(1, Tier.HOST, "s", b"b"))
    bench.until_quiet()
    turns = [(bench.finished(one).lease, bench.finished(one).keys) for one in (1, 2)]
    bench.inbox.put(Pin(3, b"a", "s", 60.0))
    bench.inbox.put(Locate(2, (*turns, (None, turns[0][1]))))
    bench.until_quiet()
    a, b, without_lease = bench.answers[2]
    assert (a.tokens_on["device"], a.tokens_on["host"]) == (11, 0)
    assert (b.tokens_on["device"], b.tokens_on["host"]) == (0, 11)
    assert a.session_class == "pinned"
    assert 0 < a.pinned_s <= 60
    assert (b.session_class, b.pinned_s) == ("burst", None)
    assert without_lease == Located(a.tokens_on)


def test_an_idle_session_moves_to_the_host_then_to_the_disk():
    bench = Bench(host_after_s=10, disk_after_s=60)
    prompt = prompt_of(9)
    for wait, tier in ((11, "host"), (61, "disk")):
        prompt += bench.run(prompt, 4)
        bench.pass_time(5)
        bench.pass_time(wait)
        bench.pass_time(wait)
        again = bench.submit(prompt, 1)
        bench.until_quiet()
        assert getattr(bench.finished(again).usage.cached, tier) == len(prompt) - 1
        bench.pass_time(1)
        prompt += bench.ids(again)


def test_pressure_moves_a_session_to_the_host_even_if_the_disk_has_it_too():
    bench = Bench(device=8, host=16)
    prompt = prompt_of(13) + bench.run(prompt_of(13), 4)
    bench.pass_time(2)
    bench.run(prompt_of(26, salt=1), 1)
    assert bench.run(prompt, 3) == oracle(prompt, 3)
    usage = bench.finished(3).usage
    assert usage.cached.host > 0
    assert usage.cached.disk == 0


def test_a_demotion_to_the_host_catches_up_with_blocks_that_were_being_written():
    bench = Bench()
    prompt = prompt_of(13) + bench.run(prompt_of(13), 4)
    bench.now += 1.1
    bench.inbox.put(Inspect(1))
    bench.turn()
    assert bench.disk.pending, "the spills must be on their way"
    bench.inbox.put(Demote(2, Tier.HOST, "s"))
    bench.turn()
    bench.until_quiet()
    bench.pass_time(1)
    bench.run(prompt, 1)
    assert bench.finished(2).usage.cached.host == len(prompt) - 1


def test_blocks_are_on_disk_within_the_lag_and_a_new_engine_finds_them():
    bench = Bench()
    first = bench.run(prompt_of(14), 4)
    bench.pass_time(1.1)
    reborn = Bench(store=bench.store)
    prompt = prompt_of(14) + first
    assert reborn.run(prompt, 4) == oracle(prompt, 4)
    assert reborn.finished(1).usage.cached.disk == len(prompt) - 1


def test_a_durable_manifest_takes_the_dirty_blocks_along():
    bench = Bench(max_lag_s=1e9)
    bench.run(prompt_of(14), 4)
    manifest = manifest_of("resp_1", prompt_of(14), bench.finished(1).keys)
    bench.inbox.put(Persist(7, manifest))
    bench.until_quiet()
    assert bench.answers[7] is None
    reborn = Bench(store=bench.store)
    reborn.run(prompt_of(14), 1)
    assert reborn.finished(1).usage.cached.disk == 13


def test_a_bad_record_is_counted_and_its_tokens_are_recomputed():
    bench = Bench()
    prompt = prompt_of(14)
    prompt += bench.run(prompt, 4)
    bench.inbox.put(Demote(1, Tier.DISK, None))
    bench.until_quiet()
    bench.disk.fail_fetches = 1
    assert bench.run(prompt, 4) == oracle(prompt, 4)
    usage = bench.finished(2).usage
    assert usage.cached.total + usage.computed_tokens == len(prompt)
    assert usage.cached.total < len(prompt) - 1
    assert sum(bench.report().verify_failures_total.values()) == 1


@pytest.mark.parametrize("trouble", ["full", "refuse"])
def test_a_disk_that_takes_nothing_fails_no_turn(trouble):
    bench = Bench(device=6, host=2)
    setattr(bench.disk, trouble, True)
    for turn in range(6):
        prompt = prompt_of(13, salt=turn)
        assert bench.run(prompt, 4) == oracle(prompt, 4)
        bench.pass_time(2)
    assert bench.report().spill_failures_total > 0


def test_a_long_prefill_does_not_stop_a_running_stream():
    bench = Bench(device=64)
    stream = bench.submit(prompt_of(3), 30)
    for _ in range(4):
        bench.turn()
    bench.submit(prompt_of(120, salt=1), 1)
    before = len(bench.ids(stream))
    for _ in range(10):
        bench.turn()
    assert len(bench.ids(stream)) == before + 10


def test_a_cancelled_request_ends_once_and_leaves_its_work_in_the_cache():
    bench = Bench()
    request = bench.submit(prompt_of(20), 50)
    for _ in range(4):
        bench.turn()
    bench.inbox.put(Cancel(request))
    bench.until_quiet()
    assert bench.finished(request).reason is FinishReason.CANCELLED
    assert sum(isinstance(o, Finished) for o in bench.said[request]) == 1
    prompt = prompt_of(20) + bench.ids(request)
    assert bench.run(prompt, 3) == oracle(prompt, 3)
    assert bench.finished(2).usage.computed_tokens == 1


def test_cancelling_while_loading_leaks_nothing():
    bench = Bench()
    prompt = prompt_of(20) + bench.run(prompt_of(20), 3)
    bench.inbox.put(Demote(1, Tier.DISK, None))
    bench.until_quiet()
    request = bench.submit(prompt, 3)
    bench.turn()
    bench.inbox.put(Cancel(request))
    bench.until_quiet()
    assert bench.finished(request).reason is FinishReason.CANCELLED
    assert bench.report().refs == 0
    assert bench.run(prompt, 3) == oracle(prompt, 3)


def test_sessions_beyond_the_device_are_preempted_and_still_right():
    bench = Bench(device=10, host=4, max_running=4)
    prompts = [prompt_of(9, salt=i) for i in range(4)]
    requests = [bench.submit(p, 12) for p in prompts]
    bench.until_quiet()
    for prompt, request in zip(prompts, requests, strict=True):
        assert bench.ids(request) == oracle(prompt, 12)


def test_what_cannot_run_is_refused_with_a_reason():
    bench = Bench(device=4, max_waiting=1)
    too_long = bench.submit(prompt_of(40), 1)
    empty = bench.submit((), 1)
    foreign = bench.submit((VOCAB,), 1)
    kept = bench.submit(prompt_of(3), 1)
    busy = bench.submit(prompt_of(3), 1)
    bench.until_quiet()
    reasons = {r: bench.said[r][0].reason for r in (too_long, empty, foreign, busy)}
    assert reasons == {
        too_long: RefuseReason.CONTEXT,
        empty: RefuseReason.PROMPT,
        foreign: RefuseReason.PROMPT,
        busy: RefuseReason.BUSY,
    }
    assert all(len(bench.said[r]) == 1 for r in reasons)
    assert bench.finished(kept)


def test_the_output_ends_where_the_context_ends():
    bench = Bench(device=5)
    request = bench.submit(prompt_of(10), 500)
    bench.until_quiet()
    assert bench.finished(request).reason is FinishReason.LENGTH
    assert len(bench.ids(request)) == bench.engine.max_context - 10


def test_a_prefetch_brings_a_session_up_before_its_request():
    bench = Bench()
    prompt = prompt_of(21)
    bench.run(prompt, 2)
    bench.inbox.put(Demote(1, Tier.DISK, None))
    bench.until_quiet()
    bench.inbox.put(Prefetch(b"", prompt))
    bench.until_quiet()
    bench.run(prompt, 2)
    assert bench.finished(2).usage.cached.disk >= 20, "found on disk, though it is here by now"
    assert bench.report().refs == 0


def test_stop_ends_everything_and_spills_what_is_dirty():
    bench = Bench(max_lag_s=1e9)
    bench.run(prompt_of(14), 4)
    running = bench.submit(prompt_of(30, salt=3), 100)
    for _ in range(5):
        bench.turn()
    bench.inbox.put(Stop())

    def emit(step):
        bench.emit(step)

    original = bench.disk.offer_blocks

    def offer(*args, **options):
        accepted = original(*args, **options)
        while bench.disk.pending:
            bench.disk.settle()
        return accepted

    bench.disk.offer_blocks = offer
    while bench.disk.pending:
        bench.disk.settle()
    bench.engine.run(emit)
    assert bench.finished(running).reason is FinishReason.CANCELLED
    reborn = Bench(store=bench.store)
    reborn.run(prompt_of(14), 1)
    assert reborn.finished(1).usage.cached.disk == 13


def on_disk(prompt, *, tokens=4, **options) -> tuple[Bench, tuple[int, ...]]:
    """A bench whose disk, and nothing else, holds the KV of the returned prompt, but for its last token's."""
    bench = Bench(**options)
    whole = tuple(prompt) + bench.run(prompt, tokens)
    bench.inbox.put(Demote(1, Tier.DISK, None))
    bench.until_quiet()
    assert not bench.report().dirty
    return bench, whole


def computed(bench: Bench) -> int:
    return bench.report().tokens_total["computed"]


def accounts_for(usage) -> bool:
    return (
        usage.cached.total + usage.computed_tokens == usage.prompt_tokens
        and sum(usage.recomputed.values()) == usage.computed_tokens
        and all(tokens > 0 for tokens in usage.recomputed.values())
    )


@pytest.mark.parametrize("kth", range(50))
def test_when_the_kth_load_fails_exactly_its_block_is_computed_again(kth):
    bench, prompt = on_disk(prompt_of(200), device=64)
    before = computed(bench)
    bench.disk.bad_fetches = {kth}
    assert bench.run(prompt, 3) == oracle(prompt, 3)
    usage = bench.finished(2).usage
    assert usage.recomputed == {"verify_failed": BLOCK, "logits": 1}
    assert usage.cached.disk == len(prompt) - 1 - BLOCK
    assert computed(bench) - before == BLOCK + 1 + 2  # the block, the last token, two sampled ones
    assert accounts_for(usage)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    length=st.integers(5, 60),
    bad=st.sets(st.integers(0, 16)),
    late=st.booleans(),
    delta=st.integers(0, 9),
    step_tokens=st.integers(2, 16),
    order=st.randoms(use_true_random=False),
)
def test_whatever_does_not_come_is_computed_and_nothing_else(
    length, bad, late, delta, step_tokens, order
):
    bench, prompt = on_disk(prompt_of(length), device=40, host=0, step_tokens=step_tokens)
    asked = prompt + prompt_of(delta, salt=9)
    before = computed(bench)
    request = bench.submit(asked, 3)
    bench.turn()
    order.shuffle(bench.disk.pending)
    if late:
        bench.disk.stall(lambda key: bench.disk.fetched.index(key) in bad)
    else:
        bench.disk.bad_fetches = bad
    for _ in range(2 * len(bench.disk.pending)):
        bench.turn()
    bench.now += 60
    bench.until_quiet()
    if late:
        bench.disk.resume()
        bench.until_quiet()
    assert bench.ids(request) == oracle(asked, 3)
    usage = bench.finished(request).usage
    assert accounts_for(usage)
    assert computed(bench) - before == usage.computed_tokens + 2
    missed = usage.recomputed.get("slow" if late else "verify_failed", 0)
    assert missed == sum(len(part) for at, part in parts(prompt) if at in bad)
    again = bench.submit(asked, 3)
    bench.until_quiet()
    assert bench.ids(again) == oracle(asked, 3)


def parts(prompt):
    """(index, tokens) of the blocks of a prompt whose last token has no KV."""
    stored = prompt[:-1]
    return list(enumerate(stored[at : at + BLOCK] for at in range(0, len(stored), BLOCK)))


def test_a_load_that_passes_its_deadline_is_given_up_and_what_lands_late_serves_the_next():
    bench, prompt = on_disk(prompt_of(40), device=40)
    bench.disk.stall()
    request = bench.submit(prompt, 3)
    bench.turn()
    assert bench.engine._sleep_s() == pytest.approx(RESTORE.floor_s, rel=0.5)
    bench.now += 0.1
    bench.engine._turn(bench.emit)
    assert not bench.said[request]
    bench.now += 60
    bench.until_quiet()
    assert bench.ids(request) == oracle(prompt, 3)
    assert bench.finished(request).usage.recomputed == {"slow": len(prompt) - 1, "logits": 1}
    bench.disk.resume()
    bench.until_quiet()
    assert bench.run(prompt, 3) == oracle(prompt, 3)
    assert bench.finished(2 + 1).usage.computed_tokens == 1


def test_a_disk_that_never_answers_again_stalls_nobody():
    """The reads that the readers have are lost with their slots; those that wait are taken back."""
    block_bytes = 2 * 4 * BLOCK
    bench, prompt = on_disk(
        prompt_of(40),
        device=40,
        restore=RestoreLimits(reading_bytes=2 * block_bytes, max_loading=2),
    )
    bench.disk.stall()
    for _ in range(6):
        request = bench.submit(prompt, 3)
        bench.turn()
        assert len(bench.disk.stalled) <= 2
        bench.now += 60
        bench.until_quiet()
        assert bench.ids(request) == oracle(prompt, 3)


def test_a_restore_that_would_lose_is_refused_and_said_so():
    bench, prompt = on_disk(prompt_of(40), device=40, rates=Rates(read_s=1.0))
    assert bench.run(prompt, 3) == oracle(prompt, 3)
    assert bench.finished(2).usage.recomputed == {"loss": len(prompt) - 1, "logits": 1}
    assert not bench.disk.fetched


def test_a_request_that_overtakes_its_own_prefetch_restores_its_tail_too():
    read = Rates(read_s=1e-3 / (2 * 4 * BLOCK), latency_s=1e-4, token_s=1e-3)
    bench, prompt = on_disk(prompt_of(5 * BLOCK + 4), device=40, rates=read)
    bench.inbox.put(Prefetch(b"", prompt))
    bench.engine._turn(bench.emit)
    assert bench.engine._reads.queued >= 5
    assert bench.run(prompt, 3) == oracle(prompt, 3)
    assert bench.finished(2).usage.computed_tokens == 1


def test_a_disk_that_was_slow_for_a_while_is_asked_again_after_some_refusals():
    fast = Rates(latency_s=1e-4, step_s=1e-5, token_s=1e-5)
    bench, prompt = on_disk(prompt_of(40), device=40, rates=fast)
    for _ in range(60):
        bench.engine._costs.observe_reads(10, 60.0)
    for attempt in range(2, 60):
        bench.run(prompt, 1)
        if bench.finished(attempt).usage.cached.disk:
            break
        assert bench.finished(attempt).usage.recomputed["loss"]
        bench.inbox.put(Demote(1, Tier.DISK, None))
        bench.until_quiet()
    assert 2 < attempt < 59


@pytest.mark.parametrize("busy", [False, True])
def test_a_load_teaches_the_disk_s_rate_unless_steps_of_the_model_ran_meanwhile(busy):
    bench, prompt = on_disk(prompt_of(40), device=80)
    if busy:
        bench.submit(prompt_of(3, salt=5), 60)
        for _ in range(3):
            bench.turn()
    bench.now += 1
    if busy:
        bench.turn()
    bench.submit(prompt, 1)
    bench.turn()
    while bench.disk.pending:
        bench.now += 0.002
        bench.disk.settle()
        bench.turn()
    bench.until_quiet()
    assert (bench.report().rates["latency_s"] == RATES.latency_s) is busy


def test_the_readers_get_their_cores_while_they_read_beside_a_step():
    bench, prompt = on_disk(prompt_of(40), device=80)
    bench.submit(prompt_of(3, salt=5), 60)
    for _ in range(3):
        bench.turn()
    bench.beside_reads.clear()
    bench.submit(prompt, 1)
    while not bench.disk.pending:
        bench.engine._turn(bench.emit)
    bench.engine._turn(bench.emit)
    reading = [*bench.beside_reads]
    bench.until_quiet()
    assert reading[-1]
    assert not bench.beside_reads[-1]
    assert bench.report().compute_threads == 2


def test_a_prompt_does_not_wait_for_the_readers():
    bench, prompt = on_disk(prompt_of(40), device=80)
    bench.submit(prompt, 1)
    while not bench.disk.pending:
        bench.engine._turn(bench.emit)
    bench.submit(prompt_of(9, salt=5), 3)
    bench.engine._turn(bench.emit)
    assert bench.runner.batches[-1].segments[0].count > 1
    assert not bench.beside_reads[-1]
    bench.engine._turn(bench.emit)
    assert bench.beside_reads[-1]
    bench.until_quiet()


@pytest.mark.parametrize("busy", [False, True])
def test_late_copies_let_others_decode_and_teach_their_rate_unless_steps_ran_meanwhile(busy):
    bench = Bench(late_copies=True, device=24)
    prompt = prompt_of(21) + bench.run(prompt_of(21), 4)
    bench.inbox.put(Demote(1, Tier.HOST, None))
    bench.until_quiet()
    before = bench.report().rates["copy_s"]
    bench.now += 1
    bench.submit(prompt, 1)
    other = bench.submit(prompt_of(5, salt=1), 6, session="other") if busy else None
    for _ in range(8 if busy else 1):
        bench.engine._turn(bench.emit)
    bench.now += 0.1
    if other is not None:
        assert len(bench.ids(other)) == 6
    bench.until_quiet()
    assert bench.ids(2) == oracle(prompt, 1)
    assert bench.finished(2).usage.cached.host == len(prompt) - 1
    assert (bench.report().rates["copy_s"] == before) == busy


def test_an_operator_may_switch_the_decision_off():
    bench, prompt = on_disk(
        prompt_of(40), device=40, rates=Rates(read_s=1.0), restore=RestoreLimits(decide=False)
    )
    bench.run(prompt, 3)
    assert bench.finished(2).usage.cached.disk == len(prompt) - 1


def test_a_hundred_reconnects_read_every_block_once_and_the_first_are_done_early():
    limits = RestoreLimits(max_loading=4, reading_bytes=1 << 20)
    old = Bench(device=2200, disk=4000, max_waiting=200, max_running=200)
    old.checks = False
    shared = prompt_of(16)
    prompts = []
    for number in range(100):
        prompt = (*shared, number, 1, 2, 3, number, 7, 8, 9, *prompt_of(6, salt=number))
        prompts.append(prompt + old.run(prompt, 2, session=f"s{number}"))
    old.pass_time(5)
    bench = Bench(
        device=2200, disk=4000, store=old.store, max_waiting=200, max_running=200, restore=limits
    )
    bench.checks = False
    requests = [bench.submit(prompt, 2) for prompt in prompts]
    fresh = bench.submit(prompt_of(9, salt=77), 2)
    order, turns_until_first = [], None
    for _ in range(20_000):
        if bench.scheduler.idle and bench.inbox.empty():
            break
        bench.turn()
        assert sum(s.reads_disk for s in bench.scheduler.loading) <= 4
        done = [r for r in (*requests, fresh) if r not in order and bench.ids(r)]
        if done and turns_until_first is None:
            turns_until_first = len(bench.disk.fetched)
        order += done
    assert order[0] == fresh, "who needs no disk waits for nobody"
    assert order[1:] == requests
    for prompt, request in zip(prompts, requests, strict=True):
        assert bench.ids(request) == oracle(prompt, 2)
        assert bench.finished(request).usage.computed_tokens == 1
    assert len(bench.disk.fetched) == len(set(bench.disk.fetched))


def test_the_first_request_after_a_restart_finds_its_chain_though_the_index_is_not_read():
    old = Bench()
    prompt = prompt_of(22) + old.run(prompt_of(22), 4)
    for other in range(1, 6):
        old.run(prompt_of(9, salt=other), 2)
    old.pass_time(5)
    bench = Bench(store=old.store, index_unread=True)
    bench.disk.hold_index()
    assert bench.run(prompt, 3) == oracle(prompt, 3)
    assert bench.finished(1).usage.cached.disk == len(prompt) - 1
    assert not bench.report().disk.index_complete
    assert not bench.adopted


def test_the_index_is_read_in_slices_while_requests_run_and_then_is_complete(monkeypatch):
    monkeypatch.setattr("engine.engine.WHILE_RUNNING", 2)
    monkeypatch.setattr("engine.engine.WHILE_IDLE", 3)
    old = Bench()
    for other in range(8):
        old.run(prompt_of(9, salt=other), 2)
    old.pass_time(5)
    records = old.store.statistics().blocks
    bench = Bench(store=old.store, index_unread=True)
    stream = bench.submit(prompt_of(3, salt=99), 12)
    for _ in range(100):
        bench.turn()
    assert bench.ids(stream) == oracle(prompt_of(3, salt=99), 12)
    report = bench.report()
    assert report.disk.index_complete
    assert report.disk.records == records
    assert bench.disk.slices >= records // 3
    assert len(old.adopted) == len(bench.adopted) == 1


def test_an_index_that_cannot_be_read_is_asked_for_again_later():
    old = Bench()
    prompt = prompt_of(12) + old.run(prompt_of(12), 4)
    old.pass_time(5)
    bench = Bench(store=old.store, index_unread=True)
    bench.engine._turn(bench.emit)
    bench.disk.pending.clear()
    bench.inbox.put(IndexFailed(None, "io"))
    bench.until_quiet()
    assert not bench.report().disk.index_complete
    bench.pass_time(6)
    bench.read_index()
    bench.run(prompt, 1)
    assert bench.finished(1).usage.cached.disk == len(prompt) - 1


def test_a_prefetched_block_is_not_evicted_before_its_request_comes():
    bench, prompt = on_disk(prompt_of(21), device=12, host=0)
    bench.inbox.put(Prefetch(b"", prompt))
    bench.until_quiet()
    assert bench.report().refs > 0
    fetched = len(bench.disk.fetched)
    bench.run(prompt_of(12, salt=3), 2)
    bench.run(prompt, 2)
    assert bench.finished(3).usage.cached.disk >= 20
    assert len(bench.disk.fetched) <= fetched + 1  # the tail
    assert bench.report().refs == 0


@pytest.mark.parametrize(
    ("waits_for", "brought"), [(SessionClass.CLOSED, True), (SessionClass.TOOL_WAIT, False)]
)
def test_a_guess_evicts_only_who_is_not_likely_to_come_himself(waits_for, brought):
    bench, prompt = on_disk(prompt_of(21), device=12, host=0)
    other = prompt_of(33, salt=3)
    bench.run(other, 2)
    bench.inbox.put(Reclass(bench.finished(2).lease, waits_for))
    bench.inbox.put(Prefetch(b"", prompt))
    bench.until_quiet()
    assert bool(bench.disk.fetched) is brought
    assert bench.run(prompt, 2) == oracle(prompt, 2)


def test_a_prefetch_that_nobody_comes_for_ends():
    bench, prompt = on_disk(prompt_of(21))
    bench.inbox.put(Prefetch(b"", prompt))
    bench.until_quiet()
    bench.pass_time(4)
    assert bench.report().refs > 0
    bench.pass_time(2)
    assert bench.report().refs == 0


def test_a_guess_gives_way_to_a_request():
    bench, prompt = on_disk(prompt_of(21), device=8, host=0)
    bench.inbox.put(Prefetch(b"", prompt))
    bench.until_quiet()
    other = prompt_of(25, salt=3)
    assert bench.run(other, 2) == oracle(other, 2)


def test_the_same_prefetch_twice_is_one():
    bench, prompt = on_disk(prompt_of(21))
    for _ in range(3):
        bench.inbox.put(Prefetch(b"", prompt))
    bench.until_quiet()
    assert len(bench.disk.fetched) == len(set(bench.disk.fetched))
    assert bench.report().refs == len(bench.disk.fetched)


def test_a_prefetch_before_the_index_is_read_looks_its_chain_up():
    old = Bench()
    prompt = prompt_of(22) + old.run(prompt_of(22), 4)
    old.pass_time(5)
    bench = Bench(store=old.store, index_unread=True)
    bench.disk.hold_index()
    bench.inbox.put(Prefetch(b"", prompt))
    bench.until_quiet()
    assert len(bench.disk.fetched) == (len(prompt) - 1) // BLOCK


def test_cancelling_a_load_takes_back_what_the_disk_has_not_begun():
    bench, prompt = on_disk(prompt_of(40), device=40, restore=RestoreLimits(reading_bytes=1))
    request = bench.submit(prompt, 3)
    bench.turn()
    assert len(bench.disk.fetched) == 1
    bench.inbox.put(Cancel(request))
    bench.until_quiet()
    assert len(bench.disk.fetched) == 1
    assert bench.run(prompt, 3) == oracle(prompt, 3)


def test_the_report_tells_what_the_cache_cost():
    bench = Bench()
    first = prompt_of(13)
    bench.run(first, 1)
    bench.run(first, 1)
    report = bench.report()
    assert report.recomputed_total == {"new": 12, "logits": 2}
    assert report.amplification == 1.0
    assert report.hit_share == 1.0


@pytest.mark.parametrize("damage", ["bit", "swap"])
@pytest.mark.parametrize("late_copies", [False, True])
def test_what_changed_in_host_memory_is_refused_counted_and_computed_again(damage, late_copies):
    bench = Bench(late_copies=late_copies)
    prompt = prompt_of(21) + bench.run(prompt_of(21), 4)
    bench.inbox.put(Demote(1, Tier.HOST, None))
    bench.until_quiet()
    host = bench.memory._arenas[Tier.HOST].blocks
    seals = bench.memory._sealing if late_copies else bench.memory._seals
    slots = sorted(seals)[:2]
    if damage == "bit":
        host.view(torch.uint8).view(host.shape[0], -1)[slots[0], 5] ^= 1
    else:
        host[slots] = host[slots[::-1]]
    assert bench.run(prompt, 3) == oracle(prompt, 3)
    assert accounts_for(bench.finished(2).usage)
    failures = bench.report().host_failures_total
    assert sum(failures.values()) == (1 if damage == "bit" else 2)


def test_a_block_that_changed_while_it_was_written_leaves_no_record():
    bench = Bench(max_lag_s=1e9)
    prompt = prompt_of(21) + bench.run(prompt_of(21), 4)
    bench.inbox.put(Demote(1, Tier.HOST, None))
    bench.until_quiet()
    bench.inbox.put(Demote(2, Tier.DISK, None))
    bench.turn()
    assert bench.disk.pending
    host = bench.memory._arenas[Tier.HOST].blocks
    host.view(torch.uint8).view(host.shape[0], -1)[:, 5] ^= 1
    bench.until_quiet()
    assert bench.store.statistics().blocks == 0
    assert bench.run(prompt, 3) == oracle(prompt, 3)


def test_a_degraded_disk_is_not_offered_blocks_until_it_is_worth_it_and_fails_no_turn():
    bench = Bench()
    bench.disk.refuses_blocks = True
    prompt = prompt_of(21)
    bench.run(prompt, 4)
    keys = bench.finished(1).keys
    bench.inbox.put(Persist(7, manifest_of("resp_1", prompt, keys)))
    bench.until_quiet()
    assert bench.answers[7] is None, "the manifest alone is tried"
    bench.pass_time(5)
    report = bench.report()
    assert (report.disk.state, report.disk.reason) == ("degraded", "full")
    assert report.dirty == len(keys)
    assert bench.engine._sleep_s() > 0
    assert bench.run(prompt, 2) == oracle(prompt, 2)
    bench.disk.refuses_blocks = False
    bench.pass_time(2)
    assert bench.report().dirty == 0
    assert bench.report().disk.state == "ok"


def test_a_record_that_the_scrubber_found_rotten_is_dropped():
    bench, prompt = on_disk(prompt_of(21))
    key = bench.finished(1).keys[2]
    bench.inbox.put(Rotten(key, "checksum"))
    bench.until_quiet()
    assert key not in {entry.key for entry in bench.store.index(None, 99)}
    assert bench.run(prompt, 3) == oracle(prompt, 3)
    assert bench.finished(2).usage.cached.disk == 2 * BLOCK


def test_a_deleted_response_leaves_every_tier_but_what_others_need():
    bench = Bench()
    shared = prompt_of(8)
    first, second = shared + prompt_of(9, salt=1), shared + prompt_of(9, salt=2)
    bench.run(first, 4, session="a")
    bench.run(second, 4, session="b")
    keys = bench.finished(1).keys
    bench.inbox.put(Persist(1, manifest_of("resp_1", first, keys)))
    bench.until_quiet()
    bench.inbox.put(Reclass(bench.finished(1).lease, SessionClass.CLOSED))
    bench.inbox.put(Forget(2, "", "resp_1"))
    bench.until_quiet()
    assert bench.answers[2] is True
    left = {entry.key for entry in bench.store.index(None, 99)}
    assert left.isdisjoint(keys[2:])
    bench.run(first, 2)
    assert bench.finished(3).usage.cached.total == len(shared)
    assert bench.finished(3).usage.recomputed.get("deleted", 0) > 0
    bench.run(second, 2)
    assert bench.finished(4).usage.computed_tokens == 1


def test_forgetting_what_is_not_there_is_answered_so():
    bench = Bench()
    bench.inbox.put(Forget(2, "", "resp_1"))
    bench.until_quiet()
    assert bench.answers[2] is False


def test_a_pin_is_granted_within_the_quota_seen_and_ends_by_itself():
    bench = Bench(host=40)
    bench.run(prompt_of(12), 4, session="a")
    bench.inbox.put(Pin(1, b"", "a", 30.0))
    bench.inbox.put(Pin(2, b"", "nobody", 30.0))
    bench.until_quiet()
    assert bench.answers[1] == 4 * bench.memory.block_bytes
    assert bench.answers[2] is None
    (pin,) = bench.report().pins
    assert (pin.session, pin.held_bytes, pin.expires_s) == ("a", bench.answers[1], 30.0)
    bench.inbox.put(Unpin(3, b"", "a"))
    assert bench.report().pins == ()
    bench.inbox.put(Pin(4, b"", "a", 30.0))
    assert len(bench.report().pins) == 1
    bench.pass_time(31)
    assert bench.report().pins == ()


def test_a_turn_that_asks_to_be_kept_outlives_those_that_do_not():
    bench = Bench(device=12, host=0, disk=0)
    bench.run(prompt_of(12), 2, session="a", keep_s=100)
    bench.run(prompt_of(12, salt=1), 2, session="b")
    bench.run(prompt_of(16, salt=2), 2, session="c")
    bench.run(prompt_of(12), 1)
    assert bench.finished(4).usage.computed_tokens == 1


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_a_canary_computes_restored_blocks_again_and_finds_them_equal(tier):
    bench = Bench(canary=1.0)
    prompt = prompt_of(21) + bench.run(prompt_of(21), 4)
    bench.inbox.put(Demote(1, tier, None))
    bench.until_quiet()
    bench.run(prompt, 2)
    for _ in range(20):
        bench.turn()
    assert bench.report().canary == {"checked": 6, "mismatched": 0, "skipped": 0}
    assert bench.report().refs == 0


def test_a_canary_finds_a_sound_record_of_other_tokens_kv_and_has_it_dropped():
    bench, prompt = on_disk(prompt_of(21), canary=1.0)
    wrong = bench.finished(1).keys[2]
    (entry,) = [each for each in bench.store.index(None, 99) if each.key == wrong]
    other = memoryview(torch.full((2 * BLOCK,), 7.0).numpy()).cast("B")
    fields = {name: getattr(entry, name) for name in ("key", "root", "parent", "depth", "tokens")}
    bench.store.write(blocks=[BlockWrite(**fields, payload=other, last_used=0.0)])
    bench.run(prompt, 2)
    for _ in range(20):
        bench.turn()
    bench.until_quiet()
    report = bench.report()
    assert report.canary["mismatched"] >= 1
    assert wrong not in {each.key for each in bench.store.index(None, 99)}
    again = bench.run(prompt, 3)
    assert again == oracle(prompt, 3)


def test_a_canary_whose_block_has_left_the_device_is_skipped():
    bench, prompt = on_disk(prompt_of(21), canary=1.0)
    bench.run(prompt, 2)
    bench.inbox.put(Demote(2, Tier.DISK, None))
    bench.until_quiet()
    for _ in range(20):
        bench.turn()
    canary = bench.report().canary
    assert canary["skipped"] > 0
    assert canary["mismatched"] == 0


SCENARIO = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "turn",
                "fork",
                "fresh",
                "cancel",
                "demote",
                "time",
                "settle",
                "step",
                "stall",
                "prefetch",
            ]
        ),
        st.integers(0, 7),
        st.integers(1, 14),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    steps=SCENARIO,
    device=st.integers(8, 16),
    host=st.integers(0, 6),
    disk=st.integers(0, 20),
    failures=st.integers(0, 3),
    right=st.integers(0, 3),
    late_copies=st.booleans(),
)
def test_any_mixture_of_turns_forks_cancels_and_demotions_gives_oracle_ids(
    steps, device, host, disk, failures, right, late_copies
):
    with guesses(right):
        any_mixture(steps, device, host, disk, failures, late_copies=late_copies)


def any_mixture(steps, device, host, disk, failures, *, late_copies):
    bench = Bench(
        device=device,
        host=host,
        disk=disk,
        host_after_s=20,
        disk_after_s=60,
        late_copies=late_copies,
    )
    bench.disk.fail_fetches = failures
    prompts: dict[RequestId, tuple[tuple[int, ...], int]] = {}
    limit = bench.engine.max_context - 12
    for kind, pick, size in steps:
        done = [r for r in prompts if bench.said[r] and isinstance(bench.said[r][-1], Finished)]
        known = [r for r in done if len(prompts[r][0]) + len(bench.ids(r)) + size < limit]
        match kind:
            case "turn" | "fork" if known:
                parent = known[pick % len(known)]
                tokens = prompts[parent][0] + bench.ids(parent) + prompt_of(size, salt=pick)
                lease = bench.finished(parent).lease if kind == "turn" else None
                prompts[bench.submit(tokens, 5, session=f"s{pick}", supersedes=lease)] = (tokens, 5)
            case "turn" | "fork" | "fresh":
                tokens = prompt_of(size, salt=pick % 3)
                prompts[bench.submit(tokens, 5, session=f"s{pick}")] = (tokens, 5)
            case "cancel" if prompts:
                bench.inbox.put(Cancel(list(prompts)[pick % len(prompts)]))
            case "demote":
                bench.inbox.put(Demote(1, Tier.HOST if size % 2 else Tier.DISK, None))
                bench.turn()
            case "time":
                bench.now += size
                bench.turn()
            case "settle" if bench.disk.pending:
                bench.disk.settle(pick)
            case "stall" if bench.disk.stalled is None:
                bench.disk.stall()
            case "stall":
                bench.disk.resume()
            case "prefetch" if known:
                bench.inbox.put(Prefetch(b"", prompts[known[pick % len(known)]][0]))
            case _:
                for _ in range(size):
                    bench.turn()
    bench.disk.resume()
    bench.until_quiet()
    for request, (prompt, output) in prompts.items():
        said = bench.said[request]
        assert sum(isinstance(o, Finished | Refused) for o in said) == 1
        ids = bench.ids(request)
        assert ids == oracle(prompt, output)[: len(ids)]
        if bench.finished(request).reason is not FinishReason.CANCELLED:
            assert len(ids) == output
        assert isinstance(said[0], Began)
        usage = bench.finished(request).usage
        assert accounts_for(usage)
        for reason in usage.recomputed:
            event(f"computed: {reason}")
        for tier in ("device", "host", "disk"):
            if getattr(usage.cached, tier):
                event(f"served from {tier}")
    bench.pass_time(6)  # what was prefetched for nobody
    report = bench.report()
    assert report.refs == 0
    bench.inbox.put(Demote(2, Tier.DISK, None))
    bench.pass_time(1000)
    bench.pass_time(1000)


def test_the_disk_is_reported_in_the_bytes_that_it_takes():
    """Records may be compact: half as large here."""
    bench = Bench(device=8, disk=8)
    capacity = {tier.tier: tier.capacity_bytes for tier in bench.report().tiers}
    assert capacity["disk"] * 2 == capacity["device"]


def test_a_disk_that_begins_empty_has_been_read():
    """A soak showed it: what was dropped was remembered until the index was read, and that never ended."""
    unknown = chain_key(root_key(b"fake", b""), (1, 2))
    assert Bench().cache.forget_chain((unknown,), (), 0.0) == []


def test_a_stream_keeps_its_share_of_the_time_beside_a_long_prompt():
    """A decode takes a second here, and each token of a prompt another one."""
    bench = Bench(device=64, prefill_share=0.5)
    run = bench.runner.run

    def at_length(batch):
        bench.now += 1.0 + sum(s.count for s in batch.segments if not s.decodes)
        return run(batch)

    bench.runner.run = at_length
    stream = bench.submit(range(5), 200)
    while len(bench.ids(stream)) < 2:
        bench.turn()
    other = bench.submit(range(100, 180), 1, session="other")
    said, since = len(bench.ids(stream)), bench.now
    while not bench.ids(other):
        bench.turn()
    tokens = len(bench.ids(stream)) - said
    assert bench.now - since <= 2 * tokens + 4  # twice the second that it takes alone, and a step
