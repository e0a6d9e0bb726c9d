"""Figures 1 and 4-10, Tables 6 and 8-10: how gradients conflict over the whole vector that is still shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from reconmtl.comparing import Spread
from reconmtl.conflicts import distribution, share_below
from reconmtl.formats import grid
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
    return None if found is None else draw_cosines(found)


def show(setup: Setup, of: Mapping[str, Training], table: str, seeds: Sequence[int]) -> str:
    """Markdown: shares of cosines per interval and their reduction, ours with the paper's in brackets."""
    printed = {d.method: d for d in distributions(table)}
    edges, cut = printed[JOINT].edges, CUTS[table]
    logs: dict[str, list[tuple[int, list[float], float]]] = {}
    for run in finished(setup, of, seeds):
        if run.log is not None:
            whole = run.log.whole()
            shares = (100 * distribution(whole, edges=edges)).tolist()
            logs.setdefault(run.label, []).append((run.seed, shares, 100 * share_below(whole, cut)))
    if not logs:
        return "Nothing is finished yet."
    limits = [1.0, *edges, -1.0]
    titles = ["cos", *logs]
    cells = []
    for i in range(len(edges) + 1):
        line = [f"({limits[i]:g}, {limits[i + 1]:g}]"]
        for label, found in logs.items():
            ours = Spread.of([shares[i] for _, shares, _ in found]).show(2)
            line.append(f"{ours} ({printed[label].shares[i]:g})" if label in printed else ours)
        cells.append(line)
    line = [f"Reduction below {cut:g} (%)"]
    agrees = ["agrees"]
    base = {seed: tail for seed, _, tail in logs.get(JOINT, [])}
    for label, found in logs.items():
        gains = [reduction(base[s], tail) for s, _, tail in found if base.get(s)] if label != JOINT else []
        told = f"{fmean(gains):.1f}" if gains else "-"
        paper = printed[label].reduction if label in printed else None
        line.append(told if paper is None else f"{told} ({paper:g})")
        agrees.append(agreement(fmean(gains) if gains else None, paper))
    cells += [line, agrees]
    cells.append(["n", *(str(len(found)) for found in logs.values())])
    return grid(titles, cells) + "\n\nPercent of gradient pairs; the paper's in brackets, of one training each."
