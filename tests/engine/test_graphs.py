"""The fused pass of CUDA and its recorded shapes, on the CPU: interpreted kernels, and a recording that launches anew."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from engine.batch import Batch, Segment
from engine.fused_cuda import FusedCuda
from engine.graphs import MAX_TOKENS, Buffers, Graphs, Shape, numbers_of, shape_of
from engine.model import LoadSpec, load
from engine.paged_cuda import MAX_QUERIES
from engine.runner import Runner, graphs
from tests.engine.tiny import EXACT, SHAPE, save_tiny
from tiers.arena import Arena, Geometry

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu replays real ones")

SIZE = 4
SLOTS = 24


def batch_of(runs: list[tuple[int, int]], *, logits: tuple[int, ...] = (), seed: int = 0) -> Batch:
    """(past, count) of each sequence, on scrambled slots that no two share."""
    source = random.Random(seed)
    free = list(range(SLOTS))
    source.shuffle(free)
    tokens: list[int] = []
    positions: list[int] = []
    segments = []
    for index, (past, count) in enumerate(runs):
        table = [free.pop() for _ in range(-(-(past + count) // SIZE))]
        wanted = logits[index] if logits else 1
        segments.append(Segment(len(tokens), count, past + count, table, logits=wanted))
        tokens += [source.randrange(3, 90) for _ in range(count)]
        positions += range(past, past + count)
    return Batch(tokens, positions, segments)


@pytest.mark.parametrize(
    ("runs", "shape"),
    [
        ([(7, 1)], Shape(1, 1, 1)),
        ([(7, 1)] * 3, Shape(4, 4, 1)),
        ([(0, 1), (3, 5)], Shape(2, 8, MAX_QUERIES)),
        ([(0, MAX_QUERIES)], Shape(1, 16, MAX_QUERIES)),
        ([(0, MAX_QUERIES + 1)], None),
        ([(0, 1)] * MAX_TOKENS, Shape(MAX_TOKENS, MAX_TOKENS, 1)),
        ([(0, 1)] * MAX_TOKENS + [(0, 1)], None),
    ],
)
def test_batches_are_rounded_to_few_shapes(runs, shape):
    segments = [Segment(0, count, past + count, [0], logits=1) for past, count in runs]
    tokens = sum(count for _, count in runs)
    assert shape_of(Batch([0] * tokens, [0] * tokens, segments)) == shape


def test_padding_is_at_no_slot_and_has_no_context():
    batch = Batch(
        [5, 6, 7], [9, 3, 4], [Segment(0, 1, 10, [2, 8, 1], 1), Segment(1, 2, 5, [3, 4], 1)]
    )
    tokens, positions, slots = [5, 6, 7, 0], [9, 3, 4, 0], [1, 3, 4, -1]
    starts, counts, contexts = [0, 1, 0, 0], [1, 2, 0, 0], [10, 5, 0, 0]
    numbers = numbers_of(batch, Shape(4, 4, MAX_QUERIES), SIZE)
    assert numbers == tokens + positions + slots + starts + counts + contexts


def test_buffers_stay_where_they_are_and_forget_the_batch_before():
    arena = Arena(Geometry(1, 1, 8, SIZE, "float32"), SLOTS)
    buffers = Buffers(Shape(2, 2, 1), arena, max_context=40)
    parts = (*vars_of(buffers.inputs), buffers.plan.tables, buffers.plan.contexts)
    before = [part.data_ptr() for part in parts]
    buffers.fill(batch_of([(30, 1), (20, 1)]))
    batch = batch_of([(6, 1)], seed=1)
    buffers.fill(batch)
    assert [part.data_ptr() for part in parts] == before
    assert buffers.plan.contexts.tolist() == [7, 0]
    assert buffers.plan.counts.tolist() == [1, 0]
    assert buffers.inputs.slots.tolist()[1] == -1
    assert buffers.plan.tables[0, :2].tolist() == batch.segments[0].table


def vars_of(inputs) -> tuple[torch.Tensor, ...]:
    return inputs.tokens, inputs.positions, inputs.slots


class Counted:
    """Records by keeping the pass itself, as a replay would repeat it."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, run):
        self.recorded += 1
        run()
        return run


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """As `pair`: one layer of two heads, because interpreting is slow."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    directory = save_tiny(LlamaConfig(**SHAPE | small), tmp_path_factory.mktemp("small") / "model")
    spec = LoadSpec(
        tmp_path_factory.mktemp("state"), str(directory), device="cpu", block_tokens=4, **EXACT
    )
    return load(spec), AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.fixture
def both(smallest):
    return over_arenas(*smallest)


def over_arenas(loaded, plain):
    """The pass of CUDA and the CPU's own runner, each over an arena that is NaN."""
    fused = FusedCuda.of(plain)
    assert fused is not None
    arenas = [Arena(loaded.geometry, SLOTS) for _ in range(2)]
    for arena in arenas:
        arena.blocks.fill_(torch.nan)
    return fused, arenas[0], Runner(loaded, arenas[1]), arenas[1]


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4, equal_nan=True)


