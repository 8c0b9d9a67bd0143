"""The golden vectors, made anew from the code: `python -m tests.tiers.vectors.make` writes them to standard output."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from broker.access import Access
from engine.fingerprint import Origin, fingerprint
from tiers import manifest, record
from tiers.arena import Geometry
from tiers.block import BlockKey, chain_key, root_key
from tiers.canonical import digest, encode
from tiers.manifest import Manifest
from tiers.store import content_name, item_name, response_name

FINGERPRINT = bytes(range(32))
SALT = bytes(range(100, 132))
TOKENS = (0, 1, 2**32 - 1)
PAYLOAD = bytes(range(256)) * 3

VALUES: dict[str, Any] = {
    "none": None,
    "false": False,
    "true": True,
    "zero": 0,
    "one": 1,
    "minus one": -1,
    "127": 127,
    "128": 128,
    "-128": -128,
    "2**64": 2**64,
    "0.0": 0.0,
    "-0.0": -0.0,
    "1.0": 1.0,
    "1e-06": 1e-6,
    "infinity": float("inf"),
    "empty text": "",
    "text": "Häfen 港",
    "empty bytes": b"",
    "bytes": b"\x00\xff",
    "empty list": [],
    "list": [1, "1", b"1", [1]],
    "empty mapping": {},
    "mapping": {"b": 1, "a": {"c": None}, 7: "seven", -1: 0.5},
}

ORIGIN = Origin(
    weights={"embed.weight": "float32 97x48 " + "0" * 32, "norm.weight": "float32 48 " + "1" * 32},
    config={
        "model_type": "llama",
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "eos_token_id": [2, 3],
        "id2label": {0: "LABEL_0", 1: "LABEL_1"},
        "_name_or_path": "/where/it/lay",
        "transformers_version": "0.0",
        "dtype": "float16",
        "use_cache": True,
    },
    code="transformers 0.0",
    attention="paged_cpu, sdpa cpu",
    geometry=Geometry(layers=3, kv_heads=2, head_dim=8, block_tokens=4, dtype_name="float32"),
    storage="off",
)

MANIFEST = Manifest(
    response_id="resp_1",
    tenant="0123456789abcdef",
    session="Sitzung",
    parent="resp_0",
    created_at=1.5,
    stored=True,
    tokens=TOKENS,
    sampled_from=2,
    item_ids=("msg_1", "fc_1"),
    content_digest=b"d" * 32,
    keys=(BlockKey(b"k" * 32),),
    body=b'{"version":1}',
    text=b"t" * 32,
)


def vectors() -> dict[str, Any]:
    """{what: {case: hexadecimal}}"""
    root = root_key(FINGERPRINT, SALT)
    first = chain_key(root, TOKENS)
    head = record.encode_head(
        fingerprint=FINGERPRINT,
        key=first,
        parent=root,
        tokens=TOKENS,
        created=12.5,
        payload=memoryview(PAYLOAD),
    )
    key = hashlib.sha256(b"alice-key").digest()
    proof = [(b"host", b"localhost"), (b"x-api-key", b"alice-key")]
    tenants = {
        name: Access(host="127.0.0.1", keys=[key], secret=b"s" * 32, shared=name == "shared")
        for name in ("own", "shared")
    }
    return {
        "canonical": {name: encode(value).hex() for name, value in VALUES.items()},
        "digest": {name: digest(b"homeport-test-1", value).hex() for name, value in VALUES.items()},
        "root": {
            "fingerprint and salt": root.hex(),
            "no salt": root_key(FINGERPRINT, b"").hex(),
            "changed places": root_key(SALT, FINGERPRINT).hex(),
        },
        "chain": {
            "first": first.hex(),
            "second": chain_key(first, TOKENS).hex(),
            "one token": chain_key(root, (7,)).hex(),
            "a block of 32": chain_key(root, tuple(range(32))).hex(),
        },
        "name": {
            "response": response_name("tenant", "resp_1").hex(),
            "item": item_name("tenant", "msg_1").hex(),
            "content": content_name("tenant", b"d" * 32).hex(),
            "no tenant": response_name("", "resp_1").hex(),
            "half a character": response_name("tenant", "\ud800").hex(),
        },
        "fingerprint": {"tiny": fingerprint(ORIGIN).hex()},
        "record head": {"three tokens": head.hex()},
        "manifest": {"all fields": manifest.encode(MANIFEST).hex()},
        "tenant": {
            f"{name} {part}": value
            for name, access in tenants.items()
            for part, value in (
                ("name", access.admit(proof).name),
                ("salt", access.admit(proof).salt.hex()),
            )
        },
    }


if __name__ == "__main__":
    print(json.dumps(vectors(), indent=1))
