"""What a study depends on: settings, a preset and a problem become one set of values with no choice left open."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from reconmtl.architectures import ARCHITECTURES, check_method
from reconmtl.balancers import BALANCERS
from reconmtl.conflicts import check_severity
from reconmtl.errors import DataError, ProblemError, ReconError, UnknownNameError, nearest
from reconmtl.evaluation import Machine
from reconmtl.loggers import Logger, Loggers, TensorBoard
from reconmtl.problem import Problem
from reconmtl.problems import READY
from reconmtl.ranks import started
from reconmtl.settings import BASES, METHODS, PLANS, Preset, Settings
from reconmtl.train import check_seeds

T = TypeVar("T")


KNOWN = tuple(dict.fromkeys([*BASES, *BALANCERS, *ARCHITECTURES]))
"""What can be trained, with or without a plan; parameters follow a colon."""

SMOKE_BATCH = 32
"""Samples per batch of a smoke test, at most: it is to end within a minute on any machine."""


@dataclass(frozen=True, kw_only=True)
class Decided:
    """Everything a study depends on, with no choice left open; saved as `config.json`.

    A field with a default came later: a folder that lacks it was made as the default says. It must not change.
    """

    problem: str
    options: dict[str, Any]
    preset: str | None
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    lr: float
    milestones: tuple[int, ...]
    probe_epochs: int
    severity: float
    k: int | None = None
    record: int = 1
    norm_stats: Literal["per-task", "shared"] = "per-task"
    init: Literal["copy", "fresh"] = "copy"
    precision: str = "32-true"
    compile: bool = False
    processes: int = 1
    sync_batchnorm: bool = False
    max_batches: int | None = None
    note: str = ""


def find_problem(spec: str) -> tuple[Callable[..., Problem], dict[str, Preset]]:
    """Find a problem's factory and its presets.

    Args:
        spec: Name of a ready problem, `file.py:function` or `package.module:function`.

    Raises:
        UnknownNameError: If it does not exist; the nearest names are given.
    """
    if spec in READY:
        module = importlib.import_module(f"reconmtl.problems.{spec}")
        return module.make, module.PRESETS
    if ":" not in spec:
        raise UnknownNameError(
            f"Unknown problem {spec!r}. {nearest(spec, READY)} Your own is file.py:function or package.module:function."
        )
    module, function = _find(spec)
    return function, getattr(module, "PRESETS", {})


def find_logger(spec: str) -> Logger:
    """Make a logger: "tensorboard", or what `file.py:Class` or `package.module:Class` makes without arguments.

    Raises:
        ReconError: If it does not exist, needs what is not installed, or is no logger.
    """
    if spec == "tensorboard":
        return TensorBoard()
    if ":" not in spec:
        raise UnknownNameError(
            f"Unknown logger {spec!r}. {nearest(spec, ['tensorboard'])} Your own is file.py:Class or "
            "package.module:Class."
        )
    _, make = _find(spec)
    try:
        logger = make()
    except TypeError as error:
        raise UnknownNameError(f"The logger {spec} cannot be made without arguments: {error}.") from None
    Loggers([logger])  # checks it
    return cast("Logger", logger)


def _find(spec: str) -> tuple[Any, Callable[..., Any]]:
    """The module and the function of `file.py:function` or `package.module:function`."""
    source, _, name = spec.rpartition(":")
    module = _import(source, spec)
    if not callable(getattr(module, name, None)):
        functions = [
            n
            for n, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", None) == module.__name__ and not n.startswith("_")
        ]
        raise UnknownNameError(f"{source} has no function {name!r}. {nearest(name, functions)}")
    return module, getattr(module, name)


def _import(source: str, spec: str) -> Any:  # noqa: ANN401 a module with unknown contents
    if not source.endswith(".py"):
        _see(Path.cwd())  # as `python -m` does
        try:
            return importlib.import_module(source)
        except (ModuleNotFoundError, ValueError, TypeError) as error:  # also for an empty or relative name
            raise UnknownNameError(f"Cannot import {source!r} of problem {spec!r}: {error}.") from None
    path = Path(source).resolve()
    if not path.is_file():
        raise UnknownNameError(f"There is no file {path}, named by problem {spec!r}.")
    _see(path.parent)  # as `python file.py` does
    # A name of its own: a file called random.py must not become everybody's `random`.
    found = importlib.util.spec_from_file_location(f"reconmtl_problem_{path.stem}", path)
    assert found is not None and found.loader is not None  # it ends with .py
    module = importlib.util.module_from_spec(found)
    sys.modules[module.__name__] = module  # dataclasses and pickle look there
    found.loader.exec_module(module)
    return module


def _see(folder: Path) -> None:
    """Let modules in a folder be imported, after everything that is installed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def split_method(name: str) -> tuple[str, str | None]:
    """What a method trains and how its layers are chosen: 'joint+recon' or 'recon' is ('joint', 'recon').

    Raises:
        UnknownNameError: If there is no such method; the nearest are given.
    """
    base, plus, plan = ("joint", "+", name) if name in PLANS else name.partition("+")
    if base.partition(":")[0] not in KNOWN or (plus and plan not in PLANS):
        raise UnknownNameError(f"Unknown method {name!r}. {nearest(name, (*METHODS, *KNOWN))}")
    if faults := check_method(base):
        raise ProblemError("\n".join(faults))
    if base == "single" and plan:
        raise UnknownNameError(f"Unknown method {name!r}: single-task training shares nothing that could be split.")
    return base, plan or None


