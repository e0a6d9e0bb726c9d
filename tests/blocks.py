"""A network as a chain of blocks, for what searches over blocks."""

from torch import Tensor, nn

TASKS = ("a", "b")


class Chain(nn.Module):
    """Three blocks and a head per task."""

    blocks = ("first", "second", "third")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6))
        self.third = nn.Sequential(nn.ReLU(), nn.Linear(6, 6))
        self.heads = nn.ModuleDict({t: nn.Linear(6, 1) for t in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.third(self.second(self.first(x)))
        return {t: head(y) for t, head in self.heads.items()}
