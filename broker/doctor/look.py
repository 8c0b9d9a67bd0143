"""The doctor's eyes: packages, /proc, files, sockets. Nothing is changed, and nothing is held for longer than a look.

Laws
    The state directory is neither made, nor tightened, nor opened: a daemon may have it, and another may want it.
    A key is sent only over a connection whose other end is known: loopback, a Unix socket, or verified TLS.
    What cannot be looked at is a fact, not an error.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import socket
import ssl
import stat
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import metadata
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from packaging.requirements import Requirement as Wanted

from broker import machine
from broker.access import check_exposure, is_loopback
from broker.commands.asking import connect
from broker.config import ConfigError
from broker.doctor.facts import (
    Answer,
    Certificate,
    Daemon,
    Installation,
    Limits,
    PathFacts,
    Requirement,
    Setup,
    State,
)
from broker.forecast import dtype_of, look_around, read_shape, read_weights
from tiers.inspection import ENVIRONMENT, Finding, glance
from tiers.state_dir import look_at_lock, this_boot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from broker.config import Config
    from engine.device import Devices

_ASK_TIMEOUT_S = 5.0
_DAY_S = 86400.0
_PROBES = ("/healthz", "/readyz")
_STORE = {Finding.CLEAN: "clean", Finding.UNCLEAN: "unclean", Finding.UNSYNCED: "unsynced"}


def look_at_installation() -> Installation:
    return Installation(
        homeport=metadata.version("homeport"),
        python=platform.python_version(),
        requirements=tuple(_requirements(metadata.requires("homeport") or [])),
        devices=_devices(),
        architecture=platform.machine(),
        cpu_flags=machine.cpu_flags(),
        cores=machine.cores(),
    )


def _requirements(texts: list[str]) -> list[Requirement]:
    """Those of every installation, not of an extra."""
    found = []
    for text in texts:
        wanted = Wanted(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            found.append(Requirement(wanted.name, str(wanted.specifier), None, fits=False))
            continue
        fits = wanted.specifier.contains(installed, prereleases=True)
        found.append(Requirement(wanted.name, str(wanted.specifier), installed, fits))
    return found


def _devices() -> Devices | None:
    try:
        from engine.device import look
    except (ImportError, OSError):
        return None
    return look()


def look_at_limits(now: float) -> Limits:
    year = datetime.fromtimestamp(now, UTC).year
    return Limits(machine.memory(), machine.open_files(), year)


def look_at_setup(sources: str, load: Callable[[], Config], now: float) -> Setup:
    """`load` reads the configuration, and raises ConfigError."""
    try:
        config = load()
    except ConfigError as error:
        return Setup(sources, None, str(error))
    try:
        check_exposure(config)
        exposure = None
    except ConfigError as error:
        exposure = str(error)
    around = look_around(config)
    state = look_at_state(config.server.state_dir, now)
    return Setup(
        sources=sources,
        config=config,
        problem=None,
        exposure=exposure,
        listening=None if state.holder else cannot_listen(config.server.host, config.server.port),
        shape=read_shape(config),
        machine=around,
        weights_bytes=read_weights(config, dtype_of(config, around)),
        state=state,
        certificate=_certificate(config, now),
    )


def look_at_state(directory: Path, now: float) -> State:
    store = directory / ENVIRONMENT
    try:
        lock = look_at_lock(directory)
    except OSError:
        lock = None
    held = lock is not None and lock.held
    newest = [file.stat().st_mtime for file in (store / "data.mdb",) if _may_see(file)]
    return State(
        directory=_path(directory),
        secret=_path(directory / "secret"),
        file_system=machine.file_system(directory),
        newest_age_s=now - max(newest) if newest else None,
        holder=lock.pid if lock is not None and held else None,
        left_by=lock.pid if lock is not None and not held else None,
        store=None if held else _store(store),
        put_aside=tuple(sorted(directory.glob(f"{ENVIRONMENT}.*"))) if not held else (),
    )


def _store(path: Path) -> str | None:
    try:
        return _STORE.get(glance(path, this_boot()))
    except OSError:
        return None


def _may_see(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _path(path: Path) -> PathFacts:
    try:
        status = path.lstat()
    except OSError:
        above = machine.nearest_directory(path)
        return PathFacts(path, exists=False, writable=os.access(above, os.W_OK | os.X_OK))
    return PathFacts(
        path,
        exists=True,
        symlink=stat.S_ISLNK(status.st_mode),
        owned=status.st_uid == os.geteuid(),
        mode=stat.S_IMODE(status.st_mode),
        writable=os.access(path, os.W_OK),
        size=status.st_size,
    )


def cannot_listen(host: str, port: int) -> str | None:
    """Why a daemon could not listen there; None if it could."""
    if port == 0:
        return None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        return f"server.host {host}: {error.strerror}"
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(address)
                trial.listen()
            except OSError as error:
                return f"{host}:{port}: {error.strerror}"
    return None


def _certificate(config: Config, now: float) -> Certificate | None:
    server = config.server
    if server.tls_certificate is None or server.tls_key is None:
        return None
    try:
        ends = _shaken_hands(server.tls_certificate, server.tls_key)
        others = bool(server.tls_key.stat().st_mode & 0o077)
    except (OSError, ssl.SSLError) as error:
        return Certificate(f"{server.tls_certificate} with {server.tls_key}: {error}")
    return Certificate(None, (ends - now) / _DAY_S, others)


def _shaken_hands(certificate: Path, key: Path) -> float:
    """When a certificate ends, in seconds since the epoch: a handshake with ourselves, in memory, tells that the two files
    are a pair and in time. Raises OSError, ssl.SSLError."""
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(certificate, key, password="")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = _trusting(certificate).wrap_bio(to_client, to_server)
    server = ours.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return _end(client.getpeercert())


def _trusting(certificate: Path) -> ssl.SSLContext:
    """Our own certificate, whoever signed it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(certificate)
    return context


