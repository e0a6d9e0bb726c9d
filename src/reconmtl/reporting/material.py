"""What a report is about: runs, the probe's log, the plan, curves and the command, from folders or runs at hand."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from reconmtl.collecting import LeftOut, runs_in
from reconmtl.comparing import Comparison, compare
from reconmtl.conflicts import ConflictLog
from reconmtl.errors import ReconError, RunError
from reconmtl.files import read_json
from reconmtl.plan import Plan
from reconmtl.runs import Run

T = TypeVar("T")

SEVERITY = -0.1
"""S where neither a plan nor a study says one."""


NO_SETTINGS = "The report goes on without these settings."


@dataclass(frozen=True)
class Point:
    """One evaluation in a training: task -> metric -> value after so many epochs."""

    epoch: int
    values: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Material:
    """Everything a report draws from; what there is none of is None or empty.

    Attributes:
        runs: Finished runs, in the order in which they are shown.
        comparison: Them side by side.
        refused: Why there is no comparison.
        log: What the ranking is made of: the probe's log, else the record of a training without a split.
        log_source: Where it comes from, in words.
        log_path: Its folder, if it has one.
        plan: What was split.
        severity: S that conflicts are counted with.
        curves: Evaluations of each run, by its position in `runs`.
        problem: Name of the problem.
        command: The command line that made the runs.
        environment: `env.json` of the study, or of the first run.
        recordings: Further logs of the undivided network, by name: other seeds.
        given: The paths that were asked for, as given.
        study: The folder of a study.
        left_out: Runs that are not in the comparison, and files that are damaged; the rest goes on without them.
    """

    runs: tuple[Run, ...]
    comparison: Comparison | None
    refused: str
    log: ConflictLog | None
    log_source: str
    plan: Plan | None
    severity: float
    curves: tuple[tuple[Point, ...], ...]
    problem: str
    command: str | None
    log_path: Path | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    recordings: tuple[tuple[str, ConflictLog], ...] = ()
    given: tuple[str, ...] = ()
    study: Path | None = None
    left_out: tuple[LeftOut, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, from whatever there is."""
        if self.log is not None:
            return self.log.tasks
        if self.plan is not None:
            return self.plan.tasks
        return tuple(self.runs[0].directions) if self.runs else ()

    @property
    def labels(self) -> dict[str, list[Run]]:
        """The runs that can be compared, by the label of their row."""
        return {} if self.comparison is None else {row.label: list(row.runs) for row in self.comparison.rows}


def gather(runs: Sequence[Run | str | Path] | Run | str | Path) -> Material:
    """Read what a report needs; what is damaged is left out and listed, as long as there is anything else.

    Args:
        runs: Runs, and folders: of a study or sweep, of a method with its seeds, of one run, of a probe, or of a log.

    Raises:
        ReconError: If there is nothing to show, or a folder is none of these; all such are named.
    """
    items = [runs] if isinstance(runs, Run | str | Path) else list(runs)
    if not items:
        raise RunError("There is nothing to report on: give runs, or folders of runs.")
    found = _Found()
    faults: list[str] = []
    for item in items:
        try:
            if isinstance(item, Run):
                found.add([item])
            else:
                _read(Path(item), found)
        except ReconError as error:
            faults.append(str(error))
    if faults:
        raise RunError("\n".join(faults))
    return _assemble(items, found)


