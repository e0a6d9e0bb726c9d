"""Metrics of dense tasks as the field counts them: global confusion matrices, per-image or pooled errors.

Every metric is a `torchmetrics.Metric` (extra `metrics`): it accumulates over batches of any size, and over processes.
The field counts depth and normals in two ways, which differ: `pool="image"` computes a number per image and averages
those, medians included, as the paper's code does (it evaluates image by image); `pool="pixel"` takes all pixels of the
data set together. An image without a valid pixel counts for nothing.

Use them in a task as factories: `Metric("mIoU", partial(MeanIoU, 13), best="max")`.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from reconmtl.errors import ProblemError, missing_extra
from reconmtl.losses import as_labels, has_depth, has_normal, like

try:
    from torchmetrics import Metric
    from torchmetrics.classification import MulticlassConfusionMatrix
except ModuleNotFoundError:
    raise missing_extra("Metrics of dense tasks", "metrics") from None

Pool = Literal["image", "pixel"]


class _Confusion(MulticlassConfusionMatrix):
    """One confusion matrix of all pixels of the data set.

    Args:
        classes: Number of classes.
        ignore: The label of pixels that do not count; labels that are no class do not count either.
    """

    def __init__(self, classes: int, *, ignore: int = -1) -> None:
        super().__init__(num_classes=classes, ignore_index=ignore, validate_args=False)
        self.ignore = ignore

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add logits [B, classes, H, W] and labels [B, H, W]."""
        labels = as_labels(target)
        known = (labels >= 0) & (labels < self.num_classes)
        super().update(output.argmax(1), torch.where(known, labels, self.ignore))


class MeanIoU(_Confusion):
    """Intersection over union in percent, averaged over the classes that occur in labels or predictions.

    NaN where no pixel counts at all. `torchmetrics.JaccardIndex(task="multiclass")` is the same number as a fraction,
    unless `absent` is "zero".

    Args:
        classes: Number of classes.
        ignore: The label of pixels that do not count.
        absent: "skip" leaves classes out that occur nowhere, "zero" counts them as 0, as PASCAL's tools do.

    Reference: Shi et al., Recon, ICLR 2023, Table 3; one confusion matrix over the whole test set.
    """

    higher_is_better = True

    def __init__(self, classes: int, *, ignore: int = -1, absent: Literal["skip", "zero"] = "skip") -> None:
        super().__init__(classes, ignore=ignore)
        self.absent = absent

    def compute(self) -> Tensor:
        """The percentage."""
        matrix = self.confmat.double()
        union = matrix.sum(0) + matrix.sum(1) - matrix.diag()
        if not bool(union.any()):
            return torch.tensor(float("nan"))
        each = matrix.diag() / union.clamp(min=1)
        return 100 * (each.mean() if self.absent == "zero" else each[union > 0].mean())


class PixelAccuracy(_Confusion):
    """Percentage of the labelled pixels that are right; NaN where there is none.

    Args:
        classes: Number of classes.
        ignore: The label of pixels that do not count.

    Reference: Shi et al., Recon, ICLR 2023, Table 3.
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The percentage."""
        matrix = self.confmat.double()
        return 100 * matrix.diag().sum() / matrix.sum()


class _Average(Metric):
    """A sum and what it is divided by."""

    total: Tensor
    count: Tensor

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        if pool not in ("image", "pixel"):
            raise ProblemError(f"pool = {pool!r}: expected 'image' or 'pixel'.")
        self.pool = pool
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, errors: Tensor, valid: Tensor) -> None:
        """Add errors [B, ...] where they are valid, same shape."""
        errors, valid = errors.flatten(1).double(), valid.flatten(1)
        sums, counts = torch.where(valid, errors, 0.0).sum(1), valid.sum(1)
        if self.pool == "image":
            self.total += (sums / counts.clamp(min=1))[counts > 0].sum()
            self.count += (counts > 0).sum()
        else:
            self.total += sums.sum()
            self.count += counts.sum()

    def compute(self) -> Tensor:
        """The average; NaN where nothing was valid."""
        return self.total / self.count


