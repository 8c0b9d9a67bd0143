"""Facts to findings. Pure.

Laws
    A finding says what is so, and one that is not good says what to do.
    broken   the daemon does not start, loses or leaks something, or does not answer
    warning  it works, and something will go wrong or is slower or less safe than it need be
    note     worth knowing; nothing to do
    ok       looked at, and good
    Keys appear in no finding.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.access import is_loopback
from broker.forecast import Shape, in_bytes, on_cuda, warnings
from broker.machine import IN_MEMORY, NETWORK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from broker.config import Config
    from broker.doctor.facts import (
        Certificate,
        Daemon,
        Facts,
        Installation,
        Limits,
        Setup,
        State,
    )

_OWN_FILES = 64  # beside connections: the store, its readers, logs, libraries; guessed
_EXPIRES_SOON = 14  # days
_SKEW_S = 60.0
_BUILT = 2026  # the clock is wrong before
_SECRET_BYTES = 32
_PUBLISHED = frozenset(
    hashlib.sha256(key.encode()).digest()
    for key in ("replace-me-alice", "replace-me-bob", "replace-me-operator")
)
_SOCKET_PATH = 107  # bytes, as the kernel allows


class Level(enum.Enum):
    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    check: str  # what was looked at: dotted, stable, for programs
    says: str
    todo: str | None = None


def ok(check: str, says: str) -> Finding:
    return Finding(Level.OK, check, says)


def note(check: str, says: str) -> Finding:
    return Finding(Level.NOTE, check, says)


def warn(check: str, says: str, todo: str) -> Finding:
    return Finding(Level.WARNING, check, says, todo)


def broken(check: str, says: str, todo: str) -> Finding:
    return Finding(Level.BROKEN, check, says, todo)


def diagnose(facts: Facts) -> list[Finding]:
    """Every finding, in the order in which one would mend them."""
    found = [*installation(facts.installation), *limits(facts.limits, facts.setup)]
    if facts.setup is not None:
        found += setup(facts.setup, facts.limits)
    if facts.daemon is not None:
        found += daemon(facts.daemon, facts.installation.homeport)
    return found


def exit_status(findings: list[Finding]) -> int:
    levels = {finding.level for finding in findings}
    return 2 if Level.BROKEN in levels else 1 if Level.WARNING in levels else 0


def installation(found: Installation) -> Iterator[Finding]:
    yield ok("python", f"homeport {found.homeport} on Python {found.python}")
    bad = [one for one in found.requirements if not one.fits]
    for one in bad:
        there = "is not installed" if one.installed is None else f"is {one.installed}"
        yield broken(
            "packages",
            f"{one.name} {there}, and homeport needs {one.wanted or 'it'}",
            f"pip install '{one.name}{one.wanted}'",
        )
    if not bad:
        shown = {one.name: one.installed for one in found.requirements}
        names = ("torch", "numba", "transformers", "lmdb", "trio")
        yield ok("packages", ", ".join(f"{name} {shown[name]}" for name in names if name in shown))
    yield _device(found)
    if found.architecture == "x86_64" and not {"avx2", "fma"} <= found.cpu_flags:
        yield warn(
            "cpu",
            f"{found.cores} cores without AVX2: the CPU's kernels will be several times slower",
            "use a newer CPU or a GPU; in a virtual machine, pass the host's CPU through",
        )
    else:
        widest = "AVX-512" if "avx512f" in found.cpu_flags else "AVX2"
        what = widest if found.architecture == "x86_64" else found.architecture
        yield ok("cpu", f"{found.cores} cores, {what}")


def _device(found: Installation) -> Finding:
    devices = found.devices
    if devices is None:
        return broken("device", "torch cannot be loaded", "reinstall it; see packages")
    if devices.gpu is not None:
        free, total = in_bytes(devices.gpu.free_bytes), in_bytes(devices.gpu.total_bytes)
        return ok("device", f"{devices.gpu.name}: {free} of {total} unused")
    if devices.driver:
        return warn(
            "device",
            f"there is an NVIDIA driver, and torch sees no GPU: {devices.reason}",
            "install a CUDA build of torch that this driver can run; in a container, pass the GPU in;"
            " look at CUDA_VISIBLE_DEVICES",
        )
    return note("device", f"no GPU, everything runs on the CPU: {devices.reason}")


def limits(found: Limits, given: Setup | None) -> Iterator[Finding]:
    if found.year < _BUILT:
        yield broken("clock", f"the clock says it is {found.year}", "set the clock; run NTP")
    config = given.config if given is not None else None
    soft = found.open_files.soft
    wanted = _OWN_FILES + (config.server.max_connections if config is not None else 0)
    if soft is not None and soft < wanted:
        yield warn(
            "open_files",
            f"a process may open {soft} files here, and server.max_connections with the store needs {wanted}",
            f"ulimit -n {wanted}, or LimitNOFILE={wanted} in the unit, or fewer server.max_connections",
        )
    else:
        yield ok("open_files", f"{soft or 'unlimited'} (ulimit -n)")
    if found.memory.swap_bytes:
        yield note(
            "swap",
            f"{in_bytes(found.memory.swap_bytes)} of swap: what is swapped out is prompts on a disk, and slow; encrypt it",
        )
    if found.memory.huge_pages == "never":
        yield note(
            "huge_pages", "transparent huge pages are off: large tiers cost more page tables"
        )


def setup(found: Setup, machine: Limits) -> Iterator[Finding]:
    config = found.config
    if config is None:
        yield broken(
            "config", found.problem or "unknown", "mend the file; homeport config check FILE"
        )
        return
    yield ok("config", found.sources)
    if found.exposure is not None:
        yield broken(
            "auth.exposure", found.exposure, "homeport init writes keys; or listen on 127.0.0.1"
        )
    if any(one in _PUBLISHED for one in (*config.auth.keys, *config.auth.operators)):
        yield broken(
            "auth.published",
            "a key of config/example-team.toml is in use: everybody knows it",
            "make keys of your own: openssl rand -hex 32, or homeport init",
        )
    yield from _reach(config)
    if found.listening is not None:
        yield broken("port", found.listening, "stop the other program, or choose another --port")
    if found.machine is not None:
        for one in warnings(config, found.shape, found.machine):
            yield warn(
                "sizes", one, "homeport config check shows the sums; homeport init fits them"
            )
        yield from _memory(found, config, machine)
    if found.state is not None:
        yield from _state(found.state)
    if found.certificate is not None:
        yield from _certificate(found.certificate, "tls")


def _reach(config: Config) -> Iterator[Finding]:
    server = config.server
    if config.server.admin is not None and config.server.admin.startswith("unix:"):
        path = str(server.admin_address)
        if len(path.encode()) > _SOCKET_PATH:
            yield broken("admin", f"{path} is too long for a Unix socket", "a shorter server.admin")
    if is_loopback(server.host):
        yield ok("reach", f"{server.host}:{server.port}: this machine only")
        return
    if server.tls_certificate is None:
        yield warn(
            "reach.tls",
            f"others can reach {server.host}:{server.port}, and prompts and keys cross the network as they are",
            "server.tls_certificate and tls_key, or a TLS proxy in front and host = 127.0.0.1",
        )
    if not server.allowed_hosts:
        yield warn(
            "reach.hosts",
            "server.allowed_hosts is empty: clients that use a name instead of an address get 421",
            "add the name in your clients' URLs",
        )


def _memory(found: Setup, config: Config, machine: Limits) -> Iterator[Finding]:
    """The tiers and the model against what we may use."""
    assert found.machine is not None
    cuda = on_cuda(config, found.machine)
    tiers = config.tiers.host.capacity + (0 if cuda else config.tiers.device.capacity)
    weights = 0 if cuda else found.weights_bytes or 0
    usable = machine.memory.usable_bytes
    limited = " that a control group allows" if machine.memory.limited else ""
    model = in_bytes(weights) if weights or cuda else "not here yet"
    said = f"tiers {in_bytes(tiers)} and model ({model}), of {in_bytes(usable)}{limited}"
    if tiers + weights > usable:
        yield broken("memory", said, "lower tiers.host.capacity; homeport init fits it")
    else:
        yield ok("memory", said)
    if found.shape is None:
        yield note("model", f"not here yet: the sizes are judged as those of {Shape().name}")


def _state(state: State) -> Iterator[Finding]:
    yield from _directory(state)
    yield from _secret(state)
    yield from _medium(state)
    if state.holder is not None:
        yield ok("state.lock", f"in use by the homeport process with pid {state.holder}")
    elif state.left_by is not None:
        yield ok("state.lock", f"free; pid {state.left_by} had it last")
    if state.store == "unsynced":
        yield warn(
            "store",
            "it was written without syncs (tiers.disk.durability), and the machine has started anew since",
            "the next start empties it; nothing can be done",
        )
    elif state.store == "unclean":
        yield note("store", "it was not closed in order: the next start walks over it first")
    elif state.store == "clean":
        yield ok("store", "closed in order; homeport verify reads all of it")
    for path in state.put_aside:
        yield warn(
            "store.aside",
            f"{path}: a store that could not be used, kept for you to look at",
            "delete it when you have; it takes room",
        )
    if state.newest_age_s is not None and state.newest_age_s < -_SKEW_S:
        yield warn(
            "clock",
            f"the store was written {-state.newest_age_s:.0f} s from now: the clock went back",
            "run NTP; times of expiry are wrong until then",
        )


def _directory(state: State) -> Iterator[Finding]:
    at = state.directory
    if at.symlink:
        yield broken("state.dir", f"{at.path} is a symbolic link", "name the real directory")
    elif not at.exists:
        if at.writable:
            yield ok("state.dir", f"{at.path}: will be made")
        else:
            yield broken(
                "state.dir",
                f"{at.path} does not exist, and may not be made by this user",
                "make it, and give it to the daemon's user; or choose another --state-dir",
            )
    elif not at.owned:
        yield broken(
            "state.dir", f"{at.path} belongs to another user", "run as that user, or chown it"
        )
    elif at.mode & 0o022:
        yield broken(
            "state.dir",
            f"{at.path}: others may write there (mode {at.mode:o})",
            f"chmod 700 {at.path}",
        )
    elif at.mode & 0o077:
        yield warn(
            "state.dir",
            f"{at.path}: others may read prompts there (mode {at.mode:o})",
            f"chmod 700 {at.path}; the next start does",
        )
    elif not at.writable:
        yield broken(
            "state.dir", f"{at.path} cannot be written", "remount it, or choose another --state-dir"
        )
    else:
        yield ok("state.dir", f"{at.path}: ours alone")


def _secret(state: State) -> Iterator[Finding]:
    secret = state.secret
    if not secret.exists:
        return
    if secret.mode & 0o077:
        yield broken(
            "state.secret",
            f"{secret.path}: others may read what keeps tenants apart (mode {secret.mode:o})",
            f"chmod 600 {secret.path}; if anybody may have read it, delete it: caches begin anew",
        )
    elif secret.size != _SECRET_BYTES:
        yield broken(
            "state.secret",
            f"{secret.path}: {secret.size} bytes instead of {_SECRET_BYTES}",
            "restore it from a backup, or delete it: every tenant's caches and responses are then lost",
        )
    else:
        yield ok("state.secret", "private")


def _medium(state: State) -> Iterator[Finding]:
    kind = state.file_system.kind
    if kind in NETWORK:
        yield broken(
            "state.medium",
            f"the state directory is on {kind}: LMDB's locks and maps do not hold over it",
            "choose a local disk",
        )
    elif kind in IN_MEMORY:
        yield warn(
            "state.medium",
            f"the state directory is on {kind}: it takes memory, and is gone with the machine's restart",
            "choose a local disk",
        )
    elif kind == "overlay":
        yield warn(
            "state.medium",
            "the state directory is in a container's own layer, and goes with the container",
            "mount a volume there",
        )
    else:
        yield ok("state.medium", f"{kind}, {in_bytes(state.file_system.free_bytes)} free")


def _certificate(found: Certificate, check: str) -> Iterator[Finding]:
    if found.problem is not None:
        yield broken(
            check,
            found.problem,
            "server.tls_certificate and tls_key must be a pair in PEM, and in time",
        )
        return
    if found.key_readable_by_others:
        yield warn(f"{check}.key", "others may read server.tls_key", "chmod 600 it")
    if found.days_left is None:
        return
    if found.days_left < 0:
        yield broken(
            check, f"the certificate ended {-found.days_left:.0f} days ago", "renew it, and restart"
        )
    elif found.days_left < _EXPIRES_SOON:
        yield warn(
            check, f"the certificate ends in {found.days_left:.1f} days", "renew it, and restart"
        )
    else:
        yield ok(check, f"the certificate has {found.days_left:.0f} days left")


def daemon(found: Daemon, our_version: str) -> Iterator[Finding]:
    if found.unreachable is not None:
        if found.expected:
            yield broken(
                "daemon",
                f"{found.url}: {found.unreachable}",
                "look at its log; systemctl status homeport",
            )
        else:
            yield note("daemon", f"none runs at {found.url}")
        return
    answers = found.answers or {}
    health, ready = answers.get("/healthz"), answers.get("/readyz")
    if health is None or not isinstance(health.body, dict) or "status" not in health.body:
        yield broken(
            "daemon", f"{found.url} is no homeport", "another program has this port: choose one"
        )
        return
    if health.status == 200:
        yield ok("daemon.health", f"{found.url}: lives")
    else:
        yield broken(
            "daemon.health", f"{found.url}: {health.body}", "restart it, and look at its log"
        )
    if ready is not None and ready.status == 200:
        yield ok("daemon.ready", "takes turns")
    else:
        yield warn(
            "daemon.ready", "takes no turns now: it starts or stops", "wait; look at its log"
        )
    if found.keyless == 200 and not found.loopback:
        yield broken(
            "daemon.auth",
            f"{found.url} answers anybody who can reach it: no key was asked for",
            "auth.keys, or host = 127.0.0.1 behind a proxy that asks",
        )
    elif found.keyless == 200:
        yield note("daemon.auth", "open: whoever is on this machine may ask")
    elif found.keyless is not None:
        yield ok("daemon.auth", "asks for a key")
    yield from _version(found, our_version)
    if found.clock_ahead_s is not None and abs(found.clock_ahead_s) > _SKEW_S:
        yield warn(
            "daemon.clock",
            f"its clock is {found.clock_ahead_s:+.0f} s from ours",
            "run NTP on both",
        )
    if found.certificate is not None:
        yield from _certificate(found.certificate, "daemon.tls")
    yield from _metrics(found.metrics or {})


def _version(found: Daemon, ours: str) -> Iterator[Finding]:
    if found.version is None:
        if found.keyless != 200:
            yield note("daemon.version", "not asked; --key KEY asks")
    elif found.version != ours:
        yield warn(
            "daemon.version",
            f"it is {found.version}, this command is {ours}",
            "restart the daemon after an upgrade, and use the command that came with it",
        )
    else:
        yield ok("daemon.version", ours)


def _metrics(values: dict[str, float]) -> Iterator[Finding]:
    """What only an operator's key shows."""
    if values.get('homeport_disk_state{state="degraded"}'):
        yield warn(
            "daemon.disk",
            "the disk refuses writes: nothing new is spilled, turns go on",
            "make room; homeport tiers says why",
        )
    bad = sum(
        value for name, value in values.items() if name.startswith("homeport_verify_failures_total")
    )
    if bad:
        yield warn(
            "daemon.verify",
            f"{bad:.0f} records failed a check since the start, and were computed again",
            "look at the disk and the memory: smartctl, memtest; homeport verify",
        )
