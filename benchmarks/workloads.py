"""Networks, inputs and heads that `probe.py` measures: what the paper trains, and what it does not."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reconmtl.networks import resnet


class Headed(nn.Module):
    """Shared features and one head per task."""

    def __init__(self, trunk: nn.Module, heads: list[nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict({f"t{i}": head for i, head in enumerate(heads)})

    def losses(self, features: Tensor) -> dict[str, Tensor]:
        """A scalar per task; what the targets are does not matter for the cost."""
        return {t: F.softplus(head(features)).mean() * (1 + i) for i, (t, head) in enumerate(self.heads.items())}


class Features(nn.Module):
    """The shared part of a ResNet18, flattened."""

    def __init__(self, net: nn.Module, *, pooled: bool) -> None:
        super().__init__()
        self.net, self.pooled = net, pooled
        del net.heads  # type: ignore[operator]  # heads of our own stand in its place

    def forward(self, x: Tensor) -> Tensor:
        x = self.net.features(x)  # type: ignore[operator]
        if not self.pooled:
            return x.flatten(1)
        out: Tensor = self.net.relu(self.net.fc(x.mean((2, 3))))  # type: ignore[operator]
        return out


def segnet(width: int) -> nn.Sequential:
    """Encoder and decoder of 3x3 convolutions, two per level, as SegNet has."""
    widths = [width, 2 * width, 4 * width, 8 * width, 8 * width]

    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]

    layers: list[nn.Module] = []
    for a, b in zip([3, *widths], widths, strict=False):
        layers += [*block(a, b), *block(b, b), *(block(b, b) if b >= 4 * width else []), nn.MaxPool2d(2)]
    for a, b in zip(widths[::-1], [*widths[-2::-1], width], strict=True):
        layers += [nn.Upsample(scale_factor=2), *block(a, a), *(block(a, a) if a >= 4 * width else []), *block(a, b)]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Transformer encoder of four layers; features are the mean over 64 tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out.mean(1)


@dataclass(frozen=True)
class Workload:
    """A network with its heads, its input, and what it is called in the table.

    Attributes:
        rounds: Of the rows that matter most; the others take part in half of them.
        target: Largest ratio of `auto` to T plain backward passes that was aimed at.
    """

    title: str
    tasks: int
    make: Callable[[], Headed]
    inputs: Callable[[], Tensor]
    rounds: int
    target: float | None


def workloads(*, quick: bool) -> dict[str, Workload]:
    """Every case by name; `quick` makes the networks small and the rounds few."""
    w, n = (8, 128) if quick else (64, 1024)
    size, batch, wide = (64, 32, 64) if quick else (128, 64, 256)

    def linear(width: int, tasks: int) -> list[nn.Module]:
        return [nn.Linear(width, 2) for _ in range(tasks)]

    def fashion() -> Headed:
        return Headed(Features(resnet.multifashion(width=w), pooled=True), linear(100, 2))

    def celeba(tasks: int) -> Workload:
        title = f"ResNet18 3x64x64, batch {batch // 2}"
        rounds = {2: 7, 8: 5, 16: 3, 40: 2}[tasks]
        return Workload(
            title,
            tasks,
            lambda: Headed(Features(resnet.celeba(width=w), pooled=False), linear(32 * w, tasks)),
            lambda: torch.rand(batch // 2, 3, 64, 64),
            rounds,
            None if tasks == 2 else 0.76,
        )

    def scene() -> Headed:
        heads: list[nn.Module] = [nn.Sequential(nn.Conv2d(w, w, 3, padding=1), nn.Conv2d(w, c, 1)) for c in (13, 1, 3)]
        return Headed(segnet(w), heads)

    def tokens(width: int, samples: int) -> Workload:
        return Workload(
            f"transformer encoder, width {width}, {samples} x 64 tokens",
            8,
            lambda: Headed(Encoder(width), linear(width, 8)),
            lambda: torch.randn(samples, 64, width),
            5,
            1.1,
        )

    def mlp() -> Headed:
        return Headed(nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(n, n), nn.ReLU()))), linear(n, 8))

    images = "ResNet18 1x36x36, batch"
    scenes = 2 if quick else 4
    out = {
        "a64": Workload(f"{images} {batch}", 2, fashion, lambda: torch.rand(batch, 1, 36, 36), 9, 0.82),
        "a256": Workload(f"{images} {4 * batch}", 2, fashion, lambda: torch.rand(4 * batch, 1, 36, 36), 5, 0.82),
        **{f"b{t}": celeba(t) for t in (2, 8, 16, 40)},
        "c": Workload(
            f"SegNet-like, {scenes} x {size}^2", 3, scene, lambda: torch.rand(scenes, 3, size, size), 5, 0.95
        ),
        "d256": tokens(wide, 4 if quick else 16),
        "d512": tokens(2 * wide, 2 if quick else 8),
        "e": Workload(f"MLP 6 x {n}, batch 64", 8, mlp, lambda: torch.randn(64, n), 15, 0.65),
    }
    if not quick:
        return out
    return {k: Workload(v.title, v.tasks, v.make, v.inputs, 2, v.target) for k, v in out.items()}
