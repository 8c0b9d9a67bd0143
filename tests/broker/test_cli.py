"""The command line, in process; the daemon it talks to is a few lines of `http.server` on a thread of trio's."""

import http.server
import json
import os
import pty
import socket
import stat
import sys
import urllib.request
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from broker.__main__ import main
from broker.app import StartError, listen_for_operators, serve
from broker.config import load
from engine.api import DiskReport, SessionReport, TierReport
from tests.fakes import FakeService
from tiers.block import StoreError
from tiers.lmdb_store import ScrubStep
from tiers.state_dir import StateDir


class Reporting(FakeService):
    def __init__(self, nursery):
        super().__init__(nursery, disk=DiskReport("ok", records=7))
        self.why = {"evicted_disk_capacity": 3, "new": 40, "slow": 0}

    async def inspect(self, *, sessions=True):
        from dataclasses import replace

        tiers = (
            TierReport("device", 2 << 30, 512 << 20, 364, 10, 3),
            TierReport("disk", 40 << 30, 0, 0, 0, 0),
        )
        on = {"device": 1500, "disk": 1472}
        sessions = tuple(
            SessionReport(name, "TOOL_WAIT", 1500, 12.4, on)
            for name in ("resp_abc", "my/thread", "\x1b[2Jbold")
        )
        return replace(
            await super().inspect(),
            tiers=tiers,
            sessions=sessions,
            running=2,
            recomputed_total=self.why,
            amplification=1.25,
            hit_share=0.975,
        )


@asynccontextmanager
async def daemon(tmp_path, *sets):
    """A running daemon; yields its URL and its engine."""
    config = load([], ["server.port=0", f"server.state_dir={tmp_path}", *sets])
    send, receive = trio.open_memory_channel(1)
    engines = []

    @asynccontextmanager
    async def open_engine(config):
        async with trio.open_nursery() as nursery:
            engines.append(Reporting(nursery))
            yield engines[0]
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            partial(serve, config, open_engine=open_engine, announce=send.send_nowait)
        )
        yield (await receive.receive()).removeprefix("homeport ready "), engines[0]
        nursery.cancel_scope.cancel()


async def run(*argv):
    return await trio.to_thread.run_sync(main, argv)


async def test_tiers_and_sessions_are_tables_and_json(tmp_path, capsys):
    async with daemon(tmp_path) as (url, _):
        assert await run("tiers", "--url", url) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["TIER", "USED", "CAPACITY", "BLOCKS", "LEASED", "REFS"]
        assert lines[1].split() == ["device", "512MiB", "2048MiB", "364", "10", "3"]
        assert any(line.startswith("running 2  waiting 0") for line in lines)
        assert await run("sessions", "--url", url) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split() == [
            *("resp_abc", "TOOL_WAIT", "1500", "12s", "1500", "0", "1472", "-")
        ]
        assert lines[3].startswith("?[2Jbold"), "a client's name does nothing to the terminal"
        assert await run("sessions", "--url", url, "--json") == 0
        assert json.loads(capsys.readouterr().out)["sessions"][0]["tokens"] == 1500


async def test_tiers_says_how_the_disk_is_and_why_tokens_were_computed(tmp_path, capsys):
    async with daemon(tmp_path) as (url, engine):
        assert await run("tiers", "--url", url) == 0
        out = capsys.readouterr().out
        assert "disk ok  7 records, 0MiB to write\n" in out
        assert "amplification 1.250  hit share 97.5%  pins 0\n" in out
        assert [line.split() for line in out.splitlines()[-3:]] == [
            ["COMPUTED", "BECAUSE", "TOKENS"],
            ["new", "40"],
            ["evicted_disk_capacity", "3"],
        ]
        engine.disk = DiskReport("degraded", "full", index_complete=False, pending_bytes=3 << 20)
        engine.why = {}
        assert await run("tiers", "--url", url) == 0
        out = capsys.readouterr().out
        assert "disk degraded (full): nothing new is spilled, turns go on" in out
        assert "3MiB to write, index being read\n" in out
        assert "BECAUSE" not in out
        engine.disk = DiskReport()
        assert await run("tiers", "--url", url) == 0
        assert "disk off\n" in capsys.readouterr().out


