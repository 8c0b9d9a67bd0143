"""One TOML file to frozen dataclasses. Every key, its default and its bounds live here; reasons are in config/default.toml.

Laws
    A default is written twice, here and in config/default.toml, and a test holds them equal.
    An unknown key, a wrong type or an impossible size is one `ConfigError` that names the key, the file and, for a
    misspelt key, the nearest known one. Nothing is ignored, nothing is guessed.
    No environment variables. Later files and `--set key.path=value` win over earlier ones, key by key.
    Keys never stay in memory as text: `auth.keys` and `auth.operators` become SHA-256 digests here. A file need not hold
    them as text either: "sha256:" and 64 hexadecimal digits are a digest. Only long random keys are safe in that form.

How values are written
    bytes   "4GiB", "512MiB"; a plain integer is bytes
    times   "250ms", "90s", "5m", "2h", "30d"; a plain number is seconds
    shares  0.95: a part of 1
    "auto"  for a key that may be absent: homeport chooses
"""

from __future__ import annotations

import difflib
import hashlib
import re
import tomllib
import types
import typing
from dataclasses import dataclass, fields, is_dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType, cast

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Bytes = NewType("Bytes", int)
Seconds = NewType("Seconds", float)
Share = NewType("Share", float)  # of 1
KeyDigest = NewType("KeyDigest", bytes)  # SHA-256 of a bearer key's bytes

_DIGEST = "sha256:"
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
_BYTE_UNITS = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}
_TIME_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class ConfigError(Exception):
    """The operator's mistake, in one line fit to print."""


@dataclass(frozen=True, slots=True)
class Within:
    """An inclusive range, in the key's unit."""

    least: float
    most: float = inf


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Server:
    host: str = "127.0.0.1"
    port: Annotated[int, Within(0, 65535)] = 8321
    admin: str | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    state_dir: Path = Path.home() / ".local" / "share" / "homeport"
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_connections: Annotated[int, Within(1)] = 512
    max_per_address: Annotated[int, Within(1)] = 256
    grace: Annotated[Seconds, Within(0)] = Seconds(25.0)
    stall: Annotated[Seconds, Within(1)] = Seconds(120.0)

    @property
    def admin_address(self) -> Path | Address | None:
        """A Unix socket's path, or a TCP address; None: operators use the common port. Raises ConfigError."""
        if self.admin is None:
            return None
        if self.admin.startswith("unix:"):
            path = Path(self.admin.removeprefix("unix:")).expanduser()
            if path.name:
                return path
        host, colon, port = self.admin.rpartition(":")
        if colon and host and port.isdecimal() and int(port) <= 65535:
            return Address(host.strip("[]"), int(port))
        raise ConfigError(f'server.admin must be "unix:PATH" or "HOST:PORT", not {self.admin!r}')


