"""Yeast: what is read and refused, and that its problem is in order."""

import gzip
import importlib.util
from pathlib import Path

import pytest
import torch

from reconmtl.errors import DataError, ProblemError
from reconmtl.problems import yeast


@pytest.mark.skipif(importlib.util.find_spec("river") is None, reason="needs the extra yeast")
def test_the_data_is_that_of_the_literature() -> None:
    problem = yeast.make(width=4)
    assert (len(problem.train), len(problem.test), len(problem.tasks)) == (1500, 917, 14)
    x, targets = problem.train.batch(torch.arange(1500))
    assert x.shape == (1500, 103)
    assert torch.allclose(x.mean(0), torch.zeros(103), atol=1e-5)
    both = [problem.train.labels, problem.test.labels]
    assert float(torch.cat(both).sum(1).mean()) == pytest.approx(4.237, abs=1e-3)  # labels per gene, MULAN's table
    one, labels = problem.train[7]
    assert torch.equal(one, x[7])
    assert labels["Class3"] == targets["Class3"][7]
    assert yeast.error(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0])).tolist() == [0.0, 100.0]


def test_a_damaged_file_and_unknown_classes_are_refused(tmp_path: Path) -> None:
    for content in (b"no gzip", gzip.compress(b"Att1,Class1\n1,1\n")):
        (tmp_path / "y.csv.gz").write_bytes(content)
        with pytest.raises(DataError, match="Install river again"):
            yeast.read(tmp_path / "y.csv.gz")
    with pytest.raises(ProblemError, match="no class 'Class15'"):
        yeast.make(tasks=["Class1", "Class15"])
    with pytest.raises(ProblemError, match="width"):
        yeast.MLP(0, ["Class1"])
