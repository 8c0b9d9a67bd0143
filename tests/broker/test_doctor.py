"""The doctor: rules over made-up facts, eyes on real files and sockets, and the command against a daemon."""

import json
import os
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from broker.__main__ import main
from broker.config import GIB, ConfigError, load
from broker.doctor import look
from broker.doctor.facts import (
    Answer,
    Certificate,
    Daemon,
    Facts,
    Installation,
    Limits,
    PathFacts,
    Requirement,
    Setup,
    State,
)
from broker.doctor.rules import Level, diagnose, exit_status
from broker.forecast import Machine, Shape
from broker.machine import FileSystem, Memory, OpenFiles
from tests.broker.test_cli import daemon, run
from tiers.state_dir import StateDir, look_at_lock

TLS = Path(__file__).parent / "tls"
ROOM = Machine(free_bytes=100 * GIB, memory_bytes=64 * GIB)


def installation(**changes):
    good = Installation(
        homeport="1.0",
        python="3.11.7",
        requirements=(Requirement("torch", ">=2.11", "2.13", fits=True),),
        devices=SimpleNamespace(gpu=None, reason="CPU build", driver=False),
        architecture="x86_64",
        cpu_flags=frozenset({"avx2", "fma"}),
        cores=8,
    )
    return replace(good, **changes)


def limits(memory=64 * GIB, swap=0, files=20_000, year=2026, pages="madvise", *, limited=False):
    return Limits(Memory(memory, limited, None, swap, pages), OpenFiles(files, files), year)


def state(**changes):
    at = Path("/var/lib/homeport")
    good = State(
        directory=PathFacts(at, exists=True),
        secret=PathFacts(at / "secret", exists=True, mode=0o600, size=32),
        file_system=FileSystem("ext4", 500 * GIB, 100 * GIB),
        newest_age_s=10.0,
        holder=None,
        left_by="7",
        store="clean",
    )
    return replace(good, **changes)


def setup(*sets, **changes):
    good = Setup(
        sources="homeport.toml",
        config=load([], sets),
        problem=None,
        shape=Shape(),
        machine=ROOM,
        weights_bytes=GIB,
        state=state(),
    )
    return replace(good, **changes)


def directory(**changes):
    return state(directory=PathFacts(Path("/d"), **({"exists": True} | changes)))


def secret(**changes):
    facts = {"exists": True, "mode": 0o600, "size": 32} | changes
    return state(secret=PathFacts(Path("/d/secret"), **facts))


def running(**changes):
    good = Daemon(
        "http://127.0.0.1:8321",
        loopback=True,
        expected=True,
        answers={
            "/healthz": Answer(200, {"status": "ok"}),
            "/readyz": Answer(200, {"status": "ready"}),
        },
        keyless=401,
        clock_ahead_s=0.0,
        version="1.0",
        metrics={'homeport_disk_state{state="degraded"}': 0.0},
    )
    return replace(good, **changes)


def facts(**changes):
    good = Facts(installation(), limits(), setup(), running())
    return replace(good, **changes)


def bad(some):
    """What a person would have to do something about."""
    return [one for one in diagnose(some) if one.level in (Level.WARNING, Level.BROKEN)]


def test_where_all_is_well_nothing_is_to_be_done_and_the_status_is_0():
    assert bad(facts()) == []
    assert exit_status(diagnose(facts())) == 0


