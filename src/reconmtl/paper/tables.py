"""Tables 1-5, 13, 15 and 16: what methods reach, beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from reconmtl.architectures import ARCHITECTURES
from reconmtl.comparing import Comparison, Row, Spread, compare
from reconmtl.comparing import gain as gain_of
from reconmtl.conflicts import ConflictLog
from reconmtl.errors import ReconError
from reconmtl.formats import grid
from reconmtl.paper import drawings
from reconmtl.paper.answers import Claim
from reconmtl.paper.controls import half, recon
from reconmtl.paper.published import SINGLE, agreement, results
from reconmtl.paper.rankings import QUARTERS, overlap, quarters, transferred
from reconmtl.paper.trainings import Choice, Place, Scale, Setup, Training
from reconmtl.plan import Plan
from reconmtl.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BALANCED = {"MGDA": "mgda", "PCGrad": "pcgrad", "GradDrop": "graddrop", "CAGrad": "cagrad"}
"""Gradient methods of the paper's tables, and the library's names of them."""


def others(*methods: str, recon_too: Sequence[str] = (), **options: object) -> dict[str, Training]:
    """Rows of methods with a network of their own.

    Args:
        methods: As `fit` names them, "rotograd:m=1024" say.
        recon_too: Those that the table has with Recon too.
        options: Of the problem, where they differ from the other rows'.
    """
    found = {}
    for method in methods:
        label = ARCHITECTURES[method.partition(":")[0]].label
        found[label] = Training(name=label, method=method, options=options)
        if method in recon_too:
            found[f"{label} w/ Recon"] = Training(
                name=f"{label} with recon", method=method, options=options, choose=recon()
            )
    return found


def found_in(places: Mapping[Scale, Place]) -> Choice:
    """The layers that Recon finds on another data set with the same network (Recon* of Tables 15 and 16)."""

    def choose(setup: Setup, log: ConflictLog, seed: int) -> Plan:
        there = places[setup.scale].setup(
            setup.scale, setup.folder.parent, smoke=setup.smoke, where=setup.where, sources=setup.sources
        )
        return transferred(recon()(there, there.probe(seed), seed), log)

    return choose


def rows(
    *,
    cagrad: float,
    others: Mapping[str, Training] = MappingProxyType({}),
    elsewhere: Choice | None = None,
    record: int = 0,
) -> dict[str, Training]:
    """The rows of a table of results: each method without and with Recon.

    Args:
        cagrad: The paper's alpha on this data set.
        others: Rows that the table has besides.
        elsewhere: How the layers of rows with Recon* are chosen; None where the table has none.
        record: Record one of so many steps.
    """
    found = {
        SINGLE: Training(name="single", method="single"),
        "Joint-train": Training(name="joint", record=record),
        "Joint-train w/ Recon": Training(name="recon", choose=recon(), record=record),
    }
    for label, balancer in BALANCED.items():
        spec = f"{balancer}:c={cagrad:g}" if balancer == "cagrad" else balancer
        found[label] = Training(name="joint", balancer=spec, record=record)
        found[f"{label} w/ Recon"] = Training(name="recon", choose=recon(), balancer=spec, record=record)
    if elsewhere is not None:
        for label in ("Joint-train", *BALANCED):
            spec = found[label].balancer
            found[f"{label} w/ Recon*"] = Training(name="recon found elsewhere", choose=elsewhere, balancer=spec)
    return {**found, **others}


def stage(name: str) -> Choice:
    """Recon's choice by the conflicts of one quarter of a whole training (Table 13)."""

    def choose(setup: Setup, log: ConflictLog, seed: int) -> Plan:
        del log  # of the first epochs only
        whole = setup.probe(seed, epochs=setup.decided.epochs)
        return quarters(whole, severity=setup.decided.severity)[name].top(half(setup, whole))

    return choose


def stages() -> dict[str, Training]:
    """The rows of Table 13."""
    labels = ["1st 25% Iterations", "2nd 25% Iterations", "3rd 25% Iterations", "4th 25% Iterations", "All Iterations"]
    found = {SINGLE: Training(name="single", method="single")}
    for label, name in zip(labels, QUARTERS, strict=True):
        found[label] = Training(name=f"recon of {name}", choose=stage(name))
    return found


def finished(setup: Setup, of: Mapping[str, Training], seeds: Sequence[int]) -> list[Run]:
    """The runs that there are, labelled with their rows' names."""
    found = []
    for label, training in of.items():
        for seed in seeds:
            run = training.finished(setup, seed)
            if run is not None:
                found.append(replace(run, label=label))
    return found


@dataclass(frozen=True)
class Beside:
    """A row of ours beside the paper's.

    Attributes:
        row: Ours.
        printed: The paper's delta-m, in percent; None for its baseline, or where it has no such row.
        gain: Our delta-m less that of the same method without Recon, over the seeds that both have; None where there is
            none.
        printed_gain: The paper's.
    """

    row: Row
    printed: float | None
    gain: Spread | None
    printed_gain: float | None

    @property
    def agrees(self) -> str:
        """In words: the sign of the gain by Recon, and whether its size is within a factor of two."""
        return agreement(None if self.gain is None else self.gain.mean, self.printed_gain)


