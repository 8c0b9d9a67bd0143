"""Keys: one encoding, frozen in vectors; every input that matters changes them; a collision still serves nothing wrong."""

from __future__ import annotations

import datetime
import enum
import itertools
import json
import os
import random
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from engine import fingerprint as prints
from engine.fingerprint import IRRELEVANT, fingerprint, weigh
from tests.tiers import test_cache
from tests.tiers.vectors.make import ORIGIN, vectors
from tiers import block, index
from tiers.block import KEY_BYTES, BlockKey, Slot, StoreError, Tier, chain_key, root_key
from tiers.canonical import digest, encode
from tiers.index import Index
from tiers.store import BlockWrite, MemoryStore, StoreLimits, content_name, item_name, response_name

GOLDEN = Path(__file__).parent / "vectors" / "keys.json"

# --- the encoding

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.integers(-99, 99), inner, max_size=4)
    ),
    max_leaves=12,
)


def decoded(data):
    """The inverse of `encode`, written from its table alone; floats as their bytes, because NaN is not NaN."""
    value, rest = _take(data)
    assert rest == b""
    return value


def _take(data):
    tag, size = struct.unpack_from("<cQ", data)
    content, rest = data[9 : 9 + size], data[9 + size :]
    assert len(content) == size
    match tag:
        case b"n":
            return None, rest
        case b"b":
            return ("bool", {b"\0": False, b"\1": True}[content]), rest
        case b"i":
            return int.from_bytes(content, "little", signed=True), rest
        case b"f":
            return content, rest
        case b"t":
            return content.decode(), rest
        case b"y":
            return ("bytes", content), rest
    inner = []
    while content:
        item, content = _take(content)
        inner.append(item)
    if tag == b"l":
        return inner, rest
    assert tag == b"m"
    return ("mapping", list(zip(inner[::2], inner[1::2], strict=True))), rest


def shown(value):
    """`value` as `decoded` shows it."""
    if type(value) is float:
        return struct.pack("<d", value)
    if type(value) is bytes:
        return ("bytes", value)
    if type(value) is bool:  # to Python True is 1
        return ("bool", value)
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    if isinstance(value, dict):
        names = sorted(value, key=encode)
        return ("mapping", [(name, shown(value[name])) for name in names])
    return value


@given(values)
@example([True, 1, 1.0, "1", b"1", [1], {1: 1}, {"1": 1}, None, -0.0, 0.0, 2**64, -(2**63)])
def test_an_encoding_can_be_read_back_so_no_two_values_share_one(value):
    assert decoded(encode(value)) == shown(value)


@given(st.dictionaries(st.text() | st.integers(), scalars), st.randoms())
def test_the_order_in_which_a_mapping_was_made_does_not_count(pairs, rng):
    items = list(pairs.items())
    rng.shuffle(items)
    assert encode(dict(items)) == encode(pairs)


class Colour(enum.IntEnum):
    RED = 1


