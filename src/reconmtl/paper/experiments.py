"""Every table and figure of the paper as one entry: what is trained, and what is shown beside the paper's numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from reconmtl.errors import UnknownNameError, nearest
from reconmtl.evaluation import Machine
from reconmtl.loop import NormStats
from reconmtl.paper import budgets, conflicts, controls, distances, drawings, iterations, selections, tables
from reconmtl.paper.answers import Claim
from reconmtl.paper.trainings import PRESETS, Place, Scale, Setup, Sources, Training, run_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One table or figure.

    Attributes:
        title: What it asks.
        places: Scale -> where it runs.
        trainings: What is trained, most telling first.
        rows: The paper's name of a row -> its training; empty where the rows are not the paper's.
        probes: What is recorded besides: (setup, seed) -> anything; each is resumable.
        recorded: (setup, seeds) -> those of the seeds whose probes are finished.
        show: (setup, seeds) -> Markdown.
        draw: (setup, seeds) -> matplotlib's figure; None if nothing is finished.
        draw_layers: The same for single layers, where the experiment has them.
        claims: The paper's numbers beside ours, of an experiment that has some of its own.
        trains: Whether it needs the problem's data; else only its network is measured.
        elsewhere: Scale -> another data set that it needs too.
    """

    title: str
    places: Mapping[Scale, Place]
    trainings: Sequence[Training] = ()
    rows: Mapping[str, Training] = field(default_factory=dict)
    probes: Callable[[Setup, int], object] | None = None
    recorded: Callable[[Setup, Sequence[int]], Sequence[int]] | None = None
    show: Callable[[Setup, Sequence[int]], str]
    draw: Callable[[Setup, Sequence[int]], Figure | None]
    draw_layers: Callable[[Setup, Sequence[int]], Figure | None] | None = None
    claims: Callable[[Setup, Sequence[int]], Sequence[Claim]] | None = None
    trains: bool = True
    elsewhere: Mapping[Scale, Place] = field(default_factory=dict)

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
        """Where it runs, see `Setup.of`; with `showing`, results can be shown though the data is missing.

        Raises:
            ReconError: If there is no such scale, or the data is missing.
        """
        if scale not in self.places:
            raise UnknownNameError(f"There is no scale {scale!r} here. {nearest(scale, self.places)}")
        showing = showing or not self.trains
        if scale in self.elsewhere and not showing:
            self.elsewhere[scale].setup(scale, out, smoke=smoke, where=where, sources=sources)  # is its data there?
        return self.places[scale].setup(scale, out, smoke=smoke, where=where, sources=sources, showing=showing)

    def run(
        self, setup: Setup, seeds: Sequence[int], tell: Callable[[str], None] = print
    ) -> list[tuple[str, int, str]]:
        """Do what is missing; see `run_all`."""
        if self.probes is not None:
            for seed in seeds:
                self.probes(setup, seed)
        return run_all(setup, self.trainings, seeds, tell)


MULTIFASHION: Mapping[Scale, Place] = {"mini": Place(problem="multifashion"), "full": Place(problem="multifashion")}
CELEBA: Mapping[Scale, Place] = {"mini": Place(problem="celeba"), "full": Place(problem="celeba")}
CITYSCAPES: Mapping[Scale, Place] = {
    "mini": Place(problem="scenes", network="segnet", tasks=("semantic", "depth")),
    "full": Place(problem="cityscapes", network="segnet"),
}
NYUV2: Mapping[Scale, Place] = {
    "mini": Place(problem="scenes", network="mtan"),
    "full": Place(problem="nyuv2", network="mtan"),
}
PASCAL: Mapping[Scale, Place] = {
    "mini": Place(problem="scenes", network="mobilenet"),
    "full": Place(problem="pascal_context"),
}
NYUV2_SEGNET: Mapping[Scale, Place] = {
    "mini": Place(problem="scenes", network="segnet"),
    "full": Place(problem="nyuv2", network="segnet"),
}
CITYSCAPES_MTAN: Mapping[Scale, Place] = {
    "mini": Place(problem="scenes", network="mtan", tasks=("semantic", "depth")),
    "full": Place(problem="cityscapes", network="mtan"),
}


