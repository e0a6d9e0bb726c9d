"""What a report is about: runs, the probe's log, the plan, curves and the command, from folders or runs at hand."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reconmtl.collecting import LeftOut, find_runs
from reconmtl.comparing import Comparison, compare
from reconmtl.conflicts import ConflictLog
from reconmtl.errors import ReconError, RunError
from reconmtl.files import read_json
from reconmtl.plan import Plan
from reconmtl.runs import Run

SEVERITY = -0.1
"""S where neither a plan nor a study says one."""


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
    """Read what a report needs.

    Args:
        runs: Runs, and folders: of a study or sweep, of a method with its seeds, of one run, of a probe, or of a log.

    Raises:
        ReconError: If there is nothing to show, a folder is none of these, or a file in it is damaged; it is named.
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
    """What folders hold."""

    runs: list[Run] = field(default_factory=list)
    missing: list[LeftOut] = field(default_factory=list)
    logs: list[tuple[Path, ConflictLog]] = field(default_factory=list)
    recordings: list[tuple[str, ConflictLog]] = field(default_factory=list)
    studies: list[Path] = field(default_factory=list)

    def add(self, runs: Sequence[Run]) -> None:
        """Take runs, each folder once, and note their studies."""
        known = {r.path.resolve() for r in self.runs if r.path is not None}
        new = [r for r in runs if r.path is None or r.path.resolve() not in known]
        self.runs += new
        self.studies += [f for f in (_study_of(r.path) for r in new) if f is not None]


def _assemble(items: Sequence[Run | str | Path], found: _Found) -> Material:
    runs, logs = found.runs, found.logs
    study = found.studies[0] if found.studies else None
    config = read_json(study / "config.json", RunError) if study is not None else {}
    if study is not None and (study / "log" / "log.json").exists():
        logs.insert(0, (study / "log", ConflictLog.load(study / "log")))
    log, source, where = _log(logs, runs)
    plan = _plan(study, runs)
    comparison, refused = None, "No finished run was given, only a log."
    if runs:
        comparison = compare(runs, left_out=found.missing)
    sources = [f for f in (study, *(r.path for r in runs), *(p for p, _ in logs)) if f is not None]
    environment: dict[str, Any] = next((e for e in map(_environment, sources) if e), {})
    configs = [config, *(r.config for r in runs), *(_config(p.parent) for p, _ in logs)]
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
        curves=tuple(tuple(_curve(r.path)) for r in runs),
        problem=str(problem),
        command=_command(environment.get("command")),
        environment=environment,
        recordings=tuple((n, of) for n, of in [*found.recordings, *unsplit] if of is not log),
        given=tuple(str(i.path or i.label) if isinstance(i, Run) else str(i) for i in items),
        study=study,
    )


def _study_of(path: Path | None) -> Path | None:
    """The folder of the study that a run belongs to, if it belongs to one."""
    folder = None if path is None else path.resolve().parent.parent
    if folder is None or not (folder / "config.json").exists():
        return None
    return folder if _is_study(folder) else None


def _is_study(folder: Path) -> bool:
    try:
        config = read_json(folder / "config.json", RunError)
    except RunError:
        return False
    return isinstance(config, dict) and str(config.get("format")).startswith("reconmtl.study/")


def _read(path: Path, found: _Found) -> None:
    """Read one folder that was asked for."""
    kinds = "Give the folder of a study, of a method, of one run, of a probe, or of a log."
    if not path.is_dir():
        raise RunError(f"There is no folder {path}. {kinds}")
    if (path / "log.json").exists():
        found.logs.append((path, ConflictLog.load(path)))
        return
    if _is_study(path):
        found.studies.append(path)
    probed = (path / "log" / "log.json").exists() and not (path / "result.json").exists()
    try:
        runs, missing = find_runs([path])
    except RunError as error:
        if not probed:
            raise RunError(f"{error} {kinds}") from None
    else:
        found.add(runs)
        found.missing += missing
    if probed and path not in found.studies:
        found.logs.append((path / "log", ConflictLog.load(path / "log")))
    for file in sorted(path.glob("seed*/log/log.json")):  # a probe of several seeds, which `log` holds together
        if probed and not (file.parents[1] / "config.json").exists():
            found.recordings.append((f"the probe of {file.parents[1].name}", ConflictLog.load(file.parent)))


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


def _plan(study: Path | None, runs: Sequence[Run]) -> Plan | None:
    if study is not None and (study / "plan.json").exists():
        return Plan.load(study / "plan.json")
    plans = [r.plan for r in runs if r.plan is not None]
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


def _environment(folder: Path) -> dict[str, Any] | None:
    for file in (folder / "env.json", folder.parent / "env.json"):
        if file.exists():
            found = read_json(file, RunError)
            return found if isinstance(found, dict) else None
    return None


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
    merged: dict[int, dict[str, dict[str, float]]] = {}
    number = 0
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):  # noqa: B007 the message below names it
            entry = json.loads(line)
            if "test" not in entry.keys():  # noqa: SIM118 a list has none either, but is no entry
                continue
            values = {str(t): {str(m): float(v) for m, v in of.items()} for t, of in entry["test"].items()}
            merged.setdefault(int(entry["epoch"]), {}).update(values)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        raise RunError(f"{path}, line {number}: expected an object with the fields 'epoch' and 'test'.") from None
    for epoch in sorted(merged):
        yield Point(epoch, merged[epoch])
