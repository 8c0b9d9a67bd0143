"""Models for the tests that need real tensors: tiny random ones of several families, and the default model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from engine.model import LoadedModel, LoadSpec, load

# Small enough to run in a millisecond, wide enough in its weights (initializer_range) that greedy choices are not ties.
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


def save_tiny(config: PretrainedConfig, directory: Path, seed: int = 7) -> Path:
    """A random model of this config as a transformers directory."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from two, and on a busy machine two wait for each other at every layer."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{family: directory}"""
    root = tmp_path_factory.mktemp("tiny")
    return {family: save_tiny(config, root / family) for family, config in TINY.items()}


@pytest.fixture(scope="session", params=sorted(TINY))
def pair(
    request: pytest.FixtureRequest,
    tiny_dirs: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[LoadedModel, PreTrainedModel]:
    """One tiny model twice: as we load it, with blocks of four tokens, and as transformers does."""
    directory = tiny_dirs[request.param]
    state = tmp_path_factory.mktemp("state")
    ours = load(
        LoadSpec(state_dir=state, path=str(directory), device="cpu", block_tokens=4, threads=1)
    )
    return ours, AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.fixture(scope="session")
def default_model(request: pytest.FixtureRequest) -> LoadedModel:
    """The real default model on the CPU; converted once per checkout, into the test cache."""
    state = Path(request.config.cache.mkdir("models"))
    return load(LoadSpec(state_dir=state, device="cpu", threads=1))
