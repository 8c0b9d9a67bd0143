"""The one place that catches what nobody expected, and why there is one.

A daemon serves strangers beside each other. A fault of ours in the code of one connection must end that connection and no
other; what such code could have broken for others, the KV tables, is the engine thread's, whose faults fall through and
end the daemon. So a connection and a background response each run inside `contained`.

Laws
    Everywhere else our faults fall through: a test reads every file for that.
    A fault is logged with its traceback, once, where it is contained. Cancellation passes, also out of a group.
"""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

log = logging.getLogger(__name__)


class Contained:
    """Whether what ran inside ended by our fault."""

    __slots__ = ("at_fault",)

    def __init__(self) -> None:
        self.at_fault = False


@contextmanager
def contained(what: str) -> Iterator[Contained]:
    """`what` ends by our fault at worst: the fault is logged, and whoever entered goes on."""
    ran = Contained()
    try:
        yield ran
    except* Exception:
        ran.at_fault = True
        log.exception("%s ended by our fault; the others go on", what)


@asynccontextmanager
async def confessed(tell: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """A fault is told to the client before it goes on its way to its boundary."""
    try:
        yield
    except Exception:
        await tell()
        raise
