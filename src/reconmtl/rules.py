"""How task gradients become one update: the paper's baselines and others, from a Gram matrix where that is enough.

A rule says what it takes. From a Gram matrix [T, T] or from the losses [T] it makes weights [T]; from the gradients
themselves, [T, parameters], it makes the update. Weights and updates are relative to the sum of the losses: where all
tasks agree, joint training's have weights 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from reconmtl.errors import RunError
from reconmtl.solvers import bargain, conflict_averse, min_norm

Takes = Literal["gram", "rows", "losses"]

COLUMNS = 2**20
"""Columns of the gradients that an elementwise rule handles at once."""


class Rule:
    """One way of making an update; subclass it for a rule with a state, or for one that sees losses.

    Attributes:
        takes: "gram": `weights` gets the Gram matrix; "losses": only the losses; "rows": `update` gets the gradients.
        weighs_losses: The weights are those of whole losses, so heads and per-task copies get them too.
        keeps_tasks: It has a state per task, so every step must have the same tasks.
    """

    takes: ClassVar[Takes] = "gram"
    weighs_losses: ClassVar[bool] = False
    keeps_tasks: ClassVar[bool] = False

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Weights [T] from inner products [T, T] (float64, on the CPU) and losses [T]."""
        raise NotImplementedError

    def update(self, rows: Tensor, losses: Tensor) -> Tensor:
        """The update [parameters] from gradients [T, parameters], which may be overwritten."""
        raise NotImplementedError

    def own(self, losses: Tensor) -> Tensor | None:
        """What the gradients of heads and copies are multiplied by, [T]; None leaves them."""
        del losses
        return None

    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer should train beside the network."""
        return []

    def again(self, losses: Tensor) -> None:
        """Told the losses [T] of the same batch after the step, if `looks_again`."""

    looks_again: ClassVar[bool] = False

    def end_epoch(self) -> None:
        """Called after every epoch."""

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept to go on: tensors, numbers, strings, and containers of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        if state:
            raise RunError(f"{type(self).__name__} has no state, the file has {sorted(state)}.")


class FromGram(Rule):
    """A function of the Gram matrix.

    Args:
        function: [T, T] -> weights [T].
        times_tasks: Its weights are relative to the mean of the losses.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], *, times_tasks: bool = False) -> None:
        self.function, self.times_tasks = function, times_tasks

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """See `Rule`."""
        found = self.function(gram)
        return found * len(losses) if self.times_tasks else found


def joint() -> Rule:
    """The sum of the losses."""
    return FromGram(lambda gram: gram.new_ones(len(gram)))


def mgda() -> Rule:
    """The shortest vector of the convex hull of the gradients, times the number of tasks.

    Reference: Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018.
    """
    return FromGram(lambda gram: torch.from_numpy(min_norm(gram.numpy())), times_tasks=True)


def cagrad(*, c: float = 0.2, rescale: bool = True) -> Rule:
    """The best direction for the worst task near the mean gradient, times tasks / (1 + c^2) as the paper's code does.

    Args:
        c: Radius of the ball around the mean gradient, relative to its length; not negative.
        rescale: Divide by 1 + c^2.

    Reference: Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021.
    """
    if not 0 <= c < math.inf:
        raise ValueError(f"c = {c}: expected a number that is not negative")
    factor = 1 / (1 + c * c) if rescale else 1.0
    return FromGram(lambda gram: factor * torch.from_numpy(conflict_averse(gram.numpy(), c)), times_tasks=True)


def pcgrad() -> Rule:
    """The sum of gradients, each made to no longer conflict with the others, one after another in random order.

    Reference: Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, algorithm 1.
    """
    return FromGram(_project)


def _project(gram: Tensor) -> Tensor:
    g, count = gram.numpy(), len(gram)
    out = np.zeros(count)
    for i in range(count):
        own = np.zeros(count)
        own[i] = 1.0
        for j in torch.randperm(count).tolist() if count > 2 else range(count):
            inner = float(g[j] @ own)
            if j != i and inner < 0:
                own[j] -= inner / g[j, j]
        out += own
    return torch.from_numpy(out)


class GradDrop(Rule):
    """Per parameter, keep the gradients of one sign, drawn by how much of the total it has.

    Args:
        leak: Share of the dropped gradients that is kept, in [0, 1].

    Reference: Chen et al., Just Pick a Sign, NeurIPS 2020, on gradients of parameters as in the paper's code.
    """

    takes = "rows"

    def __init__(self, *, leak: float = 0.0) -> None:
        if not 0 <= leak <= 1:
            raise ValueError(f"leak = {leak}: expected a number from 0 to 1")
        self.leak = leak

    def update(self, rows: Tensor, losses: Tensor) -> Tensor:
        """See `Rule`."""
        del losses
        out = torch.empty_like(rows[0])
        for start in range(0, rows.shape[1], COLUMNS):
            part = rows[:, start : start + COLUMNS]
            summed, absolute = part.sum(0), part.abs().sum(0)
            positive = (absolute + summed) / 2
            drawn = torch.rand(part.shape[1], dtype=torch.float32).to(part)
            kept = torch.where(drawn * absolute < positive, positive, summed - positive)
            out[start : start + COLUMNS] = kept if not self.leak else torch.lerp(kept, summed, self.leak)
        return out