@dataclass(frozen=True, slots=True)
class Auth:
    keys: tuple[KeyDigest, ...] = ()
    operators: tuple[KeyDigest, ...] = ()
    max_connections: Annotated[int, Within(1)] = 256
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    path: str | None = None
    name: str = "smollm2-135m-instruct"
    aliases: tuple[str, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    prefill_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


@dataclass(frozen=True, slots=True)
class Engine:
    block_tokens: Annotated[int, Within(1, 1024)] = 32
    step_tokens: Annotated[int, Within(1)] = 512
    mixed_tokens: Annotated[int, Within(1)] = 128
    prefill_share: Annotated[float, Within(0.01, 1)] = 0.75
    draft_tokens: Annotated[int, Within(0, 31)] = 15
    max_running: Annotated[int, Within(1)] = 16
    max_waiting: Annotated[int, Within(1)] = 256
    threads: Annotated[int | None, Within(1)] = None
    grammar_timeout: Annotated[Seconds, Within(0.01)] = Seconds(5.0)


@dataclass(frozen=True, slots=True)
class DeviceTier:
    capacity: Annotated[Bytes, Within(1)] = Bytes(2 * GIB)
    high: Annotated[Share, Within(0.1, 1)] = Share(0.98)
    low: Annotated[Share, Within(0.1, 1)] = Share(0.95)


@dataclass(frozen=True, slots=True)
class HostTier:
    capacity: Annotated[Bytes, Within(0)] = Bytes(4 * GIB)
    after: Annotated[Seconds, Within(0)] = Seconds(300.0)
    high: Annotated[Share, Within(0.1, 1)] = Share(0.98)
    low: Annotated[Share, Within(0.1, 1)] = Share(0.95)


@dataclass(frozen=True, slots=True)
class DiskTier:
    capacity: Annotated[Bytes, Within(0)] = Bytes(40 * GIB)
    after: Annotated[Seconds, Within(0)] = Seconds(1800.0)
    max_lag: Annotated[Seconds, Within(0, 3600)] = Seconds(1.0)
    high: Annotated[Share, Within(0.1, 1)] = Share(0.98)
    low: Annotated[Share, Within(0.1, 1)] = Share(0.95)
    readers: Annotated[int, Within(1, 64)] = 4
    min_free: Annotated[Bytes, Within(0)] = Bytes(GIB)
    durability: Literal["power", "process"] = "power"
    compact: Literal["off", "bf16", "int8"] = "off"
    scrub: Annotated[Bytes, Within(0, GIB)] = Bytes(4 * MIB)


@dataclass(frozen=True, slots=True)
class Restore:
    decide: bool = True
    deadline: Annotated[float, Within(1, 1000)] = 4.0
    floor: Annotated[Seconds, Within(0, 3600)] = Seconds(0.5)
    max_loading: Annotated[int, Within(1, 1024)] = 8


@dataclass(frozen=True, slots=True)
class Protect:
    burst: Annotated[Seconds, Within(0)] = Seconds(120.0)
    tool_wait: Annotated[Seconds, Within(0)] = Seconds(300.0)
    human_wait: Annotated[Seconds, Within(0)] = Seconds(14 * 3600.0)


@dataclass(frozen=True, slots=True)
class Tiers:
    policy: Literal["session_lru", "lru", "slru"] = "session_lru"
    pins: Annotated[Share, Within(0, 0.5)] = Share(0.25)
    tenant_share: Annotated[Share, Within(0.01, 1)] = Share(1.0)
    probation: bool = True
    ttl_default: Annotated[Seconds, Within(0)] = Seconds(0.0)
    ttl_max: Annotated[Seconds, Within(0)] = Seconds(24 * 3600.0)
    canary: Annotated[Share, Within(0, 1)] = Share(0.0)
    device: DeviceTier = DeviceTier()
    host: HostTier = HostTier()
    disk: DiskTier = DiskTier()
    restore: Restore = Restore()
    protect: Protect = Protect()


@dataclass(frozen=True, slots=True)
class WebSocket:
    enabled: bool = True
    max_message: Annotated[Bytes, Within(KIB, GIB)] = Bytes(32 * MIB)
    max_fragments: Annotated[int, Within(1)] = 1024
    message_timeout: Annotated[Seconds, Within(1)] = Seconds(60.0)
    ping_interval: Annotated[Seconds, Within(1)] = Seconds(20.0)
    ping_timeout: Annotated[Seconds, Within(1)] = Seconds(20.0)
    max_lifetime: Annotated[Seconds, Within(1)] = Seconds(3600.0)
    send_timeout: Annotated[Seconds, Within(0.1)] = Seconds(30.0)
    max_in_flight: Annotated[int, Within(1, 1024)] = 16
    max_queued: Annotated[int, Within(1)] = 64
    max_lanes: Annotated[int, Within(0, 1024)] = 32
    max_empty: Annotated[int, Within(10)] = 200


@dataclass(frozen=True, slots=True)
class Http:
    max_head: Annotated[Bytes, Within(KIB, MIB)] = Bytes(32 * KIB)
    head_timeout: Annotated[Seconds, Within(0.1)] = Seconds(5.0)
    max_body: Annotated[Bytes, Within(KIB, GIB)] = Bytes(32 * MIB)
    body_timeout: Annotated[Seconds, Within(1)] = Seconds(60.0)
    idle_timeout: Annotated[Seconds, Within(1)] = Seconds(60.0)
    send_timeout: Annotated[Seconds, Within(0.1)] = Seconds(30.0)


@dataclass(frozen=True, slots=True)
class Messages:
    cache_min_tokens: Annotated[int, Within(0)] = 1024


@dataclass(frozen=True, slots=True)
class Admission:
    max_turns: Annotated[int, Within(1)] = 64
    max_tokens: Annotated[int, Within(1)] = 1_000_000
    max_queued: Annotated[int, Within(0)] = 256
    max_queued_tokens: Annotated[int, Within(1)] = 4_000_000
    queue_timeout: Annotated[Seconds, Within(0)] = Seconds(60.0)


@dataclass(frozen=True, slots=True)
class Background:
    max_running: Annotated[int, Within(0)] = 64
    keep: Annotated[Seconds, Within(0)] = Seconds(600.0)
    max_events: Annotated[Bytes, Within(0)] = Bytes(64 * MIB)


@dataclass(frozen=True, slots=True)
class Dev:
    echo: bool = False


@dataclass(frozen=True, slots=True)
class Log:
    level: Literal["debug", "info", "warning", "error"] = "info"


@dataclass(frozen=True, slots=True)
class Tracing:
    enabled: bool = False
    endpoint: str = "http://127.0.0.1:4318/v1/traces"


@dataclass(frozen=True, slots=True)
class Config:
    server: Server = Server()
    auth: Auth = Auth()
    model: Model = Model()
    engine: Engine = Engine()
    tiers: Tiers = Tiers()
    websocket: WebSocket = WebSocket()
    http: Http = Http()
    messages: Messages = Messages()
    admission: Admission = Admission()
    background: Background = Background()
    dev: Dev = Dev()
    log: Log = Log()
    tracing: Tracing = Tracing()


def load(files: Sequence[Path] = (), assignments: Sequence[str] = ()) -> Config:
    """Read the files in order, then the `key.path=value` assignments. Raises ConfigError."""
    config = Config()
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
        config = merge(config, parse(text, str(path)), str(path))
    for assignment in assignments:
        config = merge(config, _assignment(assignment), "--set")
    _check_whole(config)
    return config


def parse(text: str, source: str) -> dict[str, Any]:
    """TOML text to its tables. Raises ConfigError with the line that tomllib names."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None


def merge(config: Config, tables: Mapping[str, Any], source: str) -> Config:
    """`config` with the keys of `tables` replaced. Raises ConfigError naming `source`."""
    return cast("Config", _merge_section(config, tables, source, ()))


def known_keys(section: Any = None, prefix: tuple[str, ...] = ()) -> Iterator[str]:
    """Every key, dotted, in the order of this file."""
    section = section or Config()
    for one in fields(section):
        path, value = (*prefix, one.name), getattr(section, one.name)
        if is_dataclass(value):
            yield from known_keys(value, path)
        else:
            yield ".".join(path)


def size(text: str) -> Bytes | None:
    """ "4GiB" to bytes; None if it is not a size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]iB|B)", text)
    return Bytes(int(float(found[1]) * _BYTE_UNITS[found[2]])) if found else None


