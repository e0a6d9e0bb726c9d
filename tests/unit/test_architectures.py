"""Every method trains by its name, with and without a plan, and goes on where it was stopped."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reconmtl as rm
from reconmtl.architectures import ARCHITECTURES, check_method, way
from reconmtl.balancers import BALANCERS
from reconmtl.errors import ProblemError
from reconmtl.networks.pieces import Pieces
from reconmtl.train import open_run

pytest.importorskip("torchjd")


class Block(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(inputs, 6), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.drop(self.linear(x)))
        return out


class Net(nn.Module):
    blocks = ("first", "second")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(4), Block(6)
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 1), "b": nn.Linear(6, 1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.second(self.first(x))
        return {t: head(z).squeeze(1) for t, head in self.heads.items()}

    def pieces(self) -> Pieces:
        return Pieces([self.first, self.second], {t: nn.Sequential(h, nn.Flatten(0)) for t, h in self.heads.items()})


class Apart(Net):
    """With heads that are modules of the network, as RotoGrad needs."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({t: nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)) for t in "ab"})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.second(self.first(x))
        return {t: head(z) for t, head in self.heads.items()}

    def pieces(self) -> Pieces:
        return Pieces([self.first, self.second], dict(self.heads.items()))


class Points:
    def __init__(self, n: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 4, generator=draw)
        self.y = {"a": self.x.sum(1), "b": self.x[:, 0] - self.x[:, 1]}

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.x[i], {t: y[i] for t, y in self.y.items()}


def _error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs()


def problem(model: type[nn.Module] = Apart, **changes: Any) -> rm.Problem:
    values: dict[str, Any] = {
        "model": model,
        "tasks": [
            rm.Task(t, loss=nn.functional.mse_loss, metrics=[rm.Metric("mae", _error, best="min")]) for t in ("a", "b")
        ],
        "train": Points(32, 1),
        "test": Points(16, 2),
        "recipe": rm.Recipe(epochs=2, batch_size=8, lr=0.05, momentum=0.9),
        "name": "points",
    }
    return rm.Problem(**{**values, **changes})


METHODS = [
    *sorted(set(BALANCERS) - {"krum", "trimmed-mean"}),
    "mmoe",
    "cross-stitch",
    "bmtas:epochs=1",
    "rotograd:m=5",
    "rotograd:m=6,scale=false",
]


def layers_for(method: str) -> list[str]:
    return {"mmoe": ["experts.0.0.linear"], "cross-stitch": ["networks.a.0.linear"]}.get(method, ["second.linear"])


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_in_both_forms_and_can_be_opened(method: str, tmp_path: Path) -> None:
    plans: list[rm.Plan | None] = [None, rm.Plan(tasks=("a", "b"), layers=layers_for(method))]
    labels = []
    for i, plan in enumerate(plans):
        (run,) = rm.fit(problem(), method=method, plan=plan, out=tmp_path / str(i))
        assert all(v["mae"] < 5 for v in run.metrics.values())
        labels.append(run.label)
        again = open_run(tmp_path / str(i) / "seed0", problem())
        x = Points(5, 3).x
        for task, out in run.model()(x).items():
            torch.testing.assert_close(again.model()(x)[task], out)
    assert labels[1].startswith(labels[0] + " w/ ")


