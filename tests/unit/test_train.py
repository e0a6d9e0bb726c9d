import json
import os
import random
import signal
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reconmtl as rm
from reconmtl.errors import Interrupted, OptimizerError, ProblemError, ReconError, RunError, UnknownNameError
from reconmtl.evaluation import Machine
from reconmtl.loop import Init
from reconmtl.problems import planted
from reconmtl.randomness import seeded
from reconmtl.single import SingleTasks
from reconmtl.train import open_run


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.2)
        self.second = nn.Linear(6, 6)
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 1), "b": nn.Linear(6, 1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.second(self.drop(torch.relu(self.norm(self.first(x)))))
        return {t: head(z).squeeze(1) for t, head in self.heads.items()}


class Points:
    def __init__(self, n: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 4, generator=draw)
        self.y = {"a": self.x.sum(1), "b": self.x[:, 0] - self.x[:, 1]}
        self.seen: list[int] = []
        self.fingerprint = f"points-{n}-{seed}"

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(i)
        return self.x[i], {t: y[i] for t, y in self.y.items()}


def _problem(**changes: Any) -> rm.Problem:
    def error(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs()

    values: dict[str, Any] = {
        "model": Net,
        "tasks": [
            rm.Task(t, loss=nn.functional.mse_loss, metrics=[rm.Metric("mae", error, best="min")]) for t in ("a", "b")
        ],
        "train": Points(40, 1),
        "test": Points(16, 2),
        "recipe": rm.Recipe(epochs=4, batch_size=8, lr=0.05, momentum=0.9, milestones=(2, 3)),
    }
    return rm.Problem(**{**values, **changes})


def _by_hand(problem: rm.Problem, seed: int, task: str | None = None) -> nn.Module:
    """The training loop of a textbook; `task` alone if given."""
    torch.manual_seed(seed)
    model = problem.model()
    torch.manual_seed(seed)
    recipe = problem.recipe
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    order = torch.Generator().manual_seed(seed)
    data = problem.train
    assert isinstance(data, Points)
    for epoch in range(recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.gamma ** sum(epoch >= m for m in recipe.milestones)
        indices = torch.randperm(len(data), generator=order)
        for batch in indices.split(recipe.batch_size):
            if len(batch) < recipe.batch_size:
                continue
            out = model(data.x[batch])
            names = [task] if task else ["a", "b"]
            loss = sum(nn.functional.mse_loss(out[t], data.y[t][batch]) for t in names)
            optimizer.zero_grad()
            assert isinstance(loss, Tensor)
            loss.backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("record", [0, 1, 3])
def test_joint_training_is_the_textbook_loop(record: int) -> None:
    problem = _problem()
    run = rm.fit(problem, record=record, seeds=(3,))[0]
    with seeded(0):
        expected = _by_hand(problem, 3)
    for (name, p), q in zip(expected.state_dict().items(), run.model().state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6, msg=name)
    assert (run.log is not None) == bool(record)
    if run.log is not None:
        assert run.log.steps == {1: 20, 3: 7}[record]


def test_single_training_is_one_textbook_loop_per_task() -> None:
    problem = _problem()
    run = rm.fit(problem, method="single", seeds=(3,))[0]
    model = run.model()
    assert isinstance(model, SingleTasks)
    for task in ("a", "b"):
        with seeded(0):
            expected = _by_hand(problem, 3, task)
        network = model.networks[task]
        torch.testing.assert_close(network.get_parameter("first.weight"), expected.get_parameter("first.weight"))
    # the other task's head is never reached: it counts neither as trained nor in the size
    one = sum(p.numel() for n, p in Net().named_parameters() if "heads.b" not in n)
    assert run.parameters == 2 * one
    assert run.label == "single-task"


def test_a_factory_of_single_task_networks_is_used() -> None:
    asked: list[str] = []

    def single(task: str) -> nn.Module:
        asked.append(task)
        return Net()

    rm.fit(_problem(single=single), method="single", epochs=1, milestones=())
    assert asked == ["a", "b"]


def test_methods_of_one_seed_start_equal_and_see_the_same_batches() -> None:
    started: list[dict[str, Tensor]] = []

    def make() -> nn.Module:
        model = Net()
        started.append({k: v.clone() for k, v in model.state_dict().items()})
        return model

    problem = _problem(model=make)
    data = problem.train
    assert isinstance(data, Points)
    seen = []
    plan = rm.Plan(tasks=["a", "b"], layers=["second"])
    for options in ({"plan": None}, {"plan": plan}, {"plan": plan, "record": 1}, {"method": "single"}):
        data.seen.clear()
        rm.fit(problem, epochs=1, milestones=(), **options)
        seen.append([i for i in data.seen if True])
    for state in started[1:]:
        for name, value in started[0].items():
            assert torch.equal(state[name], value)
    joint = seen[0]
    assert len(joint) == 40
    assert seen[1][-40:] == joint  # a split looks at a sample first
    assert seen[2][-40:] == joint
    assert seen[3] == joint * 2


def test_probe_is_the_first_part_of_the_schedule() -> None:
    problem = _problem()
    log = rm.probe(problem, epochs=3, seed=3)
    whole = rm.fit(problem, record=True, seeds=(3,))[0].log
    assert whole is not None
    assert log.steps == 15
    torch.testing.assert_close(log.grams, whole.grams[:15])
    for wrong in (0, 5):
        with pytest.raises(ProblemError, match="expected 1 to 4"):
            rm.probe(problem, epochs=wrong)
    with pytest.raises(ProblemError, match="every = 0"):
        rm.probe(problem, epochs=1, every=0)


def test_the_planted_layers_rank_first_and_splitting_them_helps() -> None:
    problem = planted.make()
    ranking = rm.probe(problem, epochs=2).rank(severity=-0.1)
    assert set(ranking.layers[:2]) == {f"blocks.{i}" for i in planted.FIGHTING}
    assert ranking.scores[1] > 2 * ranking.scores[2]
    joint, recon, single = (
        rm.fit(problem, **options)[0]
        for options in ({}, {"plan": ranking.top(2), "record": True}, {"method": "single"})
    )
    assert recon.label == "joint w/ Recon"
    for task in planted.TASKS:
        assert joint.metrics[task]["mse"] > 5 * recon.metrics[task]["mse"]
        assert recon.metrics[task]["mse"] < 1.5 * single.metrics[task]["mse"]
    assert recon.log is not None
    assert not {f"blocks.{i}" for i in planted.FIGHTING} & set(recon.log.layers)
    assert rm.compare([joint, recon, single]).rows[1].delta_m is not None


def test_a_split_run_differs_from_the_joint_one_and_counts_its_copies() -> None:
    problem = _problem()
    plan = rm.Plan(tasks=["a", "b"], layers=["second"])
    joint, split = rm.fit(problem)[0], rm.fit(problem, plan=plan)[0]
    assert joint.metrics != split.metrics
    assert split.parameters == joint.parameters + 42


def test_global_random_states_come_back_also_after_an_error() -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 the global state is what is tested
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    rm.fit(_problem(), epochs=1, milestones=())
    with pytest.raises(RunError, match="the loss is"):
        rm.fit(_problem(), lr=1e30, epochs=3, milestones=())
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_equal_seeds_give_equal_runs_and_different_ones_do_not() -> None:
    problem = _problem()
    first, second = rm.fit(problem, seeds=(1, 2), epochs=2, milestones=())
    again = rm.fit(problem, seeds=(1,), epochs=2, milestones=())[0]
    assert first.metrics == again.metrics != second.metrics


def test_a_run_folder_holds_everything_and_opens_again(tmp_path: Path) -> None:
    problem = _problem(val=Points(8, 3))
    plan = rm.Plan(tasks=["a", "b"], layers=["second"])
    run = rm.fit(problem, plan=plan, record=True, seeds=(4,), out=tmp_path)[0]
    folder = tmp_path / "seed4"
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "env.json",
        "last.ckpt",
        "log",
        "metrics.jsonl",
        "plan.json",
        "result.json",
        "timing.json",
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["test"] == run.metrics
    assert set(lines[-1]["val"]) == {"a", "b"}
    assert json.loads((folder / "config.json").read_text())["recipe"]["milestones"] == [2, 3]
    again = open_run(folder, problem)
    assert again.metrics == run.metrics
    assert again.plan == plan
    model = again.model().eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        for task, output in run.model().eval()(x).items():
            assert torch.equal(model(x)[task], output)


def test_an_existing_run_is_refused_resumed_or_replaced(tmp_path: Path) -> None:
    problem = _problem()
    run = rm.fit(problem, out=tmp_path, epochs=1, milestones=())[0]
    with pytest.raises(RunError, match=r"--resume.*--overwrite"):
        rm.fit(problem, out=tmp_path, epochs=1, milestones=())
    resumed = rm.fit(problem, out=tmp_path, resume=True, epochs=1, milestones=())[0]
    assert resumed.seconds == run.seconds  # read, not trained again
    replaced = rm.fit(problem, out=tmp_path, overwrite=True, epochs=2, milestones=())[0]
    assert len((tmp_path / "seed0" / "metrics.jsonl").read_text().splitlines()) == 2
    assert replaced.metrics != run.metrics


def test_a_task_without_targets_in_a_batch_is_left_out_of_that_step() -> None:
    class Sparse(Points):
        def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Any]]:
            x, y = super().__getitem__(i)
            return x, {"a": y["a"], "b": y["b"] if i < 3 else None}

    run = rm.fit(_problem(train=Sparse(40, 1)), record=True, epochs=2, milestones=())[0]
    assert run.log is not None
    missing = run.log.cosines().isnan().all(2).all(1)
    assert 0 < missing.sum() < run.log.steps == 10


def test_max_batches_is_a_smoke_test() -> None:
    run = rm.fit(_problem(), record=True, machine=Machine(max_batches=2))[0]
    assert run.log is not None
    assert run.log.steps == 4 * 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "jiont"}, ProblemError, "Nearest: 'joint'"),
        ({"balancer": "joints"}, ProblemError, "Nearest: 'joint'"),
        ({"norm_stats": "pertask"}, ProblemError, "Nearest: 'per-task'"),
        ({"plan": "plan.json"}, ProblemError, r"rm\.Plan\.load"),
        ({"plan": rm.Plan(tasks=["a", "c"], layers=["second"])}, ProblemError, r"the problem has \['a', 'b'\]"),
        ({"plan": rm.Plan(tasks=["a", "b"], layers=[])}, ProblemError, "splits no layer"),
        ({"seeds": (-1,)}, ProblemError, "whole numbers"),
        ({"seeds": ("a",)}, ProblemError, "whole numbers"),
        ({"seeds": 0}, ProblemError, "list of whole numbers"),
        ({"method": "single", "record": True}, ProblemError, "shares nothing"),
        ({"seeds": (1, 1)}, ProblemError, "different whole numbers"),
        ({"seeds": ()}, ProblemError, "at least one"),
        ({"record": -1}, ProblemError, "record = -1"),
        ({"epoch": 3}, UnknownNameError, "Nearest: 'epochs'"),
        ({"batch_size": 64}, ProblemError, "fewer than one batch"),
    ],
)
def test_wrong_arguments_are_named_before_training(
    options: dict[str, Any], error: type[ReconError], message: str
) -> None:
    with pytest.raises(error, match=message):
        rm.fit(_problem(), **options)