async def test_a_session_is_pinned_seen_unpinned_and_forgotten(tmp_path, capsys):
    async with daemon(tmp_path) as (url, engine):

        async def ask(*argv):
            status = await run(*argv, "--url", url)
            said = capsys.readouterr()
            return status, said.out + said.err

        response_id = await turn(url, prompt_cache_key="my/thread")
        assert await ask("pin", "--session", "my/thread", "--ttl", "1h") == (
            0,
            f"my/thread: {len(engine.fed[0][1])} tokens, 0MiB, pinned for 3600 s\n",
        )
        assert (await ask("sessions"))[1].splitlines()[2].split()[-1] == "3600s"
        assert await ask("unpin", "--session", "my/thread") == (0, "my/thread: not pinned\n")
        assert await ask("unpin", "--session", "my/thread") == (
            1,
            f"homeport: {url}: No pin of session 'my/thread'.\n",
        )
        status, said = await ask("pin", "--response", response_id, "--ttl", "30s", "--json")
        assert (status, json.loads(said)["session"], json.loads(said)["ttl_s"]) == (
            0,
            "my/thread",
            30,
        )
        status, said = await ask("pin", "--session", "nobody", "--ttl", "1h")
        assert (status, "No session 'nobody'" in said) == (1, True)
        status, said = await ask("pin", "--session", "my/thread", "--ttl", "soon")
        assert (status, "'ttl' must be a time" in said) == (1, True)
        assert await ask("forget", "--session", "my/thread") == (
            0,
            "my/thread: 1 responses deleted\n",
        )
        assert (await ask("forget", "--session", "my/thread"))[0] == 1


async def test_an_operator_says_whose_session_is_meant(tmp_path, capsys):
    keys = ('auth.keys=["alice-key"]', 'auth.operators=["operator-key"]')
    async with daemon(tmp_path, *keys) as (url, engine):

        async def ask(*argv):
            status = await run(*argv, "--url", url, "--key", "operator-key")
            return status, capsys.readouterr().out

        await turn(url, key="alice-key", prompt_cache_key="main")
        _, said = await ask("turns", "--json")
        named = ("--session", "main", "--tenant", json.loads(said)["turns"][0]["tenant"])
        assert (await ask("pin", "--session", "main", "--ttl", "1h"))[0] == 1, "not the operator's"
        assert (await ask("pin", *named, "--ttl", "1h"))[0] == 0
        assert (await ask("demote", "--tier", "disk", *named))[0] == 0
        assert engine.demoted_salts == [engine.submitted[0].salt]
        assert (await ask("unpin", *named))[0] == 0
        assert await ask("forget", *named) == (0, "main: 1 responses deleted\n")


async def turn(url, key="", **body):
    """One turn over HTTP; its response id."""

    def post():
        request = urllib.request.Request(
            f"{url}/v1/responses",
            json.dumps({"input": "Hi.", **body}).encode(),
            {"content-type": "application/json", **({"x-api-key": key} if key else {})},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["id"]

    return await trio.to_thread.run_sync(post)


async def test_turns_are_listed_with_where_their_time_went(tmp_path, capsys):
    async with daemon(tmp_path) as (url, _):
        body = json.dumps({"input": "Hi."}).encode()
        await trio.to_thread.run_sync(_post, f"{url}/v1/responses", body)
        assert await run("turns", "--url", url) == 0
        head, line = capsys.readouterr().out.splitlines()
        assert head.split()[:4] == ["RESPONSE", "AGO", "STATUS", "OVER"]
        assert head.split()[-8:] == [
            "PARSE", "QUEUE", "RENDER", "RESTORE", "PREFILL", "DECODE", "STORE", "SEND"
        ]  # fmt: skip
        assert line.split()[2:4] == ["completed", "responses/http"]
        assert len(line.split()) == len(head.split())
        assert await run("turns", "--url", url, "--json", "--limit", "1") == 0
        (turn,) = json.loads(capsys.readouterr().out)["turns"]
        assert turn["response_id"] == line.split()[0]
        assert await run("turns", "--url", url, "--limit", "0") == 1
        assert "'limit' must be between" in capsys.readouterr().err


async def test_top_looks_once_where_there_is_no_terminal(tmp_path, capsys):
    async with daemon(tmp_path) as (url, _):
        assert await run("top", "--url", url) == 0
        out = capsys.readouterr().out
        assert "my/thread" in out
        assert "25%" in out
        assert await run("top", "--url", url, "--json") == 0
        assert json.loads(capsys.readouterr().out)["edge"]["websockets"] == 0
    assert await run("top", "--url", "http://127.0.0.1:1") == 1
    assert "no daemon at" in capsys.readouterr().err


async def test_top_draws_on_a_terminal_until_q(tmp_path):
    parent, child = pty.openpty()
    drawn = b""
    async with daemon(tmp_path) as (url, _):
        argv = [sys.executable, "-m", "broker", "top", "--url", url, "--every", "0.1"]
        size = {"TERM": "xterm", "LINES": "30", "COLUMNS": "120"}
        process = await trio.lowlevel.open_process(
            argv, stdin=child, stdout=child, stderr=child, env=os.environ | size
        )
        os.close(child)
        with trio.fail_after(120):
            while b"q quits" not in drawn:
                drawn += await trio.to_thread.run_sync(os.read, parent, 1 << 16)
            os.write(parent, b"q")
            assert await process.wait() == 0
    os.close(parent)
    assert b"my/thread" in drawn


def _post(url, body):
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


async def test_demote_says_how_much_moved(tmp_path, capsys):
    async with daemon(tmp_path) as (url, engine):
        assert await run("demote", "--tier", "disk", "--session", "resp_abc", "--url", url) == 0
        assert capsys.readouterr().out == "0 blocks moved to disk\n"
        ((tier, session),) = engine.demoted
        assert (tier.name, session) == ("DISK", "resp_abc")


async def test_a_missing_key_and_a_wrong_url_are_one_line_on_stderr(tmp_path, capsys):
    async with daemon(tmp_path, "auth.keys=['k']", "auth.operators=['o']") as (url, _):
        assert await run("tiers", "--url", url) == 1
        assert "No API key" in capsys.readouterr().err
        assert await run("tiers", "--url", url, "--key", "k") == 1
        assert "auth.operators" in capsys.readouterr().err
        assert await run("tiers", "--url", url, "--key", "o") == 0
    for wrong, words in (("ftp://x", "http://HOST:PORT"), ("http://127.0.0.1:1", "no daemon at")):
        assert await run("tiers", "--url", wrong) == 1
        error = capsys.readouterr().err
        assert error.startswith("homeport: ")
        assert words in error
        assert error.count("\n") == 1


async def test_something_else_on_the_port_is_named_as_such(capsys):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, server.handle_request)
            assert await run("tiers", "--url", f"http://127.0.0.1:{server.server_port}") == 1
    assert "is no homeport" in capsys.readouterr().err


