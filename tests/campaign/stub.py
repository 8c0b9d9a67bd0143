"""The real engine with a stub model: everything of `engine.service` but the weights, the forward pass and the tokenizer.

Tables, scheduler, arenas, disk threads and LMDB are the daemon's own; the model is the hash chain of `chain.py`, whose
rows are real bytes in the real arena, so that a spill carries bytes which the next answer proves.

Three names in `engine.service` are replaced, and nothing else: `load`, `Runner` and `Text`. What the engine measures
at start it measures on the stub.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch

from broker.app import open_model_engine
from broker.config import load as load_config
from engine import service
from engine.model import LoadedModel
from tests.campaign import chain
from tests.fakes import byte_grammars, byte_text
from tiers.arena import Geometry
from tiers.lmdb_store import LmdbStore
from tiers.record import head_size
from tiers.store import record_bytes_on_disk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from engine.batch import Batch
    from engine.model import LoadSpec
    from tiers.arena import Arena
    from tiers.block import Tier

BLOCK_TOKENS = 16
BLOCK_BYTES = BLOCK_TOKENS * chain.WORDS * 4
DISK_BYTES = record_bytes_on_disk(head_size(BLOCK_TOKENS) + BLOCK_BYTES)
FINGERPRINT = b"the stub of the campaigns".ljust(32, b".")


def load(spec: LoadSpec) -> LoadedModel:
    torch.set_num_threads(1)
    return LoadedModel(
        model=None,  # the runner computes
        name="stub",
        path=Path(),
        geometry=Geometry(
            layers=chain.LAYERS,
            kv_heads=chain.KV_HEADS,
            head_dim=chain.HEAD_DIM,
            block_tokens=spec.block_tokens,
            dtype_name="float32",
        ),
        fingerprint=FINGERPRINT,
        device=torch.device("cpu"),
        dtype=torch.float32,
        prefill_dtype=torch.float32,
        vocab_size=chain.VOCABULARY,
        max_context=chain.MAX_CONTEXT,
        stop_ids=frozenset(),
    )


class Runner:
    """`engine.runner.Runner` without a model: reads and writes rows through the block tables, as attention does."""

    def __init__(self, loaded: LoadedModel, arena: Arena) -> None:
        assert arena.geometry == loaded.geometry
        self._block_tokens = arena.geometry.block_tokens
        self._rows = arena.blocks.numpy()  # [slots, layers, 2, kv_heads, block_tokens, head_dim]

    def warm_up(self, sequences: int) -> None:
        """There is nothing to compile or capture."""

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits [`batch.wanted`, vocabulary]."""
        wanted = []
        for segment in batch.segments:
            table = np.array(segment.table)
            begin, end = segment.context - segment.count, segment.context
            expected = list(range(begin, end))
            assert list(batch.positions[segment.start : segment.start + segment.count]) == expected
            tokens = batch.tokens[segment.start : segment.start + segment.count]
            link = 0 if begin == 0 else chain.link_of(self._read(table, begin - 1, begin)[0])
            at = np.arange(begin, end)
            slots, rows = table[at // self._block_tokens], at % self._block_tokens
            new = chain.rows(link, tokens)
            self._rows[slots, :, :, :, rows, :] = new.reshape(-1, *self._shape)
            for last in range(end - segment.logits, end):
                logits = torch.zeros(chain.VOCABULARY)
                known = chain.total(self._read(table, 0, last + 1).view(np.uint32))
                logits[chain.next_id(known, batch.tokens[segment.start + last - begin])] = 1.0
                wanted.append(logits)
        return torch.stack(wanted) if wanted else torch.empty(0, chain.VOCABULARY)

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return (chain.LAYERS, 2, chain.KV_HEADS, chain.HEAD_DIM)

    def _read(self, table: np.ndarray, begin: int, end: int) -> np.ndarray:
        """Rows [end - begin, WORDS], copied."""
        at = np.arange(begin, end)
        slots, rows = table[at // self._block_tokens], at % self._block_tokens
        return np.ascontiguousarray(self._rows[slots, :, :, :, rows, :]).reshape(-1, chain.WORDS)


class StubText:
    """Stands for `engine.text.Text`: one byte, one token."""

    @staticmethod
    def from_dir(path: Path) -> service.Text:
        return byte_text()


@contextmanager
def stubbed() -> Iterator[None]:
    """Within it, `engine.service` builds stub engines."""

    def grammars_of(_: service.Text) -> service.Grammars:
        return byte_grammars()

    stubs = {"load": load, "Runner": Runner, "Text": StubText, "grammars_of": grammars_of}
    with patch.multiple(service, **stubs):
        yield


def settings(*, device: int = 40, host: int = 24, disk: int = 120, **more: str) -> tuple[str, ...]:
    """`--set` assignments of a stub daemon with tiers of so many blocks: small, so that eviction never rests.

    `more` are further keys, dots written as `__`.
    """
    values = {
        "model__name": "stub",
        "engine__block_tokens": str(BLOCK_TOKENS),
        "engine__step_tokens": "256",
        "engine__max_running": "6",
        "log__level": "warning",
        "tiers__device__capacity": str(device * BLOCK_BYTES),
        "tiers__host__capacity": str(host * BLOCK_BYTES),
        "tiers__disk__capacity": str(disk * DISK_BYTES),
        "tiers__disk__max_lag": "50ms",
        "tiers__disk__readers": "2",
        "tiers__disk__min_free": "0",
        # A model this fast would always rather compute than restore, and then nothing of the tiers is tested.
        "tiers__restore__decide": "false",
        **more,
    }
    return tuple(f"{name.replace('__', '.')}={value}" for name, value in values.items())


@dataclass(frozen=True, slots=True)
class Opened:
    """A stub engine in this process. What lies behind the service is for damaging it."""

    service: service.EngineService
    store: LmdbStore
    arenas: Mapping[Tier, Arena]


@asynccontextmanager
async def opened(state_dir: Path, assignments: Sequence[str]) -> AsyncIterator[Opened]:
    """The daemon's engine without the daemon."""
    stores: list[LmdbStore] = []
    memories: list[Mapping[Tier, Arena]] = []

    class Store(LmdbStore):
        def __init__(self, *positional: Any, **named: Any) -> None:
            super().__init__(*positional, **named)
            stores.append(self)

    class Memory(service.Memory):
        def __init__(self, arenas: Mapping[Tier, Arena], *positional: Any, **named: Any) -> None:
            super().__init__(arenas, *positional, **named)
            memories.append(arenas)

    config = load_config(assignments=assignments)
    config = replace(config, server=replace(config.server, state_dir=state_dir))
    with stubbed(), patch.multiple(service, LmdbStore=Store, Memory=Memory):
        async with open_model_engine(config) as engine:
            yield Opened(engine, stores[-1], memories[-1])
