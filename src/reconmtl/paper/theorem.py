"""Theorem 4.1 on a given network and batch: does its premise hold, and is one step with the split better than without?

The theorem weighs the tasks with weights that sum to 1. Published code, and joint training here, take the plain sum:
each weight is 1. Then the first-order difference is the learning rate times the sum of all inner products of different
tasks' gradients at the split layers, and a split helps in the first step only if that is negative.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from reconmtl.errors import PlanError, nearest
from reconmtl.layers import find_layers

Losses = Callable[[Any], Mapping[str, Tensor]]
"""Outputs of the model -> {task: loss}."""

ROUNDING = 1e-6
"""Relative difference of two lengths that single precision cannot tell from none."""


@dataclass(frozen=True)
class Premise:
    """The premise at one layer for one ordered pair of tasks: cos(i, j) * |g_i| < |g_j|.

    Attributes:
        layer: Its name.
        tasks: (i, j).
        left: cos(i, j) * |g_i|.
        right: |g_j|.
    """

    layer: str
    tasks: tuple[str, str]
    left: float
    right: float

    @property
    def holds(self) -> bool:
        """Whether the strict inequality holds, by more than rounding: equal gradients are at its border."""
        return self.right - self.left > ROUNDING * self.right


@dataclass(frozen=True)
class Step:
    """Sums of the tasks' losses after one step of gradient descent.

    Attributes:
        lr: Learning rate.
        split: With one copy of the chosen layers per task.
        shared: Without.
    """

    lr: float
    split: float
    shared: float

    @property
    def helps(self) -> bool:
        """The theorem's conclusion."""
        return self.split < self.shared


@dataclass(frozen=True)
class Examined:
    """What was found.

    Attributes:
        premises: At every chosen layer, for every ordered pair of tasks that reach it.
        steps: One per learning rate.
        slope: First-order difference of the losses, split minus shared, per unit of learning rate: negative if a small
            enough step is better with the split.
    """

    premises: tuple[Premise, ...]
    steps: tuple[Step, ...]
    slope: float

    @property
    def holds(self) -> bool:
        """Whether the whole premise holds."""
        return all(p.holds for p in self.premises)


def examine(
    model: nn.Module,
    losses: Losses,
    inputs: Tensor,
    *,
    layers: Sequence[str],
    rates: Sequence[float],
    weights: Mapping[str, float] | None = None,
) -> Examined:
    """Evaluate the theorem's premise, and one step with and without the split.

    Args:
        model: Any module; it is left as it is.
        losses: Outputs -> {task: scalar loss}.
        inputs: What the model is called with.
        layers: Names of the layers that would be split.
        rates: Learning rates.
        weights: Task -> weight of its gradient in shared parameters; None for equal ones that sum to 1, as the theorem
            has them. Unit weights are joint training's.

    Returns:
        The premise per layer and pair, and the losses per learning rate.

    Raises:
        PlanError: If a layer does not exist, or weights are not those of the tasks.

    Reference: Shi et al., Recon, ICLR 2023, Theorem 4.1 and Eqs. 3-7.
    """
    model = copy.deepcopy(model)
    known = {layer.name: layer for layer in find_layers(model)}
    missing = [n for n in layers if n not in known]
    if missing or not layers:
        told = f"There is no layer {missing[0]!r}. {nearest(missing[0], known)}" if missing else "Name a layer."
        raise PlanError(told)
    start = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}

    def at(values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        # functional_call lets BatchNorm write into what it is given: fresh buffers for every call
        state = {**values, **{n: b.clone() for n, b in buffers.items()}}
        with torch.random.fork_rng():  # the same dropout in every call
            return losses(torch.func.functional_call(model, state, (inputs,)))

    found = at(start)
    tasks = tuple(found)
    w = dict.fromkeys(tasks, 1 / len(tasks)) if weights is None else dict(weights)
    if set(w) != set(tasks):
        raise PlanError(f"weights = {w}: expected one for each of {list(tasks)}.")
    names = [n for n, p in start.items() if p.requires_grad]
    gradients: dict[str, dict[str, Tensor]] = {}
    for task in tasks:
        got = torch.autograd.grad(found[task], [start[n] for n in names], retain_graph=True, allow_unused=True)
        gradients[task] = {n: g for n, g in zip(names, got, strict=True) if g is not None}
    shared = {n for n in names if sum(n in gradients[t] for t in tasks) > 1}
    owned = _parameters_of(model, layers)
    chosen = {n for layer in layers for n in owned[layer]} & shared

    premises = []
    slope = 0.0
    for layer in layers:
        inside = [n for n in owned[layer] if n in shared]
        there = [t for t in tasks if any(n in gradients[t] for n in inside)]
        vectors = {
            t: torch.cat([gradients[t].get(n, torch.zeros_like(start[n])).double().flatten() for n in inside])
            for t in there
        }
        for i, j in permutations(there, 2):
            length = float(vectors[j].norm())
            left = float(vectors[i] @ vectors[j]) / length if length else 0.0
            premises.append(Premise(layer, (i, j), left, length))
        for i in there:
            step = sum(w[j] * vectors[j] for j in there)
            slope += float(vectors[i] @ (step - vectors[i]))

    def moved(lr: float, task: str, *, split: bool) -> dict[str, Tensor]:
        """The parameters that a task's loss sees after one step."""
        out = {}
        for n, p in start.items():
            total = torch.zeros_like(p)
            if n in shared and not (split and n in chosen):
                for t in tasks:
                    if n in gradients[t]:
                        total = total + w[t] * gradients[t][n]
            else:
                total = gradients[task].get(n, total)
            out[n] = p.detach() - lr * total
        return out

    steps = []
    for lr in rates:
        with torch.no_grad():
            sums = [sum(float(at(moved(lr, t, split=split))[t].double()) for t in tasks) for split in (True, False)]
        steps.append(Step(lr, sums[0], sums[1]))
    return Examined(tuple(premises), tuple(steps), slope)


def _parameters_of(model: nn.Module, layers: Sequence[str]) -> dict[str, list[str]]:
    """Layer -> full names of the parameters that its module owns directly."""
    found = {}
    for name in layers:
        prefix = "" if name == "(root)" else name
        module = model.get_submodule(prefix)
        found[name] = [f"{prefix}.{n}" if prefix else n for n, _ in module.named_parameters(recurse=False)]
    return found
