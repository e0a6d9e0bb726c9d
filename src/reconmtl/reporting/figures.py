"""The plots of the page as PDF and PNG for papers, drawn by matplotlib from the same numbers."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reconmtl.errors import RunError
from reconmtl.files import write_bytes
from reconmtl.reporting.axes import spread_out
from reconmtl.reporting.chance import Chance
from reconmtl.reporting.cosines import THRESHOLD, Distributions
from reconmtl.reporting.curves import Learning, Scores
from reconmtl.reporting.heatmap import Heatmap, nice_top
from reconmtl.reporting.material import Material
from reconmtl.reporting.network import WIDTH, Drawing, Lanes
from reconmtl.reporting.stability import Stability
from reconmtl.reporting.windows import Windows
from reconmtl.reporting.words import minus, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, SPLIT, REST = "#1d2127", "#5b636e", "#b3440a", "#9aa3ad"
NEGATIVE, POSITIVE = "#d9650f", "#3a7cb8"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a8478f", "#3fa9e0", "#b58900", "#555e68", "#6a3d9a")
"""As on the page in light; they can be told apart with colour blindness."""

MAP = "Oranges"
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold a dollar sign
    "pdf.fonttype": 42,  # letters stay letters
    "svg.hashsalt": "reconmtl",
}


def check_matplotlib() -> None:
    """Raise a RunError with the line that installs matplotlib, if it is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RunError('Figures need matplotlib: pip install "reconmtl[figures]"')


def save(material: Material, windows: Windows | None, folder: Path) -> list[Path]:
    """Write every figure there is material for as PDF and PNG.

    Args:
        material: What the page is about.
        windows: Conflicts over time.
        folder: Made if it does not exist; files of the same names are replaced.

    Returns:
        The files written.

    Raises:
        RunError: If matplotlib is missing or the folder cannot be written to.
    """
    check_matplotlib()
    from matplotlib import rc_context

    kinds: dict[str, tuple[object | None, Callable[[Any], Figure]]] = {
        "methods": (material if _gains(material) else None, draw_methods),
        "plan": (Drawing.of(material), draw_plan),
        "conflicts": (Heatmap.of(material, windows), draw_conflicts),
        "pairs": (_several(Heatmap.of(material, windows)), draw_pairs),
        "scores": (Scores.of(material, windows), draw_scores),
        "cosines": (Distributions.of(material), draw_cosines),
        "training": (Learning.of(material), draw_training),
        "chance": (Chance.of(material), draw_chance),
        "stability": (Stability.of(material, windows), draw_stability),
    }
    with rc_context(STYLE):
        drawn = {name: draw(content) for name, (content, draw) in kinds.items() if content is not None}
        return [path for name, figure in drawn.items() for path in write_figure(figure, folder, name)]


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PDF and PNG, the same bytes for the same figure; the files."""
    written = []
    for kind in ("pdf", "png"):
        path = folder / f"{name}.{kind}"
        dates: dict[str, Any] = {"CreationDate": None} if kind == "pdf" else {}

        def write(temporary: Path, kind: str = kind, dates: Any = dates) -> None:  # noqa: ANN401
            figure.savefig(temporary, format=kind, dpi=200, bbox_inches="tight", metadata=dates)

        write_bytes(path, write)
        written.append(path)
    return written


def new_axes(width: float, height: float, **options: Any) -> tuple[Figure, Any]:  # noqa: ANN401 one or an array of axes
    """A figure of its own: nothing is registered that a user's pyplot would show or have to close."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**options)


def plain_name(name: str, most: int = 34) -> str:
    """A name that a font can show, shortened at its start."""
    shown = "".join(c if c.isprintable() else "?" for c in name).encode("utf-8", "replace").decode()
    return shown if len(shown) <= most else "…" + shown[-most + 1 :]


def _several(heat: Heatmap | None) -> Heatmap | None:
    return heat if heat is not None and len(heat.tasks) > 2 else None


def _gains(material: Material) -> list[tuple[str, float, float]]:
    """Label, delta-m and its deviation."""
    rows = [] if material.comparison is None else material.comparison.rows
    found = [(r.label, r.delta_m.mean, r.delta_m.sd) for r in rows if r.delta_m is not None]
    return [(n, m, sd if math.isfinite(sd) else 0.0) for n, m, sd in found if math.isfinite(m)]


def draw_methods(material: Material) -> Figure:
    """Delta-m of each method with its spread over seeds."""
    rows = _gains(material)
    figure, axes = new_axes(4.6, 0.5 + 0.24 * len(rows))
    for i, (_, mean, sd) in enumerate(rows):
        colour = NEGATIVE if mean < 0 else POSITIVE
        axes.plot([mean - sd, mean + sd], [i, i], color=colour, lw=2, alpha=0.7, solid_capstyle="round")
        axes.plot([mean], [i], "o", color=colour, ms=5)
    axes.axvline(0, color=SOFT, lw=0.6)
    name_rows(axes, [n for n, _, _ in rows])
    assert material.comparison is not None
    axes.set_xlabel(f"Δm relative to {plain_name(material.comparison.baseline or '')} (%), mean ± sd")
    return figure


