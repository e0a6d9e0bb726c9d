"""Distributions of cosines, against the log itself and by hand."""

import pytest

from reconmtl.conflicts import share_below
from reconmtl.reporting.cosines import below, fine_counts
from studies import gappy


def test_counts_of_whole_cosines_are_those_of_the_log_on_the_grid() -> None:
    log = gappy(70)
    fine = fine_counts(log)
    assert fine.tolist() == fine_counts(log.counted()).tolist()
    assert fine.sum() == int((~log.whole().isnan()).sum())
    for threshold in (-0.3, -0.01, 0.0, 0.25):
        assert below(fine, threshold) == pytest.approx(share_below(log.whole(), threshold), abs=1e-12)
