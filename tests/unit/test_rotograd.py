import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import reconmtl as rm
from reconmtl.errors import ProbeError, ProblemError, RunError
from reconmtl.networks import resnet, segnet
from reconmtl.networks.pieces import Pieces
from reconmtl.probing import Probe
from reconmtl.rotograd import BURN_IN, Rotated, RotoGrad, rotated, rotations_slower

TASKS = ("a", "b")
FEATURES, SIZE = 7, 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, FEATURES))
        self.heads = nn.ModuleDict({t: nn.Linear(FEATURES, 2) for t in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        return {t: head(z) for t, head in self.heads.items()}

    def pieces(self) -> Pieces:
        return Pieces([self.trunk], dict(self.heads.items()))


def network(size: int = SIZE) -> nn.Module:
    torch.manual_seed(1)
    return rotated(Net().double(), size).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=draw).double(), torch.randn(2, 6, 2, generator=draw).double()


def losses(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    x, y = batch(seed)
    out = model(x)
    return {t: (out[t] - (1 + 3 * i) * y[i]).pow(2).mean() for i, t in enumerate(TASKS)}


def rotations(model: nn.Module) -> dict[str, Rotated]:
    heads = cast(nn.ModuleDict, model.heads)
    return {t: cast(Rotated, heads[t]) for t in TASKS}


def slow_step(
    model: Any, seed: int, first: list[float] | None, *, scale: bool
) -> tuple[dict[str, Tensor], list[float]]:
    """The published step on a network without a plan, by whole-matrix formulas; returns gradients and lengths."""
    x, y = batch(seed)
    z = model.trunk(x)
    turn = {t: h.turn().detach() for t, h in rotations(model).items()}
    at_z: list[Tensor] = []
    at_r: list[Tensor] = []
    found: dict[str, Tensor] = {}
    for i, (t, h) in enumerate(rotations(model).items()):
        whole = torch.block_diag(turn[t], torch.eye(FEATURES - SIZE).double())
        r = (z.detach() @ whole.T).requires_grad_()
        loss = (h.head(r) - (1 + 3 * i) * y[i]).pow(2).mean()
        g, *own = torch.autograd.grad(loss, [r, *h.head.parameters()])
        found |= {f"heads.{t}.head.{n}": v for (n, _), v in zip(h.head.named_parameters(), own, strict=True)}
        at_r.append(g[:, :SIZE])
        at_z.append(g @ whole)
    lengths = [float(g.norm()) for g in at_z]
    mean = torch.stack(at_z).mean(0)
    aim = torch.stack([g / n * mean.norm() for g, n in zip(at_z, lengths, strict=True)]).mean(0)[:, :SIZE]
    for i, h in enumerate(rotations(model).values()):
        direction = sum((h.turn() @ v - g).pow(2).sum() for v, g in zip(aim, at_r[i], strict=True))
        parameter = next(iter(h.rotation.parameters()))
        name = next(n for n, p in model.named_parameters() if p is parameter)
        found[name] = torch.autograd.grad(cast(Tensor, direction) / len(aim), parameter)[0]
    factors = [1.0] * len(at_z)
    if scale:
        progress = [n / f for n, f in zip(lengths, first or lengths, strict=True)]
        common = sum(p / sum(progress) * n for p, n in zip(progress, lengths, strict=True))
        factors = [common / n for n in lengths]
    total = sum(g * f for g, f in zip(at_z, factors, strict=True))
    trunk = dict(model.trunk.named_parameters())
    grads = torch.autograd.grad(z, list(trunk.values()), cast(Tensor, total))
    return found | {f"trunk.{n}": g for n, g in zip(trunk, grads, strict=True)}, lengths


@pytest.mark.parametrize("scale", [True, False])
def test_a_training_is_the_published_one(scale: bool) -> None:
    """Across the step at which first lengths are taken anew; some features are not rotated."""
    model = network()
    probe = Probe(model, balancer=RotoGrad(model, TASKS, scale=scale), every=3)
    optimizer = torch.optim.SGD(rotations_slower(model, lr=0.01), lr=0.05)
    first: list[float] | None = None
    for step in range(BURN_IN + 3):
        expected, lengths = slow_step(model, step, first, scale=scale)
        if step in (0, BURN_IN):
            first = lengths
            expected, _ = slow_step(model, step, first, scale=scale)
        optimizer.zero_grad()
        probe.backward(losses(model, step))
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-12, msg=f"{name}, {step}")
        optimizer.step()
    for head in rotations(model).values():
        turn = head.turn().detach()
        torch.testing.assert_close(turn @ turn.T, torch.eye(SIZE).double(), atol=1e-6, rtol=0.0)
        assert float(torch.linalg.det(turn)) == pytest.approx(1.0)
    assert probe.log.steps == (BURN_IN + 5) // 3


def test_each_branch_gets_its_own_scaled_gradient() -> None:
    """With a plan, task k's copies get its scaled gradient at z_k, and the direction is the mean over branches."""
    model = network()
    x, _ = batch(0)
    branched = rm.split(model, rm.Plan(tasks=TASKS, layers=["trunk.2"]), sample=x)
    roto = RotoGrad(branched, TASKS)
    roto.first = torch.tensor([1.0, 3.0]).double()
    Probe(branched, balancer=roto).backward(losses(branched))
    got = {n: p.grad for n, p in branched.named_parameters()}
    plain = RotoGrad(model, TASKS)
    plain.first = torch.tensor([1.0, 3.0]).double()
    Probe(model, balancer=plain).backward(losses(model))
    copies = [n for n in got if n.startswith("trunk.2") and n.endswith("weight")]
    assert len(copies) == 2
    # at the start all z_k are equal, so the copies' gradients add up to the joint network's, and the rest is the same
    joint = {n: p.grad for n, p in model.named_parameters()}
    torch.testing.assert_close(sum(cast(Tensor, got[n]) for n in copies), joint["trunk.2.weight"])
    torch.testing.assert_close(got["trunk.0.weight"], joint["trunk.0.weight"])
    turned = [n for n in joint if "parametrizations" in n]
    assert turned
    for n in turned:
        torch.testing.assert_close(next(g for m, g in got.items() if m.endswith(n)), joint[n])
    # and each is its own task's, scaled
    own = {}
    for t, loss in losses(model).items():
        own[t] = torch.autograd.grad(loss, model.get_parameter("trunk.2.weight"), retain_graph=True)[0]
    for t, n in zip(TASKS, sorted(copies), strict=True):
        alike = torch.cosine_similarity(cast(Tensor, got[n]).flatten(), own[t].flatten(), dim=0)
        assert float(alike) == pytest.approx(1.0)


def test_its_state_goes_on_and_what_cannot_be_is_refused() -> None:
    model = network()
    roto = RotoGrad(model, TASKS)
    probe = Probe(model, balancer=roto)
    for seed in range(3):
        probe.backward(losses(model, seed))
    other = RotoGrad(model, TASKS)
    other.load_state_dict(roto.state_dict())
    assert other.step == 3
    assert torch.equal(cast(Tensor, other.first), cast(Tensor, roto.first))
    with pytest.raises(RunError, match="another balancer"):
        RotoGrad(model, TASKS, scale=False).load_state_dict(roto.state_dict())
    with pytest.raises(ProbeError, match="all tasks"):
        probe.backward({"a": losses(model)["a"]})
    with pytest.raises(ProbeError, match="RotoGrad works on gradients where the shared part"):
        probe.backward(losses(model), last=False)
    with pytest.raises(ProblemError, match="does not say what it is made of"):
        rotated(nn.Linear(2, 2), 2)
    with pytest.raises(ProblemError, match="9, but there are 7"):
        losses(network(9))
    with pytest.raises(ProblemError, match="expected 2 heads"):
        RotoGrad(Net(), TASKS)


def test_rotations_are_uniform_and_add_m_squared_parameters() -> None:
    model, plain = rotated(resnet.multifashion(width=4), 100), resnet.multifashion(width=4)
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == 2 * 100 * 100
    turn = cast(Rotated, cast(nn.ModuleDict, model.heads)["digit"]).turn()
    assert float(turn.detach().diagonal().mean().abs()) < 3 / math.sqrt(100)  # far from the identity


@pytest.mark.slow
def test_size_on_segnet_is_the_papers() -> None:
    model = rotated(segnet.cityscapes(), 1024)
    assert sum(p.numel() for p in model.parameters()) * 4 / 2**20 == pytest.approx(103.43, abs=0.005)
