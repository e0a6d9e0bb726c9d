"""What a training leaves behind: its folder and what is in it."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from reconmtl.conflicts import ConflictLog
from reconmtl.errors import RunError
from reconmtl.files import is_leftover, read_json, write_json
from reconmtl.plan import Plan
from reconmtl.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

FORMAT = "reconmtl.run/1"
TIMING = "reconmtl.timing/1"
Values = dict[str, dict[str, float]]
"""Task -> metric -> value."""


@dataclass
class Run:
    """One finished training of one method under one seed.

    Attributes:
        method: "single", "joint" ...
        label: The row it belongs to in a table, e.g. "joint w/ Recon". Change it with
            `dataclasses.replace(run, label="...")`.
        seed: Of initialisation and batches.
        metrics: Task -> metric -> value on the test set, last model.
        directions: Task -> metric -> "max" or "min".
        parameters: Trained parameters of the network, or of all single-task networks together.
        seconds: Wall time of the training.
        fingerprint: Of the data; runs with different ones cannot be compared.
        network: Class name of the network.
        config: Everything that was chosen: recipe, plan, record ...
        plan: What was split; None for an unsplit network.
        log: What was recorded in the training; None if nothing was.
        path: Its folder; None if it was not written.
    """

    method: str
    label: str
    seed: int
    metrics: Values
    directions: dict[str, dict[str, Literal["max", "min"]]]
    parameters: int
    seconds: float
    fingerprint: str
    network: str
    config: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    log: ConflictLog | None = None
    path: Path | None = None
    build: Callable[[Run], nn.Module] | None = field(default=None, repr=False, compare=False)

    @property
    def megabytes(self) -> float:
        """Size of the trained parameters as fp32, in units of 2**20 bytes; the paper's #P."""
        return self.parameters * 4 / 2**20

    def model(self) -> nn.Module:
        """The trained network: `model(x)` returns {task: output}, also for single-task runs.

        Raises:
            RunError: If the run was loaded without its problem, or its checkpoint is missing or damaged.
        """
        if self.build is None:
            raise RunError("This run does not know its problem: open it with `reconmtl.train.open_run(path, problem)`.")
        return self.build(self)

    def to_dict(self) -> dict[str, object]:
        """`result.json`: everything that a repetition under the same seed gives again, so not the time it took."""
        return {
            "format": FORMAT,
            "method": self.method,
            "label": self.label,
            "seed": self.seed,
            "metrics": plain_values(self.metrics),
            "directions": self.directions,
            "parameters": self.parameters,
            "megabytes": self.megabytes,
            "fingerprint": self.fingerprint,
            "network": self.network,
        }

    def save(self) -> None:
        """Write `log/`, `timing.json` and, last, `result.json`, whose presence says that the run is finished."""
        assert self.path is not None
        if self.log is not None:
            self.log.save(self.path / "log")
        write_json(self.path / "timing.json", {"format": TIMING, "seconds": self.seconds})
        write_json(self.path / "result.json", self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read a finished run from its folder.

        Raises:
            ReconError: If the folder is no finished run, or a file is damaged; file and field are named.
        """
        folder = Path(path)
        source = folder / "result.json"
        data = read_json(source, RunError)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise RunError(f"{source}: field 'format' should be {FORMAT!r}.")
        kinds: dict[str, type] = {
            "method": str,
            "label": str,
            "seed": int,
            "metrics": dict,
            "directions": dict,
            "parameters": int,
            "fingerprint": str,
            "network": str,
        }
        wrong = [n for n, kind in kinds.items() if type(data.get(n)) is not kind]
        wrong += [n for n in ("seed", "parameters") if n not in wrong and not 0 <= data[n] < 2**53]
        if wrong:
            raise RunError(f"{source}: missing or wrong fields: {', '.join(wrong)}.")
        try:
            metrics = {t: {m: float(v) for m, v in named.items()} for t, named in data["metrics"].items()}
            directions = {t: dict(named) for t, named in data["directions"].items()}
        except (AttributeError, TypeError, ValueError):
            raise RunError(f"{source}: fields 'metrics' and 'directions' should map a task to its metrics.") from None
        if any(best not in ("max", "min") for named in directions.values() for best in named.values()):
            raise RunError(f"{source}: field 'directions' should hold 'max' or 'min'.")
        if {t: set(named) for t, named in metrics.items()} != {t: set(named) for t, named in directions.items()}:
            raise RunError(f"{source}: fields 'metrics' and 'directions' should name the same tasks and metrics.")
        config = read_json(folder / "config.json", RunError)
        if not isinstance(config, dict):
            raise RunError(f"{folder / 'config.json'}: expected an object, found {type(config).__name__}.")
        return cls(
            **{n: data[n] for n in kinds} | {"metrics": metrics, "directions": directions},
            seconds=_seconds(folder / "timing.json"),
            config=config,
            plan=Plan.load(folder / "plan.json") if (folder / "plan.json").exists() else None,
            log=ConflictLog.load(folder / "log") if (folder / "log").exists() else None,
            path=folder,
        )


def _seconds(path: Path) -> float:
    if not path.exists():
        return math.nan
    data = read_json(path, RunError)
    seconds = data.get("seconds") if isinstance(data, dict) and data.get("format") == TIMING else None
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 <= seconds < math.inf:
        raise RunError(f"{path}: field 'seconds' should be a number that is not negative, of format {TIMING!r}.")
    return float(seconds)


def plain_values(values: Values) -> dict[str, dict[str, float | str]]:
    """Metrics for JSON, which has no NaN and no infinity; a training must not be lost over an undefined metric."""
    return {t: {m: v if math.isfinite(v) else str(v) for m, v in named.items()} for t, named in values.items()}


def new_folder(path: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Make a folder for results, or say why not.

    Args:
        path: The folder.
        resume: Accept an existing one of ours as it is.
        overwrite: Empty an existing one of ours.

    Raises:
        RunError: If it holds anything and neither was asked for, or anything that is not ours; or it cannot be made.
    """
    folder = Path(path)
    if resume and overwrite:
        raise RunError("--resume keeps what is there and --overwrite deletes it: give one of them.")
    try:
        if folder.exists() and not folder.is_dir():
            raise RunError(f"{folder} is a file; give a folder for the results.")
        if folder.exists():
            for leftover in filter(is_leftover, folder.iterdir()):  # of a process that was killed while writing
                leftover.unlink()
        if folder.exists() and any(folder.iterdir()):
            # A folder that is resumed becomes one of ours, to be overwritten some day: the same rule for both.
            if not _is_ours(folder):
                raise RunError(
                    f"The output folder {folder} exists already and does not hold results of reconmtl: its files are "
                    "left alone. Choose another one with --out, or empty it yourself."
                )
            if overwrite:
                shutil.rmtree(folder)
            elif not resume:
                raise RunError(
                    f"The output folder {folder} exists already. Continue it with --resume, replace it with "
                    "--overwrite, or choose another one with --out."
                )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"Cannot make the folder {folder}: {error.strerror or error}. Choose another one.") from None
    return folder


