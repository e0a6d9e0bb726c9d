"""Train: one loop, on Lightning Fabric; probing is training with a recorder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from torch import nn

from reconmtl.architectures import Way, check_method, way
from reconmtl.balancers import label_of
from reconmtl.checkpoints import read_checkpoint, restore_model, save_checkpoint
from reconmtl.conflicts import ConflictLog
from reconmtl.errors import ProblemError, ReconError, RunError, nearest
from reconmtl.evaluation import Machine
from reconmtl.files import read_json, write_json
from reconmtl.interruptions import asked_politely
from reconmtl.loggers import Logger, Loggers
from reconmtl.loop import Init, Job, NormStats, Trained, train
from reconmtl.plan import Plan
from reconmtl.problem import Problem
from reconmtl.runs import Run, changes, describe, environment, new_folder
from reconmtl.single import SingleTasks, for_one
from reconmtl.splitting import split

NORM_STATS = get_args(NormStats)
INITS = get_args(Init)
ABSENT: dict[str, Any] = {
    "balancer": None,
    "record": 0,
    "overhead": None,
    "norm_stats": "per-task",
    "init": "copy",
    "plan": None,
    "recipe": {
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "milestones": [],
        "gamma": 0.1,
        "param_groups": None,
        "drop_last": True,
    },
    "machine": {"precision": "32-true", "max_batches": None, "compile": None, "processes": 1, "sync_batchnorm": False},
}
"""What the training of a folder did whose `config.json` lacks an option, because it is older than the option."""


def _overridden(problem: Problem, overrides: Mapping[str, Any]) -> Problem:
    return problem.replace(recipe=problem.recipe.override(**overrides)) if overrides else problem


def probe(
    problem: Problem,
    *,
    epochs: int,
    balancer: object = "joint",
    seed: int = 0,
    every: int = 1,
    overhead: float | None = None,
    null: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    machine: Machine | None = None,
) -> ConflictLog:
    """Train for the first epochs of the problem's schedule and record how the tasks' gradients relate.

    Args:
        problem: What is trained.
        epochs: The first so many epochs of `problem.recipe`; its milestones stay where they are.
        balancer: How the shared gradient is formed, a name such as "cagrad:c=0.4" or an object, see `Balancer`; "joint"
            is the sum of the task gradients.
        seed: Of initialisation and batches.
        every: Measure one step of so many.
        overhead: Instead: the share of training time that measuring may add, e.g. 0.1. Which steps are measured then
            depends on times; what is trained does not.
        null: Record too what the noise of a batch alone does to the tasks' gradients: those of one half of the batch
            less those of the other, from the same forward pass. `nulls.excess` then samples how often unrelated
            gradients would conflict at each layer. Measuring takes about twice as long; what is trained stays the same.
        out: Folder to write the log to, and the state of the training while it runs.
        resume: Go on in `out` where a probe was stopped; one that is finished is read.
        overwrite: Replace what is in `out`.
        machine: Where and how it runs.

    Returns:
        The log.

    Raises:
        ReconError: If epochs exceed the schedule, the balancer is unknown, nothing is shared, or a null is asked for
            where the samples of a batch cannot be told apart or several processes train.

    Reference: Shi et al., Recon, ICLR 2023, Algorithm 1.
    """
    _check_arguments(problem, "joint", None, balancer, every, (seed,), "per-task")
    if not isinstance(epochs, int) or not 1 <= epochs <= problem.recipe.epochs:
        raise ProblemError(f"epochs = {epochs!r}: expected 1 to {problem.recipe.epochs}, the length of the schedule.")
    if every < 1:
        raise ProblemError(f"every = {every!r}: expected a whole number of steps, at least 1.")
    if null and (machine or Machine()).ranks().size > 1:
        raise ProblemError("null=True compares the halves of whole batches: it works in one process.")
    job = Job(
        problem=problem,
        plan=None,
        way=way("joint", balancer),
        seed=seed,
        record=every,
        overhead=overhead,
        null=null,
        machine=_usable(machine),
        description=f"probe seed {seed}",
        stop=epochs,
    )
    if out is None:
        log = train(job).log
        assert log is not None
        return log
    config = _plain(
        {
            "format": "reconmtl.config/1",
            "problem": problem.name,
            "data": problem.fingerprint(),
            "method": "probe",
            "balancer": None if balancer in (None, "joint") else label_of(balancer),
            "seed": seed,
            "record": every,
            "overhead": overhead,
            "epochs": epochs,
            "norm_stats": "per-task",
            "recipe": problem.recipe.to_dict(),
            "machine": job.machine.identity(),
        }
        | ({"null": True} if null else {})
    )
    ranks, where = job.machine.ranks(), Path(out)
    folder = ranks.first(lambda: _prepared(where, config, None, resume=resume, overwrite=overwrite))
    if ranks.first(lambda: (folder / "log.json").exists()):
        return ConflictLog.load(folder)
    with asked_politely():
        log = train(replace(job, checkpoint=folder / "last.ckpt")).log
    assert log is not None
    finished = log
    ranks.first(lambda: finished.save(folder))
    ranks.first(lambda: (folder / "last.ckpt").unlink())
    return finished


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(json.dumps(config)))  # as it will be read again


def _prepared(path: Path, config: dict[str, Any], plan: Plan | None, *, resume: bool, overwrite: bool) -> Path:
    """A folder with everything that is known before the work begins; one that is continued must hold the same.

    Raises:
        RunError: If it exists and is not to be continued or replaced, or holds something else.
    """
    folder = new_folder(path, resume=resume, overwrite=overwrite)
    file = folder / "config.json"
    if not file.exists():
        write_json(file, config)  # first: it says that the folder is one of ours
    if not (folder / "env.json").exists():
        write_json(folder / "env.json", environment())
    if plan is not None and not (folder / "plan.json").exists():
        plan.save(folder / "plan.json")
    before = read_json(file, RunError)
    if not isinstance(before, dict):
        raise RunError(f"{file}: expected an object, found {type(before).__name__}. Delete {folder} to begin anew.")
    if changed := changes(before, config, ABSENT | ({"record": 1} if config["method"] == "probe" else {})):
        raise RunError(f"{folder} holds a run with other settings: {'; '.join(changed)}. Choose another `out`.")
    return folder


def fit(
    problem: Problem,
    *,
    method: str = "joint",
    plan: Plan | None = None,
    balancer: object = None,
    record: int = False,
    seeds: Sequence[int] = (0,),
    norm_stats: NormStats = "per-task",
    init: Init = "copy",
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    machine: Machine | None = None,
    loggers: Sequence[Logger] = (),
    **recipe_overrides: Any,  # noqa: ANN401 fields of Recipe
) -> list[Run]:
    """Train a method from scratch, once per seed, and judge the last model on the test set.

    Args:
        problem: What is trained.
        method: "joint" trains one network on the sum of the losses; "single" one network per task; a balancer's name,
            with its parameters, e.g. "cagrad:c=0.4", one network with its updates; "mmoe", "cross-stitch", "bmtas" or
            "rotograd" the network that is made of the problem's. See `BALANCERS` and `ARCHITECTURES`.
        plan: Layers to split beforehand; of a tree that "bmtas" finds, splits are added to it.
        balancer: How the shared gradient is formed: a name, one of TorchJD's objects, or a function from the Gram
            matrix to weights, see `Balancer`; None or "joint" is the sum of the task gradients.
        record: Record task gradients while training: True every step, m one of m steps.
        seeds: Of initialisation and batches. One seed gives every method the same shared weights and batches.
        norm_stats: What split networks do with running statistics, see `split`.
        init: How the copies of split layers start, see `split`; "fresh" is nearest to what the published code does.
        out: Folder; each seed writes to its own `seed<k>` in it.
        resume: Go on in `out`: finished seeds are read, one that was stopped continues from its last checkpoint, and
            ends as if it had not been stopped.
        overwrite: Replace what is in `out`.
        machine: Where and how it runs.
        loggers: Where metrics go beside `metrics.jsonl`, see `reconmtl.loggers`.
        **recipe_overrides: Fields of the recipe to change.

    Returns:
        A Run per seed.

    Raises:
        ReconError: If an argument is unknown or contradicts another; before anything is trained.
        Interrupted: If SIGINT or SIGTERM asked to stop; the state is saved in `out`.

    Reference: Shi et al., Recon, ICLR 2023, Algorithm 1 (the second training).
    """
    problem = _overridden(problem, recipe_overrides)
    _check_arguments(problem, method, plan, balancer, record, seeds, norm_stats, init)
    machine = _usable(machine)
    if machine.backend is not None and record:
        text = (
            "A training that records runs as it is, without torch.compile; record=0 (--record 0) lets it be compiled."
        )
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    told = Loggers(loggers if machine.ranks().rank == 0 else ())
    chosen = way(method, balancer)
    asked = _Asked(chosen.change(problem), method, chosen, plan, int(record), norm_stats, init, machine, told)
    folder = None if out is None else Path(out)
    return [_fit_seed(asked, seed, folder, resume, overwrite) for seed in seeds]


def _usable(machine: Machine | None) -> Machine:
    machine = machine or Machine()
    if faults := machine.faults():
        raise ProblemError("\n".join(faults))
    return machine


def _check_arguments(
    problem: Problem,
    method: str,
    plan: Plan | None,
    balancer: object,
    record: int,
    seeds: Sequence[int],
    norm_stats: str,
    init: str = "copy",
) -> None:
    """Raise one error that lists every argument of `fit` that cannot be."""
    faults = check_method(method, balancer)
    if norm_stats not in NORM_STATS:
        faults.append(f"Unknown norm_stats {norm_stats!r}. {nearest(str(norm_stats), NORM_STATS)}")
    if init not in INITS:
        faults.append(f"Unknown init {init!r}. {nearest(str(init), INITS)}")
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
class _Asked:
    """What `fit` was asked for, but for the seed."""

    problem: Problem
    method: str
    way: Way
    plan: Plan | None
    record: int
    norm_stats: NormStats
    init: Init
    machine: Machine
    loggers: Loggers

    def config(self, seed: int) -> dict[str, Any]:
        """Everything that was chosen, as plain JSON data."""
        return _plain(
            {
                "format": "reconmtl.config/1",
                "problem": self.problem.name,
                "data": self.problem.fingerprint(),
                "method": self.method,
                "balancer": None if self.way.balancer is None else label_of(self.way.balancer),
                "seed": seed,
                "record": self.record,
                "norm_stats": self.norm_stats,
                "init": self.init,
                "recipe": self.problem.recipe.to_dict(),
                "plan": None if self.plan is None else self.plan.to_dict(),
                "machine": self.machine.identity(),
            }
        )


def _fit_seed(asked: _Asked, seed: int, out: Path | None, resume: bool, overwrite: bool) -> Run:
    problem, plan, config = asked.problem, asked.plan, asked.config(seed)
    folder, ranks = None, asked.machine.ranks()
    if out is not None:
        own = out / f"seed{seed}"
        folder = ranks.first(lambda: _prepared(own, config, plan, resume=resume, overwrite=overwrite))
        if ranks.first(lambda: _finished(own)):
            try:
                return open_run(folder, problem)
            except ReconError as error:
                raise RunError(f"{error} Delete {folder} and repeat with --resume to train this seed again.") from None
    label = describe(asked.way.label, plan)
    with nullcontext() if folder is None else asked_politely():
        plan = _found_plan(asked, seed, folder)
        job = Job(
            problem=problem,
            plan=plan,
            seed=seed,
            record=asked.record,
            machine=asked.machine,
            description=f"{label} seed {seed}",
            norm_stats=asked.norm_stats,
            way=asked.way,
            init=asked.init,
            metrics=None if folder is None else folder / "metrics.jsonl",
            checkpoint=None if folder is None else folder / "last.ckpt",
            loggers=asked.loggers,
        )
        asked.loggers.start(job.description, config, folder)
        try:
            trained = _singles(job) if asked.method == "single" else train(job)
        finally:
            asked.loggers.close()
    network = trained.model
    if isinstance(network, SingleTasks):
        network = next(iter(network.networks.values()))
    trained.model.zero_grad(set_to_none=True)
    model = trained.model.cpu().eval()  # several seeds' networks would fill an accelerator
    run = Run(
        method=asked.method,
        label=label,
        seed=seed,
        metrics=trained.metrics,
        directions={t.name: {m.name: m.best for m in t.metrics} for t in problem.tasks},
        parameters=trained.parameters,
        seconds=trained.seconds,
        fingerprint=problem.fingerprint(),
        network=type(network).__name__,
        config=config,
        plan=plan,
        log=trained.log,
        path=folder,
        build=lambda _: model,
    )
    if folder is not None:
        ranks.first(lambda: _close(run, model))
    return run


def _found_plan(asked: _Asked, seed: int, folder: Path | None) -> Plan | None:
    """The plan, with what a method's search adds to it; a search that is finished is not done again."""
    if asked.way.architecture is None or asked.way.architecture.find is None:
        return asked.plan
    ranks = asked.machine.ranks()
    tree = None if folder is None else folder / "tree.json"
    state = None if folder is None else folder / "search.ckpt"
    if tree is not None and ranks.first(tree.exists):
        found = Plan.load(tree)
    else:
        searched = asked.way.find(asked.problem, asked.plan, seed, asked.machine, state)
        found = ranks.first(lambda: searched or Plan(tasks=asked.problem.task_names, layers=[]))  # one for all
        if tree is not None:
            ranks.first(lambda: found.save(tree))
    if state is not None:
        ranks.first(lambda: state.unlink(missing_ok=True))
    if not found.layers:
        return None
    if folder is not None:
        ranks.first(lambda: found.save(folder / "plan.json"))
    return found


