"""The fused forward is transformers', for the models that it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import fused_cpu
from engine.batch import Batch, Segment
from engine.fused_cpu import FusedModel
from engine.model import LoadSpec, UnsupportedModel, compare, load
from engine.runner import Runner
from tests.engine.tiny import TINY, save_tiny
from tiers.arena import Arena

TOKENS = [5, 9, 2, 31, 77, 8, 40]


@pytest.fixture(params=sorted(TINY))
def loaded(request, tmp_path):
    """A tiny model whose every parameter is random: fresh models have biases of 0 and norms of 1, which hide mistakes."""
    directory = save_tiny(TINY[request.param], tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
                assert "norm" in name or "bias" in name
    model.save_pretrained(directory)
    return load(LoadSpec(tmp_path, path=str(directory), device="cpu", block_tokens=4, threads=1))


def logits(loaded, batches):
    """Of batches of (table, past, tokens) that run one after the other on one arena full of NaN."""
    arena = Arena(loaded.geometry, slots=12)
    arena.blocks.fill_(torch.nan)
    runner = Runner(loaded, arena)
    out = []
    for batch in batches:
        tokens, positions, segments = [], [], []
        for table, past, new in batch:
            segments.append(Segment(len(tokens), len(new), past + len(new), table, logits=1))
            tokens += new
            positions += range(past, past + len(new))
        out.append(runner.run(Batch(tokens, positions, segments)))
    return torch.cat(out)


BATCHES = [
    [((7, 3), 0, TOKENS)],
    [((7, 3, 9), 7, [11]), ((1, 0), 0, TOKENS[:3])],
    [((1, 0), 3, [12, 13]), ((7, 3, 9), 8, [14])],
]


def test_every_family_that_is_served_here_is_taken(loaded):
    assert loaded.fused is not None
    assert set(loaded.fused.forms) == {"F32"}, "random float32 weights fit nothing smaller"


def test_its_logits_are_those_of_transformers(loaded):
    plain = logits(replace(loaded, fused=None), BATCHES)
    assert torch.allclose(logits(loaded, BATCHES), plain, rtol=1e-4, atol=1e-4 * plain.abs().max())


def test_each_goes_on_from_the_other_s_kv(loaded, monkeypatch):
    """A prefill of many tokens goes through transformers, the decode after it does not."""
    whole = logits(loaded, BATCHES)
    monkeypatch.setattr(fused_cpu, "MAX_TOKENS", 3)
    assert torch.allclose(logits(loaded, BATCHES), whole, rtol=1e-4, atol=1e-4 * whole.abs().max())


def test_a_token_s_logits_are_the_same_to_the_bit_whoever_it_is_computed_with(loaded):
    alone = [[batch] for together in BATCHES for batch in together]
    assert torch.equal(logits(loaded, alone), logits(loaded, BATCHES))


def test_a_step_that_samples_nothing_gives_no_logits(loaded):
    arena = Arena(loaded.geometry, slots=4)
    segment = Segment(0, 2, 2, (1,), logits=0)
    found = Runner(loaded, arena).run(Batch([5, 6], [0, 1], [segment]))
    assert found.shape == (0, loaded.vocab_size)


def test_a_wrong_weight_in_it_is_refused_at_load(loaded):
    net = loaded.fused.net
    net.norms[2, 0] += 1
    with pytest.raises(UnsupportedModel, match="differ"):
        compare(loaded)


def test_a_model_that_is_not_exactly_of_the_known_shape_is_left_to_transformers(loaded):
    model = loaded.model
    assert FusedModel.of(model) is not None
    model.config.hidden_act = "gelu"
    assert FusedModel.of(model) is None
    model.config.hidden_act = "silu"
    model.model.layers[1].self_attn.o_proj.bias = torch.nn.Parameter(torch.zeros(48))
    assert FusedModel.of(model) is None
