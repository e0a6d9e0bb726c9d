"""Tables 12 and 14: how far rankings of stages of training, and of methods, are from each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from reconmtl.comparing import Spread
from reconmtl.formats import grid
from reconmtl.nulls import excess
from reconmtl.paper import drawings, published
from reconmtl.paper.answers import Claim
from reconmtl.paper.rankings import bootstrap, distances, kendall_tau, layer_distributions, quarters, random_distance
from reconmtl.paper.trainings import Setup
from reconmtl.ranking import Ranking

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEVERITIES = (0.0, -0.02, -0.05, -0.1, -0.2)
"""Edges of the distributions of single layers: the paper's severities, and a severer one."""
NOTHING = "Nothing is finished yet."
PASSES = {
    "Joint-train": "joint",
    "CAGrad": "cagrad:c=0.2",
    "PCGrad": "pcgrad",
    "GradDrop": "graddrop",
    "MGDA": "mgda",
}
"""Methods that update the network while conflicts are counted (Table 14)."""


def of_stages(setup: Setup, seed: int) -> dict[str, Ranking]:
    """Rankings of the quarters of a whole joint training."""
    log = setup.probe(seed, epochs=setup.decided.epochs)
    return quarters(log, severity=setup.decided.severity)


def of_methods(setup: Setup, seed: int) -> dict[str, Ranking]:
    """Rankings found while different methods train."""
    severity = setup.decided.severity
    return {label: setup.probe(seed, balancer=b).rank(severity=severity) for label, b in PASSES.items()}


def stages_there(setup: Setup, seeds: Sequence[int]) -> list[int]:
    """Seeds whose whole training is recorded."""
    return [s for s in seeds if setup.probed(s, epochs=setup.decided.epochs)]


def methods_there(setup: Setup, seeds: Sequence[int]) -> list[int]:
    """Seeds that have been probed with every method."""
    return [s for s in seeds if all(setup.probed(s, balancer=b) for b in PASSES.values())]


def shifts(rankings: Sequence[Mapping[str, Ranking]]) -> dict[tuple[str, str], Spread]:
    """(later, earlier) -> distance of the two rankings over seeds (Eq. 22)."""
    each = [distances(of) for of in rankings]
    return {pair: Spread.of([d[pair] for d in each if pair in d]) for pair in each[0]} if each else {}


def claims(rankings: Sequence[Mapping[str, Ranking]], printed: Mapping[tuple[str, str], float]) -> list[Claim]:
    """The paper's distances beside ours."""
    return [
        Claim(f"distance, {later} - {earlier}", ours, printed[later, earlier], signed=False)
        for (later, earlier), ours in shifts(rankings).items()
        if (later, earlier) in printed
    ]


def claims_of_stages(setup: Setup, seeds: Sequence[int]) -> list[Claim]:
    """Table 12 beside ours."""
    return claims([of_stages(setup, s) for s in stages_there(setup, seeds)], published.distances("t12"))


def claims_of_methods(setup: Setup, seeds: Sequence[int]) -> list[Claim]:
    """Table 14 beside ours."""
    return claims([of_methods(setup, s) for s in methods_there(setup, seeds)], published.distances("t14"))


def table(rankings: Sequence[Mapping[str, Ranking]], printed: Mapping[tuple[str, str], float]) -> str:
    """Distances between pairs of rankings over seeds, beside the paper's.

    Args:
        rankings: One mapping per seed, name -> ranking.
        printed: The paper's.
    """
    agrees = {c.what: c.agrees for c in claims(rankings, printed)}
    cells = []
    for pair, ours in shifts(rankings).items():
        later, earlier = pair
        taus = [kendall_tau(of[later].layers, of[earlier].layers) for of in rankings if later in of and earlier in of]
        paper = printed.get(pair)
        cells.append(
            [
                f"{later} - {earlier}",
                ours.show(2),
                "" if paper is None else f"{paper:.2f}",
                agrees.get(f"distance, {later} - {earlier}", ""),
                Spread.of(taus).show(2),
                str(ours.n),
            ]
        )
    layers = len(next(iter(rankings[0].values())).layers)
    told = (
        f"Mean shift of a layer in positions (Eq. 22); random orders of {layers} layers: {random_distance(layers):.1f}."
    )
    return grid(["rankings", "distance", "paper's", "agrees", "Kendall's tau", "n"], cells) + f"\n\n{told}"


