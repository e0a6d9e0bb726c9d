"""Cross-stitch networks: a network per task, which exchange features after every stage.

Three forms are in use, and differ a lot:

- "shared" (the CAGrad repository's, which the paper compares with): per stage one number for each task's network, all 1
  at first; the weighted sum of the features is handed to every task, so that all go on with the same features.
- "matrix" (LibMTL's, and the original idea): per stage T x T numbers; task i goes on with row i's mixture.
- "channel" (Vandenhende's, and the original paper's better variant): T x T numbers per channel.

Reference: Misra et al., Cross-stitch Networks for Multi-task Learning, CVPR 2016.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from reconmtl.errors import ProblemError, nearest
from reconmtl.networks.pieces import Stages, features, take_apart, with_features

Kind = Literal["shared", "matrix", "channel"]


class Stitch(nn.Module):
    """Mixes what the tasks' networks computed in one stage.

    Args:
        tasks: How many.
        kind: See the top of the file.
        channels: Of the features, for "channel".
        own: First weight of a task's own features ("matrix", "channel"); the others share the rest to 1.
    """

    def __init__(self, tasks: int, kind: Kind, *, channels: int = 1, own: float = 0.9) -> None:
        super().__init__()
        if kind == "shared":
            start = torch.ones(tasks)
        else:
            start = torch.full((tasks, tasks), (1 - own) / max(tasks - 1, 1))
            start.fill_diagonal_(own if tasks > 1 else 1.0)
            start = start[..., None].repeat(1, 1, channels) if kind == "channel" else start
        self.weight = nn.Parameter(start)

    def forward(self, seen: list[Tensor]) -> list[Tensor]:
        """Features [B, C, ...] of every task -> the same, mixed."""
        if self.weight.ndim == 1:
            mixed = sum(w * x for w, x in zip(self.weight, seen, strict=True))
            assert isinstance(mixed, Tensor)
            return [mixed] * len(seen)
        trailing = (1,) * (seen[0].ndim - 2)
        rows = self.weight if self.weight.ndim == 3 else self.weight[..., None]
        stacked = torch.stack(seen)  # [T, B, C, ...]
        return [(row.reshape(len(seen), 1, -1, *trailing) * stacked).sum(0) for row in rows]


class CrossStitch(nn.Module):
    """A network per task with stitches between the stages.

    Args:
        make: A function (task) -> network of that task alone; it must be able to be taken apart.
        tasks: Names of the tasks.
        kind: "shared", "matrix" or "channel", see the top of the file.
        sample: What the network is called with, [B, ...]; needed for "channel", to count channels.

    Raises:
        ProblemError: If a network cannot be taken apart, their stages differ in number, or `kind` is unknown.

    Reference: Misra et al., CVPR 2016, equation 1; Shi et al., Recon, ICLR 2023, Tables 3 and 5.

    Example:
        >>> from reconmtl.networks import segnet
        >>> model = CrossStitch(lambda t: segnet.cityscapes(width=2, tasks=[t]), ["semantic", "depth"])
        >>> {task: tuple(out.shape) for task, out in model(torch.rand(2, 3, 32, 32)).items()}
        {'semantic': (2, 7, 32, 32), 'depth': (2, 1, 32, 32)}
    """

    def __init__(
        self,
        make: Callable[[str], nn.Module],
        tasks: Iterable[str],
        *,
        kind: Kind = "shared",
        sample: Tensor | None = None,
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ProblemError(f"Unknown kind of stitches {kind!r}. {nearest(kind, get_args(Kind))}")
        parts = {task: take_apart(make(task)) for task in tasks}
        lengths = {task: len(p.stages) for task, p in parts.items()}
        missing = [task for task, p in parts.items() if task not in p.heads]
        if len(set(lengths.values())) > 1 or missing or not parts:
            raise ProblemError(
                f"Networks to be stitched need as many stages each, found {lengths}, and a head for their task, "
                f"missing for {missing}."
            )
        first = next(iter(parts.values()))
        self.after = tuple(range(len(first.stages) - 1)) if first.exchange is None else first.exchange
        channels = [1] * len(first.stages)
        if kind == "channel":
            if sample is None:
                raise ProblemError("Stitches per channel need to know the channels: pass sample=, e.g. a batch.")
            channels = _channels(first.stages, sample)
        self.networks = nn.ModuleDict({task: Stages(*p.stages) for task, p in parts.items()})
        self.stitches = nn.ModuleList(Stitch(len(parts), kind, channels=channels[i]) for i in self.after)
        self.heads = nn.ModuleDict({task: p.heads[task] for task, p in parts.items()})

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Inputs of a task's network -> {task: output}."""
        states: list[Any] = [x for _ in self.networks]
        per_task = [list(network.children()) for network in self.networks.values()]
        for i, stage in enumerate(zip(*per_task, strict=True)):
            states = [module(state) for module, state in zip(stage, states, strict=True)]
            if i in self.after:
                mixed = self.stitches[self.after.index(i)]([features(s) for s in states])
                states = [with_features(s, m) for s, m in zip(states, mixed, strict=True)]
        return {task: self.heads[task](features(s)) for task, s in zip(self.networks, states, strict=True)}


def _channels(stages: list[nn.Module], sample: Tensor) -> list[int]:
    """Channels after each stage."""
    modes = [(m, m.training) for stage in stages for m in stage.modules()]
    found, state = [], sample
    try:
        for stage in stages:
            stage.eval()
        with torch.no_grad():
            for stage in stages:
                state = stage(state)
                found.append(int(features(state).shape[1]))
    finally:
        for module, mode in modes:
            module.training = mode
    return found
