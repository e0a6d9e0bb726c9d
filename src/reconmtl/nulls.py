"""Conflicts beyond chance: a layer's score against what gradients without any relation would give at that layer.

The fewer numbers a gradient effectively has, the wider its cosines scatter around zero. A fixed severity S < 0
therefore finds "conflicts" in small layers, BatchNorms above all, whatever the tasks are. Here each layer is compared
with its own null: two independent random directions with as many effective dimensions as its cosines show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from reconmtl.conflicts import ConflictLog, check_severity
from reconmtl.errors import RunError, nearest

Floats = npt.NDArray[np.float64]

BLOCK = 20
"""Steps that are drawn together: neighbouring steps' cosines correlate, by .24 to .36 in measured trainings."""

SAMPLES = 1000
"""Resampled recordings."""

STARTS = 4096
"""Steps at which a block may begin, about; of longer recordings some are left out."""

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
        dimensions: Effective dimensions, 1 / mean squared cosine, [layers]; of what the null is made of.
        chance: Share that unrelated gradients give, [layers].
        p: One-sided p of the excess being zero, from a block bootstrap over steps, [layers].
        null: Where `chance` comes from, see `excess`.
    """

    layers: tuple[str, ...]
    severity: float
    shares: Floats
    dimensions: Floats
    chance: Floats
    p: Floats
    null: Literal["analytic", "sampled"]

    @property
    def excess(self) -> Floats:
        """Share of conflicts beyond chance, [layers]; negative where tasks agree."""
        return self.shares - self.chance

    @property
    def order(self) -> tuple[str, ...]:
        """Layers, most conflicts beyond chance first; ties keep network order."""
        key = np.nan_to_num(self.excess, nan=-math.inf)
        return tuple(self.layers[i] for i in np.argsort(-key, kind="stable"))

    def rows(self) -> list[tuple[str, float, float, float]]:
        """Per layer: name, share by chance, share beyond it, p."""
        return list(zip(self.layers, self.chance.tolist(), self.excess.tolist(), self.p.tolist(), strict=True))

    @property
    def source(self) -> str:
        """Where `chance` comes from, in words."""
        if self.null == "sampled":
            return "sampled from the differences between halves of batches"
        return "that of random directions of as many dimensions as the layer's cosines show"


def excess(
    log: ConflictLog,
    *,
    severity: float,
    null: Literal["analytic", "sampled"] | None = None,
    block: int = BLOCK,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Excess:
    """Compare every layer's conflicts with those of unrelated gradients at that layer.

    Two nulls are known. "analytic": two random directions in a space of as many dimensions as the layer's own cosines
    show; a relation between the tasks makes these fewer, and chance larger than it is. "sampled", for a log that holds
    what the noise of a batch does (`probe(null=True)`): gradients of one half of a batch less those of the other, where
    everything that the tasks stand for cancels; either sign of each is as likely, so that the share of cosines c with
    c < S, and of those with -c < S, count alike. Noise that tasks have in common, because they see the same images,
    makes this null wider, never narrower.

    Args:
        log: A log of Gram matrices.
        severity: The paper's S, in (-1, 0].
        null: Which; the sampled one if there is one.
        block: Steps that are drawn together, because neighbouring ones are alike.
        samples: Resampled recordings behind a p.
        seed: Of the resampling.

    Returns:
        Shares, nulls and p per layer. p is not corrected for the number of layers.

    Raises:
        SeverityError: If severity is outside (-1, 0].
        RunError: If the log holds counts, or nothing, or a null is asked for that it does not have.

    Reference: Künsch, The jackknife and the bootstrap for general stationary observations, Ann. Statist. 1989.
    """
    check_severity(severity)
    if not log.steps or not log.layers:
        raise RunError("The log is empty: there is nothing to compare with chance.")
    if null is None:
        null = "analytic" if log.null is None else "sampled"
    if null == "sampled" and (log.null is None or not log.null.steps):
        raise RunError("The log holds no null to sample from: record it with `probe(null=True)`, or take the analytic.")
    if null not in ("analytic", "sampled"):
        raise RunError(f"Unknown null {null!r}. {nearest(str(null), ('analytic', 'sampled'))}")
    draw = np.random.default_rng(seed)
    found = _Sums.of(log.cosines(), severity, block)
    noise = _Sums.of(log.null.cosines(), severity, block) if null == "sampled" and log.null is not None else None
    whole = found.total, found.total if noise is None else noise.total
    again = found.drawn(samples, draw)
    both = again, again if noise is None else noise.drawn(samples, draw)
    shares, dimensions, chance = _statistics(*whole, severity, null)
    drawn, _, by_chance = _statistics(*both, severity, null)
    centre = shares - chance
    # the spread of the excess around its value tells how often chance alone would reach it
    reached = (drawn - by_chance) - centre >= centre
    p = (1 + reached.sum(0)) / (1 + samples)
    p = np.where(np.isnan(centre), math.nan, p)
    return Excess(log.layers, severity, shares, dimensions, chance, p, null)


def _statistics(measured: Floats, noise: Floats, severity: float, null: str) -> tuple[Floats, Floats, Floats]:
    """Shares of conflicts, effective dimensions, and chance, [..., layers], of sums [4, ..., layers]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = measured[0] / measured[3]
        dimensions = np.clip(noise[3] / noise[2], LEAST, MOST)
        sampled = (noise[0] + noise[1]) / (2 * noise[3])
    if null == "sampled":
        return shares, dimensions, sampled
    return shares, dimensions, chance_below(np.nan_to_num(dimensions, nan=LEAST), severity)


@dataclass(frozen=True)
class _Sums:
    """Sums over steps: cosines below S, below S with the other sign, squares of cosines, how many.

    Attributes:
        total: Over all steps, [4, layers].
        blocks: Over blocks of neighbouring steps, which overlap, [4, blocks, layers].
        number: How many blocks make a recording.
    """

    total: Floats
    blocks: Floats
    number: int

    @classmethod
    def of(cls, cosines: Tensor, severity: float, block: int) -> _Sums:
        values = cosines.numpy()
        there = ~np.isnan(values)
        threshold = values.dtype.type(severity)
        steps = len(values)
        squares = np.where(there, values.astype(np.float64) ** 2, 0)
        parts = np.stack([(values < threshold).sum(2), (-values < threshold).sum(2), squares.sum(2), there.sum(2)])
        parts = parts.astype(np.float64)
        size = max(1, min(block, steps // 4 or 1))
        starts = np.arange(0, steps - size + 1, 1 + steps // STARTS)
        sums = np.concatenate([np.zeros_like(parts[:, :1]), parts.cumsum(1)], axis=1)
        return cls(parts.sum(1), sums[:, starts + size] - sums[:, starts], max(1, round(steps / size)))

    def drawn(self, samples: int, draw: np.random.Generator) -> Floats:
        """Sums over recordings that are drawn from the blocks, [4, samples, layers]."""
        among = self.blocks.shape[1]
        weights = draw.multinomial(self.number, np.full(among, 1 / among), size=samples).astype(np.float64)
        found: Floats = np.einsum("sb,kbl->ksl", weights, self.blocks, optimize=True)
        return found
