"""Curves of several policies over capacity as an SVG: panels in a row, one line a policy, its spread as a band.

Pure: text from numbers, no library. Every line is named at its end as well as in the legend, and they differ in
brightness and dashes too, so that no one needs the colours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_PANEL_WIDTH, _PANEL_HEIGHT = 330, 300  # of the plotted area; all sizes are in pixels
_LEFT, _RIGHT = 58, 96  # of each panel: the axis' labels, the lines' names
_TOP, _BOTTOM = 134, 66
_LINE_HEIGHT = 14  # least distance of two names
_INK, _FAINT, _GRID = "#1d2733", "#5c6875", "#e3e7eb"
# Okabe and Ito's colours, which stay apart for the colour-blind; the pattern of dashes that goes with each.
_STYLES = (
    ("#0072b2", ""),
    ("#d55e00", "7 3"),
    ("#009e73", "2 3"),
    ("#cc79a7", "9 3 2 3"),
    ("#e69f00", "4 2"),
    ("#56b4e9", "1 3"),
)
_BELADY_STYLE = ("#1d2733", "5 4")  # a bound, not a choice
_STEPS = (1, 1.2, 1.5, 2, 3, 5, 7)  # of a logarithmic axis, times powers of ten


@dataclass(frozen=True, slots=True)
class Point:
    """One policy at one capacity: the mean over the seeds, and the extremes."""

    x: float  # share of the footprint
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    unit: str
    lines: Mapping[str, Sequence[Point]]  # {policy: points, ascending in x}
    percent: bool = False  # ticks are shares of 1
    logarithmic: bool = False
    goals: tuple[tuple[float, float], ...] = ()  # (x, y): a mark to stay under


def draw(title: str, subtitle: str, panels: Sequence[Panel]) -> str:
    """The whole picture, as one standalone SVG document."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    others = [name for name in names if name != "belady"]
    styles = {name: _STYLES[at % len(_STYLES)] for at, name in enumerate(others)}
    styles["belady"] = _BELADY_STYLE
    pitch = _LEFT + _PANEL_WIDTH + _RIGHT
    width, height = pitch * len(panels) + 16, _TOP + _PANEL_HEIGHT + _BOTTOM
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(20, 32, title, size=18, weight="bold"),
        _text(20, 52, subtitle, fill=_FAINT),
        *_legend(names, styles),
    ]
    for at, panel in enumerate(panels):
        body += _Axes(panel, left=at * pitch + _LEFT).draw(styles)
    return "\n".join([*body, "</svg>"]) + "\n"


