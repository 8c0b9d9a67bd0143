"""What KV bytes depend on besides the tokens and the tenant, as one record, and the name of that record.

Laws
    The fingerprint changes whenever the KV of some token could: another weight, config, code, dtype, storage or layout.
    A field too many only forgets (another model's cache is recomputed); one too few would lie. So of the config
    everything counts but the short list below, and a value of a kind that cannot be named for sure is refused.
    Weights are named by what was loaded, not by where it came from: the tensors in memory are hashed at every start.
    Nothing about files is remembered, so no clock, inode or copy that keeps its times can pass old weights for new
    ones; nor can a file that is replaced between loading and hashing, or a tensor that was missing and was filled
    with random numbers (then no two starts share a cache, as it must be).

What it costs: xxh3-128 reads the default model's 538 MB in 0.05 s (11 GB/s; BLAKE2b of the file took 0.73 s, SHA-256
0.37 s). It guards against accidents, not against an enemy, and needs no more: whoever chooses the weights chooses the
answers anyway. The record itself, and every key made from it, is BLAKE2b.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import xxhash

from tiers.canonical import digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tiers.arena import Geometry
    from tiers.canonical import Value

# Of a block's bytes. Raise it when the arena's layout, the meaning of its rows or what attention computes changes.
KV_FORMAT = 2
# Where the config lies, who wrote it, and what is said elsewhere (`dtype`: the geometry has what was loaded).
IRRELEVANT = frozenset({"_name_or_path", "transformers_version", "dtype", "use_cache"})


@dataclass(frozen=True, slots=True)
class Origin:
    """Everything that decides KV bytes but the tokens and the tenant."""

    weights: Mapping[
        str, str
    ]  # {tensor: `weigh`}; parameters, and buffers such as rope's frequencies
    config: Mapping[
        str, Value
    ]  # all of it; `IRRELEVANT` is left out here, so that nobody else has to know
    code: str  # of the model: a repaired rope in a new transformers makes other keys from the same weights
    # CPU kernel, or SDPA on a device of that type. They differ in rounding only; but a cache that mixes them would
    # not stand the canary's comparison, and nobody moves a state directory between a CPU and a GPU for its cache.
    attention: str
    geometry: Geometry  # layers, heads, head size, block size and element type
    storage: str  # how a spilled block is written: a restored one may be a rounded one


def fingerprint(origin: Origin) -> bytes:
    """32 bytes. Raises TypeError for a config with a value that has no canonical encoding."""
    geometry = origin.geometry
    named: dict[str, Value] = {
        "format": KV_FORMAT,
        "weights": dict(origin.weights),
        "config": {k: v for k, v in origin.config.items() if k not in IRRELEVANT},
        "code": origin.code,
        "attention": origin.attention,
        "layers": geometry.layers,
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "block_tokens": geometry.block_tokens,
        "dtype": geometry.dtype_name,
        "order": "layer, k v, head, token, dim",
        "endian": sys.byteorder,
        "storage": origin.storage,
    }
    return digest(b"homeport-model-2", named)


def weigh(model: torch.nn.Module) -> dict[str, str]:
    """{tensor: its type, shape and a hash of its bytes}. Shared tensors count once. The model must be on the CPU."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: _weight(tensor.detach()) for name, tensor in tensors.items()}


def _weight(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape} {xxhash.xxh3_128_hexdigest(content.data)}"
