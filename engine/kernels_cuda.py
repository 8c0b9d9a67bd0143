"""Everything that Triton compiles for CUDA, and nothing else: attention over pages, and the small operations of a layer.

May be imported only where Triton is; `available` in engine/fused_cuda.py asks. With `TRITON_INTERPRET=1` the same code
runs on the CPU, an instruction at a time: that is how the tests run it where there is no GPU.

Laws
    Rows of a block beyond a sequence's context are never read: they may hold anything, NaN included.
    What is padding writes nowhere and reads nothing: its slot is negative, its context 0.
    Whatever differs from step to step is read from tensors on the device, never from an argument: so that a launch can be
    recorded in a CUDA graph and replayed. Arguments are addresses, shapes, and which layer.
    Sums are float32, and each result is rounded once.

Attention is flash decoding. A program takes one sequence, one KV head and one share of the context, for all query heads
of the group and all query tokens at once, so keys and values are read from memory once; a second kernel merges the shares.
How large a share is depends on the context, so the grid does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from tiers.arena import Arena

TILE = 64  # tokens that a program takes at a time
MAX_SHARES = 64
LEAST_ROWS = 16  # of a matrix that tensor cores multiply


@triton.jit(do_not_specialize=["width"])  # it differs from batch to batch
def _attend(
    query,  # [tokens, query heads, head_dim]
    blocks,  # one layer of the arena, from its first element
    tables,  # [sequences, width] int32
    starts,  # [sequences] int32
    counts,
    contexts,
    out,  # as `query`, if SHARES is 1; else [sequences, QUERIES, query heads, SHARES, head_dim] float32
    sums,  # [sequences, QUERIES, query heads, SHARES] float32: logarithms of the sums of exponentials
    scaling,
    width,
    slot_stride,
    value_offset,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    SHARES: tl.constexpr,
    TILE: tl.constexpr,
):
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    share = tl.program_id(2)
    count = tl.load(counts + sequence)
    context = tl.load(contexts + sequence)
    start = tl.load(starts + sequence)
    row = tl.arange(0, ROWS)  # query tokens times the heads of the group
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    asked = token < count
    at = (start + token) * (KV_HEADS * GROUP) + head
    dim = tl.arange(0, HEAD_PADDED)
    inside = dim < HEAD
    q = tl.load(
        query + at[:, None] * HEAD + dim[None, :], mask=asked[:, None] & inside[None, :], other=0.0
    )
    seen = tl.where(asked, context - count + token + 1, 0)
    per_share = tl.cdiv(tl.cdiv(context, TILE), SHARES) * TILE
    begin = share * per_share
    end = tl.minimum(begin + per_share, context)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    head_offset = kv_head * (BLOCK_TOKENS * HEAD)
    for first in range(begin, end, TILE):
        position = first + tl.arange(0, TILE)
        there = position < end
        slot = tl.load(
            tables + sequence * width + position // BLOCK_TOKENS, mask=there, other=0
        ).to(tl.int64)
        base = slot * slot_stride + head_offset + (position % BLOCK_TOKENS) * HEAD
        address = blocks + base[:, None] + dim[None, :]
        mask = there[:, None] & inside[None, :]
        keys = tl.load(address, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scaling
        scores = tl.where(position[None, :] < seen[:, None], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        shrink = tl.exp(highest - shift)
        weights = tl.exp(scores - shift[:, None])
        values = tl.load(address + value_offset, mask=mask, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(
            weights.to(values.dtype), values, input_precision="ieee"
        )
        highest = higher
    divisor = tl.where(total > 0, total, 1.0)
    result = acc / divisor[:, None]
    stored = asked[:, None] & inside[None, :]
    if SHARES == 1:
        tl.store(
            out + at[:, None] * HEAD + dim[None, :], result.to(out.dtype.element_ty), mask=stored
        )
    else:
        place = ((sequence * QUERIES + token) * (KV_HEADS * GROUP) + head) * SHARES + share
        tl.store(out + place[:, None] * HEAD + dim[None, :], result, mask=stored)
        tl.store(
            sums + place,
            tl.where(total > 0, highest + tl.log(divisor), -float("inf")),
            mask=asked,
        )


@triton.jit
def _merge(
    parts,  # [sequences, QUERIES, query heads, SHARES, head_dim] float32
    sums,  # [sequences, QUERIES, query heads, SHARES] float32
    starts,  # [sequences] int32
    counts,
    out,  # [tokens, query heads, head_dim]
    QUERY_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    SHARES: tl.constexpr,
):
    sequence = tl.program_id(0)
    token = tl.program_id(1)
    head = tl.program_id(2)
    if token < tl.load(counts + sequence):
        dim = tl.arange(0, HEAD_PADDED)
        inside = dim < HEAD
        share = tl.arange(0, SHARES)
        at = ((sequence * QUERIES + token) * QUERY_HEADS + head) * SHARES + share
        logs = tl.load(sums + at)
        highest = tl.max(logs, 0)
        weights = tl.exp(logs - tl.where(highest == -float("inf"), 0.0, highest))
        values = tl.load(parts + at[:, None] * HEAD + dim[None, :], mask=inside[None, :], other=0.0)
        total = tl.sum(weights, 0)
        result = tl.sum(values * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
        row = (tl.load(starts + sequence) + token) * QUERY_HEADS + head
        tl.store(out + row * HEAD + dim, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _place(
    fused,  # [tokens, query heads + 2 * KV heads, head_dim]: queries, keys, values of a layer
    query,  # [tokens, query heads, head_dim]: written
    blocks,  # one layer of the arena: written
    slots,  # [tokens] int32; negative: nowhere
    positions,  # [tokens] int32
    cosines,  # [positions, head_dim] float32
    sines,
    query_norm,  # [head_dim], or anything where NORMED is false
    key_norm,
    epsilon,
    slot_stride,
    value_offset,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    NORMED: tl.constexpr,
):
    token = tl.program_id(0)
    head = tl.program_id(1)
    half: tl.constexpr = HEAD // 2
    dim = tl.arange(0, HALF_PADDED)
    inside = dim < half
    position = tl.load(positions + token)
    slot = tl.load(slots + token).to(tl.int64)
    source = fused + (token * (QUERY_HEADS + 2 * KV_HEADS) + head) * HEAD + dim
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    if head < QUERY_HEADS + KV_HEADS:
        if NORMED:
            mean = (tl.sum(low * low, 0) + tl.sum(high * high, 0)) / HEAD
            scale = tl.rsqrt(mean + epsilon)
            weight = query_norm
            if head >= QUERY_HEADS:
                weight = key_norm
            low *= scale * tl.load(weight + dim, mask=inside, other=0.0).to(tl.float32)
            high *= scale * tl.load(weight + half + dim, mask=inside, other=0.0).to(tl.float32)
        turn = position.to(tl.int64) * HEAD + dim
        cosine = tl.load(cosines + turn, mask=inside, other=0.0)
        sine = tl.load(sines + turn, mask=inside, other=0.0)
        turned = low * cosine - high * sine
        high = high * cosine + low * sine
        low = turned
    if head < QUERY_HEADS:
        target = query + (token * QUERY_HEADS + head) * HEAD + dim
        tl.store(target, low.to(query.dtype.element_ty), mask=inside)
        tl.store(target + half, high.to(query.dtype.element_ty), mask=inside)
    elif slot >= 0:
        of_kv = (head - QUERY_HEADS) % KV_HEADS
        row = of_kv * BLOCK_TOKENS + position % BLOCK_TOKENS
        place = blocks + slot * slot_stride + row * HEAD + dim
        if head >= QUERY_HEADS + KV_HEADS:
            place += value_offset
        tl.store(place, low.to(blocks.dtype.element_ty), mask=inside)
        tl.store(place + half, high.to(blocks.dtype.element_ty), mask=inside)


@triton.jit
def _add_and_norm(
    hidden,  # [tokens, width]: `delta` is added to it
    delta,
    weight,
    out,
    epsilon,
    width,
    PADDED: tl.constexpr,
    ADDS: tl.constexpr,
):
    at = tl.arange(0, PADDED)
    inside = at < width
    row = tl.program_id(0).to(tl.int64) * width + at
    x = tl.load(hidden + row, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(delta + row, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(hidden.dtype.element_ty)
        tl.store(hidden + row, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
    normed = x * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate(
    both,  # [tokens, 2 * width]: gate, then up
    out,  # [tokens, width]
    width,
    TILE: tl.constexpr,
):
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = at < width
    token = tl.program_id(0).to(tl.int64)
    gate = tl.load(both + 2 * token * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + (2 * token + 1) * width + at, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * width + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _multiply_row(
    x,  # [inner]
    weight,  # [rows, inner]; [2 * rows, inner] if GATED: gate, then up
    bias,  # [rows], or anything where BIASED is false
    out,  # [rows]
    inner,
    rows,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    base = row.to(tl.int64) * inner
    acc = tl.zeros([ROWS, TILE], tl.float32)
    up = tl.zeros([ROWS, TILE], tl.float32)
    for first in range(0, inner, TILE):
        at = first + tl.arange(0, TILE)
        there = at < inner
        mask = inside[:, None] & there[None, :]
        some = tl.load(x + at, mask=there, other=0.0).to(tl.float32)[None, :]
        place = weight + base[:, None] + at[None, :]
        acc += some * tl.load(place, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            below = weight + (row + rows).to(tl.int64)[:, None] * inner + at[None, :]
            up += some * tl.load(below, mask=mask, other=0.0).to(tl.float32)
    result = tl.sum(acc, 1)
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * tl.sum(up, 1)
    if BIASED:
        result += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=inside)


def shares(sequences: int, kv_heads: int, processors: int) -> int:
    """Into how many parts a context is split, so that every processor has two to four programs: a power of two."""
    wanted = max(1, 2 * processors // (sequences * kv_heads))
    return min(MAX_SHARES, 1 << (wanted - 1).bit_length())


def attend(
    query: torch.Tensor,  # [tokens, query_heads, head_dim] contiguous
    arena: Arena,
    layer: int,
    *,
    tables: torch.Tensor,  # [sequences, blocks] int32; so are the following
    starts: torch.Tensor,  # [sequences] index of the first query token
    counts: torch.Tensor,  # [sequences] query tokens; 0 or more, up to `queries`
    contexts: torch.Tensor,  # [sequences] tokens of KV, the query tokens' own included
    queries: int,
    parts: int,  # of `shares`
    scaling: float,
    out: torch.Tensor,  # as `query`; the rows of the sequences' query tokens are written
) -> None:
    """Causal attention of each sequence's last `counts` tokens over its `contexts` tokens of KV, in place."""
    _, query_heads, head_dim = query.shape
    kv_heads = arena.geometry.kv_heads
    group = query_heads // kv_heads
    here = arena.blocks[:, layer]
    padded = max(LEAST_ROWS, triton.next_power_of_2(head_dim))
    into, sums = out, out
    if parts > 1:
        size = (counts.shape[0], queries, query_heads, parts)
        into = torch.empty((*size, head_dim), dtype=torch.float32, device=query.device)
        sums = torch.empty(size, dtype=torch.float32, device=query.device)
    _attend[(counts.shape[0], kv_heads, parts)](
        query,
        here,
        tables,
        starts,
        counts,
        contexts,
        into,
        sums,
        scaling,
        tables.stride(0),
        here.stride(0),
        here.stride(1),
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD=head_dim,
        HEAD_PADDED=padded,
        BLOCK_TOKENS=arena.geometry.block_tokens,
        QUERIES=queries,
        ROWS=max(LEAST_ROWS, triton.next_power_of_2(queries * group)),
        SHARES=parts,
        TILE=TILE,
    )
    if parts > 1:
        _merge[(counts.shape[0], queries, query_heads)](
            into,
            sums,
            starts,
            counts,
            out,
            QUERY_HEADS=query_heads,
            HEAD=head_dim,
            HEAD_PADDED=padded,
            QUERIES=queries,
            SHARES=parts,
        )


