"""Records: what was written is found, and nothing else is."""

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from tiers import record
from tiers.block import StoreError, chain_key, root_key
from tiers.hashed_copy import copying

FINGERPRINT = bytes(range(32))
ROOT = root_key(FINGERPRINT, b"tenant")
TOKENS = (1, 2, 2**32 - 1)
KEY = chain_key(ROOT, TOKENS)
ASKED = {"fingerprint": FINGERPRINT, "key": KEY, "parent": ROOT, "tokens": TOKENS}


def extract(data: bytes, into: memoryview, **changed) -> None:
    asked = record.Asked(**{**ASKED, **changed})
    record.extract(copying(memoryview(data)), len(data), into, asked)


def written(payload: bytes = b"KV" * 300, *, created: float = 12.5, **changed) -> bytes:
    head = record.encode_head(**{**ASKED, **changed}, created=created, payload=memoryview(payload))
    return head + payload


def reason(data: bytes, **changed) -> str:
    """Looked at in place and copied out, which must agree."""
    asked = record.Asked(**{**ASKED, **changed})
    with pytest.raises(StoreError) as caught:
        record.verify(memoryview(data), asked)
    room = max(0, len(data) - record.head_size(len(asked.tokens)))
    into = memoryview(bytearray(b"\xee" * room))
    with pytest.raises(StoreError) as copied:
        extract(data, into, **changed)
    assert copied.value.reason == caught.value.reason
    assert into == (b"\xff" if copied.value.reason == "checksum" else b"\xee") * room
    return caught.value.reason


@given(
    payload=st.binary(max_size=3000),
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=200).map(tuple),
    created=st.floats(),
)
def test_what_was_written_is_found(payload, tokens, created):
    data = written(payload, tokens=tokens, created=created)
    found = record.verify(memoryview(data), record.Asked(**{**ASKED, "tokens": tokens}))
    assert found == payload
    into = memoryview(bytearray(len(payload)))
    extract(data, into, tokens=tokens)
    assert into == payload
    assert len(data) == record.head_size(len(tokens)) + len(payload)


def test_tails_and_full_blocks_have_records_of_one_size():
    assert {record.head_size(count) for count in range(89)} == {496}
    assert record.head_size(89) == 1008


def test_the_layout_is_the_one_in_the_header():
    """Golden: a change of any of these bytes is a change of format and needs another version."""
    data = written(b"payload")
    assert data[:8] == b"HPKV\x02\x00\x01\x00"
    assert data[8:40] == FINGERPRINT
    assert data[40:72] == KEY
    assert data[72:104] == ROOT
    assert data[104:128].hex() == "0700000000000000" + "0000000000002940" + "0300000000000000"
    assert data[128:144].hex() == "c9df80d7d0b43665c67c1aa759d91dcd"
    assert data[128:144] == xxhash.xxh3_128_digest(data[:128] + bytes(16) + data[144:])
    assert data[144:156].hex() == "0100000002000000ffffffff"
    assert data[156:496] == bytes(340)
    assert data[496:] == b"payload"


def test_every_single_flipped_bit_is_refused():
    data = written(b"some KV")
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        reason(bytes(flipped))


@given(st.integers(0, 600), st.integers(0, 600))
def test_a_record_cut_or_grown_is_refused(cut, grown):
    data = written(b"x" * 100)
    torn = data[: len(data) - min(cut, len(data))] + bytes(grown)
    if torn != data:
        reason(torn)


@given(st.binary(max_size=700))
def test_bytes_of_any_kind_are_refused_with_a_reason(data):
    reason(data)
    reason(written()[:8] + data)


def test_each_mismatch_has_its_reason():
    data = written()
    other = chain_key(ROOT, (9, 9, 9))
    assert reason(b"NOPE" + data[4:]) == "magic"
    assert reason(data[:4] + b"\x01\x00" + data[6:]) == "version"
    assert reason(data, fingerprint=bytes(32)) == "fingerprint"
    assert reason(data, key=other) == "key"
    assert reason(data, parent=other) == "key"
    assert reason(data, tokens=(1, 2, 3)) == "tokens"
    assert reason(data, tokens=(1, 2)) == "tokens"
    assert reason(data[:-1]) == "size"
    assert reason(data[:100]) == "size"
    assert reason(data[:-1] + b"?") == "checksum"


def test_tokens_are_compared_even_under_an_equal_key():
    """A hash that collides (here: forced) must not hand out another prompt's KV."""
    assert reason(written(tokens=(7, 8, 9))) == "tokens"


def test_a_payload_of_another_size_than_the_room_is_refused():
    """A good checksum over another model's block would otherwise end the reader's thread."""
    for room in (0, 599, 601):
        with pytest.raises(StoreError) as caught:
            extract(written(), memoryview(bytearray(room)))
        assert caught.value.reason == "size"


def test_payloads_are_copied_and_hashed_in_pieces(monkeypatch):
    monkeypatch.setattr("tiers.hashed_copy._PIECE_BYTES", 7)
    into = memoryview(bytearray(600))
    extract(written(), into)
    assert into == b"KV" * 300
    with pytest.raises(StoreError, match="checksum"):
        extract(written()[:-1] + b"?", into)
