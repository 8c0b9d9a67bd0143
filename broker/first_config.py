"""The configuration that `homeport init` writes: what was found on a machine, as a commented file. Pure.

Laws
    Every size stands beside its arithmetic: bytes, bytes a token, tokens, sessions.
    Keys stand in the file as digests; this module never sees one.
    What was guessed is called so, and what is not known is said, not filled in.
    The file loads, and the daemon starts with it, on whatever machine: also where there is too little of everything.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.config import GIB, MIB, Config
from broker.forecast import ELEMENT_BYTES, Shape, in_bytes
from broker.machine import IN_MEMORY, NETWORK

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from broker.disk_rate import Rates
    from broker.machine import FileSystem, Memory, OpenFiles
    from engine.device import Devices

_SESSION_TOKENS = 32_768  # an agent's, where the model's context allows it
_DEFAULT_WEIGHTS = 540_000_000  # the embedded model's, in float32
_DAEMON_BYTES = GIB  # Python, torch, and what a forward needs beside weights and KV; guessed
_LARGE_GPU = 40 * GIB


@dataclass(frozen=True, slots=True)
class Found:
    """What is on this machine."""

    cores: int
    memory: Memory
    open_files: OpenFiles
    devices: Devices
    file_system: FileSystem  # of the state directory
    rates: Rates | None  # None: could not be measured
    shape: Shape | None  # of the chosen model; None: its files are not here yet
    weights_bytes: int | None  # None: as the embedded model's


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the operator said, and what was made for him."""

    state_dir: Path
    model_path: str | None
    key: str  # as a file may hold it: a digest
    operator_key: str
    version: str
    day: str


@dataclass(frozen=True, slots=True)
class Sizes:
    device: int
    host: int
    disk: int
    min_free: int


