"""What a row of controls gains over joint training and what it costs, against Recon's choice under the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from reconmtl.comparing import Comparison, Row, Spread, compare, gain
from reconmtl.paper.trainings import Setup, Training
from reconmtl.plan import Plan
from reconmtl.runs import Run
from reconmtl.significance import Paired
from reconmtl.splitting.costs import Cost, cost

_COUNTED: dict[tuple[str, int | None, object], Cost] = {}
"""Counting runs a split network several times, and tables, figures and pages ask for the same networks."""


def network_cost(setup: Setup, *, plan: Plan | None = None, width: int | None = None) -> Cost:
    """Parameters and operations of one forward of one sample, of a network that is split or wider; counted once."""
    split = None if plan is None else tuple(sorted(plan.layers.items()))
    key = (repr(setup.decided), width, split)
    if key not in _COUNTED:
        problem = setup.problem(width)
        _COUNTED[key] = cost(problem.model().eval(), plan, sample=problem.sample())
    return _COUNTED[key]


def parameters(found: Cost) -> float:
    """Parameters of a network."""
    return found.parameters


def operations(found: Cost) -> float:
    """Floating-point operations of a forward."""
    assert found.flops is not None  # a sample was given
    return found.flops


def costs(setup: Setup, training: Training, run: Run) -> Cost:
    """Of the network that a run trained."""
    if training.method == "single":
        problem = setup.problem()
        alone = [cost(problem.model().eval(), sample=problem.sample(), tasks=[t]) for t in problem.task_names]
        return Cost(run.parameters, run.megabytes, sum(int(operations(c)) for c in alone), None)
    width = training.width(setup, setup.probe(run.seed)) if training.width is not None else None
    return network_cost(setup, plan=run.plan, width=width)


@dataclass(frozen=True)
class Priced:
    """A row of controls.

    Attributes:
        row: Of the comparison.
        gain: Delta-m over joint training, in percent: over the joint trainings under the row's own seeds, so that rows
            of few seeds and of many can stand side by side.
        paired: Differences in delta-m to Recon's choice, over the seeds that both have; None where there is none.
        megabytes: Parameters beyond the joint network's, mean over seeds.
        operations: Of a forward, in multiples of the joint network's, mean over seeds.
    """

    row: Row
    gain: Spread
    paired: Paired | None
    megabytes: float
    operations: float


def reference(training: Training, among: Sequence[Training]) -> Training | None:
    """Recon's choice as a training is to be compared with: with its balancer, and its setting of the statistics.

    What splits nothing has no statistics to mix: it is compared with whichever there is. Recon with shared statistics
    is compared with Recon itself.
    """
    same = [t for t in among if t.name == "recon" and t.balancer == training.balancer and t.row != training.row]
    same.sort(key=lambda t: t.norm_stats != "per-task")
    if training.name == "recon":
        same = same if training.norm_stats == "shared" else []
    elif training.choose is not None:
        same = [t for t in same if t.norm_stats == training.norm_stats]
    return same[0] if same else None


def priced(setup: Setup, trainings: Sequence[Training], seeds: Sequence[int]) -> tuple[Comparison | None, list[Priced]]:
    """What is finished, compared with joint training and tested against Recon; None before the joint training."""
    runs: list[Run] = []
    found: dict[str, list[Cost]] = {}
    of = {t.row: t for t in (Training(name="joint"), *trainings)}
    for training in of.values():
        for seed in seeds:
            run = training.finished(setup, seed)
            if run is not None:
                runs.append(replace(run, label=training.row))
                found.setdefault(training.row, []).append(costs(setup, training, run))
    if "joint" not in found:
        return None, []
    comparison = compare(runs, baseline="joint")
    mean = {(t, m): s.mean for (t, m), s in comparison.rows[0].metrics.items()}  # of the joint training, which is first
    base = {t: {m: mean[t, m] for m in named} for t, named in comparison.directions.items()}
    each = {
        row.label: {run.seed: gain(run.metrics, base, comparison.directions) for run in row.runs}
        for row in comparison.rows
    }
    joint = found["joint"][0]

    def one(row: Row) -> Priced:
        own, training = each[row.label], of[row.runs[0].label]
        there = [each["joint"][s] for s in own if s in each["joint"]] or list(each["joint"].values())
        other = reference(training, [t for t in trainings if t.row in each])
        recon = {} if other is None else each[other.row]
        both = [own[s] - recon[s] for s in own if s in recon]
        return Priced(
            row,
            Spread.of([value - fmean(there) for value in own.values()]),
            Paired.of(both) if both else None,
            fmean(c.megabytes for c in found[training.row]) - joint.megabytes,
            fmean(operations(c) for c in found[training.row]) / operations(joint),
        )

    return comparison, [one(row) for row in comparison.rows]
