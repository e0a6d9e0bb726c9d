"""What each command does: it calls the library and prints the result. Torch is imported only where it is needed."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reconmtl.errors import ConfigError, ReconError, nearest
from reconmtl.interruptions import keeping
from reconmtl.settings import (
    CheckSettings,
    CompareSettings,
    DataSettings,
    FitSettings,
    LsSettings,
    PaperSettings,
    Preset,
    ProbeSettings,
    RankSettings,
    ReportSettings,
    Settings,
    SweepSettings,
)

if TYPE_CHECKING:
    from reconmtl.choices import Decided
    from reconmtl.progress import Mode

Faults = Sequence[str]
"""What is wrong with the file of options, to be reported together with the rest."""
Answer = tuple[int, str]
"""Exit code, and the result as text or JSON: printed by the caller, so that nothing else gets between."""


@dataclass(frozen=True)
class Command:
    """One command: its options, and the function that takes them and returns the exit code and what to print."""

    options: type
    act: Callable[[Any, Faults], Answer]


def _answer(options: Any, data: object, text: str, code: int = 0) -> Answer:  # noqa: ANN401 any command's
    return code, json.dumps(data) if options.json else text


def _stop(faults: Faults) -> None:
    if faults:
        raise ConfigError("\n".join(faults))


def ls(options: LsSettings, faults: Faults) -> Answer:
    """List the ready problems."""
    from reconmtl.choices import find_problem
    from reconmtl.problems import READY

    _stop(faults)
    data = []
    lines = []
    for name, about in READY.items():
        presets = find_problem(name)[1]
        data.append({"name": name, "about": about, "presets": {n: asdict(p) for n, p in presets.items()}})
        lines.append(f"{name:15} {about}")
        lines += [f"{'':16}--preset {n}: {_scale(p)}" for n, p in presets.items()]
    return _answer(options, data, "\n".join(lines))


def _scale(preset: Preset) -> str:
    options = [f"{n} {v}" for n, v in preset.options.items()]
    seeds = f"{len(preset.seeds)} seed{'s' * (len(preset.seeds) > 1)}"
    length = f"{preset.epochs} epochs ({preset.probe_epochs} probed)"
    return ", ".join(
        [*options, length, f"batch {preset.batch_size}", f"K = {preset.k}", f"S = {preset.severity:g}", seeds]
    )


def data(options: DataSettings, faults: Faults) -> Answer:
    """Build the full data set of a ready problem."""
    from reconmtl.problems import idx, multifashion_data

    found = list(faults)
    if options.problem != "multifashion":
        found.append(f"No data set to build for {options.problem!r}. {nearest(options.problem, ['multifashion'])}")
    if options.source is None and not options.download:
        found.append("Say where the original files are: --from DIR, or --download to fetch them.")
    _stop(found)
    source = options.source or (options.cache or multifashion_data.cache_folder()) / "original"
    if options.download:
        idx.download(source)
    folder = multifashion_data.build_full(source, cache=options.cache, seed=options.seed, overwrite=options.overwrite)
    place = "" if options.cache is None else f"RECONMTL_CACHE={shlex.quote(str(options.cache.absolute()))} "
    text = f"Multi-Fashion+MNIST is in {folder}; `{place}reconmtl run multifashion --preset paper` finds it there."
    return _answer(options, {"problem": options.problem, "folder": str(folder)}, text)


def check(options: CheckSettings, faults: Faults) -> Answer:
    """Report every fault of a problem."""
    from reconmtl.choices import problem_factory
    from reconmtl.faults import check as look

    make = problem_factory(_settings(options), faults)
    checked = look(make)
    return _answer(options, checked.to_dict(), str(checked), 0 if checked.ok else 2)


def _settings(options: Any, **more: Any) -> Settings:  # noqa: ANN401 any command with a problem
    """The options of a command as those of a study, which it is a part of."""
    names = {f.name for f in fields(Settings)} & {f.name for f in fields(options)}
    return Settings(**{n: getattr(options, n) for n in names}, **more)


def probe(options: ProbeSettings, faults: Faults) -> Answer:
    """Record how the tasks' gradients relate."""
    from reconmtl.conflicts import ConflictLog
    from reconmtl.jobs import Job

    decided = _decide(_settings(options, methods=("joint",)), faults)
    if options.seeds is None:
        decided = replace(decided, seeds=decided.seeds[:1])
    folder = _folder(options, decided)
    names = ["log"] if len(decided.seeds) == 1 else [f"seed{s}/log" for s in decided.seeds]
    jobs = [
        Job(decided, "probe", s, str(folder / n), accelerator=options.accelerator, null=options.null)
        for s, n in zip(decided.seeds, names, strict=True)
    ]
    _do(options, jobs, folder)
    logs = [ConflictLog.load(folder / n) for n in names]
    log = logs[0].merge(logs[1:])
    if len(logs) > 1:
        log.save(folder / "log")
    where = folder / "log"
    data = {"log": str(where), "steps": log.steps, "tasks": list(log.tasks), "layers": list(log.layers)}
    text = f"Measured {log.steps} steps at {len(log.layers)} layers that tasks share: {where}"
    return _answer(options, data, f"{text}\nNext: reconmtl rank {where} --top K -o {folder / 'plan.json'}")