def changes(before: Mapping[str, Any], now: Mapping[str, Any], absent: Mapping[str, Any], of: str = "") -> list[str]:
    """What differs between the settings of a folder and those of now, e.g. "recipe.lr = 0.1, now 0.2".

    Args:
        before: The folder's, as read.
        now: What was asked for, as plain JSON data.
        absent: What an option was before it had a name: a folder that is older than the option lacks it.
        of: The settings that these are a part of, with a dot.
    """
    told: list[str] = []
    for name in dict.fromkeys([*now, *before]):
        default = absent.get(name, _UNSAID)
        was, new = before.get(name, default), now.get(name, default)
        if isinstance(default, Mapping) and isinstance(was, Mapping) and isinstance(new, Mapping):
            told += changes(was, new, default, f"{of}{name}.")
        elif was != new:
            told.append(f"{of}{name} = {was!r}, now {new!r}")
    return told


class _Unsaid:
    def __repr__(self) -> str:
        return "not said"


_UNSAID = _Unsaid()


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds a study or a run; other tools write a `config.json` too, but not with these fields."""
    try:
        config = read_json(folder / "config.json", RunError)
    except RunError:
        return False
    if not isinstance(config, dict):
        return False
    return str(config.get("format")).startswith("reconmtl.") or {"problem", "norm_stats"} <= config.keys()


def environment() -> dict[str, object]:
    """`env.json`: what produced a result."""
    packages = {"reconmtl": __version__}
    for name in ("torch", "numpy", "lightning-fabric", "lightning", "safetensors"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    git = None
    if shutil.which("git"):
        here = Path(__file__).parent
        # The last change of this folder: nothing where the package is installed inside somebody else's repository.
        command = ["git", "log", "-1", "--format=%H", "--", "."]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
        git = done.stdout.strip() or None
    return {
        "packages": packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "git": git,
        "command": sys.argv,
    }


def describe(method: str, plan: Plan | None) -> str:
    """The label of a method with a plan, as the paper's tables name it."""
    name = {"single": "single-task"}.get(method, method)
    if plan is None:
        return name
    by, k = plan.chosen.get("by"), len(plan)
    layers = "layer" if k == 1 else "layers"
    kinds = {
        "conflict": "Recon",
        "random_layers": f"{k} random {layers}",
        "random_parameters": f"{k} random {layers} (by size)",
        "first": f"first {k} {layers}",
        "last": f"last {k} {layers}",
        "smallest": f"{k} smallest {layers}",
        "norms": f"all {k} norm {layers}",
    }
    return f"{name} w/ {kinds.get(str(by), f'{k} {layers} split')}"
