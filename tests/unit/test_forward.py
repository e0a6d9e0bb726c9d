"""Tasks with data sets of their own: the step, its Gram matrices, evaluation and resume, against plain loops."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reconmtl as rm
from reconmtl.batches import ALL
from reconmtl.checking import first_batches
from reconmtl.errors import Interrupted, ProblemError
from reconmtl.evaluation import evaluate
from reconmtl.forward import Forward, draw
from reconmtl.probing import Probe
from reconmtl.sampling import Sampler

SIZES = {"a": 24, "b": 10}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.heads = nn.ModuleDict({t: nn.Linear(6, 1) for t in SIZES})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.second(torch.relu(self.norm(self.first(x))))
        return {t: head(z).squeeze(1) for t, head in self.heads.items()}


class Own:
    """A task's own inputs; items are (input, target) as in any data set for one task."""

    def __init__(self, n: int, seed: int, stop: int = 0) -> None:
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
        self.y = self.x.sum(1) * (-1) ** seed
        self.fingerprint = f"own-{n}-{seed}"
        self.stop = stop

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.stop -= 1
        if self.stop == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.x[i], self.y[i]


def error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs()


def _problem(stop: int = 0, **changes: Any) -> rm.Problem:
    values: dict[str, Any] = {
        "model": Net,
        "tasks": [
            rm.Task(t, loss=nn.functional.mse_loss, metrics=[rm.Metric("mae", error, best="min")]) for t in SIZES
        ],
        "train": {"a": Own(24, 1), "b": Own(10, 2, stop)},
        "test": {"a": Own(7, 3), "b": Own(5, 4)},
        "recipe": rm.Recipe(epochs=2, batch_size=4, lr=0.05, momentum=0.9),
    }
    return rm.Problem(**values | changes)


