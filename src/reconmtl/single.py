"""Single-task training: one network per task, behind the call of a joint one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from reconmtl.problem import Problem


class SingleTasks(nn.Module):
    """One network per task behind one call: `model(x)` returns {task: output of the task's own network}."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401 whatever the networks take
        """Run every task's network on the same input."""
        return {task: network(*args, **kwargs)[task] for task, network in self.networks.items()}


def for_one(problem: Problem, name: str) -> Problem:
    """The problem of one task alone, with its own network where the user has given one."""
    single = problem.single
    model = problem.model if single is None else (lambda: single(name))
    return problem.restrict([name]).replace(model=model)
