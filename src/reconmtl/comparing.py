"""Trainings side by side: mean and spread over seeds, delta-m, size, share of conflicting gradients."""

from __future__ import annotations

import json
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
        RunError: If the three do not name the same tasks and metrics, there is no metric at all, or a baseline value is
            zero, which no improvement can be relative to.

    Reference: Maninis et al., CVPR 2019; Shi et al., Recon, ICLR 2023, Section 5.1.
    """
    named = {what: {(t, m) for t in of for m in of[t]} for what, of in (("metrics", metrics), ("baseline", baseline))}
    wanted = {(t, m) for t in directions for m in directions[t]}
    faults = [
        f"{what} {'lack' if pair in wanted else 'have an unknown'} {' '.join(pair)}"
        for what, found in named.items()
        for pair in sorted(found ^ wanted)
    ]
    faults += [f"the baseline's {t} {m} is 0" for t, m in sorted(wanted & named["baseline"]) if baseline[t][m] == 0]
    if faults or not wanted:
        raise RunError(f"delta-m is not defined: {'; '.join(faults) or 'no task has a metric'}.")
    tasks = []
    for task, best in directions.items():
        signs = {m: 1 if b == "max" else -1 for m, b in best.items()}
        base = baseline[task]
        if signs:
            tasks.append(fmean([s * (metrics[task][m] - base[m]) / abs(base[m]) * 100 for m, s in signs.items()]))
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
        defined = len(values) > 1 and all(map(math.isfinite, values))  # stdev cannot do the others
        return cls(fmean(values), stdev(values) if defined else math.nan, len(values))

    def show(self, digits: int | None = None, *, sign: bool = False) -> str:
        """E.g. '84.85 ± 0.31', see `readable`; without the deviation for a single value."""
        if self.n < 2 or not math.isfinite(self.mean):
            return readable(self.mean, digits=digits, sign=sign)
        size = max(abs(self.mean), self.sd)
        mean = readable(self.mean, digits=digits, size=size, sign=sign)
        return f"{mean} ± {readable(self.sd, digits=digits, size=size)}"


def readable(value: float, *, digits: int | None = None, size: float | None = None, sign: bool = False) -> str:
    """A number for a table; 'n/a' for NaN.

    Args:
        value: The number.
        digits: Decimals; None takes as many as show four significant digits, at least two.
        size: The number whose significant digits are meant, if it is another one.
        sign: Whether positive numbers have a sign too.
    """
    if math.isnan(value):
        return "n/a"
    size = abs(value) if size is None else size
    if digits is None and 0 < size < 1e-4:
        return f"{value:{'+' if sign else ''}.3e}"
    if digits is None:
        digits = max(2, 3 - math.floor(math.log10(size))) if 0 < size < math.inf else 2
    return f"{value:{'+' if sign else ''}.{digits}f}"


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
                "" if row.delta_m is None else row.delta_m.show(2, sign=True),
                readable(row.megabytes),
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
            mean, sd = (value if math.isfinite(value) else None for value in (spread.mean, spread.sd))
            return {"mean": mean, "sd": sd, "n": spread.n}

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
    """Align a table as Markdown that also reads well in a terminal: the first column left, the others right."""
    header, *rows = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
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
        A row per label, in the order of first appearance; delta-m is NaN where a value of the baseline is 0.

    Raises:
        RunError: If there is no run, data or metrics differ between runs, one label has runs of the same seed or that
            were trained differently (recipe, precision, size of the plan ...), or the baseline does not exist.
    """
    if not runs:
        raise RunError("There is no run to compare.")
    first = runs[0]
    odd = [r for r in runs if _judged(r) != _judged(first)]
    if odd:
        names = ", ".join(f"{r.label!r} ({_seen(r)})" for r in odd)
        raise RunError(f"Data or metrics differ from those of {first.label!r} ({_seen(first)}): {names}.")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    faults = []
    for label, group in groups.items():
        seeds = [r.seed for r in group]
        doubled = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if doubled:
            faults.append(f"{label!r} has several runs with the seeds {doubled}; they would count twice")
        different = _different(group)
        if different:
            faults.append(
                f"{label!r} has runs that were trained differently, with {different}; give each kind a label of its "
                'own, dataclasses.replace(run, label="...")'
            )
    if faults:
        raise RunError("These runs cannot be compared: " + "; ".join(faults) + ".")
    if baseline is None:
        baseline = next((r.label for r in runs if r.method == "single"), None)
    elif baseline not in groups:
        raise RunError(f"There is no run labelled {baseline!r}. {nearest(baseline, groups)}")
    keys = [(t, m) for t, named in first.directions.items() for m in named]
    base: Values | None = None
    if baseline is not None and keys:
        of = groups[baseline]
        base = {t: {m: fmean([r.metrics[t][m] for r in of]) for m in named} for t, named in first.directions.items()}
    undefined = base is not None and any(value == 0 for named in base.values() for value in named.values())
    rows = []
    for label, group in groups.items():
        shares = [_share(r.log, threshold) for r in group if r.log is not None]
        rows.append(
            Row(
                label=label,
                seeds=tuple(r.seed for r in group),
                metrics={(t, m): Spread.of([r.metrics[t][m] for r in group]) for t, m in keys},
                delta_m=None
                if base is None
                else Spread.of([math.nan if undefined else delta_m(r.metrics, base, r.directions) for r in group]),
                megabytes=fmean([r.megabytes for r in group]),  # random layers differ between seeds
                seconds=fmean([r.seconds for r in group]),
                conflict_share=Spread.of(shares) if shares else None,
                runs=tuple(group),
            )
        )
    return Comparison(tuple(rows), first.directions, baseline, threshold)


