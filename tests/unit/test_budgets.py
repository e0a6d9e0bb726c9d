"""Curves over K and over budgets: every way keeps its budget and would not keep one layer more."""

from typing import Literal

import pytest
import torch

from reconmtl.conflicts import ConflictLog
from reconmtl.paper import budgets
from reconmtl.paper.trainings import Setup

SIZES = (9, 4, 30, 7, 50, 1, 20)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup.of("multifashion", "mini", tmp_path_factory.mktemp("paper"), smoke=True)


def make_log() -> ConflictLog:
    names = [f"layer{i}" for i in range(len(SIZES))]
    cosines = torch.linspace(-0.9, 0.9, 40)[:, None] + torch.linspace(-0.5, 0.5, len(SIZES))
    ones = torch.ones_like(cosines)
    return ConflictLog(
        torch.stack([ones, cosines.clamp(-1, 1), ones], 2),
        tasks=["digit", "fashion"],
        layers=names,
        sizes=dict(zip(names, SIZES, strict=True)),
        types=dict.fromkeys(names, "Linear"),
    )


@pytest.mark.parametrize("way", budgets.BY_BUDGET)
@pytest.mark.parametrize("share", (0.001, 0.1, 0.4, 1.0))
def test_a_budget_holds_and_is_used_up(way: str, share: float, setup: Setup) -> None:
    log = make_log()
    most = max(share * sum(SIZES), min(SIZES))
    plan = budgets.of_budget(budgets.BY_BUDGET[way], share)(setup, log, 3)
    spent = sum(log.sizes[n] for n in plan.layers)
    assert spent <= most + 0.5
    assert all(spent + log.sizes[n] > most - 0.5 for n in log.layers if n not in plan.layers)
    if share == 1.0:
        assert set(plan.layers) == set(log.layers)


def test_the_points_of_all_ways_take_turns_and_have_names_of_their_own() -> None:
    ways: tuple[Literal["per-task", "shared"], ...] = ("per-task", "shared")
    for norm_stats in ways:
        of = budgets.curve(norm_stats)
        trainings = budgets.in_turns(of)
        assert [t.name for t in trainings[:3]] == list(budgets.BY_NUMBER)
        assert len({t.row for t in trainings}) == len(trainings) == 33
        assert {t.norm_stats for t in trainings} == {norm_stats}
