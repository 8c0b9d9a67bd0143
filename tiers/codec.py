"""How a block's bytes are stored on disk: as they are, as bfloat16, or as int8 with scales. numpy's only home here.

A block is [rows, head_dim] elements, where a row is one token's K or V of one head in one layer, and
rows = layers * 2 * kv_heads * block_tokens, in the order of arena.py. All payloads are little endian:

    off     the block's bytes
    bf16    rows * head_dim times bfloat16: the upper half of the float32, rounded to nearest, ties to even.
            A block of 16-bit elements is stored as it is: this is `off`.
    int8    offset      size             field
            0           2 * rows         each row's peak: the magnitude of its largest element, cut to nine
                                         significant bits: bits 15 to 30 of the float32 (bit 31, its sign, is 0)
            2 * rows    rows * head_dim  i8, -127 to 127: element = i8 * peak / 127
            A row with a NaN or an infinity has peak NaN and zeros, and decodes as NaN throughout: what was broken
            stays visibly broken. A row whose peak is below 2^-100, of float16 below 2^-14, has peak zero and zeros.

Laws
    A payload is `payload_bytes` long, whatever the block holds: records of one size keep LMDB's free list whole.
    Scales travel inside the payload, so inside the record and under its checksum.
    Nothing drifts. `decode(encode(x))` is a fixed point: encoding it again gives the same payload, decoding that the
    same bits. So a block that came back from disk may be spilled again, as often as one likes, and loses nothing
    after the first time; the tables need not know which blocks are exact.
    A row is coded from its own elements alone. So a restored tail that grows keeps its old rows bit by bit, and a
    private copy of half a block does, too. (Scales over several tokens would break this.)

Why int8 has a fixed point. The largest element lies in [p, p * (1 + 2^-8)) of its peak p, so it is coded as +-127. That
decodes to p or just above it, never below, so the second peak is the first: tests/tiers/test_codec.py tries all of
them. Any element decodes to i * p / 127 with a relative error below 2^-22, or 2^-8 where a bfloat16 block rounds it;
times 127 / p this is i with an error below 127 * 2^-8 < 1/2, which rounds to i. (A bfloat16 has eight significant
bits, so there p is the largest element itself.) A float16 rounds by 2^-11 of the element, or below 2^-14 by 2^-25, which is
less than a sixteenth of the smallest step.

Keys name tokens, not bytes: with a lossy codec a key's bytes depend on whether it came from disk. Therefore `scheme`
must be part of the model's fingerprint: a store, and a daemon, is either exact or compact, and never finds the other.

Where it runs: `encode` on the disk writer's thread, `decode` on the readers'; numpy lets go of the GIL in both.
Measured on 1.41 MiB of float32 (2026-11, one core of an AVX-512 Xeon; memcpy 0.09 ms): bf16 0.5 ms and 0.10 ms,
int8 1.5 ms and 0.22 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tiers.arena import Geometry

NAMES = ("off", "bf16", "int8")
_ELEMENTS = ("float32", "bfloat16", "float16")

_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_INFINITY = np.uint32(0x7F80_0000)
# 2^-100: neither 127 / peak nor peak / 127 leaves the normal numbers. 2^-14: the smallest normal float16.
_LEAST_PEAK, _LEAST_HALF_PEAK = (np.uint32((127 - power) << 23) for power in (100, 14))
_NAN_PEAK = np.uint16(0xFF80)  # as nine significant bits

Words = NDArray[np.uint32]
Halves = NDArray[np.uint16]
Floats = NDArray[np.float32]


class Codec(Protocol):
    """Stateless, so any thread may use it. Blocks and payloads are contiguous bytes of fixed lengths."""

    @property
    def scheme(self) -> str:
        """For the fingerprint: changes whenever a decoded bit could."""
        ...

    def payload_bytes(self, geometry: Geometry) -> int: ...

    def encode(self, block: memoryview) -> memoryview:
        """The payload to store: `block` itself, or fresh memory. `block` must stay put meanwhile."""
        ...

    def room(self, into: memoryview) -> memoryview:
        """Where to read the payload of a block that goes into `into`: there itself, or fresh memory."""
        ...

    def decode(self, payload: memoryview, into: memoryview) -> None:
        """Fill a block from its verified payload in `room`."""
        ...


def codec(name: str, geometry: Geometry) -> Codec:
    """The codec that the configuration calls `name`, for such blocks. Raises `ValueError` if there is none."""
    elements = geometry.dtype_name
    if name == "off" or (name == "bf16" and elements in ("bfloat16", "float16")):
        return AS_IT_IS
    if (name, elements) == ("bf16", "float32"):
        return Bfloat16()
    if name == "int8" and elements in _ELEMENTS:
        return Int8Rows(geometry.head_dim, elements)
    raise ValueError(
        f"no {name} storage of {elements} blocks: {', '.join(NAMES)} of {', '.join(_ELEMENTS)}"
    )


class Exact:
    """The block's own bytes, written from its slot and read into it."""

    __slots__ = ()
    scheme = "exact"

    def payload_bytes(self, geometry: Geometry) -> int:
        return geometry.block_bytes

    def encode(self, block: memoryview) -> memoryview:
        return block

    def room(self, into: memoryview) -> memoryview:
        return into

    def decode(self, payload: memoryview, into: memoryview) -> None:
        assert payload is into, "read in place"


