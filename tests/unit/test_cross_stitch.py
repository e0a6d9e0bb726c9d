"""Cross-stitch networks: sizes, the three forms by hand, separate networks when nothing is stitched."""

from functools import partial

import pytest
import torch
from torch import nn

from reconmtl.errors import ProblemError
from reconmtl.networks import resnet, segnet
from reconmtl.networks.cross_stitch import CrossStitch, Kind, Stitch
from reconmtl.networks.pieces import features, with_features


def alone(task: str) -> nn.Module:
    return segnet.nyuv2(width=2, tasks=[task])


@pytest.mark.parametrize(
    ("make", "outputs", "size"), [(segnet.cityscapes, segnet.CITYSCAPES, 190.59), (segnet.nyuv2, segnet.NYUV2, 285.88)]
)
def test_sizes_in_megabytes_are_the_published_ones(
    make: partial[nn.Module], outputs: dict[str, int], size: float
) -> None:
    model = CrossStitch(lambda task: make(tasks=[task]), outputs)
    assert round(sum(p.numel() for p in model.parameters()) * 4 / 2**20, 2) == size
    assert sum(s.weight.numel() for s in model.stitches) == 9 * len(outputs)  # type: ignore[misc,operator]


@pytest.mark.parametrize("kind", ["shared", "matrix", "channel"])
def test_stages_and_stitches_in_turn(kind: Kind) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 32, 32)
    tasks = tuple(segnet.NYUV2)
    model = CrossStitch(alone, tasks, kind=kind, sample=x).eval()
    for stitch in model.stitches:
        nn.init.normal_(stitch.weight)  # type: ignore[arg-type]
    outputs = model(x)
    states: dict[str, object] = dict.fromkeys(tasks, x)
    used = iter(model.stitches)
    for i in range(10):
        states = {t: list(model.networks[t].children())[i](s) for t, s in states.items()}
        if i == 4:
            continue
        weight = next(used).weight
        new = {}
        for row, task in enumerate(tasks):
            mixed = torch.zeros_like(features(states[task]))
            for column, other in enumerate(tasks):
                values = features(states[other])
                for c in range(values.shape[1]):
                    at = {"shared": (column,), "matrix": (row, column), "channel": (row, column, c)}[kind]
                    factor = weight[at]  # type: ignore[index]
                    mixed[:, c] += factor * values[:, c]
            new[task] = with_features(states[task], mixed)
        states = new
    for task in tasks:
        torch.testing.assert_close(outputs[task], model.heads[task](features(states[task])), rtol=1e-4, atol=1e-4)


def test_without_mixing_every_task_has_its_own_network() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 32, 32)
    networks = {t: alone(t) for t in segnet.NYUV2}
    model = CrossStitch(networks.__getitem__, networks, kind="matrix")
    for stitch in model.stitches:
        with torch.no_grad():
            stitch.weight.copy_(torch.eye(3))  # type: ignore[operator]
    for task, out in model.eval()(x).items():
        torch.testing.assert_close(out, networks[task].eval()(x)[task])


def test_first_weights_keep_the_scale_of_features_but_in_the_shared_form() -> None:
    for tasks in (1, 2, 5):
        assert torch.allclose(Stitch(tasks, "matrix").weight.sum(1), torch.ones(tasks))
        assert torch.equal(Stitch(tasks, "shared").weight, torch.ones(tasks))
    assert Stitch(3, "channel", channels=4).weight.shape == (3, 3, 4)


def test_what_cannot_be_stitched_is_refused() -> None:
    with pytest.raises(ProblemError, match="Nearest: 'shared'"):
        CrossStitch(alone, segnet.NYUV2, kind="share")  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="sample="):
        CrossStitch(alone, segnet.NYUV2, kind="channel")
    mixed = {"a": resnet.multifashion(2, tasks=["a"]), "b": segnet.dense({"b": 1}, width=2)}
    with pytest.raises(ProblemError, match=r"'a': 6, 'b': 10"):
        CrossStitch(mixed.__getitem__, mixed)
    with pytest.raises(ProblemError, match=r"missing for \['b'\]"):
        CrossStitch(lambda _: resnet.multifashion(2, tasks=["a"]), ["a", "b"])
