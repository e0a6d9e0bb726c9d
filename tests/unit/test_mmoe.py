"""Mixture of experts: sizes, its function by hand, gates with their own learning rate, a plan on the experts."""

from functools import partial

import pytest
import torch
from torch import nn

from reconmtl.errors import ProblemError
from reconmtl.networks import resnet
from reconmtl.networks.mmoe import MMoE, gates_slower, mmoe
from reconmtl.plan import Plan
from reconmtl.probing import Probe
from reconmtl.splitting import split

TASKS = ("digit", "fashion")


def test_two_experts_have_the_published_size() -> None:
    model = mmoe(resnet.multifashion, torch.zeros(1, 1, 36, 36))
    assert round(sum(p.numel() for p in model.parameters()) * 4 / 2**20, 2) == 85.62
    assert sum(p.numel() for n, p in model.named_parameters() if n.startswith("gates.")) == 2 * (2 + 2)


def test_outputs_are_heads_of_mixed_expert_features() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 1, 36, 36)
    model = mmoe(partial(resnet.multifashion, width=2), x, experts=3)
    out = model(x)
    experts = [e(x) for e in model.experts]
    for task in TASKS:
        gate, head = model.gates[task], model.heads[task]
        for i in range(len(x)):
            weights = torch.softmax(gate(x[i].mean().reshape(1)), 0)
            mixed = sum(float(w) * e[i] for w, e in zip(weights.detach(), experts, strict=True))
            torch.testing.assert_close(out[task][i], head(mixed))


def test_one_expert_is_the_joint_network_and_maps_are_mixed_like_vectors() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.heads = nn.Conv2d(2, 3, 1), nn.ModuleDict({"a": nn.Conv2d(3, 1, 1)})

        def pieces(self) -> object:
            from reconmtl.networks.pieces import Pieces

            return Pieces([self.trunk], dict(self.heads.items()))

    dense = Dense()
    x = torch.rand(2, 2, 4, 4)
    model = mmoe(lambda: dense, x, experts=1)
    torch.testing.assert_close(model(x)["a"], dense.heads["a"](dense.trunk(x)))
    flat = mmoe(partial(_vectors, 3), torch.rand(4, 3), experts=2)
    assert flat(torch.rand(4, 3))["a"].shape == (4, 1)


def _vectors(inputs: int) -> nn.Module:
    from reconmtl.networks.pieces import Pieces

    class Vectors(nn.Module):
        def pieces(self) -> Pieces:
            return Pieces([nn.Linear(inputs, 5)], {"a": nn.Linear(5, 1)})

    return Vectors()


def test_gates_get_their_own_learning_rate_and_every_parameter_is_in_a_group() -> None:
    model = mmoe(partial(resnet.multifashion, width=2), torch.zeros(1, 1, 36, 36))
    groups = gates_slower(model, lr=1e-3)
    assert groups[1]["lr"] == 1e-3 and len(groups[1]["params"]) == 4
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert len(gates_slower(nn.Linear(1, 1), lr=1e-3)) == 1


def test_conflicts_are_searched_on_the_experts_and_split_there() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 1, 36, 36)
    model = mmoe(partial(resnet.multifashion, width=2), x)
    probe = Probe(model)
    probe.backward({t: o.square().mean() for t, o in model(x).items()})
    assert len(probe.log.layers) == 2 * 41
    assert all(n.startswith("experts.") for n in probe.log.layers)
    plan = Plan(tasks=TASKS, layers=[probe.log.layers[0], probe.log.layers[50]])
    model.eval()
    expected, outputs = model(x), split(model, plan).eval()(x)
    for task in TASKS:
        torch.testing.assert_close(outputs[task], expected[task])


def test_a_number_of_experts_that_is_none_is_refused() -> None:
    with pytest.raises(ProblemError, match="experts = 0"):
        MMoE(resnet.multifashion, experts=0)
