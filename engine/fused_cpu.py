"""Forward passes on the CPU, where the model is of the Llama family: decodes here, prompts by engine/prefill_cpu.py.

transformers' forward is some 400 small operations for each token, in Python, and reads every weight as float32. Decodes
are one compiled call that holds no GIL and reads weights as they were made (engine/packed_cpu.py); of more than `MAX_TOKENS`
tokens, several. What is computed as a decode and what as a prompt is a segment's own affair, never its neighbours'.

Measured 2026-11 on two cores (AMD EPYC, load 2.2, KV still in float32: in float16 one token behind 4,000 takes 12.8 ms where
it took 18.2), the default model, ms a step, this against transformers' forward:

    tokens of one sequence       1          2          4          8          16         32         64
    behind 256 tokens            11 : 70    9 : 100    13 : 92    22 : 106   40 : 111   75 : 148   133 : 206
    behind 4,000                 24 : 86    32 : 115   47 : 126   79 : 162   132 : 196  273 : 278  540 : 437
    sessions of one token each, behind 256: 1: 7 : 64    4: 15 : 108    8: 30 : 122    16: 52 : 144

Laws
    What it computes is what transformers computes, in another order of sums: `engine.model.compare` holds one against
    the other at every load, and a model that is not exactly of the known shape is not taken.
    KV that one of them wrote is the other's to read.
    A decode's result does not depend, to the bit, on what it is batched with.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine import kernels_cpu, paged_cpu
from engine.family import (
    BIASES,
    DOWN,
    EMBEDDING,
    GATE_AND_UP,
    HEAD,
    HEAD_NORMS,
    LAST_NORM,
    NORMS,
    OUT,
    PROJECTIONS,
    recognise,
)
from engine.kernels_cpu import LANES, Form, Net
from engine.packed_cpu import lay_out, pack
from engine.prefill_cpu import Prefill

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.batch import Batch, Segment
    from tiers.arena import Arena

Array = np.ndarray[Any, Any]

MAX_TOKENS = 32  # of a pass; see the table


@dataclass(frozen=True, slots=True, eq=False)
class FusedModel:
    """A model's weights, packed. Used by one thread."""

    net: Net
    prefill: Prefill
    vocabulary: int
    forms: dict[str, int]  # {form: matrices}
    packed_bytes: int

    @classmethod
    def of(cls, model: Any, prefill_dtype: torch.dtype) -> FusedModel | None:
        """Of a transformers model. None for one that `forward` does not compute: another family, or parameters that it does not know."""
        found = recognise(model)
        if found is None or any(w.dtype is not torch.float32 for w in found.weights.values()):
            return None
        config, weights, layers = model.config, found.weights, found.layers
        of_layer = (PROJECTIONS, (OUT,), GATE_AND_UP, (DOWN,))
        matrices = [
            pack(torch.cat(found.of_layer(layer, names))) for layer in layers for names in of_layer
        ]
        matrices.append(pack(weights[HEAD]))
        norms = [weight for layer in layers for weight in found.of_layer(layer, NORMS)]
        attention = model.model.layers[0].self_attn
        positions = torch.arange(config.max_position_embeddings)[None]
        with torch.inference_mode():
            cosines, sines = model.model.rotary_emb(torch.zeros(1, 1, 1), positions)
        heads = config.num_attention_heads

        def stacked(names: tuple[str, ...]) -> list[torch.Tensor]:
            return [weight for layer in layers for weight in found.of_layer(layer, names)]

        nothing = torch.empty(0, 0)
        net = Net(
            matrices=lay_out(matrices),
            embedding=weights[EMBEDDING].clone().numpy(),
            norms=torch.stack([*norms, weights[LAST_NORM]]).numpy(),
            biases=(
                torch.cat(stacked(BIASES)).reshape(len(layers), -1) if found.biased else nothing
            ).numpy(),
            head_norms=(torch.stack(stacked(HEAD_NORMS)) if found.normed else nothing).numpy(),
            cosines=np.ascontiguousarray(cosines[0].numpy()),
            sines=np.ascontiguousarray(sines[0].numpy()),
            query_heads=heads,
            epsilon=float(config.rms_norm_eps),
            scaling=float(attention.scaling),
        )
        return cls(
            net=net,
            prefill=Prefill.of(model, found, prefill_dtype),
            vocabulary=weights[HEAD].shape[0],
            forms={
                form.name: count
                for form in Form
                if (count := sum(matrix.form is form for matrix in matrices))
            },
            packed_bytes=sum(matrix.nbytes for matrix in matrices),
        )

    def run(self, batch: Batch, arena: Arena) -> torch.Tensor:
        """As `Runner.run`, for a batch of any size."""
        decodes = [segment for segment in batch.segments if segment.decodes]
        rest = [segment for segment in batch.segments if not segment.decodes]
        parts = [(part, self._few) for part in grouped(decodes, MAX_TOKENS)]
        if rest:
            parts.append((rest, self._many))
        if len(parts) == 1:
            return parts[0][1](batch, arena)
        logits = torch.empty(sum(segment.logits for segment in batch.segments), self.vocabulary)
        before = itertools.accumulate((segment.logits for segment in batch.segments), initial=0)
        first = {segment.start: row for segment, row in zip(batch.segments, before, strict=False)}
        for segments, computed_by in parts:
            rows = [first[each.start] + row for each in segments for row in range(each.logits)]
            logits[rows] = computed_by(batch.part(segments), arena)
        return logits

    def _few(self, batch: Batch, arena: Arena) -> torch.Tensor:
        size = arena.geometry.block_tokens
        positions = np.array(batch.positions, np.int64)
        logits = self._room(len(batch.wanted))
        plan = paged_cpu.plan(batch.segments, size)
        kernels_cpu.forward(
            self.net,
            paged_cpu.in_numpy(arena.blocks),
            np.array(batch.tokens, np.int64),
            positions,
            np.array(batch.slots(size), np.int64),
            positions % size,
            plan.tables,
            plan.starts,
            plan.counts,
            plan.contexts,
            np.array(batch.wanted, np.int64),
            logits,
            paged_cpu.threads(),
        )
        return self._shown(logits)

    def _many(self, batch: Batch, arena: Arena) -> torch.Tensor:
        states = self.prefill.run(self.net, batch, arena)
        logits = self._room(len(states))
        if len(states):
            head = 4 * arena.geometry.layers
            kernels_cpu.multiply(self.net.matrices, head, states, logits, paged_cpu.threads())
        return self._shown(logits)

    def _room(self, rows: int) -> Array:
        return np.empty((rows, -(-self.vocabulary // LANES) * LANES), np.float32)

    def _shown(self, logits: Array) -> torch.Tensor:
        return torch.from_numpy(logits)[:, : self.vocabulary]


def grouped(segments: Sequence[Segment], at_most: int) -> list[list[Segment]]:
    """In their order, so many tokens a group; a segment of more is a group of its own."""
    groups: list[list[Segment]] = []
    tokens = 0
    for segment in segments:
        tokens += segment.count
        if not groups or tokens > at_most:
            groups.append([])
            tokens = segment.count
        groups[-1].append(segment)
    return groups
