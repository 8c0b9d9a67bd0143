"""Who may speak to this server, decided from a request's headers alone. Pure: no sockets, no clock, no files.

Three questions, in this order, on every route and before any upgrade:
    Host     is this name ours? A name we do not know is DNS rebinding: a web page that made its own name point here.
    Origin   absent passes (not a browser). Our own passes (some WebSocket clients send it). Anything else must be listed.
    key      `Authorization: Bearer …` or `x-api-key: …`. Compared as SHA-256 digests, in constant time, all of them.

Laws
    Every key is its own tenant. Tenants share neither KV (the salt) nor response ids (the name). With `shared` all keys
    have one salt, so one prompt's KV serves them all; their names stay apart.
    A tenant is made of the state directory's secret and the key that proved itself: nothing else of a request can
    change it, so no field of a request gives access to another's KV.
    An operator's key is a tenant's like any other, and may besides see and move what belongs to everybody: all sessions,
    the tiers, the metrics; and may act on a session of any tenant that it names. A tenant's may not, for that shows what
    others do. An open server's one tenant is both.
    Without keys the server is open, and then it listens on loopback only: `check_exposure`.
    Neither a tenant's name nor its salt tells the key, nor one of them the other.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from broker.config import Address, ConfigError
from broker.errors import ClientError, Forbidden, NotFound, Unauthorized

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from broker.config import Config, KeyDigest


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whom a request belongs to. Without keys there is one tenant: name "", salt b""."""

    name: str  # 32 hex digits; goes into manifests
    salt: bytes  # goes into the root of every block chain
    operator: bool = False  # may see and move what is everybody's


OPEN = Tenant("", b"", operator=True)


class Access:
    """The three checks, prepared. `host` is the address listened on, `hosts` and `origins` come from the config.

    Whoever gets through a `trusted` door is an operator: a Unix socket's file mode was his key.
    """

    def __init__(
        self,
        *,
        host: str,
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
        keys: Iterable[KeyDigest] = (),
        operators: Iterable[KeyDigest] = (),
        secret: bytes = b"",
        shared: bool = False,
        trusted: bool = False,
    ) -> None:
        self._any_address = not is_loopback(host)
        self._hosts = frozenset({"localhost", host.lower(), *(one.lower() for one in hosts)})
        self._origins = frozenset(one.lower().rstrip("/") for one in origins)
        self._trusted = trusted
        self._tenants = [(digest, _tenant(digest, secret, shared=shared)) for digest in keys]
        self._tenants += [
            (digest, replace(_tenant(digest, secret, shared=shared), operator=True))
            for digest in operators
        ]

    def admit(self, headers: Sequence[tuple[bytes, bytes]]) -> Tenant:
        """The tenant that a request's headers (lower-case names) prove. Raises ClientError: 421, 403 or 401."""
        self.check_source(headers)
        if not self._tenants:
            return OPEN
        key = _key(headers)
        if key is None and self._trusted:
            return OPEN
        if key is None:
            raise Unauthorized(
                "No API key: send 'Authorization: Bearer <key>' or 'x-api-key: <key>'."
            )
        digest = hashlib.sha256(key).digest()
        found: Tenant | None = None
        for known, tenant in self._tenants:  # all of them, whichever matches
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise Unauthorized("Incorrect API key.")
        return replace(found, operator=True) if self._trusted else found

    def on_behalf_of(self, asker: Tenant, name: str | None) -> Tenant:
        """The tenant whose session the asker acts on: itself, unless it says a name. Raises Forbidden, NotFound."""
        if name is None or name == asker.name:
            return asker
        if not asker.operator:
            raise Forbidden(
                "To act for another tenant needs an operator's key (auth.operators).",
                code="operator_only",
            )
        if name == OPEN.name:
            return OPEN
        for _, tenant in self._tenants:
            if tenant.name == name:
                return tenant
        raise NotFound(f"No tenant '{name}'.", code="tenant_not_found", param="tenant")

    def check_source(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Host and Origin only: for the probes that need no key. Raises ClientError: 421 or 403."""
        host = _one(headers, b"host")
        name = _host_name(host)
        if name is None or not self._knows(name):
            raise ClientError(
                "This server does not answer to the Host of the request; see server.allowed_hosts.",
                code="unknown_host",
                status=421,
            )
        origin = _one(headers, b"origin")
        if origin is None:
            return
        origin = origin.lower().rstrip("/")
        if origin not in self._origins and origin not in (f"http://{host}", f"https://{host}"):
            raise Forbidden(
                "Requests from this Origin are refused; see server.allowed_origins.",
                code="origin_not_allowed",
            )

    def _knows(self, name: str) -> bool:
        """Whether a Host name is ours. Literal addresses cannot be rebound, so listening on one trusts its kind."""
        if name in self._hosts:
            return True
        address = _address(name)
        return address is not None and (self._any_address or address.is_loopback)


def is_loopback(host: str) -> bool:
    """Whether listening on `host` reaches this machine only. A name other than localhost is taken as reachable."""
    address = _address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def check_exposure(config: Config) -> None:
    """Raises ConfigError for what others could reach without a key, and for keys that cannot be told apart."""
    server, auth = config.server, config.auth
    if not (auth.keys or auth.operators) and not is_loopback(server.host):
        raise ConfigError(
            f"server.host is {server.host!r}, which others can reach, and auth.keys is empty:"
            " add a key, or listen on 127.0.0.1"
        )
    place = server.admin_address
    if isinstance(place, Address) and not auth.operators:
        if auth.keys:
            raise ConfigError(
                "server.admin is a TCP address, and auth.operators is empty: add an operator's key, or"
                ' write "unix:PATH"'
            )
        if not is_loopback(place.host):
            raise ConfigError(
                f"server.admin is on {place.host!r}, which others can reach, and auth.operators is empty"
            )
    if set(auth.keys) & set(auth.operators):
        raise ConfigError(
            "a key is in auth.keys and in auth.operators: an operator's is a key already"
        )


def _tenant(digest: KeyDigest, secret: bytes, *, shared: bool) -> Tenant:
    name = hmac.digest(secret, b"tenant name" + digest, "sha256")
    salted = b"shared salt" if shared else b"tenant salt" + digest
    return Tenant(name.hex()[:32], hmac.digest(secret, salted, "sha256"))


def _key(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """The key as bytes: a header may hold anything, and text comparison fails on what is not ASCII."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer" and key.strip():
                return key.strip()
    for name, value in headers:
        if name == b"x-api-key" and value.strip():
            return value.strip()
    return None


def _one(headers: Sequence[tuple[bytes, bytes]], wanted: bytes) -> str | None:
    """A header that may appear once. Two of it are an attempt to be read in two ways."""
    found = [value for name, value in headers if name == wanted]
    if len(found) > 1:
        raise ClientError(f"More than one {wanted.decode()} header.", code="invalid_header")
    return found[0].decode("latin-1").strip().lower() if found else None


def _host_name(host: str | None) -> str | None:
    """The name in a Host header without its port, brackets and trailing dot; None if there is none."""
    if not host:
        return None
    if host.startswith("["):
        name, bracket, _ = host[1:].partition("]")
        return name if bracket else None
    return host.partition(":")[0].rstrip(".") or None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
