"""Losses of dense tasks against pixel loops, at the edges where published code is wrong or NaN."""

import math

import pytest
import torch
from torch import Tensor

from reconmtl.errors import ProblemError
from reconmtl.losses import balanced_bce, cross_entropy, depth_l1, normal_cosine, normal_l1


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1)


def pixels(x: Tensor) -> list[list[float]]:
    """The channels of every pixel."""
    return x.movedim(1, -1).flatten(0, -2).double().tolist()


def test_losses_equal_loops_over_pixels() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 3, 5), torch.randint(-1, 4, (2, 3, 5))
    each = []
    for scores, label in zip(pixels(logits), labels.flatten().tolist(), strict=True):
        if label >= 0:
            each.append(math.log(sum(math.exp(s) for s in scores)) - scores[label])
    assert float(cross_entropy(logits, labels)) == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert torch.equal(cross_entropy(logits, labels), cross_entropy(logits, labels[:, None].float()))

    depth, true = torch.rand(2, 1, 3, 5), torch.rand(2, 1, 3, 5) * torch.randint(0, 2, (2, 1, 3, 5))
    errors = [abs(p[0] - g[0]) for p, g in zip(pixels(depth), pixels(true), strict=True) if g[0] != 0]
    assert float(depth_l1(depth, true)) == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert torch.equal(depth_l1(depth, true), depth_l1(depth, true[:, 0]))

    normal, truth = unit(torch.randn(2, 3, 3, 5)), unit(torch.randn(2, 3, 3, 5))
    truth *= torch.randint(0, 2, (2, 1, 3, 5))
    dots = [sum(a * b for a, b in zip(p, g, strict=True)) for p, g in zip(pixels(normal), pixels(truth), strict=True)]
    known = [d for d, g in zip(dots, pixels(truth), strict=True) if any(g)]
    assert float(normal_cosine(normal, truth)) == pytest.approx(1 - sum(known) / len(known), rel=1e-5)
    gaps = [abs(a - b) for p, g in zip(pixels(normal), pixels(truth), strict=True) if any(g) for a, b in zip(p, g)]  # noqa: B905
    assert float(normal_l1(normal, truth)) == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)
    marked = torch.where((truth != 0).any(1, keepdim=True), truth, 255.0)
    assert float(normal_l1(normal, marked)) == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)


@pytest.mark.parametrize("positive", [None, 0.95])
def test_balanced_cross_entropy_equals_a_loop(positive: float | None) -> None:
    torch.manual_seed(1)
    output, target = torch.randn(2, 1, 4, 4), torch.tensor([0.0, 0.0, 1.0, 255.0])[torch.randint(0, 4, (2, 4, 4))]
    pairs = [
        (o, t) for o, t in zip(output.flatten().tolist(), target.flatten().tolist(), strict=True) if t in (0.0, 1.0)
    ]
    weight = sum(1 - t for _, t in pairs) / len(pairs) if positive is None else positive
    total = sum(
        weight * math.log(1 + math.exp(-o)) if t else (1 - weight) * math.log(1 + math.exp(o)) for o, t in pairs
    )
    assert float(balanced_bce(output, target, positive=positive)) == pytest.approx(total / len(pairs), rel=1e-5)


def test_a_batch_without_any_valid_pixel_costs_nothing_and_has_gradients_of_zero() -> None:
    for loss, channels, target in (
        (cross_entropy, 4, torch.full((2, 3, 3), -1)),
        (depth_l1, 1, torch.zeros(2, 1, 3, 3)),
        (normal_cosine, 3, torch.zeros(2, 3, 3, 3)),
        (normal_l1, 3, torch.full((2, 3, 3, 3), 255.0)),
        (balanced_bce, 1, torch.full((2, 1, 3, 3), 255.0)),
    ):
        output = torch.randn(2, channels, 3, 3, requires_grad=True)
        value = loss(output, target)
        value.backward()
        assert float(value.detach()) == 0, loss
        assert output.grad is not None and not output.grad.any(), loss


def test_a_genuine_normal_whose_components_cancel_counts_unless_the_paper_is_followed() -> None:
    target = torch.zeros(1, 3, 1, 2)
    target[0, :, 0, 0] = torch.tensor([1.0, -1.0, 0.0]) / 2**0.5  # its components add up to 0
    target[0, :, 0, 1] = torch.tensor([0.0, 0.0, 1.0])
    output = torch.zeros(1, 3, 1, 2)
    output[:, 2] = 1
    assert float(normal_cosine(output, target)) == pytest.approx(0.5)
    assert float(normal_cosine(output, target, paper=True)) == pytest.approx(0.0)


def test_shapes_that_would_broadcast_and_weights_that_are_none_are_refused() -> None:
    with pytest.raises(ProblemError, match=r"\[2, 1, 3, 4\].*\[1, 1, 3, 4\]"):
        depth_l1(torch.rand(2, 1, 3, 4), torch.rand(1, 1, 3, 4))
    with pytest.raises(ProblemError, match="from 0 to 1"):
        balanced_bce(torch.rand(2, 1, 3, 4), torch.rand(2, 1, 3, 4), positive=2)