def rank(options: RankSettings, faults: Faults) -> Answer:
    """Order layers by their conflicts, and write a plan."""
    from reconmtl.conflicts import ConflictLog, check_severity
    from reconmtl.jobs import plan_by
    from reconmtl.nulls import excess
    from reconmtl.reporting.tables import layers_table

    found = list(faults)
    try:
        check_severity(options.severity)
    except ReconError as error:
        found.append(str(error))
    if options.top is not None and options.budget_mb is not None:
        found.append("--top and --budget-mb both say how many layers: give one of them.")
    if options.budget_mb is not None and options.by != "recon":
        found.append(f"--budget-mb walks the ranking, it does not go with --by {options.by}: give --top.")
    chosen = options.top is not None or options.budget_mb is not None or options.by == "norms"
    if not chosen and (options.out is not None or options.by != "recon"):
        found.append("Say how many layers the plan splits: --top K or --budget-mb MB.")
    if options.top is not None and options.top < 1:
        found.append(f"--top {options.top}: expected at least 1 layer.")
    logs = []
    for path in options.log:
        try:
            # The folder of a probe, too, not only the log in it.
            inside = Path(path) / "log"
            there = (Path(path) / "log.json").exists() or not (inside / "log.json").exists()
            logs.append(ConflictLog.load(path if there else inside))
        except ReconError as error:
            found.append(str(error))
    if not options.log:
        found.append("LOG: give the folder of a log, e.g. runs/mine/log.")
    _stop(found)
    log = logs[0].merge(logs[1:])
    ranking = log.rank(severity=options.severity)
    plan = None
    if chosen and options.budget_mb is not None:
        plan = ranking.budget(megabytes=options.budget_mb)
    elif chosen:
        plan = plan_by(log, ranking, options.by, options.top, seed=options.seed)
    if plan is not None and options.out is not None:
        plan.save(options.out)
    beyond = excess(log, severity=options.severity) if log.counts is None and log.steps else None
    by_chance = {} if beyond is None else {n: _finite(*v) for n, *v in beyond.rows()}
    data = {
        "format": "reconmtl.ranking/1",
        "severity": options.severity,
        "steps": log.steps,
        "tasks": list(log.tasks),
        "layers": [
            {"name": n, "score": s, "measured": m, "parameters": log.sizes[n], "noise": n in ranking.noise}
            | dict(zip(("chance", "beyond", "p"), by_chance.get(n, (None, None, None)), strict=True))
            for n, s, m in zip(ranking.layers, ranking.scores, ranking.measured, strict=True)
        ],
        "plan": None if plan is None else plan.to_dict(),
    }
    lines = [layers_table(ranking, ranking.top(len(ranking.layers)) if plan is None else plan, beyond)]
    if beyond is not None:
        lines.append(f"Chance is {beyond.source}; p is of one layer, from a block bootstrap over steps.")
    if plan is not None:
        added = (len(plan.tasks) - 1) * sum(log.sizes[n] for n in plan.layers)
        lines.append(
            f"This plan splits {len(plan)} of {len(log.layers)} layers and adds {added:,} parameters "
            f"({added * 4 / 2**20:.2f} MB)." + (f" It is in {options.out}." if options.out else "")
        )
    return _answer(options, data, "\n\n".join(lines))


def fit(options: FitSettings, faults: Faults) -> Answer:
    """Train one method, once per seed."""
    from reconmtl.architectures import check_method
    from reconmtl.choices import load_problem
    from reconmtl.comparing import compare as side_by_side
    from reconmtl.jobs import Job
    from reconmtl.plan import Plan
    from reconmtl.train import open_run

    found = list(faults)
    wrong = check_method(options.method)
    found += [f"{fault} Layers are split by --plan." if "Unknown" in fault else fault for fault in wrong]
    plan = None
    if options.plan is not None:
        if options.method == "single":
            found.append("Single-task training shares nothing: --plan does not apply to it.")
        try:
            plan = Plan.load(options.plan)
        except ReconError as error:
            found.append(str(error))
    settings = _settings(options, methods=("joint" if wrong else options.method,))
    decided = _decide(settings, found, plan)
    folder = _folder(options, decided)
    given = None if options.plan is None else str(options.plan)
    jobs = [
        Job(
            decided,
            options.method,
            s,
            str(folder),
            plan=given,
            accelerator=options.accelerator,
            loggers=options.loggers,
        )
        for s in decided.seeds
    ]
    _do(options, jobs, folder)
    problem = load_problem(decided)
    comparison = side_by_side([open_run(folder / f"seed{s}", problem) for s in decided.seeds])
    return _answer(options, {"folder": str(folder), **comparison.to_dict()}, f"{comparison}\n\nResults: {folder}")


