"""How far the ranking can be trusted: intervals of each layer's rank, and distances between parts and seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reconmtl.reporting import proposals
from reconmtl.reporting.axes import whole_steps
from reconmtl.reporting.markup import Html, join, tag
from reconmtl.reporting.material import Material
from reconmtl.reporting.windows import Windows
from reconmtl.reporting.words import Section, fitting, listed, percent, plural

SAMPLES = 1000
"""Resampled recordings."""

ROWS = 60
"""Layers that are drawn at most: the best ranked."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stability:
    """Ranks of the layers when windows of time are drawn again and again, with replacement.

    Attributes:
        layers: Best rank first.
        low: 5th percentile of each layer's rank, from 1.
        high: 95th percentile.
        top: How often each is among the first K, in [0, 1].
        k: K.
        windows: Windows that were drawn from.
        halves: Eq. 22 distance between the rankings of the first and the second half; NaN if there is one window only.
        chance: Its expectation between random orders.
        seeds: Further recordings and their distance from this ranking.
    """

    layers: tuple[str, ...]
    low: Integers
    high: Integers
    top: npt.NDArray[np.float64]
    k: int
    windows: int
    halves: float
    chance: float
    seeds: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, material: Material, windows: Windows | None) -> Stability | None:
        """None without a log of at least two windows and two layers."""
        log = material.log
        if log is None or windows is None or len(windows.below) < 2 or len(log.layers) < 2:
            return None
        below = windows.below
        n, layers = below.shape
        draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=SAMPLES)  # the same page twice
        places = positions(draws @ below)
        order = np.argsort(-below.sum(0), kind="stable")
        k = min(layers, len(material.plan.layers)) if material.plan is not None else max(1, layers // 2)
        half = int(np.argmin(np.abs(windows.borders[1:-1] - windows.borders[-1] / 2))) + 1
        parts = positions(np.stack([below[:half].sum(0), below[half:].sum(0)]))
        return cls(
            layers=tuple(log.layers[i] for i in order),
            low=np.percentile(places, 5, axis=0, method="lower").astype(np.int64)[order] + 1,
            high=np.percentile(places, 95, axis=0, method="higher").astype(np.int64)[order] + 1,
            top=(places < k).mean(0)[order],
            k=k,
            windows=n,
            halves=float(np.abs(parts[0] - parts[1]).mean()),
            chance=(layers**2 - 1) / (3 * layers),
            seeds=tuple(_seeds(material)),
        )

    def conclusion(self) -> str:
        """How sure the first K are, and how far parts and seeds agree."""
        sure = int((self.top[: self.k] >= 0.95).sum())
        doubt = [n for n, p in zip(self.layers[: self.k], self.top, strict=False) if p < 0.75]
        parts = [
            f"{sure} of the first {self.k} stay among them in at least 95 % of the resampled recordings"
            + (f", but {listed(doubt)} {'is' if len(doubt) == 1 else 'are'} often replaced" if doubt else ""),
            f"a layer moves by {self.halves:.1f} positions between the first and the second half of the recording "
            f"(random orders: {self.chance:.1f})",
        ]
        if self.seeds:
            mean = sum(d for _, d in self.seeds) / len(self.seeds)
            parts.append(f"and by {mean:.1f} to {plural(len(self.seeds), 'further recording')}")
        else:
            parts.append("and there is no recording of another seed to compare with")
        return "; ".join(parts[:2]) + ", " + parts[2] + "."

    def html(self) -> Html:
        """A row per layer: its rank, the interval, and how often it is among the first K."""
        n = len(self.layers)
        ticks = sorted({1, *whole_steps(1, n), n} - {t for t in whole_steps(1, n) if 0 < n - t < n / 12})
        scale = [tag("span", str(t), style=f"left:{self._at(t)}") for t in ticks]
        rows = [
            tag(
                "div",
                tag("span"),
                tag("div", scale, cls="xticks top"),
                tag("b", f"in first {self.k}"),
                cls="rank header",
            )
        ]
        for i, (name, short) in enumerate(zip(self.layers[:ROWS], fitting(self.layers), strict=False)):
            low, high = int(self.low[i]), int(self.high[i])
            tip = (
                f"{name}\nrank {i + 1}, from {low} to {high} in 90 % of resampled recordings\n"
                f"among the first {self.k} in {percent(float(self.top[i]))}"
            )
            cut = f"{(self.k - 0.5) / max(1, n - 1) * 96 + 2:.4g}%"
            picture = tag(
                "svg",
                tag("line", x1=cut, x2=cut, y1=0, y2=18, cls="cut"),
                tag("line", x1=self._at(low), x2=self._at(high), y1=9, y2=9, cls="range"),
                tag("circle", cx=self._at(i + 1), cy=9, r=4),
                height=18,
                aria_hidden="true",
            )
            frequency = tag(
                "div",
                tag("i", style=f"width:{100 * self.top[i]:.1f}%"),
                tag("b", percent(float(self.top[i]), digits=0)),
                cls="share",
            )
            inside = " inside" if i < self.k else ""
            rows.append(
                tag(
                    "div",
                    tag("div", short, cls="name"),
                    picture,
                    frequency,
                    cls=f"rank{inside}",
                    data_tip=tip,
                )
            )
        left = f"The first {ROWS} of {n:,} layers are drawn." if n > ROWS else None
        return join(tag("div", rows, cls="ranks"), tag("p", left, cls="note") if left else None, self._distances())

    def _at(self, rank: int) -> str:
        return f"{(rank - 1) / max(1, len(self.layers) - 1) * 96 + 2:.4g}%"

    def _distances(self) -> Html:
        rows = [("first half and second half of the recording", self.halves), *self.seeds]
        rows.append(("two random orders, on average", self.chance))
        top = max(self.chance, *(d for _, d in rows if not math.isnan(d)), 1e-9)
        return tag(
            "div",
            tag("h3", "Distance between rankings", tag("span", "mean shift of a layer, in positions (Eq. 22)")),
            [
                tag(
                    "div",
                    tag("div", name, cls="name"),
                    tag(
                        "div", tag("i", style=f"width:{100 * value / top:.1f}%"), tag("b", f"{value:.1f}"), cls="share"
                    ),
                    cls="distance",
                )
                for name, value in rows
                if not math.isnan(value)
            ],
            cls="distances",
        )


def positions(scores: npt.NDArray[np.int64]) -> Integers:
    """Position of each layer in the ranking by its scores, from 0; ties in network order. [..., layers]."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    return np.argsort(order, axis=-1, kind="stable")


def _seeds(material: Material) -> list[tuple[str, float]]:
    """Distances from the rankings of other recordings of the undivided network."""
    assert material.log is not None
    mine = material.log.rank(severity=material.severity)
    return [
        (f"this ranking and that of {name}", mine.distance(log.rank(severity=material.severity)))
        for name, log in material.recordings
        if set(log.layers) == set(mine.layers)
    ]


def section(material: Material, windows: Windows | None) -> Section:
    """The ranking's part of the page."""
    found = Stability.of(material, windows)
    return Section(
        key="stability",
        short="Stability",
        title="How stable the ranking is",
        body=None if found is None else found.html(),
        conclusion="There is no log of at least two windows and two layers, so the ranking's stability is unknown."
        if found is None
        else found.conclusion(),
        command=proposals.more_seeds(material),
        purpose="Repeat with other seeds",
        reading=(
            "The recording is cut into windows of time, and windows are drawn with replacement a thousand times; each "
            "draw gives a ranking. The dot is the layer's rank in the whole recording, the line holds 90 % of draws, "
            "the vertical line is the cut after the last split layer. A layer whose line crosses it is chosen by a "
            "narrow margin."
        ),
    )
