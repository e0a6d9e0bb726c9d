"""Curves over training: how the layers' conflict scores develop, and what each method reaches on the test set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import numpy.typing as npt

from reconmtl.comparing import readable
from reconmtl.reporting import proposals
from reconmtl.reporting.axes import TASK_COLOURS, Scale, dot, frame, polyline, spread_out, steps, ticks_of, whole_steps
from reconmtl.reporting.markup import Html, tag
from reconmtl.reporting.material import Material, Point
from reconmtl.reporting.windows import Windows, ratio
from reconmtl.reporting.words import Section, fitting, listed, percent, plural

POINTS = 12
"""Points of a layer's curve: fewer are calmer."""

PANELS = 6
"""Metrics with a panel each; more are averaged over tasks."""

LABELS = 4
"""Layers whose curve bears its name."""


@dataclass(frozen=True)
class Scores:
    """Conflict rate of each layer over training.

    Attributes:
        layers: In network order.
        middles: Training step in the middle of each window, [windows].
        rates: [windows, layers].
        split: Whether the plan splits a layer, [layers].
        last: The last training step.
        totals: Conflict rate over everything, [layers].
    """

    layers: tuple[str, ...]
    middles: npt.NDArray[np.float64]
    rates: npt.NDArray[np.float64]
    split: npt.NDArray[np.bool_]
    last: int
    totals: npt.NDArray[np.float64]

    @classmethod
    def of(cls, material: Material, windows: Windows | None) -> Scores | None:
        """None without a log of at least two windows."""
        log = material.log
        if log is None or windows is None or len(windows.below) < 2 or not log.layers:
            return None
        w = windows.joined(POINTS)
        chosen = set() if material.plan is None else set(material.plan.layers)
        return cls(
            layers=log.layers,
            middles=(w.borders[:-1] + w.borders[1:]) / 2 * log.every,
            rates=w.rates,
            split=np.array([n in chosen for n in log.layers]),
            last=int(w.borders[-1]) * log.every,
            totals=ratio(w.below.sum(0), w.measured.sum(0)),
        )

    def _mean(self, at: int, layers: npt.NDArray[np.bool_]) -> float:
        values = self.rates[at][layers]
        return float(np.nanmean(values)) if values.size and not np.isnan(values).all() else math.nan

    def conclusion(self) -> str:
        """Whether the gap between split layers and others opens or closes."""
        if not self.split.any() or self.split.all():
            first, last = (self._mean(at, np.ones_like(self.split)) for at in (0, -1))
            return (
                f"On average a layer conflicts in {percent(first)} of its pairs at first and {percent(last)} at last."
            )
        gaps = [self._mean(at, self.split) - self._mean(at, ~self.split) for at in range(len(self.rates))]
        there = [g for g in gaps if not math.isnan(g)]
        above = sum(g > 0 for g in there)
        return (
            f"Split layers conflict in {percent(self._mean(0, self.split))} of their pairs at first and "
            f"{percent(self._mean(-1, self.split))} at last, the others in {percent(self._mean(0, ~self.split))} and "
            f"{percent(self._mean(-1, ~self.split))}; split layers lie above the others in {above} of {len(there)} "
            "windows."
        )

    def named(self) -> list[int]:
        """Layers whose curve bears a name: the ones that conflict most, and the one that conflicts least."""
        order = [int(i) for i in np.argsort(-np.nan_to_num(self.totals, nan=-1), kind="stable")]
        return list(dict.fromkeys([*order[:LABELS], order[-1]]))

    def html(self) -> Html:
        """All layers' curves."""
        top = float(np.nanmax(self.rates)) if not np.isnan(self.rates).all() else 1.0
        y_values = steps(0, top, about=4)
        x, y = Scale(0, self.last), Scale(0, y_values[-1], upward=True)
        named = self.named()
        lines = []
        for i in sorted(range(len(self.layers)), key=lambda i: (i in named, bool(self.split[i]))):
            points = [(x(float(a)), y(float(b))) for a, b in zip(self.middles, self.rates[:, i], strict=True)]
            kept = "split" if self.split[i] else "shared"
            tip = (
                f"{self.layers[i]}\n{kept}\n{percent(float(self.totals[i]))} over all steps; "
                f"{percent(float(self.rates[0, i]))} at first, {percent(float(self.rates[-1, i]))} at last"
            )
            kind = ("curve split" if self.split[i] else "curve") + (" strong" if i in named else "")
            lines.append(tag("g", polyline(points, cls=kind), polyline(points, cls="catch"), data_tip=tip))
        ends = {i: y(float(self.rates[-1, i])) for i in named if not math.isnan(self.rates[-1, i])}
        short = fitting(self.layers, wide=26, narrow=14)
        placed = spread_out(list(ends.values()), gap=58)
        labels = [
            tag(
                "span",
                short[i],
                cls="end split" if self.split[i] else "end",
                style=f"top:{p / 10:.4g}%",
            )
            for i, p in zip(ends, placed, strict=True)
        ]
        x_values = whole_steps(0, self.last)
        plot = frame(
            lines,
            x=x,
            y=y,
            x_ticks=[(float(v), f"{v:,}") for v in x_values],
            y_ticks=[(v, f"{100 * v:.3g} %") for v in y_values],
            x_label="training step",
            y_label="conflicting pairs",
            name=f"Conflict rate of {plural(len(self.layers), 'layer')} over training",
            over=labels,
            height=280,
            right=168,
        )
        key = tag(
            "p", tag("i", cls="dash split"), "split by the plan", tag("i", cls="dash"), "stays shared", cls="keys"
        )
        return tag("div", key, plot, cls="wide")


