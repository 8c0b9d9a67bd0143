"""Attention over pages in place, on the CPU: for few query tokens, where gathering would cost the most.

Measured on two AVX2 cores, 4,096 tokens of context, 3 KV heads, 9 query heads, head_dim 64, fp32, per
layer: 0.70 ms for one query token (contiguous SDPA 0.85, gather and SDPA 2.0), 1.7 for 4, 2.8 for 8, 5.3
for 16, where gathering costs 3.4.
So `MAX_QUERIES` is 8. At one token it moves 9 GB/s, which is what this memory gives. With KV in float16 one token took 0.32 ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch

from engine import kernels_cpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.batch import Segment

Array = np.ndarray[Any, Any]

MAX_QUERIES = 8  # of one sequence; up to here reading in place is faster than gathering


@dataclass(frozen=True, slots=True)
class Plan:
    """Which query tokens see which blocks. Made once per batch, used by every layer. All int64."""

    tables: Array  # [sequences, blocks], padded with 0 beyond what a context needs
    starts: Array  # [sequences] index of the first query token
    counts: Array  # [sequences] query tokens
    contexts: Array  # [sequences] tokens of KV, the query tokens' own included


def plan(segments: Sequence[Segment], block_tokens: int) -> Plan:
    """Lay out block tables for the kernel."""
    blocks = [-(-segment.context // block_tokens) for segment in segments]
    tables = np.zeros((len(segments), max(blocks)), np.int64)
    for row, (segment, used) in enumerate(zip(segments, blocks, strict=True)):
        tables[row, :used] = segment.table[:used]
    return Plan(
        tables=tables,
        starts=np.array([segment.start for segment in segments], np.int64),
        counts=np.array([segment.count for segment in segments], np.int64),
        contexts=np.array([segment.context for segment in segments], np.int64),
    )


def threads() -> int:
    """Into how many shares the kernels cut their work: as many as torch has threads, which do them unless `take` said fewer."""
    given = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    take(min(given, numba.get_num_threads()))
    return int(given)


def take(count: int) -> int:
    """Let so many threads do the calling thread's kernels from now on; how many there are. Changes nothing of what they compute."""
    there = min(count, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(there)
    return int(there)


def attend(
    query: torch.Tensor,  # [tokens, query_heads, head_dim] float32, contiguous
    blocks: torch.Tensor,  # [slots, layers, 2, kv_heads, block_tokens, head_dim] float32 or float16
    layer: int,
    plan: Plan,
    scaling: float,
    out: torch.Tensor,  # as `query`; the rows of the plan's query tokens are written
) -> None:
    """Causal attention of each sequence's last `counts` tokens over its `contexts` tokens of KV."""
    kernels_cpu.attend(
        query.numpy(),
        in_numpy(blocks),
        layer,
        plan.tables,
        plan.starts,
        plan.counts,
        plan.contexts,
        np.float32(scaling),
        out.numpy(),
        threads(),
    )


def in_numpy(blocks: torch.Tensor) -> Array:
    """The same memory as the kernels take it: they know float16 by its bits, as numba has no such type on the CPU."""
    bits = blocks.view(torch.uint16) if blocks.dtype is torch.float16 else blocks
    array: Array = bits.numpy()
    return array


def warm_up(dtype: torch.dtype) -> None:
    """Compile the kernel (about 4 s), or read it from numba's cache, before a request needs it. No shape matters.

    torch keeps its number of threads: the first kernel of a process has OpenMP, theirs and ours, forget it.
    """
    given = torch.get_num_threads()
    query, blocks = torch.zeros(1, 1, 1), torch.zeros(1, 1, 2, 1, 1, 1, dtype=dtype)
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    attend(query, blocks, 0, Plan(zero[None], zero, one, one), 1.0, torch.empty_like(query))
    torch.set_num_threads(given)
