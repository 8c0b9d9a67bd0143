"""Single flipped bits, misdirected and stale values: what is damaged is never served, and is counted.

    python -m tests.campaign.flips [--flips 10000] [--moves 1000] [--seed 1] [--quick]

Through the store alone (`LmdbStore`, damaged with transactions of our own)
    a record, head or payload     `read` refuses it; every single time
    any other table's value       what is listed or found is as it was written, or absent, or refused; so after reopening
    a record under another key, or half of it another's, or another model's under this key: refused
Through the whole engine
    a record on disk, a block in host memory: the next answer is the oracle's, and the damage was counted
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from engine.api import Finished, Sampled, Sampling, Submit
from tests.campaign import chain, stub
from tests.campaign.verdict import Verdict
from tests.fakes import END
from tests.tiers.medium import evict, replace_record
from tiers.block import BlockKey, StoreError, Tier, chain_key, root_key
from tiers.lmdb_store import LmdbStore
from tiers.manifest import Manifest
from tiers.state_dir import StateDir
from tiers.store import BlockWrite, StoreLimits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tiers.block import TokenIds

QUICK = (300, 60)
CHAINS, BLOCKS = 8, 12  # of the store alone
TOKENS = 16
PAYLOAD_BYTES = 4096
ROOT = root_key(stub.FINGERPRINT, b"")
BATCH = 40  # values damaged in one transaction, each looked at by itself
# Of the flips: what they hit.
SHARES = {
    "payload": 0.55,
    "head": 0.1,
    "other tables": 0.2,
    "engine: disk": 0.075,
    "engine: host": 0.075,
}


class Damage:
    """The environment's tables, written to behind the store's back; `undo` puts back what was there.

    A record is changed where it lies, as a disk changes it: LMDB would put another one elsewhere, and leave this one whole.
    """

    def __init__(self, store: LmdbStore) -> None:
        self._env = store._env
        with self._env.begin() as txn:
            self.names = list(txn.cursor().iternext(keys=True, values=False))
        self._tables = {name: self._env.open_db(name, create=False) for name in self.names}
        self._before: dict[tuple[bytes, bytes], bytes] = {}

    def keys(self, table: bytes) -> list[bytes]:
        with self._env.begin() as txn:
            return list(txn.cursor(db=self._tables[table]).iternext(keys=True, values=False))

    def value(self, table: bytes, key: bytes) -> bytes | None:
        with self._env.begin() as txn:
            found: bytes | None = txn.get(key, db=self._tables[table])
            return found

    def put(self, values: dict[tuple[bytes, bytes], bytes]) -> None:
        for place in values:
            self._before.setdefault(place, self.value(*place) or b"")
        self._replace(values)

    def undo(self) -> None:
        self._replace(self._before)
        self._before.clear()

    def _replace(self, values: dict[tuple[bytes, bytes], bytes]) -> None:
        with self._env.begin(write=True) as txn:
            for (table, key), value in values.items():
                if table != b"blocks":
                    txn.put(key, value, db=self._tables[table])
        for (table, key), value in values.items():
            if table == b"blocks":
                replace_record(self._env, self._tables[table], key, value)


def flipped(value: bytes, bit: int) -> bytes:
    out = bytearray(value)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


# -- the store alone -------------------------------------------------------------------------------------------------


class StoreAlone:
    """Chains of blocks and a manifest for each, in a store that is damaged and mended again and again."""

    def __init__(self, folder: Path, verdict: Verdict, seed: int) -> None:
        self.folder = folder
        self.verdict = verdict
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.blocks: dict[BlockKey, BlockWrite] = {}
        self.chains: list[TokenIds] = []
        self.manifests: list[Manifest] = []
        for number in range(CHAINS):
            tokens = tuple(self.random.randrange(250) for _ in range(BLOCKS * TOKENS - number))
            self.chains.append(tokens)
            parent = ROOT
            for depth in range(BLOCKS):
                ids = tokens[depth * TOKENS : (depth + 1) * TOKENS]
                payload = memoryview(self.random.randbytes(PAYLOAD_BYTES))
                key = chain_key(parent, ids)
                self.blocks[key] = BlockWrite(key, ROOT, parent, depth, ids, payload, 1.0)
                parent = key
            self.manifests.append(_manifest(number, tokens))

    @contextmanager
    def opened(self, fingerprint: bytes = stub.FINGERPRINT) -> Iterator[LmdbStore]:
        state = StateDir.open(self.folder)
        try:
            store = LmdbStore.open(
                state,
                fingerprint=fingerprint,
                payload_bytes=PAYLOAD_BYTES,
                block_tokens=TOKENS,
                limits=StoreLimits(block_bytes=1 << 24),
            )
            try:
                yield store
            finally:
                store.close()
        finally:
            state.close()

    def fill(self) -> None:
        with self.opened() as store:
            store.write(blocks=list(self.blocks.values()), manifests=self.manifests)

    def flip_records(self, count: int, part: str) -> None:
        with self.opened() as store:
            damage, keys = Damage(store), list(self.blocks)
            done = 0
            while done < count:
                hit = self.random.sample(keys, min(BATCH, count - done))
                values = {}
                for key in hit:
                    record = damage.value(b"blocks", key)
                    assert record is not None
                    head = len(record) - PAYLOAD_BYTES
                    at = (
                        self.random.randrange(head)
                        if part == "head"
                        else head + self.random.randrange(PAYLOAD_BYTES)
                    )
                    values[b"blocks", bytes(key)] = flipped(
                        record, at * 8 + self.random.randrange(8)
                    )
                damage.put(values)
                for key in hit:
                    self.must_refuse(store, key, f"a bit of its {part} flipped")
                damage.undo()
                done += len(hit)
                self.counts[f"{part} bits"] += len(hit)
                self.verdict.progress(f"{self.counts[f'{part} bits']} of {count} bits of {part}s")
        evict(self.folder / "kv" / "data.mdb")
        with self.opened() as store:
            for key in keys:
                self.must_serve(store, key)
            for way, count in store.statistics().reads.items():
                self.counts[f"served: {way.value}"] += count

    def move_records(self, count: int) -> None:
        """Values that are whole, but not this key's."""
        with self.opened(b"another model".ljust(32, b".")) as other:
            foreign = list(self.blocks.values())[:BATCH]
            other.write(drops=[block.key for block in foreign])
            other.write(blocks=foreign)
            damage = Damage(other)
            strange = {block.key: damage.value(b"blocks", block.key) for block in foreign}
        self.fill()
        with self.opened() as store:
            damage, keys = Damage(store), list(self.blocks)
            while self.counts["moved records"] < count:
                values, hit = {}, self.random.sample(keys, BATCH)
                for key, from_ in zip(hit, [*hit[1:], hit[0]], strict=True):
                    own, others = damage.value(b"blocks", key), damage.value(b"blocks", from_)
                    assert own is not None
                    assert others is not None
                    match self.random.randrange(3):
                        case 0:
                            moved = others  # misdirected
                        case 1:  # torn: the beginning of one write, the rest of another
                            at = self.random.choice([496, 2048, 4096])
                            moved = own[:at] + others[at:]
                        case _:  # stale: from before the model changed
                            moved = strange.get(key) or others
                    values[b"blocks", bytes(key)] = moved
                damage.put(values)
                for key in hit:
                    self.must_refuse(store, key, "another record in its place")
                damage.undo()
                self.counts["moved records"] += len(hit)
                self.verdict.progress(f"{self.counts['moved records']} of {count} values moved")

    def flip_others(self, count: int, moves: int) -> None:
        """Any value of any table but the records: index, manifests, names, ages, totals."""
        opens = 0
        while self.counts["bits of other tables"] + self.counts["moved others"] < count + moves:
            with self.opened() as store:
                damage = Damage(store)
                places = [(t, k) for t in damage.names if t != b"blocks" for k in damage.keys(t)]
                for _ in range(10):
                    hit = self.random.sample(places, 8)
                    found = {place: damage.value(*place) or b"" for place in hit}
                    if (
                        self.counts["moved others"] * count
                        < self.counts["bits of other tables"] * moves
                    ):
                        damage.put(self.exchanged(damage, found))
                        self.counts["moved others"] += len(hit)
                    else:
                        bits = {p: self.random.randrange(len(v) * 8) for p, v in found.items() if v}
                        damage.put({p: flipped(found[p], bit) for p, bit in bits.items()})
                        self.counts["bits of other tables"] += len(bits)
                    self.look_at_all(store)
                    if self.random.random() < 0.9:
                        damage.undo()
            # The last damage may still be there: a start must bear it, and then it is mended.
            with self.opened() as store:
                opens += 1
                self.look_at_all(store)
                store.write(drops=list(self.blocks))
                store.write(blocks=list(self.blocks.values()), manifests=self.manifests)
            self.verdict.progress(
                f"{self.counts['bits of other tables']} bits of other tables, {opens} openings"
            )
        self.counts["openings of a damaged store"] += opens

    def exchanged(
        self, damage: Damage, found: dict[tuple[bytes, bytes], bytes]
    ) -> dict[tuple[bytes, bytes], bytes]:
        """Each value replaced by that of another key of its table."""
        return {
            (table, key): damage.value(table, self.random.choice(damage.keys(table))) or value
            for (table, key), value in found.items()
        }

    # what must hold

    def must_refuse(self, store: LmdbStore, key: BlockKey, why: str) -> None:
        block, into = self.blocks[key], bytearray(PAYLOAD_BYTES)
        try:
            store.read(key, block.parent, block.tokens, memoryview(into))
        except StoreError as error:
            self.counts[f"refused: {error.reason}"] += 1
            return
        self.counts["served though damaged"] += 1
        self.verdict.violation(f"{key.hex()[:16]} was served with {why}")

    def must_serve(self, store: LmdbStore, key: BlockKey) -> None:
        block, into = self.blocks[key], bytearray(PAYLOAD_BYTES)
        store.read(key, block.parent, block.tokens, memoryview(into))
        self.verdict.require(into == block.payload, f"{key.hex()[:16]} came back as other bytes")

    def look_at_all(self, store: LmdbStore) -> None:
        """Everything that can be asked is answered truthfully, or not at all."""
        for entry in store.index(None, 10_000):
            block = self.blocks.get(entry.key)
            same = block is not None and (entry.root, entry.parent, entry.depth, entry.tokens) == (
                block.root,
                block.parent,
                block.depth,
                block.tokens,
            )
            self.verdict.require(same, f"the index lies about {entry.key.hex()[:16]}")
        for tokens in self.random.sample(self.chains, 2):
            ids = [entry.tokens for entry in store.find_chain(ROOT, tokens)]
            together = tuple(one for part in ids for one in part)
            self.verdict.require(together == tokens[: len(together)], "a chain of other tokens")
        for manifest in self.random.sample(self.manifests, 3):
            name, digest = manifest.response_id, manifest.content_digest
            self.same(manifest, store.find_response, name)
            self.same(manifest, store.find_item, manifest.item_ids[0])
            self.same(manifest, store.find_content, digest)

    def same(self, manifest: Manifest, find: Any, name: object) -> None:
        try:
            found = find(manifest.tenant, name)
        except StoreError:
            return
        self.verdict.require(
            found in (None, manifest), f"{name!r} found another manifest: {found!r}"
        )


