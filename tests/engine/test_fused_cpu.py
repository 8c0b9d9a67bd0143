"""The fused forward is transformers', for the models that it takes."""

from __future__ import annotations

import gc
import itertools
import weakref
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import fused_cpu, kernels_cpu, paged_cpu
from engine.batch import Batch, Segment
from engine.fused_cpu import FusedModel, grouped
from engine.model import LoadSpec, UnsupportedModel, compare, load
from engine.prefill_cpu import multiplies_bfloat16
from engine.runner import Runner
from tests.engine.tiny import EXACT, TINY, save_tiny
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
                parameter += 0.25 * torch.randn(parameter.shape, generator=generator)
                assert "norm" in name or "bias" in name
    model.save_pretrained(directory)
    return load(
        LoadSpec(tmp_path, path=str(directory), device="cpu", block_tokens=4, threads=1, **EXACT)
    )


def logits(loaded, batches):
    """Of batches of (table, past, tokens) that run one after the other on one arena full of NaN.

    What has a past, or one token, is a decode: all of its logits are wanted.
    """
    arena = Arena(loaded.geometry, slots=12)
    arena.blocks.fill_(torch.nan)
    runner = Runner(loaded, arena)
    out = []
    for batch in batches:
        tokens, positions, segments = [], [], []
        for table, past, new in batch:
            wanted = len(new) if past else 1
            segments.append(Segment(len(tokens), len(new), past + len(new), table, wanted))
            tokens += new
            positions += range(past, past + len(new))
        out.append(runner.run(Batch(tokens, positions, segments)))
    return torch.cat(out)


BATCHES = [
    [((7, 3), 0, TOKENS)],
    [((7, 3, 9), 7, [11]), ((1, 0), 0, TOKENS[:3])],
    [((1, 0), 3, [12, 13]), ((7, 3, 9), 8, [14])],
    [((5, 4), 0, [15]), ((6, 8), 0, TOKENS[:5]), ((1, 0), 5, [16, 17])],
]


def test_every_family_that_is_served_here_is_taken(loaded):
    assert loaded.fused is not None
    assert set(loaded.fused.forms) == {"F32"}, "random float32 weights fit nothing smaller"


def test_its_logits_are_those_of_transformers(loaded):
    plain = logits(replace(loaded, fused=None), BATCHES)
    assert torch.allclose(logits(loaded, BATCHES), plain, rtol=1e-4, atol=1e-4 * plain.abs().max())


def test_a_decode_s_logits_are_the_same_to_the_bit_whoever_it_is_computed_with(loaded, monkeypatch):
    """Prompts beside it, other decodes, or so many that they take more than one pass."""
    together = logits(loaded, BATCHES)
    alone = [[one] for batch in BATCHES for one in batch]
    assert torch.equal(logits(loaded, alone), together)
    monkeypatch.setattr(fused_cpu, "MAX_TOKENS", 2)
    assert torch.equal(logits(loaded, BATCHES), together)


def test_decodes_are_grouped_in_their_order_so_many_tokens_a_pass():
    segments = [Segment(0, count, count, (), count) for count in (1, 2, 1, 5, 1, 1)]
    groups = [[each.count for each in group] for group in grouped(segments, 3)]
    assert groups == [[1, 2], [1], [5], [1, 1]]
    assert grouped([], 3) == []


def kv_after(loaded, wanted):
    """The arena after a prompt of seven tokens in two chunks, of the last of which so many logits were wanted."""
    arena = Arena(loaded.geometry, slots=4)
    arena.blocks.zero_()
    runner = Runner(loaded, arena)
    for begin, end, logits_of in ((0, 4, 0), (4, 7, wanted)):
        segment = Segment(0, end - begin, end, (2, 1), logits_of)
        runner.run(Batch(TOKENS[begin:end], range(begin, end), [segment]))
    return arena.blocks


def test_a_prompt_writes_the_same_kv_whether_its_logits_are_wanted_or_not(loaded):
    assert torch.equal(kv_after(loaded, 0), kv_after(loaded, 1))


def test_how_many_threads_do_it_changes_nothing_of_what_comes_out(loaded):
    """The shares are as many as torch has threads, whoever does them."""
    shares, able = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(2)
    try:
        out = []
        for count in (1, 2):
            paged_cpu.take(count)
            assert paged_cpu.threads() == 2
            out.append(logits(loaded, BATCHES))
            assert numba.get_num_threads() == count
        assert torch.equal(*out)
    finally:
        torch.set_num_threads(shares)
        paged_cpu.take(able)


