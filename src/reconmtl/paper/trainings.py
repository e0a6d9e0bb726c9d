"""What the experiments are made of: probes and trainings at a scale, each in its own folder and done only once.

Experiments name trainings, not folders: the joint training of one experiment is that of all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from reconmtl.architectures import way
from reconmtl.choices import Decided, decide, find_problem, load_problem
from reconmtl.conflicts import ConflictLog
from reconmtl.errors import DataError, ReconError, UnknownNameError, nearest
from reconmtl.evaluation import Machine
from reconmtl.plan import Plan
from reconmtl.problem import Problem
from reconmtl.runs import Run
from reconmtl.settings import Settings
from reconmtl.train import fit, probe

SMOKE_TASKS = 4
"""Tasks of a smoke test, at most: what forty show of whether it runs, four do."""
Scale = Literal["mini", "full"]
SCALES: tuple[Scale, ...] = ("mini", "full")
PRESETS: Mapping[str, Mapping[Scale, str]] = {
    "pascal_context": {"full": "paper"},
    "multifashion": {"mini": "demo", "full": "paper"},
    "celeba": {"mini": "demo", "full": "paper"},
    "cityscapes": {"full": "paper"},
    "nyuv2": {"full": "paper"},
    "scenes": {"mini": "demo"},
    "planted": {"mini": "default"},
}
"""Problem -> scale -> its preset. The paper's dense problems need their files; drawn scenes stand in for them."""
STAND_INS: Mapping[str, str] = {"multifashion": "mini", "celeba": "generated"}
"""Problem -> data of the same shape that is always there: enough to count a network's parameters and operations."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the files are that the paper's scale needs.

    Attributes:
        roots: Problem -> folder of its data set.
        weights: Problem -> file with ImageNet weights of its trunk.
    """

    roots: Mapping[str, Path] = field(default_factory=dict)
    weights: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A problem at a scale, and the folder of everything that is trained on it.

    Attributes:
        decided: Everything the trainings depend on but for method, plan and seed.
        folder: Of the probes and trainings.
        scale: Which of the problem's presets it is.
        smoke: Two small batches of everything.
        where: Accelerator, precision and compilation.
        sources: Files of the data sets and of pretrained weights.
        stand_in: Data that stands for missing one where results are only shown; None if it is there.
    """

    decided: Decided
    folder: Path
    scale: Scale = "mini"
    smoke: bool = False
    where: Machine = field(default_factory=Machine)
    sources: Sources = field(default_factory=Sources)
    stand_in: str | None = None

    @classmethod
    def of(
        cls,
        problem: str,
        scale: Scale,
        out: Path,
        *,
        smoke: bool = False,
        where: Machine | None = None,
        sources: Sources | None = None,
        epochs: int | None = None,
        network: str | None = None,
        tasks: tuple[str, ...] | None = None,
        width: int | None = None,
        showing: bool = False,
    ) -> Setup:
        """The problem with the preset that stands for the scale.

        Args:
            problem: A ready one.
            scale: One of its scales.
            out: Folder of all setups' folders.
            smoke: Two small batches of everything, in a folder of its own.
            where: Accelerator, precision and compilation.
            sources: Files of the data sets and of pretrained weights; of the full scale only.
            epochs: Instead of the preset's.
            network: Of a problem that has several.
            tasks: If not all.
            width: Instead of the preset's.
            showing: Nothing will be trained: data that is missing may be stood in for.

        Raises:
            ReconError: If the problem has no such scale, or its data is missing.
        """
        presets = PRESETS[problem]
        if scale not in presets:
            raise UnknownNameError(f"{problem} has no scale {scale!r}. {nearest(scale, presets)}")
        where = where or Machine()
        sources = sources or Sources()
        weights = sources.weights.get(problem) if scale == "full" else None
        precision = "32-true" if where.precision == "32" else where.precision
        settings = Settings(
            problem=problem,
            preset=presets[scale],
            fast_dev_run=smoke,
            accelerator=where.accelerator,
            precision=precision,
            compile=where.backend is not None,
            epochs=epochs,
            network=network,
            tasks=tasks,
            width=width,
            root=sources.roots.get(problem) if scale == "full" else None,
            pretrained=weights,
        )
        parts = [scale, problem, *([network] if network else []), *(tasks or [])]
        parts += [f"width-{width}"] if width else []
        parts += [] if precision == "32-true" else [precision]
        parts += ["compiled"] if where.backend is not None else []
        parts += ["pretrained"] if weights is not None else []
        parts += ["fast-dev-run"] if smoke else []  # or the training itself would be taken for finished
        name = "-".join([*parts, *([f"{epochs}-epochs"] if epochs else [])])
        decided, stand_in = _decided(settings, showing=showing)
        if smoke and len(decided.tasks) > SMOKE_TASKS:
            decided, stand_in = _decided(replace(settings, tasks=decided.tasks[:SMOKE_TASKS]), showing=showing)
        return cls(
            decided=decided,
            folder=out / name,
            scale=scale,
            smoke=smoke,
            where=where,
            sources=sources,
            stand_in=stand_in,
        )

    def problem(self, width: int | None = None, **options: object) -> Problem:
        """The problem, with a network of another width if one is given, or with other options."""
        given = options | ({} if width is None else {"width": width})
        given |= {} if self.stand_in is None else {"data": self.stand_in}
        return load_problem(replace(self.decided, options=self.decided.options | given))

    def machine(self) -> Machine:
        """Where it runs."""
        return replace(self.where, precision=self.decided.precision, max_batches=self.decided.max_batches)

    def probe(
        self, seed: int, *, method: str = "joint", balancer: str = "joint", epochs: int | None = None
    ) -> ConflictLog:
        """The log of a probe under a seed; one that is finished is read.

        Args:
            seed: Of the probe.
            method: Whose network is probed.
            balancer: How the shared gradient is formed meanwhile.
            epochs: Length; the setup's if it is not given.
        """
        length = self.decided.probe_epochs if epochs is None else epochs
        folder = self._log(seed, method, balancer, length)
        if self.stand_in is not None and (folder / "log.json").exists():
            return ConflictLog.load(folder)  # there is no data to compare its settings with
        machine = self.machine()
        if self.smoke:
            machine = replace(machine, max_batches=4)  # a recording has quarters
        return probe(
            way(method).change(self.problem()),
            epochs=length,
            balancer=balancer,
            seed=seed,
            out=folder,
            resume=True,
            machine=machine,
        )

    def probed(self, seed: int, *, method: str = "joint", balancer: str = "joint", epochs: int | None = None) -> bool:
        """Whether the log of a probe is finished."""
        length = self.decided.probe_epochs if epochs is None else epochs
        return (self._log(seed, method, balancer, length) / "log.json").exists()

    def _log(self, seed: int, method: str, balancer: str, epochs: int) -> Path:
        network = [] if method == "joint" else [slug(method)]
        name = "-".join([*network, balancer_slug(balancer), f"{epochs}-epochs"])
        return self.folder / "probes" / name / f"seed{seed}"


def _decided(settings: Settings, *, showing: bool) -> tuple[Decided, str | None]:
    """What is trained, and the data that stands in for it, if it is only shown and its own is missing.

    Raises:
        ReconError: If the data is missing, or a value is wrong; folders are asked for as `reconmtl paper` takes them.
    """
    try:
        return decide(settings), None
    except ReconError as error:
        if showing and isinstance(error.__cause__, DataError) and settings.problem in STAND_INS:
            stand_in = STAND_INS[settings.problem]
            decided = decide(replace(settings, data=stand_in, root=None, pretrained=None))
            own = find_problem(settings.problem)[1][decided.preset or ""].options
            return replace(decided, options=decided.options | {n: own[n] for n in ("data",) if n in own}), stand_in
        told = str(error).replace("--root DIR", f"--root {settings.problem}=DIR")
        raise type(error)(told.replace("--pretrained FILE", f"--pretrained {settings.problem}=FILE")) from error


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an experiment runs at a scale: a problem, its network if it has several, and tasks if not all."""

    problem: str
    network: str | None = None
    tasks: tuple[str, ...] | None = None

    def setup(
        self,
        scale: Scale,
        out: Path,
        *,
        smoke: bool = False,
        where: Machine | None = None,
        sources: Sources | None = None,
        showing: bool = False,
    ) -> Setup:
        """The problem as the experiment needs it; see `Setup.of`."""
        return Setup.of(
            self.problem,
            scale,
            out,
            smoke=smoke,
            where=where,
            sources=sources,
            network=self.network,
            tasks=self.tasks,
            showing=showing,
        )


