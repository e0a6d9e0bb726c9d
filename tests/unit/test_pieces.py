"""Networks taken apart: the pieces put together again are the network."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from reconmtl.errors import ProblemError
from reconmtl.networks import mtan, resnet, segnet
from reconmtl.networks.pieces import Stages, take_apart

NETWORKS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (partial(resnet.multifashion, width=2), (2, 1, 36, 36)),
    (partial(resnet.celeba, width=2), (2, 3, 64, 64)),
    (partial(segnet.nyuv2, width=2), (2, 3, 33, 40)),
]


@pytest.mark.parametrize(("make", "shape"), NETWORKS)
def test_pieces_in_order_are_the_network(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.rand(shape)
    expected = copy.deepcopy(model)(x)
    pieces = take_apart(model)
    shared = Stages(*pieces.stages)(x)
    assert set(pieces.heads) == set(expected)
    for task, head in pieces.heads.items():
        assert torch.equal(head(shared), expected[task])
    owned = {id(p) for m in (*pieces.stages, *pieces.heads.values()) for p in m.parameters()}
    assert owned == {id(p) for p in model.parameters()}


def test_networks_that_cannot_be_taken_apart_say_so() -> None:
    with pytest.raises(ProblemError, match=r"Linear does not say.*pieces"):
        take_apart(nn.Linear(1, 1))
    with pytest.raises(ProblemError, match="path of its own"):
        take_apart(mtan.nyuv2(width=1))