@pytest.mark.parametrize(
    "method",
    ["cagrad", "pcgrad", "graddrop", "rlw", "uw", "famo", "dwa", "gradvac", "pcd", "db-mtl", "rotograd:m=6", "mmoe"],
)
def test_a_training_that_was_stopped_ends_as_if_it_had_not_been(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reconmtl import loop

    machine = rm.Machine(checkpoint_steps=1)
    (whole,) = rm.fit(problem(), method=method, record=True, out=tmp_path / "whole", machine=machine)
    step, count = loop._Training._step, 0

    def stops(self: Any, indices: Any) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        step(self, indices)

    monkeypatch.setattr(loop._Training, "_step", stops)
    fit = partial(rm.fit, problem(), method=method, record=True, out=tmp_path / "cut", machine=machine)
    with pytest.raises(KeyboardInterrupt):
        fit()
    monkeypatch.undo()
    (run,) = fit(resume=True)
    for (name, mine), other in zip(run.model().state_dict().items(), whole.model().state_dict().values(), strict=True):
        assert torch.equal(mine, other), name
    assert run.log is not None
    assert whole.log is not None
    assert torch.equal(run.log.cosines(), whole.log.cosines())


def test_one_seed_gives_every_balancer_the_same_start_and_joint_is_the_sum() -> None:
    (joint,), (same,) = rm.fit(problem()), rm.fit(problem(), method="joint", balancer=lambda gram: 1 + 0 * gram[0])
    for name, value in joint.model().state_dict().items():
        torch.testing.assert_close(same.model().state_dict()[name], value)


class Three(Net):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({t: nn.Linear(6, 1) for t in "abc"})


def test_groups_of_tasks_go_through_training_checkpoints_views_and_the_report(tmp_path: Path) -> None:
    data = {n: [(x, y | {"c": y["a"] - y["b"]}) for x, y in map(Points(n, n).__getitem__, range(n))] for n in (32, 16)}
    tasks = [rm.Task(t, loss=nn.functional.mse_loss, metrics=[rm.Metric("mae", _error, best="min")]) for t in "abc"]
    three = problem(Three, tasks=tasks, train=data[32], test=data[16])
    groups = rm.Plan(tasks=tuple("abc"), layers={"second.linear": [["a", "c"], ["b"]]})
    refined = groups.refine(rm.Plan(tasks=tuple("abc"), layers={"first.linear": [["a", "b"], ["c"]]}))
    joint = rm.fit(three, record=True, out=tmp_path / "joint")
    (run,) = rm.fit(three, method="cagrad", plan=refined, record=True, out=tmp_path / "groups")
    assert run.parameters == rm.cost(Three(), refined).parameters == sum(p.numel() for p in run.model().parameters())
    assert run.log is not None
    assert set(run.log.layers) == {"first.linear[a+b]", "second.linear[a+c]"}  # shared by two, so still measured
    again, x = open_run(tmp_path / "groups" / "seed0", three).model().eval(), Points(5, 3).x
    assert rm.Plan.load(tmp_path / "groups" / "seed0" / "plan.json") == refined
    for task, out in run.model()(x).items():
        torch.testing.assert_close(again(x)[task], out)
        torch.testing.assert_close(rm.view(again, task)(x)[task], out)
    rm.report([*joint, run], to=tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "a + b" in page
    assert "a + c" in page


@pytest.mark.parametrize("method", ["joint", "cagrad", "graddrop", "uw", "famo", "rotograd:m=6", "mmoe", "single"])
def test_mixed_precision_trains_nearly_the_same_network(method: str) -> None:
    """After eight steps, two per cent of the way that the weights have gone."""
    ways = []
    for precision in ("32-true", "bf16-mixed"):
        machine = rm.Machine(accelerator="cpu", precision=precision)
        (run,) = rm.fit(problem(), method=method, machine=machine)
        (start,) = rm.fit(problem(), method=method, machine=machine, lr=1e-30)
        states = [torch.cat([v.flatten() for v in r.model().state_dict().values()]) for r in (run, start)]
        assert all(s.dtype == torch.float32 for s in states)
        ways.append(states[0] - states[1])
    assert (ways[0] - ways[1]).norm() <= 0.02 * ways[0].norm()


def test_bmtas_trains_the_tree_that_it_found(tmp_path: Path) -> None:
    plan = rm.Plan(tasks=("a", "b"), layers=["first.linear"])
    (run,) = rm.fit(problem(), method="bmtas:epochs=2,resource_weight=0", plan=plan, out=tmp_path)
    assert run.plan is not None
    tree = rm.Plan.load(tmp_path / "seed0" / "tree.json")
    assert set(tree.layers) == set(run.plan.layers) >= {"first.linear"}
    assert json.loads((tmp_path / "seed0" / "config.json").read_text())["method"] == "bmtas:epochs=2,resource_weight=0"


def test_what_a_method_stands_for() -> None:
    assert way("cagrad:c=0.4").label == "CAGrad (c=0.4)"
    assert way("mmoe", "mgda").label == "MMoE + MGDA"
    assert way("joint", "mgda").label == way("mgda").label == "MGDA"
    assert "'mmoe'" in check_method("mmeo")[0]
    assert "'experts'" in check_method("mmoe:expert=2")[0]
    assert "both form the update" in check_method("mgda", "pcgrad")[0]
    assert "itself" in check_method("rotograd", "pcgrad")[0]
    assert "no gradients to balance" in check_method("single", "mgda")[0]
    assert "no parameters" in check_method("single:x=1")[0]
    assert len(check_method("mmoe:a=1,b=2", "cagrat")) == 3
    with pytest.raises(ProblemError, match="param_groups"):
        grouped = rm.Recipe(epochs=1, batch_size=8, lr=0.1, param_groups=lambda m: [{"params": m.parameters()}])
        ARCHITECTURES["mmoe"].change(problem(recipe=grouped))
