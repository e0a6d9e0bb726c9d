"""Awkward networks: each does something that splitting layers could get wrong. Inputs are seeded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TASKS = ("a", "b", "c")


@dataclass(frozen=True)
class Net:
    """A network of the zoo.

    Attributes:
        make: Builds it; `tasks` names the outputs.
        inputs: Builds what it is called with: positional arguments.
        keywords: Keyword arguments of the call.
        skip: Layers that cannot be split alone, and why.
        trunk: It has no heads; its output is that of every task.
    """

    make: Callable[[Sequence[str]], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    keywords: Callable[[], dict[str, Any]] = dict
    skip: dict[str, str] = field(default_factory=dict)
    trunk: bool = False


def images(channels: int = 2, size: int = 8, batch: int = 3) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(7)),)


def vectors(width: int = 6, batch: int = 4) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(batch, width, generator=torch.Generator().manual_seed(7)),)


def linear_heads(width: int, tasks: Sequence[str], out: int = 2) -> nn.ModuleDict:
    return nn.ModuleDict({t: nn.Linear(width, out) for t in tasks})


class Headed(nn.Module):
    """A trunk and a linear head per task on its flattened features."""

    def __init__(self, trunk: nn.Module, width: int, tasks: Sequence[str]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = linear_heads(width, tasks)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        features = self.trunk(*args, **kwargs).flatten(1)
        return {t: h(features) for t, h in self.heads.items()}


class Block(nn.Module):
    """ResNet's basic block, with every in-place operation that it is usually written with."""

    def __init__(self, inputs: int, outputs: int, *, swap: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        same = inputs == outputs
        self.down = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs))
        self.swap = swap

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        identity = self.down(x)
        if self.swap:  # `shared += branched` where `out += identity` is `branched += shared`, and the other way round
            identity = identity + 0
            identity += out
            return cast(Tensor, self.relu(identity))
        out += identity
        return cast(Tensor, self.relu(out))


def residual(tasks: Sequence[str]) -> nn.Module:
    return Headed(nn.Sequential(Block(2, 4), Block(4, 4), nn.AdaptiveAvgPool2d(1)), 4, tasks)


def residual_swapped(tasks: Sequence[str]) -> nn.Module:
    return Headed(nn.Sequential(Block(2, 4, swap=True), Block(4, 4, swap=True), nn.AdaptiveAvgPool2d(1)), 4, tasks)


class Concat(nn.Module):
    """Dense connections: cat of shared and branched values, dropout, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)
        self.c3, self.up = nn.Conv2d(8, 4, 1, stride=2), nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.drop = nn.Dropout2d(0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x, F.relu(self.c1(x))], 1)
        z = torch.cat((y, F.relu_(self.c2(y))), dim=1)
        return torch.stack([self.drop(self.up(self.c3(z))), x], dim=0).mean(0)


ZOO: dict[str, Net] = {
    "mlp": Net(lambda t: Headed(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), 4, t), vectors()),
    "residual": Net(residual, images()),
    "residual_swapped": Net(residual_swapped, images()),
    "concat": Net(lambda t: Headed(Concat(), 128, t), images()),
}
"""Every network by name."""
