"""What the user brings: everything that works is accepted, every fault is listed at once."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from reconmtl.errors import ProblemError, UnknownNameError
from reconmtl.problem import Metric, Problem, Recipe, Task

ITEMS = [(torch.tensor([float(i)]), {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}) for i in range(4)]
RECIPE = Recipe(epochs=2, batch_size=2, lr=0.1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({t: nn.Linear(1, 1) for t in ("a", "b")})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {t: head(x)[:, 0] for t, head in self.heads.items()}


class Mean:
    """A stateful metric, as small as it can be."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def update(self, output: Tensor, target: Tensor) -> None: ...

    def compute(self) -> float:
        return self.scale


def distance(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs()


def make(**changes: Any) -> Problem:
    values: dict[str, Any] = {
        "model": Net,
        "tasks": [Task(t, loss=mse_loss, metrics=[Metric("mae", distance, best="min")]) for t in ("a", "b")],
        "train": ITEMS,
        "test": ITEMS[:2],
        "recipe": RECIPE,
    }
    return Problem(**{**values, **changes})


def lines(**changes: Any) -> list[str]:
    with pytest.raises(ProblemError) as caught:
        make(**changes)
    head, *faults = str(caught.value).split("\n- ")
    assert head == "This problem cannot be trained:"
    return faults


# Faults. --------------------------------------------------------------------------------------------------------------


def test_every_fault_is_listed_at_once() -> None:
    tasks = [
        Task("a", loss=nn.MSELoss, weight=0),  # type: ignore[arg-type]
        Task("a", loss=mse_loss, metrics=[Metric("m", distance, best="maximum")] * 2),  # type: ignore[arg-type]
    ]
    loader = DataLoader(TensorDataset(torch.ones(4)))
    found = lines(model=Net(), tasks=tasks, train=loader, test=[], val=iter(ITEMS), recipe=3, single=1, collate=2)
    for fault, expected in zip(
        found,
        [
            "model: expected a function that builds the network, e.g. `lambda: Net()`, got Net",
            "tasks: Task names must be distinct, usable names: 'a' appears more than once",
            "task 'a': loss should be a function (output, target) -> scalar, found <class 'torch.nn",
            "task 'a': weight = 0, expected a positive number",
            "task 'a': two metrics are called 'm'",
            "task 'a', metric 'm': best = 'maximum', expected 'max' or 'min'",
            "task 'a', metric 'm': best = 'maximum', expected 'max' or 'min'",
            "train: expected a map-style data set with len() and [], got DataLoader",
            "test: the data set is empty",
            "val: expected a map-style data set with len() and [], got list_iterator",
            "single: expected a function or None, got int",
            "collate: expected a function or None, got int",
            "recipe: expected a Recipe, got int",
        ],
        strict=True,
    ):
        assert fault.startswith(expected)


class Stream(IterableDataset[Any]):
    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        return iter(ITEMS)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tasks": []}, "there is none"),
        ({"tasks": ["a"]}, "tasks: expected a list of Task"),
        ({"tasks": [Task("a.b", loss=mse_loss)]}, "contains one of '.'"),
        ({"tasks": [Task("a", loss=mse_loss, weight=float("nan"))]}, "weight = nan"),
        ({"tasks": [Task("a", loss=len)]}, "loss should be a function (output, target)"),  # type: ignore[arg-type]
        ({"tasks": [Task("a", loss=mse_loss, metrics="m")]}, "metrics should be a list of Metric"),  # type: ignore[arg-type]
        ({"train": Stream()}, "got Stream"),
        ({"train": ITEMS[:1]}, "train: 1 samples are fewer than one batch of 2"),
    ],
)
def test_a_fault_is_named(changes: dict[str, Any], complaint: str) -> None:
    assert complaint in "\n".join(lines(**changes))


class Needy(Mean):
    def __init__(self, classes: int) -> None:
        super().__init__(classes)


