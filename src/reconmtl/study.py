"""A whole study by one call: probe, rank, split, train every method, compare; what is finished is not done twice."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from reconmtl import progress
from reconmtl.checking import covering
from reconmtl.choices import Decided, decide, default_folder, load_problem
from reconmtl.comparing import Comparison, compare
from reconmtl.conflicts import ConflictLog, Ranking
from reconmtl.errors import ProblemError, RunError
from reconmtl.evaluation import Machine
from reconmtl.files import read_json, write_bytes, write_json
from reconmtl.gram import Gradients
from reconmtl.plan import Plan, check_k
from reconmtl.problem import Problem, call
from reconmtl.randomness import seeded
from reconmtl.reporting.tables import summary
from reconmtl.runs import Run, environment, new_folder
from reconmtl.settings import Settings
from reconmtl.train import fit, open_run, probe

FORMAT = "reconmtl.study/1"


@dataclass(frozen=True)
class Study:
    """A finished study."""

    folder: Path
    comparison: Comparison
    ranking: Ranking
    plan: Plan
    text: str


@dataclass(frozen=True)
class _Job:
    """One training that a worker process can do on its own."""

    decided: Decided
    kind: Literal["probe", "fit"]
    method: str
    seed: int
    plan: dict[str, object] | None
    folder: str
    accelerator: str


def _work(job: _Job) -> None:
    problem = load_problem(job.decided)
    machine = Machine(accelerator=job.accelerator, precision=job.decided.precision, max_batches=job.decided.max_batches)
    if job.kind == "probe":
        probe(problem, epochs=job.decided.probe_epochs, seed=job.seed, out=job.folder, machine=machine)
        return
    fit(
        problem,
        method="single" if job.method == "single" else "joint",
        plan=None if job.plan is None else Plan.from_dict(job.plan),
        record=0 if job.method == "single" else job.decided.record,
        seeds=(job.seed,),
        norm_stats=job.decided.norm_stats,
        out=job.folder,
        resume=True,
        machine=machine,
    )


class _Here(Executor):
    """Does the work at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:  # noqa: ANN401
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _start(mode: progress.Mode, lock: Any, numbers: Any, threads: int) -> None:  # noqa: ANN401 of multiprocessing
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    progress.configure(mode, lock=lock, position=numbers.get())


@contextmanager
def _pool(jobs: int, mode: progress.Mode) -> Iterator[Executor]:
    if jobs == 1:
        progress.configure(mode)
        yield _Here()
        return
    context = multiprocessing.get_context("spawn")  # forked torch processes can hang in their thread pools
    numbers = context.Queue()
    for i in range(jobs):
        numbers.put(i)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start, initargs=(mode, context.RLock(), numbers, threads)
    )
    try:
        yield pool
    except BaseException:
        workers = list((pool._processes or {}).values())  # shutdown forgets them
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()  # else an error in one training waits for the end of the others
        raise
    finally:
        pool.shutdown()


def _finish(futures: Sequence[Future[None]]) -> None:
    """Wait for trainings; the first failure is raised at once."""
    try:
        for future in as_completed(futures):
            future.result()
    except BrokenProcessPool:
        raise RunError(
            "A training process was killed, most likely for want of memory. Continue with --resume and fewer --jobs; "
            "what is finished is kept."
        ) from None