def beside(comparison: Comparison, table: str) -> list[Beside]:
    """Our rows beside those of one of the paper's tables."""
    printed = {r.method: r.delta_m.value for r in results(table)[0] if r.delta_m is not None}
    base = next((r for r in comparison.rows if r.label == comparison.baseline), None)
    directions = comparison.directions
    mean = None if base is None else {t: {m: base.metrics[t, m].mean for m in of} for t, of in directions.items()}
    runs = {r.label: {run.seed: run.metrics for run in r.runs} for r in comparison.rows}

    def gain(label: str) -> Spread | None:
        with_it, without = runs[label], runs.get(_without(label), {})
        both = sorted(with_it.keys() & without.keys())
        if label == _without(label) or mean is None or not both:
            return None
        each = [gain_of(with_it[s], mean, directions) - gain_of(without[s], mean, directions) for s in both]
        return Spread.of(each)

    def printed_gain(label: str) -> float | None:
        other = _without(label)
        return printed[label] - printed[other] if other != label and {label, other} <= printed.keys() else None

    return [Beside(r, printed.get(r.label), gain(r.label), printed_gain(r.label)) for r in comparison.rows]


def _without(label: str) -> str:
    """The same method without Recon."""
    return label.removesuffix("*").removesuffix(" w/ Recon")


def claims(setup: Setup, of: Mapping[str, Training], table: str, seeds: Sequence[int]) -> list[Claim]:
    """The paper's delta-m and gains by Recon beside ours."""
    runs = finished(setup, of, seeds)
    try:
        found = beside(compare(runs), table) if runs else []
    except ReconError:
        return []
    told = []
    for b in found:
        if b.row.delta_m is not None and b.printed is not None:
            told.append(Claim(f"Δm of {b.row.label}", b.row.delta_m, b.printed))
        if b.gain is not None and b.printed_gain is not None:
            told.append(Claim(f"gain in Δm, {b.row.label}", b.gain, b.printed_gain))
    return told


def draw(setup: Setup, of: Mapping[str, Training], table: str, seeds: Sequence[int]) -> Figure | None:
    """Delta-m of every method, and the paper's."""
    runs = finished(setup, of, seeds)
    try:
        found = beside(compare(runs), table) if runs else []
    except ReconError:
        return None
    rows = [drawings.Dot(b.row.label, b.row.delta_m, b.printed) for b in found if b.row.delta_m is not None]
    return drawings.dots(rows, "Δm relative to single-task training (%)") if rows else None


def show(setup: Setup, of: Mapping[str, Training], table: str, seeds: Sequence[int]) -> str:
    """Markdown: our table, and delta-m beside the paper's."""
    runs = finished(setup, of, seeds)
    if not runs:
        return "Nothing is finished yet."
    comparison = compare(runs)
    parts = [str(comparison)]
    try:
        found = beside(comparison, table)
    except ReconError as error:
        return "\n\n".join([*parts, str(error)])

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:+.2f}"

    cells = [
        [
            b.row.label,
            "" if b.row.delta_m is None else b.row.delta_m.show(2, sign=True),
            number(b.printed),
            agreement(None if b.row.delta_m is None else b.row.delta_m.mean, b.printed),
            str(len(b.row.seeds)),
            "" if b.gain is None else b.gain.show(2, sign=True),
            number(b.printed_gain),
            b.agrees,
            "" if b.gain is None else str(b.gain.n),
        ]
        for b in found
    ]
    titles = ["method", "Δm (%)", "paper's Δm", "agrees", "n"]
    titles += ["gain by Recon", "paper's gain", "agrees", "n"]
    head = (
        "Beside the paper (its n = 3). Gains by Recon are over the seeds that the row and the one without Recon have:"
    )
    return "\n\n".join([*parts, head, grid(titles, cells), *_in_common(runs)])


def _in_common(runs: Sequence[Run]) -> list[str]:
    """How many of the layers found here were found elsewhere too, where a table has both."""
    plans: dict[str, dict[int, Plan]] = {"": {}, "*": {}}
    for run in runs:
        mark = "*" if run.label.endswith("*") else ""
        if run.plan is not None:
            plans[mark].setdefault(run.seed, run.plan)
    seeds = sorted(plans[""].keys() & plans["*"].keys())
    told = [f"{overlap(plans[''][s], plans['*'][s])} of {len(plans[''][s])} (seed {s})" for s in seeds]
    if not told:
        return []
    return [
        f"Layers found here that were found on the other data set too: {', '.join(told)}. The paper: 38 of 40 on "
        "SegNet, 17 of 25 on MTAN."
    ]
