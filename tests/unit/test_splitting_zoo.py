import copy
import random
from typing import Any

import pytest
import torch
from torch import nn

from reconmtl.plan import Plan
from reconmtl.splitting import saved_plan, split, verify, view
from reconmtl.splitting.outputs import get_task, is_keyed
from reconmtl.splitting.structure import tensors, transform
from zoo import LIBRARY, NETS, TASKS, ZOO, build, sample, shared_layers, without_dropout


def call(model: nn.Module, name: str, dtype: torch.dtype = torch.float64) -> Any:
    def cast(t: torch.Tensor) -> torch.Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    net = NETS[name]
    return model(*transform(net.inputs(), cast), **transform(net.keywords(), cast))


class Quiet(nn.Module):
    """Passes everything on: gives networks with *args, **kwargs an argument of a name."""


def same(a: Any, b: Any) -> None:
    x, y = list(tensors(a)), list(tensors(b))
    assert len(x) == len(y) > 0
    assert all(torch.equal(u, v) for u, v in zip(x, y, strict=True))


def check(name: str, layers: list[str], *, groups: list[list[str]] | None = None) -> None:
    """One split: bit-equal at the start in three modes; outputs, gradients, buffers right after the copies differ."""
    model = without_dropout(build(name)).double()
    state, kinds = {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    plan = Plan(tasks=TASKS, layers={n: groups or [[t] for t in TASKS] for n in layers})
    for training, grad in ((True, True), (False, True), (False, False)):
        model.train(training)
        with torch.set_grad_enabled(grad):
            out = call(split(model, plan, atomic=NETS[name].atomic), name)
            for t in TASKS:
                same(get_task(out, t), get_task(call(copy.deepcopy(model), name), t))
    result = split(model.train(), plan, atomic=NETS[name].atomic, sample=sample(name))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for p in result.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)
    found = verify(result, sample(name))
    assert kinds == [type(m) for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), "the original changed"
    assert found.modes == ("train", "eval")
    assert found.output <= 1e-12
    assert found.gradient <= 1e-10


pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")


LARGE = ("resnet18",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in ZOO])
def test_every_layer_alone(name: str) -> None:
    for layers in shared_layers(name, build(name)):
        check(name, layers)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", LIBRARY)
def test_the_librarys_dense_networks(name: str) -> None:
    choices = shared_layers(name, build(name))
    pick = random.Random(name)
    for layers in pick.sample(choices, 5):
        check(name, layers)
    check(name, [n for layers in pick.sample(choices, len(choices) // 3) for n in layers], groups=[["a", "c"], ["b"]])


@pytest.mark.parametrize("name", ZOO)
def test_random_sets_and_groups(name: str) -> None:
    choices = shared_layers(name, build(name))
    pick = random.Random(name)
    for groups in (None, [["a", "c"], ["b"]]):
        some = pick.sample(choices, pick.randint(1, len(choices)))
        check(name, [n for layers in some for n in layers], groups=groups)


@pytest.mark.parametrize("name", ZOO)
def test_loop_mode_and_a_checkpoint_of_another_seed(name: str) -> None:
    tasks = ("t", "t1", "t11")  # names that are prefixes of each other
    model = without_dropout(build(name, tasks)).double()
    layers = [n for layers in shared_layers(name, model) for n in layers]
    plan = Plan(tasks=tasks, layers=layers)
    branch = split(model, plan, atomic=NETS[name].atomic)
    loop = split(model, plan, mode="loop")
    for training in (True, False):
        for m in (model, branch, loop):
            m.train(training)
        if name == "soft_sharing" and not training:  # the loop's statistics are those of a joint call per task
            continue
        a, b = call(branch, name), call(loop, name)
        for t in tasks:
            same(get_task(a, t), get_task(b, t))
    with torch.no_grad():
        for p in branch.parameters():
            p.mul_(1.1)
    assert saved_plan(branch.state_dict()) == saved_plan(branch)
    twin = split(build(name, tasks).double(), saved_plan(branch.state_dict()), atomic=NETS[name].atomic)
    twin.load_state_dict(branch.state_dict())
    twin.eval()
    out = call(branch, name)
    for t in tasks:
        same(get_task(out, t), get_task(call(twin, name), t))
        one = call(view(branch, t), name)
        same(get_task(out, t), one[t] if is_keyed(one, (t,)) else one)
