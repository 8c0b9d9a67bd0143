"""A whole forward pass of a few tokens on the CPU: what decodes run on, where the model is of the Llama family.

transformers' forward is some 400 small operations for each token, in Python, and reads every weight as float32. This one
is one compiled call that holds no GIL and reads weights as they were made (engine/packed_cpu.py). Batches of more than
`MAX_TOKENS` go through transformers, whose products for many tokens are better.

Measured 2026-11 on two cores (AMD EPYC, load 2.2), the default model, ms a step, this against transformers' forward:

    tokens of one sequence       1          2          4          8          16         32         64
    behind 256 tokens            11 : 70    9 : 100    13 : 92    22 : 106   40 : 111   75 : 148   133 : 206
    behind 4,000                 24 : 86    32 : 115   47 : 126   79 : 162   132 : 196  273 : 278  540 : 437
    sessions of one token each, behind 256: 1: 7 : 64    4: 15 : 108    8: 30 : 122    16: 52 : 144

Laws
    What it computes is what transformers computes, in another order of sums: `engine.model.compare` holds one against
    the other at every load, and a model that is not exactly of the known shape is not taken.
    KV that one of them wrote is the other's to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine import kernels_cpu, paged_cpu
from engine.kernels_cpu import LANES, Form, Net
from engine.packed_cpu import lay_out, pack

if TYPE_CHECKING:
    from engine.batch import Batch
    from tiers.arena import Arena

MAX_TOKENS = 32  # of a batch; see the table

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_LAYER = (
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
_BIASES = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


@dataclass(frozen=True, slots=True, eq=False)
class FusedModel:
    """A model's weights, packed. Used by one thread."""

    net: Net
    vocabulary: int
    forms: dict[str, int]  # {form: matrices}
    packed_bytes: int

    @classmethod
    def of(cls, model: Any) -> FusedModel | None:
        """Of a transformers model. None for one that `forward` does not compute: another family, or parameters that it does not know."""
        config = model.config
        if config.model_type not in _FAMILIES or config.hidden_act != "silu":
            return None
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        layers = [f"model.layers.{index}." for index in range(config.num_hidden_layers)]
        per_layer = list(_LAYER)
        for optional in (_BIASES, _HEAD_NORMS):
            if layers[0] + optional[0] in weights:
                per_layer += optional
        known = {layer + name for layer in layers for name in per_layer}
        known |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        if weights.keys() != known or any(w.dtype is not torch.float32 for w in weights.values()):
            return None
        query, key, value, out, gate, up, down, before, after = _LAYER
        of_layer = ((query, key, value), (out,), (gate, up), (down,))
        matrices = [
            pack(torch.cat([weights[layer + name] for name in names]))
            for layer in layers
            for names in of_layer
        ]
        matrices.append(pack(weights["lm_head.weight"]))
        norms = [weights[layer + name] for layer in layers for name in (before, after)]
        attention = model.model.layers[0].self_attn
        positions = torch.arange(config.max_position_embeddings)[None]
        with torch.inference_mode():
            cosines, sines = model.model.rotary_emb(torch.zeros(1, 1, 1), positions)
        heads = config.num_attention_heads

        def stacked(names: tuple[str, ...]) -> list[torch.Tensor]:
            return [weights[layer + name] for layer in layers for name in names]

        biased, normed = _BIASES[0] in per_layer, _HEAD_NORMS[0] in per_layer
        nothing = torch.empty(0, 0)
        net = Net(
            matrices=lay_out(matrices),
            embedding=weights["model.embed_tokens.weight"].numpy(),
            norms=torch.stack([*norms, weights["model.norm.weight"]]).numpy(),
            biases=(
                torch.cat(stacked(_BIASES)).reshape(len(layers), -1) if biased else nothing
            ).numpy(),
            head_norms=(torch.stack(stacked(_HEAD_NORMS)) if normed else nothing).numpy(),
            cosines=np.ascontiguousarray(cosines[0].numpy()),
            sines=np.ascontiguousarray(sines[0].numpy()),
            query_heads=heads,
            epsilon=float(config.rms_norm_eps),
            scaling=float(attention.scaling),
        )
        return cls(
            net=net,
            vocabulary=weights["lm_head.weight"].shape[0],
            forms={
                form.name: count
                for form in Form
                if (count := sum(matrix.form is form for matrix in matrices))
            },
            packed_bytes=sum(matrix.nbytes for matrix in matrices),
        )

    def run(self, batch: Batch, arena: Arena) -> torch.Tensor:
        """As `Runner.run`."""
        size = arena.geometry.block_tokens
        slots = [
            segment.table[position // size]
            for segment in batch.segments
            for position in range(segment.context - segment.count, segment.context)
        ]
        sampled = batch.wanted
        positions = np.array(batch.positions, np.int64)
        width = -(-self.vocabulary // LANES) * LANES
        logits = np.empty((len(sampled), width), np.float32)
        plan = paged_cpu.plan(batch.segments, size)
        kernels_cpu.forward(
            self.net,
            arena.blocks.numpy(),
            np.array(batch.tokens, np.int64),
            positions,
            np.array(slots, np.int64),
            positions % size,
            plan.tables,
            plan.starts,
            plan.counts,
            plan.contexts,
            np.array(sampled, np.int64),
            logits,
            paged_cpu.threads(),
        )
        return torch.from_numpy(logits)[:, : self.vocabulary]
