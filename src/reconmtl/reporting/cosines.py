"""The distribution of cosines before and after: the whole shared gradient of each training, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from reconmtl.conflicts import ConflictLog
from reconmtl.counts import GRID, bins
from reconmtl.reporting import proposals
from reconmtl.reporting.axes import Scale, frame, steps, ticks_of
from reconmtl.reporting.markup import Html, tag
from reconmtl.reporting.material import Material
from reconmtl.reporting.words import Section, minus, percent, plural

BARS = 40
"""Bars of a histogram, about."""

THRESHOLD = -0.01
"""A pair of whole gradients conflicts below this, as in the paper's tables and in the comparison."""

Shares = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Recorded:
    """The cosines of one method.

    Attributes:
        label: Of the method.
        counts: Per bin of 0.001 from -1, all seeds together, [2001].
        by_seed: Share below the threshold, per seed.
        steps: Measured steps per seed, the most.
    """

    label: str
    counts: npt.NDArray[np.int64]
    by_seed: tuple[float, ...]
    steps: int

    @property
    def total(self) -> int:
        """Cosines there are."""
        return int(self.counts.sum())

    @property
    def below(self) -> float:
        """Share below the threshold."""
        return below(self.counts, THRESHOLD)


def below(counts: npt.NDArray[np.int64], threshold: float) -> float:
    """Share of cosines below a multiple of 0.001."""
    total = int(counts.sum())
    return int(counts[: round((threshold + 1) * GRID)].sum()) / total if total else math.nan


def fine_counts(log: ConflictLog) -> npt.NDArray[np.int64]:
    """Cosines of the whole shared gradient per bin of 0.001, [2001]: those of a log of counts, or of Gram matrices."""
    if log.counts is not None:
        return log.counts.whole.long().sum(0).numpy()
    found = bins(log.whole().flatten(), GRID)
    return torch.bincount(found, minlength=2 * GRID + 2)[: 2 * GRID + 1].numpy()


