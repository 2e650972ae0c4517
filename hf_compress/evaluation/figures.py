"""Figures as inline SVG, made by hand: text stays text, and the page's style sheet sets the colours for day and night.

No figure needs its colours: models have a shape or a hatch, a letter and their name, and every value is written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

SHAPES = 6
HATCHES = 6

_WIDTH, _HEIGHT = 560, 350
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 18, 16, 50
_Box = tuple[float, float, float, float]  # left, top, right, bottom
_CHARACTER = 7.2  # of the labels' font, on average, in the figure's units


@dataclass(frozen=True)
class Point:
    """One model in a figure.

    Attributes:
        index: place of the model in the report, which gives its letter, shape, hatch and colour.
        name: as it is written beside the point.
        x, y: what is drawn.
        text: the values as they are printed.
    """

    index: int
    name: str
    x: float
    y: float
    text: str = ""


def letter(index: int) -> str:
    """A, B, … Z, A1, B1, …"""
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[index % 26] + (str(index // 26) if index >= 26 else "")


def shorten(name: str, length: int = 26) -> str:
    """The name with its middle left out where it is long."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length // 2) :]}"


def pareto_front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """Indices, by size, of those points `(size, quality)` that no other matches in both and beats in one."""
    sign = -1 if higher_is_better else 1
    ordered = sorted(range(len(points)), key=lambda index: (points[index][0], sign * points[index][1]))
    front: list[int] = []
    for index in ordered:
        # Of equal points all are on the front.
        if not front or sign * points[index][1] < sign * points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def human_bytes(value: float) -> str:
    """Decimal units, as sizes of downloads are given."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def human_count(value: float) -> str:
    """Three digits and a letter for thousands, millions, billions."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class _Axis:
    """From values to coordinates; logarithmic where the values span more than a factor of twenty."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        low, high = min(values), max(values)
        if low > 0 and high / low > 20:
            room = (high / low) ** 0.08
            return cls(low / room, high * room, start, end, True)
        room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - room, high + room, start, end, False)

    def place(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            few = len(decades) > 4
            marks = [digit * 10.0**power for power in decades for digit in ((1,) if few else (1, 2, 5))]
            marks = [mark for mark in marks if self.low <= mark <= self.high]
            return marks[:: math.ceil(len(marks) / 7)]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough)
        first = math.ceil(self.low / step)
        return [count * step for count in range(first, math.floor(self.high / step) + 1)]


def scatter(
    points: Sequence[Point],
    *,
    x_title: str,
    y_title: str,
    higher_is_better: bool,
    x_label: Callable[[float], str],
    y_label: Callable[[float], str] = "{:.4g}".format,
) -> str:
    """Size against quality: the models of the Pareto front are filled and joined by a line, the others are hollow."""
    x_axis = _Axis.over([point.x for point in points], _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis.over([point.y for point in points], _HEIGHT - _BOTTOM, _TOP)
    places = [(x_axis.place(point.x), y_axis.place(point.y)) for point in points]
    front = pareto_front([(point.x, point.y) for point in points], higher_is_better)
    right, bottom, parts = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, []
    for tick in x_axis.ticks():
        at = x_axis.place(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick middle" x="{at:.1f}" y="{bottom + 16}">{escape(x_label(tick))}</text>')
    for tick in y_axis.ticks():
        at = y_axis.place(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{at + 4:.1f}">{escape(y_label(tick))}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    middle_x, middle_y = (_LEFT + right) / 2, (_TOP + bottom) / 2
    # Turned with its title, an arrow to the right points up.
    arrow = "→" if higher_is_better else "←"
    parts.append(f'<text class="title middle" x="{middle_x}" y="{_HEIGHT - 10}">{escape(x_title)} (← better)</text>')
    parts.append(
        f'<text class="title middle" transform="translate(14 {middle_y}) rotate(-90)">'
        f"{escape(shorten(y_title, 36))} ({arrow} better)</text>"
    )
    # The border of what the models of the front reach: its steps go along before they go up or down.
    (x, y), *others = (places[index] for index in front)
    steps, taken = f"M{x:.1f} {y:.1f}", [(x - 8, y - 8, x + 8, y + 8) for x, y in places]
    for next_x, next_y in others:
        steps += f"H{next_x:.1f}V{next_y:.1f}"
        # No name is written across the line.
        taken.append((x, y - 1, next_x, y + 1))
        taken.append((next_x - 1, min(y, next_y), next_x + 1, max(y, next_y)))
        x, y = next_x, next_y
    parts.append(f'<path class="front" d="{steps}"/>')
    for position, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
        kind = "filled" if position in front else "hollow"
        series = point.index % SHAPES
        parts.append(
            f'<g class="series-{series}"><title>{escape(point.name)}: {escape(point.text)}</title>'
            f'<path class="marker {kind}" transform="translate({x:.1f} {y:.1f})" d="{_SHAPES[series]}"/></g>'
        )
        parts.append(_label(f"{letter(point.index)} {shorten(point.name)}", letter(point.index), (x, y), taken))
    summary = "; ".join(f"{point.name}: {point.text}" for point in points)
    return _figure(f"{y_title} against {x_title}", parts, _HEIGHT, summary)


def _label(text: str, short: str, place: tuple[float, float], taken: list[_Box]) -> str:
    """The name beside the point where it covers nothing, else only the letter."""
    x, y = place
    for words in (text, short):
        width = _CHARACTER * len(words)
        for at, middle, anchor in (
            (x + 12, y, "start"),
            (x - 12, y, "end"),
            (x, y - 17, "middle"),
            (x, y + 17, "middle"),
            (x + 8, y - 16, "start"),
            (x - 8, y - 16, "end"),
            (x + 8, y + 16, "start"),
            (x - 8, y + 16, "end"),
        ):
            left = at - width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
            box = (left, middle - 8, left + width, middle + 8)
            inside = box[0] >= _LEFT and box[2] <= _WIDTH and box[1] >= 0 and box[3] <= _HEIGHT - _BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                return f'<text class="label {anchor}" x="{at:.1f}" y="{middle + 4:.1f}">{escape(words)}</text>'
    return f'<text class="label" x="{x + 9:.1f}" y="{y + 4:.1f}">{escape(short)}</text>'


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# Centred at the origin, about equal in area.
_SHAPES = (
    "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0Z",
    "M-5.5 -5.5H5.5V5.5H-5.5Z",
    "M0 -7L7 5.5H-7Z",
    "M0 -7.5L7.5 0L0 7.5L-7.5 0Z",
    "M0 7L7 -5.5H-7Z",
    "M-2.4 -7H2.4V-2.4H7V2.4H2.4V7H-2.4V2.4H-7V-2.4H-2.4Z",
)


def bars(points: Sequence[Point], *, title: str, higher_is_better: bool) -> str:
    """One bar a model from zero to `x`, its value written at the end."""
    height, left = 30, 212
    largest = max(point.x for point in points) or 1.0
    parts, note = [], "longer is better" if higher_is_better else "shorter is better"
    for row, point in enumerate(points):
        top = 6 + row * height
        # Room for the value's text stays on the right.
        length = max(1.0, (_WIDTH - left - 84) * point.x / largest)
        name = f"{letter(point.index)} {shorten(point.name)}"
        series = point.index % HATCHES
        parts.append(
            f'<g class="series-{series}"><title>{escape(point.name)}: {escape(point.text)}</title>'
            f'<text class="label end" x="{left - 8}" y="{top + 15}">{escape(name)}</text>'
            f'<rect class="bar" x="{left}" y="{top}" width="{length:.1f}" height="20"/>'
            f'<rect class="hatch" x="{left}" y="{top}" width="{length:.1f}" height="20" fill="url(#hatch-{series})"/>'
            f'<text class="label" x="{left + length + 6:.1f}" y="{top + 15}">{escape(point.text)}</text></g>'
        )
    parts.append(f'<path class="axis" d="M{left} 0V{6 + len(points) * height}"/>')
    summary = "; ".join(f"{point.name}: {point.text}" for point in points)
    return _figure(title, parts, 8 + len(points) * height, summary, note)


def _figure(title: str, parts: list[str], height: int, summary: str, note: str = "") -> str:
    note = f' <span class="note">({escape(note)})</span>' if note else ""
    return (
        f'<figure><figcaption>{escape(title)}{note}</figcaption><svg viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(f"{title}. {summary}")}">{"".join(parts)}</svg></figure>'
    )


def hatch_patterns() -> str:
    """What `bars` fills with, once a page."""
    strokes = (
        "",
        "M-2 2L2 -2M0 8L8 0M6 10L10 6",
        "M4 4h0.01",
        "M0 0L8 8M8 0L0 8",
        "M0 4H8",
        "M4 0V8",
    )
    patterns = "".join(
        f'<pattern id="hatch-{number}" width="8" height="8" patternUnits="userSpaceOnUse">'
        f'<path class="stroke" d="{stroke}"/></pattern>'
        for number, stroke in enumerate(strokes)
    )
    return f'<svg width="0" height="0" aria-hidden="true" class="patterns"><defs>{patterns}</defs></svg>'