@dataclass
class _Found:
    """What folders hold: `missing` are runs that are unfinished or damaged, `damaged` other files."""

    runs: list[Run] = field(default_factory=list)
    missing: list[LeftOut] = field(default_factory=list)
    damaged: list[LeftOut] = field(default_factory=list)
    logs: list[tuple[Path, ConflictLog]] = field(default_factory=list)
    recordings: list[tuple[str, ConflictLog]] = field(default_factory=list)
    studies: list[Path] = field(default_factory=list)

    def attempt(self, what: Path, lost: str, read: Callable[[], T]) -> T | None:
        """What is read; or None, and a note of the damage and of what the report lacks for it."""
        try:
            return read()
        except ReconError as error:
            self.damaged.append(LeftOut(str(what), f"{error} {lost}", damaged=True))
            return None

    def attempt_log(self, folder: Path) -> ConflictLog | None:
        """A log; or None, and a note."""
        return self.attempt(folder, "The report goes on without this log.", lambda: ConflictLog.load(folder))

    def add_log(self, folder: Path) -> None:
        """Take a log to rank by."""
        log = self.attempt_log(folder)
        self.logs += [] if log is None else [(folder, log)]

    def add(self, runs: Sequence[Run]) -> None:
        """Take runs, each folder once, and note their studies."""
        known = {r.path.resolve() for r in self.runs if r.path is not None}
        new = [r for r in runs if r.path is None or r.path.resolve() not in known]
        self.runs += new
        for folder in dict.fromkeys(r.path.resolve().parent.parent for r in new if r.path is not None):
            self.studies += [folder] if self.is_study(folder) else []

    def is_study(self, folder: Path) -> bool:
        """Whether a folder holds a study."""
        if not (folder / "config.json").exists():
            return False
        config = self.attempt(
            folder,
            NO_SETTINGS,
            lambda: read_json(folder / "config.json", RunError),
        )
        return isinstance(config, dict) and str(config.get("format")).startswith("reconmtl.study/")


def _assemble(items: Sequence[Run | str | Path], found: _Found) -> Material:
    runs, logs = found.runs, found.logs
    study = found.studies[0] if found.studies else None
    config = read_json(study / "config.json", RunError) if study is not None else {}
    if study is not None and (study / "log" / "log.json").exists():
        probed = found.attempt_log(study / "log")
        logs[:0] = [] if probed is None else [(study / "log", probed)]
    log, source, where = _log(logs, runs)
    if log is None and not runs:
        told = [f"{out.run}: {out.reason}" for out in dict.fromkeys([*found.missing, *found.damaged])]
        raise RunError("\n".join(["There is no finished run and no log that can be read.", *told]))
    plan = _plan(study, found)
    comparison, refused = None, "No finished run was given, only a log."
    if runs:
        comparison = compare(runs, left_out=dict.fromkeys(found.missing))
    curves = []
    for run in runs:
        lost = "Its numbers are in the tables; its curve over training is left out."
        of = None if run.path is None else found.attempt(run.path, lost, lambda p=run.path: tuple(_curve(p)))  # type: ignore[misc]
        curves.append(of or ())
    sources = [f for f in (study, *(r.path for r in runs), *(p for p, _ in logs)) if f is not None]
    lost = "The page takes versions and command from elsewhere, or lacks them."
    files = dict.fromkeys(e for f in sources for e in (f / "env.json", f.parent / "env.json") if e.exists())
    read = (found.attempt(e.parent, lost, lambda e=e: read_json(e, RunError)) for e in files)  # type: ignore[misc]
    environment: dict[str, Any] = next((e for e in read if isinstance(e, dict) and e), {})
    configs = [config, *(r.config for r in runs)]
    configs += [found.attempt(p.parent, NO_SETTINGS, lambda p=p: _config(p.parent)) for p, _ in logs]  # type: ignore[misc]
    problem = next((c["problem"] for c in configs if isinstance(c, dict) and c.get("problem")), "")
    unsplit = [(f"{r.label}, seed {r.seed}", r.log) for r in runs if r.log is not None and r.plan is None]
    return Material(
        runs=tuple(runs),
        comparison=comparison,
        refused=refused,
        log=log,
        log_source=source,
        log_path=where,
        plan=plan,
        severity=_severity(plan, config),
        curves=tuple(curves),
        problem=str(problem),
        command=_command(environment.get("command")),
        environment=environment,
        recordings=tuple((n, of) for n, of in [*found.recordings, *unsplit] if of is not log),
        given=tuple(str(i.path or i.label) if isinstance(i, Run) else str(i) for i in items),
        study=study,
        left_out=tuple(
            dict.fromkeys([*(found.missing if comparison is None else comparison.left_out), *found.damaged])
        ),
    )


