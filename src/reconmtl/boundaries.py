"""Boundaries in images: one pixel wide, and matched with others that lie close by. NumPy; matching takes SciPy."""

import numpy as np
from numpy.typing import NDArray

from reconmtl.errors import DataError, missing_extra

Bools = NDArray[np.bool_]


def label_edges(labels: NDArray[np.integer]) -> Bools:
    """Where the Laplacian of a label map [H, W] is not 0, thinned: how PASCAL-Context's edges are made."""
    x = np.pad(labels.astype(np.int64), 1, mode="reflect")
    laplacian = x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
    return thinned(laplacian != 0)


def thinned(mask: Bools) -> Bools:
    """Reduce everything in a mask [H, W] to lines of one pixel, without breaking them.

    Reference: Guo and Hall, Parallel thinning with two-subiteration algorithms, CACM 1989, in the form of Lam et al.,
    Thinning methodologies, PAMI 1992 (what MATLAB's `bwmorph(.., 'thin')` does).
    """
    current = np.pad(np.array(mask, dtype=np.uint8), 1)
    inner = current[1:-1, 1:-1]
    while True:
        before = int(inner.sum())
        for removable in _REMOVABLE:
            height, width = inner.shape
            code = np.zeros(inner.shape, dtype=np.uint8)
            for bit, (dy, dx) in enumerate(_AROUND):
                code |= current[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] << np.uint8(bit)
            inner &= ~removable[code]
        if int(inner.sum()) == before:
            return inner.astype(bool)


_AROUND = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
"""Neighbours (down, right), counter-clockwise from the east: bits of a code from 0 to 255."""


def _tables() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """By the code of its neighbours, whether a pixel is taken away: in the first and in the second half of a round."""
    x = [(np.arange(256) >> i & 1).astype(bool) for i in range(8)]
    crossings = np.sum([~x[i] & (x[i + 1] | x[(i + 2) % 8]) for i in (0, 2, 4, 6)], axis=0)
    one = np.sum([x[i] | x[i + 1] for i in (0, 2, 4, 6)], axis=0)
    two = np.sum([x[i + 1] | x[(i + 2) % 8] for i in (0, 2, 4, 6)], axis=0)
    fewest = np.minimum(one, two)
    border = (crossings == 1) & (fewest >= 2) & (fewest <= 3)
    east = (x[1] | x[2] | ~x[7]) & x[0]
    west = (x[5] | x[6] | ~x[3]) & x[4]
    return (border & ~east).astype(np.uint8), (border & ~west).astype(np.uint8)


_REMOVABLE = _tables()


def matched(found: Bools, true: Bools, *, distance: float) -> int:
    """How many pixels of two masks can be paired one to one, no pair further apart than allowed.

    The number is the largest there is (maximum bipartite matching). The field's MATLAB tools, BSDS' correspondPixels in
    SEISM, pair at the smallest total distance and may pair fewer where outliers are cheaper; the number differs little.

    Args:
        found: [H, W].
        true: [H, W].
        distance: Largest allowed, in pixels.

    Returns:
        The number of pairs.

    Raises:
        DataError: If the shapes differ.
        MissingExtraError: If SciPy is not installed.

    Reference: Martin, Fowlkes and Malik, Learning to detect natural image boundaries, PAMI 2004.
    """
    try:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import maximum_bipartite_matching
    except ModuleNotFoundError:
        raise missing_extra("Matching boundaries", "metrics") from None
    if found.shape != true.shape:
        raise DataError(f"Masks of shapes {list(found.shape)} and {list(true.shape)} cannot be matched.")
    height, width = found.shape
    index = np.full(found.shape, -1)
    index[true] = np.arange(int(true.sum()))
    y, x = np.nonzero(found)
    reach = int(distance)
    rows, columns = [], []
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            if dy * dy + dx * dx > distance * distance:
                continue
            ny, nx = y + dy, x + dx
            inside = np.flatnonzero((ny >= 0) & (ny < height) & (nx >= 0) & (nx < width))
            other = index[ny[inside], nx[inside]]
            rows.append(inside[other >= 0])
            columns.append(other[other >= 0])
    row, column = np.concatenate(rows), np.concatenate(columns)
    if len(row) == 0:
        return 0
    near = coo_array((np.ones(len(row), dtype=np.int8), (row, column)), shape=(len(y), int(true.sum()))).tocsr()
    return int((maximum_bipartite_matching(near, perm_type="column") >= 0).sum())
