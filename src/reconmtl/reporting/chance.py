"""How much of each layer's score is more than chance: small layers conflict by chance alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from reconmtl.nulls import Excess, excess
from reconmtl.reporting import proposals
from reconmtl.reporting.axes import steps, ticks_of
from reconmtl.reporting.markup import Html, join, tag
from reconmtl.reporting.material import Material
from reconmtl.reporting.words import Section, fitting, listed, percent, plural, signed

ROWS = 60
"""Layers that are drawn at most: the best ranked."""

FEWEST = 8
"""Steps below which nothing can be resampled."""

LEVEL = 0.05
"""Significance, over all layers together."""


@dataclass(frozen=True)
class Chance:
    """Layers by the paper's score, with what of it is more than chance.

    Attributes:
        found: Shares, chance and p, in network order.
        order: Positions of the layers in `found`, most conflicts first.
        k: How many the plan splits; half of the layers without one.
        split: Names of the layers that the plan splits.
    """

    found: Excess
    order: tuple[int, ...]
    k: int
    split: frozenset[str]

    @classmethod
    def of(cls, material: Material) -> Chance | None:
        """None without a log of Gram matrices of some steps."""
        log = material.log
        if log is None or log.counts is not None or log.steps < FEWEST or not log.layers:
            return None
        ranking = log.rank(severity=material.severity)
        place = {n: i for i, n in enumerate(log.layers)}
        layers = frozenset() if material.plan is None else frozenset(material.plan.layers)
        return cls(
            found=excess(log, severity=material.severity),
            order=tuple(place[n] for n in ranking.layers),
            k=min(len(log.layers), len(layers)) or max(1, len(log.layers) // 2),
            split=layers,
        )

    def sure(self) -> list[str]:
        """Layers with more conflicts than chance, corrected for their number; best ranked first."""
        at = LEVEL / len(self.found.layers)
        return [self.found.layers[i] for i in self.order if self.found.p[i] < at]

    def conclusion(self) -> str:
        """How many layers conflict beyond chance, and what the order would be without it."""
        n, sure = len(self.found.layers), self.sure()
        first = [self.found.layers[i] for i in self.order[: self.k]]
        others = [name for name in self.found.order[: self.k] if name not in first]
        told = f" ({listed(sure)})" if sure else ""
        swap = f"{plural(len(others), 'other layer')} ({listed(others)})" if others else "no other layer"
        return (
            f"{len(sure)} of {n} layers{told} {'conflicts' if len(sure) == 1 else 'conflict'} more often than chance "
            f"(p < {LEVEL:g} / {n}); by conflicts beyond chance instead of the score, {swap} would be among the first "
            f"{self.k}. Chance is {self.found.source}."
        )

    def html(self) -> Html:
        """A row per layer: from chance to what was counted."""
        found = self.found
        there = np.concatenate([found.shares[~np.isnan(found.shares)], found.chance[~np.isnan(found.chance)]])
        ticks = steps(0, 100 * float(there.max(initial=0.01)), about=4)
        top = ticks[-1] / 100
        labels = [
            tag("span", f"{label} %", style=f"left:{self._at(t / 100, top)}")
            for t, label in zip(ticks, ticks_of(ticks), strict=True)
        ]
        rows = [tag("div", tag("span"), tag("div", labels, cls="xticks top"), tag("b", "beyond, p"), cls="rank header")]
        shown = self.order[:ROWS]
        for i, short in zip(shown, fitting([found.layers[j] for j in shown]), strict=True):
            rows.append(self._row(i, short, top))
        left = f"The first {ROWS} of {len(found.layers):,} layers are drawn." if len(found.layers) > ROWS else None
        return join(tag("div", rows, cls="ranks"), tag("p", left, cls="note") if left else None)

    def _row(self, i: int, short: Html, top: float) -> Html:
        found = self.found
        name, share, chance, p = found.layers[i], found.shares[i], found.chance[i], found.p[i]
        if math.isnan(share) or math.isnan(chance):
            return tag("div", tag("div", short, cls="name"), tag("span"), tag("b", "n/a"), cls="rank")
        beyond = 100 * float(share - chance)
        tip = (
            f"{name}\nconflicts in {percent(share)} of its pairs, by chance in {percent(chance)}\n"
            f"{signed(beyond, 1)} points beyond chance, p = {p:.3f}; {found.dimensions[i]:.1f} effective dimensions"
        )
        picture = tag(
            "svg",
            tag("line", x1=self._at(chance, top), x2=self._at(share, top), y1=9, y2=9, cls="range"),
            tag("line", x1=self._at(chance, top), x2=self._at(chance, top), y1=3, y2=15, cls="range"),
            tag("circle", cx=self._at(share, top), cy=9, r=4),
            height=18,
            aria_hidden="true",
        )
        told = tag("div", tag("b", f"{signed(beyond, 1)}, {p:.3f}"), cls="share")
        inside = " inside" if name in self.split else ""
        return tag("div", tag("div", short, cls="name"), picture, told, cls=f"rank{inside}", data_tip=tip)

    @staticmethod
    def _at(share: float, top: float) -> str:
        return f"{share / top * 96 + 2:.4g}%"


def section(material: Material) -> Section:
    """The part of the page about chance."""
    found = Chance.of(material)
    return Section(
        key="chance",
        short="Chance",
        title="How much is more than chance",
        body=None if found is None else found.html(),
        conclusion=f"There are no Gram matrices of at least {FEWEST} steps, from which chance could be told."
        if found is None
        else found.conclusion(),
        command=proposals.longer_probe(material),
        purpose="Probe for longer",
        reading=(
            "The fewer numbers a gradient effectively has, the wider its cosines scatter, so that small layers reach a "
            "fixed severity by chance alone. The bar marks how often unrelated gradients would conflict at the layer, "
            "the dot how often the tasks' gradients did; layers stand in the order of the score. The numbers are the "
            "difference in points and the probability that chance gives as much (steps drawn again in blocks)."
        ),
    )