def fit(found: Found) -> Sizes:
    """Capacities in bytes. Each leaves room for what is beside it."""
    memory, gpu = found.memory, found.devices.gpu
    token = _token_bytes(found)
    least = int(token * Config().engine.block_tokens)
    available = memory.usable_bytes if memory.available_bytes is None else memory.available_bytes
    room = min(memory.usable_bytes * 3 // 4, available) - _DAEMON_BYTES
    if gpu is None:
        room -= _weights(found)
        most = int(token * _shape(found).context * Config().engine.max_running)
        device = min(room // 3, most)
    else:
        device = gpu.free_bytes - _weights(found) - max(2 * GIB, gpu.total_bytes // 16)
    device = _even(max(device, least))
    if gpu is None:
        room -= device
    host = _even(min(max(room, 0), 16 * device))
    free = found.file_system.free_bytes
    min_free = max(GIB, _even(found.file_system.total_bytes // 50))
    disk = _even(min(max(free - min_free, 0) * 2 // 3, 2048 * GIB))
    return Sizes(device, host, disk, min_free)


def config_text(found: Found, chosen: Chosen) -> str:
    return "\n".join([*_lines(found, chosen), ""])


def remarks(found: Found) -> Iterator[str]:
    """What the operator should know now, whatever the file says."""
    kind = found.file_system.kind
    if kind in NETWORK:
        yield f"the state directory is on {kind}, a file system that the store cannot rely on: choose a local disk"
    if kind in IN_MEMORY:
        yield f"the state directory is on {kind}, which is memory: nothing survives the machine's restart"
    if kind == "overlay":
        yield "the state directory is in a container's own layer, and goes with it: mount a volume there"
    if found.shape is None:
        yield (
            "the model's files are not here yet, so the sizes are those of a small one; start the daemon once, and run"
            " `homeport init --force` again"
        )
    if found.devices.driver and found.devices.gpu is None:
        yield f"there is an NVIDIA driver, and torch sees no GPU: {found.devices.reason}"


def _lines(found: Found, chosen: Chosen) -> Iterator[str]:
    shape, sizes, gpu = _shape(found), fit(found), found.devices.gpu
    yield f"# Written by `homeport init` {chosen.version} on {chosen.day}, for this machine:"
    yield from (f"#   {line}" for line in _machine(found))
    yield "# Only what differs from the defaults is here. Every key and its reason: config/default.toml in the sources."
    yield '# Sizes: "512MiB", "4GiB". Times: "250ms", "90s", "5m". `homeport config check` says what this file will hold.'
    yield ""
    yield "[server]"
    yield f"state_dir = {_quoted(str(chosen.state_dir))} # caches and stored responses: as private as the prompts"
    soft = found.open_files.soft
    if soft is not None and soft < 2 * Config().server.max_connections:
        yield f"max_connections = {max(1, soft // 2)} # half of the {soft} files that a process may open here (ulimit -n)"
    yield "# Others may reach it? host, allowed_hosts and TLS; see docs/security.md first."
    yield ""
    yield "[auth]"
    yield "# Digests of the two keys that were printed once. Each key is a tenant of its own. For another one:"
    yield "# KEY=$(openssl rand -hex 32); printf %s $KEY | sha256sum"
    yield f'keys = ["{chosen.key}"] # agents and SDKs'
    yield f'operators = ["{chosen.operator_key}"] # homeport top, /metrics, /admin'
    yield ""
    yield from _model(found, chosen)
    if gpu is not None:
        yield from _engine(gpu.total_bytes)
    yield "[tiers.device]"
    yield from _device(found, sizes)
    yield f'capacity = "{_written(sizes.device)}"'
    yield ""
    yield "[tiers.host]"
    yield from _host(found, sizes)
    yield f'capacity = "{_written(sizes.host)}"'
    yield ""
    yield "[tiers.disk]"
    yield from _disk(found, sizes, shape)
    yield f'capacity = "{_written(sizes.disk)}"'
    yield f'min_free = "{_written(sizes.min_free)}" # stays free, for everybody else on this file system'


def _machine(found: Found) -> Iterator[str]:
    memory, devices, system = found.memory, found.devices, found.file_system
    limited = ", which a control group allows" if memory.limited else ""
    available = (
        ""
        if memory.available_bytes is None
        else f"; {in_bytes(memory.available_bytes)} of it unused"
    )
    yield f"{found.cores} cores, {in_bytes(memory.usable_bytes)} of memory{limited}{available}"
    if devices.gpu is None:
        yield f"no GPU: {devices.reason}"
    else:
        gpu = devices.gpu
        yield f"{gpu.name}: {in_bytes(gpu.total_bytes)}, {in_bytes(gpu.free_bytes)} of it unused"
    yield f"{system.kind}: {in_bytes(system.free_bytes)} of {in_bytes(system.total_bytes)} free"
    if found.rates is not None:
        how = (
            "past the page cache"
            if found.rates.direct
            else "through the page cache, so perhaps not the disk"
        )
        yield f"writes {in_bytes(found.rates.write)}/s, reads {in_bytes(found.rates.read)}/s ({how})"


def _model(found: Found, chosen: Chosen) -> Iterator[str]:
    if chosen.model_path is not None:
        path = chosen.model_path.rstrip("/")
        name = path.rpartition("/")[2].removesuffix(".gguf").lower() or "model"
        yield "[model]"
        yield f"path = {_quoted(chosen.model_path)}"
        yield f"name = {_quoted(name)} # the id that clients see"
    else:
        yield "# [model]: the embedded one, which runs anywhere and says little of worth. For real work:"
        yield '# path = "Qwen/Qwen3-0.6B" (a directory or a hub id), name = "qwen3-0.6b", and `homeport init --model` for sizes'
    if found.shape is None:
        yield f"# Its files are not here yet: the figures below are those of {_shape(found).name}."
    yield ""


def _engine(gpu_bytes: int) -> Iterator[str]:
    large = gpu_bytes >= _LARGE_GPU
    step, mixed, running = (8192, 2048, 128) if large else (2048, 512, 32)
    source = (
        "as config/large-gpu.toml"
        if large
        else "between the defaults and config/large-gpu.toml: guessed"
    )
    yield f"[engine] # {source}"
    yield f"step_tokens = {step}"
    yield f"mixed_tokens = {mixed}"
    yield f"max_running = {running}"
    yield ""


def _device(found: Found, sizes: Sizes) -> Iterator[str]:
    shape, gpu = _shape(found), found.devices.gpu
    element = ELEMENT_BYTES[_kv_dtype(found)]
    yield (
        f"# {shape.name} keeps {shape.layers} layers x 2 x {shape.kv_heads} heads x {shape.head_dim} x {element} bytes"
        f" = {_token_bytes(found):,.0f} bytes a token."
    )
    yield f"# {_holds(found, sizes.device)}"
    if gpu is None:
        yield "# It is memory here: the third of what is left beside the model, and no more than 16 full contexts."
    else:
        rest = gpu.free_bytes - sizes.device - _weights(found)
        yield (
            f"# {in_bytes(gpu.free_bytes)} unused, less {in_bytes(_weights(found))} of weights, less"
            f" {in_bytes(rest)} for a forward (guessed)."
        )


def _host(found: Found, sizes: Sizes) -> Iterator[str]:
    beside = (
        ""
        if found.devices.gpu
        else f" and {in_bytes(_weights(found))} of weights and the device tier"
    )
    yield f"# {_holds(found, sizes.host)}"
    yield (
        f"# At most three quarters of {in_bytes(found.memory.usable_bytes)}, and what is unused now, less"
        f" {in_bytes(_DAEMON_BYTES)} for the daemon{beside};"
    )
    yield "# never more than 16 times the device tier. The page cache, which the disk tier reads through, needs the rest."


def _disk(found: Found, sizes: Sizes, shape: Shape) -> Iterator[str]:
    yield f"# {_holds(found, sizes.disk)} Two thirds of what is free."
    if found.rates is not None:
        one = _token_bytes(found) * _session(shape)
        seconds = one / found.rates.read
        yield (
            f"# Such a session is {in_bytes(one)}: {seconds:.2g} s to read at the measured rate. Where computing is"
            " predicted to be faster, it is computed."
        )


def _holds(found: Found, size: int) -> str:
    tokens = int(size / _token_bytes(found))
    session = _session(_shape(found))
    return (
        f"{in_bytes(size)} / {_token_bytes(found):,.0f} = about {tokens:,} tokens"
        f" = {tokens / session:.3g} sessions of {session:,}."
    )


def _session(shape: Shape) -> int:
    return min(_SESSION_TOKENS, shape.context)


def _shape(found: Found) -> Shape:
    return found.shape or Shape()


def _weights(found: Found) -> int:
    if found.weights_bytes is not None:
        return found.weights_bytes
    return _DEFAULT_WEIGHTS if found.devices.gpu is None else _DEFAULT_WEIGHTS // 2


def _kv_dtype(found: Found) -> str:
    """What model.kv_dtype = "auto" is."""
    return "float16" if found.devices.gpu is None else "bfloat16"


def _token_bytes(found: Found) -> float:
    return _shape(found).token_bytes(ELEMENT_BYTES[_kv_dtype(found)])


def _even(size: int) -> int:
    """Rounded down to what a person would write."""
    for unit in (GIB, GIB // 4, 16 * MIB, MIB):
        if size >= 16 * unit:
            return size // unit * unit
    return size


def _written(size: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if size >= unit and size * 4 % unit == 0:
            return f"{size / unit:g}{name}"
    return f"{size}B"


def _quoted(text: str) -> str:
    """As a TOML basic string, which is JSON's but for DEL and what JSON would write as a surrogate pair."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
