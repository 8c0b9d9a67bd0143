"""Everything that numba compiles for the CPU, and nothing else: products with packed weights, attention over pages, and a
whole forward pass of a few tokens, without Python and without the GIL from embedding to logits.

One file, because numba's cache knows a compiled function by its own file only: what it calls elsewhere could change behind
its back. What is compiled here is cached beside this file, or in the user's cache directory where that cannot be written.

Laws
    A token's result does not depend on which tokens it is computed with, nor on the slots that hold its sequence. It may
    depend on the number of threads, by rounding.
    Rows of a block beyond a sequence's context are never read: they may hold anything, NaN included.

Products. The innermost loops are written in LLVM's own vector types: what numba makes of the same loops in Python was 1.5
to 10 times as slow, depending on the number of tokens and the processor. Measured on two cores at load 7 (AMD EPYC with
AVX-512 and, in brackets, AVX2 only), 106 million weights as Q4, ms for one thread: 8 (11) for one token, 13 (14) for 2,
17 (23) for 4, 39 (29) for 8. In float32 they are 424 MB, which this memory takes 40 to 60 ms to read.

Attention. KV is float32, or float16 that is widened a block at a time, in the first-level cache. Flash decoding: every thread walks its share of every sequence's blocks with an online softmax, and the shares
are merged at the end. Blocks are dealt round robin, so threads stay level for any mix of context lengths, and from each
sequence's own start, so what a sequence gets is the same to the bit whoever it is batched with.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

if TYPE_CHECKING:
    from collections.abc import Callable

Array = np.ndarray[Any, Any]

LANES = 16  # rows of a group: one AVX-512 register of float32, or two of AVX2
SHARE = 32  # weights of a row that share a scale, in GGUF's formats


HIGHEST_HALF = np.float32(65504)  # of IEEE 754 binary16; what is larger is stored as this


def processor_has(feature: str) -> bool:
    """Whether this processor has an instruction set, by LLVM's name of it, such as `f16c`."""
    return bool(get_host_cpu_features().get(feature))


class Form(enum.IntEnum):
    F32 = 0
    BF16 = 1
    Q8 = 2
    Q4 = 3


class Matrices(NamedTuple):
    """Every matrix of a model, laid end to end by element type: what compiled code takes."""

    bytes_: Array  # uint8: Q4 and Q8
    halves: Array  # uint16
    floats: Array  # float32
    scales: Array  # float32
    table: Array  # int64 [matrices, 4]: form, rows, first code, first scale


# The innermost loops

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_TOKENS = (4, 2, 1)  # how many are multiplied at a time: as many as registers allow


def _number(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _all(kind: ir.Type, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, LANES), [value] * LANES)


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    nothing = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, nothing, _all(_I32, 0))


def _load(builder: ir.IRBuilder, pointer: ir.Value, kind: ir.Type, at: int) -> ir.Value:
    """LANES elements from the `at`-th behind `pointer` on."""
    place = builder.gep(pointer, [_number(at)])
    vector = builder.load(builder.bitcast(place, ir.VectorType(kind, LANES).as_pointer()))
    vector.align = 1
    return vector


def _fused(builder: ir.IRBuilder, one: ir.Value, other: ir.Value, added: ir.Value) -> ir.Value:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    return builder.call(function, [one, other, added])


