"""Who holds a connection, and who must give one up. Pure: no sockets, no clock.

A connection that has not said what it wants is worth nothing yet. So when there is no room, the one that has been silent
longest gives way to the one that arrives: thousands of half-open connections cost each other their places, and a
client that speaks at once is served.

Laws
    At most `most` places are held, and `most_per_address` by one address; "" is no address, and has no bound of its own.
    Only the silent give way: the oldest of the same address where that is full, else the oldest of all. Where nobody is
    silent, whoever arrives is refused.
    A place is given back once, whether it was lost before or not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Place:
    """One connection's. Compared by identity."""

    __slots__ = ("address", "held", "lose")

    def __init__(self, address: str, lose: Callable[[], None]) -> None:
        self.address = address
        self.lose = lose  # called when it must give way
        self.held = True


class Places:
    def __init__(self, *, most: int, most_per_address: int) -> None:
        self._most = most
        self._most_per_address = most_per_address
        self._by_address: Counter[str] = Counter()
        self._silent: dict[Place, None] = {}  # oldest first
        self._silent_of: dict[str, dict[Place, None]] = defaultdict(dict)  # {address: oldest first}
        self.held = 0

    def take(self, address: str, lose: Callable[[], None]) -> Place | None:
        """A place, silent at first; None if nobody can give way. Who does is told by his `lose`, before this returns."""
        victim: Place | None = None
        if address and self._by_address[address] >= self._most_per_address:
            victim = next(iter(self._silent_of.get(address, ())), None)
        elif self.held >= self._most:
            victim = next(iter(self._silent), None)
        else:
            return self._new(address, lose)
        if victim is None:
            return None
        self.give(victim)
        victim.lose()
        return self._new(address, lose)

    def spoke(self, place: Place) -> None:
        """What it wants is known: it does not give way any more."""
        if self._silent.pop(place, place) is None:
            mine = self._silent_of[place.address]
            del mine[place]
            if not mine:
                del self._silent_of[place.address]

    def give(self, place: Place) -> None:
        """Give a place back."""
        if not place.held:
            return
        self.spoke(place)
        place.held = False
        self.held -= 1
        self._by_address[place.address] -= 1
        if not self._by_address[place.address]:
            del self._by_address[place.address]

    def _new(self, address: str, lose: Callable[[], None]) -> Place:
        place = Place(address, lose)
        self.held += 1
        self._by_address[address] += 1
        self._silent[place] = self._silent_of[address][place] = None
        return place
