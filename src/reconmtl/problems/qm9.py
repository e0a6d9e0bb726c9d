"""QM9: eleven properties of molecules, real data that an installable package carries; nothing to download by hand.

As in the field's multi-task benchmark: targets standardised over the training set, mean squared errors, judged by the
mean absolute error of each target in its own unit. Unlike there, atoms are described by their elements and distances
alone (the benchmark's aromaticity, hybridisation and bond types take RDKit), and the last model counts, not the best.

Reference: Ramakrishnan et al., Scientific Data 2014; Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import mse_loss

from reconmtl.errors import ProblemError, nearest
from reconmtl.networks import nnconv
from reconmtl.problem import Metric, Problem, Recipe, Task
from reconmtl.problems.qm9_data import COUNT, QM9, TARGETS, load
from reconmtl.settings import Preset

HELD_OUT = 10_000
"""Test molecules, and as many for validation, as in the benchmark."""

PRESETS = {
    "demo": Preset(
        options={"width": 16, "molecules": 1000, "held_out": 500},
        epochs=6,
        batch_size=64,
        lr=2e-3,
        fractions=(0.75,),
        probe_epochs=2,
        severity=-0.05,
        k=3,
        seeds=(0,),
        record=8,
        note="A demonstration on 1,000 of QM9's molecules, one seed: the numbers say that it works, not who wins.",
    ),
    "full": Preset(
        options={"width": 64, "molecules": COUNT - 2 * HELD_OUT, "held_out": HELD_OUT},
        epochs=300,
        batch_size=120,
        lr=1e-3,
        probe_epochs=75,
        severity=-0.05,
        k=3,
        seeds=(0, 1, 2),
        record=8,
        note="The scale of the field's benchmark (width, batch, lr and epochs of Navon et al.; milestones instead of a "
        "falling rate on plateaus, S and K are ours). For a GPU.",
    ),
}


def make(
    *,
    width: int = 64,
    molecules: int = COUNT - 2 * HELD_OUT,
    held_out: int = HELD_OUT,
    tasks: Sequence[str] = tuple(TARGETS),
    cache: str | Path | None = None,
) -> Problem:
    """Build the problem.

    Args:
        width: Channels of an atom; the field's is 64.
        molecules: Number of molecules to train on.
        held_out: Number of molecules to test on.
        tasks: Some of mu, alpha, homo, lumo, r2, zpve, u0, u, h, g and cv.
        cache: Where the parsed data is kept; None: the platform's cache folder.

    Raises:
        ProblemError: If a task is unknown, or there are not so many molecules.
        DataError: If the data is damaged.
        MissingExtraError: If qm9pack is not installed.
    """
    faults = [f"QM9 has no target {t!r}. {nearest(t, TARGETS)}" for t in tasks if t not in TARGETS]
    if molecules < 2 or held_out < 1 or molecules + held_out > COUNT:
        faults.append(
            f"molecules = {molecules}, held_out = {held_out}: expected at least 2 and 1, and no more than {COUNT:,} "
            "together."
        )
    if faults:
        raise ProblemError(" ".join(faults))
    everything = load(None if cache is None else Path(cache))
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(everything))
    test, train = order[:held_out], order[held_out:][-molecules:]
    mean, std = everything.targets[train].mean(0), everything.targets[train].std(0)
    scales = dict(zip(TARGETS, std.tolist(), strict=True))

    def data(part: str, at: NDArray[np.int64]) -> QM9:
        mark = f"qm9-{part}-{molecules}-{held_out}"
        return QM9(everything, at, mean=mean, std=std, tasks=tasks, fingerprint=mark)

    return Problem(
        model=partial(nnconv.qm9, width, tasks=tuple(tasks)),
        single=lambda task: nnconv.qm9(width, tasks=[task]),
        tasks=[
            Task(t, loss=mse_loss, metrics=[Metric(f"MAE ({TARGETS[t].unit})", absolute(scales[t]), best="min")])
            for t in tasks
        ],
        train=data("train", train),
        test=data("test", test),
        recipe=Recipe(epochs=300, batch_size=120, optimizer="adam", lr=1e-3, milestones=(150, 225)),
        name="qm9",
    )


def absolute(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A function: the absolute error per molecule in the target's unit, [n]; outputs and targets are standardised."""

    def error(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs() * scale

    return error