Choice = Callable[[Setup, ConflictLog, int], Plan]
"""How layers are chosen: (setup, log of the seed's probe, seed) -> plan."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One row of a table: a way to train.

    Attributes:
        name: Row label, and name of its folder.
        method: "joint", "single", or an architecture with its parameters, see `reconmtl.architectures`.
        options: Of the problem, where they differ from the setup's.
        choose: Layers to split; None for none.
        balancer: How the shared gradient is formed.
        norm_stats: Running statistics of shared BatchNorms behind a split.
        width: Of the network; None for the setup's. A function finds it from the setup and the log.
        record: Record one of so many steps; 0 for none.
    """

    name: str
    method: str = "joint"
    options: Mapping[str, object] = field(default_factory=dict)
    choose: Choice | None = None
    balancer: str = "joint"
    norm_stats: Literal["per-task", "shared"] = "per-task"
    width: Callable[[Setup, ConflictLog], int] | None = None
    record: int = 0

    @property
    def row(self) -> str:
        """What tables of ours call it: its name, with what sets it apart from others of that name."""
        parts = [] if self.balancer == "joint" else [self.balancer]
        parts += ["shared statistics"] if self.norm_stats == "shared" else []
        return f"{self.name} ({', '.join(parts)})" if parts else self.name

    def folder(self, setup: Setup) -> Path:
        """Where its runs are."""
        parts = [self.name] if self.balancer == "joint" else [self.name, balancer_slug(self.balancer)]
        parts += ["shared-statistics"] if self.norm_stats == "shared" else []
        parts += [f"record-{self.record}"] if self.record else []
        return setup.folder / "-".join(slug(p) for p in parts)

    def log(self, setup: Setup, seed: int) -> ConflictLog:
        """What its layers are chosen by: of the joint network, or of its own if that has other layers."""
        own = (found := way(self.method).architecture) is not None and found.own_layers
        return setup.probe(seed, method=self.method if own else "joint")

    def finished(self, setup: Setup, seed: int) -> Run | None:
        """Its run under a seed, if there is one."""
        path = self.folder(setup) / f"seed{seed}"
        return Run.load(path) if (path / "result.json").exists() else None

    def run(self, setup: Setup, seed: int) -> Run:
        """Train it under a seed; a run that is finished is read.

        Raises:
            ReconError: If it cannot be trained.
        """
        if (done := self.finished(setup, seed)) is not None:
            return done
        log = self.log(setup, seed) if self.choose is not None or self.width is not None else None
        plan = None if self.choose is None or log is None else self.choose(setup, log, seed)
        width = None if self.width is None or log is None else self.width(setup, log)
        (run,) = fit(
            setup.problem(width, **self.options),
            method=self.method,
            plan=plan,
            balancer=None if self.method == "single" else self.balancer,
            record=self.record,
            seeds=(seed,),
            norm_stats=self.norm_stats,
            out=self.folder(setup),
            resume=True,
            machine=setup.machine(),
        )
        (self.folder(setup) / f"seed{seed}" / "last.ckpt").unlink(missing_ok=True)  # tables need no weights
        return run


