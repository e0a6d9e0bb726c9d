"""The networks of the paper: layers by name and order, sizes to four decimals, shapes, initial weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reconmtl.errors import PlanError, ProblemError
from reconmtl.layers import Layer, find_layers, match_layers
from reconmtl.networks.resnet import CELEBA_ATTRIBUTES, BasicBlock, celeba, multifashion
from reconmtl.plan import Plan
from reconmtl.splitting import cost, split, view


def shared(model: nn.Module) -> list[Layer]:
    return [layer for layer in find_layers(model) if not layer.name.startswith("heads.")]


def published_order(*, fc: bool) -> list[str]:
    """The order in which the paper's code lists the shared layers, spelled out by its rule."""
    names = ["conv1", "bn1"]
    for group in range(1, 5):
        for block in range(2):
            here = f"layer{group}.{block}"
            names += [f"{here}.conv1", f"{here}.bn1", f"{here}.conv2", f"{here}.bn2"]
            if block == 0 and group > 1:
                names += [f"{here}.downsample.0", f"{here}.downsample.1"]
    return [*names, "fc"] if fc else names


def megabytes(parameters: int) -> float:
    return round(parameters * 4 / 2**20, 4)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_shared_layers_have_the_published_names_and_order() -> None:
    assert [layer.name for layer in shared(multifashion())] == published_order(fc=True)
    assert [layer.name for layer in shared(celeba(width=8))] == published_order(fc=False)
    assert [len(published_order(fc=fc)) for fc in (True, False)] == [41, 40]


def test_some_layers_have_the_published_sizes() -> None:
    sizes = {layer.name: layer.numel for layer in shared(multifashion())}
    assert sum(sizes.values()) == 11_221_540
    assert {name: sizes[name] for name in ("conv1", "bn1", "layer1.0.conv1", "layer2.0.downsample.0", "fc")} == {
        "conv1": 3136,
        "bn1": 128,
        "layer1.0.conv1": 36864,
        "layer2.0.downsample.0": 8192,
        "fc": 51300,
    }


def test_sizes_in_megabytes_are_the_published_ones() -> None:
    model = multifashion()
    twice = [x for x in shared(model) if x.type == "BatchNorm2d" or x.name == "conv1"]
    twice += [x for x in shared(model) if x.name.startswith("layer1.") and x.type == "Conv2d"]
    assert len(twice) == 25
    assert megabytes(count(model)) == 42.8145
    assert megabytes(count(model) + sum(x.numel for x in twice)) == 43.4256
    assert megabytes(count(model) + sum(x.numel for x in shared(model))) == 85.6213
    assert megabytes(2 * count(multifashion(tasks=["digit"]))) == 85.6213


TASKS = ("digit", "fashion")
CHOSEN = ["*bn?", "*.downsample.1", "conv1", "layer1.*.conv?"]  # the 25 layers that the paper's code ships


def test_the_split_network_has_the_published_size_also_when_it_is_only_priced() -> None:
    model = multifashion()
    for layers, size in ((CHOSEN, 43.4256), ([x.name for x in shared(model)], 85.6213)):
        plan = Plan(tasks=TASKS, layers=layers)
        new = split(model, plan)
        assert megabytes(count(new)) == size
        assert round(cost(model, plan).megabytes, 4) == size
        assert round(cost(new).megabytes, 4) == size


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layers",
    [
        CHOSEN,
        ["layer1.0.conv2"],  # inside a block without downsampling: every task keeps the skip connection
        ["layer2.0.downsample.0", "layer3.1.bn1"],
        ["layer4.1.bn2", "fc"],
        ["*"],
    ],
)
def test_the_split_network_is_the_original_function_until_it_is_trained(layers: list[str], training: bool) -> None:
    torch.manual_seed(0)
    model = multifashion(width=4)
    x = torch.rand(6, 1, 36, 36)
    model(torch.rand(32, 1, 36, 36))  # running statistics that are not the initial ones
    names = match_layers(layers, [layer.name for layer in shared(model)])
    new = split(model, Plan(tasks=TASKS, layers=names)).train(training)
    model.train(training)
    expected, outputs = copy.deepcopy(model)(x), new(x)
    for task in TASKS:
        assert torch.equal(outputs[task], expected[task])
    optimizer = torch.optim.SGD(new.parameters(), lr=0.1)
    sum(F.cross_entropy(o, torch.arange(6) + i) for i, o in enumerate(outputs.values())).backward()  # type: ignore[union-attr]
    optimizer.step()
    trained = new(x)
    assert not any(torch.equal(trained[t], expected[t]) for t in TASKS)


def test_retraining_the_split_network_is_training_two_networks_that_share_weights() -> None:
    torch.manual_seed(0)
    model = multifashion(width=2).double()
    names = [x.name for x in shared(model)]
    plan = Plan(tasks=TASKS, layers=match_layers(CHOSEN, names))
    new = split(model, plan)
    pair = {t: copy.deepcopy(model) for t in TASKS}
    tied = {n: p for n, p in pair["digit"].named_parameters() if n.rpartition(".")[0] not in plan.layers}
    for name in tied:
        if not name.startswith("heads."):
            owner, _, key = name.rpartition(".")
            setattr(pair["fashion"].get_submodule(owner), key, tied[name])
    both = {id(p): p for m in pair.values() for p in m.parameters()}
    optimizers = [torch.optim.SGD(p, lr=0.05, momentum=0.9) for p in (list(new.parameters()), list(both.values()))]
    draw = torch.Generator().manual_seed(1)
    for _ in range(10):
        x = torch.rand(8, 1, 36, 36, generator=draw, dtype=torch.float64)
        targets = {t: torch.randint(0, 10, (8,), generator=draw) for t in TASKS}
        outputs = new(x), {t: m(x)[t] for t, m in pair.items()}
        for optimizer, out in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            sum(F.cross_entropy(out[t], targets[t]) for t in TASKS).backward()  # type: ignore[union-attr]
            optimizer.step()
    for task in TASKS:
        alone = view(new, task)
        states = alone.state_dict(), pair[task].state_dict()
        for name, value in states[1].items():
            if "heads." not in name or task in name:
                key = name if name in states[0] else f"module.{name}"
                torch.testing.assert_close(states[0][key], value, rtol=1e-9, atol=1e-12, msg=f"{task} {name}")


