"""Tiny random models of several families."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

if TYPE_CHECKING:
    from pathlib import Path

# Small enough to run in a millisecond, weights wide enough (initializer_range) that no choice is a tie.
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TINY: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE | {"num_key_value_heads": 3}),
    "mistral": MistralConfig(**SHAPE | {"num_key_value_heads": 6}, sliding_window=None),
}


# For `LoadSpec`, where results are held against transformers': nothing on the CPU is rounded to 16 bits.
EXACT = {"kv_dtype": "float32", "prefill_dtype": "float32"}


def save_tiny(config: PretrainedConfig, directory: Path, seed: int = 7) -> Path:
    """A random model of this config as a transformers directory."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory
