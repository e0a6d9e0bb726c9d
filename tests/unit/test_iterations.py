"""Figure 11's measurement: what a step of each method does, and the page that is made of the file."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from reconmtl.balance import Balancer
from reconmtl.errors import ReconError, RunError
from reconmtl.files import read_json
from reconmtl.gram import Gradients
from reconmtl.networks import resnet
from reconmtl.paper.iterations import METHODS, draw, measure, show, step_of


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


def test_a_step_of_a_balancer_is_its_update_and_records_nothing() -> None:
    torch.manual_seed(0)
    model, x = resnet.celeba(width=2, tasks=["Young", "Bald", "Bangs"]), torch.rand(4, 3, 64, 64)
    balancer = Balancer("cagrad:c=0.1")
    model.eval()  # the buffers of two passes would differ
    losses = {t: cross_entropy(out, torch.zeros(4, dtype=torch.long)) for t, out in model(x).items()}
    balancer.backward(Gradients(model), losses)
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    step_of(model, x, "cagrad:c=0.1")()
    for grad, p in zip(expected, model.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, grad)
    assert {m.partition(":")[0] for m in METHODS[2:]} == {"cagrad", "graddrop", "pcgrad", "mgda"}


def test_ratios_are_written_and_shown(tmp_path: Path) -> None:
    assert "Nothing is finished" in show(tmp_path) and draw(tmp_path) is None
    path = measure(tmp_path, tasks=(2,), width=1, batch=2, rounds=1)
    (row,) = read_json(path, RunError)["ratios"]
    assert row["tasks"] == 2 and row["joint"] == 1.0 and row["probe"] > 0
    assert all(row[m] > 0 and f"{row[m]:.2f}" in show(tmp_path) for m in METHODS)