def test_all_wrong_arguments_are_named_at_once() -> None:
    with pytest.raises(ProblemError) as error:
        rm.fit(_problem(), method="jiont", balancer="cagrat", seeds=())
    for piece in ("'jiont'", "'cagrat'", "seeds = []"):
        assert piece in str(error.value)


@pytest.mark.parametrize(
    "changed", [{"lr": 0.5}, {"record": True}, {"plan": rm.Plan(tasks=["a", "b"], layers=["second"])}]
)
def test_resume_never_hands_out_another_methods_run(changed: dict[str, Any], tmp_path: Path) -> None:
    problem = _problem()
    rm.fit(problem, out=tmp_path, epochs=1, milestones=())
    with pytest.raises(RunError, match="holds a run with other settings"):
        rm.fit(problem, out=tmp_path, resume=True, epochs=1, milestones=(), **changed)
    with pytest.raises(RunError, match="data = "):
        rm.fit(problem.replace(train=Points(48, 1)), out=tmp_path, resume=True, epochs=1, milestones=())


def _lacking(content: Any) -> list[tuple[str, dict[str, Any]]]:
    """A configuration without each of its keys, at any depth."""
    found = []
    for name, value in content.items():
        found.append((name, {n: v for n, v in content.items() if n != name}))
        if name in ("recipe", "machine"):
            found += [(f"{name}.{n}", content | {name: inner}) for n, inner in _lacking(value)]
    return found


