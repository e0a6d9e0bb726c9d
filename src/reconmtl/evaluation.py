"""Judge a model on a whole data set, independent of the batch size; and the machine that it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reconmtl.errors import ProblemError
from reconmtl.problem import Data, Problem, call, select
from reconmtl.runs import Values

try:
    from lightning_fabric import Fabric
except ModuleNotFoundError:  # the large `lightning` package carries the same Fabric under another name
    from lightning.fabric import Fabric  # type: ignore[no-redef]  # the same class


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how a training runs.

    Args:
        accelerator: "auto", "cpu", "cuda" ...: as Lightning Fabric names them.
        precision: "32-true", "bf16-mixed" ...: as Lightning Fabric names them.
        max_batches: Only so many batches per epoch and evaluation: a smoke test, not a result.
    """

    accelerator: str = "auto"
    precision: Any = "32-true"
    max_batches: int | None = None

    def fabric(self) -> Fabric:
        """The Fabric of one process and one device."""
        return Fabric(accelerator=self.accelerator, devices=1, precision=self.precision)


def evaluate(problem: Problem, model: nn.Module, data: Data, *, machine: Machine | None = None) -> Values:
    """Judge a model on a whole data set.

    Args:
        problem: Whose metrics are computed.
        model: On the device where it is to run; its mode is restored afterwards.
        data: The samples.
        machine: Where the batches go and how many there are.

    Returns:
        Task -> metric -> value: per-sample values averaged over all samples that have the target, whatever the batch
        size; or what a stateful metric computes.

    Raises:
        ProblemError: If a metric does not return one value per sample, or no sample has a task's target.
    """
    machine = machine or Machine()
    fabric = machine.fabric()
    device = next(model.parameters()).device
    size = problem.recipe.batch_size
    batches = torch.arange(len(data)).split(size)[: machine.max_batches]
    sums = {(t.name, m.name): 0.0 for t in problem.tasks for m in t.metrics if not m.is_factory}
    states = {(t.name, m.name): m.fn() for t in problem.tasks for m in t.metrics if m.is_factory}
    for state in states.values():
        if hasattr(state, "to"):
            state.to(device)
    counts = dict.fromkeys((t.name for t in problem.tasks), 0)
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), fabric.autocast():
            for indices in batches:
                inputs, targets = problem.batch(data, indices, device)
                outputs = call(model, inputs)
                for task in problem.tasks:
                    if task.name not in targets:
                        continue
                    target, at = targets[task.name]
                    output = select(outputs[task.name], at)
                    n = len(indices) if at is None else len(at)
                    counts[task.name] += n
                    for metric in task.metrics:
                        key = (task.name, metric.name)
                        if key in states:
                            states[key].update(output, target)
                        else:
                            sums[key] += _per_sample_sum(metric.fn(output, target), n, *key)
    finally:
        for module, mode in training:
            module.training = mode
    empty = [t.name for t in problem.tasks if t.metrics and not counts[t.name]]
    if empty:
        raise ProblemError(f"No sample of the evaluated data has a target for {empty}; there is nothing to judge.")
    return {
        t.name: {
            m.name: float(states[t.name, m.name].compute()) if m.is_factory else sums[t.name, m.name] / counts[t.name]
            for m in t.metrics
        }
        for t in problem.tasks
    }


def _per_sample_sum(values: Tensor, n: int, task: str, metric: str) -> float:
    if not isinstance(values, Tensor) or tuple(values.shape) != (n,):
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ProblemError(
            f"Metric {metric!r} of task {task!r} should return one value per sample, shape [{n}], found {found}; "
            "a mean over a batch cannot be averaged right over a test set."
        )
    return float(values.double().sum())
