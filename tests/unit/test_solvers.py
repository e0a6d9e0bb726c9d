import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import KINDS, cagrad_objective, jacobian
from reconmtl.solvers import bargain, conflict_averse, min_norm, nonnegative

minimize = pytest.importorskip("scipy.optimize").minimize


cases = st.tuples(st.integers(0, 10**6), st.integers(2, 40), st.sampled_from(KINDS), st.integers(-12, 12))


@settings(deadline=None, max_examples=60)
@given(cases)
def test_min_norm_meets_its_optimality_conditions(case: tuple[int, int, str, int]) -> None:
    seed, tasks, kind, power = case
    gram = (j := jacobian(seed, tasks, kind) * 10.0**power) @ j.T
    w = min_norm(gram)
    assert w.min() >= 0
    assert w.sum() == pytest.approx(1)
    # the shortest vector has an inner product of at least its own square with every gradient
    norms = np.sqrt(gram.diagonal())
    rounding = 1e-9 * norms * max(math.sqrt(max(float(w @ gram @ w), 0.0)), 1e-3 * norms.min())
    assert (gram @ w - w @ gram @ w >= -rounding).all()


@settings(deadline=None, max_examples=60)
@given(cases, st.sampled_from([0.1, 0.4, 0.9]))
def test_cagrad_is_optimal_by_duality(case: tuple[int, int, str, int], c: float) -> None:
    """The worst task's gain in the ball, and the minimum over the simplex, bound each other: equal means optimal."""
    seed, tasks, kind, power = case
    rows = jacobian(seed, tasks, kind)
    gram = rows @ rows.T
    found = conflict_averse(gram * 10.0 ** (2 * power), c)
    change, radius = found - 1 / tasks, c * math.sqrt(gram.mean())
    assert math.sqrt(max(float(change @ gram @ change), 0.0)) <= radius * (1 + 1e-6)
    gain = float((gram @ found).min())
    scale = math.sqrt(gram.mean() * gram.diagonal().max())
    total = change.sum()
    bound = cagrad_objective(change / total, gram, c) if total > 1e-12 else 0.0
    stationary = cagrad_objective(min_norm(gram), gram, c)
    assert gain == pytest.approx(min(bound, stationary), rel=1e-6, abs=1e-7 * scale)


@pytest.mark.parametrize("tasks", [2, 3, 8, 20, 40])
@pytest.mark.parametrize("power", [-24, 0, 24])
def test_cagrad_against_a_general_solver(tasks: int, power: int) -> None:
    """Objective within 1e-6 of sequential quadratic programming's, direction within 1e-4, for norms 1e-12 to 1e12."""
    for seed in range(3):
        rows = jacobian(seed, tasks, "general")
        gram, c = rows @ rows.T, 0.4
        gram /= gram.trace()
        mean = gram.mean(1)
        phi = c * math.sqrt(mean.mean())
        best = minimize(
            cagrad_objective,
            np.full(tasks, 1 / tasks),
            args=(gram, c),
            jac=lambda w, g, _, mean=mean, phi=phi: mean + phi * g @ w / math.sqrt(w @ g @ w),
            bounds=[(0, 1)] * tasks,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-16, "maxiter": 1000},
        )
        slow = np.clip(best.x, 0, None) / np.clip(best.x, 0, None).sum()
        ours = conflict_averse(gram * 10.0**power, c)
        w = (ours - 1 / tasks) / (ours - 1 / tasks).sum()
        reached, least = cagrad_objective(w, gram, c), cagrad_objective(slow, gram, c)
        assert reached <= least + 1e-6 * abs(least)
        theirs = 1 / tasks + phi / math.sqrt(slow @ gram @ slow) * slow
        between = ours @ gram @ theirs / math.sqrt((ours @ gram @ ours) * (theirs @ gram @ theirs))
        assert 1 - between <= 1e-4


@settings(deadline=None, max_examples=60)
@given(cases, st.sampled_from([1.0, 0.5, 2.0]))
def test_bargaining_solves_its_equation(case: tuple[int, int, str, int], power: float) -> None:
    seed, tasks, kind, size = case
    if kind == "dependent":
        kind = "general"
    rows = jacobian(seed, tasks, kind) * 10.0 ** (size / 4)
    gram = rows @ rows.T
    alpha = bargain(gram, power)
    assert (alpha > 0).all()
    np.testing.assert_allclose((gram @ alpha) * alpha**power, 1, rtol=1e-6)


def test_nothing_and_zero() -> None:
    zero = np.zeros((3, 3))
    assert conflict_averse(zero, 0.4) == pytest.approx(np.full(3, 1 / 3))
    assert min_norm(zero).sum() == pytest.approx(1)
    assert bargain(zero) == pytest.approx(np.ones(3))
    one_silent = np.diag([1.0, 0.0, 4.0])
    assert min_norm(one_silent) == pytest.approx([0, 1, 0])  # nothing shortens a zero
    assert np.isfinite(conflict_averse(one_silent, 0.4)).all()
    assert nonnegative(np.eye(2), np.array([1.0, -1.0])) == pytest.approx([1, 0])
