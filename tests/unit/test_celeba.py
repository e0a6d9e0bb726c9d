"""CelebA as a problem: forty tasks, from files or made up."""

import warnings
from pathlib import Path

import pytest

from celeba import write
from reconmtl.errors import DataError
from reconmtl.evaluation import Machine
from reconmtl.faults import check
from reconmtl.networks.resnet import CELEBA_ATTRIBUTES
from reconmtl.problems import celeba
from reconmtl.train import fit, probe

few = pytest.mark.filterwarnings("ignore:CelebA, .*published are:UserWarning")


@few
def test_problems_of_both_kinds_pass_their_check_and_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECONMTL_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "data", "kaggle")
    tasks = CELEBA_ATTRIBUTES[:3]
    problem = celeba.make(data="files", root=tmp_path / "data", width=2, tasks=tasks)
    problem = problem.replace(recipe=problem.recipe.override(batch_size=4))
    assert not check(problem).faults
    machine = Machine(accelerator="cpu", max_batches=1)
    log = probe(problem, epochs=1, machine=machine)
    assert len(log.layers) == 40
    (run,) = fit(problem, plan=log.rank(severity=0.0).top(25), epochs=1, machine=machine)
    assert {0 <= v["error"] <= 100 for v in run.metrics.values()} == {True}
    with pytest.raises(DataError, match="--root DIR"):
        celeba.make(data="files")
    with pytest.raises(DataError, match="Nearest: 'files'"):
        celeba.make(data="file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(celeba.make(width=2).task_names) == 40
