"""The campaigns' model, as arithmetic: KV rows and next ids are a hash chain over every token so far. Pure.

Row i holds WORDS float32 numbers, all of them functions of state s(i); s(i) follows from the *bits* of row i-1 and
token i. The next id follows from every bit of every row and from where each row stands. So one wrong, stale or missing
bit of KV anywhere changes what the model says, in one token with odds of 52 in 53, in eight with near certainty.

`answer` computes from tokens alone what the model must say: the oracle lives in the test's process, never in the
daemon's. Answers are letters, one token each, so their text shows the ids exactly.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

import numpy as np

from tests.fakes import END, START

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiers.block import TokenIds

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 8
WORDS = LAYERS * 2 * KV_HEADS * HEAD_DIM  # numbers in one row
VOCABULARY = START + 2
MAX_CONTEXT = 4096

_PRIME = 16_777_213  # below 2**24: exact in float32
_EXACT = 1 << 24
_FACTORS = np.array([2 * (j * 7919 % 65_521) + 1 for j in range(WORDS)], dtype=np.uint64)
_ADDENDS = np.array([j * 104_729 + 1 for j in range(WORDS)], dtype=np.uint64)
_FACTOR, _ADDEND = int(_FACTORS[0]), int(_ADDENDS[0])
# Odd, so that no change of a single bit is ever multiplied away; different everywhere, so that order matters.
_WEIGHTS = (2 * np.arange(MAX_CONTEXT * WORDS, dtype=np.uint64) + 1).reshape(MAX_CONTEXT, WORDS)
_LETTERS = string.ascii_letters.encode()
_IS_LETTER = frozenset(_LETTERS)  # a prompt may end in a control token, which is no byte
_GOLDEN = 0x9E37_79B9_7F4A_7C15


def states(link: int, tokens: Sequence[int]) -> np.ndarray:
    """The states of `tokens`; `link` is what the row before them begins with, 0 if there is none."""
    out = []
    for token in tokens:
        state = (link * 31 + token * 7919 + 12_345) % _PRIME
        out.append(state)
        link = (state * _FACTOR + _ADDEND) % _EXACT
    return np.array(out, dtype=np.uint64)


def link_of(row: np.ndarray) -> int:
    """What a row begins with. A number that no state gives (a damaged one) still gives a link, a wrong one."""
    first = float(row[0])
    return int(first) if first.is_integer() else int(row[:1].view(np.uint32)[0])


def rows(link: int, tokens: Sequence[int]) -> np.ndarray:
    """KV rows [tokens, WORDS] in float32."""
    of = states(link, tokens)
    return ((of[:, None] * _FACTORS + _ADDENDS) % _EXACT).astype(np.float32)


def total(bits: np.ndarray) -> int:
    """The sum over all rows [tokens, WORDS] of uint32 that the next id is made of."""
    with np.errstate(over="ignore"):
        return int((bits.astype(np.uint64) * _WEIGHTS[: len(bits)]).sum(dtype=np.uint64))


def next_id(of_total: int, last: int) -> int:
    """A letter; or, one time in sixteen when `last`, the token before, is one, the end: so no answer is empty."""
    mixed = of_total * _GOLDEN % 2**64 >> 24
    if mixed % 16 == 0 and last in _IS_LETTER:
        return END
    return _LETTERS[(mixed >> 8) % len(_LETTERS)]


def answer(prompt: TokenIds, max_tokens: int) -> TokenIds:
    """What a greedy run says after `prompt`, the end included if it came to that."""
    known = rows(0, prompt)
    sum_, link = total(known.view(np.uint32)), link_of(known[-1])
    said: list[int] = []
    token = prompt[-1]
    for position in range(len(prompt), len(prompt) + max_tokens):
        token = next_id(sum_, token)
        said.append(token)
        if token == END:
            break
        row = rows(link, (token,))
        with np.errstate(over="ignore"):
            sum_ += int(
                (row[0].view(np.uint32).astype(np.uint64) * _WEIGHTS[position]).sum(dtype=np.uint64)
            )
        sum_ %= 2**64
        link = link_of(row[0])
    return tuple(said)


def text_of(ids: TokenIds) -> str:
    return bytes(i for i in ids if i < START).decode("ascii")
