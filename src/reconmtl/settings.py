"""What can be chosen: each command's dataclass is the Python call, the command line and the file at once.

A command's options are the fields of its groups, which its help shows under one heading each; None takes the preset's
value.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

BASES = ("single", "joint")
"""What is trained: a network per task, or one for all."""

PLANS = ("recon", "random", "smallest", "norms", "first", "last")
"""Which layers are split: those with most conflicts, or one of the controls."""

METHODS = (*BASES, *PLANS)

Engine = Literal["local", "ray"]


def _hint(default: str) -> str:
    return "" if default in ("None", "") else f"(default: {default})"


def _shown(metavar: str) -> object:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=_hint)


Int = Annotated[int | None, _shown("INT")]
Ints = Annotated[tuple[int, ...] | None, _shown("INT ...")]
Float = Annotated[float | None, _shown("FLOAT")]
Text = Annotated[str | None, _shown("TEXT")]
Texts = Annotated[tuple[str, ...] | None, _shown("NAME ...")]
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")]
Folder = Annotated[Path | None, _shown("DIR")]
File = Annotated[Path | None, _shown("FILE")]
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


# Groups of options. ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OneProblem:
    """What is trained."""

    problem: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROBLEM")]
    """A ready problem (`reconmtl ls`), or your own as file.py:function or package.module:function."""


@dataclass(frozen=True, kw_only=True)
class ProblemOptions:
    """Variants of a ready problem, and which of its tasks."""

    preset: Text = None
    """Scale of a ready problem, e.g. demo or paper; the first one is the default."""
    tasks: Texts = None
    """Only these tasks, at least two."""
    width: Int = None
    """Channels of the first stage of the ready networks."""
    network: Text = None
    """Network of a ready problem that has several, e.g. segnet, mtan or mobilenet."""
    data: Text = None
    """Data of a ready problem: mini, full, or a path; see `reconmtl data --help`."""
    root: Folder = None
    """Folder of a data set that you have, in the layout it is published in."""
    pretrained: File = None
    """ImageNet weights of the trunk: a state dict of torchvision or timm."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How every network is trained; what is not given is the preset's, or of your own problem its recipe's."""

    seeds: Ints = None
    """Every method is trained once per seed; the probe uses the first."""
    epochs: Int = None
    """Length of every training; the learning rate falls at the preset's fractions of it."""
    batch_size: Int = None
    """Samples per step."""
    lr: Float = None
    """Learning rate of the first epoch."""


@dataclass(frozen=True, kw_only=True)
class ProbingOptions:
    """How conflicts are measured."""

    probe_epochs: Int = None
    """Epochs that are probed, the first of the training's; by default the preset's share of them, else a quarter."""


@dataclass(frozen=True, kw_only=True)
class NullOptions:
    """What is recorded besides."""

    null: Flag = False
    """Record what the noise of a batch alone does too, from its halves: `rank` then samples chance at each layer."""


@dataclass(frozen=True, kw_only=True)
class SplittingOptions:
    """How many layers are split, and what is recorded afterwards."""

    severity: Float = None
    """The paper's S: gradients conflict when their cosine is below it; in (-1, 0]."""
    k: Annotated[Int, tyro.conf.arg(aliases=["--top"])] = None
    """The paper's K: so many layers with most conflicts get one copy per task."""


@dataclass(frozen=True, kw_only=True)
class RecordingOptions:
    """What joint and split trainings do beside training."""

    record: Int = None
    """Record one of so many steps of the joint and split trainings, for the shares of conflicts; 0 records none."""
    norm_stats: Literal["per-task", "shared"] = "per-task"
    """Running statistics of shared BatchNorms after a split; shared is what the published code does."""
    init: Annotated[Literal["copy", "fresh"] | None, tyro.conf.arg(help_behavior_hint=_hint)] = None
    """How copies start: as the layer itself, or drawn anew; by default the preset's, else copy."""


