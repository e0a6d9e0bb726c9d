"""Exact solutions of the small problems behind gradient balancers, on the Gram matrix G [T, T] of the tasks' gradients.

Everything is found by active sets, in float64, so that neither tiny nor huge gradients change the answer: the published
solver of CAGrad silently returns uniform weights for small gradients, others return zero.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

TINY = 1e-14
"""Relative size below which a squared norm is rounding of zero."""


def nonnegative(h: Array, q: Array, start: NDArray[np.bool_] | None = None) -> Array:
    """Minimise u^T H u / 2 - q^T u over u >= 0.

    Args:
        h: Positive semidefinite, with q in its range, [n, n].
        q: [n].
        start: Entries that are likely positive, [n].

    Returns:
        A minimiser [n].

    Reference: Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23.
    """
    n = len(q)
    u, passive = np.zeros(n), np.zeros(n, dtype=bool)
    if start is not None and start.any():
        inner = np.ix_(start, start)
        found = _solved(h[inner], q[start])
        if found is not None and (found > 0).all():
            u[start], passive = found, start.copy()
    scale = np.abs(q).max(initial=0.0) + np.sqrt(np.abs(h.diagonal())).max(initial=0.0) * 1e-3
    tried: set[bytes] = set()
    for _ in range(20 * n + 20):
        gradient = q - h @ u
        gradient[passive] = -np.inf
        best = int(gradient.argmax())
        if gradient[best] <= 1e-13 * scale:
            return u
        passive[best] = True
        while True:
            inner = np.ix_(passive, passive)
            found = _solved(h[inner], q[passive])
            if found is None:  # dependent up to rounding: nothing to gain there
                passive[best] = False
                return u
            if (found > 0).all():
                u[:] = 0.0
                u[passive] = found
                break
            target = np.zeros(n)
            target[passive] = found
            falling = passive & (target <= 0)
            steps = u[falling] / np.maximum(u[falling] - target[falling], np.finfo(float).tiny)
            u += steps.min() * (target - u)
            at = np.flatnonzero(falling)[steps <= steps.min()]
            u[at] = 0.0
            passive[at] = False
        key = passive.tobytes()
        if key in tried:  # rounding: the set was there before, so nothing is gained any more
            return u
        tried.add(key)
    return u


def _solved(matrix: Array, right: Array) -> Array | None:
    try:
        found: Array = np.asarray(np.linalg.solve(matrix, right), dtype=np.float64)
    except np.linalg.LinAlgError:
        return None
    return found if np.isfinite(found).all() else None


def min_norm(gram: Array, start: NDArray[np.bool_] | None = None) -> Array:
    """Weights of the shortest vector in the convex hull of the tasks' gradients.

    Minimising |sum_i u_i g_i|^2 + (sum_i u_i - 1)^2 over u >= 0 gives it up to a factor, without a constraint.
    Gradients are first brought to length one, so that their sizes do not matter.

    Args:
        gram: Inner products [T, T].
        start: Tasks that likely have positive weights.

    Returns:
        Weights [T], not negative, of sum 1.

    Reference: Desideri, Multiple-gradient descent algorithm, 2012; Wolfe, Finding the nearest point in a polytope.
    """
    squares = gram.diagonal()
    zero = squares <= TINY * TINY * squares.max(initial=0.0)
    if zero.any() or not squares.size:
        return np.asarray(zero / max(zero.sum(), 1), dtype=np.float64)
    norms = np.sqrt(squares)
    b = norms.min() / norms
    u = nonnegative(gram / norms / norms[:, None] + b * b[:, None], b, start)
    w: Array = u / norms
    return np.asarray(w / w.sum(), dtype=np.float64)


def conflict_averse(gram: Array, c: float) -> Array:
    """Weights of CAGrad's update: of all vectors within c |g0| of the mean gradient g0, the best for the worst task.

    The optimum is g0 + c |g0| g_w / |g_w| where w minimises <g_w, g0> + c |g0| |g_w| over the simplex. For t = |g_w| as
    it is at the optimum, w also minimises |g_w + s g0| with s = t / (c |g0|), which is a shortest vector of a hull. On
    each set of positive weights, w is linear in s and the right s the root of a quadratic.

    Args:
        gram: Inner products [T, T].
        c: Radius relative to the mean gradient, not negative.

    Returns:
        Weights [T], such that their sum over the tasks' gradients is the update.

    Reference: Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021, equations 3 to 5.
    """
    count = len(gram)
    mean = np.full(count, 1.0 / count)
    largest = gram.diagonal().max(initial=0.0)
    if c == 0 or largest <= 0:
        return mean
    gram = gram / largest
    to_mean = gram @ mean
    square = float(mean @ to_mean)
    if square <= TINY:
        return mean  # the mean gradient is zero, and so is the ball around it
    radius = c * math.sqrt(square)
    nearest = min_norm(gram)
    least = max(float(nearest @ gram @ nearest), 0.0)
    high = 1.0 / radius
    low = math.sqrt(least) / radius
    if (
        least <= TINY * square
    ):  # no direction serves every task: take the one nearest to g0 that harms none, if in reach
        change = nonnegative(gram, -to_mean)
        if float(change @ gram @ change) <= radius * radius:
            return mean + change
        low = 1e-6 * high  # below, lengths are rounding
    s, w = math.sqrt(low * high), nearest
    for _ in range(200):
        shifted = gram + s * (to_mean + to_mean[:, None]) + s * s * square
        w = min_norm(shifted, w > 0)
        length = math.sqrt(max(float(w @ gram @ w), 0.0))
        if abs(length - s * radius) <= 1e-10 * length or high - low <= 1e-12 * high:
            break  # w is off by as little, and the objective by the square of it
        low, high = (s, high) if length > s * radius else (low, s)
        root = _root(gram, to_mean, w > 0, radius)
        inside = root is not None and low < root < high
        s = root if inside and root is not None else math.sqrt(low * high)
    return mean + radius / math.sqrt(float(w @ gram @ w)) * w


def _root(gram: Array, to_mean: Array, support: NDArray[np.bool_], radius: float) -> float | None:
    """The s at which |g_w(s)| = s radius, if w stays positive on the same tasks, where it is p + s q."""
    n = int(support.sum())
    matrix = np.zeros((n + 1, n + 1))
    matrix[:n, :n] = gram[np.ix_(support, support)]
    matrix[:n, n] = matrix[n, :n] = 1.0
    right = np.zeros((n + 1, 2))
    right[n, 0] = 1.0
    right[:n, 1] = -to_mean[support]
    try:
        found = np.linalg.solve(matrix, right)[:n]
    except np.linalg.LinAlgError:
        return None
    inner = found.T @ matrix[:n, :n] @ found
    a, b, k = inner[1, 1] - radius * radius, inner[0, 1], inner[0, 0]
    inside = b * b - a * k
    if not math.isfinite(inside) or inside < 0:
        return None
    # the stable form of both roots of a s^2 + 2 b s + k
    half = -(b + math.copysign(math.sqrt(inside), b))
    roots = [x for x in (half / a if a else math.inf, k / half if half else math.inf) if 0 < x < math.inf]
    return min(roots, default=None)


def bargain(gram: Array, power: float = 1.0) -> Array:
    """Solve G alpha = alpha^-power for positive alpha: Nash-MTL with power 1, FairGrad with power 1 / alpha.

    It is the minimum of a strictly convex function, found by Newton's method.

    Args:
        gram: Inner products [T, T].
        power: Positive.

    Returns:
        alpha [T]; 1 for tasks without a gradient, whose equation has no solution.

    Reference: Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022, claim 3.1; Ban and Ji, Fair Resource
        Allocation in Multi-Task Learning, ICML 2024, equation 5.
    """
    out = np.ones(len(gram))
    squares = gram.diagonal()
    there = squares > TINY * TINY * squares.max(initial=0.0)
    if not there.any():
        return out
    norms = np.sqrt(squares[there])
    g = gram[np.ix_(there, there)] / norms / norms[:, None]  # in units of each gradient's length
    g += 1e-12 * np.eye(len(g))  # opposite gradients have a common limit only
    scale = float(np.exp(np.log(norms).mean()))
    b = (norms / scale) ** (power - 1)

    def value(x: Array) -> float:
        gain = np.log(x) if power == 1 else x ** (1 - power) / (1 - power)
        return float(x @ g @ x / 2 - b @ gain)

    x = b ** (1 / (1 + power))
    for _ in range(500):
        share = b * x**-power
        slope = g @ x - share
        if np.abs(slope / share).max() <= 1e-13:
            break
        step = np.linalg.solve(g + np.diag(power * share / x), -slope)
        falling = step < 0
        length = min(1.0, 0.9 * float((-x[falling] / step[falling]).min())) if falling.any() else 1.0
        decrease, before = -float(slope @ step), value(x)
        rounding = 1e-13 * (abs(before) + float(b @ np.abs(x ** (1 - power))))
        while value(x + length * step) > before - 1e-4 * length * decrease + rounding:
            length /= 2
        x = x + length * step
    out[there] = x / norms * scale ** ((power - 1) / (1 + power))
    return out
