"""Trainings side by side: mean and spread over seeds, delta-m, size, share of conflicting gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from reconmtl.conflicts import ConflictLog, share_below
from reconmtl.errors import RunError, nearest
from reconmtl.runs import Run, Values


def delta_m(metrics: Values, baseline: Values, directions: Mapping[str, Mapping[str, str]]) -> float:
    """Average relative improvement over a baseline, in percent; positive is better.

    Args:
        metrics: Task -> metric -> value.
        baseline: The same for the baseline, usually single-task training.
        directions: Task -> metric -> "max" or "min".

    Returns:
        Mean over each task's metrics, then over tasks.

    Raises:
        RunError: If a baseline value is zero, which no improvement can be relative to.

    Reference: Maninis et al., CVPR 2019; Shi et al., Recon, ICLR 2023, Section 5.1.
    """
    tasks = []
    for task, named in metrics.items():
        if not named:
            continue
        values = []
        for name, value in named.items():
            base = baseline[task][name]
            if base == 0:
                raise RunError(f"delta-m is not defined: the baseline's {task} {name} is 0.")
            sign = 1 if directions[task][name] == "max" else -1
            values.append(sign * (value - base) / abs(base) * 100)
        tasks.append(fmean(values))
    return fmean(tasks)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of n values; the deviation of one value is NaN."""

    mean: float
    sd: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values))

    def show(self, digits: int = 2, *, sign: bool = False) -> str:
        """E.g. '84.85 ± 0.31'; without the deviation for a single value."""
        text = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return text if self.n < 2 else f"{text} ± {self.sd:.{digits}f}"


@dataclass(frozen=True)
class Row:
    """One method in a comparison, over its seeds."""

    label: str
    seeds: tuple[int, ...]
    metrics: dict[tuple[str, str], Spread]
    delta_m: Spread | None
    megabytes: float
    seconds: float
    conflict_share: Spread | None
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Comparison:
    """Methods side by side; `print` it, or take its rows."""

    rows: tuple[Row, ...]
    directions: dict[str, dict[str, Literal["max", "min"]]]
    baseline: str | None
    threshold: float

    def header(self) -> list[str]:
        """Column titles; an arrow says which direction is better."""
        arrows = {"max": "↑", "min": "↓"}
        metrics = [f"{t} {m} {arrows[self.directions[t][m]]}" for t, m in self.rows[0].metrics]
        share = f"cos < {self.threshold:g} (%) ↓"
        return ["method", *metrics, "Δm (%) ↑", "#P (MB)", share, "time (s)", "n"]

    def cells(self) -> list[list[str]]:
        """Formatted values, a list per method."""
        return [
            [
                row.label,
                *(s.show() for s in row.metrics.values()),
                "" if row.delta_m is None else row.delta_m.show(sign=True),
                f"{row.megabytes:.2f}",
                "" if row.conflict_share is None else row.conflict_share.show(1),
                f"{row.seconds:.0f}",
                str(len(row.seeds)),
            ]
            for row in self.rows
        ]

    def __str__(self) -> str:
        return grid(self.header(), self.cells())

    def to_dict(self) -> dict[str, object]:
        """The comparison as plain JSON data."""

        def plain(spread: Spread | None) -> dict[str, float | int | None] | None:
            if spread is None:
                return None
            return {"mean": spread.mean, "sd": None if math.isnan(spread.sd) else spread.sd, "n": spread.n}

        return {
            "format": "reconmtl.comparison/1",
            "baseline": self.baseline,
            "threshold": self.threshold,
            "rows": [
                {
                    "label": row.label,
                    "seeds": list(row.seeds),
                    "metrics": {
                        task: {m: plain(s) for (t, m), s in row.metrics.items() if t == task}
                        for task in self.directions
                    },
                    "delta_m": plain(row.delta_m),
                    "megabytes": row.megabytes,
                    "seconds": row.seconds,
                    "conflict_share": plain(row.conflict_share),
                }
                for row in self.rows
            ],
        }


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align a table as Markdown that also reads well in a terminal: text left, numbers right."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(r) for r in rows)])


def compare(runs: Sequence[Run], *, baseline: str | None = None, threshold: float = -0.01) -> Comparison:
    """Put methods side by side: mean and spread over seeds, delta-m, size, and share of conflicting gradients.

    Args:
        runs: Finished runs of one problem; runs with the same label are seeds of one method.
        baseline: Label of the row that delta-m is relative to; None takes the single-task runs if there are any.
        threshold: Gradient pairs over the whole shared vector count as conflicting below this cosine.

    Returns:
        A row per label, in the order of first appearance.

    Raises:
        RunError: If there is no run, data or metrics differ between runs, or the baseline does not exist.
    """
    if not runs:
        raise RunError("There is no run to compare.")
    first = runs[0]
    odd = [r for r in runs if (r.fingerprint, r.directions) != (first.fingerprint, first.directions)]
    if odd:
        names = ", ".join(f"{r.label!r} (seed {r.seed}, data {r.fingerprint})" for r in odd)
        raise RunError(f"Data or metrics differ from those of {first.label!r} (data {first.fingerprint}): {names}.")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    for label, group in groups.items():
        doubled = {r.seed for r in group if sum(r.seed == o.seed for o in group) > 1}
        if doubled:
            raise RunError(f"{label!r} has several runs with seed {min(doubled)}; they would count twice.")
    if baseline is None:
        baseline = next((r.label for r in runs if r.method == "single"), None)
    elif baseline not in groups:
        raise RunError(f"There is no run labelled {baseline!r}. {nearest(baseline, groups)}")
    keys = [(t, m) for t, named in first.directions.items() for m in named]
    base: Values | None = None
    if baseline is not None:
        of = groups[baseline]
        base = {t: {m: fmean([r.metrics[t][m] for r in of]) for m in named} for t, named in first.directions.items()}
    rows = []
    for label, group in groups.items():
        shares = [_share(r.log, threshold) for r in group if r.log is not None]
        rows.append(
            Row(
                label=label,
                seeds=tuple(r.seed for r in group),
                metrics={(t, m): Spread.of([r.metrics[t][m] for r in group]) for t, m in keys},
                delta_m=None if base is None else Spread.of([delta_m(r.metrics, base, r.directions) for r in group]),
                megabytes=group[0].megabytes,
                seconds=fmean([r.seconds for r in group]),
                conflict_share=Spread.of(shares) if shares else None,
                runs=tuple(group),
            )
        )
    return Comparison(tuple(rows), first.directions, baseline, threshold)


def _share(log: ConflictLog, threshold: float) -> float:
    return 100 * share_below(log.whole(), threshold)
