"""A whole study by one call: probe, rank, split, train every method, compare; what is finished is not done twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from reconmtl.batches import Sets, sets_of
from reconmtl.choices import Decided, decide, default_folder, load_problem, split_method
from reconmtl.collecting import LeftOut
from reconmtl.comparing import Comparison, compare
from reconmtl.conflicts import ConflictLog
from reconmtl.errors import ReconError, RunError
from reconmtl.evaluation import Machine
from reconmtl.files import read_json, write_json, write_text
from reconmtl.interruptions import keeping
from reconmtl.jobs import Job, choose_plan, own_log, rehearse
from reconmtl.plan import Plan
from reconmtl.problem import Problem
from reconmtl.ranking import Ranking
from reconmtl.reporting.tables import summary
from reconmtl.runs import Run, changes, environment, new_folder
from reconmtl.settings import Settings, SweepSettings
from reconmtl.train import open_run
from reconmtl.workers import count, first_failure, here_or_processes, run_jobs

FORMAT = "reconmtl.study/1"
ABSENT: dict[str, Any] = {f.name: f.default for f in fields(Decided) if f.default is not MISSING}
"""What a study did whose `config.json` lacks an option, because it is older than the option."""


@dataclass(frozen=True)
class Study:
    """A finished study."""

    folder: Path
    comparison: Comparison
    ranking: Ranking
    plan: Plan
    text: str


def run_study(settings: Settings, *, faults: Sequence[str] = ()) -> Study:
    """Probe, rank, split, train every method under every seed, and compare.

    Args:
        settings: What was chosen.
        faults: What is known to be wrong already, reported together with the rest.

    Returns:
        The finished study; everything is in its folder.

    Raises:
        ReconError: If a choice is wrong (before anything is trained), or a training fails.
    """
    decided = decide(settings, faults=faults)
    rehearse(decided)
    out = settings.out or default_folder(decided)
    ranks = Machine(accelerator=settings.accelerator).ranks()
    folder = ranks.first(lambda: new_folder(out, resume=settings.resume, overwrite=settings.overwrite))
    with keeping(folder):
        jobs = study_jobs(decided, folder, settings)
        if (folder / "log" / "log.json").exists():
            save_plan(folder, decided)  # damage shows before the work
        alone = settings.jobs is None and decided.max_batches is not None  # a process takes longer to start than that
        side_by_side = 1 if alone else count(settings.jobs, settings.accelerator, len(jobs))
        with here_or_processes(side_by_side, "never" if settings.quiet else settings.progress) as workers:
            run_jobs(jobs, workers, done=lambda job: after(job, folder), failed=first_failure)
        return conclude(folder, decided)


def study_jobs(decided: Decided, folder: Path, settings: Settings | SweepSettings) -> list[Job]:
    """Prepare a study's folder, and list what is not finished in it.

    Raises:
        RunError: If the folder holds a study with other settings, or cannot be written to.
    """
    Machine(accelerator=settings.accelerator).ranks().first(lambda: write_config(folder, decided))

    def job(method: str, seed: int, base: str = "joint") -> Job:
        probes = method == "probe"
        needs = None if probes or not split_method(method)[1] else str(folder / own_log(method))
        return Job(
            decided,
            method,
            seed,
            str(folder / (own_log(base) if probes else method)),
            needs,
            base=base,
            accelerator=settings.accelerator,
            loggers=settings.loggers,
        )

    # Single-task training needs no plan, so it fills the other cores while the probe runs; the shortest come last.
    order = {"single": 0, "joint": 2}
    fits = [job(m, s) for m in sorted(decided.methods, key=lambda m: order.get(m, 1)) for s in decided.seeds]
    own = {own_log(m): split_method(m)[0] for m in decided.methods if split_method(m)[1]}
    probes = [job("probe", decided.seeds[0], base) for base in {**own, "log": "joint"}.values()]
    return [j for j in [*probes, *fits] if not j.finished]


def after(job: Job, folder: Path) -> None:
    """What follows a finished job: the plan, as soon as there is a log."""
    if job.method == "probe" and Path(job.out).name == "log":
        save_plan(folder, job.decided)


def save_plan(folder: Path, decided: Decided) -> tuple[Ranking, Plan]:
    """Rank the layers of a study's log and write the plan."""
    try:
        log = ConflictLog.load(folder / "log")
    except ReconError as error:
        raise RunError(f"{error} Delete {folder / 'log'} and repeat with --resume to probe again.") from None
    plan = choose_plan(decided, log, "recon", decided.seeds[0])
    plan.save(folder / "plan.json")
    return log.rank(severity=decided.severity), plan


