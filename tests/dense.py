"""What the problems in MTAN's .npy files have in common: each passes its check and trains, and says what it needs."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

from reconmtl.errors import DataError, ProblemError
from reconmtl.evaluation import Machine
from reconmtl.faults import check
from reconmtl.problems.rooms_files import write_npy_folders
from reconmtl.train import fit

SIZE = (32, 48)


def assert_checks_and_trains(module: ModuleType, name: str, network: str, root: Path) -> None:
    write_npy_folders(root, name, counts={"train": 8, "val": 3}, size=SIZE)
    problem = module.make(root=root, network=network, width=2)
    problem = problem.replace(recipe=problem.recipe.override(batch_size=2))
    assert not check(problem).faults
    (run,) = fit(problem, epochs=1, machine=Machine(accelerator="cpu", max_batches=1))
    assert set(run.metrics) == set(problem.task_names)
    assert problem.single is not None
    assert set(problem.single("depth")(torch.rand(2, 3, *SIZE))) == {"depth"}


def assert_says_what_it_needs(module: ModuleType) -> None:
    with pytest.raises(DataError, match=r"--root DIR.*lorenmt/mtan"):
        module.make()
    with pytest.raises(ProblemError, match="Nearest: 'depth'"):
        module.make(tasks=["dept"])
    with pytest.raises(ProblemError, match="Nearest: 'segnet'"):
        module.make(network="segnett")
