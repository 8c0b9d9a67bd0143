"""A forward pass of many tokens on the CPU: what prompts are computed with, where the model is of the Llama family.

Products and attention are torch's, which run near what the processor can do; the rest of transformers' forward is some 25
small operations a layer, each over a batch that no longer fits the cache. Here a layer is four products (queries, keys and
values are one, gate and up another), attention, and three small kernels.

Measured 2026-11 on two cores (AMD EPYC with AVX512-BF16, load 1.5), the default model, 4,053 tokens by chunks of 512, three runs
each: transformers' forward 9.9 s, this in float32 9.4 s, in bfloat16 6.7 s with torch's attention and 5.2 s with ours
(`kernels_cpu.attend_prompt`). 200 tokens behind 3,853: 0.74, 0.69, 0.55 and 0.42 s.

Products are made in `dtype`: float32, or bfloat16, which is twice as fast on processors that multiply it, and rounds what
goes into a product and what comes out to eight bits; with AVX512-BF16 attention is made of such products, too. Sums, norms
and the logits are float32 always.

Laws
    In float32 it computes what transformers computes, in another order of sums: `engine.model.compare` holds one against
    the other at every load.
    KV that it wrote is engine/fused_cpu.py's to read, and the other way round.
    In bfloat16, with AVX512-BF16, a prompt's KV and logits are the same to the bit however it is cut into chunks, whatever it is
    batched with and wherever its blocks are: every product and sum is of one token's own, in one order. (A chunk of the last
    token alone is a decode.)
    Nothing here is a view of the model's own parameters, which are the mapped file: with the model it goes, and what is left
    in memory is a weight once in each dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import linear, silu

from engine import kernels_cpu, paged_cpu
from engine.attention import PagedForward
from engine.family import DOWN, GATE_AND_UP, OUT, PROJECTIONS, Family, together

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.batch import Batch
    from engine.kernels_cpu import Net
    from tiers.arena import Arena


def multiplies_bfloat16(head_dim: int) -> bool:
    """Whether `kernels_cpu.attend_prompt` runs here, for such heads."""
    return kernels_cpu.processor_has("avx512bf16") and head_dim % kernels_cpu.AT_ONCE == 0


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """[outputs, inputs] each."""

    projections: torch.Tensor  # queries, keys, values
    out: torch.Tensor
    gate_and_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """A model's weights for many tokens at once. Used by one thread."""

    layers: tuple[Layer, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Any, found: Family, dtype: torch.dtype) -> Prefill:
        def laid(prefix: str, names: tuple[str, ...]) -> torch.Tensor:
            if dtype is torch.float32:
                return together(model, prefix, names)
            return torch.cat([weight.to(dtype) for weight in found.of_layer(prefix, names)])

        layers = tuple(
            Layer(
                projections=laid(prefix, PROJECTIONS),
                out=found.weights[prefix + OUT].to(dtype, copy=True),
                gate_and_up=laid(prefix, GATE_AND_UP),
                down=found.weights[prefix + DOWN].to(dtype, copy=True),
            )
            for prefix in found.layers
        )
        return cls(layers, dtype)

    def run(self, net: Net, batch: Batch, arena: Arena) -> np.ndarray[Any, Any]:
        """Write these tokens' KV, and give the last states, normalised, of those whose logits are wanted: [wanted, hidden]."""
        size, head_dim = arena.geometry.block_tokens, arena.geometry.head_dim
        positions = np.array(batch.positions, np.int64)
        slots, rows = np.array(batch.slots(size), np.int64), positions % size
        wanted = np.array(batch.wanted, np.int64)
        blocks = paged_cpu.in_numpy(arena.blocks)
        state = net.embedding[np.array(batch.tokens, np.int64)]  # [tokens, hidden]
        change = np.empty((0, state.shape[1]), np.float32)
        query = torch.empty(len(state), net.query_heads, head_dim)

        attend = self._attention(batch, arena, query, net.scaling)

        def normalised(norm: int) -> torch.Tensor:
            out = torch.empty(state.shape)
            kernels_cpu.add_and_norm(state, change, net.norms[norm], net.epsilon, out.numpy())
            return out

        for index, layer in enumerate(self.layers):
            mixed = _floats(self._product(normalised(2 * index), layer.projections))
            kernels_cpu.place(net, index, mixed, positions, slots, rows, blocks, query.numpy())
            last = index == len(self.layers) - 1
            if last and not len(wanted):
                break
            attended = attend(index).flatten(1)
            if last:  # the others' KV is written, and nobody asks for more of them
                attended, state = attended[wanted], state[wanted]
            change = _floats(self._product(attended, layer.out))
            both = self._product(normalised(2 * index + 1), layer.gate_and_up)
            gate, up = both.chunk(2, dim=1)
            change = _floats(self._product(silu(gate).mul_(up), layer.down))
        return normalised(2 * len(self.layers)).numpy()[: len(wanted)]

    def _attention(
        self, batch: Batch, arena: Arena, query: torch.Tensor, scaling: float
    ) -> Callable[[int], torch.Tensor]:
        """Of a layer whose queries and KV are there."""
        if not (self.dtype is torch.bfloat16 and multiplies_bfloat16(arena.geometry.head_dim)):
            paged = PagedForward(batch, arena)
            return lambda layer: paged.read(layer, query, scaling)
        blocks, threads = paged_cpu.in_numpy(arena.blocks), paged_cpu.threads()
        out = torch.empty_like(query)
        size = arena.geometry.block_tokens
        parts = [
            (
                query[run].numpy(),
                np.array(segment.table[: -(-segment.context // size)], np.int64),
                segment.context,
                out[run].numpy(),
            )
            for segment in batch.segments
            for run in (slice(segment.start, segment.start + segment.count),)
        ]

        def attend(layer: int) -> torch.Tensor:
            for asked, table, context, answered in parts:
                kernels_cpu.attend_prompt(
                    asked, blocks, layer, table, context, np.float32(scaling), answered, threads
                )
            return out

        return attend

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear(x.to(self.dtype), weight)


def _floats(x: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = x.float().numpy()
    return array
