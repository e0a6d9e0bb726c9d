"""Figure 11's measurement: what a step of each method does, and the page that is made of the file."""

from pathlib import Path

import pytest
import torch

from reconmtl.errors import ReconError, RunError
from reconmtl.files import read_json
from reconmtl.networks import resnet
from reconmtl.paper.iterations import measure, show, step_of


def test_a_probed_step_leaves_the_gradients_of_a_joint_one() -> None:
    torch.manual_seed(0)
    model, x = resnet.celeba(width=2, tasks=["Young", "Bald"]), torch.rand(4, 3, 64, 64)
    grads = []
    for method in ("joint", "probe"):
        model.zero_grad()
        step_of(model, x, method)()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(model.parameters()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    with pytest.raises(ReconError):
        step_of(model, x, "no such method")()


def test_ratios_are_written_and_shown(tmp_path: Path) -> None:
    assert "Nothing is finished" in show(tmp_path / "iterations.json")
    path = measure(tmp_path, tasks=(2,), width=1, batch=2, rounds=1)
    (row,) = read_json(path, RunError)["ratios"]
    assert row["tasks"] == 2 and row["joint"] == 1.0 and row["probe"] > 0
    assert f"{row['probe']:.2f}" in show(path)