def _manifest(number: int, tokens: TokenIds) -> Manifest:
    return Manifest(
        response_id=f"resp_{number}",
        tenant="t",
        session="s",
        parent=None,
        created_at=1.0,
        stored=True,
        tokens=tokens,
        sampled_from=10,
        item_ids=(f"msg_{number}",),
        content_digest=b"%032d" % number,
        keys=(),
        body=b"{}",
    )


# -- the whole engine ------------------------------------------------------------------------------------------------


class WholeEngine:
    """One session at a time goes down a tier, is damaged there, and goes on."""

    def __init__(self, folder: Path, verdict: Verdict, seed: int) -> None:
        self.folder = folder
        self.verdict = verdict
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.sessions: list[TokenIds] = [self.fresh() for _ in range(6)]

    def fresh(self) -> TokenIds:
        return tuple(self.random.randrange(97, 123) for _ in range(self.random.randint(40, 120)))

    async def run(self, disk: int, host: int, moves: int) -> None:
        # Nothing moves by itself: what is damaged stays where it was put.
        keep = {
            "tiers__disk__max_lag": "1h",
            "tiers__host__after": "1h",
            "tiers__disk__after": "2h",
        }
        assignments = stub.settings(device=120, host=120, disk=400, tiers__disk__scrub="0", **keep)
        async with stub.opened(self.folder, assignments) as self.opened:
            damage = Damage(self.opened.store)
            while self.counts["disk"] < disk:
                await self.cycle(Tier.DISK, lambda tokens: self.flip_record(damage, tokens))
                self.verdict.progress(f"{self.counts['disk']} of {disk} records under the engine")
            while self.counts["moved"] < moves:
                await self.cycle(Tier.DISK, lambda tokens: self.move_record(damage, tokens))
            while self.counts["host"] < host:
                await self.cycle(Tier.HOST, self.flip_host)
                self.verdict.progress(f"{self.counts['host']} of {host} blocks in host memory")

    async def cycle(self, tier: Tier, damage: Any) -> None:
        number = self.random.randrange(len(self.sessions))
        tokens = self.sessions[number]
        if len(tokens) > 500:
            tokens = self.fresh()
        tokens = await self.say(tokens)
        for lower in dict.fromkeys(
            (Tier.DISK, tier)
        ):  # first everything, so that the host has room for this one
            await self.opened.service.demote(lower, None)
            await self.settled(lower)
            if lower is not tier:
                tokens = await self.say(tokens)
        counted = await self.failures()
        hit = damage(tokens)
        more = tuple(self.random.randrange(97, 123) for _ in range(self.random.randint(1, 20)))
        self.sessions[number] = await self.say(tokens + more)
        now = await self.failures()
        if hit:
            self.counts["counted"] += now - counted
            self.verdict.require(now > counted, f"damage on {tier.name} was not counted")
        else:
            self.verdict.require(now == counted, "damage was counted where there was none")

    async def say(self, prompt: TokenIds) -> TokenIds:
        """`prompt` and the engine's answer, which must be the oracle's."""
        submit = Submit(
            request=self.opened.service.new_request(),
            session="s",
            salt=b"",
            prompt=prompt,
            sampling=Sampling(max_tokens=8, temperature=0.0, stop_ids=frozenset({END})),
        )
        said: list[int] = []
        async with self.opened.service.generate(submit) as outputs:
            async for output in outputs:
                if isinstance(output, Sampled):
                    said += output.tokens
                elif isinstance(output, Finished):
                    self.counts["restored"] += output.usage.cached.total
        if tuple(said) != chain.answer(prompt, 8):
            self.counts["wrong KV served"] += 1
            self.verdict.violation(f"an answer from wrong KV: {said}")
        return prompt + tuple(i for i in said if i != END)

    async def failures(self) -> int:
        report = await self.opened.service.inspect()
        found = Counter(report.verify_failures_total) + Counter(report.host_failures_total)
        return found.total()

    async def settled(self, tier: Tier) -> None:
        """Until no block is above `tier` any more."""
        with trio.fail_after(30):
            while True:
                report = await self.opened.service.inspect()
                above = [of.blocks for of in report.tiers if Tier[of.tier.upper()] < tier]
                if not any(above):
                    return
                await trio.sleep(0.002)

    # damage: True if something that the next turn needs was hit

    def flip_record(self, damage: Damage, tokens: TokenIds) -> bool:
        key = self.some_key(damage, tokens)
        if key is None:
            return False
        record = damage.value(b"blocks", key)
        assert record is not None
        damage.put({(b"blocks", key): flipped(record, self.random.randrange(len(record) * 8))})
        self.counts["disk"] += 1
        return True

    def move_record(self, damage: Damage, tokens: TokenIds) -> bool:
        key = self.some_key(damage, tokens)
        others = [one for one in damage.keys(b"blocks") if one != key]
        if key is None or not others:
            return False
        moved = damage.value(b"blocks", self.random.choice(others))
        assert moved is not None
        damage.put({(b"blocks", key): moved})
        self.counts["moved"] += 1
        return True

    def some_key(self, damage: Damage, tokens: TokenIds) -> bytes | None:
        """The key of one of the whole blocks of `tokens`, if it is on disk."""
        keys, parent = [], ROOT
        for at in range(0, len(tokens) - TOKENS, TOKENS):
            parent = chain_key(parent, tokens[at : at + TOKENS])
            keys.append(bytes(parent))
        present = set(damage.keys(b"blocks"))
        there = [key for key in keys if key in present]
        return self.random.choice(there) if there else None

    def flip_host(self, tokens: TokenIds) -> bool:
        """One bit of one of the session's whole blocks, wherever in the host arena its bytes lie."""
        whole = range(0, len(tokens) - TOKENS, TOKENS)
        if not whole:
            return False
        at = self.random.choice(whole)
        rows = chain.rows(0, tokens)[at : at + TOKENS]
        shape = (TOKENS, chain.LAYERS, 2, chain.KV_HEADS, chain.HEAD_DIM)
        block = np.ascontiguousarray(rows.reshape(shape).transpose(1, 2, 3, 0, 4)).tobytes()
        arena, bit = self.opened.arenas[Tier.HOST], self.random.randrange(len(block) * 8)
        hit = False
        for slot in range(arena.slots):
            bytes_ = arena.view(slot)
            if bytes_ == block:
                bytes_[bit // 8] ^= 1 << bit % 8
                hit = True
        self.counts["host"] += hit
        return hit


def _leaf(error: BaseException) -> BaseException:
    return _leaf(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def campaign(
    folder: Path, *, flips: int, moves: int, seed: int, parts: tuple[str, ...] = tuple(SHARES)
) -> int:
    """The exit status. `parts` of SHARES that are flipped."""
    verdict = Verdict("flips", seed)
    shares = {part: round(flips * SHARES[part]) for part in parts}
    alone = StoreAlone(folder / "store", verdict, seed)
    if any(not part.startswith("engine") for part in shares):
        alone.fill()
        alone.flip_records(shares.get("payload", 0), "payload")
        alone.flip_records(shares.get("head", 0), "head")
        alone.move_records(moves * 6 // 10)
        alone.flip_others(shares.get("other tables", 0), moves * 3 // 10)
    engine = WholeEngine(folder / "engine", verdict, seed)
    disk, host = shares.get("engine: disk", 0), shares.get("engine: host", 0)
    try:
        trio.run(engine.run, disk, host, moves // 10 if disk else 0)
    except* (StoreError, AssertionError) as died:
        verdict.violation(f"the engine died of damage: {_leaf(died)!r}")
    verdict.require(engine.counts["restored"] > 0, "nothing was ever restored: nothing was tested")
    served = alone.counts["served though damaged"] + engine.counts["wrong KV served"]
    bits = sum(alone.counts[f"{part} bits"] for part in ("payload", "head"))
    bits += alone.counts["bits of other tables"] + engine.counts["disk"] + engine.counts["host"]
    moved = sum(alone.counts[name] for name in ("moved records", "moved others"))
    moved += engine.counts["moved"]
    return verdict.finish(
        {
            "bits": bits,
            "moved values": moved,
            "wrong KV served": served,
            "store": dict(sorted(alone.counts.items())),
            "engine": dict(sorted(engine.counts.items())),
        },
        f"{bits} bits flipped ({engine.counts['host']} in host memory) and {moved} values moved:"
        f" {served} times was something wrong served",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--moves", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--quick", action="store_true", help="{} flips, {} moves".format(*QUICK))
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)  # the daemon says a line for every record it refuses
    flips, moves = QUICK if arguments.quick else (arguments.flips, arguments.moves)
    with tempfile.TemporaryDirectory(prefix="homeport-flips-") as folder:
        parts = tuple(arguments.parts)
        return campaign(Path(folder), flips=flips, moves=moves, seed=arguments.seed, parts=parts)


if __name__ == "__main__":
    sys.exit(main())