def _end(certificate: object) -> float:
    assert isinstance(certificate, dict)
    return ssl.cert_time_to_seconds(certificate["notAfter"])


def url_of(config: Config) -> str | None:
    """Where a daemon with this configuration is asked; None where its port is not known."""
    server = config.server
    if not server.port:
        return None
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(server.host, server.host)
    scheme = "http" if server.tls_certificate is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{server.port}"


def look_at_daemon(
    url: str, key: str | None, now: float, *, expected: bool, config: Config | None = None
) -> Daemon:
    """Raises CommandFailed for what is no URL."""
    door = url.startswith("unix:")
    parts = urlsplit(url)
    loopback = door or is_loopback(parts.hostname or "")
    known = loopback or parts.scheme == "https"
    ask = _Asking(url, key if known else None, config)
    try:
        answers = {path: ask.get(path) for path in _PROBES}
        keyless = None if door else ask.get("/v1/models").status
        described = ask.get("/openapi.json", keyed=True)
        metrics = ask.get("/metrics", keyed=True)
    except (OSError, http.client.HTTPException) as error:
        return Daemon(url, loopback, expected, unreachable=str(error) or type(error).__name__)
    return Daemon(
        url,
        loopback,
        expected,
        answers=answers,
        keyless=keyless,
        keyed=key is not None,
        clock_ahead_s=None if ask.date is None else ask.date - now,
        certificate=None if ask.ends is None else Certificate(None, (ask.ends - now) / _DAY_S),
        version=_version(described),
        metrics=_metrics(metrics),
    )


class _Asking:
    """Requests to one daemon; remembers its clock and its certificate."""

    def __init__(self, url: str, key: str | None, config: Config | None) -> None:
        self._url, self._key = url, key
        self._certificate = None if config is None else config.server.tls_certificate
        self.date: float | None = None
        self.ends: float | None = None

    def get(self, path: str, *, keyed: bool = False) -> Answer:
        """Raises OSError, HTTPException."""
        connection = self._connect()
        headers = {"authorization": f"Bearer {self._key}"} if keyed and self._key else {}
        try:
            connection.request("GET", path, headers=headers)
            if isinstance(connection.sock, ssl.SSLSocket):
                self.ends = _end(connection.sock.getpeercert())
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        finally:
            connection.close()
        date = answer.getheader("date")
        if date is not None:
            self.date = parsedate_to_datetime(date).timestamp()
        try:
            return Answer(answer.status, json.loads(text))
        except ValueError:
            return Answer(answer.status, text)

    def _connect(self) -> http.client.HTTPConnection:
        if self._certificate is None or not self._url.startswith("https"):
            return connect(self._url, _ASK_TIMEOUT_S)
        parts = urlsplit(self._url)
        context = _trusting(self._certificate)
        return http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=_ASK_TIMEOUT_S, context=context
        )


def _version(answer: Answer) -> str | None:
    match answer.body:
        case {"info": {"version": str(version)}}:
            return version
        case _:
            return None


def _metrics(answer: Answer) -> dict[str, float] | None:
    if answer.status != 200 or not isinstance(answer.body, str):
        return None
    values = {}
    for line in answer.body.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("homeport_"):
            values[name] = float(value)
    return values
