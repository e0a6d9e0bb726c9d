"""The ready problem: the paper's network, data and recipe, and where its data may come from."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from reconmtl.errors import DataError
from reconmtl.problems import multifashion
from reconmtl.problems.multifashion_data import load_mini


def test_it_is_the_papers_recipe_at_any_width() -> None:
    problem = multifashion.make(width=4)
    assert problem.task_names == ("digit", "fashion")
    recipe = problem.recipe.to_dict()
    expected = {"epochs": 120, "batch_size": 256, "lr": 0.1, "momentum": 0.9, "milestones": (60, 90), "gamma": 0.1}
    assert recipe | expected | {"optimizer": "sgd", "weight_decay": 0.0} == recipe
    inputs, targets = problem.batch(problem.train, torch.arange(3), torch.device("cpu"))
    outputs = problem.model()(inputs)
    assert {t: tuple(o.shape) for t, o in outputs.items()} == {"digit": (3, 10), "fashion": (3, 10)}
    losses = problem.losses(outputs, targets)
    for task, loss in losses.items():
        assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(outputs[task], targets[task][0]).item())


def test_the_paper_preset_is_appendix_b1() -> None:
    paper = multifashion.PRESETS["paper"]
    assert paper.options == {"width": 64, "data": "full"}
    assert (paper.epochs, paper.batch_size, paper.lr, paper.fractions) == (120, 256, 0.1, (0.5, 0.75))
    assert (paper.probe_epochs, paper.severity, paper.k, len(paper.seeds)) == (30, -0.1, 25, 3)
    assert next(iter(multifashion.PRESETS)) == "demo"  # what a command without a preset runs
    assert multifashion.PRESETS["demo"].options["data"] == "mini"


def test_the_demonstration_says_how_much_smaller_it_is() -> None:
    demo = multifashion.PRESETS["demo"]
    assert (demo.epochs, demo.probe_epochs, demo.seeds, demo.record) == (8, 2, (0, 1), 2)
    full, small = (sum(p.numel() for p in multifashion.make(width=w).model().parameters()) for w in (64, 8))
    assert "about 1/60 of the parameters" in demo.note and round(full / small, -1) == 60
    assert "a tenth of the data" in demo.note and len(load_mini()[0]) * 10 == 120_000


def test_data_is_the_mini_set_the_full_set_or_a_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mini = multifashion.make(width=4)
    assert mini.fingerprint() == multifashion.make(width=8, data="mini").fingerprint()
    assert len(mini.train) == len(load_mini()[0])
    monkeypatch.setenv("RECONMTL_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"full Multi-Fashion\+MNIST set is not in [^$]*--from DIR"):
        multifashion.make(data="full")
    path = tmp_path / "multi_fashion_and_mnist.pickle"
    random = np.random.default_rng(0)
    content = [random.integers(10, size=s) for n in (300, 5) for s in ((n, 36, 36), (n, 2))]
    path.write_bytes(pickle.dumps(content))
    published = multifashion.make(data=str(path))
    assert (len(published.train), len(published.test)) == (300, 5)
    assert published.fingerprint() != mini.fingerprint()
    with pytest.raises(DataError, match=r"nowhere\.pickle': expected mini, full, or a file that exists"):
        multifashion.make(data=str(tmp_path / "nowhere.pickle"))
    with pytest.raises(DataError, match=r"Nearest: 'full'\."):
        multifashion.make(data="ful")
