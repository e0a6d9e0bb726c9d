"""When two numbers count as the same: outputs, gradients and buffers of a split model and of ordinary networks."""

import torch
from torch import Tensor

from reconmtl.errors import SplitError
from reconmtl.splitting.branched import WAYS_OUT
from reconmtl.splitting.structure import Value, tensors

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference that passes, relative to the largest value of the tensor (of the task, for gradients)."""


HINT = (
    "one reason may be a value that is changed in place under one name (`shared += branched`) and used under another; "
    f"another, what modules pass on outside of their calls. {WAYS_OUT}"
)


def same_outputs(mine: Value, expected: Value, where: str, *, exact: bool = True) -> float:
    """Compare what two networks returned.

    Args:
        mine: Output of the split model.
        expected: Output of a network of its own.
        where: How the message begins.
        exact: Compare integers and booleans too, which rounding may change.

    Returns:
        The largest relative difference.

    Raises:
        SplitError: If it is beyond tolerance.
    """
    a, b = list(tensors(mine)), list(tensors(expected))
    if len(a) != len(b):
        raise SplitError(f"{where}: the split model returned {len(a)} tensors, a network of its own {len(b)}.")
    worst = 0.0
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        at = f"{where}: output" + (f" {i}" if len(a) > 1 else "")
        if x.shape != y.shape or x.dtype != y.dtype:
            raise SplitError(
                f"{at} is {tuple(x.shape)} {x.dtype}, a network of its own gives {tuple(y.shape)} {y.dtype}."
            )
        if not exact and not (x.is_floating_point() or x.is_complex()):
            continue
        worst = max(worst, close(x.detach(), y.detach(), at, HINT))
    return worst


def close(x: Tensor, y: Tensor, at: str, hint: str, scale: float | None = None) -> float:
    """The largest difference of two tensors, relative to `scale` (the largest value of the second).

    Raises:
        SplitError: If it is beyond tolerance.
    """
    if x.numel() == 0:
        return 0.0
    if not (x.is_floating_point() or x.is_complex()):
        if not torch.equal(x, y):
            raise SplitError(f"{at} differs from that of a network of its own; {hint}")
        return 0.0
    if torch.equal(x, y):
        return 0.0
    x, y = torch.nan_to_num(x), torch.nan_to_num(y)
    top = scale if scale is not None else max(float(y.abs().max()), 1e-30)
    difference = float((x - y).abs().max()) / top
    if difference > TOLERANCE.get(x.dtype, 1e-4):
        raise SplitError(f"{at} differs by {difference:.2g} (relative) from that of a network of its own; {hint}")
    return difference
