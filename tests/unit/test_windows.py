"""Conflicts over time, against the cosines themselves, counted slowly."""

import itertools

import numpy as np
import pytest

from reconmtl.reporting.windows import Windows
from studies import conflict_log, gappy, network_names


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 70])
def test_windows_hold_every_cosine_once(n: int) -> None:
    log = gappy(n)
    windows = Windows.of(log, severity=-0.1)
    cosines = log.cosines()
    for start, stop, found, there in zip(
        windows.borders[:-1], windows.borders[1:], windows.below, windows.measured, strict=True
    ):
        part = cosines[start:stop]
        assert found.tolist() == [int((layer < -0.1).sum()) for layer in part.unbind(1)]
        assert there.tolist() == [int((~layer.isnan()).sum()) for layer in part.unbind(1)]
    assert windows.below.sum(0).tolist() == log.scores(severity=-0.1).tolist()
    for g, (start, stop) in enumerate(itertools.pairwise(windows.pair_borders)):
        expected = log.window(int(start), int(stop)).pair_scores(severity=-0.1)
        assert windows.pair_below[g].tolist() == expected.tolist()
    assert len(windows.below) == min(n, 32) and windows.borders[-1] == n


def test_counts_give_the_windows_that_gram_matrices_give() -> None:
    log = gappy(70)
    grams, counts = Windows.of(log, severity=-0.1), Windows.of(log.counted(), severity=-0.1)
    assert counts.below.sum(0).tolist() == grams.below.sum(0).tolist()
    assert counts.measured.sum(0).tolist() == grams.measured.sum(0).tolist()
    assert counts.pair_below[0].tolist() == grams.pair_below.sum(0).tolist()
    assert counts.pair_measured[0].tolist() == grams.pair_measured.sum(0).tolist()
    assert counts.error == (0, 0)
    between = Windows.of(log.counted(), severity=-0.1234)
    assert between.error[1] > 0
    exact = log.pair_scores(severity=-0.1234).numpy()
    assert np.abs(between.pair_below[0] - exact).max() <= between.error[1]


def test_joined_windows_keep_every_number_and_many_pairs_share_windows() -> None:
    windows = Windows.of(gappy(70), severity=-0.1)
    fewer = windows.joined(12)
    assert len(fewer.below) == 12 and set(fewer.borders) <= set(windows.borders)
    assert fewer.below.sum(0).tolist() == windows.below.sum(0).tolist()
    assert fewer.measured.sum() == windows.measured.sum()
    wide = conflict_log(tasks=[f"t{i}" for i in range(40)], layers=network_names(40), steps=33)
    many = Windows.of(wide, severity=-0.1)
    assert len(many.below) == 32 and 1 < len(many.pair_below) < 32
    assert many.pair_below.size <= 320_000
    as_pairs = many.at_pairs()
    assert as_pairs.below.tolist() == many.pair_below.sum(2).tolist()
