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
    return products([reference_vectors(loss, list(layers.values())) for loss in losses.values()])


def reference_vectors(loss: Tensor, layers: Sequence[Sequence[nn.Parameter]]) -> list[Tensor]:
    """Take a loss's gradient once per layer: its parameters' after each other, as one float64 vector each."""
    out = []
    for parameters in layers:
        grads = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
        flat = [
            as_real(torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g)).double().flatten()
            for p, g in zip(parameters, grads, strict=True)
        ]
        out.append(torch.cat(flat))
    return out


def products(vectors: Sequence[Sequence[Tensor]]) -> Tensor:
    """Inner products [layers, tasks, tasks] of vectors given per task and layer."""
    tasks, layers = len(vectors), len(vectors[0])
    out = torch.empty(layers, tasks, tasks, dtype=torch.float64)
    for k in range(layers):
        for i in range(tasks):
            for j in range(tasks):
                out[k, i, j] = torch.dot(vectors[i][k], vectors[j][k])
    return out
