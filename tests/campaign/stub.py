"""The real engine with a stub model: everything of `engine.service` but the weights, the forward pass and the tokenizer.

Tables, scheduler, arenas, disk threads and LMDB are the daemon's own; the model is the hash chain of `chain.py`, whose
rows are real bytes in the real arena, so that a spill carries bytes which the next answer proves.

Three names in `engine.service` are replaced, and nothing else: `load`, `Runner` and `Text`. What the engine measures
at start it measures on the stub.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import torch

from broker.config import Tiers
from engine import service
from engine.model import LoadedModel
from tests.campaign import chain
from tests.fakes import byte_text
from tiers.arena import Geometry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.batch import Batch
    from engine.model import LoadSpec
    from tiers.arena import Arena

BLOCK_TOKENS = 16
BLOCK_BYTES = BLOCK_TOKENS * chain.WORDS * 4
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

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits [segments with `sample`, vocabulary]."""
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
            if segment.sample:
                logits = torch.zeros(chain.VOCABULARY)
                known = self._read(table, 0, end)
                logits[chain.next_id(chain.total(known.view(np.uint32)), tokens[-1])] = 1.0
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
    with patch.multiple(service, load=load, Runner=Runner, Text=StubText):
        yield


def settings(*, device: int = 40, host: int = 24, disk: int = 120, **more: str) -> tuple[str, ...]:
    """`--set` assignments of a stub daemon with tiers of so many blocks: small, so that eviction never rests.

    `more` are further keys, dots written as `__`; one that this version of the configuration does not know is left out.
    """
    record = 512 + BLOCK_BYTES + 16
    values = {
        "model__name": "stub",
        "engine__block_tokens": str(BLOCK_TOKENS),
        "engine__step_tokens": "256",
        "engine__max_running": "6",
        "log__level": "warning",
        "tiers__device__capacity": str(device * BLOCK_BYTES),
        "tiers__host__capacity": str(host * BLOCK_BYTES),
        "tiers__disk__capacity": str(disk * -(-record // 4096) * 4096),
        "tiers__disk__max_lag": "50ms",
        "tiers__disk__readers": "2",
        # A model this fast would always rather compute than restore, and then nothing of the tiers is tested.
        "tiers__restore__decide": "false",
        "tiers__disk__min_free": "0",
        **more,
    }
    return tuple(
        f"{name.replace('__', '.')}={value}" for name, value in values.items() if _known(name)
    )


def _known(name: str) -> bool:
    """Only keys of the tiers come and go."""
    path = name.split("__")
    if path[0] != "tiers":
        return True
    at: object = Tiers()
    for part in path[1:]:
        if not hasattr(at, part):
            return False
        at = getattr(at, part)
    return True
