"""What is asked and ordered beside the APIs.

probes       whether we live and take turns: without a key; and the description of all routes, with one
operators'   what shows or moves everybody's: metrics, sessions, the tiers, demotion, the list of pins
owners'      what concerns one session of the key that asks: to pin it, to delete it; an operator's key may say whose
             (`tenant`: in the body, or in the query of a DELETE)

GET /admin/sessions     sessions whose KV is kept warm
    {"sessions": [{session, session_class, tokens, idle_s, tokens_on: {device, host, disk, remote: tokens}}]}
    A token may be in several tiers; `session_class` is burst, tool_wait, human_wait or closed.
GET /admin/tiers        the engine's report, `engine.api.EngineReport`, without its sessions; totals since the start
    {running, waiting, loading, leases, refs, dirty, tokens_total: {source: n}, output_tokens_total, spilled_total: {tier: n},
     restored_total: {tier: n}, evictions_total: {tier: n}, eviction_causes: {tier: {cause: n}}, recomputed_total: {reason: n},
     tiers: [{tier, capacity_bytes, used_bytes, blocks, leased_blocks, held_refs, block_bytes, classes: {class: blocks}}],
     disk: {state, reason, …},
     amplification, hit_share, pins: […], …}
GET /admin/edge         the sockets' side
    {websockets, turns_total: {transport: n}, ended_total: {status: n}, turns_admitted, turns_queued, turns_refused_total,
     background, responses, stored_total: {disk|memory: n}}
GET /admin/turns        the last turns that ended, newest first; `limit` (default 50) of the `KEPT_TURNS` that are kept
    {"now": seconds since the epoch, "turns": [{request_id, response_id, session, tenant, model, dialect, transport, trace_id, status, reason, ended_at, total_s,
     first_token_s, stages_s: {parse, queue, render, restore, prefill, decode, store, send: seconds},
     restore_s: {device, host, disk: seconds}, prompt_tokens, output_tokens,
     tokens: {computed, device, host, disk, remote: prompt tokens}, recomputed: {reason: prompt tokens},
     diverged: {at: token, part: field} or null}]}
    `stages_s` adds up to `total_s`, `tokens` to `prompt_tokens`, `recomputed` to `tokens.computed`. `ended_at` is seconds
    since the epoch, `tenant` the owner's name ("" without keys), `first_token_s` null where nothing was sampled, `response_id` and `session` null for a turn that was
    refused before it had them. `status` is completed, incomplete, cancelled, failed, refused or abandoned.
GET /admin/overview     all of it at once, bounded, for who looks again and again; `turns_after` leaves out what was seen
    {now, began_at, model, engine: as /admin/tiers without pins, edge: as /admin/edge,
     running: [{request_id, session, tenant, stage, so_far_s}], sessions_known: n,
     sessions: [{session, tenant, response_id, tokens, tokens_on, session_class or null, idle_s, pinned_s or null}],
     turns: as /admin/turns, those that ended after the first `turns_after`, turns_ended: n}
    Sessions are those that the daemon remembers, used last first (`overview.py`); `session_class` is null where nothing
    keeps one warm. `began_at` tells one daemon from the next: its counts begin at 0.
"""

from __future__ import annotations

import dataclasses
import math
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import trio
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from broker import keeping
from broker.config import duration
from broker.errors import BadRequest, Forbidden
from broker.metrics import render
from broker.observations import KEPT_TURNS
from broker.openapi import document
from broker.overview import SESSIONS, TURNS, Look, edge_json, overview
from broker.routes.body import read_body, tenant_of
from broker.wire.fields import optional_name, optional_string
from broker.wire.json_in import parse_object
from tiers.block import Tier

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

    from broker.access import Tenant
    from broker.port import Port

    Answering = Callable[[Request], Awaitable[Response]]

_TURNS = 50  # where `limit` does not say
_LIMIT_CHARS = 6
_COUNT_CHARS = 15
OPEN_PATHS = ("/healthz", "/readyz")  # need no key


def probe_routes(port: Port) -> list[Route]:
    routes = _Admin(port)
    return [
        Route("/healthz", routes.healthz, methods=["GET"]),
        Route("/readyz", routes.readyz, methods=["GET"]),
        Route("/openapi.json", routes.openapi, methods=["GET"]),
    ]


def operator_routes(port: Port) -> list[Route]:
    routes = _Admin(port)
    return [
        Route("/metrics", _operators(routes.metrics), methods=["GET"]),
        Route("/admin/sessions", _operators(routes.sessions), methods=["GET"]),
        Route("/admin/tiers", _operators(routes.tiers), methods=["GET"]),
        Route("/admin/edge", _operators(routes.edge), methods=["GET"]),
        Route("/admin/turns", _operators(routes.turns), methods=["GET"]),
        Route("/admin/overview", _operators(routes.overview), methods=["GET"]),
        Route("/admin/demote", _operators(routes.demote), methods=["POST"]),
        Route("/admin/pins", _operators(routes.pins), methods=["GET"]),
    ]


def owner_routes(port: Port) -> list[Route]:
    routes = _Admin(port)
    return [
        Route("/admin/pins", routes.pin, methods=["POST"]),
        Route("/admin/pins/{session:path}", routes.unpin, methods=["DELETE"]),
        Route("/admin/sessions/{session:path}", routes.forget, methods=["DELETE"]),
    ]


def _operators(answer: Answering) -> Answering:
    async def guarded(request: Request) -> Response:
        if not tenant_of(request).operator:
            raise Forbidden(
                "This shows or moves what is everybody's: it needs an operator's key (auth.operators).",
                code="operator_only",
            )
        return await answer(request)

    return guarded