def _judged(run: Run) -> tuple[object, ...]:
    """What has to agree before numbers may stand side by side: data, metrics, and how much data was looked at."""
    machine = run.config.get("machine")
    return run.fingerprint, run.directions, machine.get("max_batches") if isinstance(machine, dict) else None


def _trained(run: Run) -> dict[str, object]:
    """What has to agree before numbers may be averaged as those of one method."""
    recipe, machine = run.config.get("recipe"), run.config.get("machine")
    values = {"method": run.method, "network": run.network, **(recipe if isinstance(recipe, dict) else {})}
    values["precision"] = machine.get("precision") if isinstance(machine, dict) else None
    if run.plan is not None:
        chosen = run.plan.chosen
        values |= {"plan": chosen.get("by"), "K": len(run.plan), "severity": chosen.get("severity")}
        values["norm_stats"] = run.config.get("norm_stats")
        if chosen.get("by") not in ("conflict", "random_layers", "random_parameters"):  # these differ between seeds
            values["layers"] = run.plan.layers
    return {n: json.dumps(v, default=str) for n, v in values.items()}  # a loaded run has lists for tuples


def _different(group: Sequence[Run]) -> str:
    """What differs between runs that were trained differently, e.g. 'K = 25 (seeds 0, 1), 10 (seed 2)'; else ''."""
    trained = [(run.seed, _trained(run)) for run in group]
    told = []
    for name in dict.fromkeys(n for _, values in trained for n in values):
        seeds: dict[object, list[int]] = {}
        for seed, values in trained:
            seeds.setdefault(values.get(name, "null"), []).append(seed)
        if len(seeds) > 1:
            each = (f"{v} (seed{'s' * (len(of) > 1)} {', '.join(map(str, of))})" for v, of in seeds.items())
            told.append(f"{name} = {', '.join(each)}")
    return "; ".join(told)


def _seen(run: Run) -> str:
    batches = _judged(run)[2]
    metrics = ", ".join(f"{t} {m}" for t, named in run.directions.items() for m in named)
    return f"seed {run.seed}, data {run.fingerprint}{f', {batches} batches' if batches else ''}, metrics {metrics}"


def _share(log: ConflictLog, threshold: float) -> float:
    return 100 * share_below(log.whole(), threshold)
