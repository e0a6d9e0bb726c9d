"""The probe on every network of the zoo, split and unsplit, against a slow oracle and plain backward passes."""

import copy
import random
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reconmtl.errors import ProbeError
from reconmtl.layers import find_layers
from reconmtl.plan import Plan
from reconmtl.probing import Engine, Probe
from reconmtl.splitting import split
from reconmtl.splitting.structure import tensors, transform
from zoo import LIBRARY, NETS, TASKS, ZOO


def _losses(outputs: Any) -> dict[str, Tensor]:
    """A different loss per task; a trunk's only output serves all of them."""
    keyed = outputs if isinstance(outputs, dict) and set(TASKS) <= set(outputs) else None
    losses = {}
    for i, task in enumerate(TASKS):
        value = keyed[task] if keyed is not None else getattr(outputs, task, outputs)
        parts = [_distance(t, i) for t in tensors(value) if t.requires_grad]
        losses[task] = torch.stack(parts).sum()
    return losses


def _distance(output: Tensor, i: int) -> Tensor:
    """Mean squared distance from a ramp that depends on the task."""
    ramp = torch.linspace(-1, i + 1, output.numel(), dtype=torch.float64).view(output.shape)
    return (output - ramp).abs().square().mean()


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETS[name].make(TASKS).double()
    for p in model.parameters():
        if p.is_complex():  # `double` leaves these alone
            p.data = p.data.to(torch.cdouble)
    return model


def _same(value: Tensor) -> Tensor:
    return value


def _run(model: nn.Module, name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    net, to = NETS[name], _double if dtype == torch.float64 else _same
    torch.manual_seed(5)
    return _losses(model(*transform(net.inputs(), to), **transform(net.keywords(), to)))


def _check(model: nn.Module, name: str, engine: Engine = "auto") -> None:
    twin = copy.deepcopy(model)
    losses = _run(model, name)
    probe = Probe(model, engine=engine)
    assert probe.check(losses) < 1e-10
    probe.backward(losses)
    plain = _run(twin, name)
    torch.stack(list(plain.values())).sum().backward()
    whole = max(float(p.grad.norm()) for p in twin.parameters() if p.grad is not None)
    for (key, p), q in zip(twin.named_parameters(), model.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None), key
        if p.grad is not None and q[1].grad is not None:
            difference = (p.grad.to_dense() - q[1].grad.to_dense()).norm()
            assert difference <= 1e-10 * p.grad.to_dense().norm() + 1e-13 * whole, key
    for (key, b), (_, c) in zip(twin.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(b, c), key


NETWORKS = list(ZOO)


@pytest.mark.parametrize(("engine", "training"), [("flat", True), ("delta", True), ("auto", False)])
@pytest.mark.parametrize("name", NETWORKS)
def test_unsplit(name: str, engine: Engine, training: bool) -> None:
    _check(_make(name).train(training), name, engine)


@pytest.mark.parametrize("engine", ["flat", "delta"])
@pytest.mark.parametrize("name", NETWORKS)
def test_cosines_and_update_in_single_precision(name: str, engine: Engine) -> None:
    torch.manual_seed(0)
    model = ZOO[name].make(TASKS)
    losses = _run(model, name, torch.float32)
    probe = Probe(model, engine=engine)
    assert probe.check(losses) < 5e-6
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected: list[Tensor | None] = [None] * len(parameters)
    for loss in losses.values():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for i, grad in enumerate(grads):
            before = expected[i]
            expected[i] = grad if before is None else before if grad is None else before + grad
    probe.backward(losses)
    whole = max(float(e.to_dense().norm()) for e in expected if e is not None)
    for p, e in zip(parameters, expected, strict=True):
        assert (p.grad is None) == (e is None)
        if p.grad is not None and e is not None:
            error = float((p.grad.to_dense() - e.to_dense()).norm())
            assert error <= 2e-6 * float(e.to_dense().norm()) + 3e-7 * whole


@pytest.mark.parametrize("name", NETWORKS)
def test_split(name: str) -> None:
    model = _make(name).train()
    net = ZOO[name]
    alone = [
        x.name for x in find_layers(model) if not any(fnmatchcase(x.name, s) for s in (*net.single, *net.together))
    ]
    sets = [[n] for n in alone] + ([list(net.together)] if net.together else [])
    draw = random.Random(name)
    for _ in range(3):
        chosen = [n for names in draw.sample(sets, max(1, len(sets) // 3)) for n in names]
        groups = draw.choice([[["a"], ["b"], ["c"]], [["a", "c"], ["b"]]])
        new = split(model, Plan(tasks=TASKS, layers=dict.fromkeys(chosen, groups)), atomic=net.atomic)
        if Probe(new)._gradients.layout(_run(new, name)).layers:
            _check(new, name)
            continue
        with pytest.raises(ProbeError, match="nothing shared"):
            Probe(new).check(_run(new, name))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", LIBRARY)
def test_the_librarys_dense_networks(name: str) -> None:
    _check(_make(name).train(), name)
    model, net = _make(name).train(), NETS[name]
    alone = [x.name for x in find_layers(model) if not any(fnmatchcase(x.name, s) for s in net.single)]
    chosen = random.Random(name).sample(alone, len(alone) // 4)
    for groups in ([["a"], ["b"], ["c"]], [["a", "c"], ["b"]]):
        _check(split(model, Plan(tasks=TASKS, layers=dict.fromkeys(chosen, groups))), name)