def _plans(decided: Decided, log: ConflictLog, seed: int) -> dict[str, Plan | None]:
    """The plan of each method that splits; None for those that do not."""
    ranking = log.rank(severity=decided.severity)
    k = decided.k if decided.k is not None else max(1, len(log.layers) // 2)
    makers: dict[str, Callable[[], Plan | None]] = {
        "single": lambda: None,
        "joint": lambda: None,
        "recon": lambda: ranking.top(k),
        "random": lambda: Plan.random_layers(log, k, seed=seed),
        "smallest": lambda: Plan.smallest(log, k),
        "norms": lambda: Plan.norms(log),
        "first": lambda: Plan.first(log, k),
        "last": lambda: Plan.last(log, k),
    }
    check_k(k, len(log.layers))
    return {method: makers[method]() for method in decided.methods}


def run_study(settings: Settings) -> Study:
    """Probe, rank, split, train every method under every seed, and compare.

    Args:
        settings: What was chosen.

    Returns:
        The finished study; everything is in its folder.

    Raises:
        ReconError: If a choice is wrong (before anything is trained), or a training fails.
    """
    decided = decide(settings)
    _rehearse(decided)
    folder = new_folder(
        settings.out or default_folder(decided),
        resume=settings.resume,
        overwrite=settings.overwrite,
    )
    _write_config(folder, decided)
    on_gpu = settings.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    cores = os.cpu_count() or 1
    total = 1 + len(decided.methods) * len(decided.seeds)
    jobs = settings.jobs if settings.jobs is not None else (1 if on_gpu or decided.max_batches else min(cores, total))

    def job(kind: Literal["probe", "fit"], method: str, seed: int, plan: Plan | None) -> _Job:
        where = folder / ("log" if kind == "probe" else method)
        return _Job(decided, kind, method, seed, plan.to_dict() if plan else None, str(where), settings.accelerator)

    def unfinished(method: str, seed: int) -> bool:
        return not (folder / method / f"seed{seed}" / "result.json").exists()

    with _pool(jobs, settings.progress) as pool:
        futures: list[Future[None]] = []
        if not (folder / "log" / "log.json").exists():
            futures.append(pool.submit(_work, job("probe", "probe", decided.seeds[0], None)))
        # Single-task training needs no plan, so it fills the other cores while the probe runs.
        todo = [(s, m) for s in decided.seeds for m in decided.methods if unfinished(m, s)]
        early = [(s, m) for s, m in todo if m == "single"]
        waiting = [pool.submit(_work, job("fit", m, s, None)) for s, m in early]
        _finish(futures)
        log = ConflictLog.load(folder / "log")
        ranking = log.rank(severity=decided.severity)
        by_seed = {s: _plans(decided, log, s) for s in decided.seeds}
        plan = by_seed[decided.seeds[0]].get("recon") or ranking.top(decided.k or max(1, len(log.layers) // 2))
        plan.save(folder / "plan.json")
        late = sorted((t for t in todo if t not in early), key=lambda t: t[1] == "joint")  # the shortest trainings last
        waiting += [pool.submit(_work, job("fit", m, s, by_seed[s][m])) for s, m in late]
        _finish(waiting)
    return _conclude(folder, decided, ranking, plan)


def _rehearse(decided: Decided) -> None:
    """Run a few samples through a fresh network: what would fail after hours fails now, before a folder is made."""
    problem = load_problem(decided)
    with seeded(decided.seeds[0]):
        model = problem.model()
        inputs, targets = problem.batch(problem.train, covering(problem), torch.device("cpu"))
        layout = Gradients(model, shared=problem.shared).layout(problem.losses(call(model, inputs), targets))
    if not layout.layers:
        raise ProblemError("No layer is reached by the losses of two tasks: there is nothing shared to split.")
    if decided.k is not None:
        check_k(decided.k, len(layout.layers))


def _conclude(folder: Path, decided: Decided, ranking: Ranking, plan: Plan) -> Study:
    problem = load_problem(decided)
    runs = [open_run(folder / m / f"seed{s}", problem) for m in decided.methods for s in decided.seeds]
    comparison = compare(runs)
    text = summary(comparison, ranking, plan, facts(decided, problem, runs))
    write_json(folder / "comparison.json", comparison.to_dict())
    write_bytes(folder / "table.md", lambda temporary: _write_text(temporary, text + "\n"))
    return Study(folder, comparison, ranking, plan, text)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def facts(decided: Decided, problem: Problem, runs: Sequence[Run]) -> list[str]:
    """The lines under the table: how much stands behind its numbers."""
    n = len(decided.seeds)
    seeds = ", ".join(map(str, decided.seeds))
    width = f", width {decided.options['width']}" if "width" in decided.options else ""
    lines = [
        f"n = {_count(n, 'seed')} ({seeds}), {_count(decided.epochs, 'epoch')}{width}, batch {decided.batch_size}, "
        f"{len(problem.train):,} training and {len(problem.test):,} test samples; last model, "
        f"{'no spread from one seed' if n == 1 else 'mean ± sd'}."
    ]
    baseline = next((r.network for r in runs if r.method == "single"), None)
    if baseline is not None:
        lines.append(f"Δm is relative to one {baseline} per task, trained alike.")
    if decided.note:
        lines.append(decided.note)
    return lines


def _write_config(folder: Path, decided: Decided) -> None:
    """Write what was decided; a folder that is continued must hold the same, but for further methods and seeds."""
    content = {"format": FORMAT, **asdict(decided)}
    path = folder / "config.json"
    if not path.exists():
        write_json(folder / "env.json", environment())
    else:
        before = read_json(path, RunError)
        if not isinstance(before, dict):
            raise RunError(f"{path}: expected an object, found {type(before).__name__}.")
        plain = {f.name: _plain(getattr(decided, f.name)) for f in fields(decided)}
        probed = before.get("seeds") or [None]
        changed = [n for n, v in plain.items() if n not in ("methods", "seeds", "note") and before.get(n) != v]
        changed += ["seeds"] if decided.seeds[0] != probed[0] else []  # the probe was made with the first
        if changed:
            told = ", ".join(f"{n} = {before.get(n)!r}, now {plain[n]!r}" for n in changed)
            raise RunError(
                f"{folder} holds a study with other settings ({told}). Repeat them, or use --overwrite or --out."
            )
    write_json(path, content)


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value