def test_a_fused_pass_computes_what_transformers_does_and_writes_the_same_kv(pair):
    fused, arena, runner, its_arena = over_arenas(*pair)
    runs = [[(0, 11), (0, 5)], [(11, 12), (5, 1)], [(23, 3), (6, 1)], [(26, 1)]]
    tables = [batch_of([(27, 1), (7, 1)]).segments[at].table for at in range(2)]
    for step in runs:
        shaped = batch_of(step)
        segments = [
            Segment(s.start, s.count, s.context, table, logits=s.logits)
            for s, table in zip(shaped.segments, tables, strict=False)
        ]
        batch = Batch(shaped.tokens, shaped.positions, segments)
        with torch.inference_mode():
            close(fused.run(batch, arena), runner.run(batch))
    close(arena.blocks, its_arena.blocks)


def test_shapes_are_recorded_once_and_give_what_the_pass_gives(both):
    fused, arena, runner, _ = both
    record = Counted()
    recorded: Graphs = graphs(fused, arena, 256, record)
    table = list(range(7, 15))
    tokens = [7 * at % 90 for at in range(30)]
    with torch.inference_mode():
        for begin, end in ((0, 3), (3, 4), (4, 5), (5, 9), (9, 10), (10, 26)):
            batch = Batch(
                tokens[begin:end],
                range(begin, end),
                [Segment(0, end - begin, end, table, logits=1)],
            )
            logits = recorded.run(batch)
            assert logits is not None
            close(logits, runner.run(batch))
    assert record.recorded == 3  # one token, four, sixteen
    assert recorded.run(batch_of([(0, MAX_QUERIES + 1)])) is None


def test_only_wanted_rows_come_back_and_padding_harms_nobody(both):
    fused, arena, runner, its_arena = both
    recorded = graphs(fused, arena, 256, Counted())
    with torch.inference_mode():
        for step, wanted in (
            ([(0, 2), (0, 3), (0, 1)], (1, 0, 1)),
            ([(0, 4), (0, 1), (0, 3)], (4, 1, 2)),  # some tokens are drafts
            ([(0, 1), (0, 1), (0, 1)], (1, 1, 1)),
        ):
            batch = batch_of(step, logits=wanted)
            logits = recorded.run(batch)
            assert logits is not None
            assert len(logits) == sum(wanted)
            close(logits, runner.run(batch))
    close(arena.blocks, its_arena.blocks)


def test_warming_up_records_every_decode_and_writes_nothing(both):
    fused, arena, _, _ = both
    record = Counted()
    recorded = graphs(fused, arena, 256, record)
    with torch.inference_mode():
        recorded.warm_up(3)
        assert record.recorded == 3  # four sequences, two, one
        assert arena.blocks.isnan().all()
        recorded.run(batch_of([(0, 1), (0, 1), (0, 1)]))
    assert record.recorded == 3
