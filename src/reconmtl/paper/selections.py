"""Tables 7 and 11: what other choices of layers lose against Recon's, as published and fair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from reconmtl.comparing import Spread
from reconmtl.formats import grid
from reconmtl.paper.answers import Claim
from reconmtl.paper.controls import Priced, priced
from reconmtl.paper.controls import show as show_prices
from reconmtl.paper.published import agreement, load
from reconmtl.paper.trainings import Setup, Training


def drops(found: Sequence[Priced], published: Mapping[str, str]) -> list[tuple[str, str, str, float, float]]:
    """Points of accuracy less than Recon's, ours and the paper's mean over its seeds and balancers.

    Args:
        found: Our rows.
        published: See `show`.

    Returns:
        (paper's selection, our row, task, our drop, the paper's) of each that both have.
    """
    printed = load(published["table"]).dicts()
    means = {p.row.label: {task: s.mean for (task, _), s in p.row.metrics.items()} for p in found}
    base = means.get(published["Recon"])
    told = []
    for selection, label in published.items():
        if selection in ("table", "Recon") or base is None or label not in means:
            continue
        for task, value in means[label].items():
            paper = fmean(float(row[f"{task} drop"]) for row in printed if row["selection"] == selection)
            told.append((selection, label, task, base[task] - value, paper))
    return told


def claims(
    setup: Setup, published: Mapping[str, str], trainings: Sequence[Training], seeds: Sequence[int]
) -> list[Claim]:
    """The paper's drops against Recon beside ours."""
    _, found = priced(setup, trainings, seeds)
    n = {p.row.label: len(p.row.seeds) for p in found}
    return [
        Claim(f"drop in {task} acc, {selection}: {label}", Spread(drop, math.nan, n[label]), paper)
        for selection, label, task, drop, paper in drops(found, published)
    ]


def show(setup: Setup, published: Mapping[str, str], trainings: Sequence[Training], seeds: Sequence[int]) -> str:
    """Tables 7 and 11: drops against Recon, faithful and fair.

    Args:
        setup: Where the runs are.
        published: The paper's selection -> our training's name; and "table" -> the table's name.
        trainings: All of them.
        seeds: To show.
    """
    printed = load(published["table"]).dicts()
    _, found = priced(setup, trainings, seeds)
    cells = [
        [f"{selection}: {label}", task, f"{drop:+.2f}", f"{paper:+.2f}", agreement(drop, paper)]
        for selection, label, task, drop, paper in drops(found, published)
    ]
    titles = ["paper's: ours", "task", "PD", "paper's", "agrees"]
    lines = [
        show_prices(setup, trainings, seeds),
        *([grid(titles, cells)] if cells else []),
        "The paper's rows (PD: points of accuracy less than Recon's):",
        grid(
            ["paper's selection", "ours", "balancer", "seed", "digit", "PD", "fashion", "PD", "MB"],
            [
                [
                    row["selection"],
                    published.get(row["selection"], ""),
                    row["balancer"],
                    row["seed"],
                    row["digit acc"],
                    row["digit drop"],
                    row["fashion acc"],
                    row["fashion drop"],
                    row["megabytes"],
                ]
                for row in printed
            ],
        ),
        "The published network also loses the second task's skip connection in RSL and RSP of seeds 0 and 1 and in the "
        "last 25 layers; that is not repeated here.",
    ]
    return "\n\n".join(lines)
