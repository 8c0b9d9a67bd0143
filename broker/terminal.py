"""`homeport top` on a terminal: look, draw, wait for a key or for the next look.

The screen is the standard library's curses. A daemon that does not answer is said so, on the last picture of it.
"""

from __future__ import annotations

import curses
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from broker.top import Snapshot, plain, render

if TYPE_CHECKING:
    from collections.abc import Callable

_TURNS = 50
_QUIT = frozenset(map(ord, "qQ\x1b"))


def look(ask: Callable[[str], Any]) -> Snapshot:
    """One look at a daemon; `ask` gets the JSON of a path, and raises what it raises."""
    turns = ask(f"/admin/turns?limit={_TURNS}")
    return Snapshot(
        at=time.monotonic(),
        tiers=ask("/admin/tiers"),
        sessions=ask("/admin/sessions")["sessions"],
        turns=turns["turns"],
        edge=ask("/admin/edge"),
        now=turns["now"],
    )


def watch(ask: Callable[[str], Any], every_s: float, silent: type[Exception]) -> None:
    """Draw until `q`. `silent` is what `ask` raises for a daemon that does not answer; at first, it is raised on."""
    curses.wrapper(_loop, ask, look(ask), every_s, silent)


def _loop(
    window: curses.window,
    ask: Callable[[str], Any],
    first: Snapshot,
    every_s: float,
    silent: type[Exception],
) -> None:
    with suppress(curses.error):  # not every terminal can hide its cursor
        curses.curs_set(0)
    before, now, trouble = None, first, ""
    while True:
        _draw(window, now, before, trouble)
        window.timeout(int(1000 * every_s))
        key = window.getch()
        if key in _QUIT:
            return
        if key == -1:  # time for the next look
            try:
                before, now, trouble = now, look(ask), ""
            except silent as error:
                trouble = str(error)


def _draw(window: curses.window, now: Snapshot, before: Snapshot | None, trouble: str) -> None:
    height, width = window.getmaxyx()
    lines = render(now, before, width=width - 1, height=height - 1)
    window.erase()
    for row, line in enumerate(lines):
        shown = line.encode(window.encoding, "replace").decode(window.encoding)
        window.addstr(row, 0, shown)
    window.addstr(height - 1, 0, plain(trouble or "q quits")[: width - 1], curses.A_REVERSE)
    window.refresh()