def test_a_run_that_is_older_than_an_option_goes_on_as_it_was_made(tmp_path: Path) -> None:
    problem = _problem()
    options: dict[str, Any] = {"out": tmp_path, "epochs": 1, "milestones": (), "momentum": 0.0}
    run = rm.fit(problem, **options)[0]
    file = tmp_path / "seed0" / "config.json"
    content = json.loads(file.read_text())
    assert content == run.config and content["init"] == "copy"
    needed = {"recipe", *(f"recipe.{n}" for n in ("epochs", "batch_size", "lr")), "format", "problem", "data"}
    needed |= {"method", "seed"}
    kept = set()
    for name, older in _lacking(content):
        file.write_text(json.dumps(older))
        try:
            assert rm.fit(problem, resume=True, **options)[0].metrics == run.metrics
            kept.add(name)
        except RunError as error:
            first = "recipe.epochs" if name == "recipe" else name
            assert name in needed and f"{first} = not said, now " in str(error)
    assert kept == {n for n, _ in _lacking(content)} - needed
    file.write_text(json.dumps({n: v for n, v in content.items() if n != "init"}))
    with pytest.raises(RunError, match=r"other settings: init = 'copy', now 'fresh'"):
        rm.fit(problem, resume=True, init="fresh", **options)
    file.write_text(json.dumps(content | {"init": "fresh"}))
    with pytest.raises(RunError, match=r"other settings: init = 'fresh', now 'copy'"):
        rm.fit(problem, resume=True, **options)


