"""Which runs may stand side by side: found in folders, of the same data and length, and what keeps others out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reconmtl.errors import ReconError, RunError
from reconmtl.files import read_json
from reconmtl.runs import Run


@dataclass(frozen=True)
class LeftOut:
    """What cannot stand beside the rest, and why.

    Attributes:
        run: Its folder, or its label and seed.
        reason: Names the file and the field where one is damaged, and the way out.
        damaged: Whether a file could not be read; otherwise the run is unfinished, or not comparable.
    """

    run: str
    reason: str
    damaged: bool = False


def find_runs(paths: Iterable[str | Path]) -> tuple[list[Run], list[LeftOut]]:
    """Read the finished runs in folders, at any depth.

    Args:
        paths: Folders of runs, methods, studies or sweeps.

    Returns:
        The runs, in the order of a study's methods and of the seeds; and what is unfinished or damaged.

    Raises:
        RunError: If a folder does not exist or holds no run; all such are named.
    """
    found: dict[Path, Run] = {}
    out: dict[Path, LeftOut] = {}
    empty = []
    for path in map(Path, paths):
        runs, lacking = runs_in(path)
        if not runs and not lacking:
            empty.append(f"{path} {'holds no run' if path.is_dir() else 'is no folder'}")
        found |= runs
        out |= lacking
    if empty:
        raise RunError(f"{'; '.join(empty)}. Give folders that `reconmtl run`, `fit` or `sweep` wrote.")
    if not found:
        raise RunError(f"There is no finished run: {'; '.join(f'{o.run}: {o.reason}' for o in out.values())}")
    return list(found.values()), list(out.values())


def runs_in(path: Path) -> tuple[dict[Path, Run], dict[Path, LeftOut]]:
    """The finished runs in a folder, by their resolved folders, and what is unfinished or damaged; never raises."""
    # What is linked to is not followed, so that a link cannot lead out of the folder or in a circle.
    files = [f for name in ("config.json", "result.json") for f in path.rglob(name)] if path.is_dir() else []
    here = [folder for folder in dict.fromkeys(f.parent for f in files) if _is_run(folder)]
    found: dict[Path, Run] = {}
    out: dict[Path, LeftOut] = {}
    for folder in sorted(here, key=lambda f: _order(path, f)):
        try:
            if (folder / "result.json").exists():
                found[folder.resolve()] = Run.load(folder)
            else:
                read_json(folder / "config.json", RunError)
                reason = "not finished, it has no result.json. Repeat the command that began it with --resume."
                out[folder.resolve()] = LeftOut(str(folder), reason)
        except ReconError as error:
            reason = f"{error} Delete {folder} and repeat the command that made it with --resume to train it again."
            out[folder.resolve()] = LeftOut(str(folder), reason, damaged=True)
    return found, out


def _is_run(folder: Path) -> bool:
    if (folder / "result.json").exists():
        return True
    try:
        config = read_json(folder / "config.json", RunError)
    except RunError:
        return re.fullmatch(r"seed\d+", folder.name) is not None  # ours by its name: it must not vanish unseen
    return isinstance(config, dict) and "seed" in config and config.get("method") not in (None, "probe")


def _order(root: Path, folder: Path) -> tuple[Any, ...]:
    """Methods in the order of their study, seeds by number."""
    key: list[Any] = []
    parts = folder.relative_to(root).parts
    for i, part in enumerate(parts):
        parent = root.joinpath(*parts[:i]) / "config.json"
        try:
            config = read_json(parent, RunError)
            methods = config.get("methods") if isinstance(config, dict) else None
        except RunError:
            methods = None
        at = methods.index(part) if isinstance(methods, list) and part in methods else 10**6
        number = part.removeprefix("seed")
        key.append((at, int(number) if number.isdecimal() and len(number) < 12 else 0, part))
    return tuple(key)


def where(run: Run) -> str:
    """How a run is called in a list: its folder, else its label and seed."""
    return str(run.path) if run.path is not None else f"{run.label}, seed {run.seed}"


def _judged(run: Run) -> dict[str, object]:
    """What has to agree before numbers may stand side by side: data and split, metrics, and length of the training."""
    machine, recipe = run.config.get("machine"), run.config.get("recipe")
    return {
        "data": run.fingerprint,
        "metrics": {t: dict(named) for t, named in run.directions.items()},
        "epochs": recipe.get("epochs") if isinstance(recipe, dict) else None,
        "batches per epoch": machine.get("max_batches") if isinstance(machine, dict) else None,
    }


def why_not(run: Run, first: Run) -> str:
    """Why a run cannot stand beside the first one; '' if it can."""
    here, there = _judged(run), _judged(first)
    told = []
    for name, value in here.items():
        if value == there[name]:
            continue
        if name == "metrics":
            told.append(f"metrics {_metrics(run)} instead of {_metrics(first)}")
        else:
            told.append(f"{name} {value} instead of {there[name]}")
    return "; ".join(told).replace("None", "all") if told else ""


def _metrics(run: Run) -> str:
    return ", ".join(f"{t} {m} ({best})" for t, named in run.directions.items() for m, best in named.items()) or "none"


def _trained(run: Run) -> dict[str, str]:
    """What has to agree before numbers may be averaged as those of one method."""
    recipe, machine = run.config.get("recipe"), run.config.get("machine")
    values = {"method": run.method, "network": run.network, **(recipe if isinstance(recipe, dict) else {})}
    for name in ("precision", "compile", "processes"):
        values[name] = machine.get(name) if isinstance(machine, dict) else None
    if run.plan is not None:
        chosen = run.plan.chosen
        values["plan"] = chosen.get("by")
        # What was asked for: the layers it leads to, and within a budget their number too, may differ between seeds.
        asked = {"K": "k", "MB": "megabytes", "severity": "severity", "exceed": "exceed"}
        values |= {name: chosen[field] for name, field in asked.items() if field in chosen}
        values["norm_stats"] = run.config.get("norm_stats")
        if chosen.get("by") is None:
            values["layers"] = run.plan.layers
    return {n: json.dumps(v, default=str) for n, v in values.items()}  # a loaded run has lists for tuples


def labelled(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """Each run with its row's label; where a label's runs were trained differently, the label says how."""
    kinds: dict[str, list[dict[str, str]]] = {}
    for run in runs:
        of = kinds.setdefault(run.label, [])
        if _trained(run) not in of:
            of.append(_trained(run))
    found = []
    for run in runs:
        of, mine = kinds[run.label], _trained(run)
        names = dict.fromkeys(n for kind in of for n in kind if len({k.get(n) for k in of}) > 1)
        told = ", ".join(f"{n} = {mine[n].strip(chr(34))}" for n in names if n in mine)
        if len(told) > 60 or not told:  # a list of layers, say
            told = f"kind {of.index(mine) + 1}"
        found.append((f"{run.label} ({told})" if len(of) > 1 else run.label, run))
    return found
