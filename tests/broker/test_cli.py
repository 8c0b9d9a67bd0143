"""The command line, in process; the daemon it talks to is a few lines of `http.server` on a thread of trio's."""

import http.server
import json
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from broker.__main__ import main
from broker.app import serve
from broker.config import load
from engine.api import SessionReport, TierReport
from tests.fakes import FakeService


class Reporting(FakeService):
    async def inspect(self):
        from dataclasses import replace

        tiers = (
            TierReport("device", 2 << 30, 512 << 20, 364, 10, 3),
            TierReport("disk", 40 << 30, 0, 0, 0, 0),
        )
        sessions = (
            SessionReport("resp_abc", "TOOL_WAIT", 1500, 12.4, {"device": 1500, "disk": 1472}),
        )
        return replace(await super().inspect(), tiers=tiers, sessions=sessions, running=2)


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
        assert "running 2" in lines[-1]
        assert await run("sessions", "--url", url) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split() == ["resp_abc", "TOOL_WAIT", "1500", "12s", "1500", "0", "1472"]
        assert await run("sessions", "--url", url, "--json") == 0
        assert json.loads(capsys.readouterr().out)["sessions"][0]["tokens"] == 1500


async def test_demote_says_how_much_moved(tmp_path, capsys):
    async with daemon(tmp_path) as (url, engine):
        assert await run("demote", "--tier", "disk", "--session", "resp_abc", "--url", url) == 0
        assert capsys.readouterr().out == "0 blocks moved to disk\n"
        ((tier, session),) = engine.demoted
        assert (tier.name, session) == ("DISK", "resp_abc")


async def test_a_missing_key_and_a_wrong_url_are_one_line_on_stderr(tmp_path, capsys):
    async with daemon(tmp_path, "auth.keys=['k']") as (url, _):
        assert await run("tiers", "--url", url) == 1
        assert "No API key" in capsys.readouterr().err
        assert await run("tiers", "--url", url, "--key", "k") == 0
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
    assert capsys.readouterr().out == f"{good}: good\n"
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
    assert main(["verify", "--state-dir", str(tmp_path / "absent")]) == 1
    assert "no such state directory" in capsys.readouterr().err
    tmp_path.chmod(0o700)
    assert main(["verify", "--state-dir", str(tmp_path)]) == 0
    assert "0 records, 0 bad" in capsys.readouterr().out
