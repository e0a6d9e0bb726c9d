import pytest
import torch

from logs import make_log, two_task_grams
from reconmtl.errors import PlanError


def test_ranking_orders_by_conflicts_and_keeps_network_order_in_ties() -> None:
    log = make_log(two_task_grams([[0.5, -0.5, -0.5, 0.5], [0.5, -0.5, -0.5, -0.5]]))
    ranking = log.rank(severity=-0.1)
    assert ranking.layers == ("l1", "l2", "l3", "l0")
    assert ranking.scores == (2, 2, 1, 0)
    assert ranking.possible == 2
    plan = ranking.top(2)
    assert list(plan.layers) == ["l1", "l2"]
    assert plan.layers["l1"] == (("a",), ("b",))
    assert plan.chosen["scores"] == {"l1": 2, "l2": 2}


def _three_tasks() -> torch.Tensor:
    """Grams [4 steps, 3 layers, 6]: task c never reaches l0; l1 has a zero gradient once; l2 is rounding noise."""
    unit = torch.tensor([1.0, -0.5, -0.5, 1.0, -0.5, 1.0])
    grams = unit.repeat(4, 3, 1)
    grams[:, 0, [2, 4, 5]] = torch.nan
    grams[3, 1] = 0
    grams[:, 2] *= 1e-16
    return grams


@pytest.mark.parametrize("counted", [False, True])
def test_a_ranking_knows_how_many_pairs_were_measured_at_each_layer_and_what_is_noise(counted: bool) -> None:
    log = make_log(_three_tasks(), tasks=("a", "b", "c"))
    ranking = (log.counted() if counted else log).rank(severity=-0.1)
    assert ranking.possible == 12
    assert dict(zip(ranking.layers, ranking.measured, strict=True)) == {"l0": 4, "l1": 9, "l2": 12}
    assert ranking.measured == ranking.scores == (12, 9, 4)  # every pair that there was is a conflict
    assert ranking.noise == {"l2"}


def test_a_ranking_of_nothing_is_empty() -> None:
    ranking = make_log(torch.empty(3, 0, 3)).rank(severity=0)
    assert (ranking.layers, ranking.measured, ranking.noise) == ((), (), frozenset())


@pytest.mark.parametrize("k", [0, 5, -1, 2.0])
def test_top_refuses_more_layers_than_there_are(k: int) -> None:
    ranking = make_log(two_task_grams([[0.5, -0.5, -0.5, 0.5]])).rank(severity=0)
    with pytest.raises(PlanError, match="from 1 to 4"):
        ranking.top(k)


def test_budget_keeps_every_layer_that_still_fits() -> None:
    ranking = make_log(two_task_grams([[0.5, -0.5, -0.5, -0.5], [0.5, 0.1, -0.5, -0.5]])).rank(severity=0)
    assert ranking.layers == ("l2", "l3", "l1", "l0")  # of 30, 40, 20 and 10 parameters
    plan = ranking.budget(megabytes=60 * 4 / 2**20)
    assert list(plan.layers) == ["l2", "l1", "l0"]
    with pytest.raises(PlanError, match="No layer fits"):
        ranking.budget(megabytes=9 * 4 / 2**20)


def test_distance_is_the_mean_difference_of_positions() -> None:
    up = make_log(two_task_grams([[-0.5, -0.5, 0.5, 0.5], [-0.5, 0.5, 0.5, 0.5]])).rank(severity=0)
    down = make_log(two_task_grams([[0.5, 0.5, -0.5, -0.5], [0.5, 0.5, 0.5, -0.5]])).rank(severity=0)
    assert up.layers == ("l0", "l1", "l2", "l3")
    assert down.layers == ("l3", "l2", "l0", "l1")
    assert up.distance(up) == 0
    assert up.distance(down) == down.distance(up) == (2 + 2 + 1 + 3) / 4
