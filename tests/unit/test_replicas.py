"""What processes agree on, in a group of one: values stay what they are, and nothing that was given is changed.

Groups of two and three processes are in `test_parallel.py`.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from reconmtl.errors import ProbeError
from reconmtl.replicas import BUCKET, Replicas, find_replicas, refuse_alone


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def test_means_have_the_shapes_and_leave_the_given_tensors_alone(group: dist.ProcessGroup) -> None:
    given = [
        torch.randn(3, 4),
        torch.zeros(0),
        torch.randn(BUCKET // 4 + 5),
        torch.randn(()),
        torch.randn(2).to_sparse(),
    ]
    before = [t.clone() for t in given]
    found = Replicas(group).means(given)
    for mean, value, old in zip(found, given, before, strict=True):
        assert torch.equal(mean, old.to_dense() if old.is_sparse else old) and mean.shape == value.shape
        assert value.is_sparse or not value.numel() or mean.data_ptr() != value.data_ptr()


def test_gradients_that_nobody_has_stay_none(group: dist.ProcessGroup) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["a"](torch.ones(1, 2)).sum().backward()
    before = [p.grad.clone() for p in model["a"].parameters() if p.grad is not None]
    Replicas(group).average_grads(dict(model.named_parameters()))
    assert all(
        torch.equal(p.grad, g) for p, g in zip(model["a"].parameters(), before, strict=True) if p.grad is not None
    )
    assert all(p.grad is None for p in model["b"].parameters())


def test_agreeing_repeats_what_was_said_and_raises_what_went_wrong(group: dist.ProcessGroup) -> None:
    replicas = Replicas(group)
    for said in ({"a": [1, 2]}, {"a": [1, 2]}, ["b"]):
        assert replicas.agree(said) == [said]
    assert replicas.largest(7) == 7
    replicas.compare(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="mine"):
        replicas.agree([], ValueError("mine"))


def test_one_process_needs_no_replicas_and_is_not_refused(group: dist.ProcessGroup) -> None:
    model = nn.Linear(2, 2)
    assert find_replicas(model) == (model, None)
    assert find_replicas(model, group) == (model, None)
    refuse_alone()
    with pytest.raises(ProbeError, match="group"):
        find_replicas(model, "world")
