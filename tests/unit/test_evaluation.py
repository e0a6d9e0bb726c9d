"""Judging a model: the slow loop over single samples is the oracle."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from reconmtl.errors import ProblemError
from reconmtl.evaluation import Machine, evaluate, evaluating
from reconmtl.problem import Metric, Problem, Recipe, Task

CPU = Machine(accelerator="cpu")


class Net(nn.Module):
    """Depends on its mode (BatchNorm, dropout), and on the other samples of a batch if it is in the wrong one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.heads = nn.ModuleDict({t: nn.Linear(3, 2) for t in ("a", "b")})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {t: head(self.drop(self.norm(x))) for t, head in self.heads.items()}


class LargestError:
    """A metric that no mean over batches can give; torchmetrics are of this form."""

    def __init__(self) -> None:
        self.largest = -1.0

    def update(self, output: Tensor, target: Tensor) -> None:
        self.largest = max(self.largest, float((output - target).abs().max()))

    def compute(self) -> Tensor:
        return torch.tensor(self.largest, dtype=torch.float64)


def distance(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().sum(1)


def problem(items: list[Any], *, batch_size: int = 4, **changes: Any) -> Problem:
    metrics = [Metric("l1", distance, best="min"), Metric("worst", LargestError, best="min")]
    values: dict[str, Any] = {
        "model": Net,
        "tasks": [Task("a", loss=mse_loss, metrics=metrics), Task("b", loss=mse_loss, metrics=metrics[:1])],
        "train": items,
        "test": items,
        "recipe": Recipe(epochs=1, batch_size=batch_size, lr=0.1, drop_last=False),
    }
    return Problem(**{**values, **changes})


def network(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net().double()
        model.norm.running_mean.normal_()  # type: ignore[union-attr]
        model.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        return model


def samples(present: list[tuple[bool, bool]], seed: int = 0) -> list[Any]:
    draw = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(3, generator=draw, dtype=torch.float64),
            {t: torch.randn(2, generator=draw, dtype=torch.float64) if here else None for t, here in zip("ab", flags)},  # noqa: B905
        )
        for flags in present
    ]


@given(
    present=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12).map(lambda p: [(True, True), *p]),
    batch_size=st.integers(1, 14),
    training=st.booleans(),
)
def test_values_are_those_of_a_loop_over_single_samples(
    present: list[tuple[bool, bool]], batch_size: int, training: bool
) -> None:
    items = samples(present)
    model = network().train(training)
    found = evaluate(problem(items, batch_size=batch_size), model, items, machine=CPU)
    assert model.training == training
    model.eval()
    expected: dict[str, list[Tensor]] = {"a": [], "b": []}
    with torch.no_grad():
        for x, targets in items:
            outputs = model(x[None])
            for task, target in targets.items():
                if target is not None:
                    expected[task].append((outputs[task][0] - target).abs())
    assert found == {
        "a": {
            "l1": pytest.approx(sum(float(e.sum()) for e in expected["a"]) / len(expected["a"]), rel=1e-12),
            "worst": pytest.approx(max(float(e.max()) for e in expected["a"]), rel=1e-12),
        },
        "b": {"l1": pytest.approx(sum(float(e.sum()) for e in expected["b"]) / len(expected["b"]), rel=1e-12)},
    }


def test_every_submodule_gets_its_own_mode_back_also_after_an_error() -> None:
    model = network()
    model.train()
    model.norm.eval()  # frozen statistics, as users have them
    before = {name: module.training for name, module in model.named_modules()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    items = samples([(True, True)] * 5)
    evaluate(problem(items), model, items, machine=CPU)
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(KeyError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_evaluating_leaves_gradients_and_random_numbers_alone() -> None:
    model, items = network().train(), samples([(True, True)] * 5)
    model(torch.randn(4, 3, dtype=torch.float64))["a"].sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    evaluate(problem(items), model, items, machine=CPU)
    assert torch.equal(state, torch.get_rng_state())
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None and g is None) or (p.grad is not None and g is not None and torch.equal(p.grad, g))


def test_a_smoke_test_sees_so_many_batches() -> None:
    items = samples([(True, True)] * 7)
    machine = Machine(accelerator="cpu", max_batches=2)
    some = evaluate(problem(items, batch_size=3), network(), items, machine=machine)
    assert some == evaluate(problem(items, batch_size=3), network(), items[:6], machine=CPU)
    assert some != evaluate(problem(items, batch_size=3), network(), items, machine=CPU)


def test_a_network_without_parameters_can_be_judged() -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": torch.zeros(len(x), 2), "b": torch.zeros(len(x), 2)}

    items = [(torch.ones(3), {"a": torch.full((2,), float(i)), "b": torch.ones(2)}) for i in (1, 3)]
    assert evaluate(problem(items), Zero(), items, machine=CPU) == {"a": {"l1": 4.0, "worst": 3.0}, "b": {"l1": 2.0}}


class Several(LargestError):
    def compute(self) -> Tensor:
        return torch.ones(2)


@pytest.mark.parametrize(
    ("metric", "complaint"),
    [
        (Metric("m", mse_loss, best="min"), r"'m' of task 'a' should return one value .* \[3\], found \[\]"),
        (Metric("m", lambda o, t: (o - t).abs(), best="min"), r"shape \[3\], found \[3, 2\]"),
        (Metric("m", lambda o, t: float(len(o) - len(t)), best="min"), r"shape \[3\], found float"),
        (Metric("m", Several, best="min"), r"`compute\(\)` of metric 'm' of task 'a' should return one number"),
    ],
)
def test_metrics_that_cannot_be_averaged_right_are_refused(metric: Metric, complaint: str) -> None:
    items = samples([(True, True)] * 3)
    with pytest.raises(ProblemError, match=complaint):
        evaluate(problem(items, tasks=[Task("a", loss=mse_loss, metrics=[metric])]), network(), items, machine=CPU)


def test_a_task_without_targets_or_outputs_is_named() -> None:
    items = samples([(True, False)] * 3)
    with pytest.raises(ProblemError, match=r"has a target for \['b'\]; there is nothing to judge"):
        evaluate(problem(items), network(), items, machine=CPU)
    odd = problem(items, tasks=[Task("c", loss=mse_loss)])
    with pytest.raises(ProblemError, match=r"no output for \['c'\], found \['a', 'b'\]"):
        evaluate(odd, network(), [(x, {"c": y["a"]}) for x, y in items], machine=CPU)


@pytest.mark.parametrize("machine", [Machine(accelerator="cpuu")])
def test_a_machine_that_does_not_exist_is_a_sentence(machine: Machine) -> None:
    with pytest.raises(
        ProblemError, match=f"'{machine.accelerator}', precision = '{machine.precision}' cannot be used"
    ):
        machine.fabric()
