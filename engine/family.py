"""Models of the Llama family, by their parameters: what a forward pass of our own may compute.

A model is recognised only if it has exactly the parameters that we know, so nothing that it computes is left out unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PROJECTIONS = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
OUT = "self_attn.o_proj.weight"
GATE_AND_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
DOWN = "mlp.down_proj.weight"
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
BIASES = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
EMBEDDING, LAST_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A recognised model's parameters by name; a layer's begin with its prefix."""

    weights: dict[str, torch.Tensor]
    layers: tuple[str, ...]  # prefixes
    biased: bool  # queries, keys and values
    normed: bool  # queries and keys, each head

    def of_layer(self, layer: str, names: tuple[str, ...]) -> list[torch.Tensor]:
        return [self.weights[layer + name] for name in names]


def recognise(model: Any) -> Family | None:
    """Of a transformers model."""
    config = model.config
    if config.model_type not in _FAMILIES or config.hidden_act != "silu":
        return None
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    layers = tuple(f"model.layers.{index}." for index in range(config.num_hidden_layers))
    biased, normed = layers[0] + BIASES[0] in weights, layers[0] + HEAD_NORMS[0] in weights
    names: tuple[str, ...] = (*PROJECTIONS, OUT, *GATE_AND_UP, DOWN, *NORMS)
    names += BIASES * biased + HEAD_NORMS * normed
    known = {layer + name for layer in layers for name in names}
    if weights.keys() != known | {EMBEDDING, LAST_NORM, HEAD}:
        return None
    return Family(weights, layers, biased, normed)


def together(model: Any, prefix: str, names: tuple[str, ...]) -> torch.Tensor:
    """Lay parameters end to end, and make each of them a view of its part."""
    parameters = [model.get_parameter(prefix + name) for name in names]
    whole = torch.cat([parameter.detach() for parameter in parameters])
    begin = 0
    for parameter in parameters:
        parameter.data = whole[begin : begin + len(parameter)]
        begin += len(parameter)
    return whole