def taking(option: str) -> list[str]:
    """Problems of the paper's scale whose `make` takes an option."""
    full = (problem for problem, presets in PRESETS.items() if "full" in presets)
    return [problem for problem in full if option in inspect.signature(find_problem(problem)[0]).parameters]


def slug(name: str) -> str:
    """A name as that of a folder."""
    return "".join(c if c.isalnum() or c in "._" else "-" for c in name).strip("-")


def balancer_slug(spec: str) -> str:
    """A balancer's spec as part of a folder's name."""
    return slug(spec.replace("=", "").replace(":", "-"))


def run_all(
    setup: Setup, trainings: Sequence[Training], seeds: Sequence[int], tell: Callable[[str], None] = print
) -> list[tuple[str, int, str]]:
    """Do what is not done yet, seed by seed; what cannot be done is told and left out.

    Returns:
        (training, seed, reason) of each that is missing.
    """
    lacking = []
    for seed in seeds:
        for training in trainings:
            if training.finished(setup, seed) is not None:
                continue
            try:
                run = training.run(setup, seed)
            except ReconError as error:
                lacking.append((training.row, seed, str(error)))
                tell(f"{training.row}, seed {seed}: missing: {error}")
            else:
                tell(f"{training.row}, seed {seed}: {run.seconds:.0f} s")
    return lacking