@dataclass(frozen=True)
class Distributions:
    """Histograms over one axis.

    Attributes:
        rows: Recorded methods, the joint training first.
        edges: Of the bars, rising; the first and the last bar hold what lies beyond them too.
        after: Position of the split training that the first row is compared with; None if there is none.
    """

    rows: tuple[Recorded, ...]
    edges: Shares
    after: int | None

    @classmethod
    def of(cls, material: Material) -> Distributions | None:
        """None if no training was recorded."""
        rows: list[tuple[bool, Recorded]] = []
        for label, runs in material.labels.items():
            logs = [r.log for r in runs if r.log is not None and r.log.steps]
            if not logs:
                continue
            each = [fine_counts(log) for log in logs]
            shares = tuple(below(c, THRESHOLD) for c in each)
            recorded = Recorded(label, np.sum(each, axis=0), shares, max(log.steps for log in logs))
            rows.append((any(r.plan is not None for r in runs), recorded))
        rows.sort(key=lambda row: row[0])  # stable: unsplit trainings first
        kept = [(split, r) for split, r in rows if r.total]
        if not kept:
            return None
        split = [i for i, (of, _) in enumerate(kept) if of]
        recon = [i for i in split if "Recon" in kept[i][1].label]
        after = (recon or split or [None])[0] if len(kept) > 1 and not kept[0][0] else None  # type: ignore[list-item]
        if after is not None:  # beside each other
            kept.insert(1, kept.pop(after))
            after = 1
        return cls(tuple(r for _, r in kept), _edges([r.counts for _, r in kept]), after)

    def shares(self, row: Recorded) -> Shares:
        """Share of the cosines in each bar."""
        at = np.clip(np.round((self.edges[1:-1] + 1) * GRID).astype(int), 0, len(row.counts))
        parts = np.split(row.counts, at)
        return np.array([p.sum() for p in parts]) / max(1, row.total)

    def conclusion(self) -> str:
        """Whether the split left fewer conflicts, and whether the seeds agree."""
        first = self.rows[0]
        if self.after is None:
            told = f"In {first.label}, {percent(first.below)} of the gradient pairs conflict (cos < {THRESHOLD:g})."
            alone = " Only one training was recorded, so there is no before and after."
            return told + (alone if len(self.rows) == 1 else "")
        second = self.rows[self.after]
        change = second.below - first.below
        word = "fewer" if change < 0 else "more"
        relative = f", {percent(abs(change) / first.below, digits=0)} {word}" if first.below else ""
        spread = math.hypot(*(np.std(r.by_seed, ddof=1) for r in (first, second) if len(r.by_seed) > 1))
        if min(len(first.by_seed), len(second.by_seed)) < 2:
            sure = "; one seed says nothing about the spread"
        elif abs(change) <= spread:
            sure = f"; that is within the spread over seeds (±{100 * spread:.1f} points)"
        else:
            sure = f"; the spread over seeds is ±{100 * spread:.1f} points"
        return (
            f"After the split {percent(second.below)} of the gradient pairs conflict (cos < {THRESHOLD:g}), before it "
            f"{percent(first.below)}{relative}{sure}."
        )

    def html(self) -> Html:
        """A histogram per method."""
        tallest = max(float(self.shares(r).max()) for r in self.rows)
        return tag("div", [self._one(i, r, tallest) for i, r in enumerate(self.rows)], cls="panels")

    def _one(self, i: int, row: Recorded, tallest: float) -> Html:
        shares = self.shares(row)
        y_values = steps(0, tallest, about=4)
        x, y = Scale(float(self.edges[0]), float(self.edges[-1])), Scale(0, y_values[-1], upward=True)
        bars = []
        for k, part in enumerate(shares):
            a, b = float(self.edges[k]), float(self.edges[k + 1])
            low = "-1" if k == 0 else f"{a:g}"
            high = "1" if k == len(shares) - 1 else f"{b:g}"
            tip = f"{row.label}\n{low} ≤ cos < {high}\n{percent(float(part), digits=2)} of {row.total:,} pairs"
            left, right = x(a), x(b)
            bars.append(
                tag(
                    "rect",
                    x=left,
                    y=y(float(part)),
                    width=right - left,
                    height=1000 - y(float(part)),
                    cls="neg" if b <= 1e-9 else "pos",
                )
            )
            bars.append(tag("rect", x=left, y=0, width=right - left, height=1000, cls="catch", data_tip=tip))
        zero = tag("line", x1=x(0), x2=x(0), y1=0, y2=1000, cls="zero") if x.low < 0 < x.high else None
        x_values = [v for v in steps(x.low, x.high, about=6) if x.low - 1e-9 <= v <= x.high + 1e-9]
        role = "before" if i == 0 and self.after is not None else "after" if i == self.after else None
        note = tag("p", tag("b", percent(row.below)), minus(f" of the pairs lie below {THRESHOLD:g}"), cls="callout")
        plot = frame(
            bars,
            zero,
            x=x,
            y=y,
            x_ticks=list(zip(x_values, ticks_of(x_values), strict=True)),
            y_ticks=[(v, f"{100 * v:.3g} %") for v in y_values],
            x_label="cosine of two tasks' whole shared gradients",
            y_label="share of pairs",
            name=f"Distribution of cosines, {row.label}",
            height=170,
        )
        seeds = plural(len(row.by_seed), "seed")
        heading = tag(
            "h3", tag("em", role) if role else None, row.label, tag("span", f"{seeds}, {plural(row.total, 'pair')}")
        )
        return tag("div", heading, note, plot, cls="panel")


def _edges(counts: Sequence[npt.NDArray[np.int64]]) -> Shares:
    """Edges of bars that show all but the last thousandth on either side, with one of them at zero."""
    total = np.sum(counts, axis=0)
    running = np.cumsum(total) / total.sum()
    low, high = int(np.searchsorted(running, 0.001)) - GRID, int(np.searchsorted(running, 0.999)) + 1 - GRID
    low, high = min(low, -10), max(high, 10)
    wide = next((w for w in (1, 2, 5, 10, 20, 25, 50, 100) if (high - low) / w <= BARS), 100)
    first, last = math.floor(low / wide) * wide, math.ceil(high / wide) * wide
    return np.arange(max(first, -GRID), min(last, GRID) + wide, wide)[: 2 * GRID // wide + 1] / GRID


def section(material: Material) -> Section:
    """The distributions' part of the page."""
    found = Distributions.of(material)
    return Section(
        key="cosines",
        short="Cosines",
        title="Cosines before and after",
        body=None if found is None else found.html(),
        conclusion="No training was recorded (--record), so there are no cosines before and after a split."
        if found is None
        else found.conclusion(),
        command=proposals.control(material),
        purpose="See what a split of other layers does to the same distribution",
        reading=(
            "Each step and pair of tasks gives one cosine of the gradients over all that is still shared. Left of "
            "zero (orange) the tasks pull apart, right of it (blue) together. A split that works moves weight to the "
            "right. The bars at both ends hold what lies beyond them."
        ),
    )
