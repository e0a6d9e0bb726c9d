"""A plot on a page: an area that stretches with the page, and labels that stay readable beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from reconmtl.reporting.markup import Child, Html, join, tag

UNIT = 1000
"""Width and height of a plot area in its own units."""

TASK_COLOURS = 8
"""Colours that can be told apart, also with colour blindness; the page's style names them c0 to c7."""


def steps(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round numbers that span low to high: about so many intervals of 1, 2 or 5 times a power of ten."""
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = 0.0, 1.0
    if high <= low:
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [k * size for k in range(first, last + 1)]


def whole_steps(low: int, high: int, *, about: int = 6) -> list[int]:
    """The same for whole numbers, within low to high."""
    return sorted({round(t) for t in steps(low, high, about=about) if low <= round(t) <= high}) or [low]


class Scale:
    """Maps numbers to a plot area's own units, along x or, upside down, along y."""

    def __init__(self, low: float, high: float, *, upward: bool = False) -> None:
        self.low, self.high, self.upward = low, high if high > low else low + 1, upward

    def __call__(self, value: float) -> float:
        """Position in units."""
        share = (value - self.low) / (self.high - self.low)
        return round(UNIT * (1 - share if self.upward else share), 2)

    def percent(self, value: float) -> str:
        """Position for styles."""
        return f"{self(value) * 100 / UNIT:.4g}%"


def ticks_of(values: Sequence[float]) -> list[str]:
    """Labels with as many decimals as the steps need."""
    gap = min((abs(b - a) for a, b in pairwise(values)), default=1.0)
    digits = max(0, -math.floor(math.log10(gap) + 1e-9)) if gap > 0 else 0
    return [f"{v + 0.0:.{digits}f}".replace("-", "\u2212") for v in (0.0 if abs(v) < gap / 1e6 else v for v in values)]


def frame(
    *marks: Child,
    x: Scale,
    y: Scale,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x_label: str,
    y_label: str,
    name: str,
    over: Child = None,
    height: int = 240,
    right: int = 14,
) -> Html:
    """A plot: marks in units inside, labels as text outside.

    Args:
        *marks: SVG in units.
        x: Scale along.
        y: Scale upwards.
        x_ticks: Values and their labels.
        y_ticks: Values and their labels; each has a fine line.
        x_label: Of the axis.
        y_label: Of the axis; stands above it.
        name: What it shows, for those who cannot see it.
        over: Further text, placed in percent over the area.
        height: Of the area, pixels.
        right: Room for text at the right of the area, pixels.
    """
    lines = [tag("line", x1=0, x2=UNIT, y1=y(v), y2=y(v), cls="grid") for v, _ in y_ticks]
    area = tag(
        "svg", *lines, *marks, viewBox=f"0 0 {UNIT} {UNIT}", preserveAspectRatio="none", role="img", aria_label=name
    )
    return tag(
        "div",
        tag("div", y_label, cls="ylabel"),
        tag(
            "div",
            area,
            [tag("span", label, cls="yt", style=f"top:{y.percent(v)}") for v, label in y_ticks],
            [tag("span", label, cls="xt", style=f"left:{x.percent(v)}") for v, label in x_ticks],
            over,
            cls="area",
            style=f"height:{height}px;margin-right:{right}px",
        ),
        tag("div", x_label, cls="xlabel"),
        cls="plot",
    )


def polyline(points: Sequence[tuple[float, float]], *, cls: str, tip: str | None = None) -> Html:
    """A line through points in units; where one is NaN, it breaks."""
    path, pen = [], "M"
    for a, b in points:
        if math.isnan(a) or math.isnan(b):
            pen = "M"
            continue
        path.append(f"{pen}{a:g} {b:g}")
        pen = "L"
    return tag("path", d=" ".join(path), cls=cls, data_tip=tip) if path else join()


def dot(a: float, b: float, *, cls: str, tip: str | None = None) -> Html:
    """A round mark in units; a line without length, because its round ends do not stretch with the area."""
    return tag("path", d=f"M{a:g} {b:g}h0", cls=cls, data_tip=tip)


def spread_out(positions: Sequence[float], *, gap: float) -> list[float]:
    """Move labels apart so that they are at least `gap` from one another, near where they belong."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [positions[i] for i in order]
    for _ in range(60):
        moved = False
        for k in range(len(placed) - 1):
            need = gap - (placed[k + 1] - placed[k])
            if need > 1e-9:
                placed[k] -= need / 2
                placed[k + 1] += need / 2
                moved = True
        if not moved:
            break
    out = [0.0] * len(positions)
    for k, i in enumerate(order):
        out[i] = placed[k]
    return out
