"""The gate of compact storage: real text, continued by the real model from KV that was on disk in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.model import LoadSpec, load
from engine.text import Text
from tests.engine.quality import DTYPES, Quality, measure, measure_dtypes

# Bounds are about four times what tiers/COMPACT.md reports, or two more changed choices than this window shows, so that other words in the
# README do not matter, and a scale in the wrong place does.
BOUNDS = {
    "bf16-v1": {"change": 0.001, "top1": 0.985, "divergence": 3e-5},
    "int8-row-v1": {"change": 0.005, "top1": 0.975, "divergence": 4e-4},
}
PREFIX, REST = 1856, 192


@pytest.fixture(scope="module")
def measured(default_model) -> dict[str, Quality]:
    """{scheme: quality} over 2,048 tokens of the README."""
    torch.set_num_threads(2)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    tokens = list(Text.from_dir(default_model.path).encode(readme))
    assert len(tokens) >= PREFIX + REST
    found = measure(default_model, tokens[: PREFIX + REST], PREFIX, ("off", "bf16", "int8"))
    return {one.scheme: one for one in found}


# Seen over four files (`make quality ARGS="--windows 1"`): 99.9 % and 98.9 % of all choices, all that were decided.
DTYPE_BOUNDS = {
    "KV float16, prompts float32": {"change": 0.001, "top1": 0.99, "divergence": 1e-5},
    "KV float16, prompts bfloat16": {"change": 0.005, "top1": 0.97, "divergence": 2e-3},
}


@pytest.fixture(scope="module")
def of_dtypes(default_model, request) -> dict[str, Quality]:
    torch.set_num_threads(2)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    tokens = list(Text.from_dir(default_model.path).encode(readme))[:1024]
    spec = LoadSpec(state_dir=Path(request.config.cache.mkdir("models")), device="cpu")
    others = [load(replace(spec, **dtypes)) for dtypes in DTYPES[1:]]
    return {one.scheme: one for one in measure_dtypes(default_model, others, tokens, 512)}


@pytest.mark.parametrize("scheme", DTYPE_BOUNDS)
def test_fewer_bits_keep_perplexity_and_choices(of_dtypes, scheme):
    one, bounds = of_dtypes[scheme], DTYPE_BOUNDS[scheme]
    assert one.tokens == 511
    assert abs(one.change) <= bounds["change"]
    assert one.top1 >= bounds["top1"]
    assert one.top1_decided >= 0.985
    assert 0 < one.divergence_per_token <= bounds["divergence"]


def test_storage_as_it_is_changes_nothing_at_all(measured):
    """The control: the same run on the same bytes, so every difference below is the codec's."""
    off = measured["exact"]
    assert (off.change, off.top1, off.divergence) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("scheme", BOUNDS)
def test_compact_storage_keeps_perplexity_and_choices(measured, scheme):
    one, bounds = measured[scheme], BOUNDS[scheme]
    assert one.tokens == REST - 1
    assert 1 < one.exact_perplexity < 500  # it does read the text: at random it would be 49,152
    assert abs(one.change) <= bounds["change"]
    assert one.top1 >= bounds["top1"]
    assert one.top1_decided >= 0.995
    assert 0 < one.divergence_per_token <= bounds["divergence"]  # not zero: it did go through
