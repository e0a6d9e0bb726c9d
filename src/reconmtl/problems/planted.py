"""A problem with a known answer: of six shared layers, two are made to fight.

Each layer reads its own block of the input and predicts its own number. On the blocks of the friendly layers both tasks
want the same function; on the fighting ones the second task wants the opposite of what the first one wants. No shared
weight can serve both there, so these two layers must rank first, and splitting them must bring joint training to the
level of single-task training. The friendly layers' gradients are equal for both tasks, noise included: otherwise their
cosines would be those of sampling noise as soon as they are learned.
"""

import torch
from torch import Tensor, nn

from reconmtl.problem import Metric, Problem, Recipe, Task
from reconmtl.settings import Preset

LAYERS = 6
FIGHTING = (1, 4)
BLOCK = 8
TASKS = ("plus", "minus")

PRESETS = {
    "default": Preset(
        epochs=16,
        batch_size=32,
        lr=0.02,
        probe_epochs=2,
        severity=-0.1,
        k=2,
        seeds=(0, 1),
        note="A made-up problem: only the order of the rows means anything.",
    )
}


class Blocks(nn.Module):
    """Six linear layers side by side, each on its own block of the input; per task, a bias for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(BLOCK, 1, bias=False) for _ in range(LAYERS))
        self.heads = nn.ModuleDict({task: Bias() for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map [N, layers * block] to {task: [N, layers]}."""
        parts = [block(part) for block, part in zip(self.blocks, x.split(BLOCK, dim=1), strict=True)]
        together = torch.cat(parts, dim=1)
        return {task: head(together) for task, head in self.heads.items()}


class Bias(nn.Module):
    """Adds a number to each column."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, layers] to [N, layers]."""
        return x + self.bias


class PlantedData(torch.utils.data.Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Gaussian inputs, linear targets with a little noise.

    Args:
        n: Number of samples.
        seed: Of the samples; the functions to be learned are always the same.
    """

    def __init__(self, n: int, *, seed: int) -> None:
        wanted = torch.randn(LAYERS, BLOCK, generator=torch.Generator().manual_seed(12345))
        draw = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(n, LAYERS * BLOCK, generator=draw)
        parts = (self.inputs.view(n, LAYERS, BLOCK) * wanted).sum(2)
        signs = torch.ones(LAYERS)
        signs[list(FIGHTING)] = -1
        noise = 0.1 * torch.randn(n, LAYERS, generator=draw)
        self.targets = {"plus": parts + noise, "minus": parts * signs + noise}
        self.fingerprint = f"planted-{n}-{seed}"

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inputs[index], {t: y[index] for t, y in self.targets.items()}

    def batch(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples at `indices` [n] at once: inputs [n, layers * block] and targets [n, layers]."""
        return self.inputs[indices], {t: y[indices] for t, y in self.targets.items()}


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error per sample, the mean over the layers' numbers, [N]."""
    return ((output - target) ** 2).mean(1)


def summed_error(output: Tensor, target: Tensor) -> Tensor:
    """The loss: squared errors summed over the layers' numbers, so that each learns at its own pace, scalar."""
    return LAYERS * squared_error(output, target).mean()


def make() -> Problem:
    """Build the problem; see the top of this file for its answer."""
    preset = PRESETS["default"]
    metrics = [Metric("mse", squared_error, best="min")]
    return Problem(
        model=Blocks,
        tasks=[Task(t, loss=summed_error, metrics=metrics) for t in TASKS],
        train=PlantedData(512, seed=1),
        test=PlantedData(256, seed=2),
        recipe=Recipe(epochs=preset.epochs, batch_size=preset.batch_size, lr=preset.lr, milestones=(8, 12)),
        name="planted",
    )