@dataclass(frozen=True)
class Band:
    """One method's values over its seeds: epochs with lowest, mean and highest."""

    label: str
    epochs: tuple[int, ...]
    low: tuple[float, ...]
    mean: tuple[float, ...]
    high: tuple[float, ...]
    seeds: int


@dataclass(frozen=True)
class Panel:
    """One metric of one task, or of all tasks together."""

    title: str
    best: str
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class Learning:
    """What the methods reach on the test set while they train."""

    panels: tuple[Panel, ...]
    labels: tuple[str, ...]

    @classmethod
    def of(cls, material: Material) -> Learning | None:
        """None if no run has evaluations on disk."""
        if not any(material.curves):
            return None
        runs = [run for group in material.labels.values() for run in group]
        keys = list(dict.fromkeys((t, m) for r in runs for t, of in r.directions.items() for m in of))
        best = {(t, m): b for r in runs for t, of in r.directions.items() for m, b in of.items()}
        wanted: dict[str, tuple[list[tuple[str, str]], str]] = {}
        if len(keys) <= PANELS:
            wanted = {f"{t} {m}": ([(t, m)], best[t, m]) for t, m in keys}
        else:
            for t, m in keys:
                wanted.setdefault(f"{m} ({best[t, m]})", ([], best[t, m]))[0].append((t, m))
            wanted = {
                f"{name.rpartition(' ')[0]}, mean over {plural(len(of), 'task')}": (of, b)
                for name, (of, b) in wanted.items()
            }
        labels = tuple(material.labels)
        curves = {id(run): curve for run, curve in zip(material.runs, material.curves, strict=True)}
        of_label = {n: [curves[id(run)] for run in runs] for n, runs in material.labels.items()}
        panels = []
        for title, (of, direction) in wanted.items():
            bands = [b for label in labels if (b := _band(label, of_label[label], of)) is not None]
            if bands:
                panels.append(Panel(title, direction, tuple(bands)))
        return cls(tuple(panels), labels) if panels else None

    def conclusion(self) -> str:
        """Who ends best on each metric."""
        told = []
        for panel in self.panels[:3]:
            sign = 1 if panel.best == "max" else -1
            ends = [(sign * b.mean[-1], b.label, b.mean[-1]) for b in panel.bands if not math.isnan(b.mean[-1])]
            if ends:
                _, label, value = max(ends, key=lambda e: e[0])
                told.append(f"{label} ends best on {panel.title} ({readable(value)})")
        if not told:
            return "No method has a last value."
        few = all(b.seeds < 2 for p in self.panels for b in p.bands)
        return "; ".join(told) + ("; with one seed the order may be chance." if few else ".")

    def html(self) -> Html:
        """A panel per metric and one key for all."""
        keys = [(tag("i", cls=f"dash c{i % TASK_COLOURS}"), label) for i, label in enumerate(self.labels)]
        return tag(
            "div",
            tag("p", keys, cls="keys"),
            tag("div", [self._panel(p) for p in self.panels], cls="panels"),
        )

    def _panel(self, panel: Panel) -> Html:
        low, high, first, last = _extent(panel)
        y_values = steps(low, high, about=4)
        x, y = Scale(first, last), Scale(y_values[0], y_values[-1], upward=True)
        marks = []
        for band in panel.bands:
            colour = f"c{self.labels.index(band.label) % TASK_COLOURS}"
            points = [(x(e), y(v)) for e, v in zip(band.epochs, band.mean, strict=True)]
            if band.seeds > 1:
                around = [
                    *zip(band.epochs, band.high, strict=True),
                    *reversed(list(zip(band.epochs, band.low, strict=True))),
                ]
                sane = [(x(e), y(v)) for e, v in around if not math.isnan(v)]
                marks.append(polyline(sane, cls=f"band {colour}"))
            marks.append(polyline(points, cls=f"series {colour}"))
            for (a, b), e, lo, v, hi in zip(points, band.epochs, band.low, band.mean, band.high, strict=True):
                if math.isnan(b):
                    continue
                of = f"\nfrom {readable(lo)} to {readable(hi)} over {band.seeds} seeds" if band.seeds > 1 else ""
                tip = f"{band.label}\nepoch {e}: {readable(v)}{of}"
                marks += [dot(a, b, cls=f"point {colour}"), dot(a, b, cls="target", tip=tip)]
        arrow = "↑" if panel.best == "max" else "↓"
        plot = frame(
            marks,
            x=x,
            y=y,
            x_ticks=[(float(v), str(v)) for v in whole_steps(first, last)],
            y_ticks=list(zip(y_values, ticks_of(y_values), strict=True)),
            x_label="epoch",
            y_label="test set",
            name=f"{panel.title} over training",
            height=200,
        )
        return tag("div", tag("h3", f"{panel.title} {arrow}"), plot, cls="panel")