def _q4_columns(builder: ir.IRBuilder, codes: ir.Value) -> list[tuple[int, ir.Value]]:
    """(column, its weights as floats) of one share, without scale and least."""
    columns = []
    for k in range(SHARE // 2):
        both = _load(builder, codes, _I8, k * LANES)
        low, high = builder.and_(both, _all(_I8, 15)), builder.lshr(both, _all(_I8, 4))
        columns += [(k, _unsigned(builder, low)), (k + SHARE // 2, _unsigned(builder, high))]
    return columns


def _q8_columns(builder: ir.IRBuilder, codes: ir.Value) -> list[tuple[int, ir.Value]]:
    columns = []
    for k in range(SHARE):
        wide = builder.sext(_load(builder, codes, _I8, k * LANES), ir.VectorType(_I32, LANES))
        columns.append((k, builder.sitofp(wide, _VECTOR)))
    return columns


def _bf16_columns(builder: ir.IRBuilder, codes: ir.Value) -> list[tuple[int, ir.Value]]:
    wide = builder.zext(_load(builder, codes, _I16, 0), ir.VectorType(_I32, LANES))
    return [(0, builder.bitcast(builder.shl(wide, _all(_I32, 16)), _VECTOR))]


def _f32_columns(builder: ir.IRBuilder, codes: ir.Value) -> list[tuple[int, ir.Value]]:
    return [(0, _load(builder, codes, _FLOAT, 0))]


def _unsigned(builder: ir.IRBuilder, small: ir.Value) -> ir.Value:
    return builder.uitofp(builder.zext(small, ir.VectorType(_I32, LANES)), _VECTOR)


@dataclass(frozen=True, slots=True)
class _Step:
    """What one turn of a form's loop reads: `width` columns, in so many code elements, with so many scales."""

    width: int
    codes: int
    scales: int
    columns: Callable[[ir.IRBuilder, ir.Value], list[tuple[int, ir.Value]]]


_STEPS = {
    Form.Q4: _Step(SHARE, SHARE // 2 * LANES, 2, _q4_columns),
    Form.Q8: _Step(SHARE, SHARE * LANES, 1, _q8_columns),
    Form.BF16: _Step(1, LANES, 0, _bf16_columns),
    Form.F32: _Step(1, LANES, 0, _f32_columns),
}


def _product(form: Form, tokens: int) -> Any:
    """out[t, lane] = sum over k of weight[lane, k] * x[t, k], of one group and `tokens` neighbouring tokens.

    Sums are made in one order whatever `tokens` is: as many partial sums, taken in turns, joined in the same way.
    """
    step = _STEPS[form]
    partial_sums = 4 if step.width > 1 else 1

    @intrinsic  # type: ignore[untyped-decorator]
    def product(
        typing: Any, codes: Any, code_at: Any, scales: Any, scale_at: Any, x: Any, x_at: Any,
        x_step: Any, sums: Any, sum_at: Any, sum_step: Any, steps: Any, out: Any, out_at: Any,
        out_step: Any,
    ) -> Any:  # fmt: skip
        number = types.int64
        signature = types.void(
            codes, number, scales, number, x, number, number, sums, number, number, number, out,
            number, number,
        )  # fmt: skip

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def pointer(index: int, kind: ir.Type, at: ir.Value) -> ir.Value:
                array = context.make_array(signature.args[index])(
                    context, builder, arguments[index]
                )
                return builder.gep(builder.bitcast(array.data, kind.as_pointer()), [at])

            kind = {Form.BF16: _I16, Form.F32: _FLOAT}.get(form, _I8)
            first_code = pointer(0, kind, arguments[1])
            first_scale = pointer(2, _FLOAT, arguments[3])
            x_step, sum_step, steps, out_step = (arguments[i] for i in (6, 9, 10, 13))

            def of_token(index: int, at: ir.Value, stride: ir.Value, token: int) -> ir.Value:
                offset = builder.add(at, builder.mul(stride, _number(token)))
                return pointer(index, _FLOAT, offset)

            xs = [of_token(4, arguments[5], x_step, token) for token in range(tokens)]
            sums = [of_token(7, arguments[8], sum_step, token) for token in range(tokens)]
            zero = ir.Constant(_VECTOR, None)
            totals = [cgutils.alloca_once_value(builder, zero) for _ in range(tokens)]
            with cgutils.for_range(builder, steps) as loop:
                at = loop.index
                here = builder.gep(first_code, [builder.mul(at, _number(step.codes))])
                of_x = [builder.gep(x, [builder.mul(at, _number(step.width))]) for x in xs]
                partial: list[list[ir.Value | None]] = [
                    [None] * partial_sums for _ in range(tokens)
                ]
                for turn, (column, weights) in enumerate(step.columns(builder, here)):
                    place = turn % partial_sums
                    for token in range(tokens):
                        value = builder.load(builder.gep(of_x[token], [_number(column)]))
                        vector, before = _splat(builder, value), partial[token][place]
                        if step.scales == 0:
                            before = builder.load(totals[token])
                        if before is None:
                            partial[token][place] = builder.fmul(weights, vector)
                        else:
                            partial[token][place] = _fused(builder, weights, vector, before)
                scale = builder.gep(first_scale, [builder.mul(at, _number(step.scales * LANES))])
                for token in range(tokens):
                    joined = partial[token][0]
                    for more in partial[token][1:]:
                        joined = builder.fadd(joined, more)
                    if step.scales:
                        before = builder.load(totals[token])
                        if step.scales == 2:
                            least = _load(builder, scale, _FLOAT, LANES)
                            summed = builder.load(builder.gep(sums[token], [at]))
                            before = _fused(builder, least, _splat(builder, summed), before)
                        joined = _fused(builder, _load(builder, scale, _FLOAT, 0), joined, before)
                    builder.store(joined, totals[token])
            for token in range(tokens):
                to = of_token(11, arguments[12], out_step, token)
                stored = builder.store(
                    builder.load(totals[token]), builder.bitcast(to, _VECTOR.as_pointer())
                )
                stored.align = 4
            return context.get_dummy_value()

        return signature, generate

    return product


def _rows(form: Form) -> Any:
    """`product` for any number of tokens, compiled: the rows of one group, whose first is `to`."""
    four, two, one = (_product(form, tokens) for tokens in _TOKENS)
    step = _STEPS[form]
    width, per_step = step.width, step.codes
    scales_per_step = step.scales * LANES

    @numba.njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
    def rows(
        codes: Array, code: int, scales: Array, scale: int, x: Array, sums: Array, out: Array, to: int
    ) -> None:  # fmt: skip
        tokens, columns, in_all, shares = x.shape[0], x.shape[1], out.shape[1], sums.shape[1]
        steps = columns // width
        code += to // LANES * steps * per_step
        scale += to // LANES * steps * scales_per_step
        t = 0
        while t < tokens:
            x_at, sum_at, at = t * columns, t * shares, t * in_all + to
            if tokens - t >= 4:
                four(
                    codes,
                    code,
                    scales,
                    scale,
                    x,
                    x_at,
                    columns,
                    sums,
                    sum_at,
                    shares,
                    steps,
                    out,
                    at,
                    in_all,
                )
                t += 4
            elif tokens - t >= 2:
                two(
                    codes,
                    code,
                    scales,
                    scale,
                    x,
                    x_at,
                    columns,
                    sums,
                    sum_at,
                    shares,
                    steps,
                    out,
                    at,
                    in_all,
                )
                t += 2
            else:
                one(
                    codes,
                    code,
                    scales,
                    scale,
                    x,
                    x_at,
                    columns,
                    sums,
                    sum_at,
                    shares,
                    steps,
                    out,
                    at,
                    in_all,
                )
                t += 1

    return rows


_rows_q4, _rows_q8, _rows_bf16, _rows_f32 = map(_rows, (Form.Q4, Form.Q8, Form.BF16, Form.F32))
_Q4, _Q8, _BF16 = int(Form.Q4), int(Form.Q8), int(Form.BF16)


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def multiply(matrices: Matrices, index: int, x: Array, out: Array, threads: int) -> None:
    """out[t, r] = sum over k of matrix[r, k] * x[t, k].

    `x` is [tokens, columns], `out` [tokens, rows rounded up to a whole group], both float32 and contiguous.
    """
    form, rows, code, scale = matrices.table[index]
    tokens, shares = x.shape[0], x.shape[1] // SHARE
    sums = np.zeros((tokens, max(1, shares)), np.float32)
    if form == _Q4:
        for token in range(tokens):
            for share in range(shares):
                total = np.float32(0)
                for k in range(share * SHARE, (share + 1) * SHARE):
                    total += x[token, k]
                sums[token, share] = total
    groups = (rows + LANES - 1) // LANES
    for thread in numba.prange(threads):
        for group in range(groups * thread // threads, groups * (thread + 1) // threads):
            to = group * LANES
            if form == _Q4:
                _rows_q4(matrices.bytes_, code, matrices.scales, scale, x, sums, out, to)
            elif form == _Q8:
                _rows_q8(matrices.bytes_, code, matrices.scales, scale, x, sums, out, to)
            elif form == _BF16:
                _rows_bf16(matrices.halves, code, matrices.scales, scale, x, sums, out, to)
            else:
                _rows_f32(matrices.floats, code, matrices.scales, scale, x, sums, out, to)


# KV in 16 bits

_HALF = ir.HalfType()


@intrinsic  # type: ignore[untyped-decorator]
def _from_half(typing: Any, bits: Any) -> Any:
    """The number that 16 bits stand for (IEEE 754 binary16)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], _HALF), _FLOAT)

    return types.float32(types.uint16), generate


@intrinsic  # type: ignore[untyped-decorator]
def _to_half(typing: Any, number: Any) -> Any:
    """Rounded to nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], _HALF), _I16)

    return types.uint16(types.float32), generate


def _floats(block: Array, rows: int, scratch: Array) -> Array:
    """The first rows of [block_tokens, head_dim] as float32: themselves, or widened into `scratch`."""
    raise NotImplementedError("compiled code only")


@overload(_floats, strict=False)  # type: ignore[untyped-decorator]
def _floats_of(block: Any, rows: Any, scratch: Any) -> Any:
    if block.dtype is types.float32:
        return lambda block, rows, scratch: block

    def widened(block: Array, rows: int, scratch: Array) -> Array:
        for row in range(rows):
            for d in range(block.shape[1]):
                scratch[row, d] = _from_half(block[row, d])
        return scratch

    return widened


def _keep(vector: Array, row: Array) -> None:
    """Store float32 as what the row holds."""
    raise NotImplementedError("compiled code only")


@overload(_keep, strict=False)  # type: ignore[untyped-decorator]
def _keep_in(vector: Any, row: Any) -> Any:
    if row.dtype is types.float32:

        def copied(vector: Array, row: Array) -> None:
            for d in range(row.shape[0]):
                row[d] = vector[d]

        return copied

    def narrowed(vector: Array, row: Array) -> None:
        for d in range(row.shape[0]):
            number = vector[d]
            if number > HIGHEST_HALF:
                number = HIGHEST_HALF
            elif number < -HIGHEST_HALF:
                number = -HIGHEST_HALF
            row[d] = _to_half(number)  # NaN stays NaN

    return narrowed


# Attention

# Sums in any order, fused; but infinities keep their meaning: the maximum of an empty share is -inf.
FAST_BUT_INFINITE = {"reassoc", "contract", "arcp", "nsz", "afn"}


def _mixer(vectors: int) -> Any:
    """share[at:] = share[at:] * shrink + sum over rows of parts[row] * values[row, at:], of so many vectors, in registers."""

    @intrinsic  # type: ignore[untyped-decorator]
    def mix(
        typing: Any, parts: Any, rows: Any, values: Any, row_step: Any, share: Any, at: Any, shrink: Any
    ) -> Any:  # fmt: skip
        number = types.int64
        signature = types.void(parts, number, values, number, share, number, types.float32)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def data(index: int) -> ir.Value:
                array = context.make_array(signature.args[index])(
                    context, builder, arguments[index]
                )
                return builder.bitcast(array.data, _FLOAT.as_pointer())

            rows, row_step, at, shrink = (arguments[index] for index in (1, 3, 5, 6))
            parts, values = data(0), builder.gep(data(2), [at])
            to = builder.gep(data(4), [at])
            factor = _splat(builder, shrink)
            sums = [
                cgutils.alloca_once_value(
                    builder, builder.fmul(_load(builder, to, _FLOAT, k * LANES), factor)
                )
                for k in range(vectors)
            ]
            with cgutils.for_range(builder, rows) as loop:
                part = _splat(builder, builder.load(builder.gep(parts, [loop.index])))
                row = builder.gep(values, [builder.mul(loop.index, row_step)])
                for k, sum_ in enumerate(sums):
                    value = _load(builder, row, _FLOAT, k * LANES)
                    builder.store(_fused(builder, part, value, builder.load(sum_)), sum_)
            for k, sum_ in enumerate(sums):
                place = builder.gep(to, [_number(k * LANES)])
                stored = builder.store(
                    builder.load(sum_), builder.bitcast(place, _VECTOR.as_pointer())
                )
                stored.align = 4
            return context.get_dummy_value()

        return signature, generate

    return mix


_mix_four, _mix_one = _mixer(4), _mixer(1)


@numba.njit(nogil=True, fastmath=FAST_BUT_INFINITE, error_model="numpy")  # type: ignore[untyped-decorator]
def _mix(parts: Array, rows: int, values: Array, share: Array, shrink: np.float32) -> None:
    """share = share * shrink + the first rows of values [block_tokens, head_dim], weighted by `parts`."""
    size, d = share.shape[0], 0
    while size - d >= 4 * LANES:
        _mix_four(parts, rows, values, size, share, d, shrink)
        d += 4 * LANES
    while size - d >= LANES:
        _mix_one(parts, rows, values, size, share, d, shrink)
        d += LANES
    while d < size:
        total = share[d] * shrink
        for row in range(rows):
            total += parts[row] * values[row, d]
        share[d] = total
        d += 1


@intrinsic  # type: ignore[untyped-decorator]
def _from_bits(typing: Any, bits: Any) -> Any:
    """The float32 that 32 bits stand for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.int32), generate


@numba.njit(nogil=True, fastmath=FAST_BUT_INFINITE, error_model="numpy")  # type: ignore[untyped-decorator]
def _exponential(x: np.float32) -> np.float32:
    """e^x for x <= 0, in operations that LLVM makes vectors of: 2^n times Taylor's polynomial of what is left.

    Within 3e-7 of it, relative; below e^-87 it is that.
    """
    x = max(x, np.float32(-87))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)  # ln 2 in two parts
    e = np.float32(1 / 5040)
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        e = e * r + np.float32(factor)
    return np.float32(e * _from_bits((np.int32(n) + np.int32(127)) << np.int32(23)))


@numba.njit(  # type: ignore[untyped-decorator]
    parallel=True, fastmath=FAST_BUT_INFINITE, nogil=True, cache=True, error_model="numpy"
)
def attend(
    query: Array,
    blocks: Array,  # [slots, layers, 2, kv_heads, block_tokens, head_dim] float32, or float16 as uint16
    layer: int,
    tables: Array,
    starts: Array,
    counts: Array,
    contexts: Array,
    scaling: np.float32,
    out: Array,
    threads: int,
) -> None:
    kv_heads, block_tokens, head_dim = blocks.shape[3], blocks.shape[4], blocks.shape[5]
    tokens, query_heads = query.shape[0], query.shape[1]
    group = query_heads // kv_heads
    # Each thread's share: unnormalised output, highest score so far, sum of the exponentials so far.
    shares = np.zeros((threads, tokens, query_heads, head_dim), np.float32)
    highest = np.full((threads, tokens, query_heads), -np.inf, np.float32)
    weight = np.zeros((threads, tokens, query_heads), np.float32)

    for thread in numba.prange(threads):
        scores = np.empty(block_tokens, np.float32)
        wide = np.empty((2, block_tokens, head_dim), np.float32)
        for sequence in range(tables.shape[0]):
            context, count, start = contexts[sequence], counts[sequence], starts[sequence]
            for kv_head in range(kv_heads):
                first = (thread + kv_head) % threads
                for block in range(first, (context + block_tokens - 1) // block_tokens, threads):
                    slot = tables[sequence, block]
                    used = min(block_tokens, context - block * block_tokens)
                    keys = _floats(blocks[slot, layer, 0, kv_head], used, wide[0])
                    values = _floats(blocks[slot, layer, 1, kv_head], used, wide[1])
                    for token in range(start, start + count):
                        # A token sees itself and what came before it.
                        seen = context - count + 1 + token - start - block * block_tokens
                        rows = min(block_tokens, seen)
                        if rows <= 0:
                            continue
                        for head in range(kv_head * group, (kv_head + 1) * group):
                            vector = query[token, head]
                            before = highest[thread, token, head]
                            top = before
                            for row in range(rows):
                                score = np.float32(0)
                                for d in range(head_dim):
                                    score += vector[d] * keys[row, d]
                                score *= scaling
                                scores[row] = score
                                top = max(top, score)
                            shrink = np.exp(before - top)
                            total = weight[thread, token, head] * shrink
                            for row in range(rows):
                                scores[row] = _exponential(scores[row] - top)
                                total += scores[row]
                            _mix(
                                scores,
                                rows,
                                values,
                                shares[thread, token, head],
                                np.float32(shrink),
                            )
                            highest[thread, token, head] = top
                            weight[thread, token, head] = total

    for sequence in range(tables.shape[0]):
        for token in range(starts[sequence], starts[sequence] + counts[sequence]):
            for head in range(query_heads):
                top = highest[0, token, head]
                for thread in range(1, threads):
                    top = max(top, highest[thread, token, head])
                total = np.float32(0)
                result = out[token, head]
                for d in range(head_dim):
                    result[d] = 0
                for thread in range(threads):
                    # A thread without a block of this sequence has -inf here, and so no part in it.
                    part = np.exp(highest[thread, token, head] - top)
                    total += part * weight[thread, token, head]
                    for d in range(head_dim):
                        result[d] += part * shares[thread, token, head, d]
                for d in range(head_dim):
                    result[d] /= total


# Attention of prompts, in bfloat16


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc] # noqa: SLF001 (llvmlite has no name for it)
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()  # noqa: SLF001
_WORDS = ir.VectorType(_I32, LANES)  # each a pair of bfloat16, the first one lower
_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)
AT_ONCE = 8  # products that share a vector of the other side
_KEYS = 32  # tokens of a round: a round's scores of a tile stay in the first-level cache


def _pairs_added(
    builder: ir.IRBuilder, total: ir.Value, one: ir.Value, other: ir.Value
) -> ir.Value:
    """total[lane] + one[lane].first * other[lane].first + one[lane].second * other[lane].second, in float32."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR, _PAIRS, _PAIRS])
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    pairs = (builder.bitcast(each, _PAIRS) for each in (one, other))
    return builder.call(function, [total, *pairs])


@intrinsic  # type: ignore[untyped-decorator]
def _pair_products(
    typing: Any, lanes: Any, lane_at: Any, words: Any, first: Any, word_step: Any, pair_step: Any,
    pairs: Any, out: Any, out_at: Any, out_step: Any, factor: Any,
) -> Any:  # fmt: skip
    """out[k] = out[k] * factor + sum over p of lanes[p] . words[first + k * word_step + p * pair_step], of `AT_ONCE` k.

    `lanes` is [pairs, LANES] from element `lane_at` on; row k of `out`, float32, is the `LANES` from out_at + k * out_step on.
    `factor` is one for each lane; where it is None, `out` is not read.
    """
    number = types.int64
    signature = types.void(
        lanes, number, words, number, number, number, number, out, number, number, factor
    )  # fmt: skip
    fresh = isinstance(factor, types.NoneType)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def data(index: int, kind: ir.Type) -> ir.Value:
            array = context.make_array(signature.args[index])(context, builder, arguments[index])
            return builder.bitcast(array.data, kind.as_pointer())

        def vector(pointer: ir.Value, at: ir.Value, kind: ir.Type) -> ir.Value:
            return builder.bitcast(builder.gep(pointer, [at]), kind.as_pointer())

        def read(place: ir.Value) -> ir.Value:
            loaded = builder.load(place)
            loaded.align = 4
            return loaded

        first, word_step, pair_step, pairs = (arguments[index] for index in (3, 4, 5, 6))
        lanes = builder.gep(data(0, _I32), [arguments[1]])
        words, out = builder.gep(data(2, _I32), [first]), data(7, _FLOAT)
        rows = [
            vector(out, builder.add(arguments[8], builder.mul(arguments[9], _number(k))), _VECTOR)
            for k in range(AT_ONCE)
        ]
        if fresh:
            begins = [ir.Constant(_VECTOR, None)] * AT_ONCE
        else:
            by = read(vector(data(10, _FLOAT), _number(0), _VECTOR))
            begins = [builder.fmul(read(row), by) for row in rows]
        totals = [cgutils.alloca_once_value(builder, begin) for begin in begins]
        starts = [builder.gep(words, [builder.mul(word_step, _number(k))]) for k in range(AT_ONCE)]
        with cgutils.for_range(builder, pairs) as loop:
            shared = read(vector(lanes, builder.mul(loop.index, _number(LANES)), _WORDS))
            step = builder.mul(loop.index, pair_step)
            for total, start in zip(totals, starts, strict=True):
                word = builder.load(builder.gep(start, [step]))
                added = _pairs_added(builder, builder.load(total), shared, _splat(builder, word))
                builder.store(added, total)
        for row, total in zip(rows, totals, strict=True):
            builder.store(builder.load(total), row).align = 4
        return context.get_dummy_value()

    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def _pair(typing: Any, first: Any, second: Any) -> Any:
    """Two float32 as bfloat16, to nearest, ties to even, in one word: the first is its lower half."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low, high = (
            builder.zext(builder.bitcast(builder.fptrunc(number, _BFloat()), _I16), _I32)
            for number in arguments
        )
        return builder.or_(low, builder.shl(high, ir.Constant(_I32, 16)))

    return types.uint32(types.float32, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _pack(typing: Any, blocks: Any, at: Any, other: Any, words: Any, to: Any) -> Any:
    """words[to + k] = elements 2k and 2k + 1 of the `AT_ONCE` from `at` on; or, with `other`, element k of each, for `AT_ONCE` k.

    Rounded as by `_pair`. `blocks` holds float32, or float16 as uint16.
    """
    number = types.int64
    signature = types.void(blocks, number, other, words, number)
    element = _FLOAT if blocks.dtype is types.float32 else _HALF
    alone = isinstance(other, types.NoneType)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def data(index: int, kind: ir.Type) -> ir.Value:
            array = context.make_array(signature.args[index])(context, builder, arguments[index])
            return builder.bitcast(array.data, kind.as_pointer())

        def rounded(at: ir.Value) -> ir.Value:
            place = builder.gep(data(0, element), [at])
            kind = ir.VectorType(element, AT_ONCE)
            loaded = builder.load(builder.bitcast(place, kind.as_pointer()))
            loaded.align = 2
            if element is _HALF:
                loaded = builder.fpext(loaded, ir.VectorType(_FLOAT, AT_ONCE))
            short = builder.fptrunc(loaded, ir.VectorType(_BFloat(), AT_ONCE))
            return builder.bitcast(short, ir.VectorType(_I16, AT_ONCE))

        pairs = rounded(arguments[1])
        if not alone:
            order = [k + side * AT_ONCE for k in range(AT_ONCE) for side in range(2)]
            kind = ir.VectorType(_I32, 2 * AT_ONCE)
            pairs = builder.shuffle_vector(pairs, rounded(arguments[2]), ir.Constant(kind, order))
        place = builder.gep(data(3, _I32), [arguments[4]])
        place = builder.bitcast(place, pairs.type.as_pointer())
        builder.store(pairs, place).align = 4
        return context.get_dummy_value()

    return signature, generate


@numba.njit(nogil=True, fastmath=FAST_BUT_INFINITE, error_model="numpy")  # type: ignore[untyped-decorator]
def _power(x: np.float32) -> np.float32:
    """2^x for x <= 0, as `_exponential`, within 4e-6: it becomes a bfloat16. Below 2^-126 it is that."""
    x = max(x, np.float32(-126))
    n = np.floor(x + np.float32(0.5))
    r = x - n
    e = np.float32(0.0013333558)  # ln 2 to the fifth, by 5!
    for factor in (0.009618129, 0.05550411, 0.24022651, 0.6931472, 1.0):
        e = e * r + np.float32(factor)
    return np.float32(e * _from_bits((np.int32(n) + np.int32(127)) << np.int32(23)))


def in_pairs(weight: Array) -> Array:
    """A matrix for `multiply_prompt`, of one whose bits these are: uint16 [rows, columns] of bfloat16.

    uint32 [rows in whole groups, by `LANES`; pairs; LANES]: lane by lane the rows of a group, zero where there is none.
    """
    rows, columns = weight.shape
    groups = -(-rows // LANES)
    padded = np.zeros((groups * LANES, columns), np.uint16)
    padded[:rows] = weight
    words = padded.view(np.uint32).reshape(groups, LANES, columns // 2)
    return np.ascontiguousarray(words.transpose(0, 2, 1))


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def multiply_prompt(matrix: Array, x: Array, words: Array, out: Array, threads: int) -> None:
    """out[t, r] = sum over k of matrix[r, k] * x[t, k], of bfloat16, summed in float32 in the order of k.

    For processors with AVX512-BF16. `matrix` is as `in_pairs` makes it, `x` float32 [tokens, columns], whose columns are a
    multiple of `AT_ONCE`; `out` is float32 [tokens in whole `AT_ONCE`, rows in whole groups], and `words` room for
    `x` in pairs: uint32, as many tokens, of any length. What a token's row becomes depends on no other's.
    """
    groups, pairs = matrix.shape[0], matrix.shape[1]
    tokens, columns = x.shape
    stored, padded = out.shape[1], out.shape[0]
    for thread in numba.prange(threads):
        for token in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            for k in range(0, columns, AT_ONCE):
                _pack(x, token * columns + k, None, words, token * pairs + k // 2)
    words[tokens * pairs : padded * pairs] = 0
    for thread in numba.prange(threads):
        for group in range(groups * thread // threads, groups * (thread + 1) // threads):
            for token in range(0, padded, AT_ONCE):
                _pair_products(
                    matrix, group * pairs * LANES, words, token * pairs, pairs, 1, pairs,
                    out, token * stored + group * LANES, stored, None,
                )  # fmt: skip


def pairs_of(context: int, kv_heads: int, head_dim: int) -> int:
    """How many words `attend_prompt` takes to hold so many tokens' keys and values in bfloat16."""
    return kv_heads * -(-context // _KEYS) * _KEYS * head_dim


@numba.njit(  # type: ignore[untyped-decorator]
    parallel=True, fastmath=FAST_BUT_INFINITE, nogil=True, cache=True, error_model="numpy"
)
def attend_prompt(
    query: Array,  # [count, query_heads, head_dim] the last tokens of one sequence
    blocks: Array,  # as of `attend`
    layer: int,
    table: Array,  # int64 [blocks]
    context: int,
    scaling: np.float32,
    pairs: Array,  # uint32, of `pairs_of` this context or a longer one: what is in it before and after is nobody's
    out: Array,  # as `query`
    threads: int,
) -> None:
    """Causal attention in bfloat16, summed in float32. For processors with AVX512-BF16; head_dim is a multiple of `AT_ONCE`.

    `pairs` is the caller's: made anew in each layer it would cost as much as 16 tokens' attention, in pages that the kernel
    clears.

    A tile is one head of `LANES` tokens, and a lane one of them: nothing is summed across lanes, and nothing that a lane does
    depends on the others or on where its tile begins.
    """
    count, query_heads, size = query.shape
    layers, kv_heads, block_tokens = blocks.shape[1], blocks.shape[3], blocks.shape[4]
    group, past, halves = query_heads // kv_heads, context - count, size // 2
    rounds = (context + _KEYS - 1) // _KEYS
    padded = rounds * _KEYS
    words = kv_heads * padded * halves
    # Pairs of neighbouring elements, and pairs of neighbouring tokens.
    keys = pairs[:words].reshape(kv_heads, padded, halves)
    values = pairs[words : 2 * words].reshape(kv_heads, padded // 2, size)
    between = block_tokens * size  # elements from one head's tokens of a block to the next one's
    of_values = kv_heads * between  # behind the keys
    for thread in numba.prange(threads):
        for job in range(
            kv_heads * rounds * thread // threads, kv_heads * rounds * (thread + 1) // threads
        ):
            head, first = job % kv_heads, job // kv_heads * _KEYS
            even = np.int64(0)  # where the values of the last even token begin
            for token in range(first, first + _KEYS):
                if token >= context:
                    keys[head, token] = 0  # its score is masked: finite values will do
                    if token % 2 == 0:
                        values[head, token // 2] = 0
                    continue
                slot, row = table[token // block_tokens], token % block_tokens
                at = (slot * layers + layer) * 2 * of_values + head * between + row * size
                to = (head * padded + token) * halves
                for d in range(0, size, AT_ONCE):
                    _pack(blocks, at + d, None, keys, to + d // 2)
                at += of_values
                if token % 2 == 0:
                    even = at
                    if token + 1 < context:
                        continue  # with the next one
                to = (head * padded + token) // 2 * size
                for d in range(0, size, AT_ONCE):
                    _pack(blocks, even + d, at + d, values, to + d)

    tiles = (count + LANES - 1) // LANES
    factor = np.float32(scaling * np.float32(1.44269504))  # powers of two are cheaper
    for thread in numba.prange(threads):
        asked = np.empty((halves, LANES), np.uint32)
        scores = np.empty((_KEYS, LANES), np.float32)
        parts = np.empty((_KEYS // 2, LANES), np.uint32)
        mixed = np.empty((size, LANES), np.float32)
        top, before, total, shrink = (
            np.empty(LANES, np.float32),
            np.empty(LANES, np.float32),
            np.empty(LANES, np.float32),
            np.empty(LANES, np.float32),
        )
        for job in range(thread, tiles * query_heads, threads):
            # The last tiles see most: they come first, so that threads end together.
            start, head = (tiles - 1 - job // query_heads) * LANES, job % query_heads
            kv_head = head // group
            for lane in range(LANES):
                token = min(start + lane, count - 1)
                for d in range(halves):
                    asked[d, lane] = _pair(
                        query[token, head, 2 * d] * factor, query[token, head, 2 * d + 1] * factor
                    )
            mixed[:] = 0
            top[:] = -np.inf
            total[:] = 0
            for first in range(0, min(past + start + LANES, context), _KEYS):
                for token in range(0, _KEYS, AT_ONCE):
                    at = (kv_head * padded + first + token) * halves
                    _pair_products(
                        asked, 0, keys, at, halves, 1, halves, scores, token * LANES, LANES, None
                    )
                if first + _KEYS > past + start + 1:
                    for token in range(_KEYS):
                        for lane in range(LANES):
                            if first + token > past + start + lane:
                                scores[token, lane] = -np.inf
                for lane in range(LANES):
                    before[lane] = top[lane]
                for token in range(_KEYS):
                    for lane in range(LANES):
                        top[lane] = max(top[lane], scores[token, lane])
                for lane in range(LANES):
                    shrink[lane] = _power(before[lane] - top[lane])
                    total[lane] *= shrink[lane]
                for pair in range(_KEYS // 2):
                    for lane in range(LANES):
                        one = _power(scores[2 * pair, lane] - top[lane])
                        other = _power(scores[2 * pair + 1, lane] - top[lane])
                        total[lane] += one + other
                        parts[pair, lane] = _pair(one, other)
                for d in range(0, size, AT_ONCE):
                    at = (kv_head * padded + first) // 2 * size + d
                    _pair_products(
                        parts, 0, values, at, 1, size, _KEYS // 2, mixed, d * LANES, LANES, shrink
                    )
            for lane in range(min(LANES, count - start)):
                for d in range(size):
                    out[start + lane, head, d] = mixed[d, lane] / total[lane]


# A forward pass


class Net(NamedTuple):
    """A decoder of the Llama family: what `forward` computes with. All float32 and contiguous but the counts."""

    matrices: Matrices  # layer by layer q k v, o, gate up, down; then the head's
    embedding: Array  # [vocabulary, hidden]
    norms: Array  # [2 * layers + 1, hidden]: before attention, before the MLP, ...; at last before the head
    biases: Array  # [layers, rows of q k v], or [0, 0]
    head_norms: Array  # [2 * layers, head_dim]: q, k, ...; or [0, 0]
    cosines: Array  # [positions, head_dim]
    sines: Array  # [positions, head_dim]
    query_heads: int
    epsilon: float
    scaling: float


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _whole(rows: int) -> int:
    """Rounded up to a whole group."""
    return (rows + LANES - 1) // LANES * LANES


@numba.njit(nogil=True, fastmath=FAST_BUT_INFINITE, error_model="numpy")  # type: ignore[untyped-decorator]
def _normalise(x: Array, weight: Array, epsilon: float, out: Array) -> None:
    """RMS norm of one vector."""
    squares = np.float32(0)
    for i in range(x.shape[0]):
        squares += x[i] * x[i]
    factor = np.float32(1 / np.sqrt(squares / np.float32(x.shape[0]) + np.float32(epsilon)))
    for i in range(x.shape[0]):
        out[i] = weight[i] * (x[i] * factor)


@numba.njit(nogil=True, fastmath=FAST_BUT_INFINITE, error_model="numpy")  # type: ignore[untyped-decorator]
def _turn(x: Array, cosine: Array, sine: Array, out: Array) -> None:
    """Rotary embedding of one head: pairs are half a head apart."""
    half = x.shape[0] // 2
    for i in range(half):
        out[i] = x[i] * cosine[i] - x[i + half] * sine[i]
        out[i + half] = x[i + half] * cosine[i + half] + x[i] * sine[i + half]


@numba.njit(nogil=True, fastmath=FAST_BUT_INFINITE, error_model="numpy")  # type: ignore[untyped-decorator]
def _place(
    net: Net, layer: int, of_token: Array, position: int, query: Array, block: Array, row: int
) -> None:
    """One token's rows of q, k and v: turned, q into `query` [heads, head_dim], k and v into their row of a block.

    `block` is [2, kv_heads, block_tokens, head_dim].
    """
    kv_heads, size = block.shape[1], block.shape[3]
    cosine, sine = net.cosines[position], net.sines[position]
    normed, turned = np.empty(size, np.float32), np.empty(size, np.float32)
    for head in range(net.query_heads + kv_heads):
        vector = of_token[head * size : (head + 1) * size]
        is_key = head >= net.query_heads
        if net.head_norms.shape[0]:
            _normalise(vector, net.head_norms[2 * layer + is_key], net.epsilon, normed)
            vector = normed
        if is_key:
            _turn(vector, cosine, sine, turned)
            _keep(turned, block[0, head - net.query_heads, row])
        else:
            _turn(vector, cosine, sine, query[head])
    values = of_token[(net.query_heads + kv_heads) * size : (net.query_heads + 2 * kv_heads) * size]
    for head in range(kv_heads):
        _keep(values[head * size : (head + 1) * size], block[1, head, row])


@numba.njit(nogil=True, cache=True, fastmath=FAST_BUT_INFINITE, error_model="numpy")  # type: ignore[untyped-decorator]
def add_and_norm(state: Array, change: Array, weight: Array, epsilon: float, out: Array) -> None:
    """state += change, [tokens, hidden] each, and its RMS norm into `out`. No change at all may be [0, hidden]."""
    for t in range(state.shape[0]):
        if change.shape[0]:
            for i in range(state.shape[1]):
                state[t, i] += change[t, i]
        _normalise(state[t], weight, epsilon, out[t])


@numba.njit(nogil=True, fastmath=FAST_BUT_INFINITE, error_model="numpy")  # type: ignore[untyped-decorator]
def _gated(gate: np.float32, up: np.float32) -> np.float32:
    """silu(gate) * up."""
    e = _exponential(-abs(gate))
    return np.float32(gate * ((np.float32(1) if gate >= 0 else e) / (np.float32(1) + e)) * up)


@numba.njit(  # type: ignore[untyped-decorator]
    parallel=True, fastmath=FAST_BUT_INFINITE, nogil=True, cache=True, error_model="numpy"
)
def gate(both: Array, out: Array, threads: int) -> None:
    """out = silu(gates) * ups: [tokens, inner], of `both`, [tokens, gates, then ups, then perhaps more]."""
    tokens, inner = out.shape
    for thread in numba.prange(threads):
        for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            for i in range(inner):
                out[t, i] = _gated(both[t, i], both[t, inner + i])


@numba.njit(nogil=True, cache=True, fastmath=FAST_BUT_INFINITE, error_model="numpy")  # type: ignore[untyped-decorator]
def place(
    net: Net,
    layer: int,
    mixed: Array,  # [tokens, rows of q k v or more], without biases
    positions: Array,
    slots: Array,
    rows: Array,
    blocks: Array,
    query: Array,  # [tokens, query_heads, head_dim]
) -> None:
    """One layer's queries into `query`, its keys and values into the blocks. Adds the biases to `mixed`."""
    for t in range(mixed.shape[0]):
        if net.biases.shape[0]:
            for i in range(net.biases.shape[1]):
                mixed[t, i] += net.biases[layer, i]
        _place(net, layer, mixed[t], positions[t], query[t], blocks[slots[t], layer], rows[t])


@numba.njit(nogil=True, cache=True, fastmath=FAST_BUT_INFINITE, error_model="numpy")  # type: ignore[untyped-decorator]
def forward(
    net: Net,
    blocks: Array,  # as of `attend`
    tokens: Array,  # int64 [tokens], as all that follow
    positions: Array,
    slots: Array,  # where each token's KV goes
    rows: Array,
    tables: Array,  # as of `attend`
    starts: Array,
    counts: Array,
    contexts: Array,
    sampled: Array,  # [samples] which tokens' logits are wanted
    logits: Array,  # float32 [samples, vocabulary rounded up to a whole group]
    threads: int,
) -> None:
    """Write these tokens' KV into the blocks, and the logits of those that are sampled into `logits`."""
    count, hidden = tokens.shape[0], net.embedding.shape[1]
    layers, kv_heads, size = blocks.shape[1], blocks.shape[3], blocks.shape[5]
    heads = net.query_heads
    inner = net.matrices.table[2, 1] // 2  # of the MLP

    state = np.empty((count, hidden), np.float32)
    for t in range(count):
        state[t] = net.embedding[tokens[t]]
    normed = np.empty((count, hidden), np.float32)
    mixed = np.empty((count, _whole((heads + 2 * kv_heads) * size)), np.float32)
    query = np.empty((count, heads, size), np.float32)
    attended = np.empty((count, heads, size), np.float32)
    change = np.empty((count, _whole(hidden)), np.float32)
    gates = np.empty((count, _whole(2 * inner)), np.float32)
    active = np.empty((count, inner), np.float32)

    for layer in range(layers):
        for t in range(count):
            _normalise(state[t], net.norms[2 * layer], net.epsilon, normed[t])
        multiply(net.matrices, 4 * layer, normed, mixed, threads)
        place(net, layer, mixed, positions, slots, rows, blocks, query)
        attend(
            query, blocks, layer, tables, starts, counts, contexts, np.float32(net.scaling),
            attended, threads,
        )  # fmt: skip
        multiply(
            net.matrices, 4 * layer + 1, attended.reshape(count, heads * size), change, threads
        )
        for t in range(count):
            for i in range(hidden):
                state[t, i] += change[t, i]
            _normalise(state[t], net.norms[2 * layer + 1], net.epsilon, normed[t])
        multiply(net.matrices, 4 * layer + 2, normed, gates, threads)
        for t in range(count):
            for i in range(inner):
                active[t, i] = _gated(gates[t, i], gates[t, inner + i])
        multiply(net.matrices, 4 * layer + 3, active, change, threads)
        for t in range(count):
            for i in range(hidden):
                state[t, i] += change[t, i]

    last = np.empty((sampled.shape[0], hidden), np.float32)
    for n in range(sampled.shape[0]):
        _normalise(state[sampled[n]], net.norms[2 * layers], net.epsilon, last[n])
    multiply(net.matrices, 4 * layers, last, logits, threads)
