"""Decoders behind a good checksum: a checksum stops accidents, and whoever can write the file can make one.

Every input here is sealed anew after it was bent. A decoder may say what was written, or refuse with its own error;
it may not raise anything else, take memory that the input does not have, or hand out what it was not asked for.
The `ci` profile runs some 10,000 inputs, `campaign` ten times as many.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import tracemalloc
from dataclasses import fields as dataclass_fields
from dataclasses import replace

import lmdb
import msgpack
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from broker.session import Node, Part, from_manifest, to_manifest
from broker.wire.items import FunctionCall, FunctionCallOutput, ItemReference, Message, Reasoning
from broker.wire.requests import ToolKind, ToolSpec
from tests.tiers.small_store import PAYLOAD_BYTES, block, opened
from tests.tiers.small_store import manifest as small_manifest
from tests.tiers.vectors.make import MANIFEST
from tiers import lmdb_store, manifest, record
from tiers.block import BlockKey, StoreError, chain_key, root_key
from tiers.lmdb_store import _age_entry, _index_entry, _seal
from tiers.manifest import Manifest

STORES = settings.default.max_examples // 25  # 0.1 s each
ROUNDS = 8 * settings.default.max_examples  # of the loops that need no shrinking
EDGES = [-(2**63), -(2**31), -1, 0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
ODD = [*EDGES, True, False, None, 0.0, -0.0, 1e308, float("nan"), float("inf"), "", "1", b"", b"1"]

# --- records

FINGERPRINT, SALT = bytes(range(32)), b"tenant"
ROOT = root_key(FINGERPRINT, SALT)
TOKENS = (1, 2, 3)
KEY = chain_key(ROOT, TOKENS)
ASKED = {"fingerprint": FINGERPRINT, "key": KEY, "parent": ROOT, "tokens": TOKENS}
PAYLOAD = bytes(range(256)) * 2
REASONS = {"size", "magic", "version", "fingerprint", "key", "tokens", "checksum"}
HEAD_FIELDS = {  # {field: (offset, format of its number)}
    "version": (4, "<H"),
    "units": (6, "<H"),
    "payload size": (104, "<Q"),
    "created": (112, "<d"),
    "token count": (120, "<I"),
    "zero": (124, "<I"),
    "first token": (144, "<I"),
    "padding": (300, "<Q"),
}
CHECKSUM = slice(128, 144)


def written():
    head = record.encode_head(**ASKED, created=1.0, payload=memoryview(PAYLOAD))
    return bytearray(head + PAYLOAD)


def sealed_record(data):
    """`data` with a checksum that fits it, whatever it is."""
    if len(data) >= CHECKSUM.stop:
        data[CHECKSUM] = bytes(16)
        data[CHECKSUM] = xxhash.xxh3_128_digest(bytes(data))
    return bytes(data)


def verified(data):
    """The payload, or None for a refusal with a reason."""
    try:
        return bytes(record.verify(memoryview(data), record.Asked(**ASKED)))
    except StoreError as error:
        reason = error.reason
    assert reason in REASONS
    return None


def says_what_was_asked(data):
    """Whether the head, read from the table in record.py alone, is the one of ASKED."""
    (count,) = struct.unpack_from("<I", data, 120)
    return (
        data[8:104] == FINGERPRINT + KEY + ROOT
        and count == len(TOKENS)
        and data[144:156] == struct.pack("<3I", *TOKENS)
    )


def test_a_record_is_verified_when_it_is_only_sealed_again():
    assert verified(sealed_record(written())) == PAYLOAD


@pytest.mark.parametrize("field", HEAD_FIELDS)
def test_a_number_at_its_edge_in_a_sealed_record_is_refused_or_harmless(field):
    offset, layout = HEAD_FIELDS[field]
    own = bytes(written()[offset : offset + struct.calcsize(layout)])
    for value in [*EDGES, float("nan"), float("inf"), -1.0]:
        try:
            packed = struct.pack(layout, value)
        except (struct.error, OverflowError):
            continue
        data = written()
        data[offset : offset + len(packed)] = packed
        found = verified(sealed_record(data))
        if field in ("created", "padding"):  # nobody is misled by them
            assert found == PAYLOAD
        elif packed != own:
            assert found is None, (field, value)


def test_a_bent_and_sealed_record_never_gives_other_bytes_than_it_holds():
    rng = random.Random(20261124)
    accepted = 0
    for _ in range(ROUNDS):
        data = bent(rng, written())
        found = verified(sealed_record(data))
        if found is not None:
            accepted += 1
            assert says_what_was_asked(data)
            assert found == bytes(data[496:])
    assert (
        accepted > ROUNDS // 20
    )  # a bent payload is somebody's KV as far as anyone can tell: the seal is good


def bent(rng, data):
    """One to three edits: bits, numbers at their edges, cuts, insertions, copies from elsewhere in it."""
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + 8] = rng.choice((0, 2**64 - 1, 2**63, 2**32)).to_bytes(8, "little")
            case 2:
                data[at : at + 4] = rng.choice((0, 1, 2**31, 2**32 - 1)).to_bytes(4, "big")
            case 3:
                del data[at:]
            case 4:
                data[at:at] = rng.randbytes(rng.randrange(9))
            case 5:
                length = rng.randrange(33)
                data[at : at + length] = data[rng.randrange(len(data) + 1) :][:length]
            case _:
                data[at : at + 1] = bytes(
                    [rng.choice((0, 0x7F, 0x80, 0xC1, 0xDD, 0xDF, 0xC6, 0xFF))]
                )
    return data


# --- manifests


def sealed(packed):
    return xxhash.xxh3_128_digest(packed) + packed


def decoded(data):
    """The manifest, or None for the one refusal there is."""
    try:
        found = manifest.decode(data)
    except StoreError as error:
        reason = error.reason
    else:
        assert manifest.decode(manifest.encode(found)) == found
        sound(found)
        return found
    assert reason == "manifest"
    return None


def sound(found):
    """Every field is of its type, so that nobody behind `decode` has to ask."""
    names = (found.response_id, found.tenant, found.session, *found.item_ids)
    assert all(type(name) is str for name in names)
    assert found.parent is None or type(found.parent) is str
    assert type(found.stored) is bool
    assert type(found.created_at) in (int, float)
    assert found.created_at == found.created_at
    assert all(type(one) is bytes for one in (found.content_digest, found.body, found.text))
    assert all(type(token) is int and 0 <= token < 2**32 for token in found.tokens)
    assert 0 <= found.sampled_from <= len(found.tokens)
    assert all(type(key) is bytes and len(key) == 32 for key in found.keys)


FIELDS = msgpack.unpackb(manifest.encode(MANIFEST)[manifest.CHECKSUM_BYTES :])
odd_values = st.recursive(
    st.sampled_from(ODD)
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=6)
    | st.binary(max_size=70)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=9)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), odd_values, min_size=1, max_size=3))
def test_a_manifest_with_fields_of_any_kind_is_refused_or_sound(changed):
    decoded(sealed(msgpack.packb({**FIELDS, **changed})))


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_each_field_of_a_manifest_at_each_edge_is_refused_or_sound(name):
    for value in [*ODD, msgpack.Timestamp(1), msgpack.ExtType(5, b""), [], {}, [None], {"": 1}]:
        decoded(sealed(msgpack.packb({**FIELDS, name: value})))


def test_a_bent_and_sealed_manifest_is_refused_or_sound():
    rng = random.Random(7)
    packed = bytes(manifest.encode(MANIFEST)[manifest.CHECKSUM_BYTES :])
    accepted = sum(
        decoded(sealed(bytes(bent(rng, bytearray(packed))))) is not None for _ in range(2 * ROUNDS)
    )
    assert 0 < accepted < ROUNDS


def test_a_name_that_comes_twice_in_a_manifest_is_one_field():
    pairs = [msgpack.packb(name) + msgpack.packb(value) for name, value in FIELDS.items()]
    twice = [*pairs, msgpack.packb("session") + msgpack.packb("another")]
    found = decoded(sealed(bytes([0xDE]) + struct.pack(">H", len(twice)) + b"".join(twice)))
    assert found is None


HUGE = {
    "a list of four billion": b"\xdd\xff\xff\xff\xff",
    "a map of four billion": b"\xdf\xff\xff\xff\xff",
    "a text of 4 GiB": b"\xdb\xff\xff\xff\xff",
    "a blob of 4 GiB": b"\xc6\xff\xff\xff\xff",
    "an extension of 4 GiB": b"\xc9\xff\xff\xff\xff\x01",
    "lists in lists": b"\xdc\x10\x00" * 5_000,
    "lists that each claim all that follows": b"\xdd\x00\x0f\x42\x40" * 40 + bytes(1_000_000),
    "one-element lists": b"\x91" * 100_000,
    "maps in maps": b"\x81\xa0" * 50_000,
    "a list of the longest kind": b"\xdc\x10\x00" + b"\xdc\x10\x00\x91" * 4096,
}


@pytest.mark.parametrize("what", HUGE)
@pytest.mark.parametrize("at", ["whole", "field"])
def test_a_manifest_that_claims_more_than_it_has_takes_no_memory_for_it(what, at):
    packed = HUGE[what]
    if at == "field":
        packed = b"\x81" + msgpack.packb("item_ids") + packed
    data = sealed(packed)
    tracemalloc.start()
    try:
        assert decoded(data) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (64 << 20)


def test_a_manifest_longer_than_the_longest_is_refused_unread():
    assert decoded(bytes(manifest.MAX_BYTES + 1)) is None


# --- the store's small tables

INDEX_SIZES = sorted({0, 1, 8, 31, 32, 36, 64, 104, 112, 116, 120, 124, 127, 128, 500})


def entry(key, value):
    return _index_entry(key, _seal(key, value))


def test_a_sealed_index_entry_of_any_length_is_read_or_refused():
    rng = random.Random(11)
    for size in INDEX_SIZES:
        for key in (KEY, KEY[:31], KEY + b"k", b""):
            for _ in range(4):
                found = entry(key, rng.randbytes(size))
                if found is not None:
                    assert (
                        len(found.own.key) == len(found.own.parent) == len(found.fingerprint) == 32
                    )
                    assert all(0 <= token < 2**32 for token in found.own.tokens)
    layout = lmdb_store._INDEX
    assert entry(KEY, bytes(layout.size)) is not None
    assert entry(KEY, bytes(layout.size - 1)) is None
    assert entry(KEY, bytes(layout.size + 2)) is None


@pytest.mark.parametrize("when", [float("nan"), float("inf"), -float("inf")])
def test_a_sealed_index_entry_without_a_place_in_time_is_refused(when):
    """Victims are chosen by age: NaN is neither older nor younger than anything, and would hide what is behind it."""
    value = lmdb_store._INDEX.pack(FINGERPRINT, ROOT, ROOT, 0, when, 512, 8208)
    assert entry(KEY, value) is None


def test_a_bent_and_sealed_index_entry_is_refused_or_names_its_own_key():
    rng = random.Random(13)
    good = lmdb_store._INDEX.pack(FINGERPRINT, ROOT, ROOT, 0, 1.5, 512, 8208) + struct.pack(
        "<3I", *TOKENS
    )
    for _ in range(2 * ROUNDS):
        found = entry(KEY, bytes(bent(rng, bytearray(good))))
        if found is not None:
            assert found.own.key == KEY
            assert found.own.last_used - found.own.last_used == 0.0
            if chain_key(BlockKey(found.own.parent), found.own.tokens) == KEY:
                assert (found.own.parent, found.own.tokens) == (ROOT, TOKENS)


def test_a_sealed_age_of_any_length_is_read_or_refused():
    rng = random.Random(17)
    for key_size in (0, 7, 8, 9):
        for size in (0, 1, 39, 40, 41, 80):
            key, value = rng.randbytes(key_size), rng.randbytes(size)
            found = _age_entry(key, _seal(key, value))
            assert (found is not None) == ((key_size, size) == (8, 40))


@given(st.binary(max_size=200))
def test_an_entry_whose_seal_is_not_its_own_is_refused(value):
    assert _index_entry(KEY, value) is None
    other = chain_key(ROOT, (9,))
    assert _index_entry(other, _seal(KEY, value)) is None


# --- a whole store that somebody made


def reseal(table, key, value):
    """`value`, bent before, under whatever checksum its table believes."""
    if table in (b"index", b"ages", b"meta"):
        return _seal(key, value[8:])
    if table == b"blocks":
        return sealed_record(bytearray(value))
    if table == b"manifests":
        return value[:8] + sealed(value[8 + manifest.CHECKSUM_BYTES :])
    return value


def spoil(path, rng):
    """Bend some values of every table but the format's name, and seal them again."""
    env = lmdb.open(str(path / "kv"), max_dbs=8, map_size=1 << 30)
    for table in (b"blocks", b"index", b"manifests", b"ages", b"names", b"meta"):
        opened_table = env.open_db(table)
        with env.begin(write=True, db=opened_table) as txn:
            for key, value in list(txn.cursor()):
                if key != b"format" and rng.random() < 0.5:
                    txn.put(key, reseal(table, key, bytes(bent(rng, bytearray(value)))))
    env.close()


