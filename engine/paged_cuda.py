"""Attention over pages in place, on CUDA: for few query tokens of each sequence, as decodes and short turns have.

The kernel is Triton's (engine/kernels_cuda.py), which comes with every CUDA build of torch. Many query tokens on a past
are gathered, and attended to by torch's flash attention (engine/attention.py): there the products decide, not the copy.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.batch import padded_tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.batch import Segment
    from tiers.arena import Arena

log = logging.getLogger(__name__)

MAX_QUERIES = 16  # of one sequence; with a group of 4 they are the 64 rows that one product of the kernel takes


@functools.cache
def available() -> bool:
    """Whether Triton is there and works: for its launches it needs a C compiler and Python's headers."""
    if importlib.util.find_spec("triton") is None:
        return False
    if not torch.cuda.is_available():  # interpreted, for tests
        return True
    from engine import kernels_cuda

    try:
        kernels_cuda.gate(torch.zeros(1, 2, device="cuda"))
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        log.warning("Triton does not work here, and attention is slower without it: %s", error)
        return False
    return True


def queries_for(count: int) -> int:
    """What a kernel is compiled for where a sequence has so many: 1 or all, so that there are few kernels."""
    assert count <= MAX_QUERIES
    return 1 if count <= 1 else MAX_QUERIES


def power_of_two(number: int) -> int:
    """The least that is no smaller. At least 1."""
    return 1 << max(0, number - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Plan:
    """Which query tokens see which blocks. Tensors are int32, on the device."""

    tables: torch.Tensor  # [sequences, blocks]; what a context does not reach may be anything
    starts: torch.Tensor  # [sequences] index of the first query token
    counts: torch.Tensor  # [sequences] query tokens
    contexts: torch.Tensor  # [sequences] tokens of KV, the query tokens' own included
    queries: int  # of `queries_for`: no count is higher
    parts: int  # that each context is split into


def parts(sequences: int, arena: Arena) -> int:
    from engine import kernels_cuda

    processors = (
        torch.cuda.get_device_properties(arena.device).multi_processor_count
        if arena.device.type == "cuda"
        else 1
    )
    return kernels_cuda.shares(sequences, arena.geometry.kv_heads, processors)


def plan(segments: Sequence[Segment], arena: Arena) -> Plan:
    device = arena.device
    tables = padded_tables(segments, arena.geometry.block_tokens)

    def numbers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return Plan(
        tables=torch.tensor(tables, dtype=torch.int32, device=device),
        starts=numbers([segment.start for segment in segments]),
        counts=numbers([segment.count for segment in segments]),
        contexts=numbers([segment.context for segment in segments]),
        queries=queries_for(max(segment.count for segment in segments)),
        parts=parts(power_of_two(len(segments)), arena),
    )


def attend(
    query: torch.Tensor,  # [tokens, query_heads, head_dim] contiguous
    arena: Arena,
    layer: int,
    plan: Plan,
    scaling: float,
    out: torch.Tensor,  # as `query`; the rows of the plan's query tokens are written
) -> None:
    """Causal attention of each sequence's last `counts` tokens over its `contexts` tokens of KV."""
    from engine import kernels_cuda

    kernels_cuda.attend(
        query,
        arena,
        layer,
        tables=plan.tables,
        starts=plan.starts,
        counts=plan.counts,
        contexts=plan.contexts,
        queries=plan.queries,
        parts=plan.parts,
        scaling=scaling,
        out=out,
    )
