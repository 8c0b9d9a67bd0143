"""One forward pass: a batch of token ids in, logits of the rows that are sampled out.

Nothing is decided here: the scheduler said what runs and where its KV lives. The arena is changed only in
the slots and rows of the batch's own tokens.

    on the CPU     engine/fused_cpu.py
    on CUDA        few tokens of each sequence: recorded graphs of engine/fused_cuda.py; more: the same pass, launched
    other models   transformers' forward
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine import paged_cuda
from engine.attention import PagedForward
from engine.fused_cuda import FusedCuda
from engine.graphs import Graphs, Recorder

if TYPE_CHECKING:
    from engine.batch import Batch
    from engine.fused_cuda import Inputs
    from engine.graphs import Record
    from engine.model import LoadedModel
    from engine.paged_cuda import Plan
    from tiers.arena import Arena


class Runner:
    """A loaded model over one arena. Used by one thread."""

    __slots__ = ("_arena", "_fused", "_graphs", "_model")

    def __init__(self, loaded: LoadedModel, arena: Arena) -> None:
        assert arena.geometry == loaded.geometry, "the arena was made for another model"
        assert arena.device == loaded.device, "the arena must be where the model is"
        # What a pass of ours reads it has by itself: the rest of the parameters would be half a gigabyte that nobody reads.
        self._model = loaded.model if loaded.fused is None else None
        self._fused = loaded.fused
        self._arena = arena
        self._graphs = None
        if isinstance(loaded.fused, FusedCuda):
            self._graphs = graphs(loaded.fused, arena, loaded.max_context, Recorder())

    def warm_up(self, sequences: int) -> None:
        """Before a request needs it: whatever is made once to decode so many sequences together."""
        if self._graphs is not None:
            with torch.inference_mode():
                self._graphs.warm_up(sequences)

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits [`batch.wanted`, vocabulary] in float32."""
        if isinstance(self._fused, FusedCuda):
            assert self._graphs is not None
            with torch.inference_mode():
                logits = self._graphs.run(batch)
                return self._fused.run(batch, self._arena) if logits is None else logits
        device = self._arena.device
        with torch.inference_mode():
            if self._fused is not None:
                return self._fused.run(batch, self._arena)
            assert self._model is not None
            output = self._model(
                input_ids=torch.tensor([batch.tokens], device=device),
                position_ids=torch.tensor([batch.positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(batch.wanted, dtype=torch.long, device=device),
                paged=PagedForward(batch, self._arena),
            )
            logits = output.logits[0].float()
            assert isinstance(logits, torch.Tensor)
            return logits


def graphs(fused: FusedCuda, arena: Arena, max_context: int, record: Record) -> Graphs:
    """Of a fused pass over one arena."""

    def run(inputs: Inputs, plan: Plan) -> torch.Tensor:
        # Once for all layers: rows of padding are never written, and stay zero.
        out = fused.embedding.new_zeros(len(inputs.tokens), fused.query_heads, fused.head_dim)

        def attend(layer: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
            paged_cuda.attend(query, arena, layer, plan, scaling, out)
            return out

        return fused.forward(inputs, arena, attend, rows=None)

    return Graphs(run, arena, max_context, record)
