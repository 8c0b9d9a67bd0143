"""Who goes first when a tier is full. Pure: classes and an order, no tables and no clock."""

from __future__ import annotations

import enum


class SessionClass(enum.IntEnum):
    """What the session that last used a block is doing. Smaller is evicted sooner."""

    CLOSED = 0  # superseded, or its connection is gone
    HUMAN_WAIT = 1  # answered with text: the next turn waits for a person
    TOOL_WAIT = 2  # answered with a tool call: the next turn is seconds away
    BURST = 3  # an open socket in the middle of a loop
    PINNED = 4
