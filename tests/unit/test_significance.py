"""The tests against SciPy and against every choice of signs, spelled out."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reconmtl.significance import EXACT, Paired, paired_t, sign_flip

NUMBERS = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


@given(st.lists(NUMBERS, min_size=2, max_size=40))
def test_t_is_that_of_scipy(differences: list[float]) -> None:
    if np.ptp(differences) <= 1e-3 * np.abs(differences).max():
        return  # SciPy warns of lost digits
    assert paired_t(differences) == pytest.approx(float(stats.ttest_1samp(differences, 0).pvalue), abs=1e-9)


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=9))
def test_p_counts_the_signs_that_lead_as_far(differences: list[int]) -> None:
    signs = list(itertools.product((1, -1), repeat=len(differences)))
    far = [abs(sum(s * d for s, d in zip(of, differences, strict=True))) for of in signs]
    expected = sum(f >= abs(sum(differences)) for f in far) / len(signs)
    assert sign_flip([d / 7 for d in differences]) == expected  # rounding must not part equal sums


@given(st.lists(NUMBERS, min_size=1, max_size=12), st.floats(1e-12, 1e12))
def test_p_depends_neither_on_scale_nor_sign_nor_order(differences: list[float], scale: float) -> None:
    p = sign_flip(differences)
    assert 2.0 ** (1 - len(differences)) <= p <= 1
    assert sign_flip([-scale * d for d in reversed(differences)]) == p


def test_beyond_the_exact_size_p_is_estimated() -> None:
    values = [3, -1, 4, 1, -5, 9, 2, -6, 5, 3, 5, 8, -9, 7, 9, 3, 2, -3, 8, 4, 6, -2]
    assert len(values) > EXACT
    ways = {0: 1}
    for value in values:  # every choice of signs, by its sum
        ways = {
            s: ways.get(s - value, 0) + ways.get(s + value, 0) for s in {w + d for w in ways for d in (value, -value)}
        }
    expected = sum(n for s, n in ways.items() if abs(s) >= abs(sum(values))) / 2 ** len(values)
    assert sign_flip(values) == pytest.approx(expected, rel=0.05)
    assert sign_flip([1.0] * 40) < 1e-5


def test_what_is_not_defined_is_nan() -> None:
    assert math.isnan(paired_t([1.0])) and math.isnan(paired_t([2.0, 2.0])) and sign_flip([0.0, 0.0]) == 1
    one, odd = Paired.of([3.0]), Paired.of([1.0, math.nan])
    assert (one.mean, one.n, one.p_flip, one.smallest) == (3.0, 1, 1.0, 1.0) and math.isnan(one.sd)
    assert math.isnan(odd.p_flip) and math.isnan(odd.p_t) and math.isnan(odd.sd)


@given(st.lists(NUMBERS, min_size=2, max_size=30))
def test_the_effect_size_is_that_behind_t(differences: list[float]) -> None:
    if np.ptp(differences) <= 1e-3 * np.abs(differences).max():
        return
    t = float(stats.ttest_1samp(differences, 0).statistic)
    assert Paired.of(differences).effect == pytest.approx(t / math.sqrt(len(differences)), rel=1e-6, abs=1e-9)


def test_equal_differences_have_no_effect_size() -> None:
    assert math.isnan(Paired.of([2.0, 2.0]).effect) and math.isnan(Paired.of([2.0]).effect)