def narrower(loaded, tmp_path, **dtypes):
    spec = LoadSpec(tmp_path, path=str(loaded.path), device="cpu", block_tokens=4, threads=1)
    return load(replace(spec, **EXACT | dtypes))


def test_kv_in_float16_is_the_rounding_of_what_float32_would_keep(loaded, tmp_path):
    """Of the first layer: behind it, everything has read rounded KV."""
    half = narrower(loaded, tmp_path, kv_dtype="float16")
    assert torch.equal(kv_after(half, 1)[:, 0], kv_after(loaded, 1)[:, 0].half())
    exact = logits(loaded, BATCHES)
    assert torch.allclose(logits(half, BATCHES), exact, rtol=0, atol=5e-3 * exact.abs().max())
    alone = [[one] for batch in BATCHES for one in batch]
    assert torch.equal(logits(half, alone), logits(half, BATCHES))


def test_transformers_and_our_passes_read_and_write_the_same_float16(loaded, tmp_path):
    half = narrower(loaded, tmp_path, kv_dtype="float16")
    plain = replace(half, fused=None)
    apart = kv_after(half, 1)[:, 0].float() - kv_after(plain, 1)[:, 0].float()
    assert apart.abs().max() <= 2**-10 * kv_after(plain, 1).abs().max()  # a rounding the other way
    exact = logits(plain, BATCHES)
    assert torch.allclose(logits(half, BATCHES), exact, rtol=0, atol=5e-3 * exact.abs().max())


def test_what_float16_cannot_hold_is_kept_as_its_largest_number(loaded, tmp_path):
    """An infinity in a key would make every later score of its sequence NaN."""
    directory = tmp_path / "large"
    model = AutoModelForCausalLM.from_pretrained(loaded.path)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight *= 1e7
    model.save_pretrained(directory)
    spec = LoadSpec(tmp_path, path=str(directory), device="cpu", block_tokens=4, threads=1)
    large = load(replace(spec, **EXACT))
    half = replace(large, geometry=replace(large.geometry, dtype_name="float16"))
    for each in (half, replace(half, fused=None)):
        assert kv_after(each, 1).abs().max() == 65504
        assert logits(each, BATCHES).isfinite().all()


def test_prompts_in_bfloat16_say_nearly_the_same_and_decodes_read_their_kv(loaded, tmp_path):
    rounded = narrower(loaded, tmp_path, prefill_dtype="bfloat16")
    exact, found = logits(loaded, BATCHES), logits(rounded, BATCHES)
    assert not torch.equal(found, exact)
    assert torch.allclose(found, exact, rtol=0, atol=0.05 * exact.abs().max())


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


def test_weights_that_no_pass_reads_leave_the_memory_with_the_model(loaded, tmp_path):
    rounded = narrower(loaded, tmp_path, prefill_dtype="bfloat16")
    runner = Runner(rounded, Arena(rounded.geometry, slots=4))
    products = weakref.ref(rounded.model.model.layers[0].mlp.down_proj.weight)
    assert products() is not None
    del rounded
    gc.collect()
    assert products() is None
    segment = Segment(0, 2, 2, (1,), logits=1)
    assert runner.run(Batch([5, 6], [0, 1], [segment])).isfinite().all()


def test_a_model_that_is_not_exactly_of_the_known_shape_is_left_to_transformers(loaded):
    model = loaded.model
    assert FusedModel.of(model, torch.float32) is not None
    model.config.hidden_act = "gelu"
    assert FusedModel.of(model, torch.float32) is None
    model.config.hidden_act = "silu"
    model.model.layers[1].self_attn.o_proj.bias = torch.nn.Parameter(torch.zeros(48))
    assert FusedModel.of(model, torch.float32) is None


