"""Everything that an operator looks at, as one bounded answer: what the dashboard asks for once a second. Pure.

Laws
    Every number is one that `/metrics`, `/admin/tiers`, `/admin/edge` or `/admin/turns` tells too.
    At most `SESSIONS` sessions, those used last, at most `TURNS` turns, those ended last, and `RUNNING` that run: an answer
    has a bound, however many clients there are.
    A session is its newest turn: forks of it that are older are not looked for. Where its tokens are is looked up, also
    when nothing keeps it warm any more; that a daemon remembers it is enough, and a restart forgets what nobody asked for.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from broker.breakdown import Breakdown, TurnRecord
    from broker.metrics import EdgeReport
    from broker.session import Node
    from engine.api import EngineReport, SessionReport

SESSIONS = 64  # a row each, and a walk over the keys of their chains
TURNS = 128
RUNNING = 64


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen at one moment."""

    now: float  # seconds since the epoch
    monotonic: float  # the same moment, on the clock of the turns under way
    began_at: float  # when this daemon did, since the epoch
    model: str
    engine: EngineReport
    edge: EdgeReport
    nodes: Sequence[Node]  # the newest of every session that is remembered, used last first
    places: Sequence[Mapping[str, int]]  # {tier: tokens} of the first of them
    turns: Sequence[TurnRecord]  # newest first
    turns_ended: int
    under_way: Iterable[Breakdown]


def overview(look: Look) -> dict[str, Any]:
    """The answer; its shape is documented in `routes/admin.py`."""
    engine = dataclasses.asdict(dataclasses.replace(look.engine, sessions=(), pins=()))
    del engine["sessions"], engine["pins"]
    leases = {one.lease: one for one in look.engine.sessions}
    return {
        "now": look.now,
        "began_at": look.began_at,
        "model": look.model,
        "engine": engine,
        "edge": edge_json(look.edge),
        "running": [one.under_way(look.monotonic) for one in islice(look.under_way, RUNNING)],
        "sessions": [
            _session(node, places, leases.get(node.lease) if node.lease else None, look.now)
            for node, places in zip(look.nodes, look.places, strict=False)
        ],
        "sessions_known": len(look.nodes),
        "turns": [turn.as_json() for turn in look.turns],
        "turns_ended": look.turns_ended,
    }


def edge_json(edge: EdgeReport) -> dict[str, Any]:
    """The sockets' side: also the whole of `/admin/edge`."""
    return {
        "websockets": edge.websockets,
        "turns_total": edge.turns_total,
        "ended_total": edge.observed.ended_total,
        "turns_admitted": edge.admission.admitted,
        "turns_queued": edge.admission.waiting,
        "turns_refused_total": edge.admission.refused_total,
        "background": edge.background,
        "responses": edge.sessions,
        "stored_total": edge.stored_total,
    }


def _session(
    node: Node, places: Mapping[str, int], lease: SessionReport | None, now: float
) -> dict[str, Any]:
    return {
        "session": node.session,
        "tenant": node.tenant,
        "response_id": node.response_id,
        "tokens": len(node.tokens),
        "tokens_on": places,
        "session_class": None if lease is None else lease.session_class,
        "idle_s": max(0.0, now - node.created_at) if lease is None else lease.idle_s,
        "pinned_s": None if lease is None else lease.pinned_s,
    }