def conclude(folder: Path, decided: Decided, failed: Callable[[str, int, ReconError], None] | None = None) -> Study:
    """Compare the finished runs of a study and write the table.

    Args:
        folder: Of the study.
        decided: What was decided.
        failed: Takes method, seed and error of each run that is damaged, and the rest goes on; None raises.

    Raises:
        ReconError: If the log is damaged, there is no run, or one is damaged.
    """
    problem = load_problem(decided)
    ranking, plan = save_plan(folder, decided)
    runs, damaged = [], []
    for m, s in [(m, s) for m in decided.methods for s in decided.seeds]:
        path = folder / m / f"seed{s}"
        try:
            runs += [_opened(path, problem)] if (path / "result.json").exists() else []
        except ReconError as error:
            if failed is None:
                raise
            failed(m, s, error)
            damaged.append(LeftOut(str(path), str(error), damaged=True))
    comparison = compare(runs, left_out=damaged)
    text = summary(comparison, ranking, plan, facts(decided, problem, runs))
    write_json(folder / "comparison.json", comparison.to_dict())
    write_text(folder / "table.md", text + "\n")
    return Study(folder, comparison, ranking, plan, text)


def _opened(path: Path, problem: Problem) -> Run:
    try:
        return open_run(path, problem)
    except ReconError as error:
        raise RunError(f"{error} Delete {path} and repeat with --resume to train it again.") from None


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _samples(sets: Sets) -> str:
    return " + ".join(f"{len(data):,}" for data in sets_of(sets).values())


def facts(decided: Decided, problem: Problem, runs: Sequence[Run]) -> list[str]:
    """The lines under the table: how much stands behind its numbers."""
    n = len(decided.seeds)
    seeds = ", ".join(map(str, decided.seeds))
    width = f", width {decided.options['width']}" if "width" in decided.options else ""
    lines = [
        f"n = {_count(n, 'seed')} ({seeds}), {_count(decided.epochs, 'epoch')}{width}, batch {decided.batch_size}, "
        f"{_samples(problem.train)} training and {_samples(problem.test)} test samples; last model, "
        f"{'no spread from one seed' if n == 1 else 'mean ± sd'}."
    ]
    baseline = next((r.network for r in runs if r.method == "single"), None)
    if baseline is not None:
        lines.append(f"Δm is relative to one {baseline} per task, trained alike.")
    if decided.note:
        lines.append(decided.note)
    return lines


def write_config(folder: Path, decided: Decided) -> None:
    """Write what was decided; a folder that is continued must hold the same, but for further methods and seeds."""
    content = {"format": FORMAT, **asdict(decided)}
    path = folder / "config.json"
    if path.exists():
        before = read_json(path, RunError)
        if not isinstance(before, dict):
            raise RunError(f"{path}: expected an object, found {type(before).__name__}.")
        now = json.loads(json.dumps(asdict(decided)))  # as it was read
        free = ("format", "methods", "seeds", "note")
        was, new = ({n: v for n, v in of.items() if n not in free} for of in (before, now))
        changed = changes(was, new, ABSENT)
        seeds = before.get("seeds")
        if not isinstance(seeds, list) or now["seeds"][:1] != seeds[:1]:  # the probe was made with the first
            changed.append(f"seeds = {seeds!r}, now {now['seeds']!r}")
        if changed:
            told = ", ".join(changed)
            raise RunError(
                f"{folder} holds a study with other settings ({told}). Repeat them, or use --overwrite or --out."
            )
    write_json(path, content)  # first: it says that the folder is one of ours
    if not (folder / "env.json").exists():
        write_json(folder / "env.json", environment())
