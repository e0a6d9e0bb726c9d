"""Run a network on the batches of one step: data that all tasks share once, a task's own data through its view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reconmtl.batches import ALL, Sets, Targets, call, sets_of
from reconmtl.compiled import Compiled
from reconmtl.problem import Problem
from reconmtl.randomness import random_states, set_random_states
from reconmtl.splitting import view
from reconmtl.splitting.storage import record

Batches = dict[str, tuple[Any, Targets]]
"""Per data set (`ALL`, or the task it belongs to): inputs and targets."""


class Forward:
    """A network of a problem, ready for batches of any of its data sets.

    Args:
        problem: Whose losses are computed.
        model: The network, split or not, on the device where it stays.
        backend: Of torch.compile, under which the network runs in training; None runs it as it is.
    """

    def __init__(self, problem: Problem, model: nn.Module, backend: str | None = None) -> None:
        self.problem = problem
        self.model = model
        self.backend = backend
        self._views: dict[str, nn.Module] = {}
        self._compiled: dict[tuple[nn.Module, str], Compiled] = {}

    def __call__(self, own: str, inputs: Any, targets: Targets | None = None) -> Any:  # noqa: ANN401 as the model
        """Outputs {task: output}; for a task's own data only that task's is sure to be there.

        Args:
            own: The data set.
            inputs: Of a batch.
            targets: Of it. A compiled graph gives every task's layers a gradient, zeros where a task has no loss; plain
                networks give them none. So a batch without any target of a task runs as it is.
        """
        network = self._network(own)
        wanted = self.problem.task_names if own == ALL else (own,)
        if self.backend is None or not network.training or not torch.is_grad_enabled():
            return call(network, inputs)
        if targets is not None and any(t not in targets for t in wanted):
            return call(network, inputs)
        key = network, own
        if key not in self._compiled:
            self._compiled[key] = Compiled(network, wanted, self.backend)
        return self._compiled[key](inputs)

    def _network(self, own: str) -> nn.Module:
        if own == ALL or record(self.model) is None:  # unsplit: all tasks are computed, and one of them is taken
            return self.model
        if own not in self._views:
            self._views[own] = view(self.model, own)
        if self._views[own].training != self.model.training:
            self._views[own].train(self.model.training)
        return self._views[own]

    def losses(self, batches: Batches) -> dict[str, Tensor]:
        """Weighted loss of each task that the batches have targets for, in the order of the tasks."""
        return self._losses(batches, None)

    def with_differences(self, batches: Batches) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses, and from the same forward pass what sets the halves of the batch apart.

        See `Problem.differences`; they draw no random numbers that the training would draw.
        """
        apart: dict[str, Tensor] = {}
        losses = self._losses(batches, apart)
        return losses, {t: apart[t] for t in losses if t in apart}

    def _losses(self, batches: Batches, apart: dict[str, Tensor] | None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for own, (inputs, targets) in batches.items():
            outputs = self(own, inputs, targets)
            found |= self.problem.losses(outputs, targets)
            if apart is not None:
                before = random_states()
                apart |= self.problem.differences(outputs, targets)
                set_random_states(before)
        return {t: found[t] for t in self.problem.task_names if t in found}


def draw(problem: Problem, sets: Sets, indices: Mapping[str, Tensor], device: torch.device) -> Batches:
    """Fetch the batches of one step; a set without any index is left out."""
    known = sets_of(sets)
    return {own: problem.batch(known[own], at, device, own=own) for own, at in indices.items() if len(at)}
