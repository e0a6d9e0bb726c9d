"""One probe or one training as a job that any process can do: commands, studies and sweeps are made of these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reconmtl.architectures import way
from reconmtl.checking import first_batches, without_targets
from reconmtl.choices import Decided, find_logger, load_problem, split_method
from reconmtl.conflicts import ConflictLog
from reconmtl.errors import ProblemError, ReconError
from reconmtl.evaluation import Machine
from reconmtl.forward import Forward
from reconmtl.gram import Gradients
from reconmtl.plan import Plan, check_k
from reconmtl.problem import Problem
from reconmtl.randomness import seeded
from reconmtl.ranking import Ranking
from reconmtl.splitting import split
from reconmtl.train import fit, probe


@dataclass(frozen=True)
class Job:
    """One probe, or one training of one method under one seed.

    Attributes:
        decided: Of the study it belongs to.
        method: A method's name; "probe" records and trains nothing else.
        seed: Of initialisation and batches.
        out: Folder of the log, or of the method: the run's own is `seed<k>` in it.
        base: Of a probe: the method whose network is probed.
        log: Folder of the log that the method's plan comes from; None if it needs none.
        plan: A given plan, as plain data.
        accelerator: As Lightning Fabric names them.
        loggers: Names of loggers, see `find_logger`.
        null: Of a probe: record what the batch's noise alone does, too.
    """

    decided: Decided
    method: str
    seed: int
    out: str
    log: str | None = None
    base: str = "joint"
    plan: str | None = None
    accelerator: str = "auto"
    loggers: tuple[str, ...] = ()
    null: bool = False

    def __str__(self) -> str:
        return f"{self.method} seed {self.seed}"

    @property
    def finished(self) -> bool:
        """Whether its result is on disk."""
        last = "log.json" if self.method == "probe" else f"seed{self.seed}/result.json"
        return (Path(self.out) / last).exists()


def do(job: Job) -> None:
    """Do one piece of work; the result is in its folder.

    Raises:
        ReconError: If it fails.
    """
    decided = job.decided
    problem = load_problem(decided)
    machine = Machine(
        accelerator=job.accelerator,
        precision=decided.precision,
        max_batches=decided.max_batches,
        compile=decided.compile,
        sync_batchnorm=decided.sync_batchnorm,
    )
    if job.method == "probe":
        problem = way(job.base).change(problem)
        length = decided.probe_epochs
        probe(problem, epochs=length, seed=job.seed, null=job.null, out=job.out, resume=True, machine=machine)
        return
    base, by = split_method(job.method)
    plan = None if job.plan is None else Plan.load(job.plan)
    if by is not None:
        assert job.log is not None
        plan = choose_plan(decided, ConflictLog.load(job.log), by, job.seed)
    fit(
        problem,
        method=base,
        plan=plan,
        record=0 if base == "single" else decided.record,
        seeds=(job.seed,),
        norm_stats=decided.norm_stats,
        init=decided.init,
        out=job.out,
        resume=True,
        machine=machine,
        loggers=[find_logger(name) for name in job.loggers],
    )


def choose_plan(decided: Decided, log: ConflictLog, by: str, seed: int) -> Plan:
    """The layers that a method splits.

    Args:
        decided: With the severity and K; None takes half of the layers.
        log: What the probe recorded.
        by: "recon", or one of the controls.
        seed: Of the random control.
    """
    return plan_by(log, log.rank(severity=decided.severity), by, decided.k, seed=seed)


def plan_by(log: ConflictLog, ranking: Ranking, by: str, k: int | None, *, seed: int) -> Plan:
    """Choose K layers of a network, None takes half of them: by conflicts ("recon"), or as a control chooses."""
    k = max(1, len(log.layers) // 2) if k is None else k
    check_k(k, len(log.layers))
    if by == "recon":
        return ranking.top(k)
    if by == "random":
        return Plan.random_layers(log, k, seed=seed)
    if by == "norms":
        return Plan.norms(log)
    return {"smallest": Plan.smallest, "first": Plan.first, "last": Plan.last}[by](log, k)


def own_log(method: str) -> str:
    """The folder of the log that a method's plan is made from: its own, if its layers are not the joint network's."""
    base, _ = split_method(method)
    architecture = way(base).architecture
    return "log" if architecture is None or not architecture.own_layers else f"log-{base.partition(':')[0]}"


def rehearse(decided: Decided, plan: Plan | None = None) -> None:
    """Run a few samples through a fresh network: what would fail after hours fails now, before a folder is made.

    Raises:
        ReconError: If a task has no targets to train on or to be judged by, nothing is shared, there are fewer than K
            layers, or the plan does not fit the network; everything that was found.
    """
    problem = load_problem(decided)
    with seeded(decided.seeds[0]):
        found = without_targets(problem)
    if not any("to train on" in text for text in found):
        bases = [split_method(method)[0] for method in decided.methods]
        for base in {way(b).base: b for b in bases if b != "single"}.values() or ["joint"]:
            try:
                _rehearse(decided, way(base).change(problem), plan)
            except ReconError as error:
                if not found:
                    raise
                found.append(str(error))
    if found:
        raise ProblemError("\n".join(dict.fromkeys(found)))


def _rehearse(decided: Decided, problem: Problem, plan: Plan | None) -> None:
    with seeded(decided.seeds[0]):
        model = problem.model()
        losses = Forward(problem, model).losses(first_batches(problem))
        layout = Gradients(model, shared=problem.shared).layout(losses)
        if plan is not None:
            if set(plan.tasks) != set(decided.tasks):
                raise ProblemError(f"The plan is for tasks {list(plan.tasks)}, the problem has {list(decided.tasks)}.")
            split(model, plan, init=decided.init, norm_stats=decided.norm_stats, sample=problem.sample())
    if not layout.layers:
        raise ProblemError("No layer is reached by the losses of two tasks: there is nothing shared to split.")
    if decided.k is not None:
        check_k(decided.k, len(layout.layers))
