"""What a configuration will hold: arithmetic that an operator can check by hand, and what looks like a mistake."""

import json
import subprocess
import sys

import pytest

from broker.config import GIB, load
from broker.forecast import Machine, Mix, Shape, forecast, look_around, read_shape

LLAMA = Shape("llama", layers=32, kv_heads=8, head_dim=128, context=131072)
ROOM = Machine(free_bytes=1 << 50, memory_bytes=1 << 50)


def lines(*sets, shape=None, machine=ROOM):
    return forecast(load([], sets), shape, machine)


def warnings(*sets, shape=LLAMA, machine=ROOM):
    return [
        line.removeprefix("warning: ")
        for line in lines(*sets, shape=shape, machine=machine)
        if line.startswith("warning: ")
    ]


def test_the_default_configuration_is_told_in_tokens_and_days_and_warns_of_nothing():
    said = lines()
    assert said[0] == (
        "the model is not here yet, so the figures are those of SmolLM2-135M-Instruct:"
        " 22.5 KiB of KV a token in float16, context 8,192 tokens"
    )
    assert said[1] == "device 2 GiB = 93,184 tokens = 11.4 full contexts"
    assert said[2].startswith(
        "host 4 GiB = 186,400 tokens, after 5 min idle; pins may cover 46,600"
    )
    assert said[3].startswith("disk 40 GiB = ")
    tokens = int(said[3].split()[4].replace(",", ""))
    assert 1_850_000 < tokens < 1_864_128  # a record has a head, and ends on a page
    assert said[3].split()[7] == f"{tokens / 130_000:.1f}"
    assert "survives a power loss" in said[3]
    assert said[4] == (
        "a day at the default mix: 1 session of 100 turns, 1,300 new tokens each = 130,000 tokens"
    )
    assert not any(line.startswith("warning") for line in said)


def test_a_large_model_on_a_gpu_is_counted_in_its_own_bytes():
    machine = Machine(ROOM.free_bytes, ROOM.memory_bytes, cuda=True)
    said = lines("tiers.device.capacity=8GiB", shape=LLAMA, machine=machine)
    assert said[0] == "llama: 128 KiB of KV a token in bfloat16, context 131,072 tokens"
    assert said[1].startswith("device 8 GiB = 65,536 tokens = 0.5 full contexts")
    assert "256 KiB" in lines("model.dtype=float32", shape=LLAMA, machine=machine)[0]
    assert "float16" in lines("model.device=cpu", shape=LLAMA, machine=machine)[0]


def test_compact_records_hold_more_and_never_more_than_plain_ones_need():
    def disk_tokens(*sets, cuda=False):
        machine = Machine(cuda=cuda)
        return int(lines(*sets, shape=LLAMA, machine=machine)[3].split()[4].replace(",", ""))

    plain = disk_tokens("model.kv_dtype=float32")
    assert disk_tokens("tiers.disk.compact=bf16") / plain == pytest.approx(2, rel=0.01)
    assert disk_tokens("tiers.disk.compact=int8") / plain == pytest.approx(
        4 / (1 + 2 / 128), rel=0.01
    )
    assert disk_tokens("tiers.disk.compact=bf16", cuda=True) == disk_tokens(cuda=True)


def test_tiers_that_are_off_are_called_off():
    said = lines("tiers.host.capacity=0B", "tiers.disk.capacity=0B")
    assert said[2:4] == ["host off", "disk off"]


BIG = "tiers.device.capacity=100GiB"


@pytest.mark.parametrize(
    ("sets", "machine", "words"),
    [
        (["tiers.device.capacity=1GiB"], ROOM, ["less than one full context", "refused"]),
        ([BIG], ROOM, ["host tier is smaller than the device"]),
        ([BIG, "tiers.host.capacity=0B"], ROOM, ["without a host tier"]),
        ([BIG, "tiers.disk.capacity=0B"], ROOM, ["without a disk tier"]),
        ([BIG, "tiers.host.capacity=200GiB"], ROOM, ["disk tier is smaller than the host"]),
        ([BIG], Machine(free_bytes=20 * GIB), ["20 GiB", "stop at 19 GiB of 40 GiB"]),
        ([BIG], Machine(memory_bytes=128 * GIB), ["104 GiB of 128 GiB of memory"]),
        ([BIG, "tiers.ttl_default=2h"], ROOM, ["tiers.ttl_default (2 h)", "30 min"]),
        ([BIG, "tiers.tenant_share=0.5"], ROOM, ["tenant_share"]),
        ([BIG, "tiers.disk.compact=int8"], ROOM, ["int8", "may not say"]),
        ([BIG, "tiers.disk.scrub=0B"], ROOM, ["scrub"]),
    ],
)
def test_what_looks_like_a_mistake_is_said(sets, machine, words):
    assert any(all(word in one for word in words) for one in warnings(*sets, machine=machine))


def test_what_is_no_mistake_is_not():
    fine = [BIG, "tiers.host.capacity=200GiB", "tiers.disk.capacity=1TiB"]
    assert warnings(*fine) == []
    assert warnings(*fine, "tiers.tenant_share=0.5", "auth.keys=['a','b']") == []
    on_gpu = Machine(free_bytes=2 << 40, memory_bytes=300 * GIB, cuda=True)
    assert warnings(*fine, machine=on_gpu) == []


CONFIG = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
}


def test_the_shape_is_read_from_the_models_own_config(tmp_path):
    models = tmp_path / "state" / "models"
    default = load([], [f"server.state_dir={tmp_path / 'state'}"])
    assert read_shape(default) is None
    for folder in ("SmolLM2-135M-Instruct.Q4_1-abc-1", "other-abc-1"):
        (models / folder).mkdir(parents=True)
        (models / folder / "config.json").write_text(json.dumps(CONFIG))
    assert read_shape(default) == Shape("SmolLM2-135M-Instruct.Q4_1-abc-1", 32, 8, 128, 131072)
    for path in (models / "other-abc-1", tmp_path / "other.gguf"):
        named = load([], [f"server.state_dir={tmp_path / 'state'}", f"model.path={path}"])
        assert read_shape(named) == Shape("smollm2-135m-instruct", 32, 8, 128, 131072)
    (models / "other-abc-1" / "config.json").write_text(
        json.dumps(CONFIG | {"head_dim": 64, "num_key_value_heads": None})
    )
    assert read_shape(named) == Shape("smollm2-135m-instruct", 32, 32, 64, 131072)
    for nonsense in ("", "[]", "{}", '{"num_attention_heads": "x"}'):
        (models / "other-abc-1" / "config.json").write_text(nonsense)
        assert read_shape(named) is None


def test_the_machine_is_looked_at_where_the_state_will_be(tmp_path):
    config = load([], [f"server.state_dir={tmp_path / 'not' / 'yet'}"])
    machine = look_around(config)
    assert machine.free_bytes
    assert machine.memory_bytes
    (tmp_path / "not" / "yet" / "kv").mkdir(parents=True)
    (tmp_path / "not" / "yet" / "kv" / "data.mdb").write_bytes(bytes(1 << 20))
    assert look_around(config).free_bytes


def test_a_day_is_new_tokens_only():
    assert Mix(sessions=2, turns=3, turn_tokens=5).day_tokens == 30


def test_nothing_heavy_is_loaded_for_it(tmp_path):
    (tmp_path / "a.toml").write_text("")
    code = (
        "import sys; from broker.__main__ import main; main(['config', 'check', sys.argv[1]]);"
        "assert not {'torch', 'transformers', 'lmdb'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.toml")], check=True)