@pytest.mark.parametrize(
    ("fn", "stateful"),
    [
        (distance, False),
        (lambda output, target, *, power=2: (output - target) ** power, False),
        (partial(torch.nn.functional.l1_loss, reduction="none"), False),
        (nn.PairwiseDistance(), False),
        (torch.ne, False),  # a builtin without a signature
        (Mean, True),
        (lambda: Needy(3), True),
        (partial(Needy, 3), True),
    ],
)
def test_functions_and_factories_are_told_apart(fn: Callable[..., Any], stateful: bool) -> None:
    metric = Metric("m", fn, best="max")
    make(tasks=[Task("a", loss=nn.MSELoss(), metrics=[metric])])
    assert metric.is_factory == stateful


class Instance(Mean):
    def __call__(self, *batch: Tensor) -> float:  # as torchmetrics have it: the value of this batch alone
        return float(len(batch))


@pytest.mark.parametrize("fn", [Instance(), Needy, lambda output: output, 3])
def test_a_metric_that_is_neither_is_refused_with_the_way_out(fn: Any) -> None:
    (fault,) = lines(tasks=[Task("a", loss=mse_loss, metrics=[Metric("m", fn, best="max")])])
    assert fault.startswith("task 'a', metric 'm': fn should be a function (output, target) -> values [N], or")


# What it does. --------------------------------------------------------------------------------------------------------


def test_restricting_keeps_the_order_asked_for_and_names_unknown_tasks() -> None:
    problem = make()
    assert problem.restrict(["b", "a"]).task_names == ("b", "a")
    assert problem.task("b") is problem.tasks[1]
    with pytest.raises(
        UnknownNameError, match=r"Unknown task 'aa'\. Nearest: 'a'\. Unknown task 'x'\. Known: 'a', 'b'"
    ):
        problem.restrict(["aa", "b", "x"])
    with pytest.raises(UnknownNameError, match="Unknown task 'c'"):
        problem.task("c")


def test_losses_see_only_the_samples_that_have_a_target() -> None:
    seen: dict[int, tuple[list[float], list[float]]] = {}

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen[len(seen)] = (output.tolist(), target.tolist())
        return (output * target).sum()

    tasks = [Task("a", loss=loss, weight=3), Task("b", loss=loss), Task("c", loss=loss)]
    items = [(torch.zeros(1), {"a": 1.0}), (torch.zeros(1), {"a": None, "b": 5.0}), (torch.zeros(1), {"a": 2.0})]
    problem = make(tasks=tasks, train=items)
    _, targets = problem.batch(items, torch.tensor([2, 1, 0]), torch.device("cpu"))
    outputs = {t: torch.tensor([10.0, 20.0, 30.0]) for t in "abc"}
    losses = problem.losses(outputs, targets)
    assert seen == {0: ([10, 30], [2, 1]), 1: ([20], [5])}
    assert {t: float(v) for t, v in losses.items()} == {"a": 150, "b": 100}


@pytest.mark.parametrize(
    ("loss", "found"),
    [(nn.MSELoss(reduction="none"), r"shape \[2\]"), (lambda o, t: float((o - t).detach().mean()), "float")],
)
def test_a_loss_that_is_no_scalar_is_named(loss: Any, found: str) -> None:
    problem = make(tasks=[Task("a", loss=loss)])
    inputs, targets = problem.batch(ITEMS, torch.arange(2), torch.device("cpu"))
    with pytest.raises(ProblemError, match=f"loss of task 'a' should be a scalar tensor.*found {found}"):
        problem.losses(Net()(inputs), targets)


def test_the_fingerprint_follows_the_data_and_nothing_else() -> None:
    class Marked(TensorDataset):
        fingerprint: object = "one"

    class Other(Marked):
        fingerprint = "two"

    x = torch.ones(4)
    marked = make(train=Marked(x))
    assert marked.fingerprint() == make(train=Marked(x), recipe=RECIPE.override(lr=1.0)).fingerprint()
    different = [marked, make(train=Other(x)), make(train=Marked(torch.ones(5))), make(), make(test=ITEMS[:3])]
    different += [make(name="other"), make(val=ITEMS, name="third"), make(train=[*ITEMS[:3], ITEMS[0]])]
    assert len({p.fingerprint() for p in different}) == len(different)


# Recipes. -------------------------------------------------------------------------------------------------------------


