"""Theorem 4.1 on random networks: the conclusion where the premise holds, and unit weights for which it fails."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reconmtl.errors import PlanError
from reconmtl.paper.theorem import examine
from reconmtl.plan import Plan
from reconmtl.splitting import split

TASKS = ("a", "b", "c")


class Net(nn.Module):
    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.second = nn.Linear(6, 5)
        self.heads = nn.ModuleDict({t: nn.Linear(5, 1) for t in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.tanh(self.second(torch.tanh(self.norm(self.first(x)))))
        return {t: h(x) for t, h in self.heads.items()}


def case(seed: int, *, norm: bool = False, alike: bool = False) -> tuple[Net, Any, Tensor]:
    torch.manual_seed(seed)
    net, x = Net(norm=norm).double(), torch.randn(12, 4, dtype=torch.float64)
    targets = {t: torch.randn(12, 1, dtype=torch.float64) for t in TASKS}
    if alike:  # tasks that are one task: their gradients are equal
        targets = dict.fromkeys(TASKS, targets["a"])
        for head in net.heads.values():
            head.load_state_dict(net.heads["a"].state_dict())
    return net, lambda out: {t: ((out[t] - targets[t]) ** 2).mean() for t in TASKS}, x


LAYERS = ["first", "second"]
RATES = (1e-5, 1e-4)


def test_the_conclusion_holds_where_the_premise_holds() -> None:
    held = 0
    for seed in range(60):
        found = examine(*case(seed), layers=LAYERS, rates=RATES)
        assert len(found.premises) == 2 * 6
        if found.holds:
            held += 1
            assert found.slope < 0
            assert all(step.helps for step in found.steps)
    assert held >= 5  # or this tells nothing


def test_the_slope_is_the_derivative_of_the_difference_whatever_the_weights() -> None:
    for seed, weights in enumerate(({"a": 0.2, "b": 0.3, "c": 0.5}, dict.fromkeys(TASKS, 1.0), None)):
        found = examine(*case(seed, norm=True), layers=LAYERS, rates=[1e-6], weights=weights)
        (step,) = found.steps
        assert (step.split - step.shared) / step.lr == pytest.approx(found.slope, rel=1e-3)


def test_with_unit_weights_the_conclusion_can_fail_though_the_premise_holds() -> None:
    failed = 0
    for seed in range(60):
        args = case(seed)
        fair = examine(*args, layers=LAYERS, rates=RATES)
        unit = examine(*args, layers=LAYERS, rates=RATES, weights=dict.fromkeys(TASKS, 1.0))
        assert unit.premises == fair.premises
        if unit.holds and unit.slope > 0:
            failed += 1
            assert not any(step.helps for step in unit.steps)
    assert failed >= 1


def test_equal_tasks_are_at_the_border_of_the_premise_and_a_split_changes_nothing() -> None:
    found = examine(*case(0, alike=True), layers=LAYERS, rates=RATES)
    assert found.slope == pytest.approx(0, abs=1e-12)
    assert all(p.left == pytest.approx(p.right) and not p.holds for p in found.premises)
    unit = examine(*case(0, alike=True), layers=LAYERS, rates=RATES, weights=dict.fromkeys(TASKS, 1.0))
    assert not any(step.helps for step in unit.steps)  # the shared layers step three times as far


@pytest.mark.parametrize("norm", [False, True])
def test_the_step_is_that_of_the_library_s_split_network(norm: bool) -> None:
    """Unit weights are joint training: one step of SGD on the network that `split` returns, and on the plain one."""
    net, losses, x = case(3, norm=norm)
    found = examine(net, losses, x, layers=LAYERS, rates=[0.05], weights=dict.fromkeys(TASKS, 1.0))
    for divided, expected in ((True, found.steps[0].split), (False, found.steps[0].shared)):
        model: nn.Module = copy.deepcopy(net)
        if divided:
            model = split(model, Plan(tasks=TASKS, layers=LAYERS), sample=x)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        sum(losses(model(x)).values()).backward()
        optimizer.step()
        with torch.no_grad():
            assert float(sum(losses(model(x)).values())) == pytest.approx(expected, rel=1e-9)


def test_the_model_is_left_as_it_was() -> None:
    net, losses, x = case(1, norm=True)
    before = copy.deepcopy(net.state_dict())
    examine(net, losses, x, layers=LAYERS, rates=RATES)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_what_cannot_be_used_is_named() -> None:
    args = case(0)
    with pytest.raises(PlanError, match="no layer 'frist'"):
        examine(*args, layers=["frist"], rates=RATES)
    with pytest.raises(PlanError, match="expected one for each of"):
        examine(*args, layers=LAYERS, rates=RATES, weights={"a": 1.0})
