"""The only file that constructs things: one daemon, as nested lifetimes.

    serve
      engine            model, threads, store: `open_engine`, given from outside so that tests bring their own
        signals         the first SIGTERM or SIGINT asks for an orderly end, the second for an end now
          connections   every accepted connection, WebSocket or HTTP, and the background responses
            accepting   the listeners, and a look at how late the loop is

Leaving a level stops what is inside it first, so an orderly end is: stop accepting; tell the connections, whose
running turns have `server.grace`; cancel what is left; the engine writes what is dirty and its threads return.

Laws
    Until the engine is open there is nothing to lose: signals do what they do to any process.
    Exactly one line goes to stdout: `homeport ready http://HOST:PORT`, once requests are accepted.
    The wall clock is read here only.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import trio

from broker.access import Access, check_exposure
from broker.admission import Admission
from broker.http import HttpSide
from broker.listen import Door
from broker.loop_lag import watch_loop
from broker.observations import Observations
from broker.port import Port
from broker.session import Sessions
from broker.websocket import WebSocketSide

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from broker.breakdown import TurnRecord
    from broker.config import Config, Tracing
    from broker.port import Service

    OpenEngine = Callable[[Config], AbstractAsyncContextManager[Service]]
    Exporters = tuple[Callable[[TurnRecord], None], ...]

log = logging.getLogger(__name__)

_SECRET_BYTES = 32
_LAST_WORDS_S = 2.0  # beyond the grace: for closing frames, answers and lingering


class StartError(Exception):
    """The daemon cannot start for a reason that the operator can mend, in one line."""


class SystemClock:
    def now(self) -> float:
        return time.time()  # noqa: TID251


async def serve(
    config: Config, *, open_engine: OpenEngine, announce: Callable[[str], None]
) -> None:
    """Run the daemon until it is asked to stop. `announce` gets the ready line. Raises ConfigError, StartError."""
    check_exposure(config.server.host, config.auth.keys)
    async with open_tracing(config.tracing) as exporters, open_engine(config) as engine:
        async with trio.open_nursery() as nursery:
            asked_to_stop = trio.Event()
            await nursery.start(_watch_signals, asked_to_stop, nursery.cancel_scope)
            await _serve_port(config, engine, Observations(exporters), announce, asked_to_stop)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_tracing(settings: Tracing) -> AsyncIterator[Exporters]:
    """Who is to be told of turns. Raises StartError where the extra is asked for and not installed."""
    if not settings.enabled:
        yield ()
        return
    try:
        from broker.tracing import Tracing as Spans
    except ImportError as error:
        raise StartError(
            f"tracing.enabled needs OpenTelemetry: pip install 'homeport[otel]' ({error})"
        ) from error
    spans = Spans.to(settings.endpoint)
    try:
        yield (spans.export,)
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _LAST_WORDS_S):
            await trio.to_thread.run_sync(spans.close, abandon_on_cancel=True)


async def _serve_port(
    config: Config,
    engine: Service,
    observations: Observations,
    announce: Callable[[str], None],
    asked_to_stop: trio.Event,
) -> None:
    settings = config.server
    port = Port(
        config=config,
        access=Access(
            host=settings.host,
            hosts=settings.allowed_hosts,
            origins=settings.allowed_origins,
            keys=config.auth.keys,
            secret=_secret(settings.state_dir) if config.auth.keys else b"",
            shared=config.auth.shared,
        ),
        engine=engine,
        sessions=Sessions(),
        admission=Admission(
            max_turns=config.admission.max_turns,
            max_queued=config.admission.max_queued,
            queue_timeout_s=config.admission.queue_timeout,
        ),
        clock=SystemClock(),
        new_id=new_id,
        observations=observations,
    )
    http = HttpSide(port)
    door = Door(
        max_head=config.http.max_head,
        head_timeout_s=config.http.head_timeout,
        max_connections=settings.max_connections,
        websocket=WebSocketSide(port).serve,
        http=http.serve,
    )
    listeners = await _listen(settings.host, settings.port)
    async with trio.open_nursery() as connections:
        await connections.start(port.background.serve)
        async with trio.open_nursery() as accepting:
            accepting.start_soon(watch_loop, port.observations)
            accepting.start_soon(
                partial(trio.serve_listeners, door.serve, listeners, handler_nursery=connections)
            )
            announce(f"homeport ready {_url(settings.host, listeners[0])}")
            await asked_to_stop.wait()
            log.info(
                "stopping: %d turns have %g s", port.admission.statistics().admitted, settings.grace
            )
            accepting.cancel_scope.cancel()
        port.stopping.set()
        await http.stop()
        connections.cancel_scope.deadline = trio.current_time() + settings.grace + _LAST_WORDS_S


async def _watch_signals(
    asked_to_stop: trio.Event,
    serving: trio.CancelScope,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as arriving:
        task_status.started()
        async for number in arriving:
            log.info("%s", signal.Signals(number).name)
            if asked_to_stop.is_set():
                serving.cancel()
            asked_to_stop.set()


async def _listen(host: str, port: int) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def _url(host: str, listener: trio.SocketListener) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.socket.getsockname()[1]}"


def new_id(prefix: str) -> str:
    """An id that nobody guesses: 192 random bits."""
    return f"{prefix}_{secrets.token_hex(24)}"


def _secret(state_dir: Path) -> bytes:
    """The key of tenants' names and salts; made once. Losing it loses every tenant's cache and stored responses."""
    path = state_dir / "secret"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        secret = path.read_bytes()
        if len(secret) != _SECRET_BYTES:
            raise StartError(f"{path}: {len(secret)} bytes instead of {_SECRET_BYTES}") from None
        return secret
    except OSError as error:
        raise StartError(f"{path}: {error.strerror}") from error
    secret = secrets.token_bytes(_SECRET_BYTES)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    return secret


@asynccontextmanager
async def open_model_engine(config: Config) -> AsyncIterator[Service]:
    """The real engine. Imported here: torch takes seconds, and no other command needs it."""
    from engine.restore import RestoreLimits
    from engine.service import EngineSettings, open_engine
    from tiers.block import Tier
    from tiers.policy import Limits, SessionClass, Watermarks
    from tiers.store import Durability

    tiers = config.tiers
    settings = EngineSettings(
        state_dir=config.server.state_dir,
        model_path=config.model.path,
        model_name=config.model.name,
        device=config.model.device,
        dtype=config.model.dtype,
        block_tokens=config.engine.block_tokens,
        step_tokens=config.engine.step_tokens,
        mixed_tokens=config.engine.mixed_tokens,
        draft_tokens=config.engine.draft_tokens,
        max_running=config.engine.max_running,
        max_waiting=config.engine.max_waiting,
        device_bytes=tiers.device.capacity,
        host_bytes=tiers.host.capacity,
        disk_bytes=tiers.disk.capacity,
        limits=Limits(
            host_after_s=tiers.host.after,
            disk_after_s=tiers.disk.after,
            max_lag_s=tiers.disk.max_lag,
            probation=tiers.probation,
            protect_s={
                SessionClass.BURST: tiers.protect.burst,
                SessionClass.TOOL_WAIT: tiers.protect.tool_wait,
                SessionClass.HUMAN_WAIT: tiers.protect.human_wait,
            },
            watermarks={
                Tier.DEVICE: Watermarks(tiers.device.high, tiers.device.low),
                Tier.HOST: Watermarks(tiers.host.high, tiers.host.low),
                Tier.DISK: Watermarks(tiers.disk.high, tiers.disk.low),
            },
            tenant_share=tiers.tenant_share,
            pins=tiers.pins,
        ),
        policy=tiers.policy,
        compact=tiers.disk.compact,
        durability=Durability(tiers.disk.durability),
        min_free_bytes=tiers.disk.min_free,
        scrub_bytes_s=tiers.disk.scrub,
        readers=tiers.disk.readers,
        threads=config.engine.threads,
        grammar_timeout_s=config.engine.grammar_timeout,
        restore=RestoreLimits(
            decide=tiers.restore.decide,
            deadline=tiers.restore.deadline,
            floor_s=tiers.restore.floor,
            max_loading=tiers.restore.max_loading,
        ),
        canary=tiers.canary,
    )
    async with open_engine(settings, SystemClock().now) as service:
        yield service
