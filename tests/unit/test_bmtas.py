"""The search for branches: candidates, trees as plans, sizes, and a search that finds what it should."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks import TASKS, Chain
from reconmtl.checkpoints import read_checkpoint
from reconmtl.errors import ProblemError, RunError
from reconmtl.evaluation import Machine
from reconmtl.networks import mobilenet_raspp, resnet
from reconmtl.networks.bmtas import Tree, operations, search, to_plan
from reconmtl.plan import Plan
from reconmtl.problem import Metric, Problem, Recipe, Task
from reconmtl.splitting import cost, split


class Numbers:
    """Task a is the sum of the inputs, task b its opposite."""

    fingerprint = "numbers"

    def __init__(self, n: int) -> None:
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        total = self.x[i].sum().reshape(1)
        return self.x[i], {"a": total, "b": -total}


def problem() -> Problem:
    tasks = [
        Task(t, loss=F.mse_loss, metrics=[Metric("mse", lambda o, y: (o - y).square()[:, 0], best="min")])
        for t in TASKS
    ]
    recipe = Recipe(epochs=1, batch_size=16, lr=0.1)
    return Problem(model=Chain, tasks=tasks, train=Numbers(200), test=Numbers(32), recipe=recipe)


def test_the_whole_network_but_the_stem_has_the_published_size() -> None:
    model = resnet.multifashion()
    apart = torch.arange(2).expand(len(model.blocks), 2)  # type: ignore[arg-type]
    plan = to_plan(model, model.blocks, ("digit", "fashion"), apart)  # type: ignore[arg-type]
    assert round(cost(model, plan).megabytes, 2) == 85.61
    assert len(plan) == 41 - 2


@pytest.mark.parametrize("make", [resnet.multifashion, mobilenet_raspp.pascal_context])
def test_blocks_of_the_papers_networks_hold_every_shared_layer_but_the_stem(make: type[nn.Module]) -> None:
    model = make(width=4)
    inside = [n for n, _ in model.named_parameters() if n.startswith(tuple(f"{b}." for b in model.blocks))]  # type: ignore[union-attr]
    outside = {n.rpartition(".")[0] for n, _ in model.named_parameters()} - {n.rpartition(".")[0] for n in inside}
    assert all(n.startswith(("heads.", "conv1", "bn1", "features.0.")) for n in outside)


def test_tasks_once_apart_stay_apart() -> None:
    model = resnet.multifashion(width=2, tasks=list("abcd"))
    names = ["layer1.0", "layer2.0", "fc"]
    rows = torch.tensor([[2, 2, 2, 2], [0, 0, 1, 1], [3, 0, 0, 0]])
    plan = to_plan(model, names, list("abcd"), rows)
    assert not any(n.startswith("layer1") for n in plan.layers)
    assert plan.layers["layer2.0.conv1"] == (("a", "b"), ("c", "d"))
    assert plan.layers["fc"] == (("a",), ("b",), ("c", "d"))


def test_a_tree_is_a_plan_that_recon_refines() -> None:
    model = resnet.multifashion(width=2, tasks=list("abc"))
    tree = to_plan(model, ["layer3.0", "layer4.1"], list("abc"), torch.tensor([[0, 0, 1], [0, 0, 0]]))
    conflicts = Plan(tasks=tuple("abc"), layers=["layer1.0.conv1", "layer3.0.conv1"])
    both = tree.refine(conflicts)
    assert both.layers["layer3.0.conv1"] == (("a",), ("b",), ("c",))
    assert both.layers["layer3.0.bn1"] == (("a", "b"), ("c",))
    assert set(both.layers) == set(tree.layers) | {"layer1.0.conv1"}
    x = torch.rand(4, 1, 36, 36)
    expected, out = model.eval()(x), split(model, both).eval()(x)
    assert all(torch.equal(out[t], expected[t]) for t in "abc")


def test_operations_are_those_of_the_blocks() -> None:
    model = resnet.multifashion(width=4)
    found = operations(model, ["layer1.0", "fc"], torch.rand(1, 1, 36, 36))
    assert found[0] == pytest.approx(2 * 2 * 9 * 9 * 4 * 4 * 9 / 1e9)  # two 3x3 convolutions of 9 x 9 pixels
    assert found[1] == pytest.approx(2 * 32 * 100 / 1e9)


def test_a_costly_tree_stays_together_and_a_free_one_serves_opposite_tasks() -> None:
    machine = Machine(accelerator="cpu")
    together = search(problem(), epochs=12, resource_weight=1e8, architecture_lr=0.2, machine=machine)
    assert len(together.plan) == 0 and float(together.groups.max()) < 1.3
    again = search(problem(), epochs=12, resource_weight=1e8, architecture_lr=0.2, machine=machine)
    assert torch.equal(again.probabilities, together.probabilities)
    free = search(problem(), epochs=12, resource_weight=0.0, architecture_lr=0.2, machine=machine)
    assert torch.allclose(free.probabilities.sum(2), torch.ones(3, 2))
    assert float(free.groups.sum()) > float(together.groups.sum())


class Trembling(Numbers):
    """Disturbed by the global generator; some samples have no target for task b; stops the search once."""

    def __init__(self, n: int, left: int = 0) -> None:
        super().__init__(n)
        self.left = left

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        x, targets = super().__getitem__(i)
        return x + 0.1 * torch.randn(4), targets if i % 4 else {"a": targets["a"]}


class Wavering(Chain):
    """With what has a state or draws while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.second.append(nn.BatchNorm1d(6))
        self.second.append(nn.Dropout(0.3))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_search_that_was_killed_ends_as_if_it_had_not_been(precision: str, tmp_path: Path) -> None:
    machine = Machine(accelerator="cpu", precision=precision, checkpoint_steps=1)
    options: dict[str, Any] = {"epochs": 4, "resource_weight": 0.1, "architecture_lr": 0.2, "machine": machine}

    def found(left: int, name: str = "state") -> Tree:
        disturbed = problem().replace(model=Wavering, train=Trembling(60, left))
        return search(disturbed, checkpoint=tmp_path / name, **options)

    whole = found(0, "whole")
    spread = whole.probabilities - 0.5
    assert spread.abs().max() > 0.01  # else nothing could differ
    for left in (3, 21, 40, 90, 50, 1, 50):  # before the first step, in the warm-up, while the tree is searched
        with pytest.raises(KeyboardInterrupt):
            found(left)
    tree = found(0)
    assert torch.equal(tree.probabilities, whole.probabilities)
    assert tree.plan == whole.plan
    states = [read_checkpoint(tmp_path / name) for name in ("state", "whole")]
    for (name, mine), other in zip(states[0].model.items(), states[1].model.values(), strict=True):
        assert torch.equal(mine, other), name
    with pytest.raises(RunError, match=r"state cannot be continued: it belongs to another search.* Delete this file"):
        search(problem(), epochs=3, machine=machine, checkpoint=tmp_path / "state")
    (tmp_path / "state").write_bytes(b"{")
    with pytest.raises(RunError, match="cannot be read as a checkpoint"):
        found(0)


def test_tasks_with_data_of_their_own_are_searched_too() -> None:
    own = {
        t: [(x, targets[t]) for x, targets in map(Numbers(n).__getitem__, range(n))] for t, n in (("a", 60), ("b", 25))
    }
    apart = problem().replace(train=own)
    tree = search(apart, epochs=3, resource_weight=0.0, machine=Machine(accelerator="cpu"))
    assert torch.allclose(tree.probabilities.sum(2), torch.ones(3, 2))
    assert not torch.allclose(tree.probabilities, torch.full((3, 2, 2), 0.5))
    with pytest.raises(ProblemError, match="60 and 4 samples do not make a batch of 16 besides a held-out fifth"):
        search(problem().replace(train={"a": own["a"], "b": own["b"][:4]}), epochs=1)


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ProblemError, match=r"pass blocks=\[...\]"):
        search(problem().replace(model=lambda: nn.Sequential(nn.Linear(4, 1))), epochs=1)
    with pytest.raises(ProblemError, match="held-out fifth"):
        search(problem().replace(train=Numbers(16)), epochs=1)
