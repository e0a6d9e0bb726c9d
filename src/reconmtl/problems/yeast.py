"""Yeast: fourteen functional classes of 2,417 genes from 103 measurements, real data inside the package river.

Reference: Elisseeff and Weston, A kernel method for multi-labelled classification, NeurIPS 2001.
"""

import csv
import gzip
import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from reconmtl.errors import DataError, ProblemError, missing_extra, nearest
from reconmtl.plan import check_tasks
from reconmtl.problem import Metric, Problem, Recipe, Task
from reconmtl.settings import Preset

LABELS = tuple(f"Class{i}" for i in range(1, 15))
FEATURES = tuple(f"Att{i}" for i in range(1, 104))
COUNT = 2417
TRAIN = 1500
"""Training genes: so many as in the usual split, whose members are not known to be the same."""

PRESETS = {
    "demo": Preset(
        options={"width": 64},
        epochs=30,
        batch_size=50,
        lr=1e-3,
        probe_epochs=8,
        severity=-0.05,
        k=2,
        seeds=(0, 1, 2),
        record=4,
        note="Real data, 1,500 + 917 genes in a fixed split of our own; a small MLP, whose settings are ours.",
    )
}


class MLP(nn.Module):
    """Three shared layers, a linear head per class.

    Args:
        width: Units per layer.
        tasks: Names of the classes.
    """

    def __init__(self, width: int, tasks: Sequence[str]) -> None:
        super().__init__()
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ProblemError(f"width = {width!r}: expected a number of units, at least 1.")
        self.layer1 = nn.Linear(len(FEATURES), width)
        self.layer2 = nn.Linear(width, width)
        self.layer3 = nn.Linear(width, width)
        self.heads = nn.ModuleDict({t: nn.Linear(width, 1) for t in check_tasks(tasks)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Measurements [n, 103] -> {class: logits [n]}."""
        x = self.layer3(self.layer2(self.layer1(x).relu()).relu()).relu()
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


class Yeast:
    """Some of the genes; items are (measurements [103], {class: 0.0 or 1.0}).

    Args:
        features: [n, 103] float32.
        labels: [n, 14], 0 or 1.
        tasks: Some of the classes.
        fingerprint: Names the data.
    """

    def __init__(
        self, features: NDArray[np.float32], labels: NDArray[np.float32], *, tasks: Sequence[str], fingerprint: str
    ) -> None:
        self.features, self.tasks, self.fingerprint = torch.from_numpy(features), tuple(tasks), fingerprint
        self.labels = torch.from_numpy(labels)[:, [LABELS.index(t) for t in tasks]]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.features[index], dict(zip(self.tasks, self.labels[index].unbind(), strict=True))

    def batch(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Genes at `indices` [n] at once: [n, 103], and a target [n] per class."""
        return self.features[indices], dict(zip(self.tasks, self.labels[indices].unbind(1), strict=True))


def read(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Read the package's file: measurements [2417, 103] and labels [2417, 14].

    Raises:
        DataError: If it is damaged.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        features = np.array([[row[n] for n in FEATURES] for row in rows], dtype=np.float32)
        labels = np.array([[row[n] for n in LABELS] for row in rows], dtype=np.float32)
    except (OSError, EOFError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise DataError(f"{path} is damaged: {error!r}. Install river again.") from None
    if features.shape != (COUNT, len(FEATURES)) or not np.isfinite(features).all() or set(np.unique(labels)) != {0, 1}:
        raise DataError(f"{path}: expected {COUNT:,} genes with 103 numbers and 14 labels 0 or 1. Install river again.")
    return features, labels


def error(output: Tensor, target: Tensor) -> Tensor:
    """Per gene, 100 where the logit's sign is wrong, else 0; the mean over the classes is the Hamming loss. [n]."""
    return 100.0 * ((output > 0) != (target > 0.5)).float()


def make(*, width: int = 64, tasks: Sequence[str] = LABELS) -> Problem:
    """Build the problem.

    Args:
        width: Units per layer.
        tasks: Some of Class1 to Class14.

    Raises:
        ProblemError: If a task is unknown.
        DataError: If the package's file is damaged.
        MissingExtraError: If river is not installed.
    """
    unknown = [t for t in tasks if t not in LABELS]
    if unknown:
        raise ProblemError(" ".join(f"Yeast has no class {t!r}. {nearest(t, LABELS)}" for t in unknown))
    found = importlib.util.find_spec("river")  # its import takes seconds, its file is all that is needed
    if found is None or found.origin is None:
        raise missing_extra("Yeast", "yeast")
    features, labels = read(Path(found.origin).parent / "datasets" / "yeast.csv.gz")
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(features))
    train, test = order[:TRAIN], order[TRAIN:]
    mean, std = features[train].mean(0), features[train].std(0)
    features = (features - mean) / std
    metrics = [Metric("error", error, best="min")]
    return Problem(
        model=partial(MLP, width, tuple(tasks)),
        single=lambda task: MLP(width, [task]),
        tasks=[Task(t, loss=binary_cross_entropy_with_logits, metrics=metrics) for t in tasks],
        train=Yeast(features[train], labels[train], tasks=tasks, fingerprint="yeast-train"),
        test=Yeast(features[test], labels[test], tasks=tasks, fingerprint="yeast-test"),
        recipe=Recipe(epochs=30, batch_size=50, optimizer="adam", lr=1e-3, milestones=(15, 23)),
        name="yeast",
    )