@pytest.mark.parametrize("precision", ["64-true", "16-mixed", "bf16-true", "half"])
def test_precisions_that_would_be_ignored_or_wrong_are_refused(precision: str) -> None:
    with pytest.raises(ProblemError, match="expected one of"):
        Machine(precision=precision)


def test_bfloat16_training_runs_and_is_recorded() -> None:
    run = rm.fit(_problem(), record=True, machine=Machine(precision="bf16-mixed"), epochs=1, milestones=())[0]
    exact = rm.fit(_problem(), record=True, epochs=1, milestones=())[0]
    assert run.log is not None
    assert exact.log is not None
    assert run.metrics != exact.metrics
    assert (run.log.cosines() - exact.log.cosines()).abs().max() < 0.2


def test_the_trained_network_comes_ready_to_predict() -> None:
    model = rm.fit(_problem(), epochs=1, milestones=())[0].model()
    assert not any(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_parameter_groups_must_hold_every_parameter_of_the_split_model() -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": [p for n, p in model.named_parameters() if "per_task" not in n]}]

    plan = rm.Plan(tasks=["a", "b"], layers=["second"])
    with pytest.raises(OptimizerError, match=r"second\.per_task"):
        rm.fit(_problem(), plan=plan, param_groups=groups)


def test_copies_start_as_the_layer_or_drawn_anew() -> None:
    """Without a learning rate, networks end as they begin."""
    problem = planted.make()
    plan = rm.Plan(tasks=planted.TASKS, layers=["blocks.1", "blocks.4"])
    plain = dict(problem.model().named_parameters())
    assert plain
    ends = {}
    for init in get_args(Init):
        (run,) = rm.fit(problem, plan=plan, init=init, epochs=1, lr=0.0)
        ends[init] = {n: p.detach() for n, p in run.model().named_parameters()}
        assert run.config.get("init", "copy") == init
    moved = {n for n, p in ends["copy"].items() if not torch.equal(p, ends["fresh"][n])}
    assert moved == {n for n in ends["copy"] if n.startswith(("blocks.1.", "blocks.4."))}
    one, other = (ends["fresh"][n] for n in sorted(moved)[:2])
    same, again = (ends["copy"][n] for n in sorted(moved)[:2])
    assert torch.equal(same, again)
    assert not torch.equal(one, other)
    with pytest.raises(ProblemError, match="Unknown init 'new'"):
        rm.fit(problem, plan=plan, init="new")  # type: ignore[arg-type]


def test_single_task_training_goes_on_in_the_task_where_it_was_stopped(tmp_path: Path) -> None:
    whole = planted.make()
    options: dict[str, Any] = {"method": "single", "epochs": 3, "machine": Machine(accelerator="cpu")}
    (expected,) = rm.fit(whole, out=tmp_path / "whole", **options)
    problem, fetch, steps = planted.make(), planted.PlantedData.batch, []

    def stopping(indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        steps.append(len(indices))
        if len(steps) == 16 * 3 + 20:  # the second task's second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return fetch(problem.train, indices)

    problem.train.batch = stopping
    with pytest.raises(Interrupted, match="epoch 2 of 3"):
        rm.fit(problem, out=tmp_path / "stopped", **options)
    (found,) = rm.fit(planted.make(), out=tmp_path / "stopped", resume=True, **options)
    assert found.metrics == expected.metrics
    lines = [(tmp_path / n / "seed0" / "metrics.jsonl").read_text() for n in ("whole", "stopped")]
    assert lines[0] == lines[1]


def test_a_null_changes_nothing_that_is_trained_and_comes_back_from_disk(tmp_path: Path) -> None:
    plain = rm.probe(_problem(), epochs=2)
    log = rm.probe(_problem(), epochs=2, null=True, out=tmp_path)
    assert torch.equal(log.grams, plain.grams) and plain.null is None
    again = rm.probe(_problem(), epochs=2, null=True, out=tmp_path, resume=True)
    for found in (log, again):
        assert found.null is not None and found.null.steps == log.steps
        assert found.null.layers == log.layers
    assert again.null is not None and log.null is not None and torch.equal(again.null.grams, log.null.grams)
    with pytest.raises(RunError, match="null"):
        rm.probe(_problem(), epochs=2, out=tmp_path / "plain")
        rm.probe(_problem(), epochs=2, null=True, out=tmp_path / "plain", resume=True)


def test_a_loss_that_draws_numbers_draws_the_same_ones_beside_a_null() -> None:
    def noisy(output: Tensor, target: Tensor) -> Tensor:
        return ((output + torch.rand_like(output) - target) ** 2).mean()

    tasks = [rm.Task(t, loss=noisy) for t in ("a", "b")]
    plain, other = (rm.probe(_problem(tasks=tasks), epochs=1, null=n) for n in (False, True))
    assert torch.equal(plain.grams, other.grams)
