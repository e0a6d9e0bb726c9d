"""The problem cityscapes: it passes its check and trains, and says what it needs."""

from pathlib import Path

import pytest
import torch

from reconmtl.errors import DataError, ProblemError
from reconmtl.evaluation import Machine
from reconmtl.faults import check
from reconmtl.problems import cityscapes
from reconmtl.problems.rooms_files import write_npy_folders
from reconmtl.train import fit

SIZE = (32, 48)


@pytest.mark.filterwarnings("ignore:.*published are:UserWarning")
@pytest.mark.parametrize("network", ["segnet", pytest.param("mtan", marks=pytest.mark.slow)])
def test_the_problem_passes_its_check_and_trains(network: str, tmp_path: Path) -> None:
    write_npy_folders(tmp_path, "cityscapes", counts={"train": 8, "val": 3}, size=SIZE)
    problem = cityscapes.make(root=tmp_path, network=network, width=2)
    problem = problem.replace(recipe=problem.recipe.override(batch_size=2))
    assert not check(problem).faults
    (run,) = fit(problem, epochs=1, machine=Machine(accelerator="cpu", max_batches=1))
    assert set(run.metrics) == set(problem.task_names)
    assert problem.single is not None
    assert set(problem.single("depth")(torch.rand(2, 3, *SIZE))) == {"depth"}


def test_without_a_folder_it_is_said_where_to_get_it() -> None:
    with pytest.raises(DataError, match=r"--root DIR.*lorenmt/mtan"):
        cityscapes.make()
    with pytest.raises(ProblemError, match="Nearest: 'depth'"):
        cityscapes.make(tasks=["dept"])
    with pytest.raises(ProblemError, match="Nearest: 'segnet'"):
        cityscapes.make(network="segnett")
