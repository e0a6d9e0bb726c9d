"""Conflicts over time: how many cosines of each layer, and of each pair of tasks, are below the severity per window.

Gram matrices and counts give the same table; counts know single pairs of tasks over the whole recording only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from reconmtl.conflicts import ConflictLog

BLOCKS = 32
"""Windows of time at most; as many as a log of counts keeps."""

CELLS = 320_000
"""Numbers of layers x pairs x windows that are kept; with more, windows are joined."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """Conflicts per window of time.

    Attributes:
        borders: Measured steps at which the windows begin, and the end of the last one, [windows + 1].
        below: Cosines below the severity, [windows, layers].
        measured: Cosines that there were, [windows, layers].
        pair_borders: The same for the windows of single pairs: a subset of `borders`.
        pair_below: [pair windows, layers, pairs].
        pair_measured: [pair windows, layers, pairs].
        error: The largest error of a number of `below`, and of one of `pair_below`; not zero only for counts that were
            asked between their thresholds.
    """

    borders: Integers
    below: Integers
    measured: Integers
    pair_borders: Integers
    pair_below: Integers
    pair_measured: Integers
    error: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, log: ConflictLog, *, severity: float) -> Windows:
        """Count a log; every cosine is looked at once, window by window."""
        if log.counts is not None:
            return cls._of_counts(log, severity)
        layers, pairs = len(log.layers), len(log.pairs)
        n = max(1, min(BLOCKS, log.steps))
        borders = np.linspace(0, log.steps, n + 1).round().astype(np.int64)
        kept = max(1, min(n, CELLS // max(1, layers * pairs)))
        group = np.minimum(np.arange(n) * kept // n, kept - 1)  # the pair window of each window
        below, measured = np.zeros((2, n, layers), dtype=np.int64)
        pair_below, pair_measured = np.zeros((2, kept, layers, pairs), dtype=np.int64)
        for i, (start, stop) in enumerate(pairwise(borders)):
            cosines = log.window(int(start), int(stop)).cosines()
            # the threshold is rounded to the dtype of the cosines, as for scores
            found = (cosines < torch.tensor(severity, dtype=cosines.dtype)).sum(0).numpy()
            there = (~cosines.isnan()).sum(0).numpy()
            below[i], measured[i] = found.sum(1), there.sum(1)
            pair_below[group[i]] += found
            pair_measured[group[i]] += there
        firsts = [int(np.argmax(group == g)) for g in range(kept)]
        pair_borders = np.append(borders[firsts], borders[-1])
        return cls(borders, below, measured, pair_borders, pair_below, pair_measured)

    @classmethod
    def _of_counts(cls, log: ConflictLog, severity: float) -> Windows:
        counts = log.counts
        assert counts is not None
        borders = np.concatenate([[0], counts.lengths.cumsum(0).numpy()]).astype(np.int64)
        parts = [log.window(int(a), int(b)) for a, b in pairwise(borders)]
        below = np.stack([p.scores(severity=severity).numpy() for p in parts])
        measured = counts.layers.long().sum(2).numpy()
        pair_below, error = counts.pairs_below(severity)
        return cls(
            borders=borders,
            below=below,
            measured=measured,
            pair_borders=borders[[0, -1]],
            pair_below=pair_below.numpy()[None],
            pair_measured=counts.pairs.long().sum(2).numpy()[None],
            error=(
                max((int(p.score_errors(severity=severity).max()) for p in parts if p.layers), default=0),
                int(error.max()) if error.numel() else 0,
            ),
        )

    @property
    def rates(self) -> npt.NDArray[np.float64]:
        """Share of conflicts per window and layer, [windows, layers]; NaN where nothing was measured."""
        return ratio(self.below, self.measured)

    def joined(self, number: int) -> Windows:
        """The same with at most so many windows (pairs are left as they are): neighbours are added."""
        n = len(self.below)
        if n <= number:
            return self
        group = np.arange(n) * number // n
        starts = [int(np.argmax(group == g)) for g in range(number)]
        return Windows(
            borders=np.append(self.borders[starts], self.borders[-1]),
            below=np.add.reduceat(self.below, starts, axis=0),
            measured=np.add.reduceat(self.measured, starts, axis=0),
            pair_borders=self.pair_borders,
            pair_below=self.pair_below,
            pair_measured=self.pair_measured,
            error=self.error,
        )

    def at_pairs(self) -> Windows:
        """The same with the windows of single pairs for everything; of counts, whose pairs know no time, itself."""
        if len(self.pair_below) == 1 and len(self.below) > 1:
            return self
        starts = [int(np.argmax(self.borders == b)) for b in self.pair_borders[:-1]]
        return Windows(
            borders=self.pair_borders,
            below=np.add.reduceat(self.below, starts, axis=0),
            measured=np.add.reduceat(self.measured, starts, axis=0),
            pair_borders=self.pair_borders,
            pair_below=self.pair_below,
            pair_measured=self.pair_measured,
            error=self.error,
        )


def ratio(part: npt.ArrayLike, whole: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Part / whole, NaN where whole is 0."""
    above, below = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    out = np.full(np.broadcast(above, below).shape, math.nan)
    np.divide(above, below, out=out, where=below > 0)
    return out
