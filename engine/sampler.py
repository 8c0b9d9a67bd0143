"""Logits to token ids.

    logits -> likelihoods, where asked for -> penalties -> constraint -> temperature, top_p, draw

Laws
    What is drawn for a request depends on its seed, its step and its own logits: never on who else is in
    the batch, and never on what was drawn before, but for penalties and constraints.
    An id that a constraint forbids is never chosen, at any temperature.
    Temperature 0 is argmax; the lowest id wins a tie.
    Ids that reach the host are the step's only wait for the device, but for likelihoods.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch

from engine.api import Likelihood

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.grammar import Matcher


@dataclass(frozen=True, slots=True)
class SamplingState:
    """How one request's next token is chosen. `step` counts the tokens that it has sampled so far."""

    temperature: float  # 0 is greedy
    top_p: float  # (0, 1]: draw from the fewest likeliest tokens that reach this much probability together
    seed: int  # any integer; reduced to 64 bits
    step: int
    matcher: Matcher | None = None  # says which ids are allowed
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    said: Sequence[int] = ()  # the ids that penalties are for: those sampled so far
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    token: int
    likelihood: Likelihood | None = None  # None: nobody asked


class Sampler:
    """Draws by inverting each row's cumulative distribution at a number hashed from (seed, step)."""

    __slots__ = ()

    def sample(self, logits: torch.Tensor, requests: Sequence[SamplingState]) -> list[Choice]:
        """One choice per row of `logits` [requests, vocabulary]."""
        assert logits.shape[0] == len(requests), f"{logits.shape[0]} rows, {len(requests)} requests"
        weighed = _constrained(_penalised(logits, requests), requests)
        chosen = weighed.argmax(-1)
        drawn = [row for row, request in enumerate(requests) if request.temperature > 0]
        if drawn:
            rows = torch.tensor(drawn, device=logits.device)
            chosen[rows] = _draw(weighed[rows], [requests[row] for row in drawn])
        ids: list[int] = chosen.tolist()
        return [
            Choice(token, _likelihood(logits[row], token, request.top_logprobs))
            for row, (token, request) in enumerate(zip(ids, requests, strict=True))
        ]


def _likelihood(logits: torch.Tensor, token: int, top: int | None) -> Likelihood | None:
    if top is None:
        return None
    logprobs = logits.double().log_softmax(-1)
    values, ids = logprobs.topk(top)
    best = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Likelihood(float(logprobs[token]), best)


def _penalised(logits: torch.Tensor, requests: Sequence[SamplingState]) -> torch.Tensor:
    """`logits` itself where nobody asked for a penalty."""
    rows = [row for row, request in enumerate(requests) if request.said]
    if not rows:
        return logits
    penalised = logits.clone()
    for row in rows:
        request = requests[row]
        times = torch.bincount(
            torch.tensor(request.said, device=logits.device), minlength=logits.shape[1]
        )
        penalised[row] -= request.presence_penalty * (times > 0) + request.frequency_penalty * times
    return penalised


def _constrained(logits: torch.Tensor, requests: Sequence[SamplingState]) -> torch.Tensor:
    """`logits` itself where nobody is constrained; else what is forbidden is at minus infinity."""
    rows = [row for row, request in enumerate(requests) if request.matcher is not None]
    if not rows:
        return logits
    vocabulary = logits.shape[1]
    masks = torch.empty((len(rows), (vocabulary + 31) // 32), dtype=torch.int32)
    for mask, row in zip(masks, rows, strict=True):
        matcher = requests[row].matcher
        assert matcher is not None
        matcher.allow(mask)
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (masks.to(logits.device)[:, :, None] >> bits) & 1  # [rows, words, 32]
    forbidden = allowed.flatten(1)[:, :vocabulary] == 0
    constrained = logits.clone()
    constrained[rows] = logits[rows].masked_fill(forbidden, -torch.inf)
    return constrained


def _draw(logits: torch.Tensor, requests: Sequence[SamplingState]) -> torch.Tensor:
    """Ids [rows] for `logits` [rows, vocabulary]. In float64: no token of the vocabulary is rounded away.

    A distribution is inverted in the order of the ids, or where its tail is cut off in the order of likelihood: sorting
    49,000 numbers takes 10 ms, which few ask for.
    """
    device = logits.device
    scale = torch.tensor([r.temperature for r in requests], dtype=torch.float64, device=device)
    uniform = torch.tensor([_uniform(r.seed, r.step) for r in requests], dtype=torch.float64)
    # Subtracting the highest first keeps a tiny temperature from overflowing.
    highest = logits.amax(-1, keepdim=True)
    likelihood = ((logits.double() - highest) / scale[:, None]).softmax(-1)
    ids = torch.empty(len(requests), dtype=torch.long, device=device)
    whole = [row for row, request in enumerate(requests) if request.top_p >= 1]
    cut = [row for row, request in enumerate(requests) if request.top_p < 1]
    if whole:
        ids[whole] = _inverted(likelihood[whole], uniform[whole].to(device))
    if cut:
        ranked, order = likelihood[cut].sort(dim=-1, descending=True, stable=True)
        top_p = torch.tensor([requests[row].top_p for row in cut], dtype=torch.float64)
        before = ranked.cumsum(-1) - ranked
        kept = ranked.masked_fill(before >= top_p.to(device)[:, None], 0.0)
        rank = _inverted(kept, uniform[cut].to(device))
        ids[cut] = order.gather(-1, rank[:, None])[:, 0]
    return ids


def _inverted(likelihood: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Where each row's cumulative sum passes that share of the whole. Never at a likelihood of 0."""
    reached = likelihood.cumsum(-1)
    mass = reached[:, -1:].contiguous()
    at = torch.searchsorted(reached, uniform[:, None] * mass, right=True)
    # The share may be rounded up to the whole: then it is the first that reaches it.
    return at.minimum(torch.searchsorted(reached, mass))[:, 0]


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that looks random and is the same on every machine."""
    framed = struct.pack("<QQ", seed % 2**64, step)
    digest = blake2b(framed, digest_size=8, person=b"homeport-draw-1").digest()
    return int.from_bytes(digest, "little") / 2**64