@dataclass(frozen=True, kw_only=True)
class MethodsOptions:
    """What is compared."""

    methods: Names = ("single", "joint", "recon", "random", "smallest")
    """Rows of the table: single, joint, mgda, pcgrad, graddrop, cagrad, mmoe ...; recon, and the controls random,
    smallest, norms, first, last; or both, e.g. cagrad:c=0.4+recon."""


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Where it runs."""

    accelerator: str = "auto"
    """auto, cpu, cuda ..."""
    precision: str = "32-true"
    """32-true (or 32) or bf16-mixed."""
    compile: Flag = False
    """Train under torch.compile, but for what records or balances the tasks' gradients."""
    fast_dev_run: Flag = False
    """Two small batches of everything, to see that all of it runs; the numbers mean nothing."""


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """Several devices for each training (data parallel)."""

    devices: Int = None
    """Processes of one device each that do every training together; each takes batches of the given size."""
    sync_batchnorm: Flag = False
    """Let their BatchNorms share statistics (not on CPUs); otherwise each normalises its own share of the batch."""


@dataclass(frozen=True, kw_only=True)
class JobsOptions:
    """How many trainings run side by side."""

    jobs: Int = None
    """Trainings side by side; by default one per core on a CPU, else one per GPU."""


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """Where results go."""

    out: Folder = None
    """Folder of the results; by default one in runs/ that is named after the problem."""
    resume: Flag = False
    """Continue in an existing folder: what is finished is kept."""
    overwrite: Flag = False
    """Replace an existing folder."""
    loggers: Names = ()
    """Where metrics go beside metrics.jsonl: tensorboard, or your own as file.py:Class."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is printed: results on stdout, progress on stderr if that is a terminal."""

    progress: Literal["auto", "always", "never"] = "auto"
    """Progress bars on stderr; auto shows them on a terminal."""
    quiet: Flag = False
    """No progress, whatever stderr is."""
    json: Flag = False
    """Print the result as JSON, for machines."""


# Commands. ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings(
    OneProblem,
    ProblemOptions,
    MethodsOptions,
    TrainingOptions,
    ProbingOptions,
    SplittingOptions,
    RecordingOptions,
    MachineOptions,
    ParallelOptions,
    JobsOptions,
    FolderOptions,
    OutputOptions,
):
    """Probe, rank, split, train every method and compare: the whole of Recon and its controls."""

    examples: ClassVar = (
        "reconmtl run multifashion",
        "reconmtl run planted --methods joint recon --seeds 0 1 2 --out runs/mine",
        "reconmtl run my_file.py:my_function --k 10 --resume --json > result.json",
    )


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(
    OneProblem,
    ProblemOptions,
    TrainingOptions,
    ProbingOptions,
    NullOptions,
    MachineOptions,
    ParallelOptions,
    JobsOptions,
    FolderOptions,
    OutputOptions,
):
    """Train for the first epochs and record, layer by layer, how the tasks' gradients relate: writes OUT/log."""

    examples: ClassVar = (
        "reconmtl probe multifashion --out runs/mine",
        "reconmtl probe planted --epochs 16 --probe-epochs 2 --seeds 0 1",
        "reconmtl probe my_file.py:my_function --fast-dev-run",
    )


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """What is trained from scratch."""

    method: str = "joint"
    """joint, single (a network per task), a balancer such as cagrad:c=0.4, or mmoe, cross-stitch, bmtas, rotograd."""
    plan: File = None
    """Layers to split beforehand, a plan.json of `reconmtl rank` or of a run."""


