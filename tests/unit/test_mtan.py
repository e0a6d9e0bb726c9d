"""MTAN: layers by name and order, sizes, statistics per task in the joint network as in a split one."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from reconmtl.layers import find_layers
from reconmtl.networks import mtan, segnet
from reconmtl.plan import Plan
from reconmtl.probing import Probe
from reconmtl.splitting import split, view

KINDS = ("conv1", "bn1")
OWN = ("heads.", "encoder_att.", "decoder_att.")
TASKS = tuple(segnet.NYUV2)


def megabytes(*models: nn.Module) -> float:
    return round(sum(p.numel() for m in models for p in m.parameters()) * 4 / 2**20, 4)


def shared_names(model: nn.Module) -> list[str]:
    return [layer.name for layer in find_layers(model) if not layer.name.startswith(OWN)]


def test_the_shared_layers_have_the_published_names_and_order() -> None:
    attended = [f"{b}.{i}.{k}" for b in ("encoder_block_att", "decoder_block_att") for i in range(5) for k in KINDS]
    trunk = shared_names(segnet.nyuv2(width=1))
    assert shared_names(mtan.nyuv2(width=2)) == trunk + attended
    assert len(trunk + attended) == 72
    sizes = {layer.name: layer.numel for layer in find_layers(mtan.nyuv2())}
    assert sum(sizes[n] for n in trunk + attended) == 35_163_456


def test_sizes_in_megabytes_are_the_published_ones() -> None:
    assert megabytes(mtan.nyuv2()) == 168.7205
    assert megabytes(mtan.cityscapes()) == 157.1922
    assert megabytes(*(mtan.nyuv2(tasks=[t]) for t in segnet.NYUV2)) == 436.9964
    assert megabytes(*(mtan.cityscapes(tasks=[t]) for t in segnet.CITYSCAPES)) == 291.3301


def by_hand(model: mtan.MTAN, task: str, x: Tensor) -> Tensor:
    """A task's output, module by module, with the published pairing of stages."""
    shared = model.features(x)
    enter, leave = model.encoder_att[task], model.decoder_att[task]
    h: Any = None
    for i in range(5):
        first, last = shared.encoder[i]
        mask = enter[i](first if h is None else torch.cat((first, h), 1))  # type: ignore[index]
        h = F.max_pool2d(carry(model.encoder_block_att[i], mask * last, task), 2)
    for j in range(5):
        up, last = shared.unpooled[j], shared.decoder[j]
        h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=True)
        h = leave[4 - j](torch.cat((up, carry(model.decoder_block_att[4 - j], h, task)), 1)) * last  # type: ignore[index]
    assert h is not None
    out: Tensor = model.heads[task](h)
    return out / out.norm(dim=1, keepdim=True) if task == "normal" else out


def carry(layer: nn.Module, x: Tensor, task: str) -> Tensor:
    x = layer.conv1(x)  # type: ignore[operator]
    norm = layer.bn1
    s = norm.statistics[task]  # type: ignore[union-attr,index]
    return F.relu(F.batch_norm(x, s.running_mean, s.running_var, norm.weight, norm.bias, eps=s.eps))  # type: ignore


def test_the_network_computes_what_its_parts_say() -> None:
    torch.manual_seed(0)
    model = mtan.nyuv2(width=2).double()
    x = torch.rand(2, 3, 64, 32, dtype=torch.float64)
    for _ in range(3):
        model(torch.rand(2, 3, 32, 32, dtype=torch.float64))
    model.eval()
    assert isinstance(model, mtan.MTAN)
    for task, out in model(x).items():
        torch.testing.assert_close(out, by_hand(model, task, x), rtol=1e-10, atol=1e-12)


def test_joint_training_keeps_statistics_per_task() -> None:
    """Each task's statistics are those of a network that this task has alone."""
    torch.manual_seed(0)
    model = mtan.nyuv2(width=2)
    alone = {t: copy.deepcopy(model) for t in TASKS}
    x = torch.rand(4, 3, 32, 32)
    model(x)
    seen = {}
    for task, network in alone.items():
        for other in set(TASKS) - {task}:
            del network.heads[other]  # type: ignore[union-attr,operator]
        network(x)
        at = f"encoder_block_att.0.bn1.statistics.{task}.running_mean"
        torch.testing.assert_close(model.state_dict()[at], network.state_dict()[at])
        seen[task] = model.state_dict()[at]
    assert not torch.equal(seen["depth"], seen["normal"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layers",
    [["encoder_block.0.conv1"], ["encoder_block_att.2.bn1"], ["decoder_block_att.0.conv1", "conv_block_dec.3.1.bn1"]],
)
def test_split_networks_equal_the_original(layers: list[str], training: bool) -> None:
    torch.manual_seed(0)
    model = mtan.nyuv2(width=2).train(training)
    x = torch.rand(2, 3, 32, 32)
    expected = copy.deepcopy(model)(x)
    new = split(model, Plan(tasks=TASKS, layers=layers)).train(training)
    outputs = new(x)
    for task in TASKS:
        assert torch.equal(outputs[task], expected[task]), task
        torch.testing.assert_close(view(new, task).train(training)(x)[task], expected[task])


@pytest.mark.parametrize("layer", ["encoder_block_att.1.conv1", "conv_block_dec.4.1.conv1"])
@pytest.mark.parametrize("known", [True, False])
def test_shared_blocks_run_once_per_task_and_attention_for_its_own(layer: str, known: bool) -> None:
    x = torch.rand(2, 3, 32, 32)
    new = split(mtan.nyuv2(width=1), Plan(tasks=TASKS, layers=[layer]), sample=x if known else None)
    new(x)  # ownership is known now
    with Counting() as calls:  # type: ignore[no-untyped-call]
        new(x)
    attention, carrying, heads = 2 * (5 + 5), 5 + 5, 2
    branched = 0 if "_att" in layer else 1 + 4 + (2 + 2 + 1 + 1)  # of the trunk: all of the decoder from that layer on
    assert calls.convolutions == 26 + 2 * branched + len(TASKS) * (attention + carrying + heads)


class Counting(TorchDispatchMode):
    """Counts the convolutions that are run."""

    convolutions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.convolutions += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_the_probe_finds_the_72_shared_layers() -> None:
    model = mtan.nyuv2(width=1).double()
    probe = Probe(model)
    out = model(torch.rand(2, 3, 32, 32, dtype=torch.float64))
    probe.backward({task: o.square().mean() for task, o in out.items()})
    assert list(probe.log.layers) == shared_names(model)
