"""How alike rankings are, how stable one is, and what becomes of a plan on another data set or network.

Reference: Shi et al., Recon, ICLR 2023, Appendix C (Eq. 22, Tables 12 and 14).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reconmtl.conflicts import TABLE_EDGES, ConflictLog, distribution
from reconmtl.errors import PlanError, RunError, nearest
from reconmtl.plan import LayerSizes, Plan
from reconmtl.ranking import Ranking
from reconmtl.reporting.stability import positions
from reconmtl.reporting.windows import Windows

QUARTERS = ("1st quarter", "2nd quarter", "3rd quarter", "4th quarter", "all")
"""Stages of a recording, as Table 12 names them."""


def layer_distributions(log: ConflictLog, *, edges: Sequence[float] = TABLE_EDGES) -> Tensor:
    """Each layer's share of cosines in each interval, [layers, len(edges) + 1]; NaN where nothing was measured.

    Args:
        log: A log of Gram matrices.
        edges: Falling edges, see `conflicts.distribution`.
    """
    cosines = log.cosines()
    return torch.stack([distribution(cosines[:, i], edges=edges) for i in range(len(log.layers))])


def quarters(log: ConflictLog, *, severity: float) -> dict[str, Ranking]:
    """Rankings of the four quarters of a recording and of all of it.

    Raises:
        RunError: If it has fewer than four steps.
    """
    if log.steps < 4:
        raise RunError(f"A recording of {log.steps} steps has no quarters.")
    borders = [round(log.steps * i / 4) for i in range(5)]
    parts = [log.window(a, b) for a, b in pairwise(borders)]
    return {n: part.rank(severity=severity) for n, part in zip(QUARTERS, [*parts, log], strict=True)}


def distances(rankings: Mapping[str, Ranking]) -> dict[tuple[str, str], float]:
    """Eq. 22 between all pairs, keyed as the paper's lower triangles are: (later, earlier)."""
    return {(b, a): rankings[a].distance(rankings[b]) for a, b in combinations(rankings, 2)}


def random_distance(layers: int) -> float:
    """Expectation of Eq. 22 between random orders of so many layers."""
    return (layers**2 - 1) / (3 * layers)


def kendall_tau(first: Sequence[str], second: Sequence[str]) -> float:
    """Kendall's tau of two orders of the same names: 1 for equal, -1 for reversed ones; NaN for fewer than two.

    Raises:
        PlanError: If the names differ.

    Reference: Kendall, A new measure of rank correlation, Biometrika 1938.
    """
    if set(first) != set(second) or len(first) != len(second):
        odd = min(set(first) ^ set(second), default="a name twice")
        raise PlanError(f"Orders of different layers cannot be compared: {odd!r} is in one only.")
    n = len(first)
    if n < 2:
        return math.nan
    place = {name: i for i, name in enumerate(second)}
    order = np.array([place[name] for name in first])
    signs = np.sign(order[None, :] - order[:, None])
    return float(np.triu(signs, 1).sum() / (n * (n - 1) / 2))


def overlap(first: Plan, second: Plan) -> int:
    """How many layers both plans split."""
    return len(set(first.layers) & set(second.layers))


def transferred(plan: Plan, to: LayerSizes, *, rename: Callable[[str], str | None] = str) -> Plan:
    """The same layers on another data set, or by their new names on another network.

    Args:
        plan: A plan that gives every task its own copy.
        to: The other network's shared layers and tasks.
        rename: Name there -> name here; None leaves a layer out.

    Raises:
        PlanError: If a layer does not exist there, or none is left; all that are missing are named.
    """
    names = [new for n in plan.layers if (new := rename(n)) is not None]
    missing = [n for n in names if n not in to.network_layers]
    if missing or not names:
        told = "; ".join(f"{n!r}: {nearest(n, to.network_layers)}" for n in missing) or "no layer is left"
        raise PlanError(f"The plan does not fit the other network: {told}")
    chosen = set(names)
    return Plan(
        tasks=to.tasks,
        layers=[n for n in to.network_layers if n in chosen],
        chosen={"by": "transfer", "of": plan.chosen},
    )


@dataclass(frozen=True)
class Bootstrap:
    """Rankings when recordings, and windows of time in each, are drawn again with replacement.

    Attributes:
        layers: Best rank first, of all recordings together.
        low: 5th percentile of each layer's rank, from 1.
        high: 95th percentile.
        top: How often each is among the first K, in [0, 1].
        distance: Mean Eq. 22 distance of a draw from the whole.
        kept: Mean share of the first K that stays.
        k: K.
        recordings: How many seeds were drawn from.
    """

    layers: tuple[str, ...]
    low: npt.NDArray[np.int64]
    high: npt.NDArray[np.int64]
    top: npt.NDArray[np.float64]
    distance: float
    kept: float
    k: int
    recordings: int


def bootstrap(logs: Sequence[ConflictLog], *, severity: float, k: int, samples: int = 1000, seed: int = 0) -> Bootstrap:
    """How stable a ranking and its first K layers are over iterations and seeds.

    Args:
        logs: One per seed, of the same layers.
        severity: The paper's S.
        k: The paper's K.
        samples: Draws.
        seed: Of the draws.

    Raises:
        RunError: If there is no log, or their layers differ.
        PlanError: If K is not between 1 and the number of layers.
    """
    if not logs or any(log.layers != logs[0].layers for log in logs):
        raise RunError("Expected at least one log, all of the same layers.")
    layers = logs[0].layers
    if not 1 <= k <= len(layers):
        raise PlanError(f"K = {k}: expected 1 to {len(layers)}, the number of layers.")
    below = [Windows.of(log, severity=severity).below for log in logs]
    draw = np.random.default_rng(seed)
    scores = np.zeros((samples, len(layers)), dtype=np.int64)
    for i, picked in enumerate(draw.integers(0, len(logs), (samples, len(logs)))):
        for at in picked:
            windows = below[at]
            scores[i] += windows[draw.integers(0, len(windows), len(windows))].sum(0)
    places = positions(scores)
    whole = positions(sum(b.sum(0) for b in below)[None])[0]
    order = np.argsort(whole)
    return Bootstrap(
        layers=tuple(layers[i] for i in order),
        low=np.percentile(places, 5, axis=0, method="lower").astype(np.int64)[order] + 1,
        high=np.percentile(places, 95, axis=0, method="higher").astype(np.int64)[order] + 1,
        top=(places < k).mean(0)[order],
        distance=float(np.abs(places - whole).mean()),
        kept=float((places[:, order[:k]] < k).mean()),
        k=k,
        recordings=len(logs),
    )
