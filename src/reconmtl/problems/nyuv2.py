"""NYUv2 with 13 classes, depth and surface normals, in MTAN's .npy files.

Reference: Silberman et al., ECCV 2012; Liu et al., MTAN, CVPR 2019; Shi et al., Recon, ICLR 2023, B.3.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from reconmtl.networks import mtan, segnet
from reconmtl.problem import Problem, Recipe, Task
from reconmtl.problems.dense_files import Kind, Layout, depth, make_problem, normals, segmentation
from reconmtl.settings import Preset

LAYOUT = Layout(
    name="nyuv2",
    kinds={
        "image": Kind(("image",), 3),
        "semantic": Kind(("label",), 0, classes=13),
        "depth": Kind(("depth",), 1),
        "normal": Kind(("normal",), 3),
    },
    counts={"train": 795, "val": 654},
    source="the preprocessed NYUv2 of https://github.com/lorenmt/mtan (288 x 384, 9 GB)",
)

NETWORKS = {"mtan": mtan.nyuv2, "segnet": segnet.nyuv2}

_PAPER = Preset(
    options={"network": "mtan", "width": 64, "paper": True},
    epochs=200,
    batch_size=2,
    lr=1e-4,
    fractions=(0.5,),
    probe_epochs=40,
    severity=-0.02,
    k=22,
    seeds=(0, 1, 2),
    note="The paper's scale (its Table 5: n = 3), K = 22 of B.3; only K = 13 gives the printed size of 169.59 MB.",
)

_CODE = replace(
    _PAPER,
    probe_epochs=50,
    k=15,
    seeds=(0,),
    init="fresh",
    note="The published code's scale: 50 epochs of search, K = 15, one seed, copies drawn anew (with PyTorch's law, "
    "not its own). It also mixes the running statistics of shared normalisations: add --norm-stats shared.",
)

PRESETS = {"paper": _PAPER, "code": _CODE}


def make(
    *,
    root: str | Path | None = None,
    network: str = "mtan",
    width: int = 64,
    tasks: Sequence[str] = ("semantic", "depth", "normal"),
    paper: bool = False,
) -> Problem:
    """Build the problem.

    Args:
        root: The folder with train/ and val/.
        network: "mtan" or "segnet".
        width: Channels of its first stage; the paper's is 64.
        tasks: Some of semantic, depth and normal.
        paper: Augment, and leave out normals, as the published code does; see `reconmtl.problems.dense_files` and
            `reconmtl.losses.normal_cosine`.

    Raises:
        DataError: If the folder is missing or odd; all faults are listed.
        ProblemError: If the network or a task is unknown.
        MissingExtraError: If torchmetrics is not installed.
    """
    known: dict[str, Callable[[], Task]] = {
        "semantic": partial(segmentation, 13),
        "depth": depth,
        "normal": partial(normals, paper=paper),
    }
    return make_problem(
        LAYOUT,
        root=root,
        network=network,
        networks=NETWORKS,
        width=width,
        tasks=tasks,
        known=known,
        recipe=Recipe(epochs=200, batch_size=2, optimizer="adam", lr=1e-4, milestones=(100,), gamma=0.5),
        paper=paper,
    )
