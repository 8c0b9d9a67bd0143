"""A running daemon as lines of text: what `homeport top` shows. Pure: answers of `/admin` in, lines out.

Laws
    At most `height` lines of at most `width` characters, whatever the numbers are; without a height, all there is.
    Names that clients chose are shown without control characters: a terminal would obey them.
    A rate needs two looks; until then it is a dash, not a zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_BELOW = ("host", "disk", "remote")
_CELLS = {"device": "█", "host": "▓", "disk": "░", "": "·"}  # where a session's tokens are
_BAR = 20  # cells
_NAME = 24  # characters of a session's name


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the daemon said at one moment: `at` is seconds on the looker's monotonic clock."""

    at: float
    tiers: Mapping[str, Any]  # /admin/tiers, and so on
    sessions: Sequence[Mapping[str, Any]]
    turns: Sequence[Mapping[str, Any]]
    edge: Mapping[str, Any]
    now: float  # the daemon's wall clock


def render(
    snapshot: Snapshot, before: Snapshot | None, *, width: int, height: int | None
) -> list[str]:
    """`before` is an earlier look, for the rates."""
    lines = [*_head(snapshot, before), "", *_tiers(snapshot, before), ""]
    sessions, turns = _sessions(snapshot), _turns(snapshot)
    if height is not None:
        room = max(0, height - len(lines) - 1)
        of_turns = min(len(turns), max(room // 2, room - len(sessions)))
        sessions, turns = sessions[: room - of_turns], turns[:of_turns]
    lines += [*sessions, "", *turns]
    return [line[:width].rstrip() for line in lines[:height]]


def _head(snapshot: Snapshot, before: Snapshot | None) -> list[str]:
    engine, edge = snapshot.tiers, snapshot.edge
    restored = sum(engine["tokens_total"].get(tier, 0) for tier in _BELOW)
    restored_before = (
        None
        if before is None
        else sum(before.tiers["tokens_total"].get(tier, 0) for tier in _BELOW)
    )

    def rate(now: float, then: float | None) -> str:
        return _rate(snapshot, before, now, then)

    def tokens(source: str) -> str:
        then = None if before is None else before.tiers["tokens_total"].get(source, 0)
        return rate(engine["tokens_total"].get(source, 0), then)

    sampled = None if before is None else before.tiers["output_tokens_total"]
    disk = engine["disk"]
    return [
        f"turns {edge['turns_admitted']} running, {edge['turns_queued']} queued, {edge['turns_refused_total']} refused"
        f"   engine {engine['running']} running, {engine['waiting']} waiting, {engine['loading']} restoring"
        f"   sockets {edge['websockets']}",
        f"tokens/s computed {tokens('computed')}, device {tokens('device')}, restored {rate(restored, restored_before)},"
        f" sampled {rate(engine['output_tokens_total'], sampled)}"
        f"   hit share {engine['hit_share']:.1%}   amplification {engine['amplification']:.2f}",
        f"disk {disk['state']}" + (f" ({plain(disk['reason'])})" if disk["reason"] else "")
        + f"   {size(disk['pending_bytes'])} to write, lag {disk['writer_lag_s']:.1f}s"
        f"   {engine['dirty']} dirty blocks, oldest {disk['oldest_dirty_s']:.1f}s   {disk['reading']} reads under way",
    ]  # fmt: skip


def _tiers(snapshot: Snapshot, before: Snapshot | None) -> list[str]:
    rows = [("TIER", "", "FULL", "USED", "CAPACITY", "BLOCKS", "LEASED", "IN/S", "BACK/S", "OUT/S")]
    for tier in snapshot.tiers["tiers"]:
        used, capacity, name = tier["used_bytes"], tier["capacity_bytes"], tier["tier"]
        share = used / capacity if capacity else 0.0
        moves = [
            _rate(
                snapshot,
                before,
                snapshot.tiers[total].get(name, 0),
                None if before is None else before.tiers[total].get(name, 0),
            )
            for total in ("spilled_total", "restored_total", "evictions_total")
        ]
        if name == "device":
            moves[:2] = ["", ""]
        cells = round(share * _BAR)
        rows.append(
            (
                name,
                "█" * cells + "·" * (_BAR - cells),
                f"{share:.0%}",
                size(used),
                size(capacity),
                str(tier["blocks"]),
                str(tier["leased_blocks"]),
                *moves,
            )
        )
    return table(rows)


def _sessions(snapshot: Snapshot) -> list[str]:
    rows = [
        ("SESSION", "CLASS", "IDLE", "TOKENS", "DEVICE", "HOST", "DISK", "█ device ▓ host ░ disk")
    ]
    for one in sorted(snapshot.sessions, key=lambda session: float(session["idle_s"])):
        on = one["tokens_on"]
        rows.append(
            (
                plain(one["session"])[:_NAME],
                one["session_class"].lower(),
                took(one["idle_s"]),
                str(one["tokens"]),
                *(str(on.get(tier, 0)) for tier in ("device", "host", "disk")),
                residency(one["tokens"], on),
            )
        )
    return table(rows)


def _turns(snapshot: Snapshot) -> list[str]:
    rows = [("TURN OF", "AGO", "STATUS", *TURN_COLUMNS)]
    rows += [
        (
            plain(turn["session"] or turn["request_id"])[:_NAME],
            took(snapshot.now - turn["ended_at"]),
            turn["status"],
            *turn_cells(turn),
        )
        for turn in snapshot.turns
    ]
    return table(rows)


TURN_COLUMNS = (
    "PROMPT", "COMPUTED", "DEVICE", "RESTORED", "OUT", "FIRST", "TOTAL",
    "PARSE", "QUEUE", "RENDER", "RESTORE", "PREFILL", "DECODE", "STORE", "SEND",
)  # fmt: skip


def turn_cells(turn: Mapping[str, Any]) -> tuple[str, ...]:
    """A turn of `/admin/turns` under `TURN_COLUMNS`."""
    tokens, first = turn["tokens"], turn["first_token_s"]
    return (
        str(turn["prompt_tokens"]),
        str(tokens["computed"]),
        str(tokens["device"]),
        str(sum(tokens[tier] for tier in _BELOW)),
        str(turn["output_tokens"]),
        "-" if first is None else took(first),
        took(turn["total_s"]),
        *(took(seconds) for seconds in turn["stages_s"].values()),
    )


def residency(tokens: int, on: Mapping[str, int]) -> str:
    """Where a session's tokens are found first, as a bar."""
    if not tokens:
        return ""
    left, shares = tokens, []
    for tier in ("device", "host", "disk"):
        here = min(left, on.get(tier, 0))
        left -= here
        shares.append((_CELLS[tier], here))
    bar, seen = "", 0
    for cell, here in (*shares, (_CELLS[""], left)):
        seen += here
        bar += cell * (round(seen / tokens * _BAR) - len(bar))
    return bar


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their longest entry; the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def plain(name: str) -> str:
    """A client's word, fit for a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def took(seconds: float) -> str:
    """Three digits, and a unit."""
    if seconds <= 0:
        return "0"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms" if seconds >= 0.01 else f"{seconds * 1000:.1f}ms"
    if seconds < 100:
        return f"{seconds:.3g}s"
    return f"{seconds / 60:.0f}m" if seconds < 6000 else f"{seconds / 3600:.0f}h"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g}{unit}" if count < 1000 else f"{count:.0f}{unit}"
        count /= 1024
    return f"{count:.1f}TiB"


def _rate(snapshot: Snapshot, before: Snapshot | None, now: float, then: float | None) -> str:
    if before is None or then is None or snapshot.at <= before.at or now < then:
        return "-"  # the daemon may be another one by now
    return f"{(now - then) / (snapshot.at - before.at):.0f}"
