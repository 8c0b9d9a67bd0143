"""What operators ask of a running daemon, and order: over HTTP, as tables for people and as JSON for programs."""

from __future__ import annotations

import json
import sys
import urllib.parse
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from broker import top
from broker.commands.asking import add_daemon, ask
from broker.commands.failed import CommandFailed
from broker.commands.page import Page, add

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from broker.commands.page import Commands

_WIDE = 220  # columns of what is not a terminal

_SESSIONS = Page(
    "sessions that a running daemon keeps warm",
    """\
List the sessions whose KV is kept: what each waits for (burst, tool_wait,
human_wait, closed), how many tokens it has, how long it has idled, how many of
its tokens are in each tier, and how long it stays pinned.""",
    (
        ("of the daemon on this machine", "homeport sessions"),
        ("over the operators' socket", "homeport sessions --url unix:/run/homeport/admin.sock"),
    ),
)
_TIERS = Page(
    "what a running daemon keeps where",
    """\
Print how full each tier is, how the disk is, what share of the cache's promise
is kept (amplification: tokens computed for each new one; hit share), and why
prompt tokens were computed.""",
    (
        ("of the daemon on this machine", "homeport tiers"),
        ("for a program", "homeport tiers --json"),
    ),
)
_TURNS = Page(
    "the last turns of a running daemon, and where their time went",
    """\
List turns that ended, newest first: how, over which API, how many tokens came
from where, and the seconds of each stage: parse, queue, render, restore,
prefill, decode, store, send. A turn's stages add up to its whole time.""",
    (
        ("the last twenty", "homeport turns"),
        ("the last one, whole", "homeport turns --limit 1 --json"),
    ),
)
_TOP = Page(
    "tiers, sessions and turns of a running daemon, live; q quits",
    """\
Show tiers as they fill, sessions as they move between them, and the last turns,
until q is pressed. Where there is no terminal it looks once and prints.""",
    (
        ("live", "homeport top"),
        ("a look every five seconds", "homeport top --every 5"),
        ("once, for a log", "homeport top --once"),
    ),
    environment=(("TERM, LINES, COLUMNS", "read by curses: the terminal"),),
)
_DEMOTE = Page(
    "move sessions' KV down a tier now",
    """\
Move the KV of one session, or of all that do not run, to RAM or to disk, as
idling for tiers.host.after or tiers.disk.after would. Nothing is lost: the next
turn restores it.""",
    (
        ("everything to disk, before maintenance", "homeport demote --tier disk"),
        ("one session to RAM", "homeport demote --tier host --session my-thread"),
    ),
)
_PIN = Page(
    "keep a session's KV for a time, whatever else happens",
    """\
Protect a session's KV from eviction for a time. Pins end by themselves, are
listed by `homeport sessions`, and together never cover more than tiers.pins of
the host tier: above it a pin is refused. They do not survive a restart.""",
    (
        ("by its name", "homeport pin --session my-thread --ttl 1h"),
        ("by any of its stored responses", "homeport pin --response resp_0c53 --ttl 30m"),
    ),
)
_UNPIN = Page(
    "end a session's pin",
    "End a pin before its time. The KV is evicted when its turn comes, as any other.",
    (("one session", "homeport unpin --session my-thread"),),
)
_FORGET = Page(
    "delete a session: its responses, and its KV",
    """\
Delete a session's stored responses, and its KV from every tier; blocks that
another session shares stay with it. This cannot be undone. Bytes inside the
store's file are freed for later writes, not wiped.""",
    (("one session", "homeport forget --session my-thread"),),
)


