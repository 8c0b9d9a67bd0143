"""Accepting connections fairly between those who connect: whoever comes beside a crowd is let in before the rest of the crowd.

    the kernel's queue ──accept──> a line for each address ──by turns──> a task each

To accept is cheap, to begin to serve is not: a task, a place, a parser, 0.3 ms. In the order of arrival a client would wait for
all of a flood that came before it, 1.5 s for 5,000 connections (measured); by turns it waits for one of them, and for their being
accepted.

Laws
    Of several addresses that wait, each has one connection begun before any has a second.
    Of one address, who came first is begun first.
    At most `WAITING_AT_MOST` are accepted and not begun; then they wait in the kernel's queue, as everywhere else.
    Whoever is not begun when serving ends is closed.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Generic, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

log = logging.getLogger(__name__)

WAITING_AT_MOST = 4096  # of connections; each is a descriptor
_ACCEPTED_AT_ONCE = 256  # 5 ms
_BEGUN_AT_ONCE = 8  # some 2 ms of the loop
_FULL = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
_FULL_S = 0.1  # then somebody may have left

Waiting = TypeVar("Waiting")


class Line(Generic[Waiting]):
    """Those who wait, by address; `next` goes round the addresses."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[Waiting]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, address: str, one: Waiting) -> None:
        self._of.setdefault(address, deque()).append(one)
        self._count += 1

    def next(self) -> Waiting:
        """Raises KeyError where nobody waits."""
        address, waiting = self._of.popitem(last=False)
        one = waiting.popleft()
        if waiting:
            self._of[address] = waiting
        self._count -= 1
        return one


async def serve_fairly(
    serve: Callable[[trio.SocketStream], Awaitable[None]],
    listeners: Sequence[trio.SocketListener],
    handlers: trio.Nursery,
) -> None:
    """Until cancelled. Every connection is served by a task of `handlers`."""
    line: Line[socket.socket] = Line()
    changed = trio.Event()

    def change() -> None:
        nonlocal changed
        changed.set()
        changed = trio.Event()

    async def accept(listening: socket.socket) -> None:
        while True:
            while not (room := WAITING_AT_MOST - len(line)):
                await changed.wait()
            await trio.lowlevel.wait_readable(listening)
            try:
                for _ in range(min(room, _ACCEPTED_AT_ONCE)):
                    one, name = listening.accept()
                    line.put(network_of(listening.family, name), one)
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno in _FULL:
                    log.error("no connection accepted: %s", error.strerror)
                    await trio.sleep(_FULL_S)
                # else it was gone before it was accepted
            change()

    async def begin() -> None:
        while True:
            while not line:
                await changed.wait()
            for _ in range(min(len(line), _BEGUN_AT_ONCE)):
                one = line.next()
                handlers.start_soon(serve, trio.SocketStream(trio.socket.from_stdlib_socket(one)))
            change()
            await trio.lowlevel.checkpoint()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(begin)
            for listener in listeners:
                listening = socket.fromfd(
                    listener.socket.fileno(), listener.socket.family, listener.socket.type
                )
                listening.settimeout(0)
                nursery.start_soon(_closing, listening, accept)
    finally:
        while line:
            line.next().close()
        for listener in listeners:
            listener.socket.close()


async def _closing(
    listening: socket.socket, accept: Callable[[socket.socket], Awaitable[None]]
) -> None:
    with listening:
        await accept(listening)


def network_of(family: int, name: object) -> str:
    """Whom a peer of this name counts for: an IPv4 address, an IPv6 network of 64 bits, which is what one peer has of them; ""
    for what has no address."""
    if family not in (socket.AF_INET, socket.AF_INET6):
        return ""
    assert isinstance(name, tuple)
    address = ipaddress.ip_address(str(name[0]).partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
