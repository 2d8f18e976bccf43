"""A small writer of self-contained SVG charts: bars and lines."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 56, 44
_COLOURS = ("#1f6feb", "#d1570a", "#2da44e", "#8250df", "#bf3989", "#57606a", "#9a6700", "#0a7ea4")
_INK, _GRID = "#24292f", "#d8dee4"
_INNER = WIDTH - _LEFT - _RIGHT
_TICKS = 5
_ROOM = 48
_STYLE = "font-family='system-ui,sans-serif' font-size='11'"


@dataclass(frozen=True, slots=True)
class Line:
    """Points of one series; ``dashed`` for what is only there to compare with."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar; its name may have several lines."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Scale:
    """A vertical axis from ``low`` to ``high``, linear or logarithmic."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def over(cls, values: Collection[float], *, logarithmic: bool) -> Self:
        """The scale that shows all of these; a linear one starts at 0."""
        if logarithmic:
            decades = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
            return cls(10.0 ** decades[0], 10.0 ** decades[1], logarithmic=True)
        return cls(0.0, _ceiling(max(values)), logarithmic=False)

    def y(self, value: float) -> float:
        """Where a value is."""
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = value / self.high
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share

    def ticks(self) -> list[float]:
        """Values to draw lines at."""
        if not self.logarithmic:
            return [self.high * tick / _TICKS for tick in range(_TICKS + 1)]
        decades = round(math.log10(self.high / self.low))
        return [self.low * 10**decade for decade in range(decades + 1)]


def page(title: str, charts: Sequence[str], columns: int = 2) -> str:
    """Put charts into a grid, under a title."""
    rows = math.ceil(len(charts) / columns)
    width, height = columns * WIDTH, rows * HEIGHT + 40
    body = "\n".join(
        f"<g transform='translate({index % columns * WIDTH},{index // columns * HEIGHT + 40})'>"
        f"\n{chart}\n</g>"
        for index, chart in enumerate(charts)
    )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' {_STYLE}>\n"
        f"<rect width='{width}' height='{height}' fill='white'/>\n"
        f"{_text(16, 26, title, size=14, weight='bold')}\n{body}\n</svg>\n"
    )


def lines(title: str, series: Sequence[Line], *, across: str, logarithmic: bool = False) -> str:
    """Draw lines over a logarithmic x axis."""
    xs = sorted({x for line in series for x, _ in line.points})
    scale = Scale.over([y for line in series for _, y in line.points], logarithmic=logarithmic)
    span = math.log(xs[-1] / xs[0]) or 1.0

    def across_at(x: float) -> float:
        return _LEFT + _INNER * math.log(x / xs[0]) / span

    parts = [*_frame(title, scale), *_ticks_across({x: across_at(x) for x in xs})]
    parts.append(_text(_LEFT + _INNER / 2, HEIGHT - 8, across, anchor="middle"))
    for index, line in enumerate(series):
        points = [(across_at(x), scale.y(y)) for x, y in line.points]
        parts += _polyline(points, line, _colour(index))
    parts += _legend([line.name for line in series])
    return "\n".join(parts)


def bars(
    title: str, values: Sequence[Bar], *, limit: tuple[str, float], logarithmic: bool = False
) -> str:
    """Draw bars, and a limit with its name."""
    name, height = limit
    scale = Scale.over([height, *(bar.value for bar in values)], logarithmic=logarithmic)
    step = _INNER / len(values)
    parts = [*_frame(title, scale)]
    for index, bar in enumerate(values):
        middle, y = _LEFT + step * (index + 0.5), scale.y(bar.value)
        parts.append(_rectangle(middle - step * 0.35, y, step * 0.7, scale.y(scale.low) - y))
        parts.append(_text(middle, y - 4, f"{bar.value:.3g}", anchor="middle"))
        for row, word in enumerate(bar.name.split("\n")):
            y_of_row = HEIGHT - _BOTTOM + 14 + 13 * row
            parts.append(_text(middle, y_of_row, word, anchor="middle", size=10))
    parts.append(_rule(scale.y(height), _COLOURS[1], dashed=True))
    parts.append(_text(_LEFT, 34, name, colour=_COLOURS[1], weight="bold", size=10))
    return "\n".join(parts)


def _ceiling(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 5, 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 3, 5, 8, 10) if value <= step * power * 1.0001)


def _frame(title: str, scale: Scale) -> Iterator[str]:
    yield _text(_LEFT, 18, title, size=12, weight="bold")
    for value in scale.ticks():
        y = scale.y(value)
        yield _rule(y, _GRID)
        yield _text(_LEFT - 6, y + 4, f"{value:,.4g}", anchor="end")


def _ticks_across(places: Mapping[float, float]) -> Iterator[str]:
    free = 0.0
    for value, x in places.items():
        if x >= free:
            yield _text(x, HEIGHT - _BOTTOM + 16, f"{value:,.0f}", anchor="middle")
            free = x + _ROOM


def _legend(names: Sequence[str]) -> Iterator[str]:
    x = float(_LEFT)
    for index, name in enumerate(names):
        yield _text(x, 34, name, colour=_colour(index), weight="bold", size=10)
        x += 6.2 * len(name) + 12


def _polyline(points: Sequence[tuple[float, float]], line: Line, colour: str) -> Iterator[str]:
    dash = " stroke-dasharray='5 4'" if line.dashed else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    yield f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'{dash}/>"
    for x, y in points:
        yield f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>"


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _rectangle(x: float, y: float, width: float, height: float) -> str:
    size = f"width='{width:.1f}' height='{height:.1f}'"
    return f"<rect x='{x:.1f}' y='{y:.1f}' {size} fill='{_colour(0)}'/>"


def _rule(y: float, colour: str, *, dashed: bool = False) -> str:
    dash = " stroke-dasharray='5 4'" if dashed else ""
    return f"<path d='M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}' stroke='{colour}'{dash}/>"


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 11,
    weight: str = "normal",
    colour: str = _INK,
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}' "
        f"font-weight='{weight}' fill='{colour}'>{escape(text)}</text>"
    )