def add_commands(commands: Commands) -> None:
    sessions = add(commands, "sessions", _SESSIONS)
    add_daemon(sessions)
    sessions.set_defaults(run=_sessions)

    tiers = add(commands, "tiers", _TIERS)
    add_daemon(tiers)
    tiers.set_defaults(run=_tiers)

    turns = add(commands, "turns", _TURNS)
    add_daemon(turns)
    turns.add_argument(
        "--limit",
        type=int,
        default=20,
        metavar="N",
        help="how many, newest first (default: %(default)s)",
    )
    turns.set_defaults(run=_turns)

    live = add(commands, "top", _TOP)
    add_daemon(live)
    live.add_argument(
        "--every",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="between two looks, 0.1 to 3600 (default: %(default)s)",
    )
    live.add_argument(
        "--once", action="store_true", help="look once and print, as without a terminal"
    )
    live.set_defaults(run=_top)

    demote = add(commands, "demote", _DEMOTE)
    add_daemon(demote)
    demote.add_argument(
        "--tier", choices=("host", "disk"), required=True, help="where to: RAM, or disk"
    )
    demote.add_argument("--session", metavar="ID", help="one session; all of them without it")
    _add_tenant(demote)
    demote.set_defaults(run=_demote)

    pin = add(commands, "pin", _PIN)
    add_daemon(pin)
    named = pin.add_mutually_exclusive_group(required=True)
    named.add_argument("--session", metavar="ID", help="the session's name")
    named.add_argument("--response", metavar="ID", help="any stored response of the session")
    pin.add_argument(
        "--ttl", required=True, metavar="TIME", help='for how long, such as "30m" or "1h"'
    )
    _add_tenant(pin)
    pin.set_defaults(run=_pin)

    unpin = add(commands, "unpin", _UNPIN)
    add_daemon(unpin)
    unpin.add_argument("--session", metavar="ID", required=True, help="the session's name")
    _add_tenant(unpin)
    unpin.set_defaults(run=_unpin)

    forget = add(commands, "forget", _FORGET)
    add_daemon(forget)
    forget.add_argument("--session", metavar="ID", required=True, help="the session's name")
    _add_tenant(forget)
    forget.set_defaults(run=_forget)


def _add_tenant(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tenant",
        metavar="NAME",
        help="whose session, for an operator's key: as `homeport turns --json` and the dashboard name him",
    )


def _sessions(arguments: argparse.Namespace) -> int:
    answer = ask(arguments, "GET", "/admin/sessions")
    if arguments.json:
        print(json.dumps(answer, indent=2))
        return 0
    pins = {one["session"]: one for one in ask(arguments, "GET", "/admin/pins")["pins"]}
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
    answer = ask(arguments, "GET", f"/admin/turns?limit={arguments.limit}")
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

    def look_at(path: str) -> Any:
        return ask(arguments, "GET", path)

    if arguments.json or arguments.once or not sys.stdout.isatty():
        snapshot = look(look_at)
        lines = top.render(snapshot, None, width=_WIDE, height=None)
        print(json.dumps(asdict(snapshot), indent=2) if arguments.json else "\n".join(lines))
    elif not 0.1 <= arguments.every <= 3600:
        raise CommandFailed(
            f"--every must be between 0.1 and 3600 seconds, not {arguments.every:g}"
        )
    else:
        with suppress(KeyboardInterrupt):
            watch(look_at, arguments.every, CommandFailed)
    return 0


def _tiers(arguments: argparse.Namespace) -> int:
    answer = ask(arguments, "GET", "/admin/tiers")
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
    body = {
        "tier": arguments.tier,
        "session": arguments.session,
        "tenant": arguments.tenant,
    }
    answer = ask(arguments, "POST", "/admin/demote", body)
    if arguments.json:
        print(json.dumps(answer, indent=2))
    else:
        print(f"{answer['moved_blocks']} blocks moved to {arguments.tier}")
    return 0


def _pin(arguments: argparse.Namespace) -> int:
    body = {
        "session": arguments.session,
        "response_id": arguments.response,
        "ttl": arguments.ttl,
        "tenant": arguments.tenant,
    }
    answer = ask(arguments, "POST", "/admin/pins", body)
    if arguments.json:
        print(json.dumps(answer, indent=2))
    else:
        print(
            f"{answer['session']}: {answer['tokens']} tokens, {_mib(answer['held_bytes'])},"
            f" pinned for {answer['ttl_s']} s"
        )
    return 0


def _unpin(arguments: argparse.Namespace) -> int:
    answer = ask(arguments, "DELETE", f"/admin/pins/{_named(arguments)}")
    print(json.dumps(answer, indent=2) if arguments.json else f"{answer['session']}: not pinned")
    return 0


def _forget(arguments: argparse.Namespace) -> int:
    answer = ask(arguments, "DELETE", f"/admin/sessions/{_named(arguments)}")
    if arguments.json:
        print(json.dumps(answer, indent=2))
    else:
        print(f"{answer['session']}: {answer['deleted_responses']} responses deleted")
    return 0


def _named(arguments: argparse.Namespace) -> str:
    """A session, and whose, as a path's end."""
    name = urllib.parse.quote(arguments.session, safe="")
    if arguments.tenant is None:
        return name
    return f"{name}?{urllib.parse.urlencode({'tenant': arguments.tenant})}"


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f}MiB"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(top.table(rows))
