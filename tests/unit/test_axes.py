"""Round steps, and labels that keep apart."""

import itertools
import math

import pytest

from reconmtl.reporting.axes import spread_out, steps, ticks_of, whole_steps


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.2, 0.05), (3, 3), (1e-7, 2e-7), (-5e6, 7e6), (math.nan, 1)])
def test_axes_have_round_steps_that_span_the_data(low: float, high: float) -> None:
    values = steps(low, high)
    assert 2 <= len(values) <= 12
    if math.isfinite(low):
        assert values[0] <= low + 1e-12 and values[-1] >= high - 1e-9 * abs(high)
    labels = ticks_of(values)
    assert len(set(labels)) == len(labels)


def test_labels_are_moved_apart_but_stay_near() -> None:
    placed = spread_out([5, 5, 5, 90], gap=10)
    assert all(b - a >= 9.9 for a, b in itertools.pairwise(sorted(placed)))
    assert sum(placed[:3]) / 3 == pytest.approx(5, abs=1)
    assert placed[3] == 90 and spread_out([], gap=1) == []
    assert whole_steps(1, 3) == [1, 2, 3]
