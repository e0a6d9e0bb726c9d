"""Where and when tasks conflict: layers against time, and task against task at any layer and time."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from reconmtl.reporting import proposals
from reconmtl.reporting.axes import steps, whole_steps
from reconmtl.reporting.markup import Html, data_block, join, tag
from reconmtl.reporting.material import Material
from reconmtl.reporting.windows import Windows, ratio
from reconmtl.reporting.words import Section, fitting, listed, percent, plural

SHADES = 9
"""Colours of a scale, from none to most."""

ROWS = 120
"""Layers that are drawn at most: those with most conflicts."""

GIVEN = 8
"""Tasks that keep the order they were given in; more are ordered by whom they conflict with."""

ROW, CELL = 16, 17
"""Height of a layer and side of a pair, pixels."""


@dataclass(frozen=True)
class Heatmap:
    """Conflicts per window, layer and pair of tasks.

    Attributes:
        windows: The counts, of the layers that are drawn.
        layers: Their names, in network order.
        left_out: Layers that are not drawn, for there are too many.
        tasks: Names, so ordered that those which conflict with the same others stand together.
        severity: S.
        every: One of how many training steps was measured.
        split: Layers that the plan splits.
    """

    windows: Windows
    layers: tuple[str, ...]
    left_out: int
    tasks: tuple[str, ...]
    severity: float
    every: int
    split: frozenset[str]

    @classmethod
    def of(cls, material: Material, windows: Windows | None) -> Heatmap | None:
        """None without a log."""
        log = material.log
        if log is None or windows is None or not log.layers or not log.steps or len(log.tasks) < 2:
            return None
        kept = _most(windows)
        windows = windows.at_pairs()
        chosen = Windows(
            windows.borders,
            windows.below[:, kept],
            windows.measured[:, kept],
            windows.pair_borders,
            windows.pair_below[:, kept],
            windows.pair_measured[:, kept],
            windows.error,
        )
        tasks, chosen = _ordered(log.tasks, chosen)
        split = frozenset() if material.plan is None else frozenset(material.plan.layers)
        names = tuple(log.layers[i] for i in kept)
        return cls(chosen, names, len(log.layers) - len(kept), tasks, material.severity, log.every, split)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of tasks."""
        return [(a, b) for i, a in enumerate(self.tasks) for b in self.tasks[i + 1 :]]

    @property
    def pairs_in_time(self) -> bool:
        """Whether single pairs are known per window."""
        return len(self.windows.pair_below) == len(self.windows.below)

    def matrix(self) -> npt.NDArray[np.float64]:
        """Conflict rate of each pair over all layers and steps, [tasks, tasks], NaN on the diagonal."""
        n = len(self.tasks)
        out = np.full((n, n), math.nan)
        rows, columns = np.triu_indices(n, 1)
        rates = ratio(self.windows.pair_below.sum((0, 1)), self.windows.pair_measured.sum((0, 1)))
        out[rows, columns] = out[columns, rows] = rates
        return out

    def conclusion(self) -> str:
        """The layer and the pair that conflict most, and whether conflicts grow or fade."""
        rates = ratio(self.windows.below.sum(0), self.windows.measured.sum(0))
        if np.isnan(rates).all():
            return "No two tasks ever reached a layer together, so nothing could conflict."
        best = int(np.nanargmax(rates))
        least = int(np.nanargmin(rates))
        parts = [
            f"Conflicts (cos < {self.severity:g}) are most frequent at {self.layers[best]}, "
            f"{percent(float(rates[best]))} of its pairs, and rarest at {self.layers[least]}, "
            f"{percent(float(rates[least]))}"
        ]
        time = ratio(self.windows.below.sum(1), self.windows.measured.sum(1))
        if len(time) > 3:
            third = max(1, len(time) // 3)
            early, late = (
                float(ratio(self.windows.below[at].sum(), self.windows.measured[at].sum()))
                for at in (slice(0, third), slice(-third, None))
            )
            change = late - early
            trend = "stay as frequent" if abs(change) < 0.02 else "grow" if change > 0 else "fade"
            parts.append(
                f"over the recording they {trend} ({percent(early)} in its first third, {percent(late)} in its last)"
            )
        if len(self.tasks) > 2:
            by_pair = ratio(self.windows.pair_below.sum((0, 1)), self.windows.pair_measured.sum((0, 1)))
            if not np.isnan(by_pair).all():
                order = np.argsort(-np.nan_to_num(by_pair, nan=-1))[:1]
                worst = [f"{self.pairs[i][0]} and {self.pairs[i][1]} ({percent(float(by_pair[i]))})" for i in order]
                parts.append(f"the pair that conflicts most is {listed(worst)}")
        return "; ".join(parts) + "."

    def notes(self) -> list[str]:
        """What a reader has to know about the numbers."""
        out = []
        if self.left_out:
            out.append(f"Drawn are the {len(self.layers)} layers with most conflicts; {self.left_out:,} are left out.")
        if not self.pairs_in_time and len(self.tasks) > 2:
            out.append("Single pairs are known over the whole recording only, not per window: they would not fit.")
        layer, pair = self.windows.error
        if layer or (pair and len(self.tasks) > 2):
            out.append(
                f"The log holds counts on a grid of thresholds, and S = {self.severity:g} lies between two of them: "
                f"numbers are interpolated, with errors up to {layer:,} per layer and window and {pair:,} per pair."
            )
        return out

    def html(self) -> Html:
        """The overview, the matrix and the numbers behind both."""
        return join(
            tag("div", self._tools(), cls="tools"),
            tag("div", self._overview(), self._matrix() if len(self.tasks) > 2 else None, cls="maps"),
            tag("p", self._everything(), id="heat-said", cls="said", aria_live="polite"),
            [tag("p", note, cls="note") for note in self.notes()],
            data_block("heat-data", self._data()),
        )

    def _everything(self) -> str:
        below, measured = int(self.windows.below.sum()), int(self.windows.measured.sum())
        return (
            f"All layers, all steps, all pairs: {below:,} conflicts in {measured:,} pairs, "
            f"{percent(below / measured if measured else math.nan, digits=2)}."
        )

    def _tools(self) -> Html:
        return join(
            tag("button", "Everything", id="heat-all", type="button"),
            tag("span", "Point at a cell for its numbers, choose it with a click or the arrow keys.", cls="hint"),
        )

    def _overview(self) -> Html:
        rates = self.windows.rates
        top = nice_top(rates)
        columns, rows = len(rates), len(self.layers)
        cells = [
            tag("rect", x=c, y=r, width=1, height=1, cls=shade(float(rates[c, r]), top))
            for r in range(rows)
            for c in range(columns)
        ]
        names = [
            tag("div", short, cls="split" if name in self.split else None, title=name)
            for name, short in zip(self.layers, fitting(self.layers), strict=True)
        ]
        borders = self.windows.borders
        end = int(borders[-1])
        ticks = [
            tag(
                "span",
                f"{t * self.every:,}",
                style=f"left:{100 * t / end:.4g}%",
                cls="last" if t > 0.96 * end else None,
            )
            for t in whole_steps(0, end, about=5)
        ]
        svg = tag(
            "svg",
            cells,
            tag("rect", cls="chosen", x=-9, y=-9, width=1, height=1, fill="none"),
            viewBox=f"0 0 {columns} {rows}",
            preserveAspectRatio="none",
            height=rows * ROW,
            id="heat-cells",
            tabindex=0,
            role="img",
            aria_label=f"Conflict rate of {plural(rows, 'layer')} over time; arrow keys choose a cell",
        )
        return tag(
            "div",
            tag("h3", "Layer \u00d7 time", tag("span", "all pairs of tasks", id="heat-which")),
            tag(
                "div",
                tag("div", names, cls="names", id="heat-names"),
                tag(
                    "div", svg, tag("div", ticks, cls="xticks"), tag("div", "training step", cls="xlabel"), cls="cells"
                ),
                cls="heat",
            ),
            legend("heat-legend", top, "pairs in conflict"),
            cls="overview",
        )

    def _matrix(self) -> Html:
        rates = self.matrix()
        n, top = len(self.tasks), nice_top(rates)
        rows, columns = np.triu_indices(n, 1)
        # one cell per pair and side; the page's program finds a pair's cells by their order
        cells = [
            tag("rect", x=int(x), y=int(y), width=1, height=1, cls=shade(float(rates[i, j]), top))
            for i, j in zip(rows, columns, strict=True)
            for x, y in ((j, i), (i, j))
        ]
        size = n * max(CELL, min(46, 260 // n))
        svg = tag(
            "svg",
            cells,
            tag("rect", cls="chosen", x=-9, y=-9, width=1, height=1, fill="none"),
            viewBox=f"0 0 {n} {n}",
            width=size,
            height=size,
            id="pair-cells",
            tabindex=0,
            role="img",
            aria_label=f"Conflict rate of each pair of {n} tasks; arrow keys choose a pair",
        )
        style = f"--n:{n};--side:{size // n}px"
        return tag(
            "div",
            tag("h3", "Task \u00d7 task", tag("span", "all layers, all steps", id="pair-which")),
            tag(
                "div",
                tag(
                    "div",
                    tag("div", [tag("div", tag("span", t)) for t in self.tasks], cls="tops"),
                    tag("div", [tag("div", tag("bdi", t), title=t) for t in self.tasks], cls="names"),
                    svg,
                    cls="pairs",
                    style=style,
                ),
                cls="scroll",
            ),
            legend("pair-legend", top, "pairs in conflict"),
            cls="matrix",
        )

    def _data(self) -> dict[str, object]:
        """What the page's program needs; counts as base64 of little-endian integers."""
        w = self.windows
        several = len(self.tasks) > 2
        return {
            "layers": list(self.layers),
            "tasks": list(self.tasks),
            "every": self.every,
            "shades": SHADES,
            "borders": [int(b) for b in w.borders],
            "below": packed(w.below),
            "measured": packed(w.measured),
            "pairWindows": len(w.pair_below) if several else 0,
            "pairBelow": packed(w.pair_below) if several else None,
            "pairMeasured": packed(w.pair_measured) if several else None,
        }


def _most(windows: Windows) -> list[int]:
    """Positions of the layers that are drawn, in network order."""
    rates = ratio(windows.below.sum(0), windows.measured.sum(0))
    order = np.argsort(-np.nan_to_num(rates, nan=-1), kind="stable")[:ROWS]
    return sorted(int(i) for i in order)


def _ordered(tasks: tuple[str, ...], windows: Windows) -> tuple[tuple[str, ...], Windows]:
    """Tasks and their pairs along the second eigenvector of the graph of peace (its Laplacian), if there are many."""
    n = len(tasks)
    if n <= GIVEN:
        return tasks, windows
    rows, columns = np.triu_indices(n, 1)
    rates = np.nan_to_num(ratio(windows.pair_below.sum((0, 1)), windows.pair_measured.sum((0, 1))))
    peace = np.zeros((n, n))
    peace[rows, columns] = peace[columns, rows] = rates.max(initial=0.0) - rates
    _, vectors = np.linalg.eigh(np.diag(peace.sum(1)) - peace)
    order = np.argsort(vectors[:, 1] * (1 if vectors[0, 1] <= 0 else -1), kind="stable")
    place = np.zeros((n, n), dtype=np.int64)
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))
    pairs = place[order[rows], order[columns]]
    moved = replace(
        windows, pair_below=windows.pair_below[:, :, pairs], pair_measured=windows.pair_measured[:, :, pairs]
    )
    return tuple(tasks[i] for i in order), moved


def packed(values: npt.NDArray[np.int64]) -> dict[str, object]:
    """Whole numbers as {bytes per number, base64}; if all are the same, that number."""
    flat = values.reshape(-1)
    if flat.size and (flat == flat[0]).all():
        return {"n": int(flat.size), "same": int(flat[0])}
    kind = next(k for k in ("u1", "u2", "u4") if flat.size == 0 or flat.max() < 256 ** int(k[1]))
    return {
        "n": int(flat.size),
        "bytes": int(kind[1]),
        "base64": base64.b64encode(flat.astype(f"<{kind}").tobytes()).decode(),
    }


def nice_top(rates: npt.NDArray[np.float64]) -> float:
    """A round number at or above the highest rate: the end of the colour scale."""
    top = float(np.nanmax(rates)) if not np.isnan(rates).all() else 0.0
    return min(1.0, steps(0.0, top, about=4)[-1]) if top > 0 else 1.0


def shade(rate: float, top: float) -> str:
    """The colour's name, as the page's style knows it."""
    return "none" if math.isnan(rate) else f"q{min(SHADES - 1, int(rate / top * SHADES))}"


def legend(identifier: str, top: float, what: str) -> Html:
    """A colour scale with its ends."""
    return tag(
        "div",
        tag("span", "0\u00a0%"),
        tag("span", [tag("i", cls=f"q{k}") for k in range(SHADES)], cls="scale"),
        tag("span", f"{100 * top:.4g}\u00a0%", cls="top"),
        tag("span", what, cls="what"),
        cls="legend",
        id=identifier,
    )


def section(material: Material, windows: Windows | None) -> Section:
    """The heatmap's part of the page."""
    heat = Heatmap.of(material, windows)
    several = heat is not None and len(heat.tasks) > 2
    return Section(
        key="conflicts",
        short="Conflicts",
        title="Where and when tasks conflict",
        body=None if heat is None else heat.html(),
        conclusion="No log of gradients was found, so conflicts cannot be shown; probe, or train with --record 1."
        if heat is None
        else heat.conclusion(),
        command=proposals.other_severity(material),
        purpose="Count conflicts at another severity S",
        reading=(
            "A row is a layer, a column a stretch of training; the darker (on a dark page: the brighter) a cell, the "
            f"larger the share of pairs whose cosine lies below S = {material.severity:g}. Dots mark layers "
            "that the plan splits. "
        )
        + (
            "The square beside it shows which tasks fight: choose a layer, a time or both on the left and it shows "
            "that part; choose a pair in it and the left shows that pair."
            + (
                " Tasks that conflict with the same others stand together."
                if several and len(material.tasks) > GIVEN
                else ""
            )
            if several
            else "With two tasks there is one pair, so the rows are the whole story."
        ),
    )
