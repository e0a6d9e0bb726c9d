"""Micro-batches of one training step: the Gram matrix of the accumulated gradient, not the sum of Gram matrices.

The inner product of two sums has terms across micro-batches, so the tasks' gradients themselves have to be kept until
the last one: tasks x (shared parameters) floats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reconmtl.gram import Gradients
from reconmtl.passes import Layout, as_real


class Accumulation:
    """Sums of the tasks' gradients; a task, or a layer, may be missing from any micro-batch.

    Args:
        gradients: Of the model whose gradients are summed.
    """

    def __init__(self, gradients: Gradients) -> None:
        self._gradients = gradients
        self._tasks: list[str] = []
        self._sums: dict[tuple[str, str], Tensor] = {}  # (parameter, task) -> [elements]

    def add(self, layout: Layout, rows: Tensor, own: Sequence[Sequence[Tensor | None]]) -> None:
        """Add one micro-batch.

        Args:
            layout: What is shared in its graph.
            rows: Gradients of the shared parameters, [tasks, parameters]; copied.
            own: Per task the gradients of the parameters that it alone reaches.
        """
        self._tasks += [t for t in layout.tasks if t not in self._tasks]
        names = {id(p): n for n, p in self._gradients.parameters.items()}
        for i, task in enumerate(layout.tasks):
            for j in layout.reached[i]:
                self._add(layout.shared[j][0], task, rows[i, layout.at(j)], layout.dtype)
            for parameter, grad in zip(layout.exclusive[i], own[i], strict=False):
                # alone in this micro-batch; another may bring a second task
                dense = torch.zeros_like(parameter) if grad is None else grad
                self._add(names[id(parameter)], task, as_real(dense.to_dense()).flatten(), layout.dtype)

    def _add(self, name: str, task: str, grad: Tensor, dtype: torch.dtype) -> None:
        if (name, task) in self._sums:
            self._sums[name, task] += grad
        else:
            self._sums[name, task] = grad.to(dtype, copy=True)

    def gram(self) -> tuple[Layout, Tensor]:
        """What is shared in any of the micro-batches, and its Gram matrices [layers, tasks, tasks]."""
        return self._gradients.grams_of(self._tasks, self._sums)
