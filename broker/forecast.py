"""What a configuration will hold, before anything is loaded: bytes to tokens to days, and what looks like a mistake.

Laws
    Reads a model's `config.json` and asks the file system for its free space; loads no model and no torch.
    Everything that is assumed is said: which model, which element type, which day.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.config import GIB, KIB, MIB, TIB
from broker.machine import file_system, memory
from tiers.record import head_size
from tiers.store import record_bytes_on_disk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from broker.config import Config

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DEFAULT_STEM = "SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a token's KV is made of. The defaults are the embedded model's."""

    name: str = _DEFAULT_STEM
    layers: int = 30
    kv_heads: int = 3
    head_dim: int = 64
    context: int = 8192

    def token_bytes(self, element_bytes: float) -> float:
        return self.layers * 2 * self.kv_heads * self.head_dim * element_bytes


@dataclass(frozen=True, slots=True)
class Mix:
    """The day that `days` are counted in: one coding agent, kept busy.

    New tokens alone: what an agent sends again is found again and takes no more room.
    """

    sessions: int = 1  # a day
    turns: int = 100  # of a session
    turn_tokens: int = 1300  # new in a turn, the median of coding agents

    @property
    def day_tokens(self) -> int:
        return self.sessions * self.turns * self.turn_tokens


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is. None: not known."""

    free_bytes: int | None = (
        None  # on the state directory's file system, what the store has already included
    )
    memory_bytes: int | None = None
    cuda: bool = False


def forecast(
    config: Config, shape: Shape | None, machine: Machine, mix: Mix | None = None
) -> list[str]:
    """Lines for an operator: what is held, then warnings."""
    known, mix = shape or Shape(), mix or Mix()
    dtype = kv_dtype_of(config, machine)
    token = known.token_bytes(ELEMENT_BYTES[dtype])
    tiers = config.tiers
    device, host, disk = _capacities(config, known, machine)
    told = f"{known.name}: {in_bytes(token)} of KV a token in {dtype}, context {known.context:,} tokens"
    lines = [told if shape else f"the model is not here yet, so the figures are those of {told}"]
    lines.append(
        f"device {in_bytes(tiers.device.capacity)} = {device:,} tokens"
        f" = {device / known.context:.1f} full contexts"
    )
    lines.append(
        f"host {in_bytes(tiers.host.capacity)} = {host:,} tokens, after {in_time(tiers.host.after)} idle;"
        f" pins may cover {int(host * tiers.pins):,}"
        if host
        else "host off"
    )
    lines.append(
        f"disk {in_bytes(tiers.disk.capacity)} = {disk:,} tokens = {disk / mix.day_tokens:.1f} days at the default mix,"
        f" after {in_time(tiers.disk.after)} idle; what is acknowledged survives"
        f" {'a power loss' if tiers.disk.durability == 'power' else 'kill -9, not a power loss'}"
        if disk
        else "disk off"
    )
    lines.append(
        f"a day at the default mix: {mix.sessions} session of {mix.turns} turns,"
        f" {mix.turn_tokens:,} new tokens each = {mix.day_tokens:,} tokens"
    )
    unasked = f"for {in_time(tiers.ttl_default)}" if tiers.ttl_default else "not at all"
    lines.append(
        f"KV is protected for up to {in_time(tiers.ttl_max)} where a client asks for it, else {unasked}"
    )
    lines += [f"warning: {one}" for one in warnings(config, shape, machine)]
    return lines


def _capacities(config: Config, shape: Shape, machine: Machine) -> tuple[int, int, int]:
    """Tokens of the device, the host and the disk tier."""
    tiers, block_tokens = config.tiers, config.engine.block_tokens
    dtype = kv_dtype_of(config, machine)
    block_bytes = int(shape.token_bytes(ELEMENT_BYTES[dtype]) * block_tokens)
    return (
        _whole(tiers.device.capacity, block_bytes, block_tokens),
        _whole(tiers.host.capacity, block_bytes, block_tokens),
        _whole(tiers.disk.capacity, _record_bytes(config, shape, dtype), block_tokens),
    )


def warnings(config: Config, shape: Shape | None, machine: Machine) -> Iterator[str]:
    """What looks like a mistake."""
    tiers, shape = config.tiers, shape or Shape()
    device, host, disk = _capacities(config, shape, machine)
    if device < shape.context:
        yield (
            f"the device tier holds {device:,} tokens, less than one full context of {shape.context:,}:"
            " longer prompts are refused"
        )
    if 0 < host < device:
        yield "the host tier is smaller than the device tier: a full device does not fit when it idles"
    if not host:
        yield "without a host tier every session that idles comes back from disk"
    if not disk:
        yield "without a disk tier nothing survives a restart"
    if 0 < disk < host:
        yield "the disk tier is smaller than the host tier: a restart keeps less than memory held"
    if (
        machine.free_bytes is not None
        and tiers.disk.capacity + tiers.disk.min_free > machine.free_bytes
    ):
        room = max(0, machine.free_bytes - tiers.disk.min_free)
        yield (
            f"the file system has {in_bytes(machine.free_bytes)} for the disk tier, and tiers.disk.min_free of it stays"
            f" free: spilling will stop at {in_bytes(room)} of {in_bytes(tiers.disk.capacity)}"
        )
    if machine.memory_bytes is not None:
        in_memory = tiers.host.capacity + (0 if on_cuda(config, machine) else tiers.device.capacity)
        if in_memory > machine.memory_bytes * 3 // 4:
            yield (
                f"the tiers take {in_bytes(in_memory)} of {in_bytes(machine.memory_bytes)} of memory:"
                " too little is left for the model and the page cache"
            )
    if tiers.ttl_default > tiers.disk.after:
        yield (
            f"tiers.ttl_default ({in_time(tiers.ttl_default)}) is longer than tiers.disk.after"
            f" ({in_time(tiers.disk.after)}): from then on it protects what is on disk only"
        )
    if tiers.tenant_share < 1 and len(config.auth.keys) < 2:
        yield "tiers.tenant_share needs two keys in auth.keys: with one tenant it changes nothing"
    if tiers.disk.compact != "off":
        yield f"tiers.disk.compact = {tiers.disk.compact!r}: a restored session may not say what it would have said"
    if disk and not tiers.disk.scrub:
        yield "tiers.disk.scrub is 0: a damaged record is found only when it is needed"


def read_shape(config: Config) -> Shape | None:
    """The shape of the configured model, from its `config.json`; None where it is not here yet or says too little."""
    for path in _config_files(config):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return _shape((config.model.path and config.model.name) or path.parent.name, found)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def read_weights(config: Config, dtype: str) -> int | None:
    """Bytes of the configured model's weights in memory; None where its files are not here yet, or do not say."""
    for path in _config_files(config):
        weights = sum(file.stat().st_size for file in path.parent.glob("*.safetensors"))
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            stored = found.get("dtype") or found["torch_dtype"]
            return weights * ELEMENT_BYTES[dtype] // ELEMENT_BYTES[stored]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def look_around(config: Config) -> Machine:
    """What this machine has."""
    directory = config.server.state_dir
    store = directory / "kv" / "data.mdb"
    used = store.stat().st_blocks * 512 if store.is_file() else 0
    return Machine(
        free_bytes=file_system(directory).free_bytes + used,
        memory_bytes=memory().usable_bytes,
        cuda=Path("/proc/driver/nvidia/version").exists(),
    )


