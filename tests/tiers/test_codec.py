"""Codecs: what comes back, how far off it is, and that it never moves again."""

import struct
from dataclasses import replace
from queue import SimpleQueue

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiers.arena import Arena, Geometry
from tiers.block import Fetch, Slot, Spill, Tier, chain_key, root_key
from tiers.codec import NAMES, codec
from tiers.disk import DiskReader, DiskWriter, Landed
from tiers.store import MemoryStore, StoreLimits

FINGERPRINT = b"f" * 32
ROOT = root_key(FINGERPRINT, b"")
TOKENS = (1, 2, 3)
KEY = chain_key(ROOT, TOKENS)

ROWS, WIDTH = 2 * 2 * 1 * 3, 4  # layers * 2 * heads * tokens, head_dim
PEAKS = 0xFF00  # nine-bit magnitudes below infinity


def geometry(elements: str = "float32", head_dim: int = WIDTH) -> Geometry:
    return Geometry(layers=2, kv_heads=1, head_dim=head_dim, block_tokens=3, dtype_name=elements)


COMPACT = [
    codec("bf16", geometry()),
    codec("int8", geometry()),
    codec("int8", geometry("bfloat16")),
    codec("int8", geometry("float16")),
]
IDS = ["bf16 of float32", "int8 of float32", "int8 of bfloat16", "int8 of float16"]
ELEMENTS = dict(zip(COMPACT, ["float32", "float32", "bfloat16", "float16"], strict=True))


def restored(one, block: bytes) -> bytes:
    into = bytearray(b"\xee" * len(block))
    target = memoryview(into)
    room = one.room(target)
    room[:] = one.encode(memoryview(block))
    one.decode(room, target)
    return bytes(into)


def geometry_of(one) -> Geometry:
    return geometry(ELEMENTS[one])


def floats(block: bytes, elements: str = "float32") -> np.ndarray:
    if elements == "float16":
        return np.frombuffer(block, "<f2").astype(np.float32).reshape(-1, WIDTH)
    if elements == "bfloat16":
        block = b"".join(b"\0\0" + block[i : i + 2] for i in range(0, len(block), 2))
    return np.frombuffer(block, "<f4").reshape(-1, WIDTH)


# Every pattern of bits: numbers, subnormals, infinities, NaNs with payloads; and blocks as models make them.
any_block = st.binary(min_size=4 * ROWS * WIDTH, max_size=4 * ROWS * WIDTH)
like_kv = st.tuples(st.integers(0, 2**32), st.integers(-40, 40)).map(
    lambda drawn: (random_floats(drawn[0]) * 2.0 ** drawn[1]).astype("<f4").tobytes()
)


