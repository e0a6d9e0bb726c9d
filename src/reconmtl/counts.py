"""What is kept of a long recording of many tasks: exact counts on a fixed grid of thresholds instead of Gram matrices.

For 40 layers, 780 pairs and 10,000 steps the Gram matrices take 1.3 GB; these counts take about 16 MB. For every
threshold S that is a multiple of 0.001 they give the very S-conflict scores that the Grams would give, because they are
taken with the same strict `<` against the same rounded edge. Between two such thresholds the error is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reconmtl.errors import RunError

GRID = 1000
"""Thresholds per unit: cosines are counted between multiples of 1 / GRID."""

COARSE = 20
"""The same for single pairs of tasks."""

WINDOWS = 32
"""Windows of time that are kept at most; when there are more, neighbours are joined, so at least half remain."""


def edges(per_unit: int, dtype: torch.dtype) -> Tensor:
    """The thresholds k / per_unit from -1 to 1, rounded to the dtype of the cosines, [2 * per_unit + 1]."""
    return torch.tensor([k / per_unit for k in range(-per_unit, per_unit + 1)], dtype=torch.float64).to(dtype)


def bins(cosines: Tensor, per_unit: int) -> Tensor:
    """Find b with edge[b] <= cosine < edge[b + 1], int64; NaN gets a bin of its own after the last."""
    edge = edges(per_unit, cosines.dtype)
    last = 2 * per_unit + 1
    guess = ((cosines + 1) * per_unit).nan_to_num_(last).to(torch.int64).clamp_(0, last)
    # arithmetic may be off by one next to an edge: compare exactly; nothing compares with NaN
    guess -= (cosines < torch.cat([edge, edge.new_full((1,), torch.nan)])[guess]).long()
    guess += (cosines >= torch.cat([edge[1:], edge.new_full((2,), torch.inf)])[guess]).long()
    return guess


@dataclass(frozen=True)
class Counts:
    """Counts of cosines.

    Attributes:
        layers: Per window, layer and bin of the fine grid, [windows, layers, 2 * GRID + 1], int32.
        whole: The same for the concatenation of all shared parameters, [windows, 2 * GRID + 1], int32.
        pairs: Per layer, pair and bin of the coarse grid over all windows, [layers, pairs, 2 * COARSE + 1], int32.
        lengths: Measured steps in each window, [windows], int64.
        power: Mean squared gradient norm, [layers], float64.
        dtype: Of the cosines that were counted.
    """

    layers: Tensor
    whole: Tensor
    pairs: Tensor
    lengths: Tensor
    power: Tensor
    dtype: torch.dtype

    @property
    def steps(self) -> int:
        """Measured steps."""
        return int(self.lengths.sum())

    @classmethod
    def of(cls, cosines: Tensor, whole: Tensor, power: Tensor) -> Counts:
        """Count one window.

        Args:
            cosines: [steps, layers, pairs]; NaN where a gradient was zero or absent.
            whole: [steps, pairs].
            power: Squared gradient norms [steps, layers, tasks]; NaN where absent.
        """
        steps, layers, pairs = cosines.shape
        fine, coarse = 2 * GRID + 1, 2 * COARSE + 1
        by_layer = torch.empty((1, layers, fine), dtype=torch.int32)
        by_pair = torch.empty((layers, pairs, coarse), dtype=torch.int32)
        row = torch.arange(pairs) * (coarse + 1)
        for k in range(layers):  # layer by layer, because a layer's cosines fit the processor's cache
            found = bins(cosines[:, k], GRID)  # the last bin but one is +1, the last one NaN
            by_layer[0, k] = torch.bincount(found.flatten(), minlength=fine + 1)[:fine]
            found = found.div_(GRID // COARSE, rounding_mode="floor").add_(row)  # every coarse edge is a fine one
            found[cosines[:, k].isnan()] = coarse
            by_pair[k] = torch.bincount(found.flatten(), minlength=pairs * (coarse + 1)).view(pairs, -1)[:, :coarse]
        total = torch.bincount(bins(whole, GRID).flatten(), minlength=fine + 1)[:fine]
        return cls(
            layers=by_layer,
            whole=total.int().view(1, fine),
            pairs=by_pair,
            lengths=torch.tensor([steps]),
            power=power.double().nanmean(dim=(0, 2)).nan_to_num(),
            dtype=cosines.dtype,
        )

    def added(self, later: Counts) -> Counts:
        """Append later steps: to the last window while it is shorter than the others, else as windows of their own."""
        steps = torch.tensor([self.steps, later.steps], dtype=torch.float64)
        power = (torch.stack([self.power, later.power]) * steps[:, None]).sum(0) / steps.sum().clamp(min=1)
        if len(later.lengths) == 1 and int(self.lengths[-1] + later.lengths[0]) <= int(self.lengths.max()):
            layers, whole, lengths = self.layers.clone(), self.whole.clone(), self.lengths.clone()
            layers[-1] += later.layers[0]
            whole[-1] += later.whole[0]
            lengths[-1] += later.lengths[0]
        else:
            layers = torch.cat([self.layers, later.layers])
            whole = torch.cat([self.whole, later.whole])
            lengths = torch.cat([self.lengths, later.lengths])
        out = Counts(layers, whole, self.pairs + later.pairs, lengths, power, self.dtype)
        while len(out.lengths) > WINDOWS:
            out = out._joined()
        return out

    def _joined(self) -> Counts:
        starts = range(0, len(self.lengths), 2)
        return replace(
            self,
            layers=torch.stack([self.layers[i : i + 2].sum(0, dtype=torch.int32) for i in starts]),
            whole=torch.stack([self.whole[i : i + 2].sum(0, dtype=torch.int32) for i in starts]),
            lengths=torch.stack([self.lengths[i : i + 2].sum() for i in starts]),
        )

    def spread(self, layers: Sequence[int], pairs: Sequence[int], shape: tuple[int, int]) -> Counts:
        """Move layers and pairs to their positions among more of them, [layers, pairs] = shape."""
        by_layer = self.layers.new_zeros((len(self.lengths), shape[0], self.layers.shape[2]))
        by_layer[:, list(layers)] = self.layers
        by_pair = self.pairs.new_zeros((*shape, self.pairs.shape[2]))
        by_pair[torch.tensor(layers)[:, None], torch.tensor(pairs)[None]] = self.pairs
        power = self.power.new_zeros(shape[0])
        power[list(layers)] = self.power
        return replace(self, layers=by_layer, pairs=by_pair, power=power)

    def tensors(self) -> dict[str, Tensor]:
        """What is written to disk."""
        names = ("layers", "whole", "pairs", "lengths", "power")
        return {**{n: getattr(self, n).contiguous() for n in names}, "dtype": torch.empty(0, dtype=self.dtype)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Counts:
        """Read what `tensors` gave.

        Raises:
            KeyError: If one is missing.
            RunError: If they do not belong together.
        """
        content = dict(tensors)
        kinds = {"layers": torch.int32, "whole": torch.int32, "pairs": torch.int32, "lengths": torch.int64}
        wrong = [n for n, kind in (kinds | {"power": torch.float64}).items() if content[n].dtype != kind]
        if wrong or not content["dtype"].dtype.is_floating_point:
            raise RunError(f"its counts have other types than expected: {', '.join(wrong) or 'dtype'}")
        out = cls(**{k: content[k] for k in (*kinds, "power")}, dtype=content["dtype"].dtype)
        windows, layers = out.lengths.numel(), out.power.numel()
        fine = 2 * GRID + 1
        if tuple(out.layers.shape) != (windows, layers, fine) or tuple(out.whole.shape) != (windows, fine):
            raise RunError(f"its counts have shapes {list(out.layers.shape)} and {list(out.whole.shape)}")
        if out.pairs.ndim != 3 or out.pairs.shape[0] != layers or out.pairs.shape[2] != 2 * COARSE + 1:
            raise RunError(f"its counts of pairs have shape {list(out.pairs.shape)}")
        if out.lengths.ndim != 1 or out.power.ndim != 1 or not 0 <= float(out.lengths.double().sum()) < 2**53:
            raise RunError(f"its counts are of {out.lengths.tolist()!r:.80} steps")
        most = out.steps * out.pairs.shape[1]  # cosines that can have been counted, per layer and in all
        sums = (out.whole.sum(), out.layers.sum((0, 2)), out.pairs.sum((1, 2)))  # of int32 as int64
        counted = torch.cat([t.flatten() for t in sums])
        negative = any(bool((t < 0).any()) for t in (out.layers, out.whole, out.pairs, out.lengths))
        if negative or bool((counted > most).any()):
            raise RunError(f"its counts are negative, or more than the {most} cosines of {out.steps} steps")
        return out

    def window(self, start: int, stop: int) -> Counts:
        """Restrict to measured steps start <= step < stop, which must be borders of windows; without `pairs`.

        Raises:
            RunError: If they are not; the borders are listed.
        """
        borders = [0, *self.lengths.cumsum(0).tolist()]
        if start not in borders or min(stop, self.steps) not in borders:
            raise RunError(f"Counts are kept per window: start and stop must be among {borders}, not {start}, {stop}.")
        at = slice(borders.index(start), borders.index(min(stop, self.steps)))
        empty = self.pairs.new_zeros((*self.pairs.shape[:2], 0))
        return replace(self, layers=self.layers[at], whole=self.whole[at], lengths=self.lengths[at], pairs=empty)

    def below(self, threshold: float) -> tuple[Tensor, Tensor]:
        """Count the cosines of each layer below a threshold.

        Returns:
            Counts and the largest error of each, [layers], int64. On the grid the error is zero; between two thresholds
            the count is interpolated.
        """
        return _below(self.layers.sum(0), threshold, GRID)

    def pairs_below(self, threshold: float) -> tuple[Tensor, Tensor]:
        """The same for each layer and pair, [layers, pairs], on the coarse grid.

        Raises:
            RunError: If this is a window: single pairs are counted over all windows only.
        """
        if not self.pairs.shape[2]:
            raise RunError("Single pairs of tasks are counted over the whole recording only, not per window.")
        return _below(self.pairs, threshold, COARSE)

    def whole_values(self) -> Tensor:
        """Stand-ins for the cosines of whole gradients, [number]: the middle of each one's bin.

        Every count at a threshold of the grid is exact.
        """
        edge = edges(GRID, torch.float64)
        middles = torch.cat([(edge[:-1] + edge[1:]) / 2, edge[-1:]])
        return middles.repeat_interleave(self.whole.sum(0)).to(self.dtype)


def _below(counts: Tensor, threshold: float, per_unit: int) -> tuple[Tensor, Tensor]:
    """Count along the last dimension; threshold in [-1, 1]."""
    k = round(threshold * per_unit)
    lower = k if k / per_unit <= threshold else k - 1
    total = counts[..., : lower + per_unit].sum(-1, dtype=torch.int64)
    if lower / per_unit == threshold:
        return total, torch.zeros_like(total)
    inside = counts[..., lower + per_unit].long()
    share = torch.round(inside * (threshold * per_unit - lower)).long()
    return total + share, torch.maximum(share, inside - share)
