"""Compile every Triton kernel for an H100, which needs no GPU: a process of its own, as kernels are compiled or interpreted.

python -m tests.engine.compiling
"""

from __future__ import annotations

import warnings
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine import kernels_cuda as kernels

HOPPER = GPUTarget("cuda", 90, 32)
X, F, I, L = "*bf16", "*fp32", "*i32", "i64"  # noqa: E741
ATTEND = {
    "KV_HEADS": 8,
    "GROUP": 4,
    "HEAD": 128,
    "HEAD_PADDED": 128,
    "BLOCK_TOKENS": 32,
    "TILE": 64,
}
PLACE = {"QUERY_HEADS": 32, "KV_HEADS": 8, "HEAD": 128, "HALF_PADDED": 64, "BLOCK_TOKENS": 32}
SIZES = ["fp32", "i32", L, L]
KERNELS: list[tuple[Any, list[str], dict[str, int]]] = [
    (
        kernels._attend,
        [X, X, I, I, I, I, F, F, *SIZES],
        ATTEND | {"QUERIES": 1, "ROWS": 16, "SHARES": 64},
    ),
    (
        kernels._attend,
        [X, X, I, I, I, I, X, X, *SIZES],
        ATTEND | {"QUERIES": 16, "ROWS": 64, "SHARES": 1},
    ),
    (
        kernels._merge,
        [F, F, I, I, X],
        {"QUERY_HEADS": 32, "HEAD": 128, "HEAD_PADDED": 128, "QUERIES": 16, "SHARES": 64},
    ),
    (kernels._place, [X, X, X, I, I, F, F, X, X, "fp32", L, L], PLACE | {"NORMED": True}),
    (kernels._place, [X, X, X, I, I, F, F, F, F, "fp32", L, L], PLACE | {"NORMED": False}),
    (kernels._add_and_norm, [X, X, X, X, "fp32", "i32"], {"PADDED": 4096, "ADDS": True}),
    (kernels._add_and_norm, [X, X, X, X, "fp32", "i32"], {"PADDED": 4096, "ADDS": False}),
    (kernels._gate, [X, X, "i32"], {"TILE": 1024}),
    (
        kernels._multiply_row,
        [X, X, X, X, "i32", "i32"],
        {"BIASED": True, "GATED": False, "ROWS": 4, "TILE": 1024},
    ),
    (
        kernels._multiply_row,
        [X, X, X, F, "i32", "i32"],
        {"BIASED": False, "GATED": True, "ROWS": 2, "TILE": 1024},
    ),
]


def main() -> None:
    warnings.simplefilter("ignore")  # of a Triton newer than torch's own, about its defaults
    for kernel, types, constants in KERNELS:
        given = iter(types)
        signature = {
            each.name: "constexpr" if each.is_constexpr else next(given) for each in kernel.params
        }
        names = list(signature)
        compiled = triton.compile(
            ASTSource(
                fn=kernel,
                signature=signature,
                constexprs={(names.index(name),): value for name, value in constants.items()},
                attrs={},
            ),
            target=HOPPER,
        )
        print(f"{kernel.__name__}: {len(compiled.asm['cubin'])} bytes")


if __name__ == "__main__":
    main()
