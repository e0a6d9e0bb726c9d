"""SegNet: layers by name and order, sizes, and its function written a second time with plain operations."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reconmtl.errors import PlanError, ProblemError
from reconmtl.layers import find_layers
from reconmtl.networks import segnet
from reconmtl.plan import Plan
from reconmtl.splitting import cost, split, view

LOGSIGMA = 3
"""Elements of a parameter that the published networks own, count, and never use; ours leave it out."""


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def megabytes(parameters: int) -> float:
    return round(parameters * 4 / 2**20, 4)


def published_order() -> list[str]:
    names = [f"{block}.{i}" for block in ("encoder_block", "decoder_block") for i in range(5)]
    for block in ("conv_block_enc", "conv_block_dec"):
        names += [f"{block}.{i}" for i in range(2)] + [f"{block}.{i}.{j}" for i in range(2, 5) for j in range(2)]
    return [f"{name}.{kind}" for name in names for kind in ("conv1", "bn1")]


def shared_names(model: nn.Module) -> list[str]:
    return [layer.name for layer in find_layers(model) if not layer.name.startswith("heads.")]


def test_the_shared_layers_have_the_published_names_and_order() -> None:
    assert shared_names(segnet.cityscapes(width=2)) == shared_names(segnet.nyuv2(width=2)) == published_order()
    assert len(published_order()) == 52
    sizes = {layer.name: layer.numel for layer in find_layers(segnet.cityscapes())}
    assert sum(sizes[name] for name in published_order()) == 24_943_296


def test_sizes_in_megabytes_are_the_published_ones() -> None:
    for make, outputs, joint, alone in (
        (segnet.cityscapes, segnet.CITYSCAPES, 95.4349, 190.5860),
        (segnet.nyuv2, segnet.NYUV2, 95.5780, 285.8802),
    ):
        assert megabytes(count(make()) + LOGSIGMA) == joint
        assert megabytes(sum(count(make(tasks=[t])) + LOGSIGMA for t in outputs)) == alone


def test_the_size_of_a_plan_is_that_of_the_split_network() -> None:
    model = segnet.nyuv2(width=4)
    sizes = {layer.name: layer.numel for layer in find_layers(model)}
    names = published_order()
    for chosen in (names, names[:1], names[1::2], names[30:40]):
        plan = Plan(tasks=tuple(segnet.NYUV2), layers=chosen)
        expected = count(model) + 2 * sum(sizes[n] for n in chosen)
        assert cost(model, plan).parameters == expected == count(split(model, plan))


def test_the_network_computes_what_its_parameters_say() -> None:
    """Against the same function from the state dict alone; max-unpooling by hand."""
    torch.manual_seed(0)
    model = segnet.nyuv2(width=2).double().eval()
    state = model.state_dict()
    for name, value in state.items():
        if "bn1" in name and value.is_floating_point():
            value.uniform_(0.5, 1.5)
    images = x = torch.rand(2, 3, 33, 64, dtype=torch.float64)

    def layer(x: Tensor, at: str) -> Any:
        x = F.conv2d(x, state[f"{at}.conv1.weight"], state[f"{at}.conv1.bias"], padding=1)
        mean, var, weight, bias = (state[f"{at}.bn1.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return (x * weight[:, None, None] + bias[:, None, None]).clamp(min=0)

    def block(x: Tensor, at: str, stage: int) -> Any:
        return layer(layer(x, f"{at}.{stage}.0"), f"{at}.{stage}.1") if stage >= 2 else layer(x, f"{at}.{stage}")

    before = []
    for stage in range(5):
        before.append(block(layer(x, f"encoder_block.{stage}"), "conv_block_enc", stage))
        x = F.max_pool2d(before[-1], 2)
    for stage in reversed(range(5)):
        full = before[stage]
        up = torch.zeros_like(full)
        for n, c, i, j in torch.cartesian_prod(*(torch.arange(s) for s in x.shape)).tolist():
            window = full[n, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            k = int(window.argmax())
            up[n, c, 2 * i + k // 2, 2 * j + k % 2] = x[n, c, i, j]
        x = block(layer(up, f"decoder_block.{stage}"), "conv_block_dec", stage)
    for task, out in model(images).items():
        head = [state[f"heads.{task}.{i}.{n}"] for i in (0, 1) for n in ("weight", "bias")]
        expected = F.conv2d(F.conv2d(x, head[0], head[1], padding=1), head[2], head[3])
        if task == "normal":
            expected = expected / expected.square().sum(1, keepdim=True).sqrt()
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_split_networks_equal_the_original_at_any_layer(training: bool) -> None:
    torch.manual_seed(0)
    model = segnet.nyuv2(width=2).train(training)
    x = torch.rand(2, 3, 32, 64)
    expected = model(x)
    for name in published_order()[::7]:
        new = split(model, Plan(tasks=tuple(segnet.NYUV2), layers=[name])).train(training)
        outputs = new(x)
        assert all(torch.equal(outputs[t], expected[t]) for t in expected), name
        alone = view(new, "depth").train(training)(x)["depth"]
        torch.testing.assert_close(alone, expected["depth"])


def test_normals_have_length_one_and_zero_is_no_nan() -> None:
    model = segnet.nyuv2(width=2)
    out = model(torch.rand(1, 3, 32, 32))["normal"]
    torch.testing.assert_close(out.square().sum(1), torch.ones(1, 32, 32))
    nn.init.zeros_(model.heads["normal"][1].weight)  # type: ignore[index,union-attr]
    assert model(torch.rand(1, 3, 32, 32))["normal"].abs().sum() == 0


def test_any_subset_of_tasks_in_any_order() -> None:
    for tasks in [t for n in (1, 2, 3) for t in combinations(reversed(list(segnet.NYUV2)), n)]:
        assert tuple(segnet.nyuv2(width=1, tasks=tasks)(torch.rand(2, 3, 32, 32))) == tasks


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ProblemError, match=r"'depht'.*'depth'"):
        segnet.cityscapes(tasks=["depht"])
    with pytest.raises(ProblemError, match=r"width = 0"):
        segnet.nyuv2(0)
    with pytest.raises(ProblemError, match=r"'a' has 0 output channels(.|\n)*'b' has 1.5(.|\n)*'c'"):
        segnet.dense({"a": 0, "b": 1.5}, unit=["c"])  # type: ignore[dict-item]
    with pytest.raises(PlanError):
        segnet.dense({"a.b": 1})
    with pytest.raises(ProblemError, match="31 x 64"):
        segnet.dense({"a": 1}, width=1)(torch.rand(1, 3, 31, 64))