def _read(path: Path, found: _Found) -> None:
    """Read one folder that was asked for."""
    kinds = "Give the folder of a study, of a method, of one run, of a probe, or of a log."
    if not path.is_dir():
        raise RunError(f"There is no folder {path}. {kinds}")
    if (path / "log.json").exists():
        found.add_log(path)
        return
    if found.is_study(path):
        found.studies.append(path)
    probed = (path / "log" / "log.json").exists() and not (path / "result.json").exists()
    runs, missing = runs_in(path)
    if not runs and not missing and not probed:
        raise RunError(f"{path} holds no run. {kinds}")
    found.add(list(runs.values()))
    found.missing += missing.values()
    if probed and path not in found.studies:
        found.add_log(path / "log")
    for file in sorted(path.glob("seed*/log/log.json")):  # a probe of several seeds, which `log` holds together
        if probed and not (file.parents[1] / "config.json").exists():
            log = found.attempt_log(file.parent)
            found.recordings += [] if log is None else [(f"the probe of {file.parents[1].name}", log)]


def _log(logs: Sequence[tuple[Path, ConflictLog]], runs: Sequence[Run]) -> tuple[ConflictLog | None, str, Path | None]:
    """The log to rank by, where it comes from, and its folder."""
    if logs:
        path, log = logs[0]
        return log, f"the probe's log in {path}", path
    recorded = [r for r in runs if r.log is not None]
    for run in [*(r for r in recorded if r.plan is None), *recorded]:
        kind = "" if run.plan is None else ", whose split layers are not in it"
        folder = None if run.path is None else run.path / "log"
        return run.log, f"the record of {run.label}, seed {run.seed}{kind}", folder
    return None, "", None


def _plan(study: Path | None, found: _Found) -> Plan | None:
    if study is not None and (study / "plan.json").exists():
        lost = "The report takes the plan from a run, or goes on without one."
        plan = found.attempt(study, lost, lambda: Plan.load(study / "plan.json"))
        if plan is not None:
            return plan
    plans = [r.plan for r in found.runs if r.plan is not None]
    return next((p for p in plans if p.chosen.get("by") == "conflict"), plans[0] if plans else None)


def _severity(plan: Plan | None, config: object) -> float:
    chosen = [] if plan is None else [plan.chosen.get("severity")]
    chosen += [config.get("severity")] if isinstance(config, dict) else []
    for value in chosen:
        if isinstance(value, int | float) and not isinstance(value, bool) and -1 < value <= 0:
            return float(value)
    return SEVERITY


def _config(folder: Path) -> object:
    return read_json(folder / "config.json", RunError) if (folder / "config.json").exists() else None


def _command(arguments: object) -> str | None:
    """A command line that a shell understands; None if what was called has no name."""
    if not isinstance(arguments, list) or not arguments or not all(isinstance(a, str) for a in arguments):
        return None
    program, *rest = arguments
    path = Path(program)
    if path.name == "reconmtl" or (path.name == "__main__.py" and path.parent.name == "reconmtl"):
        return shlex.join(["reconmtl", *rest])
    return shlex.join(["python", program, *rest]) if program.endswith(".py") else None


def _curve(folder: Path | None) -> Iterator[Point]:
    """The evaluations in a run's `metrics.jsonl`, by epoch; the networks of single-task runs are put together."""
    path = None if folder is None else folder / "metrics.jsonl"
    if path is None or not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    merged: dict[int, dict[str, dict[str, float]]] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{where} is not JSON: {error}.") from None
        if not isinstance(entry, dict):
            raise RunError(f"{where}: expected an object with the fields 'epoch' and 'test'.")
        if "test" not in entry:
            continue
        epoch = entry.get("epoch")
        if not isinstance(epoch, int) or isinstance(epoch, bool) or not 0 <= epoch < 2**31:
            raise RunError(f"{where}: field 'epoch' should be a whole number, is {epoch!r:.80}.")
        try:
            values = {t: {m: float(v) for m, v in of.items()} for t, of in entry["test"].items()}
        except (ValueError, TypeError, AttributeError, OverflowError):
            raise RunError(f"{where}: field 'test' should map a task to its metrics, and these to numbers.") from None
        merged.setdefault(epoch, {}).update(values)
    for epoch in sorted(merged):
        yield Point(epoch, merged[epoch])