def test_config_check_names_what_is_wrong(tmp_path, capsys):
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text("[server]\nport = 1\n")
    bad.write_text("[server]\nprot = 1\n")
    assert main(["config", "check", str(good)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{good}: good"
    assert [line.split()[0] for line in lines[2:5]] == ["device", "host", "disk"]
    assert main(["config", "check", str(good), str(bad)]) == 2
    assert "did you mean 'server.port'" in capsys.readouterr().err
    bad.write_text("[server]\nhost = '0.0.0.0'\n")
    assert main(["config", "check", str(bad)]) == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["serve", "--host", "0.0.0.0"], "auth.keys"),
        (["serve", "--port", "70000"], "--port"),
        (["serve", "--set", "server.prot=1"], "did you mean 'server.port'"),
        (["serve", "--config", "/absent.toml"], "/absent.toml"),
    ],
)
def test_serve_refuses_bad_settings_before_loading_anything(argv, words, capsys):
    assert main(argv) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [[], ["nothing"], ["demote", "--tier", "moon"], ["config"], ["bench"]]
)
def test_wrong_usage_is_status_2(argv, capsys):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_verify_counts_the_records_of_a_state_directory(tmp_path, capsys):
    tmp_path.chmod(0o700)
    assert main(["verify", "--state-dir", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("0 records, 0 bad\n", "")


def test_verify_tells_damaged_from_unreadable(tmp_path, capsys, monkeypatch):
    assert main(["verify", "--state-dir", str(tmp_path / "absent")]) == 2
    assert "no such state directory" in capsys.readouterr().err
    tmp_path.chmod(0o700)
    steps = [ScrubStep(1, 2, "aa", None), ScrubStep(2, 2, "bb", "checksum")]
    monkeypatch.setattr("tiers.lmdb_store.scrub", lambda state: iter(steps))
    assert main(["verify", "--state-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "bb: checksum\n2 records, 1 bad\n"

    def unreadable(state):
        raise StoreError("io", "cannot be walked")

    monkeypatch.setattr("tiers.lmdb_store.scrub", unreadable)
    assert main(["verify", "--state-dir", str(tmp_path)]) == 2
    assert "homeport: cannot be walked" in capsys.readouterr().err


def test_verify_refuses_a_directory_that_a_daemon_holds(tmp_path, capsys):
    tmp_path.chmod(0o700)
    held = StateDir.open(tmp_path)
    try:
        assert main(["verify", "--state-dir", str(tmp_path)]) == 2
    finally:
        held.close()
    said = capsys.readouterr().err
    assert f"in use by the homeport process with pid {os.getpid()}" in said
    assert said.count("\n") == 1


async def test_an_operators_socket_needs_no_key_and_is_its_owners_only(tmp_path, capsys):
    place = tmp_path / "admin.sock"
    left_by_a_kill = socket.socket(socket.AF_UNIX)
    left_by_a_kill.bind(str(place))
    left_by_a_kill.close()
    async with daemon(tmp_path, "auth.keys=['k']", f"server.admin=unix:{place}") as (url, _):
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        assert await run("tiers", "--url", f"unix:{place}") == 0
        assert await run("sessions", "--url", f"unix:{place}") == 0
        capsys.readouterr()
        assert (
            await run("tiers", "--url", url, "--key", "k") == 1
        )  # not on the common port any more
        assert "Not Found" in capsys.readouterr().err
    assert not place.exists()


async def test_a_file_in_the_sockets_place_is_not_removed(tmp_path):
    place = tmp_path / "admin.sock"
    place.write_text("mine")
    with pytest.raises(StartError, match=r"admin\.sock"):
        await listen_for_operators(place)
    assert place.read_text() == "mine"
