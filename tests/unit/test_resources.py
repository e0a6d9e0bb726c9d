"""Expected numbers of groups against enumeration of every joint draw of all tasks in all blocks."""

import itertools

import pytest
import torch
from torch import Tensor

from reconmtl.errors import ProblemError
from reconmtl.networks.resources import canonical, expected_groups, partitions, published_groups, refine


def random_p(blocks: int, tasks: int, candidates: int | None = None, *, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(blocks, tasks, candidates or tasks, generator=draw, dtype=torch.float64).mul(1.5).softmax(2)


def enumerated(p: Tensor) -> Tensor:
    """Over every assignment of a candidate to every task in every block."""
    blocks, tasks, candidates = p.shape
    total = torch.zeros(blocks, dtype=p.dtype)
    for flat in itertools.product(range(candidates), repeat=blocks * tasks):
        paths = [flat[t * blocks : (t + 1) * blocks] for t in range(tasks)]
        probability = torch.ones((), dtype=p.dtype)
        for t, path in enumerate(paths):
            for block, choice in enumerate(path):
                probability = probability * p[block, t, choice]
        groups = [len({path[: block + 1] for path in paths}) for block in range(blocks)]
        total = total + probability * torch.tensor(groups)
    return total


def tangent(gradient: Tensor) -> Tensor:
    """Without what a change of a row's sum would do: probabilities sum to 1."""
    return gradient - gradient.mean(2, keepdim=True)


@pytest.mark.parametrize(("blocks", "tasks"), [(3, 2), (2, 3), (1, 4), (1, 5)])
def test_the_exact_form_is_enumeration_and_so_is_its_gradient(blocks: int, tasks: int) -> None:
    p = random_p(blocks, tasks).requires_grad_()
    found, error = expected_groups(p)
    slow = enumerated(p)
    torch.testing.assert_close(found, slow, rtol=1e-10, atol=0)
    assert not error.any()
    weights = torch.arange(1.0, blocks + 1, dtype=p.dtype)
    (mine,), (theirs,) = (torch.autograd.grad((x * weights).sum(), p) for x in (found, slow))
    torch.testing.assert_close(tangent(mine), tangent(theirs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("blocks", "tasks"), [(3, 2), (4, 4), (5, 5)])
def test_the_sampled_form_is_unbiased_and_its_standard_error_holds(blocks: int, tasks: int) -> None:
    p = random_p(blocks, tasks, seed=1).requires_grad_()
    exact, _ = expected_groups(p)
    draw = torch.Generator().manual_seed(2)
    estimates, errors = zip(*(expected_groups(p, samples=50, generator=draw) for _ in range(300)), strict=True)
    each, stated = torch.stack(estimates), torch.stack(errors)
    spread = each.detach().std(0)
    assert ((each.detach().mean(0) - exact.detach()).abs() < 4 * spread / 300**0.5 + 1e-9).all()
    torch.testing.assert_close(stated.square().mean(0).sqrt(), spread, rtol=0.2, atol=1e-6)
    (mean,) = torch.autograd.grad(each.sum(1).mean(), p, retain_graph=True)
    (true,) = torch.autograd.grad(exact.sum(), p)
    assert float((tangent(mean) - tangent(true)).norm() / tangent(true).norm()) < 0.1


def test_forty_tasks_have_a_number_and_a_gradient() -> None:
    p = random_p(9, 40).requires_grad_()
    value, error = expected_groups(p, generator=torch.Generator().manual_seed(0))
    assert ((value > 1) & (value <= 40 + 4 * error)).all()
    assert (value.detach().diff() > -4 * error[1:]).all()  # groups only ever divide
    (gradient,) = torch.autograd.grad(value.sum(), p)
    assert gradient.isfinite().all() and gradient.any()


def test_certain_draws_give_whole_numbers_in_every_form() -> None:
    one = torch.zeros(3, 4, 4)
    one[:, :, 2] = 1
    apart = torch.eye(4).expand(3, 4, 4)
    for p, groups in ((one, 1.0), (apart, 4.0)):
        for value in (expected_groups(p)[0], expected_groups(p, samples=3)[0], published_groups(p)):
            assert value.tolist() == [groups] * 3


def test_the_published_form_counts_what_does_not_refine_as_all_separate() -> None:
    p = random_p(3, 3)
    known = partitions(3)
    now = {canonical((0, 0, 0)): 1.0}
    for block, value in enumerate(published_groups(p)):
        new = dict.fromkeys(known, 0.0)
        for part in known:
            for labels in itertools.product(range(3), repeat=3):
                if canonical(labels) == part:
                    chance = float(torch.stack([p[block, t, i] for t, i in enumerate(labels)]).prod())
                    new[part] += chance * sum(q for parent, q in now.items() if refine(parent, part) == part)
        new[(0, 1, 2)] = 1 - sum(q for part, q in new.items() if part != (0, 1, 2))
        assert float(value) == pytest.approx(sum(q * (max(part) + 1) for part, q in new.items()))
        now = new
    first = published_groups(p)[0]
    torch.testing.assert_close(first, expected_groups(p)[0][0])
    assert (published_groups(p)[1:] > expected_groups(p)[0][1:]).all()
    with pytest.raises(ProblemError, match=r"6\^6"):
        published_groups(random_p(1, 6))
    with pytest.raises(ProblemError, match=r"\[2, 2\]"):
        expected_groups(torch.zeros(2, 2))
