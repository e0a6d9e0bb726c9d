"""Small conflict logs with known content."""

import torch
from torch import Tensor

from reconmtl.conflicts import ConflictLog


def make_log(grams: Tensor, tasks: tuple[str, ...] = ("a", "b")) -> ConflictLog:
    """A log of layers l0, l1, ... with 10, 20, ... parameters."""
    names = [f"l{i}" for i in range(grams.shape[1])]
    return ConflictLog(
        grams,
        tasks=tasks,
        layers=names,
        sizes={n: 10 * (i + 1) for i, n in enumerate(names)},
        types=dict.fromkeys(names, "Linear"),
    )


def two_task_grams(cosines: list[list[float]]) -> Tensor:
    """Grams [steps, layers, 3] of unit gradients with the given cosines."""
    cos = torch.tensor(cosines)
    return torch.stack([torch.ones_like(cos), cos, torch.ones_like(cos)], dim=-1)