class Word(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        frozenset(),
        bytearray(b"x"),
        memoryview(b"x"),
        1j,
        object(),
        Colour.RED,
        Word("x"),
        datetime.date(2026, 11, 24),
        Path("/x"),
        torch.float32,
        torch.tensor(1),
        range(3),
        len,
        {True: 1},
        {None: 1},
        {b"x": 1},
        {1.0: 1},
        {Colour.RED: 1},
        [1, {"deep": [{1}]}],
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_type_without_an_encoding_is_refused_not_guessed(value):
    with pytest.raises(TypeError):
        encode(value)


def test_half_a_character_is_refused():
    with pytest.raises(UnicodeEncodeError):
        encode("\ud800")


@given(
    st.binary(min_size=32, max_size=32),
    st.lists(st.integers(0, 2**32 - 1), max_size=70).map(tuple),
)
def test_a_chain_key_is_the_digest_of_the_canonical_encoding(parent, tokens):
    """It is packed by hand because it is made for every block of every prompt."""
    named = [parent, struct.pack(f"<{len(tokens)}I", *tokens)]
    assert chain_key(BlockKey(parent), tokens) == digest(b"homeport-blk-2", named)


@pytest.mark.parametrize("parent", [b"", b"p" * 31, b"p" * 33])
def test_a_parent_of_another_size_is_not_padded_into_one(parent):
    with pytest.raises(AssertionError):
        chain_key(BlockKey(parent), (1,))


@pytest.mark.parametrize("token", [-1, 2**32, 2**63, 1.0, None, "1"])
def test_a_token_that_is_no_u32_has_no_key(token):
    with pytest.raises(struct.error):
        chain_key(BlockKey(bytes(32)), (token,))


# --- golden vectors


def test_the_golden_vectors_stand():
    """See vectors/README.md before you make them anew."""
    golden = json.loads(GOLDEN.read_text())
    made = vectors()
    assert made.keys() == golden.keys()
    for what, cases in golden.items():
        assert made[what] == cases, what


def test_another_process_with_another_hash_seed_makes_the_same_keys():
    """This process has a seed of its own, and makes them too."""
    made = subprocess.run(
        [sys.executable, "-m", "tests.tiers.vectors.make"],
        env={**os.environ, "PYTHONHASHSEED": str(random.randrange(1, 2**32))},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert json.loads(made.stdout) == json.loads(GOLDEN.read_text()) == vectors()


# --- what changes a key


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 4)
        self.b = torch.nn.Linear(4, 4)
        self.tied = self.a
        self.register_buffer("inv_freq", torch.arange(3.0), persistent=False)
        for number, weight in enumerate(self.parameters()):
            weight.data = torch.arange(weight.numel()).reshape(weight.shape) / (number + 3)


def tiny(change=lambda model: None):
    model = Tiny()
    with torch.no_grad():
        change(model)
    return weigh(model)


def one_element(model):
    model.a.weight[1, 2] = torch.nextafter(model.a.weight[1, 2], torch.tensor(9.0))


def signed_zero(model):
    model.b.weight[0, 0] = -0.0


def shape(model):
    model.a.weight.data = model.a.weight.data.reshape(2, 8)


def changed_places(model):
    model.a.weight.data, model.b.weight.data = model.b.weight.data, model.a.weight.data


def transposed(model):
    model.a.weight.data = model.a.weight.data.T


def rope_table(model):
    model.inv_freq[2] += 1e-6


WEIGHTS = {
    "one element of one tensor": tiny(one_element),
    "the sign of a zero": tiny(signed_zero),
    "a tensor's shape": tiny(shape),
    "two tensors that changed places": tiny(changed_places),
    "a transposed tensor": tiny(transposed),
    "the type of the tensors": tiny(lambda model: model.to(torch.bfloat16)),
    "rope's table": tiny(rope_table),
    "a tensor's name": {("c" + name[1:]): weight for name, weight in tiny().items()},
    "a tensor more": {**tiny(), "adapter": "float32 1 00"},
    "a tensor less": dict(list(tiny().items())[1:]),
}
BASE = replace(ORIGIN, weights=tiny())
OTHER_CONFIG = {
    "model_type": "mistral",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.5},
    "sliding_window": 128,
    "tie_word_embeddings": True,
    "eos_token_id": [2],
    "id2label": {0: "LABEL_1", 1: "LABEL_0"},
}


def configured(**changed):
    return replace(BASE, config={**BASE.config, **changed})


def laid_out(**changed):
    return replace(BASE, geometry=replace(BASE.geometry, **changed))


ROPES = [
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 2.0},
    {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_theta": 10000.0},
]
ORIGINS = {
    **{name: replace(BASE, weights=weights) for name, weights in WEIGHTS.items()},
    **{f"config: {name}": configured(**{name: new}) for name, new in OTHER_CONFIG.items()},
    **{f"rope {rope}": configured(rope_parameters=rope) for rope in ROPES},
    "a config key that nobody knows yet": configured(new_kind_of_attention=True),
    "the code of the model": replace(BASE, code="transformers 0.1"),
    "the attention backend": replace(BASE, attention="sdpa cuda"),
    "storage bf16": replace(BASE, storage="bf16"),
    "storage int8": replace(BASE, storage="int8"),
    "block size": laid_out(block_tokens=8),
    "dtype": laid_out(dtype_name="bfloat16"),
    "layers": laid_out(layers=4),
    "kv heads": laid_out(kv_heads=1),
    "head size": laid_out(head_dim=16),
}
SALT = b"s" * 32
PROMPT = tuple(range(3 * test_cache.B + 2))