def place(
    fused: torch.Tensor,  # [tokens, (query_heads + 2 * kv_heads) * head_dim] of one product
    arena: Arena,
    layer: int,
    *,
    slots: torch.Tensor,  # [tokens] int32; negative: nowhere
    positions: torch.Tensor,  # [tokens] int32
    cosines: torch.Tensor,  # [positions, head_dim] float32
    sines: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,  # of queries and of keys, [head_dim] each
    epsilon: float,
    query: torch.Tensor,  # [tokens, query_heads, head_dim]: written
) -> None:
    """Rotate queries and keys, and write keys and values to their slots."""
    tokens, query_heads, head_dim = query.shape
    here = arena.blocks[:, layer]
    query_norm, key_norm = norms if norms is not None else (cosines, cosines)
    _place[(tokens, query_heads + 2 * arena.geometry.kv_heads)](
        fused,
        query,
        here,
        slots,
        positions,
        cosines,
        sines,
        query_norm,
        key_norm,
        epsilon,
        here.stride(0),
        here.stride(1),
        QUERY_HEADS=query_heads,
        KV_HEADS=arena.geometry.kv_heads,
        HEAD=head_dim,
        HALF_PADDED=triton.next_power_of_2(head_dim // 2),
        BLOCK_TOKENS=arena.geometry.block_tokens,
        NORMED=norms is not None,
        num_warps=1,
    )


def add_and_norm(
    hidden: torch.Tensor,  # [tokens, width]
    delta: torch.Tensor | None,  # is added to `hidden`, in place, first
    weight: torch.Tensor,
    epsilon: float,
) -> torch.Tensor:
    """The root-mean-square norm of the sum. [tokens, width]."""
    tokens, width = hidden.shape
    out = torch.empty_like(hidden)
    _add_and_norm[(tokens,)](
        hidden,
        hidden if delta is None else delta,
        weight,
        out,
        epsilon,
        width,
        PADDED=triton.next_power_of_2(width),
        ADDS=delta is not None,
        num_warps=8,
    )
    return out


def gate(both: torch.Tensor) -> torch.Tensor:
    """silu(left half) times right half."""
    tokens, width = both.shape[0], both.shape[1] // 2
    out = both.new_empty(tokens, width)
    tile = min(1024, triton.next_power_of_2(width))
    _gate[(tokens, triton.cdiv(width, tile))](both, out, width, TILE=tile)
    return out


def multiply_row(
    x: torch.Tensor,  # [1, inner]
    weight: torch.Tensor,  # [rows, inner]; [2 * rows, inner] if gated
    *,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    dtype: torch.dtype | None = None,  # of the result; None: as `x`
) -> torch.Tensor:
    """One token's product with a matrix, at the rate that the matrix is read; gated as `gate` does. [1, rows]."""
    inner = x.shape[1]
    rows = len(weight) // (2 if gated else 1)
    out = x.new_empty(1, rows, dtype=dtype)
    at_once = 2 if gated else 4
    _multiply_row[(triton.cdiv(rows, at_once),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        inner,
        rows,
        BIASED=bias is not None,
        GATED=gated,
        ROWS=at_once,
        TILE=min(1024, triton.next_power_of_2(inner)),
        num_warps=4,
    )
    return out
