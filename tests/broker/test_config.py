"""The configuration loader: one message per mistake, and default.toml equal to the code."""

import hashlib
import tomllib
from pathlib import Path

import pytest

from broker.config import (
    Config,
    ConfigError,
    digest_as_written,
    duration,
    known_keys,
    load,
    merge,
    parse,
    size,
)

CONFIG = Path(__file__).parents[2] / "config"


def flat(tables, prefix=""):
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_default_toml_lists_every_key_once_and_in_order():
    written = list(flat(tomllib.loads((CONFIG / "default.toml").read_text())))
    assert written == list(known_keys())


def test_default_toml_equals_the_defaults_of_the_code():
    assert load([CONFIG / "default.toml"]) == Config()


def test_every_default_in_default_toml_has_its_reason():
    for line in (CONFIG / "default.toml").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            assert " # " in line, line


@pytest.mark.parametrize("overlay", ["large-gpu.toml", "example-team.toml"])
def test_overlays_load_alone(overlay):
    assert load([CONFIG / overlay]) != Config()


def test_later_files_and_assignments_win_key_by_key(tmp_path):
    (tmp_path / "a.toml").write_text('[tiers.host]\ncapacity = "1GiB"\nafter = "1m"\n')
    (tmp_path / "b.toml").write_text('[tiers.host]\nafter = "2m"\n')
    config = load(
        [tmp_path / "a.toml", tmp_path / "b.toml"], ["tiers.host.capacity=3GiB", "server.port=0"]
    )
    assert (config.tiers.host.capacity, config.tiers.host.after) == (3 << 30, 120.0)
    assert config.server.port == 0
    assert config.websocket == Config().websocket


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("tiers.host.capcity=4GiB", ["unknown key 'tiers.host.capcity'", "'tiers.host.capacity'"]),
        ("max_lag=1s", ["unknown key 'max_lag'", "'tiers.disk.max_lag'"]),
        ("sevrer.port=1", ["unknown key 'sevrer'", "'server'"]),
        ("zzzz=1", ["unknown key 'zzzz'"]),
        ("server=1", ["server is a section"]),
        ("tiers.host.capacity=4GB", ["tiers.host.capacity", '"4GiB"', "'4GB'"]),
        ("tiers.host.capacity=-1", ["tiers.host.capacity", "at least 0B"]),
        ("tiers.host.capacity=1.5", ["tiers.host.capacity", '"4GiB"']),
        ("tiers.host.after=soon", ["tiers.host.after", '"90s"']),
        ("tiers.host.after=nan", ["tiers.host.after", "at least 0s"]),
        ("tiers.host.after=2h", ["tiers.disk.after", "tiers.host.after"]),
        ("tiers.policy=lfu", ["tiers.policy", "session_lru, lru, slru"]),
        ("tiers.pins=0.6", ["tiers.pins", "between 0 and 0.5"]),
        ("tiers.pins=much", ["tiers.pins", "a number"]),
        ("tiers.canary=1.1", ["tiers.canary", "between 0 and 1"]),
        ("tiers.canary=true", ["tiers.canary", "a number"]),
        ("tiers.tenant_share=0", ["tiers.tenant_share", "between 0.01 and 1"]),
        ("tiers.probation=-1", ["tiers.probation", "true or false"]),
        ("tiers.device.high=1.01", ["tiers.device.high", "between 0.1 and 1"]),
        ("tiers.device.low=0.98", ["tiers.device.low", "tiers.device.high"]),
        ("tiers.host.low=1", ["tiers.host.low", "tiers.host.high"]),
        ("tiers.disk.high=0.5", ["tiers.disk.low", "tiers.disk.high"]),
        ("tiers.ttl_default=25h", ["tiers.ttl_default", "tiers.ttl_max"]),
        ("tiers.ttl_max=-1", ["tiers.ttl_max", "at least 0s"]),
        ("tiers.disk.durability=none", ["tiers.disk.durability", "power, process"]),
        ("tiers.disk.compact=fp4", ["tiers.disk.compact", "off, bf16, int8"]),
        ("tiers.disk.min_free=-1", ["tiers.disk.min_free", "at least 0B"]),
        ("tiers.disk.scrub=2GiB", ["tiers.disk.scrub", "between 0B and 1GiB"]),
        ("tiers.restore.deadline=0.5", ["tiers.restore.deadline", "between 1 and 1000"]),
        ("tiers.restore.max_loading=0", ["tiers.restore.max_loading", "between 1 and 1024"]),
        ("tiers.protect.burst=6m", ["tiers.protect", "tool_wait"]),
        ("tiers.protect.human_wait=1m", ["tiers.protect", "human_wait"]),
        ("server.port=70000", ["server.port", "between 0 and 65535"]),
        ("server.port='1'", ["server.port", "a whole number"]),
        ("server.port=true", ["server.port", "a whole number"]),
        ("server.host=", ["server.host", "a non-empty string"]),
        ("dev.echo=1", ["dev.echo", "true or false"]),
        ("engine.threads=0", ["engine.threads", "at least 1"]),
        ("engine.mixed_tokens=10000", ["engine.mixed_tokens", "engine.step_tokens"]),
        ("model.device=gpu", ["model.device", "auto, cpu, cuda"]),
        ("model.aliases=x", ["model.aliases", "a list of strings"]),
        ("model.aliases=[1]", ["model.aliases", "a non-empty string"]),
        ("model.aliases=['smollm2-135m-instruct']", ["model.aliases", "model.name"]),
        ("server.state_dir=1", ["server.state_dir", "a path"]),
        ("tiers.disk.max_lag=2h", ["tiers.disk.max_lag", "between 0s and 3600s"]),
        ("http.max_head=2MiB", ["http.max_head", "between 1KiB and 1MiB"]),
        ("no equals sign", ["key.path=value"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key_and_what_was_wanted(assignment, expected):
    with pytest.raises(ConfigError) as caught:
        load([], [assignment])
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_a_share_may_be_written_as_a_whole_number():
    config = load([], ["tiers.device.high=1", "tiers.canary=0", "tiers.restore.deadline=2"])
    assert (config.tiers.device.high, config.tiers.restore.deadline) == (1.0, 2.0)
    assert isinstance(config.tiers.canary, float)


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "mine.toml"
    for text, part in [
        ("[server]\nprot = 1", "'server.port'"),
        ("[server", "not valid TOML"),
        ("server = 3", "section"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"mine\.toml: ") as caught:
            load([path])
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        load([tmp_path / "absent.toml"])


def test_keys_become_digests_and_are_never_echoed():
    config = merge(Config(), parse("[auth]\nkeys = ['s3cret']", "x"), "x")
    assert config.auth.keys == (hashlib.sha256(b"s3cret").digest(),)
    assert "s3cret" not in repr(config)
    for wrong in ("keys = 's3cret'", "keys = ['s3cret', 1]", "keys = ['s3cret', ' ']"):
        with pytest.raises(ConfigError) as caught:
            merge(Config(), parse(f"[auth]\n{wrong}", "x"), "x")
        assert "s3cret" not in str(caught.value)


def test_a_key_may_be_written_as_its_digest_and_the_digest_is_no_key():
    written = digest_as_written("s3cret")
    config = merge(Config(), parse(f"[auth]\nkeys = ['{written}']", "x"), "x")
    assert config.auth.keys == (hashlib.sha256(b"s3cret").digest(),)
    assert config.auth.keys != (hashlib.sha256(written.encode()).digest(),)
    digits = written.removeprefix("sha256:")
    for wrong in ("sha256:", "sha256:s3cret", f"sha256:{digits[1:]}", f"sha256:{digits.upper()}"):
        with pytest.raises(ConfigError, match="64 hexadecimal digits") as caught:
            merge(Config(), parse(f"[auth]\nkeys = ['{wrong}']", "x"), "x")
        assert "s3cret" not in str(caught.value)


def test_auto_means_absent_where_a_key_may_be_absent():
    config = load([], ["model.path=auto", "engine.threads=auto"])
    assert (config.model.path, config.engine.threads) == (None, None)
    config = load([], ["model.path=/models/x", "engine.threads=3", "server.state_dir=~/x"])
    assert (config.model.path, config.engine.threads) == ("/models/x", 3)
    assert config.server.state_dir == Path.home() / "x"


def test_sizes_and_times():
    assert [size(one) for one in ("4GiB", "1.5 KiB", "0B", "7B", "2TiB")] == [
        4 << 30,
        1536,
        0,
        7,
        2 << 40,
    ]
    assert [size(one) for one in ("4", "4GB", "GiB", "-1B", "4gib", "1e3B")] == [None] * 6
    assert [duration(one) for one in ("250ms", "90s", "5m", "2h", "1d")] == [
        0.25,
        90,
        300,
        7200,
        86400,
    ]
    assert [duration(one) for one in ("5", "5 min", "s", "-1s")] == [None] * 4
