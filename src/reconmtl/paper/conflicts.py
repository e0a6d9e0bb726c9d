"""Figures 1 and 4-10, Tables 6 and 8-10: how gradients conflict over the whole vector that is still shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from reconmtl.comparing import Spread
from reconmtl.conflicts import distribution, share_below
from reconmtl.formats import grid
from reconmtl.paper.answers import Claim
from reconmtl.paper.controls import random_layers, random_parameters
from reconmtl.paper.published import CUTS, JOINT, agreement, distributions, reduction
from reconmtl.paper.tables import finished, rows
from reconmtl.paper.trainings import Setup, Training
from reconmtl.reporting.cosines import Distributions
from reconmtl.reporting.figures import draw_cosines
from reconmtl.reporting.material import gather

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def recorded(*, cagrad: float, record: int, only: Sequence[str] = ()) -> dict[str, Training]:
    """The columns of a table of distributions: trainings whose gradients are recorded.

    Args:
        cagrad: The paper's alpha on this data set.
        record: One of so many steps.
        only: Just these columns; all of the table by default.
    """
    of = {label: t for label, t in rows(cagrad=cagrad, record=record).items() if t.method == "joint"}
    of[f"{JOINT} w/ RSL"] = Training(name="random layers", choose=random_layers, record=record)
    of[f"{JOINT} w/ RSP"] = Training(
        name="random parameters, exceeding", choose=random_parameters(exceed=True), record=record
    )
    return {label: t for label, t in of.items() if not only or label in only}


def draw(setup: Setup, of: Mapping[str, Training], seeds: Sequence[int]) -> Figure | None:
    """A histogram of cosines per method."""
    runs = finished(setup, of, seeds)
    found = Distributions.of(gather(runs)) if runs else None
    if found is None:
        return None
    order = list(of)  # a method beside itself with Recon, as in the paper
    return draw_cosines(replace(found, rows=tuple(sorted(found.rows, key=lambda row: order.index(row.label)))))


def tails(
    setup: Setup, of: Mapping[str, Training], table: str, seeds: Sequence[int]
) -> dict[str, list[tuple[int, list[float], float]]]:
    """Row -> per seed: percent of cosines per interval, and below the table's cut."""
    edges, cut = next(d.edges for d in distributions(table) if d.method == JOINT), CUTS[table]
    found: dict[str, list[tuple[int, list[float], float]]] = {}
    for run in finished(setup, of, seeds):
        if run.log is not None:
            whole = run.log.whole()
            shares = (100 * distribution(whole, edges=edges)).tolist()
            found.setdefault(run.label, []).append((run.seed, shares, 100 * share_below(whole, cut)))
    return found


def reductions(logs: Mapping[str, Sequence[tuple[int, list[float], float]]]) -> dict[str, Spread]:
    """Row -> percent fewer severe conflicts than in joint training, over the seeds that have both."""
    base = {seed: tail for seed, _, tail in logs.get(JOINT, [])}
    each = {
        label: [reduction(base[s], tail) for s, _, tail in of if base.get(s)]
        for label, of in logs.items()
        if label != JOINT
    }
    return {label: Spread.of(values) for label, values in each.items() if values}


def claims(setup: Setup, of: Mapping[str, Training], table: str, seeds: Sequence[int]) -> list[Claim]:
    """The paper's reductions of conflicts beside ours."""
    printed = {d.method: d.reduction for d in distributions(table)}
    return [
        Claim(f"reduction below {CUTS[table]:g}, {label} (%)", ours, paper)
        for label, ours in reductions(tails(setup, of, table, seeds)).items()
        if (paper := printed.get(label)) is not None
    ]


def show(setup: Setup, of: Mapping[str, Training], table: str, seeds: Sequence[int]) -> str:
    """Markdown: shares of cosines per interval and their reduction, ours with the paper's in brackets."""
    printed = {d.method: d for d in distributions(table)}
    edges, cut = printed[JOINT].edges, CUTS[table]
    logs = tails(setup, of, table, seeds)
    if not logs:
        return "Nothing is finished yet."
    limits = [1.0, *edges, -1.0]
    titles = ["cos", *logs]
    cells = []
    for i in range(len(edges) + 1):
        line = [f"{'(' if i else '['}{limits[i]:g}, {limits[i + 1]:g}]"]
        for label, found in logs.items():
            ours = Spread.of([shares[i] for _, shares, _ in found]).show(2)
            line.append(f"{ours} ({printed[label].shares[i]:g})" if label in printed else ours)
        cells.append(line)
    line = [f"Reduction below {cut:g} (%)"]
    agrees = ["agrees"]
    fewer = reductions(logs)
    for label in logs:
        gain = fewer.get(label)
        told = "-" if gain is None else gain.show(1)
        paper = printed[label].reduction if label in printed else None
        line.append(told if paper is None else f"{told} ({paper:g})")
        agrees.append(agreement(None if gain is None else gain.mean, paper))
    cells += [line, agrees]
    cells.append(["n", *(str(len(found)) for found in logs.values())])
    return grid(titles, cells) + "\n\nPercent of gradient pairs; the paper's in brackets, of one training each."