@dataclass(frozen=True, kw_only=True)
class FitSettings(
    OneProblem,
    ProblemOptions,
    MethodOptions,
    TrainingOptions,
    RecordingOptions,
    MachineOptions,
    ParallelOptions,
    JobsOptions,
    FolderOptions,
    OutputOptions,
):
    """Train one method from scratch, once per seed, and judge it on the test set: writes OUT/seed0 and so on."""

    examples: ClassVar = (
        "reconmtl fit multifashion --method single --seeds 0 1 2",
        "reconmtl fit planted --method joint --plan runs/mine/plan.json --out runs/mine-recon",
        "reconmtl fit my_file.py:my_function --epochs 10 --precision bf16-mixed --resume",
    )


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What is swept over: every method under every seed on every problem; each option can stand in the file."""

    problems: Names = ()
    """Ready problems, or your own as file.py:function or package.module:function."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Where the trainings run side by side."""

    jobs: Int = None
    """Trainings side by side; by default one per core on a CPU, else one per GPU, of a Ray cluster all of them."""
    engine: Engine = "local"
    """local: processes of this machine; ray: a Ray cluster (pip install "reconmtl[ray]")."""
    address: Text = None
    """Of the Ray cluster; by default the one that $RAY_ADDRESS names, else a new one on this machine."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings(
    SweepOptions,
    ProblemOptions,
    MethodsOptions,
    TrainingOptions,
    ProbingOptions,
    SplittingOptions,
    RecordingOptions,
    MachineOptions,
    EngineOptions,
    FolderOptions,
    OutputOptions,
):
    """Run methods x seeds x problems side by side. What fails is reported, what is finished is not done again."""

    examples: ClassVar = (
        "reconmtl sweep sweep.yaml",
        "reconmtl sweep sweep.yaml --seeds 0 1 2 --jobs 4 --out runs/sweep",
        "reconmtl sweep --problems planted multifashion --methods single joint recon --engine ray",
    )


@dataclass(frozen=True, kw_only=True)
class LsSettings(OutputOptions):
    """List the ready problems and their presets, the first of which is the default."""

    examples: ClassVar = (
        "reconmtl ls",
        "reconmtl ls --json",
        "reconmtl ls --json | python -m json.tool",
    )


@dataclass(frozen=True, kw_only=True)
class CheckSettings(OneProblem, ProblemOptions, OutputOptions):
    """Run one batch per task through a problem, report every fault at once, and list the layers that can be split."""

    examples: ClassVar = (
        "reconmtl check planted",
        "reconmtl check multifashion --width 8 --json",
        "reconmtl check my_file.py:my_function",
    )


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """What was recorded."""

    log: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="LOG ...")]
    """Folders of a probe, OUT/log; those of several seeds are counted together."""


@dataclass(frozen=True, kw_only=True)
class RankingOptions:
    """How layers are ordered, and which of them become a plan."""

    severity: Annotated[float, tyro.conf.arg(metavar="FLOAT")] = -0.1
    """The paper's S: gradients conflict when their cosine is below it; in (-1, 0]."""
    top: Int = None
    """The paper's K: plan to split so many layers."""
    budget_mb: Float = None
    """Instead: plan to split layers, most conflicts first, until so many megabytes are added."""
    by: Literal["recon", "random", "smallest", "norms", "first", "last"] = "recon"
    """Which layers: those with most conflicts, or a control of the same number."""
    seed: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """Of the random control."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", aliases=["-o"], help_behavior_hint=_hint)] = None
    """Write the plan to this file, plan.json say."""


@dataclass(frozen=True, kw_only=True)
class RankSettings(LogOptions, RankingOptions, OutputOptions):
    """Order the layers by how often the tasks' gradients conflict there; plan which of them to split."""

    examples: ClassVar = (
        "reconmtl rank runs/mine/log",
        "reconmtl rank runs/mine/log --severity -0.1 --top 25 -o plan.json",
        "reconmtl rank runs/mine/log --budget-mb 0.5 --json -o plan.json",
    )


@dataclass(frozen=True, kw_only=True)
class RunsOptions:
    """What is put side by side."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Folders of runs, or folders that hold some: of a study, of a method, of a sweep."""


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """What is compared with what."""

    baseline: Text = None
    """Label of the row that delta-m is relative to; by default the single-task runs, if there are any."""
    against: Text = None
    """Label of the row that every other is tested against, seed by seed; by default the baseline."""
    threshold: Annotated[float, tyro.conf.arg(metavar="FLOAT")] = -0.01
    """Gradients of the whole shared vector count as conflicting below this cosine."""
    format: Literal["markdown", "csv", "latex", "json"] = "markdown"
    """Of what is printed; --json is --format json."""


