"""Whether a difference between two methods, seed by seed, is more than chance; with few seeds it cannot be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

EXACT = 20
"""Up to so many differences all 2**n signs are tried, beyond it so many powers of two are drawn."""


@dataclass(frozen=True)
class Paired:
    """A paired comparison of two methods over the seeds that both have.

    Attributes:
        mean: Of the differences.
        sd: Their sample standard deviation; NaN of one.
        n: Number of seeds.
        p_flip: Two-sided p of the sign-flip test, see `sign_flip`.
        p_t: Two-sided p of the paired t test, see `paired_t`.
    """

    mean: float
    sd: float
    n: int
    p_flip: float
    p_t: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> Paired:
        """Test at least one difference; what is not defined is NaN."""
        n = len(differences)
        finite = all(map(math.isfinite, differences))
        return cls(
            mean=fmean(differences),
            sd=stdev(differences) if n > 1 and finite else math.nan,
            n=n,
            p_flip=sign_flip(differences) if finite else math.nan,
            p_t=paired_t(differences) if finite else math.nan,
        )

    @property
    def effect(self) -> float:
        """Effect size: the mean difference in units of the differences' own deviation (Cohen's d_z); NaN without one.

        Reference: Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988, equation 2.3.5.
        """
        return self.mean / self.sd if self.sd > 0 else math.nan

    @property
    def smallest(self) -> float:
        """The smallest p that the sign-flip test could have given with so many seeds."""
        return 2.0 ** (1 - self.n)


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p that the mean difference is zero, if each difference had either sign with equal chance.

    Args:
        differences: One per seed, finite, [n].

    Returns:
        The share of the 2**n ways to choose the signs whose sum is at least as far from zero as the one found: exact
        for n <= 20, else estimated from 2**20 draws of a fixed seed. It is never below 2 / 2**n.

    Reference: Fisher, The Design of Experiments, 1935, section 21.
    """
    values = np.asarray(differences, dtype=np.float64)
    scale = float(np.abs(values).max())
    if scale == 0:
        return 1.0
    values = values / scale
    if len(values) <= EXACT:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
    else:
        draw = np.random.default_rng(0)
        sums = np.concatenate(
            [[values.sum()], *((draw.integers(0, 2, (2**12, len(values))) * 2 - 1) @ values for _ in range(2**8))]
        )
    return float(np.mean(np.abs(sums) >= abs(values.sum()) - 1e-9))  # equal sums differ by rounding


def paired_t(differences: Sequence[float]) -> float:
    """Two-sided p that the mean difference is zero, if the differences are normally distributed.

    Args:
        differences: One per seed, finite, [n].

    Returns:
        p of Student's t with n - 1 degrees of freedom; NaN for fewer than two differences, or equal ones.

    Reference: Abramowitz & Stegun, Handbook of Mathematical Functions, 1964, 26.7.3 and 26.7.4.
    """
    n = len(differences)
    spread = stdev(differences) if n > 1 else 0.0
    if spread == 0:
        return math.nan
    t = abs(fmean(differences)) / (spread / math.sqrt(n))
    freedom = n - 1
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
    for k in range(1 + freedom % 2, freedom, 2):  # (k - 1) / k falls one step in each further term
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total
    return min(1.0, max(0.0, 1 - inside))