def random_floats(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(ROWS * WIDTH)


@pytest.mark.parametrize("one", COMPACT, ids=IDS)
@given(block=any_block | like_kv)
def test_a_restored_block_encodes_to_the_same_payload_and_restores_to_the_same_bits(one, block):
    block = block[: geometry_of(one).block_bytes]
    payload = bytes(one.encode(memoryview(block)))
    assert len(payload) == one.payload_bytes(geometry_of(one))
    once = restored(one, block)
    assert bytes(one.encode(memoryview(once))) == payload
    assert restored(one, once) == once


@pytest.mark.parametrize("elements", ["float32", "bfloat16", "float16"])
def test_every_peak_is_a_fixed_point_of_int8(elements):
    """All 65,280 peaks with every code below them: the proof in the header, by exhaustion."""
    wide = Geometry(
        layers=1, kv_heads=1, head_dim=128, block_tokens=PEAKS // 2, dtype_name=elements
    )
    one = codec("int8", wide)
    peaks = np.arange(PEAKS, dtype="<u2")
    usable = peaks >= (127 - 100) << 8
    if elements == "bfloat16":
        usable &= peaks & 1 == 0  # bfloat16 has no others
    if elements == "float16":  # from its smallest normal number to its largest
        usable &= (peaks >= (127 - 14) << 8) & (peaks < (127 + 16) << 8)
    peaks[~usable] = 0
    codes = np.tile(np.arange(128, dtype=np.int8), (PEAKS, 1))
    codes[1::2] *= -1
    codes[~usable] = 0
    payload = peaks.tobytes() + codes.tobytes()
    into = bytearray(wide.block_bytes)
    one.decode(memoryview(payload), memoryview(into))
    assert bytes(one.encode(memoryview(into))) == payload
    assert usable.sum() == {"float32": 58368, "bfloat16": 29184, "float16": 7680}[elements]


@pytest.mark.parametrize("one", COMPACT, ids=IDS)
@given(block=like_kv)
def test_an_element_is_off_by_no_more_than_the_header_says(one, block):
    elements = ELEMENTS[one]
    if elements == "bfloat16":  # any bits may be large there: take the upper halves of the numbers
        block = COMPACT[0].encode(memoryview(block)).tobytes()
    elif elements == "float16":
        block = np.frombuffer(block, "<f4").clip(-65504, 65504).astype("<f2").tobytes()
    before, after = (floats(each, elements) for each in (block, restored(one, block)))
    peak = np.abs(before).max(axis=1, keepdims=True)
    bound = (
        np.abs(before) * 2**-8
        if one is COMPACT[0]
        else peak * (1 / 254 + {"float32": 2**-20, "bfloat16": 2**-8, "float16": 2**-11}[elements])
    )
    if elements == "float16":
        bound = np.where(peak < 2**-14, peak, bound + 2**-25)
    assert (np.abs(after - before) <= bound).all()


@pytest.mark.parametrize("one", COMPACT, ids=IDS)
@pytest.mark.parametrize("nan", ["7fc00000", "7fffffff", "7f810000", "ff80ffff", "ffffffff"])
def test_a_nan_is_never_stored_as_a_number(one, nan):
    """Adding to a NaN's bits while rounding would make the last of these zero."""
    elements = geometry_of(one).dtype_name
    bits = bytes.fromhex(nan)[::-1]
    size = 4 if elements == "float32" else 2
    if elements == "float16":  # its exponent has three bits fewer
        bits = (int(nan[:4], 16) << 3 & 0x7FFF | int(nan[:4], 16) & 0x8000).to_bytes(4, "big")[::-1]
        bits = bits[2:] + bits[:2]
    block = bytearray(geometry_of(one).block_bytes)
    block[5 * size : 6 * size] = bits[4 - size :]
    after = floats(restored(one, bytes(block)), elements)
    assert np.isnan(after[1, 1])
    assert not after[[0, *range(2, ROWS)]].any()


@given(block=like_kv, other=like_kv, row=st.integers(0, ROWS - 1))
def test_a_row_does_not_depend_on_its_neighbours(block, other, row):
    """A restored tail that grows keeps its rows, whatever comes after them."""
    one = codec("int8", geometry())
    size = 4 * WIDTH
    mixed = bytearray(other)
    mixed[row * size : (row + 1) * size] = block[row * size : (row + 1) * size]
    row_of = slice(row * size, (row + 1) * size)
    assert restored(one, bytes(mixed))[row_of] == restored(one, block)[row_of]


def test_the_layouts_are_those_in_the_header():
    """Golden: a change of any of these bytes needs another scheme."""
    rows = [[0.0] * WIDTH] * ROWS
    rows[0] = [1.0, -0.5, 0.25, 0.0]
    rows[1] = [-3.14159274, 1.0, 2.0, 1e-9]
    rows[2] = [float("nan"), 1.0, 2.0, 3.0]
    rows[3] = [float("-inf"), 1.0, 2.0, 3.0]
    rows[4] = [1e-31, 0.0, -1e-31, 0.0]
    block = struct.pack(f"<{ROWS * WIDTH}f", *(x for row in rows for x in row))
    int8 = bytes(COMPACT[1].encode(memoryview(block)))
    assert int8[: 2 * ROWS].hex() == "007f" + "9280" + "80ff" * 2 + "0000" * 8
    assert int8[2 * ROWS :].hex() == "7fc02000" + "81285100" + "00000000" * 10
    bf16 = bytes(COMPACT[0].encode(memoryview(block)))
    assert bf16[:16].hex() == "803f00bf803e0000" + "49c0803f00408930"
    assert bf16[16:40].hex() == "c07f803f00404040" + "80ff803f00404040" + "020c0000028c0000"
    back = floats(restored(COMPACT[1], block))
    assert back[0].tolist() == [1.0, -64 * (np.float32(1) / np.float32(127)), *back[0][2:]]
    assert np.isnan(back[2:4]).all()
    assert not back[4:].any()


@pytest.mark.parametrize("elements", ["float32", "bfloat16", "float16"])
def test_off_is_the_identity_and_copies_nothing(elements):
    one = codec("off", geometry(elements))
    block = memoryview(bytearray(range(ROWS * WIDTH)) * 4)[: geometry(elements).block_bytes]
    assert one.encode(block) is block
    assert one.room(block) is block
    one.decode(block, block)
    assert one.payload_bytes(geometry(elements)) == geometry(elements).block_bytes


@pytest.mark.parametrize("elements", ["bfloat16", "float16"])
def test_bf16_of_16_bits_is_off(elements):
    assert codec("bf16", geometry(elements)).scheme == codec("off", geometry()).scheme


def test_the_names_are_three_schemes():
    assert len({codec(name, geometry()).scheme for name in NAMES}) == 3


def test_payloads_are_as_small_as_promised():
    """Of the default model: 1.41 MiB a block."""
    default = Geometry(30, 3, 64, 32, "float32")
    sizes = [codec(name, default).payload_bytes(default) for name in NAMES]
    assert [round(size / default.block_bytes, 3) for size in sizes] == [1, 0.5, 0.258]


@pytest.mark.parametrize(
    ("name", "elements"), [("int4", "float32"), ("int8", "float64"), ("bf16", "float64")]
)
def test_what_cannot_be_stored_is_refused_by_name(name, elements):
    with pytest.raises(ValueError, match=name):
        codec(name, geometry(elements))


def test_codecs_work_on_an_arena_in_place():
    arena = Arena(geometry(), slots=3)
    arena.blocks.fill_(3.0)
    one = codec("int8", geometry())
    payload = one.encode(arena.read(1))
    arena.blocks.fill_(-7.0)
    one.decode(payload, arena.view(1))
    assert (arena.blocks[1] == 3).all()
    assert (arena.blocks[[0, 2]] == -7).all()


class Disk:
    """The disk threads' bodies around a store in memory, run to the end for one command."""

    def __init__(self, one) -> None:
        self.codec = one
        self.answers: list = []
        self.store = MemoryStore(
            fingerprint=FINGERPRINT,
            payload_bytes=one.payload_bytes(geometry()),
            block_tokens=3,
            limits=StoreLimits(block_bytes=8 * 4096),
        )

    def spill(self, block: memoryview):
        writer = DiskWriter(self.store, self.answers.append, lambda: 1.0, codec=self.codec)
        place = (Tier.HOST, Slot(0), Slot(0))
        assert writer.offer_blocks([(Spill(KEY, ROOT, ROOT, 0, TOKENS, *place), block)])
        writer.stop()
        writer.run()
        return self.answers.pop()

    def fetch(self, into: memoryview):
        inbox: SimpleQueue = SimpleQueue()
        reader = DiskReader(self.store, inbox, self.answers.append, self.codec)
        reader.fetch(Fetch(KEY, ROOT, TOKENS, Tier.HOST, Slot(0)), into)
        reader.stop()
        reader.run()
        return self.answers.pop()

    def payload(self) -> bytes:
        one = memoryview(bytearray(self.codec.payload_bytes(geometry())))
        self.store.read(KEY, ROOT, TOKENS, one)
        return bytes(one)


@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_round_trips_over_the_disk_change_nothing_after_the_first(name):
    """With `off`, nothing at all."""
    block = random_floats(5).astype("<f4").tobytes()
    disk = Disk(codec(name, geometry()))
    here = memoryview(bytearray(block))
    states = []
    for _ in range(100):
        assert isinstance(disk.spill(here), Landed)
        here[:] = b"\xee" * len(block)
        assert isinstance(disk.fetch(here), Landed)
        states.append((bytes(here), disk.payload()))
    assert len(set(states)) == 1
    assert (states[0][0] == block) == (name == "off")


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_what_fails_its_check_is_not_decoded(name):
    disk = Disk(codec(name, geometry()))
    here = memoryview(bytearray(b"\x3f" * geometry().block_bytes))
    disk.spill(here)
    stored = disk.store._blocks[KEY]
    flipped = bytearray(stored.record)
    flipped[-1] ^= 1
    disk.store._blocks[KEY] = replace(stored, record=bytes(flipped))
    here[:] = b"\xee" * len(here)
    assert disk.fetch(here).reason == "checksum"
    assert here == b"\xee" * len(here)
