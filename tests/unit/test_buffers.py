import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reconmtl.buffers import buffers_once, undisturbed


def test_only_the_first_pass_changes_running_statistics() -> None:
    norm = nn.BatchNorm1d(3)
    settle = buffers_once(norm)
    assert norm.running_mean is not None
    norm(torch.randn(4, 3) + 5)
    settle()
    once = norm.running_mean.clone()
    norm(torch.randn(4, 3) - 9)
    settle()
    assert torch.equal(norm.running_mean, once)
    assert int(norm.num_batches_tracked or 0) == 1


class Counting(nn.Module):
    """One buffer is changed in place, one is replaced."""

    changed: Tensor
    replaced: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("changed", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("later", None)

    def forward(self, x: Tensor) -> Tensor:
        self.changed += x
        self.replaced = self.replaced + x
        self.later = x
        return x


def test_replaced_buffers_change_once_too() -> None:
    model = Counting()
    settle = buffers_once(model)
    for value in (1.0, 5.0, 7.0):
        model(torch.full((2,), value))
        settle()
        assert [float(b.sum()) for b in model.buffers()] == [2.0, 2.0, 2.0]


def test_undisturbed_puts_everything_back_even_after_an_exception() -> None:
    model = nn.Sequential(Counting(), nn.Dropout())
    model(torch.ones(2))
    buffers = dict(model.named_buffers())
    values = {n: b.clone() for n, b in buffers.items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        model.eval()
        model(torch.full((2,), 3.0))
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        raise ZeroDivisionError
    assert model[1].training
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]
        assert torch.equal(buffer, values[name])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
