"""Paged attention against the textbook, whatever the slots, the edges and the neighbours' bytes."""

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import attention, paged_cpu
from engine.attention import PagedForward, UnknownAttention
from engine.batch import Batch, Segment
from tiers.arena import Arena, Geometry

SIZE = 4  # block tokens
HEAD = 8
MANY = paged_cpu.MAX_QUERIES + 1
LAYERS = 2


class World:
    """Sequences with known keys and values, laid out in a scrambled arena that is NaN everywhere else."""

    def __init__(self, runs: list[tuple[int, int]], kv_heads: int, group: int, seed: int) -> None:
        """`runs`: (past, count) of each sequence."""
        random = torch.Generator().manual_seed(seed)
        self.group = group
        used = sum(-(-(past + count) // SIZE) for past, count in runs)
        self.arena = Arena(Geometry(LAYERS, kv_heads, HEAD, SIZE, "float32"), used + 3)
        self.arena.blocks.fill_(torch.nan)
        free = torch.randperm(used + 3, generator=random).tolist()
        self.kv = []  # of each sequence: [LAYERS, 2, kv_heads, context, HEAD]
        segments, positions, start = [], [], 0
        for past, count in runs:
            context = past + count
            table = [free.pop() for _ in range(-(-context // SIZE))]
            kv = torch.randn(LAYERS, 2, kv_heads, context, HEAD, generator=random)
            for token in range(past):
                row = self.arena.blocks[table[token // SIZE], :, :, :, token % SIZE]
                row.copy_(kv[:, :, :, token])
            self.kv.append(kv)
            segments.append(Segment(start, count, context, table, logits=1))
            positions += range(past, context)
            start += count
        self.batch = Batch([0] * start, positions, segments)
        self.query = torch.randn(kv_heads * group, start, HEAD, generator=random)

    def fresh(self, layer: int) -> torch.Tensor:
        """[2, kv_heads, tokens, HEAD]"""
        parts = [
            kv[layer, :, :, s.context - s.count :]
            for kv, s in zip(self.kv, self.batch.segments, strict=True)
        ]
        return torch.cat(parts, dim=2)

    def textbook(self, layer: int, scaling: float) -> torch.Tensor:
        """[tokens, query_heads, HEAD], one token and one head at a time, in float64."""
        out = torch.empty(self.query.shape[1], self.query.shape[0], HEAD, dtype=torch.float64)
        for kv, segment in zip(self.kv, self.batch.segments, strict=True):
            for token in range(segment.count):
                seen = segment.context - segment.count + token + 1
                for head in range(self.query.shape[0]):
                    keys, values = kv[layer, :, head // self.group, :seen].double()
                    scores = keys @ self.query[head, segment.start + token].double() * scaling
                    out[segment.start + token, head] = scores.softmax(0) @ values
        return out


runs = st.lists(st.tuples(st.integers(0, 14), st.integers(1, MANY + 3)), min_size=1, max_size=5)


@settings(max_examples=60)
@given(runs, st.sampled_from([1, 2, 3]), st.sampled_from([1, 3, 4]), st.integers(0, 2**32))
def test_any_batch_equals_the_textbook(runs, kv_heads, group, seed):
    world = World(runs, kv_heads, group, seed)
    forward = PagedForward(world.batch, world.arena)
    for layer in range(LAYERS):
        key, value = world.fresh(layer)
        out = forward.attend(layer, world.query, key, value, 0.3)
        torch.testing.assert_close(out.double(), world.textbook(layer, 0.3), atol=2e-6, rtol=2e-6)
    # The fresh KV is where the tables say, and nothing else was touched.
    written = sum(kv.numel() for kv in world.kv)
    assert world.arena.blocks.isfinite().sum() == written
    for kv, segment in zip(world.kv, world.batch.segments, strict=True):
        held = world.arena.blocks[list(segment.table)].permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        assert torch.equal(held[:, :, :, : segment.context], kv)


@pytest.mark.parametrize("context", [1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, 5 * SIZE + 1])
@pytest.mark.parametrize("threads", [1, 2])
def test_one_token_at_block_edges_with_any_number_of_threads(context, threads):
    torch.set_num_threads(threads)
    world = World([(context, 1)], 2, 2, seed=context)
    key, value = world.fresh(1)
    out = PagedForward(world.batch, world.arena).attend(1, world.query, key, value, 1.0)
    torch.testing.assert_close(out.double(), world.textbook(1, 1.0), atol=2e-6, rtol=2e-6)


def test_scores_far_apart_do_not_overflow():
    world = World([(9, 1), (3, 1)], 1, 2, seed=0)
    world.query *= 1e4
    key, value = world.fresh(0)
    out = PagedForward(world.batch, world.arena).attend(0, world.query, key, value, 1.0)
    torch.testing.assert_close(out.double(), world.textbook(0, 1.0), atol=1e-4, rtol=1e-4)


def test_what_is_alone_and_what_is_batched_are_the_same_bits():
    """Decodes must not depend on their neighbours: the kernel deals out blocks by sequence, not by batch."""
    torch.set_num_threads(2)
    together = World([(11, 1), (5, 1), (13, 2)], 2, 3, seed=4)
    key, value = together.fresh(0)
    whole = PagedForward(together.batch, together.arena).attend(0, together.query, key, value, 0.5)
    for segment in together.batch.segments:
        run = slice(segment.start, segment.start + segment.count)
        alone = Batch(
            together.batch.tokens[run],
            together.batch.positions[run],
            [Segment(0, segment.count, segment.context, segment.table, logits=1)],
        )
        one = PagedForward(alone, together.arena).attend(
            0, together.query[:, run], key[:, run], value[:, run], 0.5
        )
        assert torch.equal(one, whole[run])


@pytest.mark.parametrize("contexts", [[1], [5, 1, 12], [4, 8, 9, 3]])
def test_padded_tables_give_what_in_place_reading_gives(contexts):
    """The path of a GPU, run here on the CPU."""
    world = World([(context, 1) for context in contexts], 2, 3, seed=3)
    key, value = world.fresh(1)
    in_place = PagedForward(world.batch, world.arena).attend(1, world.query, key, value, 0.5)
    padded = attention.pad(world.batch.segments, world.arena)
    out = attention.attend_padded(
        world.query.transpose(0, 1)[padded.rows], world.arena.blocks[:, 1], padded, 0.5
    )
    torch.testing.assert_close(out, in_place, atol=2e-6, rtol=2e-6)


def test_a_plan_asks_for_no_more_threads_than_torch_has():
    plan = paged_cpu.plan([Segment(0, 1, 5, [7, 3, 9], logits=1)], 4)
    assert numba.get_num_threads() == torch.get_num_threads() == 1
    assert plan.tables.tolist() == [[7, 3]]
    assert plan.contexts.dtype == np.int64


class Layer(torch.nn.Module):
    layer_idx = 0


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"paged": object(), "softcap": 30.0}, "needs softcap"),
        ({"paged": object(), "s_aux": torch.zeros(2)}, "needs s_aux"),
        ({}, "hand its arguments on"),
    ],
)
def test_attention_that_is_not_computed_is_refused(given, reason):
    x = torch.zeros(1, 2, 1, 8)
    with pytest.raises(UnknownAttention, match=reason):
        attention._paged_attention(Layer(), x, x, x, None, scaling=1.0, **given)
    with pytest.raises(UnknownAttention, match="masks of its own"):
        attention._paged_attention(Layer(), x, x, x, x, scaling=1.0, **given)
