"""Triton's kernels against the textbook, interpreted on the CPU. Where there is a GPU, `make gpu` checks them compiled."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import rms_norm, silu

from engine import kernels_cuda
from engine.batch import Segment
from tests.engine.test_attention import HEAD, LAYERS, SIZE, World

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu checks them compiled")

QUERIES = 4
QUIET = 0.3


def numbers(values) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def padded(segments: list[Segment], padding: int) -> dict[str, torch.Tensor]:
    """The tables of some sequences, and of `padding` that are none; unused entries would fault."""
    width = max(-(-s.context // SIZE) for s in segments) + 1
    tables = [[*s.table, *[10**6] * (width - len(s.table))] for s in segments]
    return {
        "tables": numbers(tables + [[10**6] * width] * padding),
        "starts": numbers([s.start for s in segments] + [0] * padding),
        "counts": numbers([s.count for s in segments] + [0] * padding),
        "contexts": numbers([s.context for s in segments] + [0] * padding),
    }


def written(runs, kv_heads, group, seed) -> World:
    """A world whose fresh KV is in the arena already."""
    world = World(runs, kv_heads, group, seed)
    for kv, segment in zip(world.kv, world.batch.segments, strict=True):
        for token in range(segment.context):
            world.arena.blocks[segment.table[token // SIZE], :, :, :, token % SIZE] = kv[
                :, :, :, token
            ]
    return world


def attended(world: World, layer: int, scaling: float, parts: int, padding: int = 0):
    query = world.query.transpose(0, 1).contiguous()
    out = torch.full_like(query, torch.nan)
    kernels_cuda.attend(
        query,
        world.arena,
        layer,
        **padded(list(world.batch.segments), padding),
        queries=QUERIES,
        parts=parts,
        scaling=scaling,
        out=out,
    )
    return out


few = st.lists(st.tuples(st.integers(0, 150), st.integers(1, QUERIES)), min_size=1, max_size=3)


@settings(max_examples=25)
@given(
    few,
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 2),
)
def test_any_few_queries_equal_the_textbook(runs, kv_heads, group, parts, padding):
    world = written(runs, kv_heads, group, seed=len(runs))
    out = attended(world, LAYERS - 1, QUIET, parts, padding)
    expected = world.textbook(LAYERS - 1, QUIET)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("context", [1, SIZE, SIZE + 1, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_edges_of_blocks_tiles_and_shares(context, parts):
    world = written([(context - 1, 1)], 1, 2, seed=context)
    torch.testing.assert_close(
        attended(world, 0, QUIET, parts).double(), world.textbook(0, QUIET), atol=2e-6, rtol=2e-6
    )


def test_scores_far_apart_do_not_overflow():
    world = written([(99, 1), (3, 1)], 1, 2, seed=0)
    world.query *= 1e4
    torch.testing.assert_close(
        attended(world, 0, 1.0, 2).double(), world.textbook(0, 1.0), atol=1e-4, rtol=1e-4
    )


def test_how_far_a_context_is_split_depends_on_the_machine_and_never_on_the_context():
    assert kernels_cuda.shares(1, 8, 132) == 64  # 512 programs
    assert kernels_cuda.shares(128, 8, 132) == 1
    assert kernels_cuda.shares(1, 1, 10_000) == kernels_cuda.MAX_SHARES


@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_normed_turned_and_put_in_their_slots(normed):
    world = World([(5, 3), (2, 1)], 2, 3, seed=1)
    arena, batch, layer = world.arena, world.batch, 1
    tokens, heads = len(batch.positions), 6
    fused = torch.randn(tokens, (heads + 4) * HEAD)
    angles = torch.rand(16, HEAD // 2).repeat(1, 2)
    cosines, sines = angles.cos(), angles.sin()
    norms = (torch.rand(HEAD), torch.rand(HEAD)) if normed else None
    slots = [
        s.table[at // SIZE] for s in batch.segments for at in range(s.context - s.count, s.context)
    ]
    slots[1] = -1  # padding
    query = torch.empty(tokens, heads, HEAD)
    before = arena.blocks.clone()
    kernels_cuda.place(
        fused,
        arena,
        layer,
        slots=numbers(slots),
        positions=numbers(batch.positions),
        cosines=cosines,
        sines=sines,
        norms=norms,
        epsilon=1e-5,
        query=query,
    )
    q, k, v = fused.view(tokens, heads + 4, HEAD).split((heads, 2, 2), dim=1)
    if norms is not None:
        q, k = rms_norm(q, (HEAD,), norms[0], 1e-5), rms_norm(k, (HEAD,), norms[1], 1e-5)

    def turned(x):
        at = list(batch.positions)
        swapped = torch.cat((-x[..., HEAD // 2 :], x[..., : HEAD // 2]), dim=-1)
        return x * cosines[at][:, None] + swapped * sines[at][:, None]

    torch.testing.assert_close(query, turned(q))
    for token, (slot, position) in enumerate(zip(slots, batch.positions, strict=True)):
        if slot >= 0:
            before[slot, layer, 0, :, position % SIZE] = turned(k)[token]
            before[slot, layer, 1, :, position % SIZE] = v[token]
    torch.testing.assert_close(arena.blocks, before, equal_nan=True)


def test_a_sum_is_normed_and_kept():
    hidden, delta, weight = torch.randn(3, 48), torch.randn(3, 48), torch.randn(48)
    sum_ = hidden + delta
    alone = kernels_cuda.add_and_norm(hidden, None, weight, 1e-5)
    torch.testing.assert_close(alone, rms_norm(hidden, (48,), weight, 1e-5))
    both = kernels_cuda.add_and_norm(hidden, delta, weight, 1e-5)
    torch.testing.assert_close(both, rms_norm(sum_, (48,), weight, 1e-5))
    torch.testing.assert_close(hidden, sum_)


@pytest.mark.parametrize(("rows", "inner"), [(3, 5), (10, 48), (8, 1500)])
@pytest.mark.parametrize("biased", [False, True])
def test_one_row_is_multiplied(rows, inner, biased):
    x, weight, bias = torch.randn(1, inner), torch.randn(rows, inner), torch.randn(rows)
    out = kernels_cuda.multiply_row(x, weight, bias=bias if biased else None)
    torch.testing.assert_close(out, x @ weight.T + bias * biased, atol=1e-4, rtol=1e-4)
    both = torch.randn(2 * rows, inner) / inner
    gate, up = (x @ both.T).chunk(2, dim=1)
    out = kernels_cuda.multiply_row(x, both, gated=True)
    torch.testing.assert_close(out, silu(gate) * up, atol=1e-4, rtol=1e-4)


def test_every_kernel_compiles_for_a_gpu():
    environment = {name: of for name, of in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-m", "tests.engine.compiling"],
        env=environment,
        check=True,
    )


def test_the_gate_is_silu():
    both = torch.randn(3, 2 * 1500)
    gate, up = both.chunk(2, dim=1)
    torch.testing.assert_close(kernels_cuda.gate(both), silu(gate) * up)