@pytest.fixture
def warm(monkeypatch):
    """A cache that has PROMPT, computed under BASE and SALT."""
    cache = test_cache.make()
    monkeypatch.setattr(test_cache, "ROOT", root_key(fingerprint(BASE), SALT))
    test_cache.turn(cache, PROMPT, 1)
    return cache


def hits(cache, origin=BASE, salt=SALT, prompt=PROMPT):
    return cache.match(root_key(fingerprint(origin), salt), prompt).tokens


def test_the_same_model_and_tenant_hit_wherever_the_files_lie(warm):
    assert hits(warm) == len(PROMPT) - 1
    for name in IRRELEVANT:
        assert hits(warm, configured(**{name: "elsewhere"})) == len(PROMPT) - 1
    again = dict(reversed(BASE.config.items()))
    assert hits(warm, replace(BASE, config=again, weights=tiny())) == len(PROMPT) - 1


@pytest.mark.parametrize("changed", ORIGINS)
def test_each_input_that_changes_kv_hits_nothing(warm, changed):
    assert hits(warm, ORIGINS[changed]) == 0


def test_every_key_of_the_config_counts_but_the_few_that_are_named(warm):
    assert OTHER_CONFIG.keys() | IRRELEVANT == BASE.config.keys()
    for name in BASE.config.keys() - IRRELEVANT:
        without = {key: value for key, value in BASE.config.items() if key != name}
        assert hits(warm, replace(BASE, config=without)) == 0, name


@pytest.mark.parametrize("name", ["KV_FORMAT"])
def test_another_format_hits_nothing(warm, monkeypatch, name):
    monkeypatch.setattr(prints, name, getattr(prints, name) + 1)
    assert hits(warm) == 0


def test_another_byte_order_hits_nothing(warm, monkeypatch):
    monkeypatch.setattr(prints.sys, "byteorder", "big")
    assert hits(warm) == 0


@pytest.mark.parametrize("salt", [b"", b"t" * 32, b"s" * 31, b"s" * 33, b"s" * 31 + b"t"])
def test_another_salt_hits_nothing(warm, salt):
    assert hits(warm, salt=salt) == 0


def test_another_token_hits_only_what_is_before_it(warm):
    for at in range(len(PROMPT)):
        other = (*PROMPT[:at], 99, *PROMPT[at + 1 :])
        assert hits(warm, prompt=other) == min(at, len(PROMPT) - 1)


def test_all_these_fingerprints_differ_from_each_other():
    made = Counter(fingerprint(origin) for origin in ORIGINS.values())
    made[fingerprint(BASE)] += 1
    assert made.most_common(1)[0][1] == 1


def test_swapping_any_two_fields_makes_another_key():
    """A value in its neighbour's place is another value: nothing is told apart by position or by luck."""
    texts = ["code", "attention", "storage"]
    numbers = ["layers", "kv_heads", "head_dim", "block_tokens"]
    origins = [BASE]
    for one, two in itertools.combinations(texts, 2):
        origins.append(replace(BASE, **{one: getattr(BASE, two), two: getattr(BASE, one)}))
    for one, two in itertools.combinations(numbers, 2):
        shape = BASE.geometry
        origins.append(laid_out(**{one: getattr(shape, two), two: getattr(shape, one)}))
    counted = sorted(BASE.config.keys() - IRRELEVANT)
    for one, two in itertools.combinations(counted, 2):
        origins.append(configured(**{one: BASE.config[two], two: BASE.config[one]}))
    for one, two in itertools.combinations(BASE.weights, 2):
        swapped = {**BASE.weights, one: BASE.weights[two], two: BASE.weights[one]}
        if BASE.weights[one] != BASE.weights[two]:
            origins.append(replace(BASE, weights=swapped))
    assert len({fingerprint(origin) for origin in origins}) == len(origins) > 100
    assert {field.name for field in fields(BASE)} >= {*texts, "config", "weights", "geometry"}


def test_no_field_can_lend_its_neighbour_a_byte():
    """("a", "bc") is not ("ab", "c"), in any order, and a salt that looks like a fingerprint is a salt."""
    text = b"abcdef"
    roots = [root_key(text[:cut], text[cut:]) for cut in range(len(text) + 1)]
    roots += [root_key(text[cut:], text[:cut]) for cut in range(1, len(text))]
    assert len(set(roots)) == len(roots)
    parts = ["", "a", "ab", "b", "item", "response", "content"]
    names = [
        name(tenant, one)
        for name in (response_name, item_name)
        for tenant in parts
        for one in parts
    ]
    names += [content_name(tenant, one.encode()) for tenant in parts for one in parts]
    assert len(set(names)) == len(names) == 3 * len(parts) ** 2
    root = roots[0]
    first = chain_key(root, (1, 2))
    assert first not in (chain_key(root, (1,)), chain_key(root, (2, 1)), chain_key(root, (1, 2, 0)))
    assert chain_key(first, (3,)) != chain_key(chain_key(root, (1,)), (2, 3))


