"""The processes that `torchrun` started to train one network together: who writes, and what they agree on.

Each takes its share of every batch; the first one (rank 0) writes. All of them see the same folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from reconmtl.errors import ReconError

T = TypeVar("T")


def started() -> int:
    """How many processes `torchrun` (or a cluster) has started for this program; 1 if it runs alone."""
    try:
        return max(1, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError:
        return 1


@dataclass(frozen=True)
class Ranks:
    """One process of those that train together; alone by default. All methods are called by all of them, in one order.

    Attributes:
        rank: Number of this process.
        size: How many there are.
        device: Where numbers travel.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up numbers over the processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def first(self, function: Callable[[], T]) -> T:
        """Let the first process do something, and the others wait for its outcome.

        Raises:
            ReconError: What it raised, on every process.
        """
        if self.size == 1:
            return function()
        told: list[Any] = [None]
        if self.rank == 0:
            try:
                told = [("done", function())]
            except ReconError as error:
                told = [("failed", (type(error), str(error)))]
            except BaseException as error:
                dist.broadcast_object_list([("failed", (ReconError, f"{type(error).__name__}: {error}"))], src=0)
                raise
        dist.broadcast_object_list(told, src=0)
        outcome, value = told[0]
        if outcome == "failed":
            kind, text = value
            raise kind(text)
        found: T = value
        return found

    def gather(self, value: T) -> list[T]:
        """Everyone's value, by rank, on the first process; on the others only their own."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, found, dst=0)
        return [value] if found is None else found

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give everyone the first process's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)