def _by_hand(problem: rm.Problem, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sampler = Sampler(SIZES, batch_size=4, drop_last=True, seed=seed)
    for _ in range(2):
        steps = list(sampler.epoch())
        assert len(steps) == 6  # the longest set; the shorter one cycles
        for indices in steps:
            losses = []
            for t in SIZES:
                data = problem.train[t]
                out = model(data.x[indices[t]])[t]
                losses.append(nn.functional.mse_loss(out, data.y[indices[t]]))
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("record", [0, 1])
def test_training_on_own_data_is_a_plain_loop(record: int) -> None:
    problem = _problem()
    run = rm.fit(problem, record=record, seeds=(3,))[0]
    with torch.random.fork_rng():
        expected = _by_hand(problem, 3).state_dict()
    for name, value in run.model().state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert (run.log is not None) == bool(record)
    if run.log is not None:
        assert run.log.steps == 12


@pytest.mark.parametrize("layers", [[], ["second"], ["first", "norm"]])
@pytest.mark.parametrize("engine", ["flat", "delta", "auto"])
def test_grams_over_the_tasks_graphs_are_the_oracles(layers: list[str], engine: Any) -> None:
    problem = _problem()
    model = problem.model().double()
    if layers:
        model = rm.split(model, rm.Plan(tasks=list(SIZES), layers=layers), sample=torch.randn(4, 4).double())
    batches = {t: (x.double(), {k: (y.double(), at) for k, (y, at) in ys.items()})
               for t, (x, ys) in first_batches(problem, 4).items()}  # fmt: skip
    losses = Forward(problem, model).losses(batches)
    assert list(losses) == ["a", "b"]
    assert Probe(model, engine=engine).check(losses) < 1e-10
    assert rm.check_probe(problem) < 1e-5


def test_a_tasks_own_data_run_through_its_own_copies() -> None:
    problem = _problem()
    model = rm.split(Net(), rm.Plan(tasks=list(SIZES), layers=["second"]), sample=torch.randn(4, 4)).eval()
    forward = Forward(problem, model)
    with torch.no_grad():
        for p in model.get_submodule("second.per_task.a").parameters():
            p.add_(1.0)
        x = torch.randn(3, 4)
        assert torch.equal(forward("a", x)["a"], model(x)["a"])
        assert set(forward("b", x)) == {"b"}
        assert torch.equal(forward("b", x)["b"], model(x)["b"])
    model.train()
    forward("a", x)
    assert forward._views["a"].training


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_evaluation_judges_each_task_on_its_own_set(batch_size: int) -> None:
    problem = _problem()
    problem = problem.replace(recipe=problem.recipe.override(batch_size=batch_size, drop_last=False))
    model = Net().eval()
    values = evaluate(problem, model, problem.test)
    with torch.no_grad():
        for t, data in problem.test.items():
            expected = error(model(data.x)[t], data.y).mean().item()
            assert values[t]["mae"] == pytest.approx(expected, rel=1e-6)


def test_single_and_split_and_probe_work_and_compare(tmp_path: Path) -> None:
    problem = _problem()
    log = rm.probe(problem, epochs=1)
    assert log.steps == 6
    plan = rm.Plan(tasks=list(SIZES), layers=["second"])
    runs = rm.fit(problem, method="single") + rm.fit(problem) + rm.fit(problem, plan=plan, out=tmp_path)
    assert rm.compare(runs).rows[2].delta_m is not None
    again = rm.open_run(tmp_path / "seed0", problem)
    assert evaluate(problem, again.model(), problem.test) == runs[2].metrics


def test_a_stopped_training_on_own_data_goes_on(tmp_path: Path) -> None:
    plan = rm.Plan(tasks=list(SIZES), layers=["second"])
    rm.fit(_problem(), plan=plan, record=True, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        rm.fit(_problem(30), plan=plan, record=True, out=tmp_path / "parts")
    rm.fit(_problem(), plan=plan, record=True, out=tmp_path / "parts", resume=True)
    for name in ("last.ckpt", "result.json", "metrics.jsonl", "log/grams.safetensors"):
        assert (tmp_path / "whole/seed0" / name).read_bytes() == (tmp_path / "parts/seed0" / name).read_bytes()


def test_check_looks_at_every_set() -> None:
    checked = rm.check(_problem())
    assert checked.ok, checked
    assert checked.targets["train"] == {"a": 4, "b": 4}
    assert {layer.name for layer in checked.layers if layer.splittable} == {"first", "second", "norm"}
    told = " ".join(f.says for f in checked.warnings)
    assert "BatchNorm 'norm' is called on values of different tasks (a; b)" in told
    wrong = rm.check(_problem(train={"a": [(torch.full((4,), torch.nan), torch.ones(()))] * 8, "b": Own(10, 2)}))
    assert [f.about for f in wrong.faults][:2] == ["train['a']", "task 'a'"]


def test_wrong_sets_are_all_named() -> None:
    with pytest.raises(ProblemError) as raised:
        _problem(train={"a": 3, "c": Own(8, 1)}, test={"a": Own(3, 1), "b": []})
    for piece in (
        "train: task 'b' has no data set of its own",
        "train: a data set belongs to no task, 'c'",
        "train['a']: expected a map-style data set",
        "test['b']: the data set is empty",
    ):
        assert piece in str(raised.value)
    with pytest.raises(ProblemError, match="24 samples are fewer than one batch of 25"):
        _problem(recipe=rm.Recipe(epochs=1, batch_size=25, lr=0.1))
    with pytest.raises(ProblemError, match="no common batch"):
        problem = _problem()
        problem.batch(problem.train, torch.arange(2), torch.device("cpu"))


def test_restricting_and_fingerprints_follow_the_sets() -> None:
    problem = _problem()
    assert set(problem.restrict(["b"]).train) == {"b"}
    assert problem.fingerprint() != _problem(train={"a": Own(24, 5), "b": Own(10, 2)}).fingerprint()
    assert problem.fingerprint() == _problem().fingerprint()


def test_sets_without_an_index_are_left_out() -> None:
    problem = _problem()
    none = torch.arange(0)
    assert set(draw(problem, problem.train, {"a": torch.arange(2), "b": none}, torch.device("cpu"))) == {"a"}
    shared = _problem(train=[(torch.ones(4), {"a": torch.ones(())})] * 8)
    assert set(draw(shared, shared.train, {ALL: torch.arange(2)}, torch.device("cpu"))) == {ALL}
