"""Weights for few tokens on the CPU: a matrix in the fewest bytes that hold it exactly, and products that read those.

A decode reads every weight for one token, so its time is the weights' bytes. Most weights were few bits before they became
float32: 4 or 8 bits with a scale in a GGUF, bfloat16 on a hub. `pack` finds what they were.

Laws
    A form is used only if every weight is in it, bit for bit: expanding it gives the matrix that was loaded. What fits
    no smaller form stays float32. So nothing is configured, and no answer is less exact: a product differs from another
    float32 product of the same matrix in the order of its sums only.

    form    a weight is                         bytes each   where it comes from
    Q4      scale * q + least, q in [0, 16)     0.75         GGUF's Q4_0 and Q4_1; 32 weights share scale and least
    Q8      scale * q, q in [-128, 128)         1.125        GGUF's Q8_0; 32 weights share a scale
    BF16    the upper half of a float32         2            most models on a hub
    F32     itself                              4            the rest

Rows are dealt out in groups of `LANES`, and stored group by group, column by column, so that one vector register holds one
column of a group (engine/kernels_cpu.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.kernels_cpu import LANES, SHARE, Form, Matrices

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Packed:
    """One matrix. Scales are [groups, shares, 1 or 2, LANES]; codes have these shapes:

    Q4      uint8 [groups, shares, SHARE / 2, LANES]: column k in the low half of a byte, column k + 16 in the high one
    Q8      int8 as uint8 [groups, shares, SHARE, LANES]
    BF16    uint16 [groups, columns, LANES]
    F32     float32 [groups, columns, LANES]
    """

    form: Form
    rows: int
    columns: int
    codes: Array
    scales: Array

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scales.nbytes)


def pack(weight: torch.Tensor) -> Packed:
    """`weight` [rows, columns], float32 on the CPU, in its smallest exact form."""
    assert weight.dtype is torch.float32
    rows, columns = weight.shape
    if columns % SHARE == 0:
        shares = weight.reshape(rows, -1, SHARE)
        for form, fit in ((Form.Q4, _as_q4), (Form.Q8, _as_q8)):
            if (fitted := fit(shares)) is not None:
                return Packed(form, rows, columns, *map(_grouped, fitted))
    bits = weight.contiguous().view(torch.int32)
    none = np.empty(0, np.float32)
    if not (bits & 0xFFFF).any():
        halves = (bits >> 16).to(torch.int16)
        codes = _grouped(halves).view(np.uint16)
        return Packed(Form.BF16, rows, columns, codes, none)
    return Packed(Form.F32, rows, columns, _grouped(weight), none)


def _as_q4(shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes [rows, shares, 16] and scales [rows, shares, 2], if that is what `shares` [rows, shares, 32] is.

    A quantiser puts the least weight of a share at code 0 and the greatest at 15, and both constants are float16.
    """
    least, greatest = shares.amin(-1, keepdim=True), shares.amax(-1, keepdim=True)
    scale = ((greatest - least) / 15).half().float()
    codes = ((shares - least) / torch.where(scale == 0, 1, scale)).round_().clamp_(0, 15)
    if not torch.equal(codes * scale + least, shares):
        return None
    low, high = codes.to(torch.uint8).chunk(2, -1)
    return low | (high << 4), torch.cat((scale, least), -1)


def _as_q8(shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes [rows, shares, 32] and scales [rows, shares, 1]. The weight furthest from zero has the code 127 or -127."""
    scale = (shares.abs().amax(-1, keepdim=True) / 127).half().float()
    codes = (shares / torch.where(scale == 0, 1, scale)).round_().clamp_(-128, 127)
    if not torch.equal(codes * scale, shares):
        return None
    return codes.to(torch.int8).view(torch.uint8), scale


def _grouped(per_row: torch.Tensor) -> Array:
    """[rows, ...] to [groups, ..., LANES]; rows that a last group lacks are zeros."""
    rows = per_row.shape[0]
    groups = -(-rows // LANES)
    if groups * LANES > rows:
        missing = per_row.new_zeros(groups * LANES - rows, *per_row.shape[1:])
        per_row = torch.cat((per_row, missing))
    grouped = per_row.reshape(groups, LANES, *per_row.shape[1:]).movedim(1, -1)
    return np.ascontiguousarray(grouped.numpy())


def expand(packed: Packed) -> torch.Tensor:
    """The matrix again: [rows, columns] float32. For tests, and for whoever doubts."""
    codes = torch.from_numpy(
        packed.codes.view(np.int16) if packed.form is Form.BF16 else packed.codes
    )
    codes = codes.movedim(-1, 1).reshape(-1, *codes.shape[1:-1])[: packed.rows]
    if packed.form is Form.F32:
        return codes
    if packed.form is Form.BF16:
        return (codes.to(torch.int32) << 16).view(torch.float32)
    scales = torch.from_numpy(packed.scales).movedim(-1, 1)
    scales = scales.reshape(-1, *scales.shape[2:])[: packed.rows]
    if packed.form is Form.Q8:
        wide = codes.view(torch.int8).float() * scales
    else:
        wide = torch.cat((codes & 15, codes >> 4), -1).float() * scales[..., :1] + scales[..., 1:]
    return wide.reshape(packed.rows, packed.columns)


def lay_out(matrices: Sequence[Packed]) -> Matrices:
    kinds: list[tuple[Form, ...]] = [(Form.Q4, Form.Q8), (Form.BF16,), (Form.F32,)]
    dtypes = (np.uint8, np.uint16, np.float32)
    stores: list[list[Array]] = [[], [], []]
    at = [0, 0, 0]
    scales: list[Array] = []
    scale_at = 0
    table = np.zeros((len(matrices), 4), np.int64)
    for index, one in enumerate(matrices):
        kind = next(k for k, forms in enumerate(kinds) if one.form in forms)
        table[index] = (one.form, one.rows, at[kind], scale_at)
        stores[kind].append(one.codes.reshape(-1))
        scales.append(one.scales.reshape(-1))
        at[kind] += one.codes.size
        scale_at += one.scales.size
    bytes_, halves, floats = (
        np.concatenate(parts) if parts else np.empty(0, dtype)
        for parts, dtype in zip(stores, dtypes, strict=True)
    )
    of_all = np.concatenate(scales).astype(np.float32, copy=False)
    return Matrices(bytes_, halves, floats, of_all, table)