AS_IT_IS = Exact()


class Bfloat16:
    """Half of float32: the same range, eight significant bits."""

    __slots__ = ()
    scheme = "bf16-v1"

    def payload_bytes(self, geometry: Geometry) -> int:
        return geometry.block_bytes // 2

    def encode(self, block: memoryview) -> memoryview:
        payload: memoryview = _upper_halves(np.frombuffer(block, "<u4")).view(np.uint8).data
        return payload

    def room(self, into: memoryview) -> memoryview:
        return np.empty(into.nbytes // 2, np.uint8).data

    def decode(self, payload: memoryview, into: memoryview) -> None:
        halves = np.frombuffer(payload, "<u2")
        np.left_shift(halves, 16, out=np.frombuffer(into, "<u4"), dtype=np.uint32)


class Int8Rows:
    """One scale a row: 66/256 of float32 at 64 elements a row, 66/128 of 16-bit elements."""

    __slots__ = ("_elements", "_head_dim", "_least", "_row_bytes")
    scheme = "int8-row-v1"

    def __init__(self, head_dim: int, elements: str) -> None:
        self._head_dim = head_dim
        self._elements = elements
        self._row_bytes = head_dim * (4 if elements == "float32" else 2)  # of the block
        self._least = _LEAST_HALF_PEAK if elements == "float16" else _LEAST_PEAK

    def payload_bytes(self, geometry: Geometry) -> int:
        return self._payload_bytes(geometry.block_bytes)

    def encode(self, block: memoryview) -> memoryview:
        values = self._values(block)
        rows = len(values)
        payload = np.empty(self._payload_bytes(block.nbytes), np.uint8)
        peaks = payload[: 2 * rows].view("<u2")
        with np.errstate(invalid="ignore"):  # NaN is a value like any other here
            peaks[:] = _peaks(np.maximum(values.max(axis=1), -values.min(axis=1)), self._least)
            usable = (peaks > 0) & (peaks < _NAN_PEAK)
            inverse = np.zeros(rows, np.float32)
            np.divide(np.float32(127), _widened(peaks), out=inverse, where=usable)
            scaled = values * inverse[:, None]
        scaled[~usable] = 0
        np.rint(scaled, out=scaled)
        codes = payload[2 * rows :].view(np.int8).reshape(scaled.shape)
        np.copyto(codes, scaled, casting="unsafe")
        return payload.data

    def room(self, into: memoryview) -> memoryview:
        return np.empty(self._payload_bytes(into.nbytes), np.uint8).data

    def decode(self, payload: memoryview, into: memoryview) -> None:
        rows = into.nbytes // self._row_bytes
        peaks = np.frombuffer(payload, "<u2", rows)
        codes = np.frombuffer(payload, np.int8, offset=2 * rows).reshape(rows, self._head_dim)
        steps = (_widened(peaks) / np.float32(127))[:, None]
        if self._elements == "float32":
            np.multiply(codes, steps, out=np.frombuffer(into, "<f4").reshape(codes.shape))
            return
        values = np.multiply(codes, steps, dtype=np.float32).ravel()
        if self._elements == "float16":
            np.frombuffer(into, "<f2")[:] = values
        else:
            np.frombuffer(into, "<u2")[:] = _upper_halves(values.view(np.uint32))

    def _payload_bytes(self, block_bytes: int) -> int:
        return block_bytes // self._row_bytes * (2 + self._head_dim)

    def _values(self, block: memoryview) -> Floats:
        """[rows, head_dim]"""
        values: Floats
        if self._elements == "float32":
            values = np.frombuffer(block, "<f4")
        elif self._elements == "float16":
            values = np.frombuffer(block, "<f2").astype(np.float32)
        else:
            halves = np.frombuffer(block, "<u2")
            values = np.left_shift(halves, 16, dtype=np.uint32).view(np.float32)
        return values.reshape(-1, self._head_dim)


def _upper_halves(bits: Words) -> Halves:
    """float32 to bfloat16, both as bits: to nearest, ties to even, and every NaN to a quiet one of its sign."""
    rounded = (bits >> 16) & 1
    rounded += 0x7FFF
    rounded += bits  # wraps round for a NaN only
    rounded >>= 16
    nan = (bits & _MAGNITUDE) > _INFINITY
    if nan.any():
        rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded.astype("<u2")


def _peaks(highest: Floats, least: np.uint32) -> Halves:
    """Nine significant bits of each row's largest magnitude, as bits; zero where it is below `least`."""
    peaks = (highest.view(np.uint32) & _MAGNITUDE) >> 15
    peaks[peaks >= _INFINITY >> 15] = _NAN_PEAK
    peaks[peaks < least >> 15] = 0
    return peaks.astype("<u2")


def _widened(peaks: Halves) -> Floats:
    """The same numbers as float32."""
    return np.left_shift(peaks, 15, dtype=np.uint32).view(np.float32)