def draw_plan(drawing: Drawing) -> Figure:
    """The tasks' lines through the layers, and the conflict rate of each layer."""
    rows, lanes = drawing.rows, Lanes(drawing.tasks)
    figure, (left, right) = new_axes(
        6.2, 0.6 + 0.15 * len(rows), ncols=2, gridspec_kw={"width_ratios": [1, 3.2], "wspace": 0.62}
    )
    places = [lanes.places(r.groups) for r in rows] + [lanes.places(tuple((t,) for t in drawing.tasks))]
    for i in range(lanes.lines):
        colour = COLOURS[i] if lanes.coloured else SOFT
        left.plot([p[i] for p in places], range(len(places)), color=colour, lw=1.2, solid_joinstyle="round")
    for k, row in enumerate(rows):
        apart = row.groups is not None and len(row.groups) > 1
        for members in lanes.bundles(row.groups):
            at = sum(places[k][i] for i in members) / len(members)
            left.plot([at], [k], "o", ms=3.6, mfc=SPLIT if apart else "white", mec=SPLIT if apart else SOFT, mew=0.8)
    left.set_xlim(0, WIDTH)
    left.set_ylim(len(rows) + 0.3, -0.8)
    left.axis("off")
    rates = [0.0 if math.isnan(r.rate) else 100 * r.rate for r in rows]
    split = {r.name for r in drawing.split}
    right.barh(range(len(rows)), rates, height=0.62, color=[NEGATIVE if r.name in split else REST for r in rows])
    name_rows(right, [r.name for r in rows], size=6, dark={r.name for r in rows if r.name in split})
    right.set_ylim(len(rows) + 0.3, -0.8)
    right.set_xlabel(minus(f"pairs with cos < {drawing.severity:g} (%)"))
    heads = [f"{t}" for t in drawing.tasks] if lanes.coloured else [f"{len(drawing.tasks)} tasks"]
    for i, head in enumerate(heads):
        colour = COLOURS[i] if lanes.coloured else SOFT
        at = places[-1][i] if lanes.coloured else WIDTH / 2
        left.text(
            at,
            len(rows) + 0.25,
            plain_name(head, 16),
            color=colour,
            fontsize=6,
            ha="center",
            va="top",
            rotation=45 if len(heads) > 2 else 0,
        )
    return figure


def draw_conflicts(heat: Heatmap) -> Figure:
    """Layer against time."""
    rates, borders = 100 * heat.windows.rates.T, heat.windows.borders * heat.every
    figure, axes = new_axes(5.6, 0.7 + 0.13 * len(heat.layers))
    top = 100 * nice_top(heat.windows.rates)
    mesh = axes.pcolormesh(
        borders, np.arange(len(heat.layers) + 1) - 0.5, rates, cmap=MAP, vmin=0, vmax=top, rasterized=True
    )
    name_rows(axes, heat.layers, size=6, dark=heat.split)
    axes.set_xlabel("training step")
    figure.colorbar(mesh, ax=axes, pad=0.02, label=minus(f"pairs with cos < {heat.severity:g} (%)"))
    return figure


def draw_pairs(heat: Heatmap) -> Figure:
    """Task against task, over all layers and steps."""
    rates, n = heat.matrix(), len(heat.tasks)
    side = 1.4 + 0.13 * n
    figure, axes = new_axes(side + 0.8, side)
    image = axes.imshow(100 * rates, cmap=MAP, vmin=0, vmax=100 * nice_top(rates))
    names = [plain_name(t, 18) for t in heat.tasks]
    axes.set_xticks(range(n), names, rotation=90, fontsize=6)
    axes.set_yticks(range(n), names, fontsize=6)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, pad=0.02, label=minus(f"pairs with cos < {heat.severity:g} (%)"))
    return figure


def draw_scores(scores: Scores) -> Figure:
    """Each layer's conflict rate over training."""
    figure, axes = new_axes(5.6, 2.7)
    named = scores.named()
    for i in range(len(scores.layers)):
        strong = i in named
        axes.plot(
            scores.middles,
            100 * scores.rates[:, i],
            color=SPLIT if scores.split[i] else REST,
            lw=1.5 if strong else 0.6,
            alpha=1 if strong else 0.45,
        )
    ends = {i: 100 * float(scores.rates[-1, i]) for i in named if not math.isnan(scores.rates[-1, i])}
    for i, at in zip(ends, spread_out(list(ends.values()), gap=0.045 * axes.get_ylim()[1]), strict=True):
        colour = SPLIT if scores.split[i] else SOFT
        axes.annotate(
            plain_name(scores.layers[i]),
            (scores.last, at),
            xytext=(5, 0),
            textcoords="offset points",
            color=colour,
            fontsize=6,
            va="center",
        )
    axes.set(xlabel="training step", ylabel="conflicting pairs (%)", xlim=(0, scores.last))
    axes.set_ylim(bottom=0)
    return figure