def _results(
    table: str,
    title: str,
    places: Mapping[Scale, Place],
    *,
    cagrad: float,
    others: Mapping[str, Training] = MappingProxyType({}),
    elsewhere: Mapping[Scale, Place] | None = None,
) -> Experiment:
    found = None if elsewhere is None else tables.found_in(elsewhere)
    of = tables.rows(cagrad=cagrad, others=others, elsewhere=found)
    return Experiment(
        title=title,
        places=places,
        trainings=tuple(of.values()),
        rows=of,
        elsewhere=elsewhere or {},
        show=lambda setup, seeds: tables.show(setup, of, table, seeds),
        draw=lambda setup, seeds: tables.draw(setup, of, table, seeds),
        claims=lambda setup, seeds: tables.claims(setup, of, table, seeds),
    )


def _distribution(
    table: str, title: str, places: Mapping[Scale, Place], *, cagrad: float, record: int = 1, before: bool = False
) -> Experiment:
    only = ("Joint-train", *tables.BALANCED) if before else ()
    of = conflicts.recorded(cagrad=cagrad, record=record, only=only)
    return Experiment(
        title=title,
        places=places,
        trainings=tuple(of.values()),
        show=lambda setup, seeds: conflicts.show(setup, of, table, seeds),
        draw=lambda setup, seeds: conflicts.draw(setup, of, seeds),
        claims=None if before else lambda setup, seeds: conflicts.claims(setup, of, table, seeds),
    )


def _selection(table: str, title: str, ours: Mapping[str, str], faithful: Sequence[Training]) -> Experiment:
    of = (Training(name="joint"), *faithful, *controls.FAIR)
    names = {"table": table, "Recon": "recon (shared statistics)", **ours}
    return Experiment(
        title=title,
        places=MULTIFASHION,
        trainings=of,
        show=lambda setup, seeds: selections.show(setup, names, of, seeds),
        draw=lambda setup, seeds: controls.draw(setup, of, seeds),
        claims=lambda setup, seeds: selections.claims(setup, names, of, seeds),
    )


def _controls(title: str, of: Sequence[Training]) -> Experiment:
    return Experiment(
        title=title,
        places=MULTIFASHION,
        trainings=of,
        show=lambda setup, seeds: controls.show(setup, of, seeds),
        draw=lambda setup, seeds: controls.draw(setup, of, seeds),
    )


def _curves(title: str, norm_stats: NormStats) -> Experiment:
    of = (Training(name="joint"), *budgets.in_turns(budgets.curve(norm_stats)))
    return Experiment(
        title=title,
        places=MULTIFASHION,
        trainings=of,
        show=lambda setup, seeds: budgets.show(setup, of, seeds),
        draw=lambda setup, seeds: budgets.draw(setup, norm_stats, of, seeds),
    )


def _measured(setup: Setup, seeds: Sequence[int]) -> Sequence[int]:
    return seeds[:1] if iterations.files_in(setup.folder) else ()


def _measure(setup: Setup, seed: int) -> None:
    del seed
    device = setup.machine().fabric().device.type
    if not iterations.file_of(setup.folder, device).exists():
        size: dict[str, Any] = {}
        if setup.smoke:
            size = {"tasks": (2, 3), "width": 2, "batch": 2, "rounds": 1}
        elif setup.scale == "full":
            size = {"width": setup.decided.options["width"], "batch": setup.decided.batch_size}
        iterations.measure(setup.folder, device=device, **size)


_STAGES = tables.stages()