class DepthError(_Average):
    """Absolute or relative error of depth, over the pixels with a depth.

    Args:
        kind: "abs": |p - g|, in the data's unit; "rel": |p - g| / |g|, a fraction.
        pool: "image" averages images, "pixel" pixels.

    Reference: Shi et al., Recon, ICLR 2023, Tables 3 and 5.
    """

    higher_is_better = False

    def __init__(self, kind: Literal["abs", "rel"] = "abs", *, pool: Pool = "image") -> None:
        super().__init__(pool)
        if kind not in ("abs", "rel"):
            raise ProblemError(f"kind = {kind!r}: expected 'abs' or 'rel'.")
        self.kind = kind

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add depths [B, 1, H, W] and [B, 1, H, W] or [B, H, W]."""
        target = like(output, target)
        error = (output.double() - target).abs()
        self.add(error / target.abs().double() if self.kind == "rel" else error, has_depth(target))


BINS = 180_000
"""Of the histogram for medians over all pixels: a thousandth of a degree each."""


class NormalError(_Average):
    """Angle between predicted and true normals, over the pixels that have one.

    Args:
        kind: "mean" or "median" in degrees, or a number t: percentage of pixels below t degrees.
        pool: "image" averages images (a median is then the mean of their medians), "pixel" takes all pixels together;
            the median over all pixels is exact to 0.001 degrees.
        paper: Leave out, as the published code does, also genuine normals whose components add up to 0.
        ignore: A value that marks, in all three components, a pixel without a normal, besides (0, 0, 0).

    Reference: Shi et al., Recon, ICLR 2023, Tables 4 and 5.
    """

    histogram: Tensor

    def __init__(
        self,
        kind: Literal["mean", "median"] | float = "mean",
        *,
        pool: Pool = "image",
        paper: bool = False,
        ignore: float | None = None,
    ) -> None:
        super().__init__(pool)
        if kind not in ("mean", "median") and (isinstance(kind, str) or not 0 < kind < 180):
            raise ProblemError(f"kind = {kind!r}: expected 'mean', 'median', or degrees between 0 and 180.")
        self.kind, self.paper, self.ignore = kind, paper, ignore
        if kind == "median" and pool == "pixel":
            self.add_state("histogram", torch.zeros(BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add normals [B, 3, H, W] of any length and true ones [B, 3, H, W]."""
        valid = has_normal(target, paper=self.paper)[:, 0]
        if self.ignore is not None:
            valid &= (target != self.ignore).any(1)
        dot = (_unit(output) * _unit(target)).sum(1).clamp(-1, 1)
        angle = dot.arccos().rad2deg()
        if self.kind != "median":
            self.add(angle if self.kind == "mean" else 100.0 * (angle < float(self.kind)), valid)
        elif self.pool == "image":
            for each, known in zip(angle.flatten(1), valid.flatten(1), strict=True):
                if bool(known.any()):
                    self.total += each[known].median()
                    self.count += 1
        else:
            places = (angle[valid] * (BINS / 180)).long().clamp(max=BINS - 1)
            self.histogram += torch.bincount(places, minlength=BINS)

    def compute(self) -> Tensor:
        """Degrees, or a percentage; NaN where nothing was valid."""
        if self.kind != "median" or self.pool == "image":
            return self.total / self.count
        cumulated = self.histogram.cumsum(0)
        if not int(cumulated[-1]):
            return torch.tensor(float("nan"))
        middle = (cumulated[-1] + 1) // 2  # the lower of two middle values, as torch.median takes
        return (torch.searchsorted(cumulated, middle).double() + 0.5) * 180 / BINS


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.double(), dim=1)


class Saliency(Metric):
    """How well salient pixels are found, in percent, at the best of 15 thresholds from 0.2 to 0.9.

    Args:
        kind: "mIoU": intersection over union per image, averaged over images; "maxF": the F measure of precision and
            recall, each averaged over images.
        ignore: The value of pixels that do not count.

    Reference: Maninis et al., ASTMT, CVPR 2019; Shi et al., Recon, ICLR 2023, Table 4.
    """

    higher_is_better = True
    sums: Tensor
    count: Tensor
    thresholds: Tensor

    def __init__(self, kind: Literal["mIoU", "maxF"] = "mIoU", *, ignore: float = 255.0) -> None:
        super().__init__()
        if kind not in ("mIoU", "maxF"):
            raise ProblemError(f"kind = {kind!r}: expected 'mIoU' or 'maxF'.")
        self.kind, self.ignore = kind, ignore
        self.register_buffer("thresholds", torch.linspace(0.2, 0.9, 15))
        self.add_state("sums", torch.zeros(3, 15, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add logits [B, 1, H, W] and 0 or 1, [B, 1, H, W] or [B, H, W]."""
        target = like(output, target).flatten(1)
        valid = target != self.ignore
        some = valid.any(1)
        true = ((target > 0.5) & valid)[some, None]
        found = output.float().sigmoid().flatten(1)[some, None] > self.thresholds.to(output.device)[:, None]
        found = found & valid[some, None]
        both = (found & true).sum(2).double()
        predicted, actual = found.sum(2), true.sum(2)
        union = predicted + actual - both
        iou = torch.where(union == 0, 1.0, both / union.clamp(min=1))  # nothing there and nothing found is right
        precision = torch.where(predicted == 0, (actual == 0).double(), both / predicted.clamp(min=1))
        recall = torch.where(actual == 0, 1.0, both / actual.clamp(min=1))
        self.sums += torch.stack([iou.sum(0), precision.sum(0), recall.sum(0)])
        self.count += some.sum()

    def compute(self) -> Tensor:
        """The percentage; NaN where no image was judged."""
        iou, precision, recall = self.sums / self.count
        each: Tensor = iou if self.kind == "mIoU" else 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        return 100 * each.max()