@dataclass(frozen=True, kw_only=True)
class CompareSettings(RunsOptions, ComparisonOptions, OutputOptions):
    """Put finished runs side by side: mean and spread over seeds, delta-m, size, time, and a paired test."""

    examples: ClassVar = (
        "reconmtl compare runs/mine",
        "reconmtl compare runs/mine runs/mine-recon --against joint",
        "reconmtl compare runs/sweep/planted-default --format latex > table.tex",
    )


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """What is written."""

    to: Annotated[Path, tyro.conf.arg(metavar="FILE", aliases=["-o"])] = Path("report.html")
    """The page: one file that needs no network; it is replaced if it exists."""
    figures: Folder = None
    """Folder for the same plots as PDF and PNG (pip install "reconmtl[figures]")."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings(RunsOptions, PageOptions, OutputOptions):
    """Write one self-contained HTML page about runs: plan, conflicts, curves, stability, comparison."""

    examples: ClassVar = (
        "reconmtl report runs/mine",
        "reconmtl report runs/mine runs/mine-recon --to mine.html",
        "reconmtl report runs/mine --to mine.html --figures figures",
    )


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Which data set, from where."""

    problem: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROBLEM")]
    """multifashion."""
    source: Annotated[Path | None, tyro.conf.arg(name="from", metavar="DIR", help_behavior_hint=_hint)] = None
    """Folder with the original files, e.g. mnist/ and fashion-mnist/."""
    download: Flag = False
    """Fetch the original files from their public mirrors first (into the folder given by --from, or the cache)."""
    cache: Folder = None
    """Where the data set is kept; by default the platform's cache folder, or $RECONMTL_CACHE."""
    seed: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """Of the composition."""
    overwrite: Flag = False
    """Replace a data set that is there."""


@dataclass(frozen=True, kw_only=True)
class DataSettings(SourceOptions, OutputOptions):
    """Build the full data set of a ready problem from its original files, into a cache folder."""

    examples: ClassVar = (
        "reconmtl data multifashion --from originals",
        "reconmtl data multifashion --download",
        "reconmtl data multifashion --download --cache /scratch/reconmtl --overwrite",
    )


@dataclass(frozen=True, kw_only=True)
class PaperOptions:
    """Which experiment, and how much of it."""

    action: Annotated[Literal["ls", "run", "show"], tyro.conf.Positional, tyro.conf.arg(metavar="{ls,run,show}")]
    """ls lists the experiments, run does what is missing, show prints what there is beside the paper's numbers."""
    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")] = ()
    """t1 to t16 and f1 to f11 as in the paper, controls, curves, curves-shared."""
    scale: Literal["mini", "full"] = "mini"
    """full is the paper's; mini runs on a laptop's CPU."""
    seeds: Ints = None
    """Trainings per row; 0 if not given, and for show all that are finished."""
    accelerator: str = "auto"
    """auto, cpu, cuda ..."""
    root: Annotated[tuple[str, ...] | None, _shown("NAME=DIR ...")] = None
    """Folders of the data sets that you have, for the full scale: celeba=DIR cityscapes=DIR nyuv2=DIR ..."""
    pretrained: Annotated[tuple[str, ...] | None, _shown("NAME=FILE ...")] = None
    """ImageNet weights, for the full scale, celeba=FILE pascal_context=FILE; runs have a folder of their own."""
    precision: str = "32-true"
    """32-true (or 32) or bf16-mixed; the latter's runs have a folder of their own."""
    compile: Flag = False
    """Train under torch.compile, but for what records or balances the tasks' gradients; in a folder of its own."""
    fast_dev_run: Flag = False
    """Two small batches of everything, to see that all of it runs; the numbers mean nothing. A folder of its own."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("results/paper")
    """Folder of all experiments; they share trainings."""
    to: Annotated[Path | None, tyro.conf.arg(metavar="FILE", aliases=["-o"])] = None
    """Write what is printed to this file too, as Markdown."""
    figures: Folder = None
    """Folder for a figure of each experiment as PDF and PNG (pip install "reconmtl[figures]")."""


@dataclass(frozen=True, kw_only=True)
class PaperSettings(PaperOptions, OutputOptions):
    """Repeat a table or figure of the paper, with the controls it should have had; finished trainings are kept."""

    examples: ClassVar = (
        "reconmtl paper ls",
        "reconmtl paper run controls --seeds 0 1 2",
        "reconmtl paper show t1 t7 --to page.md --figures figures",
    )


# Presets. -------------------------------------------------------------------------------------------------------------


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
        init: How the copies of split layers start.
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
    init: Literal["copy", "fresh"] = "copy"
    note: str = ""