def _singles(job: Job) -> Trained:
    """One training per task, one after the other, each with a checkpoint of its own."""
    parts: dict[str, Trained] = {}
    begin = 0
    for i, name in enumerate(job.problem.task_names):
        parts[name] = train(
            replace(
                job,
                problem=for_one(job.problem, name),
                record=0,
                description=job.description.replace(" seed", f" {name} seed"),
                begin=begin,
                checkpoint=None if job.checkpoint is None else job.checkpoint.with_name(f"part{i}.ckpt"),
            )
        )
        begin = parts[name].written
    return Trained(
        model=SingleTasks({n: p.model for n, p in parts.items()}),
        log=None,
        parameters=sum(p.parameters for p in parts.values()),
        metrics={task: of for p in parts.values() for task, of in p.metrics.items()},
        seconds=sum(p.seconds for p in parts.values()),
        written=begin,
    )


def _finished(folder: Path) -> bool:
    if not (folder / "result.json").exists():
        return False
    _clear_parts(folder)
    return True


def _close(run: Run, model: nn.Module) -> None:
    """Write what is known at the end; before, `last.ckpt` held the state of the training, or there was none."""
    assert run.path is not None
    about = {"label": run.label, "seed": run.seed}
    if run.method == "single":
        save_checkpoint(run.path / "last.ckpt", model, about)
    run.save()
    if run.method != "single":
        save_checkpoint(run.path / "last.ckpt", model, about)
    _clear_parts(run.path)


def _clear_parts(folder: Path) -> None:
    for part in folder.glob("part*.ckpt"):
        with suppress(OSError):
            part.unlink()


def open_run(path: str | Path, problem: Problem) -> Run:
    """Read a finished run whose `model()` can be rebuilt, because its problem is known."""

    def build(run: Run) -> nn.Module:
        assert run.path is not None
        if run.method == "single":
            model: nn.Module = SingleTasks({n: for_one(problem, n).model() for n in problem.task_names})
        else:
            model = way(run.method).change(problem).model()
            if run.plan is not None:
                model = split(model, run.plan, norm_stats=run.config["norm_stats"], sample=problem.sample())
        source = run.path / "last.ckpt"
        restore_model(model, read_checkpoint(source), source)
        return model.eval()

    return replace(Run.load(path), build=build)