def _decide(settings: Settings, faults: Faults, plan: Any = None) -> Decided:  # noqa: ANN401 a Plan or None
    from reconmtl.choices import decide
    from reconmtl.jobs import rehearse

    decided = decide(settings, faults=faults)
    rehearse(decided, plan)
    return decided


def preflight(options: Any, faults: Faults) -> Path:  # noqa: ANN401
    """Find out what is wrong in this process, before many are started; makes the folder and returns it."""
    from reconmtl.runs import new_folder

    decided = _decide(_settings(options), faults)
    return new_folder(_home(options, decided), resume=options.resume, overwrite=options.overwrite)


def _home(options: Any, decided: Decided) -> Path:  # noqa: ANN401
    """Where the results of `run`, and of commands that are a part of it, go."""
    from reconmtl.choices import default_folder

    usual = default_folder(decided)
    if options.out is not None or isinstance(options, Settings):
        return options.out or usual
    what = "probe" if isinstance(options, ProbeSettings) else options.method
    plan = getattr(options, "plan", None)
    return usual.with_name("-".join([usual.name, what, *([plan.stem] if plan else [])]))


def _folder(options: Any, decided: Decided) -> Path:  # noqa: ANN401
    """The folder of a command that is a part of a study: made, refused, or continued."""
    from reconmtl.evaluation import Machine
    from reconmtl.runs import new_folder
    from reconmtl.study import write_config

    home = _home(options, decided)
    ranks = Machine(accelerator=options.accelerator).ranks()
    folder = ranks.first(lambda: new_folder(home, resume=options.resume, overwrite=options.overwrite))
    ranks.first(lambda: write_config(folder, decided))
    return folder


def _do(options: Any, todo: Sequence[Any], folder: Path) -> None:  # noqa: ANN401
    """Do a command's jobs; one that is finished compares its settings and is read."""
    from reconmtl.workers import count, first_failure, here_or_processes, run_jobs

    unfinished = sum(not job.finished for job in todo)
    at_once = (
        1 if options.fast_dev_run and options.jobs is None else count(options.jobs, options.accelerator, unfinished)
    )
    mode: Mode = "never" if options.quiet else options.progress
    with keeping(folder), here_or_processes(at_once, mode) as workers:
        run_jobs(todo, workers, done=lambda _: None, failed=first_failure)


def run(options: Settings, faults: Faults) -> Answer:
    """Do the whole of Recon and its controls."""
    from reconmtl.study import run_study

    study = run_study(options, faults=faults)
    text = f"{study.text}\n\nResults: {study.folder} (table.md, comparison.json, plan.json, log/, a folder per method)"
    return _answer(options, {"folder": str(study.folder), **study.comparison.to_dict()}, text)


def sweep(options: SweepSettings, faults: Faults) -> Answer:
    """Train methods x seeds x problems."""
    from reconmtl.sweeping import run_sweep

    done = run_sweep(options, faults=faults)
    kept = f" ({done.skipped} trainings were there already)" if done.skipped else ""
    text = f"{done.text}\n\nResults: {done.folder}{kept}"
    return _answer(options, done.to_dict(), text, 3 if done.failures else 0)


def compare(options: CompareSettings, faults: Faults) -> Answer:
    """Put finished runs side by side."""
    from reconmtl.collecting import find_runs
    from reconmtl.comparing import compare as side_by_side

    found = list(faults)
    if not options.runs:
        found.append("RUN: give at least one folder, e.g. runs/multifashion-demo.")
    _stop(found)
    runs, missing = find_runs(options.runs)
    comparison = side_by_side(
        runs, baseline=options.baseline, against=options.against, threshold=options.threshold, left_out=missing
    )
    return 0, comparison.to("json" if options.json else options.format)


