"""The F measure of edges at the data set's best threshold (odsF), without MATLAB.

As the field's SEISM and BSDS tools: predictions in eight bits, thresholds 0.01 to 0.99, what exceeds one is thinned
and matched with the true edges within a share of the image's diagonal; pixels are counted over all images before
precision, recall and F are formed. Two things differ, so that numbers compare among themselves and not with published
ones: pairs are a maximum matching (SEISM minimises a cost with outliers), and predictions get no oriented non-maximum
suppression before thinning, which BSDS' tools leave to the user.

Reference: Martin, Fowlkes and Malik, PAMI 2004; Pont-Tuset and Marques, Measures and meta-measures for the supervised
evaluation of object proposals and boundaries, CVPR 2013 (SEISM).
"""

import numpy as np
import torch
from torch import Tensor

from reconmtl.boundaries import matched, thinned
from reconmtl.errors import ProblemError, missing_extra
from reconmtl.losses import like

try:
    from torchmetrics import Metric
except ModuleNotFoundError:
    raise missing_extra("Metrics of edges", "metrics") from None


class EdgeF(Metric):
    """F measure of edges in percent, at the one threshold that is best for all images; NaN where nothing was judged.

    Args:
        distance: Largest distance of a pair, as a share of the image's diagonal; the field takes 0.0075 on PASCAL and
            0.011 on NYUD.
        thresholds: How many, evenly spaced between 0 and 1; the field takes 99; each costs a thinning and a
            matching per image.
        ignore: The value of pixels that do not count; the diagonal is that of the smallest box around the others.

    Raises:
        ProblemError: If an argument is out of range.
    """

    higher_is_better = True
    counts: Tensor
    true: Tensor

    def __init__(self, *, distance: float = 0.0075, thresholds: int = 99, ignore: float = 255.0) -> None:
        super().__init__()
        if not 0 <= distance < 1 or thresholds < 1:
            raise ProblemError(
                f"distance = {distance}, thresholds = {thresholds}: expected from 0 to 1, and at least 1."
            )
        self.distance, self.ignore = distance, ignore
        self.thresholds = [(i + 1) / (thresholds + 1) for i in range(thresholds)]
        # Per threshold: pixels that were found, and those of them that are paired with a true one.
        self.add_state("counts", torch.zeros(thresholds, 2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("true", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add logits [B, 1, H, W] and edges of 0 or 1, [B, 1, H, W] or [B, H, W]."""
        target = like(output, target)
        levels = (output.detach().float().sigmoid() * 255).round().cpu().numpy()[:, 0]
        for level, truth in zip(levels, target.cpu().numpy()[:, 0], strict=True):
            valid = truth != self.ignore
            if not valid.any():
                continue
            y, x = np.flatnonzero(valid.any(1)), np.flatnonzero(valid.any(0))
            window = (slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1))
            level, valid = level[window], valid[window]
            edges = (truth[window] > 0.5) & valid
            reach = self.distance * float(np.hypot(*edges.shape))
            self.true += int(edges.sum())
            before: tuple[object, tuple[int, int]] | None = None
            for i, threshold in enumerate(self.thresholds):
                above = (level > 255 * threshold) & valid
                size = int(above.sum())
                if before is None or before[0] != size:  # a higher threshold that keeps as many keeps the same ones
                    found = thinned(above)
                    before = size, (int(found.sum()), matched(found, edges, distance=reach))
                self.counts[i] += torch.tensor(before[1], device=self.counts.device)

    def compute(self) -> Tensor:
        """The percentage."""
        found, both = self.counts.double().unbind(1)
        true = self.true.double()
        if not bool(true > 0):
            return torch.tensor(float("nan"))
        best: Tensor = (2 * both / (found + true)).max()
        return 100 * best
