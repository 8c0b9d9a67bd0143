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
    from collections.abc import Iterable, Sequence

    from broker.breakdown import Breakdown, TurnRecord
    from broker.metrics import EdgeReport
    from broker.session import Node
    from engine.api import EngineReport, Located

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
    located: Sequence[Located]  # of the first of them
    turns: Sequence[TurnRecord]  # newest first
    turns_ended: int
    under_way: Iterable[Breakdown]


def overview(look: Look) -> dict[str, Any]:
    """The answer; its shape is documented in `routes/admin.py`."""
    engine = dataclasses.asdict(dataclasses.replace(look.engine, sessions=(), pins=()))
    del engine["sessions"], engine["pins"]
    return {
        "now": look.now,
        "began_at": look.began_at,
        "model": look.model,
        "engine": engine,
        "edge": edge_json(look.edge),
        "running": [one.under_way(look.monotonic) for one in islice(look.under_way, RUNNING)],
        "sessions": [
            _session(node, located, look.now)
            for node, located in zip(look.nodes, look.located, strict=False)
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


def _session(node: Node, located: Located, now: float) -> dict[str, Any]:
    idle_s = located.idle_s
    return {
        "session": node.session,
        "tenant": node.tenant,
        "response_id": node.response_id,
        "tokens": len(node.tokens),
        "tokens_on": located.tokens_on,
        "session_class": located.session_class,
        "idle_s": max(0.0, now - node.created_at) if idle_s is None else idle_s,
        "pinned_s": located.pinned_s,
    }