def nash_mtl(*, max_norm: float = 1.0) -> Rule:
    """The bargaining solution for gradients whose Gram matrix has norm one, no longer than `max_norm`.

    Args:
        max_norm: Longest update; 0 sets no bound.

    Reference: Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022.
    """
    if not 0 <= max_norm < math.inf:
        raise ValueError(f"max_norm = {max_norm}: expected a number that is not negative")

    def weights(gram: Tensor) -> Tensor:
        norm = float(torch.linalg.matrix_norm(gram))
        alpha = torch.from_numpy(bargain(gram.numpy() / norm if norm > 0 else gram.numpy()))
        length = math.sqrt(max(float(alpha @ gram @ alpha), 0.0))
        return alpha * (max_norm / length) if 0 < max_norm < length else alpha

    return FromGram(weights)


def fairgrad(*, alpha: float = 1.0) -> Rule:
    """The alpha-fair update.

    Args:
        alpha: 1 is proportional fairness, larger values help the slowest task more; 0 is the mean.

    Reference: Ban and Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024.
    """
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha = {alpha}: expected a number that is not negative")
    if alpha == 0:
        return FromGram(lambda gram: gram.new_full((len(gram),), 1 / len(gram)))
    return FromGram(lambda gram: torch.from_numpy(bargain(gram.numpy(), 1 / alpha)))


class GradNorm(Rule):
    """Learns weights of the losses, of sum T, that bring the tasks' gradients to comparable lengths.

    A task's length is to be the mean length, times its loss relative to its first one, relative to the mean of that,
    to the power of alpha. Lengths are those of the gradients of all shared parameters.

    Args:
        alpha: How strongly tasks that learn slowly are pulled along.
        lr: Learning rate of the weights.

    Reference: Chen et al., GradNorm, ICML 2018, algorithm 1.
    """

    weighs_losses = True
    keeps_tasks = True

    def __init__(self, *, alpha: float = 1.5, lr: float = 0.025) -> None:
        self.alpha, self.lr = alpha, lr
        self.now: Tensor | None = None
        self.first: Tensor | None = None

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """See `Rule`."""
        if self.now is None or self.first is None:
            self.now, self.first = torch.ones_like(losses), losses.clone()
        used = self.now
        norms = gram.diagonal().clamp(min=0).sqrt()
        rate = losses / self.first.clamp(min=1e-30)
        rate = (rate / rate.mean().clamp(min=1e-30)) ** self.alpha
        target = (used * norms).mean() * rate
        new = (used - self.lr * torch.sign(used * norms - target) * norms).clamp(min=1e-6)
        self.now = new * len(losses) / new.sum()
        return used

    def state_dict(self) -> dict[str, Any]:
        """See `Rule`."""
        return {"now": self.now, "first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Rule`."""
        self.now, self.first = state["now"], state["first"]


class DualBalancing(Rule):
    """DB-MTL: gradients of the losses' logarithms, averaged over steps, all brought to the length of the longest.

    Heads and copies get the gradient of their loss's logarithm, which is part of the method. Takes a further
    T x parameters of memory for the averages, which are part of the checkpoint; none with beta=0.

    Args:
        beta: Of the average over steps, in [0, 1).
        sigma: In step k the average counts beta / k^sigma.

    Reference: Lin et al., Dual-Balancing for Multi-Task Learning, 2023, algorithm 1.
    """

    takes = "rows"
    keeps_tasks = True

    def __init__(self, *, beta: float = 0.9, sigma: float = 0.5) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta = {beta}: expected a number from 0 to below 1")
        self.beta, self.sigma, self.step = beta, sigma, 0
        self.average: Tensor | None = None

    def own(self, losses: Tensor) -> Tensor:
        """See `Rule`."""
        return 1 / (losses + 1e-8)

    def update(self, rows: Tensor, losses: Tensor) -> Tensor:
        """See `Rule`."""
        rows.mul_(self.own(losses).to(rows)[:, None])
        self.step += 1
        share = self.beta / self.step**self.sigma
        if self.beta:
            if self.average is None:
                self.average = torch.zeros_like(rows)
            if self.average.shape != rows.shape:
                raise RunError("DB-MTL averages gradients over steps, and the shared parameters have changed.")
            self.average = self.average.to(rows).mul_(share).add_(rows, alpha=1 - share)
            rows = self.average
        norms = rows.norm(dim=1)
        scales = torch.where(norms > 0, norms.max() / norms.clamp(min=1e-30), 0.0)
        return scales @ rows

    def state_dict(self) -> dict[str, Any]:
        """See `Rule`."""
        return {"step": self.step, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Rule`."""
        self.step, self.average = int(state["step"]), state["average"]
