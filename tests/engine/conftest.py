"""Models for the tests that need real tensors: tiny random ones, and the default model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.model import LoadedModel, LoadSpec, load
from tests.engine.tiny import EXACT, TINY, save_tiny


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
        LoadSpec(
            state_dir=state, path=str(directory), device="cpu", block_tokens=4, threads=1, **EXACT
        )
    )
    return ours, AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.fixture(scope="session")
def default_model(request: pytest.FixtureRequest) -> LoadedModel:
    """The real default model on the CPU; converted once per checkout, into the test cache."""
    state = Path(request.config.cache.mkdir("models"))
    return load(LoadSpec(state_dir=state, device="cpu", threads=1, **EXACT))