EXPERIMENTS: Mapping[str, Experiment] = {
    "t1": _results("t1", "Methods with and without Recon, Multi-Fashion+MNIST", MULTIFASHION, cagrad=0.2,
                   others=tables.others("rotograd", "bmtas", "mmoe", recon_too=("mmoe",))),
    "t2": _results("t2", "Methods with and without Recon, CelebA", CELEBA, cagrad=0.1),
    "t3": _results("t3", "Methods with and without Recon, CityScapes", CITYSCAPES, cagrad=0.2,
                   others=tables.others("cross-stitch", "rotograd:m=1024")),
    "t4": _results("t4", "Methods with and without Recon, PASCAL-Context", PASCAL, cagrad=0.1,
                   others=tables.others("bmtas:resource_weight=0.1", recon_too=("bmtas:resource_weight=0.1",))),
    "t5": _results("t5", "Methods with and without Recon, NYUv2", NYUV2, cagrad=0.4,
                   others=tables.others("cross-stitch", network="segnet")),  # told by its size
    "t6": _distribution("t6", "How gradients conflict, Multi-Fashion+MNIST", MULTIFASHION, cagrad=0.2),
    "t7": _selection("t7", "Recon and random layers, as published and fair", {
        "RSL": "random layers (shared statistics)", "RSP": "random parameters, exceeding (shared statistics)",
    }, controls.TABLE_7),
    "t8": _distribution("t8", "How gradients conflict, CityScapes", CITYSCAPES, cagrad=0.2),
    "t9": _distribution("t9", "How gradients conflict, NYUv2", NYUV2, cagrad=0.4),
    "t10": _distribution("t10", "How gradients conflict, PASCAL-Context", PASCAL, cagrad=0.1),
    "t11": _selection("t11", "Recon and the first or last layers, as published and fair", {
        "last": "last layers (shared statistics)", "first": "first layers (shared statistics)",
    }, (*controls.TABLE_11, *controls.FAIR_11)),
    "t12": Experiment(title="Do stages of training give the same ranking?", places=MULTIFASHION,
                      probes=distances.of_stages, recorded=distances.stages_there,
                      show=distances.show_stages, draw=distances.draw_stages, draw_layers=distances.draw_layers,
                      claims=distances.claims_of_stages),
    "t13": Experiment(title="Layers found in different stages of training, CityScapes", places=CITYSCAPES,
                      trainings=tuple(_STAGES.values()), rows=_STAGES,
                      show=lambda setup, seeds: tables.show(setup, _STAGES, "t13", seeds),
                      draw=lambda setup, seeds: tables.draw(setup, _STAGES, "t13", seeds),
                      claims=lambda setup, seeds: tables.claims(setup, _STAGES, "t13", seeds)),
    "t14": Experiment(title="Do methods give the same ranking?", places=MULTIFASHION,
                      probes=distances.of_methods, recorded=distances.methods_there,
                      show=distances.show_methods, draw=distances.draw_methods, claims=distances.claims_of_methods),
    "t15": _results("t15", "NYUv2 on SegNet; Recon* takes the layers found on CityScapes", NYUV2_SEGNET, cagrad=0.4,
                    elsewhere=CITYSCAPES),
    "t16": _results("t16", "CityScapes on MTAN; Recon* takes the layers found on NYUv2", CITYSCAPES_MTAN, cagrad=0.2,
                    elsewhere=NYUV2),
    "f1": _distribution("t6", "How gradients conflict before Recon, Multi-Fashion+MNIST", MULTIFASHION, cagrad=0.2,
                        before=True),
    "f3": Experiment(title="How many layers (K), and how severe (S)?", places=MULTIFASHION,
                     trainings=controls.FIGURE_3, draw=controls.draw_choices,
                     show=lambda setup, seeds: controls.show(setup, controls.FIGURE_3, seeds)),
    "f4": _distribution("t6", "How gradients conflict before and after Recon, Multi-Fashion+MNIST", MULTIFASHION,
                        cagrad=0.2),
    "f5": _distribution("t8", "How gradients conflict before Recon, CityScapes", CITYSCAPES, cagrad=0.2, before=True),
    "f6": _distribution("t9", "How gradients conflict before Recon, NYUv2", NYUV2, cagrad=0.4, before=True),
    "f7": _distribution("t10", "How gradients conflict before Recon, PASCAL-Context", PASCAL, cagrad=0.1, before=True),
    "f8": _distribution("t8", "How gradients conflict before and after Recon, CityScapes", CITYSCAPES, cagrad=0.2),
    "f9": _distribution("t9", "How gradients conflict before and after Recon, NYUv2", NYUV2, cagrad=0.4),
    "f10": _distribution("t10", "How gradients conflict before and after Recon, PASCAL-Context", PASCAL, cagrad=0.1),
    "f11": Experiment(title="What an iteration costs, by number of tasks", places=CELEBA,
                      probes=_measure, recorded=_measured, trains=False,
                      show=lambda setup, _seeds: iterations.show(setup.folder),
                      draw=lambda setup, _seeds: iterations.draw(setup.folder)),
    "controls": _controls("Does it matter which layers are split?", controls.CENTRAL),
    "curves": _curves("Recon, random and smallest layers over K and over budgets", "per-task"),
    "curves-shared": _curves("Recon, random and smallest layers over K and over budgets, statistics shared",
                             "shared"),
}  # fmt: skip
"""Name -> experiment: the paper's tables and figures, and the controls that it should have had."""


