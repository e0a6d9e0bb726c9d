"""Does it matter which layers are split? Recon's choice beside controls of the same number and of the same cost.

The paper's Tables 7 and 11 compare with random layers whose BatchNorms mix their tasks' running statistics, and of
other sizes. Here every way of choosing stands at both settings of `norm_stats`, beside networks that are simply wider.
"""

from __future__ import annotations

from collections.abc import Callable

from reconmtl.conflicts import ConflictLog
from reconmtl.paper.trainings import Choice, Setup, Training
from reconmtl.plan import Plan
from reconmtl.splitting.costs import Cost, cost


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


def network_cost(setup: Setup, *, plan: Plan | None = None, width: int | None = None) -> Cost:
    """Parameters and operations of one forward of one sample, of a network that is split or wider."""
    problem = setup.problem(width)
    return cost(problem.model().eval(), plan, sample=problem.sample())


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


def parameters(found: Cost) -> float:
    """Parameters of a network."""
    return found.parameters


def operations(found: Cost) -> float:
    """Floating-point operations of a forward."""
    assert found.flops is not None  # a sample was given
    return found.flops


WAYS: dict[str, Choice] = {
    "recon": recon(),
    "random layers": random_layers,
    "smallest layers": smallest,
    "random layers, as many parameters": random_parameters(exceed=False),
    "all norms": norms,
    "least conflicts": least_conflicts,
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
)
"""The central question, most telling rows first: whoever stops early has an answer."""
