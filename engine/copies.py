"""Copies on their way, where they are not made at once: how many went in one go, and since when."""

from __future__ import annotations


class Copies:
    def __init__(self) -> None:
        self._flying = 0
        self._landed = 0
        self._since = 0.0

    def began(self, now: float) -> None:
        if not self._flying:
            self._since, self._landed = now, 0
        self._flying += 1

    def ended(self) -> tuple[int, float] | None:
        """When the last of a go is answered: how many there were, and since when. A refused one travelled too."""
        self._flying -= 1
        self._landed += 1
        return None if self._flying else (self._landed, self._since)
