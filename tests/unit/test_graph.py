import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from reconmtl.graph import Graph, Shared, many


def _shared(outputs: list[Tensor], model: nn.Module) -> Shared:
    graph = Graph([o.pow(2).sum() for o in outputs])
    leaves = [graph.leaves[id(p)] for p in model.parameters() if many(graph.mask(p))]
    return Shared(graph, leaves)


def test_every_node_comes_before_the_ones_it_depends_on() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    out = model(torch.ones(2, 3))
    graph = Graph([out.sum(), (out * 2).sum()])
    position = {n: i for i, n in enumerate(graph.order)}
    for node in graph.order:
        assert all(position[child] > position[node] for child, _, _ in graph.children[node])
    assert set(graph.masks.values()) == {0b01, 0b10, 0b11}


@pytest.mark.parametrize("limit", [2, 4, 100])
def test_a_chain_is_cut_wherever_memory_asks_for_it(limit: int) -> None:
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(3, 3), nn.Tanh())))
    out = model(torch.ones(2, 3))
    stages = _shared([out, out * 2], model).stages(lambda _: 1, limit)
    held = [len(s.wanted) for s in stages]  # two leaves per layer cost 1 each
    assert held == {2: [2, 2, 2, 2], 4: [4, 4], 100: [8]}[limit]
    assert [len(s.edges) for s in stages] == [1] * (len(stages) - 1) + [0]


@pytest.mark.parametrize("counted", [False, True])
def test_a_cut_is_not_made_where_carrying_the_gradients_across_costs_more(counted: bool) -> None:
    widths = [4, 4, 40, 4, 4]
    model = nn.Sequential(*(m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())))
    out = model(torch.ones(25, 4))
    shared = _shared([out, out * 2], model)

    def boundary(node: Node) -> int:
        return math.prod(node._input_metadata[0].shape) if counted else 0

    stages = shared.stages(lambda node: node.variable.numel(), 190, boundary)  # type: ignore[attr-defined]
    held = [sorted(n.variable.numel() for n in s.wanted) for s in stages]  # type: ignore[attr-defined]
    first, second, third, fourth = [4, 16], [40, 160], [4, 160], [4, 16]
    wide = [[*second, *third]] if counted else []
    expected = [fourth, *wide, first] if counted else [[*fourth, *third], second, first]
    assert held == [sorted(e) for e in expected]


class Skips(nn.Module):
    """A residual block can be cut before and after, never inside; what is tied across cannot be cut either."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(3, 3, bias=False) for _ in range(4))
        if tied:
            self.d.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = x + self.c(torch.tanh(self.b(x)))
        return self.d(torch.tanh(x))  # type: ignore[no-any-return]


def test_no_cut_is_bypassed() -> None:
    for tied, expected in ((False, [1, 2, 1]), (True, [3])):
        model = Skips(tied=tied)
        out = model(torch.ones(2, 3))
        stages = _shared([out, out * 2], model).stages(lambda _: 1, 0)
        assert [len(s.wanted) for s in stages] == expected


def test_a_head_that_taps_two_depths_is_not_cut_off() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    x = model[0](torch.ones(2, 3))
    y = model[1](x)
    shared = _shared([y * 2, torch.cat([x, y]) * 2, y * 3], model)
    assert [head is None for head in shared.heads] == [False, True, False]
