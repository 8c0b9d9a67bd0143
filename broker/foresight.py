"""What will be asked for next: a session's KV is on its way to the device as soon as anything names the session.

    handshake, request head   the headers in which coding agents name their thread or session
    body                      `previous_response_id`, `prompt_cache_key`: before anything is rendered
    history                   the last answer that was recognised in it: before its prompt is encoded

Laws
    A guess is one command to the engine and is never waited for. A wrong one evicts nobody and is seen by nobody.
    A turn's KV is asked for at most once in `_AGAIN_S`, and not within that time after it ended: the handshake, the id
    and the history mean the same turn, and an agent in a loop has its KV on the device.
    Labels are looked up among the tenant's own turns only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from broker.access import Tenant
    from broker.session import Node
    from tiers.block import TokenIds

# Most particular first: one session may have several threads.
_LABELS = (b"thread-id", b"session-id", b"x-claude-code-session-id")
_LABEL_CHARS = 512  # as for `prompt_cache_key`, which says the same in a body
_AGAIN_S = 10.0  # from a handshake to its first turn (guessed)


class Prefetcher(Protocol):
    def prefetch(self, salt: bytes, prompt: TokenIds) -> None: ...


def session_labels(headers: Iterable[tuple[bytes, bytes]]) -> tuple[str, ...]:
    """The names that a request's headers (lower-case names) give to its session, most particular first."""
    found = {name: value.decode("latin-1").strip() for name, value in headers if name in _LABELS}
    named = (found.get(name, "") for name in _LABELS)
    return tuple(dict.fromkeys(text for text in named if 0 < len(text) <= _LABEL_CHARS))


def expect(engine: Prefetcher, tenant: Tenant, node: Node, now: float) -> None:
    """A turn that continues `node` is likely: have its KV brought to the device."""
    if node.tokens and not 0 <= now - node.expected_at < _AGAIN_S:
        node.expected_at = now
        engine.prefetch(tenant.salt, node.tokens)
