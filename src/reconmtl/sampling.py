"""Which samples make which batch: drawn from the seed alone, so that every method sees the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from reconmtl.batches import ALL
from reconmtl.errors import RunError

Indices = dict[str, Tensor]
"""Per data set (`ALL`, or the task it belongs to), positions of a batch's samples [n]."""


class Sampler:
    """Draws the batches of one epoch after the other.

    Args:
        sizes: Samples of each data set; its key is `ALL`, or the task it belongs to. An epoch is the longest one, the
            shorter ones are drawn again and again.
        batch_size: Samples per step, data set and process.
        drop_last: Leave out the last, smaller batch.
        seed: Of the order; a task's own data come in the same order whatever the other tasks are.
        most: Steps per epoch, at most.
        rank: Number of this process.
        world: Processes; together they take `world * batch_size` samples per step.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        batch_size: int,
        drop_last: bool,
        seed: int,
        most: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sizes = dict(sizes)
        self.rank, self.world, self.together = rank, world, batch_size * world
        self.longest = longest = max(self.sizes.values())
        self.steps = longest // self.together
        self.length = self.steps * self.together
        if not drop_last and longest % self.together:
            self.steps, self.length = self.steps + 1, longest
        if most is not None and self.steps > most:
            self.steps, self.length = most, min(self.length, most * self.together)
        self._generators = {k: torch.Generator().manual_seed(_seed_of(seed, k)) for k in self.sizes}
        self._start = self._states()
        self.step = 0

    def epoch(self) -> Iterator[Indices]:
        """The batches of this epoch that are left; afterwards the next one begins."""
        self._set(self._start)
        orders = {k: self._order(k).split(self.together) for k in self.sizes}
        while self.step < self.steps:
            batch = {k: self._mine(order[self.step]) for k, order in orders.items()}
            self.step += 1
            yield batch
        self._start, self.step = self._states(), 0

    def _order(self, key: str) -> Tensor:
        rounds = max(1, -(-self.length // self.sizes[key]))
        drawn = [torch.randperm(self.sizes[key], generator=self._generators[key]) for _ in range(rounds)]
        return torch.cat(drawn)[: self.length]

    def _mine(self, indices: Tensor) -> Tensor:
        return indices.tensor_split(self.world)[self.rank]

    def _states(self) -> dict[str, Tensor]:
        return {k: g.get_state() for k, g in self._generators.items()}

    def _set(self, states: Mapping[str, Tensor]) -> None:
        for key, state in states.items():
            self._generators[key].set_state(state)

    def state(self) -> dict[str, Any]:
        """The position: the epoch's beginning and how many steps of it are done."""
        return {"start": dict(self._start), "step": self.step}

    def restore(self, state: Any) -> None:  # noqa: ANN401 from a file
        """Go on from a position.

        Raises:
            RunError: If it is damaged, or of other data.
        """
        try:
            start, step = state["start"], state["step"]
            if set(start) != set(self.sizes) or type(step) is not int or not 0 <= step <= self.steps:
                raise ValueError("it belongs to other data")
            self._set(start)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise RunError(f"its place among the batches cannot be found again ({error})") from None
        self._start, self.step = start, step


def _seed_of(seed: int, key: str) -> int:
    return seed if key == ALL else int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:4], "big")