def draw(rankings: Sequence[Mapping[str, Ranking]], printed: Mapping[tuple[str, str], float]) -> Figure:
    """The distances of `table`, and the paper's."""
    rows = [drawings.Dot(f"{b} - {a}", ours, printed.get((b, a))) for (b, a), ours in shifts(rankings).items()]
    layers = len(next(iter(rankings[0].values())).layers)
    return drawings.dots(rows, f"mean shift of a layer; {random_distance(layers):.1f} between random orders")


def draw_layers(setup: Setup, seeds: Sequence[int]) -> Figure | None:
    """How each layer's gradients conflict over whole trainings, in the order of the ranking."""
    there = stages_there(setup, seeds)
    if not there:
        return None
    first, *rest = (setup.probe(s, epochs=setup.decided.epochs) for s in there)
    log = first.merge(rest)
    shares = layer_distributions(log, edges=SEVERITIES).numpy()
    order = [log.layers.index(n) for n in log.rank(severity=setup.decided.severity).layers]
    return drawings.stacked([log.layers[i] for i in order], shares[order], SEVERITIES)


def draw_stages(setup: Setup, seeds: Sequence[int]) -> Figure | None:
    """Table 12 as a plot."""
    there = stages_there(setup, seeds)
    return draw([of_stages(setup, s) for s in there], published.distances("t12")) if there else None


def draw_methods(setup: Setup, seeds: Sequence[int]) -> Figure | None:
    """Table 14 as a plot."""
    there = methods_there(setup, seeds)
    return draw([of_methods(setup, s) for s in there], published.distances("t14")) if there else None


def show_stages(setup: Setup, seeds: Sequence[int]) -> str:
    """Table 12, the size of the noise in it, and the ranking of conflicts beyond chance."""
    if not (seeds := stages_there(setup, seeds)):
        return NOTHING
    text = table([of_stages(setup, s) for s in seeds], published.distances("t12"))
    logs = [setup.probe(s, epochs=setup.decided.epochs) for s in seeds]
    severity, k = setup.decided.severity, min(setup.decided.k or 1, len(logs[0].layers))
    found = bootstrap(logs, severity=severity, k=k)
    sizes = list(logs[0].sizes.values())
    small = sorted(logs[0].layers, key=logs[0].sizes.__getitem__)
    corrected = excess(logs[0].merge(logs[1:]), severity=severity)
    lines = [
        text,
        f"Drawn again over {found.recordings} recording(s) and their windows: a layer moves by {found.distance:.2f} "
        f"positions, {100 * found.kept:.0f} % of the first {k} stay.",
        f"Kendall's tau with the order by size, smallest first: score {kendall_tau(found.layers, small):+.2f}, "
        f"conflicts beyond chance {kendall_tau(corrected.order, small):+.2f} ({len(sizes)} layers); "
        f"{int((corrected.p < 0.05 / len(sizes)).sum())} layers have more conflicts than chance "
        "(p < 0.05 / number of layers).",
    ]
    ranked = {n: i for i, n in enumerate(corrected.order)}
    at = {n: i for i, n in enumerate(corrected.layers)}
    cells = [
        [
            str(i + 1),
            name,
            f"{100 * corrected.shares[at[name]]:.1f}",
            f"{corrected.dimensions[at[name]]:.1f}",
            f"{100 * corrected.chance[at[name]]:.1f}",
            f"{100 * corrected.excess[at[name]]:+.1f}",
            f"{corrected.p[at[name]]:.3f}",
            str(ranked[name] + 1),
        ]
        for i, name in enumerate(found.layers)
    ]
    titles = ["rank", "layer", "conflicts (%)", "dimensions", "chance (%)", "beyond (%)", "p", "rank beyond chance"]
    return "\n\n".join([*lines, grid(titles, cells)])


def show_methods(setup: Setup, seeds: Sequence[int]) -> str:
    """Table 14."""
    there = methods_there(setup, seeds)
    return table([of_methods(setup, s) for s in there], published.distances("t14")) if there else NOTHING
