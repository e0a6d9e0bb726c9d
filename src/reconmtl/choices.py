"""What a study depends on: settings, a preset and a problem become one set of values with no choice left open."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from reconmtl.conflicts import check_severity
from reconmtl.errors import DataError, ProblemError, ReconError, UnknownNameError, nearest
from reconmtl.problem import Problem
from reconmtl.problems import READY
from reconmtl.settings import METHODS, Preset, Settings


@dataclass(frozen=True, kw_only=True)
class Decided:
    """Everything a study depends on, with no choice left open; saved as `config.json`."""

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
    k: int | None
    record: int
    norm_stats: Literal["per-task", "shared"]
    precision: str
    max_batches: int | None
    note: str


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
    source, colon, name = spec.rpartition(":")
    if not colon:
        raise UnknownNameError(
            f"Unknown problem {spec!r}. {nearest(spec, READY)} Your own is file.py:function or package.module:function."
        )
    module = _import(source, spec)
    if not callable(getattr(module, name, None)):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UnknownNameError(f"{source} has no function {name!r}. {nearest(name, functions)}")
    return getattr(module, name), getattr(module, "PRESETS", {})


def _import(source: str, spec: str) -> Any:  # noqa: ANN401 a module with unknown contents
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            raise UnknownNameError(f"Cannot import {source!r} of problem {spec!r}: {error}.") from None
    path = Path(source).resolve()
    if not path.is_file():
        raise UnknownNameError(f"There is no file {path}, named by problem {spec!r}.")
    found = importlib.util.spec_from_file_location(path.stem, path)
    if found is None or found.loader is None:
        raise UnknownNameError(f"{path} cannot be imported.")
    module = importlib.util.module_from_spec(found)
    sys.modules[path.stem] = module  # so that what the file defines can be pickled
    found.loader.exec_module(module)
    return module


def decide(settings: Settings) -> Decided:
    """Fill in what was left open from the preset and the problem; every fault is reported at once.

    Raises:
        ReconError: If a preset, task or method is unknown, or a value is out of range.
    """
    make, presets = find_problem(settings.problem)
    name = settings.preset or next(iter(presets), None)
    if name is not None and name not in presets:
        raise UnknownNameError(f"Unknown preset {name!r} of {settings.problem}. {nearest(name, presets)}")
    preset = presets[name] if name is not None else None
    options = dict(preset.options) if preset else {}
    options |= {n: getattr(settings, n) for n in ("width", "data") if getattr(settings, n) is not None}
    problem = _make(make, options, settings)
    recipe = problem.recipe
    epochs = settings.epochs or (preset.epochs if preset else recipe.epochs)
    if settings.epochs is None and preset is None:
        milestones: tuple[int, ...] = recipe.milestones
    else:
        fractions = preset.fractions if preset else tuple(m / recipe.epochs for m in recipe.milestones)
        milestones = tuple(sorted({max(1, round(f * epochs)) for f in fractions}))
    given = settings.probe_epochs
    scaled = preset.probe_epochs if preset and epochs == preset.epochs else max(1, math.ceil(epochs / 4))
    decided = Decided(
        problem=settings.problem,
        options=options,
        preset=name,
        tasks=tuple(settings.tasks or problem.task_names),
        methods=tuple(dict.fromkeys(settings.methods)),
        seeds=tuple(settings.seeds if settings.seeds is not None else (preset.seeds if preset else (0,))),
        epochs=epochs,
        batch_size=settings.batch_size or (preset.batch_size if preset else recipe.batch_size),
        lr=settings.lr if settings.lr is not None else (preset.lr if preset else recipe.lr),
        milestones=milestones,
        probe_epochs=given if given is not None else scaled,
        severity=settings.severity if settings.severity is not None else (preset.severity if preset else -0.1),
        k=settings.k if settings.k is not None else (preset.k if preset else None),
        record=settings.record if settings.record is not None else (preset.record if preset else 1),
        norm_stats=settings.norm_stats,
        precision=settings.precision,
        max_batches=2 if settings.fast_dev_run else None,
        note="A smoke test on two batches: the numbers mean nothing."
        if settings.fast_dev_run
        else preset.note
        if preset
        else "",
    )
    if settings.fast_dev_run:
        decided = replace(decided, epochs=1, milestones=(), probe_epochs=1, seeds=decided.seeds[:1])
    _check(decided, problem)
    return decided


def _make(make: Callable[..., Problem], options: dict[str, Any], settings: Settings) -> Problem:
    try:
        problem = make(**options)
    except DataError:
        if not (settings.fast_dev_run and settings.data is None and options.get("data") == "full"):
            raise
        print("The full set is not built; this smoke test takes the mini set instead.", file=sys.stderr)
        options["data"] = "mini"
        problem = make(**options)
    except TypeError as error:
        raise ProblemError(f"{settings.problem} does not take these options {options}: {error}.") from None
    if not isinstance(problem, Problem):
        raise ProblemError(f"{settings.problem} should return a reconmtl.Problem, returned {type(problem).__name__}.")
    return problem


def _check(decided: Decided, problem: Problem) -> None:
    faults: list[str] = []

    def collect(check: Callable[[], object]) -> None:
        try:
            check()
        except ReconError as error:
            faults.append(str(error))

    collect(lambda: problem.restrict(decided.tasks))
    if len(decided.tasks) < 2:
        faults.append(f"tasks = {list(decided.tasks)}: conflicts need at least two tasks.")
    collect(lambda: check_severity(decided.severity))
    if decided.k is not None and decided.k < 1:
        faults.append(f"K = {decided.k}: expected at least 1 layer.")
    unknown = [m for m in decided.methods if m not in METHODS]
    faults += [f"Unknown method {m!r}. {nearest(m, METHODS)}" for m in unknown]
    if not decided.methods:
        faults.append("methods: give at least one.")
    if not 1 <= decided.probe_epochs <= decided.epochs:
        faults.append(f"probe_epochs = {decided.probe_epochs}: expected 1 to {decided.epochs}, the number of epochs.")
    if len(set(decided.seeds)) != len(decided.seeds) or not decided.seeds:
        faults.append(f"seeds = {list(decided.seeds)}: expected different whole numbers, at least one.")
    if decided.record < 0:
        faults.append(f"record = {decided.record}: expected 0 (nothing) or one of so many steps.")
    collect(lambda: problem.recipe.override(epochs=decided.epochs, batch_size=decided.batch_size, lr=decided.lr))
    if faults:
        raise ProblemError("\n".join(faults))


def load_problem(decided: Decided) -> Problem:
    """Build the problem of a study, with its recipe."""
    make, _ = find_problem(decided.problem)
    problem = make(**decided.options)
    recipe = problem.recipe.override(
        epochs=decided.epochs, batch_size=decided.batch_size, lr=decided.lr, milestones=decided.milestones
    )
    return problem.restrict(decided.tasks).replace(recipe=recipe)
