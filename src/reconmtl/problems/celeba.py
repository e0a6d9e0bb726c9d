"""CelebA with ResNet18: the paper's experiment with forty tasks.

Reference: Liu et al., ICCV 2015 (data); Sener and Koltun, NeurIPS 2018 (as multi-task learning); Shi et al., Recon,
ICLR 2023, B.5.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn
from torch.nn.functional import cross_entropy

from reconmtl.errors import DataError, nearest
from reconmtl.measures import classification_error
from reconmtl.networks import resnet
from reconmtl.networks.pretrained import load_pretrained
from reconmtl.networks.resnet import CELEBA_ATTRIBUTES
from reconmtl.problem import Metric, Problem, Recipe, Task
from reconmtl.problems.celeba_files import SOURCE, generated, load_split
from reconmtl.settings import Preset

PRESETS = {
    "demo": Preset(
        options={"width": 8},
        epochs=3,
        batch_size=64,
        lr=1e-3,
        fractions=(0.6,),
        probe_epochs=1,
        severity=-0.05,
        k=25,
        seeds=(0,),
        record=8,
        note="Made-up images of CelebA's shape and forty tasks, one seed: only that it runs, and what it costs, means "
        "anything.",
    ),
    "paper": Preset(
        options={"data": "files", "width": 64},
        epochs=5,
        batch_size=256,
        lr=5e-5,
        fractions=(0.6,),
        probe_epochs=2,
        severity=-0.05,
        k=25,
        seeds=(0, 1, 2),
        record=8,
        note="The paper's scale (its Table 2: n = 3); the batch size is ours, the paper states none. The paper starts "
        "from ImageNet's weights: --pretrained FILE.",
    ),
}


def make(
    *,
    data: str = "auto",
    root: str | Path | None = None,
    width: int = 64,
    tasks: Sequence[str] = CELEBA_ATTRIBUTES,
    pretrained: str | Path | None = None,
) -> Problem:
    """Build the problem.

    Args:
        data: "generated" (made-up images, 2,000 + 500), "files", or "auto": files if their folder is given.
        root: CelebA's folder, official, torchvision's or Kaggle's.
        width: Channels of the network's first stage; the paper's is 64.
        tasks: Some of the 40 attributes.
        pretrained: File with ImageNet weights of torchvision's or timm's ResNet18.

    Raises:
        DataError: If the data is missing or odd, or weights do not fit; all faults are listed.
    """
    kinds = ("generated", "files", "auto")
    if data not in kinds:
        raise DataError(f"data = {data!r}: expected one of {kinds}. {nearest(data, kinds)}")
    if data == "files" and root is None:
        raise DataError(f"data = files needs CelebA's folder: --root DIR. Get {SOURCE}.")
    if data == "generated" and root is not None:
        raise DataError(f"data = generated takes no folder, {root} was given: leave out one of them.")
    train, test = (
        (generated(2000, seed=0, tasks=tasks), generated(500, seed=1, tasks=tasks))
        if root is None
        else (load_split(root, split, tasks=tasks) for split in ("train", "test"))
    )
    metrics = [Metric("error", classification_error, best="min")]
    return Problem(
        model=partial(_network, width, tuple(tasks), pretrained),
        tasks=[Task(t, loss=cross_entropy, metrics=metrics) for t in tasks],
        single=lambda task: _network(width, (task,), pretrained),
        train=train,
        test=test,
        recipe=Recipe(epochs=5, batch_size=256, optimizer="adam", lr=5e-5, milestones=(3,), gamma=0.5, drop_last=False),
        name="celeba",
    )


def _network(width: int, tasks: tuple[str, ...], pretrained: str | Path | None) -> nn.Module:
    model = resnet.celeba(width, tasks=tasks)
    if pretrained is not None:
        load_pretrained(model, pretrained)
    return model