def report(options: ReportSettings, faults: Faults) -> Answer:
    """Write a page about runs."""
    from reconmtl.reporting.page import write_report

    found = list(faults)
    if not options.runs:
        found.append("RUN: give at least one folder, e.g. runs/multifashion-demo.")
    _stop(found)
    page, material = write_report(options.runs, to=options.to, figures=options.figures)
    figures = None if options.figures is None else str(options.figures)
    lines = [f"Report: {page}" + (f"; figures: {figures}" if figures else "")]
    lines += ["Left out:"] if material.left_out else []
    lines += [f"- {out.run}: {out.reason}" for out in material.left_out]
    out = [{"run": out.run, "reason": out.reason} for out in material.left_out]
    return _answer(options, {"report": str(page), "figures": figures, "left_out": out}, "\n".join(lines))


def paper(options: PaperSettings, faults: Faults) -> Answer:
    """Repeat tables and figures of the paper."""
    from reconmtl.evaluation import Machine
    from reconmtl.files import write_text
    from reconmtl.paper import experiments
    from reconmtl.paper.trainings import Sources, taking
    from reconmtl.reporting.figures import check_matplotlib
    from reconmtl.train import check_seeds

    found = list(faults)
    roots = _by_name("--root", options.root, taking("root"), found)
    weights = _by_name("--pretrained", options.pretrained, taking("pretrained"), found)
    if options.scale == "mini" and (roots or weights):
        found.append("--root and --pretrained are for --scale full: the mini scale needs no files.")
    found += [] if options.seeds is None else check_seeds(options.seeds)
    if options.out.exists() and not options.out.is_dir():
        found.append(f"--out {options.out} is no folder.")
    if options.action != "ls" and not options.names:
        found.append(f"NAME: say which, e.g. `reconmtl paper {options.action} t1`; `reconmtl paper ls` lists them.")
    for name in options.names:
        try:
            experiments.find(name)
        except ReconError as error:
            found.append(str(error))
    if options.figures is not None:
        try:
            check_matplotlib()
        except ReconError as error:
            found.append(str(error))
    if options.to is not None and options.to.is_dir():
        found.append(f"--to {options.to} is a folder; give a file, e.g. {options.to / 'paper.md'}.")
    _stop(found)
    if options.action == "ls":
        data = experiments.listed()
        return _answer(options, data, experiments.overview(data))
    lacking = []
    pages: dict[str, str] = {}
    drawn: dict[str, list[str]] = {}
    for name in options.names:
        setup = experiments.find(name).setup(
            options.scale,
            options.out,
            smoke=options.fast_dev_run,
            where=Machine(accelerator=options.accelerator, precision=options.precision, compile=options.compile),
            sources=Sources(roots=roots, weights=weights),
            showing=options.action == "show",
        )
        if options.action == "run":
            tell = _say_nothing if options.quiet else print  # goes to stderr while a command works
            with keeping(options.out, "repeat the command"):
                lacking += experiments.find(name).run(setup, options.seeds or (0,), tell)
        seeds = options.seeds or experiments.finished_seeds(name, setup)
        pages[name] = experiments.page(name, setup, seeds)
        if options.figures is not None:
            pictures = experiments.draw(name, setup, seeds, options.figures)
            drawn[name] = [str(path) for path in pictures]
            pages[name] += experiments.embedded(name, pictures, options.to)
    text = "\n\n".join(pages.values())
    if options.to is not None:
        write_text(options.to, text + "\n")
    missing = [f"{n}, seed {s}: {why}" for n, s, why in lacking]
    answer = {"pages": pages, "figures": drawn, "missing": missing}
    return _answer(options, answer, text, 3 if lacking else 0)


def _by_name(option: str, given: Sequence[str] | None, known: Sequence[str], faults: list[str]) -> dict[str, Path]:
    """`NAME=PATH` of an option as {name: path}; what is wrong with them goes to the faults."""
    found: dict[str, Path] = {}
    for one in given or ():
        name, equals, path = one.partition("=")
        if name not in known:
            faults.append(f"{option} {one}: expected NAME=PATH. Unknown data set {name!r}. {nearest(name, known)}")
        elif not equals or not path or name in found:
            faults.append(f"{option} {one}: expected NAME=PATH, once per name, e.g. {name}=PATH.")
        else:
            found[name] = Path(path).expanduser()  # a shell does not after the sign
    return found


def _finite(*values: float) -> tuple[float | None, ...]:
    """JSON has no NaN."""
    return tuple(v if math.isfinite(v) else None for v in values)


def _say_nothing(line: str) -> None:
    del line


COMMANDS = {
    "ls": Command(LsSettings, ls),
    "check": Command(CheckSettings, check),
    "data": Command(DataSettings, data),
    "run": Command(Settings, run),
    "sweep": Command(SweepSettings, sweep),
    "probe": Command(ProbeSettings, probe),
    "rank": Command(RankSettings, rank),
    "fit": Command(FitSettings, fit),
    "compare": Command(CompareSettings, compare),
    "report": Command(ReportSettings, report),
    "paper": Command(PaperSettings, paper),
}
