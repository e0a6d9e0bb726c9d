"""The experiments' figures, drawn by matplotlib: ours, with the paper's numbers beside them where it prints any."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reconmtl.comparing import Spread
from reconmtl.reporting.figures import (
    COLOURS,
    REST,
    SOFT,
    SPLIT,
    STYLE,
    check_matplotlib,
    name_rows,
    new_axes,
    plain_name,
    write_figure,
)
from reconmtl.reporting.words import minus

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    from matplotlib.figure import Figure


MARKS = "s^vPX*D"
MOST_TICKS = 9
"""On an axis whose ticks are the points themselves."""


@dataclass(frozen=True)
class Dot:
    """One row of a plot of dots.

    Attributes:
        label: Its name.
        ours: Mean and spread over seeds.
        printed: The paper's number; None where there is none.
    """

    label: str
    ours: Spread
    printed: float | None = None


@dataclass(frozen=True)
class Point:
    """One point of a line.

    Attributes:
        x: Where it stands.
        y: Mean and spread over seeds.
        label: Written beside it; "" for none.
    """

    x: float
    y: Spread
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """Lines over one axis.

    Attributes:
        title: Of the axis.
        lines: Name -> points, in the order in which they are joined; one of a single point is a mark alone.
        log: Whether the axis is logarithmic; a linear one around zero keeps what is not positive.
        joined: Whether the points of a line are joined.
    """

    title: str
    lines: Mapping[str, Sequence[Point]]
    log: bool = False
    joined: bool = True


def _way(name: str) -> str:
    """Rows at both settings of the statistics share a colour."""
    return name.removesuffix(" (shared statistics)")


def dots(rows: Sequence[Dot], title: str) -> Figure:
    """A row per method: ours with its spread, the paper's hollow."""
    figure, axes = new_axes(4.6, 0.6 + 0.22 * len(rows))
    for i, row in enumerate(rows):
        colour = SPLIT if "Recon" in row.label else REST
        if math.isfinite(row.ours.sd):
            ends = [row.ours.mean - row.ours.sd, row.ours.mean + row.ours.sd]
            axes.plot(ends, [i, i], color=colour, lw=2, alpha=0.6, solid_capstyle="round")
        axes.plot([row.ours.mean], [i], "o", color=colour, ms=4.5, label="ours, mean ± sd" if i == 0 else None)
        if row.printed is not None:
            axes.plot([row.printed], [i], "D", mfc="none", mec=SOFT, ms=4.5)
    if any(row.printed is not None for row in rows):
        axes.plot([], [], "D", mfc="none", mec=SOFT, ms=4.5, label="the paper's")
        axes.legend(frameon=False, fontsize=6.5, loc="best")
    axes.axvline(0, color=SOFT, lw=0.6, ls=":")
    name_rows(axes, [row.label for row in rows], size=7)
    axes.set_xlabel(title)
    return figure


def columns(of: Mapping[str, Sequence[Dot]], title: str) -> Figure:
    """Rows of dots with their spread, in columns whose axes are their own: some of them reach much further.

    Args:
        of: Column -> its rows; those of one label stand beside each other.
        title: Of every axis.
    """
    names = list(dict.fromkeys(row.label for rows in of.values() for row in rows))
    figure, grid = new_axes(
        2.6 * len(of) + 0.2, 0.9 + 0.2 * len(names), ncols=len(of), squeeze=False, gridspec_kw={"wspace": 0.2}
    )
    for at, (axes, (head, rows)) in enumerate(zip(grid.flat, of.items(), strict=True)):
        for row in rows:
            i, colour = names.index(row.label), SPLIT if row.label.startswith("recon") else REST
            if math.isfinite(row.ours.sd):
                ends = [row.ours.mean - row.ours.sd, row.ours.mean + row.ours.sd]
                axes.plot(ends, [i, i], color=colour, lw=2, alpha=0.6, solid_capstyle="round")
            axes.plot([row.ours.mean], [i], "o", color=colour, ms=4.5)
            axes.annotate(
                f"n = {row.ours.n}", (1.0, i), xycoords=("axes fraction", "data"), va="center", fontsize=5.5, color=SOFT
            )
        axes.axvline(0, color=SOFT, lw=0.6, ls=":")
        axes.set_title(head, loc="left", fontsize=7.5)
        axes.set_xlabel(title)
        name_rows(axes, names, size=7)
        if at:
            axes.set_yticklabels([])
    return figure