def _band(label: str, curves: Sequence[Sequence[Point]], keys: Sequence[tuple[str, str]]) -> Band | None:
    """A method's values, mean over the keys, per epoch that all its seeds have."""
    series = []
    for curve in curves:
        values = {}
        for point in curve:
            found = [point.values[t][m] for t, m in keys if m in point.values.get(t, {})]
            if len(found) == len(keys):
                values[point.epoch] = fmean(found) if all(map(math.isfinite, found)) else math.nan
        if values:
            series.append(values)
    epochs = sorted(set.intersection(*(set(s) for s in series))) if series else []
    if not epochs:
        return None
    columns = [[s[e] for s in series] for e in epochs]
    sane = [[v for v in c if not math.isnan(v)] or [math.nan] for c in columns]
    return Band(
        label,
        tuple(epochs),
        tuple(map(min, sane)),
        tuple(fmean(c) for c in columns),
        tuple(map(max, sane)),
        len(series),
    )


def _extent(panel: Panel) -> tuple[float, float, int, int]:
    """Lowest and highest value worth seeing, first and last epoch."""
    values = [v for b in panel.bands for v in (*b.low, *b.high) if not math.isnan(v)] or [0.0, 1.0]
    epochs = [e for b in panel.bands for e in b.epochs]
    return min(values), max(values), min(epochs), max(epochs)


def section_scores(material: Material, windows: Windows | None) -> Section:
    """The layers' part of the page."""
    scores = Scores.of(material, windows)
    return Section(
        key="scores",
        short="Scores",
        title="Conflict scores over training",
        body=None if scores is None else scores.html(),
        conclusion="There is no log of at least two measured steps, so scores have no course over training."
        if scores is None
        else scores.conclusion(),
        command=proposals.longer_probe(material),
        purpose="Probe for longer, if the curves still cross",
        reading=(
            "A line is a layer: the share of its gradient pairs that conflict, window by window. Where the split "
            "layers' lines (orange) lie above the others from early on, a short probe is enough. "
            "Names stand at the layers that conflict most, and at the one that conflicts least."
        ),
    )


def section_learning(material: Material) -> Section:
    """The methods' part of the page."""
    learning = Learning.of(material)
    lacking = "no finished run was given" if not material.runs else "the runs were not written to a folder"
    return Section(
        key="training",
        short="Training",
        title="Test metrics over training",
        body=None if learning is None else learning.html(),
        conclusion=f"There are no evaluations over training, because {lacking}."
        if learning is None
        else learning.conclusion(),
        command=proposals.more_seeds(material),
        purpose="Add seeds, so that bands can be told from chance",
        reading=(
            "A line is a method's mean over its seeds, the band reaches from its lowest to its highest seed. "
            f"Where bands overlap, the order of the methods may be chance. {_more(learning)}"
        ).strip(),
    )


def _more(learning: Learning | None) -> str:
    left = [] if learning is None else [p.title for p in learning.panels[3:]]
    return f"The sentence below speaks of the first three panels; further ones: {listed(left)}." if left else ""
