"""A small `LmdbStore` and numbered contents for it. Run as a program, it writes until it is killed."""

import random
import sys
from contextlib import contextmanager
from pathlib import Path

from tiers.block import chain_key, root_key
from tiers.lmdb_store import LmdbStore
from tiers.manifest import Manifest
from tiers.state_dir import StateDir
from tiers.store import BlockWrite, Durability, StoreLimits

FINGERPRINT = b"f" * 32
ROOT = root_key(FINGERPRINT, b"")
PAYLOAD_BYTES = 6144  # whole sectors, as blocks are
LIMITS = StoreLimits(block_bytes=64 * 8192, manifests=20)


def payload(number: int) -> bytes:
    return random.Random(number).randbytes(PAYLOAD_BYTES)


def block(number: int) -> BlockWrite:
    tokens = (number, number + 1, number + 2)
    return BlockWrite(
        chain_key(ROOT, tokens), ROOT, ROOT, 0, tokens, memoryview(payload(number)), float(number)
    )


def manifest(number: int, body: bytes = b"{}") -> Manifest:
    tokens = tuple(range(number, number + 300))
    items, digest = (f"item{number}",), b"%032d" % number
    return Manifest(f"r{number}", "t", "s", None, 1.0, True, tokens, 7, items, digest, (), body)


@contextmanager
def opened(
    path,
    *,
    fingerprint=FINGERPRINT,
    limits=LIMITS,
    map_bytes=None,
    durability=Durability.POWER,
    boot=None,
):
    state = StateDir.open(path)
    try:
        store = LmdbStore.open(
            state,
            fingerprint=fingerprint,
            payload_bytes=PAYLOAD_BYTES,
            block_tokens=4,
            limits=limits,
            map_bytes=map_bytes,
            durability=durability,
            boot=boot,
        )
        try:
            yield store
        finally:
            store.close()
    finally:
        state.close()


def write_for_ever(path: Path, number: int) -> None:
    """Four blocks and a manifest a transaction, forty blocks kept; each is printed when it is acknowledged."""
    with opened(path) as store:
        while True:
            drops = [block(number - 40 + n).key for n in range(4)] if number >= 40 else []
            store.write(
                blocks=[block(number + n) for n in range(4)],
                manifests=[manifest(number)],
                drops=drops,
            )
            print(number, flush=True)
            number += 4


if __name__ == "__main__":
    write_for_ever(Path(sys.argv[1]), int(sys.argv[2]))