def lines(panels: Sequence[Panel], title: str) -> Figure:
    """Panels with one upward axis and the same names."""
    names = list(dict.fromkeys(_way(name) for panel in panels for name in panel.lines))
    figure, grid = new_axes(3.4 * len(panels) + 0.2, 2.9, ncols=len(panels), squeeze=False, sharey=True)
    for axes, panel in zip(grid.flat, panels, strict=True):
        for name, points in panel.lines.items():
            at, single = names.index(_way(name)), len(points) == 1
            colour, marker = COLOURS[at % len(COLOURS)], MARKS[at % len(MARKS)] if single else "o"
            x, y = [p.x for p in points], [p.y.mean for p in points]
            spread = [p.y.sd if math.isfinite(p.y.sd) else 0.0 for p in points]
            axes.errorbar(
                x,
                y,
                yerr=spread,
                fmt=marker,
                ls="none" if single or not panel.joined else "-",
                color=colour,
                mfc=colour if name == _way(name) else "white",
                ms=4,
                lw=1.2,
                elinewidth=0.6,
                label=plain_name(name, 60),
            )
            for p in points:
                axes.annotate(p.label, (p.x, p.y.mean), xytext=(3, 3), textcoords="offset points", fontsize=5)
        every = [p.x for points in panel.lines.values() for p in points]
        if panel.log and every and min(every) > 0:
            axes.set_xscale("log")
        elif panel.log:
            least = min((abs(x) for x in every if x), default=1.0)
            axes.set_xscale("symlog", linthresh=10 ** math.floor(math.log10(least)))  # a decade: ticks keep apart
        places = {tuple(p.x for p in points) for points in panel.lines.values()}
        if len(places) == 1 and 1 < len(set(every)) <= MOST_TICKS:  # all lines have the same points
            axes.set_xticks(sorted(set(every)))
        if panel.log or len(places) == 1:
            axes.xaxis.set_major_formatter(lambda x, _: minus(f"{x:g}"))
            axes.minorticks_off()
        axes.axhline(0, color=SOFT, lw=0.6, ls=":")
        axes.set_xlabel(panel.title)
    grid.flat[0].set_ylabel(title)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 0.92), ncols=3, frameon=False, fontsize=6.5)
    return figure


def stacked(names: Sequence[str], shares: npt.NDArray[np.float64], edges: Sequence[float]) -> Figure:
    """The distribution of each layer's cosines, a bar per layer from the worst conflicts to none.

    Args:
        names: Layers, from the top.
        shares: In each interval between falling edges, [layers, len(edges) + 1]; NaN where nothing was measured.
        edges: Falling.
    """
    figure, axes = new_axes(5.0, 0.8 + 0.13 * len(names))
    limits = ["1", *(f"{e:g}" for e in edges), "-1"]
    shown = np.nan_to_num(100 * shares)[:, ::-1]  # the worst first
    start = np.zeros(len(names))
    for i in range(shown.shape[1]):
        depth = 1 - i / max(1, shown.shape[1] - 1)
        colour = REST if i == shown.shape[1] - 1 else SPLIT
        label = minus(f"{limits[-2 - i]} to {limits[-1 - i]}")
        axes.barh(
            range(len(names)), shown[:, i], left=start, height=0.7, color=colour, alpha=0.25 + 0.7 * depth, label=label
        )
        start = start + shown[:, i]
    name_rows(axes, names, size=6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("gradient pairs (%)")
    axes.legend(ncols=shown.shape[1], frameon=False, fontsize=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def save(draw: Callable[[], Figure | None], folder: Path, name: str) -> Path | None:
    """Draw and write as PDF and PNG.

    Returns:
        The PNG; None if there is nothing to draw.

    Raises:
        RunError: If matplotlib is missing, or the folder cannot be written to.
    """
    check_matplotlib()
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = draw()
        return None if figure is None else write_figure(figure, folder, name)[-1]