def duration(text: str) -> Seconds | None:
    """ "90s" to seconds; None if it is not a time."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)", text)
    return Seconds(float(found[1]) * _TIME_UNITS[found[2]]) if found else None


def _merge_section(
    section: Any, tables: Mapping[str, Any], source: str, prefix: tuple[str, ...]
) -> Any:
    kinds = typing.get_type_hints(type(section), include_extras=True)
    known = {one.name for one in fields(section)}
    changed: dict[str, Any] = {}
    for name, value in tables.items():
        key = ".".join((*prefix, name))
        if name not in known:
            raise ConfigError(f"{source}: unknown key {key!r}{_nearest(key, value)}")
        current = getattr(section, name)
        if is_dataclass(current):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {key} is a section, not a value: write [{key}]")
            changed[name] = _merge_section(current, value, source, (*prefix, name))
        else:
            changed[name] = _value(kinds[name], value, f"{source}: {key}")
    return replace(section, **changed)


def _nearest(key: str, value: object) -> str:
    """The hint for an unknown key: by whole name first, then by the last part alone (right name, wrong section)."""
    known = list(known_keys())
    names = known + sorted({one.rpartition(".")[0] for one in known if "." in one})
    pool = names if isinstance(value, dict) else known
    close = difflib.get_close_matches(key, pool, n=1, cutoff=0.6)
    if not close:
        last = key.rpartition(".")[2]
        close = [one for one in pool if one.rpartition(".")[2] == last][:1]
    return f"; did you mean {close[0]!r}?" if close else ""


def _value(kind: Any, value: object, where: str) -> object:
    """One TOML value as the field's type, within the field's bounds. `where` is "file: key" for the message."""
    within: Within | None = None
    if typing.get_origin(kind) is Annotated:
        kind, within = typing.get_args(kind)
    if isinstance(kind, types.UnionType):  # X | None
        if value == "auto":
            return None
        kind = next(one for one in typing.get_args(kind) if one is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ConfigError(
                f"{where} must be one of {', '.join(typing.get_args(kind))}, not {value!r}"
            )
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list of strings")  # never echo a key
        return tuple(_scalar(typing.get_args(kind)[0], one, where) for one in value)
    result = _scalar(kind, value, where)
    if within is not None:
        assert isinstance(result, int | float)
        if not within.least <= result <= within.most:
            least, most = _written(kind, within.least), _written(kind, within.most)
            bounds = f"at least {least}" if within.most == inf else f"between {least} and {most}"
            raise ConfigError(f"{where} must be {bounds}, not {value!r}")
    return result


def _scalar(kind: Any, value: object, where: str) -> object:
    whole = isinstance(value, int) and not isinstance(value, bool)
    number = whole or isinstance(value, float)
    found: object | None
    if kind is Bytes:
        found = size(value) if isinstance(value, str) else value if whole else None
        wanted = 'a size such as "4GiB"'
    elif kind is Seconds:
        found = duration(value) if isinstance(value, str) else value if number else None
        wanted = 'a time such as "90s" or "5m"'
    elif kind is KeyDigest:
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{where} must hold non-empty strings")  # never echo a key
        return _key_digest(value, where)
    elif kind is Path:
        found = Path(value).expanduser() if isinstance(value, str) and value else None
        wanted = "a path"
    elif kind in (Share, float):
        found = float(cast("float", value)) if number else None
        wanted = "a number"
    elif kind is bool:
        found = value if isinstance(value, bool) else None
        wanted = "true or false"
    elif kind is int:
        found = value if whole else None
        wanted = "a whole number"
    else:
        assert kind is str, kind
        found = value if isinstance(value, str) and value else None
        wanted = "a non-empty string"
    if found is None:
        raise ConfigError(f"{where} must be {wanted}, not {value!r}")
    return found


def digest_as_written(key: str) -> str:
    """A key as a file may hold it without telling it."""
    return _DIGEST + hashlib.sha256(key.encode()).hexdigest()


def _key_digest(value: str, where: str) -> KeyDigest:
    if not value.startswith(_DIGEST):
        return KeyDigest(hashlib.sha256(value.encode()).digest())
    digits = value.removeprefix(_DIGEST)
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise ConfigError(
            f'{where}: "{_DIGEST}" is followed by the 64 hexadecimal digits of a digest'
        )
    return KeyDigest(bytes.fromhex(digits))


def _written(kind: Any, bound: float) -> str:
    """A bound in the way a user writes it."""
    if kind is Bytes:
        unit = next(
            name for name in ("GiB", "MiB", "KiB", "B") if bound >= _BYTE_UNITS[name] or name == "B"
        )
        return f"{bound / _BYTE_UNITS[unit]:g}{unit}"
    return f"{bound:g}s" if kind is Seconds else f"{bound:g}"


def _assignment(text: str) -> dict[str, Any]:
    """`a.b=value` as nested tables. The value is TOML where it parses as TOML, and a bare string where it does not."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: write key.path=value")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return cast("dict[str, Any]", value)


