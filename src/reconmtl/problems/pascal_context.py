"""PASCAL-Context on MobileNetV2 with R-ASPP: the paper's experiment with four dense tasks of different kinds.

Semantic segmentation, human parts, saliency and normals, as the paper; `edge` is the field's fifth.

Reference: Maninis et al., ASTMT, CVPR 2019 (data); Bruggemann et al., BMTAS, BMVC 2020 (network, losses); Shi et al.,
Recon, ICLR 2023, B.4.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from reconmtl.errors import DataError, ProblemError, nearest
from reconmtl.losses import balanced_bce, cross_entropy, normal_l1
from reconmtl.networks import mobilenet_raspp
from reconmtl.networks.pretrained import load_pretrained
from reconmtl.problem import Metric, Problem, Recipe, Task
from reconmtl.problems.pascal_files import IGNORED, SOURCE, TASKS, PascalFolder
from reconmtl.settings import Preset

PRESETS = {
    "paper": Preset(
        options={"width": 32},
        epochs=130,
        batch_size=6,
        lr=1e-4,
        fractions=(70 / 130, 100 / 130),
        probe_epochs=40,
        severity=-0.02,
        k=85,
        seeds=(0, 1, 2),
        note="The paper's scale (its Table 4: n = 3). Its code for this data set is unpublished: losses, padding and "
        "augmentation are those of BMTAS, whose network it takes. It starts from ImageNet's weights: --pretrained "
        "FILE.",
    ),
}


def make(
    *,
    root: str | Path | None = None,
    width: int = 32,
    tasks: Sequence[str] = TASKS[:4],
    size: int = 512,
    pretrained: str | Path | None = None,
) -> Problem:
    """Build the problem.

    Args:
        root: The folder PASCAL_MT.
        width: Channels of the network's stem; the paper's is 32.
        tasks: Some of semantic, parts, saliency, normal and edge.
        size: Side that images are padded to [pixels].
        pretrained: File with ImageNet weights of torchvision's or timm's MobileNetV2.

    Raises:
        DataError: If the folder is missing or odd, or weights do not fit; all faults are listed.
        ProblemError: If a task is unknown.
        MissingExtraError: If torchmetrics, Pillow or SciPy is not installed.
    """
    chosen = make_tasks(tasks)
    if root is None:
        raise DataError(f"pascal_context needs its folder: --root DIR, with JPEGImages/ in it. Get {SOURCE}.")
    names = tuple(t.name for t in chosen)
    return Problem(
        model=partial(_network, width, names, pretrained),
        single=lambda task: _network(width, (task,), pretrained),
        tasks=chosen,
        train=PascalFolder(root, "train", tasks=names, size=size, augment=True),
        test=PascalFolder(root, "val", tasks=names, size=size),
        recipe=Recipe(epochs=130, batch_size=6, optimizer="adam", lr=1e-4, milestones=(70, 100)),
        name="pascal_context",
    )


def make_tasks(tasks: Sequence[str]) -> list[Task]:
    """The tasks with their losses and metrics.

    Raises:
        ProblemError: If a task is unknown.
        MissingExtraError: If torchmetrics is not installed.
    """
    from reconmtl import metrics as m
    from reconmtl.edge_metrics import EdgeF

    regions = partial(cross_entropy, ignore=IGNORED)

    def segmented(classes: int) -> list[Metric]:
        return [
            Metric("mIoU", partial(m.MeanIoU, classes, ignore=IGNORED, absent="zero"), best="max"),
            Metric("pix acc", partial(m.PixelAccuracy, classes, ignore=IGNORED), best="max"),
        ]

    angles: list[tuple[str, Any, Any]] = [("mean", "mean", "min"), *((f"{a:g}", a, "max") for a in (11.25, 22.5, 30.0))]
    known: dict[str, tuple[Any, list[Metric]]] = {
        "semantic": (regions, segmented(21)),
        "parts": (regions, segmented(7)),
        "saliency": (balanced_bce, [Metric("mIoU", partial(m.Saliency, "mIoU"), best="max")]),
        "normal": (
            normal_l1,
            [Metric(n, partial(m.NormalError, kind, pool="pixel"), best=best) for n, kind, best in angles],
        ),
        "edge": (partial(balanced_bce, positive=0.95), [Metric("odsF", partial(EdgeF, thresholds=19), best="max")]),
    }
    unknown = [t for t in tasks if t not in known]
    if unknown:
        raise ProblemError(" ".join(f"PASCAL-Context has no task {t!r}. {nearest(t, known)}" for t in unknown))
    return [Task(t, loss=known[t][0], metrics=known[t][1]) for t in tasks]


def _network(width: int, tasks: tuple[str, ...], pretrained: str | Path | None) -> nn.Module:
    model = mobilenet_raspp.pascal_context(width, tasks=tasks)
    if pretrained is not None:
        load_pretrained(model, pretrained)
    return model
