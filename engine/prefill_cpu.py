"""A forward pass of many tokens on the CPU: what prompts are computed with, where the model is of the Llama family.

transformers' forward is some 25 small operations a layer beside its products and attention, each over a batch that no longer
fits the cache. Here a layer is four products (queries, keys and values are one, gate and up another), attention, and four
small kernels. In float32 products and attention are torch's. In bfloat16, which rounds what goes into a product to eight bits
and is twice as fast, they are ours where the processor has AVX512-BF16 (`kernels_cpu.multiply_prompt`, `attend_prompt`), and
torch's elsewhere. Sums, norms and the logits are float32 always.

Measured 2026-11 on two cores (AMD EPYC with AVX512-BF16), the default model. 4,053 tokens by chunks of 512, three runs each, load
1.5: transformers' forward 9.9 s, this in float32 9.4 s, in bfloat16 with torch's products 6.7 s with torch's attention and 5.2 s
with ours. Then our products against torch's (oneDNN, which lays a weight out anew in every call), by turns, medians of nine, ms,
load 1.4:

    tokens, behind     15, 4,064    200, 3,853    512, 2,048
    torch's            59, 91       403, 431      700, 760
    ours               43, 45       346, 339      641, 612

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

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import linear

from engine import kernels_cpu, paged_cpu
from engine.attention import PagedForward
from engine.family import DOWN, GATE_AND_UP, OUT, PROJECTIONS, Family, together

if TYPE_CHECKING:
    from engine.batch import Batch
    from engine.kernels_cpu import Net
    from tiers.arena import Arena


# [tokens, inputs] in, [tokens, outputs or more] out, both float32 and contiguous.
Product = Callable[[torch.Tensor], torch.Tensor]


def multiplies_bfloat16(*sizes: int) -> bool:
    """Whether our products and attention in bfloat16 run here, for a model of such sizes."""
    fit = all(size % kernels_cpu.AT_ONCE == 0 for size in sizes)
    return fit and kernels_cpu.processor_has("avx512bf16")


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    projections: Product  # queries, keys, values
    out: Product
    gate_and_up: Product
    down: Product
    inner: int  # outputs of gate, and of up


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """A model's weights for many tokens at once. Used by one thread."""

    layers: tuple[Layer, ...]
    in_pairs: bool  # of bfloat16, by our own kernels

    @classmethod
    def of(cls, model: Any, found: Family, dtype: torch.dtype) -> Prefill:
        config = model.config
        head_dim = model.model.layers[0].self_attn.head_dim
        in_pairs = dtype is torch.bfloat16 and multiplies_bfloat16(
            config.hidden_size, config.intermediate_size, head_dim
        )

        def product(prefix: str, *names: str) -> Product:
            if dtype is torch.float32 and len(names) > 1:
                return _by_torch(together(model, prefix, names))
            weight = torch.cat([weight.to(dtype) for weight in found.of_layer(prefix, names)])
            return _in_pairs(weight) if in_pairs else _by_torch(weight)

        layers = tuple(
            Layer(
                projections=product(prefix, *PROJECTIONS),
                out=product(prefix, OUT),
                gate_and_up=product(prefix, *GATE_AND_UP),
                down=product(prefix, DOWN),
                inner=config.intermediate_size,
            )
            for prefix in found.layers
        )
        return cls(layers, in_pairs)

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
            mixed = layer.projections(normalised(2 * index)).numpy()
            kernels_cpu.place(net, index, mixed, positions, slots, rows, blocks, query.numpy())
            last = index == len(self.layers) - 1
            if last and not len(wanted):
                break
            attended = attend(index).flatten(1)
            if last:  # the others' KV is written, and nobody asks for more of them
                attended, state = attended[wanted], state[wanted]
            change = layer.out(attended).numpy()
            both = layer.gate_and_up(normalised(2 * index + 1))
            active = torch.empty(len(both), layer.inner)
            kernels_cpu.gate(both.numpy(), active.numpy(), paged_cpu.threads())
            change = layer.down(active).numpy()
        return normalised(2 * len(self.layers)).numpy()[: len(wanted)]

    def _attention(
        self, batch: Batch, arena: Arena, query: torch.Tensor, scaling: float
    ) -> Callable[[int], torch.Tensor]:
        """Of a layer whose queries and KV are there."""
        if not self.in_pairs:
            paged = PagedForward(batch, arena)
            return lambda layer: paged.read(layer, query, scaling)
        blocks, threads = paged_cpu.in_numpy(arena.blocks), paged_cpu.threads()
        out = torch.empty_like(query)
        shape = arena.geometry
        size, longest = shape.block_tokens, max(each.context for each in batch.segments)
        pairs = np.empty(
            kernels_cpu.pairs_of(longest, shape.kv_heads, shape.head_dim), np.uint32
        )  # for all layers
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
                    asked, blocks, layer, table, context, np.float32(scaling), pairs, answered,
                    threads,
                )  # fmt: skip
            return out

        return attend


def _by_torch(weight: torch.Tensor) -> Product:
    """With a matrix [outputs, inputs], in its own dtype."""
    return lambda x: linear(x.to(weight.dtype), weight).float()


def _in_pairs(weight: torch.Tensor) -> Product:
    """With a matrix [outputs, inputs] of bfloat16."""
    matrix = kernels_cpu.in_pairs(weight.view(torch.uint16).numpy())
    groups, pairs, lanes = matrix.shape

    def product(x: torch.Tensor) -> torch.Tensor:
        padded = -(-len(x) // kernels_cpu.AT_ONCE) * kernels_cpu.AT_ONCE
        out = torch.empty(padded, groups * lanes)
        words = np.empty(padded * pairs, np.uint32)
        kernels_cpu.multiply_prompt(matrix, x.numpy(), words, out.numpy(), paged_cpu.threads())
        return out[: len(x)]

    return product
