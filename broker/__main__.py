"""The command line. `homeport serve` is the daemon; `sessions`, `turns`, `tiers`, `top`, `demote`, `pin`, `unpin` and `forget`
ask a running one over HTTP; `config check` and `verify` read files.

Exit status: 0 done, 1 failed (the reason is one line on stderr), 2 wrong usage or configuration. `verify`: 1 for a
damaged store, 2 for one that cannot be read.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import resource
import signal
import socket
import sys
import urllib.parse
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker import top
from broker.config import Config, ConfigError, load

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_DEFAULT_URL = "http://127.0.0.1:8321"
_ASK_TIMEOUT_S = 60.0
_WIDE = 220  # columns of what is not a terminal


class CommandFailed(Exception):
    """What to say on stderr before leaving with `status`."""

    status = 1


class CannotRead(CommandFailed):
    """`verify` found nothing out: neither good nor damaged."""

    status = 2


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except ConfigError as error:
        print(f"homeport: {error}", file=sys.stderr)
        return 2
    except CommandFailed as error:
        print(f"homeport: {error}", file=sys.stderr)
        return error.status
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="homeport", description="An LLM server for agents whose KV cache survives."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the daemon")
    _add_config(serve)
    serve.add_argument("--host", help="address to listen on (server.host)")
    serve.add_argument("--port", type=int, help="port to listen on; 0 picks one (server.port)")
    serve.set_defaults(run=_serve)

    config = commands.add_parser("config", help="look at configuration files")
    check = config.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "check", help="say whether a file is good, and what it will hold"
    )
    check.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="read in order, later keys win"
    )
    check.set_defaults(run=_config_check)

    sessions = commands.add_parser("sessions", help="sessions that a running daemon keeps warm")
    _add_daemon(sessions)
    sessions.set_defaults(run=_sessions)

    tiers = commands.add_parser("tiers", help="what a running daemon keeps where")
    _add_daemon(tiers)
    tiers.set_defaults(run=_tiers)

    turns = commands.add_parser(
        "turns", help="the last turns of a running daemon, and where their time went"
    )
    _add_daemon(turns)
    turns.add_argument(
        "--limit", type=int, default=20, metavar="N", help="how many, newest first (%(default)s)"
    )
    turns.set_defaults(run=_turns)

    live = commands.add_parser(
        "top", help="tiers, sessions and turns of a running daemon, live; q quits"
    )
    _add_daemon(live)
    live.add_argument(
        "--every",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="between two looks (%(default)s)",
    )
    live.add_argument(
        "--once", action="store_true", help="look once and print, as without a terminal"
    )
    live.set_defaults(run=_top)

    demote = commands.add_parser("demote", help="move sessions' KV down a tier now")
    _add_daemon(demote)
    demote.add_argument("--tier", choices=("host", "disk"), required=True)
    demote.add_argument("--session", metavar="ID", help="one session; all of them without it")
    demote.set_defaults(run=_demote)

    pin = commands.add_parser("pin", help="keep a session's KV for a time, whatever else happens")
    _add_daemon(pin)
    named = pin.add_mutually_exclusive_group(required=True)
    named.add_argument("--session", metavar="ID")
    named.add_argument("--response", metavar="ID", help="any stored response of the session")
    pin.add_argument("--ttl", required=True, metavar="TIME", help='such as "30m" or "1h"')
    pin.set_defaults(run=_pin)

    unpin = commands.add_parser("unpin", help="end a session's pin")
    _add_daemon(unpin)
    unpin.add_argument("--session", metavar="ID", required=True)
    unpin.set_defaults(run=_unpin)

    forget = commands.add_parser("forget", help="delete a session: its responses, and its KV")
    _add_daemon(forget)
    forget.add_argument("--session", metavar="ID", required=True)
    forget.set_defaults(run=_forget)

    verify = commands.add_parser(
        "verify", help="check every record of a state directory (daemon stopped)"
    )
    _add_config(verify)
    verify.set_defaults(run=_verify)

    bench = commands.add_parser("bench", help="measure")
    benchmarks = bench.add_subparsers(required=True, metavar="BENCHMARK")
    agent = benchmarks.add_parser(
        "agent", help="an agent's loop, interrupted in every way we promise to survive"
    )
    from broker.bench import agent as agent_bench

    agent_bench.add_arguments(agent)
    agent.set_defaults(run=agent_bench.main)

    policy = benchmarks.add_parser(
        "policy", help="what each order of victims costs on a trace, beside Belady's"
    )
    from broker.bench import policy as policy_bench

    policy_bench.add_arguments(policy)
    policy.set_defaults(run=policy_bench.main)

    moves = benchmarks.add_parser(
        "tiers", help="blocks between tiers, beside what memory and disk can do"
    )
    from broker.bench import tiers as tiers_bench

    tiers_bench.add_arguments(moves)
    moves.set_defaults(run=tiers_bench.main)

    events = benchmarks.add_parser(
        "events", help="from a sampled token to its event's bytes on the socket"
    )
    from broker.bench import events as events_bench

    events_bench.add_arguments(events)
    events.set_defaults(run=events_bench.main)

    peers = benchmarks.add_parser(
        "serve", help="the same sessions against another server, by turns, as ratios"
    )
    from broker.bench import serve as serve_bench

    serve_bench.add_arguments(peers)
    peers.set_defaults(run=serve_bench.main)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="TOML; may be given again, later files win key by key",
    )
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="server.state_dir")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="key.path=value",
        help="one key, over every file; may be given again",
    )


def _add_daemon(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", default=_DEFAULT_URL, help=f"the daemon, or unix:PATH (default {_DEFAULT_URL})"
    )
    parser.add_argument("--key", help="a bearer key, if the daemon wants one")
    parser.add_argument("--json", action="store_true", help="the daemon's answer as it is")


def _config(arguments: argparse.Namespace) -> Config:
    """The files, then --set, then the options that have names of their own."""
    config = load(arguments.config, arguments.assignments)
    server = config.server
    if arguments.state_dir is not None:
        server = replace(server, state_dir=arguments.state_dir.expanduser())
    if getattr(arguments, "host", None) is not None:
        server = replace(server, host=arguments.host)
    if getattr(arguments, "port", None) is not None:
        if not 0 <= arguments.port <= 65535:
            raise ConfigError(f"--port must be between 0 and 65535, not {arguments.port}")
        server = replace(server, port=arguments.port)
    return replace(config, server=server)


def _serve(arguments: argparse.Namespace) -> int:
    import trio

    from broker.access import check_exposure
    from broker.app import StartError, open_model_engine, serve

    config = _config(arguments)
    check_exposure(config)
    logging.basicConfig(
        stream=sys.stderr,
        level=config.log.level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
    )
    logging.getLogger("trio-websocket").setLevel(
        logging.INFO
    )  # its debug lines hold what clients say

    # A core dump would hold every prompt in memory.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    from engine.model import UnsupportedModel
    from tiers.block import StoreError
    from tiers.state_dir import StateDirRefused

    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # ends a start at once; `serve` takes over when it can end well
    reasons: list[str] = []
    try:
        trio.run(lambda: serve(config, open_engine=open_model_engine, announce=_announce))
    except* (ConfigError, StartError, UnsupportedModel, StoreError, StateDirRefused) as group:
        reasons = [str(error) for error in _leaves(group)]
    if reasons:
        raise CommandFailed("; ".join(reasons))
    return 0


def _announce(line: str) -> None:
    print(line, flush=True)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    out: list[BaseException] = []
    for error in group.exceptions:
        out += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return out


def _config_check(arguments: argparse.Namespace) -> int:
    from broker.access import check_exposure
    from broker.forecast import forecast, look_around, read_shape

    config = load(arguments.files)
    check_exposure(config)
    print(f"{', '.join(str(one) for one in arguments.files)}: good")
    print("\n".join(forecast(config, read_shape(config), look_around(config))))
    return 0


def _sessions(arguments: argparse.Namespace) -> int:
    answer = _ask(arguments, "GET", "/admin/sessions")
    if arguments.json:
        print(json.dumps(answer, indent=2))
        return 0
    pins = {one["session"]: one for one in _ask(arguments, "GET", "/admin/pins")["pins"]}
    rows = [("SESSION", "CLASS", "TOKENS", "IDLE", "DEVICE", "HOST", "DISK", "PINNED")]
    for one in answer["sessions"]:
        on = one["tokens_on"]
        where = [str(on.get(tier, 0)) for tier in ("device", "host", "disk")]
        pin = pins.get(one["session"])
        rows.append(
            (
                top.plain(one["session"]),
                one["session_class"],
                str(one["tokens"]),
                f"{one['idle_s']:.0f}s",
                *where,
                "-" if pin is None else f"{pin['expires_s']:.0f}s",
            )
        )
    print(_table(rows))
    return 0


def _turns(arguments: argparse.Namespace) -> int:
    answer = _ask(arguments, "GET", f"/admin/turns?limit={arguments.limit}")
    if arguments.json:
        print(json.dumps(answer, indent=2))
        return 0
    rows = [("RESPONSE", "AGO", "STATUS", "OVER", *top.TURN_COLUMNS)]
    for turn in answer["turns"]:
        over = f"{turn['dialect']}/{turn['transport']}"
        status = turn["status"] if turn["reason"] is None else turn["reason"]
        ago = top.took(answer["now"] - turn["ended_at"])
        name = turn["response_id"] or turn["request_id"]
        rows.append((name, ago, status, over, *top.turn_cells(turn)))
    print(_table(rows))
    return 0


def _top(arguments: argparse.Namespace) -> int:
    from broker.terminal import look, watch

    def ask(path: str) -> Any:
        return _ask(arguments, "GET", path)

    if arguments.json or arguments.once or not sys.stdout.isatty():
        snapshot = look(ask)
        lines = top.render(snapshot, None, width=_WIDE, height=None)
        print(json.dumps(asdict(snapshot), indent=2) if arguments.json else "\n".join(lines))
    elif not 0.1 <= arguments.every <= 3600:
        raise CommandFailed(
            f"--every must be between 0.1 and 3600 seconds, not {arguments.every:g}"
        )
    else:
        with suppress(KeyboardInterrupt):
            watch(ask, arguments.every, CommandFailed)
    return 0


def _tiers(arguments: argparse.Namespace) -> int:
    answer = _ask(arguments, "GET", "/admin/tiers")
    if arguments.json:
        print(json.dumps(answer, indent=2))
        return 0
    rows = [("TIER", "USED", "CAPACITY", "BLOCKS", "LEASED", "REFS")]
    for tier in answer["tiers"]:
        used, capacity = _mib(tier["used_bytes"]), _mib(tier["capacity_bytes"])
        counts = [str(tier[name]) for name in ("blocks", "leased_blocks", "held_refs")]
        rows.append((tier["tier"], used, capacity, *counts))
    print(_table(rows))
    print(_disk_line(answer["disk"]))
    print(
        f"amplification {answer['amplification']:.3f}  hit share {answer['hit_share']:.1%}"
        f"  pins {len(answer['pins'])}"
    )
    state = {name: answer[name] for name in ("running", "waiting", "loading", "leases", "refs")}
    print("  ".join(f"{name} {value}" for name, value in state.items()))
    reasons = {reason: n for reason, n in answer["recomputed_total"].items() if n}
    if reasons:
        table = [("COMPUTED BECAUSE", "TOKENS")]
        table += [(why, str(n)) for why, n in sorted(reasons.items(), key=lambda one: -one[1])]
        print("\n" + _table(table))
    return 0


def _disk_line(disk: Mapping[str, Any]) -> str:
    """How the disk tier is, in words."""
    if disk["state"] == "off":
        return "disk off"
    said = f"disk {disk['state']}"
    if disk["reason"] is not None:
        said += f" ({disk['reason']}): nothing new is spilled, turns go on"
    said += f"  {disk['records']} records, {_mib(disk['pending_bytes'])} to write"
    if not disk["index_complete"]:
        said += ", index being read"
    return said


def _demote(arguments: argparse.Namespace) -> int:
    body = {"tier": arguments.tier, "session": arguments.session}
    answer = _ask(arguments, "POST", "/admin/demote", body)
    if arguments.json:
        print(json.dumps(answer, indent=2))
    else:
        print(f"{answer['moved_blocks']} blocks moved to {arguments.tier}")
    return 0


def _pin(arguments: argparse.Namespace) -> int:
    body = {"session": arguments.session, "response_id": arguments.response, "ttl": arguments.ttl}
    answer = _ask(arguments, "POST", "/admin/pins", body)
    if arguments.json:
        print(json.dumps(answer, indent=2))
    else:
        print(
            f"{answer['session']}: {answer['tokens']} tokens, {_mib(answer['held_bytes'])},"
            f" pinned for {answer['ttl_s']} s"
        )
    return 0


def _unpin(arguments: argparse.Namespace) -> int:
    answer = _ask(arguments, "DELETE", f"/admin/pins/{_quoted(arguments.session)}")
    print(json.dumps(answer, indent=2) if arguments.json else f"{answer['session']}: not pinned")
    return 0


def _forget(arguments: argparse.Namespace) -> int:
    answer = _ask(arguments, "DELETE", f"/admin/sessions/{_quoted(arguments.session)}")
    if arguments.json:
        print(json.dumps(answer, indent=2))
    else:
        print(f"{answer['session']}: {answer['deleted_responses']} responses deleted")
    return 0


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="")


def _verify(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from tiers.block import StoreError
    from tiers.lmdb_store import scrub
    from tiers.state_dir import StateDir, StateDirRefused

    directory = _config(arguments).server.state_dir
    if not directory.is_dir():
        raise CannotRead(f"{directory}: no such state directory")
    records, bad = 0, 0
    try:
        state = StateDir.open(directory)
        try:
            # A small store is done before there is anything to show.
            with tqdm(unit=" records", file=sys.stderr, delay=1) as bar:
                for step in scrub(state):
                    records = bar.total = step.total
                    bar.update()
                    if step.reason is not None:
                        bad += 1
                        bar.write(f"{step.name}: {step.reason}", file=sys.stdout)
        finally:
            state.close()
    except (StateDirRefused, StoreError) as error:
        raise CannotRead(str(error)) from error
    print(f"{records} records, {bad} bad")
    return 1 if bad else 0


def _ask(arguments: argparse.Namespace, method: str, path: str, body: object = None) -> Any:
    """One request to the daemon; its JSON. Raises CommandFailed with the daemon's own words."""
    connection = _connection(arguments.url)
    headers = {"content-type": "application/json"}
    if arguments.key:
        headers["authorization"] = f"Bearer {arguments.key}"
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        status, text = answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise CommandFailed(f"no daemon at {arguments.url}: {error}") from error
    finally:
        connection.close()
    try:
        value = json.loads(text)
    except ValueError:
        raise CommandFailed(f"{arguments.url} is no homeport: status {status}, not JSON") from None
    if status != 200:
        raise CommandFailed(f"{arguments.url}: {value.get('error', {}).get('message', status)}")
    return value


class _UnixConnection(http.client.HTTPConnection):
    """To `server.admin = "unix:PATH"`."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_ASK_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(address: str) -> http.client.HTTPConnection:
    """Raises CommandFailed."""
    if address.startswith("unix:"):
        return _UnixConnection(address.removeprefix("unix:"))
    url = urllib.parse.urlsplit(address)
    if url.scheme not in ("http", "https") or url.hostname is None:
        raise CommandFailed(f"--url {address}: write http://HOST:PORT or unix:PATH")
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    return kind(url.hostname, url.port, timeout=_ASK_TIMEOUT_S)


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f}MiB"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(top.table(rows))


if __name__ == "__main__":
    sys.exit(main())
