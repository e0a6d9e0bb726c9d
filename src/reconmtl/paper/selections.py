"""Tables 7 and 11: what other choices of layers lose against Recon's, as published and fair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from reconmtl.comparing import Spread
from reconmtl.formats import grid
from reconmtl.paper.answers import Claim
from reconmtl.paper.controls import show as show_prices
from reconmtl.paper.prices import Priced, priced
from reconmtl.paper.published import agreement, load
from reconmtl.paper.trainings import Setup, Training

PD = (
    "PD: points of accuracy less than Recon's. Ours: of the sum of the losses, with shared statistics, over the seeds "
    "that both rows have; the paper's: mean over its seeds and over CAGrad and PCGrad."
)


def drops(found: Sequence[Priced], published: Mapping[str, str]) -> list[tuple[str, str, str, Spread, float]]:
    """Points of accuracy less than Recon's: ours over common seeds, the paper's mean over its seeds and balancers.

    Args:
        found: Our rows.
        published: See `show`.

    Returns:
        (paper's selection, our row, task, our drop, the paper's) of each that both have.
    """
    printed = load(published["table"]).dicts()
    runs = {p.row.label: {run.seed: run.metrics for run in p.row.runs} for p in found}
    recon = runs.get(published["Recon"], {})
    told = []
    for selection, label in published.items():
        ours = runs.get(label, {})
        both = sorted(ours.keys() & recon.keys())
        if selection in ("table", "Recon") or not both:
            continue
        for task, named in ours[both[0]].items():
            (metric,) = named  # accuracy
            drop = Spread.of([recon[s][task][metric] - ours[s][task][metric] for s in both])
            paper = fmean(float(row[f"{task} drop"]) for row in printed if row["selection"] == selection)
            told.append((selection, label, task, drop, paper))
    return told


def claims(
    setup: Setup, published: Mapping[str, str], trainings: Sequence[Training], seeds: Sequence[int]
) -> list[Claim]:
    """The paper's drops against Recon beside ours."""
    _, found = priced(setup, trainings, seeds)
    return [
        Claim(f"drop in {task} acc, {selection}: {label}", drop, paper)
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
        [
            f"{selection}: {label}",
            task,
            drop.show(2, sign=True),
            str(drop.n),
            f"{paper:+.2f}",
            agreement(drop.mean, paper),
        ]
        for selection, label, task, drop, paper in drops(found, published)
    ]
    titles = ["paper's: ours", "task", "our PD", "n", "paper's PD", "agrees"]
    lines = [
        show_prices(setup, trainings, seeds),
        *([PD, grid(titles, cells)] if cells else []),
        "The paper's rows:",
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
