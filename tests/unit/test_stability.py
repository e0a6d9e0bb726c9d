"""The ranking's stability, against rankings and all permutations."""

import itertools

import numpy as np
import pytest

from logs import make_log, two_task_grams
from reconmtl.reporting.stability import Stability, positions
from reconmtl.reporting.windows import Windows
from studies import gappy, material


def test_positions_are_those_of_the_ranking_and_halves_are_its_distance() -> None:
    log = gappy(64)
    found = Stability.of(material(log), Windows.of(log, severity=-0.1))
    assert found is not None
    ranking = log.rank(severity=-0.1)
    assert found.layers == ranking.layers
    scores = log.scores(severity=-0.1).numpy()
    order = [log.layers.index(n) for n in ranking.layers]
    assert positions(scores)[order].tolist() == list(range(len(order)))
    first, second = log.window(0, 32).rank(severity=-0.1), log.window(32, 64).rank(severity=-0.1)
    assert found.halves == pytest.approx(first.distance(second))
    assert (found.low <= np.arange(1, 6)).all() and (found.high >= found.low).all() and found.high.max() <= 5


def test_random_orders_are_as_far_apart_as_all_permutations_are_on_average() -> None:
    n = 5
    shifts = [np.abs(np.array(p) - np.arange(n)).mean() for p in itertools.permutations(range(n))]
    cosines = [[-0.5, 0.5, 0.5, 0.5, 0.5]] * 4
    found = Stability.of(material(log := make_log(two_task_grams(cosines))), Windows.of(log, severity=-0.1))
    assert found is not None
    assert found.chance == pytest.approx(np.mean(shifts))
    # one layer conflicts always, the others never: nothing moves, whatever is drawn
    assert found.halves == 0 and found.low.tolist() == found.high.tolist() == [1, 2, 3, 4, 5]
    assert found.k == 2 and found.top.tolist() == [1, 1, 0, 0, 0]


def test_stability_needs_two_windows_and_two_layers() -> None:
    one = make_log(two_task_grams([[-0.5, 0.5]]))
    assert Stability.of(material(one), Windows.of(one, severity=-0.1)) is None
    narrow = make_log(two_task_grams([[-0.5], [0.5]]))
    assert Stability.of(material(narrow), Windows.of(narrow, severity=-0.1)) is None
    assert Stability.of(material(None), None) is None
