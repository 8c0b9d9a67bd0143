"""Tenants: made of the server's secret and the key that proved itself, and of nothing else that a request says."""

import hashlib
import hmac
import json
import random

import pytest

from broker.access import OPEN, Access
from broker.errors import ClientError, Unauthorized
from tests.broker.rig import open_rig

SECRET = b"s" * 32
KEYS = {
    "alice": b"alice-key",
    "bob": "bøb-键".encode(),  # headers are bytes: a key need not be ASCII, nor text
    "carol": b"\xff\xfe\x80",
    "dave": b"d" * 1_000_000,
}
DIGESTS = [hashlib.sha256(key).digest() for key in KEYS.values()]
TWO_KEYS = 'auth.keys=["alice-key", "bob-key"]'


def access(**more):
    return Access(host="127.0.0.1", keys=DIGESTS, secret=SECRET, **more)


def admitted(key, *more, **settings):
    fields = [(b"host", b"localhost"), (b"authorization", b"Bearer " + key), *more]
    return access(**settings).admit(fields)


def test_a_salt_is_an_hmac_of_the_key_under_the_servers_secret():
    for key in KEYS.values():
        label = b"tenant salt" + hashlib.sha256(key).digest()
        assert admitted(key).salt == hmac.digest(SECRET, label, "sha256")


def test_every_key_has_its_own_name_and_salt():
    tenants = [admitted(key) for key in KEYS.values()]
    assert len({tenant.name for tenant in tenants} | {OPEN.name}) == len(KEYS) + 1
    assert len({tenant.salt for tenant in tenants} | {OPEN.salt}) == len(KEYS) + 1


def test_sharing_is_opt_in_and_shares_the_salt_but_not_the_name():
    tenants = [admitted(key, shared=True) for key in KEYS.values()]
    [salt] = {tenant.salt for tenant in tenants}
    assert [tenant.name for tenant in tenants] == [admitted(key).name for key in KEYS.values()]
    assert salt not in {admitted(key).salt for key in KEYS.values()} | {OPEN.salt}
    other = Access(host="127.0.0.1", keys=DIGESTS, secret=b"t" * 32, shared=True)
    assert other.admit([(b"host", b"localhost"), (b"x-api-key", b"alice-key")]).salt != salt


def test_nothing_that_a_request_says_changes_its_tenant():
    """10,000 requests: hostile headers around one key, with other tenants' salts, names and keys among their values."""
    rng = random.Random(20261124)
    door, small = access(), [key for key in KEYS.values() if len(key) < 100]
    tenants = {key: admitted(key) for key in small}
    loot = [t.salt.hex().encode() for t in tenants.values()] + [t.salt for t in tenants.values()]
    loot += [t.name.encode() for t in tenants.values()] + [b"", b"\0", b"null", SECRET, *DIGESTS]
    names = [b"x-tenant", b"x-salt", b"cache-salt", b"cookie", b"openai-organization", b"salt"]
    names += [b"x-forwarded-user", b"openai-project", b"x-session-id", b"user-agent", b"via"]
    for _ in range(10_000):
        key = rng.choice(small)
        fields = [(b"host", b"localhost"), (b"authorization", b"Bearer " + key)]
        for _ in range(rng.randrange(6)):
            value = rng.choice(loot) if rng.random() < 0.7 else rng.randbytes(rng.randrange(40))
            fields.insert(rng.randrange(len(fields) + 1), (rng.choice(names), value))
        if (
            rng.random() < 0.3
        ):  # the first header that proves something decides; a second key changes nothing
            fields.append((b"x-api-key", rng.choice(small)))
        assert door.admit(fields) == tenants[key]


def test_a_key_that_is_not_known_is_401_whatever_it_is_made_of():
    rng = random.Random(7)
    door = access()
    wrong = [rng.randbytes(rng.randrange(1, 64)) for _ in range(2_000)]
    wrong += ["ключ".encode(), b"\xff" * 9, b"k" * 1_000_000, KEYS["dave"] + b"d", KEYS["dave"][1:]]
    wrong += [DIGESTS[0], DIGESTS[0].hex().encode(), SECRET, b"alice-key\0", b"alice-ke"]
    for key in wrong:
        with pytest.raises(Unauthorized):
            door.admit([(b"host", b"localhost"), (b"x-api-key", key)])


