"""Dense tasks without a download: drawn rooms with exact labels, on any of the paper's dense networks.

Two tasks as on CityScapes (semantic, depth), three as on NYUv2 (and normal), or PASCAL-Context's five (semantic, parts,
saliency, normal, edge). Metrics take the extra `metrics`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reconmtl.errors import ProblemError, nearest
from reconmtl.losses import balanced_bce, cross_entropy, depth_l1, normal_cosine
from reconmtl.networks import mobilenet_raspp, mtan, segnet
from reconmtl.plan import check_tasks
from reconmtl.problem import Metric, Problem, Recipe, Task
from reconmtl.problems.rooms import CLASSES, PARTS, Room, draw
from reconmtl.settings import Preset

OUTPUTS = {"semantic": len(CLASSES), "depth": 1, "normal": 3, "parts": len(PARTS), "saliency": 1, "edge": 1}
"""Output channels of every task there is."""

NETWORKS = {"segnet": segnet.dense, "mtan": mtan.dense, "mobilenet": mobilenet_raspp.dense}

PRESETS = {
    "demo": Preset(
        options={"network": "segnet", "width": 8, "images": 320, "held_out": 96},
        epochs=10,
        batch_size=8,
        lr=2e-3,
        probe_epochs=2,
        severity=0.0,
        k=20,
        seeds=(0,),
        record=4,
        note="A demonstration on drawn rooms, one seed: the numbers say that all of it works, not who wins.",
    ),
    "larger": Preset(
        options={"network": "segnet", "width": 16, "images": 2000, "held_out": 500},
        epochs=20,
        batch_size=8,
        lr=1e-3,
        probe_epochs=5,
        severity=0.0,
        k=20,
        seeds=(0, 1, 2),
        record=4,
        note="Drawn rooms, hours on a CPU.",
    ),
}


class Scenes:
    """Drawn rooms as a data set; items are (image [3, H, W] in [0, 1], {task: target}).

    Targets: semantic [H, W] (-1 ignored), depth [1, H, W] metres (0 unknown), normal [3, H, W] (zeros unknown), parts
    [H, W] (255 ignored), saliency and edge [1, H, W].

    Args:
        n: Number of rooms.
        seed: Of the series; equal ones give equal rooms.
        start: Index of the first room, so that series of one seed need not overlap.
        size: Height and width [pixels].
        tasks: Whose targets are wanted.
        keep: Draw each room once and keep it (about 20 bytes per pixel).

    Raises:
        ProblemError: If a task is unknown or n is no positive whole number.
    """

    def __init__(
        self,
        n: int,
        *,
        seed: int = 0,
        start: int = 0,
        size: tuple[int, int] = (64, 96),
        tasks: Sequence[str] = tuple(OUTPUTS),
        keep: bool = True,
    ) -> None:
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ProblemError(f"n = {n!r}: expected a number of rooms, at least 1.")
        check_known(tasks)
        self.n, self.seed, self.start, self.size, self.tasks = n, seed, start, size, tuple(tasks)
        self.fingerprint = f"scenes-{n}-{seed}-{start}-{size[0]}x{size[1]}"
        self._rooms: list[Room | None] | None = [None] * n if keep else None

    def __len__(self) -> int:
        return self.n

    def room(self, index: int) -> Room:
        """The room at a position, as it was drawn.

        Raises:
            IndexError: If there is none.
        """
        if not -self.n <= index < self.n:
            raise IndexError(f"There are {self.n} rooms, no number {index}.")
        index %= self.n
        room = None if self._rooms is None else self._rooms[index]
        if room is None:
            room = draw(self.start + index, seed=self.seed, size=self.size)
            if self._rooms is not None:
                self._rooms[index] = room
        return room

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, targets = self.batch(torch.tensor([index]))
        return inputs[0], {task: values[0] for task, values in targets.items()}

    def batch(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Rooms at `indices` [n] at once: images [n, 3, H, W] and targets."""
        rooms = [self.room(int(i)) for i in indices]
        images = torch.from_numpy(np.stack([r.image for r in rooms])).float() / 255
        return images, {task: _target(task, rooms) for task in self.tasks}


