"""Batches, losses and a small network, for tests that take steps with and without a probe."""

import torch
from torch import Tensor, nn


def step_losses(outputs: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """A squared distance per task, to another multiple of another input."""
    flat = x.flatten(1)
    return {
        t: ((o.reshape(len(o), -1).sum(1) - (i + 1) * flat[:, i]) ** 2).mean()
        for i, (t, o) in enumerate(outputs.items())
    }


def step_batches(steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs [16, 5]."""
    draw = torch.Generator().manual_seed(2)
    return [torch.randn(16, 5, generator=draw, dtype=dtype) for _ in range(steps)]


class Scales(nn.Module):
    """Nothing in it mixes samples, so that a batch may come in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5, sparse=True)
        self.first, self.norm, self.second = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.heads = nn.ModuleDict({t: nn.Linear(8, 1) for t in "abc"})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = x + self.embed((x[:, 0] * 3).abs().long() % 7)
        z = torch.tanh(self.second(torch.tanh(self.norm(self.first(z)))))
        return {t: head(z).squeeze(1) for t, head in self.heads.items()}