def prompt_kv(loaded, tokens, cuts, slots):
    """The bits of one prompt's KV, computed in the chunks that end at `cuts`, on blocks of four tokens in these slots."""
    arena = Arena(loaded.geometry, slots=20)
    arena.blocks.fill_(torch.nan)
    runner = Runner(loaded, arena)
    for begin, end in itertools.pairwise((0, *cuts, len(tokens))):
        segment = Segment(0, end - begin, end, slots, 0)
        runner.run(Batch(tokens[begin:end], range(begin, end), [segment]))
    return arena.blocks[list(slots[: -(-len(tokens) // 4)])].view(torch.int16)


@pytest.mark.skipif(not multiplies_bfloat16(8), reason="no AVX512-BF16: prompts run in float32")
@pytest.mark.parametrize("cuts", [(1,), (17,), (32, 34), (5, 21, 22, 60), tuple(range(2, 70, 2))])
def test_a_prompt_in_bfloat16_has_the_same_kv_to_the_bit_however_it_is_cut(loaded, tmp_path, cuts):
    """What was evicted and is computed again is what it was; in other slots, too."""
    rounded = narrower(loaded, tmp_path, kv_dtype="float16", prefill_dtype="bfloat16")
    tokens = [7 * i % 90 + 3 for i in range(70)]
    slots = tuple(range(18))
    whole = prompt_kv(rounded, tokens, (), slots)
    assert torch.equal(prompt_kv(rounded, tokens, cuts, slots), whole)
    assert torch.equal(prompt_kv(rounded, tokens, cuts, slots[::-1]), whole)


@pytest.mark.skipif(not multiplies_bfloat16(8), reason="no AVX512-BF16: prompts run in float32")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("rows", "columns"), [(48, 24), (72, 48), (8, 576)])
def test_products_of_prompts_in_bfloat16_are_the_textbook_s_whoever_is_beside(
    rows, columns, threads
):
    torch.manual_seed(rows)
    weight, x = torch.randn(rows, columns).bfloat16(), torch.randn(21, columns)
    matrix = kernels_cpu.in_pairs(weight.view(torch.uint16).numpy())

    def product(x):
        tokens = -(-len(x) // kernels_cpu.AT_ONCE) * kernels_cpu.AT_ONCE
        words = np.full(tokens * columns // 2, 0x7FC07FC0, np.uint32)  # NaN
        out = np.full((tokens, matrix.shape[0] * kernels_cpu.LANES), np.nan, np.float32)
        kernels_cpu.multiply_prompt(matrix, x.numpy(), words, out, threads)
        assert not out[len(x) :].any()
        assert not out[:, rows:].any()
        return torch.from_numpy(out[: len(x), :rows])

    whole = product(x)
    exact = x.bfloat16().double() @ weight.double().T
    assert torch.allclose(whole.double(), exact, rtol=0, atol=1e-5 * columns**0.5)
    for begin, end in ((0, 1), (3, 4), (1, 21), (5, 13), (13, 21)):
        assert torch.equal(product(x[begin:end]), whole[begin:end])


@pytest.mark.skipif(not multiplies_bfloat16(8), reason="no AVX512-BF16: prompts run in float32")
@pytest.mark.parametrize(("past", "count"), [(0, 1), (0, 70), (37, 5), (64, 33), (130, 20)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("longer", [0, 70])
def test_attention_of_prompts_in_bfloat16_is_the_textbook_s(past, count, dtype, longer):
    torch.manual_seed(past + count)
    kv_heads, group, size, block_tokens, context = 2, 3, 24, 8, past + count
    used = -(-context // block_tokens)
    blocks = torch.full((used + 2, 3, 2, kv_heads, block_tokens, size), torch.nan, dtype=dtype)
    table = torch.randperm(used + 2)[:used]
    kv = torch.randn(2, kv_heads, context, size).bfloat16().to(dtype)
    for token in range(context):
        row = blocks[table[token // block_tokens], 1, :, :, token % block_tokens]
        row.copy_(kv[:, :, token])
    query = torch.randn(count, kv_heads * group, size)
    out = torch.full_like(query, torch.nan)
    pairs = np.full(
        kernels_cpu.pairs_of(context + longer, kv_heads, size), 0x7FC07FC0, np.uint32
    )  # NaN
    kernels_cpu.attend_prompt(
        query.numpy(), paged_cpu.in_numpy(blocks), 1, table.numpy(), context, np.float32(0.3),
        pairs, out.numpy(), 2,
    )  # fmt: skip
    mask = torch.full((count, context), -torch.inf).triu(past + 1)
    asked, (keys, values) = query.transpose(0, 1)[None], kv.float()
    exact = torch.nn.functional.scaled_dot_product_attention(
        asked, keys[None], values[None], attn_mask=mask, scale=0.3, enable_gqa=True
    )
    assert torch.allclose(out, exact[0].transpose(0, 1), rtol=0, atol=0.02)
