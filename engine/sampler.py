"""Logits to token ids.

Laws
    What is drawn for a request depends on its seed, its step and its own logits: never on who else is in
    the batch, and never on what was drawn before.
    Temperature 0 is argmax; the lowest id wins a tie.
    Ids that reach the host are the step's only wait for the device.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class SamplingState:
    """How one request's next token is chosen. `step` counts the tokens that it has sampled so far."""

    temperature: float  # 0 is greedy
    top_p: float  # (0, 1]: draw from the fewest likeliest tokens that reach this much probability together
    seed: int  # any integer; reduced to 64 bits
    step: int


class Sampler:
    """Draws by inverting each row's cumulative distribution at a number hashed from (seed, step)."""

    __slots__ = ()

    def sample(self, logits: torch.Tensor, requests: Sequence[SamplingState]) -> list[int]:
        """One id per row of `logits` [requests, vocabulary]."""
        assert logits.shape[0] == len(requests), f"{logits.shape[0]} rows, {len(requests)} requests"
        chosen = logits.argmax(-1)
        drawn = [row for row, request in enumerate(requests) if request.temperature > 0]
        if drawn:
            rows = torch.tensor(drawn, device=logits.device)
            chosen[rows] = _draw(logits[rows], [requests[row] for row in drawn])
        ids: list[int] = chosen.tolist()
        return ids


def _draw(logits: torch.Tensor, requests: Sequence[SamplingState]) -> torch.Tensor:
    """Ids [rows] for `logits` [rows, vocabulary]. In float64: no token of the vocabulary is rounded away."""
    device = logits.device
    temperature = torch.tensor(
        [r.temperature for r in requests], dtype=torch.float64, device=device
    )
    top_p = torch.tensor([r.top_p for r in requests], dtype=torch.float64, device=device)
    uniform = torch.tensor([_uniform(r.seed, r.step) for r in requests], dtype=torch.float64)
    ranked, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    # Subtracting the highest first keeps a tiny temperature from overflowing.
    likelihood = ((ranked - ranked[:, :1]) / temperature[:, None]).softmax(-1)
    reached = likelihood.cumsum(-1)
    before = reached - likelihood
    kept = (before < top_p[:, None]).sum(-1, keepdim=True).clamp(min=1)
    mass = reached.gather(-1, kept - 1)
    target = uniform.to(device)[:, None] * mass
    rank = torch.searchsorted(reached, target, right=True).minimum(kept - 1)
    return ids.gather(-1, rank)[:, 0]


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that looks random and is the same on every machine."""
    framed = struct.pack("<QQ", seed % 2**64, step)
    digest = blake2b(framed, digest_size=8, person=b"homeport-draw-1").digest()
    return int.from_bytes(digest, "little") / 2**64
