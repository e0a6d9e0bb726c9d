"""Methods x seeds x problems side by side: what fails is reported, what is finished is not done again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from reconmtl.choices import Decided, decide, default_folder
from reconmtl.errors import ConfigError, ReconError
from reconmtl.files import write_json
from reconmtl.interruptions import keeping
from reconmtl.jobs import Job, rehearse
from reconmtl.runs import new_folder
from reconmtl.settings import Settings, SweepSettings
from reconmtl.study import Study, after, conclude, study_jobs
from reconmtl.workers import Ray, Workers, closing, count, here_or_processes, run_jobs, sentence, story

FORMAT = "reconmtl.sweep/1"


@dataclass(frozen=True)
class Failure:
    """A probe or training that did not end well; `traceback` says where, if it was a bug."""

    problem: str
    method: str
    seed: int
    reason: str
    traceback: str = ""


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Attributes:
        folder: It has one folder per problem, each of which is a study.
        studies: Problem -> what there is of its study; problems of which nothing was finished are left out.
        failures: What is missing, and why; the same sweep tries again.
        skipped: How many trainings were there already.
    """

    folder: Path
    studies: dict[str, Study]
    failures: tuple[Failure, ...]
    skipped: int

    def to_dict(self) -> dict[str, object]:
        """`sweep.json`."""
        return {
            "format": FORMAT,
            "studies": {p: {"folder": str(s.folder), **s.comparison.to_dict()} for p, s in self.studies.items()},
            "failures": [{f.name: getattr(failure, f.name) for f in fields(Failure)} for failure in self.failures],
            "skipped": self.skipped,
        }

    @property
    def text(self) -> str:
        """A table per problem, and what failed."""
        parts = [f"## {problem}\n\n{study.text}" for problem, study in self.studies.items()]
        if self.failures:
            lines = [f"- {f.problem}, {f.method}, seed {f.seed}: {f.reason}" for f in self.failures]
            parts.append("\n".join(["## Failed (the same command tries these again)", "", *lines]))
        return "\n\n".join(parts)


def run_sweep(settings: SweepSettings, *, faults: Sequence[str] = ()) -> Sweep:
    """Train every method under every seed on every problem, and compare per problem.

    Args:
        settings: What was chosen.
        faults: What is known to be wrong already, reported together with the rest.

    Returns:
        What there is at the end; it is also in the folder.

    Raises:
        ReconError: If a choice is wrong, of all problems at once, before anything is trained.
    """
    studies = _decide(settings, faults)
    folder = new_folder(
        settings.out or Path("runs") / "sweep", resume=not settings.overwrite, overwrite=settings.overwrite
    )
    with keeping(folder, "repeat the command"):
        return _run(settings, studies, folder)


def _run(settings: SweepSettings, studies: dict[str, Decided], folder: Path) -> Sweep:
    # Written first: it makes the folder one of ours, which may be continued or overwritten.
    write_json(folder / "config.json", {"format": FORMAT, "problem": list(studies), "norm_stats": settings.norm_stats})
    homes = {p: folder / default_folder(d).name for p, d in studies.items()}
    jobs = [job for p, d in studies.items() for job in study_jobs(d, homes[p], settings)]
    jobs.sort(key=lambda job: job.method != "probe")  # what others wait for comes first
    failures: list[Failure] = []

    def failed(job: Job, error: Exception) -> None:
        told = "" if isinstance(error, ReconError) else story(error)
        failures.append(Failure(job.decided.problem, job.method, job.seed, sentence(error), told))

    if jobs:
        with _workers(settings, len(jobs)) as workers:
            run_jobs(jobs, workers, done=lambda job: after(job, homes[job.decided.problem]), failed=failed)
    concluded = {}
    for problem, decided in studies.items():
        home = homes[problem]
        if (home / "log" / "log.json").exists() and any(home.glob("*/seed*/result.json")):
            damaged = partial(_damaged, failures, problem)
            try:
                concluded[problem] = conclude(home, decided, damaged)
            except ReconError as error:  # the log, or all runs: the other problems have their tables all the same
                damaged("probe", decided.seeds[0], error)
    total = sum(len(d.methods) * len(d.seeds) for d in studies.values())
    skipped = total - sum(job.method != "probe" for job in jobs)
    sweep = Sweep(folder, concluded, tuple(failures), skipped)
    write_json(folder / "sweep.json", sweep.to_dict())
    return sweep


def _decide(settings: SweepSettings, faults: Sequence[str]) -> dict[str, Decided]:
    """What is done per problem; the faults of all of them are reported at once."""
    found = list(faults)
    if not settings.problems:
        found.append("problems: give at least one, e.g. `problems: [planted]` in the file.")
    same = {f.name for f in fields(Settings)} & {f.name for f in fields(SweepSettings)}
    studies = {}
    for problem in dict.fromkeys(settings.problems):
        try:
            decided = decide(Settings(problem=problem, **{n: getattr(settings, n) for n in same}))
            rehearse(decided)
            studies[problem] = decided
        except ReconError as error:
            found += [line for line in str(error).split("\n") if line not in found]
    names: dict[str, list[str]] = {}
    for problem, decided in studies.items():
        names.setdefault(default_folder(decided).name, []).append(problem)
    found += [
        f"{' and '.join(same)} would share the folder {n!r}; rename one." for n, same in names.items() if same[1:]
    ]
    if found:
        raise ConfigError("\n".join(found))
    return studies


def _damaged(failures: list[Failure], problem: str, method: str, seed: int, error: ReconError) -> None:
    failures.append(Failure(problem, method, seed, str(error)))


@contextmanager
def _workers(settings: SweepSettings, total: int) -> Iterator[Workers]:
    if settings.engine == "ray":
        with closing(Ray(settings.address, jobs=settings.jobs)) as workers:
            yield workers
        return
    mode = "never" if settings.quiet else settings.progress
    jobs = count(settings.jobs, settings.accelerator, total)
    with here_or_processes(jobs, mode, apart=True) as workers:  # what kills a training must not kill the sweep
        yield workers
