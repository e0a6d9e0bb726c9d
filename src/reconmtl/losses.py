"""Losses of dense tasks: pixels without a valid target are left out, and an image without any costs nothing.

Shapes: outputs [B, C, H, W]; targets [B, H, W] for labels, [B, C, H, W] or [B, H, W] for one number per pixel.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from reconmtl.errors import ProblemError


def cross_entropy(output: Tensor, target: Tensor, *, ignore: int = -1) -> Tensor:
    """Mean cross-entropy over the pixels whose label is not `ignore`, and 0 if there is none.

    Args:
        output: Logits, [B, classes, H, W].
        target: Labels, [B, H, W] or [B, 1, H, W], whole numbers of any dtype.
        ignore: The label of pixels that do not count.

    Reference: Shi et al., Recon, ICLR 2023, section B.2 (the published code's `semantic` loss).
    """
    labels = as_labels(target)
    count = (labels != ignore).sum()
    total = F.cross_entropy(output.float(), labels, ignore_index=ignore, reduction="sum")
    return total / count.clamp(min=1)


def depth_l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over the pixels with a depth, which is not 0; 0 if there is none.

    Args:
        output: [B, 1, H, W].
        target: [B, 1, H, W] or [B, H, W]; 0 where nothing was measured.

    Reference: Liu et al., MTAN, CVPR 2019, equation 8.
    """
    target = like(output, target)
    valid = has_depth(target)
    return _mean(((output.float() - target).abs() * valid).sum(), valid)


def normal_cosine(output: Tensor, target: Tensor, *, paper: bool = False) -> Tensor:
    """One minus the mean dot product with the true normals, over the pixels that have one; 0 if there is none.

    Args:
        output: [B, 3, H, W], of length one.
        target: [B, 3, H, W]; (0, 0, 0) where nothing was measured.
        paper: Leave out, as the published code does, also genuine normals whose components add up to 0.

    Reference: Liu et al., MTAN, CVPR 2019, equation 9.
    """
    valid = has_normal(target, paper=paper)
    dot = (output.float() * target).sum(1, keepdim=True) * valid
    return torch.where(valid.any(), 1 - _mean(dot.sum(), valid), 0 * dot.sum())


def normal_l1(output: Tensor, target: Tensor, *, ignore: float = 255.0) -> Tensor:
    """Mean absolute difference to the true normals per component, over the pixels that have one; 0 if there is none.

    Args:
        output: [B, 3, H, W], of length one.
        target: [B, 3, H, W]; `ignore` in all components, or zeros, where there is none.
        ignore: Value of the components where there is no normal.

    Reference: Maninis et al., ASTMT, CVPR 2019 (normals of PASCAL-Context).
    """
    valid = ((target != ignore).all(1, keepdim=True) & (target != 0).any(1, keepdim=True)).expand_as(target)
    return _mean(torch.where(valid, (output.float() - target).abs(), 0.0).sum(), valid)


def balanced_bce(output: Tensor, target: Tensor, *, positive: float | None = None, ignore: float = 255.0) -> Tensor:
    """Binary cross-entropy in which both classes weigh the same, or the positive one as given.

    Args:
        output: Logits, [B, 1, H, W].
        target: 0 or 1, [B, 1, H, W] or [B, H, W]; `ignore` where a pixel does not count.
        positive: Weight of positive pixels in [0, 1], the negative ones get the rest; None takes the share of negative
            pixels among those of the batch.
        ignore: The value of pixels that do not count.

    Raises:
        ProblemError: If `positive` is outside [0, 1].

    Reference: Xie and Tu, Holistically-Nested Edge Detection, ICCV 2015, equation 2; 0.95 for edges is that of ASTMT.
    """
    if positive is not None and not 0 <= positive <= 1:
        raise ProblemError(f"positive = {positive}: expected a weight from 0 to 1, or None to balance each batch.")
    target = like(output, target).float()
    valid = target != ignore
    true = (target > 0.5) & valid
    weight = (1 - _mean(true.sum(), valid)) if positive is None else torch.full_like(_mean(true.sum(), valid), positive)
    each = F.binary_cross_entropy_with_logits(output.float(), true.float(), reduction="none")
    return _mean((torch.where(true, weight, 1 - weight) * each * valid).sum(), valid)


def as_labels(target: Tensor) -> Tensor:
    """Labels as whole numbers, [B, H, W]."""
    return (target.squeeze(1) if target.ndim == 4 else target).long()


def like(output: Tensor, target: Tensor) -> Tensor:
    """A target of one number per pixel in the output's shape.

    Raises:
        ProblemError: If the shapes do not fit; without this, broadcasting would average the wrong pixels.
    """
    target = target.unsqueeze(1) if target.ndim == output.ndim - 1 else target
    if target.shape != output.shape:
        raise ProblemError(
            f"An output of shape {list(output.shape)} cannot be compared with a target of shape {list(target.shape)}."
        )
    return target


def has_depth(target: Tensor) -> Tensor:
    """Where a depth was measured, same shape."""
    return target != 0


def has_normal(target: Tensor, *, paper: bool = False) -> Tensor:
    """Where a normal was measured, [B, 1, H, W]; `paper`: where its components do not add up to 0."""
    return target.sum(1, keepdim=True) != 0 if paper else (target != 0).any(1, keepdim=True)


def _mean(total: Tensor, valid: Tensor) -> Tensor:
    return total / valid.sum().clamp(min=1)