class _Admin:
    def __init__(self, port: Port) -> None:
        self._port = port

    async def healthz(self, request: Request) -> Response:
        """503 when there is work and nothing moves: only a restart helps then."""
        stalled_s = self._port.liveness.stalled_s
        if stalled_s is None:
            return JSONResponse({"status": "ok"})
        said = {"status": "stalled", "stalled_s": round(stalled_s, 1)}
        return JSONResponse(said, status_code=503)

    async def readyz(self, request: Request) -> Response:
        self._port.check_open()
        return JSONResponse({"status": "ready", "model": self._port.config.model.name})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(document(version("homeport")))

    async def metrics(self, request: Request) -> Response:
        report = await self._port.engine.inspect(sessions=False)
        return PlainTextResponse(
            render(report, self._port.report()),
            media_type="text/plain; version=0.0.4; charset=utf-8",
        )

    async def sessions(self, request: Request) -> Response:
        report = await self._port.engine.inspect()
        return JSONResponse({"sessions": [dataclasses.asdict(one) for one in report.sessions]})

    async def tiers(self, request: Request) -> Response:
        report = dataclasses.asdict(await self._port.engine.inspect(sessions=False))
        del report["sessions"]
        return JSONResponse(report)

    async def edge(self, request: Request) -> Response:
        return JSONResponse(edge_json(self._port.report()))

    async def overview(self, request: Request) -> Response:
        seen = request.query_params.get("turns_after", "0")
        if not seen.isdecimal() or not seen.isascii() or len(seen) > _COUNT_CHARS:
            raise BadRequest(
                "'turns_after' must be a number of turns.",
                code="invalid_value",
                param="turns_after",
            )
        port, observations = self._port, self._port.observations
        report = await port.engine.inspect(sessions=False)
        nodes = port.sessions.newest()
        located = await port.engine.locate((node.lease, node.keys) for node in nodes[:SESSIONS])
        look = Look(
            now=port.clock.now(),
            monotonic=trio.current_time(),
            began_at=port.began_at,
            model=port.config.model.name,
            engine=report,
            edge=port.report(),
            nodes=nodes,
            located=located,
            turns=observations.after(int(seen), TURNS),
            turns_ended=observations.ended_total,
            under_way=port.under_way,
        )
        return JSONResponse(overview(look))

    async def turns(self, request: Request) -> Response:
        limit = request.query_params.get("limit", str(_TURNS))
        if not limit.isdecimal() or len(limit) > _LIMIT_CHARS or not 1 <= int(limit) <= KEPT_TURNS:
            raise BadRequest(
                f"'limit' must be between 1 and {KEPT_TURNS}.", code="invalid_value", param="limit"
            )
        last = self._port.observations.last(int(limit))
        now = self._port.clock.now()
        return JSONResponse({"now": now, "turns": [turn.as_json() for turn in last]})

    async def demote(self, request: Request) -> Response:
        body = parse_object(await read_body(request, self._port))
        tiers = {"host": Tier.HOST, "disk": Tier.DISK}
        tier, session = body.get("tier"), body.get("session")
        owner = optional_string(body, "tenant")
        if not isinstance(tier, str) or tier not in tiers:
            raise BadRequest("'tier' must be 'host' or 'disk'.", code="invalid_value", param="tier")
        if not isinstance(session, str | None):
            raise BadRequest(
                "'session' must be a string or null.", code="invalid_type", param="session"
            )
        salt: bytes | None = None
        if owner is not None:
            if session is None:
                raise BadRequest(
                    "'tenant' says whose 'session' is meant: name that, too.",
                    code="invalid_value",
                    param="session",
                )
            salt = self._port.access.on_behalf_of(tenant_of(request), owner).salt
        moved = await self._port.engine.demote(tiers[tier], session, salt)
        return JSONResponse({"moved_blocks": moved})

    async def pins(self, request: Request) -> Response:
        report = await self._port.engine.inspect(sessions=False)
        return JSONResponse({"pins": [dataclasses.asdict(one) for one in report.pins]})

    async def pin(self, request: Request) -> Response:
        body = parse_object(await read_body(request, self._port))
        tenant = self._port.access.on_behalf_of(tenant_of(request), optional_string(body, "tenant"))
        session, response_id = optional_name(body, "session"), optional_name(body, "response_id")
        if (session is None) == (response_id is None):
            raise BadRequest(
                "Name the 'session' or a 'response_id' of it, and not both.",
                code="invalid_value",
                param="session",
            )
        seconds = _ttl(body.get("ttl"))
        if response_id is not None:
            session = await keeping.session_of(self._port, tenant, response_id)
        assert session is not None
        pinned = await keeping.pin(self._port, tenant, session, seconds)
        return JSONResponse(dataclasses.asdict(pinned))

    async def unpin(self, request: Request) -> Response:
        session = request.path_params["session"]
        await keeping.unpin(self._port, self._owner(request), session)
        return JSONResponse({"session": session, "deleted": True})

    async def forget(self, request: Request) -> Response:
        session = request.path_params["session"]
        forgotten = await keeping.forget(self._port, self._owner(request), session)
        return JSONResponse(dataclasses.asdict(forgotten))

    def _owner(self, request: Request) -> Tenant:
        """Whose session is meant."""
        named = request.query_params.get("tenant")
        return self._port.access.on_behalf_of(tenant_of(request), named)


def _ttl(value: Any) -> float:
    """A pin's time: "90s", "1h", or a number of seconds. Raises BadRequest."""
    seconds: float | None = None
    if isinstance(value, str):
        seconds = duration(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value
    if seconds is None or not 0 < seconds < math.inf:
        raise BadRequest(
            "'ttl' must be a time such as '30m' or '1h', or a number of seconds.",
            code="invalid_value",
            param="ttl",
        )
    return seconds
