"""Thinning and matching of boundaries, against slow and obviously right versions."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import label

from reconmtl.boundaries import label_edges, matched, thinned
from reconmtl.errors import DataError

Bools = NDArray[np.bool_]


def blobs(seed: int, size: int = 24) -> Bools:
    random = np.random.Generator(np.random.PCG64(seed))
    noise: NDArray[np.float64] = random.random((size, size))
    for _ in range(2):
        p = np.pad(noise, 1, mode="edge")
        noise = np.mean([p[i : i + size, j : j + size] for i in range(3) for j in range(3)], axis=0)
    return noise > 0.5


def pieces(mask: Bools) -> int:
    return int(label(mask, np.ones((3, 3)))[1])


@pytest.mark.parametrize("seed", range(20))
def test_thinning_keeps_pieces_and_holes_and_is_final(seed: int) -> None:
    mask = blobs(seed)
    thin = thinned(mask)
    assert not (thin & ~mask).any()
    assert pieces(thin) == pieces(mask)
    background = np.ones((3, 3))
    background[::2, ::2] = 0
    holes = [int(label(np.pad(~m, 1, constant_values=True), background)[1]) for m in (mask, thin)]
    assert holes[0] == holes[1]
    assert np.array_equal(thinned(thin), thin)
    full = np.lib.stride_tricks.sliding_window_view(thin, (3, 3)).all((2, 3))
    assert not full.any()  # nothing has an inside any more


def test_a_bar_becomes_a_line() -> None:
    bar = np.zeros((9, 20), dtype=bool)
    bar[3:6, 2:18] = True
    thin = thinned(bar)
    assert set(np.flatnonzero(thin.any(1))) == {4}
    assert thin.sum() >= 12


def test_label_edges_lie_at_changes_of_labels() -> None:
    labels = np.zeros((20, 20), dtype=np.int64)
    labels[:, 9:] = 300
    edges = label_edges(labels)
    assert set(np.flatnonzero(edges.any(0))) <= {8, 9}
    assert edges[2:-2].any(1).all()  # thinning shortens what ends
    assert edges.sum() <= 20
    assert not label_edges(np.full((8, 8), 7)).any()


def augmenting(found: Bools, true: Bools, distance: float) -> int:
    """Maximum matching by augmenting paths, pixel by pixel."""
    a, b = np.argwhere(found), np.argwhere(true)
    near = [[j for j, q in enumerate(b) if ((p - q) ** 2).sum() <= distance**2] for p in a]
    owner: dict[int, int] = {}

    def place(i: int, seen: set[int]) -> bool:
        for j in near[i]:
            if j not in seen:
                seen.add(j)
                if j not in owner or place(owner[j], seen):
                    owner[j] = i
                    return True
        return False

    return sum(place(i, set()) for i in range(len(a)))


@pytest.mark.parametrize(("seed", "distance"), list(itertools.product(range(6), (0.0, 1.0, 1.5, 2.9))))
def test_matching_equals_augmenting_paths(seed: int, distance: float) -> None:
    random = np.random.Generator(np.random.PCG64(seed))
    noise: NDArray[np.float64] = random.random((24, 15))
    found, true = np.split(noise < 0.2, 2)
    expected = augmenting(found, true, distance)
    assert matched(found, true, distance=distance) == expected == matched(true, found, distance=distance)
    if distance == 0:
        assert expected == (found & true).sum()


def test_nothing_and_different_shapes() -> None:
    nothing, some = np.zeros((4, 5), dtype=bool), np.ones((4, 5), dtype=bool)
    assert matched(nothing, some, distance=2) == matched(some, nothing, distance=2) == 0
    with pytest.raises(DataError, match=r"\[4, 5\] and \[5, 4\]"):
        matched(some, some.T, distance=1)