OPEN = Answer(200, {"status": "ok"})
RULES = [
    # installation
    (facts(installation=installation(requirements=(Requirement("trio", ">=0.35,<0.36", "0.30", fits=False),))),
     Level.BROKEN, "packages", "pip install 'trio>=0.35,<0.36'"),
    (facts(installation=installation(requirements=(Requirement("numba", ">=0.62", None, fits=False),))),
     Level.BROKEN, "packages", "not installed"),
    (facts(installation=installation(devices=None)), Level.BROKEN, "device", "cannot be loaded"),
    (facts(installation=installation(devices=SimpleNamespace(gpu=None, reason="old driver", driver=True))),
     Level.WARNING, "device", "old driver"),
    (facts(installation=installation(cpu_flags=frozenset({"sse2"}))), Level.WARNING, "cpu", "AVX2"),
    # limits
    (facts(limits=limits(year=1970)), Level.BROKEN, "clock", "1970"),
    (facts(limits=limits(files=512)), Level.WARNING, "open_files", "LimitNOFILE=576"),
    (facts(limits=limits(memory=6 * GIB, limited=True)), Level.BROKEN, "memory", "control group"),
    # configuration
    (facts(setup=Setup("x", None, "x: unknown key 'prot'")), Level.BROKEN, "config", "'prot'"),
    (facts(setup=setup("server.host='0.0.0.0'", "auth.keys=['k']", "server.allowed_hosts=['h']")),
     Level.WARNING, "reach.tls", "cross the network"),
    (facts(setup=setup("server.host='0.0.0.0'", "auth.keys=['k']", "server.tls_certificate=c", "server.tls_key=k")),
     Level.WARNING, "reach.hosts", "421"),
    (facts(setup=setup(exposure="others can reach it")), Level.BROKEN, "auth.exposure", "reach"),
    (facts(setup=setup(listening="127.0.0.1:8321: Address already in use")), Level.BROKEN, "port", "in use"),
    (facts(setup=setup(machine=Machine(free_bytes=20 * GIB))), Level.WARNING, "sizes", "stop at 19 GiB"),
    (facts(setup=setup(f"server.admin=unix:/{'x' * 200}")), Level.BROKEN, "admin", "too long"),
    # state directory
    (facts(setup=setup(state=directory(symlink=True))), Level.BROKEN, "state.dir", "symbolic link"),
    (facts(setup=setup(state=directory(owned=False))), Level.BROKEN, "state.dir", "another user"),
    (facts(setup=setup(state=directory(mode=0o777))), Level.BROKEN, "state.dir", "write there"),
    (facts(setup=setup(state=directory(mode=0o755))), Level.WARNING, "state.dir", "read prompts"),
    (facts(setup=setup(state=directory(writable=False))), Level.BROKEN, "state.dir", "cannot be written"),
    (facts(setup=setup(state=directory(exists=False, writable=False))), Level.BROKEN, "state.dir", "may not be made"),
    (facts(setup=setup(state=secret(mode=0o644))), Level.BROKEN, "state.secret", "chmod 600"),
    (facts(setup=setup(state=secret(size=3))), Level.BROKEN, "state.secret", "3 bytes"),
    (facts(setup=setup(state=state(file_system=FileSystem("nfs4", 9, 9)))), Level.BROKEN, "state.medium", "nfs4"),
    (facts(setup=setup(state=state(file_system=FileSystem("tmpfs", 9, 9)))), Level.WARNING, "state.medium", "tmpfs"),
    (facts(setup=setup(state=state(file_system=FileSystem("overlay", 9, 9)))), Level.WARNING, "state.medium", "volume"),
    (facts(setup=setup(state=state(store="unsynced"))), Level.WARNING, "store", "empties"),
    (facts(setup=setup(state=state(put_aside=(Path("/d/kv.damaged"),)))), Level.WARNING, "store.aside", "kv.damaged"),
    (facts(setup=setup(state=state(newest_age_s=-3600.0))), Level.WARNING, "clock", "went back"),
    # TLS
    (facts(setup=setup(certificate=Certificate("no such file"))), Level.BROKEN, "tls", "no such file"),
    (facts(setup=setup(certificate=Certificate(None, -2.0))), Level.BROKEN, "tls", "2 days ago"),
    (facts(setup=setup(certificate=Certificate(None, 3.0))), Level.WARNING, "tls", "3.0 days"),
    (facts(setup=setup(certificate=Certificate(None, 90.0, key_readable_by_others=True))), Level.WARNING, "tls.key", "read"),
    (facts(daemon=running(certificate=Certificate(None, 3.0))), Level.WARNING, "daemon.tls", "3.0 days"),
    # daemon
    (facts(daemon=running(unreachable="refused")), Level.BROKEN, "daemon", "refused"),
    (facts(daemon=running(answers={"/healthz": Answer(200, "<html>")})), Level.BROKEN, "daemon", "no homeport"),
    (facts(daemon=running(answers={"/healthz": Answer(503, {"status": "stalled"})})), Level.BROKEN, "daemon.health", "stalled"),
    (facts(daemon=running(answers={"/healthz": OPEN, "/readyz": Answer(503, {})})), Level.WARNING, "daemon.ready", "wait"),
    (facts(daemon=running(keyless=200, loopback=False)), Level.BROKEN, "daemon.auth", "anybody"),
    (facts(daemon=running(version="0.9")), Level.WARNING, "daemon.version", "0.9"),
    (facts(daemon=running(clock_ahead_s=-90.0)), Level.WARNING, "daemon.clock", "-90 s"),
    (facts(daemon=running(metrics={'homeport_disk_state{state="degraded"}': 1.0})), Level.WARNING, "daemon.disk", "room"),
    (facts(daemon=running(metrics={'homeport_verify_failures_total{tier="disk",reason="key"}': 2.0})),
     Level.WARNING, "daemon.verify", "2 records"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("some", "level", "check", "words"), RULES, ids=[f"{one[2]} {one[3]}" for one in RULES]
)
def test_what_is_wrong_is_found_and_says_what_to_do(some, level, check, words):
    found = [one for one in bad(some) if one.check == check]
    assert found
    assert {one.level for one in found} == {level}
    assert all(one.todo for one in found)
    assert any(words in f"{one.says} {one.todo}" for one in found)
    assert exit_status(diagnose(some)) == (2 if level is Level.BROKEN else 1)


NOTES = [
    (facts(limits=limits(swap=8 * GIB)), "swap"),
    (facts(limits=limits(pages="never")), "huge_pages"),
    (facts(setup=setup(state=state(store="unclean"))), "store"),
    (facts(setup=setup(shape=None)), "model"),
    (facts(daemon=running(unreachable="refused", expected=False)), "daemon"),
    (facts(daemon=running(keyless=200)), "daemon.auth"),
    (facts(daemon=running(version=None)), "daemon.version"),
]


@pytest.mark.parametrize(("some", "check"), NOTES, ids=[one[1] for one in NOTES])
def test_what_is_only_worth_knowing_changes_no_status(some, check):
    assert any(one.level is Level.NOTE and one.check == check for one in diagnose(some))
    assert exit_status(diagnose(some)) == 0


def test_the_keys_of_the_example_are_known_to_everybody():
    example = load([Path(__file__).parents[2] / "config" / "example-team.toml"]).auth
    for key in (*example.keys, *example.operators):
        given = replace(load().auth, keys=(key,))
        some = facts(setup=setup(config=replace(load(), auth=given)))
        assert [one.check for one in bad(some)] == ["auth.published"]


def test_only_what_was_looked_at_is_judged():
    checks = {one.check for one in diagnose(Facts(installation(), limits(), None, None))}
    assert checks == {"python", "packages", "device", "cpu", "open_files"}


# the eyes


def test_a_lock_is_seen_as_held_free_or_never_there_and_stays_as_it_was(tmp_path):
    tmp_path.chmod(0o700)
    assert look_at_lock(tmp_path) is None
    held = StateDir.open(tmp_path)
    seen = look.look_at_state(tmp_path, time.time())
    assert (seen.holder, seen.left_by, seen.store) == (str(os.getpid()), None, None)
    held.close()
    seen = look.look_at_state(tmp_path, time.time())
    assert (seen.holder, seen.left_by) == (None, str(os.getpid()))
    StateDir.open(tmp_path).close()  # the look holds nothing


def test_looking_makes_nothing_and_tightens_nothing(tmp_path):
    absent = tmp_path / "not" / "yet"
    seen = look.look_at_state(absent, time.time())
    assert (seen.directory.exists, seen.directory.writable) == (False, True)
    assert not absent.exists()
    tmp_path.chmod(0o755)
    (tmp_path / "secret").write_bytes(bytes(32))
    (tmp_path / "secret").chmod(0o644)
    seen = look.look_at_state(tmp_path, time.time())
    assert (seen.directory.mode, seen.secret.mode, seen.secret.size) == (0o755, 0o644, 32)
    assert {path.name for path in tmp_path.iterdir()} == {"secret"}


def test_how_the_store_was_left_is_read_off_its_mark(tmp_path):
    (tmp_path / "kv").mkdir()
    data = tmp_path / "kv" / "data.mdb"
    data.write_bytes(b"x")
    assert look.look_at_state(tmp_path, time.time()).store == "unclean"
    status = data.stat()
    (tmp_path / "kv" / "mark").write_text(f"clean {status.st_size} {status.st_mtime_ns}\n")
    assert look.look_at_state(tmp_path, time.time()).store == "clean"
    (tmp_path / "kv" / "mark").write_text("open process another-boot\n")
    assert look.look_at_state(tmp_path, time.time()).store == "unsynced"
    (tmp_path / "kv.damaged").mkdir()
    assert look.look_at_state(tmp_path, time.time()).put_aside == (tmp_path / "kv.damaged",)


def test_a_port_that_is_taken_and_an_address_that_is_not_ours_are_told():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert "in use" in look.cannot_listen("127.0.0.1", port)
    assert look.cannot_listen("127.0.0.1", port) is None
    assert look.cannot_listen("127.0.0.1", 0) is None
    assert look.cannot_listen("192.0.2.1", port)


def test_a_certificate_is_shaken_hands_with(tmp_path):
    def seen(certificate, key):
        config = load([], [f"server.tls_certificate={certificate}", f"server.tls_key={key}"])
        return look.look_at_setup("x", lambda: config, time.time()).certificate

    key = tmp_path / "key.pem"
    shutil.copyfile(TLS / "localhost.key", key)
    key.chmod(0o600)
    good = seen(TLS / "localhost.pem", key)
    assert good.problem is None
    assert good.days_left > 0
    assert not good.key_readable_by_others
    key.chmod(0o644)
    assert seen(TLS / "localhost.pem", key).key_readable_by_others
    assert seen(TLS / "localhost.pem", tmp_path / "absent").problem
    assert seen(TLS / "localhost.pem", TLS / "localhost.pem").problem


def test_requirements_are_compared_with_what_is_installed():
    found = look._requirements(
        ["trio>=999", "trio>=0.1", "no-such-thing-here", "x; extra == 'dev'"]
    )
    assert [(one.name, one.fits) for one in found] == [
        ("trio", False), ("trio", True), ("no-such-thing-here", False)
    ]  # fmt: skip
    assert all(one.fits for one in look.look_at_installation().requirements)


def test_a_configuration_that_does_not_load_is_a_fact():
    def fails():
        raise ConfigError("x: unknown key")

    assert look.look_at_setup("x", fails, 0.0).problem == "x: unknown key"


@pytest.mark.parametrize(
    ("sets", "url"),
    [
        ([], "http://127.0.0.1:8321"),
        (["server.host='::'", "server.port=1"], "http://[::1]:1"),
        (["server.host='0.0.0.0'", "server.tls_certificate=c", "server.tls_key=k"], "https://127.0.0.1:8321"),
        (["server.port=0"], None),
    ],
)  # fmt: skip
def test_a_daemon_is_asked_where_its_configuration_says(sets, url):
    assert look.url_of(load([], sets)) == url


def test_a_key_is_not_sent_in_clear_to_another_machine(monkeypatch):
    sent = []
    monkeypatch.setattr(
        look._Asking,
        "get",
        lambda self, path, keyed=False: sent.append(self._key) or Answer(200, {}),
    )
    for url, key in (
        ("http://192.0.2.1:1", None),
        ("https://192.0.2.1:1", "k"),
        ("http://127.0.0.1:1", "k"),
        ("unix:/run/x", "k"),
    ):
        sent.clear()
        look.look_at_daemon(url, "k", 0.0, expected=True)
        assert set(sent) == {key}, url


# the command


async def test_the_command_sees_a_daemon_its_keys_and_its_version(tmp_path, capsys):
    async def findings(*argv):
        status = await run("doctor", "--json", *argv)
        told = json.loads(capsys.readouterr().out)
        assert told["status"] == ("ok", "warning", "broken")[status]
        return {one["check"]: one for one in told["findings"]}

    async with daemon(tmp_path, "auth.keys=['k']", "auth.operators=['o']") as (url, _):
        seen = await findings(url)
        assert seen["daemon.health"]["level"] == "ok"
        assert seen["daemon.auth"]["level"] == "ok"
        assert seen["daemon.version"]["level"] == "note"
        seen = await findings(url, "--key", "o")
        assert seen["daemon.version"]["level"] == "ok"
    async with daemon(tmp_path) as (url, _):
        assert (await findings(url))["daemon.auth"]["level"] == "note"
    assert (await findings(url))["daemon"]["level"] == "broken"


async def test_the_command_looks_at_a_configuration_and_its_daemon_over_tls(tmp_path, capsys):
    tls = (f"server.tls_certificate={TLS}/localhost.pem", f"server.tls_key={TLS}/localhost.key")
    async with daemon(tmp_path, *tls) as (url, _):
        port = url.rpartition(":")[2]
        sets = [word for one in (*tls, f"server.port={port}") for word in ("--set", one)]
        await run("doctor", "--state-dir", str(tmp_path), *sets)
        said = capsys.readouterr().out
    lines = {line.split()[1]: line for line in said.splitlines()}
    assert lines["daemon.tls"].startswith("ok")
    assert lines["tls"].startswith("ok")
    assert lines["daemon.health"].startswith("ok")
    assert all(" -> " in line for line in said.splitlines() if line.startswith(("WARN", "BROKEN")))


def test_a_broken_configuration_is_status_2_and_a_line(tmp_path, capsys):
    (tmp_path / "c.toml").write_text("[server]\nprot = 1\n")
    assert main(["doctor", "--config", str(tmp_path / "c.toml")]) == 2
    assert "BROKEN   config" in capsys.readouterr().out
    (tmp_path / "c.toml").write_text(
        f"[server]\nhost = '0.0.0.0'\nport = 0\nstate_dir = '{tmp_path}/s'\n"
    )
    assert main(["doctor", "--config", str(tmp_path / "c.toml")]) == 2
    assert "BROKEN   auth.exposure" in capsys.readouterr().out
    assert main(["doctor", "ftp://x"]) == 1
    assert "http://HOST:PORT" in capsys.readouterr().err
