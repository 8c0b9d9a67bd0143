"""Device to host to disk to device, again and again: not one bit changes.

    python -m tests.campaign.round_trips [--trips 100] [--device cpu] [--seed 1] [--quick]

Real arenas of the default model's geometry, the engine's own memory, a real LMDB; blocks of random bytes, among them
every kind of number that a copy through floats would mend: not-a-number with a payload, minus zero, subnormals. Each
trip carries on with the bytes that the last one brought back, in other slots, and what is not in flight is scrambled.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.memory import Memory
from tests.campaign.verdict import Verdict
from tiers.arena import Arena, Geometry
from tiers.block import Copy, Fetch, Slot, Spill, Tier, chain_key, root_key
from tiers.lmdb_store import LmdbStore
from tiers.state_dir import StateDir
from tiers.store import BlockWrite, StoreLimits

if TYPE_CHECKING:
    from tiers.block import BlockKey

QUICK = 4
DTYPES = ("float32", "bfloat16")
BLOCKS, SLOTS = 6, 9
FINGERPRINT = b"round trips".ljust(32, b".")
ROOT = root_key(FINGERPRINT, b"")


def trips(folder: Path, dtype: str, count: int, device: str, verdict: Verdict, seed: int) -> int:
    """Bits that changed in `count` trips of all blocks."""
    geometry = Geometry(layers=30, kv_heads=3, head_dim=64, block_tokens=32, dtype_name=dtype)
    on_device, on_host = Arena(geometry, SLOTS, device), Arena(geometry, SLOTS)
    memory = Memory({Tier.DEVICE: on_device, Tier.HOST: on_host}, geometry.block_tokens)
    chance = random.Random(seed)
    ids = [tuple(chance.randrange(1000) for _ in range(32)) for _ in range(BLOCKS)]
    keys = [chain_key(ROOT, tokens) for tokens in ids]
    told = [chance.randbytes(geometry.block_bytes) for _ in range(BLOCKS)]
    slots = chance.sample(range(SLOTS), BLOCKS)  # on the device, of each block
    for slot, payload in zip(slots, told, strict=True):
        on_device.write(Slot(slot), payload)
    state = StateDir.open(folder)
    store = LmdbStore.open(
        state,
        fingerprint=FINGERPRINT,
        payload_bytes=geometry.block_bytes,
        block_tokens=geometry.block_tokens,
        limits=StoreLimits(block_bytes=1 << 28),
    )
    try:
        for trip in range(count):
            hosted = chance.sample(range(SLOTS), BLOCKS)
            for key, slot, target in zip(keys, slots, hosted, strict=True):
                memory.copy(Copy(key, Tier.DEVICE, Slot(slot), Tier.HOST, Slot(target)))
            writes = []
            for key, tokens, slot in zip(keys, ids, hosted, strict=True):
                payload = memory.payload(_spill(key, tokens, slot))
                writes.append(BlockWrite(key, ROOT, ROOT, 0, tokens, payload, float(trip)))
            store.write(blocks=writes)
            for arena in (on_device, on_host):
                for slot in range(SLOTS):
                    arena.write(Slot(slot), chance.randbytes(16) * (geometry.block_bytes // 16))
            slots = chance.sample(range(SLOTS), BLOCKS)
            for key, tokens, slot in zip(keys, ids, slots, strict=True):
                fetch = Fetch(key, ROOT, tokens, Tier.DEVICE, Slot(slot))
                store.read(key, ROOT, tokens, memory.buffer(fetch))
                memory.settle(fetch)
            verdict.progress(f"{dtype}: {trip + 1} of {count} trips of {BLOCKS} blocks")
        now = [bytes(on_device.read(Slot(slot))) for slot in slots]
    finally:
        store.close()
        state.close()
    return sum(_bits_between(*pair) for pair in zip(told, now, strict=True))


def _spill(key: BlockKey, tokens: tuple[int, ...], slot: int) -> Spill:
    return Spill(key, ROOT, ROOT, 0, tokens, Tier.HOST, Slot(slot), Slot(0))


def _bits_between(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).bit_count()


def campaign(folder: Path, *, count: int, seed: int, device: str = "cpu") -> int:
    """The exit status."""
    verdict = Verdict("round_trips", seed)
    changed = {
        dtype: trips(folder / dtype, dtype, count, device, verdict, seed) for dtype in DTYPES
    }
    for dtype, bits in changed.items():
        verdict.require(not bits, f"{bits} bits changed in {count} trips of {dtype} blocks")
    return verdict.finish(
        {"trips": count, "blocks": BLOCKS, "device": device, "bits changed": changed},
        f"{count} trips of {BLOCKS} blocks each, device ({device}) to host to disk to device:"
        f" {sum(changed.values())} bits changed",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} trips")
    arguments = parser.parse_args(argv)
    count = QUICK if arguments.quick else arguments.trips
    with tempfile.TemporaryDirectory(prefix="homeport-trips-") as folder:
        return campaign(Path(folder), count=count, seed=arguments.seed, device=arguments.device)


if __name__ == "__main__":
    sys.exit(main())
