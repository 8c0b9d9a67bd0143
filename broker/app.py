"""The only file that constructs things: one daemon, as nested lifetimes.

    serve
      engine            model, threads, store: `open_engine`, given from outside so that tests bring their own
        signals         the first SIGTERM or SIGINT asks for an orderly end, the second for an end now
          connections   every accepted connection, WebSocket or HTTP, and the background responses
            accepting   the listeners, clients' and operators', and the looks whether work moves, and how late the loop is

Leaving a level stops what is inside it first, so an orderly end is: stop accepting; tell the connections, whose
running turns have `server.grace`; cancel what is left; the engine writes what is dirty and its threads return.

Laws
    Until the engine is open there is nothing to lose: signals do what they do to any process.
    Exactly one line goes to stdout: `homeport ready http://HOST:PORT` (https with TLS), once requests are accepted.
    The wall clock is read here only.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
import socket
import ssl
import sys
import time
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from broker.access import Access, check_exposure
from broker.admission import Admission
from broker.arrivals import serve_fairly
from broker.config import Address
from broker.heap import keep_trimmed, trimmer
from broker.http import HttpSide, common_app, operators_app
from broker.listen import Door
from broker.loop_lag import watch_loop
from broker.observations import Observations
from broker.port import Port
from broker.session import Sessions
from broker.websocket import WebSocketSide

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

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


# How long the engine's thread may keep the interpreter while events wait to be sent; Python's 5 ms shows in every one.
_SWITCH_S = 5e-4


async def serve(
    config: Config, *, open_engine: OpenEngine, announce: Callable[[str], None]
) -> None:
    """Run the daemon until it is asked to stop. `announce` gets the ready line. Raises ConfigError, StartError."""
    check_exposure(config)
    tls = _tls(config)
    sys.setswitchinterval(_SWITCH_S)
    try:
        async with open_tracing(config.tracing) as exporters, open_engine(config) as engine:
            async with trio.open_nursery() as nursery:
                asked_to_stop = trio.Event()
                await nursery.start(_watch_signals, asked_to_stop, nursery.cancel_scope)
                observations = Observations(exporters)
                await _serve_port(config, engine, observations, announce, asked_to_stop, tls)
                nursery.cancel_scope.cancel()
    finally:
        gc.unfreeze()


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
    tls: ssl.SSLContext | None,
) -> None:
    settings = config.server
    secret = _secret(settings.state_dir) if config.auth.keys or config.auth.operators else b""
    port = Port(
        config=config,
        access=_access(config, settings.host, secret),
        engine=engine,
        sessions=Sessions(),
        admission=Admission(
            max_turns=config.admission.max_turns,
            max_tokens=config.admission.max_tokens,
            max_queued=config.admission.max_queued,
            max_queued_tokens=config.admission.max_queued_tokens,
            queue_timeout_s=config.admission.queue_timeout,
            several=len({*config.auth.keys, *config.auth.operators}) > 1,
        ),
        clock=SystemClock(),
        new_id=new_id,
        observations=observations,
    )
    sides = [HttpSide(port, common_app(port))]
    door = partial(
        Door,
        max_head=config.http.max_head,
        head_timeout_s=config.http.head_timeout,
        max_connections=settings.max_connections,
        max_per_address=settings.max_per_address,
    )
    doors = {
        door(websocket=WebSocketSide(port).serve, http=sides[0].serve, tls=tls): await _listen(
            settings.host, settings.port
        )
    }
    place = settings.admin_address
    if place is not None:
        host = place.host if isinstance(place, Address) else "localhost"
        access = _access(config, host, secret, trusted=isinstance(place, Path))
        sides.append(HttpSide(port, operators_app(port, access)))
        # Its own door: when clients hold every connection of theirs, operators still come in.
        serve_http = sides[-1].serve
        doors[door(websocket=serve_http, http=serve_http)] = await listen_for_operators(place)
    with ExitStack() as cleanup:
        if isinstance(place, Path):
            cleanup.callback(place.unlink, missing_ok=True)
        await _accept(port, doors, sides, announce, asked_to_stop, secure=tls is not None)


async def _accept(
    port: Port,
    doors: dict[Door, list[trio.SocketListener]],
    sides: list[HttpSide],
    announce: Callable[[str], None],
    asked_to_stop: trio.Event,
    *,
    secure: bool,
) -> None:
    settings = port.config.server
    async with trio.open_nursery() as connections:
        await connections.start(port.background.serve)
        async with trio.open_nursery() as accepting:
            for door, listeners in doors.items():
                accepting.start_soon(serve_fairly, door.serve, listeners, connections)
            accepting.start_soon(port.liveness.serve)
            accepting.start_soon(watch_loop, port.observations)
            accepting.start_soon(keep_trimmed, trimmer())
            common = next(iter(doors.values()))[0]
            # What was loaded stays for good. To walk over it in every full collection would stop the events for 250 ms.
            gc.collect()
            gc.freeze()
            announce(f"homeport ready {_url(settings.host, common, secure=secure)}")
            await asked_to_stop.wait()
            log.info(
                "stopping: %d turns have %g s", port.admission.statistics().admitted, settings.grace
            )
            accepting.cancel_scope.cancel()
        port.stopping.set()
        for side in sides:
            await side.stop()
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


async def listen_for_operators(place: Path | Address) -> list[trio.SocketListener]:
    """On a Unix socket that only its owner may open, or on a TCP address. Raises StartError."""
    if isinstance(place, Address):
        return await _listen(place.host, place.port)
    _remove_stale(place)
    listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        await listening.bind(str(place))
    except OSError as error:
        listening.close()
        raise StartError(f"cannot listen on {place}: {error.strerror or error}") from error
    finally:
        os.umask(mask)
    listening.listen()
    return [trio.SocketListener(listening)]


def _remove_stale(path: Path) -> None:
    """A socket that nobody listens on any more was left by a kill. Anything else at its place is not ours to remove."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        except OSError:
            return


def _access(config: Config, host: str, secret: bytes, *, trusted: bool = False) -> Access:
    return Access(
        host=host,
        hosts=config.server.allowed_hosts,
        origins=config.server.allowed_origins,
        keys=config.auth.keys,
        operators=config.auth.operators,
        secret=secret,
        shared=config.auth.shared,
        trusted=trusted,
    )


def _tls(config: Config) -> ssl.SSLContext | None:
    """Raises StartError. HTTP/1.1 only: HTTP/2 brings attacks of its own, and no client here needs it."""
    certificate, key = config.server.tls_certificate, config.server.tls_key
    if certificate is None or key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ssl.SSLError) as error:
        raise StartError(
            f"server.tls_certificate {certificate} with server.tls_key {key}: {error}"
        ) from error
    return context


def _url(host: str, listener: trio.SocketListener, *, secure: bool) -> str:
    shown = f"[{host}]" if ":" in host else host
    scheme = "https" if secure else "http"
    return f"{scheme}://{shown}:{listener.socket.getsockname()[1]}"


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
        kv_dtype=config.model.kv_dtype,
        prefill_dtype=config.model.prefill_dtype,
        block_tokens=config.engine.block_tokens,
        step_tokens=config.engine.step_tokens,
        mixed_tokens=config.engine.mixed_tokens,
        prefill_share=config.engine.prefill_share,
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
