"""Does it matter which layers are split? Recon's choice beside controls of the same number and of the same cost.

The paper's Tables 7 and 11 compare with random layers whose BatchNorms mix their tasks' running statistics, and of
other sizes. Here every way of choosing stands at both settings of `norm_stats`, beside networks that are simply wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from reconmtl.comparing import Spread
from reconmtl.conflicts import ConflictLog
from reconmtl.formats import grid, readable
from reconmtl.paper import drawings
from reconmtl.paper.answers import BY_FIRST, SURE, Answered
from reconmtl.paper.prices import network_cost, operations, parameters, priced
from reconmtl.paper.trainings import Choice, Setup, Training
from reconmtl.plan import Plan
from reconmtl.significance import Paired
from reconmtl.splitting.costs import Cost

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def half(setup: Setup, log: ConflictLog) -> int:
    """K of the setup; half of the layers if it has none."""
    return min(setup.decided.k or max(1, len(log.layers) // 2), len(log.layers))


def recon(k: int | None = None, *, severity: float | None = None) -> Choice:
    """The K layers with most conflicts; K and S of the setup unless they are given."""

    def choose(setup: Setup, log: ConflictLog, seed: int) -> Plan:
        del seed  # the log is the seed's own
        s = setup.decided.severity if severity is None else severity
        return log.rank(severity=s).top(min(k or half(setup, log), len(log.layers)))

    return choose


def recon_parameters(setup: Setup, log: ConflictLog, seed: int) -> int:
    """Parameters of one copy of the layers that Recon splits."""
    return sum(log.sizes[n] for n in recon()(setup, log, seed).layers)


def random_layers(setup: Setup, log: ConflictLog, seed: int) -> Plan:
    """As many random layers (the paper's RSL)."""
    return Plan.random_layers(log, half(setup, log), seed=seed)


def random_parameters(*, exceed: bool) -> Choice:
    """Random layers of as many parameters (the paper's RSP, which exceeds them), or of at most as many."""

    def choose(setup: Setup, log: ConflictLog, seed: int) -> Plan:
        return Plan.random_parameters(log, recon_parameters(setup, log, seed), seed=seed, exceed=exceed)

    return choose


def smallest(setup: Setup, log: ConflictLog, seed: int) -> Plan:
    """As many of the smallest layers: what a ranking by size would choose."""
    del seed
    return Plan.smallest(log, half(setup, log))


def norms(setup: Setup, log: ConflictLog, seed: int) -> Plan:
    """All normalisation layers."""
    del setup, seed
    return Plan.norms(log)


def first(setup: Setup, log: ConflictLog, seed: int) -> Plan:
    """The first K layers."""
    del seed
    return Plan.first(log, half(setup, log))


def first_alone(setup: Setup, log: ConflictLog, seed: int) -> Plan:
    """The first layer and no other: from it on, every layer sees the task's own values."""
    del setup, seed
    return Plan.first(log, 1)


def recon_but_first(setup: Setup, log: ConflictLog, seed: int) -> Plan:
    """As many layers with most conflicts, the first layer of the network not among them."""
    del seed
    k = min(half(setup, log), len(log.layers) - 1)
    others = [n for n in log.rank(severity=setup.decided.severity).layers if n != log.network_layers[0]]
    return Plan(tasks=log.tasks, layers=others[:k], chosen={"by": "conflicts but the first layer", "k": k})


def random_and_first(setup: Setup, log: ConflictLog, seed: int) -> Plan:
    """As many random layers, the first layer of the network always among them."""
    k, first_layer = half(setup, log), log.network_layers[0]
    layers = list(Plan.random_layers(log, k, seed=seed).layers)
    if first_layer not in layers:  # instead of the one that was drawn last
        layers = [first_layer, *(Plan.random_layers(log, k - 1, seed=seed).layers if k > 1 else ())]
    return Plan(tasks=log.tasks, layers=layers, chosen={"by": "random and the first layer", "k": k, "seed": seed})


def last(setup: Setup, log: ConflictLog, seed: int) -> Plan:
    """The last K layers."""
    del seed
    return Plan.last(log, half(setup, log))


def least_conflicts(setup: Setup, log: ConflictLog, seed: int) -> Plan:
    """The K layers with fewest conflicts: a ranking that tells something must do better than its reverse."""
    del seed
    k = half(setup, log)
    ranking = log.rank(severity=setup.decided.severity)
    return Plan(tasks=log.tasks, layers=ranking.layers[-k:], chosen={"by": "least conflicts", "k": k})


def as_wide_as(measure: Callable[[Cost], float]) -> Callable[[Setup, ConflictLog], int]:
    """The narrowest unsplit network that costs at least as much as Recon's split one: the doubt is the control's gain.

    Args:
        measure: What is compared: parameters, or operations.
    """

    def width(setup: Setup, log: ConflictLog) -> int:
        at_least = measure(network_cost(setup, plan=recon()(setup, log, 0)))
        chosen = int(setup.decided.options["width"])
        while measure(network_cost(setup, width=chosen)) < at_least:
            chosen += 1
        return chosen

    return width


WAYS: dict[str, Choice] = {
    "recon": recon(),
    "random layers": random_layers,
    "smallest layers": smallest,
    "random layers, as many parameters": random_parameters(exceed=False),
    "all norms": norms,
    "least conflicts": least_conflicts,
    "first layer alone": first_alone,
    "recon but the first layer": recon_but_first,
    "random layers and the first": random_and_first,
}
"""Ways to choose layers, that of the paper first."""

CENTRAL = (
    Training(name="joint"),
    Training(name="recon", choose=WAYS["recon"]),
    Training(name="random layers", choose=WAYS["random layers"]),
    Training(name="smallest layers", choose=WAYS["smallest layers"]),
    Training(name="wider, operations", width=as_wide_as(operations)),
    Training(name="random layers, as many parameters", choose=WAYS["random layers, as many parameters"]),
    Training(name="wider, parameters", width=as_wide_as(parameters)),
    Training(name="all norms", choose=WAYS["all norms"]),
    Training(name="recon", choose=WAYS["recon"], norm_stats="shared"),
    Training(name="random layers", choose=WAYS["random layers"], norm_stats="shared"),
    Training(name="smallest layers", choose=WAYS["smallest layers"], norm_stats="shared"),
    Training(name="single", method="single"),
    Training(name="least conflicts", choose=WAYS["least conflicts"]),
    Training(name="all norms", choose=WAYS["all norms"], norm_stats="shared"),
    Training(
        name="random layers, as many parameters",
        choose=WAYS["random layers, as many parameters"],
        norm_stats="shared",
    ),
    Training(name="least conflicts", choose=WAYS["least conflicts"], norm_stats="shared"),
    *(Training(name=name, choose=WAYS[name]) for name in BY_FIRST),
    *(Training(name=name, choose=WAYS[name], norm_stats="shared") for name in BY_FIRST),
)
"""The central question, most telling rows first: whoever stops early has an answer.

Every way to split stands at both settings of `norm_stats`; an unsplit network has no statistics that tasks could mix.
"""

KS = (5, 10, 15, 20, 30, 35)
SEVERITIES = (0.0, -0.02, -0.05, -0.15)

TABLE_7 = (
    Training(name="recon", choose=WAYS["recon"], norm_stats="shared"),
    Training(name="random layers", choose=random_layers, norm_stats="shared"),
    Training(name="random parameters, exceeding", choose=random_parameters(exceed=True), norm_stats="shared"),
)
"""As published: BatchNorms that stay shared mix the tasks' running statistics."""
TABLE_11 = (
    Training(name="recon", choose=WAYS["recon"], norm_stats="shared"),
    Training(name="last layers", choose=last, norm_stats="shared"),
    Training(name="first layers", choose=first, norm_stats="shared"),
)
FAIR_11 = (
    Training(name="last layers", choose=last),
    Training(name="first layers", choose=first),
)
FAIR = (
    Training(name="recon", choose=WAYS["recon"]),
    Training(name="random layers", choose=random_layers),
    Training(name="random layers, as many parameters", choose=random_parameters(exceed=False)),
    Training(name="smallest layers", choose=smallest),
    Training(name="all norms", choose=norms),
)
"""Statistics per task, at the same number of layers and of parameters."""
CHOSEN = Training(name="recon", choose=WAYS["recon"], balancer="cagrad:c=0.2")
"""At the K and S of the paper, which Table 1 has too."""
BY_K = {k: Training(name=f"recon, K = {k}", choose=recon(k), balancer="cagrad:c=0.2") for k in KS}
BY_SEVERITY = {
    s: Training(name=f"recon, S = {s:g}", choose=recon(severity=s), balancer="cagrad:c=0.2") for s in SEVERITIES
}
FIGURE_3 = (
    Training(name="joint"),
    Training(name="joint", balancer="cagrad:c=0.2"),
    CHOSEN,
    *BY_K.values(),
    *BY_SEVERITY.values(),
)


SHARED = " (shared statistics)"
MEANINGS = {
    "single": "a network per task",
    "random layers": "as many layers as Recon's, drawn under the seed",
    "random layers, as many parameters": "drawn as long as they fit into the parameters of Recon's layers",
    "random parameters, exceeding": "drawn until they exceed the parameters of Recon's layers, the paper's RSP",
    "smallest layers": "as many, the smallest",
    "all norms": "every normalisation layer",
    "least conflicts": "as many, those with the fewest conflicts",
    "recon but the first layer": "as many with most conflicts, the network's first layer left out",
    "random layers and the first": "as many, drawn, the network's first layer always among them",
    "wider, parameters": "the narrowest unsplit network that has at least the parameters of Recon's",
    "wider, operations": "the narrowest unsplit network that takes at least the operations of Recon's",
}
"""What rows are, where their names do not say all of it."""


def show(setup: Setup, trainings: Sequence[Training], seeds: Sequence[int]) -> str:
    """Markdown: gain over joint training, its price, and a paired test against Recon."""
    comparison, found = priced(setup, trainings, seeds)
    if comparison is None:
        return "Nothing is finished yet: the joint training comes first."
    cells = []
    for p in found:
        row, paired = p.row, p.paired
        cells.append(
            [
                row.label,
                *(s.show(2) for s in row.metrics.values()),
                p.gain.show(2, sign=True),
                f"{p.megabytes:+.3f}",
                f"{p.operations:.2f}",
                "" if p.megabytes <= 0 else readable(p.gain.mean / p.megabytes, digits=1),
                "" if p.operations <= 1 else readable(p.gain.mean / (p.operations - 1), digits=1),
                *(
                    ["", "", ""]
                    if paired is None
                    else [
                        Spread(paired.mean, paired.sd, paired.n).show(2, sign=True),
                        "" if math.isnan(paired.effect) else f"{paired.effect:+.1f}",
                        f"{paired.p_flip:.2g}",
                    ]
                ),
                str(len(row.seeds)),
            ]
        )
    metrics = [f"{t} {m}" for t, m in comparison.rows[0].metrics]
    titles = [
        "layers split",
        *metrics,
        "Δm to joint (%)",
        "added MB",
        "operations",
        "Δm per MB",
        "Δm per joint forward",
    ]
    titles += ["Δm - recon", "effect size", "p (sign flip)", "n"]
    there = {p.row.label.removesuffix(SHARED) for p in found}
    meant = [f"*{name}*: {told}" for name, told in MEANINGS.items() if name in there]
    notes = [
        "Δm is relative to joint training under the row's own seeds. Operations of a forward in multiples of the joint "
        "network's.",
        *([f"{'; '.join(meant)}."] if meant else []),
        *_tested([p.paired for p in found if p.paired is not None]),
        *(
            ["\n".join(["Left out:", *(f"- {o.run}: {o.reason}" for o in comparison.left_out)])]
            * bool(comparison.left_out)
        ),
    ]
    return "\n\n".join([grid(titles, cells), *notes])


def _tested(pairs: Sequence[Paired]) -> list[str]:
    """What the columns of the paired test say."""
    if not pairs:
        return []
    few = sorted({p.n for p in pairs if p.smallest > SURE})
    least = ", ".join(f"{2.0 ** (1 - n):.2g} with n = {n}" for n in few)
    told = (
        "Differences are to Recon's choice with the same statistics and balancer, over the seeds that both have; Recon "
        "with shared statistics is compared with Recon. The effect size is the mean difference in units of its "
        "deviation over seeds. p is two-sided, and not corrected for the number of rows"
    )
    return [told + (f"; the sign-flip test cannot give less than {least}." if few else ".")]


def draw(setup: Setup, trainings: Sequence[Training], seeds: Sequence[int]) -> Figure | None:
    """Gain over joint training of every choice, a column per setting of the statistics."""
    _, found = priced(setup, trainings, seeds)
    if not found:
        return None
    of: dict[str, list[drawings.Dot]] = {"statistics per task": [], "shared statistics": []}
    for p in found:
        if p.row.label != "joint":  # which is zero
            column = of["shared statistics" if p.row.label.endswith(SHARED) else "statistics per task"]
            column.append(drawings.Dot(p.row.label.removesuffix(SHARED), p.gain))
    return drawings.columns({head: rows for head, rows in of.items() if rows} or of, "Δm to joint (%), mean ± sd")


def draw_choices(setup: Setup, seeds: Sequence[int]) -> Figure | None:
    """Figure 3: the gain over joint training by K, and by S."""
    _, found = priced(setup, FIGURE_3, seeds)
    rows = {p.row.label: p.gain for p in found}

    def line(of: Mapping[float, Training] | Mapping[int, Training]) -> list[drawings.Point]:
        there = ((x, rows.get(t.row)) for x, t in sorted(of.items()))
        return [drawings.Point(x, y) for x, y in there if y is not None]

    k, s = setup.decided.k, setup.decided.severity  # of the chosen point, which both lines go through
    panels = [("K", line(BY_K | ({k: CHOSEN} if k else {}))), ("S", line(BY_SEVERITY | {s: CHOSEN}))]
    if not any(points for _, points in panels):
        return None
    return drawings.lines(
        [drawings.Panel(title, {"Recon": points}) for title, points in panels], "Δm relative to joint training (%)"
    )


def answered(setup: Setup, seeds: Sequence[int]) -> dict[str, Answered]:
    """The central question's rows; each tested against Recon's at the same setting of the statistics."""
    _, found = priced(setup, CENTRAL, seeds)
    return {p.row.label: Answered(p.gain, p.megabytes, None if p.paired is None else p.paired.p_flip) for p in found}
