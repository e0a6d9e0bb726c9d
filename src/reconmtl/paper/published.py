"""The numbers that the paper prints, as it prints them, and what follows from them by arithmetic.

Tables 1-16 are files in `data/`, typed from the paper: a row per method, the columns of metrics named
`task metric direction`. Cells stay text, because the number of decimals says how exact a number is.

Reference: Shi et al., Recon: Reducing Conflicting Gradients from the Root for Multi-Task Learning, ICLR 2023.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise
from statistics import fmean

from reconmtl.comparing import delta_m
from reconmtl.errors import UnknownNameError, nearest

TITLES = {
    "t1": "Multi-Fashion+MNIST, ResNet18",
    "t2": "CelebA, ResNet18",
    "t3": "CityScapes, SegNet",
    "t4": "PASCAL-Context, MobileNetV2",
    "t5": "NYUv2, MTAN",
    "t6": "Distribution of conflicts, Multi-Fashion+MNIST",
    "t7": "Recon and random layers (RSL) or parameters (RSP), Multi-Fashion+MNIST",
    "t8": "Distribution of conflicts, CityScapes",
    "t9": "Distribution of conflicts, NYUv2",
    "t10": "Distribution of conflicts, PASCAL-Context",
    "t11": "Recon and the first or last layers, Multi-Fashion+MNIST",
    "t12": "Distance between rankings of stages of training, Multi-Fashion+MNIST",
    "t13": "Layers found in different stages of training, CityScapes, SegNet",
    "t14": "Distance between rankings found with different methods, Multi-Fashion+MNIST",
    "t15": "NYUv2, SegNet; Recon* takes the layers found on CityScapes",
    "t16": "CityScapes, MTAN; Recon* takes the layers found on NYUv2",
}
RESULTS = ("t1", "t3", "t4", "t5", "t13", "t15", "t16")
"""Tables of metrics per task, from which delta-m follows; of Table 2 the forty errors are not printed."""
DISTRIBUTIONS = ("t6", "t8", "t9", "t10")
SELECTIONS = ("t7", "t11")
DISTANCES = ("t12", "t14")
SINGLE = "Single-task"
JOINT = "Joint-train"


@dataclass(frozen=True)
class Table:
    """One table as printed.

    Attributes:
        name: "t1" to "t16", or "text" for numbers in sentences.
        columns: Titles; the first ones name a row.
        rows: Cells as printed; "" where the paper prints nothing.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def title(self) -> str:
        """What the table shows."""
        return TITLES.get(self.name, "Numbers in the text")

    def column(self, title: str) -> tuple[str, ...]:
        """Its cells.

        Raises:
            UnknownNameError: If there is no such column.
        """
        if title not in self.columns:
            raise UnknownNameError(f"{self.name} has no column {title!r}. {nearest(title, self.columns)}")
        at = self.columns.index(title)
        return tuple(row[at] for row in self.rows)

    def dicts(self) -> list[dict[str, str]]:
        """Each row as {column: cell}."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@cache
def load(name: str) -> Table:
    """Read one table of the paper.

    Raises:
        UnknownNameError: If there is no such table.

    Example:
        >>> load("t1").column("megabytes")[:2]
        ('85.62', '42.81')
    """
    if name not in (*TITLES, "text"):
        raise UnknownNameError(f"The paper has no table {name!r}. {nearest(name, TITLES)}")
    text = files("reconmtl.paper").joinpath("data", f"{name}.csv").read_text(encoding="utf-8")
    header, *rows = csv.reader(text.splitlines())
    return Table(name, tuple(header), tuple(map(tuple, rows)))


def agreement(ours: float | None, printed: float | None) -> str:
    """Whether a number of ours has the sign of the paper's, and its size within a factor of two; "" if one is missing.

    Returns:
        "no", "sign", or "sign and size".
    """
    if ours is None or printed is None or math.isnan(ours):
        return ""
    if ours * printed <= 0:
        return "no"
    return "sign and size" if 0.5 <= ours / printed <= 2 else "sign"


def decimals(cell: str) -> int:
    """How many digits are printed behind the point."""
    return len(cell.partition(".")[2])


@dataclass(frozen=True)
class Printed:
    """A rounded number: all that is known is that the true one lies within half a unit of its last digit."""

    value: float
    half_unit: float

    @classmethod
    def of(cls, cell: str, *, digits: int | None = None) -> Printed:
        """Read a cell; with `digits` as exact as its column, though it prints fewer."""
        known = decimals(cell) if digits is None else max(digits, decimals(cell))
        return cls(float(cell), 0.5 * 10.0**-known)

    @property
    def low(self) -> float:
        """The least that it can have been."""
        return self.value - self.half_unit

    @property
    def high(self) -> float:
        """The most that it can have been."""
        return self.value + self.half_unit


@dataclass(frozen=True)
class Result:
    """One method of a table of metrics.

    Attributes:
        method: As the table calls it, "CAGrad w/ Recon" say.
        metrics: Task -> metric -> value.
        delta_m: As printed, in percent; None for the baseline.
        megabytes: As printed.
    """

    method: str
    metrics: Mapping[str, Mapping[str, Printed]]
    delta_m: Printed | None
    megabytes: Printed


def results(name: str) -> tuple[list[Result], dict[str, dict[str, str]]]:
    """The methods of a table of metrics, and task -> metric -> "max" or "min".

    Raises:
        UnknownNameError: If it is no such table.
    """
    table = load(name)
    if "delta_m" not in table.columns:
        raise UnknownNameError(f"{name} is no table of metrics. {nearest(name, ('t2', *RESULTS))}")
    keys = [c for c in table.columns if len(c.split()) == 3]
    usual = {c: Counter(map(decimals, table.column(c))).most_common(1)[0][0] for c in keys}
    directions: dict[str, dict[str, str]] = {}
    for key in keys:
        task, metric, best = key.split()
        directions.setdefault(task, {})[metric] = best
    found = []
    for row in table.dicts():
        metrics: dict[str, dict[str, Printed]] = {}
        for key in keys:
            task, metric, _ = key.split()
            metrics.setdefault(task, {})[metric] = Printed.of(row[key], digits=usual[key])
        printed = None if not row["delta_m"] else Printed.of(row["delta_m"])
        found.append(Result(row["method"], metrics, printed, Printed.of(row["megabytes"])))
    return found, directions


@dataclass(frozen=True)
class Recomputed:
    """A printed delta-m and what the printed metrics give.

    Attributes:
        method: Of the row.
        printed: As printed.
        value: From the metrics as printed.
        low: The least that metrics which round to the printed ones can give.
        high: The most.
    """

    method: str
    printed: Printed
    value: float
    low: float
    high: float

    @property
    def exact(self) -> bool:
        """Whether the metrics as printed give the very value."""
        return abs(self.value - self.printed.value) <= self.printed.half_unit + 1e-9

    @property
    def agrees(self) -> bool:
        """Whether some metrics that round to the printed ones give a value that rounds to the printed one."""
        return self.low <= self.printed.high + 1e-9 and self.high >= self.printed.low - 1e-9


def recompute(name: str, *, baseline: str | None = None) -> list[Recomputed]:
    """Every printed delta-m of a table, from its metrics.

    Args:
        name: One of `RESULTS`.
        baseline: Another table whose single-task row is taken.

    Reference: Section 5.1 of the paper (delta-m).
    """
    rows, directions = results(name)
    base = results(baseline or name)[0][0].metrics
    found = []
    for row in rows:
        if row.delta_m is None:
            continue

        def plain(of: Mapping[str, Mapping[str, Printed]]) -> dict[str, dict[str, float]]:
            return {t: {m: p.value for m, p in named.items()} for t, named in of.items()}

        value = delta_m(plain(row.metrics), plain(base), directions)
        bounds = []
        for sign in (-1, 1):  # every metric and every baseline where it makes delta-m smallest, then largest
            tasks = []
            for task, best in directions.items():
                gains = []
                for metric, way in best.items():
                    up = sign if way == "max" else -sign
                    m, s = row.metrics[task][metric], base[task][metric]
                    ratio = m.high / s.low if up > 0 else m.low / s.high
                    gains.append((1 if way == "max" else -1) * (ratio - 1) * 100)
                tasks.append(fmean(gains))
            bounds.append(fmean(tasks))
        found.append(Recomputed(row.method, row.delta_m, value, bounds[0], bounds[1]))
    return found


@dataclass(frozen=True)
class Distribution:
    """How a method's cosines are distributed.

    Attributes:
        method: Of the column.
        edges: Falling inner edges of the intervals.
        shares: In percent, one more than edges.
        reduction: As printed, in percent; None for the joint training.
    """

    method: str
    edges: tuple[float, ...]
    shares: tuple[float, ...]
    reduction: float | None

    def tail(self, cut: float) -> float:
        """Percent of cosines below an edge."""
        return sum(self.shares[self.edges.index(cut) + 1 :])


def distributions(name: str) -> list[Distribution]:
    """The columns of a table of distributions, the joint training first.

    Raises:
        UnknownNameError: If it is no such table.
    """
    if name not in DISTRIBUTIONS:
        raise UnknownNameError(f"{name} is no table of distributions. {nearest(name, DISTRIBUTIONS)}")
    table = load(name)
    edges = tuple(float(e) for e in table.column("to")[:-2])
    found = []
    for method in table.columns[2:]:
        *shares, reduction = table.column(method)
        found.append(Distribution(method, edges, tuple(map(float, shares)), float(reduction) if reduction else None))
    return found


CUTS = {"t6": -0.01, "t8": -0.02, "t9": -0.04, "t10": -0.02}
"""Where the tail of "Reduction" begins, by the captions; each table cuts elsewhere."""


def reduction(joint: float, other: float) -> float:
    """By how many percent a share of conflicts is less than that of joint training.

    Reference: Table 6 of the paper.
    """
    return 100 * (joint - other) / joint


def distances(name: str) -> dict[tuple[str, str], float]:
    """Printed distances (Eq. 22) between pairs of rankings, in positions.

    Raises:
        UnknownNameError: If it is no such table.
    """
    if name not in DISTANCES:
        raise UnknownNameError(f"{name} is no table of distances. {nearest(name, DISTANCES)}")
    table = load(name)
    return {
        (row[0], other): float(cell)
        for row in table.rows
        for other, cell in zip(table.columns[1:], row[1:], strict=True)
        if cell and other != row[0]
    }


def drops(name: str) -> list[tuple[dict[str, str], str, float, float]]:
    """Printed and recomputed performance drops against Recon, in points of accuracy.

    Returns:
        (row, task, printed, recomputed) of every row that is not Recon's own.

    Raises:
        UnknownNameError: If it is no such table.
    """
    if name not in SELECTIONS:
        raise UnknownNameError(f"{name} has no performance drops. {nearest(name, SELECTIONS)}")
    rows = load(name).dicts()
    best = {row["balancer"]: row for row in rows if row["selection"] == "Recon"}
    return [
        (row, task, float(row[f"{task} drop"]), float(best[row["balancer"]][f"{task} acc"]) - float(row[f"{task} acc"]))
        for row in rows
        if row["selection"] != "Recon"
        for task in ("digit", "fashion")
    ]


def text(what: str) -> list[tuple[str, str]]:
    """Numbers in sentences about something: (as printed, unit)."""
    found = [(row["printed"], row["unit"]) for row in load("text").dicts() if row["what"] == what]
    if not found:
        known = load("text").column("what")
        raise UnknownNameError(f"The text says nothing about {what!r}. {nearest(what, known)}")
    return found


def falling(edges: Sequence[float]) -> bool:
    """Whether edges fall, as `conflicts.distribution` takes them."""
    return all(a > b for a, b in pairwise(edges))