def _config_files(config: Config) -> Iterator[Path]:
    """Where the model's config may be, most likely first."""
    models = config.server.state_dir / "models"
    if config.model.path is None:
        yield from sorted(models.glob(f"{_DEFAULT_STEM}*/config.json"))
        return
    path = Path(config.model.path).expanduser()
    if path.suffix == ".gguf":
        yield from sorted(models.glob(f"{path.stem}-*/config.json"))
    elif path.is_dir():
        yield path / "config.json"
    else:  # a hub id, in the hub's own cache
        hub = Path.home() / ".cache" / "huggingface" / "hub"
        folder = "models--" + config.model.path.replace("/", "--")
        yield from sorted(hub.glob(f"{folder}/snapshots/*/config.json"))


def _shape(name: str, found: Any) -> Shape:
    """Raises KeyError or TypeError for a config that does not say."""
    heads = found["num_attention_heads"]
    return Shape(
        name=name,
        layers=int(found["num_hidden_layers"]),
        kv_heads=int(found.get("num_key_value_heads") or heads),
        head_dim=int(found.get("head_dim") or found["hidden_size"] // heads),
        context=int(found["max_position_embeddings"]),
    )


def on_cuda(config: Config, machine: Machine) -> bool:
    return machine.cuda if config.model.device == "auto" else config.model.device == "cuda"


def dtype_of(config: Config, machine: Machine) -> str:
    """Of the weights."""
    if config.model.dtype != "auto":
        return config.model.dtype
    return "bfloat16" if on_cuda(config, machine) else "float32"


def kv_dtype_of(config: Config, machine: Machine) -> str:
    if config.model.kv_dtype != "auto":
        return config.model.kv_dtype
    return dtype_of(config, machine) if on_cuda(config, machine) else "float16"


def _record_bytes(config: Config, shape: Shape, dtype: str) -> int:
    """One block on disk, in whole pages."""
    plain = float(ELEMENT_BYTES[dtype])
    stored = {
        "off": plain,
        "bf16": min(plain, 2.0),
        "int8": 1 + 2 / shape.head_dim,  # a scale for each head's row, as in tiers/codec.py
    }
    element = stored[config.tiers.disk.compact]
    block_tokens = config.engine.block_tokens
    payload = int(shape.token_bytes(element) * block_tokens)
    return record_bytes_on_disk(head_size(block_tokens) + payload)


def _whole(capacity: int, block_bytes: int, block_tokens: int) -> int:
    """The tokens of as many whole blocks as fit."""
    return capacity // block_bytes * block_tokens


def in_bytes(count: float) -> str:
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count:.0f} B"


def in_time(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:g} s"