def _check_whole(config: Config) -> None:
    """What no single key can know. Raises ConfigError."""
    if (config.server.tls_certificate is None) != (config.server.tls_key is None):
        raise ConfigError("server.tls_certificate and server.tls_key: both, or neither")
    _ = config.server.admin_address
    tiers = config.tiers
    for name, low, high in (
        ("device", tiers.device.low, tiers.device.high),
        ("host", tiers.host.low, tiers.host.high),
        ("disk", tiers.disk.low, tiers.disk.high),
    ):
        if low >= high:
            raise ConfigError(
                f"tiers.{name}.low ({low:g}) is not below tiers.{name}.high ({high:g}):"
                " eviction starts at high and stops at low"
            )
    if tiers.ttl_default > tiers.ttl_max:
        raise ConfigError(
            f"tiers.ttl_default ({tiers.ttl_default:g} s) is more than tiers.ttl_max ({tiers.ttl_max:g} s)"
        )
    protect = tiers.protect
    if not protect.burst <= protect.tool_wait <= protect.human_wait:
        raise ConfigError(
            "tiers.protect: burst is at most tool_wait, and that at most human_wait: a session that waits"
            " goes from one class to the next"
        )
    if tiers.disk.after < tiers.host.after:
        raise ConfigError(
            f"tiers.disk.after ({tiers.disk.after:g} s) is before tiers.host.after ({tiers.host.after:g} s):"
            " a session goes to host first"
        )
    if config.engine.mixed_tokens > config.engine.step_tokens:
        raise ConfigError(
            "engine.mixed_tokens is more than engine.step_tokens, of which it is a part"
        )
    if not config.tracing.endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"tracing.endpoint must be an http:// or https:// URL, not {config.tracing.endpoint!r}"
        )
    if config.model.name in config.model.aliases:
        raise ConfigError(f"model.aliases names {config.model.name!r}, which is model.name itself")