# --- collisions

LOOKUPS = 100_000


@pytest.fixture
def eight_bits(monkeypatch):
    """`chain_key` cut to one byte: 256 keys in all."""

    def cut(parent, tokens):
        return BlockKey(chain_key(parent, tokens)[:1] + bytes(KEY_BYTES - 1))

    for module in (block, index):
        monkeypatch.setattr(module, "chain_key", cut)
    return cut


def test_with_a_hash_of_eight_bits_no_lookup_finds_another_prompts_kv(eight_bits):
    """Six blocks of two tokens in an alphabet of five: every lookup meets keys that somebody else holds."""
    rng = random.Random(20261124)
    size, alphabet = 2, range(5)
    roots = [root_key(b"model", salt) for salt in (b"alice", b"bob")]
    table = Index(size)
    stands_for = {}  # {block: (root, every token up to its end)}
    known = [(roots[0], ())]  # its values
    met, found = Counter(), 0
    for _ in range(LOOKUPS):
        root = rng.choice(roots)
        prompt = tuple(rng.choices(alphabet, k=rng.randrange(1, 14)))
        if rng.random() < 0.5:  # half of them begin like something known
            root, head = rng.choice(known)
            prompt = (*head[: rng.randrange(len(head) + 1)], *prompt)
        match = table.match(root, prompt)
        upto = 0
        for one in match.blocks:
            upto += size
            assert stands_for[one] == (root, prompt[:upto])
            found += 1
        if match.partial is not None:
            upto += match.partial_rows
            held_root, held = stands_for[match.partial]
            assert (held_root, held[:upto]) == (root, prompt[:upto])
        assert match.tokens == upto < len(prompt)
        parent = match.blocks[-1].key if match.blocks else root
        behind = prompt[len(match.blocks) * size :][:size]
        holder = table.get(eight_bits(parent, behind)) if behind else None
        if holder is None and len(behind) == size and len(stands_for) < 240:
            depth = len(match.blocks)
            new = table.add(root, parent, behind, depth=depth, last_used=0.0)
            new.places[Tier.HOST] = Slot(0)
            stands_for[new] = (root, prompt[: (depth + 1) * size])
            known.append(stands_for[new])
        elif holder is not None and holder.tokens != behind:
            met["tokens"] += 1
        elif holder is not None and holder.parent != parent:
            met["parent"] += 1
    assert found > LOOKUPS / 2
    assert met["tokens"] > 10_000, met
    assert met["parent"] > 1_000, met


def test_with_a_hash_of_eight_bits_a_store_hands_out_no_other_prompts_bytes(eight_bits):
    """The record repeats parent and tokens, so the key is not all that tells two blocks apart."""
    rng = random.Random(5)
    payload = 16
    store = MemoryStore(
        fingerprint=b"f" * 32,
        payload_bytes=payload,
        block_tokens=2,
        limits=StoreLimits(block_bytes=1 << 22),
    )
    written, refused, read = {}, 0, 0
    for number in range(3_000):
        root = root_key(b"model", rng.choice((b"alice", b"bob")))
        tokens = tuple(rng.choices(range(40), k=2))
        key = eight_bits(root, tokens)
        if number % 4 == 0:
            content = number.to_bytes(payload, "little")
            one = BlockWrite(key, root, root, 0, tokens, memoryview(content), 0.0)
            store.write(blocks=[one])
            written[key] = (root, tokens, content)
        if key in written:
            into = memoryview(bytearray(payload))
            if (root, tokens) == written[key][:2]:
                store.read(key, root, tokens, into)
                assert into == written[key][2]
                read += 1
            else:
                with pytest.raises(StoreError, match=r"asked for|holds other tokens"):
                    store.read(key, root, tokens, into)
                assert into == bytes(payload)
                refused += 1
    assert refused > 500
    assert read > 500
