"""Multi-Fashion+MNIST with ResNet18: the paper's first experiment.

Reference: Lin et al., Pareto Multi-Task Learning, NeurIPS 2019 (data); Shi et al., Recon, ICLR 2023, B.1 (the rest).
"""

from functools import partial
from pathlib import Path

from torch.nn.functional import cross_entropy

from reconmtl.errors import DataError, nearest
from reconmtl.measures import accuracy
from reconmtl.networks import resnet
from reconmtl.problem import Metric, Problem, Recipe, Task
from reconmtl.problems.multifashion_data import load_full, load_mini, load_published
from reconmtl.settings import Preset

TASKS = ("digit", "fashion")

PRESETS = {
    "demo": Preset(
        options={"width": 8, "data": "mini"},
        epochs=8,
        batch_size=64,
        lr=0.1,
        probe_epochs=2,
        severity=-0.1,
        k=25,
        seeds=(0, 1),
        record=2,
        note="A demonstration on a tenth of the data and about 1/60 of the parameters: far below full-scale numbers "
        "(the paper's Table 1: joint 97.42 / 88.82, w/ Recon 98.13 / 89.26).",
    ),
    "paper": Preset(
        options={"width": 64, "data": "full"},
        epochs=120,
        batch_size=256,
        lr=0.1,
        probe_epochs=30,
        severity=-0.1,
        k=25,
        seeds=(0, 1, 2),
        note="The paper's scale (its Table 1: n = 3).",
    ),
    "code": Preset(
        options={"width": 64, "data": "full"},
        epochs=120,
        batch_size=256,
        lr=0.1,
        probe_epochs=40,
        severity=-0.1,
        k=25,
        seeds=(0,),
        init="fresh",
        note="The published code's scale: 40 epochs of search, one seed, copies drawn anew (with PyTorch's law, not "
        "its own). It also mixes the running statistics of shared normalisations: add --norm-stats shared.",
    ),
}


def make(*, width: int = 64, data: str = "mini") -> Problem:
    """Build the problem.

    Args:
        width: Channels of the network's first stage; the paper's is 64.
        data: "mini" (12,000 + 2,000 images that ship with the package), "full" (120,000 + 20,000, built once with
            `reconmtl data multifashion`), or the path of the published `multi_fashion_and_mnist.pickle`.

    Raises:
        DataError: If the data is missing or damaged; the message says how to get it.
    """
    if data == "mini":
        train, test = load_mini()
    elif data == "full":
        train, test = load_full()
    elif Path(data).exists():
        train, test = load_published(data)
    else:
        raise DataError(
            f"data = {data!r}: expected mini, full, or a file that exists. {nearest(data, ('mini', 'full'))}"
        )
    return Problem(
        model=partial(resnet.multifashion, width=width),
        tasks=[Task(t, loss=cross_entropy, metrics=[Metric("acc", accuracy, best="max")]) for t in TASKS],
        train=train,
        test=test,
        recipe=Recipe(epochs=120, batch_size=256, lr=0.1, momentum=0.9, milestones=(60, 90)),
        name="multifashion",
    )