def quietly(call, *arguments, **named):
    """What it gives, or None if it refuses as a store may."""
    try:
        return call(*arguments, **named)
    except StoreError:
        return None


def use(store):
    """Everything that a daemon does with a store."""
    entries, after = [], None
    while found := quietly(store.index, after, 4):
        entries += found
        after = found[-1].key
    for one in [*(block(number) for number in range(12)), *entries]:
        into = memoryview(bytearray(PAYLOAD_BYTES))
        quietly(store.read, one.key, one.parent, one.tokens, into)
        quietly(store.find_chain, one.root, one.tokens)
    for number in range(6):
        own = small_manifest(number)
        for found in (
            quietly(store.find_response, "t", f"r{number}"),
            quietly(store.find_item, "t", f"item{number}"),
            quietly(store.find_content, "t", own.content_digest),
        ):
            if found is not None:
                sound(found)
                assert found.tenant == "t"
    key = None
    while examined := quietly(store.examine, key):
        key = examined.key
    quietly(store.forget_response, "t", "r1")
    quietly(store.write, blocks=[block(20)], manifests=[small_manifest(20)], drops=[block(1).key])
    into = memoryview(bytearray(PAYLOAD_BYTES))
    fresh = block(20)
    if quietly(store.read, fresh.key, fresh.parent, fresh.tokens, into) is None and any(into):
        assert into == fresh.payload
    store.statistics()


def test_a_store_whose_every_table_was_bent_and_sealed_is_used_without_harm(tmp_path, caplog):
    """Blocks of bent heads, indices that lie, totals that are wrong, names that lead elsewhere: refused, or harmless."""
    rng = random.Random(4711)
    with opened(tmp_path / "good") as store:
        for number in range(0, 12, 2):
            store.write(
                blocks=[block(number), block(number + 1)], manifests=[small_manifest(number // 2)]
            )
    for number in range(STORES):
        path = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "good", path)
        spoil(path, rng)
        with opened(path) as store:
            use(store)
        with opened(path) as store:  # and what that left behind
            use(store)
        shutil.rmtree(path)


# --- what the broker keeps in a manifest

NODE = Node(
    response_id="resp_1",
    tenant="t",
    session="s",
    parent=None,
    created_at=1.5,
    stored=True,
    tokens=(1, 2, 3),
    sampled_from=2,
    history=(
        Part(
            (
                Message(None, "user", "Hi."),
                FunctionCall("fc_1", "call_1", "ls", "{}", None),
                FunctionCallOutput(None, "call_1", "README.md"),
                Reasoning("rs_1", "well", None),
                ItemReference("msg_0"),
            )
        ),
        Part((Message("msg_1", "assistant", "Yes."),), (3,)),
    ),
    instructions="Be brief.",
    tools=(ToolSpec("ls", "lists", {"type": "object"}, True, None, ToolKind.FUNCTION),),
    response={"id": "resp_1", "output": []},
    item_ids=("msg_1",),
)
KEPT = to_manifest(NODE)
BODY = json.loads(KEPT.body)
TEXTS = {"text", "call_id", "name", "arguments", "output"}


def recalled(body):
    """The node, or None for the one refusal there is. `body`: bytes, or JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        node = from_manifest(replace(KEPT, body=data))
    except ValueError:
        return None
    well_typed(node)
    return node


def well_typed(node):
    assert (node.tokens, node.sampled_from) == (KEPT.tokens, KEPT.sampled_from)
    assert type(node.response) is dict
    assert node.instructions is None or type(node.instructions) is str
    for part in node.history:
        if part.sampled is not None:
            assert all(type(token) is int and 0 <= token < 2**32 for token in part.sampled)
        for item in part.items:
            for field in dataclass_fields(item):
                value = getattr(item, field.name)
                assert type(value) is str or (value is None and field.name not in TEXTS)
    for tool in node.tools:
        assert type(tool.name) is str
        assert tool.parameters is None or type(tool.parameters) is dict


def paths(value, at=()):
    yield at
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, item in inner:
        yield from paths(item, (*at, name))


def changed(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


json_values = st.recursive(
    st.none() | st.booleans() | st.sampled_from(EDGES) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


def test_the_body_that_was_written_is_recalled():
    node = recalled(BODY)
    assert (node.history, node.tools, node.response) == (NODE.history, NODE.tools, NODE.response)


def test_each_place_in_a_body_with_each_odd_value_is_refused_or_well_typed():
    odd = [
        *EDGES,
        True,
        False,
        None,
        0.5,
        float("nan"),
        "",
        "1",
        [],
        {},
        [1],
        {"a": 1},
        [[]],
        ["1"],
    ]
    for path in paths(BODY):
        for value in odd:
            recalled(changed(BODY, path, value))


@given(st.sampled_from(list(paths(BODY))), json_values)
@example(("history", 1, "sampled"), [2**32])
@example(("history", 1, "sampled"), "123")
@example(("history", 1, "sampled"), [True])
@example(("history", 0, "items", 0, "role"), "root")
@example(("history", 0, "items", 0, "kind"), "Node")
@example(("response",), None)
def test_a_body_with_any_value_anywhere_is_refused_or_well_typed(path, value):
    recalled(changed(BODY, path, value))


def test_ids_that_are_no_ids_are_refused():
    for sampled in ([-1], [2**32], [1.0], [True], ["1"], [None], "12", {"1": 2}, 7, [[1]]):
        assert recalled(changed(BODY, ("history", 1, "sampled"), sampled)) is None, sampled


def test_bytes_that_are_no_json_of_ours_are_refused():
    rng = random.Random(19)
    for body in (b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"1" * 10_000, b"null", b"[]", b"7"):
        assert recalled(body) is None
    for _ in range(ROUNDS):
        recalled(bytes(bent(rng, bytearray(KEPT.body))))


def test_a_stored_response_without_a_body_and_a_body_without_storage_are_refused():
    with pytest.raises(ValueError, match="manifest body of resp_1"):
        from_manifest(replace(KEPT, body=b""))
    with pytest.raises(ValueError, match="manifest body of resp_1"):
        from_manifest(replace(KEPT, stored=False))
    assert isinstance(KEPT, Manifest)
