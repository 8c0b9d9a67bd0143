"""Decodes through CUDA graphs: a pass over few tokens is recorded once for each shape, and replayed for each step.

A graph repeats its launches to the letter: same kernels, same addresses, same sizes. So what differs from step to step lies
in buffers that stay, one set for each shape, and is written there before each replay; and batches are padded to shapes.

    shape      sequences and tokens, each rounded up to a power of two, and whether a sequence has more than one: so that
               there are few. A decode of n sequences is (n, n, 1) rounded; a step that verifies guesses has more tokens.
    padding    a sequence of no tokens and no context; a token 0 at position 0 whose KV goes nowhere (slot -1)

Laws
    What a replay gives is what the pass would give, launched as it was recorded.
    A batch with a long segment, or of too many tokens, has no shape: it is run launch by launch.
    The result lies in the graph's own memory: it is good until the next run.

The pass must not wait for the device nor look at what its tensors hold. Recording runs it first, on the real inputs: what
it writes, it writes again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from engine.batch import padded_tables
from engine.fused_cuda import Inputs
from engine.paged_cuda import MAX_QUERIES, Plan, parts, power_of_two, queries_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.batch import Batch
    from tiers.arena import Arena

    Replay = Callable[[], torch.Tensor]
    # Runs a pass once or more, and keeps it.
    Record = Callable[[Callable[[], torch.Tensor]], Replay]
    Pass = Callable[[Inputs, Plan], torch.Tensor]  # logits of every token

MAX_TOKENS = 32  # of a batch; more are seldom, and each shape is memory and a quarter of a second


@dataclass(frozen=True, slots=True)
class Shape:
    sequences: int
    tokens: int
    queries: int  # of `queries_for`


def shape_of(batch: Batch) -> Shape | None:
    """None: it is not run from a graph."""
    tokens = len(batch.tokens)
    queries = max(segment.count for segment in batch.segments)
    if tokens > MAX_TOKENS or queries > MAX_QUERIES:
        return None
    return Shape(power_of_two(len(batch.segments)), power_of_two(tokens), queries_for(queries))


def numbers_of(batch: Batch, shape: Shape, block_tokens: int) -> list[int]:
    """What `Buffers.numbers` holds for a batch: tokens, positions, slots; starts, counts, contexts; padded."""
    tokens = [0] * (shape.tokens - len(batch.tokens))
    sequences = [0] * (shape.sequences - len(batch.segments))
    return [
        *batch.tokens,
        *tokens,
        *batch.positions,
        *tokens,
        *batch.slots(block_tokens),
        *[-1] * len(tokens),
        *[segment.start for segment in batch.segments],
        *sequences,
        *[segment.count for segment in batch.segments],
        *sequences,
        *[segment.context for segment in batch.segments],
        *sequences,
    ]


class Buffers:
    """The inputs of every pass of one shape. Written in place: their addresses are in the graph."""

    def __init__(self, shape: Shape, arena: Arena, max_context: int) -> None:
        self.shape = shape
        self._size = arena.geometry.block_tokens
        device = arena.device
        per_token, per_sequence = 3 * shape.tokens, 3 * shape.sequences
        self._numbers = torch.zeros(per_token + per_sequence, dtype=torch.int32, device=device)
        self._tables = torch.zeros(
            (shape.sequences, -(-max_context // self._size)), dtype=torch.int32, device=device
        )
        self.inputs = Inputs(*self._numbers[:per_token].view(3, -1))
        starts, counts, contexts = self._numbers[per_token:].view(3, -1)
        self.plan = Plan(
            tables=self._tables,
            starts=starts,
            counts=counts,
            contexts=contexts,
            queries=shape.queries,
            parts=parts(shape.sequences, arena),
        )

    def fill(self, batch: Batch) -> None:
        numbers = numbers_of(batch, self.shape, self._size)
        self._numbers.copy_(torch.tensor(numbers, dtype=torch.int32))
        tables = padded_tables(batch.segments, self._size)
        here = self._tables[: len(tables), : len(tables[0])]
        here.copy_(torch.tensor(tables, dtype=torch.int32))


class Graphs:
    """The recorded passes over one arena. Used by one thread."""

    def __init__(self, run: Pass, arena: Arena, max_context: int, record: Record) -> None:
        self._run = run
        self._arena = arena
        self._max_context = max_context
        self._record = record
        self._recorded: dict[Shape, tuple[Buffers, Replay]] = {}

    def run(self, batch: Batch) -> torch.Tensor | None:
        """As `Runner.run`; None if the batch has no shape."""
        shape = shape_of(batch)
        if shape is None:
            return None
        if shape in self._recorded:
            buffers, replay = self._recorded[shape]
            buffers.fill(batch)
        else:
            buffers = Buffers(shape, self._arena, self._max_context)
            buffers.fill(batch)
            replay = self._recording(buffers)
        logits = replay()
        wanted = batch.wanted
        if wanted == list(range(len(wanted))):
            return logits[: len(wanted)]
        return logits[torch.tensor(wanted, device=logits.device)]

    def warm_up(self, sequences: int) -> None:
        """Record what decodes of up to so many sequences need, largest first: the others share its memory."""
        tokens = power_of_two(min(sequences, MAX_TOKENS))
        while tokens:
            shape = Shape(tokens, tokens, 1)
            buffers = Buffers(shape, self._arena, self._max_context)
            buffers.inputs.slots.fill_(-1)
            if shape not in self._recorded:
                self._recording(buffers)
            tokens //= 2

    def _recording(self, buffers: Buffers) -> Replay:
        replay = self._record(partial(self._run, buffers.inputs, buffers.plan))
        self._recorded[buffers.shape] = buffers, replay
        return replay


class Recorder:
    """Records on CUDA. Its graphs share one pool of memory, as only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], torch.Tensor]) -> Replay:
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream()
        beside.wait_stream(current)
        # Compiles kernels, and makes libraries take their workspace.
        with torch.cuda.stream(beside):
            run()
            run()
        current.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads copy blocks meanwhile: that is no fault of this recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay
