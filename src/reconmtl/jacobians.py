"""Gram matrices from gradients that somebody else has taken: the `.jac` fields of TorchJD."""

from __future__ import annotations

import torch
from torch import Tensor

from reconmtl.engines import full_precision
from reconmtl.errors import ProbeError
from reconmtl.passes import Layout, as_real, mark_absent


def jac_grams(layout: Layout) -> Tensor:
    """Compute each layer's Gram matrix from the `.jac` fields in which TorchJD keeps the tasks' gradients.

    Args:
        layout: What is shared.

    Returns:
        Inner products [layers, tasks, tasks]; NaN for tasks that do not reach the layer.

    Raises:
        ProbeError: If a shared parameter has no `.jac`, or one of another shape; every such parameter is named.
    """
    n = len(layout.tasks)
    jacs = [getattr(p, "jac", None) for _, p in layout.shared]
    missing = [name for (name, _), jac in zip(layout.shared, jacs, strict=True) if jac is None]
    if missing:
        shown = ", ".join(repr(m) for m in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ProbeError(
            f"{len(missing)} of {len(jacs)} shared parameters have no `.jac` field: {shown}. Call this after "
            "`torchjd.autojac.backward` or `mtl_backward`, and before `jac_to_grad`, which takes it away."
        )
    wrong = [
        f"{name!r} has {list(jac.shape)}, expected {[n, *p.shape]}"
        for (name, p), jac in zip(layout.shared, jacs, strict=True)
        if jac is not None and jac.shape != (n, *p.shape)
    ]
    if wrong:
        raise ProbeError(f"`.jac` fields should have one row for each of the {n} losses: {'; '.join(wrong[:5])}.")
    gram = torch.zeros((len(layout.segments), n, n), dtype=layout.dtype, device=layout.device)
    with full_precision(layout.device), torch.no_grad():
        for k, jac in zip(layout.owner, jacs, strict=True):
            assert jac is not None
            rows = as_real(jac.detach()).flatten(1).to(layout.dtype)
            gram[k].addmm_(rows, rows.T)
    mark_absent(layout, gram)
    return gram
