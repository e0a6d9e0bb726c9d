"""The slow and obvious way to the same numbers, with which a probe can be checked on any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from reconmtl.passes import as_real


def reference_grams(losses: Mapping[str, Tensor], layers: Mapping[str, Sequence[nn.Parameter]]) -> Tensor:
    """Compute Gram matrices slowly and obviously: one backward pass per task and layer, one dot product per pair.

    Args:
        losses: Scalar loss per task; their graph is kept.
        layers: Layer name -> its parameters.

    Returns:
        Inner products [layers, tasks, tasks], float64; gradients that do not exist count as zero.
    """
    vectors: list[list[Tensor]] = []
    for loss in losses.values():
        per_layer = []
        for parameters in layers.values():
            grads = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
            flat = [
                as_real(torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g)).double().flatten()
                for p, g in zip(parameters, grads, strict=True)
            ]
            per_layer.append(torch.cat(flat))
        vectors.append(per_layer)
    out = torch.empty(len(layers), len(losses), len(losses), dtype=torch.float64)
    for k in range(len(layers)):
        for i in range(len(losses)):
            for j in range(len(losses)):
                out[k, i, j] = torch.dot(vectors[i][k], vectors[j][k])
    return out
