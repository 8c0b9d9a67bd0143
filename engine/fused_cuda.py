"""A forward pass on CUDA, where the model is of the Llama family: ten launches a layer instead of transformers' forty.

Products are torch's (cuBLAS), but those of one token, which are our own: they only read weights, and may do the next small
thing on the way. A layer's queries, keys and values are one product, its gate and up another; the rest is a few kernels of
engine/kernels_cuda.py. Nothing here waits for the device, and for few tokens nothing depends on the step but
the contents of `Inputs`: such a pass can be recorded once and replayed (engine/graphs.py).

Laws
    What it computes is what transformers computes, rounded at other places: `engine.model.compare` holds one against
    the other at every load, and a model that is not exactly of the known shape is not taken.
    KV that one of them wrote is the other's to read.
    A weight is in memory once: the model's own parameters become views of what is laid together here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import embedding, linear

from engine.attention import PagedForward
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
    together,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.batch import Batch
    from tiers.arena import Arena

    # (layer, queries [tokens, query_heads, head_dim], scaling): as the queries. KV is in the arena already.
    Attend = Callable[[int, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    before: torch.Tensor  # weights of the norm before attention
    projections: torch.Tensor  # queries, keys, values
    biases: torch.Tensor | None  # of the projections
    head_norms: tuple[torch.Tensor, torch.Tensor] | None  # of queries, of keys
    out: torch.Tensor
    after: torch.Tensor  # weights of the norm before the rest
    gate_and_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one pass reads besides weights and KV. int32, on the device."""

    tokens: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    slots: torch.Tensor  # [tokens]; negative: padding, whose KV goes nowhere


@dataclass(frozen=True, slots=True, eq=False)
class FusedCuda:
    """A model's weights, laid together. Used by one thread."""

    layers: tuple[Layer, ...]
    embedding: torch.Tensor
    norm: torch.Tensor
    head: torch.Tensor
    cosines: torch.Tensor  # [positions, head_dim] float32
    sines: torch.Tensor
    query_heads: int
    head_dim: int
    epsilon: float
    scaling: float

    @classmethod
    def of(cls, model: Any) -> FusedCuda | None:
        """Of a transformers model. None for another family, or parameters that it does not know."""
        found = recognise(model)
        if found is None:
            return None
        attention = model.model.layers[0].self_attn
        device = found.weights[EMBEDDING].device
        positions = torch.arange(model.config.max_position_embeddings, device=device)[None]
        with torch.inference_mode():
            turns = model.model.rotary_emb(torch.zeros(1, 1, 1, device=device), positions)
        layers = []
        for prefix in found.layers:
            before, after = found.of_layer(prefix, NORMS)
            query_norm, key_norm = (
                found.of_layer(prefix, HEAD_NORMS) if found.normed else (None, None)
            )
            layers.append(
                Layer(
                    before=before,
                    projections=together(model, prefix, PROJECTIONS),
                    biases=together(model, prefix, BIASES) if found.biased else None,
                    head_norms=None
                    if query_norm is None or key_norm is None
                    else (query_norm, key_norm),
                    out=found.weights[prefix + OUT],
                    after=after,
                    gate_and_up=together(model, prefix, GATE_AND_UP),
                    down=found.weights[prefix + DOWN],
                )
            )
        return cls(
            layers=tuple(layers),
            embedding=found.weights[EMBEDDING],
            norm=found.weights[LAST_NORM],
            head=found.weights[HEAD],
            cosines=turns[0][0].contiguous(),
            sines=turns[1][0].contiguous(),
            query_heads=model.config.num_attention_heads,
            head_dim=attention.head_dim,
            epsilon=float(model.config.rms_norm_eps),
            scaling=float(attention.scaling),
        )

    def run(self, batch: Batch, arena: Arena) -> torch.Tensor:
        """As `Runner.run`, for a batch of any size, launch by launch."""
        device = arena.device
        slots = batch.slots(arena.geometry.block_tokens)
        numbers = torch.tensor(
            [list(batch.tokens), list(batch.positions), slots], dtype=torch.int32, device=device
        )
        rows = torch.tensor(batch.wanted, dtype=torch.long, device=device)
        return self.forward(Inputs(*numbers), arena, PagedForward(batch, arena).read, rows)

    def forward(
        self, inputs: Inputs, arena: Arena, attend: Attend, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits of some rows, or of all: [rows, vocabulary] in float32."""
        from engine import kernels_cuda as kernels

        hidden = embedding(inputs.tokens, self.embedding)
        delta: torch.Tensor | None = None
        for index, layer in enumerate(self.layers):
            normed = kernels.add_and_norm(hidden, delta, layer.before, self.epsilon)
            fused = _product(normed, layer.projections, layer.biases)
            query = normed.new_empty(len(normed), self.query_heads, self.head_dim)
            kernels.place(
                fused,
                arena,
                index,
                slots=inputs.slots,
                positions=inputs.positions,
                cosines=self.cosines,
                sines=self.sines,
                norms=layer.head_norms,
                epsilon=self.epsilon,
                query=query,
            )
            delta = _product(attend(index, query, self.scaling).flatten(1), layer.out)
            normed = kernels.add_and_norm(hidden, delta, layer.after, self.epsilon)
            delta = _product(_gated(normed, layer.gate_and_up), layer.down)
        normed = kernels.add_and_norm(hidden, delta, self.norm, self.epsilon)
        wanted = normed if rows is None else normed[rows]
        if len(wanted) == 1:
            return kernels.multiply_row(wanted, self.head, dtype=torch.float32)
        return linear(wanted, self.head).float()


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    from engine import kernels_cuda as kernels

    if len(x) == 1:
        return kernels.multiply_row(x, weight, bias=bias)
    return linear(x, weight, bias)


def _gated(x: torch.Tensor, gate_and_up: torch.Tensor) -> torch.Tensor:
    from engine import kernels_cuda as kernels

    if len(x) == 1:
        return kernels.multiply_row(x, gate_and_up, gated=True)
    return kernels.gate(linear(x, gate_and_up))
