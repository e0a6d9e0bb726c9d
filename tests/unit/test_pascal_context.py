"""PASCAL-Context as a problem: it passes its check and trains, and says what it needs."""

from pathlib import Path

import pytest

from reconmtl.errors import DataError, ProblemError
from reconmtl.evaluation import Machine
from reconmtl.faults import check
from reconmtl.problems import pascal_context
from reconmtl.problems.pascal_files import TASKS
from reconmtl.problems.rooms_files import write_pascal_folder
from reconmtl.train import fit


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*published are:UserWarning")
def test_the_problem_passes_its_check_and_trains(tmp_path: Path) -> None:
    write_pascal_folder(tmp_path, counts={"train": 6, "val": 4}, size=(48, 64))
    problem = pascal_context.make(root=tmp_path, width=4, size=64, tasks=TASKS)
    problem = problem.replace(recipe=problem.recipe.override(batch_size=3))
    assert not check(problem).faults
    (run,) = fit(problem, epochs=1, machine=Machine(accelerator="cpu", max_batches=1))
    assert set(run.metrics) == set(problem.task_names)
    assert set(run.metrics["edge"]) == {"odsF"}


def test_without_a_folder_it_is_said_where_to_get_it() -> None:
    with pytest.raises(DataError, match=r"--root DIR.*PASCAL_MT"):
        pascal_context.make()
    with pytest.raises(ProblemError, match="Nearest: 'saliency'"):
        pascal_context.make(tasks=["salience"])
