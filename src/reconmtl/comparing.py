"""Trainings side by side: mean and spread over seeds, delta-m, size, share of conflicting gradients."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from reconmtl.collecting import LeftOut, labelled, where, why_not
from reconmtl.conflicts import ConflictLog, share_below
from reconmtl.errors import RunError, nearest
from reconmtl.formats import csv_text, latex
from reconmtl.formats import grid as grid
from reconmtl.formats import readable as readable
from reconmtl.runs import Run, Values
from reconmtl.significance import Paired

FORMAT = "reconmtl.comparison/2"
FEW = 6
"""Below so many seeds no sign-flip test reaches p = 0.05."""
Format = Literal["markdown", "csv", "latex", "json"]


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


def gain(metrics: Values, baseline: Values, directions: Mapping[str, Mapping[str, str]]) -> float:
    """`delta_m`; NaN where a value of the baseline is 0."""
    undefined = any(value == 0 for named in baseline.values() for value in named.values())
    return math.nan if undefined else delta_m(metrics, baseline, directions)


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


@dataclass(frozen=True)
class Row:
    """One method in a comparison, over its seeds.

    Attributes:
        paired: Differences in delta-m to the row that is tested against, over common seeds; None where there is none.
        paired_metrics: The same per (task, metric), in the metric's own unit.
        network: Class name of the network.
    """

    label: str
    seeds: tuple[int, ...]
    metrics: dict[tuple[str, str], Spread]
    delta_m: Spread | None
    megabytes: float
    seconds: float
    conflict_share: Spread | None
    runs: tuple[Run, ...]
    network: str = ""
    paired: Paired | None = None
    paired_metrics: Mapping[tuple[str, str], Paired] | None = None


@dataclass(frozen=True)
class Comparison:
    """Methods side by side; `print` it, or take its rows.

    Attributes:
        rows: One per method.
        directions: Task -> metric -> "max" or "min".
        baseline: Label of the row that delta-m is relative to.
        threshold: Gradients conflict below this cosine.
        against: Label of the row that the others are tested against.
        left_out: Runs that are not comparable with these, unfinished, or damaged.
    """

    rows: tuple[Row, ...]
    directions: dict[str, dict[str, Literal["max", "min"]]]
    baseline: str | None
    threshold: float
    against: str | None = None
    left_out: tuple[LeftOut, ...] = ()

    @property
    def tested(self) -> bool:
        """Whether there is a difference to show."""
        return any(row.paired is not None for row in self.rows)

    @property
    def networks(self) -> tuple[str, ...]:
        """Class names of the networks that are compared."""
        return tuple(dict.fromkeys(row.network for row in self.rows if row.network))

    def header(self) -> list[str]:
        """Column titles; an arrow says which direction is better."""
        arrows = {"max": "↑", "min": "↓"}
        metrics = [f"{t} {m} {arrows[self.directions[t][m]]}" for t, m in self.rows[0].metrics]
        share = f"cos < {self.threshold:g} (%) ↓"
        titles = ["method", *metrics, "Δm (%) ↑", "#P (MB)", share, "time (s)", "n"]
        titles += [f"Δm - {self.against} ↑", "p (sign flip)", "p (t)"] if self.tested else []
        return titles + (["network"] if len(self.networks) > 1 else [])

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
                *(_tested(row.paired) if self.tested else []),
                *([row.network] if len(self.networks) > 1 else []),
            ]
            for row in self.rows
        ]

    def notes(self) -> list[str]:
        """What has to be said with the table: what a p means here, and which runs are not in it."""
        lines = []
        if self.tested:
            ns = sorted({row.paired.n for row in self.rows if row.paired is not None})
            least = ", ".join(f"{2.0 ** (1 - n):.2g} with n = {n}" for n in ns)
            told = f"p is two-sided, for differences in Δm to {self.against} seed by seed"
            if ns[0] < FEW:
                told += f"; with so few seeds the sign-flip test cannot give less than {least}, and the t test trusts "
                told += "that the differences are normally distributed"
            lines.append(f"{told}.")
        if self.left_out:
            lines.append("Left out:")
            lines += [f"- {out.run}: {out.reason}" for out in self.left_out]
        return lines

    def __str__(self) -> str:
        table = grid(self.header(), self.cells())
        notes = self.notes()
        return "\n".join([table, "", *notes]) if notes else table

    def to(self, format: Format) -> str:
        """The same rows as Markdown, CSV, LaTeX or JSON.

        Raises:
            RunError: If there is no such format.
        """
        if format == "markdown":
            return str(self)
        if format == "latex":
            comments = [f"% {line}" for line in self.notes()]
            return "\n".join([latex(self.header(), self.cells()), *comments])
        if format == "csv":
            return self._csv()
        if format == "json":
            return json.dumps(self.to_dict())
        raise RunError(f"Unknown format {format!r}. {nearest(format, ('markdown', 'csv', 'latex', 'json'))}")

    def _csv(self) -> str:
        rows: list[dict[str, object]] = []
        for row in self.rows:
            cells: dict[str, object] = {"method": row.label}
            for (t, m), of in row.metrics.items():
                cells |= {f"{t} {m} mean": of.mean, f"{t} {m} sd": of.sd}
            delta, share, paired = row.delta_m, row.conflict_share, row.paired
            cells |= {"delta_m mean": delta and delta.mean, "delta_m sd": delta and delta.sd}
            cells |= {"megabytes": row.megabytes, "seconds": row.seconds}
            cells |= {"conflict_share mean": share and share.mean, "conflict_share sd": share and share.sd}
            cells |= {"n": len(row.seeds), "seeds": " ".join(map(str, row.seeds)), "network": row.network}
            if self.tested:
                cells |= {"difference mean": paired and paired.mean, "difference sd": paired and paired.sd}
                cells |= {"p_flip": paired and paired.p_flip, "p_t": paired and paired.p_t}
            rows.append(cells)
        return csv_text(list(rows[0]), [list(cells.values()) for cells in rows])

    def to_dict(self) -> dict[str, object]:
        """The comparison as plain JSON data."""
        return {
            "format": FORMAT,
            "baseline": self.baseline,
            "against": self.against,
            "threshold": self.threshold,
            "directions": self.directions,
            "rows": [
                {
                    "label": row.label,
                    "seeds": list(row.seeds),
                    "network": row.network,
                    "metrics": {
                        task: {m: _plain(s) for (t, m), s in row.metrics.items() if t == task}
                        for task in self.directions
                    },
                    "delta_m": _plain(row.delta_m),
                    "megabytes": row.megabytes,
                    "seconds": row.seconds,
                    "conflict_share": _plain(row.conflict_share),
                    "paired": _plain(row.paired),
                    "paired_metrics": None
                    if row.paired_metrics is None
                    else {
                        task: {m: _plain(p) for (t, m), p in row.paired_metrics.items() if t == task}
                        for task in self.directions
                    },
                    "runs": [None if run.path is None else str(run.path) for run in row.runs],
                }
                for row in self.rows
            ],
            "left_out": [{"run": out.run, "reason": out.reason} for out in self.left_out],
        }


def _plain(of: Spread | Paired | None) -> dict[str, float | int | None] | None:
    """Its fields; JSON has no NaN and no infinity."""
    if of is None:
        return None
    return {n: v if math.isfinite(v) else None for n, v in vars(of).items()}


def _tested(paired: Paired | None) -> list[str]:
    if paired is None:
        return ["", "", ""]
    difference = Spread(paired.mean, paired.sd, paired.n).show(2, sign=True)
    return [difference, f"{paired.p_flip:.2g}", "n/a" if math.isnan(paired.p_t) else f"{paired.p_t:.2g}"]


def compare(
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    against: str | None = None,
    threshold: float = -0.01,
    left_out: Iterable[LeftOut] = (),
) -> Comparison:
    """Put methods side by side: mean and spread over seeds, delta-m, size, and share of conflicting gradients.

    Args:
        runs: Finished runs; those with the same label and training are seeds of one method. Those of other data,
            metrics or epochs than the first (of the baseline, if one is chosen) are left out and listed.
        baseline: Label of the row that delta-m is relative to; None takes the single-task runs if there are any, else
            `against`.
        against: Label of the row that every other one is tested against, over the seeds that both have; None takes
            the baseline if one was chosen.
        threshold: Gradient pairs over the whole shared vector count as conflicting below this cosine.
        left_out: What is known to be missing already, to be listed too.

    Returns:
        A row per label, in the order of first appearance, and further ones "label (lr = 0.1)" where a label's runs were
        trained differently; delta-m is NaN where a value of the baseline is 0.

    Raises:
        RunError: If there is no run, or the baseline does not exist.

    Reference: Maninis et al., CVPR 2019 (delta-m).
    """
    if not runs:
        raise RunError("There is no run to compare.")
    chosen = [name for name in (baseline, against) if name is not None]
    first = next((r for name in chosen for r in runs if r.label == name), runs[0])
    out = list(left_out)
    comparable = []
    for run in runs:
        if reason := why_not(run, first):
            out.append(LeftOut(where(run), reason))
        else:
            comparable.append(run)
    groups: dict[str, list[Run]] = {}
    for label, run in labelled(comparable):
        group = groups.setdefault(label, [])
        twin = next((r for r in group if r.seed == run.seed), None)
        if twin is None:
            group.append(run)
        elif twin.path is None or run.path is None or twin.path.resolve() != run.path.resolve():
            out.append(LeftOut(where(run), f"the seed {run.seed} of {label!r} is there already: {where(twin)}"))
    unknown = [name for name in chosen if name not in groups]
    if unknown:
        raise RunError(" ".join(f"There is no run labelled {n!r}. {nearest(n, groups)}" for n in unknown))
    against = baseline if against is None else against
    if baseline is None:
        baseline = next((label for label, of in groups.items() if of[0].method == "single"), against)
    keys = [(t, m) for t, named in first.directions.items() for m in named]
    base: Values | None = None
    if baseline is not None and keys:
        of = groups[baseline]
        base = {t: {m: fmean([r.metrics[t][m] for r in of]) for m in named} for t, named in first.directions.items()}

    def of_run(run: Run) -> float:
        assert base is not None
        return gain(run.metrics, base, run.directions)

    rows = []
    for label, group in groups.items():
        shares = [_share(r.log, threshold) for r in group if r.log is not None]
        other = {r.seed: r for r in groups[against]} if against is not None and label != against else {}
        common = [(r, other[r.seed]) for r in group if r.seed in other]
        rows.append(
            Row(
                label=label,
                seeds=tuple(r.seed for r in group),
                metrics={(t, m): Spread.of([r.metrics[t][m] for r in group]) for t, m in keys},
                delta_m=None if base is None else Spread.of([of_run(r) for r in group]),
                megabytes=fmean([r.megabytes for r in group]),  # random layers differ between seeds
                seconds=fmean([r.seconds for r in group]),
                conflict_share=Spread.of(shares) if shares else None,
                runs=tuple(group),
                network=group[0].network,
                paired=Paired.of([of_run(a) - of_run(b) for a, b in common]) if common and base is not None else None,
                paired_metrics={
                    (t, m): Paired.of([a.metrics[t][m] - b.metrics[t][m] for a, b in common]) for t, m in keys
                }
                if common
                else None,
            )
        )
    return Comparison(tuple(rows), first.directions, baseline, threshold, against, tuple(out))


def _share(log: ConflictLog, threshold: float) -> float:
    return 100 * share_below(log.whole(), threshold)
