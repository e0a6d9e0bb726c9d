"""Conflicts beyond chance: a layer's score against what gradients without any relation would give at that layer.

The fewer numbers a gradient effectively has, the wider its cosines scatter around zero. A fixed severity S < 0
therefore finds "conflicts" in small layers, BatchNorms above all, whatever the tasks are. Here each layer is compared
with its own null: two independent random directions with as many effective dimensions as its cosines show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from reconmtl.conflicts import ConflictLog, check_severity
from reconmtl.errors import RunError

Floats = npt.NDArray[np.float64]

BLOCK = 20
"""Steps that are drawn together: neighbouring steps' cosines correlate, by .24 to .36 in measured trainings."""

SAMPLES = 1000
"""Resampled recordings."""

LEAST = 2.0
"""Fewest dimensions: two random directions in a plane."""

MOST = 1e9


def chance_below(dimensions: npt.ArrayLike, severity: float) -> Floats:
    """How often the cosine of two random directions is below a threshold.

    Args:
        dimensions: Of the space, any shape; real numbers, taken as at least 2.
        severity: The threshold, in (-1, 0].

    Returns:
        Probabilities in [0, 1/2], same shape.

    Raises:
        SeverityError: If severity is outside (-1, 0].

    Reference: Cai, Fan and Jiang, JMLR 14, 2013, equation 5 (the density of angles between random directions).
    """
    check_severity(severity)
    asked = np.clip(np.asarray(dimensions, dtype=np.float64), LEAST, MOST)
    dimension, values = _table(severity)
    found: Floats = np.interp(np.log(asked), dimension, values)
    return found


@lru_cache(maxsize=16)
def _table(severity: float) -> tuple[Floats, Floats]:
    """Logarithms of dimensions, and the probability at each."""
    grid = np.geomspace(LEAST, MOST, 600)
    return np.log(grid), np.array([_chance(d, severity) for d in grid])


def _chance(dimensions: float, severity: float) -> float:
    """With cosine = sin(u), the density of u is proportional to cos(u) ** (d - 2)."""
    half = min(math.pi / 2, 12 / math.sqrt(dimensions))
    u = np.linspace(-half, half, 4001)
    density = np.cos(u[1:-1]) ** (dimensions - 2)
    ends = np.array([1.0, 1.0]) if dimensions == LEAST else np.zeros(2)
    density = np.concatenate([ends[:1], density, ends[1:]])
    total = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.interp(math.asin(severity), u, total / total[-1]))


@dataclass(frozen=True)
class Excess:
    """Each layer's conflicts against its own null, in network order.

    Attributes:
        layers: Names.
        severity: The S that was counted with.
        shares: Share of cosines below S, in [0, 1], [layers]; NaN where nothing was measured.
        dimensions: Effective dimensions, 1 / mean squared cosine, [layers].
        chance: Share that random directions of so many dimensions give, [layers].
        p: One-sided p of the excess being zero, from a block bootstrap over steps, [layers].
    """

    layers: tuple[str, ...]
    severity: float
    shares: Floats
    dimensions: Floats
    chance: Floats
    p: Floats

    @property
    def excess(self) -> Floats:
        """Share of conflicts beyond chance, [layers]; negative where tasks agree."""
        return self.shares - self.chance

    @property
    def order(self) -> tuple[str, ...]:
        """Layers, most conflicts beyond chance first; ties keep network order."""
        key = np.nan_to_num(self.excess, nan=-math.inf)
        return tuple(self.layers[i] for i in np.argsort(-key, kind="stable"))


def excess(log: ConflictLog, *, severity: float, block: int = BLOCK, samples: int = SAMPLES, seed: int = 0) -> Excess:
    """Compare every layer's conflicts with those of unrelated gradients at that layer.

    Args:
        log: A log of Gram matrices.
        severity: The paper's S, in (-1, 0].
        block: Steps that are drawn together, because neighbouring ones are alike.
        samples: Resampled recordings behind a p.
        seed: Of the resampling.

    Returns:
        Shares, nulls and p per layer. p is not corrected for the number of layers.

    Raises:
        SeverityError: If severity is outside (-1, 0].
        RunError: If the log holds counts, or nothing.

    Reference: Künsch, The jackknife and the bootstrap for general stationary observations, Ann. Statist. 1989.
    """
    check_severity(severity)
    if not log.steps or not log.layers:
        raise RunError("The log is empty: there is nothing to compare with chance.")
    cosines = log.cosines().numpy()
    there = ~np.isnan(cosines)
    threshold = cosines.dtype.type(severity)
    # Per step and layer: conflicts, squared cosines, cosines; sums over steps are all that is needed.
    parts = np.stack(
        [
            (cosines < threshold).sum(2),
            np.where(there, cosines.astype(np.float64) ** 2, 0).sum(2),
            there.sum(2),
        ]
    ).astype(np.float64)
    size = max(1, min(block, log.steps // 4 or 1))
    starts = np.arange(log.steps - size + 1)
    sums = np.concatenate([np.zeros_like(parts[:, :1]), parts.cumsum(1)], axis=1)
    blocks = sums[:, starts + size] - sums[:, starts]  # [3, blocks, layers]: all that overlap

    def statistics(total: Floats) -> tuple[Floats, Floats, Floats]:
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = total[0] / total[2]
            dimensions = np.clip(total[2] / total[1], LEAST, MOST)
        return shares, dimensions, chance_below(np.nan_to_num(dimensions, nan=LEAST), severity)

    shares, dimensions, chance = statistics(parts.sum(1))
    draw = np.random.default_rng(seed)
    number = max(1, round(log.steps / size))
    weights = draw.multinomial(number, np.full(len(starts), 1 / len(starts)), size=samples).astype(np.float64)
    drawn = np.einsum("sb,kbl->ksl", weights, blocks)
    again, _, by_chance = statistics(drawn)
    centre = shares - chance
    # the spread of the excess around its value tells how often chance alone would reach it
    reached = (again - by_chance) - centre >= centre
    p = (1 + reached.sum(0)) / (1 + samples)
    p = np.where(np.isnan(shares), math.nan, p)
    return Excess(log.layers, severity, shares, dimensions, chance, p)
