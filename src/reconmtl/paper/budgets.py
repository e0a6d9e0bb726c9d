"""What splitting more layers buys: a curve over K and over budgets of parameters for each way of choosing them.

The ways are Recon's, random layers and the smallest layers. At a budget each splits the layers that still fit, in its
own order, so that ways are compared at equal size and not only at equal number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from statistics import fmean
from typing import TYPE_CHECKING

from reconmtl.conflicts import ConflictLog
from reconmtl.loop import NormStats
from reconmtl.paper import controls, drawings
from reconmtl.paper.controls import KS, WAYS
from reconmtl.paper.prices import Priced, priced
from reconmtl.paper.trainings import Choice, Setup, Training
from reconmtl.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGETS = (0.005, 0.02, 0.08, 0.3)
"""What one more copy of the split layers may take, as a share of all shared parameters."""

Way = Callable[[ConflictLog, int, int, float], Plan]
"""(log, K or parameters, seed, severity) -> plan."""


def smallest_within(log: ConflictLog, parameters: int) -> Plan:
    """As many of the smallest layers as fit; at least one."""
    total = accumulate(sorted(log.sizes.values()))
    return Plan.smallest(log, max(1, sum(t <= parameters for t in total)))


def _within(log: ConflictLog, parameters: int, severity: float) -> Plan:
    megabytes = (len(log.tasks) - 1) * parameters * 4 / 2**20
    return log.rank(severity=severity).budget(megabytes=megabytes)


BY_NUMBER: dict[str, Way] = {
    "recon": lambda log, k, _seed, severity: log.rank(severity=severity).top(k),
    "random layers": lambda log, k, seed, _severity: Plan.random_layers(log, k, seed=seed),
    "smallest layers": lambda log, k, _seed, _severity: Plan.smallest(log, k),
}
BY_BUDGET: dict[str, Way] = {
    "recon": lambda log, most, _seed, severity: _within(log, most, severity),
    "random layers": lambda log, most, seed, _severity: Plan.random_parameters(log, most, seed=seed, exceed=False),
    "smallest layers": lambda log, most, _seed, _severity: smallest_within(log, most),
}


def of_number(way: Way, k: int) -> Choice:
    """A way of choosing at another K, at most the number of layers."""

    def choose(setup: Setup, log: ConflictLog, seed: int) -> Plan:
        return way(log, min(k, len(log.layers)), seed, setup.decided.severity)

    return choose


def of_budget(way: Way, share: float) -> Choice:
    """A way of choosing within a share of the shared parameters, at least the smallest layer's."""

    def choose(setup: Setup, log: ConflictLog, seed: int) -> Plan:
        most = max(round(share * sum(log.sizes.values())), min(log.sizes.values()))
        return way(log, most, seed, setup.decided.severity)

    return choose


def by_number(norm_stats: NormStats) -> dict[str, dict[int, Training]]:
    """Way -> K -> its training."""
    return {
        name: {k: Training(name=f"{name}, K = {k}", choose=of_number(way, k), norm_stats=norm_stats) for k in KS}
        for name, way in BY_NUMBER.items()
    }


def by_budget(norm_stats: NormStats) -> dict[str, dict[float, Training]]:
    """Way -> share of the parameters -> its training."""
    return {
        name: {
            b: Training(name=f"{name}, {100 * b:g} % of parameters", choose=of_budget(way, b), norm_stats=norm_stats)
            for b in BUDGETS
        }
        for name, way in BY_BUDGET.items()
    }


def usual(norm_stats: NormStats) -> dict[str, Training]:
    """Way -> its training at the usual K, which is the controls' own."""
    return {name: Training(name=name, choose=WAYS[name], norm_stats=norm_stats) for name in BY_NUMBER}


def curve(norm_stats: NormStats) -> dict[str, tuple[Training, ...]]:
    """Way -> all its trainings."""
    numbers, shares, own = by_number(norm_stats), by_budget(norm_stats), usual(norm_stats)
    return {name: (own[name], *numbers[name].values(), *shares[name].values()) for name in BY_NUMBER}


def in_turns(of: Mapping[str, Sequence[Training]]) -> tuple[Training, ...]:
    """All trainings, point by point: whoever stops early has all ways at some points."""
    return tuple(training for point in zip(*of.values(), strict=True) for training in point)


def complete(setup: Setup, trainings: Sequence[Training], seeds: Sequence[int]) -> Sequence[int]:
    """The seeds under which all of them are finished, so that points differ in nothing else; all seeds if none is."""
    return [s for s in seeds if all(t.finished(setup, s) is not None for t in trainings)] or seeds


def show(setup: Setup, trainings: Sequence[Training], seeds: Sequence[int]) -> str:
    """Markdown: see `controls.show`; of the seeds that have every point."""
    return controls.show(setup, trainings, complete(setup, trainings, seeds))


def draw(setup: Setup, norm_stats: NormStats, trainings: Sequence[Training], seeds: Sequence[int]) -> Figure | None:
    """The gain over joint training over K, over the added parameters at each budget, and over operations."""
    _, found = priced(setup, trainings, complete(setup, trainings, seeds))
    rows = {p.row.label: p for p in found}
    if not rows:
        return None
    numbers, shares, own = by_number(norm_stats), by_budget(norm_stats), usual(norm_stats)

    def points(at: Callable[[Priced], float], of: Iterable[Training]) -> list[drawings.Point]:
        there = sorted((rows[t.row] for t in of if t.row in rows), key=at)
        return [drawings.Point(at(p), p.gain) for p in there]

    def layers(p: Priced) -> float:
        return fmean(len(run.plan.layers) for run in p.row.runs if run.plan is not None)

    panels = [
        drawings.Panel("layers split", {n: points(layers, [own[n], *numbers[n].values()]) for n in BY_NUMBER}),
        drawings.Panel("added MB", {n: points(lambda p: p.megabytes, shares[n].values()) for n in BY_NUMBER}, log=True),
        drawings.Panel(
            "operations / joint network's",
            {n: points(lambda p: p.operations, [*numbers[n].values(), *shares[n].values()]) for n in BY_NUMBER},
            joined=False,
        ),
    ]
    return drawings.lines(panels, "Δm relative to joint training (%)")
