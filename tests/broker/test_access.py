"""Host, Origin and key checks, from headers alone."""

import ast
import hashlib
import inspect

import pytest

from broker import access
from broker.access import OPEN, Access, check_exposure, is_loopback
from broker.config import ConfigError, load
from broker.errors import ClientError, Unauthorized

ALICE, BOB = (hashlib.sha256(key).digest() for key in (b"alice-key", b"b\xf6b-key"))


def headers(**fields):
    pairs = {"host": "localhost:8321", **fields}
    return [
        (name.replace("_", "-").encode(), value if isinstance(value, bytes) else value.encode())
        for name, value in pairs.items()
        if value is not None
    ]


def open_access(**more):
    return Access(host="127.0.0.1", **more)


def keyed():
    return Access(host="0.0.0.0", hosts=["LLM.example.org"], keys=[ALICE, BOB], secret=b"s" * 32)


def status_of(one, fields):
    try:
        one.admit(fields)
    except ClientError as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8321", 200),
        ("LOCALHOST", 200),
        ("localhost.:1", 200),
        ("127.0.0.1:8321", 200),
        ("127.8.8.8", 200),
        ("[::1]:8321", 200),
        ("mine.test:99", 200),
        ("evil.example:8321", 421),
        ("localhost.evil.example", 421),
        ("10.0.0.7:8321", 421),
        ("[::2]", 421),
        ("[::1", 421),
        ("", 421),
        (":8321", 421),
        (None, 421),
    ],
)
def test_host_allow_list_on_loopback(host, status):
    assert status_of(open_access(hosts=["Mine.test"]), headers(host=host)) == status


@pytest.mark.parametrize(
    ("host", "status"),
    [("10.0.0.7", 200), ("[fd00::2]:1", 200), ("llm.example.org", 200), ("evil.example", 421)],
)
def test_host_allow_list_on_every_address(host, status):
    assert status_of(keyed(), headers(host=host, x_api_key="alice-key")) == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://localhost:8321", 200),
        ("https://LOCALHOST:8321", 200),
        ("https://app.example", 200),
        ("https://app.example/", 200),
        ("http://app.example", 403),
        ("http://localhost:9999", 403),
        ("http://127.0.0.1:8321", 403),
        ("https://evil.example", 403),
        ("https://app.example.evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_foreign_origins_are_refused_unless_listed(origin, status):
    assert status_of(open_access(origins=["https://App.example"]), headers(origin=origin)) == status


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer alice-key"}, 200),
        ({"authorization": "bearer   alice-key "}, 200),
        ({"x_api_key": "alice-key"}, 200),
        ({"authorization": "Bearer alice-key2"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Basic alice-key"}, 401),
        ({"authorization": "alice-key"}, 401),
        ({"authorization": b"Bearer b\xf6b-key"}, 200),
        ({"authorization": b"Bearer \xff\xfe\x00"}, 401),
        ({"authorization": b"Bearer " + b"k" * 1_000_000}, 401),
        ({"x_api_key": ""}, 401),
        ({"authorization": "Basic eDp5", "x_api_key": "alice-key"}, 200),
        ({"authorization": "Bearer wrong", "x_api_key": "alice-key"}, 401),
    ],
)
def test_keys(fields, status):
    assert status_of(keyed(), headers(**fields)) == status


def test_without_keys_any_key_is_ignored_and_there_is_one_tenant():
    assert open_access().admit(headers(authorization="Bearer whatever")) == OPEN


def test_each_key_is_its_own_tenant_and_both_headers_prove_the_same_one():
    one = keyed()
    alice = one.admit(headers(x_api_key="alice-key"))
    assert alice == one.admit(headers(authorization="Bearer alice-key"))
    bob = one.admit(headers(x_api_key=b"b\xf6b-key"))
    assert alice.name != bob.name
    assert alice.salt != bob.salt
    assert OPEN.name not in (alice.name, bob.name)


def test_a_tenant_survives_a_restart_but_not_another_secret_and_never_shows_its_key():
    again = Access(host="127.0.0.1", keys=[BOB, ALICE], secret=b"s" * 32).admit(
        headers(x_api_key="alice-key")
    )
    assert again == keyed().admit(headers(x_api_key="alice-key"))
    other = Access(host="127.0.0.1", keys=[ALICE], secret=b"t" * 32).admit(
        headers(x_api_key="alice-key")
    )
    assert other.name != again.name
    assert other.salt != again.salt
    assert ALICE.hex()[:32] != again.name


def test_host_and_origin_are_checked_before_the_key_and_without_one_for_probes():
    assert status_of(keyed(), headers(host="evil.example")) == 421
    assert status_of(keyed(), headers(host="10.0.0.1", origin="https://evil.example")) == 403
    keyed().check_source(headers(host="10.0.0.1"))


@pytest.mark.parametrize("name", [b"host", b"origin"])
def test_a_header_given_twice_is_refused(name):
    fields = [*headers(origin="http://localhost:8321"), (name, b"localhost:8321")]
    assert status_of(open_access(), fields) == 400


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org"])
def test_an_open_server_may_not_be_reached_by_others(host):
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match=r"auth\.keys"):
        check_exposure(load([], [f"server.host={host}"]))
    check_exposure(load([], [f"server.host={host}", "auth.keys=['k']"]))
    check_exposure(load([], [f"server.host={host}", "auth.operators=['k']"]))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_loopback_may_be_open(host):
    check_exposure(load([], [f"server.host={host}"]))


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        (["server.admin=127.0.0.1:1", "auth.keys=['k']"], r"auth\.operators"),
        (["server.admin=10.0.0.7:1"], "others can reach"),
        (["auth.keys=['k']", "auth.operators=['k']"], "is a key already"),
    ],
)
def test_an_operators_address_without_an_operators_key_is_refused(sets, reason):
    with pytest.raises(ConfigError, match=reason):
        check_exposure(load([], sets))


def test_an_operators_address_may_be_a_sockets_file_or_loopback_of_an_open_server():
    for sets in (["server.admin=unix:/run/x"], ["server.admin=[::1]:8322"]):
        check_exposure(load([], sets))
    check_exposure(load([], ["server.admin=unix:/run/x", "auth.keys=['k']"]))
    check_exposure(load([], ["server.admin=10.0.0.7:1", "auth.operators=['o']", "auth.keys=['k']"]))


def test_operators_are_those_with_an_operators_key_and_who_comes_through_a_trusted_door():
    one = Access(host="127.0.0.1", keys=[ALICE], operators=[BOB], secret=b"s")
    alice = one.admit(headers(x_api_key="alice-key"))
    assert not alice.operator
    assert one.admit(headers(x_api_key=b"b\xf6b-key")).operator
    with pytest.raises(Unauthorized):
        one.admit(headers())
    trusted = Access(host="127.0.0.1", keys=[ALICE], secret=b"s", trusted=True)
    assert trusted.admit(headers()) == OPEN
    assert OPEN.operator
    there = trusted.admit(headers(x_api_key="alice-key"))
    assert (there.operator, there.name, there.salt) == (True, alice.name, alice.salt)
    with pytest.raises(Unauthorized):
        trusted.admit(headers(x_api_key="nobody's"))


def test_digests_are_compared_in_constant_time_only():
    tree = ast.parse(inspect.getsource(access.Access.admit).strip().replace("\n    ", "\n"))
    calls = {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and hasattr(node.func, "attr")
    }
    assert "compare_digest" in calls
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Eq | ast.In)]