def test_sizes_of_the_celeba_network_are_the_published_ones() -> None:
    assert megabytes(count(celeba())) == 43.2603
    assert megabytes(40 * count(celeba(tasks=["Smiling"]))) == 1706.0257
    assert len(set(CELEBA_ATTRIBUTES)) == 40


@pytest.mark.parametrize("width", [1, 8, 16])
def test_every_task_gets_logits_at_any_width(width: int) -> None:
    out = multifashion(width, tasks=["a", "b", "c"], classes=7)(torch.rand(3, 1, 36, 36))
    assert {task: tuple(x.shape) for task, x in out.items()} == {"a": (3, 7), "b": (3, 7), "c": (3, 7)}
    assert list(out) == ["a", "b", "c"]


def test_the_celeba_network_takes_images_of_64_pixels() -> None:
    out = celeba(width=4)(torch.rand(2, 3, 64, 64))
    assert tuple(out) == CELEBA_ATTRIBUTES
    assert {tuple(x.shape) for x in out.values()} == {(2, 2)}


def test_feature_maps_have_the_published_strides() -> None:
    model = multifashion(width=8)
    assert tuple(model.features(torch.rand(2, 1, 36, 36)).shape) == (2, 64, 2, 2)  # type: ignore[operator]
    assert tuple(model.features(torch.rand(1, 1, 96, 64)).shape) == (1, 64, 3, 2)  # type: ignore[operator]


def test_the_network_computes_what_its_parameters_say() -> None:
    """Against the same function written with `torch.nn.functional` and the state dict alone."""
    torch.manual_seed(0)
    model = multifashion(width=4).eval()
    state = model.state_dict()
    for name, value in state.items():
        if value.is_floating_point() and ("bn" in name or "downsample.1" in name):
            value.uniform_(0.5, 1.5)
    x = torch.rand(2, 1, 36, 36)

    def norm(x: torch.Tensor, at: str) -> torch.Tensor:
        return F.batch_norm(
            x, state[f"{at}.running_mean"], state[f"{at}.running_var"], state[f"{at}.weight"], state[f"{at}.bias"]
        )

    h = F.max_pool2d(F.relu(norm(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), "bn1")), 3, 2, 1)
    for group in range(1, 5):
        for block in range(2):
            at, stride = f"layer{group}.{block}", 2 if group > 1 and block == 0 else 1
            skip = h
            if stride == 2:
                skip = norm(F.conv2d(h, state[f"{at}.downsample.0.weight"], stride=2), f"{at}.downsample.1")
            y = F.relu(norm(F.conv2d(h, state[f"{at}.conv1.weight"], stride=stride, padding=1), f"{at}.bn1"))
            h = F.relu(norm(F.conv2d(y, state[f"{at}.conv2.weight"], padding=1), f"{at}.bn2") + skip)
    h = F.relu(F.linear(h.mean((2, 3)), state["fc.weight"], state["fc.bias"]))
    for task, out in model(x).items():
        expected = F.linear(h, state[f"heads.{task}.weight"], state[f"heads.{task}.bias"])
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert out.std() > 1e-3


def test_every_parameter_gets_a_gradient_and_heads_only_their_own() -> None:
    model = multifashion(width=4)
    model(torch.rand(4, 1, 36, 36))["digit"].square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"heads.fashion.weight", "heads.fashion.bias"}


def test_weights_start_as_kaiming_normal_by_fan_out() -> None:
    torch.manual_seed(0)
    for name, module in multifashion().named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            weight = module.weight.detach()
            expected, n = (2 / fan_out) ** 0.5, weight.numel()
            assert abs(float(weight.std()) / expected - 1) < 4 / (2 * n) ** 0.5, name
            assert abs(float(weight.mean())) < 4 * expected / n**0.5, name
            assert module.bias is None
        elif isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all()) and bool((module.bias == 0).all())


def test_equal_seeds_give_equal_weights_whatever_the_heads_are_called() -> None:
    torch.manual_seed(3)
    one = multifashion(width=4)
    torch.manual_seed(3)
    other = multifashion(width=4, tasks=["x", "y"])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_block_with_a_changed_shape_has_a_downsample_and_others_have_none() -> None:
    assert BasicBlock(4, 4, stride=1).downsample is None
    assert BasicBlock(4, 8, stride=1).downsample is not None
    assert BasicBlock(4, 4, stride=2).downsample is not None


@pytest.mark.parametrize("width", [0, -8, 2.5, True, "64"])
def test_a_width_that_is_no_number_of_channels_is_refused(width: int) -> None:
    with pytest.raises(ProblemError, match="expected a whole number of channels"):
        multifashion(width)


def test_task_names_are_checked_before_anything_is_built() -> None:
    with pytest.raises(PlanError, match=r"'a\.b' contains"):
        multifashion(tasks=["a.b", "c"])
