"""Where metrics go beside `metrics.jsonl`, which stays the truth: TensorBoard, or anything with three methods."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from reconmtl.errors import ConfigError


@runtime_checkable
class Logger(Protocol):
    """Somewhere to send metrics while a run is trained; `fit(..., loggers=[...])` calls these three."""

    def start(self, name: str, config: Mapping[str, object], folder: Path | None) -> None:
        """A run begins, or goes on after an interruption.

        Args:
            name: E.g. "joint w/ Recon seed 0".
            config: What its `config.json` says.
            folder: Its folder; None if it has none.
        """

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """An epoch is over.

        Args:
            values: "loss", "test/digit/acc" ...: of single-task training "loss/digit", an epoch per task.
            epoch: Its number, from 1; after an interruption one may come twice.
        """

    def close(self) -> None:
        """The run is over: finished, interrupted or failed."""


class TensorBoard:
    """Writes event files into `tensorboard/` of a run's folder, or below a folder of its own.

    Args:
        folder: Where; None takes the run's folder, or runs/ if it has none.

    Raises:
        ConfigError: If TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            raise ConfigError(
                'The logger "tensorboard" needs TensorBoard: pip install "reconmtl[tensorboard]"'
            ) from None
        self._make = SummaryWriter
        self._folder = None if folder is None else Path(folder)
        self._writer: Any = None

    def start(self, name: str, config: Mapping[str, object], folder: Path | None) -> None:  # noqa: ARG002 config is in its file
        """Open the event file."""
        if self._folder is not None or folder is None:
            home = (self._folder or Path("runs")) / name.replace("/", "-")
        else:
            home = folder / "tensorboard"
        self._writer = self._make(str(home))

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Loggers:
    """Several loggers as one; one that fails on the way is reported once and left out: training goes on.

    Args:
        loggers: Any number of them.

    Raises:
        ConfigError: If one of them lacks a method.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        wrong = [type(x).__name__ for x in loggers if isinstance(x, type) or not isinstance(x, Logger)]
        if wrong:
            raise ConfigError(
                f"loggers: {', '.join(wrong)} should be objects with the methods start, log and close, see "
                "reconmtl.loggers.Logger; give an instance, not a class."
            )
        self._left = list(loggers)

    def start(self, name: str, config: Mapping[str, object], folder: Path | None) -> None:
        """Start each; here an error is raised, before the work."""
        for logger in self._left:
            logger.start(name, config, folder)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Pass on a line of `metrics.jsonl`."""
        values = flat(entry)
        for logger in list(self._left):
            try:
                logger.log(values, int(entry["epoch"]))
            except Exception as error:  # a service that cannot be reached must not cost a training
                self._left.remove(logger)
                told = f"{type(logger).__name__} failed and is left out from epoch {entry['epoch']} on: {error}"
                warnings.warn(f"{told}. metrics.jsonl has everything.", RuntimeWarning, stacklevel=2)
                with suppress(Exception):
                    logger.close()

    def close(self) -> None:
        """Close each."""
        for logger in self._left:
            try:
                logger.close()
            except Exception as error:
                warnings.warn(f"{type(logger).__name__} could not be closed: {error}", RuntimeWarning, stacklevel=2)


def flat(entry: Mapping[str, Any]) -> dict[str, float]:
    """A line of `metrics.jsonl` as numbers by name; what is no finite number there is left out."""
    tasks = entry.get("tasks", ())
    values = {f"loss/{tasks[0]}" if len(tasks) == 1 else "loss": float(entry["loss"])}
    for kind in ("test", "val"):
        for task, metrics in entry.get(kind, {}).items():
            values |= {f"{kind}/{task}/{m}": float(v) for m, v in metrics.items() if isinstance(v, (int, float))}
    return values | {f"absent/{task}": float(share) for task, share in entry.get("absent", {}).items()}
