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
from reconmtl.probing import Probe
from reconmtl.splitting import split
from reconmtl.splitting.structure import tensors, transform
from zoo import TASKS, ZOO

COMPLEX = "spectral"


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


def _run(model: nn.Module, name: str) -> dict[str, Tensor]:
    net = ZOO[name]
    torch.manual_seed(5)
    return _losses(model(*transform(net.inputs(), _double), **transform(net.keywords(), _double)))


def _check(model: nn.Module, name: str) -> None:
    twin = copy.deepcopy(model)
    losses = _run(model, name)
    probe = Probe(model)
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


NETWORKS = [n for n in ZOO if n != COMPLEX]


def test_complex_parameters_are_refused_by_name() -> None:
    model = ZOO[COMPLEX].make(TASKS).double()
    with pytest.raises(ProbeError, match="complex"):
        Probe(model).backward(_run(model, COMPLEX))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_unsplit(name: str, training: bool) -> None:
    torch.manual_seed(0)
    _check(ZOO[name].make(TASKS).double().train(training), name)


@pytest.mark.parametrize("name", NETWORKS)
def test_split(name: str) -> None:
    torch.manual_seed(0)
    model = ZOO[name].make(TASKS).double().train()
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
