"""MobileNetV2 with R-ASPP: number and order of layers, sizes, strides, and its function written a second time."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reconmtl.errors import ProblemError
from reconmtl.layers import find_layers
from reconmtl.networks import mobilenet_raspp
from reconmtl.plan import Plan
from reconmtl.splitting import split, view

TASKS = tuple(mobilenet_raspp.PASCAL_CONTEXT)


def megabytes(*models: nn.Module) -> float:
    return round(sum(p.numel() for m in models for p in m.parameters()) * 4 / 2**20, 4)


def test_sizes_and_number_of_shared_layers_are_the_published_ones() -> None:
    model = mobilenet_raspp.pascal_context()
    assert megabytes(model) == 8.0389
    assert megabytes(*(mobilenet_raspp.pascal_context(tasks=[t]) for t in TASKS)) == 30.0936
    shared = [layer for layer in find_layers(model) if not layer.name.startswith("heads.")]
    assert len(shared) == 108
    assert [layer.type for layer in shared] == ["Conv2d", "BatchNorm2d"] * 54
    trunk = [layer.numel for layer in shared if layer.name.startswith("features.")]
    assert (len(trunk), sum(trunk)) == (102, 1_811_712)


def test_strides_and_dilations_give_a_sixteenth_of_the_side() -> None:
    model = mobilenet_raspp.pascal_context(width=4).eval()
    assert isinstance(model, mobilenet_raspp.MobileNetRASPP)
    sides = []
    x = torch.rand(1, 3, 128, 96)
    for module in model.features:
        x = module(x)
        sides.append(x.shape[2])
    assert sides == [64, 64, 32, 32, *[16] * 3, *[8] * 11]
    dilated = [m.dilation[0] for m in model.features.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert dilated == [1] * 14 + [2] * 3


def test_the_network_computes_what_its_parameters_say() -> None:
    torch.manual_seed(0)
    model = mobilenet_raspp.pascal_context(width=4).double()
    for _ in range(2):
        model(torch.rand(2, 3, 64, 64, dtype=torch.float64))
    model.eval()
    state = model.state_dict()
    x = torch.rand(2, 3, 64, 96, dtype=torch.float64)

    def unit(x: Tensor, conv: str, norm: str, relu: bool = True, **options: Any) -> Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], **options)
        x = F.batch_norm(x, *(state[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")))
        return F.relu6(x) if relu else x

    def block(x: Tensor, i: int) -> Tensor:
        inputs, outputs, stride, expansion, dilation = mobilenet_raspp.BLOCKS[i - 1]
        at, h = f"features.{i}.conv", x
        if expansion > 1:
            h = unit(h, f"{at}.0.0", f"{at}.0.1")
        depth = 0 if expansion == 1 else 1
        options: dict[str, Any] = {"stride": stride, "padding": dilation, "dilation": dilation, "groups": h.shape[1]}
        h = unit(h, f"{at}.{depth}.0", f"{at}.{depth}.1", **options)
        h = unit(h, f"{at}.{depth + 1}", f"{at}.{depth + 2}", relu=False)
        return x + h if inputs == outputs else h

    h = unit(x, "features.0.0", "features.0.1", stride=2, padding=1)
    for i in range(1, 4):
        h = low = block(h, i)
    for i in range(4, 18):
        h = block(h, i)
    pooled = unit(h.mean((2, 3), keepdim=True), "raspp.pooled.0", "raspp.pooled.1")
    both = torch.cat([unit(h, "raspp.local.0", "raspp.local.1"), pooled.expand(-1, -1, *h.shape[2:])], 1)
    coarse = unit(both, "raspp.fuse.0", "raspp.fuse.1")
    for task, out in model(x).items():
        at = f"heads.{task}"
        y = unit(low, f"{at}.low.0", f"{at}.low.1")
        y = torch.cat([y, F.interpolate(coarse, size=y.shape[2:], mode="bilinear")], 1)
        for i in range(4):
            options: dict[str, Any] = {"padding": 1, "groups": y.shape[1]} if i % 2 == 0 else {}
            y = unit(y, f"{at}.rest.{i}.0", f"{at}.rest.{i}.1", **options)
        y = F.conv2d(y, state[f"{at}.rest.4.weight"], state[f"{at}.rest.4.bias"])
        y = F.interpolate(y, size=x.shape[2:], mode="bilinear")
        torch.testing.assert_close(
            out, y / y.norm(dim=1, keepdim=True) if task == "normal" else y, rtol=1e-8, atol=1e-10
        )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layers", [["features.0.1"], ["features.4.conv.1.0"], ["raspp.pooled.0", "raspp.fuse.1"]])
def test_split_networks_equal_the_original(layers: list[str], training: bool) -> None:
    torch.manual_seed(0)
    model = mobilenet_raspp.pascal_context(width=4)
    model.raspp.dropout.p = 0.0  # type: ignore[union-attr]
    model.train(training)
    x = torch.rand(2, 3, 32, 64)
    expected = copy.deepcopy(model)(x)
    new = split(model, Plan(tasks=TASKS, layers=layers)).train(training)
    outputs = new(x)
    for task in TASKS:
        assert torch.equal(outputs[task], expected[task]), task
        torch.testing.assert_close(view(new, task).train(training)(x)[task], expected[task])


def test_the_fifth_task_of_the_field_and_unknown_ones() -> None:
    model = mobilenet_raspp.pascal_context(width=4, tasks=["edge", "parts"])
    out = model(torch.rand(2, 3, 32, 32))
    assert {t: tuple(o.shape) for t, o in out.items()} == {"edge": (2, 1, 32, 32), "parts": (2, 7, 32, 32)}
    with pytest.raises(ProblemError, match="Nearest: 'saliency'"):
        mobilenet_raspp.pascal_context(tasks=["salience"])