def find(name: str) -> Experiment:
    """One experiment.

    Raises:
        UnknownNameError: If there is none of this name; the nearest are given.
    """
    if name not in EXPERIMENTS:
        raise UnknownNameError(f"Unknown experiment {name!r}. {nearest(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]


def page(name: str, setup: Setup, seeds: Sequence[int]) -> str:
    """What `reconmtl paper show` prints: the experiment's result so far, and how it was trained."""
    experiment = find(name)
    d = setup.decided
    options = "".join(f"{k} {v}, " for k, v in d.options.items())
    told = (
        f"{d.problem}, {options}{d.epochs} epochs ({d.probe_epochs} probed), batch {d.batch_size}, K = {d.k}, "
        f"S = {d.severity:g}; runs are in {setup.folder}."
    )
    if not experiment.trains:
        told = f"The network of {d.problem}; the measurements are in {setup.folder}."
    return "\n\n".join([f"## {name}: {experiment.title}", told, experiment.show(setup, seeds)])


def draw(name: str, setup: Setup, seeds: Sequence[int], folder: Path) -> list[Path]:
    """Write an experiment's figures as PDF and PNG.

    Returns:
        The PNGs; none if nothing is finished that could be drawn.

    Raises:
        RunError: If matplotlib is missing, or the folder cannot be written to.
    """
    experiment = find(name)
    kinds = {name: experiment.draw, f"{name}-layers": experiment.draw_layers}
    written = [
        drawings.save(partial(draw, setup, seeds), folder, f"{setup.scale}-{kind}")
        for kind, draw in kinds.items()
        if draw is not None
    ]
    return [path for path in written if path is not None]


def embedded(name: str, pictures: Sequence[Path], page: Path | None) -> str:
    """The Markdown that shows figures on a page, named relative to it."""
    folder = Path() if page is None else page.parent
    places = [Path(os.path.relpath(picture, folder)).as_posix() for picture in pictures]
    return "".join(f"\n\n![{find(name).title}]({place})" for place in places)


def listed() -> list[dict[str, object]]:
    """What `reconmtl paper ls` prints: every experiment and its scales."""
    found: list[dict[str, object]] = []
    for name, e in EXPERIMENTS.items():
        scales = [s for s, place in e.places.items() if s in PRESETS.get(place.problem, {})]
        found.append({"name": name, "title": e.title, "scales": scales})
    return found


def overview(found: Sequence[Mapping[str, object]]) -> str:
    """`listed` as lines of text."""
    lines = []
    for e in found:
        scales = e["scales"]
        assert isinstance(scales, list)
        lines.append(f"{e['name']:15} {e['title']} ({', '.join(scales)})")
    return "\n".join(lines)


def finished_seeds(name: str, setup: Setup) -> tuple[int, ...]:
    """Seeds under which something of an experiment is finished."""
    experiment = find(name)
    names = {
        path.name.removeprefix("seed") for depth in ("*", "probes/*") for path in setup.folder.glob(f"{depth}/seed*")
    }
    there = sorted({0, *(int(n) for n in names if n.isdecimal())})
    found = {s for s in there if any(t.finished(setup, s) is not None for t in experiment.trainings)}
    if experiment.recorded is not None:
        found |= set(experiment.recorded(setup, there))
    return tuple(sorted(found)) or (0,)
