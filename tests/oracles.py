"""Slow and obviously right."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def task_gradients(losses: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> list[list[Tensor]]:
    """Per task and parameter, the gradient of that task's loss alone (zeros where it does not reach)."""
    out = []
    for loss in losses.values():
        grads = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
        out.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)])
    return out


def gram(losses: Mapping[str, Tensor], layers: Sequence[Sequence[nn.Parameter]]) -> Tensor:
    """Inner products [layers, tasks, tasks], one Python loop per index and one multiplication per element."""
    out = torch.zeros(len(layers), len(losses), len(losses), dtype=torch.float64)
    for k, parameters in enumerate(layers):
        gradients = task_gradients(losses, parameters)
        for i, first in enumerate(gradients):
            for j, second in enumerate(gradients):
                out[k, i, j] = sum(_inner(a, b) for a, b in zip(first, second, strict=True))
    return out


def _inner(a: Tensor, b: Tensor) -> float:
    if a.is_complex():
        return _inner(a.real, b.real) + _inner(a.imag, b.imag)
    return float((a.to_dense().double() * b.to_dense().double()).sum())


def count_conflicts(cosines: list[list[list[float]]], severity: float) -> list[int]:
    """Conflicts per layer of cosines[step][layer][pair], counted one by one."""
    counts = [0] * len(cosines[0])
    for step in cosines:
        for layer, pairs in enumerate(step):
            for cosine in pairs:
                if cosine < severity:
                    counts[layer] += 1
    return counts