def _target(task: str, rooms: list[Room]) -> Tensor:
    values = torch.from_numpy(np.stack([getattr(r, task) for r in rooms]))
    if task in ("semantic", "parts"):
        return values.long()
    values = values.float()
    return values if task == "normal" else values.unsqueeze(1)


def check_known(tasks: Sequence[str]) -> None:
    """Raise a ProblemError that names every task which drawn rooms do not have."""
    unknown = [t for t in check_tasks(tasks) if t not in OUTPUTS]
    if unknown:
        raise ProblemError(" ".join(f"Rooms have no task {t!r}. {nearest(t, OUTPUTS)}" for t in unknown))


def make_tasks(tasks: Sequence[str]) -> list[Task]:
    """The tasks with the paper's losses and metrics.

    Raises:
        ProblemError: If a task is unknown.
        MissingExtraError: If torchmetrics is not installed.
    """
    from reconmtl import metrics as m

    check_known(tasks)
    regions = partial(cross_entropy, ignore=255)
    angles = [("mean", "mean", "min"), ("median", "median", "min"), ("11.25", 11.25, "max"), ("22.5", 22.5, "max")]
    known: dict[str, tuple[Any, list[Metric]]] = {
        "semantic": (
            cross_entropy,
            [
                Metric("mIoU", partial(m.MeanIoU, len(CLASSES)), best="max"),
                Metric("pix acc", partial(m.PixelAccuracy, len(CLASSES)), best="max"),
            ],
        ),
        "depth": (
            depth_l1,
            [
                Metric("abs err", partial(m.DepthError, "abs"), best="min"),
                Metric("rel err", partial(m.DepthError, "rel"), best="min"),
            ],
        ),
        "normal": (
            normal_cosine,
            [Metric(n, partial(m.NormalError, kind), best=best) for n, kind, best in angles],  # type: ignore[arg-type]
        ),
        "parts": (regions, [Metric("mIoU", partial(m.MeanIoU, len(PARTS), ignore=255, absent="zero"), best="max")]),
        "saliency": (balanced_bce, [Metric("mIoU", partial(m.Saliency, "mIoU"), best="max")]),
        "edge": (
            partial(balanced_bce, positive=0.95),
            [Metric("maxF", partial(m.Saliency, "maxF"), best="max")],
        ),
    }
    return [Task(t, loss=known[t][0], metrics=known[t][1]) for t in tasks]


def make(
    *,
    network: str = "segnet",
    width: int = 8,
    images: int = 320,
    held_out: int = 96,
    size: tuple[int, int] = (64, 96),
    tasks: Sequence[str] = ("semantic", "depth", "normal"),
) -> Problem:
    """Build the problem.

    Args:
        network: "segnet", "mtan" or "mobilenet".
        width: Channels of its first stage (the paper's: 64, 64, 32).
        images: Number of rooms to train on.
        held_out: Number of rooms to test on.
        size: Height and width [pixels].
        tasks: Some of semantic, depth, normal, parts, saliency and edge.

    Raises:
        ProblemError: If the network or a task is unknown.
        MissingExtraError: If torchmetrics is not installed.
    """
    if network not in NETWORKS:
        raise ProblemError(f"Unknown network {network!r}. {nearest(network, NETWORKS)}")
    chosen = make_tasks(tasks)
    outputs = {task.name: OUTPUTS[task.name] for task in chosen}
    unit = [t for t in outputs if t == "normal"]

    def build(outputs: dict[str, int]) -> Any:  # noqa: ANN401 an nn.Module
        return NETWORKS[network](outputs, width=width, unit=[t for t in unit if t in outputs])

    return Problem(
        model=partial(build, outputs),
        single=lambda task: build({task: outputs[task]}),
        tasks=chosen,
        train=Scenes(images, start=0, size=size, tasks=tuple(outputs)),
        test=Scenes(held_out, start=10**6, size=size, tasks=tuple(outputs)),
        recipe=Recipe(epochs=10, batch_size=8, optimizer="adam", lr=2e-3),
        name="scenes",
    )
