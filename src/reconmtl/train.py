"""Train: one loop, on Lightning Fabric; probing is training with a recorder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from reconmtl.conflicts import ConflictLog
from reconmtl.errors import ProblemError, RunError, nearest
from reconmtl.evaluation import Machine, evaluate
from reconmtl.files import write_json
from reconmtl.plan import Plan
from reconmtl.probing import Probe
from reconmtl.problem import Problem, call
from reconmtl.progress import bar
from reconmtl.randomness import seeded
from reconmtl.runs import (
    Run,
    Values,
    describe,
    environment,
    load_checkpoint,
    new_folder,
    plain_values,
    save_checkpoint,
)
from reconmtl.single import SingleTasks, for_one
from reconmtl.splitting import check_optimizer, split

Method = Literal["joint", "single"]
NormStats = Literal["per-task", "shared"]
NORM_STATS = get_args(NormStats)
BALANCERS = ("joint",)
EVALUATIONS = 10
"""Evaluations spread over a training, the last one after the last epoch."""


@dataclass(frozen=True)
class _Trained:
    model: nn.Module
    log: ConflictLog | None
    parameters: int
    metrics: Values  # of the test set after the last epoch; empty where training stopped before


def _train(
    problem: Problem,
    *,
    plan: Plan | None,
    seed: int,
    record: int,
    overhead: float | None = None,
    machine: Machine,
    description: str,
    stop: int | None = None,
    norm_stats: NormStats = "per-task",
    metrics: Path | None = None,
) -> _Trained:
    """Train one network from scratch under one seed, for `stop` epochs of the recipe's schedule (None: all)."""
    recipe = problem.recipe
    steps = len(problem.train) // recipe.batch_size
    if not recipe.drop_last and len(problem.train) % recipe.batch_size:
        steps += 1
    if steps == 0:
        raise ProblemError(
            f"The training set has {len(problem.train)} samples, fewer than one batch of {recipe.batch_size}: lower "
            "batch_size or pass drop_last=False."
        )
    steps = min(steps, machine.max_batches or steps)
    epochs = recipe.epochs if stop is None else stop
    fabric = machine.fabric()
    # Batches come from a generator of their own: every method sees the same ones, whatever it draws while training.
    shuffle = torch.Generator().manual_seed(seed)
    with seeded(seed), bar(epochs * steps, description) as progress:
        model = problem.model()
        if plan is not None:
            model = split(model, plan, norm_stats=norm_stats, sample=problem.sample())
        model = fabric.to_device(model)
        torch.manual_seed(seed)  # drawing the weights of one network more or less must not move dropout
        optimizer = recipe.make_optimizer(model)
        check_optimizer(model, optimizer)
        reached: set[nn.Parameter] = set()
        values: Values = {}
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(recipe.milestones), gamma=recipe.gamma)
        probe = Probe(model, every=record, overhead=overhead, shared=problem.shared) if record else None
        evaluated = {math.ceil(recipe.epochs * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
        for epoch in range(1, epochs + 1):
            model.train()
            order = torch.randperm(len(problem.train), generator=shuffle)
            total = torch.zeros((), device=fabric.device)
            for indices in order.split(recipe.batch_size)[:steps]:
                inputs, targets = problem.batch(problem.train, indices, fabric.device)
                with fabric.autocast():
                    losses = problem.losses(call(model, inputs), targets)
                if losses:
                    optimizer.zero_grad()
                    loss = torch.stack([v.detach() for v in losses.values()]).sum()
                    if probe is not None:
                        probe.backward(losses)
                    else:
                        fabric.backward(torch.stack(list(losses.values())).sum())
                    if epoch == 1:
                        reached.update(p for p in model.parameters() if p.grad is not None)
                    optimizer.step()
                    total += loss
                progress.update()
            schedule.step()
            mean = float(total) / steps
            if not math.isfinite(mean):
                raise RunError(
                    f"{description}: the loss is {mean} in epoch {epoch}. Lower the learning rate "
                    f"(lr = {recipe.lr}), or look for a loss that divides by zero."
                )
            progress.set_postfix_str(f"epoch {epoch}/{epochs}, loss {mean:.3f}")
            entry: dict[str, object] = {"epoch": epoch, "tasks": list(problem.task_names), "loss": mean}
            if stop is None and (epoch == epochs or (metrics is not None and epoch in evaluated)):
                values = evaluate(problem, model, problem.test, machine=machine)
                entry["test"] = plain_values(values)
                if problem.val is not None:
                    entry["val"] = plain_values(evaluate(problem, model, problem.val, machine=machine))
            if metrics is not None:
                with metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
    # Single-task networks are often joint ones: what their only task never reaches has no gradient and does not count.
    counted = reached if len(problem.tasks) == 1 else model.parameters()
    return _Trained(model, None if probe is None else probe.log, sum(p.numel() for p in counted), values)


def _overridden(problem: Problem, overrides: Mapping[str, Any]) -> Problem:
    return problem.replace(recipe=problem.recipe.override(**overrides)) if overrides else problem


def probe(
    problem: Problem,
    *,
    epochs: int,
    balancer: str = "joint",
    seed: int = 0,
    every: int = 1,
    overhead: float | None = None,
    out: str | Path | None = None,
    machine: Machine | None = None,
) -> ConflictLog:
    """Train for the first epochs of the problem's schedule and record how the tasks' gradients relate.

    Args:
        problem: What is trained.
        epochs: The first so many epochs of `problem.recipe`; its milestones stay where they are.
        balancer: How the shared gradient is formed; "joint" is the sum of the task gradients.
        seed: Of initialisation and batches.
        every: Measure one step of so many.
        overhead: Instead: the share of training time that measuring may add, e.g. 0.1. Which steps are measured then
            depends on times; what is trained does not.
        out: Folder to write the log to.
        machine: Where and how it runs.

    Returns:
        The log.

    Raises:
        ReconError: If epochs exceed the schedule, the balancer is unknown, or nothing is shared.

    Reference: Shi et al., Recon, ICLR 2023, Algorithm 1.
    """
    _check_arguments(problem, "joint", None, balancer, every, (seed,), "per-task")
    if not isinstance(epochs, int) or not 1 <= epochs <= problem.recipe.epochs:
        raise ProblemError(f"epochs = {epochs!r}: expected 1 to {problem.recipe.epochs}, the length of the schedule.")
    if every < 1:
        raise ProblemError(f"every = {every!r}: expected a whole number of steps, at least 1.")
    trained = _train(
        problem,
        plan=None,
        seed=seed,
        record=every,
        overhead=overhead,
        machine=machine or Machine(),
        description=f"probe seed {seed}",
        stop=epochs,
    )
    assert trained.log is not None
    if out is not None:
        trained.log.save(out)
    return trained.log


def fit(
    problem: Problem,
    *,
    method: Method = "joint",
    plan: Plan | None = None,
    balancer: str | None = None,
    record: int = False,
    seeds: Sequence[int] = (0,),
    norm_stats: NormStats = "per-task",
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    machine: Machine | None = None,
    **recipe_overrides: Any,  # noqa: ANN401 fields of Recipe
) -> list[Run]:
    """Train a method from scratch, once per seed, and judge the last model on the test set.

    Args:
        problem: What is trained.
        method: "joint" trains one network on the sum of the losses; "single" one network per task.
        plan: Layers to split beforehand.
        balancer: How the shared gradient is formed; None or "joint" is the sum of the task gradients.
        record: Record task gradients while training: True every step, m one of m steps.
        seeds: Of initialisation and batches. One seed gives every method the same shared weights and batches.
        norm_stats: What split networks do with running statistics, see `split`.
        out: Folder; each seed writes to its own `seed<k>` in it.
        resume: Skip seeds that are finished in `out`.
        overwrite: Replace what is in `out`.
        machine: Where and how it runs.
        **recipe_overrides: Fields of the recipe to change.

    Returns:
        A Run per seed.

    Raises:
        ReconError: If an argument is unknown or contradicts another; before anything is trained.

    Reference: Shi et al., Recon, ICLR 2023, Algorithm 1 (the second training).
    """
    problem = _overridden(problem, recipe_overrides)
    _check_arguments(problem, method, plan, balancer, record, seeds, norm_stats)
    job = _Job(problem, method, plan, int(record), norm_stats, machine or Machine())
    folder = None if out is None else Path(out)
    return [_fit_seed(job, seed, folder, resume, overwrite) for seed in seeds]


def _check_arguments(
    problem: Problem,
    method: str,
    plan: Plan | None,
    balancer: str | None,
    record: int,
    seeds: Sequence[int],
    norm_stats: str,
) -> None:
    """Raise one error that lists every argument of `fit` that cannot be."""
    faults = []
    if method not in get_args(Method):
        faults.append(f"Unknown method {method!r}. {nearest(str(method), get_args(Method))}")
    if balancer is not None and balancer not in BALANCERS:
        faults.append(f"Unknown balancer {balancer!r}. {nearest(str(balancer), BALANCERS)}")
    if norm_stats not in NORM_STATS:
        faults.append(f"Unknown norm_stats {norm_stats!r}. {nearest(str(norm_stats), NORM_STATS)}")
    if not isinstance(record, int) or record < 0:
        faults.append(f"record = {record!r}: expected True (every step), or a whole number m: one of m steps.")
    if method == "single" and (plan is not None or record):
        faults.append("Single-task training shares nothing: `plan` and `record` do not apply to it.")
    if plan is not None and not isinstance(plan, Plan):
        faults.append(f"plan: expected a Plan, got {type(plan).__name__}; read a file with `rm.Plan.load(path)`.")
    elif plan is not None and set(plan.tasks) != set(problem.task_names):
        faults.append(f"The plan is for tasks {list(plan.tasks)}, the problem has {list(problem.task_names)}.")
    elif plan is not None and not plan.layers:
        faults.append("The plan splits no layer; pass plan=None for joint training.")
    faults += check_seeds(seeds)
    if faults:
        raise ProblemError("\n".join(faults))


def check_seeds(seeds: object) -> list[str]:
    """What is wrong with a list of seeds, as sentences; empty if nothing is."""
    if not isinstance(seeds, Sequence) or isinstance(seeds, str):
        return [f"seeds = {seeds!r}: expected a list of whole numbers, e.g. (0, 1, 2)."]
    wrong = [s for s in seeds if not isinstance(s, int) or isinstance(s, bool) or not 0 <= s < 2**32]
    if wrong or not seeds or len(set(seeds)) != len(seeds):
        return [f"seeds = {list(seeds)}: expected different whole numbers from 0 to 2**32 - 1, at least one."]
    return []


@dataclass(frozen=True)
class _Job:
    """What `fit` was asked for, but for the seed."""

    problem: Problem
    method: Method
    plan: Plan | None
    record: int
    norm_stats: NormStats
    machine: Machine

    def config(self, seed: int) -> dict[str, Any]:
        """Everything that was chosen, as plain JSON data."""
        config = {
            "format": "reconmtl.config/1",
            "problem": self.problem.name,
            "data": self.problem.fingerprint(),
            "method": self.method,
            "seed": seed,
            "record": self.record,
            "norm_stats": self.norm_stats,
            "recipe": self.problem.recipe.to_dict(),
            "plan": None if self.plan is None else self.plan.to_dict(),
            "machine": {"precision": self.machine.precision, "max_batches": self.machine.max_batches},
        }
        return cast("dict[str, Any]", json.loads(json.dumps(config)))  # as it will be read again


def _fit_seed(job: _Job, seed: int, out: Path | None, resume: bool, overwrite: bool) -> Run:
    problem, plan, config = job.problem, job.plan, job.config(seed)
    folder = None if out is None else new_folder(out / f"seed{seed}", resume=resume, overwrite=overwrite)
    if folder is not None:
        if (folder / "result.json").exists():  # with resume; an existing folder is refused otherwise
            before = Run.load(folder).config
            changed = [f"{n} = {before.get(n)!r}, now {v!r}" for n, v in config.items() if before.get(n) != v]
            if changed:
                raise RunError(f"{folder} holds a run with other settings: {'; '.join(changed)}. Choose another `out`.")
            return open_run(folder, problem)
        write_json(folder / "config.json", config)
        write_json(folder / "env.json", environment())
        if plan is not None:
            plan.save(folder / "plan.json")
    metrics = None if folder is None else folder / "metrics.jsonl"
    if metrics is not None:
        metrics.unlink(missing_ok=True)
    label = describe(job.method, plan)
    started = time.perf_counter()
    if job.method == "single":
        parts = {
            name: _train(
                for_one(problem, name),
                plan=None,
                seed=seed,
                record=0,
                machine=job.machine,
                description=f"{label} {name} seed {seed}",
                metrics=metrics,
            )
            for name in problem.task_names
        }
        model: nn.Module = SingleTasks({n: p.model for n, p in parts.items()})
        log, parameters = None, sum(p.parameters for p in parts.values())
        values = {task: of for p in parts.values() for task, of in p.metrics.items()}
        network = type(next(iter(parts.values())).model).__name__
    else:
        trained = _train(
            problem,
            plan=plan,
            seed=seed,
            record=job.record,
            machine=job.machine,
            description=f"{label} seed {seed}",
            norm_stats=job.norm_stats,
            metrics=metrics,
        )
        model, log, parameters, values = trained.model, trained.log, trained.parameters, trained.metrics
        network = type(model).__name__
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    model = model.cpu().eval()  # several seeds' networks would fill an accelerator
    run = Run(
        method=job.method,
        label=label,
        seed=seed,
        metrics=values,
        directions={t.name: {m.name: m.best for m in t.metrics} for t in problem.tasks},
        parameters=parameters,
        seconds=seconds,
        fingerprint=problem.fingerprint(),
        network=network,
        config=config,
        plan=plan,
        log=log,
        path=folder,
        build=lambda _: model,
    )
    if folder is not None:
        if log is not None:
            log.save(folder / "log")
        save_checkpoint(folder / "last.ckpt", model, {"label": label, "seed": seed})
        write_json(folder / "result.json", run.to_dict())  # last: its presence says that the run is finished
    return run


def open_run(path: str | Path, problem: Problem) -> Run:
    """Read a finished run whose `model()` can be rebuilt, because its problem is known."""

    def build(run: Run) -> nn.Module:
        assert run.path is not None
        if run.method == "single":
            model: nn.Module = SingleTasks({n: for_one(problem, n).model() for n in problem.task_names})
        else:
            model = problem.model()
            if run.plan is not None:
                model = split(model, run.plan, norm_stats=run.config["norm_stats"], sample=problem.sample())
        state = load_checkpoint(run.path / "last.ckpt")
        missing, unexpected = model.load_state_dict(state, strict=False)
        wrong = [n for n in [*missing, *unexpected] if not n.endswith("_extra_state")]
        if wrong:
            raise RunError(f"{run.path} was trained with another network: {wrong[0]!r} is in one of them only.")
        return model.eval()

    return replace(Run.load(path), build=build)
