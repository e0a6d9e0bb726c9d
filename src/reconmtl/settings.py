"""What can be chosen for a whole study: one dataclass is the Python call, the command line and the file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

METHODS = ("single", "joint", "recon", "random", "smallest", "norms", "first", "last")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Probe, rank, split, train and compare; None takes the preset's value."""

    problem: Annotated[str, tyro.conf.Positional]
    """A ready problem (`reconmtl ls`), or your own as file.py:function or package.module:function."""
    preset: str | None = None
    """Scale of a ready problem, e.g. demo or paper; the first one is the default."""
    out: Path | None = None
    """Folder of the results; by default runs/PROBLEM-PRESET, of your own problem runs/FILE-FUNCTION."""
    methods: tuple[str, ...] = ("single", "joint", "recon", "random", "smallest")
    """Rows of the table: single, joint, recon, and the controls random, smallest, norms, first, last."""
    tasks: tuple[str, ...] | None = None
    """Only these tasks, at least two."""
    seeds: tuple[int, ...] | None = None
    """Every method is trained once per seed; the probe uses the first."""
    epochs: int | None = None
    """Length of every training; the learning rate falls at the preset's fractions of it."""
    batch_size: int | None = None
    """Samples per step."""
    lr: float | None = None
    """Learning rate of the first epoch."""
    width: int | None = None
    """Channels of the first stage of the ready networks."""
    data: str | None = None
    """Data of a ready problem: mini, full, or a path; see `reconmtl data --help`."""
    probe_epochs: int | None = None
    """Epochs that are probed; by default the preset's share of the epochs, else a quarter of them."""
    severity: float | None = None
    """The paper's S: gradients conflict when their cosine is below it; in (-1, 0]."""
    k: int | None = None
    """The paper's K: so many layers with most conflicts get one copy per task."""
    record: int | None = None
    """Record one of so many steps of the joint and split trainings, for the shares of conflicts; 0 records none."""
    norm_stats: Literal["per-task", "shared"] = "per-task"
    """Running statistics of shared BatchNorms after a split; shared is what the published code does."""
    jobs: int | None = None
    """Trainings side by side; by default one per core on a CPU, one on a GPU."""
    accelerator: str = "auto"
    """auto, cpu, cuda ..."""
    precision: str = "32-true"
    """32-true or bf16-mixed."""
    resume: bool = False
    """Continue in an existing folder: what is finished is kept."""
    overwrite: bool = False
    """Replace an existing folder."""
    fast_dev_run: bool = False
    """Two small batches of everything, to see that all of it runs; the numbers mean nothing."""
    progress: Literal["auto", "always", "never"] = "auto"
    """Progress bars on stderr; auto shows them on a terminal."""
    json: bool = False
    """Print the comparison as JSON."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Values that belong together for a ready problem.

    Attributes:
        options: Arguments of the problem's factory, e.g. width and data.
        epochs: Length of every training.
        batch_size: Samples per step.
        lr: Learning rate of the first epoch.
        fractions: Where in the training the learning rate is multiplied by 0.1.
        probe_epochs: Epochs that are probed.
        severity: The paper's S.
        k: The paper's K.
        seeds: Seeds of every method.
        record: One of so many steps is recorded; 0 records none.
        note: Printed under the table when none of these values was changed.
    """

    options: dict[str, object] = field(default_factory=dict)
    epochs: int
    batch_size: int
    lr: float
    fractions: tuple[float, ...] = (0.5, 0.75)
    probe_epochs: int
    severity: float
    k: int
    seeds: tuple[int, ...]
    record: int = 1
    note: str = ""