def decide(settings: Settings, *, faults: Sequence[str] = ()) -> Decided:
    """Fill in what was left open from the preset and the problem; every fault is reported at once.

    Args:
        settings: What was chosen.
        faults: What is known to be wrong already, reported together with the rest.

    Raises:
        ReconError: If a preset, task or method is unknown, or a value is out of range.
    """
    try:
        make, presets = find_problem(settings.problem)
    except UnknownNameError as error:
        if not (known := [*faults, *_faults(settings)]):
            raise
        raise ProblemError("\n".join([*known, str(error)])) from error
    faults = list(faults)
    name = settings.preset or next(iter(presets), None)
    if name is not None and name not in presets:
        faults.append(f"Unknown preset {name!r} of {settings.problem}. {nearest(name, presets)}")
        name = next(iter(presets), None)  # to find the other faults
    preset = presets[name] if name is not None else None
    options = _options(make, settings, preset)
    faults += _faults(settings)
    try:
        problem = _make(make, options, settings)
    except ReconError as error:
        raise ProblemError("\n".join([*faults, str(error)])) from error
    decided = _fill(settings, name, preset, options, problem)
    faults += _more_faults(decided, problem)
    if faults:
        raise ProblemError("\n".join(faults))
    return decided


def _fill(
    settings: Settings, name: str | None, preset: Preset | None, options: dict[str, Any], problem: Problem
) -> Decided:
    recipe = problem.recipe
    epochs = _first(settings.epochs, preset.epochs if preset else recipe.epochs)
    share = preset.probe_epochs / preset.epochs if preset else 0.25
    if settings.epochs is None and preset is None:
        milestones = recipe.milestones
    else:
        fractions = preset.fractions if preset else tuple(m / recipe.epochs for m in recipe.milestones)
        milestones = tuple(sorted({max(1, round(f * epochs)) for f in fractions}))
    decided = Decided(
        problem=settings.problem,
        options=options,
        preset=name,
        tasks=tuple(_first(settings.tasks, problem.task_names)),
        methods=tuple(dict.fromkeys(m.removeprefix("joint+") for m in settings.methods)),
        seeds=tuple(_first(settings.seeds, preset.seeds if preset else (0,))),
        epochs=epochs,
        batch_size=_first(settings.batch_size, preset.batch_size if preset else recipe.batch_size),
        lr=_first(settings.lr, preset.lr if preset else recipe.lr),
        milestones=milestones,
        probe_epochs=_first(settings.probe_epochs, max(1, math.ceil(round(share * epochs, 6)))),
        severity=_first(settings.severity, preset.severity if preset else -0.1),
        k=_first(settings.k, preset.k if preset else None),
        record=_first(settings.record, preset.record if preset else 1),
        norm_stats=settings.norm_stats,
        init=_first(settings.init, preset.init if preset else "copy"),
        precision=settings.precision,
        compile=settings.compile,
        processes=started(),
        sync_batchnorm=settings.sync_batchnorm,
        max_batches=None,
        note="",
    )
    if not settings.fast_dev_run:
        return replace(decided, note=_note(decided, preset)) if preset else decided
    return replace(
        decided,
        epochs=1,
        batch_size=min(decided.batch_size, SMOKE_BATCH),
        milestones=(),
        probe_epochs=1,
        seeds=decided.seeds[:1],
        max_batches=2,
        note="A smoke test on two small batches: the numbers mean nothing.",
    )


def _note(decided: Decided, preset: Preset) -> str:
    """The preset's note, as long as it is true."""

    def spoken_of(values: Decided | Preset) -> dict[str, object]:
        names = ("epochs", "batch_size", "lr", "probe_epochs", "severity", "k")
        unsaid = ("root", "tasks")  # where the data lies is no scale, and the table names its tasks
        options = {n: v for n, v in values.options.items() if n not in unsaid}
        return {**options, **{n: getattr(values, n) for n in names}, "number of seeds": len(values.seeds)}

    before = spoken_of(preset)
    changed = [
        f"{n} = {v}" + (f" instead of {before[n]}" if n in before else "")
        for n, v in spoken_of(decided).items()
        if n not in before or before[n] != v
    ]
    return f"The preset {decided.preset} with other settings: {', '.join(changed)}." if changed else preset.note


