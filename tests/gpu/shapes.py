"""Models of real shapes with random weights, ready to run; and batches for them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from engine import attention
from engine.batch import Batch, Segment
from engine.fused_cuda import FusedCuda
from engine.model import LoadedModel, probe

BLOCK_TOKENS = 32
# As published in the models' own config.json.
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    tie_word_embeddings=False,
)
QWEN_06B = Qwen3Config(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    tie_word_embeddings=True,
)


def loaded(config: PretrainedConfig, name: str, device: str, dtype: torch.dtype) -> LoadedModel:
    """As `engine.model.load` gives it, without files."""
    attention.register()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention.NAME
        )
    model = model.eval().requires_grad_(requires_grad=False)
    fused = FusedCuda.of(model)
    assert fused is not None
    return LoadedModel(
        model=model,
        name=name,
        path=Path(),
        geometry=probe(model, BLOCK_TOKENS, model.dtype),
        fingerprint=bytes(32),
        device=torch.device(device),
        dtype=dtype,
        prefill_dtype=dtype,
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
        stop_ids=frozenset(),
        fused=fused,
    )


def batch_of(tables: list[list[int]], runs: list[tuple[int, int]]) -> Batch:
    """`runs`: (past, count) of the sequence at each table."""
    tokens: list[int] = []
    positions: list[int] = []
    segments = []
    for table, (past, count) in zip(tables, runs, strict=True):
        segments.append(Segment(len(tokens), count, past + count, table, logits=1))
        tokens += [(7919 * at + 13) % 90 for at in range(past, past + count)]
        positions += range(past, past + count)
    return Batch(tokens, positions, segments)


def weight_bytes(loaded: LoadedModel) -> int:
    """What a decode reads of the weights: all but an embedding that is not the head's too."""
    parameters = list(loaded.model.parameters())  # a tied one once
    total = sum(each.numel() * each.element_size() for each in parameters)
    if loaded.model.config.tie_word_embeddings:
        return total
    embedding = loaded.model.get_input_embeddings().weight
    return total - embedding.numel() * embedding.element_size()


def prefill_flops(loaded: LoadedModel, tokens: int) -> float:
    """Products with the layers' weights, and attention's, of tokens without a past."""
    config = loaded.model.config
    layers = [
        p for name, p in loaded.model.named_parameters() if ".layers." in name and p.dim() == 2
    ]
    products = 2 * tokens * sum(each.numel() for each in layers)
    width = config.num_attention_heads * loaded.geometry.head_dim
    return products + 2 * config.num_hidden_layers * width * tokens * tokens