def test_an_open_server_has_one_tenant_whatever_is_sent():
    door = Access(host="127.0.0.1", secret=SECRET)
    for key in KEYS.values():
        assert door.admit([(b"host", b"localhost"), (b"x-api-key", key)]) == OPEN
    assert Access(host="127.0.0.1", shared=True).admit([(b"host", b"localhost")]) == OPEN


# what a body could try to say a tenant with; none of it may
SALTS = ["a" * 64, "00", "", "bob", "../../secret", "\0", "ключ", "x" * 60]
FIELDS = ["prompt_cache_key", "user", "safety_identifier", "cache_salt", "salt", "tenant", "model"]
FIELDS += ["session", "metadata", "extra_body", "kv_transfer_params", "prompt_cache_retention"]


def hostile_body(rng):
    body = {"type": "response.create", "input": "Hi.", "max_output_tokens": 2}
    for name in rng.sample(FIELDS, rng.randrange(1, 5)):
        value = rng.choice(SALTS)
        body[name] = (
            {"salt": value, "tenant": value} if name in ("metadata", "extra_body") else value
        )
    return body


async def test_no_field_of_a_body_reaches_the_salt_of_its_prompt():
    rng = random.Random(3)
    async with open_rig(TWO_KEYS) as rig:
        alice = rig.port.access.admit([(b"host", b"localhost"), (b"x-api-key", b"alice-key")])
        async with rig.websocket(authorization="Bearer alice-key") as client:
            for _ in range(150):
                await client.send(hostile_body(rng))
                await client.until("response.completed", "response.incomplete", "error")
        assert len(rig.engine.submitted) > 40
        assert {submit.salt for submit in rig.engine.submitted} == {alice.salt}


@pytest.mark.parametrize("shared", [False, True])
async def test_a_tenant_hits_anothers_kv_only_where_it_is_shared_and_its_ids_never(shared):
    body = {"input": "A prompt that both of them send.", "store": True}
    async with open_rig(TWO_KEYS, f"auth.shared={json.dumps(shared)}") as rig:
        browser = rig.browser()
        first = await browser.request("POST", "/v1/responses", body, x_api_key="alice-key")
        second = await browser.request("POST", "/v1/responses", body, x_api_key="bob-key")
        cached = second.json["usage"]["input_tokens_details"]["cached_tokens"]
        assert (cached > 0) is shared
        stolen = {"input": "And?", "previous_response_id": first.json["id"]}
        answer = await browser.request("POST", "/v1/responses", stolen, x_api_key="bob-key")
        assert answer.code == "previous_response_not_found"
        path = f"/v1/responses/{first.json['id']}"
        assert (await browser.request("GET", path, x_api_key="bob-key")).status == 404
        assert (await browser.request("DELETE", path, x_api_key="bob-key")).status == 404
        assert (await browser.request("GET", path, x_api_key="alice-key")).status == 200


async def test_a_pin_says_nothing_of_another_tenants_session_of_the_same_name():
    async with open_rig(TWO_KEYS) as rig:
        browser = rig.browser()
        for key, words in (("alice-key", 5), ("bob-key", 500)):
            body = {"input": "word " * words, "prompt_cache_key": "main"}
            await browser.request("POST", "/v1/responses", body, x_api_key=key)
        pin = {"session": "main", "ttl": "1h"}
        pinned = await browser.request("POST", "/admin/pins", pin, x_api_key="alice-key")
        assert pinned.json["tokens"] == len(rig.engine.fed[0][1])


def test_two_keys_in_one_request_are_the_first_ones_tenant_or_none():
    door = access()
    both = [
        (b"host", b"localhost"),
        (b"authorization", b"Bearer nope"),
        (b"x-api-key", b"alice-key"),
    ]
    with pytest.raises(ClientError):
        door.admit(both)
