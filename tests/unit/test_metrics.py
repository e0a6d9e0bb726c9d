"""Metrics of dense tasks against slow per-image code: any batching, the edges, and torchmetrics where it coincides."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassJaccardIndex

from reconmtl.errors import ProblemError
from reconmtl.metrics import (
    DepthError,
    MeanIoU,
    NormalError,
    PixelAccuracy,
    Saliency,
)

N, H, W, CLASSES = 7, 6, 5, 4


def data(channels: int, seed: int = 0) -> Tensor:
    return torch.randn(N, channels, H, W, generator=torch.Generator().manual_seed(seed))


def labels() -> Tensor:
    found = torch.randint(-1, CLASSES, (N, H, W), generator=torch.Generator().manual_seed(1))
    found[2] = -1
    return found


def depths() -> Tensor:
    found = data(1, 2).abs() * (data(1, 3) > 0)
    found[3] = 0
    return found


def normals() -> Tensor:
    found = data(3, 4)
    found = found / found.norm(dim=1, keepdim=True) * (data(1, 5) > -0.5)
    found[1] = 0
    return found  # type: ignore[no-any-return]


def masks() -> Tensor:
    found = (data(1, 6) > 0.5).float()
    found[4] = 0  # nothing salient
    found[5] = 255
    found[0, 0, :2] = 255
    return found


def run(make: Callable[[], Metric], output: Tensor, target: Tensor, sizes: list[int]) -> float:
    metric = make()
    for o, t in zip(output.split(sizes), target.split(sizes), strict=True):
        metric.update(o, t)
    return float(metric.compute())


def confusion() -> np.ndarray:
    matrix = np.zeros((CLASSES, CLASSES))
    for p, g in zip(data(CLASSES).argmax(1).flatten().tolist(), labels().flatten().tolist(), strict=True):
        if g >= 0:
            matrix[g, p] += 1
    return matrix


def mean_iou() -> float:
    m = confusion()
    return float(100 * np.mean([m[c, c] / (m[c].sum() + m[:, c].sum() - m[c, c]) for c in range(CLASSES)]))


def per_image(error: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor, pool: str) -> float:
    found = []
    for o, t in zip(output.double(), target.double(), strict=True):
        known = (t != 0).any(0)
        values = error(o, t)[known]
        if len(values):
            found.append(values)
    if pool == "pixel":
        return float(torch.cat(found).mean())
    return float(torch.stack([v.mean() for v in found]).mean())


def angle(o: Tensor, t: Tensor) -> Tensor:
    cosine = (o * t).sum(0) / (o.norm(dim=0) * t.norm(dim=0))
    return torch.rad2deg(cosine.clamp(-1, 1).arccos())


def median_angle(pool: str) -> float:
    each = []
    for o, t in zip(data(3).double(), normals().double(), strict=True):
        values = angle(o, t)[(t != 0).any(0)]
        if len(values):
            each.append(values)
    return float(torch.cat(each).median() if pool == "pixel" else torch.stack([v.median() for v in each]).mean())


def saliency(kind: str) -> float:
    best = 0.0
    for threshold in np.linspace(0.2, 0.9, 15, dtype=np.float32):
        rows = []
        for o, t in zip(data(1), masks(), strict=True):
            known = t != 255
            if not known.any():
                continue
            found, true = (o.sigmoid() > threshold)[known], (t == 1)[known]
            both, union = int((found & true).sum()), int((found | true).sum())
            rows.append(
                (
                    both / union if union else 1.0,
                    both / int(found.sum()) if found.any() else float(not true.any()),
                    both / int(true.sum()) if true.any() else 1.0,
                )
            )
        iou, p, r = (float(np.mean(column)) for column in zip(*rows, strict=True))
        best = max(best, iou if kind == "mIoU" else 2 * p * r / (p + r))
    return 100 * best


CASES: dict[
    str, tuple[Callable[[], Metric], Callable[[], Tensor], Callable[[], Tensor], Callable[[], float], float]
] = {
    "mIoU": (partial(MeanIoU, CLASSES), partial(data, CLASSES), labels, mean_iou, 1e-9),
    "pixel accuracy": (
        partial(PixelAccuracy, CLASSES),
        partial(data, CLASSES),
        labels,
        lambda: float(100 * np.trace(confusion()) / confusion().sum()),
        1e-9,
    ),
    **{
        f"{kind} depth, {pool}": (
            partial(DepthError, kind, pool=pool),
            partial(data, 1),
            depths,
            partial(
                per_image,
                (lambda o, t: (o - t).abs()[0]) if kind == "abs" else (lambda o, t: ((o - t).abs() / t)[0]),
                data(1),
                depths(),
                pool,
            ),
            1e-6,
        )
        for kind in ("abs", "rel")
        for pool in ("image", "pixel")
    },
    **{
        f"mean angle, {pool}": (
            partial(NormalError, "mean", pool=pool),
            partial(data, 3),
            normals,
            partial(per_image, angle, data(3), normals(), pool),
            1e-6,
        )
        for pool in ("image", "pixel")
    },
    **{
        f"within 30, {pool}": (
            partial(NormalError, 30, pool=pool),
            partial(data, 3),
            normals,
            partial(per_image, lambda o, t: 100.0 * (angle(o, t) < 30).double(), data(3), normals(), pool),
            1e-9,
        )
        for pool in ("image", "pixel")
    },
    "median angle, image": (
        partial(NormalError, "median"),
        partial(data, 3),
        normals,
        lambda: median_angle("image"),
        1e-6,
    ),
    "median angle, pixel": (
        partial(NormalError, "median", pool="pixel"),
        partial(data, 3),
        normals,
        lambda: median_angle("pixel"),
        1e-4,
    ),
    **{
        f"saliency {kind}": (partial(Saliency, kind), partial(data, 1), masks, partial(saliency, kind), 1e-6)
        for kind in ("mIoU", "maxF")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_metrics_equal_slow_code_for_any_batching(name: str) -> None:
    make, output, target, oracle, tolerance = CASES[name]
    expected = oracle()
    assert math.isfinite(expected)
    for sizes in ([N], [1] * N, [3, 1, 3]):
        assert run(make, output(), target(), sizes) == pytest.approx(expected, rel=tolerance), sizes


@pytest.mark.parametrize("name", CASES)
def test_states_of_two_processes_add_up(name: str) -> None:
    """What torchmetrics reduces over processes is summed, so summing by hand must give the whole."""
    make, output, target, oracle, tolerance = CASES[name]
    whole, parts = make(), [make(), make()]
    for part, o, t in zip(parts, output().split([4, 3]), target().split([4, 3]), strict=True):
        part.update(o, t)
    for state, reduce in whole._reductions.items():
        assert reduce is not None
        total = reduce(torch.stack([getattr(p, state) for p in parts]))  # type: ignore[operator]
        setattr(whole, state, total)
    whole._update_count = 1
    assert float(whole.compute()) == pytest.approx(oracle(), rel=tolerance)


def test_mean_iou_is_torchmetrics_where_every_class_occurs_and_not_where_one_is_absent() -> None:
    output, target = data(CLASSES), labels()
    theirs = MulticlassJaccardIndex(CLASSES, ignore_index=-1)
    assert run(partial(MeanIoU, CLASSES), output, target, [N]) == pytest.approx(100 * float(theirs(output, target)))
    more = torch.cat([output, torch.full((N, 1, H, W), -9.0)], 1)  # a fifth class that occurs nowhere
    assert run(partial(MeanIoU, CLASSES + 1), more, target, [N]) == pytest.approx(mean_iou())
    zero = partial(MeanIoU, CLASSES + 1, absent="zero")
    assert run(zero, more, target, [N]) == pytest.approx(mean_iou() * CLASSES / (CLASSES + 1))


def test_labels_that_are_no_class_do_not_count() -> None:
    target = labels()
    marked = torch.where(target == -1, 255, target)
    for kind in (MeanIoU, PixelAccuracy):
        expected = run(partial(kind, CLASSES), data(CLASSES), target, [N])
        assert run(partial(kind, CLASSES), data(CLASSES), marked, [N]) == expected
        assert run(partial(kind, CLASSES, ignore=255), data(CLASSES), marked.float(), [N]) == expected


def test_nothing_valid_is_not_a_number_and_not_a_perfect_score() -> None:
    assert math.isnan(run(partial(MeanIoU, CLASSES), data(CLASSES), torch.full((N, H, W), -1), [N]))
    assert math.isnan(run(partial(PixelAccuracy, CLASSES), data(CLASSES), torch.full((N, H, W), -1), [N]))
    assert math.isnan(run(DepthError, data(1), torch.zeros(N, 1, H, W), [N]))
    for pool in ("image", "pixel"):
        for kind in ("mean", "median", 30):
            make = partial(NormalError, kind, pool=pool)
            assert math.isnan(run(make, data(3), torch.zeros(N, 3, H, W), [N]))
    assert math.isnan(run(Saliency, data(1), torch.full((N, 1, H, W), 255.0), [N]))


def test_the_published_mask_drops_genuine_normals_whose_components_cancel() -> None:
    target = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]).T.reshape(1, 3, 1, 2)
    output = torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 1, 2)
    assert run(NormalError, output, target, [1]) == pytest.approx(45.0)
    assert run(partial(NormalError, paper=True), output, target, [1]) == pytest.approx(0.0)
    marked = torch.cat([target, torch.full((1, 3, 1, 1), 255.0)], 3)
    more = output[..., :1].expand(1, 3, 1, 3)
    assert run(partial(NormalError, ignore=255.0), more, marked, [1]) == pytest.approx(45.0)


def test_unknown_kinds_are_refused() -> None:
    for make in (
        partial(DepthError, "rmse"),  # type: ignore[arg-type]
        partial(DepthError, pool="batch"),  # type: ignore[arg-type]
        partial(NormalError, "max"),  # type: ignore[arg-type]
        partial(NormalError, 200.0),
        partial(Saliency, "F"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ProblemError, match="expected"):
            make()
