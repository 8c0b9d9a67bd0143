"""The tables against the real store: the same rules and laws, real records, and close and reopen as the crash."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar

from hypothesis import settings

from tests.tiers.cache_machine import ROW_BYTES, CacheMachine, run_and_count
from tiers.block import Tier
from tiers.lmdb_store import LmdbStore
from tiers.state_dir import StateDir
from tiers.store import BlockWrite, StoreLimits, record_bytes_on_disk

HEAD_BYTES = (
    1024  # more than a record's own: a drop that failed leaves a record beyond the tables' budget
)
FEWER = 3  # the real store syncs: this machine runs a third of the examples


class LmdbCacheMachine(CacheMachine):
    reached: ClassVar[Counter[str]] = Counter()
    path: Path | None = None

    def open_store(self):
        self.path = Path(tempfile.mkdtemp())
        return self.opened()

    def opened(self):
        self.state = StateDir.open(self.path / "state")
        payload_bytes = self.rows * ROW_BYTES
        capacity = (self.slots[Tier.DISK] + 8) * record_bytes_on_disk(HEAD_BYTES + payload_bytes)
        return LmdbStore.open(
            self.state,
            fingerprint=b"f" * 32,
            payload_bytes=payload_bytes,
            block_tokens=self.rows,
            limits=StoreLimits(block_bytes=capacity),
        )

    def block_write(self, spill, payload):
        return BlockWrite(
            spill.key, spill.root, spill.parent, spill.depth, spill.tokens, payload, self.now
        )

    def close_store(self):
        self.store.close()
        self.state.close()

    def reopen_store(self):
        self.close_store()
        self.store = self.opened()

    def teardown(self):
        try:
            super().teardown()
        finally:
            if self.path is not None:
                self.close_store()
                shutil.rmtree(self.path)


def test_the_tables_keep_their_laws_on_the_real_store():
    examples = max(10, settings().max_examples // FEWER)
    seen = ("fetch", "spill", "drop", "failed Fetch bad", "restored")
    wanted = dict.fromkeys(seen, examples // 20)
    rare = run_and_count(LmdbCacheMachine, wanted, max_examples=examples, stateful_step_count=30)
    assert not rare, f"seen too seldom in {examples} examples: {rare}"
