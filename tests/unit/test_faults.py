import json
import random
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import reconmtl as rm
from reconmtl.problems import multifashion, planted

mse = nn.functional.mse_loss


def error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().mean(1)


class Rows:
    """Items with whatever targets a function of the index gives."""

    def __init__(self, targets: Callable[[int], dict[str, Any]], n: int = 40, inputs: float = 1.0) -> None:
        self.targets, self.n, self.inputs = targets, n, inputs

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Any]]:
        return torch.full((4,), self.inputs * (i + 1) / self.n), self.targets(i)


class Net(nn.Module):
    """Everything that a check should see: shared, owned, unused, frozen and tied layers, a BatchNorm used per task."""

    def __init__(self, tasks: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.left, self.right = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.right.weight = self.left.weight
        self.norm = nn.BatchNorm1d(4)
        self.unused = nn.Linear(4, 1)
        self.heads = nn.ModuleDict({t: nn.Linear(4, 1) for t in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.right(self.left(self.frozen(torch.relu(self.trunk(x)))))
        return {t: head(self.norm(z * (i + 1.0) + i * x)) for i, (t, head) in enumerate(self.heads.items())}


def _problem(**changes: Any) -> rm.Problem:
    def both(i: int) -> dict[str, Any]:
        return {"a": torch.tensor([float(i)]), "b": torch.tensor([1.0])}

    values: dict[str, Any] = {
        "model": Net,
        "tasks": [rm.Task(t, loss=mse, metrics=[rm.Metric("mae", error, best="min")]) for t in ("a", "b")],
        "train": Rows(both),
        "test": Rows(both),
        "recipe": rm.Recipe(epochs=1, batch_size=8, lr=0.1),
    }
    return rm.Problem(**values | changes)


@pytest.mark.parametrize("make", [planted.make, lambda: multifashion.make(width=4)])
def test_ready_problems_have_no_fault(make: Callable[[], rm.Problem]) -> None:
    checked = rm.check(make)
    assert checked.ok, checked
    assert not checked.warnings, checked
    shared = [layer for layer in checked.layers if len(layer.tasks) == 2]
    assert shared
    assert all(layer.splittable for layer in shared)
    assert all(not layer.splittable and layer.why for layer in checked.layers if len(layer.tasks) < 2)


def test_the_layer_table_names_who_shares_and_why_not() -> None:
    checked = rm.check(_problem())
    assert checked.ok, checked
    rows = {layer.name: layer for layer in checked.layers}
    assert {n for n, layer in rows.items() if layer.splittable} == {"trunk", "norm"}
    assert rows["trunk"].tasks == ("a", "b")
    assert rows["trunk"].parameters == 20
    assert rows["frozen"].why == "frozen"
    assert rows["unused"].why == "no task reaches it"
    assert rows["heads.a"].why == "only a reaches it"
    assert "tied" in rows["left"].why
    told = [f.says for f in checked.warnings]
    assert any("2 parameters reached by no task's loss: unused.weight, unused.bias" in text for text in told)
    assert any("BatchNorm 'norm' is called on values of different tasks (a; b)" in text for text in told)
    assert len(told) == 2
    for piece in ("| trunk", "no: only a reaches it", "- left: ", "2 layers with 28 parameters can be split."):
        assert piece in str(checked)


def _hopeless() -> rm.Problem:
    """One of everything that can be wrong."""

    def raises(_: Tensor, __: Tensor) -> Tensor:
        raise KeyError("weights")

    def targets(i: int) -> dict[str, Any]:
        present = {t: torch.tensor([1.0]) for t in ("nan", "detached", "vector", "raises", "zero", "plain", "metric")}
        return present | {"typp": torch.tensor([1.0]), "sparse": torch.ones(1) if i % 8 == 0 else None}

    class Hopeless(Net):
        def __init__(self) -> None:
            super().__init__(
                ("nan", "detached", "vector", "raises", "zero", "plain", "metric", "sparse", "typo", "lost")
            )
            self.norm = nn.Identity()  # type: ignore[assignment]

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            outputs = super().forward(torch.nan_to_num(x))
            outputs["extra"] = outputs.pop("lost")
            return outputs

    metric = rm.Metric("mae", error, best="min")
    tasks = [
        rm.Task("nan", loss=lambda o, y: mse(o, y) / 0, metrics=[metric]),
        rm.Task("detached", loss=lambda o, y: mse(o.detach(), y), metrics=[metric]),
        rm.Task("vector", loss=lambda o, y: (o - y).squeeze(1), metrics=[metric]),
        rm.Task("raises", loss=raises, metrics=[metric]),
        rm.Task("zero", loss=lambda o, _: 0 * o.mean(), metrics=[metric]),
        rm.Task("plain", loss=lambda o, y: cast("Tensor", float(mse(o, y))), metrics=[metric]),
        rm.Task("metric", loss=mse, metrics=[rm.Metric("whole", lambda o, y: (o - y).mean(), best="min")]),
        rm.Task("sparse", loss=mse, metrics=[rm.Metric("nowhere", error)]),
        rm.Task("typo", loss=mse, metrics=[metric]),
        rm.Task("lost", loss=mse, metrics=[metric]),
    ]
    return rm.Problem(
        model=Hopeless,
        tasks=tasks,
        train=Rows(targets, inputs=float("nan")),
        test=Rows(lambda i: targets(i) | {"lost": torch.ones(1)}),
        recipe=rm.Recipe(epochs=1, batch_size=8, lr=0.1),
    )


def test_every_fault_is_reported_at_once() -> None:
    checked = rm.check(_hopeless)
    faults = [f"{f.about}: {f.says}" for f in checked.faults]
    for piece in (
        "problem: task 'sparse', metric 'nowhere': no direction (best=), expected 'max' or 'min'",
        "task 'typo': no target in train: none of the 40 samples has one. Nearest: 'typp'",
        "task 'typo': no target in test",
        "task 'lost': no target in train",
        "task 'lost': the model returns no output for it",
        "train: the inputs hold values that are not finite",
        "task 'nan': the loss of the first batch is inf",
        "task 'detached': the loss depends on no parameter of the network",
        "task 'vector': the loss should be a scalar, the mean over samples, found shape [",
        "task 'raises': the loss raised KeyError: 'weights' (test_faults.py, line ",
        "task 'plain': the loss should be a scalar tensor, found float",
        "task 'metric': Metric 'whole' of task 'metric' should return one value per sample",
    ):
        assert sum(f.startswith(piece) for f in faults) == 1, (piece, faults)
    assert len(faults) == 12, faults
    told = [f"{f.about}: {f.says}" for f in checked.warnings]
    for piece in (
        "train: the targets 'typp' belong to no task. Nearest: 'typo'",
        "model: the output 'extra' belongs to no task",
        "task 'zero': the gradient is zero at every parameter",
    ):
        assert sum(f.startswith(piece) for f in told) == 1, (piece, told)
    assert not checked.ok
    assert checked.targets["train"]["sparse"] >= 2  # looked for until there were two


@pytest.mark.parametrize(
    ("changes", "piece"),
    [
        ({"model": lambda: None}, "model: the function returned NoneType"),
        ({"model": lambda: 1 / 0}, "model: building it raised ZeroDivisionError: division by zero (test_faults.py"),
        ({"model": lambda net=Net(): net}, "model: the function returns the same network each time"),  # noqa: B008
        ({"train": [1] * 40}, "train: Items of a data set should be (input, {task: target}), found int"),
        ({"model": lambda: nn.Linear(4, 1)}, "model: it should return {task: output}, returned Tensor"),
        ({"model": lambda: nn.Linear(3, 1)}, "model: running it on a batch of train raised RuntimeError"),
        ({"single": lambda _: nn.Linear(4, 1)}, "single-task network of 'a': it should return {'a': output}"),
        (
            {
                "recipe": rm.Recipe(
                    epochs=1,
                    batch_size=8,
                    lr=0.1,
                    param_groups=lambda m: [{"params": m.get_submodule("heads").parameters()}],
                )
            },
            "recipe: ",
        ),
    ],
)
def test_a_broken_part_is_named(changes: dict[str, Any], piece: str) -> None:
    faults = [f"{f.about}: {f.says}" for f in rm.check(_problem(**changes)).faults]
    assert any(f.startswith(piece) for f in faults), faults


def test_a_model_that_shares_nothing_is_named() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleDict({t: nn.Linear(4, 1) for t in ("a", "b")})

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {t: net(x) for t, net in self.nets.items()}

    (fault,) = rm.check(_problem(model=Apart)).faults
    assert "nothing is shared" in fault.says


def test_a_warning_of_broadcasting_is_passed_on() -> None:
    loss = rm.Task("a", loss=lambda o, y: mse(o.squeeze(1), y), metrics=[])
    checked = rm.check(_problem(tasks=[loss, rm.Task("b", loss=mse)]))
    assert any("target size" in f.says and f.about == "task 'a'" for f in checked.warnings), checked


def test_a_task_without_metrics_and_metrics_that_are_no_numbers_are_warned_of() -> None:
    def ratio(o: Tensor, y: Tensor) -> Tensor:
        return error(o, y) / 0

    def nothing(o: Tensor, y: Tensor) -> Tensor:
        return 0 * ratio(o, y)

    judged = rm.Task("b", loss=mse, metrics=[rm.Metric(f.__name__, f, best="min") for f in (ratio, nothing, error)])
    checked = rm.check(_problem(tasks=[rm.Task("a", loss=mse), judged]))
    assert checked.ok
    told = [f"{f.about}: {f.says}" for f in checked.warnings]
    for piece in (
        "task 'a': it has no metric: its quality stands in no table, and delta-m leaves it out",
        "task 'b': metric 'ratio' is inf on 8 samples of test",
        "task 'b': metric 'nothing' is nan on 8 samples of test",
    ):
        assert sum(t.startswith(piece) for t in told) == 1, (piece, told)
    assert not any("'error'" in t for t in told)


def test_checking_changes_nothing_and_is_plain_data() -> None:
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    checked = rm.check(_problem)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    plain = json.loads(json.dumps(checked.to_dict()))
    assert plain["format"] == "reconmtl.check/1"
    assert plain["ok"] is True
    assert {row["name"] for row in plain["layers"]} == {layer.name for layer in checked.layers}


def test_a_factory_with_a_wrong_definition_reports_it_without_a_traceback() -> None:
    checked = rm.check(lambda: _problem(tasks=[rm.Task("a.b", loss=3)], recipe=None))  # type: ignore[arg-type]
    told = " ".join(f.says for f in checked.faults)
    assert "'a.b' contains" in told
    assert "loss should be a function" in told
    assert "expected a Recipe" in told
