"""odsF: against a plain reckoning, over batches and processes, and at its edges."""

import numpy as np
import pytest
import torch

from reconmtl.boundaries import matched, thinned
from reconmtl.edge_metrics import EdgeF
from reconmtl.errors import ProblemError

THRESHOLDS = 9


def images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    target = torch.zeros(n, 1, 24, 30)
    target[:, :, :, 12] = 1
    target[:, :, 7] = 1
    output = 4 * (target.roll(1, 3) - 0.5) + torch.randn(n, 1, 24, 30, generator=draw)
    return output, target


def plain(output: torch.Tensor, target: torch.Tensor, distance: float) -> float:
    best = 0.0
    for k in range(1, THRESHOLDS + 1):
        found = true = both = 0
        for o, t in zip(output, target, strict=True):
            edges = t[0].numpy() > 0.5
            thin = thinned((o[0].sigmoid() * 255).round().numpy() > 255 * k / (THRESHOLDS + 1))
            found, true = found + thin.sum(), true + edges.sum()
            both += matched(thin, edges, distance=distance * np.hypot(24, 30))
        precision, recall = both / max(found, 1), both / true
        best = max(best, 2 * precision * recall / max(precision + recall, 1e-12))
    return 100 * best


@pytest.mark.parametrize("distance", [0.0, 0.03])
def test_it_equals_a_plain_reckoning_however_images_are_batched(distance: float) -> None:
    output, target = images(5)
    expected = plain(output, target, distance)
    parts = []
    for sizes in ([5], [2, 3]):
        metric = EdgeF(distance=distance, thresholds=THRESHOLDS)
        for o, t in zip(output.split(sizes), target.split(sizes), strict=True):
            metric.update(o, t)
        assert float(metric.compute()) == pytest.approx(expected)
        parts.append(metric)
    one, two = (EdgeF(distance=distance, thresholds=THRESHOLDS) for _ in range(2))
    one.update(output[:2], target[:2])
    two.update(output[2:], target[2:])
    one.counts, one.true = one.counts + two.counts, one.true + two.true  # what processes do: states are summed
    assert float(one.compute()) == pytest.approx(expected)


def test_neighbouring_lines_count_only_within_the_distance() -> None:
    _, target = images(1)
    exact = EdgeF(thresholds=3)
    exact.update(20 * (target - 0.5), target)
    assert float(exact.compute()) == 100
    shifted = 20 * (target.roll(2, 3).roll(2, 2) - 0.5)
    near, far = EdgeF(distance=0.1, thresholds=3), EdgeF(distance=0.01, thresholds=3)
    near.update(shifted, target)
    far.update(shifted, target)
    assert float(near.compute()) > 95
    assert float(far.compute()) < 15


def test_ignored_pixels_change_nothing_and_nothing_to_judge_is_nan() -> None:
    output, target = images(2)
    small, padded = EdgeF(thresholds=5), EdgeF(thresholds=5)
    small.update(output, target)
    padded.update(
        torch.nn.functional.pad(output, (0, 9, 0, 4), value=9.0),
        torch.nn.functional.pad(target, (0, 9, 0, 4), value=255),
    )
    assert float(small.compute()) == float(padded.compute())
    empty = EdgeF(thresholds=5)
    empty.update(output, torch.full_like(target, 255))
    assert torch.isnan(empty.compute())
    with pytest.raises(ProblemError, match="distance"):
        EdgeF(distance=2)
