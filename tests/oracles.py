"""Slow and obviously right."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
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


def jacobian(seed: int, tasks: int, kind: str) -> NDArray[np.float64]:
    """Gradients in general position, of very different lengths, linearly dependent, or all but equal."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((tasks, {"dependent": max(2, tasks // 2)}.get(kind, 2 * tasks + 3)))
    if kind == "uneven":
        rows *= 10 ** rng.uniform(-3, 3, (tasks, 1))
    if kind == "alike":
        rows = rows[:1] + 0.05 * rows
    return rows


KINDS = ("general", "uneven", "dependent", "alike")


def cagrad_objective(w: NDArray[np.float64], gram: NDArray[np.float64], c: float) -> float:
    """What CAGrad's weights [T] on the simplex minimise, from inner products [T, T]."""
    mean = gram.mean(1)
    return float(w @ mean + c * math.sqrt(mean.mean()) * math.sqrt(max(float(w @ gram @ w), 0.0)))
