"""Rankings against SciPy and by hand; a bootstrap that knows a stable ranking from noise."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from reconmtl.conflicts import ConflictLog, share_below
from reconmtl.errors import PlanError, RunError
from reconmtl.paper import rankings
from reconmtl.plan import Plan


def make_log(cosines: torch.Tensor, *, tasks: tuple[str, ...] = ("a", "b")) -> ConflictLog:
    """Two tasks whose cosines are [steps, layers]."""
    ones = torch.ones_like(cosines)
    names = [f"l{i}" for i in range(cosines.shape[1])]
    return ConflictLog(
        torch.stack([ones, cosines, ones], 2),
        tasks=tasks,
        layers=names,
        sizes=dict.fromkeys(names, 10),
        types=dict.fromkeys(names, "Linear"),
    )


def noise(seed: int, *, steps: int = 64, layers: int = 8, means: float = 0.0) -> ConflictLog:
    draw = torch.Generator().manual_seed(seed)
    centre = torch.linspace(-means, means, layers)
    return make_log((centre + 0.1 * torch.randn(steps, layers, generator=draw)).clamp(-1, 1))


def test_kendall_tau_is_scipys_for_orders() -> None:
    draw = np.random.default_rng(0)
    names = [f"l{i}" for i in range(9)]
    for _ in range(20):
        a, b = draw.permutation(9), draw.permutation(9)
        found = rankings.kendall_tau([names[i] for i in a], [names[i] for i in b])
        assert found == pytest.approx(kendalltau(np.argsort(a), np.argsort(b)).statistic)
    assert rankings.kendall_tau(names, names[::-1]) == -1
    with pytest.raises(PlanError, match="one only"):
        rankings.kendall_tau(["a"], ["b"])


def test_quarters_are_windows_and_all_is_all() -> None:
    log = noise(0, steps=42, means=0.2)
    found = rankings.quarters(log, severity=-0.05)
    assert tuple(found) == rankings.QUARTERS
    total = dict.fromkeys(log.layers, 0)
    for name in rankings.QUARTERS[:4]:
        for layer, score in zip(found[name].layers, found[name].scores, strict=True):
            total[layer] += score
    assert total == dict(zip(found["all"].layers, found["all"].scores, strict=True))
    between = rankings.distances(found)
    assert len(between) == 10 and ("all", "1st quarter") in between
    assert between["all", "1st quarter"] == found["all"].distance(found["1st quarter"])
    with pytest.raises(RunError, match="no quarters"):
        rankings.quarters(log.window(0, 3), severity=-0.05)


def test_the_distance_of_random_orders_is_the_expectation() -> None:
    draw = np.random.default_rng(0)
    mean = np.mean([np.abs(draw.permutation(41) - draw.permutation(41)).mean() for _ in range(2000)])
    assert rankings.random_distance(41) == pytest.approx(mean, rel=0.02)


def test_distributions_per_layer_are_counts() -> None:
    log = noise(1, steps=300)
    edges = (0.1, 0.0, -0.05)
    found = rankings.layer_distributions(log, edges=edges)
    assert torch.allclose(found.sum(1), torch.ones(8).double())
    for i in range(8):
        below = [1.0, *(share_below(log.cosines()[:, i], e) for e in edges), 0.0]
        assert found[i].tolist() == pytest.approx([a - b for a, b in pairwise(below)])


def test_a_bootstrap_knows_a_stable_ranking_from_noise() -> None:
    stable = rankings.bootstrap([noise(s, means=0.3) for s in range(3)], severity=-0.02, k=3, samples=200)
    chance = rankings.bootstrap([noise(s) for s in range(3)], severity=-0.02, k=3, samples=200)
    assert stable.layers[:3] == ("l0", "l1", "l2")
    assert stable.kept > 0.95 > chance.kept > 3 / 8
    assert stable.distance < 0.5 < chance.distance < rankings.random_distance(8)
    assert (stable.low <= np.arange(1, 9)).all() and (stable.high >= np.arange(1, 9)).all()
    assert stable.top.sum() == pytest.approx(3)
    one = rankings.bootstrap([noise(0, means=0.3)], severity=-0.02, k=3, samples=50)
    assert one.recordings == 1
    with pytest.raises(RunError, match="same layers"):
        rankings.bootstrap([noise(0), noise(0, layers=5)], severity=-0.02, k=3)
    with pytest.raises(PlanError, match="expected 1 to 8"):
        rankings.bootstrap([noise(0)], severity=-0.02, k=9)


def test_a_plan_goes_to_another_network_by_name() -> None:
    here, there = noise(0), make_log(torch.zeros(4, 6), tasks=("x", "y"))
    plan = here.rank(severity=-0.05).top(3)
    assert rankings.overlap(plan, here.rank(severity=-0.05).top(8)) == 3
    wanted = Plan(tasks=here.tasks, layers=["l3", "l1", "l7"])
    moved = rankings.transferred(wanted, there, rename=lambda n: None if n == "l7" else n)
    assert list(moved.layers) == ["l1", "l3"] and moved.tasks == ("x", "y")
    with pytest.raises(PlanError, match="'l7'"):
        rankings.transferred(wanted, there)
    with pytest.raises(PlanError, match="no layer is left"):
        rankings.transferred(wanted, there, rename=lambda _: None)
