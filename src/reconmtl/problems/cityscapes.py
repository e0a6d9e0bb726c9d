"""CityScapes with 7 classes and depth, in MTAN's .npy files: the paper's second dense experiment.

What the field calls depth here is a disparity: larger is nearer, 0 is unknown.

Reference: Cordts et al., CVPR 2016; Liu et al., MTAN, CVPR 2019; Shi et al., Recon, ICLR 2023, B.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from reconmtl.networks import mtan, segnet
from reconmtl.problem import Problem, Recipe, Task
from reconmtl.problems.dense_files import Kind, Layout, depth, make_problem, segmentation
from reconmtl.settings import Preset

LAYOUT = Layout(
    name="cityscapes",
    kinds={
        "image": Kind(("image",), 3),
        "semantic": Kind(("label_7", "label"), 0, classes=7),
        "depth": Kind(("depth",), 1, disparity=True),
    },
    counts={"train": 2975, "val": 500},
    source="the preprocessed CityScapes of https://github.com/lorenmt/mtan (128 x 256, 651 MB)",
)

NETWORKS = {"segnet": segnet.cityscapes, "mtan": mtan.cityscapes}

_PAPER = Preset(
    options={"network": "segnet", "width": 64, "paper": True},
    epochs=200,
    batch_size=8,
    lr=5e-5,
    fractions=(0.5,),
    probe_epochs=40,
    severity=0.0,
    k=39,
    seeds=(0, 1, 2),
    note="The paper's scale (its Table 3: n = 3). Section 5.2 says that conflicts are searched in a quarter of the "
    "epochs, B.2 in 40; K = 39 is B.2's, appendix C says 40.",
)

_CODE = replace(
    _PAPER,
    k=40,
    seeds=(0,),
    init="fresh",
    note="The published code's scale: K = 40, one seed, copies drawn anew (with PyTorch's law, not its own). It also "
    "mixes the running statistics of shared normalisations: add --norm-stats shared.",
)

PRESETS = {"paper": _PAPER, "code": _CODE}


def make(
    *,
    root: str | Path | None = None,
    network: str = "segnet",
    width: int = 64,
    tasks: Sequence[str] = ("semantic", "depth"),
    paper: bool = False,
) -> Problem:
    """Build the problem.

    Args:
        root: The folder with train/ and val/.
        network: "segnet" or "mtan".
        width: Channels of its first stage; the paper's is 64.
        tasks: semantic and depth, or one of them.
        paper: Augment as the published code does, see `reconmtl.problems.dense_files`.

    Raises:
        DataError: If the folder is missing or odd; all faults are listed.
        ProblemError: If the network or a task is unknown.
        MissingExtraError: If torchmetrics is not installed.
    """
    known: dict[str, Callable[[], Task]] = {"semantic": partial(segmentation, 7), "depth": depth}
    return make_problem(
        LAYOUT,
        root=root,
        network=network,
        networks=NETWORKS,
        width=width,
        tasks=tasks,
        known=known,
        recipe=Recipe(epochs=200, batch_size=8, optimizer="adam", lr=5e-5, milestones=(100,), gamma=0.5),
        paper=paper,
    )