def test_every_fault_of_a_recipe_is_listed() -> None:
    with pytest.raises(ProblemError) as caught:
        Recipe(
            epochs=0,
            batch_size=2.5,  # type: ignore[arg-type]
            lr=float("nan"),
            momentum=-1,
            optimizer="sdg",
            milestones=(3, 2),
            param_groups=[],  # type: ignore[arg-type]
        )
    message = str(caught.value)
    for fault in (
        "epochs = 0: expected a whole number of at least 1",
        "batch_size = 2.5",
        "lr = nan: expected a number that is not negative",
        "momentum = -1",
        "optimizer = 'sdg': unknown. Nearest: 'sgd'",
        "milestones = (3, 2): expected rising epochs",
        "param_groups: expected a function",
    ):
        assert fault in message


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"optimizer": "adam", "momentum": 0.9}, "momentum = 0.9 belongs to 'sgd', not to 'adam'"),
        ({"optimizer": torch.optim.Adam, "weight_decay": 0.1}, "weight_decay = 0.1: your own optimizer function"),
        ({"optimizer": ["sgd"]}, "expected 'sgd', 'adam', 'adamw' or a function"),
        ({"milestones": 3}, "milestones = 3: expected a tuple"),
        ({"milestones": (0, 3)}, "whole numbers of at least 1"),
        ({"milestones": (1, "3")}, "whole numbers of at least 1"),
        ({"lr": "0.1"}, "lr = '0.1'"),
        ({"lr": True}, "lr = True"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ProblemError, match=complaint.replace("(", r"\(")):
        RECIPE.override(**changes)


def test_unknown_fields_are_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"no field 'epoch'. Nearest: 'epochs'.*no field 'zzz'. Known: 'epochs'"):
        RECIPE.override(epoch=3, zzz=1)


def test_a_recipe_is_plain_data_and_comes_back() -> None:
    recipe = Recipe(epochs=9, batch_size=2, lr=0.1, momentum=0.9, milestones=(3, 6))
    stored = recipe.to_dict() | {"milestones": [3, 6]}  # as JSON has it
    assert Recipe(**stored) == recipe  # type: ignore[arg-type]
    assert recipe.override(optimizer=torch.optim.SGD, momentum=0.0).to_dict()["optimizer"] == "SGD"


def test_optimizers_are_built_as_asked() -> None:
    model = Net()
    sgd = RECIPE.override(momentum=0.9, weight_decay=0.01).make_optimizer(model)
    assert isinstance(sgd, torch.optim.SGD)
    assert [sgd.defaults[n] for n in ("lr", "momentum", "weight_decay")] == [0.1, 0.9, 0.01]
    assert sgd.param_groups[0]["params"] == list(model.parameters())
    assert isinstance(RECIPE.override(optimizer="adamw").make_optimizer(model), torch.optim.AdamW)

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        first, *rest = net.parameters()
        return [{"params": [first], "lr": 5.0}, {"params": rest}]

    own = RECIPE.override(optimizer=torch.optim.Adagrad, param_groups=groups).make_optimizer(model)
    assert isinstance(own, torch.optim.Adagrad) and [g["lr"] for g in own.param_groups] == [5.0, 0.1]


def test_differences_are_those_of_the_halves_that_have_targets() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output * target).sum()

    problem = Problem(
        model=lambda: nn.Linear(1, 1),
        tasks=[Task("a", loss=loss, weight=2.0), Task("b", loss=loss), Task("c", loss=loss), Task("d", loss=loss)],
        train=[(torch.zeros(1), {})] * 3,
        test=[(torch.zeros(1), {})] * 3,
        recipe=Recipe(epochs=1, batch_size=1, lr=0.1),
    )
    row = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    ones = torch.ones(5)
    targets: Any = {
        "a": (ones, None),  # the fifth has no partner
        "b": (torch.tensor([1.0, 1.0]), torch.tensor([3, 1])),
        "c": (torch.tensor([1.0]), torch.tensor([0])),  # one sample has no halves
    }
    found = problem.differences(dict.fromkeys("abcd", row), targets)
    assert {t: v.item() for t, v in found.items()} == {"a": 2 * (11 - 1100), "b": 1000 - 10}
    with pytest.raises(ProblemError, match="rows cannot be taken"):
        problem.differences({"a": ["x"] * 5}, {"a": (ones, None)})
