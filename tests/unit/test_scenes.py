"""Drawn rooms as a problem: every network, two, three and five tasks, the whole of Recon."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from reconmtl.comparing import compare
from reconmtl.errors import PlanError, ProblemError
from reconmtl.evaluation import Machine
from reconmtl.problems import scenes
from reconmtl.problems.rooms import draw
from reconmtl.train import fit, probe

PASCAL = ("semantic", "parts", "saliency", "normal", "edge")


def test_items_batches_and_drawn_rooms_agree() -> None:
    data = scenes.Scenes(4, seed=1, start=7, size=(16, 24))
    image, targets = data[2]
    room = draw(9, seed=1, size=(16, 24))
    assert torch.equal(image, torch.from_numpy(room.image) / 255)
    assert set(targets) == set(scenes.OUTPUTS)
    images, many = data.batch(torch.tensor([2, 0]))
    assert torch.equal(images[0], image)
    for task, values in many.items():
        drawn = torch.from_numpy(np.asarray(getattr(room, task)))
        assert torch.equal(values[0].squeeze().to(drawn.dtype), drawn), task
        assert torch.equal(values[0], targets[task])
    again = scenes.Scenes(4, seed=1, start=7, size=(16, 24), keep=False)
    assert torch.equal(again[-2][0], image)
    with pytest.raises(IndexError):
        data[4]


@pytest.mark.parametrize(
    ("network", "tasks"),
    [("segnet", ("semantic", "depth")), ("mtan", ("semantic", "depth", "normal")), ("mobilenet", PASCAL)],
)
def test_probe_split_and_train_on_every_network(network: str, tasks: tuple[str, ...], tmp_path: Path) -> None:
    problem = scenes.make(network=network, width=2, images=8, held_out=4, size=(32, 32), tasks=tasks)
    problem = problem.replace(recipe=problem.recipe.override(batch_size=4))
    machine = Machine(accelerator="cpu", max_batches=1)
    log = probe(problem, epochs=1, machine=machine)
    assert log.layers and not any(n.startswith(("heads", "encoder_att", "decoder_att")) for n in log.layers)
    plan = log.rank(severity=0.0).top(3)
    runs = [
        *fit(problem, method="single", epochs=1, machine=machine),
        *fit(problem, plan=plan, epochs=1, machine=machine, out=tmp_path),
    ]
    table = compare(runs)
    assert len(table.rows) == 2
    for run in runs:
        for task in problem.tasks:
            for metric in task.metrics:
                value = run.metrics[task.name][metric.name]
                assert 0 <= value < 200 or math.isnan(value)  # a small test may lack all of a thing


def test_what_rooms_do_not_have_is_refused() -> None:
    with pytest.raises(ProblemError, match=r"'keypoints'.*'heads'"):
        scenes.make(tasks=("keypoints", "heads"))
    with pytest.raises(ProblemError, match="Nearest: 'segnet'"):
        scenes.make(network="segnt")
    with pytest.raises(PlanError):
        scenes.make(tasks=("depth", "depth"))
    with pytest.raises(ProblemError, match="at least 1"):
        scenes.Scenes(0)
