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
    Without keys the server is open, and then it listens on loopback only: `check_exposure`.
    Neither a tenant's name nor its salt tells the key, nor one of them the other.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.config import ConfigError
from broker.errors import ClientError, Forbidden, Unauthorized

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from broker.config import KeyDigest


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whom a request belongs to. Without keys there is one tenant: name "", salt b""."""

    name: str  # 32 hex digits; goes into manifests
    salt: bytes  # goes into the root of every block chain


OPEN = Tenant("", b"")


class Access:
    """The three checks, prepared. `host` is the address listened on, `hosts` and `origins` come from the config."""

    def __init__(
        self,
        *,
        host: str,
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
        keys: Iterable[KeyDigest] = (),
        secret: bytes = b"",
        shared: bool = False,
    ) -> None:
        self._any_address = not is_loopback(host)
        self._hosts = frozenset({"localhost", host.lower(), *(one.lower() for one in hosts)})
        self._origins = frozenset(one.lower().rstrip("/") for one in origins)
        self._tenants = [(digest, _tenant(digest, secret, shared=shared)) for digest in keys]

    def admit(self, headers: Sequence[tuple[bytes, bytes]]) -> Tenant:
        """The tenant that a request's headers (lower-case names) prove. Raises ClientError: 421, 403 or 401."""
        self.check_source(headers)
        if not self._tenants:
            return OPEN
        key = _key(headers)
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
        return found

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


def check_exposure(host: str, keys: Sequence[KeyDigest]) -> None:
    """Raises ConfigError for an open server on an address that others can reach."""
    if not keys and not is_loopback(host):
        raise ConfigError(
            f"server.host is {host!r}, which others can reach, and auth.keys is empty:"
            " add a key, or listen on 127.0.0.1"
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
