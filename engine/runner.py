"""One forward pass: a batch of token ids in, logits of the rows that are sampled out.

Nothing is decided here: the scheduler said what runs and where its KV lives. The arena is changed only in
the slots and rows of the batch's own tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine import fused_cpu
from engine.attention import PagedForward

if TYPE_CHECKING:
    from engine.batch import Batch
    from engine.model import LoadedModel
    from tiers.arena import Arena


class Runner:
    """A loaded model over one arena. Used by one thread."""

    __slots__ = ("_arena", "_fused", "_model")

    def __init__(self, loaded: LoadedModel, arena: Arena) -> None:
        assert arena.geometry == loaded.geometry, "the arena was made for another model"
        assert arena.device == loaded.device, "the arena must be where the model is"
        self._model = loaded.model
        self._fused = loaded.fused
        self._arena = arena

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits [`batch.wanted`, vocabulary] in float32."""
        if self._fused is not None and len(batch.tokens) <= fused_cpu.MAX_TOKENS:
            return self._fused.run(batch, self._arena)
        device = self._arena.device
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([batch.tokens], device=device),
                position_ids=torch.tensor([batch.positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(batch.wanted, dtype=torch.long, device=device),
                paged=PagedForward(batch, self._arena),
            )
            logits: torch.Tensor = output.logits[0].float()
            return logits