def problem_factory(settings: Settings, faults: Sequence[str] = ()) -> Callable[[], Problem]:
    """A function that builds the problem as chosen; its faults of definition arise only then.

    Raises:
        ReconError: If there is no such problem or preset, or it does not take these options.
    """
    make, presets = find_problem(settings.problem)
    found = list(faults)
    name = settings.preset or next(iter(presets), None)
    if name is not None and name not in presets:
        found.append(f"Unknown preset {name!r} of {settings.problem}. {nearest(name, presets)}")
    preset = presets.get(name) if name is not None else None
    options = _options(make, settings, preset)
    if found:
        raise ProblemError("\n".join(found))

    def build() -> Problem:
        problem = _make(make, options, settings)
        return problem if settings.tasks is None else problem.restrict(settings.tasks)

    return build


def _options(make: Callable[..., Problem], settings: Settings, preset: Preset | None) -> dict[str, Any]:
    options = dict(preset.options) if preset else {}
    given = {n: getattr(settings, n) for n in ("width", "network", "data", "root", "pretrained")}
    if "tasks" in inspect.signature(make).parameters:  # a problem may have more tasks than it takes by default
        given["tasks"] = settings.tasks
    return options | {n: str(v) if isinstance(v, Path) else v for n, v in given.items() if v is not None}


def default_folder(decided: Decided) -> Path:
    """Where the results go unless a folder is given: the problem and its preset, of one's own file and function."""
    source, _, function = decided.problem.rpartition(":")
    source = Path(source).stem if source.endswith(".py") else source
    return Path("runs") / "-".join(part for part in (source, function, decided.preset) if part)


def _first(given: T | None, otherwise: T) -> T:
    return otherwise if given is None else given


def _make(make: Callable[..., Problem], options: dict[str, Any], settings: Settings) -> Problem:
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise ProblemError(f"{settings.problem} does not take these options {options}: {error}.") from None
    try:
        problem = make(**options)
    except DataError:
        if not (settings.fast_dev_run and settings.data is None and options.get("data") == "full"):
            raise
        print("The full set is not built; this smoke test takes the mini set instead.", file=sys.stderr)
        options["data"] = "mini"
        problem = make(**options)
    if not isinstance(problem, Problem):
        raise ProblemError(f"{settings.problem} should return a reconmtl.Problem, returned {type(problem).__name__}.")
    return problem


def _message(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except ReconError as error:
        return [str(error)]
    return []


def _faults(settings: Settings) -> list[str]:
    """What is wrong whatever the problem is."""
    faults = [fault for m in settings.methods for fault in _message(partial(split_method, m))]
    if not settings.methods:
        faults.append("methods: give at least one.")
    faults += _message(lambda: check_severity(_first(settings.severity, 0.0)))
    if settings.k is not None and settings.k < 1:
        faults.append(f"K = {settings.k}: expected at least 1 layer.")
    for name in ("width", "jobs", "devices"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            faults.append(f"{name} = {value}: expected at least 1.")
    if settings.record is not None and settings.record < 0:
        faults.append(f"record = {settings.record}: expected 0 (nothing) or m (one of m steps).")
    if settings.seeds is not None:
        faults += check_seeds(settings.seeds)
    for name in settings.loggers:
        faults += _message(partial(find_logger, name))
    try:
        machine = Machine(
            accelerator=settings.accelerator,
            precision=settings.precision,
            compile=settings.compile,
            sync_batchnorm=settings.sync_batchnorm,
        )
    except ReconError as error:
        return [*faults, str(error)]
    return faults + machine.faults(settings.devices)


def _more_faults(decided: Decided, problem: Problem) -> list[str]:
    """What is wrong with this problem."""
    faults = _message(lambda: problem.restrict(decided.tasks))
    if len(decided.tasks) < 2:
        faults.append(f"tasks = {list(decided.tasks)}: conflicts need at least two tasks.")
    if decided.epochs >= 1 and not 1 <= decided.probe_epochs <= decided.epochs:
        faults.append(f"probe_epochs = {decided.probe_epochs}: expected 1 to {decided.epochs}, the number of epochs.")
    recipe = {"epochs": decided.epochs, "batch_size": decided.batch_size, "lr": decided.lr}
    return faults + _message(lambda: problem.replace(recipe=problem.recipe.override(**recipe)))


def load_problem(decided: Decided) -> Problem:
    """Build the problem of a study, with its recipe."""
    make, _ = find_problem(decided.problem)
    problem = make(**decided.options)
    recipe = problem.recipe.override(
        epochs=decided.epochs, batch_size=decided.batch_size, lr=decided.lr, milestones=decided.milestones
    )
    return problem.restrict(decided.tasks).replace(recipe=recipe)
