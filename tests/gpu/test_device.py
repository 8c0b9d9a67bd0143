"""What only a GPU can show: compiled kernels, recorded graphs, real streams and pinned memory."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import pytest
import torch
from torch.nn.functional import silu

from engine import kernels_cuda, paged_cuda
from engine.attention import PagedForward
from engine.batch import Batch, Segment
from engine.model import LoadSpec, compare, load
from engine.runner import Runner
from engine.transfers import PIECE_BYTES, Transfers
from tests.engine.tiny import TINY, save_tiny
from tests.gpu.shapes import QWEN_06B, batch_of, loaded
from tiers.arena import Arena, Geometry
from tiers.block import BlockKey, Copy, Fetch, Slot, Spill, Tier
from tiers.disk import Landed

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def world(dtype: torch.dtype, runs: list[tuple[int, int]], kv_heads: int, group: int, head: int):
    """An arena with the KV of some sequences, NaN elsewhere; their batch; queries; fresh keys and values."""
    torch.manual_seed(len(runs))
    size, layers = 32, 2
    slots = sum(-(-(past + count) // size) for past, count in runs) + 3
    arena = Arena(
        Geometry(layers, kv_heads, head, size, str(dtype).removeprefix("torch.")), slots, "cuda"
    )
    arena.blocks.fill_(torch.nan)
    free = list(range(slots))
    random.Random(0).shuffle(free)
    tables = [[free.pop() for _ in range(-(-(past + count) // size))] for past, count in runs]
    batch = batch_of(tables, runs)
    kv = []
    for table, (past, count) in zip(tables, runs, strict=True):
        whole = torch.randn(layers, 2, kv_heads, past + count, head, dtype=dtype, device="cuda")
        for at, slot in enumerate(table):
            rows = whole[:, :, :, at * size : (at + 1) * size]
            arena.blocks[slot][:, :, :, : rows.shape[3]] = rows
        kv.append(whole)
    query = torch.randn(kv_heads * group, len(batch.tokens), head, dtype=dtype, device="cuda")
    return arena, batch, kv, query


def textbook(batch: Batch, kv, query: torch.Tensor, layer: int, scaling: float) -> torch.Tensor:
    """In float32: [tokens, query_heads, head_dim]."""
    out = torch.empty(query.shape[1], query.shape[0], query.shape[2], device="cuda")
    for whole, segment in zip(kv, batch.segments, strict=True):
        group = query.shape[0] // whole.shape[2]
        keys, values = whole[layer].float().repeat_interleave(group, dim=1)
        run = slice(segment.start, segment.start + segment.count)
        scores = query[:, run].float() @ keys.transpose(1, 2) * scaling
        past = segment.context - segment.count
        seen = torch.ones(scores.shape[1:], dtype=torch.bool, device="cuda").tril(past)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[run] = (weights @ values).transpose(0, 1)
    return out


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "group", "head"),
    [
        (torch.bfloat16, 8, 4, 128),
        (torch.bfloat16, 8, 2, 128),
        (torch.bfloat16, 2, 7, 80),
        (torch.float16, 3, 3, 64),
        (torch.float32, 3, 3, 64),  # takes longest to compile
    ],
)
@pytest.mark.parametrize(
    "runs",
    [
        [(0, 1)],
        [(4095, 1)],
        [(31, 1), (32, 1), (33, 1), (2000, 1)],
        [(70, 16), (5, 3), (900, 1)],
        [(0, 300), (500, 200), (64, 1)],
    ],
)
def test_paged_attention_equals_the_textbook(dtype, kv_heads, group, head, runs):
    arena, batch, kv, query = world(dtype, runs, kv_heads, group, head)
    out = PagedForward(batch, arena).read(1, query.transpose(0, 1).contiguous(), head**-0.5)
    expected = textbook(batch, kv, query, 1, head**-0.5)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "inner"), [(4096, 14336), (3072, 1024), (151936, 1024), (99, 80)])
def test_one_row_is_multiplied(dtype, rows, inner):
    x = torch.randn(1, inner, device="cuda", dtype=dtype)
    weight = torch.randn(2 * rows, inner, device="cuda", dtype=dtype) / inner**0.5
    gate, up = (x.float() @ weight.float().T).chunk(2, dim=1)
    for out, expected in (
        (kernels_cuda.multiply_row(x, weight[:rows]), gate),
        (kernels_cuda.multiply_row(x, weight, gated=True), silu(gate) * up),
    ):
        torch.testing.assert_close(
            out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )


def test_a_segment_with_many_queries_on_a_past_uses_flash_attention():
    arena, batch, _, query = world(torch.bfloat16, [(2048, 2048)], 8, 4, 128)
    forward = PagedForward(batch, arena)
    tokens = query.transpose(0, 1).contiguous()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward.read(0, tokens, 0.1)
    scores = 32 * 2048 * 4096 * 2  # bytes, that any other way would take
    assert torch.cuda.max_memory_allocated() - before < scores / 2


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_loads_and_agrees_with_transformers(family, dtype, tmp_path):
    """Head dimensions of 8, odd groups, biases, head norms: `load` compares, and refuses what differs."""
    path = save_tiny(TINY[family], tmp_path / "model")
    spec = LoadSpec(tmp_path / "state", path=str(path), device="cuda", dtype=dtype, block_tokens=4)
    assert load(spec).fused is not None


@pytest.fixture(scope="module")
def qwen():
    return loaded(QWEN_06B, "qwen", "cuda", torch.bfloat16)


def test_real_shapes_agree_with_transformers(qwen):
    compare(qwen)


@pytest.mark.parametrize("sequences", [1, 3, 8, 32])
def test_a_replayed_graph_gives_what_launching_gives(qwen, sequences):
    tables = [list(range(at * 6, at * 6 + 6)) for at in range(sequences)]
    pasts = [17 + 4 * at for at in range(sequences)]
    arenas = [Arena(qwen.geometry, 6 * sequences, "cuda") for _ in range(2)]
    runner, launched = Runner(qwen, arenas[0]), Runner(qwen, arenas[1])
    for one in (runner, launched):
        one.run(batch_of(tables, [(0, past) for past in pasts]))
    for step in range(4):
        batch = batch_of(tables, [(past + step, 1) for past in pasts])
        replayed = runner.run(batch).clone()
        with torch.inference_mode():
            expected = qwen.fused.run(batch, arenas[1])
        # Products of padded batches may be summed in another order.
        torch.testing.assert_close(replayed, expected, atol=0.1, rtol=0.05)
    torch.testing.assert_close(arenas[0].blocks, arenas[1].blocks, atol=0.1, rtol=0.05)


def test_graphs_of_one_shape_do_not_remember_the_batch_before(qwen):
    arena = Arena(qwen.geometry, 40, "cuda")
    runner = Runner(qwen, arena)
    long, short = batch_of([list(range(20))], [(600, 1)]), batch_of([[30]], [(3, 1)])
    arena.blocks.normal_()
    kept = arena.blocks.clone()
    first = runner.run(short).clone()
    runner.run(long)
    assert torch.equal(runner.run(short), first)
    changed = (arena.blocks != kept).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [18, 30]  # the slots of their last tokens


GEOMETRY = Geometry(16, 4, 128, 32, "bfloat16")  # 1 MiB a block


class Threads:
    def __init__(self, slots: int) -> None:
        self.device, self.host = Arena(GEOMETRY, slots, "cuda"), Arena(GEOMETRY, slots)
        arenas = {Tier.DEVICE: self.device, Tier.HOST: self.host}
        self.replies = SimpleQueue()
        self.transfers = Transfers.of(arenas, 32, self.replies.put)
        self.memory = self.transfers.memory

    def __enter__(self):
        self.pool = ThreadPoolExecutor(len(self.transfers.workers))
        self.jobs = [self.pool.submit(worker.run) for worker in self.transfers.workers]
        return self

    def __exit__(self, *_):
        for worker in self.transfers.workers:
            worker.stop()
        for job in self.jobs:
            job.result()
        self.pool.shutdown()
        self.transfers.close()


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "big"))


@pytest.mark.parametrize("pinned", [False, True])
def test_a_round_trip_changes_no_bit(pinned):
    slots = 64
    with Threads(slots) as rig:
        if pinned:
            rig.jobs[-1].result()
            assert rig.host.blocks[slots - 1].is_pinned()
        sent = torch.randint(
            0, 256, (slots, GEOMETRY.block_bytes), dtype=torch.uint8, device="cuda"
        )
        there = rig.device.blocks.view(slots, -1).view(torch.uint8)
        there.copy_(sent)
        for slot in range(slots):
            rig.memory.copy(Copy(key(slot), Tier.DEVICE, slot, Tier.HOST, slots - 1 - slot))
            # At once overwritten: the model waits for the copy.
            rig.memory.fence(Batch([0], [0], [Segment(0, 32, 32, [Slot(slot)], logits=1)]))
            there[slot] = 0
        for slot in range(slots):
            assert not rig.memory.copy(
                Copy(key(slot), Tier.HOST, slots - 1 - slot, Tier.DEVICE, slot)
            )
        for _ in range(slots):
            assert isinstance(rig.replies.get(timeout=30), Landed)
        assert torch.equal(there, sent)


def test_spills_and_fetches_change_no_bit():
    with Threads(8) as rig:
        there = rig.device.blocks.view(8, -1).view(torch.uint8)
        there.random_(0, 256)
        sent = there[3].cpu()
        spill = Spill(key(1), key(0), key(0), 0, tuple(range(32)), Tier.DEVICE, Slot(3), Slot(0))
        view = rig.memory.payload(spill)
        rig.memory.arrival()()
        assert bytes(view) == sent.numpy().tobytes()
        fetch = Fetch(key(1), key(0), tuple(range(32)), Tier.DEVICE, Slot(5))
        rig.memory.buffer(fetch)[:] = view
        rig.memory.settle(fetch)
        assert torch.equal(there[5], there[3])


def test_the_host_tier_is_pinned_piece_by_piece_and_may_be_made_again():
    slots = 2 * PIECE_BYTES // GEOMETRY.block_bytes + 5
    for _ in range(2):
        with Threads(slots) as rig:
            rig.jobs[-1].result()
            assert all(rig.host.blocks[slot].is_pinned() for slot in (0, slots // 2, slots - 1))


def test_triton_is_there():
    """Else everything above was checked on the path without it."""
    assert paged_cuda.available()