class _Axes:
    """One panel: what is where."""

    def __init__(self, panel: Panel, left: float) -> None:
        self._panel = panel
        self._left = left
        points = [point for line in panel.lines.values() for point in line]
        self._xs = sorted({point.x for point in points})
        lowest = min(point.low for point in points)
        highest = max(point.high for point in points)
        self._ticks = _log_ticks(lowest, highest) if panel.logarithmic else _ticks(lowest, highest)
        self._scale: Callable[[float], float] = math.log if panel.logarithmic else float

    def draw(self, styles: Mapping[str, tuple[str, str]]) -> list[str]:
        out = [_text(self._left, _TOP - 22, self._panel.title, size=13, weight="bold")]
        out += [_text(self._left, _TOP - 8, self._panel.unit, size=11, fill=_FAINT)]
        out += self._grid()
        for name, line in self._panel.lines.items():
            out += self._line(line, *styles[name])
        out += [self._goal(x, y) for x, y in self._panel.goals]
        out += self._names(styles)
        return out

    def _x(self, x: float) -> float:
        first, last = self._xs[0], self._xs[-1]
        return self._left + _PANEL_WIDTH * ((x - first) / (last - first) if last > first else 0.5)

    def _y(self, y: float) -> float:
        low, high = self._scale(self._ticks[0]), self._scale(self._ticks[-1])
        return _TOP + _PANEL_HEIGHT * (1 - (self._scale(y) - low) / (high - low))

    def _grid(self) -> list[str]:
        right, bottom = self._left + _PANEL_WIDTH, _TOP + _PANEL_HEIGHT
        out = []
        for tick in self._ticks:
            y = self._y(tick)
            label = f"{100 * tick:.4g} %" if self._panel.percent else f"{tick:.4g}"
            out.append(_stroke(f"M{self._left:.1f} {y:.1f}H{right:.1f}", _GRID))
            out.append(_text(self._left - 8, y + 4, label, anchor="end", fill=_FAINT))
        for x in self._xs:
            out.append(_stroke(f"M{self._x(x):.1f} {bottom:.1f}v5", _FAINT))
            out.append(
                _text(self._x(x), bottom + 19, f"{100 * x:.4g}", anchor="middle", fill=_FAINT)
            )
        out.append(_stroke(f"M{self._left:.1f} {bottom:.1f}H{right:.1f}", _FAINT))
        middle = self._left + _PANEL_WIDTH / 2
        label = "capacity, % of the footprint"
        out.append(_text(middle, bottom + 42, label, anchor="middle", fill=_FAINT))
        return out

    def _line(self, line: Sequence[Point], colour: str, dashes: str) -> list[str]:
        there = [(self._x(point.x), self._y(point.high)) for point in line]
        back = [(self._x(point.x), self._y(point.low)) for point in reversed(line)]
        means = [(self._x(point.x), self._y(point.mean)) for point in line]
        out = [f'<path d="{_path([*there, *back])}Z" fill="{colour}" fill-opacity="0.13"/>']
        out.append(_stroke(_path(means), colour, width=2, dashes=dashes))
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in means]
        return out

    def _goal(self, x: float, y: float) -> str:
        """A bar with a foot that points down: the mean is to be under it."""
        at, top = self._x(x), self._y(y)
        return _stroke(f"M{at - 9:.1f} {top:.1f}h18M{at:.1f} {top:.1f}v6", _INK, width=1.6)

    def _names(self, styles: Mapping[str, tuple[str, str]]) -> list[str]:
        """At the lines' ends, pushed apart where they would overlap, and up again where they would leave the panel."""
        ends = sorted((self._y(line[-1].mean), name) for name, line in self._panel.lines.items())
        places: list[float] = []
        for y, _ in ends:
            places.append(max(y, places[-1] + _LINE_HEIGHT) if places else y)
        over = places[-1] - (_TOP + _PANEL_HEIGHT) if places else 0
        for at in reversed(range(len(places))):
            if over > 0:
                places[at] = min(
                    places[at], _TOP + _PANEL_HEIGHT - (len(places) - 1 - at) * _LINE_HEIGHT
                )
        right = self._left + _PANEL_WIDTH
        out = []
        for place, (y, name) in zip(places, ends, strict=True):
            colour = styles[name][0]
            out.append(_stroke(f"M{right + 5:.1f} {y:.1f}L{right + 13:.1f} {place:.1f}", colour))
            out.append(_text(right + 17, place + 4, name, fill=colour))
        return out


def _legend(names: Sequence[str], styles: Mapping[str, tuple[str, str]]) -> list[str]:
    out: list[str] = []
    x = 20.0
    for name in names:
        colour, dashes = styles[name]
        out.append(_stroke(f"M{x:.1f} 72h30", colour, width=2, dashes=dashes))
        out.append(f'<circle cx="{x + 15:.1f}" cy="72" r="3" fill="{colour}"/>')
        out.append(_text(x + 37, 76, name))
        x += 62 + 7 * len(name)
    return out


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around what is to be shown, four to eight of them."""
    span = max(high - low, 1e-6)
    step = 10 ** math.floor(math.log10(span))
    step = next(size for size in (step / 5, step / 2, step, step * 2) if span / size <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    lowest, highest = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = [step * 10.0**power for power in range(lowest, highest + 1) for step in _STEPS]
    first = max(at for at, step in enumerate(steps) if step <= low * (1 + 1e-9))
    last = min(at for at, step in enumerate(steps) if step >= high and at > first)
    return steps[first : last + 1]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _stroke(path: str, colour: str, *, width: float = 1, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}" '
        f'stroke-linejoin="round"{dashed}/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    weight: str = "normal",
    anchor: str = "start",
    fill: str = _INK,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'
    )
