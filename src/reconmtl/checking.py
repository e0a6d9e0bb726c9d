"""Look before training: which layers a model has, which tasks share them, and whether the probe measures them right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reconmtl.batches import ALL, Data, sets_of
from reconmtl.comparing import grid
from reconmtl.errors import ProblemError
from reconmtl.forward import Batches, Forward, draw
from reconmtl.gram import check_losses, reach
from reconmtl.layers import find_layers
from reconmtl.probing import Probe
from reconmtl.problem import Problem
from reconmtl.randomness import seeded

LOOKED = 10_000
"""Samples that are looked at in search of a task's targets."""


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


def without_targets(problem: Problem) -> list[str]:
    """Tasks for which a data set has no target at all: nothing to train on, or nothing to judge.

    Samples are drawn at random until every task was seen, so that this is quick unless there is something to say. Of a
    large set `LOOKED` samples are looked at; what is rarer than that is left to the training.

    Returns:
        A sentence per data set.
    """
    told = []
    for what in ("train", "test", "val"):
        data = getattr(problem, what)
        for own, part in sets_of(data).items() if data is not None else ():
            tasks = problem.tasks if own == ALL else [problem.task(own)]
            names = [t.name for t in tasks if what == "train" or t.metrics]
            missing = _unseen(problem, part, own, names)
            if missing:
                which = what if own == ALL else f"{what}[{own!r}]"
                needed = "nothing to train on" if what == "train" else "nothing to judge by its metrics"
                told.append(
                    f"No sample of {which} has a target for {missing}: {needed}. Is that the key in the data set's "
                    f"items? `reconmtl check PROBLEM` lists everything."
                )
    return told


def _unseen(problem: Problem, data: Data, own: str, names: Sequence[str]) -> list[str]:
    """The tasks without a target."""
    missing = list(names)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    size = 1
    while missing and len(order):
        found = problem.batch(data, order[:size], torch.device("cpu"), own=own)[1]
        missing = [t for t in missing if t not in found]
        order, size = order[size:], min(2 * size, problem.recipe.batch_size)  # larger ones need not fit together
        if len(data) - len(order) >= LOOKED:
            return []
    return missing


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