def draw_cosines(found: Distributions) -> Figure:
    """A histogram per method over common axes."""
    columns = min(2, len(found.rows))
    lines = math.ceil(len(found.rows) / columns)
    figure, grid = new_axes(
        3.1 * columns, 1.75 * lines, nrows=lines, ncols=columns, squeeze=False, sharex=True, sharey=True
    )
    figure.subplots_adjust(hspace=0.45, wspace=0.2)
    for axes, row in zip(grid.flat, found.rows, strict=False):
        colours = [NEGATIVE if b <= 1e-9 else POSITIVE for b in found.edges[1:]]
        axes.bar(
            found.edges[:-1],
            100 * found.shares(row),
            width=np.diff(found.edges),
            align="edge",
            color=colours,
            ec="white",
            lw=0.4,
        )
        axes.axvline(0, color=SOFT, lw=0.6, ls=":")
        axes.set_title(
            minus(f"{plain_name(row.label)}: {percent(row.below)} below {THRESHOLD:g}"), loc="left", fontsize=7.5
        )
    for axes in list(grid.flat)[len(found.rows) :]:
        axes.axis("off")
    for axes in list(grid.flat)[max(0, len(found.rows) - columns) : len(found.rows)]:  # the last one of each column
        axes.set_xlabel("cosine of whole shared gradients")
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("pairs (%)")
    return figure


def draw_training(learning: Learning) -> Figure:
    """Test metrics over training."""
    columns = min(2, len(learning.panels))
    lines = math.ceil(len(learning.panels) / columns)
    figure, grid = new_axes(3.1 * columns, 2.1 * lines, nrows=lines, ncols=columns, squeeze=False)
    figure.subplots_adjust(hspace=0.45, wspace=0.25, bottom=0.65 / (2.1 * lines))
    for axes, panel in zip(grid.flat, learning.panels, strict=False):
        for band in panel.bands:
            colour = COLOURS[learning.labels.index(band.label) % len(COLOURS)]
            axes.fill_between(band.epochs, band.low, band.high, color=colour, alpha=0.15, lw=0)
            axes.plot(band.epochs, band.mean, color=colour, lw=1.3, label=plain_name(band.label))
        axes.set_title(plain_name(panel.title, 48), loc="left", fontsize=7.5)
        axes.set_xlabel("epoch")
    for axes in list(grid.flat)[len(learning.panels) :]:
        axes.axis("off")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.22 / (2.1 * lines)),
        ncols=3,
        frameon=False,
        fontsize=7,
    )
    return figure


def draw_chance(found: Chance) -> Figure:
    """Each layer's conflicts, and how many chance gives."""
    order, of = found.order, found.found
    names = [of.layers[i] for i in order]
    figure, axes = new_axes(5.0, 0.6 + 0.13 * len(order))
    for row, i in enumerate(order):
        colour = SPLIT if of.layers[i] in found.split else REST
        ends = [100 * of.chance[i], 100 * of.shares[i]]
        axes.plot(ends, [row, row], color=colour, lw=1.5, alpha=0.45, solid_capstyle="butt")
        axes.plot(ends[:1], [row], "|", ms=5, color=colour)
        axes.plot(ends[1:], [row], "o", ms=3, color=colour)
    name_rows(axes, names, size=6, dark=found.split)
    axes.set_xlim(left=0)
    axes.set_xlabel(minus(f"pairs with cos < {of.severity:g} (%): bar by chance, dot as counted"))
    return figure


def draw_stability(found: Stability) -> Figure:
    """Rank of each layer with 90 % of resampled recordings."""
    n = len(found.layers)
    figure, axes = new_axes(5.0, 0.6 + 0.13 * n)
    for i in range(n):
        colour = SPLIT if i < found.k else REST
        axes.plot([found.low[i], found.high[i]], [i, i], color=colour, lw=2, alpha=0.45, solid_capstyle="round")
        axes.plot([i + 1], [i], "o", ms=3, color=colour)
    axes.axvline(found.k + 0.5, color=SOFT, lw=0.6)
    name_rows(axes, found.layers, size=6)
    axes.set_xlabel(f"rank; {found.halves:.1f} positions between halves, {found.chance:.1f} between random orders")
    return figure


def name_rows(axes: Axes, names: Sequence[str], *, size: float = 8, dark: Collection[str] | None = None) -> None:
    """Names down the left side, the first at the top; those in `dark` stand out."""
    axes.set_yticks(range(len(names)), [plain_name(n) for n in names], fontsize=size)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    for name, label in zip(names, axes.get_yticklabels(), strict=True):
        label.set_color(SPLIT if dark is not None and name in dark else SOFT)
