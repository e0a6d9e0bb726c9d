"""Look before training: which layers a model has, which tasks share them, and whether the probe measures them right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reconmtl.batches import ALL
from reconmtl.comparing import grid
from reconmtl.errors import ProblemError
from reconmtl.forward import Batches, Forward, draw
from reconmtl.gram import check_losses, reach
from reconmtl.layers import find_layers
from reconmtl.probing import Probe
from reconmtl.problem import Problem
from reconmtl.randomness import seeded


def layer_table(model: nn.Module, losses: Mapping[str, Tensor] | None = None) -> str:
    """List a model's layers: name, type, parameters and, given losses, which tasks reach them.

    Args:
        model: Any module, split or not.
        losses: Scalar loss per task, with their graph (which is kept).

    Returns:
        A Markdown table in network order; `print` it.

    Example:
        >>> print(layer_table(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
        | layer | type   | parameters |
        |-------|-------:|-----------:|
        | 0     | Linear |          9 |
        | 2     | Linear |          4 |
    """
    layers = find_layers(model)
    header = ["layer", "type", "parameters"]
    rows = [[layer.name, layer.type, f"{layer.numel:,}"] for layer in layers]
    if losses is not None:
        check_losses(losses)
        masks = reach(list(losses.values()), opaque=True)
        parameters = dict(model.named_parameters())
        for layer, row in zip(layers, rows, strict=True):
            mask = 0
            for name in layer.parameters:
                mask |= masks.get(id(parameters[name]), 0)
            tasks = [t for i, t in enumerate(losses) if mask >> i & 1]
            row.append("all" if len(tasks) == len(losses) else ", ".join(tasks) or "none")
        header.append("reached by")
    return grid(header, rows)


def covering(problem: Problem) -> Tensor:
    """Find a few training samples, at least two, that have a target for every task between them.

    Returns:
        Positions in the training set that the tasks share, [n].

    Raises:
        ProblemError: If no training sample has a target for some task.
    """
    assert not isinstance(problem.train, Mapping)
    chosen: list[int] = []
    seen: set[str] = set()
    order = torch.randperm(len(problem.train), generator=torch.Generator().manual_seed(0))
    for i in order.tolist():
        found = set(problem.batch(problem.train, torch.tensor([i]), torch.device("cpu"))[1])
        if len(chosen) < 2 or not found <= seen:
            chosen.append(i)
            seen |= found
        if len(chosen) >= 2 and len(seen) == len(problem.tasks):
            return torch.tensor(chosen)
    missing = [t for t in problem.task_names if t not in seen]
    if missing:
        raise ProblemError(f"No training sample has a target for {missing}; is that the key in the data set's items?")
    return torch.tensor(chosen)


def first_batches(problem: Problem, size: int = 0) -> Batches:
    """A few training samples, at least `size` per data set where there are so many, with targets for every task.

    Raises:
        ProblemError: If no training sample has a target for some task.
    """
    device = torch.device("cpu")
    if isinstance(problem.train, Mapping):
        return draw(
            problem,
            problem.train,
            {t: torch.arange(min(max(size, 2), len(d))) for t, d in problem.train.items()},
            device,
        )
    indices = torch.cat([torch.arange(min(size, len(problem.train))), covering(problem)]).unique()
    return draw(problem, problem.train, {ALL: indices}, device)


def check_probe(problem: Problem, *, batch: tuple[Any, Mapping[str, Tensor]] | None = None) -> float:
    """Compare the probe with a slow oracle on a fresh network of a problem; nothing is trained.

    Args:
        problem: Whose network, losses and data are used.
        batch: Inputs and {task: targets}; None takes the first batch of the training set, and samples of other tasks.

    Returns:
        The largest difference of a cosine, over layers that carry more than rounding noise.

    Raises:
        ProbeError: If the probe is wrong on this network; the layer is named.
    """
    with seeded(0):
        model = problem.model()
        if batch is None:
            batches = first_batches(problem, problem.recipe.batch_size)
        else:
            batches = {ALL: (batch[0], {t: (y, None) for t, y in batch[1].items()})}
        losses = Forward(problem, model).losses(batches)
        return Probe(model, shared=problem.shared, group=False).check(losses)
