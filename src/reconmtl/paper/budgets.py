"""What splitting more layers buys: a curve over K and over budgets of parameters for each way of choosing them.

The ways are Recon's, random layers and the smallest layers. At a budget each splits the layers that still fit, in its
own order, so that ways are compared at equal size and not only at equal number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Literal

from reconmtl.conflicts import ConflictLog
from reconmtl.paper.controls import KS, WAYS
from reconmtl.paper.trainings import Choice, Setup, Training
from reconmtl.plan import Plan

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


def curve(norm_stats: Literal["per-task", "shared"]) -> dict[str, tuple[Training, ...]]:
    """Way -> its trainings; those at the usual K are the controls' own."""

    def trained(name: str, choose: Choice) -> Training:
        return Training(name=name, choose=choose, norm_stats=norm_stats)

    return {
        name: (
            trained(name, WAYS[name]),
            *(trained(f"{name}, K = {k}", of_number(way, k)) for k in KS),
            *(trained(f"{name}, {100 * b:g} % of parameters", of_budget(BY_BUDGET[name], b)) for b in BUDGETS),
        )
        for name, way in BY_NUMBER.items()
    }


def in_turns(of: Mapping[str, Sequence[Training]]) -> tuple[Training, ...]:
    """All trainings, point by point: whoever stops early has all ways at some points."""
    return tuple(training for point in zip(*of.values(), strict=True) for training in point)
